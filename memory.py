"""Memory: what a model server that is new to a conversation has to be told of it.

A connection to a model server can be lost in mid-call, and so can the process that has the call.
What comes next begins with a server, or a session of one, that has heard nothing. What passed
through the old one is kept here, and told again as items that a client would create.

Rules that stay true:
- It is told as text: the words that were written, and transcripts of those that were spoken. What
  has none, such as a turn that nobody transcribed, cannot be told, and is counted.
- What was not heard to its end is not told as said. A reply that was interrupted loses its words,
  as in the API; one that was lost with its connection keeps those that had come until then, and
  one that was lost with its call, those that had been heard (`kept`).
- Ids stay what they were, so that the client's own references go on to mean something.
- It is as bounded as realtime.History, the oldest being forgotten first.

Sans-IO. The events: https://developers.openai.com/api/reference/realtime
"""

from collections.abc import Mapping, Sequence
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

    def __init__(self, items: Sequence[Event] = ()) -> None:
        """`items` are those of the conversation that this one goes on with, if it does."""
        self.revision = 0
        """Another one after each change."""
        self._history = History()
        self._partial: dict[str, str] = {}
        for item in items:
            self._put(item)

    def get(self, item_id: str) -> Event | None:
        """The item with that id as it was shown last; None if there is none, or not any more."""
        found = self._history.get(item_id)
        return None if found is None else found.item

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
            self.revision += 1
            self._history.drop(item_id)
            self._partial.pop(item_id, None)
        elif kind == "conversation.item.truncated":
            self.truncated(event)
        elif kind == "conversation.item.input_audio_transcription.completed":
            self._transcribed(item_id, event, event.get("transcript"))
        elif kind in _WORDS and isinstance(words := event.get("delta"), str):
            self.revision += 1
            words = self._partial.get(item_id, "") + words
            self._partial[item_id] = words[:PARTIAL_CHARACTERS_MAX]
            while len(self._partial) > PARTIAL_MAX:
                del self._partial[next(iter(self._partial))]

    def truncated(self, event: Event) -> None:
        """An item was cut off: told by the server, or to one that is not there."""
        item_id = event.get("item_id")
        if isinstance(item_id, str):
            self._partial.pop(item_id, None)
            self._transcribed(item_id, event, None)

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

    def kept(self, shares: Mapping[str, float]) -> list[Event]:
        """What is left of it if the call ends now: items to create, in their order.

        `shares` has the items of which not all has been heard, and how much has, 0 to 1. How far
        into the words that was is nobody's to know: they are taken to be spoken evenly. Such an
        item, and one that is not done, is `incomplete`.
        """
        kept = []
        for item in self._history.items():
            item_id = item["id"]
            words = self._partial.get(item_id)
            part = {"text": words}
            said = item if words is None else realtime.message(item_id, "assistant", "", part)
            told = _retold(said)
            if told is not None and (words is not None or item_id in shares):
                told = _cut(told, shares.get(item_id, 1.0))
            if told is not None:
                kept.append(told)
        return kept

    def _transcribed(self, item_id: str, event: Event, transcript: Any) -> None:
        """Another transcript for the content part that an event names, for all if it does not."""
        found, index = self.get(item_id), event.get("content_index")
        if found is None or not isinstance(found.get("content"), list):
            return
        content = [
            part | {"transcript": transcript}
            if isinstance(part, dict) and (at == index or not isinstance(index, int))
            else part
            for at, part in enumerate(found["content"])
        ]
        self._put(found | {"content": content})

    def _put(self, item: Event) -> None:
        self.revision += 1
        try:
            self._history.put(item, self._history.last_id)
        except Refused:  # nested so deeply that it could not be told either
            pass


def _retold(item: Event) -> Event | None:
    """An item as a client would create it; None if there are no words for it."""
    kind = item.get("type")
    if kind in _CALLS:
        if item.get("status") == "in_progress":  # what it is called with is still to come
            return None
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


def _cut(told: Event, share: float) -> Event | None:
    """As much of a message's words as `share` says, in whole ones; None if there is none."""
    parts = []
    for part in told.get("content", ()):
        words = part["text"]
        end = round(len(words) * min(1.0, max(0.0, share)))
        if end < len(words) and not words[end].isspace():
            end = words.rfind(" ", 0, end)  # -1 for none: then the word that is cut is the first
        words = words[: max(0, end)].rstrip()
        if words:
            parts.append(part | {"text": words})
    return {**told, "content": parts, "status": "incomplete"} if parts else None
