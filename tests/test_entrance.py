"""The entrance: sessions leave a way that is lost or drains, and nobody notices."""

import contextlib
import struct
import time

import pytest

import entrance
import flows
import frame
import handover
import parley
import recovery
import ufrag

from . import crossing, test_takeover
from .crossing import counted


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(params=[False, True], ids=["plain", "tagged"])
def town(request, tmp_path, stack):
    return crossing.Crossing(tmp_path, stack, tag=request.param)


def rows(town):
    """What the entrance says of its ways."""
    memory = town.entrance.shared.memories[0].section("ways")
    return list(map(counted, entrance.rows_in(memory, len(town.faces))))


def lose(town, number):
    """The entrance finds that this way does not answer any more, and moves its flows."""
    worker, now = town.entrance.worker, time.monotonic()
    for name, way in worker._ways.ways.items():
        way.busy, silent = True, name == town.names[number]
        way.answered_at = way.heard_at = now - (60.0 if silent else 0.0)
    worker._ways.seen.clear()
    worker._ways.due = worker._ways._planned_at = now
    worker._tend(now)
    while worker._entrance.moving:
        worker._entrance.move()


def test_a_lost_way_is_left_and_no_datagram_is_asked_back(town):
    calls = [town.call(nonce) for nonce in range(16)]
    before = [town.passes(sock, header) for sock, header, _ in calls]
    assert set(map(id, before)) == set(map(id, town.faces))
    lose(town, 0)
    town.settle(town.faces[0])
    # The first datagram by the other way passes: its client was introduced before it.
    for sock, header, _ in calls:
        assert town.passes(sock, header, town.faces[0]) is town.faces[1]
    face = counted(town.faces[1].worker._face.inbound_ledger)
    moved = sum(each is town.faces[0] for each in before)
    assert not [name for name in face if name.startswith("DROPPED")], face
    assert rows(town)[0]["LOST"] == 1 and rows(town)[1]["INTRODUCED"] == moved
    states = [
        flow.state for flow in flows.read_all(town.faces[1].shared.faces[0].memory.section("flows"))
    ]
    assert states == [flows.State.ASSURED] * 16


def test_answers_by_the_way_before_still_arrive(town):
    """While the transceiver has not heard of its client by the new way, it answers by the old."""
    sock, _, _ = town.call(1)
    sock.send(crossing.MEDIA)
    town.settle()
    framed, back = town.transceiver.recvfrom(2048)
    number = next(
        i for i, face in enumerate(town.faces) if face.shared.faces[0].inner.getsockname() == back
    )
    lose(town, number)
    town.transceiver.sendto(framed[:32] + b"\x80 late", back)
    town.settle()
    assert sock.recv(2048) == b"\x80 late"


def test_a_relay_that_drains_is_left_at_once(town):
    calls = [town.call(nonce) for nonce in range(8)]
    before = [town.passes(sock, header) for sock, header, _ in calls]
    gone = before[0]
    gone.worker._face.draining = True
    worker = town.entrance.worker
    town.probe()  # it answers that it drains
    assert worker._ways.due <= time.monotonic()
    worker._tend(time.monotonic())
    while worker._entrance.moving:
        worker._entrance.move()
    for sock, header, _ in calls:
        assert town.passes(sock, header) is not gone
    assert all("LOST" not in row for row in rows(town))
    number = town.faces.index(gone)
    assert rows(town)[number]["DRAINING"] == 1


def test_a_relay_that_begins_with_nothing_asks_whose_media_it_is(town, tmp_path):
    sock, header, _ = town.call(1)
    face = town.passes(sock, header)
    fresh = flows.octets(handover.limits(face.found.relay).flows)
    face.shared.faces[0].memory.section("flows")[:] = bytes(fresh)
    face.worker = face.successor()
    sock.send(crossing.MEDIA)
    town.settle()  # dropped, asked about, introduced
    assert town.quiet()
    assert town.passes(sock, header) is face
    found = counted(face.worker._face.inbound_ledger)
    assert found["DROPPED_UNKNOWN_CLIENT"] == 1 and found["CONTROL"] == 1
    assert counted(town.entrance.worker.outbound_ledger)["CONTROL"] == 1
    # A stranger's address, asked about: the entrance has no such client, and says nothing.
    tags = parley.Tags(town.keyring, town.entrance.found.transit.tag)
    stranger = frame.header("192.0.2.1", 9)
    stranger = stranger[:28] + tags.stamp(stranger, crossing.LOOPBACK, 0)
    inner = face.shared.faces[0].transit
    inner.sendto(
        tags.question(stranger, crossing.LOOPBACK), town.entrance.shared.internal[0].getsockname()
    )
    town.settle()
    assert counted(town.entrance.worker.outbound_ledger)["CONTROL"] == 2
    assert counted(face.worker._face.inbound_ledger) == found | counted_more(face, found)


def counted_more(face, found):
    now = counted(face.worker._face.inbound_ledger)
    return {name: now[name] for name in ("RECEIVED", "FORWARDED", "OCTETS") if name in found}


def test_probes_are_answered_and_show_up(town):
    town.call(1)
    worker = town.entrance.worker
    for _ in range(3):
        town.probe()
    town.probe()
    assert [row["UP"] for row in rows(town)] == [1, 1]
    assert all(row["ROUND_TRIP"] > 0 for row in rows(town))
    assert all(way.round_trip_s > 0 for way in worker._ways.ways.values())


def test_messages_of_others_change_nothing(town):
    sock, header, _ = town.call(1)
    tags = parley.Tags(town.keyring, town.entrance.found.transit.tag)
    to = town.entrance.shared.internal[0].getsockname()
    stranger = stack_socket(town)
    probe = parley.Message(parley.Kind.PROBE, header, bytes(8), tags.keys[0])
    for message in (tags.question(header, crossing.LOOPBACK), tags.answer(probe, True)):
        stranger.sendto(message, to)
    town.settle()
    out = counted(town.entrance.worker.outbound_ledger)
    assert out["DROPPED_NOT_TRANSCEIVER"] == 2 and "CONTROL" not in out
    # From a way, but broken.
    face = town.faces[0].shared.faces[0].transit
    face.sendto(tags.question(header, crossing.LOOPBACK) + b"x", to)
    face.sendto(frame.MAGIC[:2] + b"\x09\0" + bytes(40), to)
    town.settle()
    assert counted(town.entrance.worker.outbound_ledger)["DROPPED_BAD_FRAME"] == 2
    town.passes(sock, header)


def stack_socket(town):
    return town.stack.enter_context(crossing.bound())


def test_a_client_that_is_found_in_redis_is_introduced(town):
    """Another relay knew it: no check of it has passed here, and its media goes on."""
    sock, header, text = town.client(5)
    worker = town.entrance.worker
    sock.send(crossing.MEDIA)
    town.settle()
    assert not worker._recovers
    worker._recovers = True
    sock.send(crossing.MEDIA)
    town.settle_waiting()
    worker._resolve(header, recovery.FOUND, 0, text.encode(), time.monotonic())
    town.settle()
    framed, _ = town.transceiver.recvfrom(2048)
    assert framed[:28] == header[:28] and framed[32:] == crossing.MEDIA


def test_an_entrance_that_dies_loses_and_doubles_nothing(town):
    calls = [town.call(nonce) for nonce in range(3)]
    n = deaths = 0
    died = True
    while died:
        wanted = []
        for number, (sock, header, _) in enumerate(calls):
            sock.send(payload := b"\x80" + bytes([number]) * 20)
            wanted.append(header[:28] + payload)
        died = test_takeover.dies_at(town.entrance.worker.inbound, n, "line")
        town.entrance.worker = town.entrance.successor()
        town.entrance.worker.take_over()
        town.settle()
        found = test_takeover.received(town.transceiver)
        assert sorted(each[:28] + each[32:] for each in found) == sorted(wanted), f"line {n}"
        deaths, n = deaths + died, n + 1
    assert deaths > 20


def test_the_configuration_changed_while_calls_went_on(town):
    """Ways that are none any more are left by the next worker, before anything comes."""
    calls = [town.call(nonce) for nonce in range(8)]
    used = {id(town.passes(sock, header)) for sock, header, _ in calls}
    assert len(used) == 2
    text = town.entrance.path.read_text()
    gone = frame.endpoint(town.names[0])[1]
    kept = frame.endpoint(town.names[1])[1]
    assert f"127.0.0.1:{gone}" in text
    lines = [
        f"transit = ['127.0.0.1:{kept}']" if line.startswith("transit = ") else line
        for line in text.splitlines()
    ]
    town.entrance.path.write_text("\n".join(lines))
    town.entrance.worker = worker = town.entrance.successor()
    assert worker._entrance.moving
    while worker._entrance.moving:
        worker._entrance.move()
    for sock, header, _ in calls:
        assert town.passes(sock, header, town.faces[0]) is town.faces[1]


def test_transceivers_behind_one_way_are_told_apart(tmp_path, stack):
    """A replayed check of somebody else's session moves no live call of the same cluster."""
    town = crossing.Crossing(tmp_path, stack, faces=1)
    home, address, port = town.home
    wide = ufrag.Cluster(1, home.prefix, 1, 65535)
    for node in town.nodes:
        node.path.write_text(
            node.path.read_text().replace(f"ports = [{port}, {port}]", "ports = [1, 65535]")
        )
        node.worker = node.successor()
    sock, header, text = town.call(1)
    other = ufrag.mint(town.keyring, wide, address, 9, 77)
    assert town.entrance.worker.flows.ufrag(header) == text.encode()
    sock.send(town.check(other))
    town.settle()
    assert town.entrance.worker.flows.ufrag(header) == text.encode()
    assert counted(town.entrance.worker.inbound_ledger)["DROPPED_FLOW_HELD"] == 1
    town.passes(sock, header)
    # Another session of the same transceiver is the client's own doing: an ICE restart.
    own = ufrag.mint(town.keyring, *town.home, 78)
    sock.send(town.check(own))
    town.settle()
    assert town.entrance.worker.flows.ufrag(header) == own.encode()


@pytest.mark.parametrize("faces", [1, 2, 3])
def test_an_ice_restart_stays_on_its_way(tmp_path, stack, faces):
    """A new ufrag of the same transceiver is nobody else's session, whatever way it would choose;
    nor is the client's next call there."""
    town = crossing.Crossing(tmp_path, stack, faces=faces)
    for nonce in range(10):
        sock, header, _ = town.call(nonce)
        way = town.passes(sock, header)
        own = ufrag.mint(town.keyring, *town.home, 100 + nonce)
        sock.send(town.check(own))
        town.settle()
        assert town.transceiver.recv(2048)[:28] == header[:28]
        assert town.entrance.worker.flows.ufrag(header) == own.encode()
        assert town.passes(sock, header) is way
    assert "DROPPED_FLOW_HELD" not in counted(town.entrance.worker.inbound_ledger)


def test_answers_that_nobody_could_have_given_are_ignored(town):
    """From the very address of a way: only an answer to a probe of ours counts, and nothing in it
    can hurt."""
    town.call(1)
    tags = parley.Tags(town.keyring, town.entrance.found.transit.tag)
    to = town.entrance.shared.internal[0].getsockname()
    face = town.faces[0].shared.faces[0].transit
    before = {name: way.answered_at for name, way in town.entrance.worker._ways.ways.items()}
    for body in (struct.pack("<d", float("-inf")), struct.pack("<d", -1e300), b"\xff" * 8):
        probe = parley.Message(parley.Kind.PROBE, frame.header("::", 0), body, tags.keys[0])
        face.sendto(tags.answer(probe, True), to)
    town.settle()
    ways = town.entrance.worker._ways.ways
    assert {name: way.answered_at for name, way in ways.items()} == before
    assert not any(way.draining for way in ways.values())
    town.probe()
    assert all(way.answered_at > before[name] for name, way in ways.items())


def test_tags_are_remembered_for_clients_that_are_here(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, tag=True)
    sock, header, text = town.call(1)
    worker = town.entrance.worker
    for number in range(entrance.STAMPS_MORE + 500):
        far = frame.header("192.0.2.1", number)
        worker.flows.follow(far, town.names[0], text.encode(), 7, False, time.monotonic())
        worker._entrance.stamp_of(far)
    assert len(worker._entrance._stamps) <= entrance.STAMPS_MORE + 10
    town.passes(sock, header)


@pytest.mark.parametrize("to", ["direct", "transit"])
def test_a_cluster_is_reached_in_another_way_after_a_reload(tmp_path, stack, to):
    town = crossing.Crossing(tmp_path, stack)
    both = town.entrance.path.read_text()
    flat = "\n".join(line for line in both.splitlines() if not line.startswith("transit = "))
    if to == "transit":
        town.entrance.path.write_text(flat)
        town.entrance.worker = town.entrance.successor()
    calls = []
    for nonce in range(6):
        sock, header, text = town.client(nonce)
        sock.send(town.check(text))
        town.settle()
        framed, back = town.transceiver.recvfrom(2048)
        town.transceiver.sendto(framed[:32] + b"\x16 hello", back)
        town.settle()
        calls.append((sock, header))
        assert sock.recv(2048)
    town.entrance.path.write_text(flat if to == "direct" else both)
    worker = town.entrance.worker = town.entrance.successor()
    assert worker._tends and worker._patience_ms(0.0) == 0
    while worker._entrance.moving:
        worker._tend(time.monotonic())
    town.settle()
    inners = {face.shared.faces[0].inner.getsockname() for face in town.faces}
    for sock, _ in calls:
        sock.send(crossing.MEDIA)
        town.settle()
        framed, back = town.transceiver.recvfrom(2048)
        assert (back in inners) == (to == "transit")
        town.transceiver.sendto(framed, back)
        town.settle()
        assert sock.recv(2048) == crossing.MEDIA


def test_an_entrance_that_dies_while_it_moves_flows_loses_nothing(town):
    calls = [town.call(nonce) for nonce in range(3)]
    n, died = 0, True
    while died:
        worker = town.entrance.worker
        gone = worker.flows.hops[calls[0][1]]
        for name, way in worker._ways.ways.items():
            way.up = name != gone
        worker._ways.rank()
        worker._entrance._move_from({gone})
        died = test_takeover.dies_at(worker._entrance.move, n, "line")
        town.entrance.worker = town.entrance.successor()
        for sock, header, _ in calls:
            town.passes(sock, header)
        for node in town.faces:
            drops = node.worker._face.inbound_ledger.drops()
            assert not drops, (n, drops)
        n += 1
    assert n > 10


def test_a_move_while_keys_change_takes_the_tag_of_its_new_way(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=2, tag=True)
    new = crossing.KEYS + "1 " + "43" * 32 + "\n"
    for node in (town.entrance, town.faces[0]):
        (node.path.parent / "keys").write_text(new)
        node.worker = node.successor()
    town.probe()
    calls = [town.call(nonce) for nonce in range(12)]
    used = {id(town.passes(sock, header)) for sock, header, _ in calls}
    assert len(used) == 2
    lose(town, 0)
    for sock, header, _ in calls:
        assert town.passes(sock, header) is town.faces[1]
    # A worker that comes after it knows which key to use where.
    town.entrance.worker = town.entrance.successor()
    for sock, header, _ in calls:
        assert town.passes(sock, header) is town.faces[1]


def test_a_worker_that_comes_later_knows_which_way_is_lost(town):
    town.call(1)
    town.probe()
    lose(town, 0)
    town.entrance.worker = town.entrance.successor()
    ways = town.entrance.worker._ways
    assert [way.up for way in ways.ways.values()] == [False, True]
    assert {ways.choose(1, b"%023d" % n) for n in range(50)} == {town.names[1]}
