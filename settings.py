"""Settings: a TOML file to a frozen, validated structure, or one sentence that says what is wrong.

What it owns: every key of every program's configuration file, its default, its range and its
meaning; the files in `config/` show each of them at its default. What several files have in common
stands in `tables.py`, which also reads the files with secrets; signaling's in `front.py`.

Rules that stay true:
- An unknown key, a value of the wrong type or out of its range fails at start, naming the file, the
  key and the reason. Nothing is guessed, nothing is clamped in silence.
- What `load` returns never changes. A reload loads a new one.
- Relative paths are taken from the folder of the file that names them, not from wherever the
  program was started.
- Secrets are read here and appear in no message.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

import front
import tables
from endpoints import Address, Endpoint, Endpoints, ModelUrl, Prefix, RedisUrl
from tables import HeaderName, HeaderValue, Seconds, Table

# What is read elsewhere has its name here: one module for all who ask.
SettingsError = tables.SettingsError
Keys = tables.Keys
Cluster = tables.Cluster
Redis = tables.Redis
SharedRedis = tables.SharedRedis
IceServer = front.IceServer
SignalingTable = front.SignalingTable
Signaling = front.Signaling
Site = front.Site
Steering = front.Steering
clusters = tables.clusters
load_keys = tables.load_keys
load_api_keys = tables.load_api_keys
load_secret = tables.load_secret


class RelayTable(Table, frozen=True):
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
    flows_tentative_max: Annotated[int, Meta(ge=0, le=4_000_000)] = 0
    """Flows whose transceiver has not yet answered with anything but STUN: of clients that connect,
    and of those for whom this relay is the second way in, for as long as their calls last. A
    stranger who has valid ufrags can fill these, never the rest. 0 is half of flows_max."""
    addresses_per_ufrag_max: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Client addresses that may hold a flow for one ufrag, at each worker. A client with several
    interfaces, both families and a changing network needs a handful; a replayed check could use
    thousands."""
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


class Recovery(Table, frozen=True):
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


class Vip(Table, frozen=True):
    """`[vip]`: addresses that this host has only while its relay serves, for a routing daemon that
    announces what it finds on an interface."""

    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=16)]
    """IPv4 and IPv6 addresses, without a prefix length."""
    interface: str = "lo"
    """The interface that carries them: loopback or a dummy one."""


class RelayCluster(Cluster, frozen=True):
    """`[[cluster]]` of a relay."""

    transit: Annotated[tuple[Endpoints, ...], Meta(max_length=16)] = ()
    """Where that cluster's own relays listen for others: `10.5.0.1:3600-3603`, a port for each of
    their workers. Its sessions then go by these; without any, straight to its transceivers."""

    def ways(self) -> list[Endpoint]:
        """All of its transit addresses."""
        return [each for some in self.transit for each in some.each]


class Transit(Table, frozen=True):
    """`[transit]`: what relays of several sites and clusters pass on for one another."""

    listen: Endpoint | None = None
    """Of a cluster's relay: where relays elsewhere send frames for its transceivers. Worker i binds
    this port plus i. Without it, this relay only sends."""
    internal: Endpoint | None = None
    """The same relay's address towards its transceivers, for these frames; worker i binds this port
    plus i. The transceivers' `relay_prefixes` must have it."""
    relay_prefixes: Annotated[tuple[Prefix, ...], Meta(max_length=64)] = ()
    """Where frames may come from: the `relay.internal` addresses of the others. From anywhere else
    they are dropped."""
    tag: bool = False
    """Frames between relays carry a tag under the keys. true: they are dropped without a right one,
    for a backbone on which others can send. Clients at link-local addresses cannot be served by a
    relay that leads to other clusters."""
    timeout_s: Annotated[float, Meta(ge=0.1, le=10)] = 0.5
    """A transit address that is silent for so long is left, and its sessions go by another one. One
    with sessions that is silent is probed five times in it."""


class Relay(Table, frozen=True):
    """The relay's file."""

    relay: RelayTable
    keys: Keys
    cluster: Annotated[tuple[RelayCluster, ...], Meta(min_length=1)]
    transit: Transit = Transit()
    recovery: Recovery = Recovery()
    redis: Redis | None = None
    vip: Vip | None = None


class Backend(Table, frozen=True):
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
    headers: dict[HeaderName, HeaderValue] = msgspec.field(default_factory=dict)
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


class TransceiverTable(Table, frozen=True):
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
    resume_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    """How long the conversation of a call that ended without being hung up can be gone on with in
    another one; with `[redis]` also at another transceiver, should this one die. 0: never."""
    session_s_max: Seconds = 7_200.0
    """No session is longer than this. Clients see it as `expires_at` from the start."""
    notice_s: Annotated[float, Meta(ge=0, le=3_600)] = 60.0
    """How long before that a client is told once more: session.updated with the same."""
    drain_s: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    """After SIGTERM, how long sessions that exist are served before the process ends anyway. 0 ends
    at once. A second SIGTERM, or SIGINT, ends it at any time."""
    receive_buffer_octets: Annotated[int, Meta(ge=65_536, le=1 << 30)] = 4 << 20
    """Kernel buffer of the media socket."""


class Transceiver(Table, frozen=True):
    """The transceiver's file."""

    transceiver: TransceiverTable
    keys: Keys
    cluster: Annotated[tuple[Cluster, ...], Meta(min_length=1, max_length=1)]
    backend: Backend = Backend()
    model: Annotated[tuple[Model, ...], Meta(max_length=64)] = ()
    redis: SharedRedis | None = None


WAYS_MAX = 256
"""Transit addresses of all clusters together: a worker probes each of them ten times a second."""

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
        if kind in (Endpoint, Endpoints, Address, ModelUrl, Prefix, RedisUrl) and isinstance(
            value, str
        ):
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
        front.agree(found)
    if isinstance(found, Relay):
        if found.relay.flows_tentative_max > found.relay.flows_max:
            raise ValueError("relay.flows_tentative_max: larger than relay.flows_max")
        if not found.relay.internal.port:
            raise ValueError("relay.internal: needs a port, so that it is the same after a restart")
        _agree_on_transit(found)


def _agree_on_transit(found: Relay) -> None:
    table = found.transit
    for key in ("internal", "relay_prefixes"):
        if bool(getattr(table, key)) != (table.listen is not None):
            raise ValueError(f"transit.{key}: goes together with transit.listen")
    for at, of in ((table.listen, "listen"), (table.internal, "internal")):
        if at is not None and not at.port:
            raise ValueError(f"transit.{of}: needs a port, so that others can be told of it")
    if table.tag and found.relay.internal.address.is_unspecified:
        raise ValueError("transit.tag: relay.internal has to say which address frames come from")
    families = {at.address.version for at in (table.listen, table.internal) if at}
    if len(families) > 1:
        raise ValueError("transit.internal: frames pass from one family to the same")
    version, ways = found.relay.internal.address.version, 0
    for cluster in found.cluster:
        names = cluster.ways()
        ways += len(names)
        mapped = [getattr(each.address, "ipv4_mapped", None) for each in names]
        if any(mapped):
            raise ValueError(f"cluster {cluster.id}: transit: write IPv4 addresses as such")
        direct_v6 = not cluster.transit and cluster.prefix.network.version == 6
        if direct_v6 and table.internal and table.internal.address.version == 4:
            raise ValueError(f"transit.internal: an IPv4 address cannot reach cluster {cluster.id}")
        if len(set(names)) != len(names):
            raise ValueError(f"cluster {cluster.id}: transit: an address stands there twice")
        if version == 4 and any(each.address.version == 6 for each in names):
            raise ValueError(
                f"cluster {cluster.id}: transit: relay.internal is IPv4 and cannot reach IPv6"
            )
    if ways > WAYS_MAX:
        raise ValueError(f"cluster: {ways} transit addresses are more than {WAYS_MAX}")
    if table.listen and all(cluster.transit for cluster in found.cluster):
        raise ValueError("transit.listen: no cluster here is reached without transit")


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
