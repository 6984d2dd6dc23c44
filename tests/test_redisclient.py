"""What every user of Redis relies on; how each kind of it fails is in test_registry.py."""

import asyncio
import contextlib
import logging
import time

import pytest

import endpoints
import redisclient
from redisclient import Refused, Unavailable

from . import redises

PATIENCE_S, until = redises.PATIENCE_S, redises.until_true
LATE_S = 10.0
"""What nobody waits for takes no longer: a busy machine has pauses."""


@contextlib.asynccontextmanager
async def opened(url, timeout_s=20.0, **more):
    log, lines = logging.Logger("redisclient"), redises.Lines()
    log.addHandler(lines)
    client = redisclient.Client(endpoints.RedisUrl(url), timeout_s, log, **more)
    watching = asyncio.create_task(client.watch())
    try:
        yield client, lines
    finally:
        assert not watching.done(), watching
        watching.cancel()
        await asyncio.wait([watching])
        await client.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here depends on how often Redis is probed, but for how long it takes; nor on what a
    call may take: a machine that stands still is no Redis that does."""
    monkeypatch.setattr(redisclient, "PROBE_S", 0.1)
    monkeypatch.setattr(redisclient, "CALL_S_MAX", 30.0)


@pytest.fixture
def single(tmp_path):
    with contextlib.ExitStack() as stack:
        yield redises.Single(tmp_path, stack)


def test_each_command_has_its_reply_or_its_error(single):
    async def story():
        async with opened(single.url) as (client, lines):
            replies = await client.run(
                [
                    (b"SET", b"a", b"1", b"PX", b"60000"),
                    (b"GET", b"a"),
                    (b"ZADD", b"a", b"1", b"member"),
                    (b"NOSUCH", b"a"),
                    (b"GET", b"nothing"),
                ]
            )
            assert replies[:2] == [True, b"1"] or replies[:2] == [b"OK", b"1"]
            assert isinstance(replies[2], Refused) and str(replies[2]).startswith("WRONGTYPE")
            assert isinstance(replies[3], Refused) and replies[4] is None
            assert client.up and lines.all == []

    asyncio.run(story())


def test_it_is_away_and_comes_back(single):
    async def story():
        async with opened(single.url, meanwhile="the band plays on") as (client, lines):
            assert await client.run([(b"GET", b"a")]) == [None]
            await asyncio.to_thread(single.kill)
            await until(lambda: not client.up)
            began = time.monotonic()
            for _ in range(100):
                with pytest.raises(Unavailable):
                    await client.run([(b"GET", b"a")])
            took_s = time.monotonic() - began
            print(f"100 calls without a Redis: {took_s:.3f} s")
            assert took_s < LATE_S, "nobody waits for it"
            await asyncio.to_thread(single.start)
            await until(lambda: client.up)
            assert await client.run([(b"GET", b"a")]) == [None]
            assert [line.partition(":")[0] for line in lines.all] == [
                "redis is unreachable, the band plays on",
                "redis is back",
            ]

    asyncio.run(story())


def test_a_caller_may_allow_more_or_less(single):
    async def story():
        async with (
            redises.Proxy(single.servers[0].port) as proxy,
            opened(f"redis://127.0.0.1:{proxy.port}") as (client, _),
        ):
            await client.run([(b"GET", b"a")])
            proxy.how = "hold"
            began = time.monotonic()
            with pytest.raises(Unavailable, match="no answer in time"):
                await client.run([(b"GET", b"a")], 0.05)
            print(f"not answered within 0.05 s: said after {time.monotonic() - began:.3f} s")
            assert time.monotonic() - began < LATE_S

    asyncio.run(story())


def test_keys_of_one_tag_are_one_command_in_a_cluster(tmp_path):
    with contextlib.ExitStack() as stack:
        fleet = redises.Cluster(tmp_path, stack)

        async def story():
            async with opened(fleet.url) as (client, _):
                keys = [b"earshot:{tag}:%d" % number for number in range(20)]
                await client.run([(b"SET", key, key, b"PX", b"60000") for key in keys])
                assert await client.run([(b"MGET", *keys, b"earshot:{tag}:none")]) == [
                    [*keys, None]
                ]
                assert client.sharded and client.up

        asyncio.run(story())
