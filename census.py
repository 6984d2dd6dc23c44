"""The census: which clients have an assured flow in any worker, seen from outside the workers.

What it owns: one look at all flow tables in shared memory, which finds what has changed since the
look before; an index of the assured flows by client, and one by SSRC; and which of them are due to
be written to where other relays find them.

Rules that stay true:
- Nobody is asked and nothing is locked: the workers go on while their tables are looked at. What is
  handed out is read from its slot in that moment, and may be gone in the next.
- A look costs two strided copies of memory and a comparison, whatever the number of flows: 1 ms
  for 100,000 slots, and it can be had in pieces. Python touches only what has changed.
- What it holds is bounded by the number of slots.

It tells no time and writes nothing anywhere. Sans-IO.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

import flows
import frame
import roaming

_BLOCK_OCTETS = 2048
"""What is compared at a time: small enough to leave little to look through where something has
changed, large enough that a thousand comparisons cover a large table."""


class Watch:
    """A worker's flow table, as it was at the last look."""

    __slots__ = ("_assured", "_heads", "_views", "memory", "states")

    memory: memoryview
    """The table itself (flows.py)."""
    states: bytearray
    """An octet a slot."""

    def __init__(self, memory: memoryview) -> None:
        """Nothing was seen yet: the first look finds all that there is."""
        self.memory = memory
        words, words_a_slot = memory.cast("Q"), flows.SLOT_OCTETS // 8
        # A slot's first word has its state in front, and its SSRC.
        self._views = words[::words_a_slot], words[flows._ASSURED_AT_AT // 8 :: words_a_slot]
        slots = len(self._views[0])
        self.states = bytearray(slots)
        self._heads, self._assured = bytearray(8 * slots), bytearray(8 * slots)

    def look(self, first: int, end: int) -> tuple[set[int], set[int]]:
        """Those of the slots from `first` on, before `end`, that have changed since: another state,
        or another flow that is assured; and those with another SSRC.

        Two strided copies and a comparison, whatever the number of flows.
        """
        # In this order: a slot's state is written after what it vouches for.
        heads, assured = (view[first:end].tobytes() for view in self._views)
        words = slice(8 * first, 8 * end)
        before = self._heads[words]
        heard = set(_differences(before, heads))
        changed = {slot for slot in heard if heads[8 * slot] != before[8 * slot]}
        changed.update(_differences(self._assured[words], assured))
        self.states[first:end] = heads[::8]
        self._heads[words], self._assured[words] = heads, assured
        return {first + slot for slot in changed}, {first + slot for slot in heard - changed}


def _differences(before: bytearray, after: bytes) -> Iterator[int]:
    """The numbers of the words that differ."""
    if before == after:
        return
    for at in range(0, len(after), _BLOCK_OCTETS):
        old, new = before[at : at + _BLOCK_OCTETS], after[at : at + _BLOCK_OCTETS]
        if old != new:
            differ = map(operator.ne, memoryview(old).cast("Q"), memoryview(new).cast("Q"))
            yield from itertools.compress(itertools.count(at // 8), differ)


class Index:
    """The assured flows of all workers: by client, and which of them are due to be written.

    A flow is a number: that of its slot among the slots of all workers. What it holds is bounded by
    their number. Sans-IO.
    """

    due: dict[int, None]
    """Flows to be written, the oldest wish first."""

    def __init__(self, tables: Sequence[memoryview]) -> None:
        """Over tables of one size; holds nothing before the first look."""
        self._watches = [Watch(memory) for memory in tables]
        self._slots = len(self._watches[0].states)
        self._held: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self._ssrcs = roaming.Index()
        self._cursor = 0.0
        self.due = {}

    def look(self) -> None:
        """See what has changed: newly assured flows are due, those that have gone are forgotten."""
        for worker in range(len(self._watches)):
            self._look(worker, 0, self._slots)

    def looks(self, slots: int) -> Iterator[None]:
        """The same, so many slots at a time."""
        for worker in range(len(self._watches)):
            for first in range(0, self._slots, slots):
                self._look(worker, first, first + slots)
                yield

    def _look(self, worker: int, first: int, end: int) -> None:
        watch = self._watches[worker]
        changed, heard = watch.look(first, end)
        for slot in changed:
            number = worker * self._slots + slot
            self._forget(number)
            if watch.states[slot] == flows.State.ASSURED:
                self._note(number)
        for slot in heard:
            number = worker * self._slots + slot
            if number in self._held and (flow := self._read(number)):
                self._ssrcs.note(number, flow.ssrc)

    def _note(self, number: int) -> None:
        flow = self._read(number)
        if flow is None:  # it has gone meanwhile: the next look sees that too
            return
        key = frame.key(flow.header)
        self._held[number] = key
        self._numbers[key] = number
        self._ssrcs.note(number, flow.ssrc)
        self.due[number] = None

    def _forget(self, number: int) -> None:
        key = self._held.pop(number, None)
        if key is not None and self._numbers.get(key) == number:  # not another worker's by now
            del self._numbers[key]
        self._ssrcs.note(number, 0)
        self.due.pop(number, None)

    def _read(self, number: int) -> flows.Flow | None:
        worker, slot = divmod(number, self._slots)
        flow = flows.read(self._watches[worker].memory, slot)
        return flow if flow and flow.state is flows.State.ASSURED else None

    def refresh(self, share: float) -> None:
        """Let the next `share` of all slots be written again: 1.0 is all of them.

        It also finds again a client that had flows in two tables, of which the later one has gone.
        """
        slots = self._slots * len(self._watches)
        first = int(self._cursor)
        self._cursor += min(1.0, share) * slots
        for number in range(first, int(self._cursor)):
            key = self._held.get(number % slots)
            if key is not None:
                self.due.setdefault(number % slots)
                self._numbers.setdefault(key, number % slots)
        self._cursor %= slots

    def take(self, most: int) -> tuple[list[int], list[tuple[bytes, bytes]]]:
        """Flows that are due, no longer so: number, and client's key and ufrag, of each."""
        numbers, entries = [], []
        for number in list(itertools.islice(self.due, most)):
            del self.due[number]
            if flow := self._read(number):
                numbers.append(number)
                entries.append((frame.key(flow.header), flow.ufrag))
        return numbers, entries

    def put_back(self, numbers: Iterable[int]) -> None:
        """Those were not written."""
        self.due |= dict.fromkeys(number for number in numbers if number in self._held)

    def find(self, key: bytes) -> bytes | None:
        """The ufrag of a client's assured flow, read now; None if no worker has one."""
        number = self._numbers.get(key)
        flow = None if number is None else self._read(number)
        return flow.ufrag if flow and frame.key(flow.header) == key else None

    def follow(self, header: bytes, ssrc: int) -> tuple[bytes, bool] | None:
        """The ufrag of the assured flows with this SSRC, read now, and whether one of them has the
        client's IP address; None if there is none, or if it is not clear which (roaming.py)."""
        read = filter(None, map(self._read, self._ssrcs.find(ssrc)))
        pairs = [(flow.header, flow.ufrag) for flow in read if flow.ssrc == ssrc]
        return roaming.choose(header, pairs)

    def count(self) -> list[tuple[int, int]]:
        """Tentative and assured flows of each worker, at the last look."""
        return [count(watch.states) for watch in self._watches]


def states(memory: memoryview) -> memoryview:
    """The state of every slot of a flow table, an octet each: a view."""
    return memory[flows._STATE_AT :: flows.SLOT_OCTETS]


def count(of: bytes | bytearray) -> tuple[int, int]:
    """How many of those states are tentative, and how many assured."""
    return of.count(flows.State.TENTATIVE), of.count(flows.State.ASSURED)
