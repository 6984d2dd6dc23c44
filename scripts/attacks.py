"""The attacks of the relay's threat model, as datagrams: what strangers, eavesdroppers and thieves
of keys can send to its one public port.

What it owns: `ATTACKS`, each with what it needs and what it may get back, and `Material`, what an
attacker knows. For flood.py attack; attackers.py sends what is made here. Sans-IO.

Who can do what:
- A stranger knows the relay's address alone. Whoever may call also has a hint and its password of
  a session that is his own.
- An eavesdropper has seen datagrams of others: their hints, checks and SSRCs are in the clear, and
  their addresses can be put into forged datagrams, where the network lets them pass.
- A thief has the keys of the relay, and mints hints.

Rules that stay true:
- The sessions that are attacked are those of the tool's own calls: what an eavesdropper has seen is
  recorded there, nobody else is listened to.
- Neither a stranger nor an eavesdropper is ever answered. Whoever can sign checks is, by STUN
  alone, and whoever has called is spoken to as any caller is.

ARCHITECTURE.md "The routing hint", "Rules of the relay", "Roaming"; RFC 7983 (first octets)
https://www.rfc-editor.org/rfc/rfc7983
"""

import enum
import ipaddress
import random
import string
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import stun
import ufrag

KINDS = 1_000
"""Different datagrams of an attack, sent in turn: enough that no cache helps, made in 0.1 s."""

LENGTH_MAX = 9_000
"""Of a datagram: what a jumbo frame holds. An Ethernet MTU of 1500 cuts it into seven."""

DATAGRAM_MAX = 1500
"""The relay's default of datagram_octets_max: what is longer is dropped unread."""

_ALPHABET = string.ascii_letters + string.digits + "+/"
_HINT_LENGTH = 23
_RTP = struct.Struct(">BBHII")
_OPUS_OCTETS = 80


@dataclass(frozen=True)
class Own:
    """A session of the attacker's own: he is a caller, too."""

    hint: str
    password: bytes


@dataclass
class Material:
    """What attackers know. What is empty they do not."""

    own: list[Own] = field(default_factory=list)
    """Sessions that they placed themselves."""
    hints: list[str] = field(default_factory=list)
    """Ufrags of live calls: in the clear in each of their checks."""
    checks: list[bytes] = field(default_factory=list)
    """Checks of live calls."""
    recorded: bool = True
    """To the octet as they were sent; False for new ones, made with the relay's keys."""
    ssrcs: list[int] = field(default_factory=list)
    """Of the media that live calls send."""
    live: list[tuple[str, int]] = field(default_factory=list)
    """Addresses and ports of live calls, where datagrams can be sent in their name."""
    keyring: ufrag.Keyring | None = None
    clusters: dict[int, ufrag.Cluster] = field(default_factory=dict)
    """The relay's keys and what its configuration lets hints name."""


class Needs(enum.Enum):
    """What an attack is made of; the value is why it was left out."""

    OWN = "it needs a session of one's own, and signaling gave none"
    CHECKS = "it needs recorded checks: a target on this machine and CAP_NET_RAW, or --config"
    SSRCS = "it needs the SSRCs of live calls: a target on this machine and CAP_NET_RAW"
    LIVE = "it sends in the name of live calls: a target on this machine and CAP_NET_RAW"
    KEYS = "it needs the relay's keys: --config"


Make = Callable[[Material, random.Random], Iterator[bytes]]


@dataclass(frozen=True)
class Attack:
    """One way to attack."""

    name: str
    what: str
    """A sentence for whoever reads the figures."""
    make: Make
    needs: tuple[Needs, ...] = ()
    answers: frozenset[str] = frozenset()
    """Kinds of datagrams that may come back (attackers.Squad)."""
    why: str = ""
    """Why they may."""

    def missing(self, material: Material) -> str:
        """Why it cannot be made out of this; empty if it can."""
        there = {
            Needs.OWN: bool(material.own),
            Needs.CHECKS: bool(material.checks),
            Needs.SSRCS: bool(material.ssrcs),
            Needs.LIVE: bool(material.live),
            Needs.KEYS: material.keyring is not None and bool(material.hints),
        }
        return ", and ".join(each.value for each in self.needs if not there[each])

    def may_hear(self, material: Material) -> tuple[frozenset[str], str]:
        """Kinds of datagrams that may come back to attackers who know this, and why."""
        if Needs.CHECKS in self.needs and not material.recorded:
            return CHECKED, "the checks are new and valid, and not recorded ones"
        return self.answers, self.why

    def datagrams(self, material: Material, chance: random.Random) -> list[bytes]:
        """What is sent in turn: `KINDS` of them or, of what was recorded, all that there is."""
        return [each for each, _ in zip(self.make(material, chance), range(KINDS), strict=False)]


# --- strangers ------------------------------------------------------------------------------------


def _text(chance: random.Random, length: int) -> str:
    return "".join(chance.choices(_ALPHABET, k=length))


def _transaction(chance: random.Random) -> bytes:
    return chance.randbytes(stun.TRANSACTION_OCTETS)


def _wrong(chance: random.Random, hint: str) -> bytes:
    """A check under a password that is made up."""
    return stun.request(_transaction(chance), f"{hint}:{_text(chance, 4)}", chance.randbytes(24))


def _random_hints(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Of any form; of the right one under any key; of the right one under a key that there is."""
    seen = [own.hint for own in material.own] + material.hints
    while True:
        yield _wrong(chance, _text(chance, chance.choice((4, 16, _HINT_LENGTH, 32, 256))))
        yield _wrong(chance, _text(chance, _HINT_LENGTH))
        hint = chance.choice(seen) if seen else _text(chance, _HINT_LENGTH)
        # The first two characters are the key's id and the version, the last has two spare bits.
        yield _wrong(chance, hint[:2] + _text(chance, _HINT_LENGTH - 3) + hint[-1])


def _bad_integrity(material: Material, chance: random.Random) -> Iterator[bytes]:
    seen = [own.hint for own in material.own] + material.hints
    while True:
        yield _wrong(chance, chance.choice(seen))


def _broken_stun(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Cut, padded, without what is needed, with lengths that lie, and other kinds of message."""
    while True:
        whole = _wrong(chance, _text(chance, _HINT_LENGTH))
        yield whole[: chance.randrange(1, len(whole))]
        yield whole + chance.randbytes(chance.randrange(1, 64))
        at = chance.randrange(2, len(whole))
        yield whole[:at] + chance.randbytes(2) + whole[at + 2 :]
        lies = struct.pack(">HHI", 0x0001, 8, stun.MAGIC_COOKIE) + _transaction(chance)
        yield lies + struct.pack(">HH", 0x0006, 0xFFFF) + b"hint"
        other = chance.choice((0x0003, 0x0101, 0x0111, 0x0011, 0x0004))  # Allocate, answers, …
        yield struct.pack(">HHI", other, 0, stun.MAGIC_COOKIE) + _transaction(chance)


def _non_stun(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Nothing at all, DTLS, TURN's channels, ZRTP, QUIC, DNS-like octets and noise."""
    yield b""
    while True:
        hello = b"\x16\xfe\xfd" + bytes(8) + b"\x00\x80\x01" + chance.randbytes(127)
        yield hello
        yield bytes((chance.randrange(64, 80),)) + chance.randbytes(chance.randrange(3, 200))
        yield bytes((chance.randrange(16, 20),)) + chance.randbytes(chance.randrange(11, 200))
        yield bytes((chance.randrange(192, 256),)) + chance.randbytes(1199)
        yield bytes((chance.randrange(4, 256),)) + chance.randbytes(chance.randrange(200))


def _rtp(chance: random.Random, ssrc: int) -> bytes:
    head = _RTP.pack(0x80, 111, chance.randrange(1 << 16), chance.randrange(1 << 32), ssrc)
    return head + chance.randbytes(_OPUS_OCTETS)


def _media_of_nobody(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Each guesses an SSRC: the relay looks for a flow that has it."""
    while True:
        yield _rtp(chance, chance.randrange(1 << 32))


def _oversized(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Beyond what the relay takes: some are STUN or media by their first octets."""
    firsts = (b"\x00\x01", b"\x80\x6f", b"\x16\xfe", b"\xff\xff")
    while True:
        length = chance.randrange(DATAGRAM_MAX + 1, LENGTH_MAX + 1)
        yield chance.choice(firsts) + chance.randbytes(length - 2)


# --- callers, eavesdroppers -----------------------------------------------------------------------


def _one_ufrag(material: Material, chance: random.Random) -> Iterator[bytes]:
    """A client that is everywhere at once: its checks are valid, and each is a new one."""
    own = material.own[0]
    while True:
        yield stun.request(_transaction(chance), f"{own.hint}:many", own.password)


def _replays(material: Material, chance: random.Random) -> Iterator[bytes]:
    yield from material.checks


def _stolen_ssrcs(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Media that claims to be a live call's whose port has changed."""
    while True:
        yield _rtp(chance, chance.choice(material.ssrcs))


def _spoofed(material: Material, chance: random.Random) -> Iterator[bytes]:
    """In the name of live calls: media, DTLS alerts, checks of other sessions, broken STUN."""
    strangers, broken = _random_hints(material, chance), _broken_stun(material, chance)
    while True:
        yield _rtp(chance, chance.choice(material.ssrcs or [chance.randrange(1 << 32)]))
        yield _rtp(chance, chance.randrange(1 << 32))
        yield b"\x15\xfe\xfd\x00\x01" + chance.randbytes(6) + b"\x00\x02\x02\x28"
        yield _wrong(chance, chance.choice(material.hints))
        yield next(strangers)
        yield next(broken)


# --- thieves of keys ------------------------------------------------------------------------------


def _minted(material: Material, chance: random.Random) -> Iterator[bytes]:
    """Valid first checks of sessions that nobody has, at transceivers that are there."""
    assert material.keyring is not None  # Needs.KEYS
    homes = list(_homes(material))
    while homes:
        cluster, address, port = chance.choice(homes)
        hint = ufrag.mint(material.keyring, cluster, address, port, chance.randrange(1 << 32))
        password = ufrag.password(material.keyring, hint)
        assert password is not None  # this keyring minted it
        yield stun.request(_transaction(chance), f"{hint}:none", password)


def checks(material: Material, chance: random.Random) -> Iterator[bytes]:
    """A check of each live call, signed with its password out of the relay's keys."""
    assert material.keyring is not None  # whoever calls this has them
    for hint in material.hints:
        password = ufrag.password(material.keyring, hint)
        if password is not None:  # else the keys are not this relay's
            yield stun.request(_transaction(chance), f"{hint}:seen", password)


def _homes(material: Material) -> Iterator[tuple[ufrag.Cluster, ufrag.Address, int]]:
    """Where the live calls' transceivers are."""
    assert material.keyring is not None
    for hint in material.hints:
        found = ufrag.parse(material.keyring, material.clusters, hint.encode())
        if isinstance(found, ufrag.Hint):
            address = ipaddress.ip_address(found.address)
            yield material.clusters[found.cluster], address, found.port


CHECKED = frozenset({"stun success", "stun error", "stun request"})
"""What a transceiver sends to whoever has shown a valid check that is new: the answer, and checks
of its own for half a minute (paths.py)."""

CALLED = CHECKED | {"dtls"}
"""To its caller it sends the first flight of DTLS, too."""

ATTACKS = (
    Attack("random-hints", "first checks with ufrags that are made up", _random_hints),
    Attack(
        "bad-integrity",
        "first checks with real ufrags and guessed passwords",
        _bad_integrity,
        (Needs.OWN,),
    ),
    Attack("broken-stun", "STUN that is cut, lies about lengths, or asks for TURN", _broken_stun),
    Attack("non-stun", "DTLS, QUIC, TURN's channels, noise, empty datagrams", _non_stun),
    Attack("unknown-media", "RTP of nobody: each datagram guesses an SSRC", _media_of_nobody),
    Attack("oversized", f"{DATAGRAM_MAX + 1} to {LENGTH_MAX} octets", _oversized),
    Attack(
        "one-ufrag",
        "valid checks of a session of the attackers' own, from many addresses",
        _one_ufrag,
        (Needs.OWN,),
        CALLED,
        "the session is the attackers' own, so they are spoken to as any caller is, at as many"
        " addresses as a ufrag may have",
    ),
    Attack(
        "replay",
        "recorded checks of the live calls, from many addresses",
        _replays,
        (Needs.CHECKS,),
    ),
    Attack(
        "stolen-ssrcs",
        "RTP with the SSRCs of the live calls, from many addresses",
        _stolen_ssrcs,
        (Needs.SSRCS,),
    ),
    Attack(
        "spoofed",
        "forged media, DTLS and STUN from the live calls' own addresses and ports",
        _spoofed,
        (Needs.LIVE,),
    ),
    Attack(
        "hijack",
        "valid checks of another session from the live calls' own addresses and ports",
        _one_ufrag,
        (Needs.LIVE, Needs.OWN),
    ),
    Attack(
        "minted",
        "valid first checks of sessions that do not exist, under the relay's own keys",
        _minted,
        (Needs.KEYS,),
    ),
)
NAMES = tuple(attack.name for attack in ATTACKS)
