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
import itertools
import logging
import operator
import select
import socket
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

import flows
import frame
import gate
import handover
import host
import ledger
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

POLL_S = 1.0
"""Longest sleep of an idle worker: how late a sweep may be."""

JUDGED_MAX = 8
"""Datagrams of unknown clients judged in a batch while the public socket does not run dry. A judged
one costs some ten times what a known client's does; the rest of them are dropped unread, so that a
flood costs little more than its receipt. More of them let fewer live datagrams through, fewer make
honest newcomers try longer."""


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
        self.inbound_ledger, self.outbound_ledger = handover.counters_in(memory)
        self._beat = memory.section("control").cast("Q")[handover.Control.BEAT :]
        self._supervisor = ledger.Counters(
            metrics.Supervisor, shared.relay.section("supervisor")
        ).values
        self.flows = flows.Table(memory.section("flows"), handover.limits(table), now)
        self._gate = gate.Gate(
            keyring,
            settings.clusters(found.cluster),
            self.flows,
            self._family,
            table.datagram_octets_max,
            table.integrity_checks_per_s,
            now,
        )
        batch = udp.best()
        shape = table.batch_size, table.datagram_octets_max
        ends = self._public, self._internal
        self._inbound = batch(memory.section("batch_in"), udp.Way.INBOUND, *shape, *ends)
        self._outbound = batch(memory.section("batch_out"), udp.Way.OUTBOUND, *shape, *ends[::-1])
        self._nowhere = bytes(frame.name_octets(self._family))
        self._overloaded = False

    def take_over(self) -> int:
        """Finish what the process before had received and not yet counted; returns how many."""
        inbound, outbound = self._inbound, self._outbound
        n = inbound.in_hand(self.inbound_ledger.mark)
        if n:
            self._pass_inbound(n, inbound.sent(n))
        m = outbound.in_hand(self.outbound_ledger.mark)
        if m:
            self._pass_outbound(m, outbound.sent(m))
        return n + m

    def serve(self, link: socket.socket) -> None:
        """Relay until `link` becomes readable."""
        poll = select.epoll()
        for sock in (self._public, self._internal, link):
            poll.register(sock, select.EPOLLIN)
        public, internal, stop = self._public.fileno(), self._internal.fileno(), link.fileno()
        while True:
            ready = dict(poll.poll(POLL_S))
            if stop in ready:
                return
            if self._coalesce_s and ready:
                time.sleep(self._coalesce_s)
            from_clients, from_transceivers = public in ready, internal in ready
            # In turns, so that neither way starves while the other never runs dry; until a batch
            # comes back short, since waking up costs more than anything done with a datagram.
            for _ in range(ROUNDS_MAX):
                if from_clients:
                    from_clients = self.inbound()
                if from_transceivers:
                    from_transceivers = self.outbound()
                if not (from_clients or from_transceivers):
                    break
            self._overloaded = from_clients
            now_ns = time.monotonic_ns()
            self._beat[0] = now_ns
            self.flows.sweep(now_ns * 1e-9)

    def inbound(self) -> bool:
        """A batch from clients to transceivers; True if more may be waiting."""
        n = self._inbound.receive()
        if n:
            self._pass_inbound(n)
        return n == self._size

    def _pass_inbound(self, n: int, sent: Sequence[int] = ()) -> None:
        """Send n datagrams on, but for those that were `sent` already, and count all of them."""
        batch, table = self._inbound, self.flows
        headers, lengths, kinds = batch.read(n)
        hops: list[bytes | None] = list(map(table.hops.get, headers))
        to_judge = kinds.translate(stun.STUN_TABLE)
        # Media of clients that are known: nearly always all of the batch.
        if all(hops) and 1 not in to_judge and max(lengths) <= self._octets_max:
            holes = _NONE
            table.active.update(headers)
        else:
            holes = self._judge_inbound(headers, lengths, hops, to_judge, sent)
        batch.direct(n, hops)  # type: ignore[arg-type]  # judged: no None is left
        refused = batch.send(n, _skipped(holes, sent))
        _book(self.inbound_ledger, batch.number, lengths, 0, holes, refused)

    def outbound(self) -> bool:
        """A batch from transceivers to clients; True if more may be waiting."""
        n = self._outbound.receive()
        if n:
            self._pass_outbound(n)
        return n == self._size

    def _pass_outbound(self, n: int, sent: Sequence[int] = ()) -> None:
        """As `_pass_inbound`, the other way."""
        batch, table = self._outbound, self.flows
        headers, lengths, kinds = batch.read(n)
        sources = batch.sources(n)
        # Each frame comes from the transceiver that its client's flow leads to.
        if (
            tuple(map(table.hops.get, headers)) == sources
            and min(lengths) >= frame.HEADER_OCTETS
            and max(lengths) <= self._octets_max + frame.HEADER_OCTETS
        ):
            holes = _NONE
        else:
            holes = self._judge_outbound(headers, lengths, sources, sent)
        if not table.watched.isdisjoint(headers):
            self._note_answers(headers, lengths, kinds, holes)
        refused = batch.send(n, _skipped(holes, sent))
        _book(self.outbound_ledger, batch.number, lengths, frame.HEADER_OCTETS, holes, refused)

    # --- one by one: what misses, and STUN ------------------------------------------------------

    def _judge_inbound(
        self,
        headers: tuple[bytes, ...],
        lengths: list[int],
        hops: list[bytes | None],
        stun_flags: bytes,
        sent: Sequence[int],
    ) -> dict[int, ledger.Kinds]:
        """Find the hops of all that is not media of a known client; returns the holes: what goes
        nowhere, and the counter for it.

        Afterwards there is a hop for everything, for a hole one that is never used.
        """
        numbers, large = range(len(headers)), self._octets_max
        holes: dict[int, ledger.Kinds] = {}
        unknown = list(itertools.compress(numbers, map(operator.not_, hops)))
        if self._overloaded and len(unknown) > JUDGED_MAX:
            holes = dict.fromkeys(unknown[JUDGED_MAX:], metrics.Inbound.DROPPED_OVERLOADED)
            del unknown[JUDGED_MAX:]
        suspects = {*unknown, *itertools.compress(numbers, stun_flags)} - holes.keys()
        if max(lengths) > large:
            suspects.update(i for i in numbers if lengths[i] > large and i not in holes)
        suspects.difference_update(sent)
        self._gate.draining = self._supervisor[metrics.Supervisor.DRAINING_UNTIL] > 0
        now = time.monotonic()
        for i in sorted(suspects):
            payload = self._inbound.payload(i, lengths[i])
            verdict = self._gate.inbound(headers[i], payload, lengths[i], now)
            if isinstance(verdict, bytes):
                hops[i] = verdict
            else:
                holes[i] = metrics.Inbound.DROPPED_UNKNOWN_CLIENT if verdict is None else verdict
                hops[i] = None
        self.flows.active.update(itertools.compress(headers, hops))
        for i in itertools.compress(numbers, map(operator.not_, hops)):
            hops[i] = self._nowhere
        return holes

    def _judge_outbound(
        self,
        headers: tuple[bytes, ...],
        lengths: list[int],
        sources: tuple[bytes, ...],
        sent: Sequence[int],
    ) -> dict[int, ledger.Kinds]:
        """What must not be sent to a client, and the counter for it."""
        holes: dict[int, ledger.Kinds] = {}
        for i, (header, length, source) in enumerate(zip(headers, lengths, sources, strict=True)):
            drop = self._gate.outbound(header, length, source)
            if drop is not None and i not in sent:
                holes[i] = drop
        return holes

    def _note_answers(
        self, headers: tuple[bytes, ...], lengths: list[int], kinds: bytes, holes: Container[int]
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


_NONE: dict[int, ledger.Kinds] = {}
"""The holes of a batch that has none. Nobody writes into it."""


def _skipped(holes: Mapping[int, object], sent: Sequence[int]) -> Sequence[int]:
    return sorted({*holes, *sent}) if holes or sent else ()


def _book(
    book: ledger.Ledger,
    number: int,
    lengths: list[int],
    header: int,
    holes: Mapping[int, ledger.Kinds],
    refused: Sequence[int],
) -> None:
    """Count a batch: all of it, what went on, and why the rest did not."""
    n, octets = len(lengths), sum(lengths)
    if not (holes or refused):
        book.book(number, n, n, octets - header * n)
        return
    failed = book.kinds["DROPPED_SEND_FAILED"]
    reasons = [*holes.values(), *(failed for _ in refused)]
    octets -= sum(lengths[i] for i in (*holes, *refused))
    passed = n - len(reasons)
    book.book(number, n, passed, octets - header * passed, reasons)


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
        left = worker.take_over()
        if left:
            _log.info("worker %d finished %d datagrams that its predecessor held", number, left)
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
            _log.info("stopped: %s", ledger.total(way))


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
