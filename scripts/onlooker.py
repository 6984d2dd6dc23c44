"""The onlooker: what a relay counts and what it costs, seen from outside while something happens.

For flood.py attack. Counters come from the relay's page of metrics, summed over its workers; CPU
and memory from /proc, for processes on this machine.

Rules that stay true:
- The law is judged on what the page says: received = forwarded + recovered + waiting + control +
  drops, for either way. The page is read while datagrams are in hand, so that a reading may be a
  batch off: it is read again, `READINGS` times at most, and holds if it held once.
- Memory is the proportional set size: what processes share counts once.
- What the whole machine had left is looked at, too: where that is nothing, figures of time say more
  about whoever else used it.

proc(5) https://man7.org/linux/man-pages/man5/proc.5.html
"""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import observed
from rig import cpu_s, tree

Counted = Counter[str]
"""What a page says, without the program's name and `_total`: `inbound_received`."""

READINGS = 20
BETWEEN_S = 0.02
PAGE_S_MAX = 5.0

_LINE = re.compile(r"^earshot_relay_(\w+?)(?:_total)?(?:\{(.*)\})? (\S+)$", re.M)
_ELSEWHERE = "recovered", "waiting", "control"


def counted(page: str) -> Counted:
    """The numbers of a page, of all workers; of sockets by their side: `socket_public_dropped`."""
    found: Counted = Counter()
    for name, labels, value in _LINE.findall(page):
        side = re.search(r'socket="(\w+)"', labels)
        whole = name.replace("socket_", f"socket_{side[1]}_", 1) if side else name
        found[whole] += int(float(value))
    return found


def missing(found: Mapping[str, int], way: str) -> int:
    """Datagrams of a way (`inbound`, `outbound`) that are in no counter but what was received."""
    drops = sum(value for name, value in found.items() if name.startswith(f"{way}_dropped_"))
    elsewhere = sum(found.get(f"{way}_{name}", 0) for name in _ELSEWHERE)
    received, forwarded = (found.get(f"{way}_{name}", 0) for name in ("received", "forwarded"))
    return received - forwarded - elsewhere - drops


def drops(before: Counted, after: Counted) -> dict[str, int]:
    """What was dropped between two readings, by reason, the most frequent first."""
    found = {
        name.partition("_dropped_")[2]: after[name] - before[name]
        for name in after
        if name.startswith("inbound_dropped_") and after[name] > before[name]
    }
    return dict(sorted(found.items(), key=lambda each: -each[1]))


class Page:
    """A relay's page of metrics."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self.url = http, url

    async def read(self) -> Counted:
        """What it says now. Raises OSError."""
        try:
            limit = aiohttp.ClientTimeout(total=PAGE_S_MAX)
            async with self._http.get(self.url, timeout=limit, allow_redirects=False) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(f"no metrics at {self.url}: {error or type(error).__name__}") from error
        found = counted(text)
        if "inbound_received" not in found:
            raise OSError(f"{self.url} is no relay's page of metrics")
        return found

    async def law(self) -> tuple[Counted, int]:
        """What it says, and how many datagrams are in no counter: 0 if the law holds."""
        least: tuple[Counted, int] | None = None
        for _ in range(READINGS):
            found = await self.read()
            off = abs(missing(found, "inbound")) + abs(missing(found, "outbound"))
            if least is None or off < least[1]:
                least = found, off
            if not least[1]:
                break
            await asyncio.sleep(BETWEEN_S)
        assert least is not None  # READINGS is more than 0
        return least


class Processes:
    """Programs on this machine, by name: each process and all that it has forked."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._pids = dict(pids)
        self._used: dict[str, dict[int, float]] = {name: {} for name in pids}

    def __contains__(self, name: str) -> bool:
        return name in self._pids

    def cpu_s(self) -> dict[str, float]:
        """CPU time of each program since it began. What a process used that has ended stays, as
        far as it was seen."""
        for name, used in self._used.items():
            for pid in self._members(name):
                try:
                    used[pid] = cpu_s(pid)
                except OSError:  # it has ended just now
                    continue
        return {name: sum(used.values()) for name, used in self._used.items()}

    def octets(self, name: str) -> int:
        """Memory of a program, what its processes share counted once; what cannot be seen is not in
        it."""
        total = 0
        for pid in self._members(name):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it has ended, or is another user's
                continue
            total += 1024 * sum(map(int, re.findall(r"^Pss:\s+(\d+) kB", text, re.M)))
        return total

    def _members(self, name: str) -> list[int]:
        found: list[int] = []
        for pid in self._pids[name]:
            try:
                found += tree(pid)
            except OSError:  # it has ended
                continue
        return found


def idle_s() -> float:
    """Processor time of this machine so far that nobody used, over all CPUs."""
    columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(columns[4]) + int(columns[5])) / os.sysconf("SC_CLK_TCK")  # idle and iowait


def holder(port: int) -> int | None:
    """The process that holds a UDP port of this machine, the eldest of those that share it; None if
    nobody does, or its owner is not to be seen."""
    return min(observed.holders(port), default=None)
