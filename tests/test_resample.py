"""Another rate: what is below the cut stays, what is above goes, and pieces make no difference."""

import math

import numpy as np
import pytest

from resample import TAPS, Resampler

RATES = [(24_000, 16_000), (16_000, 24_000)]


def tone(hz: float, rate_hz: int, seconds: float = 0.5) -> bytes:
    at = np.arange(int(rate_hz * seconds)) / rate_hz
    return (8_000 * np.sin(2 * np.pi * hz * at)).astype("<i2").tobytes()


def level_db(pcm: bytes) -> float:
    """Against the tone, without the ends."""
    samples = np.frombuffer(pcm, "<i2").astype(float)[200:-200]
    return 20 * math.log10(max(1e-9, float(np.sqrt(np.mean(samples**2)))) / (8_000 / math.sqrt(2)))


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_speech_stays_what_it_is(from_hz: int, to_hz: int) -> None:
    for hz in (100, 1_000, 3_000, 5_500):
        out = Resampler(from_hz, to_hz).feed(tone(hz, from_hz))
        assert abs(len(out) // 2 - to_hz // 2) <= TAPS
        assert abs(level_db(out)) < 1.0, hz
        wanted = np.frombuffer(tone(hz, to_hz), "<i2").astype(float)[100:-400]
        got = np.frombuffer(out, "<i2").astype(float)[100:]
        fit = max(
            float(np.corrcoef(wanted, got[shift : shift + len(wanted)])[0, 1])
            for shift in range(2 * TAPS)
        )
        assert fit > 0.9, hz


def test_what_the_lower_rate_cannot_hold_is_gone() -> None:
    for hz in (10_000, 11_000):
        assert level_db(Resampler(24_000, 16_000).feed(tone(hz, 24_000))) < -30


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_pieces_of_any_length_come_out_the_same(from_hz: int, to_hz: int) -> None:
    pcm = tone(440, from_hz)
    whole = Resampler(from_hz, to_hz).feed(pcm)
    for octets in (1, 7, 640, 961):
        pieces = Resampler(from_hz, to_hz)
        parts = [pieces.feed(pcm[at : at + octets]) for at in range(0, len(pcm), octets)]
        assert b"".join(parts) == whole
        assert len(pieces._samples) <= TAPS


def test_the_same_rate_costs_nothing() -> None:
    assert Resampler(16_000, 16_000).feed(b"odd") == b"odd"


def test_too_loud_is_clipped() -> None:
    square = b"".join((b"\xff\x7f" if n // 8 % 2 else b"\x00\x80") for n in range(2_400))
    out = np.frombuffer(Resampler(24_000, 16_000).feed(square), "<i2")
    assert (int(out.min()), int(out.max())) == (-32_768, 32_767)
