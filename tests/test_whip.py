"""WHIP against the real signaling and a real transceiver, through a relay in miniature."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiortc.mediastreams import AudioStreamTrack

import keys
import metrics
import sdp
import sdpfrag
import settings
import signaling
import transceiver
import ufrag
import whip

from . import shim
from .test_sdp import AUDIO, BROWSER, SESSION, text
from .test_transceiver import configure, free_port

OFFER = text([*SESSION, "a=group:BUNDLE 0", *AUDIO]).replace("sendrecv", "sendonly")
FRAGMENT = (
    "a=group:BUNDLE 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n"
    "a=ice-ufrag:{ufrag}\r\na=ice-pwd:{password}\r\n"
    "a=candidate:1 1 udp 2122260223 8a5f-02.local 61764 typ host\r\n"
    "a=candidate:2 1 tcp 1518280447 192.0.2.1 9 typ host tcptype active\r\n"
)
TRICKLED = FRAGMENT.format(ufrag="abcd", password="0123456789012345678901")  # as in OFFER
RESTARTED = FRAGMENT.format(ufrag="efgh", password="1" * 24)
LINKS = """
[[ice_server]]
url = "stun:stun.example.net"
[[ice_server]]
url = "turn:turn.example.net?transport=tcp"
username = "us\\"er"
credential = "pass word"
"""


class Site:
    """A transceiver, signaling before it, and an HTTP client."""

    def __init__(self) -> None:
        self.transceiver: transceiver.Transceiver
        self.shim: shim.Shim
        self.door: Any
        self.http: aiohttp.ClientSession

    async def post(self, status: int = 201, path: str = whip.PATH, **request: Any) -> Any:
        """POST an offer; headers, and the answer as text."""
        request = {"data": OFFER, "headers": {"Content-Type": whip.SDP}, **request}
        async with self.http.post(path, allow_redirects=False, **request) as response:
            body = await response.text()
            assert response.status == status, body
            return response.headers, body

    async def patch(self, status: int, path: str, body: str | bytes, etag: str | None) -> Any:
        """PATCH a fragment; headers, and the body as text."""
        headers = {"Content-Type": sdpfrag.CONTENT_TYPE}
        if etag is not None:
            headers["If-Match"] = etag
        async with self.http.patch(path, data=body, headers=headers) as response:
            found = await response.text()
            assert response.status == status, found
            return response.headers, found

    async def error(self, status: int, method: str, path: str, **request: Any) -> Any:
        """What the body of an error says; and its headers."""
        async with self.http.request(method, path, **request) as response:
            body = await response.json()
            assert response.status == status, body
            assert body["error"]["message"]
            return body["error"], response.headers

    def counted(self, kind: metrics.Signaling) -> int:
        return int(self.door.counters[kind])


@asynccontextmanager
async def site(
    folder: Path, more: str = "", limits: str = "", table: str = ""
) -> AsyncIterator[Site]:
    found = Site()
    async with AsyncExitStack() as stack:
        config = settings.load(configure(folder, limits=limits), settings.Transceiver)
        found.transceiver = transceiver.Transceiver(config)
        await found.transceiver.start()
        stack.push_async_callback(found.transceiver.stop)
        at = config.transceiver.listen
        found.shim = shim.Shim((at.host, at.port))
        stack.callback(found.shim.close)
        entrance = signaling.Entrance(configured(folder, found.shim.address, str(at), more, table))
        found.door = entrance.door
        runner = web.AppRunner(entrance.application())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        http = aiohttp.ClientSession(f"http://{host}:{port}")
        found.http = await stack.enter_async_context(http)
        yield found


def configured(
    folder: Path, relay: tuple[str, int], transceivers: str, more: str, table: str = ""
) -> settings.Signaling:
    path = folder / "signaling.toml"
    path.write_text(
        f"""
        [signaling]
        listen = "127.0.0.1:0"
        relays = ["{relay[0]}:{relay[1]}"]
        transceivers = ["{transceivers}"]
        retry_after_s = 7
        {table}
        [keys]
        file = "keys"
        [[cluster]]
        id = 1
        prefix = "127.0.0.0/8"
        ports = [1, 65535]
        {more}
        """
    )
    return settings.load(path, settings.Signaling)


def at_site(
    folder: Path,
    scenario: Callable[[Site], Awaitable[None]],
    more: str = "",
    limits: str = "",
    table: str = "",
) -> None:
    async def run() -> None:
        async with site(folder, more, limits, table) as found:
            await scenario(found)

    asyncio.run(run())


def test_an_offer_becomes_a_resource_with_all_that_an_encoder_needs(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers, answer = await site.post()
        (session,) = site.transceiver.sessions.values()
        assert headers["Content-Type"] == "application/sdp"
        assert headers["Location"] == f"/whip/{session.call_id}"
        assert headers["ETag"] == f'"{session.etag}"'
        assert headers["Accept-Patch"] == "application/trickle-ice-sdpfrag"
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert (
            "location, etag, link, accept-post, accept-patch"
            in (headers["Access-Control-Expose-Headers"])
        )
        assert headers.getall("Link") == [
            '<stun:stun.example.net>; rel="ice-server"',
            '<turn:turn.example.net?transport=tcp>; rel="ice-server"; username="us\\"er";'
            ' credential="pass word"; credential-type="password"',
        ]
        lines = answer.split("\r\n")
        assert "a=recvonly" in lines  # the answer to sendonly
        assert not any(line.startswith("a=msid:") for line in lines)
        host, port = site.shim.address
        assert f"a=candidate:1 1 udp 2130706431 {host} {port} typ host" in lines

    at_site(tmp_path, scenario, LINKS)


def test_the_model_is_asked_for_in_the_query(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.post(path="/whip?model=parrot-1")
        (session,) = site.transceiver.sessions.values()
        assert (session.opening.session, session.opening.dialect) == (
            {"model": "parrot-1"},
            "realtime",
        )

    at_site(tmp_path, scenario)


def test_candidates_are_taken_with_the_etag_of_the_session(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers, _ = await site.post()
        where, etag = headers["Location"], headers["ETag"]
        for named in (etag, f'"other", {etag}'):
            headers, body = await site.patch(204, where, TRICKLED, named)
            assert body == ""
        await site.patch(204, where, "a=end-of-candidates\r\n", etag)
        (session,) = site.transceiver.sessions.values()
        assert session.etag == etag.strip('"')

    at_site(tmp_path, scenario)


@pytest.mark.parametrize("etag", ["*", '"*"'], ids=["star", "as in the examples"])
def test_a_restart_gives_both_sides_new_credentials(tmp_path: Path, etag: str) -> None:
    async def scenario(site: Site) -> None:
        first, answer = await site.post()
        where = first["Location"]
        headers, body = await site.patch(200, where, RESTARTED, etag)
        assert headers["Content-Type"] == "application/trickle-ice-sdpfrag"
        assert headers["ETag"] != first["ETag"]
        ours = sdpfrag.read(body)
        assert f"a=ice-ufrag:{ours.ufrag}\r\n" not in answer
        assert (ours.mid, ours.candidates, ours.ended) == ("0", 1, True)
        (session,) = site.transceiver.sessions.values()
        assert headers["ETag"] == f'"{session.etag}"'
        # From here on the old ETag is outdated, and the new one is good.
        error, _ = await site.error(412, "PATCH", where, **fragment(TRICKLED, first["ETag"]))
        assert error["code"] == "precondition_failed"
        await site.patch(204, where, RESTARTED, headers["ETag"])

    at_site(tmp_path, scenario)


def test_a_star_with_the_credentials_of_the_offer_is_no_restart(tmp_path: Path) -> None:
    """Some clients trickle so, and none of them wants to be thrown out of its session for it."""

    async def scenario(site: Site) -> None:
        first, _ = await site.post()
        headers, _ = await site.patch(204, first["Location"], TRICKLED, "*")
        assert headers["ETag"] == first["ETag"]

    at_site(tmp_path, scenario)


def test_a_restart_whose_answer_was_lost_is_answered_again(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers, _ = await site.post()
        first, second = [await site.patch(200, headers["Location"], RESTARTED, "*") for _ in "12"]
        assert first[1] == second[1]
        assert first[0]["ETag"] == second[0]["ETag"] != headers["ETag"]
        another = FRAGMENT.format(ufrag="ijkl", password="2" * 24)
        third = await site.patch(200, headers["Location"], another, "*")
        assert third[1] != first[1]

    at_site(tmp_path, scenario)


def fragment(body: str | bytes, etag: str | None, kind: str = sdpfrag.CONTENT_TYPE) -> Any:
    headers = {"Content-Type": kind, **({} if etag is None else {"If-Match": etag})}
    return {"data": body, "headers": headers}


def test_a_patch_that_cannot_be_is_told_why_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers, _ = await site.post()
        where, etag = headers["Location"], headers["ETag"]
        refused = {
            "no If-Match": (428, fragment(TRICKLED, None), "precondition_required"),
            "wrong": (412, fragment(TRICKLED, '"other"'), "precondition_failed"),
            "weak": (412, fragment(TRICKLED, "W/" + etag), "precondition_failed"),
            "no tag": (400, fragment(TRICKLED, etag.strip('"')), "invalid_request"),
            "long": (400, fragment(TRICKLED, ", ".join(['"x"'] * 400)), "invalid_request"),
            "type": (415, fragment(TRICKLED, etag, whip.SDP), "unsupported_media_type"),
            "empty": (400, fragment("", etag), "invalid_fragment"),
            "an offer": (400, fragment(OFFER, etag), "invalid_fragment"),
            "binary": (400, fragment(b"\xff\x00", etag), "invalid_fragment"),
            "large": (413, fragment("a=x:\r\n" * 4096, etag), "request_too_large"),
            "no pair": (400, fragment("a=end-of-candidates\r\n", "*"), "invalid_fragment"),
        }
        for name, (status, request, code) in refused.items():
            error, got = await site.error(status, "PATCH", where, **request)
            assert error["code"] == code, name
            if status == 415:
                assert got["Accept-Patch"] == sdpfrag.CONTENT_TYPE
        (session,) = site.transceiver.sessions.values()
        assert f'"{session.etag}"' == etag
        await site.patch(204, where, TRICKLED, etag)

    at_site(tmp_path, scenario)


def test_a_call_is_deleted_and_deleted_again(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers, _ = await site.post()
        where = headers["Location"]
        for _ in range(2):
            # RFC 9725 section 4.3.1: an ETag has no meaning here and is left aside.
            async with site.http.delete(where, headers={"If-Match": '"other"'}) as response:
                assert response.status == 200
        assert not site.transceiver.sessions
        assert site.counted(metrics.Signaling.HUNG_UP) == 1
        error, _ = await site.error(404, "PATCH", where, **fragment(RESTARTED, "*"))
        assert error["code"] == "call_id_not_found"
        await site.error(404, "PATCH", where, **fragment(TRICKLED, headers["ETag"]))

    at_site(tmp_path, scenario)


def test_an_id_that_is_none_of_ours_leads_nowhere(tmp_path: Path) -> None:
    other = ufrag.Keyring.parse("0 " + "11" * 32)

    async def scenario(site: Site) -> None:
        headers, _ = await site.post()
        call_id = headers["Location"].rpartition("/")[2]
        at = site.transceiver.limits.listen
        cluster = ufrag.Cluster(1, at_prefix(), 1, 65535)
        foreign = ufrag.call_id(ufrag.mint(other, cluster, at.address, at.port, 1))
        end = len(call_id) - ufrag.SECRET_CHARACTERS
        turned = "AA" if call_id[end - 2 : end] != "AA" else "BB"
        forged = call_id[: end - 2] + turned + call_id[end:]
        for path in ("rtc_", "x", forged, foreign, "%2e%2e%2fhealth"):
            for method in ("DELETE", "PATCH"):
                error, _ = await site.error(
                    404, method, f"/whip/{path}", **fragment(RESTARTED, "*")
                )
                assert error["code"] in ("call_id_not_found", "not_found")
        assert len(site.transceiver.sessions) == 1

    at_site(tmp_path, scenario)


def at_prefix() -> Any:
    return settings.Prefix("127.0.0.0/8").network


def test_every_request_needs_the_key_of_the_call(tmp_path: Path) -> None:
    token, line = keys.make("shop", bytes(32))
    other, other_line = keys.make("other", bytes(range(32)))
    (tmp_path / "api-keys").touch(mode=0o600)
    (tmp_path / "api-keys").write_text(f"{line}\n{other_line}\n")

    def by(key: str, request: Any) -> Any:
        bearer = {"Authorization": f"Bearer {key}"} if key else {}
        return {**request, "headers": request["headers"] | bearer}

    async def scenario(site: Site) -> None:
        posted = {"data": OFFER, "headers": {"Content-Type": whip.SDP}}
        headers, _ = await site.post(**by(token, posted))
        where, etag = headers["Location"], headers["ETag"]
        (session,) = site.transceiver.sessions.values()
        assert session.opening.key == "shop"
        trickle, restart = fragment(TRICKLED, etag), fragment(RESTARTED, "*")
        for method, path, request in (
            ("POST", "/whip", posted),
            ("PATCH", where, trickle),
            ("DELETE", where, {"headers": {}}),
            ("OPTIONS", "/whip", {"headers": {}}),  # it would name a server and its password
        ):
            for key in ("", "sk_nobodys"):
                _, got = await site.error(401, method, path, **by(key, request))
                assert got["WWW-Authenticate"].startswith("Bearer")
        for request in (trickle, restart):
            await site.error(404, "PATCH", where, **by(other, request))
        # To others it is as if it had ended; and that does not end it.
        async with site.http.delete(where, **by(other, {"headers": {}})) as response:
            assert response.status == 200
        assert site.transceiver.sessions
        assert f'"{session.etag}"' == etag
        asked = {"Access-Control-Request-Method": "POST"}
        async with site.http.options("/whip", headers=asked) as response:
            assert response.status == 204
        async with site.http.options("/whip", **by(token, {"headers": {}})) as response:
            assert response.headers.getall("Link")
        async with site.http.delete(where, **by(token, {"headers": {}})) as response:
            assert response.status == 200
        assert not site.transceiver.sessions

    at_site(tmp_path, scenario, LINKS, table='keys_file = "api-keys"')


def test_what_may_be_sent_is_told_to_who_asks(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        async with site.http.options("/whip") as response:
            assert response.status == 204
            assert response.headers["Accept-Post"] == "application/sdp"
            assert len(response.headers.getall("Link")) == 2
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "PATCH"}
        async with site.http.options("/whip", headers=asked) as response:
            assert response.status == 204
            assert "Link" not in response.headers  # a preflight brings no key
            assert "PATCH" in response.headers["Access-Control-Allow-Methods"]
            assert "if-match" in response.headers["Access-Control-Allow-Headers"]
        async with site.http.options("/whip/rtc_x", headers=asked) as response:
            assert response.status == 204
            assert response.headers["Accept-Patch"] == sdpfrag.CONTENT_TYPE
        for path, methods, allowed in (
            ("/whip", ("GET", "PUT", "DELETE", "PATCH"), {"OPTIONS", "POST"}),
            ("/whip/rtc_x", ("GET", "PUT", "POST"), {"OPTIONS", "PATCH", "DELETE"}),
        ):
            for method in methods:
                _, headers = await site.error(405, method, path)
                assert set(headers["Allow"].split(",")) == allowed

    at_site(tmp_path, scenario, LINKS)


def test_offers_are_sdp_and_nothing_else(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for kind in ("application/json", "multipart/form-data; boundary=b", "text/plain"):
            request = {"data": OFFER, "headers": {"Content-Type": kind}}
            error, _ = await site.error(415, "POST", "/whip", **request)
            assert "application/sdp" in error["message"]
        request = {"data": "v=0\r\n", "headers": {"Content-Type": whip.SDP}}
        error, _ = await site.error(400, "POST", "/whip", **request)
        assert error["code"] == "invalid_offer"
        assert not site.transceiver.sessions

    at_site(tmp_path, scenario)


def test_a_full_house_says_when_to_come_back(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.post()
        headers, _ = await site.post(503)
        assert headers["Retry-After"] == "7"

    at_site(tmp_path, scenario, limits="sessions_max = 1")


def test_who_finds_no_room_is_sent_elsewhere_once(tmp_path: Path) -> None:
    more = '[whip]\nelsewhere = "https://other.example/whip?a=b"'

    async def scenario(site: Site) -> None:
        await site.post()
        headers, _ = await site.post(307, path="/whip?model=m%20x")
        assert headers["Location"] == "https://other.example/whip?a=b&model=m%20x&elsewhere"
        # One that was sent here because it is full elsewhere is not sent back.
        headers, _ = await site.post(503, path="/whip?elsewhere")
        assert headers["Retry-After"] == "7"
        assert site.counted(metrics.Signaling.SENT_ELSEWHERE) == 1
        assert site.counted(metrics.Signaling.REFUSED_FULL) == 1

    at_site(tmp_path, scenario, more, "sessions_max = 1")


def test_all_encoders_are_sent_elsewhere_where_that_is_wanted(tmp_path: Path) -> None:
    """And a client that follows, with the same method and body, has its call there."""

    async def scenario(there: Site) -> None:
        host, port = there.http._base_url.host, there.http._base_url.port
        more = f'[whip]\nelsewhere = "http://{host}:{port}/whip"\nelsewhere_when = "always"'
        folder = tmp_path / "here"
        folder.mkdir()
        async with site(folder, more) as here:
            request: Any = {"data": OFFER, "headers": {"Content-Type": whip.SDP}}
            async with here.http.post("/whip", **request) as response:
                assert response.status == 201
                assert [step.status for step in response.history] == [307]
            assert not here.transceiver.sessions
            assert len(there.transceiver.sessions) == 1

    at_site(tmp_path, scenario)


def test_an_encoder_is_heard_through_a_restart_and_until_it_leaves(tmp_path: Path) -> None:
    """aiortc's client, sendonly and without a data channel, as encoders are."""

    async def scenario(site: Site) -> None:
        pc = shim.RTCPeerConnection(shim.RTCConfiguration(iceServers=[]))
        pc.addTransceiver(AudioStreamTrack(), direction="sendonly")
        await pc.setLocalDescription(await pc.createOffer())
        headers, answer = await site.post(data=pc.localDescription.sdp)
        await pc.setRemoteDescription(shim.RTCSessionDescription(answer, "answer"))
        (session,) = site.transceiver.sessions.values()
        await shim.until(lambda: session._receiver.decoded > 10, "speech")
        # The client's new pair, as if it had begun anew; checks under the old one go on to count.
        await site.patch(200, headers["Location"], RESTARTED, "*")
        decoded = session._receiver.decoded
        await shim.until(lambda: session._receiver.decoded > decoded + 10, "speech after it")
        async with site.http.delete(headers["Location"]) as response:
            assert response.status == 200
        await shim.until(lambda: pc.connectionState == "closed", "the goodbye")
        await pc.close()

    at_site(tmp_path, scenario)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ('[[ice_server]]\nurl = "http://x"', "ice_server[0].url"),
        (
            '[[ice_server]]\nurl = "turn:x"\nusername = "u"',
            "ice_server[0]: username and credential go together",
        ),
        ('[whip]\nelsewhere = "ftp://x"', "whip.elsewhere"),
        ('[whip]\nelsewhere_when = "never"', "whip.elsewhere_when"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, more: str, sentence: str) -> None:
    (tmp_path / "keys").touch(mode=0o600)
    with pytest.raises(settings.SettingsError, match=re.escape(sentence)):
        configured(tmp_path, ("127.0.0.1", 1), f"127.0.0.1:{free_port()}", more)


def test_an_answer_to_a_browser_that_calls_by_whip_lets_it_hear(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        _, answer = await site.post(data=text(BROWSER))
        assert "a=sendrecv\r\n" in answer
        assert "a=msid:earshot audio\r\n" in answer
        assert sdp.read_offer(text(BROWSER)).takes_audio

    at_site(tmp_path, scenario)
