"""Clients on one host, their transceiver on another, and the calls between them (nets.py).

Each client sends once every 20 ms, and so does the transceiver to each client, by the relay that
brought its last datagram. Every datagram has a number, and what comes is written down with the
moment. The transceiver answers a client's first check, and says something that is not STUN, by
which a relay knows for certain.
"""

import contextlib
import ipaddress
import os
import select
import struct
import time

import frame
import recovery
import registry
import stun
import ufrag

from .nets import PATIENCE_S, PORT, PREFIXES, PUBLIC, TRANSCEIVER_PORT, numbers

TICK_S = 0.02
"""Between two datagrams of a call, each way."""

_MARK, _LIVE = b"\x80L", struct.Struct("!2sHI")
_HELLO = b"\x16 hello"


class Caller:
    """A client, and what has come of its call at both ends."""

    def __init__(self, crowd, number, at):
        self.crowd, self.number = crowd, number
        self._be_at(at)
        self.sent, self.checks, self.hellos, self.back = 0, 0, 0, None
        self.up, self.down = [], []
        """What came, each with the moment, and upward with the relay that brought it."""
        at = ipaddress.ip_address(crowd.transceiver.getsockname()[0])
        home = ufrag.Cluster(1, ipaddress.ip_network(PREFIXES[at.version]), 1, 65535)
        self.ufrag = ufrag.mint(crowd.keyring, home, at, TRANSCEIVER_PORT, number)

    def move(self, at):
        """On with another address and port; returns the socket and the header from before."""
        before = self.sock, self.header
        del self.crowd._by_header[self.header]
        self._be_at(at)
        self.crowd.know(self)
        return before

    def _be_at(self, at):
        fabric = self.crowd.fabric
        self.sock = fabric.stack.enter_context(fabric.hosts["client"].udp(at))
        self.header = frame.header(*self.sock.getsockname()[:2])
        self.key = registry.PREFIX + frame.key(self.header)

    def by(self, relay):
        """What one relay has brought upward."""
        return [each for each in self.up if each[2] == relay]

    def send(self, datagram):
        self.sock.sendto(datagram, self.crowd.public)

    def check(self):
        password = ufrag.password(self.crowd.keyring, self.ufrag)
        self.send(stun.request(os.urandom(12), f"{self.ufrag}:client", password))

    def tick(self):
        """One datagram each way."""
        datagram = _LIVE.pack(_MARK, self.number, self.sent)
        self.send(datagram)
        self.crowd.transceiver.sendto(self.header + datagram, self.back)
        self.sent += 1


class Crowd:
    """Clients on the one host, their transceiver on the other, and the calls between them."""

    def __init__(self, fabric, count, public=4, internal=4):
        self.fabric, self.keyring = fabric, fabric.keys(fabric.folder)
        self.public = PUBLIC[public], PORT
        at = numbers("transceiver")[internal]
        self.transceiver = fabric.hosts["transceiver"].udp(at, TRANSCEIVER_PORT)
        fabric.stack.enter_context(self.transceiver)
        self._poll = select.epoll()
        fabric.stack.callback(self._poll.close)
        self._poll.register(self.transceiver, select.EPOLLIN)
        self._socks = {self.transceiver.fileno(): self.transceiver}
        self._by_header = {}
        self.strange = []
        """Whatever else came, at either end, without headers."""
        at = numbers("client")[public]
        self.callers = [Caller(self, number, at) for number in range(count)]
        for caller in self.callers:
            self.know(caller)
        self._calling, self._expected = [], {}

    def know(self, caller):
        """Hear what comes to it."""
        self._poll.register(caller.sock, select.EPOLLIN)
        self._socks[caller.sock.fileno()] = caller.sock
        self._by_header[caller.header] = caller

    def begin(self):
        """All of them check, their transceiver answers, and the calls go on from there."""
        for caller in self.callers:
            caller.check()
        self.go_on(lambda: all(caller.hellos for caller in self.callers))
        self.resume(self.callers)
        return self

    def resume(self, callers):
        """The calls of these go on."""
        self._calling = callers

    def turn_to(self, relay):
        """Another relay has to ask who these callers are: until it has brought something of one,
        that one sends no more than may wait there. Else a machine that is slow just then would look
        like a relay that loses something."""
        self._expected = {caller: (relay, caller.sent) for caller in self.callers}

    def hang_up(self):
        """No more is sent."""
        self.resume([])

    def settle(self):
        """No more is sent, and all that was sent has arrived."""
        self.hang_up()
        everything = [(way, caller) for caller in self.callers for way in (caller.up, caller.down)]
        self.go_on(lambda: all(len(way) >= caller.sent for way, caller in everything))
        for way, caller in everything:
            assert sorted(each[0] for each in way) == [*range(caller.sent)], caller.number

    def go_on(self, until=lambda: True, seconds=0.0):
        """Let the calls go on until something is so, and at least so long."""
        began = due = time.monotonic()
        share, turn = TICK_S / max(1, len(self._calling)), 0
        while not (until() and time.monotonic() - began >= seconds):
            assert due - began < PATIENCE_S + seconds, "it does not come true"
            if self._calling:
                caller = self._calling[turn % len(self._calling)]
                if self._may_speak(caller):
                    caller.tick()
            turn, due = turn + 1, due + share
            self._pump(due)

    def _may_speak(self, caller):
        relay, sent = self._expected.get(caller, (None, 0))
        if relay and caller.up and caller.up[-1][2] == relay:
            del self._expected[caller]
            return True
        return not relay or caller.sent - sent < recovery.CLIENT_MAX

    def _pump(self, due):
        while True:
            left = due - time.monotonic()
            for fd, _ in self._poll.poll(max(0.0, left)):
                self._drain(self._socks[fd])
            if left <= 0:
                return

    def _drain(self, sock):
        with contextlib.suppress(OSError):
            while True:
                datagram, source = sock.recvfrom(4096)
                if sock is self.transceiver:
                    self._above(datagram, source)
                else:
                    self._below(sock, datagram)

    def _above(self, datagram, source):
        header, payload = datagram[: frame.HEADER_OCTETS], datagram[frame.HEADER_OCTETS :]
        caller = self._by_header[header]
        if payload[0] < 4:
            caller.checks += 1
            caller.back = source
            self.transceiver.sendto(header + _HELLO, source)
        elif payload.startswith(_MARK):
            _, number, count = _LIVE.unpack(payload)
            assert number == caller.number
            caller.up.append((count, time.monotonic(), source[0]))
            caller.back = source
        else:
            self.strange.append(payload)

    def _below(self, sock, datagram):
        if datagram == _HELLO:
            self._by_header[frame.header(*sock.getsockname()[:2])].hellos += 1
        elif datagram.startswith(_MARK):
            _, number, count = _LIVE.unpack(datagram)
            caller = self.callers[number]
            assert sock is caller.sock
            caller.down.append((count, time.monotonic()))
        else:
            self.strange.append(datagram)
