"""A session at a model server, octets apart: what is sent, what is told, and what is bounded."""

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import realtime
from outbox import AUDIO_S_MAX, EVENTS_MAX
from realtime import Event
from remote import GARBLED_MAX, RESPONSES_MAX, UPDATES_MAX, Remote, Stage

RATE_HZ = 16_000
PCM = {"format": {"type": "audio/pcm", "rate": RATE_HZ}}
FORMATS = {"input": PCM, "output": PCM}
MESSAGE = {"type": "message", "role": "user"}


class Server:
    """The other end: says events, and reads what it is sent."""

    def __init__(self, wanted: Event | None = None, speaks: str = "auto") -> None:
        self.remote = Remote("tag", RATE_HZ, speaks, "m", wanted)
        self.told: list[Event] = []

    def says(self, kind: str, **fields: Any) -> list[Event]:
        told = list(self.remote.received(orjson.dumps({"type": kind, **fields})))
        self.told += told
        return told

    def hears(self) -> list[Event]:
        found = []
        while (message := self.remote.next_message()) is not None:
            found.append(orjson.loads(message))
        return found

    def greets(self) -> list[Event]:
        """Begin as the API has it; what it was sent meanwhile."""
        self.remote.connected()
        self.says("session.created", session={"type": "realtime", "audio": {}, "voice": "v"})
        heard = self.hears()
        assert heard[0]["type"] == "session.update"
        self.says("session.updated", session=heard[0]["session"] | {"id": "sess_1"})
        assert self.remote.stage is Stage.READY
        return heard

    def hangs_up(self) -> list[Event]:
        told = self.remote.disconnected("is gone")
        self.told += told
        return told


def ready(wanted: Event | None = None, **more: Any) -> Server:
    server = Server(wanted, **more)
    server.greets()
    server.told.clear()
    return server


def types(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def codes(events: list[Event]) -> list[str]:
    return [event["error"]["code"] for event in events if event["type"] == "error"]


def test_nothing_is_sent_before_the_server_has_spoken_and_settings_go_first() -> None:
    server = Server({"instructions": "Sing.", "model": "m", "id": "theirs"})
    remote = server.remote
    assert remote.append(b"\1\0" * 320) == []
    assert remote.send({"type": "response.create", "event_id": "e"}) == []
    assert remote.next_message() is None
    remote.connected()
    assert remote.next_message() is None
    assert server.says("input_audio_buffer.cleared") == []  # before it has begun, it says nothing
    assert remote.garbled == 1
    heard = server.greets()
    update, audio, respond = heard
    assert update["session"] == {"type": "realtime", "instructions": "Sing.", "audio": FORMATS}
    assert base64.b64decode(audio["audio"]) == b"\1\0" * 320
    assert audio["type"] == "input_audio_buffer.append"
    assert respond == {"type": "response.create", "event_id": "e"}
    (created,) = server.told
    assert created["type"] == "session.created"
    assert created["session"]["instructions"] == "Sing."


def test_the_client_s_formats_and_identities_are_not_the_server_s_business() -> None:
    wanted = {"audio": {"output": {"format": {"type": "audio/pcmu"}, "voice": "v"}}}
    heard = Server(wanted).greets()
    assert heard[0]["session"]["audio"] == {"input": PCM, "output": PCM | {"voice": "v"}}
    server = ready()
    server.remote.send({"type": "session.update", "session": {"id": "x", "tools": []}})
    (update,) = server.hears()
    assert update["session"] == {"type": "realtime", "tools": []}
    assert update["event_id"].startswith("link_")


@pytest.mark.parametrize("levels", [400, 0])
def test_an_offer_that_asks_for_too_much_gets_a_session_all_the_same(levels: int) -> None:
    wanted: Event = {"instructions": "x" * realtime.SESSION_OCTETS_MAX}
    if levels:
        for _ in range(levels):
            wanted = {"tools": wanted}
        wanted["instructions"] = ""
    server = Server(wanted)
    (update,) = server.greets()
    assert update["session"] == {"type": "realtime", "audio": FORMATS}
    assert types(server.told) == ["session.created", "error"]


def test_errors_go_back_to_whose_event_it_was() -> None:
    server = ready()
    for event_id in ("mine", None):
        name = {} if event_id is None else {"event_id": event_id}
        server.remote.send({"type": "session.update", "session": {}, **name})
        (update,) = server.hears()
        (error,) = server.says("error", error={"code": "c", "event_id": update["event_id"]})
        assert error["error"]["event_id"] == event_id
    server.hangs_up()
    (update, *_) = server.greets()
    assert update["session"] == {"type": "realtime", "audio": FORMATS}  # refused was refused


def test_updates_are_in_force_again_on_the_next_connection() -> None:
    server = ready({"instructions": "A", "audio": {"input": {"transcription": {"model": "x"}}}})
    remote = server.remote
    remote.send({"type": "session.update", "session": {"instructions": "B"}})
    remote.send(
        {
            "type": "session.update",
            "event_id": "2",
            "session": {"audio": {"input": {"turn_detection": None}}},
        }
    )
    server.hears()
    server.says("session.updated", session={"instructions": "B"})
    server.hangs_up()  # before the second was answered
    (update,) = server.greets()
    assert update["session"] == {
        "type": "realtime",
        "instructions": "B",
        "audio": {
            "input": PCM | {"transcription": {"model": "x"}, "turn_detection": None},
            "output": PCM,
        },
    }
    # The one that was not answered is answered now.
    assert types(server.told) == ["session.updated", "error", "error", "session.updated"]
    assert codes(server.told) == ["backend_unavailable", "backend_reconnected"]


def test_an_update_while_nobody_listens_is_sent_and_answered_once() -> None:
    server = Server()
    server.hangs_up()
    server.remote.send({"type": "session.update", "event_id": "1", "session": {"voice": "w"}})
    server.hangs_up()  # another attempt has failed
    settings, update = server.greets()
    assert "voice" not in settings["session"]
    assert update["session"] == {"type": "realtime", "voice": "w"}
    server.says("session.updated", session={"voice": "w"})
    assert types(server.told) == [
        "session.created",
        "error",
        "session.updated",  # what was shown at first was nobody's yet
        "error",
        "session.updated",
    ]
    server.hangs_up()
    (settings,) = server.greets()
    assert settings["session"]["voice"] == "w"


def test_an_outage_ends_what_was_under_way_and_is_told_once() -> None:
    server = ready()
    server.says("response.created", response={"id": "r1"})
    server.says("response.created", response={"id": "r2"})
    server.says("response.done", response={"id": "r1"})
    server.says("input_audio_buffer.speech_started", item_id="i")
    server.told.clear()
    error, cleared, done = server.hangs_up()
    assert error["error"]["type"] == "server_error"
    assert error["error"]["message"] == "The model server is gone. It is being tried again."
    assert cleared["type"] == "input_audio_buffer.cleared"
    assert (done["type"], done["response"]["id"]) == ("response.done", "r2")
    assert done["response"]["status"] == "failed"
    assert server.hangs_up() == []
    assert server.remote.disconnected("is gone", final=True) == []
    server.greets()
    assert codes(server.hangs_up()) == ["backend_unavailable"]


def test_a_server_that_is_new_is_told_before_anything_new_and_its_answers_are_kept_back() -> None:
    server = ready()
    text = {"content": [{"type": "input_text", "text": "Hello"}]}
    server.says("conversation.item.added", item={"id": "u", **MESSAGE, **text})
    server.says("conversation.item.added", item={"id": "v", **MESSAGE, "content": []})
    server.hangs_up()
    server.remote.send({"type": "response.create"})
    server.remote.append(b"\1\0")
    server.told.clear()
    update, create, respond, audio = server.greets()
    assert types([update, create, respond, audio]) == [
        "session.update",
        "conversation.item.create",
        "response.create",
        "input_audio_buffer.append",
    ]
    assert create["item"] == {"id": "u", **MESSAGE, **text}
    assert server.says("conversation.item.added", item=create["item"]) == []
    assert server.says("conversation.item.done", item=create["item"]) == []
    assert types(server.says("conversation.item.added", item={"id": "w"})) == [
        "conversation.item.added"
    ]
    (error,) = server.told[:1]
    assert error["error"]["code"] == "backend_reconnected"
    assert "1 of them could not be told" in error["error"]["message"]
    refused = {"code": "c", "event_id": create["event_id"]}
    assert server.says("error", error=refused) == []


def test_a_truncation_while_nobody_listens_is_not_forgotten() -> None:
    server = ready()
    spoken = {"id": "a", "type": "message", "role": "assistant"}
    content = [{"type": "output_audio", "transcript": "A long story"}]
    server.says("conversation.item.done", item={**spoken, "content": content})
    server.hangs_up()
    server.remote.send({"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": 9})
    assert "A long story" not in str(server.greets())


@pytest.mark.parametrize("speaks", ["auto", "beta"])
def test_a_server_of_the_beta(speaks: str) -> None:
    server = Server({"output_modalities": ["text"]}, speaks)
    server.remote.connected()
    server.says("session.created", session={"modalities": ["text"], "voice": "v"})
    server.remote.send({"type": "response.create", "response": {"output_modalities": ["text"]}})
    update, respond = server.hears()
    assert update["session"] == {
        "modalities": ["text"],
        "input_audio_format": "pcm16",
        "output_audio_format": "pcm16",
    }
    assert respond["response"] == {"modalities": ["text"]}
    (created,) = server.says("session.updated", session=update["session"] | {"id": "s"})
    assert created["type"] == "session.created"
    assert created["session"]["audio"] == FORMATS
    sound = base64.b64encode(b"\1\2").decode()
    (delta,) = server.says("response.audio.delta", item_id="i", response_id="r", delta=sound)
    assert delta["type"] == "response.output_audio.delta"
    assert delta["delta"] == b"\1\2"


def test_a_server_that_is_said_to_speak_the_ga_is_taken_at_its_word() -> None:
    server = Server(speaks="ga")
    server.remote.connected()
    server.says("session.created", session={"modalities": ["text"]})
    (update,) = server.hears()
    assert update["session"]["audio"] == FORMATS
    (created,) = server.says("session.updated", session=update["session"])
    assert created["session"] == update["session"]
    assert types(server.says("response.audio.done")) == ["response.audio.done"]


def test_a_sample_cut_in_two_is_put_together_and_only_within_its_item() -> None:
    server = ready()

    def delta(pcm: bytes, item_id: str) -> list[bytes]:
        text = base64.b64encode(pcm).decode()
        name = "response.output_audio.delta"
        return [e["delta"] for e in server.says(name, item_id=item_id, delta=text)]

    assert delta(b"\1\2\3", "i") == [b"\1\2"]
    assert delta(b"\4\5", "i") == [b"\3\4"]
    assert delta(b"\6\7", "j") == [b"\6\7"]
    assert delta(b"", "j") == []
    assert delta(b"\1", "j") == []


def test_a_small_server_may_leave_out_what_there_is_only_one_of() -> None:
    server = ready()
    name = "response.output_audio.delta"
    (delta,) = server.says(name, delta="AAAA")
    assert (delta["response_id"], delta["item_id"]) == ("resp_tag", "item_resp_tag")
    server.says("response.created", response={"id": "r"})
    (delta,) = server.says(name, delta="AAAA", item_id="i")
    assert (delta["response_id"], delta["item_id"]) == ("r", "i")
    for wrong in ({"error": "Out of memory."}, {"message": "Out of memory."}):
        (error,) = server.says("error", **wrong)
        assert error["error"]["message"] == "Out of memory."
        assert error["error"]["type"] == "server_error"


def test_what_waits_is_bounded() -> None:
    server = ready()
    remote = server.remote
    server.hangs_up()
    frame = bytes(640)
    for number in range(1000):
        assert remote.append(number.to_bytes(2, "little") * 320) == []  # known to be away
    remote.send({"type": "input_audio_buffer.commit", "event_id": "kept"})
    waiting = int(AUDIO_S_MAX * 50)
    assert remote.dropped_octets == (1000 - waiting) * len(frame)
    told = [remote.send({"type": "x", "event_id": str(n)}) for n in range(EVENTS_MAX)]
    assert [len(each) for each in told] == [0] * (EVENTS_MAX - 1) + [1]
    assert told[-1][0]["error"]["event_id"] == str(EVENTS_MAX - 1)
    heard = server.greets()[1:]
    sound = [base64.b64decode(e["audio"])[:2] for e in heard if "audio" in e]
    assert sound == [n.to_bytes(2, "little") for n in range(1000 - waiting, 1000)]
    assert heard[waiting]["event_id"] == "kept"
    deep: Any = 7
    for _ in range(300):
        deep = [deep]
    assert codes(remote.send({"type": "x", "y": deep})) == ["invalid_value"]


def test_a_slow_server_is_told_of_once_until_it_has_caught_up() -> None:
    server = ready()
    frame = bytes(640)

    def overfill() -> list[str]:
        told = [code for _ in range(500) for code in codes(server.remote.append(frame))]
        server.hears()
        return told

    assert overfill() == ["audio_dropped"]
    assert overfill() == ["audio_dropped"]


def test_a_server_that_answers_nothing_makes_nothing_grow() -> None:
    server = ready()
    for number in range(10 * UPDATES_MAX):
        server.remote.send({"type": "session.update", "session": {"n": number}})
        server.hears()
    assert len(server.remote._updates) == UPDATES_MAX
    for number in range(2 * UPDATES_MAX):
        large = {str(number): "x" * 100_000}
        assert server.remote.send({"type": "session.update", "session": large}) == []
        assert len(server.hears()) == 1
    assert len(orjson.dumps(server.remote._asked)) <= realtime.SESSION_OCTETS_MAX
    assert server.remote.send({"type": "session.update", "session": 7}) == []
    assert server.hears() == [{"type": "session.update", "session": 7}]
    for number in range(10 * RESPONSES_MAX):
        server.says("response.created", response={"id": str(number)})
    assert len(server.hangs_up()) == 1 + RESPONSES_MAX


def test_too_much_garbage_breaks_a_connection_and_the_next_begins_anew() -> None:
    server = ready()
    for _ in range(GARBLED_MAX):
        assert not server.remote.broken
        assert list(server.remote.received(b"quack")) == []
    assert server.remote.broken
    server.hangs_up()
    server.greets()
    assert not server.remote.broken
    assert server.remote.garbled == GARBLED_MAX


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["i", "r", "AAAA", "!"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "type", "content", "event_id"]), inner)
    ),
    max_leaves=6,
)
EVENTS = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from(
        [
            "session.created",
            "session.updated",
            "error",
            "conversation.item.added",
            "conversation.item.created",
            "conversation.item.done",
            "conversation.item.truncated",
            "response.created",
            "response.done",
            "response.output_item.done",
            "response.audio.delta",
            "response.output_audio.delta",
            "response.output_audio_transcript.delta",
        ]
    ),
    st.dictionaries(
        st.sampled_from(
            ["session", "error", "item", "item_id", "response", "delta", "transcript", "part"]
        ),
        JSON,
    ),
)


@settings(max_examples=200)
@given(st.lists(EVENTS, max_size=12), st.booleans())
def test_whatever_a_server_says_nothing_raises(events: list[Event], begun: bool) -> None:
    server = ready() if begun else Server()
    server.remote.connected()
    for event in events:
        for told in server.remote.received(orjson.dumps(event)):
            assert isinstance(told["type"], str)
            assert not isinstance(told.get("delta"), bytes) or len(told["delta"]) % 2 == 0
        server.hears()
    server.remote.settle()
    server.hangs_up()
    server.remote.connected()
    server.says("session.created", session=realtime.session("s", "m", RATE_HZ))
    server.hears()


@settings(max_examples=200)
@given(st.binary(max_size=64) | st.text(max_size=64))
def test_whatever_octets_come_nothing_raises(message: bytes | str) -> None:
    for event in ready().remote.received(message):
        assert isinstance(event["type"], str)
