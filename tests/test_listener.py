"""The listener, over real sockets: who is slow, who is one too many, and who speaks TLS."""

import asyncio
import contextlib
import errno
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization

import ledger
import listener
import metrics
import settings

from . import servers
from . import test_signaling as stage_of

PATIENCE_S = 20.0
SOON = 0.2
"""Stands for the deadlines where a test wants one to pass."""
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
Count = metrics.Signaling


class Stage:
    """A listener before an application that does as a test says."""

    def __init__(self) -> None:
        self.counters = ledger.Counters(Count)
        self.release = asyncio.Event()
        self.at: tuple[str, int] = ("", 0)
        self.listener: listener.Listener
        self.server: web.Server
        self.config: settings.Signaling
        self.folder: Path

    async def hello(self, request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def hold(self, request: web.Request) -> web.Response:
        await self.release.wait()
        return web.Response(text="released")

    async def echo(self, request: web.Request) -> web.StreamResponse:
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        async for message in channel:
            await channel.send_str(message.data)
        return channel

    async def flood(self, request: web.Request) -> web.Response:
        return web.Response(body=bytes(64 << 20))

    def open(self) -> Any:
        return asyncio.open_connection(*self.at)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                await asyncio.sleep(0.01)

    @property
    def now(self) -> int:
        return self.counters[Count.CONNECTIONS]


@contextlib.asynccontextmanager
async def staged(folder: Path, more: str = "") -> AsyncIterator[Stage]:
    stage = Stage()
    app = web.Application()
    app.router.add_get("/", stage.hello)
    app.router.add_get("/hold", stage.hold)
    app.router.add_get("/echo", stage.echo)
    app.router.add_get("/flood", stage.flood)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    assert runner.server is not None
    stage.server = runner.server
    stage.folder, stage.config = folder, load(folder, more)
    stage.listener = listener.Listener(runner, stage.config, stage.counters)
    try:
        at = await stage.listener.start()
        stage.at = (at.host, at.port)
        yield stage
    finally:
        await stage.listener.stop()
        await runner.cleanup()
        await stage.until(lambda: stage.now == 0)


def load(folder: Path, more: str) -> settings.Signaling:
    return settings.load(stage_of.write_settings(folder, [9000], more), settings.Signaling)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side ends the connection."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


# --- in time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"GET / HT", GET[:-2], b"POST / HTTP/1.1\r\nA: b\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(listener, "HEAD_S", SOON)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            reader, writer = await stage.open()
            writer.write(begun)
            said = await ended(reader)
            if begun:
                head, _, body = said.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 408 ")
                assert orjson.loads(body)["error"]["code"] == "timeout"
            else:
                assert said == b""
            assert stage.counters[Count.CONNECTIONS_SLOW] == 1
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("again", [False, True], ids=["first", "after an answer"])
def test_a_head_that_trickles_in_does_not_buy_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(listener, "HEAD_S", 3 * SOON)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            reader, writer = await stage.open()
            if again:
                writer.write(GET)
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
            saying = asyncio.create_task(ended(reader))
            sent = 0
            writer.write(b"GET / HTTP/1.1\r\n")
            while not saying.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"X-%d: y\r\n" % sent)
                    await writer.drain()
                sent += 1
                assert sent < PATIENCE_S / 0.02
                await asyncio.sleep(0.02)
            assert stage.counters[Count.CONNECTIONS_SLOW] == 1
            writer.close()

    asyncio.run(run())


def test_an_honest_client_keeps_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It idles between two requests for longer than a head may take, and a request takes longer."""
    monkeypatch.setattr(listener, "HEAD_S", SOON)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            reader, writer = await stage.open()
            for _ in range(2):
                writer.write(GET)
                await reader.readuntil(b"hello")
                await asyncio.sleep(2 * SOON)
            writer.write(GET.replace(b"/ ", b"/hold "))
            await asyncio.sleep(2 * SOON)
            stage.release.set()
            await reader.readuntil(b"released")
            writer.write(GET + GET)  # two at once
            for _ in range(2):
                await reader.readuntil(b"hello")
            assert stage.counters[Count.CONNECTIONS_SLOW] == 0 and stage.now == 1
            writer.close()

    asyncio.run(run())


def test_a_websocket_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_S", "KEEP_ALIVE_S"):
        monkeypatch.setattr(listener, name, SOON)

    async def run() -> None:
        async with staged(tmp_path) as stage, aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{stage.at[1]}/echo"
            async with http.ws_connect(url) as channel:
                await asyncio.sleep(3 * SOON)
                await channel.send_str("still here")
                assert await channel.receive_str(timeout=PATIENCE_S) == "still here"

    asyncio.run(run())


@pytest.mark.parametrize("path", [b"/", b"/flood"], ids=["idles", "takes no answer"])
def test_after_an_answer_a_connection_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", SOON)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            _, writer = await stage.open()
            writer.write(GET.replace(b"/ ", path + b" ", 1))
            await stage.until(lambda: stage.now == 1)
            await stage.until(lambda: stage.now == 0)
            await stage.until(lambda: not stage.server.connections)  # nor does a task wait for ever
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("before", [b"", b"\r\n\r\n", GET], ids=["first", "after lines", "second"])
@pytest.mark.parametrize("step", [100, 7_000, 100_000])
def test_a_head_has_so_many_octets(tmp_path: Path, before: bytes, step: int) -> None:
    """However it is cut into segments, and whatever stands before it."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(
        b"X-%d: %s\r\n" % (number, b"y" * 8_000) for number in range(60)
    )

    async def run() -> None:
        async with staged(tmp_path) as stage:
            for count, status in ((31_900, b"200"), (len(head), b"431")):
                reader, writer = await stage.open()
                if before:
                    writer.write(before)
                    await writer.drain()
                if before == GET:
                    await reader.readuntil(b"hello")
                text = head[:count].rpartition(b"\r\n")[0] + b"\r\n\r\n"
                sent = 0
                for at in range(0, len(text), step):
                    with contextlib.suppress(ConnectionError):
                        writer.write(text[at : at + step])
                        await writer.drain()
                    sent += step
                    if status == b"431" and sent > 3 * listener.HEAD_OCTETS_MAX:
                        break
                assert (await reader.readline()).split()[1] == status
                writer.close()

    asyncio.run(run())


def test_who_is_refused_in_the_middle_of_a_body_still_gets_the_answer(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            reader, writer = await stage.open()
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
            answer = await reader.readuntil(b"hello")
            assert b"Connection: close" in answer
            for _ in range(100):
                writer.write(bytes(10_000))
                await writer.drain()
            assert await ended(reader) == b""
            writer.close()

    asyncio.run(run())


def test_what_is_no_http_gets_a_body_and_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            for octets in (
                b"\x16\x03\x01\x02\x00\x01\x00" + bytes(64),  # TLS where there is none
                b"GET / HTTP/9.9\r\n\r\n",
                b"GET / HTTP/1.1\r\nA b\r\n\r\n",
                b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100 + b"\r\n",
                b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000 + b"\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            ):
                reader, writer = await stage.open()
                writer.write(octets)
                head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1."), octets[:40]
                assert head.split()[1] == b"400", octets[:40]
                assert orjson.loads(body)["error"]["message"]
                assert b"aiohttp" not in head and b"Python" not in head
                writer.close()

    asyncio.run(run())
    assert not caplog.records


# --- in number ------------------------------------------------------------------------------------


async def crowd(stage: Stage, count: int) -> list[asyncio.StreamWriter]:
    return [(await stage.open())[1] for _ in range(count)]


async def answered(stage: Stage) -> bool:
    """Whether a client that comes now is served."""
    reader, writer = await stage.open()
    with contextlib.suppress(ConnectionError):
        writer.write(GET)
    served = b"hello" in await ended_or(reader, b"hello")
    writer.close()
    return served


async def ended_or(reader: asyncio.StreamReader, mark: bytes) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.readuntil(mark)
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""


def test_an_address_has_so_many_places(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, "connections_per_address_max = 5") as stage:
            writers = await crowd(stage, 5)
            await stage.until(lambda: stage.now == 5)
            assert not await answered(stage)
            assert stage.counters[Count.CONNECTIONS_REFUSED] == 1
            writers.pop().close()
            await stage.until(lambda: stage.now == 4)
            assert await answered(stage), "a place that was given up is free"
            for writer in writers:
                writer.close()

    asyncio.run(run())


def test_a_trusted_proxy_has_as_many_as_it_likes(tmp_path: Path) -> None:
    (tmp_path / "api-keys").touch(mode=0o600)
    more = 'connections_per_address_max = 2\nkeys_file = "api-keys"\n'
    more += 'trusted_proxies = ["127.0.0.0/8"]\n'

    async def run() -> None:
        async with staged(tmp_path, more) as stage:
            writers = await crowd(stage, 10)
            await stage.until(lambda: stage.now == 10)
            assert await answered(stage)
            for writer in writers:
                writer.close()

    asyncio.run(run())


def test_thousands_that_idle_keep_nobody_out(tmp_path: Path) -> None:
    """Nor is a request that is in hand given up for a new connection."""
    more = "connections_max = 50\nconnections_per_address_max = 1000000"

    async def run() -> None:
        async with staged(tmp_path, more) as stage:
            reader, writer = await stage.open()
            writer.write(GET.replace(b"/ ", b"/hold ", 1))
            writers = []
            for _ in range(40):
                writers += await crowd(stage, 50)
                assert await answered(stage)
                assert stage.now <= 51
            assert stage.counters[Count.CONNECTIONS_REFUSED] >= 1_900
            stage.release.set()
            assert b"released" in await ended_or(reader, b"released")
            for each in (*writers, writer):
                each.close()

    asyncio.run(run())


def test_places_that_all_have_a_request_in_hand_are_kept(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, "connections_max = 3") as stage:
            pairs = [await stage.open() for _ in range(3)]
            for _, writer in pairs:
                writer.write(GET.replace(b"/ ", b"/hold ", 1))
            await stage.until(lambda: stage.now == 3 and not stage.listener._waiting)
            assert not await answered(stage)
            stage.release.set()
            for reader, writer in pairs:
                assert b"released" in await ended_or(reader, b"released")
                writer.close()

    asyncio.run(run())


def test_there_are_no_more_places_than_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 2_048))
    assert listener._places(700) == 700 and not asked
    assert listener._places(1_500) == 1_500 and asked == [(1_756, 2_048)]
    assert not caplog.records
    assert listener._places(4_096) == 2_048 - listener.DESCRIPTORS_BESIDE
    assert "connections_max: 1792, since" in caplog.text


def test_accepting_goes_on_after_the_kernel_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of descriptors: said once, tried again, and whoever waited is served."""
    monkeypatch.setattr(listener, "PAUSE_S", 0.01)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            loop = asyncio.get_running_loop()
            accept, left = loop.sock_accept, [5]

            async def refused(listening: socket.socket) -> Any:
                if left[0]:
                    left[0] -= 1
                    raise OSError(errno.EMFILE, "Too many open files")
                return await accept(listening)

            monkeypatch.setattr(loop, "sock_accept", refused)
            assert await answered(stage)  # the one that was being waited for
            assert await answered(stage) and not left[0]

    asyncio.run(run())
    assert caplog.text.count("cannot accept connections: [Errno 24] Too many open files") == 1


def test_a_fault_in_accepting_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: listener.Listener, host: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(listener.Listener, "_place", broken)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            _, writer = await stage.open()
            with pytest.raises(ZeroDivisionError):
                async with asyncio.timeout(PATIENCE_S):
                    await stage.listener.until(asyncio.Event())
            writer.close()

    asyncio.run(run())


# --- TLS ------------------------------------------------------------------------------------------

TLS = 'tls_certificate = "server.pem"\ntls_key = "server.key"\n'


def certify(folder: Path) -> ssl.SSLContext:
    """A certificate where the settings expect it, and a client's context that trusts it alone."""
    certificate, key = servers.certify(folder)
    key.chmod(0o600)
    return ssl.create_default_context(cafile=str(certificate))


def test_https_and_wss(tmp_path: Path) -> None:
    trust = certify(tmp_path)

    async def run() -> None:
        async with staged(tmp_path, TLS) as stage:
            assert stage.listener.url == f"https://127.0.0.1:{stage.at[1]}/"
            host = f"127.0.0.1:{stage.at[1]}"
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as http:
                for _ in range(2):
                    async with http.get(f"https://{host}/") as response:
                        assert await response.text() == "hello"
                async with http.ws_connect(f"wss://{host}/echo") as channel:
                    await channel.send_str("over TLS")
                    assert await channel.receive_str(timeout=PATIENCE_S) == "over TLS"

    asyncio.run(run())


def versions() -> list[tuple[str, Callable[[ssl.SSLContext], None], bool]]:
    def only(version: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
        def limit(context: ssl.SSLContext) -> None:
            context.minimum_version = context.maximum_version = version

        return limit

    def old(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA:AES256-GCM-SHA384:ECDHE-ECDSA-AES128-SHA@SECLEVEL=0")

    return [
        ("1.3", only(ssl.TLSVersion.TLSv1_3), True),
        ("1.2", only(ssl.TLSVersion.TLSv1_2), True),
        ("1.2 with old suites", old, False),
    ]


@pytest.mark.parametrize(
    ("limit", "good"), [v[1:] for v in versions()], ids=[v[0] for v in versions()]
)
def test_only_what_is_sound_is_agreed_on(
    tmp_path: Path, limit: Callable[[ssl.SSLContext], None], good: bool
) -> None:
    trust = certify(tmp_path)
    limit(trust)

    async def run() -> None:
        async with staged(tmp_path, TLS) as stage:
            if not good:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await asyncio.open_connection(*stage.at, ssl=trust)
                await stage.until(lambda: stage.counters[Count.HANDSHAKES_FAILED] == 1)
                return
            reader, writer = await asyncio.open_connection(*stage.at, ssl=trust)
            writer.write(GET)
            assert b"hello" in await ended_or(reader, b"hello")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("octets", [b"", b"\x16\x03\x01", GET], ids=["silence", "a part", "HTTP"])
def test_a_handshake_that_comes_to_nothing_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, octets: bytes
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", SOON)
    certify(tmp_path)

    async def run() -> None:
        async with staged(tmp_path, TLS) as stage:
            reader, writer = await stage.open()
            writer.write(octets)
            await ended(reader)
            await stage.until(lambda: stage.now == 0)
            assert stage.counters[Count.HANDSHAKES_FAILED] == 1
            writer.close()

    asyncio.run(run())


def test_handshakes_that_wait_make_room_too(tmp_path: Path) -> None:
    trust = certify(tmp_path)

    async def run() -> None:
        async with staged(tmp_path, TLS + "connections_max = 5") as stage:
            writers = await crowd(stage, 20)
            reader, writer = await asyncio.open_connection(*stage.at, ssl=trust)
            writer.write(GET)
            assert b"hello" in await ended_or(reader, b"hello")
            assert stage.now <= 5
            for each in (*writers, writer):
                each.close()

    asyncio.run(run())


def serial(at: tuple[str, int]) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(at) as plain, context.wrap_socket(plain) as wrapped:
        return wrapped.getpeercert(binary_form=True) or b""


def test_a_new_certificate_is_shown_after_a_reload_and_a_broken_one_never(tmp_path: Path) -> None:
    trust = certify(tmp_path)

    async def run() -> None:
        async with staged(tmp_path, TLS) as stage:
            reader, writer = await asyncio.open_connection(*stage.at, ssl=trust)
            before = await asyncio.to_thread(serial, stage.at)
            certify(tmp_path)
            assert await asyncio.to_thread(serial, stage.at) == before
            stage.listener.reload(stage.config)
            after = await asyncio.to_thread(serial, stage.at)
            assert after != before
            (tmp_path / "server.key").write_text("nonsense")
            with pytest.raises(settings.SettingsError):
                stage.listener.reload(stage.config)
            assert await asyncio.to_thread(serial, stage.at) == after
            writer.write(GET)  # the connection from before goes on
            assert b"hello" in await ended_or(reader, b"hello")
            writer.close()

    asyncio.run(run())


def test_a_certificate_of_no_use_says_why(tmp_path: Path) -> None:
    def wrong(sentence: str) -> None:
        with pytest.raises(settings.SettingsError, match=sentence):
            listener.tls(load(tmp_path, TLS).signaling)

    wrong("server.pem: No such file")
    certify(tmp_path)
    key = tmp_path / "server.key"
    key.chmod(0o644)
    wrong("server.key: mode 0644 lets others than its owner and group read the key: chmod 640")
    key.chmod(0o640)
    assert listener.tls(load(tmp_path, TLS).signaling)
    text = key.read_text()
    key.write_text("nonsense")
    wrong("signaling.tls_certificate: .*server.pem and .*server.key are no certificate")
    (tmp_path / "other").mkdir()
    key.write_text(servers.certify(tmp_path / "other")[1].read_text())
    wrong("are no certificate .* with its key: KEY_VALUES_MISMATCH")
    key.write_text(text)
    (tmp_path / "server.pem").write_text("nonsense")
    wrong("are no certificate")
    assert listener.tls(load(tmp_path, "").signaling) is None


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    certify(tmp_path)
    path = tmp_path / "server.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(settings.SettingsError, match="needs a passphrase"):
        listener.tls(load(tmp_path, TLS).signaling)
