"""Progress of what takes long: a bar on standard error, so that standard output has figures alone.

Where standard error is no terminal there is no bar, but one line at the beginning of each.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_console = Console(stderr=True)


@contextlib.contextmanager
def bar(what: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar that is full at `total`. It is moved by calling what is yielded with how much is done
    in all, and with a few words on how things stand (or "")."""
    if not _console.is_terminal:
        print(f"{what} …", file=sys.stderr, flush=True)
        yield lambda done, words: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, TimeRemainingColumn(), console=_console, transient=True) as shown:
        task = shown.add_task(what, total=total, words="")
        yield lambda done, words: shown.update(task, completed=done, words=words)
