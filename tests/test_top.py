"""The live view: from counters in memory to a line a worker."""

import contextlib
import io
import os
import pty
import signal
import socket
import subprocess
import sys
import time

import orjson
import pytest
from rich.console import Console

import flows
import frame
import handover
import host
import ledger
import metrics
import settings
import top

from . import ports

PATIENCE_S = 20
CONFIG = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 2
flows_max = 200
flows_tentative_max = 200
metrics = "127.0.0.1:0"
state_dir = "."

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [9000, 9099]

{more}
"""
IN, OUT = metrics.Inbound, metrics.Outbound
BATCH = {IN.RECEIVED: 1000, IN.FORWARDED: 900, IN.OCTETS: 90_000, IN.DROPPED_OVERSIZED: 80}


class Relay:
    """A relay's memory, and what it has counted."""

    def __init__(self, folder, more=""):
        public, *internal = ports.free(3)  # an internal one for each worker
        self.path = path = folder / "relay.toml"
        path.write_text(CONFIG.format(public=public, internal=internal[0], more=more))
        self.found = settings.load(path, settings.Relay)
        self.shared = handover.Shared(self.found)
        self.memories = [*self.shared.memories, self.shared.relay]
        self.ways = [handover.counters_in(memory) for memory in self.shared.memories]
        self.supervisor = ledger.Counters(
            metrics.Supervisor, self.shared.relay.section("supervisor")
        ).values
        self.keeper = ledger.Counters(metrics.Keeper, self.shared.relay.section("keeper")).values

    def close(self):
        for sock in (*self.shared.public, *self.shared.internal):
            sock.close()
        for end in (end for pair in self.shared.asks for end in pair):
            end.close()

    def count(self):
        """A second's worth of datagrams and drops at worker 1."""
        inbound, outbound = self.ways[1]
        inbound.change(BATCH | {IN.DROPPED_UNKNOWN_CLIENT: 15, IN.RECOVERED: 3, IN.WAITING: 2})
        outbound.change({OUT.RECEIVED: 500, OUT.FORWARDED: 480, OUT.OCTETS: 50_000})
        outbound.change({OUT.DROPPED_WRONG_OWNER: 20})

    def view(self):
        """Of two seconds."""
        before = top.sample(self.memories, 1000.0, kernel_drops={0: 5})
        self.count()
        after = top.sample(self.memories, 1002.0, kernel_drops={0: 9, 1: 1})
        return top.rates(before, after, self.found, 3700.0)

    def publish(self):
        path = handover.state_file(self.found.relay)
        host.publish(path, handover.LAYOUT, self.memories)


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:

        def relay(**kwargs):
            made = Relay(tmp_path, **kwargs)
            stack.callback(made.close)
            return made

        yield relay


def test_rates_are_what_happened_between_two_samples(make):
    relay = make()
    relay.count()
    table = flows.Table(
        relay.shared.memories[1].section("flows"), handover.limits(relay.found.relay), 0
    )
    for number in range(3):
        header = frame.header("198.51.100.7", 5000 + number)
        table.open(header, frame.name("127.0.0.1", 9000, socket.AF_INET), b"%023d" % number, 0)
    table.answered([header], 1)
    idle, busy = relay.view().workers
    assert idle.inbound == idle.outbound == top.Way(0, 0) and not idle.drops
    assert busy.inbound == top.Way(500, 45_000) and busy.outbound == top.Way(250, 25_000)
    assert busy.drops == {"oversized": 40, "outbound_wrong_owner": 10, "unknown_client": 7.5}
    assert next(iter(busy.drops)) == "oversized"
    assert (busy.assured, busy.tentative) == (1, 2)
    assert (busy.recovered, busy.waiting) == (1.5, 4)
    assert (idle.kernel_drops, busy.kernel_drops) == (2, None), "one was not there before"
    assert idle.heard_ago_s is None


def test_a_share_of_a_cpu():
    row = top.WorkerSample(
        (ledger.Counters(IN), ledger.Counters(OUT)), 0, 0, 999.5, cpu_s=3.0, kernel_drops=None
    )
    own = ledger.Counters(metrics.Supervisor), ledger.Counters(metrics.Keeper)
    before = top.Sample(1000.0, [row], *own)
    after = top.Sample(1002.0, [row.__class__(row.ways, 0, 0, 1001.5, 3.5, None)], *own)
    found = type("Found", (), {"redis": None, "vip": None})()
    (worker,) = top.rates(before, after, found).workers
    assert worker.cpu_percent == pytest.approx(25) and worker.heard_ago_s == pytest.approx(0.5)


def test_a_relay_that_was_replaced_begins_anew(make):
    relay = make()
    relay.count()
    before = top.sample(relay.memories, 1.0)
    for way in relay.ways[1]:
        way.change({kind: -way[kind] for kind in way.kinds})
    idle, busy = top.rates(before, top.sample(relay.memories, 2.0), relay.found).workers
    assert busy.inbound == idle.inbound == top.Way(0, 0)
    fewer = top.sample(relay.memories[1:], 3.0)
    assert len(top.rates(before, fewer, relay.found).workers) == 1


def printed(view):
    out = io.StringIO()
    Console(file=out, width=top.PLAIN_COLUMNS).print(top.table(view))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_a_line_a_worker(make):
    relay = make()
    head, names, idle, busy = printed(relay.view())
    assert head == "relay, up 1 h 1 min 40 s, serving, 0 taken over from workers that died"
    assert names.startswith("worker in/s octets/s out/s octets/s assured tentative drops/s most")
    assert idle == "0 0 0 0 0 0 0 0 0 0 2 - never"
    assert busy == "1 500 45.0k 250 25.0k 0 0 58 oversized 2 2 - - never"


def test_the_state_of_all_of_it(make):
    relay = make(more='[redis]\nurl = "redis://127.0.0.1:1"\n[vip]\naddresses = ["203.0.113.5"]\n')
    relay.supervisor[metrics.Supervisor.DRAINING_UNTIL] = 1_062_000
    relay.supervisor[metrics.Supervisor.WORKERS_DIED] = 4
    relay.keeper[metrics.Keeper.FLOWS_LEFT] = 1200
    head = printed(relay.view())[0]
    assert head == (
        "relay, up 1 h 1 min 40 s, draining: 1,200 flows left, 1 min at the most,"
        " Redis does not answer, addresses withdrawn, 4 taken over from workers that died"
    )
    relay.supervisor[metrics.Supervisor.DRAINING_UNTIL] = 0
    relay.keeper[metrics.Keeper.REDIS_UP] = relay.keeper[metrics.Keeper.VIP_ANNOUNCED] = 1
    assert "serving, Redis answers, addresses announced" in printed(relay.view())[0]


@pytest.mark.parametrize(
    ("figure", "short"),
    [(0, "0"), (9_999, "9999"), (12_345, "12.3k"), (3.21e6, "3.2M"), (7e9, "7.0G")],
)
def test_large_figures_are_short(figure, short):
    assert top._short(figure) == short


def test_kernel_drops_come_from_prometheus_text():
    rows = []
    for side, number, drops in (("public", 0, 5), ("internal", 0, 2), ("public", 1, 0)):
        row = ledger.Counters(metrics.Socket)
        row.values[metrics.Socket.DROPPED] = drops
        rows.append(({"worker": str(number), "socket": side}, row))
    text = metrics.exposition("earshot_relay_socket", rows).decode()
    assert top.read_kernel_drops(text) == {0: 7, 1: 0}
    assert top.read_kernel_drops("garbage\x00" * 100) == {}


def test_nobody_there(make):
    with pytest.raises(OSError, match="No such file"):
        top.run(make().found)


def test_once_and_as_json(make, capsys, monkeypatch):
    monkeypatch.setattr(top, "PERIOD_S", 0.01)
    relay = make()
    relay.publish()
    top.run(relay.found, once=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "serving" in lines[0] and "\x1b" not in "".join(lines)
    top.run(relay.found, as_json=True)
    seen = orjson.loads(capsys.readouterr().out)
    assert len(seen["workers"]) == 2 and seen["workers"][0]["inbound"]["datagrams"] == 0
    assert seen["drain_s"] is None and seen["redis_up"] is None


def test_the_live_view_goes_on_until_interrupted(make):
    relay = make()
    relay.publish()
    ours, theirs = pty.openpty()
    # A shell that runs this in the background has it ignore SIGINT, and so do its children.
    program = "import signal, sys, settings, top; top.PERIOD_S = 0.01;"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += "top.run(settings.load(sys.argv[1], settings.Relay))"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, relay.path],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + PATIENCE_S
    try:
        while seen.count(b"serving") < 3:
            seen += os.read(ours, 65536)
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open
            while more := os.read(ours, 65536):
                seen += more
        assert process.wait(PATIENCE_S) == 0, seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
