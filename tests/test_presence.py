"""Who is there, by way of a real Redis; and what is believed of what stands in it."""

import asyncio
import collections
import contextlib
import ipaddress
import json
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import endpoints
import presence
import redisclient
import ufrag

from . import redises

PATIENCE_S = redises.PATIENCE_S
CLUSTERS = {
    1: ufrag.Cluster(1, ipaddress.ip_network("10.4.0.0/16"), 9000, 9099),
    2: ufrag.Cluster(2, ipaddress.ip_network("fd00:4::/96"), 9000, 9099),
}
A, B, SIX = "10.4.1.2:9000", "10.4.1.2:9001", "[fd00:4::1]:9000"


def health(**more):
    return {"state": "serving", "sessions": 1, "sessions_max": 10, "cluster": 1, **more}


def written(**more):
    return json.dumps({"v": presence.VERSION, **health(**more)}).encode()


# --- what is believed -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)
COUNTS = ["sessions", "sessions_max", "connecting", "connecting_max", "opened", "beat"]
FIELDS = st.sampled_from([*COUNTS, "load", "started", "cluster", "calls_by_key", "state"])


@given(st.dictionaries(FIELDS, JSON | st.integers(-5, 1 << 60)), st.booleans())
def test_any_report_is_within_its_bounds_or_none(fields, whole):
    report = presence.read({**health(), **fields} if whole else fields)
    if report is None:
        return
    assert report.sessions_max >= 1 and report.connecting_max >= 1 and report.load >= 0
    counts = report.sessions, report.sessions_max, report.opened or 0, report.beat, report.load
    for number in counts:
        assert 0 <= number <= presence.NUMBER_MAX
    assert abs(report.started) <= presence.NUMBER_MAX
    assert len(report.calls_by_key) <= presence.KEYS_MAX
    assert all(0 <= calls <= presence.NUMBER_MAX for calls in report.calls_by_key.values())


@pytest.mark.parametrize("found", [None, 7, [], {}, {"state": "away"}, health(sessions_max=0)])
def test_what_is_no_report(found):
    assert presence.read(found) is None


@given(st.dictionaries(st.text(min_size=1, max_size=128), st.integers(1, 9), max_size=400))
def test_the_calls_of_a_report_have_room_in_it(calls):
    kept = presence.counted(collections.Counter(calls).elements())
    assert kept.items() <= calls.items()
    assert len(kept) == len(calls) or min(kept.values(), default=0) >= max(
        count for key, count in calls.items() if key not in kept
    )
    ((_, _, value, _, _), _) = presence.announcement(b"x", health(calls_by_key=kept), 1e9)
    assert len(value) <= presence.REPORT_OCTETS_MAX
    read = presence.read(json.loads(value))
    assert read is not None and read.calls_by_key == kept


REFUSED = {
    "another prefix": ("10.5.1.2:9000", written()),
    "another port": ("10.4.1.2:9100", written()),
    "port 0": ("10.4.1.2:0", written()),
    "loopback": ("127.0.0.1:9000", written()),
    "a mapped address": ("[::ffff:10.4.1.2]:9000", written()),
    "another cluster's": ("10.4.1.2:9000", written(cluster=2)),
    "an unknown cluster": ("10.4.1.2:9000", written(cluster=3)),
    "no cluster": ("10.4.1.2:9000", written(cluster=None)),
    "a name": ("host.example:9000", written()),
    "a path": ("10.4.1.2:9000/../", written()),
    "another spelling": ("[FD00:4::1]:9000", written(cluster=2)),
    "zeros before": ("10.4.1.2:09000", written()),
    "no JSON": (A, b"{"),
    "a list": (A, b"[]"),
    "no version": (A, json.dumps(health()).encode()),
    "a later version": (A, json.dumps({"v": 2, **health()}).encode()),
    "a long version": (A, json.dumps({"v": "x" * 999, **health()}).encode()),
    "nothing in it": (A, json.dumps({"v": 1}).encode()),
    "too long": (A, written(more="x" * presence.REPORT_OCTETS_MAX)),
    "no octets": (A, 7),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leads_nowhere(name):
    at, value = REFUSED[name]
    with pytest.raises(ValueError, match=r".") as error:
        presence.judge(at.encode(), value, CLUSTERS)
    assert 0 < len(str(error.value)) < 200


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_any_octets_are_judged(name, value):
    with pytest.raises(ValueError, match=r"."):
        presence.judge(name, value, CLUSTERS)


@given(JSON, st.dictionaries(FIELDS, JSON), st.sampled_from([1, 1.0, True, 2]))
def test_any_json_is_judged(value, fields, version):
    for found in (value, {"v": version, **fields}, {"v": version, **health(), **fields}):
        with contextlib.suppress(ValueError):
            written = json.dumps(found, ensure_ascii=False).encode(errors="surrogatepass")
            at, report = presence.judge(A.encode(), written, CLUSTERS)
            assert str(at) == A and report.sessions_max >= 1


def test_what_is_believed():
    assert presence.judge(SIX.encode(), written(cluster=2), CLUSTERS) == (
        endpoints.Endpoint(SIX),
        presence.Report(sessions=1, sessions_max=10, cluster=2),
    )


# --- through Redis --------------------------------------------------------------------------------


@pytest.fixture
def lines():
    handler = redises.Lines()
    presence.log.addHandler(handler)
    presence.log.setLevel(logging.INFO)
    yield handler.all
    presence.log.removeHandler(handler)


@pytest.fixture(params=["server", "cluster"])
def kind(request, tmp_path):
    with contextlib.ExitStack() as stack:
        yield redises.KINDS[request.param](tmp_path, stack)


@pytest.fixture
def single(tmp_path):
    with contextlib.ExitStack() as stack:
        yield redises.Single(tmp_path, stack)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A machine that stands still is no Redis that does."""
    monkeypatch.setattr(redisclient, "CALL_S_MAX", 20.0)


@contextlib.asynccontextmanager
async def client_of(url, timeout_s=10.0):
    client = redisclient.Client(endpoints.RedisUrl(url), timeout_s, logging.getLogger("test"))
    watching = asyncio.create_task(client.watch())
    try:
        yield client
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await client.close()


@contextlib.asynccontextmanager
async def announced(client, at, says):
    """Announced until the block is left, and then as if it had been killed."""
    announcer = presence.Announcer(client, endpoints.Endpoint(at), says)
    running = asyncio.create_task(announcer.run(client))
    try:
        yield announcer
    finally:
        assert not running.done(), running
        running.cancel()
        await asyncio.wait([running])


async def until(read, condition):
    """Read until it is so; how long that took."""
    began = time.monotonic()
    while True:
        assert time.monotonic() - began < PATIENCE_S
        with contextlib.suppress(redisclient.Unavailable):
            found = await read()
            if condition(found):
                return time.monotonic() - began
        await asyncio.sleep(0.02)


def reading(reader):
    async def read():
        found = await reader.read(time.monotonic())
        return {str(at): report for at, report in found.items()}

    return read


def test_one_that_is_announced_is_read_and_one_that_dies_is_gone(kind, lines):
    async def story():
        async with client_of(kind.url) as client, client_of(kind.url) as other:
            read = reading(presence.Reader(other, CLUSTERS))
            assert await read() == {}
            says, said = health(beat=1, calls_by_key={"acme": 1}, started=1.5), []

            def speaks():
                said.append(time.monotonic())
                return says

            async with announced(client, A, speaks) as announcer:
                await until(read, lambda found: list(found) == [A])
                assert (await read())[A] == presence.read(says)
                says = health(beat=2, state="draining")
                announcer.changed()
                print(f"drains after {await until(read, lambda found: found[A].draining):.3f} s")
            # As if killed: it says no more.
            await until(read, lambda found: not found)
            took = time.monotonic() - said[-1]
            print(f"gone {took:.3f} s after its last word")
            assert took > presence.LEASE_S - presence.BEAT_S - 0.5

            announcer = presence.Announcer(client, endpoints.Endpoint(A), health)
            announcer.start()
            await until(read, lambda found: list(found) == [A])
            await announcer.stop()
            assert await read() == {}
            assert lines == []

    asyncio.run(story())


def test_a_beat_is_not_late_when_something_changes(single):
    """A drain is said with a beat of its own, and the next one comes in time."""
    told = []

    async def story():
        async with client_of(single.url) as client:
            reports = asyncio.Event()

            def says():
                told.append(time.monotonic())
                reports.set()
                return health()

            async with announced(client, A, says) as announcer:
                await reports.wait()
                before = len(told)
                announcer.changed()
                began = time.monotonic()
                while len(told) == before:
                    assert time.monotonic() - began < PATIENCE_S
                    await asyncio.sleep(0.001)
                print(f"said after {1e3 * (told[before] - began):.1f} ms")

    asyncio.run(story())


def test_stale_names_are_swept(single, monkeypatch):
    monkeypatch.setattr(presence, "SWEEP_S", 0.1)

    async def story():
        async with client_of(single.url) as client:
            reader = presence.Reader(client, CLUSTERS)
            single.do("ZADD", presence.NAMES, "1", A, "2", B, "3", b"\xff", "4", "x" * 60)
            single.do("SET", presence.PREFIX + B.encode(), written())
            await until(reading(reader), lambda _: single.do("ZCARD", presence.NAMES) == 1)
            assert single.do("ZRANGE", presence.NAMES, "0", "-1") == [B.encode()]
            assert list(await reading(reader)()) == [B]

    asyncio.run(story())


def test_a_hostile_redis_leads_nowhere_and_is_a_line_each(single, lines, monkeypatch):
    monkeypatch.setattr(presence, "IGNORED_MAX", 30)

    async def story():
        async with client_of(single.url) as client:
            reader = presence.Reader(client, CLUSTERS)
            for number, (name, value) in enumerate(REFUSED.values()):
                if name != A:
                    single.do("SET", presence.PREFIX + name.encode(), value)
                    single.do("ZADD", presence.NAMES, str(number), name)
            single.do("SET", presence.PREFIX + A.encode(), b"\xff" * 100_000)
            single.do("ZADD", presence.NAMES, "7", A)
            single.do("HSET", presence.PREFIX + B.encode(), "another", "type")
            single.do("ZADD", presence.NAMES, "8", B)
            for _ in range(3):
                assert await reading(reader)() == {}
            assert len(lines) == len({line.partition(": ")[2] for line in lines}) == 11, lines
            assert all(line.isprintable() and len(line) < 300 for line in lines), lines
            # It is well again, and then ill: that is another line.
            single.do("SET", presence.PREFIX + A.encode(), written())
            assert list(await reading(reader)()) == [A]
            single.do("SET", presence.PREFIX + A.encode(), b"{}")
            assert await reading(reader)() == {} and len(lines) == 12
            # More names than there may be: those announced last are read.
            many = [word for n in range(5000) for word in (str(n), f"10.4.{n >> 8}.{n & 255}:9001")]
            single.do("ZADD", presence.NAMES, *many)
            single.do("ZADD", presence.NAMES, "9999", A)
            single.do("SET", presence.PREFIX + A.encode(), written())
            assert list(await reading(reader)()) == [A]
            assert len(reader._empty) < presence.TRANSCEIVERS_MAX
            single.do("DEL", presence.NAMES)
            single.do("SET", presence.NAMES, "no list")
            with pytest.raises(redisclient.Unavailable, match="WRONGTYPE"):
                await reading(reader)()

    asyncio.run(story())


def test_a_redis_that_takes_no_presence_is_said_once(single, lines):
    async def story():
        async with client_of(single.url) as client:
            single.do("SET", presence.NAMES, "no list")
            times = []

            def says():
                times.append(1)
                return health()

            async with announced(client, A, says) as announcer:
                for count in range(1, 4):
                    announcer.changed()
                    deadline = time.monotonic() + PATIENCE_S
                    while len(times) < count + 1:
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.01)
                assert len(lines) == 1 and "WRONGTYPE" in lines[0]
                single.do("DEL", presence.NAMES)
                announcer.changed()
                read = reading(presence.Reader(client, CLUSTERS))
                await until(read, lambda found: list(found) == [A])
                deadline = time.monotonic() + PATIENCE_S
                while len(lines) < 2:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_no_more_rights_than_are_named(single):
    """The header names the commands that each side needs."""
    for user, commands in (("transceiver", "SET DEL ZADD"), ("signaling", "ZRANGE GETRANGE")):
        rights = [f"+{each.lower()}" for each in [*commands.split(), "ZREM"]]
        single.servers[0].do(
            *("ACL", "SETUSER", user, "on", ">horse", "~earshot:{presence}*", "-@all"), *rights
        )
        assert all(each in presence.__doc__ for each in commands.split())

    async def story():
        at = single.url.partition("://")[2]
        async with (
            client_of(f"redis://transceiver:horse@{at}") as client,
            client_of(f"redis://signaling:horse@{at}") as other,
        ):
            announcer = presence.Announcer(client, endpoints.Endpoint(A), health)
            announcer.start()
            read = reading(presence.Reader(other, CLUSTERS))
            await until(read, lambda found: list(found) == [A])
            await announcer.stop()
            assert await read() == {} and other.up

    asyncio.run(story())
