"""TURN, for measurements that compare ways in: a real coturn, and a client as browsers have one.

    allocate     a request without credentials, the challenge, the request again: two round trips,
                 which need no peer and are made while candidates are gathered, before the offer
    turn_to      permission and channel for a peer, which the answer names. Until the channel is
                 bound, data goes in Send indications right behind the request for the permission,
                 as Chromium's goes, so that nothing waits for either
    send         data to the peer: 4 octets of ChannelData in front of it once there is a channel

It takes no part in reading or writing sockets: what it wants sent goes through a function that it
is given, what has come is put into `received`, which returns what the peer has sent. Requests are
repeated until they are answered, for some seconds.

coturn runs as Debian has it, with long-term credentials, on loopback, UDP alone.

RFC 8656 https://www.rfc-editor.org/rfc/rfc8656 (TURN), RFC 8489 section 9.2 (credentials).
"""

import asyncio
import hashlib
import secrets
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dev
import rig
from aioice import stun

Address = tuple[str, int]

USER, PASSWORD, REALM = "caller", secrets.token_hex(12), "earshot.test"
"""Of this process's coturn: nobody else's can be used by accident."""

INSTALL = "apt-get install coturn"

PORTS_FIRST, PORTS = 49_152, 16_384
"""coturn's own range for relayed addresses (RFC 8656 section 7.2), one port an allocation."""

CHANNEL = 0x4000
CHANNEL_OCTETS = 4
"""In front of a client's every datagram, once its channel is bound."""

RESEND_S, PATIENCE_S = 0.5, 5.0
"""RFC 8489 section 6.2.1 begins at 500 ms; a lane takes 100 ms."""

UDP = 17 << 24
_CHANNEL_DATA = struct.Struct(">HH")


class TurnError(ConnectionError):
    """The TURN server refused something, or did not answer; the message says what."""


def missing() -> str | None:
    """What is to be done before coturn can be started here; None if it is there."""
    return None if shutil.which("turnserver") else f"there is no turnserver: {INSTALL}"


class Coturn:
    """A coturn on loopback, as a program of a dev.System."""

    NAME = "turnserver"

    def __init__(self, system: dev.System, port: int) -> None:
        """Start it. Raises dev.StartError."""
        self._system, self.address = system, ("127.0.0.1", port)
        self.start()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._system.running[self.NAME].pid

    def start(self) -> None:
        """Start it, also again, and wait until its port is open. Raises dev.StartError."""
        host, port = self.address
        folder = self._system.state_dir
        self._system.start(
            self.NAME,
            *("turnserver", "-n", "--listening-ip", host, "--listening-port", str(port)),
            *("--relay-ip", host, "--allow-loopback-peers", "--no-tcp", "--no-tls", "--no-dtls"),
            *("--no-cli", "--no-rfc5780", "--fingerprint", "--lt-cred-mech", "--realm", REALM),
            *("--user", f"{USER}:{PASSWORD}", "--userdb", str(folder / "turndb")),
            *("--log-file", "stdout", "--simple-log", "--pidfile", str(folder / "turnserver.pid")),
            ready=None,
        )
        deadline = time.monotonic() + dev.START_SECONDS_MAX
        while not rig.listens(port):
            if self._system.running[self.NAME].poll() is not None or time.monotonic() > deadline:
                raise dev.StartError(f"coturn: {self._system.log_tail(self.NAME)}")
            time.sleep(0.01)


class Client:
    """One client of a TURN server, with one allocation and one peer."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        """`send` sends a datagram to the TURN server."""
        self._send = send
        self._waiting: dict[bytes, asyncio.Future[stun.Message]] = {}
        self._tasks: set[asyncio.Task[stun.Message]] = set()
        self._peer: Address | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a client whose server has forgotten it."""
        self._realm, self._nonce, self._key = "", b"", b""
        self.relayed: Address | None = None
        """The public address that stands for this client at its peer, once there is one."""
        self.bound = False
        """Whether the channel is bound."""

    async def allocate(self) -> None:
        """Get a relayed address. Raises TurnError."""
        answer = await self._ask(stun.Method.ALLOCATE, {"REQUESTED-TRANSPORT": UDP})
        self.relayed = answer.attributes["XOR-RELAYED-ADDRESS"]

    async def release(self) -> None:
        """Give the allocation back, without which the next client from this port is refused. Raises
        TurnError."""
        if self.relayed is not None:
            self.relayed = None
            await self._ask(stun.Method.REFRESH, {"LIFETIME": 0})

    def turn_to(self, peer: Address) -> None:
        """From here on what is sent goes to this peer. What that takes has been asked for when this
        returns, and is waited for by nobody."""
        self._peer = peer
        binding = {"CHANNEL-NUMBER": CHANNEL, "XOR-PEER-ADDRESS": peer}
        for method, attributes in (
            (stun.Method.CREATE_PERMISSION, {"XOR-PEER-ADDRESS": peer}),
            (stun.Method.CHANNEL_BIND, binding),
        ):
            work = self._ask(method, attributes, self._begin(method, attributes))
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def send(self, payload: bytes) -> None:
        """A datagram to the peer."""
        if self.bound:
            self._send(_CHANNEL_DATA.pack(CHANNEL, len(payload)) + payload)
        elif self._peer is not None:
            found = stun.Message(stun.Method.SEND, stun.Class.INDICATION)
            found.attributes |= {"XOR-PEER-ADDRESS": self._peer, "DATA": payload}
            self._send(bytes(found))

    def received(self, datagram: bytes) -> bytes | None:
        """A datagram of the TURN server's: what the peer has sent, or None."""
        if len(datagram) >= CHANNEL_OCTETS and datagram[0] & 0xC0 == 0x40:
            channel, octets = _CHANNEL_DATA.unpack_from(datagram)
            return (
                datagram[CHANNEL_OCTETS : CHANNEL_OCTETS + octets] if channel == CHANNEL else None
            )
        try:
            message = stun.parse_message(datagram)
        except ValueError:
            return None
        if message.message_class is stun.Class.INDICATION:
            data: bytes | None = message.attributes.get("DATA")
            return data
        waiting = self._waiting.get(message.transaction_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        return None

    def close(self) -> None:
        """Ask for nothing more."""
        for task in list(self._tasks):
            task.cancel()

    def _finished(self, task: "asyncio.Task[stun.Message]") -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception():
            return  # what a call misses then, it notices by itself
        self.bound = self.bound or task.result().message_method is stun.Method.CHANNEL_BIND

    async def _ask(
        self, method: stun.Method, attributes: dict[str, Any], begun: "_Request | None" = None
    ) -> stun.Message:
        """Make a request, or go on with one, with the credentials that a challenge asks for. Raises
        TurnError."""
        for _ in range(2):
            answer = await self._answered(begun or self._begin(method, attributes))
            begun = None
            if answer.message_class is stun.Class.RESPONSE:
                return answer
            code, reason = answer.attributes.get("ERROR-CODE", (0, ""))
            if code not in (401, 438):  # RFC 8489 sections 9.2.4 and 9.2.5
                break
            self._realm = answer.attributes.get("REALM", self._realm)
            self._nonce = answer.attributes.get("NONCE", b"")
            text = f"{USER}:{self._realm}:{PASSWORD}"
            self._key = hashlib.md5(text.encode(), usedforsecurity=False).digest()
        raise TurnError(f"{method.name}: the TURN server says {code} {reason}")

    def _begin(self, method: stun.Method, attributes: dict[str, Any]) -> "_Request":
        """Send a request for the first time."""
        message = stun.Message(method, stun.Class.REQUEST)
        message.attributes |= attributes
        if self._key:
            message.attributes |= {"USERNAME": USER, "REALM": self._realm, "NONCE": self._nonce}
            message.add_message_integrity(self._key)
        waiting: asyncio.Future[stun.Message] = asyncio.get_running_loop().create_future()
        self._waiting[message.transaction_id] = waiting
        request = _Request(method.name, message.transaction_id, bytes(message), waiting)
        self._send(request.octets)
        return request

    async def _answered(self, request: "_Request") -> stun.Message:
        """What the server says, asked again and again. Raises TurnError."""
        try:
            for _ in range(int(PATIENCE_S / RESEND_S)):
                done, _ = await asyncio.wait([request.waiting], timeout=RESEND_S)
                if done:
                    answer: stun.Message = request.waiting.result()
                    return answer
                self._send(request.octets)
        finally:
            del self._waiting[request.transaction]
        raise TurnError(f"{request.name}: the TURN server does not answer")


@dataclass
class _Request:
    """A request on its way."""

    name: str
    transaction: bytes
    octets: bytes
    waiting: "asyncio.Future[stun.Message]"
