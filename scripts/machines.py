"""How many machines a number of sessions takes, by what scripts/bench.py has measured.

What it owns: the figures of the two benchmarks that are needed for it, out of their JSON or by
default out of ARCHITECTURE.md; and the arithmetic. All assumptions are returned beside the result.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATAGRAMS_A_S = 100
"""Of a session, at a relay: 50 of 20 ms each way. Checks and reports are some three more."""

UTILISATION = 0.5
"""Of a CPU, at most, at a relay when nothing has failed: bursts and a lost neighbour need the rest.
The measured cost is of a worker at a quarter of a CPU; it falls as load grows, since more datagrams
come in a batch."""

CPUS = 8
"""Of a relay's host, one for each worker; the keeper's share of them is below a percent."""

TRANSCEIVER_CPUS = 32
"""Of a transceiver's host, one process each."""

TRANSCEIVER_UTILISATION = 0.8
"""Of the most sessions that were carried with all packets in time."""

REDIS_OPERATIONS_A_S = 100_000
"""Of one Redis process. Assumed: no figure of ours says it."""


@dataclass(frozen=True)
class Measured:
    """What one CPU does."""

    relay_us_a_datagram: float
    relay_from: str
    sessions_a_core: float
    transceiver_from: str


DEFAULT = Measured(
    2.35,
    'ARCHITECTURE.md, "Measured": a worker at 100,000 datagrams a second, 100,000 flows;'
    " scripts/bench.py relay, 2026-11-21, commit dddd64c, Intel Xeon (KVM), 2 CPUs",
    160,
    'ARCHITECTURE.md, "The transceiver": most sessions with p99 under 5 ms;'
    " scripts/bench.py transceiver, 2026-11-21, commit dbd5ae7, the same machine",
)


def measured(relay: Path | None, transceiver: Path | None) -> Measured:
    """The figures of `bench.py relay --json` and `bench.py transceiver --json`, where given."""
    found = asdict(DEFAULT)
    if relay:
        figures = json.loads(relay.read_text())
        costs = figures["parts"]["memory"]["process"]["cpu_us_a_datagram"]
        found["relay_us_a_datagram"] = list(costs.values())[-1]
        found["relay_from"] = _where(relay, figures)
    if transceiver:
        figures = json.loads(transceiver.read_text())
        found["sessions_a_core"] = figures["parts"]["capacity"]["sessions_a_core"]["earshot"]
        found["transceiver_from"] = _where(transceiver, figures)
    return Measured(**found)


def _where(path: Path, figures: dict[str, Any]) -> str:
    machine = figures["machine"]
    return (
        f"{path.name}: {figures['command']}, {figures['date'][:10]}, commit {figures['commit']},"
        f" {machine['cpu']}, {machine['cpus']} CPUs"
    )


def sessions_a_worker(found: Measured) -> int:
    """What one relay worker is planned to carry."""
    return int(UTILISATION * 1e6 / (found.relay_us_a_datagram * DATAGRAMS_A_S))


def needed(
    found: Measured,
    sessions: int,
    sites: list[int],
    clusters: list[int],
    most: list[int],
    redis_a_s: float,
) -> dict[str, Any]:
    """Machines for so many sessions: `sites` and `clusters` is what is at each, `most` what is at
    each site once the largest one has failed."""
    each = sessions_a_worker(found)

    def hosts(sessions_there: int) -> int:
        return math.ceil(sessions_there / (each * CPUS))

    cores = sessions / (found.sessions_a_core * TRANSCEIVER_UTILISATION)
    return {
        "entrance_hosts": sum(map(hosts, sites)),
        "entrance_hosts_one_spare_a_site": sum(hosts(there) + 1 for there in sites),
        "entrance_hosts_largest_site_lost": sum(max(2, hosts(there)) for there in most),
        "cluster_relay_hosts_one_spare_a_cluster": sum(hosts(there) + 1 for there in clusters),
        "relay_cpus": round(sessions / each * 2),
        "transceiver_hosts": math.ceil(cores / TRANSCEIVER_CPUS),
        "transceiver_cpus": math.ceil(cores),
        "redis_processes": max(1, math.ceil(redis_a_s / REDIS_OPERATIONS_A_S)),
        "datagrams_a_s": sessions * DATAGRAMS_A_S * 2,
        "by": {
            "relay_us_a_datagram": found.relay_us_a_datagram,
            "relay_from": found.relay_from,
            "sessions_a_core": found.sessions_a_core,
            "transceiver_from": found.transceiver_from,
            "sessions_a_relay_worker": each,
            "relay_utilisation": UTILISATION,
            "relay_cpus_a_host": CPUS,
            "transceiver_utilisation": TRANSCEIVER_UTILISATION,
            "transceiver_cpus_a_host": TRANSCEIVER_CPUS,
            "redis_operations_a_s_assumed": REDIS_OPERATIONS_A_S,
        },
    }
