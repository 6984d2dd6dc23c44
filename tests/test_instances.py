"""Two instances of signaling, one Redis, two transceivers, a relay, all as programs; and callers.

    callers (scripts/callers.py) ── relay ──▶ transceiver 1, transceiver 2
       │                                         │ announce themselves
       └── HTTP ──▶ signaling A, signaling B ◀── Redis

Neither instance has a list of transceivers: what they know stands in Redis. What is asked of a call
is asked of the instance that did not place it. Then each part is killed in turn.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

import pipecat
import presence
import whip

from . import ports, redises

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 30
"""How long anything may take before the test has failed."""
CALLS = "/v1/realtime/calls"
OFFER = (Path(__file__).parent / "data" / "chromium-156-offer.sdp").read_text()

COMMON = """
[keys]
file = "keys"
[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1024, 65535]
[redis]
url = "{redis}"
timeout_s = 2.0
"""
RELAY = """[relay]
public = "127.0.0.1:{public}"
internal = "127.0.0.1:{internal}"
workers = 1
state_dir = "."
metrics = "127.0.0.1:0"
"""
# Other tests have the CPU, too: no call is refused for that here.
TRANSCEIVER = """[transceiver]
listen = "127.0.0.1:{port}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
load_max = 100.0
lag_s_max = 100.0
{limits}
"""
SIGNALING = """[signaling]
listen = "127.0.0.1:{port}"
relays = ["127.0.0.1:{public}"]
metrics = "127.0.0.1:0"
"""

_where = importlib.util.spec_from_file_location("callers", ROOT / "scripts" / "callers.py")
callers = importlib.util.module_from_spec(_where)
sys.modules["callers"] = callers
_where.loader.exec_module(callers)


class Program:
    """One of ours, as an operator starts it."""

    def __init__(self, name, config):
        self.name, self.config, self.process = name, config, None
        self._log = config.with_suffix(".log")

    def start(self):
        """Start it, and wait until it says that it is ready."""
        self.begin()
        return self.ready()

    def begin(self):
        """Start it."""
        words = [BIN / self.name, "run", "--config", self.config]
        self._before = len(self.said())
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )

    def ready(self):
        """Wait until it says so."""
        deadline = time.monotonic() + PATIENCE_S
        while " ready" not in self.said()[self._before :]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return self

    def said(self):
        return self._log.read_text() if self._log.exists() else ""

    def send(self, number):
        self.process.send_signal(number)

    def kill(self):
        """With no word to anybody."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.kill()


class Town:
    """All of them."""

    def __init__(self, folder, stack, limits=""):
        keys = folder / "keys"
        keys.touch(mode=0o600)
        keys.write_text("0 " + bytes(range(32)).hex())
        self.redis = redises.Single(folder / "redis", stack)
        public, internal, *found = ports.free(6)
        self.relay = self._program(folder, "relay", "", public=public, internal=internal)
        self.transceivers = [
            self._program(folder, "transceiver", f"-{n}", port=port, limits=limits)
            for n, port in enumerate(found[:2])
        ]
        self.signaling = [
            self._program(folder, "signaling", f"-{n}", port=port, public=public)
            for n, port in enumerate(found[2:])
        ]
        self.names = [f"127.0.0.1:{port}" for port in found[:2]]
        self.control = [f"http://{name}/v1" for name in self.names]
        self.urls = [f"http://127.0.0.1:{port}" for port in found[2:]]
        programs = *self.transceivers, self.relay, *self.signaling
        for program in programs:
            stack.callback(program.stop)
            program.begin()
        for program in programs:
            program.ready()

    def _program(self, folder, name, suffix, **more):
        text = {"relay": RELAY, "transceiver": TRANSCEIVER, "signaling": SIGNALING}[name]
        path = folder / f"{name}{suffix}.toml"
        path.write_text(text.format(**more) + COMMON.format(redis=self.redis.url))
        return Program(name, path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        # What nobody connects to is soon gone.
        yield Town(tmp_path_factory.mktemp("town"), stack, "connect_deadline_s = 5.0")


class Visit:
    """A test's clients in a town."""

    def __init__(self, town, http):
        self.town, self.http, self.lines, self.ids = town, http, [], []

    async def ask(self, method, url, **more):
        """Status, body and headers of a request."""
        async with self.http.request(method, url, **more) as response:
            text = await response.text()
            found = json.loads(text) if "json" in response.content_type else text
            return response.status, found, response.headers

    async def call(self, instance=0):
        """A caller who talks, on a line of his own, and his call's id."""
        line = callers.Line(framed=False)
        self.lines.append(line)
        caller, url, named = line.caller(), self.town.urls[instance] + CALLS, []

        async def post(request):
            asked = {"sdp": request["offer"], "session": request["session"]}
            status, answer, headers = await self.ask("POST", url, json=asked)
            assert status == 201, answer
            named.append(headers["Location"].rpartition("/")[2])
            return answer

        await caller.call(post)
        caller.start()
        self.ids += named
        return caller, named[0]

    async def talk(self, seconds):
        """Everybody talks for so long."""
        await asyncio.gather(*(line.talk(seconds) for line in self.lines))

    async def until_answered(self, caller):
        """He talks, and hears something."""
        before, deadline = len(caller.arrivals), time.monotonic() + PATIENCE_S
        while len(caller.arrivals) == before:
            assert time.monotonic() < deadline
            await self.talk(0.2)

    async def state(self, instance=0):
        """What an instance says of the transceivers, by name."""
        _, told, _ = await self.ask("GET", self.town.urls[instance] + "/health")
        return told["transceivers_serving"]

    async def until_serving(self, count):
        """Until all instances expect so many to take calls; how long that took for each."""
        began, took = time.monotonic(), {}
        while len(took) < len(self.town.urls):
            assert time.monotonic() - began < PATIENCE_S
            for instance in range(len(self.town.urls)):
                if instance not in took and await self.state(instance) == count:
                    took[instance] = time.monotonic() - began
            await asyncio.sleep(0.005)
        return list(took.values())

    async def sessions(self):
        """How many there are at each transceiver that answers."""
        found = []
        for url in self.town.control:
            with contextlib.suppress(aiohttp.ClientError):
                found.append((await self.ask("GET", url + "/health"))[1]["sessions"])
        return found

    async def empty(self):
        """Nobody calls any more, and all transceivers serve."""
        for line in self.lines:
            line.close()
        self.lines.clear()
        for call_id in self.ids:  # what a test has left behind is nothing to the next one
            with contextlib.suppress(aiohttp.ClientError):
                await self.hang_up(call_id)
        await self.until_serving(2)

    async def hang_up(self, call_id, instance=1):
        url = f"{self.town.urls[instance]}{CALLS}/{call_id}/hangup"
        return (await self.ask("POST", url))[0]


def visited(town, story):
    async def run():
        async with aiohttp.ClientSession() as http:
            visit = Visit(town, http)
            await visit.until_serving(2)
            try:
                await story(visit)
            finally:
                await visit.empty()

    asyncio.run(run())


# --- each instance serves any call ----------------------------------------------------------------


def test_what_one_instance_places_the_other_can_end(shared):
    async def story(visit):
        for end in ("hangup", "DELETE"):
            caller, call_id = await visit.call(0)
            await visit.until_answered(caller)
            there = f"{shared.urls[1]}{CALLS}/{call_id}"
            assert (await visit.ask("GET", there))[0] == 200
            assert sum(await visit.sessions()) == 1
            if end == "hangup":
                assert await visit.hang_up(call_id) == 200
            else:
                assert (await visit.ask("DELETE", there))[0] == 200
            assert sum(await visit.sessions()) == 0
            assert await visit.hang_up(call_id, 0) == 404

    visited(shared, story)


def test_an_encoder_may_speak_to_another_instance_each_time(shared):
    """WHIP: trickle, an ICE restart and the end, by the URL that the first one gave."""

    async def story(visit):
        kind = {"Content-Type": "application/sdp"}
        status, answer, headers = await visit.ask(
            "POST", shared.urls[0] + whip.PATH, data=OFFER, headers=kind
        )
        assert status == 201 and "a=candidate" in answer
        there = shared.urls[1] + headers["Location"]
        kind = {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": headers["ETag"]}
        found = {
            name: next(
                line.partition(":")[2] for line in OFFER.splitlines() if line.startswith(name)
            )
            for name in ("a=ice-ufrag", "a=ice-pwd")
        }
        fragment = "".join(f"{name}:{value}\r\n" for name, value in found.items())
        fragment += "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n"
        candidate = "a=candidate:1 1 udp 1 192.0.2.1 9 typ host\r\n"
        status, told, _ = await visit.ask("PATCH", there, data=fragment + candidate, headers=kind)
        assert status == 204, told
        restart = fragment.replace(found["a=ice-ufrag"], "anew" * 2)
        kind["If-Match"] = "*"
        status, told, _ = await visit.ask("PATCH", there, data=restart, headers=kind)
        assert status == 200 and "a=ice-ufrag" in told, told
        assert (await visit.ask("DELETE", there))[0] == 200
        assert sum(await visit.sessions()) == 0

    visited(shared, story)


def test_pipecats_client_may_speak_to_another_instance_each_time(shared):
    async def story(visit):
        offer = {"sdp": OFFER, "type": "offer"}
        status, answer, _ = await visit.ask("POST", shared.urls[0] + pipecat.OFFER, json=offer)
        assert status == 200, answer
        line = "candidate:1 1 udp 1 192.0.2.1 9 typ host"
        candidates = [{"candidate": line, "sdp_mid": "0", "sdp_mline_index": 0}]
        found = {"pc_id": answer["pc_id"], "candidates": candidates}
        status, told, _ = await visit.ask("PATCH", shared.urls[1] + pipecat.OFFER, json=found)
        assert (status, told) == (200, {"status": "success"})
        assert await visit.hang_up(answer["pc_id"]) == 200
        status, told, _ = await visit.ask("PATCH", shared.urls[0] + pipecat.OFFER, json=found)
        assert status == 404, told

    visited(shared, story)


def test_a_sideband_reaches_the_call_from_the_other_instance(shared):
    async def story(visit):
        caller, call_id = await visit.call(0)
        url = f"{shared.urls[1]}/v1/realtime?call_id={call_id}"
        async with visit.http.ws_connect(url, protocols=["realtime"]) as sideband:
            first = await sideband.receive_json(timeout=PATIENCE_S)
            assert first["type"] == "session.created"
            await sideband.send_json({"type": "session.update", "session": {"instructions": "x"}})
            deadline = time.monotonic() + PATIENCE_S
            while (await sideband.receive_json(timeout=PATIENCE_S))["type"] != "session.updated":
                assert time.monotonic() < deadline
        await visit.until_answered(caller)
        assert await visit.hang_up(call_id) == 200

    visited(shared, story)


# --- signaling is killed --------------------------------------------------------------------------


@pytest.mark.parametrize("redis", ["there", "away"])
def test_signaling_killed_in_the_middle_of_calls(shared, redis):
    """Nothing happens to them, and the new one can hang up, also without Redis and any list."""

    before = [len(instance.said()) for instance in shared.signaling]

    def said(i):
        return shared.signaling[i].said()[before[i] :]

    async def story(visit):
        (one, first), (other, second) = await visit.call(0), await visit.call(0)
        for caller in (one, other):
            await visit.until_answered(caller)
        talking = asyncio.create_task(visit.talk(3))
        await asyncio.sleep(0.5)
        if redis == "away":
            shared.redis.kill()
        shared.signaling[0].kill()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(shared.signaling[0].start)
        await talking
        heard = [len(caller.arrivals) // 2 for caller in (one, other)]
        for caller in (one, other):
            await visit.until_answered(caller)
        assert one.lost == other.lost == 0
        assert [code for line in visit.lines for code in line.errors] == []
        print(f"Redis {redis}: heard {heard} packets meanwhile, none lost")
        assert await visit.hang_up(first, 0) == await visit.hang_up(second, 1) == 200
        assert sum(await visit.sessions()) == 0
        assert await visit.hang_up(first, 1) == await visit.hang_up(second, 0) == 404
        if redis == "away":
            # The other instance goes on by what it knew; this one knows nobody.
            assert (await visit.state(0), await visit.state(1)) == (0, 2)
            _, call_id = await visit.call(1)
            assert await visit.hang_up(call_id, 0) == 200
            await asyncio.to_thread(shared.redis.start)
            await redises.until_true(lambda: all("redis is back" in said(i) for i in (0, 1)))

    async def safely(visit):
        try:
            await story(visit)
        finally:  # whatever went wrong, the next test has a Redis
            if not shared.redis.servers[0].process:
                await asyncio.to_thread(shared.redis.start)

    visited(shared, safely)
    for line in ("redis is unreachable", "redis is back"):
        assert said(1).count(line) == (redis == "away")


def test_redis_that_was_emptied_is_filled_again(shared):
    async def story(visit):
        before = shared.signaling[0].said()
        for _ in range(5):
            shared.redis.flush()
            for instance in (0, 1):
                _, call_id = await visit.call(instance)
                assert await visit.hang_up(call_id) == 200
        await visit.until_serving(2)
        await asyncio.to_thread(
            redises.until,
            lambda: shared.redis.do("ZCARD", presence.NAMES) == 2,
            "both announce themselves again",
        )
        assert "redis" not in shared.signaling[0].said()[len(before) :]

    visited(shared, story)


# --- a transceiver is killed, and another drains --------------------------------------------------


def test_a_transceiver_that_dies_is_gone_within_two_seconds(shared):
    async def story(visit):
        times = []
        # By Redis' own clock, and whatever a busy machine takes for it.
        assert presence.LEASE_S + presence.READ_S < 2
        for number in (0, 1):
            shared.transceivers[number].kill()
            name = presence.PREFIX + shared.names[number].encode()
            assert shared.redis.do("PTTL", name) <= 1e3 * presence.LEASE_S
            times += await visit.until_serving(1)
            # Whoever calls now does not notice.
            for instance in (0, 1, 0, 1):
                _, call_id = await visit.call(instance)
                assert await visit.hang_up(call_id, 1 - instance) == 200
            await asyncio.to_thread(shared.transceivers[number].start)
            print(f"back after {max(await visit.until_serving(2)):.3f} s")
        print("gone after", ", ".join(f"{each:.3f} s" for each in times))

    visited(shared, story)


def test_one_that_hangs_is_passed_over_and_comes_back(shared):
    """It is there, and answers nothing: whoever meets it waits, and is then placed elsewhere."""

    async def story(visit):
        shared.transceivers[0].send(signal.SIGSTOP)
        try:
            took = []
            while await visit.state(0) != 1 or await visit.state(1) != 1:
                began = time.monotonic()
                for instance in (0, 1):
                    _, call_id = await visit.call(instance)
                    assert await visit.hang_up(call_id) == 200
                took.append(time.monotonic() - began)
            for instance in (0, 1) * 5:
                _, call_id = await visit.call(instance)
                assert await visit.hang_up(call_id) == 200
            print(f"two calls took {max(took):.1f} s at the most meanwhile")
        finally:
            shared.transceivers[0].send(signal.SIGCONT)
        print(f"back after {max(await visit.until_serving(2)):.3f} s")
        # Offers that it had in its hands meanwhile were given up: they become no sessions, but for
        # what was given up in just this moment.
        print(f"left over: {await visit.sessions()}")
        deadline = time.monotonic() + PATIENCE_S
        while sum(await visit.sessions()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    visited(shared, story)


def test_a_call_of_one_that_died_has_ended(shared):
    async def story(visit):
        _, call_id = await visit.call(0)
        owner = (await visit.sessions()).index(1)
        shared.transceivers[owner].kill()
        assert await visit.hang_up(call_id) == 404
        await asyncio.to_thread(shared.transceivers[owner].start)
        assert await visit.hang_up(call_id) == 404

    visited(shared, story)


def test_one_that_drains_gets_nothing_and_keeps_what_it_has(shared):
    async def story(visit):
        caller, call_id = await visit.call(0)
        await visit.until_answered(caller)
        owner = (await visit.sessions()).index(1)
        shared.transceivers[owner].send(signal.SIGTERM)
        times = await visit.until_serving(1)
        print("drains after", ", ".join(f"{each:.3f} s" for each in times))
        for instance in (0, 1) * 5:
            kind = {"Content-Type": "application/sdp"}
            url = shared.urls[instance] + CALLS
            assert (await visit.ask("POST", url, data=OFFER, headers=kind))[0] == 201
        assert (await visit.sessions())[owner] == 1
        _, told, _ = await visit.ask("GET", f"http://{shared.names[owner]}/metrics")
        assert "earshot_transceiver_refused_draining_total 0.0" in told, "it was not even asked"
        await visit.until_answered(caller)
        assert caller.lost == 0
        assert await visit.hang_up(call_id) == 200
        assert await asyncio.to_thread(shared.transceivers[owner].process.wait, PATIENCE_S) == 0
        # It has said so as it went, and not left it to its lease.
        key = presence.PREFIX + shared.names[owner].encode()
        assert shared.redis.do("EXISTS", key) == 0
        names = shared.redis.do("ZRANGE", presence.NAMES, "0", "-1")
        assert shared.names[owner].encode() not in names
        await asyncio.to_thread(shared.transceivers[owner].start)

    visited(shared, story)


# --- bursts ---------------------------------------------------------------------------------------


async def burst(visit, count, seconds):
    """So many offers, evenly over that time, to the instances in turn; the statuses."""
    kind = {"Content-Type": "application/sdp"}

    async def one(number):
        await asyncio.sleep(number * seconds / count)
        url = visit.town.urls[number % 2] + CALLS
        status, told, headers = await visit.ask("POST", url, data=OFFER, headers=kind)
        assert status == 201 or (status == 503 and "Retry-After" in headers), told
        return status

    began = time.monotonic()
    found = await asyncio.gather(*(one(number) for number in range(count)))
    print(f"{count} offers in {time.monotonic() - began:.2f} s: {found.count(201)} placed")
    return found


SESSIONS_MAX = 100


def test_a_burst_is_spread_evenly_and_never_over_assigned(tmp_path):
    """200 offers a second through two instances, whose pictures of the transceivers are old."""
    limits = f"sessions_max = {SESSIONS_MAX}\nconnecting_max = 10000\nconnect_deadline_s = 600.0"

    async def story(visit):
        found = await burst(visit, 120, 0.6)
        assert found.count(201) == 120
        spread = await visit.sessions()
        print(f"of 120: {spread}")
        assert sum(spread) == 120
        # Reports are up to BEAT_S + READ_S old, longer than this burst: each instance knows its own
        # half of it and little of the other's. One of two that is asked always would have it all.
        assert max(spread) <= 2 * min(spread)
        found = await burst(visit, 200, 1.0)
        assert found.count(201) == 2 * SESSIONS_MAX - 120, "each that there is room for"
        assert await visit.sessions() == [SESSIONS_MAX] * 2

    with contextlib.ExitStack() as stack:
        visited(Town(tmp_path, stack, limits), story_that_ends_full(story))


def story_that_ends_full(story):
    """The same, and then without the wait for transceivers that serve: they are full."""

    async def run(visit):
        await story(visit)
        visit.empty = lambda: asyncio.sleep(0)

    return run


CONNECTING_MAX = 12


def test_what_connects_at_once_is_bounded_too(tmp_path):
    limits = f"sessions_max = 1000\nconnecting_max = {CONNECTING_MAX}\nconnect_deadline_s = 600.0"
    seen = []

    async def story(visit):
        async def watch():
            while True:
                for url in visit.town.control:
                    seen.append((await visit.ask("GET", url + "/health"))[1]["connecting"])
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        try:
            found = await burst(visit, 200, 1.0)
        finally:
            watching.cancel()
        print(f"connecting at once: {max(seen)} at the most of {len(seen)}")
        assert max(seen) == CONNECTING_MAX
        assert found.count(201) >= 2 * CONNECTING_MAX
        assert found.count(201) == sum(await visit.sessions())

    with contextlib.ExitStack() as stack:
        visited(Town(tmp_path, stack, limits), story_that_ends_full(story))


def test_the_descriptors_of_killed_programs_do_not_matter(shared):
    """After all of the above: a call through each instance, and nothing was a fault."""

    async def story(visit):
        for instance in (0, 1):
            caller, call_id = await visit.call(instance)
            await visit.until_answered(caller)
            assert await visit.hang_up(call_id, 1 - instance) == 200

    visited(shared, story)
    for program in (*shared.transceivers, *shared.signaling, shared.relay):
        assert os.path.exists(f"/proc/{program.process.pid}")
        said = program.said()
        assert "Traceback" not in said, said
