"""RTVI: the messages of Pipecat's clients, in front of a conversation that speaks Realtime events.

    client-ready ──▶ bot-ready          send-text ──▶ item, response
    speech_started ──▶ user-started-speaking    transcript ──▶ user-transcription, bot-output, …
    output_audio_buffer.started, .stopped, .cleared ──▶ bot-started-speaking, bot-stopped-speaking

Every message is `{"label": "rtvi-ai", "type", "id", "data"}`. Beside them a client's transport says
`ping: …` once a second and `{"type": "signalling", "message"}`, which need no answer.

What it owns: what each message means as events, and each event as messages; the sentences of a
reply, which that API has and the other has not.

Rules that stay true:
- `bot-ready` answers every `client-ready`, with its id, as soon as there is a session. Nothing else
  waits for it: a client that has changed its transport does not say it again.
- The bot speaks from the first packet that is sent to the last. What is written of its words comes
  before them: a sentence is `new` when it has been generated, and `completed` once all of its reply
  has been played; one that was interrupted is never completed.
- What is wrong with a message is an `error-response` with that message's id; what is wrong for no
  message of the client's is an `error`, `fatal` if the call ends by it.
- All that is remembered here is bounded; the oldest is forgotten.

The client's `client-message` may be any client event of the Realtime API, its type in `t`, the rest
in `d`: pages can so do what RTVI has no word for. Sans-IO.

https://docs.pipecat.ai/client/rtvi-standard, and where it differs `@pipecat-ai/client-js` 1.13.
"""

import datetime
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson

import realtime
from realtime import Event, Refused
from sentences import Sentences

VERSION = "2.1.0"
"""Of the protocol, as `@pipecat-ai/client-js` 1.13 speaks it."""

LEGACY = "1"
"""Clients of this major version are told their own version, and of the bot's words in the way that
they know: as spoken, with no progress."""

LABEL = "rtvi-ai"

USER_ID = "user"
"""Who speaks, in transcriptions: there is one."""

ID_CHARACTERS_MAX = 128
"""Of a message's id, which is echoed. Clients' have 8 or 36."""

REPLIES_MAX = 16
"""Replies whose sentences are remembered until they have been played. There are one or two."""

TRANSCRIPTS_MAX = 8
"""Turns of the user that are being transcribed at the same time."""

TRANSCRIPT_CHARACTERS_MAX = 16_384
"""Of an unfinished transcript. The whole one comes at the end, whatever its length."""

CALLS_MAX = 64
"""Function calls and requests that wait for their answers."""

_FATAL = frozenset(("session_expired", "backend_lost", "internal_error"))

_ANSWERS = {
    "session.update": "session.updated",
    "conversation.item.retrieve": "conversation.item.retrieved",
}
"""Client events with an answer of their own. Other requests are answered when they are made."""

V = TypeVar("V")


class Rtvi:
    """One client's messages: an adapter (adapters.py). Methods take monotonic seconds as `now`."""

    leaves = False
    """The client has asked to end the call."""

    def __init__(self, unix_offset_s: float, resumed: bool) -> None:
        """`unix_offset_s` added to `now` is the time of day.

        In a `resumed` conversation the client may believe that a reply is still being spoken.
        """
        self._unix_offset_s = unix_offset_s
        self._now = 0.0
        self._resumed = resumed
        self._legacy = False
        self._calls_once = False  # before 1.2 a function call was one message
        self._version = VERSION
        self._waiting: str | None = None  # id of a client-ready that came before the session
        self._created = False
        self._speaking = False
        self._segments = 0
        self._replies: dict[str, Sentences] = {}
        self._heard: dict[str, str] = {}  # unfinished transcripts by item
        self._making: dict[str, None] = {}  # responses that are being generated
        self._calls: dict[str, str] = {}  # function calls without a result: id and name
        self._requests: dict[str, str] = {}  # client-messages without an answer: id and type
        self._owed: Event | None = None  # a response.create that waits for its predecessor's end
        self._asked: list[str] = []
        self._out: list[str] = []

    # --- the adapter -----------------------------------------------------------------------------

    def from_client(self, message: str | bytes, now: float) -> Sequence[str | bytes]:
        """What a message means as client events; answers come with `to_client`."""
        self._now = now
        if message[:4] in ("ping", b"ping"):
            return ()
        try:
            found = realtime.parsed(message)
            if found.get("type") == "signalling":
                return ()  # which of its tracks are on: a track that is off sends silence
            message_id, kind = _envelope(found)
        except Refused as refused:
            self._error(str(refused), fatal=False)
            return ()
        heard, data = _HEARD.get(kind), found.get("data")
        if heard is None:
            self._refuse(message_id, f"Unsupported type {kind[:80]!r}.")
            return ()
        try:
            heard(self, message_id, data if isinstance(data, dict) else {})
        except Refused as refused:
            self._refuse(message_id, str(refused))
        return self.asked()

    def to_client(self, events: list[str], now: float) -> list[str]:
        """Server events as messages, and what else there is to say."""
        self._now = now
        for each in events:
            event = orjson.loads(each)
            if (plain := _PLAIN.get(event["type"])) is not None:
                self._tell(plain)
            elif (told := _TOLD.get(event["type"])) is not None:
                told(self, event)
        out, self._out = self._out, []
        return out

    def asked(self) -> Sequence[str]:
        """Client events that have become possible. Drains."""
        asked, self._asked = self._asked, []
        return asked

    def farewell(self) -> Sequence[str]:
        """The bot has left: the client disconnects, and does not try to come back."""
        left = {"type": "signalling", "message": {"type": "peerLeft"}}
        return [orjson.dumps(left).decode()]

    # --- from the client -------------------------------------------------------------------------

    def _client_ready(self, message_id: str, data: Event) -> None:
        version = str(data.get("version"))[:ID_CHARACTERS_MAX]
        major, _, rest = version.partition(".")
        self._legacy = major == LEGACY
        self._calls_once = self._legacy and rest.partition(".")[0] in ("0", "1")
        self._version = version if self._legacy else VERSION
        if major not in (LEGACY, VERSION.partition(".")[0]):
            wrong = f"RTVI {VERSION} is spoken here: your {version[:16]} may not fit."
            self._refuse(message_id, wrong)
        self._waiting = message_id
        self._ready()

    def _disconnect_bot(self, message_id: str, data: Event) -> None:
        self.leaves = True

    def _send_text(self, message_id: str, data: Event) -> None:
        content, options = realtime.field(data, "content", str), data.get("options")
        options = options if isinstance(options, dict) else {}
        at_once = options.get("run_immediately", True) is not False
        self._say("user", content, message_id, at_once=at_once)
        if at_once:
            aloud = options.get("audio_response", True) is not False
            self._respond(message_id, {} if aloud else {"output_modalities": ["text"]})

    def _append_to_context(self, message_id: str, data: Event) -> None:
        role, content = realtime.field(data, "role", str), data.get("content")
        if role not in ("user", "assistant", "system"):
            raise Refused("invalid_value", "A role is user, assistant or system.", "role")
        text = content if isinstance(content, str) else orjson.dumps(content).decode()
        at_once = data.get("run_immediately") is True
        self._say(role, text, message_id, at_once=at_once)
        if at_once:
            self._respond(message_id, {})

    def _client_message(self, message_id: str, data: Event) -> None:
        kind, fields = realtime.field(data, "t", str), data.get("d")
        if kind not in realtime.CLIENT_EVENTS:
            known = "a client event of the Realtime API is"
            raise Refused("invalid_value", f"Nobody here understands {kind[:80]!r}: {known}.")
        self._ask(kind, message_id, fields if isinstance(fields, dict) else {})
        if kind in _ANSWERS:
            _remember(self._requests, message_id, kind, CALLS_MAX)
        else:
            self._respond_to(message_id, kind, None)

    def _function_result(self, message_id: str, data: Event) -> None:
        call_id, result = realtime.field(data, "tool_call_id", str), data.get("result")
        output = result if isinstance(result, str) else orjson.dumps(result).decode()
        item = {"type": "function_call_output", "call_id": call_id, "output": output}
        self._ask("conversation.item.create", message_id, {"item": item})
        name = self._calls.pop(call_id, data.get("function_name"))
        stopped = {"tool_call_id": call_id, "function_name": name, "cancelled": False}
        self._tell("llm-function-call-stopped", stopped | {"result": result})
        if not self._calls:  # the model wants the results of all that it called
            self._respond(message_id, {})

    def _say(self, role: str, text: str, message_id: str, *, at_once: bool) -> None:
        """Text into the conversation; an interruption before it, if it is to be answered."""
        if at_once and (self._speaking or self._making):
            self._ask("output_audio_buffer.clear", message_id, {})
        part = "output_text" if role == "assistant" else "input_text"
        content = [{"type": part, "text": text}]
        item = {"type": "message", "role": role, "content": content}
        self._ask("conversation.item.create", message_id, {"item": item})
        if role == "user":
            self._tell("user-llm-text", {"text": text})

    def _respond(self, message_id: str, response: Event) -> None:
        """Ask for a response; after the one that is being made, since there is one at a time."""
        event = {"type": "response.create", "event_id": message_id, "response": response}
        if self._making:
            self._owed = event
        else:
            self._asked.append(orjson.dumps(event).decode())

    def _ask(self, kind: str, message_id: str, fields: Event) -> None:
        event = fields | {"type": kind, "event_id": message_id}
        self._asked.append(orjson.dumps(event).decode())

    # --- from the conversation -------------------------------------------------------------------

    def _session_created(self, event: Event) -> None:
        self._created = True
        if self._resumed:  # whatever was being said was cut off with the transport
            self._resumed = False
            self._tell("bot-stopped-speaking")
        self._ready()

    def _transcribing(self, event: Event) -> None:
        """A piece of a transcript: clients want all that there is of it."""
        item_id, delta = event.get("item_id"), event.get("delta")
        if not (isinstance(item_id, str) and isinstance(delta, str)):
            return
        text = (self._heard.get(item_id, "") + delta)[:TRANSCRIPT_CHARACTERS_MAX]
        _remember(self._heard, item_id, text, TRANSCRIPTS_MAX)
        self._tell("user-transcription", self._transcript(text, final=False))

    def _transcribed(self, event: Event) -> None:
        self._heard.pop(str(event.get("item_id")), None)
        text = event.get("transcript")
        if isinstance(text, str) and text.strip():
            self._tell("user-transcription", self._transcript(text, final=True))
            self._tell("user-llm-text", {"text": text})

    def _response_created(self, event: Event) -> None:
        _remember(self._making, _id_of(event, "response"), None, REPLIES_MAX)
        self._calls.clear()  # the conversation has gone on without their results
        self._tell("bot-llm-started")

    def _output_item_added(self, event: Event) -> None:
        item = event.get("item")
        if isinstance(item, dict) and item.get("type") == "function_call":
            self._tell("llm-function-call-started", {"function_name": item.get("name")})

    def _output_item_done(self, event: Event) -> None:
        item = event.get("item")
        if not (isinstance(item, dict) and item.get("type") == "function_call"):
            return
        call_id, name = item.get("call_id"), item.get("name")
        if not (isinstance(call_id, str) and isinstance(name, str)):
            return
        called = {"tool_call_id": call_id, "function_name": name}
        if item.get("status") == "incomplete":
            self._tell("llm-function-call-stopped", called | {"cancelled": True})
            return
        _remember(self._calls, call_id, name, CALLS_MAX)
        arguments = _object(item.get("arguments"))
        if self._calls_once:
            self._tell("llm-function-call", called | {"args": arguments})
        else:
            self._tell("llm-function-call-in-progress", called | {"arguments": arguments})

    def _part_added(self, event: Event) -> None:
        part = event.get("part")
        if isinstance(part, dict) and part.get("type") in ("audio", "output_audio"):
            self._tell("bot-tts-started")

    def _text(self, event: Event) -> None:
        """A piece of a reply: of what is said, or of what is only written."""
        spoken = not event["type"].startswith("response.output_text.")
        response_id, delta = event.get("response_id"), event.get("delta")
        if not (isinstance(response_id, str) and isinstance(delta, str)):
            return
        self._tell("bot-llm-text", {"text": delta})
        if spoken:
            self._tell("bot-tts-text", {"text": delta})
        reply = self._replies.get(response_id)
        if reply is None:
            reply = Sentences(spoken=spoken)
            _remember(self._replies, response_id, reply, REPLIES_MAX)
        self._sentences(reply, reply.add(delta))

    def _text_done(self, event: Event) -> None:
        reply = self._replies.get(str(event.get("response_id")))
        if reply is not None:
            self._sentences(reply, reply.end())
            return
        spoken = event["type"] != "response.output_text.done"  # by a server that says it at once
        self._text(event | {"delta": event.get("transcript" if spoken else "text")})

    def _response_done(self, event: Event) -> None:
        response_id = _id_of(event, "response")
        self._making.pop(response_id, None)
        reply = self._replies.get(response_id)
        if reply is not None:
            self._sentences(reply, reply.end())
            if not reply.told:
                del self._replies[response_id]
        self._tell("bot-llm-stopped")
        if self._owed is not None and not self._making:
            self._asked.append(orjson.dumps(self._owed).decode())
            self._owed = None

    def _started(self, event: Event) -> None:
        self._speaking = True
        self._tell("bot-started-speaking")

    def _stopped(self, event: Event) -> None:
        reply = self._replies.pop(str(event.get("response_id")), None)
        for number, text in reply.told if reply is not None and not self._legacy else ():
            self._tell("bot-output", _output(number, text, "completed"))
        self._silent()

    def _cleared(self, event: Event) -> None:
        reply = self._replies.get(str(event.get("response_id")))
        if reply is not None:
            reply.told.clear()
        if self._speaking:
            self._tell("bot-interrupted")
        self._silent()

    def _silent(self) -> None:
        if self._speaking:
            self._speaking = False
            self._tell("bot-stopped-speaking")

    def _answered(self, event: Event) -> None:
        """An event that answers a client-message, perhaps one of ours."""
        for message_id, kind in self._requests.items():
            if _ANSWERS[kind] == event["type"]:
                del self._requests[message_id]
                found = {k: v for k, v in event.items() if k not in ("type", "event_id")}
                self._respond_to(message_id, kind, found)
                return

    def _wrong(self, event: Event) -> None:
        error = event.get("error")
        error = error if isinstance(error, dict) else {}
        message = str(error.get("message") or "Something went wrong.")
        message_id = error.get("event_id")
        if isinstance(message_id, str):
            self._requests.pop(message_id, None)
            self._refuse(message_id, message)
        else:
            self._error(message, fatal=error.get("code") in _FATAL)

    # --- to the client ---------------------------------------------------------------------------

    def _ready(self) -> None:
        if self._created and self._waiting is not None:
            about = {"library": "earshot"}
            ready = {"version": self._version, "about": about}
            self._tell("bot-ready", ready, self._waiting)
            self._waiting = None

    def _sentences(self, reply: Sentences, texts: list[str]) -> None:
        """Tell what a reply says, sentence by sentence."""
        for text in texts:
            self._segments += 1
            self._tell("bot-transcription", {"text": text})
            if self._legacy:
                heard = {"text": text, "spoken": reply.spoken, "aggregated_by": "sentence"}
                self._tell("bot-output", heard)
            elif reply.spoken:
                self._tell("bot-output", _output(self._segments, text, "new"))
                reply.tell(self._segments, text)
            else:
                self._tell("bot-output", _output(self._segments, text, None))

    def _transcript(self, text: str, *, final: bool) -> Event:
        at = datetime.datetime.fromtimestamp(self._unix_offset_s + self._now, datetime.UTC)
        timestamp = at.isoformat(timespec="milliseconds")
        return {"text": text, "final": final, "timestamp": timestamp, "user_id": USER_ID}

    def _respond_to(self, message_id: str, kind: str, found: Any) -> None:
        self._tell("server-response", {"t": kind, "d": found}, message_id)

    def _refuse(self, message_id: str, wrong: str) -> None:
        self._tell("error-response", {"error": wrong}, message_id)

    def _error(self, wrong: str, *, fatal: bool) -> None:
        # `message` is what clients before 1.0 show.
        self._tell("error", {"error": wrong, "message": wrong, "fatal": fatal})

    def _tell(self, kind: str, data: Any = None, message_id: str | None = None) -> None:
        message: Event = {"label": LABEL, "type": kind}
        if message_id is not None:
            message["id"] = message_id
        if data is not None:
            message["data"] = data
        self._out.append(orjson.dumps(message).decode())


_HEARD = {
    "client-ready": Rtvi._client_ready,
    "disconnect-bot": Rtvi._disconnect_bot,
    "send-text": Rtvi._send_text,
    "append-to-context": Rtvi._append_to_context,
    "client-message": Rtvi._client_message,
    "llm-function-call-result": Rtvi._function_result,
}
"""What is understood of a client."""

_PLAIN = {
    "input_audio_buffer.speech_started": "user-started-speaking",
    "input_audio_buffer.speech_stopped": "user-stopped-speaking",
    "response.output_audio.done": "bot-tts-stopped",
}
_TOLD = {
    "session.created": Rtvi._session_created,
    "session.updated": Rtvi._answered,
    "conversation.item.retrieved": Rtvi._answered,
    "conversation.item.input_audio_transcription.delta": Rtvi._transcribing,
    "conversation.item.input_audio_transcription.completed": Rtvi._transcribed,
    "response.created": Rtvi._response_created,
    "response.output_item.added": Rtvi._output_item_added,
    "response.output_item.done": Rtvi._output_item_done,
    "response.content_part.added": Rtvi._part_added,
    "response.output_audio_transcript.delta": Rtvi._text,
    "response.output_audio_transcript.done": Rtvi._text_done,
    "response.output_text.delta": Rtvi._text,
    "response.output_text.done": Rtvi._text_done,
    "response.done": Rtvi._response_done,
    "output_audio_buffer.started": Rtvi._started,
    "output_audio_buffer.stopped": Rtvi._stopped,
    "output_audio_buffer.cleared": Rtvi._cleared,
    "error": Rtvi._wrong,
}
"""What a client is told of. Of the rest RTVI knows nothing."""


def _output(number: int, text: str, status: str | None) -> Event:
    """A sentence of the bot's; without a status one that is only written."""
    said: Event = {"text": text, "aggregated_by": "sentence", "segment_id": number}
    if status is None:
        return said | {"spoken": False, "will_be_spoken": False, "spoken_status": "new"}
    done = status == "completed"
    progress = {"accumulated_text": text if done else "", "remaining_text": "" if done else text}
    return said | {
        "spoken": done,
        "will_be_spoken": True,
        "spoken_status": status,
        "spoken_progress": progress,
    }


def _envelope(message: Event) -> tuple[str, str]:
    """A message's id and type. Raises Refused if it is none of RTVI's."""
    if message.get("label") != LABEL:
        raise Refused("invalid_value", f"This is no message with the label {LABEL}.")
    message_id = realtime.field(message, "id", str)
    if len(message_id) > ID_CHARACTERS_MAX:
        raise Refused("invalid_value", f"An id has at most {ID_CHARACTERS_MAX} characters.")
    return message_id, realtime.field(message, "type", str)


def _remember(among: dict[str, V], key: str, value: V, most: int) -> None:
    """The newest are kept."""
    among[key] = value
    while len(among) > most:
        del among[next(iter(among))]


def _id_of(event: Event, name: str) -> str:
    found = event.get(name)
    return str(found.get("id")) if isinstance(found, dict) else ""


def _object(text: object) -> Event:
    """A function's arguments: JSON in text, by a model."""
    try:
        found = orjson.loads(text) if isinstance(text, str) else None
    except orjson.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else {}
