"""What became of datagrams: the account of a run of load.py, and what is said of it.

What it owns: `Account`, which has a moment for each datagram by its number: meant to leave, left,
came back. It says nothing of why; it only counts. All moments are of CLOCK_MONOTONIC.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Figures = dict[str, Any]
Array = npt.NDArray[Any]

LATE_MS = 100.0
"""Round trip beyond which media is worth nothing: no jitter buffer waits for so long."""


@dataclass
class Account:
    """What became of the datagrams of one run."""

    sent: int
    crossed: int
    """Different ones that reached the transceiver."""
    returned: int
    """Different ones that came back."""
    duplicated_inbound: int
    duplicated: int
    """Copies beyond the first, at the transceiver and at the client."""
    foreign: int
    """Arrivals, on either side, that are changed, of the wrong length or at the wrong client."""
    reordered: int
    """Arrivals at a client after one with a higher number."""
    intended_at: Array
    sent_at: Array
    back_at: Array
    """By number, nanoseconds of CLOCK_MONOTONIC: meant to leave, left, first came back (or 0)."""

    @property
    def lost(self) -> int:
        """Sent and never back."""
        return self.sent - self.returned

    def trips_us(self, since: Array | None = None) -> Array:
        """Round trips of what came back, from when it was meant to leave (or from `since`)."""
        back = self.back_at > 0
        start = self.intended_at if since is None else since
        return (self.back_at[back] - start[back]) / 1000

    @property
    def late(self) -> int:
        """Came back, but later than LATE_MS after it was sent."""
        return int((self.trips_us(self.sent_at) > LATE_MS * 1000).sum())

    @property
    def lag_ms(self) -> float:
        """How far Load itself was behind the clock at worst."""
        return float((self.sent_at - self.intended_at).max(initial=0)) / 1e6

    def held_ms(self, since: int = 0, until: int = 1 << 62) -> float:
        """The longest round trip of what was sent between two moments: it was held up so long."""
        chosen = (self.back_at > 0) & (self.sent_at >= since) & (self.sent_at < until)
        return float((self.back_at[chosen] - self.sent_at[chosen]).max(initial=0)) / 1e6

    def silence_ms(self) -> float:
        """The longest time in which nothing at all came back."""
        return float(np.diff(np.sort(self.back_at[self.back_at > 0])).max(initial=0)) / 1e6

    def figures(self) -> Figures:
        """What every part says about its datagrams."""
        return {
            "sent": self.sent,
            "lost": self.lost,
            "lost_inbound": self.sent - self.crossed,
            "lost_outbound": self.crossed - self.returned,
            "duplicated": self.duplicated,
            "duplicated_inbound": self.duplicated_inbound,
            "foreign": self.foreign,
            "reordered": self.reordered,
            "late": self.late,
            "held_ms_max": round(self.held_ms(), 1),
            "silence_ms_max": round(self.silence_ms(), 1),
            "load_behind_ms_max": round(self.lag_ms, 1),
        }
