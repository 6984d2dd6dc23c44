"""The monitor's door: its three paths, and a port that others have for a while."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

import endpoints
import monitor

PATIENCE_S = 20


async def served(ailments: list[str], at: str, test: Callable[[str], Awaitable[None]]) -> None:
    """Serve on a port of the kernel's choice, or on `at`, and test at the address in the log."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "metrics at http" in record.getMessage():
                found.set_result(record.getMessage().split()[-1].removesuffix("/metrics"))

    log = logging.Logger("test")
    log.addHandler(Told())
    app = monitor.application(lambda: b"metric 1\n", lambda: ailments)
    task = asyncio.create_task(monitor.serve(app, endpoints.Endpoint(at), log))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await test(await found)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("at", ["127.0.0.1:0", "[::1]:0"])
def test_it_says_what_is_counted_that_it_lives_and_whether_it_serves(at: str) -> None:
    ailments: list[str] = []

    async def test(url: str) -> None:
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/metrics") as response:
                assert await response.text() == "metric 1\n"
                assert response.headers["Content-Type"] == monitor.EXPOSITION_TYPE
            async with http.get(f"{url}/healthz") as response:
                assert (response.status, await response.text()) == (200, "ok\n")
            async with http.get(f"{url}/readyz") as response:
                assert (response.status, await response.json()) == (200, {"ready": True, "why": []})
            ailments.append("it drains")
            async with http.get(f"{url}/readyz") as response:
                assert response.status == 503
                assert await response.json() == {"ready": False, "why": ["it drains"]}

    asyncio.run(served(ailments, at, test))


def test_a_port_that_is_taken_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "RETRY_S", 0.01)

    async def run() -> None:
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        asyncio.get_running_loop().call_later(0.1, taken.close)

        async def test(url: str) -> None:
            assert url == f"http://127.0.0.1:{port}"

        await served([], f"127.0.0.1:{port}", test)

    asyncio.run(run())
