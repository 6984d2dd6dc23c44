"""The outbox: what waits for a model server, in its order and within its bounds.

A server that is away, or that does not read, must neither hold up a call nor make it grow. So
everything that a session has for its server passes through here, audio and events in one line:
a commit must not overtake the audio that it commits.

Rules that stay true:
- Of audio the oldest is dropped: a model that hears what was said ten seconds ago is of no use.
- Of events the newest is refused, while somebody can still be told so; none is dropped later.
- What is taken out has gone: nothing here knows whether it arrived.

Sans-IO.
"""

from collections import deque

import orjson

from realtime import Event

AUDIO_S_MAX = 2.0
"""Of the caller's audio that waits: over a slow moment, or a reconnection. More would only make
the answer later."""

EVENTS_MAX = 64
EVENTS_OCTETS_MAX = 1 << 20
"""Client events that wait, and what they take as JSON: a few of the largest. A client sends a few
in a minute."""


class Outbox:
    """PCM and events on their way to one server."""

    def __init__(self, rate_hz: int) -> None:
        """`rate_hz` is that of the PCM, 16-bit mono."""
        self.dropped_octets = 0
        """PCM that was too old to be sent."""
        self._waiting: deque[tuple[int, bytes | Event]] = deque()
        self._audio_octets_max = int(AUDIO_S_MAX * 2 * rate_hz)
        self._audio_octets = 0
        self._events = self._events_octets = 0

    def put_audio(self, pcm: bytes) -> bool:
        """Take PCM behind all that waits. False if older PCM had to go for it."""
        self._audio_octets += len(pcm)
        self._waiting.append((len(pcm), pcm))
        fits = self._audio_octets <= self._audio_octets_max
        while self._audio_octets > self._audio_octets_max:
            at = next(i for i, (_, what) in enumerate(self._waiting) if isinstance(what, bytes))
            octets = self._waiting[at][0]
            del self._waiting[at]
            self._audio_octets -= octets
            self.dropped_octets += octets
        return fits

    def put_event(self, event: Event) -> bool:
        """Take an event behind all that waits; False if there is no room for it.

        Raises TypeError for one that JSON cannot say.
        """
        octets = len(orjson.dumps(event))
        if self._events >= EVENTS_MAX or self._events_octets + octets > EVENTS_OCTETS_MAX:
            return False
        self._events += 1
        self._events_octets += octets
        self._waiting.append((octets, event))
        return True

    def take(self) -> bytes | Event | None:
        """What has waited longest: PCM, or an event; None if nothing waits."""
        if not self._waiting:
            return None
        octets, what = self._waiting.popleft()
        if isinstance(what, bytes):
            self._audio_octets -= octets
        else:
            self._events -= 1
            self._events_octets -= octets
        return what
