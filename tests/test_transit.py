"""The transit face: frames of other relays' clients, both ways, and what is let in there."""

import contextlib
import time

import pytest

import frame
import metrics
import parley
import recovery
import transit
import ufrag

from . import crossing, node, test_takeover
from .crossing import counted


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("tag", [False, True], ids=["plain", "tagged"])
def test_a_call_goes_through_two_relays_and_back(tmp_path, stack, tag):
    town = crossing.Crossing(tmp_path, stack, tag=tag)
    for nonce in range(12):
        sock, header, _ = town.call(nonce)
        for _ in range(3):
            town.passes(sock, header)
    assert town.quiet()
    used = [face for face in town.faces if counted(face.worker._face.inbound_ledger)]
    assert len(used) == 2  # both are ways of some of them
    inbound = [counted(face.worker._face.inbound_ledger) for face in used]
    assert sum(each["FORWARDED"] for each in inbound) == 12 * 4
    assert all(set(each) == {"RECEIVED", "FORWARDED", "OCTETS"} for each in inbound)
    assert all(not any(counted(each) for each in face.ledgers()[:2]) for face in town.faces)


def test_frames_pass_unchanged(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    sock, header, _ = town.call(1)
    tags = parley.Tags(town.keyring, False)
    stamped = header[:28] + tags.stamp(header, crossing.LOOPBACK, 0)
    for payload in (b"\x80", b"\x80" * 172, b"\x16" * 1500):
        sock.send(payload)
        town.settle()
        framed, back = town.transceiver.recvfrom(2048)
        assert framed == stamped + payload
        town.transceiver.sendto(framed, back)
        town.settle()
        assert sock.recv(2048) == payload


# --- what is let in -------------------------------------------------------------------------------


def face_of(town, number=0):
    """The face, where relays send to, and its counters inbound."""
    ends = town.faces[number].shared.faces[0]
    ledger = town.faces[number].worker._face.inbound_ledger
    return ends.transit.getsockname(), lambda: counted(ledger)


def test_frames_come_from_relays_alone(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    relay_ = town.faces[0]
    sock, header, text = town.call(1)
    to, found = face_of(town)
    relay_.path.write_text(
        relay_.path.read_text().replace(
            'relay_prefixes = ["127.0.0.0/8', 'relay_prefixes = ["127.9.9.9/32'
        )
    )
    relay_.worker = relay_.successor()
    before = found()
    stranger = stack.enter_context(crossing.bound())
    for octets in (header + crossing.MEDIA, header + town.check(text), b"", b"x" * 40):
        stranger.sendto(octets, to)
    sock.send(town.check(text))  # a check is looked at, also by the way it came before
    town.settle()
    now = found()
    assert now["DROPPED_NOT_RELAY"] == 4
    assert now["FORWARDED"] == before["FORWARDED"] + 1  # a way that is known stays good
    town.transceiver.recv(2048)
    assert town.quiet()


def test_what_is_no_frame_is_dropped_and_counted(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    _, header, text = town.call(1)
    to, found = face_of(town)
    relay = stack.enter_context(crossing.bound())
    relay.sendto(b"", to)
    relay.sendto(header[:31], to)
    relay.sendto(b"\xc5\x02" + header[2:] + crossing.MEDIA, to)
    relay.sendto(frame.MAGIC + b"\x02" + header[5:] + crossing.MEDIA, to)
    town.settle()
    assert found()["DROPPED_BAD_FRAME"] == 4
    relay.sendto(header + b"\x80" * 1501, to)
    relay.sendto(frame.MAGIC[:2] + b"\x07\0" + header[4:] + b"body", to)
    relay.sendto(header + town.check(text)[:-1], to)
    forged = text[:-3] + ("AAE" if not text.endswith("AAE") else "AAI")
    relay.sendto(header + town.check(forged), to)
    town.settle()
    now = found()
    assert now["DROPPED_OVERSIZED"] == now["DROPPED_BAD_TAG"] == 1
    assert now["DROPPED_STUN_TRUNCATED"] == now["DROPPED_UFRAG_FORGED"] == 1
    assert town.quiet()


def test_media_of_a_stranger_is_asked_about_within_a_budget(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    to, found = face_of(town)
    relay = stack.enter_context(crossing.bound())
    relay.setblocking(False)
    asked = 0
    # The second of the budget does not end while this runs.
    town.faces[0].worker._face._questions_renewed_at = time.monotonic() + 3600
    for number in range(transit.QUESTIONS_PER_S + 100):
        relay.sendto(frame.header("192.0.2.1", number + 1) + crossing.MEDIA, to)
        if number % 50 == 49:
            town.settle()
            with contextlib.suppress(BlockingIOError):
                while True:
                    octets = relay.recv(100)
                    assert parley.is_message(octets[:32])
                    asked += 1
    assert asked == transit.QUESTIONS_PER_S
    assert found()["DROPPED_UNKNOWN_CLIENT"] == transit.QUESTIONS_PER_S + 100


@pytest.mark.parametrize("text", ["forged", "elsewhere", "unknown"])
def test_an_introduction_leads_to_transceivers_of_this_cluster_alone(tmp_path, stack, text):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    to, found = face_of(town)
    home, address, port = town.home
    wide = ufrag.Cluster(9 if text == "unknown" else 1, home.prefix, 1, 65535)
    ufrags = {
        "forged": "A" * 23,
        "elsewhere": ufrag.mint(town.keyring, wide, address, port - 1, 1),
        "unknown": ufrag.mint(town.keyring, wide, address, port, 1),
    }
    relay = stack.enter_context(crossing.bound())
    tags = parley.Tags(town.keyring, False)
    header = frame.header("192.0.2.1", 5)
    assured = parley.Standing.ASSURED
    relay.sendto(tags.introduction(header, ufrags[text].encode(), assured, 0), to)
    relay.sendto(header + crossing.MEDIA, to)
    town.settle()
    assert found()["DROPPED_RECOVERED_INVALID"] == 1 and "FORWARDED" not in found()


def test_where_tags_are_demanded_nothing_passes_without_one(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1, tag=True)
    _, header, text = town.client(1)
    to, found = face_of(town)
    relay = stack.enter_context(crossing.bound())
    tags = parley.Tags(town.keyring, True)
    strangers = parley.Tags(ufrag.Keyring.parse("0 " + "44" * 32), True)
    stamp, assured = tags.stamp(header, crossing.LOOPBACK, 0), parley.Standing.ASSURED
    stamped = header[:28] + stamp
    right = tags.introduction(stamped, text.encode(), assured, 0)
    for octets in (
        strangers.probe(b"12345678", 0),
        strangers.introduction(stamped, text.encode(), assured, 0),
        right[:28] + bytes(4) + right[32:],  # a message of ours, for a header that is not
        header + town.check(text),
        header[:28] + bytes([*stamp[:3], stamp[3] ^ 1]) + town.check(text),
        header[:28] + strangers.stamp(header, crossing.LOOPBACK, 0) + town.check(text),
    ):
        relay.sendto(octets, to)
    elsewhere = stack.enter_context(node.bound("127.0.0.2"))
    elsewhere.sendto(stamped + town.check(text), to)  # it belongs to another entrance's address
    town.settle()
    assert found() == {"RECEIVED": 7, "DROPPED_BAD_TAG": 7}
    relay.sendto(stamped + town.check(text), to)
    town.settle()
    assert town.transceiver.recv(2048)[:32] == stamped


@pytest.mark.parametrize("order", ["entrance", "faces"])
def test_tags_are_demanded_from_now_on_and_nothing_is_lost(tmp_path, stack, order):
    town = crossing.Crossing(tmp_path, stack, faces=2)
    calls = [town.call(nonce)[:2] for nonce in range(6)]
    for flag in ("true", "false"):
        for each in town.nodes if order == "entrance" else town.nodes[::-1]:
            lines = each.path.read_text().splitlines()
            each.path.write_text(
                "\n".join(f"tag = {flag}" if line.startswith("tag = ") else line for line in lines)
            )
            each.worker = each.successor()
            town.probe()
            for sock, header in calls:
                town.passes(sock, header)
    for each in town.faces:
        assert not each.worker._face.inbound_ledger.drops()
    assert all(way.up for way in town.entrance.worker._ways.ways.values())


def test_a_frame_with_another_clients_tag_is_none(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1, tag=True)
    _, header, _ = town.call(1)
    to, found = face_of(town)
    tags = parley.Tags(town.keyring, True)
    relay = stack.enter_context(crossing.bound())
    other = frame.header("192.0.2.9", 9)[:28] + tags.stamp(header, crossing.LOOPBACK, 0)
    relay.sendto(other + crossing.MEDIA, to)
    town.settle()
    assert found()["DROPPED_BAD_TAG"] == 1


@pytest.mark.parametrize("first", ["entrance", "faces"])
def test_tags_rotate_with_the_keys_and_nothing_is_lost(tmp_path, stack, first):
    """As the documents say: relays get the new line, one by one; at last the old one goes, one by
    one. Which of them is first does not matter, and each may use its keys for as long as it likes
    before the next one has them."""
    town = crossing.Crossing(tmp_path, stack, faces=2, tag=True)
    calls = [town.call(nonce)[:2] for nonce in range(6)]
    new = "1 " + "43" * 32 + "\n"
    nodes = town.nodes if first == "entrance" else town.nodes[::-1]
    for text in (crossing.KEYS + new, new):
        for each in nodes:
            (each.path.parent / "keys").write_text(text)
            each.worker = each.successor()
            for _ in range(3):
                for sock, header in calls:
                    town.passes(sock, header)
                town.probe()
    for each in town.faces:
        found = counted(each.worker._face.inbound_ledger)
        drops = {name for name in found if name.startswith("DROPPED")}
        assert drops <= {"DROPPED_BAD_TAG"}, found  # probes under a key that it has not, or no more
        assert found.get("DROPPED_BAD_TAG", 0) <= 12
    keys = town.entrance.worker._entrance._keys.values()
    assert [each.best for each in keys] == [1, 1]


# --- whose answers go where -----------------------------------------------------------------------


def test_a_client_with_two_entrances_has_two_ways_back(tmp_path, stack):
    """It has one address, and a check by the entrance that it does not use is answered by that one,
    while its media goes on by the other."""
    town = crossing.Crossing(tmp_path, stack, faces=1, tag=True)
    sock, header, text = town.call(1)
    to, _ = face_of(town)
    second = stack.enter_context(node.bound("127.0.0.2"))
    second.setblocking(True)
    second.settimeout(crossing.PATIENCE_S)
    address = frame.packed_address(frame.name("127.0.0.2", 1, 2))
    other = header[:28] + parley.Tags(town.keyring, True).stamp(header, address, 0)
    for _ in range(3):
        town.passes(sock, header)
        second.sendto(other + town.check(text), to)
        town.settle()
        checked, back = town.transceiver.recvfrom(2048)
        assert checked[:32] == other and frame.key(checked) == frame.key(header)
        # An answer to that check, media for the other way, and a check of the transceiver's own.
        sock.send(crossing.MEDIA)
        town.settle()
        framed, _ = town.transceiver.recvfrom(2048)
        for octets in (checked[:32] + b"\x01\x01 answer", framed[:32] + b"\x80 media"):
            town.transceiver.sendto(octets, back)
        town.transceiver.sendto(checked[:32] + b"\x00\x01 check", back)
        town.settle()
        assert second.recv(2048) == other + b"\x01\x01 answer"
        assert second.recv(2048) == other + b"\x00\x01 check"
        assert sock.recv(2048) == b"\x80 media"
    assert town.quiet()


def test_a_face_with_an_old_flow_believes_the_entrance(tmp_path, stack):
    """The client had a session by this face, then another one by another face, which is lost: what
    it had here before does not hold its media up, let alone lead it there."""
    town = crossing.Crossing(tmp_path, stack, faces=2)
    (home, address, port), nonce = town.home, 0
    wide = ufrag.Cluster(1, home.prefix, 1, 65535)
    second = stack.enter_context(crossing.bound())
    for each in town.nodes:
        text = each.path.read_text().replace(f"ports = [{port}, {port}]", "ports = [1, 65535]")
        each.path.write_text(text)
        each.worker = each.successor()
    sock, header, _ = town.call(nonce)
    old = town.passes(sock, header)
    while True:  # a session of another transceiver that goes by the other face
        nonce += 1
        text = ufrag.mint(town.keyring, wide, address, second.getsockname()[1], nonce)
        way = town.entrance.worker._ways.choose(1, text.encode())
        if way != town.entrance.worker.flows.hops[header]:
            break
    entrance, now = town.entrance.worker, time.monotonic()
    entrance.flows._contested[header] = now - 10.0  # its transceiver has long been silent
    sock.send(town.check(text))
    town.settle()
    framed, back = second.recvfrom(2048)
    second.sendto(framed[:32] + b"\x80 hello", back)
    town.settle()
    assert sock.recv(2048) == b"\x80 hello"
    for name, each in entrance._ways.ways.items():
        each.up = name != way
    entrance._ways.rank()
    entrance._entrance._move_from({way})
    entrance._entrance.move()
    sock.send(crossing.MEDIA)
    town.settle()
    framed, back = second.recvfrom(2048)
    assert framed[32:] == crossing.MEDIA
    assert back == old.shared.faces[0].inner.getsockname()
    assert town.quiet()


def test_a_port_that_is_used_again_is_held_once(tmp_path, stack):
    """The entrance has waited until the old transceiver was silent: the face need not, too."""
    town = crossing.Crossing(tmp_path, stack, faces=1)
    home, address, port = town.home
    wide = ufrag.Cluster(1, home.prefix, 1, 65535)
    second = stack.enter_context(crossing.bound())
    for each in town.nodes:
        text = each.path.read_text().replace(f"ports = [{port}, {port}]", "ports = [1, 65535]")
        each.path.write_text(text)
        each.worker = each.successor()
    sock, header, _ = town.call(1)
    text = ufrag.mint(town.keyring, wide, address, second.getsockname()[1], 2)
    town.entrance.worker.flows._contested[header] = time.monotonic() - 10.0
    sock.send(town.check(text))
    town.settle()
    assert second.recv(2048)[:28] == header[:28]
    assert not town.faces[0].worker._face.inbound_ledger.drops()


def test_transceivers_send_to_clients_of_their_own_alone(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    sock, header, _ = town.call(1)
    last = town.faces[0]
    to = last.shared.faces[0].inner.getsockname()
    stranger = stack.enter_context(crossing.bound())
    stranger.sendto(header + b"\x80 no", to)
    town.transceiver.sendto(frame.header("192.0.2.1", 5) + b"\x80 nobody's", to)
    town.transceiver.sendto(header[:20], to)
    town.settle()
    found = counted(last.worker._face.outbound_ledger)
    assert found["DROPPED_NOT_TRANSCEIVER"] == 1
    assert found["DROPPED_UNKNOWN_CLIENT"] == found["DROPPED_BAD_FRAME"] == 1
    assert town.quiet()
    town.passes(sock, header)


def stamped(town, header):
    """A client's header as the entrance sends it."""
    return header[:28] + parley.Tags(town.keyring, True).stamp(header, crossing.LOOPBACK, 0)


def test_idle_clients_are_forgotten_with_their_way_back(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    _, header, _ = town.call(1)
    face = town.faces[0].worker._face
    assert set(face._backs) == set(face.flows.hops) == {stamped(town, header)}
    now = time.monotonic()
    for seconds in range(0, 240, 1):
        face.sweep(now + seconds)
    assert not face._backs and not face.flows.hops


# --- a process may die at any instruction ---------------------------------------------------------


def burst(town, calls):
    """More of everything than one step takes; returns what has to arrive."""
    wanted = []
    for number, (sock, header, _) in enumerate(calls):
        for i in range(3):
            payload = b"\x80" + bytes([number, i]) * 20
            sock.send(payload)
            wanted.append(header + payload)
    town.settle(town.faces[0])
    return sorted(wanted)


@pytest.mark.parametrize("way", ["inbound", "outbound"])
@pytest.mark.parametrize("tag", [False, True], ids=["plain", "tagged"])
def test_a_face_that_dies_loses_and_doubles_nothing(tmp_path, stack, way, tag):
    town = crossing.Crossing(tmp_path, stack, faces=1, tag=tag, batch=8)
    calls = [town.call(nonce) for nonce in range(3)]
    last = town.faces[0]
    n = deaths = 0
    while True:
        wanted = burst(town, calls)
        if way == "outbound":
            town.settle()
            framed = [town.transceiver.recvfrom(2048) for _ in wanted]
            for octets, back in framed:
                town.transceiver.sendto(octets, back)
            wanted = sorted(octets[32:] for octets, _ in framed)
        step = getattr(last.worker._face, way)
        died = test_takeover.dies_at(step, n, "line")
        deaths += died
        last.worker = last.successor()
        last.worker.take_over()
        town.settle()
        socks = [town.transceiver] if way == "inbound" else [sock for sock, *_ in calls]
        found = [octets for sock in socks for octets in test_takeover.received(sock)]
        if way == "inbound":
            found = [octets[:28] + bytes(4) + octets[32:] for octets in found]
        assert sorted(found) == wanted, f"died at line {n}"
        if not died:
            break
        n += 1
    assert deaths > 20
    for ledger in last.worker._face.inbound_ledger, last.worker._face.outbound_ledger:
        assert not [name for name in counted(ledger) if name.startswith("DROPPED")]


def test_a_successor_knows_all_clients_and_their_ways_back(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=2, tag=True)
    calls = [town.call(nonce) for nonce in range(10)]
    before = [dict(each.worker._face._backs) for each in town.faces]
    for each in town.nodes:
        each.worker = each.successor()
    assert [dict(each.worker._face._backs) for each in town.faces] == before
    for sock, header, _ in calls:
        town.passes(sock, header)
    # What a torn entry says is not believed: the client's next datagram writes it again.
    for each in town.faces:
        each.shared.faces[0].memory.section("backs")[:] = b"\xff" * len(
            each.shared.faces[0].memory.section("backs")
        )
        each.worker = each.successor()
        assert not each.worker._face._backs
    for sock, header, _ in calls:
        town.passes(sock, header)


def test_followers_take_no_place_of_clients_that_check(tmp_path, stack):
    """Whoever has seen a datagram of a call can send more of it: at the face as at the entrance it
    opens what makes room for the next, and no address that a check could have."""
    town = crossing.Crossing(tmp_path, stack, faces=1)
    sock, header, text = town.call(1)
    face, entrance = town.faces[0].worker._face, town.entrance.worker
    for number in range(transit.BACKS_MORE + 50):
        far = frame.header("192.0.2.1", 1000 + number)
        status = recovery.FOLLOWS_FAR
        entrance._recovery.hold(far, memoryview(crossing.MEDIA), 1, time.monotonic())
        entrance.inbound_ledger.change({metrics.Inbound.WAITING: 1, metrics.Inbound.RECEIVED: 1})
        entrance._resolve(far, status, 7, text.encode(), time.monotonic())
        town.settle()
        assert len(test_takeover.received(town.transceiver)) == 1
    assert len(face.flows) <= 1 + 4 and len(entrance.flows) <= 1 + 4
    face.sweep(time.monotonic() + 1.0)  # ways back of those who made room are forgotten, too
    assert set(face._backs) <= set(face.flows.hops)
    assert set(face.flows.active) <= set(face.flows.hops)
    # The client itself comes from another address.
    other = stack.enter_context(crossing.bound())
    other.connect(town.public)
    other.send(town.check(text))
    town.settle()
    assert town.transceiver.recv(2048)[32:] and "DROPPED_ADDRESSES_LIMIT" not in counted(
        face.inbound_ledger
    )
    town.passes(sock, header)


def test_keys_that_are_gone_open_nothing_any_more(tmp_path, stack):
    """Also a flow from before ends with the next check that comes under one."""
    town = crossing.Crossing(tmp_path, stack, faces=1, tag=True)
    sock, _, text = town.call(1)
    face = town.faces[0]
    (face.path.parent / "keys").write_text("1 " + "43" * 32 + "\n")
    face.worker = face.successor()
    sock.send(town.check(text))
    sock.send(crossing.MEDIA)
    town.settle()
    assert counted(face.worker._face.inbound_ledger)["DROPPED_BAD_TAG"] == 2
    assert town.quiet()


def test_while_it_does_not_run_dry_strangers_wait_outside(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    sock, _, _ = town.call(1)
    face, (to, found) = town.faces[0].worker._face, face_of(town)
    relay = stack.enter_context(crossing.bound())
    tags = parley.Tags(town.keyring, False)
    relay.sendto(tags.probe(bytes(8), 0), to)
    town.settle()
    face.overloaded = True
    for number in range(40):
        relay.sendto(frame.header("192.0.2.1", number) + crossing.MEDIA, to)
    relay.sendto(tags.probe(bytes(8), 0), to)
    sock.send(crossing.MEDIA)
    town.settle(town.faces[0])  # all of it is one batch
    town.settle()
    now = found()
    assert now["DROPPED_OVERLOADED"] == 40 - 64 // transit.JUDGED_SHARE
    assert now["DROPPED_UNKNOWN_CLIENT"] == 64 // transit.JUDGED_SHARE
    assert now["CONTROL"] == 2  # relays are heard
    assert town.transceiver.recv(2048)[32:] == crossing.MEDIA
