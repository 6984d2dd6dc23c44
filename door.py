"""The door: what every way in shares, whichever API the client speaks.

    request ──▶ admit ──▶ place or ask ──▶ answer
                 who is it?   placement.py

What it owns: the caller's admission, the counting and logging of offers, and the refusal that each
failure of placement becomes.

Rules that stay true:
- No request reaches a transceiver before its caller is admitted.
- Every offer ends in exactly one counter: answered, refused for what it is, refused for lack of
  room, or sent to another cluster.

It knows no API: `calls.py` and its neighbours read requests and shape answers.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from aiohttp import ClientWebSocketResponse, web

import guide
import keys
import ledger
import metrics
import observer
import placement
import reception
import roster
import settings
from attendants import Crowded
from intake import Refusal

MODEL_CHARACTERS_MAX = 256
"""Of `?model=`: a name, not a document. What is longer is cut, and then the name of no model."""


Caller = keys.Caller
"""Who sends a request."""

NOBODY = Caller()


class Ended(Refusal):
    """404 for a call that was ours: its id is authentic, and its owner has it no more.

    To a key that is not the call's owners say the same.
    """


class Door:
    """What the handlers share."""

    def __init__(self, config: settings.Signaling, rng: random.Random | None = None) -> None:
        """Raises SettingsError for a key file that cannot be used."""
        self.counters = ledger.Counters(metrics.Signaling)
        self.placement = placement.Placement(config, self.counters, rng or random.SystemRandom())
        self.config = config
        self.offer_octets_max = config.signaling.offer_octets_max
        self._retry_after = {"Retry-After": str(config.signaling.retry_after_s)}
        self.stopping = asyncio.Event()
        """Set when the process is about to stop: what would go on has to end."""
        self.reception = reception.Reception(config)
        self.guide = guide.Guide(config, self._peers, self.reception.client_of)

    def _peers(self) -> list[roster.Peer]:
        return self.placement.peers

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """While it lasts, calls can be placed, and what there is to know for that is known."""
        async with self.placement.connected(), self.guide.informed():
            yield

    async def admit(self, request: web.Request) -> Caller:
        """Who this is. Raises Refusal: 401, 403 or 429."""
        caller = self.reception.admit(request)
        observer.trail().key = caller.key
        return caller

    def mint(self, caller: Caller, session: dict[str, Any] | None, seconds: int) -> tuple[str, int]:
        """An ephemeral key for others to call with, and when it expires in seconds since 1970.

        Raises Refusal: 400 for a session that it has no room for, 403, 429.
        """
        return self.reception.mint(caller, session, seconds)

    def way(self, request: web.BaseRequest) -> guide.Way:
        """Which way a call goes that this request is about."""
        return self.guide.way(request, observer.trail().request_id)

    async def place(self, request: web.BaseRequest, order: placement.Order) -> placement.Placed:
        """Place a call. Raises Refusal: 400 with the transceiver's sentence, 429, or 503."""
        trail, key = observer.trail(), order.key
        # One that goes on with another takes its place. Not with any id that somebody makes up.
        replaced = order.resume is not None and self.placement.knows(order.resume)
        self.reception.open_call(key, max(0, self.placement.calls_of(key) - replaced))
        way = self.way(request)
        order = replace(order, candidates=way.relays, site=way.site, request_id=trail.request_id)
        try:
            placed = await self.placement.place(order, way.clusters)
        except placement.BadOffer as error:
            raise Refusal(400, str(error), code=error.code, param=error.param) from error
        except placement.Unavailable as error:
            raise self.unavailable(error) from error
        self.guide.taken(way)
        trail.answered(placed.call_id, placed.request_id)
        trail.site, trail.cluster = way.site, placed.cluster
        return placed

    async def ask(
        self, call_id: str, method: str, path: str = "", body: Any = None, caller: Caller = NOBODY
    ) -> tuple[int, Any]:
        """Ask the owner of a call: status and JSON body of what its control API answers.

        `path` follows `/v1/sessions/{call_id}`. Raises Refusal: 404 for a call that is none of
        ours or has ended, 503 if its owner does not answer.
        """
        observer.trail().about(call_id, caller.key)
        try:
            return await self.placement.ask(call_id, method, path, body, caller.key)
        except placement.UnknownCall as error:
            raise _no_such_call(error, "id") from error
        except placement.Unavailable as error:
            raise self.unavailable(error) from error

    async def attend(self, call_id: str, caller: Caller) -> ClientWebSocketResponse:
        """The events of a call, both ways. Raises Refusal like `ask`, and 429."""
        observer.trail().about(call_id, caller.key)
        try:
            return await self.placement.attend(call_id, caller.key)
        except placement.UnknownCall as error:
            raise _no_such_call(error, "call_id") from error
        except Crowded as error:
            raise Refusal(429, str(error), code="too_many_sidebands", param="call_id") from error
        except placement.Unavailable as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> Refusal:
        """503 with the time after which another try makes sense."""
        return Refusal(503, str(error), code="unavailable", headers=self._retry_after)

    def offered(self) -> "Offered":
        """Counts one offer: `with door.offered(): read it, place it`."""
        return Offered(self.counters)


def _no_such_call(error: placement.UnknownCall, param: str) -> Refusal:
    message = "There is no such call, or it has ended."
    kind = Ended if isinstance(error, placement.EndedCall) else Refusal
    return kind(404, message, code="call_id_not_found", param=param)


class Offered:
    """One offer in the books, from its arrival to its end."""

    def __init__(self, counters: ledger.Counters) -> None:
        self._values = counters.values

    def __enter__(self) -> None:
        self._values[metrics.Signaling.OFFERS] += 1

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if kind is None:
            ended = metrics.Signaling.ANSWERED
        elif isinstance(error, Refusal) and error.status == 503:
            ended = metrics.Signaling.REFUSED_FULL
        elif isinstance(error, Refusal) and error.status == 307:
            ended = metrics.Signaling.SENT_ELSEWHERE
        else:
            ended = metrics.Signaling.REFUSED_OFFER
        self._values[ended] += 1
