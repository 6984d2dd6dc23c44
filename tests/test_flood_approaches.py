"""`flood.py approaches`: the ways in work, and what is said of them follows from the figures.

The parts are tested alone; then the command once, with real programs. No figure of time is judged.
"""

import asyncio
import contextlib
import functools
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aioice import stun

import frame

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PATIENCE_S = 120
WAYS = ["a port per session", "a port per server", "TURN", "this relay"]


@pytest.fixture(scope="module")
def scripts():
    """Imports a module of scripts/, where they find each other."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def client():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def awaited(sock):
    """One datagram of what mux.py takes for a socket, once the kernel says that it is there."""
    assert select.select([sock], [], [], 5)[0]
    return sock.recvfrom(2048)


# --- the transceiver without a relay ----------------------------------------------------


def test_one_port_puts_on_and_takes_off_the_frame(scripts, client):
    port = scripts("bare").OnePort(("127.0.0.1", 0), 1 << 16, shared=False)
    with contextlib.closing(port):
        with pytest.raises(BlockingIOError):
            port.recvfrom(2048)
        _, here = b"", port._socket.getsockname()
        client.sendto(b"ping", here)
        datagram, relay = awaited(port)
        assert frame.is_frame(datagram)
        assert frame.client(datagram) == client.getsockname()
        assert datagram[frame.HEADER_OCTETS :] == b"ping"
        port.sendto(datagram[: frame.HEADER_OCTETS] + b"pong", relay)
        assert client.recvfrom(2048) == (b"pong", here)


def test_two_processes_share_a_port_only_if_they_say_so(scripts):
    one_port = functools.partial(scripts("bare").OnePort, buffer_octets=1 << 16)
    with contextlib.closing(one_port(("127.0.0.1", 0), shared=True)) as first:
        here = first._socket.getsockname()
        one_port(here, shared=True).close()
        with pytest.raises(OSError, match="in use"):
            one_port(here, shared=False)


def test_each_session_has_a_port_and_is_answered_from_it(scripts, client):
    ports = scripts("bare").PortPerSession("127.0.0.1", 1 << 16)
    with contextlib.closing(ports):
        first, second = ports.open(), ports.open()
        assert first != second
        for here in (first, second):
            client.sendto(b"to %d" % here[1], here)
            datagram, relay = awaited(ports)
            assert (relay, datagram[frame.HEADER_OCTETS :]) == (here, b"to %d" % here[1])
            ports.sendto(datagram, relay)
            assert client.recvfrom(2048)[1] == here
        ports.shut(first)
        ports.shut(first)  # as often as one likes
        with pytest.raises(OSError, match="closed"):
            ports.sendto(frame.header("127.0.0.1", 9) + b"late", first)
        with pytest.raises(BlockingIOError):
            ports.recvfrom(2048)


# --- TURN ---------------------------------------------------------------------------------


class Server:
    """The other end of a turning.Client, without a network: it challenges, and says yes."""

    def __init__(self, turning, refuses=None):
        self.seen, self._refuses = [], refuses
        self.client = turning.Client(self.heard)

    def heard(self, datagram):
        if datagram[0] & 0xC0 == 0x40:
            self.seen.append(("DATA", datagram))
            return
        message = stun.parse_message(datagram)
        method = message.message_method
        self.seen.append((method.name, message))
        if message.message_class is stun.Class.INDICATION:
            return
        answer = stun.Message(method, stun.Class.RESPONSE, message.transaction_id)
        if method is self._refuses:
            answer.message_class = stun.Class.ERROR
            answer.attributes["ERROR-CODE"] = (486, "Quota")
        elif "USERNAME" not in message.attributes:
            answer.message_class = stun.Class.ERROR
            answer.attributes |= {"ERROR-CODE": (401, "Who"), "REALM": "r", "NONCE": b"n"}
        elif method is stun.Method.ALLOCATE:
            answer.attributes["XOR-RELAYED-ADDRESS"] = ("192.0.2.7", 50_000)
        # As from a network: not before the one that asks has gone on.
        octets = bytes(answer)
        asyncio.get_running_loop().call_soon(self.client.received, octets)

    def methods(self):
        return [name for name, _ in self.seen]


async def settled(condition):
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


def test_allocating_takes_a_challenge_and_is_signed(scripts):
    turning = scripts("turning")

    async def story():
        server = Server(turning)
        await server.client.allocate()
        assert server.client.relayed == ("192.0.2.7", 50_000)
        assert server.methods() == ["ALLOCATE", "ALLOCATE"]
        first, second = (message for _, message in server.seen)
        assert "USERNAME" not in first.attributes
        assert second.check_message_integrity(stun_key(turning.USER, "r", turning.PASSWORD))
        await server.client.release()
        assert server.methods()[-1] == "REFRESH"
        assert server.seen[-1][1].attributes["LIFETIME"] == 0
        await server.client.release()  # there is nothing more to release
        assert len(server.seen) == 3

    asyncio.run(story())


def stun_key(*words):
    turn = importlib.import_module("aioice.turn")
    return turn.make_integrity_key(*words)


def test_data_waits_for_nothing_and_goes_by_the_channel_once_it_is_bound(scripts):
    turning = scripts("turning")

    async def story():
        server = Server(turning)
        await server.client.allocate()
        del server.seen[:]
        server.client.turn_to(("127.0.0.1", 9))
        server.client.send(b"first")
        assert server.methods() == ["CREATE_PERMISSION", "CHANNEL_BIND", "SEND"]
        assert server.seen[-1][1].attributes["DATA"] == b"first"
        await settled(lambda: server.client.bound)
        server.client.send(b"second")
        assert server.seen[-1] == ("DATA", b"\x40\x00\x00\x06second")

    asyncio.run(story())


def test_what_comes_is_unpacked_and_garbage_is_nothing(scripts):
    client = scripts("turning").Client(lambda _: None)
    assert client.received(b"\x40\x00\x00\x03abc\x00") == b"abc"
    assert client.received(b"\x40\x01\x00\x03abc") is None  # of a channel that is not ours
    data = stun.Message(stun.Method.DATA, stun.Class.INDICATION)
    data.attributes |= {"XOR-PEER-ADDRESS": ("127.0.0.1", 9), "DATA": b"abc"}
    assert client.received(bytes(data)) == b"abc"
    for garbage in (b"", b"\x40", bytes(20), os.urandom(40), bytes(data)[:-2]):
        assert client.received(garbage) in (None, b"")


def test_a_refusal_says_what_was_refused(scripts):
    turning = scripts("turning")

    async def story():
        server = Server(turning, refuses=stun.Method.ALLOCATE)
        with pytest.raises(turning.TurnError, match=r"ALLOCATE.*486 Quota"):
            await server.client.allocate()

    asyncio.run(story())


# --- the claims ---------------------------------------------------------------------------


def figures():
    """Of a run in which each way is what it is said to be."""
    trips = dict(zip(WAYS, (2.0, 2.0, 4.0, 2.1), strict=True))
    added = dict(zip(WAYS, (0, 10, 200, 300), strict=True))
    survived = dict(zip(WAYS, (0, 0, 0, 8), strict=True))
    killed = dict(zip(WAYS, ("the server", "the server", "turnserver", "a worker"), strict=True))
    rows = [
        {"way": way, "killed": killed[way], "calls": 8, "survived": survived[way]} for way in WAYS
    ]
    rows.append({"way": WAYS[3], "killed": "the whole relay", "calls": 8, "survived": 8})
    more = {"lost": 0, "down_ms": 900, "silence_p50_ms": 950, "again_ms": 11, "watched_s": 5.0}
    return {
        "set_up": [{"way": way, "round_trips": trips[way], "before_ms": 200.0} for way in WAYS],
        "traffic": [{"way": way, "front_cpu_ms": added[way] / 50} for way in WAYS],
        "delay": [
            {
                "way": way,
                "trip_p50_us": 300 + added[way],
                "added_p50_us": added[way],
                "added_p99_us": 2 * added[way],
            }
            for way in WAYS
        ],
        "ports": [
            {
                "way": way,
                "calls": 20,
                "sent_to": 20 if way == WAYS[0] else 1,
                "open": 21,
                "ports_at_100000": 100_000,
                "addresses_at_100000": 2,
            }
            for way in WAYS
        ],
        "two_servers_behind_one_address": [
            {"way": WAYS[1], "calls": 16, "connected": 7},
            {"way": WAYS[3], "calls": 16, "connected": 16},
        ],
        "killed": [row | more for row in rows],
    }


def verdicts(scripts, found):
    return {
        f"{way}: {claim}": answer.partition(":")[0]
        for way, answers in scripts("claims").answers(found).items()
        for claim, answer in answers.items()
    }


def test_what_holds_holds(scripts):
    found = verdicts(scripts, figures())
    assert len(found) == 11
    assert set(found.values()) == {"holds"}


@pytest.mark.parametrize(
    ("table", "way", "change", "claim"),
    [
        ("delay", WAYS[3], {"added_p50_us": -1}, "a direct path"),
        ("ports", WAYS[0], {"sent_to": 3}, "one public UDP port for each"),
        ("ports", WAYS[1], {"sent_to": 20}, "a much smaller"),
        ("two_servers_behind_one_address", WAYS[1], {"connected": 16}, "wrong instance"),
        ("ports", WAYS[2], {"sent_to": 2}, "one address and port"),
        ("set_up", WAYS[2], {"round_trips": 2.2}, "allocations add round trips"),
        ("killed", WAYS[2], {"survived": 8}, "difficult to recover"),
        ("ports", WAYS[3], {"sent_to": 2}, "a small public UDP"),
        ("set_up", WAYS[3], {"round_trips": 3.0}, "owns the whole session"),
        ("delay", WAYS[3], {"added_p50_us": -1}, "one forwarding hop"),
        ("two_servers_behind_one_address", WAYS[3], {"connected": 7}, "coordination"),
    ],
)
def test_what_does_not_hold_does_not(scripts, table, way, change, claim):
    found = figures()
    for row in found[table]:
        if row["way"] == way:
            row.update(change)
    fails = {name for name, verdict in verdicts(scripts, found).items() if verdict != "holds"}
    assert any(claim in name for name in fails), fails


def test_what_noise_may_have_added_is_not_judged(scripts):
    found = figures()
    for row in found["delay"]:
        row["added_p50_us_apart"] = 400.0
    unclear = {
        name
        for name, each in verdicts(scripts, found).items()
        if each == "not to be told from noise"
    }
    assert len(unclear) == 2
    found["delay"] = found["delay"][1:]  # nothing to add to
    assert list(verdicts(scripts, found).values()).count("not measured") == 2


def test_what_was_not_measured_is_not_judged(scripts):
    assert set(verdicts(scripts, {}).values()) == {"not measured"}
    found = figures()
    for table in found.values():
        table[:] = [row for row in table if row["way"] != WAYS[2]]
    answers = verdicts(scripts, found)
    assert {each for name, each in answers.items() if "TURN" in name} == {"not measured"}
    assert {each for name, each in answers.items() if "TURN" not in name} == {"holds"}


# --- the command --------------------------------------------------------------------------


def command(*words):
    return [sys.executable, str(SCRIPTS / "flood.py"), "approaches", *map(str, words)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    page = tmp_path_factory.mktemp("approaches") / "page.html"
    done = subprocess.run(
        command("--quick", "--calls", 2, "--delay-ms", 10, "--json", "--report", page),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 0
    assert page.stat().st_size > 1000
    return json.loads(done.stdout)


def rows(found, table):
    return {row["way"]: row for row in found[table]}


def measured(found):
    """The ways of a run: without coturn it has to say that there is no TURN."""
    if shutil.which("turnserver"):
        return WAYS
    assert any("no turnserver" in note for note in found["notes"])
    return [way for way in WAYS if way != "TURN"]


def test_every_way_is_in_every_table(ran):
    ways = measured(ran)
    assert ran["failures"] == []
    for table in ("set_up", "traffic", "delay", "ports", "killed"):
        assert list(rows(ran, table)) == (ways if table != "killed" else ways[::-1])
    for row in ran["traffic"]:
        assert row["up_per_s"] > 0 and row["down_per_s"] > 0 and row["transceiver_cpu_ms"] > 0
        assert bool(row["front_cpu_ms"]) == (row["way"] in ("TURN", "this relay"))


def test_ports_are_counted_where_they_are(ran):
    ports = rows(ran, "ports")
    sent_to = {way: row["sent_to"] for way, row in ports.items()}
    assert sent_to == {way: 2 if way == WAYS[0] else 1 for way in measured(ran)}
    assert ports[WAYS[1]]["open"] == 1
    # Ports of the two calls before may linger.
    assert 2 <= ports[WAYS[0]]["open"] <= 4
    assert ports[WAYS[0]]["addresses_at_100000"] == 2
    if "TURN" in ports:
        assert ports["TURN"]["open"] >= 1 + 2


def test_only_the_relay_finds_the_server_and_outlives_its_process(ran):
    fleet = rows(ran, "two_servers_behind_one_address")
    assert fleet["this relay"]["connected"] == fleet["this relay"]["calls"]
    survived = {
        (row["way"], row["killed"]): (row["survived"], row["calls"]) for row in ran["killed"]
    }
    for (way, _), (back, calls) in survived.items():
        assert back == (calls if way == "this relay" else 0)


def test_allocations_are_counted(ran):
    before = {way: row["before_ms"] for way, row in rows(ran, "set_up").items()}
    # Two round trips of 20 ms, which no machine makes shorter; and nobody else waits for anything.
    for way, spent in before.items():
        assert spent >= 40 if way == "TURN" else spent == 0


def descendants_gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ctrl_c_ends_all_that_was_started():
    process = subprocess.Popen(
        command("--only", "server"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = process.stderr.readline()  # "set-up": everything is up
    assert "set-up" in line
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    assert children
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
    assert descendants_gone(children)


def test_bad_input_is_named():
    words = command("--only", "pigeon")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pigeon" in done.stderr


def test_without_coturn_the_others_are_measured_and_it_says_so(scripts, monkeypatch):
    approaches = scripts("approaches")
    monkeypatch.setattr(approaches.turning, "missing", lambda: "there is no turnserver: install it")
    with pytest.raises(approaches.dev.StartError, match="no turnserver"):
        approaches.measure([approaches.Way.TURN], 1, 0.5, 1, 1.0, True)
