"""`flood.py packets`: thousands of clients' datagrams through a relay, as media has them.

What it owns: the command, what is refused before anything is sent, and the finding. How load is
made stands in load.py (one process) and loaders.py (several), how often in course.py, what is said
of it in rounds.py, how far runs may differ in intervals.py, what the tool costs in instrument.py.

    clients, each with an address of its own         the tool is the transceiver, too
    hint, first check, then 50 datagrams a second    and sends every frame back

          +--------------------- relay ---------------------+
     tool |  public socket  ->  worker  ->  internal socket |  tool
          +-------------------------------------------------+

A relay is one that runs (`--relay`, with the configuration file that it was started with: keys,
clusters, where its counters are), or one of this tree that is started for the purpose (`--own`).

Rules that stay true:
- Datagrams leave when they are due, by the clock, whatever the relay does.
- Every datagram has a number and is found again, or is lost, on a way that is known.
- What cannot work is refused before the first datagram, by a sentence that names it.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import firsts
import instrument
import intervals
import numpy as np
import observed
import options
import placing
import progress
import rig
import rounds
import steps
import typer
from course import Course
from findings import Figures, Finding, Marker, Spread
from load import LATE_MS
from loaders import Crew, Order
from placing import Place, Wanted
from rounds import LOSS_MAX, Round

import host

CLIENTS_MAX = 1_000_000
PROCESSES_MAX = 64
ROUNDS = 20
"""Enough to see how rounds differ (intervals.py), few enough that each has data for a p99.9."""

WARM_S = 1.0
"""A round before those that count: caches, clocks and the interpreter are cold."""

ALONE_S = 2.0
"""At most, for the tool's own round trips: a p99.9 of it is a note beside the relay's."""

SAMPLE = 10_000
"""Round trips in a report, spread as all of them are."""

TRIAL_S = 2.0
"""Of one rate in a search."""

QUEUE_S = 0.05
"""What may be on its way in a search, in seconds of its rate: beyond it a queue is growing, which
buffers hide from the loss for a while."""

BEFORE_S = 2.0
"""Before a ramp loses anything, whatever limits it is at its limit for about so long."""

SHORTER = 0.97, 0.94, 0.88, 0.76, 0.52
"""By what a rate is lowered, again and again, that was held once and not for all rounds."""


def packets(
    relay: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A relay that runs, where clients send.")
    ] = None,
    own: Annotated[
        int, typer.Option(min=0, max=64, metavar="WORKERS", help="Start a relay of this tree.")
    ] = 0,
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="What that relay was started with.")
    ] = firsts.CONFIG,
    transceiver: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where this tool listens as the transceiver.")
    ] = "127.0.0.1:9000",
    remote_echo: Annotated[
        bool, typer.Option(help="At --transceiver there is a `flood.py echo` instead.")
    ] = False,
    clients: Annotated[int, typer.Option(min=1, max=CLIENTS_MAX)] = 1_000,
    rate: Annotated[
        float, typer.Option(min=0.1, max=100_000, help="Datagrams a second of a client, each way.")
    ] = 50.0,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=3600, help="Of each rate, or of the ramp.")
    ] = 30.0,
    count: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, help="Into which the time is cut.")
    ] = ROUNDS,
    processes: Annotated[
        int, typer.Option(min=1, max=PROCESSES_MAX, help="That make load, on a CPU each.")
    ] = 1,
    sources: Annotated[
        str | None,
        typer.Option(metavar="PREFIX", help="Clients' addresses (default: from 127.1.0.1 on)."),
    ] = None,
    in_steps: Annotated[
        str | None, typer.Option("--steps", metavar="A,B,C", help="Datagrams a second in all.")
    ] = None,
    ramp: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="The same, changing evenly.")
    ] = None,
    find: Annotated[
        bool, typer.Option("--find", help="The highest rate with loss under 0.1 %.")
    ] = False,
    at_most: Annotated[
        float | None, typer.Option(min=1, metavar="RATE", help="--find tries nothing higher.")
    ] = None,
    pid: Annotated[int | None, typer.Option(help="The relay's process, if not found.")] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="URL", help="The relay's /metrics, if it is elsewhere.")
    ] = None,
    spin: Annotated[
        bool | None, typer.Option(help="Never sleep (default: where CPUs are enough).")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.5, max=120, help="Seconds for a first answer.")
    ] = 5.0,
    as_json: options.AsJson = False,
    report: options.Report = None,
    owned: options.Owned = False,
) -> None:
    """Thousands of clients' datagrams through a relay: loss, round trips, CPU, the highest rate.

    `flood.py packets --own 1` shows all of it by itself, on loopback.
    """
    try:
        wanted = Wanted(
            relay=relay,
            own=own,
            config=config,
            transceiver=transceiver,
            elsewhere=remote_echo,
            clients=clients,
            rate=rate,
            seconds=seconds,
            rounds=count,
            processes=processes,
            sources=sources,
            steps=steps.rates(in_steps) if in_steps else [],
            ramp=steps.ends(ramp) if ramp else None,
            find=find,
            most=at_most,
            pid=pid,
            metrics=metrics,
            spin=spin,
            patience_s=patience,
            owned=owned,
        )
        placing.check(wanted)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    options.deliver(lambda: measure(wanted), as_json, report)


# --- the measurement ------------------------------------------------------------------------------


def measure(wanted: Wanted) -> Finding:
    """All of it. Raises what options.deliver takes, and typer.BadParameter for what is refused."""
    finding = Finding(_title(wanted))
    cpus = host.cpus()
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(placing.placed(wanted, finding, cpus))
            page = placing.metrics(wanted)
            seen = observed.Observed(place.table, place.at, wanted.pid, page)
            plan = placing.plan(wanted, place, seen, cpus)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        crew = stack.enter_context(Crew(plan))
        _step_aside(seen, cpus)
        finding.notes += seen.notes
        shared = sorted(set(plan.cpus) & seen.cpus())
        if shared:
            finding.notes.append(f"the tool shares CPU {shared} with the relay: both are slower")
        run = _Run(wanted, place, crew, seen, finding)
        run.measure()
    return finding


def _title(wanted: Wanted) -> str:
    where = wanted.relay or f"a relay of {wanted.own} worker(s) on loopback"
    return f"{wanted.clients} clients' datagrams through {where}"


def _step_aside(seen: observed.Observed, cpus: list[int]) -> None:
    """The parent only waits, counts and draws a bar: never on a CPU of the relay, if there is
    another one, and never instead of the load."""
    os.sched_setaffinity(0, set(cpus) - seen.cpus() or set(cpus))
    os.nice(19)


@dataclass
class _Run:
    """One command's measurement."""

    wanted: Wanted
    place: Place
    crew: Crew
    seen: observed.Observed
    finding: Finding
    granted: int = 0
    """Octets of the smallest receive buffer of the tool's sockets."""
    own: Figures = field(default_factory=dict)
    """What the tool costs itself: `alone` and `clock` of loaders.py."""

    @property
    def alone(self) -> Figures:
        """What the tool makes with an echo in place of the relay."""
        found: Figures = self.own["alone"]
        return found

    def measure(self) -> None:
        """Open the clients, measure the tool alone, then what was asked for."""
        wanted, finding = self.wanted, self.finding
        rate = wanted.clients * wanted.rate
        self._open()
        drift = instrument.Drift()
        with progress.bar("the tool alone", 1.0):
            self.own = self.crew.alone(max(wanted.steps or wanted.ramp or [rate]), self._alone_s())
        course = Course(self.crew, self.seen, self.place.table.flows_max)
        others = instrument.Others(course.ours_s)
        if wanted.ramp:
            done = self._ramp(course, *wanted.ramp)
        elif wanted.steps:
            done = self._steps(course, wanted.steps)
        elif wanted.find:
            done = self._find(course, rate)
        else:
            done = self._constant(course, rate)
        self._about_tool(drift, others.figures())
        names = dict(zip(self.seen.workers(), self._names(), strict=False))
        finding.series = rounds.series(done, course.busy, names)
        for name, of in (
            ("from when it was due", Round.trips),
            ("from when it left", Round.trips_sent),
        ):
            values = intervals.sample(np.sum([of(each) for each in done], 0), SAMPLE)
            finding.spreads.append(Spread("Round trips", name, "us", values))
        self._law(done + course.aside)
        course.say(finding, done)
        finding.notes.append(
            f"round trips are of what came back; back after more than {LATE_MS:g} ms is late, and "
            "counts as lost; from_due begins when a datagram was to leave, whatever held it up"
        )
        if not wanted.ramp:  # its figures have no interval
            finding.notes.append(
                "minus, plus, plus_minus: of two runs on the same system, 95 of 100 pairs differ "
                "by less in all these figures at once (Student's t over rounds, intervals.py; "
                f"clients were opened {course.opened} times)"
            )

    def _names(self) -> list[str]:
        kind = "worker" if self.seen.tells_workers_apart() else "process"
        return [f"{kind} {number}" for number in range(len(self.seen.workers()))]

    def _open(self) -> None:
        """The first clients. Raises TimeoutError with what may be wrong."""
        before = self.seen.now()
        try:
            self.granted = self.crew.open()
        except TimeoutError as error:
            raise TimeoutError(self._why_silent(str(error), before)) from error

    def _alone_s(self) -> float:
        return min(ALONE_S, self.wanted.seconds / 4)

    def _why_silent(self, error: str, before: observed.Snapshot) -> str:
        plan = self.crew.plan
        relay, at = (f"{host}:{port}" for host, port in (plan.relay, plan.transceiver))
        tried = f"{error} within {plan.patience_s:g} s from {relay} with {at} as the transceiver"
        if self.seen.here and not rig.listens(plan.relay[1]):
            return f"{tried}: no program on this machine has UDP port {plan.relay[1]} open"
        after = self.seen.now()
        drops = {why: n - before.drops[why] for why, n in after.drops.items()}
        if told := ", ".join(f"{n} {why}" for why, n in drops.items() if n):
            return (
                f"{tried}: the relay dropped {told} (its RUNBOOK or /metrics say what that means)"
            )
        return (
            f"{tried}: does the relay run there, with the keys and the [[cluster]] of "
            f"{self.wanted.config}? Do frames from its `internal` address get to {at}?"
        )

    # --- ways ---

    def _constant(self, course: Course, rate: float) -> list[Round]:
        done = self._rounds(course, rate, f"{rate:g} a second")
        self.finding.figures |= self._figures(done)
        loss = rounds.together(done).loss()
        self.finding.must(
            loss < LOSS_MAX,
            f"{loss * 100:.3g} % were lost or late; {self._limit(done)} limited it",
        )
        return done

    def _rounds(self, course: Course, rate: float, what: str) -> list[Round]:
        """Rounds at one rate, a shorter one before them that is not counted."""
        wanted = self.wanted
        each = wanted.seconds / wanted.rounds
        course.round(Order(rate, min(each, WARM_S)))
        with progress.bar(what, wanted.seconds) as told:
            return course.held(Order(rate, each), wanted.rounds, told)

    def _figures(self, done: list[Round]) -> Figures:
        """All that is said of rounds at one rate."""
        found = rounds.estimates(done)
        order = done[0].order
        figures: Figures = {
            "rate_per_s": round(order.rate, 1),
            "clients": self.wanted.clients,
            "processes": self.wanted.processes,
            "rounds": len(done),
            "round_s": order.seconds,
            "loss_percent": rounds.pair(found["loss"], 100, 5),
            "datagrams": rounds.datagrams(done, self.crew.plan.echoes),
            "round_trip_us": rounds.trips_table(found, self.alone["round_trip_us"]),
        }
        if "cpu_us" in found:
            figures["relay_cpu_us_a_datagram"] = rounds.pair(found["cpu_us"], 1, 3)
            busy = [sum(each.busy().values()) for each in done]
            figures["relay_cpu_percent"] = round(sum(busy) / len(busy), 1)
        if table := rounds.workers_table(done, self.seen):
            figures["workers"] = table
        figures["dropped"] = rounds.dropped(done)
        return figures

    def _limit(self, done: list[Round]) -> str:
        worst = max(done, key=lambda each: each.part.loss())
        return self._limit_of(worst)

    def _limit_of(self, one: Round, busy: dict[int, float] | None = None) -> str:
        echoes = self.crew.plan.echoes
        return rounds.limit(one, self.alone, self.wanted.processes, echoes, busy)

    def _row(self, done: list[Round]) -> Figures:
        """The figures of one rate in a line of a table."""
        found = rounds.estimates(done)
        row: Figures = {"rate_per_s": round(done[0].order.rate)}
        row["loss_percent"] = rounds.told(found["loss"].value * 100, 4)
        for percent in rounds.PERCENTS:
            each = found[f"due_p{percent:g}"]
            row[f"p{percent:g}_us"] = rounds.told(each.value)
            row[f"p{percent:g}_minus"] = rounds.told(each.below)
            row[f"p{percent:g}_plus"] = rounds.told(each.above)
        if "cpu_us" in found:
            busiest = max(max(each.busy().values(), default=0.0) for each in done)
            row["cpu_us_a_datagram"] = rounds.told(found["cpu_us"].value, 3)
            row["busiest_cpu_percent"] = round(busiest, 1)
        row["held"] = rounds.together(done).loss() < LOSS_MAX
        if not row["held"]:
            row["limited_by"] = self._limit(done)
        return row

    def _steps(self, course: Course, rates: list[float]) -> list[Round]:
        everything, table = list[Round](), list[Figures]()
        for rate in rates:
            self.finding.markers.append(Marker(round(course.seconds(), 2), f"{rate:g} a second"))
            done = self._rounds(course, rate, f"{rate:g} a second")
            everything += done
            table.append(self._row(done))
        self.finding.figures |= {
            "clients": self.wanted.clients,
            "processes": self.wanted.processes,
            "steps": table,
            "datagrams": rounds.datagrams(everything, self.crew.plan.echoes),
        }
        return everything

    def _ramp(self, course: Course, first: float, last: float) -> list[Round]:
        seconds = self.wanted.seconds
        count = steps.slices(seconds)
        order = Order(first, seconds, last, count)
        course.round(Order(first, min(WARM_S, seconds)))
        with progress.bar(f"{first:g} to {last:g} a second", seconds) as told:
            done = course.round(
                order, lambda s: told(s, f"{first + (last - first) * s / seconds:.0f}")
            )
        table, over = rounds.ramp_table(done)
        figures: Figures = {"clients": self.wanted.clients, "processes": self.wanted.processes}
        figures["loss_over_0.1_percent_from_per_s"] = over
        if over is not None:
            at = done.at_s + seconds * (over - first) / (last - first)
            busy = course.busiest(at - BEFORE_S, at)
            figures["limited_by"] = self._limit_of(done, busy)
        figures |= {
            "datagrams": rounds.datagrams([done], self.crew.plan.echoes),
            "ramp": table,
            "workers": rounds.workers_table([done], self.seen),
            "dropped": rounds.dropped([done]),
        }
        self.finding.figures |= figures
        return [done]

    def _find(self, course: Course, first: float) -> list[Round]:
        """Search, then hold what was found for all rounds, a little less if it does not last."""
        tried: list[Round] = []

        def held(rate: float) -> bool:
            seconds = min(TRIAL_S, self.wanted.seconds)
            one = course.trial(Order(rate, seconds, queue_s=QUEUE_S))
            tried[:] = [one]
            kept = not one.part.stopped and one.part.lag_ms < LATE_MS
            return kept and one.part.loss() < LOSS_MAX

        table, best = list[Figures](), 0.0
        why: Round | None = None
        most, bound = placing.most(self.wanted, TRIAL_S)
        with progress.bar("the highest rate", steps.TRIALS_MAX) as told:
            for number, (rate, good) in enumerate(steps.search(first, held, most)):
                words = "held" if good else "not held"
                table.append({"rate_per_s": round(rate), "held": good})
                self.finding.markers.append(
                    Marker(round(course.seconds(), 2), f"{rate:.0f}: {words}")
                )
                best, why = (rate, why) if good else (best, tried[0])
                told(number + 1, f"{rate:.0f} a second: {words}")
        self.finding.must(best > 0, "no rate was held at all")
        done, better = self._lasting(course, best or min(first, most), best > 0)
        why = better or why
        loss = rounds.together(done).loss()
        self.finding.must(loss < LOSS_MAX, f"{loss * 100:.3g} % were lost or late in all rounds")
        # At the rate of the figures, and not at that which the search began with.
        self.own["alone"] = self.crew.alone(done[0].order.rate, self._alone_s())["alone"]
        self.finding.figures |= {
            "highest_per_s": round(done[0].order.rate) if best and loss < LOSS_MAX else None,
            "limited_by": self._limit_of(why) if why else f"{bound}, and nothing else",
            "search": table,
        } | self._figures(done)
        return done

    def _lasting(
        self, course: Course, rate: float, lower: bool
    ) -> tuple[list[Round], Round | None]:
        """All rounds at a rate, and at lower ones while they are not held, if there is `lower`; the
        worst round of the lowest rate that was not held, if there is one."""
        why: Round | None = None
        for less in (*SHORTER, 0.0):
            done = self._rounds(course, rate, f"{rate:.0f} a second, held")
            if rounds.together(done).loss() < LOSS_MAX or not lower:
                break
            why, rate = max(done, key=lambda each: each.part.loss()), rate * less
            if not less:
                break
        return done, why

    # --- what has to be said besides ---

    def _law(self, done: list[Round]) -> None:
        whole = rounds.together(done)
        for name, found in (
            ("came twice", whole.duplicated + whole.duplicated_inbound),
            ("came changed, or to another client", whole.foreign),
        ):
            self.finding.must(not found, f"{found} datagrams {name}")
        self.finding.notes += rounds.own_faults(whole, self.granted) + self.seen.later()

    def _about_tool(self, drift: instrument.Drift, others: Figures) -> None:
        own, alone, plan = self.own, self.alone, self.crew.plan
        most, goal = alone["datagrams_per_s_max"], instrument.GOAL_PER_S
        self.finding.figures["tool"] = {
            "cpus": list(plan.cpus),
            "sleeps": not plan.spin,
            "alone_one_core": alone,
            "clock": own["clock"] | {"drift": drift.figures()},
            "stamps_too_far_apart_us": instrument.error_us(own["clock"]),
            "machine": others,
        }
        if (percent := sum(others.values())) > instrument.OTHERS_PERCENT:
            self.finding.notes.append(
                f"other programs had {percent:g} % of a CPU meanwhile: figures are of a machine "
                "that is shared with them, and another run is as alike as they are"
            )
        if most < goal:
            self.finding.notes.append(
                f"alone on one core the tool made {most} datagrams a second, not {goal}: this "
                "machine is slow, or was busy"
            )
        if not plan.spin:
            self.finding.notes.append(
                "the tool slept between datagrams, since it has no CPU of its own: its waking up "
                "is in the round trips (tool_alone)"
            )
