"""What happens to a simulated world: a site lost, routes or ports changed.

What it owns: each event with its clients' datagrams, one by one where it matters, and the account
of what was lost. Every scene begins with the state in which setting_up.py has left the flow
tables, on copies of them, so that scenes do not depend on one another.

How clients behave is assumed, and said so in the output (`ASSUMED`): a datagram of media every 20
ms, a check every CHECK_S on the pair in use, and after the loss of a site as long as its ICE takes.
"""

import asyncio
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fleet
import globe
import numpy as np
from planning import Ints, Plan, keyring, plan
from setting_up import BEGUN, MEDIA_A_S, counted, first_check, indexes

import ledger
import metrics

CHECK_S = 2.5
"""Between two checks on the pair in use: Chromium's for a stable one. RFC 7675 asks for 5 s."""

FAILOVER_S = 2.5, 3.5
"""How long a client stays on a pair that has died before it sends on the other one, evenly between
the two: Chromium's patience of 2.5 s, and a second until it switches. lab.py measures it."""

RETRY_S, PATIENCE_S = 0.5, 15.0
"""Between two checks that were not answered, and when a client gives up and needs a new offer."""

BIN_S = 0.1
"""Of the losses over time."""

STEP_S = 0.005
"""Of virtual time where datagrams go one by one: four times in 20 ms."""

SEARCH_S = 3.5
"""How long it is looked at who finds whom: everybody has sent a check by then, and another one."""

SHARE_OF_CARRIER = 0.2
"""Of a site's clients, behind the one NAT that restarts."""

ASSUMED = {
    "answers": "a transceiver's next media comes 20 ms and the backbone's round trip after ours",
    "media": f"{MEDIA_A_S} datagrams a second each way, without pauses",
    "checks": f"every {CHECK_S} s on the pair in use, at a phase of its own",
    "failover": f"ICE leaves a dead pair after {FAILOVER_S[0]} to {FAILOVER_S[1]} s, evenly",
    "retries": f"a check without an answer is repeated after {RETRY_S} s, for {PATIENCE_S:.0f} s",
}

Figures = dict[str, Any]


def spread(values: globe.Floats) -> Figures:
    """Percentiles of something, for as many as it was."""
    if not len(values):
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99 = np.percentile(values, [50, 99])
    return {
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "max": round(float(values.max()), 3),
    }


def account(lost: globe.Floats, out_s: globe.Floats, given_up: int, series: Ints) -> Figures:
    """What an event has cost those whom it met."""
    return {
        "sessions": len(lost),
        "lost_up": spread(lost) | {"total": int(lost.sum())},
        "out_ms": spread(out_s * 1000),
        "given_up": given_up,
        "series": {"bin_s": BIN_S, "lost": np.trim_zeros(series, "b").tolist()},
    }


def sent_between(phase: globe.Floats, start: float, ends: globe.Floats) -> globe.Floats:
    """How many datagrams of media clients at these phases of 20 ms send from `start` on."""
    found: globe.Floats = np.maximum(0, np.ceil((ends - start) * MEDIA_A_S - phase))
    return found


def over_time(phase: globe.Floats, ends: globe.Floats) -> Ints:
    """Of clients whose media is lost from 0 to these times: how many datagrams in each bin."""
    edges = np.arange(0, max(1.0, float(ends.max(initial=0))) + 2 * BIN_S, BIN_S)
    upto = np.array([sent_between(phase, 0.0, np.minimum(ends, at)).sum() for at in edges[1:]])
    found: Ints = np.diff(upto, prepend=0).astype(np.int64)
    return found


# --- a site is lost -------------------------------------------------------------------------------


def fail_site(failed: int, at: int, silent_s: globe.Floats) -> Figures:
    """The clients of one site that had named this one as their second: they arrive here.

    `silent_s` has for every caller how long its ICE takes.
    """
    on, start = plan(), BEGUN + 1.0
    moved = np.flatnonzero((on.first == failed) & (on.second == at))
    workers = on.edges.of_client(on.hashed[moved], at)
    resumed = np.full(len(moved), np.nan)
    own = np.flatnonzero(on.first == at)
    own_at = on.edges.of_client(on.hashed[own], at)
    trips = answers_after(on, at)
    counters, others_lost = ledger.Counters(metrics.Inbound), 0
    for number in on.edges.of(at):
        here = np.flatnonzero(workers == number)
        worker = on.worker(on.edges, number, start, ways=on.ways(start))
        due = [(start + silent_s[moved[each]], False, int(each)) for each in here]
        heapq.heapify(due)
        while due:
            time, answers, each = heapq.heappop(due)
            header = on.callers.headers[moved[each]]
            if answers:
                worker.flows.answered((header,), time)
                continue
            verdict = worker.receive(header, first_check(on, int(moved[each])), time)
            if isinstance(verdict, bytes):
                resumed[each] = time - start
                heapq.heappush(due, (time + trips[on.cluster[moved[each]]], True, each))
            elif time + RETRY_S < start + PATIENCE_S:
                heapq.heappush(due, (time + RETRY_S, False, each))
        # Those who have been here all the time.
        there = [on.callers.headers[each] for each in own[own_at == number]]
        others_lost += worker.media(there, 1)
        add(counters, worker.counters)
    return {
        "moved": moved,
        "resumed": resumed,
        "others_lost": others_lost,
        "counters": counted(counters),
    }


def answers_after(on: Plan, at: int) -> dict[int, float]:
    """Seconds until a transceiver's next media is there that goes by this site, for each cluster:
    until then a flow is tentative."""
    where = globe.SITES[on.sites[at]]
    return {
        number: 1 / MEDIA_A_S + globe.between_ms(where, there) / 1000
        for number, (_, there) in globe.CLUSTERS.items()
    }


def site_lost(on: Plan, failed: int, found: Sequence[Figures]) -> Figures:
    """The account of a lost site from what has happened at all others."""
    moved = np.concatenate([each["moved"] for each in found])
    resumed = np.concatenate([each["resumed"] for each in found])
    order = np.argsort(moved)
    moved, resumed = moved[order], resumed[order]
    there = np.isfinite(resumed)
    out = np.where(there, resumed, PATIENCE_S)
    phase = on.callers.phase[moved]
    lost = sent_between(phase, 0.0, out)
    figures = account(lost, out, int((~there).sum()), over_time(phase, out))
    trips_s = globe.trips_ms(on.callers, globe.SITES[on.sites[failed]], moved) / 1000
    figures["lost_down"] = {"total": int((lost + trips_s * MEDIA_A_S).sum())}
    figures["others_lost"] = sum(each["others_lost"] for each in found)
    figures["counters"] = total(each["counters"] for each in found)
    return figures


def add(to: ledger.Counters, other: ledger.Counters) -> None:
    """Sum up, and hold the law of the counters."""
    assert other.missing() == 0, str(other)
    for kind in to.kinds:
        to.values[kind] += other[kind]


def total(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of what tasks have counted."""
    found: dict[str, int] = {}
    for each in counters:
        for name, value in each.items():
            found[name] = found.get(name, 0) + value
    return dict(sorted(found.items()))


# --- the same clients come to other workers -------------------------------------------------------


def search(at: int, what: str, latency_s: float | None, redis: bool = True) -> Figures:
    """Clients of a site arrive at workers that have never heard of them. Of all whom it moves those
    are followed who come to one of its relay hosts, one datagram after the other. `what` is

    kernel     other workers of the same relay hosts (a group of SO_REUSEPORT has changed)
    resilient  one relay host is lost, and its clients alone are spread over the others
    modulo     the same, by a router whose hash is taken modulo the number of hosts: nearly all move
    ports      a carrier's NAT restarts: a share of the clients has other ports from now on
    retired    as resilient, and the key that all hints were minted with is no longer known
    """
    on = plan()
    loop = fleet.Loop(BEGUN + 1.0)
    try:
        return loop.run_until_complete(_Search(on, loop, at, what, latency_s, redis).run())
    finally:
        loop.close()


class _Search:
    """One such scene."""

    def __init__(
        self, on: Plan, loop: fleet.Loop, at: int, what: str, latency_s: float | None, redis: bool
    ) -> None:
        self._on, self._loop, self._start = on, loop, loop.time()
        self._keyring = keyring(on.shape.seed, [1], 1) if what == "retired" else on.keyring
        own, tier = np.flatnonzero(on.first == at), on.edges
        before = tier.of_client(on.hashed[own], at)
        hashed, headers = on.hashed[own].copy(), [on.callers.headers[each] for each in own]
        if what == "ports":
            chance = np.random.default_rng([on.shape.seed, 7])
            changed = np.flatnonzero(chance.random(len(own)) < SHARE_OF_CARRIER)
            fresh, hashed[changed] = other_ports([headers[e] for e in changed], hashed[changed])
            for each, header in zip(changed, fresh, strict=True):
                headers[each] = header
        after = self._targets(at, what, hashed, before)
        met = changed if what == "ports" else np.flatnonzero(after != before)
        self._all = len(met)
        # All who come to one host, so that its budgets are used as they would be.
        first = tier.first[at] + tier.workers
        met = met[(after[met] >= first) & (after[met] < first + tier.workers)]
        self._callers, self._targets_ = own[met], after[met]
        self._headers = [headers[each] for each in met]
        self._number = {header: each for each, header in enumerate(self._headers)}
        self._lost = np.zeros(len(met))
        self._since = np.full(len(met), np.nan)
        self._series = np.zeros(round((SEARCH_S + 2.0) / BIN_S), dtype=np.int64)
        self._trips = answers_after(on, at)
        self._answers: list[tuple[float, int]] = []
        self._build(at, what, latency_s, redis)

    def _targets(self, at: int, what: str, hashed: Any, before: Ints) -> Ints:
        tier = self._on.edges
        workers, hosts, first = tier.workers, tier.hosts[at], tier.first[at]
        other = tier.of_client(hashed, at, salt=1)
        if what == "kernel":
            host = (before - first) // workers
            return first + host * workers + (other - first) % workers
        if what == "ports":
            return tier.of_client(hashed, at)
        # Host 0 is lost. Of a new hash only the remainder by one host less is used.
        fresh = tier.of_client(hashed, at, salt=2 if what == "modulo" else 3)
        host = 1 + ((fresh - first) // workers + (other - first)) % (hosts - 1)
        spread_ = first + host * workers + (other - first) % workers
        if what == "modulo":
            return spread_
        return np.where((before - first) // workers == 0, spread_, before)

    def _build(self, at: int, what: str, latency_s: float | None, redis: bool) -> None:
        on, tier, now = self._on, self._on.edges, self._start
        shape = on.shape
        store = fleet.Redis(latency_s, shape.redis.timeout_s) if redis else None
        if store is not None:
            for index in indexes(on, tier, at):
                store.held.update(index.take(len(on.callers))[1])
        self.store = store
        lost = () if what in ("kernel", "ports") else tuple(tier.of(at)[: tier.workers])
        self._workers = {
            number: fleet.Searcher(
                tier.copy(number),
                self._keyring,
                on.clusters,
                shape.limits,
                shape.relay.integrity_checks_per_s,
                now,
                on.ways(now),
                waiting=shape.waiting,
                outcome=self._outcome,
            )
            for number in tier.of(at)
            if number not in lost
        }
        for number, worker in self._workers.items():
            worker.number = number
        self.hosts = []
        living = list(self._workers)
        for first in range(0, len(living), tier.workers):
            numbers = living[first : first + tier.workers]
            tables = [self._workers[number].memory for number in numbers]
            host = fleet.Host(tables, store, self._loop)
            self.hosts.append((host, [self._workers[number] for number in numbers]))

    def _outcome(self, header: bytes, count: int, verdict: fleet.Verdict, now: float) -> None:
        """What became of a client's datagrams."""
        each = self._number[header]
        if isinstance(verdict, bytes):
            if np.isnan(self._since[each]):
                self._since[each] = now - self._start
                after = self._trips[int(self._on.cluster[self._callers[each]])]
                heapq.heappush(self._answers, (now + after, each))
        else:
            self._lost[each] += count
            self._series[int((now - self._start) / BIN_S)] += count

    async def run(self) -> Figures:
        """Step by step until everybody is found, or time is over."""
        tasks = [task for host, workers in self.hosts for task in host.serve(workers)]
        phase = self._on.callers.phase[self._callers]
        quarter = (phase * 4).astype(int)
        next_check = self._start + CHECK_S * (phase * 7919 % 1.0)
        pending = [np.flatnonzero(quarter == q).tolist() for q in range(4)]
        steps = 0
        while any(pending) and steps * STEP_S < SEARCH_S:
            q, now = steps % 4, self._loop.time()
            while self._answers and self._answers[0][0] <= now:
                at, each = heapq.heappop(self._answers)
                worker = self._workers[int(self._targets_[each])]
                worker.flows.answered((self._headers[each],), at)
            pending[q] = [each for each in pending[q] if np.isnan(self._since[each])]
            touched = {self._step(each, now, next_check) for each in pending[q]}
            for worker in self._workers.values():
                if worker.number in touched:
                    worker.ask()
                worker.expire(now)
            steps += 1
            await asyncio.sleep(self._start + steps * STEP_S - now)
        await asyncio.sleep(self._on.shape.waiting.wait_s)
        for worker in self._workers.values():
            worker.expire(self._loop.time())
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), f"a keeper has ended: {ended!r}"
        return self._figures()

    def _step(self, each: int, now: float, next_check: globe.Floats) -> int:
        """A client's next datagram: a check where it is due, else media."""
        header, number = self._headers[each], int(self._targets_[each])
        worker, caller = self._workers[number], int(self._callers[each])
        if now >= next_check[each]:
            next_check[each] += RETRY_S
            verdict = worker.receive(header, first_check(self._on, caller), now)
            if isinstance(verdict, bytes):
                self._outcome(header, 0, verdict, now)
        media = memoryview(fleet.packet(int(self._on.callers.ssrc[caller])))
        verdict = worker.receive(header, media, now)
        if verdict is not metrics.Inbound.WAITING:
            self._outcome(header, 1, verdict, now)
        return number

    def _figures(self) -> Figures:
        counters = ledger.Counters(metrics.Inbound)
        asked = ledger.Counters(metrics.Keeper)
        for worker in self._workers.values():
            add(counters, worker.counters)
        for host, _ in self.hosts:
            for kind in metrics.Keeper:
                asked.values[kind] += host.counters[kind]
        found = np.isfinite(self._since)
        out = np.where(found, self._since, SEARCH_S)
        figures = account(self._lost, out, int((~found).sum()), self._series)
        figures["moved_at_the_site"] = self._all
        figures["counters"] = counted(counters)
        figures["keeper"] = counted(asked)
        figures["redis_lookups"] = self.store.operations if self.store else 0
        return figures


def other_ports(headers: Sequence[bytes], hashed: Any) -> tuple[list[bytes], Any]:
    """The same clients behind other ports; `hashed` is written to."""
    fresh = []
    for at, header in enumerate(headers):
        port = 1024 + (int.from_bytes(header[6:8], "big") - 1024 + 7_777) % 64_512
        fresh.append(header[:6] + port.to_bytes(2, "big") + header[8:])
        hashed[at] = (int(hashed[at]) >> 16 << 16) | port
    return fresh, hashed
