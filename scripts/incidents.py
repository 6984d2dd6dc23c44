"""More of what happens to a simulated world: a transit lost, keys rotated, second ways kept alive.

As scenes.py: each begins with the state that setting_up.py has left, on copies of the flow tables.
"""

import collections
import heapq
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import fleet
import globe
import msgspec
import numpy as np
from planning import ARRIVE_S, Crew, Plan, keyring, plan
from scenes import (
    PATIENCE_S,
    RETRY_S,
    Figures,
    account,
    add,
    other_ports,
    over_time,
    sent_between,
    spread,
    total,
)
from setting_up import BEGUN, MEDIA_A_S, counted, first_check

import backbone
import entrance
import flows
import frame
import handover
import ledger
import metrics
import parley

# --- a cluster's relay is lost --------------------------------------------------------------------

WATCHED_S = 1.5
"""How long after it the entrances are looked at."""


class Introduced(NamedTuple):
    """A flow that was moved."""

    now: float
    header: bytes
    hop: bytes
    """Where to."""
    message: bytes
    """That said so there."""
    used: bool
    """False for the second way of a client that is elsewhere."""
    trip_s: float


class _Line:
    """In place of the socket between an entrance and a cluster's relays, which answer probes as
    transit.py does: what is said takes half of `trip_s`, and what is dead then says nothing."""

    family = socket.AF_INET

    def __init__(
        self, names: Iterable[bytes], at: tuple[str, int], tags: parley.Tags, trip_s: float
    ) -> None:
        self._at = at
        self._names = {frame.reachable(name, self.family): name for name in names}
        self._tags, self._trip_s = tags, trip_s
        self.now = 0.0
        self.probes = 0
        self.introductions: list[tuple[bytes, bytes, bytes]] = []
        """Client's header, transit address, message."""
        self._probed: collections.deque[tuple[float, bytes, parley.Message]] = collections.deque()

    def getsockname(self) -> tuple[str, int]:
        """As a socket."""
        return self._at

    def sendto(self, message: bytes, to: tuple[str, int]) -> int:
        """The entrance says something."""
        said = self._tags.read(message[: frame.HEADER_OCTETS], message[frame.HEADER_OCTETS :])
        assert said is not None
        if said.kind is parley.Kind.PROBE:
            self.probes += 1
            self._probed.append((self.now + self._trip_s, self._names[to], said))
        else:
            plain = said.header[: -parley.TAG_OCTETS] + parley.NO_TAG
            self.introductions.append((plain, self._names[to], message))
        return len(message)

    @property
    def due(self) -> float:
        """When the next answer arrives, if it does."""
        return self._probed[0][0] if self._probed else float("inf")

    def deliver(
        self, to: entrance.Entrance, dead: frozenset[bytes], at: float, drains: bool
    ) -> None:
        """Answers that have arrived by now; `dead` died, or began to drain, `at` that time."""
        while self.due <= self.now:
            arrives, name, probe = self._probed.popleft()
            met = name in dead and arrives - self._trip_s / 2 >= at
            if met and not drains:
                continue
            message = self._tags.answer(probe, met)
            header, rest = message[: frame.HEADER_OCTETS], message[frame.HEADER_OCTETS :]
            said = to.hear(header, memoryview(rest), name, arrives)
            assert said is metrics.Outbound.CONTROL


def lose_transit(at: int, cluster: int, dead: frozenset[bytes], drains: bool) -> Figures:
    """What the entrances of one site do when these transit addresses of a cluster fall silent, or
    say that they drain. Each worker probes in its own rhythm, and knows this one cluster."""
    on, start = plan(), BEGUN + 2.0
    trip_s = globe.between_ms(globe.SITES[on.sites[at]], globe.CLUSTERS[cluster][1]) / 1000
    chance = np.random.default_rng([on.shape.seed, 11, at])
    moved: list[Introduced] = []
    probes = met = 0
    own = {on.callers.headers[each] for each in np.flatnonzero(on.first == at)}
    tags = parley.Tags(on.keyring, False)
    for number in on.edges.of(at):
        begun = start - 1.0 - 0.1 * chance.random()
        ways = on.ways(begun, cluster)
        table = _only(on.edges.copy(number), ways)
        worker = on.worker(on.edges, number, begun, table=table, ways=ways)
        # Second ways move as well; nothing of theirs is lost.
        left = {header for header, hop in worker.flows.hops.items() if hop in dead}
        met += len(left & own)
        line = _Line(ways.ways, on.internal(number), tags, trip_s)
        rows = memoryview(bytearray(handover.WAYS_OCTETS))
        table_, judge = worker.flows, worker.gate
        ahead = entrance.Entrance(cast(Any, line), ways, tags, table_, judge, rows)
        line.now = begun
        while line.now < start + WATCHED_S:
            line.deliver(ahead, dead, start, drains)
            if line.now >= ways.due:
                # Sessions on ways that live are heard of by their downlink, beside the answers.
                gone = line.now - trip_s / 2 >= start and not drains
                silent = dead if gone else frozenset[bytes]()
                ways.seen.update(set(table_.hops.values()) - silent)
                ahead.tend(line.now)
            while ahead.moving:
                ahead.move()
            for header, hop, message in line.introductions:
                if header in left:
                    left.discard(header)
                    used = header in own
                    moved.append(Introduced(line.now, header, hop, message, used, trip_s))
            line.introductions.clear()
            line.now = max(min(ways.due, line.due), line.now + 1e-4)
        probes += line.probes
    return {
        "met": met,
        "moved": moved,
        "probes_a_s": probes / (WATCHED_S + 1.0),
    }


def _only(table: memoryview, ways: backbone.Backbone) -> memoryview:
    """A table with those flows alone that go by these ways."""
    for slot in range(len(table) // flows.SLOT_OCTETS):
        flow = flows.read(table, slot)
        if flow is not None and flow.hop not in ways.ways:
            table[slot * flows.SLOT_OCTETS] = flows.State.FREE
    return table


def introduce(cluster: int, moved: list[Introduced]) -> Figures:
    """The other end: relays of the cluster are told of clients that they have never heard of."""
    on = plan()
    index = list(on.clusters).index(cluster)
    numbers = dict(zip(on.groups[cluster], on.relays.of(index), strict=True))
    counters = ledger.Counters(metrics.Inbound)
    accepted, tags = set[bytes](), parley.Tags(on.keyring, False)
    for hop in sorted({each.hop for each in moved}):
        clusters = {cluster: on.clusters[cluster]}
        worker = on.worker(on.relays, numbers[hop], BEGUN + 2.0, clusters=clusters)
        for now, header, to, message, *_ in sorted(moved):
            if to != hop:
                continue
            said = tags.read(message[: frame.HEADER_OCTETS], message[frame.HEADER_OCTETS :])
            assert said is not None
            text, shown = parley.introduced(said.body)
            verdict = worker.gate.introduced(said.header, text, shown, now)
            # What follows at once is media: it goes where the introduction leads.
            worker.counters.values[fleet.RECEIVED] += 1
            if isinstance(verdict, bytes):
                worker.counters.values[metrics.Inbound.CONTROL] += 1
                if worker.media([said.header], 1) == 0:
                    accepted.add(header)
            else:
                worker.counters.values[verdict] += 1
        add(counters, worker.counters)
    return {"accepted": accepted, "counters": counted(counters)}


def transit_lost(
    on: Plan, cluster: int, found: Sequence[Figures], crew: Crew, drains: bool
) -> Figures:
    """The account of a cluster's relay that is gone, or drains, from what all entrances did."""
    moved = sorted(each for task in found for each in task["moved"])
    shares = {each.hop: at % 2 for at, each in enumerate(moved)}
    halves = [[each for each in moved if shares[each.hop] == half] for half in (0, 1)]
    told = crew.work(introduce, [(cluster, half) for half in halves])
    accepted = set[bytes]().union(*(each["accepted"] for each in told))
    used = [each for each in moved if each.used]
    numbers = {header: at for at, header in enumerate(on.callers.headers)}
    who = np.array([numbers[each.header] for each in used], dtype=np.int64)
    phase = on.callers.phase[who]
    out = np.array([each.now for each in used]) - BEGUN - 2.0
    trip = np.array([each.trip_s for each in used])
    # A frame is on its way for half a round trip: what left that much earlier is lost as well.
    after, out = out, out + trip / 2
    lost = np.zeros(len(used)) if drains else sent_between(phase, 0.0, out)
    figures = account(lost, out * (not drains), 0, over_time(phase, out * (not drains)))
    met = sum(each["met"] for each in found)
    figures |= {
        "met": met,
        "given_up": met - sum(each.header in accepted for each in used),
        "second_ways_moved": len(moved) - len(used),
        "moved_after_ms": spread(after * 1000),
        "probes_a_s": round(sum(each["probes_a_s"] for each in found)),
        "probes_a_s_to_all_clusters": round(
            sum(each["probes_a_s"] for each in found)
            * sum(map(len, on.groups.values()))
            / len(on.groups[cluster])
        ),
        "counters": total(each["counters"] for each in told),
    }
    return figures


# --- keys -----------------------------------------------------------------------------------------

NEW_CALLS_S = 60.0
"""So long new calls come while the keys are changed."""

RELAYS_FIRST = {"relays": (5.0, 10.0), "transceivers": (20.0, 30.0)}
RELAYS_LAST = {"relays": (20.0, 30.0), "transceivers": (5.0, 10.0)}
"""When the files of which are changed, one machine after the other: as documented, and wrongly."""


def rotate(at: int, order: dict[str, tuple[float, float]]) -> Figures:
    """New calls at a site while a second key comes into use. Each is a caller of the site from
    another port, placed by the plan where that caller is."""
    on, start = plan(), BEGUN + 1.0
    chance = np.random.default_rng([on.shape.seed, 13, at])
    own = np.flatnonzero(on.first == at)
    calls = chance.choice(own, min(len(own), 10_000), replace=False)
    came = start + np.sort(chance.random(len(calls))) * NEW_CALLS_S
    old, both = on.keyring, keyring(on.shape.seed, [0, 1], 0)
    minting = keyring(on.shape.seed, [0, 1], 1)
    relays = start + chance.uniform(*order["relays"], on.edges.hosts[at])
    switch = start + chance.uniform(*order["transceivers"], max(map(len, on.transceivers.values())))
    headers, hashed = other_ports(
        [on.callers.headers[each] for each in calls], on.hashed[calls].copy()
    )
    workers = on.edges.of_client(hashed, at)
    counters, tries = ledger.Counters(metrics.Inbound), np.full(len(calls), np.nan)
    for number in on.edges.of(at):
        reload = relays[(number - on.edges.first[at]) // on.edges.workers]
        table = on.edges.copy(number)
        worker = on.worker(on.edges, number, start, table=table, ways=on.ways(start))
        due = [(came[each], int(each)) for each in np.flatnonzero(workers == number)]
        heapq.heapify(due)
        while due:
            now, each = heapq.heappop(due)
            if now >= reload and worker.keyring is old:
                worker.reload(both, on.clusters, on.ways(now), now)
            caller = int(calls[each])
            keys = minting if came[each] >= switch[on.transceiver[caller]] else old
            verdict = worker.receive(headers[each], first_check(on, caller, keys), now)
            if isinstance(verdict, bytes):
                tries[each] = now - came[each]
            elif now - came[each] < PATIENCE_S:
                heapq.heappush(due, (now + RETRY_S, each))
        add(counters, worker.counters)
    there = np.isfinite(tries)
    late = tries[there]
    return {
        "calls": len(calls),
        "set_up_at_once": int((late == 0).sum()),
        "late": int((late > 0).sum()),
        "late_ms": spread(late[late > 0] * 1000),
        "given_up": int((~there).sum()),
        "checks_dropped": counters[metrics.Inbound.DROPPED_UFRAG_UNKNOWN_KEY],
        "counters": counted(counters),
    }


# --- second ways that are kept alive --------------------------------------------------------------

AGAIN_S = 25.0
"""Between two checks on a pair that is not in use, where a client keeps one: Chromium's."""

KEPT_S = 75.0
KEPT_WORKERS = 2
"""How long, and at how many workers of the site, it is looked at."""


def keep_second(at: int, tentative: int | None) -> Figures:
    """All who named this site as their second check it every AGAIN_S, while new calls come at the
    plan's own rate: who is refused? `tentative` is flows_tentative_max; None is the default."""
    on, start = plan(), BEGUN + 1.0
    relay = on.shape.relay
    if tentative is not None:
        relay = msgspec.structs.replace(relay, flows_tentative_max=tentative)
    limits = handover.limits(relay)
    own, others = np.flatnonzero(on.first == at), np.flatnonzero(on.second == at)
    chance = np.random.default_rng([on.shape.seed, 17, at])
    fresh = chance.choice(own, max(1, round(len(own) * KEPT_S / ARRIVE_S)), replace=False)
    headers, hashed = other_ports(
        [on.callers.headers[each] for each in fresh], on.hashed[fresh].copy()
    )
    new_at, beside_at = on.edges.of_client(hashed, at), on.edges.of_client(on.hashed[others], at)
    phases, came = on.callers.phase[others] * AGAIN_S, chance.random(len(fresh)) * KEPT_S
    refused = {"second": 0, "new": 0}
    counters, most = ledger.Counters(metrics.Inbound), 0
    for number in on.edges.of(at)[:KEPT_WORKERS]:
        worker = on.worker(on.edges, number, start, limits=limits, ways=on.ways(start))
        live = list(worker.flows.hops)
        due: list[tuple[float, str, int]] = [
            (start + phases[each] + again * AGAIN_S, "second", int(others[each]))
            for each in np.flatnonzero(beside_at == number)
            for again in range(round(KEPT_S / AGAIN_S))
        ]
        due += [(start + came[each], "new", int(each)) for each in np.flatnonzero(new_at == number)]
        due += [(start + each, "live", 0) for each in range(0, round(KEPT_S), 10)]
        for now, kind, each in sorted(due):
            if kind == "live":
                assured = [header for header in live if header not in worker.flows.watched]
                worker.media(assured, MEDIA_A_S * 10)
                continue
            caller = int(fresh[each]) if kind == "new" else each
            header = headers[each] if kind == "new" else on.callers.headers[caller]
            verdict = worker.receive(header, first_check(on, caller), now)
            refused[kind] += not isinstance(verdict, bytes)
            if kind == "new" and isinstance(verdict, bytes):
                worker.answered(header, int(on.callers.ssrc[caller]), now)
            most = max(most, worker.flows.tentative)
        add(counters, worker.counters)
    return {
        "workers": KEPT_WORKERS,
        "tentative_limit": limits.tentative,
        "tentative_most": most,
        "second_a_worker": round(float((beside_at == on.edges.first[at]).sum())),
        "new_calls": int((new_at < on.edges.first[at] + KEPT_WORKERS).sum()),
        "refused_second": refused["second"],
        "refused_new": refused["new"],
        "counters": counted(counters),
    }
