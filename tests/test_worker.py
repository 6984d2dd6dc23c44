"""What only the worker knows: whom it serves first, what it asks the keeper, what an answer does.

A worker in this process, over its real sockets; the test plays the keeper, the transceiver and all
clients. `serving` lets the worker's own loop run in a thread; where the moment matters the test
takes its steps one by one.
"""

import contextlib
import itertools
import select
import socket
import threading
import time

import msgspec
import pytest

import flows
import frame
import handover
import ledger
import metrics
import recovery
import ufrag
import worker

from . import test_takeover, workbench

IN, OUT = metrics.Inbound, metrics.Outbound
BATCH = 16
SSRC = 0xDECAFBAD
MEDIA = b"\x80\x6f\0\1\0\0\0\2" + SSRC.to_bytes(4, "big")
REPORT = b"\x80\xc8\0\1" + SSRC.to_bytes(4, "big")
REDIS = """
[redis]
url = "redis://127.0.0.1:1"
waiting_max = 12
wait_s = {wait_s}
lookups_per_s = {lookups}
"""


class Bench(workbench.Bench):
    """The same, with the keeper's end of the socket, and an account of what was counted."""

    def __init__(self, folder):
        super().__init__(folder)
        _, self.keeper = self.shared.asks[0]
        self._nonces = itertools.count(1000)
        self.before = self._counters()
        self.others = []

    def close(self):
        super().close()
        for sock in (*self.shared.asks[0], *self.others):
            sock.close()

    def _counters(self):
        return dict(zip(IN, self.worker.inbound_ledger.values, strict=False))

    def counted(self):
        """What has changed inbound since this began; no datagram is missing."""
        assert self.worker.inbound_ledger.missing() == self.worker.outbound_ledger.missing() == 0
        now = self._counters()
        found = {kind: now[kind] - self.before[kind] for kind in IN}
        return {kind: by for kind, by in found.items() if by and kind is not IN.OCTETS}

    def stranger(self):
        """A client that the worker does not know, with its header."""
        sock = workbench.bound()
        self.others.append(sock)
        sock.connect(self.client.getpeername())
        return sock, frame.header(*sock.getsockname())

    def mint(self, keyring=None, cluster=1):
        home, address, port = self.home
        home = ufrag.Cluster(cluster, home.prefix, home.first_port, home.last_port)
        return ufrag.mint(keyring or self.keyring, home, address, port, next(self._nonces)).encode()

    def asked(self):
        """The headers of the next question."""
        assert select.select([self.keeper], [], [], workbench.PATIENCE_S)[0], "it asked nothing"
        message = self.keeper.recv(recovery.ASK_MAX * recovery.ASK.size + 1)
        self.ssrcs = [ssrc for _, ssrc in recovery.ASK.iter_unpack(message)]
        return [header for header, _ in recovery.ASK.iter_unpack(message)]

    def answer(self, header, status, text=b"", ssrc=0):
        self.keeper.send(recovery.ANSWER.pack(header, status, ssrc, text))

    def until(self, **expected):
        """Wait until just this has been counted."""
        wanted = {IN[name]: by for name, by in expected.items() if by}
        deadline = time.monotonic() + workbench.PATIENCE_S
        found = {}
        while found != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.001)
            with contextlib.suppress(AssertionError):  # a batch is in hand
                found = self.counted()

    def passes(self, sock, header, payload=b"\x80 passes"):
        """This client's media goes through."""
        sock.send(payload)
        assert self.transceiver.recv(2048) == header + payload

    def quiet(self):
        """Nobody was sent anything, and nobody was asked about."""
        socks = [self.transceiver, self.client, self.keeper, *self.others]
        return not select.select(socks, [], [], 0)[0]


@pytest.fixture
def build(tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:

        def build(redis=True, wait_s=20.0, lookups=100):
            more = REDIS.format(wait_s=min(wait_s, 10.0), lookups=lookups) if redis else ""
            batch = workbench.CONFIG.replace("workers = 1", f"workers = 1\nbatch_size = {BATCH}")
            monkeypatch.setattr(workbench, "CONFIG", batch + more)
            return stack.enter_context(contextlib.closing(Bench(tmp_path)))

        yield build


@contextlib.contextmanager
def serving(bench):
    """The worker's loop, until the end of the block."""
    link, theirs = socket.socketpair()
    failed = []

    def serve():
        try:
            bench.worker.serve(theirs)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        link.send(b".")
        thread.join(workbench.PATIENCE_S)
        assert not thread.is_alive()
        for sock in (link, theirs):
            sock.close()
    assert not failed, failed


# --- what the keeper answers ----------------------------------------------------------------------


def test_media_of_a_client_that_redis_knows_goes_on(build):
    bench = build()
    sock, header = bench.stranger()
    payloads = [b"\x80 one", b"", b"\x16" * 1500]
    with serving(bench):
        for payload in payloads:
            sock.send(payload)
        bench.until(RECEIVED=3, WAITING=3)
        assert bench.asked() == [header]
        assert bench.quiet()  # asked once, and nothing is sent on a suspicion
        bench.passes(bench.client, bench.header)
        octets = bench.worker.inbound_ledger[IN.OCTETS]
        bench.answer(header, recovery.FOUND, bench.mint())
        for payload in payloads:
            assert bench.transceiver.recv(2048) == header + payload
        bench.until(RECEIVED=4, FORWARDED=1, RECOVERED=3)
        assert bench.worker.inbound_ledger[IN.OCTETS] == octets + sum(map(len, payloads))
        bench.passes(sock, header)
        bench.until(RECEIVED=5, FORWARDED=2, RECOVERED=3)
        # And back: it is a flow like any other.
        bench.transceiver.sendto(header + b"\x80 reply", bench.back)
        assert sock.recv(2048) == b"\x80 reply"
    assert bench.quiet()


def test_a_client_that_nobody_knows_is_asked_about_once(build):
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        for _ in range(3):
            sock.send(b"\x80 garbage")
        bench.until(RECEIVED=3, WAITING=3)
        assert bench.asked() == [header]
        bench.answer(header, recovery.UNKNOWN)
        bench.until(RECEIVED=3, DROPPED_UNKNOWN_CLIENT=3)
        sock.send(b"\x80 more")
        bench.until(RECEIVED=4, DROPPED_UNKNOWN_CLIENT=4)
    assert bench.quiet()


@pytest.mark.parametrize("status", [recovery.UNAVAILABLE, 9, 255])
def test_without_redis_it_is_dropped_and_asked_about_again(build, status):
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x80 one")
        assert bench.asked() == [header]
        bench.answer(header, status)
        bench.until(RECEIVED=1, DROPPED_LOOKUP_FAILED=1)
        sock.send(b"\x80 two")
        assert bench.asked() == [header]
        bench.answer(header, recovery.FOUND, bench.mint())
        assert bench.transceiver.recv(2048) == header + b"\x80 two"
        bench.until(RECEIVED=2, DROPPED_LOOKUP_FAILED=1, RECOVERED=1)


def test_an_answer_that_is_late_opens_the_flow_for_what_comes_next(build):
    bench = build(wait_s=0.1)
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x80 early")
        assert bench.asked() == [header]
        bench.until(RECEIVED=1, DROPPED_LOOKUP_FAILED=1)
        bench.answer(header, recovery.FOUND, bench.mint())
        bench.passes(bench.client, bench.header)
        while header not in bench.worker.flows.hops:
            time.sleep(0.001)
        bench.passes(sock, header)
        bench.until(RECEIVED=3, DROPPED_LOOKUP_FAILED=1, FORWARDED=2)
    assert bench.quiet()


FOREIGN = ufrag.Keyring.parse("0 " + "77" * 32)
UNKNOWN_KEY = ufrag.Keyring.parse("5 " + "42" * 32)
WRONG = {
    "garbage": lambda bench: b"\xff" * 24,
    "nothing": lambda bench: b"",
    "too long": lambda bench: bench.mint() + b"A",
    "too short": lambda bench: bench.mint()[:-1],
    "of another secret": lambda bench: bench.mint(FOREIGN),
    "of a retired key": lambda bench: bench.mint(UNKNOWN_KEY),
    "of another cluster": lambda bench: bench.mint(cluster=2),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_ufrag_that_redis_has_is_judged_like_any_other(build, wrong):
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        for _ in range(2):
            sock.send(b"\x80 media")
        bench.until(RECEIVED=2, WAITING=2)
        bench.asked()
        bench.answer(header, recovery.FOUND, WRONG[wrong](bench))
        bench.until(RECEIVED=2, DROPPED_RECOVERED_INVALID=2)
        bench.passes(bench.client, bench.header)
    assert header not in bench.worker.flows.hops and bench.quiet()


def test_a_flow_that_the_client_opens_itself_comes_first(build):
    """Its check passed while the keeper was asked: what Redis says does not matter any more."""
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x80 early")
        assert bench.asked() == [header]
        bench.until(RECEIVED=1, WAITING=1)
        check = bench.check(2)
        sock.send(check)
        assert bench.transceiver.recv(2048) == header + check
        bench.answer(header, recovery.UNKNOWN)
        assert bench.transceiver.recv(2048) == header + b"\x80 early"
        bench.until(RECEIVED=2, FORWARDED=1, RECOVERED=1)
        bench.passes(sock, header)


def test_answers_about_clients_that_nobody_asked_about_send_nothing(build):
    bench = build()
    (known, header), (found, found_at) = bench.stranger(), bench.stranger()
    with serving(bench):
        for status in (recovery.UNAVAILABLE, recovery.UNKNOWN):
            bench.answer(header, status)
            bench.answer(bench.header, status)  # who has a flow
        bench.answer(bench.header, recovery.FOUND, bench.mint())
        bench.answer(found_at, recovery.FOUND, bench.mint())
        bench.answer(b"x" * 32, recovery.FOUND, b"garbage")
        bench.passes(bench.client, bench.header)
        while found_at not in bench.worker.flows.hops:
            time.sleep(0.001)
        bench.until(RECEIVED=1, FORWARDED=1)
        # What was said is remembered like an answer, and no more than that.
        bench.passes(found, found_at)
        known.send(b"\x80 media")
        bench.until(RECEIVED=3, FORWARDED=2, DROPPED_UNKNOWN_CLIENT=1)
    assert len(bench.worker.flows) == 2 and bench.quiet()


@pytest.mark.parametrize("octets", [0, 1, 63, 65, 4096, 5000])
def test_what_is_no_answer_harms_nobody(build, octets):
    bench, message = build(), b"x" * octets
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x80 media")
        assert bench.asked() == [header]
        bench.keeper.send(message)
        bench.answer(header, recovery.FOUND, bench.mint())
        assert bench.transceiver.recv(2048) == header + b"\x80 media"
        bench.until(RECEIVED=1, RECOVERED=1)
        bench.passes(bench.client, bench.header)


def test_a_transceiver_that_cannot_be_reached_is_a_failed_send(build):
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x16" * 1500)
        bench.asked()
        home, _, port = bench.home  # the prefix's broadcast address, where the kernel lets nobody
        at = home.prefix.broadcast_address
        text = ufrag.mint(bench.keyring, home, at, port, 1).encode()
        bench.answer(header, recovery.FOUND, text)
        bench.until(RECEIVED=1, DROPPED_SEND_FAILED=1)
        bench.passes(bench.client, bench.header)


# --- the SSRC, and who is found by it -------------------------------------------------------------


def flow_of(bench, header):
    memory = bench.shared.memories[0].section("flows")
    return {flow.header: flow for flow in flows.read_all(memory)}[header]


def test_the_first_media_says_its_ssrc_and_nothing_else_does(build):
    bench = build()
    assert set(bench.worker.flows.listening) == {bench.header}
    with serving(bench):
        for payload in (b"\x16" * 40, b"\x80", b"", REPORT + b"report", b"\x00\x11" + b"\0" * 18):
            bench.passes(bench.client, bench.header, payload)
            assert flow_of(bench, bench.header).ssrc == 0
        bench.passes(bench.client, bench.header, MEDIA)
        assert flow_of(bench, bench.header).ssrc == SSRC
        bench.passes(bench.client, bench.header, MEDIA[:-1] + b"x")
        assert flow_of(bench, bench.header).ssrc == SSRC
        # Its check lets it be noted again, but not at once.
        check = bench.check(1)
        bench.passes(bench.client, bench.header, check)
        assert bench.header not in bench.worker.flows.listening
        bench.worker.flows.listening.add(bench.header)
        bench.passes(bench.client, bench.header, MEDIA[:-1] + b"x")
        assert flow_of(bench, bench.header).ssrc == SSRC & 0xFFFFFF00 | ord("x")


def test_of_a_whole_batch_only_those_are_looked_at_who_are_waited_for(build):
    bench = build()
    sock, header = bench.stranger()
    sock.send(bench.check(2))
    sock.send(MEDIA)  # its flow is tentative
    for _ in range(5):
        bench.client.send(b"\x16")
    bench.client.send(MEDIA)
    bench.run(bench.worker.inbound, bench.shared.public[0])
    assert flow_of(bench, bench.header).ssrc == SSRC and flow_of(bench, header).ssrc == 0
    assert not bench.worker.flows.listening


@pytest.mark.parametrize("redis", [True, False])
@pytest.mark.parametrize("near", [True, False])
def test_media_of_a_client_whose_port_has_changed_goes_on(build, redis, near):
    bench = build(redis=redis)
    sock, header = bench.stranger()
    status = recovery.FOLLOWS_NEAR if near else recovery.FOLLOWS_FAR
    with serving(bench):
        sock.send(MEDIA + b"one")
        assert bench.asked() == [header] and bench.ssrcs == [SSRC]
        sock.send(MEDIA + b"two")
        bench.until(RECEIVED=2, WAITING=2)
        assert bench.quiet()
        bench.answer(header, status, bench.mint(), SSRC)
        for payload in (b"one", b"two"):
            assert bench.transceiver.recv(2048) == header + MEDIA + payload
        bench.until(RECEIVED=2, RECOVERED=2)
        assert flow_of(bench, header).ssrc == SSRC
        assert flow_of(bench, header).origin is (flows.Origin.NEAR if near else flows.Origin.FAR)
        bench.passes(sock, header)
        assert bench.quiet()
        bench.transceiver.sendto(header + b"\x80 reply", bench.back)
        assert sock.recv(2048) == b"\x80 reply"
    assert header not in bench.worker.flows.listening


@pytest.mark.parametrize("wrong", WRONG)
def test_a_ufrag_that_an_ssrc_leads_to_is_judged_like_any_other(build, wrong):
    bench = build(redis=False)
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(MEDIA)
        bench.asked()
        bench.answer(header, recovery.FOLLOWS_NEAR, WRONG[wrong](bench), SSRC)
        bench.until(RECEIVED=1, DROPPED_RECOVERED_INVALID=1)
    assert header not in bench.worker.flows.hops and bench.quiet()


def test_an_answer_to_less_than_was_asked_is_none_unless_it_is_found(build):
    bench = build()
    sock, header = bench.stranger()
    with serving(bench):
        sock.send(b"\x16 data")
        assert bench.asked() == [header] and bench.ssrcs == [0]
        sock.send(MEDIA)
        assert bench.asked() == [header] and bench.ssrcs == [SSRC]
        for status in (recovery.UNKNOWN, recovery.UNAVAILABLE):
            bench.answer(header, status, ssrc=0)
        bench.passes(bench.client, bench.header)
        bench.until(RECEIVED=3, WAITING=2, FORWARDED=1)
        bench.answer(header, recovery.FOLLOWS_NEAR, bench.mint(), SSRC)
        assert bench.transceiver.recv(2048) == header + b"\x16 data"
        assert bench.transceiver.recv(2048) == header + MEDIA
        bench.until(RECEIVED=3, RECOVERED=2, FORWARDED=1)


def test_without_redis_only_media_is_asked_about(build):
    bench = build(redis=False)
    sock, _ = bench.stranger()
    with serving(bench):
        for payload in (b"\x16" * 40, b"\x80", b"", MEDIA[:-1], b"\xff" * 40):
            sock.send(payload)
        bench.until(RECEIVED=5, DROPPED_UNKNOWN_CLIENT=5)
        assert bench.quiet()


# --- a keeper that does not listen ----------------------------------------------------------------


def test_a_keeper_that_reads_nothing_holds_up_nobody(build):
    bench = build(wait_s=5.0, lookups=1000)
    ours, _ = bench.shared.asks[0]
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"y" * recovery.ASK.size)
            filled += 1
    (sock, header), (later, later_at) = bench.stranger(), bench.stranger()
    with serving(bench):
        sock.send(b"\x80 unasked")
        bench.until(RECEIVED=1, WAITING=1)
        bench.passes(bench.client, bench.header)
        bench.until(RECEIVED=2, FORWARDED=1, DROPPED_LOOKUP_FAILED=1)
        for _ in range(filled):
            assert bench.asked() == [b"y" * 32]
        assert bench.quiet()  # the question that found no room is not asked late
        later.send(b"\x80 asked")
        assert bench.asked() == [later_at]
        sock.send(b"\x80 again")
        assert bench.asked() == [header]


def test_what_may_be_asked_and_held_has_limits(build):
    bench = build(lookups=2)
    clients = [bench.stranger() for _ in range(3)]
    for sock, _ in clients:
        sock.send(b"\x80 one")  # in one batch, and so in one second, whose budget it is
    with serving(bench):
        bench.until(RECEIVED=3, WAITING=2, DROPPED_LOOKUP_LIMIT=1)
        for sock, _ in clients[:2]:
            for _ in range(9):
                sock.send(b"\x80 more")
        # Eight of one client, twelve in all.
        bench.until(RECEIVED=21, WAITING=12, DROPPED_LOOKUP_LIMIT=9)
        headers = [header for _, header in clients[:2]]
        asked = bench.asked()
        assert asked + (bench.asked() if len(asked) < 2 else []) == headers
        for header in headers:
            bench.answer(header, recovery.UNAVAILABLE)
        bench.until(RECEIVED=21, DROPPED_LOOKUP_FAILED=12, DROPPED_LOOKUP_LIMIT=9)
    assert bench.quiet()


# --- succession -----------------------------------------------------------------------------------


def test_a_successor_asks_again_about_what_waits(build):
    bench = build()
    sock, header = bench.stranger()
    sock.send(b"\x80 early")
    assert not bench.run(bench.worker.inbound, bench.shared.public[0])
    assert bench.asked() == [header]
    bench.worker = bench.successor()
    assert bench.worker.take_over() == 0
    assert bench.counted() == {IN.RECEIVED: 1, IN.WAITING: 1}
    with serving(bench):
        assert bench.asked() == [header]
        for _ in range(2):  # the answer to the one that died, and its own
            bench.answer(header, recovery.FOUND, bench.mint())
        assert bench.transceiver.recv(2048) == header + b"\x80 early"
        bench.until(RECEIVED=1, RECOVERED=1)
        bench.passes(sock, header)
    assert bench.quiet()


def test_where_redis_has_gone_from_the_settings_only_media_waits(build):
    bench = build()
    sock, header = bench.stranger()
    sock.send(b"\x80 early")
    assert not bench.run(bench.worker.inbound, bench.shared.public[0])
    bench.asked()
    bench.found = msgspec.structs.replace(bench.found, redis=None)
    bench.worker = bench.successor()
    bench.worker.take_over()
    with serving(bench):
        assert bench.asked() == [header]  # what waits already is asked about once more
        bench.answer(header, recovery.UNKNOWN)
        bench.until(RECEIVED=1, DROPPED_UNKNOWN_CLIENT=1)
        sock.send(b"\x16 media")
        bench.until(RECEIVED=2, DROPPED_UNKNOWN_CLIENT=2)
        sock.send(MEDIA)
        assert bench.asked() == [header] and bench.ssrcs == [SSRC]
    assert bench.quiet()


def drained(sock):
    found = []
    while select.select([sock], [], [], 0)[0]:
        found.append(sock.recv(4096))
    return found


STATUSES = (
    recovery.FOUND,
    recovery.UNKNOWN,
    recovery.UNAVAILABLE,
    recovery.FOLLOWS_NEAR,
    recovery.FOLLOWS_FAR,
)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("dying", ["inbound", "_hear"])
def test_at_every_line_of_its_way_what_waits_is_counted_once(build, dying, status):
    """A death while something begins to wait, or while it is let go: the law holds, each datagram
    is in the one counter where it belongs, and what is sent arrives."""
    bench, deaths, again = build(lookups=1000), 0, 0
    ends = {
        recovery.UNKNOWN: IN.DROPPED_UNKNOWN_CLIENT,
        recovery.UNAVAILABLE: IN.DROPPED_LOOKUP_FAILED,
    }.get(status, IN.RECOVERED)
    text = ends is IN.RECOVERED
    payloads = [MEDIA + b" one", MEDIA + b" two"]

    def answer_all():
        for message in drained(bench.keeper):
            for header, ssrc in recovery.ASK.iter_unpack(message):
                bench.answer(header, status, bench.mint() if text else b"", ssrc)

    while True:
        bench.before = bench._counters()
        sock, header = bench.stranger()
        for payload in payloads:
            sock.send(payload)
        bench.client.send(b"\x80 known")
        if dying == "_hear":
            bench.run(bench.worker.inbound, bench.shared.public[0])
            answer_all()
            died = test_takeover.dies_at(
                lambda: bench.worker._hear(time.monotonic()), deaths, "line"
            )
        else:
            died = test_takeover.dies_at(bench.worker.inbound, deaths, "line")
        drained(bench.keeper)  # what the one that died has asked does not count
        now, before = bench._counters(), bench.before
        settled = now[IN.RECOVERED] > before[IN.RECOVERED]
        bench.worker = bench.successor()
        bench.worker.take_over()
        bench.worker.inbound()
        answer_all()
        bench.worker._hear(time.monotonic())
        assert bench.counted() == {IN.RECEIVED: 3, IN.FORWARDED: 1, ends: 2}, deaths
        came = drained(bench.transceiver)
        expected = [header + payload for payload in payloads] if text else []
        assert set(came) == {*expected, bench.header + b"\x80 known"}, deaths
        # Sent, and not yet counted as such, it is sent again: that cannot be known.
        times = [came.count(each) for each in expected]
        assert set(times) <= ({1} if settled else {1, 2}), deaths
        again += 2 in times
        if not died:
            break
        deaths += 1
    assert deaths > (60 if dying == "inbound" else 20)
    assert again == 0 or (dying, text) == ("_hear", True)


# --- whom it serves first -------------------------------------------------------------------------


def test_while_the_socket_never_runs_dry_live_flows_come_first(build, monkeypatch):
    """Two full batches in a row are overload here: from then on few of a batch are judged."""
    monkeypatch.setattr(worker, "ROUNDS_MAX", 2)
    judged_max = BATCH // worker.JUDGED_SHARE
    bench = build(redis=False)
    strangers = [bench.stranger()[0] for _ in range(5)]
    check = bench.check(7)
    sequence = []
    for number in range(400):
        strangers[number % 5].send(b"\x80 garbage" if number % 2 else check[:-1])
        sequence.append(0)
        if number % 7 == 0:
            bench.client.send(b"\x80 %d" % number)
            sequence.append(1)
    for number in range(40):
        bench.transceiver.sendto(bench.header + b"\x80 %d" % number, bench.back)
    starts = range(0, len(sequence), BATCH)
    unknown = [sequence[at : at + BATCH].count(0) for at in starts]
    assert len(sequence) % BATCH  # the last batch is short: then it is dry
    dropped = sum(max(0, each - judged_max) for each in unknown[2:])
    known = sequence.count(1)
    with serving(bench):
        for number in range(0, 400, 7):
            assert bench.transceiver.recv(2048) == bench.header + b"\x80 %d" % number
        for number in range(40):
            assert bench.client.recv(2048) == b"\x80 %d" % number
        deadline = time.monotonic() + workbench.PATIENCE_S
        while sum((counted := bench.counted()).values()) < 2 * len(sequence):
            assert time.monotonic() < deadline, counted
            time.sleep(0.001)
        assert counted[IN.RECEIVED] == len(sequence) and counted[IN.FORWARDED] == known
        assert counted[IN.DROPPED_OVERLOADED] == dropped > 200
        judged = counted[IN.DROPPED_UNKNOWN_CLIENT] + counted[IN.DROPPED_STUN_TRUNCATED]
        assert judged == 400 - dropped
        # It has run dry: everybody is judged again.
        newcomer, header = bench.stranger()
        newcomer.send(check)
        assert bench.transceiver.recv(2048) == header + check
        bench.passes(newcomer, header)
        assert bench.counted()[IN.DROPPED_OVERLOADED] == dropped
    assert bench.quiet()


def test_newcomers_get_through_an_overload_in_the_end(build, monkeypatch):
    """The first few of a batch are judged, whoever they are: nobody is shut out for good."""
    monkeypatch.setattr(worker, "ROUNDS_MAX", 1)
    bench = build(redis=False)
    stranger, _ = bench.stranger()
    newcomer, header = bench.stranger()
    check = bench.check(7)
    for _ in range(5 * BATCH):
        stranger.send(b"\x80 garbage")
    newcomer.send(check)  # the first of its batch
    for _ in range(2 * BATCH):
        stranger.send(b"\x80 garbage")
    with serving(bench):
        assert bench.transceiver.recv(2048) == header + check


# --- drain ----------------------------------------------------------------------------------------


def test_a_relay_that_drains_takes_calls_over_and_no_new_ones(build):
    bench = build()
    drains = ledger.Counters(metrics.Supervisor, bench.shared.relay.section("supervisor")).values
    (sock, _), (moved, moved_at) = bench.stranger(), bench.stranger()
    with serving(bench):
        drains[metrics.Supervisor.DRAINING_UNTIL] = 1
        sock.send(bench.check(5))
        bench.until(RECEIVED=1, DROPPED_DRAINING=1)
        bench.passes(bench.client, bench.header)
        restart = bench.check(6)  # of ICE, by a client that is here
        bench.client.send(restart)
        assert bench.transceiver.recv(2048) == bench.header + restart
        moved.send(b"\x80 media")
        assert bench.asked() == [moved_at]
        bench.answer(moved_at, recovery.FOUND, bench.mint())
        assert bench.transceiver.recv(2048) == moved_at + b"\x80 media"
        bench.until(RECEIVED=4, DROPPED_DRAINING=1, FORWARDED=2, RECOVERED=1)
        drains[metrics.Supervisor.DRAINING_UNTIL] = 0
        again = bench.check(5)
        sock.send(again)
        assert bench.transceiver.recv(2048)[32:] == again


# --- its life -------------------------------------------------------------------------------------


def test_it_ends_when_it_is_told_and_beats_while_it_lives(build):
    bench = build()
    control = bench.shared.memories[0].section("control").cast("Q")
    before = time.monotonic_ns()
    with serving(bench):
        bench.passes(bench.client, bench.header)
        deadline = time.monotonic() + workbench.PATIENCE_S
        while control[handover.Control.BEAT] < before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    beat = control[handover.Control.BEAT]
    bench.client.send(b"\x80 waits")
    assert control[handover.Control.BEAT] == beat
    assert not bench.run(bench.worker.inbound, bench.shared.public[0])
    assert bench.transceiver.recv(2048) == bench.header + b"\x80 waits"
