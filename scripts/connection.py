"""One connection of one call of a load test: callers.Caller over a socket of its own.

What it owns: `Wire`, the socket and where it sends to, which can be another one from now on
(`move`); and `Client`, which authenticates what comes and hands it to its call (ring.py).

Rules that stay true:
- On loopback each connection has an address of its own, as clients have: a limit for one address
  is then none for this machine.
- Until a check is answered, each candidate of the answer is tried; then only the one that answered.
- Times of arrival are the kernel's, as time.monotonic_ns() has them.
- A socket that was left by `move` stays open, unread, until the end: what is still sent to it
  vanishes as at a NAT, and no ICMP tells of it.

RFC 8445 (ICE), RFC 3711 (SRTP), socket(7) for SO_TIMESTAMPNS.
"""

import asyncio
import contextlib
import ipaddress
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

import callers
import pylibsrtp
import target

import dtls
import rtp
import stun

CANDIDATES_MAX = 8
"""Of an answer."""

EARLY_MAX = 50
"""SRTP kept until its keys are there."""

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")
_BUFFER_OCTETS = 256 << 10


class Exchange(Protocol):
    """What a wire needs of the engine (ringing.Ringing)."""

    owned: bool
    certificate: dtls.Certificate
    offset_ns: int
    """From time.monotonic_ns() to the wall clock."""

    def address(self) -> str:
        """An address of loopback that nothing else of this process sends from."""


class Owner(Protocol):
    """What a client needs of its call (ring.Call)."""

    number: int

    def alive(self, at_ns: int) -> None:
        """Something authentic has come, or an answer to a check."""

    def reached(self, moment: str, at_ns: int | None = None) -> None:
        """A moment of the call, the first time."""

    def secured(self, rate_hz: int) -> None:
        """Speech may begin, encoded for that rate."""

    def packet(self, packet: rtp.Packet, at_ns: int) -> None:
        """A packet of audio."""

    def reported(self, block: rtp.Block, at_ns: int) -> None:
        """The other side says what came of ours."""

    def event(self, event: dict[str, Any]) -> None:
        """An event of the data channel."""

    def closed(self) -> None:
        """The other side has closed the connection."""


def _family(host: str) -> socket.AddressFamily:
    """Of a literal address. Raises ValueError for a name: answers name none."""
    version = ipaddress.ip_address(host).version
    return socket.AF_INET if version == 4 else socket.AF_INET6


class Wire:
    """The socket of one connection (callers.Wire)."""

    def __init__(self, exchange: Exchange) -> None:
        self.loop = asyncio.get_running_loop()
        self.certificate = exchange.certificate
        self.errors: list[str] = []
        self.address = ("", 0)
        self.rate_hz = 48_000
        """What the server wants its audio encoded for."""
        self.receive: Callable[[bytes, int], None] = lambda _, __: None
        self._exchange = exchange
        self._candidates: list[tuple[str, int]] = []
        self._remote: tuple[str, int] | None = None
        self._socket: socket.socket | None = None
        self._left: list[socket.socket] = []

    def payloads(self, rate_hz: int) -> list[bytes]:
        """Speech is the call's: only the rate is noted."""
        self.rate_hz = rate_hz
        return []

    def register(self, _: callers.Caller, candidates: list[tuple[str, int]]) -> Any:
        """Open the socket. Raises target.TargetError for a candidate that may not be loaded,
        ValueError for one that is no address, OSError where there is no way to any."""
        owned = self._exchange.owned
        preferred = _family(candidates[0][0])
        found = [(target.guard(host, owned), port) for host, port in candidates[:CANDIDATES_MAX]]
        # One socket has one family: that of the candidate which the server names first.
        self._candidates = [each for each in found if _family(each[0]) == preferred]
        self._socket = self._opened()
        return None

    def send(self, _: Any, payload: bytes) -> None:
        """One datagram."""
        if self._socket is None:
            return
        remotes = self._candidates if self._remote is None else (self._remote,)
        for remote in remotes:
            with contextlib.suppress(OSError):  # nobody is there, or a buffer is full: it is lost
                self._socket.sendto(payload, remote)

    def move(self, near: bool = False) -> None:
        """Send from another socket from now on, and hear on no other one: `near`, from another port
        of the same address."""
        if self._socket is not None:
            self.loop.remove_reader(self._socket)
            self._left.append(self._socket)
            self._socket = self._opened(self.address[0] if near else "")

    def forget(self, _: callers.Caller | None = None) -> None:
        """Close everything; twice is harmless."""
        if self._socket is not None:
            self.loop.remove_reader(self._socket)
            self._left.append(self._socket)
        for each in self._left:
            each.close()
        self._socket = None
        self._left.clear()

    def _opened(self, own: str = "") -> socket.socket:
        host = self._candidates[0][0]
        family = _family(host)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_OCTETS)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        loopback = family == socket.AF_INET and ipaddress.ip_address(host).is_loopback
        own = own or (self._exchange.address() if loopback else "")
        sock.bind((own, 0))
        self.address = sock.getsockname()[:2]
        self.loop.add_reader(sock, self._readable, sock)
        return sock

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                datagram, ancillary, _, source = sock.recvmsg(2048, 64)
            except OSError:  # nothing more, or an ICMP error of something sent: recv(2)
                return
            at = source[:2]
            if at != self._remote:
                if at not in self._candidates or not datagram:
                    continue
                if self._remote is None and datagram[0] == 1:  # a check is answered
                    self._remote = at
            if not datagram:
                continue
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            self.receive(datagram, seconds * 1_000_000_000 + nanoseconds - self._exchange.offset_ns)
            if sock is not self._socket:
                return


class Client(callers.Caller):
    """One connection of a call."""

    def __init__(self, owner: Owner, wire: Wire) -> None:
        super().__init__(wire, owner.number)
        self.wire = wire
        self._owner = owner
        self._early: list[tuple[bytes, int]] = []
        self._receiving: Any = None
        self._reception: rtp.Reception | None = None
        self._gone = False
        self.bad = 0
        """Packets that did not authenticate."""
        wire.receive = self.received

    def check(self) -> None:
        """Check the path now, once more than on schedule."""
        ufrag, password = self._remote
        name = f"{ufrag}:{self.ufrag}"
        self.wire.send(None, stun.request(secrets.token_bytes(12), name, password))

    def say(self, payload: bytes) -> None:
        """The next packet of speech."""
        self._payloads, self._phase = [payload], 0
        self.send()

    def secured(self) -> None:
        """There are keys: what has been kept is heard, and speech begins."""
        self._receiving = self._dtls._rx_srtp
        self._dtls.on("statechange", self._changed)
        self._owner.secured(self.wire.rate_hz)
        self.start()
        for payload, at_ns in self._early:
            self.received(payload, at_ns)
        self._early.clear()

    def received(self, payload: bytes, at_ns: int) -> None:
        """A datagram of the server's."""
        first = payload[0]
        if first >= 0x80:
            if self._receiving is not None:
                self._media(payload, at_ns)
            elif len(self._early) < EARLY_MAX:
                self._early.append((payload, at_ns))
        elif first >= 20:
            self._owner.alive(at_ns)
            for record in dtls.records(payload):
                self._inbox.put_nowait(record)
        elif payload[:2] == b"\x01\x01":  # a Binding success
            self._owner.alive(at_ns)
            if not self._connected.is_set():
                self._owner.reached("checked", at_ns)
                self._connected.set()
        elif payload[:2] == b"\x00\x01":  # a full agent checks us, too
            host, port = self.wire.address
            self.wire.send(None, stun.success(payload[8:20], host, port, self.password.encode()))

    async def leave(self, politely: bool) -> None:
        """Close the connection, with a goodbye or without."""
        self._gone = self._gone or not politely
        self._dtls.remove_all_listeners("statechange")
        with contextlib.suppress(ConnectionError, OSError):
            if self._sctp is not None:
                await self._sctp.stop()
            await self._dtls.stop()
        self.end()

    def _media(self, datagram: bytes, at_ns: int) -> None:
        rtcp = stun.is_rtcp(datagram)
        try:
            if rtcp:
                plain = self._receiving.unprotect_rtcp(datagram)
            else:
                plain = self._receiving.unprotect(datagram)
        except pylibsrtp.Error:
            self.bad += 1
            return
        self._owner.alive(at_ns)
        if rtcp:
            for block in rtp.read_reports(plain):
                if block.ssrc == self.ssrc:
                    self._owner.reported(block, at_ns)
            for sender in rtp.read_senders(plain):
                if self._reception is not None and sender.ssrc == self._reception.ssrc:
                    self._reception.sender_report(sender, at_ns / 1e9)
            return
        packet = rtp.read(plain)
        if packet is None:
            return
        if self._reception is None:
            self._reception = rtp.Reception(packet.ssrc)
        self._reception.received(packet.sequence, packet.timestamp, at_ns / 1e9)
        self._owner.packet(packet, at_ns)

    def _report(self) -> None:
        sender = rtp.Sender(
            self.ssrc, rtp.ntp(time.time()), self._timestamp, self._sent, self._octets
        )
        now = time.monotonic()
        blocks = [] if self._reception is None else [self._reception.report(now)]
        packet = rtp.sender_report(sender, blocks, "caller")
        self.wire.send(None, self._dtls._tx_srtp.protect_rtcp(packet))
        self._later("report", callers.REPORT_S, self._report)

    def _event(self, message: str | bytes) -> None:
        with contextlib.suppress(ValueError):  # what is no event is the server's mistake, and none
            event = json.loads(message)
            if isinstance(event, dict):
                self._owner.event(event)

    def _changed(self) -> None:
        if self._dtls.state in ("closed", "failed"):
            self._owner.closed()

    async def _send(self, datagram: bytes) -> None:
        if not self._gone:
            await super()._send(datagram)
