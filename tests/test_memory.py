"""What a server that is new to a conversation is told: words, in order, and nothing unheard."""

from typing import Any

import realtime
from memory import PARTIAL_CHARACTERS_MAX, PARTIAL_MAX, Memory


def message(item_id: str, role: str, **part: Any) -> dict[str, Any]:
    return realtime.message(item_id, role, "completed", part)


def remembered(*events: tuple[str, dict[str, Any]]) -> Memory:
    memory = Memory()
    for kind, fields in events:
        memory.note({"type": kind, **fields}, kind)
    return memory


def added(item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "conversation.item.added", {"item": item}


def told(memory: Memory) -> dict[str, str]:
    """Id to words, in order."""
    items, _ = memory.tell()
    return {item["id"]: item["content"][0]["text"] for item in items}


def test_words_of_both_sides_in_their_order() -> None:
    memory = remembered(
        added(message("s", "system", type="input_text", text="Be kind.")),
        added(message("u", "user", type="input_audio", transcript=None)),
        added(message("a", "assistant", type="output_audio", transcript="")),
        (
            "conversation.item.input_audio_transcription.completed",
            {"item_id": "u", "content_index": 0, "transcript": "Hello?"},
        ),
        (
            "conversation.item.done",
            {"item": message("a", "assistant", type="output_audio", transcript="Hello!")},
        ),
    )
    items, untold = memory.tell()
    assert untold == 0
    assert items == [
        {
            "id": "s",
            "type": "message",
            "role": "system",
            "content": [{"type": "input_text", "text": "Be kind."}],
        },
        {
            "id": "u",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hello?"}],
        },
        {
            "id": "a",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello!"}],
        },
    ]


def test_what_has_no_words_is_counted() -> None:
    memory = remembered(
        added(message("u", "user", type="input_audio", transcript=None)),
        added(message("a", "assistant", type="output_text", text="Yes.")),
        added({"id": "m", "type": "mcp_list_tools"}),
    )
    assert told(memory) == {"a": "Yes."}
    assert memory.tell()[1] == 2


def test_what_was_not_heard_to_its_end_is_not_told_as_said() -> None:
    said = added(message("a", "assistant", type="output_audio", transcript="A long story"))
    by_server = remembered(said, ("conversation.item.truncated", {"item_id": "a"}))
    assert told(by_server) == {}
    by_us = remembered(said)
    by_us.truncated({"item_id": "a"})
    assert told(by_us) == {}


def test_a_reply_lost_with_its_connection_keeps_the_words_that_came() -> None:
    words = "response.output_audio_transcript.delta"
    memory = remembered(
        added(realtime.message("a", "assistant", "in_progress")),
        (words, {"item_id": "a", "delta": "I was "}),
        (words, {"item_id": "a", "delta": "about to"}),
        (words, {"item_id": "unknown", "delta": "nobody said this"}),
    )
    assert told(memory) == {}
    memory.interrupted()
    assert told(memory) == {"a": "I was about to"}


def test_deleted_is_forgotten_and_calls_are_told_whole() -> None:
    call = {"id": "c", "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    memory = remembered(
        added(call | {"status": "completed"}),
        added({"id": "o", "type": "function_call_output", "call_id": "1", "output": "42"}),
        added(message("u", "user", type="input_text", text="Forget it.")),
        ("conversation.item.deleted", {"item_id": "u"}),
    )
    items, _ = memory.tell()
    assert items[0] == call
    assert [item["id"] for item in items] == ["c", "o"]


def test_nothing_grows_without_a_bound() -> None:
    memory = Memory()
    kind = "response.output_text.delta"
    for number in range(10 * PARTIAL_MAX):
        memory.note({"item_id": str(number), "delta": "x" * PARTIAL_CHARACTERS_MAX}, kind)
        memory.note({"item_id": str(number), "delta": "x" * PARTIAL_CHARACTERS_MAX}, kind)
    assert len(memory._partial) == PARTIAL_MAX
    assert {len(words) for words in memory._partial.values()} == {PARTIAL_CHARACTERS_MAX}
    for number in range(10 * realtime.ITEMS_MAX):
        item = message(str(number), "user", type="input_text", text="x" * 1000)
        memory.note({"item": item}, "conversation.item.added")
    assert len(memory.tell()[0]) <= realtime.ITEMS_MAX


def test_objects_of_other_shapes_do_no_harm() -> None:
    for strange in (None, 7, "x", [], {}, {"id": 7}, {"id": "i"}, {"id": "i", "content": 7}):
        memory = Memory()
        for kind in (
            "conversation.item.added",
            "conversation.item.done",
            "conversation.item.deleted",
            "conversation.item.truncated",
            "conversation.item.input_audio_transcription.completed",
            "response.output_text.delta",
        ):
            memory.note({"item": strange, "item_id": strange, "delta": strange}, kind)
            memory.note({"item": strange, "item_id": "i", "delta": strange}, kind)
        memory.interrupted()
        memory.tell()


def test_a_function_call_that_is_not_done_is_not_told() -> None:
    call = {"id": "f", "type": "function_call", "call_id": "c", "name": "n", "arguments": ""}
    memory = remembered(added(call | {"status": "in_progress"}))
    assert (memory.tell(), memory.kept({})) == (([], 1), [])
    done = call | {"status": "completed", "arguments": "{}"}
    memory.note({"item": done}, "conversation.item.done")
    assert memory.kept({}) == [call | {"arguments": "{}"}]
