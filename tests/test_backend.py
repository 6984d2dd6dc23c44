"""The choice of a backend, and the parrot behind the shape that all of them have."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import backend
import endpoints
import ledger
import metrics
import settings
import uplink


def backends(
    default: settings.Backend | None = None, models: tuple[settings.Model, ...] = ()
) -> backend.Backends:
    counters = ledger.Counters(metrics.Transceiver)
    return backend.Backends(default or settings.Backend(), models, counters, time.monotonic)


def never(reason: str) -> None:
    raise AssertionError(reason)


def connected(session: dict[str, Any] | None = None) -> tuple[backend.Backend, list[Any]]:
    events: list[Any] = []
    return backends().connect(session, events.append, never), events


def test_the_default_is_the_parrot_and_it_greets_at_once() -> None:
    chosen, events = connected()
    assert chosen.rate_hz == 16_000
    assert [event["type"] for event in events] == ["session.created"]
    _, others = connected()
    assert others[0]["session"]["id"] != events[0]["session"]["id"]


def test_a_session_from_the_offer_is_in_force_from_the_start() -> None:
    _, events = connected({"instructions": "Repeat."})
    assert events[0]["session"]["instructions"] == "Repeat."


def test_the_session_s_model_chooses() -> None:
    server = settings.Backend(kind="realtime", url=endpoints.ModelUrl("ws://127.0.0.1:1/"))
    models = (
        settings.Model(name="birds"),
        settings.Model(name="whales", kind="realtime", url=server.url, rate_hz=16_000),
    )

    async def run() -> None:
        found = backends(server, models)
        for session, kind, rate_hz in (
            (None, uplink.Uplink, 24_000),
            ({"model": "another"}, uplink.Uplink, 24_000),
            ({"model": 7}, uplink.Uplink, 24_000),
            ({"model": "birds"}, backend.InProcess, 16_000),
            ({"model": "whales"}, uplink.Uplink, 16_000),
        ):
            chosen = found.connect(session, lambda _: None, never)
            assert isinstance(chosen, kind)
            assert chosen.rate_hz == rate_hz
            chosen.close()
        await found.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_file": "absent"}, "key_file: absent: No such file or directory"),
        ({"key_file": "open"}, "key_file: open: mode 0644 lets others than its owner"),
        ({"key_file": "empty"}, "key_file: empty: expected one line"),
        ({"ca_file": "absent"}, "ca_file: absent: "),
        ({"ca_file": "empty"}, "ca_file: empty: "),
    ],
)
def test_what_cannot_be_used_is_said_before_anybody_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, mode, text in (("open", 0o644, "sk-1"), ("empty", 0o600, "")):
        Path(name).write_text(text)
        Path(name).chmod(mode)
    url = endpoints.ModelUrl("wss://models.example/v1/realtime")
    paths = {key: Path(name) for key, name in change.items()}
    table = settings.Backend(kind="realtime", url=url, **paths)
    with pytest.raises(settings.SettingsError) as caught:
        backends(table)
    assert str(caught.value).startswith(f"backend.{reason}")
    named = settings.Model(name="x", **msgspec.structs.asdict(table))
    with pytest.raises(settings.SettingsError) as caught:
        backends(models=(named,))
    assert str(caught.value).startswith(f"model[0].{reason}")


def test_events_stay_in_order_when_emit_itself_sends() -> None:
    seen: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        seen.append(event["type"])
        if event["type"] == "response.created":
            chosen.send({"type": "input_audio_buffer.clear"}, 0.0)
            seen.append("emit returns")

    chosen = backends().connect(None, emit, never)
    chosen.send({"type": "response.create"}, 0.0)
    assert seen[:3] == ["session.created", "response.created", "emit returns"]
    assert seen[-2:] == ["response.done", "input_audio_buffer.cleared"]


def test_an_emit_that_raises_does_not_wedge_it() -> None:
    seen: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        seen.append(event["type"])
        if len(seen) == 2:
            raise OSError("the client has gone")

    chosen = backends().connect(None, emit, never)
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
