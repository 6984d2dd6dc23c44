"""Transit: the face that a cluster's relay shows to other relays, and the life of a frame there.

    entrance -- frame --> [transit socket]  Face  [inner socket] -- the same frame --> transceiver
             <-- frame -- [transit socket]        [inner socket] <-- the same frame --

The entrance (worker.py) has put the client's address in front of its datagram; here frames pass as
they are, both ways. What is remembered, a client, is where its transceiver is (flows.py) and which
worker of the entrance it comes by. A client with two entrances has two headers (parley.py), and so
two flows and two ways back.

Rules that stay true, beside those of worker.py, which hold here as well (no loop over the datagrams
that are known, one counter for each, nothing lost when this process is killed, nothing blocks):
- Frames are taken from the configured relays only, and where tags are demanded, with a right one. A
  client's header with its tag is the key of its flow: what is known was right at its last check.
- A flow opens by a check with integrity, as at the public side; or by an introduction of a relay
  that has it, whose ufrag must name a transceiver of this cluster under the keys.
- From here nothing goes to another cluster's transit: no loop can be configured.
- Media of a client that is not known is dropped, and the relay that sent it asked whose it is. It
  answers with an introduction: a cluster relay that begins with nothing knows its clients again
  after one round trip.

It knows no client's address but to hand it on, and asks no Redis.
"""

import itertools
import time
from collections.abc import Collection, Sequence

import endpoints
import flows
import frame
import gate
import handover
import ledger
import metrics
import parley
import settings
import stun
import udp
import ufrag

QUESTIONS_PER_S = 1_000
"""Asked by one worker: a whole relay's clients that arrive here at once are known in seconds, and
the first of them at once. Each costs some 10 us."""

QUESTION_S = 0.05
"""Between two questions about one client: its next datagram comes in 20 ms."""

RELAYS_MAX = 4096
"""Relays' socket addresses that are known to be in the prefixes; beyond that each is looked up."""

JUDGED_SHARE = 8
"""One in so many frames of a batch may be of a client that comes by another way than before, or of
none, and be judged while the socket does not run dry: as at the public side (worker.py)."""

BACKS_MORE = 256
"""Ways back that are remembered of followers which made room for others."""

_HEADER = frame.HEADER_OCTETS


class Face:
    """One worker's share of other relays' clients."""

    def __init__(
        self,
        ends: handover.Ends,
        found: settings.Relay,
        keyring: ufrag.Keyring,
        now: float,
    ) -> None:
        """Take over sockets, flows and counters of a worker, its first or a later one."""
        table, memory = found.relay, ends.memory
        self.socket, self.inner = ends.transit, ends.inner
        self._size, self._octets_max = table.batch_size, table.datagram_octets_max
        self.inbound_ledger, self.outbound_ledger = handover.counters_in(memory)
        self.flows = flows.Table(memory.section("flows"), handover.limits(table), now)
        self._backs = _Backs(memory.section("backs"), self.flows)
        self._tags = parley.Tags(keyring, found.transit.tag)
        self._is_relay = endpoints.inside(found.transit.relay_prefixes)
        self._relays = set[bytes]()
        family = self.inner.family
        self._gate = gate.Gate(
            keyring,
            {cluster.id: cluster.hints() for cluster in found.cluster if not cluster.transit},
            self.flows,
            family,
            table.datagram_octets_max,
            table.integrity_checks_per_s,
            now,
        )
        batch, shape = udp.best(), (table.batch_size, table.datagram_octets_max)
        way = udp.Way.TRANSIT
        self._inbound = batch(memory.section("batch_in"), way, *shape, self.socket, self.inner)
        self._outbound = batch(memory.section("batch_out"), way, *shape, self.inner, self.socket)
        self._nowhere = bytes(frame.name_octets(family))
        self._asked: dict[bytes, float] = {}
        self._questions_left, self._questions_renewed_at = QUESTIONS_PER_S, now
        self._judged_max = max(1, table.batch_size // JUDGED_SHARE)
        self.draining = self.overloaded = False

    def take_over(self) -> int:
        """Finish what the process before had received and not yet counted; returns how many."""
        n = self._inbound.in_hand(self.inbound_ledger.mark)
        if n:
            self._pass_inbound(n, self._inbound.sent(n))
        m = self._outbound.in_hand(self.outbound_ledger.mark)
        if m:
            self._pass_outbound(m, self._outbound.sent(m))
        return n + m

    def inbound(self) -> bool:
        """A batch from other relays to transceivers; True if more may be waiting."""
        n = self._inbound.receive()
        if n:
            self._pass_inbound(n)
        return n == self._size

    def _pass_inbound(self, n: int, sent: Sequence[int] = ()) -> None:
        """Send n frames on, but for those that were `sent` already, and count all of them."""
        batch, table = self._inbound, self.flows
        headers, lengths, kinds = batch.read(n)
        sources = batch.sources(n)
        to_judge = kinds.translate(stun.STUN_TABLE)
        hops: list[bytes | None] = list(map(table.hops.get, headers))
        # Media that comes by the relay that it came by before: nearly always all of the batch. Who
        # has a way back has a flow, but for a follower that has made room for another.
        if (
            None not in hops
            and tuple(map(self._backs.get, headers)) == sources
            and 1 not in to_judge
            and min(lengths) > _HEADER
            and max(lengths) <= self._octets_max + _HEADER
        ):
            holes: dict[int, ledger.Kinds] = {}
            table.active.update(headers)
        else:
            holes = self._judge_inbound(headers, lengths, sources, hops, to_judge, sent)
        batch.direct(n, hops)  # type: ignore[arg-type]  # judged: no None is left
        refused = batch.send(n, sorted({*holes, *sent}) if holes or sent else ())
        self.inbound_ledger.book_batch(batch.number, lengths, _HEADER, holes, refused)

    def outbound(self) -> bool:
        """A batch from transceivers to other relays; True if more may be waiting."""
        n = self._outbound.receive()
        if n:
            self._pass_outbound(n)
        return n == self._size

    def _pass_outbound(self, n: int, sent: Sequence[int] = ()) -> None:
        """As `_pass_inbound`, the other way."""
        batch, table = self._outbound, self.flows
        headers, lengths, kinds = batch.read(n)
        sources = batch.sources(n)
        backs: list[bytes | None] = list(map(self._backs.get, headers))
        holes: dict[int, ledger.Kinds] = {}
        # Each frame comes from the transceiver that its client's flow leads to.
        if not (
            tuple(map(table.hops.get, headers)) == sources
            and all(backs)
            and min(lengths) >= _HEADER
            and max(lengths) <= self._octets_max + _HEADER
        ):
            for i, (header, length, source) in enumerate(
                zip(headers, lengths, sources, strict=True)
            ):
                drop = self._gate.outbound(header, length, source)
                if drop is None and backs[i] is None:
                    drop = metrics.Outbound.DROPPED_UNKNOWN_CLIENT
                if drop is not None and i not in sent:
                    holes[i] = drop
                backs[i] = backs[i] or self._nowhere
        if not table.watched.isdisjoint(headers):
            spoken = gate.spoken(table.watched, headers, lengths, kinds, holes)
            table.answered(spoken, time.monotonic())
        batch.direct(n, backs)  # type: ignore[arg-type]
        refused = batch.send(n, sorted({*holes, *sent}) if holes or sent else ())
        self.outbound_ledger.book_batch(batch.number, lengths, _HEADER, holes, refused)

    # --- one by one: what misses, STUN and messages -----------------------------------------------

    def _judge_inbound(
        self,
        headers: tuple[bytes, ...],
        lengths: list[int],
        sources: tuple[bytes, ...],
        hops: list[bytes | None],
        stun_flags: bytes,
        sent: Sequence[int],
    ) -> dict[int, ledger.Kinds]:
        """Find the hops of all that is not media on its known way; returns the holes."""
        holes: dict[int, ledger.Kinds] = {}
        large, now = self._octets_max + _HEADER, time.monotonic()
        left = self._judged_max if self.overloaded else len(headers)
        for i, (header, source, length) in enumerate(zip(headers, sources, lengths, strict=True)):
            hops[i] = self.flows.hops.get(header)  # one before it may have been its introduction
            known = hops[i] is not None and self._backs.get(header) == source
            if (known and not stun_flags[i] and _HEADER < length <= large) or i in sent:
                continue
            heard = known or (source in self._relays and parley.is_message(header))
            left -= not heard
            if left < 0 and not heard:
                holes[i], hops[i] = metrics.Inbound.DROPPED_OVERLOADED, None
                continue
            verdict = self._judge(i, header, source, length, known, now)
            if isinstance(verdict, bytes):
                hops[i] = verdict
                self._backs.note(header, source)
            else:
                holes[i], hops[i] = verdict, None
        here = self.flows.hops
        self.flows.active.update(h for h in itertools.compress(headers, hops) if h in here)
        for i, hop in enumerate(hops):
            if hop is None:
                hops[i] = self._nowhere
        return holes

    def _judge(
        self, i: int, header: bytes, source: bytes, length: int, known: bool, now: float
    ) -> bytes | metrics.Inbound:
        """Where a frame goes, or why it goes nowhere."""
        if not known and not self._comes_from_relay(source):
            return metrics.Inbound.DROPPED_NOT_RELAY
        if length > self._octets_max + _HEADER:
            return metrics.Inbound.DROPPED_OVERSIZED
        payload = self._inbound.payload(i, max(0, length - _HEADER))
        if length >= _HEADER and parley.is_message(header):
            return self._hear(header, payload, source, now)
        if length < _HEADER or not frame.is_frame(header):
            return metrics.Inbound.DROPPED_BAD_FRAME
        entrance = frame.packed_address(source)
        if not self._tags.stamped(header, entrance):
            # Under a key that has been taken away, or from before tags were demanded: its media,
            # which is not looked at otherwise, ends here as well.
            self._backs.pop(header, None)
            return metrics.Inbound.DROPPED_BAD_TAG
        verdict = self._gate.inbound(header, payload, len(payload), now)
        if verdict is not None:
            return verdict
        # The keys may have changed, and with them the tag.
        for twin in self._tags.twins(header, entrance):
            text = self.flows.ufrag(twin)
            if text is not None:
                return self._gate.introduced(header, text, parley.Standing.ASSURED, now)
        self._ask(header, source, now)
        return metrics.Inbound.DROPPED_UNKNOWN_CLIENT

    def _comes_from_relay(self, source: bytes) -> bool:
        if source in self._relays:
            return True
        host, _ = frame.endpoint(source)
        inside = self._is_relay(host)
        if inside and len(self._relays) < RELAYS_MAX:
            self._relays.add(source)
        return inside

    # --- messages ---------------------------------------------------------------------------------

    def _hear(
        self, header: bytes, payload: memoryview, source: bytes, now: float
    ) -> metrics.Inbound:
        """What another relay says."""
        kinds, said = parley.Kind, self._tags.read(header, payload)
        if said is None:
            return metrics.Inbound.DROPPED_BAD_TAG
        if said.kind is kinds.PROBE:
            self._say(self._tags.answer(said, self.draining), source)
        elif said.kind is kinds.INTRODUCTION and frame.is_frame(said.header):
            if not self._tags.stamped(said.header, frame.packed_address(source)):
                return metrics.Inbound.DROPPED_BAD_TAG
            text, standing = parley.introduced(said.body)
            verdict = self._gate.introduced(said.header, text, standing, now)
            if not isinstance(verdict, bytes):
                return verdict
            self._backs.note(said.header, source)
        return metrics.Inbound.CONTROL

    def _ask(self, header: bytes, source: bytes, now: float) -> None:
        """Have the relay that sent it say whose this is, if it was not asked just now."""
        if now - self._questions_renewed_at >= 1.0:
            self._questions_renewed_at, self._questions_left = now, QUESTIONS_PER_S
            self._asked.clear()
        if self._questions_left and now - self._asked.get(header, 0.0) >= QUESTION_S:
            self._questions_left -= 1
            self._asked[header] = now
            self._say(self._tags.question(header, frame.packed_address(source)), source)

    def _say(self, message: bytes, to: bytes) -> None:
        try:
            self.socket.sendto(message, frame.reachable(to, self.socket.family))
        except OSError:  # as lost as on the way
            pass

    def sweep(self, now: float) -> None:
        """Forget flows that have been idle; to be called whenever the process wakes."""
        if now >= self.flows.due:
            for header in self.flows.sweep(now):
                self._backs.pop(header, None)
            if len(self._backs) > len(self.flows.hops) + BACKS_MORE:
                self._backs.keep(self.flows.hops)


class _Backs(dict[bytes, bytes]):
    """Client's header to the relay's socket address, kept where it outlives the process.

    A process may die while an entry is written: then it is another relay's, or none, until the
    client's next datagram, 20 ms later.
    """

    def __init__(self, memory: memoryview, table: flows.Table) -> None:
        """As left by a process before; zeros are none."""
        super().__init__()
        self._memory, self._table = memory, table
        for header in table.hops:
            at = table.slot(header) * handover.BACK_OCTETS
            length = memory[at]
            if 0 < length < handover.BACK_OCTETS:
                self[header] = bytes(memory[at + 1 : at + 1 + length])

    def keep(self, headers: Collection[bytes]) -> None:
        """Forget all others."""
        for header in [header for header in self if header not in headers]:
            del self[header]

    def note(self, header: bytes, source: bytes) -> None:
        """This client comes by this relay now. Its flow may have another slot, too."""
        self[header] = source
        at = self._table.slot(header) * handover.BACK_OCTETS
        self._memory[at : at + 1 + len(source)] = bytes([len(source)]) + source
