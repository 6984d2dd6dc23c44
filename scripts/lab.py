"""A laboratory of the Global Relay: sites, clusters and callers of continents on one machine.

    lab.py                              everything, as tables; some ten minutes
    lab.py --only ways --json           one part, as JSON: path, ways, site, relay, transit
    lab.py --quick                      small and scaled down, in seconds: does it work?
    lab.py --public-factor 1            what if the public internet were as good as the backbone?

It needs root: every host is a network namespace, and one process between them is the world
(delays.py), with the round trips of a real backbone and a model of the public internet (world.py).
The programs are the product's own, with files as an operator writes them (blueprint.py, estate.py);
callers are stock aiortc (visitor.py) and Chromium (browsing.py).

    path      how punctual the world itself is: nothing below can be more exact
    ways      for each region: first hop, end to end, set-up; by the nearest site and the backbone,
              and straight to the cluster's own relay over the public internet
    site      the nearest site is lost in mid-call: ICE goes to the second address by itself, if it
              does; for aiortc and Chromium, early and late in a call; and what new callers are told
    relay     a cluster's relay is killed, and lost with its host, in mid-call
    transit   the backbone between a site and a cluster's relay is cut in mid-call, and comes back

Rules that stay true:
- Packets are counted by the world, at the hosts' links, each 20 ms packet by its number
  (hearing.py): no audio device and no jitter buffer is in a figure.
- No figure of time is judged here; what must hold is in "failures".
- What is assumed of networks stands beside every figure ("assumptions").
"""

import contextlib
import gc
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import delays
import findings
import journeys
import mishaps
import typer
import world
from blueprint import Plan
from estate import Lab, LabError

import host

Figures = dict[str, Any]

PARTS: dict[str, Callable[[Lab], Figures]] = {**journeys.PARTS, **mishaps.PARTS}

SMALL = 0.3
"""What `--quick` makes of all delays. With less, ICE would be done within the 48 ms that Chromium
takes from the first check to the second, which it then never makes, and has nowhere to go later."""

BROWSERS = "tokyo", "frankfurt", "singapore"
"""Where a Chromium calls from, too: far from its cluster, near to it, and far from any site."""


def plan(quick: bool, chromium: bool, caller: str, public_factor: float, loss: float) -> Plan:
    """What is to be built. Mishaps happen to the first of the callers."""
    browsers = (caller, *(each for each in BROWSERS if each != caller)) if chromium else ()
    if quick:
        model = world.Model(public_factor=public_factor, loss=loss, scale=SMALL)
        return Plan(
            sites=Plan.sites[:2],
            clusters=("frankfurt",),
            callers=(caller,),
            browsers=browsers[:1],
            transceivers=1,
            model=model,
        )
    callers = caller, *(each for each in Plan.callers if each != caller)
    model = world.Model(public_factor=public_factor, loss=loss)
    return Plan(callers=callers, browsers=browsers, model=model)


def measure(parts: list[str], built: Plan, quick: bool, seed: int) -> Figures:
    """Run the parts, one after the other, in one estate."""
    found = findings.about("scripts/lab.py")
    found |= {"seed": seed, "assumptions": built.model.assumptions()}
    found["round_trips_ms"] = {
        "-".join(sorted(pair)): rtt for pair, rtt in world.ROUND_TRIP_MS.items()
    }
    cpus = host.cpus()
    gc.disable()
    with (
        tempfile.TemporaryDirectory(prefix="earshot-lab-") as folder,
        contextlib.ExitStack() as stack,
    ):
        lab = Lab(built, Path(folder), seed, quick, cpus, stack)
        found["parts"] = {}
        for name in parts:
            lab.part, begun = name, time.monotonic()
            try:
                found["parts"][name] = PARTS[name](lab)
            except (LabError, OSError) as error:
                lab.must(False, f"{type(error).__name__}: {error}")
            lab.say(f"took {time.monotonic() - begun:.1f} s")
        found["failures"] = lab.failures
    return found


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two sites, one cluster, a third of all delays.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"A part: {', '.join(PARTS)}.", metavar="PART")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random delays.")] = None,
    chromium: Annotated[bool, typer.Option(help="A Chromium among the callers.")] = True,
    caller: Annotated[
        str, typer.Option(help="Region of the caller to whom mishaps happen: one with a site.")
    ] = "tokyo",
    public_factor: Annotated[
        float, typer.Option(help="The public internet's delay between regions, in backbones'.")
    ] = world.PUBLIC_FACTOR,
    loss: Annotated[float, typer.Option(help="Share of packets lost on the last mile.")] = 0.0,
) -> None:
    """Build a world of sites, clusters and callers, make calls through it, and lose parts of it."""
    chosen = only or list(PARTS)
    if unknown := set(chosen) - PARTS.keys():
        raise typer.BadParameter(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    sites = Plan.sites[:2] if quick else Plan.sites
    if caller not in sites:
        raise typer.BadParameter(f"there is no site at {caller}; there are {', '.join(sites)}")
    if why := delays.refused():
        typer.echo(f"lab.py: {why}", err=True)
        raise typer.Exit(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    built = plan(quick, chromium, caller, public_factor, loss)
    found = measure(chosen, built, quick, secrets.randbits(32) if seed is None else seed)
    typer.echo(findings.text(found, as_json))
    raise typer.Exit(1 if found["failures"] else 0)


def _interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt  # on its way up it ends all that was started


if __name__ == "__main__":
    typer.run(main)
