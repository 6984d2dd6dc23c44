"""Resampling: a stream of PCM at one rate to another, for the parrot's server.

A transceiver never needs this: Opus decodes to and encodes from the backend's rate. The parrot
hears at one rate only, that of its detector of voices, and its server speaks at another where it is
asked to be like the model servers of 24 kHz.

How it works: a windowed sinc, cut off below half of the lower rate and taken apart into one short
filter for each place that an output sample can have between two input samples.

Rules that stay true:
- How the stream is cut into pieces changes nothing of what comes out, but when.
- The delay is half of TAPS input samples, under 1 ms, and the state is that long.
- What is too loud after filtering is clipped, as a sound card would.

Sans-IO. Some 0.3 ms for 20 ms of sound: fine for a server to try things with, not for a hot path.
"""

import math
import operator
from array import array

TAPS = 24
"""Input samples that an output sample is made of. Fewer let more of what lies above half of the
lower rate fold back as a metallic sound; more cost as much more."""

CUTOFF = 0.86
"""Of half of the lower rate: the rest is the slope of so short a filter."""

SAMPLE_MIN, SAMPLE_MAX = -32_768, 32_767


class Resampler:
    """One direction of one stream: PCM16LE mono."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        """Rates in samples a second; the same rate twice passes everything as it is."""
        common = math.gcd(from_hz, to_hz)
        self._up, self._down = to_hz // common, from_hz // common
        self._phases = _filters(self._up, CUTOFF * min(1.0, to_hz / from_hz))
        self._samples = array("h", bytes(2 * (TAPS - 1)))
        self._at = 0
        """Where the next output sample lies, in 1/up of an input sample from the first one that its
        filter may start at."""
        self._odd = b""

    def feed(self, pcm: bytes) -> bytes:
        """What comes out once this has come in. Octets that are no whole sample wait."""
        if self._up == self._down:
            return pcm
        pcm = self._odd + pcm
        whole = len(pcm) & ~1
        self._odd = pcm[whole:]
        samples = self._samples
        samples.frombytes(pcm[:whole])
        found = array("h")
        at, up, down, phases = self._at, self._up, self._down, self._phases
        end = (len(samples) - TAPS + 1) * up
        while at < end:
            first, phase = divmod(at, up)
            value = round(sum(map(operator.mul, phases[phase], samples[first : first + TAPS])))
            found.append(max(SAMPLE_MIN, min(SAMPLE_MAX, value)))
            at += down
        used = min(at // up, len(samples))
        del samples[:used]
        self._at = at - used * up
        return found.tobytes()


def _filters(up: int, cutoff: float) -> list[list[float]]:
    """For each of `up` places between two input samples, the weights of the samples around it.

    `cutoff` is a part of half of the input rate.
    """
    found = []
    for phase in range(up):
        weights = []
        for tap in range(TAPS):
            # Distance of the output's place from this sample, in input samples.
            away = tap - (TAPS // 2 - 1) - phase / up
            x = math.pi * cutoff * away
            window = 0.5 + 0.5 * math.cos(2 * math.pi * away / (TAPS + 1))
            weights.append((math.sin(x) / x if x else 1.0) * window)
        total = sum(weights)  # silence stays silence, and a constant what it was
        found.append([weight / total for weight in weights])
    return found
