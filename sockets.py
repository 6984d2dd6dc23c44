"""Sockets: the relay's UDP sockets, opened with the options that matter.

What it owns: which options those are, and why: one family for all clients, an address that several
workers share, buffers beyond the system's default, and no fragments. What is sent and received over
them is udp.py's.

ip(7), ipv6(7), socket(7) https://man7.org/linux/man-pages/
"""

import ipaddress
import socket

# Linux's names that Python's socket module does not have.
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DONT, _PMTUDISC_PROBE = 0, 3
_IPV6_FREEBIND = 78


def open_public(host: str, port: int, buffer_octets: int, to_come: bool = False) -> socket.socket:
    """A socket for clients: AF_INET6 also for an IPv4 host, so that all clients look alike.

    Several may be opened for one address (SO_REUSEPORT): the kernel spreads clients over them.
    An address that is `to_come` need not be this host's yet. Raises OSError.
    """
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    if to_come:  # ipv6(7), and for IPv4-mapped addresses too
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    mapped = host if ipaddress.ip_address(host).version == 6 else f"::ffff:{host}"
    return _bound(sock, mapped, port, buffer_octets)


def open_internal(host: str, port: int, buffer_octets: int) -> socket.socket:
    """A socket towards transceivers, alone on its port. Raises OSError.

    AF_INET where the host is IPv4: what the kernel need not map and unmap a datagram is free.
    """
    version = ipaddress.ip_address(host).version
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    return _bound(sock, host, port, buffer_octets)


def _bound(sock: socket.socket, host: str, port: int, buffer_octets: int) -> socket.socket:
    try:
        prepare(sock, buffer_octets)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{host} port {port}: {error.strerror}") from error
    return sock


def prepare(sock: socket.socket, buffer_octets: int) -> None:
    """The options of every socket here, also of one that another process has opened."""
    sock.setblocking(False)
    for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, buffer_octets)
        except OSError:  # only CAP_NET_ADMIN may go beyond net.core.rmem_max: take what is given
            sock.setsockopt(socket.SOL_SOCKET, plain, buffer_octets)
    forbid_fragments(sock)


def forbid_fragments(sock: socket.socket, forbidden: bool = True) -> None:
    """IP_PMTUDISC_PROBE (ip(7)): Don't Fragment, and no forged ICMP shrinks the path.

    Nearly all of WebRTC stays under 1,200 octets, and a datagram without fragments needs no
    identification: choosing one was 4.6 % of the relay's time a datagram (Linux 6.18, loopback).
    """
    how = _PMTUDISC_PROBE if forbidden else _PMTUDISC_DONT
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, how)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, how)
    except OSError:  # other kernels: fragments, as they please
        pass


def receive_buffer_octets(sock: socket.socket) -> int:
    """What the kernel granted: it counts its own overhead, hence twice what was asked."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
