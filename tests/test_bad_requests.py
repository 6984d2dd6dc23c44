"""Requests that are wrong in every way, to the programs as they run.

Each ends in a 4xx with a message, in bounded time and memory, and nothing of it reaches the
transceiver: its counters and sessions say so.
"""

import asyncio
import ipaddress
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import intake
import keys
import observer
import ufrag

from .premises import OFFER, PATIENCE_S, Premises, open_for_business

CALLS, WHIP, PIPECAT = "/v1/realtime/calls", "/whip", "/api/offer"
SECRETS, SIDEBAND = "/v1/realtime/client_secrets", "/v1/realtime"
SDP = "application/sdp"
RING = ufrag.Keyring.parse("0 " + bytes(range(32)).hex())
KEY, KEY_LINE = keys.make("alice", bytes(range(32)))
GOOD = {"Authorization": f"Bearer {KEY}"}
MORE = """keys_file = "api-keys"
[limits]
# What is refused here is refused for what it is.
address_per_s = 1e5
failures_per_s = 1e5
key_per_s = 1e5
"""
AT_ONCE = 16
TIMES = 2000
"""Bad requests in the measurement of memory."""

GROWTH_OCTETS_MAX = 12 << 20
"""What a process may grow by meanwhile: 6 kB a request would be a leak, and a first burst takes
some megabytes that stay with the allocator."""


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Premises]:
    with open_for_business(tmp_path_factory.mktemp("premises"), MORE, KEY_LINE) as found:
        yield found


def without(pattern: str) -> str:
    return re.sub(rf"(?m)^{pattern}.*\r?\n", "", OFFER)


OFFERS: dict[str, str | bytes] = {
    "empty": "",
    "white space": " \r\n\r\n",
    "binary": bytes(range(256)) * 4,
    "binary that is UTF-8": "\x00\x01\u2028" * 100,
    "no SDP": "hello",
    "only a version": "v=0\r\n",
    "JSON": json.dumps({"sdp": OFFER}),
    "HTML": "<html><body>Bad gateway</body></html>",
    "no audio": OFFER[: OFFER.index("m=audio")],
    "video alone": OFFER[: OFFER.index("m=audio")] + OFFER[OFFER.index("m=video") :],
    "no fingerprint": without("a=fingerprint"),
    "wrong hash": OFFER.replace("a=fingerprint:sha-256", "a=fingerprint:md5"),
    "short fingerprint": re.sub(r"(a=fingerprint:sha-256 [0-9A-F:]{8}).*", r"\1", OFFER),
    "no ufrag": without("a=ice-ufrag"),
    "no password": without("a=ice-pwd"),
    "bad password": re.sub(r"a=ice-pwd:.*", "a=ice-pwd:short", OFFER),
    "unknown codecs": re.sub(r"a=rtpmap:(\d+) \S+", r"a=rtpmap:\1 quack/48000", OFFER).replace(
        " 0 8 13 ", " 13 "
    ),
    "no WebRTC": OFFER.replace("UDP/TLS/RTP/SAVPF", "RTP/AVP"),
    "no multiplexing": without("a=rtcp-mux"),
    "cut in a line": OFFER[:700],
    "a thousand lines of media": OFFER + "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n" * 1000,
}
LARGE = OFFER + "a=x:" + "y" * (1 << 20)

ID = f"rtc_{'A' * 23}"
"""Of the right shape, and forged."""


def authentic(port: int) -> str:
    """An id that a key of ours has made, for a call that never was."""
    home = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1, 65535)
    at = ipaddress.ip_address("127.0.0.1")
    return ufrag.call_id(ufrag.mint(RING, home, at, port, 0xFEEDBEEF))


async def ask(
    premises: Premises,
    http: aiohttp.ClientSession,
    expected: range | tuple[int, ...],
    method: str,
    path: str,
    **request: Any,
) -> dict[str, Any]:
    """Make a request that must be refused: what its body says."""
    request["headers"] = GOOD | request.get("headers", {})
    began = time.monotonic()
    async with http.request(method, premises.url + path, **request) as response:
        text = await response.text()
        assert response.status in expected, f"{method} {path}: {response.status} {text}"
        assert re.fullmatch("[0-9a-f]{8}", response.headers[observer.HEADER])
        error = json.loads(text)["error"]
    assert time.monotonic() - began < PATIENCE_S
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10 and error["code"] and error["type"]
    return dict(error)


@pytest.fixture(autouse=True)
def nothing_reaches_the_transceiver(
    request: pytest.FixtureRequest, premises: Premises
) -> Iterator[None]:
    """Its books after each test are as before."""
    before = premises.counted()
    yield
    after = premises.counted()
    for name in ("opened", "connected", "closed"):
        counter = f"earshot_transceiver_sessions_{name}_total"
        assert after[counter] == before[counter], name
    assert after["earshot_transceiver_sessions"] == 0
    assert premises.signaling.process.poll() is None
    assert not premises.signaling.faults()
    assert not premises.transceiver.faults()


REFUSED = range(400, 500)


@pytest.mark.parametrize("name", OFFERS)
def test_an_offer_that_cannot_be_used_says_why(premises: Premises, name: str) -> None:
    offer = OFFERS[name]

    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            for path in (CALLS, WHIP):
                headers = {"Content-Type": SDP}
                await ask(premises, http, (400,), "POST", path, data=offer, headers=headers)
            form = aiohttp.FormData()
            octets = offer if isinstance(offer, bytes) else offer.encode()
            form.add_field("sdp", octets, filename="sdp")
            form.add_field("session", "{}")
            await ask(premises, http, (400,), "POST", CALLS, data=form)
            if isinstance(offer, str):
                for path in (CALLS, PIPECAT):
                    wanted = {"sdp": offer, "type": "offer"}
                    await ask(premises, http, (400,), "POST", path, json=wanted)

    asyncio.run(run())


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PART = '--b\r\nContent-Disposition: form-data; name="sdp"\r\n\r\nv=0'
START = "/start"
DEEP = json.dumps({"sdp": OFFER, "type": "offer"})[:-1] + ', "session": {"a": %s}}' % (
    "[" * 1000 + "]" * 1000
)
CHARSET = PART.replace("sdp", "_charset_").replace("v=0", "x" * 100) + "\r\n--b--"
NO_OFFER = PART.replace("sdp", "pds") + "\r\n--b--"
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (f"{path}: {name}", path, {"data": data, "headers": JSON})
        for path in (CALLS, PIPECAT, SECRETS)
        for name, data in {
            "cut JSON": "{",
            "a list": "[]",
            "a number": "7",
            "null": "null",
            "binary": b"\xff\xfe\x00",
            "deep": "[" * 50_000,
            "an id of another type": '{"sdp": 7, "session": 7, "type": 7, "pc_id": 7}',
            "lone surrogate": '{"sdp": "\\ud800", "session": "\\ud800"}',
        }.items()
    ),
    *(
        (f"{path}: a thousand levels", path, {"data": DEEP, "headers": JSON})
        for path in (CALLS, PIPECAT, SECRETS, START)
    ),
    ("start: cut JSON", START, {"data": "{", "headers": JSON}),
    ("start: another transport", START, {"json": {"transport": "daily"}}),
    ("start: more than it keeps", START, {"json": {"body": {"session": {"x": "y" * 9000}}}}),
    ("no such session", "/sessions/x/api/offer", {"json": {"sdp": OFFER, "type": "offer"}}),
    ("session is a list", CALLS, {"json": {"sdp": OFFER, "session": []}}),
    ("session in a form is no JSON", CALLS, {"data": {"sdp": OFFER, "session": "{"}}),
    ("no boundary", CALLS, {"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
    ("form of garbage", CALLS, {"data": b"\x00--b", "headers": FORM}),
    ("cut form", CALLS, {"data": PART, "headers": FORM}),
    ("overlong charset", CALLS, {"data": CHARSET, "headers": FORM}),
    ("form without sdp", CALLS, {"data": NO_OFFER, "headers": FORM}),
    ("expiry", SECRETS, {"json": {"expires_after": {"anchor": "created_at", "seconds": 1}}}),
    ("expiry as text", SECRETS, {"json": {"expires_after": "soon"}}),
    ("secret's session", SECRETS, {"json": {"session": {"type": 7, "model": []}}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "request_"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_body_that_cannot_be_read_says_why(
    premises: Premises, path: str, request_: dict[str, Any]
) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            await ask(premises, http, (400, 404, 415), "POST", path, **request_)

    asyncio.run(run())


@pytest.mark.parametrize("path", [CALLS, WHIP, PIPECAT, SECRETS])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_mebibyte_is_too_large(premises: Premises, path: str, chunked: bool) -> None:
    kind = JSON if path in (PIPECAT, SECRETS) else {"Content-Type": SDP}
    body = json.dumps({"sdp": LARGE, "type": "offer"}) if kind is JSON else LARGE

    async def pieces() -> Any:
        for at in range(0, len(body), 8192):
            yield body[at : at + 8192].encode()

    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            data = pieces() if chunked else body
            try:
                await ask(premises, http, (413,), "POST", path, data=data, headers=kind)
            except aiohttp.ClientOSError:  # it closes before all of it has been sent
                pass

    asyncio.run(run())


def test_wrong_methods_and_types(premises: Premises) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            for path in (CALLS, WHIP, PIPECAT, SECRETS):
                for method in ("PUT", "DELETE", "TRACE"):
                    await ask(premises, http, (405, 501), method, path)
            for path in (f"{CALLS}/{ID}/hangup", f"{WHIP}/{ID}"):
                await ask(premises, http, (405,), "PUT", path)
            for kind in (
                "text/plain",
                "application/x-www-form-urlencoded",
                "image/png",
                "nonsense",
            ):
                for path in (CALLS, WHIP):
                    headers = {"Content-Type": kind}
                    await ask(premises, http, (415,), "POST", path, data=OFFER, headers=headers)
            await ask(premises, http, (415,), "POST", WHIP, json={"sdp": OFFER})
            headers = {"Content-Type": SDP, "If-Match": "*"}
            await ask(premises, http, (415,), "PATCH", f"{WHIP}/{ID}", data="x", headers=headers)
            for path in ("/v1/nothing", "/whip/a/b", "/api/nothing", "/nothing", "/..%2f..%2fkeys"):
                await ask(premises, http, (404,), "GET", path)
            await ask(premises, http, (400, 426), "GET", SIDEBAND)
            await ask(premises, http, (426,), "GET", SIDEBAND, params={"call_id": ID})

    asyncio.run(run())


FRAGMENTS: dict[str, tuple[int, str | bytes]] = {
    "empty": (400, ""),
    "binary": (400, bytes(range(128, 256))),
    "no fragment": (400, "hello"),
    "an offer": (400, OFFER),
    "ufrag alone": (400, "a=ice-ufrag:abcd\r\n"),
    "too large": (413, "a=candidate:1 1 udp 1 1.2.3.4 5 typ host\r\n" * 1000),
}


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_that_cannot_be_used_says_why(premises: Premises, name: str) -> None:
    status, data = FRAGMENTS[name]
    headers = {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": "*"}
    path = f"{WHIP}/{authentic(premises.port)}"

    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            await ask(premises, http, (status,), "PATCH", path, data=data, headers=headers)
            for wrong in ("", "x", '"a" "b"', '"' + "x" * 2000 + '"'):
                headers["If-Match"] = wrong
                await ask(premises, http, (400, 428), "PATCH", path, data=data, headers=headers)

    asyncio.run(run())


IDS = [
    "rtc_", "x", "%00", "a" * 4000, "rtc_%2e%2e%2f", "rtc_" + "A" * 22, "rtc_" + "A" * 24,
    "rtc_" + "A" * 23, "rtc_" + "_" * 23, "rtc_\u00e9" + "A" * 21, "RTC_" + "A" * 23,
]  # fmt: skip


def test_unknown_and_forged_ids_of_calls_are_not_found(premises: Premises) -> None:
    good = authentic(premises.port)
    flipped = good[:10] + ("A" if good[10] != "A" else "B") + good[11:]
    elsewhere = authentic(9)  # authentic, and no transceiver of ours

    async def run() -> None:
        fragment = {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": '"x"'}
        pair = "a=ice-ufrag:abcd\r\na=ice-pwd:" + "p" * 24 + "\r\n"
        async with aiohttp.ClientSession() as http:
            for call_id in (*IDS, good, flipped, elsewhere):
                gone = range(400, 411)  # 200 for a DELETE of what was once ours: see below
                path = f"{CALLS}/{call_id}"
                await ask(premises, http, (404,), "POST", f"{path}/hangup")
                await ask(premises, http, (404,), "DELETE", path)
                await ask(premises, http, (404,), "GET", path)
                path = f"{WHIP}/{call_id}"
                request = {"data": pair, "headers": fragment}
                await ask(premises, http, gone, "PATCH", path, **request)
                if call_id not in (good, elsewhere):  # authentic: that such calls ended is no error
                    await ask(premises, http, (404,), "DELETE", path)
                body = {"pc_id": call_id, "candidates": []}
                await ask(premises, http, (400, 404), "PATCH", PIPECAT, json=body)
            for call_id in (good, flipped):
                url = f"{premises.url}{SIDEBAND}?call_id={call_id}"
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.ws_connect(url, headers=GOOD)
                assert refused.value.status == 404

    asyncio.run(run())


def test_without_a_key_nothing_is_read(premises: Premises) -> None:
    wrong = [
        "",
        "Bearer",
        "Bearer x",
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        "Bearer ek_x",
        "\u00e9",
    ]

    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            for authorization in wrong:
                headers = {"Authorization": authorization, "Content-Type": SDP}
                for path in (CALLS, WHIP, SECRETS, f"{CALLS}/{ID}/hangup"):
                    error = await ask(
                        premises, http, (401,), "POST", path, data=OFFER, headers=headers
                    )
                    assert KEY[:-1] not in error["message"]

    asyncio.run(run())


def raw(premises: Premises, octets: bytes, wait_s: float = PATIENCE_S) -> bytes:
    """Send octets and read until the other side closes, or for so long."""
    with socket.create_connection(premises.at, timeout=wait_s) as sock:
        sock.sendall(octets)
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except TimeoutError:
            pass
        return received


def test_what_is_no_http_is_refused_or_closed(premises: Premises) -> None:
    garbage = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS to a plain port
        b"\x00" * 1000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW /v1/realtime/calls HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST " + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/realtime/calls HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/realtime/calls HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /v1/realtime/calls HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/realtime/calls HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    ]
    for octets in garbage:
        answer = raw(premises, octets)
        assert answer == b"" or answer.split()[1].startswith(b"4"), answer[:200]


def test_slow_bodies_end_in_bounded_time(premises: Premises) -> None:
    """An octet a second, from several at once; the time is the limit's, and nobody else waits."""
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 60000\r\n"

    async def slow(path: str, kind: str) -> bytes:
        reader, writer = await asyncio.open_connection(*premises.at)
        request = f"POST {path} HTTP/1.1\r\n{head}Content-Type: {kind}\r\n\r\n"
        writer.write(request.encode())
        answer = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
        began = time.monotonic()
        while not answer.done():
            assert time.monotonic() - began < intake.BODY_DEADLINE_S + PATIENCE_S
            writer.write(b"v")
            await asyncio.wait([answer], timeout=0.5)
        writer.close()
        return await answer

    async def run() -> None:
        paths = [(CALLS, SDP), (CALLS, "multipart/form-data; boundary=b"), (WHIP, SDP)]
        paths += [(PIPECAT, "application/json"), (SECRETS, "application/json")]
        began = time.monotonic()
        waiting = [asyncio.ensure_future(slow(*each)) for each in paths * 4]
        async with aiohttp.ClientSession() as http:  # the others are served meanwhile
            async with http.get(f"{premises.url}/healthz") as response:
                assert response.status == 200
            assert time.monotonic() - began < intake.BODY_DEADLINE_S
        for head in await asyncio.gather(*waiting):
            assert head.split()[1] == b"408", head

    asyncio.run(run())


def test_who_goes_away_in_the_middle_leaves_nothing(premises: Premises) -> None:
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 6000\r\n"
    for path, kind in ((CALLS, SDP), (WHIP, SDP), (PIPECAT, "application/json")) * 20:
        with socket.create_connection(premises.at) as sock:
            sock.sendall(f"POST {path} HTTP/1.1\r\n{head}Content-Type: {kind}\r\n\r\nv=0".encode())
            # Not politely, but as a phone does that loses its network: RST.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + intake.BODY_DEADLINE_S + PATIENCE_S
    while True:
        counted = premises.counted_by_signaling()
        waiting = [n for n, value in counted.items() if "api_in_flight" in n and value]
        if not waiting and not counted["earshot_signaling_connections"]:
            break
        assert time.monotonic() < deadline, waiting
        time.sleep(0.05)


def test_thousands_of_them_leave_nothing_behind(premises: Premises) -> None:
    """Memory and descriptors before and after, with every kind of refusal in the mix."""
    path = Path(f"/proc/{premises.signaling.process.pid}/fd")

    async def burst(times: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as http:

            async def one(number: int) -> None:
                bad = list(OFFERS.values())[number % len(OFFERS)]
                match number % 5:
                    case 0:
                        request: Any = {"data": bad, "headers": {"Content-Type": SDP}}
                        await ask(premises, http, REFUSED, "POST", CALLS, **request)
                    case 1:
                        await ask(premises, http, REFUSED, "POST", CALLS, data=b"{", headers=JSON)
                    case 2:
                        request = {"data": PART, "headers": FORM}
                        await ask(premises, http, REFUSED, "POST", CALLS, **request)
                    case 3:
                        url = f"{CALLS}/rtc_{number:023d}/hangup"
                        await ask(premises, http, REFUSED, "POST", url)
                    case _:
                        headers = {"Content-Type": SDP, "Authorization": "Bearer no"}
                        await ask(premises, http, REFUSED, "POST", WHIP, data=bad, headers=headers)

            waiting = iter(range(times))

            async def worker() -> None:
                for number in waiting:
                    await one(number)

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    asyncio.run(burst(TIMES // 4))  # what a first burst takes stays with the allocator
    programs = premises.signaling, premises.transceiver
    before = [program.resident_octets() for program in programs]
    files = len(list(path.iterdir()))
    lines = len(premises.signaling.lines())
    began = time.monotonic()
    asyncio.run(burst(TIMES))
    took_s = time.monotonic() - began
    grown = [p.resident_octets() - b for p, b in zip(programs, before, strict=True)]
    written = len(premises.signaling.lines()) - lines
    print(
        f"{TIMES} bad requests in {took_s:.1f} s: signaling and transceiver grew by {grown} octets,"
    )
    print(f"{written} lines were written")
    assert max(grown) < GROWTH_OCTETS_MAX
    # Connections to the transceiver are kept for a while, one for each request at a time.
    deadline = time.monotonic() + PATIENCE_S
    while len(list(path.iterdir())) > files + AT_ONCE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert written < observer.REFUSED_LINES_PER_S * (took_s + 2) + 20
