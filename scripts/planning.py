"""The plan of a simulated world: sites, relays, clusters, and where steering puts each caller.

What it owns: how many relays and transceivers the made-up operator has, the ways of a datagram that
are not the product's (a router's ECMP, the kernel's SO_REUSEPORT, both as hashes), and the waves in
which callers arrive and steering.Steering decides about them, by the load that it has heard of.

Everything is drawn from the seed: the same plan each time, however many processes work on it.
"""

import gc
import ipaddress
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypeVar

import fleet
import globe
import numpy as np
import numpy.typing as npt
from globe import Callers

import backbone
import flows
import frame
import handover
import recovery
import settings
import steering
import ufrag
from endpoints import Endpoint

Ints = npt.NDArray[np.int64]

ARRIVE_S = 300.0
"""The sessions arrive evenly over this time. In a steady state (Little's law) that is the rate of
new calls if a call lasts five minutes in the mean."""

WAVES = 100
"""So many times meanwhile steering hears of the load anew: every 3 s."""

BEGIN = 1_000.0
"""When simulated time begins: a monotonic clock has never been at zero."""

PIECES = 2
"""Of a wave, for as many processes."""

HEADROOM = 1.35
"""Capacity of a site over what comes to it while nothing is loaded."""

HOSTS_MIN = 2
"""Relay hosts at a site, so that one may fail."""

PORTS = 100
"""Transceivers on a host, one a port (config/relay.toml has 9000 to 9099)."""

TRANSIT_PORT = 3600


@dataclass(frozen=True)
class Shape:
    """How large things are."""

    sessions: int
    workers: int
    """Of a relay host, one a CPU."""
    sessions_a_worker: int
    """What one is planned to carry: machines.py has it from measured figures."""
    sessions_a_transceiver: int
    relay: settings.RelayTable
    searching: settings.Recovery
    transit: settings.Transit
    redis: settings.Redis
    seed: int

    @property
    def limits(self) -> flows.Limits:
        """One worker's, by the product's own arithmetic."""
        return handover.limits(self.relay)

    @property
    def waiting(self) -> recovery.Limits:
        """The same of what waits."""
        found = self.searching
        return recovery.Limits(
            waiting=found.waiting_max,
            wait_s=found.wait_s,
            lookups_per_s=found.lookups_per_s,
            unknown=found.unknown_max,
            unknown_s=found.unknown_s,
        )


@dataclass
class Tier:
    """Relays that belong together, with one flow table a worker in shared memory."""

    hosts: list[int]
    """Of each site or cluster."""
    workers: int
    octets: int
    """Of a table."""
    memory: mmap.mmap = field(init=False)
    first: list[int] = field(init=False)
    """Number of the first worker of each site or cluster."""

    def __post_init__(self) -> None:
        counts = np.array(self.hosts) * self.workers
        self.first = [0, *np.cumsum(counts).tolist()]
        self.memory = mmap.mmap(-1, self.octets * self.first[-1])

    def of(self, at: int) -> range:
        """The workers of a site or cluster, in the order of its hosts."""
        return range(self.first[at], self.first[at + 1])

    def table(self, worker: int) -> memoryview:
        """A worker's flow table: the memory itself."""
        return memoryview(self.memory)[worker * self.octets : (worker + 1) * self.octets]

    def copy(self, worker: int) -> memoryview:
        """The same as it is now: what is done to it is forgotten."""
        return memoryview(bytearray(self.table(worker)))

    def of_client(self, hashed: npt.NDArray[np.uint64], at: int, salt: int = 0) -> Ints:
        """The workers that the clients of one site come to: a router spreads them over hosts by
        hash modulo, each host's kernel over workers by reciprocal_scale (sock_reuseport.c)."""
        router = _mixed(hashed, 2 * (at + 1_000 * salt))
        kernel = _mixed(hashed, 2 * (at + 1_000 * salt) + 1)
        host = (router % np.uint64(self.hosts[at])).astype(np.int64)
        scaled = ((kernel >> np.uint64(32)) * np.uint64(self.workers)) >> np.uint64(32)
        return self.first[at] + host * self.workers + scaled.astype(np.int64)


def _mixed(hashed: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.uint64]:
    """A hash with a seed of its own (the finalizer of SplitMix64)."""
    mixed = hashed + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass
class Plan:
    """The world, and where everybody is in it."""

    shape: Shape
    callers: Callers
    keyring: ufrag.Keyring
    clusters: dict[int, ufrag.Cluster]
    transceivers: dict[int, list[tuple[ufrag.Address, int]]]
    sites: list[str]
    steering: steering.Steering
    edges: Tier
    relays: Tier
    """Of the clusters, in the order of `clusters`."""
    groups: dict[int, list[bytes]]
    """Transit addresses of each cluster."""
    hashed: npt.NDArray[np.uint64]
    """Of each caller's address and port."""
    arrived: globe.Floats
    first: Ints
    """Site where each caller enters, and the one beside it."""
    second: Ints
    cluster: Ints
    transceiver: Ints
    """Number among its cluster's."""
    nonce: npt.NDArray[np.uint32]
    way: Ints
    """Number of the transit address that its entrance chose, among its cluster's; shared by all
    processes. -1 before."""
    trips: dict[str, globe.Floats] = field(default_factory=dict)
    """First hops in milliseconds, for plots."""

    def text(self, caller: int, keyring: ufrag.Keyring | None = None) -> str:
        """The caller's ufrag, minted as its transceiver does."""
        cluster = int(self.cluster[caller])
        address, port = self.transceivers[cluster][self.transceiver[caller]]
        nonce = int(self.nonce[caller])
        return ufrag.mint(keyring or self.keyring, self.clusters[cluster], address, port, nonce)

    def worker(
        self, tier: Tier, number: int, now: float, *, live: bool = False, **more: Any
    ) -> fleet.Worker:
        """A worker over its table as it stands: over the memory itself (`live`), or a copy."""
        table = more.get("table") or (tier.table(number) if live else tier.copy(number))
        return fleet.Worker(
            table,
            more.get("keyring", self.keyring),
            more.get("clusters", self.clusters),
            more.get("limits", self.shape.limits),
            self.shape.relay.integrity_checks_per_s,
            now,
            more.get("ways"),
        )

    def ways(self, now: float, only: int | None = None) -> backbone.Backbone:
        """An entrance's ways to all clusters, or to one."""
        groups = {only: self.groups[only]} if only else self.groups
        return backbone.Backbone(groups, self.shape.transit.timeout_s, now)

    def internal(self, number: int) -> tuple[str, int]:
        """Where an entrance's worker speaks to clusters from."""
        host, worker = divmod(number, self.edges.workers)
        return str(ipaddress.ip_address("10.100.0.1") + host), 3500 + worker

    def entrances(self, who: Ints, sites: Ints) -> Ints:
        """The entrance's worker that each of these callers comes to at its site."""
        found = np.empty(len(who), dtype=np.int64)
        for at in np.unique(sites):
            here = sites == at
            found[here] = self.edges.of_client(self.hashed[who[here]], int(at))
        return found

    def capacity(self, at: int) -> int:
        """Sessions that a site is planned for."""
        return len(self.edges.of(at)) * self.shape.sessions_a_worker


def keyring(seed: int, ids: Sequence[int], mint_id: int) -> ufrag.Keyring:
    """Keys that belong to a seed."""
    chance = np.random.default_rng([seed, 99])
    masters = [chance.bytes(ufrag.MASTER_OCTETS).hex() for _ in range(ufrag.KEY_ID_LAST + 1)]
    return ufrag.Keyring.parse("\n".join(f"{each} {masters[each]}" for each in ids), mint_id)


def draw(shape: Shape) -> Plan:
    """The callers, and an operator that is made for them."""
    chance = np.random.default_rng(shape.seed)
    callers = globe.draw(shape.sessions, chance)
    # Those who called before and hang up as these arrive: so steering finds everything in use.
    # Where they are is drawn from what steering says of some while nothing is loaded.
    before = _unloaded(callers, chance)
    numbers = list(globe.CLUSTERS)
    edges = _tier(shape, np.bincount(before[0], minlength=len(globe.SITES)))
    relays = _tier(shape, [int((before[2] == number).sum()) for number in numbers])
    each = shape.sessions_a_worker
    capacities = [len(relays.of(at)) * each for at in range(len(numbers))]
    return Plan(
        shape,
        callers,
        keyring(shape.seed, [0], 0),
        {number: _cluster(number) for number in globe.CLUSTERS},
        {
            number: _transceivers(number, capacity // shape.sessions_a_transceiver + 2)
            for number, capacity in zip(globe.CLUSTERS, capacities, strict=True)
        },
        list(globe.SITES),
        _steering([len(edges.of(at)) * each for at in range(len(edges.hosts))], capacities),
        edges,
        relays,
        {
            number: [_transit(number, host, worker) for host, worker in _all(relays, at)]
            for at, number in enumerate(globe.CLUSTERS)
        },
        _hashes(callers),
        BEGIN + np.sort(chance.random(shape.sessions)) * ARRIVE_S,
        *before,
        np.zeros(shape.sessions, dtype=np.int64),
        chance.integers(1 << 32, size=shape.sessions, dtype=np.uint32),
        _shared(shape.sessions),
    )


SAMPLE = 20_000
"""Callers whose unloaded decisions the operator plans by."""


def _steering(sites: Sequence[int], clusters: Sequence[int]) -> steering.Steering:
    """The product's, over sites and clusters of these capacities."""
    return steering.Steering(
        [
            steering.Site(
                name,
                *where,
                relays=(Endpoint(f"203.0.{at}.5:3478"), Endpoint(f"[2001:db8:{at:x}::5]:3478")),
                capacity=capacity,
            )
            for at, ((name, where), capacity) in enumerate(
                zip(globe.SITES.items(), sites, strict=True)
            )
        ],
        [
            steering.Place(number, *where, capacity=capacity)
            for (number, (_, where)), capacity in zip(globe.CLUSTERS.items(), clusters, strict=True)
        ],
    )


def _unloaded(callers: Callers, chance: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """First and second site and cluster of all callers, each as those of a caller of the sample
    whose nearest site is the same."""
    closest = nearest(callers, list(globe.SITES.values()))
    who = chance.choice(len(callers), min(SAMPLE, len(callers)), replace=False)
    ample = _steering([len(callers)] * len(globe.SITES), [len(callers)] * len(globe.CLUSTERS))
    found = _decisions(ample, callers, who, ({}, {}))
    alike = np.zeros(len(callers), dtype=np.int64)
    for at in np.unique(closest):
        theirs = np.flatnonzero(closest[who] == at)
        here = closest == at
        alike[here] = chance.choice(theirs if len(theirs) else len(who), int(here.sum()))
    return found[0][alike], found[1][alike], found[2][alike]


def _shared(count: int) -> Ints:
    found = np.frombuffer(mmap.mmap(-1, 8 * max(1, count)), dtype=np.int64)[:count]
    found[:] = -1
    return found


def nearest(callers: Callers, points: Sequence[tuple[float, float]]) -> Ints:
    """For each caller, the number of the point that is nearest."""
    here = globe.vectors(callers.latitude, callers.longitude)
    latitude, longitude = np.array(points).T
    found: Ints = np.argmax(here @ globe.vectors(latitude, longitude).T, axis=1)
    return found


def _tier(shape: Shape, sizes: Iterable[int]) -> Tier:
    each = shape.sessions_a_worker * shape.workers
    hosts = [max(HOSTS_MIN, int(np.ceil(size * HEADROOM / each))) for size in sizes]
    return Tier(hosts, shape.workers, flows.octets(shape.limits.flows))


def _cluster(number: int) -> ufrag.Cluster:
    return ufrag.Cluster(
        number, ipaddress.ip_network(f"10.{number}.0.0/16"), 9000, 9000 + PORTS - 1
    )


def _transceivers(number: int, count: int) -> list[tuple[ufrag.Address, int]]:
    base = ipaddress.ip_address(f"10.{number}.1.0")
    return [(base + each // PORTS, 9000 + each % PORTS) for each in range(count)]


def _all(tier: Tier, at: int) -> Iterator[tuple[int, int]]:
    return ((host, worker) for host in range(tier.hosts[at]) for worker in range(tier.workers))


def _transit(number: int, host: int, worker: int) -> bytes:
    address = ipaddress.ip_address(f"10.{number}.0.1") + host
    return frame.name(address, TRANSIT_PORT + worker, 2)


def _hashes(callers: Callers) -> npt.NDArray[np.uint64]:
    """Of address and port: what routers and kernels spread clients by."""
    rows = np.frombuffer(b"".join(callers.headers), dtype=np.uint8).reshape(-1, 32)
    address = rows[:, 24:28].copy().view(">u4").ravel().astype(np.uint64)
    port = rows[:, 6:8].copy().view(">u2").ravel().astype(np.uint64)
    return (address << np.uint64(16)) | port


# --- several processes ----------------------------------------------------------------------------

Result = TypeVar("Result")
_PLAN: list[Plan] = []


def plan() -> Plan:
    """The plan that this process works on."""
    return _PLAN[-1]


Task = tuple[Any, ...]


class Crew:
    """Processes that work on a plan as it was when they were made; they share the flow tables."""

    def __init__(self, on: Plan, processes: int) -> None:
        """One process is this one."""
        _PLAN[:] = [on]
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            gc.collect()
            gc.freeze()  # what the collector touches would be copied for each process
            self._pool = ProcessPoolExecutor(
                processes, mp_context=get_context("fork"), initializer=gc.disable
            )

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()
            gc.unfreeze()

    def work(
        self,
        function: Callable[..., Result],
        tasks: Sequence[Task],
        done: Callable[[int], None] = lambda _: None,
    ) -> list[Result]:
        """The results of all tasks, in their order; `done` is told of each task's end."""
        results = []
        futures = [self._pool.submit(function, *task) if self._pool else None for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            results.append(future.result() if future else function(*task))
            done(1)
        return results


# --- steering -------------------------------------------------------------------------------------

States = tuple[Mapping[str, steering.State], Mapping[int, steering.State]]


def decide(who: Ints, heard: States) -> Ints:
    """For each of these callers, in columns: first site, second site, cluster. As a task."""
    on = plan()
    return _decisions(on.steering, on.callers, who, heard)


def _decisions(by: steering.Steering, callers: Callers, who: Ints, heard: States) -> Ints:
    numbers = {site.name: at for at, site in enumerate(by.sites)}
    latitude, longitude = callers.latitude[who].tolist(), callers.longitude[who].tolist()
    found = np.empty((3, len(who)), dtype=np.int64)
    for at, caller in enumerate(who.tolist()):
        key = callers.headers[caller][6:28]
        request = steering.Request(latitude[at], longitude[at], key=key)
        decision = by.decide(request, *heard)
        named = list(dict.fromkeys(site.name for site, _ in decision.relays))
        found[:, at] = numbers[named[0]], numbers[named[1]], decision.clusters[0]
    return found


def decide_all(crew: Crew, who: Ints, heard: States) -> Ints:
    """The same, by all processes."""
    tasks = [(part, heard) for part in np.array_split(who, PIECES)]
    return np.concatenate(crew.work(decide, tasks), axis=1)


def states(on: Plan, failed: Sequence[int] = ()) -> States:
    """What steering hears of: how many are where."""
    sites = np.bincount(on.first, minlength=len(on.sites))
    clusters = np.bincount(on.cluster, minlength=max(on.clusters) + 1)
    capacities = [place.capacity for place in on.steering.places]
    return (
        {
            name: steering.State(at not in failed, sites[at] / on.capacity(at))
            for at, name in enumerate(on.sites)
        },
        {
            number: steering.State(True, clusters[number] / capacity)
            for number, capacity in zip(on.clusters, capacities, strict=True)
        },
    )


def place(on: Plan, crew: Crew, done: Callable[[int], None]) -> None:
    """Wave after wave of callers, each by the load that the ones before have left; as many others,
    who had come before, hang up meanwhile."""
    chance = np.random.default_rng([on.shape.seed, 2])
    edges = np.linspace(0, len(on.callers), WAVES + 1).astype(int).tolist()
    for first, end in itertools.pairwise(edges):
        found = decide_all(crew, np.arange(first, end), states(on))
        on.first[first:end], on.second[first:end], on.cluster[first:end] = found
        done(end - first)
    for number, held in on.transceivers.items():
        here = on.cluster == number
        on.transceiver[here] = chance.integers(len(held), size=int(here.sum()))
