"""Dialects: the names that older model servers still use for the events of the Realtime API.

The API was published twice: as a beta, whose session is flat and whose audio is
`response.audio.delta`, and for good (GA). Open model servers speak the one or the other. Inside of
Earshot there is the second only; this is the table between the two, in both directions, since the
parrot's server can speak the beta's names as well.

Rules that stay true:
- It renames and moves fields, and knows of no state but one: which item came before which, for the
  events that the beta does not have.
- Whatever is not in the tables passes as it is: fields that are yet to be invented, and everything
  that is not of the expected kind.
- Nothing that it is given is changed; what it returns may share parts with it.
- Audio is of no concern to it: a delta passes, whether base64 or bytes.

The tables are those of https://developers.openai.com/api/docs/guides/realtime (the differences
between the beta and the GA interface). Sans-IO.
"""

from typing import Any, Literal

from realtime import Event

Name = Literal["ga", "beta"]

BETA_HEADER = ("OpenAI-Beta", "realtime=v1")
"""What the beta wants to see in the request that opens a connection."""

UNFINISHED_MAX = 16
"""Items begun and not yet done whose place is remembered. There is one, rarely two."""

_TO_BETA = {
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
    "conversation.item.added": "conversation.item.created",
}
_TO_GA = {beta: ga for ga, beta in _TO_BETA.items()}

# A field of the GA's session by its path, and the beta's flat name for it.
_FIELDS = (
    (("output_modalities",), "modalities"),
    (("max_output_tokens",), "max_response_output_tokens"),
    (("audio", "input", "format"), "input_audio_format"),
    (("audio", "input", "transcription"), "input_audio_transcription"),
    (("audio", "input", "noise_reduction"), "input_audio_noise_reduction"),
    (("audio", "input", "turn_detection"), "turn_detection"),
    (("audio", "output", "format"), "output_audio_format"),
    (("audio", "output", "voice"), "voice"),
    (("audio", "output", "speed"), "speed"),
)
# A response has fewer, and one under another name.
_RESPONSE_FIELDS = (
    (("output_modalities",), "modalities"),
    (("audio", "output", "format"), "output_audio_format"),
    (("audio", "output", "voice"), "voice"),
)
_Fields = tuple[tuple[tuple[str, ...], str], ...]

# What an assistant says, in an item or in a content part.
_PARTS_TO_BETA = {"output_text": "text", "output_audio": "audio"}
_PARTS_TO_GA = {beta: ga for ga, beta in _PARTS_TO_BETA.items()}


def of_session(session: Any) -> Name:
    """The dialect that a server's `session.created` shows. GA if it shows neither."""
    if not isinstance(session, dict) or "audio" in session or "output_modalities" in session:
        return "ga"
    flat = ("modalities", "input_audio_format", "output_audio_format", "turn_detection")
    return "beta" if any(name in session for name in flat) else "ga"


def client_to_beta(event: Event) -> Event:
    """A client's event for a server that speaks the beta."""
    return _client(event, to_beta=True, rate_hz=0)


def client_to_ga(event: Event, rate_hz: int) -> Event:
    """A client's event from one that speaks the beta; `rate_hz` is what its `pcm16` means here."""
    return _client(event, to_beta=False, rate_hz=rate_hz)


def server_to_beta(event: Event) -> Event | None:
    """A server's event for a client that speaks the beta; None if the beta has no such event."""
    kind = event.get("type")
    if kind == "conversation.item.done":
        return None
    found = {**event, "type": _TO_BETA.get(kind, kind) if isinstance(kind, str) else kind}
    if isinstance(event.get("session"), dict):
        found["session"] = _flat(event["session"], _FIELDS)
        found["session"].pop("type", None)
    return _parts(found, _flat_response, _PARTS_TO_BETA)


class Reader:
    """The events of a server that speaks the beta, one after another, as the GA has them.

    GA events pass unchanged, so that nothing has to be known before the first event.
    """

    def __init__(self, rate_hz: int) -> None:
        """`rate_hz` is what the server's `pcm16` means."""
        self._rate_hz = rate_hz
        self._before: dict[str, Any] = {}

    def read(self, event: Event) -> list[Event]:
        """One event as the GA has it: mostly one, two where the beta has one for both."""
        kind = event.get("type")
        found = {**event, "type": _TO_GA.get(kind, kind) if isinstance(kind, str) else kind}
        session = event.get("session")
        if isinstance(session, dict) and of_session(session) == "beta":
            found["session"] = _nested(session, _FIELDS, self._rate_hz)
            found["session"].setdefault("type", "realtime")
        found = _parts(found, self._nested_response, _PARTS_TO_GA)
        item = found.get("item")
        if not (isinstance(item, dict) and isinstance(item.get("id"), str)):
            return [found]
        if kind == "conversation.item.created":
            done = {**found, "type": "conversation.item.done"}
            done.pop("event_id", None)
            if item.get("status") != "in_progress":
                return [found, done]
            self._before[item["id"]] = found.get("previous_item_id")
            while len(self._before) > UNFINISHED_MAX:
                del self._before[next(iter(self._before))]
        elif kind == "response.output_item.done" and item["id"] in self._before:
            before = self._before.pop(item["id"])
            done = {"type": "conversation.item.done", "previous_item_id": before, "item": item}
            return [found, done]
        elif kind == "conversation.item.done":  # then it speaks the GA after all
            self._before.pop(item["id"], None)
        return [found]

    def _nested_response(self, response: Event) -> Event:
        return _nested(response, _RESPONSE_FIELDS, self._rate_hz)


def _flat_response(response: Event) -> Event:
    return _flat(response, _RESPONSE_FIELDS)


def _client(event: Event, *, to_beta: bool, rate_hz: int) -> Event:
    found = dict(event)
    for name, fields in (("session", _FIELDS), ("response", _RESPONSE_FIELDS)):
        value = event.get(name)
        if isinstance(value, dict):
            found[name] = _flat(value, fields) if to_beta else _nested(value, fields, rate_hz)
    session = found.get("session")
    if isinstance(session, dict):
        if to_beta:
            session.pop("type", None)  # the beta knows one type and refuses to be told
        else:
            session.setdefault("type", "realtime")
    if isinstance(event.get("item"), dict):
        found["item"] = _item(event["item"], _PARTS_TO_BETA if to_beta else _PARTS_TO_GA)
    return found


def _flat(value: Event, fields: _Fields) -> Event:
    """The beta's form of a session or response."""
    found = {name: each for name, each in value.items() if name != "audio"}
    for path, flat in fields:
        at: Any = value
        for name in path:
            at = at.get(name, _ABSENT) if isinstance(at, dict) else _ABSENT
        if at is _ABSENT:
            continue
        if len(path) == 1:
            del found[path[0]]
        found[flat] = _to_beta(flat, at)
    return found


def _nested(value: Event, fields: _Fields, rate_hz: int) -> Event:
    """The GA's form of a session or response."""
    names = {flat for _, flat in fields}
    found = {name: each for name, each in value.items() if name not in names}
    for path, flat in fields:
        if flat not in value:
            continue
        at = found
        for name in path[:-1]:
            inner = at.get(name)
            at[name] = inner = dict(inner) if isinstance(inner, dict) else {}
            at = inner
        at[path[-1]] = _to_ga(flat, value[flat], rate_hz)
    return found


_ABSENT = object()


def _to_beta(flat: str, value: Any) -> Any:
    if flat == "modalities" and isinstance(value, list) and "audio" in value:
        return ["audio", "text"]  # the beta has no audio without its transcript
    if flat.endswith("_audio_format") and isinstance(value, dict):
        return _FORMATS.get(str(value.get("type")), value)
    return value


def _to_ga(flat: str, value: Any, rate_hz: int) -> Any:
    if flat == "modalities" and isinstance(value, list):
        return ["audio"] if "audio" in value else value
    if flat.endswith("_audio_format") and isinstance(value, str):
        name = next((ga for ga, beta in _FORMATS.items() if beta == value), None)
        if name == "audio/pcm":
            return {"type": name, "rate": rate_hz}
        return {"type": name} if name else value
    return value


_FORMATS = {"audio/pcm": "pcm16", "audio/pcmu": "g711_ulaw", "audio/pcma": "g711_alaw"}


def _parts(event: Event, of_response: Any, names: dict[str, str]) -> Event:
    """A server's event with its response, item and content part in the other dialect.

    `event` is a copy already; what lies in it is not.
    """
    response, part = event.get("response"), event.get("part")
    if isinstance(response, dict):
        response = event["response"] = of_response(response)
        output = response.get("output")
        if isinstance(output, list):
            response["output"] = [
                _item(each, names) if isinstance(each, dict) else each for each in output
            ]
    if isinstance(event.get("item"), dict):
        event["item"] = _item(event["item"], names)
    if isinstance(part, dict):
        event["part"] = _part(part, names)
    return event


def _item(item: Event, names: dict[str, str]) -> Event:
    """An item with the assistant's content renamed; a user's is the same in both."""
    content = item.get("content")
    if item.get("role") != "assistant" or not isinstance(content, list):
        return item
    return item | {"content": [_part(p, names) if isinstance(p, dict) else p for p in content]}


def _part(part: Event, names: dict[str, str]) -> Event:
    kind = part.get("type")
    return part | {"type": names.get(kind, kind)} if isinstance(kind, str) else part
