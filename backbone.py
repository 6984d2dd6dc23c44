"""The backbone: how a relay reaches a cluster that is elsewhere, through that cluster's relays.

    client -> entrance --- frames, unchanged ---> transit face of a cluster relay -> transceiver
              (worker.py)  <-- the same way back --  (transit.py)

A cluster has several transit addresses, one a worker of its relays. Here is which of them a session
goes by, and which of them can be reached.

What it owns: the choice and the health of transit addresses. parley.py has what relays say.

**The choice** is rendezvous hashing (highest random weight) by the session's ufrag: all addresses
of a client go the same way, at every entrance, and an address that is lost moves its own sessions
and no other.

**Health.** Each address is probed and answers: often where it has sessions and is silent, less so
where traffic shows that it is there, once a second without sessions. One that has neither answered
nor sent anything for `timeout_s` is lost. Traffic alone is believed half as long again and no
longer: a transceiver goes on sending for seconds where nothing of its client comes through any
more. Sessions of a lost one are led to others and introduced there; it is chosen again once it has
answered for `STEADY_S`. That it drains is in its answer, too. Where none can be reached, all of
them are tried, and the first one that answers speaks for all.

An answer counts if its body is one of our probes' of the last seconds: the moment, and octets that
nobody can make who does not know the worker's secret.

Sans-IO: `now` is an argument, in seconds. RFC 7363 (HRW in routing)
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import frame
import parley

PROBES = 5
"""In one `timeout_s`, of an address that has sessions and is silent or owes an answer: three in a
row may be lost."""

TALKING = 2.5
"""How many times rarer is an address probed from which datagrams come: traffic shows most of it."""

IDLE_S = 1.0
"""Between two probes of an address without sessions."""

USED_S = 10.0
"""An address that nothing of a session came from for so long has none."""

ONE_WAY = 1.5
"""How many `timeout_s` traffic alone is believed."""

STEADY_S = 5.0
"""How long an address must have answered again before it is chosen again: a path that flaps would
move the same sessions again and again."""

ANSWER_S_MAX = 3.0
"""Older answers are repetitions: no path takes so long."""

_TOKEN = struct.Struct("<I4s")
_TICKS_PER_S = 10_000
_TICKS = 1 << 32


@dataclass(slots=True)
class Way:
    """One transit address, as this worker has found it."""

    number: int
    """Among all of them, in the order of the configuration."""
    clusters: set[int]
    """A relay may stand before several."""
    salt: int
    """What its weights are made with."""
    answered_at: float
    """When it last answered a probe. At first: when it was first asked."""
    heard_at: float
    """When anything came from there."""
    used_at: float = float("-inf")
    """When it last carried something of a session, or was chosen for one."""
    probed_at: float = float("-inf")
    busy: bool = False
    """Whether it matters how soon it is found to be lost."""
    up: bool = True
    """Chosen before it has shown anything: a worker begins in the middle of calls."""
    steady_at: float = 0.0
    """When an address that answers again may be chosen again."""
    draining: bool = False
    round_trip_s: float = 0.0
    """Of the last probe that was answered."""

    @property
    def open(self) -> bool:
        """Whether sessions are to go this way."""
        return self.up and not self.draining


class Backbone:
    """The ways of one worker to all clusters that are elsewhere."""

    seen: set[bytes]
    """Socket addresses that frames came from. The hot path adds to it, `tend` empties it."""
    due: float
    """When `tend` has something to do again."""
    ways: dict[bytes, Way]
    """By socket address (frame.name)."""

    def __init__(
        self,
        groups: Mapping[int, Sequence[bytes]],
        timeout_s: float,
        now: float,
        secret: bytes = b"",
    ) -> None:
        """The transit addresses of each cluster by its id. `secret`: up to 64 octets."""
        self._groups, self._timeout_s, self._secret = groups, timeout_s, secret
        self._period_s = timeout_s / PROBES
        self.seen = set()
        self.due = self._planned_at = now
        self.ways = {}
        for cluster, names in groups.items():
            for name in names:
                # What a name stands for: an IPv4 socket and an IPv6 one choose alike.
                salt = _digest(repr(frame.endpoint(name)).encode())
                new = Way(len(self.ways), set(), salt, now, now)
                self.ways.setdefault(name, new).clusters.add(cluster)
        self.rank()

    def __contains__(self, cluster: int) -> bool:
        """Whether a cluster is reached this way."""
        return cluster in self._groups

    def rank(self) -> None:
        """Find out what there is to choose from: a change of a way shows after this."""
        self._choice: dict[int, list[tuple[int, bytes]]] = {}
        for cluster, names in self._groups.items():
            ways = [(self.ways[name], name) for name in names]
            best = [pair for pair in ways if pair[0].open]
            best = best or [pair for pair in ways if pair[0].up] or ways
            self._choice[cluster] = [(way.salt, name) for way, name in best]

    def choose(self, cluster: int, text: bytes) -> bytes:
        """The way of the session with this ufrag: 1 us, and 0.2 for each address there is.

        Raises KeyError for a cluster that is not reached this way.
        """
        digest = _digest(text)
        _, name = max([((digest ^ salt) * _FACTOR & _MASK, n) for salt, n in self._choice[cluster]])
        self.use(name)
        return name

    def use(self, name: bytes) -> None:
        """This way has a session: if it had none, it is asked at once whether it is there."""
        way = self.ways[name]
        way.used_at = _JUST_NOW
        if not way.busy:
            self.due = 0.0

    def same(self, one: bytes | None, other: bytes) -> bool:
        """Whether two socket addresses are transit addresses of one cluster."""
        first, second = self.ways.get(one or b""), self.ways.get(other)
        return first is not None and second is not None and bool(first.clusters & second.clusters)

    def answered(self, name: bytes, body: bytes, now: float) -> bool:
        """That address says that it answers a probe; false if it was none of ours. Where sessions
        are to leave it from now on, `tend` is due."""
        way = self.ways.get(name)
        token, state = body[: parley.PROBE_OCTETS], body[parley.PROBE_OCTETS :]
        ticks, _ = _TOKEN.unpack(token)
        ago_s = (_ticks(now) - ticks) % _TICKS / _TICKS_PER_S
        if way is None or ago_s > ANSWER_S_MAX or token != self._token(name, ticks):
            return False
        way.answered_at = way.heard_at = now
        way.round_trip_s = ago_s
        drains, way.draining = way.draining, state != b"\0"
        if drains != way.draining:
            self.rank()
            self.due = 0.0
        return True

    def begin(self, name: bytes, up: bool, draining: bool) -> None:
        """What a worker before this one knew of a way."""
        way = self.ways[name]
        way.up, way.draining = up, draining
        way.steady_at = _NEVER
        self.rank()

    def token(self, name: bytes, now: float) -> bytes:
        """The body of a probe of this way."""
        return self._token(name, _ticks(now))

    def _token(self, name: bytes, ticks: int) -> bytes:
        whole = name + ticks.to_bytes(4, "little")
        return _TOKEN.pack(ticks, hashlib.blake2b(whole, digest_size=4, key=self._secret).digest())

    def tend(self, now: float) -> tuple[list[bytes], list[bytes]]:
        """The addresses to probe now, and those that were lost since the last call.

        To be called when `due`.
        """
        late_s = now - self._planned_at
        if late_s > self._period_s:
            self._forgive(late_s)
        to_probe, lost, busy = [], [], False
        dark = self._dark()
        for name, way in self.ways.items():
            talks = name in self.seen
            if talks or way.used_at == _JUST_NOW:
                way.used_at = now
            if talks:
                way.heard_at = now
            way.busy, was = now - way.used_at < USED_S, way.busy
            if way.busy and not was and way.up:
                way.answered_at = way.heard_at = now  # nobody had asked it often enough
            quiet = talks and way.answered_at >= way.probed_at  # an answer that is late is no sign
            period_s = self._period_s * (TALKING if quiet else 1) if way.busy else IDLE_S
            if now - way.probed_at >= period_s * 0.95:
                way.probed_at = now
                to_probe.append(name)
            if self._judge(way, now, dark):
                lost.append(name)
            busy = busy or way.busy
        for cluster in dark - self._dark():
            self._believe(cluster, now)
        self.seen.clear()
        self.due = self._planned_at = now + (self._period_s if busy else IDLE_S)
        return to_probe, lost

    def _forgive(self, late_s: float) -> None:
        """This process had no CPU for so long: that silence has shown nothing."""
        for way in self.ways.values():
            if way.up:
                way.answered_at += late_s
                way.heard_at += late_s

    def _dark(self) -> set[int]:
        """Clusters of which no way is up."""
        lit = {cluster for way in self.ways.values() if way.up for cluster in way.clusters}
        return self._groups.keys() - lit

    def _believe(self, cluster: int, now: float) -> None:
        """All of its ways were lost, so it was something on our side: the first one that is heard
        again speaks for all. Else each session would be led to it, and stay."""
        for name in self._groups[cluster]:
            way = self.ways[name]
            if not way.up:
                way.up, way.answered_at, way.heard_at = True, now, now
        self.rank()

    def _judge(self, way: Way, now: float, dark: set[int]) -> bool:
        """Up or not; true if it was, and is no more."""
        patience_s = self._timeout_s + (0.0 if way.busy else 2 * IDLE_S)
        silent_s = now - max(way.answered_at, way.heard_at)
        unanswered_s = now - way.answered_at
        was = way.up
        if silent_s > patience_s or unanswered_s > patience_s * ONE_WAY:
            way.up, way.steady_at = False, _NEVER
        elif not way.up:
            if way.steady_at == _NEVER:
                way.steady_at = now + STEADY_S
            way.up = now >= way.steady_at or way.clusters <= dark
        if was != way.up:
            self.rank()
        return was and not way.up


_JUST_NOW = float("inf")
"""Since the last `tend`: only that knows what time it is."""

_NEVER = float("inf")

_FACTOR, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # the golden ratio's, odd: Fibonacci hashing


def _digest(octets: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(octets, digest_size=8).digest(), "big")


def _ticks(now: float) -> int:
    return int(now * _TICKS_PER_S) % _TICKS
