"""What may be loaded: addresses that were named, and public ones by their owner alone.

Every tool that sends load asks here about every address before it sends anything there.

Rules that stay true:
- Loopback, private, link-local and shared addresses, and those for benchmarks, are taken as the
  operator's own. Any other one is refused unless whoever started the tool says that it is theirs:
  the list says what is allowed, so that what it does not know is refused.
- Groups and broadcasts are refused, whoever asks.
- IPv4 in IPv6 (`::ffff:8.8.8.8`) is judged as the IPv4 address that it is.
- A name is resolved here, and the literal is what is sent to. The exception is the page of
  signaling, whose name HTTP and TLS need: it is looked up again by who opens it.

RFC 1918, RFC 3927, RFC 4193, RFC 4291, RFC 6598, RFC 2544 and RFC 5180 (benchmarks)
https://www.iana.org/assignments/iana-ipv4-special-registry
"""

import ipaddress
import socket
import urllib.parse

OWN = "--i-own-this-target"
"""The option that takes the responsibility."""

_OWN = [
    ipaddress.ip_network(each)
    for each in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "198.18.0.0/15",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
        "2001:2::/48",
    )
]

_NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
_BROADCAST = ipaddress.ip_address("255.255.255.255")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TargetError(ValueError):
    """This may not be loaded; the message says why, and what would change it."""


def guard(host: str, owned: bool) -> str:
    """`host` (a name or a literal) as the literal that is sent to, with its zone (`%eth0`) if it
    has one. Raises TargetError.

    A name counts as public if any of its addresses is: who answers for a name can change that.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
        literals = [socket.getnameinfo(each[4], _NUMERIC)[0] for each in found]  # with zones
    except (OSError, UnicodeError) as error:
        raise TargetError(f"{host!r} is no address: {error}") from error
    for literal in literals:
        address = _address(literal)
        if address.is_multicast or address.is_unspecified or address == _BROADCAST:
            raise TargetError(f"{literal} is not one host")
        if not (owned or any(address in network for network in _OWN)):
            raise TargetError(
                f"{literal} is a public address: load is sent there only by its owner, "
                f"who says so with {OWN}"
            )
    return literals[0]


def endpoint(text: str, owned: bool) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT`. Raises TargetError."""
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"{text!r} is not HOST:PORT: {error}") from error
    if not host or not port or _ODD & set(text) or parts.netloc != text:
        raise TargetError(f"{text!r} is not HOST:PORT")
    return guard(host, owned), port


def page(url: str, owned: bool) -> str:
    """The address of signaling, `http://…` or `https://…`, without its last slash. Raises
    TargetError."""
    why = f"{url!r} is no address of signaling: http://HOST:PORT/ is one"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"{url!r} is no address of signaling: {error}") from error
    if parts.scheme not in ("http", "https") or not host or _ODD & set(url):
        raise TargetError(why)
    guard(host, owned)
    return url.rstrip("/")


_ODD = {*"@\\?#", *map(chr, range(0x21))}
"""Characters that a target has no use for. Two readers of a URL may differ in what they make of a
user's name, a backslash or a space, and then it would not be this host that is loaded."""


def _address(literal: str) -> Address:
    address = ipaddress.ip_address(literal.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
