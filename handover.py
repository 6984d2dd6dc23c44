"""What a worker leaves to its successor, and a relay to the next one: sockets and memory.

What it owns: all sockets and all shared memory of the relay's workers, opened before the first of
them is forked and kept open to the end, so that nothing of it is lost with a process.

    a worker       public and internal socket; a memory with control words, counters, flow table,
                   the two batches that it has in hand and the datagrams that wait for the keeper;
                   where it has a transit face (transit.py), two sockets and a memory for that
    the relay      the pairs of sockets between workers and keeper; a memory with the counters of
                   the supervisor and the keeper

All of it may outlive the process: what an earlier one left (legacy.py) is taken where it fits, and
what is here is offered to a later one, by descriptors with names.

Rules that stay true:
- Each section of a memory has one process that writes it. Any process may read all of it.
- `LAYOUT` changes with every change to the sections, to what stands in them or to the counters.
"""

import dataclasses
import enum
import functools
import itertools
import logging
import socket
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import flows
import frame
import host
import ledger
import legacy
import manager
import metrics
import recovery
import settings
import sockets
import udp
from endpoints import Endpoint

LAYOUT = 4
"""Version of the memory: any change to its sections, slots or counters is a new one."""

MEMORY = "earshot-relay"
"""Name of the shared memory, as /proc shows it."""


_RELAY_SECTIONS = {
    "supervisor": ledger.octets(metrics.Supervisor),
    "keeper": ledger.octets(metrics.Keeper),
}

WAYS_OCTETS = 8 + ledger.octets(metrics.Way) * settings.WAYS_MAX
"""A mark, and what a worker says of each transit address (entrance.py)."""

BACK_OCTETS = 32
"""For each slot of a face's flow table: length and socket address of the relay it answers to."""

_log = logging.getLogger("handover")


class Control(enum.IntEnum):
    """The 64-bit words of a worker's section "control"."""

    BEAT = 0
    """CLOCK_MONOTONIC in nanoseconds when the worker last woke up."""
    PID = 1
    """Its process."""


class Ends(NamedTuple):
    """What one worker's transit face works with."""

    transit: socket.socket
    """Towards other relays."""
    inner: socket.socket
    """Towards transceivers."""
    memory: host.SharedMemory


class Shared:
    """Sockets and memory of all workers, there before the first is forked, kept until the end."""

    def __init__(self, found: settings.Relay, estate: legacy.Estate | None = None) -> None:
        """What fits of an estate, by default of what the service manager kept, and the rest new.

        Raises OSError naming the address if a socket cannot be opened.
        """
        table = found.relay
        numbers = range(workers(table))
        self._estate = estate = legacy.Estate.of_manager() if estate is None else estate
        # A virtual address is announced once the workers serve, and withdrawn when they do not.
        virtual = found.vip is not None and table.public.address in {
            each.address for each in found.vip.addresses
        }
        self.public = [_public(estate, table, number, virtual) for number in numbers]
        self.internal = [_internal(estate, table, number) for number in numbers]
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in numbers]
        for end in (end for pair in pairs for end in pair):
            end.setblocking(False)
        self.asks = pairs
        self._limits, self._family = limits(table), self.internal[0].family
        shape = sections(found, self._family), parameters(table, self._family)
        left = estate.memories
        taken = [estate.take_memory(f"memory-{number}", LAYOUT, *shape) for number in numbers]
        self.memories = [
            each or host.SharedMemory(MEMORY, shape[0], LAYOUT, shape[1]) for each in taken
        ]
        # With another number of workers the kernel spreads all clients anew over the sockets:
        # anybody's flow may be asked for anywhere. Those that are not, expire.
        self._all_to_all = bool(left) and len(left) != len(numbers)
        self._fresh = {number for number in numbers if taken[number] is None} if left else set()
        self.faces = list(map(functools.partial(_face, estate, found), numbers))
        shape = _RELAY_SECTIONS, {"counters": _names(metrics.Supervisor, metrics.Keeper)}
        self.relay = estate.take_memory("relay", LAYOUT, *shape) or host.SharedMemory(
            MEMORY, shape[0], LAYOUT, shape[1]
        )
        self.relay.section("supervisor").cast("Q")[metrics.Supervisor.DRAINING_UNTIL] = 0
        if left:
            whole = len(numbers) - len(self._fresh)
            _log.info("%d of %d workers' memories are taken over as they are", whole, len(numbers))
        if not estate.live:
            self.settle()

    def settle(self) -> None:
        """Bring over the flows of memories that did not fit, and let go of what nobody took.

        Of a relay that is still at work: once its workers have stopped, before ours start. Then
        it counts, for flows that were opened in between.
        """
        estate = self._estate
        if self._fresh or self._all_to_all:
            # What is adopted lies here and not in the estate any more.
            ours = {
                number: list(flows.read_all(memory.section("flows")))
                for number, memory in enumerate(self.memories)
                if number not in self._fresh
            }
            left = ours | {
                number: list(estate.read_flows(f"memory-{number}")) for number in estate.memories
            }
            for number, memory in enumerate(self.memories):
                offered = left.get(number, []) if number in self._fresh else []
                if self._all_to_all:
                    others = (each for other, each in left.items() if other != number)
                    offered = [*offered, *itertools.chain.from_iterable(others)]
                carried, refused = _carry(offered, memory, self._limits, self._family)
                _log.info(
                    "worker %d: %d flows brought over, %d found no room", number, carried, refused
                )
        for number, face in enumerate(self.faces):
            if face and not any(face.memory.section("flows")[:: flows.SLOT_OCTETS]):
                # Where their clients come by shows with the next datagram of each.
                offered = list(estate.read_flows(f"face-{number}"))
                if offered:
                    carried, _ = _carry(offered, face.memory, self._limits, face.inner.family)
                    _log.info("transit face %d: %d flows brought over", number, carried)
        estate.close()

    def descriptors(self) -> list[tuple[str, int]]:
        """All that the next relay may want, with names (legacy.py)."""
        return [
            *((f"public-{number}", sock.fileno()) for number, sock in enumerate(self.public)),
            *((f"internal-{number}", sock.fileno()) for number, sock in enumerate(self.internal)),
            *((f"memory-{number}", memory.fd) for number, memory in enumerate(self.memories)),
            *itertools.chain.from_iterable(
                (
                    (f"transit-{number}", face.transit.fileno()),
                    (f"inner-{number}", face.inner.fileno()),
                    (f"face-{number}", face.memory.fd),
                )
                for number, face in enumerate(self.faces)
                if face
            ),
            ("relay", self.relay.fd),
        ]

    def publish(self, path: Path) -> None:
        """Write down how `Running.of` finds all memories. Raises OSError."""
        faces = [face.memory for face in self.faces if face]
        host.publish(path, LAYOUT, [*faces, *self.memories, self.relay])

    def store(self) -> bool:
        """Have the service manager, if there is one, keep all of it for the next start; true if it
        does."""
        kept = [manager.keep(name, fd) for name, fd in self.descriptors()]
        if any(kept) and not all(kept):
            _log.warning("the service manager did not take all descriptors: a restart would lose")
        return all(kept)


def _public(
    estate: legacy.Estate, table: settings.RelayTable, number: int, virtual: bool
) -> socket.socket:
    at, octets = table.public, table.receive_buffer_octets
    mapped = at.host if at.address.version == 6 else f"::ffff:{at.host}"
    found = estate.take_socket(f"public-{number}", socket.AF_INET6, mapped, at.port)
    if found is None:
        return sockets.open_public(at.host, at.port, octets, to_come=virtual)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # others may be opened beside
    sockets.prepare(found, octets)
    return found


def _internal(estate: legacy.Estate, table: settings.RelayTable, number: int) -> socket.socket:
    at, octets = table.internal, table.receive_buffer_octets
    port = at.port + number
    found = estate.take_socket(f"internal-{number}", internal_family(table), at.host, port)
    if found is None:
        return sockets.open_internal(at.host, port, octets)
    sockets.prepare(found, octets)
    return found


def _face(estate: legacy.Estate, found: settings.Relay, number: int) -> Ends | None:
    """A worker's transit face, if the relay has any."""
    table, octets = found.transit, found.relay.receive_buffer_octets
    if table.listen is None or table.internal is None:
        return None
    ends = []
    for name, at in (("transit", table.listen), ("inner", table.internal)):
        family, port = family_of(at), at.port + number
        sock = estate.take_socket(f"{name}-{number}", family, at.host, port)
        if sock is None:
            sock = sockets.open_internal(at.host, port, octets)
        sockets.prepare(sock, octets)
        ends.append(sock)
    family = ends[0].family
    shape = face_sections(found, family), parameters(found.relay, family)
    memory = estate.take_memory(f"face-{number}", LAYOUT, *shape)
    memory = memory or host.SharedMemory(MEMORY, shape[0], LAYOUT, shape[1])
    return Ends(ends[0], ends[1], memory)


def _carry(
    offered: Iterable[flows.Flow], memory: host.Memory, limits: flows.Limits, family: int
) -> tuple[int, int]:
    """Write flows into a worker's table; returns how many found room there, and how many did not.

    Assured ones first: they are calls.
    """
    # What was admitted once is admitted again; only the table's size counts.
    roomy = dataclasses.replace(limits, tentative=limits.flows, addresses=limits.flows)
    table = flows.Table(memory.section("flows"), roomy, time.monotonic())
    wanted, unreachable = {}, 0
    for flow in sorted(offered, key=lambda flow: flow.state is not flows.State.ASSURED):
        if flow.header in table.hops or flow.header in wanted:
            continue
        try:
            hop = frame.name(*frame.endpoint(flow.hop), family)
        except ValueError:  # an IPv6 transceiver, and the sockets are IPv4 now
            unreachable += 1
            continue
        wanted[flow.header] = flow._replace(hop=hop)
    carried = table.adopt(wanted.values())
    return carried, len(wanted) - carried + unreachable


def sections(found: settings.Relay, family: int) -> dict[str, int]:
    """Octets of each section of a worker's memory."""
    table = found.relay
    shape = table.batch_size, table.datagram_octets_max, family
    return {
        "control": 8 * len(Control),
        "inbound": ledger.ledger_octets(metrics.Inbound),
        "outbound": ledger.ledger_octets(metrics.Outbound),
        "flows": flows.octets(limits(table).flows),
        "batch_in": udp.octets(*shape, udp.Way.INBOUND),
        "batch_out": udp.octets(*shape, udp.Way.OUTBOUND),
        "waiting": recovery.octets(waiting_limits(found).waiting, table.datagram_octets_max),
        "ways": WAYS_OCTETS,
    }


def face_sections(found: settings.Relay, family: int) -> dict[str, int]:
    """The same for the memory of a worker's transit face."""
    table = found.relay
    batch = udp.octets(table.batch_size, table.datagram_octets_max, family, udp.Way.TRANSIT)
    return {
        "inbound": ledger.ledger_octets(metrics.Inbound),
        "outbound": ledger.ledger_octets(metrics.Outbound),
        "flows": flows.octets(limits(table).flows),
        "backs": BACK_OCTETS * limits(table).flows,
        "batch_in": batch,
        "batch_out": batch,
    }


def parameters(table: settings.RelayTable, family: int) -> dict[str, int]:
    """What a worker's memory is made for, beside the sizes of its sections."""
    return {
        "batch_size": table.batch_size,
        "datagram_octets_max": table.datagram_octets_max,
        "flows": limits(table).flows,
        "family": family,
        "counters": _names(metrics.Inbound, metrics.Outbound, metrics.Way),
    }


def _names(*kinds: type[ledger.Kinds]) -> int:
    """A number for the names and the order of counters."""
    return zlib.crc32(" ".join(name for kind in kinds for name in kind.__members__).encode())


def limits(table: settings.RelayTable) -> flows.Limits:
    """One worker's share of the limits: the kernel spreads clients evenly over the workers."""
    share = workers(table)
    return flows.Limits(
        flows=-(-table.flows_max // share),
        tentative=-(-(table.flows_tentative_max or -(-table.flows_max // 2)) // share),
        addresses=table.addresses_per_ufrag_max,
        idle_s=table.flow_idle_s,
        tentative_idle_s=table.tentative_idle_s,
    )


def waiting_limits(found: settings.Relay) -> recovery.Limits:
    """What one worker holds of clients that it does not know."""
    table = found.recovery
    return recovery.Limits(
        waiting=table.waiting_max,
        wait_s=table.wait_s,
        lookups_per_s=table.lookups_per_s,
        unknown=table.unknown_max,
        unknown_s=table.unknown_s,
    )


def workers(table: settings.RelayTable) -> int:
    """How many workers there are."""
    return table.workers or len(host.cpus())


def internal_family(table: settings.RelayTable) -> int:
    """Address family of the sockets towards transceivers."""
    return family_of(table.internal)


def family_of(at: Endpoint) -> int:
    """Of a socket that is not for clients: IPv4 where the address is."""
    return socket.AF_INET if at.address.version == 4 else socket.AF_INET6


def counters_in(memory: host.Memory) -> tuple[ledger.Ledger, ledger.Ledger]:
    """A worker's counters, inbound and outbound, in its memory."""
    return (
        ledger.Ledger(metrics.Inbound, memory.section("inbound")),
        ledger.Ledger(metrics.Outbound, memory.section("outbound")),
    )


class Running(NamedTuple):
    """The memories of a relay that runs, to read."""

    workers: list[host.Memory]
    faces: list[host.Memory]
    """Of the workers' transit faces; none without."""
    own: host.Memory

    @classmethod
    def of(cls, table: settings.RelayTable) -> "Running":
        """Of the relay with this configuration. Raises OSError and ValueError like
        `host.attach`."""
        found = host.attach(state_file(table), LAYOUT, MEMORY)
        faces = [memory for memory in found if "backs" in memory.sections]
        *workers, own = [memory for memory in found if "backs" not in memory.sections]
        return cls(workers, faces, own)


def state_file(table: settings.RelayTable) -> Path:
    """Where a relay of this configuration writes down how it is found."""
    return table.state_dir / f"relay-{table.public.host}-{table.public.port}.json"
