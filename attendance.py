"""Attendance: the connection of one attendant (attendants.py), a WebSocket of the control API.

    signaling ── WebSocket GET /v1/sessions/{call_id}/events ── attendance ── session

Text both ways, one event of the Realtime API a message, as on the data channel.

What it owns: the WebSocket from its request to its end, the task that writes to it, and how much
of this process's time its events may take.

Rules that stay true:
- An event is handled before the next one is read, and what that took is given to the other calls
  SHARE times over: no sideband can take more than its part of the process.
- It ends with the call, and says why. It ends without the call if it reads too slowly or has gone.
- A call is left as it is when its attendants go.

https://developers.openai.com/api/docs/guides/realtime-server-controls
RFC 6455 https://www.rfc-editor.org/rfc/rfc6455
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from aiohttp import WSMsgType, web

import ledger
import metrics
from attendants import TOO_SLOW, TOO_SLOW_REASON, Attendant

HEARTBEAT_S = 20.0
"""A ping so often: an attendant whose machine has gone is noticed, and proxies in between see that
the connection is used. They give up after a minute."""

MESSAGE_OCTETS_MAX = 1 << 20
"""Of what is read at all; larger ones end the connection (close code 1009). What is larger than the
conversation takes, but not that large, gets an `error` like any other event."""

SHARE = 9
"""An attendant has a tenth of the process's time: an event of 100 us costs it a wait of 1 ms."""

SLOW_S = 5.0
"""How long one message may take to leave. A network that takes longer has a worse trouble."""

CLOSE_S = 2.0
"""How long an attendant may take to say goodbye. It is on this side of the relay: a round trip."""

REASON_OCTETS_MAX = 123
"""A control frame has room for so many, besides the code (RFC 6455 section 5.5)."""


Count = metrics.Transceiver


class Attended(Protocol):
    """A call, as far as this needs it."""

    def attend(self, attendant: Attendant) -> None:
        """Tell it of all that happens from now on. Raises attendants.Crowded."""

    def unattend(self, attendant: Attendant) -> None:
        """It has gone."""


Hear = Callable[[str | bytes, Attendant], None]
"""Takes an event of an attendant's, and raises nothing."""


async def serve(
    request: web.Request, call: Attended, hear: Hear, counters: ledger.Counters
) -> web.StreamResponse:
    """Let whoever asks attend the call, until one of them has gone. Raises attendants.Crowded."""
    news = asyncio.Event()
    attendant = Attendant(news.set)
    # Text of some hundred octets: to compress it would cost more than to send it.
    socket = web.WebSocketResponse(
        heartbeat=HEARTBEAT_S, timeout=CLOSE_S, compress=False, max_msg_size=MESSAGE_OCTETS_MAX
    )
    call.attend(attendant)
    counters.values[Count.SIDEBANDS] += 1
    try:
        await socket.prepare(request)
        writing = asyncio.create_task(_write(request, socket, attendant, news))
        try:
            await _read(socket, attendant, hear)
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await writing
            cut(request)
    finally:
        call.unattend(attendant)
        counters.values[Count.SIDEBANDS] -= 1
        if attendant.over is not None and attendant.over[0] == TOO_SLOW:
            counters.values[Count.SIDEBANDS_DROPPED] += 1
    return socket


async def _read(socket: web.WebSocketResponse, attendant: Attendant, hear: Hear) -> None:
    """Hand on what the attendant says until its connection ends."""
    async for message in socket:
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            started = time.monotonic()
            hear(message.data, attendant)
            await asyncio.sleep(SHARE * (time.monotonic() - started))


async def _write(
    request: web.Request, socket: web.WebSocketResponse, attendant: Attendant, news: asyncio.Event
) -> None:
    """Send what there is for the attendant, and at the end the reason."""
    while attendant.over is None:
        await news.wait()
        news.clear()
        try:
            for message in attendant.take():
                await sent(socket.send_str(message))
        except TimeoutError:
            attendant.end(TOO_SLOW, TOO_SLOW_REASON)
    code, reason = attendant.over
    await part(request, socket, code, reason.encode())


async def sent(sending: Coroutine[Any, Any, None]) -> None:
    """Wait for a message to leave. Raises TimeoutError if that takes SLOW_S.

    It is not cancelled then, nor ever: aiohttp waits for a full socket by one future for all, and
    with that the goodbye would be cancelled, too. It ends with the connection.
    """
    task = asyncio.create_task(sending)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    done, _ = await asyncio.wait((task,), timeout=SLOW_S)
    if not done:
        raise TimeoutError
    task.result()


async def part(
    request: web.Request, socket: web.WebSocketResponse, code: int, reason: bytes
) -> None:
    """Say goodbye. Who does not take even that is cut off, or the kernel would wait for ever."""
    try:
        async with asyncio.timeout(2 * CLOSE_S):
            await socket.close(code=code, message=reason[:REASON_OCTETS_MAX], drain=False)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        cut(request)


def cut(request: web.Request) -> None:
    """End a connection whose other end does not take what is left for it."""
    transport = request.transport
    if not isinstance(transport, asyncio.WriteTransport):
        return
    try:
        left = transport.get_write_buffer_size()
    except AttributeError:
        # TLS that was closed twice, as aiohttp does: asyncio's transport has let go of its
        # connection then, which has a deadline of its own (listener.SHUTDOWN_S).
        return
    if left:
        transport.abort()
