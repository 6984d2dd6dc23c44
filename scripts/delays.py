"""Hosts in network namespaces, and one process between them that delays, loses and counts.

For the laboratory (lab.py), where the kernel has no netem. Every host is a namespace whose only
link is a tun device; the other ends of all of them are held by one process, the router. It reads
each IP packet, looks up how long packets take between these two addresses, keeps it in a heap until
then and writes it into the other host's device. It can cut a path, lose a host with all that is on
the way to it, and write down which RTP passed where and when.

Rules that stay true:
- A namespace has no name, only descriptors: it is gone with the processes in it. The router ends
  with the process that made it.
- Packets between the same two addresses keep their order.
- The router says how late it was itself (`Report`): what is measured through it can be no better.
  It has real-time priority, as it must have on a machine with more to do than it can, and sleeps
  between packets.
- Nothing here knows of Earshot but the layout of a frame and where RTP lies in it.

tun(4), namespaces(7), setns(2) https://man7.org/linux/man-pages/
"""

import contextlib
import ctypes
import fcntl
import gc
import heapq
import ipaddress
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import pyroute2
import rig

import frame

LINK = "up"
MTU = 1500
OCTETS_MAX = 2048
READS_MAX = 64
"""Packets of one host in turn: none waits for another's burst."""

PRIORITY = 20
"""Of SCHED_FIFO: above all that is not real time, below the kernel's own threads."""

BUCKET_S = 20e-6
BUCKETS = 2_500
"""Of the router's lateness: up to 50 ms."""

HELD_MAX = 100_000
"""Packets on their way: a bound for an experiment gone wrong."""

_CLONE_NEWNET = 0x4000_0000
_TUNSETIFF = 0x4004_54CA
_IFF_TUN_NO_PI = 0x1001
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

WayOf = Callable[[str, str], Callable[[random.Random], float | None]]
"""From two addresses to what says, for each packet, how many seconds it takes; None loses it."""


class Passed(NamedTuple):
    """An RTP packet that was seen."""

    at: float
    """time.monotonic."""
    point: str
    """`sent`: a caller's, as it leaves it; `heard`: the same at its transceiver's host; `answered`:
    the transceiver's, as it leaves; `received`: the same at the caller."""
    host: str
    """The caller's host, or the transceiver's."""
    by: str
    """The address at the other end of the link that it was seen on: which relay carried it."""
    ssrc: int
    sequence: int


@dataclass
class Report:
    """What the router did since the last report."""

    packets: int = 0
    lost: int = 0
    """By the model."""
    dropped: int = 0
    """On a path that is cut, to or from a host that is lost, or to nobody."""
    seconds: float = 0.0
    cpu_share: float = 0.0
    late_ms: dict[str, float] = field(default_factory=dict)
    """How late it delivered: p50, p99, most."""


def refused() -> str:
    """Why there can be no such hosts here, in one sentence; empty where there can."""
    if sys.platform != "linux":
        return "the laboratory needs Linux: its hosts are network namespaces"
    if os.geteuid() != 0:
        return "the laboratory needs root, to make network namespaces and tun devices"
    pid = os.fork()
    if not pid:  # in a child: it ends where it gets to
        code = 1
        with contextlib.suppress(OSError):
            _unshare()
            _tun()
            code = 0
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        return "this machine lets nobody make a network namespace with a tun device in it"
    return ""


def _unshare() -> int:
    """Into a new network namespace; its descriptor."""
    if _libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _tun() -> int:
    """A tun device of the namespace that this process is in."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", LINK.encode(), _IFF_TUN_NO_PI))
    return fd


class Host:
    """A network namespace with one link, whose other end is `link`."""

    def __init__(self, name: str, addresses: Sequence[str], kind: str, home: int) -> None:
        """The first address is what its programs send from if they do not choose. `kind` is
        `caller`, `transceivers` or anything else. Raises OSError."""
        self.name, self.addresses, self.kind = name, list(addresses), kind
        self._home = home
        self.namespace = _unshare()
        try:
            self.link = _tun()
            with pyroute2.IPRoute() as routes:
                routes.link("set", index=1, state="up")
                (index,) = routes.link_lookup(ifname=LINK)
                for address in self.addresses:
                    routes.addr("add", index=index, address=address, prefixlen=32)
                # A long queue: what the router has not read yet is late, but never lost.
                routes.link("set", index=index, state="up", mtu=MTU, txqlen=10_000)
                routes.route("add", dst="0.0.0.0/0", oif=index)
        finally:
            _enter(home)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What is opened and started in here is this host's."""
        _enter(self.namespace)
        try:
            yield
        finally:
            _enter(self._home)

    def spawn(
        self, argv: Sequence[str | Path], cpus: set[int], log: Path
    ) -> "subprocess.Popen[bytes]":
        """Start a program here, in a group of its own; what it says is in `log`."""
        with self.inside():
            return rig.spawn(argv, cpus, log)

    def converse(
        self, argv: Sequence[str | Path], cpus: set[int], log: Path
    ) -> "subprocess.Popen[str]":
        """Start a program here that is told what to do, and answers, line by line."""

        def settle_in() -> None:
            os.sched_setaffinity(0, cpus)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        with self.inside(), log.open("ab") as file:
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
                preexec_fn=settle_in,  # noqa: PLW1509  # one thread: nothing to deadlock
            )

    def close(self) -> None:
        """Let go of it; it is gone with the last program in it."""
        os.close(self.link)
        os.close(self.namespace)


class Fabric:
    """The hosts, and the router between them, which runs until `close`."""

    def __init__(self, way_of: WayOf, cpu: int, seed: int) -> None:
        self._way_of, self._cpu, self._seed = way_of, cpu, seed
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.hosts: dict[str, Host] = {}
        self._control: Connection | None = None
        self._pid = 0

    def __enter__(self) -> "Fabric":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def host(self, name: str, *addresses: str, kind: str = "") -> Host:
        """One more, before `start`."""
        found = self.hosts[name] = Host(name, addresses, kind, self._home)
        return found

    def start(self) -> None:
        """Let packets flow."""
        self._control, control = Pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                self._control.close()
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    _settle(self._cpu)
                    _Router(self.hosts, self._way_of, control, self._seed).run()
                code = 0
            finally:
                os._exit(code)
        control.close()
        self._ask("report")  # it runs

    def close(self) -> None:
        """End the router and let go of the hosts."""
        if self._control is not None:
            self._control.close()
            self._control = None
            os.waitpid(self._pid, 0)
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    def lose(self, *names: str) -> float:
        """Nothing more comes from these hosts or gets there; since when."""
        return float(self._ask("lose", [a for name in names for a in self.hosts[name].addresses]))

    def restore(self, *names: str) -> float:
        """They are there again."""
        found = [a for name in names for a in self.hosts[name].addresses]
        return float(self._ask("restore", found))

    def cut(self, one: str, other: str) -> float:
        """Nothing more gets from one address to the other, either way; since when."""
        return float(self._ask("cut", one, other))

    def mend(self, one: str, other: str) -> float:
        """It does again."""
        return float(self._ask("mend", one, other))

    def watch(self) -> None:
        """Forget the RTP seen so far and write down what passes from now on."""
        self._ask("watch")

    def seen(self) -> list[Passed]:
        """The RTP seen since `watch`, in the order in which it passed."""
        return [Passed(*row) for row in self._ask("seen")]

    def report(self) -> Report:
        """What the router did since the last time."""
        return Report(**self._ask("report"))

    def _ask(self, *words: Any) -> Any:
        assert self._control is not None, "it has not been started"
        self._control.send(words)
        return self._control.recv()


def _settle(cpu: int) -> None:
    """Be punctual: a CPU, priority, no pauses of the collector's."""
    os.sched_setaffinity(0, {cpu})
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    gc.collect()
    gc.freeze()
    gc.disable()


class _Path:
    """From one address to another."""

    __slots__ = ("after", "closed", "host", "taken")

    def __init__(self, taken: Callable[[random.Random], float | None], host: Host | None) -> None:
        self.taken, self.host = taken, host
        self.closed = host is None
        self.after = 0.0
        """When the last one is due: the next is no sooner."""


class _Router:
    """The process between the hosts."""

    def __init__(
        self, hosts: dict[str, Host], way_of: WayOf, control: Connection, seed: int
    ) -> None:
        self._control, self._way_of = control, way_of
        self._chance = random.Random(seed)
        self._by_link = {host.link: host for host in hosts.values()}
        self._by_address = {
            socket.inet_aton(address): host for host in hosts.values() for address in host.addresses
        }
        self._paths: dict[bytes, _Path] = {}
        self._lost: set[bytes] = set()
        self._cut: set[bytes] = set()
        self._seen: list[tuple[float, str, str, str, int, int]] | None = None
        self._late = [0] * (BUCKETS + 1)
        self._packets = self._model_lost = self._dropped = 0
        self._since, self._cpu = time.monotonic(), time.process_time()

    def run(self) -> None:
        """Until the other end of the control is closed."""
        waiting: list[tuple[float, int, bytes, _Path]] = []
        links = [self._control.fileno(), *self._by_link]
        control, clock, number = links[0], time.monotonic, 0
        while True:
            now = clock()
            while waiting and waiting[0][0] <= now:
                due, _, packet, path = heapq.heappop(waiting)
                self._deliver(packet, path, due, now)
                now = clock()
            patience = waiting[0][0] - now if waiting else None
            ready, _, _ = select.select(links, (), (), patience and max(0.0, patience))
            for link in ready:
                if link == control:
                    try:
                        self._control.send(self._told(*self._control.recv()))
                    except (EOFError, OSError):
                        return
                    continue
                host = self._by_link[link]
                for _ in range(READS_MAX):
                    try:
                        packet = os.read(link, OCTETS_MAX)
                    except OSError:  # nothing more: EAGAIN
                        break
                    taken = self._accept(packet, host, clock())
                    if taken is not None and len(waiting) < HELD_MAX:
                        number += 1
                        heapq.heappush(waiting, (taken[0], number, packet, taken[1]))

    def _accept(self, packet: bytes, host: Host, now: float) -> tuple[float, _Path] | None:
        """When a packet is due and where; None if it is lost."""
        if packet[0] >> 4 != 4:
            return None  # IPv6's own chatter on a new link
        self._packets += 1
        if self._seen is not None and host.kind:
            self._note(packet, host, now, leaving=True)
        key = packet[12:20]
        path = self._paths.get(key)
        if path is None:
            path = self._paths[key] = self._path(key)
        if path.closed:
            self._dropped += 1
            return None
        taken = path.taken(self._chance)
        if taken is None:
            self._model_lost += 1
            return None
        path.after = max(path.after, now + taken)
        return path.after, path

    def _deliver(self, packet: bytes, path: _Path, due: float, now: float) -> None:
        if path.closed or path.host is None:  # closed while it was on the way
            self._dropped += 1
            return
        with contextlib.suppress(OSError):  # the host's own queue is full
            os.write(path.host.link, packet)
        self._late[min(BUCKETS, int((now - due) / BUCKET_S))] += 1
        if self._seen is not None and path.host.kind:
            self._note(packet, path.host, now, leaving=False)

    def _path(self, key: bytes) -> _Path:
        source, target = (str(ipaddress.ip_address(end)) for end in (key[:4], key[4:]))
        host = self._by_address.get(key[4:])
        if host is None:
            return _Path(lambda _: None, None)
        path = _Path(self._way_of(source, target), host)
        self._judge(key, path)
        return path

    def _judge(self, key: bytes, path: _Path) -> None:
        lost = key[:4] in self._lost or key[4:] in self._lost
        path.closed = path.host is None or lost or key in self._cut

    def _note(self, packet: bytes, host: Host, now: float, leaving: bool) -> None:
        """Write an RTP packet down, framed or not."""
        if packet[9] != socket.IPPROTO_UDP:
            return
        at = (packet[0] & 15) * 4 + 8
        if packet[at : at + 2] == b"\xc5\x01":
            at += frame.HEADER_OCTETS
        if len(packet) < at + 12 or packet[at] >> 6 != 2 or 192 <= packet[at + 1] <= 223:
            return
        caller = host.kind == "caller"
        point = (
            ("sent" if leaving else "received") if caller else "answered" if leaving else "heard"
        )
        end = packet[16:20] if leaving else packet[12:16]
        if end not in self._by_address:  # a question to a name server can look like RTP
            return
        other = socket.inet_ntoa(end)
        sequence, _, ssrc = struct.unpack_from("!HII", packet, at + 2)
        assert self._seen is not None
        self._seen.append((now, point, host.name, other, ssrc, sequence))

    def _told(self, verb: str, *words: Any) -> Any:
        """Do what was asked; the answer."""
        if verb == "seen":
            return self._seen or []
        if verb == "watch":
            self._seen = []
        elif verb == "report":
            return self._report()
        elif verb in ("lose", "restore"):
            found = {socket.inet_aton(address) for address in words[0]}
            self._lost = self._lost | found if verb == "lose" else self._lost - found
        else:
            one, other = map(socket.inet_aton, words)
            both = {one + other, other + one}
            self._cut = self._cut | both if verb == "cut" else self._cut - both
        for key, path in self._paths.items():
            self._judge(key, path)
        return time.monotonic()

    def _report(self) -> dict[str, Any]:
        now, cpu = time.monotonic(), time.process_time()
        total, late = sum(self._late), {}
        for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
            left = total * share
            for bucket, count in enumerate(self._late):
                left -= count
                if left <= 0:
                    late[name] = round((bucket + 1) * BUCKET_S * 1e3, 2)
                    break
        seconds = now - self._since
        found = {
            "packets": self._packets,
            "lost": self._model_lost,
            "dropped": self._dropped,
            "seconds": round(seconds, 2),
            "cpu_share": round((cpu - self._cpu) / seconds, 3) if seconds else 0.0,
            "late_ms": late,
        }
        self._late = [0] * (BUCKETS + 1)
        self._packets = self._model_lost = self._dropped = 0
        self._since, self._cpu = now, cpu
        return found
