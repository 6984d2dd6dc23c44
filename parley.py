"""Parley: what relays say to one another, and the tag by which they know each other's frames.

**Messages** are frames with a type in octet 2, which transceivers and clients never see:

    0xC5 | version 1 | type | zero | struct sockaddr_in6 of the client, else zeros | tag u32 | body

    type 1  probe          8 octets that mean nothing to anybody else
    type 2  answer         the same 8 octets, and one: 0 serves, 1 drains
    type 3  question       nothing: whose is this client, from which there was media?
    type 4  introduction   one octet, see `Standing`; the ufrag, 23 octets

**The tag** is 32 bits: the first of HMAC-SHA256(K_transit[key id], what it covers), K_transit by
HKDF-SHA256 from the master secret (info `earshot transit`, 32 octets). In a message it covers the
28 octets at the beginning and the body. In a frame with a client's datagram it covers the same 28
octets and the address, 16 octets, that the entrance sends from; it stands in the last four of the
header, where an address that is not link-local has a scope id that nobody reads. So frames stay as
long as they are, it costs no look at any octet of a payload, and transceivers give it back like the
rest of the header. It does two things:

- A client that two entrances serve has two headers, each answered by the entrance that made it: a
  check by the way that it does not use, and media by the other.
- Where the settings demand it, it shows that a relay with the keys made the frame. Not that the
  datagram is whole: SRTP, DTLS and STUN do that.

Keys are changed one relay at a time. What is said is answered under the same key, so an entrance
knows which of its keys the other side has (`Keys`).

Rules that stay true:
- What a message can do is what a client's own check can do, or Redis, or an SSRC: an introduction
  opens a flow to the transceiver that its ufrag names under the keys, and nothing else.
- Nothing here raises for octets that somebody sent.

Sans-IO: `now` is an argument, in seconds. RFC 2104 (HMAC)
"""

import enum
import hmac
import struct
from dataclasses import dataclass

import frame
import ufrag

TAG_OCTETS = 4
NO_TAG = bytes(TAG_OCTETS)

PROBE_OCTETS = 8
"""Body of a probe."""

KNOWN_S = 3.0
"""How long an answer shows that the other side has the key it came under: some probes."""

_TYPE_AT = 2
_COVERED = frame.HEADER_OCTETS - TAG_OCTETS
_NOBODY = bytes(frame.HEADER_OCTETS - len(frame.MAGIC))
_MARK = frame.MAGIC[:_TYPE_AT]
_INTRODUCTION = struct.Struct(f"<B{ufrag.UFRAG_CHARACTERS}s")


class Kind(enum.IntEnum):
    """What a message says."""

    PROBE = 1
    ANSWER = 2
    QUESTION = 3
    INTRODUCTION = 4


class Standing(enum.IntEnum):
    """What a client that is introduced has shown where it came in."""

    CHECKED = 0
    """A check with integrity, or Redis has it; its transceiver has not answered yet."""
    ASSURED = 1
    FAR = 2
    """The SSRC of an assured flow."""
    NEAR = 3
    """The same, from the same IP address."""


_BODIES = {
    Kind.PROBE: PROBE_OCTETS,
    Kind.ANSWER: PROBE_OCTETS + 1,
    Kind.QUESTION: 0,
    Kind.INTRODUCTION: _INTRODUCTION.size,
}
_KINDS = {int(kind): kind for kind in Kind}
_STANDINGS = {int(standing): standing for standing in Standing}


@dataclass(frozen=True, slots=True)
class Message:
    """One that was read."""

    kind: Kind
    header: bytes
    """The client's, as it stands before its datagrams."""
    body: bytes
    key: int | None
    """Id of the key it is tagged with; None for none of ours."""


class Tags:
    """What relays with the same keys put on frames, and look for. A key is named by its id."""

    def __init__(self, keyring: ufrag.Keyring, demanded: bool) -> None:
        """They are always put; where they are not `demanded`, all are right."""
        self.demanded = demanded
        self._keys = {key_id: key.transit for key_id, key in keyring.keys.items()}
        self.keys = list(self._keys)
        """Oldest first, as in the key file."""

    def _key_of(self, octets: bytes, tag: bytes) -> int | None:
        """Of whoever has put this tag on these octets; None for a stranger."""
        for key_id, key in self._keys.items():
            if hmac.compare_digest(_tag(key, octets), tag):
                return key_id
        return None

    def stamp(self, header: bytes, entrance: bytes, key: int) -> bytes:
        """The last four octets of this client's header, from an entrance with this address."""
        return _tag(self._keys[key], header[:_COVERED] + entrance)

    def stamped(self, header: bytes, entrance: bytes) -> bool:
        """Whether a client's header may come from there."""
        if not self.demanded:
            return True
        return self._key_of(header[:_COVERED] + entrance, header[_COVERED:]) is not None

    def twins(self, header: bytes, entrance: bytes) -> list[bytes]:
        """The headers that the same client has from there under the other keys."""
        covered = header[:_COVERED]
        found = [covered + _tag(key, covered + entrance) for key in self._keys.values()]
        return [each for each in found if each != header]

    def probe(self, body: bytes, key: int) -> bytes:
        """Is somebody there?"""
        return self._message(Kind.PROBE, frame.MAGIC + _NOBODY, body, key)

    def answer(self, to: Message, draining: bool) -> bytes:
        """The answer to a probe, under its key."""
        return self._message(Kind.ANSWER, to.header, to.body + bytes([draining]), to.key)

    def question(self, header: bytes, entrance: bytes) -> bytes:
        """Whose is this client? Under the key that its frame came with."""
        key = self._key_of(header[:_COVERED] + entrance, header[_COVERED:])
        return self._message(Kind.QUESTION, header, b"", key)

    def introduction(self, header: bytes, text: bytes, standing: Standing, key: int) -> bytes:
        """This client, with its stamp, was given this ufrag."""
        return self._message(Kind.INTRODUCTION, header, _INTRODUCTION.pack(standing, text), key)

    def _message(self, kind: Kind, header: bytes, body: bytes, key: int | None) -> bytes:
        covered = _MARK + bytes([kind, 0]) + header[len(frame.MAGIC) : _COVERED]
        secret = self._keys[self.keys[0] if key is None else key]
        return covered + header[_COVERED:] + _tag(secret, covered + body) + body

    def read(self, header: bytes, rest: bytes | memoryview) -> Message | None:
        """A message in two pieces; None for what is none, or whose tag is wrong."""
        kind = _KINDS.get(header[_TYPE_AT])
        tag, body = bytes(rest[:TAG_OCTETS]), bytes(rest[TAG_OCTETS:])
        if kind is None or len(body) != _BODIES[kind] or not is_message(header):
            return None
        key = self._key_of(header[:_COVERED] + body, tag)
        if key is None and self.demanded:
            return None
        return Message(kind, frame.MAGIC + header[len(frame.MAGIC) :], body, key)


def is_message(header: bytes) -> bool:
    """Whether 32 octets begin a message and not a client's datagram."""
    return header[:_TYPE_AT] == _MARK and header[_TYPE_AT] != 0 and header[_TYPE_AT + 1] == 0


def introduced(body: bytes) -> tuple[bytes, Standing]:
    """Of an introduction: the ufrag, and what the client has shown. What is unknown is FAR."""
    standing, text = _INTRODUCTION.unpack(body)
    return text, _STANDINGS.get(standing, Standing.FAR)


def _tag(key: bytes, octets: bytes) -> bytes:
    return hmac.digest(key, octets, "sha256")[:TAG_OCTETS]


class Keys:
    """Which key to use towards one relay: the newest that it has.

    It is probed under each, and answers under those that it has. So a key can be given to relays
    and taken from them one after the other, in any order, as long as there is always one that all
    of them have.
    """

    def __init__(self, known: list[int]) -> None:
        """`known` are ours, oldest first; the oldest is what everybody has had for longest."""
        self._order = known
        self._answered_at: dict[int, float] = {}
        self.best = known[0]

    def answered(self, key: int, now: float) -> bool:
        """It has this key; true if that changes which one is best."""
        self._answered_at[key] = now
        fresh = [
            each
            for each in self._order
            if now - self._answered_at.get(each, float("-inf")) <= KNOWN_S
        ]
        before, self.best = self.best, fresh[-1] if fresh else self.best
        return self.best != before
