"""A caller's packets to PCM: in order at once, what is missing made up for, time kept.

Owns the way in. There is no jitter buffer: a model server needs no even pace, so what is in order
leaves in the moment it comes.

Rules that stay true:
- In order means at once. A hole waits for two later packets; then the end of what is lost is taken
  from the copy in the next packet (in-band FEC) if there is one, what is before it concealed, and
  what waited leaves with it: the delay is zero again. PCM never leaves out of order, nor twice.
- Between two calls one packet waits at most, and not for long: tick() lets it go when no further
  one comes.
- Time is kept: what was made is as long as the timestamps say, within a frame, whatever was lost
  or not sent (DTX). Stamps are believed as far as numbers and arrivals bear them out. Only silence
  made in a pause that turns out to have been a stall stays: what was said then is worth more.
- Nobody gets more than real time: what a client sends beyond it is dropped before it is decoded.
- Every packet ends in one counter: received = decoded + malformed + late + duplicate + stray +
  surplus, plus the one that may wait.

Lost packets are not asked for again (RTCP NACK, RFC 4585, https://www.rfc-editor.org/rfc/rfc4585).
The answer has 20 ms from when a hole shows until it is filled: round trips of 10 ms bring nearly
all of it back, of 20 ms half, of 30 ms none; and waiting longer is what nobody wants. In that time
FEC has 85 % of single losses for nothing. It is worse at bursts (a quarter), which leaves those of
a short path as what NACK could mend; but no browser offers NACK for Opus, so nobody would answer.
scripts/quality.py prints these figures.

It owns no codec, socket or clock: the decoder is an argument (opus.py and telephone.py have one),
`now` is monotonic seconds. Timestamps are of Opus' clock, whatever the codec (speech.py). RTP for
Opus: RFC 7587, https://www.rfc-editor.org/rfc/rfc7587; FEC and DTX in its sections 3.1.3 and 3.3.
"""

from __future__ import annotations

from typing import Protocol

import rtp

FRAME_MS = 20
"""Length of a piece of silence, of a lost packet before the first one that came, and how exactly
time is kept."""

HOLE_PACKETS = 2
"""Later packets that a hole waits for. One less takes every swapped pair for a loss; one more is
20 ms of delay for each real loss, and reordering by three is rare on any path."""

HOLE_S = 0.06
"""How long a hole waits when nothing comes any more: what HOLE_PACKETS would take, and a little."""

CONCEALED_S_MAX = 0.1
"""Speech invented for one hole, the rest of it is silence. After 100 ms SILK's inventions have
faded to silence by themselves, and CELT's turn from the voice to noise."""

PAUSE_S = 0.2
"""Without a packet for this long the caller is taken to pause (DTX, a muted track). Sooner, and a
stalled network puts silence into the middle of words; later, and the end of a turn is found late,
for then the whole pause is made up at once, and turns end after 500 ms of silence by default. A
timestamp may be ahead of the arrivals by as much, and is still believed."""

PAUSE_S_MAX = 10.0
"""Silence made for one pause. Longer than any end-of-turn delay; a caller who is gone costs no
more than this."""

LACK_S_MAX = 1.0
"""Made up for at once before one packet. Of a longer pause or loss tick() has made most already, as
it passed; and what a timestamp claims is silence in somebody's sentence."""

AHEAD_S_MAX = 10.0
"""Audio taken in beyond real time, to be made good at its pace. After a stall of the network as
much comes at once as was said meanwhile, and clocks differ; but a packet of two octets can be
120 ms of audio, and a thousand of them a second would be two minutes for the model server to hear.
"""

_FRAME_CLOCK = rtp.CLOCK_HZ * FRAME_MS // 1_000
_PACKET_CLOCK_MAX = rtp.CLOCK_HZ * 120 // 1_000  # RFC 6716 section 3.4, R5
_LACK_CLOCK_MAX = int(LACK_S_MAX * rtp.CLOCK_HZ)
_SEEN_MASK = (1 << 64) - 1

assert HOLE_S < PAUSE_S < PAUSE_S_MAX


class SpeechDecoder(Protocol):
    """What Receiver needs of a codec: opus.Decoder has it. All PCM is PCM16LE mono at rate_hz."""

    rate_hz: int

    def decode(self, payload: bytes) -> bytes | None:
        """One payload to its PCM; None if it is malformed."""

    def conceal(self, samples: int) -> bytes:
        """Invent what was lost: so many samples, rounded down to what the codec can do."""

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        """The frame lost just before `payload`, from the copy in it; None if it has none."""

    def reset(self) -> None:
        """Forget the stream so far: another one begins."""


class Receiver:
    """One caller's packets to PCM pieces in order (PCM16LE mono at the decoder's rate)."""

    def __init__(self, decoder: SpeechDecoder) -> None:
        self.received = 0
        """Packets that came."""
        self.decoded = 0
        """Of these, the ones whose audio went out."""
        self.malformed = 0
        """Not decodable: replaced by a concealed frame, so that time stays right."""
        self.late = 0
        """Came after their hole had been filled."""
        self.duplicate = 0
        """Came twice."""
        self.stray = 0
        """Far from the numbering, and the next packet did not confirm a new one."""
        self.surplus = 0
        """More than real time: neither decoded nor made up for."""
        self.concealed = 0
        """Pieces invented for holes, each as long as a packet or shorter."""
        self.recovered = 0
        """Pieces taken from in-band FEC for holes."""
        self._decoder = decoder
        self._rate_hz = decoder.rate_hz
        self._clocks = rtp.CLOCK_HZ // decoder.rate_hz  # units of the RTP clock in a sample
        self._piece = decoder.rate_hz // 400  # what concealment comes in, 2.5 ms
        self._frame = self._samples = decoder.rate_hz * FRAME_MS // 1_000  # _samples: of a packet
        self._invented_max = int(decoder.rate_hz * CONCEALED_S_MAX)
        self._ssrc = -1
        self._next = 0
        self._restart = -1  # the sequence number that would confirm a new numbering
        self._seen = 0  # of the 64 packets before _next, a bit each, the last one lowest
        self._held: dict[int, rtp.Packet] = {}
        self._last_at = 0.0  # when the last packet of use came
        self._made = 0  # the timestamp up to which PCM was made
        self._end = 0  # the timestamp at which the last packet played ended,
        self._end_at = 0.0  # and when it had come
        self._bridged = False  # whether silence was made since
        self._ahead_s = 0.0  # audio taken in beyond real time,
        self._ahead_at = 0.0  # at this moment

    def receive(self, packet: rtp.Packet, now: float) -> list[bytes]:
        """Take a packet; return the PCM that is in order with it: none, one or a few pieces."""
        self.received += 1
        sequence = packet.sequence
        out: list[bytes] = []
        if sequence != self._next or packet.ssrc != self._ssrc or self._held:
            if self._begins(packet):
                out = self._begin(packet, now)
            elif self._is_of_no_use(sequence):
                return out
            if sequence != self._next or self._held:
                self._held[sequence] = packet
                self._last_at = now
                return out + self._release(HOLE_PACKETS - 1, now)
        self._last_at = now
        if packet.timestamp != self._made:  # nearly every packet follows on what was made
            out += self._fill(0, packet, now)
        pcm = self._play(packet, now)
        if pcm is not None:
            out.append(pcm)
        return out

    def tick(self, now: float) -> list[bytes]:
        """Return the PCM that time alone brings; to be called every 20 to 100 ms.

        What waits behind a hole after HOLE_S without a packet; and from PAUSE_S on, in real time
        and counted from the last packet, silence: a sender with DTX sends nothing in its pauses,
        and a model server hears the end of a turn only in audio.
        """
        quiet_s = now - self._last_at
        if quiet_s < HOLE_S or self._ssrc < 0:
            return []
        if self._held:
            return self._release(0, now)
        if quiet_s < PAUSE_S:
            return []
        # What a longer packet holds has been said before it comes: that much is not known yet.
        unknown = max(0, self._samples * self._clocks - _FRAME_CLOCK)
        passed = self._end + int(min(quiet_s, PAUSE_S_MAX) * rtp.CLOCK_HZ) - unknown
        frames = _signed(passed - self._made) // _FRAME_CLOCK
        if frames <= 0:
            return []
        self._bridged = True
        return [self._silence(frames * self._frame)]

    def _begins(self, packet: rtp.Packet) -> bool:
        """Whether another stream begins with this packet: a source, or a numbering confirmed."""
        if packet.ssrc != self._ssrc:
            return True
        return packet.sequence == self._restart and self._is_far(packet.sequence)

    def _is_far(self, sequence: int) -> bool:
        ahead = sequence - self._next & 0xFFFF
        return rtp.SEQUENCE_DROPOUT_MAX <= ahead < 0x1_0000 - rtp.SEQUENCE_MISORDER_MAX

    def _is_of_no_use(self, sequence: int) -> bool:
        """Whether a packet does not continue the stream; then it has been counted."""
        if self._is_far(sequence):
            self._restart = sequence + 1 & 0xFFFF
            self.stray += 1
            return True
        behind = self._next - sequence & 0xFFFF
        if 0 < behind <= rtp.SEQUENCE_MISORDER_MAX:
            if self._seen >> (behind - 1) & 1:
                self.duplicate += 1
            else:
                self.late += 1
            return True
        if sequence in self._held:
            self.duplicate += 1
            return True
        return False

    def _begin(self, packet: rtp.Packet, now: float) -> list[bytes]:
        """Start over with this packet, once what waits has left."""
        out = self._release(0, now)
        if self._ssrc >= 0:
            self._decoder.reset()
        self._ssrc = packet.ssrc
        self._next = packet.sequence
        self._restart = -1
        self._seen = 0
        self._made = packet.timestamp
        self._bridged = False
        return out

    def _release(self, held_max: int, now: float) -> list[bytes]:
        """Play what is in order; fill holes while more than `held_max` packets wait."""
        out: list[bytes] = []
        held = self._held
        while True:
            packet = held.pop(self._next, None)
            missing = 0
            if packet is None:
                if len(held) <= held_max:
                    return out
                missing, first = min((s - self._next & 0xFFFF, s) for s in held)
                packet = held.pop(first)
            out += self._fill(missing, packet, now)
            pcm = self._play(packet, now)
            if pcm is not None:
                out.append(pcm)

    def _fill(self, missing: int, packet: rtp.Packet, now: float) -> list[bytes]:
        """What stands between what was made and `packet`, with `missing` packets in between.

        Concealed speech, silence for what is too long for that, and last the copy in `packet`.
        Where silence has been made already, for a pause, that stands.
        """
        out: list[bytes] = []
        self._seen = self._seen << min(missing, 64) & _SEEN_MASK
        if self._ahead_of(now) > AHEAD_S_MAX:
            self._made = packet.timestamp
            return out
        copy = None
        rest = lack = self._lack(missing, packet.timestamp)
        if missing:
            room = 0 if self._bridged else self._invented_max
            last = min(self._samples, self._invented_max, max(self._frame, lack))
            rest -= self._conceal(out, lack - last, room - last)
            if lack > -self._frame:
                copy = self._decoder.recover(packet.payload, last)
            if copy is None:
                rest -= self._conceal(out, rest, room - (lack - rest))
            else:
                rest -= last
        if rest >= self._frame and self._ahead_s < AHEAD_S_MAX / 2:
            out.append(self._silence(rest))
            self._ahead_s += rest / self._rate_hz
        if copy is not None:
            self.recovered += 1
            self._invent(out, copy)
        # Less than a frame is left to grow until it is one; more, and the stamps have jumped.
        if not -2 * _FRAME_CLOCK <= _signed(packet.timestamp - self._made) < _FRAME_CLOCK:
            self._made = packet.timestamp
        return out

    def _lack(self, missing: int, timestamp: int) -> int:
        """Samples between what was made and a packet: by its timestamp where that can be, else by
        the `missing` packets, each as long as the last one."""
        lack = _signed(timestamp - self._made)
        passed_s = self._last_at - self._end_at + PAUSE_S
        most = max(missing * _PACKET_CLOCK_MAX, int(passed_s * rtp.CLOCK_HZ))
        if not -2 * _FRAME_CLOCK <= lack <= most:
            lack = 0 if self._bridged else missing * self._samples * self._clocks
        return min(lack, _LACK_CLOCK_MAX) // self._clocks

    def _conceal(self, out: list[bytes], samples: int, room: int) -> int:
        """Invent so many samples, but not more than `room`; return how many were."""
        made = 0
        longest = max(self._samples, self._frame)
        while (size := min(samples - made, room - made, longest) // self._piece * self._piece) > 0:
            self.concealed += 1
            self._invent(out, self._decoder.conceal(size))
            made += size
        return made

    def _silence(self, samples: int) -> bytes:
        self._made = self._made + samples * self._clocks & 0xFFFF_FFFF
        return bytes(2 * samples)

    def _invent(self, out: list[bytes], pcm: bytes) -> None:
        samples = len(pcm) // 2
        self._made = self._made + samples * self._clocks & 0xFFFF_FFFF
        self._ahead_s += samples / self._rate_hz
        out.append(pcm)

    def _play(self, packet: rtp.Packet, now: float) -> bytes | None:
        """A packet's own PCM; None if it is more than real time."""
        self._next = packet.sequence + 1 & 0xFFFF
        self._seen = (self._seen << 1 | 1) & _SEEN_MASK
        self._bridged = False
        samples = self._samples
        pcm = None
        ahead_s = self._ahead_of(now)
        if ahead_s > AHEAD_S_MAX:
            self.surplus += 1
        else:
            pcm = self._decoder.decode(packet.payload)
            if pcm is None:
                self.malformed += 1
                pcm = self._decoder.conceal(samples)
            else:
                self.decoded += 1
                samples = self._samples = len(pcm) // 2
            self._ahead_s = ahead_s + samples / self._rate_hz
        clocks = samples * self._clocks
        self._made = self._made + clocks & 0xFFFF_FFFF
        self._end = packet.timestamp + clocks & 0xFFFF_FFFF
        self._end_at = self._last_at
        return pcm

    def _ahead_of(self, now: float) -> float:
        """Seconds taken in beyond real time."""
        ahead_s = self._ahead_s - (now - self._ahead_at)
        self._ahead_at = now
        self._ahead_s = ahead_s = ahead_s if ahead_s > 0.0 else 0.0  # max() takes 80 ns
        return ahead_s


def _signed(difference: int) -> int:
    """The difference of two timestamps, of which the later one may have wrapped."""
    return (difference + 0x8000_0000 & 0xFFFF_FFFF) - 0x8000_0000
