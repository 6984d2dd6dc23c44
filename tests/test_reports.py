"""What one call's RTCP says; the rest of it is in test_session.py, where reports are sent."""

import pytest

import audio
import ledger
import meter
import metrics
import reports
import rtp
import speech
from sdp import Codec


@pytest.fixture
def found() -> reports.Reports:
    counters, timings = ledger.Counters(metrics.Transceiver), ledger.Histograms(metrics.Timing)
    encoder = speech.encoder(Codec.OPUS, 16_000)
    playout = audio.Playout(encoder, ssrc=7, payload_type=111, sequence=1, timestamp=1)
    return reports.Reports(playout, 48_000, meter.Meter(counters, timings, 0.0))


def packet(sequence: int, ssrc: int = 5) -> rtp.Packet:
    read = rtp.read(rtp.write(111, sequence, 960 * sequence, ssrc, b"x"))
    assert read is not None
    return read


def test_nothing_is_reported_of_silence(found: reports.Reports) -> None:
    assert found.write(1.0, 1e9) is None


def test_a_report_is_about_the_stream_that_was_heard_last(found: reports.Reports) -> None:
    first = [found.received(packet(sequence), 0.0) for sequence in (1, 2, 4)]
    assert first == [True, False, False]
    (block,) = rtp.read_reports(found.write(1.0, 1e9) or b"")
    assert (block.ssrc, block.lost) == (5, 1)
    assert not found.received(packet(9, ssrc=6), 1.0)
    (block,) = rtp.read_reports(found.write(2.0, 1e9) or b"")
    assert (block.ssrc, block.lost) == (6, 0)


def test_what_a_client_says_of_others_is_ignored(found: reports.Reports) -> None:
    about = [rtp.Block(ssrc, 64, 3, 100, 0, 0, 0) for ssrc in (8, 9)]
    assert found.read(rtp.receiver_report(5, about, "client"), 0.0, 1e9) == []
    assert found.fraction_lost == 0
    ours = rtp.Block(7, 64, 3, 100, 0, 0, 0)
    assert found.read(rtp.receiver_report(5, [ours], "client"), 0.0, 1e9) == [ours]
    assert (found.fraction_lost, found.round_trip_s) == (0.25, None)
