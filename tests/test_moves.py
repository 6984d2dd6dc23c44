"""Clients that move, and those who would like to be taken for one: another network, another port,
new ICE credentials; copied, replayed, forged and made-up packets.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aioice.ice
import pylibsrtp
import pytest
from aiortc.mediastreams import AudioStreamTrack

import frame
import ice
import ledger
import mux
import rtp
import sdp
import stun
from metrics import Transceiver as Count

from . import shim, test_peer, test_transceiver
from .test_transceiver import House

PAIR = {"ufrag": "abcd", "pwd": "p" * 22}


def restarted(client: shim.Client, ufrag: str, password: str) -> None:
    """Have a stock client check with new credentials: what applying an answer would do, which
    aiortc does not do after the first."""
    ice = client.pc.sctp.transport.transport.iceGatherer._connection
    ice.remote_username, ice.remote_password = ufrag, password


def test_an_ice_restart_keeps_dtls_srtp_and_the_data_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)

    async def scenario(on: House) -> None:
        client, call_id = await on.call()
        (session,) = test_transceiver.sessions(on)
        counters, old = on.transceiver.counters, session._peer.agent.ufrags
        for name in ("efgh", "ijkl"):
            theirs = PAIR | {"ufrag": name}
            status, pair, _ = await on.ask("POST", f"/v1/sessions/{call_id}/ice", theirs)
            assert status == 200
            restarted(client, pair["ufrag"], pair["pwd"])
            await shim.until(lambda pair=pair: session._peer.agent.ufrags[-1] in checked(on))
        assert pair["ufrag"] not in old
        assert old[0] not in session._peer.agent.ufrags, "two pairs are answered, not all of them"
        assert counters[Count.ICE_RESTARTS] == 2

        heard = session._receiver.received
        count = len(client.messages)
        client.channel.send('{"type": "input_audio_buffer.clear"}')
        await shim.until(lambda: len(client.messages) > count)
        await shim.until(lambda: session._receiver.received > heard + 5)
        assert client.pc.connectionState == "connected"
        assert session.call_id == call_id
        assert (await on.ask("DELETE", f"/v1/sessions/{call_id}"))[0] == 200

    def checked(on: House) -> set[bytes]:
        return {request.ufrag for request in seen}

    seen: list[Any] = []
    check = test_transceiver.transceiver.Mux._check

    def watched(self: Any, payload: bytes, *rest: Any) -> Count:
        outcome = check(self, payload, *rest)
        if outcome is Count.FORWARDED:
            seen.append(test_transceiver.stun.read_request(payload))
        return outcome

    monkeypatch.setattr(test_transceiver.transceiver.Mux, "_check", watched)
    test_transceiver.house(tmp_path, scenario)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, "ufrag"),
        ([], "ufrag"),
        ({"ufrag": "abcd"}, "pwd"),
        (PAIR | {"ufrag": "abc"}, "ufrag"),
        (PAIR | {"ufrag": "a b c"}, "ufrag"),
        (PAIR | {"pwd": "short"}, "pwd"),
        (PAIR | {"pwd": 7}, "pwd"),
    ],
)
def test_an_ice_restart_that_is_wrong_is_refused(tmp_path: Path, body: Any, param: str) -> None:
    async def scenario(on: House) -> None:
        _, answer, _ = await on.offer(await shim.Client().offer())
        path = f"/v1/sessions/{answer['call_id']}/ice"
        status, refusal, _ = await on.ask("POST", path, body)
        assert status == 400
        assert refusal["error"]["param"] == param
        assert on.transceiver.counters[Count.ICE_RESTARTS] == 0
        status, refusal, _ = await on.ask("POST", "/v1/sessions/rtc_x/ice", PAIR)
        assert (status, refusal["error"]["code"]) == (404, "call_id_not_found")

    test_transceiver.house(tmp_path, scenario)


def test_media_that_authenticates_and_makes_no_sense(tmp_path: Path) -> None:
    """A client may encrypt what it likes: no session notices, its own least of all."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)

    def nonsense(ssrc: int) -> tuple[bytes, bytes]:
        opus = chance.choice((96, 111, chance.randrange(128)))
        packet = bytearray(
            rtp.write(
                opus,
                chance.randrange(1 << 16),
                chance.randrange(1 << 32),
                ssrc,
                chance.randbytes(chance.choice((0, 1, 2, 60, 900))),
                marker=chance.random() < 0.5,
            )
        )
        if chance.random() < 0.3:
            packet[0] ^= chance.choice((0x10, 0x20, 0x0F))  # extension, padding, sources
        report = bytearray(rtp.receiver_report(ssrc, [], "x") + chance.randbytes(40))
        for _ in range(chance.randrange(4)):
            report[chance.randrange(2, len(report))] = chance.randrange(256)
        report[4:8] = ssrc.to_bytes(4, "big")
        return bytes(packet), bytes(report)

    async def scenario(on: House) -> None:
        hostile, _ = await on.call()
        bystander, _ = await on.call()
        one, other = test_transceiver.sessions(on)
        heard = other._receiver.received
        sender = hostile.pc.getSenders()[0].transport
        at = frame.client(one._peer.agent.active.header)
        for number in range(600):
            packet, report = nonsense(chance.choice((1, 2, 3)))
            protected = []
            for protect, octets in (
                (sender._tx_srtp.protect, packet),
                (sender._tx_srtp.protect_rtcp, report),
            ):
                with contextlib.suppress(pylibsrtp.Error):  # it reads the header itself
                    protected.append(protect(octets))
            on.shim.inject(protected, at)
            if not number % 4:
                await asyncio.sleep(0.001)
        await shim.until(lambda: other._receiver.received > heard + 20)
        for client in (hostile, bystander):
            count = len(client.messages)
            client.channel.send('{"type": "input_audio_buffer.clear"}')
            await shim.until(lambda client=client, count=count: len(client.messages) > count)
        assert test_transceiver.sessions(on) == [one, other]

    test_transceiver.house(tmp_path, scenario)


# --- attacks: a mux, a relay in miniature, several callers ------------------------------------

ATTACKER = ("127.0.0.66", 6666)


class Call:
    """A connected client and its session."""

    def __init__(self, client: shim.Client, ufrag: str) -> None:
        self.client, self.ufrag, self.password = client, ufrag, b"p" * 22
        self.handler = test_peer.Recorder()
        self.peer: Any = None

    @property
    def at(self) -> tuple[str, int]:
        """Where the session believes its client."""
        return frame.client(self.peer.agent.active.header)

    def check(self) -> bytes:
        return stun.request(os.urandom(12), f"{self.ufrag}:x", self.password)

    @property
    def ssrc(self) -> bytes:
        """Of its client's voice."""
        return self.handler.packets[-1].ssrc.to_bytes(4, "big")

    async def goes_on(self) -> None:
        """Wait for so many more packets that any of an attack in between have been handled."""
        before = len(self.handler.packets)
        await shim.until(lambda: len(self.handler.packets) >= before + 10)

    def every_packet_once(self) -> bool:
        """True if what has been heard is without holes and repetitions."""
        numbers = [packet.sequence for packet in self.handler.packets]
        return numbers == [(numbers[0] + n) & 0xFFFF for n in range(len(numbers))]


class Town:
    """A mux, the miniature relay, and as many calls as a test wants."""

    def __init__(self) -> None:
        self.counters = ledger.Counters(Count)
        sock = shim.udp_socket()
        loop = asyncio.get_running_loop()
        self.shim = shim.Shim(sock.getsockname())
        self.sent: list[tuple[str, int]] = []
        self.shim.sent_to = self.sent.append
        self.mux = mux.Mux(sock, lambda host: host == "127.0.0.1", self.counters, loop.time)
        self.calls: list[Call] = []

    async def call(self) -> Call:
        call = Call(shim.Client(), f"caller{len(self.calls)}")
        self.calls.append(call)
        offer = sdp.read_offer(await call.client.offer(AudioStreamTrack()))
        call.peer = self.mux.open(offer, call.ufrag, call.password, call.handler)
        answer = sdp.answer(
            offer,
            call.ufrag,
            call.password.decode(),
            fingerprint=call.peer.certificate.sha256,
            candidates=[self.shim.address],
            ssrc=7,
            session_id=1,
        )
        await call.client.accept(answer)
        await shim.until(lambda: "opened" in call.handler.heard and call.handler.packets)
        return call

    def tap(self, call: Call, hears: Callable[[bytes], bytes | None]) -> None:
        """Let `hears` have every voice packet of that call, and decide what becomes of it."""
        ssrc = call.ssrc

        def up(datagram: bytes) -> bytes | None:
            if datagram[8:12] == ssrc and stun.kind(datagram[0]) is stun.Kind.RTP:
                return hears(datagram)
            return datagram

        self.shim.up = up

    async def close(self) -> None:
        for call in self.calls:
            await call.peer.close()
            await call.client.close()
        assert self.mux._by_ssrc == {}
        assert self.mux._by_client == {}
        self.mux.close()
        self.shim.close()


def town(scenario: Callable[[Town], Coroutine[Any, Any, None]], attackers: int = 0) -> None:
    """Run a scenario; no datagram may be unaccounted for, no attacker be sent anything, and no
    call lost but those of the last `attackers` callers."""

    async def run() -> None:
        found = Town()
        try:
            await scenario(found)
            assert found.counters.missing() == 0
            assert found.counters[Count.DROPPED_FAULT] == 0
            assert ATTACKER not in found.sent
            for call in found.calls[: len(found.calls) - attackers]:
                assert not any(heard.startswith("lost") for heard in call.handler.heard)
        finally:
            await found.close()

    asyncio.run(run())


def test_srtp_that_was_delivered_before_wins_nothing_from_another_address() -> None:
    async def scenario(on: Town) -> None:
        victim = await on.call()
        recorded: list[bytes] = []
        on.tap(victim, lambda datagram: recorded.append(datagram) or datagram)
        await victim.goes_on()
        home = victim.at
        on.shim.inject(recorded[:10], ATTACKER)
        await victim.goes_on()
        assert victim.at == home
        assert on.counters[Count.DROPPED_BAD_SRTP] == 10
        assert on.counters[Count.ADDRESSES_LEARNED] == 0
        assert victim.every_packet_once()

    town(scenario)


def test_copies_that_are_faster_than_their_originals_win_nothing() -> None:
    """Each of them authenticates, for it is the first to arrive; the original shows who sent it."""

    async def scenario(on: Town) -> None:
        victim = await on.call()
        home = victim.at

        def copy_first(datagram: bytes) -> bytes:
            on.shim.inject([datagram], ATTACKER)
            return datagram

        on.tap(victim, copy_first)
        for _ in range(3):
            await victim.goes_on()
            assert victim.at == home
        assert on.counters[Count.ADDRESSES_LEARNED] == 1
        assert victim.every_packet_once()
        before = on.counters[Count.DROPPED_UNKNOWN_CLIENT]
        on.shim.inject([b"\x17\xfe\xfd" + bytes(8) + b"\0\1x"] * 200, ATTACKER)
        await shim.until(lambda: on.counters[Count.DROPPED_UNKNOWN_CLIENT] == before + 200)
        victim.client.channel.send("there is room for me")
        await shim.until(lambda: victim.handler.messages == ["there is room for me"])

    town(scenario)


def test_a_flood_with_the_ssrc_of_a_call_costs_a_bounded_time_and_spares_the_others() -> None:
    async def scenario(on: Town) -> None:
        victim, other = await on.call(), await on.call()
        ssrc, before = victim.ssrc, victim.at
        made_up = [b"\x80\x6f" + os.urandom(6) + ssrc + os.urandom(60) for _ in range(1_000)]
        kinds = (Count.DROPPED_BAD_SRTP, Count.DROPPED_GUESS_LIMIT)
        for start in range(0, len(made_up), 50):
            on.shim.inject(made_up[start : start + 50], ATTACKER)
            # No more at a time than any socket has room for.
            came = start + 50
            await shim.until(lambda came=came: sum(on.counters[kind] for kind in kinds) >= came)
        await victim.goes_on()
        counted = {kind: on.counters[kind] for kind in kinds}
        assert sum(counted.values()) == 1_000
        # The flood lasts a moment; on a slow machine it falls into several seconds.
        assert counted[Count.DROPPED_GUESS_LIMIT] > 0
        assert victim.at == before
        await moves(on, other)
        assert victim.every_packet_once()
        assert other.every_packet_once()

    town(scenario)


async def moves(on: Town, call: Call, to: tuple[str, int] = ("127.0.0.1", 4444)) -> None:
    """Give a call's client another port that nobody has checked from, and see it followed."""
    real, home = on.shim.clients[call.at], call.at
    was = on.shim.seen_as
    on.shim.seen_as = lambda client: to if client == real else was(client)
    on.shim.clients[to] = real
    await shim.until(lambda: call.at == to)
    await call.goes_on()
    assert call.at == to != home


def test_a_session_of_the_attackers_with_the_ssrc_of_his_victim() -> None:
    async def scenario(on: Town) -> None:
        victim, attacker = await on.call(), await on.call()
        his = attacker.client.pc.getSenders()[0].transport
        ssrc = int.from_bytes(victim.ssrc, "big")
        count = len(attacker.handler.packets)
        for number in range(5):
            await his._send_rtp(rtp.write(96, number, 960 * number, ssrc, b"mine"))
        await shim.until(lambda: len(attacker.handler.packets) >= count + 5)
        stream = on.mux._by_ssrc[victim.ssrc]
        assert stream.peers == [victim.peer, attacker.peer]
        # From elsewhere his packets lead to his own session, and his victim's to the victim's.
        mine = his._tx_srtp.protect(rtp.write(96, 9, 9 * 960, ssrc, b"mine"))
        on.shim.inject([mine], ("127.0.0.67", 1))
        await shim.until(lambda: any(p.sequence == 9 for p in attacker.handler.packets))
        assert victim.every_packet_once()
        await moves(on, victim)
        assert victim.every_packet_once()

    town(scenario)


def test_sessions_that_share_an_ssrc_are_bounded_and_the_first_stay() -> None:
    async def scenario(on: Town) -> None:
        victim = await on.call()
        copies = [object() for _ in range(10)]
        for each in copies:
            on.mux.sounds(each, victim.ssrc)  # type: ignore[arg-type]  # never asked anything
        stream = on.mux._by_ssrc[victim.ssrc]
        assert stream.peers == [victim.peer, *copies[: mux.SHARERS_MAX - 1]]
        stream.peers[1:] = []

    town(scenario)


def test_a_forged_source_takes_nothing_from_its_owner() -> None:
    async def scenario(on: Town) -> None:
        victim, attacker = await on.call(), await on.call()
        home = victim.at
        his = attacker.client.pc.getSenders()[0].transport
        mine = his._tx_srtp.protect(rtp.write(96, 9, 9 * 960, 99, b"mine"))
        forged = [
            b"\x80\x6f" + os.urandom(6) + victim.ssrc + os.urandom(60),
            mine,
            b"\x17\xfe\xfd" + os.urandom(8) + b"\0\x20" + os.urandom(32),
            b"\x16\xfe\xfd" + os.urandom(40),
            b"\x15\xfe\xfd" + bytes(8) + b"\0\2\1\0",  # an alert: close_notify
            attacker.check(),
        ]
        on.shim.inject(forged * 3, home)
        await shim.until(lambda: on.counters[Count.DROPPED_ADDRESS_HELD] == 3)
        await victim.goes_on()
        assert victim.at == home
        assert victim.every_packet_once()
        victim.client.channel.send("still mine")
        await shim.until(lambda: victim.handler.messages == ["still mine"])

    town(scenario)


def test_an_address_claimed_by_srtp_is_its_owners_with_the_first_check() -> None:
    """Somebody speaks in the name of an address whose owner is about to call."""

    async def scenario(on: Town) -> None:
        attacker, owner = await on.call(), await on.call()
        his = attacker.client.pc.getSenders()[0].transport
        wanted, ssrc = ("127.0.0.5", 5555), int.from_bytes(attacker.ssrc, "big")
        start = attacker.handler.packets[-1].sequence + 1_000
        claims = [
            his._tx_srtp.protect(rtp.write(96, (start + n) & 0xFFFF, n, ssrc, b"me"))
            for n in range(5)
        ]
        on.shim.inject(claims, wanted)
        await shim.until(lambda: on.counters[Count.ADDRESSES_LEARNED] == 1)
        on.shim.inject([owner.check()], wanted)
        await shim.until(lambda: owner.at == wanted)
        assert on.counters[Count.DROPPED_ADDRESS_HELD] == 0
        assert not attacker.peer.agent.knows(frame.key(frame.header(*wanted)))

    town(scenario)


def test_an_address_that_no_check_comes_from_is_given_up() -> None:
    async def scenario(on: Town) -> None:
        victim = await on.call()
        home, moved = victim.at, ("127.0.0.1", 4444)
        real = on.shim.clients[home]
        on.shim.up = lambda octets: None if stun.kind(octets[0]) is stun.Kind.STUN else octets
        on.shim.seen_as = lambda client: moved if client == real else client
        on.shim.clients[moved] = real
        await shim.until(lambda: victim.at == moved)
        victim.peer.sweep(on.mux.clock() + ice.UNCHECKED_S_MAX)
        assert victim.at == home
        assert frame.key(frame.header(*moved)) not in on.mux._by_client
        on.sent.clear()
        await victim.goes_on()  # its voice is heard all the same
        assert moved not in on.sent
        on.shim.up = lambda octets: octets
        on.shim.inject([victim.check()], moved)
        await shim.until(lambda: victim.at == moved)

    town(scenario)


def test_a_client_that_only_listens_is_followed_by_its_reports() -> None:
    async def scenario(on: Town) -> None:
        listener = await on.call()
        sender = listener.client.pc.getSenders()[0].transport
        listener.client.pc.getSenders()[0].replaceTrack(None)
        on.tap(listener, lambda _: None)
        moved = ("127.0.0.1", 4444)
        report = rtp.receiver_report(12, [], "x")
        reports = listener.handler.reports
        # The first is what its SSRC is known by.
        on.shim.inject([sender._tx_srtp.protect_rtcp(report)], listener.at)
        await shim.until(lambda: listener.handler.reports > reports)
        on.shim.inject([sender._tx_srtp.protect_rtcp(report)], moved)
        await shim.until(lambda: on.counters[Count.ADDRESSES_LEARNED] == 1)
        await asyncio.sleep(ice.FOLLOWED_S)
        on.shim.inject([sender._tx_srtp.protect_rtcp(report)], moved)
        await shim.until(lambda: listener.at == moved)

    town(scenario)


def test_another_relay_is_the_way_back_of_a_client_that_only_writes() -> None:
    """A relay is lost: its client's data channel is answered by the next one, without a check."""

    async def scenario(on: Town) -> None:
        caller = await on.call()
        on.tap(caller, lambda _: None)
        other = shim.udp_socket()
        lost = on.shim.back
        came: list[bytes] = []

        def through_the_other(datagram: bytes) -> bytes | None:
            if stun.kind(datagram[0]) is stun.Kind.DTLS:
                other.sendto(frame.header(*caller.at) + datagram, on.shim.transceiver)
            return None

        def back() -> None:
            datagram = other.recv(2048)[frame.HEADER_OCTETS :]
            came.append(datagram)
            on.shim.front.sendto(datagram, on.shim.clients[caller.at])

        try:
            asyncio.get_running_loop().add_reader(other, back)
            # What has not authenticated shows nothing: not even the relay's address changes.
            garbage = b"\x17\xfe\xfd" + bytes(8) + b"\0\x20" + os.urandom(32)
            other.sendto(frame.header(*caller.at) + garbage, on.shim.transceiver)
            on.shim.inject([garbage], caller.at)
            forwarded = on.counters[Count.FORWARDED]
            await shim.until(lambda: on.counters[Count.FORWARDED] >= forwarded + 2)
            assert caller.peer.agent.active.relay == lost.getsockname()

            on.shim.up = through_the_other
            on.shim.down = lambda _: None
            caller.client.channel.send("can you hear me?")
            await shim.until(lambda: caller.handler.messages == ["can you hear me?"])
            assert caller.peer.agent.active.relay == other.getsockname()
            caller.peer.send_message("by another relay")
            await shim.until(lambda: caller.client.messages == ["by another relay"])
            assert came
        finally:
            asyncio.get_running_loop().remove_reader(other)
            other.close()

    town(scenario)
