"""A worker may die at any instruction: its successor forwards what it held, and counts it once.

A worker in this process, over real sockets. The interpreter's trace hook ends it at the nth step of
a batch, for every n there is; another worker takes over the same sockets and memory. Then every
datagram has arrived exactly once, and every counter is what it would have been without a death.
"""

import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import flows
import frame
import metrics

from . import workbench

IN, OUT = metrics.Inbound, metrics.Outbound
MODULES = tuple(
    f"{name}.py"
    for name in (
        *("worker", "udp", "ledger", "gate", "flows", "roaming", "expiry", "recovery"),
        *("transit", "entrance"),
    )
)


class Death(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def dies_at(step: Callable[[], object], n: int, event: str) -> bool:
    """Run `step` and end it before its nth line or opcode; False if it was over before that."""
    left = n

    def hook(frame: FrameType, what: str, _: object) -> object:
        nonlocal left
        if not frame.f_code.co_filename.endswith(MODULES):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if what == event:
            left -= 1
            if left < 0:
                raise Death
        return hook

    before = sys.gettrace()
    sys.settrace(hook)
    try:
        step()
    except Death:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[workbench.Bench]:
    bench = workbench.Bench(tmp_path)
    yield bench
    bench.close()


def received(sock: object) -> list[bytes]:
    """All that waits in a socket."""
    found = []
    while select.select([sock], [], [], 0)[0]:
        found.append(sock.recv(4096))  # type: ignore[attr-defined]
    return found


def settle(bench: workbench.Bench) -> None:
    """A successor does what is left to do."""
    bench.worker = bench.successor()
    bench.worker.take_over()
    while bench.worker.inbound() or bench.worker.outbound():
        pass


def counted(bench: workbench.Bench) -> tuple[dict[str, int], dict[str, int]]:
    ways = bench.worker.inbound_ledger, bench.worker.outbound_ledger
    assert [way.missing() for way in ways] == [0, 0], [str(way) for way in ways]
    inbound, outbound = ({kind.name: way[kind] for kind in way.kinds} for way in ways)
    return inbound, outbound


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize("way", ["inbound", "outbound"])
def test_plain_media_at_every_opcode(bench: workbench.Bench, way: str) -> None:
    payloads = [b"\x80 one", b"\x80 the second"]
    expected = {"RECEIVED": 2, "FORWARDED": 2, "OCTETS": sum(map(len, payloads))}
    deaths = 0
    while True:
        before = counted(bench)
        for payload in payloads:
            if way == "inbound":
                bench.client.send(payload)
            else:
                bench.transceiver.sendto(bench.header + payload, bench.back)
        died = dies_at(getattr(bench.worker, way), deaths, "opcode")
        settle(bench)
        if way == "inbound":
            assert received(bench.transceiver) == [bench.header + payload for payload in payloads]
        else:
            assert received(bench.client) == payloads
        ways = zip(counted(bench), before, strict=True)
        changes = [difference(after, earlier) for after, earlier in ways]
        assert changes == ([expected, {}] if way == "inbound" else [{}, expected]), deaths
        if not died:
            break
        deaths += 1
    print(f"{way}: died at each of {deaths} opcodes")
    assert deaths > 100


def test_a_mixed_batch_at_every_line(bench: workbench.Bench) -> None:
    """Drops between hits, a check of a known client, and one that opens a flow."""
    nobody, deaths = workbench.bound(), 0
    nobody.connect(bench.client.getpeername())
    while True:
        before, _ = counted(bench)
        stranger = workbench.bound()
        stranger.connect(bench.client.getpeername())
        header = frame.header(*stranger.getsockname())
        known, opens = bench.check(1), bench.check(1000 + deaths)
        bench.client.send(b"\x80 first")
        nobody.send(b"\x80 of nobody")
        bench.client.send(known)
        bench.client.send(b"\x00\x01 broken")
        stranger.send(opens)
        bench.client.send(b"x" * 1501)
        bench.client.send(b"\x80 last")
        died = dies_at(bench.worker.inbound, deaths, "line")
        settle(bench)
        forwarded = [bench.header + b"\x80 first", bench.header + known, header + opens]
        forwarded.append(bench.header + b"\x80 last")
        assert received(bench.transceiver) == forwarded
        change = difference(counted(bench)[0], before)
        octets = sum(map(len, forwarded)) - len(forwarded) * frame.HEADER_OCTETS
        assert change == {
            "RECEIVED": 7,
            "FORWARDED": 4,
            "OCTETS": octets,
            "DROPPED_UNKNOWN_CLIENT": 1,
            "DROPPED_STUN_TRUNCATED": 1,
            "DROPPED_OVERSIZED": 1,
        }, deaths
        stranger.close()
        if not died:
            break
        deaths += 1
    nobody.close()
    assert deaths > 100


def test_the_first_media_of_a_client_at_every_opcode(bench: workbench.Bench) -> None:
    """While its SSRC is noted: it is forwarded once whatever happens, and the slot stays whole."""
    media, deaths, noted = b"\x80\x6f" + bytes(6) + b"\xde\xca\xfb\xad" + b"voice", 0, 0
    section = bench.shared.memories[0].section("flows")
    (flow,) = flows.read_all(section)
    number = bench.worker.flows._slots[bench.header] * flows.SLOT_OCTETS
    while True:
        section[number + 2 : number + 8] = bytes(6)
        bench.worker.flows.listening.add(bench.header)
        bench.client.send(media)
        died = dies_at(bench.worker.inbound, deaths, "opcode")
        settle(bench)
        assert received(bench.transceiver) == [bench.header + media], deaths
        counted(bench)
        (found,) = flows.read_all(section)
        assert found._replace(ssrc=0) == flow and found.ssrc in (0, 0xDECAFBAD), deaths
        noted += found.ssrc > 0
        if not died:
            break
        deaths += 1
    assert deaths > 150 and 50 < noted < deaths


def test_the_test_would_see_a_loss(bench: workbench.Bench) -> None:
    """The control: without `take_over` what the dead worker held is lost, and shows as such."""
    bench.client.send(b"\x80 lost")
    assert dies_at(bench.worker.inbound, 12, "line")
    bench.worker = bench.successor()
    bench.worker.inbound()
    assert received(bench.transceiver) == []
