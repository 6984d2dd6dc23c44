"""The registry: flows in Redis, where another relay finds them when their clients arrive there.

What it owns: how a flow stands in Redis, the connections, and the judgement whether Redis can be
used now. The only importer of redis.

    earshot:flow: + the client's address (frame.key, 24 octets)   ->   its ufrag (23 octets)

Rules that stay true:
- Nothing here is needed for media that flows. Whatever Redis does, a call ends with its result or
  with `Unavailable`, and within its time.
- While Redis is not usable nobody waits for it: one probe a second finds out when it is back.
- A change is one line in the log, when it begins and when it ends.
- A value is at most 32 octets of what Redis says, and nobody's promise: the worker judges it.
- The memory of a Redis is not trusted either. Whether it still has what it was given is seen by
  marks in it, and `losses` says when all has to be written again.

One server, a service that Sentinels name, or a Cluster, whose shards fail one by one: therefore
each client of a look-up, and each flow that is written, has a result of its own.

https://redis.io/docs/latest/commands/ (GETRANGE, SET with GET since 6.2)
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from redis import asyncio as aioredis
from redis import exceptions
from redis.asyncio import cluster, sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import settings

PREFIX = b"earshot:flow:"
MARK_PREFIX = b"earshot:relay:"

VALUE_OCTETS_MAX = 24
"""What is passed on of a value: an octet more than a ufrag has, so that a longer one is none."""

PROBE_S = 1.0
"""Between two probes: how long a Redis that is back goes unnoticed, and an empty one unfilled."""

STORE_S = 2.0
"""How long a batch of flows may take: nobody waits for it."""

TIMEOUTS_MAX = 3
"""Calls in a row without an answer in time after which Redis is not asked any more. One is a lost
packet or a pause of its own; a refused connection is no matter of counting."""

MARKS = 16
"""Marks in a Cluster, spread over its shards: one that came back empty lost some of them, most
likely. If it had none, its flows are written again when their turn comes (a third of ttl_s)."""

CONNECTIONS_MAX = 16
"""To one server: more than there are calls at once."""

_GONE = (exceptions.ConnectionError, exceptions.RedisClusterException, OSError)
_LATE = (exceptions.TimeoutError, TimeoutError)
_FAILED = (exceptions.RedisError, OSError, TimeoutError)


class Unavailable(Exception):
    """Redis, or the part of it that would know, was not usable; the message says why."""


class Registry:
    """Redis for one relay. `watch` has to run beside whatever else is called."""

    up: bool
    """False while Redis answers nothing: then calls end at once."""
    losses: int
    """Grows whenever what was written before may be gone."""

    def __init__(self, found: settings.Redis, log: logging.Logger) -> None:
        """Connects with the first call."""
        self._found, self._log = found, log
        self._client = _client(found.url)
        self._ttl = str(max(1, round(found.ttl_s)))
        self._late = 0
        self._refusal = ""
        self.up, self.losses = True, 0
        name, count = secrets.token_hex(8).encode(), MARKS if found.url.kind == "cluster" else 1
        self._marks: dict[bytes, bytes | None] = {
            b"%b%b:%d" % (MARK_PREFIX, name, number): None for number in range(count)
        }
        self._written = 0

    async def look_up(self, keys: Sequence[bytes]) -> list[bytes | Unavailable | None]:
        """The value of each client: at most `VALUE_OCTETS_MAX` octets, None if there is none.

        Raises Unavailable if no answer came within the settings' `timeout_s`.
        """
        end = str(VALUE_OCTETS_MAX - 1)
        asked = [(b"GETRANGE", PREFIX + key, "0", end) for key in keys]
        replies = await self._call(asked, self._found.timeout_s)
        return [_value(reply) for reply in replies]

    async def store(self, entries: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """Write clients and their ufrags, for `ttl_s`; returns the positions of those not taken.

        Raises Unavailable if nothing was taken, or nobody knows what.
        """
        written = [(b"SET", PREFIX + key, ufrag, b"EX", self._ttl) for key, ufrag in entries]
        replies = await self._call(written, STORE_S)
        refused = [at for at, reply in enumerate(replies) if isinstance(reply, Exception)]
        self._note_writes(next((replies[at] for at in refused), None))
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
        try:
            async with asyncio.timeout(self._found.timeout_s):
                await self._client.aclose()
        except _FAILED:
            pass

    async def _probe(self) -> None:
        """Write the marks anew, and see whether they were what was written last."""
        self._written += 1
        value = b"%d" % self._written
        wanted = [(b"SET", mark, value, b"EX", self._ttl, b"GET") for mark in self._marks]
        replies = await self._call(wanted, self._found.timeout_s, probe=True)
        lost, refusal = False, None
        for mark, reply in zip(self._marks, replies, strict=True):
            if isinstance(reply, Exception):
                refusal = reply
                continue
            before, self._marks[mark] = self._marks[mark], value
            # Older than what was written last: a replica took over that had not got it.
            lost |= before is not None and reply != before
        if lost:
            self.losses += 1
            self._log.warning("redis lost what it had: all flows are written again")
        self._note_writes(refusal)

    async def _call(
        self, commands: Sequence[tuple[bytes | str, ...]], timeout_s: float, probe: bool = False
    ) -> list[Any]:
        """Replies, or exceptions in their place; raises Unavailable if that is all there is."""
        if not self.up and not probe:
            raise Unavailable("redis is not up")
        try:
            async with asyncio.timeout(timeout_s):
                pipeline = self._client.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                replies: list[Any] = await pipeline.execute(raise_on_error=False)
        except _FAILED as error:
            self._failed(error)
            raise Unavailable(_reason(error)) from error
        errors = [reply for reply in replies if isinstance(reply, (*_GONE, *_LATE))]
        if errors and len(errors) == len(replies):
            self._failed(errors[0])
            raise Unavailable(_reason(errors[0])) from errors[0]
        self._late = 0
        if not self.up:
            self.up = True
            self._log.info("redis is back: %s", self._found.url)
        return replies

    def _failed(self, error: BaseException) -> None:
        self._late += isinstance(error, _LATE)
        if self.up and (not isinstance(error, _LATE) or self._late >= TIMEOUTS_MAX):
            self.up, url = False, self._found.url
            self._log.warning("redis is unreachable, media goes on: %s: %s", url, _reason(error))

    def _note_writes(self, error: BaseException | None) -> None:
        """A Redis that is full, or a Cluster without some shards, still answers look-ups."""
        refusal = _reason(error) if error else ""
        if bool(refusal) != bool(self._refusal):
            if refusal:
                self._log.warning("redis does not take all flows: %s", refusal)
            else:
                self._log.info("redis takes all flows again")
        self._refusal = refusal


def _value(reply: Any) -> bytes | Unavailable | None:
    if isinstance(reply, exceptions.ResponseError) and not isinstance(reply, _GONE):
        return None if str(reply).startswith("WRONGTYPE") else Unavailable(_reason(reply))
    if isinstance(reply, Exception):
        return Unavailable(_reason(reply))
    return bytes(reply[:VALUE_OCTETS_MAX]) or None if isinstance(reply, bytes) else None


def _reason(error: BaseException) -> str:
    """In one line of a log, whatever a server said."""
    text = str(error) or ("no answer in time" if isinstance(error, _LATE) else type(error).__name__)
    return "".join(each if each.isprintable() else " " for each in text[:200])


def _client(url: settings.RedisUrl) -> Any:
    """The client for one server, a Sentinel's service or a Cluster."""
    # Calls have deadlines of their own, and what fails is tried again by whoever wants it: the one
    # retry is for a connection that was closed while nobody used it.
    common: dict[str, Any] = {
        "username": url.user,
        "password": url.password,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1),
        "socket_timeout": STORE_S,
        "socket_connect_timeout": STORE_S,
        "max_connections": CONNECTIONS_MAX,
    }
    if url.tls:
        common["ssl"] = True
    if url.kind == "unix":
        return aioredis.Redis(unix_socket_path=url.path, db=url.database, **common)
    if url.kind == "redis":
        ((host, port),) = url.nodes
        return aioredis.Redis(host=host, port=port, db=url.database, **common)
    if url.kind == "sentinel":
        asked = {"socket_timeout": STORE_S, "protocol": 2, "ssl": url.tls}
        sentinels = sentinel.Sentinel(url.nodes, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        return sentinels.master_for(url.service, db=url.database, **common)
    nodes = [cluster.ClusterNode(host, port) for host, port in url.nodes]
    return cluster.RedisCluster(startup_nodes=nodes, require_full_coverage=False, **common)
