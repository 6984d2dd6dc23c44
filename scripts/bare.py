"""The product's transceiver with nothing in front of it: clients send to its own public ports.

For measurements that compare ways in. It is the transceiver program with another media socket and
nothing else: what arrives from a client gets the header that a relay would have put in front of it,
and loses it on its way back. So ICE, DTLS, SRTP and all behind them are the same code, and what
differs is the way in. Two sockets are to be had:

    one        one UDP port for all sessions; clients are told apart by their addresses
    session    a UDP port for each session, opened with it and closed a moment after its end

With `one` the port can be shared by several processes (SO_REUSEPORT): the kernel then picks one of
them by the addresses of a datagram, as a load balancer does that knows nothing of sessions.

What the header costs here is no part of a server without a relay; `translation_us` says how much
that is, so that it can be taken off.

usage: bare.py one|session CONFIG [HOST:PORT]     the media's address, if it is not that of `listen`

epoll(7), socket(7); mux.py says what it wants of its socket.
"""

import asyncio
import dataclasses
import select
import socket
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import endpoints
import frame
import journal
import mux
import opening
import session
import settings
import transceiver

Address = tuple[str, int]

LINGER_S = 2.0
"""How long a session's port stays open after it: goodbyes go through it."""

CLIENTS_MAX = 65_536
"""Addresses whose header is remembered."""


@lru_cache(CLIENTS_MAX)
def _header(client: Address) -> bytes:
    return frame.header(*client)


@lru_cache(CLIENTS_MAX)
def _client(header: bytes) -> Address:
    return frame.client(header)


def framed(datagram: bytes, client: Address) -> bytes:
    """What a relay would have made of a client's datagram."""
    return _header(client) + datagram


def unframed(datagram: bytes) -> tuple[bytes, Address]:
    """What a relay would have sent to a client, and to which one."""
    octets = frame.HEADER_OCTETS
    return datagram[octets:], _client(datagram[:octets])


def translation_us(rounds: int = 20_000) -> float:
    """CPU time of putting the header in front of one datagram or taking it off, in microseconds."""
    client, payload = ("127.0.0.1", 40_000), bytes(100)
    begun = time.process_time()
    for _ in range(rounds):
        unframed(framed(payload, client))
    return (time.process_time() - begun) * 1e6 / (2 * rounds)


class OnePort:
    """One plain UDP socket, as mux.Mux uses a socket that leads to relays."""

    def __init__(self, at: Address, buffer_octets: int, shared: bool) -> None:
        """Bind it. Raises OSError."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_octets)
        if shared:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(at)
        self._here: Address = self._socket.getsockname()

    def fileno(self) -> int:
        """What an event loop waits for."""
        return self._socket.fileno()

    def recvfrom(self, octets: int) -> tuple[bytes, Address]:
        """A datagram as a relay frames it, and where it came in. Raises OSError."""
        datagram, client = self._socket.recvfrom(octets)
        return framed(datagram, client), self._here

    def sendto(self, datagram: bytes, _: Address) -> None:
        """Send a framed datagram to the client that its header names. Raises OSError."""
        self._socket.sendto(*unframed(datagram))

    def close(self) -> None:
        """Close it."""
        self._socket.close()


class PortPerSession:
    """A UDP socket for each session behind one epoll, as mux.Mux uses a socket."""

    def __init__(self, host: str, buffer_octets: int) -> None:
        self._host, self._buffer_octets = host, buffer_octets
        self._epoll = select.epoll()
        self._by_fd: dict[int, socket.socket] = {}
        self._by_address: dict[Address, socket.socket] = {}
        self._ready: list[tuple[int, int]] = []

    def open(self) -> Address:
        """Another port, and its address. Raises OSError."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_octets)
            sock.bind((self._host, 0))
            self._epoll.register(sock, select.EPOLLIN)
        except OSError:
            sock.close()
            raise
        address: Address = sock.getsockname()
        self._by_fd[sock.fileno()] = self._by_address[address] = sock
        return address

    def shut(self, address: Address) -> None:
        """Close a port, if it is open."""
        sock = self._by_address.pop(address, None)
        if sock is not None:
            del self._by_fd[sock.fileno()]
            self._epoll.unregister(sock)
            sock.close()

    def fileno(self) -> int:
        """What an event loop waits for: readable while any port is."""
        return self._epoll.fileno()

    def recvfrom(self, octets: int) -> tuple[bytes, Address]:
        """A datagram of any port as a relay frames it, and where it came in. Raises OSError."""
        while True:
            if not self._ready:
                self._ready = self._epoll.poll(0, mux.BATCH_SIZE)
            if not self._ready:
                raise BlockingIOError
            sock = self._by_fd.get(self._ready.pop()[0])
            if sock is None:  # closed since epoll named it
                continue
            try:
                datagram, client = sock.recvfrom(octets)
            except OSError:  # an ICMP error of something sent: recv(2)
                continue
            return framed(datagram, client), sock.getsockname()

    def sendto(self, datagram: bytes, here: Address) -> None:
        """Send a framed datagram from one of the ports. Raises OSError if it is closed."""
        sock = self._by_address.get(here)
        if sock is None:
            raise OSError(f"port {here[1]} is closed")
        sock.sendto(*unframed(datagram))

    def close(self) -> None:
        """Close all ports."""
        for address in list(self._by_address):
            self.shut(address)
        self._epoll.close()


class Bare(transceiver.Transceiver):
    """A transceiver that opens a port for each call, and names it in the answer."""

    ports: PortPerSession

    def __init__(self, config: settings.Transceiver, **more: Any) -> None:
        super().__init__(config, **more)
        self._port_of: dict[session.Session, Address] = {}

    def open(self, wanted: opening.Opening) -> tuple[session.Session, str]:
        """Take a call at a port of its own. Raises what Transceiver.open raises, and OSError."""
        address = self.ports.open()
        try:
            wanted = dataclasses.replace(wanted, candidates=(address,))
            call, answer = super().open(wanted)
        except BaseException:
            self.ports.shut(address)
            raise
        self._port_of[call] = address
        return call, answer

    def ended(self, session: session.Session, reason: str) -> None:
        """See Transceiver.ended; its port is closed a moment later."""
        super().ended(session, reason)
        address = self._port_of.pop(session, None)
        if address is not None:
            asyncio.get_running_loop().call_later(LINGER_S, self.ports.shut, address)


def main(kind: str, config: Path, media: str | None) -> None:
    """Serve as transceiver.py does, until the same signals. Raises SettingsError, OSError."""
    journal.configure("text")
    found = settings.load(config, settings.Transceiver)
    at = found.transceiver.listen if media is None else endpoints.Endpoint(media)
    buffer_octets = found.transceiver.receive_buffer_octets
    sock: OnePort | PortPerSession
    if kind == "session":
        sock = Bare.ports = PortPerSession(at.host, buffer_octets)
        transceiver.Transceiver = Bare  # type: ignore[misc]
    else:
        sock = OnePort((at.host, at.port), buffer_octets, shared=media is not None)
    transceiver.media_socket = lambda *_: sock  # type: ignore[assignment, attr-defined]
    asyncio.run(transceiver.serve(found))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("one", "session"):
        sys.exit("usage: bare.py one|session CONFIG [HOST:PORT]")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None)
