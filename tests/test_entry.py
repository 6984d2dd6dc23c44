"""The program `signaling` as an operator has it: keys, TLS, SIGHUP, with real clients before it."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import listener
import settings
import signaling

from . import servers
from . import test_signaling as stage_of

PROGRAM = Path(sys.executable).with_name("signaling")
PATIENCE_S = 20.0
CALLS = stage_of.CALLS


class Program:
    """A running signaling."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self._log = process, log
        self.port = 0

    def said(self, text: str, count: int = 1) -> None:
        """Wait until the log has it so often."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self._log.read_text()).count(text) < count:
            assert self.process.poll() is None, found
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def reload(self) -> None:
        before = self.log.count(" reloaded") + self.log.count("the configuration from before")
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            now = self.log.count(" reloaded") + self.log.count("the configuration from before")
            if now > before:
                return
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)


@contextlib.contextmanager
def running(folder: Path, path: Path) -> Iterator[Program]:
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([PROGRAM, "run", "--config", path], stderr=file, text=True)
    program = Program(process, log)
    try:
        program.said(" is ready")
        program.port = int(program.log.partition(" is ready")[0].rpartition(":")[2].strip("/"))
        yield program
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, program.log
    assert "Traceback" not in program.log


def write(folder: Path, port: int, more: str) -> Path:
    return stage_of.write_settings(folder, [port], 'metrics = "127.0.0.1:0"\n' + more)


def private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def made(*argv: str) -> tuple[str, str]:
    """A line for the file, and the key that was shown."""
    done = subprocess.run(
        [PROGRAM, "key", *argv], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return done.stdout, done.stderr.split()[-1]


def offer(key: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/sdp", "Authorization": f"Bearer {key}"}
    return {"data": stage_of.OFFER, "headers": headers}


@contextlib.asynccontextmanager
async def client(program: Program, trust: ssl.SSLContext | None = None) -> AsyncIterator[Any]:
    scheme = "https" if trust else "http"
    connector = aiohttp.TCPConnector(ssl=trust or True)
    base = f"{scheme}://127.0.0.1:{program.port}"
    async with aiohttp.ClientSession(base, connector=connector) as http:
        yield http


async def status(http: aiohttp.ClientSession, key: str) -> int:
    async with http.post(CALLS, **offer(key)) as response:
        assert await response.read()
        return response.status


def test_keys_come_and_go_with_sighup_and_no_request_is_lost(tmp_path: Path) -> None:
    """Requests go on all the while on connections that are kept open; each is answered."""
    path = tmp_path / "api-keys"
    line, key = made("shop")
    other_line, other = made("other", "--calls", "7", "--per-second", "2.5")
    assert other_line.endswith(" calls=7 per_second=2.5\n")
    private(path, line)

    async def run() -> None:
        async with stage_of.FakeTransceiver().running() as fake:
            config = write(tmp_path, fake.port, 'keys_file = "api-keys"')
            config.write_text(config.read_text() + "[limits]\naddress_per_s = 10000.0\n")
            with running(tmp_path, config) as program:
                async with client(program) as http:
                    assert (await status(http, key), await status(http, other)) == (201, 401)
                    stop = asyncio.Event()

                    async def call() -> list[int]:
                        found = []
                        while not stop.is_set():
                            async with http.get("/healthz") as response:
                                found.append(response.status)
                        return found

                    busy = [asyncio.create_task(call()) for _ in range(4)]
                    path.write_text(other_line)
                    for _ in range(3):
                        await asyncio.to_thread(program.reload)
                    assert (await status(http, key), await status(http, other)) == (401, 201)
                    path.write_text("nonsense")
                    await asyncio.to_thread(program.reload)
                    assert "API keys and limits: going on with those from before: " in program.log
                    assert "api-keys: line 1: expected a name" in program.log
                    assert await status(http, other) == 201
                    config.write_text(config.read_text() + "nonsense")
                    await asyncio.to_thread(program.reload)
                    assert await status(http, other) == 201
                    stop.set()
                    found = [one for each in await asyncio.gather(*busy) for one in each]
                    assert len(found) > 10 and set(found) == {200}
                assert key not in program.log and other not in program.log

    asyncio.run(run())


def test_what_a_reload_leaves_alone_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, 9000, "")
    with running(tmp_path, config) as program:
        program.reload()
        assert "is changed by" not in program.log
        text = config.read_text()
        config.write_text(text.replace("9000", "9001").replace("id = 1", "id = 2"))
        program.reload()
        program.said("signaling.transceivers is changed by a restart, and not by a reload")
        program.said("[cluster] is changed by a restart, and not by a reload")
        assert program.log.count("is changed by") == 2


def test_without_keys_it_says_so_loudly(tmp_path: Path) -> None:
    with running(tmp_path, write(tmp_path, 9000, "")) as program:
        assert (
            f"WARNING NO API KEYS: whoever reaches http://127.0.0.1:{program.port}/ may call"
            in (program.log)
        )
    private(tmp_path / "api-keys", "# none yet\n")
    with running(tmp_path, write(tmp_path, 9000, 'keys_file = "api-keys"')) as program:
        program.said("there is no key in signaling.keys_file: nobody may call")
        program.reload()
        program.said("there is no key in signaling.keys_file: nobody may call", 2)
        assert "NO API KEYS" not in program.log


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
@pytest.mark.parametrize("verb", ["check", "run"])
def test_without_keys_it_listens_at_no_other_address(
    tmp_path: Path, verb: str, listen: str
) -> None:
    config = write(tmp_path, 9000, "")
    config.write_text(config.read_text().replace("127.0.0.1:0", listen, 1))
    done = subprocess.run(
        [PROGRAM, verb, "--config", config],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == os.EX_CONFIG
    assert "signaling.keys_file: without API keys only this machine may call" in done.stderr


def test_a_name_for_a_key_that_cannot_be_is_refused() -> None:
    done = subprocess.run(
        [PROGRAM, "key", "two words"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and "the name is not" in done.stderr and not done.stdout


def test_calls_over_https_and_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    certificate, key_file = servers.certify(tmp_path)
    key_file.chmod(0o600)
    trust = ssl.create_default_context(cafile=str(certificate))
    line, key = made("shop")
    private(tmp_path / "api-keys", line)
    more = 'keys_file = "api-keys"\ntls_certificate = "server.pem"\ntls_key = "server.key"\n'

    def shown(port: int) -> str:
        return ssl.get_server_certificate(("127.0.0.1", port)).strip()

    async def run() -> None:
        async with stage_of.FakeTransceiver().running() as fake:
            with running(tmp_path, write(tmp_path, fake.port, more)) as program:
                assert f"https://127.0.0.1:{program.port}/ is ready" in program.log
                async with client(program, trust) as http:
                    assert await status(http, key) == 201
                    before = await asyncio.to_thread(shown, program.port)
                    servers.certify(tmp_path)
                    await asyncio.to_thread(program.reload)
                    after = await asyncio.to_thread(shown, program.port)
                    assert after == certificate.read_text().strip() != before
                    key_file.write_text("cut off by a full disk")
                    await asyncio.to_thread(program.reload)
                    assert "certificate and connections: going on with those from" in program.log
                    assert await asyncio.to_thread(shown, program.port) == after
                    assert await status(http, key) == 201, "on the connection from before"
                    # What cannot be used does not keep a key from being taken away.
                    (tmp_path / "api-keys").write_text("# revoked\n")
                    await asyncio.to_thread(program.reload)
                    assert await status(http, key) == 401
                async with aiohttp.ClientSession() as plain:
                    with pytest.raises(aiohttp.ClientError):
                        await plain.get(f"http://127.0.0.1:{program.port}/healthz")

    asyncio.run(run())


class Attended(stage_of.FakeTransceiver):
    """A transceiver whose calls can be attended: it says back what it is told."""

    async def events(self, request: web.Request) -> web.StreamResponse:
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        async for message in channel:
            await channel.send_str(message.data)
        return channel

    def routes(self) -> list[web.RouteDef]:
        return [*super().routes(), web.get("/v1/sessions/{id}/events", self.events)]


def test_a_page_attends_a_call_over_wss_with_an_ephemeral_key(tmp_path: Path) -> None:
    """The key is in a subprotocol, since browsers let a WebSocket set no header."""
    certificate, key_file = servers.certify(tmp_path)
    key_file.chmod(0o600)
    trust = ssl.create_default_context(cafile=str(certificate))
    line, key = made("shop")
    private(tmp_path / "api-keys", line)
    more = 'keys_file = "api-keys"\ntls_certificate = "server.pem"\ntls_key = "server.key"\n'

    async def run() -> None:
        async with Attended().running() as fake:
            with running(tmp_path, write(tmp_path, fake.port, more)) as program:
                async with client(program, trust) as http:
                    secrets = "/v1/realtime/client_secrets"
                    async with http.post(
                        secrets, headers=offer(key)["headers"], data=""
                    ) as response:
                        ephemeral = (await response.json())["value"]
                    async with http.post(CALLS, **offer(ephemeral)) as response:
                        call_id = response.headers["Location"].rpartition("/")[2]
                    url = f"/v1/realtime?call_id={call_id}"
                    offered = ("realtime", f"openai-insecure-api-key.{ephemeral}")
                    async with http.ws_connect(url, protocols=offered) as channel:
                        assert channel.protocol == "realtime"
                        await channel.send_str("hello")
                        assert await channel.receive_str(timeout=PATIENCE_S) == "hello"
                    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                        await http.ws_connect(url, protocols=("realtime", offered[1][:-1]))
                    assert caught.value.status == 401
                assert ephemeral not in program.log

    asyncio.run(run())


def test_check_says_what_is_wrong_with_a_certificate(tmp_path: Path) -> None:
    config = write(tmp_path, 9000, 'tls_certificate = "a.pem"\ntls_key = "a.key"\n')
    done = subprocess.run(
        [PROGRAM, "check", "--config", config],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == os.EX_CONFIG and "a.pem: No such file" in done.stderr


def test_honest_clients_are_served_while_others_hold_connections(tmp_path: Path) -> None:
    """Two thousand connections that say nothing, or a part of a head, or a part of a body."""
    more = "connections_max = 300\nconnections_per_address_max = 1000000\n"
    begun = (
        b"",
        b"POST /v1/realtime/calls HTTP/1.1\r\nHost: x\r\nA: ",
        b"POST /v1/realtime/calls HTTP/1.1\r\nHost: x\r\nContent-Type: application/sdp\r\n"
        b"Content-Length: 60000\r\n\r\nv=0",
    )

    async def run() -> None:
        async with stage_of.FakeTransceiver().running() as fake:
            with running(tmp_path, write(tmp_path, fake.port, more)) as program:
                held = []
                try:
                    for number in range(2_000):
                        one = socket.create_connection(("127.0.0.1", program.port))
                        # A tenth have a request in hand: these keep their place for 5 s.
                        kind = 2 if number % 10 == 0 else number % 2
                        with contextlib.suppress(ConnectionError):
                            one.sendall(begun[kind])
                        held.append(one)
                        if number % 200 == 199:
                            async with client(program) as http:
                                started = time.monotonic()
                                assert await status(http, "") == 201
                                took_ms = 1e3 * (time.monotonic() - started)
                                print(f"{number + 1} held, a call in {took_ms:.1f} ms")
                        await asyncio.sleep(0)
                finally:
                    for one in held:
                        one.close()

    asyncio.run(run())


def test_a_body_that_is_broken_gets_400_and_one_that_breaks_off_no_traceback(
    tmp_path: Path,
) -> None:
    head = b"POST /v1/realtime/calls HTTP/1.1\r\nHost: x\r\nContent-Type: application/sdp\r\n"

    with running(tmp_path, write(tmp_path, 9000, "")) as program:
        for status, rest in (
            (b"400", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
            (b"415", b"Content-Encoding: gzip\r\nContent-Length: 8\r\n\r\nnot gzip"),
        ):
            with socket.create_connection(("127.0.0.1", program.port), PATIENCE_S) as one:
                one.sendall(head + rest)
                assert one.makefile("rb").readline().split()[1] == status, rest
        for rest in (b"Transfer-Encoding: chunked\r\n\r\n5\r\nv", b"Content-Length: 99\r\n\r\nv=0"):
            with socket.create_connection(("127.0.0.1", program.port), PATIENCE_S) as one:
                one.sendall(head + rest)
        program.said("was broken off", 2)


def test_who_does_not_take_the_page_is_let_go_and_nothing_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is larger than what the kernel takes for a client that does not read."""
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 0.2)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "index.html").write_bytes(bytes(32 << 20))

    async def run() -> None:
        config = settings.load(write(tmp_path, 9000, 'web_dir = "web"'), settings.Signaling)
        entrance = signaling.Entrance(config)
        runner = web.AppRunner(entrance.application())
        await runner.setup()
        assert runner.server is not None
        listening = listener.Listener(runner, config, entrance.door.counters)
        at = await listening.start()
        _, writer = await asyncio.open_connection(at.host, at.port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            while not runner.server.connections:
                await asyncio.sleep(0.01)
            while runner.server.connections:
                await asyncio.sleep(0.01)
        writer.close()
        await listening.stop()
        await runner.cleanup()

    asyncio.run(run())
