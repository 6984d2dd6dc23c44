"""What of a conversation outlives its call: what is kept, within which bounds, and for whom."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import realtime
import records
import ufrag

RING = ufrag.Keyring.parse(f"0 {'ab' * 32}\n1 {'cd' * 32}\n")
SEALER = records.sealer(RING)
SALT = bytes(range(16))
CALL, OTHER = "rtc_AAAAAAAAAAAAAAAAAAAAAAA", "rtc_AAAAAAAAAAAAAAAAAAAAAAg"
RECORD = records.Record(
    {"instructions": "Be kind.", "model": "m"},
    ({"id": "u", "type": "message", "role": "user", "content": []},),
    "one",
    "realtime",
)


def message(item_id: str, role: str, **part: Any) -> dict[str, Any]:
    return realtime.message(item_id, role, "completed", part)


def item(kind: str, found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    kind = f"conversation.item.{kind}"
    return {"type": kind, "item": found}, kind


def delta(item_id: str, words: str) -> tuple[dict[str, Any], str]:
    kind = "response.output_audio_transcript.delta"
    return {"type": kind, "item_id": item_id, "delta": words}, kind


def words(record: records.Record) -> dict[str, tuple[str, str | None]]:
    """Id to words and status."""
    return {i["id"]: (i["content"][0]["text"], i.get("status")) for i in record.items}


# --- what is kept --------------------------------------------------------------------------------


def test_what_was_said_and_what_was_heard_of_the_reply() -> None:
    chronicle = records.Chronicle()
    memory = chronicle.memory
    memory.note(*item("done", message("u1", "user", type="input_audio", transcript="Hello?")))
    memory.note(*item("done", message("a1", "assistant", type="output_audio", transcript="Hi!")))
    memory.note(*item("done", message("u2", "user", type="input_audio", transcript="Go on.")))
    memory.note(*item("added", message("a2", "assistant")))
    memory.note(*delta("a2", "One two three "))
    memory.note(*delta("a2", "four five six"))
    assert words(chronicle.record({"a2": 0.5}, "", "realtime")) == {
        "u1": ("Hello?", None),
        "a1": ("Hi!", None),
        "u2": ("Go on.", None),
        "a2": ("One two three", "incomplete"),
    }
    # Made to its end, it is heard to its end only when the last of it has been sent.
    memory.note(
        *item("done", message("a2", "assistant", type="output_audio", transcript="One two three"))
    )
    assert words(chronicle.record({"a2": 0.7}, "", ""))["a2"] == ("One two", "incomplete")
    assert words(chronicle.record({}, "", ""))["a2"] == ("One two three", None)


def test_of_what_was_not_heard_at_all_nothing_is_kept() -> None:
    chronicle = records.Chronicle()
    chronicle.memory.note(
        *item("done", message("a", "assistant", type="output_audio", transcript="Hello there!"))
    )
    assert chronicle.record({"a": 0.0}, "", "realtime").items == ()
    assert chronicle.record({"a": 0.2}, "", "realtime").items == ()  # within the first word


def test_a_conversation_that_goes_on_begins_with_what_was_kept() -> None:
    kept = {"id": "a", "type": "message", "role": "assistant", "status": "incomplete"}
    kept["content"] = [{"type": "output_text", "text": "Hi!"}]
    call = {"id": "f", "type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"}
    chronicle = records.Chronicle(None, [kept, call])
    first, second = chronicle.begins_with()
    assert (first["status"], second["status"]) == ("incomplete", "completed")
    assert chronicle.begins_with() == []
    assert chronicle.memory.get("a") == kept
    told, untold = chronicle.memory.tell()
    assert ([each["id"] for each in told], untold) == (["a", "f"], 0)
    assert "status" not in told[0]
    assert chronicle.record({}, "", "realtime").items[1] == call


def test_settings_are_kept_once_nobody_refuses_them() -> None:
    vad = {"type": "server_vad", "silence_duration_ms": 300}
    chronicle = records.Chronicle({"model": "m", "audio": {"input": {"turn_detection": vad}}})
    chronicle.asked("one", {"instructions": "Be kind."})
    chronicle.asked("two", {"instructions": "Be rude."})
    chronicle.asked(
        "three", {"audio": {"input": {"turn_detection": {"response_delay_ms": 200}}}, "tools": []}
    )
    before = chronicle.revision
    assert "instructions" not in chronicle.session
    chronicle.confirmed()
    chronicle.turned_down("two")
    chronicle.confirmed()
    assert chronicle.revision != before
    assert chronicle.record({}, "", "realtime").session == {
        "model": "m",
        "instructions": "Be kind.",
        "tools": [],
        "audio": {"input": {"turn_detection": vad | {"response_delay_ms": 200}}},
    }


def test_every_change_is_seen() -> None:
    chronicle = records.Chronicle()
    seen = [chronicle.revision]
    for event, kind in (
        item("added", message("a", "assistant")),
        delta("a", "Hello "),
        item("done", message("a", "assistant", type="output_audio", transcript="Hello ")),
        ({"item_id": "a"}, "conversation.item.truncated"),
        ({"item_id": "a"}, "conversation.item.deleted"),
    ):
        chronicle.memory.note(event, kind)
        seen.append(chronicle.revision)
    assert len(set(seen)) == len(seen)
    chronicle.memory.note({}, "response.created")
    assert chronicle.revision == seen[-1]


# --- bounds --------------------------------------------------------------------------------------


def test_the_oldest_items_go_first_and_no_answer_stays_without_its_call() -> None:
    long = "x" * (records.ITEMS_OCTETS_MAX // 2 - 500)
    items: list[dict[str, Any]] = [
        {"id": "old", "type": "message", "role": "user", "content": [{"text": long}]},
        {"id": "f", "type": "function_call", "call_id": "c", "name": "n", "arguments": long},
        {"id": "o", "type": "function_call_output", "call_id": "c", "output": "1"},
        {"id": "new", "type": "message", "role": "user", "content": [{"text": long}]},
    ]
    assert [each["id"] for each in records.bounded(items)] == ["f", "o", "new"]
    items[-1]["content"][0]["text"] += "x" * 1000
    assert [each["id"] for each in records.bounded(items)] == ["new"]
    items[-1]["content"][0]["text"] *= 2
    assert records.bounded(items) == ()


def test_a_record_is_no_longer_than_its_bound() -> None:
    chronicle = records.Chronicle({"instructions": "x" * (realtime.SESSION_OCTETS_MAX - 50)})
    for number in range(realtime.ITEMS_MAX):
        text = {"type": "input_text", "text": "y" * 900}
        chronicle.memory.note(*item("done", message(f"item_{number:04d}", "user", **text)))
    record = chronicle.record({}, "k" * 128, "realtime")
    assert record.items[-1]["id"] == f"item_{realtime.ITEMS_MAX - 1:04d}"
    octets = records.written(record, CALL, SEALER, SALT, 0.0)
    assert 300_000 < len(octets) <= records.OCTETS_MAX
    for number in range(100):
        chronicle.asked(str(number), {f"field{number}": "z" * 1000})
    assert chronicle.record({}, "k" * 128, "realtime") == record


# --- for whom ------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_does_not_show() -> None:
    octets = records.written(RECORD, CALL, SEALER, SALT, 1000.0)
    assert records.read(octets, CALL, SEALER, 1001.0, 300.0) == RECORD
    assert b"kind" not in octets
    assert CALL.encode() not in octets
    assert CALL[4:].encode() not in records.name_of(CALL)
    assert records.name_of(CALL) != records.name_of(OTHER)


def test_nothing_is_swapped_between_calls_and_nothing_old_comes_back() -> None:
    octets = records.written(RECORD, CALL, SEALER, SALT, 1000.0)
    assert records.read(octets, OTHER, SEALER, 1001.0, 300.0) is None
    late = 1300.0 + records.SKEW_S
    assert records.read(octets, CALL, SEALER, late, 300.0) == RECORD
    assert records.read(octets, CALL, SEALER, late + 1, 300.0) is None


def test_it_is_read_with_the_keys_that_there_were_and_not_without() -> None:
    old = records.sealer(ufrag.Keyring.parse(f"0 {'ab' * 32}"))
    octets = records.written(RECORD, CALL, old, SALT, 1000.0)
    assert records.read(octets, CALL, SEALER, 1000.0, 300.0) == RECORD
    retired = records.sealer(ufrag.Keyring.parse(f"1 {'cd' * 32}"))
    assert records.read(octets, CALL, retired, 1000.0, 300.0) is None


def test_another_version_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "VERSION", 2)
    octets = records.written(RECORD, CALL, SEALER, SALT, 1000.0)
    monkeypatch.undo()
    assert records.read(octets, CALL, SEALER, 1000.0, 300.0) is None


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_any_octets_are_a_record_or_none(noise: bytes, at: int, value: int) -> None:
    assert records.read(noise, CALL, SEALER, 0.0, 300.0) is None
    octets = bytearray(records.written(RECORD, CALL, SEALER, SALT, 0.0))
    before = octets[at % len(octets)]
    octets[at % len(octets)] = value
    found = records.read(bytes(octets), CALL, SEALER, 0.0, 300.0)
    assert found == (RECORD if value == before else None)


def test_what_json_cannot_say_is_not_written() -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"in": deep}
    record = records.Record({"tools": deep}, (), "", "realtime")
    assert records.written(record, CALL, SEALER, SALT, 0.0) == b""
