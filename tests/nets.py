"""Several hosts on one machine: network namespaces, and pairs of virtual links between them.

    client --------+             +-------- relay a
                   +-- router ---+-------- relay b
    redis ---------+             +-------- transceiver

Every host has a network of its own to the router, in both families. The relays' public address is
on the loopback interface of both of them, and it is the router's route that decides who gets its
datagrams: what a network with ECMP, or with a routing daemon on each relay, does.

All of it lives in one process that `inside` forks, and in the programs that this one starts: a
namespace has no name, only descriptors, and is gone with the last of them. Sockets stay in the
namespace they were made in, so one process can be client, transceiver and router at once.
"""

import contextlib
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pyroute2
import redis

import handover
import host
import ledger
import settings

from . import alone, redises

PATIENCE_S = 20
"""How long anything may take before the test has failed."""

PUBLIC = {4: "203.0.113.5", 6: "2001:db8::5"}
PORT, INTERNAL_PORT, TRANSCEIVER_PORT, REDIS_PORT = 3478, 3500, 9000, 6379
# Nobody else is in these namespaces, so ports are as they would be in the field.

NAMES = "client", "a", "b", "transceiver", "redis"
PREFIXES = {4: "10.77.4.0/24", 6: "fd77:4::/96"}
"""The transceiver's network, as a cluster."""

CONFIG = """
[relay]
public = "{public}"
internal = "{internal}"
workers = 1
state_dir = "."
metrics = "127.0.0.1:0"
{relay}

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "{prefix}"
ports = [{transceiver}, {transceiver}]

[redis]
url = "redis://{redis}/0"
timeout_s = 5.0
wait_s = 10.0
{more}
"""
"""With patience: what is late because the machine is slow would be lost, which none of this is
about."""

_DF, _FRAGMENT = 0x4000, 0x3FFF  # of an IPv4 header: may not be cut; is a piece of one that was
_NODAD = 2  # IFA_F_NODAD: an address that may be used at once
_PROBE = 3  # IP_PMTUDISC_PROBE, and IPv6's: never a fragment, and no ICMP is believed


def inside(folder, work, virtual=False):
    """Run `work` with a fabric, in a process of its own; its files are in `folder`.

    With `virtual` addresses it is the relays that give their hosts the public address. In the end
    every relay stops in order, if it still runs, and has every datagram in one counter.
    """

    def alone_there():
        alone.unshare()
        with contextlib.ExitStack() as stack:
            fabric = Fabric(stack, folder, virtual)
            work(fabric)
            for relay in fabric.started:
                relay.stop()
        sys.stdout.flush()

    alone.joined(*alone.child(alone_there))


def _router_alone():
    alone.unshare()
    _forward()


def _forward():
    # Strict filters of the sources' addresses would drop what a relay answers that the route does
    # not lead to at the moment.
    _set("ipv4/conf/all/rp_filter", 0)
    _set("ipv4/conf/default/rp_filter", 0)
    _set("ipv4/ip_forward", 1)
    _set("ipv6/conf/all/forwarding", 1)


def _set(name, value):
    """A setting of the namespace that this process is in."""
    Path("/proc/sys/net", name).write_text(str(value))


def numbers(name):
    """Address of a host, by family."""
    at = NAMES.index(name) + 1
    return {4: f"10.77.{at}.2", 6: f"fd77:{at}::2"}


def bracketed(address, port):
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Host:
    """A network namespace."""

    def __init__(self, stack, home):
        self._home = home
        alone.unshare()
        self.fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        stack.callback(os.close, self.fd)
        _set("ipv6/conf/default/accept_dad", 0)
        self.routes = stack.enter_context(pyroute2.IPRoute())
        self.routes.link("set", index=1, state="up")
        alone.enter(home)

    @contextlib.contextmanager
    def inside(self):
        """What is opened and started in here is this host's."""
        alone.enter(self.fd)
        try:
            yield
        finally:
            alone.enter(self._home)

    def address(self, interface, address):
        """Give it an address; on the loopback interface, one that is no network."""
        (index,) = self.routes.link_lookup(ifname=interface)
        version = ipaddress.ip_address(address).version
        length = (
            (24 if version == 4 else 64) if interface != "lo" else (32 if version == 4 else 128)
        )
        more = {} if version == 4 else {"flags": _NODAD}
        self.routes.addr("add", index=index, address=address, prefixlen=length, **more)

    def addresses(self, interface):
        (index,) = self.routes.link_lookup(ifname=interface)
        return {entry.get("address") for entry in self.routes.addr("dump", index=index)}

    def up(self, interface, up=True, **more):
        (index,) = self.routes.link_lookup(ifname=interface)
        self.routes.link("set", index=index, state="up" if up else "down", **more)

    def route(self, destination, gateway):
        """All that goes there goes that way from now on."""
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        self.routes.route("replace", dst=destination, gateway=gateway, family=family)

    def udp(self, address, port=0):
        """A socket that never sends a fragment."""
        six = ":" in address
        with self.inside():
            sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        level, option = (socket.IPPROTO_IPV6, 23) if six else (socket.IPPROTO_IP, 10)
        sock.setsockopt(level, option, _PROBE)
        sock.bind((address, port))
        return sock

    def counted(self):
        """What the kernel counts here of IP, both families: by RFC 4293's names."""
        found = {}
        with self.inside():
            four = Path("/proc/net/snmp").read_text().splitlines()
            six = Path("/proc/net/snmp6").read_text().split()
        names, values = (line.split()[1:] for line in four if line.startswith("Ip:"))
        found |= {f"Ip{name}": int(value) for name, value in zip(names, values, strict=True)}
        found |= {name: int(value) for name, value in zip(six[::2], six[1::2], strict=True)}
        return found


class Program:
    """A program on a host; it is killed with the stack, and all that it has started."""

    def __init__(self, stack, where, *words, folder=None):
        self._rest, self.log = b"", []
        with where.inside():
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=folder,
            )
        stack.callback(self._clean)

    def _clean(self):
        self.kill()
        self.process.stdout.close()

    def kill(self):
        """All of it at once, as with the loss of its host."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def line(self, part):
        """Wait for the next line with `part` in it."""
        while not (found := self.said(part)):
            assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], (part, self.log)
        return found

    def said(self, part):
        """The next line with `part` in it, if it has been said by now."""
        while True:
            head, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                self.log.append(head.decode(errors="replace"))
                if part in self.log[-1]:
                    return self.log[-1]
            elif select.select([self.process.stdout], [], [], 0)[0]:
                more = os.read(self.process.stdout.fileno(), 65536)
                assert more, f"it ended without {part!r}: {self.log}"
                self._rest += more
            else:
                return ""


class Relay(Program):
    """A relay, and its counters, which can be read after its death, too."""

    def __init__(self, fabric, name, public=4, internal=4, relay="", more=""):
        self.name, self.at = name, numbers(name)[internal]
        folder = fabric.folder / f"relay-{name}-{public}-{internal}"
        folder.mkdir()
        fabric.keys(folder)
        self.config = folder / "relay.toml"
        self.config.write_text(
            CONFIG.format(
                public=bracketed(PUBLIC[public], PORT),
                internal=bracketed(self.at, INTERNAL_PORT),
                prefix=PREFIXES[internal],
                transceiver=TRANSCEIVER_PORT,
                redis=bracketed(numbers("redis")[internal], REDIS_PORT),
                relay=relay,
                more=more,
            )
        )
        command = sys.executable, "-P", "-m", "relay", "run", "--config", self.config
        super().__init__(fabric.stack, fabric.hosts[name], *command)
        self.memories = []
        fabric.started.append(self)

    def ready(self):
        self.line(" ready:")
        state = handover.state_file(settings.load(self.config, settings.Relay).relay)
        self.memories = host.attach(state, handover.LAYOUT, handover.MEMORY)[:-1]
        return self

    def counters(self):
        rows = zip(*map(handover.counters_in, self.memories), strict=True)
        return [ledger.total(way) for way in rows]

    def law(self):
        """Every datagram is in one counter; returns the counters."""
        ways = self.counters()
        assert [way.missing() for way in ways] == [0, 0], (self.name, [str(way) for way in ways])
        return ways

    @contextlib.contextmanager
    def frozen(self):
        """Its worker stands still: what comes meanwhile comes in one batch."""
        pid = self.memories[0].section("control").cast("Q")[handover.Control.PID]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def drain(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self):
        """It ends in order; returns the counters."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.line("stopped: outbound")
            assert self.process.wait(PATIENCE_S) == 0
        return self.law()


class Fabric:
    """The hosts of the figure above."""

    def __init__(self, stack, folder, virtual):
        self.stack, self.folder, self.started = stack, folder, []
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        stack.callback(os.close, home)
        self.router = Host(stack, home)
        with self.router.inside():
            _forward()
        self.hosts = {name: Host(stack, home) for name in NAMES}
        for name in NAMES:
            self._link(name)
        for name in () if virtual else ("a", "b"):
            for address in PUBLIC.values():
                self.hosts[name].address("lo", address)
        self.lead("a")

    def _link(self, name):
        at, there = NAMES.index(name) + 1, self.hosts[name]
        self.router.routes.link(
            "add", ifname=name, kind="veth", peer={"ifname": "up", "net_ns_fd": there.fd}
        )
        for host_, interface, last in ((self.router, name, 1), (there, "up", 2)):
            host_.address(interface, f"10.77.{at}.{last}")
            host_.address(interface, f"fd77:{at}::{last}")
            host_.up(interface)
        there.route("0.0.0.0/0", f"10.77.{at}.1")
        there.route("::/0", f"fd77:{at}::1")

    def lead(self, name):
        """From now on the router gives this relay whatever comes for the public address."""
        for version, address in PUBLIC.items():
            length = 32 if version == 4 else 128
            self.router.route(f"{address}/{length}", numbers(name)[version])

    def narrow(self, name, mtu):
        """Let no larger packets through the link to a host."""
        self.router.up(name, mtu=mtu)
        self.hosts[name].up("up", mtu=mtu)

    def lose(self, relay):
        """A relay's host is gone, with everything on it."""
        relay.kill()
        self.router.up(relay.name, False)

    def keys(self, folder):
        (folder / "keys").write_text("1 " + "11" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        return settings.load_keys(folder / "keys")

    def redis(self, family=4):
        """Start it; returns how to look into it."""
        at = numbers("redis")[family]
        words = redises.required(), "--port", str(REDIS_PORT), "--bind", at, "--save", ""
        more = "--appendonly", "no", "--protected-mode", "no"
        Program(self.stack, self.hosts["redis"], *words, *more, folder=self.folder).line(
            "eady to accept connections"
        )
        client = redis.Redis(host=at, port=REDIS_PORT, socket_timeout=PATIENCE_S)
        self.stack.callback(client.close)
        with self.hosts["redis"].inside():
            assert client.ping()
        return client

    def relays(self, **kwargs):
        """Both, started at the same time."""
        started = [Relay(self, name, **kwargs) for name in ("a", "b")]
        return [relay.ready() for relay in started]

    def fragments(self):
        """How many packets any host has cut or put together."""
        every = [self.router, *self.hosts.values()]
        kinds = "IpFragCreates", "IpReasmReqds", "Ip6FragCreates", "Ip6ReasmReqds"
        return sum(host_.counted()[kind] for host_ in every for kind in kinds)


class Tap:
    """All IP packets on one of the router's links, both ways."""

    def __init__(self, fabric, name):
        with fabric.router.inside():
            every = 0x0003  # ETH_P_ALL
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(every))
            sock.bind((name, every))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._sock = fabric.stack.enter_context(sock)

    def wait(self, seconds):
        """Until there is something, or so long."""
        select.select([self._sock], [], [], seconds)

    def udp(self):
        """UDP since the last time: source, destination, payload, and True if no router may, or
        did, cut it."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._sock.recv(65536)
                if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                    (word,) = struct.unpack_from("!H", packet, 6)
                    whole = bool(word & _DF) and not word & _FRAGMENT
                    ends = packet[12:16], packet[16:20]
                    payload = packet[(packet[0] & 15) * 4 + 8 :]
                elif packet[0] >> 4 == 6 and packet[6] in (socket.IPPROTO_UDP, 44):
                    whole = packet[6] == socket.IPPROTO_UDP  # and not a fragment's header
                    ends, payload = (packet[8:24], packet[24:40]), packet[48:]
                else:
                    continue
                source, target = (str(ipaddress.ip_address(end)) for end in ends)
                found.append((source, target, payload, whole))
        return found


REASON = alone.REASON or alone.may(_router_alone)
"""Why there can be no such hosts here; empty where there can."""
