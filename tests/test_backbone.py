"""The backbone: which way a session goes, which ways are there, and what relays say about it."""

import collections
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backbone
import frame
import ufrag

NAMES = [frame.name(f"10.5.0.{n}", 3600, 2) for n in range(1, 5)]
OTHER = [frame.name("10.6.0.1", 3600, 2)]
TIMEOUT_S = 0.5
PERIOD_S = TIMEOUT_S / backbone.PROBES
KEYRING = ufrag.Keyring.parse("0 " + "42" * 32)
TWO = ufrag.Keyring.parse("0 " + "42" * 32 + "\n1 " + "43" * 32)
TAGS = backbone.Tags(KEYRING, used=True)
HEADER = frame.header("192.0.2.7", 40_000)
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
                    body = backbone.token(self.now) + b"\0"
                    assert not self.ways.answered(name, body, self.now + 0.002)
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


def test_a_worker_that_had_no_cpu_blames_nobody():
    walk = Walk()
    walk.go(1.0)
    walk.now += 5.0
    walk.go(0.3)
    assert walk.lost == []


def test_where_none_answers_all_are_tried():
    walk = Walk()
    walk.go(1.0)
    before = [walk.ways.choose(2, text) for text in SESSIONS]
    walk.go(2.0, OTHER)
    assert [walk.ways.choose(2, text) for text in SESSIONS] == before


def test_one_that_drains_is_left_and_still_better_than_none():
    there = ways()
    body = backbone.token(1.0) + b"\1"
    assert there.answered(NAMES[0], body, 1.1)  # now its sessions are to leave
    assert not there.answered(NAMES[0], body, 1.2)  # that is known
    assert there.ways[NAMES[0]].round_trip_s == pytest.approx(0.2)
    assert NAMES[0] not in {there.choose(2, text) for text in SESSIONS}
    for name in NAMES[1:]:
        there.ways[name].up = False
    there.rank()
    assert {there.choose(2, text) for text in SESSIONS} == {NAMES[0]}
    assert not there.answered(frame.name("10.9.9.9", 1, 2), body, 1.0)


def test_two_ways_of_one_cluster_are_the_same_to_it():
    there = ways()
    assert there.same(NAMES[0], NAMES[3])
    assert not there.same(NAMES[0], OTHER[0])
    assert not there.same(None, NAMES[0]) and not there.same(NAMES[0], b"")


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
def test_messages_come_back_as_they_were_said(used):
    tags = backbone.Tags(KEYRING, used)
    told = {
        backbone.Kind.PROBE: tags.probe(b"12345678"),
        backbone.Kind.ANSWER: tags.answer(b"12345678", True),
        backbone.Kind.QUESTION: tags.question(HEADER),
        backbone.Kind.INTRODUCTION: tags.introduction(HEADER, SESSIONS[7], True),
    }
    bodies = [b"12345678", b"12345678\1", b"", b"\1" + SESSIONS[7]]
    for (kind, octets), body in zip(told.items(), bodies, strict=True):
        header, rest = octets[:32], memoryview(octets)[32:]
        assert backbone.is_message(header) and not frame.is_frame(header)
        said = tags.read(header, rest)
        assert said is not None and (said.kind, said.body) == (kind, body)
        if len(body) != 8 and kind is not backbone.Kind.ANSWER:
            assert said.header == HEADER
    assert backbone.introduced(bodies[3]) == (SESSIONS[7], True)


def test_every_changed_bit_of_a_tagged_message_shows():
    octets = TAGS.introduction(HEADER, SESSIONS[7], True)
    for at in range(len(octets)):
        if backbone.frame.HEADER_OCTETS - 4 <= at < backbone.frame.HEADER_OCTETS:
            continue  # the client's own tag: it is looked at on its own
        for bit in range(8):
            broken = bytearray(octets)
            broken[at] ^= 1 << bit
            assert TAGS.read(bytes(broken[:32]), memoryview(broken)[32:]) is None
    assert (
        backbone.Tags(ufrag.Keyring.parse("0 " + "44" * 32), True).read(
            octets[:32], memoryview(octets)[32:]
        )
        is None
    )


@given(st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(octets):
    header, rest = octets[:32].ljust(32, b"\0"), octets[32:]
    backbone.is_message(header)
    assert TAGS.read(header, rest) is None
    plain = backbone.Tags(KEYRING, False).read(header, rest)
    assert plain is None or backbone.is_message(header)


def test_a_tag_on_a_frame_leaves_its_client_as_it_is():
    stamped = HEADER[:28] + TAGS.stamp(HEADER)
    assert frame.is_frame(stamped) and frame.client(stamped) == ("192.0.2.7", 40_000)
    assert frame.key(stamped) == frame.key(HEADER)
    assert TAGS.stamped(stamped) and not TAGS.stamped(HEADER)
    assert not TAGS.stamped(frame.header("192.0.2.8", 40_000)[:28] + stamped[28:])
    guesses = sum(TAGS.stamped(HEADER[:28] + os.urandom(4)) for _ in range(2000))
    assert guesses == 0
    assert TAGS.twins(stamped) == [] == backbone.Tags(TWO, False).twins(HEADER)


def test_keys_change_one_relay_at_a_time():
    old, both = TAGS, backbone.Tags(TWO, True)
    stamped = HEADER[:28] + old.stamp(HEADER)
    newer = HEADER[:28] + both.stamp(HEADER)
    assert newer != stamped
    assert both.stamped(stamped) and both.stamped(newer) and not old.stamped(newer)
    assert both.twins(newer) == [stamped]
    told = old.question(HEADER)
    assert both.read(told[:32], told[32:]) is not None


def test_the_vector_of_the_tag():
    """The octets that an implementation in another language has to make: ARCHITECTURE.md."""
    master = bytes(range(32))
    keyring = ufrag.Keyring.parse(f"0 {master.hex()}")
    assert keyring.keys[0].transit.hex() == VECTOR_KEY
    assert backbone.Tags(keyring, True).stamp(HEADER).hex() == VECTOR_TAG


VECTOR_KEY = "d614db3a0cd3f3f52933183a44780fc80f302177e95db1d9486923f29afb35fc"
VECTOR_TAG = "4bff0eb8"
