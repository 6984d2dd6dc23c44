"""Calls: OpenAI's Realtime API over HTTP, as its clients speak it.

    POST   /v1/realtime/calls               201, the answer, and the call in Location; ?resume= has
                                            the id of the call whose conversation goes on in it
    POST   /v1/realtime/calls/{id}/hangup   200 once the call has ended
    POST   /v1/realtime/client_secrets      200, an ephemeral key for a page, with a session inside
    GET    /v1/realtime/calls/{id}          200 {"id", "status"}
    DELETE /v1/realtime/calls/{id}          the same as hangup

What it owns: these paths, the bodies and headers of their answers, and what a session is that
nobody has opened yet. The last two paths are ours.

Rules that stay true:
- A call's id is the last segment of Location: clients take it from there.
- Nothing is kept about a call: its id leads any instance to its owner (placement.py). Nor about an
  ephemeral key: whatever it stands for is in it (keys.py).
- What comes with a call overrides the ephemeral key's session field by field.
- A session is looked at before it is sealed into a key: whoever asks for the key is a program of
  the operator's, and can mend it; the page that uses it later cannot.

https://developers.openai.com/api/reference/resources/realtime/subresources/calls
https://developers.openai.com/api/reference/resources/realtime/subresources/client_secrets
"""

import secrets
from typing import Any

from aiohttp import web

import floor
import metrics
import realtime
import ufrag
from door import MODEL_CHARACTERS_MAX, Door
from intake import Refusal, read_object, read_offer
from placement import Order

API = "/v1/realtime"
PATH = API + "/calls"

SECONDS_MIN, SECONDS_DEFAULT, SECONDS_MAX = 10, 600, 7_200
"""How long an ephemeral key lasts, as in the API."""

MODEL = "default"
"""The model of a session that names none, until a transceiver knows better. No other name would do:
which one the transceivers' default is, signaling does not know."""

RATE_HZ = 24_000
"""Of the audio formats in a session that is shown here, as in the API."""


def routes(door: Door) -> list[web.RouteDef]:
    """The handlers of this API."""

    async def create(request: web.Request) -> web.Response:
        with door.offered():
            caller = await door.admit(request)
            offer, session = await read_offer(request, door.offer_octets_max)
            if session and caller.session:
                session = realtime.merged(caller.session, session)
            model = request.query.get("model", "")[:MODEL_CHARACTERS_MAX] or None
            order = Order(
                offer, session or caller.session, model, key=caller.key, resume=_resumed(request)
            )
            placed = await door.place(request, order)
        return web.Response(
            status=201,
            text=placed.answer,
            content_type="application/sdp",
            headers={"Location": f"{PATH}/{placed.call_id}"},
        )

    async def hang_up(request: web.Request) -> web.Response:
        caller = await door.admit(request)
        await door.ask(request.match_info["id"], "DELETE", caller=caller)
        door.counters.values[metrics.Signaling.HUNG_UP] += 1
        return web.json_response({})

    async def show(request: web.Request) -> web.Response:
        caller = await door.admit(request)
        call_id = request.match_info["id"]
        _, found = await door.ask(call_id, "GET", caller=caller)
        return web.json_response({"id": call_id, "status": found["state"]})

    async def mint(request: web.Request) -> web.Response:
        caller = await door.admit(request)
        wanted = await read_object(request, door.offer_octets_max)
        session, seconds = _read_secret(wanted)
        shown = effective(session or {})
        value, expires_at = door.mint(caller, session, seconds)
        return web.json_response({"value": value, "expires_at": expires_at, "session": shown})

    async def no_telephone(request: web.Request) -> web.Response:
        await door.admit(request)
        message = "Calls come by WebRTC here and not from a telephone: there is no SIP."
        raise Refusal(501, message, code="not_implemented")

    return [
        web.post(PATH, create),
        web.get(PATH + "/{id}", show, allow_head=False),
        web.delete(PATH + "/{id}", hang_up),
        web.post(PATH + "/{id}/hangup", hang_up),
        web.post(PATH + "/{id}/{verb:accept|reject|refer}", no_telephone),
        web.post(API + "/client_secrets", mint),
    ]


def _resumed(request: web.Request) -> str | None:
    """The call that a new one goes on with. Whether there is such a call is not told by refusing:
    its transceiver may have died, and a new conversation is better than none."""
    call_id = request.query.get("resume")
    if call_id is not None and ufrag.from_call_id(call_id) is None:
        raise _refused("Expected the id of a call, as Location had it.", "resume")
    return call_id


# --- ephemeral keys -----------------------------------------------------------------------------


def effective(session: dict[str, Any]) -> dict[str, Any]:
    """The session that a call with this one begins with. Raises Refusal naming the field.

    Only as far as it can be known without the model server, which may refuse more.
    """
    model = session.get("model", MODEL)
    if not isinstance(model, str):
        raise _refused("The name of a model is a string.", "session.model")
    whole = realtime.session(f"sess_{secrets.token_hex(8)}", model, RATE_HZ)
    terms = floor.Terms(_without_formats(session))
    try:
        if terms.refused is not None:
            raise terms.refused
        offered, unknown = _of_the_servers(terms.offered or {})
        shown, detection = realtime.configured(whole, offered)
    except realtime.Refused as refused:
        raise _refused(refused.message, refused.param) from None
    if detection is not None:
        shown["audio"]["input"]["turn_detection"] |= unknown
    return terms.shown(shown, created=True)


def _read_secret(wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, int]:
    """The session and the lifetime that a request for an ephemeral key names."""
    for name in wanted.keys() - {"session", "expires_after"}:
        raise _refused("There is no such parameter.", name[:80])
    session, after = wanted.get("session"), wanted.get("expires_after")
    if not (session is None or isinstance(session, dict)):
        raise _refused("Expected a session object.", "session")
    if after is None:
        return session, SECONDS_DEFAULT
    if not isinstance(after, dict):
        raise _refused("Expected an object with anchor and seconds.", "expires_after")
    if after.get("anchor", "created_at") != "created_at":
        raise _refused("The anchor is created_at.", "expires_after.anchor")
    seconds = after.get("seconds", SECONDS_DEFAULT)
    whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if not (whole and SECONDS_MIN <= seconds <= SECONDS_MAX):
        wrong = f"Expected an integer from {SECONDS_MIN} to {SECONDS_MAX}."
        raise _refused(wrong, "expires_after.seconds")
    return session, seconds


def _without_formats(session: dict[str, Any]) -> dict[str, Any]:
    """The session without audio formats: the two ends of the audio agree upon them, not this."""
    audio = session.get("audio")
    if not isinstance(audio, dict):
        return session
    ways = {
        way: {name: value for name, value in side.items() if name != "format"}
        if isinstance(side, dict)
        else side
        for way, side in audio.items()
    }
    return session | {"audio": ways}


def _of_the_servers(session: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The session without fields of turn detection that only a model server may know; and those."""
    audio = session.get("audio")
    heard = audio.get("input") if isinstance(audio, dict) else None
    detection = heard.get("turn_detection") if isinstance(heard, dict) else None
    kinds = {"server_vad": realtime.ServerVad, "semantic_vad": realtime.SemanticVad}
    if not (isinstance(audio, dict) and isinstance(heard, dict) and isinstance(detection, dict)):
        return session, {}
    kind = kinds.get(str(detection.get("type", "server_vad")))
    if kind is None:
        return session, {}
    known = {"type", *kind.__struct_fields__}
    unknown = {name: value for name, value in detection.items() if name not in known}
    plain = {name: value for name, value in detection.items() if name in known}
    return session | {"audio": audio | {"input": heard | {"turn_detection": plain}}}, unknown


def _refused(message: str, param: str | None) -> Refusal:
    return Refusal(400, message, code="invalid_value", param=param)
