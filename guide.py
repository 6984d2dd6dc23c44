"""The guide: which way a call goes, by all that signaling knows when an offer comes.

    request ──▶ geography.py: where is it?  ┐
    sites.py: how is each site?             ├──▶ steering.py ──▶ relays to name, clusters to ask
    roster.py: how is each cluster?         ┘

What it owns: that these come together, once an offer; and what happens where nothing is configured
to choose from: the relays of the settings stand in every answer, all transceivers are one crowd.

Rules that stay true:
- No offer waits for it.
- The same client is steered the same way, as long as nothing else changes: its address draws the
  lot. One that is no public address says nothing about the client, such as that of a proxy that
  nobody named or of a machine next door: then the request draws, so that not all of them move at
  once.
- It keeps nothing about a call. Another offer or a restart of ICE is steered anew, since the client
  may be somewhere else by then.
"""

import ipaddress
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from aiohttp import web

import geography
import limits
import roster
import settings
import sites
import standing
import steering

CLUSTERS_S = 0.05
"""How long the state of the clusters is good for. Their transceivers report twice in a second; with
a thousand of them it takes 2 ms to see what that comes to."""


@dataclass(frozen=True, slots=True)
class Way:
    """Which way a call goes."""

    relays: tuple[tuple[str, int], ...]
    """Public addresses to tell the client, in order of preference."""
    clusters: tuple[int, ...] = ()
    """In which order to ask them; none if there is nothing to choose."""
    site: str = ""
    """Where the client should enter; empty where there are no sites."""


class Guide:
    """Knows the way."""

    def __init__(
        self,
        config: settings.Signaling,
        peers: Callable[[], list[roster.Peer]],
        client_of: Callable[[web.BaseRequest], str],
    ) -> None:
        """`peers` are the transceivers that are known now; `client_of` says a client's address.

        Raises SettingsError for a database that cannot be used.
        """
        self._peers, self._client_of = peers, client_of
        self._places = config.cluster
        self._standing = standing.Clusters(settings.clusters(config.cluster))
        self._clusters: dict[int, steering.State] = {}
        self._clusters_at = -CLUSTERS_S
        self.geography = geography.Geography(config)
        self.sites = sites.Sites(config)
        self._use(config)

    def reload(self, config: settings.Signaling) -> None:
        """From now on by these relays, sites and this steering; clusters stay as they were.

        Raises SettingsError, and then nothing has changed.
        """
        self.geography.reload(config)
        self.sites.reload(config)
        self._use(config)

    def _use(self, config: settings.Signaling) -> None:
        self._relays = tuple((at.host, at.port) for at in config.signaling.relays)
        config = msgspec.structs.replace(config, cluster=self._places)
        self._steering = steering_of(config) if has_choice(config) else None

    @asynccontextmanager
    async def informed(self) -> AsyncIterator[None]:
        """While it lasts, sites are asked how they are."""
        async with self.sites.followed():
            yield

    def way(self, request: web.BaseRequest, request_id: str) -> Way:
        """The way of a call that this request is about."""
        if self._steering is None:
            return Way(self._relays)
        client = self._client_of(request)
        wanted = self.geography.request(
            request.remote,
            lambda name: request.headers.getall(name, ()),
            client,
            lot_of(client) or request_id.encode(),
        )
        found = self._steering.decide(wanted, self.sites.states(), self._cluster_states())
        relays = tuple((at.host, at.port) for _, at in found.relays)
        return Way(relays or self._relays, found.clusters, found.site)

    def taken(self, way: Way) -> None:
        """A client was told this way, and a call waits for it."""
        self.sites.sent(way.site)

    def _cluster_states(self) -> dict[int, steering.State]:
        now = time.monotonic()
        if now - self._clusters_at >= CLUSTERS_S:
            self._clusters_at = now
            self._clusters = self._standing.states(self._peers(), now)
        return self._clusters


def has_choice(config: settings.Signaling) -> bool:
    """True if there is anything to steer by: sites, or clusters at known places."""
    return bool(config.site) or config.cluster[0].latitude is not None


def steering_of(config: settings.Signaling) -> steering.Steering:
    """What decides, by these settings."""
    table = config.steering or settings.Steering()
    home = None
    if table.latitude is not None and table.longitude is not None:
        home = table.latitude, table.longitude
    return steering.Steering(
        [
            steering.Site(
                each.name,
                each.latitude,
                each.longitude,
                each.relays,
                each.capacity,
                {int(id): ms for id, ms in each.backbone_ms.items()},
            )
            for each in config.site
        ],
        [steering.Place(each.id, each.latitude, each.longitude) for each in config.cluster],
        named=table.sites_named,
        busy=table.busy,
        full=table.full,
        home=home,
    )


def lot_of(client: str) -> bytes:
    """What a public address draws lots by: itself, or its /64. Nothing for any other."""
    counted = limits.counted_as(client)
    return counted.encode() if counted and ipaddress.ip_address(counted).is_global else b""
