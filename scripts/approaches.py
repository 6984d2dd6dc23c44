"""The same calls four ways in, side by side in one run: does the relay's hop earn its keep?

    a port per session     the transceiver itself, with a public UDP port for each session
    a port per server      the transceiver itself, with one public UDP port
    TURN                   the same, behind a real coturn
    this relay             the product

Behind all of them is the same transceiver code; what differs is the way in (doors.py, bare.py,
turning.py). All servers are up during the whole run, and are measured in turns, the order rotated:

    set_up      one call at a time through a lane with delay: from nothing to connected and to the
                first audio, in milliseconds and in round trips. A TURN client's allocation counts.
    traffic     calls that talk and are answered: CPU of what is in front and of the transceiver
    delay       calls on all ways at once, and round trips of authenticated checks to the
                transceiver, one way after the other, so that what disturbs one disturbs all
    ports       what clients send to, what is open, and what so many more calls would take
    two_servers_behind_one_address     who reaches the server that has its session?
    killed      what faces the public is killed in mid-call and started again
    claims      what the public table says of each way, answered by these figures (claims.py)

Silence is from the last packet of a reply before a death to the first one after it; replies go on
for seconds then. How far two runs may lie apart stands beside the figures that chance moves
(intervals.py).

What it owns: the command, and what a reader has to know. comparing.py measures.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import aiohttp
import bare
import claims
import dev
import options
import turning
import typer
from comparing import Run
from doors import NAMES, Estate, Way
from findings import Finding

CALLS_MAX = 100
"""This process speaks for some hundred callers on a core; more, and its own delay is measured."""


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
                await work.delay()
                await work.fleet()
                await work.killed()
            if Way.RELAY in ways and "redis" not in estate.system.running:
                found.notes.append("The relay had no Redis: there is no redis-server.")

        try:
            options.interruptible(run())
        finally:
            estate.system.stop()
    found.figures["claims"] = claims.answers(found.figures)
    return found


def _notes(ways: list[Way]) -> list[str]:
    """What a reader has to know beside the figures."""
    notes = [
        f"Delays and CPU are compared with {NAMES[ways[0]]}.",
        "Milliseconds of CPU are a call's and a second's, with 50 packets of speech a second up and"
        " replies, after a turn's end, down.",
        "`apart` is how far another run on this system may be from this one (95 %).",
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
        float,
        typer.Option(
            min=0.5, max=30, help="Of each measured piece of traffic; delays take twice that."
        ),
    ] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Of traffic, each way in turn.")] = 6,
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
