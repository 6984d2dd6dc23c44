"""parrot: signatures first."""

from typing import Any

RATE_HZ = 16_000

Event = dict[str, Any]


class Parrot:
    """Speaks the Realtime protocol, sans-IO. Each method returns the events to emit, in order."""

    rate_hz = RATE_HZ

    def __init__(self, tag: str, session: Event | None = None) -> None:
        raise NotImplementedError

    def start(self) -> list[Event]:
        """session.created (and an error, if the session that came with the offer is refused)."""
        raise NotImplementedError

    def receive_event(self, event: Event, now: float) -> list[Event]:
        """A client event."""
        raise NotImplementedError

    def receive_audio(self, pcm: bytes, now: float) -> list[Event]:
        """PCM16LE mono at 16 kHz, of any length."""
        raise NotImplementedError

    def tick(self, now: float) -> list[Event]:
        """Let time pass."""
        raise NotImplementedError
