"""First datagrams of clients: minted and signed as a transceiver would, for tools that make load.

Everything about the relay comes from its configuration (default: config/bench.toml of this
checkout). A key file that is not there is made, readable by its owner only; one that is there is
never changed.
"""

import os
import secrets
from pathlib import Path

import settings
import stun
import ufrag

CONFIG = Path(__file__).resolve().parent.parent / "config" / "bench.toml"


def make_keys(path: Path) -> None:
    """A key file with one new key, unless there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(fd, "w", encoding="ascii") as file:
        file.write(f"0 {secrets.token_hex(ufrag.MASTER_OCTETS)}\n")


def home(found: settings.Relay, cluster: int | None = None) -> ufrag.Cluster:
    """A cluster of a relay's configuration, by default its first. Raises ValueError."""
    homes = settings.clusters(found.cluster)
    number = found.cluster[0].id if cluster is None else cluster
    if number not in homes:
        raise ValueError(f"the configuration has no cluster {number}")
    return homes[number]


def check(keyring: ufrag.Keyring, at: ufrag.Cluster, address: ufrag.Address, port: int) -> bytes:
    """The first check of a client of a new session at that transceiver. Raises ValueError."""
    hint = ufrag.mint(keyring, at, address, port, secrets.randbits(32))
    password = ufrag.password(keyring, hint)
    assert password is not None  # the keyring minted it
    return stun.request(secrets.token_bytes(12), f"{hint}:load", password)


def record(datagram: bytes) -> bytes:
    """One datagram as load tools read it: a big-endian 16-bit length, and so many octets."""
    return len(datagram).to_bytes(2, "big") + datagram
