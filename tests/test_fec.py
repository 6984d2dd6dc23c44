"""When the encoder is changed, and that a change is not heard."""

import functools
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fec
import opus
import rtp

LOUD = struct.pack("<h", 9_000) * 480
LOW = struct.pack("<h", -32_768) * 480
QUIET = struct.pack("<hh", 300, -300) * 240


class FakeCodec:
    """Shows in its payload for how much loss it was made, and what it was told since."""

    def __init__(self, percent):
        self.made_for = self.expects = percent
        self.closed = False

    def encode(self, pcm):
        assert not self.closed
        return b"fec" if self.made_for else b"plain"

    def silence(self):
        return self.encode(b"")

    def expect_loss(self, percent):
        assert self.made_for, "CELT has no FEC"
        self.expects = percent

    def close(self):
        self.closed = True


class Client:
    """Reports as a client's, on a stream that begins anywhere."""

    def __init__(self, begin=70_000, lost=0):
        self.highest, self.lost = begin, lost

    def block(self, packets=0, lost=0):
        self.highest += packets
        self.lost += lost
        return rtp.Block(1, 0, self.lost, self.highest, 0, 0, 0)


class Line:
    """An encoder, its client, and all codecs that were made."""

    def __init__(self):
        self.codecs = []
        self.encoder = fec.Encoder(24_000, self.make)
        self.client = Client()
        self.encoder.report(self.client.block())

    def make(self, percent):
        self.codecs.append(FakeCodec(percent))
        return self.codecs[-1]

    def reports(self, packets, lost):
        self.encoder.report(self.client.block(packets, lost))


def test_nothing_lost_nothing_changed():
    line = Line()
    for _ in range(20):
        line.reports(50, 0)
        assert line.encoder.encode(QUIET) == b"plain"
    assert len(line.codecs) == 1


def test_loss_protects_from_the_next_quiet_frame_on_and_its_end_ends_it():
    line = Line()
    line.reports(250, 8)
    assert line.encoder.losses.share == pytest.approx(0.032)
    assert line.encoder.encode(LOUD) == b"plain"
    assert not line.encoder.protected
    assert line.encoder.encode(LOW) == b"plain"
    assert line.encoder.encode(QUIET) == b"fec"
    assert line.encoder.protected
    assert line.codecs[0].closed
    assert line.codecs[1].made_for == 3
    reports = 0
    while line.encoder.encode(QUIET) == b"fec":
        line.reports(50, 0)
        reports += 1
        assert line.codecs[1].expects >= 1
    assert 10 < reports < 30, "packets of 20 ms: some fifteen seconds"
    assert [codec.closed for codec in line.codecs] == [True, True, False]


def test_a_change_does_not_wait_for_ever():
    line = Line()
    line.reports(250, 25)
    frames = [line.encoder.encode(LOUD) for _ in range(fec.QUIET_FRAMES_MAX + 2)]
    assert frames == [b"plain"] * fec.QUIET_FRAMES_MAX + [b"fec"] * 2


def test_silence_is_the_best_moment():
    line = Line()
    line.reports(250, 25)
    assert line.encoder.encode(LOUD) == b"plain"
    assert line.encoder.silence() == b"fec"


def test_the_encoder_hears_how_much_is_lost():
    line = Line()
    line.reports(250, 8)
    line.encoder.encode(QUIET)
    line.reports(250, 42)
    assert line.encoder.encode(LOUD) == b"fec"
    assert (len(line.codecs), line.codecs[1].expects) == (2, 10)
    line.reports(500, 400)
    assert line.encoder.encode(LOUD) == b"fec"
    assert line.codecs[1].expects == fec.PERCENT_MAX


def test_a_change_that_is_no_longer_wanted_does_not_happen():
    line = Line()
    line.reports(250, 10)
    assert line.encoder.encode(LOUD) == b"plain"
    for _ in range(8):
        line.reports(500, 0)
    assert line.encoder.encode(QUIET) == b"plain"
    assert len(line.codecs) == 1


def test_reports_may_come_when_the_codec_has_been_freed():
    line = Line()
    line.reports(250, 10)
    line.encoder.encode(QUIET)
    line.encoder.close()
    line.encoder.close()
    line.reports(250, 50)


def test_what_lies_between_the_thresholds_keeps_what_is():
    line = Line()
    for _ in range(40):
        line.reports(100, 1)
        assert line.encoder.encode(QUIET) == b"plain"
    line.reports(100, 15)
    assert line.encoder.encode(QUIET) == b"fec"
    for _ in range(40):
        line.reports(100, 1)
        assert line.encoder.encode(QUIET) == b"fec"
    assert len(line.codecs) == 2


def test_reports_of_a_pause_and_first_packets_say_nothing():
    line = Line()
    line.reports(10, 1)
    assert line.encoder.losses.share == pytest.approx(0.01), "of the first ten packets"
    line.reports(250, 20)
    share = line.encoder.losses.share
    for _ in range(100):
        line.reports(0, 0)
    assert line.encoder.losses.share == share
    assert len(line.codecs) == 1, "nothing is sent, nothing changes"


def test_duplicates_hide_no_later_loss_and_a_new_numbering_begins_anew():
    line = Line()
    line.reports(100, -30)
    assert line.encoder.losses.share == 0
    line.reports(100, 10)
    assert line.encoder.losses.share == pytest.approx(0.05)
    line.reports(500_000, 400_000)
    line.reports(-500_000, -400_000)
    assert line.encoder.losses.share == pytest.approx(0.05)
    line.reports(50, 200)
    assert line.encoder.losses.share <= 1


BLOCKS = st.builds(
    rtp.Block,
    st.just(1),
    st.integers(0, 255),
    st.integers(-0x80_0000, 0x7F_FFFF),
    st.integers(0, 0xFFFF_FFFF) | st.integers(0, 5_000),
    *[st.integers(0, 0xFFFF_FFFF)] * 3,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(BLOCKS | st.just(None), max_size=60))
def test_no_reports_break_it(reports):
    line = Line()
    for block in reports:
        if block is None:
            line.encoder.encode(QUIET)
        else:
            line.encoder.report(block)
        assert 0 <= line.encoder.losses.share <= 1
        assert sum(not codec.closed for codec in line.codecs) == 1
        assert 0 <= line.codecs[-1].expects <= fec.PERCENT_MAX
        assert line.encoder.protected == (line.codecs[-1].made_for > 0)


# ---- with the real codec -----------------------------------------------------------------------


real = functools.partial(opus.encoder_for, 24_000)


def sentence():
    path = Path(__file__).with_name("data") / "sentence.wav"
    with wave.open(str(path)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    pcm = pcm[: len(pcm) // 960 * 960].reshape(-1, 2).mean(axis=1).astype("<i2")
    return [pcm[n : n + 480].tobytes() for n in range(0, len(pcm), 480)] * 4


def heard(frames, changes):
    """What a client hears, with protection changed as soon as may be after these frames."""
    encoder, client = fec.Encoder(24_000, real), Client()
    encoder.report(client.block())
    decoder, out, changed = opus.Decoder(24_000), [], []
    for n, frame in enumerate(frames):
        if n in changes:
            encoder.report(client.block(500, 0 if encoder.protected else 50))
            for _ in range(8 * encoder.protected):
                encoder.report(client.block(500, 0))
        was = encoder.protected
        payload = encoder.encode(frame)
        if encoder.protected != was:
            changed.append(n)
        out.append(np.frombuffer(decoder.decode(payload) or b"", "<i2"))
    return np.concatenate(out).astype(float), changed


def test_a_change_makes_no_click():
    """A click is a step in the signal: the second difference is large where there was none."""
    frames = sentence()
    plain, none = heard(frames, [])
    changing, changed = heard(frames, range(20, len(frames), 60))
    assert (none, len(plain)) == ([], len(changing))
    print(f"changed at frames {changed}")
    assert len(changed) >= 6
    for n in changed:
        step, before = (
            np.abs(np.diff(signal[n * 480 - 240 : n * 480 + 720], 2)).max()
            for signal in (changing, plain)
        )
        print(f"frame {n}: largest step {step:.0f}, without a change {before:.0f}")
        assert step < before + 600
    # Speech goes on: 4 ms later where it is protected, so levels are compared and not samples
    whole = len(plain) // 2_400 * 2_400
    levels = [np.sqrt((x[:whole].reshape(-1, 2_400) ** 2).mean(axis=1)) for x in (plain, changing)]
    assert np.corrcoef(*levels)[0, 1] > 0.98


def test_protected_speech_carries_a_copy_of_what_is_lost():
    encoder, client = fec.Encoder(24_000, real), Client()
    encoder.report(client.block())
    encoder.report(client.block(250, 12))
    decoder = opus.Decoder(24_000)
    copies = [decoder.recover(encoder.encode(frame), 480) for frame in sentence()]
    assert encoder.protected
    assert sum(copy is not None for copy in copies) > len(copies) / 2


def test_silence_amid_protected_speech_is_silent_and_leaves_no_crack():
    """It is CELT's frame between SILK's: the decoder forgets SILK, and the encoder has to."""
    encoder, decoder = opus.encoder_for(24_000, 5), opus.Decoder(24_000)
    fresh = opus.encoder_for(24_000, 5)
    frames = sentence()
    for frame in frames[:60]:
        decoder.decode(encoder.encode(frame))
    silent = [np.frombuffer(decoder.decode(encoder.silence()) or b"", "<i2") for _ in range(3)]
    print([int(np.abs(piece).max()) for piece in silent])
    assert np.abs(silent[1]).max() < 30
    assert [encoder.encode(frame) for frame in frames[75:90]] == [
        fresh.encode(frame) for frame in frames[75:90]
    ]
