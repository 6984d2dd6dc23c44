"""Pipecat: the way in for clients with its small WebRTC transport.

    POST  /api/offer      200 {"sdp", "type": "answer", "pc_id"}: a call, or another offer of one
    PATCH /api/offer      200 {"status": "success"}: candidates
    POST  /start          200 {"sessionId", "iceConfig"}: what to offer with, for clients that ask
    POST, PATCH /sessions/{sessionId}/api/offer   the same as above, with what /start was told

What it owns: these paths and bodies. What is then said on the data channel is rtvi.py's.

Rules that stay true:
- `pc_id` is the call's id. With `restart_pc` the client has made a new connection: a new call is
  placed, in which the conversation of that one goes on; its id is in the answer. Without, it is
  another offer on the connection that there is, and goes to the call's owner.
- Nothing is kept between /start and the offer: the `sessionId` holds it, sealed.
- Candidates are read, and of no further use: a client is found by its first check.
- A client gives up at once if an offer is refused with 4xx, and tries three times more after 5xx:
  so a refusal says which of both makes sense.

The data that an application gives its client to send (`requestData`, also `request_data`, and in
/start `body`) may hold `session`, settings as the Realtime API has them, and `model`. The rest is
for bots that are made otherwise, and left alone.

https://docs.pipecat.ai/server/services/transport/small-webrtc, and where it differs
`@pipecat-ai/small-webrtc-transport` 1.10.
"""

import base64
import binascii
import secrets
from typing import Any

import orjson
from aiohttp import web

import realtime
import sealing
import settings
from door import MODEL_CHARACTERS_MAX, Caller, Door
from intake import Refusal, offer_text, read_object, session_object
from placement import Order

OFFER = "/api/offer"
START = "/start"

PC_ID_CHARACTERS_MAX = 128
"""Of a pc_id: ours have 43. Pipecat's own have 50, and are nobody's here."""

CANDIDATES_MAX = 64
"""Candidates in one PATCH. A machine with many networks has twenty."""

PATCH_OCTETS_MAX = 65_536
"""Of one PATCH: 64 candidates of two hundred characters, three times over."""

DATA_OCTETS_MAX = 4_096
"""Of what /start is told to be kept in a `sessionId`, which becomes a part of a URL: servers take
8,190 octets. More has its place in the offer's `requestData`."""


SETTINGS: dict[str, Any] = {
    "audio": {"input": {"transcription": {"model": "gpt-4o-mini-transcribe"}}}
}
"""What is set unless the application says otherwise: its pages expect to be told what the user has
said. The model is the one that OpenAI's own SDK asks for, so that model servers are used to it."""


def routes(door: Door) -> list[web.RouteDef]:
    """The handlers of this API."""
    handlers = _Handlers(door)
    session = "/sessions/{session_id}" + OFFER
    return [
        web.post(OFFER, handlers.offer),
        web.patch(OFFER, handlers.candidates),
        web.post(START, handlers.start),
        web.post(session, handlers.offer),
        web.patch(session, handlers.candidates),
    ]


class _Handlers:
    """One method a request."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._servers = [_server(each) for each in door.config.ice_server]

    @property
    def _sealer(self) -> sealing.Sealer:
        return sealing.Sealer(self._door.placement.keyring, b"pipecat session")

    async def offer(self, request: web.Request) -> web.Response:
        """Take a call, go on with one in another, or answer one once more."""
        with self._door.offered():
            caller = await self._door.admit(request)
            found = await _read(request, self._door.offer_octets_max)
            sdp, pc_id = offer_text(found.get("sdp")), _pc_id(found)
            if found.get("type", "offer") != "offer":
                raise _invalid("The type is not offer: this is where calls begin.", "type")
            session, model = self._wanted(request, found)
            if pc_id is not None and found.get("restart_pc") is not True:
                return await self._again(request, pc_id, sdp, caller)
            whole = SETTINGS
            for more in (caller.session, session):  # what came with the offer is nearest
                whole = realtime.merged(whole, more or {})
            order = Order(
                sdp,
                whole,
                model,
                caller.key,
                dialect="rtvi",
                resume=pc_id,
            )
            placed = await self._door.place(request, order)
        return _answer(placed.answer, placed.call_id)

    def _wanted(
        self, request: web.Request, found: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Settings and model: what came with the offer, or what /start was told."""
        data = found.get("request_data") or found.get("requestData")
        session_id = request.match_info.get("session_id")
        kept = None if session_id is None else self._opened(session_id)
        return _data(data if isinstance(data, dict) else kept)

    async def _again(
        self, request: web.Request, pc_id: str, sdp: str, caller: Caller
    ) -> web.Response:
        """Answer another offer on the connection that there is."""
        body = {"offer": sdp, "candidates": self._door.way(request).relays}
        status, found = await self._door.ask(pc_id, "POST", "/offer", body, caller)
        if status != 200:
            wrong = found["error"]
            raise Refusal(status, wrong["message"], code=wrong["code"], param="sdp")
        return _answer(found["answer"], pc_id)

    async def candidates(self, request: web.Request) -> web.Response:
        """Trickled candidates: there is nothing to be done with them, but the call must exist."""
        caller = await self._door.admit(request)
        found = await _read(request, PATCH_OCTETS_MAX)
        pc_id, listed = _pc_id(found), found.get("candidates")
        if pc_id is None:
            raise _invalid("There is no pc_id: which call are these candidates of?", "pc_id")
        if not isinstance(listed, list) or len(listed) > CANDIDATES_MAX:
            raise _invalid(f"candidates is no list of at most {CANDIDATES_MAX}.", "candidates")
        for each in listed:
            if not (isinstance(each, dict) and isinstance(each.get("candidate"), str)):
                raise _invalid("Each of candidates has a candidate, as text.", "candidates")
        await self._door.ask(pc_id, "GET", caller=caller)
        return web.json_response({"status": "success"})

    async def start(self, request: web.Request) -> web.Response:
        """Say where to send the offer, and by which STUN and TURN servers to come."""
        await self._door.admit(request)
        found = await _read(request, self._door.offer_octets_max)
        if found.get("transport", "webrtc") != "webrtc":
            raise _invalid("There is one transport here: webrtc.", "transport")
        session, model = _data(found.get("body"))
        data = orjson.dumps({"session": session, "model": model})
        if len(data) > DATA_OCTETS_MAX:
            wrong = f"body has more than {DATA_OCTETS_MAX} octets: send it with the offer."
            raise _invalid(wrong, "body")
        sealed = self._sealer.seal(data, secrets.token_bytes(sealing.SALT_OCTETS))
        answer: dict[str, Any] = {"sessionId": base64.urlsafe_b64encode(sealed).decode()}
        if self._servers:
            answer["iceConfig"] = {"iceServers": self._servers}
        return web.json_response(answer)

    def _opened(self, session_id: str) -> dict[str, Any]:
        """What /start was told. Raises Refusal: 404 for an id that is none of ours."""
        try:
            sealed = self._sealer.open(base64.b64decode(session_id, b"-_", validate=True))
        except (binascii.Error, ValueError):
            sealed = None
        if sealed is None:
            raise Refusal(
                404, "There is no such session.", code="session_not_found", param="session_id"
            )
        found: dict[str, Any] = orjson.loads(sealed)
        return found


async def _read(request: web.Request, octets_max: int) -> dict[str, Any]:
    """A request's JSON. Raises Refusal: 400, 408, 413 or 415."""
    if request.content_type != "application/json":
        raise Refusal(415, "Send JSON as application/json.", code="unsupported_media_type")
    return await read_object(request, octets_max)


def _pc_id(found: dict[str, Any]) -> str | None:
    """The call that a request is about. Raises Refusal."""
    pc_id = found.get("pc_id")
    if pc_id is None or pc_id == "":
        return None
    if isinstance(pc_id, str) and len(pc_id) <= PC_ID_CHARACTERS_MAX and pc_id.isprintable():
        return pc_id
    raise _invalid("pc_id is no id of a call.", "pc_id")


def _data(data: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Settings and model in an application's own data. Raises Refusal."""
    if not isinstance(data, dict):
        return None, None
    model = data.get("model")
    named = model[:MODEL_CHARACTERS_MAX] if isinstance(model, str) else None
    return session_object(data.get("session")), named


def _answer(sdp: str, pc_id: str) -> web.Response:
    return web.json_response({"sdp": sdp, "type": "answer", "pc_id": pc_id})


def _invalid(message: str, param: str) -> Refusal:
    return Refusal(400, message, code="invalid_request", param=param)


def _server(server: settings.IceServer) -> dict[str, str]:
    """A STUN or TURN server as browsers take it."""
    found = {"urls": server.url}
    if server.username is not None and server.credential is not None:
        found |= {"username": server.username, "credential": server.credential}
    return found
