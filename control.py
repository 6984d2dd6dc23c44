"""The control API of a transceiver: calls in, hang-ups, health and metrics, by HTTP.

    POST   /v1/sessions {"offer", "session", "model", "candidates": [[host, port], ...], and as
                        opening.py says "key", "dialect", "resume", "request_id", "site"}
                        201 {"call_id", "answer", "etag", "request_id": under which it is known
                        to logs and relays; another than asked for, if that is no 8 hexadecimal
                        digits or some other call's; "opened": which of the process's calls it
                        is}; 400; 503 with Retry-After
    GET    /v1/sessions/{call_id}   200 {"state", "etag", "request_id"}; 404
    POST   /v1/sessions/{call_id}/ice {"ufrag", "pwd"}   an ICE restart: the client's new pair
                        200 {"ufrag", "pwd", "etag"}: ours, the same for the same pair again;
                        {"etag"} if the pair is the offer's; 400; 404
    POST   /v1/sessions/{call_id}/offer {"offer", "candidates"}   another one on its connection
                        200 {"answer", "etag"}; 400; 404
    GET    /v1/sessions/{call_id}/events   WebSocket: the call's events (attendance.py); 404; 429
    DELETE /v1/sessions/{call_id}   200 {}; 404; ?resumed if the conversation goes on elsewhere
    GET    /v1/health               200 {"state": "serving" or "draining", what else a report has
                                    (presence.Report), and of what its "load" is made: "cpu",
                                    a share of one, and "lag_s"}
    GET    /metrics                 200, Prometheus' text
    GET    /healthz                 200 while the process lives
    GET    /readyz                  200 while a call would be taken, else 503 {"ready", "why"}

What it owns: reading requests, and the status and body of every answer.

Rules that stay true:
- What is asked of a call is asked with the name of the key that opened it, in X-Earshot-Key; under
  another name there is no such call.
- Only `control_prefixes` may use it: it has no other door, and signaling stands before it.
- No error has an empty body: it says what is wrong as clients of the Realtime API know it, since
  signaling hands it on.
- Whatever is in a request, it ends in an answer; a fault of ours is logged and a 500.

It decides nothing about calls: `transceiver.py` takes or refuses them.
"""

import asyncio
import enum
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

import orjson
from aiohttp import web

import attendance
import endpoints
import journal
import ledger
import metrics
import monitor
import opening
import sdp
import settings
from attendants import Attendant, Crowded

REQUEST_OCTETS_MAX = 1 << 20
"""Of the control API: an offer and a session with its instructions and tools."""

RETRY_AFTER_S = 5
"""What a refused caller is told to wait: calls last minutes, so some end within seconds."""

KEY_HEADER = "X-Earshot-Key"
"""Names the key of whoever asks something of a call."""

REQUEST_HEADER = "X-Request-Id"
"""Names the request of a client's that something is asked for."""

log = logging.getLogger("control")


class Full(Exception):
    """No room for another session, or none wanted: the message says which."""


class Call(Protocol):
    """What this needs of a call."""

    call_id: str
    opening: opening.Opening
    etag: str
    """A name of its ICE session: another one after each restart."""
    client_ice: tuple[str, str]
    """The client's ufrag and password in it."""
    restarted_as: tuple[str, str] | None
    """Ours, if that pair came by a request for a restart and not with an offer."""

    @property
    def state(self) -> enum.Enum:
        """Where the call is in its life."""

    def attend(self, attendant: Attendant) -> None:
        """See attendance.Attended."""

    def unattend(self, attendant: Attendant) -> None:
        """See attendance.Attended."""


AnyCall = TypeVar("AnyCall", bound=Call)


class Switchboard(Protocol[AnyCall]):
    """What this needs of the process that has the calls."""

    counters: ledger.Counters
    timings: ledger.Histograms
    limits: settings.TransceiverTable

    async def recalled(self, wanted: opening.Opening) -> opening.Opening:
        """The same, with what there is of the conversation that it goes on with. Raises nothing."""

    def open(self, wanted: opening.Opening) -> tuple[AnyCall, str]:
        """Take a call: itself and the answer. Raises Full, and sdp.OfferError."""

    def find(self, call_id: str) -> AnyCall | None:
        """A call, if it is here."""

    def again(self, call: AnyCall, wanted: opening.Opening) -> str:
        """The answer to another offer on the connection of a call. Raises sdp.OfferError."""

    def restart(self, call: AnyCall) -> tuple[str, str]:
        """New ICE credentials of a call: ufrag and password."""

    def attended(self, call: AnyCall, message: str | bytes, attendant: Attendant) -> None:
        """An event of one that attends the call. Raises nothing."""

    def hang_up(self, call: AnyCall, *, resumed: bool = False) -> None:
        """End a call by request; or because its conversation goes on at another transceiver."""

    def health(self) -> dict[str, Any]:
        """How the process is, for whoever places calls."""

    def ailments(self) -> list[str]:
        """Why no call would be taken now."""

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


def _note(call: Call, request: web.Request, what: str) -> None:
    """Which request did something to a call."""
    by = journal.line(request.headers.get(REQUEST_HEADER, ""), opening.NAME_CHARACTERS_MAX)
    told = journal.fields(request_id=call.opening.request_id, by_request_id=by or None)
    log.info("%s %s", call, what, extra=told)


def application(switchboard: Switchboard[AnyCall]) -> web.Application:
    """The control API of a transceiver, for an HTTP server."""
    handlers = Handlers(switchboard)
    application = web.Application(
        middlewares=[_guard(switchboard.limits.control_prefixes)],
        client_max_size=REQUEST_OCTETS_MAX,
    )
    application.router.add_post("/v1/sessions", handlers.create)
    application.router.add_get("/v1/sessions/{call_id}", handlers.show)
    application.router.add_post("/v1/sessions/{call_id}/ice", handlers.restart)
    application.router.add_post("/v1/sessions/{call_id}/offer", handlers.again)
    application.router.add_get("/v1/sessions/{call_id}/events", handlers.events)
    application.router.add_delete("/v1/sessions/{call_id}", handlers.delete)
    application.router.add_get("/v1/health", handlers.health)
    application.router.add_get("/metrics", handlers.exposition)
    application.router.add_get("/healthz", monitor.alive)
    application.router.add_get("/readyz", handlers.ready)
    return application


def _guard(prefixes: tuple[endpoints.Prefix, ...]) -> Any:
    """Keeps strangers out, and gives whatever goes wrong its body."""

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
        except opening.Wrong as wrong:
            return Refusal(400, str(wrong), "invalid_request", wrong.param).response()
        except web.HTTPException as error:
            return Refusal(error.status, error.reason, "http_error").response()
        except Exception:
            log.exception("a request met a fault")
            return Refusal(500, "The transceiver met a fault.", "internal_error").response()

    return guard


async def _waits(request: web.Request) -> bool:
    """Whether whoever asked still waits for the answer.

    A process that stood still finds the requests that were given up meanwhile: each would become
    a session that nobody connects to, and together they could fill it. That a connection has ended
    is read behind what came by it, in the second turn of the loop from here.
    """
    for _ in range(2):
        await asyncio.sleep(0)
    return request.transport is not None and not request.transport.is_closing()


class Handlers(Generic[AnyCall]):
    """One method a request."""

    def __init__(self, switchboard: Switchboard[AnyCall]) -> None:
        self._switchboard = switchboard

    def _called(self, request: web.Request) -> AnyCall:
        call = self._switchboard.find(request.match_info["call_id"])
        if call is None or call.opening.key != request.headers.get(KEY_HEADER, ""):
            raise Refusal(404, "There is no such call here.", "call_id_not_found", "call_id")
        return call

    async def create(self, request: web.Request) -> web.Response:
        """Take a call."""
        wanted = await self._switchboard.recalled(opening.read(await request.read()))
        if not await _waits(request):
            raise Refusal(503, "Whoever asked has given up.", "given_up")
        try:
            call, answer = self._switchboard.open(wanted)
        except Full as full:
            raise Refusal(503, str(full), "overloaded") from None
        except sdp.OfferError as error:
            raise Refusal(400, str(error), "invalid_offer", "sdp") from None
        named = {"call_id": call.call_id, "request_id": call.opening.request_id}
        opened = self._switchboard.counters[metrics.Transceiver.SESSIONS_OPENED]
        return _json({**named, "answer": answer, "etag": call.etag, "opened": opened}, 201)

    async def show(self, request: web.Request) -> web.Response:
        """Say how a call is."""
        call = self._called(request)
        found = {"state": call.state.name.lower(), "request_id": call.opening.request_id}
        return _json({**found, "etag": call.etag})

    async def restart(self, request: web.Request) -> web.Response:
        """Give a call new ICE credentials."""
        pair = opening.read_restart(await request.read())
        call = self._called(request)
        if pair != call.client_ice:
            _note(call, request, "is given new ICE credentials")
            call.client_ice = pair
            call.restarted_as = self._switchboard.restart(call)
        if call.restarted_as is None:  # candidates for the pair that there is
            return _json({"etag": call.etag})
        name, password = call.restarted_as  # the same again if the answer was lost on its way
        return _json({"ufrag": name, "pwd": password, "etag": call.etag})

    async def again(self, request: web.Request) -> web.Response:
        """Answer another offer on a call's connection."""
        wanted, call = opening.read(await request.read()), self._called(request)
        try:
            answer = self._switchboard.again(call, wanted)
        except sdp.OfferError as error:
            raise Refusal(400, str(error), "invalid_offer", "sdp") from None
        _note(call, request, "is offered again")
        return _json({"answer": answer, "etag": call.etag})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Let a server of the application's attend a call."""
        call = self._called(request)
        hear = functools.partial(self._switchboard.attended, call)
        try:
            return await attendance.serve(request, call, hear, self._switchboard.counters)
        except Crowded as crowded:
            raise Refusal(429, str(crowded), "too_many_sidebands", "call_id") from None

    async def delete(self, request: web.Request) -> web.Response:
        """End a call."""
        call = self._called(request)
        _note(call, request, "is hung up")
        self._switchboard.hang_up(call, resumed="resumed" in request.query)
        return _json({})

    async def health(self, _: web.Request) -> web.Response:
        """Say how the process is."""
        return _json(self._switchboard.health())

    async def ready(self, _: web.Request) -> web.Response:
        """Say whether a call would be taken now."""
        return monitor.readiness(self._switchboard.ailments())

    async def exposition(self, _: web.Request) -> web.Response:
        """Metrics for Prometheus."""
        self._switchboard.book()
        text = metrics.exposition("earshot_transceiver", [({}, self._switchboard.counters)])
        text += metrics.histograms("earshot_transceiver", self._switchboard.timings)
        return monitor.exposition(text)
