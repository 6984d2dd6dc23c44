"""Hold: a call's first answers wait until its client has asked at a second site, not for long."""

import asyncio
import os
from collections.abc import Iterator

import pytest
from aiortc.mediastreams import AudioStreamTrack

import frame
import hold
import ice
import ledger
import mux
import opening
import sdp
import stun
from metrics import Transceiver as Count

from . import shim, test_peer
from .test_mux import DTLS, OFFER, Recorder

OURS = (b"APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN")
THEIRS = (b"abcd", b"p" * 22)
HOME = frame.header("192.0.2.1", 40_000)
STAMPED = HOME[:28] + b"\x01\x02\x03\x04"
"""The same address by another entrance, whose stamp it bears, to the same relay of a cluster."""
SIX = frame.header("2001:db8::1", 40_000)
NEAR, FAR = ("10.0.0.1", 3500), ("10.0.0.2", 3500)
INTERVAL_S = 0.048
"""libwebrtc's, between two checks."""


class Call:
    """An agent that holds, and the client's checks."""

    def __init__(self, *, holds: bool = True) -> None:
        self.agent = ice.Agent(*OURS, THEIRS, holds)

    def check(
        self,
        now: float,
        header: bytes = HOME,
        relay: ice.Sockaddr = NEAR,
        transaction_id: bytes = b"",
        ufrag: bytes = OURS[0],
        password: bytes = OURS[1],
    ) -> tuple[bytes, bytes]:
        """A check, and the answer that is given at once: both transaction ids."""
        drawn = transaction_id or os.urandom(12)
        name = f"{ufrag.decode()}:{THEIRS[0].decode()}"
        datagram = stun.request(drawn, name, password)
        request = stun.read_request(datagram)
        assert isinstance(request, stun.Request)
        checked = self.agent.check(datagram, request, header, relay, now)
        assert checked.verdict is ice.Verdict.ANSWERED
        return drawn, checked.response[8:20]

    def held(self, now: float, header: bytes = HOME, relay: ice.Sockaddr = NEAR) -> bytes:
        """A check whose answer is held: its transaction id."""
        drawn, answered = self.check(now, header, relay)
        assert answered == b""
        return drawn

    def due(self, now: float) -> list[tuple[ice.Path, bytes]]:
        """What leaves: whereto, and the transaction ids."""
        found = self.agent.due(now)
        for path, response in found:
            drawn, (host, port) = response[8:20], frame.client(path.header)
            assert response == stun.success(drawn, host, port, OURS[1])
        return [(path, response[8:20]) for path, response in found]

    def answers_at_once(self, now: float) -> bool:
        drawn, answered = self.check(now)
        return drawn == answered and self.agent.due_at is None


@pytest.mark.parametrize("second", [(HOME, FAR), (STAMPED, NEAR)], ids=["relay", "entrance"])
def test_a_check_at_a_second_site_lets_both_answers_go(second: tuple[bytes, ice.Sockaddr]) -> None:
    call = Call()
    first = call.held(1.0)
    assert call.due(1.0) == []
    assert call.agent.active == ice.Path(HOME, NEAR), "all else is as ever"
    other = call.held(1.0 + INTERVAL_S, *second)
    both = [(ice.Path(HOME, NEAR), first), (ice.Path(*second), other)]
    assert call.due(1.0 + INTERVAL_S) == both
    assert call.agent.due_at is None
    assert call.due(2.0) == []
    assert call.answers_at_once(2.0)


def test_who_checks_only_one_way_waits_once() -> None:
    call = Call()
    drawn = [call.held(1.0), call.held(1.0 + INTERVAL_S)]
    assert call.agent.due_at == 1.0 + hold.HOLD_S
    assert hold.HOLD_S > INTERVAL_S
    assert call.due(1.0 + hold.HOLD_S - 0.001) == []
    left = call.due(1.0 + hold.HOLD_S)
    assert left == [(ice.Path(HOME, NEAR), each) for each in drawn], "in their order"
    assert call.answers_at_once(1.1)


def test_a_check_that_comes_again_is_answered_once_and_later_by_nothing() -> None:
    call = Call()
    first = call.held(1.0)
    assert call.check(1.03, transaction_id=first)[1] == b""
    assert call.check(1.05, relay=FAR, transaction_id=first)[1] == b"", "somebody copied it"
    assert call.agent.due_at == 1.0 + hold.HOLD_S
    left = call.due(1.0 + hold.HOLD_S)
    assert left == [(ice.Path(HOME, relay), first) for relay in (NEAR, FAR)]
    assert call.check(1.5, transaction_id=first)[1] == first, "as ever"


def test_the_other_family_is_no_second_site_but_shows_that_more_checks_come() -> None:
    """Chromium's order with two sites in two families: each pair 48 ms after the one before."""
    call = Call()
    sites = [(SIX, NEAR), (HOME, NEAR), (SIX, FAR)]
    for number, (header, relay) in enumerate(sites):
        now = 1.0 + number * INTERVAL_S
        assert call.due(now) == []
        call.held(now, header, relay)
    assert [path for path, _ in call.due(now)] == [ice.Path(*each) for each in sites]


def test_nothing_waits_long_whatever_the_client_does() -> None:
    call = Call()
    for number in range(100):
        now = 1.0 + number * hold.HOLD_S * 0.9
        call.check(now, frame.header("192.0.2.1", 40_000 + number))
        latest = call.agent.due_at
        assert latest is None or latest <= 1.0 + hold.ADDRESSES_MAX * hold.HOLD_S
        if call.due(now):
            break
    assert number == hold.ADDRESSES_MAX + 1, "at the first check after that"


def test_so_many_are_held_and_no_more() -> None:
    call = Call()
    for _ in range(hold.HELD_MAX):
        call.held(1.0)
        assert call.due(1.0) == []
    call.held(1.0)
    assert len(call.due(1.0)) == hold.HELD_MAX + 1
    assert call.answers_at_once(1.0)


def test_nothing_else_is_held() -> None:
    call = Call()
    name = f"{OURS[0].decode()}:abcd"
    controlled = stun.request(
        bytes(12), name, OURS[1], use_candidate=False, priority=1, tie_breaker=1, controlled=True
    )
    for datagram in (controlled, stun.request(bytes(12), name, b"wrong")):
        request = stun.read_request(datagram)
        assert isinstance(request, stun.Request)
        checked = call.agent.check(datagram, request, HOME, NEAR, 1.0)
        assert checked.verdict in (ice.Verdict.CONFLICT, ice.Verdict.FORGED)
        assert bool(checked.response) == (checked.verdict is ice.Verdict.CONFLICT)
        assert call.agent.due_at is None


def test_a_restart_of_a_call_is_answered_at_once_and_one_before_it_as_the_call_would() -> None:
    anew, password = b"another", b"w" * 24
    for began in (True, False):
        call = Call()
        if began:
            call.held(1.0)
            call.due(2.0)
        call.agent.restart(anew, password, (b"efgh", b"q" * 22))
        drawn, answered = call.check(3.0, ufrag=anew, password=password)
        assert answered == (drawn if began else b"")
        assert (call.agent.due_at is None) == began


def test_an_agent_that_does_not_hold_answers_at_once() -> None:
    call = Call(holds=False)
    for now, relay in ((1.0, NEAR), (1.0, FAR), (1.0 + INTERVAL_S, NEAR)):
        drawn, answered = call.check(now, relay=relay)
        assert drawn == answered
        assert call.agent.due_at is None
    assert call.due(2.0) == []


@pytest.mark.parametrize(
    ("hosts", "holds"),
    [
        (["192.0.2.1"], False),
        (["192.0.2.1", "2001:db8::1"], False),
        (["192.0.2.1", "192.0.2.1"], False),
        (["192.0.2.1", "192.0.2.2"], True),
        (["2001:db8::1", "192.0.2.1", "2001:db8::2"], True),
    ],
)
def test_it_takes_two_hosts_of_one_family(hosts: list[str], holds: bool) -> None:
    named = tuple((host, 3478 + at) for at, host in enumerate(hosts))
    assert opening.Opening("", None, named).second_site is holds


class Bench:
    """A mux whose clock stands still, and two relays."""

    def __init__(self) -> None:
        self.now, self.counters, self.sock = 100.0, ledger.Counters(Count), shim.udp_socket()
        self.relays = [shim.udp_socket(), shim.udp_socket()]
        self.mux = mux.Mux(self.sock, lambda _: True, self.counters, lambda: self.now)
        self.calls = {name: self.open(name) for name in ("one", "two", "three")}

    def open(self, name: str) -> mux.Peer:
        return self.mux.open(OFFER, name, OURS[1], Recorder(), name != "three")

    async def check(self, name: str, relay: int = 0) -> None:
        """A check of that call's client."""
        request = stun.request(name.encode().ljust(12), f"{name}:abcd", OURS[1])
        header = frame.header("192.0.2.1", 1000 + list(self.calls).index(name))
        before = self.counters[Count.FORWARDED]
        self.relays[relay].sendto(header + request, self.sock.getsockname())
        await shim.until(lambda: self.counters[Count.FORWARDED] > before)

    def answers(self) -> Iterator[tuple[int, str]]:
        """STUN that has come: by which relay, to whose check."""
        for number, relay in enumerate(self.relays):
            while True:
                try:
                    datagram = relay.recv(2048)
                except BlockingIOError:
                    break
                if stun.kind(datagram[32]) is stun.Kind.STUN:
                    yield number, datagram[40:52].decode().strip()

    async def close(self) -> None:
        for call in self.calls.values():
            await call.close()
        self.mux.close()
        for relay in self.relays:
            relay.close()


def test_one_timer_lets_all_go_and_ends_with_them() -> None:
    async def scenario() -> None:
        bench, got = Bench(), list[tuple[int, str]]()
        try:
            await bench.check("three")
            assert list(bench.answers()) == [(0, "three")]
            assert bench.mux._release is None, "it does not hold"
            await bench.check("one")
            timer = bench.mux._release
            assert timer is not None
            bench.now += hold.HOLD_S / 2
            await bench.check("two")
            assert bench.mux._release is timer
            assert list(bench.answers()) == []
            assert bench.calls["one"].checked_at is None, "DTLS begins with the answer"
            bench.now += hold.HOLD_S * 0.6
            await shim.until(lambda: got.extend(bench.answers()) or got)
            assert got == [(0, "one")]
            assert bench.calls["one"].checked_at == bench.now
            assert bench.calls["two"].checked_at is None
            assert bench.mux._release is not None
            bench.now += hold.HOLD_S
            await shim.until(lambda: got.extend(bench.answers()) or len(got) > 1)
            assert got == [(0, "one"), (0, "two")]
            assert (bench.mux._release, bench.mux._holding) == (None, {})
            assert bench.calls["one"].receive_dtls(DTLS, frame.header("192.0.2.1", 1000), ())
        finally:
            await bench.close()

    asyncio.run(scenario())


def test_what_is_held_goes_with_its_session() -> None:
    async def scenario() -> None:
        bench = Bench()
        try:
            await bench.check("one")
            await bench.check("two")
            await bench.calls["one"].close()
            assert list(bench.mux._holding) == [bench.calls["two"]]
        finally:
            await bench.close()
        assert (bench.mux._release, bench.mux._holding) == (None, {})

    asyncio.run(scenario())


def test_a_stock_client_checks_both_relays_and_is_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real sockets: without the hold, aioice checks no second pair where the first is answered."""
    monkeypatch.setattr(hold, "HOLD_S", 3.0)  # a client may be slow on a busy machine

    async def scenario() -> None:
        counters, loop = ledger.Counters(Count), asyncio.get_running_loop()
        sock, handler = shim.udp_socket(), test_peer.Recorder()
        relays = [shim.Shim(sock.getsockname()), shim.Shim(sock.getsockname())]
        came: list[tuple[int, float]] = []
        answered: list[tuple[int, float]] = []
        for number, each in enumerate(relays):

            def up(datagram: bytes, number: int = number) -> bytes:
                came.append((number, loop.time()))
                return datagram

            def down(datagram: bytes, number: int = number) -> bytes:
                if stun.kind(datagram[0]) is stun.Kind.STUN:
                    answered.append((number, loop.time()))
                return datagram

            each.up, each.down = up, down
        found, client = mux.Mux(sock, lambda _: True, counters, loop.time), shim.Client()
        offer = sdp.read_offer(await client.offer(AudioStreamTrack()))
        call = found.open(offer, OURS[0].decode(), OURS[1], handler, True)
        try:
            await client.accept(
                sdp.answer(
                    offer,
                    OURS[0].decode(),
                    OURS[1].decode(),
                    fingerprint=call.certificate.sha256,
                    candidates=[each.address for each in relays],
                    ssrc=7,
                    session_id=1,
                )
            )
            await shim.until(lambda: "opened" in handler.heard and handler.packets)
            second_at = next(at for number, at in came if number != came[0][0])
            print(
                f"second relay checked {1000 * (second_at - came[0][1]):.1f} ms after the first, "
                f"answered after {1000 * (answered[0][1] - came[0][1]):.1f} ms"
            )
            assert answered[0][1] >= second_at, "nothing was answered before"
            assert {number for number, _ in answered} == {0, 1}
            assert found._holding == {}
            await shim.until(lambda: found._release is None)
            assert counters.missing() == 0
        finally:
            await call.close()
            await client.close()
            found.close()
            for each in relays:
                each.close()

    asyncio.run(scenario())
