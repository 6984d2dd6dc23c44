"""A path between clients and one UDP address, in user space: with delay, loss, and a NAT's ports.

For tests and measurements. Everything a client sends comes out of a port of its own on the other
side, as behind a NAT; `rebind` gives it another port in the middle of things, as NATs do when they
lose their table. The loss is seeded, so that what is lost once is lost again.

The times are the event loop's: a datagram is up to a millisecond late, never early.
"""

import asyncio
import random
import socket
import time
from collections.abc import Callable

Address = tuple[str, int]
OCTETS_MAX = 2048
BUFFER_OCTETS = 1 << 20
HELD_MAX = 10_000
"""Datagrams on their way: a bound for a test gone wrong, two seconds of a hundred calls."""


class _Client:
    """A client's mapping: where it is, and the port that the other side sees."""

    def __init__(self, at: Address, outside: socket.socket) -> None:
        self.at, self.outside = at, outside


class Lane:
    """The path, in the running event loop."""

    def __init__(
        self,
        to: Address,
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        seed: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """Lead to `to`, with `delay_s` each way, losing so much of what goes either way."""
        self.to, self.delay_s, self.loss = to, delay_s, loss
        self.up: Callable[[bytes], bool] = lambda _: True
        """Sees what enters on the clients' side; False loses it."""
        self.down: Callable[[bytes], bool] = lambda _: True
        """Sees what enters on the other side."""
        self.arrived: Callable[[bytes, float], None] = lambda _, __: None
        """Hears what is handed to a client, and when (time.monotonic)."""
        self.on_the_way = 0
        self._chance = random.Random(seed)
        self._clients: dict[Address, _Client] = {}
        self._loop = asyncio.get_running_loop()
        self._host = host
        self._inside = self._bound()
        self._loop.add_reader(self._inside, self._from_client)

    @property
    def address(self) -> Address:
        """Where clients send."""
        found: Address = self._inside.getsockname()
        return found

    @property
    def ports(self) -> list[int]:
        """Of the other side, in the order in which clients came."""
        return [client.outside.getsockname()[1] for client in self._clients.values()]

    def rebind(self) -> float:
        """Give every client another port on the other side; when (time.monotonic).

        What comes back to the old port from now on is lost, as at a NAT.
        """
        for client in self._clients.values():
            self._drop(client)
            client.outside = self._opened(client)
        return time.monotonic()

    def close(self) -> None:
        """Close all ports; what is on the way is lost."""
        self._loop.remove_reader(self._inside)
        self._inside.close()
        for client in self._clients.values():
            self._drop(client)
        self._clients.clear()

    def _bound(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_OCTETS)
        sock.bind((self._host, 0))
        return sock

    def _opened(self, client: _Client) -> socket.socket:
        sock = self._bound()
        self._loop.add_reader(sock, self._from_other_side, client, sock)
        return sock

    def _drop(self, client: _Client) -> None:
        self._loop.remove_reader(client.outside)
        client.outside.close()

    def _from_client(self) -> None:
        while (found := _received(self._inside)) is not None:
            datagram, at = found
            client = self._clients.get(at)
            if client is None:
                client = self._clients[at] = _Client(at, self._inside)
                client.outside = self._opened(client)
            if self.up(datagram):
                self._carry(self._out, client, datagram)

    def _from_other_side(self, client: _Client, sock: socket.socket) -> None:
        while (found := _received(sock)) is not None:
            if self.down(found[0]):
                self._carry(self._in, client, found[0])

    def _carry(
        self, deliver: Callable[[_Client, bytes], None], client: _Client, datagram: bytes
    ) -> None:
        if self._chance.random() < self.loss or self.on_the_way >= HELD_MAX:
            return
        self.on_the_way += 1
        if self.delay_s:
            self._loop.call_later(self.delay_s, deliver, client, datagram)
        else:
            deliver(client, datagram)

    def _out(self, client: _Client, datagram: bytes) -> None:
        self.on_the_way -= 1
        _send(client.outside, datagram, self.to)

    def _in(self, client: _Client, datagram: bytes) -> None:
        self.on_the_way -= 1
        self.arrived(datagram, time.monotonic())
        _send(self._inside, datagram, client.at)


def _received(sock: socket.socket) -> tuple[bytes, Address] | None:
    try:
        return sock.recvfrom(OCTETS_MAX)
    except OSError:  # nothing more, closed meanwhile, or an ICMP error of something sent: recv(2)
        return None


def _send(sock: socket.socket, datagram: bytes, to: Address) -> None:
    try:
        sock.sendto(datagram, to)
    except OSError:  # closed meanwhile, or a full buffer: lost, as on any path
        return
