"""Datagrams for load tools: what clients send first, minted and signed as a transceiver would.

    flood.py first --clients 1000 --host 127.0.0.1 --port 9000 --out first.bin

writes one record a client: a big-endian 16-bit length and that many octets, a STUN Binding Request
whose ufrag names the transceiver at --host and --port. A relay that has the same key forwards it,
and all that the client sends afterwards.

Everything about the relay comes from its configuration (default: config/bench.toml of this
checkout). A key file that is not there is made, readable by its owner only; one that is there is
never changed.
"""

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

import endpoints
import settings
import stun
import ufrag

CONFIG = Path(__file__).resolve().parent.parent / "config" / "bench.toml"

CLIENTS_MAX = 1_000_000
"""A client each of 127.0.0.0/8 would be 16 million; a file of a million has 130 MB."""

cli = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@cli.callback()
def _main() -> None:
    """Datagrams for load tools."""


@cli.command()
def first(
    clients: Annotated[int, typer.Option(min=1, max=CLIENTS_MAX, help="How many.")],
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")],
    host: Annotated[str, typer.Option(help="Address of the transceiver.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 9000,
    config: Annotated[Path, typer.Option(help="The relay's configuration.")] = CONFIG,
    keys: Annotated[
        Path | None, typer.Option(help="The key file (default: the configuration's).")
    ] = None,
    cluster: Annotated[
        int | None, typer.Option(help="Id of the cluster (default: the configuration's first).")
    ] = None,
) -> None:
    """Write the first datagram of each client."""
    try:
        found = settings.load(config, settings.Relay)
        path = keys or found.keys.file
        make_keys(path)
        keyring = settings.load_keys(path, found.keys.mint_id)
        homes = settings.clusters(found.cluster)
        home = homes[found.cluster[0].id if cluster is None else cluster]
        at = endpoints.Endpoint(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        records = [record(check(keyring, home, at.address, port)) for _ in range(clients)]
    except KeyError:
        raise typer.BadParameter(f"{config} has no cluster {cluster}") from None
    except ValueError as error:  # settings' and ufrag's sentences
        raise typer.BadParameter(str(error)) from error
    out.write_bytes(b"".join(records))


def make_keys(path: Path) -> None:
    """A key file with one new key, unless there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(fd, "w", encoding="ascii") as file:
        file.write(f"0 {secrets.token_hex(ufrag.MASTER_OCTETS)}\n")


def check(keyring: ufrag.Keyring, home: ufrag.Cluster, address: ufrag.Address, port: int) -> bytes:
    """The first check of a client of a new session at that transceiver."""
    hint = ufrag.mint(keyring, home, address, port, secrets.randbits(32))
    password = ufrag.password(keyring, hint)
    assert password is not None  # the keyring minted it
    return stun.request(secrets.token_bytes(12), f"{hint}:load", password)


def record(datagram: bytes) -> bytes:
    """One datagram as load tools read it."""
    return len(datagram).to_bytes(2, "big") + datagram


if __name__ == "__main__":
    cli()
