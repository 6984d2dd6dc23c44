"""Settings: a TOML file to a frozen, validated structure, or one sentence that says what is wrong.

What it owns: every key of every program's configuration file, its default, its range and its
meaning; the files in `config/` show each of them at its default. It also reads the key file, since
that, too, is a file of the operator's with rules about what may stand in it.

Rules that stay true:
- An unknown key, a value of the wrong type or out of its range fails at start, naming the file, the
  key and the reason. Nothing is guessed, nothing is clamped in silence.
- What `load` returns never changes. A reload loads a new one.
- Relative paths are taken from the folder of the file that names them, not from wherever the
  program was started.
- Secrets are read here and appear in no message.
"""

import os
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

import keys
import ufrag
from endpoints import Address, Endpoint, ModelUrl, Prefix, RedisUrl


class SettingsError(ValueError):
    """A configuration that cannot be used: the message names file, key and reason."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a configuration file."""


Port = Annotated[int, Meta(ge=1, le=0xFFFF)]
HeaderName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9-]{1,64}\Z")]
HeaderValue = Annotated[str, Meta(pattern=r"\A[ -~]{0,512}\Z")]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400 * 7)]


class Keys(_Table, frozen=True):
    """`[keys]`: where the secrets are."""

    file: Path
    """The key file, readable by its owner only. `ufrag keygen` prints a line for it."""
    mint_id: Annotated[int, Meta(ge=0, le=ufrag.KEY_ID_LAST)] | None = None
    """Id of the key that a transceiver mints with. Default: the file's last line. Set it while a
    new key is on its way to the relays: they must have it before the first ufrag minted with it."""

    def load(self) -> ufrag.Keyring:
        """The keys; raises SettingsError naming the file and what is wrong with it."""
        return load_keys(self.file, self.mint_id)


class Cluster(_Table, frozen=True):
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


class RelayTable(_Table, frozen=True):
    """`[relay]`."""

    public: Endpoint
    """Where clients send: one address, shared by all workers (SO_REUSEPORT)."""
    internal: Endpoint
    """Where transceivers answer: worker i binds this port plus i, and keeps it over restarts."""
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    """Worker processes; 0 is one for every CPU that the process may use."""
    batch_size: Annotated[int, Meta(ge=1, le=256)] = 256
    """Datagrams taken from a socket at once. Where that many wait, 64 at once cost a tenth more CPU
    each; the last of a batch waits for the first, half a millisecond then. Fewer change nothing."""
    datagram_octets_max: Annotated[int, Meta(ge=576, le=9000)] = 1500
    """Largest datagram that is forwarded. Nearly all of WebRTC stays under 1,200."""
    flows_max: Annotated[int, Meta(ge=1, le=4_000_000)] = 65_536
    """Flows in total, over all workers: 128 octets of shared memory each."""
    flows_tentative_max: Annotated[int, Meta(ge=1, le=4_000_000)] = 8_192
    """Flows whose transceiver has not yet answered with anything but STUN. A stranger who has a
    valid ufrag can fill these, never the rest."""
    addresses_per_ufrag_max: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Client addresses that may hold a flow for one ufrag. A client with several interfaces, both
    families and a changing network needs a handful; a replayed check could use thousands."""
    integrity_checks_per_s: Annotated[int, Meta(ge=1, le=1_000_000)] = 20_000
    """First packets whose integrity a worker checks in a second, about 20 us each."""
    flow_idle_s: Seconds = 60.0
    """A flow that no client packet has used for this long is forgotten; up to twice as long in
    practice. Browsers check consent every 5 s at the most (RFC 7675), so 30 is the least."""
    tentative_idle_s: Seconds = 15.0
    """The same for tentative flows: as long as a client tries to connect."""
    coalesce_us: Annotated[int, Meta(ge=0, le=5_000)] = 0
    """Microseconds to wait before each receive, so that datagrams come in batches: less CPU at
    medium load for as much more delay each way. 0 is off."""
    receive_buffer_octets: Annotated[int, Meta(ge=65_536, le=1 << 30)] = 8 << 20
    """Kernel buffer of a socket: what a burst or a restarting worker may leave waiting."""
    state_dir: Path = Path("/run/earshot")
    """Where the running relay says how `relay flows` finds it."""
    drain_s: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    """After SIGTERM, how long flows that exist are served before the relay ends anyway. 0 ends at
    once. A second SIGTERM, or SIGINT, ends it at any time."""
    metrics: Endpoint = Endpoint("127.0.0.1:9464")
    """Where /metrics, /healthz and /readyz are served. Port 0 is any that is free; the log names
    it. Let nobody but the monitoring reach it."""


class Recovery(_Table, frozen=True):
    """`[recovery]`: media from an address that has no flow waits while the relay finds out whose it
    is: by the SSRC of a flow that it knows, or in Redis. These keys may also stand in `[redis]`,
    where they were before."""

    lookups_per_s: Annotated[int, Meta(ge=1, le=1_000_000)] = 2_000
    """Clients that a worker asks about in a second: whoever sends garbage chooses to ask."""
    waiting_max: Annotated[int, Meta(ge=1, le=65_536)] = 1_024
    """Datagrams that wait in a worker for an answer; each takes a datagram's room."""
    wait_s: Annotated[float, Meta(gt=0, le=10)] = 0.5
    """How long a datagram waits for an answer before it is dropped."""
    unknown_s: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    """How long nothing more is asked about a client that nobody knows."""
    unknown_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 16_384
    """How many such clients a worker remembers."""


class Redis(_Table, frozen=True):
    """`[redis]`: flows that outlive the relay that knows them. Without this table a relay's
    clients wait for their own next STUN after their relay was lost."""

    url: RedisUrl
    """`redis://[user:password@]host:port/db`, `unix:///path?db=0`,
    `redis+sentinel://host:port,host:port/service/db` (Sentinels are asked without a password),
    `redis+cluster://host:port,host:port`; with `rediss` in place of `redis` over TLS."""
    ttl_s: Seconds = 300.0
    """A flow is forgotten there this long after its relay last confirmed it (every third of it)."""
    timeout_s: Annotated[float, Meta(gt=0, le=10)] = 0.25
    """How long a look-up may take. Media that waits longer is worth nothing."""


class Vip(_Table, frozen=True):
    """`[vip]`: addresses that this host has only while its relay serves, for a routing daemon that
    announces what it finds on an interface."""

    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=16)]
    """IPv4 and IPv6 addresses, without a prefix length."""
    interface: str = "lo"
    """The interface that carries them: loopback or a dummy one."""


class Relay(_Table, frozen=True):
    """The relay's file."""

    relay: RelayTable
    keys: Keys
    cluster: Annotated[tuple[Cluster, ...], Meta(min_length=1)]
    recovery: Recovery = Recovery()
    redis: Redis | None = None
    vip: Vip | None = None


class Backend(_Table, frozen=True):
    """`[backend]`: who answers the caller. The keys below `kind` are those of `realtime`."""

    kind: Literal["parrot", "realtime"] = "parrot"
    """`parrot`: the built-in one, which plays back what it heard. `realtime`: a model server that
    speaks the Realtime API over WebSocket."""
    url: ModelUrl | None = None
    """`wss://host/v1/realtime`, or `ws://` where nobody else can listen."""
    model: str = ""
    """Which of the server's models: `?model=` of the address. Empty names none."""
    key_file: Path | None = None
    """A file with the server's key, readable by its owner only: sent as `Authorization: Bearer`."""
    ca_file: Path | None = None
    """Certificates (PEM) to trust in place of the system's: a server of one's own."""
    headers: dict[HeaderName, HeaderValue] = {}
    """What else the server wants to be told when a connection opens. Keys belong in `key_file`."""
    dialect: Literal["auto", "ga", "beta"] = "auto"
    """Names of events and fields: today's (`ga`), the older ones, or as the server's first event
    shows."""
    rate_hz: Literal[16_000, 24_000] = 24_000
    """Of the audio, both ways. 24 kHz is the API's; some open servers take 16."""
    connect_timeout_s: Annotated[float, Meta(gt=0, le=60)] = 3.0
    """How long a connection may take to open."""
    answer_timeout_s: Annotated[float, Meta(gt=0, le=60)] = 5.0
    """How long a server may then take to begin its session."""
    retry_s: Annotated[float, Meta(ge=0, le=600)] = 30.0
    """How long a server that is away is tried again before its calls end."""
    heartbeat_s: Annotated[float, Meta(ge=1, le=60)] = 10.0
    """After so long without a word the server is asked whether it lives; it has half of that to
    answer. Servers that do nothing else while they think need more."""
    message_octets_max: Annotated[int, Meta(ge=65_536, le=64 << 20)] = 4 << 20
    """Largest message from the server: 65 s of audio at 24 kHz, for which other calls wait 5 ms."""


class Model(Backend, frozen=True, kw_only=True):
    """`[[model]]`: a backend for the sessions that ask for a model by this name."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    """The `model` of a session, or of the offer's query. Others get `[backend]`."""


class TransceiverTable(_Table, frozen=True):
    """`[transceiver]`."""

    listen: Endpoint
    """UDP for media and TCP for the control API. The address must lie in the cluster's prefix: it
    is what the hint names."""
    relay_prefixes: Annotated[tuple[Prefix, ...], Meta(min_length=1)]
    """Where relays send from. Frames from anywhere else are dropped."""
    control_prefixes: Annotated[tuple[Prefix, ...], Meta(min_length=1)]
    """Where signaling calls from. Requests from anywhere else get 403."""
    sessions_max: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """Sessions this process takes before it answers 503. A core carries half as many again, with
    nothing to spare for bursts."""
    connecting_max: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Sessions that may be connecting at once; the next ones get 503. Each takes 5 ms of CPU, while
    the others' audio waits: 16 at once make single frames 20 ms late, 32 make them 50, 64 100."""
    load_max: Annotated[float, Meta(ge=0.05, le=100)] = 0.9
    """Share of one CPU that this process may use, smoothed over seconds, before it answers 503. All
    its work is in one thread: at 1 audio comes late. 100 turns it off."""
    lag_s_max: Annotated[float, Meta(ge=0.001, le=100)] = 0.02
    """The same for how late the event loop is, which also shows that others have the CPU. A frame
    of audio is 20 ms. 100 turns it off."""
    connect_deadline_s: Seconds = 15.0
    """A session that has not connected by then ends."""
    silence_deadline_s: Seconds = 30.0
    """A client not heard of for this long has gone (RFC 7675 consent ends after 30 s)."""
    session_s_max: Seconds = 7_200.0
    """No session is longer than this. Clients see it as `expires_at` from the start."""
    notice_s: Annotated[float, Meta(ge=0, le=3_600)] = 60.0
    """How long before that a client is told once more: session.updated with the same."""
    drain_s: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    """After SIGTERM, how long sessions that exist are served before the process ends anyway. 0 ends
    at once. A second SIGTERM, or SIGINT, ends it at any time."""
    receive_buffer_octets: Annotated[int, Meta(ge=65_536, le=1 << 30)] = 4 << 20
    """Kernel buffer of the media socket."""


class Transceiver(_Table, frozen=True):
    """The transceiver's file."""

    transceiver: TransceiverTable
    keys: Keys
    cluster: Annotated[tuple[Cluster, ...], Meta(min_length=1, max_length=1)]
    backend: Backend = Backend()
    model: Annotated[tuple[Model, ...], Meta(max_length=64)] = ()


class SignalingTable(_Table, frozen=True):
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
    web_dir: Path | None = None
    """Folder of the demo page; without it no page is served."""


class IceServer(_Table, frozen=True):
    """`[[ice_server]]`: a STUN or TURN server for clients behind networks that let nothing else
    through. They are told of it with the answer; the relay itself needs none."""

    url: Annotated[str, Meta(pattern=r"\A(stuns?|turns?):[!-;=?-~]{1,512}\Z")]
    """`stun:host:port` or `turn:host:port?transport=tcp`."""
    username: Annotated[str, Meta(pattern=r"\A[ -~]{1,512}\Z")] | None = None
    """For TURN. Every client that may call learns both."""
    credential: Annotated[str, Meta(pattern=r"\A[ -~]{1,512}\Z")] | None = None


class Whip(_Table, frozen=True):
    """`[whip]`."""

    elsewhere: Annotated[str, Meta(pattern=r"\Ahttps?://[!-\"$-~]{1,512}\Z")] | None = None
    """The WHIP endpoint of another cluster, `https://host/whip`: where encoders are sent (307)."""
    elsewhere_when: Literal["full", "always"] = "full"
    """`full`: when no transceiver here takes the call. `always`: at once."""


class Signaling(_Table, frozen=True):
    """Signaling's file."""

    signaling: SignalingTable
    keys: Keys
    cluster: Annotated[tuple[Cluster, ...], Meta(min_length=1)]
    ice_server: Annotated[tuple[IceServer, ...], Meta(max_length=8)] = ()
    whip: Whip = Whip()


File = TypeVar("File", Relay, Transceiver, Signaling)


def load(path: Path | str, shape: type[File]) -> File:
    """Read a configuration file as `shape`.

    Raises SettingsError "FILE: KEY: REASON" if it cannot be read, is not TOML, has an unknown key
    or a value out of its range, or if two of its values contradict each other.
    """
    path = Path(path)

    def convert(kind: type, value: Any) -> Any:
        if kind is Path and isinstance(value, str) and value:
            return path.parent / value
        if kind in (Endpoint, Address, ModelUrl, Prefix, RedisUrl) and isinstance(value, str):
            return kind(value)
        raise ValueError(f"expected text, got {value!r}")

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        if shape is Relay:
            _move(tables)
        found = msgspec.convert(tables, shape, dec_hook=convert)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    except msgspec.ValidationError as error:
        # msgspec says "REASON - at `$.table.key`": put the key in front, as operators read it.
        reason, _, where = str(error).partition(" - at `$")
        key = where.strip("`.") or "the file"
        raise SettingsError(f"{path}: {key}: {reason}") from error
    try:
        _agree(found)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    return found


def _move(tables: dict[str, Any]) -> None:
    """Keys of [recovery] that stand in [redis], as they did in files of relays before."""
    redis, recovery = tables.get("redis"), tables.setdefault("recovery", {})
    if isinstance(redis, dict) and isinstance(recovery, dict):
        for key in [key for key in Recovery.__struct_fields__ if key in redis]:
            if key in recovery:
                raise msgspec.ValidationError(f"it stands in [recovery], too - at `$.redis.{key}`")
            recovery[key] = redis.pop(key)


def _agree(found: Relay | Transceiver | Signaling) -> None:
    """What no single value shows. Raises ValueError "KEY: REASON"."""
    ids = [cluster.id for cluster in found.cluster]
    if len(set(ids)) != len(ids):
        raise ValueError("cluster: an id stands there twice")
    if isinstance(found, Transceiver):
        at, home = found.transceiver.listen, found.cluster[0].hints()
        if not home.contains(at.address, at.port):
            raise ValueError(
                f"transceiver.listen: {at} is outside its cluster ({home.prefix},"
                f" ports {home.first_port} to {home.last_port}): no relay would find it"
            )
        _agree_on_models(found)
    if isinstance(found, Signaling):
        for number, server in enumerate(found.ice_server):
            if (server.username is None) != (server.credential is None):
                raise ValueError(f"ice_server[{number}]: username and credential go together")
    if isinstance(found, Signaling):
        listen = found.signaling.listen
        if found.signaling.keys_file is None and not listen.address.is_loopback:
            raise ValueError(
                f"signaling.keys_file: without API keys only this machine may call, and {listen} is"
                " no loopback address"
            )
    if isinstance(found, Relay):
        if found.relay.flows_tentative_max > found.relay.flows_max:
            raise ValueError("relay.flows_tentative_max: larger than relay.flows_max")
        if not found.relay.internal.port:
            raise ValueError("relay.internal: needs a port, so that it is the same after a restart")


def _agree_on_models(found: Transceiver) -> None:
    names = [model.name for model in found.model]
    if len(set(names)) != len(names):
        raise ValueError("model: a name stands there twice")
    tables: list[tuple[str, Backend]] = [("backend", found.backend)]
    tables += [(f"model[{number}]", model) for number, model in enumerate(found.model)]
    for where, table in tables:
        if table.kind == "realtime" and table.url is None:
            raise ValueError(f'{where}.url: kind "realtime" needs the server\'s address')
        if table.kind == "parrot" and table.url is not None:
            raise ValueError(f'{where}.url: kind "parrot" has none; "realtime" is meant?')
        if table.ca_file is not None and not (table.url is not None and table.url.tls):
            raise ValueError(f"{where}.ca_file: nothing is trusted by ws://; wss:// is meant?")
        if any(name.lower() == "authorization" for name in table.headers):
            raise ValueError(f"{where}.headers: a key belongs in key_file, not here")


def clusters(tables: tuple[Cluster, ...]) -> dict[int, ufrag.Cluster]:
    """The configured clusters by id, as `ufrag.parse` takes them."""
    return {table.id: table.hints() for table in tables}


def load_keys(path: Path, mint_id: int | None = None) -> ufrag.Keyring:
    """Read a key file. Raises SettingsError, also if others than its owner may read it."""
    try:
        return ufrag.Keyring.parse(_read_private(path), mint_id)
    except ufrag.KeyFileError as error:
        raise SettingsError(f"{path}: {error}") from error


def load_api_keys(path: Path, keyring: ufrag.Keyring) -> keys.Keys:
    """Read the file of API keys. Raises SettingsError like `load_keys`."""
    try:
        return keys.Keys.parse(_read_private(path), keyring)
    except keys.KeysError as error:
        raise SettingsError(f"{path}: {error}") from error


def load_secret(path: Path) -> str:
    """A key that is sent as it is, such as a model server's: the one line of its file.

    Raises SettingsError like `load_keys`, and for what no header can carry.
    """
    secret = _read_private(path).strip()
    if not (secret.isascii() and secret.isprintable() and " " not in secret and secret):
        raise SettingsError(f"{path}: expected one line with the key and nothing else")
    return secret


def _read_private(path: Path) -> str:
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
