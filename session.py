"""One call: its transport, its audio both ways, its conversation and its backend, joined.

    client ── Peer ── rtp ── Receiver ──────────▶ Backend
                 ◀── Playout ◀── Conversation ◀──┘
                 ◀──▶ data channel ◀──▶ Adapter ◀──▶ Conversation

What it owns: the objects of one call and the order in which they hear of things.

Rules that stay true:
- A packet's PCM reaches the backend in the callback that read the packet. Nothing queues between.
- Whatever changes a conversation is followed by `flow`: what it has for the backend, for the
  client and for play-out leaves before the event loop turns again.
- Nothing is played before the client is connected, and nothing after a flush.
- A call passes through its states once: offered, connecting, live, closed. Each has a deadline,
  and `sweep` says when one has passed. A client knows when its call will end at the latest, is told
  again before it does, and hears why.

It knows no socket and sets no timer: `transceiver.py` calls `flow`, `tick` and `sweep` in time.

RFC 7675
https://www.rfc-editor.org/rfc/rfc7675 (consent: a silent client has gone).
"""

import contextlib
import enum
import hashlib
import logging
import secrets
from typing import Protocol

import adapters
import attendants
import audio
import backend
import conversation
import floor
import journal
import ledger
import meter
import metrics
import opening
import realtime
import receiver
import records
import reports
import rtp
import sdp
import settings
import speech
import ufrag
from peer import Handler, Peer

BACKLOG_OCTETS_MAX = 4 << 20
"""Data channel messages that a client has not taken. A long transcript is some kilobytes; a client
that leaves this much has stopped reading."""

NEVER_CONNECTED = "the client never connected"
VANISHED = "the client has vanished"
EXPIRED = "the session limit is reached"
FAULT = "a fault in the server"
BACKEND_LOST = "the backend is lost"
"""Reasons why calls end that are counted (ENDINGS)."""

STOPPED_READING = "the client has stopped reading its data channel"
LEFT = "the client has asked to end the call"
"""Other reasons."""

ENDINGS = {
    NEVER_CONNECTED: metrics.Transceiver.ENDED_NEVER_CONNECTED,
    VANISHED: metrics.Transceiver.ENDED_VANISHED,
    EXPIRED: metrics.Transceiver.ENDED_EXPIRED,
    FAULT: metrics.Transceiver.ENDED_FAULT,
    BACKEND_LOST: metrics.Transceiver.ENDED_BACKEND,
}

NOT_RESUMED = "There is no such conversation to be resumed, or not any more: a new one begins."
"""Whatever the reason: to a stranger, a call of somebody else's is like none at all."""

LOSS_TOLD_S = 5.0
"""How long a call whose backend is lost before its data channel is open waits for that, so that its
client hears why it ends. A channel takes a few round trips."""

TAG_CHARACTERS = 6
"""The end of a call's id, which tells calls apart in a log and is too short for a credential."""

log = logging.getLogger("session")
Timing = metrics.Timing
OPUS = sdp.Codec.OPUS


class State(enum.Enum):
    """Where a call is in its life."""

    OFFERED = "answered; the client has not been heard of"
    CONNECTING = "the client's first check has come; DTLS is under way"
    LIVE = "media flows"
    CLOSED = "over; everything is freed or about to be"


class Owner(Protocol):
    """What a session needs of the process that it runs in."""

    counters: ledger.Counters
    timings: ledger.Histograms
    limits: settings.TransceiverTable

    def clock(self) -> float:
        """Monotonic seconds."""

    def unix(self) -> float:
        """Seconds since 1970, for sender reports."""

    def paced(self, session: "Session") -> None:
        """Call `session.flow` at `session.wakes_at`, which may have changed."""

    def ended(self, session: "Session", reason: str) -> None:
        """The session has to be closed: its transport has gone."""


class Opener(Protocol):
    """The part of mux.Mux that a session uses."""

    def open(
        self, offer: sdp.Offer, ufrag: str, password: bytes, handler: Handler, holds: bool
    ) -> Peer:
        """Begin to answer the checks of a session, the first a moment later if it `holds`."""


class Session:
    """One call, from its offer to its end."""

    restarted_as: tuple[str, str] | None = None
    """Our ufrag and password, if the client's came by a request for a restart, not by an offer."""

    def __init__(
        self,
        owner: Owner,
        mux: Opener,
        offer: sdp.Offer,
        credentials: tuple[str, bytes],
        backends: backend.Backends,
        wanted: opening.Opening,
    ) -> None:
        """Open a call under ICE `credentials`, towards one of the `backends`."""
        self.call_id = ufrag.call_id(credentials[0], secrets.token_urlsafe(12))
        self.opening = wanted
        """What the call began with."""
        self.number = secrets.randbits(62)
        """Of its description, which is the same in all answers."""
        self.etag = _etag(credentials[0])
        """A name of its ICE session: another one after each restart (RFC 9725 section 4.3.1)."""
        self.ice = credentials
        """Our ufrag and password in it."""
        self.client_ice = (offer.ufrag, offer.password)
        """The client's ufrag and password in it."""
        self.opened_at = owner.clock()
        self.live_at: float | None = None
        """When DTLS was up; None until then."""
        self.ends_at = self.opened_at + owner.limits.session_s_max
        """The session limit, by the owner's clock."""
        self._owner, self.offer = owner, offer
        self._noticed = False
        self._restarts = 0
        self._meter = meter.Meter(
            owner.counters, owner.timings, self.opened_at, offer.codec.clock_hz
        )
        self._closed = self._opened = False
        self._lost_why, self._lost_at = "", 0.0
        self._early: list[realtime.Event] | None = []
        terms = floor.Terms(wanted.session)
        past = wanted.past or ()
        self._backend = backends.connect(terms.offered, self._emitted, self._backend_lost, past)
        rate_hz = self._backend.rate_hz
        self._decoder = speech.decoder(offer.codec, rate_hz)
        self._encoder = speech.encoder(offer.codec, rate_hz)
        self._receiver = receiver.Receiver(self._decoder)
        self._playout = audio.Playout(
            self._encoder,
            ssrc=secrets.randbits(32),
            # Of no matter without audio: nothing is sent then.
            payload_type=offer.payload_type or 0,
            # RFC 3711 section 3.3.1 leaves it to the receiver to guess the rollover counter: far
            # from the wrap, losing the first packets does no harm.
            sequence=secrets.randbits(15),
            timestamp=secrets.randbits(32),
            clock_hz=offer.codec.clock_hz,
        )
        self.reports = reports.Reports(self._playout, offer.codec.clock_hz, self._meter)
        """What RTCP says."""
        ruled = floor.Floor(terms, self._backend.rate_hz)
        chronicle = records.Chronicle(wanted.session, past)
        self._conversation = conversation.Conversation(
            self.call_id, self._playout, ruled, offer.message_octets_max, chronicle
        )
        if wanted.resume is not None and wanted.past is None:
            self._conversation.fault("resume_unavailable", NOT_RESUMED, "invalid_request_error")
        self._conversation.expires_at = self._unix_at(self.ends_at)
        self._adapter = adapters.of(wanted.dialect, "", 0.0, resumed=False)
        self._peer = mux.open(offer, *credentials, self, wanted.second_site)
        self._peer.carrier.labels = adapters.known(wanted.dialect).labels
        early, self._early = self._early, None
        for event in early or ():
            self._emitted(event)

    @property
    def state(self) -> State:
        """Where the call is in its life."""
        if self._closed:
            return State.CLOSED
        if self.live_at is not None:
            return State.LIVE
        return State.OFFERED if self._peer.agent.active is None else State.CONNECTING

    @property
    def ssrc(self) -> int:
        """Of the audio we send."""
        return self._playout.ssrc

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate that this call's DTLS shows."""
        return self._peer.certificate.sha256

    @property
    def rate_hz(self) -> int:
        """Of the backend's audio, both ways."""
        return self._backend.rate_hz

    @property
    def wakes_at(self) -> float | None:
        """When `flow` has audio to send; None while there is nothing or nobody to hear it."""
        return None if self.live_at is None or self._closed else self._playout.wakes_at

    @property
    def revision(self) -> int:
        """Another one whenever there is something new to be kept of the conversation."""
        return self._conversation.revision

    @property
    def replies(self) -> bool:
        """Whether a reply is being made or heard."""
        return self._conversation.replies

    def record(self) -> records.Record:
        """What another call needs to go on with the conversation."""
        return self._conversation.record(self.opening.key, self.opening.dialect)

    # --- from the transport: mux.Handler --------------------------------------------------------

    def connected(self, now: float) -> None:
        """DTLS is up: the line opens, and what the backend has said so far begins to play."""
        self.live_at = now
        self._meter.set_up(Timing.SETUP_CHECK, self._peer.checked_at or now)
        self._meter.set_up(Timing.SETUP_CONNECTED, now)
        self._owner.counters.values[metrics.Transceiver.SESSIONS_CONNECTED] += 1
        if self.offer.takes_audio and self._playout.wakes_at is None:
            self._peer.send_rtp(self._playout.silence(now))
        self.flow(now)

    def rtp(self, packet: bytes, now: float) -> None:
        """A packet to PCM, and that to the backend. Payloads of other types are ignored."""
        found = rtp.read(packet)
        if found is None or found.payload_type != self.offer.payload_type or self._closed:
            return
        if self.reports.received(found, now):
            self._meter.set_up(Timing.SETUP_AUDIO, now)
        if self.offer.codec is not OPUS:
            found = speech.in_opus_clock(found, self.offer.codec)
        for pcm in self._receiver.receive(found, now):
            self._hear(pcm, now)

    def rtcp(self, packet: bytes, now: float) -> None:
        """A report: when the client sent what, and how it receives us."""
        for block in self.reports.read(packet, now, self._owner.unix()):
            self._encoder.report(block)

    def opened(self, now: float) -> None:
        """The data channel is open: session.created goes first."""
        self._meter.set_up(Timing.SETUP_CHANNEL, now)
        self._adapter = adapters.of(
            self.opening.dialect,
            self._peer.carrier.label,
            self._owner.unix() - now,
            resumed=self.opening.resume is not None,
        )
        self._opened = True
        self._conversation.opened(now)
        self.flow(now)
        if self._lost_why:
            self._end_without_backend()

    def attend(self, attendant: attendants.Attendant) -> None:
        """Tell a server of the application's of all that happens from now on. Raises Crowded."""
        self._conversation.attend(attendant)

    def unattend(self, attendant: attendants.Attendant) -> None:
        """It has gone."""
        self._conversation.attendants.leave(attendant)

    def attended(self, message: str | bytes, attendant: attendants.Attendant, now: float) -> None:
        """An event of an attendant."""
        if not self._closed:
            self._conversation.client_message(message, now, attendant)
            self.flow(now)

    def message(self, message: str | bytes, now: float) -> None:
        """A message of the client."""
        if not self._closed:
            for event in self._adapter.from_client(message, now):
                self._conversation.client_message(event, now)
            self.flow(now)
            if self._adapter.leaves:
                self.farewell()
                self._owner.ended(self, LEFT)

    def lost(self, reason: str) -> None:
        """The transport has ended by itself."""
        self._owner.ended(self, reason)

    # --- in time --------------------------------------------------------------------------------

    def flow(self, now: float) -> None:
        """Let out all there is: audio that is due, events for the backend and for the client."""
        if self._closed:
            return
        wakes_at = self.wakes_at
        if wakes_at is not None and wakes_at <= now:
            packets = self._playout.send(now)
            self._meter.sounded(now)
            if self.offer.takes_audio:
                for packet in packets:
                    self._peer.send_rtp(packet)
        self._conversation.playout_events(now)
        for event in self._conversation.to_backend():
            self._backend.send(event, now)  # which may answer at once, and so have this called
        events = self._conversation.to_client()
        for message in self._adapter.to_client(events, now):
            if self._peer.backlog_octets > BACKLOG_OCTETS_MAX:  # a backend may say a lot a second
                self._owner.ended(self, STOPPED_READING)
                break
            self._peer.send_message(message)
        for told in events:
            self._meter.told(told, self._owner.clock() - now)
        if asked := self._adapter.asked():
            for each in asked:
                self._conversation.client_message(each, now)
            self.flow(now)
        self._owner.paced(self)

    def tick(self, now: float) -> None:
        """Let time pass for whoever waits for silence: every 20 to 100 ms while live."""
        if self.state is not State.LIVE:
            return
        for pcm in self._receiver.tick(now):
            self._hear(pcm, now)
        self._backend.tick(now)
        self.flow(now)

    def restart(self, name: str, password: bytes) -> None:
        """Answer the client's checks under new credentials too; `client_ice` has its own by now."""
        self._peer.restart(name, password, self.client_ice)
        self.ice = name, password
        self.etag = _etag(name)
        self._restarts += 1

    def sweep(self, now: float) -> str | None:
        """Send the reports; the reason why the call has to end now, or None. Once a second."""
        limits = self._owner.limits
        if now >= self.ends_at:
            wrong = (
                f"Your session hit the maximum duration of {limits.session_s_max / 60:g} minutes."
            )
            self.fault("session_expired", wrong, "invalid_request_error")
            return EXPIRED
        if self._lost_why and now - self._lost_at >= LOSS_TOLD_S:
            return BACKEND_LOST
        if self.live_at is None:
            late = now - self.opened_at >= limits.connect_deadline_s
            return NEVER_CONNECTED if late else None
        if now >= self.ends_at - limits.notice_s and not self._noticed:
            self.notice(self.ends_at)
        self._peer.sweep(now)
        heard_at = self._peer.agent.heard_at or self.live_at
        if now - heard_at >= limits.silence_deadline_s:
            return VANISHED
        if self._peer.backlog_octets > BACKLOG_OCTETS_MAX:
            return STOPPED_READING
        self._meter.frames(self._receiver)
        report = self.reports.write(now, self._owner.unix())
        if report is not None:
            self._peer.send_rtcp(report)
        return None

    def notice(self, ends_at: float) -> None:
        """Tell the client that its call will end by then, at the latest."""
        self._noticed = True
        self._conversation.notice(self._unix_at(min(ends_at, self.ends_at)))
        self.flow(self._owner.clock())

    def fault(self, code: str, message: str, kind: str = "server_error") -> None:
        """Tell the client what is wrong, or why its call ends now: an `error` event."""
        self._conversation.fault(code, message, kind)
        self.flow(self._owner.clock())

    def farewell(self) -> None:
        """Tell the client that its call has been ended by request, if its dialect can say so."""
        for message in self._adapter.farewell():
            self._peer.send_message(message)

    def goodbye(self, now: float) -> None:
        """Tell the client that its call ends since the process does."""
        self._conversation.fault("server_shutting_down", "The server is being stopped.")
        self.flow(now)

    async def close(self, reason: str) -> None:
        """End the call politely and free what it holds. Closing twice is harmless."""
        if self._closed:
            return
        state = self.state
        self._closed = True
        async with contextlib.AsyncExitStack() as last:  # each is freed even if another fails
            last.callback(self._decoder.close)
            last.callback(self._encoder.close)
            last.push_async_callback(self._peer.close)
            last.callback(self._backend.close)
            last.callback(self._conversation.closed)
            last.callback(self._conversation.attendants.end, reason)
            last.callback(self._write_down, reason, state)
            self._meter.frames(self._receiver)

    def _write_down(self, reason: str, state: State) -> None:
        """The one line that a call leaves in the journal."""
        wanted = self.opening
        model = (wanted.session or {}).get("model")
        log.info(
            "%s ended: %s",
            self,
            reason,
            extra=journal.fields(
                request_id=wanted.request_id,
                call=self.call_id[-TAG_CHARACTERS:],
                key=wanted.key or None,
                site=wanted.site or None,
                dialect=wanted.dialect,
                codec=self.offer.codec.name.lower(),
                model=model if isinstance(model, str) else None,
                resumes=wanted.resume[-TAG_CHARACTERS:] if wanted.resume else None,
                reason=reason,
                state=state.name.lower(),
                duration_s=round(self._owner.clock() - self.opened_at, 3),
                ice_restarts=self._restarts,
                packets_out=self._playout.packets_sent,
                octets_out=self._playout.octets_sent,
                **self._meter.story(),
            ),
        )

    def __str__(self) -> str:
        """A name for the log: the end of the call id, too short to be of use as a credential."""
        return f"call …{self.call_id[-TAG_CHARACTERS:]}"

    # --- inside ---------------------------------------------------------------------------------

    def _hear(self, pcm: bytes, now: float) -> None:
        self._backend.append(pcm, now)
        if self._conversation.listens:
            self._conversation.hear(pcm, now)
            self.flow(now)

    def _emitted(self, event: realtime.Event) -> None:
        """An event from the backend, possibly while the constructor is still at work."""
        if self._early is not None:
            self._early.append(event)
        elif not self._closed:
            now = self._owner.clock()
            self._meter.turn(event.get("type"), self._playout.wakes_at is not None, now)
            self._conversation.backend_event(event, now)
            self.flow(now)

    def _backend_lost(self, reason: str) -> None:
        """The backend is given up. What it has said so far has been passed on."""
        self._lost_why, self._lost_at = reason, self._owner.clock()
        if (self._opened or self._conversation.attendants) and not self._closed:
            self._end_without_backend()

    def _end_without_backend(self) -> None:
        self.fault("backend_lost", self._lost_why)
        self._owner.ended(self, BACKEND_LOST)

    def _unix_at(self, at: float) -> int:
        """A moment of the owner's clock in whole seconds since 1970."""
        return round(self._owner.unix() + at - self._owner.clock())


def _etag(name: str) -> str:
    """Strong, and of a ufrag, but none: with that and a source address one could claim a flow."""
    return hashlib.blake2s(name.encode(), digest_size=8, person=b"etag").hexdigest()
