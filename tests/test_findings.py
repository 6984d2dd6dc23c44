"""How a finding is told: text, JSON, exit status, Ctrl-C; and the progress beside it."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 60


def _script(name):
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


findings, progress = _script("findings"), _script("progress")


def strict(text):
    """JSON as every reader has it: no NaN, no Infinity."""

    def refused(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refused)


def test_whatever_figures_hold_is_json():
    figures = {
        "numpy": {"float": np.float32(0.5), "int": np.int64(7), "bool": np.bool_(True)},
        "array": np.arange(3),
        "none": [math_nan := float("nan"), float("inf"), np.float64("-inf"), None],
        "tuple": (1, "two", {"three": 3}),
        "set": {4},
        "path": Path("a/b"),
        5: "a number as a name",
        (1, 2): math_nan,
        "surrogate": "\udcff",
    }
    assert strict(findings.text(figures, as_json=True)) == {
        "numpy": {"float": 0.5, "int": 7, "bool": True},
        "array": [0, 1, 2],
        "none": [None, None, None, None],
        "tuple": [1, "two", {"three": 3}],
        "set": [4],
        "path": "a/b",
        "5": "a number as a name",
        "(1, 2)": None,
        "surrogate": "\udcff",  # JSON escapes it, so that it survives
    }
    text = findings.text(figures, as_json=False)
    text.encode()  # the text has a question mark instead
    assert "?" in text


def test_text_is_for_people():
    figures = {
        "title": "A measurement",
        "loss": {"percent": 0.5, "of": {"sent": 10}},
        "rows": [{"way": "straight", "ms": 1.5}, {"way": "relay", "cpu": None}],
        "mixed": [{"a": 1}, 2],
        "empty": {},
        "none": [],
        "numbers": [1, 2],
        "notes": ["One.", "Two."],
        "failures": [],
    }
    assert findings.text(figures, as_json=False).splitlines() == [
        "title                        A measurement",
        "loss",
        "  percent                      0.5",
        "  of",
        "    sent                         10",
        "rows",
        "       way   ms  cpu",
        "  straight  1.5     ",
        "     relay         -",
        "mixed                        [{'a': 1}, 2]",
        "empty                        {}",
        "none                         []",
        "numbers                      [1, 2]",
        "notes",
        "  - One.",
        "  - Two.",
        "failures                     []",
    ]


def test_a_finding_knows_what_did_not_hold():
    found = findings.Finding("x")
    found.must(True, "holds")
    found.must(False, "does not")
    assert (found.failures, found.checks) == (["does not"], 2)
    whole = findings.whole(found, {"seed": 7})
    assert whole == {"title": "x", "seed": 7, "notes": [], "failures": ["does not"]}


def test_where_figures_are_from(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["flood.py", "calls", "a b"])
    about = findings.about("scripts/flood.py")
    assert about["command"] == "scripts/flood.py calls 'a b'"
    assert len(about["commit"]) >= 10 and about["dirty"] in (True, False)
    assert about["machine"]["cpus"] == os.cpu_count() and about["machine"]["cpu"]
    # Without a checkout, and without git, it is not known, which is not the same as clean.
    monkeypatch.setattr(findings, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (findings.about("x")["commit"], findings.about("x")["dirty"]) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (findings.about("x")["commit"], findings.about("x")["dirty"]) == (None, None)


COMMAND = """
import sys, typer
sys.path.insert(0, {scripts!r})
import dev, findings, options, target

def measure():
    what = sys.argv[1]
    if what == "target":
        target.guard("8.8.8.8", False)
    if what == "start":
        raise dev.StartError("the relay did not start")
    if what == "silent":
        raise TimeoutError
    if what == "wait":
        try:
            print("ready", file=sys.stderr, flush=True)
            sys.stdin.readline()
        finally:
            print("ending", file=sys.stderr, flush=True)
            print(sys.stdin.readline(), file=sys.stderr)
    found = findings.Finding("Title")
    found.figures["figure"] = 42
    found.must(what != "fails", "It did not hold.")
    return found

def main(what: str, as_json: options.AsJson = False, to: options.Report = None) -> None:
    options.deliver(measure, as_json, to, seed=7)

typer.run(main)
"""


def command(*words):
    return [sys.executable, "-c", COMMAND.format(scripts=str(SCRIPTS)), *map(str, words)]


def run(*words):
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize(("what", "status"), [("holds", 0), ("fails", 1)])
def test_figures_go_to_standard_output_and_the_page_to_its_file(what, status, tmp_path):
    page = tmp_path / "report.html"
    done = run(what, "--json", "--report", page)
    found = strict(done.stdout)
    assert (done.returncode, found["figure"], found["seed"]) == (status, 42, 7)
    assert found["failures"] == ([] if what == "holds" else ["It did not hold."])
    assert f"{page} is the report" in done.stderr
    assert "Title" in page.read_text()
    if what == "fails":
        assert "It did not hold." in page.read_text()


@pytest.mark.parametrize(
    ("what", "status", "sentence"),
    [
        ("target", 2, "8.8.8.8 is a public address"),
        ("start", 1, "flood: the relay did not start"),
        ("silent", 1, "flood: TimeoutError"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(what, status, sentence):
    done = run(what)
    assert (done.returncode, done.stdout) == (status, "")
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_report_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    for path, sentence in (
        (tmp_path / "no" / "report.html", "lies in no folder"),
        (tmp_path, "is a folder"),
    ):
        done = run("start", "--report", path)  # the measurement itself would fail with 1
        assert done.returncode == 2
        assert sentence in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_was_started_and_a_second_one_does_not_cut_that_short(number):
    with subprocess.Popen(
        command("wait"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as running:  # fmt: skip
        assert running.stderr.readline() == "ready\n"
        running.send_signal(number)
        assert running.stderr.readline() == "ending\n"
        for each in (signal.SIGINT, signal.SIGTERM):
            running.send_signal(each)
        out, err = running.communicate("has ended\n", timeout=PATIENCE_S)
    assert (running.returncode, out) == (130, "")
    assert "has ended" in err and "interrupted; what was started has ended" in err


def test_no_bar_where_there_is_no_terminal(capsys):
    with progress.bar("Sending [all]", 10) as tell:
        tell(5, "half")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "Sending [all] …\n")


def test_a_bar_shows_what_it_is_told_without_a_thread(monkeypatch):
    shown = io.StringIO()
    console = progress.Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "_console", console)
    before, begun_s = threading.active_count(), time.monotonic()
    with progress.bar("Sending [all]", 10_000) as tell:
        assert threading.active_count() == before
        for done in range(10_000):
            tell(done, f"[bold]{done}")
        took_s = time.monotonic() - begun_s
    text = shown.getvalue()
    assert "Sending [all]" in text and "[bold]" in text
    assert text.count("Sending") <= took_s / progress.SHOWN_EVERY_S + 4
