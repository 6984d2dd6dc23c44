"""Expiry: which flows are looked at next, so that all of them are looked at once a period.

What it owns: the clock's hand that goes round the slots of a table and stops at those of one state.
Whoever moves it asks of each flow that it passes whether its client was heard of since the last
time, so a flow lives between one and two periods beyond its last packet, and no step looks at more
than `FLOWS_A_SWEEP` of them: a sweep of 100,000 flows in one go took 38 ms.

Sans-IO: `now` is an argument, in seconds. It knows nothing of a slot but its state.
"""

import itertools

FLOWS_A_SWEEP = 256
"""Flows that a hand looks at in one call of `sweep`, 0.5 us each and 3 us if all of them end. A
worker with traffic wakes at least 50 times a second, which makes 12,800 flows a second; more would
be felt as a pause. One that cannot keep up, since it sleeps, goes round slower: never faster."""

SLOTS_A_SWEEP = 16_384
"""The same for slots, most of which hold nothing of the hand's state: 5 ns each."""

LATE_S_MAX = 2.0
"""How far a hand that was held up catches up, at most a quarter of its period: it is how much less
than a period a flow may be given. A worker that was stopped for a minute heard nobody meanwhile."""


class Hand:
    """A clock's hand: goes round the slots once a period and looks at those of one state."""

    __slots__ = ("_at", "_late_s", "_only", "_since", "_slot_s", "_slots")

    def __init__(self, state: int, slots: int, period_s: float, now: float) -> None:
        """For a table of so many slots, at the first of them now."""
        self._only, self._slots, self._slot_s = only(state), slots, period_s / slots
        self._late_s = min(LATE_S_MAX, period_s / 4)
        self._at, self._since = 0, now

    def passes(self, states: memoryview, now: float) -> list[int]:
        """The slots of its state that the hand passes until `now`, ascending.

        `states` has an octet a slot.
        """
        self._since = max(self._since, now - self._slot_s - self._late_s)
        first, due = self._at, int((now - self._since) / self._slot_s)
        if due < 1:
            return []
        end = min(first + min(due, SLOTS_A_SWEEP), self._slots)
        here = bytes(states[first:end]).translate(self._only)
        found = itertools.compress(range(first, end), here)
        numbers = list(itertools.islice(found, FLOWS_A_SWEEP))
        if len(numbers) == FLOWS_A_SWEEP:
            end = numbers[-1] + 1
        self._at, self._since = end % self._slots, self._since + (end - first) * self._slot_s
        return numbers


def only(state: int) -> bytes:
    """For bytes.translate: 1 where an octet is that state, else 0."""
    return bytes(octet == state for octet in range(256))
