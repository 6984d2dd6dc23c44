"""Turns: when a caller begins to speak, when the caller is done, and the audio in between.

What it owns: the Ear, which applies the turn detection of a session (`realtime.py`) to a stream of
PCM and keeps the audio of the turn that it is hearing; and the Gauge, which only says how long
somebody has been speaking, for turns that a model server finds (`floor.py`).

Rules that stay true:
- Audio time is the time of the audio that came, in ms since the session began. A turn ends by it,
  and by the clock as well, for clients whose packets stop when they fall silent (RFC 6716 section
  2.1.9, DTX; https://www.rfc-editor.org/rfc/rfc6716#section-2.1.9).
- A speech frame is one that WebRTC's voice activity detector takes for a voice *and* whose level
  reaches the floor that `threshold` stands for. ONSET_FRAMES of the last few make speech, so a
  click is none; a lone one among silence does not prolong a turn either.
- Of a turn everything is kept from the padding before its first speech frame to just after its
  last one. The silence behind it belongs to the padding of the next turn.
- Memory is bounded by TURN_MS_MAX, however long somebody talks.

Sans-IO. It does not decide what a turn leads to: see `parrot.py` and `floor.py`.
"""

import enum
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import webrtcvad

from realtime import Detection, SemanticVad, ServerVad

RATE_HZ = 16_000
"""Of its input, 16-bit mono. The detector looks at nothing above 4 kHz; it is the models' rate."""

FRAME_MS = 20
"""One packet's worth. 10 ms would notice a voice 10 ms earlier for twice the work."""

FRAME_SAMPLES = RATE_HZ * FRAME_MS // 1000
FRAME_OCTETS = 2 * FRAME_SAMPLES
MS_OCTETS = 2 * RATE_HZ // 1000

VAD_AGGRESSIVENESS = 2
"""Of 0 to 3. At 3 soft beginnings of sentences get lost, below 2 a fan is a speaker."""

FLOOR_DBFS_MIN, FLOOR_DBFS_MAX = -65.0, -25.0
"""The level a speech frame needs at `threshold` 0 and 1. The default 0.5 gives -45 dBFS: speech at
a headset is around -25, a quiet room after the browser's noise filter below -50."""

SUSTAIN = 0.5
"""Once there is speech, it may fall to this part of the floor (6 dB less): words end softly."""

RECENT_FRAMES = 4
ONSET_FRAMES = 3
"""So many of the recent frames make speech: 60 ms. Fewer, and a key stroke interrupts the reply;
more, and an interruption comes that much later."""

TAIL_MS = 60
"""What is kept after the last speech frame: a final consonant is often below the floor."""

ARRIVAL_GRACE_S = 0.1
"""How much longer than `silence_duration_ms` the clock waits than audio time does: packets that
come late, in a burst, must not end a turn. Only clients that stop sending ever wait for it."""

TURN_MS_MAX = 30_000
"""Audio kept of a turn, 960 kB. Of a longer one the last 30 s are kept."""

SILENCE_MS_BY_EAGERNESS = {"low": 1_500, "medium": 800, "auto": 800, "high": 400}
"""What `semantic_vad` is without a model that understands: the less eager to speak, the longer it
waits. Longer than the default of `server_vad` where the API promises not to cut a thought short."""

LEVEL_STRIDE = 4
"""Of a frame's samples, one in so many makes its level. What folds down from above the new half
rate is as loud as before: 9 of 10 frames of recorded speech keep their level within 0.6 dB, all
within 2."""

GAP_MS = 200
"""A pause within somebody's speech, for the gauge: the closure before a "p", a breath. Behind a
"hm" there is more, and two of them are not one long one."""

_RECENT_MASK = (1 << RECENT_FRAMES) - 1

assert 1 < ONSET_FRAMES <= RECENT_FRAMES


def by_sound(detection: Detection | None) -> ServerVad | None:
    """What the ear does for a kind of turn detection; None is push-to-talk."""
    if isinstance(detection, SemanticVad):
        return ServerVad(
            silence_duration_ms=SILENCE_MS_BY_EAGERNESS[detection.eagerness],
            create_response=detection.create_response,
            interrupt_response=detection.interrupt_response,
        )
    return detection


class Mark(enum.Enum):
    """What the ear noticed."""

    STARTED = enum.auto()
    STOPPED = enum.auto()


@dataclass(frozen=True, slots=True)
class Turn:
    """The audio of a turn and what can be measured of it."""

    pcm: bytes
    """PCM16LE mono at RATE_HZ, at most TURN_MS_MAX of it: the last."""
    lead_ms: int
    """Padding in front of its first speech frame; 0 for push-to-talk."""
    end_ms: int
    """Audio time of its end."""
    heard_ms: int
    """From first to last speech frame; all of it for push-to-talk. May be more than `pcm` holds."""
    level_dbfs: float
    """Root mean square of the speech frames; -inf for digital silence."""


class _Voice:
    """Tells the frames with a voice in them from others."""

    def __init__(self, rate_hz: int) -> None:
        """`rate_hz` is 8, 16, 32 or 48 kHz: the detector knows no other."""
        samples = rate_hz * FRAME_MS // 1000
        self._vad = webrtcvad.Vad(VAD_AGGRESSIVENESS)
        self._rate_hz = rate_hz
        self._unpack = struct.Struct("<" + "h6x" * (samples // LEVEL_STRIDE)).unpack
        self._full_scale = 32_768 * math.sqrt(samples // LEVEL_STRIDE)

    def level(self, frame: bytes) -> float:
        """Root mean square, 0 to 1, of every fourth sample: 2 us, all of them would take 5."""
        return math.hypot(*self._unpack(frame)) / self._full_scale

    def speaks(self, frame: bytes) -> bool:
        """To be asked about every frame, because it learns from each how the room sounds: 2 us."""
        return bool(self._vad.is_speech(frame, self._rate_hz))


class Ear:
    """Finds turns in a stream of PCM16LE mono at RATE_HZ and keeps their audio."""

    def __init__(self) -> None:
        self.clock_ms = 0
        """Audio time: how much has been heard, in whole frames."""
        self._voice = _Voice(RATE_HZ)
        self._buffer = bytearray()  # its last octet is at clock_ms
        self._rest = b""  # less than a frame, kept through it all: it may be half a sample
        self.forget()

    def forget(self) -> None:
        """Drop what was heard, also a turn that has begun; audio time goes on."""
        self._buffer.clear()
        self.speaking = False
        self._recent = 0  # a bit for each recent frame, 1 for speech, the last one lowest
        self._onset_ms = self._speech_ms = self.clock_ms
        self._speech_at = 0.0
        self._power, self._frames = 0.0, 0

    @property
    def buffered_ms(self) -> int:
        """How much audio is kept."""
        return len(self._buffer) // MS_OCTETS

    @property
    def starts_ms(self) -> int:
        """Audio time of the first sample that is kept."""
        return self.clock_ms - self.buffered_ms

    def hear(self, pcm: bytes, now: float, rule: ServerVad | None) -> Iterator[Mark]:
        """Take more audio, of any number of octets; without a rule it is only kept.

        Yields what it notices, and the caller acts on that before it asks for more.
        """
        pcm = self._rest + pcm if self._rest else pcm
        whole = len(pcm) - len(pcm) % FRAME_OCTETS
        self._rest = pcm[whole:]
        for at in range(0, whole, FRAME_OCTETS):
            mark = self._hear_frame(pcm[at : at + FRAME_OCTETS], now, rule)
            if mark is not None:
                yield mark

    def _hear_frame(self, frame: bytes, now: float, rule: ServerVad | None) -> Mark | None:
        self._buffer += frame
        self.clock_ms += FRAME_MS
        level = self._voice.level(frame)
        if rule is None:
            self._measure(level)
            self._keep(TURN_MS_MAX)
            return None
        floor = _floor(rule.threshold) * (SUSTAIN if self.speaking else 1.0)
        voiced = self._voice.speaks(frame) and level >= floor
        self._recent = (self._recent << 1 | voiced) & _RECENT_MASK
        if not self.speaking:
            return self._wait_for_speech(level, now, rule)
        self._keep(TURN_MS_MAX)
        if voiced and self._recent.bit_count() > 1:
            self._speech_ms, self._speech_at = self.clock_ms, now
            self._measure(level)
        silent_ms = self.clock_ms - self._speech_ms
        return Mark.STOPPED if silent_ms >= rule.silence_duration_ms else None

    def _wait_for_speech(self, level: float, now: float, rule: ServerVad) -> Mark | None:
        if self._recent.bit_count() < ONSET_FRAMES:
            self._keep(rule.prefix_padding_ms + RECENT_FRAMES * FRAME_MS)
            return None
        onset_ms = self._recent.bit_length() * FRAME_MS
        self._keep(rule.prefix_padding_ms + onset_ms)
        self.speaking = True
        self._onset_ms = self.clock_ms - onset_ms
        self._speech_ms, self._speech_at = self.clock_ms, now
        self._power, self._frames = 0.0, 0
        self._measure(level)
        return Mark.STARTED

    def has_fallen_silent(self, now: float, rule: ServerVad) -> bool:
        """True if the clock alone says that the turn is over: no packets come any more."""
        silence_s = rule.silence_duration_ms / 1000 + ARRIVAL_GRACE_S
        return self.speaking and now - self._speech_at >= silence_s

    def take(self) -> Turn:
        """The turn that is in the buffer: after speech to its end, else all that is kept."""
        lead_ms, end_ms, heard_ms = 0, self.clock_ms, self._frames * FRAME_MS
        if self.speaking:
            end_ms = min(end_ms, self._speech_ms + TAIL_MS)
            heard_ms = self._speech_ms - self._onset_ms
            lead_ms = max(0, self._onset_ms - self.starts_ms)
        octets = max(0, end_ms - self.starts_ms) * MS_OCTETS
        pcm, after = bytes(self._buffer[:octets]), self._buffer[octets:]
        power = self._power / self._frames if self._frames else 0.0
        level_dbfs = 10 * math.log10(power) if power else -math.inf
        self.forget()
        self._buffer += after
        return Turn(pcm, lead_ms, end_ms, heard_ms, level_dbfs)

    def _measure(self, level: float) -> None:
        self._power += level * level
        self._frames += 1

    def _keep(self, last_ms: int) -> None:
        # Taking from the front of a bytearray moves nothing: CPython only advances its start.
        del self._buffer[: max(0, len(self._buffer) - last_ms * MS_OCTETS)]


class Gauge:
    """How long somebody has been speaking, by the same measure as the Ear's, without the audio."""

    def __init__(self, rate_hz: int) -> None:
        """`rate_hz` is one that the detector knows, or 24 kHz."""
        self.speech_ms = 0
        """Speech so far; 0 after GAP_MS without any. Pauses do not count."""
        self._thirds = rate_hz == 24_000  # which it does not: a third of it holds all it looks at
        self._voice = _Voice(8_000 if self._thirds else rate_hz)
        self._frame = 2 * rate_hz * FRAME_MS // 1000
        self._rest = b""
        self._silent_ms = 0

    def hear(self, pcm: bytes, threshold: float) -> None:
        """Take more PCM16LE mono, of any number of octets; `threshold` is that of server_vad."""
        pcm = self._rest + pcm if self._rest else pcm
        whole = len(pcm) - len(pcm) % self._frame
        self._rest = pcm[whole:]
        for at in range(0, whole, self._frame):
            frame = pcm[at : at + self._frame]
            self._hear_frame(_a_third_of(frame) if self._thirds else frame, threshold)

    def _hear_frame(self, frame: bytes, threshold: float) -> None:
        sustain = SUSTAIN if self.speech_ms >= ONSET_FRAMES * FRAME_MS else 1.0
        loud = self._voice.level(frame) >= _floor(threshold) * sustain
        if self._voice.speaks(frame) and loud:
            self.speech_ms += FRAME_MS
            self._silent_ms = 0
            return
        self._silent_ms += FRAME_MS
        if self._silent_ms >= GAP_MS:
            self.speech_ms = 0


def _a_third_of(frame: bytes) -> bytes:
    """PCM at a third of its rate, by the means of three: what folds over is 9 dB down or more."""
    samples = struct.unpack(f"<{len(frame) // 2}h", frame)
    means = [(a + b + c) // 3 for a, b, c in zip(*(samples[i::3] for i in range(3)), strict=True)]
    return struct.pack(f"<{len(means)}h", *means)


def _floor(threshold: float) -> float:
    """The level of a speech frame, 0 to 1 of full scale."""
    dbfs = FLOOR_DBFS_MIN + threshold * (FLOOR_DBFS_MAX - FLOOR_DBFS_MIN)
    return math.exp(dbfs * math.log(10) / 20)
