"""The aftermath: the figures, lines and verdicts of attacks, once they are over.

For flood.py attack. assault.py has made the phases; here stands what became of them, in the order
in which somebody reads it: what was sent, what the live calls felt, what the relay counted and
cost, what it dropped, and whom it answered.

Rules that stay true:
- A phase stands once, in the order of the run, so that each attack has its quiet above and below.
- What was not seen is None or not there, and never zero.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import phases
from findings import Figures, Finding, Marker, Series, Spread
from ring import Call

SPREAD_MAX = 20_000
"""Values of a distribution in a report."""

STEP_NS = 10**9
"""Of what is drawn over time of calls: a second has 50 packets of each."""


class Sample(NamedTuple):
    """What was seen at a moment of the run."""

    at_s: float
    rate: float
    """Datagrams a second of the attackers."""
    cpu_percent: dict[str, float]
    """Of each program, of one core."""


class Account:
    """What became of a run."""

    def __init__(
        self,
        finding: Finding,
        live: Sequence[Call],
        rounds: Sequence[phases.Round],
        samples: Sequence[Sample],
        began_ns: int,
    ) -> None:
        """Judge it: what did not hold is noted in `finding`. There is at least one round."""
        self._finding, self._live, self._rounds = finding, live, rounds
        self._samples, self._began_ns = samples, began_ns
        self.every = [rounds[0].quiet[0]]
        self.every += [phase for each in rounds for phase in (each.attack, each.quiet[1])]
        for phase in self.every:
            phase.felt = phases.felt(live, phase.since_ns, phase.until_ns)
        before = self.every[0]
        finding.must(
            before.newcomer_ms is not None,
            f"a new call did not connect before anything was attacked: {before.newcomer_why}",
        )
        for each in rounds:
            each.judge(finding, len(live))

    def figures(self, programs: Sequence[str]) -> Figures:
        """Tables: a row an attack, or a phase."""
        counted = bool(self.every[0].after)
        return {
            "sent": [each.sent() for each in self._rounds],
            "felt": [phase.row() for phase in self.every],
            "counted": [each.relay(programs) for each in self._rounds],
            "dropped": {e.attack.name: e.drops() for e in self._rounds} if counted else None,
            "answered": [_answers(each) for each in self._rounds if each.attack.back["datagrams"]],
        }

    def draw(self, programs: Sequence[str], chance: random.Random) -> None:
        """Lines, distributions and markers."""
        finding, began = self._finding, self._began_ns
        at = [each.at_s for each in self._samples]
        rate = [each.rate for each in self._samples]
        finding.series.append(Series("Attack", "sent", "datagrams/s", at, rate))
        for name in programs:
            share = [each.cpu_percent[name] for each in self._samples]
            finding.series.append(Series("CPU", name, "% of a core", at, share))
        edges = range(began, self.every[-1].until_ns, STEP_NS)
        seconds = [(each - began) / 1e9 for each in edges]
        lost = [float(sum(c.lost_down(at, at + STEP_NS) for c in self._live)) for at in edges]
        silence = [max(c.silence_ms(at, at + STEP_NS) for c in self._live) for at in edges]
        finding.series.append(Series("Lost by live calls", "down", "packets/s", seconds, lost))
        finding.series.append(Series("Longest silence", "of all calls", "ms", seconds, silence))
        for each in self._rounds:
            phase = each.attack
            finding.markers.append(Marker((phase.since_ns - began) / 1e9, phase.name))
            finding.markers.append(Marker((phase.until_ns - began) / 1e9, f"{phase.name} ends"))
        by_name: dict[str, list[phases.Phase]] = {}
        for phase in self.every:
            by_name.setdefault(phase.name, []).append(phase)
        for name, chosen in by_name.items():
            gaps = [
                gap
                for phase in chosen
                for call in self._live
                for gap in call.gaps_ms(phase.since_ns, phase.until_ns, over_ms=phases.EVERY)
            ]
            some = chance.sample(gaps, min(len(gaps), SPREAD_MAX))
            finding.spreads.append(Spread("Packets later than due", name, "ms", some))


def _answers(each: phases.Round) -> Figures:
    """Row: what attackers were sent, all of them and the one who got most."""
    back = each.attack.back
    return {
        "attack": each.attack.name,
        "datagrams": back["datagrams"],
        "octets": back["octets"],
        "attackers": back["attackers"],
        "most_to_one": back["to_one"],
        "octets_to_one": back["octets_to_one"],
        "octets_of_one": each.attack.sent["octets_of_one"],
        "kinds": ", ".join(f"{n} {kind}" for kind, n in sorted(back["kinds"].items())),
    }
