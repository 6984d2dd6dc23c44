"""The observer: what signaling knows of each request, counts of it, and writes down at its end.

    request ──▶ Observer.observe ──▶ … door ──▶ placement ── X-Request-Id ──▶ transceiver
                 a Trail                 │            │
                                      key, call    how long the transceiver took

What it owns: the request's id, its trail through signaling, its one line in the journal, and the
counters and histograms that are kept by API.

Rules that stay true:
- A request's id is 8 hexadecimal digits drawn here. It goes to the transceiver with everything that
  is asked for this request, and stands in the answer. It becomes the nonce of the call's routing
  hint, so that nobody outside chooses it: a client's own X-Request-Id is written beside it.
- Each request is one line at its end, but for probes that are answered with yes. A flood of
  those that are refused, fail or are broken off, or that nobody needs a key for, is a bounded
  number of lines, which say how many there were in between.
- No line has a key, a whole call id or a client's whole address.
- It looks on: what it meets is passed on as it is.

X-Request-Id has no RFC; traceparent (https://www.w3.org/TR/trace-context/) is left to proxies.
"""

import contextlib
import contextvars
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import aiohttp
from aiohttp import web

import journal
import ledger
import limits
import metrics

HEADER = "X-Request-Id"

PROBES = ("/healthz", "/readyz", "/health")
"""Asked every few seconds by whatever stands in front: only what it is refused is worth a line."""

THEIRS_CHARACTERS_MAX = 128
"""Of a client's own id. A UUID has 36 characters, a trace's id 55."""

TAG_CHARACTERS = 6
"""The end of a call's id, which tells calls apart in a log and lets nobody join one."""

REFUSED_LINES_PER_S = 50
"""Lines a second for requests that were refused; and as many for those that failed or were broken
off, which the others must not hide, and for those that took no key. More would let a stranger fill
a disk; fewer would hide who else had trouble meanwhile."""

Api = metrics.Api
Timing = metrics.SignalingTiming
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger("request")

_ENDINGS = {
    401: Api.REFUSED_KEY,
    403: Api.REFUSED_KEY,
    404: Api.REFUSED_UNKNOWN,
    408: Api.REFUSED_SLOW,
    413: Api.REFUSED_SIZE,
    429: Api.REFUSED_LIMIT,
    503: Api.UNAVAILABLE,
}


@dataclass(slots=True)
class Trail:
    """What is known of a request on its way."""

    request_id: str = field(default_factory=lambda: f"{secrets.randbits(32):08x}")
    """Ours: 8 hexadecimal digits."""
    started: float = field(default_factory=time.monotonic)
    asking_s: float = 0.0
    """How long transceivers took, all attempts together."""
    reading_s: float = 0.0
    """How long the client took to send its body."""
    key: str = ""
    """Name of the caller's key, once it is known."""
    call: str = ""
    """Tag of the call that the request is about."""
    site: str = ""
    """Where the client of a new call was told to enter, if there are sites."""
    cluster: int | None = None
    """The cluster that took it."""
    placed: bool = False
    """True once a transceiver has taken a call for it."""
    call_request_id: str = ""
    """What the transceiver knows a new call by, where that is not `request_id`."""

    def about(self, call_id: str, key: str) -> None:
        """The request is about this call, and comes under this key's name."""
        self.call, self.key = call_id[-TAG_CHARACTERS:], key

    def answered(self, call_id: str, request_id: str) -> None:
        """A transceiver has taken a call, and knows it by this id."""
        self.call, self.placed = call_id[-TAG_CHARACTERS:], True
        if request_id != self.request_id:
            self.call_request_id = request_id


_KEY = web.RequestKey("trail", Trail)
_current: contextvars.ContextVar[Trail | None] = contextvars.ContextVar("trail", default=None)


def trail() -> Trail:
    """Of the request that is being handled; outside of any, one that nobody will see."""
    return _current.get() or Trail()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Counts the time as the client's: its body is on its way."""
    started = time.monotonic()
    try:
        yield
    finally:
        trail().reading_s += time.monotonic() - started


def tracing() -> aiohttp.TraceConfig:
    """For the client of the transceivers' control API: the id goes along, the time is counted."""

    async def begins(
        _: aiohttp.ClientSession,
        context: SimpleNamespace,
        about: aiohttp.TraceRequestStartParams,
    ) -> None:
        context.trail = _current.get()
        if context.trail is not None:
            about.headers[HEADER] = context.trail.request_id
            context.started = time.monotonic()

    async def ends(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if context.trail is not None:
            context.trail.asking_s += time.monotonic() - context.started

    config = aiohttp.TraceConfig()
    config.on_request_start.append(begins)
    config.on_request_end.append(ends)
    config.on_request_exception.append(ends)
    return config


class Observer:
    """Looks on while signaling handles its requests."""

    def __init__(
        self,
        apis: Sequence[str],
        client_of: Callable[[web.Request], str | None] = lambda request: request.remote,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """For these APIs, named as the modules of their handlers; `other` is what is left.
        `client_of` knows whose address is a client's where proxies stand in front."""
        self.counters = {name: ledger.Counters(Api) for name in (*apis, "other")}
        self.timings = ledger.Histograms(Timing)
        self._clock, self._client_of = clock, client_of
        self._lines = limits.Buckets()
        self._unwritten = 0

    def attach(self, app: web.Application) -> None:
        """Look on at this application; call it before its other middlewares are added."""
        app.middlewares.append(self.observe)
        app.on_response_prepare.append(_name_request)

    @web.middleware
    async def observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """One request, from its headers to the last octet of its answer's head."""
        found = request[_KEY] = Trail(started=self._clock())
        token = _current.set(found)
        counters = self._counters_of(request)
        counters.values[Api.IN_FLIGHT] += 1
        status = None
        try:
            response = await handler(request)
            status = response.status
        except web.HTTPException as error:  # a redirect
            status = error.status
            raise
        else:
            return response
        finally:
            _current.reset(token)
            counters.values[Api.IN_FLIGHT] -= 1
            self._ended(request, counters, found, status)

    def _counters_of(self, request: web.Request) -> ledger.Counters:
        api = getattr(request.match_info.handler, "__module__", "")
        return self.counters.get(api) or self.counters["other"]

    def _ended(
        self, request: web.Request, counters: ledger.Counters, found: Trail, status: int | None
    ) -> None:
        now = self._clock()
        took_s = now - found.started
        own_s = max(0.0, took_s - found.asking_s - found.reading_s)
        counters.values[_ending(found, status)] += 1
        if found.placed:
            self.timings.observe(Timing.PLACED, took_s)
            self.timings.observe(Timing.OWN, own_s)
            self.timings.observe(Timing.TRANSCEIVER, found.asking_s)
        route = route_of(request)
        if not self._is_written(route, status, found, now):
            return
        client = ""
        with contextlib.suppress(Exception):  # an answer is worth more than a line about it
            client = journal.masked(self._client_of(request))
        log.info(
            "%s %s %s",
            request.method,
            route,
            status or "was broken off",
            extra=journal.fields(
                request_id=found.request_id,
                call_request_id=found.call_request_id or None,
                client_request_id=_theirs(request),
                method=request.method,
                route=route,
                status=status,
                ms=round(1e3 * took_s, 2),
                own_ms=None if status == 101 else round(1e3 * own_s, 2),  # WebSockets wait
                transceiver_ms=round(1e3 * found.asking_s, 2) if found.asking_s else None,
                body_ms=round(1e3 * found.reading_s, 2) if found.reading_s >= 1e-3 else None,
                client=client,
                key=found.key or None,
                call=found.call or None,
                site=found.site or None,
                cluster=found.cluster,
                unwritten=self._unwritten or None,
            ),
        )
        self._unwritten = 0

    def _is_written(self, route: str, status: int | None, found: Trail, now: float) -> bool:
        """False for quiet probes, and while there is too much of what went wrong or of what anybody
        may ask for without a key and a call: the page, preflights."""
        good = status is not None and status < 400
        if good and (route in PROBES or found.key or found.call):
            return route not in PROBES
        failed = status is None or status >= 500
        kind = "public" if good else "failed" if failed else "refused"
        if self._lines.take(kind, REFUSED_LINES_PER_S, REFUSED_LINES_PER_S, now):
            self._unwritten += 1
            return False
        return True

    def exposition(self) -> bytes:
        """Prometheus' text of it."""
        rows = [({"api": name}, counters) for name, counters in self.counters.items()]
        text = metrics.exposition("earshot_signaling_api", rows)
        return text + metrics.histograms("earshot_signaling", self.timings)


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer names its request, so that a user can name it to us."""
    found = request.get(_KEY)  # an answer leaves after the request has been looked at
    if found is not None:
        response.headers[HEADER] = found.request_id


def _ending(found: Trail, status: int | None) -> Api:
    if status is None:
        return Api.ABANDONED
    if status < 400:
        return Api.PLACED if found.placed else Api.ANSWERED
    return _ENDINGS.get(status, Api.REFUSED_REQUEST if status < 500 else Api.FAULTS)


def route_of(request: web.Request) -> str:
    """The path with names for its parts: an id in it is nobody's to read. A path that leads nowhere
    is a stranger's text, of which its beginning says enough."""
    resource = request.match_info.route.resource
    if resource is not None:
        return resource.canonical
    return journal.line(request.path.partition("rtc_")[0], 64)


def _theirs(request: web.Request) -> str | None:
    theirs = request.headers.get(HEADER)
    return None if theirs is None else journal.line(theirs, THEIRS_CHARACTERS_MAX)
