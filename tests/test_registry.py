"""The registry against real servers of each kind, on their bad days; none of it may be believed."""

import asyncio
import contextlib
import logging
import os
import resource
import time

import pytest

import endpoints
import redisclient
import registry
import settings

from . import ports, redises
from .redises import PATIENCE_S, SLOW_S
from .redises import until_true as until

TIMEOUT_S = settings.Redis(endpoints.RedisUrl("redis://h")).timeout_s
LATE_S = 10.0
"""Within it a call has ended whose time is TIMEOUT_S, and a hundred that wait for nothing: a busy
machine has pauses."""

PAUSES_MAX = 3
"""Answers that a machine's own pause may cost a test whose calls must have little time."""

UNREACHABLE, BACK = "redis is unreachable, media goes on", "redis is back"
LOST = "redis lost what it had"
REFUSES, TAKES = "redis does not take all flows", "redis takes all flows again"


def key(number):
    return b"%024d" % number


def ufrag(number):
    return b"%023d" % number


def flows(*numbers):
    return [(key(number), ufrag(number)) for number in numbers]


def stored(number):
    """The client's key in Redis."""
    return registry.PREFIX + key(number)


class Lines(redises.Lines):
    def begin(self):
        """How each line begins, as far as the names above go."""
        names = UNREACHABLE, BACK, LOST, REFUSES, TAKES
        return [next(name for name in names if line.startswith(name)) for line in self.all]


@contextlib.asynccontextmanager
async def opened(url, **more):
    """A registry that watches, and its log."""
    log, lines = logging.Logger("registry"), Lines()
    log.addHandler(lines)
    found = registry.Registry(settings.Redis(endpoints.RedisUrl(url), **more), log)
    watching = asyncio.create_task(found.watch())
    try:
        yield found, lines
    finally:
        assert not watching.done(), watching
        watching.cancel()
        await asyncio.wait([watching])
        await found.close()


async def fails(call):
    """It raises Unavailable, in time; returns what it says."""
    began = time.monotonic()
    with pytest.raises(registry.Unavailable) as error:
        await call
    took_s = time.monotonic() - began
    if took_s > 2 * TIMEOUT_S:
        print(f"Unavailable after {took_s:.3f} s")
    assert took_s < TIMEOUT_S + LATE_S
    return str(error.value)


async def until_answered(found, *numbers):
    """Look up until there is an answer for all of them; returns the answers."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(registry.Unavailable):
            answers = await found.look_up([key(number) for number in numbers])
            if not any(isinstance(each, registry.Unavailable) for each in answers):
                return answers
        await asyncio.sleep(0.02)


async def until_stored(found, *numbers):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(registry.Unavailable):
            if await found.store(flows(*numbers)) == []:
                return
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here depends on how often Redis is probed, but for how long it takes."""
    monkeypatch.setattr(registry, "PROBE_S", 0.2)


@pytest.fixture
def patient(monkeypatch):
    """Settings where nothing is about a Redis that is late: a machine that stands still is none."""
    monkeypatch.setattr(redisclient, "CALL_S_MAX", 20.0)
    monkeypatch.setattr(registry, "STORE_S", 20.0)
    return {"timeout_s": 10.0}


@pytest.fixture(scope="module", params=list(redises.KINDS))
def kind(request, tmp_path_factory):
    """Each kind of Redis, one after the other, for all tests of it."""
    with contextlib.ExitStack() as stack:
        yield redises.KINDS[request.param](tmp_path_factory.mktemp(request.param), stack)


@pytest.fixture
def empty(kind):
    """The same, with nothing in it and nothing wrong with it."""
    kind.settle()
    kind.flush()
    return kind


@pytest.fixture
def single(tmp_path):
    """A server of the test's own; called with options of redis-server."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: redises.Single(tmp_path, stack, *options)


# --- each kind ------------------------------------------------------------------------------------


def test_what_is_stored_is_found(empty, patient):
    async def story():
        async with opened(empty.url, ttl_s=300, **patient) as (found, lines):
            assert await found.look_up([key(0)]) == [None]
            assert await found.store(flows(*range(0, 200, 2))) == []
            answers = await found.look_up([key(number) for number in range(200)])
            assert answers == [None if number % 2 else ufrag(number) for number in range(200)]
            # Written again: another session of that client, for all of its time.
            assert 280_000 < empty.do("PTTL", stored(2)) <= 300_000
            empty.do("PEXPIRE", stored(2), 1000)
            assert await found.store([(key(2), ufrag(7))]) == []
            assert 280_000 < empty.do("PTTL", stored(2)) <= 300_000
            assert await found.look_up([key(2), key(4)]) == [ufrag(7), ufrag(4)]
            assert found.up and found.losses == 0 and lines.all == []

    asyncio.run(story())


def test_what_is_no_ufrag_is_no_trouble(empty, patient):
    async def story():
        async with opened(empty.url, **patient) as (found, lines):
            empty.do("LPUSH", stored(1), "a list")
            empty.do("SET", stored(2), b"x" * 1_000_000)
            empty.do("SET", stored(3), b"")
            empty.do("SET", stored(4), b"\xff\x00\r\n")
            answers = await found.look_up([key(number) for number in range(1, 5)])
            assert answers == [None, b"x" * registry.VALUE_OCTETS_MAX, None, b"\xff\x00\r\n"]
            assert await found.store(flows(1, 2, 3, 4)) == []
            answers = await found.look_up([key(number) for number in range(1, 5)])
            assert answers == [ufrag(number) for number in range(1, 5)]
            assert lines.all == []

    asyncio.run(story())


def test_a_redis_that_is_full_still_answers(empty, patient):
    async def story():
        async with opened(empty.url, **patient) as (found, lines):
            await until_stored(found, *range(50))
            empty.everywhere("CONFIG", "SET", "maxmemory", "1")
            try:
                for _ in range(5):
                    assert await found.store(flows(*range(100))) == list(range(100))
                # A probe may succeed or not: it makes no line of its own.
                await asyncio.sleep(1.5 * registry.PROBE_S)
                answers = await found.look_up([key(number) for number in range(100)])
                assert answers == [ufrag(n) if n < 50 else None for n in range(100)]
                assert lines.begin() == [REFUSES] and "maxmemory" in lines.all[0]
            finally:
                empty.everywhere("CONFIG", "SET", "maxmemory", "0")
            await until_stored(found, *range(100))
            await until(lambda: len(lines.all) > 1)
            assert lines.begin() == [REFUSES, TAKES]
            assert found.up and found.losses == 0

    asyncio.run(story())


def test_one_that_was_emptied_is_seen(empty, patient):
    async def story():
        async with opened(empty.url, **patient) as (found, lines):
            await until_stored(found, 1)
            # What is lost before the first probe has left its marks is written again in its turn.
            await until(lambda: None not in found._marks.values())
            empty.flush()
            await until(lambda: found.losses)
            await until_stored(found, 1)
            await asyncio.sleep(1.5 * registry.PROBE_S)
            assert found.losses == 1 and lines.begin() == [LOST] and found.up

    asyncio.run(story())


def test_down_and_back_with_nothing(empty):
    async def story():
        async with opened(empty.url) as (found, lines):
            await until_stored(found, *range(50))
            await asyncio.to_thread(empty.kill)
            await until(lambda: not found.up)
            for _ in range(20):
                await fails(found.look_up([key(1)]))
                await fails(found.store(flows(1)))
            await asyncio.to_thread(empty.start)
            await until(lambda: found.up and found.losses)
            assert await until_answered(found, *range(50)) == [None] * 50
            await until_stored(found, *range(50))
            assert await until_answered(found, *range(50)) == [ufrag(n) for n in range(50)]
            said = lines.begin()
            assert [said.count(each) for each in (UNREACHABLE, BACK)] == [1, 1], lines.all
            if empty.kind == "server":
                assert said == [UNREACHABLE, BACK, LOST]

    asyncio.run(story())


def test_one_that_hangs_is_not_waited_for(empty):
    async def story():
        async with opened(empty.url) as (found, lines):
            await until_stored(found, *range(50))
            for each in empty.servers:
                each.freeze()
            try:
                for _ in range(redisclient.TIMEOUTS_MAX):
                    with contextlib.suppress(registry.Unavailable):
                        answers = await found.look_up([key(number) for number in range(50)])
                        assert all(isinstance(each, registry.Unavailable) for each in answers)
                if empty.kind != "cluster":  # there it is each shard that is given up
                    await until(lambda: not found.up)
                began = time.monotonic()
                for number in range(100):
                    await fails(found.look_up([key(number)]))
                print(f"100 calls without a Redis: {time.monotonic() - began:.3f} s")
                assert time.monotonic() - began < LATE_S
            finally:
                for each in empty.servers:
                    each.thaw()
            # Whatever was asked then is answered now, to nobody.
            await until(lambda: found.up)
            for number in range(50):
                assert await until_answered(found, number) == [ufrag(number)]
            if empty.kind != "cluster":
                assert lines.begin() == [UNREACHABLE, BACK] and found.losses == 0
            assert lines.begin() in ([], [UNREACHABLE, BACK], [REFUSES, TAKES]), lines.all

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["cluster"], indirect=True)
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_shard_is_lost_alone(empty, how, request):
    # One that hangs must not be waited for longer; one that is dead nobody waits for.
    more = request.getfixturevalue("patient") if how == "kill" else {}

    async def story():
        async with opened(empty.url, **more) as (found, lines):
            await until_stored(found, *range(60))
            primary = empty.keeper_of(stored(0))
            mine = {n for n in range(60) if empty.keeper_of(stored(n)) is primary}
            assert primary.do("WAIT", "1", "5000") == 1 and 0 < len(mine) < 60
            getattr(primary, how)()
            began, refused, slowest, pauses = time.monotonic(), 0, 0.0, 0
            try:
                while True:
                    asked = time.monotonic()
                    try:
                        answers = await found.look_up([key(number) for number in range(60)])
                    except registry.Unavailable as error:  # not one of them has answered
                        answers = [error] * 60
                    slowest = max(slowest, time.monotonic() - asked)
                    unavailable = {
                        n
                        for n, each in enumerate(answers)
                        if isinstance(each, registry.Unavailable)
                    }
                    if unavailable - mine and how == "freeze" and pauses < PAUSES_MAX:
                        pauses += 1  # the whole machine stood still for so long
                        await asyncio.sleep(0.02)
                        continue
                    for number, each in enumerate(answers):
                        if number not in mine:
                            assert each == ufrag(number)
                    assert unavailable in (set(), mine)
                    refused += bool(unavailable)
                    with contextlib.suppress(registry.Unavailable):  # one of those alone
                        assert await found.look_up([key(min(mine))]) == [ufrag(min(mine))]
                    if refused and not unavailable:
                        break
                    assert time.monotonic() - began < PATIENCE_S
                    assert found.up
                    await asyncio.sleep(0.02)
                print(
                    f"all of it after {time.monotonic() - began:.1f} s, slowest {slowest:.3f} s, "
                    f"{pauses} pauses of the machine"
                )
                assert slowest < TIMEOUT_S + LATE_S
                assert refused > 10, "nobody waits for it each time"
                assert answers == [ufrag(number) for number in range(60)]
                await until_stored(found, *range(60))
                await until(lambda: not lines.all or lines.begin()[-1] == TAKES)
                assert lines.begin() in ([], [REFUSES, TAKES]), lines.all
            finally:
                if how == "kill":
                    await asyncio.to_thread(primary.start)
                else:
                    primary.thaw()
                await asyncio.to_thread(empty.settle)

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["cluster"], indirect=True)
def test_a_shard_without_a_replica_is_missing_until_it_is_back(empty, patient):
    async def story():
        async with opened(empty.url, **patient) as (found, lines):
            await until_stored(found, *range(60))
            primary = empty.keeper_of(stored(0))
            mine = [n for n in range(60) if empty.keeper_of(stored(n)) is primary]
            both = empty.replica_of(primary), primary
            for each in both:
                each.kill()
            try:
                await until(lambda: lines.all)
                for _ in range(3):
                    assert await found.store(flows(*range(60))) == mine
                    answers = await found.look_up([key(number) for number in range(60)])
                    for number, each in enumerate(answers):
                        if number in mine:
                            assert isinstance(each, registry.Unavailable)
                        else:
                            assert each == ufrag(number)
                    await asyncio.sleep(registry.PROBE_S)
                assert found.up and lines.begin() == [REFUSES]
            finally:
                for each in reversed(both):
                    await asyncio.to_thread(each.start)
            await until_stored(found, *range(60))
            assert await until_answered(found, *range(60)) == [ufrag(n) for n in range(60)]
            await until(lambda: TAKES in lines.begin())
            assert sorted(lines.begin()) == sorted([REFUSES, LOST, TAKES]), lines.all
            assert found.losses == 1

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["service"], indirect=True)
def test_a_service_is_found_again(empty):
    """Its primary is lost, and the Sentinel that would be asked first says nothing.

    It takes Sentinels long to be of one mind again: this is the last that is done to the service.
    """

    async def story():
        async with opened(empty.url) as (found, lines):
            await until_stored(found, *range(50))
            primary, sentinel = empty.primary(), empty.sentinels[0]
            assert primary.do("WAIT", "2", "5000") == 2
            primary.kill()
            sentinel.freeze()
            began = time.monotonic()
            await until(lambda: not found.up)
            await until(lambda: found.up)
            print(f"another primary after {time.monotonic() - began:.1f} s")
            assert await until_answered(found, *range(50)) == [ufrag(n) for n in range(50)]
            await until_stored(found, *range(100))
            assert lines.begin() == [UNREACHABLE, BACK]

    asyncio.run(story())


# --- one server -----------------------------------------------------------------------------------


def test_a_flow_is_forgotten_after_its_time(single, patient):
    async def story():
        async with opened(single().url, ttl_s=5, **patient) as (found, _):
            assert await found.store(flows(1)) == []
            assert await found.look_up([key(1)]) == [ufrag(1)]
            deadline = time.monotonic() + PATIENCE_S
            while await found.look_up([key(1)]) == [ufrag(1)]:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(story())


def test_a_connection_that_was_closed_meanwhile_is_made_anew(single, patient):
    async def story():
        redis = single()
        async with opened(redis.url, **patient) as (found, lines):
            for _ in range(3):
                await asyncio.gather(*(found.look_up([key(1)]) for _ in range(4)))
                redis.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until_stored(found, 1)
            assert lines.all == []

    asyncio.run(story())


def test_a_socket_of_the_machine_and_a_database(single, tmp_path, patient):
    path = tmp_path / "redis.sock"
    redis = single("--unixsocket", str(path))

    async def story():
        async with opened(f"unix://{path}?db=3", **patient) as (found, _):
            assert await found.store(flows(1)) == []
        async with opened(f"{redis.url}/3", **patient) as (found, _):
            assert await found.look_up([key(1)]) == [ufrag(1)]
        async with opened(redis.url, **patient) as (found, _):
            assert await found.look_up([key(1)]) == [None]

    asyncio.run(story())


@pytest.mark.parametrize(
    "scheme", ["redis://{at}", "redis+sentinel://{at}/flows", "redis+cluster://{at}"]
)
def test_down_at_start(scheme):
    (port,) = ports.free(1)

    async def story():
        async with opened(scheme.format(at=f"127.0.0.1:{port}")) as (found, lines):
            await fails(found.look_up([key(1)]))
            await fails(found.store(flows(1)))
            await until(lambda: not found.up)
            await asyncio.sleep(1.5 * registry.PROBE_S)
            assert not found.up and lines.begin() == [UNREACHABLE]

    asyncio.run(story())


def test_one_that_comes_later_is_used(tmp_path, patient):
    with contextlib.ExitStack() as stack:
        (port,) = ports.free(1)
        server = redises.Server(tmp_path, port=port)
        stack.callback(server.close)

        async def story():
            async with opened(f"redis://127.0.0.1:{port}", **patient) as (found, lines):
                await until(lambda: not found.up)
                server.start()
                await until(lambda: found.up)
                assert await found.store(flows(1)) == []
                assert lines.begin() == [UNREACHABLE, BACK] and found.losses == 0

        asyncio.run(story())


def test_a_user_needs_no_more_than_two_commands(single, patient):
    redis = single()
    rights = "on", ">horse", "~earshot:*", "-@all", "+set", "+getrange"
    redis.servers[0].do("ACL", "SETUSER", "relay", *rights)

    async def story():
        at = redis.url.partition("://")[2]
        async with opened(f"redis://relay:horse@{at}", **patient) as (found, lines):
            assert await found.store(flows(1)) == []
            assert await found.look_up([key(1)]) == [ufrag(1)]
            await asyncio.sleep(2 * registry.PROBE_S)
            assert lines.all == [] and found.up

    asyncio.run(story())


PASSWORD = "correct-horse"


def test_a_wrong_password_is_a_line_without_it(single, patient):
    redis = single("--requirepass", PASSWORD)
    at = redis.url.partition("://")[2]

    async def story():
        async with opened(f"redis://:{PASSWORD}@{at}", **patient) as (found, lines):
            assert await found.store(flows(1)) == []
            assert lines.all == []
        for wrong in ("battery-staple", ""):
            url = f"redis://:{wrong}@{at}" if wrong else redis.url
            async with opened(url, **patient) as (found, lines):
                said = await fails(found.look_up([key(1)]))
                await until(lambda lines=lines: lines.all)
                assert lines.begin() == [UNREACHABLE]
                assert "staple" not in said + "".join(lines.all)
        # A server that repeats what it was told.
        async with redises.Proxy(redis.servers[0].port) as proxy:
            proxy.how = b"-WRONGPASS it is not " + PASSWORD.encode() + b"\r\n"
            url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}"
            async with opened(url, **patient) as (found, lines):
                said = await fails(found.look_up([key(1)]))
                assert PASSWORD not in said + "".join(lines.all) and "it is not ***" in said

    asyncio.run(story())


def test_one_that_is_slow_is_not_waited_for(single):
    async def story():
        port = single().servers[0].port
        async with (
            redises.Proxy(port) as proxy,
            opened(f"redis://127.0.0.1:{proxy.port}") as (found, lines),
        ):
            await until_stored(found, *range(10))
            proxy.how = "delay"
            # At once, as the keeper asks.
            await asyncio.gather(
                *(fails(found.look_up([key(n)])) for n in range(redisclient.TIMEOUTS_MAX))
            )
            assert not found.up
            began = time.monotonic()
            for number in range(100):
                await fails(found.look_up([key(number)]))
                await fails(found.store(flows(number)))
            print(f"200 calls without a Redis: {time.monotonic() - began:.3f} s")
            assert time.monotonic() - began < LATE_S
            await asyncio.sleep(2 * registry.PROBE_S)
            assert lines.begin() == [UNREACHABLE] and "no answer in time" in lines.all[0]
            proxy.how = "pass"
            await until(lambda: found.up)
            # Probes that were late were taken nevertheless: nothing is lost.
            await asyncio.sleep(1.5 * registry.PROBE_S)
            assert lines.begin() == [UNREACHABLE, BACK] and found.losses == 0

    asyncio.run(story())


def test_a_probe_that_is_answered_late_is_no_loss(single):
    """It was taken: what stands there then is newer than the last answer, and not what was lost."""

    async def story():
        port = single().servers[0].port
        async with (
            redises.Proxy(port) as proxy,
            opened(f"redis://127.0.0.1:{proxy.port}") as (found, lines),
        ):
            await until_stored(found, 1)
            await asyncio.sleep(2 * registry.PROBE_S)
            proxy.how = "delay"
            await until(lambda: not found.up)
            proxy.how = "pass"
            await until(lambda: found.up)
            assert lines.begin() == [UNREACHABLE, BACK] and found.losses == 0

    asyncio.run(story())


def test_one_that_forgets_all_the_time_says_it_once(single, patient):
    async def story():
        redis = single()
        async with opened(redis.url, **patient) as (found, lines):
            await until_stored(found, 1)
            while found.losses < 3:
                redis.flush()
                await asyncio.sleep(0.1 * registry.PROBE_S)
            assert lines.begin() == [LOST]

    asyncio.run(story())


def test_a_late_answer_is_nobodys(single, patient):
    """Calls that were given up, in each moment of theirs: no later one gets what comes then."""

    async def story():
        port = single().servers[0].port
        async with (
            redises.Proxy(port) as proxy,
            opened(f"redis://127.0.0.1:{proxy.port}", **patient) as (found, _),
        ):
            await until_stored(found, *range(100))
            proxy.how = "delay"
            began = time.monotonic()
            given_up = []
            for number in range(8):
                proxy.came.clear()
                given_up.append(asyncio.create_task(found.look_up([key(number)])))
                if number % 2:  # it was sent; else before that
                    await proxy.came.wait()
                given_up[-1].cancel()
            done, _ = await asyncio.wait(given_up)
            assert all(each.cancelled() for each in done)
            proxy.how = "pass"
            asked = 0
            while time.monotonic() - began < SLOW_S + 0.5 or asked <= 20:
                numbers = [asked % 100, (asked * 7 + 1) % 100]
                answers = await asyncio.gather(*(found.look_up([key(n)]) for n in numbers))
                assert answers == [[ufrag(n)] for n in numbers]
                asked += 1
                await asyncio.sleep(0.005)

    asyncio.run(story())


NONSENSE = {
    "http": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"\r\n",
    "no length": b"$abc\r\n",
    "negative": b"$-7\r\n",
    "no number": b":x\r\n",
    "an array of arrays": b"*1\r\n" * 20_000,
    "moved nowhere": b"-MOVED nonsense\r\n",
    "moved to nobody": b"-MOVED 1 127.0.0.1:1\r\n" * 16,
    "asked nowhere": b"-ASK\r\n",
    "an error": b"-\r\n",
    "not text": b"-\xff\xfe\r\n+\xff\r\n",
    "too many": b"+OK\r\n" * 1000,
    "numbers": b":1\r\n" * 16,
    "lists": b"*2\r\n:1\r\n$-1\r\n" * 16,
    "a long one": b"$9999999999\r\n" + b"x" * 100_000,
    "many": b"*999999999\r\n" + b":1\r\n" * 1000,
    "endless line": b"+" + b"x" * 1_000_000,
    "chance": os.urandom(1000),
}


@pytest.mark.parametrize("url", ["redis://{at}", "redis+sentinel://{at}/f", "redis+cluster://{at}"])
def test_nonsense_ends_nothing(spoken_to, url):
    """Whatever comes, a call ends in time, and the watch goes on (`opened` looks after that)."""

    async def story(name, found, lines):
        for number in range(2):
            began = time.monotonic()
            with contextlib.suppress(registry.Unavailable):
                (answer,) = await found.look_up([key(number)])
                if not isinstance(answer, registry.Unavailable | None):
                    assert len(answer) <= registry.VALUE_OCTETS_MAX, name
            with contextlib.suppress(registry.Unavailable):
                await found.store(flows(number))
            ended = time.monotonic() - began
            print(f"{name}: {ended:.3f} s")
            assert ended < TIMEOUT_S + registry.STORE_S + LATE_S, name
        assert all(line.isprintable() and len(line) < 400 for line in lines.all), name

    async def heals(name, nonsense):
        async with redises.Proxy(spoken_to) as proxy:
            proxy.how = nonsense
            async with opened(url.format(at=f"127.0.0.1:{proxy.port}")) as (found, lines):
                await story(name, found, lines)
                if url == "redis://{at}":
                    proxy.how = "pass"
                    proxy.cut()
                    assert await until_answered(found, 5) == [ufrag(5)], name

    async def all_at_once():
        async with asyncio.TaskGroup() as group:
            for name, nonsense in NONSENSE.items():
                group.create_task(heals(name, nonsense))

    asyncio.run(all_at_once())


@pytest.fixture(scope="module")
def spoken_to(tmp_path_factory):
    """The port of a server with a flow in it."""
    with contextlib.ExitStack() as stack:
        redis = redises.Single(tmp_path_factory.mktemp("one"), stack)
        redis.do("SET", stored(5), ufrag(5))
        yield redis.servers[0].port


def test_what_is_announced_takes_no_memory(spoken_to):
    async def story():
        async with (
            redises.Proxy(spoken_to) as proxy,
            opened(f"redis://127.0.0.1:{proxy.port}") as (found, _),
        ):
            await until_answered(found, 5)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            proxy.how = b"$2000000000\r\n" + b"x" * 1000
            await fails(found.look_up([key(1)]))
            proxy.how = b"*2000000000\r\n" + b"$-1\r\n" * 1000
            await fails(found.look_up([key(1)]))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 32_768, "KiB"

    asyncio.run(story())
