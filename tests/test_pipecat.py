"""Pipecat's offers against the real signaling and a transceiver, through a relay in miniature."""

import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

import metrics
import pipecat

from . import shim
from .test_sdp import AUDIO, SESSION, text
from .test_whip import Site, at_site

OFFER = text([*SESSION, "a=group:BUNDLE 0", *AUDIO])
SERVERS = """
[[ice_server]]
url = "stun:stun.example.net"
[[ice_server]]
url = "turn:turn.example.net"
username = "user"
credential = "password"
"""
Count = metrics.Signaling


def body(sdp: str = OFFER, **fields: Any) -> dict[str, Any]:
    """As the client sends it."""
    return {"sdp": sdp, "type": "offer", "pc_id": None, "restart_pc": False, **fields}


async def ask(site: Site, method: str, path: str, sent: Any, status: int = 200) -> dict[str, Any]:
    async with site.http.request(method, path, json=sent) as response:
        found: dict[str, Any] = await response.json()
        assert response.status == status, found
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        if status >= 400:
            assert found["error"]["message"]
        return found


class Client(shim.Client):
    """A client with a data channel as Pipecat's has it."""

    def __init__(self, site: Site) -> None:
        super().__init__(label="chat")
        self.site = site
        self.pc_id: str | None = None

    async def connect(self, **fields: Any) -> None:
        offered = body(await self.offer(), pc_id=self.pc_id, **fields)
        answer = await ask(self.site, "POST", pipecat.OFFER, offered)
        assert answer["type"] == "answer"
        self.pc_id = answer["pc_id"]
        await self.accept(answer["sdp"])
        await shim.until(lambda: self.channel.readyState == "open")

    def say(self, kind: str, data: Any, message_id: str = "id-1") -> None:
        message = {"label": "rtvi-ai", "type": kind, "id": message_id, "data": data}
        self.channel.send(orjson.dumps(message).decode())

    def kinds(self) -> list[str]:
        return [orjson.loads(message)["type"] for message in self.messages]

    def heard(self, kind: str) -> list[Any]:
        found = [orjson.loads(message) for message in self.messages]
        return [message.get("data") for message in found if message["type"] == kind]


def with_client(
    folder: Path, scenario: Callable[[Client], Awaitable[None]], more: str = ""
) -> None:
    async def run(site: Site) -> None:
        client = Client(site)
        try:
            await scenario(client)
        finally:
            await client.close()

    at_site(folder, run, more)


def test_a_call_from_its_offer_to_its_end(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        await client.connect()
        sessions = client.site.transceiver.sessions
        assert list(sessions) == [client.pc_id]
        assert sessions[client.pc_id or ""].opening.dialect == "rtvi"
        client.channel.send("ping: 1700000000000")
        client.say("client-ready", {"version": "2.1.0", "about": {"library": "test"}})
        await shim.until(lambda: client.heard("bot-ready"))
        candidate = {"candidate": "candidate:1 1 udp 1 a.local 9 typ host", "sdp_mid": "0"}
        sent = {"pc_id": client.pc_id, "candidates": [candidate | {"sdp_mline_index": 0}]}
        answer = await ask(client.site, "PATCH", pipecat.OFFER, sent)
        assert answer == {"status": "success"}
        client.say("send-text", {"content": "Are you there?"})
        await shim.until(lambda: "bot-llm-stopped" in client.kinds())
        assert client.kinds()[:3] == ["bot-ready", "user-llm-text", "bot-llm-started"]
        assert not client.heard("bot-output")[0]["will_be_spoken"], "the parrot reads in silence"
        client.say("disconnect-bot", {})
        await shim.until(lambda: client.heard("signalling") == [None])
        await shim.until(lambda: not sessions)
        await ask(client.site, "PATCH", pipecat.OFFER, sent, 404)
        assert client.site.counted(Count.ANSWERED) == 1

    with_client(tmp_path, scenario)


def test_a_new_connection_goes_on_with_the_conversation(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        await client.connect()
        client.say(
            "send-text", {"content": "My name is Ada.", "options": {"run_immediately": False}}
        )
        first, later = client.pc_id, Client(client.site)
        before = client.site.transceiver.sessions[first or ""]
        await shim.until(lambda: before.record().items)
        later.pc_id = first
        try:
            await later.connect(restart_pc=True)
            assert later.pc_id != first
            assert list(client.site.transceiver.sessions) == [later.pc_id]
            session = client.site.transceiver.sessions[later.pc_id or ""]
            assert "My name is Ada." in str(session.opening.past)
            await shim.until(lambda: later.heard("bot-stopped-speaking"))
            assert not client.heard("signalling"), "the client must not think that the bot has left"
        finally:
            await later.close()

    with_client(tmp_path, scenario)


def test_a_conversation_that_is_gone_begins_anew(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        client.pc_id = "SmallWebRTCConnection#0-2b5d"
        await client.connect(restart_pc=True)
        await shim.until(lambda: client.heard("error"))
        assert not client.heard("error")[0]["fatal"]

    with_client(tmp_path, scenario)


def test_another_offer_on_the_same_connection(tmp_path: Path) -> None:
    """As the client sends it once it has all its candidates, or if it restarts ICE."""

    async def scenario(site: Site) -> None:
        first = await ask(site, "POST", pipecat.OFFER, body())
        again = body(pc_id=first["pc_id"])
        assert await ask(site, "POST", pipecat.OFFER, again) == first
        restarted = body(OFFER.replace("ufrag:abcd", "ufrag:efgh"), pc_id=first["pc_id"])
        found = await ask(site, "POST", pipecat.OFFER, restarted)
        assert found["pc_id"] == first["pc_id"]
        assert _ice(found["sdp"]) != _ice(first["sdp"])
        assert _others(found["sdp"]) == _others(first["sdp"])
        assert await ask(site, "POST", pipecat.OFFER, restarted) == found
        stranger = OFFER.replace("AB:AB", "CD:CD", 1)
        error = await ask(site, "POST", pipecat.OFFER, body(stranger, pc_id=first["pc_id"]), 400)
        assert error["error"]["code"] == "invalid_offer"
        assert len(site.transceiver.sessions) == 1
        await ask(site, "POST", pipecat.OFFER, body(pc_id="rtc_unknown"), 404)

    at_site(tmp_path, scenario)


def _ice(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if line.startswith("a=ice-")]


def _others(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if not line.startswith("a=ice-")]


@pytest.mark.parametrize("name", ["requestData", "request_data"])
def test_settings_come_with_the_applications_data(tmp_path: Path, name: str) -> None:
    async def scenario(site: Site) -> None:
        session = {"instructions": "Be brief."}
        data = {"session": session, "model": "parrot", "favourite": "colour"}
        await ask(site, "POST", pipecat.OFFER, body(**{name: data}))
        (call,) = site.transceiver.sessions.values()
        asked = call.opening.session or {}
        assert (asked["instructions"], asked["model"]) == ("Be brief.", "parrot")
        assert asked["audio"]["input"]["transcription"]

    at_site(tmp_path, scenario)


def test_an_ephemeral_keys_session_is_kept_where_the_application_says_nothing(
    tmp_path: Path,
) -> None:
    async def run(site: Site) -> None:
        kept = {"instructions": "Be brief.", "audio": {"output": {"voice": "a"}}}
        secret = await ask(site, "POST", "/v1/realtime/client_secrets", {"session": kept})
        bearer = {"Authorization": f"Bearer {secret['value']}"}
        given = {"session": {"audio": {"output": {"voice": "b"}}}}
        sent = body(requestData=given)
        async with site.http.post(pipecat.OFFER, json=sent, headers=bearer) as response:
            pc_id = (await response.json())["pc_id"]
        session = site.transceiver.sessions[pc_id].opening.session
        assert session == pipecat.realtime.merged(kept | pipecat.SETTINGS, given["session"])

    at_site(tmp_path, run)


def test_a_client_that_asks_first_where_to_offer(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        data = {"session": {"instructions": "Be brief."}}
        started = await ask(site, "POST", pipecat.START, {"transport": "webrtc", "body": data})
        servers = started["iceConfig"]["iceServers"]
        assert servers == [
            {"urls": "stun:stun.example.net"},
            {"urls": "turn:turn.example.net", "username": "user", "credential": "password"},
        ]
        assert "brief" not in started["sessionId"]
        path = f"/sessions/{started['sessionId']}/api/offer"
        answer = await ask(site, "POST", path, body())
        (call,) = site.transceiver.sessions.values()
        assert (call.opening.session or {})["instructions"] == "Be brief."
        sent = {"pc_id": answer["pc_id"], "candidates": []}
        assert await ask(site, "PATCH", path, sent) == {"status": "success"}
        await ask(site, "POST", "/sessions/none/api/offer", body(), 404)
        await ask(site, "POST", path[:-20] + "A" + path[-19:], body(), 404)
        large = {"body": {"session": {"instructions": "x" * 10_000}}}
        await ask(site, "POST", pipecat.START, large, 400)
        await ask(site, "POST", pipecat.START, {"transport": "daily"}, 400)

    at_site(tmp_path, scenario, SERVERS)


def test_where_to_offer_is_sealed_under_the_secrets_that_there_are(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        before = await ask(site, "POST", pipecat.START, {})
        secrets = site.door.config.keys.file
        secrets.write_text(f"{secrets.read_text()}\n5 {'cd' * 32}\n")
        site.door.placement.reload(site.door.config)
        after = await ask(site, "POST", pipecat.START, {})
        assert base64.urlsafe_b64decode(after["sessionId"])[0] >> 5 == 5
        for started in (before, after):
            await ask(site, "POST", f"/sessions/{started['sessionId']}/api/offer", body())

    at_site(tmp_path, scenario)


def test_to_start_takes_no_body(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        headers = {"Content-Type": "application/json"}
        async with site.http.post(pipecat.START, headers=headers) as response:
            found = await response.json()
            assert response.status == 200
        assert list(found) == ["sessionId"]
        await ask(site, "POST", f"/sessions/{found['sessionId']}/api/offer", body())

    at_site(tmp_path, scenario)


CANDIDATE = {"candidate": ""}
WRONG = {
    "no sdp": ("POST", {"type": "offer"}),
    "an empty sdp": ("POST", body("")),
    "sdp that is none": ("POST", body("hello")),
    "sdp of another type": ("POST", body(sdp=7)),  # type: ignore[arg-type]
    "an answer": ("POST", body(type="answer")),
    "a list": ("POST", []),
    "pc_id of another type": ("POST", body(pc_id=7)),
    "a long pc_id": ("POST", body(pc_id="x" * 1_000)),
    "a session of another type": ("POST", body(requestData={"session": "x"})),
    "no pc_id": ("PATCH", {"candidates": [CANDIDATE]}),
    "no candidates": ("PATCH", {"pc_id": "rtc_x"}),
    "many candidates": ("PATCH", {"pc_id": "rtc_x", "candidates": [CANDIDATE] * 65}),
    "candidates of another type": ("PATCH", {"pc_id": "rtc_x", "candidates": ["x"]}),
}


def test_what_is_wrong_with_a_request_is_said(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for name, (method, sent) in WRONG.items():
            found = await ask(site, method, pipecat.OFFER, sent, 400)
            assert found["error"]["type"] == "invalid_request_error", name
        await ask(site, "PATCH", pipecat.OFFER, {"pc_id": "rtc_x", "candidates": []}, 404)
        await site.error(400, "POST", pipecat.OFFER, data=b"{", headers=JSON)
        await site.error(415, "POST", pipecat.OFFER, data="v=0")
        await site.error(413, "POST", pipecat.OFFER, data=b" " * (1 << 20), headers=JSON)
        await site.error(413, "PATCH", pipecat.OFFER, data=b" " * 70_000, headers=JSON)
        await site.error(405, "DELETE", pipecat.OFFER)
        assert not site.transceiver.sessions
        assert site.counted(Count.OFFERS) == site.counted(Count.REFUSED_OFFER)

    at_site(tmp_path, scenario)


JSON = {"Content-Type": "application/json"}


def test_pages_of_other_origins_may_ask(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        for path in (pipecat.OFFER, pipecat.START, "/sessions/x/api/offer"):
            async with site.http.options(path) as response:
                assert response.status == 204
                assert "content-type" in response.headers["Access-Control-Allow-Headers"]
                assert "PATCH" in response.headers["Access-Control-Allow-Methods"]

    at_site(tmp_path, scenario)
