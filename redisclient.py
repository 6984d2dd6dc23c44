"""The connections to Redis, whatever stands behind the URL; and nobody waits for it too long.

What it owns: the connections, the deadline of every call, and the judgement whether Redis can be
used now. The only importer of redis. What is written there, and why, is its callers': flows are
registry.py's, presence is presence.py's.

    replies = await client.run([(b"GET", b"some:key"), (b"SET", b"other:key", b"1", b"PX", b"500")])

Rules that stay true:
- A call ends with its result or with `Unavailable`, and within its time.
- While Redis is not usable nobody waits for it: one probe a second finds out when it is back.
- A change is one line in the log, when it begins and when it ends.
- No exception of redis-py's passes: each reply is what Redis said, `Refused` or `Unavailable`,
  whose messages are one line without a password.
- What a reply holds is nobody's promise: whoever asked judges it. Only a server that floods its
  client is not bounded but by the time of the call.

One server, a service that Sentinels name, or a Cluster, whose shards fail one by one: therefore
each command has a result of its own, and `up` is false only when no shard answers.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import asyncio
import functools
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from redis import asyncio as aioredis
from redis import exceptions
from redis.asyncio import cluster, sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import endpoints
import settings

PROBE_S = 1.0
"""Between two probes: how long a Redis that is back goes unnoticed."""

CALL_S_MAX = 2.0
"""What any call may take, on each connection: no caller allows more."""

TIMEOUTS_MAX = 3
"""Calls in a row without an answer in time after which Redis is not asked any more. One is a lost
packet or a pause of its own; a refused connection is no matter of counting."""

PROBES = 16
"""Keys that are asked for in a Cluster to see whether it is there, spread over its shards."""

CONNECTIONS_MAX = 16
"""To one server: more than there are calls at once."""

Command = tuple[bytes | str, ...]
"""Its name, the key that it is about, and the rest: a Cluster's shard is found by the second word.
Several keys in one command have to be of one slot (`{...}` in each)."""

_LATE = (exceptions.TimeoutError, TimeoutError)
_GONE = (
    exceptions.ConnectionError,
    exceptions.RedisClusterException,
    exceptions.ClusterDownError,
    OSError,
)

_ELSEWHERE = (*_GONE, *_LATE, exceptions.AskError)  # MovedError is one
_Result = TypeVar("_Result")


class Unavailable(Exception):
    """Redis, or the part of it that would know, was not usable; the message says why."""


class Refused(Exception):
    """Redis answered this command with an error: its message begins with Redis's word for it."""


class Client:
    """The connections of one program. `watch` has to run beside whatever else is called, unless its
    user probes by commands of its own."""

    up: bool
    """False while Redis answers nothing: then calls end at once."""

    def __init__(
        self,
        url: endpoints.RedisUrl,
        timeout_s: float,
        log: logging.Logger,
        meanwhile: str = "calls go on",
    ) -> None:
        """Opens nothing; connects with the first call. `meanwhile` says in the log what goes on
        without Redis."""
        self.url, self.timeout_s = url, timeout_s
        self._log, self._meanwhile = log, meanwhile
        self._late = 0
        self.up = True

    @functools.cached_property
    def _client(self) -> "_Server | _Cluster":
        return _client(self.url, self.timeout_s)

    @property
    def sharded(self) -> bool:
        """True if parts of it may be away while others are not."""
        return self.url.kind == "cluster"

    async def run(self, commands: Sequence[Command], timeout_s: float | None = None) -> list[Any]:
        """Replies, or Refused and Unavailable in their place.

        Raises Unavailable if nothing was answered within `timeout_s`, which is the settings' unless
        it is given.
        """
        if not self.up:
            raise Unavailable("redis is not up")
        return await self._run(commands, timeout_s or self.timeout_s, False)

    async def probe(self, commands: Sequence[Command]) -> list[Any]:
        """The same, also while Redis is not up: this is how one that is back is seen.

        In a Cluster the commands should concern keys in all its shards.
        """
        return await self._run(commands, self.timeout_s, True)

    async def watch(self) -> None:
        """Probe Redis, for ever."""
        count = PROBES if self.sharded else 1
        commands = [
            (b"GETRANGE", b"earshot:probe:%d" % number, b"0", b"0") for number in range(count)
        ]
        while True:
            try:
                await self.probe(commands)
            except Unavailable:
                pass
            await asyncio.sleep(PROBE_S)

    async def close(self) -> None:
        """End all connections."""
        try:
            await _in_time(self._client.close(), self.timeout_s)
        except Exception:  # nothing is left to be done about it
            pass

    async def _run(self, commands: Sequence[Command], timeout_s: float, probe: bool) -> list[Any]:
        try:
            replies = await self._client.call(commands, timeout_s, probe)
        except Exception as error:  # a server that speaks nonsense breaks redis-py in many ways
            self._failed(error)
            raise Unavailable(self._reason(error)) from error
        errors = [reply for reply in replies if isinstance(reply, (*_GONE, *_LATE))]
        if errors and len(errors) == len(replies):
            # Keys of one shard say nothing of the others; a probe's are in all of them.
            if probe or not self.sharded:
                self._failed(errors[0])
            raise Unavailable(self._reason(errors[0])) from errors[0]
        self._late = 0
        if probe and not self.up:
            self.up = True
            self._log.info("redis is back: %s", self.url)
        return [self._told(reply) if isinstance(reply, Exception) else reply for reply in replies]

    def _told(self, error: Exception) -> Refused | Unavailable:
        away = isinstance(error, _ELSEWHERE) or not isinstance(error, exceptions.ResponseError)
        return (Unavailable if away else Refused)(self._reason(error))

    def _failed(self, error: BaseException) -> None:
        self._late += isinstance(error, _LATE)
        if self.up and (not isinstance(error, _LATE) or self._late >= TIMEOUTS_MAX):
            self.up = False
            self._log.warning(
                "redis is unreachable, %s: %s: %s", self._meanwhile, self.url, self._reason(error)
            )

    def _reason(self, error: BaseException) -> str:
        """In one line of a log, whatever a server said: it may say what it was told."""
        text = str(error)
        if isinstance(error, _LATE) or not text:
            text = "no answer in time" if isinstance(error, _LATE) else type(error).__name__
        if self.url.password:
            text = text.replace(self.url.password, "***")
        return "".join(each if each.isprintable() else " " for each in text[:200])


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

    async def call(self, commands: Sequence[Command], timeout_s: float, _: bool) -> list[Any]:
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

    async def call(self, commands: Sequence[Command], timeout_s: float, probe: bool) -> list[Any]:
        """As `_Server.call`; raises only if it is not known who has which keys."""
        if self._stale and (probe or not self._nodes.slots_cache):
            await self._look_around(CALL_S_MAX if probe else timeout_s)
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


def configured(
    found: settings.SharedRedis | None, log: logging.Logger, meanwhile: str = "calls go on"
) -> Client | None:
    """A client as the settings have it, if they have any."""
    return None if found is None else Client(found.url, found.timeout_s, log, meanwhile)


async def closed(client: Client | None) -> None:
    """End its connections, if there is one."""
    if client is not None:
        await client.close()


def _client(url: endpoints.RedisUrl, timeout_s: float) -> _Server | _Cluster:
    # Calls have deadlines of their own, and what fails is tried again by whoever wants it: the one
    # retry is for a connection that was closed while nobody used it.
    common: dict[str, Any] = {
        "username": url.user,
        "password": url.password,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1),
        "socket_timeout": CALL_S_MAX,
        "socket_connect_timeout": CALL_S_MAX,
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
