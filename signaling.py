"""Signaling: the HTTP door. It takes a client's offer, finds a transceiver, hands back the answer.

What it owns: the HTTP API that clients of OpenAI's Realtime calls already speak, and the demo page.
It keeps nothing about a call: the call id holds the same 17 octets as the ufrag, so any instance
with the key file finds the owner of any call (placement.py).

Rules that stay true:
- Every error has a body, `{"error": {message, type, param, code}}`, and every answer to another
  origin's page carries the CORS headers, errors too: without them a page learns nothing.
- Whatever a client sends is bounded in octets and in time before it is looked at.

It does not read SDP: the transceiver does, and its sentence about a broken offer is handed on. It
asks for no key yet. It speaks plain HTTP: a TLS terminator stands in front, which also bounds the
time that a request's header may take.

HTTP: https://www.rfc-editor.org/rfc/rfc9110
multipart/form-data: https://www.rfc-editor.org/rfc/rfc7578
CORS: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import orjson
import typer
from aiohttp import web

import endpoints
import ledger
import metrics
import placement
import settings

log = logging.getLogger("signaling")

BODY_DEADLINE_S = 5.0
"""A body of some kilooctets takes a slow phone a second. Longer helps only who sends an octet at a
time to hold a connection."""

PARTS_MAX = 16
"""Parts of a form. Two are read; the rest is for clients that add fields of their own."""

MODEL_CHARACTERS_MAX = 256
"""Of `?model=`: a name, not a document. What is longer is cut, and then the name of no model."""

SHUTDOWN_S = 5.0
"""Requests in hand may finish for this long after SIGTERM. Calls do not notice: they need no
signaling once they are answered."""

CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": (
        "authorization, content-type, if-match, etag, x-openai-agents-sdk, openai-beta"
    ),
    "Access-Control-Allow-Methods": "OPTIONS, GET, POST, PATCH, DELETE",
    "Access-Control-Expose-Headers": (
        "location, etag, link, accept-post, accept-patch, access-control-allow-methods"
    ),
    # Authorization and application/sdp always cost a preflight: let browsers remember it for as
    # long as they are willing to (Firefox a day, Chromium two hours).
    "Access-Control-Max-Age": "86400",
}

PAGE_HEADERS = {
    # Everything the page needs comes from here; WebRTC is not subject to connect-src.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Revalidated by ETag each time: a new release is seen at once, an old one costs a 304.
    "Cache-Control": "no-cache",
}

PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What is served of the folder of the page; any other file in it stays private."""


class Refusal(Exception):
    """A request that ends in an error body. Raised by handlers, answered by one middleware."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`message` is for people, `code` for programs, `param` names the part at fault."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def response(self) -> web.Response:
        """The error as clients of this API expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return web.Response(
            status=self.status,
            body=orjson.dumps({"error": error}),
            content_type="application/json",
            headers=self.headers,
        )


# --- reading offers ---------------------------------------------------------------------------


async def read_offer(request: web.Request, octets_max: int) -> tuple[str, dict[str, Any] | None]:
    """The offer and the session settings of a request in any of the three forms.

    Raises Refusal: 400, 408 (too slow), 413 (too large, also without a Content-Length) or 415.
    """
    kind = request.content_type if "Content-Type" in request.headers else "nothing"
    readers: dict[str, Callable[[web.Request, bytes], Awaitable[tuple[Any, Any]]]] = {
        "application/sdp": _read_sdp,
        "multipart/form-data": _read_form,
        "application/json": _read_json,
    }
    if kind not in readers:
        raise Refusal(
            415,
            f"Send the offer as {', '.join(readers)}; this request's Content-Type says {kind}.",
            code="unsupported_media_type",
        )
    too_large = Refusal(
        413, f"The request is larger than {octets_max} octets.", code="request_too_large"
    )
    if (request.content_length or 0) > octets_max:
        raise too_large
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise Refusal(408, "The request's body came too slowly.", code="timeout") from None
    sdp, session = await readers[kind](request, body)
    return _text(sdp), _settings(session)


async def _read_sdp(request: web.Request, body: bytes) -> tuple[Any, Any]:
    return body, None


async def _read_json(request: web.Request, body: bytes) -> tuple[Any, Any]:
    found = _parse_json(body, "The body", None)
    if not isinstance(found, dict):
        raise Refusal(400, "The body is not a JSON object.", code="invalid_json")
    return found.get("sdp"), found.get("session")


async def _read_form(request: web.Request, body: bytes) -> tuple[Any, Any]:
    """The parts `sdp` and `session`, whatever content type or file name they come with.

    The body has been read and bounded: aiohttp's reader takes it from memory, so that no part can
    keep it waiting.
    """
    stream = aiohttp.StreamReader(request.protocol, limit=len(body) + 1)
    stream.feed_data(body)
    stream.feed_eof()
    parts: dict[str, bytes] = {}
    try:
        reader = aiohttp.MultipartReader(request.headers, stream)
        async for part in reader:
            if not isinstance(part, aiohttp.BodyPartReader) or len(parts) >= PARTS_MAX:
                break
            parts.setdefault(part.name or f"unnamed {len(parts)}", bytes(await part.read()))
    except (ValueError, aiohttp.ClientError, aiohttp.http.HttpProcessingError) as error:
        raise Refusal(
            400, f"The body is not multipart/form-data: {error}", code="invalid_form"
        ) from error
    session = parts.get("session") or None
    return parts.get("sdp"), session and _parse_json(session, "The part session", "session")


def _parse_json(octets: bytes, what: str, param: str | None) -> Any:
    try:
        return orjson.loads(octets)
    except orjson.JSONDecodeError as error:
        raise Refusal(
            400, f"{what} is not JSON: {error}", code="invalid_json", param=param
        ) from error


def _text(sdp: Any) -> str:
    """The offer as text; it has more than white space in it."""
    try:
        text = sdp.decode() if isinstance(sdp, bytes) else sdp
    except UnicodeDecodeError as error:
        raise Refusal(400, "The offer is not UTF-8.", code="invalid_offer", param="sdp") from error
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "There is no SDP offer in it.", code="missing_offer", param="sdp")
    return text


def _settings(session: Any) -> dict[str, Any] | None:
    if session is None or isinstance(session, dict):
        return session
    raise Refusal(400, "The session is not a JSON object.", code="invalid_session", param="session")


# --- the HTTP server --------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """The handlers, and what they share."""

    def __init__(self, config: settings.Signaling, rng: random.Random | None = None) -> None:
        """Raises SettingsError for a key file or a folder of the page that cannot be used."""
        self.counters = ledger.Counters(metrics.Signaling)
        self.placement = placement.Placement(config, self.counters, rng or random.SystemRandom())
        self._octets_max = config.signaling.offer_octets_max
        self._web_dir = config.signaling.web_dir
        self._retry_after = {"Retry-After": str(config.signaling.retry_after_s)}

    def application(self) -> web.Application:
        """The aiohttp application: API first, then health and metrics, then the page's files."""
        app = web.Application(middlewares=[_errors_have_bodies], client_max_size=self._octets_max)
        app.on_response_prepare.append(_headers_of_every_response)
        app.cleanup_ctx.append(self._connected)
        app.router.add_post("/v1/realtime/calls", self.create)
        app.router.add_post("/v1/realtime/calls/{id}/hangup", self.hang_up)
        app.router.add_delete("/v1/realtime/calls/{id}", self.hang_up)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        for path in page_files(self._web_dir):
            app.router.add_get(f"/{path.name}", _page(path))
            if path.name == "index.html":
                app.router.add_get("/", _page(path))
        return app

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/realtime/calls: 201, the answer, and the call in Location."""
        started = time.monotonic()
        values, ended = self.counters.values, metrics.Signaling.ANSWERED
        values[metrics.Signaling.OFFERS] += 1
        try:
            offer, session = await read_offer(request, self._octets_max)
            model = request.query.get("model", "")[:MODEL_CHARACTERS_MAX] or None
            call_id, answer = await self.placement.place(offer, session, model)
        except placement.BadOffer as error:
            ended = metrics.Signaling.REFUSED_OFFER
            raise Refusal(400, str(error), code=error.code, param=error.param) from error
        except placement.Unavailable as error:
            ended = metrics.Signaling.REFUSED_FULL
            raise self._unavailable(error) from error
        except Refusal:
            ended = metrics.Signaling.REFUSED_OFFER
            raise
        finally:
            values[ended] += 1
        # The first characters tell calls apart in a log and let nobody join one.
        log.info("call %s… placed in %.0f ms", call_id[:12], 1e3 * (time.monotonic() - started))
        return web.Response(
            status=201,
            text=answer,
            content_type="application/sdp",
            headers={"Location": f"/v1/realtime/calls/{call_id}"},
        )

    async def hang_up(self, request: web.Request) -> web.Response:
        """POST …/{id}/hangup and DELETE …/{id}: 200 once the call has ended."""
        try:
            await self.placement.hang_up(request.match_info["id"])
        except placement.UnknownCall as error:
            message = "There is no such call, or it has ended."
            raise Refusal(404, message, code="call_id_not_found", param="id") from error
        except placement.Unavailable as error:
            raise self._unavailable(error) from error
        self.counters.values[metrics.Signaling.HUNG_UP] += 1
        return web.json_response({})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 while some transceiver would take a call, else 503."""
        peers = self.placement.peers
        serving = sum(peer.serving for peer in peers)
        return web.json_response(
            {
                "state": "serving" if serving else "no transceiver serves",
                "transceivers": len(peers),
                "transceivers_serving": serving,
            },
            status=200 if serving else 503,
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus' text. Keep it from the public at the TLS terminator."""
        text = metrics.exposition("earshot_signaling", [({}, self.counters)])
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _connected(self, app: web.Application) -> AsyncIterator[None]:
        async with self.placement.connected():
            yield

    def _unavailable(self, error: placement.Unavailable) -> Refusal:
        return Refusal(503, str(error), code="unavailable", headers=self._retry_after)


def page_files(web_dir: Path | None) -> list[Path]:
    """The files of the page. Listed once, so that a request can name nothing else.

    Raises SettingsError if there is a folder but no index.html in it.
    """
    if web_dir is None:
        return []
    if not (web_dir / "index.html").is_file():
        raise settings.SettingsError(f"signaling.web_dir: there is no index.html in {web_dir}")
    return sorted(path for path in web_dir.iterdir() if path.suffix in PAGE_TYPES)


def _page(path: Path) -> Handler:
    headers = PAGE_HEADERS | {"Content-Type": PAGE_TYPES[path.suffix]}

    async def serve(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(path, headers=headers)

    return serve


async def _headers_of_every_response(request: web.Request, response: web.StreamResponse) -> None:
    """CORS on the API, errors included; no guessing of types, no names of parts, anywhere."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "earshot"  # and not which version of what
    if request.path.startswith("/v1/"):
        response.headers.update(CORS)


@web.middleware
async def _errors_have_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers preflights, and gives whatever went wrong its body."""
    if request.method == "OPTIONS" and request.path.startswith("/v1/"):
        return web.Response(status=204)
    try:
        return await handler(request)
    except Refusal as refusal:
        return refusal.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        message = {
            404: f"There is nothing at {request.path}.",
            405: f"{request.method} is not possible here; {allow.get('Allow')} is.",
        }.get(error.status, error.reason)
        code = error.reason.lower().replace(" ", "_")
        return Refusal(error.status, message, code=code, headers=allow).response()
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return Refusal(500, "Something went wrong here.", code="internal_error").response()


async def serve(config: settings.Signaling) -> None:
    """Serve until SIGTERM or SIGINT. Raises SettingsError, and OSError if it cannot listen."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        Door(config).application(),
        access_log=None,  # transitions, not traffic: each call has its own line
        shutdown_timeout=SHUTDOWN_S,
        lingering_time=BODY_DEADLINE_S,
    )
    await runner.setup()
    try:
        listen = config.signaling.listen
        await web.TCPSite(runner, listen.host, listen.port, backlog=1024).start()
        port = runner.addresses[0][1]  # what the kernel chose, if the setting says 0
        where = endpoints.Endpoint(str(listen).rpartition(":")[0] + f":{port}")
        log.info("http://%s/ is ready, transceivers: %d", where, len(config.signaling.transceivers))
        await stop.wait()
        log.info("stopping")
    finally:
        await runner.cleanup()


# --- the command line -------------------------------------------------------------------------

cli = typer.Typer(
    help="The HTTP door: offers in, answers out.", no_args_is_help=True, add_completion=False
)
_Config = Annotated[Path, typer.Option("--config", help="The settings file.", metavar="FILE")]


def _load(path: Path) -> settings.Signaling:
    """The settings, checked as far as possible without serving; ends the program if they fail."""
    try:
        config = settings.load(path, settings.Signaling)
        Door(config).application()
    except settings.SettingsError as error:
        typer.echo(f"signaling: {error}", err=True)
        raise typer.Exit(os.EX_CONFIG) from error
    return config


@cli.command()
def check(config: _Config) -> None:
    """Read the settings, the keys and the page, and say what is wrong with them, if anything."""
    _load(config)
    typer.echo(f"{config}: good")


@cli.command()
def run(config: _Config) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    found = _load(config)
    try:
        asyncio.run(serve(found))
    except OSError as error:
        typer.echo(f"signaling: cannot serve at {found.signaling.listen}: {error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from error


if __name__ == "__main__":
    cli()
