"""What a measurement has found: figures, what they were over time, and what did not hold.

What it owns: `Finding`, which every command of flood.py returns, and which is printed as tables or
JSON, or drawn (report.py); and `about`, where and of what figures are.

Rules that stay true:
- Times in series and markers are seconds since the measurement began.
- A measurement of an hour is not lost by how it is told: whatever figures hold (numbers of numpy,
  paths, what is not a finite number) is printed, and the JSON is JSON to every reader.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Series:
    """A line over time. Lines of the same `plot` share axes."""

    plot: str
    """Title of the plot, for example `Round trip`."""
    name: str
    """What this line is, for example `p99`."""
    unit: str
    at_s: list[float]
    values: list[float]


@dataclass
class Spread:
    """A distribution. Those of the same `plot` share axes."""

    plot: str
    name: str
    unit: str
    values: list[float]
    """Every value, or a fair sample of some ten thousand."""


@dataclass
class Marker:
    """Something happened at a moment: drawn into every plot over time."""

    at_s: float
    text: str


@dataclass
class Finding:
    """What a command has found."""

    title: str
    """For people: what was measured."""
    figures: Figures = field(default_factory=dict)
    """What `--json` prints: numbers, texts, dicts of them, lists of alike dicts (tables)."""
    series: list[Series] = field(default_factory=list)
    spreads: list[Spread] = field(default_factory=list)
    markers: list[Marker] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences that a reader needs beside the figures: what is assumed, what was left out."""
    failures: list[str] = field(default_factory=list)
    """What must hold and did not: the exit status is 1 if there is any."""
    checks: int = 0
    """How often `must` was asked: a report says whether anything was promised at all."""

    def must(self, holds: bool, sentence: str) -> None:
        """Note a failure, with the sentence that says what did not hold."""
        self.checks += 1
        if not holds:
            self.failures.append(sentence)


def about(program: str) -> Figures:
    """Where and of what figures are. `program` is the command as it is typed. What cannot be known
    (the commit, without git or a checkout) is None."""
    changed = _git("status", "--porcelain")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpu": _cpu(), "cpus": os.cpu_count()},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=10", "HEAD") or None,
        "dirty": None if changed is None else bool(changed),
        "command": shlex.join([program, *sys.argv[1:]]),
    }


def whole(found: Finding, about: Figures) -> Figures:
    """All that is printed of a finding."""
    return {
        "title": found.title,
        **about,
        **found.figures,
        "notes": found.notes,
        "failures": found.failures,
    }


def plain(value: Any) -> Any:
    """The same as dicts with texts for keys, lists, texts, finite numbers, booleans and None."""
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return str(value)


def lines(figures: Figures, indent: str = "") -> Iterator[str]:
    """Plain figures for people: a line each, lists of dicts as a table, lists of sentences line by
    line."""
    for name, value in figures.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        elif _all(value, dict):
            yield f"{indent}{name}"
            yield from _table(value, indent + "  ")
        elif _all(value, str) and name in _SENTENCES:
            yield f"{indent}{name}"
            yield from (f"{indent}  - {each}" for each in value)
        else:
            yield f"{indent}{name:<28} {_cell(value)}"


def text(found: Figures, as_json: bool) -> str:
    """The whole of it, as it is printed. Surrogates, which a command line may hold, are shown as
    question marks, for no encoding has them."""
    shown = plain(found)
    joined = json.dumps(shown, indent=2) if as_json else "\n".join(lines(shown))
    return joined.encode("utf-8", "replace").decode()


_SENTENCES = ("notes", "failures")


def _table(rows: list[Figures], indent: str) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{indent}{'  '.join(padded)}"


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, kind) for each in value)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _git(*words: str) -> str | None:
    """What git says of this checkout; None if it cannot."""
    argv = ["git", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # no Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine() or None
