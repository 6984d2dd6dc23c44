"""The registry: flows in Redis, where another relay finds them when their clients arrive there.

What it owns: how a flow stands in Redis, and the marks that show whether Redis still has what it
was given. The connections are redisclient.py's.

    earshot:flow: + the client's address (frame.key, 24 octets)   ->   its ufrag (23 octets)

Rules that stay true:
- Nothing here is needed for media that flows. Whatever Redis does, a call ends with its result or
  with `Unavailable`, and within its time.
- A change is one line in the log, when it begins and when it ends.
- A value is at most 24 octets of what Redis says, and nobody's promise: the worker judges it.
- The memory of a Redis is not trusted either. Whether it still has what it was given is seen by
  marks in it, and `losses` says when all has to be written again.

In a Cluster shards fail one by one: therefore each client of a look-up, and each flow that is
written, has a result of its own.

https://redis.io/docs/latest/commands/ (GETRANGE, SET with GET since 6.2)
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import redisclient
import settings
from redisclient import Refused

PREFIX = b"earshot:flow:"
MARK_PREFIX = b"earshot:relay:"

VALUE_OCTETS_MAX = 24
"""What is passed on of a value: an octet more than a ufrag has, so that a longer one is none."""

PROBE_S = 1.0
"""Between two probes: how long a Redis that is back goes unnoticed, and an empty one unfilled."""

STORE_S = redisclient.CALL_S_MAX
"""How long a batch of flows may take: nobody waits for it."""

MARKS = 16
"""Marks in a Cluster, spread over its shards: one that came back empty lost some of them, most
likely. If it had none, its flows are written again when their turn comes (a third of ttl_s)."""

Unavailable = redisclient.Unavailable


class Registry:
    """Redis for one relay. `watch` has to run beside whatever else is called."""

    losses: int
    """Grows whenever what was written before may be gone."""

    def __init__(self, found: settings.Redis, log: logging.Logger) -> None:
        """Connects with the first call."""
        self._log = log
        self._client = redisclient.Client(found.url, found.timeout_s, log, "media goes on")
        self._ttl = str(max(1, round(found.ttl_s)))
        self._refusals = {"store": "", "probe": ""}
        self.losses = 0
        name, count = secrets.token_hex(8).encode(), MARKS if self._client.sharded else 1
        self._marks: dict[bytes, int | None] = {
            b"%b%b:%d" % (MARK_PREFIX, name, number): None for number in range(count)
        }
        self._written, self._lost = 0, False

    @property
    def up(self) -> bool:
        """False while Redis answers nothing: then calls end at once."""
        return self._client.up

    async def look_up(self, keys: Sequence[bytes]) -> list[bytes | Unavailable | None]:
        """The value of each client: at most `VALUE_OCTETS_MAX` octets, None if there is none.

        Raises Unavailable if no answer came within the settings' `timeout_s`.
        """
        end = str(VALUE_OCTETS_MAX - 1)
        replies = await self._client.run([(b"GETRANGE", PREFIX + key, "0", end) for key in keys])
        return [_value(reply) for reply in replies]

    async def store(self, entries: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """Write clients and their ufrags, for `ttl_s`; returns the positions of those not taken.

        Raises Unavailable if nothing was taken, or nobody knows what.
        """
        written = [(b"SET", PREFIX + key, ufrag, b"EX", self._ttl) for key, ufrag in entries]
        replies = await self._client.run(written, STORE_S)
        refused = [at for at, reply in enumerate(replies) if isinstance(reply, Exception)]
        if entries:
            self._note_writes("store", next((replies[at] for at in refused), None))
        return refused

    async def watch(self) -> None:
        """Probe Redis, for ever."""
        while True:
            try:
                await self._probe()
            except Unavailable:
                pass
            await asyncio.sleep(PROBE_S)

    async def close(self) -> None:
        """End all connections."""
        await self._client.close()

    async def _probe(self) -> None:
        """Write the marks anew, and see whether they were what was written last."""
        self._written += 1
        value = b"%d" % self._written
        wanted = [(b"SET", mark, value, b"EX", self._ttl, b"GET") for mark in self._marks]
        replies = await self._client.probe(wanted)
        lost, refusal = False, None
        for mark, reply in zip(self._marks, replies, strict=True):
            if isinstance(reply, Exception):
                refusal = reply
                continue
            before, self._marks[mark] = self._marks[mark], self._written
            # Older than what was written last: a replica took over that had not got it. Newer: so
            # was a probe whose answer came too late.
            lost |= before is not None and not _at_least(reply, before)
        self.losses += lost
        if lost and not self._lost:
            self._log.warning("redis lost what it had: all flows are written again")
        self._lost = lost
        self._note_writes("probe", refusal)

    def _note_writes(self, by: str, error: BaseException | None) -> None:
        """A Redis that is full, or a Cluster without some shards, still answers look-ups.

        What a probe sees says nothing of what a batch of flows meets, nor the other way round: it
        is over when neither meets anything.
        """
        refused = any(self._refusals.values())
        self._refusals[by] = str(error) if error else ""
        if refused and not any(self._refusals.values()):
            self._log.info("redis takes all flows again")
        elif error and not refused:
            self._log.warning("redis does not take all flows: %s", self._refusals[by])


def _value(reply: Any) -> bytes | Unavailable | None:
    if isinstance(reply, Refused) and str(reply).startswith("WRONGTYPE"):
        return None
    if isinstance(reply, Exception):
        return Unavailable(str(reply))
    return bytes(reply[:VALUE_OCTETS_MAX]) or None if isinstance(reply, bytes) else None


def _at_least(reply: Any, number: int) -> bool:
    return isinstance(reply, bytes) and reply[:20].isdigit() and int(reply[:20]) >= number
