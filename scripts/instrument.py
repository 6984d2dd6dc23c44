"""What the tool itself costs, and how exact its clock is: measured before anything else.

What it owns: two measurements of this process, on the CPU that the load will have, and what can
be said of the machine beside it: how clocks drift, who else was busy.

`alone`: an echo takes the relay's place, in the same process and on the same CPU: how many
datagrams a second the tool sends, echoes and takes back, and what a round trip is at the rate of
the measurement. What a relay is said to take contains that much of the tool.

`clock`: all stamps of a round trip are of one clock, CLOCK_MONOTONIC of one machine, so no two
clocks have to agree. What is wrong with a stamp is when it is taken: before the system call that
sends, after the one that receives. The kernel stamps arrivals as well (SO_TIMESTAMPNS), and says
how far both are off. Beyond that the clock's steps, what reading it takes, how late a sleep ends,
and for how long this process stands still while it wants to run.

clock_gettime(2), socket(7), https://docs.kernel.org/networking/timestamping.html
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from pathlib import Path

import intervals
import numpy as np
from load import TICK_S, Account, Figures, Load

CLIENTS = 1_000
FAST_S, FAST_PER_S = 0.4, 1_000_000.0
"""Far more than any core sends, for so long that a start does not count."""

PROBES = 2_000
SLEEPS = 100
SPIN_S = 0.2
READS = 100_000

GOAL_PER_S = 100_000
"""Datagrams a second on one core that the tool is meant to reach with an echo."""

OTHERS_PERCENT = 10.0
"""Of one CPU, that other programs may use before it is said: a quiet machine's stay below three."""

_SO_TIMESTAMPNS = 35  # and the name of what comes with a datagram; socket(7), asm-generic/socket.h
_TIMESPEC = struct.Struct("@qq")
_CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


def alone(rate: float, seconds: float, spin: bool) -> Figures:
    """The tool with an echo in place of the relay: the most it does in a second, and its own round
    trips at `rate` datagrams a second (less where that is too much for it) for so long."""
    with Load(CLIENTS, spin=True) as load:
        load.towards("127.0.0.1", load.port)
        load.begin(FAST_PER_S, FAST_S + 0.1)
        load.run(FAST_S)
        most = per_s(load.settle())
    with Load(CLIENTS, spin=spin) as load:
        load.towards("127.0.0.1", load.port)
        at = max(min(rate, most * 0.8), 1.0)
        load.begin(at, seconds + 0.1)
        load.run(seconds)
        account = load.settle()
    trips = intervals.counts(account.trips_us())
    return {
        "datagrams_per_s_max": round(most),
        "at_per_s": round(at),
        "round_trip_us": {
            f"p{percent:g}": round(intervals.percentile(trips, percent), 1)
            for percent in (50, 90, 99, 99.9)
        },
        "behind_ms_max": round(account.lag_ms, 2),
        "lost": account.lost,
    }


def per_s(account: Account) -> float:
    """What came back in a second, from the first that left to the last that came: not while waiting
    for what is lost."""
    if not account.returned:
        return 0.0
    return account.returned * 1e9 / max(int(account.back_at.max() - account.sent_at.min()), 1)


def clock() -> Figures:
    """How exact the stamps of this process are."""
    reads = np.array([time.monotonic_ns() for _ in range(READS)])
    steps = np.diff(reads)
    start = time.perf_counter_ns()
    for _ in range(READS):
        time.monotonic_ns()
    cost = (time.perf_counter_ns() - start) / READS
    early, late = _stamps()
    slept = []
    for _ in range(SLEEPS):
        before = time.monotonic_ns()
        time.sleep(TICK_S)
        slept.append((time.monotonic_ns() - before) / 1000 - TICK_S * 1e6)
    source = _CLOCKSOURCE.read_text().strip() if _CLOCKSOURCE.exists() else None
    return {
        "source": source,
        "step_ns": int(steps[steps > 0].min()),
        "read_ns": round(cost, 1),
        "stamp_before_sending_us": _spread(early),
        "stamp_after_receiving_us": _spread(late),
        "sleep_too_long_us": _spread(np.array(slept)),
        "stood_still_us_max": round(_stood_still(), 1),
    }


def error_us(found: Figures) -> float:
    """By how much stamps make a round trip too long, as a rule: both ends' medians."""
    ends = "stamp_before_sending_us", "stamp_after_receiving_us"
    return round(sum(float(found[each]["p50"]) for each in ends), 1)


class Drift:
    """How far clocks move apart during a measurement: who set one of them, and how often."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[int, int, int]:
        return (
            time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW),
            time.clock_gettime_ns(time.CLOCK_REALTIME),
        )

    def figures(self) -> Figures:
        """Since it was made: the clock of the figures against the bare oscillator, in parts per
        million, and what the time of day has been set by meanwhile."""
        steady, raw, day = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return {
            "against_raw_ppm": round((steady - raw) / max(raw, 1) * 1e6, 3),
            "day_set_by_us": round((day - steady) / 1000, 1),
        }


class Others:
    """CPU time of this machine that is neither the tool's nor the relay's: whoever else was busy
    is in all figures. proc_stat(5)"""

    def __init__(self, ours: Callable[[], float], cpus: Collection[int] | None = None) -> None:
        """`ours` gives the CPU time, in seconds, of all that belongs to the measurement. Of these
        CPUs, or of all."""
        self._ours = ours
        self._lines = {"cpu"} if cpus is None else {f"cpu{each}" for each in cpus}
        self._start = self._read()

    def _read(self) -> tuple[float, float, float, float]:
        busy = stolen = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *columns = line.split(maxsplit=9)
            if name in self._lines:
                user, nice, system, _, _, irq, softirq, steal = map(int, columns[:8])
                busy += user + nice + system + irq + softirq
                stolen += steal
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy * tick_s, stolen * tick_s, self._ours()

    def figures(self) -> Figures:
        """Per cent of one CPU since it was made: of other programs, and what a hypervisor took."""
        passed, busy, steal, ours = (
            now - then for now, then in zip(self._read(), self._start, strict=True)
        )
        return {
            "others_percent": round(max(0.0, busy - ours) / passed * 100, 1),
            "stolen_percent": round(steal / passed * 100, 1),
        }


def _stamps() -> tuple[np.typing.NDArray[np.float64], np.typing.NDArray[np.float64]]:
    """Microseconds from our stamp to the kernel's of a datagram that is sent, and from the kernel's
    to ours where it is received. Both by CLOCK_REALTIME, which is what the kernel stamps with."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source,
    ):
        target.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        target.bind(("127.0.0.1", 0))
        source.connect(target.getsockname())
        found = []
        for _ in range(PROBES):
            before = time.time_ns()
            source.send(b"?" * 172)
            _, extras, _, _ = target.recvmsg(256, 64)
            after = time.time_ns()
            for level, kind, octets in extras:
                if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                    seconds, rest = _TIMESPEC.unpack(octets)
                    stamp = seconds * 1_000_000_000 + rest
                    found.append(((stamp - before) / 1000, (after - stamp) / 1000))
    columns = np.array(found or [(np.nan, np.nan)])
    return columns[:, 0], columns[:, 1]


def _spread(values: np.typing.NDArray[np.float64]) -> Figures:
    p50, p99 = (round(float(each), 1) for each in np.percentile(values, (50, 99)))
    return {"p50": p50, "p99": p99, "max": round(float(values.max()), 1)}


def _stood_still() -> float:
    """The longest time, in microseconds, that this process did not run while it wanted to."""
    longest, last = 0, time.monotonic_ns()
    end = last + int(SPIN_S * 1e9)
    while last < end:
        now = time.monotonic_ns()
        longest, last = max(longest, now - last), now
    return longest / 1000
