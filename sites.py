"""Sites: asks their relays how they are.

    GET {status}/readyz     200: takes clients; 503: takes none, as while it drains
    GET {status}/metrics    how many flows it has

What it owns: the asking. What follows from the answers is standing.py's, what follows from that
steering.py's.

Rules that stay true:
- No offer waits for any of it: it is placed by what was heard last.
- Every answer is bounded in octets and in time; no redirect is followed.
- Sites are asked each for itself, and not all at the same moment, nor by all instances: one that
  hangs delays the news of no other.
- A change is one line in the log, and no silence is.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

import ledger
import settings
import standing
from steering import UNKNOWN, State

ANSWER_OCTETS_MAX = 4 << 20
"""Of a relay's metrics: a worker takes some 20,000, and there are 256 at the most."""

TIMEOUT_S = 1.0
"""Of a question. A relay answers in milliseconds, half a world away in 300."""

JITTER = 0.2
"""Share of the period by which a pause may be shorter."""

CONNECTIONS_MAX = 256
"""To all relays at once. Others wait for one, for less than the timeout of those before them."""

_FLOWS = re.compile(
    rb"^earshot_relay_keeper_flows_left ([0-9]{1,15}(?:\.[0-9]{1,17})?(?:e\+[0-9]{1,2})?)$", re.M
)
"""The line of the metrics that has all of a relay's flows, whichever worker has them."""

log = logging.getLogger("sites")


class Figures(ledger.Kinds):
    """A site, as this instance of signaling sees it."""

    TOLD = "calls", "Whose client was told to enter here."
    HEALTHY = (
        "state",
        "1 if it gets clients by its health: all is well, or nothing is known of it.",
        "None of its relays answers, or all of them drain.",
        True,
    )
    LOAD = (
        "permille",
        "Of the capacity of those relays that serve; 0 if nothing is known of it.",
        "Above `busy` it gives clients away.",
        True,
    )


class Sites:
    """What is known of all sites."""

    def __init__(self, config: settings.Signaling) -> None:
        """Asks nobody before `followed`."""
        self._standings: dict[str, standing.Standing] = {}
        self._tables: dict[str, settings.Site] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._figures: dict[str, ledger.Counters] = {}
        self._http: aiohttp.ClientSession | None = None
        self._period_s = 1.0
        self._said: dict[str, list[str]] = {}
        self.reload(config)

    def reload(self, config: settings.Signaling) -> None:
        """Follow the sites of these settings; what is known of those that stayed as they were is
        still known."""
        self._period_s = (config.steering or settings.Steering()).poll_s
        tables = {site.name: site for site in config.site}
        for name, table in self._tables.items():
            if tables.get(name) != table:
                self._standings.pop(name)
                self._said.pop(name, None)
                task = self._tasks.pop(name, None)
                if task is not None:
                    task.cancel()
        for name, table in tables.items():
            if name not in self._standings:
                self._standings[name] = standing.Standing(table.capacity, table.status)
        self._tables = tables
        self._figures = {
            name: self._figures.get(name) or ledger.Counters(Figures) for name in tables
        }
        self._follow()

    def states(self) -> dict[str, State]:
        """Of those sites of which anything is known."""
        now, found = time.monotonic(), {}
        for name, each in self._standings.items():
            state = each.state(now)
            if state is not None:
                found[name] = state
        return found

    def sent(self, name: str) -> None:
        """A client was told to enter there."""
        if name in self._standings:
            self._standings[name].sent()
            self._figures[name].values[Figures.TOLD] += 1

    def rows(self) -> list[tuple[dict[str, str], ledger.Counters]]:
        """Figures of each site, as metrics.py writes them."""
        states = self.states()
        for name, counters in self._figures.items():
            healthy, load, _ = states.get(name, UNKNOWN)
            counters.values[Figures.HEALTHY] = healthy
            counters.values[Figures.LOAD] = min(round(1000 * load), 1 << 53)
        return [({"site": name}, counters) for name, counters in self._figures.items()]

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """While it lasts, the relays are asked."""
        async with _session() as session:
            self._http = session
            self._follow()
            try:
                yield
            finally:
                self._http, tasks = None, list(self._tasks.values())
                self._tasks.clear()
                for task in tasks:
                    task.cancel()
                if tasks:
                    await asyncio.wait(tasks)

    async def asked(self) -> dict[str, State]:
        """Ask all of them now, as often as it takes to know which relays are lost, and say how they
        are: for who wants to know it once."""
        async with _session() as http:
            for _ in range(standing.MISSES):
                questions = [
                    (name, at) for name, each in self._tables.items() for at in each.status
                ]
                await asyncio.gather(*(self._ask(http, name, at) for name, at in questions))
                if not any(each.silent() for each in self._standings.values()):
                    break
        return self.states()

    def _follow(self) -> None:
        if self._http is None:
            return
        for name, table in self._tables.items():
            if table.status and name not in self._tasks:
                self._tasks[name] = asyncio.create_task(self._keep_asking(self._http, table))

    async def _keep_asking(self, http: aiohttp.ClientSession, site: settings.Site) -> None:
        """Ask all relays of a site, for ever."""
        while True:
            begun = time.monotonic()
            try:
                await asyncio.gather(*(self._ask(http, site.name, at) for at in site.status))
                self._standings[site.name].turn()
                self._tell(site.name)
            except Exception:  # a mistake of ours must not end the asking
                log.exception("asking site %s met a fault", site.name)
            period_s = self._period_s * random.uniform(1 - JITTER, 1)
            await asyncio.sleep(max(0.05, begun + period_s - time.monotonic()))

    async def _ask(self, http: aiohttp.ClientSession, name: str, at: str) -> None:
        """Ask one relay, and note what it says."""
        known, ready, flows = self._standings[name], None, None
        try:
            async with http.get(f"{at}/readyz", allow_redirects=False) as response:
                ready = {200: True, 503: False}.get(response.status)
            async with http.get(f"{at}/metrics", allow_redirects=False) as response:
                if response.status == 200:
                    flows = flows_of(await _read(response))
        except (aiohttp.ClientError, TimeoutError) as error:
            log.debug("%s at %s: %r", name, at, error)
            ready = None
        if ready is None:
            known.failed(at, time.monotonic())
        else:
            known.heard(at, ready, flows, time.monotonic())

    def _tell(self, name: str) -> None:
        """Say what has changed about a site."""
        ailments, before = self._standings[name].ailments(), self._said.get(name, [])
        if ailments == before:
            return
        self._said[name] = ailments
        state = self._standings[name].state(time.monotonic())
        if not ailments:
            log.info("site %s is well again", name)
        elif state is not None and state.healthy:
            log.warning("site %s has less room: %s", name, ", ".join(ailments))
        else:
            log.warning("site %s gets no clients: %s", name, ", ".join(ailments))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # what is bounded is what comes
        headers={"Accept-Encoding": "identity"},
    )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """A body, or as much of it as is read of one."""
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > ANSWER_OCTETS_MAX:
            break
    return bytes(found[:ANSWER_OCTETS_MAX])


def flows_of(metrics: bytes) -> int | None:
    """How many flows a relay has, from its metrics; None if they do not say."""
    found = _FLOWS.search(metrics)
    return None if found is None else int(float(found[1]))
