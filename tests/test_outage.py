"""The relay as a program while Redis is down, slow, empty, full or lying.

Calls go on both ways all the while and lose nothing; the log says once what it is, and once that it
is over; and then another relay, that has never seen these clients, carries their media before any
STUN: they send to it from the sockets that they have.
"""

import contextlib
import ipaddress
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

import frame
import handover
import host
import ledger
import metrics
import registry
import settings
import stun
import ufrag

from . import ports, redises
from .redises import PATIENCE_S

CONFIG = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 1
state_dir = "."
metrics = "127.0.0.1:0"

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/29"
ports = [{transceiver}, {transceiver}]

[redis]
url = "{url}"
{more}
"""
IN = metrics.Inbound

PATIENT = "timeout_s = 5.0\nwait_s = 10.0"
"""For a relay that shall recover everything, however slow the machine: what is late is lost."""

TICK_S = 0.02
CALLS = 5
"""Each sends once a tick and is sent to once a tick: 500 datagrams a second in all."""

UNREACHABLE, BACK = "redis is unreachable", "redis is back"
LOST = "redis lost what it had"
REFUSES, TAKES = "redis does not take all flows", "redis takes all flows again"

_LIVE = struct.Struct("!2sHI")
_MARK = b"\x80L"


def bound(at="127.0.0.1", port=0):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((at, port))
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return sock


class Relay:
    """A relay in processes of its own."""

    def __init__(self, town, name, url, more):
        folder = town.folder / name
        folder.mkdir()
        (folder / "keys").write_text("1 " + "11" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        public, internal = ports.free(2)
        self.town, self.at, self._log = town, ("127.0.0.1", public), folder / "log"
        config = folder / "relay.toml"
        config.write_text(
            CONFIG.format(
                public=public, internal=internal, transceiver=town.port, url=url, more=more
            )
        )
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "relay", "run", "--config", config],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        town.stack.callback(self._clean)
        town.go_on(lambda: self.said(" ready"))
        state = handover.state_file(settings.load(config, settings.Relay).relay)
        self._memories = host.attach(state, handover.LAYOUT, handover.MEMORY)[:-1]

    def _clean(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self, part):
        """How often it said that."""
        assert self.process.poll() is None, self._log.read_text()
        return self._log.read_text().count(part)

    def story(self):
        """What it said of Redis, in order."""
        lines = self._log.read_text().splitlines()
        named = UNREACHABLE, BACK, LOST, REFUSES, TAKES
        return [name for line in lines for name in named if name in line]

    def counters(self):
        rows = zip(*map(handover.counters_in, self._memories), strict=True)
        return [ledger.total(way) for way in rows]

    def stop(self):
        """It ends in order, and every datagram is in one counter; returns the counters."""
        self.process.send_signal(signal.SIGINT)
        self.town.go_on(lambda: self.process.poll() is not None)
        assert self.process.poll() == 0, self._log.read_text()
        assert "Traceback" not in self._log.read_text()
        ways = self.counters()
        assert [way.missing() for way in ways] == [0, 0], [str(way) for way in ways]
        assert ways[0][IN.WAITING] == 0
        return ways


class Call:
    """A client and its session, and an account of what goes both ways through one relay."""

    def __init__(self, town, number, transceiver):
        self.town, self.number, self.transceiver = town, number, transceiver
        self.sock = town.stack.enter_context(bound())
        self.header = frame.header(*self.sock.getsockname())
        self.key = registry.PREFIX + frame.key(self.header)
        at = ipaddress.ip_address(transceiver.getsockname()[0])
        home = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/29"), 1, 65535)
        self.ufrag = ufrag.mint(town.keyring, home, at, town.port, number)
        self.sent, self.came = 0, {"up": [], "down": []}

    def check(self, relay):
        """Send a STUN check."""
        password = ufrag.password(self.town.keyring, self.ufrag)
        check = stun.request(os.urandom(12), f"{self.ufrag}:client", password)
        self.sock.sendto(check, relay.at)

    def tick(self, relay, back):
        """One datagram each way."""
        datagram = _LIVE.pack(_MARK, self.number, self.sent)
        self.sock.sendto(datagram, relay.at)
        self.transceiver.sendto(self.header + datagram, back)
        self.sent += 1

    def complete(self):
        return all(len(came) >= self.sent for came in self.came.values())


class Town:
    """Two transceivers, the calls that go through one relay, and whatever else there is."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        (folder / "keys").write_text("1 " + "11" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        self.keyring = settings.load_keys(folder / "keys")
        self.first = stack.enter_context(bound())
        self.port = self.first.getsockname()[1]
        self.second = stack.enter_context(bound("127.0.0.2", self.port))
        self.relay, self.calls, self._back = None, [], {}
        self.other = []
        """What else came: where, from whom, and the datagram."""

    def start(self, url, name="relay", more=""):
        return Relay(self, name, url, more)

    def begin(self, relay, count=CALLS):
        """So many more calls through a relay, which it knows for certain."""
        self.relay = relay
        new = []
        for number in range(len(self.calls), len(self.calls) + count):
            new.append(Call(self, number, self.second if number % 2 else self.first))
        self.calls += new
        self.introduce(relay, *new)
        return new

    def introduce(self, relay, *calls):
        """Checks, and answers that make flows certain."""
        for call in calls:
            call.check(relay)
            framed, back = self.await_other(call.transceiver, call.header)
            assert framed[32] == 0, "STUN"
            call.transceiver.sendto(call.header + b"\x16 hello", back)
            assert self.await_other(call.sock, b"\x16 hello")[1] == relay.at
            if relay is self.relay:
                self._back[call.number] = back

    def await_other(self, sock, start):
        """What comes at a socket and begins so: the datagram and where it came from."""
        found = []

        def came():
            found[:] = [
                each for each in self.other if each[0] is sock and each[1].startswith(start)
            ]
            return found

        self.go_on(came)
        self.other.remove(found[0])
        return found[0][1:]

    def go_on(self, until, seconds=0.0):
        """Let the calls go on until something is so, and at least so long."""
        began = due = time.monotonic()
        while not (until() and time.monotonic() - began >= seconds):
            assert due - began < PATIENCE_S, (self.relay.story(), "it does not come true")
            for call in self.calls:
                if call.number in self._back:
                    call.tick(self.relay, self._back[call.number])
            due += TICK_S
            self._pump(due)

    def _pump(self, due):
        socks = [self.first, self.second, *(call.sock for call in self.calls)]
        while True:
            left = due - time.monotonic()
            for sock in select.select(socks, [], [], max(0, left))[0]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._take(sock, *sock.recvfrom(4096))
            if left <= 0:
                return

    def _take(self, sock, datagram, source):
        up = sock in (self.first, self.second)
        payload = datagram[frame.HEADER_OCTETS :] if up else datagram
        if not payload.startswith(_MARK):
            self.other.append((sock, datagram, source))
            return
        _, number, count = _LIVE.unpack(payload)
        call = self.calls[number]
        if up:
            assert datagram.startswith(call.header) and sock is call.transceiver
        else:
            assert sock is call.sock
        call.came["up" if up else "down"].append(count)

    def finish(self, **drops):
        """The calls end: not one datagram was lost, or came twice; others' were, as said."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(call.complete() for call in self.calls):
            assert time.monotonic() < deadline, [
                (call.sent, {way: len(came) for way, came in call.came.items()})
                for call in self.calls
            ]
            self._pump(time.monotonic() + TICK_S)
        for call in self.calls:
            assert call.came == {"up": [*range(call.sent)], "down": [*range(call.sent)]}
        sent = 2 * sum(call.sent for call in self.calls)
        print(f"{sent} datagrams, none lost")
        assert sent > 100
        self._back.clear()
        inbound, outbound = self.relay.stop()
        assert inbound.drops() == drops and outbound.drops() == {}

    def known_to(self, server, *calls):
        """Wait until Redis has the sessions of these clients."""
        self.go_on(lambda: all(server.do("GET", c.key) == c.ufrag.encode() for c in calls))

    def move(self, relay, *calls):
        """Clients send to a relay that does not know them; returns how many datagrams it took.

        Nothing of it is lost, and what the transceiver answers there goes back.
        """
        for call in calls:
            for number in range(3):
                call.sock.sendto(b"\x80 moved %d" % number, relay.at)
        for call in calls:
            for number in range(3):
                sent = call.header + b"\x80 moved %d" % number
                framed, back = self.await_other(call.transceiver, sent)
                assert framed == sent
            call.transceiver.sendto(call.header + b"\x80 back", back)
            assert self.await_other(call.sock, b"\x80 back")[1] == relay.at
        return 3 * len(calls)

    def move_to_another(self, url, *calls):
        """The same, through a new relay with nothing else to do."""
        other = self.start(url, f"other-{time.monotonic_ns()}", PATIENT)
        sent = self.move(other, *calls)
        inbound, _ = other.stop()
        assert inbound.drops() == {} and inbound[IN.RECEIVED] == sent
        assert 0 < inbound[IN.RECOVERED] <= sent


@pytest.fixture
def town(tmp_path):
    redises.required()
    with contextlib.ExitStack() as stack:
        yield Town(tmp_path, stack)


@pytest.fixture
def server(town):
    """A Redis that is not started yet, and forgets nothing when it is killed."""
    lasting = "--appendonly", "yes", "--appendfsync", "always"
    server = redises.Server(town.folder / "redis", *lasting)
    town.stack.callback(server.close)
    server.url = f"redis://127.0.0.1:{server.port}"
    return server


def test_down_at_start(town, server):
    relay = town.start(server.url)
    calls = town.begin(relay)
    town.go_on(relay.story, seconds=2 * registry.PROBE_S)
    server.start()
    town.go_on(lambda: BACK in relay.story())
    town.known_to(server, *calls)
    town.move_to_another(server.url, *calls)
    town.finish()
    assert relay.story() == [UNREACHABLE, BACK]


def test_killed_and_back(town, server):
    relay = town.start(server.start().url)
    calls = town.begin(relay)
    town.known_to(server, *calls)
    server.kill()
    town.go_on(relay.story)
    calls += town.begin(relay, 2)  # sessions that it has never heard of
    town.go_on(lambda: True, seconds=2 * registry.PROBE_S)
    server.start()
    town.go_on(lambda: BACK in relay.story())
    town.known_to(server, *calls)
    town.move_to_another(server.url, *calls)
    town.finish()
    assert relay.story() == [UNREACHABLE, BACK], "and it has lost nothing"


def test_restarted_empty(town, server):
    relay = town.start(server.start().url)
    calls = town.begin(relay)
    town.known_to(server, *calls)
    server.kill()
    shutil.rmtree(town.folder / "redis" / "appendonlydir")
    server.start()
    assert server.do("DBSIZE") == 0
    town.go_on(lambda: LOST in relay.story())
    town.known_to(server, *calls)
    town.move_to_another(server.url, *calls)
    town.finish()
    # It may have been back before anybody asked.
    assert relay.story() in ([LOST], [UNREACHABLE, BACK, LOST])


NONSENSE = b"$abc\r\n", b"*1\r\n" * 5000, b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize("how", [["delay"], NONSENSE], ids=["slow", "nonsense"])
def test_slow_or_nonsense(town, server, how):
    server.start()
    proxy = redises.Beside(server.port)
    town.stack.callback(proxy.close)
    relay = town.start(f"redis://127.0.0.1:{proxy.port}")
    calls = town.begin(relay, CALLS - 1)
    town.known_to(server, *calls)
    for each in how:
        proxy.be(each)
        town.go_on(relay.story, seconds=registry.PROBE_S)
    calls += town.begin(relay, 1)
    # A client that only Redis would know: it is told no, not waited with.
    stranger = town.stack.enter_context(bound())
    stranger.sendto(b"\x80 who am I", relay.at)
    told = {"lookup_failed": 1}
    town.go_on(lambda: relay.counters()[0].drops() == told, seconds=registry.PROBE_S)
    proxy.be("pass")
    town.go_on(lambda: BACK in relay.story())
    town.known_to(server, *calls)
    town.move_to_another(server.url, *calls)
    town.finish(**told)
    assert relay.story() == [UNREACHABLE, BACK]


def test_full(town, server):
    relay = town.start(server.start().url)
    old = town.begin(relay, CALLS - 1)
    town.known_to(server, *old)
    server.do("CONFIG", "SET", "maxmemory", "1")
    new = town.begin(relay, 1)
    town.go_on(relay.story, seconds=2 * registry.PROBE_S)
    # What it has it still says.
    town.move_to_another(server.url, *old)
    assert server.do("GET", new[0].key) is None
    server.do("CONFIG", "SET", "maxmemory", "0")
    town.go_on(lambda: TAKES in relay.story())
    town.known_to(server, *new)
    town.move_to_another(server.url, *old, *new)
    town.finish()
    assert relay.story() == [REFUSES, TAKES]


def test_lying(town, server):
    """Whatever Redis says of a client, its own next check puts it right, there as well."""
    relay = town.start(server.start().url)
    calls = town.begin(relay)
    town.known_to(server, *calls)
    misled, honest, garbled, listed, forged = calls
    foreign = ufrag.Keyring.parse("1 " + "33" * 32)
    at = ipaddress.ip_address("127.0.0.1")
    home = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/29"), 1, 65535)
    server.do("SET", misled.key, honest.ufrag)  # valid, and another's: at another transceiver
    server.do("SET", garbled.key, os.urandom(23))
    server.do("DEL", listed.key)
    server.do("LPUSH", listed.key, listed.ufrag)
    server.do("SET", forged.key, ufrag.mint(foreign, home, at, town.port, 1))

    other = town.start(server.url, "other", PATIENT)
    misled.sock.sendto(b"\x80 astray", other.at)
    town.await_other(honest.transceiver, misled.header + b"\x80 astray")
    sent = 1 + town.move(other, honest)
    for call in garbled, listed, forged:
        for number in range(3):
            call.sock.sendto(b"\x80 lost %d" % number, other.at)
    sent += 9
    drops = {"recovered_invalid": 6, "unknown_client": 3}
    town.go_on(lambda: sum(other.counters()[0].drops().values()) >= 9)
    assert other.counters()[0].drops() == drops

    wrong = misled, garbled, listed, forged
    town.introduce(other, *wrong)
    sent += len(wrong) + town.move(other, *wrong)
    town.known_to(server, *calls)
    town.move_to_another(server.url, *calls)
    inbound, outbound = other.stop()
    assert inbound.drops() == drops and outbound.drops() == {}
    assert inbound[IN.RECEIVED] == sent
    town.finish()
    assert relay.story() == []


def test_a_cluster_loses_a_primary(town):
    cluster = redises.Cluster(town.folder / "cluster", town.stack)
    relay = town.start(cluster.url)
    calls = town.begin(relay)
    where = {call.key: cluster.keeper_of(call.key) for call in calls}
    town.go_on(lambda: all(where[c.key].do("GET", c.key) for c in calls))
    lost = where[calls[0].key]
    town.go_on(lambda: lost.do("WAIT", "1", "100") == 1)
    lost.kill()
    town.go_on(lambda: REFUSES in relay.story())
    town.go_on(lambda: TAKES in relay.story())
    assert cluster.keeper_of(calls[0].key) is not lost
    town.move_to_another(cluster.url, *calls)
    town.finish()
    assert relay.story() == [REFUSES, TAKES]


def test_it_ends_while_redis_says_nothing(town, server):
    relay = town.start(server.start().url)
    town.known_to(server, *town.begin(relay))
    server.freeze()
    try:
        town.begin(relay, 1)
        town.finish()
    finally:
        server.thaw()
    assert relay.story() in ([], [UNREACHABLE])
