"""The pacer: one timer for the play-out of all sessions.

What it owns: when each session's next frame of audio is due, and how late it was.

Rules that stay true:
- There is one timer, at the earliest time that is due, however many sessions there are: a timer for
  each would cost the loop's own 10 us a frame again.
- A session is known by its `wakes_at`; what the heap says otherwise is out of date and passed over.
- How late a frame is stands in a histogram and, beyond LATE_S, in a counter: it is what shows first
  that a process has more calls than it can serve.

It does not know what is sent (`session.py` and `audio.py` do).
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable

import ledger
import metrics
from session import Session

LATE_S = 0.005
"""A packet that leaves later than this after its time is counted: clients' buffers start at 20 to
40 ms, so it is a sign long before anybody hears it."""

Count = metrics.Transceiver
Timing = metrics.Timing


class Pacer:
    """One timer for the play-out of all sessions: each is called when its next frame is due."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        play: Callable[[Session, float], None],
        counters: ledger.Counters,
        timings: ledger.Histograms,
    ) -> None:
        """Call `play` in `loop`, by `clock`, which is monotonic seconds."""
        self._loop, self._clock, self._play = loop, clock, play
        self._values, self._observe = counters.values, timings.observe
        self._heap: list[tuple[float, int, Session]] = []
        self._due: dict[Session, float] = {}  # what the heap's entries must agree with
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def schedule(self, session: Session) -> None:
        """Take over the session's `wakes_at`, whether it is new, changed or gone."""
        at = session.wakes_at
        if at is None:
            self._due.pop(session, None)
        elif self._due.get(session) != at:
            self._due[session] = at
            heapq.heappush(self._heap, (at, next(self._order), session))
            if self._timer is None or at < self._timer_at:
                self._arm()

    def stop(self) -> None:
        """Call nobody any more."""
        self._heap.clear()
        self._due.clear()
        self._arm()

    def _run(self) -> None:
        self._timer = None
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            at, _, session = heapq.heappop(self._heap)
            if self._due.get(session) == at:
                del self._due[session]
                self._observe(Timing.PACER, now - at)
                if now - at > LATE_S:
                    self._values[Count.PACED_LATE] += 1
                self._play(session, now)  # which schedules the next frame
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._timer_at = self._heap[0][0]
            delay_s = max(0.0, self._timer_at - self._clock())
            self._timer = self._loop.call_later(delay_s, self._run)
