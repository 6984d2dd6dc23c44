"""Batches, both the kernel's and the portable twin, over real sockets on loopback."""

import contextlib
import mmap
import select
import socket

import pytest

import frame
import sockets
import udp

OCTETS_MAX = 1500
KINDS = [udp.Batch, udp.PortableBatch] if udp.best() is udp.Batch else [udp.PortableBatch]


class Ends:
    """A batch each way, a client and a transceiver."""

    def __init__(self, kind, size, stack, v6=False):
        loopback, self.family = ("::1", socket.AF_INET6) if v6 else ("127.0.0.1", socket.AF_INET)
        opened = stack.enter_context
        self.public = opened(sockets.open_public(loopback, 0, 1 << 20))
        self.internal = opened(sockets.open_internal(loopback, 0, 1 << 20))
        self.client = opened(socket.socket(self.family, socket.SOCK_DGRAM))
        self.transceiver = opened(socket.socket(self.family, socket.SOCK_DGRAM))
        for sock in (self.client, self.transceiver):
            sock.bind((loopback, 0))
            sock.settimeout(10)
        self.client.connect((loopback, self.public.getsockname()[1]))
        octets = udp.octets(size, OCTETS_MAX, self.family, udp.Way.INBOUND)
        shape = size, OCTETS_MAX
        self.inbound = kind(memory(octets), udp.Way.INBOUND, *shape, self.public, self.internal)
        self.outbound = kind(memory(octets), udp.Way.OUTBOUND, *shape, self.internal, self.public)
        self.header = frame.header(*self.client.getsockname()[:2])
        self.hop = frame.name(*self.transceiver.getsockname()[:2], self.family)


def memory(octets):
    return memoryview(mmap.mmap(-1, octets))


def wait(sock):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(10_000), "nothing came"


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_in_with_a_header_and_out_without(kind, stack, v6):
    ends = Ends(kind, 8, stack, v6)
    payloads = [b"", b"\x80", b"\x80" * 172, b"\x90" * OCTETS_MAX]
    for payload in payloads:
        ends.client.send(payload)
    wait(ends.public)
    n = ends.inbound.receive()
    headers, lengths, kinds = ends.inbound.read(n)
    assert n == 4 and headers == (ends.header,) * 4
    assert lengths == [0, 1, 172, 1500] and kinds[1:] == b"\x80\x80\x90"
    assert bytes(ends.inbound.payload(2, 172)) == payloads[2]
    ends.inbound.direct(n, [ends.hop] * n)
    assert ends.inbound.send(n, []) == []
    for payload in payloads:
        framed, source = ends.transceiver.recvfrom(4096)
        assert framed == ends.header + payload
        ends.transceiver.sendto(framed, source)
    wait(ends.internal)
    n = ends.outbound.receive()
    headers, lengths, kinds = ends.outbound.read(n)
    assert n == 4 and headers == (ends.header,) * 4 and lengths == [32, 33, 204, 1532]
    assert kinds[1:] == b"\x80\x80\x90" and ends.outbound.sources(n) == (ends.hop,) * 4
    assert ends.outbound.send(n, []) == []
    assert [ends.client.recv(4096) for _ in payloads] == payloads


def test_holes_are_not_sent(kind, stack):
    ends = Ends(kind, 8, stack)
    for number in range(8):
        ends.client.send(b"%d" % number)
    wait(ends.public)
    assert ends.inbound.receive() == 8
    ends.inbound.direct(8, [ends.hop] * 8)
    assert ends.inbound.send(8, [0, 3, 4, 7]) == []
    came = [ends.transceiver.recv(4096)[32:] for _ in range(4)]
    assert came == [b"1", b"2", b"5", b"6"]


def test_what_the_kernel_refuses_is_skipped_and_returned(kind, stack):
    ends = Ends(kind, 8, stack)
    for number in range(6):
        ends.client.send(b"%d" % number)
    wait(ends.public)
    assert ends.inbound.receive() == 6
    broken = frame.name("127.0.0.1", 0, socket.AF_INET)  # port 0: EINVAL
    ends.inbound.direct(6, [broken, ends.hop, broken, broken, ends.hop, broken])
    assert ends.inbound.send(6, []) == [0, 2, 3, 5]
    assert [ends.transceiver.recv(4096)[32:] for _ in range(2)] == [b"1", b"4"]


def test_oversized_datagrams_show(kind, stack):
    ends = Ends(kind, 4, stack)
    ends.client.send(b"\x80" * (OCTETS_MAX + 1))
    ends.client.send(b"\x81" * 9000)
    ends.client.send(b"\x82")
    wait(ends.public)
    assert ends.inbound.receive() == 3
    _, lengths, kinds = ends.inbound.read(3)
    assert lengths[0] > OCTETS_MAX < lengths[1] and lengths[2] == 1 and kinds == b"\x80\x81\x82"


def test_a_short_frame_beside_a_whole_one(kind, stack):
    ends = Ends(kind, 4, stack)
    at = ends.internal.getsockname()
    ends.transceiver.sendto(b"short", at)
    ends.transceiver.sendto(ends.header + b"whole", at)
    wait(ends.internal)
    assert ends.outbound.receive() == 2
    assert ends.outbound.read(2)[1] == [5, 37]
    assert ends.outbound.send(2, [0]) == []
    assert ends.client.recv(4096) == b"whole"


def test_nothing_waiting_is_none(kind, stack):
    assert Ends(kind, 4, stack).inbound.receive() == 0


def test_a_batch_takes_no_more_than_its_size(kind, stack):
    ends = Ends(kind, 4, stack)
    for number in range(6):
        ends.client.send(b"%d" % number)
    wait(ends.public)
    assert ends.inbound.receive() == 4
    assert ends.inbound.receive() == 2


def test_a_taken_port_names_itself(stack):
    sock = stack.enter_context(sockets.open_internal("127.0.0.1", 0, 1 << 16))
    port = sock.getsockname()[1]
    with pytest.raises(OSError, match=rf"127\.0\.0\.1 port {port}: "):
        sockets.open_internal("127.0.0.1", port, 1 << 16)


def test_public_sockets_share_a_port(stack):
    first = stack.enter_context(sockets.open_public("127.0.0.1", 0, 1 << 16))
    stack.enter_context(sockets.open_public("127.0.0.1", first.getsockname()[1], 1 << 16))
    assert sockets.receive_buffer_octets(first) >= 1 << 16
