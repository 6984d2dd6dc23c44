"""Many complete WebRTC calls at once, for measurements: the engine behind flood.py.

A call is made as a page makes it: an offer posted to signaling, ICE checks to whatever candidate
the answer names, DTLS, SRTP, a data channel, then a packet of speech every 20 ms and whatever comes
back, until it hangs up or vanishes. Each call has a socket of its own, on loopback an address of
its own, too; all run in one event loop (ring.py is one call, heard.py what it heard, speaking.py
what it says and whether the echo is that).

    async with Ringing(page, seed=7) as ringing:
        calls = await ringing.hold(20)            # talking, each being answered, until the end
        since = time.monotonic_ns()
        ...                                       # something is broken here
        silences = [call.silence_ms(since, time.monotonic_ns()) for call in calls]

Rules that stay true:
- Whatever goes wrong with a call ends in its `failure`, one of FAILURES; nothing is raised.
- Times are of time.monotonic_ns(); of arrivals it is the kernel's time, so that a busy client does
  not pass for silence. How late the client itself sends is kept, too (`late_ms`).
- Load goes only where target.guard lets it: the page's host, and each candidate in an answer.
- The number of calls at once is bounded; what is beyond that is counted, and not made.

RFC 8445 (ICE), RFC 5764 (DTLS-SRTP), RFC 3550 (RTP).
"""

import asyncio
import itertools
import random
import secrets
import time
from array import array
from collections.abc import Callable
from types import TracebackType
from typing import Any

import aiohttp
import speaking
import target
from ring import FAILURES, Call, Return

import dtls
import opus

__all__ = ["FAILURES", "Call", "Return", "Ringing"]

AT_ONCE_MAX = 500
"""Calls of one process: beyond some hundred a core is full, and the figures are of this tool."""

SLOTS, SLOT_S = 10, 0.002
"""The 20 ms of a packet, in slots: each call sends in one of them, always the same."""

BEHIND_S_MAX = 0.2
"""A client that is further behind than that has stood still: what was due is skipped."""

LOOK_S = 0.15
"""How often each call is asked whether its line is alive."""

OFFSET_EVERY_S = 1.0
"""The distance of the two clocks is measured so often."""

CLOSE_S_MAX, ABANDON_S_MAX = 10.0, 2.0
"""To end all calls; and for answers to offers that are on their way, which can be hung up then."""

AT_ONCE_CLOSING = 20


class Ringing:
    """The calls of one process towards one page."""

    def __init__(
        self,
        page: str,
        *,
        key: str | None = None,
        seed: int,
        owned: bool = False,
        session: dict[str, Any] | None = None,
        comes_back: bool = False,
        at_once: int = 100,
        vanishing: float = 0.0,
        interrupting: float = 0.0,
        checking: float = 0.0,
    ) -> None:
        """Raises target.TargetError for a page that may not be loaded.

        `session` is sent with each offer (default: speaking.SESSION, whose packets flow both ways
        nearly all the time). `comes_back`: a call whose path is dead goes on in another one, by
        `?resume=`. Of the calls the share `vanishing` ends without a goodbye, the share
        `interrupting` speaks into replies, and of the share `checking` the first whole reply is
        kept, to be compared with what was said (`Call.echo`).
        """
        self.calls: list[Call] = []
        """All that were ever begun, in that order; they stay when they have ended."""
        self.refused = 0
        """Calls that were due and not begun, since `at_once` of them were under way."""
        self.late_ms = array("f")
        """How late each packet of speech left against its own schedule: this tool's own jitter."""
        self.skipped = 0
        """Packets that were due while this process stood still, and were not sent."""
        self.base = target.page(page, owned)
        self.key, self.owned, self.comes_back = key, owned, comes_back
        self.voice = speaking.Voice(seed)
        self.certificate = dtls.Certificate.generateCertificate()
        self.offset_ns = time.time_ns() - time.monotonic_ns()
        self.http: aiohttp.ClientSession
        self._session, self._at_once = session, min(at_once, AT_ONCE_MAX)
        self._vanishing, self._interrupting = vanishing, interrupting
        self._checking = checking
        self._chance = random.Random(seed)
        self._addresses = itertools.count(secrets.randbelow(1 << 16) << 4)
        self._slots: list[list[Call]] = [[] for _ in range(SLOTS)]
        self._tasks: dict[asyncio.Task[None], Call] = {}
        self._keeping: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Ringing":
        """Encode what will be said, which takes a second or two, and begin to keep time."""
        self.voice.prepare(opus.RATES_HZ[0])
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self._at_once))
        self._keeping = [asyncio.create_task(self._pace()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    async def run(
        self,
        rate_per_s: float,
        seconds: float,
        talk_s: float,
        *,
        poisson: bool = True,
        told: Callable[[float], None] = lambda _: None,
    ) -> list[Call]:
        """Begin calls for `seconds`, each talks for `talk_s` and ends; returns once all have.

        Arrivals are random with that rate, by the seed, or even. `told` hears now and then how many
        seconds have passed.
        """
        loop, due, first = asyncio.get_running_loop(), 0.0, len(self.calls)
        begun = loop.time()
        while True:
            due += self._chance.expovariate(rate_per_s) if poisson else 1 / rate_per_s
            if due > seconds:
                break
            while (left := begun + due - loop.time()) > 0:
                await asyncio.sleep(min(left, LOOK_S))
                told(loop.time() - begun)
            if len(self._tasks) >= self._at_once:
                self.refused += 1
            else:
                self._begin(talk_s)
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=LOOK_S)
            told(loop.time() - begun)
        return self.calls[first:]

    async def hold(self, count: int, within_s: float = 30.0) -> list[Call]:
        """So many more calls that go on talking until `close`; returns those that have been
        answered by speech or have failed, all of them or what there is after `within_s`."""
        loop = asyncio.get_running_loop()
        until, calls = loop.time() + within_s, []
        for _ in range(min(count, AT_ONCE_MAX - len(self._tasks))):
            calls.append(self._begin(None))
            await asyncio.sleep(0.02)  # not all handshakes at once
        self.refused += count - len(calls)
        while loop.time() < until and not all(map(_settled, calls)):
            await asyncio.sleep(LOOK_S)
        return [call for call in calls if _settled(call)]

    def talking(self) -> list[Call]:
        """Calls that are connected now."""
        return [call for call in self._tasks.values() if call.state == "talking"]

    @property
    def under_way(self) -> int:
        """Calls that have begun and not ended."""
        return len(self._tasks)

    async def close(self) -> None:
        """End all calls, with a goodbye where one reaches the server; twice is harmless."""
        room = asyncio.Semaphore(AT_ONCE_CLOSING)

        async def end(call: Call) -> None:
            async with room:
                await call.end(politely=True)

        tasks, ending, offering = list(self._tasks), [], []
        for task, call in self._tasks.items():
            if call.state == "talking":
                ending.append(asyncio.create_task(end(call)))
            elif call.state == "offering":
                call.abandon()
                offering.append(task)
            else:  # it waits for something that may never come; it hangs up by itself
                task.cancel()
        if offering:
            _, late = await asyncio.wait(offering, timeout=ABANDON_S_MAX)
            for task in late:
                task.cancel()
        if tasks:
            await asyncio.wait([*ending, *tasks], timeout=CLOSE_S_MAX)
        for task in (*ending, *tasks, *self._keeping):
            task.cancel()
        await asyncio.gather(*ending, *tasks, *self._keeping, return_exceptions=True)
        self._keeping.clear()
        if not self.http.closed:
            await self.http.close()

    def address(self) -> str:
        """An address of loopback that nothing else of this process sends from."""
        number = next(self._addresses) & 0xFFFFF
        return f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"

    # --- inside ----------------------------------------------------------------------------------

    def _begin(self, talk_s: float | None) -> Call:
        number, chance = len(self.calls), self._chance
        interrupts = chance.random() < self._interrupting
        politely = chance.random() >= self._vanishing
        checked = chance.random() < self._checking
        session = self._session or (speaking.POLITE if interrupts else speaking.SESSION)
        call = Call(self, number, session, interrupts, checked=checked)
        self.calls.append(call)
        slot = min(self._slots, key=len)
        slot.append(call)
        task = asyncio.create_task(call.live(talk_s, politely=politely))
        self._tasks[task] = call

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            slot.remove(call)
            mistake = None if task.cancelled() else task.exception()
            if isinstance(mistake, Exception):
                raise mistake  # one of ours: the loop logs it

        task.add_done_callback(ended)
        return call

    async def _pace(self) -> None:
        """Have each call send when it is due."""
        loop, late_ms = asyncio.get_running_loop(), self.late_ms
        begun, done = loop.time(), 0
        while True:
            now = loop.time()
            due = int((now - begun) / SLOT_S)
            if due - done > BEHIND_S_MAX / SLOT_S:
                skipped = due - done - int(BEHIND_S_MAX / SLOT_S)
                self.skipped += skipped * len(self._tasks) // SLOTS
                done += skipped
            while done < due:
                done += 1
                for call in self._slots[done % SLOTS]:
                    call.tick()
                    late_ms.append(1e3 * (loop.time() - begun - done * SLOT_S))
            await asyncio.sleep(begun + (done + 1) * SLOT_S - loop.time())

    async def _watch(self) -> None:
        """Look after all lines, and after the clocks."""
        loop = asyncio.get_running_loop()
        measured = loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            now = loop.time()
            for call in list(self._tasks.values()):
                call.look(now)
            if now - measured > OFFSET_EVERY_S:
                measured, self.offset_ns = now, time.time_ns() - time.monotonic_ns()


def _settled(call: Call) -> bool:
    return call.state in ("ended", "failed") or "first_reply" in call.moments
