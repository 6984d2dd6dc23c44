"""A relay's worker: the life of a packet, from the clients to the transceivers and back.

A worker's life is `Worker.serve`: wait, take a batch from the clients, send it to the transceivers,
take a batch from the transceivers, send it to the clients. Read on from there, downward: first what
nearly all datagrams go through, then what is judged one by one, then what waits for the keeper.

Rules that stay true:
- On the hit path there is no Python-level loop over the datagrams of a batch, no copy of a payload,
  no exception and no log line. What misses, and STUN, is judged one by one (gate.py).
- Every datagram ends in exactly one counter of its way, also when this process is killed: received
  = forwarded + recovered + waiting + dropped.
- Nothing blocks but the wait for the sockets. Redis and the other workers' clients are the
  keeper's; it is asked by a message.
- Live flows come first: while the public socket does not run dry, unknown clients wait outside.

It keeps no session, decrypts nothing and knows no Redis. DTLS, RTP and RTCP pass unread, but for
the SSRC of a client's first media.

Sessions of clusters elsewhere go by other relays, which entrance.py knows; what other relays send
here, for transceivers of this cluster, passes by a face of its own (transit.py), in turns.

RFC 8445 (ICE), RFC 7983 (telling STUN from the rest by the first octet)
"""

import itertools
import operator
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence

import entrance
import flows
import frame
import gate
import handover
import ledger
import metrics
import parley
import recovery
import roaming
import settings
import stun
import transit
import udp
import ufrag

ROUNDS_MAX = 16
"""Full batches from each side between two looks at the clock and at the supervisor: at most a few
tens of milliseconds, and only while both sockets never run dry."""

POLL_MS = 1000
"""Longest sleep of an idle worker: how late a sweep may be."""

POLL_WAITING_MS = 50
"""The same while datagrams wait for the keeper: how late they may be found overdue."""

JUDGED_SHARE = 8
"""One in so many datagrams of a batch may be an unknown client's and be judged while the public
socket does not run dry. A judged one costs some ten times what a known client's does; the rest of
them are dropped unread, so that a flood costs little more than its receipt. More of them let fewer
live datagrams through, fewer make honest newcomers try longer."""


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
        self._control = memory.section("control").cast("Q")
        self._control[handover.Control.PID] = os.getpid()
        self._supervisor = ledger.Counters(
            metrics.Supervisor, shared.relay.section("supervisor")
        ).values
        self.flows = flows.Table(memory.section("flows"), handover.limits(table), now)
        ways = entrance.ways_of(found, self._family, now)
        self._gate = gate.Gate(
            keyring,
            settings.clusters(found.cluster),
            self.flows,
            self._family,
            table.datagram_octets_max,
            table.integrity_checks_per_s,
            now,
            ways,
        )
        self._ways, self._has_ways = ways, bool(ways.ways)
        self._no_tags = [parley.NO_TAG] * table.batch_size
        tags = parley.Tags(keyring, found.transit.tag)
        self._entrance = entrance.Entrance(
            self._internal, ways, tags, self.flows, self._gate, memory.section("ways")
        )
        face = shared.faces[number]
        self._face = transit.Face(face, found, keyring, now) if face else None
        batch = udp.best()
        shape = table.batch_size, table.datagram_octets_max
        ends = self._public, self._internal
        self._inbound = batch(memory.section("batch_in"), udp.Way.INBOUND, *shape, *ends)
        self._outbound = batch(memory.section("batch_out"), udp.Way.OUTBOUND, *shape, *ends[::-1])
        # Where all ways were taken out of the configuration there may still be flows to lead back.
        self._tends = bool(self._face) or self._has_ways or self._entrance.moving
        self._nowhere = bytes(frame.name_octets(self._family))
        self._overloaded, self._judged_max = False, max(1, table.batch_size // JUDGED_SHARE)
        self._recovers = found.redis is not None
        self._keeper, _ = shared.asks[number]
        self._recovery = recovery.Recovery(
            memory.section("waiting"),
            handover.waiting_limits(found),
            table.datagram_octets_max,
            self.inbound_ledger.mark,
            now,
        )

    def take_over(self) -> int:
        """Finish what the process before had received and not yet counted; returns how many."""
        inbound, outbound = self._inbound, self._outbound
        self._agree_on_waiting()
        n = inbound.in_hand(self.inbound_ledger.mark)
        if n:
            if self._has_ways:  # it may have put tags on them
                inbound.stamp(n, self._no_tags[:n])
            self._pass_inbound(n, inbound.sent(n))
        m = outbound.in_hand(self.outbound_ledger.mark)
        if m:
            self._pass_outbound(m, outbound.sent(m))
        self._ask()
        return n + m + (self._face.take_over() if self._face else 0)

    def _agree_on_waiting(self) -> None:
        """What lies there waits, but for what the process before had counted and not yet freed."""
        book, inbound = self.inbound_ledger, metrics.Inbound
        self._recovery.settle(book[inbound.WAITING], time.monotonic())
        more = len(self._recovery) - book[inbound.WAITING]
        if more < 0:  # there is no room for it any more: waiting_max was made smaller
            book.change({inbound.WAITING: more, inbound.DROPPED_LOOKUP_LIMIT: -more})

    def serve(self, link: socket.socket) -> None:
        """Relay until `link` becomes readable."""
        # Not epoll(7): it stays in the sockets' wait queues while nobody waits, and the kernel then
        # wakes it for every datagram that has left: 6 % of the time a datagram takes in a flood.
        poll, face = select.poll(), self._face
        socks = [self._public, self._internal, self._keeper]
        if face:
            socks += [face.socket, face.inner]
        for sock in (*socks, link):
            poll.register(sock, select.POLLIN)
        public, internal, keeper, transit, inner = [*(s.fileno() for s in socks), -1, -1][:5]
        coalesce_s, flows_ = self._coalesce_s, self.flows
        beat = self._control[handover.Control.BEAT : handover.Control.BEAT + 1]
        rounds = range(ROUNDS_MAX)
        now = time.monotonic()
        while True:
            from_clients = from_transceivers = from_relays = to_relays = heard = False
            for ready, _ in poll.poll(self._patience_ms(now)):
                if ready == public:
                    from_clients = True
                elif ready == internal:
                    from_transceivers = True
                elif ready == keeper:
                    heard = True
                elif ready == transit:
                    from_relays = True
                elif ready == inner:
                    to_relays = True
                else:
                    return
            if coalesce_s and (from_clients or from_transceivers or from_relays or to_relays):
                time.sleep(coalesce_s)
            # In turns, so that neither way starves while the other never runs dry; until a batch
            # comes back short, since waking up costs more than anything done with a datagram.
            for _ in rounds:
                if from_clients:
                    from_clients = self.inbound()
                if from_transceivers:
                    from_transceivers = self.outbound()
                if face:
                    from_relays = from_relays and face.inbound()
                    to_relays = to_relays and face.outbound()
                if not (from_clients or from_transceivers or from_relays or to_relays):
                    break
            self._overloaded = from_clients
            beat[0] = now_ns = time.monotonic_ns()
            now = now_ns * 1e-9
            if now >= flows_.due:
                self._entrance.forget(flows_.sweep(now))
            if self._tends:
                self._tend(now, from_relays)
            if heard or self._recovery.asked_at:
                self._hear(now)

    def _patience_ms(self, now: float) -> float:
        """How long an idle worker may sleep."""
        most = POLL_WAITING_MS if self._recovery.asked_at else POLL_MS
        if self._entrance.moving:
            return 0
        return min(most, max(0.0, (self._ways.due - now) * 1000)) if self._has_ways else most

    def _tend(self, now: float, from_relays: bool = False) -> None:
        """What is to be done for sessions that go by several relays. `from_relays`: the transit
        socket has not run dry."""
        if self._has_ways and now >= self._ways.due:
            self._entrance.tend(now)
        if self._entrance.moving:
            self._entrance.move()
        if self._face:
            self._face.overloaded = from_relays
            self._face.draining = self._supervisor[metrics.Supervisor.DRAINING_UNTIL] > 0
            self._face.sweep(now)

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
        if table.listening and not table.listening.keys().isdisjoint(headers):
            self._note_ssrcs(headers, lengths)
        batch.direct(n, hops)  # type: ignore[arg-type]  # judged: no None is left
        if self._has_ways:
            self._entrance.stamp(batch, headers)
        refused = batch.send(n, _skipped(holes, sent) if holes or sent else ())
        self.inbound_ledger.book_batch(batch.number, lengths, 0, holes, refused)

    def outbound(self) -> bool:
        """A batch from transceivers to clients; True if more may be waiting."""
        n = self._outbound.receive()
        if n:
            self._pass_outbound(n)
        return n == self._size

    def _pass_outbound(self, n: int, sent: Sequence[int] = ()) -> None:
        """As `_pass_inbound`, the other way."""
        batch, table = self._outbound, self.flows
        if self._has_ways:
            batch.stamp(n, self._no_tags[:n])
        headers, lengths, kinds = batch.read(n)
        sources = batch.sources(n)
        # Each frame comes from the transceiver that its client's flow leads to.
        if (
            tuple(map(table.hops.get, headers)) == sources
            and min(lengths) >= frame.HEADER_OCTETS
            and max(lengths) <= self._octets_max + frame.HEADER_OCTETS
        ):
            holes = _NONE
            if self._has_ways:
                self._ways.seen.update(sources)
        else:
            holes = self._judge_outbound(headers, lengths, sources, sent)
        if not table.watched.isdisjoint(headers):
            spoken = gate.spoken(table.watched, headers, lengths, kinds, holes)
            table.answered(spoken, time.monotonic())
        refused = batch.send(n, _skipped(holes, sent) if holes or sent else ())
        self.outbound_ledger.book_batch(batch.number, lengths, frame.HEADER_OCTETS, holes, refused)

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
        most = self._judged_max if self._overloaded else len(unknown)
        if len(unknown) > most:
            holes = dict.fromkeys(unknown[most:], metrics.Inbound.DROPPED_OVERLOADED)
            del unknown[most:]
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
                holes[i] = self._hold(headers[i], payload, now) if verdict is None else verdict
                hops[i] = None
        while self._gate.reopened:
            self._entrance.introduce(header := self._gate.reopened.pop(), self.flows.hops[header])
        self.flows.active.update(itertools.compress(headers, hops))
        for i in itertools.compress(numbers, map(operator.not_, hops)):
            hops[i] = self._nowhere
        self._ask()
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
            drop: metrics.Outbound | None
            if self._has_ways and length >= frame.HEADER_OCTETS and parley.is_message(header):
                rest = self._outbound.payload(i, length - frame.HEADER_OCTETS)
                drop = self._entrance.hear(header, rest, source, time.monotonic())
            else:
                drop = self._gate.outbound(header, length, source)
                if drop is None and self._has_ways:
                    self._ways.seen.add(source)
            if drop is not None and i not in sent:
                holes[i] = drop
        return holes

    def _note_ssrcs(self, headers: tuple[bytes, ...], lengths: list[int]) -> None:
        """Media of clients whose SSRC is not known yet: it finds them at their next address."""
        table, listening, now = self.flows, self.flows.listening, time.monotonic()
        for i in [i for i, header in enumerate(headers) if header in listening]:
            kind, ssrc = roaming.read(self._inbound.payload(i, lengths[i]))
            table.heard(headers[i], ssrc if kind is roaming.Kind.MEDIA else 0, now)

    # --- what waits for the keeper --------------------------------------------------------------

    def _hold(self, header: bytes, payload: memoryview, now: float) -> metrics.Inbound:
        """Media of a client without a flow: it waits, or the reason why not."""
        if not self._recovers and roaming.read(payload)[0] is roaming.Kind.ADDRESS:
            return metrics.Inbound.DROPPED_UNKNOWN_CLIENT
        refusal = self._recovery.hold(header, payload, self._inbound.number, now)
        return metrics.Inbound.WAITING if refusal is None else refusal

    def _ask(self) -> None:
        """Send the keeper what is to be asked. If it cannot take it, the answer will be overdue."""
        while asked := self._recovery.asks():
            try:
                self._keeper.send(b"".join(asked))
            except OSError:  # it has not read for a while: a message more would not help
                return

    def _hear(self, now: float) -> None:
        """The keeper's answers, and what has waited for too long."""
        while True:
            try:
                message = self._keeper.recv(recovery.ASK_MAX * recovery.ANSWER.size)
            except OSError:
                break
            if not message:
                break
            whole = message[: len(message) - len(message) % recovery.ANSWER.size]
            for header, status, ssrc, text in recovery.ANSWER.iter_unpack(whole):
                self._resolve(header, status, ssrc, text.rstrip(b"\x00"), now)
        for header in self._recovery.overdue(now):
            self._release(self._recovery.take(header), metrics.Inbound.DROPPED_LOOKUP_FAILED)

    def _resolve(self, header: bytes, status: int, ssrc: int, text: bytes, now: float) -> None:
        """An answer: what waited for it goes on, or is dropped."""
        verdict: bytes | metrics.Inbound = metrics.Inbound.DROPPED_LOOKUP_FAILED
        if header in self.flows.hops:  # its own check came first
            verdict = self.flows.hops[header]
        elif status == recovery.FOUND:
            verdict = self._gate.recovered(header, text, now)
        elif status in (recovery.FOLLOWS_FAR, recovery.FOLLOWS_NEAR):
            near = status == recovery.FOLLOWS_NEAR
            verdict = self._gate.recovered(header, text, now, (ssrc, near))
        elif not self._recovery.asks_for(header, ssrc):
            return  # its media has come meanwhile, and with it a better question
        elif status == recovery.UNKNOWN:
            self._recovery.unknown(header, now)
            verdict = metrics.Inbound.DROPPED_UNKNOWN_CLIENT
        if self._has_ways and isinstance(verdict, bytes):
            self._entrance.introduce(header, verdict)
        self._release(self._recovery.take(header), verdict)

    def _release(self, slots: Sequence[int], verdict: bytes | metrics.Inbound) -> None:
        """Send on what waited in these slots, or drop it; count it, and only then forget it."""
        if not slots:
            return
        inbound = metrics.Inbound
        changes: dict[ledger.Kinds, int] = {inbound.WAITING: -len(slots)}
        if isinstance(verdict, bytes):
            octets = [self._send_waiting(slot, verdict) for slot in slots]
            sent = [each for each in octets if each]
            changes[inbound.RECOVERED] = len(sent)
            changes[inbound.OCTETS] = sum(sent) - frame.HEADER_OCTETS * len(sent)
            changes[inbound.DROPPED_SEND_FAILED] = len(octets) - len(sent)
        else:
            changes[verdict] = len(slots)
        self._recovery.let_go(slots)
        self.inbound_ledger.change(changes)
        self._recovery.free(slots)

    def _send_waiting(self, slot: int, hop: bytes) -> int:
        """Octets of the frame that was sent; 0 if the kernel refused it."""
        whole = self._recovery.frame(slot)
        if self._has_ways:
            header, payload = bytes(whole[: frame.HEADER_OCTETS]), whole[frame.HEADER_OCTETS :]
            stamp = self._entrance.stamp_of(header)
            whole = memoryview(header[: -len(stamp)] + stamp + payload)
        try:
            return self._internal.sendto(whole, frame.reachable(hop, self._family))
        except OSError:
            return 0


_NONE: dict[int, ledger.Kinds] = {}
"""The holes of a batch that has none. Nobody writes into it."""


def _skipped(holes: Mapping[int, object], sent: Sequence[int]) -> Sequence[int]:
    return sorted({*holes, *sent})
