"""The keeper's answers about clients that changed their address: over real sockets and memory of
workers that the test plays, with the keeper as a process, and with a played Redis in this one."""

import asyncio
import contextlib
import time

import pytest

import frame
import inquiries
import metrics
import recovery

from . import test_keeper
from .test_keeper import HOP, REDIS, header, play, ufrag, until

KINDS = metrics.Keeper
UNKNOWN, FOUND, UNAVAILABLE = recovery.UNKNOWN, recovery.FOUND, recovery.UNAVAILABLE
FAR, NEAR = recovery.FOLLOWS_FAR, recovery.FOLLOWS_NEAR


def moved(number):
    """The same client's header with another port."""
    return frame.header(f"198.51.{number >> 8}.{number & 255}", 6000)


FOREIGN = frame.header("203.0.113.9", 7000)


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: Relay(tmp_path, stack, **kwargs)


class Relay(test_keeper.Relay):
    """The same, with clients that have an SSRC."""

    def open(self, *numbers, worker=0, ssrc=None):
        super().open(*numbers, worker=worker)
        for number in numbers:
            self.tables[worker].heard(header(number), ssrc or 1000 + number, time.monotonic())

    def send(self, *asked, worker=0):
        """Questions: header and SSRC of each."""
        self.shared.asks[worker][0].send(b"".join(recovery.ASK.pack(*each) for each in asked))

    def answers(self, count, worker=0):
        """So many answers: SSRC, status and ufrag of each header."""
        ours, got = self.shared.asks[worker][0], []
        deadline = time.monotonic() + test_keeper.PATIENCE_S
        while len(got) < count:
            assert time.monotonic() < deadline, got
            with contextlib.suppress(BlockingIOError):
                got += recovery.ANSWER.iter_unpack(ours.recv(65536))
            time.sleep(0.001)
        return {of: (ssrc, status, text.rstrip(b"\0")) for of, status, ssrc, text in got}

    def ask(self, *asked, worker=0):
        self.send(*asked, worker=worker)
        return self.answers(len(asked), worker)

    def counted(self):
        kinds = [kind for kind in KINDS if kind.name.startswith("LOOKUPS_")]
        found = {kind.name.removeprefix("LOOKUPS_"): self.counters[kind] for kind in kinds}
        assert self.counters[KINDS.LOOKUPS] == sum(found.values())
        return {name: by for name, by in found.items() if by}


def test_a_client_is_found_by_its_ssrc_in_any_table(make):
    relay = make().start()
    relay.open(1, worker=0)
    relay.open(2, worker=1)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 2)
    for worker in range(2):
        assert relay.ask((moved(1), 1001), (FOREIGN, 1002), worker=worker) == {
            moved(1): (1001, NEAR, ufrag(1)),
            FOREIGN: (1002, FAR, ufrag(2)),
        }
    assert relay.counted() == {"SSRC": 4}


def test_an_address_says_more_than_an_ssrc(make):
    relay = make().start()
    relay.open(1, 2)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 2)
    assert relay.ask((header(2), 1001)) == {header(2): (1001, FOUND, ufrag(2))}


def test_without_an_ssrc_or_with_anothers_nobody_is_found(make):
    relay = make().start()
    relay.open(1)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 1)
    assert relay.ask((moved(1), 0), (FOREIGN, 77)) == {
        moved(1): (0, UNKNOWN, b""),
        FOREIGN: (77, UNKNOWN, b""),
    }
    assert relay.counted() == {"UNKNOWN": 2}


def test_where_it_is_not_clear_whose_it_is_nobody_is_found(make):
    """Somebody else's session sends the SSRC of another: not even he gets its media."""
    relay = make().start()
    relay.open(1, 2, ssrc=5)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 2)
    assert relay.ask((FOREIGN, 5), (moved(1), 5), (moved(2), 5)) == {
        FOREIGN: (5, UNKNOWN, b""),
        moved(1): (5, NEAR, ufrag(1)),
        moved(2): (5, NEAR, ufrag(2)),
    }


def test_a_tentative_flow_is_not_followed(make):
    """What was opened by an SSRC is no reason to open more."""
    relay = make().start()
    relay.tables[0].follow(moved(1), HOP, ufrag(1), 5, True, time.monotonic())
    relay.received()
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 1)
    assert relay.ask((FOREIGN, 5)) == {FOREIGN: (5, UNKNOWN, b"")}


def test_a_flow_younger_than_the_last_look_is_found(make):
    """And one that got its SSRC since: the tables are looked at once more."""
    relay = make().start()
    for number in range(1, 30):
        worker = number % 2
        relay.open(number, worker=worker)
        assert relay.ask((moved(number), 1000 + number), worker=1 - worker) == {
            moved(number): (1000 + number, NEAR, ufrag(number))
        }
        relay.tables[worker].listening.add(header(number))
        relay.tables[worker].heard(header(number), 9000 + number, time.monotonic())
        assert relay.ask((FOREIGN, 9000 + number)) == {FOREIGN: (9000 + number, FAR, ufrag(number))}
        assert relay.ask((FOREIGN, 1000 + number)) == {FOREIGN: (1000 + number, UNKNOWN, b"")}
    assert relay.counted() == {"SSRC": 58, "UNKNOWN": 29}


def test_a_flow_that_has_gone_is_not_followed(make):
    relay = make().start()
    relay.open(1, 2)
    relay.until(lambda: relay.counters[KINDS.FLOWS_LEFT] == 2)
    table, now = relay.tables[0], time.monotonic()
    while header(1) in table.hops:
        now += 1
        table.active.add(header(2))
        table.sweep(now)
    # The look before still has it: what is said is read when it is asked for.
    assert relay.ask((moved(1), 1001), (moved(2), 1002)) == {
        moved(1): (1001, UNKNOWN, b""),
        moved(2): (1002, NEAR, ufrag(2)),
    }


def test_another_keeper_knows_as_much(make):
    relay = make().start()
    relay.open(1)
    relay.end()
    relay.send((moved(1), 1001))
    relay.start()
    assert relay.answers(1) == {moved(1): (1001, NEAR, ufrag(1))}


def test_garbage_of_any_length_is_no_question(make):
    relay = make().start()
    relay.open(1)
    for octets in (1, 39, 41, 79, 2000):
        relay.shared.asks[0][0].send(b"\xff" * octets)
    relay.send((moved(1), 1001))
    found = relay.answers(1 + 1 + 1 + 50)
    assert found[moved(1)] == (1001, NEAR, ufrag(1))


def test_many_ssrcs_of_nobody_make_it_look_and_no_more_than_it_may(make):
    """A flood of questions: each is answered, and one look answers all that came before it."""
    relay = make().start()
    relay.open(1)
    asked, began = 0, time.monotonic()
    for turn in range(40):
        batch = [(frame.header("203.0.113.1", 1 + turn * 64 + n), 50_000 + n) for n in range(64)]
        relay.send(*batch)
        relay.answers(64)
        asked += 64
    print(f"{asked} questions about nobody in {time.monotonic() - began:.2f} s")
    assert relay.counted() == {"UNKNOWN": asked}


# --- with Redis, played ---------------------------------------------------------------------------


async def answered(relay, count, worker=0):
    return await asyncio.to_thread(relay.answers, count, worker)


def test_from_afar_redis_is_asked_first(make):
    """It has the very address: that is worth more than an SSRC, which anybody may send."""
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        relay.open(1, 2)
        redis.known = {frame.key(FOREIGN): ufrag(9)}
        await until(lambda: kept.counters[KINDS.FLOWS_LEFT] == 2)
        relay.send((FOREIGN, 1001), (moved(1), 1001), (moved(7), 1002))
        assert await answered(relay, 3) == {
            FOREIGN: (1001, FOUND, ufrag(9)),
            moved(1): (1001, NEAR, ufrag(1)),
            moved(7): (1002, FAR, ufrag(2)),
        }
        assert redis.asked == [[frame.key(FOREIGN), frame.key(moved(7))]]
        assert relay.counted() == {"SSRC": 2, "FOUND": 1}

    play(relay, story)


@pytest.mark.parametrize("how", ["down", "refuses"])
def test_without_redis_an_ssrc_still_leads_to_its_flow(make, how):
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.up, redis.refuses = how != "down", True
        relay.open(1)
        await until(lambda: kept.counters[KINDS.FLOWS_LEFT] == 1)
        relay.send((FOREIGN, 1001), (moved(7), 77), (moved(8), 0))
        assert await answered(relay, 3) == {
            FOREIGN: (1001, FAR, ufrag(1)),
            moved(7): (77, UNAVAILABLE, b""),
            moved(8): (0, UNAVAILABLE, b""),
        }

    play(relay, story)


def test_a_redis_that_hangs_holds_up_nobody_who_is_near(make):
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.open.clear()
        relay.open(1)
        await until(lambda: kept.counters[KINDS.FLOWS_LEFT] == 1)
        relay.send((FOREIGN, 1001), (moved(1), 1001))
        assert await answered(relay, 1) == {moved(1): (1001, NEAR, ufrag(1))}
        redis.open.set()
        assert await answered(relay, 1) == {FOREIGN: (1001, FAR, ufrag(1))}

    play(relay, story)


def test_what_waits_for_a_look_has_a_limit(make, monkeypatch):
    """Beyond it the answer comes at once."""
    monkeypatch.setattr(inquiries, "ASKED_MAX", 10)
    relay = make(more=REDIS.format(ttl_s=300))

    async def story(kept, redis):
        redis.up = False
        await until(lambda: kept.counters[KINDS.BEAT])
        asked = [(frame.header("203.0.113.1", 1 + n), 50_000 + n) for n in range(50)]
        relay.send(*asked)
        kept._inquiries._hear(0, relay.shared.asks[0][1])
        assert len(kept._inquiries._late) == 10
        assert relay.counters[KINDS.LOOKUPS_FAILED] == 40
        assert len(await answered(relay, 50)) == 50
        assert kept._inquiries._late == []

    play(relay, story)
