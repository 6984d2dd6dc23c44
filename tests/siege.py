"""A relay under siege, for the tests: the program with Redis, live calls beside, and attackers.

Live calls are the load of the measurements (scripts/load.py): every datagram has a number and an
account. Their transceiver answers nobody else, as a real one would not. Attackers have as many
addresses of 127.0.0.0/8 as they like, and sockets that would hear whatever the relay sent them.
"""

import contextlib
import importlib.util
import ipaddress
import os
import re
import select
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

import flows
import handover
import host
import ledger
import metrics
import settings
import ufrag

from . import redises, test_relay

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 20
CALLS, RATE = 100, 5_000
"""Live calls, and their datagrams a second each way: 50 of a call, a frame of 20 ms each."""
LOOKUPS_PER_S, CHECKS_PER_S = 500, 1_000
TENTATIVE_MAX, ADDRESSES_MAX = 256, 16
MORE = """
batch_size = 16
flows_max = 1024
flows_tentative_max = {tentative}
addresses_per_ufrag_max = {addresses}
integrity_checks_per_s = {checks}
"""
REDIS = """
[redis]
url = "{url}"
lookups_per_s = {lookups}
"""
IN, OUT = metrics.Inbound, metrics.Outbound
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _script(name):
    """A script's module, which finds the other ones that it imports."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


load = _script("load")


class Relay(test_relay.Relay):
    """The program with one worker, pinned, and what can be seen of it from outside."""

    def __init__(self, folder, stack, redis=None):
        more = MORE.format(tentative=TENTATIVE_MAX, addresses=ADDRESSES_MAX, checks=CHECKS_PER_S)
        if redis:
            more += REDIS.format(url=redis.url, lookups=LOOKUPS_PER_S)
        super().__init__(folder, stack, more=more)
        table = settings.load(self.config, settings.Relay).relay
        *_, own = host.attach(handover.state_file(table), handover.LAYOUT, handover.MEMORY)
        self.keeper = ledger.Counters(metrics.Keeper, own.section("keeper"))
        said = [line for line in self.log if "metrics at " in line] or [self.line("metrics at ")]
        self.metrics = said[0].split()[-1]
        # The port of its transceivers is for whoever plays them.
        self.transceiver.close()
        self.second.close()

    def said(self, part):
        """How often its log has had this so far."""
        while select.select([self.process.stderr], [], [], 0)[0]:
            more = os.read(self.process.stderr.fileno(), 65536)
            assert more, f"it has ended: {self.log}"
            *lines, self._rest = (self._rest + more).split(b"\n")
            self.log += [line.decode() for line in lines]
        return sum(part in line for line in self.log)

    def octets(self):
        """Resident memory of the worker, what it shares included."""
        text = Path(f"/proc/{self.worker()}/smaps_rollup").read_text()
        return int(re.search(r"^Rss:\s+(\d+) kB", text, re.M)[1]) * 1024

    def socket_drops(self, side):
        """Datagrams that the kernel dropped, as the keeper's page of metrics has it."""
        with _OPENER.open(self.metrics, timeout=PATIENCE_S) as page:
            text = page.read().decode()
        found = re.search(
            rf'^earshot_relay_socket_dropped_total{{.*socket="{side}".*}} (\S+)$', text, re.M
        )
        return int(float(found[1]))

    def flows(self):
        return list(flows.read_all(self.memories[0].section("flows")))

    def taken(self, sent):
        """Wait until the worker, or the kernel, has disposed of all that was sent; returns what
        was counted inbound and outbound, and what the kernel dropped of it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            inbound, outbound = self.counters()
            dropped = self.socket_drops("public")
            done = inbound[IN.RECEIVED] + dropped == sent and not inbound[IN.WAITING]
            if done and not inbound.missing():
                return inbound, outbound, dropped
            assert time.monotonic() < deadline, (sent, dropped, str(inbound))
            time.sleep(0.01)

    def keeper_pid(self):
        """Its child that is no worker."""
        pid = self.process.pid
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (found,) = {int(word) for word in words} - {self.worker()}
        return found

    @contextlib.contextmanager
    def frozen(self, pid=None):
        """A process, by default the worker, stands still: what comes meanwhile waits in sockets."""
        pid = pid or self.worker()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


class Live(load.Load):
    """Calls, and a transceiver that answers them and nobody else."""

    quiet_s = 5.0
    """A relay, or a machine, that stands still for some seconds has lost nothing yet."""

    def __init__(self, relay, calls=CALLS, at="127.0.0.1", beside=()):
        """The transceiver is at that address and the relay's port for transceivers. While `open`
        waits the calls of `beside` go on."""
        super().__init__(calls)
        self._transceiver.close()
        self._transceiver = load._udp(at, relay.port)
        self._fds = self._client.fileno(), self._transceiver.fileno()
        self.port, self._at, self._beside = relay.port, ipaddress.ip_address(at), beside
        self.relay, self.echoed, self.strange, self.checked = relay, 0, 0, 0
        self.towards(relay.at, relay.public)

    def hints(self, keyring, first=1):
        """Ufrags of sessions at this transceiver."""
        return [
            ufrag.mint(keyring, self.relay.home, self._at, self.port, first + number)
            for number in range(self.clients)
        ]

    def _hear_firsts(self, waiting):
        super()._hear_firsts(waiting)
        for each in self._beside:
            each._turn(time.monotonic_ns())

    def first(self, client, datagram):
        """Send a datagram of a client's that is not media, with no number."""
        self._send_firsts([client], {client: datagram})
        self._out_octets[:] = 0x5A
        self._out.to_send[:] = load.OCTETS

    def _echo(self):
        octets, names, _ = self._echo_in._keep
        while n := self._echo_in.receive(self._fds[1]):
            at = octets[:n, load._CLIENT_AT : load._CLIENT_AT + 4].copy().view(">u4")[:, 0]
            known = (at >= load.CLIENTS_AT) & (at < load.CLIENTS_AT + self.clients)
            k, lengths = int(known.sum()), self._echo_in.received[:n][known]
            octets[:k], names[:k] = octets[:n][known], names[:n][known]
            if k:
                self._echo_out.to_send[:k] = lengths
                self._echo_out.send(self._fds[1], k)
            self.echoed += k
            self.checked += int((octets[:k, 32] < 4).sum())
            self.strange += n - k
            if self._room and k:
                heads = octets[:k, 32 : 32 + load._HEAD_OCTETS]
                self._log_in.add(k, heads, at[known], lengths - 32, 0)
            if n < load.BATCH:
                return

    def finish(self, forwarded):
        """Take all that the relay has sent to the transceiver."""
        deadline = time.monotonic() + PATIENCE_S
        while self.echoed + self.strange < forwarded:
            assert time.monotonic() < deadline, (self.echoed, self.strange, forwarded)
            self._echo()
            self._take()
            time.sleep(0.001)

    def run_until(self, seconds, until=lambda: True):
        """As `run`, and until all has left that is due in so long, however slow the machine is;
        `until` is asked meanwhile and has to be true in the end, too."""
        wanted = self._rate * seconds
        assert self.run(PATIENCE_S, lambda: until() and self.count >= wanted), self.count


def together(lives, seconds, until=lambda: False):
    """As `Load.run`, for several; True if it has come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        for each in lives:
            now = time.monotonic_ns()
            each._started = each._started or now
            each._turn(now)
        time.sleep(load.TICK_S)
    return until()


def beside(live, flood, rate, seconds):
    """Calls and a flood of that rate together, until nearly all that is due of both in so long has
    left, however slow the machine is."""
    due = flood.paced(rate)
    live.run_until(seconds, lambda: due() or flood.sent >= 0.95 * rate * seconds)


PACED_S = 0.05
"""Of a pause of its own, as much as a paced flood makes up for at once."""


class Flood:
    """Attackers: datagrams in turn, each from the next of many addresses and ports."""

    FIRST, PORTS = int(ipaddress.IPv4Address("127.32.0.1")), 4

    def __init__(self, stack, port, datagrams, sources=100_000):
        self.sent, self._sources, self._began = 0, sources, 0.0
        self._octets = np.zeros((len(datagrams), 256), np.uint8)
        for row, each in enumerate(datagrams):
            self._octets[row, : len(each)] = np.frombuffer(each, np.uint8)
        self._lengths = np.array([len(each) for each in datagrams], np.uint64)
        self.socks = [stack.enter_context(load._udp("0.0.0.0", 0)) for _ in range(self.PORTS)]
        self._out = np.zeros((load.BATCH, 256), np.uint8)
        names, control = np.zeros(load.BATCH, load._NAME), np.zeros(load.BATCH, load._PKTINFO)
        names["family"], names["port"] = socket.AF_INET, port
        names["address"] = int(ipaddress.IPv4Address("127.0.0.1"))
        control["length"], control["type"] = load._PKTINFO_OCTETS, load._IP_PKTINFO
        self._from = control["source"]
        self._batch = load.Datagrams(self._out, names, control)

    def send(self, count):
        """So many of them, at once."""
        end = self.sent + count
        while self.sent < end:
            n = min(end - self.sent, load.BATCH)
            numbers = self.sent + np.arange(n)
            rows = numbers % len(self._lengths)
            self._out[:n] = self._octets[rows]
            self._batch.to_send[:n] = self._lengths[rows]
            self._from[:n] = self.FIRST + numbers % self._sources
            sock = self.socks[(self.sent // load.BATCH) % self.PORTS]
            self._batch.send(sock.fileno(), n)
            self.sent += n

    def paced(self, rate):
        """To be called again and again: sends what is due. Always False. A machine that stood still
        gets no burst for it."""
        began, before = time.monotonic(), self.sent

        def due():
            owed = int((time.monotonic() - began) * rate) - (self.sent - before)
            self.send(min(owed, int(rate * PACED_S)))
            return False

        return due

    def heard(self):
        """True if anybody has ever sent an attacker anything."""
        return bool(select.select(self.socks, [], [], 0)[0])


def redis(folder, stack):
    """A real server; skips the test where there is none."""
    return redises.Single(folder, stack)


def asked(server):
    """How often Redis was asked about a client."""
    stats = server.servers[0].client.info("commandstats")
    return stats.get("cmdstat_getrange", {}).get("calls", 0)
