"""The codecs of a call, by what its offer chose."""

import itertools

import pytest

import fec
import opus
import rtp
import sdp
import speech
import telephone


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
def test_each_codec_speaks_and_hears_at_the_backends_rate(rate_hz: int) -> None:
    for codec in sdp.Codec:
        encoder, decoder = speech.encoder(codec, rate_hz), speech.decoder(codec, rate_hz)
        pcm = decoder.decode(encoder.encode(bytes(rate_hz // 25)))
        assert pcm is not None
        assert len(pcm) == rate_hz // 25
        encoder.report(rtp.Block(1, 0, 0, 1, 0, 0, 0))
        encoder.close()
        decoder.close()


def test_opus_is_opus_and_the_rest_is_the_telephones() -> None:
    assert isinstance(speech.encoder(sdp.Codec.OPUS, 16_000), fec.Encoder)
    assert isinstance(speech.decoder(sdp.Codec.OPUS, 16_000), opus.Decoder)
    for codec in (sdp.Codec.PCMU, sdp.Codec.PCMA):
        assert isinstance(speech.encoder(codec, 16_000), telephone.Encoder)
        assert isinstance(speech.decoder(codec, 16_000), telephone.Decoder)


def test_stamps_of_the_slower_clock_go_on_over_their_end() -> None:
    stamps = [(0xFFFF_FF60 + at * 160) & 0xFFFF_FFFF for at in range(4)]
    packets = [rtp.Packet(False, 0, at, stamp, 1, b"") for at, stamp in enumerate(stamps)]
    scaled = [speech.in_opus_clock(packet, sdp.Codec.PCMA).timestamp for packet in packets]
    assert [b - a & 0xFFFF_FFFF for a, b in itertools.pairwise(scaled)] == [960] * 3
    assert speech.in_opus_clock(packets[0], sdp.Codec.OPUS) is packets[0]
