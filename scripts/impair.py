"""What a network does to packets, as a seeded model: loss, bursts, reordering, doubles, jitter.

For measurements and tests. Sans-IO and in virtual time: packets with the moments at which they were
sent go in, arrivals come out; the same seed gives the same arrivals.

- Loss is independent, or comes in bursts: the two states of Gilbert and Elliott, with everything
  lost in the bad one.
- Jitter delays each packet by itself, as paths do that share a load, so packets overtake each
  other; or in a queue, as Wi-Fi and mobile networks do, where one that is held up holds up those
  behind it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Arrival(NamedTuple):
    """A packet comes, by its place among those sent."""

    at: float
    number: int


@dataclass(frozen=True)
class Path:
    """One way through a network."""

    name: str
    loss: float = 0.0
    """Share of packets, over all."""
    burst: float = 1.0
    """Mean length of a loss in packets; above 1 they come in bursts."""
    delay_s: float = 0.03
    jitter_s: float = 0.0
    """Each packet takes up to this much longer, evenly distributed."""
    queued: bool = False
    """Whether jitter keeps the order."""
    swapped: float = 0.0
    """Share of packets that take SWAP_S longer, so that one or two overtake them."""
    doubled: float = 0.0
    """Share of packets that come twice, the second time up to DOUBLE_S later."""


SWAP_S = 0.03
DOUBLE_S = 0.06


def travel(path: Path, sent_at: Sequence[float], seed: int) -> list[Arrival]:
    """The arrivals of packets sent at those moments, in the order in which they come."""
    chance = random.Random(seed)
    arrivals = []
    lost = False
    behind = 0.0
    leave = 1 / path.burst
    enter = path.loss / (1 - path.loss) * leave
    for number, at in enumerate(sent_at):
        # Always the same draws for a packet, so that two paths with one seed lose the same ones.
        draws = [chance.random() for _ in range(5)]
        lost = draws[0] < (1 - leave if lost else enter) if path.burst > 1 else draws[0] < path.loss
        if lost:
            continue
        came = at + path.delay_s + draws[1] * path.jitter_s
        if path.queued:
            came = behind = max(behind, came)
        if draws[2] < path.swapped:
            came += SWAP_S
        arrivals.append(Arrival(came, number))
        if draws[3] < path.doubled:
            arrivals.append(Arrival(came + draws[4] * DOUBLE_S, number))
    return sorted(arrivals)
