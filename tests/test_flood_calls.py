"""flood.py calls and its engine: calls connect, talk, are answered, fail for a reason, come back.

One system of two transceivers serves all tests; the command under test starts its own beside it.
"""

import asyncio
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 60


def _script(name):
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


callers, dev, findings, heard, options, ring, ringing, saying, speaking, tally = map(
    _script,
    [
        "callers",
        "dev",
        "findings",
        "heard",
        "options",
        "ring",
        "ringing",
        "saying",
        "speaking",
        "tally",
    ],
)
MS = 1_000_000


async def until(condition, what):
    """Wait for `condition()`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def command(*words):
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "flood.py", "calls", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# --- what is heard --------------------------------------------------------------------------------


class Stream:
    """A sender whose packets leave every 20 ms."""

    def __init__(self):
        self.heard = heard.Heard()
        self.heard.connected()
        self.sequence, self.timestamp, self.now_ns = 65_530, (1 << 32) - 3_000, 10**9

    def send(self, *, lost=False, late_ms=0, octets=80):
        if not lost:
            at_ns = self.now_ns + late_ms * MS
            self.heard.packet(at_ns, self.sequence & 0xFFFF, self.timestamp & 0xFFFF_FFFF, octets)
        self.sequence += 1
        self.pause(20)

    def pause(self, ms):
        self.timestamp += 48 * ms
        self.now_ns += ms * MS

    def silence_ms(self, since_ns=0):
        return round(self.heard.silence_ms(since_ns, self.now_ns))


def test_pauses_that_timestamps_explain_are_no_silence():
    stream = Stream()
    for _ in range(20):
        stream.send()
    stream.pause(300)
    for _ in range(20):
        stream.send()
    assert stream.silence_ms() == 0
    assert stream.heard.lost(0, stream.now_ns) == 0
    assert stream.heard.received(0, stream.now_ns) == 40
    pause_ns = stream.heard.at_ns[19]
    for since_ms, until_ms in ((0, 100), (100, 200), (250, 350)):  # as it was known afterwards
        begin, end = pause_ns + since_ms * MS, pause_ns + until_ms * MS
        assert stream.heard.silence_ms(begin, end) == 0


def test_loss_lateness_and_a_silence_that_lasts():
    stream = Stream()
    for _ in range(10):
        stream.send()
    before = stream.now_ns
    for _ in range(5):
        stream.send(lost=True)
    stream.send()
    assert (stream.silence_ms(), stream.heard.lost(before, stream.now_ns)) == (100, 5)
    assert stream.heard.lost(0, before) == 0
    after = stream.now_ns
    stream.send(late_ms=15)
    stream.send()
    assert stream.silence_ms(after) == 15
    stream.pause(500)  # nothing comes, and nothing said that it would pause
    assert stream.silence_ms(after) == 500
    assert stream.heard.silence_ms(stream.now_ns - 100 * MS, stream.now_ns) == 100


def test_a_usual_pause_is_granted_to_what_has_not_come_unless_a_reply_sounds():
    stream = Stream()
    for _ in range(3):
        stream.send()
        stream.send()
        stream.pause(200)
    assert stream.silence_ms() == 0
    stream.pause(100)
    assert stream.silence_ms() == 100
    stream.heard.sounding = True
    assert stream.silence_ms() == 300
    stream.heard.sounding = stream.heard.flowing = False
    assert stream.silence_ms() == 0


def test_what_comes_out_of_order_is_late_and_not_lost():
    stream = Stream()
    stream.send()
    held = stream.sequence & 0xFFFF, stream.timestamp & 0xFFFF_FFFF
    stream.send(lost=True)
    for _ in range(3):
        stream.send()
    assert stream.heard.lost(0, stream.now_ns) == 1
    stream.heard.packet(stream.now_ns, *held, 80)
    stream.pause(20)
    assert stream.heard.lost(0, stream.now_ns) == 0


def test_another_connection_begins_anew_and_the_time_between_is_silence():
    stream = Stream()
    for _ in range(5):
        stream.send()
    stream.pause(400)
    stream.heard.connected()
    stream.sequence, stream.timestamp = 77, 1234
    assert stream.silence_ms() == 400
    stream.send(octets=3)
    stream.pause(3_000)  # who has come back speaks first
    assert (stream.silence_ms(), stream.heard.lost(0, stream.now_ns)) == (400, 0)
    stream.send()
    stream.pause(500)
    assert stream.silence_ms() == 500


def test_a_packet_is_lost_in_the_time_in_which_it_was_due():
    stream = Stream()
    for _ in range(10):
        stream.send()
    for _ in range(10):
        stream.send(lost=True)
    middle = stream.now_ns
    for _ in range(5):
        stream.send(lost=True)
    stream.send()
    assert stream.heard.lost(middle - 200 * MS, middle) == 10
    assert stream.heard.lost(middle, stream.now_ns) == 5
    assert stream.heard.lost(middle - 60 * MS, middle + 40 * MS) == 5  # and none came in it
    assert stream.heard.lost(0, stream.now_ns) == 15
    assert stream.heard.lost(stream.now_ns, stream.now_ns) == 0


def test_what_has_not_come_and_will_not_is_lost():
    stream = Stream()
    for _ in range(3):
        stream.send()
        stream.send()
        stream.pause(200)
    begun = stream.now_ns
    stream.pause(1_000)  # a usual pause of 200 ms is granted, once
    assert stream.heard.lost(0, stream.now_ns) == 50
    assert stream.heard.lost(stream.now_ns - 500 * MS, stream.now_ns) == 25
    assert round(stream.heard.silent_ms(begun, stream.now_ns)) == 1_000
    stream.heard.flowing = False
    assert stream.heard.lost(0, stream.now_ns) == 0
    stream.heard.flowing = True
    silent_until = stream.now_ns
    stream.send()  # the timestamp says that all of it was a pause
    assert stream.heard.lost(0, stream.now_ns) == 0
    assert stream.heard.silent_ms(begun, silent_until) == 0


def test_a_call_that_has_ended_loses_nothing_more(voice):
    call = ring.Call(SimpleNamespace(voice=voice), 0, {})
    call.heard = (stream := Stream()).heard
    for _ in range(5):
        stream.send()
    ended = stream.now_ns
    stream.pause(1_000)
    assert call.lost_down(0, stream.now_ns) == 50
    assert call.silent_ms(0, stream.now_ns) == 1_000
    call.ended_ns = ended
    assert call.lost_down(0, stream.now_ns) == 0
    assert call.silent_ms(0, stream.now_ns) == 0


def test_reports_say_what_was_lost_on_the_way_up():
    found = heard.Heard()
    found.connected()
    for second, lost in enumerate((0, 0, 3, 3, 9)):
        found.report(second * 10**9, lost, 50 * second)
    assert found.lost_up(1 * 10**9 + 1, 2 * 10**9) == 3
    assert found.lost_up(2 * 10**9 + 1, 3 * 10**9) == 0
    assert found.lost_up(0, 10**10) == 9
    found.connected()
    assert found.lost_up(5 * 10**9, 6 * 10**9) is None


# --- what is said ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voice():
    made = speaking.Voice(7)
    made.prepare(16_000)
    return made


def test_a_reply_is_right_only_if_it_is_that_turn(voice):
    for said in range(3):
        for other in range(3):
            turn = voice.turn(said, 16_000)
            payloads = voice.turn(other, 16_000).payloads
            # As it comes: a packet is missing, two are in the wrong order.
            packets = [(n, payload) for n, payload in enumerate(payloads) if n != 50]
            packets[30], packets[31] = packets[31], packets[30]
            echo = speaking.Echo(turn, packets)
            print(said, other, round(echo.compare(), 3))
            assert echo.whole
            assert echo.right == (said == other)
    silence = [(n, b"\xf8\xff\xfe") for n in range(150)]
    assert speaking.Echo(voice.turn(0, 16_000), silence).compare() < 0.3


def test_a_reply_without_a_pause_before_it_is_found_by_its_event(voice):
    talk = saying.Talk(voice, 0, interrupts=False, checked=False)
    talk.begin(16_000)
    while not talk.turns or talk.turns[0].ended_ns is None:
        talk.next()
    first = talk.turns[0]
    assert talk.heard(first.ended_ns + 1, 1, b"sound", marker=False) is None
    talk.started(first.ended_ns + 20 * MS)
    assert talk.unanswered(first.ended_ns + 10**10) == 0
    assert round(first.reply_ms) == 20 - speaking.SILENCE_MS


def compared(wanted, *calls):
    """What is said of calls whose replies were to be compared: the figures and the failures."""
    finding = findings.Finding("calls")
    finding.figures = {"turns": {"unanswered": 0}, "replies_compared": tally._compared(calls)}
    tally._judge(finding, SimpleNamespace(compare=wanted), calls)
    return finding.figures["replies_compared"]["not_whole"], finding.failures


def test_replies_that_never_are_whole_are_a_failure(voice):
    turn = voice.turn(0, 16_000)
    short = speaking.Echo(turn, [(n, b"") for n in range(20)])
    right = speaking.Echo(turn, [(n, b"") for n in range(150)], correlation=0.99)

    def call(echo, seconds=8, **more):
        moments = {"connected": 50.0}
        whole = {"checked": True, "interrupts": False, "failure": None, "moments": moments}
        ended_ns = round((seconds + 0.05) * 1e9)
        return SimpleNamespace(echo=echo, offered_ns=0, ended_ns=ended_ns, **whole | more)

    assert compared(True, call(right), call(short), call(None)) == (2, [])
    missed, (failure,) = compared(True, call(short), call(None))
    assert missed == 2 and failure.startswith("no reply was whole, though 2 calls")
    assert compared(False, call(short)) == (1, [])
    for other in ({"seconds": 6}, {"interrupts": True}, {"checked": False}):
        assert compared(True, call(None, **other)) == (0, [])


def test_a_reply_that_begins_too_soon_is_of_the_turn_before(voice):
    talk = saying.Talk(voice, 0, interrupts=False, checked=True)
    talk.begin(16_000)
    while not talk.turns or talk.turns[0].ended_ns is None:
        talk.next()
    first = talk.turns[0]
    assert talk.heard(first.ended_ns + 100 * MS, 1, b"sound", marker=True) is None
    assert talk.heard(first.ended_ns + 230 * MS, 2, b"sound", marker=True) is first
    assert talk.heard(first.ended_ns + 250 * MS, 3, b"more", marker=False) is None
    assert (round(first.reply_ms), talk.echo.packets) == (30, [(2, b"sound"), (3, b"more")])


# --- calls ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system():
    with dev.running(None, True, "127.0.0.1", False, patient=True) as found:
        yield found


@pytest.fixture(scope="module")
def whole(system):
    """The command, running beside the other tests."""
    schedule = ("--rate", 2, "--seconds", 2, "--talk", 9, "--even", "--interrupting", 0.5)
    process = command("--page", system[1]["page"], *schedule, "--seed", 7, "--json")
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)


class Mistreating:
    """Signaling that does something wrong with each offer, by the first part of the path."""

    def __init__(self, page):
        self.page = page.rstrip("/")
        self.silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.silent.bind(("127.0.0.1", 0))

    async def handle(self, request):
        how = request.match_info["how"]
        if how.isdigit():
            return web.Response(status=int(how), text="no")
        if how == "slow":
            await asyncio.sleep(PATIENCE_S)
        if how == "garbage":
            return web.Response(status=201, text="hello", headers={"Location": "/a/b"})
        url = f"{self.page}/{request.match_info['path']}"
        async with self.http.request(
            request.method, url, data=await request.read(), headers=request.headers
        ) as response:
            text, status = await response.text(), response.status
            headers = {
                name: response.headers[name] for name in ("Location",) if name in response.headers
            }
        if how == "homeless":
            headers = {}
        if how == "public":
            text = text.replace("127.0.0.1", "8.8.8.8")
        if how == "silent":
            (_, port), *_ = callers.candidates(text)
            text = text.replace(f" {port} typ", f" {self.silent.getsockname()[1]} typ")
        if how == "stranger":
            at = text.index("a=fingerprint:sha-256 ") + len("a=fingerprint:sha-256 ")
            text = text[:at] + ("00" if text[at : at + 2] != "00" else "11") + text[at + 2 :]
        return web.Response(status=status, text=text, headers=headers)

    async def __aenter__(self):
        app = web.Application()
        app.router.add_route("*", "/{how}/{path:.*}", self.handle)
        self.http = aiohttp.ClientSession()
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        host, port = self.runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_):
        await self.http.close()
        await self.runner.cleanup()
        self.silent.close()


FAILURES = {
    "401": "unauthorized",
    "403": "unauthorized",
    "429": "too many",
    "503": "unavailable",
    "500": "refused",
    "slow": "no answer",
    "garbage": "bad answer",
    "homeless": "bad answer",
    "public": "forbidden candidate",
    "silent": "no ICE",
    "stranger": "no DTLS",
}


def test_what_goes_wrong_is_named(whole, system, voice, monkeypatch):
    # Eleven calls at once: a step that is only slow has not failed.
    monkeypatch.setattr(callers, "STEP_S_MAX", 8.0)
    monkeypatch.setattr(ring, "ANSWER_S_MAX", 8.0)

    async def call(page, **more):
        each = ringing.Ringing(page, seed=1, **more)
        each.voice = voice
        async with each:
            (call,) = await each.hold(1)
            assert call.state == "failed"
            assert call.why
            assert call.failure in ringing.FAILURES
            return call.failure

    async def scenario():
        async with Mistreating(system[1]["page"]) as signaling:
            pages = [f"{signaling.url}/{how}" for how in FAILURES]
            found = await asyncio.gather(*map(call, pages))
            assert dict(zip(FAILURES, found, strict=True)) == FAILURES
        assert await call("http://127.0.0.1:1/") == "unreachable"

    asyncio.run(scenario())


def test_a_call_that_is_not_answered_says_so(system, voice, monkeypatch):
    monkeypatch.setattr(saying, "REPLY_S_MAX", 0.5)
    detection = {"type": "server_vad", "silence_duration_ms": 200, "create_response": False}
    session = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}

    async def scenario():
        each = ringing.Ringing(system[1]["page"], seed=1, session=session)
        each.voice = voice
        async with each:
            (call,) = await each.run(1, 1.5, 10, poisson=False)
            assert (call.failure, call.why) == ("no audio", "no reply was heard")
            assert call.client is None
            assert call.heard.received(0, 1 << 62) >= 1  # what opens the line

    asyncio.run(scenario())


def test_no_more_than_so_many_calls_are_made(system, voice):
    async def scenario():
        each = ringing.Ringing(system[1]["page"], seed=1, at_once=2)
        each.voice = voice
        async with each:
            made = await each.run(10, 1, 1.5, poisson=False)
        assert (len(made), each.refused) == (2, 8)
        assert [(call.state, call.failure) for call in made] == [("ended", None)] * 2

    asyncio.run(scenario())


def test_the_command_makes_complete_calls(whole):
    out, errors = whole.communicate(timeout=PATIENCE_S)
    print(errors)
    found = json.loads(out)
    print(json.dumps({name: found[name] for name in ("set_up_ms", "conversation_ms", "tool")}))
    calls, compared = found["calls"], found["replies_compared"]
    assert calls["offered"] == 4
    assert calls["connected"] == calls["answered_by_speech"] == 4
    assert calls["failed_by_reason"] == {}
    assert (compared["compared"] > 0, compared["right_percent"]) == (True, 100.0)
    assert {row["what"]: row["count"] for row in found["set_up_ms"]} == dict.fromkeys(
        ("answer", "ice", "connected", "first audio", "channel", "session"), 4
    )
    talking = {row["what"]: row["count"] for row in found["conversation_ms"]}
    assert talking["reply"] >= 4
    assert talking["interruption"] >= 1
    assert found["audio"]["packets_received"] > 4 * speaking.TURN_PACKETS / 2
    # A machine that is busy may answer a turn too late; nothing else may be wrong.
    assert all("turns were not answered" in each for each in found["failures"])
    assert whole.returncode == bool(found["failures"])


@pytest.fixture
def handlers():
    """Of signals, as they were."""
    before = [signal.getsignal(number) for number in options.ENDINGS]
    yield
    for number, handler in zip(options.ENDINGS, before, strict=True):
        signal.signal(number, handler)


def test_a_second_signal_does_not_interrupt_the_end_of_calls(handlers):
    ended = []

    async def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            for number in options.ENDINGS:
                os.kill(os.getpid(), number)
                for _ in range(10):  # the loop hears of it in one of these
                    await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        options.interruptible(main())
    assert ended
    for number in options.ENDINGS:
        assert signal.getsignal(number) is signal.SIG_IGN


def test_without_a_signal_all_is_as_it_was(handlers):
    def mine(*_):
        pass

    for number in options.ENDINGS:
        signal.signal(number, mine)
    assert options.interruptible(asyncio.sleep(0, 7)) == 7
    assert {signal.getsignal(number) for number in options.ENDINGS} == {mine}


async def sessions(address):
    """How many a transceiver has."""
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/metrics") as response:
        text = await response.text()
    lines = [each for each in text.splitlines() if each.startswith("earshot_transceiver_sessions ")]
    return float(lines[0].split()[1])


def test_ctrl_c_hangs_up(whole, system):
    whole.wait(PATIENCE_S)

    async def count():
        return sum([await sessions(each) for each in system[1]["transceivers"]])

    async def scenario():
        before = await count()  # whom earlier tests have left in the middle
        process = command("--page", system[1]["page"], "--rate", 20, "--seconds", 60)
        deadline = time.monotonic() + PATIENCE_S
        while await count() < before + 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "calls that connect"
            await asyncio.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("flood: interrupted")
        assert "Traceback" not in errors
        while await count() > before:
            assert time.monotonic() < deadline, "calls that were hung up"
            await asyncio.sleep(0.1)

    asyncio.run(scenario())


def test_calls_move_and_come_back(system, voice):
    async def scenario():
        each = ringing.Ringing(system[1]["page"], seed=1, comes_back=True)
        each.voice = voice
        async with each:
            calls = await each.hold(4)
            assert each.talking() == calls
            since = time.monotonic_ns()
            for number, call in enumerate(calls):
                before = call.client.wire.address
                call.move(check=number % 2 == 0)
                assert call.client.wire.address[0] != before[0]
            await until(
                lambda: all(call.received(since, time.monotonic_ns()) > 50 for call in calls),
                "packets at the new addresses",
            )
            for call in calls:
                now = time.monotonic_ns()
                print("moved", call.silence_ms(since, now), call.lost_down(since, now))
                assert call.returns == []
            since = time.monotonic_ns()
            name, most = max(
                [
                    (f"transceiver-{number}", await sessions(address))
                    for number, address in enumerate(system[1]["transceivers"], 1)
                ],
                key=lambda found: found[1],
            )
            assert most >= 2
            process = system[0].running.pop(name)
            process.kill()
            process.wait()
            await until(
                lambda: (
                    any(call.returns for call in calls)
                    and all(one.reply_ns for call in calls for one in call.returns)
                    and each.talking() == calls
                ),
                "replies to calls that have come back",
            )
            back = [call for call in calls if call.returns]
            assert 0 < len(back) <= 4
            for call in back:
                (one,) = call.returns
                print("back", one, call.silence_ms(since, time.monotonic_ns()))
                assert one.resumed
                assert one.heard_ns < one.noticed_ns <= one.offered_ns < one.connected_ns
                away_ms = (one.connected_ns - one.heard_ns) / 1e6
                assert 0 < call.silence_ms(since, time.monotonic_ns()) < away_ms + 1_000
            for call in calls:
                assert call.failure is None
        assert {call.state for call in calls} == {"ended"}
        assert {call.failure for call in calls} == {None}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--page URL, or --start"),
        (("--start", "--page", "http://127.0.0.1/"), "--page URL, or --start"),
        (("--page", "ftp://127.0.0.1/"), "is no address of signaling"),
        (("--page", "http://8.8.8.8/"), "--i-own-this-target"),
        (("--page", "http://127.0.0.1/", "--key-file", "/dev/null"), "has not one key"),
        (("--start", "--rate", "100", "--seconds", "600", "--talk", "60"), "3,600,000 seconds of"),
    ],
)
def test_what_cannot_be_called_is_said(words, sentence):
    dialling = _script("dialling")
    app = typer.Typer()
    app.command()(dialling.calls)
    ran = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))
    assert ran.exit_code == 2
    assert sentence in " ".join(ran.output.split())
