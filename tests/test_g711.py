"""G.711 against the standard's tables and other implementations; what stands in for lost sound."""

import math
import warnings
from array import array

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import g711
from g711 import Law

EVERY_OCTET = bytes(range(256))
EVERY_SAMPLE = array("h", range(-32_768, 32_768))


def reference(name: str) -> object:
    """The interpreter's own codec, as long as it has one (until 3.12)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(pytest.importorskip("audioop"), name)


def pcm(values: object) -> bytes:
    return np.asarray(values).astype("<i2").tobytes()


def samples(octets: bytes) -> list[int]:
    return list(memoryview(octets).cast("h"))


@pytest.mark.parametrize(
    ("law", "octet", "value"),
    [
        # G.711 tables 1a to 2b, first and last of the positive and the negative values; the
        # standard's numbers have 13 and 14 bits, these 16.
        (Law.MU, 0x80, 32_124),
        (Law.MU, 0xFF, 0),
        (Law.MU, 0xFE, 8),
        (Law.MU, 0x8F, 16_764),
        (Law.MU, 0x7E, -8),
        (Law.MU, 0x7F, 0),
        (Law.MU, 0x00, -32_124),
        (Law.A, 0xAA, 32_256),
        (Law.A, 0xD5, 8),
        (Law.A, 0xD4, 24),
        (Law.A, 0x55, -8),
        (Law.A, 0x2A, -32_256),
    ],
)
def test_the_standards_values(law: Law, octet: int, value: int) -> None:
    assert samples(g711.decode(law, bytes([octet]))) == [value]


@pytest.mark.parametrize(
    ("law", "decode", "encode", "step"),
    [(Law.MU, "ulaw2lin", "lin2ulaw", 4), (Law.A, "alaw2lin", "lin2alaw", 1)],
    ids=["mu", "a"],
)
def test_the_interpreters_codec_agrees(law: Law, decode: str, encode: str, step: int) -> None:
    assert g711.decode(law, EVERY_OCTET) == reference(decode)(EVERY_OCTET, 2)  # type: ignore[operator]
    # It cuts samples to 14 bits before mu-law, downwards: what lies between is half a bit off.
    exact = EVERY_SAMPLE[::step].tobytes()
    assert g711.encode(law, exact) == reference(encode)(exact, 2)  # type: ignore[operator]


@pytest.mark.parametrize(("law", "codec"), [(Law.MU, "pcm_mulaw"), (Law.A, "pcm_alaw")])
def test_ffmpegs_codec_agrees(law: Law, codec: str) -> None:
    reader = av.CodecContext.create(codec, "r")
    reader.sample_rate, reader.layout = 8_000, "mono"
    (frame,) = reader.decode(av.Packet(EVERY_OCTET))
    assert bytes(frame.planes[0])[:512] == g711.decode(law, EVERY_OCTET)


@pytest.mark.parametrize("law", list(Law))
def test_what_is_decoded_is_encoded_to_the_same(law: Law) -> None:
    again = g711.encode(law, g711.decode(law, EVERY_OCTET))
    # Mu-law has a zero of each sign, and PCM has one.
    assert again == EVERY_OCTET.replace(b"\x7f", b"\xff" if law is Law.MU else b"\x7f")


@pytest.mark.parametrize("law", list(Law))
def test_louder_stays_louder_and_the_error_is_in_proportion(law: Law) -> None:
    heard = samples(g711.decode(law, g711.encode(law, EVERY_SAMPLE.tobytes())))
    assert heard == sorted(heard)
    for said, found in zip(EVERY_SAMPLE, heard, strict=True):
        if abs(said) < 32_100:  # the loudest are clipped
            assert abs(said - found) <= (abs(said) + 256) / 32


@pytest.mark.parametrize("law", list(Law))
def test_silence_is_silent(law: Law) -> None:
    assert abs(samples(g711.decode(law, g711.SILENCE[law]))[0]) <= 8
    assert g711.encode(law, bytes(2)) == g711.SILENCE[law]
    assert g711.encode(law, b"\0\0\0") == g711.SILENCE[law]  # half a sample is none


@given(st.binary(max_size=400), st.sampled_from(Law))
def test_any_octets_decode(payload: bytes, law: Law) -> None:
    assert len(g711.decode(law, payload)) == 2 * len(payload)


# --- concealment --------------------------------------------------------------------------------


def voice(hz: float, seconds: float, begin_s: float = 0.0) -> np.ndarray:  # type: ignore[type-arg]
    """Something with a pitch: a fundamental and two overtones."""
    at = begin_s + np.arange(round(8_000 * seconds)) / 8_000
    parts = [np.sin(2 * np.pi * hz * n * at + n) / n for n in (1, 2, 3)]
    return 6_000 * np.sum(parts, axis=0)


def level(octets: bytes) -> float:
    return float(np.sqrt(np.mean(np.frombuffer(octets, "<i2").astype(float) ** 2)))


@pytest.mark.parametrize("hz", [70, 115, 160, 195, 260])
def test_a_lost_packet_sounds_on(hz: float) -> None:
    concealer = g711.Concealer()
    said = voice(hz, 0.12)
    for begin in range(0, 800, 160):
        concealer.heard(pcm(said[begin : begin + 160]))
    made = np.frombuffer(concealer.lost(160), "<i2").astype(float)
    assert np.corrcoef(made, said[800:])[0, 1] > 0.8


def test_an_invention_fades_out_and_back_in() -> None:
    concealer = g711.Concealer()
    said = pcm(voice(120, 0.1))
    assert concealer.heard(said) == said
    made = [concealer.lost(160) for _ in range(5)]
    levels = [level(each) for each in made]
    assert levels[0] > 0.7 * level(said)
    assert levels == sorted(levels, reverse=True)
    assert levels[3:] == [0.0, 0.0]  # after 60 ms
    # What follows is faded in over a few milliseconds, and then as it came.
    after = pcm(voice(120, 0.02, begin_s=0.2))
    heard = concealer.heard(after)
    assert heard != after
    assert heard[2 * g711.SEAM :] == after[2 * g711.SEAM :]
    assert concealer.heard(after) == after


def test_there_is_no_click_where_an_invention_begins_and_ends() -> None:
    concealer = g711.Concealer()
    said = voice(131, 0.14)
    out = concealer.heard(pcm(said[:800])) + concealer.lost(160) + concealer.heard(pcm(said[960:]))
    jumps = np.abs(np.diff(np.frombuffer(out, "<i2").astype(float)))
    assert jumps[790:].max() < 1.5 * np.abs(np.diff(said)).max()


def test_a_loss_before_anything_was_heard_is_silence() -> None:
    assert g711.Concealer().lost(160) == bytes(320)


@given(st.lists(st.one_of(st.integers(1, 700), st.binary(max_size=600)), max_size=12))
def test_whatever_comes_and_gets_lost_has_its_length(steps: list[int | bytes]) -> None:
    concealer = g711.Concealer()
    for step in steps:
        if isinstance(step, int):
            assert len(concealer.lost(step)) == 2 * step
        else:
            assert len(concealer.heard(g711.decode(Law.A, step))) == 2 * len(step)


def test_a_level_is_what_the_tests_take_it_for() -> None:
    assert math.isclose(level(pcm([100, -100])), 100.0)
