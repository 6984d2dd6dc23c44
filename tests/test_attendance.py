"""Attendants of a call over a real WebSocket, at a real transceiver."""

import asyncio
import functools
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer
from aiortc.mediastreams import AudioStreamTrack

import attendance
import attendants
import transceiver
from metrics import Transceiver as Count

from . import servers, shim
from .test_transceiver import House, house, sessions, types

Socket = aiohttp.ClientWebSocketResponse


@asynccontextmanager
async def attending(on: House, call_id: str) -> AsyncIterator[Socket]:
    url = f"{on.url}/v1/sessions/{call_id}/events"
    async with on.http.ws_connect(url, max_msg_size=0) as socket:
        yield socket


async def told(socket: Socket) -> dict[str, Any]:
    return dict(json.loads(await socket.receive_str(timeout=shim.WAIT_S)))


async def offered(on: House) -> str:
    """A call that nobody has come for: it has no data channel. Its id."""
    client = shim.Client()
    on.clients.append(client)
    _, body, _ = await on.offer(await client.offer(AudioStreamTrack()))
    return str(body["call_id"])


async def until(socket: Socket, kind: str) -> dict[str, Any]:
    while (event := await told(socket))["type"] != kind:
        pass
    return event


async def end(socket: Socket) -> tuple[int, str]:
    """The close code and the reason, after all that comes before."""
    while (message := await socket.receive(timeout=shim.WAIT_S)).type is WSMsgType.TEXT:
        pass
    assert message.type is WSMsgType.CLOSE
    return message.data, message.extra


def attended(found: House) -> int:
    return sum(len(session._conversation.attendants) for session in sessions(found))


def test_it_takes_part_in_a_call_and_hears_of_its_end(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        client, call_id = await on.call()
        async with attending(on, call_id) as socket:
            created = await told(socket)
            assert created["type"] == "session.created"
            assert created["session"]["id"] == call_id
            update = {"type": "session.update", "session": {"instructions": "Sing."}}
            await socket.send_str(json.dumps(update))
            assert (await told(socket))["session"]["instructions"] == "Sing."
            await shim.until(lambda: types(client)[-1] == "session.updated")
            # As on the data channel, octets are taken for text.
            await socket.send_bytes(b'{"type": "no such thing", "event_id": "mine"}')
            assert (await told(socket))["error"]["event_id"] == "mine"
            status, _, _ = await on.ask("DELETE", f"/v1/sessions/{call_id}")
            assert status == 200
            assert await end(socket) == (1000, "hung up by request")
        assert types(client)[-1] != "error"

    house(tmp_path, scenario)


def test_a_call_without_a_client_can_be_attended_and_left(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        async with attending(on, await offered(on)) as socket:
            assert (await told(socket))["type"] == "session.created"
        await shim.until(lambda: attended(on) == 0)
        assert len(sessions(on)) == 1

    house(tmp_path, scenario)


def test_who_asks_for_no_call_of_its_own_is_refused_before_the_upgrade(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        _, call_id = await on.call()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with attending(on, "rtc_none"):
                pass
        assert refused.value.status == 404
        status, body, _ = await on.ask("GET", f"/v1/sessions/{call_id}/events")
        assert (status, body["error"]["code"]) == (400, "http_error")
        async with attending(on, call_id), attending(on, call_id), attending(on, call_id):
            async with attending(on, call_id):
                assert attended(on) == attendants.ATTENDANTS_MAX
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    async with attending(on, call_id):
                        pass
                assert refused.value.status == 429
            await shim.until(lambda: attended(on) == attendants.ATTENDANTS_MAX - 1)
            async with attending(on, call_id) as socket:
                assert (await told(socket))["type"] == "session.created"

    house(tmp_path, scenario)


def test_a_message_too_large_to_read_ends_it_and_one_too_large_to_take_does_not(
    tmp_path: Path,
) -> None:
    async def scenario(on: House) -> None:
        _, call_id = await on.call()
        async with attending(on, call_id) as socket:
            await told(socket)
            await socket.send_str("x" * (attendance.MESSAGE_OCTETS_MAX - 1))
            assert (await told(socket))["error"]["code"] == "message_too_large"
            await socket.send_str("x" * (attendance.MESSAGE_OCTETS_MAX + 1))
            assert (await end(socket))[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        await shim.until(lambda: attended(on) == 0)
        assert len(sessions(on)) == 1

    house(tmp_path, scenario)


def test_one_that_does_not_read_is_dropped_and_told_why(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        call_id = await offered(on)
        async with attending(on, call_id) as slow, attending(on, call_id) as quick:
            await told(quick)
            said = {"type": "rate_limits.updated", "text": "x" * 50_000}
            (call,) = sessions(on)
            # What sockets and aiohttp hold by themselves comes before what an attendant may.
            for _ in range(20_000_000 // 50_000):
                call._emitted(said)
                assert (await told(quick))["type"] == said["type"]
            assert attended(on) == 1
            assert await end(slow) == (attendants.TOO_SLOW, "This sideband reads too slowly.")
            await shim.until(lambda: on.transceiver.counters[Count.SIDEBANDS] == 1)
            assert on.transceiver.counters[Count.SIDEBANDS_DROPPED] == 1
        await shim.until(lambda: on.transceiver.counters[Count.SIDEBANDS] == 0)
        assert on.transceiver.counters[Count.SIDEBANDS_DROPPED] == 1

    house(tmp_path, scenario)


def test_one_that_says_a_lot_leaves_most_of_the_time_to_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(on: House) -> None:
        call_id = await offered(on)
        (call,) = sessions(on)
        handled: list[float] = []

        def handle(*_: Any) -> None:
            time.sleep(0.005)
            handled.append(time.monotonic())

        monkeypatch.setattr(call._conversation, "client_message", handle)
        async with attending(on, call_id) as socket:
            for _ in range(10):
                await socket.send_str("{}")
            await shim.until(lambda: len(handled) == 10)
        pauses = [after - before for before, after in pairwise(handled)]
        assert min(pauses) >= 0.005 * (1 + attendance.SHARE)

    house(tmp_path, scenario)


def test_an_event_that_meets_a_fault_ends_the_call_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(on: House) -> None:
        _, call_id = await on.call()
        await on.call()
        call = on.transceiver.find(call_id)
        assert call is not None
        monkeypatch.setattr(call._conversation, "_from_client", functools.partial(int, "x"))
        async with attending(on, call_id) as socket:
            await socket.send_str('{"type": "response.create"}')
            assert (await until(socket, "error"))["error"]["code"] == "internal_error"
            assert await end(socket) == (1000, "a fault in the server")
        assert len(sessions(on)) == 1

    house(tmp_path, scenario)


def test_one_that_never_reads_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "SLOW_S", 1e6)
    monkeypatch.setattr(attendance, "HEARTBEAT_S", 1e6)
    monkeypatch.setattr(transceiver, "STOP_S", 0.5)

    async def scenario(on: House) -> None:
        async with attending(on, await offered(on)):
            (call,) = sessions(on)
            turns_without = 0
            while turns_without < 500:  # then nothing has moved for a while
                (attendant,) = call._conversation.attendants._here
                turns_without += 1
                if attendant._octets < attendants.WAITING_OCTETS_MAX // 2:
                    call._emitted({"type": "rate_limits.updated", "text": "x" * 50_000})
                    turns_without = 0
                await asyncio.sleep(0)
            async with asyncio.timeout(shim.WAIT_S):
                await on.transceiver.stop()

    house(tmp_path, scenario)


def test_the_process_ends_with_attendants_in_it(tmp_path: Path) -> None:
    async def scenario(on: House) -> None:
        _, call_id = await on.call()
        async with attending(on, call_id) as socket:
            stopping = asyncio.create_task(on.transceiver.stop())
            assert (await until(socket, "error"))["error"]["code"] == "server_shutting_down"
            assert await end(socket) == (1000, "the transceiver is shutting down")
            await stopping

    house(tmp_path, scenario)


def test_it_ends_over_tls_too(tmp_path: Path) -> None:
    """asyncio's transport of TLS fails in most methods once it has been closed twice."""

    async def scenario() -> None:
        parted: asyncio.Queue[str] = asyncio.Queue()

        async def serve(request: web.Request) -> web.StreamResponse:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            try:
                await attendance.part(request, socket, 1000, b"over")
                attendance.cut(request)
                parted.put_nowait("well")
            except Exception as error:
                parted.put_nowait(repr(error))
            return socket

        paths = servers.certify(tmp_path)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(*paths)
        client = ssl.create_default_context(cafile=paths[0])
        app = web.Application()
        app.router.add_get("/", serve)
        at = TestServer(app, host="127.0.0.1", scheme="https")
        await at.start_server(ssl=server)
        async with at, aiohttp.ClientSession() as http:
            async with http.ws_connect(at.make_url("/"), ssl=client) as socket:
                assert await end(socket) == (1000, "over")
            assert await asyncio.wait_for(parted.get(), shim.WAIT_S) == "well"

    asyncio.run(scenario())
