"""The relay's hit path runs no Python for a single datagram: lines executed, counted and compared.

A worker in this process, its real sockets, one client with a flow. The interpreter's trace hook
counts every line of every function that a batch runs through. Whether the batch holds two datagrams
or sixty, it must be the same number, both ways: a loop over datagrams would show in it.
"""

import ipaddress
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import frame
import handover
import metrics
import relay
import settings
import stun
import ufrag

PATIENCE_S = 20

CONFIG = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 1
flows_max = 64
flows_tentative_max = 64
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
        spare = [bound(), bound()]
        public, internal = (sock.getsockname()[1] for sock in spare)
        for sock in spare:
            sock.close()
        (folder / "keys").write_text("0 " + "42" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        path = folder / "relay.toml"
        path.write_text(CONFIG.format(public=public, internal=internal, transceiver=port))
        found = settings.load(path, settings.Relay)
        self.shared = handover.Shared(found)
        keyring = found.keys.load()
        self.worker = relay.Worker(self.shared, 0, found, keyring, time.monotonic())
        self.client.connect(("127.0.0.1", public))
        self.header = frame.header(*self.client.getsockname())
        home = settings.clusters(found.cluster)[1]
        hint = ufrag.mint(keyring, home, ipaddress.ip_address("127.0.0.1"), port, 1)
        self.client.send(
            stun.request(os.urandom(12), f"{hint}:x", ufrag.password(keyring, hint) or b"")
        )
        assert not self.run(self.worker.inbound, self.shared.public[0])
        self.back = self.transceiver.recvfrom(2048)[1]
        # What makes the flow assured is looked at once: from here on all are plain hits.
        self.transceiver.sendto(self.header + b"\x80 hello", self.back)
        assert not self.run(self.worker.outbound, self.shared.internal[0])
        self.client.recv(2048)

    def close(self) -> None:
        for sock in (self.client, self.transceiver, *self.shared.public, *self.shared.internal):
            sock.close()

    def run(self, step: Callable[[], bool], sock: socket.socket) -> bool:
        """One step of the worker once its socket is readable."""
        assert select.select([sock], [], [], PATIENCE_S)[0]
        return step()

    def up(self, n: int) -> int:
        """Lines that a batch of n takes from the client to its transceiver."""
        for number in range(n):
            self.client.send(b"\x80 media %d" % number)
        lines = traced(self.worker.inbound)
        for number in range(n):
            assert self.transceiver.recv(2048) == self.header + b"\x80 media %d" % number
        return lines

    def down(self, n: int) -> int:
        """The same, the other way round."""
        for number in range(n):
            self.transceiver.sendto(self.header + b"\x80 reply %d" % number, self.back)
        lines = traced(self.worker.outbound)
        for number in range(n):
            assert self.client.recv(2048) == b"\x80 reply %d" % number
        return lines


def traced(step: Callable[[], bool]) -> int:
    """Lines of Python that `step` executes, in whatever module."""
    lines = 0

    def hook(*event: object) -> object:
        nonlocal lines
        lines += event[1] == "line"
        return hook

    before = sys.gettrace()
    sys.settrace(hook)
    try:
        step()
    finally:
        sys.settrace(before)
    return lines


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_batch_of_hits_runs_as_many_lines_as_two(bench: Bench, way: str) -> None:
    measure = getattr(bench, way)
    lines = {n: measure(n) for n in (2, 10, 60)}
    print(way, lines)
    assert len(set(lines.values())) == 1
    assert 0 < lines[60] < 100


def test_the_measure_sees_a_loop(bench: Bench) -> None:
    """The control: checks of a known client are judged one by one, and that shows."""

    def checks(n: int) -> int:
        for _ in range(n):
            bench.client.send(b"\x00\x11" + b"\x00" * 18)
        lines = traced(bench.worker.inbound)
        for _ in range(n):
            bench.transceiver.recv(2048)
        return lines

    assert checks(20) > checks(2) + 18


def test_nothing_is_dropped_and_no_thread_is_started(bench: Bench) -> None:
    threads = threading.active_count()
    bench.up(30)
    bench.down(30)
    inbound, outbound = bench.worker.inbound_counters, bench.worker.outbound_counters
    assert inbound[metrics.Inbound.FORWARDED] == 31
    assert outbound[metrics.Outbound.FORWARDED] == 31
    assert inbound.drops() == outbound.drops() == {}
    assert [inbound.missing(), outbound.missing()] == [0, 0]
    assert threading.active_count() == threads
