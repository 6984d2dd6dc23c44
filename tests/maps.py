"""Databases in MaxMind's format, for tests: networks and what is known of each.

Written after https://maxmind.github.io/MaxMind-DB/ (version 2.0), as much of it as an entry of a
city needs: an IPv6 tree with IPv4 under ::/96, records of 28 bits, no pointers.
"""

import ipaddress
import struct
from pathlib import Path
from typing import Any

MARKER = b"\xab\xcd\xefMaxMind.com"
TOKYO = {"location": {"latitude": 35.69, "longitude": 139.69}, "country": {"iso_code": "JP"}}
LONDON = {"location": {"latitude": 51.51, "longitude": -0.13}, "country": {"iso_code": "GB"}}
BRAZIL = {"country": {"iso_code": "BR"}}
ODD = {"location": {"latitude": "far", "longitude": [1]}, "country": "somewhere"}
REGISTERED = {"registered_country": {"iso_code": "US"}}
NETWORKS: dict[str, Any] = {
    "203.0.113.0/25": TOKYO,
    "203.0.113.128/26": BRAZIL,
    "203.0.113.192/26": ODD,
    "198.51.100.0/24": LONDON,
    "198.18.0.0/15": REGISTERED,
    "2001:db8:1::/48": TOKYO,
    "2001:db8:2::/48": LONDON,
}


def encoded(value: Any) -> bytes:
    """A value of the data section."""
    match value:
        case bool():
            return head(14, int(value))
        case dict():
            return head(7, len(value)) + b"".join(
                encoded(key) + encoded(each) for key, each in value.items()
            )
        case list():
            return head(11, len(value)) + b"".join(map(encoded, value))
        case str():
            return head(2, len(value.encode())) + value.encode()
        case float():
            return head(3, 8) + struct.pack(">d", value)
        case int():
            octets = value.to_bytes((value.bit_length() + 7) // 8, "big")
            return head(9, len(octets)) + octets
    raise TypeError(value)


def head(kind: int, size: int) -> bytes:
    """The control octets of a value."""
    more = b""
    if size >= 29:
        assert size < 285, "as much as a test needs"
        size, more = 29, bytes([size - 29])
    if kind <= 7:
        return bytes([kind << 5 | size]) + more
    return bytes([size, kind - 7]) + more


def database(networks: dict[str, Any], version: int = 6) -> bytes:
    """A whole file."""
    nodes: list[list[Any]] = [[None, None]]
    data, offsets = b"", {}
    for text, entry in networks.items():
        network = ipaddress.ip_network(text)
        number, length = int(network.network_address), network.prefixlen
        if version == 6 and network.version == 4:
            length += 96
        bits = f"{number:0{32 if version == 4 else 128}b}"[:length]
        offsets[text] = len(data)
        data += encoded(entry)
        at = 0
        for bit in map(int, bits[:-1]):
            if nodes[at][bit] is None:
                nodes.append([None, None])
                nodes[at][bit] = len(nodes) - 1
            at = nodes[at][bit]
        nodes[at][int(bits[-1])] = ("entry", offsets[text])
    count, tree = len(nodes), b""
    for node in nodes:
        left, right = (
            count if each is None else count + 16 + each[1] if isinstance(each, tuple) else each
            for each in node
        )
        tree += left.to_bytes(4, "big")[1:] + bytes([left >> 24 << 4 | right >> 24])
        tree += right.to_bytes(4, "big")[1:]
    metadata = {
        "binary_format_major_version": 2,
        "binary_format_minor_version": 0,
        "build_epoch": 1_700_000_000,
        "database_type": "Test-City",
        "description": {"en": "made by a test"},
        "ip_version": version,
        "languages": ["en"],
        "node_count": count,
        "record_size": 28,
    }
    return tree + bytes(16) + data + MARKER + encoded(metadata)


def write(path: Path, networks: dict[str, Any] | None = None) -> Path:
    """Write one where nobody reads half of it."""
    part = path.with_suffix(".part")
    part.write_bytes(database(NETWORKS if networks is None else networks))
    part.replace(path)
    return path
