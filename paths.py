"""Paths: the ways on which a client can be reached, and keeping those alive that it does not use.

A client that was given two ways in checks both, speaks by the better one and lets the other be. It
falls over to that by itself, without a new offer, if it is still there: but libwebrtc (browsers)
sends no more checks by a way that it does not use, and forgets one by which nothing came for 30 s;
a relay forgets a flow that nothing came by for 15 s. So we check what the client has checked: its
answer keeps the relay's flow, our request keeps the client's pair.

A path is a client's address and a relay. Two relays may well deliver the same address, so neither
is a path without the other.

Rules that stay true:
- Nothing is sent but by a path on which an authenticated check has come, and nothing for long by
  one from which neither checks nor answers come: nobody is flooded who did not ask for it.
- An answer counts if it is to the request in question, comes by its path, and has the client's
  MESSAGE-INTEGRITY. It shows that somebody is there, and moves nothing: where media goes is
  decided by what the client sends of its own accord (ice.py).
- We stay controlled: no request of ours nominates anything.

Sans-IO: `now` is an argument (seconds, monotonic), what to send is returned, and transaction ids
are drawn from a secret. RFC 8445 section 7.2.2 https://www.rfc-editor.org/rfc/rfc8445 (forming
requests), RFC 8489 section 6.2.1 https://www.rfc-editor.org/rfc/rfc8489 (sending them again).
"""

import enum
import hmac
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import frame
import stun

Sockaddr: TypeAlias = tuple[Any, ...]
"""A relay's address as the socket module gives and takes it; opaque here."""

PATHS_MAX = 8
"""Paths of one client. A phone has two networks in two families, and two sites each double that;
more only helps someone with the password to have us send. The longest silent one goes."""

PERIOD_S = 6.0
"""Between two requests that are answered. Two of them fit into the 15 s after which a relay forgets
a flow that carries no media, and five into libwebrtc's 30 s: one may be lost for good. Each costs
us 20 us with its answer (a tenth of a percent of a session, two paths), the client little more."""

RETRY_S, RETRIES = 0.5, 3
"""A request without an answer is sent again as often at the next sweeps, a second apart: all before
the relay has forgotten the flow, after which nothing gets through any more. Less than the sweep's
second, so that none is passed over for being early."""

FORGOTTEN_S = 30.0
"""A path from which nothing has come for so long is forgotten, after seven requests in vain: the
client has done so (libwebrtc), and the relay has, too."""

PRIORITY = 110 << 24 | 255
"""The lowest of a peer-reflexive candidate (RFC 8445 section 5.1.2.1): a client that does not know
the address must not like it better than those that it was given."""

_TIE_BREAKER = 0  # the lowest: a client that thinks it is controlled, too, switches


class Path(NamedTuple):
    """Where a client is reached: its own address, and the relay that it came through."""

    header: bytes
    """The 32 octets that stand in front of its datagrams, both ways (frame.py)."""
    relay: Sockaddr
    """Where to send them."""


class Reply(enum.Enum):
    """What became of an answer."""

    ALIVE = "to the request that is under way on its path, and authentic"
    REFUSED = "an error for that request; it may come from anybody who has seen the request"
    UNASKED = "to nothing that was asked there, or too late"
    FORGED = "its MESSAGE-INTEGRITY does not match"


@dataclass(slots=True)
class _Kept:
    """What is known of a path."""

    heard_at: float
    """When the client's last check or answer came by it."""
    due_at: float
    """When the next request is due."""
    asked: int = 0
    """Requests since the last answer."""
    transaction_id: bytes = b""
    """Of the request that is under way; it stays good until the next one."""


class Paths:
    """The paths of one client under one pair of credentials."""

    def __init__(self, ours: tuple[bytes, bytes], theirs: tuple[bytes, bytes]) -> None:
        """Each is a ufrag and a password."""
        # RFC 8445 section 7.2.2: the ufrag of whom it is for comes first, and his password is the
        # key.
        self._username = f"{theirs[0].decode()}:{ours[0].decode()}"
        self._password, self._secret = theirs[1], ours[1]
        self._kept: dict[Path, _Kept] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._kept)

    def checked(self, path: Path, now: float) -> None:
        """Note that an authenticated check came by this path, one that was never seen before."""
        known = self._kept.get(path)
        if known is not None:
            known.heard_at = now
            return
        if len(self._kept) >= PATHS_MAX:
            del self._kept[min(self._kept, key=lambda each: self._kept[each].heard_at)]
        self._kept[path] = _Kept(now, now + PERIOD_S)

    def due(self, now: float) -> list[tuple[Path, bytes]]:
        """The requests to send now, at most one a path. To be called once a second."""
        found, gone = [], []
        for path, kept in self._kept.items():
            if now - kept.heard_at >= FORGOTTEN_S:
                gone.append(path)
            elif now >= kept.due_at:
                found.append((path, self._request(kept, now)))
        for path in gone:
            del self._kept[path]
        return found

    def answered(self, datagram: bytes, answer: stun.Answer, path: Path, now: float) -> Reply:
        """Judge what came back by `path`: `answer` as read from `datagram`."""
        kept = self._kept.get(path)
        if kept is None or answer.transaction_id != kept.transaction_id:
            return Reply.UNASKED
        if not answer.success:
            return Reply.REFUSED
        if not stun.check_integrity(datagram, answer, self._password):
            return Reply.FORGED
        kept.heard_at, kept.due_at, kept.asked = now, now + PERIOD_S, 0
        return Reply.ALIVE

    def forget(self, key: bytes) -> None:
        """Forget the paths of an address (frame.key): it is another session's, or had to go."""
        for path in [path for path in self._kept if frame.key(path.header) == key]:
            del self._kept[path]

    def clear(self) -> None:
        """Forget all: the client goes by other credentials now."""
        self._kept.clear()

    def _request(self, kept: _Kept, now: float) -> bytes:
        """The next request on a path, or the one that has not been answered, again."""
        if not 0 < kept.asked <= RETRIES:
            self._drawn += 1
            drawn = hmac.digest(self._secret, self._drawn.to_bytes(8, "big"), "sha1")
            kept.transaction_id = drawn[: stun.TRANSACTION_OCTETS]
        kept.asked += 1
        kept.due_at = now + (RETRY_S if kept.asked <= RETRIES else PERIOD_S)
        return stun.request(
            kept.transaction_id,
            self._username,
            self._password,
            use_candidate=False,
            priority=PRIORITY,
            tie_breaker=_TIE_BREAKER,
            controlled=True,
        )
