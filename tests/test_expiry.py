"""The clock's hand, beside no table: what it passes, how much at once, and how it catches up."""

import expiry

SLOTS = 1000


def states(*of):
    """A table with these slots of state 2, and the rest of state 1."""
    found = bytearray([1]) * SLOTS
    for slot in of:
        found[slot] = 2
    return memoryview(found)


def test_every_slot_of_its_state_is_passed_once_a_period():
    hand, seen = expiry.Hand(2, SLOTS, 10.0, now=0.0), []
    table = states(0, 7, 500, 999)
    for tick in range(1, 301):
        seen += hand.passes(table, tick / 10)
    assert seen[:4] == [0, 7, 500, 999]
    assert len(seen) in (11, 12, 13) and set(seen) == {0, 7, 500, 999}


def test_a_step_is_bounded_and_the_next_goes_on_where_it_ended():
    slots = 100_000
    hand = expiry.Hand(1, slots, 1.0, now=0.0)
    table, seen = memoryview(bytearray([1]) * slots), []
    for _ in range(5):
        passed = hand.passes(table, 1.0)
        assert 0 < len(passed) <= expiry.FLOWS_A_SWEEP
        seen += passed
    assert seen == list(range(5 * expiry.FLOWS_A_SWEEP))
    empty = memoryview(bytearray(slots))
    hand = expiry.Hand(1, slots, 1.0, now=0.0)
    assert hand.passes(empty, 0.9) == [] and hand._at == expiry.SLOTS_A_SWEEP


def test_a_hand_that_was_held_up_does_not_go_round_at_once():
    hand = expiry.Hand(2, SLOTS, 10.0, now=0.0)
    passed = []
    for _ in range(20):
        passed += hand.passes(states(*range(SLOTS)), 3600.0)
    # Two seconds' worth of slots, and the one that is due.
    assert len(passed) <= SLOTS * expiry.LATE_S_MAX / 10 + 1


def test_only_one_state():
    assert bytes(range(4)).translate(expiry.only(2)) == b"\0\0\1\0"
