"""The backbone: which way a session goes, and which ways are there."""

import collections
import random
import struct

import pytest

import backbone
import frame

NAMES = [frame.name(f"10.5.0.{n}", 3600, 2) for n in range(1, 5)]
OTHER = [frame.name("10.6.0.1", 3600, 2)]
TIMEOUT_S = 0.5
PERIOD_S = TIMEOUT_S / backbone.PROBES
SESSIONS = [f"{n:023d}".encode() for n in range(2000)]


def ways():
    return backbone.Backbone({2: NAMES, 3: OTHER}, TIMEOUT_S, 100.0)


class Walk:
    """Time goes by; these ways answer."""

    def __init__(self):
        self.ways, self.now, self.lost, self.probes = ways(), 100.0, [], 0

    def go(self, seconds, answering=NAMES + OTHER, traffic=(), busy=True):
        """`busy`: all of them have sessions. `traffic` comes from these."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            self.ways.seen.update(traffic)
            for name in self.ways.ways if busy else ():
                self.ways.use(name)
            if self.now >= self.ways.due:
                probed, lost = self.ways.tend(self.now)
                self.lost += lost
                self.probes += len(probed)
                for name in set(answering) & set(probed):
                    body = self.ways.token(name, self.now) + b"\0"
                    assert self.ways.answered(name, body, self.now + 0.002)
        return self.lost


def test_sessions_are_spread_and_the_same_ones_go_the_same_way():
    first, second = ways(), ways()
    chosen = [first.choose(2, text) for text in SESSIONS]
    assert chosen == [second.choose(2, text) for text in SESSIONS]
    counts = collections.Counter(chosen)
    assert set(counts) == set(NAMES) and min(counts.values()) > 400
    assert first.choose(3, SESSIONS[0]) == OTHER[0]
    assert 2 in first and 4 not in first
    with pytest.raises(KeyError):
        first.choose(4, SESSIONS[0])


def test_hundreds_of_ways_have_their_share():
    names = [frame.name(f"10.5.{n // 8}.1", 3600 + n % 8, 2) for n in range(160)]
    there = backbone.Backbone({2: names}, TIMEOUT_S, 0.0)
    counts = collections.Counter(there.choose(2, b"%023d" % n) for n in range(32_000))
    assert len(counts) == 160 and max(counts.values()) < 280 and min(counts.values()) > 130


def test_a_lost_way_moves_its_own_sessions_and_no_other():
    walk = Walk()
    walk.go(1.0)
    before = {text: walk.ways.choose(2, text) for text in SESSIONS}
    assert walk.go(1.0, [*NAMES[1:], *OTHER]) == [NAMES[0]]
    after = {text: walk.ways.choose(2, text) for text in SESSIONS}
    assert all(after[text] == hop for text, hop in before.items() if hop != NAMES[0])
    moved = collections.Counter(after[text] for text, hop in before.items() if hop == NAMES[0])
    assert set(moved) == set(NAMES[1:]) and min(moved.values()) > 80


def test_it_is_lost_after_the_timeout_and_not_before():
    walk = Walk()
    walk.go(2.0)
    at = walk.now
    while not walk.lost:
        walk.go(0.01, NAMES[1:] + OTHER)
    assert TIMEOUT_S - PERIOD_S <= walk.now - at <= TIMEOUT_S + 2 * PERIOD_S


def test_three_probes_in_a_row_may_be_lost():
    walk = Walk()
    for _ in range(10):
        walk.go(PERIOD_S * 3, [])
        walk.go(PERIOD_S * 1.2)
    assert walk.lost == []


def test_traffic_alone_is_believed_half_as_long_again():
    walk = Walk()
    walk.go(1.0)
    at = walk.now
    while not walk.lost:
        walk.go(0.01, [], traffic=NAMES + OTHER)
    assert TIMEOUT_S * 1.2 < walk.now - at < TIMEOUT_S * backbone.ONE_WAY + 2 * PERIOD_S


def test_a_way_comes_back_when_it_has_answered_for_a_while():
    walk = Walk()
    walk.go(1.0)
    walk.go(1.0, NAMES[1:] + OTHER)
    walk.go(backbone.STEADY_S - 0.5)
    assert not walk.ways.ways[NAMES[0]].up
    walk.go(1.0, NAMES[1:] + OTHER)  # it flaps: all over again
    walk.go(backbone.STEADY_S - 0.5)
    assert not walk.ways.ways[NAMES[0]].up
    walk.go(1.0)
    assert walk.ways.ways[NAMES[0]].up


def test_probes_are_as_many_as_it_matters():
    """For each of five ways in ten seconds: idle, with sessions, with traffic of theirs."""
    for traffic, busy, least, most in (
        ((), False, 5 * 9, 5 * 11),
        ((), True, 5 * 80, 5 * 101),
        (NAMES + OTHER, True, 5 * 30, 5 * 45),
    ):
        walk = Walk()
        walk.go(10.0, traffic=traffic, busy=busy)
        assert walk.lost == [] and least <= walk.probes <= most, walk.probes


def test_without_sessions_it_is_asked_rarely_and_given_longer():
    walk = Walk()
    walk.go(10.9, busy=False)
    # The first session changes that at once, and the pause before it is held against nobody.
    assert walk.go(0.4) == []
    walk = Walk()
    walk.go(5.0, busy=False)
    assert walk.go(2.0, [], busy=False) == []  # two probes were lost, of one a second
    walk.go(2.0, [], busy=False)
    assert set(walk.lost) == set(NAMES + OTHER)


def test_a_session_on_an_idle_way_has_it_probed_at_once():
    walk = Walk()
    walk.go(3.5, busy=False)
    name = walk.ways.choose(2, SESSIONS[0])
    assert walk.ways.due <= walk.now
    probed, lost = walk.ways.tend(walk.now)
    assert name in probed and not lost
    walk.go(backbone.USED_S + 1, busy=False)
    assert not walk.ways.ways[name].busy


@pytest.mark.parametrize("pause_s", [0.2, 0.3, 0.47, 0.6, 5.0])
@pytest.mark.parametrize("traffic", [(), NAMES + OTHER])
def test_a_worker_that_had_no_cpu_blames_nobody(pause_s, traffic):
    walk = Walk()
    walk.go(1.0, traffic=traffic)
    walk.go(PERIOD_S * 2, [], traffic=traffic)  # two probes were lost before
    walk.now += pause_s
    walk.go(0.3, traffic=traffic)
    assert walk.lost == []


def test_a_path_that_loses_one_in_twenty_is_no_lost_path():
    chance, walk = random.Random(7), Walk()
    for _ in range(6_000):
        walk.go(PERIOD_S, [name for name in NAMES + OTHER if chance.random() > 0.05], NAMES + OTHER)
    assert len(walk.lost) <= 3  # five ways for ten minutes, an answer and its probe lost alike


def test_what_was_our_side_moves_nobody():
    """All are lost, and the first is heard again a quarter of a second before the others."""
    walk = Walk()
    walk.go(2.0)
    before = {text: walk.ways.choose(2, text) for text in SESSIONS}
    walk.go(5.0, [])
    assert set(walk.lost) == set(NAMES + OTHER)
    walk.go(0.25, NAMES[:1])
    assert {text: walk.ways.choose(2, text) for text in SESSIONS} == before
    walk.lost.clear()
    walk.go(2.0, NAMES[:3])
    assert walk.lost == [NAMES[3]]  # that one is really gone
    assert all(walk.ways.ways[name].up for name in NAMES[:3])


def test_sockets_of_either_family_choose_alike():
    six = [frame.name(*frame.endpoint(name), 10) for name in NAMES]
    there = backbone.Backbone({2: six}, TIMEOUT_S, 100.0)
    chosen = [six.index(there.choose(2, text)) for text in SESSIONS]
    assert chosen == [NAMES.index(ways().choose(2, text)) for text in SESSIONS]


def test_a_relay_may_stand_before_two_clusters():
    there = backbone.Backbone({2: NAMES, 3: [NAMES[0], *OTHER]}, TIMEOUT_S, 100.0)
    assert len(there.ways) == 5 and sorted(way.number for way in there.ways.values()) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert there.same(NAMES[0], OTHER[0]) and there.same(NAMES[0], NAMES[1])
    assert not there.same(NAMES[1], OTHER[0])
    assert {there.choose(3, text) for text in SESSIONS} == {NAMES[0], OTHER[0]}


def test_what_a_worker_before_has_found_is_not_forgotten():
    walk = Walk()
    walk.ways.begin(NAMES[0], up=False, draining=False)
    walk.ways.begin(NAMES[1], up=True, draining=True)
    assert {walk.ways.choose(2, text) for text in SESSIONS} == set(NAMES[2:])
    walk.go(backbone.STEADY_S - 0.5)
    assert not walk.ways.ways[NAMES[0]].up and walk.ways.ways[NAMES[1]].open
    walk.go(1.0)
    assert walk.ways.ways[NAMES[0]].up and walk.lost == []


def test_where_none_answers_all_are_tried():
    walk = Walk()
    walk.go(1.0)
    before = [walk.ways.choose(2, text) for text in SESSIONS]
    walk.go(2.0, OTHER)
    assert [walk.ways.choose(2, text) for text in SESSIONS] == before


def test_one_that_drains_is_left_and_still_better_than_none():
    there = ways()
    body = there.token(NAMES[0], 101.0) + b"\1"
    there.due = 105.0
    assert there.answered(NAMES[0], body, 101.1) and there.due == 0.0  # its sessions are to leave
    there.due = 105.0
    assert there.answered(NAMES[0], body, 101.2) and there.due == 105.0  # that is known
    assert there.ways[NAMES[0]].round_trip_s == pytest.approx(0.2)
    assert NAMES[0] not in {there.choose(2, text) for text in SESSIONS}
    for name in NAMES[1:]:
        there.ways[name].up = False
    there.rank()
    assert {there.choose(2, text) for text in SESSIONS} == {NAMES[0]}
    assert not there.answered(frame.name("10.9.9.9", 1, 2), body, 101.0)


@pytest.mark.parametrize("secret", [b"", b"s" * 16])
def test_an_answer_is_to_a_probe_of_the_last_seconds(secret):
    there = backbone.Backbone({2: NAMES}, TIMEOUT_S, 100.0, secret)
    token = there.token(NAMES[0], 150.0)
    others = backbone.Backbone({2: NAMES}, TIMEOUT_S, 100.0, b"x" * 16).token(NAMES[0], 150.0)
    for name, body, now in (
        (NAMES[1], token + b"\1", 150.1),  # of another way
        (NAMES[0], token + b"\1", 150.1 + backbone.ANSWER_S_MAX),
        (NAMES[0], token + b"\1", 149.9),
        (NAMES[0], others + b"\1", 150.1),
        (NAMES[0], struct.pack("<d", float("-inf")) + b"\1", 150.1),
        (NAMES[0], struct.pack("<d", float("nan")) + b"\1", 150.1),
        (NAMES[0], b"\xff" * 9, 150.1),
    ):
        assert not there.answered(name, body, now)
        assert there.ways[name].answered_at == 100.0 and not there.ways[name].draining
    assert there.answered(NAMES[0], token + b"\1", 150.1)
    late = there.token(NAMES[0], 2**32 / 10_000 + 150.0)  # the clock of the body has gone round
    assert there.answered(NAMES[0], late + b"\0", 2**32 / 10_000 + 150.2)
    assert there.ways[NAMES[0]].round_trip_s == pytest.approx(0.2, abs=0.001)


def test_two_ways_of_one_cluster_are_the_same_to_it():
    there = ways()
    assert there.same(NAMES[0], NAMES[3])
    assert not there.same(NAMES[0], OTHER[0])
    assert not there.same(None, NAMES[0]) and not there.same(NAMES[0], b"")
