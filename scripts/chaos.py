"""flood.py chaos: parts are killed, restarted, moved while calls run, and what calls felt of it.

It brings up a system of its own on loopback (relay with two workers, two transceivers, signaling,
Redis), since what it kills must be its own. Calls are held through it (ringing.py), each talking
and being answered; beside them a stream of datagrams crosses the relay to a transceiver of its own
(stream.py), of which the relay must lose none. At random moments of a seed one thing after another
happens (faults.py). Of each it says what was lost and for how long there was silence, and whether
what the README promises was kept (promises.py).

Rules that stay true:
- One event at a time, with room to recover and for the reports in which a transceiver says what it
  lacks: a loss belongs to the event before it.
- Losses are counted, not estimated: the stream's by number on both ways; a call's downwards by
  sequence number, upwards by what the transceiver reports once a second.
- The same seed gives the same schedule, the same victims as far as calls are numbered alike.
- It ends by itself, and with it all that it started.
"""

import asyncio
import contextlib
import functools
import random
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated

import aiohttp
import dev
import faults
import firsts
import numpy as np
import options
import progress
import promises
import rig
import stream
import typer
from faults import KINDS, Planned, Scene
from findings import Figures, Finding, Marker, Series, Spread
from heard import GONE_MS
from promises import Record, Verdict
from ringing import Call, Return, Ringing
from subject import LateError, Subject, World

CALLS_MAX = 60
"""Beside relay, two transceivers and signaling on the same machine."""

SECONDS_MAX = 3600.0

CLIENTS, RATE_PER_S = 20, 1000
"""Of the stream: fifty datagrams a second each, as a call has."""

HOLD_S_MAX = 60.0
"""Until all calls talk."""

REPORT_S = 1.3
"""A transceiver reports once a second what it lacks: the end of each room is kept for that."""

BACK_NS = 20_000_000
"""What was on its way when something happened belongs to it."""

OVERRUN_S_MAX, EVENT_S_MAX = 180.0, 90.0
"""How much longer than its schedule a run may take, and how long an event may, all its waits in it.
Without room for another one a run ends with what there is: so it goes where a part never comes."""

SLICE_S = 0.1
"""Of the lines in plots."""

POINTS_MAX = 10_000
"""Of a distribution."""

TICK_S, STOOD_STILL_S = 0.005, 0.02
"""How often this process looks whether it runs, and how late that may be unnoticed."""


# --- the command ----------------------------------------------------------------------------------


def chaos(
    calls: Annotated[int, typer.Option(min=1, max=CALLS_MAX, help="Held all the while.")] = 10,
    seconds: Annotated[
        float, typer.Option(min=1, max=SECONDS_MAX, help="Room for events; 60 have all of them.")
    ] = 60.0,
    seed: options.Seed = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="EVENT", help=f"Nothing but this: {', '.join(KINDS)}. Repeatable."),
    ] = None,
    as_json: options.AsJson = False,
    report: options.Report = None,
) -> None:
    """Kill, restart, hand over, move while calls run; exit status 1 if a promise is broken.

    It starts a system of its own, and disturbs nothing else. `crash` is the control: a relay that
    is killed and has lost its descriptor store, which must be found to lose datagrams.
    """
    kinds = list(dict.fromkeys(only or faults.USUAL))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise typer.BadParameter(f"no event {unknown[0]}: there are {', '.join(KINDS)}")
    least = min(faults.seconds_for([kind]) for kind in kinds)
    if seconds < least:
        raise typer.BadParameter(f"{seconds:g} s have no room for an event: {least:g} have")
    chosen = secrets.randbits(32) if seed is None else seed
    options.deliver(lambda: measure(calls, seconds, chosen, kinds), as_json, report, seed=chosen)


def measure(calls: int, seconds: float, seed: int, kinds: list[str]) -> Finding:
    """Bring a system up, disturb it, take it down. Raises dev.StartError, StreamError."""
    finding = Finding(title=f"Chaos: {calls} calls, seed {seed}")
    if dev.redis_binary() is None and (left_out := [k for k in kinds if KINDS[k].redis]):
        finding.notes.append(f"there is no redis-server: without {', '.join(left_out)}")
        kinds = [kind for kind in kinds if kind not in left_out]
    plan = faults.schedule(seed, seconds, kinds)
    if missing := sorted(set(kinds) - {planned.kind for planned in plan}):
        room_s = faults.seconds_for(kinds)
        finding.notes.append(f"no room for {', '.join(missing)}: {room_s:g} s have")
    if not plan:
        raise dev.StartError("there is nothing that could happen")
    begins = functools.partial(Subject, managed=faults.managed_after(plan, -1))
    # The stream first: it is forked before there is any descriptor of the system.
    with (
        stream.Stream(CLIENTS) as beside,
        dev.running(None, True, "127.0.0.1", False, begins) as (system, about),
    ):
        assert isinstance(system, Subject)  # as asked for
        options.interruptible(Run(system, about, beside, seed, plan).through(calls, finding))
    return finding


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Window:
    """One event in time, and who was there. Nanoseconds of time.monotonic_ns()."""

    scene: Scene
    since_ns: int
    until_ns: int
    calls: list[Call]
    """Those that talked when it began."""


class Run:
    """A system, its calls and its stream, from the first event to the last."""

    def __init__(
        self,
        subject: Subject,
        about: dev.About,
        beside: stream.Stream,
        seed: int,
        plan: list[Planned],
    ) -> None:
        self._subject, self._about, self._beside = subject, about, beside
        self._seed, self._plan = seed, plan
        self._windows: list[Window] = []
        self._still: list[tuple[int, float]] = []
        """When this process had not run, in nanoseconds, and for how many milliseconds."""
        self._wanted: list[Call] = []
        self._began = 0
        self._ringing: Ringing

    async def through(self, calls: int, finding: Finding) -> None:
        """All of it. What was found goes into the finding. Raises dev.StartError, StreamError."""
        page, plan = self._about["page"], self._plan
        room = calls + 2 * len(plan) + 10
        async with (
            aiohttp.ClientSession(trust_env=False) as http,
            _ticking(self._still),
            Ringing(page, seed=self._seed, comes_back=True, at_once=room) as self._ringing,
        ):
            world = World(self._subject, self._about, http)
            most_s = plan[-1].at_s + plan[-1].room_s + OVERRUN_S_MAX
            self._begin_stream(world, most_s + HOLD_S_MAX)
            await self._hold(calls)
            finding.figures["calls"] = calls
            self._began = time.monotonic_ns()
            with progress.bar("chaos", plan[-1].at_s + plan[-1].room_s) as told:
                for planned in plan:
                    if self._seconds() > most_s - EVENT_S_MAX:
                        break
                    await self._happens(planned, world, told)
            self._judge_end(finding)
            speech = sum(call.sent for call in self._ringing.calls)
            last = self._beside.end()
        await self._settle(world)
        self._note(finding, last, world, speech)

    def _begin_stream(self, world: World, most_s: float) -> None:
        host, _, port = self._about["relay"].rpartition(":")
        first = firsts.check
        at = rig.CLUSTER.prefix.network_address + 1
        opening = [first(world.keyring, rig.CLUSTER, at, self._beside.port) for _ in range(CLIENTS)]
        self._beside.begin((host, int(port)), opening, RATE_PER_S, most_s)

    async def _hold(self, count: int) -> None:
        """Calls that talk. Raises dev.StartError."""
        with progress.bar(f"{count} calls", count) as told:
            holding = asyncio.create_task(self._ringing.hold(count, HOLD_S_MAX))
            while not holding.done():
                told(len(self._ringing.talking()), "")
                await asyncio.wait([holding], timeout=0.2)
            held = await holding
        failed = [f"{call.failure}: {call.why}" for call in held if call.failure]
        if failed or len(self._ringing.talking()) < count:
            talking = len(self._ringing.talking())
            raise dev.StartError(f"{talking} of {count} calls talk; {'; '.join(failed[:3])}")

    async def _happens(
        self, planned: Planned, world: World, told: Callable[[float, str], None]
    ) -> None:
        """One event, its recovery, and time for the reports about it."""
        words = KINDS[planned.kind].words

        seconds = self._seconds
        await _until(lambda: seconds() >= planned.at_s, lambda: told(seconds(), "calm"))
        begun_s = seconds()
        record = Record(planned.kind, at_s=begun_s)
        chance = random.Random(f"{self._seed} {planned.number} {planned.kind}")
        scene = Scene(world, self._ringing, chance, record, wanted=self._wanted)
        self._subject.managed = faults.managed_after(self._plan, planned.number)
        window = Window(scene, time.monotonic_ns() - BACK_NS, 0, scene.calls())
        doing = asyncio.create_task(_done(scene, KINDS[planned.kind]))
        try:
            await _until(doing.done, lambda: told(seconds(), words))
        finally:
            doing.cancel()  # harmless for what is done
            await doing
        await self._look_after(record)
        ends_s = max(begun_s + planned.room_s, seconds() + REPORT_S)
        await _until(
            lambda: seconds() >= ends_s - REPORT_S, lambda: told(seconds(), f"{words}: after it")
        )
        window.until_ns = time.monotonic_ns()
        self._windows.append(window)
        await _until(lambda: seconds() >= ends_s, lambda: told(seconds(), "reports"))

    def _seconds(self) -> float:
        """Since the first event was waited for."""
        return (time.monotonic_ns() - self._began) / 1e9

    async def _look_after(self, record: Record) -> None:
        """What has ended by itself is noted, and started again, as systemd would."""
        for name, process in list(self._subject.running.items()):
            if (code := process.poll()) is None:
                continue
            record.failed = f"{name} ended by itself with {code}; {record.failed}".rstrip("; ")
            with contextlib.suppress(LateError):  # the next event will not be able to hit it
                await self._subject.again(name, "ready|eady to accept connections")

    async def _settle(self, world: World) -> None:
        """Wait until nothing waits in the relay any more: what it counts is complete then."""
        with contextlib.suppress(LateError):  # then the law does not hold, and that is said
            await self._subject.until(
                lambda: not world.relay.law()["missing"], "the relay's counters", 3.0
            )

    # --- what was found ---------------------------------------------------------------------------

    def _judge_end(self, finding: Finding) -> None:
        """All has happened, and every held call talks but those that an event has ended."""
        left = [planned.kind for planned in self._plan[len(self._windows) :]]
        finding.must(
            not left,
            f"the run was far behind its schedule and was ended: without {', '.join(left)}",
        )
        ended = [call for window in self._windows for call in window.scene.ended]
        held = [call for call in self._ringing.calls if call not in self._wanted + ended]
        gone = [f"call {each.number} is {each.state}" for each in held if each.state != "talking"]
        finding.must(not gone, f"at the end not all calls talk: {', '.join(gone)}")

    def _note(self, finding: Finding, last: stream.Told, world: World, speech: int) -> None:
        records = [felt(window, last, self._still) for window in self._windows]
        law, account = world.relay.law(), last.account
        ports = last.ports | {world.relay.public, world.relay.internal}
        law["kernel_drops"] = rig.kernel_drops(set(ports)) + world.relay.kernel_drops()
        crashed = any(record.event == "crash" for record in records)
        rows = [*promises.judged(records), *lawful(law, last, speech, crashed)]
        finding.figures |= {
            "calls_made": len(self._ringing.calls),
            "stream": {"clients": CLIENTS, "rate_per_s": RATE_PER_S} | account.figures(),
            "law": law,
            "schedule": [
                {"at_s": round(each.at_s, 2), "event": each.kind, "room_s": each.room_s}
                for each in self._plan
            ],
            "events": [record.row() for record in records],
            "other_calls": [record.row_of_others() for record in records],
            "calls_that_were_hit": [record.row_of_own() for record in records if record.own],
            "facts": {
                f"{record.event} at {record.at_s:.1f} s": record.facts | {"failed": record.failed}
                for record in records
                if record.facts or record.failed
            },
            "promises": [
                {name: value for name, value in row.items() if name != "readme"} for row in rows
            ],
            "in_the_words_of_the_readme": {
                f"{row['event']}: {row['promise']}": row["readme"] for row in rows
            },
        }
        for row in rows:
            finding.must(
                row["verdict"] != promises.BROKEN,
                f"{row['event']}, {row['at_s']} s: {row['promise']}: {row['evidence']}; "
                f"README: {row['readme']}",
            )
        finding.notes.append(
            f"silence upwards is {FRAME_MS:g} ms for each packet lost of the call that lost most; "
            "downwards it is measured. The stream goes there and back"
        )
        if any(record.event == "restart" for record in records):
            finding.notes.append(
                "restarts go through a stand-in for systemd's descriptor store (rig.py); before a "
                "handover the relay runs without a service manager, with which it refuses one"
            )
        self._draw(finding, last)

    def _draw(self, finding: Finding, last: stream.Told) -> None:
        began, account = self._began, last.account
        end_s = self._windows[-1].until_ns / 1e9 - began / 1e9
        edges = np.arange(0.0, end_s + SLICE_S, SLICE_S)
        middles = [round(float(each), 3) for each in edges[:-1] + SLICE_S / 2]

        def line(
            plot: str, name: str, unit: str, at_ns: "np.ndarray[tuple[int], np.dtype[np.int64]]"
        ) -> None:
            counts, _ = np.histogram((np.asarray(at_ns) - began) / 1e9, edges)
            finding.series.append(Series(plot, name, unit, middles, [float(n) for n in counts]))

        heard = array("q")
        for call in self._ringing.calls:
            heard.extend(call.heard.at_ns)
        back = account.back_at > 0
        plot = f"Heard in each {SLICE_S * 1000:.0f} ms"
        line(plot, "packets of calls", "packets", np.frombuffer(heard, np.int64))
        line(plot, "datagrams of the stream", "packets", account.back_at[back])
        line("Lost of the stream", "by when it was sent", "datagrams", account.sent_at[~back])
        at_s, trips = (account.sent_at[back] - began) / 1e9, account.trips_us(account.sent_at) / 1e3
        slot = np.digitize(at_s, edges) - 1
        most = np.zeros(len(edges))
        inside = (slot >= 0) & (slot < len(edges))
        np.maximum.at(most, slot[inside], trips[inside])
        finding.series.append(
            Series("Round trip of the stream", "longest", "ms", middles, most[:-1].tolist())
        )
        sample = trips[:: max(1, len(trips) // POINTS_MAX)]
        finding.spreads.append(
            Spread("Round trip of the stream", "all of it", "ms", sample.tolist())
        )
        for window in self._windows:
            record = window.scene.record
            words = f"{KINDS[record.event].words} ({record.hit})".replace(" ()", "")
            finding.markers.append(Marker(record.at_s, words))


# --- what was felt of one event -------------------------------------------------------------------

FRAME_MS = 20.0
"""Of speech, in a packet."""


def felt(window: Window, last: stream.Told, still: list[tuple[int, float]]) -> Record:
    """The window's record, with what stream and calls felt of the event."""
    record, scene = window.scene.record, window.scene
    since, until, account = window.since_ns, window.until_ns, last.account
    inside = (account.sent_at >= since) & (account.sent_at < until)
    record.sent = int(inside.sum())
    record.lost = stream.lost(account, since, until)
    record.held_ms = account.held_ms(since, until)
    record.stream_silence_ms = stream.silence_ms(account, since, until)
    late_ms = (account.sent_at - account.intended_at)[inside].max(initial=0) / 1e6
    own_still = [ms for at_ns, ms in still if since <= at_ns <= until]
    record.stood_still_ms = max([float(late_ms), *own_still])
    others = [call for call in window.calls if call not in scene.own + scene.ended]
    record.calls, record.own = len(others), len(scene.own)
    reported = [call.lost_up(since, until) for call in others]
    up = [each for each in reported if each is not None]
    record.unknown = len(reported) - len(up)
    record.lost_up, record.silence_up_ms = sum(up), FRAME_MS * max(up, default=0)
    record.lost_down = sum(call.lost_down(since, until) for call in others)
    record.silence_ms = max((call.silence_ms(since, until) for call in others), default=0.0)
    for call in others:
        record.ended += _ends(call, since, until)
        if _returns(call, since, until):
            record.ended.append(f"call {call.number} had to come back")
        elif call.silent_ms(since, until) > GONE_MS:
            record.ended.append(f"call {call.number} hears nothing any more")
    for call in scene.own:
        record.own_ended += _ends(call, since, until)
        record.own_lost_up += call.lost_up(since, until) or 0
        record.own_lost_down += call.lost_down(since, until)
        record.own_silence_ms = max(record.own_silence_ms, call.silence_ms(since, until))
        back = _returns(call, since, until)
        back_ms = [(at - each.heard_ns) / 1e6 for each in back if (at := each.connected_ns)]
        record.came_back += bool(back_ms)
        record.back_ms += back_ms
        if len(back_ms) < len(back) and not call.failure:
            record.own_ended.append(f"call {call.number} has not come back")
    return record


def _ends(call: Call, since: int, until: int) -> list[str]:
    if call.ended_ns is None or not since <= call.ended_ns <= until:
        return []
    return [f"call {call.number} {call.failure or 'ended'}: {call.why}".rstrip(": ")]


def _returns(call: Call, since: int, until: int) -> list[Return]:
    """Its returns that began in that time, those that came to nothing, too."""
    return [each for each in call.returns if since <= each.noticed_ns <= until]


def lawful(law: Figures, last: stream.Told, speech: int, crashed: bool) -> list[Figures]:
    """The promise about the relay's counters, of the whole run, in which the stream and so many
    packets of speech were sent."""
    account, missing = last.account, law["missing"]
    # What the kernel dropped never came. A relay that has crashed has counted for itself alone.
    sent, came = last.datagrams + speech, law["received"] + law["kernel_drops"]
    counted = crashed or came >= sent
    verdict = Verdict(
        not missing and counted and not account.duplicated and not account.foreign,
        f"{law['received']} received of {sent} and more, {missing} in no counter; of the "
        f"stream's {last.datagrams} {account.duplicated} came twice, {account.foreign} changed or "
        "misdirected",
    )
    bound = "no datagram is in no counter; none comes twice or changed"
    return [promises.row("whole run", None, bound, promises.LAW, verdict)]


# --- time -----------------------------------------------------------------------------------------


async def _done(scene: Scene, kind: faults.Kind) -> None:
    """Do it; what does not come of it is noted, and the rest goes on."""
    try:
        await kind.does(scene)
    except (LateError, OSError) as error:  # OSError: what it was about to hit is not there
        scene.record.failed = str(error) or type(error).__name__


async def _until(holds: Callable[[], bool], meanwhile: Callable[[], None]) -> None:
    while not holds():
        meanwhile()
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def _ticking(still: list[tuple[int, float]]) -> AsyncIterator[None]:
    """Note when this process, and what is in it, did not run."""

    async def tick() -> None:
        before = time.monotonic_ns()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic_ns()
            late_s = (now - before) / 1e9 - TICK_S
            if late_s > STOOD_STILL_S:
                still.append((now, late_s * 1000))
            before = now

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
