"""An operator's whole estate in the laboratory: sites, clusters, callers, and their programs.

    caller ~~~ public internet ~~~ site's relay ─── backbone ─── cluster's relays (a, b)
                                                                    │
                                          signaling, Redis, transceivers with the parrot

A site is one relay with a public address. A cluster has two relays, which have public addresses of
their own besides their transit faces, so that a caller can also be sent straight to them: that is
the world without a Global Relay. Every host is a namespace of delays.py; what is on one host
(transceivers, Redis and signaling of a cluster) meets on its loopback interface.

The files are written as an operator would write them, for the programs' own console scripts.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import delays
import dev
import rig
import world
from blueprint import DOOR, PLAIN_DOOR, Blueprint, Cluster, Plan

VISITOR = Path(__file__).with_name("visitor.py")
BROWSER = Path(__file__).with_name("browsing.py")
PATIENCE_S = 90.0
"""For a program to be ready, and for an answer: on a machine with five times too much to do."""


class LabError(Exception):
    """The laboratory cannot go on; the message says why."""


class Voice:
    """A program in a caller's region, which does as it is told."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name, self.process = name, process

    def ask(self, do: str, **words: Any) -> Any:
        """Have it do something and wait for the answer. Raises LabError."""
        self.tell(do, **words)
        return self.answer()

    def tell(self, do: str, **words: Any) -> None:
        """Have it do something; `answer` has to be called for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The next answer. Raises LabError."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
            raise LabError(f"the caller {self.name} does not answer")
        line = self.process.stdout.readline()
        if not line:
            raise LabError(f"the caller {self.name} has ended: its log says why")
        found = json.loads(line)
        if "error" in found:
            raise LabError(f"the caller {self.name}: {found['error']}")
        return found.get("is")


class Estate:
    """Everything, running. Use it as a context."""

    def __init__(
        self, plan: Plan, folder: Path, seed: int, cpus: Sequence[int], say: Callable[[str], None]
    ) -> None:
        """Starts nothing: `running` does. The router is on the last CPU."""
        self.plan, self.folder, self._say = plan, folder, say
        self.blueprint = Blueprint(plan, folder)
        self.sites, self.clusters = self.blueprint.sites, self.blueprint.clusters
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.voices: dict[str, Voice] = {}
        self.key = ""
        self._argv: dict[str, tuple[str, list[str | Path]]] = {}
        self._cpus = set(cpus)
        self._spots: dict[str, world.Spot] = {}
        self.fabric = delays.Fabric(self._way, cpus[-1], seed)

    def _way(self, source: str, target: str) -> Callable[[Any], float | None]:
        found = world.way(self.plan.model, self._spots[source], self._spots[target])
        return lambda chance: world.taken_s(found, chance)

    # --- building ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator["Estate"]:
        """Hosts, programs and callers, up; and down again, however it is left."""
        try:
            self._make_hosts()
            self.fabric.start()
            self._make_secrets()
            self._start_programs()
            yield self
        finally:
            self._stop()

    def _make_hosts(self) -> None:
        def host(name: str, region: str, *addresses: str, kind: str = "") -> None:
            self.fabric.host(name, *addresses, kind=kind)
            for address in addresses:
                self._spots[address] = world.Spot(region, kind == "caller")

        for site in self.sites.values():
            host(site.host, site.name, site.backbone, site.public)
        for cluster in self.clusters.values():
            for which in "ab":
                host(
                    cluster.relay(which),
                    cluster.region,
                    cluster.backbone(which),
                    cluster.public(which),
                )
            host(cluster.machine, cluster.region, cluster.at, cluster.door, kind="transceivers")
        for name, address in self.blueprint.callers.items():
            host(name, name.partition("/")[0], address, kind="caller")

    def _make_secrets(self) -> None:
        line = subprocess.run([dev.BIN / "ufrag", "keygen"], capture_output=True, check=True).stdout
        _secret(self.folder / "keys", line)
        made = subprocess.run(
            [dev.BIN / "signaling", "key", "lab"], capture_output=True, check=True
        )
        _secret(self.folder / "api-keys", made.stdout)
        self.key = made.stderr.decode().split()[-1]

    def _start_programs(self) -> None:
        begun, papers = time.monotonic(), self.blueprint
        for cluster in self.clusters.values():
            self._start_redis(cluster)
            for number in range(self.plan.transceivers):
                name = f"transceiver-{cluster.id}-{number}"
                text = papers.transceiver(cluster, number)
                self._start(name, cluster.machine, "transceiver", text)
            for which in "ab":
                name = cluster.relay(which)
                self._start(name, name, "relay", papers.inner(cluster, which))
        for site in self.sites.values():
            self._start(site.host, site.host, "relay", papers.edge(site))
        for name in papers.callers:
            self._start_voice(name)
        for name in list(self.programs):
            self.wait_ready(name)
        for cluster in self.clusters.values():
            for name, text in papers.doors(cluster).items():
                self._start(name, cluster.machine, "signaling", text)
        for name in list(self.programs):
            self.wait_ready(name)
        for voice in self.voices.values():
            voice.answer()
        self._say(f"{len(self.programs)} programs are ready after {time.monotonic() - begun:.1f} s")

    def _start(self, name: str, host: str, program: str, text: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        (folder / "config.toml").write_text(text)
        self._argv[name] = host, [dev.BIN / program, "run", "--config", folder / "config.toml"]
        self.start_again(name)

    def _start_redis(self, cluster: Cluster) -> None:
        binary = dev.redis_binary()
        if binary is None:
            raise LabError("there is no redis-server: install Debian's package redis-server")
        folder = self.folder / f"redis-{cluster.id}"
        folder.mkdir()
        words = ("--bind", cluster.at, "--port", "6379", "--save", "", "--appendonly", "no")
        more = ("--protected-mode", "no", "--daemonize", "no", "--dir", str(folder))
        self._argv[folder.name] = cluster.machine, [binary, *words, *more]
        self.start_again(folder.name)

    def _start_voice(self, name: str) -> None:
        program = BROWSER if name.endswith("/chromium") else VISITOR
        log = self.folder / f"{name.replace('/', '-')}.log"
        process = self.fabric.hosts[name].converse([dev.BIN / "python", program], self._cpus, log)
        self.voices[name] = Voice(name, process)

    def start_again(self, name: str) -> None:
        """Start a program, the first time or once more; `wait_ready` waits for it."""
        host, argv = self._argv[name]
        log = self._log(name)
        log.unlink(missing_ok=True)
        self.programs[name] = self.fabric.hosts[host].spawn(argv, self._cpus, log)

    def wait_ready(self, name: str) -> None:
        """Until it has said that it is. Raises LabError with the end of its log."""
        deadline, log, process = time.monotonic() + PATIENCE_S, self._log(name), self.programs[name]
        while not re.search(r"\bready\b|eady to accept", log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise LabError(f"{name} did not start: {tail}")
            time.sleep(0.02)

    def _log(self, name: str) -> Path:
        return self.folder / name / "log"

    def _stop(self) -> None:
        for voice in self.voices.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(voice.process.pid, signal.SIGKILL)
            voice.process.wait()
            for pipe in (voice.process.stdin, voice.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        running = [each for each in self.programs.values() if each.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            rig.end(process)
        self.fabric.close()

    # --- what an operator, or fate, does ----------------------------------------------------------

    def door(self, cluster: Cluster, plain: bool = False) -> str:
        """The URL of its signaling: the one that steers, or the one that knows of no sites."""
        return f"http://{cluster.door}:{PLAIN_DOOR if plain else DOOR}"

    def headers(self, region: str) -> dict[str, str]:
        """What a proxy in front of signaling would add to a request from there."""
        latitude, longitude = world.COORDINATES[region]
        return {"Client-Latitude": str(latitude), "Client-Longitude": str(longitude)}

    def nearest(self, region: str) -> Cluster:
        """The cluster to which a caller's way is shortest: what a name server by latency says."""
        caller = world.Spot(region, True)
        return min(
            self.clusters.values(),
            key=lambda each: world.way(self.plan.model, caller, world.Spot(each.region)).delay_s,
        )

    def host_of(self, address: str) -> str:
        """The name of the host with an address; empty if there is none."""
        hosts = self.fabric.hosts.values()
        return next((host.name for host in hosts if address in host.addresses), "")

    def kill(self, name: str) -> None:
        """A program and all its processes, at once."""
        process = self.programs[name]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def lose_site(self, name: str) -> float:
        """A site's relay and its address: packets to it are dropped without a word; since when."""
        at = self.fabric.lose(self.sites[name].host)
        self.kill(self.sites[name].host)
        return at

    def site_back(self, name: str) -> None:
        """It is there again, with a relay that remembers nothing."""
        host = self.sites[name].host
        self.start_again(host)
        self.wait_ready(host)
        self.fabric.restore(host)


def _secret(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


@dataclass
class Lab:
    """What all parts share: what is built, and what did not hold."""

    plan: Plan
    folder: Path
    seed: int
    quick: bool
    cpus: list[int]
    stack: contextlib.ExitStack
    failures: list[str] = field(default_factory=list)
    part: str = ""
    _estate: Estate | None = None

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{self.part or 'lab'}: {text}", file=sys.stderr, flush=True)

    def must(self, holds: bool, sentence: str) -> None:
        """Note a failure."""
        if not holds:
            self.failures.append(f"{self.part}: {sentence}")
            self.say(f"FAILED {sentence}")

    def estate(self) -> Estate:
        """All programs, up: started by the first part that needs them."""
        if self._estate is None:
            built = Estate(self.plan, self.folder, self.seed, self.cpus, self.say)
            self._estate = self.stack.enter_context(built.running())
        return self._estate
