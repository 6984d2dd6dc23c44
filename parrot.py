"""The parrot: a model server that needs no model. It hears a turn and plays exactly that back.

It is the default backend, so that a whole call works on a fresh machine, and the yardstick of the
path: what comes back can be compared with what was said. It speaks the Realtime protocol as model
servers do (https://developers.openai.com/api/reference/realtime): session settings, turn detection
(`turns.py`), push-to-talk, interruption, conversation items, every event in its order.

Rules that stay true:
- It claims only what it knows. A transcript gives duration and level of what was heard, never
  words; it counts no tokens; text that it is sent it only measures.
- It speaks at most LEAD_MS ahead of real time, as a model server that streams would: so there is a
  response to interrupt for as long as nearly all of it is heard.
- What a client sends ends in the events it asked for or in one `error` with its event_id. Nothing
  raises, and what a client can make it remember is bounded.
- An event once returned is never changed: what happens later is told by another one.

Of the last turn alone the audio is kept, and `response.create` repeats it as often as one likes.
Not here: function calls, out-of-band responses, audio inside of conversation items. Sans-IO: time
is an argument, and ids are built from a tag that the owner chooses.
"""

import base64
import binascii
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import realtime
from realtime import Event, History, Modalities, Refused, Remembered, ServerVad, field, message
from turns import MS_OCTETS, RATE_HZ, TURN_MS_MAX, Ear, Mark, Turn, by_sound

LEAD_MS = 1_000
"""How far speaking runs ahead of real time. Less would stutter when the process is held up; more
would leave fewer responses to interrupt."""

DELTA_MS = 200
"""Audio in one event: a few events a second cost nothing, and none is large."""

LEAD_IN_MS = 60
"""Of the padding before a turn's first speech frame, what is repeated. A soft first consonant is
below the detector's floor; all of the padding would be 300 ms of silence before every reply."""

COMMIT_MS_MIN = 100
"""A push-to-talk buffer with less counts as empty: a key pressed by accident. As OpenAI's."""

APPEND_MS_MAX = 10_000
"""Audio in one event: listening to 10 s takes about 8 ms, in which no other session moves."""

ID_CHARACTERS_MAX = 128
"""Of an item's id that a client chooses. Clients choose UUIDs."""

_NO_TOKENS = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}

assert DELTA_MS <= LEAD_MS


@dataclass(frozen=True, slots=True)
class _Answer:
    """What to say next."""

    words: str
    pcm: bytes = b""


@dataclass(slots=True)
class _Reply:
    """A response while it is being spoken."""

    id: str
    item_id: str
    before: str | None
    modalities: list[str]
    metadata: Any
    answer: _Answer
    begun: float
    said: int = 0  # octets

    @property
    def text_event(self) -> str:
        """The text beside sound is its transcript."""
        return "response.output_audio_transcript" if self.answer.pcm else "response.output_text"

    def part(self, text: str) -> Event:
        """The one content part, with the text so far."""
        if self.answer.pcm:
            return {"type": "output_audio", "transcript": text}
        return {"type": "output_text", "text": text}

    def place(self, *, content: bool = True) -> Event:
        """The ids that the events of a response carry."""
        ids: Event = {"response_id": self.id, "output_index": 0}
        return ids | {"item_id": self.item_id, "content_index": 0} if content else ids


class Parrot:
    """One session. Each method returns the events to emit, in order.

    `tag` makes the ids of this session unlike those of any other. `session` is what came with the
    offer: applied before `session.created`; what is wrong with it becomes an error after that.
    """

    rate_hz = RATE_HZ
    """Of its audio, both ways."""

    def __init__(self, tag: str, session: Event | None = None, told_hz: int = RATE_HZ) -> None:
        """`told_hz` is the rate that its sessions show, of an owner who resamples."""
        self._tag = tag
        self._counts: dict[str, int] = {}
        self._out: list[Event] = []
        self._ear = Ear()
        self._history = History()
        self._reply: _Reply | None = None
        self._answer = _Answer("I have not heard anything yet.")
        self._heard_id = ""
        self._idle_from: float | None = None
        self._session = realtime.session(self._id("sess"), "parrot", told_hz)
        self._rule: ServerVad | None = ServerVad()
        refusal = None
        if session is not None:
            try:
                self._configure(session)
            except Refused as error:
                refusal = error
        self._emit("session.created", session=self._session)
        if refusal is not None:
            self._refuse(refusal, None)

    # --- verbs -------------------------------------------------------------------------------

    def start(self) -> list[Event]:
        """`session.created`, and an `error` if the session that came with the offer is refused."""
        return self._drain()

    def receive_event(self, event: Event, now: float) -> list[Event]:
        """What a client event leads to."""
        kind = event.get("type")
        handler = _HANDLERS.get(kind) if isinstance(kind, str) else None
        try:
            (handler or Parrot._on_unknown)(self, event, now)
        except Refused as refusal:
            self._refuse(refusal, event.get("event_id"))
        return self._drain()

    def receive_audio(self, pcm: bytes, now: float) -> list[Event]:
        """What hearing more leads to: PCM16LE mono at RATE_HZ, of any number of octets."""
        self._hear(pcm, now)
        self._speak(now)
        return self._drain()

    def tick(self, now: float) -> list[Event]:
        """What the passing of time leads to. Call it every 20 to 100 ms."""
        rule = self._rule
        if rule is not None and self._ear.has_fallen_silent(now, rule):
            self._speech_stopped(now)
        self._speak(now)
        idle_ms = rule.idle_timeout_ms if rule is not None else None
        since = self._idle_from
        if idle_ms and since is not None and now - since >= idle_ms / 1000:
            self._timed_out(idle_ms, now)
        return self._drain()

    # --- turns -------------------------------------------------------------------------------

    def _hear(self, pcm: bytes, now: float) -> None:
        for mark in self._ear.hear(pcm, now, self._rule):
            if mark is Mark.STARTED:
                self._speech_started(now)
            else:
                self._speech_stopped(now)

    def _speech_started(self, now: float) -> None:
        self._idle_from = None
        self._heard_id = self._id("item")
        self._emit(
            "input_audio_buffer.speech_started",
            audio_start_ms=self._ear.starts_ms,
            item_id=self._heard_id,
        )
        if self._rule is not None and self._rule.interrupt_response and self._reply is not None:
            self._finish(self._reply, now, "turn_detected")

    def _speech_stopped(self, now: float) -> None:
        turn = self._ear.take()
        self._emit(
            "input_audio_buffer.speech_stopped", audio_end_ms=turn.end_ms, item_id=self._heard_id
        )
        self._commit_turn(turn, "speech")
        if self._rule is not None and self._rule.create_response:
            try:
                self._respond({}, self._answer, now)
            except Refused as refusal:  # still speaking, and told not to be interrupted
                self._refuse(refusal, None)

    def _commit_turn(self, turn: Turn, what: str) -> None:
        level = "digital silence"
        if turn.level_dbfs > -math.inf:
            level = f"level {turn.level_dbfs:.0f} dBFS"
        heard = f"{turn.heard_ms / 1000:.1f} seconds of {what}, {level}"
        more = " I repeat the end of it." if turn.heard_ms > TURN_MS_MAX else ""
        pcm = turn.pcm[max(0, turn.lead_ms - LEAD_IN_MS) * MS_OCTETS :]
        self._answer = _Answer(f"I heard {heard}.{more}", pcm)
        transcribed = self._session["audio"]["input"]["transcription"] is not None
        self._commit_item(f"({heard})" if transcribed else None, turn.heard_ms / 1000)

    def _commit_item(self, transcript: str | None, seconds: float) -> None:
        item_id, self._heard_id = self._heard_id or self._id("item"), ""
        before = self._history.last_id
        self._emit("input_audio_buffer.committed", previous_item_id=before, item_id=item_id)
        content = {"type": "input_audio", "transcript": None}
        self._add_item(message(item_id, "user", "completed", content), before)
        if transcript is not None:
            self._history.put(
                message(item_id, "user", "completed", content | {"transcript": transcript})
            )
            self._emit(
                "conversation.item.input_audio_transcription.completed",
                item_id=item_id,
                content_index=0,
                transcript=transcript,
                usage={"type": "duration", "seconds": seconds},
            )

    def _timed_out(self, idle_ms: int, now: float) -> None:
        """Nothing was said after a reply: the API makes a turn of that, too."""
        self._idle_from = None
        self._heard_id = self._id("item")
        self._emit(
            "input_audio_buffer.timeout_triggered",
            audio_start_ms=max(0, self._ear.clock_ms - idle_ms),
            audio_end_ms=self._ear.clock_ms,
            item_id=self._heard_id,
        )
        self._commit_item(None, 0.0)
        self._respond({}, _Answer(f"I heard nothing for {idle_ms / 1000:.0f} seconds."), now)

    # --- responses ---------------------------------------------------------------------------

    def _respond(self, wanted: Event, answer: _Answer, now: float) -> None:
        if self._reply is not None:
            raise Refused(
                "conversation_already_has_active_response",
                f"Conversation already has an active response in progress: {self._reply.id}.",
            )
        modalities = wanted.get("output_modalities")
        if modalities is None:
            modalities = self._session["output_modalities"]
        modalities = realtime.checked(modalities, Modalities, "response.output_modalities")
        if "audio" not in modalities or not answer.pcm:
            answer, modalities = _Answer(answer.words), ["text"]
        self._idle_from = None
        self._reply = reply = _Reply(
            self._id("resp"),
            self._id("item"),
            self._history.last_id,
            modalities,
            wanted.get("metadata"),
            answer,
            now,
        )
        self._emit("response.created", response=self._response("in_progress", None, []))
        item = message(reply.item_id, "assistant", "in_progress")
        self._emit("response.output_item.added", **reply.place(content=False), item=item)
        self._history.put(item, reply.before)
        self._emit("conversation.item.added", previous_item_id=reply.before, item=item)
        self._emit("response.content_part.added", **reply.place(), part=reply.part(""))
        self._utter(reply, now)
        self._emit(f"{reply.text_event}.delta", **reply.place(), delta=answer.words)
        self._speak(now)

    def _speak(self, now: float) -> None:
        if self._reply is not None:
            self._utter(self._reply, now)
            if self._reply.said == len(self._reply.answer.pcm):
                self._finish(self._reply, now, None)

    def _utter(self, reply: _Reply, now: float) -> None:
        """Emit audio until the lead is reached or all is said."""
        due = int((now - reply.begun) * 1000 + LEAD_MS) * MS_OCTETS
        end = len(reply.answer.pcm)
        while reply.said < end and reply.said < due:
            delta = reply.answer.pcm[reply.said : reply.said + DELTA_MS * MS_OCTETS]
            reply.said += len(delta)
            self._emit("response.output_audio.delta", **reply.place(), delta=delta)
        remembered = self._history.get(reply.item_id)
        if remembered is not None:
            remembered.audio_ms = reply.said // MS_OCTETS

    def _finish(self, reply: _Reply, now: float, reason: str | None) -> None:
        """End the response: completed, or cancelled for a reason."""
        words = reply.answer.words
        name = "transcript" if reply.answer.pcm else "text"
        if reply.answer.pcm:
            self._emit("response.output_audio.done", **reply.place())
        self._emit(f"{reply.text_event}.done", **reply.place(), **{name: words})
        part = reply.part(words)
        self._emit("response.content_part.done", **reply.place(), part=part)
        item = message(reply.item_id, "assistant", "incomplete" if reason else "completed", part)
        self._emit("response.output_item.done", **reply.place(content=False), item=item)
        if self._history.get(reply.item_id) is not None:  # else a client deleted it meanwhile
            self._history.put(item)
        self._emit("conversation.item.done", previous_item_id=reply.before, item=item)
        details = {"type": "cancelled", "reason": reason} if reason else None
        response = self._response("cancelled" if reason else "completed", details, [item])
        self._emit("response.done", response=response)
        self._reply = None
        if reason is None:
            self._idle_from = max(now, reply.begun + reply.said / MS_OCTETS / 1000)

    def _response(self, status: str, details: Event | None, output: list[Event]) -> Event:
        reply = self._reply
        assert reply is not None
        return {
            "object": "realtime.response",
            "id": reply.id,
            "status": status,
            "status_details": details,
            "output": output,
            "conversation_id": f"conv_{self._tag}",
            "output_modalities": reply.modalities,
            "max_output_tokens": self._session["max_output_tokens"],
            "audio": {"output": self._session["audio"]["output"]},
            "usage": _NO_TOKENS if status != "in_progress" else None,
            "metadata": reply.metadata,
        }

    # --- client events -----------------------------------------------------------------------

    def _on_unknown(self, event: Event, now: float) -> None:
        raise Refused(
            "invalid_value", f"The parrot does not know {event.get('type')!r:.80}.", "type"
        )

    def _on_session_update(self, event: Event, now: float) -> None:
        before = self._rule
        self._configure(field(event, "session", dict))
        if before is None or self._rule is None or before.idle_timeout_ms is None:
            # Silence is counted from when it began to matter.
            self._idle_from = None if self._idle_from is None else max(self._idle_from, now)
        self._emit("session.updated", session=self._session)

    def _configure(self, update: Event) -> None:
        self._session, detection = realtime.configured(self._session, update)
        rule = by_sound(detection)
        if (rule is None) != (self._rule is None):
            self._ear.forget()  # a turn half heard by the one rule is none by the other
            self._heard_id = ""
        self._rule = rule

    def _on_append(self, event: Event, now: float) -> None:
        text = field(event, "audio", str)
        try:
            pcm = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("invalid_value", "The audio is not base64.", "audio") from None
        if len(pcm) > APPEND_MS_MAX * MS_OCTETS or len(pcm) % 2:
            limit = f"Expected whole samples of PCM16, at most {APPEND_MS_MAX} ms at {RATE_HZ} Hz."
            raise Refused("invalid_value", limit, "audio")
        self._hear(pcm, now)

    def _on_commit(self, event: Event, now: float) -> None:
        # With turn detection on, what is kept while nobody speaks is padding and no turn.
        listening = self._rule is None or self._ear.speaking
        held_ms = self._ear.buffered_ms if listening else 0
        if held_ms < COMMIT_MS_MIN:
            raise Refused(
                "input_audio_buffer_commit_empty",
                f"Error committing input audio buffer: buffer too small. Expected at least"
                f" {COMMIT_MS_MIN}ms of audio, but buffer only has {held_ms}ms of audio.",
            )
        self._commit_turn(self._ear.take(), "speech" if self._rule else "sound")

    def _on_clear(self, event: Event, now: float) -> None:
        self._ear.forget()
        self._heard_id = ""
        self._emit("input_audio_buffer.cleared")

    def _on_respond(self, event: Event, now: float) -> None:
        self._respond(field(event, "response", dict, {}), self._answer, now)

    def _on_cancel(self, event: Event, now: float) -> None:
        reply = self._reply
        if reply is None or field(event, "response_id", str, reply.id) != reply.id:
            raise Refused(
                "response_cancel_not_active", "Cancellation failed: no active response found"
            )
        self._finish(reply, now, "client_cancelled")

    def _on_create(self, event: Event, now: float) -> None:
        item = dict(field(event, "item", dict))
        item_id = item["id"] = field(item, "id", str, "") or self._id("item")
        if len(item_id) > ID_CHARACTERS_MAX or self._history.get(item_id) is not None:
            raise Refused("invalid_value", "The id is too long or taken.", "item.id")
        before = field(event, "previous_item_id", str, self._history.last_id or "root")
        if before != "root" and self._history.get(before) is None:
            raise Refused("invalid_value", f"No item {before[:80]!r}.", "previous_item_id")
        if field(item, "type", str) == "message":
            item["content"], characters = _without_audio(field(item, "content", list))
            if item.get("role") == "user":
                self._answer = _Answer(
                    f"I read {characters} characters of text. I can repeat only what I hear."
                )
        self._add_item(
            item | {"object": "realtime.item", "status": "completed"},
            None if before == "root" else before,
        )

    def _on_retrieve(self, event: Event, now: float) -> None:
        found = self._find(event, "item_retrieve_invalid_item_id")
        self._emit("conversation.item.retrieved", item=found.item)

    def _on_delete(self, event: Event, now: float) -> None:
        item_id = self._find(event, "item_delete_invalid_item_id").item["id"]
        self._history.drop(item_id)
        self._emit("conversation.item.deleted", item_id=item_id)

    def _on_truncate(self, event: Event, now: float) -> None:
        found = self._find(event, "item_truncate_invalid_item_id")
        end_ms = field(event, "audio_end_ms", int)
        index = field(event, "content_index", int, 0)
        if index != 0 or not 0 <= end_ms <= found.audio_ms:
            limit = f"Content 0 of this item has {found.audio_ms} ms of audio."
            raise Refused("invalid_value", limit, "audio_end_ms" if index == 0 else "content_index")
        parts = found.item.get("content", [])
        if found.item.get("role") != "assistant" or any("text" in part for part in parts):
            raise Refused("invalid_value", "Only what was spoken can be truncated.", "item_id")
        found.audio_ms = end_ms
        item_id = found.item["id"]
        # What was not heard must not be remembered as said.
        part = {"type": "output_audio", "transcript": None}
        self._history.put(found.item | {"content": [part]})
        self._emit(
            "conversation.item.truncated", item_id=item_id, content_index=0, audio_end_ms=end_ms
        )

    # --- items, ids, events ------------------------------------------------------------------

    def _find(self, event: Event, code: str) -> Remembered:
        item_id = field(event, "item_id", str)
        found = self._history.get(item_id)
        if found is None:
            raise Refused(code, f"No item {item_id[:80]!r} in the conversation.", "item_id")
        return found

    def _add_item(self, item: Event, before: str | None) -> None:
        self._history.put(item, before)
        self._emit("conversation.item.added", previous_item_id=before, item=item)
        self._emit("conversation.item.done", previous_item_id=before, item=item)

    def _id(self, kind: str) -> str:
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}_{self._tag}{count:04d}"

    def _emit(self, kind: str, **fields: Any) -> None:
        self._out.append({"type": kind, "event_id": self._id("event"), **fields})

    def _refuse(self, refused: Refused, event_id: object) -> None:
        self._emit("error", error=realtime.error(refused, event_id))

    def _drain(self) -> list[Event]:
        out, self._out = self._out, []
        return out


def _without_audio(content: list[Any]) -> tuple[list[Event], int]:
    """Content parts without their sound, and the characters of their text."""
    parts, characters = [], 0
    for part in content:
        if not isinstance(part, dict):
            raise Refused("invalid_type", "A content part is an object.", "item.content")
        characters += len(field(part, "text", str, ""))
        parts.append({name: value for name, value in part.items() if name != "audio"})
    return parts, characters


_HANDLERS: dict[str, Callable[[Parrot, Event, float], None]] = {
    "session.update": Parrot._on_session_update,
    "input_audio_buffer.append": Parrot._on_append,
    "input_audio_buffer.commit": Parrot._on_commit,
    "input_audio_buffer.clear": Parrot._on_clear,
    "response.create": Parrot._on_respond,
    "response.cancel": Parrot._on_cancel,
    "conversation.item.create": Parrot._on_create,
    "conversation.item.retrieve": Parrot._on_retrieve,
    "conversation.item.delete": Parrot._on_delete,
    "conversation.item.truncate": Parrot._on_truncate,
}
