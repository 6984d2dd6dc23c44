"""STUN: the vectors of RFC 5769 by name, round trips, then arbitrary octets."""

import struct

import aioice.stun
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stun

PASSWORD = b"VOkJxbRl1RmTxUk/WvJxBt"

# RFC 5769 section 2.1, sample request. https://www.rfc-editor.org/rfc/rfc5769#section-2.1
SAMPLE_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
# Sections 2.2 and 2.3, sample IPv4 and IPv6 responses.
SAMPLE_RESPONSE_V4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
SAMPLE_RESPONSE_V6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")


def read(datagram: bytes) -> stun.Request:
    found = stun.read_request(datagram)
    assert isinstance(found, stun.Request), found
    return found


def attributes(message: bytes) -> dict[int, bytes]:
    """An independent reader of responses: type to value."""
    found, at = {}, 20
    assert len(message) == 20 + struct.unpack_from(">H", message, 2)[0]
    while at < len(message):
        kind, size = struct.unpack_from(">HH", message, at)
        found[kind] = message[at + 4 : at + 4 + size]
        at += 4 + (size + 3) // 4 * 4
    return found


def test_rfc5769_sample_request() -> None:
    found = read(SAMPLE_REQUEST)
    assert found.transaction_id == TRANSACTION
    assert found.username == b"evtj:h6vY"
    assert found.ufrag == b"evtj"
    assert found.priority == 0x6E0001FF
    assert found.controlled == 0x932FF9B151263B36
    assert found.controlling is None
    assert not found.use_candidate
    assert stun.check_integrity(SAMPLE_REQUEST, found, PASSWORD)
    assert not stun.check_integrity(SAMPLE_REQUEST, found, PASSWORD[:-1] + b"u")


def test_rfc5769_mapped_addresses() -> None:
    """Our answer carries the same XOR-MAPPED-ADDRESS octets as the RFC's samples."""
    v4 = stun.success(TRANSACTION, "192.0.2.1", 32853, PASSWORD)
    v6 = stun.success(TRANSACTION, "2001:db8:1234:5678:11:2233:4455:6677", 32853, PASSWORD)
    assert attributes(v4)[0x20] == attributes(SAMPLE_RESPONSE_V4)[0x20]
    assert attributes(v6)[0x20] == attributes(SAMPLE_RESPONSE_V6)[0x20]


@pytest.mark.parametrize("sample", [SAMPLE_RESPONSE_V4, SAMPLE_RESPONSE_V6])
def test_rfc5769_integrity_and_fingerprint_of_responses(sample: bytes) -> None:
    """The RFC's digests come out of our arithmetic: the body of each sample, sealed by us."""
    body = sample[20:-32]
    assert stun._message(0x0101, TRANSACTION, body, PASSWORD) == sample


def test_aioice_reads_what_we_write() -> None:
    """An implementation that is not ours agrees on answers, refusals and their integrity."""
    answer = aioice.stun.parse_message(stun.success(TRANSACTION, "198.51.100.7", 4242, PASSWORD))
    answer.check_message_integrity(PASSWORD)
    assert answer.attributes["XOR-MAPPED-ADDRESS"] == ("198.51.100.7", 4242)
    refusal = aioice.stun.parse_message(stun.error(TRANSACTION, 487, "Role Conflict", PASSWORD))
    refusal.check_message_integrity(PASSWORD)
    assert refusal.attributes["ERROR-CODE"] == (487, "Role Conflict")


@given(
    st.binary(min_size=12, max_size=12),
    st.text("abcXYZ019+/", min_size=4, max_size=30),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
def test_request_round_trip(
    transaction: bytes, local: str, nominate: bool, priority: int, tie: int
) -> None:
    datagram = stun.request(
        transaction,
        f"{local}:peer",
        PASSWORD,
        use_candidate=nominate,
        priority=priority,
        tie_breaker=tie,
    )
    found = read(datagram)
    assert found == stun.Request(
        transaction,
        f"{local}:peer".encode(),
        local.encode(),
        nominate,
        priority,
        tie,
        None,
        found.integrity_at,
    )
    assert stun.check_integrity(memoryview(datagram), found, PASSWORD)


@pytest.mark.parametrize("sample", [SAMPLE_RESPONSE_V4, SAMPLE_RESPONSE_V6])
def test_rfc5769_responses_are_read(sample: bytes) -> None:
    found = stun.read_answer(sample)
    assert found is not None
    assert (found.transaction_id, found.success) == (TRANSACTION, True)
    assert stun.check_integrity(sample, found, PASSWORD)
    assert not stun.check_integrity(sample, found, b"another")
    for size in range(len(sample)):
        assert stun.read_answer(sample[:size]) is None
    for at in range(8 * len(sample)):
        changed = bytearray(sample)
        changed[at // 8] ^= 1 << at % 8
        found = stun.read_answer(changed)
        # What follows the integrity is the fingerprint's, which others may take for an attribute.
        if found is not None and at < 8 * (len(sample) - 8):
            assert not stun.check_integrity(changed, found, PASSWORD)


def test_errors_are_read_and_requests_are_no_answers() -> None:
    refusal = stun.error(TRANSACTION, 487, "Role Conflict", PASSWORD)
    assert stun.read_answer(refusal) == stun.Answer(
        TRANSACTION, False, refusal.index(b"\0\x08\0\x14")
    )
    bare = b"\x01\x11\0\0" + SAMPLE_RESPONSE_V4[4:20]
    found = stun.read_answer(bare)
    assert found == stun.Answer(TRANSACTION, False, 0)
    assert not stun.check_integrity(bare, found, PASSWORD)
    assert stun.read_answer(SAMPLE_REQUEST) is None


def test_a_controlled_agents_request() -> None:
    found = read(stun.request(TRANSACTION, "a:b", PASSWORD, controlled=True, tie_breaker=7))
    assert (found.controlled, found.controlling) == (7, None)


def test_every_changed_bit_is_noticed() -> None:
    """Each bit of a check, one at a time: malformed, or its integrity does not hold.

    The exception is RFC 8489's own: FINGERPRINT stands behind the integrity, so a change of its
    type turns it into an attribute that is ignored.
    """
    datagram = stun.request(TRANSACTION, "abcd:efgh", PASSWORD)
    fingerprint_type = range(8 * (len(datagram) - 8), 8 * (len(datagram) - 6))
    for bit in range(len(datagram) * 8):
        changed = bytearray(datagram)
        changed[bit // 8] ^= 1 << bit % 8
        found = stun.read_request(changed)
        holds = isinstance(found, stun.Request) and stun.check_integrity(changed, found, PASSWORD)
        assert holds == (bit in fingerprint_type), f"bit {bit}: {found}"


def test_every_truncation_is_malformed() -> None:
    datagram = stun.request(TRANSACTION, "abcd:efgh", PASSWORD)
    for size in range(len(datagram)):
        assert stun.read_request(datagram[:size]) is stun.Malformed.TRUNCATED
    assert stun.read_request(datagram + b"\x00") is stun.Malformed.TRUNCATED


def seal(body: bytes, message_type: int = 1) -> bytes:
    return stun._message(message_type, TRANSACTION, body, PASSWORD)


def attribute(kind: int, value: bytes) -> bytes:
    return stun._attribute(kind, value)


USERNAME = attribute(6, b"abcd:efgh")


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (seal(USERNAME, 0x0101), stun.Malformed.NOT_REQUEST),
        (seal(USERNAME, 0x0011), stun.Malformed.NOT_REQUEST),
        (b"\x00\x01\x00\x00" + b"\x00" * 16, stun.Malformed.BAD_COOKIE),
        (seal(b""), stun.Malformed.NO_USERNAME),
        (seal(attribute(6, b"abcd")), stun.Malformed.NO_USERNAME),
        (seal(attribute(6, b"a" * 509)), stun.Malformed.BAD_ATTRIBUTE),
        (seal(USERNAME + attribute(0x24, b"\x00\x00")), stun.Malformed.BAD_ATTRIBUTE),
        (seal(USERNAME + attribute(0x25, b"\x01")), stun.Malformed.BAD_ATTRIBUTE),
        (seal(USERNAME + attribute(0x802A, b"\x00" * 7)), stun.Malformed.BAD_ATTRIBUTE),
        (seal(attribute(0x8022, b"x") * 32 + USERNAME), stun.Malformed.BAD_ATTRIBUTE),
        (seal(USERNAME)[:-1] + b"\x00", stun.Malformed.BAD_FINGERPRINT),
        (
            b"\x00\x01\x00\x10\x21\x12\xa4\x42" + TRANSACTION + USERNAME,
            stun.Malformed.NO_INTEGRITY,
        ),
        (
            b"\x00\x01\x00\x04\x21\x12\xa4\x42" + TRANSACTION + b"\x00\x06\xff\xff",
            stun.Malformed.BAD_ATTRIBUTE,
        ),
    ],
)
def test_reasons(datagram: bytes, reason: stun.Malformed) -> None:
    assert stun.read_request(datagram) is reason


def test_what_follows_the_integrity_is_not_believed() -> None:
    """RFC 8489 section 14.5: a USE-CANDIDATE glued on behind MESSAGE-INTEGRITY means nothing."""
    honest = stun.request(TRANSACTION, "abcd:efgh", PASSWORD, use_candidate=False)[:-8]
    glued = bytearray(honest + attribute(0x25, b""))
    struct.pack_into(">H", glued, 2, len(glued) - 20)
    found = read(glued)
    assert not found.use_candidate
    assert stun.check_integrity(glued, found, PASSWORD)


@given(st.binary(max_size=200))
def test_total_over_any_octets(octets: bytes) -> None:
    stun.read_request(octets)
    stun.read_answer(octets)
    stun.is_rtcp(octets)


@settings(max_examples=300)
@given(st.data())
def test_total_over_damaged_requests(data: st.DataObject) -> None:
    """Near-valid messages reach deeper than noise: any splice of attributes and lengths."""
    pieces = st.tuples(
        st.sampled_from([6, 8, 0x24, 0x25, 0x8028, 0x8029, 0x802A, 0x8022]),
        st.integers(0, 40),
        st.binary(max_size=24),
    )
    body = b"".join(
        struct.pack(">HH", kind, size) + value for kind, size, value in data.draw(st.lists(pieces))
    )
    datagram = struct.pack(">HHI", 1, len(body), stun.MAGIC_COOKIE) + TRANSACTION + body
    found = stun.read_request(datagram)
    if isinstance(found, stun.Request):
        assert not stun.check_integrity(datagram, found, PASSWORD)


def test_first_octets_of_rfc7983() -> None:
    for octet in range(256):
        expected = stun.Kind.UNKNOWN
        for low, high, member in [
            (0, 3, stun.Kind.STUN),
            (16, 19, stun.Kind.ZRTP),
            (20, 63, stun.Kind.DTLS),
            (64, 79, stun.Kind.TURN),
            (128, 191, stun.Kind.RTP),
        ]:
            if low <= octet <= high:
                expected = member
        assert stun.kind(octet) is expected
        assert stun.STUN_TABLE[octet] == (expected is stun.Kind.STUN)


def test_rtcp_beside_rtp() -> None:
    """RFC 5761 section 4: payload types 64 to 95 of RTP stay free for RTCP's 192 to 223."""
    assert stun.is_rtcp(b"\x80\xc8") and stun.is_rtcp(b"\x81\xc9")
    assert not stun.is_rtcp(b"\x80\x6f") and not stun.is_rtcp(b"\x80\xef")
    assert not stun.is_rtcp(b"\x80")
