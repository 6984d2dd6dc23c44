"""The Global Relay at the scale of the Internet: a million calls through the product's own rules.

    simulate.py                                a million sessions, as tables; some minutes
    simulate.py --quick                        20,000, in seconds: does it still work?
    simulate.py --json > figures.json          the same as JSON
    simulate.py --plots FOLDER                 and plots
    simulate.py --relay-figures relay.json     machines by what `bench.py relay --json` measured

Who calls from where is drawn from a table of internet users (globe.py), placed by
steering.Steering, led by hints of ufrag.mint through flows.Table and gate.Gate at both tiers, every
first check with its real integrity (setting_up.py); then things happen (scenes.py, incidents.py).
Nothing is measured
here: time is virtual and the same seed gives the same figures, but for "timings".

Every session goes through steering and the gates. Of the media, one look-up stands for all of 20 s
while nothing happens to a client; in a scene every datagram of the clients that it meets is judged.

**What it does not show.** CPUs and queues: whatever comes is judged at once. Loss, reordering and
congestion on the way. Transceivers, but for their answers. How fast a routing protocol converges.
Callers that come and go with the hour of the day: a million at once, everywhere.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import globe
import incidents
import machines
import numpy as np
import planning
import scenes
import setting_up
import typer
from planning import Crew, Ints, Plan, Shape

import keeper
import settings
import standing
import steering
from endpoints import Endpoint, RedisUrl

Figures = dict[str, Any]

SESSIONS, QUICK_SESSIONS = 1_000_000, 20_000
WORKERS, FLOWS_MAX = 8, 65_536
SMALL_SESSIONS, SMALL_WORKERS, SMALL_FLOWS_MAX = 200_000, 2, 8_192
"""Fewer sessions have smaller relays: as many of them, and as full."""

NARROW = 8
"""Of so many flows one may be tentative where that is too few."""

RESTED = 50_000
"""Callers about whom steering is asked again when a site has failed."""

WAVES_AFTER, WAVE_SHARE = 24, 1 / planning.WAVES
WAVE_S = planning.ARRIVE_S / planning.WAVES
"""After a site has failed new calls come as before: in each wave so many of all calls end, and as
many begin."""

SEARCHES = {
    "other workers of the same hosts (SO_REUSEPORT)": ("kernel", 0.001),
    "a relay host lost, resilient hash, Redis 1 ms": ("resilient", 0.001),
    "a relay host lost, hash modulo, Redis 1 ms": ("modulo", 0.001),
    "a relay host lost, hash modulo, Redis 50 ms": ("modulo", 0.05),
    "a relay host lost, hash modulo, Redis 500 ms": ("modulo", 0.5),
    "a relay host lost, hash modulo, Redis down": ("modulo", None),
    "a carrier's NAT gives a fifth other ports": ("ports", 0.001),
    "a relay host lost, and the old key retired": ("retired", 0.001),
}


class Run:
    """One simulation, stage by stage."""

    def __init__(self, shape: Shape, found: machines.Measured, processes: int, show: bool) -> None:
        self._shape, self._measured = shape, found
        self._processes, self._show = processes, show
        self.timings: dict[str, float] = {}
        self.figures: Figures = {}

    @contextmanager
    def _stage(self, name: str, length: int) -> Iterator[Callable[[int], None]]:
        """A stage with its time and a bar."""
        start = time.monotonic()
        bar = typer.progressbar(
            length=length, label=f"{name:<28}", file=sys.stderr, hidden=not self._show
        )
        with bar:
            yield bar.update
        self.timings[name] = round(time.monotonic() - start, 1)
        if not self._show:
            typer.echo(f"{name}: {self.timings[name]} s", err=True)

    def all(self) -> Plan:
        """Everything, in order."""
        shape, figures = self._shape, self.figures
        with self._stage("callers and sites", 1):
            on = planning.draw(shape)
        with self._stage("steering", len(on.callers)) as done, Crew(on, self._processes) as crew:
            planning.place(on, crew, done)
        figures["latency_ms"] = latency(on)
        with Crew(on, self._processes) as crew:
            self._set_up(on, crew)
            failed = int(np.bincount(on.first).argmax())
            with self._stage("steering after a failure", 2):
                figures["steering"] = steered(on, crew, failed)
            self._scenes(on, crew, failed)
        sites = np.bincount(on.first, minlength=len(on.sites))
        clusters = np.bincount(on.cluster, minlength=max(on.clusters) + 1)[1:]
        most = np.array(figures["steering"]["sessions_most"])
        figures["machines"] = machines.needed(
            self._measured,
            shape.sessions,
            sites.tolist(),
            clusters.tolist(),
            most.tolist(),
            figures["redis"]["operations_a_s"]["mean"],
        )
        return on

    def _set_up(self, on: Plan, crew: Crew) -> None:
        figures = self.figures
        sites, clusters = range(len(on.sites)), range(len(on.clusters))
        # The largest first, so that no process is left alone with one in the end.
        order = sorted(sites, key=lambda at: -int((on.first == at).sum()))
        with self._stage("calls at the entrances", len(sites)) as done:
            entrances = crew.work(setting_up.open_site, [(at,) for at in order], done)
        with self._stage("calls at the clusters", len(clusters)) as done:
            inner = crew.work(setting_up.open_cluster, [(at,) for at in clusters], done)
        with self._stage("Redis", len(sites)) as done:
            written = crew.work(setting_up.write, [(at,) for at in sites], done)
        by_site = dict(zip(order, entrances, strict=True))
        figures["set_up"] = {
            "entrances": scenes.total(each["counters"] for each in entrances),
            "clusters": scenes.total(each["counters"] for each in inner),
        }
        figures["balance"] = balance(on, [by_site[at] for at in sites], inner)
        figures["redis"] = redis(on, written)

    def _scenes(self, on: Plan, crew: Crew, failed: int) -> None:
        figures, sites = self.figures, range(len(on.sites))
        with self._stage("a site is lost", len(sites)) as done:
            chance = np.random.default_rng([self._shape.seed, 5])
            silent = chance.uniform(*scenes.FAILOVER_S, len(on.callers))
            others = [(failed, at, silent) for at in sites if at != failed]
            figures["site_lost"] = {"site": on.sites[failed]} | scenes.site_lost(
                on, failed, crew.work(scenes.fail_site, others, done)
            )
        here = middle(on)
        with self._stage("routes, ports, Redis", len(SEARCHES)) as done:
            found = crew.work(scenes.search, [(here, *each) for each in SEARCHES.values()], done)
            figures["routes"] = {"site": on.sites[here], "hosts": on.edges.hosts[here]}
            figures["routes"]["events"] = dict(zip(SEARCHES, found, strict=True))
        cluster = int(np.bincount(on.cluster).argmax())
        index = list(on.clusters).index(cluster)
        dead = frozenset(on.groups[cluster][: on.relays.workers])
        figures["transit"] = {
            "cluster": cluster,
            "relay_hosts": on.relays.hosts[index],
            "addresses": len(on.groups[cluster]),
        }
        with self._stage("a transit is lost, drains", 2 * len(sites)) as done:
            for name, drains in (("lost", False), ("drained", True)):
                tasks = [(at, cluster, dead, drains) for at in sites]
                told = crew.work(incidents.lose_transit, tasks, done)
                figures["transit"][name] = incidents.transit_lost(on, cluster, told, crew, drains)
        with self._stage("keys", 2) as done:
            orders = incidents.RELAYS_FIRST, incidents.RELAYS_LAST
            told = crew.work(incidents.rotate, [(here, order) for order in orders], done)
            names = "relays first, as documented", "transceivers first"
            figures["keys"] = dict(zip(names, told, strict=True))
        with self._stage("second ways kept alive", 2) as done:
            narrow = self._shape.relay.flows_max // NARROW
            seconds = np.bincount(on.second, minlength=len(on.sites))
            workers = np.array([len(on.edges.of(at)) for at in range(len(seconds))])
            here = int((seconds / workers).argmax())
            told = crew.work(incidents.keep_second, [(here, None), (here, narrow)], done)
            figures["second_ways_site"] = on.sites[here]
            figures["second_ways"] = dict(
                zip(("default limit", f"one of {NARROW} flows tentative"), told, strict=True)
            )


def middle(on: Plan) -> int:
    """The site of middle size among those with three hosts, so that two are left; else any."""
    sizes = np.bincount(on.first, minlength=len(on.sites))
    fit = [at for at in range(len(on.sites)) if on.edges.hosts[at] >= 3] or list(
        range(len(on.sites))
    )
    return sorted(fit, key=lambda at: int(sizes[at]))[len(fit) // 2]


def latency(on: Plan) -> Figures:
    """Round trips of all callers: by the entrance that they have been given, and otherwise."""
    callers, count = on.callers, len(on.callers)
    first = hops_ms(on, np.arange(count), on.first)
    straight, whole = np.empty(count), np.empty(count)
    for number, (_, where) in globe.CLUSTERS.items():
        here = on.cluster == number
        straight[here] = globe.trips_ms(callers, where, np.flatnonzero(here))
        for at, name in enumerate(on.sites):
            both = here & (on.first == at)
            whole[both] = first[both] + globe.between_ms(globe.SITES[name], where)
    single = globe.trips_ms(callers, globe.SITES[globe.SINGLE])
    rows = {
        "first hop, Global Relay": first,
        "first hop, clusters alone (nearest cluster)": straight,
        f"first hop, a single site ({globe.SINGLE})": single,
        "to the cluster, Global Relay": whole,
        "to the cluster, clusters alone": straight,
        "to the cluster, a single site": single,
    }
    on.trips = {"Global Relay": first, "clusters alone": straight, f"{globe.SINGLE} alone": single}
    return {
        name: {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 90, 99)}
        | {"under_50_ms": round(float((values < 50).mean()), 4)}
        for name, values in rows.items()
    }


def steered(on: Plan, crew: Crew, failed: int) -> Figures:
    """Whom the failure of a site moves, and where load goes while new calls come."""
    chance = np.random.default_rng([on.shape.seed, 3])
    who = np.sort(chance.choice(len(on.callers), min(RESTED, len(on.callers)), replace=False))
    heard, without = planning.states(on), planning.states(on, [failed])
    before = planning.decide_all(crew, who, heard)
    after = planning.decide_all(crew, who, without)
    here = before[0] == failed
    moved = before[0] != after[0]
    to = np.bincount(after[0][here], minlength=len(on.sites))
    nearest = planning.nearest(on.callers, list(globe.SITES.values()))
    loads = settle(on, crew, failed, chance)
    trips = [on.trips["Global Relay"][who[here]], hops_ms(on, who[here], after[0][here])]
    return {
        "asked_about": len(who),
        "not_at_the_nearest_site": round(float((on.first != nearest).mean()), 4),
        "were_there": int(here.sum()),
        "moved_who_were_there": int((moved & here).sum()),
        "moved_who_were_not": int((moved & ~here).sum()),
        "cluster_changed": int((before[2] != after[2]).sum()),
        "first_hop_ms_before_and_after": [
            {f"p{q}": round(float(np.percentile(each, q)), 1) for q in (50, 99)} for each in trips
        ],
        "went_to": {on.sites[at]: int(to[at]) for at in np.argsort(-to) if to[at]},
        **loads,
    }


def hops_ms(on: Plan, who: Ints, sites: Ints) -> globe.Floats:
    """First hops of these callers to these sites."""
    found = np.empty(len(who))
    for at in np.unique(sites):
        here = sites == at
        found[here] = globe.trips_ms(on.callers, globe.SITES[on.sites[at]], who[here])
    return found


def settle(on: Plan, crew: Crew, failed: int, chance: np.random.Generator) -> Figures:
    """All who were there go to their second site; then calls end and others begin, and steering
    hears of the load between, through standing.Standing. Half way through, the site comes back."""
    saved = on.first.copy()
    on.first[saved == failed] = on.second[saved == failed]
    capacity = np.array([on.capacity(at) for at in range(len(on.sites))])

    def loads() -> Any:
        return np.bincount(on.first, minlength=len(on.sites)) / capacity

    over = [loads()]
    most = np.bincount(on.first, minlength=len(on.sites))
    heard = [standing.Standing(on.capacity(at), (name,)) for at, name in enumerate(on.sites)]
    for at, each in enumerate(heard):
        each.heard(on.sites[at], True, int((saved == at).sum()), planning.BEGIN)
    clusters = planning.states(on)[1]
    for wave in range(WAVES_AFTER):
        now = planning.BEGIN + wave * WAVE_S
        for at, each in enumerate(heard):
            if at == failed and wave < WAVES_AFTER // 2:
                for _ in range(standing.MISSES):
                    each.failed(on.sites[at], now)
            else:
                each.heard(on.sites[at], True, int((on.first == at).sum()), now)
        states = {
            on.sites[at]: each.state(now) or steering.UNKNOWN for at, each in enumerate(heard)
        }
        fresh = chance.choice(len(on.callers), round(WAVE_SHARE * len(on.callers)), replace=False)
        fresh = np.sort(fresh)
        on.first[fresh] = planning.decide_all(crew, fresh, (states, clusters))[0]
        over.append(loads())
        most = np.maximum(most, np.bincount(on.first, minlength=len(on.sites)))
    on.first[:] = saved
    table = np.array(over)
    table[:, failed] = np.nan
    top = int(np.nanargmax(table[0]))
    return {
        "load_before_most": round(
            float((np.bincount(saved, minlength=len(on.sites)) / capacity).max()), 3
        ),
        "load_at_failure_most": [on.sites[top], round(float(table[0][top]), 3)],
        "load_after_most": round(float(np.nanmax(table[WAVES_AFTER // 2])), 3),
        "load_over_time": {
            on.sites[at]: [round(float(each), 3) for each in table[:, at]]
            for at in np.argsort(-np.nan_to_num(table[0]))[:5]
        },
        "wave_s": WAVE_S,
        "sessions_most": most.tolist(),
    }


def balance(on: Plan, entrances: list[Figures], inner: list[Figures]) -> Figures:
    """How evenly sites, hosts and workers are loaded: the fullest over the mean."""
    sizes = np.bincount(on.first, minlength=len(on.sites))
    capacity = np.array([on.capacity(at) for at in range(len(on.sites))])

    def uneven(values: Ints) -> float:
        return round(float(values.max() / values.mean()), 3)

    def rows(found: list[Figures]) -> Figures:
        workers = [np.array(each["sessions"]) for each in found]
        hosts = [each.reshape(-1, on.shape.workers).sum(axis=1) for each in workers]
        full = [at for at in range(len(workers)) if workers[at].mean() >= 1]
        return {
            "hosts_of_one_place_max_to_mean": max(uneven(hosts[at]) for at in full),
            "workers_of_one_place_max_to_mean": max(uneven(workers[at]) for at in full),
            "sessions_a_worker_most": int(max(each.max() for each in workers)),
            "flows_a_worker_most": max(max(each["flows_most"]) for each in found),
            "tentative_a_worker_most": max(max(each["tentative_most"]) for each in found),
        }

    return {
        "sites": {
            name: {
                "sessions": int(sizes[at]),
                "hosts": on.edges.hosts[at],
                "load": round(float(sizes[at] / capacity[at]), 3),
            }
            for at, name in enumerate(on.sites)
        },
        "site_load_max_to_mean": uneven(sizes / capacity),
        "clusters": {
            on_name: int((on.cluster == number).sum())
            for number, (on_name, _) in globe.CLUSTERS.items()
        },
        "entrances": rows(entrances),
        "cluster_relays": rows(inner),
        "flows_a_worker_limit": on.shape.limits.flows,
        "tentative_a_worker_limit": on.shape.limits.tentative,
    }


def redis(on: Plan, written: list[Figures]) -> Figures:
    """Operations a second, and what arithmetic says of them."""
    again = np.sum([each["again"] for each in written], axis=0) / keeper.LOOK_S
    arrivals = on.shape.sessions / planning.ARRIVE_S
    flows_ = sum(each["new"] for each in written)
    return {
        "flows": flows_,
        "operations_a_s": {
            "mean": round(float(again.mean()) + arrivals, 1),
            "of_that_new_calls": round(arrivals, 1),
            "written_again_mean": round(float(again.mean()), 1),
            "written_again_peak": round(float(again.max()), 1),
        },
        "written_again_by_arithmetic": round(flows_ * keeper.REFRESHES / on.shape.redis.ttl_s, 1),
    }


def shape_of(sessions: int, seed: int, found: machines.Measured) -> Shape:
    """A world of that size, with the product's own settings."""
    small = sessions < SMALL_SESSIONS
    workers = SMALL_WORKERS if small else WORKERS
    each = machines.sessions_a_worker(found)
    if small:
        each = max(4, round(each * sessions / SESSIONS * WORKERS / SMALL_WORKERS))
    relay = settings.RelayTable(
        public=Endpoint("203.0.113.5:3478"),
        internal=Endpoint("10.9.0.1:3500"),
        workers=workers,
        flows_max=SMALL_FLOWS_MAX if small else FLOWS_MAX,
    )
    return Shape(
        sessions,
        workers,
        each,
        round(found.sessions_a_core * machines.TRANSCEIVER_UTILISATION),
        relay,
        settings.Recovery(),
        settings.Transit(),
        settings.Redis(url=RedisUrl("redis://10.0.0.1:6379/0")),
        seed,
    )


def simulate(
    sessions: int,
    seed: int,
    found: machines.Measured = machines.DEFAULT,
    processes: int = 1,
    show: bool = False,
) -> tuple[Figures, Plan]:
    """All figures; those under "timings" are of this machine, all others of the seed."""
    start, shape = time.monotonic(), shape_of(sessions, seed, found)
    run = Run(shape, found, processes, show)
    on = run.all()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (each.ru_maxrss / 1024 for each in used)
    figures: Figures = {
        "sessions": sessions,
        "seed": seed,
        "assumed": scenes.ASSUMED | globe.ASSUMED,
        "settings": {
            "workers_a_host": shape.workers,
            "flows_max": shape.relay.flows_max,
            "flows_tentative_a_worker": shape.limits.tentative,
            "sessions_a_worker_planned": shape.sessions_a_worker,
            "recovery": str(shape.searching),
            "transit_timeout_s": shape.transit.timeout_s,
        },
        **run.figures,
        "timings": {
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
            "stages": run.timings,
            "processes": processes,
            "peak_rss_mib": round(own),
            "peak_rss_all_processes_mib_at_most": round(own + processes * children),
        },
    }
    return figures, on


cli = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def main(
    sessions: Annotated[int, typer.Option(min=1000, help="Concurrent sessions.")] = SESSIONS,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="20,000 sessions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Write plots into this folder.")] = None,
    relay_figures: Annotated[
        Path | None, typer.Option(help="Of `bench.py relay --json`, for the machines.")
    ] = None,
    transceiver_figures: Annotated[
        Path | None, typer.Option(help="Of `bench.py transceiver --json`.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="That share the work.")] = 2,
) -> None:
    """Simulate."""
    found = machines.measured(relay_figures, transceiver_figures)
    figures, on = simulate(
        QUICK_SESSIONS if quick else sessions, seed, found, processes, sys.stderr.isatty()
    )
    if plots:
        import plots as drawing  # noqa: PLC0415  # matplotlib takes a second to load

        drawing.draw(figures, on, plots)
    typer.echo(json.dumps(figures, indent=2) if as_json else "\n".join(lines(figures)))


def lines(figures: Any, indent: str = "") -> Iterator[str]:
    """Figures for people: a line each."""
    for name, value in figures.items():
        if name in ("series", "load_over_time", "sessions_most"):
            continue
        if isinstance(value, dict) and all(
            not isinstance(each, dict | list) for each in value.values()
        ):
            told = ", ".join(f"{key} {each}" for key, each in value.items())
            if len(told) < 150:
                yield f"{indent}{name:<28} {told}"
                continue
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            yield f"{indent}{name:<28} {value}"


if __name__ == "__main__":
    cli()
