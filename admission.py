"""Admission: whether this process has room for one more call, by what it measures of itself.

What it owns: the process's load, sampled once a second, and the reasons to refuse a call.

Rules that stay true:
- A refusal is honest: each says which limit was met, and is counted under its own name.
- A process is loaded when it is short of CPU, by its own share of one (one thread does the work) or
  by how late its event loop is (another process has the CPU): either would be heard by everybody.
- What cannot be measured yet is estimated: a call that has only just begun costs nothing so far, so
  a burst of two hundred would find an idle process two hundred times.
- Refusing and accepting do not alternate: a loaded process takes calls again below `RESUMES` of its
  limits.

Sans-IO: `Load.sample` is told the time and the CPU seconds used.
"""

import enum
from dataclasses import dataclass

import metrics
import settings

Count = metrics.Transceiver

SMOOTHING = 0.4
"""Weight of the last second in the smoothed figures: five seconds of full load reach 0.92, one of
them 0.4. A collector's pause or a neighbour's cron job turns nobody away."""

RESUMES = 0.9
"""A loaded process takes calls again below this part of its limits."""

CALL_SHARE, CALL_SHARE_MIN, CALL_SHARE_MAX = 0.008, 0.003, 0.012
"""CPU that a call takes while there are too few to measure it; at least; and at most, since set-ups
count as the live calls' where many are short."""

MEASURES_CALLS = 10
"""Live calls from which on the process's share, over their number, is what one takes. Unless more
than a quarter of them are young: the share does not have those, and each would seem half as dear in
the middle of a burst."""

YOUNG_S = 4.0
"""How long a live call counts as not yet in the smoothed share, which then has 0.87 of it. Longer,
and a steady stream of short calls looks like a burst."""


class Refused(enum.Enum):
    """Why a call is not taken: what the caller is told, and what counts it."""

    DRAINING = "This transceiver is about to stop and takes no new calls.", Count.REFUSED_DRAINING
    SESSIONS = "This transceiver has as many calls as it may have.", Count.REFUSED_SESSIONS
    CONNECTING = "Too many calls are connecting here at this moment.", Count.REFUSED_CONNECTING
    LOAD = "This transceiver is loaded: its calls need the CPU it has.", Count.REFUSED_LOAD

    @property
    def message(self) -> str:
        """A sentence for the caller."""
        return self.value[0]

    @property
    def count(self) -> Count:
        """What counts it."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Calls:
    """What the process has now."""

    total: int
    """Sessions of any state."""
    live: int
    """Of them, those with media."""
    connecting: int
    """Of all, those whose set-up is under way. Not those whose client has not come: it may never,
    and whoever posts offers that nobody follows up could otherwise keep everybody out."""
    young: int
    """Of all, those that the measured share does not have yet: connecting, or live for less than
    YOUNG_S."""


class Load:
    """The load of one process."""

    def __init__(self, limits: settings.TransceiverTable) -> None:
        """Begin idle."""
        self._limits = limits
        self._sampled: tuple[float, float] | None = None
        self._lags: list[float] = []
        self._loaded = False
        self._call_share = CALL_SHARE
        self.share = 0.0
        """Of one CPU, smoothed."""
        self.lag_s = 0.0
        """How late the event loop is, smoothed."""

    @property
    def figure(self) -> float:
        """How near the process is to its limits: 1 is where it refuses calls."""
        return max(self.share / self._limits.load_max, self.lag_s / self._limits.lag_s_max)

    def told(self) -> dict[str, float]:
        """The figure and of what it is made, as the health of the process has it."""
        figures = {"load": self.figure, "cpu": self.share, "lag_s": self.lag_s}
        return {name: round(value, 4) for name, value in figures.items()}

    def lag(self, late_s: float) -> None:
        """Note how late the event loop was, some times a second."""
        self._lags.append(late_s)

    def sample(self, now: float, cpu_s: float, calls: Calls) -> None:
        """Take the measure of the last second: `cpu_s` is what the process has used in all."""
        if self._sampled is not None and now > self._sampled[0]:
            share = (cpu_s - self._sampled[1]) / (now - self._sampled[0])
            lag_s = sum(self._lags) / max(1, len(self._lags))
            self.share += SMOOTHING * (share - self.share)
            self.lag_s += SMOOTHING * (lag_s - self.lag_s)
            if calls.live >= MEASURES_CALLS and 4 * calls.young <= calls.live:
                each = self.share / calls.live
                self._call_share = max(CALL_SHARE_MIN, min(CALL_SHARE_MAX, each))
        self._sampled = now, cpu_s
        self._lags.clear()
        self._loaded = self.figure >= (RESUMES if self._loaded else 1.0)

    def refusal(self, calls: Calls, draining: bool) -> Refused | None:
        """Why one more call is not taken now, or None if it is."""
        if draining:
            return Refused.DRAINING
        if calls.total >= self._limits.sessions_max:
            return Refused.SESSIONS
        if calls.connecting >= self._limits.connecting_max:
            return Refused.CONNECTING
        soon = self.share + (calls.young + 1) * self._call_share
        if self._loaded or soon > self._limits.load_max:
            return Refused.LOAD
        return None
