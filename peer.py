"""One client's encrypted transport: DTLS, SRTP and the data channel, by aiortc and libsrtp.

What it owns: the handshake, the keys, the SCTP association, and the session's ICE agent. What of
aiortc it leans on without being invited is listed at `Peer`.

Rules that stay true:
- SRTP is handled in the callback that read it: no queue, no task, no copy beyond slicing. Only
  DTLS (the handshake and the data channel) passes through aiortc's coroutine, a session has one.
- DTLS begins with the first answer to an authenticated check. What it sends goes where the agent
  says.
- What has authenticated shows where the client is: SRTP, and a data channel's packet. A DTLS record
  that has only arrived shows nothing.
- Media flows as soon as there are keys, which is before the client's Finished has come back: a
  round trip less for the first sound, and no second of silence if that flight is lost.
- SRTP that comes before its keys is kept, up to a second, and handled as soon as they are there.
- Everything that the client can make grow has a limit here or in `association.py`, because aiortc
  has none; so has the time that its data channel may take from the other sessions.
- When the transport ends by itself the handler hears it once; `close` frees everything.

It does not know what RTP carries, what the messages mean, or how long a session may last.

RFC 5764 https://www.rfc-editor.org/rfc/rfc5764 (DTLS-SRTP), RFC 7918
https://www.rfc-editor.org/rfc/rfc7918 (sending before the other's Finished), RFC 8831
https://www.rfc-editor.org/rfc/rfc8831 (data channels).
"""

import asyncio
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import pylibsrtp
from aiortc.rtcdatachannel import RTCDataChannel
from aiortc.rtcdtlstransport import RTCDtlsFingerprint, RTCDtlsParameters, RTCDtlsTransport

import carrier
import dtls
import ice
import metrics
import sdp
import stun
from association import Association

Count = metrics.Transceiver

DATAGRAM_OCTETS_MAX = 1500
"""Largest datagram of a client: libsrtp's buffer behind pylibsrtp has this size, WebRTC stays under
1,200."""

INBOX_DATAGRAMS_MAX = 128
"""DTLS datagrams that wait for their session's coroutine: a whole SCTP window of 131 kB. What does
not fit is lost, as on any full link, and SCTP sends it again."""

EARLY_DATAGRAMS_MAX = 50
"""SRTP kept until its keys are there: one second of speech. With DTLS 1.2 the client has them no
sooner than we; with 1.3, or as the DTLS client, it may speak first."""

SSRCS_MAX = 16
"""Streams that a client may send. libsrtp keeps each for ever, in a list that it walks a packet;
clients send one or two, and a new one when they change their microphone."""

DATA_CPU_SHARE, DATA_CPU_BURST_S = 0.1, 0.2
"""Processor time that a session's data channel may take: a tenth of what passes, and so much at
once. A message of the largest size costs 30 ms; a client that floods waits, the others do not."""

HANDSHAKE_RECORDS_PER_S_MAX = 100
"""DTLS records taken while the handshake lasts. It needs ten, twice that with losses; each costs
0.2 ms, since aiortc waits for it with a timeout."""

FINISH_S_MAX = 15.0
"""How long media may flow before the handshake is finished. A lost flight costs OpenSSL a second,
the second loss two; who takes longer never finishes."""

_REPLAYS = (
    "replay check failed (bad index)",
    "replay check failed (index too old)",
)  # of pylibsrtp

log = logging.getLogger("peer")


class Handler(Protocol):
    """What a session does with what arrives. All are called in the event loop's thread."""

    def connected(self, now: float) -> None:
        """There are keys: `Peer.send_rtp` works from here on."""

    def rtp(self, packet: bytes, now: float) -> None:
        """An authenticated RTP packet, in the callback that read it from the socket."""

    def rtcp(self, packet: bytes, now: float) -> None:
        """An authenticated compound RTCP packet."""

    def opened(self, now: float) -> None:
        """A data channel carries the events: `Peer.send_message` works from here on, and
        `Peer.carrier` knows its label. Again if another one has taken over."""

    def message(self, message: str | bytes, now: float) -> None:
        """A message on that data channel."""

    def lost(self, reason: str) -> None:
        """The transport has ended by itself; `Peer.close` is still to be called. At most once."""


class Wire(Protocol):
    """What a peer needs of the socket it shares (mux.Mux)."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]

    def send(self, header: bytes, payload: bytes, relay: ice.Sockaddr) -> None:
        """Send a datagram to a client by its relay."""

    def restart(self, peer: "Peer", ufrag: str, password: bytes, client: tuple[str, str]) -> None:
        """Answer a session's checks under new credentials too."""

    def sounds(self, peer: "Peer", ssrc: bytes) -> None:
        """Note a stream that has authenticated: it may show up from another address."""

    def tend(self, peer: "Peer", now: float) -> None:
        """Let a second pass for the peer's agent."""

    def forget(self, peer: "Peer") -> None:
        """Deliver nothing more to this peer."""


class Allowance:
    """So many of something a second."""

    def __init__(self, per_s: int) -> None:
        self._per_s = self._left = per_s
        self._renewed_at = -math.inf

    def left(self, now: float) -> bool:
        """True if there may be another."""
        if now - self._renewed_at >= 1.0:
            self._renewed_at, self._left = now, self._per_s
        return self._left > 0

    def take(self, count: int = 1) -> None:
        """There were so many."""
        self._left -= count


class Peer:
    """One client: its ICE agent, DTLS, SRTP and data channel.

    Towards aiortc it plays the RTCIceTransport: `role`, `_recv` and `_send` are all that
    RTCDtlsTransport asks of it. Private names used in return, stable since 2019 and pinned by the
    version: `_set_role`, `_ssl`, `_validate_peer_identity`, `_setup_srtp`, `_rx_srtp`, `_tx_srtp`
    of RTCDtlsTransport.
    """

    role = "controlled"

    def __init__(
        self,
        wire: Wire,
        offer: sdp.Offer,
        certificate: dtls.Certificate,
        agent: ice.Agent,
        handler: Handler,
    ) -> None:
        self.agent = agent
        self.certificate = certificate
        self.checked_at: float | None = None
        """When the first authenticated check came; None until then."""
        self._wire, self._offer = wire, offer
        self._expected = RTCDtlsParameters([RTCDtlsFingerprint("sha-256", offer.fingerprint)])
        self._handler: Handler | None = handler
        self._dtls: RTCDtlsTransport | None = None  # made by the first check, not by the offer
        self._sctp: Association | None = None
        self.carrier = carrier.Carrier()
        self._patience: asyncio.TimerHandle | None = None
        self._receiving: Any = None  # pylibsrtp's sessions
        self._sending: Any = None
        self._task: asyncio.Task[None] | None = None
        self._inbox: deque[tuple[bytes, bytes, ice.Sockaddr]] = deque()
        self._active: ice.Path | None = None  # the agent's, when it was last looked at
        self._path: tuple[bytes, ice.Sockaddr] | None = None  # of the record that aiortc has
        self._handed_at: float | None = None  # the process's CPU time when aiortc got it
        self._credit_s = DATA_CPU_BURST_S
        self._credited_at = wire.clock()
        self._waiter: asyncio.Future[None] | None = None
        self.ssrcs: set[bytes] = set()
        """Of the streams that have authenticated."""
        self._early: deque[tuple[bytes, bytes, ice.Sockaddr]] = deque()
        self._handshake_records = Allowance(HANDSHAKE_RECORDS_PER_S_MAX)
        self._finished = False  # the handshake, on both sides
        self._spoken_at: float | None = None  # when there were keys
        self._flight = ice.Flight()
        self._resending: asyncio.TimerHandle | None = None
        self._closed = False

    # --- from the socket ------------------------------------------------------------------------

    def checked(self) -> None:
        """Note an authenticated check: the first one completes ICE, and DTLS begins."""
        if self._task is None and not self._closed:
            self.checked_at = self._wire.clock()
            self._task = self._wire.loop.create_task(self._connect())
        if self.agent.active is not self._active:
            self._moved()

    def receive_srtp(self, payload: bytes, header: bytes, relay: ice.Sockaddr, now: float) -> Count:
        """SRTP or SRTCP from one of the client's addresses, to the handler if it authenticates."""
        if self._receiving is None:
            if len(self._early) >= EARLY_DATAGRAMS_MAX:
                return Count.DROPPED_EARLY
            self._early.append((payload, header, relay))
            return Count.FORWARDED
        rtcp = stun.is_rtcp(payload)
        try:
            if rtcp:
                packet = self._receiving.unprotect_rtcp(payload)
            else:
                packet = self._receiving.unprotect(payload)
        except pylibsrtp.Error as error:
            if str(error) in _REPLAYS:
                self.agent.copied(header, relay, now)
            return Count.DROPPED_BAD_SRTP
        ssrc = packet[4:8] if rtcp else packet[8:12]
        if ssrc not in self.ssrcs:
            self.ssrcs.add(ssrc)
            self._wire.sounds(self, ssrc)
            if len(self.ssrcs) > SSRCS_MAX:
                self.end("the client sends too many streams")
        self.agent.media(header, relay, now)
        if self.agent.active is not self._active:
            self._moved()
        if self._flight.wakes_at is not None:
            self._flight.done()
        if self._handler is not None:
            (self._handler.rtcp if rtcp else self._handler.rtp)(packet, now)
        return Count.FORWARDED

    def receive_dtls(self, payload: bytes, header: bytes, relay: ice.Sockaddr) -> Count:
        """A DTLS datagram, for aiortc's coroutine."""
        if not self.agent.converses(header):
            return Count.DROPPED_UNKNOWN_CLIENT
        records, now = dtls.records(payload), self._wire.clock()
        if len(self._inbox) + len(records) > INBOX_DATAGRAMS_MAX:
            return Count.DROPPED_BACKLOG
        if not (self._finished or self._handshake_records.left(now)):
            return Count.DROPPED_BACKLOG
        self._inbox.extend((record, header, relay) for record in records)
        if not self._finished:
            self._handshake_records.take(len(records))
        self._flight.answered(now)
        if self._finished:
            self._flight.done()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return Count.FORWARDED

    # --- to the client --------------------------------------------------------------------------

    def send_rtp(self, packet: bytes) -> None:
        """Protect and send an RTP packet. Before `connected` and after `close` it is lost."""
        active = self.agent.active
        if self._sending is not None and active is not None:
            self._wire.send(active.header, self._sending.protect(packet), active.relay)

    def send_rtcp(self, packet: bytes) -> None:
        """The same for a compound RTCP packet."""
        active = self.agent.active
        if self._sending is not None and active is not None:
            self._wire.send(active.header, self._sending.protect_rtcp(packet), active.relay)

    def send_message(self, message: str) -> None:
        """Send text on the data channel that carries the events, if one does."""
        self.carrier.send(message)

    @property
    def backlog_octets(self) -> int:
        """Octets of messages that the client has not taken yet."""
        return self.carrier.backlog_octets

    # --- life -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """DTLS, then SCTP. Runs once, and ends when both have started."""
        try:
            await self._handshake()
        except Exception as error:  # whatever a peer's certificate or SCTP can provoke in there
            log.info("set-up failed: %s", error)
            self.end("the set-up failed")

    async def _handshake(self) -> None:
        offer = self._offer
        transport = self._dtls = RTCDtlsTransport(self, [self.certificate])  # type: ignore[arg-type]  # see the docstring
        transport._set_role("client" if offer.active else "server")
        await transport.start(self._expected)
        if transport.state != "connected":
            raise ConnectionError("the DTLS handshake failed")
        self._finished = True
        if offer.active:  # else our last flight is still on its way
            self._flight.done()
        transport.on("statechange", self._changed)
        if self._sending is None:
            self._speak(transport)
        if offer.application is not None:
            round_trip_s = self._flight.round_trip_s
            self._sctp = Association(transport, self._channel, self._authenticated, round_trip_s)
            await self._sctp.begin(offer)

    def _hasten(self, transport: RTCDtlsTransport, sent: bytes) -> None:
        """Begin to speak if our Finished was in what was `sent`: the keys are there.

        The client has signed its half of the key exchange, with the certificate that the offer
        names; its Finished would only add that nobody has tampered with the choice among what we
        offer, all of which is strong (RFC 7918 section 5). Raises ConnectionError for another
        certificate.
        """
        ssl = transport._ssl
        if ssl is None or not dtls.finishes(sent) or ssl.get_peer_certificate() is None:
            return
        if ssl.get_protocol_version_name() != "DTLSv1.2":
            return
        transport._validate_peer_identity(self._expected)
        if transport.state == "connecting":
            transport._setup_srtp()
        if transport.state != "connecting":
            raise ConnectionError("the DTLS handshake failed")
        self._speak(transport)

    def _speak(self, transport: RTCDtlsTransport) -> None:
        """Take the keys: from here on media goes both ways, what has been kept first."""
        self._receiving, self._sending = transport._rx_srtp, transport._tx_srtp
        self._spoken_at = now = self._wire.clock()
        if self._handler is not None:
            self._handler.connected(now)
        while self._early:
            payload, header, relay = self._early.popleft()
            self.receive_srtp(payload, header, relay, now)

    def _channel(self, channel: RTCDataChannel) -> None:
        """A data channel that the client opened."""
        if len(self.carrier) >= carrier.CHANNELS_MAX:
            self.end("the client opened too many data channels")
            return
        channel.on("message", functools.partial(self._message, channel))
        if self.carrier.opened(channel):
            self._carried()
        elif not self.carrier.label and self._patience is None:
            self._patience = self._wire.loop.call_later(carrier.PATIENCE_S, self._waited)

    def _waited(self) -> None:
        if self.carrier.waited():
            self._carried()

    def _carried(self) -> None:
        if self._handler is not None:
            self._handler.opened(self._wire.clock())

    def _message(self, channel: RTCDataChannel, message: str | bytes) -> None:
        try:
            if self.carrier.spoken(channel):
                self._carried()
            if self._handler is not None and self.carrier.carries(channel):
                self._handler.message(message, self._wire.clock())
        except Exception:
            log.exception("a message met a fault")
            self.end("a fault in the server")

    def _authenticated(self) -> None:
        """Note that the record which aiortc has in hand held a packet of the data channel."""
        if self._path is not None:
            self.agent.media(*self._path, self._wire.clock())
            if self.agent.active is not self._active:
                self._moved()

    def _moved(self) -> None:
        """Go on at another address: what was on its way to the old one is sent again at once."""
        self._active = self.agent.active
        if self._sctp is not None:
            self._sctp.hurry()

    def _changed(self) -> None:
        if self._dtls is not None and self._dtls.state in ("closed", "failed"):
            failure = None if self._sctp is None else self._sctp.failure
            self.end(failure or "the client closed the connection")

    def restart(self, ufrag: str, password: bytes, client: tuple[str, str]) -> None:
        """Answer checks under these credentials too (ICE restart); `client` has its new ones."""
        self._wire.restart(self, ufrag, password, client)

    def sweep(self, now: float) -> None:
        """Tend the ways to the client, and give up one that does not finish its handshake."""
        began = self._spoken_at
        if began is not None and not self._finished and now - began >= FINISH_S_MAX:
            self.end("the set-up failed")
        self._wire.tend(self, now)

    def end(self, reason: str) -> None:
        """Tell the handler, once, that the transport has ended by itself."""
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.lost(reason)

    async def close(self) -> None:
        """Say goodbye (DTLS close_notify) and free everything. Closing twice is harmless."""
        if self._closed:
            return
        self._handler = None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            if self._sctp is not None:
                await self._sctp.stop()
            if self._dtls is not None:
                await self._dtls.stop()
        finally:
            self._free()

    def _free(self) -> None:
        """Let go of everything, so that it is freed here and now, not by the collector some day.

        aiortc's objects refer to this one and to each other; the task of a handshake that was
        broken off remembers where it was, and so all that its frames knew.
        """
        self._closed = True
        self._wire.forget(self)
        self._receiving = self._sending = None
        self._early.clear()
        self._inbox.clear()
        self.carrier.clear()
        for timer in (self._resending, self._patience):
            if timer is not None:
                timer.cancel()
        if self._dtls is not None:
            self._dtls.remove_all_listeners()
        self._dtls = self._sctp = self._task = self._resending = self._patience = None

    # --- what aiortc asks of its ICE transport --------------------------------------------------

    async def _recv(self) -> bytes:
        """The next DTLS datagram. Raises ConnectionError when there will be none."""
        await self._breathe()
        while not self._inbox:
            if self._closed:
                raise ConnectionError("closed")
            self._waiter = self._wire.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        record, header, relay = self._inbox.popleft()
        self._path = header, relay
        if self._finished:  # before, aiortc gives others their turn while it is at work
            self._handed_at = time.thread_time()
        return record

    async def _breathe(self) -> None:
        """Let the others have their turn if this session has had more than its share."""
        if self._handed_at is None:
            return
        now, used_s = self._wire.clock(), time.thread_time() - self._handed_at
        earned_s = (now - self._credited_at) * DATA_CPU_SHARE
        self._credit_s = min(self._credit_s + earned_s, DATA_CPU_BURST_S) - used_s
        self._credited_at, self._handed_at = now, None
        if self._credit_s < 0:
            await asyncio.sleep(-self._credit_s / DATA_CPU_SHARE)

    async def _send(self, datagram: bytes) -> None:
        """Send what DTLS made; during the handshake also keep it, to send it again."""
        active = self.agent.active
        if self._closed or active is None:
            return
        if not self._finished:
            self._flight.sent(datagram, self._wire.clock())
            self._arm()
        self._wire.send(active.header, datagram, active.relay)
        if self._sending is None and self._offer.active and self._dtls is not None:
            self._hasten(self._dtls, datagram)

    def _arm(self) -> None:
        """Set the timer that sends the last flight again."""
        wakes_at = self._flight.wakes_at
        if self._resending is not None:
            self._resending.cancel()
            self._resending = None
        if wakes_at is not None:
            delay_s = max(0.0, wakes_at - self._wire.clock())
            self._resending = self._wire.loop.call_later(delay_s, self._resend)

    def _resend(self) -> None:
        self._resending = None
        active = self.agent.active
        if active is not None and not self._closed:
            for datagram in self._flight.due(self._wire.clock()):
                self._wire.send(active.header, datagram, active.relay)
        self._arm()
