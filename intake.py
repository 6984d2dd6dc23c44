"""Intake: what a request of a stranger brings, read within bounds; and what it is refused with.

What it owns: request bodies in any of the forms that clients send offers in, and the error body
that each refusal ends in, `{"error": {message, type, param, code}}`.

Rules that stay true:
- Whatever a client sends is bounded in octets and in time before it is looked at.
- A refusal says what is wrong, for people and for programs. None is empty.

It does not read SDP: the transceiver does, and its sentence about a broken offer is handed on.

HTTP: https://www.rfc-editor.org/rfc/rfc9110
multipart/form-data: https://www.rfc-editor.org/rfc/rfc7578
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import orjson
from aiohttp import web

import observer

BODY_DEADLINE_S = 5.0
"""A body of some kilooctets takes a slow phone a second. Longer helps only who sends an octet at a
time to hold a connection."""

LEVELS_MAX = 64
"""Of JSON: a session with a tool whose parameters are a schema has ten. It is written again on its
way, which orjson does for 254 levels and Python's own functions for fewer than they read."""

PARTS_MAX = 16
"""Parts of a form. Two are read; the rest is for clients that add fields of their own."""

FORM_ERRORS = (ValueError, RuntimeError, aiohttp.ClientError, aiohttp.http.HttpProcessingError)
"""What aiohttp raises for a form that makes no sense; RuntimeError for a part `_charset_`."""


class Refusal(Exception):
    """A request that ends in an error body. Raised by handlers, answered by one middleware."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`message` is for people, `code` for programs, `param` names the part at fault."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def response(self) -> web.Response:
        """The error as clients of this API expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return web.Response(
            status=self.status,
            body=orjson.dumps({"error": error}),
            content_type="application/json",
            headers=self.headers,
        )


# --- reading requests ---------------------------------------------------------------------------


async def read_body(request: web.Request, octets_max: int) -> bytes:
    """The request's body. Raises Refusal: 400 (broken), 408 (slow), 413 (too large, also without
    a Content-Length) or 415 (compressed)."""
    too_large = Refusal(
        413, f"The request is larger than {octets_max} octets.", code="request_too_large"
    )
    if (request.content_length or 0) > octets_max:
        raise too_large
    coding = request.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        message = "Send the body as it is: nothing that is compressed is read here."
        raise Refusal(415, message, code="unsupported_content_encoding")
    try:
        with observer.reading():
            async with asyncio.timeout(BODY_DEADLINE_S):
                return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError:
        message = "The request's body is broken: its chunks make no sense."
        raise Refusal(400, message, code="invalid_body") from None
    except TimeoutError:
        raise Refusal(408, "The request's body came too slowly.", code="timeout") from None


async def read_object(request: web.Request, octets_max: int) -> dict[str, Any]:
    """A JSON object; an empty one for an empty body. Raises Refusal: 400, 408 or 413."""
    body = await read_body(request, octets_max)
    found = _parse_json(body, "The body", None) if body.strip() else {}
    if not isinstance(found, dict):
        raise Refusal(400, "The body is not a JSON object.", code="invalid_json")
    return found


FORMS = ("application/sdp", "multipart/form-data", "application/json")
"""What an offer comes in."""


async def read_offer(
    request: web.Request, octets_max: int, forms: tuple[str, ...] = FORMS
) -> tuple[str, dict[str, Any] | None]:
    """The offer and the session settings of a request in any of the forms that the API knows.

    Raises Refusal: 400, 408 (too slow), 413 (too large, also without a Content-Length) or 415.
    """
    kind = request.content_type if "Content-Type" in request.headers else "nothing"
    readers: dict[str, Callable[[web.Request, bytes], Awaitable[tuple[Any, Any]]]] = {
        "application/sdp": _read_sdp,
        "multipart/form-data": _read_form,
        "application/json": _read_json,
    }
    if kind not in forms:
        raise Refusal(
            415,
            f"Send the offer as {', '.join(forms)}; this request's Content-Type says {kind}.",
            code="unsupported_media_type",
        )
    body = await read_body(request, octets_max)
    sdp, session = await readers[kind](request, body)
    return offer_text(sdp), session_object(session)


async def _read_sdp(request: web.Request, body: bytes) -> tuple[Any, Any]:
    return body, None


async def _read_json(request: web.Request, body: bytes) -> tuple[Any, Any]:
    found = _parse_json(body, "The body", None)
    if not isinstance(found, dict):
        raise Refusal(400, "The body is not a JSON object.", code="invalid_json")
    return found.get("sdp"), found.get("session")


async def _read_form(request: web.Request, body: bytes) -> tuple[Any, Any]:
    """The parts `sdp` and `session`, whatever content type or file name they come with.

    The body has been read and bounded: aiohttp's reader takes it from memory, so that no part can
    keep it waiting.
    """
    # RFC 2046 section 5.1.1 allows lines before the first boundary. No client writes any, and 60 kB
    # of empty ones took 60 ms to be read one by one.
    body = body.lstrip()
    if not body.startswith(b"--"):
        raise Refusal(400, "The form does not begin with a boundary.", code="invalid_form")
    stream = aiohttp.StreamReader(request.protocol, limit=len(body) + 1)
    stream.feed_data(body)
    stream.feed_eof()
    parts: dict[str, bytes] = {}
    try:
        reader = aiohttp.MultipartReader(request.headers, stream)
        async for part in reader:
            if not isinstance(part, aiohttp.BodyPartReader) or len(parts) >= PARTS_MAX:
                break
            parts.setdefault(part.name or f"unnamed {len(parts)}", bytes(await part.read()))
    except FORM_ERRORS as error:
        raise Refusal(
            400, f"The body is not multipart/form-data: {error}", code="invalid_form"
        ) from error
    session = parts.get("session") or None
    return parts.get("sdp"), session and _parse_json(session, "The part session", "session")


def _parse_json(octets: bytes, what: str, param: str | None) -> Any:
    try:
        found = orjson.loads(octets)
    except orjson.JSONDecodeError as error:
        raise Refusal(
            400, f"{what} is not JSON: {error}", code="invalid_json", param=param
        ) from error
    level = [found]
    for _ in range(LEVELS_MAX):
        level = [child for each in level for child in _children(each)]
        if not level:
            return found
    message = f"{what} is nested more than {LEVELS_MAX} levels deep."
    raise Refusal(400, message, code="invalid_json", param=param)


def _children(value: Any) -> Iterable[Any]:
    """What is one level deeper."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def offer_text(sdp: Any) -> str:
    """The offer as text; it has more than white space in it. Raises Refusal: 400."""
    try:
        text = sdp.decode() if isinstance(sdp, bytes) else sdp
    except UnicodeDecodeError as error:
        raise Refusal(400, "The offer is not UTF-8.", code="invalid_offer", param="sdp") from error
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "There is no SDP offer in it.", code="missing_offer", param="sdp")
    return text


def session_object(session: Any) -> dict[str, Any] | None:
    """The settings that come with an offer, if any. Raises Refusal: 400."""
    if session is None or isinstance(session, dict):
        return session
    raise Refusal(400, "The session is not a JSON object.", code="invalid_session", param="session")
