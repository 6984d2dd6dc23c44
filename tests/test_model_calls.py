"""Whole calls whose model server is elsewhere: found, lost, found again, mad, mute, or refused."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson
from aiortc.contrib.media import MediaPlayer
from aiortc.mediastreams import AudioStreamTrack

import settings
from metrics import Transceiver as Count

from . import servers, shim
from .test_transceiver import ROOT, House, configure, types

BACKEND = """
[backend]
kind = "realtime"
url = "{url}"
answer_timeout_s = {answer_s}
retry_s = {retry_s}
[[model]]
name = "birds"
"""


def calls(
    folder: Path,
    url: str,
    scenario: Callable[[House], Coroutine[Any, Any, None]],
    *,
    retry_s: float = 20.0,
    answer_s: float = 5.0,
) -> None:
    """Run a scenario with a transceiver whose backend is at `url`; nothing may be left behind."""

    async def run() -> None:
        extra = BACKEND.format(url=url, retry_s=retry_s, answer_s=answer_s)
        config = settings.load(configure(folder, extra=extra), settings.Transceiver)
        found = House(config, time.monotonic)
        before = asyncio.all_tasks()
        await found.start()
        try:
            await scenario(found)
            assert found.missing() == 0
            assert found.transceiver.counters[Count.DROPPED_FAULT] == 0
        finally:
            await found.stop()
        await shim.until(lambda: asyncio.all_tasks() == before)

    asyncio.run(run())


def codes(client: shim.Client) -> list[str]:
    found = [json.loads(message) for message in client.messages]
    return [event["error"]["code"] for event in found if event["type"] == "error"]


async def call(on: House, model: str | None = None, track: Any = None) -> shim.Client:
    """A connected client, which may ask for a model."""
    client = shim.Client()
    on.clients.append(client)
    offer = await client.offer(track or AudioStreamTrack())
    body = {"offer": offer, "model": model, "candidates": [list(on.shim.address)]}
    status, answer, _ = await on.ask("POST", "/v1/sessions", body)
    assert status == 201
    await client.accept(answer["answer"])
    await shim.until(lambda: client.messages)
    return client


def sentence() -> Any:
    return MediaPlayer(str(ROOT / "tests/data/sentence.wav")).audio


def test_a_server_is_lost_in_mid_call_and_the_call_goes_on(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = await call(on, track=sentence())
        assert types(client)[0] == "session.created"
        await shim.until(lambda: "output_audio_buffer.started" in types(client))
        served.kill()
        await shim.until(lambda: "backend_unavailable" in codes(client))
        # What had come of the reply is played to its end, and the client hears how it ended.
        await shim.until(lambda: "output_audio_buffer.stopped" in types(client))
        (done,) = [m for m in map(json.loads, client.messages) if m["type"] == "response.done"]
        assert done["response"]["status"] == "failed"
        with servers.serving(listen=served.listen):
            await shim.until(lambda: "backend_reconnected" in codes(client))
            client.channel.send('{"type": "response.create", "event_id": "again"}')
            await shim.until(lambda: types(client).count("response.created") >= 2)
            await shim.until(lambda: types(client)[-1] == "response.done")
            assert types(client).count("session.created") == 1
            assert on.transceiver.counters[Count.BACKEND_RECONNECTS] == 1
            assert len(on.transceiver.sessions) == 1

    with servers.serving() as served:
        calls(tmp_path, served.url, scenario)


def test_speaking_into_the_reply_of_a_server_elsewhere(tmp_path: Path) -> None:
    """The sentence over and over: whatever the parrot begins to say is interrupted by the next."""

    async def scenario(on: House) -> None:
        player = MediaPlayer(str(ROOT / "tests/data/sentence.wav"), loop=True)
        client = await call(on, track=player.audio)
        # Shorter than the pause behind the sentence, in which the reply begins.
        detection = {"type": "server_vad", "silence_duration_ms": 200}
        session = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        client.channel.send(json.dumps({"type": "session.update", "session": session}))
        await shim.until(lambda: "conversation.item.truncated" in types(client))
        seen = [json.loads(message) for message in client.messages]
        cleared = next(e for e in seen if e["type"] == "output_audio_buffer.cleared")
        truncated = next(e for e in seen if e["type"] == "conversation.item.truncated")
        # The first that is interrupted: one before it may have ended, if the client was held up.
        done = next(
            e["response"]
            for e in seen
            if e["type"] == "response.done" and e["response"]["id"] == cleared["response_id"]
        )
        assert done["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
        assert truncated["item_id"] == done["output"][0]["id"]
        assert truncated["audio_end_ms"] > 0
        assert codes(client) == []

    with servers.serving("--beta") as served:
        calls(tmp_path, served.url, scenario)


def test_a_mad_server_disturbs_nobody_who_talks_to_another(tmp_path: Path) -> None:
    """One session has a server that sends all it should not; the other asked for the parrot."""
    minutes = bytes(10 * 60 * 2 * 24_000)
    about = {"type": "response.output_audio.delta", "response_id": "r", "item_id": "i"}
    enormous = orjson.dumps(about | {"delta": base64.b64encode(minutes).decode()})
    nested = b'{"type": "conversation.item.added", "item": ' + b'{"a":' * 900
    nested += b"7" + b"}" * 901

    async def answer(line: servers.Line) -> None:
        await line.greet()
        for message in (b"quack", b"[" * 100_000, nested, enormous):
            await line.socket.send_bytes(message)
        await line.listen()

    async def run(url: str) -> None:
        async def scenario(on: House) -> None:
            mad = await call(on)
            await shim.until(lambda: "backend_unavailable" in codes(mad))
            good = await call(on, "birds", sentence())
            await shim.until(lambda: "output_audio_buffer.stopped" in types(good))
            await shim.until(lambda: codes(mad).count("backend_unavailable") >= 2)
            assert "error" not in types(good)
            assert "response.output_audio.delta" not in types(mad)
            assert len(on.transceiver.sessions) == 2

        extra = BACKEND.format(url=url, retry_s=20, answer_s=5)
        config = settings.load(configure(tmp_path, extra=extra), settings.Transceiver)
        found = House(config, time.monotonic)
        await found.start()
        try:
            await scenario(found)
        finally:
            await found.stop()

    async def both() -> None:
        async with servers.scripted(answer) as server:
            await run(server.url)

    asyncio.run(both())


def test_a_server_that_says_nothing_ends_the_call_with_a_reason(tmp_path: Path) -> None:
    async def mute(line: servers.Line) -> None:
        await line.listen()

    async def both() -> None:
        async with servers.scripted(mute) as server:
            extra = BACKEND.format(url=server.url, retry_s=5, answer_s=0.2)
            config = settings.load(configure(tmp_path, extra=extra), settings.Transceiver)
            found = House(config, time.monotonic)
            await found.start()
            try:
                client = await call(found)
                await shim.until(lambda: "backend_lost" in codes(client))
                assert types(client)[0] == "session.created"
                await shim.until(lambda: not found.transceiver.sessions)
                await shim.until(lambda: client.pc.connectionState == "closed")
                counters = found.transceiver.counters
                assert counters[Count.ENDED_BACKEND] == 1
                assert counters[Count.BACKEND_CONNECT_FAILED] >= 2
            finally:
                await found.stop()

    asyncio.run(both())


def test_a_server_that_refuses_us_is_told_to_the_client(tmp_path: Path) -> None:
    key = tmp_path / "parrot-key"
    key.write_text("sk-parrot")
    key.chmod(0o600)

    async def scenario(on: House) -> None:
        client = await call(on)
        await shim.until(lambda: codes(client) == ["backend_lost"])
        assert "401" in client.messages[-1]
        await shim.until(lambda: not on.transceiver.sessions)

    with servers.serving("--key-file", key) as served:
        calls(tmp_path, served.url, scenario)
