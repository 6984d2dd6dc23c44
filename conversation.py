"""The conversation of one call: between the data channel, the play-out and the backend.

    client ◀── Channel ◀── Conversation ◀── events ──▶ backend
                            │   │   ▲
                        Floor   ▼   │ started, stopped
                             Replies ──▶ play-out ──▶ RTP

A backend makes audio faster than it is heard, and knows nothing of what was heard. A client hears,
and sees on its channel events without audio. What lies in between is here.

What it owns: what each event of one side means for the other side, interruption, and what there is
to answer about items that have passed through. What a client gets when is `channel.py`, what of a
response sounds `replies.py`, and whose turn it is `floor.py`.

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
from typing import Any

import attendants
import audio
import channel
import floor
import realtime
import records
import replies
from realtime import Event, Refused
from replies import Taken

EVENT_ID_CHARACTERS_MAX = 512
"""Of a client's event_id, as in the API: it is echoed in errors."""

_SECRETS = frozenset(("authorization", "headers", "client_secret", "api_key"))


class Conversation:
    """One call's events. Every method takes monotonic seconds as `now`."""

    def __init__(
        self,
        session_id: str,
        playout: audio.Playout,
        ruled: floor.Floor,
        message_octets_max: int = channel.SERVER_MESSAGE_OCTETS_MAX,
        chronicle: records.Chronicle | None = None,
    ) -> None:
        """`session_id` becomes the session's id for the client; event ids are derived from it.

        `message_octets_max` is what the client takes in one message; 0 is any. `chronicle` has the
        items of a conversation that goes on in this one, and is told of what follows.
        """
        self._session_id = session_id
        self._tag = hashlib.blake2s(session_id.encode(), digest_size=6).hexdigest()
        self._closed = False
        self.attendants = attendants.Attendants(self._tag)
        """Who else is told of everything, and may ask for it."""
        self._channel = channel.Channel(self._tag, message_octets_max, self.attendants.tell)
        self._replies = replies.Replies(playout)
        self._floor, self._terms = ruled, ruled.terms
        self._to_backend: list[Event] = []
        self._chronicle = chronicle or records.Chronicle()
        self.listens = False
        """Whether it wants to `hear` what the caller says: only some settings need it."""
        self.expires_at: int | None = None
        """When the call ends at the latest, in seconds since 1970; stands in the session object."""
        self._shown: Event = {}  # the session as the client last saw it

    # --- verbs -------------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """The data channel is open; after another one, it begins with session.created, too."""
        again = self._channel.live
        self._channel.open()
        if again:
            self._channel.create_again({"type": "session.created", "session": self._shown})

    def closed(self) -> None:
        """The session has ended: nothing more comes out, and what was remembered is freed."""
        self._closed = True
        self._channel.close()
        self._to_backend = []
        self._chronicle = records.Chronicle()

    def notice(self, expires_at: int) -> None:
        """Tell the client when the call will end: session.updated with another `expires_at`.

        The API has that field, and no event for this; some clients end at an event that they do
        not know, and others at any `error`.
        """
        self.expires_at = expires_at
        if self._shown and not self._closed:
            self._shown = self._shown | {"expires_at": expires_at}
            self._channel.say({"type": "session.updated", "session": self._shown})

    def fault(self, code: str, message: str, kind: str = "server_error") -> None:
        """Tell the client of something that no event of its own has caused, at once."""
        if not self._closed:
            self._channel.release()
            self._channel.error(Refused(code, message), None, kind)

    def attend(self, attendant: attendants.Attendant) -> None:
        """Another one to be told of everything. Raises attendants.Crowded."""
        self.attendants.join(attendant)
        self._greet()

    def client_message(
        self, message: str | bytes, now: float, sender: attendants.Attendant | None = None
    ) -> None:
        """A message of the data channel, text or binary: the same JSON is taken either way.

        Or of an attendant: then what is wrong with it is told to nobody else.
        """
        if self._closed:
            return
        event_id = None
        try:
            event = realtime.parsed(message)
            event_id = event.get("event_id")
            self._from_client(event, now, sender)
        except Refused as refused:
            whole = isinstance(event_id, str) and len(event_id) <= EVENT_ID_CHARACTERS_MAX
            theirs = event_id if whole else None
            if sender is None:
                self._channel.error(refused, theirs)
            else:
                wrong = {"type": "error", "error": realtime.error(refused, theirs)}
                sender.tell(self._channel.message(wrong))

    def backend_event(self, event: Event, now: float) -> None:
        """An event of the backend; anything that is none is ignored."""
        kind = event.get("type")
        if self._closed or not isinstance(kind, str):
            return
        if kind == "response.output_audio.delta":
            self._sound(event, now)
        elif kind in ("session.created", "session.updated"):
            self._session(event, kind)
        elif kind == "error":
            self._backend_error(event)
        elif not kind.startswith("output_audio_buffer."):  # those are made here
            self._chronicle.memory.note(event, kind)
            self._channel.say(event)
            self._note_turn(kind, now)
            self._note_response(event, kind, now)

    def hear(self, pcm: bytes, now: float) -> None:
        """What the caller says, PCM16LE mono as the backend gets it; to be given if it `listens`.

        The backend is to have it before.
        """
        if self._floor.hear(pcm) and not self._closed:
            self._interrupt(now, cancel=self._terms.cancels)

    def playout_events(self, now: float) -> None:
        """Tell the client what the play-out has done. After each `playout.send`, and in time."""
        if self._closed:
            return
        for what, response_id in self._replies.news():
            if what == "started":
                self._channel.overtake(_buffer(what, response_id))
                self._channel.release()
            else:
                self._channel.say(_buffer(what, response_id))
        self._channel.tick(now)
        if self._floor.is_due(now) and not self._replies.making:
            self._floor.answered()
            self._replies.ask(self._tell_backend("ask", "response.create"), now)

    def to_client(self) -> list[str]:
        """JSON messages for the channel, in order. None before it is open. Drains."""
        return self._channel.take()

    def to_backend(self) -> list[Event]:
        """Events for the backend, in order. Drains."""
        out, self._to_backend = self._to_backend, []
        return out

    @property
    def revision(self) -> int:
        """Another one whenever there is something new to be kept of it."""
        return self._chronicle.revision

    @property
    def replies(self) -> bool:
        """Whether a reply is being made or heard."""
        return self._replies.busy

    def record(self, key: str, dialect: str) -> records.Record:
        """What another call needs to go on with it."""
        return self._chronicle.record(self._replies.shares(), key, dialect)

    # --- from the client ---------------------------------------------------------------------

    def _from_client(
        self, event: Event, now: float, sender: attendants.Attendant | None = None
    ) -> None:
        kind = realtime.field(event, "type", str)
        if kind not in realtime.CLIENT_EVENTS:
            raise Refused("invalid_value", f"Unknown event type {kind[:80]!r}.", "type")
        event_id = realtime.field(event, "event_id", str, "")
        if len(event_id) > EVENT_ID_CHARACTERS_MAX:
            limit = f"An event_id has at most {EVENT_ID_CHARACTERS_MAX} characters."
            raise Refused("invalid_value", limit, "event_id")
        if sender is not None:
            event["event_id"] = self.attendants.asks(sender, event_id or None)
        if kind == "output_audio_buffer.clear":
            self._clear(now)
            return
        if kind == "conversation.item.retrieve":
            self._retrieve(event)
            return
        if kind == "conversation.item.truncate":
            self._truncate_to_heard(event)
        elif kind == "response.cancel" and event.get("response_id") is None:
            self._floor.answered()
        elif kind == "response.create":
            aside = _at(event, "response", "conversation") == "none"
            self._replies.ask(self._known_by(event), now, aside=aside)
            if not aside:
                self._floor.answered()
        elif kind == "session.update" and isinstance(session := event.get("session"), dict):
            _drop_formats(session)
            event["session"] = self._terms.asked(session, self._known_by(event))
            self._chronicle.asked(event["event_id"], session)
        self._to_backend.append(event)

    def _known_by(self, event: Event) -> str:
        """The id by which the backend's answer can be told; one of ours if the client gave none."""
        if not event.get("event_id"):
            event["event_id"] = self._channel.next_id("ask")
        return str(event["event_id"])

    def _clear(self, now: float) -> None:
        """The client interrupts: silence at once, and an end to what is still being made."""
        self._floor.answered()
        making = self._replies.making
        if not self._interrupt(now, cancel=True):
            # Nothing was sounding. A client that waits for an answer gets one all the same.
            last = making[0] if making else self._replies.last
            self._channel.say(_buffer("cleared", last))

    def _retrieve(self, event: Event) -> None:
        item_id = realtime.field(event, "item_id", str)
        item = self._chronicle.memory.get(item_id)
        if item is None:
            wrong = f"No item {item_id[:80]!r} has passed through this conversation lately."
            raise Refused("item_retrieve_invalid_item_id", wrong, "item_id")
        self._channel.say({"type": "conversation.item.retrieved", "item": item})

    def _truncate_to_heard(self, event: Event) -> None:
        """Clients do not know how much of an item was sent, and never more was heard than that."""
        item_id = realtime.field(event, "item_id", str)
        end_ms = realtime.field(event, "audio_end_ms", int)
        heard_ms = self._replies.heard_ms(item_id)
        if heard_ms is None and self._chronicle.memory.get(item_id) is not None:
            heard_ms = 0
        event["audio_end_ms"] = end_ms if heard_ms is None else min(end_ms, heard_ms)

    # --- from the backend --------------------------------------------------------------------

    def _sound(self, event: Event, now: float) -> None:
        """Audio of a response: to the play-out, unless the response has been cut off."""
        item, response_id, pcm = (event.get(k) for k in ("item_id", "response_id", "delta"))
        if not (isinstance(item, str) and isinstance(response_id, str) and isinstance(pcm, bytes)):
            return
        taken = self._replies.sound(response_id, item, pcm, now)
        if taken is Taken.FIRST:
            self._channel.hold(now)  # what follows waits for the .started
        elif taken is Taken.UNHEARD:
            self._truncate(item, 0)
        elif taken is Taken.FULL:
            wrong = "The response has more audio than can be queued; its end is not played."
            self._channel.error(Refused("audio_overflow", wrong), None, "server_error")

    def _session(self, event: Event, kind: str) -> None:
        session = event.get("session")
        created = kind == "session.created"
        shown = self._terms.shown(session if isinstance(session, dict) else {}, created=created)
        self.listens = self._floor.listens
        shown = _without_secrets(shown) | {"id": self._session_id}
        if self.expires_at is not None:
            shown["expires_at"] = self.expires_at
        self._shown = shown
        event = event | {"session": shown}
        if not created:
            self._chronicle.confirmed()
            self._channel.say(event)
            return
        self._channel.create(event)
        self._greet()
        self._show_kept()
        refused, self._terms.refused = self._terms.refused, None
        if refused is not None:
            self._channel.error(refused)

    def _show_kept(self) -> None:
        """Tell the client what there is of the conversation that goes on in this one."""
        before = None
        for item in self._chronicle.begins_with():
            for kind in ("conversation.item.added", "conversation.item.done"):
                self._channel.say({"type": kind, "previous_item_id": before, "item": item})
            before = item["id"]

    def _backend_error(self, event: Event) -> None:
        """Pass it on, unless it is about an event that no client sent: not all know truncation."""
        event_id = _at(event, "error", "event_id")
        self._terms.turned_down(event_id, _at(event, "error", "param"))
        self._chronicle.turned_down(event_id)
        if isinstance(event_id, str):
            self._replies.refused(event_id)
            if event_id.startswith(f"own_{self._tag}"):
                return
            asked = self.attendants.asked(event_id)
            if event_id.startswith(f"ask_{self._tag}") or self.attendants.is_ours(event_id):
                theirs = asked[1] if asked else None
                event = event | {"error": event["error"] | {"event_id": theirs}}
            if asked:
                asked[0].tell(self._channel.message(event))
                return
        self._channel.say(event)

    def _greet(self) -> None:
        """Tell the attendants that have come of the session, once there is one."""
        if self.attendants.waits and self._shown:
            created = {"type": "session.created", "session": self._shown}
            self.attendants.greet(self._channel.message(created))

    def _note_turn(self, kind: str, now: float) -> None:
        """What an event about the caller's turn means, now that the client has it."""
        if kind == "input_audio_buffer.speech_started":
            if self._floor.started():
                self._interrupt(now, cancel=self._terms.cancels)
        elif kind == "input_audio_buffer.speech_stopped":
            self._floor.stopped()
        elif kind == "input_audio_buffer.committed":
            self._floor.committed(now, busy=self._replies.busy)
        elif kind == "input_audio_buffer.cleared":
            self._floor.abandoned()

    def _note_response(self, event: Event, kind: str, now: float) -> None:
        """What an event about a response means for the play-out."""
        if kind == "response.output_audio.done":
            self._replies.item_done(event.get("response_id"), event.get("item_id"), now)
        elif kind in ("response.created", "response.done"):
            response_id = _at(event, "response", "id")
            if not isinstance(response_id, str):
                return
            if kind == "response.done":
                self._replies.done(response_id, now)
                return
            wanted = self._replies.created(response_id, now)
            if not self._replies.is_aside(response_id):
                self._floor.answered()
            if not wanted:
                self._tell_backend("own", "response.cancel", response_id=response_id)

    def _interrupt(self, now: float, *, cancel: bool) -> bool:
        """Silence at once. True if there was anything to silence and the client was told."""
        self.playout_events(now)  # what has been sent until now has been heard
        if cancel:
            for response_id in self._replies.making:
                self._tell_backend("own", "response.cancel", response_id=response_id)
        silenced, unheard = self._replies.cut(now)
        for response_id in silenced:
            self._channel.say(_buffer("cleared", response_id))
        for item_id, ms in unheard:
            self._truncate(item_id, ms)
        self._channel.release()
        return bool(silenced)

    def _truncate(self, item_id: str, ms: int) -> None:
        cut = {"item_id": item_id, "content_index": 0, "audio_end_ms": ms}
        self._tell_backend("own", "conversation.item.truncate", **cut)

    def _tell_backend(self, whose: str, kind: str, **fields: object) -> str:
        """An event that no client sent. Errors about an "own" one are nobody's business."""
        event_id = self._channel.next_id(whose)
        self._to_backend.append({"event_id": event_id, "type": kind, **fields})
        return event_id


# --- objects of others ---------------------------------------------------------------------------


def _at(value: Any, *path: str) -> Any:
    """What lies at a path of objects, None if the path ends before."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _buffer(what: str, response_id: str | None) -> Event:
    return {"type": f"output_audio_buffer.{what}", "response_id": response_id}


def _drop_formats(session: Event) -> None:
    """The audio's format is agreed upon by transceiver and backend; a client's would be Opus."""
    for way in ("input", "output"):
        side = _at(session, "audio", way)
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
