"""What waits, without a socket or a clock: its limits, whom it asks about, what a death leaves."""

import dataclasses
import itertools

import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as some

import frame
import metrics
import recovery

from . import test_takeover

IN = metrics.Inbound
OCTETS = 100
LIMITS = recovery.Limits(waiting=12, wait_s=0.5, lookups_per_s=5, unknown=4, unknown_s=4.0)
CLIENTS = [frame.header("192.0.2.1", 5000 + number) for number in range(64)]


class Room:
    """A recovery, and what a worker would do with it."""

    def __init__(self, limits=LIMITS, now=0.0):
        self.memory = memoryview(bytearray(recovery.octets(limits.waiting, OCTETS)))
        self.limits, self.one = limits, None
        self.begin(0, now)

    def begin(self, counted, now=0.0):
        """A process, the first or a successor."""
        self.one = recovery.Recovery(self.memory, self.limits, OCTETS, counted, now)
        return self.one

    def hold(self, number, payload=b"\x80 media", mark=1, now=0.0):
        return self.one.hold(CLIENTS[number], memoryview(payload), mark, now)

    def asked(self):
        """Numbers of the clients that the keeper is asked about now."""
        found = []
        while some_ := self.one.asks():
            assert len(some_) <= recovery.ASK_MAX
            found += [recovery.ASK.unpack(each) for each in some_]
        self.ssrcs = [ssrc for _, ssrc in found]
        return [CLIENTS.index(header) for header, _ in found]

    def drop(self, number):
        slots = self.one.take(CLIENTS[number])
        self.one.free(slots)
        return len(slots)

    def waiting(self, number):
        """The payloads of a client, as they would be sent, and no longer waiting."""
        found = []
        slots = self.one.take(CLIENTS[number])
        for slot in slots:
            whole = bytes(self.one.frame(slot))
            assert whole[:32] == CLIENTS[number]
            found.append(whole[32:])
        self.one.free(slots)
        return found


@pytest.fixture
def room():
    return Room()


def test_what_waits_comes_out_as_frames_in_order(room):
    payloads = [b"\x80 one", b"", b"x" * OCTETS, b"\x80 four"]
    assert [room.hold(1, payload) for payload in payloads] == [None] * 4
    assert room.hold(2, b"\x80 another's") is None
    assert len(room.one) == 5
    assert room.asked() == [1, 2]
    assert room.asked() == []  # each once
    assert room.waiting(1) == payloads
    assert room.waiting(1) == []
    assert len(room.one) == 1 and room.waiting(2) == [b"\x80 another's"]
    assert len(room.one) == 0 and not room.one.asked_at


def test_one_client_cannot_fill_all(room):
    refusals = [room.hold(1) for _ in range(recovery.CLIENT_MAX + 2)]
    assert refusals == [None] * recovery.CLIENT_MAX + [IN.DROPPED_LOOKUP_LIMIT] * 2
    assert room.hold(2) is None
    assert room.drop(1) == recovery.CLIENT_MAX
    assert room.hold(1) is None


def test_full_is_full_until_a_slot_is_free_again():
    room = Room(dataclasses.replace(LIMITS, lookups_per_s=100))
    for number in range(LIMITS.waiting):
        assert room.hold(number) is None
    assert room.hold(20) is IN.DROPPED_LOOKUP_LIMIT
    assert room.hold(0) is IN.DROPPED_LOOKUP_LIMIT
    assert len(room.one) == LIMITS.waiting
    slots = room.one.take(CLIENTS[3])
    assert room.hold(20) is IN.DROPPED_LOOKUP_LIMIT  # taken, and not yet counted
    room.one.free(slots)
    assert room.hold(20) is None
    assert room.asked() == [*(n for n in range(LIMITS.waiting) if n != 3), 20]


def test_without_room_nothing_waits_and_nobody_is_asked_about():
    room = Room(recovery.Limits(0, 1.0, 0, 0, 1.0))
    assert room.hold(1) is IN.DROPPED_LOOKUP_LIMIT
    assert room.asked() == [] and len(room.one) == 0


def test_a_second_has_a_budget_of_clients_to_ask_about(room):
    assert [room.hold(number, now=0.2) for number in range(7)] == [None] * 5 + [
        IN.DROPPED_LOOKUP_LIMIT
    ] * 2
    assert room.hold(0, now=0.9) is None  # it was asked about already
    assert room.hold(6, now=0.9) is IN.DROPPED_LOOKUP_LIMIT
    assert room.hold(6, now=1.0) is None
    for number in range(6):
        room.drop(number)
    assert [room.hold(number, now=1.5) for number in range(5)] == [None] * 4 + [
        IN.DROPPED_LOOKUP_LIMIT
    ]


def test_who_comes_again_is_asked_about_however_many_come_once():
    """Of 32 look-ups four are kept for clients that were refused one before."""
    room = Room(dataclasses.replace(LIMITS, waiting=400, lookups_per_s=32))

    def flood(first, count, now):
        held = [
            room.one.hold(frame.header("198.51.100.1", first + n), memoryview(b"x"), 1, now)
            for n in range(count)
        ]
        return held.count(None)

    assert flood(1, 100, now=0.1) == 28
    assert room.hold(1, now=0.11) is IN.DROPPED_LOOKUP_LIMIT
    assert flood(200, 100, now=0.12) == 0
    assert room.hold(1, now=0.13) is None
    assert [room.hold(n, now=0.2) for n in (2, 3, 4, 5)] == [IN.DROPPED_LOOKUP_LIMIT] * 4
    assert [room.hold(n, now=0.3) for n in (2, 3, 4, 5)] == [None] * 3 + [IN.DROPPED_LOOKUP_LIMIT]
    # The next second has all of it again; who was refused in the last one is known for another.
    assert flood(400, 100, now=1.2) == 28
    assert room.hold(5, now=1.3) is None


def test_so_many_who_were_refused_are_remembered_and_no_more(monkeypatch):
    monkeypatch.setattr(recovery, "REFUSED_MAX", 4)
    room = Room(dataclasses.replace(LIMITS, waiting=64, lookups_per_s=16))
    for number in range(14):
        assert room.hold(number) is None
    for number in range(14, 64):
        if room.hold(number) is None:
            break
        assert sum(map(len, room.one._refused)) <= 2 * recovery.REFUSED_MAX
    assert number == 63 and room.hold(14) is IN.DROPPED_LOOKUP_LIMIT
    assert room.hold(60) is None


def test_a_question_has_room_for_so_many():
    limits = dataclasses.replace(LIMITS, waiting=150, lookups_per_s=200)
    room = Room(limits)
    for number in range(150):
        header = frame.header("192.0.2.2", number)
        assert room.one.hold(header, memoryview(b"x"), 1, 0.0) is None
    asked = [room.one.asks() for _ in range(4)]
    assert list(map(len, asked)) == [64, 64, 22, 0]
    assert len(set(itertools.chain(*asked))) == 150


def test_a_client_that_nobody_knows_is_not_asked_about_for_a_while(room):
    room.one.unknown(CLIENTS[1], 0.0)
    assert room.hold(1, now=0.1) is IN.DROPPED_UNKNOWN_CLIENT
    # Two generations: what was learnt is kept for half of unknown_s at least, and at most for it.
    assert room.hold(1, now=2.0) is IN.DROPPED_UNKNOWN_CLIENT
    assert room.hold(1, now=3.9) is IN.DROPPED_UNKNOWN_CLIENT
    assert room.hold(1, now=4.0) is None
    assert len(room.one) == 1 and room.asked() == [1]


def media(ssrc, second=0x6F):
    return b"\x80%c\0\1\0\0\0\2" % second + ssrc.to_bytes(4, "big") + b"media"


def report(ssrc):
    return b"\x80\xc9\0\1" + ssrc.to_bytes(4, "big")


def test_the_question_carries_the_ssrc_of_the_media(room):
    room.hold(1, media(7))
    room.hold(2, b"\x16 no media")
    room.hold(3, report(9))
    assert room.asked() == [1, 2, 3] and room.ssrcs == [7, 0, 9]


def test_what_says_better_whose_it_is_is_asked_about_anew(room):
    """Of a client whose data channel speaks first, then its reports, then its media."""
    room.hold(1, b"\x16 no media")
    assert room.asked() == [1] and room.ssrcs == [0]
    room.hold(1, report(9))
    assert room.asked() == [1] and room.ssrcs == [9]
    room.hold(1, media(7))
    room.hold(1, report(9))  # in one question
    assert room.asked() == [1] and room.ssrcs == [7]
    assert [room.one.asks_for(CLIENTS[1], ssrc) for ssrc in (0, 9, 7)] == [False, False, True]
    for payload in (media(7), media(8), report(9), b"\x16"):
        room.hold(1, payload)
        assert room.asked() == []
    room.begin(counted=1)
    assert room.asked() == [1] and room.ssrcs[0] in (7, 8)  # the slots have no order
    assert len(room.waiting(1)) == recovery.CLIENT_MAX
    assert room.one.asks_for(CLIENTS[1], 0)  # nothing is under way


def test_a_better_question_takes_from_the_budget(room):
    for number in range(4):
        room.hold(number, b"\x16", now=0.1)
    room.hold(0, media(7), now=0.2)
    room.hold(1, media(8), now=0.2)  # waits with what was asked
    assert room.asked() == [0, 1, 2, 3] and room.ssrcs == [7, 0, 0, 0]
    room.hold(1, media(8), now=1.1)
    assert room.asked() == [1] and room.ssrcs == [8]


def test_who_is_unknown_by_its_address_may_be_known_by_its_media(room):
    wants = [b"\x16", report(9), media(7)]
    for kind, payload in enumerate(wants):
        assert room.hold(1, payload, now=0.0) is None
        assert room.asked() == [1]
        room.one.unknown(CLIENTS[1], 0.0)
        room.drop(1)
        for better, again in enumerate(wants):
            expected = None if better > kind else IN.DROPPED_UNKNOWN_CLIENT
            assert room.hold(1, again, now=0.0) is expected
            room.drop(1)
        room.one._renew(now=1.0 + kind)
    assert room.hold(1, media(8), now=0.0) is IN.DROPPED_UNKNOWN_CLIENT


def test_generations_turn_while_others_are_learnt(room):
    room.one.unknown(CLIENTS[1], 1.9)
    room.one.unknown(CLIENTS[2], 2.1)
    assert room.hold(1, now=3.9) is IN.DROPPED_UNKNOWN_CLIENT
    assert room.hold(1, now=4.2) is None
    assert room.hold(2, now=4.2) is IN.DROPPED_UNKNOWN_CLIENT
    assert room.hold(2, now=6.3) is None


def test_what_was_unknown_long_ago_is_asked_about_however_quiet_it_was(room):
    """Nothing turns the generations while nobody comes: their age does."""
    room.one.unknown(CLIENTS[1], 0.5)
    assert room.hold(1, now=3600.0) is None
    room.one.unknown(CLIENTS[2], 3600.0)
    assert room.hold(2, now=3600.1) is IN.DROPPED_UNKNOWN_CLIENT


@pytest.mark.parametrize("most", [1, 2, 4, 5, 16])
def test_so_many_unknown_ones_are_remembered_and_no_more(most):
    room = Room(dataclasses.replace(LIMITS, unknown=most, waiting=64, lookups_per_s=80))
    for number in range(64):
        room.one.unknown(CLIENTS[number], 0.0)
        # The one that was learnt last always is among them.
        assert room.hold(number, now=0.0) is IN.DROPPED_UNKNOWN_CLIENT
    remembered = sum(room.hold(number) is not None for number in range(64))
    assert 1 <= remembered <= max(most, 2)  # one in each generation


def test_what_nobody_answered_is_overdue_in_the_order_of_asking(room):
    room.hold(1, now=1.0)
    room.hold(2, now=1.2)
    room.hold(1, now=1.4)  # waits for the same answer
    assert room.one.overdue(1.49) == []
    assert room.one.overdue(1.5) == [CLIENTS[1]]
    assert room.one.overdue(1.7) == [CLIENTS[1], CLIENTS[2]]
    assert room.drop(1) == 2
    assert room.one.overdue(1.8) == [CLIENTS[2]]
    room.hold(1, now=1.8)
    assert room.one.overdue(2.2) == [CLIENTS[2]]


def test_nobody_is_asked_about_for_whom_nothing_waits(room):
    """A keeper that does not listen: what was not asked in time is not asked late."""
    for second in range(1000):
        for number in range(5):
            assert room.hold(number, now=second) is None
        for number in range(4):
            room.drop(number)
        if second < 999:
            room.drop(4)
    assert room.asked() == [4]


def test_an_answer_about_nobody_takes_nothing(room):
    room.hold(1)
    assert room.one.take(CLIENTS[9]) == []
    room.one.free([])
    assert len(room.one) == 1


# --- what a death leaves --------------------------------------------------------------------------


def test_a_successor_asks_again_about_all_that_waits(room):
    for number, payload in ((1, b"\x80 a"), (2, b"\x80 b"), (1, b"\x80 c")):
        room.hold(number, payload, mark=7, now=3.0)
    assert room.asked() == [1, 2]
    room.begin(counted=7, now=3.2)
    assert len(room.one) == 3
    assert sorted(room.asked()) == [1, 2]
    # Its own patience begins anew: the keeper may have died with the worker.
    assert room.one.overdue(3.6) == [] and len(room.one.overdue(3.7)) == 2
    assert sorted(room.waiting(1)) == [b"\x80 a", b"\x80 c"] and room.waiting(2) == [b"\x80 b"]


def test_what_an_uncounted_batch_left_is_forgotten(room):
    room.hold(1, b"\x80 counted", mark=7)
    room.hold(1, b"\x80 not", mark=8)
    room.hold(2, b"\x80 not", mark=8)
    room.begin(counted=7)
    assert len(room.one) == 1 and room.asked() == [1]
    assert room.waiting(1) == [b"\x80 counted"] and room.waiting(2) == []
    refusals = [room.hold(number % 2) for number in range(LIMITS.waiting)]  # nothing has leaked
    assert refusals == [None] * LIMITS.waiting


def test_a_successor_has_its_own_budget_for_what_it_finds(room):
    for number in range(5):
        room.hold(number, mark=1)
    room.begin(counted=1, now=0.1)
    assert len(room.asked()) == 5
    assert room.hold(6, now=0.2) is IN.DROPPED_LOOKUP_LIMIT
    assert room.hold(6, now=1.2) is None


def test_at_every_opcode_what_waits_is_whole_or_not_there(monkeypatch):
    """A death while a slot fills or empties leaves all of the datagram, or nothing."""
    monkeypatch.setattr(test_takeover, "MODULES", ("recovery.py",))
    payload, other = b"\x80" + b"p" * 50, b"\x80" + b"q" * 70
    for filling in (True, False):
        deaths, found = 0, set()
        while True:
            room = Room()
            # The slot that is used next has been used before: what it was must not show through.
            room.hold(2, other, mark=1)
            room.drop(2)
            if not filling:
                room.hold(1, payload, mark=1)

            def step(room=room, filling=filling):
                return room.hold(1, payload, mark=1) if filling else room.drop(1)

            died = test_takeover.dies_at(step, deaths, "opcode")
            room.begin(counted=1)
            waiting = room.waiting(1)
            assert waiting in ([], [payload]) and room.waiting(2) == [], deaths
            assert len(room.one) == 0
            found.add(len(waiting))
            if not died:
                assert waiting == ([payload] if filling else [])
                break
            deaths += 1
        assert deaths > 50 and found == {0, 1}


def test_what_was_let_go_is_gone_once_it_was_counted(room):
    """Between the count and the freeing a death must neither lose it nor send it twice."""
    for payload in (b"\x80 a", b"\x80 b"):
        room.hold(1, payload, mark=1)
    room.hold(2, b"\x80 c", mark=1)
    room.one.let_go(room.one.take(CLIENTS[1]))
    # Counted: one waits.
    room.begin(counted=1).settle(1, 0.0)
    assert len(room.one) == 1 and room.asked() == [2]
    assert room.waiting(1) == [] and room.waiting(2) == [b"\x80 c"]
    assert len(room.one) == 0


def test_what_was_let_go_and_not_counted_waits_again(room):
    for payload in (b"\x80 a", b"\x80 b"):
        room.hold(1, payload, mark=1)
    room.hold(2, b"\x80 c", mark=1)
    slots = room.one.take(CLIENTS[1])
    room.one.let_go(slots[:1])  # it died between the two
    room.begin(counted=1).settle(3, 0.0)
    assert len(room.one) == 3 and sorted(room.asked()) == [1, 2]
    # And the same once more, with what the first left behind.
    room.begin(counted=1).settle(3, 0.0)
    assert sorted(room.waiting(1)) == [b"\x80 a", b"\x80 b"]
    room.begin(counted=1).settle(1, 0.0)
    assert room.asked() == [2] and room.waiting(2) == [b"\x80 c"]


def test_a_slot_that_is_filled_again_was_not_let_go(room):
    room.hold(1, mark=1)
    slots = room.one.take(CLIENTS[1])
    room.one.let_go(slots)
    room.one.free(slots)
    room.hold(2, b"\x80 new", mark=1)
    room.begin(counted=1).settle(1, 0.0)
    assert room.waiting(2) == [b"\x80 new"]


# --- all of it, in any order ----------------------------------------------------------------------


class Model(stateful.RuleBasedStateMachine):
    """Any sequence of what a worker does, with deaths in between, beside a list."""

    def __init__(self):
        super().__init__()
        self.room, self.now, self.mark, self.count = Room(), 0.0, 1, 0
        self.waits = {}

    @stateful.rule(number=some.integers(0, 9), octets=some.integers(0, 40))
    def hold(self, number, octets):
        self.count += 1
        payload = b"%d " % self.count + b"x" * octets
        if self.room.hold(number, payload, self.mark, self.now) is None:
            self.waits.setdefault(number, []).append((payload, self.mark))

    @stateful.rule(seconds=some.sampled_from([0.1, 0.5, 1.0, 5.0]))
    def wait(self, seconds):
        self.now += seconds

    @stateful.rule()
    def count_the_batch(self):
        self.mark += 1

    @stateful.rule(number=some.integers(0, 9))
    def answer(self, number):
        assert self.room.waiting(number) == [each for each, _ in self.waits.pop(number, [])]

    @stateful.rule(number=some.integers(0, 9))
    def nobody_knows(self, number):
        self.room.one.unknown(CLIENTS[number], self.now)
        self.answer(number)
        assert self.room.hold(number, now=self.now) is IN.DROPPED_UNKNOWN_CLIENT

    @stateful.rule()
    def ask(self):
        asked = self.room.asked()
        assert len(asked) == len(set(asked)) and set(asked) <= self.waits.keys()

    @stateful.rule()
    def overdue(self):
        for header in self.room.one.overdue(self.now):
            self.answer(CLIENTS.index(header))

    @stateful.rule()
    def die(self):
        self.room.begin(counted=self.mark - 1, now=self.now)
        for number in range(10):
            left = [each for each, mark in self.waits.pop(number, []) if mark < self.mark]
            # In what order they waited is not remembered.
            assert sorted(self.room.waiting(number)) == sorted(left)

    @stateful.invariant()
    def all_of_it_is_bounded(self):
        room = self.room
        assert len(room.one) == sum(map(len, self.waits.values())) <= LIMITS.waiting
        assert all(len(each) <= recovery.CLIENT_MAX for each in self.waits.values())
        assert set(room.one.asked_at) == {CLIENTS[number] for number, w in self.waits.items() if w}


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
