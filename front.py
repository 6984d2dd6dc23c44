"""Front: the settings of signaling, which faces the public.

What it owns: the tables of signaling's configuration file, and what two of their values cannot say
together.

Rules that stay true:
- Without API keys nobody but this machine may call.
- Transceivers are named, or there is a Redis in which they announce themselves, or both.

`settings.py` gives these tables their names, and reads the file.
"""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from endpoints import Endpoint, Prefix
from tables import Cluster, HeaderName, Keys, SharedRedis, Table

PerSecond = Annotated[float, Meta(gt=0, le=1_000_000)]


class SignalingTable(Table, frozen=True):
    """`[signaling]`."""

    listen: Endpoint
    """Where the HTTP API and the demo page are served. With TLS, here or at a proxy in front of it:
    browsers give a microphone only to https and to localhost."""
    relays: Annotated[tuple[Endpoint, ...], Meta(min_length=1, max_length=8)]
    """Public addresses of relays, as clients reach them: they stand in every answer."""
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


class Signaling(Table, frozen=True):
    """Signaling's file."""

    signaling: SignalingTable
    keys: Keys
    cluster: Annotated[tuple[Cluster, ...], Meta(min_length=1)]
    redis: SharedRedis | None = None
    ice_server: Annotated[tuple[IceServer, ...], Meta(max_length=8)] = ()
    whip: Whip = Whip()
    limits: Limits | None = None


def agree(found: Signaling) -> None:
    """What no single value shows. Raises ValueError "KEY: REASON"."""
    for number, server in enumerate(found.ice_server):
        if (server.username is None) != (server.credential is None):
            raise ValueError(f"ice_server[{number}]: username and credential go together")
    if not found.signaling.transceivers and found.redis is None:
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
