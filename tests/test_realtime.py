"""The vocabulary: sessions change only where asked, messages cannot hurt, memory is bounded."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import realtime
from realtime import Refused, SemanticVad, ServerVad

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(
            st.sampled_from(["audio", "input", "output", "turn_detection", "type", "format", "x"]),
            below,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def fresh() -> dict[str, Any]:
    return realtime.session("sess_1", "parrot", 16_000)


def detecting(**fields: Any) -> dict[str, Any]:
    return {"audio": {"input": {"turn_detection": fields}}}


def test_the_default_session_is_full_and_stands_unchanged() -> None:
    session, detection = realtime.configured(fresh(), {})
    assert session == fresh()
    assert detection == ServerVad()
    assert session["audio"]["input"]["turn_detection"] == {
        "type": "server_vad",
        "threshold": 0.5,
        "prefix_padding_ms": 300,
        "silence_duration_ms": 500,
        "idle_timeout_ms": None,
        "create_response": True,
        "interrupt_response": True,
    }


def test_an_update_changes_only_what_it_names() -> None:
    first, _ = realtime.configured(
        fresh(), {"instructions": "Sing.", **detecting(type="server_vad", threshold=0.7)}
    )
    second, detection = realtime.configured(first, detecting(silence_duration_ms=250))
    assert detection == ServerVad(threshold=0.7, silence_duration_ms=250)
    assert second["instructions"] == "Sing."
    assert second["audio"]["output"] == fresh()["audio"]["output"]
    third, detection = realtime.configured(second, {"audio": {"input": {"turn_detection": None}}})
    assert detection is None
    assert third["audio"]["input"]["turn_detection"] is None


def test_another_kind_of_detection_starts_from_its_own_defaults() -> None:
    louder, _ = realtime.configured(fresh(), detecting(threshold=0.9))
    session, detection = realtime.configured(louder, detecting(type="semantic_vad"))
    assert detection == SemanticVad()
    back, detection = realtime.configured(session, detecting(type="server_vad"))
    assert detection == ServerVad()
    assert back == fresh()


def test_what_is_for_a_model_is_kept_and_whole_objects_are_replaced() -> None:
    one, _ = realtime.configured(fresh(), {"tools": [{"a": 1}], "prompt": {"id": "p", "v": 1}})
    two, _ = realtime.configured(one, {"prompt": {"id": "q"}, "something_new": 3})
    assert (two["tools"], two["prompt"], two["something_new"]) == ([{"a": 1}], {"id": "q"}, 3)


@pytest.mark.parametrize(
    ("update", "param"),
    [
        (detecting(threshold=1.5), "session.audio.input.turn_detection.threshold"),
        (detecting(threshold="loud"), "session.audio.input.turn_detection.threshold"),
        (detecting(silence_ms=3), "session.audio.input.turn_detection"),
        (detecting(type="psychic"), "session.audio.input.turn_detection.type"),
        (detecting(idle_timeout_ms=1), "session.audio.input.turn_detection.idle_timeout_ms"),
        (detecting(create_response=1), "session.audio.input.turn_detection.create_response"),
        ({"audio": {"input": {"turn_detection": 3}}}, "session.audio.input.turn_detection"),
        ({"audio": {"input": 3}}, "session.audio.input"),
        ({"audio": None}, "session.audio"),
        ({"type": "transcription"}, "session.type"),
        ({"output_modalities": ["smell"]}, "session.output_modalities[0]"),
        ({"output_modalities": []}, "session.output_modalities"),
        (
            {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 24_000}}}},
            "session.audio.output.format",
        ),
        ({"instructions": "x" * realtime.SESSION_OCTETS_MAX}, "session"),
    ],
)
def test_an_error_names_the_field(update: dict[str, Any], param: str) -> None:
    before = fresh()
    with pytest.raises(Refused) as refused:
        realtime.configured(before, update)
    assert refused.value.param == param
    assert refused.value.message.endswith(".")
    assert before == fresh()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["audio", "type", "id", "tools", "x"]), JSON))
def test_any_update_is_taken_or_refused(update: dict[str, Any]) -> None:
    try:
        session, _ = realtime.configured(fresh(), update)
    except Refused:
        return
    assert fresh().keys() <= session.keys()
    assert session["id"] == "sess_1"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"", "This is not JSON"),
        (b"\xff", "This is not JSON"),
        ("\ud800", "This is not JSON"),
        ("[]", "An event is an object."),
        (b"[" * 5_000, "This is not JSON"),
        ('{"a":' * 65 + "1" + "}" * 65, "Nested more than 64 levels deep."),
        (b" " * (realtime.CLIENT_MESSAGE_OCTETS_MAX + 1), "A message has at most 262144 octets."),
    ],
)
def test_messages_that_are_no_event(message: str | bytes, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        realtime.parsed(message)


def test_text_and_binary_messages_are_the_same() -> None:
    event = {"type": "response.create", "x": [{"y": "ü"}]}
    assert realtime.parsed(orjson.dumps(event)) == event
    assert realtime.parsed(orjson.dumps(event).decode()) == event
    assert realtime.parsed('{"a":' * 64 + "1" + "}" * 64)


def test_fields_of_the_wrong_kind_are_refused_by_name() -> None:
    assert realtime.field({"a": 3}, "a", int) == 3
    assert realtime.field({"a": None}, "a", int, 7) == 7
    for event, kind, sentence in (
        ({}, str, "'a' is missing."),
        ({"a": 1}, str, "'a' is not a string."),
        ({"a": True}, int, "'a' is not an integer."),
        ({"a": []}, dict, "'a' is not an object."),
        ({"a": {}}, list, "'a' is not an array."),
    ):
        with pytest.raises(Refused) as refused:
            realtime.field(event, "a", kind)
        assert (refused.value.message, refused.value.param) == (sentence, "a")


def remembered(history: realtime.History, ids: str) -> str:
    return "".join(name for name in ids if history.get(name) is not None)


def test_items_have_an_order_and_the_oldest_is_forgotten() -> None:
    history = realtime.History()
    for name in "abc":
        history.put({"id": name}, history.last_id)
    history.put({"id": "d"}, "a")  # behind a
    history.put({"id": "e"})  # in front of all
    history.put({"id": "b", "more": 1})  # in its old place
    assert history.last_id == "c"
    padding = "x" * (realtime.HISTORY_OCTETS_MAX - 80)
    order = []
    for _ in range(5):
        before = remembered(history, "abcde")
        history.put({"id": "f", "x": padding}, history.last_id)
        padding += "x" * 11
        order += [name for name in before if history.get(name) is None]
    assert "".join(order)[:3] == "ead"


def test_memory_is_bounded_in_items_and_octets() -> None:
    history = realtime.History()
    for i in range(1_000):
        history.put({"id": f"{i}"}, history.last_id)
    assert sum(history.get(f"{i}") is not None for i in range(1_000)) == realtime.ITEMS_MAX
    history.put({"id": "large", "x": "x" * realtime.HISTORY_OCTETS_MAX}, history.last_id)
    assert history.last_id is None
    history.put({"id": "small"})
    assert history.last_id == "small"
    history.drop("small")
    history.drop("small")
    assert history.last_id is None


def test_an_item_that_json_cannot_say_is_refused() -> None:
    with pytest.raises(Refused):
        realtime.History().put({"id": "a", "x": {1, 2}})
