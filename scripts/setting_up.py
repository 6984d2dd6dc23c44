"""A million calls are set up: each first check through the gates of the product, at both tiers.

What it owns: the order of what happens at each worker while the calls of a plan begin: the first
check at the entrance, the transceiver's answer, the first media, the check by which the client
keeps a second way in, and the same again at the cluster's relay; and what keepers write to Redis.

A task is a site or a cluster, so that several processes share the work. What they leave is the flow
tables in shared memory, as the relay's workers leave them to their successors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import fleet
import globe
import numpy as np
from planning import ARRIVE_S, BEGIN, Ints, Plan, Tier, plan

import census
import frame
import keeper
import ledger
import metrics
import parley
import ufrag

SECOND_S = 0.05
"""After its first check a client checks the second relay: ICE's pace (RFC 8445 section 14.2)."""

MEDIA_A_S = 50
"""Datagrams of a caller in a second: 20 ms of Opus each, without pauses."""

LIVE_S = 20
"""So often all media since then is looked up. Flows live longer than it."""

BEGUN = BEGIN + ARRIVE_S + 1.0
"""All calls have begun."""

_FIRST, _ANSWERED, _SECOND, _LIVE = range(4)


def open_site(at: int) -> dict[str, Any]:
    """All that happens at a site's workers while the calls begin."""
    on = plan()
    own, others = np.flatnonzero(on.first == at), np.flatnonzero(on.second == at)
    where = globe.SITES[on.sites[at]]
    workers = on.edges.of_client(on.hashed, at)
    numbers = {hop: number for names in on.groups.values() for number, hop in enumerate(names)}
    found = _Found()
    for number in on.edges.of(at):
        worker = on.worker(on.edges, number, BEGIN, live=True, ways=on.ways(BEGIN))
        here, beside = own[workers[own] == number], others[workers[others] == number]
        hops = _run(on, worker, (here, beside), where, on.callers.headers)
        on.way[here] = [numbers.get(hop or b"", -1) for hop in hops]
        found.add(worker, len(here))
    return found.figures()


def open_cluster(at: int) -> dict[str, Any]:
    """The same at a cluster's relays: the frames that the entrances have sent on."""
    on = plan()
    number = list(on.clusters)[at]
    where = globe.CLUSTERS[number][1]
    inside = np.flatnonzero(on.cluster == number)
    found, stamped = _Found(), _stamped(on, inside)
    for index, each in enumerate(on.relays.of(at)):
        clusters = {number: on.clusters[number]}
        worker = on.worker(on.relays, each, BEGIN, live=True, clusters=clusters)
        here = inside[on.way[inside] == index]
        _run(on, worker, (here, here), where, *stamped)
        found.add(worker, len(here))
    return found.figures()


class _Found:
    """What a task says of its workers."""

    def __init__(self) -> None:
        self._counters = ledger.Counters(metrics.Inbound)
        self._sessions: list[int] = []
        self._flows: list[int] = []
        self._tentative: list[int] = []

    def add(self, worker: fleet.Worker, sessions: int) -> None:
        assert worker.counters.missing() == 0, str(worker.counters)
        for kind in metrics.Inbound:
            self._counters.values[kind] += worker.counters[kind]
        self._sessions.append(sessions)
        self._flows.append(worker.opened)
        self._tentative.append(worker.tentative)

    def figures(self) -> dict[str, Any]:
        return {
            "counters": counted(self._counters),
            "sessions": self._sessions,
            "flows_most": self._flows,
            "tentative_most": self._tentative,
        }


def counted(counters: ledger.Counters) -> dict[str, int]:
    """What is not zero."""
    return {kind.name.lower(): counters[kind] for kind in counters.kinds if counters[kind]}


def _stamped(on: Plan, who: Ints) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """These callers' headers as a cluster's relay sees them: each entrance has put its tag on."""
    tags, key = parley.Tags(on.keyring, False), on.keyring.mint_id
    addresses: dict[int, bytes] = {}
    found: tuple[dict[int, bytes], dict[int, bytes]] = {}, {}
    for headers, sites in zip(found, (on.first, on.second), strict=True):
        for caller, number in zip(
            who.tolist(), on.entrances(who, sites[who]).tolist(), strict=True
        ):
            if number not in addresses:
                name = frame.name(*on.internal(number), fleet.FAMILY)
                addresses[number] = frame.packed_address(name)
            header = on.callers.headers[caller]
            stamp = tags.stamp(header, addresses[number], key)
            headers[caller] = header[: -len(stamp)] + stamp
    return found


Headers = Mapping[int, bytes] | Sequence[bytes]


def _run(
    on: Plan,
    worker: fleet.Worker,
    who: tuple[Ints, Ints],
    where: tuple[float, float],
    headers: Headers,
    second: Headers | None = None,
) -> list[bytes | None]:
    """One worker's calls from the first to the last; returns where the gate leads each. `who` are
    those who come in here, and those whose second way is here, with another header if `second`."""
    here, beside = who
    ssrc, second = on.callers.ssrc, second or headers
    trips = 1.5e-3 * globe.trips_ms(on.callers, where, here)
    live = np.arange(BEGIN, BEGUN, LIVE_S)
    parts = (
        (_FIRST, on.arrived[here], here),
        (_ANSWERED, on.arrived[here] + trips, here),
        (_SECOND, on.arrived[beside] + SECOND_S, beside),
        (_LIVE, live, np.zeros(len(live), dtype=np.int64)),
    )
    times = np.concatenate([part for _, part, _ in parts])
    order = np.argsort(times, kind="stable")
    kinds = np.repeat([kind for kind, _, _ in parts], [len(part) for _, part, _ in parts])
    whose = np.concatenate([part for _, _, part in parts])
    hops: dict[int, bytes] = {}
    requests: dict[int, memoryview] = {}
    talking: list[bytes] = []
    for time, kind, caller in zip(
        times[order].tolist(), kinds[order].tolist(), whose[order].tolist(), strict=True
    ):
        if kind == _LIVE:
            unknown = worker.media(talking, MEDIA_A_S * LIVE_S)
            assert not unknown, f"{unknown} flows were lost while they were used"
            worker.note_most()
            continue
        header = (second if kind == _SECOND else headers)[caller]
        if kind == _ANSWERED:
            if caller in hops:
                worker.answered(header, ssrc[caller], time)
                talking.append(header)
        else:
            # A cluster's relay sees the same check from both entrances.
            request = requests.pop(caller, None) or first_check(on, caller)
            if kind == _FIRST and beside is here:
                requests[caller] = request
            verdict = worker.receive(header, request, time)
            if kind == _FIRST and isinstance(verdict, bytes):
                hops[caller] = verdict
    worker.flows.sweep(BEGUN)
    worker.note_most()
    return [hops.get(caller) for caller in here.tolist()]


def first_check(on: Plan, caller: int, keys: ufrag.Keyring | None = None) -> memoryview:
    """The caller's Binding Request, with the password that belongs to its ufrag."""
    text = on.text(caller, keys)
    password = ufrag.password(keys or on.keyring, text)
    assert password is not None
    return memoryview(fleet.check(caller, text, password))


# --- Redis ----------------------------------------------------------------------------------------


def write(at: int) -> dict[str, Any]:
    """What a site's keepers write to Redis: all that is new, and then what is due again, for one
    period of writing it again (keeper.py: `_note` and `_write_some`, with its constants)."""
    on = plan()
    period = on.shape.redis.ttl_s / keeper.REFRESHES
    looks = round(period / keeper.LOOK_S)
    new, again = 0, np.zeros(looks, dtype=np.int64)
    for index in indexes(on, on.edges, at):
        new += _written(index)
        for look in range(looks):
            index.refresh(keeper.LOOK_S / period)
            again[look] += _written(index)
    return {"new": new, "again": again}


def indexes(on: Plan, tier: Tier, at: int) -> Sequence[census.Index]:
    """The census of each host of a site, after its first look."""
    tables = [tier.table(number) for number in tier.of(at)]
    found = []
    for host in range(tier.hosts[at]):
        index = census.Index(tables[host * tier.workers : (host + 1) * tier.workers])
        index.look()
        found.append(index)
    return found


def _written(index: census.Index) -> int:
    written = 0
    while index.due:
        numbers, _ = index.take(keeper.STORE_MAX)
        written += len(numbers)
    return written
