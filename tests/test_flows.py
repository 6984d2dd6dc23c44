"""The flow table: limits, contests, expiry, and what a successor finds."""

import dataclasses
import itertools
import random

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as some

import contests
import expiry
import flows
import frame
import roaming

LIMITS = flows.Limits(flows=8, tentative=4, addresses=2, idle_s=60.0, tentative_idle_s=15.0)
A = frame.name("10.4.0.1", 9000, 2)
B = frame.name("10.4.0.2", 9000, 2)


def client(number):
    return frame.header("192.0.2.1", 10_000 + number)


def ufrag(number):
    return b"ufrag%018d" % number


def table(limits=LIMITS, memory=None, now=0.0):
    memory = memoryview(bytearray(flows.octets(limits.flows))) if memory is None else memory
    return flows.Table(memory, limits, now), memory


def test_a_flow_opens_tentative_and_becomes_assured():
    flow, memory = table()
    assert flow.open(client(1), A, ufrag(1), 1.0) is None
    assert flow.hops[client(1)] == A
    assert flow.ufrag(client(1)) == ufrag(1)
    assert flow.watched == {client(1)} and flow.tentative == 1
    flow.answered([client(1), client(2)], 2.0)
    assert not flow.watched and flow.tentative == 0
    (copy,) = flows.read_all(memory)
    assert copy == flows.Flow(flows.State.ASSURED, client(1), A, ufrag(1), 1.0, 2.0)


def test_unknown_client_has_no_ufrag():
    assert table()[0].ufrag(client(1)) is None


def test_limits_are_refusals():
    flow, _ = table()
    assert flow.open(client(0), A, ufrag(0), 0) is None
    assert flow.open(client(1), A, ufrag(0), 0) is None
    assert flow.open(client(2), A, ufrag(0), 0) is flows.Refusal.ADDRESSES_LIMIT
    assert flow.open(client(2), A, ufrag(2), 0) is None
    assert flow.open(client(3), A, ufrag(3), 0) is None
    assert flow.open(client(4), A, ufrag(4), 0) is flows.Refusal.TENTATIVE_LIMIT
    flow.answered(map(client, range(4)), 0)
    for number in range(4, 8):
        assert flow.open(client(number), A, ufrag(number), 0) is None
    assert flow.open(client(8), A, ufrag(8), 0) is flows.Refusal.FLOWS_LIMIT
    assert len(flow) == 8


def test_a_tentative_flow_moves_at_once():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    assert flow.open(client(1), B, ufrag(2), 1) is None
    assert flow.hops[client(1)] == B and flow.ufrag(client(1)) == ufrag(2)
    assert len(flow) == 1


def test_an_ice_restart_keeps_an_assured_flow_assured():
    flow, memory = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.answered([client(1)], 1)
    assert flow.open(client(1), A, ufrag(2), 5) is None
    (copy,) = flows.read_all(memory)
    assert copy == flows.Flow(flows.State.ASSURED, client(1), A, ufrag(2), 0, 1)


def test_a_live_assured_flow_is_not_moved():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.answered([client(1)], 0)
    for now in range(100):
        assert flow.open(client(1), B, ufrag(2), now) is flows.Refusal.FLOW_HELD
        assert flow.watched == {client(1)}
        flow.answered([client(1)], now + 0.5)  # its owner is there
    assert flow.hops[client(1)] == A


def test_a_silent_owner_loses_a_contest():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.answered([client(1)], 0)
    assert flow.open(client(1), B, ufrag(2), 10) is flows.Refusal.FLOW_HELD
    assert (
        flow.open(client(1), B, ufrag(2), 10 + contests.FLOW_HELD_S / 2) is flows.Refusal.FLOW_HELD
    )
    assert flow.open(client(1), B, ufrag(2), 10 + contests.FLOW_HELD_S) is None
    assert flow.hops[client(1)] == B and flow.tentative == 1


def test_contests_are_bounded_and_forgotten():
    limits = flows.Limits(2000, 2000, 1, 60.0, 15.0)
    flow, _ = table(limits)
    for number in range(2000):
        flow.open(client(number), A, ufrag(number), 0)
    flow.answered(map(client, range(2000)), 0)
    for number in range(2000):
        refused = flow.open(client(number), B, ufrag(number + 5000), 1)
        assert refused is flows.Refusal.FLOW_HELD
    assert len(flow.watched) == contests.CONTESTED_MAX
    assert not flow.sweep(2 + contests.CONTEST_S_MAX)
    assert not flow.watched


def test_idle_flows_expire_within_two_periods():
    flow, memory = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.open(client(2), A, ufrag(2), 0)
    flow.open(client(3), A, ufrag(3), 0)
    flow.answered([client(1), client(2)], 0)
    gone_at = {}
    for now in range(300):
        flow.active.add(client(1))
        for header in flow.sweep(now):
            gone_at[header] = now
    assert set(flow.hops) == {client(1)}
    assert 60 <= gone_at[client(2)] <= 120
    assert 15 <= gone_at[client(3)] <= 30
    assert [copy.header for copy in flows.read_all(memory)] == [client(1)]


def test_a_flow_that_speaks_once_a_period_stays():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.answered([client(1)], 0)
    for now in range(600):
        if now % 50 == 0:
            flow.active.add(client(1))
        assert not flow.sweep(now)


def test_a_flow_confirmed_late_gets_a_whole_period():
    """It changes hands: what one hand has just taken away, the other one must not miss."""
    for confirmed_at in range(1, 15):
        flow, _ = table()
        flow.open(client(1), A, ufrag(1), 0)
        gone_at = None
        for now in range(200):
            if now == confirmed_at:
                flow.answered([client(1)], now)
            if flow.sweep(now):
                gone_at = now
        assert confirmed_at + 60 <= gone_at <= confirmed_at + 120


def test_a_sweep_is_short_however_many_flows_end():
    size = 4000
    flow, _ = table(flows.Limits(size, size, 1, 60.0, 15.0))
    for number in range(size):
        flow.open(client(number), A, ufrag(number), 0)
    flow.answered(map(client, range(size)), 0)
    now, longest = 0.0, 0
    while len(flow):
        now += 1.0  # four times as long as such a table needs
        longest = max(longest, len(flow.sweep(now)))
    assert 0 < longest <= expiry.FLOWS_A_SWEEP
    assert 60 <= now <= 140


def test_sweeping_often_costs_nothing_and_changes_nothing():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.answered([client(1)], 0)
    now = 0.0
    while not flow.sweep(now):
        now += flows.SWEEP_S / 4
    assert 60 <= now <= 120


def test_a_process_that_stood_still_forgets_no_flow_for_it():
    flow, _ = table()
    flow.open(client(1), A, ufrag(1), 0)
    flow.open(client(2), A, ufrag(2), 0)
    flow.answered([client(1)], 0)
    for now in (*range(12), *range(3600, 3603)):
        assert not flow.sweep(now)
    assert len(flow) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_successor_finds_the_same_flows(seed):
    random.seed(seed)
    limits = flows.Limits(64, 32, 3, 60.0, 15.0)
    flow, memory = table(limits)
    now = 0.0
    for _ in range(2000):
        now += random.random()
        header = client(random.randrange(100))
        if random.random() < 0.6:
            flow.open(header, random.choice([A, B]), ufrag(random.randrange(40)), now)
        elif header in flow.hops:
            flow.answered([header], now)
        if random.random() < 0.3:
            flow.active.update(random.sample(sorted(flow.hops), min(5, len(flow))))
        flow.sweep(now)
        assert set(flow.hops) == {copy.header for copy in flows.read_all(memory)}, f"seed {seed}"
    successor, _ = table(limits, memory)
    assert successor.hops == flow.hops
    assert successor.watched == {
        copy.header for copy in flows.read_all(memory) if copy.state is flows.State.TENTATIVE
    }
    assert successor.tentative == flow.tentative <= limits.tentative
    assert all(successor.ufrag(header) == flow.ufrag(header) for header in flow.hops)
    assert len(successor._free) == len(flow._free) == limits.flows - len(flow)
    assert successor._addresses == flow._addresses


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3000])
def test_a_successor_indexes_tables_of_any_size(size):
    limits = flows.Limits(size, size, 1, 60.0, 15.0)
    flow, memory = table(limits)
    for number in range(size):
        flow.open(client(number), random.choice([A, B]), ufrag(number), number)
    flow.answered(map(client, range(0, size, 3)), size)
    flow.answered([client(size - 1)], size)
    successor, _ = table(limits, memory)
    assert successor.hops == flow.hops and successor.watched == flow.watched
    assert all(successor.ufrag(client(number)) == ufrag(number) for number in range(size))
    assert not successor._free


def test_a_slot_half_written_is_free():
    flow, memory = table()
    flow.open(client(1), A, ufrag(1), 0)
    memory[0] = flows.State.FREE  # as if the process had died while writing
    successor, _ = table(memory=memory)
    assert not successor.hops and successor.open(client(1), A, ufrag(1), 0) is None


def test_flows_of_another_table_are_adopted_as_they_are():
    before, memory = table()
    for number in range(4):
        before.open(client(number), A, ufrag(number), number)
    before.answered([client(0), client(2)], 9)
    larger = flows.Limits(100, 50, 2, 60.0, 15.0)
    after, into = table(larger)
    assert after.open(client(3), B, ufrag(7), 10) is None
    assert after.adopt(flows.read_all(memory)) == 3
    assert after.hops == {client(0): A, client(1): A, client(2): A, client(3): B}
    assert after.watched == {client(1), client(3)} and after.tentative == 2
    found = {copy.header: copy for copy in flows.read_all(into)}
    assert found[client(2)] == flows.Flow(flows.State.ASSURED, client(2), A, ufrag(2), 2, 9)
    assert table(larger, into)[0].hops == after.hops


def test_limits_hold_for_adopted_flows():
    before, memory = table(flows.Limits(20, 20, 20, 60.0, 15.0))
    for number in range(20):
        before.open(client(number), A, ufrag(number // 3), 0)
    before.answered(map(client, range(10)), 0)
    after, _ = table()  # 8 flows, 4 of them tentative, 2 addresses a ufrag
    assert after.adopt(flows.read_all(memory)) == len(after) == 8
    assert max(after._addresses.values()) == 2 and after.tentative <= 4


# --- the SSRC, and who follows it -----------------------------------------------------------------

SSRC = 0xDECAFBAD
ROOMY = flows.Limits(flows=64, tentative=32, addresses=2, idle_s=60.0, tentative_idle_s=15.0)


def called(limits=ROOMY):
    """A table with an assured flow whose client's SSRC is known."""
    flow, memory = table(limits)
    flow.open(client(0), A, ufrag(0), 0)
    flow.answered([client(0)], 0)
    flow.heard(client(0), SSRC, 0.0)
    return flow, memory


def follow(flow, number, near=False, of=0, now=1.0):
    return flow.follow(client(number), A, ufrag(of), SSRC, near, now)


def copies(memory):
    return {copy.header: copy for copy in flows.read_all(memory)}


def test_a_client_is_listened_to_once_its_flow_is_assured():
    flow, memory = table()
    flow.open(client(0), A, ufrag(0), 0)
    assert not flow.listening
    flow.heard(client(0), SSRC, 0.0)  # nobody listens
    assert copies(memory)[client(0)].ssrc == 0
    flow.answered([client(0)], 0)
    assert set(flow.listening) == {client(0)}
    flow.heard(client(0), 0, 0.0)
    assert set(flow.listening) == {client(0)}
    flow.heard(client(0), SSRC, 0.0)
    assert not flow.listening
    assert copies(memory)[client(0)].ssrc == SSRC
    assert copies(memory)[client(0)].state is flows.State.ASSURED
    flow.answered([client(0)], 1)
    assert not flow.listening
    assert copies(table(memory=memory)[1])[client(0)].ssrc == SSRC


def test_checks_let_an_ssrc_be_noted_again_but_not_each_of_them():
    flow, memory = called()
    assert flow.checks(client(0), ufrag(0), 1.0) and not flow.listening
    assert not flow.checks(client(0), ufrag(1), 100.0) and not flow.listening
    assert not flow.checks(client(1), ufrag(0), 100.0)
    assert flow.checks(client(0), ufrag(0), roaming.LISTEN_S) and flow.listening
    flow.heard(client(0), 7, roaming.LISTEN_S)
    assert copies(memory)[client(0)].ssrc == 7
    for days in range(4):  # the clock of 16 bits goes round several times
        now = roaming.LISTEN_S + days * 65536.0
        assert flow.checks(client(0), ufrag(0), now + 1) and not flow.listening
        assert flow.checks(client(0), ufrag(0), now + 65536 - 1) and flow.listening
        flow.heard(client(0), 7, now + 65536)


def test_a_client_without_an_ssrc_is_listened_to_with_each_check():
    flow, _ = table()
    flow.open(client(0), A, ufrag(0), 0)
    assert flow.checks(client(0), ufrag(0), 0) and not flow.listening
    flow.answered([client(0)], 0)
    for _ in range(3):
        while flow.listening:
            flow.heard(client(0), 0, 0)
        assert flow.checks(client(0), ufrag(0), 0) and flow.listening


def test_nobody_is_listened_to_who_has_gone():
    flow, _ = table()
    flow.open(client(0), A, ufrag(0), 0)
    flow.answered([client(0)], 0)
    for now in range(1, 300):
        flow.sweep(now)
    assert not flow.hops and not flow.listening


def test_followers_take_no_room_of_clients_that_check():
    flow, memory = called()
    for number in range(1, 1 + roaming.FOLLOWERS_MAX):
        assert follow(flow, number) is None
    assert flow.open(client(10), A, ufrag(0), 1) is None
    assert flow.open(client(11), A, ufrag(0), 1) is flows.Refusal.ADDRESSES_LIMIT
    assert follow(flow, 12) is None
    found = copies(memory)
    assert found.keys() == set(map(client, [0, 2, 3, 4, 10, 12]))
    assert found[client(12)] == flows.Flow(
        flows.State.TENTATIVE, client(12), A, ufrag(0), 1, 0, SSRC, flows.Origin.FAR
    )
    assert flow.tentative == 5 and client(1) not in flow.active
    assert flow.hops.keys() == found.keys()


def test_a_follower_that_is_answered_is_a_flow_like_others():
    flow, memory = called()
    follow(flow, 1)
    flow.answered([client(1)], 2)
    assert flow.tentative == 0 and not flow.listening
    assert copies(memory)[client(1)].state is flows.State.ASSURED
    assert flow.open(client(2), A, ufrag(0), 2) is flows.Refusal.ADDRESSES_LIMIT
    for number in range(3, 3 + 2 * roaming.FOLLOWERS_MAX):
        assert follow(flow, number) is None
    assert {client(0), client(1)} <= copies(memory).keys()
    successor, _ = table(ROOMY, memory)
    assert successor._addresses == flow._addresses == {ufrag(0): 2}


def test_so_many_may_be_answered_and_no_more():
    flow, _ = called()
    for number in range(1, 20):
        if follow(flow, number) is not None:
            break
        flow.answered([client(number)], 1)
    # Somewhat more than checks may open, so that replayed ones do not keep it out.
    assert number == ROOMY.addresses + roaming.FOLLOWERS_MAX
    assert follow(flow, 30) is flows.Refusal.ADDRESSES_LIMIT


def test_followers_are_a_share_of_the_tentative_flows():
    flow, _ = called()
    most = ROOMY.tentative // roaming.FOLLOWERS_SHARE
    for number in range(most):
        assert follow(flow, 1 + number, of=number // 3) is None
    assert follow(flow, 50, of=50) is None and client(1) not in flow.hops  # the oldest has left
    for number in range(ROOMY.tentative - most):
        assert flow.open(client(20 + number), A, ufrag(20 + number), 1) is None
    assert flow.open(client(60), A, ufrag(60), 1) is flows.Refusal.TENTATIVE_LIMIT


def test_a_check_makes_a_follower_its_own():
    flow, memory = called()
    follow(flow, 1)
    assert not flow.checks(client(1), ufrag(0), 2)
    assert flow.open(client(1), A, ufrag(0), 2) is None
    assert flow.checks(client(1), ufrag(0), 2)
    assert copies(memory)[client(1)] == flows.Flow(
        flows.State.TENTATIVE, client(1), A, ufrag(0), 1, 0, SSRC
    )
    assert flow.open(client(2), A, ufrag(0), 2) is flows.Refusal.ADDRESSES_LIMIT
    for number in range(3, 12):
        follow(flow, number)
    assert client(1) in flow.hops
    assert flow.open(client(11), A, ufrag(0), 2) is flows.Refusal.ADDRESSES_LIMIT
    assert client(11) in flow.hops


def test_followers_expire_like_tentative_flows():
    flow, memory = called()
    follow(flow, 1, now=1.0)
    for now in range(2, 40):
        flow.active.add(client(0))
        flow.sweep(now)
    assert copies(memory).keys() == {client(0)}
    assert len(flow._followers) == 0 and flow.tentative == 0
    for number in range(1, 1 + roaming.FOLLOWERS_MAX):
        assert follow(flow, number) is None
    assert len(copies(memory)) == 1 + roaming.FOLLOWERS_MAX


def test_a_successor_knows_who_follows():
    flow, memory = called()
    for number in range(1, 4):
        follow(flow, number, near=number == 1)
    flow.answered([client(3)], 1)
    after, _ = table(ROOMY, memory)
    assert len(after._followers) == 2 and after.tentative == 2
    assert after._addresses == flow._addresses
    for number in range(10, 20):
        follow(after, number)
    assert {client(0), client(1), client(3)} < copies(memory).keys()
    assert client(2) not in copies(memory)


def test_an_ice_restart_keeps_the_ssrc_of_the_same_session_only():
    flow, memory = called()
    assert flow.open(client(0), A, ufrag(0), 1) is None
    assert copies(memory)[client(0)].ssrc == SSRC and not flow.listening
    assert flow.open(client(0), A, ufrag(1), 1) is None
    assert copies(memory)[client(0)].ssrc == 0 and flow.listening


# --- death at any moment --------------------------------------------------------------------------


class Dead(BaseException):
    pass


class Mortal(bytearray):
    """Memory whose writer dies in the midst of its n-th write from now."""

    writes_left = None

    def __setitem__(self, at, octets):
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                # Up to eight octets are one store; of more, some may have been written.
                if isinstance(at, slice) and len(octets) > 8:
                    half = len(octets) // 2
                    super().__setitem__(slice(at.start, at.start + half), octets[:half])
                raise Dead
        super().__setitem__(at, octets)


def whole(copies):
    """Flows by client; what an unconfirmed one says of its confirmation means nothing."""
    return {
        copy.header: copy._replace(assured_at=0) if copy.state is flows.State.TENTATIVE else copy
        for copy in copies
    }


STEPS = {
    "open": lambda flow: flow.open(client(9), A, ufrag(9), 5),
    "ICE restart": lambda flow: flow.open(client(0), A, ufrag(9), 5),
    "restart of a tentative flow": lambda flow: flow.open(client(1), A, ufrag(9), 5),
    "move": lambda flow: flow.open(client(1), B, ufrag(9), 5),
    "confirm": lambda flow: flow.answered([client(1)], 5),
    "follow": lambda flow: flow.follow(client(9), A, ufrag(0), 7, True, 5),
    "follow, and another leaves": lambda flow: flow.follow(client(9), A, ufrag(5), 7, True, 5),
    "confirm a follower": lambda flow: flow.answered([client(20)], 5),
    "check of a follower": lambda flow: flow.open(client(20), A, ufrag(5), 5),
    "hear": lambda flow: flow.heard(client(0), 7, 5),
    "sweep": lambda flow: [flow.sweep(now) for now in range(40)],
    "adopt": lambda flow: flow.adopt(
        [flows.Flow(flows.State.ASSURED, client(9), B, ufrag(9), 1, 2)]
    ),
}


SMALL = flows.Limits(flows=7, tentative=10, addresses=2, idle_s=20.0, tentative_idle_s=5.0)


def inhabited(full):
    """A table of an assured flow and one or two tentative ones, in memory that can die."""
    memory = Mortal(flows.octets(SMALL.flows))
    flow, _ = table(SMALL, memory)
    for number in range(2 + full):
        flow.open(client(number), A, ufrag(number), number)
    flow.answered([client(0)], 4)
    for number in range(roaming.FOLLOWERS_MAX):
        assert flow.follow(client(20 + number), A, ufrag(5), 7, False, 4) is None
    return flow, memory


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_whenever_the_process_dies_its_flows_are_whole(name, full):
    flow, memory = inhabited(full)
    before = whole(flows.read_all(memory))
    STEPS[name](flow)
    after = whole(flows.read_all(memory))
    for writes in itertools.count():
        flow, memory = inhabited(full)
        memory.writes_left = writes
        try:
            STEPS[name](flow)
        except Dead:
            memory.writes_left = None
        else:
            break
        successor, _ = table(SMALL, memory)
        found = whole(flows.read_all(memory))
        for header, copy in found.items():
            assert copy in (before.get(header), after.get(header))
        assert len(successor._followers) == sum(copy.follows for copy in found.values())
        # No flow is lost that was not to end; a full table has no second slot to change to.
        assert full or before.keys() & after.keys() <= found.keys()
        assert successor.hops == {header: copy.hop for header, copy in found.items()}
        assert len(successor._free) == SMALL.flows - len(found)
        counted = sum(not copy.follows for copy in found.values())
        assert sum(successor._addresses.values()) == counted
    assert writes or before == after


def test_an_ipv6_hop_comes_back_whole():
    flow, memory = table()
    hop = frame.name("fd00:4::1", 9000, 10)
    flow.open(client(1), hop, ufrag(1), 0)
    assert table(memory=memory)[0].hops[client(1)] == hop


# --- the table against a plain dictionary ---------------------------------------------------------

CLIENTS, UFRAGS = 8, 5
LATE_S = expiry.LATE_S_MAX + 1.0
"""How much earlier or later than its period a hand may come by, swept once a second."""


@dataclasses.dataclass
class Told:
    """What the table was told of a client: its flow, and when it was last heard of."""

    flow: flows.Flow
    heard_at: float


class Model(stateful.RuleBasedStateMachine):
    """All that happens to a table, in any order, beside a dictionary that is told the same."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(roaming, "FOLLOWERS_MAX", 2)
        self.limits = flows.Limits(6, 4, 3, idle_s=60.0, tentative_idle_s=15.0)
        self.table, self.memory = table(self.limits)
        self.told, self.contested, self.now = {}, {}, 0.0

    def teardown(self):
        self.patch.undo()

    def tentative(self):
        return [t for t in self.told.values() if t.flow.state is flows.State.TENTATIVE]

    def expected(self, header, hop, text):
        """The flow that opening gives, or why there is none: the rules once more, plainly."""
        told = self.told.get(header)
        others = [t for h, t in self.told.items() if h != header]
        fresh = flows.Flow(flows.State.TENTATIVE, header, hop, text, self.now, 0.0)
        flow, tentative_others = fresh, [t for t in self.tentative() if t.flow.header != header]
        if told is None:
            if len(self.told) >= self.limits.flows:
                return flows.Refusal.FLOWS_LIMIT
        elif told.flow.hop == hop:
            ssrc = told.flow.ssrc if told.flow.ufrag == text else 0
            flow = told.flow._replace(ufrag=text, ssrc=ssrc, origin=flows.Origin.CHECKED)
        elif told.flow.state is flows.State.ASSURED:
            since = self.contested.setdefault(header, self.now)
            if self.now - since < contests.FLOW_HELD_S:
                return flows.Refusal.FLOW_HELD
        earns = told is None or told.flow.state is not flow.state
        if earns and len(tentative_others) >= self.limits.tentative:
            return flows.Refusal.TENTATIVE_LIMIT
        has_place = told and told.flow.ufrag == text and not told.flow.follows
        if self.counted(text, others) >= self.limits.addresses and not has_place:
            return flows.Refusal.ADDRESSES_LIMIT
        return flow

    def counted(self, text, among):
        """Flows of a session that count as its addresses."""
        return sum(t.flow.ufrag == text and not t.flow.follows for t in among)

    def followers(self, text=None):
        """Those of one session, or of all, the oldest first."""
        found = [t.flow for t in self.told.values() if t.flow.follows]
        return [flow for flow in found if text in (None, flow.ufrag)]

    @stateful.rule(
        number=some.integers(0, CLIENTS - 1),
        text=some.integers(0, 1).map(ufrag),
        near=some.booleans(),
    )
    def follow(self, number, text, near):
        header = client(number)
        if header in self.told:
            return
        self.now += 0.01  # which of two came first is known by nothing else
        origin = flows.Origin.NEAR if near else flows.Origin.FAR
        fresh = flows.Flow(flows.State.TENTATIVE, header, A, text, self.now, 0.0, SSRC, origin)
        others, leaves, expected = self.followers(text), None, None
        far = [flow for flow in others if flow.origin is flows.Origin.FAR]
        if len(others) == 2:
            leaves = next(iter([*far, *(others if near else [])]), None)
            expected = None if leaves else flows.Refusal.ADDRESSES_LIMIT
        elif len(self.followers()) >= max(1, self.limits.tentative // 2):
            strangers = [flow for flow in self.followers() if flow.origin is flows.Origin.FAR]
            leaves = next(iter(strangers), None)
            expected = None if leaves else flows.Refusal.ADDRESSES_LIMIT
        if self.counted(text, self.told.values()) >= self.limits.addresses + 2:
            expected, leaves = flows.Refusal.ADDRESSES_LIMIT, None
        if leaves:
            del self.told[leaves.header]
        if not expected:
            if len(self.told) >= self.limits.flows:
                expected = flows.Refusal.FLOWS_LIMIT
            elif len(self.tentative()) >= self.limits.tentative:
                expected = flows.Refusal.TENTATIVE_LIMIT
        assert self.table.follow(header, A, text, SSRC, near, self.now) is expected
        if not expected:
            self.told[header] = Told(fresh, self.now)

    @stateful.rule(
        number=some.integers(0, CLIENTS - 1),
        hop=some.sampled_from([A, B]),
        text=some.integers(0, UFRAGS - 1).map(ufrag),
    )
    def open(self, number, hop, text):
        header = client(number)
        expected = self.expected(header, hop, text)
        refusal = self.table.open(header, hop, text, self.now)
        if isinstance(expected, flows.Flow):
            assert refusal is None
            self.told[header] = Told(expected, self.now)
            self.contested.pop(header, None)
        else:
            assert refusal is expected

    @stateful.rule(numbers=some.sets(some.integers(0, CLIENTS - 1)))
    def answered(self, numbers):
        headers = [client(number) for number in numbers]
        self.table.answered(headers, self.now)
        for header in headers:
            self.contested.pop(header, None)
            told = self.told.get(header)
            if told and told.flow.state is flows.State.TENTATIVE:
                flow = told.flow._replace(state=flows.State.ASSURED, assured_at=self.now)
                self.told[header] = Told(flow, self.now)

    @stateful.rule(numbers=some.sets(some.integers(0, CLIENTS - 1)))
    def heard(self, numbers):
        for header in map(client, numbers):
            if header in self.told:
                self.table.active.update([header])
                self.told[header].heard_at = self.now

    @stateful.rule(seconds=some.integers(1, 70))
    def time_passes(self, seconds):
        for _ in range(seconds):
            self.now += 1.0
            for header in self.table.sweep(self.now):
                told = self.told.pop(header)
                self.contested.pop(header, None)
                assert self.now - told.heard_at >= self.period(told) - LATE_S
            for header, told in self.told.items():
                assert self.now - told.heard_at <= 2 * self.period(told) + LATE_S, header
            for header, since in list(self.contested.items()):
                if self.now - since > contests.CONTEST_S_MAX:
                    del self.contested[header]

    def period(self, told):
        assured = told.flow.state is flows.State.ASSURED
        return self.limits.idle_s if assured else self.limits.tentative_idle_s

    @stateful.rule()
    def the_process_dies(self):
        self.table = flows.Table(self.memory, self.limits, self.now)
        self.starts_again()

    @stateful.rule(room=some.integers(4, 8))
    def another_memory_takes_over(self, room):
        self.limits = dataclasses.replace(self.limits, flows=room)
        found = list(flows.read_all(self.memory))
        # What was admitted once is admitted again, as handover.py has it.
        roomy = dataclasses.replace(self.limits, tentative=2 * room, addresses=room)
        carried, self.memory = table(roomy, now=self.now)
        assert carried.adopt(found) == min(len(found), room)
        self.table, _ = table(self.limits, self.memory, self.now)
        kept = sorted(found[:room], key=lambda copy: copy.opened_at)
        self.told = {copy.header: self.told[copy.header] for copy in kept}
        self.starts_again()

    def starts_again(self):
        """What the process before had heard is unknown to the next one."""
        self.contested.clear()
        for told in self.told.values():
            told.heard_at = self.now

    @stateful.invariant()
    def the_table_is_as_told(self):
        found = {copy.header: copy for copy in flows.read_all(self.memory)}
        assert found == {header: told.flow for header, told in self.told.items()}
        assert self.table.hops == {header: told.flow.hop for header, told in self.told.items()}
        assert len(self.table) == len(self.told)
        for number in range(CLIENTS):
            told = self.told.get(client(number))
            assert self.table.ufrag(client(number)) == (told and told.flow.ufrag)
        tentative = {told.flow.header for told in self.tentative()}
        assert self.table.tentative == len(tentative)
        assert self.table.watched == tentative | self.contested.keys()
        assert self.table.active <= self.told.keys()
        assert len(self.table._free) + len(self.told) == self.limits.flows
        assert len(self.table._followers) == len(self.followers())
        assert self.table.listening.keys() <= self.told.keys() - tentative


Model.TestCase.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestModel = Model.TestCase
