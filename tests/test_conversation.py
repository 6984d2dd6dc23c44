"""The conversation: the channel's order, interruption, what was heard, strangers' JSON."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
import channel
import conversation
import realtime
import replies
from turns import FRAME_OCTETS, MS_OCTETS, RATE_HZ

from .line import (
    AFTER_SOUND,
    BEFORE_SOUND,
    COMMITTED,
    DELTA,
    SPEECH,
    SPEECH_TURN,
    Line,
    ParrotLine,
    kinds,
    refusal,
)

# --- with the parrot -----------------------------------------------------------------------------


def test_a_whole_turn_in_its_order() -> None:
    line = ParrotLine()
    seen = line.say(bytes(400 * MS_OCTETS) + SPEECH + bytes(520 * MS_OCTETS)) + line.wait(4)
    assert kinds(seen) == [
        *SPEECH_TURN,
        *COMMITTED,
        *BEFORE_SOUND,
        *AFTER_SOUND,
        "output_audio_buffer.stopped",
    ]
    ids = [event["event_id"] for event in seen]
    assert len(set(ids)) == len(ids)
    sounding = [e["response_id"] for e in seen if e["type"].startswith("output_audio_buffer.")]
    assert sounding == [seen[-2]["response"]["id"]] * 2
    assert SPEECH[: -40 * MS_OCTETS] in b"".join(line.packets)


def test_a_short_reply_keeps_the_order_too() -> None:
    line = ParrotLine({"audio": {"input": {"turn_detection": None}}})
    line.say(SPEECH[: 160 * MS_OCTETS])
    line.client("input_audio_buffer.commit")
    seen = line.client("response.create") + line.wait(0.3)
    assert kinds(seen) == [*BEFORE_SOUND, *AFTER_SOUND, "output_audio_buffer.stopped"]


def test_the_first_packet_leaves_with_the_end_of_the_turn() -> None:
    line = ParrotLine()
    line.say(SPEECH + bytes(480 * MS_OCTETS))
    while not line.packets:
        seen = line.say(bytes(20 * MS_OCTETS))
    assert "input_audio_buffer.speech_stopped" in kinds(seen)


def silent(packets: list[bytes]) -> bool:
    """Whether all of them are silence, as it follows a reply that was cut off."""
    return not any(map(any, packets))


def test_interruption_in_mid_reply() -> None:
    line = ParrotLine()
    line.say(SPEECH + bytes(520 * MS_OCTETS))
    line.wait(0.5)
    seen: list[dict[str, Any]] = []
    spoken = SPEECH
    while "input_audio_buffer.speech_started" not in kinds(seen):
        sent = len(line.packets)
        seen, spoken = seen + line.say(spoken[:FRAME_OCTETS]), spoken[FRAME_OCTETS:]
    assert kinds(seen) == [
        "input_audio_buffer.speech_started",
        "output_audio_buffer.cleared",
        *AFTER_SOUND,
        "conversation.item.truncated",
    ]
    assert seen[-2]["response"]["status_details"]["reason"] == "turn_detected"
    assert silent(line.packets[sent:])  # not one more of it
    assert seen[-1]["audio_end_ms"] == sent * 20
    item_id = seen[-1]["item_id"]
    (found,) = line.client("conversation.item.retrieve", item_id=item_id)
    assert found["item"]["content"] == [{"type": "output_audio", "transcript": None}]
    assert line.wait(0.4) == []
    assert silent(line.packets[sent:])


def test_push_to_talk_and_an_empty_commit() -> None:
    line = ParrotLine({"audio": {"input": {"turn_detection": None}}})
    line.take()
    assert kinds(line.client("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]
    error = refusal(line.client("input_audio_buffer.commit", event_id="e1"))
    assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "e1")
    assert line.say(SPEECH) == []
    assert kinds(line.client("input_audio_buffer.commit")) == COMMITTED
    seen = line.client("response.create") + line.wait(4)
    assert kinds(seen) == [*BEFORE_SOUND, *AFTER_SOUND, "output_audio_buffer.stopped"]


def test_a_client_interrupts() -> None:
    line = ParrotLine()
    line.say(SPEECH + bytes(520 * MS_OCTETS))
    line.wait(0.3)
    sent = len(line.packets)
    seen = line.client("output_audio_buffer.clear")
    assert kinds(seen) == ["output_audio_buffer.cleared", *AFTER_SOUND, seen[-1]["type"]]
    assert seen[-2]["response"]["status_details"]["reason"] == "client_cancelled"
    assert seen[-1]["audio_end_ms"] == sent * 20
    assert line.wait(1) == []
    assert silent(line.packets[sent:])


def test_session_update_in_mid_call_answers_with_the_full_session() -> None:
    line = ParrotLine()
    (created,) = line.take()
    assert created["session"]["id"] == "rtc_1"
    pcm = {"type": "audio/pcm", "rate": 24_000}  # the media path's business, not the client's
    update = {"audio": {"input": {"format": pcm, "turn_detection": {"threshold": 0.6}}}}
    (updated,) = line.client("session.update", session=update)
    assert updated["type"] == "session.updated"
    assert updated["session"].keys() == created["session"].keys()
    assert updated["session"]["audio"]["input"]["turn_detection"]["threshold"] == 0.6
    assert updated["session"]["audio"]["input"]["format"]["rate"] == RATE_HZ


# --- the channel ---------------------------------------------------------------------------------


def test_session_created_comes_first_whatever_was_said_before() -> None:
    line = Line(opened=False)
    line.backend("rate_limits.updated")
    line.backend("session.created", session={"model": "m"})
    line.backend("response.created", response={"id": "r"})
    assert line.take() == []
    line.conversation.opened(line.now)
    line.flow()
    seen = line.take()
    assert kinds(seen) == ["session.created", "rate_limits.updated", "response.created"]
    assert all(event["event_id"] for event in seen)


def test_a_slow_backend_is_waited_for() -> None:
    line = Line(opened=False)
    line.conversation.opened(line.now)
    assert line.client("nonsense") == []
    line.backend("session.created", session={})
    assert kinds(line.take()) == ["session.created", "error"]


def test_what_waits_for_the_channel_is_bounded() -> None:
    line = Line(opened=False)
    line.backend("session.created", session={})
    for i in range(200):
        line.backend("response.output_text.delta", delta="x" * 10_000, number=i)
    line.conversation.opened(line.now)
    line.flow()
    seen = line.take()
    assert seen[0]["type"] == "session.created"
    assert seen[-1]["number"] == 199
    assert len(seen) * 10_000 <= channel.BACKLOG_OCTETS_MAX


def test_secrets_and_audio_stay_behind() -> None:
    line = Line()
    tool = {"type": "mcp", "server_url": "u", "authorization": "s3cret", "headers": {"x": "s3cret"}}
    function = {"type": "function", "parameters": {"properties": {"headers": {}}}}
    session = {"tools": [tool, function], "client_secret": {"value": "s3cret"}, "model": "m"}
    line.backend("session.updated", session=session)
    line.sounds(40)
    seen = line.take()
    assert b"s3cret" not in orjson.dumps(seen)
    assert seen[0]["session"]["tools"] == [{"type": "mcp", "server_url": "u"}, function]
    assert "response.output_audio.delta" not in kinds(seen)


def test_a_reply_that_never_gets_to_sound_does_not_hold_events_back() -> None:
    line = Line()
    line.sounds(10)  # less than a packet
    line.backend("response.output_audio_transcript.delta", delta="Hello")
    assert "response.output_audio_transcript.delta" not in kinds(line.take())
    assert kinds(line.wait(0.12)) == ["response.output_audio_transcript.delta"]


def test_stopped_waits_for_response_done() -> None:
    line = Line()
    line.sounds(100)
    line.backend("response.output_audio.done", item_id="i")
    assert "output_audio_buffer.stopped" not in kinds(line.wait(0.4))
    line.backend("response.done", response={"id": "r"})
    assert kinds(line.take()) == ["response.done", "output_audio_buffer.stopped"]


def test_stopped_waits_for_the_last_millisecond() -> None:
    line = Line()
    line.sounds(200)
    line.done()
    assert kinds(line.take())[-1] == "response.done"
    assert line.wait(0.16) == []
    assert kinds(line.wait(0.04)) == ["output_audio_buffer.stopped"]
    assert len(line.packets) == 10


def test_two_replies_in_a_row_each_start_and_stop() -> None:
    line = Line()
    for name in ("1", "2"):
        line.sounds(100, "r" + name, "i" + name)
        line.done("r" + name, "i" + name)
    seen = line.take() + line.wait(0.4)
    buffer = [e for e in seen if e["type"].startswith("output_audio_buffer.")]
    assert [e["type"].rpartition(".")[2] + " " + e["response_id"] for e in buffer] == [
        *["started r1", "stopped r1", "started r2", "stopped r2"]
    ]


def test_a_response_that_fails_in_mid_audio_stops_all_the_same() -> None:
    line = Line()
    line.sounds(50)
    line.backend("response.done", response={"id": "r", "status": "failed"})
    assert kinds(line.wait(0.2))[-1] == "output_audio_buffer.stopped"


# --- interruption --------------------------------------------------------------------------------


def test_speech_flushes_and_the_backend_learns_what_was_heard() -> None:
    line = Line()
    line.sounds(1000)
    line.wait(0.1)
    line.backend("input_audio_buffer.speech_started", item_id="u")
    assert kinds(line.take())[1:] == ["output_audio_buffer.cleared"]
    (truncate,) = line.asks()
    assert truncate.pop("type") == "conversation.item.truncate"
    assert truncate == {"item_id": "i", "content_index": 0, "audio_end_ms": 120}
    line.delta(500)  # a backend that has not noticed yet
    line.done()
    assert kinds(line.wait(0.5)) == ["response.output_audio.done", "response.done"]
    assert silent(line.packets[6:])


def test_a_response_cut_off_before_its_first_sample_stays_silent() -> None:
    line = Line()
    line.backend("response.created", response={"id": "r"})
    line.backend("input_audio_buffer.speech_started", item_id="u")
    line.delta(500)
    line.done()
    line.sounds(40, "r2", "i2")
    line.wait(0.2)
    assert len(line.packets) == 2  # of the new one


def test_a_session_that_is_not_to_be_interrupted() -> None:
    line = Line()
    turns = {"audio": {"input": {"turn_detection": {"interrupt_response": False}}}}
    line.backend("session.updated", session=turns)
    line.sounds(100)
    line.backend("input_audio_buffer.speech_started", item_id="u")
    line.done()
    assert kinds(line.wait(0.3))[-1] == "output_audio_buffer.stopped"
    assert line.asks() == []


def test_a_client_that_clears_gets_an_answer_even_in_silence() -> None:
    line = Line()
    (event,) = line.client("output_audio_buffer.clear")
    assert (event["type"], event["response_id"]) == ("output_audio_buffer.cleared", None)
    line.sounds(1000)
    assert kinds(line.client("output_audio_buffer.clear"))[-1] == "output_audio_buffer.cleared"
    assert kinds(line.asks()) == ["response.cancel", "conversation.item.truncate"]


def test_a_backend_that_knows_no_truncation_does_not_alarm_the_client() -> None:
    line = Line()
    line.sounds(1000)
    line.backend("input_audio_buffer.speech_started")
    (asked,) = line.asked
    line.take()
    line.backend("error", error={"code": "unknown_event", "event_id": asked["event_id"]})
    line.backend("error", error={"code": "other", "event_id": "the client's"})
    assert [event["error"]["code"] for event in line.take()] == ["other"]


def test_more_audio_than_fits_is_an_error_and_ends() -> None:
    line = Line()
    line.sounds(100)
    for _ in range(40):
        line.delta(60_000)
    errors = [event["error"] for event in line.take() if event["type"] == "error"]
    assert [(e["code"], e["type"]) for e in errors] == [("audio_overflow", "server_error")]


# --- items ---------------------------------------------------------------------------------------


def test_items_that_passed_through_can_be_retrieved() -> None:
    line = Line()
    part = {"type": "input_audio", "transcript": None}
    line.backend("conversation.item.added", item={"id": "u", "content": [part]})
    line.backend(
        "conversation.item.input_audio_transcription.completed",
        item_id="u",
        content_index=0,
        transcript="Good evening.",
    )
    line.take()
    (event,) = line.client("conversation.item.retrieve", item_id="u", event_id="e")
    assert event["type"] == "conversation.item.retrieved"
    assert event["item"]["content"][0]["transcript"] == "Good evening."
    line.backend("conversation.item.deleted", item_id="u")
    line.take()
    error = refusal(line.client("conversation.item.retrieve", item_id="u", event_id="e"))
    assert (error["code"], error["event_id"]) == ("item_retrieve_invalid_item_id", "e")
    assert line.asks() == []


def test_a_client_truncates_no_further_than_was_played() -> None:
    line = Line()
    line.sounds(1000)
    line.wait(0.1)
    ask = {"item_id": "i", "content_index": 0}
    line.client("conversation.item.truncate", audio_end_ms=900, **ask)
    line.client("conversation.item.truncate", audio_end_ms=50, **ask)
    line.client("conversation.item.truncate", item_id="another", audio_end_ms=900)
    assert [event["audio_end_ms"] for event in line.asks()] == [120, 50, 900]
    line.done()
    line.wait(1)
    line.client("conversation.item.truncate", audio_end_ms=5000, **ask)
    assert line.asks()[0]["audio_end_ms"] == 1000


# --- strangers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "code", "param", "event_id"),
    [
        (b"\xff\x00", "invalid_json", None, None),
        ("[" * 100_000, "invalid_json", None, None),
        ('{"event_id": "e"}', "missing_required_parameter", "type", "e"),
        ('{"type": "session.end", "event_id": "e"}', "invalid_value", "type", "e"),
        ('{"type": "response.create", "event_id": 3}', "invalid_type", "event_id", None),
        (
            f'{{"type": "response.create", "event_id": "{"e" * 600}"}}',
            "invalid_value",
            "event_id",
            0,
        ),
        ('{"type": "conversation.item.retrieve", "item_id": 1}', "invalid_type", "item_id", None),
    ],
)
def test_what_is_wrong_is_told_and_the_session_stays(
    message: str | bytes, code: str, param: str | None, event_id: str | int | None
) -> None:
    line = Line()
    line.conversation.client_message(message, line.now)
    line.flow()
    error = refusal(line.take())
    assert (error["code"], error["param"]) == (code, param)
    assert event_id == 0 or error["event_id"] == event_id
    assert error["type"] == "invalid_request_error"
    assert line.asks() == []
    line.client("response.create")
    assert line.asks() == [{"type": "response.create"}]


def test_other_events_reach_the_backend_as_they_are() -> None:
    line = Line()
    event = {"type": "response.create", "event_id": "e", "response": {"metadata": {"a": "b"}}}
    for message in (orjson.dumps(event), orjson.dumps(event).decode()):
        line.conversation.client_message(message, line.now)
    assert line.conversation.to_backend() == [event, event]


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": None},
        {"type": "output_audio_buffer.started", "response_id": "r"},
        DELTA | {"delta": b"\0\0"},
        DELTA | {"delta": "AAAA", "item_id": "i", "response_id": "r"},
        DELTA | {"delta": b"", "item_id": "i", "response_id": "r"},
    ],
)
def test_backend_events_that_mean_nothing_are_dropped(event: dict[str, Any]) -> None:
    line = Line()
    line.conversation.backend_event(event, line.now)
    line.flow()
    assert line.take() == []


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, "x" * 300_000, "\ud800"], ids=repr)
def test_what_cannot_be_passed_on_is_told(value: Any) -> None:
    line = Line()
    line.backend("response.output_text.delta", delta=value)
    assert refusal(line.take())["code"] == "server_event_lost"


def test_after_the_end_nothing_comes() -> None:
    line = Line()
    line.sounds(1000)
    line.take()
    line.conversation.closed()
    assert line.client("nonsense") == []
    line.backend("input_audio_buffer.speech_started")
    line.conversation.opened(line.now)
    line.flow()
    assert (line.take(), line.asks()) == ([], [])


# --- whatever comes, in whatever order -----------------------------------------------------------

IDS = st.sampled_from(["i", "r", "r2", "", "x" * 600])
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)  # lone surrogates too
    | IDS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below),
    max_leaves=5,
)
VAD = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["server_vad", "semantic_vad"]) | ANY,
        "create_response": st.booleans() | ANY,
        "interrupt_response": st.booleans() | ANY,
        "min_interruption_duration_ms": st.integers(0, 400) | ANY,
        "response_delay_ms": st.integers(0, 100) | ANY,
    },
)
SESSIONS = st.builds(
    lambda vad: {"audio": {"input": {"turn_detection": vad, "format": 1}, "output": None}},
    VAD | ANY,
)
PART = st.fixed_dictionaries({"type": ANY, "transcript": ANY})
ITEM = st.fixed_dictionaries({"id": IDS, "content": st.lists(PART | ANY, max_size=2) | ANY})
ERROR = st.fixed_dictionaries({"event_id": IDS | ANY, "param": ANY})
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "item_id": IDS | ANY,
    "response_id": IDS | ANY,
    "event_id": IDS | ANY,
    "response": st.fixed_dictionaries({"id": IDS | ANY}) | ANY,
    "item": ITEM | ANY,
    "session": SESSIONS | ANY,
    "error": ERROR | ANY,
    "content_index": st.integers(-1, 2) | ANY,
    "audio_end_ms": st.integers() | ANY,
    "transcript": ANY,
    "arguments": ANY,
    "delta": st.binary(max_size=5_000) | ANY,
}
FIELDS = st.fixed_dictionaries({}, optional=VALUES)
SAID = [
    *BEFORE_SOUND,
    *AFTER_SOUND,
    *SPEECH_TURN,
    *COMMITTED,
    "error",
    "conversation.item.truncated",
    "conversation.item.deleted",
    "conversation.item.input_audio_transcription.completed",
    "response.function_call_arguments.delta",
    "session.updated",
    "rate_limits.updated",
    "a.kind.yet.to.be.invented",
]
BACKEND = st.builds(
    lambda kind, fields: ("backend", fields | {"type": kind}), st.sampled_from(SAID) | ANY, FIELDS
)
SOUND = st.builds(
    lambda item, response, octets: (
        "backend",
        DELTA | {"item_id": item, "response_id": response, "delta": b"\1" * octets},
    ),
    *(IDS, IDS, st.integers(0, 5_000)),
)
CLIENT = st.builds(
    lambda kind, fields: ("client", jsoned(fields | {"type": kind})),
    st.sampled_from(sorted(realtime.CLIENT_EVENTS)) | ANY,
    FIELDS,
)
NOISE = st.tuples(st.just("client"), st.binary(max_size=40) | st.text(max_size=40))
HEARD = st.tuples(st.just("hear"), st.integers(0, 40))
STEPS = st.lists(NOISE | CLIENT | BACKEND | SOUND | HEARD, max_size=20)


def jsoned(event: dict[str, Any]) -> bytes:
    """What a client would send: whatever JSON cannot say becomes null."""
    try:
        return orjson.dumps(event)
    except TypeError:
        plain = {k: v if isinstance(v, str | int) else None for k, v in event.items()}
        return json.dumps(plain).encode()


def check_what_the_client_saw(seen: list[dict[str, Any]]) -> None:
    begun: set[str] = set()
    over: set[str] = set()
    for event in seen:
        assert isinstance(event["event_id"], str)
        assert event["type"] != "response.output_audio.delta"
        what, who = event["type"].removeprefix("output_audio_buffer."), event.get("response_id")
        if what == "started":
            assert who not in begun, "a response starts once"
            begun.add(who)
        elif what == "stopped" or (what == "cleared" and who in begun - over):
            assert who in begun - over, "and is over once"
            over.add(who)
    assert begun == over, "what has started is over at the end"


@settings(max_examples=150, deadline=None)
@given(STEPS, SESSIONS | st.none())
def test_any_messages_from_either_side_keep_the_rules(steps: list[Any], offered: Any) -> None:
    line, parrot = Line(offered), ParrotLine(offered)
    asked: list[dict[str, Any]] = []
    clears = 0
    for what, value in steps:
        if what == "backend":
            line.conversation.backend_event(value, line.now)
        elif what == "hear":
            line.conversation.hear(SPEECH[: value * FRAME_OCTETS], line.now)
        else:
            for either in (line, parrot):
                either.conversation.client_message(value, either.now)
                either.flow()
            clears += isinstance(value, bytes) and value.endswith(b'"output_audio_buffer.clear"}')
        line.wait(0.02, keep=True)
        asked += line.asks()
    parrot.wait(0.2)
    for response_id in ("i", "r", "r2", ""):  # every response ends at last
        line.backend("response.done", response={"id": response_id})
    seen = line.take() + line.wait(1)
    check_what_the_client_saw(seen)
    answers = [kind for kind in kinds(seen) if kind in ("output_audio_buffer.cleared", "error")]
    assert len(answers) >= clears, "every clear has an answer"
    for event in asked:
        assert event["type"] in realtime.CLIENT_EVENTS
        if event["type"] == "session.update":
            vad = conversation._at(event, "session", "audio", "input", "turn_detection")
            assert not (
                isinstance(vad, dict) and set(realtime.Patience.__struct_fields__) & set(vad)
            )


@settings(max_examples=50, deadline=None)
@given(st.lists(BACKEND | SOUND, max_size=20))
def test_a_backend_that_makes_no_sense_costs_a_bounded_memory(events: list[Any]) -> None:
    line = Line()
    for number in range(40):
        for _, event in events:
            known = {k: f"{v}{number}" for k, v in event.items() if k in ("item_id", "response_id")}
            line.conversation.backend_event(event | known, line.now)
        line.flow()
        line.seen, line.asked = [], []
    found = line.conversation._replies
    assert len(found._replies) <= replies.REPLIES_MAX
    assert len(found._over) <= replies.OVER_MAX
    assert len(found._heard) <= replies.HEARD_MAX
    assert len(found._pieces) <= audio.ITEMS_MAX
    assert len(line.conversation._chronicle.memory._history._items) <= realtime.ITEMS_MAX
