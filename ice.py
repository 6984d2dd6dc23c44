"""The server's end of ICE: answers checks as a lite agent would, and does not say that it is one.

A client checks the relay's address; the relay brings the check here; `Agent.check` answers it. The
first authenticated check completes ICE: there is nothing to gather, no check of our own to wait
for, and no need to know the client's candidates.

Rules that stay true:
- MESSAGE-INTEGRITY is verified before anything of a check has an effect.
- Every authenticated check is answered, also one without USE-CANDIDATE.
- The session moves to another address of the client on an authenticated check from there if it
  carries USE-CANDIDATE or the old address is silent, and on authenticated SRTP from an address
  that a check has verified. A replayed check moves nothing.
- Media goes back by the relay that last delivered an authenticated packet of that address, so a
  restarted relay, or another one, is only a new return address.

Why `a=ice-lite` is not announced: a full agent that faces a lite one nominates in an extra round
trip (RFC 8445 section 8.1.1); unannounced, clients are connected after two round trips instead of
three. A client cannot tell: checks towards it are the one thing it misses, and it needs none.

`Flight` is here because ICE's pace is what makes it useful: it re-sends a lost DTLS flight after
100 ms where OpenSSL would wait a second.

Sans-IO: `now` is an argument (seconds, monotonic); what to send is returned. It knows no socket
and no other session; `mux.py` finds the agent for a datagram.

RFC 8445 https://www.rfc-editor.org/rfc/rfc8445 (ICE), RFC 7675
https://www.rfc-editor.org/rfc/rfc7675 (consent), RFC 6347 section 4.2.4
https://www.rfc-editor.org/rfc/rfc6347#section-4.2.4 (re-sending a flight).
"""

import enum
from typing import Any, NamedTuple, TypeAlias

import frame
import stun

Sockaddr: TypeAlias = tuple[Any, ...]
"""A relay's address as the socket module gives and takes it; opaque here."""

PATHS_MAX = 8
"""Verified addresses of one client. A phone has two networks in two families, a relay pair doubles
that; more only helps someone with the password to fill memory. The longest silent one goes."""

CREDENTIALS_MAX = 2
"""The newest username and password and the pair before it: checks that left before the client had
the answer to its ICE restart still count. Older ones are forgotten."""

TRANSACTIONS_MAX = 256
"""Remembered transaction ids. STUN has no protection against replay, so this is what keeps a
recorded check from moving a call: at a check every 2.5 s (browsers) it covers ten minutes."""

SILENT_S = 0.3
"""Silence of the active address after which a check without USE-CANDIDATE moves the session.
Shorter would follow a jitter burst (audio comes every 20 ms); longer is silence that the caller
hears."""

RESEND_S = 0.1
"""First wait before a DTLS flight is sent again, doubled each time. Longer than most round trips,
so that a flight is rarely sent twice for nothing; a loss costs this and not OpenSSL's second."""

RESENDS_MAX = 4
"""After 0.1, 0.3, 0.7 and 1.5 s; from there OpenSSL's own timer (1 s, doubling) carries on."""

FLIGHT_DATAGRAMS_MAX = 4
"""Ours fit one datagram each (P-256 certificates: 800 octets at most)."""

# RFC 8445 section 7.3.1.1. We are controlled and stay so, as with the lowest tie-breaker: a client
# that thinks it is controlled too must switch.
_ROLE_CONFLICT = 487


class Path(NamedTuple):
    """Where a client is reached: its own address, and the relay that it came through."""

    header: bytes
    """The 32 octets that stand in front of its datagrams, both ways (frame.py)."""
    relay: Sockaddr
    """Where to send them."""


class Verdict(enum.Enum):
    """What became of a check."""

    ANSWERED = "authenticated; the response is a Binding success"
    CONFLICT = "authenticated, but the client thinks that it is controlled too; answered with 487"
    UNKNOWN_UFRAG = "its ufrag is not one of ours (any more)"
    FORGED = "its MESSAGE-INTEGRITY does not match"
    REPLAYED = "its transaction id came from another address before"


class Checked(NamedTuple):
    """The outcome of `Agent.check`."""

    verdict: Verdict
    response: bytes = b""
    """To send back on the path that the check came by; empty for nothing."""
    forgotten: bytes | None = None
    """The key (frame.key) of an address that had to make room, if any."""


class Agent:
    """One session's ICE: credentials, the client's addresses, the one in use, signs of life."""

    def __init__(self, ufrag: bytes, password: bytes) -> None:
        self._credentials: dict[bytes, bytes] = {ufrag: password}
        self._heard: dict[bytes, float] = {}  # verified addresses by key: when last heard
        self._transactions: dict[bytes, bytes] = {}  # transaction id: key of its address
        self.active: Path | None = None
        """Where media goes; None until the first authenticated check."""
        self.heard_at: float | None = None
        """When the last authenticated packet came, from any address."""

    @property
    def keys(self) -> list[bytes]:
        """The keys (frame.key) of all verified addresses."""
        return list(self._heard)

    @property
    def ufrags(self) -> list[bytes]:
        """The ufrags that are answered, oldest first."""
        return list(self._credentials)

    def check(
        self, datagram: bytes, request: stun.Request, header: bytes, relay: Sockaddr, now: float
    ) -> Checked:
        """Judge and answer one check: `request` as read from `datagram`, framed by `header`.

        Nothing of the request is believed before its integrity holds.
        """
        password = self._credentials.get(request.ufrag)
        if password is None:
            return Checked(Verdict.UNKNOWN_UFRAG)
        if not stun.check_integrity(datagram, request, password):
            return Checked(Verdict.FORGED)
        key = frame.key(header)
        if self._transactions.setdefault(request.transaction_id, key) != key:
            return Checked(Verdict.REPLAYED)
        if len(self._transactions) > TRANSACTIONS_MAX:
            del self._transactions[next(iter(self._transactions))]
        if request.controlled is not None:
            conflict = stun.error(request.transaction_id, _ROLE_CONFLICT, "Role Conflict", password)
            return Checked(Verdict.CONFLICT, conflict)
        path = Path(header, relay)
        if self._moves(path, request.use_candidate, now):
            self.active = path
        self._heard[key] = self.heard_at = now
        host, port = frame.client(header)
        success = stun.success(request.transaction_id, host, port, password)
        return Checked(Verdict.ANSWERED, success, self._make_room(key))

    def media(self, header: bytes, relay: Sockaddr, now: float) -> None:
        """Note SRTP that authenticated: a sign of life, and it shows where the client is now.

        An address that no check has verified, or that is forgotten by now, gets nothing.
        """
        self.heard_at = now
        key = frame.key(header)
        if key not in self._heard:
            return
        self._heard[key] = now
        if self.active is None or self.active.header != header or self.active.relay != relay:
            self.active = Path(header, relay)

    def restart(self, ufrag: bytes, password: bytes) -> bytes | None:
        """Accept new credentials beside the last ones (ICE restart); the ufrag that goes, if any.

        Addresses stay as they are until the client checks with the new pair: DTLS and SRTP do not
        notice (RFC 8445 section 9).
        """
        self._credentials[ufrag] = password
        if len(self._credentials) <= CREDENTIALS_MAX:
            return None
        oldest = next(iter(self._credentials))
        del self._credentials[oldest]
        return oldest

    def forget(self, key: bytes) -> None:
        """Give up an address that another session has proved to own now."""
        self._heard.pop(key, None)
        if self.active is not None and frame.key(self.active.header) == key:
            self.active = None

    def quiet_s(self, key: bytes, now: float) -> float | None:
        """Seconds since an authenticated packet came from that address; None if it never did."""
        heard_at = self._heard.get(key)
        return None if heard_at is None else now - heard_at

    def _moves(self, path: Path, use_candidate: bool, now: float) -> bool:
        """True if media belongs on `path` after an authenticated check came by it."""
        if self.active is None or use_candidate or path == self.active:
            return True
        quiet_s = self.quiet_s(frame.key(self.active.header), now)
        return quiet_s is None or quiet_s >= SILENT_S

    def _make_room(self, key: bytes) -> bytes | None:
        """Forget the longest silent address if there is one too many: not `key`, not the active."""
        if len(self._heard) <= PATHS_MAX:
            return None
        keep = {key} if self.active is None else {key, frame.key(self.active.header)}
        oldest = min(self._heard.keys() - keep, key=self._heard.__getitem__)
        del self._heard[oldest]
        return oldest


class Flight:
    """The last DTLS flight we sent, to be sent again until the client answers it.

    OpenSSL's timer starts at a second and pyOpenSSL cannot set it, so a lost flight would hold up
    the call that long. Duplicates are harmless: DTLS drops them (RFC 6347 section 4.1.2.6).
    """

    def __init__(self) -> None:
        self._datagrams: list[bytes] = []
        self._answered = True
        self._resends = 0
        self.wakes_at: float | None = None
        """When `due` has something to send; None while nothing waits for an answer."""

    def sent(self, datagram: bytes, now: float) -> None:
        """Note a DTLS datagram as it leaves: the first one after `answered` begins a new flight."""
        if self._answered:
            self._datagrams.clear()
            self._answered = False
            self._resends = 0
            self.wakes_at = now + RESEND_S
        if len(self._datagrams) < FLIGHT_DATAGRAMS_MAX:
            self._datagrams.append(datagram)

    def answered(self) -> None:
        """Note that DTLS came from the client: what we send next is a new flight.

        The old one goes on being sent until then, for the answer may be a part, or an old one.
        """
        self._answered = True

    def done(self) -> None:
        """Note that the handshake is over on both sides: nothing is sent again."""
        self._answered = True
        self.wakes_at = None
        self._datagrams.clear()

    def due(self, now: float) -> list[bytes]:
        """The datagrams to send again at `now`, and set `wakes_at` for the next time."""
        if self.wakes_at is None or now < self.wakes_at:
            return []
        self._resends += 1
        again = self._resends < RESENDS_MAX
        self.wakes_at = now + RESEND_S * 2**self._resends if again else None
        return list(self._datagrams)
