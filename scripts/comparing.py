"""What is measured of the ways in, one after the other in one run: see approaches.py.

What it owns: the order of things, how long each takes, and the tables that come out of it. All
that is started belongs to doors.Estate, all that talks to access.py.

Rules that stay true:
- Ways are measured in turns within a run, or at the same time; each round begins with another one.
- What disturbs the machine is not taken for a difference: it shows in how far runs may lie apart.
- A call that does not connect where it has to ends the run with a sentence.
"""

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import Sequence

import access
import aiohttp
import callers
import doors
import intervals
import numpy as np
import progress
import rig
import turning
from access import Access, Turns
from doors import NAMES, Estate, Way
from findings import Figures, Finding, Spread

TURN_S = (callers.TURN_PACKETS + callers.PAUSE_PACKETS) * callers.FRAME_MS / 1000
SETTLE_S = 2.5
"""Until every caller has said a brisk turn of two seconds and is being answered."""

PIECES = 6
"""Of the time in which delays are measured, each with new calls: a round of the interval
(intervals.py). What chance gives to a call, such as a relay's worker, is drawn anew in each."""

CHECKS_PER_S = 400.0
"""Timed ones, on all ways together."""

BEGUN_S = 0.4
"""After a turn's end its reply has begun: it takes 200 ms of silence to end one."""

SET_UPS = 5
KILLED_CALLS = 8
FLEET_CALLS = 16
WATCH_S, QUICK_WATCH_S = 5.0, 1.5
"""After a restart, for a call to be heard again: browsers' checks come every 2.5 s."""

FLEET_S = 2.0
"""For a call to connect on loopback, which takes 20 ms: checks are repeated every 50 ms."""

SURE_S = 20.0
"""Instead of these two where calls come through for sure, by this relay: the wait ends with that,
and a machine that stands still meanwhile is no verdict."""

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
        self.watch_s = QUICK_WATCH_S if quick else WATCH_S
        self.pieces = 2 if quick else PIECES
        self.turns, self.settle_s = (Turns.SHORT, 1.2) if quick else (Turns.BRISK, SETTLE_S)
        self.turn, self.turn_s = (Turns.SHORT, 1.2) if quick else (Turns.ONE, TURN_S + BEGUN_S)
        self.few = min(calls, 2 if quick else KILLED_CALLS)
        self.fleet_calls = 6 if quick else FLEET_CALLS

    def order(self, number: int) -> list[Way]:
        """The ways in the order of one round: each is the first one once."""
        ways = self.estate.ways
        at = number % len(ways)
        return ways[at:] + ways[:at]

    def _calling(
        self, way: Way, calls: int, turns: Turns
    ) -> contextlib.AbstractAsyncContextManager[list[Access]]:
        return access.calls(self.estate, way, calls, self.http, turns)

    # --- set-up ---------------------------------------------------------------------------

    async def set_up(self) -> None:
        """Calls through a delay, one at a time."""
        spent: dict[Way, list[dict[str, float]]] = {way: [] for way in self.estate.ways}
        with progress.bar("set-up", self.set_ups + 1) as moved:
            for number in range(self.set_ups + 1):
                for way in self.order(number):
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
        """Calls that talk: CPU, way by way, in turns; and what ports that takes."""
        windows: dict[Way, list[Figures]] = {way: [] for way in self.estate.ways}
        ports: dict[Way, Figures] = {}
        total = self.rounds * len(self.estate.ways)
        with progress.bar(f"{self.calls} calls that talk, {total} times", total) as moved:
            for number in range(self.rounds):
                for way in self.order(number):
                    async with self._calling(way, self.calls, self.turns) as accesses:
                        await access.talk(accesses, self.settle_s)
                        windows[way].append(await self._window(way, accesses))
                        ports[way] = self._ports(way, accesses)
                    moved(sum(map(len, windows.values())), NAMES[way])
        table = self.found.figures["traffic"] = []
        for way, each in windows.items():
            mean = {name: statistics.mean(row[name] for row in each) for name in each[0]}
            whole = [row["front"] + row["behind"] for row in each]
            table.append(
                {
                    "way": NAMES[way],
                    "front_cpu_ms": round(mean["front"], 3),
                    "transceiver_cpu_ms": round(mean["behind"], 2),
                    "cpu_ms": round(statistics.mean(whole), 2),
                    "cpu_ms_apart": _apart(statistics.mean(whole), whole, 2),
                    "up_per_s": round(mean["up"], 1),
                    "down_per_s": round(mean["down"], 1),
                }
            )
            self.found.must(bool(mean["down"]), f"{NAMES[way]}: no caller was answered")
        self.found.figures["ports"] = [self._scaled(way, row) for way, row in ports.items()]

    async def _window(self, way: Way, accesses: list[Access]) -> Figures:
        """A piece of time: CPU milliseconds a call and second, and packets a call and second."""
        front, behind = self.estate.front(way), self.estate.behind(way)
        heard = sum(len(one.who.arrivals) for one in accesses)
        begun, before = time.monotonic(), (sum(map(rig.cpu_s, front)), rig.cpu_s(behind))
        sent = await access.talk(accesses, self.seconds)
        used = sum(map(rig.cpu_s, front)) - before[0], rig.cpu_s(behind) - before[1]
        per = (time.monotonic() - begun) * len(accesses)
        heard = sum(len(one.who.arrivals) for one in accesses) - heard
        return {
            "front": 1000 * used[0] / per,
            "behind": 1000 * used[1] / per,
            "up": sent / per,
            "down": heard / 2 / per,
        }

    async def delay(self) -> None:
        """Calls on all ways at once, and checks that are timed, on one way after the other."""
        each, ways = max(1, self.calls // len(self.estate.ways)), self.estate.ways
        trips: dict[Way, list[intervals.Array]] = {way: [] for way in ways}
        with progress.bar(f"{each} calls on every way at once", self.pieces) as moved:
            for piece in range(self.pieces):
                async with contextlib.AsyncExitStack() as stack:
                    found = {
                        way: await stack.enter_async_context(self._calling(way, each, self.turns))
                        for way in self.order(piece)
                    }
                    # Neighbours are of different ways.
                    everyone = [found[way][number] for number in range(each) for way in found]
                    await access.talk(everyone, self.settle_s)
                    probing = asyncio.create_task(access.probe(everyone, 1 / CHECKS_PER_S))
                    stack.callback(probing.cancel)
                    await access.talk(everyone, 2 * self.seconds)
                    for way in ways:
                        trips[way].append(_trips_us(found[way]))
                moved(piece + 1, "")
        table = self.found.figures["delay"] = []
        for way in ways:
            row: Figures = {"way": NAMES[way], "checks": sum(map(len, trips[way]))}
            for name, percent in PERCENTILES.items():
                there = trips[ways[0]] if way is not ways[0] else None
                row |= _compared(name, percent, trips[way], there)
            table.append(row)
            every = np.concatenate(trips[way])
            values = every[:: max(1, -(-len(every) // SAMPLE))].tolist()
            self.found.spreads.append(Spread("Round trip of a check", NAMES[way], "us", values))

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
        patience_s = SURE_S if way is Way.RELAY else FLEET_S
        try:
            await asyncio.wait_for(one.connect(self.http, url, public), patience_s)
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
        async with self._calling(way, self.few, self.turn) as accesses:
            await access.talk(accesses, self.turn_s)
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
                await self._back(accesses, since_ns, SURE_S if way is Way.RELAY else self.watch_s)
                watched_s = time.monotonic() - watched
                back = [one for one in accesses if _lives(one, since_ns)]
                again_ms = await self._allocated_anew(accesses) if way is Way.TURN else None
            finally:
                talking.cancel()
            missed = {one: one.who.lost - lost[one] for one in back}
            # Without a packet missing nobody noticed anything, however long a pause there was.
            silence = [
                one.who.silence_ms(died_ns)
                for one in back
                if one.who.heard_since(since_ns) and (missed[one] or not worker)
            ]
        if way is Way.RELAY:
            what = "a worker" if worker else "the relay"
            self.found.must(
                len(back) == len(accesses), f"{what} was killed, and calls did not last"
            )
            if worker:
                packets = sum(missed.values())
                self.found.must(not packets, f"{packets} packets lost with a worker")
        none = 0 if back and worker else None
        return {
            "way": NAMES[way],
            "killed": "a worker" if worker else _KILLED[way],
            "calls": len(accesses),
            "survived": len(back),
            "down_ms": None if worker else round(down_ms),
            "silence_p50_ms": round(statistics.median(silence)) if silence else none,
            "silence_max_ms": round(max(silence)) if silence else none,
            "lost": sum(missed.values()) if back else None,
            "again_ms": again_ms,
            "watched_s": round(watched_s, 1),
        }

    async def _back(self, accesses: Sequence[Access], since_ns: int, patience_s: float) -> None:
        """Wait until all are heard again, and a little longer; or for so long."""
        with contextlib.suppress(TimeoutError):
            await self._until(
                lambda: all(one.who.heard_since(since_ns) for one in accesses), "", patience_s
            )

    async def _allocated_anew(self, accesses: list[Access]) -> int | None:
        """Milliseconds until a new allocation has a check of half of the calls answered; None if
        none has."""
        spent = await asyncio.gather(*(self._again(one) for one in accesses))
        found = [each for each in spent if each is not None]
        return round(1000 * statistics.median(found)) if found else None

    async def _again(self, one: Access) -> float | None:
        begun, since_ns = time.monotonic(), time.time_ns()
        try:
            await one.allocate_anew()
            deadline = begun + self.watch_s
            while not one.who.answered_since(since_ns):
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


def _lives(one: Access, since_ns: int) -> bool:
    """Whether anything has come from the transceiver since then."""
    return one.who.heard_since(since_ns) or one.who.answered_since(since_ns)


PERCENTILES = {"p50": 50.0, "p99": 99.0}


def _trips_us(accesses: list[Access]) -> intervals.Array:
    """The round trips that were timed since this was last asked."""
    found = np.concatenate([np.array(one.who.trips_ns, float) for one in accesses]) / 1000
    for one in accesses:
        one.who.trips_ns.clear()
    return found


def _compared(
    name: str, percent: float, here: list[intervals.Array], there: list[intervals.Array] | None
) -> Figures:
    """A percentile of round trips, and what it is more than another way's, over all pieces."""
    whole = _percentile(np.concatenate(here), percent)
    found: Figures = {f"trip_{name}_us": round(whole), f"added_{name}_us": 0}
    if there is None:
        return found
    more = whole - _percentile(np.concatenate(there), percent)
    each = [
        _percentile(one, percent) - _percentile(other, percent)
        for one, other in zip(here, there, strict=True)
    ]
    apart = _apart(more, each, 0)
    return found | {f"added_{name}_us": round(more), f"added_{name}_us_apart": apart}


def _percentile(values: intervals.Array, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan


def _apart(whole: float, rounds: Sequence[float], digits: int) -> float | None:
    """How far another run may lie from this one; None after too few rounds."""
    found = intervals.estimate(whole, rounds).apart
    return None if math.isnan(found) else round(found, digits)
