"""OpenAPI: what signaling's HTTP API is, as a document that programs read.

    GET /openapi.json    200, this document (OpenAPI 3.1)

What it owns: the description of every path, of what may be sent there and of what comes back. What
is said here of limits is taken from the modules that hold them.

Rules that stay true:
- Every path that is served is described, and nothing else: a test compares the two.
- Each answer that a path can give is named with its body. Tests ask a running server all that this
  allows, and much that it does not (schemathesis).
- It is the same for every instance and every caller: it tells nothing of settings.

Nothing here serves or checks anything: handlers do, by themselves.

https://spec.openapis.org/oas/v3.1.0
"""

from typing import Any

import calls
import pipecat
import sdpfrag
import sideband
import whip

PATH = "/openapi.json"

SDP = "application/sdp"
JSON = "application/json"

Object = dict[str, Any]

_STATUS = {
    "400": "What is wrong with the request, and which part of it.",
    "401": "No key, or none of ours. So also 403, where a key may not do this.",
    "403": "This key may not do this.",
    "404": "There is no such call, or it has ended; or there is nothing at this path.",
    "408": "The request's body came too slowly.",
    "412": "If-Match names another ICE session than the one that there is now.",
    "413": "The request is too large.",
    "415": "The request's Content-Type is none that is read here.",
    "426": "This is where WebSockets begin: the request asks for none.",
    "428": "If-Match is missing.",
    "429": "Too many requests or calls of this key, or of this address.",
    "500": "A fault of ours: the call goes on as it was.",
    "501": "There is no SIP here.",
    "503": "No transceiver takes the call, or the call's does not answer.",
}
"""What errors mean."""

_RETRIED = ("429", "503")
"""Statuses that come with Retry-After."""

_ADMISSION = ("401", "403", "429")
"""How any request can end that needs a key."""

_ASKED = (*_ADMISSION, "404", "503")
"""How any request about a call can end."""

EXAMPLE_OFFER = "\r\n".join(
    (
        *("v=0", "o=- 1 2 IN IP4 127.0.0.1", "s=-", "t=0 0", "a=group:BUNDLE 0"),
        *("m=audio 9 UDP/TLS/RTP/SAVPF 111", "c=IN IP4 0.0.0.0", "a=mid:0", "a=sendrecv"),
        *("a=rtcp-mux", "a=rtpmap:111 opus/48000/2", "a=setup:actpass", "a=ice-ufrag:abcd"),
        "a=ice-pwd:0123456789abcdefghijkl",
        "a=fingerprint:sha-256 " + ":".join(["AB"] * 32),
        "",
    )
)
"""The least that a browser would offer."""


def document() -> Object:
    """The whole document, as JSON has it."""
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Earshot signaling",
            "version": "1",
            "summary": "Offers in, answers out: voice AI over WebRTC.",
            "description": (
                "OpenAI's Realtime calls, WHIP (RFC 9725) and Pipecat's small WebRTC transport,"
                " before one kind of call. Without API keys (development) no key is asked for."
            ),
        },
        "security": [{"key": []}, {}],
        "paths": {**_realtime(), **_whip(), **_pipecat(), **_operation()},
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (sk_…) or an ephemeral one (ek_…).",
                }
            },
            "schemas": {"Error": _error(), "Session": _session(), "Candidate": _candidate()},
            "headers": {
                "RequestId": {
                    "description": "Names this request in the logs of all programs.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^[0-9a-f]{8}$"},
                },
                "RetryAfter": {
                    "description": "Seconds after which another try makes sense.",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 1},
                },
            },
        },
    }


# --- the paths ----------------------------------------------------------------------------------


def _realtime() -> dict[str, Object]:
    call_id = _parameter("id", "path", {"type": "string", "minLength": 1})
    ended = {"200": _answer("The call has ended.", JSON, {"type": "object"})}
    shown = _object(id=_TEXT, status={"enum": ["offered", "connecting", "live", "closed"]})
    verb = _parameter("verb", "path", {"enum": ["accept", "reject", "refer"]})
    return {
        calls.PATH: {
            "post": _described(
                "createCall",
                "Begin a call: an offer in, the answer out.",
                {"201": _created("The answer.", "Location")},
                (*_ADMISSION, "400", "408", "413", "415", "503"),
                parameters=[
                    _parameter("model", "query", _TEXT, "Which model answers."),
                    _parameter(
                        "resume",
                        "query",
                        {"type": "string", "pattern": _CALL_ID},
                        "Id of the call whose conversation goes on in this one.",
                    ),
                ],
                requestBody=_bodies(
                    {
                        SDP: _OFFER,
                        "multipart/form-data": _object(["sdp"], sdp=_OFFER, session=_SESSION),
                        JSON: _object(
                            ["sdp"], sdp=_OFFER, session={"anyOf": [_SESSION, {"type": "null"}]}
                        ),
                    }
                ),
            )
        },
        calls.PATH + "/{id}": {
            "parameters": [call_id],
            "get": _described(
                "showCall", "How a call is.", {"200": _answer("Its state.", JSON, shown)}, _ASKED
            ),
            "delete": _described("deleteCall", "End a call.", ended, _ASKED),
        },
        calls.PATH + "/{id}/hangup": {
            "parameters": [call_id],
            "post": _described("hangUpCall", "End a call.", ended, _ASKED),
        },
        calls.PATH + "/{id}/{verb}": {
            "parameters": [call_id, verb],
            "post": _described(
                "telephone", "Calls by telephone: there are none here.", {}, (*_ASKED, "501")
            ),
        },
        calls.API + "/client_secrets": {"post": _client_secret()},
        sideband.PATH: {
            "get": _described(
                "attendCall",
                "A WebSocket with the events of a call, for a server of the application's.",
                {"101": {"description": "The WebSocket."}},
                (*_ASKED, "400", "426"),
                parameters=[_parameter("call_id", "query", _TEXT, "The call.", required=True)],
            )
        },
    }


def _client_secret() -> Object:
    seconds = {
        "type": "integer",
        "minimum": calls.SECONDS_MIN,
        "maximum": calls.SECONDS_MAX,
        "default": calls.SECONDS_DEFAULT,
    }
    after = _object(anchor={"const": "created_at"}, seconds=seconds)
    wanted = _object(
        expires_after={"anyOf": [after, {"type": "null"}]},
        session={"anyOf": [_SESSION, {"type": "null"}]},
    )
    return _described(
        "createClientSecret",
        "An ephemeral key for a page, with its session inside.",
        {
            "200": _answer(
                "The key.",
                JSON,
                _object(
                    ["value", "expires_at", "session"],
                    value={"type": "string", "pattern": "^ek_"},
                    expires_at={"type": "integer", "description": "Seconds since 1970."},
                    session=_SESSION,
                ),
            )
        },
        (*_ADMISSION, "400", "408", "413"),
        requestBody=_bodies({JSON: wanted | {"additionalProperties": False}}, required=False),
    )


def _whip() -> dict[str, Object]:
    call_id = _parameter("call_id", "path", {"type": "string", "minLength": 1})
    ours = _answer("Our new credentials.", sdpfrag.CONTENT_TYPE, _TEXT)
    ours["headers"] |= {"ETag": _header()}
    if_match = {"type": "string", "examples": ["*"], "minLength": 1}
    return {
        whip.PATH: {
            "post": _described(
                "whipCreate",
                "Begin a call, as an encoder does (RFC 9725).",
                {
                    "201": _created("The answer.", "Location", "ETag", "Accept-Patch"),
                    "307": _redirected(),
                },
                (*_ADMISSION, "400", "408", "413", "415", "503"),
                parameters=[_parameter("model", "query", _TEXT, "Which model answers.")],
                requestBody=_bodies({SDP: _OFFER}),
            ),
            "options": _described(
                "whipDescribe",
                "What may be posted, and STUN and TURN servers (Link).",
                {"204": _nothing("What may be posted.", "Accept-Post")},
                _ADMISSION,
            ),
        },
        whip.PATH + "/{call_id}": {
            "parameters": [call_id],
            "patch": _described(
                "whipPatch",
                "Candidates, or an ICE restart.",
                {"200": ours, "204": _nothing("The candidates are known.")},
                (*_ASKED, "400", "408", "412", "413", "415", "428", "500"),
                parameters=[_parameter("If-Match", "header", if_match, "ETag, or *.")],
                requestBody=_bodies({sdpfrag.CONTENT_TYPE: _FRAGMENT}),
            ),
            "delete": _described(
                "whipDelete", "End a call.", {"200": _nothing("The call has ended.")}, _ASKED
            ),
            "options": _described(
                "whipDescribeCall",
                "What may be patched.",
                {"204": _nothing("What may be patched.", "Accept-Patch")},
                (),
            ),
        },
    }


def _pipecat() -> dict[str, Object]:
    session_id = _parameter("session_id", "path", {"type": "string", "minLength": 1})
    offer = _object(
        ["sdp"],
        sdp=_OFFER,
        type={"const": "offer"},
        pc_id={"type": ["string", "null"], "maxLength": pipecat.PC_ID_CHARACTERS_MAX},
        restart_pc={"description": "true: the client has made a new connection."},
        requestData={},
        request_data={},
    )
    answered = _object(["sdp", "type", "pc_id"], sdp=_TEXT, type={"const": "answer"}, pc_id=_TEXT)
    listed = _ref("schemas", "Candidate")
    candidates = _object(
        ["pc_id", "candidates"],
        pc_id={"type": "string", "minLength": 1, "maxLength": pipecat.PC_ID_CHARACTERS_MAX},
        candidates={"type": "array", "maxItems": pipecat.CANDIDATES_MAX, "items": listed},
    )
    bodied = (*_ASKED, "400", "408", "413", "415")

    def ways(suffix: str) -> Object:
        return {
            "post": _described(
                f"pipecatOffer{suffix}",
                "Begin a call, go on with one in another, or offer once more.",
                {"200": _answer("The answer.", JSON, answered)},
                bodied,
                requestBody=_bodies({JSON: offer}),
            ),
            "patch": _described(
                f"pipecatCandidates{suffix}",
                "Trickled candidates.",
                {"200": _answer("They are known.", JSON, _object(status={"const": "success"}))},
                bodied,
                requestBody=_bodies({JSON: candidates}),
            ),
        }

    started = _object(["sessionId"], sessionId=_TEXT, iceConfig={"type": "object"})
    wanted = _object(transport={"const": "webrtc"}, body={})
    return {
        pipecat.OFFER: ways(""),
        "/sessions/{session_id}" + pipecat.OFFER: {"parameters": [session_id], **ways("Started")},
        pipecat.START: {
            "post": _described(
                "pipecatStart",
                "Where to send the offer, and what to offer with.",
                {"200": _answer("A session's id.", JSON, started)},
                (*_ADMISSION, "400", "408", "413", "415"),
                requestBody=_bodies({JSON: wanted}, required=False),
            )
        },
    }


def _operation() -> dict[str, Object]:
    count = {"type": "integer", "minimum": 0}
    health = _object(state=_TEXT, transceivers=count, transceivers_serving=count)
    ready = _object(
        ["ready", "why"], ready={"type": "boolean"}, why={"type": "array", "items": _TEXT}
    )

    def asked(name: str, summary: str, kind: str, schema: Object, *others: str) -> Object:
        answers = {status: _answer(summary, kind, schema) for status in ("200", *others)}
        return {"get": {**_described(name, summary, answers, ()), "security": []}}

    return {
        "/health": asked("health", "How many transceivers serve.", JSON, health, "503"),
        "/healthz": asked("healthz", "The process lives.", "text/plain", _TEXT),
        "/readyz": asked("readyz", "Whether an offer would be taken.", JSON, ready, "503"),
        PATH: asked("openapi", "This document.", JSON, {"type": "object"}),
    }


# --- what they are made of ------------------------------------------------------------------------

_CALL_ID = "^rtc_[A-Za-z0-9_-]{23}([A-Za-z0-9_-]{16})?$"
_TEXT: Object = {"type": "string"}
_SESSION: Object = {"$ref": "#/components/schemas/Session"}
_OFFER: Object = {
    "type": "string",
    "minLength": 1,
    "description": "A session description (RFC 8866) with audio.",
    "examples": [EXAMPLE_OFFER],
}
_FRAGMENT: Object = {
    "type": "string",
    "description": "An SDP fragment (RFC 8840).",
    "examples": ["a=ice-ufrag:abcd\r\na=ice-pwd:0123456789abcdefghijkl\r\n"],
}


def _error() -> Object:
    optional = {"type": ["string", "null"]}
    error = _object(
        ["message", "type", "param", "code"],
        message={"type": "string", "minLength": 1},
        type={"enum": ["invalid_request_error", "server_error"]},
        param=optional,
        code={"type": "string", "minLength": 1},
    )
    return _object(["error"], error=error | {"additionalProperties": False})


def _session() -> Object:
    return {
        "type": "object",
        "description": (
            "Settings as OpenAI's Realtime API has them. What of them is possible the model server"
            " says, in the call."
        ),
    }


def _candidate() -> Object:
    found = _object(["candidate"], candidate=_TEXT)
    return {**found, "description": "What stands beside the candidate is not read."}


def _object(required: list[str] | None = None, **properties: Any) -> Object:
    found: Object = {"type": "object", "properties": properties}
    return found | ({"required": required} if required else {})


def _ref(section: str, name: str) -> Object:
    return {"$ref": f"#/components/{section}/{name}"}


def _parameter(
    name: str, place: str, schema: Object, description: str = "", required: bool = False
) -> Object:
    found = {"name": name, "in": place, "required": required or place == "path", "schema": schema}
    return found | ({"description": description} if description else {})


def _bodies(schemas: dict[str, Object], required: bool = True) -> Object:
    return {
        "required": required,
        "content": {kind: {"schema": schema} for kind, schema in schemas.items()},
    }


def _header() -> Object:
    return {"required": True, "schema": {"type": "string", "minLength": 1}}


def _nothing(description: str, *headers: str) -> Object:
    """An answer without a body."""
    named = {"X-Request-Id": _ref("headers", "RequestId"), **{name: _header() for name in headers}}
    return {"description": description, "headers": named}


def _answer(description: str, kind: str, schema: Object) -> Object:
    return {**_nothing(description), "content": {kind: {"schema": schema}}}


def _created(description: str, *headers: str) -> Object:
    return {**_nothing(description, *headers), "content": {SDP: {"schema": _TEXT}}}


def _redirected() -> Object:
    description = "Another cluster takes it: send the same request to Location."
    schema = _ref("schemas", "Error")
    return {**_nothing(description, "Location"), "content": {JSON: {"schema": schema}}}


def _described(
    name: str, summary: str, answers: Object, refusals: tuple[str, ...], **more: Any
) -> Object:
    """An operation: what it answers, and the statuses with which it can refuse."""
    responses = dict(answers)
    for status in sorted(refusals):
        refused = _answer(_STATUS[status], JSON, _ref("schemas", "Error"))
        if status in _RETRIED:
            refused["headers"]["Retry-After"] = _ref("headers", "RetryAfter")
        responses[status] = refused
    return {"operationId": name, "summary": summary, **more, "responses": responses}
