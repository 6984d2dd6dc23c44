"""What a measurement has found: figures, what they were over time, and what did not hold.

What it owns: `Finding`, which every command of flood.py returns, and which is printed as tables or
JSON, or drawn (report.py); and `about`, where and of what figures are.

Times in series and markers are seconds since the measurement began.
"""

import json
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

    def must(self, holds: bool, sentence: str) -> None:
        """Note a failure, with the sentence that says what did not hold."""
        if not holds:
            self.failures.append(sentence)


def about(program: str) -> Figures:
    """Where and of what figures are. `program` is the command as it is typed."""

    def git(*words: str) -> str:
        argv = ["git", "-C", str(ROOT), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()

    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpu": found[1] if found else platform.processor(), "cpus": os.cpu_count()},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short=10", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain")),
        "command": shlex.join([program, *sys.argv[1:]]),
    }


def lines(figures: Any, indent: str = "") -> Iterator[str]:
    """Figures for people: a line each, lists of alike ones as a table."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}"
            columns = list(dict.fromkeys(key for row in value for key in row))
            cells = [columns, *([str(row.get(key, "")) for key in columns] for row in value)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            for row in cells:
                padded = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                yield f"{indent}  {'  '.join(padded)}"
        else:
            yield f"{indent}{name:<28} {value}"


def text(found: Figures, as_json: bool) -> str:
    """The whole of it, as it is printed."""
    return json.dumps(found, indent=2) if as_json else "\n".join(lines(found))
