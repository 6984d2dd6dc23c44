"""Reception: whose request this is, before anything is done for it.

What it owns: where a request's key stands, what is answered to one that has none or the wrong one,
and who may have ephemeral keys made.

Rules that stay true:
- A request without a good key ends here, with a sentence that says what is wrong with it.
- No key is logged.

Bearer tokens: https://www.rfc-editor.org/rfc/rfc6750
"""

import secrets
import time
from typing import Any

from aiohttp import hdrs, web

import keys
import sealing
import settings
from intake import Refusal

SUBPROTOCOL_PREFIX = "openai-insecure-api-key."
"""How a page's WebSocket sends its key, since browsers let it set no header."""


class Reception:
    """Admits callers."""

    def __init__(self, config: settings.Signaling) -> None:
        """Raises SettingsError for a file of keys that cannot be used."""
        self._keys = _load(config)

    def admit(self, request: web.Request) -> keys.Caller:
        """Who this is. Raises Refusal: 401, 403 or 429."""
        try:
            return self._keys.who(token_of(request), time.time())
        except keys.Refused as refused:
            # RFC 6750 section 3.1: who sent no key at all is told of no error.
            error = "" if refused.code == "missing_api_key" else "invalid_token"
            raise _challenge(401, refused.code, error, str(refused)) from None

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
        expires_at = int(time.time()) + seconds
        try:
            salt = secrets.token_bytes(sealing.SALT_OCTETS)
            return self._keys.mint(caller, session, expires_at, salt), expires_at
        except keys.TooLarge as error:
            raise Refusal(400, str(error), code="session_too_large", param="session") from None


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


def _challenge(status: int, code: str, error: str, message: str) -> Refusal:
    """A refusal as RFC 6750 section 3 has it. No message of ours has quotes or backslashes."""
    more = f', error="{error}", error_description="{message}"' if error else ""
    headers = {"WWW-Authenticate": f'Bearer realm="earshot"{more}'}
    return Refusal(status, message, code=code, headers=headers)
