"""Model servers over real connections: `parrot serve`, and servers without manners."""

import asyncio
import base64
import contextlib
import gc
import hashlib
import logging
import signal
import socket
import time
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import orjson
import psutil
import pytest
from aiohttp.http import WS_KEY

import audio
import backend
import conversation
import endpoints
import floor
import ledger
import parrot
import settings
from metrics import Timing
from metrics import Transceiver as Count
from realtime import Event
from resample import Resampler
from turns import RATE_HZ
from uplink import BATCH_EVENTS, BATCH_S

from . import servers
from .line import SPEECH, Plain

PATIENCE_S = 20.0
SENTENCE = bytes(RATE_HZ) + SPEECH + bytes(2 * RATE_HZ)
"""Half a second of silence, the sentence, a second of silence."""
ADDED = "conversation.item.added"


def realtime_at(url: str, **more: Any) -> settings.Backend:
    return settings.Backend(kind="realtime", url=endpoints.ModelUrl(url), **more)


class Talk:
    """One session at a model server, and all that it said."""

    def __init__(self, table: settings.Backend, session: Event | None = None) -> None:
        self.counters = ledger.Counters(Count)
        self.backends = backend.Backends(table, (), self.counters, time.monotonic)
        self.events: list[Event] = []
        self.lost: list[str] = []
        self.on_event: Callable[[Event], None] = self.events.append
        self.chosen = self.backends.connect(session, self._emitted, self.lost.append)

    def _emitted(self, event: Event) -> None:
        self.on_event(event)

    def count(self, kind: str) -> int:
        return sum(event["type"] == kind for event in self.events)

    def codes(self) -> list[str]:
        return [e["error"]["code"] for e in self.events if e["type"] == "error"]

    def sound(self) -> bytes:
        name = "response.output_audio.delta"
        return b"".join(e["delta"] for e in self.events if e["type"] == name)

    def send(self, kind: str, **fields: Any) -> None:
        self.chosen.send({"type": kind, **fields}, time.monotonic())

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.002)
                self.chosen.tick(time.monotonic())

    async def heard(self, kind: str, times: int = 1) -> Event:
        """The event of a type that came as the so many-th of it."""
        await self.until(lambda: self.count(kind) >= times)
        return [event for event in self.events if event["type"] == kind][times - 1]

    async def told(self, code: str, times: int = 1) -> None:
        await self.until(lambda: self.codes().count(code) >= times)

    async def speak(self, pcm: bytes = SENTENCE) -> None:
        await self.speak_raw(Resampler(RATE_HZ, self.chosen.rate_hz).feed(pcm))

    async def speak_raw(self, pcm: bytes) -> None:
        """At the backend's rate, 20 ms at once."""
        step = self.chosen.rate_hz // 25
        for at in range(0, len(pcm), step):
            self.chosen.append(pcm[at : at + step], time.monotonic())
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.chosen.close()
        await self.backends.close()
        assert not [task for task in asyncio.all_tasks() if "Uplink" in repr(task.get_coro())]
        self.chosen.close()


@contextlib.asynccontextmanager
async def talking(table: settings.Backend, session: Event | None = None) -> AsyncIterator[Talk]:
    talk = Talk(table, session)
    try:
        yield talk
    finally:
        await talk.close()


def kinds(events: list[Event]) -> list[str]:
    """Types in order, runs of deltas as one."""
    found: list[str] = []
    for event in events:
        if not (found and found[-1] == event["type"] and "delta" in event):
            found.append(event["type"])
    return found


def likeness(said: bytes, heard: bytes) -> float:
    """The peak of the normalised cross-correlation."""
    a, b = (np.frombuffer(pcm, "<i2").astype(float) for pcm in (said, heard))
    size = 1 << (len(a) + len(b)).bit_length()
    product = np.fft.irfft(np.fft.rfft(b, size) * np.conj(np.fft.rfft(a, size)), size)
    return float(np.max(product) / np.sqrt(np.sum(a**2) * np.sum(b**2)))


def in_process(session: Event | None) -> list[Event]:
    """The same conversation with the parrot in this process."""
    events: list[Event] = []
    chosen = backend.InProcess(parrot.Parrot("tag", session), events.append)
    now = 100.0
    for at in range(0, len(SENTENCE), 640):
        now += 0.02
        chosen.append(SENTENCE[at : at + 640], now)
    while events[-1]["type"] != "response.done":
        now += 0.02
        chosen.tick(now)
    chosen.send({"type": "session.update", "session": {"instructions": "Be brief."}}, now)
    chosen.send({"type": "response.cancel", "event_id": "mine"}, now)
    return events


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
@pytest.mark.parametrize("options", [[], ["--beta"]], ids=["ga", "beta"])
def test_a_whole_conversation_in_the_parrot_s_own_order(options: list[str], rate_hz: int) -> None:
    asked = {
        "instructions": "Repeat.",
        "model": "any",
        "audio": {
            "input": {"transcription": {"model": "x"}, "turn_detection": {"type": "server_vad"}}
        },
    }

    async def run(url: str) -> None:
        async with talking(realtime_at(url, rate_hz=rate_hz), asked) as talk:
            created = await talk.heard("session.created")
            shown = created["session"]
            assert shown["instructions"] == "Repeat."
            assert shown["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": rate_hz}
            assert shown["audio"]["input"]["transcription"] == {"model": "x"}
            await talk.speak()
            await talk.heard("response.done")
            assert likeness(Resampler(RATE_HZ, rate_hz).feed(SPEECH), talk.sound()) > 0.9
            talk.send("session.update", session={"instructions": "Be brief."})
            updated = await talk.heard("session.updated")
            assert updated["session"]["instructions"] == "Be brief."
            talk.send("response.cancel", event_id="mine")
            error = await talk.heard("error")
            assert error["error"]["event_id"] == "mine"
            assert kinds(talk.events) == kinds(in_process(asked))
            assert talk.lost == []
            assert talk.counters[Count.BACKEND_GARBLED] == 0

    with servers.serving("--rate", str(rate_hz), *options) as served:
        asyncio.run(run(served.url))


def _connections(port: int | None) -> list[object]:
    """This process's own, either end, of the server at this port."""
    found = psutil.Process().net_connections("tcp")
    return [each for each in found if each.raddr and port in (each.laddr.port, each.raddr.port)]


def test_closing_at_any_moment_leaves_nothing_behind() -> None:
    async def answer(line: servers.Line) -> None:
        if line.number % 3:
            await line.greet()
        await line.listen()

    async def run() -> None:
        async with servers.scripted(answer) as server:
            table, port = realtime_at(server.url), urlsplit(server.url).port
            counters = ledger.Counters(Count)
            backends = backend.Backends(table, (), counters, time.monotonic)
            before = None
            for number in range(120):
                chosen = backends.connect(None, lambda _: None, pytest.fail)
                chosen.append(bytes(640), 0.0)
                for _ in range(number % 40):  # some turns of the loop: each stage is met
                    await asyncio.sleep(0)
                chosen.close()
                if number == 20:
                    before = weakref.ref(chosen)
                del chosen
            await backends.close()
            assert before is not None
            assert before() is None
            assert not [task for task in asyncio.all_tasks() if "Uplink" in repr(task.get_coro())]
            deadline = time.monotonic() + PATIENCE_S
            while (left := _connections(port)) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert not left

    asyncio.run(run())


def test_wss_with_a_certificate_of_one_s_own_and_a_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    certificate, private_key = servers.certify(tmp_path)
    key = tmp_path / "model-key"
    key.write_text("sk-parrot\n")
    key.chmod(0o600)
    wrong = tmp_path / "wrong-key"
    wrong.write_text("sk-cuckoo\n")
    wrong.chmod(0o600)

    async def run(url: str) -> None:
        table = realtime_at(url, ca_file=certificate, key_file=key)
        async with talking(table) as talk:
            await talk.heard("session.created")
            assert talk.codes() == []
        async with talking(msgspec.structs.replace(table, key_file=wrong)) as talk:
            await talk.until(lambda: talk.lost)
            assert talk.lost == ["The model server refused the connection with status 401."]
            assert [event["type"] for event in talk.events] == ["session.created"]
            assert talk.counters[Count.BACKEND_CONNECT_FAILED] == 1
        async with talking(msgspec.structs.replace(table, ca_file=None, retry_s=0)) as talk:
            await talk.until(lambda: talk.lost)
            assert talk.lost == ["The model server cannot be reached."]

    options = ("--certificate", certificate, "--private-key", private_key, "--key-file", key)
    with servers.serving(*options) as served:
        asyncio.run(run(served.url))
    assert "is given up" in caplog.text
    assert "sk-" not in caplog.text


def test_a_server_killed_in_mid_reply_is_found_again_and_told() -> None:
    asked = {"audio": {"input": {"transcription": {"model": "x"}}}}

    async def run(served: servers.Served) -> None:
        async with talking(realtime_at(served.url), asked) as talk:
            await talk.heard("session.created")
            await talk.speak(SPEECH * 2 + bytes(2 * RATE_HZ))
            await talk.heard("response.output_audio.delta")
            talk.send("session.update", session={"instructions": "Be brief."})
            await talk.heard("session.updated")
            served.kill()
            await talk.told("backend_unavailable")
            failed = await talk.heard("response.done")
            assert failed["response"]["status"] == "failed"
            user, assistant = [e["item"] for e in talk.events if e["type"] == ADDED]
            talk.send("conversation.item.delete", item_id=user["id"], event_id="while away")
            with servers.serving(listen=served.listen) as again:
                await talk.told("backend_reconnected")
                # The new server knows the items by their old ids, and in words.
                await talk.heard("conversation.item.deleted")
                talk.send("conversation.item.retrieve", item_id=assistant["id"])
                found = await talk.heard("conversation.item.retrieved")
                assert "I heard" in found["item"]["content"][0]["text"]
                talk.send("session.update", session={})
                updated = await talk.heard("session.updated", 2)
                assert updated["session"]["instructions"] == "Be brief."
                assert updated["session"]["audio"]["input"]["transcription"] == {"model": "x"}
                await talk.speak()
                await talk.heard("response.output_audio.done")
                assert talk.count("session.created") == 1
                added = [e["item"]["id"] for e in talk.events if e["type"] == ADDED]
                assert added[:2] == [user["id"], assistant["id"]]
                assert len(added) == len(set(added)) == 4
                assert talk.lost == []
                assert talk.counters[Count.BACKEND_RECONNECTS] == 1
                assert again.process.poll() is None

    with servers.serving() as served:
        asyncio.run(run(served))


def test_connections_are_timed_and_a_closed_session_is_freed_without_the_collector() -> None:
    async def run(served: servers.Served) -> None:
        talk = Talk(realtime_at(served.url))
        await talk.heard("session.created")
        timings = talk.backends._uplinks.timings
        await talk.until(lambda: timings.count(Timing.BACKEND_CONNECT) == 1)
        assert 0 < timings.total(Timing.BACKEND_CONNECT) < PATIENCE_S
        assert talk.counters[Count.BACKEND_RECONNECTS] == 0
        gone, backends = weakref.ref(talk), talk.backends
        talk.chosen.close()
        del talk
        async with asyncio.timeout(PATIENCE_S):
            while gone() is not None:
                await asyncio.sleep(0.002)
        await backends.close()

    gc.collect()
    gc.disable()
    try:
        with servers.serving() as served:
            asyncio.run(run(served))
    finally:
        gc.enable()


def test_a_server_that_stays_away_is_given_up() -> None:
    async def run() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with talking(realtime_at(f"ws://127.0.0.1:{port}/", retry_s=5.0)) as talk:
                created = await talk.heard("session.created")
                assert created["session"]["audio"]["input"]["format"]["rate"] == 24_000
                await talk.speak()
                talk.send("response.create")
                await talk.until(lambda: talk.lost)
                assert talk.codes() == ["backend_unavailable"]
                assert talk.lost == ["The model server cannot be reached."]
                talk.chosen.append(bytes(640), 0.0)
                talk.send("response.create")
                assert talk.counters[Count.BACKEND_CONNECT_FAILED] > 2
                assert talk.counters[Count.BACKEND_AUDIO_DROPPED] > 0

    asyncio.run(run())


def test_a_server_that_comes_late_begins_the_session_then() -> None:
    async def answer(line: servers.Line) -> None:
        if line.number:
            await line.greet()
            await line.listen()

    async def run() -> None:
        async with (
            servers.scripted(answer) as server,
            talking(realtime_at(server.url), {"instructions": "Wait."}) as talk,
        ):
            await talk.told("backend_reconnected")
            assert [event["type"] for event in talk.events] == [
                "session.created",
                "error",
                "session.updated",
                "error",
            ]
            assert talk.events[0]["session"]["instructions"] == "Wait."

    asyncio.run(run())


GARBAGE = [
    "",
    "null",
    "[]",
    "{",
    "\N{PARROT}",
    '{"type": 7}',
    '{"type": "response.output_audio.delta", "delta": 7}',
    '{"type": "response.output_audio.delta", "delta": "!!!!"}',
    "[" * 100_000,
    '{"type": "x", "y": [' + "[]," * 200_000 + "[]]}",
    '{"type": "response.output_text.delta", "delta": "' + "x" * 300_000 + '"}',
]


def test_garbage_is_counted_and_the_session_goes_on() -> None:
    async def answer(line: servers.Line) -> None:
        await line.socket.send_str('{"type": "session.created"}')
        await line.greet()
        for nonsense in GARBAGE:
            await line.socket.send_str(nonsense)
        await line.socket.send_bytes(b"\xff\x00\xff")
        deep = '{"a":' * 500 + "7" + "}" * 500
        item = '{"id": "i", "deep": ' + deep + "}"
        await line.socket.send_str('{"type": "conversation.item.added", "item": ' + item + "}")
        await line.socket.send_bytes(b'{"type": "response.created", "response": null}')
        await line.listen()

    async def run() -> None:
        async with servers.scripted(answer) as server, talking(realtime_at(server.url)) as talk:
            await talk.heard("response.created")
            assert talk.counters[Count.BACKEND_GARBLED] == len(GARBAGE) + 2
            assert [event["type"] for event in talk.events] == [
                "session.created",
                "conversation.item.added",
                "response.created",
            ]

    asyncio.run(run())


def test_a_server_of_nothing_but_garbage_is_no_server() -> None:
    async def answer(line: servers.Line) -> None:
        await line.greet()
        for _ in range(200):
            await line.socket.send_str("quack")
        await line.listen()

    async def run() -> None:
        async with (
            servers.scripted(answer) as server,
            talking(realtime_at(server.url, retry_s=0.5)) as talk,
        ):
            await talk.until(lambda: talk.lost)
            assert talk.codes()[0] == "backend_unavailable"
            assert talk.lost == ["The model server sends what is not of the Realtime API."]

    asyncio.run(run())


def test_a_server_that_hangs_is_noticed_and_found_again() -> None:
    """It is stopped, and not ended: its kernel goes on to take what it is sent."""

    async def run(served: servers.Served) -> None:
        table = realtime_at(served.url, heartbeat_s=1.0, connect_timeout_s=3.0)
        async with talking(table) as talk:
            await talk.heard("session.created")
            served.process.send_signal(signal.SIGSTOP)
            await talk.told("backend_unavailable")
            (error,) = [e["error"] for e in talk.events if e["type"] == "error"]
            assert error["message"].startswith("The model server does not answer any more.")
            served.process.send_signal(signal.SIGCONT)
            await talk.told("backend_reconnected")

    with servers.serving() as served:
        asyncio.run(run(served))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("nothing", "said nothing"),
        ("not websocket", "cannot be reached"),
        ("a frame of 16 exabytes", "sent a message that is too large"),
        ("a frame of no known kind", "does not speak WebSocket"),
    ],
)
def test_servers_that_are_none(answer: str, why: str) -> None:
    """Down at the octets: a server by hand, behind an upgrade that is right."""
    frames = {
        "nothing": b"",
        "a frame of 16 exabytes": b"\x81\x7f" + b"\x7f" + b"\xff" * 7,
        "a frame of no known kind": b"\xff\x05quack",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if answer == "not websocket":
            writer.write(b"quack quack\r\n\r\n")
        else:
            key = next(x for x in head.split("\r\n") if x.lower().startswith("sec-websocket-key"))
            digest = hashlib.sha1(key.split()[1].encode() + WS_KEY).digest()
            writer.write(
                b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
            )
            writer.write(frames[answer])
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        table = realtime_at(f"ws://127.0.0.1:{port}/", answer_timeout_s=0.3, retry_s=0.0)
        async with talking(table) as talk:
            await talk.until(lambda: talk.lost)
            assert talk.lost == [f"The model server {why}."]
        server.close()

    asyncio.run(run())


def test_ten_minutes_in_one_delta_are_too_much_and_a_minute_comes_in_pieces() -> None:
    minute = bytes(60 * 2 * 24_000)

    def delta(pcm: bytes) -> Event:
        about = {"response_id": "r", "item_id": "i", "output_index": 0, "content_index": 0}
        sound = base64.b64encode(pcm).decode()
        return {"type": "response.output_audio.delta", "delta": sound, **about}

    begun = {"type": "response.created", "response": {"id": "r"}}
    said = (begun, delta(minute), delta(b"\1"), delta(b"\2\3\4"), {"type": "then"})
    first, then = [orjson.dumps(e) for e in said], orjson.dumps(delta(10 * minute))
    go_on = asyncio.Event()

    async def answer(line: servers.Line) -> None:
        await line.greet()
        if line.number == 0:
            for message in first:
                await line.socket.send_bytes(message)
            await go_on.wait()
            await line.socket.send_bytes(then)
        await line.listen()

    async def run() -> None:
        async with servers.scripted(answer) as server, talking(realtime_at(server.url)) as talk:
            others = 0
            worst = 0.0

            async def another_session() -> None:
                nonlocal others, worst
                while True:
                    begun = time.perf_counter()
                    await asyncio.sleep(0)
                    worst = max(worst, time.perf_counter() - begun)
                    others += 1

            other = asyncio.get_running_loop().create_task(another_session())
            await talk.heard("then")
            deltas = [e["delta"] for e in talk.events if "delta" in e]
            assert b"".join(deltas) == minute + b"\1\2\3\4"
            assert max(map(len, deltas)) <= 96_000
            other.cancel()
            go_on.set()
            await talk.told("backend_reconnected")
            print(f"\n  the loop stood still for {worst * 1000:.1f} ms at most")
            assert talk.codes() == ["backend_unavailable", "backend_reconnected"]
            assert sum(len(e.get("delta", b"")) for e in talk.events) == len(minute) + 4
            assert talk.lost == []

    asyncio.run(run())


def test_a_server_that_reads_slowly_loses_the_oldest_audio_and_nothing_grows() -> None:
    go_on = asyncio.Event()

    async def answer(line: servers.Line) -> None:
        await line.greet()
        await go_on.wait()
        await line.listen()

    async def run() -> None:
        async with servers.scripted(answer) as server, talking(realtime_at(server.url)) as talk:
            await talk.heard("session.created")
            second = bytes(2 * 24_000)
            appended = 0
            while not talk.counters[Count.BACKEND_AUDIO_DROPPED]:
                await talk.speak_raw(second)
                talk.chosen.tick(0.0)
                appended += 1
                assert appended < 600, "everything is taken, and kept somewhere"
            for _ in range(100):
                await talk.speak_raw(second)
            await talk.speak_raw(b"\1" * len(second))
            for number in range(100):
                talk.send("input_audio_buffer.clear", event_id=f"e{number}")
            told = talk.codes().count("audio_dropped")
            assert 1 <= told <= 3  # TCP takes more in bursts
            busy = [e["error"] for e in talk.events if e["type"] == "error"][told:]
            assert {error["code"] for error in busy} == {"backend_busy"}
            assert busy[-1]["event_id"] == "e99"
            go_on.set()
            (line,) = server.lines
            await talk.until(lambda: line.heard and line.heard[-1].get("event_id") == "e63")
            sent = [base64.b64decode(e["audio"]) for e in line.heard if "audio" in e]
            assert b"".join(sent).endswith(b"\1" * len(second))
            talk.chosen.tick(0.0)
            seconds = len(b"".join(sent)) / len(second)
            print(f"\n  {seconds:.1f} s of {appended + 101} s waited: here, in buffers, in TCP")
            dropped = talk.counters[Count.BACKEND_AUDIO_DROPPED]
            assert dropped + len(b"".join(sent)) == (appended + 101) * len(second)

    asyncio.run(run())


def test_a_server_that_never_pauses_leaves_time_for_others() -> None:
    async def answer(line: servers.Line) -> None:
        await line.greet()
        text = orjson.dumps({"type": "rate_limits.updated", "rate_limits": []}).decode()
        with contextlib.suppress(ConnectionError):
            while True:
                await line.socket.send_str(text)

    async def run() -> None:
        async with servers.scripted(answer) as server, talking(realtime_at(server.url)) as talk:
            await talk.heard("rate_limits.updated")
            before, begun = len(talk.events), time.monotonic()
            await asyncio.sleep(0.5)
            rate = (len(talk.events) - before) / (time.monotonic() - begun)
            print(f"\n  {rate:.0f} events a second are read")
            assert 0 < rate <= 2 * BATCH_EVENTS / BATCH_S

    asyncio.run(run())


def test_settings_that_are_refused_leave_a_session_with_the_right_audio() -> None:
    async def answer(line: servers.Line) -> None:
        await line.say(servers.CREATED)
        update = await line.hear("session.update")
        wrong = {"type": "invalid_request_error", "code": "bad", "message": "No such voice."}
        await line.say({"type": "error", "error": wrong | {"event_id": update["event_id"]}})
        update = await line.hear("session.update")
        await line.say({"type": "session.updated", "session": update["session"]})
        await line.listen()

    async def run() -> None:
        async with (
            servers.scripted(answer) as server,
            talking(realtime_at(server.url), {"instructions": "Sing."}) as talk,
        ):
            error = (await talk.heard("error"))["error"]
            assert [event["type"] for event in talk.events] == ["session.created", "error"]
            assert (error["message"], error["event_id"]) == ("No such voice.", None)
            first, second = (e["session"] for e in server.lines[0].heard)
            assert first["instructions"] == "Sing."
            assert "instructions" not in second
            assert first["audio"] == second["audio"]

    asyncio.run(run())


def test_a_server_that_confirms_nothing_is_taken_as_it_is() -> None:
    async def answer(line: servers.Line) -> None:
        await line.say(servers.CREATED)
        await line.listen()

    async def run() -> None:
        async with (
            servers.scripted(answer) as server,
            talking(realtime_at(server.url, answer_timeout_s=0.2)) as talk,
        ):
            await talk.heard("session.created")
            talk.send("response.create")
            await talk.until(lambda: len(server.lines[0].heard) == 2)
            assert talk.codes() == []

    asyncio.run(run())


def test_what_a_server_is_told_when_a_connection_opens() -> None:
    async def answer(line: servers.Line) -> None:
        await line.greet()
        await line.listen()

    async def run() -> None:
        async with servers.scripted(answer) as server:
            table = realtime_at(
                server.url + "?tenant=a",
                model="gpt realtime",
                headers={"X-Team": "birds"},
                dialect="beta",
            )
            async with talking(table) as talk:
                await talk.heard("session.created")
            (request,) = server.requests
            assert dict(request.query) == {"tenant": "a", "model": "gpt realtime"}
            assert request.headers["X-Team"] == "birds"
            assert request.headers["OpenAI-Beta"] == "realtime=v1"
            assert request.headers["Sec-WebSocket-Protocol"] == "realtime"
            assert "Authorization" not in request.headers
            (update,) = server.lines[0].heard
            assert update["session"] == {
                "input_audio_format": "pcm16",
                "output_audio_format": "pcm16",
            }

    asyncio.run(run())


def test_a_truncation_says_what_was_played_over_a_real_connection() -> None:
    """The conversation and the play-out of a call in front of it, in a time of their own."""
    seen: list[Event] = []

    async def run(url: str) -> None:
        async with talking(realtime_at(url, rate_hz=16_000)) as talk:
            playout = audio.Playout(Plain(), ssrc=1, payload_type=111, sequence=0, timestamp=0)
            terms = floor.Terms(None)
            call = conversation.Conversation("rtc_1", playout, floor.Floor(terms, 16_000))
            now = 100.0

            packets = 0

            def flow() -> None:
                nonlocal packets
                packets += len(playout.send(now))
                call.playout_events(now)
                for event in call.to_backend():
                    talk.chosen.send(event, now)
                seen.extend(orjson.loads(message) for message in call.to_client())

            def emitted(event: Event) -> None:
                talk.events.append(event)
                call.backend_event(event, now)
                flow()

            talk.on_event = emitted
            call.opened(now)
            await talk.heard("session.created")
            await talk.speak()
            await talk.heard("response.output_audio_transcript.delta")
            for _ in range(20):
                now += 0.02
                flow()
            played_ms = 20 * packets
            talk.events.clear()
            call.client_message('{"type": "output_audio_buffer.clear", "event_id": "stop"}', now)
            flow()
            truncated = await talk.heard("conversation.item.truncated")
            done = await talk.heard("response.done")
            assert done["response"]["status_details"]["reason"] == "client_cancelled"
            assert truncated["audio_end_ms"] == played_ms >= 400
            types = [event["type"] for event in seen]
            assert types.count("output_audio_buffer.cleared") == 1
            assert "error" not in types

    with servers.serving("--rate", "16000") as served:
        asyncio.run(run(served.url))
