"""The vocabulary of the Realtime API: session settings, turn detection, refusals, messages.

What it owns: the shapes that more than one module speaks of, so that each is spelled once. The API
is described at https://developers.openai.com/api/reference/realtime.

Rules that stay true:
- An effective session is full: every field of the API that Earshot knows stands in it, set or not.
  `configured` changes only what an update names, and refuses an update as a whole or not at all.
- Validation names the field that is wrong by its path, in `param`, as clients show it.
- What is not understood here (tools, instructions, voices, fields yet to be invented) is kept and
  shown, since it is for a model to understand. Within turn detection an unknown field is refused:
  there it is a typing error that would change how a conversation feels.

- What a conversation remembers is bounded, in items and in octets; the oldest is forgotten first.

Sans-IO.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from msgspec import Meta

Event = dict[str, Any]
"""One event, or an object in one: what JSON can say, and in this process audio in `bytes`."""

T = TypeVar("T")

SESSION_OCTETS_MAX = 262_144
"""Of a session as JSON. Instructions and tools of real agents take some ten kB; without a bound
every update could add fields."""


CLIENT_MESSAGE_OCTETS_MAX = 262_144
"""Of one message from a client; browsers send no larger ones (RFC 8841 leaves 64 kB to those that
agree on nothing). Room for an agent's instructions and tools, or for 8 s of base64 audio."""

NESTING_MAX = 64
"""Objects inside of objects. A tool's JSON schema has about ten levels; serialisers give up at 254,
and every recursive reader behind us would have to know its own limit."""

ITEMS_MAX = 256
HISTORY_OCTETS_MAX = 262_144
"""Of a conversation's items, as JSON: about an hour of talk. A model forgets sooner."""


CLIENT_EVENTS = frozenset(
    (
        "session.update",
        "input_audio_buffer.append",
        "input_audio_buffer.commit",
        "input_audio_buffer.clear",
        "output_audio_buffer.clear",
        "conversation.item.create",
        "conversation.item.retrieve",
        "conversation.item.truncate",
        "conversation.item.delete",
        "response.create",
        "response.cancel",
    )
)
"""What a client may say."""


class _Detection(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True
):
    create_response: bool = True
    """Answer by itself at the end of a turn."""
    interrupt_response: bool = True
    """Speech cancels the response that is being spoken."""


class ServerVad(_Detection, frozen=True, tag="server_vad"):
    """Turn detection by sound. Fields and defaults are the API's."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """How loud speech must be: 0 hears a whisper, 1 only a shout."""
    prefix_padding_ms: Annotated[int, Meta(ge=0, le=5_000)] = 300
    """Audio before the first speech that belongs to the turn."""
    silence_duration_ms: Annotated[int, Meta(ge=20, le=10_000)] = 500
    """Silence that ends a turn."""
    idle_timeout_ms: Annotated[int, Meta(ge=5_000, le=30_000)] | None = None
    """Silence after a reply that counts as a turn of its own."""


class SemanticVad(_Detection, frozen=True, tag="semantic_vad"):
    """Turn detection by meaning, for models that are able to."""

    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    """How soon to take the turn. `auto` is `medium`."""


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """Earshot's own fields of turn detection, of either kind. No backend sees them: `floor.py`."""

    min_interruption_duration_ms: Annotated[int, Meta(ge=0, le=5_000)] = 0
    """So much speech, pauses not counted, before it interrupts the reply; with less, the turn is
    not answered either, if the reply is still going on when it ends. 0: any speech interrupts."""
    response_delay_ms: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """How much longer than the end of a turn to wait before it is answered. Speech that begins
    meanwhile puts the answer off to the end of that one."""


Detection = ServerVad | SemanticVad
Modalities = Annotated[list[Literal["audio", "text"]], Meta(min_length=1, max_length=2)]


class _Input(msgspec.Struct):
    format: dict[str, Any]
    transcription: dict[str, Any] | None
    turn_detection: Detection | None


class _Output(msgspec.Struct):
    format: dict[str, Any]


class _Audio(msgspec.Struct):
    input: _Input
    output: _Output


class _Session(msgspec.Struct):
    type: Literal["realtime"]
    output_modalities: Modalities
    audio: _Audio


class Refused(Exception):
    """What was asked for cannot be done: to be answered by an `error` event."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def error(refused: Refused, event_id: object, kind: str = "invalid_request_error") -> Event:
    """The `error` object of an error event. `event_id` is the client's, if it gave one."""
    return {
        "type": kind,
        "code": refused.code,
        "message": refused.message,
        "param": refused.param,
        "event_id": event_id if isinstance(event_id, str) else None,
    }


def session(session_id: str, model: str, rate_hz: int) -> Event:
    """The effective session of a client that asked for nothing in particular."""
    pcm = {"type": "audio/pcm", "rate": rate_hz}
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session_id,
        "model": model,
        "output_modalities": ["audio"],
        "instructions": "",
        "tools": [],
        "tool_choice": "auto",
        "max_output_tokens": "inf",
        "tracing": None,
        "prompt": None,
        "include": None,
        "audio": {
            "input": {
                "format": pcm,
                "transcription": None,
                "noise_reduction": None,
                "turn_detection": msgspec.to_builtins(ServerVad()),
            },
            "output": {"format": pcm, "voice": model, "speed": 1.0},
        },
    }


def configured(before: Event, update: Event) -> tuple[Event, Detection | None]:
    """The session with an update's fields in it, and its turn detection (None: push-to-talk).

    Raises Refused naming the field. `before` is not changed. Identity and audio formats stay as
    they are: the formats are agreed upon by the two ends of the audio, not by the conversation.
    """
    after = merged(before, update) | {"id": before["id"], "object": before["object"]}
    audio = checked(after, _Session, "session").audio
    for way in ("input", "output"):
        if after["audio"][way]["format"] != before["audio"][way]["format"]:
            rate_hz = before["audio"][way]["format"]["rate"]
            limit = f"The format here is audio/pcm at {rate_hz} Hz."
            raise Refused("invalid_value", limit, f"session.audio.{way}.format")
    detection = audio.input.turn_detection
    # The defaults that were filled in are part of the effective session.
    shown = None if detection is None else msgspec.to_builtins(detection)
    after = merged(after, {"audio": {"input": {"turn_detection": shown}}})
    try:
        octets = len(orjson.dumps(after))
    except TypeError:
        raise Refused("invalid_value", "It is nested too deeply.", "session") from None
    if octets > SESSION_OCTETS_MAX:
        limit = f"A session has at most {SESSION_OCTETS_MAX} octets; this would make it {octets}."
        raise Refused("session_too_large", limit, "session")
    return after, detection


_MERGED = frozenset(("audio", "input", "output", "turn_detection"))


def merged(old: Event, update: Event) -> Event:
    """`old` with the fields of `update`: objects named in _MERGED field by field, others whole.

    Another type of turn detection starts from its own defaults, not from the other's fields.
    """
    new = dict(old)
    for key, value in update.items():
        both = key in _MERGED and _same_kind(old.get(key), value)
        new[key] = merged(old[key], value) if both else value
    return new


def _same_kind(old: Any, new: Any) -> bool:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return False
    return bool(new.get("type", old.get("type")) == old.get("type"))


def checked(value: Any, shape: Any, param: str) -> Any:
    """`value` as a `shape` that msgspec knows; raises Refused with the path of what is wrong."""
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as wrong:
        # msgspec says "REASON - at `$.path`", or only the reason if it is the value itself.
        reason, _, path = str(wrong).partition(" - at `$")
        raise Refused("invalid_value", f"{reason}.", param + path.rstrip("`")) from None


def field(event: Event, name: str, kind: type[T], default: T | None = None) -> T:
    """A field of an event; raises Refused if it is of another kind, or missing without a default.

    null is the same as missing.
    """
    value = event.get(name)
    if value is None:
        if default is None:
            raise Refused("missing_required_parameter", f"{name!r} is missing.", name)
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a string", int: "an integer", dict: "an object", list: "an array"}
        raise Refused("invalid_type", f"{name!r} is not {names[kind]}.", name)
    return value


def message(item_id: str, role: str, status: str, *content: Event) -> Event:
    """A conversation item of type message."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": list(content),
    }


def parsed(message: str | bytes) -> Event:
    """A client's message as an event; raises Refused if it is none, or too large or too deep."""
    if len(message) > CLIENT_MESSAGE_OCTETS_MAX:
        limit = f"A message has at most {CLIENT_MESSAGE_OCTETS_MAX} octets."
        raise Refused("message_too_large", limit)
    try:
        event = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise Refused("invalid_json", f"This is not JSON: {error}.") from None
    if not isinstance(event, dict):
        raise Refused("invalid_json", "An event is an object.")
    level: list[Any] = [event]
    for _ in range(NESTING_MAX):
        level = [
            below
            for value in level
            for below in (value.values() if isinstance(value, dict) else value)
            if isinstance(below, dict | list)
        ]
        if not level:
            return event
    raise Refused("invalid_json", f"Nested more than {NESTING_MAX} levels deep.")


@dataclass(slots=True)
class Remembered:
    """An item of a conversation, as it was shown last."""

    item: Event
    octets: int
    audio_ms: int = 0
    """Audio that was generated for it, for the one end; that was played of it, for the other."""


class History:
    """The items of a conversation in their order, bounded."""

    def __init__(self) -> None:
        self._items: dict[str, Remembered] = {}
        self._octets = 0

    def get(self, item_id: str) -> Remembered | None:
        """The item with that id, if it is remembered."""
        return self._items.get(item_id)

    @property
    def last_id(self) -> str | None:
        """Id of the newest item."""
        return next(reversed(self._items), None)

    def items(self) -> list[Event]:
        """All that are remembered, in their order."""
        return [entry.item for entry in self._items.values()]

    def put(self, item: Event, after: str | None = None) -> None:
        """Remember an item that has an id: in place of its older state, or as a new one.

        A new one goes behind the item `after`; to the front without one. Raises Refused for an
        item that JSON cannot say.
        """
        try:
            octets = len(orjson.dumps(item))
        except TypeError:
            raise Refused("invalid_value", "It is nested too deeply.", "item") from None
        item_id = item["id"]
        known = self._items.get(item_id)
        if known is not None:
            self._octets += octets - known.octets
            known.item, known.octets = item, octets
        else:
            self._octets += octets
            self._insert(item_id, Remembered(item, octets), after)
        while self._items and (len(self._items) > ITEMS_MAX or self._octets > HISTORY_OCTETS_MAX):
            self.drop(next(iter(self._items)))

    def drop(self, item_id: str) -> None:
        """Forget an item; nothing happens if there is none."""
        gone = self._items.pop(item_id, None)
        self._octets -= gone.octets if gone is not None else 0

    def _insert(self, item_id: str, entry: Remembered, after: str | None) -> None:
        if after == self.last_id:  # nearly always, also for the first one
            self._items[item_id] = entry
            return
        entries = list(self._items.items())
        at = next((i for i, (name, _) in enumerate(entries, 1) if name == after), 0)
        entries.insert(at, (item_id, entry))
        self._items = dict(entries)
