"""Front: the settings of signaling, which faces the public.

What it owns: the tables of signaling's configuration file, and what two of their values cannot say
together.

Rules that stay true:
- Without API keys nobody but this machine may call.
- Transceivers are named, or there is a Redis in which they announce themselves, or both.
- Relays are listed once for all clients, or by site; then there is something to steer by.

`settings.py` gives these tables their names, and reads the file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

import steering
from endpoints import Endpoint, Prefix, RedisUrl
from tables import Cluster, HeaderName, Keys, SharedRedis, Table

PerSecond = Annotated[float, Meta(gt=0, le=1_000_000)]
Latitude = Annotated[float, Meta(ge=-90, le=90)]
Longitude = Annotated[float, Meta(ge=-180, le=180)]


class SignalingTable(Table, frozen=True):
    """`[signaling]`."""

    listen: Endpoint
    """Where the HTTP API and the demo page are served. With TLS, here or at a proxy in front of it:
    browsers give a microphone only to https and to localhost."""
    relays: Annotated[tuple[Endpoint, ...], Meta(max_length=8)] = ()
    """Public addresses of relays, as clients reach them: they stand in every answer. Where relays
    are at several sites, `[[site]]` has them, and this is left out."""
    tls_certificate: Path | None = None
    """The certificate and those between it and its root (PEM, `fullchain.pem`), for TLS here.
    SIGHUP reads it again."""
    tls_key: Path | None = None
    """Its key (PEM), readable by its owner and group at most."""
    trusted_proxies: Annotated[tuple[Prefix, ...], Meta(max_length=64)] = ()
    """Where proxies in front of this send from. They may have any number of connections, and say
    where a client is in the header below, which from anybody else is not read."""
    client_address_header: HeaderName = "X-Forwarded-For"
    """Each proxy adds the address it was called from at the end; the right-most one that is no
    trusted proxy's is the client's."""
    connections_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 4_096
    """Connections at once. Beyond that the one that idles longest makes room for the next."""
    connections_per_address_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    """Of them, from one address, or one /64 of IPv6. A browser has six; an office shares one
    address, and so do the callers of a provider that has too few."""
    transceivers: Annotated[tuple[Endpoint, ...], Meta(max_length=1024)] = ()
    """Control addresses of transceivers that calls are placed on, beside those that announce
    themselves in Redis. None are needed where `[redis]` is given."""
    keys_file: Path | None = None
    """The API keys, a line each as `signaling key` prints it; readable by its owner only. Without
    it whoever can reach this may call: for development, and at a loopback address only."""
    offer_octets_max: Annotated[int, Meta(ge=1024, le=1 << 20)] = 65_536
    """Largest request body. A browser's offer has 2,000 to 8,000 octets."""
    transceiver_timeout_s: Annotated[float, Meta(gt=0, le=60)] = 2.0
    """How long a transceiver may take to answer before the next one is asked."""
    retry_after_s: Annotated[int, Meta(ge=1, le=3600)] = 5
    """What a client is told to wait when no transceiver takes its call."""
    metrics: Endpoint = Endpoint("127.0.0.1:9465")
    """Where /metrics, /healthz and /readyz are served. Port 0 is any that is free; the log names
    it. Let nobody but the monitoring reach it."""
    web_dir: Path | None = None
    """Folder of the demo page; without it no page is served."""


class Limits(Table, frozen=True):
    """`[limits]`: what callers may do in a second; each may save up `burst_s` of it, at least one.
    Without this table these defaults hold where there are API keys, and nothing is limited where
    there are none."""

    address_per_s: PerSecond = 20.0
    """Requests of the API from one address, or one /64 of IPv6. An office shares one."""
    failures_per_s: PerSecond = 5.0
    """Of these, such with a wrong key or none."""
    key_per_s: PerSecond = 50.0
    """Calls and ephemeral keys under one API key, unless its line says per_second=."""
    key_calls_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 1_000
    """Calls at once under one API key, unless its line says calls=."""
    burst_s: Annotated[float, Meta(gt=0, le=3_600)] = 10.0


class IceServer(Table, frozen=True):
    """`[[ice_server]]`: a STUN or TURN server for clients behind networks that let nothing else
    through. They are told of it with the answer; the relay itself needs none."""

    url: Annotated[str, Meta(pattern=r"\A(stuns?|turns?):[!-;=?-~]{1,512}\Z")]
    """`stun:host:port` or `turn:host:port?transport=tcp`."""
    username: Annotated[str, Meta(pattern=r"\A[ -~]{1,512}\Z")] | None = None
    """For TURN. Every client that may call learns both."""
    credential: Annotated[str, Meta(pattern=r"\A[ -~]{1,512}\Z")] | None = None


class Whip(Table, frozen=True):
    """`[whip]`."""

    elsewhere: Annotated[str, Meta(pattern=r"\Ahttps?://[!-\"$-~]{1,512}\Z")] | None = None
    """The WHIP endpoint of another cluster, `https://host/whip`: where encoders are sent (307)."""
    elsewhere_when: Literal["full", "always"] = "full"
    """`full`: when no transceiver here takes the call. `always`: at once."""


class Site(Table, frozen=True):
    """`[[site]]`: a place where clients enter, with one relay or several."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    """What logs and reasons know it by."""
    latitude: Latitude
    longitude: Longitude
    """In degrees; south and west are negative."""
    relays: Annotated[tuple[Endpoint, ...], Meta(min_length=1, max_length=16)]
    """Public addresses of its relays, as clients reach them, of one family or both. A client is
    told one of each family."""
    capacity: Annotated[int, Meta(ge=1, le=100_000_000)]
    """Flows that all its relays together carry well: load is measured by it."""
    backbone_ms: dict[str, Annotated[float, Meta(ge=0, le=10_000)]] = msgspec.field(
        default_factory=dict
    )
    """What a round trip from here to clusters takes, by their ids: `{1 = 248, 2 = 165}`. What is
    not said is estimated by distance, and cables are not laid by distance."""
    status: Annotated[
        tuple[Annotated[str, Meta(pattern=r"\Ahttps?://[0-9A-Za-z.:\[\]-]{1,256}\Z")], ...],
        Meta(max_length=16),
    ] = ()
    """The `relay.metrics` address of each, `http://10.9.0.5:9464`: there /readyz says whether it
    takes clients and /metrics how many it has. Without any the site is taken to be well."""


class PlacedCluster(Cluster, frozen=True):
    """`[[cluster]]` of signaling: the same as in every other file, and where it is."""

    latitude: Latitude | None = None
    longitude: Longitude | None = None
    """Needed where there are sites and more than one cluster."""
    redis: RedisUrl | None = None
    """Where its transceivers announce themselves, if that is not `[redis]`: each cluster may have
    one of its own, so that what happens to it concerns that cluster alone."""


class Steering(Table, frozen=True):
    """`[steering]`: how it is known where a client is, and when load moves on."""

    country_header: HeaderName | None = None
    """In it a trusted proxy says the client's country, two letters. The proxy must set it whatever
    the client sends; from anybody else it is not read. So also for the next two."""
    latitude_header: HeaderName | None = None
    longitude_header: HeaderName | None = None
    """Coordinates in degrees, which go before the country."""
    database: Path | None = None
    """A file in MaxMind's format that says where addresses are, for clients of whom no header says
    it. SIGHUP reads it again."""
    latitude: Latitude | None = None
    longitude: Longitude | None = None
    """Where clients are taken to be of whom nothing says it; without this they are spread over all
    sites. Give the place of this instance where clients come to the nearest one."""
    sites_named: Annotated[int, Meta(ge=2, le=4)] = steering.SITES_NAMED
    """Sites whose addresses a client is told: the next one is where its ICE goes by itself."""
    busy: Annotated[float, Meta(gt=0, lt=1)] = steering.BUSY
    """Load from which on a site or a cluster gives away a share of its new clients."""
    full: Annotated[float, Meta(gt=0, le=2)] = steering.FULL
    """Load at which it gives away all of them. The nearer to `busy`, the more load swings.
    Those who move since a site is lost may fill others half-way up from `busy` to this."""
    poll_s: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    """How often the relays' `status` addresses are asked. One that does not answer three times is
    lost; a site all of whose relays are lost gets nobody."""


class Signaling(Table, frozen=True):
    """Signaling's file."""

    signaling: SignalingTable
    keys: Keys
    cluster: Annotated[tuple[PlacedCluster, ...], Meta(min_length=1)]
    site: Annotated[tuple[Site, ...], Meta(max_length=256)] = ()
    steering: Steering | None = None
    redis: SharedRedis | None = None
    ice_server: Annotated[tuple[IceServer, ...], Meta(max_length=8)] = ()
    whip: Whip = Whip()
    limits: Limits | None = None


def agree(found: Signaling) -> None:
    """What no single value shows. Raises ValueError "KEY: REASON"."""
    for number, server in enumerate(found.ice_server):
        if (server.username is None) != (server.credential is None):
            raise ValueError(f"ice_server[{number}]: username and credential go together")
    registries = [found.redis, *(cluster.redis for cluster in found.cluster)]
    if not found.signaling.transceivers and not any(registries):
        raise ValueError(
            "signaling.transceivers: name some, or give [redis], where they announce themselves"
        )
    table = found.signaling
    if table.keys_file is None and not table.listen.address.is_loopback:
        raise ValueError(
            f"signaling.keys_file: without API keys only this machine may call, and {table.listen}"
            " is no loopback address"
        )
    if table.keys_file is None and table.trusted_proxies:
        raise ValueError(
            "signaling.keys_file: without API keys only this machine may call, and trusted_proxies"
            " let others in"
        )
    if (table.tls_certificate is None) != (table.tls_key is None):
        raise ValueError("signaling.tls_certificate: goes together with tls_key")
    if table.client_address_header.lower() == "forwarded":
        raise ValueError(
            "signaling.client_address_header: Forwarded (RFC 7239) is not read; let the proxy send"
            " X-Forwarded-For"
        )
    _agree_on_sites(found)
    _agree_on_steering(found)


def _agree_on_sites(found: Signaling) -> None:
    if found.site and found.signaling.relays:
        raise ValueError(
            "signaling.relays: [[site]] has the relays that clients are told; take these away"
        )
    if not (found.site or found.signaling.relays):
        raise ValueError("signaling.relays: name the relays, here or by [[site]]")
    relays = [each for site in found.site for each in site.relays]
    for what, listed in (
        ("name", [site.name for site in found.site]),
        ("relays", relays),
        ("status", [each for site in found.site for each in site.status]),
    ):
        twice = _twice(listed)
        if twice is not None:
            raise ValueError(f"site: {what} {twice} stands there twice")
    for at in relays:
        if not at.port:
            raise ValueError(f"site: relays {at}: clients cannot send to port 0")
    for number, cluster in enumerate(found.cluster):
        _pair(cluster.latitude, cluster.longitude, f"cluster[{number}]")
    _agree_on_backbones(found)
    placed = [cluster.latitude is not None for cluster in found.cluster]
    if not all(placed) and (any(placed) or (found.site and len(placed) > 1)):
        raise ValueError(
            f"cluster[{placed.index(False)}]: needs latitude and longitude: without them nobody"
            " knows which cluster is near to a client"
        )


def _agree_on_backbones(found: Signaling) -> None:
    ids = {str(cluster.id): cluster.latitude is not None for cluster in found.cluster}
    for number, site in enumerate(found.site):
        for id in site.backbone_ms:
            if id not in ids:
                raise ValueError(
                    f"site[{number}].backbone_ms: there is no cluster {id}; there is"
                    f" {', '.join(ids)}"
                )
        for id, placed in ids.items():
            if not placed and id not in site.backbone_ms and _said_anywhere(found, id):
                raise ValueError(
                    f"site[{number}].backbone_ms: lacks cluster {id}, which has no latitude and"
                    " longitude to estimate by: say it of every site, or of none"
                )


def _said_anywhere(found: Signaling, id: str) -> bool:
    return any(id in site.backbone_ms for site in found.site)


def _agree_on_steering(found: Signaling) -> None:
    table = found.steering
    if table is None:
        return
    if not found.site and found.cluster[0].latitude is None:
        raise ValueError(
            "steering: there is nothing to choose from: neither [[site]] nor clusters with latitude"
            " and longitude"
        )
    _pair(table.latitude, table.longitude, "steering")
    if (table.latitude_header is None) != (table.longitude_header is None):
        raise ValueError("steering.latitude_header: goes together with longitude_header")
    headers = [
        name.lower()
        for name in (table.country_header, table.latitude_header, table.longitude_header)
        if name is not None
    ]
    if headers and not found.signaling.trusted_proxies:
        raise ValueError(
            "steering: headers are believed of signaling.trusted_proxies alone, and there are none"
        )
    twice = _twice([*headers, found.signaling.client_address_header.lower()])
    if twice is not None:
        raise ValueError(f"steering: header {twice} cannot say two things")
    if table.busy >= table.full:
        raise ValueError("steering.busy: not below steering.full: load would move all at once")


def _pair(latitude: float | None, longitude: float | None, where: str) -> None:
    if (latitude is None) != (longitude is None):
        raise ValueError(f"{where}.latitude: goes together with longitude")


def _twice(listed: Iterable[Any]) -> Any:
    """The first that stands there for the second time; None if there is none."""
    seen = set()
    for each in listed:
        if each in seen:
            return each
        seen.add(each)
    return None
