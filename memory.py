"""Memory: what a model server that is new to a conversation has to be told of it.

A connection to a model server can be lost in mid-call. The next one begins with a server, or a
session of one, that has heard nothing. What passed through the old one is kept here, and told again
as items that a client would create.

Rules that stay true:
- It is told as text: the words that were written, and transcripts of those that were spoken. What
  has none, such as a turn that nobody transcribed, cannot be told, and is counted.
- What was not heard to its end is not told as said. A reply that was interrupted loses its words,
  as in the API; one that was lost with its connection keeps those that had come until then.
- Ids stay what they were, so that the client's own references go on to mean something.
- It is as bounded as realtime.History, the oldest being forgotten first.

Sans-IO. The events: https://developers.openai.com/api/reference/realtime
"""

from typing import Any

import realtime
from realtime import Event, History, Refused

PARTIAL_CHARACTERS_MAX = 65_536
"""Of the words of an item that is not done: more than the longest reply."""

PARTIAL_MAX = 8
"""Items that are not done. There is one, rarely two."""

_WORDS = ("response.output_audio_transcript.delta", "response.output_text.delta")
_CALLS = ("function_call", "function_call_output")
_CALL_FIELDS = ("id", "type", "call_id", "name", "arguments", "output")


class Memory:
    """The items of one conversation, as its server has shown them."""

    def __init__(self) -> None:
        self._history = History()
        self._partial: dict[str, str] = {}

    def note(self, event: Event, kind: str) -> None:
        """An event of the server, of whatever type."""
        item, item_id = event.get("item"), event.get("item_id")
        if kind in ("conversation.item.added", "conversation.item.done"):
            if isinstance(item, dict) and isinstance(item.get("id"), str):
                self._put(item)
                if kind == "conversation.item.done":
                    self._partial.pop(item["id"], None)
        elif not isinstance(item_id, str):
            return
        elif kind == "conversation.item.deleted":
            self._history.drop(item_id)
            self._partial.pop(item_id, None)
        elif kind == "conversation.item.truncated":
            self.truncated(event)
        elif kind == "conversation.item.input_audio_transcription.completed":
            self._transcribed(item_id, event.get("transcript"))
        elif kind in _WORDS and isinstance(words := event.get("delta"), str):
            words = self._partial.get(item_id, "") + words
            self._partial[item_id] = words[:PARTIAL_CHARACTERS_MAX]
            while len(self._partial) > PARTIAL_MAX:
                del self._partial[next(iter(self._partial))]

    def truncated(self, event: Event) -> None:
        """An item was cut off: told by the server, or to one that is not there."""
        item_id = event.get("item_id")
        if isinstance(item_id, str):
            self._partial.pop(item_id, None)
            self._transcribed(item_id, None)

    def interrupted(self) -> None:
        """The server has gone: what it was saying ends with the words that have come."""
        for item_id, words in self._partial.items():
            if self._history.get(item_id) is not None:
                part = {"type": "output_text", "text": words}
                self._put(realtime.message(item_id, "assistant", "incomplete", part))
        self._partial.clear()

    def tell(self) -> tuple[list[Event], int]:
        """Items to create, in their order, and how many others there are that cannot be told."""
        found = [_retold(item) for item in self._history.items()]
        told = [item for item in found if item is not None]
        return told, len(found) - len(told)

    def _transcribed(self, item_id: str, transcript: Any) -> None:
        found = self._history.get(item_id)
        if found is None or not isinstance(found.item.get("content"), list):
            return
        content = [
            part | {"transcript": transcript} if isinstance(part, dict) else part
            for part in found.item["content"]
        ]
        self._put(found.item | {"content": content})

    def _put(self, item: Event) -> None:
        try:
            self._history.put(item, self._history.last_id)
        except Refused:  # nested so deeply that it could not be told either
            pass


def _retold(item: Event) -> Event | None:
    """An item as a client would create it; None if there are no words for it."""
    kind = item.get("type")
    if kind in _CALLS:
        return {name: item[name] for name in _CALL_FIELDS if name in item}
    content = item.get("content")
    if kind != "message" or not isinstance(content, list):
        return None
    name = "output_text" if item.get("role") == "assistant" else "input_text"
    parts = []
    for part in content:
        words = part.get("text") or part.get("transcript") if isinstance(part, dict) else None
        if isinstance(words, str) and words:
            parts.append({"type": name, "text": words})
    about = {"id": item["id"], "type": "message", "role": item.get("role")}
    return {**about, "content": parts} if parts else None
