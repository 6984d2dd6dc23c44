"""G.711: the telephone's two codecs by table, and what stands in for their lost packets.

What it owns: PCMU (mu-law) and PCMA (A-law) at 8 kHz both ways, and concealment. Neither codec has
a state, FEC or DTX: an octet is a sample. So concealment is the receiver's own affair, and it is as
the standard's Appendix I has it in spirit: the last pitch period again and again, fading out.

Rules that stay true:
- Any octets decode; any samples encode, the loudest clipped to the loudest code.
- What is decoded and encoded again is the same octets, but for mu-law's second zero.
- Concealment is full for 10 ms, silent after 60, and what comes then is faded in over it.
- PCM is 16 bits, signed, little-endian, mono, at 8 kHz. Rates are telephone.py's.

Sans-IO. ITU-T G.711 https://www.itu.int/rec/T-REC-G.711, its Appendix I (concealment), RFC 3551
section 4.5.14 https://www.rfc-editor.org/rfc/rfc3551#section-4.5.14 (RTP).
"""

import enum
import operator
from array import array
from collections.abc import Sequence

RATE_HZ = 8_000

PITCH_MIN, PITCH_MAX = 40, 120
"""Samples in a pitch period: voices between 66 and 200 Hz, and higher ones in whole multiples."""

WINDOW = 160
"""Samples over which periods are compared: 20 ms, so that a period of the lowest voice fits."""

FULL, FADED = 80, 480
"""Samples after which an invention begins to fade, and has. Longer repetitions sound like a buzz,
shorter ones chop words; a loss of more than 60 ms nobody takes for speech any more."""

SEAM = 32
"""Samples over which an invention gives way to what came after it."""


class Law(enum.Enum):
    """Which of the two."""

    MU = "PCMU"
    A = "PCMA"


def _decoded(law: Law) -> list[int]:
    """The value of each octet, in 16 bits (G.711 tables 1 and 2)."""
    values = []
    for octet in range(256):
        code = octet ^ (0xFF if law is Law.MU else 0x55)
        segment, step = code >> 4 & 7, code & 15
        if law is Law.MU:
            size = ((2 * step + 33) << segment + 2) - 132
            values.append(-size if code & 0x80 else size)
        else:
            size = (2 * step + 33 if segment else 2 * step + 1) << max(segment - 1, 0) + 3
            values.append(size if code & 0x80 else -size)
    return values


def _encoded(law: Law) -> bytes:
    """The octet of each 16-bit sample, the negative ones behind the positive as unsigned numbers.

    A code covers the sizes from its decision value up to the next one's. Mu-law has a zero in the
    middle of its smallest step; A-law has none, so that -1 lies as far from its middle as 0.
    """
    sizes = bytearray()
    for code in range(128):
        segment, step = code >> 4, code & 15
        if law is Law.MU:
            least = (16 + step << segment + 3) - 132
        else:
            least = 16 + step << segment + 3 if segment else step << 4
        if code:
            sizes += bytes([code - 1]) * (least - len(sizes))
    sizes += bytes([127]) * (32_769 - len(sizes))
    if law is Law.MU:
        positive, negative = sizes[:32_768], sizes[32_768:0:-1]
        flips = 0xFF, 0x7F
    else:
        positive, negative = sizes[:32_768], sizes[32_767::-1]
        flips = 0xD5, 0x55
    plus, minus = (bytes(code ^ flip for code in range(256)) for flip in flips)
    return bytes(positive.translate(plus) + negative.translate(minus))


_VALUES = {law: _decoded(law) for law in Law}
_LOW = {law: bytes(value & 0xFF for value in _VALUES[law]) for law in Law}
_HIGH = {law: bytes(value >> 8 & 0xFF for value in _VALUES[law]) for law in Law}
_OCTETS = {law: _encoded(law) for law in Law}

SILENCE = {law: _OCTETS[law][:1] for law in Law}
"""A sample of silence: A-law's is as near to it as the law comes."""


def decode(law: Law, payload: bytes) -> bytes:
    """Octets to PCM. Two translations by the interpreter, 2 us for 20 ms."""
    pcm = bytearray(2 * len(payload))
    pcm[0::2] = payload.translate(_LOW[law])
    pcm[1::2] = payload.translate(_HIGH[law])
    return bytes(pcm)


def encode(law: Law, pcm: bytes) -> bytes:
    """PCM to octets; half a sample at the end is dropped. 7 us for 20 ms."""
    table = _OCTETS[law]
    return bytes([table[sample] for sample in memoryview(pcm[: len(pcm) & ~1]).cast("H")])


class Concealer:
    """One stream's past, and what can be made of it."""

    def __init__(self) -> None:
        self._past = array("h", bytes(2 * (WINDOW + PITCH_MAX)))
        self._period: Sequence[int] = ()
        self._made = 0  # samples invented since the last one that came

    def heard(self, pcm: bytes) -> bytes:
        """Take what has come; return it, faded in if it follows an invention."""
        samples = array("h", pcm)
        if self._made:
            width = min(SEAM, len(samples))
            for at, invented in enumerate(self._invent(width)):
                samples[at] += (invented - samples[at]) * (width - at) // (width + 1)
            self._made = 0
            pcm = samples.tobytes()
        self._past = (self._past + samples)[-(WINDOW + PITCH_MAX) :]
        return pcm

    def lost(self, samples: int) -> bytes:
        """Invent so many samples in place of what was lost."""
        if not self._made:
            self._period = _period(self._past)
        return self._invent(samples).tobytes()

    def _invent(self, samples: int) -> "array[int]":
        """The next samples of an invention, each as loud as its place in it is."""
        period, begin = self._period, self._made
        made = array("h", bytes(2 * samples))
        for at in range(begin, min(begin + samples, FADED)):
            loudness = FADED - max(at, FULL)
            made[at - begin] = period[at % len(period)] * loudness // (FADED - FULL)
        self._made += samples
        return made


def _period(past: "array[int]") -> Sequence[int]:
    """The last pitch period, made to follow on itself without a click."""
    length = _pitch(past)
    period = list(past[-length:])
    seam = length // 4
    before = past[-length - seam : -length]
    for at in range(seam):
        where = length - seam + at
        period[where] += (before[at] - period[where]) * (at + 1) // (seam + 1)
    return period


def _pitch(past: "array[int]") -> int:
    """How many samples ago the last WINDOW of them were most like themselves.

    By every second sample first, then the neighbours of the best by all of them: 0.3 ms, once a
    loss.
    """
    best = max(range(PITCH_MIN, PITCH_MAX + 1, 2), key=lambda lag: _likeness(past, lag, 2))
    near = range(max(PITCH_MIN, best - 1), min(PITCH_MAX, best + 1) + 1)
    return max(near, key=lambda lag: _likeness(past, lag, 1))


def _likeness(past: "array[int]", lag: int, step: int) -> float:
    now, then = past[-WINDOW::step], past[-WINDOW - lag : -lag : step]
    energy, shared = (sum(map(operator.mul, each, then)) for each in (then, now))
    return float(shared / (energy + 1) ** 0.5)
