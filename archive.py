"""The archive: records of conversations (records.py), where the next transceiver finds them.

    earshot:record: + a hash of the call id   ->   a sealed record, for `resume_s`

What it owns: when the record of a call is written, what becomes of it when the call ends, and the
way to Redis and back. Without Redis it keeps the records of calls that have ended here, so that a
client that lost its transport, and not its transceiver, still finds its conversation.

Rules that stay true:
- Nobody's audio waits for it. A record is made in the turn of its own call, in tens of
  microseconds; one task writes what has come together, with a deadline, whatever Redis does. In all
  a call takes 120 us of CPU a second, a sixtieth of what its sound takes.
- A call is written when it has changed, at most every PACE_S, so that a crash costs the words of so
  long; while a reply is being heard every HEARING_S, since how much was heard changes, too; and
  otherwise often enough that its record is still there when it is needed.
- The record of a call that was hung up is deleted. That of one which ended in any other way stays
  for `resume_s`: its client may only have lost its way.
- A record that was gone on with is deleted once the new call is live, and not before: a client that
  never got the answer can ask again. From then on the newest call has the conversation.
- A Redis that is slow, down or full is noticed by nobody in a call, and said once.

A Redis user needs SET, GETRANGE and DEL on `~earshot:record:*`.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ledger
import metrics
import opening
import records
import redisclient
import sealing
import ufrag

PACE_S = 0.5
"""Between two writings of a call that changes: what a crash may take of what was said. A tenth of
that, and a turn would be written with every word of its transcript."""

PACE_OCTETS = 65_536
"""For each of these that a record has, PACE_S longer: no client can make this write much more than
twice as many octets a second."""

HEARING_S = 1.0
"""Between two writings of a call in which only a reply sounds: how far what is kept of the reply is
from what was heard."""

GATHER_S = 0.05
"""How long records wait for others, so that many calls cost one message each way."""

BATCH_OCTETS = 262_144
"""In one message to Redis: half a millisecond to put together."""

WAITING_OCTETS_MAX = 16 << 20
"""What waits for a Redis that is away: the newest record of each call. Of more the oldest go."""

ENTRY_OCTETS = 256
"""What each that waits counts besides its own octets: its name and its place here. One that is to
be deleted has nothing else, and as many may wait as calls end while Redis is away."""

WRITE_S = 2.0
"""How long a message to Redis may take: nobody waits for it."""

RETRY_S = 1.0
"""Between two attempts while Redis takes nothing."""

FIND_S = 0.25
"""How long a look-up may take: its caller waits, and a new conversation is better than none."""

CLOSE_S = 1.0
"""How long the last records may take to be written when the process ends."""

ENDED_MAX = 256
ENDED_OCTETS_MAX = 8 << 20
"""Records of calls that ended here which are kept in this process, the oldest being dropped."""

Count = metrics.Transceiver
log = logging.getLogger("archive")


class Call(Protocol):
    """What this needs of a call."""

    call_id: str
    opening: opening.Opening
    live_at: float | None

    @property
    def revision(self) -> int:
        """Another one whenever the conversation has changed."""

    @property
    def replies(self) -> bool:
        """Whether a reply is being heard."""

    def record(self) -> records.Record:
        """The conversation as it could be gone on with now."""


@dataclass(slots=True)
class _Written:
    """What is known of a call's record in Redis."""

    revision: int = -1
    replies: bool = False
    at: float = float("-inf")
    pace_s: float = 0.0


class Archive:
    """The records of one process."""

    def __init__(
        self,
        keyring: ufrag.Keyring,
        resume_s: float,
        unix: Callable[[], float],
        redis: redisclient.Client | None = None,
        counters: ledger.Counters | None = None,
    ) -> None:
        """With `resume_s` of 0 nothing is kept. `unix` tells seconds since 1970."""
        self._counters = counters or ledger.Counters(metrics.Transceiver)
        self._sealer = records.sealer(keyring)
        self._resume_s, self._unix, self._redis = resume_s, unix, redis
        self._ttl_ms = b"%d" % round(1000 * resume_s)
        self._written: dict[str, _Written] = {}
        self._ended: dict[str, bytes] = {}
        self._ended_octets = 0
        self._waiting: dict[bytes, bytes] = {}  # by name; nothing is what is to be deleted
        self._waiting_octets = 0
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._was_up = True
        self._refusal = ""

    # --- from the calls ----------------------------------------------------------------------

    def look(self, call: Call, now: float) -> None:
        """See whether a call's record has to be written: some times a second, while it is live."""
        if not self._resume_s or call.live_at is None:
            return
        known = self._written.get(call.call_id)
        if known is None:
            known = self._written[call.call_id] = _Written()
            if call.opening.resume is not None and call.opening.past is not None:
                self._forget(call.opening.resume)
        if self._redis is None:
            return
        if self._redis.up != self._was_up:
            self._look_whether_back(self._redis.up)
        if call.revision != known.revision or call.replies != known.replies:
            pace_s = known.pace_s
        else:
            pace_s = max(HEARING_S, known.pace_s) if known.replies else self._resume_s / 3
        if now - known.at >= pace_s:
            known.revision, known.replies, known.at = call.revision, call.replies, now
            octets = self._sealed(call)
            known.pace_s = PACE_S * (1 + len(octets) // PACE_OCTETS)
            if octets:
                self._put(records.name_of(call.call_id), octets)

    def ended(self, call: Call, *, over: bool = False, moved: bool = False) -> None:
        """A call has ended, and may be gone on with unless it is `over`: it was hung up. If it has
        `moved`, another transceiver has read its record, and will delete it."""
        self._written.pop(call.call_id, None)
        if over:
            self._forget(call.call_id)
        elif moved:
            self._pop(records.name_of(call.call_id))
        elif self._resume_s and call.live_at is not None and (octets := self._sealed(call)):
            self._drop(call.call_id)
            self._ended[call.call_id] = octets
            self._ended_octets += len(octets)
            while len(self._ended) > ENDED_MAX or self._ended_octets > ENDED_OCTETS_MAX:
                self._drop(next(iter(self._ended)))
            self._put(records.name_of(call.call_id), octets)

    def _forget(self, call_id: str) -> None:
        """There is nothing to go on with any more: the call was hung up, or goes on in another."""
        self._drop(call_id)
        if self._resume_s:
            self._put(records.name_of(call_id), b"")

    async def find(self, call_id: str) -> records.Record | None:
        """The record of a call that is not here any more, or never was. Takes FIND_S at most."""
        name = records.name_of(call_id)
        octets = self._ended.get(call_id) or self._waiting.get(name)
        if octets is None and self._redis is not None:
            asked = (b"GETRANGE", name, b"0", b"%d" % records.OCTETS_MAX)
            try:
                (octets,) = await self._redis.run([asked], FIND_S)
            except redisclient.Unavailable as error:
                log.warning("a conversation cannot be looked up: %s", error)
        if not isinstance(octets, bytes):
            return None
        return records.read(octets, call_id, self._sealer, self._unix(), self._resume_s)

    # --- to Redis ----------------------------------------------------------------------------

    def start(self) -> None:
        """Write what there is, as it comes, from now on."""
        if self._redis is not None:
            self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left, as far as time allows, and nothing after that."""
        if self._running is None:
            return
        self._running.cancel()
        await asyncio.wait([self._running])
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._waiting and await self._write():
                    pass
        except TimeoutError:
            pass

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            try:
                taken = await self._write()
            except Exception:
                log.exception("records met a fault")
                taken = False
            if not taken:
                await asyncio.sleep(RETRY_S)

    async def _write(self) -> bool:
        """One message of what waits. False if Redis takes nothing at present."""
        assert self._redis is not None  # else nothing waits
        batch = self._take()
        commands: list[redisclient.Command] = [
            (b"SET", name, octets, b"PX", self._ttl_ms) if octets else (b"DEL", name)
            for name, octets in batch.items()
        ]
        try:
            replies = await self._redis.run(commands, WRITE_S) if commands else []
        except redisclient.Unavailable as error:
            replies = [error] * len(commands)
        taken = not commands
        refusal = ""
        failed = sum(isinstance(reply, Exception) for reply in replies)
        self._counters.values[Count.RECORDS_FAILED] += failed
        self._counters.values[Count.RECORDS_WRITTEN] += len(replies) - failed
        for (name, octets), reply in zip(batch.items(), replies, strict=True):
            if isinstance(reply, redisclient.Unavailable):
                if name not in self._waiting:  # else there is a newer one
                    self._put(name, octets)
            else:
                taken = True
                refusal = str(reply) if isinstance(reply, redisclient.Refused) else refusal
        if refusal != self._refusal and taken:
            self._refusal = refusal
            if refusal:
                log.warning(
                    "redis takes no records, calls cannot be resumed elsewhere: %s", refusal
                )
            else:
                log.info("redis takes records again")
        return taken

    def _look_whether_back(self, up: bool) -> None:
        """A Redis that was away may have lost everything: then all is written again."""
        self._was_up = up
        if up:
            for known in self._written.values():
                known.at = float("-inf")

    def _put(self, name: bytes, octets: bytes) -> None:
        if self._redis is None:
            return
        self._pop(name)
        self._waiting[name] = octets
        self._waiting_octets += ENTRY_OCTETS + len(octets)
        while self._waiting_octets > WAITING_OCTETS_MAX:
            self._pop(next(iter(self._waiting)))
        self._wake.set()

    def _pop(self, name: bytes) -> None:
        octets = self._waiting.pop(name, None)
        if octets is not None:
            self._waiting_octets -= ENTRY_OCTETS + len(octets)

    def _take(self) -> dict[bytes, bytes]:
        """The oldest of what waits, as much as fits into a message."""
        batch: dict[bytes, bytes] = {}
        taken = 0
        for name, octets in self._waiting.items():
            if taken >= BATCH_OCTETS:
                break
            batch[name] = octets
            taken += ENTRY_OCTETS + len(octets)
        for name in batch:
            self._pop(name)
        if not self._waiting:
            self._wake.clear()
        return batch

    def _drop(self, call_id: str) -> None:
        self._ended_octets -= len(self._ended.pop(call_id, b""))

    def _sealed(self, call: Call) -> bytes:
        """The record of a call as it is now; empty if there can be none."""
        salt = secrets.token_bytes(sealing.SALT_OCTETS)
        try:
            record = call.record()
            return records.written(record, call.call_id, self._sealer, salt, self._unix())
        except Exception:  # a mistake of ours costs the record and not the call
            log.exception("%s cannot be recorded", call)
            return b""
