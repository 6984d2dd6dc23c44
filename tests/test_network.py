"""Several hosts: a relay is lost, a client moves, the network chooses another way, and what fits.

The hosts are network namespaces (nets.py), the relays and Redis are the programs, and where not
said otherwise the clients and their transceiver are sockets of this process.
"""

import asyncio
import errno
import json
import os
import select
import statistics
import sys
import time

import aiohttp
import pytest
from aiortc.mediastreams import AudioStreamTrack

pytest.importorskip("pyroute2", reason="needs pyroute2")

import flows
import metrics

from . import nets, redises, shim
from .alone import child, joined
from .crowd import Crowd
from .test_peer import RsaCertificate

PATIENCE_S = nets.PATIENCE_S

IN, OUT = metrics.Inbound, metrics.Outbound

CALLS = 20

LATE_S = 10.0
"""Later than that nobody's machine is: the figures are for reading."""

pytestmark = [
    pytest.mark.skipif(bool(nets.REASON), reason=nets.REASON),
    pytest.mark.skipif(redises.binary() is None, reason="no redis-server"),
]


def known(redis, fabric, callers):
    """True once Redis has all of these."""

    def there():
        with fabric.hosts["redis"].inside():
            return redis.exists(*(caller.key for caller in callers)) == len(callers)

    return there


def states(relay):
    return {flow.header: flow.state for flow in flows.read_all(relay.memories[0].section("flows"))}


def in_ms(times):
    """Median and 99th percentile, as one reads them."""
    ordered = sorted(1000 * each for each in times)
    at = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"p50 {statistics.median(ordered):.1f} ms, p99 {at:.1f} ms, {len(ordered)} calls"


@pytest.mark.parametrize(
    ("public", "internal", "seconds"), [(4, 4, 30), (6, 6, 1), (6, 4, 1)], ids=["4", "6", "6-4"]
)
def test_a_relay_is_lost(tmp_path, public, internal, seconds):
    """The other one has never seen these clients, and they do not check again."""

    def work(fabric):
        redis = fabric.redis(internal)
        a, b = fabric.relays(public=public, internal=internal)
        crowd = Crowd(fabric, CALLS, public, internal).begin()
        callers = crowd.callers
        crowd.go_on(known(redis, fabric, callers), seconds=0.5)
        assert all(caller.up and caller.down for caller in callers)
        checks = [caller.checks for caller in callers]
        fabric.lose(a)
        switched = time.monotonic()
        fabric.lead("b")
        crowd.turn_to(b.at)
        crowd.go_on(lambda: all(caller.by(b.at) for caller in callers))
        recovered = [caller.by(b.at)[0] for caller in callers]
        began = [(each, up[0]) for each, up in zip(callers, recovered, strict=True)]
        crowd.go_on(lambda: all(each.down[-1][0] >= first for each, first in began))
        answered = [
            next(at for count, at in each.down if count >= first and at > switched)
            for each, first in began
        ]
        up_s = [at - switched for _, at, _ in recovered]
        down_s = [at - switched for at in answered]
        print(f"\nIPv{public} to IPv{internal}: first datagram up, {in_ms(up_s)}")
        print(f"IPv{public} to IPv{internal}: first datagram down, {in_ms(down_s)}")
        assert max(*up_s, *down_s) < LATE_S
        spoken = [(each, first + 45 * seconds) for each, first in began]
        crowd.go_on(lambda: all(each.sent > enough for each, enough in spoken), seconds)
        crowd.hang_up()
        crowd.go_on(lambda: all(each.up[-1][0] == each.sent - 1 for each in callers))
        crowd.go_on(lambda: all(each.down[-1][0] == each.sent - 1 for each in callers))
        # From the first one on nothing is missing: as many as there are numbers, none twice.
        for each, first in began:
            assert [count for count, *_ in each.by(b.at)] == [*range(first, each.sent)]
            down = [count for count, _ in each.down if count >= first]
            assert down == [*range(down[0], each.sent)]
            assert each.sent - first > 45 * seconds
        assert [caller.checks for caller in callers] == checks, "a client sent STUN"
        assert states(b) == {each.header: flows.State.ASSURED for each in callers}
        a.law()
        inbound, outbound = b.stop()
        assert inbound[IN.RECOVERED] >= CALLS and inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)


def test_the_network_changes_its_mind(tmp_path):
    """To the other relay and back, while both are alive: nothing is lost, either way."""

    def work(fabric):
        redis = fabric.redis()
        a, b = fabric.relays()
        crowd = Crowd(fabric, CALLS).begin()
        crowd.go_on(known(redis, fabric, crowd.callers), seconds=0.5)
        recovered = []
        for name in ("b", "a") * 3:
            fabric.lead(name)
            if not recovered:
                crowd.turn_to(b.at)
                crowd.go_on(lambda: all(caller.by(b.at) for caller in crowd.callers))
            crowd.go_on(seconds=0.2)
            recovered.append(b.counters()[0][IN.RECOVERED])
        crowd.settle()
        assert recovered[0] >= CALLS and len(set(recovered)) == 1, "each was asked about once"
        ways = [relay.stop() for relay in (a, b)]
        assert all(way.drops() == {} for of_relay in ways for way in of_relay)
        sent = sum(caller.sent for caller in crowd.callers)
        inbound, outbound = zip(*ways, strict=True)
        assert sum(way[IN.RECEIVED] for way in inbound) == sent + CALLS  # and a check each
        assert sum(way[OUT.FORWARDED] for way in outbound) == sent + CALLS
        assert inbound[0][IN.RECOVERED] == 0 < inbound[1][IN.FORWARDED]

    nets.inside(tmp_path, work)


def test_a_client_moves(tmp_path):
    """Only its check is believed at the new address, and soon nothing is left at the old one."""

    def work(fabric):
        redis = fabric.redis()
        # Shorter than by default, and longer than a slow machine may stand still.
        short = {"relay": "flow_idle_s = 4.0\ntentative_idle_s = 4.0", "more": "ttl_s = 6.0"}
        a = nets.Relay(fabric, "a", **short).ready()
        crowd = Crowd(fabric, 3).begin()
        mover = crowd.callers[0]
        crowd.go_on(known(redis, fabric, crowd.callers))
        crowd.settle()
        fabric.hosts["client"].address("up", "10.77.1.3")
        old_key = mover.key
        old_sock, old_header = mover.move("10.77.1.3")
        assert mover.sock.getsockname()[1] != old_sock.getsockname()[1]
        crowd.resume(crowd.callers[1:])
        mover.send(b"\x80 media from nowhere")
        crowd.go_on(lambda: a.counters()[0].drops() == {"unknown_client": 1})
        mover.check()
        crowd.go_on(lambda: mover.hellos == 2)
        crowd.resume(crowd.callers)
        crowd.go_on(known(redis, fabric, crowd.callers))

        def forgotten():
            with fabric.hosts["redis"].inside():
                return old_header not in states(a) and not redis.exists(old_key)

        crowd.go_on(forgotten)
        assert states(a) == {each.header: flows.State.ASSURED for each in crowd.callers}
        # Whoever has the old address and port now gets nothing, and gets nowhere.
        crowd.transceiver.sendto(old_header + b"\x80 late", mover.back)
        old_sock.sendto(b"\x80 late", crowd.public)
        crowd.go_on(lambda: a.counters()[1].drops() == {"unknown_client": 1})
        crowd.go_on(lambda: a.counters()[0].drops() == {"unknown_client": 2})
        crowd.settle()
        a.stop()
        assert not crowd.strange

    nets.inside(tmp_path, work)


HEADERS = {4: 28, 6: 48}
"""Octets of IP and UDP."""

FRAME = 32


def flight(sizes, number):
    """DTLS by its first octet."""
    return [b"\x16%04d" % number + bytes(size - 5) for size in sizes]


def heard(crowd, datagrams):
    """Exactly these have come, in this order; they are forgotten."""
    crowd.go_on(lambda: len(crowd.strange) >= len(datagrams))
    came, crowd.strange[:] = [*crowd.strange], []
    assert [len(each) for each in came] == [len(each) for each in datagrams]
    assert came == datagrams


def too_large(send, *datagram):
    """The sender's own host refuses it."""
    with pytest.raises(OSError, match="too long") as refused:
        send(*datagram)
    assert refused.value.errno == errno.EMSGSIZE


@pytest.mark.parametrize(("public", "internal"), [(4, 4), (6, 6), (6, 4), (4, 6)])
def test_what_fits_an_mtu_of_1500(tmp_path, public, internal):
    """All that a client can send, also what the frame's header makes too long for the network of
    the transceivers: that alone goes in two pieces, and nobody drops it."""
    most, room = 1500 - HEADERS[public], 1500 - HEADERS[internal] - FRAME

    def work(fabric):
        tap = nets.Tap(fabric, "a")
        a = nets.Relay(fabric, "a", public=public, internal=internal).ready()
        crowd = Crowd(fabric, 2, public, internal).begin()
        crowd.settle()
        caller, other = crowd.callers
        fits = flight([1200, 1400, room - 1, room], 1)
        long = flight([size for size in (room + 1, most) if size > room], 2)
        for datagram in (*fits, *long, *fits):
            caller.send(datagram)
        heard(crowd, fits + long + fits)
        too_large(caller.send, bytes(most + 1))
        # Towards the client it is the way to the relay that is the narrower one.
        down = flight([1200, room - 1, min(room, most)], 3)
        for datagram in down:
            crowd.transceiver.sendto(caller.header + datagram, caller.back)
        heard(crowd, down)
        too_large(crowd.transceiver.sendto, caller.header + bytes(room + 1), caller.back)
        # In one batch with others', and those after it may not be cut.
        wanted = []
        with a.frozen():
            for number in range(4, 44):
                wanted += flight([1200], number)
                (other if number % 2 else caller).send(wanted[-1])
                if number % 8 == 0:
                    wanted.append(long[0])
                    caller.send(long[0])
        heard(crowd, wanted)
        cut = len(long) + 5
        assert fabric.fragments() == 4 * cut, "two pieces each, made and put together"
        seen = tap.udp()
        assert sum(not whole for *_, whole in seen) == 2 * cut, "others could have been cut"
        assert max(len(payload) for *_, payload, whole in seen if whole) == max(most, room + FRAME)
        inbound, outbound = a.stop()
        assert inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)


TOO_BIG = {4: "IpFragFails", 6: "Ip6InTooBigErrors"}
"""What a router counts that it neither forwards nor cuts."""


@pytest.mark.parametrize("family", [4, 6])
def test_what_fits_an_mtu_of_1280(tmp_path, family):
    """IPv6's least, on the way to the relay and then on the way to the client.

    Over IPv6 what WebRTC calls full-size, 1,200 octets, fits to the octet. What a router on the way
    refuses is nobody's to count but that router's; and no word of its makes the relay send less.
    """
    room = 1280 - HEADERS[family] - FRAME
    assert room >= 1200

    def work(fabric):
        fabric.narrow("a", 1280)
        a = nets.Relay(fabric, "a", public=family, internal=family).ready()
        crowd = Crowd(fabric, 1, family, family).begin()
        crowd.settle()
        (caller,) = crowd.callers
        lost = fabric.router.counted()[TOO_BIG[family]]

        def router_lost(more):
            crowd.go_on(lambda: fabric.router.counted()[TOO_BIG[family]] == lost + more)

        fits, long = flight([1200, room], 1), flight([room + 1, room + FRAME], 2)
        for datagram in (*fits, *long, *flight([room + FRAME + 1], 3), *fits):
            caller.send(datagram)
        heard(crowd, fits + long + fits)
        router_lost(1)
        for datagram in (*fits, *flight([room + 1], 4), *fits):
            crowd.transceiver.sendto(caller.header + datagram, caller.back)
        heard(crowd, fits + fits)
        router_lost(2)

        fabric.narrow("a", 1500)
        fabric.narrow("client", 1280)
        fits = flight([1200, room + FRAME], 5)
        largest = flight([room + FRAME + 1, 1500 - HEADERS[family] - FRAME], 6)
        for datagram in (*fits, *largest, *fits):
            crowd.transceiver.sendto(caller.header + datagram, caller.back)
        heard(crowd, fits + fits)
        router_lost(4)
        fabric.narrow("client", 1500)
        for datagram in largest:
            crowd.transceiver.sendto(caller.header + datagram, caller.back)
        heard(crowd, largest)
        assert fabric.fragments() == 4 * len(long)
        inbound, outbound = a.stop()
        assert inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)


@pytest.mark.parametrize("family", [4, 6])
def test_moved_on_purpose(tmp_path, family):
    """A relay drains: its address goes from its host, the route follows, nothing is lost."""

    def work(fabric):
        redis, address = fabric.redis(family), nets.PUBLIC[family]
        virtual = f'[vip]\naddresses = ["{address}"]\ninterface = "lo"'
        a, b = fabric.relays(public=family, internal=family, more=virtual)

        def announced():
            return [name for name in "ab" if address in fabric.hosts[name].addresses("lo")]

        crowd = Crowd(fabric, CALLS, family, family)
        crowd.go_on(lambda: announced() == ["a", "b"])
        crowd.begin()
        crowd.go_on(known(redis, fabric, crowd.callers), seconds=0.5)
        a.drain()
        crowd.go_on(lambda: announced() == ["b"])
        before = a.counters()[0][IN.FORWARDED]
        crowd.go_on(lambda: a.counters()[0][IN.FORWARDED] >= before + CALLS)
        fabric.lead("b")
        crowd.turn_to(b.at)
        crowd.go_on(lambda: all(caller.by(b.at) for caller in crowd.callers), seconds=0.5)
        crowd.settle()
        a.stop()
        inbound, outbound = b.stop()
        assert inbound[IN.RECOVERED] >= CALLS
        assert inbound.drops() == outbound.drops() == {}
        # Both have gone, and so has what they had set up.
        assert announced() == []

    nets.inside(tmp_path, work, virtual=True)


TRANSCEIVER = """
[transceiver]
listen = "{at}"
relay_prefixes = ["10.77.2.0/24", "10.77.3.0/24", "fd77:2::/64", "fd77:3::/64"]
control_prefixes = ["10.77.1.0/24", "fd77:1::/64"]
[keys]
file = "keys"
[[cluster]]
id = 1
prefix = "{prefix}"
ports = [{port}, {port}]
"""


async def call(control, relay, certificate, told, tell):
    """A stock client: calls, says so, and when it is told to go on says something that fills
    several datagrams, which is said back to it."""
    client = shim.Client(certificate)
    async with aiohttp.ClientSession() as http:
        offer = {"offer": await client.offer(AudioStreamTrack()), "candidates": [relay]}
        async with http.post(f"http://{control}/v1/sessions", json=offer) as response:
            assert response.status == 201, await response.text()
            await client.accept((await response.json())["answer"])
    await shim.until(lambda: client.messages)
    os.write(tell, b"+")
    go_on = asyncio.Event()
    asyncio.get_running_loop().add_reader(told, go_on.set)
    async with asyncio.timeout(PATIENCE_S):
        await go_on.wait()
    asyncio.get_running_loop().remove_reader(told)
    known = len(client.messages)
    session = {"type": "realtime", "instructions": "Answer in one word. " * 200}
    client.channel.send(json.dumps({"type": "session.update", "session": session}))
    await shim.until(lambda: len(client.messages) > known)
    answer = json.loads(client.messages[-1])
    assert answer["type"] == "session.updated"
    assert answer["session"]["instructions"] == session["instructions"]
    os.write(tell, b"+")
    await client.close()


def until_seen(tap, wanted):
    """What the tap has seen up to and with the first datagram that is `wanted`."""
    seen, deadline = [], time.monotonic() + PATIENCE_S
    while not any(wanted(*each) for each in seen):
        assert time.monotonic() < deadline, len(seen)
        tap.wait(0.1)
        seen += tap.udp()
    return seen


class Call:
    """A stock client on the client's host, and the transceiver that it calls by relay `a`."""

    def __init__(self, fabric, family, certificate=None):
        self.fabric, self.public, at = fabric, nets.PUBLIC[family], nets.numbers("transceiver")
        at = nets.bracketed(at[family], nets.TRANSCEIVER_PORT)
        config = fabric.folder / "transceiver.toml"
        config.write_text(
            TRANSCEIVER.format(at=at, prefix=nets.PREFIXES[family], port=nets.TRANSCEIVER_PORT)
        )
        fabric.keys(fabric.folder)
        words = sys.executable, "-P", "-m", "transceiver", "run", "--config", config
        started = nets.Program(fabric.stack, fabric.hosts["transceiver"], *words)
        started.line("transceiver ready")
        self.near_a, self.near_b = nets.Tap(fabric, "a"), nets.Tap(fabric, "b")
        told, self._tell = os.pipe()
        self._says, say = os.pipe()
        relay = self.public, nets.PORT

        def calls():
            os.close(self._tell)
            asyncio.run(call(at, relay, certificate, told, say))

        with fabric.hosts["client"].inside():
            self._client = child(calls)
        os.close(say)
        os.close(told)
        self.heard()
        self.set_up = self.near_a.udp()

    def heard(self):
        """Wait until the client has said that it is so far."""
        assert select.select([self._says], [], [], 2 * PATIENCE_S)[0], "nothing is said"
        if not os.read(self._says, 1):
            joined(*self._client)

    def go_on(self):
        os.write(self._tell, b"!")

    def end(self):
        joined(*self._client)
        os.close(self._tell)
        os.close(self._says)

    def up(self, _, target, payload, __):
        """True for a client's check."""
        return target == self.public and payload[0] < 4

    def down(self, source, *_):
        return source == self.public

    def largest(self):
        """The largest datagram of DTLS, and the largest frame of it, in octets."""
        assert all(whole for *_, whole in self.set_up), "some could have been cut on their way"
        dtls = [len(each) for *_, each, _ in self.set_up if 20 <= each[0] < 64]
        framed = [
            len(each) for *_, each, _ in self.set_up if each[0] == 0xC5 and 20 <= each[32] < 64
        ]
        print(f"\nDTLS of up to {max(dtls)} octets, {max(framed)} with the header: {sorted(dtls)}")
        return max(dtls), max(framed)


def test_a_call_with_large_flights_goes_on(tmp_path):
    """A stock client and the transceiver: set up in whole datagrams through one relay, and then
    carried by another one before the client's next check."""
    certificate = RsaCertificate.make()

    def work(fabric):
        redis = fabric.redis()
        a, b = fabric.relays()
        on = Call(fabric, 4, certificate)
        dtls, framed = on.largest()
        assert dtls > 1200 and framed == dtls + FRAME

        def stored():
            with fabric.hosts["redis"].inside():
                return redis.dbsize() > 2  # beside the relays' marks

        redises.until(stored, "the flow does not reach Redis")
        until_seen(on.near_a, on.up)  # a check of consent, so that the next one is seconds away
        fabric.lose(a)
        switched = time.monotonic()
        fabric.lead("b")
        on.go_on()
        seen = until_seen(on.near_b, on.down)
        down_s = time.monotonic() - switched
        assert not any(on.up(*each) for each in seen), "it has checked again"
        on.heard()
        answered_s = time.monotonic() - switched
        print(f"first datagram down {down_s * 1000:.0f} ms, answer {answered_s * 1000:.0f} ms")
        on.end()
        assert fabric.fragments() == 0
        inbound, outbound = a.law()
        assert inbound.drops() == outbound.drops() == {}
        inbound, outbound = b.stop()
        assert inbound[IN.RECOVERED] > 0 and inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)


def test_a_call_over_ipv6_at_its_least_mtu(tmp_path):
    """A client behind a tunnel: messages of several full-size datagrams both ways, none cut."""

    def work(fabric):
        fabric.narrow("client", 1280)
        a = nets.Relay(fabric, "a", public=6, internal=6).ready()
        on = Call(fabric, 6)
        on.largest()
        on.go_on()
        on.heard()
        on.end()
        assert fabric.fragments() == 0
        seen = on.near_a.udp()
        largest = max(len(each) for source, _, each, _ in seen if source == on.public)
        print(f"messages in datagrams of up to {largest} octets")
        assert 1200 < largest <= 1280 - HEADERS[6]
        assert fabric.router.counted()[TOO_BIG[6]] == 0
        inbound, outbound = a.stop()
        assert inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)


def test_a_call_whose_flight_has_to_be_cut(tmp_path):
    """It fits the client's network and, with the frame's header, not that of the transceiver."""
    certificate = RsaCertificate.make()

    def work(fabric):
        a = nets.Relay(fabric, "a", public=6, internal=6).ready()
        on = Call(fabric, 6, certificate)
        on.go_on()
        on.heard()
        on.end()
        assert fabric.fragments() > 0
        inbound, outbound = a.stop()
        assert inbound.drops() == outbound.drops() == {}

    nets.inside(tmp_path, work)
