"""The flow table: which transceiver each client address talks to.

What it owns: fixed slots in a block of (shared) memory, the index over them, what opens, moves,
confirms and ends a flow.

    client's header (frame.py, 32 octets)  ->  the transceiver's socket address (udp.name)

The memory is the truth and outlives the process; the dictionaries are an index that the next
process over the same memory builds again. `hops` is that index, and the hot path reads it without
asking: both ways use the same key, since a transceiver answers with the client's header in front.

A flow is **tentative** until its transceiver has sent its client something other than STUN, then
**assured**. What strangers can cause by repeating other people's packets ends at tentative flows.

Rules that stay true:
- A slot's state is written last when it fills and first when it empties: whenever the process dies,
  every slot that is not FREE is whole. A slot changes its client only after it was FREE.
- An assured flow goes to another transceiver only when its own has said nothing for
  `FLOW_HELD_S` after it was contested: a repeated check moves no live call.
- Nothing is evicted to make room. Full is full, and counted.
- Slots are freed by `sweep` alone, never while a batch is in hand.

Expiry costs the hot path one set update a batch, and no scan: `active` collects who was heard of,
and a sweep forgets those who stood there at the sweep before and are not in it. So a flow lives
between one and two periods beyond its last packet.

Sans-IO: `now` is an argument, in seconds of one monotonic clock that the host's processes share
(CLOCK_MONOTONIC). It judges no packet: relay.py has checked ufrag and integrity.
"""

import enum
import itertools
import operator
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import frame

SLOT_OCTETS = 128
"""A slot: two cache lines. 65,536 flows are 8 MiB."""

FLOW_HELD_S = 3.0
"""How long an assured flow's transceiver may be silent before a check for another one takes the
client's address over. A live session sends reports every second at least; three of them lost is
unlikely. Shorter would let a replay move a call that has hiccups, longer delays the next call of a
client that reuses its port (its ICE agent repeats checks for far longer)."""

CONTESTED_MAX = 1024
"""Assured flows that may be contested at one time, beyond which a check counts as held. Each costs
100 octets and some microseconds; honest clients contest a handful an hour."""

CONTEST_S_MAX = 60.0
"""How long a contest is remembered: longer than any ICE agent goes on checking."""

_SLOT = struct.Struct("<BB6x32s32s24sdd")
_STATE_AT = 0
_ASSURED_AT = struct.Struct("<d")
_ASSURED_AT_AT = _SLOT.size - _ASSURED_AT.size
_HOP_OCTETS_MAX = 32
_UFRAG_OCTETS_MAX = 24


class State(enum.IntEnum):
    """What a slot holds."""

    FREE = 0
    TENTATIVE = 1
    ASSURED = 2


class Refusal(enum.Enum):
    """Why a flow was not opened or moved."""

    FLOWS_LIMIT = "the table is full"
    TENTATIVE_LIMIT = "there are too many tentative flows"
    ADDRESSES_LIMIT = "the ufrag has too many client addresses"
    FLOW_HELD = "the address belongs to an assured flow that is alive"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one table holds."""

    flows: int
    """Slots."""
    tentative: int
    """Tentative flows."""
    addresses: int
    """Flows for one ufrag."""
    idle_s: float
    """Period of an assured flow."""
    tentative_idle_s: float
    """Period of a tentative flow."""


class Flow(NamedTuple):
    """A copy of a slot."""

    state: State
    header: bytes
    """Of the client: 32 octets (frame.client takes it apart)."""
    hop: bytes
    """Socket address of the transceiver (udp.endpoint takes it apart)."""
    ufrag: bytes
    opened_at: float
    """Seconds of the monotonic clock."""
    assured_at: float
    """The same; 0 while tentative."""


class Table:
    """The flows of one worker."""

    hops: dict[bytes, bytes]
    """Client's header to transceiver's socket address. The hot path reads it."""
    active: set[bytes]
    """Headers of clients heard of since the last sweep. The hot path adds to it, and only clients
    that have a flow: a stranger's address must not stay in memory."""
    watched: set[bytes]
    """Headers whose transceiver's next word matters: tentative or contested flows."""

    def __init__(self, memory: memoryview, limits: Limits, now: float) -> None:
        """Index what is in `memory`, of `octets(limits.flows)` octets: zeros are an empty table."""
        self._memory, self._limits = memory, limits
        self._slots: dict[bytes, int] = {}
        self._tentative: set[bytes] = set()
        self._addresses: dict[bytes, int] = {}
        self._contested: dict[bytes, float] = {}
        self._interned: dict[bytes, bytes] = {}
        self._seen: set[bytes] = set()
        self.hops, self.active, self.watched = {}, set(), set()
        # Without a look at the free ones: a successor's clients are waiting.
        states = memory[_STATE_AT : octets(limits.flows) : SLOT_OCTETS].tobytes()
        self._free = list(itertools.compress(range(limits.flows), map(operator.not_, states)))
        self._free.reverse()
        for number in itertools.compress(range(limits.flows), states):
            flow = read(memory, number)
            assert flow is not None
            self._index(number, flow)
        self._due = now + limits.tentative_idle_s
        self._flows_due = now + limits.idle_s
        # Who stood there at the last sweep; what the process before heard is unknown: all live.
        self._standing: set[bytes] = set()
        self._tentative_standing: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def tentative(self) -> int:
        """How many flows are tentative."""
        return len(self._tentative)

    def _index(self, number: int, flow: Flow) -> None:
        if flow.header in self._slots:  # cannot happen with whole slots: the later one would win
            self._forget(flow.header)
        self._slots[flow.header] = number
        self.hops[flow.header] = self._interned.setdefault(flow.hop, flow.hop)
        self._addresses[flow.ufrag] = self._addresses.get(flow.ufrag, 0) + 1
        if flow.state is State.TENTATIVE:
            self._tentative.add(flow.header)
            self.watched.add(flow.header)
        self.active.add(flow.header)

    def _forget(self, header: bytes) -> None:
        """Free a flow's slot and all that points to it."""
        number = self._slots.pop(header)
        ufrag = self._ufrag(number)
        self._memory[number * SLOT_OCTETS + _STATE_AT] = State.FREE
        self._free.append(number)
        del self.hops[header]
        left = self._addresses[ufrag] - 1
        if left:
            self._addresses[ufrag] = left
        else:
            del self._addresses[ufrag]
        self._tentative.discard(header)
        self._contested.pop(header, None)
        self.watched.discard(header)

    def _ufrag(self, number: int) -> bytes:
        flow = read(self._memory, number)
        return b"" if flow is None else flow.ufrag

    def ufrag(self, header: bytes) -> bytes | None:
        """The ufrag that opened a client's flow; None without a flow."""
        number = self._slots.get(header)
        return None if number is None else self._ufrag(number)

    def open(self, header: bytes, hop: bytes, ufrag: bytes, now: float) -> Refusal | None:
        """A client has proved that it was given `ufrag`, which names `hop`: open its flow.

        A flow that this address already has is moved there if that may be (see above). None means
        that the client's flow now leads to `hop`.
        """
        if header in self._slots:
            return self._reopen(header, hop, ufrag, now)
        limits = self._limits
        if not self._free:
            return Refusal.FLOWS_LIMIT
        if len(self._tentative) >= limits.tentative:
            return Refusal.TENTATIVE_LIMIT
        if self._addresses.get(ufrag, 0) >= limits.addresses:
            return Refusal.ADDRESSES_LIMIT
        number = self._free.pop()
        flow = Flow(State.TENTATIVE, header, hop, ufrag, now, 0.0)
        self._write(number, flow)
        self._index(number, flow)
        return None

    def _reopen(self, header: bytes, hop: bytes, ufrag: bytes, now: float) -> Refusal | None:
        number = self._slots[header]
        tentative = header in self._tentative
        same_hop = self.hops[header] == hop
        if not (same_hop or tentative) and self._held(header, now):
            return Refusal.FLOW_HELD
        if not tentative and not same_hop and len(self._tentative) >= self._limits.tentative:
            return Refusal.TENTATIVE_LIMIT
        before = self._ufrag(number)
        if before != ufrag and self._addresses.get(ufrag, 0) >= self._limits.addresses:
            return Refusal.ADDRESSES_LIMIT
        # The same transceiver (an ICE restart) keeps its place; another one has to earn it.
        old = read(self._memory, number)
        self._forget(header)
        self._free.pop()  # the slot just freed: the same client takes it again at once
        flow = Flow(State.TENTATIVE, header, hop, ufrag, now, 0.0)
        if same_hop and old is not None:
            flow = old._replace(ufrag=ufrag)
        self._write(number, flow)
        self._index(number, flow)
        return None

    def _held(self, header: bytes, now: float) -> bool:
        """True while an assured flow's own transceiver may still be there."""
        since = self._contested.get(header)
        if since is not None:
            return now - since < FLOW_HELD_S
        if len(self._contested) < CONTESTED_MAX:
            self._contested[header] = now
            self.watched.add(header)
        return True

    def answered(self, headers: Iterable[bytes], now: float) -> None:
        """Transceivers have sent these clients something other than STUN."""
        for header in headers:
            self._contested.pop(header, None)
            self.watched.discard(header)
            if header in self._tentative:
                self._tentative.discard(header)
                at = self._slots[header] * SLOT_OCTETS
                _ASSURED_AT.pack_into(self._memory, at + _ASSURED_AT_AT, now)
                self._memory[at + _STATE_AT] = State.ASSURED

    def _write(self, number: int, flow: Flow) -> None:
        at = number * SLOT_OCTETS
        self._memory[at + _STATE_AT] = State.FREE
        _, header, hop, ufrag, opened_at, assured_at = flow
        _SLOT.pack_into(
            self._memory, at, State.FREE, len(hop), header, hop, ufrag, opened_at, assured_at
        )
        self._memory[at + _STATE_AT] = flow.state

    def sweep(self, now: float) -> list[bytes]:
        """Forget the flows that have been idle, once a period; returns their clients' headers."""
        if now < self._due:
            return []
        self._due = now + self._limits.tentative_idle_s
        heard, self.active = self.active, set()
        gone = (self._tentative_standing & self._tentative) - heard
        self._seen |= heard
        whole = now >= self._flows_due
        if whole:
            self._flows_due = now + self._limits.idle_s
            gone |= (self._standing & self._slots.keys()) - self._seen - self._tentative
            self._seen = set()
        for header in gone:
            self._forget(header)
        if whole:
            self._standing = set(self._slots)
        self._tentative_standing = set(self._tentative)
        # A contest that its owner never answered and nobody came back for.
        for header in [h for h, at in self._contested.items() if now - at > CONTEST_S_MAX]:
            del self._contested[header]
            if header not in self._tentative:
                self.watched.discard(header)
        return list(gone)


def octets(flows: int) -> int:
    """Memory of a table of that many flows."""
    return flows * SLOT_OCTETS


def read(memory: memoryview, number: int) -> Flow | None:
    """A copy of slot `number`; None if it is free. Another process may be writing the slot: what
    was read is whole, or None, except in the moment of a change."""
    state, hop_octets, header, hop, ufrag, opened_at, assured_at = _SLOT.unpack_from(
        memory, number * SLOT_OCTETS
    )
    if state == State.FREE:
        return None
    text = ufrag.rstrip(b"\x00")
    return Flow(State(state), header, hop[:hop_octets], text, opened_at, assured_at)


def read_all(memory: memoryview) -> Iterator[Flow]:
    """Copies of all flows in a table's memory."""
    states = memory[_STATE_AT::SLOT_OCTETS].tobytes()
    for number in itertools.compress(itertools.count(), states):
        if flow := read(memory, number):
            yield flow


# The slot's fields fit, and hold what other modules put there.
assert _SLOT.size <= SLOT_OCTETS and frame.HEADER_OCTETS == _HOP_OCTETS_MAX
assert _UFRAG_OCTETS_MAX >= 23
