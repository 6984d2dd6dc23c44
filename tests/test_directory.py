"""The directory: clusters with a Redis of their own, beside the one of [redis] or without it."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import directory
import ledger
import metrics
import placement
import presence
import settings
from roster import Health

from . import redises

UP = metrics.Signaling.REDIS_UP


def configured(folder: Path, first: str, second: str, shared: str = "") -> settings.Signaling:
    (folder / "keys").touch(mode=0o600)
    (folder / "keys").write_text("0 " + bytes(range(32)).hex())
    text = '[signaling]\nlisten = "127.0.0.1:0"\nrelays = ["192.0.2.1:1"]\n[keys]\nfile = "keys"\n'
    for number, url in ((1, first), (2, second), (3, "")):
        text += f'[[cluster]]\nid = {number}\nprefix = "127.0.{number}.0/24"\nports = [1, 65535]\n'
        text += f'redis = "{url}"\n' if url else ""
    text += f'[redis]\nurl = "{shared}"\ntimeout_s = 2.0\n' if shared else ""
    path = folder / "signaling.toml"
    path.write_text(text)
    return settings.load(path, settings.Signaling)


def announce(single: Any, host: str, cluster: int, lasts: bool = True) -> None:
    """As presence.Announcer would, once."""
    report = {"state": "serving", "sessions": 1, "sessions_max": 10, "cluster": cluster}
    report |= {"started": 1.0, "beat": round(1e3 * time.monotonic())}
    for command in presence.announcement(f"{host}:9".encode(), report, time.time()):
        single.do(*command)
    if lasts:
        single.do("PERSIST", presence.PREFIX + f"{host}:9".encode())


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine that stands still answers late is an answer."""
    monkeypatch.setattr(directory, "TIMEOUT_S", 2.0)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [redises.Single(tmp_path / str(number), stack) for number in range(3)]


@contextlib.asynccontextmanager
async def placing(config: settings.Signaling) -> AsyncIterator[placement.Placement]:
    counters = ledger.Counters(metrics.Signaling)
    found = placement.Placement(config, counters, random.Random(1))
    async with found.connected():
        yield found


def known(found: placement.Placement) -> dict[str, Health]:
    return {str(peer.endpoint.address): peer.health for peer in found.peers}


def tell(
    folder: Path, urls: list[str], story: Callable[[placement.Placement], Awaitable[None]]
) -> None:
    async def run() -> None:
        async with placing(configured(folder, *urls)) as found:
            await story(found)

    asyncio.run(asyncio.wait_for(run(), 3 * redises.PATIENCE_S))


def test_each_cluster_announces_in_its_own_and_the_rest_in_the_shared_one(
    tmp_path: Path, three: list[Any]
) -> None:
    for number, each in enumerate(three, 1):
        announce(each, f"127.0.{number}.1", number)
    # A cluster's Redis can say nothing of another cluster, nor the shared one of those with theirs.
    announce(three[0], "127.0.2.9", 2)
    announce(three[0], "127.0.3.9", 3)
    announce(three[2], "127.0.1.9", 1)

    async def story(found: placement.Placement) -> None:
        # Who comes first finds them.
        assert known(found) == {f"127.0.{n}.1": Health.SERVING for n in (1, 2, 3)}
        assert found._counters[UP] == 1
        await asyncio.sleep(3 * presence.READ_S)
        assert known(found) == {f"127.0.{n}.1": Health.SERVING for n in (1, 2, 3)}
        assert all(peer.listed for peer in found.peers)

    tell(tmp_path, [each.url for each in three], story)


def test_one_that_is_away_concerns_its_own_cluster_alone(tmp_path: Path, three: list[Any]) -> None:
    for number, each in enumerate(three[:2], 1):
        announce(each, f"127.0.{number}.1", number)

    async def story(found: placement.Placement) -> None:
        peers = {str(peer.endpoint.address): peer for peer in found.peers}
        await asyncio.to_thread(three[0].kill)
        await redises.until_true(lambda: not peers["127.0.1.1"].listed)
        assert peers["127.0.2.1"].listed and peers["127.0.2.1"].health is Health.SERVING
        assert found._counters[UP] == 0
        # The other's goes on to be read: whoever comes and goes there is seen.
        announce(three[1], "127.0.2.2", 2)
        await redises.until_true(lambda: "127.0.2.2" in known(found))
        three[1].do("DEL", presence.PREFIX + b"127.0.2.1:9")
        await redises.until_true(lambda: not peers["127.0.2.1"].listed)
        await asyncio.to_thread(three[0].start)
        announce(three[0], "127.0.1.1", 1)
        await redises.until_true(lambda: peers["127.0.1.1"].listed)
        assert found._counters[UP] == 1

    tell(tmp_path, [three[0].url, three[1].url], story)


def test_one_redis_for_two_clusters_is_read_once(
    tmp_path: Path, three: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """By whichever of the two ways it is named."""
    one = three[0]
    announce(one, "127.0.1.1", 1)
    announce(one, "127.0.2.1", 2)
    announce(one, "127.0.3.1", 3)

    async def story(found: placement.Placement) -> None:
        assert known(found) == {f"127.0.{n}.1": Health.SERVING for n in (1, 2, 3)}
        assert not [line for line in caplog.messages if "ignored" in line]
        assert len(found._directory._sources) == 1

    tell(tmp_path, [one.url, one.url, one.url], story)


def test_one_that_says_nothing_delays_no_start(tmp_path: Path, three: list[Any]) -> None:
    announce(three[1], "127.0.2.1", 2)

    async def run() -> None:
        async with redises.Proxy(three[0].servers[0].port) as proxy:
            proxy.how = "hold"
            config = configured(tmp_path, f"redis://127.0.0.1:{proxy.port}", three[1].url)
            began = time.monotonic()
            async with placing(config) as found:
                assert time.monotonic() - began < redises.PATIENCE_S
                assert known(found) == {"127.0.2.1": Health.SERVING}

    asyncio.run(asyncio.wait_for(run(), 3 * redises.PATIENCE_S))


def test_clusters_with_a_redis_each_need_neither_a_list_nor_another(tmp_path: Path) -> None:
    config = configured(tmp_path, "redis://127.0.0.1:1", "redis://127.0.0.1:2")
    assert config.redis is None and config.signaling.transceivers == ()
    assert str(config.cluster[0].redis) == "redis://127.0.0.1:1"
    with pytest.raises(settings.SettingsError, match="name some, or give"):
        configured(tmp_path, "", "")
