"""The codecs of a call: what its offer chose, made for the rate of its backend.

What it owns: which decoder and encoder belong to a codec, and the units that packets are stamped
in. Opus is the better one in everything, G.711 what else is spoken; there is no third.

Rules that stay true:
- A receiver counts in the clock of Opus, whatever the codec: stamps of a slower clock are
  multiplied. That holds when they wrap, too, since 48 kHz is a multiple of 8 kHz.
- What is sent is stamped in the codec's own clock (RFC 3551 section 4.1).

https://www.rfc-editor.org/rfc/rfc3551#section-4.1 (clocks of codecs)
"""

import functools
from typing import Protocol

import audio
import fec
import g711
import opus
import receiver
import rtp
import sdp
import telephone

_LAWS = {sdp.Codec.PCMU: g711.Law.MU, sdp.Codec.PCMA: g711.Law.A}


class Decoder(receiver.SpeechDecoder, Protocol):
    """What a session needs beside what its receiver does."""

    def close(self) -> None:
        """Free it now."""


class Encoder(audio.SpeechEncoder, Protocol):
    """What a session needs beside what its play-out does."""

    def report(self, block: rtp.Block) -> None:
        """Hear from the client how it receives us."""

    def close(self) -> None:
        """Free it now."""


def decoder(codec: sdp.Codec, rate_hz: int) -> Decoder:
    """What hears a caller. Raises as opus.Decoder does."""
    law = _LAWS.get(codec)
    return opus.Decoder(rate_hz) if law is None else telephone.Decoder(law, rate_hz)


def encoder(codec: sdp.Codec, rate_hz: int) -> Encoder:
    """What speaks to a caller. Raises as opus.Encoder does."""
    law = _LAWS.get(codec)
    if law is None:
        return fec.Encoder(rate_hz, functools.partial(opus.encoder_for, rate_hz))
    return telephone.Encoder(law, rate_hz)


def in_opus_clock(packet: rtp.Packet, codec: sdp.Codec) -> rtp.Packet:
    """A packet as a receiver takes it."""
    ratio = rtp.CLOCK_HZ // codec.clock_hz
    if ratio == 1:
        return packet
    return packet._replace(timestamp=packet.timestamp * ratio & 0xFFFF_FFFF)
