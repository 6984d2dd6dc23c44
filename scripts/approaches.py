"""The same calls four ways in, side by side in one run: does the relay's hop earn its keep?

    a port per session     the transceiver itself, with a public UDP port for each session
    a port per server      the transceiver itself, with one public UDP port
    TURN                   the same, behind a real coturn
    this relay             the product

Behind all of them is the same transceiver code; what differs is the way in (doors.py, bare.py,
turning.py). All servers are up during the whole run, and are measured in turns, the order rotated:

    set_up      one call at a time through a lane with delay: from nothing to connected and to the
                first audio, in milliseconds and in round trips. A TURN client's allocation counts.
    traffic     calls that talk and are answered: CPU of what is in front and of the transceiver,
                and round trips of authenticated checks to the transceiver, by the kernel's clock
    ports       what clients send to, what is open, and what so many more calls would take
    two_servers_behind_one_address     who reaches the server that has its session?
    killed      what faces the public is killed in mid-call and started again
    claims      what the public table says of each way, answered by these figures (claims.py)

Silence is, at those callers who miss packets of a reply, from the last one heard before to the
first one after: a pause of the conversation that falls into it counts, too. How far two runs may
lie apart stands beside the figures that chance moves (intervals.py).
"""

import asyncio
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import access
import aiohttp
import bare
import callers
import claims
import dev
import doors
import intervals
import numpy as np
import options
import progress
import rig
import turning
import typer
from access import Access
from doors import NAMES, Estate, Way
from findings import Figures, Finding, Spread

CALLS_MAX = 100
"""This process speaks for some hundred callers on a core; more, and its own delay is measured."""

SETTLE_S = 5.5
"""Until every caller has said a whole turn and is being answered: they begin anywhere in one."""

WINDOWS = 2
"""Measured one after the other on the same calls: connecting them takes longer than measuring."""

SET_UPS = 5
KILLED_CALLS = 8
FLEET_CALLS = 16
WATCH_S, QUICK_WATCH_S = 8.0, 3.0
"""After a restart, for a call to be heard again: browsers' checks come every 2.5 s."""

FLEET_S = 2.0
"""For a call to connect on loopback, which takes 20 ms: checks are repeated every 50 ms."""

WORKER_S = 0.5
"""After a worker's death: what is heard later came through its successor."""

PORTS_AN_ADDRESS = 65_536 - 1_024
AT = (1_000, 100_000)
"""Calls that the arithmetic of ports is done for."""

SAMPLE = 20_000


class Run:
    """The measurements of one run, and its finding."""

    def __init__(
        self,
        estate: Estate,
        http: aiohttp.ClientSession,
        found: Finding,
        calls: int,
        seconds: float,
        rounds: int,
        delay_s: float,
        quick: bool,
    ) -> None:
        self.estate, self.http, self.found = estate, http, found
        self.calls, self.seconds, self.rounds, self.delay_s = calls, seconds, rounds, delay_s
        self.set_ups = 1 if quick else SET_UPS
        self.soon = quick
        self.watch_s = QUICK_WATCH_S if quick else WATCH_S
        self.settle_s = 1.2 if quick else SETTLE_S
        self.few = min(calls, 2 if quick else KILLED_CALLS)
        self.fleet_calls = 6 if quick else FLEET_CALLS

    def turns(self, number: int) -> list[Way]:
        """The ways in the order of one round: each is the first one once."""
        ways = self.estate.ways
        at = number % len(ways)
        return ways[at:] + ways[:at]

    def _calling(
        self, way: Way, calls: int
    ) -> contextlib.AbstractAsyncContextManager[list[Access]]:
        return access.calls(self.estate, way, calls, self.http, self.soon)

    # --- set-up ---------------------------------------------------------------------------

    async def set_up(self) -> None:
        """Calls through a delay, one at a time."""
        spent: dict[Way, list[dict[str, float]]] = {way: [] for way in self.estate.ways}
        with progress.bar("set-up", self.set_ups + 1) as moved:
            for number in range(self.set_ups + 1):
                for way in self.turns(number):
                    spent[way].append(await self._call(way))
                moved(number + 1, "")
        trip_ms = 2000 * self.delay_s
        table = []
        for way, each in spent.items():
            measured = each[1:]  # the first one warms up
            median = {
                name: statistics.median(row[name] for row in measured) for name in measured[0]
            }
            whole = [row["before"] + row["connected"] for row in measured]
            table.append(
                {
                    "way": NAMES[way],
                    "before_ms": round(median["before"], 1),
                    "connected_ms": round(median["connected"], 1),
                    "first_audio_ms": round(median["first_audio"], 1),
                    "whole_ms": round(statistics.median(whole), 1),
                    "whole_ms_min": round(min(whole), 1),
                    "whole_ms_max": round(max(whole), 1),
                    "round_trips": round(statistics.median(whole) / trip_ms, 2),
                }
            )
        self.found.figures["set_up"] = table

    async def _call(self, way: Way) -> dict[str, float]:
        """One call; milliseconds: of the allocation before the offer, from the answer in hand to
        connected, and from there to the first audio. Raises TimeoutError, ConnectionError."""
        one = Access(self.estate, way, self.delay_s)
        try:
            await one.connect(self.http)
            await self._until(lambda: len(one.who.arrivals) > 0, f"{NAMES[way]}: no audio")
            return {
                "before": one.allocated_s * 1000,
                "connected": one.who.connected_s * 1000,
                "first_audio": (one.who.arrivals[0] - one.answer_ns) / 1e6,
            }
        finally:
            with contextlib.suppress(ConnectionError):
                await one.hang_up(self.http)
            one.close()

    # --- traffic --------------------------------------------------------------------------

    async def traffic(self) -> None:
        """Calls that talk: CPU and delay, way by way, in turns."""
        windows: dict[Way, list[Figures]] = {way: [] for way in self.estate.ways}
        trips: dict[Way, list[intervals.Array]] = {way: [] for way in self.estate.ways}
        ports: dict[Way, Figures] = {}
        total = self.rounds * len(self.estate.ways)
        with progress.bar(f"{self.calls} calls that talk, {total} times", total) as moved:
            for number in range(self.rounds):
                for way in self.turns(number):
                    async with access.calls(
                        self.estate, way, self.calls, self.http, self.soon
                    ) as accesses:
                        await access.talk(accesses, self.settle_s)
                        for _ in range(WINDOWS):
                            windows[way].append(await self._window(way, accesses))
                            trips[way].append(_trips_us(accesses))
                        ports[way] = self._ports(way, accesses)
                    moved(sum(map(len, windows.values())) // WINDOWS, NAMES[way])
        self._tabulate(windows, trips)
        self.found.figures["ports"] = [self._scaled(way, row) for way, row in ports.items()]

    async def _window(self, way: Way, accesses: list[Access]) -> Figures:
        """A piece of time: CPU milliseconds a call and second, and packets a call and second."""
        front, behind = self.estate.front(way), self.estate.behind(way)
        for one in accesses:
            one.who.trips_ns.clear()
        heard = sum(len(one.who.arrivals) for one in accesses)
        begun, before = time.monotonic(), (sum(map(rig.cpu_s, front)), rig.cpu_s(behind))
        sent = await access.talk(accesses, self.seconds, probing=True)
        used = sum(map(rig.cpu_s, front)) - before[0], rig.cpu_s(behind) - before[1]
        per = (time.monotonic() - begun) * len(accesses)
        heard = sum(len(one.who.arrivals) for one in accesses) - heard
        return {
            "front": 1000 * used[0] / per,
            "behind": 1000 * used[1] / per,
            "up": sent / per,
            "down": heard / 2 / per,
        }

    def _tabulate(
        self,
        windows: dict[Way, list[Figures]],
        trips: dict[Way, list[intervals.Array]],
    ) -> None:
        table, first = [], self.estate.ways[0]
        for way, each in windows.items():
            mean = {name: statistics.mean(row[name] for row in each) for name in each[0]}
            whole = [row["front"] + row["behind"] for row in each]
            row: Figures = {
                "way": NAMES[way],
                "front_cpu_ms": round(mean["front"], 3),
                "transceiver_cpu_ms": round(mean["behind"], 2),
                "cpu_ms": round(statistics.mean(whole), 2),
                "cpu_ms_apart": _apart(statistics.mean(whole), whole, 2),
            }
            for name, percent in (("p50", 50), ("p99", 99)):
                all_of_them = _percentile(np.concatenate(trips[way]), percent)
                row[f"trip_{name}_us"] = round(all_of_them)
                of_first = _percentile(np.concatenate(trips[first]), percent)
                added = [
                    _percentile(here, percent) - _percentile(there, percent)
                    for here, there in zip(trips[way], trips[first], strict=True)
                ]
                row[f"added_{name}_us"] = round(all_of_them - of_first)
                row[f"added_{name}_us_apart"] = _apart(all_of_them - of_first, added, 0)
            row |= {"up_per_s": round(mean["up"], 1), "down_per_s": round(mean["down"], 1)}
            table.append(row)
            values = np.concatenate(trips[way])[:SAMPLE]
            self.found.spreads.append(
                Spread("Round trip of a check", NAMES[way], "us", values.tolist())
            )
            self.found.must(bool(mean["down"]), f"{NAMES[way]}: no caller was answered")
        self.found.figures["traffic"] = table

    def _ports(self, way: Way, accesses: list[Access]) -> Figures:
        sent_to = set[doors.Address]().union(*(one.sent_to for one in accesses))
        return {"sent_to": len(sent_to), "open": len(doors.udp_ports(self.estate.facing(way)))}

    def _scaled(self, way: Way, row: Figures) -> Figures:
        """Ports that clients send to, and addresses, for many calls."""
        figures: Figures = {"way": NAMES[way], "calls": self.calls, **row}
        for calls in AT:
            ports, addresses = 1, 1
            if way is Way.SESSION:
                ports, addresses = calls, math.ceil(calls / PORTS_AN_ADDRESS)
            elif way is Way.SERVER:
                ports = addresses = math.ceil(calls / self._a_core(way))
            elif way is Way.TURN:
                addresses = math.ceil(calls / turning.PORTS)
            figures |= {f"ports_at_{calls}": ports, f"addresses_at_{calls}": addresses}
        return figures

    def _a_core(self, way: Way) -> int:
        """Calls whose CPU time is a whole core's, by this run's figures."""
        row = next(row for row in self.found.figures["traffic"] if row["way"] == NAMES[way])
        return max(1, int(1000 / max(row["cpu_ms"], 0.1)))

    # --- two servers behind one address ---------------------------------------------------

    async def fleet(self) -> None:
        """Each call is opened at one of two servers, and sent to the address of both."""
        table = []
        for way in (Way.SERVER, Way.RELAY):
            if way not in self.estate.ways:
                continue
            urls, public = self.estate.fleet(way)
            with progress.bar(f"two servers behind one address: {NAMES[way]}", 1):
                done = await asyncio.gather(
                    *(self._reaches(way, urls[n % 2], public) for n in range(self.fleet_calls))
                )
            table.append({"way": NAMES[way], "calls": len(done), "connected": sum(done)})
            if way is Way.RELAY:
                self.found.must(all(done), f"{sum(done)} of {len(done)} calls found their server")
        if table:
            self.found.figures["two_servers_behind_one_address"] = table

    async def _reaches(self, way: Way, url: str, public: doors.Address) -> bool:
        """Whether a call connects, once, without anything that makes up for a wrong server."""
        one = Access(self.estate, way)
        try:
            await asyncio.wait_for(one.connect(self.http, url, public), FLEET_S)
        except TimeoutError:
            return False
        finally:
            await one.hang_up(self.http)
            one.close()
        return True

    # --- what is killed -------------------------------------------------------------------

    async def killed(self) -> None:
        """Kill what faces the public, way by way; transceivers are the last."""
        table = []
        order = [way for way in reversed(Way) if way in self.estate.ways]
        with progress.bar("kill what faces the public", len(order)) as moved:
            for number, way in enumerate(order):
                if way is Way.RELAY:
                    table.append(await self._kill(way, worker=True))
                table.append(await self._kill(way))
                moved(number + 1, NAMES[way])
        self.found.figures["killed"] = table

    async def _kill(self, way: Way, worker: bool = False) -> Figures:
        """One death in mid-call: who comes back by himself, and after how much silence."""
        estate = self.estate
        async with self._calling(way, self.few) as accesses:
            await access.talk(accesses, self.settle_s)
            talking = asyncio.create_task(access.talk(accesses, 60.0))
            try:
                lost = {one: one.who.lost for one in accesses}
                died, died_ns = time.monotonic(), time.time_ns()
                if worker:
                    estate.kill_worker()
                    await asyncio.sleep(WORKER_S)
                else:
                    estate.kill_front(way)
                    await estate.on_server_cpus(lambda: estate.restart_front(way))
                down_ms, since_ns = 1000 * (time.monotonic() - died), time.time_ns()
                watched = time.monotonic()
                await self._back(accesses, since_ns)
                watched_s = time.monotonic() - watched
                back = [one for one in accesses if one.who.heard_since(since_ns)]
                again_ms = await self._allocated_anew(accesses) if way is Way.TURN else None
            finally:
                talking.cancel()
            missed = {one: one.who.lost - lost[one] for one in back}
            silence = [one.who.silence_ms(died_ns) for one in back if not worker or missed[one]]
        if way is Way.RELAY:
            what = "a worker" if worker else "the relay"
            self.found.must(
                len(back) == len(accesses), f"{what} was killed, and calls did not last"
            )
            if worker:
                self.found.must(not sum(missed.values()), f"{missed} packets lost with a worker")
        none = 0 if back else None
        return {
            "way": NAMES[way],
            "killed": "a worker" if worker else _KILLED[way],
            "calls": len(accesses),
            "survived": len(back),
            "down_ms": None if worker else round(down_ms),
            "silence_p50_ms": round(statistics.median(silence)) if silence else none,
            "silence_max_ms": round(max(silence)) if silence else none,
            "lost": sum(missed.values()),
            "again_ms": again_ms,
            "watched_s": round(watched_s, 1),
        }

    async def _back(self, accesses: Sequence[Access], since_ns: int) -> None:
        """Wait until all are heard again, and a little longer; or for so long."""
        with contextlib.suppress(TimeoutError):
            await self._until(
                lambda: all(one.who.heard_since(since_ns) for one in accesses), "", self.watch_s
            )

    async def _allocated_anew(self, accesses: list[Access]) -> int | None:
        """Milliseconds until a new allocation has a check of half of the calls answered; None if
        none has."""
        spent = await asyncio.gather(*(self._again(one) for one in accesses))
        found = [each for each in spent if each is not None]
        return round(1000 * statistics.median(found)) if found else None

    async def _again(self, one: Access) -> float | None:
        begun, answered = time.monotonic(), one.who.answered
        try:
            await one.allocate_anew()
            deadline = begun + self.watch_s
            while one.who.answered == answered:
                if time.monotonic() > deadline:
                    return None
                one.who.probe()
                await asyncio.sleep(0.01)
        except ConnectionError:
            return None
        return time.monotonic() - begun

    async def _until(
        self, condition: access.Condition, what: str, patience_s: float = callers.STEP_S_MAX
    ) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            await asyncio.sleep(0.005)


_KILLED = {
    Way.SESSION: "the server",
    Way.SERVER: "the server",
    Way.TURN: "turnserver",
    Way.RELAY: "the whole relay",
}


def _trips_us(accesses: list[Access]) -> intervals.Array:
    return np.concatenate([np.array(one.who.trips_ns, float) for one in accesses]) / 1000


def _percentile(values: intervals.Array, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan


def _apart(whole: float, rounds: Sequence[float], digits: int) -> float | None:
    """How far another run may lie from this one; None after too few rounds."""
    found = intervals.estimate(whole, rounds).apart
    return None if math.isnan(found) else round(found, digits)


def measure(
    ways: list[Way], calls: int, seconds: float, rounds: int, delay_ms: float, quick: bool
) -> Finding:
    """All of it. Raises dev.StartError, TimeoutError, OSError."""
    found = Finding("Four ways into the same transceiver")
    problem = turning.missing()
    if problem and Way.TURN in ways:
        ways = [way for way in ways if way is not Way.TURN]
        if not ways:
            raise dev.StartError(problem)
        found.notes.append(f"TURN was not measured: {problem}.")
    found.notes += _notes(ways)
    with tempfile.TemporaryDirectory(prefix="earshot-approaches-") as folder:
        estate = Estate(Path(folder), ways, fleet=True)

        async def run() -> None:
            await estate.start()
            async with aiohttp.ClientSession(trust_env=False) as http:
                work = Run(estate, http, found, calls, seconds, rounds, delay_ms / 1000, quick)
                await work.set_up()
                await work.traffic()
                await work.fleet()
                await work.killed()
            if Way.RELAY in ways and "redis" not in estate.system.running:
                found.notes.append("The relay had no Redis: there is no redis-server.")

        try:
            asyncio.run(run())
        finally:
            estate.system.stop()
    found.figures["claims"] = claims.answers(found.figures)
    return found


def _notes(ways: list[Way]) -> list[str]:
    """What a reader has to know beside the figures."""
    notes = [
        f"Delays and CPU are compared with {NAMES[ways[0]]}.",
        "Milliseconds of CPU are a call's and a second's; with 50 packets of speech and 5 timed"
        " checks a second from the client.",
        "With two CPUs what is in front shares one with the transceiver, in every way alike.",
        "Calls a core, in the arithmetic of ports, are this run's CPU time divided into a second.",
    ]
    if {Way.SESSION, Way.SERVER, Way.TURN} & set(ways):
        notes.append(
            "Without a relay each datagram is given the relay's header within the transceiver:"
            f" {bare.translation_us():.1f} us of the time that is shown."
        )
    if Way.TURN in ways:
        notes.append(
            "The TURN client asks for its permission and its channel beside its first checks, as"
            " Chromium does; one that waits for the channel takes a round trip more. `again_ms`"
            " begins when a client asks anew: that it has to notice comes before."
        )
    return notes


def approaches(
    only: Annotated[
        list[Way] | None, typer.Option(help="Measure this way; may be repeated (default: all).")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, max=CALLS_MAX, help="That talk at once.")] = 20,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=30, help="Of each measured piece of traffic.")
    ] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, max=10, help="Of traffic, each way in turn.")] = 3,
    delay_ms: Annotated[
        float, typer.Option(min=1, max=500, help="Each way, while calls are set up.")
    ] = 50.0,
    quick: Annotated[bool, typer.Option("--quick", help="Small, to see that it works.")] = False,
    as_json: options.AsJson = False,
    report: options.Report = None,
) -> None:
    """The same calls four ways, side by side: set-up, delay, CPU, public ports, and who survives.

    Straight to a port for each session, through one port of the server, through TURN (coturn), and
    through this relay. Everything is started here, on loopback, and ended again.
    """
    ways = [way for way in Way if only is None or not only or way in only]
    if quick:
        calls, seconds, rounds = min(calls, 3), min(seconds, 0.5), 1
    options.deliver(lambda: measure(ways, calls, seconds, rounds, delay_ms, quick), as_json, report)
