"""Offers as clients send them, and the answer to each, line by line.

`tests/data/offers/README.md` says where each comes from. `NAME.answer` is what `NAME.sdp` is to be
answered, with words in braces for what is ours and another each time.
"""

from pathlib import Path

import pytest

import sdp

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "offers"
OFFERS = sorted([*FOLDER.glob("*.sdp"), *DATA.glob("*.sdp")], key=lambda path: path.stem)

OURS = {
    "session": "42",
    "ufrag": "APeT9ekG4r6OlO9+HGsokz4",
    "password": "Z4K/XErQpQxJ6rgyZhiW2+BN",
    "sha256": ":".join(["CD"] * 32),
    "ssrc": "1234567",
}


def answered(offer: sdp.Offer) -> str:
    return sdp.answer(
        offer,
        OURS["ufrag"],
        OURS["password"],
        fingerprint=OURS["sha256"],
        candidates=[("203.0.113.5", 3478), ("2001:db8::5", 3478)],
        ssrc=int(OURS["ssrc"]),
        session_id=int(OURS["session"]),
        rate_hz=24_000,
    )


def expected(offer: Path) -> list[str]:
    text = (FOLDER / f"{offer.stem}.answer").read_text()
    return text.format(**OURS).splitlines()


def test_every_offer_has_its_answer_and_its_origin() -> None:
    names = [path.stem for path in OFFERS]
    assert names == sorted(path.stem for path in FOLDER.glob("*.answer"))
    origins = (FOLDER / "README.md").read_text()
    assert [name for name in names if f"`{name}`" not in origins] == []
    assert len(names) == origins.count("\n| `")


@pytest.mark.parametrize("path", OFFERS, ids=lambda path: path.stem)
def test_the_answer_line_by_line(path: Path) -> None:
    offer = sdp.read_offer(path.read_bytes().decode())
    lines = answered(offer).split("\r\n")
    assert lines.pop() == ""  # the last line ends, too
    assert lines == expected(path)


@pytest.mark.parametrize("path", OFFERS, ids=lambda path: path.stem)
def test_our_answers_are_session_descriptions_themselves(path: Path) -> None:
    """Read by the same reader, which knows no line of ours that a client would not."""
    offer = sdp.read_offer(path.read_bytes().decode())
    found = sdp.read_offer(answered(offer))
    assert found.ufrag == OURS["ufrag"]
    assert found.setup == ("active" if offer.setup != "active" else "passive")
    assert (found.codec, found.payload_type) == (offer.codec, offer.payload_type)
    assert [line.kind for line in found.lines] == [line.kind for line in offer.lines]
