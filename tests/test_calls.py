"""OpenAI's Realtime calls: what only this API promises. The rest is in test_signaling.py."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import calls
from intake import Refusal

from .test_reception import KEY, OTHER, bearer, offer, staged
from .test_signaling import ANSWER, CALLS, OFFER, Stage

SECRETS = "/v1/realtime/client_secrets"

OF_A_SESSION = {
    "type",
    "object",
    "id",
    "model",
    "output_modalities",
    "instructions",
    "tools",
    "tool_choice",
    "max_output_tokens",
    "tracing",
    "prompt",
    "include",
    "audio",
}


def on_stage(folder: Path, scenario: Callable[[Stage], Awaitable[None]]) -> None:
    """Signaling with a file of keys, and one fake transceiver behind it."""

    async def run() -> None:
        async with staged(folder) as stage:
            await scenario(stage)

    asyncio.run(run())


async def minted(stage: Stage, body: Any = None, token: str = KEY) -> dict[str, Any]:
    """An ephemeral key and what comes with it."""
    data = b"" if body is None else orjson.dumps(body)
    async with stage.http.post(SECRETS, data=data, headers=bearer(token)) as response:
        found = await response.json()
        assert response.status == 200, found
        return dict(found)


def test_the_paths_that_its_clients_know() -> None:
    found = {(route.method, route.path) for route in calls.routes(None)}  # type: ignore[arg-type]
    assert ("POST", "/v1/realtime/calls") in found
    assert ("POST", "/v1/realtime/calls/{id}/hangup") in found
    assert ("POST", "/v1/realtime/client_secrets") in found


def test_a_secret_for_nothing_in_particular(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        found = await minted(stage)
        assert set(found) == {"value", "expires_at", "session"}
        assert found["value"].startswith("ek_")
        assert abs(found["expires_at"] - time.time() - 600) < 20
        assert set(found["session"]) == OF_A_SESSION
        assert found["session"]["id"].startswith("sess_")
        assert found["session"]["object"] == "realtime.session"
        assert (await minted(stage, {}))["session"]["id"] != found["session"]["id"]
        # It opens calls as often as one likes, without a session of its own.
        for _ in range(2):
            await stage.call(**offer(found["value"]))
        (fake,) = stage.fakes
        assert [(seen["key"], seen["session"]) for seen in fake.requests] == [("shop", None)] * 2

    on_stage(tmp_path, scenario)


def test_a_secret_shows_the_whole_session_and_carries_what_was_asked_for(tmp_path: Path) -> None:
    asked = {
        "type": "realtime",
        "model": "gpt-realtime",
        "instructions": "Sing.",
        "voice_of_tomorrow": True,
        "audio": {
            "input": {
                "format": {"type": "audio/pcmu"},
                "turn_detection": {
                    "type": "semantic_vad",
                    "eagerness": "low",
                    "model_version": "2",
                    "response_delay_ms": 200,
                },
            },
            "output": {"voice": "marin"},
        },
    }

    async def scenario(stage: Stage) -> None:
        after = {"anchor": "created_at", "seconds": 10}
        found = await minted(stage, {"session": asked, "expires_after": after})
        assert abs(found["expires_at"] - time.time() - 10) < 8
        shown = found["session"]
        assert set(shown) == OF_A_SESSION | {"voice_of_tomorrow"}
        assert (shown["model"], shown["instructions"]) == ("gpt-realtime", "Sing.")
        assert shown["audio"]["output"]["voice"] == "marin"
        assert shown["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24_000}
        assert shown["audio"]["input"]["turn_detection"] == {
            "type": "semantic_vad",
            "eagerness": "low",
            "create_response": True,
            "interrupt_response": True,
            "model_version": "2",
            "min_interruption_duration_ms": 0,
            "response_delay_ms": 200,
        }
        await stage.call(**offer(found["value"]))
        (fake,) = stage.fakes
        assert fake.requests.pop()["session"] == asked

    on_stage(tmp_path, scenario)


def test_what_comes_with_the_call_overrides_the_secret_field_by_field(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        ours = {"instructions": "Sing.", "audio": {"output": {"voice": "marin"}}}
        secret = (await minted(stage, {"session": ours}))["value"]
        theirs = {"type": "realtime", "audio": {"output": {"speed": 1.5}}}
        async with stage.http.post(
            CALLS, json={"sdp": OFFER, "session": theirs}, headers=bearer(secret)
        ) as response:
            assert response.status == 201
        (fake,) = stage.fakes
        assert fake.requests.pop()["session"] == {
            "type": "realtime",
            "instructions": "Sing.",
            "audio": {"output": {"voice": "marin", "speed": 1.5}},
        }

    on_stage(tmp_path, scenario)


DETECTION = "session.audio.input.turn_detection"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"expires_after": 60}, "expires_after"),
        ({"expires_after": {"anchor": "now", "seconds": 60}}, "expires_after.anchor"),
        *(
            ({"expires_after": {"anchor": "created_at", "seconds": wrong}}, "expires_after.seconds")
            for wrong in (9, 7_201, 60.0, "60", True, None, -1, 10**30)
        ),
        ({"expires": {"seconds": 60}}, "expires"),
        ({"session": []}, "session"),
        ({"session": "realtime"}, "session"),
        ({"session": {"type": "transcription"}}, "session.type"),
        ({"session": {"model": 3}}, "session.model"),
        ({"session": {"output_modalities": ["smell"]}}, "session.output_modalities[0]"),
        ({"session": {"audio": 1}}, "session.audio"),
        ({"session": {"audio": {"input": None}}}, "session.audio.input"),
        (
            {"session": {"audio": {"input": {"turn_detection": {"type": "vad"}}}}},
            DETECTION + ".type",
        ),
        (
            {"session": {"audio": {"input": {"turn_detection": {"threshold": 2}}}}},
            DETECTION + ".threshold",
        ),
        (
            {"session": {"audio": {"input": {"turn_detection": {"response_delay_ms": -1}}}}},
            DETECTION + ".response_delay_ms",
        ),
        ({"session": {"instructions": random.Random(1).randbytes(20_000).hex()}}, "session"),
    ],
)
def test_a_secret_that_cannot_be_had_names_the_field(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    async def scenario(stage: Stage) -> None:
        error = await stage.error(400, "POST", SECRETS, json=body, headers=bearer(KEY))
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"

    on_stage(tmp_path, scenario)


def test_a_secret_is_a_matter_of_api_keys(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        error = await stage.error(401, "POST", SECRETS, json={})
        assert error["code"] == "missing_api_key"
        secret = (await minted(stage))["value"]
        error = await stage.error(403, "POST", SECRETS, json={}, headers=bearer(secret))
        assert error["code"] == "insufficient_permissions"
        for data in (b"{", b"[]", b"\xff", b"[" * 10_000):
            error = await stage.error(400, "POST", SECRETS, data=data, headers=bearer(KEY))
            assert error["code"] == "invalid_json"
        await stage.error(405, "GET", SECRETS)
        large = b" " * (1 + stage.door.offer_octets_max)
        await stage.error(413, "POST", SECRETS, data=large, headers=bearer(KEY))
        nested: Any = {}
        for _ in range(200):
            nested = {"x": nested}
        body = orjson.dumps({"session": nested})
        assert (await minted(stage, {"session": {"x": 1}}))["session"]["x"] == 1
        async with stage.http.post(SECRETS, data=body, headers=bearer(KEY)) as response:
            assert response.status in {200, 400}  # and no fault of ours

    on_stage(tmp_path, scenario)


def test_without_keys_a_secret_can_be_had_all_the_same() -> None:
    """Browsers' SDKs insist on an ephemeral key, in development too: see test_agents.py."""
    shown = calls.effective({"model": "m"})
    assert set(shown) == OF_A_SESSION
    with pytest.raises(Refusal):
        calls.effective({"model": None, "type": 3})


@given(
    st.dictionaries(
        st.sampled_from(["type", "model", "audio", "output_modalities", "id", "tools"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["input", "output", "turn_detection", "format", "type", "x"]),
                    inner,
                )
            ),
            max_leaves=12,
        ),
    )
)
def test_any_session_is_shown_or_refused_by_its_field(session: dict[str, Any]) -> None:
    shown, refused = None, None
    try:
        shown = calls.effective(session)
    except Refusal as refusal:
        refused = refusal
    if shown is not None:
        assert set(shown) >= OF_A_SESSION
        assert orjson.dumps(shown)
    else:
        assert refused is not None and refused.status == 400
        assert refused.param is not None and refused.param.startswith("session")


def test_a_preflight_needs_no_key_and_no_path_that_exists(tmp_path: Path) -> None:
    """Browsers send none with it; and a page learns of a wrong path only if this one is right."""

    async def scenario(stage: Stage) -> None:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        for path in (CALLS, SECRETS, f"{CALLS}/rtc_x/hangup", "/v1/realtime", "/v1/realtime/cals"):
            async with stage.http.options(path, headers=asked) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == "*"
        async with stage.http.options("/", headers=asked) as response:
            assert "Access-Control-Allow-Origin" not in response.headers

    on_stage(tmp_path, scenario)


def test_telephone_calls_are_refused_in_words(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        for verb in ("accept", "reject", "refer"):
            path = f"{CALLS}/rtc_x/{verb}"
            error = await stage.error(501, "POST", path, headers=bearer(KEY))
            assert "SIP" in error["message"]
            await stage.error(401, "POST", path)

    on_stage(tmp_path, scenario)


def test_a_call_is_shown_and_ended_under_its_own_key(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        location = await stage.call(**offer(KEY))
        (fake,) = stage.fakes
        for method, path in (
            ("GET", "/v1/realtime/calls/rtc_x"),
            ("POST", "/v1/realtime/calls/rtc_x/hangup"),
            ("DELETE", "/v1/realtime/calls/rtc_x"),
        ):
            error = await stage.error(404, method, path, headers=bearer(KEY))
            assert (error["code"], error["param"]) == ("call_id_not_found", "id")
            await stage.error(401, method, path)
        async with stage.http.post(location + "/hangup", headers=bearer(KEY)) as response:
            assert (response.status, await response.json()) == (200, {})
        assert not fake.calls
        error = await stage.error(404, "POST", location + "/hangup", headers=bearer(OTHER))
        assert error["code"] == "call_id_not_found"

    on_stage(tmp_path, scenario)


def test_the_forms_that_openais_own_libraries_send(tmp_path: Path) -> None:
    """`client.realtime.calls.create(sdp=…, session=…)`: a form with a type on each part."""

    async def scenario(stage: Stage) -> None:
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("sdp", OFFER, content_type="application/sdp")
        form.add_field("session", '{"type": "realtime"}', content_type="application/json")
        headers = bearer(KEY) | {"Accept": "application/sdp"}
        async with stage.http.post(CALLS, data=form, headers=headers) as response:
            assert (response.status, await response.text()) == (201, ANSWER)
        (fake,) = stage.fakes
        assert fake.requests.pop()["session"] == {"type": "realtime"}

    on_stage(tmp_path, scenario)
