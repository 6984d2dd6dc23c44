"""The frame: 32 octets that stand before every datagram between a relay and a transceiver.

    0xC5 | version 1 | two zero octets | struct sockaddr_in6 of the client, 28 octets

The address is laid out as Linux has it in memory (ipv6(7)), because the relay's worker lets the
kernel write it there and read it from there: on the way to the transceiver it is the name of the
datagram's source, on the way back it *is* the destination, pointed to inside the received buffer.

    octets 4-5    family, AF_INET6 (10), little-endian
    octets 6-7    port, big-endian
    octets 8-11   flow information, zero
    octets 12-27  address, IPv4 as v4-mapped (RFC 4291 section 2.5.5.2)
    octets 28-31  scope id, zero but for link-local addresses, little-endian

Socket addresses as the kernel has them in memory (`name`, `endpoint`) are the same layouts without
the mark in front.

Rules that stay true: a transceiver answers with the same 32 octets in front; whoever reads a frame
treats the header as opaque octets and takes it apart only to tell a client its own address.

Sans-IO. Nothing here raises for octets that a peer chose.
"""

import ipaddress
import struct

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAGIC = b"\xc5\x01\x00\x00"
"""First four octets of every frame: a mark no WebRTC packet begins with (RFC 7983), version 1."""

HEADER_OCTETS = 32
"""Octets in front of the client's datagram."""

KEY_OCTETS = 24
"""Octets of the socket address that tell clients apart: all but the scope id."""

_FAMILY_INET, _FAMILY_INET6 = 2, 10  # Linux's AF_INET and AF_INET6, on every architecture
_SOCKADDR = struct.Struct("<H2s4s16sI")
_PORT = struct.Struct(">H")
_IPV4_NAME = struct.Struct("<H2s4s8x")  # struct sockaddr_in
_IPV6_NAME = struct.Struct("<H2s4x16sI")  # struct sockaddr_in6
_V4_MAPPED = b"\x00" * 10 + b"\xff\xff"


def header(host: str, port: int) -> bytes:
    """The 32 octets for a client at `host` (IPv4 or IPv6 literal) and `port`.

    Raises ValueError for a host that is no address or a port outside 0 to 65535.
    """
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"port {port} is not between 0 and 65535")
    address = ipaddress.ip_address(host)
    packed = address.packed if address.version == 6 else _V4_MAPPED + address.packed
    return MAGIC + _SOCKADDR.pack(_FAMILY_INET6, _PORT.pack(port), b"\x00" * 4, packed, 0)


def is_frame(datagram: bytes) -> bool:
    """True if `datagram` begins with a whole header of this version. Total over any octets."""
    return len(datagram) >= HEADER_OCTETS and datagram[:6] == MAGIC + b"\x0a\x00"


def client(frame: bytes) -> tuple[str, int]:
    """The client's address and port out of a header that `is_frame` accepted.

    A v4-mapped address comes back as IPv4: it is what the client's own STUN answer must name.
    """
    _, port, _, packed, _ = _SOCKADDR.unpack_from(frame, len(MAGIC))
    if packed.startswith(_V4_MAPPED):
        return str(ipaddress.IPv4Address(packed[12:])), _PORT.unpack(port)[0]
    return str(ipaddress.IPv6Address(packed)), _PORT.unpack(port)[0]


def key(frame: bytes) -> bytes:
    """The 24 octets of a header that identify its client: family, port, flow and address."""
    return bytes(frame[len(MAGIC) : len(MAGIC) + KEY_OCTETS])


def masked(frame: bytes) -> str:
    """A header's client as logs and operators may see it: without the last part of the address.

    IPv4 keeps 24 bits and IPv6 48, which is what a provider gives to a site.
    """
    host, port = client(frame)
    if ":" in host:
        network = ipaddress.IPv6Network((host, 48), strict=False)
        return f"[{network.network_address}x]:{port}"
    return f"{host.rpartition('.')[0]}.x:{port}"


def name(host: str | Address, port: int, family: int, scope: int = 0) -> bytes:
    """The socket address that a socket of `family` sends to, as the kernel has it in memory.

    16 octets for AF_INET, 28 for AF_INET6 (IPv4 hosts v4-mapped). Raises ValueError for an IPv6
    host and AF_INET, and for what is no address.
    """
    address, at = ipaddress.ip_address(host) if isinstance(host, str) else host, _PORT.pack(port)
    if family == _FAMILY_INET:
        if address.version != 4:
            raise ValueError(f"{address} cannot be reached from an IPv4 socket")
        return _IPV4_NAME.pack(_FAMILY_INET, at, address.packed)
    packed = address.packed if address.version == 6 else _V4_MAPPED + address.packed
    return _IPV6_NAME.pack(_FAMILY_INET6, at, packed, scope)


def endpoint(octets: bytes) -> tuple[str, int]:
    """Host and port of a `name`; a v4-mapped address comes back as IPv4."""
    if len(octets) == _IPV4_NAME.size:
        _, at, packed = _IPV4_NAME.unpack(octets)
        return str(ipaddress.IPv4Address(packed)), _PORT.unpack(at)[0]
    _, at, packed, _ = _IPV6_NAME.unpack(octets)
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address), _PORT.unpack(at)[0]


def packed_address(octets: bytes) -> bytes:
    """The 16 octets of a `name`'s address, IPv4 as v4-mapped."""
    return _V4_MAPPED + octets[4:8] if len(octets) == _IPV4_NAME.size else octets[8:24]


def reachable(octets: bytes, family: int) -> tuple[str, int]:
    """A `name` as Python's sockets of that family take it: v4-mapped where they are AF_INET6."""
    host, port = endpoint(octets)
    return (f"::ffff:{host}" if family == _FAMILY_INET6 and ":" not in host else host), port


def name_octets(family: int) -> int:
    """Size of a `name` of that family."""
    return _IPV4_NAME.size if family == _FAMILY_INET else _IPV6_NAME.size
