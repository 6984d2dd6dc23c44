"""The table of what clients speak, and the Realtime API's own entry."""

import timeit

import pytest

import adapters
import rtvi


def test_realtime_changes_nothing() -> None:
    adapter = adapters.of("realtime", "oai-events", 0.0, resumed=False)
    events = ["one", "two"]
    assert adapter.to_client(events, 0.0) is events
    assert adapter.from_client(b"any", 0.0) == (b"any",)
    assert (adapter.asked(), adapter.farewell(), adapter.leaves) == ((), (), False)


@pytest.mark.parametrize("dialect", ["", "realtime", "yet to be invented"])
def test_what_is_unknown_is_realtime(dialect: str) -> None:
    assert isinstance(adapters.of(dialect, "chat", 0.0, resumed=False), adapters.Realtime)
    assert adapters.known(dialect).labels == {"oai-events"}


def test_the_door_decides_unless_the_channel_says_otherwise() -> None:
    assert isinstance(adapters.of("rtvi", "chat", 0.0, resumed=False), rtvi.Rtvi)
    assert isinstance(adapters.of("rtvi", "anything", 0.0, resumed=False), rtvi.Rtvi)
    assert isinstance(adapters.of("rtvi", "oai-events", 0.0, resumed=False), adapters.Realtime)
    assert "chat" in adapters.known("rtvi").labels


def test_in_a_resumed_conversation_what_is_newer_counts() -> None:
    before, offered = {"instructions": "Changed.", "tools": []}, {"instructions": "First.", "x": 1}
    settings = adapters.settings("realtime", before, offered)
    assert settings == {"instructions": "First.", "tools": [], "x": 1}
    settings = adapters.settings("rtvi", before, offered)
    assert settings == {"instructions": "Changed.", "tools": [], "x": 1}


def test_realtime_costs_nothing() -> None:
    """Printed; the bound is that of a machine which is very busy with something else."""
    adapter = adapters.of("realtime", "oai-events", 0.0, resumed=False)

    def once() -> None:
        adapter.to_client([], 0.0)
        adapter.asked()

    each_s = min(timeit.repeat(once, number=10_000, repeat=3)) / 10_000
    print(f"{each_s * 1e9:.0f} ns a flow, of which a call has fifty a second")
    assert each_s < 50e-6
