"""Whether what we send is protected against loss, by the client's reports: an encoder that changes.

CELT, the encoder of choice, costs an eighth of the work of SILK and looks less far ahead, but has
no in-band FEC: what is lost, the client invents. SILK (in hybrid with CELT) carries a coarse copy
of each frame in the next packet, and a client that misses one plays that. `Encoder` is the former
where nothing gets lost, and the latter as long as reports say that something does.

Rules that stay true:
- Loss is counted in packets, over the last WINDOW_PACKETS of them that were sent: reports come when
  clients like, every second or every eight, and those that cover a pause say nothing.
- On and off lie apart (PROTECT_AT, LEAVE_AT): a path that loses the same all the time does not
  make the encoder change all the time.
- A change waits for a quiet frame, for QUIET_FRAMES_MAX at the longest. The decoder begins anew at
  a change of mode (https://www.rfc-editor.org/rfc/rfc6716#section-4.5), and so has the encoder to:
  each time it is a new one. What it would have looked ahead to, 2.5 or 6.5 ms, is lost by that.
- Nothing changes while nothing is sent: an idle session has one encoder and no work.

Lost packets are not sent again: receiver.py has the reasons, which are the same from here.

It owns no codec: those are made by a function that is an argument. It reads no RTCP (rtp.py does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import rtp

WINDOW_PACKETS = 500
"""Ten seconds of speech, over which loss is judged. Fewer, and chance switches at 1 %; more, and a
walk out of the Wi-Fi's reach is over before it is noticed."""

JUDGED_PACKETS = 100
"""Taken as sent when there were fewer: one packet lost of the first ten is not ten per cent."""

PROTECT_AT = 0.02
"""Share of packets lost from which on protection pays. It costs eight times the work for a frame
(20 us become 150 on a 2 vCPU Xeon), while somebody speaks, and 4 ms of delay. What it brings: with
1, 2, 5, 10 % lost, PESQ is 3.9, 3.8, 3.4, 3.1 instead of 3.3, 3.1, 2.5, 2.0 (wide band, 48 kb/s,
the client's concealment played by libopus; without loss 4.0 and 3.7). Lower, and a core carries
fewer calls for what few hear; higher, and replies are hard to follow. `quality.py` prints the like.
"""

LEAVE_AT = 0.005
"""Share below which it ends: after a single burst in some fifteen seconds of speech."""

PERCENT_MAX = 25
"""Told to the encoder at most. It spends the more on the copies the more is lost; past this the
speech itself gets too little."""

QUIET = 300
"""Peak of a frame that is quiet, of 32,767: 41 dB below the loudest. Between words speech falls
below it, however good the microphone; what is cut out of it nobody hears."""

QUIET_FRAMES_MAX = 100
"""Frames that a change waits for a quiet one. There is music, and there are bots with an office in
the background; two seconds are nothing beside the time it took to notice."""

_PACKETS_MAX = rtp.SEQUENCE_DROPOUT_MAX  # in one report; more is another numbering, or made up


class Codec(Protocol):
    """What is changed: opus.Encoder is one."""

    def encode(self, pcm: bytes) -> bytes:
        """One frame of PCM16LE mono to one payload."""

    def silence(self) -> bytes:
        """A frame that is silent at once, whatever was encoded before it."""

    def expect_loss(self, percent: int) -> None:
        """Say how much of what is sent gets lost."""

    def close(self) -> None:
        """Free it now."""


class Losses:
    """How much of what we send gets lost, by report blocks (RFC 3550 section 6.4.1)."""

    def __init__(self) -> None:
        self._highest = self._lost = -1  # of the last report
        self._packets = self._missing = 0.0  # of late, older ones counting less

    @property
    def share(self) -> float:
        """Of the last WINDOW_PACKETS or so, from 0 to 1."""
        return min(1.0, self._missing / max(self._packets, JUDGED_PACKETS))

    def report(self, block: rtp.Block) -> None:
        """Take a report on our stream. One that contradicts the last is a new beginning."""
        packets = block.highest_sequence - self._highest
        missing = block.lost - self._lost
        first = self._highest < 0
        self._highest, self._lost = block.highest_sequence, block.lost
        if first or not 0 < packets <= _PACKETS_MAX:
            return
        self._packets += packets
        self._missing += max(0, min(missing, packets))
        if self._packets > WINDOW_PACKETS:
            self._missing *= WINDOW_PACKETS / self._packets
            self._packets = WINDOW_PACKETS


class Encoder:
    """PCM16LE mono frames to payloads, protected or not. Has what audio.Playout asks for."""

    def __init__(self, rate_hz: int, make: Callable[[int], Codec]) -> None:
        """`make` makes a codec for so many per cent of loss: with FEC for any, for 0 without."""
        self.rate_hz = rate_hz
        self.protected = False
        """Whether what is encoded now carries copies."""
        self.losses = Losses()
        self._make = make
        self._codec = make(0)
        self._wanted = False
        self._percent = 0  # of loss, by the reports,
        self._expected = 0  # and what the codec has been told
        self._pending = False  # whether it is to be changed or told something
        self._waited = 0

    def report(self, block: rtp.Block) -> None:
        """Hear from the client how it receives us."""
        self.losses.report(block)
        share = self.losses.share
        if share >= PROTECT_AT:
            self._wanted = True
        elif share < LEAVE_AT:
            self._wanted = False
        self._percent = max(1, min(PERCENT_MAX, round(100 * share))) if self._wanted else 0
        self._pending = self._percent != self._expected

    def encode(self, pcm: bytes) -> bytes:
        """One frame to one payload."""
        if self._pending:
            samples = memoryview(pcm).cast("h")
            self._adapt(min(samples) >= -QUIET and max(samples) <= QUIET)
        return self._codec.encode(pcm)

    def silence(self) -> bytes:
        """A frame that is silent at once, whatever was encoded before it."""
        if self._pending:
            self._adapt(True)
        return self._codec.silence()

    def close(self) -> None:
        """Free the codec now. Closing twice is harmless."""
        self._codec.close()

    def _adapt(self, is_quiet: bool) -> None:
        """Tell the codec how much gets lost, or change it if this is the frame for that."""
        if self._wanted == self.protected:
            self._codec.expect_loss(self._percent)
        else:
            self._waited += 1
            if not is_quiet and self._waited <= QUIET_FRAMES_MAX:
                return
            self._codec.close()
            self._codec = self._make(self._percent)
            self.protected = self._wanted
        self._waited = 0
        self._expected = self._percent
        self._pending = False
