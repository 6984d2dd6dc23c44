"""One end of a call without a network: speech, a parrot or a scripted backend, what a client sees.

For tests: the recorded sentence at 16 kHz, the order of events that clients rely on, and a
conversation joined with the real play-out in a time that the test owns.
"""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import orjson

import audio
import backend
import floor
import parrot
from conversation import Conversation
from turns import FRAME_OCTETS, RATE_HZ

SENTENCE = Path(__file__).parent / "data" / "sentence.wav"
DELTA = {"type": "response.output_audio.delta"}

BEFORE_SOUND = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "output_audio_buffer.started",
    "response.output_audio_transcript.delta",
]
AFTER_SOUND = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]
COMMITTED = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
SPEECH_TURN = [
    "session.created",
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
]


def sentence() -> bytes:
    """Speech from its first to its last loud sample, at 16 kHz."""
    with wave.open(str(SENTENCE)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    samples = samples[: len(samples) // 3 * 3].reshape(-1, 3).mean(axis=1)
    loud = np.flatnonzero(np.abs(samples) > 400)
    return bytes(samples[loud[0] : loud[-1] + 1].astype("<i2").tobytes())


SPEECH = sentence()


class Plain:
    """An encoder that changes nothing: packets are PCM behind twelve octets of RTP."""

    rate_hz = RATE_HZ

    def encode(self, pcm: bytes) -> bytes:
        return pcm

    def silence(self) -> bytes:
        return bytes(FRAME_OCTETS)


class Line:
    """A conversation with the real play-out, and a backend that the test plays itself."""

    def __init__(self, session: dict[str, Any] | None = None, *, opened: bool = True) -> None:
        self.now = 100.0
        self.playout = audio.Playout(Plain(), ssrc=1, payload_type=111, sequence=0, timestamp=0)
        self.terms = floor.Terms(session)
        ruled = floor.Floor(self.terms, RATE_HZ)
        self.conversation = Conversation("rtc_1", self.playout, ruled)
        self.seen: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.packets: list[bytes] = []
        if opened:
            self.conversation.opened(self.now)
            self.backend("session.created", session={})
            self.take()

    def flow(self) -> None:
        self.packets += [packet[12:] for packet in self.playout.send(self.now)]
        self.conversation.playout_events(self.now)
        self.asked += self.conversation.to_backend()
        for message in self.conversation.to_client():
            self.seen.append(orjson.loads(message))

    def wait(self, seconds: float, *, keep: bool = False) -> list[dict[str, Any]]:
        for _ in range(round(seconds / 0.02)):
            self.now += 0.02
            self.idle()
            self.flow()
        return [] if keep else self.take()

    def idle(self) -> None:
        """What the backend does when time passes."""

    def backend(self, kind: str, **fields: Any) -> None:
        self.conversation.backend_event({"type": kind, **fields}, self.now)
        self.flow()

    def client(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        self.conversation.client_message(orjson.dumps({"type": kind, **fields}), self.now)
        self.flow()
        return self.take()

    def take(self) -> list[dict[str, Any]]:
        """What the client has seen since the last time."""
        seen, self.seen = self.seen, []
        return seen

    def asks(self) -> list[dict[str, Any]]:
        """The same for the backend, without ids."""
        asked, self.asked = self.asked, []
        return [{k: v for k, v in event.items() if k != "event_id"} for event in asked]

    def sounds(self, ms: int, response_id: str = "r", item_id: str = "i") -> None:
        """The backend begins a response and sends so much of its audio."""
        self.backend("response.created", response={"id": response_id})
        item = {"id": item_id, "content": [{"type": "output_audio", "transcript": "Hello"}]}
        self.backend("conversation.item.added", item=item)
        self.delta(ms, response_id, item_id)

    def delta(self, ms: int, response_id: str = "r", item_id: str = "i") -> None:
        sound = {"response_id": response_id, "item_id": item_id, "delta": b"\1\0" * (16 * ms)}
        self.conversation.backend_event(DELTA | sound, self.now)
        self.flow()

    def done(self, response_id: str = "r", item_id: str = "i") -> None:
        self.backend("response.output_audio.done", response_id=response_id, item_id=item_id)
        self.backend("response.done", response={"id": response_id, "status": "completed"})


class ParrotLine(Line):
    """The same with the parrot at the other end."""

    def __init__(self, session: dict[str, Any] | None = None) -> None:
        super().__init__(session, opened=False)
        mind = parrot.Parrot("line", self.terms.offered)
        self.parrot = backend.InProcess(mind, self.emitted)
        self.conversation.opened(self.now)
        self.flow()

    def emitted(self, event: dict[str, Any]) -> None:
        self.conversation.backend_event(event, self.now)
        self.flow()

    def flow(self) -> None:
        super().flow()
        asked, self.asked = self.asked, []
        for event in asked:
            self.parrot.send(event, self.now)
        for message in self.conversation.to_client():
            self.seen.append(orjson.loads(message))

    def idle(self) -> None:
        self.parrot.tick(self.now)

    def say(self, pcm: bytes) -> list[dict[str, Any]]:
        for at in range(0, len(pcm), FRAME_OCTETS):
            self.now += 0.02
            frame = pcm[at : at + FRAME_OCTETS]
            self.parrot.append(frame, self.now)
            if self.conversation.listens:
                self.conversation.hear(frame, self.now)
            self.flow()
        return self.take()


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def refusal(events: list[dict[str, Any]]) -> dict[str, Any]:
    (event,) = events
    assert event["type"] == "error"
    assert event["event_id"]
    return dict(event["error"])
