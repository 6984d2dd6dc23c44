"""Axes of plots: where a value stands on one, and which values are written beside it.

For charts.py. An axis runs from 0 to 1; whoever draws makes pixels or per cent of that.

Rules that stay true:
- An axis of values begins at 0, or below: what looks twice as high is twice as much. It is
  logarithmic where on a linear one the usual values would lie on the ground.
- Labels are few enough for a phone; those for which there is room on a desktop alone are marked so.
- Numbers are made for people: three digits that mean something.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LOG_RATIO = 20
"""Values are drawn on a logarithmic axis if the highest is so many times their median, and all are
positive."""

LABELS_MAX = 10
"""On the axis of time, on a desktop."""

LABELS_MAX_PHONE = 6

DECADES_MAX = 5
"""The axis of percentiles ends at 99.999 %."""

_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
_CLOCK_S = 300
"""From so long on the axis of time has minutes and seconds."""


@dataclass(frozen=True)
class Tick:
    """A value that is marked on an axis."""

    value: float
    label: str
    always: bool = True
    """On a phone, too."""


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; both are positive if it is logarithmic."""

    low: float
    high: float
    ticks: list[Tick]
    unit: str
    log: bool = False

    def place(self, values: Floats) -> Floats:
        """Where on the axis, from 0 to 1; NaN stays so."""
        low, high = (math.log10(each) if self.log else each for each in (self.low, self.high))
        found: Floats = ((np.log10(values) if self.log else values) - low) / (high - low)
        return found

    def at(self, value: float) -> float:
        """The same of one value."""
        return float(self.place(np.array([value]))[0])


def of_values(values: Floats, unit: str) -> Axis:
    """For these, which are finite and at least one."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > LOG_RATIO * float(np.median(values)):
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((top - bottom) / 6))
        decades = (10.0**each for each in range(bottom, top + 1, every))
        return Axis(10.0**bottom, 10.0**top, [Tick(e, short(e)) for e in decades], unit, log=True)
    low, high = min(low, 0.0), max(high, 0.0)
    step = _nice((high - low or 1.0) / 4)
    numbers = range(math.floor(low / step), max(1, math.ceil(high / step)) + 1)
    ticks = [Tick(each * step, short(each * step)) for each in numbers]
    return Axis(ticks[0].value, ticks[-1].value, ticks, unit)


def of_time(low_s: float, high_s: float) -> Axis:
    """Seconds; `high_s` is greater."""
    length = high_s - low_s
    fits = (each for each in _STEPS_S if length / each <= LABELS_MAX)
    step = next(fits, _nice(length / LABELS_MAX))
    numbers = range(math.ceil(low_s / step), math.floor(high_s / step) + 1)
    every = next(each for each in (1, 2, 5) if len(numbers) <= LABELS_MAX_PHONE * each)
    clock = length > _CLOCK_S
    ticks = [
        Tick(at := each * step, minutes(at) if clock else f"{at:g}", each % every == 0)
        for each in numbers
    ]
    return Axis(low_s, high_s, ticks, "minutes and seconds" if clock else "seconds")


def of_percentiles(count: int) -> Axis:
    """For so many values, at least one. A percentile stands at the logarithm of 1 over the share
    above it (`decades`), so that 90 %, 99 %, 99.9 % are as far apart as 0 and 90 %."""
    end = min(max(1.0, math.log10(count)), DECADES_MAX)
    marked = [50.0, *(100 - 10.0 ** (2 - n) for n in range(1, DECADES_MAX + 1))]
    ticks = [Tick(decades(each), f"{each:.7g} %") for each in marked if decades(each) < end + 1e-9]
    return Axis(0.0, end, ticks, "percentile")


def decades(percentile: float) -> float:
    """Where that stands on an axis of percentiles; below 100."""
    return -math.log10(1 - percentile / 100)


def number(value: float) -> str:
    """For people: some three significant digits, and below a million all before the point."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e6:
        return short(value)
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def moment(seconds: float) -> str:
    """When something happened; NaN is when nobody knows."""
    if math.isnan(seconds):
        return "–"
    return f"{seconds:.1f} s" if abs(seconds) < _CLOCK_S else minutes(seconds)


def minutes(seconds: float) -> str:
    """`2:05`, or `1:02:05` with hours."""
    whole, rest = divmod(abs(round(seconds)), 60)
    hours, below = divmod(whole, 60)
    shown = f"{hours}:{below:02}:{rest:02}" if hours else f"{whole}:{rest:02}"
    return f"-{shown}" if seconds <= -0.5 else shown


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((each * power for each in (1, 2, 5) if each * power >= step * 0.999), 10 * power)


def short(value: float) -> str:
    """Where there is little room: four significant digits, some six letters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"
