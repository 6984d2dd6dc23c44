"""The way in, with a codec that shows what it was given."""

import itertools
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import opus
import rtp
from receiver import (
    AHEAD_S_MAX,
    CONCEALED_S_MAX,
    FRAME_MS,
    LACK_S_MAX,
    PAUSE_S,
    PAUSE_S_MAX,
    Receiver,
)

RATE_HZ = 16_000
FRAME = 640  # octets of 20 ms
CONCEALED, RECOVERED = 0x7FFF, 0x4000
CONCEALED_FRAMES = int(CONCEALED_S_MAX * 50)
LACK_FRAMES = int(LACK_S_MAX * 50)
TICK_S = 0.05


class FakeCodec:
    """Payload n decodes to a frame of samples n; with a second number it holds FEC, with a third
    that is the length, in units of 2.5 ms."""

    rate_hz = RATE_HZ

    def __init__(self) -> None:
        self.resets = 0

    def decode(self, payload: bytes) -> bytes | None:
        units = payload[4] if len(payload) == 5 else 8
        return payload[:2] * (40 * units) if len(payload) >= 2 else None

    def conceal(self, samples: int) -> bytes:
        assert samples > 0
        assert samples % 40 == 0
        return struct.pack("<H", CONCEALED) * samples

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        return struct.pack("<H", RECOVERED) * samples if len(payload) >= 4 else None

    def reset(self) -> None:
        self.resets += 1


def packet(number: int, *, ssrc: int = 1, fec: bool = False, offset: int = 0) -> rtp.Packet:
    """Packet `number` of a stream; its payload says the number."""
    payload = struct.pack("<HH" if fec else "<H", *([number % 0x4000] * (1 + fec)))
    sequence = number + offset & 0xFFFF
    return rtp.Packet(False, 111, sequence, number * 960 & 0xFFFF_FFFF, ssrc, payload)


def numbers(pieces: list[bytes]) -> list[int | str]:
    """What came out, a frame each: the packet's number, "plc", "fec", or a 0 of silence."""
    names: dict[int, int | str] = {CONCEALED: "plc", RECOVERED: "fec"}
    pcm = b"".join(pieces)
    assert len(pcm) % FRAME == 0
    frames = [pcm[n : n + FRAME] for n in range(0, len(pcm), FRAME)]
    assert all(frame == frame[:2] * (FRAME // 2) for frame in frames)
    return [names.get(n, n) for n in (int.from_bytes(f[:2], "little") for f in frames)]


def run(sequence: list[int], *, fec: bool = False, offset: int = 0) -> list[list[int | str]]:
    receiver = Receiver(FakeCodec())
    arrivals = [packet(number, fec=fec, offset=offset) for number in sequence]
    return [numbers(receiver.receive(arrival, 0.0)) for arrival in arrivals]


def accounted(receiver: Receiver) -> int:
    """Packets that a counter says the end of."""
    dropped = receiver.late + receiver.duplicate + receiver.stray + receiver.surplus
    return receiver.decoded + receiver.malformed + dropped


@pytest.mark.parametrize(
    ("arrivals", "pieces"),
    [
        ([1, 2, 3], [[1], [2], [3]]),
        ([1, 3, 2, 4], [[1], [], [2, 3], [4]]),  # swapped: nothing invented
        ([1, 3, 4, 5], [[1], [], ["plc", 3, 4], [5]]),  # lost: two packets later, then no delay
        ([1, 4, 5, 6], [[1], [], ["plc", "plc", 4, 5], [6]]),
        ([1, 3, 5, 6], [[1], [], ["plc", 3], ["plc", 5, 6]]),  # the second hole waits for its own
        ([1, 3, 4, 2, 5], [[1], [], ["plc", 3, 4], [], [5]]),  # too late
        ([1, 1, 3, 3, 2, 2, 4], [[1], [], [], [], [2, 3], [], [4]]),  # everything twice
        ([1, 4, 3, 2, 5], [[1], [], ["plc", 3, 4], [], [5]]),  # reordered by more than two
        ([1, 30, 31], [[1], [], [*["plc"] * 5, *[0] * 23, 30, 31]]),  # speech only so far
    ],
)
@pytest.mark.parametrize("offset", [0, 0xFFFD, 0xFFFC, 0x7FFD])  # also over the wrap
def test_holes_wait_for_two_packets(
    arrivals: list[int], pieces: list[list[int | str]], offset: int
) -> None:
    assert run(arrivals, offset=offset) == pieces


def test_the_last_lost_frame_comes_from_the_next_packet() -> None:
    assert run([1, 3, 4], fec=True) == [[1], [], ["fec", 3, 4]]
    assert run([1, 5, 6], fec=True) == [[1], [], ["plc", "plc", "fec", 5, 6]]
    silence = [0] * (LACK_FRAMES - 5)
    assert run([1, 60, 61], fec=True) == [[1], [], [*["plc"] * 4, *silence, "fec", 60, 61]]


def test_every_packet_is_counted_once() -> None:
    receiver = Receiver(FakeCodec())
    for number in (1, 2, 2, 5, 5, 6, 3, 7, 60_000, 8):
        receiver.receive(packet(number), 0.0)
    undecodable = packet(9)._replace(payload=b"!")
    assert numbers(receiver.receive(undecodable, 0.0)) == ["plc"], "it keeps its time"
    assert (receiver.received, receiver.decoded, receiver.malformed) == (11, 6, 1)
    assert (receiver.late, receiver.duplicate, receiver.stray) == (1, 2, 1)
    assert (receiver.concealed, receiver.recovered) == (2, 0)


def test_a_lost_frame_is_as_long_as_the_last_one() -> None:
    class SixtyMs(FakeCodec):
        def decode(self, payload: bytes) -> bytes | None:
            return payload[:2] * 960

    receiver = Receiver(SixtyMs())
    arrivals = [packet(number)._replace(timestamp=number * 2_880) for number in (1, 3, 4)]
    pieces = [receiver.receive(arrival, 0.0) for arrival in arrivals]
    assert [len(piece) for piece in pieces[2]] == [1_920, 1_920, 1_920]


def test_another_source_starts_anew_and_what_waited_leaves_first() -> None:
    codec = FakeCodec()
    receiver = Receiver(codec)
    receiver.receive(packet(1), 0.0)
    assert codec.resets == 0
    receiver.receive(packet(3), 0.02)
    assert numbers(receiver.receive(packet(9_000, ssrc=2), 0.04)) == ["plc", 3, 9_000]
    assert codec.resets == 1
    assert numbers(receiver.receive(packet(9_001, ssrc=2), 0.06)) == [9_001]


@pytest.mark.parametrize("jump", [5_000, 40_000, 0x1_0000 - 102])
def test_a_new_numbering_needs_two_packets(jump: int) -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 0.0)
    assert receiver.receive(packet(2, offset=jump), 0.02) == []
    assert numbers(receiver.receive(packet(3, offset=jump), 0.04)) == [3]
    assert numbers(receiver.receive(packet(4, offset=jump), 0.06)) == [4]


# ---- time --------------------------------------------------------------------------------------


def test_a_timestamp_that_jumps_changes_nothing() -> None:
    receiver = Receiver(FakeCodec())
    for number, timestamp in ((1, 0), (2, 4_000_000_000), (3, 17), (4, 240_000), (5, 240_960)):
        jumped = packet(number)._replace(timestamp=timestamp)
        assert numbers(receiver.receive(jumped, number * 0.02)) == [number]


def test_what_was_not_sent_becomes_silence_as_long_as_the_timestamps_say() -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    pause = packet(2)._replace(timestamp=8 * 960)
    assert numbers(receiver.receive(pause, 10.14)) == [*[0] * 6, 2]


def test_packets_of_another_kind_leave_no_hole() -> None:
    """Telephone events are numbered with the audio, and take no time of their own."""
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    after = [packet(n)._replace(timestamp=(n - 3) * 960) for n in (5, 6)]
    assert receiver.receive(after[0], 10.02) == []
    assert numbers(receiver.receive(after[1], 10.04)) == [5, 6]


def test_wrong_timestamps_cost_no_speech() -> None:
    """A clock of 90 kHz, against RFC 7587: some silence too much, and then none any more."""
    receiver = Receiver(FakeCodec())
    heard, octets = [], 0
    for n in range(2_000):
        arrival = packet(n + 1)._replace(sequence=n, timestamp=n * 1_800)
        *silence, pcm = receiver.receive(arrival, n / 50)
        heard += numbers([pcm])
        octets += sum(map(len, silence))
    assert heard == list(range(1, 2_001))
    assert octets <= 2 * RATE_HZ * AHEAD_S_MAX
    assert receiver.surplus == 0


def test_what_waits_leaves_when_nothing_else_comes() -> None:
    receiver = Receiver(FakeCodec())
    assert receiver.tick(5.0) == [], "no packet yet, no time to keep"
    receiver.receive(packet(1), 10.0)
    receiver.receive(packet(3, fec=True), 10.04)
    assert receiver.tick(10.08) == []
    assert numbers(receiver.tick(10.101)) == ["fec", 3]
    assert receiver.tick(10.12) == []


def test_a_pause_becomes_silence_in_real_time() -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    assert receiver.tick(10.19) == []
    assert numbers(receiver.tick(10.201)) == [0] * 10, "all of the pause so far"
    assert receiver.tick(10.205) == []
    assert numbers(receiver.tick(10.261)) == [0] * 3
    assert numbers(receiver.receive(packet(2), 10.3)) == [2]
    assert receiver.tick(10.3) == []
    assert numbers(receiver.tick(99.0)) == [0] * 500, "ten seconds, and no more"
    assert receiver.tick(200.0) == []


def test_a_stall_costs_no_speech_and_no_second_silence() -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    assert len(numbers(receiver.tick(10.501))) == 25
    for number in range(2, 27):  # all that was said meanwhile, at once
        assert numbers(receiver.receive(packet(number), 10.52)) == [number]


def test_pauses_of_dtx_add_up() -> None:
    """A packet of comfort noise every 400 ms, ticks in between wherever they fall."""
    receiver = Receiver(FakeCodec())
    made = 0
    for n in range(200):
        arrival = packet(n)._replace(timestamp=n * 19_200)
        made += len(b"".join(receiver.receive(arrival, n * 0.4))) // FRAME
        assert abs(made - (n * 20 + 1)) <= 1
        for tick in range(8):
            made += len(b"".join(receiver.tick(n * 0.4 + tick * TICK_S + n % 7 * 0.00711))) // FRAME


def test_a_hole_that_silence_stands_for_is_not_filled_again() -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    assert len(numbers(receiver.tick(10.301))) == 15
    assert receiver.receive(packet(17), 10.32) == []
    assert receiver.tick(10.33) == [], "the pause is over"
    assert numbers(receiver.receive(packet(18), 10.34)) == [17, 18]
    assert receiver.receive(packet(20), 10.38) == []
    assert numbers(receiver.receive(packet(21), 10.40)) == ["plc", 20, 21]


def test_the_beginning_of_a_word_is_recovered_behind_a_pause() -> None:
    receiver = Receiver(FakeCodec())
    receiver.receive(packet(1), 10.0)
    assert len(numbers(receiver.tick(10.301))) == 15
    first = [packet(n, fec=True)._replace(timestamp=(n + 15) * 960) for n in (3, 4)]
    assert receiver.receive(first[0], 10.34) == []
    assert numbers(receiver.receive(first[1], 10.36)) == ["fec", 3, 4]


def test_more_than_real_time_is_dropped_before_it_is_decoded() -> None:
    """Two octets can be 120 ms of audio: what a flood of them costs is bounded."""
    receiver = Receiver(FakeCodec())
    made = 0
    for n in range(5_000):  # 600 s of audio in 10 s
        arrival = rtp.Packet(False, 111, n, n * 5_760, 1, struct.pack("<HHB", 1, 1, 48))
        made += len(b"".join(receiver.receive(arrival, n / 500)))
    assert made / (2 * RATE_HZ) == pytest.approx(10 + AHEAD_S_MAX, abs=0.2)
    assert receiver.surplus == 5_000 - receiver.decoded > 4_000
    following = packet(5_000)._replace(timestamp=5_000 * 5_760)
    assert numbers(receiver.receive(following, 10.5)) == [5_000], "it is forgiven"


@pytest.mark.parametrize("step", [2, 5, 50, 2_999])
def test_a_flood_with_holes_is_bounded_as_well(step: int) -> None:
    receiver = Receiver(FakeCodec())
    made = 0
    for n in range(5_000):
        arrival = rtp.Packet(False, 111, n * step & 0xFFFF, n * step * 960, 1, b"\1\1\1\1")
        made += len(b"".join(receiver.receive(arrival, n / 500)))
    assert made / (2 * RATE_HZ) <= 10 + AHEAD_S_MAX + LACK_S_MAX
    assert receiver.received - accounted(receiver) <= 1


# ---- whatever comes ----------------------------------------------------------------------------


@st.composite
def journeys(draw: st.DrawFn) -> tuple[list[int], int]:
    """Arrivals after loss (bursts up to 8), reordering and duplication; and where they wrap."""
    count = draw(st.integers(1, 60))
    sent = [1]  # the first packet arrives first: what it begins with is the stream's beginning
    for number in range(2, count):
        if number - sent[-1] > 8 or draw(st.integers(0, 9)) > 2:
            sent.append(number)
    delays = draw(st.lists(st.integers(0, 4), min_size=len(sent), max_size=len(sent)))
    delays[0] = 0
    arrivals = sorted(range(len(sent)), key=lambda n: (n + delays[n], n))
    twice = draw(st.sets(st.integers(0, len(sent) - 1)))
    journey = [sent[n] for n in arrivals for _ in range(1 + (n in twice))]
    return journey, draw(st.sampled_from([0, 0xFFF0, 0x7FF0, 0xFFFF]))


@settings(max_examples=300, deadline=None)
@given(journeys(), st.booleans())
def test_any_journey_ends_in_order_and_complete(journey: tuple[list[int], int], fec: bool) -> None:
    arrivals, offset = journey
    receiver = Receiver(FakeCodec())
    out: list[int | str] = []
    for number in arrivals:
        out += numbers(receiver.receive(packet(number, fec=fec, offset=offset), 0.0))
        assert receiver.received - accounted(receiver) <= 1, "more than one packet waits"
    out += numbers(receiver.tick(0.1))
    heard = [number for number in out if isinstance(number, int) and number]
    assert heard == sorted(set(heard))
    assert receiver.received == receiver.decoded + receiver.late + receiver.duplicate
    assert (receiver.decoded, heard[-1]) == (len(heard), max(arrivals))
    assert set(arrivals) - set(heard) == set() or receiver.late
    assert len(out) == heard[-1], "a frame for each number up to the last one"
    gaps = [two - one - 1 for one, two in itertools.pairwise(heard)]
    invented = sum(min(gap, CONCEALED_FRAMES) for gap in gaps)
    assert receiver.concealed + receiver.recovered == invented
    assert receiver.recovered == (sum(gap > 0 for gap in gaps) if fec else 0)


@dataclass
class Sent:
    """A packet of an honest sender."""

    number: int
    sequence: int
    timestamp: int
    units: int  # of 2.5 ms
    at: float

    @property
    def packet(self) -> rtp.Packet:
        payload = struct.pack("<HHB", self.number, self.number, self.units)
        return rtp.Packet(False, 111, self.sequence, self.timestamp & 0xFFFF_FFFF, 1, payload)


@st.composite
def calls(draw: st.DrawFn) -> list[tuple[float, Sent]]:
    """Arrivals from a sender that pauses as it likes and changes the length of its packets, over a
    path that loses, doubles, and delays by up to 30 ms."""
    sequence, timestamp = draw(st.sampled_from([0, 0xFFFA])), draw(st.sampled_from([0, -9_000]))
    units, at, sent = 8, 0.0, []
    for number in range(1, draw(st.integers(2, 80))):
        event = draw(st.integers(0, 19))
        if event == 0:
            units = draw(st.sampled_from([1, 2, 4, 8, 16, 24, 48]))
        elif event == 1:  # nothing is sent for a while, and nothing counted but time
            pause = draw(st.sampled_from([1, 8, 64, 160, 400, 2_000]))
            timestamp += pause * 120
            at += pause / 400
        at += units / 400
        sent.append(Sent(number, sequence & 0xFFFF, timestamp, units, at))
        sequence += 1
        timestamp += units * 120
    arrivals = []
    for each in sent:
        fate = draw(st.integers(0, 9))
        if fate or each.number == 1:  # the first one makes the beginning
            delay = draw(st.integers(0, 30)) / 1_000 if each.number > 1 else 0.0
            arrivals.append((each.at + delay, each))
            if fate == 9:
                arrivals.append((each.at + delay + draw(st.integers(0, 60)) / 1_000, each))
    return sorted(arrivals, key=lambda arrival: arrival[0])


@settings(max_examples=300, deadline=None)
@given(calls(), st.floats(0, 0.05))
def test_time_is_kept_whatever_is_lost_and_whenever_nothing_is_sent(
    arrivals: list[tuple[float, Sent]], phase: float
) -> None:
    receiver = Receiver(FakeCodec())
    heard: list[int] = []
    made = 0
    ticks = itertools.count()
    tick_at = phase
    begun = arrivals[0][1].timestamp

    def take(pieces: list[bytes]) -> None:
        nonlocal made
        made += sum(map(len, pieces))
        firsts = (int.from_bytes(piece[:2], "little") for piece in pieces)
        heard.extend(n for n in firsts if n not in {0, CONCEALED, RECOVERED})

    newest = arrivals[0][1]
    off_ms_max = 40.0  # a frame of silence begun too early, a frame recovered where silence stands
    for at, each in arrivals:
        while tick_at < at:
            take(receiver.tick(tick_at))
            tick_at = phase + next(ticks) * TICK_S
        take(receiver.receive(each.packet, at))
        if each.number > newest.number:
            since_s = each.at - newest.at
            if since_s > 0.1:  # a pause, and longer packets behind it than before
                off_ms_max += 2.5 * max(0, each.units - newest.units)
            if since_s > PAUSE_S:  # each one's silence may begin a frame too early
                off_ms_max += FRAME_MS
            off_ms_max += 1_000 * max(0.0, since_s - PAUSE_S_MAX)
            newest = each
        assert receiver.received - accounted(receiver) <= 1, "more than one packet waits"
        if receiver.received == accounted(receiver):
            assert heard[-1] == newest.number, "what came last is out, and the delay zero again"
            passed_ms = (newest.timestamp - begun) / 48 + newest.units * 2.5
            off_ms = made * 1_000 / (2 * RATE_HZ) - passed_ms
            assert abs(off_ms) <= off_ms_max, "the time is wrong"
    take(receiver.tick(arrivals[-1][0] + 0.061))
    assert receiver.received == accounted(receiver), "something is stuck"
    assert heard == sorted(set(heard))
    assert receiver.stray == receiver.malformed == receiver.surplus == 0


PAYLOADS = st.one_of(
    st.binary(max_size=3),
    st.sampled_from([b"\x08", b"\x78", b"\xf8\xff\xfe", b"\x0b\x30" + bytes(12)]),
    st.builds(
        lambda first, size: bytes([first]) + bytes(size), st.integers(0, 255), st.integers(0, 1_400)
    ),
    st.binary(min_size=4, max_size=40),
)
ANYTHING = st.builds(
    rtp.Packet,
    st.booleans(),
    st.integers(0, 127),
    st.integers(0, 12) | st.integers(0, 0xFFFF),
    st.integers(0, 30).map(lambda n: n * 960) | st.integers(0, 0xFFFF_FFFF),
    st.sampled_from([1, 1, 1, 1, 2]),
    PAYLOADS,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ANYTHING, st.floats(0, 1) | st.just(0.0), st.booleans()), max_size=60))
def test_no_packets_break_it(arrivals: list[tuple[rtp.Packet, float, bool]]) -> None:
    """With the real codec: malformed and empty payloads, comfort noise, 2.5 to 120 ms."""
    receiver = Receiver(_DECODER)
    _DECODER.reset()
    now, octets = 0.0, 0
    for arrival, after_s, tick in arrivals:
        now += after_s
        pieces = receiver.receive(arrival, now)
        assert all(pieces)
        assert receiver.received - accounted(receiver) <= 1
        octets += sum(map(len, pieces))
        if tick:
            octets += sum(map(len, receiver.tick(now + 0.01)))
    octets += sum(map(len, receiver.tick(now + 0.07)))
    assert receiver.received == len(arrivals) == accounted(receiver)
    # Real time for what came and for silence in between, a reserve, and a hole's stand-in or two
    assert octets / (2 * RATE_HZ) <= 2 * now + AHEAD_S_MAX + 2 * LACK_S_MAX


_DECODER = opus.Decoder(RATE_HZ)
