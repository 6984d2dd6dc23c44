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

from array import array
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ring import FAILURES, Call, Return

__all__ = ["FAILURES", "Call", "Return", "Ringing"]

AT_ONCE_MAX = 500
"""Calls of one process: beyond some hundred a core is full, and the figures are of this tool."""


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
        checking: int = 0,
    ) -> None:
        """Raises target.TargetError for a page that may not be loaded.

        `session` is sent with each offer (default: speaking.SESSION, whose packets flow both ways
        nearly all the time). `comes_back`: a call whose path is dead goes on in another one, by
        `?resume=`. Of the calls the share `vanishing` ends without a goodbye, and the share
        `interrupting` speaks into replies. `checking`: replies of so many calls are kept, to be
        compared with what was said (`Call.echoes`).
        """
        self.calls: list[Call] = []
        """All that were ever begun, in that order; they stay when they have ended."""
        self.refused = 0
        """Calls that were due and not begun, since `at_once` of them were under way."""
        self.late_ms: array[float] = array("f")
        """How late each packet of speech left against its own schedule: this tool's own jitter."""

    async def __aenter__(self) -> "Ringing":
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

    async def hold(self, count: int, within_s: float = 30.0) -> list[Call]:
        """So many more calls that go on talking until `close`; returns those that have been
        answered by speech or have failed, all of them or what there is after `within_s`."""
        raise NotImplementedError

    def talking(self) -> list[Call]:
        """Calls that are connected now."""
        raise NotImplementedError

    async def close(self) -> None:
        """End all calls, with a goodbye where one reaches the server; twice is harmless."""
        raise NotImplementedError
