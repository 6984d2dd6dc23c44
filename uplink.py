"""Uplinks: connections to model servers, opened, kept and opened again.

What it owns: `Target`, a table of the settings with its key read; `Uplinks`, what all connections
of a process share; and `Uplink`, one session's way to its server (`remote.py` says what goes over
it), in the shape of `backend.Backend`.

Rules that stay true:
- What a caller says is written in the next turn of the event loop, unless the server is not
  reading. Then it waits, bounded: by outbox.py's limits here, by SEND_BUFFER_OCTETS in the
  kernel, by 64 kB in between.
- Reading never stops for good, however much is still to be played: an interruption comes on the
  same stream as the audio before it. But a server that never pauses is read a batch at a
  time, one in BATCH_S, so that no other session notices.
- A connection that is lost is opened again at once, then ever more slowly, for `retry_s`; a server
  that refuses us (4xx) is asked once. Then `lost` is called, once, and never after `close`.
- Whatever happens here ends in events, or in the loss of this session's backend. Nothing raises.
- Keys, addresses and what is said in a call appear in no message to a client, keys in no log.

https://www.rfc-editor.org/rfc/rfc6455 (WebSocket)
"""

import asyncio
import logging
import random
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence

import aiohttp
from aiohttp import WSMsgType

import ledger
import metrics
import settings
from dialect import BETA_HEADER
from realtime import Event
from remote import Remote, Stage

SUBPROTOCOL = "realtime"
"""Offered to every server: some insist on it, the others ignore it."""

SEND_BUFFER_OCTETS = 65_536
"""What the kernel holds for a server that does not read; it takes twice as much for itself. 1.5 s
of 16 kHz as base64: more would be heard too late. Enough for 300 ms of round trip."""

CLOSE_S = 1.0
"""How long a server may take to say goodbye; nobody waits for it but the end of the process."""

BACKOFF_S = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Waits before another attempt, the last for all further ones; each half by chance, so that
the sessions of a server that restarts do not all come back in the same moment."""

STABLE_S = 10.0
"""A connection that has lasted so long was a good one: its loss is the first again, with all of
`retry_s` before it. One that is lost sooner is one more failure of the same outage."""

SETTLE_S = 1.0
"""How long a server may take to confirm its settings before it is taken as it is. Not all servers
do, and the client sees no session before."""

BATCH_EVENTS = 32
BATCH_DELTAS = 128
BATCH_OCTETS = 262_144
BATCH_S = 0.02
"""The pace at which a server is read that never pauses: so many events, deltas of audio, or octets
in so long. A batch takes a few milliseconds to pass on; deltas cost least, since they cross no data
channel. Audio comes at 128 times real time even in deltas of 20 ms, so that an interruption that
stands behind a minute of it is half a second late at the worst."""

PAUSES_MAX = 5
"""Of BATCH_S, after one message, however large: an interruption may be waiting behind it."""

Count = metrics.Transceiver
Timing = metrics.Timing
log = logging.getLogger("uplink")


class Target:
    """A model server that the settings name, ready to be connected to."""

    def __init__(self, table: settings.Backend) -> None:
        """Raises SettingsError "KEY: REASON" if its key or its certificates cannot be used."""
        assert table.url is not None  # the settings have seen to that
        self.table = table
        self.url = str(table.url)
        self.headers = dict(table.headers)
        if table.dialect == "beta":
            self.headers.setdefault(*BETA_HEADER)
        try:
            if table.key_file is not None:
                self.headers["Authorization"] = f"Bearer {settings.load_secret(table.key_file)}"
        except settings.SettingsError as error:
            raise settings.SettingsError(f"key_file: {error}") from error
        self.trust: ssl.SSLContext | bool = True
        try:
            if table.url.tls:
                self.trust = ssl.create_default_context(cafile=table.ca_file)
        except OSError as error:  # SSLError is one
            raise settings.SettingsError(f"ca_file: {table.ca_file}: {error}") from error

    @property
    def query(self) -> dict[str, str]:
        """What is added to the address."""
        return {"model": self.table.model} if self.table.model else {}


class Uplinks:
    """What the connections of a process share. Made before the loop runs; opened inside it."""

    def __init__(
        self,
        counters: ledger.Counters,
        clock: Callable[[], float],
        timings: ledger.Histograms | None = None,
    ) -> None:
        self.counters, self.clock = counters, clock
        self.timings = timings or ledger.Histograms(Timing)
        self.running: set[asyncio.Task[None]] = set()
        self._parting: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The client that all connections are opened by."""
        if self._http is None:
            self._http = aiohttp.ClientSession(
                # Without the usual limit of 100 connections, and without cookies: sessions have
                # nothing in common.
                connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._http

    def open(
        self,
        target: Target,
        session: Event | None,
        emit: Callable[[Event], None],
        lost: Callable[[str], None],
        past: Sequence[Event] = (),
    ) -> "Uplink":
        """Begin a session at a server; see backend.Backends.connect."""
        return Uplink(self, target, session, emit, lost, past)

    def part(self, line: "aiohttp.ClientWebSocketResponse[bool]") -> None:
        """Say goodbye to a server while its session already calls again."""
        task = asyncio.get_running_loop().create_task(_goodbye(line))
        self._parting.add(task)
        task.add_done_callback(self._parting.discard)

    async def close(self) -> None:
        """End every connection that is left."""
        for tasks in (self.running, self._parting):
            for task in list(self.running):
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        if self._http is not None:
            await self._http.close()


def _ignore(_: object) -> None:
    """What comes after the end of a session goes nowhere."""


async def _goodbye(line: "aiohttp.ClientWebSocketResponse[bool]") -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await line.close()
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass  # closed all the same, and not politely


class Uplink:
    """One session at a model server, in the shape of backend.Backend."""

    def __init__(
        self,
        uplinks: Uplinks,
        target: Target,
        session: Event | None,
        emit: Callable[[Event], None],
        lost: Callable[[str], None],
        past: Sequence[Event] = (),
    ) -> None:
        table = target.table
        self.rate_hz: int = table.rate_hz
        self._uplinks, self._target = uplinks, target
        self._emit, self._lost = emit, lost
        self._name = secrets.token_hex(6)
        shown = table.model or "unnamed"
        self._remote = Remote(self._name, table.rate_hz, table.dialect, shown, session, past)
        self._closed = False
        self._wake = asyncio.Event()
        self._to_emit: deque[Event] = deque()
        self._emitting = False
        self._counted = 0, 0
        self._ready_at: float | None = None
        self._opened_at = 0.0
        self._once_ready = False
        self._batch = 0.0, 0.0  # when it began, and how full it is
        self._task = asyncio.get_running_loop().create_task(self._run())
        uplinks.running.add(self._task)
        self._task.add_done_callback(uplinks.running.discard)

    # --- backend.Backend ---------------------------------------------------------------------

    def send(self, event: Event, now: float) -> None:
        """See Backend."""
        if not self._closed:
            self._deliver(self._remote.send(event))
            self._wake.set()

    def append(self, pcm: bytes, now: float) -> None:
        """See Backend."""
        if not self._closed:
            told = self._remote.append(pcm)
            if told:
                self._deliver(told)
            self._wake.set()

    def tick(self, now: float) -> None:
        """See Backend. The server has a clock of its own; here the books are kept."""
        garbled, dropped = self._remote.garbled, self._remote.dropped_octets
        values = self._uplinks.counters.values
        values[Count.BACKEND_GARBLED] += garbled - self._counted[0]
        values[Count.BACKEND_AUDIO_DROPPED] += dropped - self._counted[1]
        self._counted = garbled, dropped

    def close(self) -> None:
        """See Backend. The connection's own goodbye goes on in the background."""
        if not self._closed:
            self.tick(0.0)
            self._closed = True
            self._to_emit.clear()
            self._task.cancel()
        # They know the session, which knows this: it is freed now, and not by the collector.
        self._emit, self._lost = _ignore, _ignore

    # --- the life of a session ---------------------------------------------------------------

    async def _run(self) -> None:
        try:
            why = await self._keep()
        except asyncio.CancelledError:
            if not self._closed:
                raise
            # As asked. Let out, it would hold on to all frames of this task, and they to this.
            return
        except Exception:
            log.exception("%s met a fault", self)
            why = "met a fault of ours"
        if not self._closed:
            self.tick(0.0)
            self._closed = True
            log.warning("%s is given up: the server %s", self, why)
            self._lost(f"The model server {why}.")

    async def _keep(self) -> str:
        """Have a connection as long as one is to be had. Returns why there is none any more."""
        clock, values = self._uplinks.clock, self._uplinks.counters.values
        failures = 0
        away_since: float | None = None
        while True:
            opened_at = clock()
            why, final = await self._connection()
            now = clock()
            was_ready = self._ready_at is not None
            values[Count.BACKEND_CONNECT_FAILED] += not was_ready
            if away_since is None or (was_ready and now - opened_at >= STABLE_S):
                failures, away_since = 0, now if was_ready else opened_at
            final |= now - away_since >= self._target.table.retry_s
            self._deliver(self._remote.disconnected(why, final))
            if final:
                return why
            log.info("%s is away: the server %s", self, why)
            wait = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            failures += 1
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _connection(self) -> tuple[str, bool]:
        """One connection from its opening to its end. Why it ended, and whether that is final."""
        table, target = self._target.table, self._target
        self._ready_at = None
        self._opened_at = self._uplinks.clock()
        try:
            async with asyncio.timeout(table.connect_timeout_s):
                line = await self._uplinks.http.ws_connect(
                    target.url,
                    params=target.query,
                    headers=target.headers,
                    protocols=(SUBPROTOCOL,),
                    ssl=target.trust,
                    heartbeat=table.heartbeat_s,
                    max_msg_size=table.message_octets_max,
                    decode_text=False,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )
        except aiohttp.WSServerHandshakeError as error:
            final = 400 <= error.status < 500 and error.status not in (408, 425, 429)
            return f"refused the connection with status {error.status}", final
        except TimeoutError:
            return "did not answer in time", False
        except (aiohttp.ClientError, OSError) as error:
            log.info("%s cannot connect: %s", self, error)
            return "cannot be reached", False
        writing = asyncio.get_running_loop().create_task(self._write(line))
        try:
            return await self._read(line), False
        finally:
            writing.cancel()
            self._uplinks.part(line)
            await asyncio.gather(writing, return_exceptions=True)

    async def _read(self, line: "aiohttp.ClientWebSocketResponse[bool]") -> str:
        """Take what comes until the connection ends, and say why it did."""
        remote, answer_s = self._remote, self._target.table.answer_timeout_s
        remote.connected()
        why = ""
        try:
            async with asyncio.timeout(answer_s):
                while remote.stage is Stage.GREETING and not why:
                    why = await self._take(line)
        except TimeoutError:
            return "said nothing"
        self._wake.set()
        try:
            async with asyncio.timeout(min(SETTLE_S, answer_s)):
                while remote.stage is Stage.SETTLING and not why:
                    why = await self._take(line)
        except TimeoutError:
            self._deliver(remote.settle())
        if not why:
            self._ready_at = self._uplinks.clock()
            took_s = self._ready_at - self._opened_at
            self._uplinks.timings.observe(Timing.BACKEND_CONNECT, took_s)
            self._uplinks.counters.values[Count.BACKEND_RECONNECTS] += self._once_ready
            self._once_ready = True
            log.info("%s is connected", self)
        while not why:
            why = await self._take(line)
        return why

    async def _take(self, line: "aiohttp.ClientWebSocketResponse[bool]") -> str:
        """One message, and what it leads to. Why the connection has to end, or nothing."""
        message = await line.receive()
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            weight = 1 / BATCH_DELTAS
            for piece, event in enumerate(self._remote.received(message.data)):
                if piece:
                    await asyncio.sleep(0)
                if event["type"] != "response.output_audio.delta":
                    weight = 1 / BATCH_EVENTS
                self._deliver([event])
            if self._remote.stage is Stage.SETTLING or self._remote.broken:
                self._wake.set()
            await self._pace(max(weight, len(message.data) / BATCH_OCTETS))
            return self._remote.broken
        log.info("%s ends with code %s: %r", self, line.close_code, line.exception())
        if isinstance(line.exception(), aiohttp.ServerTimeoutError):
            return "does not answer any more"
        if line.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            return "sent a message that is too large"
        if message.type is WSMsgType.ERROR:
            return "does not speak WebSocket"
        return "closed the connection"

    async def _pace(self, weight: float) -> None:
        """Wait, if a batch has come sooner than it may. `weight` is part of one, or several."""
        begun, load = self._batch
        load += weight
        now = self._uplinks.clock()
        if now - begun >= max(1.0, load) * BATCH_S:
            self._batch = now, 0.0
        elif load < 1.0:
            self._batch = begun, load
        else:
            await asyncio.sleep(min(load, PAUSES_MAX) * BATCH_S - (now - begun))
            self._batch = self._uplinks.clock(), 0.0

    async def _write(self, line: "aiohttp.ClientWebSocketResponse[bool]") -> None:
        """Send what there is to be sent, as it comes. Ends with the connection."""
        remote, wake = self._remote, self._wake
        try:
            while True:
                message = remote.next_message()
                if message is None:
                    wake.clear()
                    await wake.wait()
                else:
                    await line.send_frame(message, WSMsgType.TEXT)
        except (aiohttp.ClientError, ConnectionError):
            pass  # whoever reads notices, too
        except Exception:
            log.exception("%s cannot write", self)
            await line.close()

    def _deliver(self, events: list[Event]) -> None:
        """Emit in order. If `emit` itself calls `send`, the outer loop goes on with what comes."""
        self._to_emit.extend(events)
        if self._emitting:
            return
        self._emitting = True
        try:
            while self._to_emit and not self._closed:
                self._emit(self._to_emit.popleft())
        finally:
            self._emitting = False

    def __str__(self) -> str:
        return f"uplink {self._name}"


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that holds little of what a server has not taken."""
    family, kind, protocol, _, _ = address
    found = socket.socket(family=family, type=kind, proto=protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_OCTETS)
    return found
