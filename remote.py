"""A session at a model server, over as many connections as it takes.

    client events, PCM ──▶ Remote ──▶ messages of the Realtime WebSocket
           events, PCM ◀── Remote ◀── messages of the Realtime WebSocket

What it owns: the order of a connection's beginning (session.created, our session.update, then the
rest), base64, and the server's dialect. What waits to be sent is `outbox.py`; what a server that is
new to the conversation must be told, `memory.py`; who opens connections and moves the octets,
`uplink.py`.

Rules that stay true:
- `session.created` reaches the client once, and shows the session with what came with the offer in
  it. A server that is away from the first delays it no longer than until that is known; then the
  session as it was asked for is shown, and `session.updated` follows from the server that comes.
- The audio is PCM16 at the backend's rate whatever anybody asks for.
- While the server is away its client knows: an `error` of code backend_unavailable, the response
  that was being made ends as failed, and backend_reconnected when it has been told of the
  conversation again: as text, as far as there is any, before anything new.
- Whatever a server sends ends in events, in a number of `garbled` messages, or in the end of the
  connection. Nothing raises; the largest delta comes out in pieces of DELTA_OCTETS.
- What waits is bounded (`outbox.py`): old audio is dropped, which the client is told once; a new
  event is refused, by an `error` with its event_id.
- What is answered to events of our own is nobody else's business.

Sans-IO. The events: https://developers.openai.com/api/reference/realtime
"""

import binascii
import enum
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

import dialect
import realtime
from memory import Memory
from outbox import Outbox
from realtime import Event, Refused

DELTA_OCTETS = 96_000
"""Of PCM in one event from here: 2 s at 24 kHz, a third of a millisecond to unpack. Between two of
them other sessions have their turn."""

LARGE_OCTETS = realtime.SESSION_OCTETS_MAX
"""A message beyond this is a delta of audio or nothing: no client could be given another."""

COMMAS_MAX = 1_024
"""In a large message. A delta has ten; as many as fit would be a million objects to make."""

GARBLED_MAX = 64
"""Messages of one connection that cannot be understood. A server of another version has a few; one
that goes on is no model server."""

UPDATES_MAX = 16
"""Updates that a server has not answered; of more the oldest counts as accepted."""

RESPONSES_MAX = 16
"""Responses that a server has begun and not ended. There is one, rarely two."""

_NOT_TO_BE_SET = ("id", "object", "model", "expires_at", "client_secret")
"""What stands in a session and is the server's to say."""

_APPEND = b'{"type":"input_audio_buffer.append","audio":"%b"}'

_ERROR = "server_error"


class Stage(enum.Enum):
    """Where a session is with its server."""

    AWAY = "there is no connection"
    GREETING = "session.created is awaited"
    SETTLING = "our settings are not confirmed yet"
    READY = "all that comes is the conversation's"


class Remote:
    """One session. Each method returns the events to emit, in order, unless it says otherwise."""

    def __init__(
        self,
        tag: str,
        rate_hz: int,
        speaks: str,
        model: str,
        wanted: Event | None,
        past: Sequence[Event] = (),
    ) -> None:
        """`tag` makes ids unlike those of any other session; `speaks` is a dialect, or auto.

        `model` is what the client is shown while nobody knows better, and `wanted` the session
        that came with the offer. `past` are items that each server is told of first.
        """
        self.rate_hz = rate_hz
        self.stage = Stage.AWAY
        self.garbled = 0
        """Messages that could not be understood, on all connections."""
        self.broken = ""
        """Why this connection had better be closed; empty while it is well."""
        self._tag, self._model = tag, model
        self._own_prefix, self._ids = f"link_{tag}_", 0
        self._wish, self._speaks = speaks, "ga"
        self._reader = dialect.Reader(rate_hz)
        self._created = False
        self._provisional = False  # the client was shown a session that no server has yet
        self._told_away = False
        self._session: Event = {}  # the server's own, until ours is confirmed
        self._asked: Event = {}
        self._updates: deque[tuple[str, Event]] = deque()  # sent, and not answered yet
        self._owed: list[str] = []  # ids of those that another connection has to answer
        self._complaints: list[Event] = []  # to be told once the session is there
        self._settling = ""  # id of the update that a connection begins with
        self._first: deque[Event] = deque()
        self._waiting = Outbox(rate_hz)
        self._told_dropping = False
        self._garbled_here = 0
        self._odd = b""
        self._odd_of: Any = None
        self._memory = Memory(past)
        self._retelling: set[str] = set()
        self._untold = 0
        self._responses: dict[str, None] = {}
        self._speaking = False
        if not self._accepted({k: v for k, v in (wanted or {}).items() if k not in _NOT_TO_BE_SET}):
            wrong = "The session that came with the offer is too large, or nested too deeply."
            self._complaints.append(self._error("invalid_value", wrong, None))

    @property
    def dropped_octets(self) -> int:
        """PCM that the server did not get."""
        return self._waiting.dropped_octets

    # --- from the caller ---------------------------------------------------------------------

    def send(self, event: Event) -> list[Event]:
        """Take a client event for the server."""
        kind = event.get("type")
        if kind == "session.update" and isinstance(event.get("session"), dict):
            event = self._as_sent(event)
        elif kind == "conversation.item.truncate" and self.stage is Stage.AWAY:
            self._memory.truncated(event)  # nobody else will say so before it is told again
        try:
            if self._waiting.put_event(event):
                return []
        except TypeError:
            return [self._error("invalid_value", "It is nested too deeply.", event)]
        wrong = "The model server takes nothing at present; this event is dropped."
        return [self._error("backend_busy", wrong, event, _ERROR)]

    def append(self, pcm: bytes) -> list[Event]:
        """Take what the caller said next, in PCM."""
        fits = self._waiting.put_audio(pcm) if pcm else True
        if fits or self._told_dropping or self.stage is not Stage.READY:
            return []
        self._told_dropping = True
        wrong = "The model server is too slow: some of what was said has not reached it."
        return [self._error("audio_dropped", wrong, None, _ERROR)]

    # --- from the wire -----------------------------------------------------------------------

    def connected(self) -> None:
        """A connection is open; the server has the first word."""
        self.stage, self.broken = Stage.GREETING, ""
        self._garbled_here, self._odd = 0, b""
        self._reader = dialect.Reader(self.rate_hz)
        self._first.clear()
        self._retelling.clear()

    def received(self, message: bytes | str) -> Iterator[Event]:
        """What a message of the server leads to, a large one piece by piece."""
        for event in self._read(message):
            kind = event["type"]
            if kind == "response.output_audio.delta":
                yield from self._sound(event)
            elif self.stage is Stage.GREETING:
                yield from self._greeted(event)
            else:
                yield from self._heard(event, kind)

    def settle(self) -> list[Event]:
        """Go on although the server has not confirmed its settings: not all of them do."""
        return self._settled(self._session) if self.stage is Stage.SETTLING else []

    def disconnected(self, why: str, final: bool = False) -> list[Event]:
        """The connection is gone, or could not be had; for good, if it is `final`.

        `why` completes "The model server". The end itself is for the owner to tell.
        """
        was_away, self.stage = self.stage is Stage.AWAY, Stage.AWAY
        told: list[Event] = []
        if not self._created:
            self._created = self._provisional = True
            session = realtime.session(f"sess_{self._tag}", self._model, self.rate_hz)
            told.append({"type": "session.created", "session": self._in_force(session)})
        if not final and not (was_away and self._told_away):
            self._told_away = True
            wrong = f"The model server {why}. It is being tried again."
            told.append(self._error("backend_unavailable", wrong, None, _ERROR))
        for event_id, update in self._updates:
            self._owed.append(event_id)
            self._accepted(update)
        self._updates.clear()
        if self._speaking:
            self._speaking = False
            told.append({"type": "input_audio_buffer.cleared"})
        responses, self._responses = self._responses, {}
        told += [self._failed(response_id) for response_id in responses]
        self._memory.interrupted()
        return told

    def next_message(self) -> bytes | None:
        """What to send next, now; None if there is nothing, or the server is not ready for it."""
        if self.stage not in (Stage.SETTLING, Stage.READY):
            return None
        if self._first:
            return self._encoded(self._first.popleft())
        what = self._waiting.take()
        if what is None:
            self._told_dropping = False
            return None
        if isinstance(what, bytes):
            return _APPEND % binascii.b2a_base64(what, newline=False)
        if what.get("type") == "session.update" and isinstance(what.get("session"), dict):
            self._updates.append((what["event_id"], what["session"]))
            if len(self._updates) > UPDATES_MAX:
                self._accepted(self._updates.popleft()[1])
        return self._encoded(what)

    # --- the beginning of a connection -------------------------------------------------------

    def _greeted(self, event: Event) -> Iterator[Event]:
        """Before session.created nothing else counts, but for what is wrong."""
        session = event.get("session")
        if event["type"] == "error":
            yield from self._refused(event)
        elif event["type"] == "session.created" and isinstance(session, dict):
            self.stage = Stage.SETTLING
            self._session = session
            self._ask(self._in_force({"type": "realtime"} | self._asked))
            self._retell()
        else:
            self._garble()

    def _ask(self, session: Event) -> None:
        self._settling = self._own_id()
        update = {"type": "session.update", "event_id": self._settling, "session": session}
        self._first.appendleft(update)

    def _retell(self) -> None:
        """What a server that is new to the conversation has to be told of it."""
        items, self._untold = self._memory.tell()
        for item in items:
            self._retelling.add(item["id"])
            create = {"type": "conversation.item.create", "event_id": self._own_id()}
            self._first.append({**create, "item": item})

    def _settled(self, session: Event) -> list[Event]:
        """The connection is as it should be."""
        self.stage, self._settling = Stage.READY, ""
        told: list[Event] = []
        if not self._created:
            self._created = True
            told.append({"type": "session.created", "session": session})
        elif self._told_away:
            if self._provisional and not self._owed:
                told.append({"type": "session.updated", "session": session})
            missing = f" {self._untold} of them could not be told." if self._untold else ""
            wrong = f"The model server is back, and told of earlier items.{missing}"
            told.append(self._error("backend_reconnected", wrong, None, _ERROR))
        told += [{"type": "session.updated", "session": session} for _ in self._owed]
        told += self._complaints
        self._owed.clear()
        self._complaints.clear()
        self._told_away = self._provisional = False
        return told

    def _unsettled(self, error: Event) -> list[Event]:
        """The server has refused the settings: it is asked for the audio's format alone."""
        owed, self._owed = self._owed or [self._settling], []
        self._complaints += [self._answered(error, event_id) for event_id in owed]
        if not self._asked:
            return self._settled(self._session)
        self._asked = {}
        self._ask(self._in_force({"type": "realtime"}))
        return []

    def _in_force(self, session: Event) -> Event:
        """A session with what was asked for in it, and the one format there is."""
        pcm = {"format": {"type": "audio/pcm", "rate": self.rate_hz}}
        session = realtime.merged(session, self._asked)
        return realtime.merged(session, {"audio": {"input": pcm, "output": pcm}})

    # --- what passes -------------------------------------------------------------------------

    def _read(self, message: bytes | str) -> list[Event]:
        """A message as events of the GA's names; empty for one that is none."""
        comma = b"," if isinstance(message, bytes) else ","
        large = len(message) > LARGE_OCTETS
        if large and message.count(comma) > COMMAS_MAX:  # type: ignore[arg-type]
            return self._garble()
        try:
            event = orjson.loads(message)
        except orjson.JSONDecodeError:
            return self._garble()
        if not (isinstance(event, dict) and isinstance(event.get("type"), str)):
            return self._garble()
        if self._wish == "ga":
            found = [event]
        else:
            if self.stage is Stage.GREETING and event["type"] == "session.created":
                shown = dialect.of_session(event.get("session"))
                self._speaks = shown if self._wish == "auto" else self._wish
            found = self._reader.read(event)
        if large and found[0]["type"] != "response.output_audio.delta":
            return self._garble()
        return found

    def _garble(self) -> list[Event]:
        self.garbled += 1
        self._garbled_here += 1
        if self._garbled_here >= GARBLED_MAX:
            self.broken = "sends what is not of the Realtime API"
        return []

    def _sound(self, event: Event) -> Iterator[Event]:
        """A delta as PCM, in pieces, each of whole samples."""
        text, item_id = event.get("delta"), event.get("item_id")
        if not isinstance(text, str) or self.stage is Stage.GREETING:
            self._garble()
            return
        if not (isinstance(item_id, str) and isinstance(event.get("response_id"), str)):
            event = self._named(event)  # small servers leave out what there is only one of
            item_id = event["item_id"]
        odd, self._odd = self._odd if item_id == self._odd_of else b"", b""
        self._odd_of = item_id
        step = DELTA_OCTETS // 3 * 4
        for at in range(0, len(text), step):
            try:
                pcm = odd + binascii.a2b_base64(text[at : at + step], strict_mode=True)
            except ValueError:  # binascii.Error is one
                self._garble()
                return
            whole = len(pcm) & ~1
            odd = pcm[whole:]
            if whole:
                yield event | {"delta": pcm[:whole]}
        self._odd = odd  # the other half of the sample comes with the next delta

    def _named(self, event: Event) -> Event:
        """A delta with the ids that it lacks: those of the response that is being made."""
        response_id = event.get("response_id")
        if not isinstance(response_id, str):
            response_id = next(reversed(self._responses), f"resp_{self._tag}")
        item_id = event.get("item_id")
        if not isinstance(item_id, str):
            item_id = f"item_{response_id}"
        return event | {"response_id": response_id, "item_id": item_id}

    def _heard(self, event: Event, kind: str) -> Iterator[Event]:
        """An event that is no sound, in a session that has begun."""
        if kind == "error":
            yield from self._refused(event)
        elif kind == "session.updated":
            session = event.get("session")
            if self.stage is Stage.SETTLING:
                yield from self._settled(session if isinstance(session, dict) else self._session)
                return
            if self._updates:
                self._accepted(self._updates.popleft()[1])
            yield event
        elif kind == "session.created" or self._is_retelling(event, kind):
            pass  # the client knows
        else:
            self._note(event, kind)
            yield event

    def _refused(self, event: Event) -> Iterator[Event]:
        error = event.get("error")
        if not isinstance(error, dict):
            words = error if isinstance(error, str) else event.get("message")
            message = words if isinstance(words, str) else "The model server reports an error."
            error = realtime.error(Refused("backend_error", message), None, _ERROR)
            event = event | {"error": error}
        event_id = error.get("event_id")
        if not isinstance(event_id, str):
            yield event
        elif event_id == self._settling:
            yield from self._unsettled(error)
        elif (update := next((u for u in self._updates if u[0] == event_id), None)) is not None:
            self._updates.remove(update)
            yield self._answered(error, event_id)
        elif event_id.startswith(self._own_prefix):
            self._untold += 1  # an item that this server does not want to be told of
        else:
            yield event

    def _is_retelling(self, event: Event, kind: str) -> bool:
        """True for the answer to an item that was told again: the client has seen it already."""
        item_id = _id_of(event.get("item"))
        if item_id not in self._retelling or not kind.startswith("conversation.item."):
            return False
        if kind == "conversation.item.done":
            self._retelling.discard(item_id)
        return True

    def _note(self, event: Event, kind: str) -> None:
        """What is under way, and would be left in the middle if the connection were lost now."""
        self._memory.note(event, kind)
        if kind in ("response.created", "response.done"):
            response_id = _id_of(event.get("response"))
            if kind == "response.done":
                self._responses.pop(response_id, None)
            elif response_id:
                self._responses[response_id] = None
                while len(self._responses) > RESPONSES_MAX:
                    del self._responses[next(iter(self._responses))]
        elif kind == "input_audio_buffer.speech_started":
            self._speaking = True
        elif kind in ("input_audio_buffer.speech_stopped", "input_audio_buffer.cleared"):
            self._speaking = False

    # --- what waits, and events of our own ---------------------------------------------------

    def _as_sent(self, event: Event) -> Event:
        """A session.update as the server gets it: it can be named, and asks for what is ours."""
        session = {k: v for k, v in event["session"].items() if k not in _NOT_TO_BE_SET}
        event_id = event.get("event_id")
        name = event_id if isinstance(event_id, str) else self._own_id()
        return event | {"event_id": name, "session": {"type": "realtime"} | session}

    def _accepted(self, update: Event) -> bool:
        """Have an update in force on every connection to come, unless it makes it too much."""
        asked = realtime.merged(self._asked, update)
        try:
            fits = len(orjson.dumps(asked)) <= realtime.SESSION_OCTETS_MAX
        except TypeError:
            return False
        if fits:
            self._asked = asked
        return fits

    def _answered(self, error: Event, event_id: str) -> Event:
        """An error about an update, as the client sees it: under its own name or none."""
        name = None if event_id.startswith(self._own_prefix) else event_id
        return {"type": "error", "error": error | {"event_id": name}}

    def _encoded(self, event: Event) -> bytes:
        return orjson.dumps(dialect.client_to_beta(event) if self._speaks == "beta" else event)

    def _own_id(self) -> str:
        self._ids += 1
        return f"{self._own_prefix}{self._ids:04d}"

    def _failed(self, response_id: str) -> Event:
        """The end of a response that will never be finished."""
        error = {"type": _ERROR, "code": "backend_unavailable"}
        response: Event = {
            "object": "realtime.response",
            "id": response_id,
            "status": "failed",
            "status_details": {"type": "failed", "error": error},
            "output": [],
            "usage": None,
        }
        return {"type": "response.done", "response": response}

    def _error(
        self, code: str, message: str, event: Event | None, kind: str = "invalid_request_error"
    ) -> Event:
        event_id = event.get("event_id") if event else None
        return {"type": "error", "error": realtime.error(Refused(code, message), event_id, kind)}


def _id_of(value: Any) -> str:
    """The id of an object; empty without one."""
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""
