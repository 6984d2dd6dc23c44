"""The listener: strangers' connections, bounded in number and in time, with TLS or without.

    accept ──▶ a place? ──▶ TLS handshake ──▶ head ──▶ request in hand ──▶ answer ──▶ next head
               connections     HANDSHAKE_S    HEAD_S     (intake.py)       KEEP_ALIVE_S

What it owns: the listening socket, the TLS context, the places that connections take, and how long
one may keep its place without a request in hand.

Rules that stay true:
- Whoever says nothing, or says it slowly, or takes no answer, loses its place in bounded time.
- An address has so many places and no more, but for proxies that are trusted to speak for many.
- When all places are taken the connection that has waited longest makes room: thousands that idle
  keep nobody out. One with a request in hand is never closed for another's sake.
- A certificate that cannot be used never takes the place of one that can.

aiohttp bounds how long a connection idles between two requests; how long the head of a request may
take it bounds by the same time. The two differ here: a proxy keeps connections open for a minute,
and a head of one segment takes no ten seconds. So its RequestHandler is made here, by a subclass
that holds one timer, and by nothing but its public methods.

TLS 1.2 suites: https://www.rfc-editor.org/rfc/rfc9325
"""

import asyncio
import logging
import resource
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

import orjson
from aiohttp import web

import endpoints
import intake
import ledger
import limits
import metrics
import settings

log = logging.getLogger("listener")

BACKLOG = 1024
"""Connections that the kernel keeps while the event loop is busy: a burst of calls in a second."""

HANDSHAKE_S = 5.0
"""TLS takes two round trips; a bad link and a lost packet make it a second or two."""

HEAD_S = 10.0
"""From a connection's begin, or from the first octet after an answer, to the end of the head. It is
one segment or two; ten seconds let two of them be lost."""

KEEP_ALIVE_S = 75.0
"""After an answer: to take it, and to send another request. Longer than the proxies in use wait
(nginx and AWS 60 s), so that it is they who close, and none sends into a closed connection."""

SHUTDOWN_S = 2.0
"""For a client's part in the end of TLS, which many never send."""

HEADERS_MAX = 64
"""A browser sends 25, proxies add ten."""

HEAD_OCTETS_MAX = 32_768
"""Of a head, all headers together: four times what the largest ephemeral key takes. aiohttp bounds
each header by 8 KiB; 64 of those in thousands of connections would be gigaoctets."""

PAUSE_S = 0.2
"""After an accept that failed: out of descriptors, mostly, and then soon again."""

DESCRIPTORS_BESIDE = 256
"""What the process needs besides connections: files of the page, transceivers, Redis."""

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: forward secrecy and authenticated encryption. Those of 1.3 all have both."""

JSON = "application/json"
Count = metrics.Signaling
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def tls(table: settings.SignalingTable) -> ssl.SSLContext | None:
    """The TLS context that the settings ask for; None if a proxy does it. Raises SettingsError."""
    certificate, key = table.tls_certificate, table.tls_key
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    for path in (certificate, key):
        _check_readable(path, private=path is key)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise settings.SettingsError(
            f"signaling.tls_certificate: {certificate} and {key} are no certificate (PEM) with its"
            f" key: {reason}"
        ) from error
    return context


def _check_readable(path: Path, *, private: bool) -> None:
    try:
        with path.open("rb"):
            mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise settings.SettingsError(f"{path}: {error.strerror}") from error
    # A group may read it: Debian has one for programs that serve with certificates (ssl-cert).
    if private and mode & 0o027:
        raise settings.SettingsError(
            f"{path}: mode {mode:04o} lets others than its owner and group read the key: chmod 640"
        )


def _no_password() -> bytes:
    raise ValueError("the key needs a passphrase, which nobody is there to type")


class Place:
    """A connection's place, from accept to its end."""

    __slots__ = ("_listener", "counted", "task", "transport")

    def __init__(self, listener: "Listener", counted: str) -> None:
        self._listener: Listener | None = listener
        self.counted = counted
        """What its address counts as; empty for a trusted proxy."""
        self.task: asyncio.Task[None] | None = None
        """TLS and the making of the connection."""
        self.transport: asyncio.Transport | None = None

    def wait(self, waiting: bool) -> None:
        """It has no request in hand now, or has one."""
        if self._listener is not None:
            self._listener.waits(self, waiting)

    def give_up(self) -> None:
        """End the connection; what is still to be written is lost."""
        if self.transport is not None:
            self.transport.abort()
        elif self.task is not None:
            self.task.cancel()

    def received(self, _: object) -> None:
        """The task is done: there is a connection now, whose end releases the place, or none."""
        if self.transport is None:
            self.release()

    def release(self) -> None:
        """The connection has ended. May be called again."""
        if self._listener is not None:
            self._listener.released(self)
            self._listener = None

    def slow(self) -> None:
        """The connection is closed for its slowness."""
        if self._listener is not None:
            self._listener.count(Count.CONNECTIONS_SLOW)


class Connection(web.RequestHandler):
    """aiohttp's, with a timer that closes it when a head, or the taking of an answer, is slow."""

    __slots__ = ("_answered", "_heeded", "_in_hand", "_octets", "_place", "_tail", "_timer")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, place: Place) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # as AppRunner passes it on
            keepalive_timeout=2 * KEEP_ALIVE_S,  # the timer here comes first
            lingering_time=intake.BODY_DEADLINE_S,
            max_headers=HEADERS_MAX,
            auto_decompress=False,  # a kilooctet can be a megaoctet of work
        )
        self._place = place
        self._timer: asyncio.TimerHandle | None = None
        self._in_hand = self._answered = False
        """There is a request, and its answer is not ready; there was one before."""
        self._octets, self._tail = 0, b""
        """Of the head that is waited for: how many have come, and the last three of them."""
        self._heeded = True
        """What comes belongs to a head that is not complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        self._place.transport = transport
        self._set_timer(HEAD_S)
        self._place.wait(True)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection has ended, by whomever."""
        self._set_timer(None)
        self._place.release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Octets of a head, or of a body."""
        if self._heeded and not self._heed(data):
            self._refuse(431, "The head of the request is too large.", "request_head_too_large")
            return
        super().data_received(data)

    def _heed(self, data: bytes) -> bool:
        """Count the octets of a head; False if there are too many."""
        if not self._octets:
            data = data.lstrip(b"\r\n")  # as every parser does, before a request
            if data and self._answered:
                self._set_timer(HEAD_S)
        known = self._tail + data
        end = known.find(b"\r\n\r\n")
        self._heeded = end < 0
        self._octets += len(data) if self._heeded else end
        self._tail = known[-3:]
        return self._octets <= HEAD_OCTETS_MAX

    def begin(self) -> None:
        """A head is complete. What handles the request has its own deadlines."""
        self._in_hand, self._heeded = True, False
        self._set_timer(None)
        self._place.wait(False)

    def end(self, last: bool) -> None:
        """The answer is ready to be sent; `last`: and then the connection ends."""
        self._in_hand, self._answered = False, True
        self._heeded, self._octets, self._tail = not last, 0, b""
        self._set_timer(KEEP_ALIVE_S)
        self._place.wait(True)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP. A stranger's octets are no fault of ours: nothing is
        logged of them."""
        if status >= 500 and not isinstance(exc, ConnectionError):
            log.error("a request met a fault", exc_info=exc)
        response = web.Response(
            status=status,
            body=_error(message or "The request is not HTTP."),
            content_type=JSON,
            headers={"Server": "earshot"},  # and not which version of what
        )
        response.force_close()
        return response

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        """Too slow: who began a head is told so, who idled is not."""
        self._timer = None
        transport = self._place.transport
        if transport is None or transport.is_closing() or self._in_hand:
            return
        if self._octets or not self._answered:
            self._place.slow()
        if self._octets:
            self._refuse(408, "The head of the request came too slowly.", "timeout")
        elif transport.get_write_buffer_size():
            transport.abort()  # it does not take its answer
        else:
            self.force_close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer what is no request yet, and end the connection."""
        transport = self._place.transport
        assert transport is not None
        body = _error(message, code)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
            f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        if transport.get_write_buffer_size():
            transport.abort()  # it takes no answer either
        else:
            self.force_close()


class Listener:
    """Accepts connections for an application."""

    def __init__(
        self, runner: web.AppRunner, config: settings.Signaling, counters: ledger.Counters
    ) -> None:
        """For a runner that is set up. Raises SettingsError for a certificate of no use."""
        assert runner.server is not None
        self._server = runner.server
        self._server.request_handler = _timed(self._server.request_handler)
        self._counters = counters
        self._at = config.signaling.listen
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._waiting: dict[Place, None] = {}
        """In the order in which they began to wait."""
        self._by_address: Counter[str] = Counter()
        self._taken = 0
        self.reload(config)

    def reload(self, config: settings.Signaling) -> None:
        """For connections from now on. Raises SettingsError, and then nothing has changed."""
        self._tls = tls(config.signaling)
        self._table = config.signaling
        self._places_max = _places(config.signaling.connections_max)

    async def start(self) -> endpoints.Endpoint:
        """Listen; where. Raises OSError."""
        listen = self._table.listen
        family = socket.AF_INET6 if listen.address.version == 6 else socket.AF_INET
        self._socket = socket.create_server(
            (listen.host, listen.port), family=family, backlog=BACKLOG
        )
        self._socket.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(self._socket))
        port = self._socket.getsockname()[1]  # what the kernel chose, if the setting says 0
        self._at = endpoints.Endpoint(str(listen).rpartition(":")[0] + f":{port}")
        return self._at

    async def until(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set. Raises what ended the accepting before that: a fault."""
        assert self._accepting is not None
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((stopping, self._accepting), return_when=asyncio.FIRST_COMPLETED)
            if self._accepting.done():
                self._accepting.result()
        finally:
            stopping.cancel()

    async def stop(self) -> None:
        """Accept no more. Connections that are here are the runner's to end."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._socket is not None:
            self._socket.close()

    @property
    def url(self) -> str:
        """Where the API and the page are."""
        return f"{'https' if self._tls else 'http'}://{self._at}/"

    async def _accept(self, listening: socket.socket) -> None:
        loop, failing = asyncio.get_running_loop(), False
        while True:
            try:
                found, address = await loop.sock_accept(listening)
            except ConnectionError:
                continue  # gone before it was accepted
            except OSError as error:
                if not failing:
                    log.warning("cannot accept connections: %s", error)
                failing = True
                await asyncio.sleep(PAUSE_S)
                continue
            failing = False
            place = self._place(address[0])
            if place is None:
                found.close()
            else:
                place.task = asyncio.create_task(self._receive(found, place))
                place.task.add_done_callback(place.received)
            # sock_accept does not let go of the loop while connections wait.
            await asyncio.sleep(0)

    def _place(self, host: str) -> Place | None:
        """A place for whoever comes from there; None if there is none for him."""
        trusted = any(host in prefix for prefix in self._table.trusted_proxies)
        counted = "" if trusted else limits.counted_as(host)
        if counted and self._by_address[counted] >= self._table.connections_per_address_max:
            self.count(Count.CONNECTIONS_REFUSED)
            return None
        if self._taken >= self._places_max:
            self.count(Count.CONNECTIONS_REFUSED)
            longest = next(iter(self._waiting), None)
            if longest is None:
                return None
            del self._waiting[longest]
            longest.give_up()
        place = Place(self, counted)
        self._taken += 1
        self._by_address[counted] += 1
        self._waiting[place] = None  # also while it shakes hands
        self._book()
        return place

    async def _receive(self, found: socket.socket, place: Place) -> None:
        """TLS, if there is any, and the connection is aiohttp's."""
        loop = asyncio.get_running_loop()
        with_tls = self._tls is not None
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(self._server, loop, place),
                found,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_S if with_tls else None,
                ssl_shutdown_timeout=SHUTDOWN_S if with_tls else None,
            )
        except (OSError, TimeoutError):
            # Scanners, clients that do not trust us or speak no TLS, and who says nothing at all.
            self.count(Count.HANDSHAKES_FAILED)

    def waits(self, place: Place, waiting: bool) -> None:
        """A connection has no request in hand now, or has one."""
        self._waiting.pop(place, None)
        if waiting:
            self._waiting[place] = None

    def released(self, place: Place) -> None:
        """A connection has ended."""
        self._waiting.pop(place, None)
        self._taken -= 1
        self._by_address[place.counted] -= 1
        if not self._by_address[place.counted]:
            del self._by_address[place.counted]
        self._book()

    def count(self, kind: metrics.Signaling) -> None:
        """One more of these."""
        self._counters.values[kind] += 1

    def _book(self) -> None:
        self._counters.values[Count.CONNECTIONS] = self._taken


def _timed(handler: Handler) -> Handler:
    """The application's handler, which its connection is told of."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin()
        last = True
        try:
            response = await handler(request)
            # A client that is refused before it has sent all may send the rest, but no more.
            last = not request.content.is_eof()
            if last:
                response.force_close()
            return response
        finally:
            connection.end(last)

    return handle


def _places(wanted: int) -> int:
    """As many connections as were asked for, or as many as there can be descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + DESCRIPTORS_BESIDE
    if soft < needed:
        soft = min(needed, hard) if hard != resource.RLIM_INFINITY else needed
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed:
        return wanted
    places = max(1, soft - DESCRIPTORS_BESIDE)
    log.warning("connections_max: %d, since the process may have %d descriptors", places, soft)
    return places


def _error(message: str, code: str = "bad_request") -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return orjson.dumps({"error": error})
