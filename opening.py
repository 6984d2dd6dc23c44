"""Opening: what signaling asks for when it opens a call, read from its JSON.

What it owns: the fields of a request for a session, what each may be, and the sentence that names
the one that is wrong. So also for a client's pair of credentials in an ICE restart.

Rules that stay true:
- Any octets end in an `Opening` or in `Wrong`, which names the field.
- The session description is not read here (sdp.py), nor what the session object says (the backend).

Sans-IO.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

import orjson

import sdp

CANDIDATES_MAX = 8
"""Relay addresses in an answer: two sites, two families, and as many again."""

NAME_CHARACTERS_MAX = 128
"""Of the name of a key, a dialect or a request."""

_NONCE = re.compile("[0-9a-f]{8}")


class Wrong(ValueError):
    """A request that cannot be used; the message is a sentence that names the field."""

    def __init__(self, param: str, expected: str) -> None:
        super().__init__(f"{param}: expected {expected}.")
        self.param = param


@dataclass(frozen=True, slots=True)
class Opening:
    """What a call begins with."""

    offer: str
    """The client's session description, unread."""
    session: dict[str, Any] | None
    """The `session` object, its `model` included."""
    candidates: tuple[tuple[str, int], ...]
    """Public addresses of relays, in order of preference."""
    key: str = ""
    """Name of the key that opens it. Only who has the same may do anything to the call later."""
    dialect: str = "realtime"
    """What the client speaks on its data channel."""
    resume: str | None = None
    """Id of the call whose conversation goes on in this one."""
    past: tuple[dict[str, Any], ...] | None = None
    """What is known of that one, as items; None if nothing is. Not of the request: archive.py."""
    request_id: str = ""
    """What the logs of all programs know the request by."""
    site: str = ""
    """Where the client was told to enter, for the log: it may have gone on at another one."""

    @property
    def second_site(self) -> bool:
        """Whether the client can go on elsewhere: two hosts of one family are named."""
        hosts = {host for host, _ in self.candidates}
        sixes = sum(":" in host for host in hosts)
        return max(sixes, len(hosts) - sixes) > 1

    @property
    def nonce(self) -> int | None:
        """The request's id as the number that a routing hint has room for: 8 hexadecimal digits.
        None for any other id."""
        return int(self.request_id, 16) if _NONCE.fullmatch(self.request_id) else None


def read(body: bytes) -> Opening:
    """Read a request for a session. Raises Wrong, and nothing else."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Wrong("the body", "JSON") from None
    if not isinstance(found, dict):
        raise Wrong("the body", "a JSON object")
    offer, wanted = found.get("offer"), found.get("session")
    if not isinstance(offer, str):
        raise Wrong("offer", "a session description as text")
    if not (wanted is None or isinstance(wanted, dict)):
        raise Wrong("session", "an object or null")
    model = found.get("model")
    if not (model is None or isinstance(model, str)):
        raise Wrong("model", "text or null")
    if model is not None:
        wanted = {"model": model, **(wanted or {})}  # what the session itself says is nearer
    resume = found.get("resume")
    return Opening(
        offer,
        wanted,
        _candidates(found.get("candidates")),
        key=_name(found, "key", ""),
        dialect=_name(found, "dialect", "realtime"),
        resume=None if resume is None else _name(found, "resume", ""),
        request_id=_name(found, "request_id", ""),
        site=_name(found, "site", ""),
    )


def _name(found: dict[str, Any], param: str, default: str) -> str:
    value = found.get(param, default)
    if not (isinstance(value, str) and len(value) <= NAME_CHARACTERS_MAX and value.isprintable()):
        raise Wrong(param, f"a line of text of at most {NAME_CHARACTERS_MAX} characters")
    return value


def _candidates(listed: Any) -> tuple[tuple[str, int], ...]:
    if not (isinstance(listed, list) and 1 <= len(listed) <= CANDIDATES_MAX):
        raise Wrong("candidates", f"1 to {CANDIDATES_MAX} of [address, port]")
    candidates = []
    for pair in listed:
        try:
            host, port = pair
            candidates.append((str(ipaddress.ip_address(host)), int(port)))
        except (TypeError, ValueError):
            raise Wrong("candidates", "[address, port], the address as a literal") from None
        if not (isinstance(host, str) and 1 <= candidates[-1][1] <= 0xFFFF):
            raise Wrong("candidates", "a port between 1 and 65535")
    return tuple(candidates)


def read_restart(body: bytes) -> tuple[str, str]:
    """A client's pair for an ICE restart, ufrag and password. Raises Wrong."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        found = {}
    return _ice(found, "ufrag", 4), _ice(found, "pwd", 22)


def _ice(found: dict[str, Any], name: str, characters_min: int) -> str:
    value = found.get(name)
    if not (isinstance(value, str) and sdp.is_ice(value, characters_min)):
        raise Wrong(name, f"{characters_min} to 256 ICE characters")
    return value
