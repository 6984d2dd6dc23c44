"""What signaling writes down, counts and passes on of each request, before handlers of a test's."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

import journal
import observer
from metrics import Api
from metrics import SignalingTiming as Timing

CALL = "rtc_APeT9ekG4r6OlO9-HGsokz4"


class Stage:
    """An application that is looked at, and one behind it that it asks."""

    def __init__(self) -> None:
        self.now, self.probed = 100.0, 200
        self.observer = observer.Observer([__name__], clock=lambda: self.now)
        self.lines: list[dict[str, Any]] = []
        self.passed_on: list[str | None] = []
        self.http: aiohttp.ClientSession
        self.url = self.behind = ""

    async def place(self, request: web.Request) -> web.Response:
        with observer.reading():
            await request.read()
        traced = aiohttp.ClientSession(trace_configs=[observer.tracing()])
        async with traced as http, http.get(self.behind) as response:
            given = await response.text()
        trail = observer.trail()
        trail.key = "alice"
        trail.answered(CALL, given or trail.request_id)
        return web.Response(status=201)

    async def refuse(self, request: web.Request) -> web.Response:
        observer.trail().about(request.match_info["id"], "bob")
        return web.Response(status=int(request.query["status"]))

    async def redirect(self, _: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async def probe(self, _: web.Request) -> web.Response:
        return web.Response(status=self.probed)

    async def answer(self, request: web.Request) -> web.Response:
        self.passed_on.append(request.headers.get(observer.HEADER))
        return web.Response(text=request.query.get("id", ""))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Stage"]:
        stage = self

        class Kept(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                stage.lines.append(json.loads(journal.Json().format(record)))

        behind, front = web.Application(), web.Application()
        behind.router.add_get("/", self.answer)
        self.observer.attach(front)
        front.router.add_post("/calls", self.place)
        front.router.add_post("/calls/{id}", self.refuse)
        front.router.add_get("/redirect", self.redirect)
        front.router.add_get("/readyz", self.probe)
        runners = [web.AppRunner(app, access_log=None) for app in (behind, front)]
        kept = Kept()
        level = observer.log.level
        observer.log.addHandler(kept)
        observer.log.setLevel(logging.INFO)
        try:
            for runner in runners:
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.behind, self.url = (f"http://127.0.0.1:{r.addresses[0][1]}/" for r in runners)
            async with aiohttp.ClientSession(self.url) as self.http:
                yield self
        finally:
            observer.log.removeHandler(kept)
            observer.log.setLevel(level)
            for runner in runners:
                await runner.cleanup()

    def counted(self, api: str = __name__) -> dict[str, int]:
        counters = self.observer.counters[api]
        return {kind.name: counters[kind] for kind in Api if counters[kind]}


def test_one_id_runs_through_and_one_line_says_all() -> None:
    async def run() -> None:
        async with Stage().running() as stage:
            theirs = "their id\u00e9" + "x" * 1000
            headers = {observer.HEADER: theirs}
            async with stage.http.post("/calls", data=b"v=0", headers=headers) as response:
                ours = response.headers[observer.HEADER]
            assert re.fullmatch("[0-9a-f]{8}", ours)
            assert stage.passed_on == [ours]
            (line,) = stage.lines
            assert line["request_id"] == ours and "call_request_id" not in line
            assert line["client_request_id"].startswith("their id")
            assert len(line["client_request_id"]) <= observer.THEIRS_CHARACTERS_MAX + 1
            assert (line["method"], line["route"], line["status"]) == ("POST", "/calls", 201)
            assert (line["key"], line["call"]) == ("alice", "Gsokz4")
            assert line["client"] == "127.0.0.x"
            assert line["transceiver_ms"] > 0 and {"ms", "own_ms"} <= line.keys()
            assert "APeT9ekG4r6" not in json.dumps(line)
            assert stage.counted() == {"PLACED": 1}
            assert all(stage.observer.timings.count(kind) == 1 for kind in Timing)

    asyncio.run(run())


def test_a_call_that_the_transceiver_calls_otherwise_is_written_with_both() -> None:
    async def run() -> None:
        async with Stage().running() as stage:
            stage.behind += "?id=0badcafe"
            async with stage.http.post("/calls") as response:
                ours = response.headers[observer.HEADER]
            assert stage.lines[0]["request_id"] == ours
            assert stage.lines[0]["call_request_id"] == "0badcafe"

    asyncio.run(run())


def test_every_ending_has_its_counter_and_no_id_of_a_call_is_written() -> None:
    endings = {
        "200": "ANSWERED", "400": "REFUSED_REQUEST", "401": "REFUSED_KEY", "403": "REFUSED_KEY",
        "404": "REFUSED_UNKNOWN", "405": "REFUSED_REQUEST", "408": "REFUSED_SLOW",
        "413": "REFUSED_SIZE", "429": "REFUSED_LIMIT", "500": "FAULTS", "503": "UNAVAILABLE",
    }  # fmt: skip

    async def run() -> None:
        async with Stage().running() as stage:
            for status in endings:
                url = f"/calls/{CALL}?status={status}"
                async with stage.http.post(url) as response:
                    assert response.headers[observer.HEADER]
            async with stage.http.get("/redirect", allow_redirects=False) as response:
                assert response.status == 307
            async with stage.http.get(f"/nowhere/{CALL}") as response:
                assert response.status == 404
            counted = {name: list(endings.values()).count(name) for name in endings.values()}
            counted["ANSWERED"] += 1  # the redirect
            assert stage.counted() == counted
            assert stage.counted("other") == {"REFUSED_UNKNOWN": 1}
            assert not any(stage.observer.timings.count(kind) for kind in Timing)
            written = json.dumps(stage.lines)
            assert CALL not in written and "/calls/{id}" in written and '"key": "bob"' in written

    asyncio.run(run())


def test_a_flood_of_refused_requests_is_a_bounded_number_of_lines() -> None:
    async def run() -> None:
        async with Stage().running() as stage:

            async def refused(times: int) -> None:
                for _ in range(times):
                    async with stage.http.post("/calls/x?status=404"):
                        pass

            most = observer.REFUSED_LINES_PER_S
            await refused(most + 30)
            assert len(stage.lines) == most
            async with stage.http.post("/calls"):  # what is not refused is always written
                pass
            assert stage.lines[-1]["unwritten"] == 30
            async with stage.http.post("/calls/x?status=503"):  # nor is a fault hidden
                pass
            assert stage.lines[-1]["status"] == 503
            stage.now += 0.5
            await refused(most)
            assert len(stage.lines) == most + 2 + most // 2
            assert "unwritten" not in stage.lines[-1]

    asyncio.run(run())


def test_a_flood_that_takes_no_key_is_a_bounded_number_of_lines() -> None:
    async def run() -> None:
        async with Stage().running() as stage:
            most = observer.REFUSED_LINES_PER_S
            for _ in range(most + 30):
                async with stage.http.get("/redirect", allow_redirects=False) as response:
                    assert response.status == 307
            assert len(stage.lines) == most
            for _ in range(most + 30):  # what takes a key is written each time
                async with stage.http.post("/calls/x?status=200"):
                    pass
            assert len(stage.lines) == 2 * most + 30
            assert stage.lines[most]["unwritten"] == 30

    asyncio.run(run())


def test_a_probe_that_is_answered_with_yes_leaves_no_line() -> None:
    async def run() -> None:
        async with Stage().running() as stage:
            for status in (200, 503, 200):
                stage.probed = status
                async with stage.http.get("/readyz") as response:
                    assert response.status == status
                    assert response.headers[observer.HEADER]
            assert [line["status"] for line in stage.lines] == [503]
            assert stage.counted() == {"ANSWERED": 2, "UNAVAILABLE": 1}

    asyncio.run(run())


def test_outside_of_a_request_there_is_a_trail_that_nobody_sees() -> None:
    observer.trail().about(CALL, "alice")
    assert observer.trail().key == ""
