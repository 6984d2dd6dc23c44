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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import delays
import dev
import rig
import world

VISITOR = Path(__file__).with_name("visitor.py")
BROWSER = Path(__file__).with_name("browsing.py")
PATIENCE_S = 60.0
"""For a program to be ready, and for an answer: on a machine with five times too much to do."""

KEYS = """
[keys]
file = "{folder}/keys"
"""

CLUSTER = """
[[cluster]]
id = {id}
prefix = "{prefix}"
ports = [9000, 9099]
"""

RELAY = """[relay]
public = "{public}:3478"
internal = "{internal}:3500"
workers = 1
flows_max = 4096
flows_tentative_max = 1024
drain_s = 0.0
metrics = "127.0.0.1:9464"
state_dir = "."
"""

TRANSIT = """
[transit]
listen = "{at}:3600"
internal = "{at}:3700"
relay_prefixes = ["10.9.0.0/16"]
"""

REDIS = """
[redis]
url = "redis://{at}:6379/0"
"""

TRANSCEIVER = """[transceiver]
listen = "{at}:{port}"
relay_prefixes = [{relays}]
control_prefixes = ["10.4.0.0/16", "10.5.0.0/16"]
"""

SIGNALING = """[signaling]
listen = "{at}:{port}"
relays = [{relays}]
keys_file = "{folder}/api-keys"
metrics = "127.0.0.1:{metrics}"
"""


class LabError(Exception):
    """The laboratory cannot go on; the message says why."""


@dataclass(frozen=True)
class Site:
    """A way in."""

    name: str
    number: int

    @property
    def host(self) -> str:
        """Its host's name."""
        return f"site-{self.name}"

    @property
    def public(self) -> str:
        """Where callers send."""
        return f"203.0.113.{self.number}"

    @property
    def backbone(self) -> str:
        """Where it sends from, towards clusters."""
        return f"10.9.{self.number}.1"


@dataclass(frozen=True)
class Cluster:
    """Two relays, and a host with everything else."""

    region: str
    id: int

    @property
    def network(self) -> str:
        """The first half of all its addresses."""
        return f"10.{self.id + 3}"

    @property
    def prefix(self) -> str:
        """As `[[cluster]]` has it."""
        return f"{self.network}.0.0/16"

    @property
    def machine(self) -> str:
        """The name of the host with transceivers, Redis and signaling."""
        return f"cluster-{self.id}"

    @property
    def at(self) -> str:
        """That host's address."""
        return f"{self.network}.1.1"

    @property
    def door(self) -> str:
        """Signaling's public address."""
        return f"203.0.113.{10 * self.id + 5}"

    def relay(self, which: str) -> str:
        """The name of a relay's host."""
        return f"cluster-{self.id}-{which}"

    def backbone(self, which: str) -> str:
        """A relay's address towards other relays and its transceivers."""
        return f"{self.network}.0.{'ab'.index(which) + 1}"

    def public(self, which: str) -> str:
        """A relay's public address."""
        return f"203.0.113.{10 * self.id + 'ab'.index(which) + 1}"


@dataclass(frozen=True)
class Plan:
    """What is to be built."""

    sites: tuple[str, ...] = ("tokyo", "frankfurt", "virginia")
    clusters: tuple[str, ...] = ("frankfurt", "virginia")
    callers: tuple[str, ...] = ("tokyo", "singapore", "frankfurt", "london", "virginia", "saopaulo")
    browsers: tuple[str, ...] = ()
    """Regions with a Chromium besides."""
    transceivers: int = 2
    """In each cluster."""
    model: world.Model = field(default_factory=world.Model)
    tiers: bool = True
    """False: a flat backbone, sites reach transceivers without a second hop."""


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
        """Makes hosts; `start` starts programs. The router has the last CPU for itself as far as
        real-time priority gives it that."""
        self.plan, self.folder, self._say = plan, folder, say
        self.sites = {name: Site(name, n) for n, name in enumerate(plan.sites, 1)}
        self.clusters = {n: Cluster(name, n) for n, name in enumerate(plan.clusters, 1)}
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.voices: dict[str, Voice] = {}
        self.key = ""
        self._argv: dict[str, tuple[str, list[str | Path]]] = {}
        self._cpus = set(cpus)
        self._spots: dict[str, world.Spot] = {}
        self._callers = {name: f"198.51.100.{n}" for n, name in enumerate(plan.callers, 1)}
        self._callers |= {
            f"{name}/chromium": f"198.51.100.{n}" for n, name in enumerate(plan.browsers, 101)
        }
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
        for name, address in self._callers.items():
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
        begun = time.monotonic()
        for cluster in self.clusters.values():
            self._start_redis(cluster)
        for cluster in self.clusters.values():
            for number in range(self.plan.transceivers):
                self._start(
                    f"transceiver-{cluster.id}-{number}",
                    cluster.machine,
                    "transceiver",
                    self._transceiver(cluster, number),
                )
            for which in "ab":
                self._start(
                    cluster.relay(which), cluster.relay(which), "relay", self._inner(cluster, which)
                )
        for site in self.sites.values():
            self._start(site.host, site.host, "relay", self._edge(site))
        for name in self._callers:
            self._start_voice(name)
        for name in list(self.programs):
            self.wait_ready(name)
        for cluster in self.clusters.values():
            for name, text in self._doors(cluster).items():
                self._start(name, cluster.machine, "signaling", text)
        for name in list(self.programs):
            self.wait_ready(name)
        for voice in self.voices.values():
            voice.answer()
        self._say(f"{len(self.programs)} programs are ready after {time.monotonic() - begun:.1f} s")

    def _start(self, name: str, host: str, program: str, text: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        (folder / "config.toml").write_text(text + KEYS.format(folder=self.folder))
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

    # --- the files --------------------------------------------------------------------------------

    def _cluster_table(self, cluster: Cluster, transit: bool = False) -> str:
        text = CLUSTER.format(id=cluster.id, prefix=cluster.prefix)
        if transit:
            faces = ", ".join(f'"{cluster.backbone(which)}:3600"' for which in "ab")
            text += f"transit = [{faces}]\n"
        return text

    def _edge(self, site: Site) -> str:
        """A site's relay: it knows every cluster."""
        text = RELAY.format(public=site.public, internal=site.backbone)
        return text + "".join(
            self._cluster_table(each, self.plan.tiers) for each in self.clusters.values()
        )

    def _inner(self, cluster: Cluster, which: str) -> str:
        """A cluster's relay: it knows its own."""
        at = cluster.backbone(which)
        text = RELAY.format(public=cluster.public(which), internal=at)
        if self.plan.tiers:
            text += TRANSIT.format(at=at)
        return text + self._cluster_table(cluster) + REDIS.format(at=cluster.at)

    def _transceiver(self, cluster: Cluster, number: int) -> str:
        relays = f'"{cluster.network}.0.0/24"'
        if not self.plan.tiers:
            relays += ', "10.9.0.0/16"'
        text = TRANSCEIVER.format(at=cluster.at, port=9000 + number, relays=relays)
        return text + self._cluster_table(cluster) + REDIS.format(at=cluster.at)

    def _doors(self, cluster: Cluster) -> Mapping[str, str]:
        """Signaling's files: one that knows the sites, and one that knows its own relays only."""
        found = {}
        ways = {"plain": [cluster.public(which) for which in "ab"]}
        for name in self.sites:
            ordered = [name, *(other for other in self.sites if other != name)][:2]
            ways[name] = [self.sites[each].public for each in ordered]
        for number, (name, relays) in enumerate(ways.items()):
            text = SIGNALING.format(
                at=cluster.door,
                port=8080 + number,
                relays=", ".join(f'"{each}:3478"' for each in relays),
                folder=self.folder,
                metrics=9465 + number,
            )
            text += self._cluster_table(cluster) + REDIS.format(at=cluster.at)
            found[f"signaling-{cluster.id}-{name}"] = text
        return found

    # --- what an operator, or fate, does ----------------------------------------------------------

    def door(self, cluster: Cluster, way: str) -> str:
        """The URL of signaling: `plain`, or the nearest site's name."""
        return f"http://{cluster.door}:{8080 + ['plain', *self.sites].index(way)}"

    def headers(self, region: str) -> dict[str, str]:
        """What a trusted proxy would add to a request from there."""
        return {}

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
