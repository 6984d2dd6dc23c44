"""The sideband: from an application's server through either of two instances to a call."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from aiortc.contrib.media import MediaPlayer
from aiortc.mediastreams import AudioStreamTrack

import attendance
import attendants
import settings
import sideband
import signaling
import transceiver
import whip

from . import shim
from .test_reception import KEY, LINE, OTHER, OTHER_LINE, bearer
from .test_transceiver import ROOT, configure, types

Socket = aiohttp.ClientWebSocketResponse

CALLS = "/v1/realtime/calls"


class Site:
    """A transceiver, two instances of signaling with a file of keys, and a client's transport."""

    def __init__(self) -> None:
        self.transceiver: transceiver.Transceiver
        self.shim: shim.Shim
        self.instances: list[signaling.Entrance] = []
        self.runners: list[web.AppRunner] = []
        self.at: list[aiohttp.ClientSession] = []
        self.clients: list[shim.Client] = []

    async def call(self, token: str = KEY, *, comes: bool = True) -> tuple[shim.Client, str]:
        """A client of the first instance, connected unless it never comes; and its call id."""
        client = shim.Client()
        self.clients.append(client)
        headers = bearer(token) | {"Content-Type": "application/sdp"}
        text = await client.offer(AudioStreamTrack())
        async with self.at[0].post(CALLS, data=text, headers=headers) as response:
            assert response.status == 201, await response.text()
            call_id = response.headers["Location"].rpartition("/")[2]
            if comes:
                await client.accept(await response.text())
                await shim.until(lambda: client.messages)
        return client, call_id

    def attended(self) -> int:
        sessions = self.transceiver.sessions.values()
        return sum(len(session._conversation.attendants) for session in sessions)

    async def error(self, status: int, path: str, headers: dict[str, str], at: int = 1) -> Any:
        """What an attempt is told that must fail before the upgrade."""
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
        }
        async with self.at[at].get(path, headers=upgrade | headers) as response:
            body = await response.json()
            assert response.status == status, body
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            return body["error"]


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    found = Site()
    async with AsyncExitStack() as stack:
        config = settings.load(configure(folder), settings.Transceiver)
        found.transceiver = transceiver.Transceiver(config)
        await found.transceiver.start()
        stack.push_async_callback(found.transceiver.stop)
        at = config.transceiver.listen
        found.shim = shim.Shim((at.host, at.port))
        stack.callback(found.shim.close)
        for _ in range(2):
            entrance = signaling.Entrance(configured(folder, found.shim.address, str(at)))
            runner = web.AppRunner(entrance.application(), shutdown_timeout=shim.WAIT_S)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            http = aiohttp.ClientSession(f"http://{host}:{port}")
            found.at.append(await stack.enter_async_context(http))
            found.runners.append(runner)
            found.instances.append(entrance)
        try:
            yield found
        finally:
            for client in found.clients:
                await client.close()


def configured(folder: Path, relay: tuple[str, int], listen: str) -> settings.Signaling:
    keys = folder / "api-keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{LINE}\n{OTHER_LINE}\n")
    path = folder / "signaling.toml"
    path.write_text(
        f"""
        [signaling]
        listen = "127.0.0.1:0"
        relays = ["{relay[0]}:{relay[1]}"]
        transceivers = ["{listen}"]
        keys_file = "api-keys"
        [keys]
        file = "keys"
        [[cluster]]
        id = 1
        prefix = "127.0.0.0/8"
        ports = [1, 65535]
        """
    )
    return settings.load(path, settings.Signaling)


def at_site(folder: Path, scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def run() -> None:
        async with site(folder) as found:
            await scenario(found)

    asyncio.run(run())


@asynccontextmanager
async def attending(
    on: Site, call_id: str, token: str = KEY, at: int = 1, **options: Any
) -> AsyncIterator[Socket]:
    options = {"headers": bearer(token), **options}
    async with on.at[at].ws_connect(f"{sideband.PATH}?call_id={call_id}", **options) as socket:
        yield socket


async def told(socket: Socket) -> dict[str, Any]:
    return dict(json.loads(await socket.receive_str(timeout=shim.WAIT_S)))


async def end(socket: Socket) -> tuple[int, str]:
    """The close code and the reason, after all that comes before."""
    while (message := await socket.receive(timeout=shim.WAIT_S)).type is WSMsgType.TEXT:
        pass
    assert message.type is WSMsgType.CLOSE
    return message.data, message.extra


@pytest.mark.parametrize("at", [0, 1])
def test_it_attends_a_call_through_any_instance(tmp_path: Path, at: int) -> None:
    async def scenario(on: Site) -> None:
        client, call_id = await on.call()
        async with attending(on, call_id, at=at) as socket:
            created = await told(socket)
            assert created["type"] == "session.created"
            assert created["session"]["id"] == call_id
            update = {"type": "session.update", "session": {"instructions": "Sing."}}
            await socket.send_str(json.dumps(update))
            updated = await told(socket)
            await shim.until(lambda: types(client)[-1] == "session.updated")
            assert json.loads(client.messages[-1]) == updated
            assert updated["session"]["instructions"] == "Sing."
            wrong = {"type": "conversation.item.retrieve", "event_id": "mine", "item_id": "x"}
            await socket.send_bytes(json.dumps(wrong).encode())
            assert (await told(socket))["error"]["event_id"] == "mine"
            hang_up = f"{CALLS}/{call_id}/hangup"
            async with on.at[1 - at].post(hang_up, headers=bearer(KEY)) as response:
                assert response.status == 200
            assert await end(socket) == (1000, "hung up by request")
        assert "error" not in types(client)

    at_site(tmp_path, scenario)


def test_a_page_sends_its_ephemeral_key_in_a_subprotocol(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        _, call_id = await on.call()
        async with on.at[0].post("/v1/realtime/client_secrets", headers=bearer(KEY)) as response:
            secret = (await response.json())["value"]
        names = ("realtime", f"openai-insecure-api-key.{secret}", "openai-agents-sdk.0.20.0")
        async with attending(on, call_id, headers={}, protocols=names) as socket:
            assert socket.protocol == "realtime"
            assert (await told(socket))["type"] == "session.created"
        async with attending(on, call_id) as socket:
            assert socket.protocol is None
        # And the other way round: the call is the ephemeral key's, the sideband the API key's.
        _, call_id = await on.call(secret)
        async with attending(on, call_id) as socket:
            assert (await told(socket))["type"] == "session.created"
        assert (await on.error(404, f"{sideband.PATH}?call_id={call_id}", bearer(OTHER)))["code"]

    at_site(tmp_path, scenario)


def test_an_encoders_call_is_led_by_it_alone(tmp_path: Path) -> None:
    """By WHIP there is no data channel: who else would hear what is said in the call?"""

    async def scenario(on: Site) -> None:
        pc = shim.RTCPeerConnection(shim.RTCConfiguration(iceServers=[]))
        player = MediaPlayer(str(ROOT / "tests/data/sentence.wav"))
        pc.addTransceiver(player.audio, direction="sendonly")
        await pc.setLocalDescription(await pc.createOffer())
        headers = bearer(KEY) | {"Content-Type": "application/sdp"}
        text = pc.localDescription.sdp
        async with on.at[0].post(whip.PATH, data=text, headers=headers) as response:
            assert response.status == 201, await response.text()
            answer = await response.text()
            call_id = response.headers["Location"].rpartition("/")[2]
        async with attending(on, call_id) as socket:
            assert (await told(socket))["type"] == "session.created"
            quiet = {"turn_detection": {"type": "server_vad", "create_response": False}}
            update = {"type": "session.update", "session": {"audio": {"input": quiet}}}
            await socket.send_str(json.dumps(update))
            assert (await told(socket))["type"] == "session.updated"
            await pc.setRemoteDescription(shim.RTCSessionDescription(answer, "answer"))
            seen = ""
            while seen != "conversation.item.done":
                seen = (await told(socket))["type"]
            await socket.send_str('{"type": "response.create"}')
            while seen != "output_audio_buffer.started":
                seen = (await told(socket))["type"]
            await socket.send_str('{"type": "output_audio_buffer.clear"}')
            while seen != "output_audio_buffer.cleared":
                seen = (await told(socket))["type"]
            await pc.close()
            code, reason = await end(socket)
            assert (code, bool(reason)) == (1000, True)

    at_site(tmp_path, scenario)


def test_what_is_wrong_is_said_before_the_upgrade(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        _, call_id = await on.call()
        path = f"{sideband.PATH}?call_id="
        for nobody in ("rtc_x", "x" * 5_000, "%00", call_id[:-1], call_id[:-1] + "%2F"):
            error = await on.error(404, path + nobody, bearer(KEY))
            assert (error["code"], error["param"]) == ("call_id_not_found", "call_id")
        assert (await on.error(404, path + call_id, bearer(OTHER)))["code"] == "call_id_not_found"
        assert (await on.error(401, path + call_id, {}))["code"] == "missing_api_key"
        wrong = {"Sec-WebSocket-Protocol": "realtime, openai-insecure-api-key.ek_x"}
        assert (await on.error(401, path + call_id, wrong))["code"] == "invalid_api_key"
        for without in (sideband.PATH, f"{sideband.PATH}?model=m", path):
            error = await on.error(400, without, bearer(KEY))
            assert error["param"] == "call_id"
            assert "call_id" in error["message"]
        plain = {"Connection": "keep-alive", "Upgrade": ""}
        error = await on.error(426, path + call_id, bearer(KEY) | plain)
        assert error["code"] == "upgrade_required"
        status, body = await refused(on, "POST", path + call_id)
        assert (status, body["error"]["code"]) == (405, "method_not_allowed")
        assert on.attended() == 0

    at_site(tmp_path, scenario)


async def refused(on: Site, method: str, path: str) -> tuple[int, Any]:
    async with on.at[0].request(method, path, headers=bearer(KEY)) as response:
        return response.status, await response.json()


def test_there_is_room_for_a_few_and_a_place_is_free_again(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        _, call_id = await on.call()
        async with AsyncExitStack() as stack:
            for at in (0, 1) * (attendants.ATTENDANTS_MAX // 2):
                await stack.enter_async_context(attending(on, call_id, at=at))
            error = await on.error(429, f"{sideband.PATH}?call_id={call_id}", bearer(KEY))
            assert (error["code"], error["param"]) == ("too_many_sidebands", "call_id")
        await shim.until(lambda: on.attended() == 0)
        async with attending(on, call_id) as socket:
            assert (await told(socket))["type"] == "session.created"

    at_site(tmp_path, scenario)


def test_one_that_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        client, call_id = await on.call()
        async with attending(on, call_id) as socket:
            await told(socket)
            transport = socket._response.connection.transport  # type: ignore[union-attr]
            transport.abort()
            await shim.until(lambda: on.attended() == 0)
        # A message that is too long to be read ends the sideband, and no call.
        async with attending(on, call_id) as socket:
            await told(socket)
            await socket.send_str("x" * (attendance.MESSAGE_OCTETS_MAX + 1))
            assert (await end(socket))[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        await shim.until(lambda: on.attended() == 0)
        assert client.pc.connectionState == "connected"

    at_site(tmp_path, scenario)


def test_an_instance_that_stops_sends_its_sidebands_to_another(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        client, call_id = await on.call()
        async with attending(on, call_id, at=0) as socket:
            await told(socket)
            stopping = asyncio.create_task(on.runners[0].cleanup())
            code, reason = await end(socket)
            assert (code, reason.startswith("This instance")) == (1001, True)
            await stopping
        await shim.until(lambda: on.attended() == 0)
        async with attending(on, call_id, at=1) as socket:
            assert (await told(socket))["type"] == "session.created"
        assert client.pc.connectionState == "connected"

    at_site(tmp_path, scenario)


def test_a_transceiver_that_is_lost_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(on: Site) -> None:
        _, call_id = await on.call()
        owners: list[Any] = []
        attend = on.instances[1].door.placement.attend

        async def seen(*args: Any) -> Any:
            owners.append(await attend(*args))
            return owners[-1]

        monkeypatch.setattr(on.instances[1].door.placement, "attend", seen)
        async with attending(on, call_id) as socket:
            await told(socket)
            owners[0]._response.connection.transport.abort()
            assert await end(socket) == (1011, "The transceiver of this call is away.")
        # And one that cannot be reached in the first place is 503.
        await on.transceiver.stop()
        error = await on.error(503, f"{sideband.PATH}?call_id={call_id}", bearer(KEY))
        assert error["type"] == "server_error"

    at_site(tmp_path, scenario)


async def talk_until_it_is_dropped(on: Site) -> None:
    """A call that nobody has come to, without a data channel: its backend says a lot, but no more
    at a time than the transceiver keeps for an attendant, so that it is a matter of time alone."""
    (call,) = on.transceiver.sessions.values()
    while here := call._conversation.attendants._here:
        if here[0]._octets < attendants.WAITING_OCTETS_MAX // 2:
            call._emitted({"type": "rate_limits.updated", "text": "x" * 50_000})
        await asyncio.sleep(0)


def test_one_that_reads_too_slowly_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "SLOW_S", 0.2)

    async def scenario(on: Site) -> None:
        _, call_id = await on.call(comes=False)
        async with attending(on, call_id, max_msg_size=0) as socket:
            await told(socket)
            await talk_until_it_is_dropped(on)
            assert await end(socket) == (1008, "This sideband reads too slowly.")
        assert len(on.transceiver.sessions) == 1

    at_site(tmp_path, scenario)


def test_one_that_never_reads_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "SLOW_S", 0.2)
    monkeypatch.setattr(attendance, "CLOSE_S", 0.2)

    async def scenario(on: Site) -> None:
        _, call_id = await on.call(comes=False)
        async with attending(on, call_id, max_msg_size=0):
            await shim.until(lambda: on.attended() == 1)
            await talk_until_it_is_dropped(on)
            server = on.runners[1].server
            assert server is not None
            await shim.until(lambda: not server.connections)

    at_site(tmp_path, scenario)


@pytest.mark.parametrize(
    ("code", "sent"),
    [(1000, 1000), (1008, 1008), (None, 1000), (0, 1000), (1005, 1000), (1006, 1000), (9, 1000)],
)
def test_no_code_is_sent_that_means_there_was_none(code: int | None, sent: int) -> None:
    assert sideband._sendable(code) == sent
