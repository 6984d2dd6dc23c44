"""Where load goes, from where and by whom: found out, or refused, before the first datagram.

What it owns: `Wanted`, what a command line asked for; what of it contradicts itself; the relay,
which is one that runs or one that is started here; and the plan that the processes carry out.

Each refusal is one sentence that names what is wrong and, where there is one, the way out. Every
address that is sent to goes through target.py.

Rules that stay true: the key file of a relay that runs is read and never made; the transceiver lies
in one of the relay's clusters, with all its ports; sources are addresses of this machine.
"""

import contextlib
import ipaddress
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dev
import firsts
import observed
import rig
import steps
import target
from findings import Finding
from load import CLIENTS_AT, LOOPBACK
from loaders import Plan

import handover
import settings
import ufrag

ROUND_DATAGRAMS_MAX = 3_000_000
"""Of one process in one round: each takes 150 octets until the round is accounted."""

OWN_PREFIX = ipaddress.ip_network("127.0.0.0/8")


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    relay: str | None
    own: int
    config: Path
    transceiver: str
    elsewhere: bool
    clients: int
    rate: float
    seconds: float
    rounds: int
    processes: int
    sources: str | None
    steps: list[float]
    ramp: tuple[float, float] | None
    find: bool
    most: float | None
    pid: int | None
    metrics: str | None
    spin: bool | None
    patience_s: float
    owned: bool


def check(wanted: Wanted) -> None:
    """Refuse what contradicts itself. Raises ValueError."""
    if bool(wanted.relay) == bool(wanted.own):
        raise ValueError("say which relay: --relay HOST:PORT, or --own WORKERS to start one")
    if sum((bool(wanted.steps), bool(wanted.ramp), wanted.find)) > 1:
        raise ValueError("--steps, --ramp and --find are three ways: choose one")
    if wanted.most and not wanted.find:
        raise ValueError("--at-most bounds a search: it goes with --find")
    if wanted.own and (wanted.sources or wanted.elsewhere or wanted.pid or wanted.metrics):
        raise ValueError("--own is all on loopback: it goes with no address and no process")
    if wanted.processes > wanted.clients:
        raise ValueError(f"{wanted.processes} processes are more than {wanted.clients} clients")
    highest = max([wanted.clients * wanted.rate, *wanted.steps, *(wanted.ramp or ())])
    if highest > steps.RATE_MAX:
        raise ValueError(f"{highest:g} datagrams a second are more than {steps.RATE_MAX:g}")
    length = wanted.seconds if wanted.ramp else wanted.seconds / wanted.rounds
    if highest * length / wanted.processes > ROUND_DATAGRAMS_MAX:
        raise ValueError(
            f"a round of {length:g} s has {highest * length:.0f} datagrams, more than "
            f"{ROUND_DATAGRAMS_MAX} a process: take more --rounds or --processes"
        )
    if not wanted.own and not wanted.config.is_file():
        raise ValueError(f"{wanted.config} is not there: --config is the running relay's file")


def most(wanted: Wanted, trial_s: float) -> tuple[float, str]:
    """The highest rate that a search may try, with trials of so many seconds, and what bounds it:
    an account of more datagrams would take more memory than ROUND_DATAGRAMS_MAX stands for."""
    length = max(min(trial_s, wanted.seconds), wanted.seconds / wanted.rounds)
    room = min(ROUND_DATAGRAMS_MAX * wanted.processes / length, steps.RATE_MAX)
    if wanted.most and wanted.most <= room:
        return wanted.most, "--at-most"
    return room, f"what {wanted.processes} processes keep of a round (more --processes)"


def metrics(wanted: Wanted) -> str | None:
    """The page that `--metrics` names, if it may be asked. Raises target.TargetError."""
    try:
        return wanted.metrics and target.page(wanted.metrics, wanted.owned)
    except target.TargetError as error:
        raise target.TargetError(f"--metrics: {error}") from error


@dataclass(frozen=True)
class Place:
    """A relay, and what has to be known of it."""

    at: tuple[str, int]
    table: settings.RelayTable
    keyring: ufrag.Keyring
    clusters: tuple[ufrag.Cluster, ...]
    passed_on: bool = False
    """Other relays pass frames on to transceivers, so that they come from those."""


def frames_from(place: Place, at: tuple[str, int]) -> str:
    """The prefix that frames for a transceiver come from: the relay's internal address. Where that
    is any, or another relay's, loopback has them from loopback, and others from wherever."""
    internal = place.table.internal.address
    if internal.version == 4 and not internal.is_unspecified and not place.passed_on:
        return f"{internal}/32"
    return LOOPBACK if ipaddress.ip_address(at[0]).is_loopback else "0.0.0.0/0"


def home(place: Place, at: tuple[str, int], ports: int) -> ufrag.Cluster:
    """The cluster that a transceiver's ports lie in. Raises ValueError."""
    address = ipaddress.ip_address(at[0])
    for each in place.clusters:
        if each.contains(address, at[1]) and each.contains(address, at[1] + ports - 1):
            return each
    known = "; ".join(
        f"{each.id}: {each.prefix}, ports {each.first_port} to {each.last_port}"
        for each in place.clusters
    )
    wanted = f"{at[0]}:{at[1]}" + (f" to {at[1] + ports - 1}" if ports > 1 else "")
    raise ValueError(f"the transceiver {wanted} lies in no cluster of the relay ({known})")


def first_source(wanted: Wanted, relay: str) -> int:
    """The first client's address. Raises ValueError where this machine cannot send from one."""
    if wanted.sources is None:
        if not ipaddress.ip_address(relay).is_loopback:
            raise ValueError(
                f"clients of 127.0.0.0/8 do not get to {relay}: name addresses of this machine by "
                "--sources PREFIX (`ip route add local PREFIX dev lo` makes it the machine's)"
            )
        first, room = CLIENTS_AT, 2**24 - 2**16 - 2
    else:
        network = ipaddress.ip_network(wanted.sources, strict=False)
        if network.version != 4:
            raise ValueError(f"{network} is IPv6: clients' addresses are of one IPv4 prefix")
        one = network.num_addresses < 4
        first = int(network.network_address) + (not one)
        room = network.num_addresses - (0 if one else 2)
    if wanted.clients > room:
        raise ValueError(f"{wanted.clients} clients are more than {room} addresses of --sources")
    for number in (first, first + wanted.clients - 1):
        if not observed.is_here(address := str(ipaddress.IPv4Address(number))):
            raise ValueError(
                f"{address} of --sources is none of this machine's addresses "
                "(`ip route add local PREFIX dev lo` makes a whole prefix such)"
            )
    return first


@contextlib.contextmanager
def placed(wanted: Wanted, finding: Finding, cpus: list[int]) -> Iterator[Place]:
    """The relay: the one that was named, or one that is started and ended here."""
    if wanted.relay:
        found = settings.load(wanted.config, settings.Relay)
        at = target.endpoint(wanted.relay, wanted.owned)
        if ipaddress.ip_address(at[0]).version != 4:
            raise ValueError(f"{at[0]} is IPv6: this load is IPv4")
        clusters = tuple(settings.clusters(found.cluster).values())
        passed_on = any(each.transit for each in found.cluster)
        yield Place(at, found.relay, found.keys.load(), clusters, passed_on)
        return
    with tempfile.TemporaryDirectory(prefix="earshot-flood-") as folder:
        firsts.make_keys(Path(folder) / "keys")
        keyring = settings.load_keys(Path(folder) / "keys")
        rest = cpus[: -wanted.processes] or cpus
        setting = rig.Setting(
            folder=Path(folder),
            keyring=keyring,
            quick=False,
            seed=0,
            beside={},
            relay_cpus=set(rest),
            load_cpu=cpus[-1],
            part="flood",
        )
        room = max(65_536, 4 * wanted.clients)
        with rig.Relay(setting, workers=wanted.own, flows_max=room) as relay:
            cluster = ufrag.Cluster(1, OWN_PREFIX, 1, 65535)
            yield Place((relay.address, relay.public), relay.table(), keyring, (cluster,))
        finding.failures += setting.failures


def plan(wanted: Wanted, place: Place, seen: observed.Observed, cpus: list[int]) -> Plan:
    """Who sends where. Raises ValueError and target.TargetError."""
    limits = handover.limits(place.table)
    room = min(limits.tentative, limits.flows) * handover.workers(place.table)
    if wanted.clients > room:
        raise ValueError(
            f"{wanted.clients} clients are more than the relay opens flows for at once ({room}: "
            "flows_max and flows_tentative_max of its configuration)"
        )
    at = target.endpoint(wanted.transceiver, wanted.owned)
    ports = 1 if wanted.elsewhere else wanted.processes
    if wanted.own:  # whichever ports are free
        at = "127.0.0.1", dev.free_ports(ports, socket.SOCK_DGRAM)[0]
    cluster = home(place, at, ports)
    if not wanted.elsewhere and not observed.is_here(at[0]):
        raise ValueError(
            f"the transceiver's address {at[0]} is none of this machine's: run `flood.py echo` "
            "there, and say --remote-echo here"
        )
    busy = seen.cpus()
    free = [each for each in cpus if each not in busy]
    chosen = (free[::-1] + [each for each in cpus[::-1] if each in busy])[: wanted.processes]
    enough = wanted.processes <= len(free)
    address = ipaddress.ip_address(at[0])
    while len(chosen) < wanted.processes:
        chosen.append(chosen[len(chosen) % len(cpus)])
    return Plan(
        clients=wanted.clients,
        relay=place.at,
        transceiver=at,
        sources=first_source(wanted, place.at[0]),
        mint=lambda port: firsts.check(place.keyring, cluster, address, port),
        cpus=chosen,
        spin=enough if wanted.spin is None else wanted.spin,
        echoes=not wanted.elsewhere,
        patience_s=wanted.patience_s,
        frames_from=frames_from(place, at),
    )
