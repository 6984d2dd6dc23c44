"""One client's transport, against a client as users have it."""

import asyncio
import gc
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiortc import RTCCertificate
from aiortc.mediastreams import AudioStreamTrack
from aiortc.rtcdtlstransport import SRTPProtectionProfile, generate_certificate
from cryptography.hazmat.primitives.asymmetric import rsa
from OpenSSL import SSL

import carrier
import dtls
import frame
import ice
import mux
import peer
import rtp
import sdp
import stun
from ledger import Counters
from metrics import Transceiver as Count

from . import shim

UFRAG, PASSWORD = "APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN"


class Recorder:
    """A handler that notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.packets: list[rtp.Packet] = []
        self.reports = 0
        self.messages: list[str | bytes] = []

    def connected(self, now: float) -> None:
        self.heard.append("connected")

    def rtp(self, packet: bytes, now: float) -> None:
        found = rtp.read(packet)
        assert found is not None
        self.packets.append(found)

    def rtcp(self, packet: bytes, now: float) -> None:
        self.reports += 1

    def opened(self, now: float) -> None:
        self.heard.append("opened")

    def message(self, message: str | bytes, now: float) -> None:
        self.messages.append(message)

    def lost(self, reason: str) -> None:
        self.heard.append(f"lost: {reason}")


class Line:
    """A client, the miniature relay, a mux with one session: what a test connects."""

    def __init__(self, certificate: RTCCertificate | None = None) -> None:
        self.counters = Counters(Count)
        sock = shim.udp_socket()
        loop = asyncio.get_running_loop()
        self.shim = shim.Shim(sock.getsockname())
        self.mux = mux.Mux(sock, lambda host: host == "127.0.0.1", self.counters, loop.time)
        self.client = shim.Client(certificate)
        self.handler = Recorder()
        self.peer: peer.Peer

    @property
    def candidate(self) -> tuple[str, int]:
        """Where the client is told to send."""
        return self.shim.address

    async def dial(self, change: Callable[[str], str] = lambda offer: offer) -> None:
        offer = sdp.read_offer(change(await self.client.offer(AudioStreamTrack())))
        self.peer = self.mux.open(offer, UFRAG, PASSWORD, self.handler)
        answer = sdp.answer(
            offer,
            UFRAG,
            PASSWORD.decode(),
            fingerprint=self.peer.certificate.sha256,
            candidates=[self.candidate],
            ssrc=7,
            session_id=1,
        )
        await self.client.accept(answer)

    async def connect(self) -> None:
        await self.dial()
        await self.opened()
        await shim.until(lambda: self.handler.packets)

    async def opened(self) -> None:
        """Wait until both ends have the data channel."""
        channel = self.client.channel
        await shim.until(lambda: "opened" in self.handler.heard and channel.readyState == "open")

    async def close(self) -> None:
        await self.peer.close()
        await self.client.close()
        self.mux.close()
        self.shim.close()


def line(
    scenario: Callable[[Line], Coroutine[Any, Any, None]],
    certificate: RTCCertificate | None = None,
) -> None:
    """Run a scenario on a line of its own; no datagram may be unaccounted for."""

    async def run() -> None:
        found = Line(certificate)
        try:
            await scenario(found)
            assert found.counters.missing() == 0
            assert found.counters[Count.DROPPED_FAULT] == 0
        finally:
            await found.close()

    asyncio.run(run())


class RsaCertificate(RTCCertificate):
    """What GStreamer and other encoders bring: a stock client of aiortc with an RSA key."""

    @classmethod
    def make(cls) -> "RsaCertificate":
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        return cls(key, generate_certificate(key))  # type: ignore[arg-type]  # it signs all the same

    def _create_ssl_context(self, srtp_profiles: list[SRTPProtectionProfile]) -> SSL.Context:
        context = super()._create_ssl_context(srtp_profiles)
        context.set_cipher_list(b"ECDHE-RSA-AES128-GCM-SHA256")
        return context


@pytest.mark.parametrize("setup", ["actpass", "active", "passive"])
def test_media_and_messages_both_ways_in_either_dtls_role(setup: str) -> None:
    async def scenario(on: Line) -> None:
        await on.dial(lambda offer: offer.replace("setup:actpass", f"setup:{setup}"))
        await on.opened()
        assert on.handler.heard == ["connected", "opened"]
        on.peer.send_message("hello client")
        on.client.channel.send("hello server")
        on.client.channel.send(b"\x00\x01")
        await shim.until(lambda: on.client.messages and len(on.handler.messages) == 2)
        assert on.client.messages == ["hello client"]
        assert on.handler.messages == ["hello server", b"\x00\x01"]

        await shim.until(lambda: len(on.handler.packets) > 10)
        sequences = [packet.sequence for packet in on.handler.packets]
        assert sequences == [(sequences[0] + n) & 0xFFFF for n in range(len(sequences))]

        for sequence in range(10):
            on.peer.send_rtp(rtp.write(96, sequence, sequence * 960, 7, b"\xf8\xff\xfe"))
        await asyncio.wait_for(on.client.track.recv(), shim.WAIT_S)

    line(scenario)


def test_a_client_with_an_rsa_certificate() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        assert on.handler.heard == ["connected", "opened"]

    line(scenario, RsaCertificate.make())


def test_another_certificate_than_the_offers_is_refused() -> None:
    async def scenario(on: Line) -> None:
        other = dtls.Certificate.generateCertificate().sha256

        def change(offer: str) -> str:
            kept = [row for row in offer.split("\r\n") if "sha-384" not in row]
            return "\r\n".join(
                f"a=fingerprint:sha-256 {other}" if "sha-256" in row else row for row in kept
            )

        await on.dial(change)
        await shim.until(lambda: on.handler.heard)
        assert on.handler.heard == ["lost: the set-up failed"]

    line(scenario)


class Overtaken:
    """The client's last DTLS flight is overtaken by its first audio."""

    def __init__(self, on: Line) -> None:
        self.held: list[bytes] = []
        self.overtook: list[int] = []
        on.shim.up = self.up

    def up(self, datagram: bytes) -> bytes | None:
        kind = stun.kind(datagram[0])
        # The client's last flight begins with ChangeCipherSpec, content type 20 (RFC 6347 section
        # 4.2.4); everything of DTLS behind it waits too.
        if kind is stun.Kind.DTLS and (self.held or datagram[0] == 20):
            self.held.append(datagram)
            return None
        if kind is stun.Kind.RTP and not stun.is_rtcp(datagram):
            self.overtook.append(int.from_bytes(datagram[2:4], "big"))
        return datagram


def test_media_that_comes_before_its_keys_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.Peer, "_hasten", lambda *_: None)  # as with DTLS 1.3

    async def scenario(on: Line) -> None:
        client = Overtaken(on)
        await on.dial()
        await shim.until(lambda: len(client.overtook) >= 5)
        assert on.handler.packets == []
        on.shim.up = lambda datagram: datagram
        before = len(client.overtook)
        on.shim.inject(client.held)
        await shim.until(lambda: len(on.handler.packets) > before)
        assert on.handler.heard[0] == "connected"
        got = [packet.sequence for packet in on.handler.packets]
        assert got[:before] == client.overtook

    line(scenario)


def test_media_flows_both_ways_before_the_client_has_finished() -> None:
    """Its last flight is lost, and OpenSSL's second until it comes again passes unheard."""

    async def scenario(on: Line) -> None:
        client = Overtaken(on)
        await on.dial()
        await shim.until(lambda: len(on.handler.packets) >= 5)
        assert on.handler.heard == ["connected"]
        assert [packet.sequence for packet in on.handler.packets][:5] == client.overtook[:5]
        for sequence in range(10):
            on.peer.send_rtp(rtp.write(96, sequence, sequence * 960, 7, b"\xf8\xff\xfe"))
        await asyncio.wait_for(on.client.track.recv(), shim.WAIT_S)
        assert client.held
        assert not on.peer._finished
        on.shim.up = lambda datagram: datagram
        on.shim.inject(client.held)
        await on.opened()
        assert on.handler.heard == ["connected", "opened"]

    line(scenario)


def test_whoever_never_finishes_the_handshake_is_let_go() -> None:
    async def scenario(on: Line) -> None:
        Overtaken(on)
        await on.dial()
        await shim.until(lambda: on.handler.packets)
        now = on.mux.clock()
        on.peer.sweep(now)
        assert on.handler.heard == ["connected"]
        on.peer.sweep(now + peer.FINISH_S_MAX)
        assert on.handler.heard == ["connected", "lost: the set-up failed"]

    line(scenario)


def test_a_lost_client_hello_and_a_lost_last_flight_are_sent_again() -> None:
    async def scenario(on: Line) -> None:
        lost: list[bytes] = []

        def down(datagram: bytes) -> bytes | None:
            if stun.kind(datagram[0]) is stun.Kind.DTLS and len(lost) < 3 and datagram not in lost:
                lost.append(datagram)  # each of the first three once
                return None
            return datagram

        on.shim.down = down
        await on.connect()
        assert len(lost) == 3

    line(scenario)


def test_garbage_leaves_a_live_call_alone() -> None:
    async def scenario(on: Line) -> None:
        recorded: list[bytes] = []

        def up(datagram: bytes) -> bytes:
            recorded.append(datagram)
            return datagram

        on.shim.up = up
        await on.connect()
        on.shim.up = lambda datagram: datagram
        before = on.counters[Count.DROPPED_BAD_SRTP]
        client = next(iter(on.shim.clients))
        for datagram in list(recorded):
            for at in (1, len(datagram) // 2, len(datagram) - 1):
                changed = bytearray(datagram)
                changed[at] ^= 0x40
                on.shim.inject([bytes(changed), datagram[:at], datagram], client)
        on.shim.inject([bytes([first]) + os.urandom(40) for first in range(256)], client)
        seen = len(on.handler.packets)
        await shim.until(lambda: len(on.handler.packets) > seen + 5)
        assert on.counters[Count.DROPPED_BAD_SRTP] > before
        on.client.channel.send("still here")
        await shim.until(lambda: "still here" in on.handler.messages)
        assert not any(heard.startswith("lost") for heard in on.handler.heard)

    line(scenario)


def test_media_follows_the_client_to_another_address() -> None:
    """From Wi-Fi to mobile: the client's first check from there, before anything else."""

    async def scenario(on: Line) -> None:
        await on.connect()
        home, moved = next(iter(on.shim.clients)), ("127.0.0.9", 4444)
        sent: list[tuple[str, int]] = []
        on.shim.sent_to = sent.append
        on.shim.up = lambda datagram: None  # the old network is gone
        on.shim.clients[moved] = on.shim.clients[home]
        on.shim.inject([stun.request(os.urandom(12), f"{UFRAG}:x", PASSWORD)], moved)
        await shim.until(lambda: moved in sent)
        assert on.peer.agent.active is not None
        assert frame.client(on.peer.agent.active.header) == moved
        before = len(sent)
        on.shim.seen_as = lambda _: moved
        on.shim.up = lambda datagram: datagram
        seen = len(on.handler.packets)
        await shim.until(lambda: len(on.handler.packets) > seen)
        for sequence in range(10):
            on.peer.send_rtp(rtp.write(96, sequence, sequence * 960, 7, b"\xf8\xff\xfe"))
        on.peer.send_message("you have moved")
        await shim.until(lambda: on.client.messages == ["you have moved"])
        assert len(sent) > before + 10
        assert set(sent[before:]) == {moved}, "nothing goes to the old address any more"
        assert on.counters[Count.ADDRESSES_LEARNED] == 0

    line(scenario)


def test_what_was_on_its_way_to_the_old_address_is_sent_again_at_once() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        on.shim.down = lambda octets: None if stun.kind(octets[0]) is stun.Kind.DTLS else octets
        on.peer.send_message("are you there?")
        sctp = on.peer._sctp
        assert sctp is not None
        await shim.until(lambda: sctp._sent_queue)
        sctp._rto = 10 * shim.WAIT_S  # as after some time without an answer, and more
        sctp._t3_restart()
        await asyncio.sleep(0.05)
        on.shim.down = lambda datagram: datagram
        moved = ("127.0.0.9", 4444)
        on.shim.clients[moved] = next(iter(on.shim.clients.values()))
        on.shim.inject([stun.request(os.urandom(12), f"{UFRAG}:x", PASSWORD)], moved)
        await shim.until(lambda: on.client.messages == ["are you there?"])

    line(scenario)


def test_a_message_after_the_client_has_gone_is_no_complaint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        # DTLS's goodbye overtakes SCTP's (content type 23).
        on.shim.up = lambda octets: None if octets[0] == 23 else octets
        await on.client.close()
        await shim.until(lambda: "lost: the client closed the connection" in on.handler.heard)
        on.peer.send_message("goodbye")
        await asyncio.sleep(0.02)
        gc.collect()

    line(scenario)
    gc.collect()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_media_and_messages_follow_a_client_that_has_sent_no_check_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NAT has given it another port; browsers check every 2.5 s, and speak 50 times a second."""
    # So long that packets come meanwhile, also if this process stands still for a while.
    monkeypatch.setattr(ice, "FOLLOWED_S", 3.0)

    async def scenario(on: Line) -> None:
        await on.connect()
        home, moved = next(iter(on.shim.clients)), ("127.0.0.1", 4444)
        sent: list[tuple[str, int]] = []
        on.shim.sent_to = sent.append
        on.shim.seen_as = lambda _: moved
        on.shim.up = lambda octets: None if stun.kind(octets[0]) is stun.Kind.STUN else octets
        seen = len(on.handler.packets)
        active = on.peer.agent.active
        await shim.until(lambda: on.peer.agent.active is not active)
        assert on.peer.agent.active is not None
        assert frame.client(on.peer.agent.active.header) == moved
        assert moved not in sent, "nothing goes to an address before it is followed"
        assert len(on.handler.packets) - seen >= 3, "what has authenticated is heard all the same"
        assert on.counters[Count.ADDRESSES_LEARNED] == 1
        sent.clear()
        on.client.channel.send("by the new port")
        await shim.until(lambda: "by the new port" in on.handler.messages)
        on.peer.send_message("so I see")
        await shim.until(lambda: on.client.messages == ["so I see"])
        assert home not in sent

    line(scenario)


def test_the_client_hanging_up_is_noticed() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        await on.client.close()
        await shim.until(lambda: "lost: the client closed the connection" in on.handler.heard)

    line(scenario)


def test_closing_tells_the_client_and_leaves_nothing() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        before = asyncio.all_tasks()
        await on.peer.close()
        await on.peer.close()
        await shim.until(lambda: on.client.pc.connectionState == "closed")
        assert not any(heard.startswith("lost") for heard in on.handler.heard)
        on.peer.send_rtp(b"")
        on.peer.send_message("")
        await shim.until(lambda: asyncio.all_tasks() <= before)

    line(scenario)


def test_closing_in_the_middle_of_the_handshake() -> None:
    async def scenario(on: Line) -> None:
        on.shim.down = lambda datagram: (
            datagram if stun.kind(datagram[0]) is stun.Kind.STUN else None
        )
        await on.dial()
        await shim.until(lambda: on.peer.agent.active is not None)
        await on.peer.close()
        assert on.handler.heard == []

    line(scenario)


def test_of_several_channels_the_one_with_the_known_label_carries_the_events() -> None:
    async def scenario(on: Line) -> None:
        stranger = on.client.pc.createDataChannel("files")
        await on.connect()
        await shim.until(lambda: stranger.readyState == "open")
        stranger.send("nobody reads this")
        on.client.channel.send("but this")
        await shim.until(lambda: on.handler.messages == ["but this"])
        on.peer.send_message("there you are")
        await shim.until(lambda: on.client.messages == ["there you are"])
        assert on.handler.heard.count("opened") == 1

    line(scenario)


def test_a_channel_with_a_strange_label_carries_if_no_better_one_comes() -> None:
    async def scenario(on: Line) -> None:
        on.peer.carrier.labels = frozenset(("chat",))
        await shim.until(lambda: "opened" in on.handler.heard)
        assert on.peer.carrier.label == "oai-events"
        on.peer.send_message("then this is it")
        await shim.until(lambda: on.client.messages == ["then this is it"])

    async def dialled(on: Line) -> None:
        await on.dial()
        await scenario(on)

    line(dialled)


def test_a_client_that_opens_too_many_channels_is_let_go() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        for number in range(carrier.CHANNELS_MAX):
            on.client.pc.createDataChannel(f"more {number}")
        await shim.until(
            lambda: on.handler.heard[-1] == "lost: the client opened too many data channels"
        )

    line(scenario)


def test_a_client_that_sends_too_many_streams_is_let_go() -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        sender = on.client.pc.getSenders()[0].transport
        for ssrc in range(peer.SSRCS_MAX):
            await sender._send_rtp(rtp.write(111, 1, 1, ssrc, b"x"))
        await shim.until(lambda: on.handler.heard[-1] == "lost: the client sends too many streams")

    line(scenario)


def test_a_message_that_is_too_large_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(on: Line) -> None:
        await on.connect()
        with caplog.at_level("INFO", "carrier"):
            on.peer.send_message("x" * 300_000)
        assert "only supports messages up to" in caplog.text
        on.peer.send_message("small")
        await shim.until(lambda: on.client.messages == ["small"])
        await shim.until(lambda: on.peer.backlog_octets == 0)

    line(scenario)
