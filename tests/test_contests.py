"""Contests: how long an assured flow is held, and when that is forgotten."""

import contests

A, B = b"a" * 32, b"b" * 32


def test_an_owner_has_some_seconds_to_say_something():
    found = contests.Contests()
    assert found.held(A, 10.0)
    assert found.held(A, 10.0 + contests.FLOW_HELD_S / 2)
    assert not found.held(A, 10.0 + contests.FLOW_HELD_S)
    del found[A]  # its transceiver has answered
    assert found.held(A, 100.0)


def test_there_is_no_end_of_room_for_what_is_held():
    found = contests.Contests()
    for number in range(contests.CONTESTED_MAX + 10):
        assert found.held(number.to_bytes(32, "big"), 0.0)
    assert len(found) == contests.CONTESTED_MAX
    # Who found no room is held for good: a check counts for nothing there.
    late = (contests.CONTESTED_MAX + 5).to_bytes(32, "big")
    assert found.held(late, contests.FLOW_HELD_S * 2)


def test_contests_end_by_themselves_the_oldest_first():
    found = contests.Contests()
    found.held(A, 0.0)
    found.held(B, 5.0)
    assert found.forgotten(contests.CONTEST_S_MAX) == []
    assert found.forgotten(contests.CONTEST_S_MAX + 1) == [A]
    assert list(found) == [B]
    assert found.forgotten(contests.CONTEST_S_MAX + 6) == [B]
