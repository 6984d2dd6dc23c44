"""What a worker leaves to its successor, and a relay to the next one: sockets and memory.

What it owns: all sockets and all shared memory of the relay's workers, opened before the first of
them is forked and kept open to the end, so that nothing of it is lost with a process.

    a worker       public and internal socket; a memory with control words, counters, flow table,
                   the two batches that it has in hand and the datagrams that wait for Redis
    the relay      the pairs of sockets between workers and keeper; a memory with the counters of
                   the supervisor and the keeper

Rules that stay true:
- Each section of a memory has one process that writes it. Any process may read all of it.
- `LAYOUT` changes with every change to the sections, to what stands in them or to the counters.
"""

import enum
import socket
from pathlib import Path

import flows
import host
import metrics
import settings
import udp

LAYOUT = 1
"""Version of the memory: any change to its sections, slots or counters is a new one."""

MEMORY = "earshot-relay"
"""Name of the shared memory, as /proc shows it."""


class Control(enum.IntEnum):
    """The 64-bit words of a worker's section "control"."""

    BEAT = 0
    """CLOCK_MONOTONIC in nanoseconds when the worker last woke up."""


class Shared:
    """Sockets and memory of all workers, made before the first is forked, kept until the end."""

    def __init__(self, found: settings.Relay) -> None:
        """Raises OSError naming the address if a socket cannot be opened."""
        table = found.relay
        numbers, size = range(workers(table)), table.receive_buffer_octets
        at, inner = table.public, table.internal
        self.public = [udp.open_public(at.host, at.port, size) for _ in numbers]
        self.internal = [
            udp.open_internal(inner.host, inner.port + number, size) for number in numbers
        ]
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in numbers]
        for end in (end for pair in pairs for end in pair):
            end.setblocking(False)
        self.asks = pairs
        sizes = sections(found, self.internal[0].family)
        self.memories = [host.SharedMemory(MEMORY, sizes) for _ in numbers]
        self.relay = host.SharedMemory(
            MEMORY,
            {
                "supervisor": metrics.octets(metrics.Supervisor),
                "keeper": metrics.octets(metrics.Keeper),
            },
        )


def sections(found: settings.Relay, family: int) -> dict[str, int]:
    """Octets of each section of a worker's memory."""
    table = found.relay
    batch = udp.octets(table.batch_size, table.datagram_octets_max, family)
    return {
        "control": 8 * len(Control),
        "inbound": metrics.octets(metrics.Inbound),
        "outbound": metrics.octets(metrics.Outbound),
        "flows": flows.octets(limits(table).flows),
        "batch_in": batch,
        "batch_out": batch,
    }


def limits(table: settings.RelayTable) -> flows.Limits:
    """One worker's share of the limits: the kernel spreads clients evenly over the workers."""
    share = workers(table)
    return flows.Limits(
        flows=-(-table.flows_max // share),
        tentative=-(-table.flows_tentative_max // share),
        addresses=table.addresses_per_ufrag_max,
        idle_s=table.flow_idle_s,
        tentative_idle_s=table.tentative_idle_s,
    )


def workers(table: settings.RelayTable) -> int:
    """How many workers there are."""
    return table.workers or len(host.cpus())


def internal_family(table: settings.RelayTable) -> int:
    """Address family of the sockets towards transceivers."""
    return socket.AF_INET if table.internal.address.version == 4 else socket.AF_INET6


def counters_in(memory: host.Memory) -> tuple[metrics.Counters, metrics.Counters]:
    """A worker's counters, inbound and outbound, in its memory."""
    return (
        metrics.Counters(metrics.Inbound, memory.section("inbound")),
        metrics.Counters(metrics.Outbound, memory.section("outbound")),
    )


def state_file(table: settings.RelayTable) -> Path:
    """Where a relay of this configuration writes down how it is found."""
    return table.state_dir / f"relay-{table.public.host}-{table.public.port}.json"
