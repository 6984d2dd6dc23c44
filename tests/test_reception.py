"""Reception: where a request's key stands, over real HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

import keys
import reception
import settings
import signaling
import ufrag

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


# --- limits ---------------------------------------------------------------------------------------


def slow(name: str) -> str:
    """Three at once and no more while a test lasts; the other limits are at their defaults."""
    return f"[limits]\n{name} = 0.1\nburst_s = 30.0\n"


async def too_many(stage: stage_of.Stage, *request: Any, **more: Any) -> dict[str, Any]:
    error = await stage.error(429, *request, **more)
    assert 1 <= int(error["headers"]["Retry-After"]) <= 10
    assert error["code"] == "rate_limit_exceeded"
    return error


def test_an_address_has_its_limit(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, slow("address_per_s")) as stage:
            location = await stage.call(**offer(KEY))
            for _ in range(2):
                await stage.error(404, "DELETE", f"{CALLS}/rtc_x", **offer(KEY))
            for request in (("POST", CALLS), ("DELETE", location), ("GET", location)):
                await too_many(stage, *request, **offer(OTHER))
            for path in ("/health", "/healthz", "/readyz"):
                for _ in range(5):
                    async with stage.http.get(path) as response:
                        assert response.status == 200

    asyncio.run(run())


def test_wrong_keys_have_theirs_and_right_ones_no_part_in_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, slow("failures_per_s")) as stage:
            for token in (None, "sk_wrong", "ek_wrong"):
                await stage.error(401, "POST", CALLS, **offer(token))
            for token in (None, "sk_wrong", "ek_wrong"):
                await too_many(stage, "POST", CALLS, **offer(token))
            await stage.call(**offer(KEY))

    asyncio.run(run())


def test_a_key_has_its_limit_of_calls_and_ephemeral_keys(tmp_path: Path) -> None:
    secrets = "/v1/realtime/client_secrets"

    async def run() -> None:
        async with staged(tmp_path, slow("key_per_s")) as stage:
            location = await stage.call(**offer(KEY))
            async with stage.http.post(secrets, headers=bearer(KEY)) as response:
                ephemeral = (await response.json())["value"]
            await stage.call(**offer(ephemeral))
            for token in (KEY, ephemeral):
                await too_many(stage, "POST", CALLS, **offer(token))
            await too_many(stage, "POST", secrets, headers=bearer(KEY))
            await stage.call(**offer(OTHER))  # another key's is another one
            async with stage.http.delete(location, headers=bearer(KEY)) as response:
                assert response.status == 200, "what it has it may end"

    asyncio.run(run())


def test_a_line_of_the_file_has_limits_of_its_own(tmp_path: Path) -> None:
    text = f"{LINE} calls=2\n{OTHER_LINE} per_second=0.1\n"

    async def run() -> None:
        async with staged(tmp_path, text=text) as stage:
            for _ in range(2):
                await stage.call(**offer(KEY))
            error = await stage.error(429, "POST", CALLS, **offer(KEY))
            assert error["code"] == "concurrent_calls_exceeded"
            assert error["message"].startswith("This key has 2 calls at once")
            assert error["headers"]["Retry-After"] == "5"
            await stage.call(**offer(OTHER))
            await too_many(stage, "POST", CALLS, **offer(OTHER))

    asyncio.run(run())


def test_calls_that_are_being_placed_count_as_calls(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, text=f"{LINE} calls=2\n") as stage:
            (fake,) = stage.fakes
            fake.hangs = True  # its answers to these two wait until the end
            waiting = [asyncio.create_task(stage.call(**offer(KEY))) for _ in range(2)]
            async with asyncio.timeout(20):
                while len(fake.requests) < 2:
                    await asyncio.sleep(0.01)
            error = await stage.error(429, "POST", CALLS, **offer(KEY))
            assert error["code"] == "concurrent_calls_exceeded"
            fake.hangs = False
            fake.released.set()
            await asyncio.gather(*waiting)

    asyncio.run(run())


def test_behind_a_trusted_proxy_each_client_has_its_own(tmp_path: Path) -> None:
    more = 'trusted_proxies = ["127.0.0.0/8"]\n' + slow("address_per_s")

    async def run() -> None:
        async with staged(tmp_path, more) as stage:

            def comes_from(*addresses: str) -> dict[str, Any]:
                return offer(KEY, **{"X-Forwarded-For": ", ".join(addresses)})

            for number in range(3):
                await stage.call(**comes_from(f"6.6.6.{number}", "203.0.113.1"))
            await too_many(stage, "POST", CALLS, **comes_from("6.6.6.9", "203.0.113.1"))
            await stage.call(**comes_from("203.0.113.2"))
            for number in range(3):  # one customer's network
                await stage.call(**comes_from(f"2001:db8:1:2::{number}"))
            await too_many(stage, "POST", CALLS, **comes_from("2001:db8:1:2:ffff::"))
            await stage.call(**comes_from("2001:db8:1:3::"))

    asyncio.run(run())


def test_from_anybody_else_the_header_is_not_read(tmp_path: Path) -> None:
    more = 'trusted_proxies = ["192.0.2.0/24"]\n' + slow("address_per_s")

    async def run() -> None:
        async with staged(tmp_path, more) as stage:
            for number in range(3):
                await stage.call(**offer(KEY, **{"X-Forwarded-For": f"203.0.113.{number}"}))
            await too_many(stage, "POST", CALLS, **offer(KEY, **{"X-Forwarded-For": "8.8.8.8"}))

    asyncio.run(run())


def test_without_keys_nothing_is_limited_unless_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with stage_of.staged(tmp_path) as stage:
            for _ in range(250):  # more than an address may have where there are keys
                await stage.error(404, "DELETE", f"{CALLS}/rtc_x")
        async with stage_of.staged(tmp_path, more=slow("address_per_s")) as stage:
            for _ in range(3):
                await stage.error(404, "DELETE", f"{CALLS}/rtc_x")
            await too_many(stage, "DELETE", f"{CALLS}/rtc_x")

    asyncio.run(run())


def test_without_keys_no_proxy_lets_others_in(tmp_path: Path) -> None:
    async def run() -> None:
        async with stage_of.staged(tmp_path) as stage:
            for name in ("X-Forwarded-For", "Forwarded"):
                error = await stage.error(403, "POST", CALLS, **offer(**{name: "for=192.0.2.1"}))
                assert error["code"] == "no_api_keys" and "keys_file" in error["message"]
            await stage.call(**offer())
            await stage.call(**offer("whatever"))

    asyncio.run(run())


# --- reload ---------------------------------------------------------------------------------------


def test_a_reload_takes_keys_away_and_brings_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, text=LINE) as stage:
            path, config = tmp_path / "api-keys", stage.door.config
            await stage.call(**offer(KEY))
            await stage.error(401, "POST", CALLS, **offer(OTHER))
            path.write_text(OTHER_LINE)
            stage.door.reception.reload(config)
            await stage.error(401, "POST", CALLS, **offer(KEY))
            await stage.call(**offer(OTHER))
            path.write_text("nonsense")
            with pytest.raises(settings.SettingsError):
                stage.door.reception.reload(config)
            await stage.call(**offer(OTHER))
            without = msgspec.structs.replace(config.signaling, keys_file=None)
            with pytest.raises(settings.SettingsError, match="only a restart can do without keys"):
                stage.door.reception.reload(msgspec.structs.replace(config, signaling=without))
            await stage.error(401, "POST", CALLS, **offer())

    asyncio.run(run())


def test_secrets_rotate_without_a_restart(tmp_path: Path) -> None:
    """The new line first, then the old one away: ephemeral keys and call ids follow."""
    old, new = stage_of.KEY + "\n", "3 " + "33" * 32 + "\n"
    rings = [ufrag.Keyring.parse(text) for text in (old, new)]

    async def run() -> None:
        async with staged(tmp_path) as stage:
            (fake,) = stage.fakes
            path, config, door = tmp_path / "keys", stage.door.config, stage.door

            def reload(text: str) -> None:
                path.write_text(text)
                door.reception.reload(config)
                door.placement.reload(config)

            async def secret() -> str:
                url = "/v1/realtime/client_secrets"
                async with stage.http.post(url, headers=bearer(KEY)) as response:
                    return str((await response.json())["value"])

            async def hung_up(nonce: int, ring: ufrag.Keyring) -> int:
                call_id = stage_of.mint(fake.port, nonce, ring)
                fake.calls.add(call_id)
                async with stage.http.delete(f"{CALLS}/{call_id}", headers=bearer(KEY)) as response:
                    return response.status

            first = await secret()
            assert await hung_up(101, rings[0]) == 200 and await hung_up(102, rings[1]) == 404
            reload(old + new)
            second = await secret()
            for token in (first, second):
                await stage.call(**offer(token))
            assert await hung_up(103, rings[0]) == 200 and await hung_up(104, rings[1]) == 200
            reload(new)
            await stage.error(401, "POST", CALLS, **offer(first))
            await stage.call(**offer(second))
            assert await hung_up(105, rings[0]) == 404 and await hung_up(106, rings[1]) == 200

    asyncio.run(run())
