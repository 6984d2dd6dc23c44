"""The relay's hit path runs no Python for a single datagram: lines executed, counted and compared.

A worker in this process, its real sockets, one client with a flow. The interpreter's trace hook
counts every line of every function that a batch runs through. Whether the batch holds two datagrams
or sixty, it must be the same number, both ways: a loop over datagrams would show in it.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import metrics

from . import workbench


def up(bench: workbench.Bench, n: int) -> int:
    """Lines that a batch of n takes from the client to its transceiver."""
    for number in range(n):
        bench.client.send(b"\x80 media %d" % number)
    lines = traced(bench.worker.inbound)
    for number in range(n):
        assert bench.transceiver.recv(2048) == bench.header + b"\x80 media %d" % number
    return lines


def down(bench: workbench.Bench, n: int) -> int:
    """The same, the other way round."""
    for number in range(n):
        bench.transceiver.sendto(bench.header + b"\x80 reply %d" % number, bench.back)
    lines = traced(bench.worker.outbound)
    for number in range(n):
        assert bench.client.recv(2048) == b"\x80 reply %d" % number
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
def bench(tmp_path: Path) -> Iterator[workbench.Bench]:
    bench = workbench.Bench(tmp_path)
    # The first media says its SSRC, and is looked at.
    bench.client.send(bytes([0x80]) + bytes(range(1, 12)))
    bench.run(bench.worker.inbound, bench.shared.public[0])
    bench.transceiver.recv(2048)
    assert not bench.worker.flows.listening
    yield bench
    bench.close()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_batch_of_hits_runs_as_many_lines_as_two(bench: workbench.Bench, way: str) -> None:
    measure = {"up": up, "down": down}[way]
    lines = {n: measure(bench, n) for n in (2, 10, 60)}
    print(way, lines)
    assert len(set(lines.values())) == 1
    assert 0 < lines[60] < 100


def test_the_measure_sees_a_loop(bench: workbench.Bench) -> None:
    """The control: checks of a known client are judged one by one, and that shows."""

    def checks(n: int) -> int:
        for _ in range(n):
            bench.client.send(b"\x00\x11" + b"\x00" * 18)
        lines = traced(bench.worker.inbound)
        for _ in range(n):
            bench.transceiver.recv(2048)
        return lines

    assert checks(20) > checks(2) + 18


def test_nothing_is_dropped_and_no_thread_is_started(bench: workbench.Bench) -> None:
    threads = threading.active_count()
    up(bench, 30)
    down(bench, 30)
    inbound, outbound = bench.worker.inbound_ledger, bench.worker.outbound_ledger
    assert inbound[metrics.Inbound.FORWARDED] == 32
    assert outbound[metrics.Outbound.FORWARDED] == 31
    assert inbound.drops() == outbound.drops() == {}
    assert [inbound.missing(), outbound.missing()] == [0, 0]
    assert threading.active_count() == threads
