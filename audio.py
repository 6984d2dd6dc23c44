"""Audio between RTP and PCM: signatures first."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import rtp

QUEUE_S_MAX = 300.0
"""Audio waiting to be sent, in seconds of play-out."""


class SpeechEncoder(Protocol):
    """What Playout needs of a codec: opus.Encoder has it."""

    rate_hz: int

    def encode(self, pcm: bytes) -> bytes:
        """One 20 ms frame of PCM16LE mono to one payload."""


class SpeechDecoder(Protocol):
    """What Receiver needs of a codec: opus.Decoder has it."""

    rate_hz: int

    def decode(self, payload: bytes) -> bytes | None:
        """One payload to PCM16LE mono; None if it is malformed."""

    def conceal(self, samples: int) -> bytes:
        """Invent a lost frame of that many samples."""

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        """The lost frame before `payload`, from its in-band FEC; None if it carries none."""

    def reset(self) -> None:
        """Forget the stream so far: another one begins."""


class Receiver:
    """One caller's packets to PCM, in order."""

    def __init__(self, decoder: SpeechDecoder) -> None:
        self.received = 0
        self.late = 0
        self.duplicate = 0
        self.malformed = 0
        self.concealed = 0
        self.recovered = 0
        raise NotImplementedError

    def receive(self, packet: rtp.Packet, now: float) -> list[bytes]:
        """PCM16LE mono pieces that are now in order."""
        raise NotImplementedError

    def tick(self, now: float) -> list[bytes]:
        """What time alone releases; call it with backend.tick, every 20 to 100 ms: a packet behind
        a hole when no further one comes, and silence in real time while a sender with DTX sends
        nothing (for at most a named number of seconds), so that a backend's VAD hears the pause."""
        raise NotImplementedError


class Played(NamedTuple):
    """An item and how many milliseconds of it were sent."""

    item: str
    ms: int


class Started(NamedTuple):
    """The first packet of an item has been sent."""

    item: str


class Drained(NamedTuple):
    """The last packet of a finished item has been sent; `ms` is its length."""

    item: str
    ms: int


class Playout:
    """The reply's PCM to paced RTP packets; flushable, and exact about what was sent."""

    def __init__(
        self,
        encoder: SpeechEncoder,
        *,
        ssrc: int,
        payload_type: int,
        sequence: int,
        timestamp: int,
    ) -> None:
        self.ssrc = ssrc
        self.wakes_at: float | None = None
        """When send() has something; it may lie in the past: then send now."""
        self.packets_sent = 0
        self.octets_sent = 0
        self.last_timestamp = timestamp
        raise NotImplementedError

    def write(self, item: str, pcm: bytes, now: float) -> bool:
        """Append to an item. False if the queue is full: what fits is kept, the item ends there.
        Audio for an item that was finished or flushed is ignored (True)."""
        raise NotImplementedError

    def finish(self, item: str) -> None:
        """No more audio for this item."""
        raise NotImplementedError

    def send(self, now: float) -> list[bytes]:
        """RTP packets due now."""
        raise NotImplementedError

    def flush(self, now: float) -> list[Played]:
        """Drop all that is not yet sent."""
        raise NotImplementedError

    def events(self) -> list[Started | Drained]:
        """What happened since the last call."""
        raise NotImplementedError

    def played_ms(self, item: str) -> int:
        """Milliseconds of the item that were sent; 0 for one unknown or long forgotten."""
        raise NotImplementedError

    def timestamp_at(self, now: float) -> int:
        """The RTP timestamp that belongs to this moment: what a sender report wants."""
        raise NotImplementedError
