"""Reception: whose request this is, and whether it is one too many, before anything is done.

What it owns: where a request's key stands and which address it comes from, what is answered to one
without a good key or beyond a limit, and who may have ephemeral keys made.

Rules that stay true:
- A request without a good key ends here, with a sentence that says what is wrong with it.
- A limit is answered 429, with the seconds after which another try makes sense.
- Wrong keys count against their address, and are then told no more than to wait. A good key is
  taken all the same: nobody guesses 256 bits, and others behind the address have no part in it.
- Without API keys nobody but this machine may call, also not by a proxy on it.
- No key is logged.
- A reload is all or nothing, and a request in hand is not touched by it.

Health and metrics do not come by here. Ending a call is never refused for a key's limits.

Bearer tokens: https://www.rfc-editor.org/rfc/rfc6750
"""

import logging
import math
import secrets
import time
from typing import Any

from aiohttp import hdrs, web

import front
import journal
import keys
import limits
import sealing
import settings
from intake import Refusal

SUBPROTOCOL_PREFIX = "openai-insecure-api-key."
"""How a page's WebSocket sends its key, since browsers let it set no header."""

KEYS_MAX = 16_384
"""Keys whose buckets are remembered: far more than a file has that people keep."""

SAID_EVERY_S = 60.0
"""An address over its limit is named in the log so often, all of them together."""

log = logging.getLogger("reception")


class Reception:
    """Admits callers."""

    def __init__(self, config: settings.Signaling) -> None:
        """Raises SettingsError for a file of keys that cannot be used."""
        self._addresses = limits.Buckets()
        self._failures = limits.Buckets()
        self._spent = limits.Buckets(KEYS_MAX)
        self._said_at = -SAID_EVERY_S
        self._retry_after = str(config.signaling.retry_after_s)
        self._use(config, _load(config))

    def reload(self, config: settings.Signaling) -> None:
        """From now on by these settings. Raises SettingsError, and then nothing has changed."""
        found = _load(config)
        if self._keys.required and not found.required:
            # The process may listen where others reach it: with keys it was allowed to.
            raise settings.SettingsError("signaling.keys_file: only a restart can do without keys")
        self._use(config, found)

    def _use(self, config: settings.Signaling, found: keys.Keys) -> None:
        self._keys, self._table = found, config.signaling
        with_keys = front.Limits() if self._keys.required else None
        self._limits = config.limits or with_keys

    @property
    def keys_count(self) -> int | None:
        """How many API keys there are; None where none are needed."""
        return len(self._keys) if self._keys.required else None

    def admit(self, request: web.Request) -> keys.Caller:
        """Who this is. Raises Refusal: 401, 403 or 429."""
        if not self._keys.required and _came_by_proxy(request):
            message = (
                "There are no API keys here, so that nobody but this machine may call, and this"
                " request came by a proxy: signaling.keys_file is the setting."
            )
            raise Refusal(403, message, code="no_api_keys")
        counted = limits.counted_as(self.client_of(request))
        now = time.monotonic()
        if self._limits is not None:
            per_s, burst = self._limits.address_per_s, self._limits.burst_s
            wait = self._addresses.take(counted, per_s, per_s * burst, now)
            self._refuse_address(wait, counted, "Too many requests come from this address.")
        try:
            return self._keys.who(token_of(request), time.time())
        except keys.Refused as refused:
            if self._limits is not None:
                per_s, burst = self._limits.failures_per_s, self._limits.burst_s
                wait = self._failures.take(counted, per_s, per_s * burst, now)
                self._refuse_address(wait, counted, "Too many wrong keys come from this address.")
            # RFC 6750 section 3.1: who sent no key at all is told of no error.
            error = "" if refused.code == "missing_api_key" else "invalid_token"
            raise _challenge(401, refused.code, error, str(refused)) from None

    def client_of(self, request: web.BaseRequest) -> str:
        """The address that a request comes from, behind trusted proxies too."""
        forwarded = request.headers.getall(self._table.client_address_header, ())
        return limits.client_of(request.remote, forwarded, self._table.trusted_proxies)

    def open_call(self, key: str, calls: int) -> None:
        """Somebody with this key, which has so many calls, wants one more. Raises Refusal: 429."""
        if self._limits is None:
            return
        calls_max = self._keys.limits(key).calls_max or self._limits.key_calls_max
        if calls >= calls_max:
            message = f"This key has {calls_max} calls at once, and that is as many as it may."
            raise Refusal(
                429,
                message,
                code="concurrent_calls_exceeded",
                headers={"Retry-After": self._retry_after},
            )
        self._spend(key)

    def mint(
        self, caller: keys.Caller, session: dict[str, Any] | None, seconds: int
    ) -> tuple[str, int]:
        """An ephemeral key for others to call with, and when it expires in seconds since 1970.

        Raises Refusal: 400 for a session that it has no room for, 403 for a caller who has no more
        than an ephemeral key himself, 429.
        """
        if caller.ephemeral:
            message = "An ephemeral key cannot make others: ask with the API key."
            raise _challenge(403, "insufficient_permissions", "insufficient_scope", message)
        self._spend(caller.key)
        expires_at = int(time.time()) + seconds
        try:
            salt = secrets.token_bytes(sealing.SALT_OCTETS)
            return self._keys.mint(caller, session, expires_at, salt), expires_at
        except keys.TooLarge as error:
            raise Refusal(400, str(error), code="session_too_large", param="session") from None

    def _spend(self, key: str) -> None:
        if self._limits is None:
            return
        per_s = self._keys.limits(key).per_s or self._limits.key_per_s
        wait = self._spent.take(key, per_s, per_s * self._limits.burst_s, time.monotonic())
        if wait:
            raise _too_many(wait, f"This key asks for more than {per_s:g} calls a second.")

    def _refuse_address(self, wait: float, counted: str, message: str) -> None:
        if not wait:
            return
        now = time.monotonic()
        if now - self._said_at >= SAID_EVERY_S:
            self._said_at = now
            log.warning(
                "%s is over a limit of [limits]; if it is a proxy, trusted_proxies should name it",
                journal.masked(counted),
            )
        raise _too_many(wait, message)


def token_of(request: web.Request) -> str | None:
    """The key that a request comes with: its Bearer, or that of a page's WebSocket."""
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for line in request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()):
        for name in map(str.strip, line.split(",")):
            if name.startswith(SUBPROTOCOL_PREFIX):
                return name.removeprefix(SUBPROTOCOL_PREFIX)
    return None


def _load(config: settings.Signaling) -> keys.Keys:
    """Raises SettingsError."""
    keyring, path = config.keys.load(), config.signaling.keys_file
    if path is None:
        return keys.Keys((), keyring, required=False)
    return settings.load_api_keys(path, keyring)


def _came_by_proxy(request: web.Request) -> bool:
    return hdrs.X_FORWARDED_FOR in request.headers or hdrs.FORWARDED in request.headers


def _too_many(wait: float, message: str) -> Refusal:
    headers = {"Retry-After": str(math.ceil(wait))}
    return Refusal(429, message, code="rate_limit_exceeded", headers=headers)


def _challenge(status: int, code: str, error: str, message: str) -> Refusal:
    """A refusal as RFC 6750 section 3 has it. No message of ours has quotes or backslashes."""
    more = f', error="{error}", error_description="{message}"' if error else ""
    headers = {"WWW-Authenticate": f'Bearer realm="earshot"{more}'}
    return Refusal(status, message, code=code, headers=headers)
