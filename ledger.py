"""Counters as numbers in memory: plain ones, and a ledger that changes a batch at a time.

What it owns: `Kinds` and `Measures`, the bases of every catalogue (metrics.py has the catalogues);
`Counters` over plain or shared memory; `Ledger`, whose writer may be killed at any instruction;
`Histograms` of how long things take.

Rules that stay true:
- Counting costs one increment of a number in memory; reading, summing and printing happen
  elsewhere, by whoever asks, without a lock: one process writes a block of counters, any may read.
- Within a stage each datagram ends in exactly one counter: for every enumeration that has them,
  RECEIVED equals FORWARDED plus RECOVERED, WAITING and CONTROL plus the sum of all DROPPED_*
  whenever no datagram is in hand (`Counters.missing` is 0). Tests assert it after all they do.
- The order of members is the layout in memory: a version of its own stands where memory outlives a
  process (`handover.py`).

Sans-IO.
"""

import enum
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

COUNTER_OCTETS = 8
"""An unsigned 64-bit number each: at a million a second it lasts half a million years."""

_DROPPED = "DROPPED_"
_ELSEWHERE = ("RECOVERED", "WAITING", "CONTROL")
"""Where a received datagram may also be: sent on late, waiting for that, or meant for us."""


class Kinds(enum.IntEnum):
    """Base of the catalogues: a member is `NAME = unit, help[, meaning[, gauge]]`."""

    unit: str
    """What is counted: datagrams, octets, sessions."""
    help: str
    """One sentence: what happened when it was counted."""
    meaning: str
    """What a value above zero tells an operator; empty where it is the normal case."""
    gauge: bool
    """True for a value that goes up and down."""

    def __new__(cls, unit: str, help: str, meaning: str = "", gauge: bool = False) -> Self:
        value = len(cls.__members__)
        member = int.__new__(cls, value)
        member._value_ = value
        member.unit, member.help, member.meaning, member.gauge = unit, help, meaning, gauge
        return member


class Counters:
    """The counters of one enumeration, as numbers in memory."""

    __slots__ = ("kinds", "values")

    kinds: type[Kinds]
    """The enumeration whose members index `values`."""
    values: memoryview
    """Unsigned 64-bit numbers: `counters.values[Inbound.RECEIVED] += n`."""

    def __init__(self, kinds: type[Kinds], memory: memoryview | None = None) -> None:
        """Count in `memory`, of at least `octets(kinds)` octets, and go on from what stands there.

        Without it the counters live in this process and start at zero. The view keeps `memory`
        from being closed as long as the counters exist.
        """
        self.kinds = kinds
        block = memoryview(bytearray(octets(kinds))) if memory is None else memory
        self.values = block[: octets(kinds)].cast("Q")

    def __getitem__(self, kind: Kinds) -> int:
        """The present value of one counter."""
        return int(self.values[kind])

    def __str__(self) -> str:
        """What is not zero, for a log line."""
        counted = [f"{kind.name.lower()} {self[kind]}" for kind in self.kinds if self[kind]]
        return f"{self.kinds.__name__.lower()}: {', '.join(counted) or 'nothing'}"

    def drops(self) -> dict[str, int]:
        """The DROPPED_* counters that are not zero, by name without the prefix, in lower case."""
        return {
            kind.name.removeprefix(_DROPPED).lower(): self[kind]
            for kind in self.kinds
            if kind.name.startswith(_DROPPED) and self[kind]
        }

    def missing(self) -> int:
        """Datagrams received that are neither forwarded nor dropped: those in hand, else 0.

        Raises KeyError for an enumeration without RECEIVED and FORWARDED.
        """
        received, forwarded = self.kinds["RECEIVED"], self.kinds["FORWARDED"]
        members = self.kinds.__members__
        elsewhere = sum(self[members[name]] for name in _ELSEWHERE if name in members)
        return self[received] - self[forwarded] - elsewhere - sum(self.drops().values())


class Ledger(Counters):
    """Counters that change a batch at a time, all of them in one store, or none.

    There are two copies and a switch that says which is valid: a batch is booked in the other copy,
    then the switch is thrown. A process that is killed at any instruction leaves a valid copy, and
    in it the mark of the last batch booked: its successor knows whether the batch in hand was.
    """

    __slots__ = ("_halves", "_switch", "_valid")

    def __init__(self, kinds: type[Kinds], memory: memoryview) -> None:
        """Go on in `memory`, of `ledger_octets(kinds)` octets: zeros are a new ledger."""
        self.kinds = kinds
        words = memory[: ledger_octets(kinds)].cast("Q")
        size = len(kinds) + 1
        self._switch = words[:1]
        self._halves = words[1 : 1 + size], words[1 + size :]
        self._valid = self._switch[0]

    @property
    def values(self) -> memoryview:  # type: ignore[override]  # of the valid copy, as it is now
        """The valid copy, to read. Another process may throw the switch meanwhile."""
        return self._halves[self._switch[0]]

    @property
    def mark(self) -> int:
        """The mark of the last batch booked."""
        return int(self.values[len(self.kinds)])

    def book(
        self, mark: int, received: int, forwarded: int, octets: int, reasons: Iterable[Kinds] = ()
    ) -> None:
        """Count one batch: what was received, sent on, and one of `reasons` for each other one.

        The catalogue begins with RECEIVED, FORWARDED and OCTETS.
        """
        old, valid = self._halves[self._valid], 1 - self._valid
        new = self._halves[valid]
        new[:] = old
        new[0] += received
        new[1] += forwarded
        new[2] += octets
        for reason in reasons:
            new[reason] += 1
        new[-1] = mark
        self._switch[0] = self._valid = valid

    def book_batch(
        self,
        mark: int,
        lengths: Sequence[int],
        header: int,
        holes: Mapping[int, Kinds],
        refused: Sequence[int],
    ) -> None:
        """Count a batch by its lengths, each of them with `header` octets that are no payload: all
        of it, what went on, and why not (`holes`), or that the kernel `refused` it."""
        n, octets = len(lengths), sum(lengths)
        if not (holes or refused):
            self.book(mark, n, n, octets - header * n)
            return
        failed = self.kinds["DROPPED_SEND_FAILED"]
        reasons = [*holes.values(), *(failed for _ in refused)]
        octets -= sum(lengths[i] for i in (*holes, *refused))
        passed = n - len(reasons)
        self.book(mark, n, passed, octets - header * passed, reasons)

    def change(self, changes: Mapping[Kinds, int]) -> None:
        """Add to some counters, gauges also below what they are, outside of any batch."""
        new = self._halves[1 - self._valid]
        new[:] = self._halves[self._valid]
        for kind, by in changes.items():
            new[kind] += by
        self._switch[0] = self._valid = 1 - self._valid


class Measures(enum.IntEnum):
    """Base of the catalogues of histograms: a member is `NAME = unit, help, steps[, meaning]`."""

    unit: str
    """What is measured, and the end of its name in an exposition: seconds, or ratio."""
    help: str
    """One sentence: from where to where it is measured."""
    steps: tuple[float, ...]
    """Upper bounds, ascending, each included; beyond the last there is one more."""
    meaning: str
    """What high values tell an operator."""

    def __new__(cls, unit: str, help: str, steps: tuple[float, ...], meaning: str) -> Self:
        value = len(cls.__members__)
        member = int.__new__(cls, value)
        member._value_ = value
        member.unit, member.help, member.steps, member.meaning = unit, help, steps, meaning
        return member


class Histograms:
    """The histograms of one enumeration, in this process's memory."""

    __slots__ = ("_counts", "_steps", "_sums", "kinds")

    def __init__(self, kinds: type[Measures]) -> None:
        """Begin with nothing observed."""
        self.kinds = kinds
        self._steps = tuple(kind.steps for kind in kinds)
        self._counts = tuple([0] * (len(steps) + 1) for steps in self._steps)
        self._sums = [0.0] * len(self._steps)

    def observe(self, kind: Measures, value: float) -> None:
        """Count one value, in the unit of its kind: 0.2 us."""
        self._counts[kind][bisect_left(self._steps[kind], value)] += 1
        self._sums[kind] += value

    def count(self, kind: Measures) -> int:
        """How many values have been observed."""
        return sum(self._counts[kind])

    def total(self, kind: Measures) -> float:
        """The sum of all values observed."""
        return self._sums[kind]

    def cumulative(self, kind: Measures) -> list[tuple[float, int]]:
        """For each step how many values were not above it; the last step is infinite."""
        counts = itertools.accumulate(self._counts[kind])
        return list(zip((*kind.steps, math.inf), counts, strict=True))

    def quantile(self, kind: Measures, q: float) -> float:
        """The step that holds the q-th part of all values: an upper bound. 0 if there are none."""
        reached = q * self.count(kind)
        steps = self.cumulative(kind) if reached else []
        return next((step for step, below in steps if below >= reached), 0.0)


def ledger_octets(kinds: type[Kinds]) -> int:
    """Memory that a ledger of an enumeration takes."""
    return COUNTER_OCTETS * (1 + 2 * (len(kinds) + 1))


def octets(kinds: type[Kinds]) -> int:
    """Memory that the counters of an enumeration take."""
    return COUNTER_OCTETS * len(kinds)


def total(rows: Sequence[Counters]) -> Counters:
    """The sum of several counters of one enumeration, in memory of its own."""
    summed = Counters(rows[0].kinds)
    for kind in summed.kinds:
        summed.values[kind] = sum(row[kind] for row in rows)
    return summed
