"""What a second tier costs: CPU a datagram of an entrance and of the cluster's relay behind it,
beside a single relay, in turns in one run; and what it adds to a round trip.

For bench.py. In the first turn frames go client, relay, transceiver; in the others client,
entrance, cluster relay, transceiver, without tags and with them. All relays have one CPU to share,
the load has another: an entrance and a cluster relay on one CPU wake up in turns, so each finds
about as many datagrams waiting as a single relay does.
"""

import contextlib
import socket
import statistics
from collections.abc import Callable, Iterator

import dev
import numpy as np
from load import Figures, Load
from rig import Relay, Setting, cpu_s

import handover
import ledger

FACE = """[transit]
listen = "127.0.0.1:{listen}"
internal = "127.0.0.1:{inner}"
relay_prefixes = ["127.0.0.1/32"]
tag = {tag}
"""
ENTRANCE = """transit = ["127.0.0.1:{listen}"]
[transit]
tag = {tag}
"""
ROUNDS, SECONDS = 5, 2.0
RATES = 5_000, 20_000, 60_000
FLOOD = 400_000
"""Datagrams a second that no relay keeps up with: it works all the time."""

Ledgers = Callable[[], list[ledger.Ledger]]


class Tier:
    """A relay that is looked at: its worker's CPU time and what it has forwarded."""

    def __init__(self, relay: Relay, face: bool) -> None:
        (self._pid,) = relay.worker_pids()
        memories = handover.Running.of(relay.table())
        (memory,) = memories.faces if face else memories.workers
        self._ledgers = handover.counters_in(memory)
        self._spent, self._done = 0.0, 0

    def begin(self) -> None:
        """From now on."""
        self._spent, self._done = cpu_s(self._pid), self._forwarded()

    def us(self) -> float:
        """CPU time a datagram since then."""
        return (cpu_s(self._pid) - self._spent) * 1e6 / max(1, self._forwarded() - self._done)

    def _forwarded(self) -> int:
        return sum(each[each.kinds["FORWARDED"]] for each in self._ledgers)


@contextlib.contextmanager
def _chain(setting: Setting, tag: bool | None) -> Iterator[tuple[Load, dict[str, Tier]]]:
    """A load with open flows through one relay (None), or through two."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context
        if tag is None:
            first = opened(Relay(setting))
            tiers = {"single": Tier(first, face=False)}
        else:
            listen, inner = dev.free_ports(2, socket.SOCK_DGRAM)
            flag = str(tag).lower()
            tables = FACE.format(listen=listen, inner=inner, tag=flag)
            last = opened(Relay(setting, tables=tables))
            first = opened(Relay(setting, tables=ENTRANCE.format(listen=listen, tag=flag)))
            kind = "tagged" if tag else "plain"
            tiers = {
                f"entrance, {kind}": Tier(first, face=False),
                f"cluster relay, {kind}": Tier(last, face=True),
            }
        load = opened(Load(setting.clients, spin=True))
        load.towards(first.address, first.public)
        load.open(setting.firsts(setting.clients, load.port))
        yield load, tiers


def transit(setting: Setting) -> Figures:
    """At several rates and in a flood: medians over rounds, and how many times a single relay's."""
    rates, rounds = ((2_000,), 1) if setting.quick else ((*RATES, FLOOD), ROUNDS)
    seconds = 0.2 if setting.quick else SECONDS
    found: Figures = {}
    with contextlib.ExitStack() as stack:
        chains = [stack.enter_context(_chain(setting, tag)) for tag in (None, False, True)]
        for rate in rates:
            spent: dict[str, list[float]] = {}
            trips: dict[str, list[float]] = {}
            for _ in range(rounds):
                for load, tiers in chains:
                    for tier in tiers.values():
                        tier.begin()
                    load.begin(rate, seconds + 1)
                    load.run(seconds)
                    account = load.settle()
                    if rate != FLOOD:
                        lost = f"{account.lost} of {account.sent} lost at {rate} a second"
                        setting.must(not account.lost, lost)
                    for name, tier in tiers.items():
                        spent.setdefault(name, []).append(tier.us())
                        median = float(np.percentile(account.trips_us(account.sent_at), 50))
                        trips.setdefault(name, []).append(median)
            name = "in_a_flood" if rate == FLOOD else f"at_{rate}_per_s"
            found[name] = _rows(spent, trips, rate == FLOOD)
            for row in found[name]:
                setting.say(f"{name}: {row}")
    return found


def _rows(
    spent: dict[str, list[float]], trips: dict[str, list[float]], flood: bool
) -> list[Figures]:
    single = statistics.median(spent["single"])
    rows: list[Figures] = []
    for name, values in spent.items():
        us = statistics.median(values)
        row: Figures = {"relay": name, "cpu_us_a_datagram": round(us, 3)}
        row["times_a_single"] = round(us / single, 3)
        if not flood:
            row["round_trip_p50_us"] = round(statistics.median(trips[name]), 1)
        rows.append(row)
    return rows
