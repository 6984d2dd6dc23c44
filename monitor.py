"""The monitor's door: a small HTTP server beside a program, for whoever watches over it.

    GET /metrics    Prometheus' text
    GET /healthz    200 while the process lives
    GET /readyz     200 {"ready": true, "why": []}, or 503 and the reasons

What it owns: that server, its three paths and their answers.

Rules that stay true:
- A program serves whether or not its monitor can: a port that is taken is tried again, for ever.
- It has an address of its own, so that what the public may reach is one thing, and what counts and
  reveals is another.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

import orjson
from aiohttp import web

import endpoints

RETRY_S = 1.0
"""After the port was refused."""

SHUTDOWN_S = 0.1
"""How long a request may go on when the program stops."""

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(text: bytes) -> web.Response:
    """An answer of metrics."""
    return web.Response(body=text, headers={"Content-Type": EXPOSITION_TYPE})


async def alive(_: web.Request) -> web.Response:
    """GET /healthz: the process lives, and its event loop turns."""
    return web.Response(text="ok\n")


def readiness(ailments: Sequence[str]) -> web.Response:
    """The answer of GET /readyz."""
    return web.Response(
        status=503 if ailments else 200,
        body=orjson.dumps({"ready": not ailments, "why": list(ailments)}),
        content_type="application/json",
    )


def application(
    metrics: Callable[[], bytes], ailments: Callable[[], Sequence[str]]
) -> web.Application:
    """The three paths. `ailments` says why the program does not do its work; nothing means yes."""

    async def show_metrics(_: web.Request) -> web.Response:
        return exposition(metrics())

    async def show_readiness(_: web.Request) -> web.Response:
        return readiness(ailments())

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", alive)
    app.router.add_get("/readyz", show_readiness)
    return app


async def serve(app: web.Application, at: endpoints.Endpoint, log: logging.Logger) -> None:
    """Serve it there, for ever; a port that is taken is tried again. Port 0 is any; the log names
    it."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        sock = await _listening(at, log)
        await web.SockSite(runner, sock).start()
        host, port = sock.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("metrics at http://%s/metrics", where)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _listening(at: endpoints.Endpoint, log: logging.Logger) -> socket.socket:
    refused = False
    family = socket.AF_INET if at.address.version == 4 else socket.AF_INET6
    while True:
        try:
            return socket.create_server((at.host, at.port), family=family)
        except OSError as error:
            if not refused:
                log.warning("no metrics at %s for now: %s", at, error.strerror)
            refused = True
            await asyncio.sleep(RETRY_S)
