"""RTP and RTCP octets, and the statistics of RFC 3550 appendix A."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rtp

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)


@given(st.integers(0, 127), U16, U32, U32, st.binary(max_size=200), st.booleans())
def test_what_is_written_is_read(
    payload_type: int, sequence: int, timestamp: int, ssrc: int, payload: bytes, marker: bool
) -> None:
    packet = rtp.write(payload_type, sequence, timestamp, ssrc, payload, marker=marker)
    assert rtp.read(packet) == (marker, payload_type, sequence, timestamp, ssrc, payload)


def test_octets_are_those_of_rfc_3550() -> None:
    packet = rtp.write(111, 0x1234, 0x11223344, 0xAABBCCDD, b"\xfc", marker=True)
    assert packet.hex() == "80ef123411223344aabbccddfc"


HEADER = bytes.fromhex("6f123411223344aabbccdd")  # all but the first octet


@pytest.mark.parametrize(
    ("first", "rest", "payload"),
    [
        (0x80, b"ab", b"ab"),
        (0x82, b"\0" * 8 + b"ab", b"ab"),  # two contributing sources
        (0x90, b"\xbe\xde\x00\x01\x10\xff\x00\x00ab", b"ab"),  # one word of extension
        (0x91, b"\0" * 4 + b"\xbe\xde\x00\x00ab", b"ab"),  # a source, an empty extension
        (0xA0, b"ab\x00\x00\x03", b"ab"),  # three octets of padding
        (0xA0, b"\x01", b""),  # nothing but padding
        (0x80, b"", b""),
        (0x82, b"\0" * 7, None),  # sources beyond the end
        (0x90, b"\xbe\xde\x00", None),  # half an extension header
        (0x90, b"\xbe\xde\x00\x02\x10\xff\x00\x00", None),  # extension beyond the end
        (0xA0, b"ab\x00", None),  # padding of zero octets
        (0xA0, b"ab\x04", None),  # padding beyond the beginning
        (0xA0, b"", None),  # padding of more octets than there are: 0xdd, from the SSRC
        (0x40, b"ab", None),  # version 1
        (0xC0, b"ab", None),  # version 3
    ],
)
def test_sources_extensions_and_padding_are_stepped_over(
    first: int, rest: bytes, payload: bytes | None
) -> None:
    packet = rtp.read(bytes((first,)) + HEADER + rest)
    assert (packet and packet.payload) == payload


@given(st.binary(max_size=64))
def test_any_octets_are_read_without_an_exception(datagram: bytes) -> None:
    for octets in (datagram, b"\x80" + datagram, b"\xb3" + datagram, b"\x81\xc8" + datagram):
        packet = rtp.read(octets)
        assert packet is None or len(packet.payload) <= len(octets) - 12
        rtp.read_reports(octets)
        rtp.read_senders(octets)


BLOCK = st.builds(
    rtp.Block,
    U32,
    st.integers(0, 255),
    st.integers(-0x80_0000, 0x7F_FFFF),
    U32,
    U32,
    U32,
    U32,
)
SENDER = st.builds(rtp.Sender, U32, st.integers(0, 2**64 - 1), U32, U32, U32)


@given(SENDER, st.lists(BLOCK, max_size=31), st.text(max_size=40))
def test_reports_are_read_back(sender: rtp.Sender, blocks: list[rtp.Block], cname: str) -> None:
    report = rtp.sender_report(sender, blocks, cname)
    assert rtp.read_senders(report) == [sender]
    assert rtp.read_reports(report) == blocks
    assert len(report) % 4 == 0
    other = rtp.receiver_report(sender.ssrc, blocks, cname)
    assert rtp.read_senders(other) == []
    assert rtp.read_reports(other) == blocks
    assert rtp.read_reports(report + other) == blocks * 2


def test_a_report_is_a_compound_with_the_cname() -> None:
    report = rtp.receiver_report(0x01020304, [], "abc")
    # RR without blocks, then SDES: one chunk, item 1 of 3 octets, and three zeros to the boundary
    assert (
        report.hex() == "80c90001" + "01020304" + "81ca0003" + "01020304" + "0103616263" + "000000"
    )
    padded = rtp.receiver_report(0x01020304, [], "ab")
    assert padded.hex().endswith("0102" + "6162" + "00000000"), "an item list ends with a zero"


def test_more_blocks_than_the_count_can_say_are_left_out() -> None:
    blocks = [rtp.Block(n, 0, 0, 0, 0, 0, 0) for n in range(40)]
    assert rtp.read_reports(rtp.receiver_report(1, blocks, "c")) == blocks[:31]


def test_aiortc_reads_our_reports() -> None:
    """A peer's reader as the judge of our writer."""
    from aiortc import rtp as judge  # noqa: PLC0415 (heavy, and only wanted here)

    block = rtp.Block(9, 12, -5, 70_000, 33, 44, 55)
    sender = rtp.Sender(7, rtp.ntp(1_700_000_000.5), 960, 3, 400)
    report, description = judge.RtcpPacket.parse(rtp.sender_report(sender, [block], "me"))
    assert isinstance(report, judge.RtcpSrPacket)
    assert report.sender_info.ntp_timestamp == sender.ntp
    assert (report.ssrc, report.sender_info.octet_count) == (7, 400)
    assert report.reports[0].packets_lost == -5
    assert report.reports[0].highest_sequence == 70_000
    assert isinstance(description, judge.RtcpSdesPacket)
    assert description.chunks[0].items == [(1, b"me")]


def test_ntp_counts_from_1900() -> None:
    assert rtp.ntp(0.0) == 2_208_988_800 << 32
    assert rtp.ntp(0.5) & 0xFFFF_FFFF == 0x8000_0000
    assert rtp.ntp(2_085_978_496.0) == 0, "the era ends in February 2036"


def test_round_trip_is_what_rfc_3550_figure_2_computes() -> None:
    # There A = 0xb710:8000, LSR = 0xb705:2000, DLSR = 0x0005:4000, and the answer 0x0006:2000
    block = rtp.Block(1, 0, 0, 0, 0, 0xB705_2000, 0x0005_4000)
    unix_s = 0xB710 + 0.5 - 2_208_988_800
    assert rtp.round_trip_s(block, unix_s) == 0x6_2000 / 65_536
    assert rtp.round_trip_s(block._replace(last_sr=0), unix_s) is None
    assert rtp.round_trip_s(block._replace(delay_since_last_sr=0x00FF_0000), unix_s) == 0.0


def feed(reception: rtp.Reception, sequences: list[int], start: float = 0.0) -> None:
    for index, sequence in enumerate(sequences):
        reception.received(sequence & 0xFFFF, index * 960 & 0xFFFF_FFFF, start + index * 0.02)


def test_losses_are_counted_over_the_wrap() -> None:
    reception = rtp.Reception(5)
    feed(reception, [n for n in range(65_500, 65_700) if n % 10])
    block = reception.report(4.0)
    assert (block.ssrc, block.lost) == (5, 19)  # 65 500 came before the first
    assert block.highest_sequence == 65_699
    assert block.fraction_lost == 19 * 256 // 199
    feed(reception, list(range(65_700, 65_710)), 4.0)
    block = reception.report(5.0)
    assert (block.lost, block.fraction_lost) == (19, 0)


def test_a_tenth_of_a_million_packets_is_a_few_wraps() -> None:
    reception = rtp.Reception(5)
    feed(reception, list(range(100_000)))
    assert reception.report(0.0)[1:4] == (0, 0, 99_999)


def test_duplicates_make_the_loss_negative_and_no_fraction() -> None:
    reception = rtp.Reception(5)
    feed(reception, [1, 2, 2, 2, 3])
    block = reception.report(1.0)
    assert (block.lost, block.fraction_lost) == (-2, 0)


def test_reordering_is_no_loss() -> None:
    reception = rtp.Reception(5)
    feed(reception, [1, 3, 2, 4, 6, 5])
    assert reception.lost == 0


def test_two_packets_make_a_restart_and_one_is_a_stray() -> None:
    reception = rtp.Reception(5)
    feed(reception, [10, 11, 12, 30_000, 13])
    assert (reception.packets, reception.expected) == (4, 4)
    feed(reception, [40_000, 40_001, 40_002])
    assert (reception.packets, reception.expected, reception.lost) == (2, 2, 0)


def test_before_the_first_packet_a_report_is_all_zero() -> None:
    assert rtp.Reception(5).report(1.0) == (5, 0, 0, 0, 0, 0, 0)


def test_jitter_is_that_of_appendix_a_8() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    reception = rtp.Reception(5)
    expected, transit_before = 0.0, None
    for n in range(500):
        now = 1_000 + n * 0.02 + chance.uniform(0, 0.03)
        timestamp = 4_294_900_000 + n * 960  # wraps after 70 packets
        reception.received(n, timestamp & 0xFFFF_FFFF, now)
        transit = int(now * 48_000) - timestamp
        if transit_before is not None:
            expected += (abs(transit - transit_before) - expected) / 16
        transit_before = transit
    assert reception.jitter == pytest.approx(expected)
    assert reception.report(0.0).jitter == int(expected)


def test_a_jump_of_the_timestamp_is_not_jitter() -> None:
    reception = rtp.Reception(5)
    feed(reception, list(range(10)))
    reception.received(10, 3_000_000_000, 0.2)
    reception.received(11, 3_000_000_960, 0.22)
    assert reception.jitter < 1


def test_the_last_sender_report_is_answered() -> None:
    reception = rtp.Reception(5)
    feed(reception, [1])
    reception.sender_report(rtp.Sender(5, 0x1111_2222_3333_4444, 0, 0, 0), 10.0)
    block = reception.report(12.5)
    assert (block.last_sr, block.delay_since_last_sr) == (0x2222_3333, 163_840)


@given(st.lists(st.tuples(U16, U32, st.floats(0, 1e6)), max_size=60))
def test_no_packets_make_a_report_that_cannot_be_written(
    packets: list[tuple[int, int, float]],
) -> None:
    reception = rtp.Reception(5)
    for sequence, timestamp, now in packets:
        reception.received(sequence, timestamp, now)
        block = reception.report(now)
        assert rtp.read_reports(rtp.receiver_report(1, [block], "c")) == [block]
