"""The channel: events to one client, as JSON, in an order that it can rely on.

What it owns: the way of an event from a dictionary to a message of the data channel; what waits for
the channel to open, and what waits for a sound.

Rules that stay true:
- `session.created` is the first message; what is said before it waits, bounded, and of too much the
  oldest is dropped.
- Every message has an `event_id` and is no longer than the client takes. What JSON cannot say, or
  not that shortly, becomes an `error`: nothing disappears unseen. Of a session the long fields are
  left out instead.
- While events are held, only what overtakes them goes out; they follow in their order, after
  HOLD_S_MAX at the latest.

It does not know what the events mean: that is `conversation.py`. Sans-IO.
"""

from collections import deque
from collections.abc import Callable

import orjson

import realtime
from realtime import Event, Refused

SERVER_MESSAGE_OCTETS_MAX = 262_144
"""Of one event to the client; a browser closes a channel that brings more than it announced, and
clients that announce nothing take 64 kB."""

SHOWN_OCTETS_MAX = 4_096
"""Of a field of a session whose JSON is too long for the client as a whole. What is left out then
are instructions and tools: it knows them, having set them."""

BACKLOG_OCTETS_MAX = 262_144
"""Messages that wait for the channel to open, the oldest dropped first: a greeting, of a client
that may never open one."""

HOLD_S_MAX = 0.1
"""How long events wait for the first packet of their audio, so that .started comes before them. It
leaves in the same moment; later than this something is wrong and the order matters less."""

HELD_CHARACTERS_MAX = 1 << 20
"""What is held meanwhile: a transcript and some tool calls. Of a backend that sends more than this
in a tenth of a second the order matters less."""


class Channel:
    """One client's messages. Methods that need the time take monotonic seconds as `now`."""

    def __init__(
        self,
        tag: str,
        octets_max: int = SERVER_MESSAGE_OCTETS_MAX,
        overheard: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Ids of events are made of `tag`, which is this session's alone.

        `octets_max` is the client's own limit of a message; 0 is none. `overheard` gets every
        message when its time comes, session.created excepted, whether the channel is open or not.
        """
        self._overheard = overheard
        self._tag = tag
        self._octets_max = min(octets_max or SERVER_MESSAGE_OCTETS_MAX, SERVER_MESSAGE_OCTETS_MAX)
        self._events = 0
        self._closed = False
        self._opened = False
        self._created: str | None = None  # session.created, until the channel takes it
        self.live = False
        """Whether session.created is out."""
        self._backlog: deque[str] = deque()
        self._backlog_octets = 0
        self._held: list[str] | None = None
        self._held_characters = 0
        self._held_until = 0.0
        self._out: list[str] = []

    def open(self) -> None:
        """The client takes messages from now on."""
        self._opened = True
        self._go_live()

    def close(self) -> None:
        """Nothing more comes out, and what waited is freed."""
        self._closed = True
        self._out, self._held, self._created = [], None, None
        self._backlog.clear()

    def create(self, event: Event) -> None:
        """Say `session.created`: once, the first time; another one is news to nobody."""
        if self._created is None and not self.live:
            self._created = self.message(event)
            self._go_live()

    def create_again(self, event: Event) -> None:
        """Say `session.created` to a client that has opened another channel; nobody else hears."""
        if not self._closed:
            self._out.append(self.message(event))

    def say(self, event: Event) -> None:
        """Tell the client, after all that was said before."""
        message = self.message(event)
        if self._held is None:
            self._deliver(message)
            return
        self._held.append(message)
        self._held_characters += len(message)
        if self._held_characters > HELD_CHARACTERS_MAX:
            self.release()

    def overtake(self, event: Event) -> None:
        """Tell the client before what is held."""
        self._deliver(self.message(event))

    def error(
        self, refused: Refused, event_id: object = None, kind: str = "invalid_request_error"
    ) -> None:
        """Say that something was refused: `event_id` is the client's, if it gave one."""
        self.say({"type": "error", "error": realtime.error(refused, event_id, kind)})

    def hold(self, now: float) -> None:
        """Keep what is said from now on until `release`, or until it has waited for too long."""
        if self._held is None:
            self._held, self._held_until = [], now + HOLD_S_MAX

    def release(self) -> None:
        """Let go what is held."""
        held, self._held = self._held, None
        self._held_characters = 0
        for message in held or ():
            self._deliver(message)

    def tick(self, now: float) -> None:
        """Let time pass."""
        if self._held is not None and now >= self._held_until:
            self.release()

    def take(self) -> list[str]:
        """The messages to send, in order. None before the channel is open. Drains."""
        out, self._out = self._out, []
        return out

    def next_id(self, kind: str) -> str:
        """An id that no other event of this session has."""
        self._events += 1
        return f"{kind}_{self._tag}{self._events:04d}"

    def message(self, event: Event) -> str:
        """An event as JSON, as any listener of this session may see it."""
        event_id = event.get("event_id")
        if not isinstance(event_id, str):
            event_id = self.next_id("event")
        message = _json(event | {"event_id": event_id})
        fits = 0 < len(message) <= self._octets_max
        if not fits and isinstance(session := event.get("session"), dict):
            brief = {k: v for k, v in session.items() if 0 < len(_json(v)) <= SHOWN_OCTETS_MAX}
            message = _json(event | {"event_id": event_id, "session": brief})
        if 0 < len(message) <= self._octets_max:
            return message.decode()
        wrong = Refused("server_event_lost", "An event of the backend could not be passed on.")
        lost = {"type": "error", "error": realtime.error(wrong, None, "server_error")}
        return orjson.dumps(lost | {"event_id": self.next_id("event")}).decode()

    def _deliver(self, message: str) -> None:
        if self._closed:
            return
        self._overheard(message)
        if self.live:
            self._out.append(message)
            return
        self._backlog.append(message)
        self._backlog_octets += len(message)
        while self._backlog_octets > BACKLOG_OCTETS_MAX:
            self._backlog_octets -= len(self._backlog.popleft())

    def _go_live(self) -> None:
        if self._closed or not self._opened or self._created is None:
            return
        self.live = True
        self._out += [self._created, *self._backlog]
        self._created = None
        self._backlog.clear()


def _json(value: object) -> bytes:
    """Empty for what JSON cannot say."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b""
