"""A call's life and the process's: limits with notice, drains, load, and faults that stay alone."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiortc.contrib.media import MediaPlayer

import control
import settings
import stun
import transceiver
import ufrag
from metrics import Timing
from metrics import Transceiver as Count
from session import State

from . import shim
from .test_transceiver import COMMAND, ROOT, House, closed, configure, house, sessions, types


def pass_time(on: House, now: list[float], seconds: float) -> None:
    """Let the fake clock go on, and each session be swept."""
    now[0] += seconds
    for _ in range(transceiver.SWEEP_STEPS):
        on.transceiver.tick(now[0])


def told(client: shim.Client, kind: str) -> list[dict[str, Any]]:
    """Events of one kind that a client has got."""
    return [event for event in map(json.loads, client.messages) if event["type"] == kind]


def knock(on: House, call_id: str) -> None:
    """Send the first check of a client, and leave it at that."""
    hint = ufrag.from_call_id(call_id) or ""
    password = ufrag.password(on.transceiver._keyring, hint) or b""
    check = stun.request(os.urandom(12), f"{hint}:abcd", password)
    on.shim.inject([check], ("127.0.0.77", 7777))


# --- limits, and what a client hears of them ------------------------------------------------------


def test_the_session_limit_is_known_announced_and_told(tmp_path: Path) -> None:
    now = [5000.0]

    async def scenario(on: House) -> None:
        client, _ = await on.call()
        ends_at = told(client, "session.created")[0]["session"]["expires_at"]
        assert abs(ends_at - time.time() - 100) < 20
        client.channel.send('{"type": "session.update", "session": {"instructions": "be kind"}}')
        await shim.until(lambda: told(client, "session.updated"))
        # It stands in every session object that the client is shown, not in the first one alone.
        assert told(client, "session.updated")[0]["session"]["expires_at"] == ends_at
        pass_time(on, now, 89)
        assert len(told(client, "session.updated")) == 1
        pass_time(on, now, 2)
        await shim.until(lambda: len(told(client, "session.updated")) == 2)
        announced = told(client, "session.updated")[1]["session"]
        assert abs(announced["expires_at"] - time.time() - 9) < 20
        assert announced["instructions"] == "be kind"  # the full session, as always
        pass_time(on, now, 1)
        assert len(on.transceiver.sessions) == 1
        pass_time(on, now, 8)
        await closed(client)
        assert not on.transceiver.sessions
        assert len(told(client, "session.updated")) == 2
        (error,) = told(client, "error")
        assert error["error"]["code"] == "session_expired"
        assert types(client)[-1] == "error"
        assert on.transceiver.counters[Count.ENDED_EXPIRED] == 1

    limits = "session_s_max = 100\nnotice_s = 10\nsilence_deadline_s = 1000"
    house(tmp_path, scenario, clock=lambda: now[0], limits=limits)


def test_a_handshake_that_never_ends_has_a_deadline(tmp_path: Path) -> None:
    now = [5000.0]

    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        _, body, _ = await on.offer(await client.offer())
        knock(on, body["call_id"])
        await shim.until(lambda: sessions(on)[0].state is State.CONNECTING)
        on.transceiver.book()
        assert on.transceiver.counters[Count.SESSIONS_CONNECTING] == 1
        pass_time(on, now, 14.9)
        assert len(on.transceiver.sessions) == 1
        pass_time(on, now, 0.1)
        assert not on.transceiver.sessions
        assert on.transceiver.counters[Count.ENDED_NEVER_CONNECTED] == 1

    house(tmp_path, scenario, clock=lambda: now[0])


# --- draining -------------------------------------------------------------------------------------


def test_a_drain_takes_no_calls_and_ends_with_the_last_one(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client, call_id = await on.call()
        on.transceiver.drain()
        await shim.until(lambda: told(client, "session.updated"))
        ends_at = told(client, "session.updated")[0]["session"]["expires_at"]
        assert abs(ends_at - time.time() - 77) < 20
        assert (await on.ask("GET", "/v1/health"))[1]["state"] == "draining"
        status, body, headers = await on.offer("v=0")
        assert status == 503
        assert headers["Retry-After"] == str(control.RETRY_AFTER_S)
        assert body["error"]["message"].startswith("This transceiver is about to stop")
        assert on.transceiver.counters[Count.REFUSED_DRAINING] == 1
        on.transceiver.drain()  # twice changes nothing
        assert not on.transceiver.drained.is_set()
        client.channel.send('{"type": "input_audio_buffer.clear"}')  # the call itself goes on
        await shim.until(lambda: "input_audio_buffer.cleared" in types(client))
        await on.ask("DELETE", f"/v1/sessions/{call_id}")
        await asyncio.wait_for(on.transceiver.drained.wait(), shim.WAIT_S)
        assert len(told(client, "session.updated")) == 1

    house(tmp_path, scenario, limits="drain_s = 77")


def test_a_drain_has_a_deadline(tmp_path: Path) -> None:
    now = [5000.0]

    async def scenario(on: House) -> None:
        client, _ = await on.call()
        on.transceiver.drain()
        pass_time(on, now, 76)
        assert not on.transceiver.drained.is_set()
        pass_time(on, now, 1)
        assert on.transceiver.drained.is_set()
        await on.transceiver.stop()
        await closed(client)
        (error,) = told(client, "error")
        assert (error["error"]["type"], error["error"]["code"]) == (
            "server_error",
            "server_shutting_down",
        )

    limits = "drain_s = 77\nsilence_deadline_s = 1000"
    house(tmp_path, scenario, clock=lambda: now[0], limits=limits)


def test_a_drain_of_nothing_is_over_at_once(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        on.transceiver.drain()
        assert on.transceiver.drained.is_set()

    house(tmp_path, scenario)


@contextmanager
def program(folder: Path, limits: str) -> Iterator[tuple[subprocess.Popen[str], House]]:
    """A transceiver in a process of its own, and a house that has it instead of one inside."""
    path = configure(folder, limits=limits)
    config = settings.load(path, settings.Transceiver)
    with subprocess.Popen(
        [COMMAND, "run", "--config", path], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert any(" ready" in line for line in process.stderr)
            yield process, House(config, time.monotonic)
        finally:
            process.kill()


async def visit(on: House) -> None:
    """Be a client of the house without starting what it has inside."""
    on.http = aiohttp.ClientSession()
    on.shim = shim.Shim(on.address)


async def leave(on: House) -> None:
    for client in on.clients:
        await client.close()
    await on.http.close()
    on.shim.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_drains_and_another_signal_ends_it(tmp_path: Path, second: int) -> None:
    with program(tmp_path, "drain_s = 600") as (process, on):

        async def scenario() -> None:
            await visit(on)
            client, _ = await on.call()
            process.send_signal(signal.SIGTERM)
            await shim.until(lambda: told(client, "session.updated"))
            assert (await on.ask("GET", "/v1/health"))[1]["state"] == "draining"
            assert process.poll() is None
            process.send_signal(second)
            await closed(client)
            assert told(client, "error")[0]["error"]["code"] == "server_shutting_down"
            await leave(on)

        asyncio.run(scenario())
        assert process.wait(shim.WAIT_S) == 0


def test_a_drained_process_ends_by_itself(tmp_path: Path) -> None:
    with program(tmp_path, "drain_s = 600") as (process, on):

        async def scenario() -> None:
            await visit(on)
            client, call_id = await on.call()
            process.send_signal(signal.SIGTERM)
            await shim.until(lambda: told(client, "session.updated"))
            await on.ask("DELETE", f"/v1/sessions/{call_id}")
            await leave(on)

        asyncio.run(scenario())
        assert process.wait(shim.WAIT_S) == 0


def test_sighup_ends_no_call(tmp_path: Path) -> None:
    """Operators send it to all programs alike, and the other two read their settings again."""
    with program(tmp_path, "") as (process, on):

        async def scenario() -> None:
            await visit(on)
            _, call_id = await on.call()
            process.send_signal(signal.SIGHUP)
            assert process.stderr is not None
            while "SIGHUP" not in await asyncio.to_thread(process.stderr.readline):
                assert process.poll() is None
            assert (await on.ask("GET", f"/v1/sessions/{call_id}"))[1]["state"] == "live"
            await leave(on)

        asyncio.run(scenario())


# --- load -----------------------------------------------------------------------------------------


def test_a_loaded_process_refuses_calls_until_it_is_not(tmp_path: Path) -> None:
    """Real CPU: the process is kept busy with requests."""
    with program(tmp_path, "load_max = 0.3\nlag_s_max = 100") as (_, on):

        async def scenario() -> None:
            await visit(on)
            client = shim.Client()
            on.clients.append(client)
            text = await client.offer()
            status, body, _ = await on.offer(text)
            assert status == 201
            await on.ask("DELETE", f"/v1/sessions/{body['call_id']}")

            async def bother() -> None:
                while True:
                    async with on.http.get(on.url + "/metrics") as response:
                        await response.read()

            bothering = asyncio.create_task(bother())
            while (health := (await on.ask("GET", "/v1/health"))[1])["load"] < 1:
                await asyncio.sleep(0.1)
            assert health["cpu"] >= 0.3
            status, body, headers = await on.offer(text)
            assert status == 503 and "Retry-After" in headers
            assert body["error"]["code"] == "overloaded"
            assert body["error"]["message"].startswith("This transceiver is loaded")
            bothering.cancel()
            while (status := (await on.offer(text))[0]) == 503:
                await asyncio.sleep(0.1)
            assert status == 201
            await leave(on)

        asyncio.run(asyncio.wait_for(scenario(), 60))


def test_two_hundred_offers_at_once_are_not_all_taken(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        text = await client.offer()
        answers = await asyncio.gather(*(on.offer(text) for _ in range(200)))
        taken = [status for status, *_ in answers].count(201)
        refused = [headers for status, _, headers in answers if status == 503]
        assert taken + len(refused) == 200
        assert taken == 32
        assert all("Retry-After" in headers for headers in refused)
        assert on.transceiver.counters[Count.REFUSED_CONNECTING] == 168

    # All of them are fresh, however long they take.
    limits = "sessions_max = 1000\nload_max = 100\nlag_s_max = 100"
    house(tmp_path, scenario, clock=lambda: 5000.0, limits=limits)


# --- faults stay alone ----------------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("made by a test")


BREAKS = {
    "a packet": lambda session: setattr(session._receiver, "receive", broken),
    "time": lambda session: setattr(session._receiver, "tick", broken),
    "a message": lambda session: setattr(session._conversation, "client_message", broken),
    "play-out": lambda session: (
        setattr(session._playout, "send", broken),
        session._playout.write("an item", bytes(6_400), time.monotonic()),
        session._owner.paced(session),
    ),
    "the sweep": lambda session: setattr(session.reports, "write", broken),
    "the backend's tick": lambda session: setattr(session._backend, "tick", broken),
    "the backend's ears": lambda session: setattr(session._backend, "append", broken),
    "the backend's events": lambda session: setattr(session._backend, "send", broken),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_session_that_meets_a_fault_ends_alone(tmp_path: Path, what: str) -> None:
    async def scenario(on: House) -> None:
        healthy, kept = await on.call()
        ill, lost = await on.call()
        BREAKS[what](on.transceiver.sessions[lost])

        async def speak() -> None:
            rounds = 0  # a few: what a fault ends has to get through behind the answers
            while lost in on.transceiver.sessions:
                if ill.channel.readyState == "open" and rounds < 3:
                    rounds += 1
                    ill.channel.send('{"type": "input_audio_buffer.commit"}')
                    text = {"type": "message", "role": "user", "content": []}
                    item = {"type": "conversation.item.create", "item": text}
                    ill.channel.send(json.dumps(item))
                    ill.channel.send('{"type": "response.create"}')
                await asyncio.sleep(0.05)

        await asyncio.wait_for(speak(), shim.WAIT_S)
        await closed(ill)
        assert on.transceiver.counters[Count.ENDED_FAULT] == 1
        if what != "play-out":  # which is on the way of every event
            assert told(ill, "error")[-1]["error"]["code"] == "internal_error"
        assert list(on.transceiver.sessions) == [kept]
        known = len(healthy.messages)
        healthy.channel.send('{"type": "input_audio_buffer.clear"}')
        await shim.until(lambda: len(healthy.messages) > known)
        assert types(healthy)[-1] == "input_audio_buffer.cleared"

    faulty = what in ("a packet", "the backend's ears")  # met in the callback of a datagram
    house(tmp_path, scenario, faults=int(faulty))


def test_a_fault_in_the_clockwork_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(on: House) -> None:
        told_to: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, about: told_to.append(about))
        monkeypatch.setattr(on.transceiver, "_look_whether_drained", broken)
        await shim.until(lambda: len(told_to) > 1)
        monkeypatch.undo()
        client, _ = await on.call()
        ticks = on.transceiver._steps
        await shim.until(lambda: on.transceiver._steps > ticks + 2)
        assert types(client)[0] == "session.created"

    house(tmp_path, scenario)


def test_a_goodbye_that_hangs_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transceiver, "STOP_S", 0.2)

    async def scenario(on: House) -> None:
        await on.call()
        session = sessions(on)[0]
        real, hanging = session.close, asyncio.Event()

        async def close(reason: str) -> None:
            await hanging.wait()
            await real(reason)

        monkeypatch.setattr(session, "close", close)
        stopping = on.transceiver.stop()
        await asyncio.wait_for(stopping, shim.WAIT_S)
        hanging.set()

    house(tmp_path, scenario)


def test_a_close_that_fails_frees_the_rest(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client, call_id = await on.call()
        session = on.transceiver.sessions[call_id]
        real, session._backend.close = session._backend.close, broken
        await on.ask("DELETE", f"/v1/sessions/{call_id}")
        await closed(client)
        real()

    house(tmp_path, scenario)


def test_a_handshake_that_was_broken_off_is_freed_without_the_collector(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        _, body, _ = await on.offer(await client.offer())
        knock(on, body["call_id"])
        session = sessions(on)[0]
        await shim.until(lambda: sessions(on)[0]._peer._dtls is not None)
        left = [weakref.ref(each) for each in (session, session._peer, session._peer._dtls)]
        del session
        await on.ask("DELETE", f"/v1/sessions/{body['call_id']}")
        await shim.until(lambda: not any(each() is not None for each in left))

    gc.collect()
    gc.disable()
    try:
        house(tmp_path, scenario)
    finally:
        gc.enable()


def test_a_call_that_has_ended_is_freed_without_the_collector(tmp_path: Path) -> None:
    """Of short calls the collector would keep hundreds, and then hold up everybody's audio."""

    async def scenario(on: House) -> None:
        for polite in (True, False):
            client, call_id = await on.call()
            session = on.transceiver.sessions[call_id]
            parts = (session, session._peer, session._backend, session._conversation)
            transports = (session._peer._dtls, session._peer._sctp)
            codecs = (session._encoder._codec._state.memory, session._decoder._state.memory)
            left = [weakref.ref(each) for each in parts + transports + codecs]
            if polite:
                await on.ask("DELETE", f"/v1/sessions/{call_id}")
                await closed(client)
            else:
                # A client that takes nothing any more: messages wait for it.
                on.shim.down = lambda _: None
                for _ in range(50):
                    session.fault("a_code", "of a test" * 1_000)
                await on.ask("DELETE", f"/v1/sessions/{call_id}")
            del session, parts, transports, codecs
            await shim.until(lambda left=left: not any(each() is not None for each in left))

    gc.collect()
    gc.disable()
    try:
        house(tmp_path, scenario)
    finally:
        gc.enable()


# --- what is measured -----------------------------------------------------------------------------


def test_a_call_is_timed_from_its_offer_to_its_reply(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client, _ = await on.call()
        timings = on.transceiver.timings
        steps = (Timing.SETUP_CHECK, Timing.SETUP_CONNECTED, Timing.SETUP_CHANNEL)
        await shim.until(lambda: timings.count(Timing.SETUP_AUDIO) == 1)
        assert [timings.count(step) for step in steps] == [1, 1, 1]
        check, connected, channel = (timings.total(step) for step in steps)
        assert 0 < check <= connected <= channel < shim.WAIT_S
        await shim.until(lambda: timings.count(Timing.JITTER_IN) > 0)
        await shim.until(lambda: timings.count(Timing.LOOP_LAG) > 0)
        assert timings.count(Timing.TICK) > 0
        async with on.http.get(on.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        assert "earshot_transceiver_sessions_live 1.0" in lines
        assert "earshot_transceiver_setup_connected_seconds_count 1.0" in lines
        assert on.transceiver.counters[Count.FRAMES_DECODED] > 0
        client.channel.send("no JSON")
        await shim.until(lambda: told(client, "error"))
        client.channel.send('{"type": "output_audio_buffer.clear"}')
        await shim.until(lambda: told(client, "output_audio_buffer.cleared"))
        assert on.transceiver.counters[Count.ERRORS_CLIENT] == 1
        assert on.transceiver.counters[Count.ERRORS_SERVER] == 0
        assert timings.count(Timing.INTERRUPTION) == 1

    house(tmp_path, scenario)


def test_a_reply_is_timed(tmp_path: Path) -> None:
    """From the end of the sentence, as the parrot hears it, to the first packet of its answer."""

    async def scenario(on: House) -> None:
        player = MediaPlayer(str(ROOT / "tests/data/sentence.wav"))
        client, _ = await on.call(player.audio)
        await shim.until(lambda: told(client, "output_audio_buffer.started"))
        timings = on.transceiver.timings
        assert timings.count(Timing.REPLY) == 1
        assert 0 <= timings.total(Timing.REPLY) < shim.WAIT_S
        print(f"end of turn to the first packet: {1000 * timings.total(Timing.REPLY):.1f} ms")

    house(tmp_path, scenario)
