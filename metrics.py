"""Metrics: a catalogue of all that is counted, and its exposition.

What it owns: for each program an enumeration of what it counts (name, unit, help, what a non-zero
value means; the transceiver's are in vitals.py) and Prometheus' text of counters and histograms.
The numbers themselves are ledger.py's.

It samples nothing, serves nothing, knows no socket.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import ledger
import vitals

Transceiver = vitals.Transceiver
Timing = vitals.Timing


class Inbound(ledger.Kinds):
    """The relay, from clients to transceivers."""

    RECEIVED = "datagrams", "Taken from the public socket; at the transit face from other relays."
    FORWARDED = "datagrams", "Sent on to a transceiver."
    OCTETS = "octets", "Payload of what was forwarded, without the frame's header."
    RECOVERED = (
        "datagrams",
        "Sent on to a transceiver once the keeper had found their client's session.",
    )
    WAITING = "datagrams", "Waiting for the keeper to find their client's session.", "", True
    CONTROL = "datagrams", "Messages of other relays, at the transit face: meant for this one."
    DROPPED_NOT_RELAY = (
        "datagrams",
        "At the transit face, from outside relay_prefixes.",
        "A relay that the settings do not name, or somebody on the backbone who is none.",
    )
    DROPPED_BAD_FRAME = (
        "datagrams",
        "At the transit face, without the header that stands before a client's datagram.",
        "A relay of another version.",
    )
    DROPPED_BAD_TAG = (
        "datagrams",
        "At the transit face, without a tag under one of the keys.",
        "A relay with other keys or without tags, or somebody who is none.",
    )
    DROPPED_OVERSIZED = (
        "datagrams",
        "Larger than datagram_octets_max.",
        "No WebRTC client sends these: probing, or a setting below the clients' MTU.",
    )
    DROPPED_UNKNOWN_CLIENT = (
        "datagrams",
        "Not STUN, from an address without a flow, and nobody knows it or the SSRC of its media.",
        "Garbage, or media of a flow that has expired; its next STUN brings the flow back.",
    )
    DROPPED_LOOKUP_LIMIT = (
        "datagrams",
        "The same, without a look-up: lookups_per_s, or what may wait for one, was reached.",
        "A flood of garbage, or a whole relay's clients arriving at once.",
    )
    DROPPED_LOOKUP_FAILED = (
        "datagrams",
        "The same, and neither keeper nor Redis answered in time.",
        "Redis is down or slow: clients that come from a lost relay wait for their next STUN.",
    )
    DROPPED_RECOVERED_INVALID = (
        "datagrams",
        "The same, and what was found for the client opens no flow.",
        "A key was retired, a limit was reached (also of followers of one session), or others"
        " than relays write to Redis.",
    )
    DROPPED_OVERLOADED = (
        "datagrams",
        "From an address without a flow, while the socket did not run dry.",
        "A flood beyond what a CPU can judge: live flows are served before new ones.",
    )
    DROPPED_DRAINING = (
        "datagrams",
        "First checks of new sessions while the relay drains.",
        "Signaling still names this relay.",
    )
    DROPPED_STUN_TRUNCATED = (
        "datagrams",
        "STUN by its first octet, with a length that does not fit.",
        "Garbage or probing.",
    )
    DROPPED_STUN_MALFORMED = (
        "datagrams",
        "STUN without cookie, user name, integrity, or with a broken attribute or fingerprint.",
        "Garbage, probing, or a client that is not ICE.",
    )
    DROPPED_STUN_NOT_REQUEST = (
        "datagrams",
        "STUN, but no Binding Request, from an address without a flow.",
        "Answers or indications for a flow that has expired, or scanning for TURN servers.",
    )
    DROPPED_UFRAG_MALFORMED = (
        "datagrams",
        "A ufrag that is no hint: wrong length, alphabet or version.",
        "A client of another service, or a version that this relay does not know.",
    )
    DROPPED_UFRAG_UNKNOWN_KEY = (
        "datagrams",
        "A ufrag under a key id that the key file does not have.",
        "A transceiver mints with a key this relay has not got yet, or no longer.",
    )
    DROPPED_UFRAG_FORGED = (
        "datagrams",
        "A ufrag whose check octets do not match.",
        "Guessing, or one key id with different secrets on the two sides.",
    )
    DROPPED_UFRAG_UNKNOWN_CLUSTER = (
        "datagrams",
        "A ufrag that names a cluster that is not configured.",
        "The relay's file lacks a cluster that signaling sends here.",
    )
    DROPPED_UFRAG_OUTSIDE = (
        "datagrams",
        "A ufrag that names an address or port outside its cluster.",
        "The files of relay and transceiver disagree about the cluster's prefix or ports.",
    )
    DROPPED_BAD_INTEGRITY = (
        "datagrams",
        "A first check whose MESSAGE-INTEGRITY is wrong.",
        "Someone knows a ufrag but not its password: guessing, or a client with a stale answer.",
    )
    DROPPED_INTEGRITY_LIMIT = (
        "datagrams",
        "First checks over integrity_checks_per_s.",
        "A flood of first checks; new clients connect later, live flows do not notice.",
    )
    DROPPED_FLOWS_LIMIT = (
        "datagrams",
        "First checks while flows_max was reached.",
        "More clients than the relay is configured for.",
    )
    DROPPED_TENTATIVE_LIMIT = (
        "datagrams",
        "First checks while flows_tentative_max was reached.",
        "Replayed checks from many addresses, or transceivers that do not answer.",
    )
    DROPPED_ADDRESSES_LIMIT = (
        "datagrams",
        "First checks of a ufrag that already has addresses_per_ufrag_max flows.",
        "One client's check is replayed from many addresses.",
    )
    DROPPED_FLOW_HELD = (
        "datagrams",
        "Checks for another transceiver from the address of an assured flow that is alive.",
        "A replayed check, or a client that reuses a port within seconds of another call.",
    )
    DROPPED_SEND_FAILED = (
        "datagrams",
        "Refused by the kernel when sent to the transceiver.",
        "No route, or a firewall, or a send buffer that stayed full.",
    )


class Outbound(ledger.Kinds):
    """The relay, from transceivers to clients."""

    RECEIVED = "datagrams", "Taken from the internal socket."
    FORWARDED = "datagrams", "Sent on to a client."
    OCTETS = "octets", "Payload of what was forwarded, without the frame's header."
    CONTROL = "datagrams", "Messages of other clusters' relays: answers to probes, and questions."
    DROPPED_OVERSIZED = (
        "datagrams",
        "Larger than datagram_octets_max and a header.",
        "A transceiver that sends more than clients can receive.",
    )
    DROPPED_NOT_TRANSCEIVER = (
        "datagrams",
        "From an address or port outside every cluster.",
        "Something else sends to the internal port, or the clusters' prefixes are wrong.",
    )
    DROPPED_BAD_FRAME = (
        "datagrams",
        "Without the header that stands before every client's datagram.",
        "A transceiver of another version.",
    )
    DROPPED_UNKNOWN_CLIENT = (
        "datagrams",
        "For an address without a flow.",
        "A transceiver goes on sending to a client that has gone; harmless for a minute.",
    )
    DROPPED_WRONG_OWNER = (
        "datagrams",
        "For a client whose flow belongs to another transceiver.",
        "A client went from one transceiver to another, or a transceiver makes addresses up.",
    )
    DROPPED_SEND_FAILED = (
        "datagrams",
        "Refused by the kernel when sent to the client.",
        "No route, or a firewall, or a send buffer that stayed full.",
    )


class Way(ledger.Kinds):
    """The relay, a transit address of another cluster, as one worker finds it."""

    UP = "state", "1 while it answers, or has not been asked for long enough.", "", True
    DRAINING = "state", "1 while the relay there says that it drains.", "", True
    ROUND_TRIP = "microseconds", "Of the last probe that was answered.", "", True
    LOST = (
        "times",
        "It stopped answering, and its sessions were led to others.",
        "A relay that was restarted or lost, or a path through the backbone.",
    )
    INTRODUCED = "flows", "Led to it from another one that was lost or drains."
    KEY = "id", "Of the newest key that the relay there has.", "", True


class Signaling(ledger.Kinds):
    """Signaling: its requests, by how they ended."""

    OFFERS = "requests", "Offers received."
    ANSWERED = "requests", "Offers answered."
    REFUSED_OFFER = (
        "requests",
        "Offers that a client has to change: broken, or too large.",
        "A client that is not WebRTC, or one whose offers this version does not read.",
    )
    REFUSED_FULL = (
        "requests",
        "Offers that no transceiver took.",
        "All transceivers are full, draining or unreachable.",
    )
    SENT_ELSEWHERE = (
        "requests",
        "Offers that were sent to another cluster.",
        "All transceivers here are full, draining or unreachable, or the settings want it so.",
    )
    TRANSCEIVER_FAILED = (
        "requests",
        "Attempts on a transceiver that did not answer.",
        "A transceiver is down or overloaded; the next one was asked.",
    )
    TRANSCEIVER_REFUSED = (
        "requests",
        "Attempts on a transceiver that had no room; the next one was asked.",
        "Bursts, or transceivers that are full: add some.",
    )
    TRANSCEIVERS = "processes", "Transceivers that are known now.", "", True
    TRANSCEIVERS_SERVING = (
        "processes",
        "Of those, the ones that are expected to take a call.",
        "The others drain, are full, or do not answer.",
        True,
    )
    REDIS_UP = "state", "1 while Redis says which transceivers there are.", "", True
    HUNG_UP = "requests", "Calls ended by a request."
    CONNECTIONS = "connections", "Of clients, now.", "", True
    CONNECTIONS_REFUSED = (
        "connections",
        "Beyond what the settings allow: they were closed, or the one that idled longest.",
        "A flood; or a proxy that trusted_proxies does not name.",
    )
    CONNECTIONS_SLOW = (
        "connections",
        "Closed since no head of a request came in time.",
        "Clients on bad links, or somebody who holds connections.",
    )
    HANDSHAKES_FAILED = (
        "connections",
        "Ended before TLS was agreed on.",
        "Scanners, or clients that do not trust the certificate.",
    )


class Api(ledger.Kinds):
    """Signaling: the requests of one API, by how they ended."""

    PLACED = "requests", "Answered with a call."
    ANSWERED = "requests", "Others that were answered with what they asked for."
    REFUSED_REQUEST = (
        "requests",
        "Broken, or not possible here: 400, 405, 412, 415 and the like.",
        "A client that is somebody's new program, or probing.",
    )
    REFUSED_KEY = (
        "requests",
        "Without a key, or with one that may not do this: 401 and 403.",
        "A key that was changed on one side alone, or guessing.",
    )
    REFUSED_UNKNOWN = (
        "requests",
        "For a call or a path that does not exist: 404.",
        "Calls that had ended already; in numbers, probing.",
    )
    REFUSED_SLOW = (
        "requests",
        "Whose body came too slowly: 408.",
        "Clients on bad links, or somebody who holds connections.",
    )
    REFUSED_SIZE = "requests", "Larger than offer_octets_max: 413.", "Probing, mostly."
    REFUSED_LIMIT = (
        "requests",
        "Of a key or an address with too many requests or calls: 429.",
        "A customer that grows, or a program that repeats itself.",
    )
    UNAVAILABLE = (
        "requests",
        "That no transceiver answered: 503.",
        "All transceivers are full, draining or unreachable.",
    )
    FAULTS = (
        "requests",
        "That met a mistake in this program; the log has it.",
        "A defect: please report it.",
    )
    ABANDONED = "requests", "Broken off: by the client, or as signaling ended."
    IN_FLIGHT = "requests", "Being handled now, open WebSockets among them.", "", True


_REQUEST = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 8.0)
"""A request: 3 ms of signaling's own, 10 ms at the median and 50 at the 99th percentile are the
promise; at 8 s it is refused."""


class SignalingTiming(ledger.Measures):
    """What signaling times of the requests that end in a call."""

    PLACED = (
        "seconds",
        "From the request's headers to the answer.",
        _REQUEST,
        "Loaded or distant transceivers, or bodies that come slowly: the next two say which.",
    )
    OWN = (
        "seconds",
        "Of that, what neither the transceivers nor the client's body took.",
        _REQUEST,
        "An overloaded process: give signaling more of a CPU, or another instance.",
    )
    TRANSCEIVER = (
        "seconds",
        "Of that, what transceivers took, all that were asked.",
        _REQUEST,
        "Loaded transceivers, or some that do not answer and are asked first.",
    )


class Supervisor(ledger.Kinds):
    """The relay's supervisor."""

    DRAINING_UNTIL = (
        "milliseconds of CLOCK_MONOTONIC",
        "When a relay that drains ends at the latest; 0 while it serves.",
        "It was told to stop and serves what it has to the end.",
        True,
    )
    WORKERS_DIED = (
        "processes",
        "Workers that died or were killed for hanging; others took over.",
        "A defect, or somebody kills them: the log has the time and the process.",
    )
    KEEPER_DIED = (
        "processes",
        "Keepers that died.",
        "A defect: flows are not written to Redis and metrics stand still meanwhile.",
    )
    RELOADED = "times", "Configurations and keys read again by SIGHUP."


class Keeper(ledger.Kinds):
    """The relay's keeper: Redis, health, virtual addresses."""

    BEAT = "nanoseconds of CLOCK_MONOTONIC", "When it last looked at the workers.", "", True
    REDIS_UP = "state", "1 while Redis answers.", "", True
    DRAINED = "state", "1 when a relay that drains has no assured flow left.", "", True
    FLOWS_LEFT = "flows", "Flows of all workers when it was last looked.", "", True
    VIP_ANNOUNCED = "state", "1 while this host announces its virtual addresses.", "", True
    STORED = "flows", "Written to Redis, for the first time or again."
    STORE_DUE = (
        "flows",
        "Waiting to be written to Redis.",
        "Redis is down or slow: these clients would wait for their next STUN at another relay.",
        True,
    )
    STORE_FAILED = "batches", "Of flows that Redis did not take; tried again.", "Redis is down."
    LOOKUPS = "clients", "That workers asked about."
    LOOKUPS_HERE = "clients", "Asked about, and found in another worker's table."
    LOOKUPS_SSRC = (
        "clients",
        "Asked about, and found by the SSRC of their media.",
        "Their addresses changed: NATs that forget, or phones that move.",
    )
    LOOKUPS_FOUND = "clients", "Asked about, and found in Redis."
    LOOKUPS_UNKNOWN = "clients", "Asked about, and found nowhere."
    LOOKUPS_FAILED = (
        "clients",
        "Asked about, while Redis was down, slow, or asked for more than it could answer.",
        "Redis is down or slow, or somebody floods the relay.",
    )
    ANSWERS_LOST = (
        "clients",
        "Whose answer found no room in the worker's socket.",
        "A worker that stands still: the log of the supervisor has more.",
    )


class Worker(ledger.Kinds):
    """A worker of the relay, seen from the keeper."""

    FLOWS_TENTATIVE = "flows", "Whose transceiver has only answered checks yet.", "", True
    FLOWS_ASSURED = "flows", "Whose transceiver has finished ICE with its client.", "", True
    HEARD_AGO = (
        "milliseconds",
        "Since it last woke up; it does every second.",
        "Above a few thousand: it hangs, or the machine stood still.",
        True,
    )
    CPU = "milliseconds", "Of processor time that its present process has used."


class Socket(ledger.Kinds):
    """A socket of the relay: a worker's, towards clients or towards transceivers."""

    DROPPED = (
        "datagrams",
        "Dropped by the kernel before anybody could take them.",
        "The worker's CPU is exhausted, or receive_buffer_octets is too small for bursts.",
    )
    BUFFER_USED = "octets", "Waiting in the receive buffer, as the kernel counts it.", "", True
    BUFFER = "octets", "The receive buffer's size, as the kernel counts it.", "", True


class _Rows(Collector):
    """What prometheus-client asks for when it prints: no global registry, no copy kept."""

    def __init__(
        self, name: str, rows: Sequence[tuple[Mapping[str, str], ledger.Counters]]
    ) -> None:
        self._name, self._rows = name, rows

    def collect(self) -> Iterable[Metric]:
        if not self._rows:
            return
        labels = list(self._rows[0][0])
        for kind in self._rows[0][1].kinds:
            family: CounterMetricFamily | GaugeMetricFamily
            shape = GaugeMetricFamily if kind.gauge else CounterMetricFamily
            family = shape(f"{self._name}_{kind.name.lower()}", kind.help, labels=labels)
            for names, counters in self._rows:
                family.add_metric([names[label] for label in labels], counters[kind])
            yield family


def exposition(name: str, rows: Sequence[tuple[Mapping[str, str], ledger.Counters]]) -> bytes:
    """Prometheus' text of counters: a family `name_kind` a member, a line a row.

    All rows are of one enumeration and carry the same labels. Texts of different names may be
    joined.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Rows(name, rows))
    return generate_latest(registry)


class _Steps(Collector):
    """The same for histograms."""

    def __init__(self, name: str, histograms: ledger.Histograms) -> None:
        self._name, self._histograms = name, histograms

    def collect(self) -> Iterable[Metric]:
        for kind in self._histograms.kinds:
            steps = self._histograms.cumulative(kind)
            yield HistogramMetricFamily(
                f"{self._name}_{kind.name.lower()}_{kind.unit}",
                kind.help,
                buckets=[
                    ("+Inf" if step == math.inf else str(step), below) for step, below in steps
                ],
                sum_value=self._histograms.total(kind),
            )


def histograms(name: str, found: ledger.Histograms) -> bytes:
    """Prometheus' text of histograms: a family `name_kind_unit` a member."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Steps(name, found))
    return generate_latest(registry)
