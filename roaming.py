"""Roaming: whose media it is that comes from an address which nobody knows.

A client's address changes without its knowledge (a NAT gives it another port, a phone another
network), and its ICE agent finds out with its next check, seconds later. Its media goes on at once,
with the SSRC that it had before. So each flow has its client's SSRC beside it, and media from an
unknown address is led to where the flow with its SSRC goes.

What it owns: where an SSRC stands in a datagram, the index of SSRCs over all flow tables, which of
several flows is meant, and who may follow how many.

An SSRC is no secret: whoever sees a client's media can send more of it. So what it opens leads to
that session's transceiver and nowhere else, is tentative, takes no room of clients that check, and
nothing is sent there before the transceiver does: it believes what SRTP authenticates.

Sans-IO. RFC 3550 section 5.1 (RTP), 6.4.1 (RTCP); RFC 3711 encrypts neither SSRC; RFC 5761 (which
is which)
"""

import enum
from collections.abc import Iterable

import stun

FOLLOWERS_MAX = 4
"""Unanswered flows that follow one session: an honest client has one, two if its port changes again
within a second. More would let whoever knows an SSRC hold more of the tentative flows."""

FOLLOWERS_SHARE = 2
"""One in so many tentative flows may be a follower: the rest is for clients that check."""

LISTENING_MAX = 1024
"""Clients whose SSRC a worker waits for at one time; who waits longest makes room, and waits again
with its next check. More would be more loops over a batch at the start of a flood."""

LISTEN_DATAGRAMS = 16
"""Of a client, looked at for an SSRC: a call begins with some DTLS. Clients without media would be
looked at for ever."""

LISTEN_S = 30
"""After which a client's check lets its SSRC be noted again, since it may have changed. Much less
than the lifetime of an SSRC, and rare enough that hardly a batch is looked through for it."""

SAME_SSRC_MAX = 16
"""Flows with one SSRC that are looked at: as many as one session may have addresses. By chance two
of 100,000 sessions share one; more make it, and must not make the keeper work."""


class Kind(enum.IntEnum):
    """What says whose a datagram is; the higher, the better it says it."""

    ADDRESS = 0
    """Nothing but the address that it came from."""
    CONTROL = 1
    """RTCP: the SSRC of its sender, which some clients make up for their reports."""
    MEDIA = 2
    """RTP."""


def read(datagram: bytes | memoryview) -> tuple[Kind, int]:
    """The SSRC of a datagram, and what it is worth; 0 if it has none. Total over any octets."""
    if len(datagram) < 8 or stun.KINDS[datagram[0]] != stun.Kind.RTP:
        return Kind.ADDRESS, 0
    kind, at = (Kind.CONTROL, 4) if stun.is_rtcp(datagram) else (Kind.MEDIA, 8)
    ssrc = int.from_bytes(datagram[at : at + 4], "big") if len(datagram) >= at + 4 else 0
    return (kind, ssrc) if ssrc else (Kind.ADDRESS, 0)


class Listening(dict[bytes, int]):
    """Clients (headers) of one table whose SSRC is waited for, with what is left to look at."""

    def add(self, header: bytes) -> None:
        """Wait for this client's."""
        if len(self) >= LISTENING_MAX:
            del self[next(iter(self))]
        self[header] = LISTEN_DATAGRAMS

    def hear(self, header: bytes, ssrc: int) -> bool:
        """A datagram of such a client, with its SSRC or 0; true if that is what is waited for."""
        left = self.pop(header, 0)
        if left > 1 and not ssrc:
            self[header] = left - 1
        return bool(left and ssrc)


class Followers:
    """The flows of one table that nothing but an SSRC has opened, and nobody has answered yet."""

    def __init__(self) -> None:
        """None."""
        self._of: dict[bytes, dict[bytes, bool]] = {}
        self._far: dict[bytes, None] = {}
        self._near = 0

    def __len__(self) -> int:
        return len(self._far) + self._near

    def add(self, ufrag: bytes, header: bytes, near: bool) -> None:
        """One more, from the IP address of its session (near) or from another one."""
        self._of.setdefault(ufrag, {})[header] = near
        self._near += near
        if not near:
            self._far[header] = None

    def remove(self, ufrag: bytes, header: bytes) -> None:
        """One has gone, or is no follower any more."""
        of = self._of[ufrag]
        self._near -= of.pop(header)
        self._far.pop(header, None)
        if not of:
            del self._of[ufrag]

    def leaves(self, ufrag: bytes, near: bool, most: int) -> bytes | None:
        """Who has to make room for one more of this session, where there may be so many of all:
        nobody yet (None), a client's header, or nobody can (empty).

        The oldest goes, of the same session or of all. From another IP address than the session's
        nobody pushes out one that is near: a stranger who cannot forge addresses cannot shut out a
        client whose port has changed.
        """
        of = self._of.get(ufrag, {})
        if len(of) >= FOLLOWERS_MAX:
            far = next((header for header, is_near in of.items() if not is_near), b"")
            return far or (next(iter(of)) if near else b"")
        return next(iter(self._far), b"") if len(self) >= most else None


class Index:
    """The flows of all tables by the SSRC of their client: a flow is a number, as in census.py."""

    def __init__(self) -> None:
        """Holds nothing."""
        self._by_ssrc: dict[int, int | set[int]] = {}
        self._ssrcs: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ssrcs)

    def note(self, number: int, ssrc: int) -> None:
        """This flow has this SSRC now; 0 is none."""
        before = self._ssrcs.pop(number, 0)
        if before:
            held = self._by_ssrc[before]
            if isinstance(held, set):
                held.discard(number)
                if len(held) == 1:
                    (self._by_ssrc[before],) = held
            else:
                del self._by_ssrc[before]
        if ssrc:
            self._ssrcs[number] = ssrc
            held = self._by_ssrc.setdefault(ssrc, number)
            if isinstance(held, set):
                held.add(number)
            elif held != number:
                self._by_ssrc[ssrc] = {held, number}

    def find(self, ssrc: int) -> tuple[int, ...]:
        """The flows with this SSRC; none where there are too many to tell."""
        held = self._by_ssrc.get(ssrc, ())
        if isinstance(held, int):
            return (held,)
        return tuple(held) if len(held) <= SAME_SSRC_MAX else ()


def choose(header: bytes, found: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, bool] | None:
    """Whose media comes from `header`, among flows (header, ufrag) with its SSRC: the ufrag, and
    whether that session is near, which is to say has a flow of the same IP address.

    Several addresses of one session are one. None if it is nobody's, or not clear whose: then its
    next check will tell.
    """
    pairs = list(found)
    near = {ufrag for theirs, ufrag in pairs if _ip(theirs) == _ip(header)}
    meant = list(near or {ufrag for _, ufrag in pairs})
    return (meant[0], bool(near)) if len(meant) == 1 else None


def _ip(header: bytes) -> bytes:
    return header[12:28]
