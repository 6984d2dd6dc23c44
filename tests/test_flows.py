"""The flow table: limits, contests, expiry, and what a successor finds."""

import random

import pytest

import flows
import frame

LIMITS = flows.Limits(flows=8, tentative=4, addresses=2, idle_s=60.0, tentative_idle_s=15.0)
A = frame.name("10.4.0.1", 9000, 2)
B = frame.name("10.4.0.2", 9000, 2)


def client(number):
    return frame.header("192.0.2.1", 10_000 + number)


def ufrag(number):
    return b"ufrag%018d" % number


def table(limits=LIMITS, memory=None):
    memory = memoryview(bytearray(flows.octets(limits.flows))) if memory is None else memory
    return flows.Table(memory, limits, 0.0), memory


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
    assert flow.open(client(1), B, ufrag(2), 10 + flows.FLOW_HELD_S / 2) is flows.Refusal.FLOW_HELD
    assert flow.open(client(1), B, ufrag(2), 10 + flows.FLOW_HELD_S) is None
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
    assert len(flow.watched) == flows.CONTESTED_MAX
    flow.active.update(map(client, range(2000)))
    flow.sweep(2 + flows.CONTEST_S_MAX)
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
    assert successor.tentative == flow.tentative <= limits.tentative
    assert all(successor.ufrag(header) == flow.ufrag(header) for header in flow.hops)
    assert len(successor._free) == len(flow._free) == limits.flows - len(flow)
    assert successor._addresses == flow._addresses


def test_a_slot_half_written_is_free():
    flow, memory = table()
    flow.open(client(1), A, ufrag(1), 0)
    memory[0] = flows.State.FREE  # as if the process had died while writing
    successor, _ = table(memory=memory)
    assert not successor.hops and successor.open(client(1), A, ufrag(1), 0) is None


def test_an_ipv6_hop_comes_back_whole():
    flow, memory = table()
    hop = frame.name("fd00:4::1", 9000, 10)
    flow.open(client(1), hop, ufrag(1), 0)
    assert table(memory=memory)[0].hops[client(1)] == hop
