"""Presence: transceivers announce themselves in Redis, under a lease; signaling reads who is there.

    earshot:{presence}                  a sorted set of names, by the time each was last announced
    earshot:{presence}:10.4.1.2:9000    what the transceiver of that name says of itself, as JSON

What it owns: how a transceiver stands in Redis, the report that it gives of itself there and in its
health, and what of either is believed. The announcing and the reading are a loop each.

Rules that stay true:
- A transceiver that dies is gone when its lease ends; one that drains or leaves says so at once.
- Everything read is untrusted. A name leads to an address inside a configured cluster's prefix and
  ports, or nowhere: whoever can write to Redis can send offers only to where transceivers live.
  Names, reports and their numbers are bounded. What is ignored is said in the log once.
- A report names its version: one that is newer than this reader is ignored, and not guessed at.
- No keyspace is scanned, and one command each way is all that a beat costs. All keys have one hash
  tag, so that a Cluster keeps them in one shard.
- Nothing waits for Redis but these loops. Without it the last that is known stands (roster.py).

A Redis user needs SET, DEL, ZADD and ZREM (transceivers), ZRANGE, GETRANGE and ZREM (signaling) on
`~earshot:{presence}*`.
"""

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

import endpoints
import redisclient
import ufrag

log = logging.getLogger("presence")

NAMES = b"earshot:{presence}"
PREFIX = NAMES + b":"

VERSION = 1
"""Of a report. Fields may be added without a new one; it is for what would mislead a reader."""

BEAT_S = 0.4
"""Between two announcements of a transceiver. Each is 150 us of its audio loop's time."""

LEASE_S = 1.5
"""How long an announcement stands. Two beats may be lost; with READ_S after it, a transceiver that
dies is gone for everybody within two seconds."""

READ_S = 0.3
"""Between two readings of signaling: 30 us and some hundred octets a transceiver."""

BATCH = 64
"""Reports that are read with one round trip: offers wait 2 ms for their reading at the most."""

SWEEP_S = 10.0
"""How long a name without a report is kept among the names: its transceiver may only be late."""

TRANSCEIVERS_MAX = 1024
"""Names that are read: those announced last. A hundred hosts with ten processes each."""

NAME_OCTETS_MAX = 64
"""`[IPv6]:port` has 47."""

REPORT_OCTETS_MAX = 16_384
"""Of a report: more calls by key than that are left out, those of the keys with the fewest."""

KEYS_MAX = 256
"""Keys of which a report says how many calls they have."""

KEY_CHARACTERS_MAX = 128
"""Of a key's name."""

NUMBER_MAX = 1 << 53
"""Of any count in a report: what JSON carries exactly."""

IGNORED_MAX = 256
"""Names that are remembered for having been ignored, so that each is a line in the log once."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a transceiver says of itself."""

    draining: bool = False
    """It takes no new calls."""
    sessions: int = 0
    """Calls of any state."""
    sessions_max: int = 1
    """Calls it takes at most."""
    connecting: int = 0
    """Calls whose set-up is under way."""
    connecting_max: int = NUMBER_MAX
    """Of those at most."""
    load: float = 0.0
    """How near it is to refusing calls by what it measures: 1 is there."""
    opened: int | None = None
    """Calls that its process has taken since it started; None if it does not say."""
    started: float = 0.0
    """When its process started, Unix time: tells one from the next at the same address."""
    beat: int = 0
    """Which of its reports this is: a larger one is newer. 0 from one that does not count."""
    cluster: int | None = None
    """The cluster that it belongs to."""
    calls_by_key: Mapping[str, int] = field(default_factory=dict)
    """Calls of each key, by the key's name."""


def read(found: Any) -> Report | None:
    """A report from its JSON; None for anything that is none. Other fields are ignored."""
    if not isinstance(found, dict) or found.get("state") not in ("serving", "draining"):
        return None
    sessions, most = _count(found, "sessions"), _count(found, "sessions_max")
    if sessions is None or not most:
        return None
    return Report(
        draining=found["state"] == "draining",
        sessions=sessions,
        sessions_max=most,
        connecting=_count(found, "connecting") or 0,
        connecting_max=_count(found, "connecting_max") or NUMBER_MAX,
        load=max(0.0, _figure(found, "load")),
        opened=_count(found, "opened"),
        started=_figure(found, "started"),
        beat=_count(found, "beat") or 0,
        cluster=_count(found, "cluster"),
        calls_by_key=_calls(found.get("calls_by_key")),
    )


def _count(found: dict[str, Any], name: str) -> int | None:
    value = found.get(name)
    return value if type(value) is int and 0 <= value <= NUMBER_MAX else None


def _figure(found: dict[str, Any], name: str) -> float:
    value = found.get(name)
    if isinstance(value, float | int) and abs(value) <= NUMBER_MAX:
        return float(value)
    return 0.0


def _calls(found: Any) -> dict[str, int]:
    if not isinstance(found, dict) or len(found) > KEYS_MAX:
        return {}
    return {
        key: calls
        for key, calls in found.items()
        if len(key) <= KEY_CHARACTERS_MAX and type(calls) is int and 0 <= calls <= NUMBER_MAX
    }


def counted(keys: Iterable[str]) -> dict[str, int]:
    """How many calls each key has, from the key of each call, if it has one; those with the most,
    as far as a report has room."""
    left, kept = REPORT_OCTETS_MAX // 2, {}
    for key, count in collections.Counter(filter(None, keys)).most_common(KEYS_MAX):
        left -= 6 * len(key) + 24  # an octet takes at most six in JSON
        if left < 0:
            break
        kept[key] = count
    return kept


# --- a transceiver's side -------------------------------------------------------------------------


class Announcer:
    """Announces one transceiver, for as long as it runs; without a Redis it does nothing."""

    def __init__(
        self,
        client: redisclient.Client | None,
        at: endpoints.Endpoint,
        report: Callable[[], dict[str, Any]],
        unix: Callable[[], float] = time.time,
    ) -> None:
        """`report` says how the transceiver is, with `calls_by_key` bounded."""
        self._client, self._report, self._unix = client, report, unix
        self._name = str(at).encode()
        self._changed = asyncio.Event()
        self._refused = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Announce it from now on, and look after the client."""
        if self._client is not None:
            loops = self.run(self._client), self._client.watch()
            self._tasks = [asyncio.create_task(each) for each in loops]

    async def stop(self) -> None:
        """Announce it no more, and say so."""
        if self._client is None or not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        try:
            await self._client.run([(b"DEL", PREFIX + self._name), (b"ZREM", NAMES, self._name)])
        except redisclient.Unavailable:
            pass  # then the lease says it

    def changed(self) -> None:
        """Announce it now, and not only with the next beat."""
        self._changed.set()

    async def run(self, client: redisclient.Client) -> None:
        """Announce it, for ever."""
        while True:
            self._changed.clear()
            try:
                await self._announce(client)
            except Exception:  # a mistake of ours must not make this transceiver unknown
                log.exception("an announcement met a fault")
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _announce(self, client: redisclient.Client) -> None:
        try:
            replies = await client.run(announcement(self._name, self._report(), self._unix()))
        except redisclient.Unavailable:
            return  # the client says it, once
        refusal = next((each for each in replies if isinstance(each, Exception)), None)
        if refusal is not None and not self._refused:
            log.warning("redis does not take this transceiver's presence: %s", refusal)
        elif refusal is None and self._refused:
            log.info("redis takes this transceiver's presence again")
        self._refused = refusal is not None


def announcement(name: bytes, report: dict[str, Any], unix: float) -> list[redisclient.Command]:
    """What an announcement writes."""
    value = orjson.dumps({"v": VERSION, **report})
    lease = b"%d" % round(1e3 * LEASE_S)
    return [
        (b"SET", PREFIX + name, value, b"PX", lease),
        (b"ZADD", NAMES, b"%d" % int(unix), name),
    ]


# --- signaling's side -----------------------------------------------------------------------------


class Unreadable(redisclient.Unavailable):
    """Redis answers, and what it says is no list of transceivers; the message says why."""


class Reader:
    """Reads who is there."""

    def __init__(self, client: redisclient.Client, clusters: Mapping[int, ufrag.Cluster]) -> None:
        """`clusters` are those that a name may lead to."""
        self._client, self._clusters = client, clusters
        self._empty: dict[bytes, float] = {}  # names without a report, and since when
        self._ignored: set[bytes] = set()

    async def read(self, now: float) -> dict[endpoints.Endpoint, Report]:
        """Who is there, by address. Raises redisclient.Unavailable, and of it Unreadable.

        Names that have had no report for SWEEP_S are taken out on the way.
        """
        (listed,) = await self._client.run(
            [(b"ZRANGE", NAMES, b"0", b"%d" % (TRANSCEIVERS_MAX - 1), b"REV")]
        )
        names = _names(listed)
        found: dict[endpoints.Endpoint, Report] = {}
        empty: dict[bytes, float] = {}
        for first in range(0, len(names), BATCH):
            batch = names[first : first + BATCH]
            for name, value in zip(batch, await self._values(batch), strict=True):
                if value == b"":
                    empty[name] = self._empty.get(name, now)
                    continue
                endpoint, report = self._judged(name, value)
                if endpoint is not None and report is not None:
                    found[endpoint] = report
        stale = {name for name, since in empty.items() if now - since > SWEEP_S}
        if stale:
            await self._client.run([(b"ZREM", NAMES, *stale)])
        self._empty = {name: since for name, since in empty.items() if name not in stale}
        return found

    async def _values(self, names: list[bytes]) -> list[Any]:
        """What is written under each name, as far as it may be read; nothing is an empty one."""
        end = b"%d" % REPORT_OCTETS_MAX  # an octet more than may be
        values = await self._client.run([(b"GETRANGE", PREFIX + n, b"0", end) for n in names])
        for value in values:
            if isinstance(value, redisclient.Unavailable):
                raise value
        return values

    def _judged(self, name: bytes, value: Any) -> tuple[endpoints.Endpoint | None, Report | None]:
        try:
            endpoint, report = judge(name, value, self._clusters)
        except ValueError as error:
            if name not in self._ignored and len(self._ignored) < IGNORED_MAX:
                self._ignored.add(name)
                log.warning("ignored in redis: transceiver %.80r: %s", name, error)
            return None, None
        self._ignored.discard(name)
        return endpoint, report


def _names(listed: Any) -> list[bytes]:
    if isinstance(listed, redisclient.Unavailable):
        raise listed
    if isinstance(listed, Exception):
        raise Unreadable(str(listed))
    if not isinstance(listed, list):
        raise Unreadable("it gave no list")
    names = (each for each in listed[:TRANSCEIVERS_MAX] if isinstance(each, bytes))
    return list(dict.fromkeys(each for each in names if len(each) <= NAME_OCTETS_MAX))


def judge(
    name: bytes, value: Any, clusters: Mapping[int, ufrag.Cluster]
) -> tuple[endpoints.Endpoint, Report]:
    """The address and the report that are written there. Raises ValueError with what is wrong."""
    endpoint = endpoints.Endpoint(name.decode("ascii"))
    if str(endpoint).encode() != name:
        raise ValueError("its address is written in another way than ours")
    if not isinstance(value, bytes) or len(value) > REPORT_OCTETS_MAX:
        raise ValueError("no report, or one that is too long")
    try:
        found = orjson.loads(value)
    except orjson.JSONDecodeError:
        raise ValueError("its report is not JSON") from None
    version = found.get("v") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(f"its report has version {version!r:.20}, this reads {VERSION}")
    report = read(found)
    if report is None:
        raise ValueError("its report says nothing that can be understood")
    home = None if report.cluster is None else clusters.get(report.cluster)
    if home is None:
        raise ValueError(f"it is of cluster {report.cluster}, which announces nobody here")
    if not home.contains(endpoint.address, endpoint.port):
        raise ValueError(f"its address is outside cluster {home.id}")
    return endpoint, report
