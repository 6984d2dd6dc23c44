"""What all commands of flood.py have in common: options, Ctrl-C, and how a finding is delivered.

    deliver(lambda: measure(...), as_json, report, seed=seed)      the end of every command

Rules that stay true:
- Figures go to standard output, everything else to standard error.
- What was measured is printed before the report is written: a full disk does not lose it.
- What is wrong with options is said before anything is measured, in one line.
- SIGTERM, a terminal that is gone (SIGHUP) and Ctrl-C are one KeyboardInterrupt, which unwinds what
  measures; `finally` ends it all. A loop is entered by `interruptible`.
- How long it took, and the CPU time that this process used for it, stand beside the figures.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import dev
import findings
import report
import target
import typer

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Figures as JSON on standard output.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write an HTML page with plots."),
]
Owned = Annotated[
    bool, typer.Option(target.OWN, help="The target has a public address, and it is yours.")
]
Seed = Annotated[int | None, typer.Option(help="Of everything random (default: drawn, printed).")]

ENDINGS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""What asks the tool to end."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and SIGINT."""


def deliver(
    measure: Callable[[], findings.Finding], as_json: bool, to: Path | None, **more: object
) -> None:
    """Measure, print, write the report. Ends the program: 0, 1 if something did not hold or could
    not be started or written, 2 for a target that may not be loaded or a report that cannot be
    written, 130 after Ctrl-C. `more` (a seed, say) stands among what the figures are about."""
    for number in ENDINGS:
        signal.signal(number, _interrupted)
    if to is not None and (why := _unwritable(to)):
        raise typer.BadParameter(f"{to} {why}", param_hint="--report")
    try:
        began = time.monotonic()
        found = measure()
        spent = {"took_s": time.monotonic() - began, "own_cpu_s": time.process_time()}
        spent = {name: round(seconds, 1) for name, seconds in spent.items()}
        about = findings.about("scripts/flood.py") | more | spent
        typer.echo(findings.text(findings.whole(found, about), as_json))
        if to is not None:
            report.write(to, found, about)
            print(f"flood: {to} is the report", file=sys.stderr)
    except target.TargetError as error:
        raise typer.BadParameter(str(error)) from error
    except (dev.StartError, TimeoutError, OSError, ValueError) as error:
        print(f"flood: {str(error) or type(error).__name__}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("flood: interrupted; what was started has ended", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(1 if found.failures else 0)


def interruptible(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, but that Ctrl-C (any of ENDINGS) cancels `main` between two steps of it, so that
    it ends in order; then raises KeyboardInterrupt.

    An exception out of a signal handler would hit whatever task happens to run, and leave it torn.
    Only the first signal does it: a second one must not interrupt what ends calls, nor, ignored
    from then on, what ends everything else (`deliver`).
    """
    before = [signal.getsignal(number) for number in ENDINGS]

    async def guarded() -> T:
        task, loop, stopped = asyncio.current_task(), asyncio.get_running_loop(), False

        def stop() -> None:
            nonlocal stopped
            if task is not None and not stopped:
                task.cancel()
            stopped = True

        for number in ENDINGS:
            loop.add_signal_handler(number, stop)
        try:
            return await main
        except BaseException:  # cancelled, or what came of that on the way out
            if stopped:
                raise KeyboardInterrupt from None
            raise
        finally:
            # Here, and not behind asyncio.run: its loop leaves the defaults, under which a signal
            # ends this process without more ado.
            for number, handler in zip(ENDINGS, before, strict=True):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN if stopped else handler)

    return asyncio.run(guarded())


def _unwritable(path: Path) -> str | None:
    """Why there can be no report: it is better known before a measurement than after it."""
    folder = path.resolve().parent
    if not folder.is_dir():
        return "lies in no folder"
    if path.is_dir():
        return "is a folder"
    return None if os.access(path if path.exists() else folder, os.W_OK) else "may not be written"


def _interrupted(number: int, _: object) -> None:
    """On its way up the exception ends all that was started. A second Ctrl-C must not interrupt
    that."""
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
