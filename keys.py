"""Keys: who may place calls. API keys that an operator hands out, and ephemeral ones of theirs.

    sk_ and 43 characters: an API key, 256 random bits. The operator's file has its hash:
        NAME SHA256 [calls=N] [per_second=N]          a line; `#` begins a comment
    ek_ and up to 7,000 characters: an ephemeral key, URL-safe base64 of a seal (sealing.py) of
        expires u32 | form u8 | the first 16 octets of its API key's hash | session, JSON

What it owns: both formats, and what each kind of key is refused for.

Rules that stay true:
- A key is in no file, no log and no message: only its hash, and the name that calls belong to.
- An ephemeral key needs no memory: any instance with the same two files knows it. It ends with its
  time, with its API key's line, and with the master secret that it was sealed under.
- What a browser holds tells it nothing: instructions and tools in it are encrypted. A session that
  fits as it is shows its length; one that must be compressed shows none, since how far it could be
  compressed would tell about the words in it to whoever may add some.
- Total: any text ends in a `Caller` or in `Refused`.

A plain SHA-256 is right here, and a slow hash with a salt would not be: that is for secrets that
people choose, which can be guessed from their hashes. Nobody guesses 256 bits, and no request of a
stranger may cost 100 ms of CPU. So `who` takes no key of another form than the one made here.

Bearer tokens: https://www.rfc-editor.org/rfc/rfc6750

Sans-IO: time and random octets are arguments.
"""

import base64
import binascii
import hashlib
import hmac
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

import sealing
import ufrag

API_PREFIX = "sk_"
EPHEMERAL_PREFIX = "ek_"

KEY_OCTETS = 32
"""Random octets of an API key."""

EPHEMERAL_CHARACTERS_MAX = 7_000
"""With `Authorization: Bearer ` before it, or a subprotocol's name, a header stays under 8 KiB:
what aiohttp and the proxies in front of it (nginx, HAProxy) take unless told otherwise."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A key's name stands in logs and headers."""

CALLS_LAST = 1_000_000
PER_SECOND_LAST = 100_000.0

_API_KEY = re.compile(API_PREFIX + r"[A-Za-z0-9_-]{43}")
_EPHEMERAL = re.compile(EPHEMERAL_PREFIX + r"[A-Za-z0-9_-]+")
_HEAD = struct.Struct(">IB16s")
_AS_IT_IS, _COMPRESSED = range(2)
_NOBODY = bytes(16)
_CONTENT_OCTETS_MAX = (
    (EPHEMERAL_CHARACTERS_MAX - len(EPHEMERAL_PREFIX)) * 3 // 4
    - sealing.OVERHEAD_OCTETS
    - _HEAD.size
)
_SESSION_OCTETS_MAX = 1 << 20
"""Of a session when it is taken out again. Only we put one in, and no request is larger."""


class KeysError(ValueError):
    """A file of keys that cannot be used; the message names the line and what is wrong with it."""


class Refused(Exception):
    """A key that opens nothing: the message is for people, `code` for programs."""

    def __init__(self, message: str, code: str = "invalid_api_key") -> None:
        super().__init__(message)
        self.code = code


class TooLarge(ValueError):
    """A session that no ephemeral key has room for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do. None: what the settings say for all keys."""

    calls_max: int | None = None
    """Calls at once."""
    per_s: float | None = None
    """New calls and ephemeral keys in a second."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A line of the file."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, as far as its key says."""

    key: str = ""
    """Name of the API key, or of the one that vouched for it; empty where there are no keys."""
    ephemeral: bool = False
    session: dict[str, Any] | None = None
    """What the ephemeral key carries."""
    voucher: bytes = field(default=_NOBODY, repr=False)
    """What ephemeral keys that it asks for are tied to."""


class Keys:
    """The keys of a file."""

    def __init__(
        self, listed: Iterable[ApiKey], keyring: ufrag.Keyring, *, required: bool = True
    ) -> None:
        """`required` False: there are no keys, and whoever comes may call."""
        self.required = required
        self._sealer = sealing.Sealer(keyring, b"ephemeral key")
        self._by_digest = {key.digest: key for key in listed}
        self._by_voucher = {key.digest[: len(_NOBODY)]: key for key in self._by_digest.values()}
        self._limits = {key.name: key.limits for key in self._by_digest.values()}

    def __len__(self) -> int:
        return len(self._by_digest)

    @classmethod
    def parse(cls, text: str, keyring: ufrag.Keyring) -> "Keys":
        """Read the operator's file. Raises KeysError; its message quotes no hash and no key.

        A file without a key is one: then nobody may call.
        """
        listed: dict[bytes, ApiKey] = {}
        limits: dict[str, Limits] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                key = _parse_line(words)
            except ValueError as error:
                raise KeysError(f"line {number}: {error}") from None
            if key.digest in listed:
                raise KeysError(f"line {number}: the same hash stands there twice")
            if limits.setdefault(key.name, key.limits) != key.limits:
                raise KeysError(f"line {number}: another line gives {key.name} other limits")
            listed[key.digest] = key
        return cls(listed.values(), keyring)

    def who(self, token: str | None, now: float) -> Caller:
        """Whose key this is, `now` in seconds since 1970. Raises Refused."""
        ephemeral = token is not None and token.startswith(EPHEMERAL_PREFIX)
        if not self.required and not (ephemeral and token and self._open(token)):
            return Caller()
        if not token:
            raise Refused(
                "There is no API key in it: send the header Authorization: Bearer and your key.",
                "missing_api_key",
            )
        if ephemeral:
            return self._who_ephemeral(token, now)
        if not _API_KEY.fullmatch(token):
            raise Refused("This is no API key of ours: they begin with sk_ or ek_.")
        digest = hashlib.sha256(token.encode()).digest()
        key = self._by_digest.get(digest)
        # The look-up by hash tells at most how a hash begins, which leads nobody to a key. Compared
        # in constant time as well, so that nothing here depends on how dictionaries compare.
        if key is None or not hmac.compare_digest(key.digest, digest):
            raise Refused("This API key is not known here, or was revoked.")
        return Caller(key.name, voucher=digest[: len(_NOBODY)])

    def limits(self, name: str) -> Limits:
        """The limits of the key with this name."""
        return self._limits.get(name, Limits())

    def mint(
        self, caller: Caller, session: dict[str, Any] | None, expires_at: int, salt: bytes
    ) -> str:
        """An ephemeral key, for `caller` to hand on. `salt` is sealing.SALT_OCTETS random octets.

        Raises TooLarge if the session does not fit.
        """
        assert not caller.ephemeral, "an ephemeral key vouches for nobody"
        body = b"" if session is None else orjson.dumps(session)
        form = _AS_IT_IS
        if len(body) > _CONTENT_OCTETS_MAX:
            form, body = _COMPRESSED, zlib.compress(body)
            if len(body) > _CONTENT_OCTETS_MAX:
                raise TooLarge(
                    f"The session has {len(body)} octets when compressed, and an ephemeral key has"
                    f" room for {_CONTENT_OCTETS_MAX}: send the rest by session.update."
                )
            body = body.ljust(_CONTENT_OCTETS_MAX, b"\0")
        content = _HEAD.pack(expires_at, form, caller.voucher) + body
        sealed = self._sealer.seal(content, salt)
        return EPHEMERAL_PREFIX + base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def _who_ephemeral(self, token: str, now: float) -> Caller:
        content = self._open(token)
        if content is None:
            raise Refused(
                "This ephemeral key is not one of ours: altered, cut off, or of a retired secret."
            )
        expires_at, form, voucher = _HEAD.unpack_from(content)
        if now >= expires_at:
            raise Refused("This ephemeral key has expired: ask for another.", "expired_api_key")
        key = self._by_voucher.get(voucher)
        if self.required and key is None:
            raise Refused("The API key that vouched for this ephemeral key was revoked.")
        body = content[_HEAD.size :]
        if form == _COMPRESSED:
            body = zlib.decompressobj().decompress(body, _SESSION_OCTETS_MAX)
        session = orjson.loads(body) if body else None
        return Caller(key.name if key else "", True, session, voucher)

    def _open(self, token: str) -> bytes | None:
        """What an ephemeral key holds; None if it is none, or not in its one spelling."""
        if len(token) > EPHEMERAL_CHARACTERS_MAX or not _EPHEMERAL.fullmatch(token):
            return None
        text = token.removeprefix(EPHEMERAL_PREFIX).encode()
        try:
            sealed = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
        except binascii.Error:
            return None
        if base64.urlsafe_b64encode(sealed).rstrip(b"=") != text:  # spare bits that are not zero
            return None
        content = self._sealer.open(sealed)
        return content if content and len(content) >= _HEAD.size else None


def make(name: str, octets: bytes, limits: Limits = Limits()) -> tuple[str, str]:
    """A new API key and its line for the file. `octets` are KEY_OCTETS random ones.

    Raises ValueError for a name that cannot stand there.
    """
    assert len(octets) == KEY_OCTETS
    _check_name(name)
    key = API_PREFIX + base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
    words = [name, hashlib.sha256(key.encode()).hexdigest()]
    words += [] if limits.calls_max is None else [f"calls={limits.calls_max}"]
    words += [] if limits.per_s is None else [f"per_second={limits.per_s:g}"]
    _parse_line(words)
    return key, " ".join(words)


def _parse_line(words: list[str]) -> ApiKey:
    """Raises ValueError with the reason."""
    if len(words) < 2:
        raise ValueError("expected a name and the SHA-256 of a key, as `signaling key` prints them")
    _check_name(words[0])
    if words[1].startswith(API_PREFIX):
        raise ValueError("this is a key: its hash belongs here, as `signaling key` prints it")
    if not re.fullmatch("[0-9a-f]{64}", words[1]):
        raise ValueError("the hash is not 64 hexadecimal digits in lower case")
    found: dict[str, float] = {}
    for word in words[2:]:
        key, _, value = word.partition("=")
        last = {"calls": CALLS_LAST, "per_second": PER_SECOND_LAST}.get(key)
        if last is None or key in found:
            raise ValueError(
                "after the hash: expected calls=NUMBER or per_second=NUMBER, once each"
            )
        try:
            number = int(value) if key == "calls" else float(value)
        except ValueError:
            raise ValueError(f"{key}: expected a number") from None
        if not 0 < number <= last:
            raise ValueError(f"{key}: expected more than 0, and at most {last:.0f}")
        found[key] = number
    calls, per_s = found.get("calls"), found.get("per_second")
    limits = Limits(None if calls is None else int(calls), per_s)
    return ApiKey(words[0], binascii.unhexlify(words[1]), limits)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError("the name is not 1 to 64 letters, digits, dots, dashes and underscores")
