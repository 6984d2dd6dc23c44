"""A conversation goes on in another call: where it was, elsewhere, and on the demo page."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiortc.contrib.media import MediaPlayer
from aiortc.mediastreams import AudioStreamTrack

import archive
import settings
import ufrag
from metrics import Transceiver as Count

from . import redises, servers, shim
from .test_model_calls import BACKEND
from .test_signaling import CALLS, OFFER, Stage, mint, staged, unused_port
from .test_transceiver import ROOT, House, configure, house, types

SDP = {"Content-Type": "application/sdp"}
STRANGER = ufrag.call_id("APeT9ekG4r6OlO9+HGsokz4")


def events(client: shim.Client, kind: str) -> list[dict[str, Any]]:
    """What a client was told of one kind."""
    return [event for event in map(json.loads, client.messages) if event["type"] == kind]


async def place(
    on: House, track: Any = None, once: Callable[[], Any] = lambda: True, **request: Any
) -> tuple[shim.Client, str]:
    """A connected client whose request for a session has more fields, and its call id. It has its
    offer ready, and asks `once` that is so."""
    client = shim.Client()
    on.clients.append(client)
    offer = await client.offer(track or AudioStreamTrack())
    await shim.until(once)
    body = {"offer": offer, "candidates": [list(on.shim.address)], **request}
    status, answer, _ = await on.ask("POST", "/v1/sessions", body)
    assert status == 201, answer
    await client.accept(answer["answer"])
    await shim.until(lambda: client.messages)
    assert types(client)[0] == "session.created"
    return client, answer["call_id"]


def say(client: shim.Client, kind: str, **fields: Any) -> None:
    client.channel.send(json.dumps({"type": kind, **fields}))


async def write(client: shim.Client, item_id: str, text: str) -> None:
    """Have an item in the conversation that both sides know."""
    content = [{"type": "input_text", "text": text}]
    item = {"id": item_id, "type": "message", "role": "user", "content": content}
    say(client, "conversation.item.create", item=item)
    added = "conversation.item.done"
    await shim.until(lambda: [e for e in events(client, added) if e["item"]["id"] == item_id])


async def knows(client: shim.Client, item_id: str) -> None:
    """The backend itself has the item: it answers to its deletion, and the client to its text."""
    say(client, "conversation.item.retrieve", item_id=item_id)
    await shim.until(lambda: events(client, "conversation.item.retrieved"))
    say(client, "conversation.item.delete", item_id=item_id)
    await shim.until(lambda: events(client, "conversation.item.deleted"))
    assert not events(client, "error")


def kept(client: shim.Client) -> list[tuple[str, str, str]]:
    """Id, status and words of the items that the client was told of before anything else."""
    told = [json.loads(message) for message in client.messages[1:]]
    found = []
    for added, done in zip(told[::2], told[1::2], strict=False):
        kinds = (added["type"], done["type"])
        if kinds != ("conversation.item.added", "conversation.item.done"):
            break
        item = done["item"]
        assert added["item"] == item
        words = item["content"][0].get("text", "") if item["type"] == "message" else ""
        found.append((item["id"], item["status"], words))
    return found


# --- at one transceiver --------------------------------------------------------------------------


def test_a_client_gets_another_transport_and_keeps_its_conversation(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        session = {"instructions": "Be kind.", "audio": {"output": {"speed": 1.5}}}
        first, old = await place(on, key="one", session=session)
        await write(first, "i1", "Hello.")
        await write(first, "i2", "Are you there?")
        say(first, "session.update", session={"type": "realtime", "tool_choice": "none"})
        await shim.until(lambda: events(first, "session.updated"))
        own = {"audio": {"output": {"speed": 0.5}}}
        second, _ = await place(on, key="one", resume=old, session=own)
        (created,) = events(second, "session.created")
        assert created["session"]["instructions"] == "Be kind."
        assert created["session"]["tool_choice"] == "none"
        assert created["session"]["audio"]["output"]["speed"] == 0.5  # the offer's own
        await shim.until(lambda: len(second.messages) >= 5)
        assert kept(second) == [
            ("i1", "completed", "Hello."),
            ("i2", "completed", "Are you there?"),
        ]
        assert on.transceiver.find(old) is None
        await shim.until(lambda: first.channel.readyState == "closed")
        await knows(second, "i1")
        assert on.transceiver.counters[Count.RESUMED] == 1

    house(tmp_path, scenario)


def test_a_client_that_closed_without_hanging_up_finds_its_conversation(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        first, old = await place(on)
        await write(first, "i1", "Hello.")
        await first.close()
        await shim.until(lambda: on.transceiver.find(old) is None)
        second, new = await place(on, resume=old)
        await knows(second, "i1")
        # The newest call has it: the one before is not to be had any more.
        await shim.until(lambda: not on.transceiver._archive._ended)
        third, _ = await place(on, resume=old)
        await shim.until(lambda: events(third, "error"))
        assert on.transceiver.find(new) is not None

    house(tmp_path, scenario)


@pytest.mark.parametrize("why", ["hung up", "unknown", "of another key"])
def test_what_cannot_be_resumed_is_a_new_conversation_and_said(tmp_path: Path, why: str) -> None:
    async def scenario(on: House) -> None:
        first, old = await place(on, key="one")
        await write(first, "i1", "Hello.")
        if why == "hung up":
            async with on.http.delete(
                f"{on.url}/v1/sessions/{old}", headers={"X-Earshot-Key": "one"}
            ) as response:
                assert response.status == 200
        key = "two" if why == "of another key" else "one"
        resume = STRANGER if why == "unknown" else old
        second, _ = await place(on, key=key, resume=resume)
        await shim.until(lambda: len(second.messages) >= 2)
        (error,) = events(second, "error")
        assert error["error"]["code"] == "resume_unavailable"
        assert "no such conversation" in error["error"]["message"]
        assert types(second) == ["session.created", "error"]
        assert (on.transceiver.find(old) is None) == (why == "hung up")
        assert on.transceiver.counters[Count.RESUME_UNAVAILABLE] == 1

    house(tmp_path, scenario)


def test_of_a_reply_so_much_is_kept_as_was_heard(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        transcription = {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}
        sentence = MediaPlayer(str(ROOT / "tests/data/sentence.wav")).audio
        first, old = await place(on, sentence, session=transcription)
        await shim.until(lambda: "output_audio_buffer.started" in types(first))
        call = on.transceiver.find(old)
        assert call is not None
        heard_of = call._conversation._replies.shares
        enough = 0.3
        second, _ = await place(
            on, once=lambda: any(share > enough for share in heard_of().values()), resume=old
        )
        words = events(first, "response.output_audio_transcript.delta")[0]["delta"]
        await shim.until(lambda: len(second.messages) >= 5)
        heard, said = kept(second)
        assert heard[2].startswith("(") and heard[1] == "completed"
        assert said[1] == "incomplete"
        assert words.startswith(said[2])
        assert 5 < len(said[2]) < len(words) - 5, said
        print(f"said {words!r}, kept {said[2]!r}")

    house(tmp_path, scenario)


# --- with a model server -------------------------------------------------------------------------


def test_a_model_server_is_told_of_everything_before_anything_new(tmp_path: Path) -> None:
    async def answer(line: servers.Line) -> None:
        await line.greet()
        while True:
            event = await line.hear("conversation.item.create")
            item = event["item"] | {"object": "realtime.item", "status": "completed"}
            for kind in ("added", "done"):
                await line.say({"type": f"conversation.item.{kind}", "item": item})

    async def scenario(on: House, server: servers.Scripted) -> None:
        detection = {"response_delay_ms": 700, "type": "server_vad"}
        session = {
            "instructions": "Be kind.",
            "audio": {"input": {"turn_detection": detection}},
        }
        first, old = await place(on, session=session)
        await write(first, "i1", "Hello.")
        await write(first, "i2", "Are you there?")
        second, _ = await place(on, resume=old)
        await shim.until(lambda: len(kept(second)) == 2)
        await write(second, "i3", "I am back.")
        heard = server.lines[1].heard
        (update,) = [event for event in heard if event["type"] == "session.update"]
        assert update["session"]["instructions"] == "Be kind."
        told = update["session"]["audio"]["input"]["turn_detection"]
        assert told["create_response"] is False and "response_delay_ms" not in told
        created = [
            (event["item"]["id"], event["item"]["content"][0]["text"])
            for event in heard
            if event["type"] == "conversation.item.create"
        ]
        assert created == [("i1", "Hello."), ("i2", "Are you there?"), ("i3", "I am back.")]
        added = [event["item"]["id"] for event in events(second, "conversation.item.added")]
        assert added == ["i1", "i2", "i3"]  # the client was told of each once
        shown = events(second, "session.created")[0]["session"]
        assert shown["audio"]["input"]["turn_detection"]["response_delay_ms"] == 700

    async def both() -> None:
        async with servers.scripted(answer) as server:
            extra = BACKEND.format(url=server.url, retry_s=20.0, answer_s=5.0)
            config = settings.load(configure(tmp_path, extra=extra), settings.Transceiver)
            on = House(config, time.monotonic)
            await on.start()
            try:
                await scenario(on, server)
            finally:
                await on.stop()

    asyncio.run(both())


# --- at another transceiver ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def two(folder: Path, url: str, redis: redises.Server) -> AsyncIterator[list[House]]:
    """Two transceivers with one Redis and one model server."""
    houses = []
    for name in ("here", "there"):
        (folder / name).mkdir()
        extra = BACKEND.format(url=url, retry_s=20.0, answer_s=5.0)
        # With patience: a busy machine must not be taken for a Redis that does not answer.
        extra += f'[redis]\nurl = "redis://127.0.0.1:{redis.port}/0"\ntimeout_s = 10\n'
        path = configure(folder / name, extra=extra, limits="sessions_max = 9")
        houses.append(House(settings.load(path, settings.Transceiver), time.monotonic))
    for each in houses:
        await each.start()
    try:
        with pytest.MonkeyPatch.context() as patient:
            patient.setattr(archive, "FIND_S", 10.0)
            yield houses
    finally:
        for each in houses:
            await each.stop()


def test_another_transceiver_goes_on_with_the_record(tmp_path: Path) -> None:
    async def run(url: str) -> None:
        redis = redises.Server(tmp_path / "redis").start()
        try:
            async with two(tmp_path, url, redis) as (here, there):
                await scenario(here, there, redis)
        finally:
            redis.close()

    async def scenario(here: House, there: House, redis: redises.Server) -> None:
        first, old = await place(here, key="one", session={"instructions": "Be kind."})
        await write(first, "i1", "Hello.")
        async with asyncio.timeout(shim.WAIT_S):
            while not (found := await there.transceiver._archive.find(old)) or not found.items:
                await asyncio.sleep(0.05)
        (name,) = redis.do("KEYS", "earshot:record:*")
        assert b"Be kind" not in redis.do("GET", name)

        thief, _ = await place(there, key="two", resume=old)
        await shim.until(lambda: events(thief, "error"))
        await shim.until(lambda: len(redis.do("KEYS", "earshot:record:*")) == 2)
        assert redis.do("EXISTS", name)

        second, new = await place(there, key="one", resume=old)
        assert events(second, "session.created")[0]["session"]["instructions"] == "Be kind."
        await shim.until(lambda: len(kept(second)) == 1)
        assert kept(second) == [("i1", "completed", "Hello.")]
        await knows(second, "i1")
        # It is live, so that what was before is nobody's any more; signaling says so to the owner.
        await shim.until(lambda: not redis.do("EXISTS", name))
        url = f"{here.url}/v1/sessions/{old}?resumed"
        async with here.http.delete(url, headers={"X-Earshot-Key": "one"}) as response:
            assert response.status == 200
        assert here.transceiver.find(old) is None
        again, _ = await place(here, key="one", resume=old)
        await shim.until(lambda: events(again, "error"))

        redis.kill()
        third, _ = await place(here, key="one", resume=new)
        await shim.until(lambda: events(third, "error"))
        assert types(third) == ["session.created", "error"]
        await write(second, "i2", "Nobody notices.")

    with servers.serving() as server:
        asyncio.run(run(server.url))


# --- who is asked --------------------------------------------------------------------------------


def test_who_has_the_conversation_is_asked_first(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=4) as stage:
            for owner in stage.fakes * 3:
                old = mint(owner.port, 77)
                owner.calls.add(old)
                await resume(stage, old)
                assert owner.requests[-1]["resume"] == old
                assert old in owner.calls  # a real one has ended it by itself

    asyncio.run(run())


@pytest.mark.parametrize("bad_day", ["full", "hangs", "dead"])
def test_another_one_goes_on_when_the_owner_cannot(tmp_path: Path, bad_day: str) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=2) as stage:
            owner, other = stage.fakes
            old = mint(unused_port() if bad_day == "dead" else owner.port, 77)
            owner.calls.add(old)
            full = {"error": {"message": "Full.", "code": "overloaded"}}
            if bad_day != "hangs":
                owner.refusal = 503, full
            owner.hangs = bad_day == "hangs"
            await resume(stage, old)
            assert other.requests[-1]["resume"] == old
            if bad_day != "dead":
                await shim.until(lambda: old not in owner.calls)

    asyncio.run(run())


def test_what_is_no_call_id_is_refused_and_what_looks_like_one_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            for bad in ("x", "", "rtc_x", "../etc", STRANGER + "A", "é" * 30):
                error = await stage.error(
                    400, "POST", CALLS, params={"resume": bad}, data=OFFER, headers=SDP
                )
                assert (error["param"], error["code"]) == ("resume", "invalid_value")
            assert not stage.fakes[0].requests
            await resume(stage, STRANGER)
            assert stage.fakes[0].requests[-1]["resume"] == STRANGER

    asyncio.run(run())


async def resume(stage: Stage, call_id: str) -> None:
    params = {"resume": call_id}
    async with stage.http.post(CALLS, params=params, data=OFFER, headers=SDP) as response:
        assert response.status == 201, await response.text()
