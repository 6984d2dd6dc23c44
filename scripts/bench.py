"""Repeatable measurements for developers: what a relay loses and costs, a transceiver carries.

    bench.py relay                          every part, as tables; some ten minutes
    bench.py transceiver                    the same for the transceiver, beside stock aiortc
    bench.py signaling                      how soon an offer is answered
    bench.py relay --json > figures.json    the same with machine, kernel, commit and command
    bench.py relay --only kill --quick      one part, in seconds: does it still work?
    bench.py relay --only latency --beside c='peer_relay 3478 9000'

Everything runs on loopback and is started and ended here: the relay as an operator would start it
(rig.py), and its clients and their transceiver in this process (load.py), which keeps to one CPU,
the relay to the others where there are any. What is measured is in losses.py, costs.py and
tiers.py, and of a transceiver in capacity.py, setup_times.py, passage.py, quality.py and churn.py,
of signaling in offers.py.

Rules that stay true:
- What must hold exactly (nothing lost or twice, the law of the counters, flows unchanged) and did
  not is listed under "failures", and the exit status is 1. Figures of time judge nothing here.
- Load counts with its own eyes, and what the relay counted is held against it.
- Absolute figures move with the machine: a part that compares runs its subjects in turns.
"""

import gc
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import capacity
import churn
import costs
import dev
import findings
import firsts
import instrument
import losses
import offers
import passage
import quality
import setup_times
import tiers
import typer
from load import Figures, Load
from rig import Setting, Skip

import host
import settings

Parts = Mapping[str, Callable[[Setting], Figures]]
PARTS = losses.PARTS | costs.PARTS | {"transit": tiers.transit}


def _passage(setting: Setting) -> Figures:
    """How long audio takes; measured again if the machine stood still meanwhile."""
    for _ in range(3):
        try:
            return passage.measure(2.0 if setting.quick else 20.0, setting.seed)
        except passage.StoodStill as why:
            setting.say(str(why))
    raise Skip("the machine stood still three times over")


TRANSCEIVER_PARTS: Parts = {
    **capacity.PARTS,
    "setup": lambda setting: setup_times.measure(calls=2 if setting.quick else 20),
    "passage": _passage,
    "quality": lambda setting: quality.measure(5.0 if setting.quick else 60.0, setting.seed),
    **churn.PARTS,
}


def limit(seconds: float) -> int:
    """Round trips a second that Load makes with nobody in between: more it cannot measure."""
    with Load(1_000, spin=True) as load:
        load.towards("127.0.0.1", load.port)
        load.begin(2e6, seconds)
        load.run(seconds)
        return int(instrument.per_s(load.settle()))


cli = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@cli.callback()
def _main() -> None:
    """Repeatable measurements."""


@cli.command("relay")
def _relay(
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"A part: {', '.join(PARTS)}.", metavar="NAME")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small: does it work?")] = False,
    seed: Annotated[int | None, typer.Option(help="Of all random moments.")] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="Another relay for `latency`: it listens at 127.0.0.1:3478 and forwards framed"
            " datagrams to 127.0.0.1:9000. Ufrags are under the keys of config/bench.toml.",
        ),
    ] = None,
) -> None:
    """Measure the relay of this tree."""
    if wrong := [each for each in beside or () if "=" not in each]:
        raise typer.BadParameter(f"{wrong[0]!r} is not NAME=COMMAND")
    others = {name: command for name, _, command in (each.partition("=") for each in beside or ())}
    _report(PARTS, only, as_json, quick, seed, others)


@cli.command("transceiver")
def _transceiver(
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"A part: {', '.join(TRANSCEIVER_PARTS)}.", metavar="NAME"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small: does it work?")] = False,
    seed: Annotated[int | None, typer.Option(help="Of all random moments.")] = None,
) -> None:
    """Measure the transceiver of this tree, beside a server on stock aiortc: what a core carries,
    set-up over a path with delay, what loss does to speech, and 10,000 short calls."""
    _report(TRANSCEIVER_PARTS, only, as_json, quick, seed, {})


@cli.command("signaling")
def _signaling(
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small: does it work?")] = False,
    seed: Annotated[int | None, typer.Option(help="Of all random moments.")] = None,
) -> None:
    """Measure signaling before two transceivers: from POST to 201, and whose part it is."""
    _report(offers.PARTS, None, as_json, quick, seed, {})


def _report(
    parts: Parts,
    only: list[str] | None,
    as_json: bool,
    quick: bool,
    seed: int | None,
    beside: Mapping[str, str],
) -> None:
    """Measure and print; ends the program, with 1 if something did not hold."""
    chosen = only or list(parts)
    if unknown := set(chosen) - parts.keys():
        raise typer.BadParameter(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    named = {name: parts[name] for name in chosen}
    found = measure(named, quick, secrets.randbits(32) if seed is None else seed, beside)
    typer.echo(findings.text(found, as_json))
    raise typer.Exit(1 if found["failures"] else 0)


def _interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt  # on its way up it ends all that was started


def measure(parts: Parts, quick: bool, seed: int, beside: Mapping[str, str]) -> Figures:
    """Run the parts, one after the other; a part that cannot be run says why."""
    found = findings.about("scripts/bench.py") | {"seed": seed}
    cpus = host.cpus()
    load_cpu = cpus[-1]
    host.pin(load_cpu)
    found["cpus"] = {"load": load_cpu, "relay": cpus[:-1] or cpus}
    gc.disable()  # its pauses would be in the figures; what parts leave behind is small
    with tempfile.TemporaryDirectory(prefix="earshot-bench-") as folder:
        firsts.make_keys(Path(folder) / "keys")
        setting = Setting(
            folder=Path(folder),
            keyring=settings.load_keys(Path(folder) / "keys"),
            quick=quick,
            seed=seed,
            beside=beside,
            relay_cpus=set(cpus[:-1] or cpus),
            load_cpu=load_cpu,
        )
        if parts.items() <= PARTS.items():
            setting.limit_per_s = found["load_limit_per_s"] = limit(0.1 if quick else 0.5)
            setting.say(f"load alone: {setting.limit_per_s} round trips a second")
        found["parts"] = {}
        for name, part in parts.items():
            setting.part = name
            started = time.monotonic()
            try:
                found["parts"][name] = part(setting)
            except Skip as reason:
                found["parts"][name] = {"skipped": str(reason)}
            except (dev.StartError, OSError) as error:  # TimeoutError is one
                setting.must(False, f"{type(error).__name__}: {error}")
            setting.say(f"took {time.monotonic() - started:.1f} s")
        found["failures"] = setting.failures
    return found


if __name__ == "__main__":
    cli()
