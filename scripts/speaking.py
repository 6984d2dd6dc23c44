"""What the calls of a load test say, and whether what comes back is that.

What it owns: `Voice`, the turns that are said, encoded once and said by many; and the comparison of
a reply with the turn that it should repeat.

Each turn is made of the same recorded sentence, its pieces in another order, so that a reply which
belongs to another call, or to another turn, does not pass for the right one. The last frame of a
turn is one that the detector takes for a voice: the end of speech is then known to the packet.

The parrot is expected at the other end: it repeats. With another model server replies still come,
and their time is right, but their sound compares with nothing.
"""

import random
import wave
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import webrtcvad
from callers import LOUD, SENTENCE
from check import CORRELATION_MIN, correlation

import opus

SILENCE_MS = 200
"""Of the sessions: what ends a turn."""

SESSION = {
    "type": "realtime",
    "audio": {
        "input": {
            "turn_detection": {
                "type": "server_vad",
                "silence_duration_ms": SILENCE_MS,
                "interrupt_response": False,
            }
        }
    },
}
"""Of a call that goes on talking while it is answered."""

POLITE = {
    "type": "realtime",
    "audio": {
        "input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": SILENCE_MS}}
    },
}
"""Of a call whose speech interrupts."""

TURN_PACKETS, PAUSE_PACKETS = 150, 20
"""Speech and silence of a turn: 3.4 s in all. The reply, 3.1 s long, begins 0.2 s into the pause
and ends as the next one is due: sound flows down for nine tenths of the time. Longer turns would
leave less silence, and a call would have to talk longer until it is first answered."""

SHORT_PACKETS = 50
"""Of a turn that interrupts: 1 s. The detector needs 60 ms of it."""

TURNS = 16
"""Different turns."""

PIECE_FRAMES = 8
"""160 ms, a syllable: what a turn is put together from."""

RATE_HZ = 16_000
"""That replies are compared at: all of the voice is in it."""


@dataclass
class Turn:
    """One turn, ready to be sent."""

    payloads: list[bytes]
    """Speech and the silence behind it, 20 ms each."""
    spoken: int
    """How many of them are speech."""
    samples: npt.NDArray[np.float64]
    """The speech, at RATE_HZ."""


@dataclass
class Echo:
    """A reply that is kept to be compared."""

    turn: Turn
    packets: list[tuple[int, bytes]] = field(default_factory=list)
    """Sequence numbers and payloads, as they came."""
    correlation: float | None = None
    """0 to 1; None until it was compared."""

    @property
    def whole(self) -> bool:
        """As much has come as was said, or nearly."""
        return len(self.packets) > 0.9 * self.turn.spoken

    def compare(self) -> float:
        """How much alike the reply and its turn are; `right` beyond CORRELATION_MIN."""
        decoder, parts, last = opus.Decoder(RATE_HZ), [], None
        for sequence, payload in sorted(self.packets):
            missing = 0 if last is None else sequence - last - 1
            parts += [decoder.conceal(RATE_HZ // 50) for _ in range(min(missing, 50))]
            if missing >= 0:
                parts.append(decoder.decode(payload) or b"")
            last = sequence
        pcm = b"".join(parts)
        samples = np.frombuffer(pcm, np.int16).astype(float)
        self.correlation = correlation(self.turn.samples, samples)
        return self.correlation

    @property
    def right(self) -> bool:
        """It was compared, and is what was said."""
        return self.correlation is not None and self.correlation > CORRELATION_MIN


class Voice:
    """The turns of all calls. Encoding one takes some 50 ms: it is done when it is first wanted,
    which `prepare` does beforehand."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._frames = _spoken()
        self._made: dict[tuple[int, int, bool], Turn] = {}

    def prepare(self, rate_hz: int) -> None:
        """Encode all turns for that rate."""
        for number in range(TURNS):
            self.turn(number, rate_hz)
            self.turn(number, rate_hz, short=True)

    def turn(self, number: int, rate_hz: int, *, short: bool = False) -> Turn:
        """The turn with that number (of TURNS, over and over), for whoever wants that rate."""
        wanted = number % TURNS, rate_hz, short
        if wanted not in self._made:
            self._made[wanted] = self._make(*wanted)
        return self._made[wanted]

    def _make(self, number: int, rate_hz: int, short: bool) -> Turn:
        chance = random.Random(f"{self._seed} {number} {short}")
        count = SHORT_PACKETS if short else TURN_PACKETS
        pieces = [
            self._frames[at : at + PIECE_FRAMES]
            for at in range(0, len(self._frames) - PIECE_FRAMES + 1, PIECE_FRAMES)
        ]
        frames: list[npt.NDArray[np.int16]] = []
        while len(frames) < count:
            chance.shuffle(pieces)
            frames.extend(frame for piece in pieces for frame in piece)
        said = _ending_in_a_voice(np.concatenate(frames[: count + PIECE_FRAMES]), count)
        whole = np.concatenate((said, np.zeros(PAUSE_PACKETS * 960, np.int16)))
        wanted, size = whole[:: 48_000 // rate_hz], rate_hz // 50
        encoder = opus.Encoder(
            rate_hz, bitrate=32_000, application=opus.Application.VOIP, loss_percent=1, complexity=5
        )
        payloads = [
            encoder.encode(wanted[at : at + size].tobytes()) for at in range(0, len(wanted), size)
        ]
        return Turn(payloads, len(said) // 960, said[::3].astype(float))


def _spoken() -> list[npt.NDArray[np.int16]]:
    """The frames of the sentence that have a voice in them, 48 kHz, 20 ms each."""
    with wave.open(str(SENTENCE)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    frames = samples[: len(samples) // 960 * 960].reshape(-1, 960)
    # Without the breaks between words, which would be ends of turns.
    return [frame for frame in frames if np.sqrt(np.mean(frame.astype(float) ** 2)) > LOUD]


def _ending_in_a_voice(samples: npt.NDArray[np.int16], count: int) -> npt.NDArray[np.int16]:
    """So many frames, or a few less, the last of which the detector takes for speech."""
    detector, narrow = webrtcvad.Vad(2), samples[::3]  # as turns.py has it
    voiced = [
        detector.is_speech(narrow[at : at + 320].tobytes(), RATE_HZ)
        for at in range(0, count * 320, 320)
    ]
    last = max((at for at, voice in enumerate(voiced) if voice), default=count - 1)
    return samples[: (last + 1) * 960]
