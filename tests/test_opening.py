"""A request for a session: what is wrong with it is named."""

import contextlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import opening


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body: expected JSON."),
        (b"[]", "the body: expected a JSON object."),
        (b"{}", "offer: expected a session description as text."),
        (b'{"offer": "", "session": 1}', "session: expected an object or null."),
        (b'{"offer": "", "model": 1}', "model: expected text or null."),
        (b'{"offer": ""}', "candidates: expected 1 to 8 of [address, port]."),
        (
            b'{"offer": "", "candidates": [["relay.example", 1]]}',
            "candidates: expected [address, port], the address as a literal.",
        ),
        (
            b'{"offer": "", "candidates": [["192.0.2.1", 0]]}',
            "candidates: expected a port between 1 and 65535.",
        ),
    ],
)
def test_a_request_that_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(opening.Wrong) as raised:
        opening.read(body)
    assert str(raised.value) == message


def test_the_model_is_part_of_what_is_wanted() -> None:
    body = b'{"offer": "v=0", "model": "m", "session": {"voice": "x"}, "candidates": [["::1", 9]]}'
    wanted = {"model": "m", "voice": "x"}
    assert opening.read(body) == opening.Opening("v=0", wanted, (("::1", 9),))


def test_what_may_be_left_out() -> None:
    more = {"key": "k", "dialect": "rtvi", "resume": "rtc_x", "request_id": "r"}
    found = opening.read(orjson.dumps({"offer": "v=0", "candidates": [["::1", 9]], **more}))
    assert found == opening.Opening("v=0", None, (("::1", 9),), **more)
    for name in more:
        wrong = {"offer": "v=0", "candidates": [["::1", 9]], name: "x" * 200}
        with pytest.raises(opening.Wrong) as raised:
            opening.read(orjson.dumps(wrong))
        assert raised.value.param == name


@given(st.binary(max_size=200))
def test_any_octets_end_in_an_opening_or_a_sentence(body: bytes) -> None:
    for read in (opening.read, opening.read_restart):
        with contextlib.suppress(opening.Wrong):
            read(body)
