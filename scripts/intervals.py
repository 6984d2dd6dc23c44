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
figures whose mean over rounds is biased (Asmussen and Glynn, Stochastic Simulation, III.5).
Rounds that follow one another are alike where something drifts: q is that likeness, as of a process
that is autoregressive of order one, corrected for being estimated from few (Marriott and Pope,
Biometrika 41, 1954). It never makes the interval shorter. t is Student's quantile; a is what may
fail, 0.05; K is how many figures are looked at, so that with 95 % of pairs of runs *all* of them
differ by less (Bonferroni). The root of two is there since the other run is as uncertain as this.

A percentile is judged by how many exceed it. Its own values in rounds say little: a tail is made by
a few stalls, most rounds have none that is as long as those which decide, and the next run has one
more or one less of them. So x_r is the share of a round's round trips above the run's percentile,
its d is taken relative to the share of all, and the interval is between the percentiles at which
so many times more and fewer would be above (Woodruff, JASA 47, 1952). It is as lopsided as the
tail is.

What rounds cannot know is what changes between two runs and never within one. A run draws anew in
its rounds what another run would draw anew, where it can (ports, and so the spread over workers);
for the rest, other processes at other places of memory, there is `BETWEEN` and what follows it.
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

BETWEEN, BETWEEN_TAIL, BETWEEN_CPU = 0.03, 0.08, 0.01
"""Standard deviation of a run's level that its rounds do not show, as a share of it: of a median,
of percentiles above it (what waits in queues moves more than what does not), of CPU time. Of 28
runs on one machine, each with new processes, medians lay up to 16 % apart where rounds said 5, the
90th percentile 39 % where they said 20, and CPU time 4 % where they said 2."""

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
    below: float
    """Of two runs on the same system the other one's figure is lower by less. NaN where there were
    too few rounds."""
    above: float
    """And higher by less."""

    @property
    def apart(self) -> float:
        """Where both sides are alike."""
        return max(self.below, self.above)

    def agrees(self, other: "Estimate") -> bool:
        """True if two runs differ by less than the sides of their intervals that face each other
        allow."""
        low, high = sorted((self, other), key=lambda each: each.value)
        return high.value - low.value <= math.sqrt((low.above**2 + high.below**2) / 2)


def estimate(
    whole: float,
    rounds: Sequence[float],
    figures: int = 1,
    floor: float = 0.0,
    between: float = 0.0,
) -> Estimate:
    """The interval of a figure that is `whole` over all rounds, one of so many figures.

    `floor` is a standard deviation of one run that is known otherwise, for example since what was
    counted are few events: the interval is never shorter than it makes it. `between` is what comes
    on top since rounds do not show it, as a share (BETWEEN_CPU).
    """
    values = _known(rounds)
    if len(values) < ROUNDS_MIN or math.isnan(whole):
        return Estimate(whole, math.nan, math.nan)
    deviation, times = _spread(values, whole, figures)
    apart = times * math.hypot(max(deviation, floor), between * whole)
    return Estimate(whole, apart, apart)


def quantile(
    rounds: Sequence[Array], percent: float, figures: int = 1, between: float = 0.0
) -> Estimate:
    """The interval of a percentile, in microseconds, of what rounds have as histograms (`counts`):
    one of so many figures."""
    found = np.array([each for each in rounds if each.sum()])
    whole: Array = found.sum(0) if len(found) else np.zeros(BINS)
    value, share = percentile(whole, percent), 1 - percent / 100
    if len(found) < ROUNDS_MIN:
        return Estimate(value, math.nan, math.nan)
    at = np.searchsorted(np.cumsum(whole), whole.sum() * percent / 100 - 1e-9)
    # The bin of the percentile itself is above it by that part of it which makes the whole right.
    above = (whole.sum() * share - whole[at + 1 :].sum()) / whole[at]
    shares = (found[:, at + 1 :].sum(1) + above * found[:, at]) / found.sum(1)
    deviation, times = _spread(shares, share, figures)
    factor, more = math.exp(times * deviation / share), times * between * value
    low = percentile(whole, 100 * max(1 - share * factor, 0.0))
    high = percentile(whole, 100 * (1 - share / factor))
    return Estimate(value, math.hypot(value - low, more), math.hypot(high - value, more))


def _known(rounds: Sequence[float]) -> Array:
    return np.asarray([each for each in rounds if not math.isnan(each)])


def _spread(values: Array, whole: float, figures: int) -> tuple[float, float]:
    """The standard deviation of a run, and how many of them two runs may be apart."""
    size, off = len(values), values - whole
    likeness = _correlation(values)
    worth = max(size * (1 - likeness) / (1 + likeness), WORTH_MIN)
    variance = float((off**2).mean()) * worth / (worth - 1)
    freedom = math.floor(worth * 10 - 10) / 10  # the interval is wider by that, and t is kept
    times = student(1 - (1 - CONFIDENCE) / 2 / figures, freedom) * math.sqrt(2)
    return math.sqrt(variance / worth), times


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
