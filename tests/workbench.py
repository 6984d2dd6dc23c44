"""A relay's worker inside the test's process: its real sockets, one client with a flow."""

import ipaddress
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

import frame
import handover
import settings
import stun
import ufrag
import worker

from . import ports

PATIENCE_S = 20

CONFIG = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 1
flows_max = 4096
flows_tentative_max = 4096
state_dir = "."

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [{transceiver}, {transceiver}]
"""


def bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(PATIENCE_S)
    return sock


class Bench:
    """A worker, a client that it knows, and the client's transceiver."""

    def __init__(self, folder: Path) -> None:
        self.client, self.transceiver = bound(), bound()
        port = self.transceiver.getsockname()[1]
        public, internal = ports.free(2, socket.SOCK_DGRAM)
        (folder / "keys").write_text("0 " + "42" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        path = folder / "relay.toml"
        path.write_text(CONFIG.format(public=public, internal=internal, transceiver=port))
        found = settings.load(path, settings.Relay)
        self.shared = handover.Shared(found)
        keyring = found.keys.load()
        self.found, self.keyring = found, keyring
        self.worker = self.successor()
        self.client.connect(("127.0.0.1", public))
        self.header = frame.header(*self.client.getsockname())
        home = settings.clusters(found.cluster)[1]
        self.home = home, ipaddress.ip_address("127.0.0.1"), port
        self.client.send(self.check(1))
        assert not self.run(self.worker.inbound, self.shared.public[0])
        self.back = self.transceiver.recvfrom(2048)[1]
        # What makes the flow assured is looked at once: from here on all are plain hits.
        self.transceiver.sendto(self.header + b"\x80 hello", self.back)
        assert not self.run(self.worker.outbound, self.shared.internal[0])
        self.client.recv(2048)

    def successor(self) -> worker.Worker:
        """Another worker over the same sockets and memory."""
        return worker.Worker(self.shared, 0, self.found, self.keyring, time.monotonic())

    def check(self, nonce: int) -> bytes:
        """A first check for a session of its own."""
        hint = ufrag.mint(self.keyring, *self.home, nonce)
        return stun.request(os.urandom(12), f"{hint}:x", ufrag.password(self.keyring, hint) or b"")

    def close(self) -> None:
        for sock in (self.client, self.transceiver, *self.shared.public, *self.shared.internal):
            sock.close()

    def run(self, step: Callable[[], bool], sock: socket.socket) -> bool:
        """One step of the worker once its socket is readable."""
        assert select.select([sock], [], [], PATIENCE_S)[0]
        return step()
