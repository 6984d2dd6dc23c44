"""What all commands of flood.py have in common: options, Ctrl-C, and how a finding is delivered."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import dev
import findings
import report
import target
import typer

AsJson = Annotated[bool, typer.Option("--json", help="Figures as JSON on standard output.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write an HTML page with plots."),
]
Owned = Annotated[
    bool, typer.Option(target.OWN, help="The target has a public address, and it is yours.")
]
Seed = Annotated[int | None, typer.Option(help="Of everything random (default: drawn, printed).")]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and SIGINT."""


def deliver(
    measure: Callable[[], findings.Finding], as_json: bool, to: Path | None, **more: object
) -> None:
    """Measure, print, write the report. Ends the program: 0, 1 if something did not hold or could
    not be started, 2 for a target that may not be loaded, 130 after Ctrl-C. `more` (a seed, say)
    stands among what the figures are about."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    if to is not None and not to.resolve().parent.is_dir():
        raise typer.BadParameter(f"{to} lies in no folder")
    try:
        found = measure()
    except target.TargetError as error:
        raise typer.BadParameter(str(error)) from error
    except (dev.StartError, TimeoutError, OSError, ValueError) as error:
        print(f"flood: {error or type(error).__name__}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("flood: interrupted; what was started has ended", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    about = findings.about("scripts/flood.py") | more
    whole = {
        "title": found.title,
        **about,
        **found.figures,
        "notes": found.notes,
        "failures": found.failures,
    }
    typer.echo(findings.text(whole, as_json))
    if to is not None:
        report.write(to, found, about)
        print(f"flood: {to} is the report", file=sys.stderr)
    raise typer.Exit(1 if found.failures else 0)


def _interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt  # on its way up it ends all that was started
