"""What is known of transceivers, and in which order they are asked: properties, and no sockets."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import endpoints
import roster
from presence import Report
from roster import Health, Peer, Roster, order_of

AT, OTHER = endpoints.Endpoint("127.0.0.1:9000"), endpoints.Endpoint("127.0.0.1:9001")

REPORTS = st.builds(
    Report,
    draining=st.booleans(),
    sessions=st.integers(0, 12),
    sessions_max=st.just(10),
    load=st.floats(0, 1.2),
)
PEERS = st.lists(
    st.builds(
        Peer, st.just(AT), health=st.sampled_from(Health), report=REPORTS, full=st.booleans()
    ),
    min_size=1,
    max_size=8,
)


def says(sessions=0, most=100, **more):
    return Report(sessions=sessions, sessions_max=most, **more)


@given(PEERS, st.integers(0, 1 << 32))
def test_everyone_who_may_be_asked_is_once_and_the_full_last(peers, seed):
    asked = order_of(peers, random.Random(seed).shuffle)
    wanted = [peer for peer in peers if peer.health is not Health.DRAINING]
    assert sorted(map(id, asked)) == sorted(map(id, wanted))
    assert [peer.last for peer in asked] == sorted(peer.last for peer in asked)


def test_two_random_choices_keep_the_load_even():
    seed = 7
    rng = random.Random(seed)
    peers = [Peer(AT, report=says(most=1000)) for _ in range(10)]
    for _ in range(1000):
        order_of(peers, rng.shuffle)[0].attempt("")
    # One random choice leaves a spread of 50 or so here; two leave a handful.
    loads = [len(peer.since) for peer in peers]
    assert max(loads) - min(loads) <= 10, f"seed {seed}: {loads}"


def test_the_loaded_are_asked_after_the_idle():
    """Two processes with the same number of calls, and one of them has none of its CPU left."""
    busy, idle = Peer(AT), Peer(AT)
    busy.heard(says(3, load=0.8), 0)
    idle.heard(says(9, load=0.2), 0)
    assert all(order_of([busy, idle], random.Random(seed).shuffle)[0] is idle for seed in range(20))
    # So is one where many connect at this moment.
    idle.heard(says(9, connecting=31, connecting_max=32), 0)
    assert all(order_of([busy, idle], random.Random(seed).shuffle)[0] is busy for seed in range(20))


def test_an_offer_is_shown_to_so_many():
    fixed = [endpoints.Endpoint(f"10.0.0.{number}:9000") for number in range(1, 100)]
    known = Roster(fixed)
    assert len(known.order(random.Random(1).shuffle)) == roster.ATTEMPTS_MAX


# --- reports and what was placed since ------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["place", "report", "hear", "end"]), max_size=60),
    st.integers(0, 1 << 32),
)
def test_no_call_is_counted_twice_or_not_at_all(steps, seed):
    """A transceiver whose reports and answers come late, in the order in which each were sent."""
    rng = random.Random(seed)
    peer, opened, running, beat = Peer(AT), 0, 0, 0
    reports, answers = [], []  # on their way
    peer.heard(says(started=1.0, beat=1), 0)
    beat = 1
    for step in steps:
        if step == "place":
            opened, running = opened + 1, running + 1
            answers.append((peer.attempt("key"), opened))
        elif step == "report":
            beat += 1
            reports.append(
                says(running, opened=opened, started=1.0, beat=beat, calls_by_key={"key": running})
            )
        elif step == "hear":
            if reports and (not answers or rng.random() < 0.5):
                peer.heard(reports.pop(0), 0)
            elif answers:
                peer.took(*answers.pop(0))
    for attempt, number in answers:
        peer.took(attempt, number)
    if reports:
        peer.heard(reports[-1], 0)
    # None ended, so that all who know of a call know the same number.
    assert peer.report.sessions + len(peer.since) == running
    assert peer.report.calls_by_key.get("key", 0) + len(peer.since) == running


def test_calls_of_a_key_are_those_reported_placed_and_being_placed():
    known = Roster([AT, OTHER])
    first, second = known.peers
    first.heard(says(2, opened=5, beat=1, calls_by_key={"acme": 2}), 0)
    second.heard(says(1, opened=1, beat=1, calls_by_key={"acme": 1, "other": 1}), 0)
    assert (known.calls_of("acme"), known.calls_of("other"), known.calls_of("x")) == (3, 1, 0)
    attempt = first.attempt("acme")
    assert known.calls_of("acme") == 4
    first.took(attempt, 6)
    assert known.calls_of("acme") == 4
    first.heard(says(3, opened=6, beat=2, calls_by_key={"acme": 3}), 0)
    assert known.calls_of("acme") == 4
    refused = second.attempt("acme")
    second.refused(refused)
    second.refused(refused)
    assert known.calls_of("acme") == 4
    # Nobody knows of calls at one that is away: they have ended, most likely.
    first.failed()
    assert known.calls_of("acme") == 1


def test_another_process_at_the_same_address_begins_anew():
    peer = Peer(AT)
    peer.heard(says(9, opened=900, started=1.0, beat=70), 0)
    peer.took(peer.attempt("a"), 901)
    waiting = peer.attempt("b")
    peer.failed()
    peer.heard(says(0, opened=0, started=2.0, beat=1), 1)
    assert peer.since == [waiting] and peer.serving and peer.report.sessions == 0


@pytest.mark.parametrize(("number", "opened"), [(0, None), (0, 1), (7, None)])
def test_what_is_not_numbered_counts_until_the_next_report(number, opened):
    """Of a transceiver that does not count its calls, in its answers or in its reports."""
    peer = Peer(AT)
    peer.heard(says(1, opened=0), 0)
    waiting = peer.attempt("b")
    peer.took(peer.attempt("a"), number)
    assert len(peer.since) == 2
    peer.heard(says(1, opened=opened), 1)
    assert peer.since == [waiting]


def test_there_are_only_so_many():
    known = Roster([AT])
    for number in range(3):
        many = range(roster.TRANSCEIVERS_MAX)
        listed = {endpoints.Endpoint(f"10.{number}.{n >> 8}.{n & 255}:9"): says() for n in many}
        known.listed(listed, number)
        assert len(known.peers) == roster.TRANSCEIVERS_MAX + 1


# --- who is there ---------------------------------------------------------------------------------


def test_one_that_did_not_answer_is_not_believed_by_what_it_announces():
    known = Roster([])
    known.listed({AT: says(started=1.0, beat=1)}, 0)
    (peer,) = known.peers
    assert peer.serving and known.to_ask() == []
    peer.failed()
    known.listed({AT: says(started=1.0, beat=2)}, 1)
    assert not peer.serving and known.to_ask() == [peer]
    peer.heard(says(started=1.0, beat=3), 1)  # it answers
    assert peer.serving and known.to_ask() == []
    peer.failed()
    known.listed({AT: says(started=2.0, beat=1)}, 1)  # another process
    assert peer.serving and known.to_ask() == []


def test_an_old_report_is_not_taken_for_news():
    known = Roster([])
    known.listed({AT: says(5, started=1.0, beat=8)}, 0)
    (peer,) = known.peers
    known.listed({AT: says(4, started=1.0, beat=7)}, 1)
    assert peer.report.sessions == 5
    known.listed({AT: says(draining=True, started=1.0, beat=9)}, 1)
    assert peer.health is Health.DRAINING


def test_a_lease_that_ends_is_asked_about_and_forgotten_without_an_answer():
    known = Roster([])
    known.listed({AT: says(), OTHER: says()}, 0)
    first = known.peers[0]
    assert known.listed({OTHER: says()}, 1) == [first]
    assert not first.serving and known.to_ask() == [first]
    assert known.listed({OTHER: says()}, 1.5) == []
    # It is there, and only Redis does not know.
    first.heard(says(), 2)
    assert first.serving and known.to_ask() == [first]
    known.listed({OTHER: says()}, 100)
    assert len(known.peers) == 2
    first.failed()
    known.listed({OTHER: says()}, 101)
    assert len(known.peers) == 1, "it was last heard of long ago"


def test_without_redis_all_are_kept_and_asked():
    known = Roster([AT])
    known.listed({OTHER: says(draining=True), AT: says(3)}, 0)
    known.unlisted()
    assert [peer.report.sessions for peer in known.to_ask()] == [3, 0]
    for peer in known.peers:
        peer.failed()
    assert len(known.peers) == 2
    # It is back, and knows nobody: one in the settings stays whatever happens.
    known.listed({}, 100)
    assert [peer.endpoint for peer in known.peers] == [AT]


@pytest.mark.parametrize("listed", [False, True])
def test_nothing_understood_is_away(listed):
    peer = Peer(AT)
    peer.heard(None, 0, listed)
    assert peer.health is Health.AWAY and peer.doubted
