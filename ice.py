"""The server's end of ICE: answers checks as a lite agent would, and does not say that it is one.

A client checks the relay's address; the relay brings the check here; `Agent.check` answers it. The
first authenticated check completes ICE: there is nothing to gather, no check of our own to wait
for, and no need to know the client's candidates. Later we check what the client has checked, so
that a way in that it does not use stays open (paths.py); nothing depends on the answers.

Rules that stay true:
- MESSAGE-INTEGRITY is verified before anything of a check has an effect.
- Every authenticated check is answered, also one without USE-CANDIDATE; a call's first ones a
  moment later if its client knows a second site, so that it asks there, too (hold.py).
- The session moves to another address of the client on an authenticated check from there if it
  carries USE-CANDIDATE or the old address is silent, and on authenticated media from an address
  that a check has verified. A replayed check moves nothing.
- Authenticated SRTP from an address that no check has verified (a NAT has given the client another
  port) is followed once the old address has been silent for some packets: somebody who copies a
  packet and is faster than the original must not have the call. Such an address needs a check
  within seconds, and until then any sign of life from a verified one outweighs it.
- Media goes back by the relay that last delivered an authenticated packet of that address, so a
  restarted relay, or another one, is only a new return address. A data channel's packet counts as
  much as SRTP: both are encrypted, authenticated and safe from replay.

Why `a=ice-lite` is not announced: a full agent that faces a lite one nominates in an extra round
trip (RFC 8445 section 8.1.1); unannounced, clients are connected after two round trips instead of
three. A client cannot tell: it needs no check of ours, and later gets some.

`Flight` is here because ICE's pace is what makes it useful: it re-sends a lost DTLS flight after
100 ms where OpenSSL would wait a second.

Sans-IO: `now` is an argument (seconds, monotonic); what to send is returned. It knows no socket
and no other session; `mux.py` finds the agent for a datagram.

RFC 8445 https://www.rfc-editor.org/rfc/rfc8445 (ICE), RFC 7675
https://www.rfc-editor.org/rfc/rfc7675 (consent), RFC 6347 section 4.2.4
https://www.rfc-editor.org/rfc/rfc6347#section-4.2.4 (re-sending a flight).
"""

import enum
import math
from typing import NamedTuple, TypeAlias

import frame
import hold
import paths
import stun

Sockaddr: TypeAlias = paths.Sockaddr
Path = paths.Path

ADDRESSES_MAX = 8
"""Verified addresses of one client. A phone has two networks in two families, and the ports of an
ICE restart double that; more only helps someone with the password to fill memory. The longest
silent one goes."""

CREDENTIALS_MAX = 2
"""The newest username and password, and the pair that the client has checked with last: its ICE
restart may fail, with the answer lost on its way, and then it goes on or asks for another."""

TRANSACTIONS_MAX = 256
"""Remembered transaction ids. STUN has no protection against replay, so this is what keeps a
recorded check from moving a call: at a check every 2.5 s (browsers) it covers ten minutes."""

SILENT_S = 0.3
"""Silence of the active address after which a check without USE-CANDIDATE moves the session.
Shorter would follow a jitter burst (audio comes every 20 ms); longer is silence that the caller
hears."""

FOLLOWED_S = 0.06
"""How long an address that SRTP alone speaks for must have been the only one heard before media
goes there: three packets of speech. Less, and a copied packet that overtakes its original by a
jitter burst would turn the call away; more is silence that the caller hears."""

UNCHECKED_S_MAX = 10.0
"""How long SRTP alone speaks for an address. Clients check every 2.5 s (browsers) to 6 s (RFC 7675
section 5.1), so that one check may be lost; an impostor who holds out so long has had seconds of a
call that he cannot decrypt."""

UNCHECKED_MAX = 2
"""Such addresses at a time: a NAT gives one, a second rebinding another."""

EXPIRED_MAX = 8
"""Remembered addresses that SRTP spoke for in vain: their time does not begin again."""

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


class _Pair(NamedTuple):
    """What goes with a ufrag of ours."""

    password: bytes
    """Ours."""
    paths: paths.Paths
    """Those that the client has checked with it."""


class _Unchecked(NamedTuple):
    """What is known of an address that SRTP alone speaks for."""

    learned_at: float
    alone_since: float
    """Its first packet since the active address showed itself last."""


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
    """To send back on the path that the check came by; empty for nothing, and if it is held."""
    forgotten: bytes | None = None
    """The key (frame.key) of an address that had to make room, if any."""


class Agent:
    """One session's ICE: credentials, the client's addresses, the one in use, signs of life."""

    def __init__(
        self, ufrag: bytes, password: bytes, client: tuple[bytes, bytes], holds: bool = False
    ) -> None:
        """Answer to this ufrag and password; `client` has those that the client answers to.

        `holds`: the first answers wait until the client has checked a second site, or `due_at`.
        """
        both = _Pair(password, paths.Paths((ufrag, password), client))
        self._credentials: dict[bytes, _Pair] = {ufrag: both}  # the oldest first
        self._used = ufrag  # of these, by the last check
        self._heard: dict[bytes, float] = {}  # verified addresses by key: when last heard
        self._unchecked: dict[bytes, _Unchecked] = {}  # addresses that SRTP alone speaks for
        self._expired: dict[bytes, None] = {}  # those whose check never came, oldest first
        self._transactions: dict[bytes, bytes] = {}  # transaction id: key of its address
        self._alive_at = -math.inf  # when the active address last showed that it is in use
        self._home: Path | None = None  # the last active path that a check has verified
        self._hold = hold.Hold() if holds else None  # until what it held has left
        self.active: Path | None = None
        """Where media goes; None until the first authenticated check."""
        self.heard_at: float | None = None
        """When the last authenticated packet came, from any address."""

    @property
    def keys(self) -> list[bytes]:
        """The keys (frame.key) of all addresses, whether verified or known by SRTP alone."""
        return [*self._heard, *self._unchecked]

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
        pair = self._credentials.get(request.ufrag)
        if pair is None:
            return Checked(Verdict.UNKNOWN_UFRAG)
        password = pair.password
        if not stun.check_integrity(datagram, request, password):
            return Checked(Verdict.FORGED)
        key, new = frame.key(header), request.transaction_id not in self._transactions
        if self._transactions.setdefault(request.transaction_id, key) != key:
            return Checked(Verdict.REPLAYED)
        if len(self._transactions) > TRANSACTIONS_MAX:
            del self._transactions[next(iter(self._transactions))]
        if request.controlled is not None:
            conflict = stun.error(request.transaction_id, _ROLE_CONFLICT, "Role Conflict", password)
            return Checked(Verdict.CONFLICT, conflict)
        self._used = request.ufrag
        self._unchecked.pop(key, None)
        self._expired.pop(key, None)
        path = Path(header, relay)
        if new:  # else another relay than the client's may have been made to bring it
            pair.paths.checked(path, now)
            self._outdate(request.ufrag)
        if self._moves(path, request.use_candidate, now):
            self._use(path, now)
        self._heard[key] = self.heard_at = now
        host, port = frame.client(header)
        success = stun.success(request.transaction_id, host, port, password)
        if self._hold is not None:
            self._hold.keep(path, success, new, now)
            success = b""
        return Checked(Verdict.ANSWERED, success, self._make_room(key))

    @property
    def due_at(self) -> float | None:
        """When answers that are held leave at the latest; None if none are."""
        return None if self._hold is None else self._hold.due_at

    def due(self, now: float) -> list[tuple[Path, bytes]]:
        """Answers that were held and leave now, and where to send each: after each check, and at
        `due_at`."""
        if self._hold is None:
            return []
        held = self._hold.due(now)
        if self._hold.over:
            self._hold = None
        return held

    def media(self, header: bytes, relay: Sockaddr, now: float) -> None:
        """Note media or data that authenticated: a sign of life, and it shows where the client is.

        An unknown address gets nothing; `learn` makes it known.
        """
        self.heard_at = now
        key = frame.key(header)
        if key in self._heard:
            self._heard[key] = now
        elif not self._follows(key, now):
            return
        active = self.active
        if active is None or active.header != header or active.relay != relay:
            self._use(Path(header, relay), now)
        else:
            self._alive_at = now

    def learn(self, key: bytes, now: float) -> bytes | None:
        """Note that SRTP from an unknown address has authenticated; the key that makes room.

        Nothing is sent there before `media` has followed it. An address whose time is up is not
        learned again.
        """
        if key in self._heard or key in self._unchecked or key in self._expired:
            return None
        self._unchecked[key] = _Unchecked(now, now)
        if len(self._unchecked) <= UNCHECKED_MAX:
            return None
        used = None if self.active is None else frame.key(self.active.header)
        oldest = next(each for each in self._unchecked if each != used)
        del self._unchecked[oldest]
        return oldest

    def knows(self, key: bytes) -> bool:
        """True for an address that a check has verified, or SRTP for now."""
        return key in self._heard or key in self._unchecked

    def converses(self, header: bytes) -> bool:
        """True for an address whose DTLS is to be taken: a verified one, or the one in use.

        DTLS shows only later whether it is genuine, and room for it is short.
        """
        active = self.active
        if active is not None and active.header == header:
            return True
        return frame.key(header) in self._heard

    def copied(self, header: bytes, relay: Sockaddr, now: float) -> None:
        """Note SRTP that has come before: its copy was faster, or it was recorded.

        Where the original comes from somebody is alive, so that nobody else is followed; if
        somebody was, the session returns. A forged source can do no more than that: the client's
        next check sets it right.
        """
        active = self.active
        if active is None:
            return
        if active.header == header:
            self._alive_at = now
        elif frame.key(active.header) in self._unchecked and frame.key(header) in self._heard:
            self._use(Path(header, relay), now)

    def sweep(self, now: float) -> list[bytes]:
        """Give up addresses whose check never came; their keys. Once a second."""
        gone = [
            key for key, each in self._unchecked.items() if now - each.learned_at >= UNCHECKED_S_MAX
        ]
        for key in gone:
            del self._unchecked[key]
            self._expired[key] = None
            if len(self._expired) > EXPIRED_MAX:
                del self._expired[next(iter(self._expired))]
            if self.active is not None and frame.key(self.active.header) == key:
                home = self._home
                known = home is not None and frame.key(home.header) in self._heard
                self.active = home if known else None
        return gone

    def requests(self, now: float) -> list[tuple[Path, bytes]]:
        """Our own checks, and where to send each. Once a second; most seconds there are none."""
        return [each for pair in self._credentials.values() for each in pair.paths.due(now)]

    def answered(
        self, datagram: bytes, answer: stun.Answer, header: bytes, relay: Sockaddr, now: float
    ) -> paths.Reply:
        """Judge what came back for one: a sign of life, which moves nothing."""
        reply = paths.Reply.UNASKED
        for pair in self._credentials.values():
            reply = pair.paths.answered(datagram, answer, Path(header, relay), now)
            if reply is not paths.Reply.UNASKED:
                break
        if reply is paths.Reply.ALIVE:
            self.heard_at = now
        return reply

    def restart(self, ufrag: bytes, password: bytes, client: tuple[bytes, bytes]) -> bytes | None:
        """Accept new credentials beside those in use (ICE restart); the ufrag that goes, if any.

        Addresses stay as they are until the client checks with the new pair: DTLS and SRTP do not
        notice (RFC 8445 section 9). So do paths.
        """
        self._credentials[ufrag] = _Pair(password, paths.Paths((ufrag, password), client))
        if len(self._credentials) <= CREDENTIALS_MAX:
            return None
        unused = next(each for each in self._credentials if each not in (self._used, ufrag))
        del self._credentials[unused]
        return unused

    def forget(self, key: bytes) -> None:
        """Give up an address that another session has proved to own now."""
        self._heard.pop(key, None)
        self._unpath(key)
        self._unchecked.pop(key, None)
        if self.active is not None and frame.key(self.active.header) == key:
            self.active = None

    def quiet_s(self, key: bytes, now: float) -> float | None:
        """Seconds since an authenticated packet came from a verified address; None for others."""
        heard_at = self._heard.get(key)
        return None if heard_at is None else now - heard_at

    def _use(self, path: Path, now: float) -> None:
        self.active, self._alive_at = path, now
        if frame.key(path.header) not in self._unchecked:
            self._home = path

    def _follows(self, key: bytes, now: float) -> bool:
        """True if media belongs at an address that only SRTP speaks for, since just that came."""
        found = self._unchecked.get(key)
        if found is None:
            return False
        if self.active is not None and frame.key(self.active.header) == key:
            return True
        if found.alone_since <= self._alive_at:
            self._unchecked[key] = found._replace(alone_since=now)
            return False
        return now - found.alone_since >= FOLLOWED_S

    def _moves(self, path: Path, use_candidate: bool, now: float) -> bool:
        """True if media belongs on `path` after an authenticated check came by it."""
        if self.active is None or use_candidate or path == self.active:
            return True
        quiet_s = self.quiet_s(frame.key(self.active.header), now)
        return quiet_s is None or quiet_s >= SILENT_S

    def _make_room(self, key: bytes) -> bytes | None:
        """Forget the longest silent address if there is one too many: not `key`, not the active."""
        if len(self._heard) <= ADDRESSES_MAX:
            return None
        keep = {key} if self.active is None else {key, frame.key(self.active.header)}
        oldest = min(self._heard.keys() - keep, key=self._heard.__getitem__)
        del self._heard[oldest]
        self._unpath(oldest)
        return oldest

    def _unpath(self, key: bytes) -> None:
        for pair in self._credentials.values():
            pair.paths.forget(key)

    def _outdate(self, ufrag: bytes) -> None:
        """Forget the paths of older credentials than these: the client checks with them no more."""
        for each, pair in self._credentials.items():
            if each == ufrag:
                return
            pair.paths.clear()


class Flight:
    """The last DTLS flight we sent, to be sent again until the client answers it.

    OpenSSL's timer starts at a second and pyOpenSSL cannot set it, so a lost flight would hold up
    the call that long. Duplicates are harmless: DTLS drops them (RFC 6347 section 4.1.2.6).
    """

    def __init__(self) -> None:
        self._datagrams: list[bytes] = []
        self._answered = True
        self._resends = 0
        self._sent_at = 0.0
        self.round_trip_s: float | None = None
        """By the last flight that was answered before it was sent again; None until then."""
        self.wakes_at: float | None = None
        """When `due` has something to send; None while nothing waits for an answer."""

    def sent(self, datagram: bytes, now: float) -> None:
        """Note a DTLS datagram as it leaves: the first one after `answered` begins a new flight."""
        if self._answered:
            self._datagrams.clear()
            self._answered = False
            self._resends = 0
            self._sent_at = now
            self.wakes_at = now + RESEND_S
        if len(self._datagrams) < FLIGHT_DATAGRAMS_MAX:
            self._datagrams.append(datagram)

    def answered(self, now: float) -> None:
        """Note that DTLS came from the client: what we send next is a new flight.

        The old one goes on being sent until then, for the answer may be a part, or an old one.
        """
        if not self._answered and not self._resends:
            self.round_trip_s = now - self._sent_at
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
