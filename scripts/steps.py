"""Rates that are not one rate: steps, a ramp, and the search for the highest that is held.

What it owns: what those options look like, and how the search goes on. It sends nothing.

    --steps 10000,20000,40000    one rate after the other, each with rounds of its own
    --ramp 1000:100000           evenly from one to the other, in one go
    --find                       faster by half until a rate is not held, then halving what is left

All rates are datagrams a second of all clients together, each way. A rate that is not held is tried
once more: a machine that stood still for a moment looks like a limit.
"""

import math
from collections.abc import Callable, Iterator

PRECISION = 1.05
"""The search ends once a rate that was held and one that was not are so close: beyond that two
searches differ by more anyway."""

FASTER = 1.5
TRIALS_MAX = 40
"""From one datagram a second to ten million it takes as many."""

SLICE_S = 0.5
"""A point of a ramp: shorter ones have too few datagrams for a p99."""

SLICES_MAX = 120

RATE_MAX = 10_000_000.0


def rates(text: str) -> list[float]:
    """The rates of `--steps`. Raises ValueError."""
    found = [_rate(each, "--steps 10000,20000,40000") for each in text.split(",")]
    if len(found) < 2:
        raise ValueError("--steps needs at least two rates; of one alone there is --rate")
    return found


def ends(text: str) -> tuple[float, float]:
    """The two rates of `--ramp`. Raises ValueError."""
    first, colon, last = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} has no two rates: --ramp 1000:100000 has")
    found = _rate(first, "--ramp 1000:100000"), _rate(last, "--ramp 1000:100000")
    if found[0] == found[1]:
        raise ValueError("a ramp from a rate to the same is none; of one rate there is --rate")
    return found


def _rate(text: str, example: str) -> float:
    try:
        found = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no rate: {example} has some") from error
    if not 1 <= found <= RATE_MAX:
        raise ValueError(f"{found:g} datagrams a second are not between 1 and {RATE_MAX:g}")
    return found


def slices(seconds: float) -> int:
    """Into how many pieces a ramp is cut."""
    return max(2, min(SLICES_MAX, int(seconds / SLICE_S)))


def search(
    first: float, held: Callable[[float], bool], most: float = RATE_MAX
) -> Iterator[tuple[float, bool]]:
    """Every rate that is tried, and whether it was held, until it is known well enough; none is
    higher than `most`.

    The highest that was held is the answer; none may have been.
    """
    good, bad, rate = 0.0, math.inf, min(first, most)
    for _ in range(TRIALS_MAX):
        held_now = held(rate) or held(rate)
        good, bad = (rate, bad) if held_now else (good, rate)
        yield rate, held_now
        if good >= most or bad <= max(good, 1.0) * PRECISION:
            return
        rate = (good + bad) / 2 if bad < math.inf else min(good * FASTER, most)
