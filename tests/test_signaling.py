"""Signaling against small fakes of the transceiver's control API, over real HTTP on loopback."""

import asyncio
import itertools
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import endpoints
import intake
import metrics
import presence
import roster
import settings
import signaling
import ufrag

KEY = "0 " + bytes(range(32)).hex()
RING = ufrag.Keyring.parse(KEY)
OFFER = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\n"
ANSWER = "v=0\r\na=ice-ufrag:x\r\n"
CALLS = "/v1/realtime/calls"
RELAYS = ["127.0.0.1:3478", "[2001:db8::1]:3478"]

ALLOW_HEADERS = "authorization, content-type, if-match, etag, x-openai-agents-sdk, openai-beta"
ALLOW_METHODS = "OPTIONS, GET, POST, PATCH, DELETE"
EXPOSE_HEADERS = "location, etag, link, accept-post, accept-patch, access-control-allow-methods"


class FakeTransceiver:
    """The control API, with an answer that a test can change."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.calls: set[str] = set()
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.hangs = False
        self.nonces = itertools.count(1)
        self.port = 0
        self.released = asyncio.Event()

    async def create(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        if self.hangs:
            await self.released.wait()
        if self.refusal is not None:
            status, body = self.refusal
            return web.json_response(body, status=status)
        call_id = mint(self.port, next(self.nonces))
        self.calls.add(call_id)
        return web.json_response({"call_id": call_id, "answer": ANSWER}, status=201)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["id"] not in self.calls:
            return web.json_response({"error": {"code": "call_id_not_found"}}, status=404)
        self.calls.remove(request.match_info["id"])
        return web.json_response({})

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"state": "serving", "sessions": len(self.calls), "sessions_max": 10}
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/sessions", self.create),
            web.delete("/v1/sessions/{id}", self.delete),
            web.get("/v1/health", self.health),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeTransceiver"]:
        app = web.Application()
        app.router.add_routes(self.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            self.released.set()
            await runner.cleanup()


def mint(port: int, nonce: int, ring: ufrag.Keyring = RING) -> str:
    cluster = ufrag.Cluster(1, endpoints.Prefix("127.0.0.0/8").network, 1024, 65535)
    address = endpoints.Endpoint("127.0.0.1:1").address
    return ufrag.call_id(ufrag.mint(ring, cluster, address, port, nonce))


def write_settings(folder: Path, ports: list[int], more: str = "") -> Path:
    """A settings file with its key file, for transceivers on these ports."""
    keys = folder / "keys"
    if not keys.exists():
        keys.touch(mode=0o600)
        keys.write_text(KEY)
    path = folder / "signaling.toml"
    path.write_text(
        f"""
        [signaling]
        listen = "127.0.0.1:0"
        relays = {RELAYS}
        transceivers = {[f"127.0.0.1:{port}" for port in ports]}
        {more}
        [keys]
        file = "keys"
        [[cluster]]
        id = 1
        prefix = "127.0.0.0/8"
        ports = [1024, 65535]
        """
    )
    return path


class Stage:
    """Signaling, the fakes behind it, and an HTTP client in front."""

    def __init__(
        self, http: aiohttp.ClientSession, entrance: signaling.Entrance, at: tuple[str, int]
    ):
        self.http = http
        self.entrance = entrance
        self.door = entrance.door
        self.at = at
        self.fakes: list[FakeTransceiver] = []

    async def error(self, status: int, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Make a request that must fail with this status; what its body says."""
        async with self.http.request(method, path, **request) as response:
            body = await response.json()
            assert response.status == status, body
            assert list(body) == ["error"]
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["message"]
            assert body["error"]["code"]
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            return {**body["error"], "headers": response.headers}

    async def call(self, **request: Any) -> str:
        """Place a call that must succeed; its Location."""
        async with self.http.post(CALLS, **request) as response:
            assert response.status == 201, await response.text()
            assert response.content_type == "application/sdp"
            assert await response.text() == ANSWER
            return response.headers["Location"]

    def counted(self) -> dict[str, int]:
        counters = self.door.counters
        kinds = [kind for kind in metrics.Signaling if not kind.gauge]
        return {kind.name: counters[kind] for kind in kinds if counters[kind]}


@asynccontextmanager
async def staged(folder: Path, fakes: int = 1, more: str = "") -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(FakeTransceiver().running()) for _ in range(fakes)
        ]
        # A port that was free a moment ago stands for a transceiver that has died.
        path = write_settings(folder, [fake.port for fake in running] or [unused_port()], more)
        entrance = signaling.Entrance(settings.load(path, settings.Signaling))
        runner = web.AppRunner(entrance.application())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        at = runner.addresses[0]
        http = aiohttp.ClientSession(f"http://{at[0]}:{at[1]}")
        stage = Stage(await stack.enter_async_context(http), entrance, at)
        stage.fakes = running
        yield stage


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def sdp(text: str | bytes = OFFER) -> dict[str, Any]:
    return {"data": text, "headers": {"Content-Type": "application/sdp"}}


def test_an_offer_in_each_form_is_placed_and_answered(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            (fake,) = stage.fakes
            location = await stage.call(params={"model": "parrot-1"}, **sdp())
            assert location == f"{CALLS}/{mint(fake.port, 1)}"
            placed = fake.requests.pop()
            assert re.fullmatch("[0-9a-f]{8}", placed.pop("request_id"))
            assert placed == {
                "offer": OFFER,
                "session": None,
                "model": "parrot-1",
                "key": "",
                "dialect": "realtime",
                "resume": None,
                "candidates": [["127.0.0.1", 3478], ["2001:db8::1", 3478]],
                "site": "",
            }
            session = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
            await stage.call(json={"sdp": OFFER, "session": session})
            assert fake.requests.pop()["session"] == session
            await stage.call(json={"sdp": OFFER})
            assert fake.requests.pop()["session"] is None
            assert stage.counted() == {"OFFERS": 3, "ANSWERED": 3}

    asyncio.run(run())


@pytest.mark.parametrize("with_type", [False, True], ids=["bare", "typed"])
@pytest.mark.parametrize("filename", [False, True], ids=["field", "file"])
def test_a_form_comes_with_or_without_types_and_file_names(
    tmp_path: Path, with_type: bool, filename: bool
) -> None:
    def part(name: str, content: str, kind: str) -> str:
        head = f'Content-Disposition: form-data; name="{name}"'
        head += f'; filename="{name}.bin"' if filename else ""
        head += f"\r\nContent-Type: {kind}" if with_type else ""
        return f"--b0\r\n{head}\r\n\r\n{content}\r\n"

    body = part("sdp", OFFER, "application/sdp")
    body += part("session", '{"instructions": "höflich"}', "application/json") + "--b0--\r\n"
    headers = {"Content-Type": 'multipart/form-data; boundary="b0"'}

    async def run() -> None:
        async with staged(tmp_path) as stage:
            await stage.call(data=body.encode(), headers=headers)
            placed = stage.fakes[0].requests.pop()
            assert placed["offer"] == OFFER
            assert placed["session"] == {"instructions": "höflich"}

    asyncio.run(run())


def typed(kind: str, data: bytes | str) -> dict[str, Any]:
    return {"data": data, "headers": {"Content-Type": kind}}


FORM = "multipart/form-data; boundary=b"
CUT_OFF = '--b\r\nContent-Disposition: form-data; name="sdp"\r\n\r\nv=0'
BROKEN: dict[str, tuple[int, dict[str, Any], str, str | None]] = {
    "empty": (400, sdp(""), "missing_offer", "sdp"),
    "white space": (400, sdp(" \r\n"), "missing_offer", "sdp"),
    "binary": (400, sdp(b"\xff\xfe\x00"), "invalid_offer", "sdp"),
    "no type": (415, typed("", b"x"), "unsupported_media_type", None),
    "plain text": (415, typed("text/plain", OFFER), "unsupported_media_type", None),
    "cut json": (400, typed("application/json", "{"), "invalid_json", None),
    "json list": (400, {"json": [1]}, "invalid_json", None),
    "json without sdp": (400, {"json": {}}, "missing_offer", "sdp"),
    "json with a number": (400, {"json": {"sdp": 7}}, "missing_offer", "sdp"),
    "session list": (400, {"json": {"sdp": OFFER, "session": []}}, "invalid_session", "session"),
    "form without boundary": (400, typed("multipart/form-data", b"x"), "invalid_form", None),
    "form of garbage": (400, typed(FORM, b"\x00--b"), "invalid_form", None),
    "cut form": (400, typed(FORM, CUT_OFF), "invalid_form", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_request_that_is_no_offer_says_why(tmp_path: Path, name: str) -> None:
    status, request, code, param = BROKEN[name]

    async def run() -> None:
        async with staged(tmp_path) as stage:
            error = await stage.error(status, "POST", CALLS, **request)
            assert (error["code"], error["param"]) == (code, param)
            assert error["type"] == "invalid_request_error"
            assert not stage.fakes[0].requests
            assert stage.counted() == {"OFFERS": 1, "REFUSED_OFFER": 1}

    asyncio.run(run())


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_an_offer_over_the_limit_gets_413(tmp_path: Path, chunked: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield bytes(64)

    async def run() -> None:
        async with staged(tmp_path, more="offer_octets_max = 4096") as stage:
            data = body() if chunked else bytes(4097)
            headers = {"Content-Type": "application/sdp"}
            error = await stage.error(413, "POST", CALLS, data=data, headers=headers)
            assert error["message"] == "The request is larger than 4096 octets."
            await stage.call(**sdp(OFFER.ljust(4096)))

    asyncio.run(run())


def test_a_body_that_trickles_in_gets_408(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BODY_DEADLINE_S", 0.05)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            reader, writer = await asyncio.open_connection(*stage.at)
            head = f"POST {CALLS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/sdp\r\n"
            writer.write(f"{head}Content-Length: 100\r\n\r\nv=0".encode())
            assert b"408" in await reader.readline()
            writer.close()
            await writer.wait_closed()

    asyncio.run(run())


def test_the_transceivers_sentence_about_an_offer_reaches_the_client(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=2) as stage:
            for fake in stage.fakes:
                error = {"message": "The offer has no fingerprint.", "code": "bad_sdp"}
                fake.refusal = (400, {"error": error})
            error = await stage.error(400, "POST", CALLS, **sdp())
            assert (error["message"], error["code"]) == ("The offer has no fingerprint.", "bad_sdp")
            # One transceiver's no to an offer is every transceiver's no.
            assert sum(len(fake.requests) for fake in stage.fakes) == 1

    asyncio.run(run())


@pytest.mark.parametrize("trouble", ["full", "failing", "hanging", "gone"])
def test_the_next_transceiver_is_asked_when_one_cannot(tmp_path: Path, trouble: str) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=2) as stage:
            bad, good = stage.fakes
            bad.hangs = trouble == "hanging"
            if trouble in ("full", "failing"):
                bad.refusal = (503 if trouble == "full" else 500, {})
            peer = stage.door.placement.peers[0]
            if trouble == "gone":
                peer.endpoint = endpoints.Endpoint(f"127.0.0.1:{unused_port()}")
            # Chance decides who is asked first: in enough calls the bad one surely is.
            for _ in range(8):
                await stage.call(**sdp())
                peer.heard(presence.Report(sessions_max=10), 0.0)
            assert len(good.calls) == 8
            assert not bad.calls

    asyncio.run(run())


@pytest.mark.parametrize("trouble", ["full", "gone"])
def test_no_transceiver_means_503_and_when_to_come_back(tmp_path: Path, trouble: str) -> None:
    async def run() -> None:
        fakes = 2 if trouble == "full" else 0
        async with staged(tmp_path, fakes, more="retry_after_s = 7") as stage:
            for fake in stage.fakes:
                fake.refusal = (503, {})
            error = await stage.error(503, "POST", CALLS, **sdp())
            assert error["headers"]["Retry-After"] == "7"
            assert error["type"] == "server_error"
            assert stage.counted()["REFUSED_FULL"] == 1

    asyncio.run(run())


def test_a_call_is_hung_up_at_its_owner(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=2) as stage:
            for way in (("POST", "/hangup"), ("DELETE", "")):
                location = await stage.call(**sdp())
                method, suffix = way
                async with stage.http.request(method, location + suffix) as response:
                    assert response.status == 200
                assert not any(fake.calls for fake in stage.fakes)
                error = await stage.error(404, method, location + suffix)
                assert error["code"] == "call_id_not_found"
            assert stage.counted()["HUNG_UP"] == 2

    asyncio.run(run())


def test_a_made_up_call_id_leads_nowhere(tmp_path: Path) -> None:
    other_ring = ufrag.Keyring.parse("0 " + "11" * 32)

    async def run() -> None:
        async with staged(tmp_path) as stage:
            port = stage.fakes[0].port
            good = mint(port, 1)
            forged = good[:-2] + ("AA" if good[-2:] != "AA" else "BB")
            outside = mint(unused_port(), 1)  # authentic, but at no transceiver of the list
            for call_id in ("rtc_", "x", forged, outside, mint(port, 1, other_ring), "%2e%2e%2f"):
                error = await stage.error(404, "POST", f"{CALLS}/{call_id}/hangup")
                assert error["code"] in {"call_id_not_found", "not_found"}

    asyncio.run(run())


def test_a_preflight_gets_exactly_what_clients_ask_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
            for path in (CALLS, f"{CALLS}/rtc_x/hangup"):
                async with stage.http.options(path, headers=asked) as response:
                    assert response.status == 204
                    got = response.headers
                    assert got["Access-Control-Allow-Origin"] == "*"
                    assert got["Access-Control-Allow-Headers"] == ALLOW_HEADERS
                    assert got["Access-Control-Allow-Methods"] == ALLOW_METHODS
                    assert got["Access-Control-Expose-Headers"] == EXPOSE_HEADERS
                    assert int(got["Access-Control-Max-Age"]) >= 7200
            async with stage.http.post(CALLS, **sdp()) as response:
                assert response.headers["Access-Control-Expose-Headers"] == EXPOSE_HEADERS

    asyncio.run(run())


def test_wrong_paths_and_methods_have_bodies_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            await stage.error(404, "GET", "/v1/nothing")
            error = await stage.error(405, "GET", CALLS)
            assert error["headers"]["Allow"] == "POST"

    asyncio.run(run())


def test_the_page_is_served_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<p>hello")
    (folder / "app.js").write_text("1")
    (folder / "notes.txt").write_text("private")

    async def run() -> None:
        async with staged(tmp_path, more='web_dir = "web"') as stage:
            async with stage.http.get("/") as response:
                assert await response.text() == "<p>hello"
                assert response.content_type == "text/html"
                assert "script-src 'self'" in response.headers["Content-Security-Policy"]
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                seen = {"If-None-Match": response.headers["ETag"]}
            async with stage.http.get("/", headers=seen) as response:
                assert response.status == 304
            async with stage.http.get("/app.js") as response:
                assert response.content_type == "text/javascript"
            for path in ("/notes.txt", "/../keys", "/%2e%2e/keys", "/web/index.html"):
                async with stage.http.get(path) as response:
                    assert response.status == 404

    asyncio.run(run())


def test_health_and_metrics_say_how_it_goes(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            await stage.call(**sdp())
            async with stage.http.get("/health") as response:
                assert response.status == 200
                assert (await response.json())["transceivers_serving"] == 1
            assert b"earshot_signaling_answered_total 1.0" in stage.entrance.exposition()
            stage.door.placement.peers[0].failed()
            async with stage.http.get("/health") as response:
                assert response.status == 503

    asyncio.run(run())


def test_it_is_ready_while_an_offer_would_be_taken(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, fakes=2) as stage:

            async def why() -> list[str]:
                async with stage.http.get("/readyz") as response:
                    found: dict[str, Any] = await response.json()
                    assert response.status == (200 if found["ready"] else 503)
                    assert found["ready"] == (not found["why"])
                    return list(found["why"])

            async with asyncio.timeout(20):  # until they have been heard of
                while await why():
                    await asyncio.sleep(0.01)
            first, second = stage.door.placement.peers
            first.health = roster.Health.DRAINING
            assert await why() == []  # one is enough
            second.full = True
            assert await why() == ["no transceiver would take a call"]
            second.full = False
            stage.entrance.stopping = True
            assert await why() == ["it stops"]
            async with stage.http.get("/healthz") as response:
                assert (response.status, await response.text()) == (200, "ok\n")
            async with stage.http.get("/metrics") as response:
                assert response.status == 404  # nobody's business here

    asyncio.run(run())


def run_program(*argv: str | Path) -> "subprocess.Popen[str]":
    program = Path(sys.executable).parent / "signaling"
    return subprocess.Popen([program, *argv], stderr=subprocess.PIPE, text=True)


def test_the_program_says_ready_and_ends_on_sigterm(tmp_path: Path) -> None:
    path = write_settings(tmp_path, [unused_port()])
    with run_program("run", "--config", path) as program:
        assert program.stderr is not None
        try:
            assert any(" ready" in line for line in program.stderr)
        finally:
            program.send_signal(signal.SIGTERM)
        program.stderr.read()
        assert program.wait() == 0


@pytest.mark.parametrize(
    ("port", "more", "sentence"),
    [
        (9000, "offer_octets_max = 7", "signaling.offer_octets_max: "),
        (9000, "colour = 1", "colour"),
        (9000, 'web_dir = "nowhere"', "signaling.web_dir: there is no index.html in"),
        (80, "", "signaling.transceivers: 127.0.0.1:80 is in no cluster"),
    ],
)
def test_check_names_what_is_wrong(tmp_path: Path, port: int, more: str, sentence: str) -> None:
    path = write_settings(tmp_path, [port], more)
    with run_program("check", "--config", path) as program:
        assert program.stderr is not None
        said = program.stderr.read()
        assert sentence in said
        assert program.wait() != 0
