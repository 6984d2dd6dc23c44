"""The relay under load, seen from outside: its workers' CPU time, counters, and what was dropped.

What it owns: `Observed`, which finds a relay's processes and counters, and `Snapshot`, how those
stood at a moment. Figures are differences of two.

A relay of this machine publishes where its counters lie; that needs its configuration file and its
user (or root). Where that fails, its processes are those that hold its port, or those of a process
id that was named, and there are no counters. Of a relay elsewhere there are counters if its
/metrics can be asked, and nothing else. What is not known is left out and said, never guessed.

Rules that stay true: nothing here changes or slows the relay; a worker that is replaced meanwhile
has a new process id, which is read anew each time, and the CPU time of the old one is lost.

proc(5) https://man7.org/linux/man-pages/man5/proc.5.html
"""

import http.client
import os
import re
import socket
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import rig

import handover
import host
import settings

METRICS_PATIENCE_S = 2.0
"""A relay answers its monitoring in milliseconds."""

METRICS_OCTETS_MAX = 4 << 20
"""A relay of 256 workers says it in less."""

_SAMPLE = re.compile(
    r'^earshot_relay_(inbound|outbound)_(received|dropped_\w+?)_total\{worker="(\d+)"\} (\S+)', re.M
)


@dataclass
class Snapshot:
    """How a relay stood at a moment."""

    at: float
    """Seconds of CLOCK_MONOTONIC."""
    cpu_s: dict[int, float] = field(default_factory=dict)
    """CPU time of each process (of its workers, where those are known), by process id."""
    received: list[int] = field(default_factory=list)
    """Datagrams that each worker has received, both ways; empty where nothing is counted."""
    drops: Counter[str] = field(default_factory=Counter)
    """Dropped by the relay, by its reason, of both ways."""
    kernel_drops: int = 0
    """Dropped by the kernel, since a socket of the relay was full."""

    def cpu_since(self, before: "Snapshot") -> dict[int, float]:
        """CPU time of each process that was there then, too."""
        return {
            pid: spent - before.cpu_s[pid]
            for pid, spent in self.cpu_s.items()
            if pid in before.cpu_s
        }

    def received_since(self, before: "Snapshot") -> list[int]:
        """What each worker has received since then."""
        return [now - then for now, then in zip(self.received, before.received, strict=False)]


def is_here(address: str) -> bool:
    """True if an address is one of this machine's (or of this network namespace)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def holders(port: int) -> list[int]:
    """Processes of this machine that hold a UDP socket of that port, as far as they may be seen."""
    inodes = set()
    for family in ("udp", "udp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            columns = line.split()
            if int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    found = []
    for pid in (int(each) for each in os.listdir("/proc") if each.isdigit()):
        try:
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except OSError:  # it has ended, or is another user's
            continue
        if inodes.intersection(links):
            found.append(pid)
    return found


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows nobody: only the address that was named is asked."""

    def redirect_request(self, *_: object) -> None:
        """What urllib asks about each redirect; it then raises HTTPError, an OSError."""


class Observed:
    """A relay that load is sent to."""

    def __init__(
        self,
        table: settings.RelayTable,
        at: tuple[str, int],
        pid: int | None = None,
        metrics: str | None = None,
    ) -> None:
        """The relay that serves at that address. Raises ValueError for a process id that is none,
        and for a /metrics that does not answer."""
        self.here, self.notes, self._metrics = is_here(at[0]), list[str](), metrics
        self._memories: list[host.Memory] = []
        self._counted: Snapshot | None = None
        self._unanswered = 0
        self._pids: list[int] = []
        self._ports = {at[1]}
        public = table.public
        if pid is not None:
            self._pids = _named(pid)
        elif self.here and public.port == at[1]:
            self._attach(table)
        if self.here and not self._memories and not self._pids:
            self._pids = [each for each in holders(at[1]) if each != os.getpid()]
        if not self.here:
            self.notes.append("the relay is on another machine: its CPU time is not seen from here")
        elif not self.workers():
            self.notes.append(f"no process that holds UDP port {at[1]} can be seen from here")
        self.now()  # what cannot be read is to fail before the load, not after it

    def _attach(self, table: settings.RelayTable) -> None:
        try:
            self._memories = handover.Running.of(table).workers
        except (OSError, ValueError) as error:
            self.notes.append(f"the relay's counters cannot be read: {error}")
            return
        first = table.internal.port
        self._ports |= set(range(first, first + len(self._memories)))

    def workers(self) -> list[int]:
        """Process ids of the workers, in order; of all its processes where they are not told
        apart; empty where they are not seen."""
        if not self._memories:
            return self._pids
        return [each.section("control").cast("Q")[handover.Control.PID] for each in self._memories]

    def tells_workers_apart(self) -> bool:
        """True if `workers` are the workers, and counters those of each."""
        return bool(self._memories)

    def cpus(self) -> set[int]:
        """CPUs that its workers are pinned to; those that may run anywhere count for none."""
        found = set()
        for pid in self.workers():
            try:
                allowed = os.sched_getaffinity(pid)
            except OSError:
                continue
            found |= allowed if len(allowed) == 1 else set()
        return found

    def now(self) -> Snapshot:
        """How it stands. Raises ValueError if its /metrics do not answer for the first time; later
        the counters stand still where they do not, and `later` says so."""
        shot = Snapshot(time.monotonic())
        for pid in self.workers():
            try:
                shot.cpu_s[pid] = rig.cpu_s(pid)
            except OSError:  # it has just ended, and its successor is in the next snapshot
                continue
        if self.here:
            shot.kernel_drops = rig.kernel_drops(self._ports)
        for inbound, outbound in map(handover.counters_in, self._memories):
            ways = inbound, outbound
            shot.received.append(sum(each[each.kinds["RECEIVED"]] for each in ways))
            for each in ways:
                shot.drops.update(each.drops())
        if self._metrics and not self._memories:
            self._count(self._metrics, shot)
        return shot

    def later(self) -> list[str]:
        """What has to be said once it is over."""
        if not self._unanswered:
            return []
        return [
            f"{self._unanswered} times the relay's /metrics did not answer within "
            f"{METRICS_PATIENCE_S:g} s: what it counted before shows only at the next answer"
        ]

    def _count(self, url: str, shot: Snapshot) -> None:
        try:
            self._ask(url, shot)
        except ValueError:
            if self._counted is None:
                raise
            self._unanswered += 1
            shot.received, shot.drops = self._counted.received, self._counted.drops
        else:
            self._counted = shot

    def _ask(self, url: str, shot: Snapshot) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Straight())
        try:
            with opener.open(url, timeout=METRICS_PATIENCE_S) as answer:
                text = answer.read(METRICS_OCTETS_MAX).decode()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{url} does not answer: {error}") from error
        found = [(kind, int(worker), float(n)) for _, kind, worker, n in _SAMPLE.findall(text)]
        if not found:
            raise ValueError(f"{url} has no counters of a relay's workers")
        shot.received = [0] * (1 + max(worker for _, worker, _ in found))
        for kind, worker, count in found:
            if kind == "received":
                shot.received[worker] += int(count)
            elif count:
                shot.drops[kind.removeprefix("dropped_")] += int(count)


def _named(pid: int) -> list[int]:
    try:
        return rig.tree(pid)
    except OSError as error:
        raise ValueError(f"there is no process {pid}") from error
