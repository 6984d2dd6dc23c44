"""Many sessions on one UDP socket: which session does a datagram belong to?

What it owns: the media socket, and the maps from ufrag, from client address and from SSRC to
session.

A datagram's life reads downward in `Mux._receive`: relay, frame, class; then STUN finds its session
by ufrag and everything else by the client's address, which an authenticated check sets. SRTP from
an address that nobody knows finds it by the SSRC: a NAT has given a client another port, and its
next check is up to 2.5 s away. The SSRC is only a guess, so that the session must authenticate it.

Rules that stay true:
- Frames from outside the relays' prefixes are dropped unread, and MESSAGE-INTEGRITY holds before
  anything of a check has an effect.
- Every datagram received ends in one counter (metrics.Transceiver): FORWARDED or a DROPPED_*.
- Total over any octets from a relay: nothing escapes to the event loop, and what one client sends
  ends its own session at the worst.
- Guesses cost a bounded time: so many a second may fail, of a stream and of all.
- No task and no queue for media: what the reader's callback reads is handled before it returns.
- One timer for the answers of all sessions that are held (hold.py).

It does not decrypt (`peer.py` does) and does not know what a session is for (`session.py` does).

RFC 7983 https://www.rfc-editor.org/rfc/rfc7983 (telling the classes apart).
"""

import asyncio
import datetime
import logging
import socket
from collections.abc import Callable
from functools import lru_cache

import endpoints
import frame
import ice
import ledger
import metrics
import paths
import sdp
import stun
from dtls import Certificate
from peer import DATAGRAM_OCTETS_MAX, Allowance, Handler, Peer

Count = metrics.Transceiver

BATCH_SIZE = 8
"""Datagrams read in one turn of the event loop, some 60 us each: more would hold up the pacer, and
fewer pay the loop's own cost (some 20 us) more often."""

ADDRESS_HELD_S = 1.0
"""How long an address stays with the session that authenticated there last. Less, and someone with
a session of his own could take a caller's address by forging it as his source; more, and a client
that reuses its port waits longer."""

SHARERS_MAX = 4
"""Sessions that are tried for one SSRC, those that had it first. SSRCs are drawn from 2^32, so two
sessions share one only if somebody picked it on purpose; who comes later displaces nobody."""

FAILURES_PER_S_MAX, STREAM_FAILURES_PER_S_MAX = 1_000, 100
"""SRTP from unknown addresses that may fail to authenticate: of all, and of one SSRC. A failure
costs 10 us, so a flood with the SSRCs of live calls takes 1 % of a CPU. Whoever is flooded moves
with his next check instead."""

CERTIFICATE_RENEWED_BEFORE = datetime.timedelta(days=7)
"""Certificates last 30 days (aiortc); a session that starts lives for hours at the most."""

log = logging.getLogger("mux")


class _Stream:
    """The sessions that have sent SRTP of one SSRC."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.failures = Allowance(STREAM_FAILURES_PER_S_MAX)


class Mux:
    """The media socket and the sessions on it."""

    def __init__(
        self,
        sock: socket.socket,
        trusts: Callable[[str], bool],
        counters: ledger.Counters,
        clock: Callable[[], float],
    ) -> None:
        """Serve a bound, non-blocking UDP socket from the running event loop, and own it.

        `trusts` says whether a host is a relay's; `clock` is monotonic seconds.
        """
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self._socket = sock
        # Relays are few, forged sources are not: bounded.
        self._trusts = lru_cache(maxsize=1024)(trusts)
        self._values = counters.values
        self._by_ufrag: dict[bytes, Peer] = {}
        self._by_client: dict[bytes, Peer] = {}
        self._by_ssrc: dict[bytes, _Stream] = {}
        self._failures = Allowance(FAILURES_PER_S_MAX)
        self._holding: dict[Peer, None] = {}  # those with answers that are held
        self._release: asyncio.TimerHandle | None = None
        self._certificate = Certificate.generateCertificate()
        self.loop.add_reader(sock.fileno(), self._readable)

    @property
    def certificate(self) -> Certificate:
        """The certificate for a session that begins now."""
        now = datetime.datetime.now(tz=datetime.UTC)
        if now > self._certificate.expires - CERTIFICATE_RENEWED_BEFORE:
            self._certificate = Certificate.generateCertificate()
        return self._certificate

    def knows(self, ufrag: str) -> bool:
        """True if a session answers under this name."""
        return ufrag.encode() in self._by_ufrag

    def open(
        self,
        offer: sdp.Offer,
        ufrag: str,
        password: bytes,
        handler: Handler,
        holds: bool = False,
    ) -> "Peer":
        """Begin to answer the checks of a session; `holds` as in ice.Agent."""
        client = offer.ufrag.encode(), offer.password.encode()
        agent = ice.Agent(ufrag.encode(), password, client, holds)
        peer = Peer(self, offer, self.certificate, agent, handler)
        self._by_ufrag[ufrag.encode()] = peer
        return peer

    def restart(self, peer: "Peer", ufrag: str, password: bytes, client: tuple[str, str]) -> None:
        """Answer a session's checks under new credentials too (ICE restart); media goes on.

        `client` has the client's new ufrag and password.
        """
        name, secret = client
        theirs = name.encode(), secret.encode()
        forgotten = peer.agent.restart(ufrag.encode(), password, theirs)
        self._by_ufrag[ufrag.encode()] = peer
        if forgotten is not None:
            self._by_ufrag.pop(forgotten, None)

    def forget(self, peer: "Peer") -> None:
        """Let go of a session: its datagrams belong to nobody from here on."""
        self._holding.pop(peer, None)
        for ufrag in peer.agent.ufrags:
            self._by_ufrag.pop(ufrag, None)
        self.unlearn(peer, peer.agent.keys)
        for ssrc in peer.ssrcs:
            stream = self._by_ssrc.get(ssrc)
            if stream is not None and peer in stream.peers:
                stream.peers.remove(peer)
                if not stream.peers:
                    del self._by_ssrc[ssrc]

    def sounds(self, peer: "Peer", ssrc: bytes) -> None:
        """Note that a stream of this session's has authenticated for the first time."""
        stream = self._by_ssrc.setdefault(ssrc, _Stream())
        if len(stream.peers) < SHARERS_MAX:
            stream.peers.append(peer)

    def unlearn(self, peer: "Peer", keys: list[bytes]) -> None:
        """Let go of client addresses of a session."""
        for key in keys:
            if self._by_client.get(key) is peer:
                del self._by_client[key]

    def tend(self, peer: "Peer", now: float) -> None:
        """Give up a session's addresses that no check has come from, keep its paths alive."""
        self.unlearn(peer, peer.agent.sweep(now))
        for path, request in peer.agent.requests(now):
            self.send(path.header, request, path.relay)
            self._values[Count.CHECKS_SENT] += 1

    def close(self) -> None:
        """Close the socket. Close the sessions first: their goodbyes go through it."""
        self._holding.clear()
        if self._release is not None:
            self._release.cancel()
            self._release = None
        self.loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def send(self, header: bytes, payload: bytes, relay: ice.Sockaddr) -> None:
        """Send a datagram to a client by its relay. What the kernel refuses is lost and counted."""
        try:
            self._socket.sendto(header + payload, relay)
        except OSError:
            self._values[Count.SEND_FAILED] += 1
        else:
            self._values[Count.SENT] += 1

    def _readable(self) -> None:
        values, receive, clock = self._values, self._socket.recvfrom, self.clock
        for _ in range(BATCH_SIZE):
            try:
                datagram, relay = receive(frame.HEADER_OCTETS + DATAGRAM_OCTETS_MAX + 1)
            except OSError:  # nothing more for now, or an ICMP error of something sent: recv(2)
                return
            values[Count.RECEIVED] += 1
            try:
                outcome = self._receive(datagram, relay, clock())
            except Exception:
                outcome = Count.DROPPED_FAULT
                self._fault(datagram)
            values[outcome] += 1

    def _receive(self, datagram: bytes, relay: ice.Sockaddr, now: float) -> Count:
        """One datagram, from the socket to its session: what became of it."""
        if not self._trusts(relay[0]):
            return Count.DROPPED_NOT_RELAY
        if not frame.is_frame(datagram) or len(datagram) == frame.HEADER_OCTETS:
            return Count.DROPPED_BAD_FRAME
        if len(datagram) > frame.HEADER_OCTETS + DATAGRAM_OCTETS_MAX:
            return Count.DROPPED_OVERSIZED
        header, payload = datagram[: frame.HEADER_OCTETS], datagram[frame.HEADER_OCTETS :]
        kind = stun.KINDS[payload[0]]
        if kind == stun.Kind.STUN:
            return self._check(payload, header, relay, now)
        if kind not in (stun.Kind.RTP, stun.Kind.DTLS):
            return Count.DROPPED_UNKNOWN_KIND
        peer = self._by_client.get(frame.key(header))
        if kind == stun.Kind.RTP:
            if peer is None:
                return self._guess(payload, header, relay, now)
            return peer.receive_srtp(payload, header, relay, now)
        if peer is None:
            return Count.DROPPED_UNKNOWN_CLIENT
        return peer.receive_dtls(payload, header, relay)

    def _guess(self, payload: bytes, header: bytes, relay: ice.Sockaddr, now: float) -> Count:
        """SRTP from an unknown address: to the session of its SSRC, if that authenticates it."""
        stream = self._by_ssrc.get(payload[4:8] if stun.is_rtcp(payload) else payload[8:12])
        if stream is None:
            return Count.DROPPED_UNKNOWN_CLIENT
        if not (stream.failures.left(now) and self._failures.left(now)):
            return Count.DROPPED_GUESS_LIMIT
        for peer in stream.peers:
            if peer.receive_srtp(payload, header, relay, now) is Count.FORWARDED:
                self._learn(peer, frame.key(header), now)
                return Count.FORWARDED
        stream.failures.take()
        self._failures.take()
        return Count.DROPPED_BAD_SRTP

    def _learn(self, peer: "Peer", key: bytes, now: float) -> None:
        """Deliver what comes from this address to that session, if its agent has room for it."""
        forgotten = peer.agent.learn(key, now)
        if forgotten is not None:
            self.unlearn(peer, [forgotten])
        if peer.agent.knows(key):
            self._by_client[key] = peer
            self._values[Count.ADDRESSES_LEARNED] += 1

    def _check(self, payload: bytes, header: bytes, relay: ice.Sockaddr, now: float) -> Count:
        request = stun.read_request(payload)
        if request is stun.Malformed.NOT_REQUEST:
            return self._answer(payload, header, relay, now)
        if isinstance(request, stun.Malformed):
            return Count.DROPPED_STUN_MALFORMED
        peer = self._by_ufrag.get(request.ufrag)
        if peer is None:
            return Count.DROPPED_UNKNOWN_SESSION
        key = frame.key(header)
        holder = self._by_client.get(key, peer)
        if holder is not peer:
            # An address that SRTP alone speaks for holds against nobody: its source may be forged.
            quiet_s = holder.agent.quiet_s(key, now)
            if quiet_s is not None and quiet_s < ADDRESS_HELD_S:
                return Count.DROPPED_ADDRESS_HELD
        checked = peer.agent.check(payload, request, header, relay, now)
        if checked.response:
            self.send(header, checked.response, relay)
        elif peer.agent.due_at is not None:
            self._hold(peer, now)
        if checked.verdict is not ice.Verdict.ANSWERED:
            return _VERDICTS[checked.verdict]
        if holder is not peer:
            holder.agent.forget(key)
        self._by_client[key] = peer
        if checked.forgotten is not None:
            self._by_client.pop(checked.forgotten, None)
        if peer not in self._holding:  # else Chromium would lose our first flight, and 100 ms
            peer.checked()
        return Count.FORWARDED

    def _hold(self, peer: "Peer", now: float) -> None:
        """Send what a session holds no longer, and wake when the rest is due."""
        for path, response in peer.agent.due(now):
            self.send(path.header, response, path.relay)
        due_at = peer.agent.due_at
        if due_at is None:
            self._holding.pop(peer, None)
            peer.checked()
            return
        self._holding[peer] = None
        if self._release is None:
            delay_s = max(0.0, due_at - now)
            self._release = self.loop.call_later(delay_s, self._released)

    def _released(self) -> None:
        """Let go what is due; the timer is set again for the earliest of the rest."""
        self._release, now = None, self.clock()
        for peer in sorted(self._holding, key=lambda each: each.agent.due_at or now):
            self._hold(peer, now)

    def _answer(self, payload: bytes, header: bytes, relay: ice.Sockaddr, now: float) -> Count:
        """What may be an answer to a check of ours."""
        answer = stun.read_answer(payload)
        if answer is None:
            return Count.DROPPED_STUN_MALFORMED
        peer = self._by_client.get(frame.key(header))
        if peer is None:
            return Count.DROPPED_UNKNOWN_CLIENT
        reply = peer.agent.answered(payload, answer, header, relay, now)
        if reply is paths.Reply.ALIVE:
            self._values[Count.CHECKS_ANSWERED] += 1
        elif reply is paths.Reply.REFUSED:
            self._values[Count.CHECKS_REFUSED] += 1
        return _REPLIES[reply]

    def _fault(self, datagram: bytes) -> None:
        """A mistake of ours, met by this datagram: say so once, and end the session that it hit."""
        log.exception("a datagram of %d octets met a fault", len(datagram))
        peer = self._by_client.get(frame.key(datagram))
        if peer is not None:
            self.forget(peer)
            peer.end("a fault in the server")


_VERDICTS = {
    ice.Verdict.CONFLICT: Count.FORWARDED,
    ice.Verdict.UNKNOWN_UFRAG: Count.DROPPED_UNKNOWN_SESSION,
    ice.Verdict.FORGED: Count.DROPPED_BAD_INTEGRITY,
    ice.Verdict.REPLAYED: Count.DROPPED_STUN_REPLAYED,
}

_REPLIES = {
    paths.Reply.ALIVE: Count.FORWARDED,
    paths.Reply.REFUSED: Count.FORWARDED,
    paths.Reply.UNASKED: Count.DROPPED_STUN_UNASKED,
    paths.Reply.FORGED: Count.DROPPED_BAD_INTEGRITY,
}


def media_socket(at: endpoints.Endpoint, receive_buffer_octets: int) -> socket.socket:
    """The bound, non-blocking UDP socket. Raises OSError."""
    family = socket.AF_INET6 if at.address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        # socket(7): the kernel gives at most net.core.rmem_max without privileges.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_octets)
        sock.bind((at.host, at.port))
    except OSError:
        sock.close()
        raise
    return sock
