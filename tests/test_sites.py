"""Sites: their relays are asked over real HTTP, and what they answer is bounded and believed."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

import keeper
import ledger
import metrics
import settings
import sites
from endpoints import Endpoint
from front import Site, Steering
from standing import MISSES
from steering import State

from . import ports
from .premises import Program
from .test_front import WORLD

PATIENCE_S = 20
PERIOD_S = 0.1


class Relay:
    """The monitoring of a relay, as far as it is asked for."""

    def __init__(self) -> None:
        self.status, self.flows, self.asked = 200, 10.0, 0
        self.body: bytes | None = None
        self.hang, self.redirect = False, ""
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Relay"]:
        app = web.Application()
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _ready(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.redirect:
            raise web.HTTPFound(self.redirect)
        return web.json_response({"ready": self.status == 200, "why": []}, status=self.status)

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.body is not None:
            return web.Response(body=self.body)
        row = ledger.Counters(metrics.Keeper)
        row.values[metrics.Keeper.FLOWS_LEFT] = int(self.flows)
        return web.Response(body=metrics.exposition("earshot_relay_keeper", [({}, row)]))


def configured(folder: Path, *urls: str, capacity: int = 100) -> settings.Signaling:
    path = folder / "signaling.toml"
    path.write_text(WORLD)
    found = settings.load(path, settings.Signaling)
    site = Site(
        name="tokyo",
        latitude=35.7,
        longitude=139.7,
        relays=(Endpoint("203.0.113.1:3478"),),
        capacity=capacity,
        status=urls,
    )
    return msgspec.structs.replace(found, site=(site,), steering=Steering(poll_s=PERIOD_S))


async def until(what: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.01)


def test_health_and_load_are_what_the_relays_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with Relay().serving() as one, Relay().serving() as two:
            found = sites.Sites(configured(tmp_path, one.url, two.url))
            assert found.states() == {}
            async with found.followed():
                await until(lambda: found.states() == {"tokyo": State(True, 0.2, 100)})
                one.flows = 60
                await until(lambda: found.states() == {"tokyo": State(True, 0.7, 100)})
                two.status = 503
                await until(lambda: found.states() == {"tokyo": State(True, 1.2, 50)})
                one.status = 503
                await until(lambda: not found.states()["tokyo"].healthy)
                await until(lambda: "gets no clients" in caplog.messages[-1])
                one.status = two.status = 200
                await until(lambda: found.states() == {"tokyo": State(True, 0.7, 100)})
                await until(lambda: caplog.messages[-1] == "site tokyo is well again")

    with caplog.at_level(logging.INFO, "sites"):
        asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))
    assert caplog.messages[0].startswith("site tokyo has less room: http://127.0.0.1:")
    assert len(caplog.messages) <= 4  # a line a change, and one for each of two that come back


def test_a_site_is_lost_after_three_silences_and_found_again(tmp_path: Path) -> None:
    async def story() -> None:
        relay = Relay()
        async with contextlib.AsyncExitStack() as stack:
            async with relay.serving():
                found = sites.Sites(configured(tmp_path, relay.url))
                await stack.enter_async_context(found.followed())
                await until(lambda: found.states() == {"tokyo": State(True, 0.1, 100)})
            await until(lambda: not found.states()["tokyo"].healthy)
            async with Relay().serving(int(relay.url.rpartition(":")[2])):
                await until(lambda: found.states() == {"tokyo": State(True, 0.1, 100)})

    asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))


def test_one_that_hangs_is_silent_and_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "TIMEOUT_S", 0.2)

    async def story() -> None:
        async with Relay().serving() as hangs, Relay().serving() as well:
            hangs.hang = True
            config = configured(tmp_path, hangs.url)
            second = msgspec.structs.replace(config.site[0], name="osaka", status=(well.url,))
            found = sites.Sites(msgspec.structs.replace(config, site=(*config.site, second)))
            async with found.followed():
                await until(lambda: found.states().get("osaka") == State(True, 0.1, 100))
                await until(lambda: "tokyo" in found.states())
                assert not found.states()["tokyo"].healthy
                assert hangs.asked >= MISSES < well.asked

    asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))


@pytest.mark.parametrize("redirect", ["/metrics", "http://127.0.0.1:1/"])
def test_no_redirect_is_followed(tmp_path: Path, redirect: str) -> None:
    async def story() -> None:
        async with Relay().serving() as relay:
            relay.redirect = redirect
            found = sites.Sites(configured(tmp_path, relay.url))
            async with found.followed():
                await until(lambda: relay.asked >= MISSES and bool(found.states()))
                assert not found.states()["tokyo"].healthy

    asyncio.run(asyncio.wait_for(story(), 2 * PATIENCE_S))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff" * 99, b"earshot_relay_keeper_flows_left nan\n", b"x" * (5 << 20)],
    ids=["empty", "odd", "no number", "long"],
)
def test_metrics_that_say_nothing_leave_the_load_as_it_was(tmp_path: Path, body: bytes) -> None:
    async def story() -> None:
        async with Relay().serving() as relay:
            found = sites.Sites(configured(tmp_path, relay.url))
            async with found.followed():
                await until(lambda: found.states() == {"tokyo": State(True, 0.1, 100)})
                relay.body = body
                seen = relay.asked
                await until(lambda: relay.asked >= seen + 3)
                assert found.states() == {"tokyo": State(True, 0.1, 100)}

    asyncio.run(asyncio.wait_for(story(), 2 * PATIENCE_S))


def test_a_reload_follows_the_new_ones_and_forgets_no_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with Relay().serving() as one, Relay().serving() as two:
            config = configured(tmp_path, one.url)
            found = sites.Sites(config)
            async with found.followed():
                await until(lambda: "tokyo" in found.states())
                found.sent("tokyo")
                found.sent("nowhere")
                second = msgspec.structs.replace(config.site[0], name="osaka", status=(two.url,))
                found.reload(msgspec.structs.replace(config, site=(*config.site, second)))
                assert "tokyo" in found.states()
                await until(lambda: "osaka" in found.states())
                found.reload(msgspec.structs.replace(config, site=(second,)))
                assert set(found.states()) == {"osaka"}
                seen = two.asked
                asked = one.asked
                await until(lambda: two.asked > seen + 2)
                assert one.asked <= asked + 1
                found.reload(configured(tmp_path))
                assert found.states() == {}

    asyncio.run(asyncio.wait_for(story(), 2 * PATIENCE_S))


@pytest.mark.parametrize("flows", [0, 7, 999_999, 1_234_567, 4_000_000, 25_000_000])
def test_the_line_is_the_one_that_relays_write(flows: int) -> None:
    row = ledger.Counters(metrics.Keeper)
    row.values[metrics.Keeper.FLOWS_LEFT] = flows
    text = metrics.exposition("earshot_relay_keeper", [({}, row)])
    assert sites.flows_of(text) == flows
    keeps = Path(keeper.__file__).read_text()
    assert 'f"earshot_relay_{name}"' in keeps and '("keeper", [' in keeps


def test_without_status_nobody_is_asked(tmp_path: Path) -> None:
    async def story() -> None:
        found = sites.Sites(configured(tmp_path))
        async with found.followed():
            assert found.states() == {}

    asyncio.run(story())


def test_a_real_relay_is_well_and_lost_when_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text("0 " + bytes(range(32)).hex() + "\n")
    path = tmp_path / "relay.toml"
    public, internal = ports.free(2)
    path.write_text(
        f'[relay]\npublic = "127.0.0.1:{public}"\ninternal = "127.0.0.1:{internal}"\n'
        'metrics = "127.0.0.1:0"\nworkers = 1\n[keys]\nfile = "keys"\n'
        '[[cluster]]\nid = 1\nprefix = "127.0.0.0/8"\nports = [1, 65535]\n'
    )
    relay = Program("relay", path)

    async def story() -> None:
        url = (await asyncio.to_thread(relay.said, "metrics at http")).split()[-1]
        found = sites.Sites(configured(tmp_path, url.removesuffix("/metrics")))
        async with found.followed():
            await until(lambda: found.states() == {"tokyo": State(True, 0.0, 100)})
            await asyncio.to_thread(relay.stop)
            await until(lambda: not found.states()["tokyo"].healthy)

    try:
        asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))
    finally:
        relay.stop()
