"""Signaling: the HTTP door. It takes a client's offer, finds a transceiver, hands back the answer.

What it owns: the HTTP API that clients of OpenAI's Realtime calls already speak, and the demo page.
It keeps nothing about a call: the call id holds the same 17 octets as the ufrag, so any instance
with the key file finds the owner of any call (placement.py).

Rules that stay true:
- Every error has a body, `{"error": {message, type, param, code}}`, and every answer to another
  origin's page carries the CORS headers, errors too: without them a page learns nothing.
- Whatever a client sends is bounded in octets and in time before it is looked at (intake.py).

- SIGHUP reads the settings, the keys, the secrets and the certificate again, each for itself: what
  cannot be used changes nothing, and keeps nothing else from changing.

Each API is a module with `routes`: adding one is one file and one entry in APIS. Who may ask, and
how often, is reception.py's; connections and TLS are listener.py's.

HTTP: https://www.rfc-editor.org/rfc/rfc9110
multipart/form-data: https://www.rfc-editor.org/rfc/rfc7578
CORS: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

import asyncio
import hashlib
import logging
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated

import orjson
import typer
from aiohttp import web

import advice
import calls
import door
import intake
import journal
import keys
import listener
import metrics
import monitor
import observer
import openapi
import pipecat
import roster
import settings
import sideband
import sites
import whip

log = logging.getLogger("signaling")

SHUTDOWN_S = 5.0
"""Requests in hand may finish for this long after SIGTERM. Calls do not notice: they need no
signaling once they are answered."""

RELOADED = {"signaling", "keys", "limits", "site", "steering"}
"""Tables that SIGHUP reads again."""

RELOADED_KEYS = {
    *("keys_file", "trusted_proxies", "client_address_header", "tls_certificate", "tls_key"),
    *("connections_max", "connections_per_address_max", "relays"),
}
"""Of `[signaling]`."""

APIS = (calls, sideband, whip, pipecat)
"""The ways in, each a module with `routes(door)`."""

API_PREFIXES = ("/v1/", "/whip", "/api/", "/start", "/sessions/")
"""Paths that pages of other origins may ask."""

CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": (
        "authorization, content-type, if-match, etag, x-openai-agents-sdk, openai-beta"
    ),
    "Access-Control-Allow-Methods": "OPTIONS, GET, POST, PATCH, DELETE",
    # As OpenAI's are. X-Request-Id is for people, who find it in their browser's tools.
    "Access-Control-Expose-Headers": (
        "location, etag, link, accept-post, accept-patch, access-control-allow-methods"
    ),
    # Authorization and application/sdp always cost a preflight: let browsers remember it for as
    # long as they are willing to (Firefox a day, Chromium two hours).
    "Access-Control-Max-Age": "86400",
}

DOCUMENT = orjson.dumps(openapi.document())
"""What this API is: the same for everybody."""

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


# --- the HTTP server --------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Entrance:
    """The HTTP application: every API, health, the page's files; beside it what counts them."""

    def __init__(self, config: settings.Signaling, rng: random.Random | None = None) -> None:
        """Raises SettingsError for a key file or a folder of the page that cannot be used."""
        self.door = door.Door(config, rng)
        names = [api.__name__ for api in APIS]
        self.observer = observer.Observer(names, self.door.reception.client_of)
        self.stopping = False
        """True once signaling was told to stop: what is in hand is finished."""
        self._web_dir = config.signaling.web_dir

    def application(self) -> web.Application:
        """The aiohttp application: APIs first, then health, then the page's files."""
        app = web.Application(client_max_size=self.door.offer_octets_max)
        self.observer.attach(app)
        app.middlewares.append(_errors_have_bodies)
        app.on_response_prepare.append(_headers_of_every_response)
        app.cleanup_ctx.append(self._connected)
        app.on_shutdown.append(self._stop)
        for api in APIS:
            app.router.add_routes(api.routes(self.door))
        app.router.add_get("/health", self.health)
        app.router.add_get("/healthz", monitor.alive)
        app.router.add_get("/readyz", self.ready)
        app.router.add_get(openapi.PATH, _openapi)
        for path in page_files(self._web_dir):
            app.router.add_get(f"/{path.name}", _page(path))
            if path.name == "index.html":
                app.router.add_get("/", _page(path))
        return app

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 while some transceiver would take a call, else 503."""
        peers = self.door.placement.peers
        serving = sum(peer.serving for peer in peers)
        return web.json_response(
            {
                "state": "serving" if serving else "no transceiver serves",
                "transceivers": len(peers),
                "transceivers_serving": serving,
            },
            status=200 if serving else 503,
        )

    async def ready(self, request: web.Request) -> web.Response:
        """GET /readyz: 200 while an offer would find a transceiver, else 503 and the reasons."""
        return monitor.readiness(self.ailments())

    def ailments(self) -> list[str]:
        """Why this instance should get no offers."""
        found = ["it stops"] if self.stopping else []
        peers = self.door.placement.peers
        if not any(peer.health is roster.Health.SERVING and not peer.last for peer in peers):
            found.append("no transceiver would take a call")
        return found

    def monitoring(self) -> web.Application:
        """What stands at the `metrics` address."""
        return monitor.application(self.exposition, self.ailments)

    def exposition(self) -> bytes:
        """All that is counted, as Prometheus reads it."""
        text = metrics.exposition("earshot_signaling", [({}, self.door.counters)])
        text += metrics.exposition("earshot_signaling_site", self.door.guide.sites.rows())
        return text + self.observer.exposition()

    async def _stop(self, app: web.Application) -> None:
        self.door.stopping.set()

    async def _connected(self, app: web.Application) -> AsyncIterator[None]:
        async with self.door.connected():
            yield


async def _openapi(_: web.Request) -> web.Response:
    """GET /openapi.json: what this API is."""
    return web.Response(body=DOCUMENT, content_type="application/json", headers=CORS)


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
        # Read anew each time, so that a changed file shows; some ten kilooctets, in the page cache.
        # aiohttp would send it by sendfile(2), which never ends when a connection is given up.
        try:
            body = path.read_bytes()
        except OSError:
            raise web.HTTPNotFound from None
        etag = hashlib.sha256(body).hexdigest()[:16]
        if any(theirs.value in (etag, "*") for theirs in request.if_none_match or ()):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=body, headers=headers)
        response.etag = etag
        return response

    return serve


async def _headers_of_every_response(request: web.Request, response: web.StreamResponse) -> None:
    """CORS on the API, errors included; no guessing of types, no names of parts, anywhere."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "earshot"  # and not which version of what
    if request.path.startswith(API_PREFIXES):
        response.headers.update(CORS)


@web.middleware
async def _errors_have_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers preflights, and gives whatever went wrong its body.

    A path that leads nowhere gets its preflight, too: or a page of another origin would read of a
    network error, and not that it has mistaken the path.
    """
    handled = request.match_info.http_exception is None  # some APIs have more to say than CORS
    if request.method == "OPTIONS" and request.path.startswith(API_PREFIXES) and not handled:
        return web.Response(status=204)
    try:
        return await handler(request)
    except intake.Refusal as refusal:
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
        return intake.Refusal(error.status, message, code=code, headers=allow).response()
    except ConnectionError:
        raise  # the client has gone: there is nobody to answer, and no fault of ours
    except Exception:
        told = journal.fields(request_id=observer.trail().request_id)
        log.exception("%s %s failed", request.method, observer.route_of(request), extra=told)
        return intake.Refusal(500, "Something went wrong here.", code="internal_error").response()


async def serve(config: settings.Signaling, path: Path) -> None:
    """Serve until SIGTERM or SIGINT; `path` is where SIGHUP finds the settings.

    Raises SettingsError, and OSError if it cannot listen.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    entrance = Entrance(config)
    runner = web.AppRunner(entrance.application(), shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    watched = asyncio.create_task(
        monitor.serve(entrance.monitoring(), config.signaling.metrics, log)
    )
    listening = listener.Listener(runner, config, entrance.door.counters)
    try:
        await listening.start()
        loop.add_signal_handler(signal.SIGHUP, _reload, path, config, entrance, listening)
        _say_who_may_call(entrance, listening)
        log.info("%s is ready, transceivers: %d", listening.url, len(entrance.door.placement.peers))
        await listening.until(stop)
        log.info("stopping")
    finally:
        entrance.stopping = True
        await listening.stop()
        await runner.cleanup()
        watched.cancel()
        await asyncio.wait([watched])


def _say_who_may_call(entrance: Entrance, listening: listener.Listener) -> None:
    keys_count = entrance.door.reception.keys_count
    if keys_count is None:
        log.warning(
            "NO API KEYS: whoever reaches %s may call. This is for development alone;"
            " signaling.keys_file is the setting, and `signaling key` makes one.",
            listening.url,
        )
    elif keys_count == 0:
        log.warning("there is no key in signaling.keys_file: nobody may call")


def _reload(
    path: Path,
    config: settings.Signaling,
    entrance: Entrance,
    listening: listener.Listener,
) -> None:
    """SIGHUP. `config` is what the process was started with."""
    try:
        fresh = settings.load(path, settings.Signaling)
    except settings.SettingsError as error:
        log.warning("going on with the configuration from before: %s", error)
        return
    door = entrance.door
    for what, reload in (
        ("API keys and limits", door.reception.reload),
        ("secrets", door.placement.reload),
        ("sites and steering", door.guide.reload),
        ("certificate and connections", listening.reload),
    ):
        try:
            reload(fresh)
        except settings.SettingsError as error:
            log.warning("%s: going on with those from before: %s", what, error)
    for key in _fixed(config, fresh):
        log.warning("%s is changed by a restart, and not by a reload", key)
    _say_who_may_call(entrance, listening)
    log.info("reloaded")


def _fixed(config: settings.Signaling, fresh: settings.Signaling) -> list[str]:
    """Settings that are not what the process was started with, and that a reload leaves alone."""
    tables = [
        name
        for name in config.__struct_fields__
        if name not in RELOADED and getattr(config, name) != getattr(fresh, name)
    ]
    keys = [
        f"signaling.{name}"
        for name in config.signaling.__struct_fields__
        if name not in RELOADED_KEYS
        and getattr(config.signaling, name) != getattr(fresh.signaling, name)
    ]
    return keys + [f"[{name}]" for name in tables]


# --- the command line -------------------------------------------------------------------------

cli = typer.Typer(
    help="The HTTP door: offers in, answers out.", no_args_is_help=True, add_completion=False
)
_Config = Annotated[Path, typer.Option("--config", help="The settings file.", metavar="FILE")]
_LogFormat = Annotated[
    journal.Form, typer.Option("--log-format", envvar=journal.VARIABLE, help=journal.HELP)
]


def _load(path: Path) -> settings.Signaling:
    """The settings, checked as far as possible without serving; ends the program if they fail."""
    try:
        config = settings.load(path, settings.Signaling)
        Entrance(config).application()
        listener.tls(config.signaling)
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
def run(config: _Config, log_format: _LogFormat = "text") -> None:
    """Serve until SIGTERM."""
    # One that comes before the settings can be read again ends nothing.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    journal.configure(log_format)
    found = _load(config)
    try:
        asyncio.run(serve(found, config))
    except OSError as error:
        typer.echo(f"signaling: cannot serve at {found.signaling.listen}: {error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from error


@cli.command()
def steer(
    config: _Config,
    lat: Annotated[float | None, typer.Option(help="Where the client is, in degrees.")] = None,
    lon: Annotated[float | None, typer.Option(help="East is positive.")] = None,
    country: Annotated[str | None, typer.Option(help="Its country, two letters.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Its address: where it is, says steering.database.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with the reasons.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Ask the sites' relays how they are.")
    ] = False,
    site_down: Annotated[
        list[str] | None, typer.Option(help="Suppose that this site were lost.", metavar="NAME")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="Suppose its load: 0.9.", metavar="NAME=LOAD")
    ] = None,
    cluster_down: Annotated[
        list[int] | None, typer.Option(help="Suppose that this cluster were lost.", metavar="ID")
    ] = None,
    cluster_load: Annotated[
        list[str] | None, typer.Option(help="Suppose its load.", metavar="ID=LOAD")
    ] = None,
) -> None:
    """Say to which relays and clusters a client would be sent, and why."""
    question = advice.Question(
        lat,
        lon,
        country,
        address,
        site_down or (),
        load or (),
        cluster_down or (),
        cluster_load or (),
    )
    try:
        found = settings.load(config, settings.Signaling)
        heard = asyncio.run(sites.Sites(found).asked()) if live else None
        decision = advice.answer(found, question, heard)
    except (settings.SettingsError, advice.Wrong) as error:
        typer.echo(f"signaling: {error}", err=True)
        wrong = os.EX_USAGE if isinstance(error, advice.Wrong) else os.EX_CONFIG
        raise typer.Exit(wrong) from error
    shown = advice.explained if explain else advice.plain
    typer.echo((advice.as_json if json else shown)(decision))


@cli.command()
def key(
    name: Annotated[str, typer.Argument(help="What logs and limits know it by, such as a site's.")],
    calls: Annotated[
        int | None, typer.Option(min=1, max=keys.CALLS_LAST, help="Calls at once at most.")
    ] = None,
    per_second: Annotated[
        float | None,
        typer.Option(min=0.001, max=keys.PER_SECOND_LAST, help="Calls a second at most."),
    ] = None,
) -> None:
    """Make an API key: print its line for the file of keys and, beside it, once, the key.

    `signaling key NAME >> api-keys` appends the line, and shows the key.
    """
    try:
        limits = keys.Limits(calls, per_second)
        made, line = keys.make(name, secrets.token_bytes(keys.KEY_OCTETS), limits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(line)
    typer.echo(f"The key, which nobody can show you again: {made}", err=True)


if __name__ == "__main__":
    cli()
