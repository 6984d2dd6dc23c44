"""flood.py calls: complete WebRTC calls through signaling, at a rate, and what they were like.

Calls arrive at random (a Poisson process of the seed's), or evenly. Each is made by ringing.py as a
page makes it, talks for some seconds, and ends. Its turns are answered while it goes on talking;
a share of the calls listens instead, and interrupts. The first whole reply of each call, or of a
sample, is decoded and compared with what was said. tally.py makes figures of all that.

Rules that stay true:
- No more than `--at-once` calls are under way; what is due beyond that is counted and not made.
- Offers go to the page that was named, media to the candidates of its answers, and both only where
  target.guard lets them.
- A server that is wrong, slow or gone gives calls that failed, by reason, and exit status 1.

The parrot is expected behind it: with another model server, `--no-compare` leaves out what only a
parrot can do.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import dev
import options
import progress
import tally
import target
import typer
from findings import Finding
from rig import cpu_s, tree
from ringing import AT_ONCE_MAX, Ringing

RATE_MAX = 100.0
"""A handshake is 5 ms of this process: at 100 a second it would do nothing else by half."""

SECONDS_MAX, TALK_S_MAX = 3_600.0, 600.0

CALL_SECONDS_MAX = 100_000
"""Of all calls together, fifty for half an hour: what is kept of them has some 250 MB then."""

ECHOES_MAX = 400
"""Replies that are kept and compared: 15 kB and some 10 ms of computing each, after the calls."""

SAMPLE_S = 1.0


@dataclass
class Plan:
    """What is called, and how."""

    page: str
    key: str | None
    rate: float
    seconds: float
    talk: float
    at_once: int
    seed: int
    even: bool = False
    interrupting: float = 0.0
    vanishing: float = 0.0
    compare: bool = True
    owned: bool = False


@dataclass
class Beside:
    """What was seen beside the calls while they ran."""

    begun_ns: int = field(default_factory=time.monotonic_ns)
    at_s: list[float] = field(default_factory=list)
    under_way: list[float] = field(default_factory=list)
    own_cpu: list[float] = field(default_factory=list)
    """Of a core, in per cent."""
    server_cpu: dict[str, list[float]] = field(default_factory=dict)
    """The same of each program, where it was started here."""
    ended_ns: int = 0


Programs = dict[str, int]
"""Names and process ids of what was started."""


async def run(plan: Plan, programs: Programs) -> Finding:
    """Make the calls. Raises target.TargetError."""
    beside = Beside()
    expected = max(1.0, plan.rate * plan.seconds)
    async with Ringing(
        plan.page,
        key=plan.key,
        seed=plan.seed,
        owned=plan.owned,
        at_once=plan.at_once,
        vanishing=plan.vanishing,
        interrupting=plan.interrupting,
        checking=min(1.0, ECHOES_MAX / expected) if plan.compare else 0.0,
    ) as ringing:
        beside.begun_ns = time.monotonic_ns()
        watching = asyncio.create_task(_watch(ringing, beside, programs))
        with progress.bar("calls", plan.seconds + plan.talk) as told:

            def tell(seconds: float) -> None:
                failed = sum(call.failure is not None for call in ringing.calls)
                words = f"{len(ringing.calls)} made, {ringing.under_way} now, {failed} failed"
                told(min(seconds, plan.seconds + plan.talk), words)

            await ringing.run(plan.rate, plan.seconds, plan.talk, poisson=not plan.even, told=tell)
        beside.ended_ns = time.monotonic_ns()
        watching.cancel()
    _compare(ringing)
    return tally.finding(plan, ringing, beside)


def _compare(ringing: Ringing) -> None:
    """Decode the replies that were kept. A call whose reply is not what it said has failed."""
    kept = [call for call in ringing.calls if call.echo is not None and call.echo.whole]
    if not kept:
        return
    with progress.bar("comparing replies", len(kept)) as told:
        for number, call in enumerate(kept, 1):
            echo = call.echo
            if echo is not None and echo.compare() is not None and not echo.right:
                call.fail("wrong audio", f"the reply correlates by {echo.correlation:.2f} only")
            told(number, "")


async def _watch(ringing: Ringing, beside: Beside, programs: Programs) -> None:
    """Sample how many calls there are, and what everything costs."""
    trees = {name: tree(pid) for name, pid in programs.items()}

    def spent() -> dict[str, float]:
        found = {"": time.process_time()}
        for name, pids in trees.items():
            found[name] = 0.0
            for pid in pids:
                with contextlib.suppress(OSError):  # it has ended
                    found[name] += cpu_s(pid)
        return found

    before, before_ns = spent(), time.monotonic_ns()
    while True:
        await asyncio.sleep(SAMPLE_S)
        after, after_ns = spent(), time.monotonic_ns()
        took_s = (after_ns - before_ns) / 1e9
        share = {name: 100 * (after[name] - before[name]) / took_s for name in after}
        beside.at_s.append((after_ns - beside.begun_ns) / 1e9)
        beside.under_way.append(ringing.under_way)
        beside.own_cpu.append(share.pop(""))
        for name, value in share.items():
            beside.server_cpu.setdefault(name, []).append(value)
        before, before_ns = after, after_ns


@contextlib.contextmanager
def _system(page: str | None) -> Iterator[tuple[str, Programs]]:
    """The page, and the processes behind it where they are started for this."""
    if page is not None:
        yield page, {}
        return
    with dev.running(None, True, "127.0.0.1", False) as (system, about):
        yield about["page"], {name: process.pid for name, process in system.running.items()}


def calls(
    page: Annotated[
        str | None, typer.Option(metavar="URL", help="Signaling, for example http://HOST:8080/.")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="Call a system that is started for it, on loopback.")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with an API key of signaling.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=RATE_MAX, help="Calls a second.")] = 2.0,
    seconds: Annotated[
        float, typer.Option(min=1, max=SECONDS_MAX, help="For so long calls begin.")
    ] = 20.0,
    talk: Annotated[
        float, typer.Option(min=1, max=TALK_S_MAX, help="Seconds that a call lasts.")
    ] = 10.0,
    at_once: Annotated[
        int, typer.Option(min=1, max=AT_ONCE_MAX, help="No more calls than that at a time.")
    ] = 100,
    even: Annotated[bool, typer.Option("--even", help="Calls come evenly, not at random.")] = False,
    interrupting: Annotated[
        float, typer.Option(min=0, max=1, help="Share of calls that interrupt replies.")
    ] = 0.2,
    vanishing: Annotated[
        float, typer.Option(min=0, max=1, help="Share of calls that end without a goodbye.")
    ] = 0.0,
    compare: Annotated[
        bool, typer.Option(help="Replies are to be what was said: a parrot is behind it.")
    ] = True,
    seed: options.Seed = None,
    owned: options.Owned = False,
    as_json: options.AsJson = False,
    report: options.Report = None,
) -> None:
    """Complete WebRTC calls through signaling: set-up, replies, interruptions, gaps, failures."""
    if start == (page is not None):
        raise typer.BadParameter("say --page URL, or --start")
    if rate * seconds * talk > CALL_SECONDS_MAX:
        raise typer.BadParameter(
            f"these are {rate * seconds * talk:,.0f} seconds of calls, and {CALL_SECONDS_MAX:,} are"
            " what is kept: a lower --rate, less --seconds, or a shorter --talk"
        )
    drawn = secrets.randbits(32) if seed is None else seed
    key = _key(key_file)

    def measure() -> Finding:
        if page is not None:
            target.page(page, owned)
        with _system(page) as (url, programs):
            plan = Plan(
                url, key, rate, seconds, talk, at_once, drawn,
                even, interrupting, vanishing, compare, owned,
            )  # fmt: skip
            return options.interruptible(run(plan, programs))

    options.deliver(measure, as_json, report, seed=drawn)


def _key(path: Path | None) -> str | None:
    """The API key in a file. Raises typer.BadParameter."""
    if path is None:
        return None
    try:
        found = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--key-file: {error}") from error
    if not found or len(found.split()) != 1:
        raise typer.BadParameter(f"--key-file: {os.fspath(path)} has not one key in it")
    return found
