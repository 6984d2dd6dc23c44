"""Keys: what opens, what does not, and which sentence it gets."""

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import keys
import sealing
import ufrag

RING = ufrag.Keyring.parse("0 " + bytes(range(32)).hex())
SALT = bytes(range(16))
NOW = 1_800_000_000.0
SESSION = {"type": "realtime", "instructions": "Höflich bleiben.", "tools": []}


def made(name: str = "shop", number: int = 7, *limits: keys.Limits) -> list[str]:
    return list(keys.make(name, bytes([number]) * 32, *limits))


KEY, LINE = made()
OTHER, OTHER_LINE = made("other", 8, keys.Limits(5, 0.5))
KEYS = keys.Keys.parse(f"# those of the shop\n{LINE}  # since May\n\n{OTHER_LINE}\n", RING)


def refused(token: str | None, found: keys.Keys = KEYS, now: float = NOW) -> keys.Refused:
    with pytest.raises(keys.Refused) as caught:
        found.who(token, now)
    assert re.fullmatch(r'[^"\\]+\.', str(caught.value)), "it stands in a header between quotes"
    return caught.value


# --- API keys -----------------------------------------------------------------------------------


def test_a_key_is_made_once_and_only_its_hash_is_kept() -> None:
    assert re.fullmatch(r"sk_[A-Za-z0-9_-]{43}", KEY)
    assert LINE.split() == ["shop", hashlib.sha256(KEY.encode()).hexdigest()]
    assert OTHER_LINE.endswith(" calls=5 per_second=0.5")
    assert KEY not in repr(KEYS) + repr(KEYS.who(KEY, NOW))


def test_a_key_opens_and_says_whose_it_is() -> None:
    caller = KEYS.who(KEY, NOW)
    assert (caller.key, caller.ephemeral, caller.session) == ("shop", False, None)
    assert KEYS.who(OTHER, NOW).key == "other"
    assert KEYS.limits("other") == keys.Limits(5, 0.5)
    assert KEYS.limits("shop") == KEYS.limits("nobody") == keys.Limits()
    assert len(KEYS) == 2


@pytest.mark.parametrize("token", [None, ""])
def test_no_key_is_told_how_to_send_one(token: str | None) -> None:
    assert refused(token).code == "missing_api_key"
    assert "Authorization: Bearer" in str(refused(token))


@pytest.mark.parametrize(
    "token",
    [
        KEY[:-1],
        KEY + "A",
        KEY.swapcase(),
        KEY.upper(),
        "sk_" + "A" * 43,
        "sk_",
        "sk-proj-abc",
        "hunter2",
        LINE.split()[1],
        "\0",
        "é" * 46,
        "sk_" + "A" * 100_000,
    ],
    ids=lambda token: ascii(token[:12]),
)
def test_a_wrong_key_opens_nothing(token: str) -> None:
    assert refused(token).code == "invalid_api_key"


def test_every_character_of_a_key_counts() -> None:
    for place in range(3, len(KEY)):
        refused(KEY[:place] + ("A" if KEY[place] != "A" else "B") + KEY[place + 1 :])


def test_a_key_is_replaced_while_both_serve() -> None:
    """Two lines of one name: the calls of the old key belong to the new one, too."""
    new, new_line = made("shop", 9)
    both = keys.Keys.parse(f"{LINE}\n{new_line}\n", RING)
    assert both.who(KEY, NOW).key == both.who(new, NOW).key == "shop"


def test_a_file_without_keys_lets_nobody_in() -> None:
    assert refused(KEY, keys.Keys.parse("# revoked, all of them\n", RING)).code == "invalid_api_key"


HASH = "ab" * 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shop", "line 1: expected a name and the SHA-256 of a key"),
        (f"\n# x\n{KEY}", "line 3: expected a name"),
        (f"shop {KEY}", "line 1: this is a key: its hash belongs here"),
        (f"shop {HASH[:-1]}", "line 1: the hash is not 64 hexadecimal digits"),
        (f"shop {HASH.upper()}", "line 1: the hash is not 64 hexadecimal digits"),
        (f"a/b {HASH}", "line 1: the name is not 1 to 64 letters"),
        (f"{'a' * 65} {HASH}", "line 1: the name is not"),
        (f"a {HASH}\nb {HASH}", "line 2: the same hash stands there twice"),
        (f"{LINE}\nshop {HASH} calls=3", "line 2: another line gives shop other limits"),
        (f"a {HASH} color=3", "line 1: after the hash: expected calls=NUMBER or per_second="),
        (f"a {HASH} calls=1 calls=1", "line 1: after the hash: expected"),
        (f"a {HASH} calls=1.5", "line 1: calls: expected a number"),
        (f"a {HASH} calls=0", "line 1: calls: expected more than 0, and at most 1000000"),
        (f"a {HASH} per_second=nan", "line 1: per_second: expected more than 0"),
        (f"a {HASH} per_second=inf", "line 1: per_second: expected more than 0"),
        (f"a {HASH} per_second=-1", "line 1: per_second: expected more than 0"),
    ],
)
def test_a_broken_file_names_line_and_reason(text: str, message: str) -> None:
    with pytest.raises(keys.KeysError) as caught:
        keys.Keys.parse(text, RING)
    assert str(caught.value).startswith(message)
    assert HASH[:60] not in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("name", ["", "two words", "-x", "a#b", "ü", "a" * 65])
def test_a_name_that_cannot_stand_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name is not"):
        keys.make(name, bytes(32))


# --- ephemeral keys -----------------------------------------------------------------------------


def minted(session: dict[str, object] | None = SESSION, found: keys.Keys = KEYS) -> str:
    return found.mint(found.who(KEY, NOW), session, int(NOW) + 60, SALT)


@pytest.mark.parametrize("session", [SESSION, None, {}], ids=["session", "none", "empty"])
def test_an_ephemeral_key_carries_its_session(session: dict[str, object] | None) -> None:
    token = minted(session)
    # What both a Bearer (RFC 6750 b64token) and a subprotocol (RFC 9110 token) may be made of.
    assert re.fullmatch(r"ek_[A-Za-z0-9_-]+", token)
    caller = KEYS.who(token, NOW + 59.9)
    assert (caller.key, caller.ephemeral, caller.session) == ("shop", True, session)


def test_an_ephemeral_key_tells_its_bearer_nothing() -> None:
    sealed = keys.base64.urlsafe_b64decode(minted()[3:] + "==")
    for word in (b"instructions", "Höflich".encode(), b"shop", b"realtime"):
        assert word not in sealed


def test_an_ephemeral_key_ends_with_its_time() -> None:
    assert refused(minted(), now=NOW + 60).code == "expired_api_key"


def test_an_ephemeral_key_ends_with_its_api_key() -> None:
    """Also if another takes the name: what an old key vouched for, it alone did."""
    _, new_line = made("shop", 9)
    for text in (OTHER_LINE, new_line):
        assert "revoked" in str(refused(minted(), keys.Keys.parse(text, RING)))


def test_an_ephemeral_key_ends_with_the_secret_it_was_sealed_under() -> None:
    old, new = "0 " + bytes(range(32)).hex() + "\n", "3 " + "33" * 32 + "\n"
    both, after = (keys.Keys.parse(LINE, ufrag.Keyring.parse(text)) for text in (old + new, new))
    assert both.who(minted(), NOW).session == SESSION
    assert refused(minted(), after).code == "invalid_api_key"
    assert after.who(minted(found=both), NOW).session == SESSION


def test_every_bit_of_an_ephemeral_key_counts() -> None:
    token = minted(None)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for place in range(3, len(token)):
        for bit in range(6):
            other = alphabet[alphabet.index(token[place]) ^ 1 << bit]
            refused(token[:place] + other + token[place + 1 :])
    for length in range(3, len(token)):
        refused(token[:length])
    for altered in (token + "A", token + "AAAA", token + "=", token.upper(), "ek_" + "A" * 7_000):
        refused(altered)


def test_what_is_sealed_for_something_else_is_no_key() -> None:
    sealed = sealing.Sealer(RING, b"record").seal(bytes(64), SALT)
    refused("ek_" + keys.base64.urlsafe_b64encode(sealed).rstrip(b"=").decode())


def test_an_ephemeral_key_fits_into_a_header() -> None:
    """A session that is too large as it is gets compressed, and then shows not even its length."""
    words = " ".join(str(number) for number in range(3_000))
    large, larger = ({"instructions": words[:length]} for length in (8_000, 9_000))
    tokens = minted(large), minted(larger)
    assert {len(token) for token in tokens} == {len(tokens[0])}
    assert 6_990 <= len(tokens[0]) <= keys.EPHEMERAL_CHARACTERS_MAX
    assert len(f"Authorization: Bearer {tokens[0]}\r\n") < 8_190
    assert [KEYS.who(token, NOW).session for token in tokens] == [large, larger]
    exact = {"instructions": "x" * (keys._CONTENT_OCTETS_MAX - len('{"instructions":""}'))}
    assert len(minted(exact)) <= keys.EPHEMERAL_CHARACTERS_MAX
    assert KEYS.who(minted(exact), NOW).session == exact


def test_a_session_that_fits_into_no_key_is_refused() -> None:
    noise = "".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(200))
    with pytest.raises(keys.TooLarge, match=r"has room for \d+: send the rest by session.update"):
        minted({"instructions": noise})


@given(st.one_of(st.text(max_size=80), st.from_regex(r"(sk|ek)_[A-Za-z0-9_-]*", fullmatch=True)))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_text_ends_in_a_sentence(text: str) -> None:
    refused(text)
    if text:
        refused(minted() + text)


@given(st.text(max_size=200))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_file_is_read_or_named_by_line(text: str) -> None:
    try:
        found = keys.Keys.parse(text, RING)
    except keys.KeysError as error:
        assert re.match(r"line \d+: ", str(error))  # noqa: PT017
    else:
        refused(KEY, found)


# --- no keys ------------------------------------------------------------------------------------


def test_without_keys_anybody_may_call_and_ephemeral_keys_work() -> None:
    """Development: a page for which somebody asked for an ephemeral key works as it will later."""
    free = keys.Keys((), RING, required=False)
    for token in (None, "", "sk-whatever", "ek_made_up"):
        assert free.who(token, NOW) == keys.Caller()
    token = free.mint(free.who(None, NOW), SESSION, int(NOW) + 60, SALT)
    assert free.who(token, NOW) == keys.Caller("", True, SESSION)
    assert refused(token, free, NOW + 60).code == "expired_api_key"
    assert "revoked" in str(refused(token)), "where there are keys, nobody vouches for it"
