"""The telephone's codecs as the call wants them: G.711 at the backend's rate, both ways.

    Receiver ── payload ──▶ Decoder: g711, concealment, 8 kHz up ──▶ PCM at the backend's rate
    Playout ── PCM at the backend's rate ──▶ Encoder: 8 kHz down, g711 ──▶ payload

What it owns: the change of rates. It is libswresample's, by way of PyAV, which aiortc brings: 9 us
for 20 ms, and what 8 kHz cannot hold 85 dB down, where resample.py takes 500 us.

Rules that stay true:
- What comes out is exactly as long as what goes in: the 2 ms by which the filter looks ahead are
  silence before the first piece.
- A filter runs in this thread. PyAV's own resampler would start as many threads a stream as there
  are CPUs.
- Opus is better at everything: this is for who does not have it.

It does not pace, reorder or decide what to conceal: audio.py and receiver.py do.
"""

from fractions import Fraction

import av
import av.filter

import g711
import rtp

FRAME_MS = 20
"""One packet out, as with Opus."""

DECODED_MS_MAX = 200
"""Of one packet: what a datagram can hold. More is nobody's."""

_PIECE = g711.RATE_HZ // 400  # what concealment comes in, 2.5 ms


class Rate:
    """One direction of one stream at another rate: PCM16LE mono."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._from_hz, self._to_hz = from_hz, to_hz
        graph = self._graph = av.filter.Graph()
        graph.threads = 1
        base = Fraction(1, from_hz)
        source = graph.add_abuffer(sample_rate=from_hz, format="s16", layout="mono", time_base=base)
        change, sink = graph.add("aresample", str(to_hz)), graph.add("abuffersink")
        source.link_to(change)
        change.link_to(sink)
        graph.configure()
        self._passed = 0
        self._waiting = b""

    def feed(self, pcm: bytes) -> bytes:
        """The same at the other rate, as long as this; whole multiples of both rates' samples."""
        samples = len(pcm) // 2
        if not samples:
            return b""
        frame = av.AudioFrame(format="s16", layout="mono", samples=samples)
        frame.sample_rate = self._from_hz
        frame.pts = self._passed
        frame.planes[0].update(pcm)
        self._passed += samples
        self._graph.push(frame)
        made = self._waiting + self._pulled()
        wanted = 2 * (samples * self._to_hz // self._from_hz)
        made = made.rjust(wanted, b"\0")
        self._waiting = made[wanted:]
        return made[:wanted]

    def _pulled(self) -> bytes:
        found: list[bytes] = []
        while True:
            try:
                out = self._graph.pull()
            except (BlockingIOError, EOFError):
                return b"".join(found)
            if isinstance(out, av.AudioFrame):
                found.append(bytes(out.planes[0])[: 2 * out.samples])


class Decoder:
    """G.711 payloads to PCM16LE mono at `rate_hz`. Has what receiver.Receiver asks for."""

    def __init__(self, law: g711.Law, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self._law = law
        self.reset()

    def decode(self, payload: bytes) -> bytes | None:
        """One payload to its PCM; None if there is nothing in it, or more than a packet holds."""
        if not 0 < len(payload) <= g711.RATE_HZ * DECODED_MS_MAX // 1_000:
            return None
        return self._rate.feed(self._concealer.heard(g711.decode(self._law, payload)))

    def conceal(self, samples: int) -> bytes:
        """Invent what was lost, from what came before: `samples` rounded down to 2.5 ms."""
        lost = max(1, samples * g711.RATE_HZ // self.rate_hz // _PIECE) * _PIECE
        return self._rate.feed(self._concealer.lost(lost))

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        """None: no packet has a copy of the one before."""
        return None

    def reset(self) -> None:
        """Forget the stream so far: another one begins."""
        self._concealer = g711.Concealer()
        self._rate = Rate(g711.RATE_HZ, self.rate_hz)

    def close(self) -> None:
        """There is nothing to free that does not go with the object."""


class Encoder:
    """PCM16LE mono frames of 20 ms at `rate_hz` to G.711 payloads. Has what a session asks for."""

    def __init__(self, law: g711.Law, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self._law = law
        self._frame = 2 * rate_hz * FRAME_MS // 1_000
        self._rate = Rate(rate_hz, g711.RATE_HZ)
        self._silence = g711.SILENCE[law] * (g711.RATE_HZ * FRAME_MS // 1_000)

    def encode(self, pcm: bytes) -> bytes:
        """One frame to one payload of 160 octets."""
        if len(pcm) != self._frame:
            raise ValueError(f"a frame has {self._frame} octets, this one {len(pcm)}")
        return g711.encode(self._law, self._rate.feed(pcm))

    def silence(self) -> bytes:
        """A frame of silence, whatever was encoded before it: the filter forgets its end."""
        self._rate.feed(bytes(self._frame))
        return self._silence

    def report(self, block: rtp.Block) -> None:
        """Hear from the client how it receives us: there is no protection to be changed for it."""

    def close(self) -> None:
        """There is nothing to free that does not go with the object."""
