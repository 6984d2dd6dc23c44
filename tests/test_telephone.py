"""G.711 at the backend's rate: what passes, how long it is, and what is made of gaps."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

import audio
import g711
import receiver
import rtp
import sdp
import telephone
from g711 import Law

from . import test_session

RATES_HZ = (16_000, 24_000, 48_000)
FRAMES = 50


def tone(hz: float, rate_hz: int, seconds: float = 1.0) -> bytes:
    at = np.arange(round(rate_hz * seconds)) / rate_hz
    return (8_000 * np.sin(2 * np.pi * hz * at)).astype("<i2").tobytes()


def level_db(pcm: bytes) -> float:
    """Against the tone, without the beginning."""
    samples = np.frombuffer(pcm, "<i2").astype(float)[800:]
    return float(20 * np.log10(1e-9 + np.sqrt(np.mean(samples**2)) / (8_000 / np.sqrt(2))))


def frames(pcm: bytes, size: int) -> list[bytes]:
    return [pcm[at : at + size] for at in range(0, len(pcm), size)]


@pytest.mark.parametrize("law", list(Law))
@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_there_and_back_it_is_the_same_voice(law: Law, rate_hz: int) -> None:
    encoder, decoder = telephone.Encoder(law, rate_hz), telephone.Decoder(law, rate_hz)
    for hz in (200, 1_000, 3_300):
        said = tone(hz, rate_hz)
        heard = b""
        for frame in frames(said, rate_hz // 25):
            payload = encoder.encode(frame)
            assert len(payload) == 160
            piece = decoder.decode(payload)
            assert piece is not None
            assert len(piece) == len(frame)
            heard += piece
        assert abs(level_db(heard)) < 0.5, hz
        # Two filters of 2 ms each.
        shift = 4 * rate_hz // 1_000
        there, back = (np.frombuffer(each, "<i2").astype(float) for each in (said, heard))
        assert np.corrcoef(there[1000:-shift], back[1000 + shift :])[0, 1] > 0.99, hz


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
def test_what_a_telephone_cannot_hold_does_not_fold_back(rate_hz: int) -> None:
    for hz in (4_700, 6_000, 7_500):
        down = telephone.Rate(rate_hz, 8_000)
        out = b"".join(down.feed(piece) for piece in frames(tone(hz, rate_hz), rate_hz // 25))
        assert level_db(out) < -60, hz


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_packets_of_any_length_come_out_as_long_as_they_are(rate_hz: int) -> None:
    decoder = telephone.Decoder(Law.MU, rate_hz)
    for octets in (1, 7, 80, 160, 240, 480, 1_440, 20):
        pcm = decoder.decode(bytes(octets))
        assert pcm is not None
        assert len(pcm) == 2 * octets * rate_hz // 8_000
    assert decoder.decode(b"") is None
    assert decoder.decode(bytes(1_601)) is None
    for samples in (rate_hz // 400, rate_hz // 50, rate_hz // 100 + 3, 1):
        whole = max(rate_hz // 400, samples // (rate_hz // 400) * (rate_hz // 400))
        assert len(decoder.conceal(samples)) == 2 * whole
    assert decoder.recover(bytes(160), 320) is None


def test_silence_is_silence_and_the_next_word_has_nothing_of_the_last() -> None:
    encoder = telephone.Encoder(Law.A, 16_000)
    for frame in frames(tone(440, 16_000, 0.1), 640):
        encoder.encode(frame)
    assert encoder.silence() == g711.SILENCE[Law.A] * 160
    quiet = g711.decode(Law.A, encoder.encode(bytes(640)))
    assert np.abs(np.frombuffer(quiet, "<i2")).max() <= 8


def test_a_frame_of_another_length_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="640 octets"):
        telephone.Encoder(Law.MU, 16_000).encode(bytes(320))


def test_filters_bring_no_threads() -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    telephone.Rate(8_000, 16_000).feed(bytes(320))
    before = threads()
    held = [telephone.Rate(8_000, 24_000) for _ in range(20)]
    for each in held:
        each.feed(bytes(320))
    assert threads() == before
    assert threading.active_count() <= before


def packet(number: int, payload: bytes) -> rtp.Packet:
    """As a session hands it to its receiver: in the clock of Opus."""
    return rtp.Packet(False, 0, number & 0xFFFF, number * 960 & 0xFFFF_FFFF, 7, payload)


def test_a_receiver_conceals_what_is_lost_and_keeps_the_time() -> None:
    encoder = telephone.Encoder(Law.MU, 16_000)
    payloads = [encoder.encode(frame) for frame in frames(tone(150, 16_000), 640)]
    heard = receiver.Receiver(telephone.Decoder(Law.MU, 16_000))
    out, lost = b"", {10, 20, 21, 30}
    for number, payload in enumerate(payloads):
        if number not in lost:
            out += b"".join(heard.receive(packet(number, payload), number * 0.02))
    assert len(out) == 640 * FRAMES
    assert heard.decoded == FRAMES - len(lost)
    assert heard.concealed >= 3
    assert level_db(out) > -1.5  # it sounds on over the holes


def test_a_play_out_stamps_in_the_codecs_clock() -> None:
    encoder = telephone.Encoder(Law.MU, 24_000)
    playout = audio.Playout(
        encoder, ssrc=1, payload_type=0, sequence=0, timestamp=0xFFFF_FFF0, clock_hz=8_000
    )
    playout.write("a", bytes(3 * 960), 5.0)
    playout.finish("a", 5.0)
    sent = [rtp.read(each) for at in (5.0, 5.02, 5.04) for each in playout.send(at)]
    assert [each and each.timestamp for each in sent] == [0xFFFF_FFF0, 0x90, 0x130]
    assert {len(each.payload) for each in sent if each} == {160}
    playout.write("b", bytes(960), 6.0)
    (late,) = playout.send(6.0)
    found = rtp.read(late)
    assert found is not None
    assert found.timestamp == (0xFFFF_FFF0 + 8_000) & 0xFFFF_FFFF
    assert found.marker


# --- in a session -------------------------------------------------------------------------------


def offered(direction: str = "sendrecv") -> sdp.Offer:
    return sdp.read_offer(
        "v=0\nm=audio 9 UDP/TLS/RTP/SAVPF 8 13 101\na=rtcp-mux\n"
        "a=rtpmap:101 telephone-event/8000\na=setup:actpass\n"
        f"a=ice-ufrag:abcd\na=ice-pwd:{'p' * 22}\na={direction}\n"
        f"a=fingerprint:sha-256 {':'.join(['AB'] * 32)}"
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> test_session.Call:
    monkeypatch.setattr(test_session, "offer", offered)
    return test_session.Call(monkeypatch)


def test_a_session_hears_pcma_and_no_events_or_comfort_noise(call: test_session.Call) -> None:
    call.session.connected(call.now)
    payload = g711.encode(Law.A, tone(400, 8_000, 0.02))
    for number in range(10):
        kind, octets = (8, payload) if number < 8 else (13, b"\x40") if number < 9 else (101, b"\1")
        packet = rtp.write(kind, number, number * 160, 5, octets)
        call.session.rtp(packet, call.now + number * 0.02)
    assert [len(pcm) for pcm, _ in call.backend.heard] == [640] * 8
    reception = call.session.reports._reception
    assert reception is not None
    assert reception.jitter < 1.0  # in units of 8 kHz, by a clock of 8 kHz
    # What it did not hear was no loss: its time goes on, and what is said next is where it belongs.
    packet = rtp.write(8, 10, 10 * 160, 5, payload)
    call.session.rtp(packet, call.now + 0.2)
    for at in (0.3, 0.32):
        call.session.tick(call.now + at)
    assert sum(len(pcm) for pcm, _ in call.backend.heard) == 11 * 640


def test_a_session_speaks_pcma_in_its_own_clock(call: test_session.Call) -> None:
    call.session.connected(call.now)
    (opening,) = call.peer.sent
    assert (opening.payload_type, opening.payload) == (8, g711.SILENCE[Law.A] * 160)
    call.now += 1.0
    call.backend.reply(tone(400, 16_000, 0.1))
    for _ in range(5):
        call.session.flow(call.now)
        call.now += 0.02
    said = call.peer.sent[1:]
    assert len(said) == 5
    assert said[0].timestamp - opening.timestamp & 0xFFFF_FFFF == 8_000
    steps = [two.timestamp - one.timestamp & 0xFFFF_FFFF for one, two in itertools.pairwise(said)]
    assert steps == [160] * 4
    heard = b"".join(g711.decode(Law.A, packet.payload) for packet in said)
    assert np.abs(np.frombuffer(heard, "<i2")).max() > 7_000
