"""The server's ICE agent: what it answers, where it sends, when it moves."""

import os

import pytest

import frame
import ice
import paths
import stun

UFRAG, PASSWORD = "APeT9ekG4r6OlO9+HGsokz4", b"Z4K/XErQpQxJ6rgyZhiW2+BN"
HOME = frame.header("192.0.2.1", 40_000)
MOBILE = frame.header("198.51.100.7", 50_000)
CLIENT = (b"client", b"of the client")
RELAY, OTHER_RELAY = ("10.0.0.1", 3500), ("10.0.0.2", 3500)


def agent() -> ice.Agent:
    return ice.Agent(UFRAG.encode(), PASSWORD, CLIENT)


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


def test_media_from_an_unknown_address_moves_nothing() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    server.media(MOBILE, RELAY, 0.1)
    assert server.active == ice.Path(HOME, RELAY)
    assert server.keys == [frame.key(HOME)]
    assert server.heard_at == 0.1, "but it shows that the client is there"


def learned(header: bytes = MOBILE, now: float = 1.02) -> ice.Agent:
    """An agent that has heard its client at home, and then once from an unchecked address."""
    server = agent()
    check(server, HOME, now=0.0)
    server.media(HOME, RELAY, 1.0)
    server.media(header, RELAY, now)
    assert server.learn(frame.key(header), now) is None
    return server


def test_an_unchecked_address_is_followed_once_it_is_the_only_one_heard() -> None:
    server = learned()
    for packet in range(1, 3):
        server.media(MOBILE, RELAY, 1.02 + 0.02 * packet)
        assert server.active == ice.Path(HOME, RELAY)
    server.media(MOBILE, RELAY, 1.02 + ice.FOLLOWED_S)
    assert server.active == ice.Path(MOBILE, RELAY)
    server.media(MOBILE, OTHER_RELAY, 1.2)
    assert server.active == ice.Path(MOBILE, OTHER_RELAY)


@pytest.mark.parametrize("sign", ["media", "copied", "check"])
def test_a_sign_of_life_keeps_the_session_where_it_is(sign: str) -> None:
    """Whoever copies packets and is faster than the originals is not followed."""
    server = learned()
    for packet in range(1, 100):
        now = 1.02 + 0.02 * packet
        server.media(MOBILE, RELAY, now)
        if sign == "media":
            server.media(HOME, RELAY, now + 0.005)
        elif sign == "copied":
            server.copied(HOME, RELAY, now + 0.005)
        else:
            check(server, HOME, now=now + 0.005, use_candidate=False)
        assert server.active == ice.Path(HOME, RELAY)


def test_after_a_pause_the_first_packet_alone_is_not_followed() -> None:
    """With discontinuous transmission a client is silent for 400 ms: a copy may come first."""
    server = learned()
    for packet in range(1, 20):
        server.media(MOBILE, RELAY, 1.02 + 0.4 * packet)
        server.copied(HOME, RELAY, 1.03 + 0.4 * packet)
        assert server.active == ice.Path(HOME, RELAY)


def test_the_original_brings_back_a_session_that_followed_a_copy() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    assert server.active == ice.Path(MOBILE, RELAY)
    server.copied(HOME, OTHER_RELAY, 1.11)
    assert server.active == ice.Path(HOME, OTHER_RELAY)
    server.media(MOBILE, RELAY, 1.12)
    assert server.active == ice.Path(HOME, OTHER_RELAY)


def test_a_copy_moves_nothing_that_a_check_has_verified() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    check(server, MOBILE, now=1.2)
    server.copied(HOME, RELAY, 1.3)
    assert server.active == ice.Path(MOBILE, RELAY)
    server.copied(frame.header("192.0.2.77", 7), RELAY, 1.3)
    assert server.active == ice.Path(MOBILE, RELAY)


def test_media_from_a_verified_address_outweighs_an_unchecked_one() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    server.media(HOME, RELAY, 1.11)
    assert server.active == ice.Path(HOME, RELAY)


def test_an_unchecked_address_has_a_limit_in_time_and_no_second_chance() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    assert server.sweep(1.02 + ice.UNCHECKED_S_MAX - 0.01) == []
    assert server.active == ice.Path(MOBILE, RELAY)
    assert server.sweep(1.02 + ice.UNCHECKED_S_MAX) == [frame.key(MOBILE)]
    assert server.active == ice.Path(HOME, RELAY)
    server.learn(frame.key(MOBILE), 20.0)
    server.media(MOBILE, RELAY, 30.0)
    assert not server.knows(frame.key(MOBILE))
    assert server.active == ice.Path(HOME, RELAY)
    check(server, MOBILE, now=31.0)
    assert server.active == ice.Path(MOBILE, RELAY)


def test_without_a_verified_address_left_nothing_is_sent() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    server.forget(frame.key(HOME))
    server.sweep(60.0)
    assert server.active is None


def test_a_check_makes_an_unchecked_address_a_verified_one() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    check(server, MOBILE, now=2.0, use_candidate=False)
    assert server.active == ice.Path(MOBILE, RELAY)
    assert server.sweep(100.0) == []
    assert sorted(server.keys) == sorted([frame.key(HOME), frame.key(MOBILE)])


def test_unchecked_addresses_are_bounded_and_the_one_in_use_stays() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    forgotten = []
    for port in range(1, 50):
        forgotten.append(server.learn(frame.key(frame.header("192.0.2.9", port)), 1.2))
    assert len(server.keys) == 1 + ice.UNCHECKED_MAX
    assert server.knows(frame.key(MOBILE))
    assert server.active == ice.Path(MOBILE, RELAY)
    gone = [frame.key(frame.header("192.0.2.9", port)) for port in range(1, 49)]
    assert forgotten == [None, *gone]
    for minute in range(1, 100):
        server.learn(frame.key(frame.header("192.0.2.10", minute)), 60.0 * minute)
        server.sweep(60.0 * minute + 59)
    assert len(server._expired) == ice.EXPIRED_MAX


def test_an_unchecked_address_counts_for_nobody_else() -> None:
    server = learned()
    server.media(MOBILE, RELAY, 1.1)
    assert server.quiet_s(frame.key(MOBILE), 1.2) is None
    server.forget(frame.key(MOBILE))
    assert server.active is None
    assert not server.knows(frame.key(MOBILE))


def test_dtls_is_taken_from_verified_addresses_and_from_the_one_in_use() -> None:
    server = learned()
    assert server.converses(HOME)
    assert not server.converses(MOBILE), "room for DTLS is short, and a copied packet cheap"
    server.media(MOBILE, RELAY, 1.1)
    assert server.converses(MOBILE)
    assert server.converses(HOME)


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
    headers = [frame.header("192.0.2.9", port) for port in range(1, ice.ADDRESSES_MAX + 2)]
    for now, header in enumerate(headers):
        forgotten = check(server, header, now=float(now)).forgotten
    assert forgotten == frame.key(headers[0])
    assert server.keys == [frame.key(header) for header in headers[1:]]
    assert server.active == ice.Path(headers[-1], RELAY)


def test_the_active_address_stays_when_room_is_made() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    for port in range(1, ice.ADDRESSES_MAX + 4):
        check(server, frame.header("192.0.2.9", port), now=0.001 * port, use_candidate=False)
    assert server.active == ice.Path(HOME, RELAY)
    assert frame.key(HOME) in server.keys
    assert len(server.keys) == ice.ADDRESSES_MAX


def test_restart_accepts_the_new_pair_and_for_a_while_the_old_one() -> None:
    server = agent()
    check(server, HOME)
    assert server.restart(b"second", b"second password", CLIENT) is None
    assert server.active == ice.Path(HOME, RELAY)
    both = [(UFRAG, PASSWORD), ("second", b"second password")]
    for ufrag, password in both:
        checked = check(server, MOBILE, ufrag=ufrag, password=password)
        assert checked.verdict is ice.Verdict.ANSWERED
    assert server.restart(b"third", b"third password", CLIENT) == UFRAG.encode()
    assert check(server).verdict is ice.Verdict.UNKNOWN_UFRAG
    assert server.ufrags == [b"second", b"third"]


def test_restarts_that_nobody_follows_leave_the_pair_in_use() -> None:
    server = agent()
    check(server, HOME)
    assert server.restart(b"second", b"second password", CLIENT) is None
    assert server.restart(b"third", b"third password", CLIENT) == b"second"
    assert server.restart(b"fourth", b"fourth password", CLIENT) == b"third"
    assert check(server).verdict is ice.Verdict.ANSWERED
    checked = check(server, MOBILE, ufrag="fourth", password=b"fourth password")
    assert checked.verdict is ice.Verdict.ANSWERED


def asked(server: ice.Agent, now: float) -> dict[ice.Path, bytes]:
    """What the agent sends of its own accord, by where it goes."""
    return dict(server.requests(now))


def answered(
    server: ice.Agent,
    request: bytes,
    path: ice.Path,
    now: float,
    client: tuple[bytes, bytes] = CLIENT,
) -> paths.Reply:
    """The client's answer to `request`, by `path`."""
    datagram = stun.success(request[8:20], "203.0.113.1", 3478, client[1])
    read = stun.read_answer(datagram)
    assert read is not None
    return server.answered(datagram, read, path.header, path.relay, now)


def test_both_ways_in_are_asked_and_the_answers_move_nothing() -> None:
    server = agent()
    near, far = ice.Path(HOME, RELAY), ice.Path(HOME, OTHER_RELAY)
    check(server, HOME, OTHER_RELAY, now=0.0, use_candidate=False)
    check(server, HOME, RELAY, now=0.1)
    server.media(HOME, RELAY, 6.5)
    requests = asked(server, 6.5)
    assert requests.keys() == {near, far}
    for path in (near, far):
        assert answered(server, requests[path], path, 20.0) is paths.Reply.ALIVE
        assert server.active == near
    assert server.heard_at == 20.0, "but they show that the client is there"
    assert server.keys == [frame.key(HOME)]


def test_nothing_is_sent_to_whom_no_check_has_verified() -> None:
    server = agent()
    assert asked(server, 1e6) == {}
    check(server, HOME, password=b"wrong")
    server.media(MOBILE, RELAY, 0.0)
    server.learn(frame.key(MOBILE), 0.0)
    assert asked(server, 6.0) == {}
    check(server, HOME, now=1.0)
    assert asked(server, 7.0).keys() == {ice.Path(HOME, RELAY)}


def test_a_replayed_check_adds_no_path() -> None:
    server = agent()
    recorded = bytes(range(12))
    check(server, HOME, RELAY, now=0.0, transaction_id=recorded)
    check(server, HOME, OTHER_RELAY, now=1.0, transaction_id=recorded)
    check(server, MOBILE, RELAY, now=1.0, transaction_id=recorded)
    assert asked(server, 9.0).keys() == {ice.Path(HOME, RELAY)}


def test_an_answer_that_is_not_the_clients_is_no_sign_of_life() -> None:
    server = agent()
    check(server, HOME, now=0.0)
    ((path, request),) = asked(server, 6.0).items()
    assert answered(server, request, path, 7.0, (b"", b"guessed")) is paths.Reply.FORGED
    assert answered(server, bytes(20), path, 7.0) is paths.Reply.UNASKED
    assert answered(server, request, ice.Path(MOBILE, RELAY), 7.0) is paths.Reply.UNASKED
    assert server.heard_at == 0.0


def test_an_address_that_is_given_up_is_not_asked() -> None:
    server = agent()
    check(server, HOME)
    check(server, MOBILE)
    server.forget(frame.key(HOME))
    assert asked(server, 6.0).keys() == {ice.Path(MOBILE, RELAY)}
    for port in range(1, 50):
        check(server, frame.header("192.0.2.9", port), now=7.0)
    assert len(asked(server, 14.0)) <= paths.PATHS_MAX


def test_after_a_restart_paths_are_those_of_the_new_credentials() -> None:
    server, again = agent(), (b"again", b"of the client, again")
    check(server, HOME)
    server.restart(b"second", b"second password", again)
    ((path, request),) = asked(server, 6.0).items()
    assert request[20:].startswith(b"\0\x06\0\x1eclient:" + UFRAG.encode())
    assert answered(server, request, path, 6.1) is paths.Reply.ALIVE
    # The client goes over to the new ones; what it still had under way changes nothing.
    check(server, MOBILE, now=7.0, ufrag="second", password=b"second password")
    ((path, request),) = asked(server, 13.0).items()
    assert path == ice.Path(MOBILE, RELAY)
    assert request[20:].startswith(b"\0\x06\0\x0cagain:second")
    assert answered(server, request, path, 13.1) is paths.Reply.FORGED
    assert answered(server, request, path, 13.1, again) is paths.Reply.ALIVE
    check(server, HOME, now=14.0)
    assert asked(server, 20.0).keys() == {path, ice.Path(HOME, RELAY)}


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

    flight.answered(15.0)
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
    flight.answered(0.05)
    assert flight.due(0.1) == [b"hello"]


def test_a_flight_is_bounded() -> None:
    flight = ice.Flight()
    for number in range(100):
        flight.sent(bytes([number]), 0.0)
    assert len(flight.due(0.1)) == ice.FLIGHT_DATAGRAMS_MAX


def test_a_flight_shows_the_round_trip_unless_it_was_sent_twice() -> None:
    flight = ice.Flight()
    assert flight.round_trip_s is None
    flight.sent(b"hello", 10.0)
    flight.answered(10.04)
    flight.answered(10.05)
    assert flight.round_trip_s == pytest.approx(0.04)
    flight.sent(b"finished", 10.05)
    flight.due(10.15)
    flight.answered(10.2)
    assert flight.round_trip_s == pytest.approx(0.04), "which of the two was answered?"
