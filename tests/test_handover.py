"""What a worker leaves to its successor, and a relay to the next one.

A stand-in for systemd keeps the descriptors (test_systemd has the real one): real processes, real
signals, and media all the while.
"""

import contextlib
import dataclasses
import os
import signal
import socket

import pytest

import endpoints
import flows
import frame
import handover
import host
import legacy
import settings

from . import node


def test_limits_are_shared_out() -> None:
    """No worker has less than its part, and all of them together no less than was configured."""
    table = settings.RelayTable(
        public=endpoints.Endpoint("127.0.0.1:3478"),
        internal=endpoints.Endpoint("127.0.0.1:3500"),
        workers=3,
        flows_max=10,
        flows_tentative_max=4,
    )
    limits = handover.limits(table)
    assert (limits.flows, limits.tentative) == (4, 2)
    assert dataclasses.asdict(limits)["addresses"] == table.addresses_per_ufrag_max


@pytest.fixture
def site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield node.Site(tmp_path, stack)


@pytest.fixture
def manager(site):
    return node.Manager(site.folder, site.stack)


ALL = ["internal-0", "internal-1", "memory-0", "memory-1", "public-0", "public-1", "relay"]


def next_one(site, manager, media, before, units=()):
    """The manager starts the next relay after one that has ended, with all that it keeps."""
    media.run(lambda: manager.hear() or before.ended())
    after = site.start(manager=manager, handed=[*units, *manager.held])
    media.run(lambda: manager.hear() or after.said("ready"))
    media.run(at_least=100)
    return after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_restart_loses_nothing(site, manager, number):
    """Also when the supervisor itself is killed: its workers stop with it."""
    running = site.start(manager=manager)
    running.wait("ready")
    media = node.Media(site)
    assert manager.names() == ALL
    flows_before = site.flows()
    for _ in range(2):
        running.send(number)
        running = next_one(site, manager, media, running)
        assert running.said("2 of 2 workers' memories are taken over as they are")
        assert manager.names() == ALL
    assert media.lost() == 0
    assert site.flows() == flows_before
    running.send(signal.SIGINT)
    assert running.code() == 0


CHANGES = {
    "fewer flows": {"more": "flows_max = 100\nflows_tentative_max = 100"},
    "more flows": {"more": "flows_max = 300000"},
    "batches": {"more": "batch_size = 16"},
    "datagrams": {"more": "datagram_octets_max = 1400"},
    "more workers": {"workers": 3},
    "fewer workers": {"workers": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_flows_are_brought_over_into_memory_of_another_size(site, manager, change):
    arguments = CHANGES[change]
    running = site.start(manager=manager)
    running.wait("ready")
    media = node.Media(site)
    media.run()
    before = site.flows()
    assert media.lost() == 0
    site.configure(**arguments)
    running.send(signal.SIGINT)
    sent = media.sent
    running = next_one(site, manager, media, running)
    assert running.said("flows brought over, 0 found no room")
    assert site.flows() == before
    lost = media.lost(0.5 if arguments.get("workers") == 1 else node.PATIENCE_S)
    if arguments.get("workers") == 1:
        # Datagrams that waited in the socket of the worker that there is no more.
        assert running.said("public-1 is left over: closed")
        assert lost <= media.sent - sent
    else:
        assert lost == 0
    count = arguments.get("workers", 2)
    assert len(manager.names()) == 3 * count + 1
    # What is stored now is what the next one takes as it is.
    running.send(signal.SIGKILL)
    running = next_one(site, manager, media, running)
    assert running.said(f"{count} of {count} workers' memories are taken over as they are")
    assert site.flows() == before


def test_a_layout_of_the_future_is_refused_and_sockets_are_not(site, manager):
    running = site.start(manager=manager, LAYOUT="99")
    running.wait("ready")
    media = node.Media(site)
    assert manager.names() == ALL
    running.send(signal.SIGINT)
    running.code()
    for client in media.clients:
        client.send(b"\x80 waits in the socket")
    running = site.start(manager=manager, handed=manager.held)
    running.wait("ready")
    assert running.said("memory-0 has layout 99, which this version cannot read")
    assert not running.said("public-0 is")
    assert site.flows() == set()
    assert node.Media(site).clients  # new ones get through
    assert manager.names() == ALL


def test_a_handover_to_another_size(site):
    """From a relay that runs: its flows are read when its workers have stopped."""
    first = site.start()
    first.wait("ready")
    media = node.Media(site)
    before = site.flows()
    site.configure(more="flows_max = 10000\nbatch_size = 32")
    heir = site.start("handover")
    media.run(lambda: heir.said("ready") and first.ended())
    media.run()
    assert heir.said("brought over")
    assert media.lost() == 0
    assert site.flows() == before


def first_layout(flow, slots=512):
    """A memory as relays of layout 1 had it: no description, flows in slots of 128 octets."""
    sections = {"inbound": (0, 256), "flows": (4096, slots * 128)}
    fd = os.memfd_create("earshot-relay")
    os.ftruncate(fd, 4096 + slots * 128)
    slot = flows.struct.Struct("<BB6x32s32s24sdd").pack(
        flow.state, len(flow.hop), flow.header, flow.hop, flow.ufrag, *flow[4:6]
    )
    os.pwrite(fd, slot, 4096 + 7 * 128)
    return fd, sections


@pytest.mark.parametrize("state", [flows.State.ASSURED, flows.State.TENTATIVE])
def test_the_first_layout_is_read(site, state):
    hop = frame.name("127.0.0.1", 9000, socket.AF_INET)
    assured_at = 2.0 if state is flows.State.ASSURED else 0.0
    flow = flows.Flow(state, frame.header("192.0.2.1", 1), hop, b"x" * 23, 1.0, assured_at)
    fd, sections = first_layout(flow)
    site.configure(workers=1)
    estate = legacy.Estate([("memory-0", fd)], sections=sections)
    shared = handover.Shared(settings.load(site.config, settings.Relay), estate)
    assert list(flows.read_all(shared.memories[0].section("flows"))) == [flow]
    close(shared)


@pytest.mark.parametrize("state", [flows.State.ASSURED, flows.State.TENTATIVE])
def test_the_second_layout_is_read(site, state):
    """It describes itself, and knows no SSRC: such clients are listened to from the first."""
    hop = frame.name("127.0.0.1", 9000, socket.AF_INET)
    assured_at = 2.0 if state is flows.State.ASSURED else 0.0
    flow = flows.Flow(state, frame.header("192.0.2.1", 1), hop, b"x" * 23, 1.0, assured_at)
    site.configure(workers=1)
    found = settings.load(site.config, settings.Relay)
    sizes = handover.sections(found, socket.AF_INET)
    memory = host.SharedMemory("earshot-relay", sizes, 2, {"flows": 1})
    slot = flows.struct.Struct("<B7x32s32p24pdd").pack(
        state, flow.header, hop, flow.ufrag, *flow[4:6]
    )
    memory.section("flows")[7 * 128 : 7 * 128 + len(slot)] = slot
    estate = legacy.Estate([("memory-0", os.dup(memory.fd))])
    shared = handover.Shared(found, estate)
    section = shared.memories[0].section("flows")
    assert list(flows.read_all(section)) == [flow]
    table = flows.Table(section, handover.limits(found.relay), 3.0)
    assert table.checks(flow.header, flow.ufrag, 3.0)
    assert set(table.listening) == ({flow.header} if assured_at else set())
    os.close(memory.fd)
    close(shared)


def close(shared):
    for sock in (*shared.public, *shared.internal, *(end for pair in shared.asks for end in pair)):
        sock.close()
    for memory in (*shared.memories, shared.relay):
        os.close(memory.fd)


def test_what_does_not_fit_is_opened_anew(site, manager):
    """Another public address: the socket of the old one is closed, also in the store."""
    running = site.start(manager=manager)
    running.wait("ready")
    manager.hear()
    running.send(signal.SIGINT)
    running.code()
    old = site.public
    site.public = node.free_ports(1)
    site.configure()
    running = site.start(manager=manager, handed=manager.held)
    running.wait("ready")
    assert running.said(f"public-0 is not taken over: it is bound to port {old}")
    assert manager.names() == ALL
    node.Media(site).run()
    bound = [socket.socket(fileno=os.dup(fd)) for name, fd in manager.held if "public" in name]
    assert {sock.getsockname()[1] for sock in bound} == {site.public}
    for sock in bound:
        sock.close()


def test_sockets_of_a_socket_unit(site, manager):
    """Used first, whatever their names; the others are opened beside. They come at every start."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as public, node.bound() as internal:
        public.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        public.bind(("::ffff:127.0.0.1", site.public))
        site.internal = internal.getsockname()[1]
        site.configure(workers=1)
        units = [("earshot", internal.fileno()), ("earshot", public.fileno())]
        inodes = {os.fstat(fd).st_ino for _, fd in units}
        running = site.start(manager=manager, handed=units)
        running.wait("ready")
        media = node.Media(site)
        for _ in range(2):
            manager.hear()
            kept = {
                os.fstat(fd).st_ino for name, fd in manager.held if "ic-" in name or "l-" in name
            }
            assert inodes == kept
            assert not running.said("left over")
            running.send(signal.SIGINT)
            running = next_one(site, manager, media, running, units)
        assert media.lost() == 0


def test_a_memory_knows_what_it_is_for(site):
    found = settings.load(site.config, settings.Relay)
    shared = handover.Shared(found, legacy.Estate())
    again = host.SharedMemory.adopt(os.dup(shared.memories[0].fd))
    assert again.layout == handover.LAYOUT
    assert again.parameters == handover.parameters(found.relay, socket.AF_INET)
    assert again.parameters["batch_size"] == found.relay.batch_size
    os.close(again.fd)
    close(shared)
