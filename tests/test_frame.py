"""The 32 octets in front of every datagram between relay and transceiver."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frame


def test_ipv4_client_octet_by_octet() -> None:
    assert frame.header("192.0.2.1", 0x1234) == bytes.fromhex(
        "c5010000"  # magic, version 1, zero
        "0a00"  # AF_INET6, little-endian
        "1234"  # port, big-endian
        "00000000"  # flow information
        "00000000000000000000ffffc0000201"  # v4-mapped address
        "00000000"  # scope
    )


def test_header_is_the_kernels_own_sockaddr() -> None:
    """The kernel of this machine must agree: it writes and reads these octets for the relay."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        port = server.getsockname()[1]
        packed = frame.header("::1", port)
        assert packed[4:6] == int(socket.AF_INET6).to_bytes(2, "little")
        assert packed[12:28] == socket.inet_pton(socket.AF_INET6, "::1")
        assert int.from_bytes(packed[6:8], "big") == port


@given(st.ip_addresses(), st.integers(0, 65535))
def test_round_trip(address: object, port: int) -> None:
    text = str(address)
    octets = frame.header(text, port)
    assert len(octets) == frame.HEADER_OCTETS
    assert frame.is_frame(octets) and frame.is_frame(octets + b"payload")
    host, same_port = frame.client(octets)
    mapped = getattr(address, "ipv4_mapped", None)
    assert (host, same_port) == (str(mapped or address), port)
    assert frame.key(octets) == octets[4:28]


@given(st.binary(max_size=80))
def test_any_octets_are_a_frame_or_not(octets: bytes) -> None:
    if frame.is_frame(octets):
        frame.client(octets)
    if len(octets) < frame.HEADER_OCTETS:
        assert not frame.is_frame(octets)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5])
def test_another_magic_version_or_family_is_no_frame(at: int) -> None:
    octets = bytearray(frame.header("192.0.2.1", 1))
    octets[at] ^= 1
    assert not frame.is_frame(bytes(octets))


@pytest.mark.parametrize(("host", "port"), [("localhost", 1), ("192.0.2.1", -1), ("::1", 65536)])
def test_no_header_for_what_is_no_address(host: str, port: int) -> None:
    with pytest.raises(ValueError, match=r"port|address"):
        frame.header(host, port)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_names_and_endpoints(host: str) -> None:
    assert frame.endpoint(frame.name(host, 9000, socket.AF_INET6)) == (host, 9000)


def test_an_ipv4_name() -> None:
    name = frame.name("192.0.2.1", 9000, socket.AF_INET)
    assert len(name) == frame.name_octets(socket.AF_INET)
    assert frame.endpoint(name) == ("192.0.2.1", 9000)
    with pytest.raises(ValueError, match="IPv4 socket"):
        frame.name("2001:db8::1", 9000, socket.AF_INET)
