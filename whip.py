"""WHIP: the way in for encoders, by the WebRTC-HTTP Ingestion Protocol.

    POST    /whip            201, the answer, the call in Location, its ICE session in ETag
    OPTIONS /whip            204, what may be posted, and STUN and TURN servers for who has a key
    PATCH   /whip/{call_id}  204 for candidates; 200 with our new credentials for an ICE restart
    DELETE  /whip/{call_id}  200 once the call has ended
    OPTIONS /whip/{call_id}  204, what may be patched

What it owns: these paths, their headers, and what `If-Match` means here.

Rules that stay true:
- Nothing is kept about a call: the ETag is the owner's, asked for with each PATCH.
- Candidates are read, and of no further use: a client is found by its first check.
- A restart that fails leaves the call as it was.
- A call that is over may be deleted again: the client wanted no more. Only an id that is none of
  ours is unknown.
- Encoders are sent to another cluster with a POST, never with anything later: the call's owner is
  here.

A client that wants to hear answers offers sendrecv, and is answered so, although encoders as the
RFC has them only send.

RFC 9725 https://www.rfc-editor.org/rfc/rfc9725 (WHIP), RFC 8840
https://www.rfc-editor.org/rfc/rfc8840 (trickle ICE), RFC 9110 section 13
https://www.rfc-editor.org/rfc/rfc9110#section-13 (If-Match), RFC 6585 section 3
https://www.rfc-editor.org/rfc/rfc6585#section-3 (428), RFC 8288
https://www.rfc-editor.org/rfc/rfc8288 (Link).
"""

import logging
import re

from aiohttp import web

import metrics
import observer
import sdpfrag
import settings
from door import MODEL_CHARACTERS_MAX, Caller, Door, Ended
from intake import Refusal, read_body, read_offer
from placement import Order

PATH = "/whip"
SDP = "application/sdp"

REDIRECTED = "elsewhere"
"""In the query of a POST that another cluster has sent here: it is not sent on, so that two full
ones do not send an encoder to and fro."""

IF_MATCH_CHARACTERS_MAX = 1024
"""Of `If-Match`: one ETag is 18, a client has two at the most."""

_ETAG = re.compile(r'(W/)?"([!#-~]*)"')

log = logging.getLogger("whip")


def routes(door: Door) -> list[web.RouteDef]:
    """The handlers of this API."""
    handlers = _Handlers(door)
    session = PATH + "/{call_id}"
    return [
        web.post(PATH, handlers.create),
        web.options(PATH, handlers.describe_endpoint),
        web.patch(session, handlers.change),
        web.delete(session, handlers.delete),
        web.options(session, handlers.describe_session),
    ]


class _Handlers:
    """One method a request."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._whip = door.config.whip
        self._links = list(map(_link, door.config.ice_server))

    async def create(self, request: web.Request) -> web.Response:
        """Take a call, or send it elsewhere."""
        with self._door.offered():
            caller = await self._door.admit(request)
            goes_on = self._whip.elsewhere is not None and REDIRECTED not in request.query
            if goes_on and self._whip.elsewhere_when == "always":
                raise self._elsewhere(request)
            offer, _ = await read_offer(request, self._door.offer_octets_max, (SDP,))
            model = request.query.get("model", "")[:MODEL_CHARACTERS_MAX] or None
            try:
                order = Order(offer, caller.session, model, caller.key)
                placed = await self._door.place(request, order)
            except Refusal as refusal:
                if goes_on and refusal.status == 503:
                    raise self._elsewhere(request) from refusal
                raise
        headers = {
            "Content-Type": SDP,
            "Location": f"{PATH}/{placed.call_id}",
            "ETag": f'"{placed.etag}"',
            "Accept-Patch": sdpfrag.CONTENT_TYPE,
        }
        response = web.Response(status=201, body=placed.answer.encode(), headers=headers)
        self._name_servers(response)
        return response

    def _name_servers(self, response: web.Response) -> None:
        for link in self._links:
            response.headers.add("Link", link)

    def _elsewhere(self, request: web.Request) -> Refusal:
        """307 to the other cluster, which is told so, with the query as it came."""
        target = str(self._whip.elsewhere)
        query = "&".join(filter(None, (request.url.raw_query_string, REDIRECTED)))
        target += ("&" if "?" in target else "?") + query
        return Refusal(
            307,
            "This call is taken at another place: send the same request there.",
            code="elsewhere",
            headers={"Location": target},
        )

    async def change(self, request: web.Request) -> web.Response:
        """Candidates, or an ICE restart."""
        caller = await self._door.admit(request)
        if request.content_type != sdpfrag.CONTENT_TYPE:
            raise Refusal(
                415,
                f"Send an SDP fragment as {sdpfrag.CONTENT_TYPE}.",
                code="unsupported_media_type",
                headers={"Accept-Patch": sdpfrag.CONTENT_TYPE},
            )
        wanted = _if_match(request)
        fragment = await _read_fragment(request)
        if wanted is None:
            return await self._restart(request, fragment, caller)
        _, found = await self._door.ask(request.match_info["call_id"], "GET", caller=caller)
        if found.get("etag") not in wanted:
            raise Refusal(
                412,
                "If-Match names another ICE session than the one that there is now.",
                code="precondition_failed",
                param="If-Match",
            )
        return web.Response(status=204)

    async def _restart(
        self, request: web.Request, fragment: sdpfrag.Fragment, caller: Caller
    ) -> web.Response:
        """New credentials for both sides; or candidates of a client that matches any session."""
        call_id = request.match_info["call_id"]
        if not fragment.ufrag:
            raise _invalid("The fragment has no a=ice-ufrag and a=ice-pwd: a restart needs both.")
        pair = {"ufrag": fragment.ufrag, "pwd": fragment.password}
        status, ours = await self._door.ask(call_id, "POST", "/ice", pair, caller)
        if status != 200:
            told = call_id[-observer.TAG_CHARACTERS :], status
            log.error("call …%s: its owner answered %d to a restart", *told)
            raise Refusal(
                500, "The restart failed; the call goes on as it was.", code="internal_error"
            )
        etag = {"ETag": f'"{ours["etag"]}"'}
        if "ufrag" not in ours:
            return web.Response(status=204, headers=etag)
        text = sdpfrag.answer(fragment, ours["ufrag"], ours["pwd"], self._door.way(request).relays)
        headers = {"Content-Type": sdpfrag.CONTENT_TYPE, **etag}
        return web.Response(body=text.encode(), headers=headers)

    async def delete(self, request: web.Request) -> web.Response:
        """End a call, or find it ended."""
        caller = await self._door.admit(request)
        try:
            await self._door.ask(request.match_info["call_id"], "DELETE", caller=caller)
        except Ended:
            return web.Response()
        self._door.counters.values[metrics.Signaling.HUNG_UP] += 1
        return web.Response()

    async def describe_endpoint(self, request: web.Request) -> web.Response:
        """What may be posted. Preflights carry no key, and so are told of no server."""
        response = web.Response(status=204, headers={"Accept-Post": SDP})
        if self._links and "Access-Control-Request-Method" not in request.headers:
            await self._door.admit(request)
            self._name_servers(response)
        return response

    async def describe_session(self, request: web.Request) -> web.Response:
        """What may be patched: the same for every call, whether there is one or not."""
        return web.Response(status=204, headers={"Accept-Patch": sdpfrag.CONTENT_TYPE})


def _if_match(request: web.Request) -> frozenset[str] | None:
    """The ETags that a request names; None for any. Raises Refusal: 400, or 428 without.

    Any is `*`, and `"*"` as well: the RFC's examples have it so, and clients follow those. A weak
    ETag matches nothing (RFC 9110 section 13.1.1).
    """
    value = ", ".join(request.headers.getall("If-Match", [])).strip()
    if not value:
        raise Refusal(
            428,
            "If-Match is missing: the ETag of the ICE session for candidates, * for a restart.",
            code="precondition_required",
            param="If-Match",
        )
    if value in ("*", '"*"'):
        return None
    parts = [part.strip() for part in value.split(",")]
    matches = [_ETAG.fullmatch(part) for part in parts]
    if len(value) > IF_MATCH_CHARACTERS_MAX or None in matches:
        raise Refusal(
            400, "If-Match is neither * nor an ETag.", code="invalid_request", param="If-Match"
        )
    return frozenset(match[2] for match in matches if match is not None and match[1] is None)


async def _read_fragment(request: web.Request) -> sdpfrag.Fragment:
    """Raises Refusal: 400, 408 or 413."""
    body = await read_body(request, sdpfrag.OCTETS_MAX)
    try:
        return sdpfrag.read(body.decode())
    except UnicodeDecodeError:
        raise _invalid("The fragment is not UTF-8.") from None
    except sdpfrag.FragmentError as error:
        raise _invalid(str(error)) from error


def _invalid(message: str) -> Refusal:
    return Refusal(400, message, code="invalid_fragment", param="body")


def _link(server: settings.IceServer) -> str:
    """One STUN or TURN server as a Link header has it (RFC 9725 section 4.6)."""
    link = f'<{server.url}>; rel="ice-server"'
    if server.username is not None and server.credential is not None:
        link += f"; username={_quoted(server.username)}; credential={_quoted(server.credential)}"
        link += '; credential-type="password"'
    return link


def _quoted(text: str) -> str:
    """RFC 9110 section 5.6.4."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
