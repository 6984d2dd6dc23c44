"""Paths: what is asked by which way and when, what counts as an answer, what is forgotten."""

import asyncio
import itertools
import os

import aioice.stun
import pytest
from aiortc.mediastreams import AudioStreamTrack

import frame
import ledger
import mux
import paths
import sdp
import stun
from metrics import Transceiver as Count

from . import shim, test_peer

OURS = (b"APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN")
THEIRS = (b"abcd", b"p" * 22)
HOME = frame.header("192.0.2.1", 40_000)
MOBILE = frame.header("198.51.100.7", 50_000)
NEAR, FAR = ("10.0.0.1", 3500), ("10.0.0.2", 3500)
ONE, OTHER = paths.Path(HOME, NEAR), paths.Path(HOME, FAR)
"""The same client by two sites: its header is the same."""


def kept(*which: paths.Path, now: float = 0.0) -> paths.Paths:
    found = paths.Paths(OURS, THEIRS)
    for path in which or (ONE, OTHER):
        found.checked(path, now)
    return found


def transaction(datagram: bytes) -> bytes:
    return datagram[8:20]


def answer(
    to: paths.Paths,
    request: bytes,
    path: paths.Path,
    now: float,
    password: bytes = THEIRS[1],
    code: int = 0,
) -> paths.Reply:
    """What the client answers; an error if there is a code."""
    if code:
        datagram = stun.error(transaction(request), code, "no", password)
    else:
        datagram = stun.success(transaction(request), "203.0.113.1", 3478, password)
    read = stun.read_answer(datagram)
    assert read is not None
    return to.answered(datagram, read, path, now)


def test_each_path_is_asked_once_a_period_and_by_no_other_way() -> None:
    found = kept()
    assert found.due(paths.PERIOD_S - 0.1) == []
    now, asked = 0.0, []
    for second in range(1, 61):
        now = float(second)
        for path, request in found.due(now):
            asked.append((now, path))
            assert answer(found, request, path, now + 0.2) is paths.Reply.ALIVE
    for path in (ONE, OTHER):
        at = [when for when, which in asked if which == path]
        gaps = [after - before for before, after in itertools.pairwise(at)]
        assert at[0] == paths.PERIOD_S
        assert set(gaps) == {paths.PERIOD_S + 1}, "the first sweep after a period"
    assert {path for _, path in asked} == {ONE, OTHER}


def test_the_clients_own_checks_do_not_spare_a_path_its_request() -> None:
    """Behind a cluster's relay there may be two sites, and the client checks only by one."""
    found = kept(ONE)
    for tenths in range(60):
        found.checked(ONE, tenths / 10)
    assert len(found.due(paths.PERIOD_S)) == 1


def test_two_requests_fit_into_the_time_that_relays_and_browsers_wait() -> None:
    tentative_idle_s, dead_s = 15.0, 30.0
    sweep_s = 1.0
    assert 2 * (paths.PERIOD_S + sweep_s) < tentative_idle_s
    assert paths.PERIOD_S + paths.RETRIES * sweep_s + sweep_s < tentative_idle_s
    assert dead_s <= paths.FORGOTTEN_S


def test_the_request_is_what_a_client_expects_of_a_controlled_agent() -> None:
    (_, request), *_ = kept(ONE).due(paths.PERIOD_S)
    found = stun.read_request(request)
    assert isinstance(found, stun.Request)
    assert found.username == b"abcd:APeT9ekG4r6OlO9+HGsokz4", "the client's ufrag comes first"
    assert stun.check_integrity(request, found, THEIRS[1])
    assert found.controlled == 0
    assert found.controlling is None
    assert not found.use_candidate
    assert found.priority is not None
    assert found.priority < 126 << 24, "less than any host candidate's"
    independent = aioice.stun.parse_message(request)
    assert independent.check_message_integrity(THEIRS[1])
    assert independent.attributes["USERNAME"] == "abcd:APeT9ekG4r6OlO9+HGsokz4"
    assert independent.attributes["PRIORITY"] == paths.PRIORITY
    assert independent.attributes["ICE-CONTROLLED"] == 0
    assert "FINGERPRINT" in independent.attributes


def test_a_lost_request_is_sent_again_before_the_relay_forgets_the_way() -> None:
    found = kept(ONE)
    asked = []
    for second in range(1, 40):
        asked += [(second, request) for _, request in found.due(float(second))]
    assert [second for second, _ in asked] == [6, 7, 8, 9, 15, 21, 27]
    ids = [transaction(request) for _, request in asked]
    assert len(set(ids[:4])) == 1, "the same one again (RFC 8489 section 6.2.1)"
    assert len(set(ids)) == 4, "and then another"
    assert len(found) == 0


def test_an_answer_to_the_first_of_several_sendings_counts() -> None:
    found = kept(ONE)
    ((_, first),) = found.due(6.0)
    ((_, again),) = found.due(7.0)
    assert first == again
    assert answer(found, first, ONE, 7.5) is paths.Reply.ALIVE
    assert answer(found, again, ONE, 7.6) is paths.Reply.ALIVE, "both have arrived"
    assert found.due(13.5) == []
    assert len(found.due(13.7)) == 1


def test_a_path_that_is_silent_is_forgotten_and_asked_no_more() -> None:
    found = kept()
    for second in range(1, 200):
        for path, request in found.due(float(second)):
            if path == ONE:
                assert answer(found, request, path, second + 0.1) is paths.Reply.ALIVE
            else:
                assert second < paths.FORGOTTEN_S
    assert len(found) == 1
    found.checked(OTHER, 200.0)
    assert OTHER in {path for path, _ in found.due(206.0)}, "until the client comes by it again"


def test_a_client_that_checks_and_never_answers_is_asked_seldom() -> None:
    found, asked = kept(ONE), 0
    for second in range(1, 601):
        found.checked(ONE, float(second))
        asked += len(found.due(float(second)))
    assert len(found) == 1
    assert 600 / paths.PERIOD_S <= asked + 1 <= 600 / paths.PERIOD_S + paths.RETRIES


@pytest.mark.parametrize("code", [400, 401, 487])
def test_an_error_is_no_sign_of_life(code: int) -> None:
    found = kept(ONE)
    for second in range(1, 40):
        for path, request in found.due(float(second)):
            assert answer(found, request, path, second + 0.1, code=code) is paths.Reply.REFUSED
            assert answer(found, request, path, second + 0.1, b"", code) is paths.Reply.REFUSED
    assert len(found) == 0


def test_what_is_no_answer_to_what_was_asked_there_counts_for_nothing() -> None:
    found = kept()
    asked = dict(found.due(6.0))
    assert answer(found, asked[ONE], OTHER, 6.1) is paths.Reply.UNASKED
    assert answer(found, asked[ONE], paths.Path(MOBILE, NEAR), 6.1) is paths.Reply.UNASKED
    assert answer(found, bytes(8) + os.urandom(12), ONE, 6.1) is paths.Reply.UNASKED
    assert answer(found, asked[ONE], ONE, 6.1, b"guessed") is paths.Reply.FORGED
    bare = b"\x01\x01\0\0" + asked[ONE][4:20]
    read = stun.read_answer(bare)
    assert read is not None
    assert found.answered(bare, read, ONE, 6.1) is paths.Reply.FORGED, "without any integrity"
    assert [path for path, _ in found.due(7.0)] == [ONE, OTHER]


def test_an_old_answer_is_not_taken_twice() -> None:
    found = kept(ONE)
    ((_, request),) = found.due(6.0)
    assert answer(found, request, ONE, 6.1) is paths.Reply.ALIVE
    ((_, second),) = found.due(13.0)
    assert transaction(second) != transaction(request)
    assert answer(found, request, ONE, 13.1) is paths.Reply.UNASKED


def test_before_anything_is_asked_nothing_is_an_answer() -> None:
    found = kept(ONE)
    nothing = bytes(20)
    assert answer(found, nothing, ONE, 1.0) is paths.Reply.UNASKED


def test_paths_are_bounded_and_the_longest_silent_goes() -> None:
    found = kept(ONE, now=0.0)
    for number in range(1, 100):
        found.checked(ONE, number + 0.5)
        found.checked(paths.Path(HOME, ("10.0.0.9", number)), float(number))
    assert len(found) == paths.PATHS_MAX
    relays = [path.relay for path, _ in found.due(100.0)]
    assert relays[0] == NEAR
    assert len(relays) <= paths.PATHS_MAX


def test_an_address_is_forgotten_with_all_its_relays() -> None:
    found = kept(ONE, OTHER, paths.Path(MOBILE, FAR))
    found.forget(frame.key(HOME))
    assert [path for path, _ in found.due(6.0)] == [paths.Path(MOBILE, FAR)]
    found.clear()
    assert found.due(6.5) == []


def test_a_stock_client_answers_by_both_relays_and_its_call_goes_on() -> None:
    """aiortc behind two relays: its header is the same by both."""

    async def scenario() -> None:
        counters, loop = ledger.Counters(Count), asyncio.get_running_loop()
        sock, handler = shim.udp_socket(), test_peer.Recorder()
        both = [shim.Shim(sock.getsockname()), shim.Shim(sock.getsockname())]
        found = mux.Mux(sock, lambda host: host == "127.0.0.1", counters, loop.time)
        client = shim.Client()
        offer = sdp.read_offer(await client.offer(AudioStreamTrack()))
        call = found.open(offer, OURS[0].decode(), OURS[1], handler)
        came: set[int] = set()

        def coming(number: int) -> None:
            def up(datagram: bytes) -> bytes:
                came.add(number)
                return datagram

            def down(datagram: bytes) -> bytes | None:
                # The first to be answered is all that aioice checks: both have come before.
                return datagram if len(came) == len(both) else None

            both[number].up, both[number].down = up, down

        for number in range(len(both)):
            coming(number)
        try:
            await client.accept(
                sdp.answer(
                    offer,
                    OURS[0].decode(),
                    OURS[1].decode(),
                    fingerprint=call.certificate.sha256,
                    candidates=[each.address for each in both],
                    ssrc=7,
                    session_id=1,
                )
            )
            await shim.until(lambda: "opened" in handler.heard and handler.packets)
            home = call.agent.active
            assert home is not None
            asked: list[bytes] = []

            def seen(datagram: bytes) -> bytes:
                request = stun.read_request(datagram)
                if isinstance(request, stun.Request):
                    client_password = offer.password.encode()
                    assert stun.check_integrity(datagram, request, client_password)
                    asked.append(request.username)
                return datagram

            for each in both:
                each.down = seen
            call.sweep(loop.time() + paths.PERIOD_S)
            await shim.until(lambda: counters[Count.CHECKS_ANSWERED] == 2)
            assert asked == [f"{offer.ufrag}:{OURS[0].decode()}".encode()] * 2
            assert counters[Count.CHECKS_SENT] == 2
            before = len(handler.packets)
            await shim.until(lambda: len(handler.packets) > before + 10)
            assert not any(heard.startswith("lost") for heard in handler.heard)
            assert (counters.missing(), counters[Count.CHECKS_REFUSED]) == (0, 0)
        finally:
            await call.close()
            await client.close()
            found.close()
            for each in both:
                each.close()

    asyncio.run(scenario())
