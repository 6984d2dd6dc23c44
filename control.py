"""The control API of a transceiver: calls in, hang-ups, health and metrics, by HTTP.

    POST   /v1/sessions {"offer", "session", "model", "candidates": [[host, port], ...]}
                        201 {"call_id", "answer"}; 400; 503 with Retry-After
    POST   /v1/sessions/{call_id}/ice {"ufrag", "pwd"}   an ICE restart: the client's new pair
                        200 {"ufrag", "pwd"}: ours; 400; 404
    DELETE /v1/sessions/{call_id}   200 {}; 404
    GET    /v1/health               200 {"state": "serving" or "draining", "sessions",
                                    "sessions_max", "load": 1 is where calls are refused, and of
                                    what it is made: "cpu", a share of one, and "lag_s"}
    GET    /metrics                 200, Prometheus' text

What it owns: reading requests, and the status and body of every answer.

Rules that stay true:
- Only `control_prefixes` may use it: it has no other door, and signaling stands before it.
- No error has an empty body: it says what is wrong as clients of the Realtime API know it, since
  signaling hands it on.
- Whatever is in a request, it ends in an answer; a fault of ours is logged and a 500.

It decides nothing about calls: `transceiver.py` takes or refuses them.
"""

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import orjson
from aiohttp import web

import ledger
import metrics
import sdp
import settings

REQUEST_OCTETS_MAX = 1 << 20
"""Of the control API: an offer and a session with its instructions and tools."""

CANDIDATES_MAX = 8
"""Relay addresses in an answer: two sites, two families, and as many again."""

RETRY_AFTER_S = 5
"""What a refused caller is told to wait: calls last minutes, so some end within seconds."""

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger("control")


class Full(Exception):
    """No room for another session, or none wanted: the message says which."""


class Switchboard(Protocol):
    """What this needs of the process that has the calls."""

    counters: ledger.Counters
    timings: ledger.Histograms
    limits: settings.TransceiverTable

    def open(
        self, text: str, wanted: dict[str, Any] | None, candidates: list[tuple[str, int]]
    ) -> tuple[str, str]:
        """Take a call: its id and the answer. Raises Full, and sdp.OfferError."""

    def restart(self, call_id: str) -> tuple[str, str] | None:
        """New ICE credentials of a call: ufrag and password. None if there is none."""

    def hang_up(self, call_id: str) -> bool:
        """End a call by request. False if there is none."""

    def health(self) -> dict[str, Any]:
        """How the process is, for whoever places calls."""

    def book(self) -> None:
        """Bring those counters up to date that say what is now: before they are read."""


class Refusal(Exception):
    """A request that ends in an error: never an empty body, always what is wrong."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> web.Response:
        """The error as clients of the Realtime API know it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else None
        return _json({"error": error}, self.status, headers)


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )


def application(switchboard: Switchboard) -> web.Application:
    """The control API of a transceiver, for an HTTP server."""
    prefixes = switchboard.limits.control_prefixes

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not any((request.remote or "") in prefix for prefix in prefixes):
            message = "This address may not use the control API."
            return Refusal(403, message, "forbidden").response()
        try:
            return await handler(request)
        except Refusal as refusal:
            return refusal.response()
        except web.HTTPException as error:
            return Refusal(error.status, error.reason, "http_error").response()
        except Exception:
            log.exception("a request met a fault")
            return Refusal(500, "The transceiver met a fault.", "internal_error").response()

    async def create(request: web.Request) -> web.Response:
        offer, wanted, candidates = call_of(await request.read())
        try:
            call_id, answer = switchboard.open(offer, wanted, candidates)
        except Full as full:
            raise Refusal(503, str(full), "overloaded") from None
        except sdp.OfferError as error:
            raise Refusal(400, str(error), "invalid_offer", "sdp") from None
        return _json({"call_id": call_id, "answer": answer}, 201)

    async def restart(request: web.Request) -> web.Response:
        check_restart(await request.read())
        renewed = switchboard.restart(request.match_info["call_id"])
        if renewed is None:
            raise Refusal(404, "There is no such call here.", "call_id_not_found", "call_id")
        return _json({"ufrag": renewed[0], "pwd": renewed[1]})

    async def delete(request: web.Request) -> web.Response:
        if not switchboard.hang_up(request.match_info["call_id"]):
            raise Refusal(404, "There is no such call here.", "call_id_not_found", "call_id")
        return _json({})

    async def health(_: web.Request) -> web.Response:
        return _json(switchboard.health())

    async def exposition(_: web.Request) -> web.Response:
        switchboard.book()
        text = metrics.exposition("earshot_transceiver", [({}, switchboard.counters)])
        text += metrics.histograms("earshot_transceiver", switchboard.timings)
        return web.Response(body=text, headers={"Content-Type": EXPOSITION_TYPE})

    application = web.Application(middlewares=[guard], client_max_size=REQUEST_OCTETS_MAX)
    application.router.add_post("/v1/sessions", create)
    application.router.add_post("/v1/sessions/{call_id}/ice", restart)
    application.router.add_delete("/v1/sessions/{call_id}", delete)
    application.router.add_get("/v1/health", health)
    application.router.add_get("/metrics", exposition)
    return application


def check_restart(body: bytes) -> None:
    """Raise Refusal unless this is a client's pair for an ICE restart.

    It is read for the client's sake alone: we send no checks, so that we never need it.
    """
    try:
        found = orjson.loads(body)
        pair = found["ufrag"], found["pwd"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        pair = None, None
    for name, value, characters_min in zip(("ufrag", "pwd"), pair, (4, 22), strict=True):
        if not (isinstance(value, str) and sdp.is_ice(value, characters_min)):
            message = f"{name}: expected {characters_min} to 256 ICE characters."
            raise Refusal(400, message, "invalid_request", name)


def call_of(body: bytes) -> tuple[str, dict[str, Any] | None, list[tuple[str, int]]]:
    """Offer, session object and candidates of a request. Raises Refusal naming what is wrong."""

    def wrong(param: str, expected: str) -> Refusal:
        return Refusal(400, f"{param}: expected {expected}.", "invalid_request", param)

    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise wrong("the body", "JSON") from None
    if not isinstance(found, dict):
        raise wrong("the body", "a JSON object")
    offer, wanted = found.get("offer"), found.get("session")
    if not isinstance(offer, str):
        raise wrong("offer", "a session description as text")
    if not (wanted is None or isinstance(wanted, dict)):
        raise wrong("session", "an object or null")
    model = found.get("model")
    if not (model is None or isinstance(model, str)):
        raise wrong("model", "text or null")
    if model is not None:
        wanted = {"model": model, **(wanted or {})}  # what the session itself says is nearer
    listed = found.get("candidates")
    if not (isinstance(listed, list) and 1 <= len(listed) <= CANDIDATES_MAX):
        raise wrong("candidates", f"1 to {CANDIDATES_MAX} of [address, port]")
    candidates = []
    for pair in listed:
        try:
            host, port = pair
            candidates.append((str(ipaddress.ip_address(host)), int(port)))
        except (TypeError, ValueError):
            raise wrong("candidates", "[address, port], the address as a literal") from None
        if not (isinstance(host, str) and 1 <= candidates[-1][1] <= 0xFFFF):
            raise wrong("candidates", "a port between 1 and 65535")
    return offer, wanted, candidates
