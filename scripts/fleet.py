"""Relay workers without sockets: the product's own rules over memory, in virtual time.

What it owns: `Worker`, which asks flows.Table and gate.Gate about datagrams as worker.py does and
counts what they say; `Searcher`, a worker whose unknown clients wait (recovery.Recovery) while a
`Host`'s keeper looks for them (census.Index, inquiries.Inquiries) in its tables and in a `Redis`;
and the event loop in whose virtual time all of it happens.

No rule is here. What opens, moves, finds or drops is decided by the modules named above, as they
are in the relay; here is what stands around them there: sockets, processes, Redis itself, of which
nothing but the latency is left. What that leaves out: time on a CPU. A worker here judges whatever
comes in no time, so that nothing queues and DROPPED_OVERLOADED never happens.
"""

import asyncio
import collections
import selectors
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import census
import flows
import gate
import inquiries
import keeper
import ledger
import metrics
import recovery
import registry
import roaming
import stun
import ufrag
from backbone import Backbone

FAMILY = socket.AF_INET
OCTETS_MAX = 256
"""Largest datagram here: checks and media of calls are smaller. It only saves memory."""

SWEEP_LATER_S = 0.25
"""Sweeps come later than they are due by this: a million clients would spend most of the time in
them. Every hand still makes its round in its period (test_simulate.py looks)."""

Verdict = bytes | metrics.Inbound
RECEIVED, FORWARDED = metrics.Inbound.RECEIVED, metrics.Inbound.FORWARDED


class Worker:
    """One worker's judgement of what comes from clients."""

    def __init__(
        self,
        memory: memoryview,
        keyring: ufrag.Keyring,
        clusters: Mapping[int, ufrag.Cluster],
        limits: flows.Limits,
        checks_per_s: int,
        now: float,
        ways: Backbone | None = None,
    ) -> None:
        """Go on with the flows in `memory`, as a worker's successor does."""
        self.memory, self.number = memory, 0
        self.flows = flows.Table(memory, limits, now)
        self._checks_per_s = checks_per_s
        self.reload(keyring, clusters, ways, now)
        self.counters = ledger.Counters(metrics.Inbound)
        self.opened = 0
        """Most flows at a time, and most tentative ones, since `note_most` was called last."""
        self.tentative = 0

    def reload(
        self,
        keyring: ufrag.Keyring,
        clusters: Mapping[int, ufrag.Cluster],
        ways: Backbone | None,
        now: float,
    ) -> None:
        """Judge by these keys from now on, as the successor of a worker does after SIGHUP."""
        self.keyring = keyring
        self.gate = gate.Gate(
            keyring, clusters, self.flows, FAMILY, OCTETS_MAX, self._checks_per_s, now, ways
        )

    def receive(self, header: bytes, payload: memoryview, now: float) -> Verdict:
        """A client's datagram: where it goes, or why it does not."""
        values = self.counters.values
        values[RECEIVED] += 1
        if now >= self.flows.due + SWEEP_LATER_S:
            self.flows.sweep(now)
        verdict = self.gate.inbound(header, payload, len(payload), now)
        if verdict is None:
            verdict = self.unknown(header, payload, now)
        elif isinstance(verdict, bytes):
            self.flows.active.add(header)
        values[FORWARDED if isinstance(verdict, bytes) else verdict] += 1
        return verdict

    def unknown(self, header: bytes, payload: memoryview, now: float) -> metrics.Inbound:
        """Media of a client without a flow."""
        return metrics.Inbound.DROPPED_UNKNOWN_CLIENT

    def media(self, headers: Sequence[bytes], each: int) -> int:
        """So many datagrams of media of each of these clients, at once: what is known of a client
        cannot change in between, so one look-up stands for all of them. Returns how many of the
        clients have no flow: nothing of theirs is counted."""
        hops = list(map(self.flows.hops.get, headers))
        known = len(hops) - hops.count(None)
        self.flows.active.update(self.flows.hops.keys() & set(headers))
        self.counters.values[RECEIVED] += known * each
        self.counters.values[FORWARDED] += known * each
        return len(hops) - known

    def answered(self, header: bytes, ssrc: int, now: float) -> None:
        """The transceiver has sent this client DTLS, and the client its first media."""
        self.flows.answered((header,), now)
        if header in self.flows.listening:
            kind, heard = roaming.read(packet(ssrc))
            self.flows.heard(header, heard if kind is roaming.Kind.MEDIA else 0, now)
        self.flows.active.add(header)

    def note_most(self) -> None:
        """See `opened`."""
        self.opened = max(self.opened, len(self.flows))
        self.tentative = max(self.tentative, self.flows.tentative)


def packet(ssrc: int) -> bytes:
    """A client's media, as far as a relay looks at it: RTP, version 2, with this SSRC."""
    return b"\x80\x6f" + bytes(6) + int(ssrc).to_bytes(4, "big")


def check(number: int, text: str, password: bytes) -> bytes:
    """A client's Binding Request."""
    return stun.request(b"sim" + number.to_bytes(9, "big"), f"{text}:sims", password)


# --- clients that a worker does not know ----------------------------------------------------------


class Searcher(Worker):
    """A worker whose unknown clients wait for its keeper's answer."""

    def __init__(
        self,
        *shape: Any,
        waiting: recovery.Limits,
        outcome: Callable[[bytes, int, Verdict, float], None],
    ) -> None:
        """`outcome` is told of datagrams that waited: client, how many, verdict, when."""
        super().__init__(*shape)
        now = shape[5]
        room = memoryview(bytearray(recovery.octets(waiting.waiting, OCTETS_MAX)))
        self.recovery = recovery.Recovery(room, waiting, OCTETS_MAX, 0, now)
        self.end: End | None = None
        self._outcome = outcome

    def unknown(self, header: bytes, payload: memoryview, now: float) -> metrics.Inbound:
        refusal = self.recovery.hold(header, payload, 1, now)
        return metrics.Inbound.WAITING if refusal is None else refusal

    def ask(self) -> None:
        """Send the keeper what is to be asked, as after each batch."""
        assert self.end is not None
        while asked := self.recovery.asks():
            self.end.ask(b"".join(asked))

    def hear(self, message: bytes, now: float) -> None:
        """The keeper's answers (worker.py: `_resolve`)."""
        for header, status, ssrc, padded in recovery.ANSWER.iter_unpack(message):
            text = padded.rstrip(b"\x00")
            verdict: Verdict = metrics.Inbound.DROPPED_LOOKUP_FAILED
            if header in self.flows.hops:
                verdict = self.flows.hops[header]
            elif status == recovery.FOUND:
                verdict = self.gate.recovered(header, text, now)
            elif status in (recovery.FOLLOWS_FAR, recovery.FOLLOWS_NEAR):
                near = status == recovery.FOLLOWS_NEAR
                verdict = self.gate.recovered(header, text, now, (ssrc, near))
            elif not self.recovery.asks_for(header, ssrc):
                continue
            elif status == recovery.UNKNOWN:
                self.recovery.unknown(header, now)
                verdict = metrics.Inbound.DROPPED_UNKNOWN_CLIENT
            self._release(header, verdict, now)

    def expire(self, now: float) -> None:
        """What nobody answered in time."""
        for header in self.recovery.overdue(now):
            self._release(header, metrics.Inbound.DROPPED_LOOKUP_FAILED, now)

    def _release(self, header: bytes, verdict: Verdict, now: float) -> None:
        slots = self.recovery.take(header)
        if not slots:
            return
        values = self.counters.values
        values[metrics.Inbound.WAITING] -= len(slots)
        found = isinstance(verdict, bytes)
        values[metrics.Inbound.RECOVERED if found else cast(Any, verdict)] += len(slots)
        self.recovery.let_go(slots)
        self.recovery.free(slots)
        self._outcome(header, len(slots), verdict, now)


class End:
    """The keeper's end of a worker's socket pair."""

    def __init__(self, worker: Searcher, loop: "Loop") -> None:
        self._worker, self._loop = worker, loop
        self._messages: collections.deque[bytes] = collections.deque()
        worker.end = self

    def ask(self, message: bytes) -> None:
        """The worker's message."""
        self._messages.append(message)
        self._loop.wake(self)

    def recv(self, _octets: int) -> bytes:
        """As a non-blocking socket."""
        if not self._messages:
            raise BlockingIOError
        return self._messages.popleft()

    def send(self, message: bytes) -> None:
        """The keeper's answer: the worker reads it at once."""
        self._worker.hear(message, self._loop.time())


class Redis:
    """As registry.Registry for whoever calls it: what is in it, and how long it takes to say so."""

    def __init__(self, latency_s: float | None, timeout_s: float) -> None:
        """`latency_s` None: it is down."""
        self._latency_s, self._timeout_s = latency_s, timeout_s
        self.held: dict[bytes, bytes] = {}
        self.up = latency_s is not None
        self.operations = 0

    async def look_up(self, keys: Sequence[bytes]) -> list[bytes | registry.Unavailable | None]:
        """See registry.py."""
        if self._latency_s is None:
            raise registry.Unavailable("down")
        self.operations += len(keys)
        if self._latency_s > self._timeout_s:
            await asyncio.sleep(self._timeout_s)
            raise registry.Unavailable("no answer in time")
        await asyncio.sleep(self._latency_s)
        return [self.held.get(key) for key in keys]


class Host:
    """A relay's keeper, as far as it answers its workers (keeper.py: `_keep_looking`)."""

    def __init__(self, tables: Sequence[memoryview], redis: Redis | None, loop: "Loop") -> None:
        """Over its workers' tables, all looked at once."""
        self.index = census.Index(tables)
        self.index.look()
        self.redis, self._loop = redis, loop
        self.counters = ledger.Counters(metrics.Keeper)
        self._looked_at = loop.time()

    def serve(self, workers: Sequence[Searcher]) -> list["asyncio.Task[None]"]:
        """Answer these workers from now on; returns tasks to be cancelled."""
        ends = [End(worker, self._loop) for worker in workers]
        redis = cast("registry.Registry | None", self.redis)
        self._inquiries = inquiries.Inquiries(cast(Any, ends), self.index, self.counters, redis)
        self._inquiries.listen()
        tasks = [self._loop.create_task(self._keep_looking())]
        if redis is not None:
            tasks += [
                self._loop.create_task(self._inquiries.look_up(redis))
                for _ in range(inquiries.LOOKUPS_AT_ONCE)
            ]
        return tasks

    async def _keep_looking(self) -> None:
        while True:
            try:
                async with asyncio.timeout(keeper.LOOK_S):
                    await self._inquiries.wanted.wait()
            except TimeoutError:
                pass
            again = self._looked_at + keeper.LOOK_AGAIN_S - self._loop.time()
            await asyncio.sleep(max(0.0, again))
            late = self._inquiries.take_late()
            self._looked_at = self._loop.time()
            self.index.look()
            self._inquiries.settle(late)


# --- virtual time ---------------------------------------------------------------------------------


class _Skips(selectors.SelectSelector):
    """Waits for nothing: whoever would, has it later at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Time passes."""
        assert timeout is not None, "nothing is going to happen any more"
        self.now += max(0.0, timeout)
        return []


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when nothing is left to do."""

    def __init__(self, now: float) -> None:
        """Its time begins at `now`."""
        self._skips = _Skips()
        self._skips.now = now
        self._ends: dict[End, tuple[Callable[..., None], tuple[Any, ...]]] = {}
        super().__init__(self._skips)

    def time(self) -> float:
        """Virtual seconds."""
        return self._skips.now

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., None], *args: Any
    ) -> None:
        """An `End` has no descriptor: it says itself when there is something to read."""
        if isinstance(fd, End):
            self._ends[fd] = callback, args
        else:
            super().add_reader(fd, callback, *args)

    def wake(self, end: End) -> None:
        """There is something to read at this end."""
        callback, args = self._ends[end]
        self.call_soon(callback, *args)
