"""flood.py chaos: a seed is a schedule, what is judged is measured, what is broken is found.

The promises are held against the README's words; their judging against records made by hand; the
measuring against an account made by hand; and the whole against a relay that really loses.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import typer
from typer.testing import CliRunner

from . import redises

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
FLOOD = [sys.executable, str(SCRIPTS / "flood.py"), "chaos"]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def scripts():
    """The scripts import one another by name."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = "chaos", "faults", "findings", "promises", "stream", "load"
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def faults(scripts):
    return scripts.faults


@pytest.fixture(scope="module")
def promises(scripts):
    return scripts.promises


# --- the schedule ---------------------------------------------------------------------------------


def test_a_seed_is_a_schedule(faults):
    for seed in range(200):
        plan = faults.schedule(seed, 60.0, faults.USUAL)
        assert plan == faults.schedule(seed, 60.0, faults.USUAL)
        assert {each.kind for each in plan} == set(faults.USUAL), "a minute has room for all"
        assert [each.number for each in plan] == list(range(len(plan)))
        ends = [0.0, *(each.at_s + each.room_s for each in plan)]
        assert all(end < each.at_s for end, each in zip(ends, plan, strict=False))
        assert ends[-1] <= 60.0
    orders = {tuple(each.kind for each in faults.schedule(n, 60.0, faults.USUAL)) for n in range(9)}
    assert len(orders) > 5


def test_a_longer_run_has_each_event_before_any_a_second_time(faults):
    plan = faults.schedule(7, 130.0, faults.USUAL)
    kinds = [each.kind for each in plan]
    count = len(faults.USUAL)
    assert sorted(kinds[:count]) == sorted(faults.USUAL)
    assert len(kinds) > count
    assert set(kinds[count : 2 * count]) <= set(faults.USUAL)


def test_the_control_happens_only_when_it_is_named(faults):
    assert "crash" not in faults.USUAL
    assert {each.kind for each in faults.schedule(1, 10.0, ["crash"])} == {"crash"}


def test_a_handover_has_no_manager_and_a_restart_has(faults):
    plan = [
        faults.Planned(number, kind, 0.0, 0.0)
        for number, kind in enumerate(("worker", "handover", "port", "restart", "handover"))
    ]
    found = [faults.managed_after(plan, number) for number in range(-1, 5)]
    assert found == [False, False, True, True, False, True]


# --- the promises ---------------------------------------------------------------------------------


def test_the_promises_are_the_readmes_words(promises):
    rows = [re.sub(r"\s+", " ", line) for line in (ROOT / "README.md").read_text().splitlines()]
    text = " ".join(rows)
    for says in [*(promise.says for promise in promises.PROMISES), promises.LAW]:
        found = any(says in row for row in rows) if " | " in says else says in text
        assert found, f"the README does not say: {says}"


def test_every_event_has_a_promise(promises, faults):
    assert {promise.event for promise in promises.PROMISES} == set(faults.KINDS)


GOOD = {
    "worker": {},
    "restart": {},
    "crash": {},
    "handover": {},
    "reload": {"facts": {"named": True}},
    "port": {"own": 1, "own_silence_ms": 90.0, "own_lost_down": 4},
    "address": {"own": 1, "own_silence_ms": 9.0},
    "redis": {"facts": {"known_again": True}, "new_call_ms": 40.0},
    "transceiver": {
        "own": 2,
        "came_back": 2,
        "new_call_ms": 40.0,
        "facts": {
            "lease_ms": 1400.0,
            "announced_ms": 300.0,
            "got_a_call_ms": 340.0,
            "resumed": 2,
            "elsewhere": 2,
            "items_kept": [3, 1],
        },
    },
    "signaling": {"facts": {"hung_up": True}, "new_call_ms": 40.0},
    "settings": {"facts": {"named": True}, "new_call_ms": 40.0},
}
"""What is felt of each event where all is well."""


def verdicts(promises, event, **more):
    """What is said of a record that is well but for `more`: a verdict a promise."""
    facts = GOOD[event].get("facts", {}) | more.pop("facts", {})
    record = promises.Record(event, calls=9, sent=1000, **GOOD[event] | more | {"facts": facts})
    return [row["verdict"] for row in promises.judged([record])]


@pytest.mark.parametrize("event", GOOD)
def test_what_is_well_is_kept(promises, event):
    assert set(verdicts(promises, event)) == {"kept"}


@pytest.mark.parametrize("event", GOOD)
@pytest.mark.parametrize(
    "felt",
    [{"lost": 1}, {"lost_up": 1}, {"lost_down": 1}, {"ended": ["call 3 lost: nothing came"]}],
    ids=lambda felt: next(iter(felt)),
)
def test_one_datagram_or_call_is_found(promises, event, felt):
    assert "BROKEN" in verdicts(promises, event, **felt)


@pytest.mark.parametrize("event", GOOD)
def test_what_could_not_be_done_is_not_kept(promises, event):
    assert set(verdicts(promises, event, failed="it does not start")) == {"BROKEN"}


@pytest.mark.parametrize(
    ("event", "felt"),
    [
        ("reload", {"facts": {"named": False}}),
        ("port", {"own_silence_ms": 201.0}),
        ("port", {"own_ended": ["call 3 lost"]}),
        ("port", {"came_back": 1}),
        ("address", {"own_silence_ms": 201.0}),
        ("redis", {"facts": {"known_again": False}}),
        ("redis", {"new_call_ms": None, "new_call": "unavailable"}),
        ("redis", {"new_call_ms": 5001.0}),
        ("transceiver", {"facts": {"lease_ms": 2001.0}}),
        ("transceiver", {"facts": {"lease_ms": None}}),
        ("transceiver", {"facts": {"announced_ms": 1001.0}}),
        ("transceiver", {"facts": {"got_a_call_ms": None}}),
        ("transceiver", {"facts": {"resumed": 1}}),
        ("transceiver", {"facts": {"elsewhere": 1}}),
        ("transceiver", {"facts": {"items_kept": [3, 0]}}),
        ("transceiver", {"came_back": 1}),
        ("transceiver", {"new_call_ms": None}),
        ("signaling", {"facts": {"hung_up": False}}),
        ("signaling", {"new_call_ms": None}),
        ("settings", {"facts": {"named": False}}),
        ("settings", {"new_call_ms": 6000.0}),
    ],
)
def test_each_promise_can_be_broken(promises, event, felt):
    found = verdicts(promises, event, **felt)
    assert found.count("BROKEN") == 1, found


def test_a_time_is_not_judged_where_the_machine_stood_still(promises):
    slow = {"facts": {"lease_ms": 2100.0}}
    assert "BROKEN" in verdicts(promises, "transceiver", stood_still_ms=100.0, **slow)
    found = verdicts(promises, "transceiver", stood_still_ms=900.0, **slow)
    assert "BROKEN" not in found and "not judged" in found
    # A loss is a loss all the same.
    assert "BROKEN" in verdicts(promises, "transceiver", stood_still_ms=900.0, lost=1, **slow)


def test_without_a_call_there_is_nothing_to_judge(promises):
    assert verdicts(promises, "port", own=0) == ["not judged"]
    found = verdicts(promises, "transceiver", own=0, came_back=0, facts={"resumed": 0})
    assert sorted(found) == ["kept", "kept", "kept", "not judged"]


# --- what is felt ---------------------------------------------------------------------------------

MS = 1_000_000


class Call:
    """A call that answers as ring.Call does, with what it is given."""

    def __init__(self, number, up=0, down=0, silence=5.0, ended_ns=None, failure=None, back=()):
        self.number, self.failure, self.why, self.ended_ns = number, failure, "why", ended_ns
        self.returns = [
            SimpleNamespace(heard_ns=at, noticed_ns=at, connected_ns=took and at + took)
            for at, took in back
        ]
        self.state, self.sent = "talking", 0
        self._up, self._down, self._silence, self.silent = up, down, silence, 0.0

    def lost_up(self, since_ns, until_ns):
        return self._up

    def lost_down(self, since_ns, until_ns):
        return self._down

    def silence_ms(self, since_ns, until_ns):
        return self._silence

    def silent_ms(self, since_ns, at_ns):
        return self.silent


def account(scripts, back_at, every_ms=10):
    """The stream's: a datagram each so many milliseconds, back when it says, 0 for never."""
    sent_at = np.arange(len(back_at), dtype=np.int64) * every_ms * MS
    found = np.array(back_at, np.int64) * MS
    back = int((found > 0).sum())
    whole = scripts.load.Account(len(found), back, back, 0, 0, 0, 0, sent_at, sent_at, found)
    return scripts.stream.Told(whole, len(found), frozenset({1}))


def felt(scripts, told, since_ms, until_ms, calls, own=(), ended=(), still=()):
    record = scripts.promises.Record("worker")
    scene = SimpleNamespace(record=record, own=list(own), ended=list(ended))
    window = scripts.chaos.Window(scene, since_ms * MS, until_ms * MS, list(calls))
    return scripts.chaos.felt(window, told, [(at * MS, ms) for at, ms in still])


def test_losses_belong_to_the_event_in_whose_time_they_were_sent(scripts):
    back = [10 * n + 2 for n in range(100)]  # two milliseconds each
    back[30] = back[31] = back[70] = 0
    back[40] = 455  # held up for 55 ms
    told = account(scripts, back)
    first = felt(scripts, told, 200, 600, [])
    assert (first.sent, first.lost, first.held_ms) == (40, 2, 55.0)
    assert first.stream_silence_ms == 30.0
    assert felt(scripts, told, 600, 900, []).lost == 1
    assert felt(scripts, told, 800, 900, []).lost == 0


def test_silence_that_does_not_end_counts(scripts):
    told = account(scripts, [10 * n + 2 if n < 50 else 0 for n in range(100)])
    record = felt(scripts, told, 400, 900, [])
    assert record.lost == 40
    assert record.stream_silence_ms == pytest.approx(900 - 492)


def test_calls_are_the_events_own_or_others_or_ended_by_it(scripts):
    told = account(scripts, [10 * n + 2 for n in range(100)])
    own = Call(0, up=3, down=2, silence=80.0, back=[(500 * MS, 600 * MS)])
    hung_up = Call(1, down=9, ended_ns=510 * MS)
    lost = Call(2, up=4, ended_ns=520 * MS, failure="lost")
    later = Call(3, up=1, silence=30.0, ended_ns=950 * MS)
    returned = Call(4, up=None, back=[(500 * MS, 700 * MS)])
    all_of_them = [own, hung_up, lost, later, returned]
    record = felt(scripts, told, 400, 900, all_of_them, own=[own], ended=[hung_up])
    assert (record.calls, record.own) == (3, 1)
    assert (record.lost_up, record.lost_down, record.silence_up_ms) == (5, 0, 80.0)
    assert record.silence_ms == 30.0
    assert record.ended == ["call 2 lost: why", "call 4 had to come back"]
    assert (record.own_lost_up, record.own_lost_down, record.own_silence_ms) == (3, 2, 80.0)
    assert (record.came_back, record.back_ms, record.own_ended) == (1, [600.0], [])


def test_a_return_that_was_begun_and_a_line_that_is_dead_are_found(scripts):
    told = account(scripts, [10 * n + 2 for n in range(100)])
    begun = Call(0, back=[(500 * MS, None)])
    silent = Call(1)
    silent.silent = 600.0
    record = felt(scripts, told, 400, 900, [begun, silent])
    assert record.ended == ["call 0 had to come back", "call 1 hears nothing any more"]
    record = felt(scripts, told, 400, 900, [begun], own=[begun])
    assert record.own_ended == ["call 0 has not come back"]
    assert (record.came_back, record.ended) == (0, [])


def test_what_nobody_reported_is_not_judged(scripts):
    told = account(scripts, [10 * n + 2 for n in range(100)])
    record = felt(scripts, told, 400, 900, [Call(0, up=None), Call(1, up=0)])
    assert (record.calls, record.unknown, record.lost_up) == (2, 1, 0)
    (row,) = scripts.promises.judged([record])
    assert row["verdict"] == "not judged" and "up not known of 1" in row["evidence"]
    record.lost = 1
    assert scripts.promises.judged([record])[0]["verdict"] == "BROKEN"


def test_at_the_end_all_calls_talk_but_those_that_an_event_ended(scripts):
    calls = [Call(0), Call(1), Call(2), Call(3)]
    plan = [scripts.faults.Planned(0, "worker", 0.0, 1.0), scripts.faults.Planned(1, "port", 2, 1)]
    run = scripts.chaos.Run(None, {}, None, 1, plan)
    run._ringing, run._wanted = SimpleNamespace(calls=calls), [calls[1]]
    for call in calls[1:]:
        call.state = "returning"
    scene = SimpleNamespace(ended=[calls[2]])
    run._windows = [scripts.chaos.Window(scene, 0, 1, calls)] * 2
    finding = scripts.findings.Finding("judged")
    run._judge_end(finding)
    assert finding.failures == ["at the end not all calls talk: call 3 is returning"]
    calls[3].state = "talking"
    run._windows.pop()
    finding = scripts.findings.Finding("judged")
    run._judge_end(finding)
    (late,) = finding.failures
    assert late.endswith("was ended: without port")


def test_how_long_this_tool_stood_still_is_known(scripts):
    told = account(scripts, [10 * n + 2 for n in range(100)])
    still = [(300, 70.0), (500, 40.0)]
    assert felt(scripts, told, 400, 900, [], still=still).stood_still_ms == 40.0
    assert felt(scripts, told, 600, 900, [], still=still).stood_still_ms == 0.0


@pytest.mark.parametrize(
    ("law", "more", "verdict"),
    [
        ({}, {}, "kept"),
        ({"missing": 1}, {}, "BROKEN"),
        ({"received": 139}, {}, "BROKEN"),
        ({"received": 139, "kernel_drops": 1}, {}, "kept"),
        ({}, {"duplicated": 1}, "BROKEN"),
        ({}, {"foreign": 1}, "BROKEN"),
    ],
)
def test_the_law_of_the_counters(scripts, law, more, verdict):
    told = account(scripts, [10 * n + 2 for n in range(100)])
    for name, value in more.items():
        setattr(told.account, name, value)
    counted = {"received": 150, "missing": 0, "drops": {}, "kernel_drops": 0} | law
    (row,) = scripts.chaos.lawful(counted, told, 40, crashed=False)
    assert row["verdict"] == verdict, row


# --- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control():
    """A run whose relay crashes and has lost its store, and a client that moves; it goes on while
    other tests run."""
    redises.required()
    words = ["--calls", "1", "--seconds", "11", "--seed", "3", "--json"]
    return subprocess.Popen(
        [*FLOOD, *words, "--only", "crash", "--only", "port"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_interrupt_in_mid_event_leaves_nothing_behind(control, tmp_path):
    process = subprocess.Popen(
        [*FLOOD, "--calls", "1", "--only", "transceiver", "--seconds", "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert "1 calls" in process.stderr.readline()
        assert "chaos" in process.stderr.readline()
        started = psutil.Process(process.pid).children(recursive=True)
        # The stream; Redis; two transceivers; relay, keeper and two workers; signaling.
        assert len(started) >= 9, started
        assert list(tmp_path.iterdir())
        transceivers = [each for each in started if "transceiver-" in " ".join(each.cmdline())]
        assert len(transceivers) == 2
        deadline = time.monotonic() + PATIENCE_S
        while all(each.is_running() for each in transceivers):  # until one has been killed
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert said.splitlines() == ["flood: interrupted; what was started has ended"]
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not list(tmp_path.iterdir())


def test_a_broken_promise_is_found_and_is_the_exit_status(control):
    began = time.monotonic()
    out, said = control.communicate(timeout=PATIENCE_S)
    print(said, f"waited {time.monotonic() - began:.1f} s")
    found = json.loads(out)
    print(json.dumps([found[name] for name in ("events", "promises", "law")], indent=1))
    assert control.returncode == 1
    assert found["seed"] == 3
    rows = {row["event"]: row for row in found["promises"]}
    assert set(rows) == {"crash", "port", "whole run"}
    assert rows["crash"]["verdict"] == "BROKEN"
    assert rows["whole run"]["verdict"] == "kept", rows["whole run"]
    assert found["stream"]["lost"] > 0
    events = {row["event"]: row for row in found["events"]}
    assert 0 < events["crash"]["stream_lost"] == found["stream"]["lost"]
    assert events["crash"]["stream_lost"] < events["crash"]["stream_sent"]
    assert events["port"]["stream_lost"] == 0 < events["port"]["stream_sent"]
    assert [row["event"] for row in found["calls_that_were_hit"]] == ["port"]
    assert {row["event"] for row in found["other_calls"]} == {"crash", "port"}
    assert any(failure.startswith("crash, ") for failure in found["failures"])
    assert found["law"]["missing"] == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--only", "nothing"], "no event nothing"),
        (["--only", "redis", "--seconds", "2"], "no room for an event"),
        (["--calls", "0"], "Invalid value for '--calls'"),
    ],
)
def test_what_cannot_be_done_is_refused(scripts, words, reason):
    cli = typer.Typer()
    cli.command()(scripts.chaos.chaos)
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())
