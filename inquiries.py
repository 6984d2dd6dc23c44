"""Inquiries: whose are the datagrams that a worker has got from an address without a flow?

What it owns: the keeper's end of the sockets to the workers, and where it is looked for an answer:

    by its address    another worker may have the flow; else Redis has it, of another relay
    by its SSRC       a flow of any worker has it: the client's address has changed (roaming.py)

An SSRC beside the same IP address answers at once. From another IP address it only answers where
Redis does not know the address, which says more. Where nobody knows either, the tables are looked
at once more before that is the answer: the flow, or its SSRC, may be younger than the last look.

Rules that stay true:
- Every question has one answer: found, unknown, or nobody could be asked. What has no room in the
  worker's socket is counted; the worker waits no longer than `wait_s`.
- What waits here for Redis or for a look is bounded by `ASKED_MAX` each. Questions are bounded by
  the workers' budgets, and cost no more where somebody chooses them (`roaming.SAME_SSRC_MAX`).

It judges no ufrag, looks at no table itself and knows no socket but these.
"""

import asyncio
import socket
from collections.abc import Iterable, Sequence

import census
import frame
import ledger
import metrics
import recovery
import registry

LOOKUPS_AT_ONCE = 4
"""Look-ups under way, each for all clients that were asked about by then. More would only be more
connections to a Redis that is slow; fewer would let one slow answer hold up all others."""

LOOKUP_KEYS_MAX = 512
"""Clients in one look-up: what Redis answers in a millisecond."""

ASKED_MAX = 4096
"""Clients that wait for a look-up, over all workers: two seconds of one worker's budget at its
default. Beyond it the answer is that Redis is not available."""

MESSAGES_AT_ONCE = 32
"""Questions read from one worker in a turn of the loop, so that none starves the rest."""

_Question = tuple[int, bytes, int]
"""Worker, header of the client, SSRC of its media or 0."""

_Late = tuple[_Question, int]
"""And what the answer is if the next look at the tables does not find it."""


class Inquiries:
    """What the workers of one relay ask."""

    wanted: asyncio.Event
    """Set while somebody waits for a look at the tables."""

    def __init__(
        self,
        ends: Sequence[socket.socket],
        index: census.Index,
        counters: ledger.Counters,
        redis: registry.Registry | None,
    ) -> None:
        """Over our ends of the sockets, one a worker; begins with `listen`."""
        self._ends, self._index, self._redis = ends, index, redis
        self._values = counters.values
        self._asked: asyncio.Queue[_Question] = asyncio.Queue(ASKED_MAX)
        self._late: list[_Late] = []
        self.wanted = asyncio.Event()

    def listen(self) -> None:
        """Take questions from now on, also those that came while there was no keeper."""
        loop = asyncio.get_running_loop()
        for number, ours in enumerate(self._ends):
            loop.add_reader(ours, self._hear, number, ours)

    def _hear(self, worker: int, ours: socket.socket) -> None:
        """Questions of a worker: answer what is known here, queue the rest."""
        for _ in range(MESSAGES_AT_ONCE):
            try:
                message = ours.recv(recovery.ASK_MAX * recovery.ASK.size)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:  # the other end is gone for good, and so will this process be
                asyncio.get_running_loop().remove_reader(ours)
                return
            whole = message[: len(message) - len(message) % recovery.ASK.size]
            self._take([(worker, header, ssrc) for header, ssrc in recovery.ASK.iter_unpack(whole)])

    def _take(self, questions: list[_Question]) -> None:
        redis, unasked = self._redis, list[_Late]()
        self._values[metrics.Keeper.LOOKUPS] += len(questions)
        answers = []
        for question in questions:
            asks = redis is not None and redis.up and not self._asked.full()
            if (found := self._find(question, far=not asks)) is not None:
                answers.append(found)
            elif asks:
                self._asked.put_nowait(question)
            else:
                status = recovery.UNKNOWN if redis is None else recovery.UNAVAILABLE
                unasked.append((question, status))
        self._answer([*answers, *self._put_off(unasked)])

    def _find(self, question: _Question, far: bool) -> tuple[int, bytes] | None:
        """The answer that the tables have, as of the last look; from afar only where it may be."""
        kinds = metrics.Keeper
        _, header, ssrc = question
        ufrag = self._index.find(frame.key(header))
        if ufrag is not None:
            return self._packed(question, recovery.FOUND, kinds.LOOKUPS_HERE, ufrag)
        follows = self._index.follow(header, ssrc) if ssrc else None
        if follows is None or not (far or follows[1]):
            return None
        ufrag, near = follows
        status = recovery.FOLLOWS_NEAR if near else recovery.FOLLOWS_FAR
        return self._packed(question, status, kinds.LOOKUPS_SSRC, ufrag)

    def _put_off(self, questions: Iterable[_Late]) -> list[tuple[int, bytes]]:
        """What nobody knows waits for the next look; the answers to what has no SSRC, or finds no
        room to wait."""
        answers = []
        for question, status in questions:
            if question[2] and len(self._late) < ASKED_MAX:
                self._late.append((question, status))
                self.wanted.set()
            else:
                answers.append(self._not_found(question, status))
        return answers

    def take_late(self) -> list[_Late]:
        """Those that wait for the look that begins now: they are to be settled after it."""
        late, self._late = self._late, []
        self.wanted.clear()
        return late

    def settle(self, late: Iterable[_Late]) -> None:
        """There was a look: what it has not found, nobody knows."""
        self._answer(
            self._find(question, far=True) or self._not_found(question, status)
            for question, status in late
        )

    async def look_up(self, redis: registry.Registry) -> None:
        """Ask Redis, for ever: each time about all clients that were asked about by then."""
        while True:
            asked = [await self._asked.get()]
            while len(asked) < LOOKUP_KEYS_MAX and not self._asked.empty():
                asked.append(self._asked.get_nowait())
            found: Sequence[bytes | registry.Unavailable | None]
            try:
                found = await redis.look_up([frame.key(header) for _, header, _ in asked])
            except registry.Unavailable as error:
                found = [error] * len(asked)
            answers, unfound = [], []
            for question, each in zip(asked, found, strict=True):
                status = recovery.UNKNOWN if each is None else recovery.UNAVAILABLE
                if isinstance(each, bytes):
                    kind = metrics.Keeper.LOOKUPS_FOUND
                    answers.append(self._packed(question, recovery.FOUND, kind, each))
                elif here := self._find(question, far=True):
                    answers.append(here)
                else:
                    unfound.append((question, status))
            self._answer([*answers, *self._put_off(unfound)])

    def _not_found(self, question: _Question, status: int) -> tuple[int, bytes]:
        kinds = metrics.Keeper
        unknown = status == recovery.UNKNOWN
        return self._packed(
            question, status, kinds.LOOKUPS_UNKNOWN if unknown else kinds.LOOKUPS_FAILED
        )

    def _packed(
        self, question: _Question, status: int, kind: metrics.Keeper, ufrag: bytes = b""
    ) -> tuple[int, bytes]:
        """A worker's answer, counted."""
        worker, header, ssrc = question
        self._values[kind] += 1
        return worker, recovery.ANSWER.pack(header, status, ssrc, ufrag)

    def _answer(self, answers: Iterable[tuple[int, bytes]]) -> None:
        of: dict[int, list[bytes]] = {}
        for worker, packed in answers:
            of.setdefault(worker, []).append(packed)
        for worker, all_ in of.items():
            for at in range(0, len(all_), recovery.ASK_MAX):
                message = all_[at : at + recovery.ASK_MAX]
                try:
                    self._ends[worker].send(b"".join(message))
                except OSError:
                    self._values[metrics.Keeper.ANSWERS_LOST] += len(message)
