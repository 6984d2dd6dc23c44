"""What is measured, held as an operator would hold it: a relay's processes, seen from outside.

For scripts that measure. A relay is started from its console program with a configuration of its
own in a folder of its own; its log is a file, its counters and flows are read out of its shared
memory, its processes out of /proc. Whatever is started ends with this process, however that ends.

proc(5), prctl(2) https://man7.org/linux/man-pages/
"""

import ctypes
import fcntl
import ipaddress
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dev
import firsts
from load import PATIENCE_S, Figures

import flows
import handover
import settings
import ufrag

_libc = ctypes.PyDLL(None, use_errno=True)

CONFIG = """[relay]
public = "{address}:{public}"
internal = "{address}:{internal}"
workers = {workers}
flows_max = {flows}
flows_tentative_max = {flows}
integrity_checks_per_s = 1000000
drain_s = 0.0
metrics = "127.0.0.1:0"
state_dir = "."
{more}
[keys]
file = "{keys}"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1, 65535]
{tables}
"""
READY_LINE = " ready: "
"""In the log of a relay, once it serves."""
CLUSTER = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1, 65535)
_PR_SET_PDEATHSIG = 1


@dataclass
class Setting:
    """What all parts share: where, how long, how much, and what did not hold."""

    folder: Path
    keyring: ufrag.Keyring
    quick: bool
    seed: int
    beside: Mapping[str, str]
    relay_cpus: set[int]
    load_cpu: int
    limit_per_s: int = 0
    """Round trips a second that Load manages with nobody between it and itself."""
    part: str = ""
    failures: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def rate(self) -> int:
        """Datagrams a second each way under which nothing is to be lost."""
        return 2_000 if self.quick else 20_000

    @property
    def clients(self) -> int:
        """How many clients share them."""
        return 100 if self.quick else 1_000

    @property
    def after_s(self) -> float:
        """Media that is asserted beyond the last event."""
        return 0.5 if self.quick else 30.0

    def must(self, holds: bool, sentence: str) -> None:
        """Note a failure."""
        if not holds:
            self.failures.append(f"{self.part}: {sentence}")
            self.say(f"FAILED {sentence}")

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{self.part or 'bench'}: {text}", file=sys.stderr, flush=True)

    def subfolder(self) -> Path:
        """A new empty folder."""
        path = self.folder / str(next(self._numbers))
        path.mkdir()
        return path

    def firsts(self, clients: int, port: int, keyring: ufrag.Keyring | None = None) -> list[bytes]:
        """First datagrams of so many clients, each of a session of its own at that port."""
        at, keys = ipaddress.IPv4Address("127.0.0.1"), keyring or self.keyring
        return [firsts.check(keys, CLUSTER, at, port) for _ in range(clients)]


class Skip(Exception):
    """This part cannot be measured here; the message says why."""


def spawn(
    argv: Sequence[str | Path],
    cpus: set[int],
    log: Path,
    store: "Store | None" = None,
    managed: bool = True,
) -> "subprocess.Popen[bytes]":
    """Start a program on those CPUs, in a group of its own, that does not outlive this one, with
    what systemd would give it out of its descriptor store. Not `managed`, it gets that once, and
    has no manager from then on."""
    held = list(store.held.items()) if store else []

    def settle_in() -> None:
        os.sched_setaffinity(0, cpus)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)  # prctl(2)
        if store and managed:
            os.environ["NOTIFY_SOCKET"] = str(store.path)
        if held:  # sd_listen_fds(3)
            for target, (_, fd) in enumerate(held, LISTEN_FDS_START):
                os.dup2(fd, target)
            os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), str(len(held))
            os.environ["LISTEN_FDNAMES"] = ":".join(name for (name, _), _ in held)

    # The numbers that the descriptors get in the child must not be those of subprocess' own pipe.
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(len(held) + LISTEN_FDS_START)]
    try:
        with log.open("ab") as file:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                close_fds=not held,  # Python's own are not inherited anyhow
                preexec_fn=settle_in,  # noqa: PLW1509  # one thread: nothing to deadlock
            )
    finally:
        for fd in taken:
            os.close(fd)


LISTEN_FDS_START = 3
_STORED_FROM = 512
"""Stored descriptors have numbers from here on, not those that they get in a child."""


class Store:
    """What systemd does for a service with FileDescriptorStoreMax: a stand-in for one service.

    It keeps the descriptors that are sent with FDSTORE=1 under their FDNAME, once each, forgets
    those of an FDSTOREREMOVE=1, and remembers what else it was told. `take` has to be called often.
    sd_pid_notify_with_fds(3), systemd.service(5)
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.held: dict[tuple[str, tuple[int, int]], int] = {}
        """Descriptors by name and what they are (device and inode)."""
        self.told: list[str] = []
        """All assignments in the order they came, without descriptors' ones."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self._sock.setblocking(False)

    def take(self) -> bool:
        """Hear what was said; always False, as an `until` that never ends anything."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, 65_536, 253)
            except BlockingIOError:
                return False
            lines = data.decode().splitlines()
            said = dict(line.split("=", 1) for line in lines if "=" in line)
            if said.get("FDSTORE") == "1":
                self._keep(said.get("FDNAME", "stored"), fds)
            elif said.get("FDSTOREREMOVE") == "1":
                self._forget(said.get("FDNAME", "stored"))
            self.told += [line for line in lines if not line.startswith("FD")]
            for fd in fds:
                os.close(fd)

    def _keep(self, name: str, fds: Sequence[int]) -> None:
        for fd in fds:
            status = os.fstat(fd)
            key = name, (status.st_dev, status.st_ino)
            if key not in self.held:
                self.held[key] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _STORED_FROM)

    def _forget(self, name: str) -> None:
        for key in [key for key in self.held if key[0] == name]:
            os.close(self.held.pop(key))

    def forget(self) -> None:
        """Let go of all, as systemd does for a service that has failed for good."""
        for name, _ in list(self.held):
            self._forget(name)

    def close(self) -> None:
        """Let go of all, and listen no more."""
        self.forget()
        self._sock.close()


def end(process: "subprocess.Popen[bytes]", first: signal.Signals = signal.SIGINT) -> int:
    """Ask a program to stop; kill its group where it does not. Returns its exit status."""
    if process.poll() is None:
        process.send_signal(first)
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


class Seen:
    """A relay seen from outside, whoever started it: its log, its processes, its shared memory."""

    def __init__(self, config: Path, log: Path, workers: int, public: int, internal: int) -> None:
        """Of this configuration, with its log in a file, at these ports. To be given a `process`
        before anything is asked."""
        self.config, self.path, self.workers = config, log, workers
        self.public, self.internal = public, internal
        self.process: subprocess.Popen[bytes]

    def service(self) -> bool:
        """What a service manager does meanwhile. Always False."""
        return False

    def log(self) -> str:
        """All that it has said."""
        return self.path.read_text(errors="replace")

    def ended(self) -> bool:
        """True once its process is no more."""
        return self.process.poll() is not None

    def wait_for(self, part: str, times: int = 1) -> None:
        """Wait until it has said something. Raises dev.StartError with the end of its log."""
        deadline = time.monotonic() + PATIENCE_S
        while self.log().count(part) < times:
            self.service()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise dev.StartError(f"no {part!r} from the relay: {self.log()[-2000:]}")
            time.sleep(0.01)

    def attach(self) -> None:
        """Look into its memory; what is seen stays readable after its end."""
        self.memories = handover.Running.of(self.table()).workers

    def table(self) -> settings.RelayTable:
        """Its settings."""
        return settings.load(self.config, settings.Relay).relay

    def workers_now(self) -> dict[int, int]:
        """Process ids of the workers by their number, those that are alive."""
        alive = set(children(self.process.pid))
        pids = [each.section("control").cast("Q")[handover.Control.PID] for each in self.memories]
        return {number: pid for number, pid in enumerate(pids) if pid in alive}

    def worker_pids(self) -> list[int]:
        """The same once all of them are there. Raises dev.StartError if they do not come."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.workers_now()) < self.workers:
            if time.monotonic() > deadline:
                raise dev.StartError(f"of {self.workers} workers there are {sorted(found)}")
            time.sleep(0.001)
        return [found[number] for number in range(self.workers)]

    def flows(self) -> dict[bytes, tuple[bytes, bytes, float]]:
        """Its flows: client to transceiver, ufrag and time of birth."""
        found = (
            flow for memory in self.memories for flow in flows.read_all(memory.section("flows"))
        )
        return {flow.header: (flow.hop, flow.ufrag, flow.opened_at) for flow in found}

    def law(self) -> Figures:
        """The counters of all workers: what clients' datagrams were received, how many of either
        way are in no counter that says what became of them, and what was dropped."""
        received, missing, drops = 0, 0, Counter[str]()
        for inbound, outbound in map(handover.counters_in, self.memories):
            received += inbound[inbound.kinds["RECEIVED"]]
            missing += abs(inbound.missing()) + abs(outbound.missing())
            drops.update(inbound.drops())
            drops.update(outbound.drops())
        return {"received": received, "missing": missing, "drops": dict(drops)}

    def kernel_drops(self) -> int:
        """Datagrams that the kernel dropped since a socket of its ports was full."""
        return kernel_drops({self.public, *range(self.internal, self.internal + self.workers)})


class Relay(Seen):
    """A relay that is started here, with a configuration of its own."""

    def __init__(
        self,
        setting: Setting,
        workers: int = 1,
        flows_max: int = 65_536,
        address: str = "127.0.0.1",
        ports: tuple[int, int] | None = None,
        more: str = "",
        tables: str = "",
        with_store: bool = False,
    ) -> None:
        """Started and ready. `ports` are public and internal; `more` and `tables` go into the
        configuration; `with_store` gives it a service manager. Raises dev.StartError."""
        self._setting, self.address = setting, address
        folder = setting.subfolder()
        self.store = Store(folder) if with_store else None
        if ports is None:
            (public,) = dev.free_ports(1, socket.SOCK_DGRAM)
            ports = public, dev.free_ports(workers, socket.SOCK_DGRAM)[0]
        super().__init__(folder / "relay.toml", folder / "log", workers, *ports)
        self.config.write_text(
            CONFIG.format(
                address=address,
                public=self.public,
                internal=self.internal,
                workers=workers,
                flows=flows_max,
                keys=setting.folder / "keys",
                more=more,
                tables=tables,
            )
        )
        self.process = self.start("run")
        try:
            self.wait_for(READY_LINE)
            self.attach()
            setting.say(f"a relay serves with {workers} worker(s)")
        except BaseException:
            self.stop()
            raise

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start the relay's program with this configuration, its log after what stands there."""
        argv = [sys.executable, "-P", "-m", "relay", *words, "--config", str(self.config)]
        return spawn(argv, self._setting.relay_cpus, self.path, self.store)

    def service(self) -> bool:
        """What a service manager does meanwhile. Always False."""
        return self.store.take() if self.store else False

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind not in (None, Skip):
            self._setting.say(f"the relay's log ends with:\n{self.log()[-2000:]}")
        status = self.stop()
        self._setting.must(status == 0, f"the relay ended with status {status}")

    def stop(self) -> int:
        """End it; returns its exit status."""
        status = end(self.process)
        if self.store:
            self.store.close()
        return status


def children(pid: int) -> list[int]:
    """Processes that this one forked and that live."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for parent in pids:
        pids += children(parent)
    return pids


def cpu_s(pid: int) -> float:
    """CPU time that the scheduler accounted to a process: nanoseconds, where ticks say nothing."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) * 1e-9


def sockets() -> Iterator[tuple[int, int]]:
    """All UDP sockets: port, datagrams that did not fit."""
    for family in ("udp", "udp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            columns = line.split()
            port = int(columns[1].rpartition(":")[2], 16)
            yield port, int(columns[-1])


def kernel_drops(ports: set[int]) -> int:
    """Datagrams that the sockets of these ports could not hold."""
    return sum(drops for port, drops in sockets() if port in ports)


def listens(port: int) -> bool:
    """True once a UDP socket has this port."""
    return any(port == taken for taken, _ in sockets())


def memfds(pid: int) -> list[str]:
    """The relay's shared memories, as paths that can be looked at."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return [str(link) for link in links if f"memfd:{handover.MEMORY}" in os.readlink(link)]


def private_octets(pid: int) -> int:
    """Memory that is this process's alone, its unique set size. proc_pid_smaps(5)"""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) * 1024
