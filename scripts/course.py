"""The course of a measurement: rounds of load, one after the other, until there are enough.

What it owns: `Course`, which gives orders to the processes that make load (loaders.py), looks at
the relay meanwhile, and decides which rounds count.

A round is a measurement of its own: it begins and ends with nothing on its way. Before rounds (as
often as the relay's table of flows allows) all clients are opened anew from new ports, as another
run would: the kernel spreads clients over workers by their ports, so chance decides anew, and the
intervals (intervals.py) contain it.

A round in which the machine did something else is not one of this system: a hypervisor that takes
the relay's CPU for a tenth of a second makes a tail of a hundred milliseconds out of nothing. Such
rounds are set aside, are said with what they came to, and are made again, a few of them.
"""

import math
import time
from collections.abc import Callable, Sequence

import instrument
import intervals
from findings import Finding, Marker
from load import Figures
from loaders import Crew, Order
from observed import Observed
from rounds import DISTURBED, Busy, Round, told

SHARE_OF_FLOWS = 0.5
"""Of the relay's table of flows, for clients of rounds that are over and not yet forgotten. More
makes workers' shares of the table full by chance; less keeps ports for several rounds."""

ASIDE_SHARE = 0.25
"""Disturbed rounds that are made again, of all: where there are more, that is what the machine is
like."""

TRIALS_AGAIN = 5
"""The same of the rounds of a search, in all."""


class Course:
    """A measurement from its first round to its last."""

    def __init__(self, crew: Crew, seen: Observed, flows_max: int) -> None:
        """With clients that are open already."""
        self._crew, self._seen = crew, seen
        self._opens_left = int(flows_max * SHARE_OF_FLOWS / crew.plan.clients) - 1
        self.opened = 1
        """How often clients were opened: the first time before this was made."""
        self._began = time.monotonic()
        self._last = seen.now()
        self._trials_again = TRIALS_AGAIN
        self.aside: list[Round] = []
        """Rounds that count for nothing, since the machine was disturbed, and were made again."""
        used = set(crew.plan.cpus) | seen.cpus()
        self._cpus = used if seen.cpus() or not seen.here else None
        self.busy: list[Busy] = []

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def held(self, order: Order, rounds: int, told: Callable[[float, str], None]) -> list[Round]:
        """So many rounds of an order. `told` is called with the seconds of load that are done."""
        every = max(1, math.ceil(rounds / max(self._opens_left, 1))) if rounds > 1 else 0
        found: list[Round] = []
        again, fresh = int(rounds * ASIDE_SHARE), True
        while len(found) < rounds:
            number = len(found)
            if every and number % every == 0 and not fresh and self._opens_left > 0:
                self._crew.open()
                self._opens_left -= 1
                self.opened += 1
                fresh = True
            words = self._words(found)
            done = number * order.seconds
            one = self.round(order, lambda s, done=done, words=words: told(done + s, words))  # type: ignore[misc]
            if one.disturbed() and again:
                self.aside.append(one)
                again -= 1
            else:
                found.append(one)
                fresh = False
        return found

    def trial(self, order: Order) -> Round:
        """One round, and again while it was disturbed, a few times of all trials."""
        while (one := self.round(order)).disturbed() and self._trials_again:
            self._trials_again -= 1
            self.aside.append(one)
        return one

    def round(self, order: Order, told: Callable[[float], None] | None = None) -> Round:
        """One order. `told` is called with the seconds of it that are done."""
        before = self._last = self._seen.now()
        at = self.seconds()
        others = instrument.Others(self.ours_s, self._cpus)

        def look(seconds: float) -> None:
            self._sample(seconds)
            if told:
                told(min(seconds, order.seconds))

        part = self._crew.round(order, look)
        return Round(
            at, order, part, before, self._seen.now(), others.figures(), self.seconds() - at
        )

    def ours_s(self) -> float:
        """CPU time of the tool and of the relay."""
        return self._crew.cpu_s() + sum(self._seen.now().cpu_s.values())

    def busiest(self, since: float, until: float) -> dict[int, float]:
        """The most that each process of the relay used of a CPU between two moments, in seconds
        since the measurement began."""
        found: dict[int, float] = {}
        for at, percents in self.busy:
            if since <= at <= until:
                for pid, percent in percents.items():
                    found[pid] = max(percent, found.get(pid, 0.0))
        return found

    def _sample(self, seconds: float) -> None:
        now = self._seen.now()
        passed = now.at - self._last.at
        if seconds and passed > 0.1:
            spent = now.cpu_since(self._last)
            percents = {pid: used / passed * 100 for pid, used in spent.items()}
            self.busy.append((now.at - self._began, percents))
            self._last = now

    @staticmethod
    def _words(found: Sequence[Round]) -> str:
        if not found:
            return "first round"
        last = found[-1]
        p99 = intervals.percentile(last.trips(), 99)
        return f"p99 {p99:.0f} us, loss {last.part.loss() * 100:.3g} %"

    # --- what is said of it ---

    def say(self, finding: Finding, done: Sequence[Round]) -> None:
        """Which rounds do not count, and which of those that do were disturbed, too."""
        why = (
            f"other programs had more than {DISTURBED['others_percent']:g} % of a CPU that is used "
            f"here, or the hypervisor more than {DISTURBED['stolen_percent']:g} %"
        )
        if self.aside:
            finding.figures["set_aside"] = aside_table(self.aside)
            finding.notes.append(
                f"{len(self.aside)} rounds were set aside and made again, since {why} meanwhile: "
                "what they came to is under set_aside, and in no other figure"
            )
        if disturbed := sum(each.disturbed() for each in done):
            finding.notes.append(
                f"in {disturbed} of the rounds that count {why}: that is what this machine is like"
            )
        finding.markers += [
            Marker(round(each.at_s, 2), "set aside: the machine was disturbed")
            for each in self.aside
        ]


def aside_table(rounds: Sequence[Round]) -> list[Figures]:
    """What was set aside: a row a round."""
    return [
        {
            "at_s": round(each.at_s, 1),
            **each.machine,
            "rate_per_s": round(each.order.rate),
            "loss_percent": told(each.part.loss() * 100, 4),
            "p99_us": told(intervals.percentile(each.trips(), 99)),
            "p99.9_us": told(intervals.percentile(each.trips(), 99.9)),
        }
        for each in rounds
    ]
