"""Sideband: a WebSocket by which a server of the application's follows a call and takes part in it.

    GET /v1/realtime?call_id=rtc_…      WebSocket; the same events as on the data channel

        application ── WebSocket ── signaling ── WebSocket ── the call's transceiver

What it owns: the way of messages between the two connections, and the end of both.

Rules that stay true:
- Whatever is wrong is said before the upgrade, as an error body: a page's WebSocket learns of none,
  but servers do, and people with curl.
- The key is admitted like any other, an ephemeral one too, in a header or a subprotocol. A call is
  attended under the key that opened it, or by an ephemeral key of that one.
- Messages pass as they are, one at a time: nothing is kept between the two connections but what
  the kernel and aiohttp hold. Who takes none for seconds is let go.
- Who is left hears why: the transceiver's close code and reason are handed on.

It knows nothing of events (attendants.py does), and any instance will do.

https://developers.openai.com/api/docs/guides/realtime-server-controls
RFC 6455 https://www.rfc-editor.org/rfc/rfc6455
"""

import asyncio
import contextlib
from typing import TypeAlias

import aiohttp
from aiohttp import WSMsgType, web

import attendance
from attendants import TOO_SLOW, TOO_SLOW_REASON
from door import Door
from intake import Refusal

PATH = "/v1/realtime"

PROTOCOL = "realtime"
"""The only subprotocol that is ever answered: those beside it carry a key."""

GONE, LOST = 1001, 1011
"""Close codes (RFC 6455 section 7.4.1): this process stops; the transceiver is away."""

Socket: TypeAlias = "web.WebSocketResponse | aiohttp.ClientWebSocketResponse"
End: TypeAlias = tuple[int, bytes]
"""A close code and a reason."""


def routes(door: Door) -> list[web.RouteDef]:
    """The handlers of this API."""

    async def attend(request: web.Request) -> web.StreamResponse:
        caller = await door.admit(request)
        call_id = request.query.get("call_id")
        if not call_id:
            message = (
                "Name a call by call_id. Its audio comes by WebRTC, from POST /v1/realtime/calls:"
                " there is no conversation by WebSocket alone here."
            )
            raise Refusal(400, message, code="missing_required_parameter", param="call_id")
        socket = web.WebSocketResponse(
            protocols=(PROTOCOL,),
            heartbeat=attendance.HEARTBEAT_S,
            timeout=attendance.CLOSE_S,
            compress=False,
            max_msg_size=attendance.MESSAGE_OCTETS_MAX,
        )
        if not socket.can_prepare(request):
            message = "A sideband is a WebSocket: this request asks for no upgrade to one."
            upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
            raise Refusal(426, message, code="upgrade_required", headers=upgrade)
        owner = await door.attend(call_id, caller)
        try:
            await socket.prepare(request)
            code, reason = await _between(socket, owner, door.stopping)
            await attendance.part(request, socket, code, reason)
        finally:
            attendance.cut(request)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * attendance.CLOSE_S):
                    await owner.close()
        return socket

    return [web.get(PATH, attend, allow_head=False)]


async def _between(
    socket: web.WebSocketResponse, owner: aiohttp.ClientWebSocketResponse, stopping: asyncio.Event
) -> End:
    """Hand messages on both ways until one of the two ends; what the application is told then."""
    down = asyncio.create_task(_hand_on(owner, socket))
    up = asyncio.create_task(_hand_on(socket, owner))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((down, up, stop), return_when=asyncio.FIRST_COMPLETED)
        if down.done():
            return down.result()
        if up.done():
            return up.result()
        return GONE, b"This instance is being stopped: another one takes you."
    finally:
        for task in (down, up, stop):
            task.cancel()
        await asyncio.wait((down, up, stop))


async def _hand_on(source: Socket, sink: Socket) -> End:
    """Messages of one side to the other, until the one ends or the other takes no more."""
    try:
        while True:
            message = await source.receive()
            if message.type is WSMsgType.TEXT:
                await attendance.sent(sink.send_str(message.data))
            elif message.type is WSMsgType.BINARY:
                await attendance.sent(sink.send_bytes(message.data))
            elif message.type is WSMsgType.CLOSE:
                return _sendable(message.data), (message.extra or "").encode()
            else:
                return LOST, b"The transceiver of this call is away."
    except TimeoutError:
        return TOO_SLOW, TOO_SLOW_REASON.encode()
    except ConnectionError:
        return LOST, b"The transceiver of this call is away."


def _sendable(code: int | None) -> int:
    """A close code that may stand in a frame: 1005 and 1006 say that there was none."""
    return code if code and (1000 <= code <= 1014) and code not in (1004, 1005, 1006) else 1000
