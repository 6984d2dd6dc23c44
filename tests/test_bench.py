"""The measurements work, and what they say about loss is exact. No figure of time is judged."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import frame

from . import mistreatment

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 120


def bench(*words):
    return subprocess.run(
        [sys.executable, SCRIPTS / "bench.py", "relay", "--quick", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.fixture(scope="module")
def load():
    """The module, which finds the other ones that it imports."""
    spec = importlib.util.spec_from_file_location("load", SCRIPTS / "load.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="module")
def figures():
    done = bench("--json", "--seed", "7")
    print(done.stderr)
    found = json.loads(done.stdout)
    assert (done.returncode, found["failures"]) == (0, [])
    return found


def test_the_load_alone_loses_nothing(load):
    with load.Load(10) as under_test:
        under_test.towards("127.0.0.1", under_test.port)
        under_test.quiet_s = 5.0
        under_test.begin(5_000, 20)  # room for a machine that stands still
        assert not under_test.run(0.1)
        assert under_test.run(PATIENCE_S, lambda: under_test.datagrams >= 700)
        account = under_test.settle()
    assert account.sent == account.returned == under_test.datagrams >= 700
    assert (account.lost, account.duplicated, account.foreign, account.reordered) == (0, 0, 0, 0)
    assert len(account.trips_us()) == account.sent and account.trips_us(account.sent_at).min() > 0


def test_every_mistreated_datagram_is_accounted_for(load, tmp_path):
    """The control: an instrument that says 0 must be able to say something else."""
    program = mistreatment.PROGRAM.format(root=str(SCRIPTS.parent))  # the first run opens the flows
    with load.Load(50) as under_test:
        under_test.quiet_s = 5.0  # some are lost, and others may be late
        relay = subprocess.Popen(
            [sys.executable, "-c", program, str(under_test.port)], stdout=subprocess.PIPE
        )
        try:
            under_test.towards("127.0.0.1", int(relay.stdout.readline()))
            under_test.open([b"\x00\x01 first" for _ in range(50)])
            under_test.begin(4_000, 20)
            assert under_test.run(PATIENCE_S, lambda: under_test.datagrams >= 2_000)
            account = under_test.settle()
        finally:
            relay.kill()
            relay.wait()
            relay.stdout.close()
    sent = range(account.sent)
    crossed = [n for n in sent if n % 7]
    copies = {n: bool(n % 11) + (not n % 13) for n in crossed}
    good = {n: count for n, count in copies.items() if n % 17 and count}
    assert account.crossed == len(crossed)
    assert account.returned == len(good) == account.sent - account.lost
    assert account.duplicated == sum(count - 1 for count in good.values())
    assert account.foreign == sum(count for n, count in copies.items() if not n % 17)
    assert account.duplicated_inbound == 0
    told = account.figures()
    assert told["lost_inbound"] + told["lost_outbound"] == told["lost"] == account.lost


def test_figures_say_where_they_are_from(figures):
    assert figures["machine"]["cpus"] == os.cpu_count()
    assert figures["kernel"] == os.uname().release
    assert figures["command"].endswith("relay --quick --json --seed 7") and figures["seed"] == 7
    assert {"python", "commit", "dirty", "date", "cpus"} <= figures.keys()
    assert figures["load_limit_per_s"] > 0


def nothing_lost(account):
    assert account["sent"] > 0
    for name in ("lost", "lost_inbound", "lost_outbound", "duplicated", "foreign"):
        assert account[name] == 0, name
    law = account["law"]
    assert law["missing"] == 0 and law["received"] == law["sent_by_clients"] > account["sent"]
    assert account["flows_before"] == account["flows_after"] == account["clients"]


def test_kill(figures):
    account = figures["parts"]["kill"]["workers_1"]
    nothing_lost(account)
    assert [each["worker"] for each in account["kills"]] == [0, 0, 0]
    assert all(each["taken_over_ms_log"] >= 0 for each in account["kills"])


def test_latency(figures):
    part = figures["parts"]["latency"]
    for rate in ("at_500_per_s", "at_1000_per_s", "at_the_highest"):
        assert [row["subject"] for row in part[rate]] == ["direct", "earshot"]
        for row in part[rate]:
            assert row["p50_us"] <= row["p99_us"] <= row["p99.9_us"]
            assert row["rate_per_s"] > 0 and row["p50_sent_us"] > 0
        assert {"p50_added_us", "p99_added_us", "p99.9_added_us"} <= part[rate][1].keys()


def test_idle(figures):
    part = figures["parts"]["idle"]
    assert len(part["worker_percent"]) == 2 and part["flows"] == 100
    assert part["supervisor_percent"] >= 0


def test_memory(figures):
    part = figures["parts"]["memory"]
    assert 0 < part["shared_octets_flows"] <= part["shared_octets_all"]
    assert part["worker_private_octets"]["in_use_max"] > 0
    assert part["process"]["cpu_us_a_datagram"].keys() == {"100_flows", "1000_flows"}
    table = part["table"]
    for order in ("at_random", "in_order"):
        assert table[f"look_up_{order}"]["ratio"] > 0
    for size in (100, 1000):
        sweeps = table["sweep_ms_max"][f"{size}_flows"]
        assert sweeps["flows_after_in_use"] == size and sweeps["flows_after_ending"] == 0


def test_a_table_for_people(figures):
    done = bench("--only", "idle")
    assert done.returncode == 0, done.stderr
    assert "worker_percent" in done.stdout and "failures" in done.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [(("--only", "nothing"), "no part nothing"), (("--beside", "c"), "is not NAME=COMMAND")],
)
def test_what_cannot_be_measured_is_refused(words, reason):
    done = bench(*words)
    assert done.returncode == 2 and reason in " ".join(done.stderr.replace("│", " ").split())


def test_another_relay_beside(figures, tmp_path):
    """Any relay that takes the two ports; here none does, and the part says so in its own words."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("::", 3478))
        except OSError as error:
            pytest.skip(f"port 3478 is taken: {error}")
    done = bench("--only", "latency", "--beside", "other=sh -c 'echo not today; exit 3'", "--json")
    assert done.returncode == 1
    (failure,) = json.loads(done.stdout)["failures"]
    assert failure.startswith("latency: StartError: other: not today")


def test_an_interrupt_leaves_nothing_behind():
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "bench.py", "relay", "--only", "idle"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "load alone" in process.stderr.readline()
        assert "idle: a relay serves" in process.stderr.readline()
        (child,) = children(process.pid)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# A service that stores a socket and some memory when it has none, and says what it was given.
SERVICE = """
import os, socket, sys
names = os.environ.get("LISTEN_FDNAMES", "")
if names:
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    at = {name: fd for fd, name in enumerate(names.split(":"), 3)}
    assert len(at) == int(os.environ["LISTEN_FDS"])
    print(sorted(at), os.pread(at["memory"], 5, 0), socket.socket(fileno=at["inner"]).getsockname())
else:
    inner, memory = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), os.memfd_create("x")
    inner.bind(("127.0.0.1", 0))
    os.write(memory, b"words")
    print(inner.getsockname())
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.connect(os.environ["NOTIFY_SOCKET"])
    for name, fd in (("inner", inner.fileno()), ("memory", memory), ("inner", inner.fileno())):
        socket.send_fds(manager, [f"FDSTORE=1\\nFDNAME={name}".encode()], [fd])
    socket.send_fds(manager, [b"FDSTORE=1\\nFDNAME=gone"], [0])
    manager.send(b"FDSTOREREMOVE=1\\nFDNAME=gone")
    manager.send(b"READY=1\\nSTATUS=serving")
"""
MANAGER = """
import sys
sys.path.insert(0, {scripts!r})
from pathlib import Path
import rig
store = rig.Store(Path({folder!r}))
for _ in range(2):
    log = Path({folder!r}) / "log"
    assert rig.spawn([sys.executable, "-c", {service!r}], {{0}}, log, store).wait() == 0
    store.take()
    print(sorted(name for name, _ in store.held), store.told)
store.close()
print(log.read_text(), end="")
"""


def test_the_stand_in_keeps_descriptors_as_systemd_does(tmp_path):
    program = MANAGER.format(scripts=str(SCRIPTS), folder=str(tmp_path), service=SERVICE)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    told = "['inner', 'memory'] ['READY=1', 'STATUS=serving']"
    first, second, address, given = done.stdout.splitlines()
    assert (first, second) == (told, told)
    assert given == f"['inner', 'memory'] b'words' {address}"


@pytest.mark.parametrize("part", ["reload", "handover", "restart"])
def test_nothing_is_lost(figures, part):
    account = figures["parts"][part]
    nothing_lost(account)
    assert len(account["gaps_ms"]) == 1


def test_recovery(figures):
    part = figures["parts"]["recovery"]
    if "skipped" in part:
        pytest.skip(part["skipped"])
    assert part["first_back_ms"]["of"] == part["clients"] == 20
    assert part["lost"] == 0 and part["kernel_drops"] == 0


def test_the_layout_of_a_header_is_the_frames(load):
    header = frame.header("127.9.8.7", 5)
    at = load._CLIENT_AT
    assert header[at : at + 4] == bytes([127, 9, 8, 7])


def test_signaling_answers_and_writes_a_line_for_each_offer():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench.py", "signaling", "--quick", "--json", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    print(done.stderr)
    found = json.loads(done.stdout)
    assert (done.returncode, found["failures"]) == (0, [])
    part = found["parts"]["offers"]
    print(json.dumps(part))
    assert part["offers"] > 30
    assert set(part["milliseconds"]) == {"post_to_201", "own", "transceiver", "besides_transceiver"}
