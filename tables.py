"""Tables: what the configuration files of several programs have in common.

What it owns: the base of every table, the tables that stand in more than one file, and the reading
of files with secrets, since those, too, are the operator's, with rules about what may stand in them
and who may read them.

Rules that stay true:
- Secrets are read here and appear in no message.
- A table is frozen and knows no key but its own.

`settings.py` gives all of this its name: the rest of the tree asks there.
"""

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

import keys
import ufrag
from endpoints import Prefix, RedisUrl


class SettingsError(ValueError):
    """A configuration that cannot be used: the message names file, key and reason."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a configuration file."""


Port = Annotated[int, Meta(ge=1, le=0xFFFF)]
HeaderName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9-]{1,64}\Z")]
HeaderValue = Annotated[str, Meta(pattern=r"\A[ -~]{0,512}\Z")]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400 * 7)]


class Keys(Table, frozen=True):
    """`[keys]`: where the secrets are."""

    file: Path
    """The key file, readable by its owner only. `ufrag keygen` prints a line for it."""
    mint_id: Annotated[int, Meta(ge=0, le=ufrag.KEY_ID_LAST)] | None = None
    """Id of the key that a transceiver mints with. Default: the file's last line. Set it while a
    new key is on its way to the relays: they must have it before the first ufrag minted with it."""

    def load(self) -> ufrag.Keyring:
        """The keys; raises SettingsError naming the file and what is wrong with it."""
        return load_keys(self.file, self.mint_id)


class Cluster(Table, frozen=True):
    """`[[cluster]]`: what a hint may name. A relay forwards to nothing else."""

    id: Annotated[int, Meta(ge=0, le=0xFFFF)]
    """Its number in the hint; the same in the files of its relays, transceivers and signaling."""
    prefix: Prefix
    """Addresses of its transceivers. IPv6: /96 or longer, since a hint carries 32 bits."""
    ports: tuple[Port, Port]
    """Lowest and highest port of a transceiver."""

    def __post_init__(self) -> None:
        self.hints()

    def hints(self) -> ufrag.Cluster:
        """The same as minting and parsing take it. Raises ValueError with the reason."""
        return ufrag.Cluster(self.id, self.prefix.network, *self.ports)


class SharedRedis(Table, frozen=True):
    """`[redis]` of transceivers and signaling: where transceivers announce themselves, so that
    signaling needs no list of them, and where the records of conversations outlive them."""

    url: RedisUrl
    """`redis://[user:password@]host:port/db`, `unix:///path?db=0`,
    `redis+sentinel://host:port,host:port/service/db` (Sentinels are asked without a password),
    `redis+cluster://host:port,host:port`; with `rediss` in place of `redis` over TLS."""
    timeout_s: Annotated[float, Meta(gt=0, le=10)] = 0.25
    """How long anything asked of it may take. Media that waits longer is worth nothing."""


class Redis(SharedRedis, frozen=True):
    """`[redis]` of a relay: flows that outlive the relay that knows them. Without this table its
    clients wait for their own next STUN after their relay was lost."""

    ttl_s: Seconds = 300.0
    """A flow is forgotten there this long after its relay last confirmed it (every third of it)."""


def clusters(tables: tuple[Cluster, ...]) -> dict[int, ufrag.Cluster]:
    """The configured clusters by id, as `ufrag.parse` takes them."""
    return {table.id: table.hints() for table in tables}


def load_keys(path: Path, mint_id: int | None = None) -> ufrag.Keyring:
    """Read a key file. Raises SettingsError, also if others than its owner may read it."""
    try:
        return ufrag.Keyring.parse(read_private(path), mint_id)
    except ufrag.KeyFileError as error:
        raise SettingsError(f"{path}: {error}") from error


def load_api_keys(path: Path, keyring: ufrag.Keyring) -> keys.Keys:
    """Read the file of API keys. Raises SettingsError like `load_keys`."""
    try:
        return keys.Keys.parse(read_private(path), keyring)
    except keys.KeysError as error:
        raise SettingsError(f"{path}: {error}") from error


def load_secret(path: Path) -> str:
    """A key that is sent as it is, such as a model server's: the one line of its file.

    Raises SettingsError like `load_keys`, and for what no header can carry.
    """
    secret = read_private(path).strip()
    if not (secret.isascii() and secret.isprintable() and " " not in secret and secret):
        raise SettingsError(f"{path}: expected one line with the key and nothing else")
    return secret


def read_private(path: Path) -> str:
    """The text of a file that its owner alone may read. Raises SettingsError."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise SettingsError(
                    f"{path}: mode {mode:04o} lets others than its owner read the keys: chmod 600"
                )
            return file.read()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: {error}") from error
