"""The server's ICE agent: what it answers, where it sends, when it moves."""

import os

import pytest

import frame
import ice
import stun

UFRAG, PASSWORD = "APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN"
HOME = frame.header("192.0.2.1", 40_000)
MOBILE = frame.header("198.51.100.7", 50_000)
RELAY, OTHER_RELAY = ("10.0.0.1", 3500), ("10.0.0.2", 3500)


def agent() -> ice.Agent:
    return ice.Agent(UFRAG.encode(), PASSWORD)


def check(
    to: ice.Agent,
    header: bytes = HOME,
    relay: ice.Sockaddr = RELAY,
    now: float = 0.0,
    *,
    ufrag: str = UFRAG,
    password: bytes = PASSWORD,
    use_candidate: bool = True,
    transaction_id: bytes | None = None,
) -> ice.Checked:
    datagram = stun.request(
        transaction_id or os.urandom(12),
        f"{ufrag}:client",
        password,
        use_candidate=use_candidate,
    )
    request = stun.read_request(datagram)
    assert isinstance(request, stun.Request)
    return to.check(datagram, request, header, relay, now)


def test_the_first_check_completes() -> None:
    server = agent()
    assert server.active is None
    assert server.heard_at is None
    checked = check(server, now=5.0)
    assert checked.verdict is ice.Verdict.ANSWERED
    assert server.active == ice.Path(HOME, RELAY)
    assert server.heard_at == 5.0
    assert server.keys == [frame.key(HOME)]


def test_the_answer_names_the_clients_own_address() -> None:
    transaction_id = bytes(12)
    checked = check(agent(), transaction_id=transaction_id)
    assert checked.response == stun.success(transaction_id, "192.0.2.1", 40_000, PASSWORD)


def test_a_check_without_use_candidate_is_answered_and_completes() -> None:
    server = agent()
    assert check(server, use_candidate=False).verdict is ice.Verdict.ANSWERED
    assert server.active == ice.Path(HOME, RELAY)


@pytest.mark.parametrize(
    ("ufrag", "password", "verdict"),
    [
        (UFRAG, b"wrong", ice.Verdict.FORGED),
        ("unknown", PASSWORD, ice.Verdict.UNKNOWN_UFRAG),
    ],
)
def test_what_does_not_authenticate_has_no_effect(
    ufrag: str, password: bytes, verdict: ice.Verdict
) -> None:
    server = agent()
    assert check(server, ufrag=ufrag, password=password) == ice.Checked(verdict)
    assert server.active is None
    assert server.heard_at is None
    assert server.keys == []


def test_a_client_that_is_controlled_too_is_told_to_switch() -> None:
    datagram = bytearray(stun.request(bytes(12), f"{UFRAG}:c", PASSWORD))
    # ICE-CONTROLLING becomes ICE-CONTROLLED; what authenticates it is made anew below.
    at = datagram.index(b"\x80\x2a")
    body = datagram[20:at] + b"\x80\x29" + datagram[at + 2 : datagram.index(b"\x00\x08\x00\x14")]
    message = stun._message(0x0001, bytes(12), bytes(body), PASSWORD)
    request = stun.read_request(message)
    assert isinstance(request, stun.Request)
    assert request.controlled is not None
    server = agent()
    checked = server.check(message, request, HOME, RELAY, 0.0)
    assert checked.verdict is ice.Verdict.CONFLICT
    assert checked.response == stun.error(bytes(12), 487, "Role Conflict", PASSWORD)
    assert server.active is None


def test_use_candidate_moves_at_once() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    check(server, MOBILE, now=0.01)
    assert server.active == ice.Path(MOBILE, RELAY)


def test_without_use_candidate_only_silence_moves() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    server.media(HOME, RELAY, 1.0)
    check(server, MOBILE, now=1.0 + ice.SILENT_S - 0.01, use_candidate=False)
    assert server.active == ice.Path(HOME, RELAY)
    check(server, MOBILE, now=1.0 + ice.SILENT_S, use_candidate=False)
    assert server.active == ice.Path(MOBILE, RELAY)


def test_media_moves_to_a_verified_address() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    check(server, MOBILE, now=0.1, use_candidate=False)
    server.media(MOBILE, RELAY, 0.12)
    assert server.active == ice.Path(MOBILE, RELAY)
    assert server.heard_at == 0.12


def test_media_from_an_address_without_a_check_moves_nothing() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    server.media(MOBILE, RELAY, 0.1)
    assert server.active == ice.Path(HOME, RELAY)
    assert server.keys == [frame.key(HOME)]


def test_another_relay_is_only_a_new_return_address() -> None:
    server = agent()
    check(server, HOME, RELAY, now=0.0)
    server.media(HOME, OTHER_RELAY, 0.1)
    assert server.active == ice.Path(HOME, OTHER_RELAY)
    assert server.keys == [frame.key(HOME)]


def test_a_replayed_check_moves_nothing() -> None:
    server = agent()
    recorded = bytes(range(12))
    check(server, HOME, now=0.0, transaction_id=recorded)
    checked = check(server, MOBILE, now=60.0, transaction_id=recorded)
    assert checked == ice.Checked(ice.Verdict.REPLAYED)
    assert server.active == ice.Path(HOME, RELAY)
    # The client itself may repeat a check that it thinks is lost (RFC 8489 section 6.2.1).
    again = check(server, HOME, now=60.1, transaction_id=recorded)
    assert again.verdict is ice.Verdict.ANSWERED


def test_transactions_are_bounded() -> None:
    server = agent()
    for number in range(ice.TRANSACTIONS_MAX * 2):
        check(server, transaction_id=number.to_bytes(12, "big"))
    assert len(server._transactions) == ice.TRANSACTIONS_MAX


def test_addresses_are_bounded_and_the_longest_silent_goes() -> None:
    server = agent()
    headers = [frame.header("192.0.2.9", port) for port in range(1, ice.PATHS_MAX + 2)]
    for now, header in enumerate(headers):
        forgotten = check(server, header, now=float(now)).forgotten
    assert forgotten == frame.key(headers[0])
    assert server.keys == [frame.key(header) for header in headers[1:]]
    assert server.active == ice.Path(headers[-1], RELAY)


def test_the_active_address_stays_when_room_is_made() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    for port in range(1, ice.PATHS_MAX + 4):
        check(server, frame.header("192.0.2.9", port), now=0.001 * port, use_candidate=False)
    assert server.active == ice.Path(HOME, RELAY)
    assert frame.key(HOME) in server.keys
    assert len(server.keys) == ice.PATHS_MAX


def test_restart_accepts_the_new_pair_and_for_a_while_the_old_one() -> None:
    server = agent()
    check(server, HOME)
    assert server.restart(b"second", b"second password") is None
    assert server.active == ice.Path(HOME, RELAY)
    both = [(UFRAG, PASSWORD), ("second", b"second password")]
    for ufrag, password in both:
        checked = check(server, MOBILE, ufrag=ufrag, password=password)
        assert checked.verdict is ice.Verdict.ANSWERED
    assert server.restart(b"third", b"third password") == UFRAG.encode()
    assert check(server).verdict is ice.Verdict.UNKNOWN_UFRAG
    assert server.ufrags == [b"second", b"third"]


def test_a_forgotten_address_is_no_longer_used() -> None:
    server = agent()
    check(server, HOME)
    server.forget(frame.key(HOME))
    assert server.active is None
    assert server.keys == []
    assert server.quiet_s(frame.key(HOME), 1.0) is None


def test_a_flight_is_sent_again_until_it_is_replaced_or_done() -> None:
    flight = ice.Flight()
    assert flight.wakes_at is None
    flight.sent(b"hello", 10.0)
    assert flight.due(10.05) == []
    now, sent = 10.0, []
    while flight.wakes_at is not None:
        sent.append(round(flight.wakes_at - now, 3))
        now = flight.wakes_at
        assert flight.due(now) == [b"hello"]
    assert sent == [0.1, 0.2, 0.4, 0.8]

    flight.answered()
    flight.sent(b"finished", 20.0)
    flight.sent(b"finished, the rest", 20.0)
    assert flight.due(20.1) == [b"finished", b"finished, the rest"]
    flight.done()
    assert flight.wakes_at is None
    assert flight.due(21.0) == []


def test_an_answer_alone_does_not_stop_a_flight() -> None:
    """It may be the repetition of an older one: OpenSSL would then wait a second."""
    flight = ice.Flight()
    flight.sent(b"hello", 0.0)
    flight.answered()
    assert flight.due(0.1) == [b"hello"]


def test_a_flight_is_bounded() -> None:
    flight = ice.Flight()
    for number in range(100):
        flight.sent(bytes([number]), 0.0)
    assert len(flight.due(0.1)) == ice.FLIGHT_DATAGRAMS_MAX
