"""RTVI in front of a conversation: what each side hears of what the other one says."""

import dataclasses
import time
from typing import Any

import hypothesis
import orjson
import pytest
from hypothesis import strategies as st

import adapters
import realtime
import rtvi
import session
from turns import MS_OCTETS

from . import test_interruption
from .line import SPEECH

NOON = 1_700_000_000.0  # 2023-11-14T22:13:20Z

Message = dict[str, Any]


class Talk:
    """An adapter between a test that is the client and a test that is the conversation."""

    def __init__(self, *, resumed: bool = False, version: str | None = "2.1.0") -> None:
        self.adapter = adapters.of("rtvi", "chat", NOON, resumed=resumed)
        assert isinstance(self.adapter, rtvi.Rtvi)
        self.asked: list[Message] = []
        self.told: list[Message] = []
        if version is not None:
            self.event("session.created", session={})
            self.say("client-ready", {"version": version, "about": {"library": "test"}}, "ready")
            self.told.clear()

    def hear(self, message: str | bytes) -> None:
        self.asked += map(orjson.loads, self.adapter.from_client(message, 1.0))
        self.take()

    def say(self, kind: str, data: Any = None, message_id: str = "m1") -> None:
        message = {"label": "rtvi-ai", "type": kind, "id": message_id, "data": data}
        self.hear(orjson.dumps(message).decode())

    def event(self, kind: str, **fields: Any) -> None:
        self.take(orjson.dumps({"type": kind, "event_id": "e", **fields}).decode())

    def take(self, *events: str) -> None:
        self.told += map(orjson.loads, self.adapter.to_client(list(events), 1.0))
        self.asked += map(orjson.loads, self.adapter.asked())

    def kinds(self) -> list[str]:
        found = [message["type"] for message in self.told]
        assert all(message["label"] == "rtvi-ai" for message in self.told)
        self.told.clear()
        return found

    def only(self, kind: str) -> list[Any]:
        return [each.get("data") for each in self.told if each["type"] == kind]

    def requests(self) -> list[str]:
        found = [event["type"] for event in self.asked]
        assert realtime.CLIENT_EVENTS.issuperset(found)
        self.asked.clear()
        return found

    def reply(
        self, *texts: str, response: str = "r", kind: str = "output_audio_transcript"
    ) -> None:
        """What a model says, until it has made it."""
        self.event("response.created", response={"id": response})
        if kind != "output_text":
            self.event("response.content_part.added", part={"type": "audio"})
        for text in texts:
            self.event(f"response.{kind}.delta", response_id=response, delta=text)
        if kind != "output_text":
            self.event("response.output_audio.done", response_id=response)
        self.event(f"response.{kind}.done", response_id=response)
        self.event("response.done", response={"id": response, "status": "completed"})


# --- readiness ------------------------------------------------------------------------------------


def test_bot_ready_answers_client_ready() -> None:
    talk = Talk(version=None)
    talk.say("client-ready", {"version": "2.1.0", "about": {"library": "x"}}, "c1")
    assert talk.told == [], "there is no session yet"
    talk.event("session.created", session={"id": "sess"})
    (ready,) = talk.told
    assert (ready["type"], ready["id"]) == ("bot-ready", "c1")
    assert ready["data"]["version"] == rtvi.VERSION
    talk.told.clear()
    talk.say("client-ready", {"version": "2.1.0"}, "c2")
    assert [message["id"] for message in talk.told] == ["c2"]
    assert talk.asked == []


@pytest.mark.parametrize("version", ["9.0.0", None, "", "x" * 5_000, {"a": 1}])
def test_another_version_is_warned_and_served(version: Any) -> None:
    talk = Talk()
    talk.say("client-ready", {"version": version}, "c")
    assert [message["id"] for message in talk.told] == ["c", "c"]
    assert talk.kinds() == ["error-response", "bot-ready"]


def test_a_client_of_the_first_version_is_told_its_own() -> None:
    talk = Talk(version="1.2.0")
    talk.say("client-ready", {"version": "1.2.0"}, "c")
    assert talk.told[0]["data"]["version"] == "1.2.0"
    talk.told.clear()
    talk.reply("Hello. ", "You.")
    first, _ = talk.only("bot-output")
    assert first == {"text": "Hello.", "spoken": True, "aggregated_by": "sentence"}
    talk.told.clear()
    talk.event("output_audio_buffer.started", response_id="r")
    talk.event("output_audio_buffer.stopped", response_id="r")
    assert talk.kinds() == ["bot-started-speaking", "bot-stopped-speaking"]


def test_after_a_change_of_transport_nothing_waits_for_client_ready() -> None:
    """The client does not say it again, and may believe that the bot is speaking."""
    talk = Talk(resumed=True, version=None)
    talk.event("session.created", session={})
    talk.event("input_audio_buffer.speech_started")
    assert talk.kinds() == ["bot-stopped-speaking", "user-started-speaking"]


@pytest.mark.parametrize("message", ["ping: 1700000000000", b"ping", '{"type": "signalling"}'])
def test_what_needs_no_answer(message: str | bytes) -> None:
    talk = Talk()
    talk.hear(message)
    track = {"type": "trackStatus", "receiver_index": 0, "enabled": True}
    talk.hear(orjson.dumps({"type": "signalling", "message": track}))
    assert (talk.told, talk.asked) == ([], [])


# --- a turn ---------------------------------------------------------------------------------------


def test_a_spoken_turn() -> None:
    talk = Talk()
    talk.event("input_audio_buffer.speech_started", item_id="i")
    talk.event("input_audio_buffer.speech_stopped", item_id="i")
    transcription = "conversation.item.input_audio_transcription"
    talk.event(f"{transcription}.delta", item_id="i", delta="Good ")
    talk.event(f"{transcription}.delta", item_id="i", delta="morning")
    talk.event(f"{transcription}.completed", item_id="i", transcript="Good morning.")
    said = talk.only("user-transcription")
    assert [(each["text"], each["final"]) for each in said] == [
        ("Good ", False),
        ("Good morning", False),
        ("Good morning.", True),
    ]
    assert said[0]["timestamp"] == "2023-11-14T22:13:21.000+00:00"
    assert said[0]["user_id"]
    assert talk.only("user-llm-text") == [{"text": "Good morning."}]
    talk.told.clear()
    talk.event("output_audio_buffer.started", response_id="r")
    talk.reply("And to ", "you. Sun", "ny.")
    assert talk.only("bot-tts-text") == [{"text": t} for t in ("And to ", "you. Sun", "ny.")]
    assert talk.only("bot-llm-text") == talk.only("bot-tts-text")
    assert talk.only("bot-transcription") == [{"text": "And to you."}, {"text": "Sunny."}]
    outputs = talk.only("bot-output")
    assert [(o["text"], o["spoken_status"], o["will_be_spoken"]) for o in outputs] == [
        ("And to you.", "new", True),
        ("Sunny.", "new", True),
    ]
    assert outputs[0]["spoken_progress"] == {
        "accumulated_text": "",
        "remaining_text": "And to you.",
    }
    assert talk.kinds() == [
        "bot-started-speaking",
        "bot-llm-started",
        "bot-tts-started",
        *("bot-llm-text", "bot-tts-text"),
        *("bot-llm-text", "bot-tts-text", "bot-transcription", "bot-output"),
        *("bot-llm-text", "bot-tts-text"),
        "bot-tts-stopped",
        *("bot-transcription", "bot-output"),
        "bot-llm-stopped",
    ]
    talk.event("output_audio_buffer.stopped", response_id="r")
    assert [(o["segment_id"], o["spoken_status"]) for o in talk.only("bot-output")] == [
        (outputs[0]["segment_id"], "completed"),
        (outputs[1]["segment_id"], "completed"),
    ]
    assert talk.kinds() == ["bot-output", "bot-output", "bot-stopped-speaking"]
    assert talk.asked == []


def test_an_interruption() -> None:
    """What was not heard to the end is never completed."""
    talk = Talk()
    talk.event("output_audio_buffer.started", response_id="r")
    talk.reply("One. Two. Three.")
    talk.told.clear()
    talk.event("input_audio_buffer.speech_started")
    talk.event("output_audio_buffer.cleared", response_id="r")
    talk.event("output_audio_buffer.stopped", response_id="r")
    assert talk.kinds() == ["user-started-speaking", "bot-interrupted", "bot-stopped-speaking"]


def test_a_reply_in_writing() -> None:
    talk = Talk()
    talk.reply("One. Two", kind="output_text")
    assert [(o["text"], o["will_be_spoken"]) for o in talk.only("bot-output")] == [
        ("One.", False),
        ("Two", False),
    ]
    assert talk.only("bot-tts-text") == []


def test_a_server_that_says_a_reply_at_once() -> None:
    talk = Talk()
    talk.event("response.output_audio_transcript.done", response_id="r", transcript="One. Two.")
    talk.event("response.output_text.done", response_id="s", text="Three.")
    talk.event("response.done", response={"id": "r"})
    talk.event("response.done", response={"id": "s"})
    texts = [(each["text"], each["will_be_spoken"]) for each in talk.only("bot-output")]
    assert texts == [("One.", True), ("Two.", True), ("Three.", False)]


# --- what clients ask -----------------------------------------------------------------------------


def test_send_text() -> None:
    talk = Talk()
    talk.say("send-text", {"content": "Hello?", "options": {}})
    item, response = talk.asked
    assert item["item"]["content"] == [{"type": "input_text", "text": "Hello?"}]
    assert (item["event_id"], response["event_id"]) == ("m1", "m1")
    assert response["response"] == {}
    assert talk.requests() == ["conversation.item.create", "response.create"]
    assert talk.only("user-llm-text") == [{"text": "Hello?"}]


def test_send_text_interrupts_and_waits_for_the_reply_that_it_ends() -> None:
    talk = Talk()
    talk.event("response.created", response={"id": "r"})
    talk.event("output_audio_buffer.started", response_id="r")
    talk.say("send-text", {"content": "Stop!", "options": {"audio_response": False}})
    assert talk.requests() == ["output_audio_buffer.clear", "conversation.item.create"]
    talk.event("output_audio_buffer.cleared", response_id="r")
    talk.event("response.done", response={"id": "r", "status": "cancelled"})
    assert talk.asked[0]["response"] == {"output_modalities": ["text"]}
    assert talk.requests() == ["response.create"]


def test_send_text_for_later() -> None:
    talk = Talk()
    talk.say("send-text", {"content": "By the way", "options": {"run_immediately": False}})
    assert talk.requests() == ["conversation.item.create"]


def test_append_to_context() -> None:
    talk = Talk()
    talk.say("append-to-context", {"role": "assistant", "content": "I said"})
    assert talk.asked[0]["item"]["content"] == [{"type": "output_text", "text": "I said"}]
    assert talk.requests() == ["conversation.item.create"]
    talk.say("append-to-context", {"role": "user", "content": "So?", "run_immediately": True})
    assert talk.requests() == ["conversation.item.create", "response.create"]
    talk.told.clear()
    talk.say("append-to-context", {"role": "nobody", "content": ""})
    assert talk.kinds() == ["error-response"]


def called(talk: Talk, *call_ids: str) -> None:
    talk.event("response.created", response={"id": "r"})
    for call_id in call_ids:
        item = {"type": "function_call", "call_id": call_id, "name": "weather"}
        talk.event("response.output_item.added", item=item)
        talk.event("response.output_item.done", item=item | {"arguments": '{"city": "Rome"}'})
    talk.event("response.done", response={"id": "r", "status": "completed"})


def test_function_calls() -> None:
    talk = Talk()
    called(talk, "a", "b")
    assert talk.only("llm-function-call-started") == [{"function_name": "weather"}] * 2
    assert talk.only("llm-function-call-in-progress")[0] == {
        "tool_call_id": "a",
        "function_name": "weather",
        "arguments": {"city": "Rome"},
    }
    result = {"function_name": "weather", "arguments": {}, "result": {"sky": "blue"}}
    talk.say("llm-function-call-result", result | {"tool_call_id": "a"})
    assert talk.asked[0]["item"] == {
        "type": "function_call_output",
        "call_id": "a",
        "output": '{"sky":"blue"}',
    }
    assert talk.requests() == ["conversation.item.create"], "b is still to come"
    talk.say("llm-function-call-result", result | {"tool_call_id": "b", "result": "rain"})
    assert talk.asked[0]["item"]["output"] == "rain"
    assert talk.requests() == ["conversation.item.create", "response.create"]
    stopped = talk.only("llm-function-call-stopped")
    assert [(each["tool_call_id"], each["cancelled"]) for each in stopped] == [
        ("a", False),
        ("b", False),
    ]


def test_a_function_call_before_1_2_is_one_message() -> None:
    talk = Talk(version="1.0.0")
    called(talk, "a")
    (call,) = talk.only("llm-function-call")
    assert call == {"tool_call_id": "a", "function_name": "weather", "args": {"city": "Rome"}}
    assert talk.only("llm-function-call-in-progress") == []


def test_a_function_call_that_was_cut_off() -> None:
    talk = Talk()
    item = {"type": "function_call", "call_id": "a", "name": "f", "status": "incomplete"}
    talk.event("response.output_item.done", item=item)
    assert talk.only("llm-function-call-stopped")[0]["cancelled"]


@pytest.mark.parametrize("arguments", ["", "no json", "[1]", None, 7])
def test_arguments_that_are_none(arguments: Any) -> None:
    talk = Talk()
    item = {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments}
    talk.event("response.output_item.done", item=item)
    assert talk.only("llm-function-call-in-progress")[0]["arguments"] == {}


def test_a_client_message_is_a_client_event_of_the_other_api() -> None:
    talk = Talk()
    talk.say("client-message", {"t": "session.update", "d": {"session": {"x": 1}, "type": "y"}})
    assert talk.asked == [{"type": "session.update", "session": {"x": 1}, "event_id": "m1"}]
    assert talk.told == []
    talk.event("session.updated", session={"x": 1, "z": 2})
    (answer,) = talk.told
    assert (answer["type"], answer["id"]) == ("server-response", "m1")
    assert answer["data"] == {"t": "session.update", "d": {"session": {"x": 1, "z": 2}}}
    talk.event("session.updated", session={})
    assert len(talk.told) == 1, "it has been answered"
    talk.asked.clear()
    talk.say("client-message", {"t": "response.cancel"}, "m2")
    assert talk.requests() == ["response.cancel"]
    assert talk.told[-1]["data"] == {"t": "response.cancel", "d": None}


def test_a_client_message_that_is_refused() -> None:
    talk = Talk()
    talk.say("client-message", {"t": "conversation.item.retrieve", "d": {"item_id": "none"}})
    talk.event("error", error={"message": "No such item.", "event_id": "m1"})
    assert [(m["type"], m["id"], m["data"]["error"]) for m in talk.told] == [
        ("error-response", "m1", "No such item.")
    ]
    talk.told.clear()
    talk.event("conversation.item.retrieved", item={})
    assert talk.told == []


def test_the_client_ends_the_call() -> None:
    talk = Talk()
    assert not talk.adapter.leaves
    talk.say("disconnect-bot", {})
    assert talk.adapter.leaves
    (farewell,) = map(orjson.loads, talk.adapter.farewell())
    assert farewell == {"type": "signalling", "message": {"type": "peerLeft"}}


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("dtmf", {"buttons": ["1"]}),
        ("ui-snapshot", {"tree": {}}),
        ("yet-to-be-invented", None),
        ("send-text", {}),
        ("send-text", None),
        ("send-text", {"content": 7}),
        ("client-message", {"t": "custom", "d": 1}),
        ("client-message", []),
        ("llm-function-call-result", {}),
        ("x" * 100_000, {}),
    ],
)
def test_what_is_not_understood_is_refused(kind: str, data: Any) -> None:
    talk = Talk()
    talk.say(kind, data, "id-1")
    (refusal,) = talk.told
    assert (refusal["type"], refusal["id"]) == ("error-response", "id-1")
    assert 0 < len(refusal["data"]["error"]) < 300
    assert talk.asked == []


@pytest.mark.parametrize(
    "message",
    [
        "",
        "pong",
        b"\xff\xfe",
        "[]",
        "{}",
        '{"label": "rtvi-ai", "type": "client-ready"}',
        '{"label": "rtvi-ai", "id": "1"}',
        '{"label": "rtvi-ai", "id": 1, "type": "client-ready"}',
        '{"label": "rtvi-ai", "id": "' + "x" * 200 + '", "type": "client-ready"}',
        '{"type": "session.update", "session": {}}',
        "[" * 10_000,
        "x" * 1_000_000,
    ],
)
def test_what_is_no_message_is_an_error(message: str | bytes) -> None:
    talk = Talk()
    talk.hear(message)
    (error,) = talk.told
    assert error["type"] == "error"
    assert error["data"]["error"]
    assert not error["data"]["fatal"]


@pytest.mark.parametrize(
    ("code", "fatal"),
    [("session_expired", True), ("backend_lost", True), ("server_shutting_down", False)],
)
def test_errors_of_the_call(code: str, fatal: bool) -> None:
    """After a fatal one the client disconnects; after another one it may come back by itself."""
    talk = Talk()
    talk.event("error", error={"code": code, "message": "So it is.", "event_id": None})
    assert talk.only("error") == [{"error": "So it is.", "message": "So it is.", "fatal": fatal}]


_NAMES = (
    *("id", "type", "t", "d", "item", "item_id", "name", "call_id", "part", "transcript", "delta"),
    *("response", "response_id", "error", "content", "tool_call_id", "role", "options"),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4)
    ),
    max_leaves=8,
)


@hypothesis.given(st.sampled_from(sorted(rtvi._HEARD)), _JSON)
def test_any_message_ends_in_events_or_an_answer(kind: str, data: Any) -> None:
    talk = Talk()
    talk.say(kind, data)
    talk.requests()


@hypothesis.given(st.sampled_from(sorted(rtvi._TOLD | rtvi._PLAIN)), _JSON)
def test_any_event_of_a_server_can_be_read(kind: str, fields: Any) -> None:
    talk = Talk()
    fields = fields if isinstance(fields, dict) else {}
    talk.event(kind, **{name: value for name, value in fields.items() if name != "type"})


def test_what_is_remembered_is_bounded() -> None:
    talk = Talk()
    for number in range(2_000):
        each = str(number)
        delta = {"item_id": each, "response_id": each, "delta": "word " * 20}
        talk.event("conversation.item.input_audio_transcription.delta", **delta)
        talk.event("response.output_audio_transcript.delta", **delta)
        item = {"type": "function_call", "call_id": each, "name": "f", "arguments": "{}"}
        talk.event("response.output_item.done", item=item)
        talk.say("client-message", {"t": "session.update"}, each)
        talk.event("response.created", response={"id": each})
        talk.told.clear()
        talk.asked.clear()
    kept = [value for value in vars(talk.adapter).values() if isinstance(value, dict | list)]
    assert max(map(len, kept)) <= rtvi.CALLS_MAX


def test_what_a_reply_costs() -> None:
    talk, deltas = Talk(), 2_000
    began = time.perf_counter()
    talk.reply(*["word, "] * deltas)
    print(f"{1e6 * (time.perf_counter() - began) / deltas:.1f} us a piece of a reply")
    assert talk.only("bot-llm-text")


# --- over a real session --------------------------------------------------------------------------


class Pipecat(test_interruption.Talk):
    """A client of Pipecat's that speaks with the parrot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.session.opening = dataclasses.replace(self.session.opening, dialect="rtvi")
        self.session.opened(self.now)

    def message(self, kind: str, **data: Any) -> None:
        self.send(label="rtvi-ai", type=kind, id="m1", data=data)

    def replying(self) -> None:
        self.say(bytes(400 * MS_OCTETS) + SPEECH + bytes(520 * MS_OCTETS))
        self.say(bytes(500 * MS_OCTETS))
        assert self.told[-1][1] == "bot-tts-text"


def test_text_cuts_off_a_reply_and_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Pipecat(monkeypatch)
    talk.message("client-ready", version="2.1.0")
    assert talk.told[-1][1] == "bot-ready"
    talk.replying()
    sent, told = len(talk.peer.sent), len(talk.told)
    talk.message("send-text", content="Stop!", options={"audio_response": False})
    talk.pass_time(0.2)
    kinds = [
        kind for _, kind in talk.told[told:] if kind not in ("bot-transcription", "bot-output")
    ]
    assert kinds == [
        "user-llm-text",
        "bot-interrupted",
        "bot-stopped-speaking",
        "bot-tts-stopped",
        "bot-llm-stopped",
        "bot-llm-started",
        "bot-llm-text",
        "bot-llm-stopped",
    ]
    test_interruption.check_silence_after(talk, sent)


def test_a_client_that_sends_the_bot_away_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Pipecat(monkeypatch)
    talk.message("disconnect-bot")
    assert talk.endings == [session.LEFT]
    assert talk.peer.messages[-1] == {"type": "signalling", "message": {"type": "peerLeft"}}
