"""The table between the two dialects: every name, both ways, and no harm to others."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dialect
import realtime

RATE_HZ = 24_000
SESSION = realtime.session("sess_1", "parrot", RATE_HZ)
FLAT = {
    "object": "realtime.session",
    "id": "sess_1",
    "model": "parrot",
    "modalities": ["audio", "text"],
    "instructions": "",
    "tools": [],
    "tool_choice": "auto",
    "max_response_output_tokens": "inf",
    "tracing": None,
    "prompt": None,
    "include": None,
    "input_audio_format": "pcm16",
    "input_audio_transcription": None,
    "input_audio_noise_reduction": None,
    "turn_detection": SESSION["audio"]["input"]["turn_detection"],
    "output_audio_format": "pcm16",
    "voice": "parrot",
    "speed": 1.0,
}


def to_ga(event: dict[str, Any]) -> dict[str, Any]:
    (found,) = dialect.Reader(RATE_HZ).read(event)
    return found


def test_a_session_is_flat_in_the_beta_and_comes_back_whole() -> None:
    created = {"type": "session.created", "event_id": "e", "session": SESSION}
    before = copy.deepcopy(created)
    flat = dialect.server_to_beta(created)
    assert flat == {"type": "session.created", "event_id": "e", "session": FLAT}
    assert created == before
    assert to_ga(flat) == created
    assert dialect.of_session(FLAT) == "beta"
    assert dialect.of_session(SESSION) == "ga"
    assert dialect.of_session({}) == dialect.of_session(None) == "ga"


def test_an_update_moves_only_what_it_names() -> None:
    update = {"audio": {"input": {"turn_detection": None}, "output": {"voice": "grey"}}}
    event = {"type": "session.update", "session": {"type": "realtime", **update}}
    flat = dialect.client_to_beta(event)
    assert flat["session"] == {"turn_detection": None, "voice": "grey"}
    assert dialect.client_to_ga(flat, RATE_HZ) == event


def test_text_alone_stays_text_alone() -> None:
    event = {"type": "response.create", "response": {"output_modalities": ["text"]}}
    assert dialect.client_to_beta(event)["response"] == {"modalities": ["text"]}
    assert dialect.client_to_ga(dialect.client_to_beta(event), RATE_HZ) == event


@pytest.mark.parametrize(
    ("ga", "beta"),
    [
        ("response.output_text.delta", "response.text.delta"),
        ("response.output_text.done", "response.text.done"),
        ("response.output_audio.delta", "response.audio.delta"),
        ("response.output_audio.done", "response.audio.done"),
        ("response.output_audio_transcript.delta", "response.audio_transcript.delta"),
        ("response.output_audio_transcript.done", "response.audio_transcript.done"),
        ("input_audio_buffer.speech_started", "input_audio_buffer.speech_started"),
        ("error", "error"),
    ],
)
def test_names(ga: str, beta: str) -> None:
    event = {"type": ga, "delta": b"", "item_id": "i"}
    assert dialect.server_to_beta(event) == event | {"type": beta}
    assert to_ga(event | {"type": beta}) == event
    assert to_ga(event) == event  # what speaks the GA is not touched


def test_what_an_assistant_says_is_named_otherwise_and_what_a_user_says_is_not() -> None:
    said = realtime.message("i", "assistant", "completed", {"type": "output_audio", "text": None})
    heard = realtime.message("u", "user", "completed", {"type": "input_audio"})
    done = {"type": "response.done", "response": {"output": [said, heard, 7]}}
    flat = dialect.server_to_beta(done)
    assert flat is not None
    assert [part["content"][0]["type"] for part in flat["response"]["output"][:2]] == [
        "audio",
        "input_audio",
    ]
    assert to_ga(flat) == done
    part = {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}}
    assert (dialect.server_to_beta(part) or {})["part"]["type"] == "text"


def test_one_event_about_an_item_in_the_beta_is_two() -> None:
    item = realtime.message("u", "user", "completed", {"type": "input_audio"})
    created = {"type": "conversation.item.created", "previous_item_id": "p", "item": item}
    added, done = dialect.Reader(RATE_HZ).read(created | {"event_id": "e"})
    assert (added["type"], added["event_id"]) == ("conversation.item.added", "e")
    assert done == created | {"type": "conversation.item.done"}
    assert dialect.server_to_beta(done) is None


def test_an_answer_is_done_when_its_output_is() -> None:
    reader = dialect.Reader(RATE_HZ)
    item = realtime.message("a", "assistant", "in_progress")
    created = {"type": "conversation.item.created", "previous_item_id": "u", "item": item}
    assert [e["type"] for e in reader.read(created)] == ["conversation.item.added"]
    ended = {"type": "response.output_item.done", "item": item | {"status": "completed"}}
    output, done = reader.read(ended)
    assert output == ended
    assert done["previous_item_id"] == "u"
    assert done["item"]["status"] == "completed"
    assert len(reader.read(ended)) == 1


def test_a_server_that_finishes_nothing_makes_nothing_grow() -> None:
    reader = dialect.Reader(RATE_HZ)
    for number in range(10 * dialect.UNFINISHED_MAX):
        item = {"id": str(number), "status": "in_progress"}
        reader.read({"type": "conversation.item.created", "item": item})
    assert len(reader._before) == dialect.UNFINISHED_MAX


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["audio", "input", "output", "format", "modalities", "content", "type", "role"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
EVENTS = st.dictionaries(
    st.sampled_from(["type", "session", "response", "item", "part", "event_id"]), VALUES
)


@settings(max_examples=200)
@given(EVENTS)
def test_nothing_that_json_can_say_makes_it_raise(event: dict[str, Any]) -> None:
    before = copy.deepcopy(event)
    dialect.client_to_beta(event)
    dialect.client_to_ga(event, RATE_HZ)
    dialect.server_to_beta(event)
    dialect.Reader(RATE_HZ).read(event)
    assert event == before
