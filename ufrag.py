"""The routing hint: an ICE username fragment that names, to those with the key, its transceiver.

A client sends the server's ufrag in the USERNAME of its first STUN check. Earshot makes that ufrag
carry the transceiver's address, encrypted and authenticated, so that a relay routes the first
packet of a session without any look-up, and derives the ICE password from it, so that the relay
checks that packet's MESSAGE-INTEGRITY without any state.

    ufrag = 23 characters, unpadded base64 (the alphabet of ICE, RFC 8839 section 5.4) of 17 octets:

    octet 0      key id (3 bits) | version 0 (5 bits)                 in the clear
    octets 1-16  AES-128-ECB, one block, under K_route[key id]:
                 cluster u16 | host u32 | port u16 | nonce u32 | check u32         big-endian

    ice-pwd = 24 characters: unpadded base64 of HMAC-SHA256(K_pwd[key id], ufrag)[:18]

Rules that stay true:
- `check` is octet 0 and three zero octets: a forged block passes with probability 2^-32.
- `host` is the low 32 bits of an address inside the cluster's configured prefix, the port lies in
  its configured range: a hint can only ever name a transceiver, so a relay is never an open one.
- Each session has one spelling: the two spare bits of the last character must be zero.

One block of AES is a permutation, so ECB is used as such and nothing is ever encrypted beyond it;
the construction is the single pass of draft-ietf-quic-load-balancers section 5.4.1.
https://datatracker.ietf.org/doc/html/draft-ietf-quic-load-balancers

Sans-IO: the nonce is an argument, key text is an argument. The command line at the bottom is not.
"""

import base64
import binascii
import enum
import hmac
import ipaddress
import re
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import typer
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UFRAG_CHARACTERS = 23
"""Length of a hint: 17 octets in unpadded base64. ICE allows 4 to 256 (RFC 8839 section 5.4)."""

PASSWORD_CHARACTERS = 24
"""Length of a password: 18 octets in base64, 144 bits. ICE asks for at least 22 characters."""

KEY_ID_LAST = 6
"""Key ids are 0 to 6; 7 stays free, as QUIC-LB keeps its last configuration id for "none"."""

MASTER_OCTETS = 32
"""A master secret has 256 bits, so that neither derived key is weaker than its algorithm."""

CALL_ID_PREFIX = "rtc_"

SECRET_CHARACTERS = 16
"""At the end of a call's id: 96 random bits. The ufrag before them is in the clear in each STUN
request, and whoever has the id and a key of the same name may listen to the call, or end it. A
page's ephemeral key is such a key, and every visitor has one."""

_BLOCK = struct.Struct(">HIHII")
_TO_URL = str.maketrans("+/", "-_")
_FROM_URL = str.maketrans("-_", "+/")
_SECRET = re.compile(f"[A-Za-z0-9_-]{{{SECRET_CHARACTERS}}}")


class KeyFileError(ValueError):
    """A key file that cannot be used; the message names the line and what is wrong with it."""


class Reject(enum.Enum):
    """Why a ufrag is no hint of ours. Each is a drop reason with its own counter in the relay."""

    MALFORMED = "not 23 characters of canonical base64, or an unknown version"
    UNKNOWN_KEY = "its key id is not in the key file"
    FORGED = "the check octets do not match: forged, mistyped, or minted under another secret"
    UNKNOWN_CLUSTER = "it names a cluster that is not configured"
    OUTSIDE = "it names an address or a port outside its cluster's transceivers"


@dataclass(frozen=True, slots=True)
class Key:
    """One master secret's derived keys."""

    id: int
    """0 to 6, in the clear in the first octet of every ufrag minted with it."""
    route: bytes = field(repr=False)
    """AES-128 key of the routing block, 16 octets."""
    password: bytes = field(repr=False)
    """HMAC-SHA256 key of the ICE password, 32 octets."""
    _encrypt: CipherContext = field(repr=False, compare=False)
    _decrypt: CipherContext = field(repr=False, compare=False)
    sealing: bytes = field(default=b"", repr=False)
    """What sealing.py makes its keys from, 32 octets. No relay uses it."""
    transit: bytes = field(default=b"", repr=False)
    """HMAC-SHA256 key of what relays say to one another (backbone.py), 32 octets."""

    @classmethod
    def derive(cls, key_id: int, master: bytes) -> "Key":
        """The keys of a master secret of 32 octets, by HKDF-SHA256 without salt (RFC 5869)."""

        def hkdf(info: bytes, octets: int) -> bytes:
            return HKDF(algorithm=hashes.SHA256(), length=octets, salt=None, info=info).derive(
                master
            )

        route = hkdf(b"earshot route", 16)
        cipher = Cipher(algorithms.AES(route), modes.ECB())  # one block: see above
        # ECB carries no state from block to block: one context each serves for the process's life.
        return cls(
            key_id,
            route,
            hkdf(b"earshot password", 32),
            cipher.encryptor(),
            cipher.decryptor(),
            hkdf(b"earshot seal", 32),
            hkdf(b"earshot transit", 32),
        )

    def encrypt(self, block: bytes) -> bytes:
        """One block of 16 octets under the routing key."""
        return self._encrypt.update(block)

    def decrypt(self, block: bytes) -> bytes:
        """The inverse of `encrypt`."""
        return self._decrypt.update(block)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys of a key file by id, and the one that new ufrags are minted with."""

    keys: Mapping[int, Key]
    """At least one key."""
    mint_id: int
    """Id of the key to mint with: the file's last line unless a setting names another."""

    @classmethod
    def parse(cls, text: str, mint_id: int | None = None) -> "Keyring":
        """Read a key file: a line is an id 0 to 6, a space, 64 hexadecimal digits; `#` comments.

        Raises KeyFileError naming the line, for a file without a key, and for a `mint_id` that
        the file does not have. The message never quotes a secret.
        """
        keys: dict[int, Key] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise KeyFileError(f"line {number}: expected a key id and 64 hexadecimal digits")
            if words[0] not in map(str, range(KEY_ID_LAST + 1)):
                raise KeyFileError(f"line {number}: the key id is not a number from 0 to 6")
            key_id = int(words[0])
            if key_id in keys:
                raise KeyFileError(f"line {number}: key id {key_id} stands there twice")
            try:
                master = binascii.unhexlify(words[1])
            except ValueError:
                master = b""
            if len(master) != MASTER_OCTETS:
                raise KeyFileError(f"line {number}: the secret is not 64 hexadecimal digits")
            keys[key_id] = Key.derive(key_id, master)
        if not keys:
            raise KeyFileError("there is no key in it")
        if mint_id is not None and mint_id not in keys:
            raise KeyFileError(f"there is no key {mint_id} in it to mint with")
        return cls(keys, next(reversed(keys)) if mint_id is None else mint_id)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a cluster's transceivers live: what a hint can name."""

    id: int
    """0 to 65535."""
    prefix: ipaddress.IPv4Network | ipaddress.IPv6Network
    """Their addresses. An IPv6 prefix is /96 or longer: the hint carries 32 bits."""
    first_port: int
    """Lowest UDP port of a transceiver, inclusive."""
    last_port: int
    """Highest one, inclusive."""

    def __post_init__(self) -> None:
        if not 0 <= self.id <= 0xFFFF:
            raise ValueError(f"cluster id {self.id} is not between 0 and 65535")
        if self.prefix.version == 6 and self.prefix.prefixlen < 96:
            raise ValueError(f"prefix {self.prefix} is shorter than /96: a hint carries 32 bits")
        if not 1 <= self.first_port <= self.last_port <= 0xFFFF:
            raise ValueError(f"ports {self.first_port} to {self.last_port} are no range of ports")

    def address(self, host: int) -> Address:
        """The address that the 32 bits of a hint stand for, inside the prefix or not."""
        if self.prefix.version == 4:
            return ipaddress.IPv4Address(host)
        return ipaddress.IPv6Address(int(self.prefix.network_address) >> 32 << 32 | host)

    def contains(self, address: Address, port: int) -> bool:
        """True if a transceiver of this cluster may be there."""
        return address in self.prefix and self.first_port <= port <= self.last_port


@dataclass(frozen=True, slots=True)
class Hint:
    """What a ufrag says to those with the key."""

    key_id: int
    cluster: int
    address: Address
    """The transceiver's address, inside the cluster's prefix."""
    port: int
    nonce: int
    """32 random bits: they keep two sessions of one transceiver apart."""


def mint(keyring: Keyring, cluster: Cluster, address: Address, port: int, nonce: int) -> str:
    """The ufrag of a session at a transceiver, under the keyring's minting key.

    Raises ValueError if the address or port is outside the cluster: no relay would follow it.
    """
    if not cluster.contains(address, port):
        raise ValueError(
            f"{address} port {port} is outside cluster {cluster.id}"
            f" ({cluster.prefix}, ports {cluster.first_port} to {cluster.last_port})"
        )
    key = keyring.keys[keyring.mint_id]
    first = key.id << 5
    block = _BLOCK.pack(cluster.id, int(address) & 0xFFFFFFFF, port, nonce, first << 24)
    octets = bytes([first]) + key.encrypt(block)
    return base64.b64encode(octets).rstrip(b"=").decode()


def parse(keyring: Keyring, clusters: Mapping[int, Cluster], ufrag: bytes) -> Hint | Reject:
    """Read the local part of a USERNAME. Total: any octets end in a Hint or in a reason."""
    octets = _decode(ufrag)
    if octets is None or octets[0] & 0x1F:
        return Reject.MALFORMED
    key = keyring.keys.get(octets[0] >> 5)
    if key is None:
        return Reject.UNKNOWN_KEY
    cluster_id, host, port, nonce, check = _BLOCK.unpack(key.decrypt(octets[1:]))
    if check != octets[0] << 24:
        return Reject.FORGED
    cluster = clusters.get(cluster_id)
    if cluster is None:
        return Reject.UNKNOWN_CLUSTER
    address = cluster.address(host)
    if not cluster.contains(address, port):
        return Reject.OUTSIDE
    return Hint(key.id, cluster_id, address, port, nonce)


def password(keyring: Keyring, ufrag: str | bytes) -> bytes | None:
    """The ICE password that belongs to a ufrag, 24 ASCII octets; None without its key.

    It is derived from the ufrag as it stands, forged or not: only `parse` says whether the hint
    is ours.
    """
    text = ufrag.encode() if isinstance(ufrag, str) else bytes(ufrag)
    octets = _decode(text)
    key = None if octets is None else keyring.keys.get(octets[0] >> 5)
    if key is None:
        return None
    return base64.b64encode(hmac.digest(key.password, text, "sha256")[:18])


def call_id(ufrag: str, secret: str = "") -> str:
    """The call's id in URLs: the same 17 octets, in the alphabet that URLs leave alone, and
    SECRET_CHARACTERS of it that nobody on the way can know."""
    return CALL_ID_PREFIX + ufrag.translate(_TO_URL) + secret


def from_call_id(text: str) -> str | None:
    """The ufrag inside a call id; None if `text` is not a call id."""
    if not text.startswith(CALL_ID_PREFIX) or not text.isascii():
        return None
    rest = text.removeprefix(CALL_ID_PREFIX)
    hint, secret = rest[:UFRAG_CHARACTERS], rest[UFRAG_CHARACTERS:]
    ufrag = hint.translate(_FROM_URL)
    if "+" in hint or "/" in hint or _decode(ufrag.encode()) is None:
        return None
    return ufrag if not secret or _SECRET.fullmatch(secret) else None


def _decode(ufrag: bytes) -> bytes | None:
    """The 17 octets of a ufrag, None unless it is their one canonical spelling."""
    if len(ufrag) != UFRAG_CHARACTERS:
        return None
    try:
        octets = binascii.a2b_base64(bytes(ufrag) + b"=", strict_mode=True)
    except binascii.Error:
        return None
    # a2b_base64 ignores the two spare bits: the way back shows whether they were zero.
    return octets if base64.b64encode(octets)[:-1] == ufrag else None


# --- the command line -------------------------------------------------------------------------

cli = typer.Typer(
    help="Make keys, and make or read routing hints.", no_args_is_help=True, add_completion=False
)
_KeyFile = Annotated[typer.FileText, typer.Option("--keys", help="The key file.", metavar="FILE")]
_Prefix = Annotated[str, typer.Option(help="Prefix of the cluster's transceivers.")]
_Ports = Annotated[str, typer.Option(help="Their ports, FIRST-LAST.")]
_ClusterId = Annotated[int, typer.Option("--cluster", help="Id of the cluster.")]


@cli.command()
def keygen(
    key_id: Annotated[int, typer.Option("--id", min=0, max=KEY_ID_LAST, help="Key id.")] = 0,
) -> None:
    """Print a new line for a key file. Keep the file readable by its owner only (umask 077)."""
    typer.echo(f"{key_id} {secrets.token_hex(MASTER_OCTETS)}")


@cli.command("mint")
def mint_command(
    keys: _KeyFile,
    transceiver: Annotated[str, typer.Argument(help="ADDRESS:PORT of the transceiver.")],
    cluster: _ClusterId = 1,
    prefix: _Prefix = "127.0.0.0/8",
    ports: _Ports = "1-65535",
    nonce: Annotated[str, typer.Option(help="Eight hexadecimal digits (default: random).")] = "",
) -> None:
    """Print a ufrag for a transceiver and its ICE password."""
    host, _, port = transceiver.rpartition(":")
    try:
        ring = Keyring.parse(keys.read())
        ufrag = mint(
            ring,
            _cluster(cluster, prefix, ports),
            ipaddress.ip_address(host.strip("[]")),
            int(port),
            int(nonce, 16) if nonce else secrets.randbits(32),
        )
    except (ValueError, struct.error) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{ufrag} {(password(ring, ufrag) or b'').decode()}")


@cli.command()
def inspect(
    keys: _KeyFile,
    ufrag: Annotated[str, typer.Argument(help="A ufrag or a call id.")],
    cluster: _ClusterId = 1,
    prefix: _Prefix = "127.0.0.0/8",
    ports: _Ports = "1-65535",
) -> None:
    """Say what a ufrag holds; exit status 1 and the reason if it is none of ours."""
    try:
        ring = Keyring.parse(keys.read())
        home = _cluster(cluster, prefix, ports)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    found = parse(ring, {home.id: home}, (from_call_id(ufrag) or ufrag).encode())
    if isinstance(found, Reject):
        typer.echo(f"{found.name}: {found.value}", err=True)
        raise typer.Exit(1)
    where = f"[{found.address}]" if found.address.version == 6 else str(found.address)
    typer.echo(
        f"key {found.key_id}, cluster {found.cluster},"
        f" transceiver {where}:{found.port}, nonce {found.nonce:08x}"
    )


def _cluster(cluster_id: int, prefix: str, ports: str) -> Cluster:
    first, _, last = ports.partition("-")
    return Cluster(cluster_id, ipaddress.ip_network(prefix), int(first), int(last or first))


if __name__ == "__main__":
    cli()
