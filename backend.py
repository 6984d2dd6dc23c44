"""Who answers the caller: one shape for every model server, and the choice between them.

A backend speaks the events of the Realtime API (https://developers.openai.com/api/reference/realtime),
as dictionaries with a "type". Audio stays binary inside this process: the `delta` of a
`response.output_audio.delta` is raw PCM16LE mono at the backend's `rate_hz`, in `bytes`; base64 is
for a wire, and there is none here.

Rules that stay true:
- A backend's events reach `emit` in the order in which it made them, one after another: a caller
  that sends to the backend from inside `emit` gets the answer once `emit` has returned, never in
  the middle of it.
- `session.created` comes first, and once. It may come from inside `connect`, so whatever `emit`
  reaches is there before `connect` is called.
- Nothing that a client sends makes `send` or `append` raise: what is wrong with it comes back as an
  `error` event, and the session goes on.

It does not know of data channels, of play-out, of who may see which event: that is
`conversation.py`. There are two kinds: the built-in parrot (`parrot.py`) in this process, and
model servers over the Realtime WebSocket (`uplink.py`).
"""

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import ledger
import parrot
import realtime
import settings
import uplink

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


class Backends:
    """The backends that the settings name, and what the sessions of a process share of them."""

    def __init__(
        self,
        default: settings.Backend,
        models: Sequence[settings.Model],
        counters: ledger.Counters,
        clock: Callable[[], float],
        timings: ledger.Histograms | None = None,
    ) -> None:
        """Raises SettingsError naming the table, the key and the reason if one cannot be used.

        Connects to nothing; needs no event loop yet.
        """
        self._uplinks = uplink.Uplinks(counters, clock, timings)
        self._default = _choice("backend", default)
        self._by_name = {
            table.name: _choice(f"model[{number}]", table) for number, table in enumerate(models)
        }

    def connect(
        self,
        session: Event | None,
        emit: Callable[[Event], None],
        lost: Callable[[str], None],
        past: Sequence[Event] = (),
    ) -> Backend:
        """Open a session at the backend for its `model`, or at the default one.

        `session` is the `session` object that came with the offer, or None; what is wrong in it
        comes back as an `error` event after `session.created`. `lost` is called once, with the
        reason as a sentence, when the backend is given up for good: nothing comes after that.
        `past` are items of a conversation that goes on in this one: the backend is told of them
        before anything else, and nothing is emitted about that.
        """
        name = session.get("model") if session else None
        chosen = self._default
        if isinstance(name, str):
            chosen = self._by_name.get(name, chosen)
        if chosen is not None:
            return self._uplinks.open(chosen, session, emit, lost, past)
        return InProcess(parrot.Parrot(secrets.token_hex(6), session), emit, past)

    async def close(self) -> None:
        """End all connections that sessions have left behind."""
        await self._uplinks.close()


def _choice(where: str, table: settings.Backend) -> uplink.Target | None:
    """A model server to connect to; None for the parrot."""
    if table.kind == "parrot":
        return None
    try:
        return uplink.Target(table)
    except settings.SettingsError as error:
        raise settings.SettingsError(f"{where}.{error}") from error


class InProcess:
    """The parrot as a Backend: calls go in, events come out before they return."""

    def __init__(
        self, mind: parrot.Parrot, emit: Callable[[Event], None], past: Sequence[Event] = ()
    ) -> None:
        self.rate_hz = mind.rate_hz
        self._mind: parrot.Parrot | None = mind
        self._emit = emit
        self._waiting: deque[Event] = deque()
        self._emitting = False
        begun = mind.start()
        for item in past:
            mind.receive_event({"type": "conversation.item.create", "item": item}, 0.0)
        self._deliver(begun)

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
        self._emit = _ignore  # it knows the session, which knows this: freed now, not collected

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


def _ignore(_: Event) -> None:
    """What a closed backend emits goes nowhere."""
