"""Calls: OpenAI's Realtime API over HTTP, as its clients speak it.

    POST   /v1/realtime/calls               201, the answer, and the call in Location
    POST   /v1/realtime/calls/{id}/hangup   200 once the call has ended
    DELETE /v1/realtime/calls/{id}          the same

What it owns: these paths, and the bodies and headers of their answers.

Rules that stay true:
- A call's id is the last segment of Location: clients take it from there.
- Nothing is kept about a call: its id leads any instance to its owner (placement.py).

https://developers.openai.com/api/reference/resources/realtime/subresources/calls
"""

from aiohttp import web

import metrics
from door import MODEL_CHARACTERS_MAX, Door
from intake import read_offer
from placement import Order

PATH = "/v1/realtime/calls"


def routes(door: Door) -> list[web.RouteDef]:
    """The handlers of this API."""

    async def create(request: web.Request) -> web.Response:
        with door.offered():
            caller = await door.admit(request)
            offer, session = await read_offer(request, door.offer_octets_max)
            model = request.query.get("model", "")[:MODEL_CHARACTERS_MAX] or None
            order = Order(offer, session or caller.session, model, key=caller.key)
            placed = await door.place(order)
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

    return [
        web.post(PATH, create),
        web.post(PATH + "/{id}/hangup", hang_up),
        web.delete(PATH + "/{id}", hang_up),
    ]
