"""The control API over HTTP, before a switchboard that a test decides about."""

import asyncio
import enum
import socket
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

import control
import endpoints
import ledger
import metrics
import opening
import sdp

REQUEST = {"offer": "v=0", "candidates": [["192.0.2.1", 3478]], "key": "alice", "request_id": "r1"}


class State(enum.Enum):
    LIVE = 1


class Call:
    def __init__(self, wanted: opening.Opening) -> None:
        self.call_id, self.opening, self.etag, self.state = "rtc_1", wanted, "e1", State.LIVE
        self.client_ice = ("", "")
        self.restarted_as: tuple[str, str] | None = None


class Limits:
    control_prefixes = (endpoints.Prefix("127.0.0.0/8"),)


class Switchboard:
    """One call at the most."""

    def __init__(self) -> None:
        self.counters, self.timings = (
            ledger.Counters(metrics.Transceiver),
            ledger.Histograms(metrics.Timing),
        )
        self.limits: Any = Limits()
        self.call: Call | None = None
        self.raises: Exception | None = None

    async def recalled(self, wanted: opening.Opening) -> opening.Opening:
        return wanted

    def open(self, wanted: opening.Opening) -> tuple[Call, str]:
        if self.raises is not None:
            raise self.raises
        self.call = Call(wanted)
        return self.call, "answer"

    def find(self, call_id: str) -> Call | None:
        return self.call if self.call is not None and call_id == self.call.call_id else None

    def restart(self, call: Call) -> tuple[str, str]:
        call.etag = "e2"
        return "name", "password"

    def again(self, call: Call, wanted: opening.Opening) -> str:
        if wanted.offer == "no offer":
            raise sdp.OfferError("That is none.")
        return f"again: {wanted.offer}"

    def hang_up(self, call: Call, *, resumed: bool = False) -> None:
        self.call = None

    def health(self) -> dict[str, Any]:
        return {"state": "serving"}

    def book(self) -> None:
        pass


class Client:
    """Requests to it: status and JSON."""

    def __init__(self, http: aiohttp.ClientSession, at: tuple[str, int]) -> None:
        self._http, self.at = http, at

    async def __call__(
        self, method: str, path: str, body: Any = None, key: str = "alice"
    ) -> tuple[int, Any]:
        headers = {control.KEY_HEADER: key}
        async with self._http.request(method, path, json=body, headers=headers) as response:
            return response.status, await response.json()


async def served(switchboard: Switchboard, test: Any) -> None:
    runner = web.AppRunner(control.application(switchboard))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as http:
            await test(Client(http, (host, port)))
    finally:
        await runner.cleanup()


def test_a_call_from_its_opening_to_its_end() -> None:
    board = Switchboard()

    async def run(ask: Client) -> None:
        opened = {"call_id": "rtc_1", "request_id": "r1", "answer": "answer", "etag": "e1"}
        opened["opened"] = 0  # the fake counts none
        assert await ask("POST", "/v1/sessions", REQUEST) == (201, opened)
        shown = {"state": "live", "request_id": "r1", "etag": "e1"}
        assert await ask("GET", "/v1/sessions/rtc_1") == (200, shown)
        pair = {"ufrag": "abcd", "pwd": "p" * 22}
        renewed = {"ufrag": "name", "pwd": "password", "etag": "e2"}
        assert await ask("POST", "/v1/sessions/rtc_1/ice", pair) == (200, renewed)
        again = {"offer": "offer 2", "candidates": REQUEST["candidates"]}
        answered = {"answer": "again: offer 2", "etag": "e2"}
        assert await ask("POST", "/v1/sessions/rtc_1/offer", again) == (200, answered)
        status, body = await ask("POST", "/v1/sessions/rtc_1/offer", again | {"offer": "no offer"})
        assert (status, body["error"]["code"]) == (400, "invalid_offer")
        assert await ask("DELETE", "/v1/sessions/rtc_1") == (200, {})
        assert board.call is None
        status, body = await ask("DELETE", "/v1/sessions/rtc_1")
        assert (status, body["error"]["code"]) == (404, "call_id_not_found")

    asyncio.run(served(board, run))


@pytest.mark.parametrize("key", ["", "bob", "Alice"])
def test_under_another_key_there_is_no_such_call(key: str) -> None:
    board = Switchboard()

    async def run(ask: Client) -> None:
        await ask("POST", "/v1/sessions", REQUEST)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/ice")):
            pair = {"ufrag": "abcd", "pwd": "p" * 22} if path else None
            status, body = await ask(method, f"/v1/sessions/rtc_1{path}", pair, key)
            assert (status, body["error"]["code"]) == (404, "call_id_not_found")
        assert board.call is not None and board.call.etag == "e1"

    asyncio.run(served(board, run))


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (control.Full("Full."), 503, "overloaded"),
        (sdp.OfferError("No audio."), 400, "invalid_offer"),
        (RuntimeError("a fault"), 500, "internal_error"),
    ],
)
def test_what_goes_wrong_has_a_status_and_a_sentence(
    raised: Exception, status: int, code: str
) -> None:
    board = Switchboard()
    board.raises = raised

    async def run(ask: Client) -> None:
        found, body = await ask("POST", "/v1/sessions", REQUEST)
        assert (found, body["error"]["code"]) == (status, code)
        assert body["error"]["message"]
        found, body = await ask("POST", "/v1/sessions", {**REQUEST, "candidates": []})
        assert (found, body["error"]["param"]) == (400, "candidates")

    asyncio.run(served(board, run))


def test_who_has_given_up_gets_no_call() -> None:
    """The process stood still: it finds the request, and that the connection has ended."""
    here = Switchboard()

    async def run(ask: Client) -> None:
        at = ask.at
        body = orjson.dumps(REQUEST)
        head = f"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        for given_up in (True, False):
            with socket.create_connection(at) as connection:  # no turn of the loop before the end
                connection.sendall(head.encode() + body)
                if given_up:
                    connection.close()
                for _ in range(100):
                    await asyncio.sleep(0.001)
            assert (here.call is None) == given_up

    asyncio.run(served(here, run))
