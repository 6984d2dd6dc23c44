"""Statistics of a load test: distributions that merge, and how far two runs may lie apart.

What it owns: histograms of round trips, which processes and rounds add up without loss, and the
interval that stands beside each figure.

A run is made of R rounds. A figure x is taken over all of them together, and for each round alone,
x_1 to x_R. Rounds differ by chance, so does the run as a whole, and so will the next one:

    s^2 = sum((x_r - x)^2) / R * e / (e - 1)            how far rounds lie from the whole
    e   = R (1 - q) / (1 + q)                           how many independent rounds they are worth
    q   = (R q1 + 1) / (R - 4), from 0 to 0.6           q1: correlation of each with the next one
    d   = t(e - 1; 1 - a / 2K) * s * sqrt(2 / e)        two runs differ by less

Taking deviations from the whole and not from the rounds' mean is called sectioning; it is for
quantiles, whose mean over rounds is biased (Asmussen and Glynn, Stochastic Simulation, III.5).
Rounds that follow one another are alike where something drifts: q is that likeness, as of a process
that is autoregressive of order one, corrected for being estimated from few (Marriott and Pope,
Biometrika 41, 1954). It never makes the interval shorter. t is Student's quantile; a is what may
fail, 0.05; K is how many figures are looked at, so that with 95 % of pairs of runs *all* of them
differ by less (Bonferroni). The root of two is there since the other run is as uncertain as this.

What it cannot know: what changes between two runs and never within one. A run therefore draws anew
in its rounds whatever a new run would draw anew (ports, and so the spread over workers).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CONFIDENCE = 0.95
"""Of all figures of a pair of runs at once."""

BINS_AN_OCTAVE = 256
"""Histograms resolve 0.27 % of a value: finer than two runs agree, and 80 kB for any time."""

RESOLUTION = 2 ** (1 / BINS_AN_OCTAVE) - 1
"""The width of a bin, as a share of the value."""

OCTAVES = 40
"""From a nanosecond to 18 minutes."""

BINS = BINS_AN_OCTAVE * OCTAVES
CORRELATION_MAX = 0.6
"""More cannot be told from few rounds: twenty are worth five then, and intervals are wide."""

WORTH_MIN = 3.0
"""However alike rounds are, they are taken for so many: below that Student's t knows no bounds."""

ROUNDS_MIN = 6
"""With fewer rounds nothing can be said about how alike they are."""


def counts(us: Array) -> Array:
    """How many values, in microseconds, are in each bin. They add up: of processes, of rounds."""
    ns = np.maximum(us, 0.001) * 1000.0
    at = (np.log2(ns) * BINS_AN_OCTAVE).astype(np.int64).clip(0, BINS - 1)
    return np.bincount(at, minlength=BINS)


def percentile(found: Array, percent: float) -> float:
    """The value, in microseconds, that so many per cent do not exceed; NaN of nothing.

    The middle of its bin: right to 0.14 %.
    """
    total = int(found.sum())
    if not total:
        return math.nan
    rank = max(1, math.ceil(total * percent / 100 - 1e-9))
    return float(_middle(np.searchsorted(np.cumsum(found), rank)))


def sample(found: Array, size: int) -> list[float]:
    """At most `size` values that are spread as all of them are, in microseconds, ascending."""
    total = int(found.sum())
    ranks = np.unique(np.linspace(1, max(total, 1), min(size, total)).astype(np.int64))
    return [float(_middle(at)) for at in np.searchsorted(np.cumsum(found), ranks)]


def _middle(at: Any) -> Any:
    return 2.0 ** ((at + 0.5) / BINS_AN_OCTAVE) / 1000.0


@dataclass(frozen=True)
class Estimate:
    """A figure, and how far another run's may be from it."""

    value: float
    apart: float
    """Two runs on the same system differ by less. NaN where there were too few rounds."""
    worth: float
    """How many independent rounds there were."""

    def agrees(self, other: "Estimate") -> bool:
        """True if two runs differ by less than their intervals allow."""
        allowed = math.sqrt((self.apart**2 + other.apart**2) / 2)
        return abs(self.value - other.value) <= allowed


def estimate(
    whole: float, rounds: Sequence[float], figures: int = 1, floor: float = 0.0
) -> Estimate:
    """The interval of a figure that is `whole` over all rounds, one of so many figures.

    `floor` is a standard deviation of one run that is known otherwise, for example since what was
    counted are few events: the interval is never shorter than it makes it.
    """
    values = np.asarray([each for each in rounds if not math.isnan(each)])
    size = len(values)
    if size < ROUNDS_MIN or math.isnan(whole):
        return Estimate(whole, math.nan, size)
    off = values - whole
    likeness = _correlation(values)
    worth = max(size * (1 - likeness) / (1 + likeness), WORTH_MIN)
    variance = float((off**2).mean()) * worth / (worth - 1)
    deviation = max(math.sqrt(variance / worth), floor)
    freedom = math.floor(worth * 10 - 10) / 10  # the interval is wider by that, and t is kept
    apart = student(1 - (1 - CONFIDENCE) / 2 / figures, freedom) * deviation * math.sqrt(2)
    return Estimate(whole, apart, worth)


def _correlation(values: Array) -> float:
    """Of each round with the next one, corrected for being estimated from few."""
    off = values - values.mean()
    power = float((off**2).sum())
    if not power:
        return 0.0
    raw, size = float((off[1:] * off[:-1]).sum()) / power, len(values)
    return min(max((size * raw + 1) / (size - 4), 0.0), CORRELATION_MAX)


def counted(events: int, of: int) -> float:
    """Standard deviation of a share of rare events: of a Poisson count, one more than was seen,
    since none seen is not none to come."""
    return math.sqrt(events + 1) / max(of, 1)


# --- Student's t ----------------------------------------------------------------------------------


@functools.cache
def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t above one half, of any number of degrees of freedom above 0."""
    low, high = 0.0, 1.0
    while _student_below(high, freedom) < probability:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if _student_below(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def _student_below(value: float, freedom: float) -> float:
    """The share below a value of at least 0. https://dlmf.nist.gov/8.17"""
    return 1 - _beta_share(freedom / (freedom + value**2), freedom / 2, 0.5) / 2


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # there its mirror image converges
        return 1 - _beta_share(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    # The continued fraction of DLMF 8.17.22, from its far end: a hundred terms are plenty.
    fraction = 1.0
    for m in range(100, 0, -1):
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    return front / fraction
