"""A key's calls at once, before a real transceiver and by two instances that know nothing of each
other: what one has placed the other hears of from the transceiver."""

import asyncio
from pathlib import Path

import aiohttp

from . import shim
from .test_reception import KEY, LINE, OTHER, OTHER_LINE, bearer
from .test_sideband import CALLS, Site, at_site

ENOUGH = 1
"""Calls at once that the key may have; the transceiver takes two."""


def test_a_key_has_so_many_calls_at_once_over_all_instances(tmp_path: Path) -> None:
    async def scenario(on: Site) -> None:
        (tmp_path / "api-keys").write_text(f"{LINE} calls={ENOUGH}\n{OTHER_LINE}\n")
        for instance in on.instances:
            instance.door.reception.reload(instance.door.config)
        offer = await shim.Client().offer()

        async def call(
            http: aiohttp.ClientSession, key: str = KEY, query: str = ""
        ) -> tuple[int, str]:
            headers = bearer(key) | {"Content-Type": "application/sdp"}
            async with http.post(CALLS + query, data=offer, headers=headers) as response:
                if response.status == 429:
                    error = (await response.json())["error"]
                    assert error["code"] == "concurrent_calls_exceeded"
                    assert int(response.headers["Retry-After"]) > 0
                return response.status, response.headers.get("Location", "")

        first, second = on.at
        placed = [await call(first) for _ in range(ENOUGH)]
        assert [status for status, _ in placed] == [201] * ENOUGH
        assert (await call(first))[0] == 429, "what it placed itself it knows at once"
        forged = f"?resume=rtc_{'A' * 39}"
        assert (await call(first, query=forged))[0] == 429, "it goes on with no call of ours"
        door = on.instances[1].door
        async with asyncio.timeout(shim.WAIT_S):
            while door.placement.calls_of("shop") < ENOUGH:
                await asyncio.sleep(0.05)
        assert (await call(second))[0] == 429
        assert (await call(second, OTHER))[0] == 201, "another key has its own"
        async with second.delete(placed[0][1], headers=bearer(KEY)) as response:
            assert response.status == 200
        async with asyncio.timeout(shim.WAIT_S):
            while (await call(first))[0] != 201:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(shim.WAIT_S):
            while door.placement.calls_of("shop") < ENOUGH:
                await asyncio.sleep(0.05)
        assert (await call(second))[0] == 429

    at_site(tmp_path, scenario)
