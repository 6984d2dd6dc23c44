"""Four ways into the same transceiver: the programs behind each, which are started and killed.

    session   a UDP port of its own for each session, at the transceiver (bare.py)
    server    one UDP port for all sessions of the transceiver, nothing in front of it (bare.py)
    turn      a real coturn in front of that one (turning.py)
    relay     the product: its relay in front of its transceiver, both as an operator starts them

What it owns: `Estate`, the processes of the ways that are asked for, on free ports of loopback, all
up at once so that what is compared is measured in turns; which of them is what; and how they are
killed and started again. Callers go in by access.py.

The callers' process keeps to the last CPU. The servers have all the others; with two CPUs they have
both, since what is in front and the transceiver would wait for each other on one. Affinity belongs
to a thread: programs are started by `on_server_cpus`, in a thread that has theirs.
"""

import asyncio
import contextlib
import enum
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import dev
import firsts
import ports
import rig
import turning

Address = tuple[str, int]
T = TypeVar("T")

BARE = Path(__file__).with_name("bare.py")
READY = r"\bready\b"


class Way(enum.StrEnum):
    """A way in."""

    SESSION = "session"
    SERVER = "server"
    TURN = "turn"
    RELAY = "relay"


NAMES = {
    Way.SESSION: "a port per session",
    Way.SERVER: "a port per server",
    Way.TURN: "TURN",
    Way.RELAY: "this relay",
}

# What is loaded on purpose takes every call that comes.
OPEN_DOORS = "sessions_max = 1000\nconnecting_max = 1000\n" + dev.UNLIMITED


def server_cpus() -> set[int]:
    """Of those that this process may use: all but the last one, or both where there are two."""
    cpus = sorted(os.sched_getaffinity(0))
    return set(cpus[:-1] if len(cpus) > 2 else cpus)


class _Programs(dev.System):
    """The programs; told to stop, none of them is waited for any more."""

    stopping = False

    def meanwhile(self) -> None:
        """See dev.System."""
        if self.stopping:
            raise dev.StartError("it was told to stop")


class Estate:
    """The programs of the ways, up."""

    def __init__(self, folder: Path, ways: list[Way], fleet: bool) -> None:
        """`fleet`: also a second server for the ways that are one address for several."""
        self.system, self.ways = _Programs(folder), ways
        self._cpus = server_cpus()
        self._control: dict[str, int] = {}
        self._argv: dict[str, list[str | Path]] = {}
        (self.relay_port,) = dev.free_ports(1, socket.SOCK_DGRAM)
        self._turn_port, self._fleet_port = dev.free_ports(2, socket.SOCK_DGRAM)
        self.coturn: turning.Coturn | None = None
        self._fleet = fleet

    async def start(self) -> None:
        """Start them. Raises dev.StartError."""
        await self.on_server_cpus(self._start)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    async def on_server_cpus(self, work: Callable[[], T]) -> T:
        """Do what starts programs in a thread on the servers' CPUs. Raises what it raises."""

        def there() -> T:
            os.sched_setaffinity(0, self._cpus)
            return work()

        try:
            return await asyncio.to_thread(there)
        except asyncio.CancelledError:  # Ctrl-C: the thread is not to start one more
            self.system.stopping = True
            raise

    def _start(self) -> None:
        firsts.make_keys(self.system.state_dir / "keys")
        if Way.SESSION in self.ways:
            self._transceiver("session", [sys.executable, BARE, "session"])
        if {Way.SERVER, Way.TURN} & set(self.ways):
            self._transceiver("server", [sys.executable, BARE, "one"])
        if Way.TURN in self.ways:
            self.coturn = turning.Coturn(self.system, self._turn_port)
        if Way.RELAY in self.ways:
            self._transceiver("transceiver", [dev.BIN / "transceiver", "run", "--config"])
            self._relay()
        if self._fleet and Way.SERVER in self.ways:
            for name in ("server-a", "server-b"):
                more = f"127.0.0.1:{self._fleet_port}"
                self._transceiver(name, [sys.executable, BARE, "one"], more)
        if self._fleet and Way.RELAY in self.ways:
            self._transceiver("transceiver-b", [dev.BIN / "transceiver", "run", "--config"])

    def _transceiver(self, name: str, argv: list[str | Path], *more: str) -> None:
        """Start a transceiver, the product's or a bare one, on a free port."""
        (port,) = ports.free(1)  # UDP and TCP on one number
        text = dev.TRANSCEIVER.format(listen=f"127.0.0.1:{port}", limits=OPEN_DOORS)
        path = self.system.state_dir / f"{name}.toml"
        path.write_text(text + dev.PARROT + dev.CLUSTER)
        self._control[name] = port
        self._argv[name] = [*argv, path, *more]
        self.system.start(name, *self._argv[name], ready=READY)

    def _relay(self) -> None:
        """Start the relay as dev.sh does, with Redis where there is one."""
        internal = dev.free_ports(2, socket.SOCK_DGRAM)[0]
        redis_port, metrics = dev.free_ports(2, socket.SOCK_STREAM)
        redis = dev.start_redis(self.system, redis_port)
        text = dev.RELAY.format(
            relay=f"127.0.0.1:{self.relay_port}", internal=internal, metrics=f"127.0.0.1:{metrics}"
        )
        text += dev.REDIS.format(redis=redis) if redis else ""
        path = self.system.state_dir / "relay.toml"
        path.write_text(text + dev.CLUSTER)
        self._argv["relay"] = [dev.BIN / "relay", "run", "--config", path]
        self.system.start("relay", *self._argv["relay"], ready=READY)

    def control(self, way: Way, second: bool = False) -> str:
        """Where calls are opened, at the second server of a fleet."""
        name = _BEHIND[way] if not second else _SECOND[way]
        return f"http://127.0.0.1:{self._control[name]}/v1/sessions"

    def public(self, way: Way) -> Address:
        """What an answer names; with a port per session the server names another one."""
        port = self.relay_port if way is Way.RELAY else self._control[_BEHIND[way]]
        return "127.0.0.1", port

    def fleet(self, way: Way) -> tuple[list[str], Address]:
        """Both servers that are behind one address, and the address."""
        if way is Way.RELAY:
            return [self.control(way), self.control(way, second=True)], self.public(way)
        names = ("server-a", "server-b")
        found = [f"http://127.0.0.1:{self._control[name]}/v1/sessions" for name in names]
        return found, ("127.0.0.1", self._fleet_port)

    def front(self, way: Way) -> list[int]:
        """The processes between clients and the transceiver."""
        if way is Way.TURN:
            return rig.tree(self.system.running[turning.Coturn.NAME].pid)
        if way is Way.RELAY:
            redis = self.system.running.get("redis")
            return rig.tree(self.system.running["relay"].pid) + ([redis.pid] if redis else [])
        return []

    def behind(self, way: Way) -> int:
        """The transceiver's process."""
        return self.system.running[_BEHIND[way]].pid

    def facing(self, way: Way) -> list[int]:
        """The processes that face the public."""
        if way is Way.RELAY:
            return rig.tree(self.system.running["relay"].pid)
        return self.front(way) or [self.behind(way)]

    def kill_worker(self) -> None:
        """Kill one worker of the relay; who of its children that is, its name in /proc says not,
        so that it is the one with the public socket that has used the most CPU."""
        children = rig.children(self.system.running["relay"].pid)
        serving = [pid for pid in children if self.relay_port in udp_ports([pid])]
        os.kill(max(serving, key=rig.cpu_s), signal.SIGKILL)

    def kill_front(self, way: Way) -> None:
        """Kill all that faces the public, so that nothing of it can say goodbye."""
        for pid in self.facing(way):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.system.running[_FRONT[way]].wait()

    def restart_front(self, way: Way) -> None:
        """Start it again, as its service manager would. Raises dev.StartError."""
        if way is Way.TURN:
            assert self.coturn is not None  # this way was asked for
            self.coturn.start()
        else:
            self.system.start(_FRONT[way], *self._argv[_FRONT[way]], ready=READY)


_BEHIND = {
    Way.SESSION: "session",
    Way.SERVER: "server",
    Way.TURN: "server",
    Way.RELAY: "transceiver",
}
_SECOND = {Way.RELAY: "transceiver-b"}
_FRONT = {
    Way.SESSION: "session",
    Way.SERVER: "server",
    Way.TURN: turning.Coturn.NAME,
    Way.RELAY: "relay",
}
"""Names of programs."""


def udp_ports(pids: list[int]) -> list[int]:
    """The distinct UDP ports that processes have bound. proc(5)"""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # it has ended
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    inodes |= set(re.findall(r"^socket:\[(\d+)]$", str(link.readlink())))
    ports = set()
    for family in ("udp", "udp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[9] in inodes:
                ports.add(int(columns[1].rpartition(":")[2], 16))
    return sorted(ports)
