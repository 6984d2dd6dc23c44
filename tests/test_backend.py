"""The choice of a backend, and the parrot behind the shape that all of them have."""

from typing import Any

import pytest

import backend
import settings


def connected(session: dict[str, Any] | None = None) -> tuple[backend.Backend, list[Any]]:
    events: list[Any] = []
    return backend.connect(settings.Backend(), session, events.append), events


def test_the_default_is_the_parrot_and_it_greets_at_once() -> None:
    chosen, events = connected()
    assert chosen.rate_hz == 16_000
    assert [event["type"] for event in events] == ["session.created"]
    _, others = connected()
    assert others[0]["session"]["id"] != events[0]["session"]["id"]


def test_an_unknown_kind_names_the_key() -> None:
    with pytest.raises(settings.SettingsError, match=r"^backend\.kind: 'cuckoo' is unknown"):
        backend.connect(settings.Backend(kind="cuckoo"), None, print)


def test_a_session_from_the_offer_is_in_force_from_the_start() -> None:
    _, events = connected({"instructions": "Repeat."})
    assert events[0]["session"]["instructions"] == "Repeat."


def test_events_stay_in_order_when_emit_itself_sends() -> None:
    seen: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        seen.append(event["type"])
        if event["type"] == "response.created":
            chosen.send({"type": "input_audio_buffer.clear"}, 0.0)
            seen.append("emit returns")

    chosen = backend.connect(settings.Backend(), None, emit)
    chosen.send({"type": "response.create"}, 0.0)
    assert seen[:3] == ["session.created", "response.created", "emit returns"]
    assert seen[-2:] == ["response.done", "input_audio_buffer.cleared"]


def test_an_emit_that_raises_does_not_wedge_it() -> None:
    seen: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        seen.append(event["type"])
        if len(seen) == 2:
            raise OSError("the client has gone")

    chosen = backend.connect(settings.Backend(), None, emit)
    with pytest.raises(OSError, match="gone"):
        chosen.send({"type": "input_audio_buffer.clear"}, 0.0)
    chosen.send({"type": "input_audio_buffer.clear"}, 0.0)
    assert len(seen) == 3


def test_after_close_nothing_comes() -> None:
    chosen, events = connected()
    chosen.close()
    chosen.close()
    chosen.send({"type": "response.create"}, 0.0)
    chosen.append(bytes(640), 0.0)
    chosen.tick(9.0)
    assert len(events) == 1
