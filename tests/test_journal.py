"""Log lines in both forms: one line a record, bounded, and never a fault for whoever logs."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import journal

TEXTS = st.text(st.characters(), max_size=3000)  # lone surrogates and control characters too
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXTS | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def logged(form: journal.Form, message: str, *args: Any, wrong: bool = False, **named: Any) -> str:
    """What a record becomes, with the end of its line."""
    octets = io.BytesIO()
    stream = io.TextIOWrapper(octets, "ascii")  # a locale that has no umlauts
    formatter = journal.Json() if form == "json" else journal.Text()
    log = logging.Logger("test")
    log.addHandler(journal.Writer(stream, formatter))
    if wrong:
        try:
            int("broken " * 2000)
        except ValueError:
            log.exception(message, *args, extra=journal.fields(**named))
    else:
        log.info(message, *args, extra=journal.fields(**named))
    return octets.getvalue().decode()


@pytest.mark.parametrize("wrong", [False, True])
@settings(max_examples=100, deadline=None)
@given(message=TEXTS, value=VALUES, name=st.from_regex(r"\A[a-z_]{1,20}\Z"))
def test_any_record_is_one_bounded_line_of_json(
    wrong: bool, message: str, value: Any, name: str
) -> None:
    written = logged("json", "%s", message, wrong=wrong, **{name: value})
    assert written.endswith("\n") and written.count("\n") == 1
    assert len(written.encode()) <= journal.LINE_OCTETS_MAX + 1
    found = json.loads(written)
    assert found["level"] == ("error" if wrong else "info") and found["pid"] == os.getpid()
    assert wrong <= ("broken" in found.get("exception", "broken" if "cut" in found else ""))


@settings(max_examples=200, deadline=None)
@given(message=TEXTS, value=VALUES)
def test_any_record_is_one_bounded_line_of_text(message: str, value: Any) -> None:
    written = logged("text", "%s", message, value=value)
    assert written.splitlines() == [written[:-1]]
    assert len(written.encode()) <= journal.LINE_OCTETS_MAX + 1


def test_both_forms_say_the_same() -> None:
    named = {"request_id": "1a2b3c4d", "ms": 1.5, "reason": "hung up by request", "none": None}
    text = logged("text", "call …%s ended", "0bCd", **named)
    assert "call …0bCd ended request_id=1a2b3c4d ms=1.5 reason=" in text
    assert '"hung up by request"\n' in text and "none" not in text
    found = json.loads(logged("json", "call …%s ended", "0bCd", **named))
    assert list(found)[:5] == ["time", "level", "logger", "pid", "message"]
    assert found["message"] == "call …0bCd ended"
    assert {name: found.get(name) for name in named} == named
    # What a record is made of is not overwritten by what it says.
    assert json.loads(logged("json", "x", level="mine"))["level"] == "info"


def test_a_record_that_cannot_be_written_says_where_it_is_and_nobody_fails() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    for form in ("json", "text"):
        assert "test_journal.py" in logged(form, "%s %s", "one")  # type: ignore[arg-type]
        assert "RuntimeError" in logged(form, "x", value=Broken())  # type: ignore[arg-type]


def test_lost_lines_are_counted_and_told() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    stream = Full()
    log = logging.Logger("test")
    log.addHandler(journal.Writer(stream, journal.Text()))
    log.info("one")
    log.info("two")
    stream.full = False
    log.info("three")
    log.info("four")
    said = [re.split(" INFO | WARNING ", line)[-1] for line in stream.getvalue().splitlines()]
    assert said == ["three", "log lines were lost lost=2", "four"]


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.77", "192.0.2.x"),
        ("::ffff:192.0.2.77", "192.0.2.x"),
        ("2001:db8:1:2::3", "2001:db8:1::x"),
        ("fe80::1%eth0", "fe80::x"),
        ("example.org", ""),
        (None, ""),
    ],
)
def test_clients_are_masked(host: str | None, said: str) -> None:
    assert journal.masked(host) == said


PROGRAMS = ("relay", "transceiver", "signaling")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_the_option_and_the_variable(program: str) -> None:
    command = Path(sys.executable).with_name(program)
    for words, variable in (
        (["--log-format", "xml"], None),
        ([], "xml"),
    ):
        environment = os.environ | ({journal.VARIABLE: variable} if variable else {})
        ran = subprocess.run(
            [command, "run", "--config", "/nonexistent", *words],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=60,
        )
        assert ran.returncode == 2
        assert "json" in ran.stderr
