"""flood.py packets: losses are said exactly, what cannot work is refused, nothing stays behind.

A relay of this tree is started once for all; where datagrams have to be mistreated, one of thirty
lines takes its place. No figure of time is judged.
"""

import contextlib
import http.server
import importlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
import typer.testing

import endpoints
import settings

from . import mistreatment

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 120
WIDE = {"COLUMNS": "1000"}
"""A terminal in which no path is cut into two lines."""
NAMES = (
    "barrage",
    "course",
    "dev",
    "findings",
    "firsts",
    "instrument",
    "load",
    "loaders",
    "observed",
    "placing",
    "reflector",
    "repeats",
    "rig",
    "rounds",
    "steps",
)

# What waits for some seconds, on a machine that stands still, is not lost here.
PATIENT = """
import sys
import threading
sys.path.insert(0, {scripts!r})
import load
load.Load.quiet_s = 5.0
"""
WHOLE = (
    PATIENT
    + """
import runpy
runpy.run_path({scripts!r} + "/flood.py", run_name="__main__")
"""
)
# Two commands without the others: what those import takes longer than a load does.
ALONE = (
    PATIENT
    + """
import barrage, reflector, typer
cli = typer.Typer()
cli.command("packets")(barrage.packets)
cli.command("echo")(reflector.echo)
cli()
"""
)


def argv(*words, whole=False):
    program = (WHOLE if whole else ALONE).format(scripts=str(SCRIPTS))
    return [sys.executable, "-c", program, *map(str, words)]


def flood(*words, whole=False):
    done = subprocess.run(
        argv(*words, whole=whole),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=os.environ | WIDE,
    )
    print(done.stderr)
    return done


def sentence(done):
    """What it said, without the frame that is drawn around it."""
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def scripts():
    """The modules by their names, out of the folder of scripts."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def relay(scripts, tmp_path_factory):
    """A running relay of two workers."""
    folder = tmp_path_factory.mktemp("relay")
    scripts.firsts.make_keys(folder / "keys")
    setting = scripts.rig.Setting(
        folder=folder,
        keyring=settings.load_keys(folder / "keys"),
        quick=True,
        seed=0,
        beside={},
        relay_cpus=set(os.sched_getaffinity(0)),
        load_cpu=0,
    )
    with scripts.rig.Relay(setting, workers=2) as running:
        running.keys = folder / "keys"
        yield running
    assert setting.failures == []


def small(*more):
    """A load that is over soon."""
    return ("packets", "--clients", 60, "--rate", 20, "--seconds", 1.2, "--rounds", 6, *more)


def at(scripts, relay):
    """The options that lead to a relay, and a port for the transceiver."""
    port = scripts.dev.free_ports(2, socket.SOCK_DGRAM)[0]
    words = "--relay", f"127.0.0.1:{relay.public}", "--config", relay.config
    return (*words, "--transceiver", f"127.0.0.1:{port}")


# --- what is counted ------------------------------------------------------------------------------


def test_a_relay_of_its_own_and_a_report(tmp_path):
    page = tmp_path / "page.html"
    done = flood(*small("--own", 2, "--json", "--report", page), whole=True)
    found = json.loads(done.stdout)
    account = found["datagrams"]
    assert due(account) == 60 * 20 * 1.2 and found["rounds"] == 6
    for name in ("duplicated", "duplicated_inbound", "foreign", "lost_inbound", "lost_outbound"):
        assert account[name] == 0, name
    assert [row["worker"] for row in found["workers"]] == [0, 1]
    assert sum(row["datagrams"] for row in found["workers"]) == 2 * account["sent"]
    assert found["relay_cpu_us_a_datagram"]["value"] > 0
    trips = found["round_trip_us"]
    assert [row["percentile"] for row in trips] == ["p50", "p90", "p99", "p99.9"]
    for row in trips:
        assert 0 < row["from_leaving"] <= row["from_due"] * 1.003  # a bin's width
        assert row["minus"] > 0 and row["plus"] > 0 and row["tool_alone"] > 0
    tool = found["tool"]
    assert tool["alone_one_core"]["datagrams_per_s_max"] > 0
    assert tool["clock"]["step_ns"] > 0 and tool["stamps_too_far_apart_us"] > 0
    assert "clients were opened 6 times" in found["notes"][-1]
    assert page.stat().st_size > 1000
    assert done.returncode == (1 if found["failures"] else 0)
    assert all("lost or late" in each for each in found["failures"])  # late, on a busy machine


def due(account):
    """All that had to leave: what a machine that stood still kept from it is told apart."""
    if account["unsent"]:
        print(f"{account['unsent']} datagrams never left")
    return account["sent"] + account["unsent"]


def test_every_mistreated_datagram_is_found(scripts, relay):
    """The control: an instrument that says 0 must be able to say something else."""
    for _ in range(3):  # which of them are lost is known where all have left
        done = mistreated(scripts, relay)
        found = json.loads(done.stdout)
        if not found["datagrams"]["unsent"]:
            break
    rounds, each = 2, range(500)
    crossed = [n for n in each if n % 7]
    copies = {n: bool(n % 11) + (not n % 13) for n in crossed}
    good = [count for n, count in copies.items() if n % 17 and count]
    account = found["datagrams"]
    assert account["sent"] == rounds * len(each)
    assert account["lost_inbound"] == rounds * (len(each) - len(crossed))
    assert account["lost"] == rounds * (len(each) - len(good))
    assert account["lost_outbound"] == account["lost"] - account["lost_inbound"]
    assert account["duplicated"] == rounds * sum(count - 1 for count in good)
    assert account["foreign"] == rounds * sum(c for n, c in copies.items() if not n % 17)
    expected = (account["lost"] + account["late"]) / account["sent"] * 100
    assert found["loss_percent"]["value"] == pytest.approx(expected, abs=1e-5)
    assert done.returncode == 1
    failures = " ".join(found["failures"])
    assert "came twice" in failures and "came changed" in failures and "lost or late" in failures
    assert "workers" not in found or all("datagrams" not in row for row in found["workers"])


def mistreated(scripts, relay):
    """A load through what mistreats it."""
    port = scripts.dev.free_ports(1, socket.SOCK_DGRAM)[0]
    program = mistreatment.PROGRAM.format(root=str(SCRIPTS.parent))
    with mistreating(program, port) as public:
        return flood(
            "packets", "--clients", 40, "--rate", 25, "--seconds", 1, "--rounds", 2, "--json",
            "--relay", f"127.0.0.1:{public}", "--config", relay.config,
            "--transceiver", f"127.0.0.1:{port}",
        )  # fmt: skip


@contextlib.contextmanager
def mistreating(program, port):
    relay = subprocess.Popen([sys.executable, "-c", program, str(port)], stdout=subprocess.PIPE)
    try:
        yield int(relay.stdout.readline())
    finally:
        relay.kill()
        relay.wait()
        relay.stdout.close()


def test_steps_of_two_processes_at_a_relay_that_runs(scripts, relay):
    words = "--steps", "500,1000", "--rounds", 2, "--processes", 2, "--json"
    before = sum(
        scripts.observed.Observed(relay.table(), ("127.0.0.1", relay.public)).now().received
    )
    done = flood(*small(*at(scripts, relay), *words))
    found = json.loads(done.stdout)
    account, rows = found["datagrams"], found["steps"]
    assert [row["rate_per_s"] for row in rows] == [500, 1000] and found["processes"] == 2
    assert due(account) == 1.2 * (500 + 1000)
    assert account["lost"] == account["duplicated"] == account["foreign"] == 0
    assert all(row["p50_us"] > 0 and row["cpu_us_a_datagram"] > 0 for row in rows)
    assert all(row["p50_plus"] is None for row in rows)  # two rounds say nothing of the next
    after = scripts.observed.Observed(relay.table(), ("127.0.0.1", relay.public)).now()
    assert sum(after.received) - before > 2 * account["sent"]  # and what opened the flows


def test_a_ramp_sends_what_it_is_to(scripts, relay):
    for _ in range(3):  # what never left is missing in its part of the ramp
        done = flood(*small(*at(scripts, relay), "--ramp", "200:2200", "--json"))
        found = json.loads(done.stdout)
        if not found["datagrams"]["unsent"]:
            break
    rows = found["ramp"]
    assert [row["rate_per_s"] for row in rows] == pytest.approx([700, 1700], rel=0.02)
    assert due(found["datagrams"]) == pytest.approx(1.2 * (200 + 2200) / 2, abs=1)


def test_a_search_ends_at_what_it_may_try(scripts, relay):
    words = small(
        *at(scripts, relay), "--find", "--at-most", 1500, "--seconds", 0.5, "--rounds", 2, "--json"
    )
    found = json.loads(flood(*words).stdout)
    assert found["search"][0]["rate_per_s"] == 1200
    assert all(row["rate_per_s"] <= 1500 for row in found["search"])
    if all(row["held"] for row in found["search"]):  # a busy machine may not
        assert found["highest_per_s"] == 1500 and found["limited_by"].startswith("--at-most")


def test_an_echo_elsewhere(scripts, relay):
    (port,) = scripts.dev.free_ports(1, socket.SOCK_DGRAM)
    words = "--listen", f"127.0.0.1:{port}", "--relay", "127.0.0.1", "--json"
    echo = subprocess.Popen(
        argv("echo", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert f"echo at 127.0.0.1:{port}" in echo.stderr.readline()
        wait_for(lambda: scripts.rig.listens(port))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind(("127.0.0.9", 0))
            stranger.sendto(b"\xc5\x01\x00\x00" + bytes(60), ("127.0.0.1", port))
        done = flood(
            *small("--relay", f"127.0.0.1:{relay.public}", "--config", relay.config, "--json"),
            "--rounds", 2, "--transceiver", f"127.0.0.1:{port}", "--remote-echo",
        )  # fmt: skip
        echo.send_signal(signal.SIGINT)
        echo.communicate(timeout=PATIENCE_S)
    finally:
        echo.kill()
        echo.wait()
    account = json.loads(done.stdout)["datagrams"]
    assert due(account) == 60 * 20 * 1.2 and account["lost"] == 0
    assert "lost_inbound" not in account
    assert echo.returncode == 130


@contextlib.contextmanager
def relay_and_stranger():
    """Sockets of two who send frames: at 127.0.0.5, where the relay is, and at 127.0.0.6."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        relay.bind(("127.0.0.5", 0))
        relay.settimeout(PATIENCE_S)
        stranger.bind(("127.0.0.6", 0))
        stranger.setblocking(False)
        yield relay, stranger


def test_an_echo_answers_its_relay_alone(scripts):
    (port,) = scripts.dev.free_ports(1, socket.SOCK_DGRAM)
    framed = b"\xc5\x01\x00\x00" + bytes(28) + b"media"
    with (
        scripts.reflector.Reflector(("127.0.0.1", port), "127.0.0.5") as reflector,
        relay_and_stranger() as (relay, stranger),
    ):
        for sock, datagram in (
            (stranger, framed), (relay, framed + b" 1"), (relay, b"no frame"),
            (relay, framed[:10]), (relay, framed + b" 2"),
        ):  # fmt: skip
            sock.sendto(datagram, ("127.0.0.1", port))
        while reflector.echoed + reflector.refused < 5:
            reflector.serve(PATIENCE_S)
        assert (reflector.echoed, reflector.refused) == (2, 3)
        assert [relay.recv(256) for _ in range(2)] == [framed + b" 1", framed + b" 2"]
        with pytest.raises(BlockingIOError):
            stranger.recv(256)


def wait_for(holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_load_answers_its_relay_alone(scripts):
    """Frames, from where the relay is: a stranger would get as many datagrams back as it sends."""
    framed = scripts.load.frame.header("127.1.0.1", 5) + b"media"
    with (
        scripts.load.Load(3, frames_from="127.0.0.5/32") as under_test,
        relay_and_stranger() as (relay, stranger),
    ):
        under_test.towards(*relay.getsockname())
        for sock, datagram in (
            (stranger, framed), (relay, framed + b" 1"), (relay, b"no frame"),
            (relay, framed[:10]), (relay, framed + b" 2"),
        ):  # fmt: skip
            sock.sendto(datagram, ("127.0.0.1", under_test.port))
        wait_for(lambda: under_test._echo() or under_test.strangers == 3)
        assert [relay.recv(256) for _ in range(2)] == [framed + b" 1", framed + b" 2"]
        with pytest.raises(BlockingIOError):
            stranger.recv(256)
        with pytest.raises(TimeoutError, match=r"\(3 datagrams to the transceiver were not"):
            under_test.open([b"\0"] * 3, patience_s=0)


def test_where_frames_come_from(scripts):
    def found(internal, at, **more):
        table = SimpleNamespace(internal=endpoints.Endpoint(internal))
        place = scripts.placing.Place(("127.0.0.1", 1), table, None, (), **more)
        return scripts.placing.frames_from(place, (at, 9000))

    assert found("10.4.0.1:3500", "10.4.0.9") == "10.4.0.1/32"
    assert found("0.0.0.0:3500", "127.0.0.1") == found("[::]:1", "127.0.0.1") == "127.0.0.0/8"
    assert found("0.0.0.0:3500", "10.4.0.9") == "0.0.0.0/0"
    assert found("10.4.0.1:3500", "10.4.0.9", passed_on=True) == "0.0.0.0/0"


def test_an_echo_ends_while_more_comes(scripts):
    with (
        scripts.reflector.Reflector(("127.0.0.1", 0), "127.0.0.5") as reflector,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay,
    ):
        relay.sendto(b"1", reflector._sock.getsockname())
        answered = []
        reflector._in = SimpleNamespace(receive=lambda _: 1)  # there is always one more
        reflector._answer = lambda _: answered.append(1) or len(answered) < 100_000 or 1 / 0
        reflector.serve(0)
    assert answered


# --- how flows are opened -------------------------------------------------------------------------


@pytest.mark.parametrize("lossy", [1, 4, 5])
def test_what_opens_a_flow_may_be_lost_and_not_for_ever(scripts, lossy):
    class Lossy(scripts.load.Load):
        def settle(self):
            found = super().settle()
            if self._run <= lossy:  # all of the first client's
                lost = np.arange(found.sent) % self.clients == 0
                found.returned -= int((found.back_at[lost] > 0).sum())
                found.back_at[lost] = 0
            return found

    with Lossy(3) as under_test:
        under_test.towards("127.0.0.1", under_test.port)
        if lossy < 5:
            under_test.open([b"\0"] * 3)
            assert under_test._run == lossy + 1
        else:
            with pytest.raises(TimeoutError, match="1 of 3 clients' first datagrams of media"):
                under_test.open([b"\0"] * 3)


# --- rates ----------------------------------------------------------------------------------------


def test_a_search_finds_the_limit(scripts):
    tried = []

    def held(rate):
        tried.append(rate)
        return rate <= 61_000

    found = list(scripts.steps.search(10_000, held))
    highest = max(rate for rate, good in found if good)
    assert 61_000 / scripts.steps.PRECISION <= highest <= 61_000
    assert len(tried) == sum(1 if good else 2 for _, good in found) < 25


def test_a_search_goes_down_and_ends(scripts):
    found = list(scripts.steps.search(50_000, lambda rate: rate < 300))
    assert 280 < max(rate for rate, good in found if good) < 300
    nothing = list(scripts.steps.search(50_000, lambda _: False))
    assert not any(good for _, good in nothing) and len(nothing) <= scripts.steps.TRIALS_MAX
    everything = list(scripts.steps.search(50_000, lambda _: True, 80_000))
    assert everything == [(50_000, True), (75_000, True), (80_000, True)]


@pytest.mark.parametrize(("rate", "last"), [(1000.0, None), (500.0, 3000.0), (3000.0, 500.0)])
def test_a_schedule_is_its_own_inverse(scripts, rate, last):
    """How many are due at a moment, and when each is due, are the same schedule."""
    with scripts.load.Load(3) as under_test:
        under_test.begin(rate, 2.0, last, started=1_000)
        total = under_test.due(1_000 + 2_000_000_000 - 1)
        assert total == pytest.approx((rate + (rate if last is None else last)) / 2 * 2, abs=1)
        moments = under_test._intended_at(np.arange(total))
        assert (np.diff(moments) > 0).all() and moments[0] == 1_000
        for number in range(0, total, 97):
            assert under_test.due(int(moments[number]) + 1_000) == number + 1
            if number:
                assert under_test.due(int(moments[number]) - 1_000) == number
        assert under_test.due(0) == 0


def test_slices_hold_what_was_due_in_them(scripts):
    """Late is what came too late from when it was due, also if it left late."""
    second = 1_000_000_000
    due = np.arange(10) * (second // 10)
    left = due + 1_000_000
    back = left + 2_000_000
    back[3] = 0
    left[7] += 150_000_000
    back[7] += 150_000_000
    account = scripts.load.Account(10, 10, 9, 0, 0, 0, 0, due, left, back)
    found = scripts.loaders.part(account, 1.0, 2, 0, 0, False)
    assert found.sent.tolist() == [5, 5] and found.lost.tolist() == [1, 0]
    assert found.late.tolist() == [0, 1] and found.trips.sum(1).tolist() == [4, 5]
    both = found + found
    assert both.sent.tolist() == [10, 10] and both.loss() == found.loss() == 0.2
    assert both.lag_ms == found.lag_ms == pytest.approx(151)


def account(scripts, sent, back):
    """Datagrams that left at these moments and came back at those, or never (0)."""
    sent, back = np.array(sent), np.array(back)
    return scripts.load.Account(
        len(sent), len(sent), int((back > 0).sum()), 0, 0, 0, 0, sent, sent, back
    )


def test_waiting_for_what_is_lost_is_no_time_of_the_tools(scripts):
    second = 1_000_000_000
    found = account(scripts, [second, 2 * second, 3 * second], [2 * second, 5 * second, 0])
    assert scripts.instrument.per_s(found) == 0.5
    assert scripts.instrument.per_s(account(scripts, [1, 2], [0, 0])) == 0


def test_what_a_falling_ramp_did_not_send_is_told(scripts):
    plan = scripts.loaders.Plan(3, ("127.0.0.1", 1), ("127.0.0.1", 1), 0, None, [0])
    loader = scripts.loaders._Loader(plan, 0)
    over = time.monotonic_ns() - 10_000_000_000
    with scripts.load.Load(3) as loader._load:
        loader._load.towards("127.0.0.1", loader._load.port)
        order = scripts.loaders.Order(3_000.0, 2.0, 500.0, started=over)
        found = loader._round(order)
    assert (found.unsent, int(found.sent.sum()), found.own_drops) == (3_500, 0, 0)


def test_an_account_of_a_search_has_a_limit(scripts):
    def most(**more):
        given = {"seconds": 30.0, "rounds": 3, "processes": 2, "most": None} | more
        return scripts.placing.most(SimpleNamespace(**given), 2.0)

    room = scripts.placing.ROUND_DATAGRAMS_MAX
    assert most()[0] == room * 2 / 10
    assert most(rounds=30)[0] == room * 2 / 2 and "more --processes" in most()[1]
    assert most(most=500.0) == (500.0, "--at-most")
    assert most(most=1e7)[0] == room * 2 / 10
    assert most(rounds=1000, seconds=0.5)[0] == scripts.steps.RATE_MAX


def a_round(scripts, rate=1_000.0, seconds=2.0, spent=0.1, **more):
    """One of a relay with one process that used so many seconds of a CPU."""
    sent = int(rate * seconds)
    part = scripts.loaders.part(account(scripts, [0] * sent, [1] * sent), seconds, 1, 0, 0, False)
    for name, value in more.items():
        setattr(part, name, value)
    shots = [scripts.observed.Snapshot(at, {7: at * spent / seconds}) for at in (0.0, seconds)]
    order = scripts.loaders.Order(rate, seconds)
    return scripts.rounds.Round(0.0, order, part, *shots)


def test_what_limited_a_rate_is_named(scripts):
    alone = {"datagrams_per_s_max": 1e6}

    def limit(echoes=True, **more):
        return scripts.rounds.limit(a_round(scripts, **more), alone, 1, echoes)

    lost = {"lost": np.array([12]), "crossed": 1_990}
    assert "10 lost on the way in, 2 on the way back, 0 late" in limit(**lost)
    assert limit(False, **lost).endswith(": 12 lost, 0 late")
    assert "its own sockets had no room for 11" in limit(**lost, own_drops=11)
    assert "sockets" not in limit(**lost, own_drops=2)
    stopped = {"stopped": 1, "spent": 0.5}
    assert "a queue grew" in limit(**stopped)
    assert limit(**stopped, ran_s=0.5).endswith("of a CPU each they used process 7 100 %")


def test_the_last_of_lower_rates_is_tried_as_well(scripts):
    run, tried = scripts.barrage._Run(None, None, None, None, None), []

    def lossy(_, rate, __):
        tried.append(rate)
        return [a_round(scripts, lost=np.array([12]))]

    run._rounds = lossy
    _, why = run._lasting(None, 1_000.0, True)
    assert len(tried) == 1 + len(scripts.barrage.SHORTER) and why
    assert tried[-1] == pytest.approx(1_000 * np.prod(scripts.barrage.SHORTER))
    tried.clear()
    assert run._lasting(None, 1_000.0, False)[1] is None and tried == [1_000.0]
    run._rounds = lambda *_: [a_round(scripts)]
    assert run._lasting(None, 1_000.0, True)[1] is None


def test_what_the_tool_did_to_its_figures_is_told(scripts):
    part, enough = a_round(scripts).part, scripts.rounds.BUFFER_OCTETS
    assert scripts.rounds.own_faults(part, enough) == []
    part.own_drops, part.unsent = 3, 5
    granted, dropped, unsent = scripts.rounds.own_faults(part, 212_992)
    assert "granted the tool's sockets 212992 octets" in granted
    assert dropped.startswith("3 datagrams are lost") and unsent.startswith("5 datagrams were due")


# --- a machine that does something else ---------------------------------------------------------


@pytest.fixture
def course(scripts):
    """A Course over rounds of which every other one is disturbed, by what `stolen` says."""

    class Crew:
        plan = SimpleNamespace(clients=10, cpus=[0])
        opened = 0

        def open(self):
            self.opened += 1

    seen = SimpleNamespace(cpus=lambda: {1}, here=True, now=lambda: scripts.observed.Snapshot(0.0))
    found = scripts.course.Course(Crew(), seen, flows_max=1_000)
    found.stolen = itertools.repeat(0.0)

    def a_turn(order, told=None):
        one = a_round(scripts, rate=order.rate, seconds=order.seconds)
        one.machine = {"others_percent": 1.0, "stolen_percent": next(found.stolen)}
        one.took_s = order.seconds
        return one

    found.round = a_turn
    return found


def test_a_round_in_which_the_machine_was_away_is_made_again(scripts, course):
    course.stolen = iter([0.7, 8.0, 0.0, 1.3, 7.0, 0.0, 0.7, 0.0, 0.0, 1.3])
    order = scripts.loaders.Order(100.0, 1.5)
    done = course.held(order, 8, lambda *_: None)
    assert len(done) == 8 and not any(each.disturbed() for each in done)
    assert [each.machine["stolen_percent"] for each in course.aside] == [8.0, 7.0]
    assert course._crew.opened == 7  # before each that counts but the first, and no oftener
    finding = scripts.findings.Finding("")
    course.say(finding, done)
    assert [row["stolen_percent"] for row in finding.figures["set_aside"]] == [8.0, 7.0]
    assert finding.notes[0].startswith("2 rounds were set aside") and len(finding.notes) == 1
    assert len(finding.markers) == 2


def test_a_machine_that_is_always_away_is_measured_as_it_is(scripts, course):
    course.stolen = itertools.repeat(8.0)
    done = course.held(scripts.loaders.Order(100.0, 1.5), 8, lambda *_: None)
    assert len(done) == 8 and len(course.aside) == 2
    tried = [course.trial(scripts.loaders.Order(100.0, 2.0)) for _ in range(20)]
    assert len(course.aside) == 2 + scripts.course.TRIALS_AGAIN and all(tried)
    finding = scripts.findings.Finding("")
    course.say(finding, done)
    assert "in 8 of the rounds that count" in finding.notes[1]


@pytest.mark.parametrize(
    ("others", "stolen", "took_s", "disturbed"),
    [
        (1.0, 1.3, 1.5, False),
        (5.3, 0.0, 1.5, True),
        (0.0, 2.0, 1.5, True),
        (6.0, 6.0, 0.2, False),  # of 0.2 s the kernel's ticks say nothing
        (0.0, 1.0, 60.0, False),
    ],
)
def test_what_disturbs_a_round(scripts, others, stolen, took_s, disturbed):
    one = a_round(scripts)
    one.machine, one.took_s = {"others_percent": others, "stolen_percent": stolen}, took_s
    assert one.disturbed() == disturbed


def test_time_of_others_is_of_the_cpus_that_are_asked_for(scripts):
    """A program on one CPU is seen there, and is ours if its time is said to be."""
    cpu = min(os.sched_getaffinity(0))
    busy = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        busy.stdout.readline()
        there = scripts.instrument.Others(lambda: 0.0, [cpu])
        nowhere = scripts.instrument.Others(lambda: 0.0, [])
        ours = scripts.instrument.Others(lambda: scripts.rig.cpu_s(busy.pid), [cpu])
        began = scripts.rig.cpu_s(busy.pid)
        deadline = time.monotonic() + PATIENCE_S
        while (ran := scripts.rig.cpu_s(busy.pid) - began) < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen, less = there.figures()["others_percent"], ours.figures()["others_percent"]
        assert nowhere.figures() == {"others_percent": 0.0, "stolen_percent": 0.0}
    finally:
        busy.kill()
        busy.wait()
        busy.stdout.close()
    assert ran > 0 and seen > less


# --- runs beside one another ----------------------------------------------------------------------


def run(p99=100.0, apart=5.0, **more):
    row = {"percentile": "p99", "from_due": p99, "minus": apart, "plus": apart}
    row |= {"from_leaving": 90.0, "minus_leaving": None, "plus_leaving": None}
    found = {"rate_per_s": 1000.0, "clients": 10, "rounds": 20, "round_s": 1.5}
    loss = {"value": 0.0, "plus_minus": 0.001}
    found |= {"tool": {"machine": {"others_percent": 1.0, "stolen_percent": 0.0}}}
    return found | {"round_trip_us": [row], "loss_percent": loss} | more


def test_runs_are_compared_figure_by_figure(scripts):
    found = [run(), run(104.0), run(112.0)]
    rows, counts = scripts.repeats.table([scripts.repeats.estimates(each) for each in found])
    assert [(row["figure"], row["pairs_that_agree"]) for row in rows] == [
        ("p99 from_due us", "1 of 3"),
        ("loss_percent", "3 of 3"),
    ]
    assert rows[0]["furthest_apart"] == 12.0 and rows[0]["may_be_apart"] == 5.0
    expected = {"pairs": 3, "agree_in_all_figures": 1, "single_figures": 6, "agree": 4}
    assert counts == expected


def test_runs_of_a_busy_machine_are_told_apart(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    busy = {"tool": {"machine": {"others_percent": 40.0, "stolen_percent": 2.0}}}
    for path, found in zip(paths, (run(), run(130.0, **busy), run(101.0)), strict=True):
        path.write_text(json.dumps(found))
    done = flood("compare", *paths, "--json", whole=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert (found["agree_in_all_figures"], found["pairs"]) == (1, 3)
    assert (found["of_quiet_runs"]["agree"], found["of_quiet_runs"]["pairs"]) == (2, 1)
    assert found["others_percent_of_a_cpu"] == [1.0, 42.0, 1.0]


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([run()], "nothing to be compared with"),
        ([run(), run(clients=11)], "different loads: clients is [10, 11]"),
        ([run(), {}], "is no run of `packets --json`"),
        ([run(), run(apart=None, loss_percent=None)], "1 has no interval of any figure"),
        ([run(apart=None), run(loss_percent=None)], "no figure has an interval in all of these"),
    ],
)
def test_what_is_no_run_is_not_compared(scripts, tmp_path, runs, reason):
    paths = [tmp_path / str(number) for number, _ in enumerate(runs)]
    for path, found in zip(paths, runs, strict=True):
        path.write_text(json.dumps(found))
    assert reason in refused(scripts, *paths, command=scripts.repeats.compare)


# --- what is refused ------------------------------------------------------------------------------


def refused(scripts, *words, command=None):
    """What the command says, in this process: it refuses before it starts anything."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cli = typer.Typer(add_completion=False)
    cli.command()(command or scripts.barrage.packets)
    try:
        done = typer.testing.CliRunner(env=WIDE).invoke(cli, list(map(str, words)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2, said
    return said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "say which relay"),
        (("--own", 1, "--relay", "127.0.0.1:1"), "say which relay"),
        (("--own", 1, "--find", "--steps", "1,2"), "choose one"),
        (("--own", 1, "--at-most", 5), "goes with --find"),
        (("--own", 1, "--pid", 1), "goes with no address"),
        (("--own", 1, "--steps", "5"), "at least two rates"),
        (("--own", 1, "--steps", "5,many"), "'many' is no rate"),
        (("--own", 1, "--ramp", "5"), "has no two rates"),
        (("--own", 1, "--ramp", "0:5"), "not between 1 and"),
        (("--own", 1, "--ramp", "5:5"), "from a rate to the same"),
        (("--own", 1, "--processes", 2, "--clients", 1), "more than 1 clients"),
        (("--own", 1, "--rate", 50_000, "--clients", 100, "--rounds", 1), "take more --rounds"),
        (("--own", 1, "--report", "/nowhere/page.html"), "lies in no folder"),
        (("--relay", "127.0.0.1:9", "--config", "/nowhere/relay.toml"), "is not there"),
    ],
)
def test_what_contradicts_itself_is_refused(scripts, words, reason):
    assert reason in refused(scripts, *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--relay", "8.8.8.8:3478"), "a public address"),
        (("--relay", "127.0.0.1"), "is not HOST:PORT"),
        (("--relay", "[::1]:3478"), "is IPv6"),
        (("--transceiver", "10.9.9.9:9000"), "lies in no cluster of the relay"),
        (("--transceiver", "127.0.0.1:65535", "--processes", 2), "65535 to 65536 lies in no"),
        (("--clients", 70_000, "--rate", 1), "more than the relay opens flows for at once"),
        (("--sources", "198.51.100.0/24"), "none of this machine's addresses"),
        (("--sources", "127.9.9.0/30"), "60 clients are more than 2 addresses"),
        (("--pid", 2**22), "there is no process"),
        (("--metrics", "http://8.8.8.8/metrics"), "--metrics: 8.8.8.8 is a public address"),
    ],
)
def test_what_leads_nowhere_is_refused(scripts, relay, words, reason):
    given = {"--relay": f"127.0.0.1:{relay.public}", "--config": relay.config}
    given |= {"--transceiver": "127.0.0.1:9000", "--clients": 60}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert reason in refused(scripts, *(word for pair in given.items() for word in pair))


def test_a_key_file_that_is_missing_is_named(scripts, relay, tmp_path):
    text = relay.config.read_text().replace(str(relay.keys), str(tmp_path / "no-keys"))
    (tmp_path / "relay.toml").write_text(text)
    words = "--relay", f"127.0.0.1:{relay.public}", "--config", tmp_path / "relay.toml"
    assert "no-keys" in refused(scripts, *words)
    assert not (tmp_path / "no-keys").exists()


def test_a_port_that_is_taken_is_named(scripts, relay):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        words = "--relay", f"127.0.0.1:{relay.public}", "--config", relay.config
        done = flood(*small(*words, "--transceiver", taken))
    assert done.returncode == 1 and f"address {taken} is taken" in sentence(done)


def test_silence_is_explained(scripts, relay, tmp_path):
    """Nobody there; somebody who says nothing; a relay that has other keys."""
    (port,) = scripts.dev.free_ports(1, socket.SOCK_DGRAM)
    words = small(*at(scripts, relay), "--patience", 0.5)
    nobody = flood(*words, "--relay", f"127.0.0.1:{port}")
    assert nobody.returncode == 1
    assert "60 of 60 clients got no answer within 0.5 s" in sentence(nobody)
    assert f"has UDP port {port} open" in sentence(nobody)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        silent = flood(*words, "--relay", f"127.0.0.1:{mute.getsockname()[1]}")
    assert silent.returncode == 1 and "does the relay run there" in sentence(silent)
    scripts.firsts.make_keys(tmp_path / "keys")
    text = relay.config.read_text().replace(str(relay.keys), str(tmp_path / "keys"))
    text = text.replace('state_dir = "."', f'state_dir = "{relay.config.parent}"')
    (tmp_path / "relay.toml").write_text(text)
    other = flood(*words, "--config", tmp_path / "relay.toml")
    assert other.returncode == 1 and "the relay dropped" in sentence(other)


def test_addresses_are_guarded_before_the_relay_is_asked_for(scripts):
    place = scripts.placing.Place(("127.0.0.1", 1), None, None, (scripts.rig.CLUSTER,))
    assert scripts.placing.home(place, ("127.3.2.1", 5), 3) is scripts.rig.CLUSTER
    with pytest.raises(ValueError, match=r"10\.0\.0\.1:5 to 7 lies in no cluster"):
        scripts.placing.home(place, ("10.0.0.1", 5), 3)


def test_what_is_here_is_known(scripts):
    assert scripts.observed.is_here("127.9.8.7") and not scripts.observed.is_here("192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert scripts.observed.holders(sock.getsockname()[1]) == [os.getpid()]


def test_counters_over_http(scripts, relay):
    """As they are seen of a relay on another machine."""
    table = settings.load(relay.config, settings.Relay).relay
    here = scripts.observed.Observed(table, ("127.0.0.1", relay.public))
    assert here.tells_workers_apart() and here.workers() == relay.worker_pids()
    url = re.search(r"http://[\d.]+:\d+/metrics", relay.log())[0]
    far = scripts.observed.Observed(table, ("127.0.0.1", 1), metrics=url)
    assert not far.tells_workers_apart()
    wait_for(lambda: far.now().received == here.now().received)
    with pytest.raises(ValueError, match="does not answer"):
        scripts.observed.Observed(table, ("127.0.0.1", 1), metrics="http://127.0.0.1:9/metrics")


@contextlib.contextmanager
def answering(answers):
    """A server of this process that says each of these in turn: a page, an address to go to, or
    nothing at all."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.pop(0)
            if answer is None:
                return
            self.send_response(302 if answer.startswith("http") else 200)
            self.send_header("Location", answer if answer.startswith("http") else "/")
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            server.shutdown()
            thread.join()


COUNTED = """
earshot_relay_inbound_received_total{{worker="0"}} {}
earshot_relay_inbound_dropped_integrity_total{{worker="0"}} 3
"""


def test_metrics_may_be_silent_once_it_runs(scripts, relay):
    table = relay.table()
    with answering([COUNTED.format(5), None, COUNTED.format(9)]) as url:
        far = scripts.observed.Observed(table, ("127.0.0.1", 1), metrics=url)
        assert far.later() == []
        stood = far.now()
        assert (stood.received, stood.drops["integrity"]) == ([5], 3)
        assert far.now().received == [9]
    assert "1 times the relay's /metrics did not answer" in far.later()[0]
    with answering([None]) as url, pytest.raises(ValueError, match="does not answer"):
        scripts.observed.Observed(table, ("127.0.0.1", 1), metrics=url)


def test_metrics_are_asked_where_they_were_named_and_nowhere_else(scripts, relay):
    with (
        answering([COUNTED.format(5)]) as there,
        answering([there]) as url,
        pytest.raises(ValueError, match="does not answer: HTTP Error 302"),
    ):
        scripts.observed.Observed(relay.table(), ("127.0.0.1", 1), metrics=url)


# --- nothing stays behind -------------------------------------------------------------------------


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_an_interrupt_ends_all_that_was_started():
    process = subprocess.Popen(
        argv(*small("--own", 1, "--processes", 2, "--seconds", 600, "--rounds", 300)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "a second" not in (line := process.stderr.readline()):
            assert line, "it ended before it sent anything"
        started = children(process.pid)
        started += [each for pid in started for each in children(pid)]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "what was started has ended" in said
    assert len(started) >= 5  # the relay, its worker and its keeper, two that make load
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_dies_is_an_error(scripts, relay):
    process = subprocess.Popen(
        argv(*small(*at(scripts, relay), "--seconds", 600, "--rounds", 300)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "the tool alone" not in (line := process.stderr.readline()):
            assert line, "it ended before it sent anything"
        (child,) = children(process.pid)
        os.kill(child, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and "a process that makes load has ended" in said
