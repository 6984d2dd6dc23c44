"""Floods against the relay as a program, with a real Redis and a hundred live calls beside.

Of each attack: memory stays flat and flows within their limits, Redis is asked no more than the
budget allows, nobody but the live clients is sent anything at all, every datagram is in exactly one
counter, and the calls lose nothing while there is CPU left. Where there is none, they come first.
"""

import contextlib
import os
import random
import select
import signal
import socket
import time
from collections import Counter

import pytest

import flows
import frame
import metrics
import roaming
import stun
import ufrag

from . import alone, siege

IN, OUT = metrics.Inbound, metrics.Outbound
FLOOD_PER_S, FLOOD_S = 5_000, 2.0
BURST = 15_000
ROOM_S = 2.0 * siege.PATIENCE_S
"""Of a schedule of media: none ends while a slow machine still waits for something."""
LOSS_MAX = 0.001
FIRST_OCTETS_MAX, MORE_OCTETS_MAX = 4 << 20, 512 << 10
"""By how much a worker may grow while an attack reaches its limits, and by how much afterwards:
twice what was seen (most of it what waits, and who was refused), and ten times."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class Scene:
    """A relay, Redis and calls that are under way."""

    def __init__(self, folder, stack):
        self.stack = stack
        self.redis = siege.redis(folder / "redis", stack)
        self.relay = siege.Relay(folder, stack, self.redis)
        self.live = stack.enter_context(siege.Live(self.relay))
        self.hints = self.live.hints(self.relay.keyring)
        self.checks = [self.relay.check(hint) for hint in self.hints]
        self.live.open(self.checks)
        self.chance = random.Random(7)

    def flood(self, datagrams, sources=100_000):
        return siege.Flood(self.stack, self.relay.public, datagrams, sources)

    def octets(self, count):
        return self.chance.randbytes(count)

    def assert_nobody_was_sent_anything(self, flood):
        """Amplification is zero: all that left the relay is what the transceiver sent to calls."""
        assert not flood.heard()
        _, outbound = self.relay.counters()
        lost = self.relay.socket_drops("internal")
        assert outbound[OUT.FORWARDED] == outbound[OUT.RECEIVED] == self.live.echoed - lost
        assert outbound.drops() == {} and outbound.missing() == 0


@pytest.fixture
def scene(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Scene(tmp_path, stack)


def random_ufrags(scene):
    texts = ["".join(scene.chance.choices(ALPHABET, k=23)) for _ in range(1500)]
    # Of those that are well-formed nearly all are under keys that there are not: some that are.
    texts += [
        hint[:3] + text[3:22] + hint[22:]
        for hint, text in zip(scene.hints, texts[:100], strict=True)
    ]
    return [stun.request(scene.octets(12), f"{text}:x", scene.octets(24)) for text in texts]


def wrong_integrity(scene):
    return [
        stun.request(scene.octets(12), f"{hint}:x", scene.octets(24)) for hint in scene.hints * 5
    ]


def no_stun(scene):
    shapes = [b"", b"\x80", b"\x16\xfe\xff", b"\xff" * 200]
    first = [*range(4, 256)]
    return shapes + [
        bytes([scene.chance.choice(first)]) + scene.octets(scene.chance.randrange(200))
        for _ in range(1000)
    ]


def media_of_nobody(scene):
    return [rtp(scene, scene.octets(4)) for _ in range(2000)]


def stolen_ssrcs(scene):
    """The media of calls, seen by somebody. Load's clients number their datagrams where RTP has the
    SSRC: some early one is what the relay remembers of each."""
    return [rtp(scene, ssrc.to_bytes(4, "big")) for ssrc in ssrcs(scene).values()]


def ssrcs(scene):
    """What the relay remembers of each call, by its address, once they are under way."""
    scene.live.begin(siege.RATE, ROOM_S)
    scene.live.run_until(0.2)
    assert scene.live.settle().lost == 0
    found = {frame.client(flow.header)[0]: flow.ssrc for flow in scene.relay.flows()}
    assert len(set(found.values())) == siege.CALLS and 0 not in found.values()
    return found


def rtp(scene, ssrc):
    return b"\x80\x6f" + scene.octets(6) + ssrc + scene.octets(40)


def replays(scene):
    return scene.checks


def one_ufrag(scene):
    return scene.checks[:1]


FORGERIES = {"ufrag_malformed", "ufrag_unknown_key", "ufrag_forged"}
ATTACKS = {
    random_ufrags: FORGERIES,
    wrong_integrity: {"bad_integrity", "integrity_limit"},
    no_stun: {"unknown_client", "lookup_limit"},
    media_of_nobody: {"unknown_client", "lookup_limit"},
    stolen_ssrcs: {"lookup_limit"},
    replays: {"integrity_limit", "tentative_limit"},
    one_ufrag: {"integrity_limit", "addresses_limit"},
}
"""Each attack with the drops that must be seen, and no others."""
ASKING = no_stun, media_of_nobody, stolen_ssrcs
"""Those that make the relay look for somebody's flow."""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_flood_costs_calls_nothing(scene, attack):
    relay, live, flood = scene.relay, scene.live, scene.flood(attack(scene))
    octets, began = [relay.octets()], time.monotonic()
    live.begin(siege.RATE, ROOM_S)
    siege.beside(live, flood, FLOOD_PER_S, FLOOD_S)
    account = live.settle()
    print(account.figures())
    assert account.sent >= siege.RATE * FLOOD_S * 0.9
    assert flood.sent >= FLOOD_PER_S * FLOOD_S * 0.9
    assert account.lost <= LOSS_MAX * account.sent
    assert account.duplicated == account.foreign == 0
    octets.append(relay.octets())
    # As fast as it goes, and some more calls' media behind it.
    flood.send(BURST)
    live.begin(siege.RATE, ROOM_S)
    live.run_until(0.5)
    account = live.settle()
    inbound, _, dropped = relay.taken(live.datagrams + flood.sent)
    elapsed_s = time.monotonic() - began
    octets.append(relay.octets())
    print(f"{inbound}; the kernel dropped {dropped}; resident {octets}")
    assert account.lost <= dropped
    assert_limits(scene, inbound, flood, attack)
    live.finish(inbound[IN.FORWARDED] + inbound[IN.RECOVERED])
    scene.assert_nobody_was_sent_anything(flood)
    assert octets[1] - octets[0] <= FIRST_OCTETS_MAX
    assert octets[2] - octets[1] <= MORE_OCTETS_MAX
    asked, seconds = siege.asked(scene.redis), int(elapsed_s) + 1
    kinds = metrics.Keeper
    assert asked <= relay.keeper[kinds.LOOKUPS] <= siege.LOOKUPS_PER_S * seconds
    if attack in ASKING:
        assert asked > 0 and inbound.drops()["lookup_limit"] > 0
    else:
        assert asked == relay.keeper[kinds.LOOKUPS] == 0
    relay.stop()


def test_clients_whose_port_changes_in_a_flood_are_found(scene):
    """The flood is ten times what may be looked up. They send as before: 50 datagrams a second."""
    relay, live, calls = scene.relay, scene.live, ssrcs(scene)
    flood = scene.flood(media_of_nobody(scene))
    due, took = flood.paced(FLOOD_PER_S), []
    live.begin(siege.RATE, 4 * ROOM_S)
    live.run(0.5, until=due)
    for address, ssrc in list(calls.items())[:12]:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
            sock.connect(("127.0.0.1", relay.public))

            def answered(sock=sock):
                return due() or bool(select.select([sock], [], [], 0)[0])

            sent = 0
            while not sent or not live.run(0.02, until=answered):
                assert sent < 1000, took
                sock.send(rtp(scene, ssrc.to_bytes(4, "big")))
                sent += 1
            took.append(20 * (sent - 1))
            live.run(0.13, until=due)  # at all times of a budget's second
    print(f"found after so many ms: {sorted(took)}; {relay.counters()[0]}")
    assert relay.counters()[0].drops()["lookup_limit"] > flood.sent / 2
    assert not flood.heard()
    relay.stop()


def test_those_who_are_unknown_are_asked_about_once(scene):
    """Garbage from the same few addresses: Redis hears of each of them once in unknown_s."""
    relay, flood = scene.relay, scene.flood(no_stun(scene), sources=siege.load.BATCH)
    due, deadline = flood.paced(FLOOD_PER_S), time.monotonic() + siege.PATIENCE_S
    while flood.sent < FLOOD_PER_S:
        assert time.monotonic() < deadline
        due()
        time.sleep(0.001)
    inbound, _, _ = relay.taken(scene.live.datagrams + flood.sent)
    kinds, addresses = metrics.Keeper, siege.load.BATCH * flood.PORTS
    asked = relay.keeper[kinds.LOOKUPS] - relay.keeper[kinds.LOOKUPS_FAILED]
    # Twice, if an answer was so late on a busy machine that nobody waited for it any more.
    assert addresses <= asked <= 2 * addresses
    assert inbound.drops()["unknown_client"] > 0.9 * flood.sent > 10 * addresses
    scene.assert_nobody_was_sent_anything(flood)
    relay.stop()


@pytest.mark.parametrize("hung", ["keeper", "redis"])
def test_a_flood_while_nobody_answers_the_worker(scene, hung):
    relay, live, flood = scene.relay, scene.live, scene.flood(no_stun(scene))
    pid = relay.keeper_pid() if hung == "keeper" else scene.redis.servers[0].process.pid
    octets = relay.octets()
    live.begin(siege.RATE, ROOM_S)
    with relay.frozen(pid):
        siege.beside(live, flood, FLOOD_PER_S, FLOOD_S)
        after = relay.octets()
    account = live.settle()
    inbound, _, _ = relay.taken(live.datagrams + flood.sent)
    print(f"{inbound}; resident {octets}, {after}; {account.figures()}")
    assert account.lost <= LOSS_MAX * account.sent
    assert after - octets <= FIRST_OCTETS_MAX
    assert {"lookup_failed", "lookup_limit"} <= inbound.drops().keys()
    live.finish(inbound[IN.FORWARDED] + inbound[IN.RECOVERED])
    assert live.strange == 0
    scene.assert_nobody_was_sent_anything(flood)
    relay.stop()


def test_workers_killed_in_a_flood_lose_and_miscount_nothing(scene):
    """Each death finds datagrams in hand, and others that wait for an answer about their client."""
    relay, live, flood = scene.relay, scene.live, scene.flood(no_stun(scene))
    due, kills = flood.paced(FLOOD_PER_S), 4
    live.begin(siege.RATE, (kills + 1) * siege.PATIENCE_S)
    for number in range(kills):
        os.kill(relay.worker(), signal.SIGKILL)

        def again(number=number):
            due()
            return relay.said("worker 0 serves again") > number

        assert live.run(siege.PATIENCE_S, until=again)
        live.run(0.2, until=due)
    account = live.settle()
    inbound, _, dropped = relay.taken(live.datagrams + flood.sent)
    print(f"{inbound}; {account.figures()}")
    assert account.duplicated == account.foreign == 0
    assert account.lost <= dropped + relay.socket_drops("internal")
    assert sum(inbound.drops().values()) + dropped >= flood.sent
    live.finish(inbound[IN.FORWARDED] + inbound[IN.RECOVERED])
    assert live.strange == 0
    scene.assert_nobody_was_sent_anything(flood)
    relay.stop()


def assert_limits(scene, inbound, flood, attack):
    """What came of the attack: the drops that are its own, and flows within their limits."""
    drops, opened = inbound.drops(), scene.live.strange
    # On a machine that stands still for a while, these too.
    assert ATTACKS[attack] <= drops.keys() <= ATTACKS[attack] | {"overloaded", "lookup_failed"}
    found = scene.relay.flows()
    states = Counter(flow.state for flow in found)
    assert states[flows.State.ASSURED] == siege.CALLS
    assert states[flows.State.TENTATIVE] <= siege.TENTATIVE_MAX
    assert max(Counter(flow.ufrag for flow in found).values()) <= siege.ADDRESSES_MAX
    if attack is replays:
        assert states[flows.State.TENTATIVE] == siege.TENTATIVE_MAX
    elif attack is stolen_ssrcs:
        followers = [flow for flow in found if flow.follows]
        assert len(followers) == states[flows.State.TENTATIVE] > 0
        assert len(followers) <= siege.TENTATIVE_MAX // roaming.FOLLOWERS_SHARE
        assert max(Counter(flow.ufrag for flow in followers).values()) <= roaming.FOLLOWERS_MAX
    elif attack is one_ufrag:
        assert states[flows.State.TENTATIVE] == siege.ADDRESSES_MAX - 1
    else:
        assert states[flows.State.TENTATIVE] == opened == 0


# --- beyond what a CPU can do ---------------------------------------------------------------------


def test_of_all_that_the_socket_took_the_calls_datagrams_are_forwarded(scene):
    """The worker stands still while a flood and media fill its socket: no timing decides here."""
    relay, live = scene.relay, scene.live
    flood = scene.flood(no_stun(scene) + random_ufrags(scene))
    live.begin(siege.RATE, ROOM_S)
    with relay.frozen():
        for _ in range(100):
            flood.send(40)
            live.burst(5)
    live.run(0.1)
    account = live.settle()
    inbound, _, dropped = relay.taken(live.datagrams + flood.sent)
    print(f"{inbound}; the kernel dropped {dropped}")
    drops = inbound.drops()
    assert drops["overloaded"] > 0
    assert sum(drops.values()) <= flood.sent
    assert account.lost <= dropped
    if not dropped:  # there was room for all of it
        assert sum(drops.values()) == flood.sent and account.lost == 0
    scene.assert_nobody_was_sent_anything(flood)
    relay.stop()


def test_calls_come_first_in_a_flood_as_fast_as_it_goes(scene):
    relay, live = scene.relay, scene.live
    flood, count = scene.flood(no_stun(scene)), 40_000
    octets = relay.octets()
    live.begin(siege.RATE, ROOM_S)
    with relay.frozen():  # so that the flood begins with a socket that does not run dry
        flood.send(2_000)
    attacker = alone.child(lambda: flood.send(count))
    ended = []

    def over():
        if not ended and os.waitid(os.P_PID, attacker[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            ended.append(True)
        return bool(ended)

    assert live.run(siege.PATIENCE_S, until=over)
    live.run(0.3)
    alone.joined(*attacker)
    account = live.settle()
    inbound, _, dropped = relay.taken(live.datagrams + flood.sent + count)
    print(f"{inbound}; the kernel dropped {dropped}; {account.figures()}")
    drops = inbound.drops()
    assert drops["overloaded"] > 0
    # Nothing that the socket took was a call's and went nowhere: what is lost, the kernel dropped.
    assert account.lost <= dropped
    assert sum(drops.values()) <= flood.sent + count
    live.finish(inbound[IN.FORWARDED])
    assert inbound[IN.FORWARDED] == live.echoed and live.strange == 0
    scene.assert_nobody_was_sent_anything(flood)
    assert relay.octets() - octets <= FIRST_OCTETS_MAX
    # And when it is over, it is over.
    live.begin(siege.RATE, ROOM_S)
    live.run_until(0.5)
    account = live.settle()
    assert account.lost <= LOSS_MAX * account.sent
    newcomer = relay.client()
    check = relay.check(ufrag.mint(relay.keyring, relay.home, *here(relay), 4_000))
    newcomer.send(check)
    deadline = time.monotonic() + siege.PATIENCE_S
    while not live.strange:
        assert time.monotonic() < deadline
        live._echo()
    relay.stop()


def here(relay):
    """Where its transceiver is."""
    return relay.home.address(0x7F000001), relay.port
