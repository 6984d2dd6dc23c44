"""What may be loaded: addresses that were named, and public ones by their owner alone.

Every tool that sends load asks here about every address before it sends anything there. Loopback,
private and link-local addresses, and shared ones (RFC 6598), are taken as the operator's own. Any
other one is refused unless whoever started the tool says that it is theirs.

RFC 1918, RFC 4193, RFC 6598; https://www.iana.org/assignments/iana-ipv4-special-registry
"""

import ipaddress
import socket
import urllib.parse

OWN = "--i-own-this-target"
"""The option that takes the responsibility."""

_SHARED = ipaddress.ip_network("100.64.0.0/10")


class TargetError(ValueError):
    """This may not be loaded; the message says why, and what would change it."""


def guard(host: str, owned: bool) -> str:
    """`host` (a name or a literal) as the literal that is sent to. Raises TargetError.

    A name counts as public if any of its addresses is: who answers for a name can change that.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise TargetError(f"{host!r} is no address: {error}") from error
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    for address in addresses:
        if address.is_multicast or address.is_unspecified:
            raise TargetError(f"{address} is not one host")
        if not (owned or _is_private(address)):
            raise TargetError(
                f"{address} is a public address: load is sent there only by its owner, "
                f"who says so with {OWN}"
            )
    return str(addresses[0])


def endpoint(text: str, owned: bool) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT`. Raises TargetError."""
    parts = urllib.parse.urlsplit(f"//{text}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"{text!r} is not HOST:PORT: {error}") from error
    if not host or not port or parts.path or parts.query or parts.username:
        raise TargetError(f"{text!r} is not HOST:PORT")
    return guard(host, owned), port


def page(url: str, owned: bool) -> str:
    """The address of signaling, `http://…` or `https://…`, without its last slash. Raises
    TargetError."""
    parts = urllib.parse.urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"{url!r} is no address of signaling: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise TargetError(f"{url!r} is no address of signaling: http://HOST:PORT/ is one")
    guard(host, owned)
    return url.rstrip("/")


def _is_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return _is_private(mapped)
    shared = address.version == 4 and address in _SHARED
    documentation = any(
        address.version == network.version and address in network for network in _DOCUMENTATION
    )
    return shared or ((address.is_private or address.is_link_local) and not documentation)


_DOCUMENTATION = [
    ipaddress.ip_network(each)
    for each in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
]
"""Private to Python, and nobody's: whoever names one has copied an example."""
