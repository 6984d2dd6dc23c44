"""Bodies of requests: whatever is in them, they are read or refused. More in test_signaling.py."""

import asyncio
import contextlib

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import intake

FORM = "multipart/form-data; boundary=b"


@given(body=st.binary(max_size=300), head=st.sampled_from(["", "--b\r\n", "--b\r\nA: b\r\n\r\n"]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_form_is_more_than_a_bad_request(body: bytes, head: str) -> None:
    request = make_mocked_request("POST", "/v1/realtime/calls", headers={"Content-Type": FORM})

    async def run() -> None:
        with contextlib.suppress(intake.Refusal):
            await intake._read_form(request, head.encode() + body)

    asyncio.run(run())


@pytest.mark.parametrize("charset", [b"x" * 64, b"utf-99", b"\xff"])
def test_a_form_in_a_strange_charset_is_refused(charset: bytes) -> None:
    """RFC 7578 section 4.6: aiohttp reads a first part of this name."""
    request = make_mocked_request("POST", "/v1/realtime/calls", headers={"Content-Type": FORM})
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (b"_charset_", charset) + part % (b"sdp", b"v=0") + b"--b--\r\n"
    with pytest.raises(intake.Refusal) as caught:
        asyncio.run(_read_form(request, body))
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")


async def _read_form(request: web.Request, body: bytes) -> None:
    intake.offer_text((await intake._read_form(request, body))[0])


def test_a_form_begins_with_its_boundary() -> None:
    request = make_mocked_request("POST", "/v1/realtime/calls", headers={"Content-Type": FORM})
    form = b'--b\r\nContent-Disposition: form-data; name="sdp"\r\n\r\nv=0\r\n--b--\r\n'
    for before in (b"", b"\r\n", b"\r\n" * 30_000):
        assert asyncio.run(intake._read_form(request, before + form)) == (b"v=0", None)
    with pytest.raises(intake.Refusal, match="does not begin with a boundary") as caught:
        asyncio.run(_read_form(request, b"x\r\n" * 15_000 + form))
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")


def test_json_has_so_many_levels() -> None:
    for levels in (1, 10, intake.LEVELS_MAX - 1):
        text = b'{"a": ' * levels + b"1" + b"}" * levels
        assert orjson.dumps(intake._parse_json(text, "The body", None)) == text.replace(b" ", b"")
    for levels in (intake.LEVELS_MAX + 1, 250, 260, 1_000, 30_000):
        for text in (b'{"a": ' * levels + b"1" + b"}" * levels, b"[" * levels + b"]" * levels):
            with pytest.raises(intake.Refusal) as caught:
                intake._parse_json(text, "The body", "session")
            assert (caught.value.status, caught.value.code) == (400, "invalid_json")
