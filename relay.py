"""The relay: one public UDP address, and behind it the transceiver that owns each session.

    client  <- WebRTC, as it is ->  relay  <- the same behind a header (frame.py) ->  transceiver

A worker's life is `Worker.serve`: wait, take a batch from the clients, send it to the transceivers,
take a batch from the transceivers, send it to the clients. Read on from there, downward; below the
workers stand what they share with the supervisor and the command line.

A client becomes known by a STUN Binding Request whose ufrag names a transceiver (ufrag.py) and
whose MESSAGE-INTEGRITY proves that it was given that ufrag's password. From then on its datagrams
are forwarded by its address alone.

Rules that stay true:
- The relay answers nothing. It sends to transceivers that a ufrag under its keys names, and to
  clients that have proved themselves, for the transceiver that owns their flow.
- On the hit path there is no Python-level loop over the datagrams of a batch, no copy of a payload,
  no exception and no log line. What misses, and STUN, is judged one by one.
- Every datagram ends in exactly one counter of its way: received = forwarded + dropped.
- Memory that strangers can grow is bounded by the flow table's limits; time, by the budget of
  integrity checks.

It keeps no session, decrypts nothing and knows no Redis. DTLS, RTP and RTCP pass unread.

RFC 8445 (ICE), RFC 7983 (telling STUN from the rest by the first octet)
"""

import contextlib
import gc
import ipaddress
import itertools
import logging
import operator
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import flows
import frame
import handover
import host
import metrics
import settings
import stun
import supervisor
import udp
import ufrag

_log = logging.getLogger("relay")

ROUNDS_MAX = 64
"""Full batches from each side between two looks at the clock and at the supervisor: at most a few
tens of milliseconds, and only while both sockets never run dry."""

POLL_MS = 1000
"""Longest sleep of an idle worker: how late a sweep may be."""

_MALFORMED = dict.fromkeys(stun.Malformed, metrics.Inbound.DROPPED_STUN_MALFORMED) | {
    stun.Malformed.TRUNCATED: metrics.Inbound.DROPPED_STUN_TRUNCATED,
    stun.Malformed.NOT_REQUEST: metrics.Inbound.DROPPED_STUN_NOT_REQUEST,
}
_REJECTED = {why: metrics.Inbound[f"DROPPED_UFRAG_{why.name}"] for why in ufrag.Reject}
_REFUSED = {why: metrics.Inbound[f"DROPPED_{why.name}"] for why in flows.Refusal}
# Alike in both catalogues, and plain numbers: an enumeration's member costs more than the count.
_RECEIVED, _FORWARDED, _OCTETS = range(3)


class Worker:
    """One process's share of the clients."""

    def __init__(
        self,
        shared: handover.Shared,
        number: int,
        found: settings.Relay,
        keyring: ufrag.Keyring,
        now: float,
    ) -> None:
        """Take over sockets, flows and counters of worker `number`, its first or a later one."""
        table, memory = found.relay, shared.memories[number]
        self._public, self._internal = shared.public[number], shared.internal[number]
        self._family = self._internal.family
        self._octets_max, self._size = table.datagram_octets_max, table.batch_size
        self._coalesce_s = table.coalesce_us * 1e-6
        self._keyring, self._clusters = keyring, settings.clusters(found.cluster)
        self.inbound_counters, self.outbound_counters = handover.counters_in(memory)
        self.flows = flows.Table(memory.section("flows"), handover.limits(table), now)
        batch = udp.best()
        shape = table.batch_size, table.datagram_octets_max
        ends = self._public, self._internal
        self._inbound = batch(memory.section("batch_in"), udp.Way.INBOUND, *shape, *ends)
        self._outbound = batch(memory.section("batch_out"), udp.Way.OUTBOUND, *shape, *ends[::-1])
        self._checks_per_s = self._checks_left = table.integrity_checks_per_s
        self._checks_renewed_at = now
        self._nowhere = bytes(frame.name_octets(self._family))

    def serve(self, link: socket.socket) -> None:
        """Relay until `link` becomes readable."""
        poll = select.poll()
        for sock in (self._public, self._internal, link):
            poll.register(sock, select.POLLIN)
        public, stop = self._public.fileno(), link.fileno()
        while True:
            ready = [fd for fd, _ in poll.poll(POLL_MS)]
            if stop in ready:
                return
            if self._coalesce_s and ready:
                time.sleep(self._coalesce_s)
            from_clients, from_transceivers = public in ready, self._internal.fileno() in ready
            # In turns, so that neither way starves while the other never runs dry; until a batch
            # comes back short, since waking up costs more than anything done with a datagram.
            for _ in range(ROUNDS_MAX):
                if from_clients:
                    from_clients = self.inbound()
                if from_transceivers:
                    from_transceivers = self.outbound()
                if not (from_clients or from_transceivers):
                    break
            self.flows.sweep(time.monotonic())

    def inbound(self) -> bool:
        """A batch from clients to transceivers; True if more may be waiting."""
        batch, table = self._inbound, self.flows
        n = batch.receive()
        if not n:
            return False
        headers, lengths, kinds = batch.read(n)
        hops: list[bytes | None] = list(map(table.hops.get, headers))
        to_judge = kinds.translate(stun.STUN_TABLE)
        # Media of clients that are known: nearly always all of the batch.
        if all(hops) and 1 not in to_judge and max(lengths) <= self._octets_max:
            holes: list[int] = []
            table.active.update(headers)
        else:
            holes = self._judge_inbound(headers, lengths, hops, to_judge)
        batch.direct(n, hops)  # type: ignore[arg-type]  # judged: no None is left
        refused = batch.send(n, holes)
        _count(self.inbound_counters, lengths, 0, holes, refused)
        return n == self._size

    def outbound(self) -> bool:
        """A batch from transceivers to clients; True if more may be waiting."""
        batch, table = self._outbound, self.flows
        n = batch.receive()
        if not n:
            return False
        headers, lengths, kinds = batch.read(n)
        sources = batch.sources(n)
        # Each frame comes from the transceiver that its client's flow leads to.
        if (
            tuple(map(table.hops.get, headers)) == sources
            and min(lengths) >= frame.HEADER_OCTETS
            and max(lengths) <= self._octets_max + frame.HEADER_OCTETS
        ):
            holes: list[int] = []
        else:
            holes = self._judge_outbound(headers, lengths, sources)
        if not table.watched.isdisjoint(headers):
            self._note_answers(headers, lengths, kinds, holes)
        refused = batch.send(n, holes)
        _count(self.outbound_counters, lengths, frame.HEADER_OCTETS, holes, refused)
        return n == self._size

    # --- one by one: what misses, and STUN ------------------------------------------------------

    def _judge_inbound(
        self,
        headers: tuple[bytes, ...],
        lengths: list[int],
        hops: list[bytes | None],
        stun_flags: bytes,
    ) -> list[int]:
        """Find the hops of all that is not media of a known client; returns what was dropped.

        Afterwards there is a hop for everything, for a hole one that is never used.
        """
        numbers, large = range(len(headers)), self._octets_max
        suspects = set(itertools.compress(numbers, map(operator.not_, hops)))
        suspects.update(itertools.compress(numbers, stun_flags))
        if max(lengths) > large:
            suspects.update(i for i in numbers if lengths[i] > large)
        holes: list[int] = []
        now, values = time.monotonic(), self.inbound_counters.values
        for i in sorted(suspects):
            verdict = self._route(headers[i], i, lengths[i], now)
            if isinstance(verdict, bytes):
                hops[i] = verdict
            else:
                values[verdict] += 1
                hops[i] = None
                holes.append(i)
        self.flows.active.update(itertools.compress(headers, hops))
        for i in holes:
            hops[i] = self._nowhere
        return holes

    def _route(self, header: bytes, i: int, length: int, now: float) -> bytes | metrics.Inbound:
        """Where datagram i of the batch goes, or why it goes nowhere."""
        if length > self._octets_max:
            return metrics.Inbound.DROPPED_OVERSIZED
        hop, payload = self.flows.hops.get(header), self._inbound.payload(i, length)
        if not length or stun.kind(payload[0]) is not stun.Kind.STUN:
            return metrics.Inbound.DROPPED_UNKNOWN_CLIENT if hop is None else hop
        request = stun.read_request(payload)
        if isinstance(request, stun.Malformed):
            # A known client may send indications and answers; what is broken ends here.
            if hop is not None and request is stun.Malformed.NOT_REQUEST:
                return hop
            return _MALFORMED[request]
        if hop is not None and self.flows.ufrag(header) == request.ufrag:
            return hop  # the transceiver checks its integrity
        return self._admit(header, payload, request, now)

    def _admit(
        self, header: bytes, payload: memoryview, request: stun.Request, now: float
    ) -> bytes | metrics.Inbound:
        """A check for a ufrag that this address has no flow for: open one if it is genuine."""
        hint = ufrag.parse(self._keyring, self._clusters, request.ufrag)
        if isinstance(hint, ufrag.Reject):
            return _REJECTED[hint]
        if now - self._checks_renewed_at >= 1.0:
            self._checks_renewed_at, self._checks_left = now, self._checks_per_s
        if not self._checks_left:
            return metrics.Inbound.DROPPED_INTEGRITY_LIMIT
        self._checks_left -= 1
        password = ufrag.password(self._keyring, request.ufrag)
        if password is None or not stun.check_integrity(payload, request, password):
            return metrics.Inbound.DROPPED_BAD_INTEGRITY
        hop = frame.name(str(hint.address), hint.port, self._family)
        refusal = self.flows.open(header, hop, request.ufrag, now)
        return hop if refusal is None else _REFUSED[refusal]

    def _judge_outbound(
        self, headers: tuple[bytes, ...], lengths: list[int], sources: tuple[bytes, ...]
    ) -> list[int]:
        """Count what must not be sent to a client; returns what was dropped."""
        holes: list[int] = []
        values = self.outbound_counters.values
        for i, (header, length, source) in enumerate(zip(headers, lengths, sources, strict=True)):
            drop = self._objection(header, length, source)
            if drop is not None:
                values[drop] += 1
                holes.append(i)
        return holes

    def _objection(self, header: bytes, length: int, source: bytes) -> metrics.Outbound | None:
        """Why a frame must not be sent to the client it names; None if it may."""
        if length > self._octets_max + frame.HEADER_OCTETS:
            return metrics.Outbound.DROPPED_OVERSIZED
        owner = self.flows.hops.get(header)
        if owner == source and length >= frame.HEADER_OCTETS:
            return None
        address, port = frame.endpoint(source)
        at = ipaddress.ip_address(address)
        if not any(cluster.contains(at, port) for cluster in self._clusters.values()):
            return metrics.Outbound.DROPPED_NOT_TRANSCEIVER
        if length < frame.HEADER_OCTETS or not frame.is_frame(header):
            return metrics.Outbound.DROPPED_BAD_FRAME
        return (
            metrics.Outbound.DROPPED_UNKNOWN_CLIENT
            if owner is None
            else metrics.Outbound.DROPPED_WRONG_OWNER
        )

    def _note_answers(
        self, headers: tuple[bytes, ...], lengths: list[int], kinds: bytes, holes: list[int]
    ) -> None:
        """A transceiver that sends something other than STUN has finished ICE with its client."""
        watched = self.flows.watched
        spoken = [
            header
            for i, header in enumerate(headers)
            if header in watched
            and lengths[i] > frame.HEADER_OCTETS
            and not stun.STUN_TABLE[kinds[i]]
            and i not in holes
        ]
        self.flows.answered(spoken, time.monotonic())


def _count(
    counters: metrics.Counters,
    lengths: list[int],
    header: int,
    holes: list[int],
    refused: list[int],
) -> None:
    """Count a batch: all of it, and what went on. The holes are counted already, by reason."""
    values, lost, octets = counters.values, len(holes) + len(refused), sum(lengths)
    n = len(lengths)
    if lost:
        values[counters.kinds["DROPPED_SEND_FAILED"]] += len(refused)
        octets -= sum(lengths[i] for i in (*holes, *refused))
    values[_RECEIVED] += n
    values[_FORWARDED] += n - lost
    values[_OCTETS] += octets - header * (n - lost)


# --- the program ----------------------------------------------------------------------------------


def load(path: Path) -> tuple[settings.Relay, ufrag.Keyring]:
    """The configuration and its keys. Raises settings.SettingsError."""
    found = settings.load(path, settings.Relay)
    if handover.internal_family(found.relay) == socket.AF_INET:
        for cluster in found.cluster:
            if cluster.prefix.network.version == 6:
                raise settings.SettingsError(
                    f"{path}: relay.internal: an IPv4 address cannot reach cluster {cluster.id}"
                )
    return found, found.keys.load()


def relay(found: settings.Relay, keyring: ufrag.Keyring) -> int:
    """Serve until told to stop; returns the exit code."""
    table = found.relay
    try:
        shared = handover.Shared(found)
    except OSError as error:
        _log.error("cannot open a socket: %s", error.strerror)
        return supervisor.Exit.ADDRESS
    granted = udp.receive_buffer_octets(shared.public[0])
    if granted < table.receive_buffer_octets:
        _log.warning("the kernel grants a buffer of %d octets: raise net.core.rmem_max", granted)
    try:
        host.publish(handover.state_file(table), handover.LAYOUT, shared.memories)
    except OSError as error:
        _log.warning("%s: relay flows and relay counters will not work", error)

    def work(number: int, link: socket.socket) -> int:
        worker = Worker(shared, number, found, keyring, time.monotonic())
        gc.freeze()
        link.send(supervisor.READY)
        worker.serve(link)
        return supervisor.Exit.STOPPED

    def ready() -> None:
        _log.info(
            "ready: %s, workers %s, %s",
            table.public,
            handover.workers(table),
            udp.best().__name__.lower(),
        )

    cpus = host.cpus()
    pins = [cpus[number % len(cpus)] for number in range(handover.workers(table))]
    try:
        return supervisor.Supervisor(pins, work, _log, ready).run()
    finally:
        handover.state_file(table).unlink(missing_ok=True)
        for way in zip(*map(handover.counters_in, shared.memories), strict=True):
            _log.info("stopped: %s", metrics.total(way))


cli = typer.Typer(
    help="The relay: forwards WebRTC datagrams to the transceiver that owns their session.",
    no_args_is_help=True,
    add_completion=False,
)
_Config = Annotated[Path, typer.Option("--config", help="The configuration file.", metavar="FILE")]


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """A wrong configuration is a sentence and an exit code, not a traceback."""
    try:
        yield
    except settings.SettingsError as error:
        typer.echo(error, err=True)
        raise typer.Exit(supervisor.Exit.CONFIGURATION) from error


@cli.command()
def run(config: _Config) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(name)s[%(process)d] %(levelname)s %(message)s",
    )
    with _exit_codes():
        raise typer.Exit(relay(*load(config)))


@cli.command()
def check(config: _Config) -> None:
    """Say whether the configuration can be used; exit status 78 and the reason if not."""
    with _exit_codes():
        found, keyring = load(config)
    table = found.relay
    typer.echo(
        f"{config}: ok: {handover.workers(table)} workers at {table.public},"
        f" {handover.limits(table).flows} flows each, {len(found.cluster)} cluster(s),"
        f" {len(keyring.keys)} key(s)"
    )


@cli.command("flows")
def show_flows(config: _Config) -> None:
    """Print the running relay's flows: client (masked), state, transceiver, age."""
    now = time.monotonic()
    for number, memory in enumerate(_attached(config)):
        for flow in flows.read_all(memory.section("flows")):
            client, (at, port) = frame.masked(flow.header), frame.endpoint(flow.hop)
            state, age_s = flow.state.name.lower(), now - flow.opened_at
            where = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
            typer.echo(f"worker {number}  {client:<28} {state:<9}  {where}  {age_s:.0f} s")


@cli.command()
def counters(config: _Config) -> None:
    """Print the running relay's counters as Prometheus reads them."""
    rows = list(map(handover.counters_in, _attached(config)))
    labels = [{"worker": str(number)} for number in range(len(rows))]
    for way, of_way in zip(("inbound", "outbound"), zip(*rows, strict=True), strict=True):
        pairs = list(zip(labels, of_way, strict=True))
        typer.echo(metrics.exposition(f"earshot_relay_{way}", pairs).decode(), nl=False)


def _attached(config: Path) -> list[host.Memory]:
    with _exit_codes():
        table = settings.load(config, settings.Relay).relay
    try:
        return host.attach(handover.state_file(table), handover.LAYOUT, handover.MEMORY)
    except (OSError, ValueError) as error:
        typer.echo(f"no relay of this configuration is running: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    cli()
