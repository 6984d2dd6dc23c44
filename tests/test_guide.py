"""The guide: offers through the real signaling and transceivers of two clusters, with three sites.

What is asked for here is what stands in the answer: whose addresses, in which order, and which
cluster's transceiver made it, by every way in.
"""

import asyncio
import http.client
import http.server
import ipaddress
import json
import random
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import endpoints
import front
import guide
import keys
import ledger
import metrics
import placement
import roster
import settings
import steering
import ufrag

from . import maps, shim
from .premises import OFFER, PATIENCE_S, TRANSCEIVER, Program
from .test_signaling import FakeTransceiver
from .test_transceiver import free_port
from .test_whip import FRAGMENT
from .test_whip import site as whip_site

CALLS, WHIP, PIPECAT = "/v1/realtime/calls", "/whip", "/api/offer"
MASTER = "0 " + bytes(range(32)).hex()
KEY, KEY_LINE = keys.make("alice", bytes(range(32)))
CLUSTERS = """
[keys]
file = "keys"
"""
PLACES = {1: (50.1, 8.7), 2: (35.7, 139.7)}
SIGNALING = """[signaling]
listen = "127.0.0.1:0"
transceivers = [{transceivers}]
metrics = "127.0.0.1:0"
keys_file = "api-keys"
trusted_proxies = ["127.0.0.1/32"]

[steering]
country_header = "CF-IPCountry"
latitude_header = "X-Lat"
longitude_header = "X-Lon"
database = "places.mmdb"
latitude = 50.1
longitude = 8.7
poll_s = 0.1

[limits]
address_per_s = 1e5
failures_per_s = 1e5
key_per_s = 1e5
key_calls_max = 100000
"""
SITES = """
[[site]]
name = "frankfurt"
latitude = 50.1
longitude = 8.7
relays = ["203.0.113.1:3478", "[2001:db8::1]:3478"]
capacity = 1000

[[site]]
name = "singapore"
latitude = 1.3
longitude = 103.8
relays = ["203.0.113.2:3478", "[2001:db8::2]:3478"]
capacity = 1000

[[site]]
name = "tokyo"
latitude = 35.7
longitude = 139.7
relays = ["203.0.113.3:3478", "[2001:db8::3]:3478"]
capacity = 1000
status = ["{status}"]
"""
FRANKFURT = ["2001:db8::1", "203.0.113.1"]
SINGAPORE = ["2001:db8::2", "203.0.113.2"]
TOKYO = ["2001:db8::3", "203.0.113.3"]


def cluster_table(number: int, placed: bool = False) -> str:
    text = f'\n[[cluster]]\nid = {number}\nprefix = "127.0.{number}.0/24"\nports = [1, 65535]\n'
    if placed:
        latitude, longitude = PLACES[number]
        text += f"latitude = {latitude}\nlongitude = {longitude}\n"
    return text


class Monitor:
    """What a relay says of itself."""

    def __init__(self) -> None:
        self.status, self.flows = 200, 0
        monitor = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                row = ledger.Counters(metrics.Keeper)
                row.values[metrics.Keeper.FLOWS_LEFT] = monitor.flows
                ready = self.path == "/readyz"
                body = b"{}" if ready else metrics.exposition("earshot_relay_keeper", [({}, row)])
                self.send_response(monitor.status if ready else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # signaling that stops in mid-question is none
        self.url = f"http://127.0.0.1:{self.server.server_port}"


class World:
    """Two clusters of a transceiver each, and signaling before them."""

    def __init__(self, folder: Path, monitor: Monitor) -> None:
        self.folder, self.monitor = folder, monitor
        for name, secrets in (("keys", MASTER), ("api-keys", KEY_LINE)):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(secrets + "\n")
        maps.write(folder / "places.mmdb")
        self.transceivers: dict[int, Program] = {}
        self.ports = {number: free_port() for number in PLACES}
        for number in PLACES:
            self.open(number)
        listed = ", ".join(f'"127.0.{number}.1:{port}"' for number, port in self.ports.items())
        self.config = folder / "signaling.toml"
        text = SIGNALING.format(transceivers=listed) + CLUSTERS
        text += "".join(cluster_table(number, placed=True) for number in PLACES)
        self.config.write_text(text + SITES.format(status=monitor.url))
        self.signaling = Program("signaling", self.config)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.signaling.said(" is ready"))
        assert found is not None
        self.port = int(found[1])

    def open(self, number: int) -> None:
        """Start a cluster's transceiver."""
        path = self.folder / f"transceiver-{number}.toml"
        text = TRANSCEIVER.format(port=self.ports[number]).replace("127.0.0.1", f"127.0.{number}.1")
        path.write_text(text + "drain_s = 0.0\n" + CLUSTERS + cluster_table(number))
        self.transceivers[number] = Program("transceiver", path)
        self.transceivers[number].said(" ready")

    def stop(self) -> None:
        for program in (self.signaling, *self.transceivers.values()):
            program.stop()

    def ask(
        self,
        method: str,
        path: str,
        body: str | bytes,
        kind: str,
        source: str = "127.0.0.1",
        **headers: str,
    ) -> tuple[dict[str, str], str]:
        """Headers, in small letters, and body of an answer that is a success."""
        ours = {name.replace("_", "-"): value for name, value in headers.items()}
        ours |= {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE_S, source_address=(source, 0)
        )
        try:
            connection.request(method, path, body, ours)
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status in (200, 201), text
            return {name.lower(): value for name, value in response.getheaders()}, text
        finally:
            connection.close()

    def call(self, way: str, source: str = "127.0.0.1", **headers: str) -> "Call":
        """A call, by one of the ways in."""
        if way == PIPECAT:
            sent = json.dumps({"sdp": OFFER, "type": "offer"})
            got, text = self.ask("POST", way, sent, "application/json", source, **headers)
            found = json.loads(text)
            return Call(found["pc_id"], found["sdp"], got)
        got, text = self.ask("POST", way, OFFER, "application/sdp", source, **headers)
        return Call(got["location"].rpartition("/")[2], text, got)


class Call:
    """What an answer says."""

    def __init__(self, call_id: str, answer: str, headers: dict[str, str]) -> None:
        self.call_id, self.answer, self.headers = call_id, answer, headers
        hint = ufrag.from_call_id(call_id)
        homes = {
            number: ufrag.Cluster(
                number, endpoints.Prefix(f"127.0.{number}.0/24").network, 1, 65535
            )
            for number in PLACES
        }
        found = hint and ufrag.parse(ufrag.Keyring.parse(MASTER), homes, hint.encode())
        assert isinstance(found, ufrag.Hint)
        self.cluster = found.cluster
        self.hosts = hosts_of(answer)


def hosts_of(text: str) -> list[str]:
    """Hosts of the candidates by their priorities, which all differ and stand in order."""
    found = re.findall(r"a=candidate:(\d+) 1 udp (\d+) (\S+) 3478 typ host", text)
    listed = found[: len({host for _, _, host in found})]
    assert found == listed * (len(found) // len(listed))  # the same in each m-line
    priorities = [int(priority) for _, priority, _ in listed]
    assert priorities == sorted(set(priorities), reverse=True)
    assert all(0 < priority < 1 << 31 for priority in priorities)
    return [host for _, _, host in listed]


@contextmanager
def opened(folder: Path) -> Iterator[World]:
    monitor = Monitor()
    thread = threading.Thread(target=monitor.server.serve_forever)
    thread.start()
    world = None
    try:
        world = World(folder, monitor)
        yield world
    finally:
        if world is not None:
            world.stop()
        monitor.server.shutdown()
        thread.join()
        monitor.server.server_close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with opened(tmp_path_factory.mktemp("world")) as found:
        yield found
        assert not found.signaling.faults()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


ALL = pytest.mark.parametrize("way", [CALLS, WHIP, PIPECAT])


@ALL
def test_a_client_is_told_of_the_nearest_site_and_the_next(world: World, way: str) -> None:
    found = world.call(way, CF_IPCountry="JP")
    assert found.hosts == [*TOKYO, *SINGAPORE] and found.cluster == 2
    found = world.call(way, CF_IPCountry="FR")
    assert found.hosts[:2] == FRANKFURT and len(found.hosts) == 4 and found.cluster == 1
    found = world.call(way, X_Lat="1.0", X_Lon="104.0", CF_IPCountry="FR")
    assert found.hosts == [*SINGAPORE, *TOKYO] and found.cluster == 2


@ALL
def test_headers_of_anybody_else_are_not_read(world: World, way: str) -> None:
    found = world.call(way, "127.0.0.9", CF_IPCountry="JP", X_Lat="35.7", X_Lon="139.7")
    assert found.hosts[:2] == FRANKFURT and found.cluster == 1
    # Nor where it claims to come from.
    found = world.call(way, "127.0.0.9", X_Forwarded_For="203.0.113.77")
    assert found.hosts[:2] == FRANKFURT and found.cluster == 1


@ALL
def test_its_address_is_looked_up_where_nobody_says_it(world: World, way: str) -> None:
    found = world.call(way, X_Forwarded_For="203.0.113.77")
    # Of each site first the family by which the client came.
    assert found.hosts == [*TOKYO[::-1], *SINGAPORE[::-1]] and found.cluster == 2
    # Entries that the client wrote itself stand left of the proxy's.
    found = world.call(way, X_Forwarded_For="203.0.113.77, 198.51.100.1")
    assert found.hosts[:2] == FRANKFURT[::-1] and found.cluster == 1
    found = world.call(way, X_Forwarded_For="2001:db8:1::9", CF_IPCountry="XX")
    assert found.hosts[:2] == TOKYO


def test_a_restart_of_whip_and_another_offer_of_pipecat_are_steered_as_well(world: World) -> None:
    call = world.call(WHIP, CF_IPCountry="JP")
    fragment = FRAGMENT.format(ufrag="efgh", password="1" * 24)
    kind = "application/trickle-ice-sdpfrag"
    _, text = world.ask(
        "PATCH", f"{WHIP}/{call.call_id}", fragment, kind, If_Match="*", CF_IPCountry="SG"
    )
    assert hosts_of(text) == [*SINGAPORE, *TOKYO]
    call = world.call(PIPECAT, CF_IPCountry="JP")
    offer = re.sub("a=ice-ufrag:.*", "a=ice-ufrag:efgh", OFFER)
    sent = json.dumps({"sdp": offer, "type": "offer", "pc_id": call.call_id})
    _, text = world.ask("POST", PIPECAT, sent, "application/json", CF_IPCountry="SG")
    assert hosts_of(json.loads(text)["sdp"]) == [*SINGAPORE, *TOKYO]


def test_the_journal_names_site_and_cluster(world: World) -> None:
    found = world.call(CALLS, CF_IPCountry="JP")
    request_id = found.headers["x-request-id"]

    def lines() -> list[dict[str, Any]]:
        listed = world.signaling.lines()
        return [line for line in listed if line.get("request_id") == request_id]

    until(lambda: bool(lines()))
    (line,) = lines()
    assert (line["site"], line["cluster"]) == ("tokyo", 2)
    # And the line of the call itself, at its end.
    path = f"{CALLS}/{found.call_id}/hangup"
    world.ask("POST", path, b"", "application/json")
    told = world.transceivers[2].lines
    until(lambda: any(each.get("request_id") == request_id and "reason" in each for each in told()))
    ended = [each for each in told() if each.get("request_id") == request_id and "reason" in each]
    assert [each["site"] for each in ended] == ["tokyo"]


def test_sites_stand_in_the_metrics(world: World) -> None:
    url = world.signaling.said("metrics at http").split()[-1]

    def figures(name: str) -> dict[str, float]:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            text = response.read().decode()
        found = re.findall(rf"^earshot_signaling_site_{name}{{site=\"(\w+)\"}} (\S+)$", text, re.M)
        return {site: float(value) for site, value in found}

    before = figures("told_total")
    for _ in range(3):
        world.call(CALLS, CF_IPCountry="JP")
    after = figures("told_total")
    assert after == before | {"tokyo": before["tokyo"] + 3}
    assert figures("healthy") == dict.fromkeys(("frankfurt", "singapore", "tokyo"), 1)


def test_a_site_that_drains_or_is_full_gets_nobody_new(world: World) -> None:
    monitor = world.monitor
    try:
        monitor.status = 503
        until(lambda: world.call(CALLS, CF_IPCountry="JP").hosts[:2] == SINGAPORE)
        # It is the nearest third there is, and so not named while another is well.
        assert world.call(CALLS, CF_IPCountry="JP").hosts == [*SINGAPORE, *FRANKFURT]
        monitor.status = 200
        until(lambda: world.call(CALLS, CF_IPCountry="JP").hosts[:2] == TOKYO)
        monitor.flows = 1100
        until(lambda: world.call(CALLS, CF_IPCountry="JP").hosts[:2] == SINGAPORE)
    finally:
        monitor.status, monitor.flows = 200, 0
    until(lambda: world.call(CALLS, CF_IPCountry="JP").hosts[:2] == TOKYO)


def test_a_cluster_that_is_gone_hands_its_calls_to_the_next(world: World) -> None:
    world.transceivers[2].stop()
    try:
        found = world.call(CALLS, CF_IPCountry="JP")
        assert found.cluster == 1 and found.hosts == [*TOKYO, *SINGAPORE]
    finally:
        world.open(2)
    until(lambda: world.call(CALLS, CF_IPCountry="JP").cluster == 2)


def test_a_reload_brings_sites_and_database_and_a_broken_one_changes_nothing(world: World) -> None:
    before = world.config.read_text()
    places = (world.folder / "places.mmdb").read_bytes()

    def reloaded() -> None:
        seen = len([line for line in world.signaling.lines() if line["message"] == "reloaded"])
        world.signaling.process.send_signal(signal.SIGHUP)
        until(
            lambda: (
                seen
                < len([line for line in world.signaling.lines() if line["message"] == "reloaded"])
            )
        )

    try:
        (world.folder / "places.mmdb").write_bytes(b"half of it")
        reloaded()
        world.signaling.said("sites and steering: going on with those from before: steering.databa")
        assert world.call(CALLS, X_Forwarded_For="203.0.113.77").hosts[:2] == TOKYO[::-1]
        maps.write(world.folder / "places.mmdb", {"203.0.113.0/24": maps.LONDON})
        reloaded()
        assert world.call(CALLS, X_Forwarded_For="203.0.113.77").hosts[:2] == FRANKFURT[::-1]
        world.config.write_text(before.replace('name = "tokyo"', 'name = "osaka"'))
        reloaded()
        assert world.call(CALLS, CF_IPCountry="JP").hosts[:2] == TOKYO
        assert not [line for line in world.signaling.lines() if "by a restart" in line["message"]]
    finally:
        world.config.write_text(before)
        (world.folder / "places.mmdb").write_bytes(places)
        reloaded()


def test_check_says_what_is_wrong_with_a_database(tmp_path: Path, world: World) -> None:
    for name in ("keys", "api-keys"):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text((world.folder / name).read_text())
    (tmp_path / "places.mmdb").write_bytes(b"nothing")
    path = tmp_path / "signaling.toml"
    path.write_text(world.config.read_text())
    program = Program("signaling", path)
    assert program.process.wait(PATIENCE_S) == 78
    assert "steering.database: " in program.log.read_text()


# --- clusters that refuse, and that are silent ----------------------------------------------------


def two_clusters(
    folder: Path, scenario: Callable[[Any, Any, Any], Awaitable[None]], timeout_s: float = 10.0
) -> None:
    """With a transceiver in each of two clusters, the nearer one first, and what asks them."""

    async def story() -> None:
        async with AsyncExitStack() as stack:
            near, far = [
                await stack.enter_async_context(FakeTransceiver().running()) for _ in range(2)
            ]
            (folder / "keys").touch(mode=0o600)
            (folder / "keys").write_text(MASTER)
            path = folder / "signaling.toml"
            text = '[signaling]\nlisten = "127.0.0.1:0"\nrelays = ["203.0.113.9:1"]\n'
            text += f"transceiver_timeout_s = {timeout_s}\n"
            text += f'transceivers = ["127.0.0.1:{near.port}", "127.0.0.1:{far.port}"]\n'
            text += CLUSTERS
            for number, fake in ((2, near), (1, far)):
                text += f'[[cluster]]\nid = {number}\nprefix = "127.0.0.0/8"\n'
                text += f"ports = [{fake.port}, {fake.port}]\n"
            path.write_text(text)
            config = settings.load(path, settings.Signaling)
            counters = ledger.Counters(metrics.Signaling)
            found = placement.Placement(config, counters, random.Random(1))
            async with found.connected():
                while any(each.health is not roster.Health.SERVING for each in found.peers):
                    await asyncio.sleep(0.01)
                await scenario(found, near, far)

    asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))


def test_the_nearest_cluster_is_asked_first_and_the_next_when_it_refuses(tmp_path: Path) -> None:
    async def scenario(found: placement.Placement, near: Any, far: Any) -> None:
        for _ in range(4):  # not by chance
            assert (await found.place(placement.Order("v=0"), (2, 1))).cluster == 2
        assert (len(near.requests), len(far.requests)) == (4, 0)
        near.refusal = 503, {"error": {"message": "full"}}
        assert (await found.place(placement.Order("v=0"), (2, 1))).cluster == 1
        assert (await found.place(placement.Order("v=0"), (1, 2))).cluster == 1
        far.refusal = near.refusal
        with pytest.raises(placement.Unavailable):
            await found.place(placement.Order("v=0"), (2, 1))

    two_clusters(tmp_path, scenario)


def test_a_cluster_that_is_silent_takes_no_more_than_one_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sixteen transceivers that hang an offer would have ended by its deadline."""
    monkeypatch.setattr(placement, "HEALTH_PERIOD_S", 600.0)

    async def scenario(found: placement.Placement, near: Any, far: Any) -> None:
        near.hangs = True
        homes = found._clusters
        twins = [roster.Peer(found.peers[0].endpoint) for _ in range(5)]
        peers = [*twins, found.peers[1]]
        monkeypatch.setattr(found.roster, "order", lambda *_: list(peers))
        assert roster.home(twins[0], homes) == 2
        assert (await found.place(placement.Order("v=0"), (2, 1))).cluster == 1
        assert (len(near.requests), len(far.requests)) == (1, 1)

    two_clusters(tmp_path, scenario, timeout_s=2.5)


def test_a_cluster_that_is_full_leaves_attempts_for_the_next() -> None:
    """Hundreds in the nearest one; and who is full is asked after those who are not, anywhere."""
    homes = {
        number: ufrag.Cluster(number, ipaddress.ip_network(f"10.{number}.0.0/16"), 1, 65535)
        for number in (1, 2, 3)
    }
    fixed = [endpoints.Endpoint(f"10.1.0.1:{port}") for port in range(1, 301)]
    fixed += [endpoints.Endpoint(f"10.2.0.1:{port}") for port in range(1, 3)]
    fixed += [endpoints.Endpoint(f"10.3.0.1:{port}") for port in range(1, 30)]
    found = roster.Roster(fixed)
    shuffle = random.Random(1).shuffle
    asked = [roster.home(peer, homes) for peer in found.order(shuffle, (1, 2, 3), homes)]
    assert asked == [1] * 8 + [2] * 2 + [3] * 6
    asked = [roster.home(peer, homes) for peer in found.order(shuffle, (3, 2, 1), homes)]
    assert asked == [3] * 8 + [2] * 2 + [1] * 6
    for peer in found.peers[:300]:
        peer.full = True
    asked = [roster.home(peer, homes) for peer in found.order(shuffle, (1, 2, 3), homes)]
    assert asked == [2] * 2 + [3] * 14
    assert len(found.order(shuffle)) == 16


# --- what a client makes of it --------------------------------------------------------------------


def entered_at(client: shim.Client) -> int:
    """The port that a stock client has chosen of those that it was told."""
    ice = client.pc.sctp.transport.transport._connection
    return int(ice._nominated[1].remote_addr[1])


@pytest.mark.parametrize("lost", [False, True], ids=["all is well", "the first is lost"])
def test_a_client_enters_at_the_first_site_or_falls_over_by_itself(
    tmp_path: Path, lost: bool
) -> None:
    """Its ICE finds the second address in the same answer; signaling knows of nothing."""

    async def story() -> None:
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(whip_site(tmp_path))
            near = shim.Shim(found.shim.transceiver)
            stack.callback(near.close)
            if lost:
                near.up = lambda _: None
            config = found.door.config
            sites = tuple(
                front.Site(
                    name=name,
                    latitude=latitude,
                    longitude=0.0,
                    relays=(endpoints.Endpoint("{}:{}".format(*relay.address)),),
                    capacity=10,
                )
                for name, latitude, relay in (("far", 60.0, found.shim), ("near", 1.0, near))
            )
            table = msgspec.structs.replace(config.signaling, relays=())
            home = front.Steering(latitude=0.0, longitude=0.0)
            found.door.guide.reload(
                msgspec.structs.replace(config, signaling=table, site=sites, steering=home)
            )
            client = shim.Client()
            stack.push_async_callback(client.close)
            headers = {"Content-Type": "application/sdp"}
            async with found.http.post(CALLS, data=await client.offer(), headers=headers) as got:
                assert got.status == 201
                answer = await got.text()
            ports = [int(port) for port in re.findall(r"udp \d+ 127\.0\.0\.1 (\d+) typ", answer)]
            assert ports[:2] == [near.address[1], found.shim.address[1]]
            await client.accept(answer)
            await shim.until(lambda: client.channel.readyState == "open")
            assert entered_at(client) == (found.shim if lost else near).address[1]

    asyncio.run(asyncio.wait_for(story(), 3 * PATIENCE_S))


# --- the parts of it that need no program ---------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "lot"),
    [
        ("8.8.8.8", b"8.8.8.8"),
        ("::ffff:8.8.8.8", b"8.8.8.8"),
        ("2a00:1450:4001:80b::200e", b"2a00:1450:4001:80b::"),
        ("10.0.0.1", b""),
        ("127.0.0.1", b""),
        ("fe80::1%eth0", b""),
        ("100.64.0.1", b""),
        ("", b""),
        ("odd", b""),
    ],
)
def test_a_public_address_draws_the_lot(client: str, lot: bytes) -> None:
    assert guide.lot_of(client) == lot


def test_without_sites_relays_are_as_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text(MASTER)
    path = tmp_path / "signaling.toml"
    path.write_text(
        '[signaling]\nlisten = "127.0.0.1:0"\ntransceivers = ["127.0.1.1:1"]\n'
        'relays = ["203.0.113.9:1", "[2001:db8::9]:2", "203.0.113.8:1"]\n'
        + CLUSTERS
        + cluster_table(1)
        + cluster_table(2)
    )
    config = settings.load(path, settings.Signaling)
    found = guide.Guide(config, list, lambda _: "8.8.8.8")
    relays = (("203.0.113.9", 1), ("2001:db8::9", 2), ("203.0.113.8", 1))
    assert found.way(None, "1") == guide.Way(relays)  # type: ignore[arg-type]  # nothing is read
    assert not guide.has_choice(config)
    assert guide.steering_of(config).decide(steering.Request(), {}, {}).clusters

    async def informed() -> None:
        async with found.informed():
            pass

    asyncio.run(informed())
