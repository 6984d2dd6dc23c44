"""STUN as ICE uses it, and telling STUN from everything else that shares its port.

What it owns: the first-octet classes of RFC 7983, reading a Binding Request or its answer in place,
MESSAGE-INTEGRITY and FINGERPRINT both ways, and the small encoder that answers, checks of our own,
tests and load tools need.

Rules that stay true:
- Reading is total: any octets end in a `Request` or in a member of `Malformed`, in an `Answer` or
  in None, never in an exception. Whoever reads must still check the integrity before believing a
  word.
- What a peer chose is bounded before it is copied: the username (RFC 8489 section 14.3: 508 octets)
  and the number of attributes.
- Attributes after MESSAGE-INTEGRITY are ignored but for FINGERPRINT (RFC 8489 section 14.5).

It keeps no state, knows no session, sends nothing.

RFC 8489 https://www.rfc-editor.org/rfc/rfc8489 (STUN), RFC 8445
https://www.rfc-editor.org/rfc/rfc8445 (ICE), RFC 7983 https://www.rfc-editor.org/rfc/rfc7983 and
RFC 5761 https://www.rfc-editor.org/rfc/rfc5761 (demultiplexing), RFC 5769 (vectors).
"""

import binascii
import enum
import hmac
import ipaddress
import struct
from dataclasses import dataclass

TRANSACTION_OCTETS = 12
"""Of a transaction id."""

HEADER_OCTETS = 20
"""Type, length, magic cookie and transaction id (RFC 8489 section 5)."""

USERNAME_OCTETS_MAX = 508
"""RFC 8489 section 14.3: fewer than 509."""

ATTRIBUTES_MAX = 32
"""Attributes read before a message counts as malformed. A browser sends seven; every one costs
a turn of a Python loop, and the largest datagram could hold 370."""

MAGIC_COOKIE = 0x2112A442
_FINGERPRINT_XOR = 0x5354554E  # RFC 8489 section 14.7

_BINDING_REQUEST, _BINDING_SUCCESS, _BINDING_ERROR = 0x0001, 0x0101, 0x0111
_USERNAME, _MESSAGE_INTEGRITY, _ERROR_CODE = 0x0006, 0x0008, 0x0009
_XOR_MAPPED_ADDRESS, _PRIORITY, _USE_CANDIDATE = 0x0020, 0x0024, 0x0025
_FINGERPRINT, _ICE_CONTROLLED, _ICE_CONTROLLING = 0x8028, 0x8029, 0x802A
_INTEGRITY_OCTETS = 20

_HEADER = struct.Struct(">HHI12s")
_ATTRIBUTE = struct.Struct(">HH")
_LENGTH = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Kind(enum.IntEnum):
    """What a datagram is, by its first octet (RFC 7983 section 7)."""

    UNKNOWN = 0
    STUN = 1
    DTLS = 2
    TURN = 3
    RTP = 4
    """RTP or RTCP: `is_rtcp` tells them apart."""
    ZRTP = 5


def _kinds() -> bytes:
    ranges = {
        Kind.STUN: (0, 3),
        Kind.ZRTP: (16, 19),
        Kind.DTLS: (20, 63),
        Kind.TURN: (64, 79),
        Kind.RTP: (128, 191),
    }
    table = bytearray(256)
    for member, (first, last) in ranges.items():
        table[first : last + 1] = bytes([member]) * (last - first + 1)
    return bytes(table)


KINDS = _kinds()
"""The `Kind` of each first octet, as 256 octets."""

STUN_TABLE = bytes(int(octet <= 3) for octet in range(256))
"""For `bytes.translate`: 1 where a first octet is STUN's, else 0."""


def kind(first_octet: int) -> Kind:
    """The class of a datagram that begins with `first_octet` (0 to 255)."""
    return Kind(KINDS[first_octet])


def is_rtcp(datagram: bytes | memoryview) -> bool:
    """True for RTCP among what `Kind.RTP` covers (RFC 5761 section 4); False if too short."""
    return len(datagram) >= 2 and 192 <= datagram[1] <= 223


class Malformed(enum.Enum):
    """Why a datagram is not a Binding Request that ICE could send."""

    NOT_REQUEST = "another STUN class or method"
    TRUNCATED = "shorter than its header or its length field says, or longer"
    BAD_COOKIE = "no magic cookie"
    BAD_ATTRIBUTE = "an attribute that runs over the end, has a wrong size, or is one too many"
    NO_USERNAME = "no USERNAME with a colon before MESSAGE-INTEGRITY"
    NO_INTEGRITY = "no MESSAGE-INTEGRITY"
    BAD_FINGERPRINT = "a FINGERPRINT that does not match, or that is not the last attribute"


@dataclass(frozen=True, slots=True)
class Request:
    """A Binding Request, well-formed but **not yet authenticated**."""

    transaction_id: bytes
    """12 octets."""
    username: bytes
    """The whole USERNAME, `local:remote` as seen from this side."""
    ufrag: bytes
    """Its part before the colon: the server's ufrag."""
    use_candidate: bool
    """The client nominates this pair (RFC 8445 section 7.1.2)."""
    priority: int | None
    """PRIORITY; None if absent."""
    controlling: int | None
    """The tie-breaker of ICE-CONTROLLING; None if absent."""
    controlled: int | None
    """The tie-breaker of ICE-CONTROLLED; None if absent."""
    integrity_at: int
    """Offset of the MESSAGE-INTEGRITY attribute in the datagram."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A Binding response, well-formed but **not yet authenticated**."""

    transaction_id: bytes
    """12 octets."""
    success: bool
    """False for an error response."""
    integrity_at: int
    """Offset of the MESSAGE-INTEGRITY attribute in the datagram; 0 if it has none."""


def read_request(datagram: bytes | memoryview) -> Request | Malformed:
    """Read a Binding Request. Total over any octets; the result holds copies, no views."""
    size = len(datagram)
    if size < HEADER_OCTETS:
        return Malformed.TRUNCATED
    message_type, length, cookie, transaction_id = _HEADER.unpack_from(datagram)
    if message_type != _BINDING_REQUEST:
        return Malformed.NOT_REQUEST
    if cookie != MAGIC_COOKIE:
        return Malformed.BAD_COOKIE
    if length & 3 or HEADER_OCTETS + length != size:
        return Malformed.TRUNCATED
    found = _attributes(datagram, size)
    if isinstance(found, Malformed):
        return found
    values, integrity_at, fingerprint_at = found
    if fingerprint_at and not _fingerprint_holds(datagram, fingerprint_at, size):
        return Malformed.BAD_FINGERPRINT
    if not integrity_at:
        return Malformed.NO_INTEGRITY
    username = values.get(_USERNAME, b"")
    ufrag, colon, _ = username.partition(b":")
    if not colon:
        return Malformed.NO_USERNAME
    priority, controlling = values.get(_PRIORITY), values.get(_ICE_CONTROLLING)
    controlled = values.get(_ICE_CONTROLLED)
    return Request(
        transaction_id=transaction_id,
        username=username,
        ufrag=ufrag,
        use_candidate=_USE_CANDIDATE in values,
        priority=None if priority is None else _U32.unpack(priority)[0],
        controlling=None if controlling is None else _U64.unpack(controlling)[0],
        controlled=None if controlled is None else _U64.unpack(controlled)[0],
        integrity_at=integrity_at,
    )


def read_answer(datagram: bytes | memoryview) -> Answer | None:
    """Read a Binding response; None for anything else. Total over any octets, like the above."""
    size = len(datagram)
    if size < HEADER_OCTETS:
        return None
    message_type, length, cookie, transaction_id = _HEADER.unpack_from(datagram)
    if message_type not in (_BINDING_SUCCESS, _BINDING_ERROR) or cookie != MAGIC_COOKIE:
        return None
    if length & 3 or HEADER_OCTETS + length != size:
        return None
    found = _attributes(datagram, size)
    if isinstance(found, Malformed):
        return None
    _, integrity_at, fingerprint_at = found
    if fingerprint_at and not _fingerprint_holds(datagram, fingerprint_at, size):
        return None
    return Answer(transaction_id, message_type == _BINDING_SUCCESS, integrity_at)


# The attributes that are read, and the size each must have; None: bounded below.
_SIZES = {
    _USERNAME: None,
    _PRIORITY: 4,
    _USE_CANDIDATE: 0,
    _ICE_CONTROLLED: 8,
    _ICE_CONTROLLING: 8,
}


def _attributes(
    datagram: bytes | memoryview, size: int
) -> tuple[dict[int, bytes], int, int] | Malformed:
    """Values by type, and the offsets of MESSAGE-INTEGRITY and FINGERPRINT (0 if absent)."""
    values: dict[int, bytes] = {}
    integrity_at = fingerprint_at = 0
    at = HEADER_OCTETS
    for _ in range(ATTRIBUTES_MAX):
        if at == size:
            return values, integrity_at, fingerprint_at
        if at + 4 > size:
            return Malformed.BAD_ATTRIBUTE
        attribute, length = _ATTRIBUTE.unpack_from(datagram, at)
        end = at + 4 + length
        if end > size:
            return Malformed.BAD_ATTRIBUTE
        if attribute == _FINGERPRINT:
            if length != 4:
                return Malformed.BAD_ATTRIBUTE
            fingerprint_at = fingerprint_at or at
        elif attribute == _MESSAGE_INTEGRITY and not integrity_at:
            if length != _INTEGRITY_OCTETS:
                return Malformed.BAD_ATTRIBUTE
            integrity_at = at
        elif attribute in _SIZES and not integrity_at and attribute not in values:
            expected = _SIZES[attribute]
            if length > USERNAME_OCTETS_MAX if expected is None else length != expected:
                return Malformed.BAD_ATTRIBUTE
            values[attribute] = bytes(datagram[at + 4 : end])
        at = end + (-length & 3)
    return (values, integrity_at, fingerprint_at) if at == size else Malformed.BAD_ATTRIBUTE


def _fingerprint_holds(datagram: bytes | memoryview, at: int, size: int) -> bool:
    """RFC 8489 section 14.7: the last attribute, CRC-32 over everything before it."""
    if at + 8 != size:
        return False
    (given,) = _U32.unpack_from(datagram, at + 4)
    return bool(given == binascii.crc32(datagram[:at]) ^ _FINGERPRINT_XOR)


def check_integrity(datagram: bytes | memoryview, read: Request | Answer, password: bytes) -> bool:
    """True if what was read has a MESSAGE-INTEGRITY made with `password`, in constant time.

    The HMAC covers what stands before the attribute, with the length field set as if the message
    ended with it (RFC 8489 section 14.5). ICE's passwords are ASCII: no SASLprep is applied.
    """
    at = read.integrity_at
    if not at:
        return False
    covered = bytearray(datagram[:at])
    _LENGTH.pack_into(covered, 2, at + 4 + _INTEGRITY_OCTETS - HEADER_OCTETS)
    given = datagram[at + 4 : at + 4 + _INTEGRITY_OCTETS]
    return hmac.compare_digest(hmac.digest(password, covered, "sha1"), given)


def success(transaction_id: bytes, host: str, port: int, password: bytes) -> bytes:
    """A Binding success response for a client seen at `host` and `port`."""
    address = ipaddress.ip_address(host)
    # RFC 8489 section 14.2: family 1 or 2, port and address under cookie and transaction id.
    mask = _U32.pack(MAGIC_COOKIE) + transaction_id
    masked = bytes(a ^ b for a, b in zip(address.packed, mask, strict=False))
    value = struct.pack(">BBH", 0, 1 if address.version == 4 else 2, port ^ MAGIC_COOKIE >> 16)
    body = _attribute(_XOR_MAPPED_ADDRESS, value + masked)
    return _message(_BINDING_SUCCESS, transaction_id, body, password)


def error(transaction_id: bytes, code: int, reason: str, password: bytes) -> bytes:
    """A Binding error response, such as 487 Role Conflict (RFC 8489 section 14.8)."""
    value = struct.pack(">HBB", 0, code // 100, code % 100) + reason.encode()
    return _message(_BINDING_ERROR, transaction_id, _attribute(_ERROR_CODE, value), password)


def request(
    transaction_id: bytes,
    username: str,
    password: bytes,
    *,
    use_candidate: bool = True,
    priority: int = 0x6E7F1EFF,
    tie_breaker: int = 1,
    controlled: bool = False,
) -> bytes:
    """A connectivity check (RFC 8445 section 7.2): a controlling client's, unless `controlled`.

    The default priority is that of a peer-reflexive candidate with the highest local preference.
    """
    body = _attribute(_USERNAME, username.encode())
    role = _ICE_CONTROLLED if controlled else _ICE_CONTROLLING
    body += _attribute(role, _U64.pack(tie_breaker))
    if use_candidate:
        body += _attribute(_USE_CANDIDATE, b"")
    body += _attribute(_PRIORITY, _U32.pack(priority))
    return _message(_BINDING_REQUEST, transaction_id, body, password)


def _attribute(attribute: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(attribute, len(value)) + value + b"\x00" * (-len(value) & 3)


def _message(message_type: int, transaction_id: bytes, body: bytes, password: bytes) -> bytes:
    """The whole message with MESSAGE-INTEGRITY and FINGERPRINT behind `body`."""

    def with_length(body: bytes, to_come: int) -> bytes:
        length = len(body) + to_come
        return _HEADER.pack(message_type, length, MAGIC_COOKIE, transaction_id) + body

    digest = hmac.digest(password, with_length(body, 4 + _INTEGRITY_OCTETS), "sha1")
    body += _attribute(_MESSAGE_INTEGRITY, digest)
    crc = binascii.crc32(with_length(body, 8)) ^ _FINGERPRINT_XOR
    return with_length(body + _attribute(_FINGERPRINT, _U32.pack(crc)), 0)
