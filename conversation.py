"""conversation: signatures first."""

from typing import Any

import audio

Event = dict[str, Any]


class Conversation:
    """Between data channel, play-out and backend, sans-IO.

    After every call the owner drains both outputs: `to_client` into the data channel, `to_backend`
    into `Backend.send`. After `backend_event` it sends what `playout.send(now)` returns and calls
    `playout_events`, so that output_audio_buffer.started goes out with the first packet.
    """

    def __init__(self, session_id: str, playout: audio.Playout, now: float) -> None:
        raise NotImplementedError

    def opened(self, now: float) -> None:
        """The data channel is open."""
        raise NotImplementedError

    def client_message(self, message: str | bytes, now: float) -> None:
        """A data-channel message, text or binary; any bytes."""
        raise NotImplementedError

    def backend_event(self, event: Event, now: float) -> None:
        """An event from the backend (what `emit` got)."""
        raise NotImplementedError

    def playout_events(self, now: float) -> None:
        """Read playout.events(): call after each playout.send and in the sweep."""
        raise NotImplementedError

    def closed(self) -> None:
        """The session has ended."""
        raise NotImplementedError

    def to_client(self) -> list[str]:
        """JSON messages for the data channel, in order; empty before `opened`."""
        raise NotImplementedError

    def to_backend(self) -> list[Event]:
        """Events for Backend.send, in order."""
        raise NotImplementedError
