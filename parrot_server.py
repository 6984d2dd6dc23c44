"""The parrot as a model server: the Realtime API over WebSocket, for everybody who wants to try.

    parrot serve [--listen 127.0.0.1:8765] [--rate 16000|24000] [--beta] [--key-file FILE]
                 [--certificate FILE --private-key FILE]

    GET /v1/realtime?model=M   an upgrade to WebSocket, subprotocol `realtime` if it is offered;
                               401 without the key, where there is one; 503 when it is full

What it owns: the process, its connections, and the way of the parrot's events through JSON. What
the parrot says and when is `parrot.py`; here audio becomes base64 and, where the rate is not the
parrot's own, is resampled.

Rules that stay true:
- One connection is one session, and ends with it. Connections know nothing of each other.
- What one does not read in time it does not get: nothing more is heard of a connection until it
  has taken what was said to it.
- Whatever a client sends ends in an event, in one `error` with its event_id, or, if it is too large
  for that, in the end of the connection. What one connection can make us remember is bounded, and
  so is their number.
- The key is compared in constant time and appears in no message.

It is no part of a transceiver: there the parrot answers in process (`backend.py`).
"""

import asyncio
import base64
import binascii
import enum
import hmac
import logging
import os
import secrets
import signal
import ssl
import time
import weakref
from pathlib import Path
from typing import Annotated

import orjson
import typer
from aiohttp import WSCloseCode, WSMsgType, web

import dialect
import endpoints
import parrot
import realtime
import settings
from realtime import Event, Refused
from resample import Resampler

PATH = "/v1/realtime"

TICK_S = 0.05
"""How often the parrot hears that time passes: as in the transceiver."""

MESSAGE_OCTETS_MAX = 1 << 20
"""Of one message. What is larger than the parrot reads (realtime.CLIENT_MESSAGE_OCTETS_MAX) but no
larger than this gets an error that says so; beyond, the connection ends."""

HEARTBEAT_S = 20.0
"""A connection that is silent for so long is asked whether it lives, and ends if not."""

SHUTDOWN_S = 2.0
"""How long connections may take to say goodbye when the process ends."""

log = logging.getLogger("parrot")


class Connection:
    """One session: what comes over a WebSocket to a parrot, and what the parrot says back."""

    def __init__(self, socket: web.WebSocketResponse, rate_hz: int, beta: bool) -> None:
        self._socket, self._rate_hz, self._beta = socket, rate_hz, beta
        own_hz = parrot.Parrot.rate_hz
        self._parrot = parrot.Parrot(secrets.token_hex(6), None, rate_hz)
        self._heard = Resampler(rate_hz, own_hz)
        self._said = Resampler(own_hz, rate_hz)
        # Whoever has it has the parrot's ear and the socket: events leave in their order.
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Until the other side ends it, or stops answering."""
        ticking = asyncio.get_running_loop().create_task(self._tick())
        try:
            async with self._turn:
                await self._say(self._parrot.start())
            async for message in self._socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    async with self._turn:
                        await self._say(self._answer(message.data))
        except ConnectionError:
            pass  # it went while it was being spoken to
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _tick(self) -> None:
        while not self._socket.closed:
            await asyncio.sleep(TICK_S)
            async with self._turn:
                await self._say(self._parrot.tick(time.monotonic()))

    def _answer(self, message: str | bytes) -> list[Event]:
        """What the parrot has to say to a message."""
        now = time.monotonic()
        event_id = None
        try:
            event = realtime.parsed(message)
            event_id = event.get("event_id")
            if event.get("type") == "input_audio_buffer.append":
                return self._parrot.receive_audio(self._heard.feed(_pcm(event)), now)
        except Refused as refused:
            about = {"type": "error", "event_id": f"event_{secrets.token_hex(8)}"}
            return [{**about, "error": realtime.error(refused, event_id)}]
        if self._beta:
            event = dialect.client_to_ga(event, self._rate_hz)
        return self._parrot.receive_event(event, now)

    async def _say(self, events: list[Event]) -> None:
        for event in events:
            told: Event | None = event
            delta = event.get("delta")
            if isinstance(delta, bytes):
                sound = base64.b64encode(self._said.feed(delta)).decode()
                told = {**event, "delta": sound}
            if self._beta and told is not None:
                told = dialect.server_to_beta(told)
            if told is not None:
                await self._socket.send_str(orjson.dumps(told).decode())


def _pcm(event: Event) -> bytes:
    """The audio of an append. Raises Refused."""
    try:
        return base64.b64decode(realtime.field(event, "audio", str), validate=True)
    except (binascii.Error, ValueError):
        raise Refused("invalid_value", "The audio is not base64.", "audio") from None


class Server:
    """The connections of one process."""

    def __init__(self, rate_hz: int, beta: bool, key: str | None, sessions_max: int) -> None:
        self._rate_hz, self._beta, self._sessions_max = rate_hz, beta, sessions_max
        self._key = None if key is None else f"Bearer {key}".encode()
        self._sockets: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()

    def application(self) -> web.Application:
        """For an HTTP server."""
        application = web.Application()
        application.router.add_get(PATH, self._open)
        application.on_shutdown.append(self._goodbye)
        return application

    async def _open(self, request: web.Request) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, self._key):
            return _refusal(401, "Incorrect API key provided.", "invalid_api_key")
        if len(self._sockets) >= self._sessions_max:
            return _refusal(503, "The parrot talks to as many as it can.", "overloaded")
        socket = web.WebSocketResponse(
            protocols=("realtime",), max_msg_size=MESSAGE_OCTETS_MAX, heartbeat=HEARTBEAT_S
        )
        if not socket.can_prepare(request):
            return _refusal(400, "This is a WebSocket.", "upgrade_required")
        await socket.prepare(request)
        self._sockets.add(socket)
        log.info("%s opened a session, %d now", request.remote, len(self._sockets))
        try:
            await Connection(socket, self._rate_hz, self._beta).run()
        finally:
            self._sockets.discard(socket)
            await socket.close()
        return socket

    async def _goodbye(self, _: web.Application) -> None:
        for socket in list(self._sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server is stopping")


def _refusal(status: int, message: str, code: str) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = orjson.dumps({"error": error})
    return web.Response(body=body, status=status, content_type="application/json")


async def serve(
    application: web.Application, at: endpoints.Endpoint, context: ssl.SSLContext | None
) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError if it cannot listen."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, at.host, at.port, ssl_context=context).start()
        port = runner.addresses[0][1]  # what the kernel chose, if the option says 0
        where = str(at).rpartition(":")[0] + f":{port}"
        log.info("parrot ready on %s://%s%s", "wss" if context else "ws", where, PATH)
        await stop.wait()
    finally:
        await runner.cleanup()


# --- the command line -------------------------------------------------------------------------

cli = typer.Typer(
    help="A model server that needs no model: it plays back what it heard.",
    no_args_is_help=True,
    add_completion=False,
)


class Rate(enum.Enum):
    """Samples a second that model servers take."""

    R16000 = "16000"
    R24000 = "24000"


@cli.callback()
def main() -> None:
    """A model server that needs no model: it plays back what it heard."""


@cli.command("serve")
def command(
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT; port 0 is any.")] = "127.0.0.1:8765",
    rate: Annotated[Rate, typer.Option(help="Of its audio.")] = Rate.R24000,
    beta: Annotated[bool, typer.Option("--beta", help="Speak the beta's names.")] = False,
    key_file: Annotated[Path | None, typer.Option(help="Ask for the key in this file.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM: serve wss instead of ws.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM, of the certificate.")] = None,
    sessions_max: Annotated[int, typer.Option(min=1, max=10_000, help="At once.")] = 100,
) -> None:
    """Serve the Realtime API over WebSocket until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        at = endpoints.Endpoint(listen)
        key = None if key_file is None else settings.load_secret(key_file)
        context = _context(certificate, private_key)
    except ValueError as error:
        typer.echo(f"parrot: {error}", err=True)
        raise typer.Exit(os.EX_CONFIG) from error
    try:
        server = Server(int(rate.value), beta, key, sessions_max)
        asyncio.run(serve(server.application(), at, context))
    except OSError as error:
        typer.echo(f"parrot: cannot serve at {at}: {error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from error


def _context(certificate: Path | None, private_key: Path | None) -> ssl.SSLContext | None:
    """TLS for a server, if it has a certificate. Raises ValueError with the reason."""
    if certificate is None:
        if private_key is not None:
            raise ValueError("--private-key: needs --certificate")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, private_key)
    except OSError as error:  # SSLError is one
        raise ValueError(f"--certificate: {certificate}: {error}") from error
    return context


if __name__ == "__main__":
    cli()
