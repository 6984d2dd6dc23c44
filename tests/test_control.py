"""The control API's requests: what is wrong with them is named."""

import pytest

import control


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
    with pytest.raises(control.Refusal) as raised:
        control.call_of(body)
    assert raised.value.status == 400
    assert str(raised.value) == message


def test_the_model_is_part_of_what_is_wanted() -> None:
    body = b'{"offer": "v=0", "model": "m", "session": {"voice": "x"}, "candidates": [["::1", 9]]}'
    assert control.call_of(body) == ("v=0", {"model": "m", "voice": "x"}, [("::1", 9)])
