"""The flow table: which transceiver each client address talks to.

What it owns: fixed slots in a block of (shared) memory, the index over them, what opens, moves,
confirms and ends a flow.

    client's header (frame.py, 32 octets)  ->  the transceiver's socket address (frame.name)

The memory is the truth and outlives the process; the dictionaries are an index that the next
process over the same memory builds again. `hops` is that index, and the hot path reads it without
asking: both ways use the same key, since a transceiver answers with the client's header in front.

A flow is **tentative** until its transceiver has sent its client something other than STUN, then
**assured**. What strangers can cause by repeating other people's packets ends at tentative flows.

A slot also has the SSRC of its client's media (roaming.py): a client whose NAT has given it another
port is found by it. The flow that is opened for the new address **follows** the old one: anybody
who has seen the client's media could have caused it, so it takes no place of a client that checks.

Rules that stay true:
- A slot's state is written last when it fills and first when it empties: whenever the process dies,
  every slot that is not FREE is whole. A slot changes its client only after it was FREE.
- An assured flow goes to another transceiver only when its own has said nothing for
  `contests.FLOW_HELD_S` after it was contested: a repeated check moves no live call.
- Nothing is evicted to make room. Full is full, and counted. One exception: of the flows that
  follow and were never answered, the oldest makes room for the next.
- Slots are freed by `sweep` and `follow` alone, never while a batch is in hand.

A flow whose client is silent ends: for each state a hand goes round the slots once a period
(expiry.py). A client heard of stands in `active`, which costs the hot path one set update a batch.
The hand takes a flow that it finds there out of `active`, and forgets one that is not there.

Sans-IO: `now` is an argument, in seconds of one monotonic clock that the host's processes share
(CLOCK_MONOTONIC). It judges no packet: relay.py has checked ufrag and integrity.
"""

import collections
import enum
import itertools
import operator
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import contests
import expiry
import frame
import roaming

SLOT_OCTETS = 128
"""A slot: two cache lines. 65,536 flows are 8 MiB."""

SWEEP_S = 0.02
"""Between two sweeps. A process may wake ten thousand times a second, and looking costs 3 us."""

# State, origin, when the SSRC was noted, SSRC, header, hop, ufrag, opened at, assured at.
_SLOT = struct.Struct("<BBHI32s32p24pdd")
_HEADER = struct.Struct("<8x32s")
_INDEXED = f"8x32s32p24p{SLOT_OCTETS - 96}x"
_BULK = 1024
"""Slots read at once when a table is indexed: 75 ns each, where one by one takes 800."""
_STATE_AT, _ORIGIN_AT, _NOTED_AT = 0, 1, 2
_NOTED = struct.Struct("<HI")
_CLOCK = 1 << 16  # when an SSRC was noted: seconds, as far as 16 bits go
_ASSURED_AT = struct.Struct("<d")
_ASSURED_AT_AT = _SLOT.size - _ASSURED_AT.size
_HOP_OCTETS_MAX, _UFRAG_OCTETS_MAX = 31, 23  # one of each field is the length


class State(enum.IntEnum):
    """What a slot holds."""

    FREE = 0
    TENTATIVE = 1
    ASSURED = 2


class Origin(enum.IntEnum):
    """What a client had shown when its flow was opened."""

    CHECKED = 0
    """A check with integrity, or its address stands in another table or in Redis."""
    FAR = 1
    """The SSRC of an assured flow."""
    NEAR = 2
    """The same, and it has the same IP address."""


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
    """Socket address of the transceiver (frame.endpoint takes it apart)."""
    ufrag: bytes
    opened_at: float
    """Seconds of the monotonic clock."""
    assured_at: float
    """The same; 0 while tentative."""
    ssrc: int = 0
    """Of its client's media; 0 while unknown."""
    origin: Origin = Origin.CHECKED

    @property
    def follows(self) -> bool:
        """True for an unanswered flow that nothing but an SSRC has opened."""
        return self.origin is not Origin.CHECKED and self.state is State.TENTATIVE


class Table:
    """The flows of one worker."""

    hops: dict[bytes, bytes]
    """Client's header to transceiver's socket address. The hot path reads it."""
    active: set[bytes]
    """Headers of clients heard of since a hand came by. The hot path adds to it, and only clients
    that have a flow: a stranger's address must not stay in memory."""
    watched: set[bytes]
    """Headers whose transceiver's next word matters: tentative or contested flows."""
    listening: roaming.Listening
    """Headers of clients whose next media says their SSRC: the hot path asks for them."""
    tentative: int
    """How many flows are tentative."""
    due: float
    """When `sweep` has something to do again: asking costs less than calling it."""

    def __init__(self, memory: memoryview, limits: Limits, now: float) -> None:
        """Index what is in `memory`, of `octets(limits.flows)` octets: zeros are an empty table."""
        self._memory, self._limits = memory, limits
        self._followers_max = max(1, limits.tentative // roaming.FOLLOWERS_SHARE)
        self.listening = roaming.Listening()
        self._contested = contests.Contests()
        self._interned: dict[bytes, bytes] = {}
        self._hands = (
            expiry.Hand(State.ASSURED, limits.flows, limits.idle_s, now),
            expiry.Hand(State.TENTATIVE, limits.flows, limits.tentative_idle_s, now),
        )
        self.due = now
        self._take_over()

    def _take_over(self) -> None:
        """Build the index in bulk, without a look at free slots: a successor's clients wait."""
        memory, slots = self._memory, self._limits.flows
        states = bytes(memory[_STATE_AT : octets(slots) : SLOT_OCTETS])
        taken = list(itertools.compress(range(slots), states))
        headers: list[bytes] = []
        hops: list[bytes] = []
        ufrags: list[bytes] = []
        bulk = struct.Struct(_INDEXED * _BULK)
        for first in range(0, slots, _BULK):
            here = states[first : first + _BULK]
            if any(here):
                shape = bulk if len(here) == _BULK else struct.Struct(_INDEXED * len(here))
                fields = shape.unpack_from(memory, first * SLOT_OCTETS)
                for column, whole in enumerate((headers, hops, ufrags)):
                    whole.extend(itertools.compress(fields[column::3], here))
        self._slots = dict(zip(headers, taken, strict=True))
        if len(self._slots) < len(taken):
            # The process died while a flow changed its slot: either is as good as the other.
            for header, number in zip(headers, taken, strict=True):
                if self._slots[header] != number:
                    memory[number * SLOT_OCTETS + _STATE_AT] = State.FREE
            self._take_over()
            return
        self._free = list(
            itertools.compress(range(slots), states.translate(expiry.only(State.FREE)))
        )
        self._free.reverse()
        interned = map(self._interned.setdefault, hops, hops)
        self.hops = dict(zip(headers, interned, strict=True))
        self._addresses = collections.Counter(ufrags)
        only = states.translate(expiry.only(State.TENTATIVE))
        self.watched = set(itertools.compress(headers, itertools.compress(only, states)))
        self.tentative = len(self.watched)
        self._followers = roaming.Followers()
        origins = bytes(memory[_ORIGIN_AT : octets(slots) : SLOT_OCTETS])
        named = map(self._flow, itertools.compress(taken, itertools.compress(origins, states)))
        for flow in sorted(named, key=operator.attrgetter("opened_at")):
            if flow.follows:
                self._index(flow._replace(origin=Origin.CHECKED), -1)
                self._index(flow, 1)
        # What the process before heard is unknown: all live.
        self.active = set(headers)

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, header: bytes) -> int:
        """The number of a client's slot: another one where its flow has been replaced since."""
        return self._slots[header]

    def find(self, header: bytes) -> Flow | None:
        """A copy of a client's flow, if it has one."""
        number = self._slots.get(header)
        return None if number is None else self._flow(number)

    def ufrag(self, header: bytes) -> bytes | None:
        """The ufrag that opened a client's flow; None without a flow."""
        flow = self.find(header)
        return None if flow is None else flow.ufrag

    def open(
        self, header: bytes, hop: bytes, ufrag: bytes, now: float, other: bool = False
    ) -> Refusal | None:
        """A client has proved that it was given `ufrag`, which names `hop`: open its flow.

        A flow that this address already has is moved there if that may be (see above). None means
        that the client's flow now leads to `hop`. `other`: the same hop, and another transceiver
        behind it.
        """
        if header in self._slots:
            return self._reopen(header, hop, ufrag, now, other)
        flow = Flow(State.TENTATIVE, header, hop, ufrag, now, 0.0)
        refusal = self._refusal(flow)
        if refusal is None:
            self._put(flow)
        return refusal

    def _refusal(self, flow: Flow, old: Flow | None = None) -> Refusal | None:
        """The limit that a flow would exceed, in place of an old one or with a slot of its own."""
        limits = self._limits
        if old is None and not self._free:
            return Refusal.FLOWS_LIMIT
        was_tentative = old is not None and old.state is State.TENTATIVE
        more = flow.state is State.TENTATIVE and not was_tentative
        if more and self.tentative >= limits.tentative:
            return Refusal.TENTATIVE_LIMIT
        if flow.follows:
            return Refusal.TENTATIVE_LIMIT if len(self._followers) >= self._followers_max else None
        counted = old is not None and old.ufrag == flow.ufrag and not old.follows
        if not counted and self._addresses[flow.ufrag] >= limits.addresses:
            return Refusal.ADDRESSES_LIMIT
        return None

    def follow(
        self, header: bytes, hop: bytes, ufrag: bytes, ssrc: int, near: bool, now: float
    ) -> Refusal | None:
        """Media of a flow that is assured comes from this address, which has no flow: open one.

        Who can be followed has seen the media, and nothing more is known of him. He can push out
        only what is as doubtful: an unanswered follower, and from another IP address than the
        session's none that came from its own. Not to be called with a batch in hand.
        """
        assert header not in self._slots
        origin = Origin.NEAR if near else Origin.FAR
        flow = Flow(State.TENTATIVE, header, hop, ufrag, now, 0.0, ssrc, origin)
        leaves = self._followers.leaves(ufrag, near, self._followers_max)
        # Somewhat more than checks may have: replayed ones must not keep it out.
        most = self._limits.addresses + roaming.FOLLOWERS_MAX
        if leaves == b"" or self._addresses[ufrag] >= most:
            return Refusal.ADDRESSES_LIMIT
        if leaves:
            number = self._slots[leaves]
            gone = self._flow(number)
            self._empty(number)
            self._unindex(gone)
            self.active.discard(leaves)
        refusal = self._refusal(flow)
        if refusal is None:
            self._put(flow)
        return refusal

    def adopt(self, found: Iterable[Flow]) -> int:
        """Take over flows of another table as they are; returns how many. Those beyond the limits
        are left out, and those of clients that have a flow here."""
        before = len(self)
        for flow in found:
            if flow.header not in self._slots and self._refusal(flow) is None:
                self._put(flow)
        return len(self) - before

    def _reopen(
        self, header: bytes, hop: bytes, ufrag: bytes, now: float, other: bool
    ) -> Refusal | None:
        number = self._slots[header]
        old = self._flow(number)
        tentative, same_hop = old.state is State.TENTATIVE, old.hop == hop and not other
        if not (same_hop or tentative) and self._contested.held(header, now):
            if header in self._contested:
                self.watched.add(header)
            return Refusal.FLOW_HELD
        # The same transceiver (an ICE restart) keeps its place; another one has to earn it.
        flow = Flow(State.TENTATIVE, header, hop, ufrag, now, 0.0)
        if same_hop:
            ssrc = old.ssrc if old.ufrag == ufrag else 0
            flow = old._replace(ufrag=ufrag, ssrc=ssrc, origin=Origin.CHECKED)
        refusal = self._refusal(flow, old)
        if refusal is None:
            self._replace(number, old, flow)
        return refusal

    def install(self, flow: Flow) -> Refusal | None:
        """Another relay has this flow: as it is, in place of what its client had here."""
        number = self._slots.get(flow.header)
        old = None if number is None else self._flow(number)
        refusal = self._refusal(flow, old)
        if refusal is None and number is not None and old is not None:
            self._replace(number, old, flow)
        elif refusal is None:
            self._put(flow)
        return refusal

    def _replace(self, number: int, old: Flow, flow: Flow) -> None:
        """Into another slot, if there is one: the flow stands in one of the two at every moment."""
        self._unindex(old)
        if self._free:
            self._put(flow)
            self._empty(number)
        else:
            self._empty(number)
            self._put(flow)

    def redirect(self, header: bytes, hop: bytes) -> None:
        """The same session is reached by another way; who contests it, begins anew. Not to be
        called with a batch in hand."""
        number = self._slots[header]
        old = self._flow(number)
        self._replace(number, old, old._replace(hop=hop))

    def answered(self, headers: Iterable[bytes], now: float) -> None:
        """Transceivers have sent these clients something other than STUN."""
        for header in headers:
            self._contested.pop(header, None)
            self.watched.discard(header)
            number = self._slots.get(header)
            if number is None:
                continue
            at = number * SLOT_OCTETS
            if self._memory[at + _STATE_AT] == State.TENTATIVE:
                flow = self._flow(number)
                assured_at = at + _ASSURED_AT_AT
                self._memory[assured_at : assured_at + _ASSURED_AT.size] = _ASSURED_AT.pack(now)
                self._memory[at + _STATE_AT] = State.ASSURED
                if flow.follows:
                    self._index(flow, -1)
                    self._index(flow._replace(state=State.ASSURED), 1)
                else:
                    self.tentative -= 1
                if not flow.ssrc:
                    self.listening.add(header)
                # From now on it is the other hand's, which may come by at once.
                self.active.add(header)

    def checks(self, header: bytes, ufrag: bytes, now: float) -> bool:
        """True if this client's flow was opened for `ufrag` by a check, or is assured: another
        check for it has nothing to prove here. It lets the client's SSRC be noted again."""
        number = self._slots.get(header)
        flow = None if number is None else self._flow(number)
        if number is None or flow is None or flow.ufrag != ufrag:
            return False
        if flow.state is State.ASSURED:
            noted_at, _ = _NOTED.unpack_from(self._memory, number * SLOT_OCTETS + _NOTED_AT)
            if not flow.ssrc or (_clock(now) - noted_at) % _CLOCK >= roaming.LISTEN_S:
                self.listening.add(header)
            return True
        return not flow.follows

    def heard(self, header: bytes, ssrc: int, now: float) -> None:
        """A datagram of a client in `listening`, with the SSRC of its media; 0 if it has none."""
        if self.listening.hear(header, ssrc):
            at = self._slots[header] * SLOT_OCTETS + _NOTED_AT
            self._memory[at : at + _NOTED.size] = _NOTED.pack(_clock(now), ssrc)

    def sweep(self, now: float) -> list[bytes]:
        """Forget flows that have been idle; returns their clients' headers.

        To be called whenever the process wakes: each call takes the hands as far as they are due.
        """
        if now < self.due:
            return []
        self.due = now + SWEEP_S
        gone: list[Flow] = []
        for hand in self._hands:
            for number in hand.passes(self._memory[_STATE_AT::SLOT_OCTETS], now):
                (header,) = _HEADER.unpack_from(self._memory, number * SLOT_OCTETS)
                if header in self.active:
                    self.active.remove(header)
                else:
                    gone.append(self._flow(number))
        for flow in gone:
            self._empty(self._slots[flow.header])
            self._unindex(flow)
        self.watched.difference_update(self._contested.forgotten(now))
        return [flow.header for flow in gone]

    # --- slots and index ------------------------------------------------------------------------

    def _flow(self, number: int) -> Flow:
        """What stands in a slot that is not free."""
        return _copy(_SLOT.unpack_from(self._memory, number * SLOT_OCTETS))

    def _put(self, flow: Flow) -> None:
        """Write a flow into a free slot, and index it."""
        state, header, hop, ufrag, opened_at, assured_at, ssrc, origin = flow
        assert len(hop) <= _HOP_OCTETS_MAX and len(ufrag) <= _UFRAG_OCTETS_MAX
        number = self._free.pop()
        at = number * SLOT_OCTETS
        self._memory[at : at + _SLOT.size] = _SLOT.pack(
            State.FREE, origin, 0, ssrc, header, hop, ufrag, opened_at, assured_at
        )
        self._memory[at + _STATE_AT] = state
        self._slots[header] = number
        self.hops[header] = self._interned.setdefault(hop, hop)
        self._index(flow, 1)
        if state is State.TENTATIVE:
            self.watched.add(header)
        elif not ssrc:
            self.listening.add(header)
        self.active.add(header)

    def _index(self, flow: Flow, by: int) -> None:
        """Count a flow where it has a limit, or no longer (-1)."""
        text, header = flow.ufrag, flow.header
        self.tentative += by * (flow.state is State.TENTATIVE)
        if not flow.follows:
            self._addresses[text] += by
            if not self._addresses[text]:
                del self._addresses[text]
        elif by > 0:
            self._followers.add(text, header, flow.origin is Origin.NEAR)
        else:
            self._followers.remove(text, header)

    def _empty(self, number: int) -> None:
        self._memory[number * SLOT_OCTETS + _STATE_AT] = State.FREE
        self._free.append(number)

    def _unindex(self, flow: Flow) -> None:
        """Forget all that points to a flow's slot."""
        del self._slots[flow.header], self.hops[flow.header]
        self._index(flow, -1)
        self._contested.pop(flow.header, None)
        self.watched.discard(flow.header)
        self.listening.pop(flow.header, None)


def octets(flows: int) -> int:
    """Memory of a table of that many flows."""
    return flows * SLOT_OCTETS


def read(memory: memoryview, number: int) -> Flow | None:
    """A copy of slot `number`; None if it is free. Another process may be writing the slot: what
    was read is whole, or None, except in the moment of a change."""
    fields = _SLOT.unpack_from(memory, number * SLOT_OCTETS)
    return _copy(fields) if fields[0] else None


def read_all(memory: memoryview) -> Iterator[Flow]:
    """Copies of all flows in a table's memory."""
    states = bytes(memory[_STATE_AT::SLOT_OCTETS])
    for number in itertools.compress(itertools.count(), states):
        if flow := read(memory, number):
            yield flow


def _clock(now: float) -> int:
    return int(now) % _CLOCK


def _copy(fields: tuple[Any, ...]) -> Flow:
    state, origin, _, ssrc, header, hop, ufrag, *times = fields
    opened_at, assured_at = times
    return Flow(_STATES[state], header, hop, ufrag, opened_at, assured_at, ssrc, _ORIGINS[origin])


_STATES, _ORIGINS = tuple(State), tuple(Origin)

# The slot's fields fit, and hold what other modules put there.
assert _SLOT.size <= SLOT_OCTETS
assert frame.HEADER_OCTETS == 32 and frame.HEADER_OCTETS - len(frame.MAGIC) <= _HOP_OCTETS_MAX
