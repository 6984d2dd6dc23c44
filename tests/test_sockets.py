"""Sockets: the options that matter, as the kernel has them."""

import errno
import socket

import pytest

import sockets


def test_clients_of_both_families_at_one_address_that_is_shared():
    first = sockets.open_public("::", 0, 1 << 16)
    port = first.getsockname()[1]
    second = sockets.open_public("::", port, 1 << 16)
    with first, second, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert first.family == socket.AF_INET6 and not first.getblocking()
        client.sendto(b"x", ("127.0.0.1", port))
        found = []
        while not found:
            for sock in (first, second):
                try:
                    found.append(sock.recvfrom(10))
                except BlockingIOError:
                    continue
        assert found[0][1][0] == "::ffff:127.0.0.1"


def test_an_internal_socket_is_alone_on_its_port_and_of_its_family():
    with sockets.open_internal("127.0.0.1", 0, 1 << 16) as sock:
        assert sock.family == socket.AF_INET
        with pytest.raises(OSError, match="port") as caught:
            sockets.open_internal("127.0.0.1", sock.getsockname()[1], 1 << 16)
        assert caught.value.errno == errno.EADDRINUSE
    with sockets.open_internal("::1", 0, 1 << 16) as sock:
        assert sock.family == socket.AF_INET6


def test_buffers_are_what_was_asked_for():
    with sockets.open_internal("127.0.0.1", 0, 1 << 17) as sock:
        assert sockets.receive_buffer_octets(sock) >= 1 << 17


def test_no_fragments_unless_they_are_allowed():
    with sockets.open_internal("127.0.0.1", 0, 1 << 17) as sock:
        assert sock.getsockopt(socket.IPPROTO_IP, 10) == 3  # IP_MTU_DISCOVER: IP_PMTUDISC_PROBE
        sockets.forbid_fragments(sock, False)
        assert sock.getsockopt(socket.IPPROTO_IP, 10) == 0


def test_an_address_that_is_to_come():
    with sockets.open_public("192.0.2.77", 0, 1 << 16, to_come=True) as sock:
        assert sock.getsockname()[0] == "::ffff:192.0.2.77"
    with pytest.raises(OSError, match=r"192\.0\.2\.77"):
        sockets.open_public("192.0.2.77", 0, 1 << 16)
