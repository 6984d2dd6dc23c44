"""Front: the settings of signaling, which faces the public.

What it owns: the tables of signaling's configuration file, and what two of their values cannot say
together.

Rules that stay true:
- Without API keys nobody but this machine may call.

`settings.py` gives these tables their names, and reads the file.
"""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from endpoints import Endpoint
from tables import Cluster, Keys, Table


class SignalingTable(Table, frozen=True):
    """`[signaling]`."""

    listen: Endpoint
    """Where the HTTP API and the demo page are served. Put a TLS terminator in front of it:
    browsers give a microphone only to https and to localhost."""
    relays: Annotated[tuple[Endpoint, ...], Meta(min_length=1, max_length=8)]
    """Public addresses of relays, as clients reach them: they stand in every answer."""
    transceivers: Annotated[tuple[Endpoint, ...], Meta(min_length=1)]
    """Control addresses of the transceivers that calls are placed on."""
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
    ice_server: Annotated[tuple[IceServer, ...], Meta(max_length=8)] = ()
    whip: Whip = Whip()


def agree(found: Signaling) -> None:
    """What no single value shows. Raises ValueError "KEY: REASON"."""
    for number, server in enumerate(found.ice_server):
        if (server.username is None) != (server.credential is None):
            raise ValueError(f"ice_server[{number}]: username and credential go together")
    listen = found.signaling.listen
    if found.signaling.keys_file is None and not listen.address.is_loopback:
        raise ValueError(
            f"signaling.keys_file: without API keys only this machine may call, and {listen} is"
            " no loopback address"
        )
