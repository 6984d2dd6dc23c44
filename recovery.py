"""Recovery: media of clients that this worker does not know, while somebody finds out who does.

A client's datagrams arrive at another relay when the network chooses another way, or when the relay
that knew the client is gone; or from another address, since its NAT has changed the port. They wait
here while the keeper finds the client's ufrag, in any worker's table or in Redis, by its address or
by the SSRC of its media (roaming.py), and go on once gate.py has judged it; the caller hears
nothing of it.

What it owns: the datagrams that wait, in shared memory, and the decision whom to ask about. Whoever
sends garbage from addresses of his choice makes this work, so everything in it has a limit: how
much waits, of all clients and of one; how many clients are asked about in a second, with some kept
for those who come again; and about whom nothing is asked, since the answer was no a moment ago.

Rules that stay true:
- A slot's mark is written last when it fills and is all that is cleared when it empties: whenever
  the process dies, every slot that has a mark is whole. Its successor asks again for all of them.
- The mark is the number of the batch that the datagram came with. If that batch was not counted it
  will be judged again, and what it left here is forgotten.
- A slot is freed after what became of its datagram has been counted, never before. In between it
  is marked as let go: a successor knows by that, and by how many are counted as waiting, whether
  it was counted, and that it need not be sent again.

Sans-IO: `now` is an argument, in seconds.
"""

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import frame
import metrics
import roaming

CLIENT_MAX = 8
"""Datagrams of one client that may wait: 160 ms of a call. More would let one client fill all."""

AGAIN_SHARE = 8
"""One in so many look-ups of a second is kept for clients that were refused one a moment ago. A
flood comes from ever new addresses; a client whose port has changed comes again after 20 ms, and
must not wait until it has luck. Who floods from each address twice pays for it with half of it."""

REFUSED_MAX = 4096
"""Of those, remembered in each of two generations: for 20 ms at 200,000 a second."""

ASK_MAX = 64
"""Clients in one question to the keeper."""

ASK = struct.Struct("<32sI4x")
"""A question about one client: header, SSRC of its media (0: none was seen)."""

ANSWER = struct.Struct("<32sB3xI24s")
"""The keeper's answer: header, status, the SSRC that was asked about, ufrag."""

UNKNOWN, FOUND, UNAVAILABLE, FOLLOWS_FAR, FOLLOWS_NEAR = range(5)
"""The status: nobody knows the client; here is its ufrag; nobody could be asked; here is the ufrag
of the flow with its SSRC, from another IP address; the same, from its own."""

# Mark, octets of the frame, 1 if it was let go. Those of all slots stand in front of the frames, so
# that a process that looks for what waits touches no memory that nothing has waited in.
_SLOT = struct.Struct("<QIB3x")
_MARK = struct.Struct("<Q")
_LET_GO_AT = 12


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker holds and asks. The settings `[recovery]` say what each is for."""

    waiting: int
    """Datagrams."""
    wait_s: float
    lookups_per_s: int
    unknown: int
    """Clients remembered as unknown."""
    unknown_s: float


class Recovery:
    """The datagrams that wait in one worker."""

    asked_at: dict[bytes, float]
    """Clients that were asked about, with the time: in the order in which they are overdue."""

    def __init__(
        self, memory: memoryview, limits: Limits, octets_max: int, counted: int, now: float
    ) -> None:
        """Go on with what waits in `memory`, of `octets(...)` octets: zeros are nothing.

        `octets_max` is the largest payload, `counted` the number of the last batch counted.
        """
        self._memory, self._limits = memory, limits
        self._stride, self._frames_at = _stride(octets_max), limits.waiting * _SLOT.size
        self._slots: dict[bytes, list[int]] = {}
        self.asked_at = {}
        self._to_ask: dict[bytes, None] = {}
        self._asks: dict[bytes, tuple[roaming.Kind, int]] = {}
        self._left, self._renewed_at = limits.lookups_per_s, now
        self._kept = limits.lookups_per_s // AGAIN_SHARE
        self._refused: tuple[set[bytes], set[bytes]] = set(), set()
        self._unknown: tuple[_Kinds, _Kinds] = {}, {}
        self._turned_at = now
        self._free, self._left_behind = [], list[int]()
        for slot in reversed(range(limits.waiting)):
            (mark,) = _MARK.unpack_from(memory, slot * _SLOT.size)
            if mark > counted:
                self.free([slot])
            elif not mark:
                self._free.append(slot)
            elif memory[slot * _SLOT.size + _LET_GO_AT]:
                self._left_behind.append(slot)
            else:
                self._note_again(slot, now)

    def settle(self, waiting: int, now: float) -> None:
        """So many are counted as waiting: what the process before let go waits again if it is
        among them, and is gone if it was counted as something else."""
        slots, self._left_behind = self._left_behind, []
        if len(self) > waiting:
            self.free(slots)
            return
        for slot in slots:
            self._memory[slot * _SLOT.size + _LET_GO_AT] = 0
            self._note_again(slot, now)

    def _note_again(self, slot: int, now: float) -> None:
        whole = self.frame(slot)
        header, payload = bytes(whole[: frame.HEADER_OCTETS]), whole[frame.HEADER_OCTETS :]
        self._note(header, slot, *roaming.read(payload), now)

    def __len__(self) -> int:
        """How many datagrams wait."""
        return self._limits.waiting - len(self._free)

    def hold(
        self, header: bytes, payload: memoryview, mark: int, now: float
    ) -> metrics.Inbound | None:
        """Let a datagram wait; returns why it cannot, or None if it does."""
        self._renew(now)
        kind, ssrc = roaming.read(payload)
        if any(kind <= of.get(header, _NEVER) for of in self._unknown):
            return metrics.Inbound.DROPPED_UNKNOWN_CLIENT
        slots = self._slots.get(header, ())
        if len(slots) >= CLIENT_MAX or not self._free or not (slots or self._may_ask(header)):
            return metrics.Inbound.DROPPED_LOOKUP_LIMIT
        slot = self._free.pop()
        at, start = slot * _SLOT.size, self._frames_at + slot * self._stride
        self._memory[start : start + frame.HEADER_OCTETS] = header
        end = start + frame.HEADER_OCTETS + len(payload)
        self._memory[start + frame.HEADER_OCTETS : end] = payload
        _SLOT.pack_into(self._memory, at, 0, end - start, 0)
        _MARK.pack_into(self._memory, at, mark)
        self._note(header, slot, kind, ssrc, now)
        return None

    def _may_ask(self, header: bytes) -> bool:
        """Whether there is a look-up left for a client that nothing waits for yet."""
        if self._left > self._kept:
            return True
        if header in self._refused[0] or header in self._refused[1]:
            return self._left > 0
        if len(self._refused[0]) >= REFUSED_MAX:
            self._refused = set(), self._refused[0]
        self._refused[0].add(header)
        return False

    def _note(self, header: bytes, slot: int, kind: roaming.Kind, ssrc: int, now: float) -> None:
        slots = self._slots.setdefault(header, [])
        slots.append(slot)
        if len(slots) == 1:
            self.asked_at[header] = now
            self._left = max(0, self._left - 1)
        elif kind <= self._asks[header][0] or not self._left:
            return
        else:  # this one says better whose they are
            self._left -= 1
        self._asks[header] = kind, ssrc
        self._to_ask[header] = None

    def _renew(self, now: float) -> None:
        """A new second's budget; a new generation of those who are unknown."""
        if now - self._renewed_at >= 1.0:
            self._renewed_at, self._left = now, self._limits.lookups_per_s
            self._refused = set(), self._refused[0]
        age_s = now - self._turned_at
        if age_s >= self._limits.unknown_s / 2:
            self._turn(now)
        if age_s >= self._limits.unknown_s:  # nobody came meanwhile: the younger ones are old, too
            self._turn(now)

    def _turn(self, now: float) -> None:
        self._turned_at, self._unknown = now, ({}, self._unknown[0])

    def asks(self) -> list[bytes]:
        """What to ask the keeper now: at most `ASK_MAX` questions, or none.

        Each is returned once: an answer that never comes is overdue some time. Nobody is asked
        about for whom nothing waits any more: with a keeper that does not listen there would be
        ever more of them.
        """
        asked = list(itertools.islice(self._to_ask, ASK_MAX))
        for header in asked:
            del self._to_ask[header]
        return [ASK.pack(header, self._asks[header][1]) for header in asked]

    def asks_for(self, header: bytes, ssrc: int) -> bool:
        """False if more has been asked about this client than that question."""
        return self._asks.get(header, (0, ssrc))[1] == ssrc

    def take(self, header: bytes) -> list[int]:
        """Somebody knows about this client: the slots that waited for it, no longer waiting.

        They are the caller's to pass on, to `let_go`, to count and to `free`.
        """
        self.asked_at.pop(header, None)
        self._to_ask.pop(header, None)
        self._asks.pop(header, None)
        return self._slots.pop(header, [])

    def unknown(self, header: bytes, now: float) -> None:
        """Nobody knows this client: ask no more about it for a while, but for media where it was
        asked without its SSRC. To be called before `take`."""
        self._renew(now)
        if len(self._unknown[0]) >= self._limits.unknown // 2:
            self._turn(now)
        self._unknown[0][header] = self._asks.get(header, (roaming.Kind.ADDRESS, 0))[0]

    def overdue(self, now: float) -> list[bytes]:
        """Headers of clients about whom nobody answered in time."""
        late = []
        for header, asked_at in self.asked_at.items():
            if now - asked_at < self._limits.wait_s:
                break
            late.append(header)
        return late

    def frame(self, slot: int) -> memoryview:
        """A slot's frame, valid until it is freed."""
        _, length, _ = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        start = self._frames_at + slot * self._stride
        return self._memory[start : start + length]

    def let_go(self, slots: Iterable[int]) -> None:
        """What became of these is counted next, all at once."""
        for slot in slots:
            self._memory[slot * _SLOT.size + _LET_GO_AT] = 1

    def free(self, slots: Iterable[int]) -> None:
        """What became of these has been counted."""
        for slot in slots:
            _MARK.pack_into(self._memory, slot * _SLOT.size, 0)
            self._free.append(slot)


_Kinds = dict[bytes, roaming.Kind]
_NEVER = -1
"""Less than any kind."""


def _stride(octets_max: int) -> int:
    return -(-(frame.HEADER_OCTETS + octets_max) // 8) * 8


def octets(waiting: int, octets_max: int) -> int:
    """Memory of so many slots."""
    return waiting * (_SLOT.size + _stride(octets_max))
