"""The directory: which transceivers announce themselves, in one Redis or in one for each cluster.

    Redis of cluster 1 ──┐
    Redis of cluster 2 ──┼──▶ a Listing each ──▶ the roster
    [redis]: all others ─┘

What it owns: the loops that read who is there (presence.py), and that what one Redis says, or that
it says nothing, concerns the transceivers of its own clusters alone.

Rules that stay true:
- A Redis that is away changes nothing about the others' transceivers, and costs no offer any time.
- A cluster's Redis can announce nobody of another cluster: whoever can write to one has nothing to
  say elsewhere.
- Without any of them the last that is known stands (roster.py).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import ledger
import metrics
import presence
import redisclient
import roster
import settings
import ufrag

log = logging.getLogger("placement")  # which this is a part of, for who reads its log

TIMEOUT_S = 0.5
"""How long a cluster's own Redis may take where `[redis]` does not say it: half a world is 0.3 s
away. Nobody waits for it."""

Gone = Callable[[roster.Peer], None]
"""Is told of a transceiver whose lease has ended: it is gone, or Redis was emptied."""


class Listing:
    """What one Redis says, of its clusters."""

    def __init__(
        self,
        reader: presence.Reader,
        known: roster.Roster,
        ours: Callable[[roster.Peer], bool],
        name: str,
    ) -> None:
        """`ours` says whether a transceiver is of the clusters that this Redis speaks for."""
        self._reader, self._roster, self._ours, self._name = reader, known, ours, name
        self._unreadable = False
        self.up = False

    async def read(self, gone: Gone) -> None:
        """Read it once."""
        now = time.monotonic()
        try:
            reports = await self._reader.read(now)
        except redisclient.Unavailable as error:
            # The client says for itself that Redis is away.
            if isinstance(error, presence.Unreadable) and not self._unreadable:
                self._unreadable = True
                log.warning("%s does not say which transceivers there are: %s", self._name, error)
            self._roster.unlisted(self._ours)
            self.up = False
        else:
            self.up = True
            if self._unreadable:
                self._unreadable = False
                log.info("%s says again which transceivers there are", self._name)
            for peer in self._roster.listed(reports, now, self._ours):
                gone(peer)


class Directory:
    """All of them."""

    def __init__(
        self,
        config: settings.Signaling,
        known: roster.Roster,
        counters: ledger.Counters,
    ) -> None:
        """Opens nothing: `followed` does."""
        self._homes = settings.clusters(config.cluster)
        self._roster, self._counters = known, counters
        self._listings: list[Listing] = []
        self._sources = _sources(config, self._homes)

    @asynccontextmanager
    async def followed(self, gone: Gone, told: Callable[[], None]) -> AsyncIterator[None]:
        """While it lasts, all of them are read; once before it begins, so that who comes first
        finds somebody. `told` is called after each time."""
        async with AsyncExitStack() as stack:
            loops = []
            for table, homes in self._sources:
                alone = len(self._sources) == 1
                name = "redis" if alone else f"redis of cluster {', '.join(map(str, homes))}"
                # The client says itself that it is away: of which cluster, says its logger's name.
                logger = log if alone else log.getChild(name.removeprefix("redis of "))
                client = redisclient.Client(
                    table.url, table.timeout_s, logger, "calls are placed by what is known"
                )
                stack.push_async_callback(client.close)
                reader = presence.Reader(client, homes)
                self._listings.append(Listing(reader, self._roster, self._of(homes), name))
                loops += [client.watch(), self._follow(self._listings[-1], gone, told)]
            await asyncio.gather(*(self._read(each, gone, told) for each in self._listings))
            tasks = [asyncio.create_task(each) for each in loops]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)
                self._listings.clear()

    def _of(self, homes: Mapping[int, ufrag.Cluster]) -> Callable[[roster.Peer], bool]:
        if len(self._sources) == 1:
            return roster.everybody
        return lambda peer: roster.home(peer, self._homes) in homes

    async def _follow(self, listing: Listing, gone: Gone, told: Callable[[], None]) -> None:
        """Read one for ever."""
        while True:
            await asyncio.sleep(presence.READ_S)
            try:
                await self._read(listing, gone, told)
            except Exception:  # a mistake of ours must not end the reading
                log.exception("reading presence met a fault")

    async def _read(self, listing: Listing, gone: Gone, told: Callable[[], None]) -> None:
        await listing.read(gone)
        up = all(each.up for each in self._listings)
        self._counters.values[metrics.Signaling.REDIS_UP] = up
        told()


def _sources(
    config: settings.Signaling, homes: Mapping[int, ufrag.Cluster]
) -> list[tuple[settings.SharedRedis, dict[int, ufrag.Cluster]]]:
    """Each Redis once, with the clusters that it speaks for."""
    found: list[tuple[settings.SharedRedis, dict[int, ufrag.Cluster]]] = []
    timeout_s = config.redis.timeout_s if config.redis else TIMEOUT_S
    for table in config.cluster:
        url = table.redis or (config.redis.url if config.redis else None)
        if url is None:
            continue
        known = next((its for own, its in found if own.url == url), None)
        if known is None:
            known = {}
            found.append((settings.SharedRedis(url=url, timeout_s=timeout_s), known))
        known[table.id] = homes[table.id]
    return found
