"""The conversation of one call: between the data channel, the play-out and the backend.

    client ◀── events ──▶ Conversation ◀── events ──▶ backend
                               │  ▲
                     PCM, flush ▼  │ started, drained
                             play-out ──▶ RTP

A backend makes audio faster than it is heard, and knows nothing of what was heard. A client hears,
and sees on its channel events without audio. What lies in between is here.

What it owns: the channel's order of events, the `output_audio_buffer.*` events, interruption, and
what there is to answer about items that have passed through.

Rules that stay true:
- `session.created` is the first message on the channel; what comes before it opens waits, bounded.
- Audio never crosses the channel, nor do a session's secrets.
- A response that sounds goes: output_audio_buffer.started with its first packet, before its
  transcript; then, after response.done and the last millisecond, .stopped, or .cleared where it is
  interrupted. A started is followed by one of these, and a client's clear always by a cleared.
- After a flush not one more sample of that response is played, whatever the backend still sends,
  and the backend is told how many milliseconds were: a model must not believe it was heard out.
- Any bytes from a client end in an event for the backend, an answer, or one `error` with the
  client's event_id; the session stays open. Backends are held to no better manners.

After each call the owner sends what `playout.send` has, calls `playout_events`, and then drains
`to_backend` and `to_client`. Sans-IO. The events: https://developers.openai.com/api/reference/realtime
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson

import audio
import realtime
from realtime import Event, Refused

EVENT_ID_CHARACTERS_MAX = 512
"""Of a client's event_id, as in the API: it is echoed in errors."""

SERVER_MESSAGE_OCTETS_MAX = 262_144
"""Of one event to the client; a browser closes a channel that brings more than it announced."""

BACKLOG_OCTETS_MAX = 262_144
"""Messages that wait for the channel to open, the oldest dropped first: a greeting, of a client
that may never open one."""

HOLD_S_MAX = 0.1
"""How long events wait for the first packet of their audio, so that .started comes before them. It
leaves in the same moment; later than this something is wrong and the order matters less."""

SPEECHES_MAX = 32
"""Responses whose audio is on its way; there is one, rarely two."""

_SECRETS = frozenset(("authorization", "headers", "client_secret", "api_key"))


@dataclass(slots=True)
class _Speech:
    """The way of one response through the play-out."""

    items: set[str] = field(default_factory=set)
    """Written and neither drained nor flushed."""
    started: bool = False
    """The client has been told."""
    done: bool = False
    """response.done has been passed on."""
    cut: bool = False
    """Flushed, or too much: what audio still comes is dropped."""
    cleared: bool = False
    """The client has been told that it ends here, and hears of no stop."""


class Conversation:
    """One call's events. Every method takes monotonic seconds as `now`."""

    def __init__(self, session_id: str, playout: audio.Playout, now: float) -> None:
        """`session_id` becomes the session's id for the client; event ids are derived from it."""
        self._session_id = session_id
        self._tag = hashlib.blake2s(session_id.encode(), digest_size=6).hexdigest()
        self._events = 0
        self._playout = playout
        self._closed = False
        self._opened = False
        self._created: str | None = None  # session.created, until the channel takes it
        self._live = False  # session.created is out
        self._backlog: deque[str] = deque()
        self._backlog_octets = 0
        self._held: list[str] | None = None
        self._held_until = now
        self._out: list[str] = []
        self._to_backend: list[Event] = []
        self._interruptible = True
        self._active: str | None = None  # response that the backend is making
        self._last_sounding: str | None = None
        self._speeches: dict[str, _Speech] = {}
        self._history = realtime.History()
        self.expires_at: int | None = None
        """When the call ends at the latest, in seconds since 1970; stands in the session object."""
        self._shown: Event = {}  # the session as the client last saw it

    # --- verbs -------------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """The data channel is open."""
        self._opened = True
        self._go_live()

    def closed(self) -> None:
        """The session has ended: nothing more comes out, and what was remembered is freed."""
        self._closed = True
        self._out, self._to_backend, self._held = [], [], None
        self._backlog.clear()
        self._speeches.clear()
        self._history = realtime.History()

    def notice(self, expires_at: int) -> None:
        """Tell the client when the call will end: session.updated with another `expires_at`.

        The API has that field, and no event for this; some clients end at an event that they do
        not know, and others at any `error`.
        """
        self.expires_at = expires_at
        if self._shown and not self._closed:
            self._shown = self._shown | {"expires_at": expires_at}
            self._say({"type": "session.updated", "session": self._shown})

    def fault(self, code: str, message: str, kind: str = "server_error") -> None:
        """Tell the client of something that no event of its own has caused, at once."""
        if not self._closed:
            self._release()
            self._error(Refused(code, message), None, kind)

    def client_message(self, message: str | bytes, now: float) -> None:
        """A message of the data channel, text or binary: the same JSON is taken either way."""
        if self._closed:
            return
        event_id = None
        try:
            event = realtime.parsed(message)
            event_id = event.get("event_id")
            self._from_client(event, now)
        except Refused as refused:
            self._error(refused, event_id)

    def backend_event(self, event: Event, now: float) -> None:
        """An event of the backend; anything that is none is ignored."""
        kind = event.get("type")
        if self._closed or not isinstance(kind, str):
            return
        if kind == "response.output_audio.delta":
            self._sound(event, now)
        elif kind in ("session.created", "session.updated"):
            self._session(event, kind)
        elif kind == "error" and self._is_answer_to_us(event):
            pass
        elif not kind.startswith("output_audio_buffer."):  # those are made here
            self._note_item(event, kind)
            self._say(event)
            self._note_progress(event, kind, now)

    def playout_events(self, now: float) -> None:
        """Tell the client what the play-out has done. After each `playout.send`, and in time."""
        if self._closed:
            return
        for what in self._playout.events():
            response_id = self._response_of(what.item)
            if response_id is None:
                continue
            speech = self._speeches[response_id]
            if isinstance(what, audio.Started):
                if not speech.started:
                    speech.started = True
                    self._last_sounding = response_id
                    self._announce("started", response_id)
                self._release()
            else:
                self._played(what.item, what.ms)
                speech.items.discard(what.item)
                self._stop_if_over(response_id, speech)
        if self._held is not None and now >= self._held_until:
            self._release()

    def to_client(self) -> list[str]:
        """JSON messages for the channel, in order. None before it is open. Drains."""
        out, self._out = self._out, []
        return out

    def to_backend(self) -> list[Event]:
        """Events for the backend, in order. Drains."""
        out, self._to_backend = self._to_backend, []
        return out

    # --- from the client ---------------------------------------------------------------------

    def _from_client(self, event: Event, now: float) -> None:
        kind = realtime.field(event, "type", str)
        if kind not in realtime.CLIENT_EVENTS:
            raise Refused("invalid_value", f"Unknown event type {kind[:80]!r}.", "type")
        if len(realtime.field(event, "event_id", str, "")) > EVENT_ID_CHARACTERS_MAX:
            limit = f"An event_id has at most {EVENT_ID_CHARACTERS_MAX} characters."
            raise Refused("invalid_value", limit, "event_id")
        if kind == "output_audio_buffer.clear":
            self._clear(now)
        elif kind == "conversation.item.retrieve":
            self._retrieve(event)
        else:
            if kind == "conversation.item.truncate":
                self._truncate_to_heard(event)
            elif kind == "session.update":
                _drop_formats(event)
            self._to_backend.append(event)

    def _clear(self, now: float) -> None:
        """The client interrupts: silence at once, and an end to what is still being made."""
        if self._active is not None:
            cancel = {"type": "response.cancel", "response_id": self._active}
            self._to_backend.append({"event_id": self._next_id("own"), **cancel})
        if not self._flush(now):
            # Nothing was sounding. A client that waits for an answer gets one all the same.
            self._announce("cleared", self._active or self._last_sounding)

    def _retrieve(self, event: Event) -> None:
        item_id = realtime.field(event, "item_id", str)
        found = self._history.get(item_id)
        if found is None:
            wrong = f"No item {item_id[:80]!r} has passed through this conversation lately."
            raise Refused("item_retrieve_invalid_item_id", wrong, "item_id")
        self._say({"type": "conversation.item.retrieved", "item": found.item})

    def _truncate_to_heard(self, event: Event) -> None:
        """Clients do not know how much of an item was sent, and never more was heard than that."""
        item_id = realtime.field(event, "item_id", str)
        end_ms = realtime.field(event, "audio_end_ms", int)
        if self._response_of(item_id) is not None:
            event["audio_end_ms"] = min(end_ms, self._playout.played_ms(item_id))
        elif (found := self._history.get(item_id)) is not None:
            event["audio_end_ms"] = min(end_ms, found.audio_ms)

    # --- from the backend --------------------------------------------------------------------

    def _sound(self, event: Event, now: float) -> None:
        """Audio of a response: to the play-out, unless the response has been cut off."""
        item, response_id, pcm = (event.get(k) for k in ("item_id", "response_id", "delta"))
        if not (isinstance(item, str) and isinstance(response_id, str) and isinstance(pcm, bytes)):
            return
        speech = self._speech(response_id)
        if speech.cut or not pcm:
            return
        if self._held is None and not any(other.items for other in self._speeches.values()):
            # Silent so far, so the first packet leaves now: what follows waits for its .started.
            self._held, self._held_until = [], now + HOLD_S_MAX
        speech.items.add(item)
        if not self._playout.write(item, pcm, now):
            speech.cut = True
            wrong = "The response has more audio than can be queued; its end is not played."
            self._error(Refused("audio_overflow", wrong), None, "server_error")

    def _session(self, event: Event, kind: str) -> None:
        session = event.get("session")
        session = _without_secrets(session) if isinstance(session, dict) else {}
        session["id"] = self._session_id
        if self.expires_at is not None:
            session["expires_at"] = self.expires_at
        self._shown = session
        event = event | {"session": session}
        detection = _at(session, "audio", "input", "turn_detection")
        if isinstance(detection, dict):
            self._interruptible = detection.get("interrupt_response") is not False
        if kind == "session.created" and not self._live:
            self._created = self._message(event)
            self._go_live()
        else:
            self._say(event)

    def _note_item(self, event: Event, kind: str) -> None:
        """Remember items as they pass, so that `conversation.item.retrieve` can be answered."""
        item, item_id = event.get("item"), event.get("item_id")
        if kind in ("conversation.item.added", "conversation.item.done"):
            if isinstance(item, dict) and isinstance(item.get("id"), str):
                self._remember(item)
        elif not isinstance(item_id, str) or (found := self._history.get(item_id)) is None:
            return
        elif kind == "conversation.item.deleted":
            self._history.drop(item_id)
        elif kind == "conversation.item.truncated":
            # The API deletes the transcript with it: the rest of the words was not heard.
            self._remember(_transcribed(found.item, event, None))
        elif kind == "conversation.item.input_audio_transcription.completed":
            self._remember(_transcribed(found.item, event, event.get("transcript")))

    def _note_progress(self, event: Event, kind: str, now: float) -> None:
        """What an event that has just been passed on means for the play-out."""
        if kind == "input_audio_buffer.speech_started":
            if self._interruptible:
                self._flush(now)
        elif kind == "response.output_audio.done":
            if isinstance(item := event.get("item_id"), str):
                self._playout.finish(item, now)
        elif kind in ("response.created", "response.done"):
            response_id = _at(event, "response", "id")
            if not isinstance(response_id, str):
                return
            if kind == "response.created":
                self._active = response_id
            elif response_id == self._active:
                self._active = None
            speech = self._speeches.get(response_id)
            if speech is not None and kind == "response.done":
                speech.done = True
                for item in speech.items:  # a response that failed may lack the items' own ends
                    self._playout.finish(item, now)
                self._stop_if_over(response_id, speech)

    def _is_answer_to_us(self, event: Event) -> bool:
        """True for an error about an event that no client sent: truncation is not for all."""
        event_id = _at(event, "error", "event_id")
        return isinstance(event_id, str) and event_id.startswith(f"own_{self._tag}")

    # --- play-out ----------------------------------------------------------------------------

    def _flush(self, now: float) -> bool:
        """Silence at once. True if there was anything to silence and the client was told."""
        self.playout_events(now)  # what has been sent until now has been heard
        told = False
        if self._active is not None:
            self._speech(self._active).cut = True
        for item, ms in self._playout.flush(now):
            response_id = self._response_of(item)
            self._played(item, ms)
            if response_id is None:
                continue
            speech = self._speeches[response_id]
            speech.items.discard(item)
            speech.cut = True
            if speech.started and not speech.cleared:
                speech.cleared = told = True
                self._announce("cleared", response_id)
            if speech.done and not speech.items:
                del self._speeches[response_id]
            truncate = {"item_id": item, "content_index": 0, "audio_end_ms": ms}
            self._to_backend.append(
                {"event_id": self._next_id("own"), "type": "conversation.item.truncate", **truncate}
            )
        self._release()
        return told

    def _stop_if_over(self, response_id: str, speech: _Speech) -> None:
        if speech.done and not speech.items:
            del self._speeches[response_id]
            if speech.started and not speech.cleared:
                self._announce("stopped", response_id)

    def _speech(self, response_id: str) -> _Speech:
        speech = self._speeches.get(response_id)
        if speech is None:
            while len(self._speeches) >= SPEECHES_MAX:
                del self._speeches[next(iter(self._speeches))]
            speech = self._speeches[response_id] = _Speech()
        return speech

    def _played(self, item: str, ms: int) -> None:
        found = self._history.get(item)
        if found is not None:
            found.audio_ms = ms

    def _response_of(self, item: str) -> str | None:
        return next((name for name, s in self._speeches.items() if item in s.items), None)

    # --- to the client -----------------------------------------------------------------------

    def _announce(self, what: str, response_id: str | None) -> None:
        event = {"type": f"output_audio_buffer.{what}", "response_id": response_id}
        message = self._message(event)
        if what == "started":
            self._deliver(message)  # ahead of what is held for it
        else:
            self._push(message)

    def _error(
        self, refused: Refused, event_id: object, kind: str = "invalid_request_error"
    ) -> None:
        self._say({"type": "error", "error": realtime.error(refused, event_id, kind)})

    def _say(self, event: Event) -> None:
        self._push(self._message(event))

    def _message(self, event: Event) -> str:
        """An event as JSON. One that cannot be sent becomes an `error`."""
        event_id = event.get("event_id")
        if not isinstance(event_id, str):
            event_id = self._next_id("event")
        try:
            message = orjson.dumps(event | {"event_id": event_id})
        except TypeError:
            message = b""
        if 0 < len(message) <= SERVER_MESSAGE_OCTETS_MAX:
            return message.decode()
        wrong = Refused("server_event_lost", "An event of the backend could not be passed on.")
        lost = {"type": "error", "error": realtime.error(wrong, None, "server_error")}
        return orjson.dumps(lost | {"event_id": self._next_id("event")}).decode()

    def _push(self, message: str) -> None:
        if self._held is not None:
            self._held.append(message)
        else:
            self._deliver(message)

    def _release(self) -> None:
        held, self._held = self._held, None
        for message in held or ():
            self._deliver(message)

    def _deliver(self, message: str) -> None:
        if self._live:
            self._out.append(message)
            return
        self._backlog.append(message)
        self._backlog_octets += len(message)
        while self._backlog_octets > BACKLOG_OCTETS_MAX:
            self._backlog_octets -= len(self._backlog.popleft())

    def _go_live(self) -> None:
        if self._closed or not self._opened or self._created is None:
            return
        self._live = True
        self._out += [self._created, *self._backlog]
        self._created = None
        self._backlog.clear()

    def _remember(self, item: Event) -> None:
        try:
            self._history.put(item, self._history.last_id)
        except Refused:  # such an item cannot be shown to the client either
            pass

    def _next_id(self, kind: str) -> str:
        self._events += 1
        return f"{kind}_{self._tag}{self._events:04d}"


# --- objects of others ---------------------------------------------------------------------------


def _at(value: Any, *path: str) -> Any:
    """What lies at a path of objects, None if the path ends before."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _drop_formats(event: Event) -> None:
    """The audio's format is agreed upon by transceiver and backend; a client's would be Opus."""
    for way in ("input", "output"):
        side = _at(event, "session", "audio", way)
        if isinstance(side, dict):
            side.pop("format", None)


def _without_secrets(session: Event) -> Event:
    """A session as a client may see it: without what lets the backend into other services."""
    shown = {name: value for name, value in session.items() if name not in _SECRETS}
    tools = shown.get("tools")
    if isinstance(tools, list):
        shown["tools"] = [
            {name: value for name, value in tool.items() if name not in _SECRETS}
            if isinstance(tool, dict)
            else tool
            for tool in tools
        ]
    return shown


def _transcribed(item: Event, event: Event, transcript: object) -> Event:
    """An item with another transcript in the content part that an event names."""
    content, index = item.get("content"), event.get("content_index")
    if not isinstance(content, list) or not isinstance(index, int):
        return item
    return item | {
        "content": [
            part | {"transcript": transcript} if i == index and isinstance(part, dict) else part
            for i, part in enumerate(content)
        ]
    }
