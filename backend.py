"""Who answers the caller: one shape for every model server, and the choice between them.

A backend speaks the events of the Realtime API (https://developers.openai.com/api/reference/realtime),
as dictionaries with a "type". Audio stays binary inside this process: the `delta` of a
`response.output_audio.delta` is raw PCM16LE mono at the backend's `rate_hz`, in `bytes`; base64 is
for a wire, and there is none here.

Rules that stay true:
- A backend's events reach `emit` in the order in which it made them, one after another: a caller
  that sends to the backend from inside `emit` gets the answer once `emit` has returned, never in
  the middle of it.
- `session.created` comes first. It may come from inside `connect`, so whatever `emit` reaches is
  there before `connect` is called.
- Nothing that a client sends makes `send` or `append` raise: what is wrong with it comes back as an
  `error` event, and the session goes on.

It does not know of data channels, of play-out, of who may see which event: that is
`conversation.py`. The built-in parrot (`parrot.py`) is the one kind there is so far.
"""

import secrets
from collections import deque
from collections.abc import Callable
from typing import Protocol

import parrot
import realtime
import settings

Event = realtime.Event


class Backend(Protocol):
    """A model server, seen from one session. Used from one thread, closed once."""

    rate_hz: int
    """Samples a second of the PCM16LE mono audio, both ways."""

    def send(self, event: Event, now: float) -> None:
        """Hand over a client event. `now` is monotonic seconds, as everywhere below."""

    def append(self, pcm: bytes, now: float) -> None:
        """Hand over what the caller said next: PCM16LE mono at `rate_hz`, of any length."""

    def tick(self, now: float) -> None:
        """Let time pass: to be called every 20 to 100 ms, also while no audio arrives."""

    def close(self) -> None:
        """End the session: nothing is emitted any more. Closing twice is harmless."""


def connect(
    chosen: settings.Backend, session: Event | None, emit: Callable[[Event], None]
) -> Backend:
    """Open a session at the backend that the settings name.

    `session` is the `session` object that came with the offer, or None; what is wrong in it comes
    back as an `error` event after `session.created`. Raises settings.SettingsError naming the key
    if there is no such kind of backend, so a transceiver can try it once at start.
    """
    if chosen.kind == "parrot":
        return InProcess(parrot.Parrot(secrets.token_hex(6), session), emit)
    raise settings.SettingsError(f'backend.kind: {chosen.kind!r} is unknown; there is "parrot"')


class InProcess:
    """The parrot as a Backend: calls go in, events come out before they return."""

    def __init__(self, mind: parrot.Parrot, emit: Callable[[Event], None]) -> None:
        self.rate_hz = mind.rate_hz
        self._mind: parrot.Parrot | None = mind
        self._emit = emit
        self._waiting: deque[Event] = deque()
        self._emitting = False
        self._deliver(mind.start())

    def send(self, event: Event, now: float) -> None:
        """See Backend."""
        if self._mind is not None:
            self._deliver(self._mind.receive_event(event, now))

    def append(self, pcm: bytes, now: float) -> None:
        """See Backend."""
        if self._mind is not None:
            self._deliver(self._mind.receive_audio(pcm, now))

    def tick(self, now: float) -> None:
        """See Backend."""
        if self._mind is not None:
            self._deliver(self._mind.tick(now))

    def close(self) -> None:
        """See Backend. The audio that the parrot remembers is freed with it."""
        self._mind = None
        self._waiting.clear()

    def _deliver(self, events: list[Event]) -> None:
        """Emit in order. If `emit` itself calls `send`, the outer loop goes on with what comes."""
        self._waiting.extend(events)
        if self._emitting:
            return
        self._emitting = True
        try:
            while self._waiting:
                self._emit(self._waiting.popleft())
        finally:
            self._emitting = False
