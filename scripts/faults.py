"""What chaos.py does to a running system: the events, and the schedule that a seed gives.

What it owns: `schedule`, which is arithmetic, and a function for each event that does it, waits
until it is over, and notes what only it can know (whose lease ended when, who took over how soon).
What calls and stream felt is measured by its caller, for all events alike.

Rules that stay true:
- Everything random of an event comes from its own generator, whose seed is the run's, the event's
  number and its name: which worker, which call, how long Redis is away.
- An event leaves the system as it found it: what was killed runs again, files are as they were.
- What does not come in time is an entry in the record (`failed`), and the next event goes on.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import rig
from promises import Record
from ringing import Call, Ringing
from subject import POLL_S, LateError, World

# --- the schedule ---------------------------------------------------------------------------------

LEAD_S = 0.5
"""Before the first event."""

GAP_S = (0.1, 0.5)
"""Between the end of one event's room and the next event, at random: they fall into any phase of
beats, checks and reports."""


@dataclass(frozen=True)
class Planned:
    """One event of a schedule."""

    number: int
    kind: str
    at_s: float
    """Since the first call talked; later, if the events before it took longer than their room."""
    room_s: float
    """For the event, its recovery, and the reports of what was felt."""


def schedule(seed: int, seconds: float, kinds: list[str]) -> list[Planned]:
    """Events in random order at random moments, each kind once before any of them twice, as many
    as there is room for in so many seconds."""
    chance = random.Random(seed)
    plan: list[Planned] = []
    now, before = LEAD_S, -1
    while len(plan) > before:
        before = len(plan)
        for kind in chance.sample(kinds, len(kinds)):
            at, room = now + chance.uniform(*GAP_S), ROOM_S[kind]
            if at + room <= seconds:
                plan.append(Planned(len(plan), kind, at, room))
                now = at + room
    return plan


def seconds_for(kinds: list[str]) -> float:
    """So long a run has room for each of them once, whatever the seed."""
    return LEAD_S + sum(ROOM_S[kind] + GAP_S[1] for kind in kinds)


def managed_after(plan: list[Planned], number: int) -> bool:
    """Whether the relay has to have a service manager behind the event of that number (-1: at the
    beginning), for the next restart or handover of the plan: the first needs one, and the second
    is refused by a relay that has one."""
    after = [each.kind for each in plan if each.number > number]
    return next((kind != "handover" for kind in after if kind in ("restart", "handover")), True)


# --- what an event works with ---------------------------------------------------------------------

NEW_CALL_S_MAX = 10.0
"""For a new call, with all its repetitions: longer is never."""

AGAIN_S = 0.2
"""Between two attempts at a new call."""


@dataclass
class Scene:
    """One event: the system, its calls, and chance."""

    world: World
    ringing: Ringing
    chance: random.Random
    record: Record
    own: list[Call] = field(default_factory=list)
    """Calls that the event is about."""
    ended: list[Call] = field(default_factory=list)
    """Calls that it ends itself."""
    wanted: list[Call] = field(default_factory=list)
    """New calls that were only made to see whether they can be, of all events."""

    def calls(self) -> list[Call]:
        """Those that are held and talk, the oldest first."""
        return [call for call in self.ringing.talking() if call not in self.wanted]

    @contextlib.asynccontextmanager
    async def somebody_calls(self) -> AsyncIterator[None]:
        """While the block runs, a new call is made; left when that has connected, or never will."""
        calling = asyncio.create_task(self.new_call())
        try:
            yield
        except asyncio.CancelledError:
            calling.cancel()
            raise
        finally:
            await calling

    async def new_call(self) -> None:
        """Make one more call, again and again until it connects, and end it."""
        record, began, refused = self.record, time.monotonic(), list[str]()
        until = began + NEW_CALL_S_MAX
        while time.monotonic() < until:
            call = await begun(self.ringing)
            self.wanted.append(call)
            while not (over := _connected(call)) and time.monotonic() < until:
                await asyncio.sleep(POLL_S)
            await call.end()
            if over and call.failure is None:
                offered_ms = call.offered_ns / 1e6 - began * 1000
                record.new_call_ms = offered_ms + call.moments["connected"]
                break
            refused.append(call.failure or "not connected")
            await asyncio.sleep(AGAIN_S)
        record.new_call = ", ".join(refused)


async def begun(ringing: Ringing) -> Call:
    """One more call, that talks until it is ended; returns once it has begun."""
    count = len(ringing.calls)
    await ringing.hold(1, 0.0)
    return ringing.calls[count]


def _connected(call: Call) -> bool:
    return "connected" in call.moments or call.failure is not None


# --- the relay ------------------------------------------------------------------------------------

_SERVES_AGAIN = r"worker {number} serves again after ([\d.]+) ms"


async def worker(scene: Scene) -> None:
    """kill -9 of a worker."""
    world, record = scene.world, scene.record
    number = scene.chance.randrange(world.relay.workers)
    await world.subject.until(lambda: number in world.relay.workers_now(), f"worker {number}")
    pids, since = world.relay.workers_now(), world.subject.said("relay")
    record.hit = f"worker {number}"
    os.kill(pids[number], signal.SIGKILL)
    async with scene.somebody_calls():
        found = await world.subject.says("relay", _SERVES_AGAIN.format(number=number), since)
        record.took_ms = float(found[1])


async def restart(scene: Scene) -> None:
    """What `systemctl restart` does: SIGINT, and another one with what the store has."""
    world, record = scene.world, scene.record
    subject, began = world.subject, time.monotonic()
    process = world.relay.process
    record.facts["descriptors_stored"] = len(subject.store.held)
    process.send_signal(signal.SIGINT)  # RestartKillSignal= of the unit
    async with scene.somebody_calls():
        await subject.until(lambda: process.poll() is not None, "the relay stops")
        await subject.again("relay", rig.READY_LINE)
        world.adopt()
        record.took_ms = (time.monotonic() - began) * 1000


async def handover(scene: Scene) -> None:
    """`relay handover` to another process."""
    began = time.monotonic()
    async with scene.somebody_calls():
        await scene.world.succeed()
        scene.record.took_ms = (time.monotonic() - began) * 1000


async def crash(scene: Scene) -> None:
    """The control: the relay is killed hard, and what it had stored is thrown away."""
    world, record = scene.world, scene.record
    subject, began = world.subject, time.monotonic()
    subject.kill("relay")
    subject.store.forget()
    async with scene.somebody_calls():
        await subject.again("relay", rig.READY_LINE)
        world.adopt()
        record.took_ms = (time.monotonic() - began) * 1000


NEEDS_RESTART = "batch_size = 200"
"""A setting of `[relay]` that a reload cannot change."""


async def reload(scene: Scene) -> None:
    """SIGHUP to the relay, with a setting in its file that needs a restart."""
    world, record = scene.world, scene.record
    subject, config = world.subject, world.relay.config
    before, text = set(world.relay.workers_now().values()), config.read_text()
    since, began = subject.said("relay"), time.monotonic()
    config.write_text(text.replace("[relay]\n", f"[relay]\n{NEEDS_RESTART}\n", 1))
    async with scene.somebody_calls():
        try:
            world.wake()
            await subject.says("relay", r"\breloaded\b", since)
        finally:
            config.write_text(text)
        await subject.until(
            lambda: len(world.relay.workers_now()) == world.relay.workers, "workers serve again"
        )
        record.took_ms = (time.monotonic() - began) * 1000
    after = set(world.relay.workers_now().values())
    record.hit = f"{len(after - before)} workers replaced"
    named = "relay.batch_size is changed by a restart"
    record.facts["named"] = named in subject.log("relay", since)
    if before & after:
        raise LateError(f"{len(before & after)} workers were not replaced")


# --- clients --------------------------------------------------------------------------------------


async def port(scene: Scene) -> None:
    """A call's NAT gives it another port, of the same address or of another one that it has, and
    the call's ICE does not know."""
    await _move(scene, check=False, near=scene.chance.random() < 0.5)


async def address(scene: Scene) -> None:
    """A call changes its network, and checks the new path."""
    await _move(scene, check=True, near=False)


MOVED_S = 1.5
"""How long a call that moved is looked at before anything else happens."""


async def _move(scene: Scene, check: bool, near: bool) -> None:
    calls = scene.calls()
    if not calls:
        scene.record.failed = "no call talks"
        return
    call = scene.chance.choice(calls)
    where = "another port" if near else "another address"
    scene.own, scene.record.hit = [call], f"call {call.number}, {where}"
    call.move(check=check, near=near)
    await asyncio.sleep(MOVED_S)
    await scene.new_call()


# --- Redis ----------------------------------------------------------------------------------------

AWAY_S = (1.5, 3.0)
"""How long Redis is away: longer than a lease, so that all of them have ended when it is back."""


async def redis(scene: Scene) -> None:
    """Redis is stopped or killed, and comes back with nothing."""
    world, record, chance = scene.world, scene.record, scene.chance
    subject, since = world.subject, world.subject.said("relay")
    how = chance.choice((signal.SIGKILL, signal.SIGTERM))
    away_s = chance.uniform(*AWAY_S)
    record.hit = f"{how.name}, away for {away_s:.1f} s"
    subject.kill("redis", how)
    await subject.until(lambda: subject.running["redis"].poll() is not None, "Redis stops")
    async with scene.somebody_calls():
        await asyncio.sleep(away_s)
    await subject.again("redis", "eady to accept connections")
    began = time.monotonic()
    await subject.says("relay", r"redis is back|redis lost what it had", since)
    await subject.until(
        lambda: all(map(world.leased, world.transceivers)), "transceivers stand in Redis again"
    )
    await world.until_serving(len(world.transceivers))
    record.took_ms = (time.monotonic() - began) * 1000
    record.facts["known_again"] = True


# --- transceivers ---------------------------------------------------------------------------------

BACK_S_MAX = 8.0
"""Until all calls of a transceiver that died have come back, or have not."""


async def transceiver(scene: Scene) -> None:
    """kill -9 of a transceiver; its calls come back elsewhere; then it is started again."""
    world, record, subject = scene.world, scene.record, scene.world.subject
    number = scene.chance.randrange(len(world.transceivers))
    homes = [world.home(call.call_id) for call in scene.calls()]
    if world.transceivers[number] not in homes:  # else the other one has them all
        number = (number + 1) % len(world.transceivers)
    victim, name = world.transceivers[number], f"transceiver-{number + 1}"
    scene.own = [call for call in scene.calls() if world.home(call.call_id) == victim]
    returns = {call.number: len(call.returns) for call in scene.own}
    record.hit = f"{name}, {len(scene.own)} calls"
    subject.kill(name)
    began, late = time.monotonic(), None
    try:
        async with scene.somebody_calls():
            await subject.until(lambda: not world.leased(victim), "its lease ends")
            record.facts["lease_ms"] = round((time.monotonic() - began) * 1000)
            await subject.until(
                lambda: all(_is_back(call, returns[call.number]) for call in scene.own),
                "its calls come back",
                BACK_S_MAX,
            )
    except LateError as error:
        late = error
    _note_returns(scene, victim, returns)
    await subject.again(name)
    ready = time.monotonic()
    await world.until_serving(len(world.transceivers))
    record.facts["announced_ms"] = round((time.monotonic() - ready) * 1000)
    while await _home_of_a_call(scene) != victim:
        if time.monotonic() > ready + NEW_CALL_S_MAX:
            raise LateError(f"{name} gets no calls")
    record.facts["got_a_call_ms"] = round((time.monotonic() - ready) * 1000)
    if late:
        raise late


async def _home_of_a_call(scene: Scene) -> str | None:
    """The transceiver that a new call gets, which is ended at once; None if it gets none."""
    call = await begun(scene.ringing)
    scene.wanted.append(call)
    while not _connected(call):
        await asyncio.sleep(POLL_S)
    await call.end()
    return scene.world.home(call.call_id)


def _is_back(call: Call, before: int) -> bool:
    if call.failure is not None:
        return True
    return len(call.returns) > before and call.returns[-1].resumed is not None


_ITEM = "conversation.item.added"


def _note_returns(scene: Scene, victim: str, before: dict[int, int]) -> None:
    """What became of the calls of a transceiver that died."""
    facts = scene.record.facts
    back = [call for call in scene.own if len(call.returns) > before[call.number]]
    back = [call for call in back if call.returns[-1].connected_ns is not None]
    facts["resumed"] = sum(call.returns[-1].resumed is True for call in back)
    facts["elsewhere"] = sum(scene.world.home(call.call_id) != victim for call in back)
    facts["items_kept"] = [_items_kept(call) for call in back]


def _items_kept(call: Call) -> int:
    """How many items a call was told of when it came back, right behind `session.created`."""
    offered = call.returns[-1].offered_ns or 0
    kinds = [kind for at_ns, kind in call.events if at_ns >= offered]
    if "session.created" not in kinds:
        return 0
    after = kinds[kinds.index("session.created") + 1 :]
    first_other = next(
        (n for n, kind in enumerate(after) if not re.match(r"conversation\.item\.", kind)),
        len(after),
    )
    return after[:first_other].count(_ITEM)


# --- signaling ------------------------------------------------------------------------------------

DOWN_S = (0.2, 1.0)
"""How long there is no signaling."""


async def signaling(scene: Scene) -> None:
    """kill -9 of signaling; the next one hangs up a call that it never saw."""
    world, record, chance = scene.world, scene.record, scene.chance
    world.subject.kill("signaling")
    began = time.monotonic()
    await asyncio.sleep(chance.uniform(*DOWN_S))
    await world.subject.again("signaling")
    record.took_ms = (time.monotonic() - began) * 1000
    record.hit = f"away for {record.took_ms / 1000:.1f} s"
    await world.until_serving(len(world.transceivers))
    calls = scene.calls()
    if calls:
        call = chance.choice(calls)
        scene.ended.append(call)
        status = await world.hang_up(call.call_id or "")
        await world.subject.until(
            lambda: call not in scene.calls(), "the call that was hung up ends"
        )
        record.facts["hung_up"] = status == 200
    await scene.new_call()
    if calls:
        await begun(scene.ringing)  # in the place of the one that was hung up


BROKEN = "[signaling\nlisten ="
"""No TOML."""


async def settings(scene: Scene) -> None:
    """SIGHUP to signaling with a file that is broken, then with the one from before."""
    record, subject = scene.record, scene.world.subject
    path = subject.state_dir / "signaling.toml"
    text, since = path.read_text(), subject.said("signaling")
    path.write_text(BROKEN)
    try:
        subject.kill("signaling", signal.SIGHUP)
        found = await subject.says("signaling", r"going on with the configuration.*", since)
        record.facts["named"] = path.name in found[0]
        await scene.new_call()
    finally:
        path.write_text(text)
    since = subject.said("signaling")
    subject.kill("signaling", signal.SIGHUP)
    await subject.says("signaling", r"\breloaded\b", since)


@dataclass(frozen=True)
class Kind:
    """One kind of event."""

    does: Callable[[Scene], Awaitable[None]]
    room_s: float
    words: str
    """For the progress bar and the report's markers."""
    redis: bool = False
    """It needs Redis."""
    control: bool = False
    """It breaks a promise, to see whether that is found; it happens only when it is named."""


KINDS = {
    "worker": Kind(worker, 3.5, "a worker is killed"),
    "restart": Kind(restart, 6.0, "the relay restarts"),
    "handover": Kind(handover, 6.0, "the relay hands over"),
    "reload": Kind(reload, 4.5, "the relay reloads"),
    "port": Kind(port, 3.5, "a NAT gives another port"),
    "address": Kind(address, 3.5, "a client changes its address"),
    "redis": Kind(redis, 7.5, "Redis is away", redis=True),
    "transceiver": Kind(transceiver, 10.0, "a transceiver is killed", redis=True),
    "signaling": Kind(signaling, 6.0, "signaling is killed"),
    "settings": Kind(settings, 3.5, "signaling reloads"),
    "crash": Kind(crash, 6.0, "the relay crashes, its store is lost", control=True),
}
"""By the name that the command line knows them by. All but the control have room in a minute."""

USUAL = [name for name, kind in KINDS.items() if not kind.control]

ROOM_S = {name: kind.room_s for name, kind in KINDS.items()}
