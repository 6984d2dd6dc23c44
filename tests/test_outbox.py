"""What waits for a server: in order, and no more than there is room for."""

from typing import Any

import pytest

from outbox import AUDIO_S_MAX, EVENTS_MAX, EVENTS_OCTETS_MAX, Outbox

RATE_HZ = 16_000
FRAME = 640


def taken(box: Outbox) -> list[Any]:
    found = []
    while (what := box.take()) is not None:
        found.append(what)
    return found


def test_audio_and_events_stay_in_their_order() -> None:
    box = Outbox(RATE_HZ)
    things: list[Any] = [b"\1\0", {"type": "a"}, b"\2\0", b"\3\0", {"type": "b"}]
    for what in things:
        assert box.put_audio(what) if isinstance(what, bytes) else box.put_event(what)
    assert taken(box) == things
    assert box.take() is None
    assert box.dropped_octets == 0


def test_the_oldest_audio_goes_and_every_event_stays() -> None:
    box = Outbox(RATE_HZ)
    frames = [number.to_bytes(2, "little") * (FRAME // 2) for number in range(300)]
    room = int(AUDIO_S_MAX * 50)
    for number, frame in enumerate(frames):
        assert box.put_audio(frame) is (number < room)
        if number == 0:
            box.put_event({"type": "first"})
    box.put_event({"type": "last"})
    assert taken(box) == [{"type": "first"}, *frames[-room:], {"type": "last"}]
    assert box.dropped_octets == (len(frames) - room) * FRAME
    assert box.put_audio(bytes(int(AUDIO_S_MAX * 2 * RATE_HZ)))
    assert not box.put_audio(bytes(10 * FRAME))
    assert taken(box) == [bytes(10 * FRAME)]
    assert not box.put_audio(bytes(2 * int(AUDIO_S_MAX * 2 * RATE_HZ)))  # alone too much
    assert taken(box) == []


def test_events_are_refused_where_there_is_no_room() -> None:
    box = Outbox(RATE_HZ)
    assert [box.put_event({"n": n}) for n in range(EVENTS_MAX + 1)].count(False) == 1
    box.take()
    assert box.put_event({"n": "again"})
    taken(box)
    large = {"x": "y" * (EVENTS_OCTETS_MAX // 2)}
    assert [box.put_event(large) for _ in range(2)] == [True, False]
    taken(box)
    assert box.put_event(large)
    deep: Any = 7
    for _ in range(300):
        deep = [deep]
    with pytest.raises(TypeError):
        box.put_event({"deep": deep})
    assert taken(box) == [large]
