"""Reception: where a request's key stands, over real HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import keys
import reception
import settings
import signaling

from . import test_signaling as stage_of

KEY, LINE = keys.make("shop", bytes(32))
OTHER, OTHER_LINE = keys.make("other", bytes(range(32)))
CALLS = stage_of.CALLS


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def offer(token: str | None = None, **headers: str) -> dict[str, Any]:
    more = bearer(token) if token is not None else {}
    return {
        "data": stage_of.OFFER,
        "headers": {"Content-Type": "application/sdp"} | more | headers,
    }


@contextlib.asynccontextmanager
async def staged(
    folder: Path, more: str = "", text: str = f"{LINE}\n{OTHER_LINE}\n"
) -> AsyncIterator[stage_of.Stage]:
    """Signaling with a file of keys, and a fake behind it."""
    path = folder / "api-keys"
    path.touch(mode=0o600)
    path.write_text(text)
    async with stage_of.staged(folder, more='keys_file = "api-keys"\n' + more) as stage:
        yield stage


def test_a_call_needs_a_key_and_is_its_owners(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            (fake,) = stage.fakes
            location = await stage.call(**offer(KEY))
            assert fake.requests.pop()["key"] == "shop"
            for token, code in ((None, "missing_api_key"), ("sk_" + "x" * 43, "invalid_api_key")):
                for request in (
                    ("POST", CALLS, offer(token)),
                    ("POST", location + "/hangup", offer(token)),
                    ("DELETE", location, offer(token)),
                ):
                    error = await stage.error(401, *request[:2], **request[2])
                    assert (error["code"], error["type"]) == (code, "invalid_request_error")
                    challenge = error["headers"]["WWW-Authenticate"]
                    assert challenge.startswith('Bearer realm="earshot"')
                    assert ('error="invalid_token"' in challenge) == (token is not None)
            assert not fake.requests and fake.calls
            for scheme in ("bearer", "BEARER"):
                await stage.call(**offer(Authorization=f"{scheme} {KEY}"))
            for header in (f"Basic {KEY}", KEY, "Bearer", "Bearer ", "", f"Bearer {KEY} {KEY}"):
                await stage.error(401, "POST", CALLS, **offer(Authorization=header))

    asyncio.run(run())


def test_an_ephemeral_key_brings_its_session_and_makes_no_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path) as stage:
            (fake,) = stage.fakes
            session = {"type": "realtime", "instructions": "short"}
            door = stage.door
            caller = keys.Caller("shop", voucher=keys.hashlib.sha256(KEY.encode()).digest()[:16])
            token, expires_at = door.mint(caller, session, 60)
            await stage.call(**offer(token))
            placed = fake.requests.pop()
            assert (placed["key"], placed["session"]) == ("shop", session)
            assert expires_at > 0
            with pytest.raises(reception.Refusal) as caught:
                door.mint(keys.Caller("shop", ephemeral=True), None, 60)
            assert caught.value.status == 403
            assert 'error="insufficient_scope"' in caught.value.headers["WWW-Authenticate"]
            noise = {"instructions": bytes(range(256)).hex() * 200}
            token, _ = door.mint(caller, noise, 60)
            await stage.call(**offer(token))
            assert fake.requests.pop()["session"] == noise
            expired, _ = door.mint(caller, None, -1)
            error = await stage.error(401, "POST", CALLS, **offer(expired))
            assert error["code"] == "expired_api_key"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ([("Authorization", "Bearer a")], "a"),
        ([("Sec-WebSocket-Protocol", "realtime, openai-insecure-api-key.b")], "b"),
        (
            [
                ("Sec-WebSocket-Protocol", "realtime"),
                ("Sec-WebSocket-Protocol", "openai-insecure-api-key.c"),
            ],
            "c",
        ),
        ([("Authorization", "Bearer a"), ("Sec-WebSocket-Protocol", "x.b")], "a"),
        ([("Sec-WebSocket-Protocol", "realtime")], None),
        ([], None),
    ],
)
def test_where_a_key_stands(headers: list[tuple[str, str]], token: str | None) -> None:
    seen = []

    async def run() -> None:
        async def look(request: web.Request) -> web.Response:
            seen.append(reception.token_of(request))
            return web.Response()

        app = web.Application()
        app.router.add_get("/", look)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0])
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        writer.write(f"GET / HTTP/1.1\r\nHost: x\r\n{lines}Connection: close\r\n\r\n".encode())
        await reader.read()
        writer.close()
        await runner.cleanup()

    asyncio.run(run())
    assert seen == [token]


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        ("nonsense\n", 0o600, "api-keys: line 1: expected a name"),
        (LINE, 0o644, "api-keys: mode 0644 lets others than its owner read the keys: chmod 600"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_ends_the_start(
    tmp_path: Path, text: str, mode: int, sentence: str
) -> None:
    (tmp_path / "api-keys").write_text(text)
    (tmp_path / "api-keys").chmod(mode)
    path = stage_of.write_settings(tmp_path, [9000], 'keys_file = "api-keys"')
    with pytest.raises(settings.SettingsError, match=sentence):
        signaling.Entrance(settings.load(path, settings.Signaling))
