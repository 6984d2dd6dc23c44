"""Model servers for tests: the parrot's as users start it, and ones whose manners a test decides.

`serving` runs `parrot serve` on a port that is free; `Scripted` is a WebSocket server in the test's
own event loop, each of whose connections is answered by a function of the test's. `certify` makes
a certificate for 127.0.0.1 that nobody knows.
"""

import asyncio
import contextlib
import datetime
import ipaddress
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

COMMAND = Path(sys.executable).with_name("parrot")
START_S_MAX = 20.0
CREATED = {"type": "session.created", "session": {"type": "realtime", "audio": {}}}


class Served:
    """A parrot's server that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    @property
    def listen(self) -> str:
        """ADDRESS:PORT, for one that takes its place."""
        return self.url.partition("://")[2].partition("/")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(*options: str | Path, listen: str = "127.0.0.1:0") -> Iterator[Served]:
    """`parrot serve` in a process of its own, until the block is left."""
    argv = [COMMAND, "serve", "--listen", listen, *options]
    # A file and no pipe, which a server that says much would fill, and then stand still.
    with tempfile.TemporaryFile("a+") as said:
        process = subprocess.Popen(argv, stderr=said, text=True)
        try:
            deadline = time.monotonic() + START_S_MAX
            while "parrot ready on " not in (line := _text(said)):
                assert process.poll() is None, line
                assert time.monotonic() < deadline, line
                time.sleep(0.01)
            yield Served(process, line.split()[-1])
        finally:
            process.terminate()
            process.wait(10)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def certify(folder: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


class Scripted:
    """A WebSocket server whose connections a test answers; what they said is kept."""

    def __init__(self, answer: Callable[["Line"], Awaitable[None]]) -> None:
        self.lines: list[Line] = []
        self.requests: list[web.Request] = []
        self._answer = answer
        self.url = ""

    async def open(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=1 << 26)
        await socket.prepare(request)
        line = Line(socket, len(self.lines))
        self.lines.append(line)
        with contextlib.suppress(ConnectionError):
            await self._answer(line)
        await socket.close()
        return socket


class Line:
    """One connection, as the server has it."""

    def __init__(self, socket: web.WebSocketResponse, number: int) -> None:
        self.socket, self.number = socket, number
        self.heard: list[dict[str, Any]] = []

    async def say(self, *events: dict[str, Any]) -> None:
        for event in events:
            await self.socket.send_str(orjson.dumps(event).decode())

    async def hear(self, kind: str) -> dict[str, Any]:
        """Read up to the next event of a type; ends with the connection."""
        while True:
            event = orjson.loads(await self.socket.receive_str())
            self.heard.append(event)
            if event["type"] == kind:
                return event

    async def greet(self) -> None:
        """Begin a session as the API has it."""
        await self.say(CREATED)
        update = await self.hear("session.update")
        await self.say({"type": "session.updated", "session": update["session"]})

    async def listen(self) -> None:
        """Until the other side has had enough."""
        with contextlib.suppress(TypeError):  # what is no text any more is the end
            await self.hear("")


@contextlib.asynccontextmanager
async def scripted(answer: Callable[[Line], Awaitable[None]]) -> AsyncIterator[Scripted]:
    """A Scripted server on a port that is free, until the block is left."""
    server = Scripted(answer)
    application = web.Application()
    application.router.add_get("/v1/realtime", server.open)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"ws://127.0.0.1:{runner.addresses[0][1]}/v1/realtime"
    try:
        yield server
    finally:
        for line in server.lines:
            await line.socket.close()
        await runner.cleanup()
        await asyncio.sleep(0)
