"""The keeper as a process: over real sockets and memory of workers that the test plays."""

import asyncio
import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import time
import urllib.error
import urllib.request

import orjson
import pytest

import flows
import frame
import handover
import inquiries
import keeper
import ledger
import metrics
import recovery
import registry
import settings
import supervisor

from . import ports
from .alone import REASON, child, joined, unshare

PATIENCE_S = 20
CONFIG = """
[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 2
flows_max = 4096
flows_tentative_max = 4096
receive_buffer_octets = 65536
metrics = "127.0.0.1:{metrics}"
state_dir = "."

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [9000, 9099]

{more}
"""
HOP = frame.name("127.0.0.1", 9000, socket.AF_INET)
KINDS = metrics.Keeper
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def header(number):
    return frame.header(f"198.51.{number >> 8}.{number & 255}", 5000)


def key(number):
    return frame.key(header(number))


def question(number, ssrc=0):
    return recovery.ASK.pack(header(number), ssrc)


def ufrag(number):
    return b"%023d" % number


class Relay:
    """What a supervisor makes, workers without their loop, and a keeper as a child process."""

    def __init__(self, folder, stack, more="", port=0):
        public, internal = ports.free(2)
        path = folder / "relay.toml"
        path.write_text(CONFIG.format(public=public, internal=internal, metrics=port, more=more))
        self.found = settings.load(path, settings.Relay)
        self.shared = handover.Shared(self.found)
        self.stack = stack
        self.at = "127.0.0.1", public
        limits = handover.limits(self.found.relay)
        self.tables = [
            flows.Table(memory.section("flows"), limits, time.monotonic())
            for memory in self.shared.memories
        ]
        self.controls = [memory.section("control").cast("Q") for memory in self.shared.memories]
        self.supervisor = ledger.Counters(
            metrics.Supervisor, self.shared.relay.section("supervisor")
        )
        self.counters = ledger.Counters(metrics.Keeper, self.shared.relay.section("keeper"))
        self.pid, self.lines = 0, ""

    def beat(self, age_s=0.0):
        for control in self.controls:
            control[handover.Control.BEAT] = time.monotonic_ns() - int(age_s * 1e9)

    def start(self, *not_its):
        """Fork a keeper without some of our sockets; it must say that it is ready."""
        self.link, theirs = socket.socketpair()
        self.link.settimeout(PATIENCE_S)
        self.log, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                for sock in (self.link, *not_its):
                    sock.close()
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                handler = logging.StreamHandler(os.fdopen(writer, "w"))
                logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
                log = logging.getLogger("keeper")
                code = keeper.run(theirs, self.shared, self.found, log)
            except BaseException:
                logging.exception("it failed")
            finally:
                os._exit(code)
        self.stack.callback(self.end)
        theirs.close()
        os.close(writer)
        assert self.link.recv(1) == supervisor.READY
        return self

    def end(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code()

    def exit_code(self):
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def stop(self):
        """As a supervisor that lives on."""
        self.link.shutdown(socket.SHUT_WR)
        assert self.exit_code() == 0, self.rest()

    def rest(self):
        """All lines to the end of the process."""
        while more := os.read(self.log, 65536):
            self.lines += more.decode()
        return self.lines

    def line(self, part):
        """The next line of the log with `part` in it."""
        while True:
            head, newline, rest = self.lines.partition("\n")
            if newline:
                self.lines = rest
                if part in head:
                    return head
                continue
            readable, _, _ = select.select([self.log], [], [], PATIENCE_S)
            more = os.read(self.log, 65536) if readable else b""
            assert more, f"no line with {part!r}"
            self.lines += more.decode()

    def url(self):
        return self.line("metrics at").rpartition(" ")[2].removesuffix("/metrics")

    def open(self, *numbers, worker=0):
        now = time.monotonic()
        for number in numbers:
            assert self.tables[worker].open(header(number), HOP, ufrag(number), now) is None
        self.tables[worker].answered(map(header, numbers), now)
        self.received(worker)

    def received(self, worker=0):
        """Something came from a transceiver and went to a client."""
        _, outbound = handover.counters_in(self.shared.memories[worker])
        outbound.book(outbound.mark + 1, 1, 1, 100)

    def ask(self, *numbers, worker=0):
        """A worker asks, the answers come: number, status and ufrag of each."""
        ours, _ = self.shared.asks[worker]
        ours.send(b"".join(map(question, numbers)))
        answers = []
        while len(answers) < len(numbers):
            assert select.select([ours], [], [], PATIENCE_S)[0], "no answer"
            answers += recovery.ANSWER.iter_unpack(ours.recv(65536))
        return {of: (status, found.rstrip(b"\0")) for of, status, _, found in answers}

    def until(self, condition):
        """Wait until the keeper has seen it."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: Relay(tmp_path, stack, **kwargs)


def get(url):
    """Status and body."""
    try:
        with OPENER.open(url, timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_ends_when_it_is_told_to_and_when_nobody_is_left(make):
    relay = make().start()
    relay.stop()
    assert "fail" not in relay.rest()
    relay.start()
    relay.link.close()
    assert relay.exit_code() == 0


def test_ready_is_who_serves(make):
    relay = make().start()
    url = relay.url()
    assert get(url + "/healthz") == (200, "ok\n")
    status, body = get(url + "/readyz")
    assert status == 503
    why = [f"worker {number} has not served yet" for number in range(2)]
    assert orjson.loads(body) == {"ready": False, "why": why}
    relay.beat()
    assert get(url + "/readyz") == (200, '{"ready":true,"why":[]}')
    relay.line("all workers serve")
    relay.beat(age_s=10)
    status, body = get(url + "/readyz")
    assert status == 503 and "worker 1 was not heard of" in body
    relay.line("out of service: worker 0 was not heard of for 3 s, worker 1")
    relay.beat()
    relay.supervisor.values[metrics.Supervisor.DRAINING_UNTIL] = 1
    assert get(url + "/readyz") == (503, '{"ready":false,"why":["it drains"]}')
    assert get(url + "/healthz") == (200, "ok\n")
    assert get(url + "/")[0] == 404


def test_its_heart_beats(make):
    relay = make().start()
    for _ in range(2):
        seen = relay.counters[KINDS.BEAT]
        relay.until(lambda: relay.counters[KINDS.BEAT] > seen)  # noqa: B023
        assert relay.counters[KINDS.BEAT] <= time.monotonic_ns()


def sample(url):
    status, body = get(url + "/metrics")
    assert status == 200
    lines = [line for line in body.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_are_all_that_is_counted(make):
    relay = make().start()
    url = relay.url()
    relay.beat()
    relay.open(1, 2, 3, worker=1)
    inbound, _ = handover.counters_in(relay.shared.memories[0])
    inbound.book(1, 5, 4, 400, [metrics.Inbound.DROPPED_OVERSIZED])
    seen = sample(url)
    name = "earshot_relay_"
    assert seen[name + 'inbound_received_total{worker="0"}'] == 5
    assert seen[name + 'inbound_dropped_oversized_total{worker="0"}'] == 1
    assert seen[name + 'outbound_forwarded_total{worker="1"}'] == 1
    assert seen[name + 'worker_flows_assured{worker="1"}'] == 3
    assert seen[name + "supervisor_draining_until"] == 0
    assert seen[name + "keeper_flows_left"] == 3
    for side, number in itertools.product(("public", "internal"), range(2)):
        assert seen[f'{name}socket_dropped_total{{socket="{side}",worker="{number}"}}'] == 0


@pytest.mark.skipif(not os.path.exists("/proc/net/udp"), reason="needs Linux")
def test_what_the_kernel_drops_is_counted_too(make):
    relay = make().start()
    url = relay.url()
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        for _ in range(1000):
            client.sendto(bytes(1000), relay.at)
    seen = sample(url)
    mine = 'earshot_relay_socket_{}{{socket="public",worker="{}"}}'
    taken = 0
    for sock in relay.shared.public:
        with contextlib.suppress(BlockingIOError):
            while sock.recv(2000):
                taken += 1
    assert 0 < taken < 1000
    assert sum(seen[mine.format("dropped_total", n)] for n in range(2)) == 1000 - taken
    assert any(seen[mine.format("buffer_used", n)] >= 1000 * taken / 2 for n in range(2))


def test_a_port_that_is_taken_is_tried_again(make):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        relay = make(port=port).start(other)
        relay.line(f"no metrics at 127.0.0.1:{port} for now: Address already in use")
    assert get(relay.url() + "/healthz")[0] == 200


def test_a_client_of_another_worker_needs_no_redis(make):
    relay = make().start()
    relay.open(1, 2, worker=0)
    relay.open(3, worker=1)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 3)
    assert relay.ask(1, 3, 7, worker=1) == {
        header(1): (recovery.FOUND, ufrag(1)),
        header(3): (recovery.FOUND, ufrag(3)),
        header(7): (recovery.UNKNOWN, b""),
    }
    assert relay.ask(2, worker=1) == {header(2): (recovery.FOUND, ufrag(2))}
    counted = [KINDS.LOOKUPS, KINDS.LOOKUPS_HERE, KINDS.LOOKUPS_UNKNOWN]
    assert [relay.counters[kind] for kind in counted] == [4, 3, 1]


def test_a_flow_that_is_only_tentative_is_nobodys(make):
    relay = make().start()
    relay.tables[0].open(header(1), HOP, ufrag(1), time.monotonic())
    relay.received()
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 1)
    assert relay.ask(1, worker=1) == {header(1): (recovery.UNKNOWN, b"")}


def test_questions_that_came_while_there_was_no_keeper_are_answered(make):
    relay = make()
    relay.shared.asks[0][0].send(question(5))
    relay.start()
    assert relay.ask(6) == {header(5): (recovery.UNKNOWN, b"")}


def test_a_worker_that_reads_no_answers_harms_nobody(make):
    relay = make().start()
    ours, _ = relay.shared.asks[0]
    questions = b"".join(map(question, range(64)))
    for _ in range(1000):
        select.select([], [ours], [], PATIENCE_S)
        with contextlib.suppress(BlockingIOError):
            ours.send(questions)
    relay.until(lambda: relay.counters[KINDS.ANSWERS_LOST])
    assert relay.ask(1, worker=1) == {header(1): (recovery.UNKNOWN, b"")}


def test_draining_ends_with_the_last_assured_flow(make):
    relay = make().start()
    relay.open(1, 2, worker=0)
    relay.open(3, worker=1)
    relay.tables[1].open(header(4), HOP, ufrag(4), time.monotonic())
    relay.received()
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 4)
    assert not relay.counters[KINDS.DRAINED]
    relay.supervisor.values[metrics.Supervisor.DRAINING_UNTIL] = 2**40
    relay.line("out of service: it drains")
    assert not relay.counters[KINDS.DRAINED]
    for number, table in enumerate(relay.tables):
        now = time.monotonic()
        while table.hops.keys() - {header(4)}:
            now += 1
            table.active = {header(4)} & table.hops.keys()
            table.sweep(now)
        relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 2 - number)  # noqa: B023
    relay.until(lambda: relay.counters[KINDS.DRAINED])
    assert relay.counters[KINDS.FLOWS_LEFT] == 1, "one is tentative"


# --- Redis, played: what a real one does is registry.py's -----------------------------------------

REDIS = """
[redis]
url = "redis://127.0.0.1:1"
ttl_s = {ttl_s}
"""


class Played:
    """What the keeper sees of Redis."""

    def __init__(self):
        self.up, self.refuses = True, False
        self.known, self.stored, self.asked = {}, [], []
        self.open = asyncio.Event()
        self.open.set()
        self.closed = False
        self.losses = 0

    async def watch(self):
        await asyncio.Event().wait()

    async def store(self, entries):
        await self.open.wait()
        if self.refuses:
            raise registry.Unavailable
        self.stored.append(dict(entries))
        return []

    async def look_up(self, keys):
        self.asked.append(keys)
        await self.open.wait()
        if self.refuses:
            raise registry.Unavailable
        return [self.known.get(key) for key in keys]

    async def close(self):
        self.closed = True


def play(relay, story):
    """Run the keeper in this process, and a coroutine function with it and the played Redis."""

    async def both():
        redis, (ours, theirs) = Played(), socket.socketpair()
        kept = keeper.Keeper(relay.shared, relay.found, logging.getLogger("keeper"), redis)
        serving = asyncio.create_task(kept.serve(theirs))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(kept, redis)
        finally:
            ours.close()
            await serving
            theirs.close()
        assert redis.closed

    asyncio.run(both())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def answers(relay, count, worker=0):
    """As `Relay.ask`, with the keeper in this process."""
    ours, got = relay.shared.asks[worker][0], []
    while len(got) < count:
        with contextlib.suppress(BlockingIOError):
            got += recovery.ANSWER.iter_unpack(ours.recv(65536))
        await asyncio.sleep(0.001)
    return {of: (status, found.rstrip(b"\0")) for of, status, _, found in got}


def test_assured_flows_are_written_and_written_again(make):
    relay = make(more=REDIS.format(ttl_s=0.9))

    async def story(kept, redis):
        relay.open(1, 2)
        relay.open(3, worker=1)
        everything = {key(n): ufrag(n) for n in (1, 2, 3)}
        await until(lambda: redis.stored)
        assert redis.stored[0] == everything
        for _ in range(2):
            redis.stored.clear()
            began = time.monotonic()
            await until(
                lambda: dict(itertools.chain(*(d.items() for d in redis.stored))) == everything
            )
            assert time.monotonic() - began < PATIENCE_S / 4
        assert kept.counters[KINDS.STORED] >= 9

    play(relay, story)


def test_what_redis_did_not_take_is_kept_for_it(make, monkeypatch):
    monkeypatch.setattr(keeper, "STORE_RETRY_S", 0.01)
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.refuses = True
        relay.open(*range(2000))
        await until(lambda: kept.counters[KINDS.STORE_FAILED] > 3)
        kept.index.refresh(1.0)
        assert len(kept.index.due) <= 2000
        redis.refuses = False
        await until(lambda: sum(map(len, redis.stored)) >= 2000)
        assert set().union(*redis.stored) == set(map(key, range(2000)))
        assert max(map(len, redis.stored)) <= keeper.STORE_MAX

    play(relay, story)


def test_redis_is_asked_once_for_all_that_came_meanwhile(make):
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.known = {key(n): ufrag(n) for n in range(0, 1000, 2)}
        redis.open.clear()
        for n in range(100):
            relay.shared.asks[n % 2][0].send(question(n))
            await asyncio.sleep(0.001)
        await until(lambda: kept.counters[KINDS.LOOKUPS] == 100)
        assert len(redis.asked) == inquiries.LOOKUPS_AT_ONCE
        redis.open.set()
        for worker in range(2):
            for of, answer in (await answers(relay, 50, worker)).items():
                number = next(n for n in range(100) if header(n) == of)
                assert number % 2 == worker
                known = (
                    (recovery.FOUND, ufrag(number)) if number % 2 == 0 else (recovery.UNKNOWN, b"")
                )
                assert answer == known
        assert len(redis.asked) <= 2 * inquiries.LOOKUPS_AT_ONCE
        assert kept.counters[KINDS.LOOKUPS_FOUND] == kept.counters[KINDS.LOOKUPS_UNKNOWN] == 50

    play(relay, story)


def test_a_redis_that_hangs_is_not_waited_for_by_more_than_there_is_room(make):
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.open.clear()
        sent, failed = 0, kept.counters
        while not failed[KINDS.LOOKUPS_FAILED]:
            with contextlib.suppress(BlockingIOError):
                sent += relay.shared.asks[0][0].send(b"".join(map(question, range(64)))) // 40
            await asyncio.sleep(0)
        assert (
            sent
            <= inquiries.ASKED_MAX + (inquiries.LOOKUPS_AT_ONCE + 100) * inquiries.LOOKUP_KEYS_MAX
        )
        assert (await answers(relay, 1)).popitem()[1] == (recovery.UNAVAILABLE, b"")
        assert len(redis.asked) == inquiries.LOOKUPS_AT_ONCE
        redis.open.set()

    play(relay, story)


@pytest.mark.parametrize("how", ["down", "refuses"])
def test_without_redis_nobody_waits(make, how):
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.up, redis.refuses = how != "down", True
        relay.shared.asks[1][0].send(question(1) + question(2))
        both = {header(n): (recovery.UNAVAILABLE, b"") for n in (1, 2)}
        assert await answers(relay, 2, worker=1) == both
        assert kept.counters[KINDS.LOOKUPS_FAILED] == 2
        assert len(redis.asked) == (how == "refuses")

    play(relay, story)


@pytest.mark.parametrize("hangs", [False, True])
def test_the_last_flows_are_written_when_it_ends(make, hangs, monkeypatch):
    monkeypatch.setattr(keeper, "LOOK_S", 3600)
    relay = make(more=REDIS.format(ttl_s=300))
    last = []

    async def story(kept, redis):
        last.append(redis)
        await asyncio.sleep(0)
        relay.open(1)
        if hangs:
            redis.open.clear()

    play(relay, story)
    assert last[0].stored == ([] if hangs else [{key(1): ufrag(1)}])


# --- virtual addresses, in a network namespace ----------------------------------------------------

VIP = '[vip]\naddresses = ["203.0.113.5", "2001:db8::5"]'


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_addresses_are_here_while_all_workers_serve(make, monkeypatch):
    monkeypatch.setattr(keeper, "VIP_STEADY_S", 0.5)
    monkeypatch.setattr(keeper, "HEARD_S_MAX", 20.0)  # a beat is not too old on a slow machine

    def story():
        unshare()
        pyroute2 = pytest.importorskip("pyroute2")
        with pyroute2.IPRoute() as routes:
            routes.link("set", index=1, state="up")
        relay = make(more=VIP).start()
        announced = metrics.Keeper.VIP_ANNOUNCED

        def here():
            with pyroute2.IPRoute() as routes:
                of = {entry.get("address") for entry in routes.addr("dump", index=1)}
            return {"203.0.113.5", "2001:db8::5"} <= of

        assert not here()
        relay.beat()
        relay.line("announced on lo: 203.0.113.5, 2001:db8::5")
        assert here()
        relay.beat(age_s=100)
        relay.line("withdrawn on lo: 203.0.113.5, 2001:db8::5: worker 0 was not heard of")
        relay.until(lambda: not relay.counters[announced])
        assert not here()
        relay.beat()
        relay.line("announced")
        # A reload replaces the keeper: nobody shall notice.
        relay.stop()
        assert here()
        relay.beat()
        relay.start()
        relay.until(lambda: relay.counters[announced])
        relay.supervisor.values[metrics.Supervisor.DRAINING_UNTIL] = 2**40
        relay.line("withdrawn on lo: 203.0.113.5, 2001:db8::5: it drains")
        relay.supervisor.values[metrics.Supervisor.DRAINING_UNTIL] = 0
        relay.beat()
        relay.line("announced")
        # The supervisor is lost, and the workers end with it.
        relay.link.close()
        assert relay.exit_code() == 0
        assert not here()
        relay.beat()
        relay.start().line("announced")
        relay.stop()
        keeper.retire(relay.found.vip, logging.getLogger("keeper"))
        assert not here()

    joined(*child(story))


@pytest.mark.skipif(bool(REASON) or os.geteuid() != 0, reason=REASON or "needs root to give it up")
def test_addresses_that_may_not_be_added_are_one_line_and_no_end(make, monkeypatch):
    monkeypatch.setattr(keeper, "RETRY_S", 0.01)

    def story():
        unshare()
        pytest.importorskip("pyroute2")  # now: somebody without rights may not read its files
        relay = make(more=VIP)
        relay.beat()
        os.setuid(65534)
        relay.start()
        relay.line("virtual addresses on lo: Operation not permitted")
        relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 0)
        relay.stop()
        assert "virtual" not in relay.rest()

    joined(*child(story))
