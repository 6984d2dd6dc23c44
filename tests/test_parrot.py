"""The parrot: events in their order, every way to take a turn, and no claim it cannot keep."""

import base64
import re
from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

import realtime
from parrot import DELTA_MS, LEAD_MS, Parrot
from turns import FRAME_OCTETS, MS_OCTETS

from .line import SPEECH

REPLY = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio.delta",
    "response.output_audio_transcript.delta",
]
REPLY_END = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]
COMMITTED = [
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
]


SPEECH_MS = len(SPEECH) // MS_OCTETS


def silence(ms: int) -> bytes:
    return bytes(ms * MS_OCTETS)


class Call:
    """A parrot, and all that it said so far."""

    def __init__(self, session: dict[str, Any] | None = None) -> None:
        self.now = 100.0
        self.parrot = Parrot("tag", session)
        self.events: list[dict[str, Any]] = []
        self.take(self.parrot.start())

    def take(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.events += events
        return events

    def say(self, pcm: bytes) -> list[dict[str, Any]]:
        """In real time, a packet's worth at once."""
        found = []
        for at in range(0, len(pcm), FRAME_OCTETS):
            self.now += 0.02
            found += self.take(self.parrot.receive_audio(pcm[at : at + FRAME_OCTETS], self.now))
        return found

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """No audio comes."""
        found = []
        for _ in range(round(seconds / 0.02)):
            self.now += 0.02
            found += self.take(self.parrot.tick(self.now))
        return found

    def send(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        event = {"type": kind, "event_id": "mine", **fields}
        return self.take(self.parrot.receive_event(event, self.now))

    def update(self, **detection: Any) -> None:
        turns = {"audio": {"input": {"turn_detection": detection or None}}}
        (event,) = self.send("session.update", session=turns)
        assert event["type"] == "session.updated"


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types in order, runs of deltas as one."""
    found: list[str] = []
    for event in events:
        if not (found and found[-1] == event["type"] and found[-1].endswith(".delta")):
            found.append(event["type"])
    return found


def only(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [event for event in events if event["type"] == kind]
    return found


def sound(events: list[dict[str, Any]]) -> bytes:
    return b"".join(e["delta"] for e in events if e["type"] == "response.output_audio.delta")


def refusal(events: list[dict[str, Any]]) -> tuple[str, str | None]:
    (event,) = events
    assert event["type"] == "error"
    assert event["error"]["event_id"] == "mine"
    assert event["error"]["type"] == "invalid_request_error"
    assert event["error"]["message"]
    return event["error"]["code"], event["error"]["param"]


def test_a_whole_turn_in_its_order() -> None:
    call = Call()
    call.say(silence(1000) + SPEECH + silence(600))
    call.wait(4)
    deltas = ["response.output_audio.delta"]  # those beyond the lead
    assert kinds(call.events) == [
        "session.created",
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        *COMMITTED,
        *REPLY,
        *deltas,
        *REPLY_END,
    ]
    ids = [event["event_id"] for event in call.events]
    assert len(set(ids)) == len(ids)
    started = only(call.events, "input_audio_buffer.speech_started")
    assert 600 <= started["audio_start_ms"] <= 760
    stopped = only(call.events, "input_audio_buffer.speech_stopped")
    assert 0 <= stopped["audio_end_ms"] - 1000 - SPEECH_MS <= 100
    committed = only(call.events, "input_audio_buffer.committed")
    user, assistant = (e for e in call.events if e["type"] == "conversation.item.added")
    assert started["item_id"] == stopped["item_id"] == committed["item_id"] == user["item"]["id"]
    assert assistant["previous_item_id"] == user["item"]["id"]
    done = only(call.events, "response.done")["response"]
    assert (done["status"], done["status_details"]) == ("completed", None)
    item = done["output"][0]
    assert (item["id"], item["status"]) == (assistant["item"]["id"], "completed")
    assert assistant["item"]["status"] == "in_progress"  # told events do not change
    words = item["content"][0]["transcript"]
    assert re.fullmatch(r"I heard 2\.\d seconds of speech, level -\d\d dBFS\.", words)


def test_it_repeats_exactly_what_it_heard() -> None:
    call = Call()
    call.say(silence(1000) + SPEECH + silence(600))
    call.wait(4)
    repeated = sound(call.events)
    assert SPEECH[: -40 * MS_OCTETS] in repeated
    assert len(repeated) <= len(SPEECH) + 400 * MS_OCTETS


def test_the_turn_ends_silence_duration_after_the_speech() -> None:
    for silence_ms in (300, 500, 900):
        call = Call({"audio": {"input": {"turn_detection": {"silence_duration_ms": silence_ms}}}})
        call.say(SPEECH + silence(silence_ms - 40))
        assert kinds(call.events)[-1] == "input_audio_buffer.speech_started"
        assert "response.created" in kinds(call.say(silence(80)))


def test_the_turn_ends_by_the_clock_when_no_packets_come() -> None:
    call = Call()
    call.say(SPEECH)
    assert call.wait(0.5) == []
    assert "response.created" in kinds(call.wait(0.14))


def test_it_speaks_little_ahead_of_real_time() -> None:
    call = Call()
    said = call.say(SPEECH + silence(520))
    begun = call.now
    while "response.done" not in kinds(said):
        ahead_ms = len(sound(said)) / MS_OCTETS - (call.now - begun) * 1000
        assert LEAD_MS - 40 <= ahead_ms < LEAD_MS + DELTA_MS + 1
        said += call.wait(0.1)
    assert max(len(e["delta"]) for e in said if "audio.delta" in e["type"]) == DELTA_MS * MS_OCTETS


def test_speech_interrupts_the_reply() -> None:
    call = Call()
    call.say(SPEECH + silence(520))
    events = call.say(SPEECH[: 400 * MS_OCTETS])
    start = kinds(events).index("input_audio_buffer.speech_started")
    assert kinds(events)[start : start + 7] == ["input_audio_buffer.speech_started", *REPLY_END]
    done = only(events, "response.done")["response"]
    assert done["status"] == "cancelled"
    assert done["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert done["output"][0]["status"] == "incomplete"
    assert kinds(events)[start + 7 :] == []  # no sample more


def test_a_reply_that_is_not_to_be_interrupted_goes_on() -> None:
    call = Call()
    call.update(type="server_vad", interrupt_response=False)
    call.say(SPEECH + silence(520))
    events = call.say(SPEECH[: 300 * MS_OCTETS] + silence(540))
    assert "response.done" not in kinds(events)
    error = only(events, "error")["error"]
    assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", None)
    assert only(call.wait(3), "response.done")["response"]["status"] == "completed"


def test_without_create_response_it_waits_to_be_asked() -> None:
    call = Call()
    call.update(type="semantic_vad", eagerness="high", create_response=False)
    events = call.say(SPEECH + silence(600))
    assert kinds(events)[-3:] == COMMITTED
    assert kinds(call.send("response.create"))[: len(REPLY)] == REPLY
    assert refusal(call.send("response.create")) == (
        "conversation_already_has_active_response",
        None,
    )


def test_push_to_talk() -> None:
    call = Call()
    call.say(silence(200))
    call.update()
    assert call.say(SPEECH) == []  # before the key is pressed
    assert kinds(call.send("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]
    assert call.say(silence(200) + SPEECH + silence(1000)) == []
    assert kinds(call.send("input_audio_buffer.commit")) == COMMITTED
    events = call.send("response.create") + call.wait(4)
    assert SPEECH[: -20 * MS_OCTETS] in sound(events)
    assert len(sound(events)) > len(SPEECH) + 1150 * MS_OCTETS  # exactly what was sent
    transcript = only(events, "response.output_audio_transcript.done")["transcript"]
    assert re.fullmatch(r"I heard 3\.\d seconds of sound, level -\d\d dBFS\.", transcript)
    assert kinds(call.send("response.create"))[: len(REPLY)] == REPLY  # once more


def test_nothing_to_commit_is_an_error() -> None:
    call = Call()
    call.say(silence(1000))  # padding is no turn
    assert refusal(call.send("input_audio_buffer.commit"))[0] == "input_audio_buffer_commit_empty"
    call.update()
    call.say(silence(80))
    (event,) = call.send("input_audio_buffer.commit")
    assert event["error"]["message"].endswith("buffer only has 80ms of audio.")


def test_commit_ends_a_turn_early() -> None:
    call = Call()
    call.say(SPEECH)
    assert kinds(call.send("input_audio_buffer.commit")) == COMMITTED
    assert call.say(silence(1000)) == []


def test_session_update_in_mid_call() -> None:
    call = Call()
    call.say(silence(300))
    update = {
        "instructions": "Repeat.",
        "audio": {"input": {"turn_detection": {"silence_duration_ms": 200}}},
    }
    (event,) = call.send("session.update", session=update)
    assert event["session"]["instructions"] == "Repeat."
    assert event["session"]["audio"]["input"]["turn_detection"]["threshold"] == 0.5
    created = call.events[0]["session"]
    assert created["instructions"] == ""
    assert event["session"].keys() == created.keys()
    wrong = {"audio": {"input": {"turn_detection": {"silence_duration_ms": -1}}}}
    assert refusal(call.send("session.update", session=wrong)) == (
        "invalid_value",
        "session.audio.input.turn_detection.silence_duration_ms",
    )
    assert refusal(call.send("session.update")) == ("missing_required_parameter", "session")
    call.say(SPEECH[: 300 * MS_OCTETS] + silence(240))
    assert "input_audio_buffer.speech_stopped" in kinds(call.events)


def stops_after(call: Call, silence_ms: int) -> bool:
    """Whether a turn that is under way ends with so much silence."""
    return "input_audio_buffer.speech_stopped" in kinds(call.say(silence(silence_ms)))


def test_threshold_in_mid_call() -> None:
    call = Call()
    quiet = (np.frombuffer(SPEECH, "<i2") // 16).astype("<i2").tobytes()  # 24 dB less
    call.update(type="server_vad", threshold=0.9)
    assert call.say(quiet + silence(600)) == []
    call.update(type="server_vad", threshold=0.0)
    assert kinds(call.say(quiet))[0] == "input_audio_buffer.speech_started"
    call.update(type="server_vad", threshold=1.0)  # in mid-turn what was speech is silence
    assert not stops_after(call, 100)
    assert "input_audio_buffer.speech_stopped" in kinds(call.say(quiet))


def test_prefix_padding_in_mid_call() -> None:
    call = Call()
    for padding_ms in (0, 1000, 300):
        call.update(type="server_vad", prefix_padding_ms=padding_ms)
        begins_ms = call.parrot._ear.clock_ms + 2000
        events = call.say(silence(2000) + SPEECH + silence(600))
        started = only(events, "input_audio_buffer.speech_started")
        assert abs(begins_ms - padding_ms - started["audio_start_ms"]) <= 60
        call.wait(4)


def test_silence_duration_in_mid_turn() -> None:
    call = Call()
    call.say(SPEECH)
    assert not stops_after(call, 300)
    call.update(type="server_vad", silence_duration_ms=1000)
    assert not stops_after(call, 600)
    call.update(type="server_vad", silence_duration_ms=200)
    assert stops_after(call, 20), "the pause is longer than that already"


def test_eagerness_in_mid_turn() -> None:
    call = Call()
    for eagerness, waits_ms in (("low", 1500), ("medium", 800), ("auto", 800), ("high", 400)):
        call.update(type="semantic_vad", eagerness=eagerness)
        call.say(SPEECH)
        assert not stops_after(call, waits_ms - 60)
        assert stops_after(call, 120)
        call.send("response.cancel")
    call.say(SPEECH)
    call.update(type="semantic_vad", eagerness="low")
    assert not stops_after(call, 1000)
    call.update(type="semantic_vad", eagerness="high")
    assert stops_after(call, 20)


def test_create_response_in_mid_turn() -> None:
    call = Call()
    for create in (False, True):
        call.say(SPEECH)
        call.update(type="server_vad", create_response=create)
        assert ("response.created" in kinds(call.say(silence(540)))) is create


def test_interrupt_response_in_mid_response() -> None:
    call = Call()
    call.say(SPEECH + silence(520))
    call.update(type="server_vad", interrupt_response=False)
    assert "response.done" not in kinds(call.say(SPEECH[: 200 * MS_OCTETS]))
    call.update(type="server_vad", interrupt_response=True)
    # The speech that goes on has begun before; what begins from now on interrupts.
    assert "response.done" not in kinds(call.say(SPEECH[: 100 * MS_OCTETS] + silence(540)))
    done = only(call.say(SPEECH[: 200 * MS_OCTETS]), "response.done")["response"]
    assert done["status_details"]["reason"] == "turn_detected"


def test_a_new_idle_timeout_counts_from_then() -> None:
    call = Call()
    call.say(SPEECH + silence(520))
    call.wait(20)
    call.update(type="server_vad", idle_timeout_ms=5000)
    assert call.wait(4.9) == []
    assert kinds(call.wait(0.2))[0] == "input_audio_buffer.timeout_triggered"
    call.update(type="server_vad", idle_timeout_ms=None)
    assert call.wait(40) == []


def test_push_to_talk_from_and_to_turn_detection_in_mid_turn() -> None:
    call = Call()
    heard = only(call.say(SPEECH[: 400 * MS_OCTETS]), "input_audio_buffer.speech_started")
    call.update()
    assert call.say(SPEECH[400 * MS_OCTETS :] + silence(1000)) == []
    committed, *_ = call.send("input_audio_buffer.commit")
    assert committed["item_id"] != heard["item_id"], "that turn has never been finished"
    assert call.parrot._answer.pcm.startswith(SPEECH[400 * MS_OCTETS : 420 * MS_OCTETS])
    call.say(SPEECH[: 400 * MS_OCTETS])
    call.update(type="semantic_vad", eagerness="high")
    assert call.say(silence(1000)) == [], "what was held down is no turn of the new rule"
    assert "input_audio_buffer.speech_stopped" in kinds(call.say(SPEECH + silence(440)))


def test_a_change_in_mid_response_leaves_the_response_alone() -> None:
    call = Call()
    events = call.say(SPEECH + silence(520))
    for detection in ({}, {"type": "semantic_vad"}, {"type": "server_vad", "threshold": 0.1}):
        call.update(**detection)
        events += call.wait(0.2)
    events += call.wait(4)
    assert only(events, "response.done")["response"]["status"] == "completed"
    assert SPEECH[: -40 * MS_OCTETS] in sound(events)


def test_a_session_that_comes_with_the_offer() -> None:
    created, error = Call({"voice": 1, "audio": {"input": 3}}).events
    assert created["session"]["audio"]["input"]["turn_detection"]["type"] == "server_vad"
    assert error["error"]["param"] == "session.audio.input"
    (created,) = Call({"audio": {"input": {"turn_detection": None}}}).events
    assert created["session"]["audio"]["input"]["turn_detection"] is None


def test_a_transcript_of_the_caller_for_those_who_ask() -> None:
    call = Call({"audio": {"input": {"transcription": {"model": "any"}}}})
    call.say(SPEECH + silence(520))
    event = only(call.events, "conversation.item.input_audio_transcription.completed")
    assert re.fullmatch(r"\(2\.\d seconds of speech, level -\d\d dBFS\)", event["transcript"])
    assert event["usage"]["type"] == "duration"
    (found,) = call.send("conversation.item.retrieve", item_id=event["item_id"])
    assert found["item"]["content"][0]["transcript"] == event["transcript"]


def test_cancelling() -> None:
    call = Call()
    assert refusal(call.send("response.cancel"))[0] == "response_cancel_not_active"
    call.say(SPEECH + silence(520))
    assert refusal(call.send("response.cancel", response_id="resp_other"))[0]
    events = call.send("response.cancel")
    assert kinds(events) == REPLY_END
    assert events[-1]["response"]["status_details"]["reason"] == "client_cancelled"
    assert call.wait(1) == []


def test_text_is_answered_in_text_and_honestly() -> None:
    call = Call()
    events = call.send("response.create")
    assert kinds(events) == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    assert only(events, "response.output_text.done")["text"] == "I have not heard anything yet."
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    call.send("conversation.item.create", item=item)
    text = only(call.send("response.create"), "response.output_text.done")["text"]
    assert text == "I read 5 characters of text. I can repeat only what I hear."
    call.say(SPEECH + silence(520))
    call.send("response.cancel")
    wanted = {"output_modalities": ["text"], "metadata": {"a": "b"}}
    events = call.send("response.create", response=wanted)
    assert sound(events) == b""
    assert events[-1]["response"]["metadata"] == {"a": "b"}
    assert events[-1]["response"]["output_modalities"] == ["text"]


def test_items_are_created_retrieved_deleted() -> None:
    call = Call()
    content = [{"type": "input_audio", "audio": "AAAA", "transcript": "x"}]
    item = {"id": "a", "type": "message", "role": "user", "content": content}
    events = call.send("conversation.item.create", item=item)
    assert kinds(events) == ["conversation.item.added", "conversation.item.done"]
    (event,) = call.send("conversation.item.retrieve", item_id="a")
    assert event["item"]["content"] == [{"type": "input_audio", "transcript": "x"}]
    assert refusal(call.send("conversation.item.create", item=item)) == ("invalid_value", "item.id")
    later = {"type": "function_call_output", "call_id": "c", "output": "{}"}
    events = call.send("conversation.item.create", item=later, previous_item_id="root")
    assert events[0]["previous_item_id"] is None
    wrong = call.send("conversation.item.create", item=later, previous_item_id="nobody")
    assert refusal(wrong) == ("invalid_value", "previous_item_id")
    (event,) = call.send("conversation.item.delete", item_id="a")
    assert (event["type"], event["item_id"]) == ("conversation.item.deleted", "a")
    for verb in ("retrieve", "delete", "truncate"):
        wrong = call.send(f"conversation.item.{verb}", item_id="a", audio_end_ms=0)
        assert refusal(wrong) == (f"item_{verb}_invalid_item_id", "item_id")


def test_truncating_forgets_what_was_not_heard() -> None:
    call = Call()
    call.say(SPEECH + silence(520))
    item_id = only(call.send("response.cancel"), "conversation.item.done")["item"]["id"]
    ask = {"item_id": item_id, "content_index": 0}
    user_id = only(call.events, "input_audio_buffer.committed")["item_id"]
    heard = call.send("conversation.item.truncate", item_id=user_id, audio_end_ms=0)
    assert refusal(heard) == ("invalid_value", "item_id")
    late = call.send("conversation.item.truncate", audio_end_ms=LEAD_MS + DELTA_MS + 1, **ask)
    assert refusal(late) == ("invalid_value", "audio_end_ms")
    (event,) = call.send("conversation.item.truncate", audio_end_ms=740, **ask)
    assert event["type"] == "conversation.item.truncated"
    assert (event["item_id"], event["audio_end_ms"]) == (item_id, 740)
    (event,) = call.send("conversation.item.retrieve", item_id=item_id)
    assert event["item"]["content"] == [{"type": "output_audio", "transcript": None}]
    again = call.send("conversation.item.truncate", audio_end_ms=741, **ask)
    assert refusal(again) == ("invalid_value", "audio_end_ms")


def test_silence_after_a_reply_can_be_a_turn_of_its_own() -> None:
    call = Call()
    call.update(type="server_vad", idle_timeout_ms=5000)
    assert call.wait(6) == []  # there was no reply yet
    call.say(SPEECH + silence(520))
    call.wait(SPEECH_MS / 1000 + 4.5)
    assert "input_audio_buffer.timeout_triggered" not in kinds(call.events)
    events = call.wait(1)
    assert kinds(events)[:4] == ["input_audio_buffer.timeout_triggered", *COMMITTED]
    text = only(events, "response.output_text.done")["text"]
    assert text == "I heard nothing for 5 seconds."


def test_audio_by_events() -> None:
    call = Call()
    for at in range(0, len(SPEECH), 3200):
        audio = base64.b64encode(SPEECH[at : at + 3200]).decode()
        call.send("input_audio_buffer.append", audio=audio)
    assert kinds(call.events) == ["session.created", "input_audio_buffer.speech_started"]
    for audio, code in (("!", "invalid_value"), ("AA==", "invalid_value"), (3, "invalid_type")):
        assert refusal(call.send("input_audio_buffer.append", audio=audio)) == (code, "audio")
    minute = base64.b64encode(silence(60_000)).decode()
    assert refusal(call.send("input_audio_buffer.append", audio=minute))[1] == "audio"


def test_unknown_events_are_errors() -> None:
    call = Call()
    assert refusal(call.send("session.end")) == ("invalid_value", "type")
    (event,) = call.take(call.parrot.receive_event({"type": ["x"], "event_id": 3}, 0.0))
    assert event["error"]["event_id"] is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below),
    max_leaves=6,
)
IDS = ["item_id", "response_id", "event_id", "previous_item_id", "id"]
PARTS = ["session", "item", "response", "audio", "type", "content", "role", "output_modalities"]
FIELDS = st.sampled_from([*IDS, *PARTS, "audio_end_ms", "content_index"])
MESSAGE = st.fixed_dictionaries(
    {"type": st.just("message"), "role": st.just("user"), "content": st.lists(ANYTHING)}
)
VALUES = ANYTHING | st.dictionaries(FIELDS, ANYTHING) | MESSAGE
EVENTS = st.builds(
    lambda kind, fields: {**fields, "type": kind},
    st.sampled_from(sorted(realtime.CLIENT_EVENTS)) | ANYTHING,
    st.dictionaries(FIELDS, VALUES, max_size=5),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS, max_size=8))
def test_any_events_are_answered_and_never_raise(events: list[dict[str, Any]]) -> None:
    call = Call()
    call.say(SPEECH[: 300 * MS_OCTETS])
    for event in events:
        for answer in call.parrot.receive_event(event, call.now):
            assert isinstance(answer.pop("delta", b""), bytes | str)
            assert orjson.loads(orjson.dumps(answer))["event_id"]
    call.say(silence(600))
    call.wait(0.2)
