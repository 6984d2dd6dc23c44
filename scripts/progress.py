"""Progress of what takes long: a bar on standard error, so that standard output has figures alone.

Rules that stay true:
- Where standard error is no terminal there is no bar, but one line at the beginning of each.
- It has no thread: what is measured is not disturbed by it, and a process may fork under it. So it
  moves when it is told something, and not more often than ten times a second.
- What it is told is shown as it is: brackets are no markup.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_console = Console(stderr=True)

SHOWN_EVERY_S = 0.1
"""Drawing takes about a millisecond of whoever measures: more often would be in the figures."""


@contextlib.contextmanager
def bar(what: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar that is full at `total`. It is moved by calling what is yielded with how much is done
    in all, and with a few words on how things stand (or "")."""
    if not _console.is_terminal:
        print(f"{what} …", file=sys.stderr, flush=True)
        yield lambda done, words: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console, transient=True, auto_refresh=False) as shown:
        task = shown.add_task(what, total=total, words="")
        due_s = 0.0

        def tell(done: float, words: str) -> None:
            nonlocal due_s
            now_s = time.monotonic()
            shown.update(task, completed=done, words=words, refresh=now_s >= due_s)
            due_s = now_s + SHOWN_EVERY_S if now_s >= due_s else due_s

        tell(0, "")
        yield tell
