"""The parrot as a model server: what a client of the Realtime WebSocket sees of it."""

import asyncio
import base64
import contextlib
import ssl
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import psutil
import pytest

import realtime
from resample import Resampler
from turns import RATE_HZ

from . import servers
from .line import SPEECH

PATIENCE_S = 20.0


class Client:
    """A connection to a server, and what has been said on it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.events: list[dict[str, Any]] = []

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send_str(orjson.dumps({"type": kind, **fields}).decode())

    async def hear(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                event = orjson.loads(await self.socket.receive_str())
                self.events.append(event)
                if event["type"] == kind:
                    return event

    async def speak(self, rate_hz: int) -> None:
        """Half a second of silence, the sentence, a second of silence: all at once."""
        pcm = Resampler(RATE_HZ, rate_hz).feed(bytes(RATE_HZ) + SPEECH + bytes(2 * RATE_HZ))
        for at in range(0, len(pcm), 9_600):
            audio = base64.b64encode(pcm[at : at + 9_600]).decode()
            await self.say("input_audio_buffer.append", audio=audio)

    def kinds(self) -> list[str]:
        """Types in order, runs of deltas as one."""
        found: list[str] = []
        for event in self.events:
            if not (found and found[-1] == event["type"] and "delta" in event):
                found.append(event["type"])
        return found


def talk(url: str, scenario: Callable[[Client], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def run() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(url + "?model=any", protocols=("realtime",), **options) as socket,
        ):
            assert socket.protocol == "realtime"
            await scenario(Client(socket))

    asyncio.run(run())


def likeness(said: bytes, heard: bytes) -> float:
    """The peak of the normalised cross-correlation."""
    a, b = (np.frombuffer(pcm, "<i2").astype(float) for pcm in (said, heard))
    size = 1 << (len(a) + len(b)).bit_length()
    product = np.fft.irfft(np.fft.rfft(b, size) * np.conj(np.fft.rfft(a, size)), size)
    return float(np.max(product) / np.sqrt(np.sum(a**2) * np.sum(b**2)))


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
@pytest.mark.parametrize("beta", [False, True])
def test_a_whole_turn(rate_hz: int, beta: bool) -> None:
    async def scenario(client: Client) -> None:
        created = await client.hear("session.created")
        session = created["session"]
        if beta:
            assert session["input_audio_format"] == "pcm16"
            assert "audio" not in session
        else:
            assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": rate_hz}
        await client.speak(rate_hz)
        await client.hear("response.done")
        name = "response.audio" if beta else "response.output_audio"
        heard = b"".join(
            base64.b64decode(e["delta"]) for e in client.events if e["type"] == f"{name}.delta"
        )
        wanted = Resampler(RATE_HZ, rate_hz).feed(SPEECH)
        assert likeness(wanted, heard) > 0.9
        items = ["created"] if beta else ["added", "done"]
        assert client.kinds() == [
            "session.created",
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            *[f"conversation.item.{what}" for what in items],
            "response.created",
            "response.output_item.added",
            f"conversation.item.{items[0]}",
            "response.content_part.added",
            f"{name}.delta",
            f"{name}_transcript.delta",
            f"{name}.delta",
            f"{name}.done",
            f"{name}_transcript.done",
            "response.content_part.done",
            "response.output_item.done",
            *([] if beta else ["conversation.item.done"]),
            "response.done",
        ]

    with servers.serving("--rate", str(rate_hz), *(["--beta"] if beta else [])) as served:
        talk(served.url, scenario)


def test_mistakes_get_their_event_id_back_and_too_much_ends_the_connection() -> None:
    async def scenario(client: Client) -> None:
        await client.hear("session.created")
        for event in (
            {"type": "input_audio_buffer.append", "audio": "!"},
            {"type": "input_audio_buffer.append"},
            {"type": "response.cancel"},
            {"type": "no.such"},
        ):
            await client.say(**{"kind": event.pop("type"), "event_id": "mine", **event})
            error = await client.hear("error")
            assert error["error"]["event_id"] == "mine"
            assert error["event_id"]
        for nonsense in ("", "[", "[]", "[" * 5_000, '"' + "x" * realtime.SESSION_OCTETS_MAX + '"'):
            await client.socket.send_str(nonsense)
            await client.hear("error")
        await client.socket.send_bytes(b'{"type": "input_audio_buffer.clear"}')
        await client.hear("input_audio_buffer.cleared")
        with contextlib.suppress(ConnectionError):  # it need not read it all
            await client.socket.send_str("x" * (2 << 20))
        ended = await client.socket.receive(PATIENCE_S)
        # Its reason may be lost: what it has not read of ours makes the kernel reset it.
        assert ended.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)

    async def another(client: Client) -> None:
        await client.hear("session.created")

    with servers.serving() as served:
        talk(served.url, scenario)
        talk(served.url, another)


def test_a_client_that_reads_nothing_is_not_listened_to() -> None:
    async def scenario(client: Client) -> None:
        before = psutil.Process(served.process.pid).memory_info().rss
        with contextlib.suppress(TimeoutError):
            for _ in range(50_000):
                async with asyncio.timeout(2.0):
                    await client.say("response.create")
        grown = psutil.Process(served.process.pid).memory_info().rss - before
        assert grown < 32 << 20  # of 200 MB that the answers would be
        for _ in range(100):  # it goes on as soon as it is read
            await client.hear("response.done")

    with servers.serving() as served:
        talk(served.url, scenario)


def test_a_key_a_full_house_and_a_page_that_is_none(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-parrot")
    key.chmod(0o600)

    async def run(url: str) -> None:
        async with aiohttp.ClientSession() as http:
            for wrong in ({}, {"Authorization": "Bearer sk-parro"}):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.ws_connect(url, headers=wrong)
                assert refused.value.status == 401
            right = {"Authorization": "Bearer sk-parrot"}
            async with http.ws_connect(url, headers=right) as socket:
                assert (await socket.receive_json(timeout=PATIENCE_S))["type"] == "session.created"
                async with http.get(url.replace("ws", "http", 1), headers=right) as response:
                    assert response.status == 503
                    assert (await response.json())["error"]["code"] == "overloaded"
            while True:  # its place is free once the server has seen it go
                async with http.get(url.replace("ws", "http", 1), headers=right) as response:
                    if response.status == 400:
                        assert (await response.json())["error"]["code"] == "upgrade_required"
                        break

    with servers.serving("--key-file", key, "--sessions-max", "1") as served:
        asyncio.run(run(served.url))


def test_wss_and_a_goodbye(tmp_path: Path) -> None:
    certificate, private_key = servers.certify(tmp_path)
    with servers.serving("--certificate", certificate, "--private-key", private_key) as served:

        async def scenario(client: Client) -> None:
            await client.hear("session.created")
            served.process.terminate()
            ended = await client.socket.receive(PATIENCE_S)
            assert ended.type is aiohttp.WSMsgType.CLOSE
            assert ended.data == aiohttp.WSCloseCode.GOING_AWAY

        assert served.url.startswith("wss://")
        talk(served.url, scenario, ssl=ssl.create_default_context(cafile=certificate))
        assert served.process.wait(10) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--listen", "localhost:1"], "is not ADDRESS:PORT"),
        (["--key-file", "absent"], "absent: No such file"),
        (["--certificate", "absent"], "--certificate: absent: "),
        (["--private-key", "absent"], "--private-key: needs --certificate"),
        (["--rate", "8000"], "8000"),
    ],
)
def test_what_it_cannot_serve_with(tmp_path: Path, options: list[str], reason: str) -> None:
    ran = subprocess.run(
        [servers.COMMAND, "serve", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode != 0
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr
