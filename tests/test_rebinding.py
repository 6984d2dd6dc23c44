"""A NAT gives a client another port in mid-sentence, and its ICE agent has not noticed yet.

The relay as a program, real sockets, a transceiver that the test plays. Media from the new address
must reach the session's transceiver at once, and nobody may gain anything by imitating it.
"""

import contextlib
import os
import select
import signal
import time

import pytest

import flows
import frame
import handover
import host
import ledger
import metrics
import roaming
import settings

from . import test_relay
from .test_relay import IN, OUT, PATIENCE_S, bound, header, quiet

KINDS = metrics.Keeper


class Relay(test_relay.Relay):
    """The same, with callers that have an SSRC.

    And with patience: what the keeper of a slow machine says too late would be a packet lost.
    """

    def __init__(self, folder, stack, more="", recovery="", wait_s=10.0, **kwargs):
        more += f"[recovery]\nwait_s = {wait_s}\n{recovery}"
        super().__init__(folder, stack, more=more, **kwargs)
        self.callers = 0

    def attach(self):
        super().attach()
        table = settings.load(self.config, settings.Relay).relay
        *_, own = host.attach(handover.state_file(table), handover.LAYOUT, handover.MEMORY)
        self.keeper = ledger.Counters(metrics.Keeper, own.section("keeper"))

    def call(self):
        self.callers += 1
        return Caller(self, 0xCA110000 + self.callers, self.callers)

    def flows(self):
        """All flows, with the number of their worker."""
        return {
            flow.header: (flow, number)
            for number, memory in enumerate(self.memories)
            for flow in flows.read_all(memory.section("flows"))
        }

    def of(self, sock):
        """The flow of a socket, and its worker."""
        return self.flows()[header(sock)]

    def children(self):
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return {int(word) for word in file.read().split()}

    def keeper_pid(self):
        workers = {self.worker(number) for number in range(len(self.memories))}
        (found,) = self.children() - workers
        return found

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def settled(self, **drops):
        """Wait until nothing waits any more and just this has been dropped."""
        self.until(lambda: self.counters()[0].drops() == drops)
        inbound, _ = self.counters()
        assert not inbound[IN.WAITING] and not inbound.missing()

    def hears(self, payload):
        """The transceiver hears this next; returns from whom, and where the answer goes."""
        framed, back = self.transceiver.recvfrom(4096)
        assert framed[frame.HEADER_OCTETS :] == payload
        return framed[: frame.HEADER_OCTETS], back


class Caller:
    """A client with a call that is under way."""

    def __init__(self, relay, ssrc, nonce):
        self.relay, self.ssrc, self.nonce, self.number = relay, ssrc, nonce, 0
        self.sock = relay.client()
        self.back = relay.open(self.sock, nonce=nonce)
        relay.transceiver.sendto(header(self.sock) + b"\x16 hello", self.back)
        assert self.sock.recv(100) == b"\x16 hello"
        self.passes()

    def rtp(self, ssrc=None):
        self.number += 1
        head = b"\x80\x6f" + self.number.to_bytes(6, "big") + (ssrc or self.ssrc).to_bytes(4, "big")
        return head + b"voice"

    def rtcp(self):
        return b"\x80\xc8\0\6" + self.ssrc.to_bytes(4, "big") + b"report"

    def passes(self):
        """Its media goes through."""
        payload = self.rtp()
        self.sock.send(payload)
        assert self.relay.hears(payload)[0] == header(self.sock)

    def rebound(self, at=None):
        """Its NAT's next port, or another network's."""
        if at is None:
            return self.relay.client()
        sock = self.relay.stack.enter_context(bound(at))
        sock.connect((self.relay.at, self.relay.public))
        return sock

    def moves(self, sock, payload=None):
        """Media from another address arrives, and an answer to it; returns how soon, in seconds."""
        payload = payload or self.rtp()
        began = time.monotonic()
        sock.send(payload)
        of, back = self.relay.hears(payload)
        took_s = time.monotonic() - began
        assert of == header(sock) and quiet(sock)
        self.relay.transceiver.sendto(of + b"\x80 answer", back)
        assert sock.recv(100) == b"\x80 answer"
        self.sock, self.back = sock, back
        return took_s


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: Relay(tmp_path, stack, **kwargs)


@pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
def test_media_goes_on_from_another_port(start, at):
    """Without a check and without Redis; again and again; and the old address is not forgotten."""
    if at == "::1":
        try:
            bound("::1").close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
    relay = start(at=at)
    call = relay.call() if at != "::1" else six(relay)
    other = relay.call() if at != "::1" else None
    old, took = call.sock, []
    for _ in range(10):
        took.append(call.moves(call.rebound()))
        assert relay.of(call.sock)[0].state is flows.State.ASSURED
        assert relay.of(call.sock)[0].ssrc == call.ssrc
        call.passes()
        if other:
            other.passes()
    print(f"ms to the transceiver: {[round(each * 1000, 1) for each in took]}")
    assert relay.of(old)[0].ufrag == relay.of(call.sock)[0].ufrag
    inbound, outbound = relay.stop()
    assert inbound[IN.RECOVERED] == 10 and inbound.drops() == outbound.drops() == {}
    assert relay.keeper[KINDS.LOOKUPS_SSRC] == 10


def six(relay):
    """A caller over IPv6: its transceiver is elsewhere."""
    mint = relay.mint
    relay.mint = lambda **hint: mint(**{"address": "::1", **hint})
    return relay.call()


def test_wherever_the_kernel_puts_the_new_address(start):
    relay = start(workers=2)
    call, seen = relay.call(), set()
    for _ in range(40):
        _, before = relay.of(call.sock)
        call.moves(call.rebound())
        seen.add((before, relay.of(call.sock)[1]))
        if len(seen) == 4:
            break
        if len(relay.flows()) > 12:  # its addresses have a limit
            call = relay.call()
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}
    inbound, _ = relay.stop()
    assert not inbound.drops()


def test_reports_are_enough(start):
    relay = start()
    call = relay.call()
    call.moves(call.rebound(), call.rtcp())
    call.passes()
    inbound, _ = relay.stop()
    assert inbound[IN.RECOVERED] == 1 and not inbound.drops()


def test_what_came_before_the_media_waits_for_it_no_longer_than_needed(start):
    """The data channel speaks first from the new address: nobody can tell whose that is."""
    relay = start()
    call = relay.call()
    sock = call.rebound()
    sock.send(b"\x17 data")
    relay.settled(unknown_client=1)
    call.moves(sock)
    sock.send(b"\x17 data again")
    assert relay.hears(b"\x17 data again")[0] == header(sock)
    relay.stop()


def test_a_burst_from_the_new_address_keeps_its_order(start):
    relay = start()
    call = relay.call()
    sock = call.rebound()
    payloads = [call.rtp() for _ in range(200)]
    for payload in payloads[:8]:
        sock.send(payload)
    for payload in payloads[:8]:
        relay.hears(payload)
    for payload in payloads[8:]:
        sock.send(payload)
    for payload in payloads[8:]:
        relay.hears(payload)
    inbound, _ = relay.stop()
    assert not inbound.drops()


def test_another_network(start):
    """Another IP address, too: Wi-Fi to mobile."""
    relay = start()
    call = relay.call()
    print(f"{call.moves(call.rebound('127.0.0.77')) * 1000:.1f} ms")
    assert relay.of(call.sock)[0].origin is flows.Origin.FAR
    call.moves(call.rebound())
    assert relay.of(call.sock)[0].origin is flows.Origin.NEAR
    relay.stop()


def test_media_of_nobody_is_dropped_and_counted(start):
    relay = start()
    call = relay.call()
    sock = call.rebound()
    sock.send(call.rtp(ssrc=0xBAD))
    relay.settled(unknown_client=1)
    sock.send(call.rtp(ssrc=0xBAD))
    relay.settled(unknown_client=2)
    assert quiet(relay.transceiver) and quiet(sock)
    assert list(relay.flows()) == [header(call.sock)]
    call.passes()
    inbound, _ = relay.stop()
    assert inbound.drops() == {"unknown_client": 2}
    assert relay.keeper[KINDS.LOOKUPS] == 1


# --- deaths and successions -----------------------------------------------------------------------


def test_while_the_keeper_is_killed(start):
    relay = start(wait_s=0.5)  # what it was asked and took with it is asked again after that
    calls = [relay.call() for _ in range(3)]
    for call in calls:
        pid = relay.keeper_pid()
        os.kill(pid, signal.SIGKILL)
        began, sock = time.monotonic(), call.rebound()
        sent = []
        while not select.select([relay.transceiver], [], [], 0.02)[0]:
            assert time.monotonic() - began < PATIENCE_S
            sent.append(call.rtp())
            sock.send(sent[-1])
        print(f"{(time.monotonic() - began) * 1000:.0f} ms after a keeper was killed")
        framed = relay.transceiver.recv(4096)
        assert framed[:32] == header(sock) and framed[32:] in sent
        relay.until(lambda: not relay.counters()[0][IN.WAITING])
        while select.select([relay.transceiver], [], [], 0.1)[0]:
            relay.transceiver.recv(4096)
        call.moves(sock)
        relay.until(lambda pid=pid: relay.children() - {relay.worker(), pid})
    inbound, _ = relay.stop()
    assert not inbound.missing()


def test_after_a_worker_was_killed(start):
    """What a flow's SSRC is outlives the process that noted it."""
    relay = start()
    calls = [relay.call() for _ in range(3)]
    for turn, call in enumerate(calls):
        os.kill(relay.worker(), signal.SIGKILL)
        sock = call.rebound()
        payload = call.rtp()
        sock.send(payload)  # waits in the socket, then for the keeper
        of, back = relay.hears(payload)
        assert of == header(sock)
        relay.transceiver.sendto(of + b"\x80 answer", back)
        assert sock.recv(100) == b"\x80 answer"
        relay.line("worker 0 serves again")
        for each in calls[: turn + 1]:
            each.passes()
    inbound, _ = relay.stop()
    assert not inbound.drops() and inbound[IN.RECOVERED] == 3


def test_after_a_handover(start):
    relay = start(workers=2)
    call, first = relay.call(), relay.process
    relay.begin("handover")
    relay.line(" ready:")
    assert first.wait(PATIENCE_S) == 0
    relay.attach()
    call.moves(call.rebound())
    call.passes()
    relay.stop()


def test_while_it_drains(start):
    """A call that exists is served to its end, wherever its client goes meanwhile."""
    relay = start()
    call = relay.call()
    relay.process.send_signal(signal.SIGTERM)
    relay.line("draining on SIGTERM")
    call.moves(call.rebound())
    relay.stop()


# --- nobody gains by it ---------------------------------------------------------------------------


def test_who_has_seen_the_media_is_sent_nothing(start):
    """He knows the SSRC, even whole packets. They go where they belong, and nowhere else."""
    relay = start()
    call = relay.call()
    thieves = [call.rebound(f"127.0.1.{number}") for number in range(1, 11)]
    recorded = call.rtp()
    call.sock.send(recorded)
    assert relay.hears(recorded)[0] == header(call.sock)
    for thief in thieves:
        thief.send(recorded)
        assert relay.hears(recorded)[0] == header(thief)
    # The transceiver believes none of it and goes on with whom it knows.
    for number in range(50):
        relay.transceiver.sendto(header(call.sock) + b"\x80 %d" % number, call.back)
        assert call.sock.recv(100) == b"\x80 %d" % number
        call.passes()
    assert all(map(quiet, thieves))
    found = relay.flows()
    assert found[header(call.sock)][0].state is flows.State.ASSURED
    assert len(found) == 1 + roaming.FOLLOWERS_MAX
    _, outbound = relay.stop()
    assert outbound[OUT.FORWARDED] == outbound[OUT.RECEIVED] and not outbound.drops()


@pytest.mark.parametrize("checks", [False, True])
def test_thieves_do_not_keep_out_whom_they_imitate(start, checks):
    """They send the SSRC from ever more addresses while its NAT changes the port."""
    relay = start()
    call = relay.call()
    thieves = [call.rebound(f"127.0.1.{number}") for number in range(1, 41)]

    def rob(some):
        for thief in some:
            payload = call.rtp()
            thief.send(payload)
            assert relay.hears(payload)[0] == header(thief)

    rob(thieves)
    sock = call.rebound()
    payload = call.rtp()
    sock.send(payload)
    assert relay.hears(payload)[0] == header(sock)
    # It has been neither answered nor evicted: from elsewhere nobody pushes it out.
    rob(thieves)
    assert header(sock) in relay.flows()
    if checks:
        check = relay.check(relay.mint(nonce=call.nonce))
        sock.send(check)
        assert relay.hears(check)[0] == header(sock)
        assert relay.of(sock)[0].origin is flows.Origin.CHECKED
    rob(thieves)
    call.moves(sock)
    followers = [flow for flow, _ in relay.flows().values() if flow.follows]
    assert len(followers) <= roaming.FOLLOWERS_MAX
    assert all(map(quiet, thieves))
    inbound, _ = relay.stop()
    assert not inbound.drops()


def test_thieves_at_its_own_address_delay_it_by_a_packet_at_most(start):
    """Behind the same NAT, or forging its address: each pushes out the one before, and it is back
    with its next packet."""
    relay = start(recovery="unknown_s = 5.0\n")
    call = relay.call()
    thieves, sock = [call.rebound() for _ in range(30)], call.rebound()
    for thief in thieves:
        for each in (thief, sock):
            payload = call.rtp()
            each.send(payload)
            assert relay.hears(payload)[0] == header(each)
    assert len(relay.flows()) == 1 + roaming.FOLLOWERS_MAX
    call.moves(sock)
    inbound, _ = relay.stop()
    assert not inbound.drops()


def test_replayed_checks_that_fill_its_addresses_do_not_keep_it_out(start):
    relay = start(more="addresses_per_ufrag_max = 3\n")
    call = relay.call()
    check = relay.check(relay.mint(nonce=call.nonce))
    thieves = [call.rebound() for _ in range(4)]
    for thief in thieves:
        thief.send(check)
    relay.settled(addresses_limit=2)
    for _ in range(2):
        assert relay.transceiver.recv(4096)[32:] == check
    call.moves(call.rebound())
    relay.stop()


def test_a_session_of_his_own_with_the_same_ssrc_gives_him_nothing(start):
    """From another IP address it is not clear whose media it is: it waits for its own check."""
    relay = start()
    call = relay.call()
    thief = Caller(relay, call.ssrc, 99)
    sock = call.rebound("127.0.0.99")
    sock.send(call.rtp())
    relay.settled(unknown_client=1)
    check = relay.check(relay.mint(nonce=call.nonce))
    sock.send(check)
    assert relay.hears(check)[0] == header(sock)
    relay.transceiver.sendto(header(sock) + b"\x80 answer", call.back)
    assert sock.recv(100) == b"\x80 answer"
    thief.passes()
    assert quiet(thief.sock)
    relay.stop()


def test_a_follower_that_nobody_answers_ends(start):
    relay = start(more="tentative_idle_s = 3.0\n")
    call = relay.call()
    sock, payload = call.rebound(), call.rtp()
    sock.send(payload)
    relay.hears(payload)
    relay.until(lambda: call.passes() or header(sock) not in relay.flows())
    assert header(call.sock) in relay.flows()
    relay.stop()
