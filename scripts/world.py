"""A model of the world between callers and clusters: places, and how long a packet takes.

For the laboratory (lab.py). Sans-IO: what is known of real networks, and what is assumed of them.

Known: the round trips of one operator's backbone between eight of its regions, as that operator
publishes them (ROUND_TRIP_MS). They are the 95th percentile of a month, not the best case.

Assumed, and printed with every figure that rests on it (`assumptions`):

- The public internet between two regions takes PUBLIC_FACTOR times as long as the backbone, plus
  jitter. Operators of backbones promise more (30 to 60 per cent), and where an operator peers well
  it is less: `lab.py --public-factor 1` is a world in which it makes no difference at all.
- A caller's last mile takes LAST_MILE_MS each way, whichever way the packet goes from there.
- Jitter keeps the order of packets, as queues do, and loss is off unless it is asked for.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

ROUND_TRIP_MS: Mapping[frozenset[str], float] = {
    # Azure network round-trip latency statistics, P95 of the 30 days to 2026-07-30, the mean of
    # both directions. https://learn.microsoft.com/azure/networking/azure-network-latency
    frozenset(pair): rtt
    for *pair, rtt in (
        ("tokyo", "frankfurt", 248.0),  # Japan East, Germany West Central
        ("tokyo", "virginia", 165.0),  # Japan East, East US
        ("frankfurt", "virginia", 97.0),
        ("singapore", "tokyo", 74.0),  # Southeast Asia
        ("singapore", "frankfurt", 179.0),
        ("singapore", "virginia", 229.0),
        ("london", "tokyo", 236.0),  # UK South
        ("london", "frankfurt", 20.0),
        ("london", "virginia", 80.0),
        ("saopaulo", "tokyo", 270.0),  # Brazil South
        ("saopaulo", "frankfurt", 200.0),
        ("saopaulo", "virginia", 120.0),
        ("mumbai", "tokyo", 129.0),  # Central India
        ("mumbai", "frankfurt", 150.5),
        ("mumbai", "virginia", 216.0),
    )
}

COORDINATES: Mapping[str, tuple[float, float]] = {
    "tokyo": (35.68, 139.77),
    "frankfurt": (50.11, 8.68),
    "virginia": (39.04, -77.49),
    "singapore": (1.35, 103.82),
    "london": (51.51, -0.13),
    "saopaulo": (-23.55, -46.63),
    "mumbai": (19.08, 72.88),
}
"""Latitude and longitude, as a proxy in front of signaling would say them."""

SAME_CITY_MS = 0.5
"""Between two houses of one region, each way."""

PUBLIC_FACTOR = 1.3
LAST_MILE_MS = 6.0
"""A fibre or a good cable: 12 ms of a round trip. Mobile networks have 15 to 40."""

JITTER_SHARE = 0.02
"""Of the public part of a path, the mean of what a packet takes longer; exponentially distributed.
The backbone's own is a tenth of it."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is assumed beside the table."""

    public_factor: float = PUBLIC_FACTOR
    last_mile_ms: float = LAST_MILE_MS
    loss: float = 0.0
    """Share of packets that the last mile loses, each way."""
    scale: float = 1.0
    """All delays times this: a small world, for tests."""

    def assumptions(self) -> dict[str, str | float]:
        """What stands beside every figure."""
        return {
            "backbone": "Azure inter-region round trips, P95 of July 2026",
            "public_internet": f"backbone x {self.public_factor:g} between regions",
            "last_mile_ms_each_way": self.last_mile_ms,
            "jitter": f"exponential, mean {JITTER_SHARE:.0%} of the public path's delay;"
            f" backbone {JITTER_SHARE / 10:.1%}; order kept",
            "loss_on_the_last_mile": self.loss,
            "all_delays_times": self.scale,
        }


class Way(NamedTuple):
    """One direction between two hosts."""

    delay_s: float
    jitter_s: float
    """Mean of what comes on top."""
    loss: float


class Spot(NamedTuple):
    """Where something stands: its region, and whether it is a caller."""

    region: str
    caller: bool = False


def way(model: Model, one: Spot, other: Spot) -> Way:
    """How packets travel between two hosts. Raises KeyError for a pair that the table lacks.

    Between two hosts of the operator's it is the backbone, from and to a caller the public
    internet, whatever is at the other end: nobody else's packets are carried by the operator.
    """
    if one.region == other.region:
        between_ms = SAME_CITY_MS
    else:
        between_ms = ROUND_TRIP_MS[frozenset((one.region, other.region))] / 2
    public = one.caller or other.caller
    if not public:
        jitter_ms, loss = between_ms * JITTER_SHARE / 10, 0.0
    else:
        if one.region != other.region:
            between_ms *= model.public_factor
        jitter_ms, loss = between_ms * JITTER_SHARE, model.loss
        between_ms += model.last_mile_ms
    return Way(between_ms * model.scale / 1e3, jitter_ms * model.scale / 1e3, loss)


def taken_s(found: Way, chance: random.Random) -> float | None:
    """How long the next packet takes; None if it is lost."""
    if found.loss and chance.random() < found.loss:
        return None
    return found.delay_s + (chance.expovariate(1 / found.jitter_s) if found.jitter_s else 0.0)
