"""The entrance: what a worker does, beside its datagrams, for sessions of clusters elsewhere.

What it owns: the worker's end of the backbone (backbone.py has the choice and the health, parley.py
the messages): probes, answers, questions; moving flows from a way that is lost or drains to another
one, and introducing their clients there; the tags on frames, where relays use them.

Rules that stay true:
- Flows are moved some at a time, between batches: a worker with 60,000 of them goes on forwarding.
- What is sent to a client's new way first is its introduction.
- Only transit addresses of the configuration are spoken to, and listened to.

It judges no client: gate.py does.
"""

import collections
import os
import socket
import zlib
from collections.abc import Sequence

import backbone
import flows
import frame
import gate
import ledger
import metrics
import parley
import settings
import udp

STAMPS_MORE = 1024
"""Tags that are remembered beyond the flows there are."""

MOVES_AT_ONCE = 128
"""Flows moved between two batches, some 25 us each: 3 ms in which datagrams wait in their queue."""


def ways_of(found: settings.Relay, family: int, now: float) -> backbone.Backbone:
    """The ways of a configuration, as a socket of that family reaches them."""
    groups = {
        cluster.id: [frame.name(each.address, each.port, family) for each in cluster.ways()]
        for cluster in found.cluster
        if cluster.transit
    }
    return backbone.Backbone(groups, found.transit.timeout_s, now, os.urandom(16))


def clusters_of(found: settings.Relay) -> dict[int, set[str]]:
    """The transit addresses of each cluster that has any."""
    return {each.id: set(map(str, each.ways())) for each in found.cluster if each.transit}


def addresses_of(found: settings.Relay) -> list[str]:
    """The ways' addresses by their numbers."""
    every = (each for cluster in found.cluster for each in cluster.ways())
    return [str(each) for each in dict.fromkeys(every)]


def rows_in(memory: memoryview, count: int) -> list[ledger.Counters]:
    """What a worker says of each way, for others to read."""
    octets, rows = ledger.octets(metrics.Way), memory[_MARK_OCTETS:]
    return [
        ledger.Counters(metrics.Way, rows[at : at + octets])
        for at in range(0, count * octets, octets)
    ]


def _begin_rows(memory: memoryview, ways: backbone.Backbone) -> list[ledger.Counters]:
    """Rows of a configuration with other ways would be read under wrong addresses: they go."""
    mark, now = memory[:_MARK_OCTETS].cast("Q"), zlib.crc32(b"".join(ways.ways))
    if mark[0] != now:
        memory[_MARK_OCTETS:] = bytes(len(memory) - _MARK_OCTETS)
        mark[0] = now
    return rows_in(memory, len(ways.ways))


_MARK_OCTETS = 8

_STANDINGS = {
    flows.Origin.CHECKED: parley.Standing.CHECKED,
    flows.Origin.FAR: parley.Standing.FAR,
    flows.Origin.NEAR: parley.Standing.NEAR,
}


class Entrance:
    """One worker's."""

    def __init__(
        self,
        sock: socket.socket,
        ways: backbone.Backbone,
        tags: parley.Tags,
        table: flows.Table,
        judge: gate.Gate,
        memory: memoryview,
    ) -> None:
        """Speak from `sock`, the one towards transceivers; `memory` is for `rows_in`."""
        self._socket, self._ways, self._tags = sock, ways, tags
        self._flows, self._gate = table, judge
        self._rows = _begin_rows(memory, ways)
        self._keys = {name: parley.Keys(tags.keys) for name in ways.ways}
        self._recall()
        self._open = self._opened()
        for hop in ways.ways.keys() & set(table.hops.values()):
            ways.use(hop)
        at = sock.getsockname()
        self._address = frame.packed_address(
            frame.name(at[0].partition("%")[0], at[1], sock.family)
        )
        self._stamps: dict[bytes, bytes] = {}
        self._moving: collections.deque[bytes] = collections.deque()
        # The configuration was another one when these were opened.
        self._move_from({hop for hop in set(table.hops.values()) if self._is_stray(hop)})

    def _is_stray(self, hop: bytes) -> bool:
        return hop not in self._ways.ways and not self._gate.is_direct(hop)

    def _recall(self) -> None:
        """What a worker before this one had found: a way is lost, or drains, or has a newer key."""
        kinds = metrics.Way
        for name, way in self._ways.ways.items():
            row = self._rows[way.number]
            if row[kinds.UP] and row[kinds.KEY] in self._tags.keys:
                self._keys[name].best = row[kinds.KEY]
            lost = bool(row[kinds.LOST]) and not row[kinds.UP]
            if lost or row[kinds.DRAINING]:
                self._ways.begin(name, up=not lost, draining=bool(row[kinds.DRAINING]))

    @property
    def moving(self) -> bool:
        """True while there are flows to move."""
        return bool(self._moving)

    # --- frames -----------------------------------------------------------------------------------

    def stamp(self, batch: udp.Batch, headers: Sequence[bytes]) -> None:
        """Put the tags on a batch of frames."""
        stamps = list(map(self._stamps.get, headers))
        if None in stamps:
            stamps = list(map(self.stamp_of, headers))
        batch.stamp(len(headers), stamps)  # type: ignore[arg-type]

    def stamp_of(self, header: bytes) -> bytes:
        """A client's tag. Strangers' are not remembered, and not sent."""
        if header not in self._flows.hops:
            return parley.NO_TAG
        found = self._stamps.get(header)
        if found is None:
            if len(self._stamps) > len(self._flows.hops) + STAMPS_MORE:
                self._stamps.clear()  # of clients that made room for others
            key = self._key(self._flows.hops[header])
            found = self._stamps[header] = self._tags.stamp(header, self._address, key)
        return found

    def _key(self, hop: bytes) -> int:
        keys = self._keys.get(hop)
        return self._tags.keys[0] if keys is None else keys.best

    def forget(self, headers: Sequence[bytes]) -> None:
        """These clients' flows have ended."""
        for header in headers:
            self._stamps.pop(header, None)

    # --- the ways ---------------------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Probe the ways, leave those that are lost or drain. To be called when `ways.due`."""
        to_probe, lost = self._ways.tend(now)
        for name in lost:
            self._rows[self._ways.ways[name].number].values[metrics.Way.LOST] += 1
        for name in to_probe:
            token = self._ways.token(name, now)
            for key in self._tags.keys:
                self._say(self._tags.probe(token, key), name)
            self._show(name)
        opened = self._opened()
        if opened != self._open:
            self._open = opened
            for name in self._ways.ways:
                self._show(name)
            self._move_from(self._ways.ways.keys() - opened)

    def _show(self, name: bytes) -> None:
        way = self._ways.ways[name]
        kinds, values = metrics.Way, self._rows[way.number].values
        values[kinds.UP], values[kinds.DRAINING] = way.up, way.draining
        values[kinds.ROUND_TRIP] = int(way.round_trip_s * 1e6)
        values[kinds.KEY] = self._keys[name].best

    def _opened(self) -> set[bytes]:
        return {name for name, way in self._ways.ways.items() if way.open}

    def _move_from(self, hops: set[bytes]) -> None:
        if hops:
            self._moving.extend(header for header, hop in self._flows.hops.items() if hop in hops)

    def move(self) -> None:
        """Some of the flows that have to leave their way. Not with a batch in hand."""
        for _ in range(min(MOVES_AT_ONCE, len(self._moving))):
            header = self._moving.popleft()
            flow = self._flows.find(header)
            if flow is None:
                continue
            hop = self._gate.lead(flow.ufrag)
            if hop is None or hop == flow.hop:  # there is no better one
                continue
            self.introduce(header, hop)  # first: this process may end in between
            self._flows.redirect(header, hop)
            self._stamps.pop(header, None)
            way = self._ways.ways.get(hop)
            if way is not None:
                self._rows[way.number].values[metrics.Way.INTRODUCED] += 1

    def introduce(self, header: bytes, hop: bytes) -> None:
        """Say there whose client this is, if that is another relay: it has seen no check of it."""
        flow = self._flows.find(header)
        if flow is not None and hop in self._ways.ways:
            standing = _STANDINGS[flow.origin]
            if flow.state is flows.State.ASSURED:
                standing = parley.Standing.ASSURED
            key = self._key(hop)
            stamp = self._tags.stamp(header, self._address, key)
            header = header[: -len(stamp)] + stamp
            self._say(self._tags.introduction(header, flow.ufrag, standing, key), hop)

    def hear(self, header: bytes, rest: memoryview, source: bytes, now: float) -> metrics.Outbound:
        """A message instead of a transceiver's frame."""
        if source not in self._ways.ways:
            return metrics.Outbound.DROPPED_NOT_TRANSCEIVER
        said = self._tags.read(header, rest)
        if said is None:
            return metrics.Outbound.DROPPED_BAD_FRAME
        if said.kind is parley.Kind.ANSWER:
            ours = self._ways.answered(source, said.body, now)
            if ours and said.key is not None and self._keys[source].answered(said.key, now):
                self._stamps.clear()
        elif said.kind is parley.Kind.QUESTION:
            hop = self._flows.hops.get(said.header)
            if hop == source or self._ways.same(hop, source):
                self.introduce(said.header, source)
        return metrics.Outbound.CONTROL

    def _say(self, message: bytes, to: bytes) -> None:
        try:
            self._socket.sendto(message, frame.reachable(to, self._socket.family))
        except OSError:  # as lost as on the way
            pass
