"""Endpoints: where something is, as an operator writes it, read once and checked whole.

What it owns: the text forms of an address with and without a port, of a network, of the URLs of a
Redis and of a model server. `settings.py` builds them from the values of a file; everything else is
given the result and never parses such a text again.

Rules that stay true:
- What cannot be used raises ValueError with the reason, when the file is read and not at first use.
- No name is resolved here: a start needs no DNS.
- A password that stands in a URL is kept apart from its text and appears in no message.
"""

import ipaddress
import urllib.parse
from collections.abc import Callable, Iterable


class Endpoint:
    """An address and a port, written `192.0.2.1:3478` or `[2001:db8::1]:3478`."""

    __slots__ = ("address", "port")

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason. Names are not resolved: a start needs no DNS."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            self.address = ipaddress.ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            raise ValueError(f"{text!r} is not ADDRESS:PORT or [IPV6]:PORT") from None
        if not colon or bracketed != (self.address.version == 6):
            raise ValueError(f"{text!r} is not ADDRESS:PORT or [IPV6]:PORT")
        if not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
            raise ValueError(f"{port!r} in {text!r} is not a port (0 to 65535)")
        self.port = int(port)

    @property
    def host(self) -> str:
        """The address as sockets take it, without brackets."""
        return str(self.address)

    def __str__(self) -> str:
        return (
            f"[{self.host}]:{self.port}"
            if self.address.version == 6
            else f"{self.host}:{self.port}"
        )

    def __repr__(self) -> str:
        return f"Endpoint({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Endpoint) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash((self.address, self.port))


class Endpoints:
    """An address and one port or several, written `10.4.0.1:3600` or `10.4.0.1:3600-3603`."""

    __slots__ = ("each",)

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason."""
        start, dash, last = text.rpartition("-")
        first = Endpoint(start if dash else text)
        end = Endpoint(f"{start.rpartition(':')[0]}:{last}") if dash else first
        if not 0 < first.port <= end.port < first.port + PORTS_MAX:
            raise ValueError(f"{text!r} is not ADDRESS:PORT or ADDRESS:FIRST-LAST, 1 to 65535")
        at = text.rpartition(":")[0]
        self.each = tuple(Endpoint(f"{at}:{port}") for port in range(first.port, end.port + 1))
        """One or more, in order."""

    def __str__(self) -> str:
        last = self.each[-1].port
        return f"{self.each[0]}-{last}" if len(self.each) > 1 else str(self.each[0])

    def __repr__(self) -> str:
        return f"Endpoints({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Endpoints) and self.each == other.each

    def __hash__(self) -> int:
        return hash(self.each)


PORTS_MAX = 256
"""Ports in one such text: as many as a relay may have workers."""


class Address:
    """An address without a port, written `192.0.2.1` or `2001:db8::1`."""

    __slots__ = ("address",)

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason."""
        self.address = ipaddress.ip_address(text)

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"


class Prefix:
    """A network, written `10.4.0.0/16` or `fd00:4::/96`."""

    __slots__ = ("network",)

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason, such as host bits that are set."""
        self.network = ipaddress.ip_network(text)

    def __contains__(self, host: object) -> bool:
        """True for an address literal inside; a v4-mapped one counts as the IPv4 it stands for."""
        try:
            address = ipaddress.ip_address(str(host).partition("%")[0])
        except ValueError:
            return False
        return (getattr(address, "ipv4_mapped", None) or address) in self.network

    def __repr__(self) -> str:
        return f"Prefix({str(self.network)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefix) and self.network == other.network

    def __hash__(self) -> int:
        return hash(self.network)


def inside(prefixes: Iterable[Prefix]) -> Callable[[str], bool]:
    """Whether an address is in any of them."""
    known = tuple(prefixes)
    return lambda host: any(host in prefix for prefix in known)


class ModelUrl:
    """Where a model server is: `wss://host[:port]/path[?query]`, or `ws://` without TLS."""

    __slots__ = ("text", "tls")

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason, which repeats no password."""
        try:
            parts = urllib.parse.urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"not a URL: {error}") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("holds a user or a password: the key belongs in key_file")
        if parts.scheme not in ("ws", "wss"):
            raise ValueError(f"{text!r} starts with neither wss:// nor ws://")
        if not host or port == 0 or parts.fragment or not text.isascii() or " " in text:
            raise ValueError(f"{text!r} is not wss://HOST:PORT/PATH")
        if "model" in urllib.parse.parse_qs(parts.query, keep_blank_values=True):
            raise ValueError("names a model: that belongs in the key `model`")
        self.tls = parts.scheme == "wss"
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"ModelUrl({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelUrl) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


class RedisUrl:
    """Where Redis is: one server, those that its Sentinels name, or a Cluster."""

    __slots__ = ("database", "kind", "nodes", "password", "path", "service", "text", "tls", "user")

    kind: str
    """`redis`, `unix`, `sentinel` or `cluster`."""
    nodes: tuple[tuple[str, int], ...]
    """Host and port of the server, of each Sentinel, or of some servers of the Cluster."""

    def __init__(self, text: str) -> None:
        """Raises ValueError with the reason, which repeats no password."""
        scheme, separator, rest = text.partition("://")
        self.kind, self.tls = _REDIS_SCHEMES.get(scheme, ("", False))
        if not (separator and self.kind):
            raise ValueError(f"starts with none of {', '.join(f'{s}://' for s in _REDIS_SCHEMES)}")
        login, _, rest = rest.rpartition("@")
        user, colon, password = login.partition(":")
        self.user = urllib.parse.unquote(user) or None
        self.password = urllib.parse.unquote(password) if colon else None
        self.path, self.service, self.database, self.nodes = "", "", 0, ()
        if self.kind == "unix":
            self.path, _, database = rest.partition("?db=")
            if not self.path.startswith("/"):
                raise ValueError(f"{rest!r} is not an absolute path")
        else:
            hosts, _, database = rest.partition("/")
            port = 26379 if self.kind == "sentinel" else 6379
            self.nodes = tuple(_redis_node(each, port) for each in hosts.split(","))
        if self.kind == "redis" and len(self.nodes) > 1:
            raise ValueError("names several servers: redis+cluster:// or redis+sentinel:// do")
        if self.kind == "cluster" and database:
            raise ValueError(f"a Cluster has no database {database!r}")
        if self.kind == "sentinel":
            self.service, _, database = database.partition("/")
            if not self.service:
                raise ValueError("names no service: redis+sentinel://host:port/service")
        if database and not (database.isascii() and database.isdigit()):
            raise ValueError(f"{database!r} is not the number of a database")
        self.database = int(database or 0)
        self.text = f"{scheme}://{rest}"

    def __str__(self) -> str:
        """Without user and password."""
        return self.text

    def __repr__(self) -> str:
        return f"RedisUrl({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RedisUrl) and all(
            getattr(self, slot) == getattr(other, slot) for slot in self.__slots__
        )

    def __hash__(self) -> int:
        return hash(self.text)


_REDIS_SCHEMES = {
    "redis": ("redis", False),
    "rediss": ("redis", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
"""By the scheme: what is there, and whether it is spoken to over TLS."""


def _redis_node(text: str, default: int) -> tuple[str, int]:
    """`host`, `host:port` or `[IPv6]:port`."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16)):
        raise ValueError(f"{text!r} is not HOST:PORT or [IPV6]:PORT")
    return host, int(port or default)
