"""An operator's files for the laboratory's estate: who is where, and what each program is told.

Sans-IO: a plan goes in, addresses and the texts of configuration files come out, as an operator
would write them after config/. Every address says what it is: 203.0.113.0/24 faces the public,
10.9.0.0/16 are sites on the backbone, 10.4.0.0/16 and 10.5.0.0/16 are clusters, 198.51.100.0/24
are callers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import world

DOOR, PLAIN_DOOR = 8080, 8081
"""Ports of signaling: the one that steers to sites, and the one of a world without them."""

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
metrics = "{internal}:9464"
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
{relays}
keys_file = "{folder}/api-keys"
metrics = "127.0.0.1:{metrics}"
{more}
"""

STEERING = """
[steering]
latitude_header = "Client-Latitude"
longitude_header = "Client-Longitude"
"""

SITE = """
[[site]]
name = "{name}"
latitude = {latitude}
longitude = {longitude}
relays = ["{public}:3478"]
capacity = 1000
backbone_ms = {{ {backbone_ms} }}
status = ["http://{backbone}:9464"]
"""

PROXIES = """
# In place of a CDN each caller's own host says where it is.
trusted_proxies = ["198.51.100.0/24"]
"""


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


class Blueprint:
    """The sites, the clusters and the files of a plan."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Keys are expected in `folder`, as `keys` and `api-keys`."""
        self.plan, self._folder = plan, folder
        self.sites = {name: Site(name, n) for n, name in enumerate(plan.sites, 1)}
        self.clusters = {n: Cluster(name, n) for n, name in enumerate(plan.clusters, 1)}
        self.callers = {name: f"198.51.100.{n}" for n, name in enumerate(plan.callers, 1)}
        browsers = enumerate(plan.browsers, 101)
        self.callers |= {f"{name}/chromium": f"198.51.100.{n}" for n, name in browsers}

    def _table(self, cluster: Cluster, transit: bool = False) -> str:
        text = CLUSTER.format(id=cluster.id, prefix=cluster.prefix)
        if transit:
            faces = ", ".join(f'"{cluster.backbone(which)}:3600"' for which in "ab")
            text += f"transit = [{faces}]\n"
        return text

    def _keys(self) -> str:
        return KEYS.format(folder=self._folder)

    def edge(self, site: Site) -> str:
        """A site's relay: it knows every cluster."""
        text = self._keys() + RELAY.format(public=site.public, internal=site.backbone)
        return text + "".join(self._table(each, self.plan.tiers) for each in self.clusters.values())

    def inner(self, cluster: Cluster, which: str) -> str:
        """A cluster's relay: it knows its own."""
        at = cluster.backbone(which)
        text = self._keys() + RELAY.format(public=cluster.public(which), internal=at)
        if self.plan.tiers:
            text += TRANSIT.format(at=at)
        return text + self._table(cluster) + REDIS.format(at=cluster.at)

    def transceiver(self, cluster: Cluster, number: int) -> str:
        """It trusts its cluster's relays; on a flat backbone the sites' as well."""
        relays = f'"{cluster.network}.0.0/24"'
        if not self.plan.tiers:
            relays += ', "10.9.0.0/16"'
        text = self._keys() + TRANSCEIVER.format(at=cluster.at, port=9000 + number, relays=relays)
        return text + self._table(cluster) + REDIS.format(at=cluster.at)

    def _round_trips(self, site: Site) -> str:
        """What ping would say from a site's relay to each cluster's."""
        found = []
        for cluster in self.clusters.values():
            ends = world.Spot(site.name), world.Spot(cluster.region)
            found.append(f"{cluster.id} = {world.way(self.plan.model, *ends).delay_s * 2e3:.1f}")
        return ", ".join(found)

    def doors(self, cluster: Cluster) -> Mapping[str, str]:
        """Signaling's files: one that steers to sites, one that knows its own relays only and
        places on its own transceivers."""
        own = ", ".join(f'"{cluster.public(which)}:3478"' for which in "ab")

        def door(port: int, relays: str, more: str) -> str:
            return self._keys() + SIGNALING.format(
                at=cluster.door,
                port=port,
                relays=relays,
                folder=self._folder,
                metrics=port + 1000,
                more=more,
            )

        steered = door(DOOR, "", PROXIES) + STEERING
        for site in self.sites.values():
            latitude, longitude = world.COORDINATES[site.name]
            steered += SITE.format(
                name=site.name,
                latitude=latitude,
                longitude=longitude,
                public=site.public,
                backbone=site.backbone,
                backbone_ms=self._round_trips(site),
            )
        for each in self.clusters.values():
            steered += self._table(each)
            steered += f'redis = "redis://{each.at}:6379/0"\n'
            steered += "latitude = {}\nlongitude = {}\n".format(*world.COORDINATES[each.region])
        plain = door(PLAIN_DOOR, f"relays = [{own}]", "") + self._table(cluster)
        return {
            f"signaling-{cluster.id}": steered,
            f"signaling-{cluster.id}-plain": plain + REDIS.format(at=cluster.at),
        }
