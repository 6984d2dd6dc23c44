"""The pacer: sessions are called when their time has come."""

import asyncio
from typing import Any

import ledger
import metrics
import pacer

from . import shim


def test_the_pacer_calls_in_time_and_forgets_what_is_withdrawn() -> None:
    class Due:
        def __init__(self, wakes_at: float | None) -> None:
            self.wakes_at = wakes_at

    async def run() -> None:
        loop = asyncio.get_running_loop()
        counters = ledger.Counters(metrics.Transceiver)
        timings = ledger.Histograms(metrics.Timing)
        played: list[tuple[Any, float]] = []

        def play(session: Any, now: float) -> None:
            played.append((session, now))
            session.wakes_at = None
            paced.schedule(session)

        paced = pacer.Pacer(loop, loop.time, play, counters, timings)
        begun = loop.time()
        soon, later, never = Due(begun + 0.01), Due(begun + 0.02), Due(begun + 0.015)
        for session in (later, soon, never):
            paced.schedule(session)  # type: ignore[arg-type]  # all that a pacer needs of a session
        never.wakes_at = None
        paced.schedule(never)  # type: ignore[arg-type]
        await shim.until(lambda: len(played) == 2)
        assert [session for session, _ in played] == [soon, later]
        assert all(
            now >= at for (_, now), at in zip(played, (begun + 0.01, begun + 0.02), strict=True)
        )
        assert timings.count(metrics.Timing.PACER) == 2
        paced.stop()

    asyncio.run(run())
