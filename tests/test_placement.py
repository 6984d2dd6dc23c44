"""Placement over real HTTP and a real Redis, with fakes of the transceivers' control API.

Who is asked first is in test_roster.py, what clients get to see in test_signaling.py, and the same
over real processes in test_instances.py.
"""

import asyncio
import contextlib
import itertools
import random
import socket
import time

import pytest
from aiohttp import web

import endpoints
import ledger
import metrics
import placement
import presence
import redisclient
import settings
import ufrag
from placement import EndedCall, Order, Unavailable, UnknownCall
from roster import Health

from . import redises

PATIENCE_S = redises.PATIENCE_S
KEY = "0 " + bytes(range(32)).hex()
RING = ufrag.Keyring.parse(KEY)
HOME = ufrag.Cluster(1, endpoints.Prefix("127.0.0.0/8").network, 1024, 65535)


def mint(port, nonce, cluster=HOME, address="127.0.0.1", ring=RING):
    at = endpoints.Address(address).address
    return ufrag.call_id(ufrag.mint(ring, cluster, at, port, nonce))


class Fake:
    """A transceiver's control API, and the transceiver that announces itself."""

    def __init__(self):
        self.offers, self.calls, self.port = [], {}, 0
        self.refuses, self.draining, self.hangs = False, False, False
        self.started, self.beats, self.nonces = time.time(), 0, itertools.count(1)
        self.healths, self.followed = 0, False

    def report(self):
        self.beats += 1
        keys = list(self.calls.values())
        return {
            "state": "draining" if self.draining else "serving",
            "sessions": len(self.calls),
            "sessions_max": 100,
            "opened": len(self.offers),
            "started": self.started,
            "beat": self.beats,
            "cluster": 1,
            "calls_by_key": {key: keys.count(key) for key in keys},
        }

    async def create(self, request):
        if self.hangs:
            await asyncio.sleep(PATIENCE_S)
        wanted = await request.json()
        if self.refuses or self.draining:
            return web.json_response({"error": {"message": "no"}}, status=503)
        self.offers.append(wanted)
        call_id = mint(self.port, next(self.nonces))
        self.calls[call_id] = wanted["key"]
        found = {"call_id": call_id, "answer": "v=0", "opened": len(self.offers)}
        return web.json_response(found, status=201)

    async def delete(self, request):
        if self.calls.pop(request.match_info["id"], None) is None:
            return web.json_response({"error": {}}, status=404)
        return web.json_response({})

    async def health(self, _):
        if self.hangs:
            await asyncio.sleep(PATIENCE_S)
        self.healths += 1
        return web.json_response(self.report())

    async def odd(self, request):
        kind = request.match_info["kind"]
        if kind in ("elsewhere", "events"):
            raise web.HTTPTemporaryRedirect(f"http://127.0.0.1:{self.port}/v1/sessions/x/followed")
        self.followed |= kind == "followed"
        if kind == "large":
            return web.Response(body=b" " * placement.ANSWER_OCTETS_MAX + b"{}")
        if kind == "nonsense":
            return web.Response(body=b"\xff\x00")
        return web.json_response({}, status=500)

    @contextlib.asynccontextmanager
    async def running(self, port=0):
        app = web.Application()
        app.router.add_post("/v1/sessions", self.create)
        app.router.add_get("/v1/sessions/{id}/{kind}", self.odd)
        app.router.add_delete("/v1/sessions/{id}", self.delete)
        app.router.add_get("/v1/health", self.health)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    @property
    def name(self):
        return f"127.0.0.1:{self.port}"

    def announce(self, redis):
        """As presence.Announcer would, once."""
        written = presence.announcement(self.name.encode(), self.report(), time.time())
        for command in written:
            redis.do(*command)


def configured(folder, transceivers=(), redis=None, more="", timeout_s=10.0):
    """Settings; with patience: a machine that stands still is no Redis that does."""
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(KEY)
    path = folder / "signaling.toml"
    table = f'[redis]\nurl = "{redis}"\ntimeout_s = {timeout_s}' if redis else ""
    path.write_text(
        f"""
        [signaling]
        listen = "127.0.0.1:0"
        relays = ["127.0.0.1:3478"]
        transceivers = {list(transceivers)}
        {more}
        [keys]
        file = "keys"
        [[cluster]]
        id = 1
        prefix = "127.0.0.0/8"
        ports = [1024, 65535]
        [[cluster]]
        id = 6
        prefix = "::/96"
        ports = [9000, 9099]
        {table}
        """
    )
    return settings.load(path, settings.Signaling)


@contextlib.asynccontextmanager
async def placing(folder, *arguments, **more):
    counters = ledger.Counters(metrics.Signaling)
    config = configured(folder, *arguments, **more)
    found = placement.Placement(config, counters, random.Random(1))
    async with found.connected():
        yield found


@contextlib.asynccontextmanager
async def fakes(count):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Fake().running()) for _ in range(count)]


async def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def known(found):
    return {str(peer.endpoint): peer.health for peer in found.peers}


@pytest.fixture
def single(tmp_path):
    with contextlib.ExitStack() as stack:
        yield redises.Single(tmp_path, stack)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(redisclient, "PROBE_S", 0.1)
    monkeypatch.setattr(placement, "HEALTH_PERIOD_S", 0.2)
    monkeypatch.setattr(presence, "READ_S", 0.1)


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# --- placing --------------------------------------------------------------------------------------


def test_one_that_drains_is_not_asked_and_gets_calls_again_as_another_process(tmp_path):
    async def story():
        async with fakes(2) as (first, second):
            first.draining = True
            async with placing(tmp_path, [first.name, second.name]) as found:
                await until(lambda: known(found)[first.name] is Health.DRAINING)
                posted = found._counters[metrics.Signaling.TRANSCEIVER_REFUSED]
                for _ in range(20):
                    await found.place(Order("v=0"))
                assert len(second.offers) == 20
                assert found._counters[metrics.Signaling.TRANSCEIVER_REFUSED] == posted
                second.draining = True
                await until(lambda: known(found)[second.name] is Health.DRAINING)
                with pytest.raises(Unavailable):
                    await found.place(Order("v=0"))
                assert found._counters[metrics.Signaling.TRANSCEIVER_REFUSED] == posted
                first.draining, first.started = False, time.time()
                await until(lambda: known(found)[first.name] is Health.SERVING)
                await found.place(Order("v=0"))

    asyncio.run(story())


def test_all_attempts_together_have_a_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "CALL_DEADLINE_S", 0.5)

    async def story():
        async with fakes(3) as all_of_them:
            for each in all_of_them:
                each.hangs = True
            names = [each.name for each in all_of_them]
            async with placing(tmp_path, names, more="transceiver_timeout_s = 0.3") as found:
                began = time.monotonic()
                with pytest.raises(Unavailable):
                    await found.place(Order("v=0", key="acme"))
                assert time.monotonic() - began < 5
                assert found.calls_of("acme") == 0
                # One that was asked and did not answer is known for it.
                assert Health.AWAY in known(found).values()

    asyncio.run(story())


def test_calls_of_a_key_are_counted_from_the_first_moment(tmp_path):
    async def story():
        async with fakes(2) as both, placing(tmp_path, [each.name for each in both]) as found:
            assert found.calls_of("acme") == 0
            orders = [asyncio.create_task(found.place(Order("v=0", key="acme"))) for _ in range(9)]
            await asyncio.sleep(0)
            assert found.calls_of("acme") == 9, "none is answered yet"
            placed = await asyncio.gather(*orders)
            assert (found.calls_of("acme"), found.calls_of("other")) == (9, 0)
            wanted = max(each.healths for each in both) + 3
            await until(lambda: min(each.healths for each in both) >= wanted)
            assert found.calls_of("acme") == 9, "and not once more when they are reported"
            for each in placed:
                await found.ask(each.call_id, "DELETE", key="acme")
            await until(lambda: found.calls_of("acme") == 0)

    asyncio.run(story())


# --- the owner of a call --------------------------------------------------------------------------


def test_a_call_id_leads_to_its_owner_whoever_is_listed(tmp_path):
    """An instance that has just started, and Redis is away: it knows nobody."""

    async def story():
        async with fakes(1) as (fake,):
            nowhere = f"redis://127.0.0.1:{unused_port()}"
            async with placing(tmp_path, redis=nowhere) as found:
                assert found.peers == []
                with pytest.raises(Unavailable):
                    await found.place(Order("v=0"))
                call_id = mint(fake.port, 1)
                fake.calls[call_id] = ""
                assert await found.ask(call_id, "DELETE") == (200, {})
                with pytest.raises(EndedCall):
                    await found.ask(call_id, "DELETE")
                # Its process is not there any more: its calls have ended with it.
                with pytest.raises(EndedCall):
                    await found.ask(mint(unused_port(), 1), "DELETE")

    asyncio.run(story())


def test_no_call_id_leads_anywhere_but_into_a_cluster(tmp_path):
    wide = ufrag.Cluster(1, endpoints.Prefix("0.0.0.0/0").network, 1, 65535)
    other = ufrag.Cluster(2, endpoints.Prefix("127.0.0.0/8").network, 1024, 65535)
    strange = ufrag.Keyring.parse("0 " + "11" * 32)

    async def story():
        async with fakes(1) as (fake,), placing(tmp_path, [fake.name]) as found:
            good = mint(fake.port, 1)
            assert found.owner(good) == f"http://{fake.name}/v1"
            six = ufrag.Cluster(6, endpoints.Prefix("::/96").network, 9000, 9099)
            assert found.owner(mint(9001, 1, six, "::1")) == "http://[::1]:9001/v1"
            ids = {
                "outside the prefix": mint(fake.port, 1, wide, "192.0.2.1"),
                "outside the ports": mint(80, 1, wide),
                "another cluster": mint(fake.port, 1, other),
                "another key": mint(fake.port, 1, ring=strange),
                "turned bits": good[:10] + ("A" if good[10] != "A" else "B") + good[11:],
                "empty": "",
                "a path": "rtc_../../health",
            }
            for call_id in ids.values():
                with pytest.raises(UnknownCall):
                    found.owner(call_id)

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["elsewhere", "large", "nonsense", "broken"])
def test_what_is_no_transceivers_answer_is_bounded_and_followed_nowhere(tmp_path, kind):
    async def story():
        async with fakes(1) as (fake,), placing(tmp_path, [fake.name]) as found:
            await until(lambda: known(found)[fake.name] is Health.SERVING)
            call_id = mint(fake.port, 1)
            if kind in ("large", "nonsense"):
                assert await found.ask(call_id, "GET", f"/{kind}") == (200, None)
            else:
                with pytest.raises(Unavailable):
                    await found.ask(call_id, "GET", f"/{kind}")
            assert not fake.followed

    asyncio.run(story())


def test_a_sideband_is_led_nowhere_else(tmp_path):
    async def story():
        async with fakes(1) as (fake,), placing(tmp_path, [fake.name]) as found:
            with pytest.raises(Unavailable):
                await found.attend(mint(fake.port, 1), "")
            assert not fake.followed

    asyncio.run(story())


# --- Redis ----------------------------------------------------------------------------------------


def test_transceivers_are_found_in_redis_beside_those_of_the_settings(tmp_path, single):
    async def story():
        async with fakes(2) as (listed, fixed):
            listed.announce(single)
            async with placing(tmp_path, [fixed.name], redis=single.url) as found:
                # Who comes first finds somebody.
                assert known(found)[listed.name] is Health.SERVING
                single.do("PEXPIRE", presence.PREFIX + listed.name.encode(), "60000")
                await until(lambda: known(found)[fixed.name] is Health.SERVING)
                for _ in range(20):
                    await found.place(Order("v=0"))
                assert listed.offers and fixed.offers
                # It is not asked about its health: Redis says that.
                wanted = fixed.healths + 3
                await until(lambda: fixed.healths >= wanted)
                assert listed.healths == 0
                listed.draining = True
                listed.announce(single)
                await until(lambda: known(found)[listed.name] is Health.DRAINING)

    asyncio.run(story())


def test_one_whose_lease_ends_is_gone_and_forgotten(tmp_path, single, monkeypatch):
    monkeypatch.setattr("roster.FORGET_S", 0.3)

    async def story():
        async with fakes(1) as (lasting,):
            gone = Fake()
            gone.port = unused_port()
            for each in (lasting, gone):
                each.announce(single)
                single.do("PERSIST", presence.PREFIX + each.name.encode())
            async with placing(tmp_path, redis=single.url) as found:
                assert set(known(found)) == {lasting.name, gone.name}
                single.do("DEL", presence.PREFIX + gone.name.encode())
                await until(lambda: known(found).get(gone.name) is not Health.SERVING)
                await until(lambda: gone.name not in known(found))
                assert known(found) == {lasting.name: Health.SERVING}
                await found.place(Order("v=0"))

    asyncio.run(story())


@pytest.mark.parametrize("trouble", ["emptied", "killed", "held", "nonsense"])
def test_whatever_becomes_of_redis_calls_are_placed_by_what_was_known(
    tmp_path, single, trouble, caplog
):
    """And it heals by itself; what happened is said once."""

    def said():
        return [line for line in caplog.messages if line.startswith("redis ")]

    async def story():
        async with fakes(2) as both, redises.Proxy(single.servers[0].port) as proxy:
            for each in both:
                each.announce(single)
                single.do("PERSIST", presence.PREFIX + each.name.encode())
            url = f"redis://127.0.0.1:{proxy.port}"
            timeout_s = 0.25 if trouble == "held" else 10.0
            async with placing(tmp_path, redis=url, timeout_s=timeout_s) as found:
                assert set(known(found).values()) == {Health.SERVING}
                caplog.clear()
                if trouble == "emptied":
                    single.flush()
                elif trouble == "killed":
                    await asyncio.to_thread(single.kill)
                else:
                    proxy.how = "hold" if trouble == "held" else b"-ERR who is there?\r\n"
                longest = 0.0
                while min(each.healths for each in both) < 5:
                    began = time.monotonic()
                    await found.place(Order("v=0"))
                    longest = max(longest, time.monotonic() - began)
                    await asyncio.sleep(0.02)
                print(f"{trouble}: a call is placed in {1e3 * longest:.0f} ms at the most")
                assert longest < 5
                await until(lambda: set(known(found).values()) == {Health.SERVING})
                begins = {"emptied": [], "nonsense": ["redis does not say", "redis says again"]}
                begins = begins.get(trouble, ["redis is unreachable", "redis is back"])
                await until(lambda: len(said()) == len(begins[:1]))
                both[0].draining = True
                await until(lambda: Health.DRAINING in known(found).values())
                assert found._counters[metrics.Signaling.REDIS_UP] == (trouble == "emptied")
                both[0].draining = False
                both[0].started += 1
                if trouble == "killed":
                    await asyncio.to_thread(single.start)
                proxy.how = "pass"
                proxy.cut()
                for each in both:
                    each.announce(single)
                    single.do("PERSIST", presence.PREFIX + each.name.encode())
                await until(lambda: all(peer.listed for peer in found.peers))
                await until(lambda: len(said()) >= len(begins))
                assert len(said()) == len(begins), said()
                assert all(map(str.startswith, said(), begins)), said()

    caplog.set_level("INFO")
    asyncio.run(story())


def test_one_that_does_not_answer_is_not_believed_by_its_lease(tmp_path, single):
    async def story():
        async with fakes(1) as (good,):
            good.announce(single)
            dead = Fake()
            dead.port = unused_port()
            async with placing(tmp_path, redis=single.url) as found:
                stop = asyncio.Event()

                async def announce():
                    while not stop.is_set():
                        for each in (good, dead):
                            each.announce(single)
                        await asyncio.sleep(0.05)

                announcing = asyncio.create_task(announce())
                await until(lambda: len(found.peers) == 2)
                failed = metrics.Signaling.TRANSCEIVER_FAILED
                while not found._counters[failed]:
                    await found.place(Order("v=0"))
                for _ in range(50):
                    await found.place(Order("v=0"))
                    await asyncio.sleep(0.01)
                assert found._counters[failed] == 1
                stop.set()
                await announcing

    asyncio.run(story())


def test_neither_a_list_nor_redis_is_a_mistake(tmp_path):
    with pytest.raises(settings.SettingsError, match=r"signaling.transceivers: name some, or give"):
        configured(tmp_path)
