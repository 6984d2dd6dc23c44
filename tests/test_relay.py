"""The relay as a process: real sockets, real signals, and every datagram in exactly one counter."""

import contextlib
import ipaddress
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import frame
import handover
import host
import ledger
import metrics
import settings
import stun
import supervisor
import ufrag

from . import node, ports

PATIENCE_S = 20
"""How long anything may take before the test has failed; all of it takes milliseconds."""

CONFIG = """
[relay]
public = "{host}:{public}"
internal = "{host}:{internal}"
workers = {workers}
state_dir = "state"
metrics = "{host}:0"
{more}

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "{prefix}"
ports = [{transceiver}, {transceiver}]
"""
IN, OUT = metrics.Inbound, metrics.Outbound


def bound(at="127.0.0.1", port=0):
    sock = node.bound(at, port)
    sock.settimeout(PATIENCE_S)
    return sock


class Relay:
    """A running relay, its transceivers, and what its clients send."""

    def __init__(self, folder, stack, workers=1, more="", at="127.0.0.1"):
        self.stack, self.folder, self.at = stack, folder, at
        self.transceiver = stack.enter_context(bound(at))
        self.port = self.transceiver.getsockname()[1]
        self.second = stack.enter_context(bound("127.0.0.2", self.port))
        # Each worker has an internal one, in a row.
        self.public, self.internal = ports.free(1 + workers)[:2]
        (folder / "keys").write_text("1 " + "11" * 32 + "\n2 " + "22" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        self.config = folder / "relay.toml"
        self.config.write_text(
            CONFIG.format(
                host=f"[{at}]" if ":" in at else at,
                prefix="::/96" if ":" in at else "127.0.0.0/29",
                public=self.public,
                internal=self.internal,
                workers=workers,
                transceiver=self.port,
                more=more,
            )
        )
        self.keyring = settings.load_keys(folder / "keys")
        everywhere = ipaddress.ip_network("::/96" if ":" in at else "127.0.0.0/8")
        self.home = ufrag.Cluster(1, everywhere, 1, 65535)
        self.log, self._rest = [], b""
        self.begin("run")
        self.line(" ready:")
        self.attach()

    def begin(self, command):
        """Start the program, or its successor; what an earlier one says is not heard any more."""
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "relay", command, "--config", self.config],
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.stack.callback(self._clean, process)

    def attach(self):
        table = settings.load(self.config, settings.Relay).relay
        found = host.attach(handover.state_file(table), handover.LAYOUT, handover.MEMORY)
        self.memories = found[:-1]  # the last is the relay's own

    def _clean(self, process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()

    def line(self, part):
        """The next line of the log that has `part` in it."""
        while True:
            head, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                self.log.append(head.decode())
                if part in self.log[-1]:
                    return self.log[-1]
                continue
            readable, _, _ = select.select([self.process.stderr], [], [], PATIENCE_S)
            more = os.read(self.process.stderr.fileno(), 65536) if readable else b""
            assert more, f"no line with {part!r} after {self.log}"
            self._rest += more

    def counters(self):
        rows = zip(*map(handover.counters_in, self.memories), strict=True)
        return [ledger.total(way) for way in rows]

    def worker(self, number=0):
        """The process id of a worker."""
        return self.memories[number].section("control").cast("Q")[handover.Control.PID]

    @contextlib.contextmanager
    def frozen(self):
        """Its worker stands still: what comes meanwhile is one batch, of one moment."""
        pid = self.worker()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def stop(self):
        """Ask it to end; it must, in order, with nothing in hand and nothing uncounted."""
        self.process.send_signal(signal.SIGINT)
        self.line("stopped: outbound")
        assert self.process.wait(PATIENCE_S) == 0
        ways = self.counters()
        assert [way.missing() for way in ways] == [0, 0], [str(way) for way in ways]
        return ways

    def client(self):
        sock = self.stack.enter_context(bound(self.at))
        sock.connect((self.at, self.public))
        return sock

    def mint(self, nonce=1, address="127.0.0.1", port=None, cluster=1, keyring=None):
        home = ufrag.Cluster(cluster, self.home.prefix, 1, 65535)
        at = ipaddress.ip_address(address)
        return ufrag.mint(keyring or self.keyring, home, at, port or self.port, nonce)

    def check(self, hint=None, password=None):
        hint = hint or self.mint()
        password = password or ufrag.password(self.keyring, hint) or b"x" * 24
        return stun.request(os.urandom(12), f"{hint}:client", password)

    def open(self, client, transceiver=None, **hint):
        """A check goes through; returns where the transceiver answers to."""
        check = self.check(self.mint(**hint))
        client.send(check)
        framed, back = (transceiver or self.transceiver).recvfrom(4096)
        assert framed == header(client) + check
        return back


def header(client):
    return frame.header(*client.getsockname()[:2])


def quiet(sock):
    return not select.select([sock], [], [], 0)[0]


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: Relay(tmp_path, stack, **kwargs)


@pytest.mark.parametrize("workers", [1, 2])
def test_media_goes_both_ways(start, workers):
    running = start(workers=workers)
    clients = [running.client() for _ in range(8)]
    for nonce, client in enumerate(clients):
        back = running.open(client, nonce=nonce)
        running.transceiver.sendto(header(client) + b"\x16 hello", back)
        assert client.recv(4096) == b"\x16 hello"
        for number in range(20):
            client.send(b"\x80 media %d" % number)
            framed, back = running.transceiver.recvfrom(4096)
            assert framed == header(client) + b"\x80 media %d" % number
            running.transceiver.sendto(framed, back)
            assert client.recv(4096) == b"\x80 media %d" % number
    inbound, outbound = running.stop()
    assert inbound[IN.FORWARDED] == 8 * 21 and outbound[OUT.FORWARDED] == 8 * 21
    assert inbound[IN.OCTETS] == outbound[OUT.OCTETS] - 8 * 7 + 8 * len(running.check())
    assert inbound.drops() == outbound.drops() == {}


def test_ipv6_on_both_sides(start):
    try:
        bound("::1").close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    running = start(at="::1")
    client = running.client()
    back = running.open(client, address="::1")
    running.transceiver.sendto(header(client) + b"\x80 reply", back)
    assert client.recv(4096) == b"\x80 reply"
    client.send(b"\x80 media")
    assert running.transceiver.recv(4096) == header(client) + b"\x80 media"
    (line,) = command("flows", "--config", running.config).stdout.splitlines()
    assert re.search(rf"assured +\[::1\]:{running.port} ", line)
    running.stop()


def flip(text, at):
    """The ufrag with one bit changed inside its encrypted block."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return text[:at] + alphabet[alphabet.index(text[at]) ^ 1] + text[at + 1 :]


def foreign(key_id, digits):
    return ufrag.Keyring.parse(f"{key_id} " + digits * 32)


BAD_IN = {
    "unknown_client": lambda r: b"\x16 of nobody",
    "oversized": lambda r: b"\x80" * 1501,
    "stun_truncated": lambda r: r.check()[:-4],
    "stun_not_request": lambda r: stun.success(bytes(12), "192.0.2.1", 1, b"x" * 24),
    "stun_malformed": lambda r: b"\x00\x01\x00\x00" + b"\x21\x12\xa4\x42" + bytes(12),
    "ufrag_malformed": lambda r: r.check("four"),
    "ufrag_unknown_key": lambda r: r.check(r.mint(keyring=foreign(5, "33"))),
    "ufrag_forged": lambda r: r.check(flip(r.mint(), 9)),
    "ufrag_unknown_cluster": lambda r: r.check(r.mint(cluster=2)),
    "ufrag_outside": lambda r: r.check(r.mint(address="127.0.0.8")),
    "bad_integrity": lambda r: r.check(password=b"y" * 24),
}


@pytest.mark.parametrize("reason", BAD_IN)
def test_what_a_stranger_sends_ends_in_its_counter(start, reason):
    running = start()
    stranger, client = running.client(), running.client()
    stranger.send(BAD_IN[reason](running))
    # One socket, one worker: what comes first at the transceiver shows what did not come at all.
    back = running.open(client)
    running.transceiver.sendto(header(client) + b"\x16", back)
    assert client.recv(100) == b"\x16"
    assert quiet(stranger) and quiet(running.transceiver) and quiet(running.second)
    inbound, _ = running.stop()
    assert inbound.drops() == {reason: 1}
    assert inbound[IN.FORWARDED] == 1


def test_more_ways_to_be_outside_or_garbled(start):
    running = start()
    stranger, client = running.client(), running.client()
    stranger.send(running.check(running.mint(port=running.port ^ 1)))
    stranger.send(b"")
    stranger.send(b"\x00")
    stranger.send(running.check(foreign_secret := running.mint(keyring=foreign(1, "44"))))
    assert foreign_secret
    running.open(client)
    inbound, _ = running.stop()
    assert inbound.drops() == {
        "ufrag_outside": 1,
        "unknown_client": 1,
        "stun_truncated": 1,
        "ufrag_forged": 1,
    }


def test_broken_stun_from_a_known_client_ends_here_but_indications_pass(start):
    running = start()
    client = running.client()
    running.open(client)
    client.send(running.check()[:-4])
    client.send(b"\x80" * 1501)
    indication = b"\x00\x11\x00\x00" + b"\x21\x12\xa4\x42" + bytes(12)
    client.send(indication)
    assert running.transceiver.recv(4096) == header(client) + indication
    inbound, _ = running.stop()
    assert inbound.drops() == {"stun_truncated": 1, "oversized": 1}


BAD_OUT = {
    "unknown_client": lambda r, c: (r.transceiver, frame.header("192.0.2.1", 9) + b"x"),
    "wrong_owner": lambda r, c: (r.second, header(c) + b"x"),
    "bad_frame": lambda r, c: (r.transceiver, b"\xc5\x02" + header(c)[2:] + b"x"),
    "not_transceiver": lambda r, c: (r.client_socket, header(c) + b"x"),
    "oversized": lambda r, c: (r.transceiver, header(c) + b"x" * 1501),
}


@pytest.mark.parametrize("reason", BAD_OUT)
def test_what_is_not_the_owners_frame_ends_in_its_counter(start, reason):
    running = start()
    client, running.client_socket = running.client(), running.stack.enter_context(bound())
    back = running.open(client)
    sender, datagram = BAD_OUT[reason](running, client)
    sender.sendto(datagram, back)
    running.transceiver.sendto(header(client) + b"good", back)
    assert client.recv(4096) == b"good"
    _, outbound = running.stop()
    assert outbound.drops() == {reason: 1}
    assert outbound[OUT.FORWARDED] == 1


def test_short_frames_are_bad_frames(start):
    running = start()
    client = running.client()
    back = running.open(client)
    for octets in (0, 1, 31):
        running.transceiver.sendto(header(client)[:octets], back)
    running.transceiver.sendto(header(client), back)  # a datagram of no octets: whole
    assert client.recv(100) == b""
    _, outbound = running.stop()
    assert outbound.drops() == {"bad_frame": 3}


def test_a_burst_of_good_and_bad_keeps_its_order(start):
    running = start()
    client, stranger = running.client(), running.client()
    running.open(client)
    for number in range(200):
        client.send(b"\x80 %d" % number)
        if number % 3 == 0:
            stranger.send(b"\x80 stranger")
        if number % 7 == 0:
            client.send(running.check())
    came = [running.transceiver.recv(4096)[32:] for _ in range(200 + 29)]
    media = [payload for payload in came if payload[0] == 0x80]
    assert media == [b"\x80 %d" % number for number in range(200)]
    inbound, _ = running.stop()
    assert inbound.drops() == {"unknown_client": 67}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("flows_max = 2\nflows_tentative_max = 2", "flows_limit"),
        ("flows_tentative_max = 2", "tentative_limit"),
        ("addresses_per_ufrag_max = 2", "addresses_limit"),
        ("integrity_checks_per_s = 2", "integrity_limit"),
    ],
)
def test_limits_are_counters(start, more, reason):
    running = start(more=more)
    clients = [running.client() for _ in range(3)]
    checks = [running.check() for _ in clients]
    with running.frozen():  # a budget is one of a second
        for client, check in zip(clients, checks, strict=True):
            client.send(check)
    for client, check in zip(clients[:2], checks, strict=False):
        assert running.transceiver.recv(4096) == header(client) + check
    clients[0].send(b"\x80 still served")
    assert running.transceiver.recv(4096) == header(clients[0]) + b"\x80 still served"
    inbound, _ = running.stop()
    assert inbound.drops() == {reason: 1}


def test_a_replayed_check_does_not_move_a_live_flow(start):
    running = start()
    client = running.client()
    back = running.open(client)
    running.transceiver.sendto(header(client) + b"\x16", back)
    assert client.recv(100) == b"\x16"  # assured
    client.send(running.check(running.mint(nonce=7, address="127.0.0.2")))
    client.send(b"\x80 media")
    assert running.transceiver.recv(4096) == header(client) + b"\x80 media"
    assert quiet(running.second)
    inbound, _ = running.stop()
    assert inbound.drops() == {"flow_held": 1}


def test_a_tentative_flow_follows_its_client(start):
    running = start()
    client = running.client()
    running.open(client)
    running.open(client, running.second, address="127.0.0.2")
    client.send(b"\x80 media")
    assert running.second.recv(4096) == header(client) + b"\x80 media"
    running.stop()


def test_a_killed_worker_loses_neither_flows_nor_what_waits(start):
    running = start()
    client = running.client()
    back = running.open(client)
    running.transceiver.sendto(header(client) + b"\x16", back)
    assert client.recv(100) == b"\x16"
    for turn in range(3):
        os.kill(running.worker(), signal.SIGKILL)
        for number in range(50):
            client.send(b"\x80 %d %d" % (turn, number))
        for number in range(50):
            framed, back = running.transceiver.recvfrom(4096)
            assert framed == header(client) + b"\x80 %d %d" % (turn, number)
        running.transceiver.sendto(header(client) + b"\x80 back", back)
        assert client.recv(100) == b"\x80 back"
        running.line("serves again after")
    inbound, outbound = running.stop()
    assert inbound[IN.FORWARDED] == 151 and outbound[OUT.FORWARDED] == 4


def command(*words, meanwhile=lambda: None):
    """Run a command to its end; `meanwhile` is called again and again until then."""
    argv = [sys.executable, "-P", "-m", "relay", *words]
    pipe, deadline = subprocess.PIPE, time.monotonic() + PATIENCE_S
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as process:
        while True:
            try:
                out, err = process.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    process.kill()
                    raise
                meanwhile()
                continue
            return subprocess.CompletedProcess(argv, process.returncode, out, err)


def test_flows_and_counters_are_seen_from_outside(start):
    running = start()
    first, second = running.client(), running.client()
    back = running.open(first)
    running.open(second, nonce=2)
    running.transceiver.sendto(header(first) + b"\x16", back)
    assert first.recv(100) == b"\x16"
    shown = command("flows", "--config", running.config).stdout
    lines = {line.split()[2]: line for line in shown.splitlines()}
    assert set(lines) == {f"127.0.0.x:{sock.getsockname()[1]}" for sock in (first, second)}
    assert re.search(rf"assured +127\.0\.0\.1:{running.port} +\d+ s", shown)
    assert "tentative" in lines[f"127.0.0.x:{second.getsockname()[1]}"]
    # The nonce of its hint, which is the id of the request that has opened it.
    assert lines[f"127.0.0.x:{second.getsockname()[1]}"].endswith(" s  00000002")
    text = command("counters", "--config", running.config).stdout
    assert 'earshot_relay_inbound_forwarded_total{worker="0"} 2.0' in text
    assert 'earshot_relay_outbound_received_total{worker="0"} 1.0' in text
    running.stop()
    gone = command("flows", "--config", running.config)
    assert gone.returncode == 1 and "no relay of this configuration" in gone.stderr


def test_check_says_what_is_wrong(start):
    running = start()
    fine = command("check", "--config", running.config)
    assert fine.returncode == 0 and "ok: 1 workers" in fine.stdout
    running.config.write_text(running.config.read_text().replace("workers = 1", "workers = -1"))
    wrong = command("check", "--config", running.config)
    assert wrong.returncode == supervisor.Exit.CONFIGURATION
    assert f"{running.config}: relay.workers:" in wrong.stderr
    assert command("run", "--config", running.config).returncode == wrong.returncode
    running.stop()


def test_a_cluster_that_cannot_be_reached_is_refused(start):
    running = start()
    text = running.config.read_text() + '\n[[cluster]]\nid = 2\nprefix = "fd00::/96"\nports=[1, 2]'
    running.config.write_text(text)
    wrong = command("check", "--config", running.config)
    assert wrong.returncode == supervisor.Exit.CONFIGURATION
    assert "relay.internal: an IPv4 address cannot reach cluster 2" in wrong.stderr
    running.stop()


def test_a_taken_port_has_its_own_exit_code(start):
    running = start()
    second = command("run", "--config", running.config)
    assert second.returncode == supervisor.Exit.ADDRESS
    assert f"127.0.0.1 port {running.internal}: Address already in use" in second.stderr
    running.stop()


def test_a_relay_that_drains_serves_what_it_has_and_takes_nothing_new(start):
    running = start(more="flow_idle_s = 4.0\ntentative_idle_s = 4.0\n")
    client, late = running.client(), running.client()
    back = running.open(client)
    running.transceiver.sendto(header(client) + b"\x16", back)
    assert client.recv(100) == b"\x16"
    sent = 0

    def speaks():
        nonlocal sent
        client.send(b"\x80 %d" % sent)
        assert running.transceiver.recv(4096) == header(client) + b"\x80 %d" % sent
        sent += 1

    def drain(*words):  # however long that takes, the client's flow is in use
        words = "drain", *words, "--config", running.config
        return command(*words, meanwhile=speaks).stdout

    assert "serving" in drain("--status")
    assert "draining" in drain()
    running.line("drain")
    assert re.fullmatch(r"draining: 1 flows left, \d+ s to the deadline\n", drain("--status"))
    late.send(running.check(running.mint(nonce=7)))
    for _ in range(20):
        speaks()
    # The client has gone, and with its flow the relay.
    running.line("stopped: outbound")
    assert running.process.wait(PATIENCE_S) == 0
    inbound, outbound = running.counters()
    assert [inbound.missing(), outbound.missing()] == [0, 0]
    assert inbound.drops() == {"draining": 1} and inbound[IN.FORWARDED] == 1 + sent
    gone = command("drain", "--config", running.config)
    assert gone.returncode == 1 and "no relay of this configuration" in gone.stderr


def test_a_second_sigterm_ends_a_drain(start):
    running = start()
    running.open(running.client())
    running.process.send_signal(signal.SIGTERM)
    running.line("drain")
    running.process.send_signal(signal.SIGTERM)
    running.line("stopped: outbound")
    assert running.process.wait(PATIENCE_S) == 0


def test_a_reload_loses_nothing_and_says_what_it_cannot_change(start):
    running = start()
    client = running.client()
    running.open(client)
    text = running.config.read_text()
    changed = text.replace("workers = 1", "workers = 2\nflow_idle_s = 90.0")
    running.config.write_text(changed + "\n[recovery]\nwaiting_max = 7\nlookups_per_s = 9\n")
    running.process.send_signal(signal.SIGHUP)
    for number in range(200):
        client.send(b"\x80 %d" % number)
        assert running.transceiver.recv(4096) == header(client) + b"\x80 %d" % number
    running.line("relay.workers is changed by a restart")
    running.line("recovery.waiting_max is changed by a restart")
    running.line("configuration read again: keys 1, 2, 1 cluster(s)")
    running.config.write_text("nonsense")
    running.process.send_signal(signal.SIGHUP)
    running.line("going on with the configuration from before")
    running.config.write_text(text)
    inbound, _ = running.stop()
    assert inbound[IN.FORWARDED] == 201 and not inbound.drops()


def test_media_goes_on_for_half_a_minute_after_everything_that_happens(start):
    """Not only in the moment of a recovery: expiry, heartbeats and back-off come later."""
    running = start(workers=2, more="flow_idle_s = 5.0\ntentative_idle_s = 5.0\n")
    clients = [running.client() for _ in range(10)]
    for nonce, client in enumerate(clients):
        running.transceiver.sendto(header(client) + b"\x16", running.open(client, nonce=nonce))
        assert client.recv(100) == b"\x16"
    first = running.process
    happens = [
        lambda: os.kill(running.worker(0), signal.SIGKILL),
        lambda: os.kill(running.worker(1), signal.SIGKILL),
        lambda: running.process.send_signal(signal.SIGHUP),
        lambda: running.begin("handover"),
    ]
    began, sent = time.monotonic(), 0
    arrived, returned = [[] for _ in clients], [[] for _ in clients]
    at = {header(client): number for number, client in enumerate(clients)}

    def take(until_s):
        # What there is also when we are late: after a pause of ours we send without one, and what
        # nobody reads meanwhile would soon not fit into our own sockets.
        while True:
            left = max(0, began + until_s - time.monotonic())
            readable, _, _ = select.select([running.transceiver, *clients], [], [], left)
            if not left and not readable:
                return
            for sock in readable:
                if sock is running.transceiver:
                    framed, back = sock.recvfrom(4096)
                    arrived[at[framed[:32]]].append(framed[32:])
                    sock.sendto(framed, back)
                else:
                    returned[clients.index(sock)].append(sock.recv(4096))

    while (now_s := sent * 0.02) < 34:
        if happens and now_s >= 4 - len(happens) + 0.5:
            happens.pop(0)()
        for client in clients:
            client.send(b"\x80 %d" % sent)
        sent += 1
        take(sent * 0.02)
    take(sent * 0.02 + 1)
    wanted = [b"\x80 %d" % number for number in range(sent)]
    assert all(each == wanted for each in (*arrived, *returned))
    assert first.wait(PATIENCE_S) == 0
    running.attach()
    inbound, outbound = running.stop()
    assert inbound[IN.FORWARDED] == 10 * (sent + 1) and outbound[OUT.FORWARDED] == 10 * (sent + 1)
    assert not inbound.drops() and not outbound.drops()


def test_the_log_names_no_client(start):
    running = start()
    client = running.client()
    running.open(client)
    running.stop()
    log = "\n".join(running.log)
    assert str(client.getsockname()[1]) not in log and running.mint() not in log
