"""Sealing: what comes back is what was sealed, or nothing."""

import pytest

import sealing
import ufrag

RING = ufrag.Keyring.parse("0 " + bytes(range(32)).hex())
SALT = bytes(range(16))
CONTENT = b"instructions that are nobody's business"


def sealer(text: str = "", purpose: bytes = b"test") -> sealing.Sealer:
    return sealing.Sealer(ufrag.Keyring.parse(text) if text else RING, purpose)


def test_a_vector() -> None:
    """Written down, so that two versions that run beside each other open each other's seals."""
    sealed = sealer().seal(b"hello", SALT, b"c")
    assert sealed.hex() == (
        "00000102030405060708090a0b0c0d0e0fbbe2b8efa2656474360793626cf80ef9c923359047"
    )
    assert sealer().open(sealed, b"c") == b"hello"


def test_what_was_sealed_is_read_and_does_not_show() -> None:
    sealed = sealer().seal(CONTENT, SALT)
    assert len(sealed) == len(CONTENT) + sealing.OVERHEAD_OCTETS
    assert b"business" not in sealed
    assert sealer().open(sealed) == CONTENT
    assert sealer().seal(CONTENT, SALT[::-1])[17:] != sealed[17:]


def test_every_bit_counts() -> None:
    sealed = sealer().seal(CONTENT, SALT)
    for place in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[place // 8] ^= 1 << place % 8
        assert sealer().open(bytes(altered)) is None, place
    for length in range(len(sealed)):
        assert sealer().open(sealed[:length]) is None
    assert sealer().open(sealed + b"\0") is None


@pytest.mark.parametrize(
    "other",
    [
        sealer(purpose=b"test2"),
        sealer("0 " + "11" * 32),
        sealer("1 " + bytes(range(32)).hex()),
    ],
    ids=["another purpose", "another secret", "a key that was retired"],
)
def test_nobody_else_opens_it(other: sealing.Sealer) -> None:
    assert other.open(sealer().seal(CONTENT, SALT)) is None


def test_a_context_is_part_of_it() -> None:
    sealed = sealer().seal(CONTENT, SALT, b"call 1")
    assert sealer().open(sealed, b"call 2") is None
    assert sealer().open(sealed, b"call 1") == CONTENT


def test_keys_rotate() -> None:
    """Sealed with the last line; opened with whichever line it was sealed with."""
    old, new = "0 " + "22" * 32 + "\n", "5 " + "33" * 32 + "\n"
    before, both, after = sealer(old), sealer(old + new), sealer(new)
    first, second = before.seal(CONTENT, SALT), both.seal(CONTENT, SALT)
    assert (first[0] >> 5, second[0] >> 5) == (0, 5)
    assert both.open(first) == both.open(second) == after.open(second) == CONTENT
    assert after.open(first) is None and before.open(second) is None
