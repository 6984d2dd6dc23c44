"""The registry: flows in Redis, where another relay finds them when their clients arrive there.

What it owns: how a flow stands in Redis, the connections, and the judgement whether Redis can be
used now. The only importer of redis.

    earshot:flow: + the client's address (frame.key, 24 octets)   ->   its ufrag (23 octets)

Rules that stay true:
- Nothing here is needed for media that flows. Whatever Redis does, a call ends with its result or
  with `Unavailable`, and within its time.
- While Redis is not usable nobody waits for it: one probe a second finds out when it is back.
- A change is one line in the log, when it begins and when it ends.
- A value is at most 24 octets of what Redis says, and nobody's promise: the worker judges it. Only
  a server that floods its client is not bounded but by the time of the call.
- The memory of a Redis is not trusted either. Whether it still has what it was given is seen by
  marks in it, and `losses` says when all has to be written again.

One server, a service that Sentinels name, or a Cluster, whose shards fail one by one: therefore
each client of a look-up, and each flow that is written, has a result of its own, and `up` is false
only when no shard answers.

https://redis.io/docs/latest/commands/ (GETRANGE, SET with GET since 6.2)
"""

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from redis import asyncio as aioredis
from redis import exceptions
from redis.asyncio import cluster, sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import endpoints
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

_LATE = (exceptions.TimeoutError, TimeoutError)
_GONE = (
    exceptions.ConnectionError,
    exceptions.RedisClusterException,
    exceptions.ClusterDownError,
    OSError,
)

_ELSEWHERE = (*_GONE, *_LATE, exceptions.AskError)  # MovedError is one
_Command = tuple[bytes | str, ...]
_Result = TypeVar("_Result")


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
        self._client = _client(found.url, found.timeout_s)
        self._ttl = str(max(1, round(found.ttl_s)))
        self._late = 0
        self._refusals = {"store": "", "probe": ""}
        self.up, self.losses = True, 0
        name, count = secrets.token_hex(8).encode(), MARKS if found.url.kind == "cluster" else 1
        self._marks: dict[bytes, int | None] = {
            b"%b%b:%d" % (MARK_PREFIX, name, number): None for number in range(count)
        }
        self._written, self._lost = 0, False

    async def look_up(self, keys: Sequence[bytes]) -> list[bytes | Unavailable | None]:
        """The value of each client: at most `VALUE_OCTETS_MAX` octets, None if there is none.

        Raises Unavailable if no answer came within the settings' `timeout_s`.
        """
        end = str(VALUE_OCTETS_MAX - 1)
        asked = [(b"GETRANGE", PREFIX + key, "0", end) for key in keys]
        replies = await self._call(asked, self._found.timeout_s)
        return [self._value(reply) for reply in replies]

    async def store(self, entries: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """Write clients and their ufrags, for `ttl_s`; returns the positions of those not taken.

        Raises Unavailable if nothing was taken, or nobody knows what.
        """
        written = [(b"SET", PREFIX + key, ufrag, b"EX", self._ttl) for key, ufrag in entries]
        replies = await self._call(written, STORE_S)
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
        try:
            await _in_time(self._client.close(), self._found.timeout_s)
        except Exception:  # nothing is left to be done about it
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
            before, self._marks[mark] = self._marks[mark], self._written
            # Older than what was written last: a replica took over that had not got it. Newer: so
            # was a probe whose answer came too late.
            lost |= before is not None and not _at_least(reply, before)
        self.losses += lost
        if lost and not self._lost:
            self._log.warning("redis lost what it had: all flows are written again")
        self._lost = lost
        self._note_writes("probe", refusal)

    async def _call(
        self, commands: Sequence[_Command], timeout_s: float, probe: bool = False
    ) -> list[Any]:
        """Replies, or exceptions in their place; raises Unavailable if that is all there is."""
        if not self.up and not probe:
            raise Unavailable("redis is not up")
        try:
            replies = await self._client.call(commands, timeout_s, probe)
        except Exception as error:  # a server that speaks nonsense breaks redis-py in many ways
            self._failed(error)
            raise Unavailable(self._reason(error)) from error
        errors = [reply for reply in replies if isinstance(reply, (*_GONE, *_LATE))]
        if errors and len(errors) == len(replies):
            # Clients of one shard say nothing of the others; a probe's marks are in all of them.
            if probe or self._found.url.kind != "cluster":
                self._failed(errors[0])
            raise Unavailable(self._reason(errors[0])) from errors[0]
        self._late = 0
        if probe and not self.up:
            self.up = True
            self._log.info("redis is back: %s", self._found.url)
        return replies

    def _failed(self, error: BaseException) -> None:
        self._late += isinstance(error, _LATE)
        if self.up and (not isinstance(error, _LATE) or self._late >= TIMEOUTS_MAX):
            self.up, url = False, self._found.url
            self._log.warning(
                "redis is unreachable, media goes on: %s: %s", url, self._reason(error)
            )

    def _note_writes(self, by: str, error: BaseException | None) -> None:
        """A Redis that is full, or a Cluster without some shards, still answers look-ups.

        What a probe sees says nothing of what a batch of flows meets, nor the other way round: it
        is over when neither meets anything.
        """
        refused = any(self._refusals.values())
        self._refusals[by] = self._reason(error) if error else ""
        if refused and not any(self._refusals.values()):
            self._log.info("redis takes all flows again")
        elif error and not refused:
            self._log.warning("redis does not take all flows: %s", self._refusals[by])

    def _value(self, reply: Any) -> bytes | Unavailable | None:
        if isinstance(reply, exceptions.ResponseError) and str(reply).startswith("WRONGTYPE"):
            return None
        if isinstance(reply, Exception):
            return Unavailable(self._reason(reply))
        return bytes(reply[:VALUE_OCTETS_MAX]) or None if isinstance(reply, bytes) else None

    def _reason(self, error: BaseException) -> str:
        """In one line of a log, whatever a server said: it may say what it was told."""
        text = str(error)
        if isinstance(error, _LATE) or not text:
            text = "no answer in time" if isinstance(error, _LATE) else type(error).__name__
        if self._found.url.password:
            text = text.replace(self._found.url.password, "***")
        return "".join(each if each.isprintable() else " " for each in text[:200])


def _at_least(reply: Any, number: int) -> bool:
    return isinstance(reply, bytes) and reply[:20].isdigit() and int(reply[:20]) >= number


# --- one server, and many ------------------------------------------------------------------------


async def _in_time(call: Coroutine[Any, Any, _Result], timeout_s: float) -> _Result:
    """What `call` returns, or raises; TimeoutError when its time is over.

    It is a task of its own, which is cancelled then and not waited for: redis-py writes by
    asyncio.wait_for, which before Python 3.12 now and then swallows the cancellation.
    """
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        await asyncio.wait([task], timeout=timeout_s)
    finally:
        task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


class _Server:
    """One server: that of the URL, or the one that Sentinels name when a connection is made."""

    def __init__(self, client: Any, sentinels: Sequence[Any] = ()) -> None:
        self._client, self._sentinels = client, sentinels

    async def call(self, commands: Sequence[_Command], timeout_s: float, _: bool) -> list[Any]:
        """Replies, or errors in their place; raises what happens to the connection."""
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await _in_time(pipeline.execute(raise_on_error=False), timeout_s)
        return replies

    async def close(self) -> None:
        for each in (self._client, *self._sentinels):
            await each.aclose()


class _Cluster:
    """The shards of a Cluster, each of which answers, or does not, for itself.

    redis-py's own pipeline over a Cluster ends as a whole when a shard is gone, waits for the
    slowest, and does not look for a new primary.
    """

    def __init__(self, client: cluster.RedisCluster) -> None:
        self._client, self._nodes = client, client.nodes_manager
        self._stale = True
        self._late: dict[str, int] = {}

    async def call(self, commands: Sequence[_Command], timeout_s: float, probe: bool) -> list[Any]:
        """As `_Server.call`; raises only if it is not known who has which keys."""
        if self._stale and (probe or not self._nodes.slots_cache):
            await self._look_around(STORE_S if probe else timeout_s)
        asked = [cluster.PipelineCommand(at, *command) for at, command in enumerate(commands)]
        shards: dict[cluster.ClusterNode, list[cluster.PipelineCommand]] = {}
        for each in asked:
            try:
                node = self._client.get_node_from_key(each.args[1])
            except exceptions.SlotNotCoveredError as error:
                each.result, self._stale = error, True
            else:
                assert node is not None  # get_node_from_key raises instead
                shards.setdefault(node, []).append(each)
        await asyncio.gather(
            *(self._ask(node, some, timeout_s, probe) for node, some in shards.items())
        )
        return [each.result for each in asked]

    async def _look_around(self, timeout_s: float) -> None:
        """Ask any node who has which keys now."""
        try:
            await _in_time(self._nodes.initialize(), timeout_s)
        except Exception:
            if not self._nodes.slots_cache:
                raise
        else:
            self._stale = False
            self._late = {name: self._late.get(name, 0) for name in self._nodes.nodes_cache}

    async def _ask(
        self,
        node: cluster.ClusterNode,
        asked: list[cluster.PipelineCommand],
        timeout_s: float,
        probe: bool,
    ) -> None:
        """Let a shard answer, in time; one that hangs is left to the probes before long."""
        late = self._late.get(node.name, 0)
        failure: Exception | None = None
        try:
            if late < TIMEOUTS_MAX or probe:
                await _in_time(node.execute_pipeline(asked), timeout_s)
            else:
                failure = TimeoutError()
        except Exception as error:
            failure = error
        results = [failure or each.result for each in asked]
        for each, result in zip(asked, results, strict=True):
            each.result = result
        self._late[node.name] = late + 1 if isinstance(results[0], _LATE) else 0
        self._stale |= any(isinstance(each, _ELSEWHERE) for each in results)

    async def close(self) -> None:
        for each in "nodes_cache", "startup_nodes":
            await self._nodes.aclose(each)


def _client(url: endpoints.RedisUrl, timeout_s: float) -> _Server | _Cluster:
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
        return _Server(aioredis.Redis(unix_socket_path=url.path, db=url.database, **common))
    if url.kind == "redis":
        ((host, port),) = url.nodes
        return _Server(aioredis.Redis(host=host, port=port, db=url.database, **common))
    if url.kind == "sentinel":
        # One after the other, until one answers: those that do not must leave time for the rest.
        share_s = timeout_s / (len(url.nodes) + 1)
        asked = {
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": share_s,
            "socket_connect_timeout": share_s,
            "ssl": url.tls,
        }
        named = sentinel.Sentinel(url.nodes, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        client = named.master_for(url.service, db=url.database, **common)
        return _Server(client, named.sentinels)
    nodes = [cluster.ClusterNode(host, port) for host, port in url.nodes]
    return _Cluster(
        cluster.RedisCluster(startup_nodes=nodes, require_full_coverage=False, **common)
    )
