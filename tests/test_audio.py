"""The way out, with a codec that shows what it was given."""

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
import rtp

RATE_HZ = 16_000
FRAME = 640  # octets of 20 ms


class FakeCodec:
    """A payload is the first sample of its frame."""

    rate_hz = RATE_HZ

    def __init__(self) -> None:
        self.encoded: list[bytes] = []

    def encode(self, pcm: bytes) -> bytes:
        assert len(pcm) == FRAME
        self.encoded.append(pcm)
        return pcm[:2]

    def silence(self) -> bytes:
        return self.encode(bytes(FRAME))


def playout(codec: audio.SpeechEncoder | None = None) -> audio.Playout:
    return audio.Playout(
        codec or FakeCodec(), ssrc=77, payload_type=111, sequence=0xFFFE, timestamp=0xFFFF_FF00
    )


def speech(frames: float, first: int = 1) -> bytes:
    """Frames of samples first, first + 1, …; a fraction of a frame at the end."""
    whole = b"".join(struct.pack("<H", first + n) * (FRAME // 2) for n in range(int(frames) + 1))
    return whole[: int(frames * FRAME)]


def sent(packets: list[bytes]) -> list[tuple[int, bool, int, int]]:
    """Sequence from the start, marker, timestamp from the start, first sample."""
    out = []
    for datagram in packets:
        read = rtp.read(datagram)
        assert read is not None
        assert (read.ssrc, read.payload_type) == (77, 111)
        sequence = read.sequence - 0xFFFE & 0xFFFF
        timestamp = read.timestamp - 0xFFFF_FF00 & 0xFFFF_FFFF
        out.append((sequence, read.marker, timestamp, int.from_bytes(read.payload, "little")))
    return out


def test_the_first_frame_leaves_at_once_and_the_grid_starts_there() -> None:
    out = playout()
    assert (out.wakes_at, out.send(99.0)) == (None, [])
    assert out.write("a", speech(3), 100.007)
    assert out.wakes_at == 100.007
    assert sent(out.send(100.007)) == [(0, True, 0, 1)]
    assert out.wakes_at == pytest.approx(100.027)
    assert out.send(100.0269) == []
    assert sent(out.send(100.0271)) == [(1, False, 960, 2)]
    assert out.wakes_at == pytest.approx(100.047), "the grid keeps its place"
    assert sent(out.send(100.048)) == [(2, False, 1_920, 3)]
    assert out.wakes_at is None
    assert (out.packets_sent, out.octets_sent) == (3, 6)


def test_silence_opens_the_line_and_belongs_to_no_item() -> None:
    out = playout()
    assert sent([out.silence(5.0)]) == [(0, True, 0, 0)]
    assert out.events() == []
    assert out.packets_sent == 1
    out.write("a", speech(1), 5.1)
    assert out.wakes_at is not None and out.wakes_at <= 5.1
    (packet,) = sent(out.send(5.1))
    assert packet == (1, True, 4_800, 1)
    assert out.played_ms("a") == 20


def test_after_a_pause_the_timestamp_is_that_of_the_clock_and_the_marker_says_so() -> None:
    out = playout()
    out.write("a", speech(1), 10.0)
    out.send(10.0)
    out.write("a", speech(2, 5), 12.5)
    assert out.timestamp_at(12.5) == 0xFFFF_FF00 + 120_000 & 0xFFFF_FFFF
    assert sent(out.send(12.5)) == [(1, True, 120_000, 5)]
    assert sent(out.send(12.52)) == [(2, False, 120_960, 6)]


def test_audio_that_comes_within_the_last_frame_continues_its_grid() -> None:
    out = playout()
    out.write("a", speech(1), 10.0)
    out.send(10.0)
    out.write("b", speech(1, 7), 10.005)
    assert out.send(10.005) == []
    assert out.wakes_at == pytest.approx(10.02)
    assert sent(out.send(10.021)) == [(1, False, 960, 7)]


def test_a_late_timer_is_caught_up_with_and_a_very_late_one_makes_a_pause() -> None:
    out = playout()
    out.write("a", speech(50), 10.0)
    out.send(10.0)
    assert [entry[2] for entry in sent(out.send(10.075))] == [960, 1_920, 2_880]
    assert out.wakes_at == pytest.approx(10.08)
    assert sent(out.send(10.5)) == [(4, True, 24_000, 5)]
    assert sent(out.send(10.52)) == [(5, False, 24_960, 6)]
    assert len(out.send(10.595)) == 3


def test_a_last_partial_frame_is_sent_with_silence_and_not_counted() -> None:
    codec = FakeCodec()
    out = playout(codec)
    out.write("a", speech(1.5), 10.0)
    assert len(out.send(10.0)) == 1
    assert out.wakes_at is None, "half a frame waits for the rest"
    assert out.events() == [audio.Started("a")]
    out.finish("a", 10.03)
    assert out.wakes_at == 10.03
    assert sent(out.send(10.03)) == [(1, True, 1_440, 2)]
    assert codec.encoded[1] == struct.pack("<H", 2) * 160 + bytes(320)
    assert out.events() == [audio.Drained("a", 30)]
    assert out.played_ms("a") == 30


def test_pieces_of_any_length_are_joined() -> None:
    codec = FakeCodec()
    out = playout(codec)
    pcm = speech(3)
    for n in range(0, len(pcm), 7):  # also in the middle of samples
        out.write("a", pcm[n : n + 7], 10.0)
    for n in range(3):
        out.send(10.0 + n * 0.02)
    assert b"".join(codec.encoded) == pcm


def test_an_item_that_was_sent_is_drained_when_it_is_finished() -> None:
    out = playout()
    out.write("a", speech(1), 10.0)
    out.send(10.0)
    assert out.events() == [audio.Started("a")]
    out.finish("a", 10.0)
    out.finish("a", 10.0)
    out.finish("never heard of", 10.0)
    assert out.events() == [audio.Drained("a", 20)]
    assert out.wakes_at is None


def test_items_play_one_after_another() -> None:
    out = playout()
    out.write("a", speech(1.5), 10.0)
    out.write("b", speech(1, 50), 10.0)  # finishes a
    out.write("a", speech(9, 90), 10.0)  # too late for a
    out.finish("b", 10.0)
    packets = [entry[3] for n in range(5) for entry in sent(out.send(10.0 + n * 0.02))]
    assert packets == [1, 2, 50]
    assert out.events() == [
        audio.Started("a"),
        audio.Drained("a", 30),
        audio.Started("b"),
        audio.Drained("b", 20),
    ]


def test_only_silence_leaves_after_a_flush_and_it_says_what_was_played() -> None:
    codec = FakeCodec()
    out = playout(codec)
    out.write("a", speech(1), 10.0)
    out.write("b", speech(100), 10.0)
    out.write("c", speech(100), 10.0)
    for n in range(4):
        out.send(10.0 + n * 0.02)
    assert out.events()[-1] == audio.Started("b")
    assert out.flush(10.065) == [audio.Played("b", 60), audio.Played("c", 0)]
    assert len(codec.encoded) == 4, "what is dropped was never encoded"
    out.write("b", speech(5), 10.07)  # was under way
    out.finish("b", 10.0)
    out.write("c", speech(5), 10.07)
    hush = [packet for n in range(10) for packet in sent(out.send(10.08 + n * 0.02))]
    assert hush == [(4 + n, False, 3_840 + n * 960, 0) for n in range(audio.HUSH_PACKETS)]
    assert out.wakes_at is None
    assert out.events() == [] == out.flush(10.3)
    assert [out.played_ms(item) for item in "abcd"] == [20, 60, 0, 0]
    out.write("d", speech(1, 9), 10.301)
    assert sent(out.send(10.301)) == [(7, True, 14_448, 9)], "the next utterance leaves at once"


def test_a_reply_that_follows_a_flush_needs_no_silence() -> None:
    out = playout()
    out.write("a", speech(3), 10.0)
    out.send(10.0)
    out.flush(10.005)
    out.write("b", speech(0.5, 9), 10.006)
    assert out.wakes_at is None, "half a frame is not due"
    out.finish("b", 10.007)
    assert sent(out.send(10.02)) == [(1, False, 960, 9)]
    assert out.wakes_at is None


def test_a_flush_before_the_first_packet_is_followed_by_nothing() -> None:
    out = playout()
    out.write("a", speech(3), 10.0)
    assert out.flush(10.0) == [audio.Played("a", 0)]
    assert out.wakes_at is None


def test_items_without_a_whole_sample_make_no_sound_but_end() -> None:
    out = playout()
    out.write("a", b"", 10.0)
    out.write("b", b"x", 10.0)
    out.finish("a", 10.0)
    out.finish("b", 10.0)
    assert (out.wakes_at, out.events(), out.flush(10.0)) == (None, [audio.Drained("b", 0)], [])
    assert (out.write("b", speech(1), 10.0), out.wakes_at) == (True, None), "b has ended"


def test_a_full_queue_takes_what_fits_and_ends_the_item_there() -> None:
    out = playout()
    longest = int(audio.QUEUE_S_MAX * RATE_HZ * 2)
    assert out.write("a", bytes(longest - 100), 10.0)
    assert not out.write("a", speech(1), 10.0)
    assert out.write("a", speech(1), 10.0), "told once, then ignored"
    assert not out.write("b", speech(1), 10.0)
    assert out.flush(10.0) == [audio.Played("a", 0)]
    assert out.write("c", bytes(longest), 10.0), "all of it is free again"
    assert len(out.send(10.0)) == 1
    assert out.write("c", bytes(FRAME), 10.0)
    assert not out.write("c", bytes(2), 10.0)


def test_items_and_what_is_remembered_of_them_are_bounded() -> None:
    out = playout()
    taken = [out.write(f"item {n}", b"xx", 10.0) for n in range(audio.ITEMS_MAX + 5)]
    assert taken == [True] * audio.ITEMS_MAX + [False] * 5
    assert len(out.flush(10.0)) == audio.ITEMS_MAX
    for n in range(1_000):
        out.write(f"other {n}", bytes(FRAME), 10.0)
        out.finish(f"other {n}", 10.0)
        assert len(out.send(10.0 + n)) == 1
        out.events()
    assert len(out._ended) == audio.ITEMS_REMEMBERED_MAX
    assert (out.played_ms("other 999"), out.played_ms("other 1")) == (20, 0)


def test_sender_reports_get_the_timestamp_of_their_moment() -> None:
    out = playout()
    assert out.timestamp_at(5.0) == out.last_timestamp == 0xFFFF_FF00
    out.write("a", speech(1), 10.0)
    out.send(10.003)
    assert out.timestamp_at(10.003) == 0xFFFF_FF00
    assert out.timestamp_at(10.013) == 0xFFFF_FF00 + 480 & 0xFFFF_FFFF


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from("abcdef"), st.integers(0, 300)),
    st.tuples(st.just("finish"), st.sampled_from("abcdef"), st.just(0)),
    st.tuples(st.sampled_from(["flush", "pass"]), st.just(""), st.integers(0, 300)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_any_use_keeps_the_account(actions: list[tuple[str, str, int]]) -> None:
    out = playout()
    now, flushes = 1_000.0, 0
    ended: set[str] = set()
    left: list[tuple[float, rtp.Packet]] = []

    def step() -> None:
        datagrams = out.send(now)
        assert len(datagrams) <= 4
        left.extend((now, read) for d in datagrams if (read := rtp.read(d)) is not None)
        assert out.wakes_at is None or out.wakes_at > now
        for event in out.events():
            assert event.item not in ended
            ended.update({event.item} if isinstance(event, audio.Drained) else ())
        played = sum(-(-out.played_ms(item) // audio.FRAME_MS) for item in "abcdef")
        silent = sum(not any(read.payload) for _, read in left)
        assert played == len(left) - silent, "what was flushed is not sent"
        assert silent <= audio.HUSH_PACKETS * flushes
        assert out.packets_sent == len(left)

    for action, item, ms in actions:
        if action == "write":
            out.write(item, b"\1\0" * (ms * RATE_HZ // 1_000), now)
        elif action == "finish":
            out.finish(item, now)
        elif action == "flush":
            flushes += 1
            ended.update(played.item for played in out.flush(now))
        else:
            now += ms / 1_000
        step()
    while out.wakes_at is not None:
        now = max(now, out.wakes_at)
        step()
    for (_, one), (_, other) in itertools.pairwise(left):
        assert other.sequence == one.sequence + 1 & 0xFFFF
        ticks = other.timestamp - one.timestamp & 0xFFFF_FFFF
        assert ticks >= 960 if other.marker else ticks == 960
    for at, read in left:  # no packet is ahead of the clock, none further behind it than allowed
        stamp_s = (read.timestamp - left[0][1].timestamp & 0xFFFF_FFFF) / rtp.CLOCK_HZ
        assert -1e-3 <= at - left[0][0] - stamp_s <= audio.LATE_S_MAX + 1e-3
