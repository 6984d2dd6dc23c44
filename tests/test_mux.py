"""The media socket: whose datagram is it, and what becomes of those that are nobody's."""

import asyncio
import datetime
import ipaddress
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import frame
import mux
import paths
import peer
import sdp
import stun
import ufrag
from ledger import Counters
from metrics import Transceiver as Count

from . import shim

KEYRING = ufrag.Keyring.parse("0 " + bytes(range(32)).hex())
CLUSTER = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1, 65_535)
FINGERPRINT = ":".join(["AB"] * 32)
OFFER = sdp.read_offer(
    "v=0\nm=audio 9 UDP/TLS/RTP/SAVPF 111\na=rtpmap:111 opus/48000/2\na=rtcp-mux\n"
    f"a=ice-ufrag:abcd\na=ice-pwd:{'p' * 22}\na=fingerprint:sha-256 {FINGERPRINT}\na=setup:passive"
)
HOME, MOBILE = ("192.0.2.1", 40_000), ("198.51.100.7", 50_000)


class Recorder:
    """A handler that notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def connected(self, now: float) -> None:
        self.heard.append("connected")

    def rtp(self, packet: bytes, now: float) -> None:
        self.heard.append("rtp")

    def rtcp(self, packet: bytes, now: float) -> None:
        self.heard.append("rtcp")

    def opened(self, now: float) -> None:
        self.heard.append("opened")

    def message(self, message: str | bytes, now: float) -> None:
        self.heard.append(f"message {message!r}")

    def lost(self, reason: str) -> None:
        self.heard.append(f"lost {reason}")


class Bench:
    """A mux behind one relay, played by the test itself with hand-made datagrams."""

    def __init__(self, trusts: Callable[[str], bool]) -> None:
        self.now = 100.0
        self.counters = Counters(Count)
        self.sock = shim.udp_socket()
        self.address = self.sock.getsockname()
        self.relay = shim.udp_socket()
        self.mux = mux.Mux(self.sock, trusts, self.counters, lambda: self.now)
        self.handlers: list[Recorder] = []
        self._nonces = iter(range(1, 1000))

    def open(self) -> tuple[str, bytes]:
        """A session's ufrag and password."""
        where = ipaddress.ip_address(self.address[0])
        hint = ufrag.mint(KEYRING, CLUSTER, where, self.address[1], next(self._nonces))
        password = ufrag.password(KEYRING, hint) or b""
        self.handlers.append(Recorder())
        self.mux.open(OFFER, hint, password, self.handlers[-1])
        return hint, password

    async def send(self, payload: bytes, client: tuple[str, int] = HOME) -> dict[str, int]:
        """Deliver one framed datagram; which counters of the receiving side moved."""
        return await self.send_raw(frame.header(*client) + payload)

    async def send_raw(self, datagram: bytes, sender: Any = None) -> dict[str, int]:
        before = list(self.counters.values)
        (sender or self.relay).sendto(datagram, self.address)
        async with asyncio.timeout(10):
            while self.counters[Count.RECEIVED] == before[Count.RECEIVED]:
                await asyncio.sleep(0)
        assert self.counters.missing() == 0
        return {
            kind.name: self.counters[kind] - before[kind]
            for kind in Count
            if self.counters[kind] != before[kind] and kind not in (Count.RECEIVED, Count.SENT)
        }

    def received(self) -> list[bytes]:
        """What came back to the relay, without STUN's header being judged."""
        found = []
        while True:
            try:
                found.append(self.relay.recv(2048))
            except BlockingIOError:
                return found

    async def close(self) -> None:
        for open_peer in set(self.mux._by_ufrag.values()):
            await open_peer.close()
        self.mux.close()
        self.relay.close()


def bench(
    scenario: Callable[[Bench], Coroutine[Any, Any, None]],
    trusts: Callable[[str], bool] = lambda host: host == "127.0.0.1",
) -> None:
    """Run a scenario on a bench of its own."""

    async def run() -> None:
        found = Bench(trusts)
        try:
            await scenario(found)
        finally:
            await found.close()

    asyncio.run(run())


def check(hint: str, password: bytes, **options: Any) -> bytes:
    return stun.request(os.urandom(12), f"{hint}:abcd", password, **options)


RTP = b"\x80\x6f" + bytes(60)
DTLS = b"\x16\xfe\xfd" + bytes(8) + b"\x00\x32" + bytes(50)


def test_a_check_is_answered_with_the_header_in_front() -> None:
    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        moved = await bench.send(check(hint, password))
        assert moved["FORWARDED"] == 1
        answer = bench.received()[0]
        header = frame.header(*HOME)
        assert answer.startswith(header)
        transaction_id = answer[40:52]
        assert answer[32:] == stun.success(transaction_id, *HOME, password)

    bench(scenario)


def test_dtls_begins_with_the_first_answer_and_is_sent_again() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(check(*bench.open()))
        got: list[bytes] = []
        await shim.until(lambda: got.extend(bench.received()) or len(got) >= 2)
        assert [stun.kind(datagram[32]) for datagram in got] == [stun.Kind.STUN, stun.Kind.DTLS]
        bench.now += 0.1
        await shim.until(lambda: got.extend(bench.received()) or len(got) >= 3)
        assert got[2] == got[1], "the same flight, long before OpenSSL's second is over"

    bench(scenario)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "DROPPED_BAD_FRAME"),
        (b"\x80" * 200, "DROPPED_BAD_FRAME"),
        (frame.header(*HOME), "DROPPED_BAD_FRAME"),
        (frame.header(*HOME)[:31], "DROPPED_BAD_FRAME"),
        (frame.header(*HOME) + bytes(1501), "DROPPED_OVERSIZED"),
        (frame.header(*HOME) + b"\x45" * 20, "DROPPED_UNKNOWN_KIND"),
        (frame.header(*HOME) + b"\xff" * 20, "DROPPED_UNKNOWN_KIND"),
        (frame.header(*HOME) + b"\x00", "DROPPED_STUN_MALFORMED"),
        (frame.header(*HOME) + b"\x01\x01" + bytes(18), "DROPPED_STUN_MALFORMED"),
        (frame.header(*HOME) + RTP, "DROPPED_UNKNOWN_CLIENT"),
        (frame.header(*HOME) + DTLS, "DROPPED_UNKNOWN_CLIENT"),
        (frame.header(*HOME) + check("unknown", b"x"), "DROPPED_UNKNOWN_SESSION"),
    ],
)
def test_what_belongs_to_nobody_ends_in_its_own_counter(datagram: bytes, reason: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.open()
        assert await bench.send_raw(datagram) == {reason: 1}
        assert bench.received() == []

    bench(scenario)


def test_wrong_integrity_has_no_effect() -> None:
    async def scenario(bench: Bench) -> None:
        hint, _ = bench.open()
        assert await bench.send(check(hint, b"guessed")) == {"DROPPED_BAD_INTEGRITY": 1}
        assert await bench.send(RTP) == {"DROPPED_UNKNOWN_CLIENT": 1}
        assert bench.received() == []

    bench(scenario)


def test_nothing_from_outside_the_prefixes_is_read() -> None:
    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        assert await bench.send(check(hint, password)) == {"DROPPED_NOT_RELAY": 1}
        assert bench.received() == []

    bench(scenario, trusts=lambda _: False)


def test_a_replay_from_another_address_is_counted() -> None:
    async def scenario(bench: Bench) -> None:
        recorded = check(*bench.open())
        await bench.send(recorded)
        assert await bench.send(recorded, MOBILE) == {"DROPPED_STUN_REPLAYED": 1}
        assert await bench.send(RTP, MOBILE) == {"DROPPED_UNKNOWN_CLIENT": 1}

    bench(scenario)


def test_early_media_is_kept_and_bounded() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(check(*bench.open()))
        for _ in range(peer.EARLY_DATAGRAMS_MAX):
            assert (await bench.send(RTP))["FORWARDED"] == 1
        assert (await bench.send(RTP))["DROPPED_EARLY"] == 1
        assert bench.handlers[0].heard == []

    bench(scenario)


def test_an_address_is_held_while_its_session_is_alive() -> None:
    async def scenario(bench: Bench) -> None:
        first, second = bench.open(), bench.open()
        await bench.send(check(*first))
        bench.now += mux.ADDRESS_HELD_S - 0.1
        assert (await bench.send(check(*second)))["DROPPED_ADDRESS_HELD"] == 1
        bench.now += 0.2
        assert (await bench.send(check(*second)))["FORWARDED"] == 1
        assert bench.mux._by_client[frame.key(frame.header(*HOME))].agent.ufrags == [
            second[0].encode()
        ]

    bench(scenario)


def test_ice_restart_is_answered_beside_the_old_credentials() -> None:
    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        await bench.send(check(hint, password))
        session = bench.mux._by_ufrag[hint.encode()]
        bench.mux.restart(session, "second", b"second password", ("c", "q"))
        for pair in ((hint, password), ("second", b"second password")):
            assert (await bench.send(check(*pair), MOBILE))["FORWARDED"] == 1
        assert session.agent.active is not None
        assert session.agent.active.header == frame.header(*MOBILE)
        bench.mux.restart(session, "third", b"third password", ("c", "q"))
        assert (await bench.send(check(hint, password)))["DROPPED_UNKNOWN_SESSION"] == 1

    bench(scenario)


async def a_checked_session(bench: Bench) -> tuple[peer.Peer, tuple[str, bytes]]:
    """A session whose client has come by the first relay, and what it answers to."""
    pair = bench.open()
    await bench.send(check(*pair))
    found = bench.mux._by_ufrag[pair[0].encode()]
    bench.received()
    return found, pair


def checks(bench: Bench) -> list[bytes]:
    """Of what came back to the relay, STUN: DTLS sends its flight again and again."""
    return [each for each in bench.received() if stun.kind(each[32]) is stun.Kind.STUN]


def asked(bench: Bench, session: peer.Peer) -> bytes:
    """The session's sweep at a moment when a check of ours is due: what the relay gets."""
    bench.now += paths.PERIOD_S
    before = bench.counters[Count.CHECKS_SENT]
    bench.mux.tend(session, bench.now)
    assert bench.counters[Count.CHECKS_SENT] == before + 1
    (found,) = checks(bench)
    assert found[:32] == frame.header(*HOME)
    return found[32:]


def test_a_check_of_ours_is_answered_and_nothing_moves() -> None:
    async def scenario(bench: Bench) -> None:
        session, pair = await a_checked_session(bench)
        await bench.send(check(*pair), MOBILE)
        bench.received()
        active = session.agent.active
        bench.now += paths.PERIOD_S
        bench.mux.tend(session, bench.now)
        framed = {each[:32]: each[32:] for each in checks(bench)}
        assert framed.keys() == {frame.header(*HOME), frame.header(*MOBILE)}
        request = stun.read_request(framed[frame.header(*HOME)])
        assert isinstance(request, stun.Request)
        assert request.username == f"{OFFER.ufrag}:{pair[0]}".encode()
        password = OFFER.password.encode()
        answer = stun.success(request.transaction_id, "203.0.113.1", 3478, password)
        assert await bench.send(answer) == {"FORWARDED": 1, "CHECKS_ANSWERED": 1}
        assert session.agent.active == active
        assert session.agent.heard_at == bench.now
        assert checks(bench) == []

    bench(scenario)


def test_answers_that_are_none_end_in_counters_of_their_own() -> None:
    async def scenario(bench: Bench) -> None:
        session, _ = await a_checked_session(bench)
        password = OFFER.password.encode()
        transaction_id = asked(bench, session)[8:20]
        forged = stun.success(transaction_id, *HOME, b"guessed")
        assert await bench.send(forged) == {"DROPPED_BAD_INTEGRITY": 1}
        unasked = stun.success(os.urandom(12), *HOME, password)
        assert await bench.send(unasked) == {"DROPPED_STUN_UNASKED": 1}
        good = stun.success(transaction_id, *HOME, password)
        assert await bench.send(good, MOBILE) == {"DROPPED_UNKNOWN_CLIENT": 1}
        assert await bench.send(good[:-1]) == {"DROPPED_STUN_MALFORMED": 1}
        for code in (400, 401, 487):
            refused = stun.error(transaction_id, code, "no", b"")
            assert await bench.send(refused) == {"FORWARDED": 1, "CHECKS_REFUSED": 1}
        assert await bench.send(good) == {"FORWARDED": 1, "CHECKS_ANSWERED": 1}
        assert checks(bench) == []
        assert bench.handlers[0].heard == []

    bench(scenario)


def test_an_answer_by_another_relay_is_none() -> None:
    async def scenario(bench: Bench) -> None:
        session, _ = await a_checked_session(bench)
        transaction_id = asked(bench, session)[8:20]
        good = stun.success(transaction_id, *HOME, OFFER.password.encode())
        other = shim.udp_socket()
        try:
            framed = frame.header(*HOME) + good
            assert await bench.send_raw(framed, other) == {"DROPPED_STUN_UNASKED": 1}
        finally:
            other.close()
        assert await bench.send(good) == {"FORWARDED": 1, "CHECKS_ANSWERED": 1}

    bench(scenario)


def test_a_closed_session_leaves_nothing_behind() -> None:
    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        await bench.send(check(hint, password))
        await bench.mux._by_ufrag[hint.encode()].close()
        assert bench.mux._by_ufrag == {}
        assert bench.mux._by_client == {}
        assert (await bench.send(check(hint, password))) == {"DROPPED_UNKNOWN_SESSION": 1}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    bench(scenario)


def test_a_fault_ends_the_session_that_met_it_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(bench: Bench) -> None:
        unlucky, other = bench.open(), bench.open()
        await bench.send(check(*unlucky), HOME)
        await bench.send(check(*other), MOBILE)
        victim = bench.mux._by_ufrag[unlucky[0].encode()]

        def broken(*_: Any) -> Count:
            raise RuntimeError("a mistake of ours")

        monkeypatch.setattr(victim, "receive_srtp", broken)
        assert (await bench.send(RTP, HOME))["DROPPED_FAULT"] == 1
        assert bench.handlers[0].heard == ["lost a fault in the server"]
        assert (await bench.send(RTP, HOME))["DROPPED_UNKNOWN_CLIENT"] == 1
        assert (await bench.send(RTP, MOBILE))["FORWARDED"] == 1
        assert bench.handlers[1].heard == []
        assert "a mistake of ours" in caplog.text
        await victim.close()

    bench(scenario)


def test_any_octets_are_survived() -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        good = check(hint, password)
        await bench.send(good)
        for _ in range(1500):
            octets = bytearray(chance.choice((good, RTP, DTLS, chance.randbytes(80))))
            for _ in range(chance.randrange(4)):
                octets[chance.randrange(len(octets))] = chance.randrange(256)
            del octets[chance.randrange(len(octets)) + 1 :]
            client = chance.choice((HOME, MOBILE))
            raw = bytes(octets) if chance.random() < 0.1 else frame.header(*client) + bytes(octets)
            moved = await bench.send_raw(raw)
            assert "DROPPED_FAULT" not in moved
        bench.received()
        assert (await bench.send(check(hint, password)))["FORWARDED"] >= 1

    bench(scenario)


def test_the_certificate_is_renewed_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(bench: Bench) -> None:
        first = bench.mux.certificate
        assert bench.mux.certificate is first
        monkeypatch.setattr(mux, "CERTIFICATE_RENEWED_BEFORE", datetime.timedelta(days=31))
        assert bench.mux.certificate.sha256 != first.sha256

    bench(scenario)


def test_dtls_that_its_session_does_not_keep_up_with_is_dropped() -> None:
    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        await bench.send(check(hint, password))
        session = bench.mux._by_ufrag[hint.encode()]
        session._finished = True
        outcomes = [
            session.receive_dtls(DTLS, frame.header(*HOME), ())
            for _ in range(peer.INBOX_DATAGRAMS_MAX + 1)
        ]
        assert set(outcomes[:-1]) == {Count.FORWARDED}
        assert outcomes[-1] is Count.DROPPED_BACKLOG

    bench(scenario)


def test_dtls_before_the_handshake_is_over_has_a_rate() -> None:
    """A handshake needs ten records; aiortc's way of waiting for one makes each of them dear."""

    async def scenario(bench: Bench) -> None:
        hint, password = bench.open()
        await bench.send(check(hint, password))
        session = bench.mux._by_ufrag[hint.encode()]
        for _ in range(2):
            session._inbox.clear()
            outcomes = [session.receive_dtls(DTLS, frame.header(*HOME), ()) for _ in range(120)]
            assert outcomes.count(Count.FORWARDED) == peer.HANDSHAKE_RECORDS_PER_S_MAX
            assert outcomes[-1] is Count.DROPPED_BACKLOG
            bench.now += 1.0

    bench(scenario)


def test_what_the_kernel_refuses_is_counted() -> None:
    async def scenario(bench: Bench) -> None:
        bench.mux.send(frame.header(*HOME), b"", ("127.0.0.1", 0))  # sendto(2): EINVAL
        assert bench.counters[Count.SEND_FAILED] == 1

    bench(scenario)
