"""Two tiers of relays inside the test's process: an entrance, and relays of the cluster behind it.

    client -- entrance's worker -- transit faces of several relays' workers -- transceiver

Real sockets on loopback, and no loop: a test lets each of them take its steps, or `settle`s until
nothing moves any more.
"""

import contextlib
import ipaddress
import os
import select
import time

import frame
import handover
import settings
import stun
import ufrag
import worker

from . import ports
from .workbench import PATIENCE_S, bound

KEYS = "0 " + "42" * 32 + "\n"

RELAY = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 1
batch_size = {batch}
flows_max = 4096
flows_tentative_max = 4096
state_dir = "."

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [{transceiver}, {transceiver}]
{more}
"""

FACE = """
[transit]
listen = "127.0.0.1:{listen}"
internal = "127.0.0.1:{inner}"
relay_prefixes = ["127.0.0.0/8"]
tag = {tag}
"""

LOOPBACK = frame.packed_address(frame.name("127.0.0.1", 1, 2))
"""The address that entrances here send from."""

MEDIA = b"\x80\x6f\0\1\0\0\0\2\0\0\0\x07 media"


class Node:
    """A relay of one worker in this process."""

    def __init__(self, folder, text, keys=KEYS):
        folder.mkdir(exist_ok=True)
        self.path = folder / "relay.toml"
        (folder / "keys").write_text(keys)
        (folder / "keys").chmod(0o600)
        self.path.write_text(text)
        self.found = settings.load(self.path, settings.Relay)
        self.shared = handover.Shared(self.found)
        self.worker = self.successor()

    def successor(self):
        """Another worker over the same sockets and memory, with the files as they are now."""
        found = settings.load(self.path, settings.Relay)
        return worker.Worker(self.shared, 0, found, found.keys.load(), time.monotonic())

    def steps(self):
        """The socket that each of its steps reads from."""
        found = {
            self.shared.public[0]: self.worker.inbound,
            self.shared.internal[0]: self.worker.outbound,
        }
        face = self.shared.faces[0]
        if face:
            found[face.transit] = self.worker._face.inbound
            found[face.inner] = self.worker._face.outbound
        return found

    def ledgers(self):
        """All of its counters; each datagram is in one of them."""
        found = [self.worker.inbound_ledger, self.worker.outbound_ledger]
        face = self.worker._face
        return found + ([face.inbound_ledger, face.outbound_ledger] if face else [])

    def close(self):
        face = self.shared.faces[0]
        for sock in (
            *self.shared.public,
            *self.shared.internal,
            *(face[:2] if face else ()),
            *self.shared.asks[0],
        ):
            sock.close()


class Crossing:
    """One entrance, `faces` relays of the cluster, one transceiver and any number of clients."""

    def __init__(self, folder, stack, faces=2, tag=False, face_tag=None, batch=64, timeout_s=0.5):
        self.stack = stack
        self.transceiver = stack.enter_context(bound())
        port = self.transceiver.getsockname()[1]
        shape = {"transceiver": port, "batch": batch}
        flag = str(tag if face_tag is None else face_tag).lower()
        self.faces, ways = [], []
        for number in range(faces):
            public, internal, listen, inner = ports.free(4)
            more = FACE.format(listen=listen, inner=inner, tag=flag)
            text = RELAY.format(public=public, internal=internal, more=more, **shape)
            self.faces.append(self._node(folder / f"face-{number}", text))
            ways.append(f"127.0.0.1:{listen}")
        public, internal = ports.free(2)
        more = f"transit = {ways}\n[transit]\ntag = {str(tag).lower()}\ntimeout_s = {timeout_s}"
        text = RELAY.format(public=public, internal=internal, more=more, **shape)
        self.entrance = self._node(folder / "entrance", text)
        self.public = "127.0.0.1", public
        self.names = [frame.name("127.0.0.1", int(way.split(":")[1]), 2) for way in ways]
        self.keyring = self.entrance.found.keys.load()
        self.home = (
            ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), port, port),
            ipaddress.ip_address("127.0.0.1"),
            port,
        )
        self.clients = []

    def _node(self, folder, text):
        return self.stack.enter_context(contextlib.closing(Node(folder, text)))

    @property
    def nodes(self):
        return [self.entrance, *self.faces]

    def settle(self, *without):
        """Let all of them work, but for those that are lost, until nothing moves any more."""
        steps = {}
        for node in self.nodes:
            if node not in without:
                steps |= node.steps()
        deadline = time.monotonic() + PATIENCE_S
        while ready := select.select(list(steps), [], [], 0)[0]:
            assert time.monotonic() < deadline
            for sock in ready:
                steps[sock]()
        for node in self.nodes:
            for ledger in node.ledgers():
                assert ledger.missing() == 0, str(ledger)

    def probe(self):
        """All ways are probed, and answer."""
        ways, now = self.entrance.worker._ways, time.monotonic()
        for way in ways.ways.values():
            way.probed_at = 0.0
        ways.due = ways._planned_at = now
        self.entrance.worker._tend(now)
        self.settle()

    def settle_waiting(self):
        """The same for the entrance alone, where a datagram may be left waiting for the keeper."""
        sock = self.entrance.shared.public[0]
        assert select.select([sock], [], [], PATIENCE_S)[0]
        self.entrance.worker.inbound()

    def client(self, nonce):
        """One that was given a session: its socket, header and ufrag."""
        sock = self.stack.enter_context(bound())
        sock.connect(self.public)
        self.clients.append(sock)
        return sock, frame.header(*sock.getsockname()), ufrag.mint(self.keyring, *self.home, nonce)

    def check(self, text):
        password = ufrag.password(self.keyring, text)
        return stun.request(os.urandom(12), f"{text}:x", password)

    def call(self, nonce):
        """A client whose flow is assured all the way: its socket, header and ufrag."""
        sock, header, text = self.client(nonce)
        sock.send(self.check(text))
        self.settle()
        framed, back = self.transceiver.recvfrom(2048)
        assert framed[:28] == header[:28]
        self.transceiver.sendto(framed[:32] + b"\x16 hello", back)
        self.settle()
        assert sock.recv(2048) == b"\x16 hello"
        return sock, header, text

    def passes(self, sock, header, *without, payload=MEDIA):
        """Media goes all the way and an answer back; returns who delivered it."""
        sock.send(payload)
        self.settle(*without)
        framed, back = self.transceiver.recvfrom(2048)
        assert framed[:28] == header[:28] and framed[32:] == payload
        self.transceiver.sendto(framed[:32] + b"\x80 back", back)
        self.settle(*without)
        assert sock.recv(2048) == b"\x80 back"
        return next(face for face in self.faces if face.shared.faces[0].inner.getsockname() == back)

    def quiet(self):
        """Nothing waits anywhere."""
        return not select.select([self.transceiver, *self.clients], [], [], 0)[0]


def counted(ledger):
    """What is not zero, by name."""
    return {kind.name: ledger[kind] for kind in ledger.kinds if ledger[kind]}
