"""When a record is written, what becomes of it, and that nobody waits for Redis."""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import archive
import endpoints
import opening
import realtime
import records
import redisclient
import ufrag
from metrics import Transceiver as Count

from . import redises

RING = ufrag.Keyring.parse("0 " + "ab" * 32)
CALL, NEXT = "rtc_AAAAAAAAAAAAAAAAAAAAAAA", "rtc_AAAAAAAAAAAAAAAAAAAAAAg"
UNIX = 1_000_000.0


class FakeRedis:
    """A Redis that remembers, and does what servers do on bad days."""

    def __init__(self) -> None:
        self.up = True
        self.stored: dict[bytes, bytes] = {}
        self.commands: list[tuple[Any, ...]] = []
        self.batches = 0
        self.hangs = False
        self.full = False

    async def run(self, commands: Sequence[tuple[Any, ...]], timeout_s: float) -> list[Any]:
        if self.hangs:
            await asyncio.sleep(0)
        if self.hangs or not self.up:
            raise redisclient.Unavailable("no answer in time")
        self.batches += 1
        self.commands += commands
        return [self._answer(*command) for command in commands]

    def _answer(self, name: bytes, key: bytes, *rest: bytes) -> Any:
        if name == b"GETRANGE":
            return self.stored.get(key, b"")
        if name == b"DEL":
            return int(self.stored.pop(key, None) is not None)
        assert name == b"SET" and rest[1:] == (b"PX", b"300000")
        if self.full:
            return redisclient.Refused("OOM command not allowed")
        self.stored[key] = rest[0]
        return b"OK"


class Call:
    """A call whose conversation is a number."""

    def __init__(
        self, call_id: str = CALL, resume: str | None = None, past: tuple[Any, ...] | None = ()
    ) -> None:
        self.call_id, self.live_at = call_id, 0.0
        self.opening = opening.Opening("", None, (), resume=resume, past=past)
        self.revision, self.replies, self.octets = 0, False, 0

    def record(self) -> records.Record:
        item = {"id": "i", "text": str(self.revision) + "x" * self.octets}
        return records.Record({}, (item,), "one", "realtime")


class Bench:
    """An archive, and a time that the test owns."""

    def __init__(self, redis: FakeRedis | None, resume_s: float = 300.0) -> None:
        self.redis, self.unix = redis, UNIX
        self.archive = archive.Archive(RING, resume_s, lambda: self.unix, redis)  # type: ignore
        self.now = 100.0

    async def look(self, call: Call, seconds: float = 0.05) -> int:
        """Let time pass as a transceiver does; returns how often the call was written."""
        written = 0
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            self.archive.look(call, self.now)
            before = len(self.archive._waiting)
            while self.archive._waiting and await self.archive._write():
                written += before
        return written

    async def found(self, call_id: str = CALL) -> str | None:
        record = await self.archive.find(call_id)
        return None if record is None else record.items[0]["text"]


def test_a_call_is_written_when_it_changes_and_not_more_often_than_is_good() -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        assert await bench.look(call) == 1
        assert await bench.look(call, 20.0) == 0
        for _ in range(40):  # every 50 ms, for 2 s
            call.revision += 1
            await bench.look(call)
        assert bench.redis is not None
        assert 4 <= len(bench.redis.commands) - 1 <= 5
        await bench.look(call, 1.0)
        assert await bench.found() == str(call.revision)
        call.replies = True  # what of it is heard changes all the time
        assert await bench.look(call, 10.0) == 10
        call.replies = False
        assert await bench.look(call, 10.0) == 1
        assert await bench.look(call, 301.0) == 3  # so that it is there when it is needed

    asyncio.run(scene())


def test_a_large_record_is_written_less_often() -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        call.octets = 3 * archive.PACE_OCTETS
        written = 0
        for _ in range(200):
            call.revision += 1
            written += await bench.look(call)
        assert written == 5

    asyncio.run(scene())


def test_nothing_is_written_before_a_call_is_live_or_where_nothing_is_to_be_kept() -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        call.live_at = None  # type: ignore[assignment]
        assert await bench.look(call, 1.0) == 0
        bench.archive.ended(call)
        assert await bench.found() is None
        never = Bench(FakeRedis(), resume_s=0.0)
        assert await never.look(Call(), 1.0) == 0
        never.archive.ended(Call())
        never.archive.ended(Call(), over=True)
        assert never.archive._waiting == {}
        assert await never.found() is None

    asyncio.run(scene())


def test_hung_up_is_deleted_and_lost_is_kept() -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        assert bench.redis is not None
        await bench.look(call)
        call.revision = 7
        bench.archive.ended(call)
        assert await bench.found() == "7"  # from here, whatever Redis has
        while bench.archive._waiting:
            await bench.archive._write()
        elsewhere = Bench(bench.redis)
        assert await elsewhere.found() == "7"
        elsewhere.unix += 300 + records.SKEW_S + 1
        assert await elsewhere.found() is None
        bench.archive.ended(call, over=True)
        assert await bench.found() is None
        bench.archive.start()
        await bench.archive.stop()
        assert bench.redis.stored == {}

    asyncio.run(scene())


def test_the_record_goes_when_the_call_that_goes_on_with_it_is_live() -> None:
    async def scene() -> None:
        redis = FakeRedis()
        first, second = Bench(redis), Bench(redis)
        await first.look(Call())
        assert await second.found() == "0"
        await second.look(Call("rtc_stranger", resume=CALL, past=None))
        assert await second.found() == "0"  # that one was told that there is no such call
        again = Call(NEXT, resume=CALL)
        again.live_at = None  # type: ignore[assignment]
        await second.look(again, 1.0)
        assert await second.found() == "0"  # its client may not have got the answer
        again.live_at = 1.0
        await second.look(again)
        assert await second.found() is None
        assert records.name_of(CALL) not in redis.stored

    asyncio.run(scene())


def test_what_has_moved_elsewhere_is_left_to_whoever_has_it_now() -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        assert bench.redis is not None
        await bench.look(call)
        call.revision = 1
        bench.archive.look(call, bench.now + 1)
        bench.archive.ended(call, moved=True)
        assert bench.archive._waiting == {} and bench.archive._waiting_octets == 0
        assert await bench.found() == "0"  # as the other one has read it
        bench.redis.stored.clear()
        assert await bench.found() is None

    asyncio.run(scene())


def test_without_redis_a_call_that_ended_here_can_be_resumed_here() -> None:
    async def scene() -> None:
        bench, call = Bench(None), Call()
        bench.archive.look(call, 1.0)
        bench.archive.ended(call)
        assert await bench.found() == "0"
        bench.archive.ended(call, over=True)
        assert await bench.found() is None
        for number in range(archive.ENDED_MAX + 1):
            bench.archive.ended(Call(f"rtc_{number}"))
        assert await bench.found("rtc_0") is None
        assert await bench.found("rtc_1") == "0"
        large = Call("rtc_large")
        large.octets = 300_000
        for number in range(40):
            large.call_id = f"rtc_large{number}"
            bench.archive.ended(large)
        assert bench.archive._ended_octets <= archive.ENDED_OCTETS_MAX
        assert bench.archive._ended_octets == sum(map(len, bench.archive._ended.values()))

    asyncio.run(scene())


def test_calls_share_a_message_and_the_newest_of_each_counts() -> None:
    async def scene() -> None:
        bench = Bench(FakeRedis())
        assert bench.redis is not None
        calls = [Call(f"rtc_{number}") for number in range(100)]
        for call in calls:
            bench.archive.look(call, 1.0)
        for call in calls:
            call.revision = 1
            bench.archive.look(call, 2.0)
        bench.archive.start()
        while bench.archive._waiting:
            await asyncio.sleep(0.01)
        await bench.archive.stop()
        assert bench.redis.batches == 1
        assert len(bench.redis.stored) == len(bench.redis.commands) == 100
        assert await bench.found("rtc_42") == "1"

    asyncio.run(scene())


def test_a_redis_that_is_away_costs_nothing_and_gets_everything_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene() -> None:
        bench, call, quiet = Bench(FakeRedis()), Call(), Call(NEXT)
        redis = bench.redis
        assert redis is not None
        await bench.look(call)
        await bench.look(quiet)
        redis.hangs = True
        call.revision = 1
        bench.archive.look(call, bench.now + 1)
        assert not await bench.archive._write()
        assert await bench.found("rtc_unknown") is None
        call.revision = 2
        bench.archive.look(call, bench.now + 2)
        assert len(bench.archive._waiting) == 1  # the newest
        redis.hangs, redis.up = False, False
        bench.archive.look(call, bench.now + 3)
        redis.stored.clear()
        redis.up = True
        bench.now += 4
        await bench.look(call)
        await bench.look(quiet)
        assert set(redis.stored) == {records.name_of(CALL), records.name_of(NEXT)}
        assert await bench.found() == "2"
        assert bench.archive._waiting_octets == 0
        assert bench.archive._counters[Count.RECORDS_FAILED] == 1
        assert bench.archive._counters[Count.RECORDS_WRITTEN] == 4

    with caplog.at_level(logging.INFO, "archive"):
        asyncio.run(scene())
    assert len(caplog.messages) == 1  # redisclient says the rest


def test_what_waits_is_bounded() -> None:
    async def scene() -> None:
        bench = Bench(FakeRedis())
        assert bench.redis is not None
        bench.redis.hangs = True
        call = Call()
        call.octets = 300_000
        for number in range(100):
            call.call_id = f"rtc_{number}"
            bench.archive.look(call, 1.0)
        waiting = bench.archive._waiting
        counted = sum(archive.ENTRY_OCTETS + len(octets) for octets in waiting.values())
        assert counted == bench.archive._waiting_octets
        assert bench.archive._waiting_octets <= archive.WAITING_OCTETS_MAX
        assert records.name_of("rtc_99") in waiting
        bench.archive.start()
        await bench.archive.stop()  # does not hang

    asyncio.run(scene())


def test_what_waits_to_be_deleted_is_bounded_too() -> None:
    """Calls that are hung up while Redis is away leave a deletion each."""

    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        assert bench.redis is not None
        most = archive.WAITING_OCTETS_MAX // archive.ENTRY_OCTETS
        for number in range(most + 100):
            call.call_id = f"rtc_{number}"
            bench.archive.ended(call, over=True)
        assert len(bench.archive._waiting) == most
        assert records.name_of(f"rtc_{most + 99}") in bench.archive._waiting
        await bench.archive._write()
        assert len(bench.redis.commands) <= archive.BATCH_OCTETS // archive.ENTRY_OCTETS

    asyncio.run(scene())


def test_a_full_redis_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        assert bench.redis is not None
        bench.redis.full = True
        for _ in range(5):
            call.revision += 1
            await bench.look(call, 1.0)
        bench.redis.full = False
        call.revision += 1
        await bench.look(call, 1.0)
        assert await bench.found() == str(call.revision)

    with caplog.at_level(logging.INFO, "archive"):
        asyncio.run(scene())
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "redis takes no records, calls cannot be resumed elsewhere",
        "redis takes records again",
    ]


def test_a_fault_costs_the_record_and_not_the_call(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        bench, call = Bench(FakeRedis()), Call()
        call.octets = -1
        call.record = lambda: 1 // 0  # type: ignore[assignment,method-assign,return-value]
        assert await bench.look(call, 1.0) == 0
        bench.archive.ended(call)
        assert await bench.found() is None

    asyncio.run(scene())
    assert "cannot be recorded" in caplog.text


# --- with a real one -----------------------------------------------------------------------------

CALLS = 50
STEP_S = 0.05
TALK_S = 16
"""Two turns of eight seconds in each call: three of speech, one of thought, four of reply."""


class Talk(Call):
    """A call in which people talk as they do: 20 items are there, and turns follow."""

    def __init__(self, number: int) -> None:
        super().__init__(f"rtc_{number}")
        self.number, self.turn = number, 0
        self.chronicle = records.Chronicle({"instructions": "Be kind. " * 400, "tools": []})
        for _ in range(10):
            self.say()
            self.reply("done")

    def say(self) -> None:
        self.turn += 1
        words = {"type": "input_audio", "transcript": "What was said in this turn, in words. " * 3}
        self.note("done", realtime.message(f"u{self.turn}", "user", "completed", words))

    def reply(self, how: str) -> None:
        words = {"type": "output_audio", "transcript": "What is answered, which is longer. " * 8}
        self.note(how, realtime.message(f"a{self.turn}", "assistant", "completed", words))

    def note(self, how: str, item: dict[str, Any]) -> None:
        kind = f"conversation.item.{how}"
        self.chronicle.memory.note({"item": item}, kind)
        self.revision = self.chronicle.revision

    def pass_to(self, step: int) -> None:
        """Let time pass, in steps of STEP_S."""
        at = (step + 7 * self.number) % round(8 / STEP_S)
        self.replies = 80 <= at < 160
        if at == 60:
            self.say()
        elif at == 80:
            self.reply("added")
        elif 80 < at < 110 and at % 3 == 0:
            kind = "response.output_audio_transcript.delta"
            delta = {"item_id": f"a{self.turn}", "delta": "which is longer "}
            self.chronicle.memory.note(delta, kind)
            self.revision = self.chronicle.revision
        elif at == 110:
            self.reply("done")

    def record(self) -> records.Record:
        shares = {f"a{self.turn}": 0.5} if self.replies else {}
        return self.chronicle.record(shares, "one", "realtime")


def test_what_it_costs_and_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty calls, sixteen seconds of talk as fast as it goes; the figure is of this process."""
    server = redises.Server(tmp_path).start()
    url = endpoints.RedisUrl(f"redis://127.0.0.1:{server.port}/0")
    log = logging.getLogger("test")

    async def scene() -> None:
        client = redisclient.Client(url, 2.0, log)  # a busy machine may answer late
        kept = archive.Archive(RING, 300.0, time.time, client)
        talks = [Talk(number) for number in range(CALLS)]
        steps = round(TALK_S / STEP_S)
        written = 0
        began, looked = time.process_time(), 0.0
        for step in range(steps):
            for talk in talks:
                talk.pass_to(step)
            before = time.process_time()
            for talk in talks:
                kept.look(talk, step * STEP_S)
            looked += time.process_time() - before
            if step % 2:
                before = time.process_time()
                written += len(kept._waiting)
                while kept._waiting:
                    assert await kept._write()
                looked += time.process_time() - before
        seconds = CALLS * TALK_S
        octets = server.do("STRLEN", records.name_of("rtc_7"))
        print(
            f"records: {1e6 * looked / seconds:.0f} us of CPU a session-second, {octets} octets,"
            f" {written / seconds:.2f} written a second"
        )
        assert looked <= time.process_time() - began
        assert server.do("DBSIZE") == CALLS
        assert 290_000 < server.do("PTTL", records.name_of("rtc_7")) <= 300_000
        elsewhere = archive.Archive(RING, 300.0, time.time, client)
        with monkeypatch.context() as patient:
            patient.setattr(archive, "FIND_S", 2.0)
            found = await elsewhere.find("rtc_7")
        assert found is not None and found.key == "one"
        assert [item["id"] for item in found.items][:3] == ["u1", "a1", "u2"]
        assert b"What was said" not in server.do("GET", records.name_of("rtc_7"))
        elsewhere.ended(talks[7], over=True)
        assert await elsewhere._write()
        assert server.do("DBSIZE") == CALLS - 1
        server.kill()
        began = time.monotonic()
        assert await elsewhere.find("rtc_8") is None
        assert time.monotonic() - began < 5  # its deadline is a quarter of a second
        await client.close()

    try:
        asyncio.run(scene())
    finally:
        server.close()
