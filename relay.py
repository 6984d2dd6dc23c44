"""The relay: one public UDP address, and behind it the transceiver that owns each session.

    client  <- WebRTC, as it is ->  relay  <- the same behind a header (frame.py) ->  transceiver

A client becomes known by a STUN Binding Request whose ufrag names a transceiver (ufrag.py) and
whose MESSAGE-INTEGRITY proves that it was given that ufrag's password. From then on its datagrams
are forwarded by its address alone: worker.py has the life of a packet.

Here stands what is around it, three kinds of process:

    supervisor      forks the others, watches and replaces them (supervisor.py); nothing that blocks
    workers         one a CPU: datagrams, and nothing else (worker.py)
    keeper          Redis, metrics, virtual addresses (keeper.py); media goes on without it

What they work in, sockets and memory, is handover.py's and outlives each of them, and by a service
manager's store or `relay handover` the whole relay too.

Rules that stay true:
- The relay answers nothing. It sends to transceivers that a ufrag under its keys names, and to
  clients that have proved themselves, for the transceiver that owns their flow.
- SIGTERM drains: no new sessions, those that are here are served to their end or the deadline. A
  second one, or SIGINT, ends at once. SIGHUP reads configuration and keys again.
- A configuration that cannot be used changes nothing of a relay that runs.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

import flows
import frame
import handover
import host
import journal
import keeper
import ledger
import metrics
import settings
import sockets
import succession
import supervisor
import top
import udp
import ufrag
import worker

_log = logging.getLogger("relay")

FIXED = (
    *("public", "internal", "workers", "batch_size", "datagram_octets_max", "flows_max"),
    *("receive_buffer_octets", "state_dir", "metrics"),
)
"""Keys of `[relay]` that sockets and memory are made by: a reload cannot change them."""


class Relay:
    """The supervisor's side of a running relay."""

    def __init__(self, path: Path, successor: succession.Successor | None = None) -> None:
        """Make or take over what the workers share. Raises settings.SettingsError and OSError."""
        self._path, self._successor, self._kept = path, successor, False
        self._found, self._keyring = load(path)
        table = self._found.relay
        self._state = handover.state_file(table)
        self._shared = handover.Shared(self._found, successor.estate if successor else None)
        granted = sockets.receive_buffer_octets(self._shared.public[0])
        if granted < table.receive_buffer_octets:
            _log.warning("the kernel grants buffers of %d octets: raise net.core.rmem_max", granted)
        self._counted = ledger.Counters(
            metrics.Supervisor, self._shared.relay.section("supervisor")
        ).values
        own = ledger.Counters(metrics.Keeper, self._shared.relay.section("keeper"))
        self._drained = functools.partial(own.__getitem__, metrics.Keeper.DRAINED)
        cpus = host.cpus()
        beats = [memory.section("control").cast("Q") for memory in self._shared.memories]
        self._supervisor = supervisor.Supervisor(
            [cpus[number % len(cpus)] for number in range(handover.workers(table))],
            self._work,
            _log,
            self._ready,
            others=[supervisor.Role("keeper", self._keep, beat=lambda: own[metrics.Keeper.BEAT])],
            beat=lambda number: int(beats[number][handover.Control.BEAT]),
            on_death=self._died,
            on_reload=self._reload,
            on_drain=self._drain,
            drained=self._is_drained,
        )
        self._testator = succession.Testator(
            socket_file(table), self._supervisor, self._shared.descriptors, self._publish
        )

    def run(self) -> int:
        """Serve until told to stop, or until a successor serves; returns the exit code."""
        try:
            if self._successor:
                self._successor.go()
                self._shared.settle()
                self._successor.follow(self._supervisor)
            self._publish()
            code = self._supervisor.run()
        except succession.SuccessionError as error:
            _log.error("%s", error)
            return supervisor.Exit.SUCCESSION
        finally:
            self._testator.close()
            host.unpublish(self._state)
        self._retire(code)
        for what, memories in (
            ("stopped", self._shared.memories),
            ("stopped: transit", [face.memory for face in self._shared.faces if face]),
        ):
            for way in zip(*map(handover.counters_in, memories), strict=True):
                _log.info("%s: %s", what, ledger.total(way))
        return code

    def _retire(self, code: int) -> None:
        """Virtual addresses go with the relay, unless another takes over what is sent to them."""
        draining = self._counted[metrics.Supervisor.DRAINING_UNTIL]
        if self._testator.succeeded or self._found.vip is None:
            return
        if self._kept and not draining and code == supervisor.Exit.STOPPED:
            _log.info("virtual addresses stay: the service manager keeps the sockets")
            return
        keeper.retire(self._found.vip, _log)

    # --- in the children --------------------------------------------------------------------------

    def _work(self, number: int, link: socket.socket) -> int:
        self._shared.memories[number].claim()
        if face := self._shared.faces[number]:
            face.memory.claim()
        works = worker.Worker(self._shared, number, self._found, self._keyring, time.monotonic())
        left = works.take_over()
        if left:
            _log.info("worker %d finished %d datagrams that its predecessor held", number, left)
        gc.freeze()
        link.send(supervisor.READY)
        works.serve(link)
        return supervisor.Exit.STOPPED

    def _keep(self, link: socket.socket) -> int:
        return keeper.run(link, self._shared, self._found, logging.getLogger("keeper"))

    # --- in the supervisor ------------------------------------------------------------------------

    def _publish(self) -> None:
        try:
            self._shared.publish(self._state)
        except OSError as error:
            _log.warning("%s: relay flows, top and the like will not work", error)

    def _ready(self) -> None:
        self._kept = self._shared.store()
        if self._successor:
            self._successor.serving()
        try:
            self._testator.listen()
        except OSError as error:
            _log.warning("%s: relay handover will not work", error)
        table, batch = self._found.relay, udp.best().__name__.lower()
        _log.info("ready: %s, workers %s, %s", table.public, handover.workers(table), batch)

    def _died(self, role: supervisor.Role) -> None:
        kind = metrics.Supervisor.WORKERS_DIED if role.vital else metrics.Supervisor.KEEPER_DIED
        self._counted[kind] += 1

    def _drain(self) -> None:
        until_ms = time.monotonic() * 1000 + self._found.relay.drain_s * 1000
        self._counted[metrics.Supervisor.DRAINING_UNTIL] = max(1, int(until_ms))

    def _is_drained(self) -> bool:
        late = time.monotonic() * 1000 >= self._counted[metrics.Supervisor.DRAINING_UNTIL]
        return late or bool(self._drained())

    def _reload(self) -> bool:
        """Read configuration and keys again; what is forked from now on works by them."""
        try:
            found, keyring = load(self._path)
        except settings.SettingsError as error:
            _log.error("%s: going on with the configuration from before", error)
            return False
        before = self._found
        kept = {}
        for key in FIXED:
            if str(getattr(found.relay, key)) != str(getattr(before.relay, key)):
                _log.warning("relay.%s is changed by a restart, and not by a reload", key)
                kept[key] = getattr(before.relay, key)
        recovery, waiting_max = found.recovery, before.recovery.waiting_max
        if recovery.waiting_max != waiting_max:
            _log.warning("recovery.waiting_max is changed by a restart, and not by a reload")
            recovery = msgspec.structs.replace(recovery, waiting_max=waiting_max)
        transit, old = found.transit, before.transit
        if (transit.listen, transit.internal) != (old.listen, old.internal):
            _log.warning(
                "transit.listen and .internal are changed by a restart, and not by a reload"
            )
            prefixes = transit.relay_prefixes or old.relay_prefixes
            transit = msgspec.structs.replace(
                transit, listen=old.listen, internal=old.internal, relay_prefixes=prefixes
            )
        table = msgspec.structs.replace(found.relay, **kept)
        self._found = msgspec.structs.replace(
            found, relay=table, recovery=recovery, transit=transit
        )
        self._keyring = keyring
        self._counted[metrics.Supervisor.RELOADED] += 1
        ids = ", ".join(map(str, sorted(keyring.keys)))
        _log.info("configuration read again: keys %s, %d cluster(s)", ids, len(found.cluster))
        return True


def load(path: Path) -> tuple[settings.Relay, ufrag.Keyring]:
    """The configuration and its keys. Raises settings.SettingsError."""
    found = settings.load(path, settings.Relay)
    if handover.internal_family(found.relay) == socket.AF_INET:
        for cluster in found.cluster:
            if cluster.prefix.network.version == 6 and not cluster.transit:
                raise settings.SettingsError(
                    f"{path}: relay.internal: an IPv4 address cannot reach cluster {cluster.id}"
                )
    return found, found.keys.load()


def socket_file(table: settings.RelayTable) -> Path:
    """Where a running relay waits for its successor."""
    return handover.state_file(table).with_suffix(".sock")


# --- the command line -----------------------------------------------------------------------------

cli = typer.Typer(
    help="The relay: forwards WebRTC datagrams to the transceiver that owns their session.",
    no_args_is_help=True,
    add_completion=False,
)
_Config = Annotated[Path, typer.Option("--config", help="The configuration file.", metavar="FILE")]
_LogFormat = Annotated[
    journal.Form, typer.Option("--log-format", envvar=journal.VARIABLE, help=journal.HELP)
]


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """A wrong configuration is a sentence and an exit code, not a traceback."""
    try:
        yield
    except settings.SettingsError as error:
        typer.echo(error, err=True)
        raise typer.Exit(supervisor.Exit.CONFIGURATION) from error


@cli.command()
def run(config: _Config, log_format: _LogFormat = "text") -> None:
    """Serve until SIGINT, or until drained after SIGTERM."""
    raise typer.Exit(_serve(config, log_format))


@cli.command("handover")
def hand_over(config: _Config, log_format: _LogFormat = "text") -> None:
    """Take over from the relay of this configuration that runs, and serve in its place."""
    raise typer.Exit(_serve(config, log_format, succeed=True))


def _serve(config: Path, log_format: journal.Form, succeed: bool = False) -> int:
    journal.configure(log_format, processes=True)
    with _exit_codes():
        found, _ = load(config)
        try:
            successor = succession.Successor(socket_file(found.relay)) if succeed else None
            serves = Relay(config, successor)
        except succession.SuccessionError as error:
            _log.error("%s", error)
            return supervisor.Exit.SUCCESSION
        except OSError as error:
            _log.error("cannot open a socket: %s", error.strerror or error)
            return supervisor.Exit.ADDRESS
    return serves.run()


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
    if ways := sum(len(cluster.ways()) for cluster in found.cluster):
        typer.echo(f"{ways} transit address(es) of other clusters' relays")
    if found.transit.listen:
        typer.echo(f"a transit face at {found.transit.listen}, and the next ports for more workers")


@cli.command("flows")
def show_flows(config: _Config) -> None:
    """Print the running relay's flows: client (masked), state, transceiver, age, request id: the
    one that signaling and the transceiver have in their logs."""
    now = time.monotonic()
    workers, faces, _ = _attached(config)
    with _exit_codes():
        found, keyring = load(config)
    clusters = settings.clusters(found.cluster)
    for kind, memories in (("worker ", workers), ("transit", faces)):
        for number, memory in enumerate(memories):
            for flow in flows.read_all(memory.section("flows")):
                client, (at, port) = frame.masked(flow.header), frame.endpoint(flow.hop)
                state, age_s = flow.state.name.lower(), now - flow.opened_at
                where = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
                hint = ufrag.parse(keyring, clusters, flow.ufrag)
                request = f"{hint.nonce:08x}" if isinstance(hint, ufrag.Hint) else hint.name.lower()
                line = f"{client:<28} {state:<9}  {where}  {age_s:.0f} s  {request}"
                typer.echo(f"{kind} {number}  {line}")


@cli.command()
def counters(config: _Config) -> None:
    """Print the running relay's counters as Prometheus reads them."""
    workers, faces, _ = _attached(config)
    for prefix, memories in (("", workers), ("transit_", faces)):
        rows = list(map(handover.counters_in, memories))
        labels = [{"worker": str(number)} for number in range(len(rows))]
        for way, of_way in zip(("inbound", "outbound"), zip(*rows, strict=True), strict=False):
            pairs = list(zip(labels, of_way, strict=True))
            text = metrics.exposition(f"earshot_relay_{prefix}{way}", pairs)
            typer.echo(text.decode(), nl=False)


def _attached(config: Path) -> handover.Running:
    with _exit_codes():
        table = settings.load(config, settings.Relay).relay
    with _running():
        return handover.Running.of(table)


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """Without a relay there is nothing to see: a sentence, and exit status 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"no relay of this configuration is running: {error}", err=True)
        raise typer.Exit(1) from error


@cli.command("top")
def show_top(
    config: _Config,
    once: Annotated[bool, typer.Option("--once", help="One view, as plain text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One view, as JSON.")] = False,
) -> None:
    """Watch the running relay: rates, flows, drops, CPU a worker."""
    with _exit_codes():
        found = settings.load(config, settings.Relay)
    with _running():
        top.run(found, once=once, as_json=as_json)


@cli.command()
def drain(
    config: _Config,
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
) -> None:
    """Have the running relay serve what it has to the end and stop; exit status 1 if none runs."""
    own = _attached(config).own
    if not status:
        table = settings.load(config, settings.Relay).relay
        with _running():
            os.kill(json.loads(handover.state_file(table).read_text())["pid"], signal.SIGTERM)
        typer.echo("draining: relay drain --status says how far it is")
        return
    until_ms = ledger.Counters(metrics.Supervisor, own.section("supervisor"))[
        metrics.Supervisor.DRAINING_UNTIL
    ]
    left = ledger.Counters(metrics.Keeper, own.section("keeper"))[metrics.Keeper.FLOWS_LEFT]
    if not until_ms:
        typer.echo(f"serving: {left} flows")
        return
    left_s = max(0.0, until_ms / 1000 - time.monotonic())
    typer.echo(f"draining: {left} flows left, {left_s:.0f} s to the deadline")


if __name__ == "__main__":
    cli()
