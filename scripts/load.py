"""Load: many clients and the transceiver that echoes their frames, and an exact account of both.

For scripts that measure. One process, one thread, two sockets: the clients have an address each
(IP_PKTINFO, ip(7)) and share a port, so that a relay sees thousands and Load sends and receives in
batches. numpy does per batch what Python would do per datagram: some 300,000 round trips a second
on one CPU, where nobody else is in between.

Rules that stay true:
- Every datagram is accounted for by its number: back once, lost (on which way), more than once, or
  later than `LATE_MS`; a changed or misdirected one is foreign.
- The schedule is the clock's. A datagram that leaves late because Load was late is delayed from the
  moment it was meant to leave, so that no stall hides ("coordinated omission"); the moment it left
  stands beside it.
- Its transceiver is nobody's reflector: it answers frames alone, and only from where the relay is.
- It uses none of the code that it measures but the frame's layout and the two system calls.

recvmmsg(2), sendmmsg(2), cmsg(3), ip(7) https://man7.org/linux/man-pages/
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Sequence

import accounts
import numpy as np

import frame
import udp

# What a run came to, as those who use a Load need it.
Account = accounts.Account
Array = accounts.Array
Figures = accounts.Figures
LATE_MS = accounts.LATE_MS

OCTETS = 172
"""A datagram of Load: 12 octets of RTP and 160 of Opus."""

PATIENCE_S = 30.0
"""How long opening flows may take before it has failed."""

OPEN_TRIES = 5
"""How often each client may lose its first datagram of media: of a relay that loses one in a
hundred fewer than one client in a thousand million loses five, and 30 % are noticed."""

LOOPBACK = "127.0.0.0/8"
_NOBODY = "255.255.255.255/32"  # no datagram comes from there

QUIET_S = 1.0
"""Nothing has come back for so long: what is not here by now is lost."""

# --- datagrams in batches -------------------------------------------------------------------------

BATCH = 64
BUFFER_OCTETS = 16 << 20
"""Kernel buffer of each of Load's sockets: what is lost must be the relay's loss."""

# Layouts of 64-bit Linux: sendmmsg(2), cmsg(3), ip(7).
_MMSGHDR = np.dtype(
    {
        "names": ["name", "name_len", "iov", "iov_len", "control", "control_len", "length"],
        "formats": ["u8", "u4", "u8", "u8", "u8", "u8", "u4"],
        "offsets": [0, 8, 16, 24, 32, 40, 56],
        "itemsize": 64,
    }
)
_IOVEC = np.dtype([("base", "u8"), ("length", "u8")])
_NAME = np.dtype([("family", "u2"), ("port", ">u2"), ("address", ">u4"), ("zero", "u8")])
_PKTINFO = np.dtype(
    {
        "names": ["length", "level", "type", "source", "address"],
        "formats": ["u8", "i4", "i4", ">u4", ">u4"],
        "offsets": [0, 8, 12, 20, 24],
        "itemsize": 32,
    }
)
_PKTINFO_OCTETS, _IP_PKTINFO = 28, 8
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class Datagrams:
    """Room for a batch that recvmmsg(2) fills or sendmmsg(2) empties, in columns."""

    def __init__(self, octets: Array, names: Array, control: Array | None = None) -> None:
        """`octets` has a row a datagram; two objects may share it, one to receive, one to send."""
        self._keep = octets, names, control
        iovecs, headers = np.zeros(BATCH, _IOVEC), np.zeros(BATCH, _MMSGHDR)
        rows = np.arange(BATCH, dtype=np.uint64)
        iovecs["base"] = octets.ctypes.data + rows * octets.strides[0]
        iovecs["length"] = octets.shape[1]
        headers["name"] = names.ctypes.data + rows * _NAME.itemsize
        headers["iov"] = iovecs.ctypes.data + rows * _IOVEC.itemsize
        headers["name_len"], headers["iov_len"] = _NAME.itemsize, 1
        if control is not None:
            headers["control"] = control.ctypes.data + rows * _PKTINFO.itemsize
            headers["control_len"] = _PKTINFO.itemsize
        self._control_octets = 0 if control is None else _PKTINFO.itemsize
        self._headers = headers
        self._rest = [udp.pointer(headers.ctypes.data + i * 64) for i in range(BATCH)]
        self.to_send: Array = iovecs["length"]
        self.received: Array = headers["length"]
        self._name_len, self._control_len = headers["name_len"], headers["control_len"]

    def receive(self, fd: int) -> int:
        """Take what waits; 0 if nothing does."""
        if n := udp.receive_many(fd, self._rest[0], BATCH):
            self._name_len[:n] = _NAME.itemsize
            self._control_len[:n] = self._control_octets
        return n

    def send(self, fd: int, n: int) -> None:
        """Send the first n, all of them, waiting where a buffer is full."""
        sent = 0
        while sent < n:
            sent += udp.send_many(fd, self._rest[sent], n - sent)


def _udp(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, BUFFER_OCTETS)
        except OSError:  # only CAP_NET_ADMIN may go beyond net.core.rmem_max
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER_OCTETS)
    sock.bind((address, port))
    return sock


# --- the load -------------------------------------------------------------------------------------

CLIENTS_AT = int(ipaddress.IPv4Address("127.1.0.1"))
"""The first client's address; client i has the ith after it, all with one port and one socket."""

TICK_S = 0.001
"""How often Load wakes up where it does not spin: a batch of 20 at 20,000 a second."""

_HEAD = np.dtype(
    {
        "names": ["first", "run", "number", "seal"],
        "formats": ["u1", "u4", "u8", "u8"],
        "offsets": [0, 4, 8, 16],
        "itemsize": 24,
    }
)
_HEAD_OCTETS = _HEAD.itemsize
_RTP_FIRST = 0x80
_SEAL = np.uint64(0x9E3779B97F4A7C15)
_MAGIC = np.frombuffer(frame.MAGIC, np.uint32)[0]
_CLIENT_AT = frame.HEADER_OCTETS - 8  # the last four octets of a v4-mapped address in a header


def _seals(numbers: Array, run: int) -> Array:
    return numbers * _SEAL + np.uint64(run)


class _Log:
    """What arrived, in order: who for, which datagram, how long, when."""

    def __init__(self, room: int) -> None:
        self.n = 0
        self.heads = np.zeros((room, _HEAD_OCTETS), np.uint8)
        self.clients = np.zeros(room, ">u4")
        self.lengths = np.zeros(room, np.uint32)
        self.at = np.zeros(room, np.int64)

    def add(self, n: int, heads: Array, clients: Array, lengths: Array, now: int) -> None:
        start, end = self.n, self.n + n
        if end > len(self.at):
            raise RuntimeError("far more came back than was sent")
        self.heads[start:end] = heads
        self.clients[start:end] = clients
        self.lengths[start:end] = lengths
        self.at[start:end] = now
        self.n = end


class Load:
    """Many clients, each with an address of its own, and the transceiver that echoes their frames.

    One thread does both, so that nothing but the relay has a say in what is received when. Use:
    `open` flows, `begin` a schedule, `run` it in as many pieces as wanted, `settle`.
    """

    quiet_s = QUIET_S
    """As above, for those with whom slow is not lost: a run that does lose something waits it."""

    def __init__(
        self,
        clients: int,
        port: int = 0,
        spin: bool = False,
        host: str = "127.0.0.1",
        sources: int = CLIENTS_AT,
        echoes: bool = True,
        frames_from: str = LOOPBACK,
    ) -> None:
        """The transceiver listens at `host`:`port` (0: any), or it is elsewhere (not `echoes`).
        It answers frames alone, and only those from addresses of the prefix `frames_from`. Clients
        have addresses from `sources` on. With `spin` Load never sleeps: no time of its own waking
        up is in its figures.

        Clients take turns in an order that has nothing to do with the order of their arrival, since
        theirs does not either: memory that is read in the order it was written looks too fast."""
        self.clients, self._spin = clients, spin
        self._first, self._echoes = sources, echoes
        self._client = _udp("0.0.0.0", 0)
        self._transceiver = _udp(*((host, port) if echoes else ("127.0.0.1", 0)))
        self._client.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self.port: int = self._transceiver.getsockname()[1]
        self.ports = {self._client.getsockname()[1], self.port}
        self._fds = self._client.fileno(), self._transceiver.fileno()
        self.datagrams = 0
        """All that clients ever sent."""
        self.strangers = 0
        """Datagrams at the transceiver that were no frames, or from elsewhere: not answered."""
        network = ipaddress.IPv4Network(frames_from if echoes else _NOBODY)
        ends = network.network_address.packed + network.netmask.packed
        self._network, self._mask = np.frombuffer(ends, np.uint32)
        self._run, self._count, self._room = 0, 0, 0
        room = OCTETS + frame.HEADER_OCTETS + 32
        self._out_octets = np.full((BATCH, 256), 0x5A, np.uint8)
        self._names = np.zeros(BATCH, _NAME)
        control = np.zeros(BATCH, _PKTINFO)
        control["length"], control["type"] = _PKTINFO_OCTETS, _IP_PKTINFO
        self._sources = control["source"]
        self._out = Datagrams(self._out_octets, self._names, control)
        self._in_octets, self._in_control = np.zeros((BATCH, room), np.uint8), control.copy()
        self._in = Datagrams(self._in_octets, np.zeros(BATCH, _NAME), self._in_control)
        self._echo_octets, self._echo_names = np.zeros((BATCH, room), np.uint8), self._names.copy()
        self._echo_magic = self._echo_octets[:, : len(frame.MAGIC)].view(_MAGIC.dtype)[:, 0]
        self._echo_from: Array = self._echo_names["address"].view(np.uint32)  # as they lie there
        self._echo_in = Datagrams(self._echo_octets, self._echo_names)
        self._echo_out = Datagrams(self._echo_octets, self._echo_names)
        # Longer than the clients are many by a batch: the next n of them are always one slice.
        turns = np.random.default_rng(clients).permutation(clients)
        self._addresses = (sources + np.resize(turns, clients + BATCH)).astype(">u4")
        self._framed = True
        self._log_in, self._log_out = _Log(0), _Log(0)

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._transceiver.close()

    def towards(self, address: str, port: int) -> None:
        """From now on all clients send to this address."""
        self._names["family"] = socket.AF_INET
        self._names["address"], self._names["port"] = int(ipaddress.IPv4Address(address)), port
        self._framed = self._echoes and port != self.port

    def open(self, firsts: Sequence[bytes], patience_s: float = PATIENCE_S) -> None:
        """Send each client's first datagram until it is answered, then one of media each, so that
        every flow is assured. Raises TimeoutError, at once if nobody at all has been answered."""
        waiting = set(range(self.clients))
        deadline = time.monotonic() + patience_s
        while waiting:
            todo = sorted(waiting)
            for at in range(0, len(todo), BATCH):
                self._send_firsts(todo[at : at + BATCH], firsts)
                until = time.monotonic() + 0.05
                while len(waiting) > len(todo) - at - BATCH and time.monotonic() < until:
                    self._echo()
                    self._hear_firsts(waiting)
                if time.monotonic() > deadline and len(waiting) == self.clients:
                    break
            if waiting and time.monotonic() > deadline:
                told = f"{len(waiting)} of {self.clients} clients got no answer"
                if self.strangers:
                    told += f" ({self.strangers} datagrams to the transceiver were not a relay's)"
                raise TimeoutError(told)
        self._assure()

    def _assure(self) -> None:
        """A datagram of media at least of each client, all of them again while one has lost all of
        its own. Raises TimeoutError after OPEN_TRIES."""
        pace = 20_000
        missing = np.ones(self.clients, bool)
        for _ in range(OPEN_TRIES):
            self.begin(pace, self.clients / pace + 1)
            self.run(self.clients / pace + 0.05)
            missing[np.flatnonzero(self.settle().back_at) % self.clients] = False
            if not missing.any():
                return
        raise TimeoutError(
            f"{missing.sum()} of {self.clients} clients' first datagrams of media are lost, "
            f"{OPEN_TRIES} times"
        )

    def _send_firsts(self, who: Sequence[int], firsts: Sequence[bytes]) -> None:
        for slot, client in enumerate(who):
            first = firsts[client]
            self._out_octets[slot, : len(first)] = np.frombuffer(first, np.uint8)
            self._out.to_send[slot] = len(first)
            self._sources[slot] = self._first + client
        self._out.send(self._fds[0], len(who))
        self.datagrams += len(who)

    def _hear_firsts(self, waiting: set[int]) -> None:
        while n := self._in.receive(self._fds[0]):
            waiting.difference_update((self._in_control["address"][:n] - self._first).tolist())

    def begin(
        self, rate: float, seconds: float, last: float | None = None, started: int = 0
    ) -> None:
        """Start a schedule of `rate` datagrams a second, over all clients in turn, that has room
        for so many seconds; with `last` the rate changes evenly to that meanwhile. Its clock starts
        with the first `run`, or at `started` (CLOCK_MONOTONIC, ns): then it ends with its room."""
        self._run += 1
        self._rate, self._count, self._started = rate, 0, started
        self._gain = 0.0 if last is None else (last - rate) / seconds / 2
        self._room = room = int((rate + self._gain * seconds) * seconds + 1e-6) + BATCH
        self._most = room - BATCH if started else room + 1
        heads = np.zeros(room, _HEAD)
        heads["first"], heads["run"] = _RTP_FIRST, self._run
        heads["number"] = np.arange(room)
        heads["seal"] = _seals(heads["number"], self._run)
        self._heads = heads.view(np.uint8).reshape(-1, _HEAD_OCTETS)
        self._sent_at = np.zeros(room, np.int64)
        self._log_in, self._log_out = _Log(room + room // 4), _Log(room + room // 4)
        self._out_octets[:] = 0x5A
        self._out.to_send[:] = OCTETS

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Keep to the schedule for so long, or until something is true; returns whether it is."""
        start = now = time.monotonic_ns()
        self._started = self._started or start
        end, tick, asked = start + int(seconds * 1e9), int(TICK_S * 1e9), start
        while now < end:
            if until is not None and now - asked >= tick:
                asked = now
                if until():
                    return True
            self._turn(now)
            if not self._spin:
                self._sleep(now + tick)
            now = time.monotonic_ns()
        return until is not None and until()

    def _sleep(self, until: int) -> None:
        if (left := until - time.monotonic_ns()) > 0:
            time.sleep(left * 1e-9)

    def due(self, now: int) -> int:
        """How many datagrams are to have left by a moment."""
        elapsed = max((now - self._started) * 1e-9, -1e-9)
        return min(int((self._rate + self._gain * elapsed) * elapsed // 1) + 1, self._most)

    def _intended_at(self, numbers: Array) -> Array:
        """The same the other way round: when each of these datagrams is to leave."""
        # The root of gain t^2 + rate t = n, in the form that divides by no gain, which may be 0.
        root = np.sqrt((self._rate**2 + 4 * self._gain * numbers).clip(0))
        elapsed: Array = 2 * numbers / (self._rate + root) * 1e9
        return elapsed.astype(np.int64) + self._started

    @property
    def count(self) -> int:
        """Sent in this run: the number of the next datagram."""
        return self._count

    @property
    def scheduled(self) -> int:
        """All that the schedule has, where its clock started at a moment that was named."""
        return self._most

    def buffer_octets(self) -> int:
        """The smaller receive buffer of both sockets: BUFFER_OCTETS, or what the kernel granted."""
        socks = self._client, self._transceiver
        sizes = [each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for each in socks]
        return min(sizes) // 2  # socket(7): the kernel doubles it for its own bookkeeping

    @property
    def outstanding(self) -> int:
        """Sent and not back, for now."""
        return self._count - self._log_out.n

    def _turn(self, now: int) -> None:
        """Send what is due, echo what has crossed, take what came back."""
        if (due := self.due(now)) > self._room:  # media would end unnoticed
            raise RuntimeError("the schedule is over: begin a longer one")
        for _ in range(16):  # then look at the other sockets, however far behind
            if (n := min(due - self._count, BATCH)) <= 0:
                break
            self._send(n)
            self._echo()
        self._echo()
        self._take()

    def burst(self, n: int = BATCH) -> None:
        """Send n datagrams ahead of the schedule, at once, and look at nothing."""
        self._send(min(n, self._room - self._count))

    def _send(self, n: int) -> None:
        start = self._count
        self._out_octets[:n, :_HEAD_OCTETS] = self._heads[start : start + n]
        client = start % self.clients
        self._sources[:n] = self._addresses[client : client + n]
        self._sent_at[start : start + n] = time.monotonic_ns()
        self._out.send(self._fds[0], n)
        self._count, self.datagrams = self._count + n, self.datagrams + n

    def _echo(self) -> None:
        while came := self._echo_in.receive(self._fds[1]):
            n = self._known(came)
            self._echo_out.send(self._fds[1], n)
            if self._framed and self._room:
                octets = self._echo_octets[:n]
                heads = octets[:, frame.HEADER_OCTETS : frame.HEADER_OCTETS + _HEAD_OCTETS]
                clients = octets[:, _CLIENT_AT : _CLIENT_AT + 4].copy().view(">u4")[:, 0]
                lengths = self._echo_out.to_send[:n] - frame.HEADER_OCTETS
                self._log_in.add(n, heads, clients, lengths, 0)
            if came < BATCH:
                return

    def _known(self, n: int) -> int:
        """How many of n arrivals are to be echoed; they come first then. Others, were they answered
        too, would make this a reflector for whoever forges a source. It takes some 4 us a batch,
        2 % of a full one."""
        lengths = self._echo_in.received[:n]
        bad = (self._echo_from[:n] & self._mask) != self._network
        if self._framed:
            bad |= self._echo_magic[:n] != _MAGIC
            bad |= lengths < frame.HEADER_OCTETS
        self._echo_out.to_send[:n] = lengths
        if not np.count_nonzero(bad):
            return n
        chosen = np.flatnonzero(~bad)  # rare, and so put together anew
        count = len(chosen)
        self._echo_octets[:count] = self._echo_octets[chosen]
        self._echo_names[:count] = self._echo_names[chosen]
        self._echo_out.to_send[:count] = lengths[chosen]
        self.strangers += n - count
        return count

    def _take(self) -> None:
        while n := self._in.receive(self._fds[0]):
            now = time.monotonic_ns()
            heads, clients = self._in_octets[:n, :_HEAD_OCTETS], self._in_control["address"][:n]
            self._log_out.add(n, heads, clients, self._in.received[:n], now)
            if n < BATCH:
                return

    def settle(self) -> Account:
        """Send nothing more, wait until all is back or nothing comes any more, and account."""
        seen, last = -1, time.monotonic()
        while self._log_out.n < self._count and time.monotonic() - last < self.quiet_s:
            if self._log_out.n != seen:
                seen, last = self._log_out.n, time.monotonic()
            self._echo()
            self._take()
            time.sleep(TICK_S / 10)
        until = time.monotonic() + 0.02  # for copies of what is here already
        while time.monotonic() < until:
            self._echo()
            self._take()
        return self._account()

    def _account(self) -> Account:
        sent = self._count
        crossed, _, foreign_in, _ = self._judge(self._log_in)
        returned, numbers, foreign_out, at = self._judge(self._log_out)
        back_at = np.zeros(sent, np.int64)
        back_at[numbers[::-1]] = at[::-1]  # of several the first
        by_client = np.argsort(numbers % self.clients, kind="stable")
        ordered = numbers[by_client]
        same = np.diff(ordered % self.clients) == 0
        return Account(
            sent=sent,
            crossed=int((crossed > 0).sum()) if self._framed else int((returned > 0).sum()),
            returned=int((returned > 0).sum()),
            duplicated_inbound=int((crossed - 1).clip(0).sum()),
            duplicated=int((returned - 1).clip(0).sum()),
            foreign=foreign_in + foreign_out,
            reordered=int((same & (np.diff(ordered) < 0)).sum()),
            intended_at=self._intended_at(np.arange(sent)),
            sent_at=self._sent_at[:sent],
            back_at=back_at,
        )

    def _judge(self, log: _Log) -> tuple[Array, Array, int, Array]:
        """How often each number arrived; the numbers in order; what was wrong; when."""
        heads = log.heads[: log.n].reshape(-1).view(_HEAD)
        # STUN and what is left of an earlier run belong to another account.
        ours = (heads["first"] == _RTP_FIRST) & (heads["run"] == self._run)
        numbers = heads["number"]
        good = ours & (numbers < self._count) & (heads["seal"] == _seals(numbers, self._run))
        good &= log.lengths[: log.n] == OCTETS
        expected = self._addresses[(numbers % np.uint64(self.clients)).astype(np.int64)]
        good &= log.clients[: log.n] == expected
        earlier = (heads["first"] < 4) | (heads["run"] < self._run)
        chosen = numbers[good].astype(np.int64)
        counts = np.bincount(chosen, minlength=self._count)
        return counts, chosen, int((~good & ~earlier).sum()), log.at[: log.n][good]
