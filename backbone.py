"""The backbone: how a relay reaches a cluster that is elsewhere, through that cluster's relays.

    client -> entrance --- frames, unchanged ---> transit face of a cluster relay -> transceiver
              (worker.py)  <-- the same way back --  (transit.py)

A cluster has several transit addresses, one a worker of its relays. Here is which of them a session
goes by, which of them can be reached, and what relays say to one another about that.

What it owns: `Backbone`, the choice and its health; the octets of the messages; the tag that shows
that a frame comes from a relay with the keys.

**The choice** is rendezvous hashing (highest random weight) by the session's ufrag: all addresses
of a client go the same way, at every entrance, and an address that is lost moves its own sessions
and no other.

**Health.** Each address is probed and answers: often where it has sessions and is silent, less so
where traffic shows that it is there, once a second without sessions. One that has neither answered
nor sent anything for `timeout_s` is lost. Traffic alone is believed half as long again and no
longer: a transceiver goes on sending for seconds where nothing of its client comes through any
more. Sessions of a lost one are led to others and introduced there; it is chosen again once it has
answered for `STEADY_S`. That it drains is in its answer, too. Where none can be reached, all of
them are tried.

**Messages** are frames with a type in octet 2, which transceivers and clients never see:

    0xC5 | version 1 | type | zero | struct sockaddr_in6 of the client, else zeros | tag u32 | body

    type 1  probe          8 octets that mean nothing to anybody else
    type 2  answer         the same 8 octets, and one: 0 serves, 1 drains
    type 3  question       nothing: whose is this client, from which there was media?
    type 4  introduction   one octet: 0 tentative, 1 assured; the ufrag, 23 octets

**The tag**, if relays use one, is 32 bits: the first of HMAC-SHA256(K_transit[key id], what it
covers), K_transit by HKDF-SHA256 from the master secret (info `earshot transit`, 32 octets). In a
message it covers the 28 octets at the beginning and the body. In a frame with a client's datagram
it covers the same 28 octets and stands in the last four of the header, where an address that is not
link-local has a scope id that nobody reads: so frames stay as long as they are, it costs a relay no
look at any octet of a payload, and transceivers give it back like the rest of the header. It shows
who made the frame, not that the datagram is whole: SRTP, DTLS and STUN do that.

Rules that stay true:
- What a message can do is what a client's own check can do, or Redis: an introduction opens a flow
  to the transceiver that its ufrag names under the keys, and nothing else.
- Nothing here raises for octets that somebody sent.

Sans-IO: `now` is an argument, in seconds. RFC 7363 (HRW in routing), RFC 2104 (HMAC)
"""

import enum
import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import frame
import ufrag

PROBES = 5
"""In one `timeout_s`, of an address that has sessions and is silent: three in a row may be lost."""

TALKING = 2.5
"""How many times rarer is an address probed from which datagrams come: traffic shows most of it."""

IDLE_S = 1.0
"""Between two probes of an address without sessions."""

USED_S = 10.0
"""An address that nothing of a session came from for so long has none."""

ONE_WAY = 1.5
"""How many `timeout_s` traffic alone is believed."""

STEADY_S = 5.0
"""How long an address must have answered again before it is chosen again: a path that flaps would
move the same sessions again and again."""

TAG_OCTETS = 4
NO_TAG = bytes(TAG_OCTETS)

_TYPE_AT = 2
_COVERED = frame.HEADER_OCTETS - TAG_OCTETS
_NOBODY = bytes(frame.HEADER_OCTETS - len(frame.MAGIC))
_MARK = frame.MAGIC[:_TYPE_AT]
_PROBE_OCTETS = 8
_INTRODUCTION = struct.Struct(f"<B{ufrag.UFRAG_CHARACTERS}s")


class Kind(enum.IntEnum):
    """What a message says."""

    PROBE = 1
    ANSWER = 2
    QUESTION = 3
    INTRODUCTION = 4


_BODIES = {
    Kind.PROBE: _PROBE_OCTETS,
    Kind.ANSWER: _PROBE_OCTETS + 1,
    Kind.QUESTION: 0,
    Kind.INTRODUCTION: _INTRODUCTION.size,
}
_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Message:
    """One that was read."""

    kind: Kind
    header: bytes
    """The client's, as it stands before its datagrams."""
    body: bytes


class Tags:
    """What relays with the same keys put on frames, and look for."""

    def __init__(self, keyring: ufrag.Keyring, used: bool) -> None:
        """Where tags are not `used`, all are right, and the one to put is zero."""
        self.used = used
        self._keys = [key.transit for key in keyring.keys.values()]
        self._own = keyring.keys[keyring.mint_id].transit

    def tag(self, octets: bytes) -> bytes:
        """The tag to put, under the key that ufrags are minted with."""
        return _tag(self._own, octets) if self.used else NO_TAG

    def all(self, octets: bytes) -> list[bytes]:
        """The tags that are right: one a key, so that keys can be changed one relay at a time."""
        return [_tag(key, octets) for key in self._keys]

    def right(self, octets: bytes, tag: bytes) -> bool:
        """Whether somebody with a key has put this tag on these octets."""
        if not self.used:
            return True
        return any(hmac.compare_digest(each, tag) for each in self.all(octets))

    def stamp(self, header: bytes) -> bytes:
        """The last four octets of this client's header, on the way to a relay."""
        return self.tag(header[:_COVERED])

    def stamped(self, header: bytes) -> bool:
        """Whether a client's header comes from a relay with a key."""
        return self.right(header[:_COVERED], header[_COVERED:])

    def twins(self, header: bytes) -> list[bytes]:
        """The headers that the same client has under the other keys."""
        covered = header[:_COVERED]
        found = [covered + tag for tag in self.all(covered)] if self.used else []
        return [each for each in found if each != header]

    def probe(self, token: bytes) -> bytes:
        """A question whether somebody is there."""
        return self._message(Kind.PROBE, frame.MAGIC + _NOBODY, token)

    def answer(self, token: bytes, draining: bool) -> bytes:
        """The answer to a probe with this body."""
        return self._message(Kind.ANSWER, frame.MAGIC + _NOBODY, token + bytes([draining]))

    def question(self, header: bytes) -> bytes:
        """Whose is this client?"""
        return self._message(Kind.QUESTION, header, b"")

    def introduction(self, header: bytes, text: bytes, assured: bool) -> bytes:
        """This client was given this ufrag."""
        return self._message(Kind.INTRODUCTION, header, _INTRODUCTION.pack(assured, text))

    def _message(self, kind: Kind, header: bytes, body: bytes) -> bytes:
        covered = _MARK + bytes([kind, 0]) + header[len(frame.MAGIC) : _COVERED]
        return covered + header[_COVERED:] + self.tag(covered + body) + body

    def read(self, header: bytes, rest: bytes | memoryview) -> Message | None:
        """A message in two pieces; None for what is none, or whose tag is wrong."""
        kind = _KINDS.get(header[_TYPE_AT])
        tag, body = bytes(rest[:TAG_OCTETS]), bytes(rest[TAG_OCTETS:])
        if kind is None or len(body) != _BODIES[kind] or len(tag) < TAG_OCTETS:
            return None
        if not is_message(header) or not self.right(header[:_COVERED] + body, tag):
            return None
        return Message(kind, frame.MAGIC + header[len(frame.MAGIC) :], body)


def is_message(header: bytes) -> bool:
    """Whether 32 octets begin a message and not a client's datagram."""
    return header[:_TYPE_AT] == _MARK and header[_TYPE_AT] != 0 and header[_TYPE_AT + 1] == 0


def introduced(body: bytes) -> tuple[bytes, bool]:
    """Of an introduction: the ufrag, and whether the flow is assured."""
    assured, text = _INTRODUCTION.unpack(body)
    return text, bool(assured)


def _tag(key: bytes, octets: bytes) -> bytes:
    return hmac.digest(key, octets, "sha256")[:TAG_OCTETS]


@dataclass(slots=True)
class Way:
    """One transit address, as this worker has found it."""

    number: int
    """Among all of them, in the order of the configuration."""
    cluster: int
    salt: int
    """What its weights are made with."""
    answered_at: float
    """When it last answered a probe. At first: when it was first asked."""
    heard_at: float
    """When anything came from there."""
    used_at: float = float("-inf")
    """When it last carried something of a session, or was chosen for one."""
    probed_at: float = float("-inf")
    busy: bool = False
    """Whether it matters how soon it is found to be lost."""
    up: bool = True
    """Chosen before it has shown anything: a worker begins in the middle of calls."""
    steady_at: float = 0.0
    """When an address that answers again may be chosen again."""
    draining: bool = False
    round_trip_s: float = 0.0
    """Of the last probe that was answered."""

    @property
    def open(self) -> bool:
        """Whether sessions are to go this way."""
        return self.up and not self.draining


class Backbone:
    """The ways of one worker to all clusters that are elsewhere."""

    seen: set[bytes]
    """Socket addresses that frames came from. The hot path adds to it, `tend` empties it."""
    due: float
    """When `tend` has something to do again."""
    ways: dict[bytes, Way]
    """By socket address (frame.name)."""

    def __init__(self, groups: Mapping[int, Sequence[bytes]], timeout_s: float, now: float) -> None:
        """The transit addresses of each cluster by its id."""
        self._groups, self._timeout_s = groups, timeout_s
        self._period_s = timeout_s / PROBES
        self.seen = set()
        self.due = self._planned_at = now
        self.ways = {}
        for cluster, names in groups.items():
            for name in names:
                self.ways[name] = Way(len(self.ways), cluster, _digest(name), now, now)
        self.rank()

    def __contains__(self, cluster: int) -> bool:
        """Whether a cluster is reached this way."""
        return cluster in self._groups

    def rank(self) -> None:
        """Find out what there is to choose from: a change of a way shows after this."""
        self._choice: dict[int, list[tuple[int, bytes]]] = {}
        for cluster, names in self._groups.items():
            ways = [(self.ways[name], name) for name in names]
            best = [pair for pair in ways if pair[0].open]
            best = best or [pair for pair in ways if pair[0].up] or ways
            self._choice[cluster] = [(way.salt, name) for way, name in best]

    def choose(self, cluster: int, text: bytes) -> bytes:
        """The way of the session with this ufrag: 1 us, and 0.2 for each address there is.

        Raises KeyError for a cluster that is not reached this way.
        """
        digest = _digest(text)
        _, name = max([((digest ^ salt) * _FACTOR & _MASK, n) for salt, n in self._choice[cluster]])
        self.use(name)
        return name

    def use(self, name: bytes) -> None:
        """This way has a session: if it had none, it is asked at once whether it is there."""
        way = self.ways[name]
        way.used_at = _JUST_NOW
        if not way.busy:
            self.due = 0.0

    def same(self, one: bytes | None, other: bytes) -> bool:
        """Whether two socket addresses are transit addresses of one cluster."""
        first, second = self.ways.get(one or b""), self.ways.get(other)
        return first is not None and second is not None and first.cluster == second.cluster

    def answered(self, name: bytes, body: bytes, now: float) -> bool:
        """That address has answered a probe; whether sessions are to leave it from now on."""
        way = self.ways.get(name)
        if way is None:
            return False
        way.answered_at = way.heard_at = now
        way.round_trip_s = max(0.0, now - _time_of(body))
        drains, way.draining = way.draining, bool(body[_PROBE_OCTETS])
        if drains != way.draining:
            self.rank()
        return way.draining and not drains

    def tend(self, now: float) -> tuple[list[bytes], list[bytes]]:
        """The addresses to probe now, and those that were lost since the last call.

        To be called when `due`.
        """
        if now - self._planned_at > self._timeout_s:
            self._forgive(now)
        to_probe, lost, busy = [], [], False
        for name, way in self.ways.items():
            talks = name in self.seen
            if talks or way.used_at == _JUST_NOW:
                way.used_at = now
            if talks:
                way.heard_at = now
            way.busy, was = now - way.used_at < USED_S, way.busy
            if way.busy and not was and way.up:
                way.answered_at = way.heard_at = now  # nobody had asked it often enough
            period_s = self._period_s * (TALKING if talks else 1) if way.busy else IDLE_S
            if now - way.probed_at >= period_s * 0.95:
                way.probed_at = now
                to_probe.append(name)
            if self._judge(way, now):
                lost.append(name)
            busy = busy or way.busy
        self.seen.clear()
        self.due = self._planned_at = now + (self._period_s if busy else IDLE_S)
        return to_probe, lost

    def _forgive(self, now: float) -> None:
        """This process had no CPU for a while: silence has shown nothing."""
        for way in self.ways.values():
            if way.up:
                way.answered_at = way.heard_at = now

    def _judge(self, way: Way, now: float) -> bool:
        """Up or not; true if it was, and is no more."""
        patience_s = self._timeout_s + (0.0 if way.busy else 2 * IDLE_S)
        silent_s = now - max(way.answered_at, way.heard_at)
        unanswered_s = now - way.answered_at
        was = way.up
        if silent_s > patience_s or unanswered_s > patience_s * ONE_WAY:
            way.up, way.steady_at = False, float("inf")
        elif not way.up:
            if way.steady_at == float("inf"):
                way.steady_at = now + STEADY_S
            way.up = now >= way.steady_at
        if was != way.up:
            self.rank()
        return was and not way.up


_JUST_NOW = float("inf")
"""Since the last `tend`: only that knows what time it is."""

_FACTOR, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # the golden ratio's, odd: Fibonacci hashing


def _digest(octets: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(octets, digest_size=8).digest(), "big")


def token(now: float) -> bytes:
    """The body of a probe."""
    return struct.pack("<d", now)


def _time_of(body: bytes) -> float:
    found: float = struct.unpack_from("<d", body)[0]
    return found
