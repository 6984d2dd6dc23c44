"""The channel: session.created first, nothing lost unseen, nothing kept without a bound."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

import channel
import realtime
from channel import Channel
from realtime import Refused

from . import shim
from .test_transceiver import House, house, sessions


def live() -> Channel:
    found = Channel("tag")
    found.create({"type": "session.created"})
    found.open()
    found.take()
    return found


def taken(found: Channel) -> list[dict[str, Any]]:
    return [orjson.loads(message) for message in found.take()]


def kinds(found: Channel) -> list[str]:
    return [event["type"] for event in taken(found)]


def test_created_comes_first_and_once() -> None:
    found = Channel("tag")
    found.say({"type": "early"})
    found.open()
    assert found.take() == []
    found.create({"type": "session.created"})
    found.create({"type": "session.created", "again": True})
    assert kinds(found) == ["session.created", "early"]
    found.create({"type": "session.created"})
    assert found.take() == []


def test_every_event_has_an_id_of_its_own() -> None:
    found = live()
    for event_id in (None, 3, "theirs"):
        found.say({"type": "x", "event_id": event_id})
    ids = [event["event_id"] for event in taken(found)]
    assert len(set(ids)) == 3
    assert ids[2] == "theirs"


def test_what_waits_for_a_client_that_never_opens_is_bounded() -> None:
    found = Channel("tag")
    for number in range(100):
        found.say({"type": "x", "number": number, "text": "x" * 10_000})
    found.create({"type": "session.created"})
    found.open()
    messages = found.take()
    assert sum(map(len, messages)) <= channel.BACKLOG_OCTETS_MAX + 100
    assert orjson.loads(messages[-1])["number"] == 99


def test_held_events_follow_what_overtakes_them() -> None:
    found = live()
    found.hold(10.0)
    found.hold(10.09)  # does not prolong it
    found.say({"type": "delta"})
    found.overtake({"type": "started"})
    assert kinds(found) == ["started"]
    found.tick(10.05)
    assert found.take() == []
    found.tick(10.0 + channel.HOLD_S_MAX)
    assert kinds(found) == ["delta"]


def test_what_is_held_is_bounded() -> None:
    found = live()
    found.hold(10.0)
    count = 0
    while not (messages := found.take()):
        found.say({"type": "x", "text": "x" * 10_000})
        count += 1
        assert count * 10_000 <= channel.HELD_CHARACTERS_MAX + 10_000
    assert len(messages) == count


@pytest.mark.parametrize(
    "value",
    [b"bytes", {1}, 2**64, -(2**63) - 1, "x" * 300_000, "\ud800"],
    ids=lambda v: repr(v)[:9],
)
def test_what_json_cannot_say_is_told(value: Any) -> None:
    found = live()
    found.say({"type": "x", "value": value})
    (event,) = taken(found)
    assert (event["type"], event["error"]["code"]) == ("error", "server_event_lost")


def test_a_client_that_takes_less_is_told_as_much_as_it_takes() -> None:
    found = Channel("tag", 65_536)
    found.open()
    session = {"model": "m", "instructions": "x" * 70_000, "audio": {"input": {}}, "odd": {1}}
    found.create({"type": "session.created", "session": session})
    (created,) = taken(found)
    assert created["session"] == {"model": "m", "audio": {"input": {}}}
    found.say({"type": "x", "text": "x" * 70_000})
    (event,) = taken(found)
    assert event["error"]["code"] == "server_event_lost"
    for limit in (0, 1 << 40):
        roomy = Channel("tag", limit)
        roomy.open()
        roomy.create({"type": "session.created", "text": "x" * 200_000})
        roomy.say({"type": "x", "text": "x" * 300_000})
        assert kinds(roomy) == ["session.created", "error"]


def test_errors_name_what_was_refused() -> None:
    found = live()
    found.error(Refused("code", "Sentence.", "field"), "theirs")
    (event,) = taken(found)
    assert event["error"] == {
        "type": "invalid_request_error",
        "code": "code",
        "message": "Sentence.",
        "param": "field",
        "event_id": "theirs",
    }


def test_after_the_end_nothing_comes() -> None:
    found = live()
    found.say({"type": "x"})
    found.hold(1.0)
    found.close()
    found.say({"type": "x"})
    found.overtake({"type": "x"})
    found.open()
    found.create({"type": "session.created"})
    found.tick(9.0)
    assert found.take() == []


# Each of them has one answer, an error with this code.
HOSTILE: list[tuple[str | bytes, str]] = [
    (b"\xff\xfe\x00", "invalid_json"),
    ("not JSON", "invalid_json"),
    ("[" * 200_000, "invalid_json"),
    ('{"a":' * 30_000 + "1" + "}" * 30_000, "invalid_json"),
    (b'{"type": "response.create", "x": ' + b"[" * 65 + b"]" * 65 + b"}", "invalid_json"),
    ('{"type": "' + "x" * 250_000 + '"}', "invalid_value"),
    ('{"type": "conversation.item.truncate", "item_id": "i", "audio_end_ms": 1e999}', "invalid_"),
    ('{"type": "conversation.item.retrieve", "item_id": "' + "i" * 200_000 + '"}', "item_retrieve"),
    ('{"type": "input_audio_buffer.append", "audio": "' + "A" * 250_001 + '"}', "invalid_value"),
    ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": 7}}}}', "inv"),
    ('{"type": "response.create", "event_id": "' + "e" * 200_000 + '"}', "invalid_value"),
]


def test_hostile_messages_over_a_real_data_channel(tmp_path: Path) -> None:
    """A stock client sends them; each is answered, and another caller notices nothing."""

    async def scenario(on: House) -> None:
        client, _ = await on.call()
        other, _ = await on.call()
        for number, (message, code) in enumerate(HOSTILE, 1):
            assert len(message) <= realtime.CLIENT_MESSAGE_OCTETS_MAX
            client.channel.send(message)
            await shim.until(
                lambda n=number: sum('"type":"error"' in m for m in client.messages) == n
            )
            error = json.loads(client.messages[-1])["error"]
            assert error["code"].startswith(code), error
            assert len(client.messages[-1]) < 1_000
        assert len(client.messages) == 1 + len(HOSTILE)
        for one in (client, other):
            one.channel.send('{"type": "input_audio_buffer.clear"}')
            await shim.until(lambda c=one: "input_audio_buffer.cleared" in c.messages[-1])
        assert len(other.messages) == 2
        assert len(sessions(on)) == 2

    house(tmp_path, scenario)
