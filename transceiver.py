"""The transceiver: where calls end and conversations begin.

    relay ──UDP──▶ mux ──▶ peer ──▶ session ──▶ backend
    signaling ──TCP──▶ control API, on the same address and port

What it owns: the process. One UDP socket, one HTTP server for signaling, every session by its call
id, one pacer and one clockwork for all of them, and the way it starts and ends.

Rules that stay true:
- Everything runs in one thread's event loop; nothing of a call blocks, waits or has a task of its
  own but its DTLS.
- A call is refused honestly: 503 when the process is full or draining, 400 with the reason when
  the offer cannot be used. What is accepted has a deadline for each state of its life.
- What goes wrong inside one session ends that session, is logged, and nothing else.
- Only `control_prefixes` may use the control API; only `relay_prefixes` may send media.

    POST   /v1/sessions {"offer", "session", "model", "candidates": [[host, port], ...]}
                        201 {"call_id", "answer"}; 400; 503 with Retry-After
    DELETE /v1/sessions/{call_id}   200 {}; 404
    GET    /v1/health               200 {"state", "sessions", "sessions_max"}
    GET    /metrics                 200, Prometheus' text

It does not know of relays' flows, of ufrags beyond minting its own, or of what is said in a call.
"""

import asyncio
import gc
import heapq
import ipaddress
import itertools
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from aiohttp import web

import backend
import ledger
import metrics
import sdp
import settings
import ufrag
from mux import Mux
from session import Session

TICK_S = 0.05
"""How often backends hear that time passes, and the step of the sweep. A turn's end can be this
much late; 100 sessions cost 2,000 short calls a second."""

SWEEP_TICKS = 20
"""Each session is swept every twentieth tick, once a second, and a twentieth of them at a time: no
burst of a hundred reports holds up the pacer."""

LATE_S = 0.005
"""A packet that leaves later than this after its time is counted: clients' buffers start at 20 to
40 ms, so it is a sign long before anybody hears it."""

REQUEST_OCTETS_MAX = 1 << 20
"""Of the control API: an offer and a session with its instructions and tools."""

CANDIDATES_MAX = 8
"""Relay addresses in an answer: two sites, two families, and as many again."""

RETRY_AFTER_S = 5
"""What a refused caller is told to wait: calls last minutes, so some end within seconds."""

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Count = metrics.Transceiver
log = logging.getLogger("transceiver")


class Full(Exception):
    """No room for another session, or none wanted."""


class Pacer:
    """One timer for the play-out of all sessions: each is called when its next frame is due."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        play: Callable[[Session, float], None],
        counters: ledger.Counters,
    ) -> None:
        self._loop, self._clock, self._play, self._values = loop, clock, play, counters.values
        self._heap: list[tuple[float, int, Session]] = []
        self._due: dict[Session, float] = {}  # what the heap's entries must agree with
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def schedule(self, session: Session) -> None:
        """Take over the session's `wakes_at`, whether it is new, changed or gone."""
        at = session.wakes_at
        if at is None:
            self._due.pop(session, None)
        elif self._due.get(session) != at:
            self._due[session] = at
            heapq.heappush(self._heap, (at, next(self._order), session))
            if self._timer is None or at < self._timer_at:
                self._arm()

    def stop(self) -> None:
        """Call nobody any more."""
        self._heap.clear()
        self._due.clear()
        self._arm()

    def _run(self) -> None:
        self._timer = None
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            at, _, session = heapq.heappop(self._heap)
            if self._due.get(session) == at:
                del self._due[session]
                if now - at > LATE_S:
                    self._values[Count.PACED_LATE] += 1
                self._play(session, now)  # which schedules the next frame
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._timer_at = self._heap[0][0]
            delay_s = max(0.0, self._timer_at - self._clock())
            self._timer = self._loop.call_later(delay_s, self._run)


class Transceiver:
    """The process's story: start, take calls, end them, stop."""

    def __init__(
        self,
        config: settings.Transceiver,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        """Raises SettingsError if the keys or the backend cannot be used; binds nothing yet."""
        self.clock, self.unix = clock, unix
        self.counters = ledger.Counters(metrics.Transceiver)
        self.timings = ledger.Histograms(metrics.Timing)
        self.sessions: dict[str, Session] = {}
        self.draining = False
        self._config, self.limits = config, config.transceiver
        self._keyring = config.keys.load()
        self._cluster = config.cluster[0].hints()
        self._slots: dict[Session, int] = {}
        self._next_slot = itertools.cycle(range(SWEEP_TICKS))
        self._ticks = 0
        self._ticking: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        backend.connect(config.backend, None, lambda _: None).close()

    async def start(self) -> None:
        """Serve from the running loop. Raises OSError if the address is not to be had."""
        loop = asyncio.get_running_loop()
        at = self.limits.listen
        sock = _media_socket(at, self.limits.receive_buffer_octets)
        self._mux = Mux(sock, _inside(self.limits.relay_prefixes), self.counters, self.clock)
        self._pacer = Pacer(loop, self.clock, self._play, self.counters)
        self._http = web.AppRunner(_application(self), access_log=None)
        try:
            await self._http.setup()
            await web.TCPSite(self._http, at.host, at.port).start()
        except BaseException:
            self._mux.close()
            await self._http.cleanup()
            raise
        self._ticking = loop.call_later(TICK_S, self._tick)

    async def stop(self) -> None:
        """Say goodbye to every client and free everything."""
        self.draining = True
        if self._ticking is not None:
            self._ticking.cancel()
        for session in list(self.sessions.values()):
            self.ended(session, "the transceiver is shutting down")
        while self._closing:
            await asyncio.wait(self._closing)
        self._pacer.stop()
        await self._http.cleanup()
        self._mux.close()

    def open(
        self, text: str, wanted: dict[str, Any] | None, candidates: list[tuple[str, int]]
    ) -> tuple[str, str]:
        """Take a call: its id and the answer. Raises Full, and sdp.OfferError."""
        if self.draining or len(self.sessions) >= self.limits.sessions_max:
            self.counters.values[Count.SESSIONS_REFUSED] += 1
            raise Full
        offer = sdp.read_offer(text)
        at = self.limits.listen
        hint = ufrag.mint(self._keyring, self._cluster, at.address, at.port, secrets.randbits(32))
        password = ufrag.password(self._keyring, hint) or b""  # never empty: its key just minted
        session = Session(self, self._mux, offer, (hint, password), self._config.backend, wanted)
        self.sessions[session.call_id] = session
        self._slots[session] = next(self._next_slot)
        self.counters.values[Count.SESSIONS_OPENED] += 1
        self.counters.values[Count.SESSIONS] = len(self.sessions)
        answer = sdp.answer(
            offer,
            hint,
            password.decode(),
            fingerprint=session.fingerprint,
            candidates=candidates,
            ssrc=session.ssrc,
            session_id=secrets.randbits(62),
            rate_hz=session.rate_hz,
        )
        return session.call_id, answer

    def paced(self, session: Session) -> None:
        """See session.Owner."""
        self._pacer.schedule(session)

    def ended(self, session: Session, reason: str) -> None:
        """End a session: it is out of the books at once, and closed as soon as the loop turns."""
        if self.sessions.pop(session.call_id, None) is None:
            return
        del self._slots[session]
        self.counters.values[Count.SESSIONS_CLOSED] += 1
        self.counters.values[Count.SESSIONS] = len(self.sessions)
        task = asyncio.get_running_loop().create_task(self._close(session, reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, session: Session, reason: str) -> None:
        try:
            await session.close(reason)
        except Exception:
            log.exception("%s did not close cleanly", session)
        self._pacer.schedule(session)

    def _play(self, session: Session, now: float) -> None:
        self._guarded(session, session.flow, now)

    def _tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self.tick(self.clock())

    def tick(self, now: float) -> None:
        """Let time pass in every session, and sweep those whose turn it is."""
        self._ticks += 1
        slot = self._ticks % SWEEP_TICKS
        for session in list(self.sessions.values()):
            self._guarded(session, session.tick, now)
            if self._slots.get(session) == slot:
                self._guarded(session, session.sweep, now)

    def _guarded(self, session: Session, step: Callable[[float], str | None], now: float) -> None:
        """Do one session's work; end it if that says why, or meets a mistake of ours."""
        try:
            reason = step(now)
            if reason is not None:
                self.ended(session, reason)
        except Exception:
            log.exception("%s met a fault", session)
            self.ended(session, "a fault in the server")


def _media_socket(at: settings.Endpoint, receive_buffer_octets: int) -> socket.socket:
    """The bound, non-blocking UDP socket. Raises OSError."""
    family = socket.AF_INET6 if at.address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        # socket(7): the kernel gives at most net.core.rmem_max without privileges.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_octets)
        sock.bind((at.host, at.port))
    except OSError:
        sock.close()
        raise
    return sock


def _inside(prefixes: tuple[settings.Prefix, ...]) -> Callable[[str], bool]:
    return lambda host: any(host in prefix for prefix in prefixes)


# --- the control API --------------------------------------------------------------------------


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


def _application(transceiver: Transceiver) -> web.Application:
    """The control API of a transceiver, for an HTTP server."""
    allowed = _inside(transceiver.limits.control_prefixes)

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not allowed(request.remote or ""):
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
        offer, wanted, candidates = _call(await request.read())
        try:
            call_id, answer = transceiver.open(offer, wanted, candidates)
        except Full:
            message = "This transceiver takes no further sessions now."
            raise Refusal(503, message, "overloaded") from None
        except sdp.OfferError as error:
            raise Refusal(400, str(error), "invalid_offer", "sdp") from None
        return _json({"call_id": call_id, "answer": answer}, 201)

    async def delete(request: web.Request) -> web.Response:
        session = transceiver.sessions.get(request.match_info["call_id"])
        if session is None:
            raise Refusal(404, "There is no such call here.", "call_id_not_found", "call_id")
        transceiver.ended(session, "hung up by request")
        return _json({})

    async def health(_: web.Request) -> web.Response:
        state = "draining" if transceiver.draining else "serving"
        count, most = len(transceiver.sessions), transceiver.limits.sessions_max
        return _json({"state": state, "sessions": count, "sessions_max": most})

    async def exposition(_: web.Request) -> web.Response:
        text = metrics.exposition("earshot_transceiver", [({}, transceiver.counters)])
        text += metrics.histograms("earshot_transceiver", transceiver.timings)
        return web.Response(body=text, headers={"Content-Type": EXPOSITION_TYPE})

    application = web.Application(middlewares=[guard], client_max_size=REQUEST_OCTETS_MAX)
    application.router.add_post("/v1/sessions", create)
    application.router.add_delete("/v1/sessions/{call_id}", delete)
    application.router.add_get("/v1/health", health)
    application.router.add_get("/metrics", exposition)
    return application


def _call(body: bytes) -> tuple[str, dict[str, Any] | None, list[tuple[str, int]]]:
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


# --- the command line -------------------------------------------------------------------------


async def serve(config: settings.Transceiver) -> None:
    """Serve until SIGTERM or SIGINT, then end every call politely. Raises OSError."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    transceiver = Transceiver(config)
    await transceiver.start()
    # What exists now lives as long as the process: keep the collector from walking it, since a
    # full pass over the imported libraries is a pause of 30 ms in everybody's audio.
    gc.collect()
    gc.freeze()
    log.info("transceiver ready on %s", config.transceiver.listen)
    await stopped.wait()
    log.info("stopping with %d sessions", len(transceiver.sessions))
    await transceiver.stop()


cli = typer.Typer(
    help="Where calls end and conversations begin.", no_args_is_help=True, add_completion=False
)
_Config = Annotated[Path, typer.Option("--config", help="The settings file.", metavar="FILE")]


def _load(path: Path) -> settings.Transceiver:
    """The settings, checked as far as possible without serving; ends the program if they fail."""
    try:
        config = settings.load(path, settings.Transceiver)
        Transceiver(config)
    except settings.SettingsError as error:
        typer.echo(f"transceiver: {error}", err=True)
        raise typer.Exit(os.EX_CONFIG) from error
    return config


@cli.command()
def check(config: _Config) -> None:
    """Read the settings and the keys, try the backend, and say what is wrong, if anything."""
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
        typer.echo(f"transceiver: cannot serve at {found.transceiver.listen}: {error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from error


if __name__ == "__main__":
    cli()
