"""The data channel's association: what aiortc may read, what is held, how soon is sent again."""

import asyncio
import os
import random
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiortc import rtcsctptransport
from google_crc32c import value as crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st

import association
import peer

from . import shim, test_moves


def chunk(kind: int, body: bytes = b"", flags: int = 0, length: int | None = None) -> bytes:
    size = 4 + len(body) if length is None else length
    return struct.pack(">BBH", kind, flags, size) + body + bytes(-len(body) % 4)


def data(octets: int = 1, flags: int = 3) -> bytes:
    return chunk(0, bytes(12 + octets), flags)


def parameter(kind: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, length) + body


HEADER = bytes(12)
INIT = struct.pack(">LLHHL", 1, 100_000, 10, 10, 1)


@pytest.mark.parametrize(
    "chunks",
    [
        data(),
        data(1200) + data(3),
        chunk(1, INIT),
        chunk(1, INIT + parameter(0x8008, 6, b"\xc0\x82\0\0") + parameter(0xC000, 4)),
        chunk(2, INIT + parameter(7, 28, bytes(24))),
        chunk(3, bytes(12)),
        chunk(3, bytes(8) + b"\0\1\0\1" + bytes(8)) + data(),
        chunk(10, bytes(24)) + data(100),
        chunk(11),
        chunk(4, parameter(1, 12, bytes(8))),
        chunk(130, parameter(13, 18, bytes(16))),
        chunk(192, bytes(8)),
        chunk(0xC1, b"unknown: aiortc steps over it"),
        chunk(11) * association.CHUNKS_MAX,
    ],
)
def test_what_clients_send_is_sound(chunks: bytes) -> None:
    assert association.sound(HEADER + chunks)


@pytest.mark.parametrize(
    "chunks",
    [
        b"",
        b"\0\3\0",
        chunk(0, b"", length=3),
        chunk(0, bytes(12)),  # DATA without any
        chunk(0, bytes(40), length=45),
        chunk(1, INIT[:-1]),
        chunk(1, INIT) + data(),
        chunk(1, INIT + parameter(7, 0)),
        chunk(2, INIT + parameter(7, 3)),
        chunk(3, bytes(11)),
        chunk(3, bytes(8) + b"\xff\xff\0\0"),
        chunk(3, bytes(10) + b"\0\1"),
        chunk(4, parameter(1, 0)),
        chunk(5, parameter(1, 8, bytes(4)) + parameter(1, 0)),
        chunk(6, parameter(1, 0)),
        chunk(9, parameter(1, 2)),
        chunk(130, parameter(13, 0)),
        chunk(7, b"\0"),
        chunk(192),
        chunk(11) * (association.CHUNKS_MAX + 1),
    ],
)
def test_what_would_trip_or_stall_aiortc_is_not(chunks: bytes) -> None:
    assert not association.sound(HEADER + chunks)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 130, 192, 77]),
            st.integers(0, 255),
            st.one_of(st.none(), st.integers(0, 60)),
            st.binary(max_size=60),
        ),
        max_size=6,
    )
)
@example([(4, 0, None, bytes(4))])
def test_aiortc_reads_whatever_is_sound_and_comes_to_an_end(
    chunks: list[tuple[int, int, int | None, bytes]],
) -> None:
    """The parser raises at the worst; a loop without an end would show as a test that hangs."""
    packet = bytearray(
        HEADER + b"".join(chunk(kind, body, flags, n) for kind, flags, n, body in chunks)
    )
    struct.pack_into("<L", packet, 8, crc32c(bytes(packet)))
    if association.sound(bytes(packet)):
        try:
            rtcsctptransport.parse_packet(bytes(packet))
        except (ValueError, struct.error):
            return


# --- inside valid DTLS: one caller at his worst, and another who must not notice ----------------

DCEP, TEXT, EMPTY_TEXT, BINARY, EMPTY_BINARY = 50, 51, 56, 53, 57
STALL_S_MAX = 1.0
"""Longest standstill of the loop: milliseconds are normal. What is tested for took minutes."""


class Hostile:
    """A stock client's association, and what it would never send by itself."""

    def __init__(self, call: test_moves.Call) -> None:
        self.call = call
        self.sctp: Any = call.client.pc.sctp
        self.sctp._data_channel_receive = self._received
        self.tsn = self.sctp._local_tsn
        self.seq: dict[int, int] = {}

    async def _received(self, stream: int, protocol: int, body: bytes) -> None:
        """It would be at a loss what to do with answers for channels that it never opened."""
        if protocol == TEXT:
            self.call.client.messages.append(body.decode())

    async def send(self, *chunks: bytes, tag: int | None = None) -> None:
        """A packet with a correct checksum, encrypted."""
        tag = self.sctp._remote_verification_tag if tag is None else tag
        packet = bytearray(struct.pack(">HHLL", 5000, 5000, tag, 0) + b"".join(chunks))
        struct.pack_into("<L", packet, 8, crc32c(bytes(packet)))
        await self.raw(bytes(packet))

    async def raw(self, octets: bytes) -> None:
        await self.sctp.transport._send_data(octets)

    def data(self, body: bytes, stream: int = 1, protocol: int = TEXT, flags: int = 3) -> bytes:
        """A DATA chunk in its turn."""
        seq = self.seq.get(stream, self.sctp._outbound_stream_seq.get(stream, 0))
        found = chunk(0, struct.pack(">LHHL", self.tsn, stream, seq, protocol) + body, flags)
        self.tsn = (self.tsn + 1) & 0xFFFF_FFFF
        if flags & 1:
            self.seq[stream] = seq + 1
        return found

    def open(self, stream: int, label: bytes = b"x", label_octets: int | None = None) -> bytes:
        size = len(label) if label_octets is None else label_octets
        return self.data(struct.pack(">BBHLHH", 3, 0, 0, 0, size, 0) + label, stream, DCEP)


def beside(attack: Callable[[Hostile], Any]) -> tuple[test_moves.Call, list[str]]:
    """Let one caller attack, and see that another notices nothing; the attacker's call, and what
    its session was told."""
    found: list[test_moves.Call] = []

    async def scenario(on: test_moves.Town) -> None:
        bystander, attacker = await on.call(), await on.call()
        found.append(attacker)
        watch = asyncio.create_task(stalls())
        await attack(Hostile(attacker))
        bystander.client.channel.send("ping")
        await shim.until(lambda: bystander.handler.messages == ["ping"])
        bystander.peer.send_message("pong")
        await shim.until(lambda: bystander.client.messages == ["pong"])
        await bystander.goes_on()
        assert bystander.every_packet_once()
        assert bystander.handler.heard == ["connected", "opened"]
        watch.cancel()
        print(f"the loop was busy for {worst[0]:.3f} s at a time, and late by {late[0]:.3f} s")
        assert worst[0] < STALL_S_MAX

    worst, late = [0.0], [0.0]

    async def stalls() -> None:
        """Of this thread's own time: a machine that stands still is not the attacker's doing."""
        while True:
            before, busy = time.monotonic(), time.thread_time()
            await asyncio.sleep(0)
            worst[0] = max(worst[0], time.thread_time() - busy)
            late[0] = max(late[0], time.monotonic() - before)
            await asyncio.sleep(0.001)

    test_moves.town(scenario, attackers=1)
    return found[0], found[0].handler.heard


async def survived(hostile: Hostile) -> None:
    """Wait until the attacker's own channel still works."""
    sent = hostile.data(b"still here")
    async with asyncio.timeout(shim.WAIT_S):
        while "still here" not in hostile.call.handler.messages:
            await hostile.send(sent)  # again, since it may have been one too many for its inbox
            await asyncio.sleep(0.02)


async def ended(hostile: Hostile) -> None:
    """Wait until the attacker's session has been given up."""
    await shim.until(lambda: hostile.call.handler.heard[-1].startswith("lost"))


ENDLESS = {
    "heartbeat": chunk(4, parameter(1, 0)),
    "reset": chunk(130, parameter(13, 0)),
    "error": chunk(9, parameter(1, 1)),
    "acknowledgement of all numbers": chunk(
        3, struct.pack(">LLHH", 0, 1000, 290, 0) + b"\0\1\xff\xff" * 290
    ),
    "acknowledgement that counts too much": chunk(3, struct.pack(">LLHH", 0, 1000, 9999, 9999)),
}


@pytest.mark.parametrize("poison", ENDLESS.values(), ids=ENDLESS)
def test_what_would_stop_the_process_does_nothing(poison: bytes) -> None:
    async def attack(hostile: Hostile) -> None:
        tsn = hostile.sctp._last_sacked_tsn
        if poison[0] == 3:
            now = poison[:4] + struct.pack(">L", hostile.sctp._last_received_tsn) + poison[8:]
            await hostile.send(now)
        assert tsn is not None
        for _ in range(5):
            await hostile.send(poison)
        await survived(hostile)

    _, heard = beside(attack)
    assert heard == ["connected", "opened"]


def test_garbage_inside_valid_dtls() -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def attack(hostile: Hostile) -> None:
        for _ in range(200):
            await hostile.raw(chance.randbytes(chance.randrange(1, 1100)))
            await hostile.send(chance.randbytes(chance.randrange(0, 100)))
            await hostile.send(chunk(4, parameter(1, 8, b"true")), tag=chance.randrange(1 << 32))
            await asyncio.sleep(0.001)  # the relay in miniature takes one datagram a turn
        await survived(hostile)

    _, heard = beside(attack)
    assert heard == ["connected", "opened"]


def test_chunks_of_chance_inside_valid_packets() -> None:
    """They may end the session of whoever sends them, and nothing else."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def attack(hostile: Hostile) -> None:
        for number in range(400):
            kind = chance.choice([0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 14, 130, 192, 200])
            body = bytearray(chance.randbytes(chance.randrange(0, 64)))
            if chance.random() < 0.5 and len(body) >= 4:  # near what is expected
                struct.pack_into(">L", body, 0, hostile.tsn)
            await hostile.send(chunk(kind, bytes(body), chance.randrange(8)))
            if not number % 10:
                await asyncio.sleep(0.001)

    beside(attack)


LABELS = {
    "enormous": lambda hostile: [hostile.open(9, b"l" * 1000, 0xFFFF)],
    "of several fragments": lambda hostile: [
        hostile.data(struct.pack(">BBHLHH", 3, 0, 0, 0, 5000, 0) + b"l" * 1000, 9, DCEP, 2),
        *(hostile.data(b"l" * 1000, 9, DCEP, flags) for flags in (0, 0, 0, 1)),
    ],
    "none": lambda hostile: [hostile.open(9, b"")],
    "cut off": lambda hostile: [hostile.data(b"\3\0\0", 9, DCEP)],
    "no type": lambda hostile: [hostile.data(b"\x77", 9, DCEP)],
}


@pytest.mark.parametrize("opening", LABELS.values(), ids=LABELS)
def test_channels_with_strange_labels(opening: Callable[[Hostile], list[bytes]]) -> None:
    async def attack(hostile: Hostile) -> None:
        for each in opening(hostile):
            await hostile.send(each)
        await survived(hostile)

    call, heard = beside(attack)
    assert heard == ["connected", "opened"]
    assert len(call.peer.carrier) <= 2


ENDING = {
    "a label that is no text": lambda hostile: [hostile.open(9, b"\xff\xfe")],
    "a stream opened twice": lambda hostile: [hostile.open(9), hostile.open(9)],
    "an answer to what was never opened": lambda hostile: [hostile.data(b"\2", 9, DCEP)],
    "a message that is no text": lambda hostile: [hostile.data(b"\xff\xfe")],
    "many channels": lambda hostile: [hostile.open(stream) for stream in range(3, 40, 2)],
    "many streams": lambda hostile: [
        hostile.data(b"?", stream, flags=2) for stream in range(1, 100)
    ],
    "many streams by name": lambda hostile: [
        chunk(
            192,
            struct.pack(">L", (hostile.tsn + 5) & 0xFFFF_FFFF)
            + b"".join(struct.pack(">HH", stream, 1) for stream in range(250)),
        )
    ],
    "crumbs of a message without end": lambda hostile: [
        b"".join(hostile.data(b"x", flags=2 if not packet + n else 0) for n in range(50))
        for packet in range(60)
    ],
    "messages behind one that never comes": lambda hostile: [
        b"".join(_later(hostile) for _ in range(50)) for _ in range(60)
    ],
    "more than the window": lambda hostile: [
        hostile.data(b"x" * 1100, flags=2 if not packet else 0) for packet in range(700)
    ],
}

REASONS = {
    "many channels": "the client opened too many data channels",
    **dict.fromkeys(
        (
            "many streams",
            "many streams by name",
            "crumbs of a message without end",
            "messages behind one that never comes",
            "more than the window",
        ),
        association.EXCEEDED,
    ),
}


def _later(hostile: Hostile) -> bytes:
    hostile.seq[1] = hostile.seq.get(1, hostile.sctp._outbound_stream_seq.get(1, 0)) + 1
    return hostile.data(b"x")


@pytest.mark.parametrize("name", ENDING)
def test_what_ends_the_session_of_whoever_sends_it(name: str) -> None:
    sent = ENDING[name]
    reason = REASONS.get(name, association.BROKEN)

    async def attack(hostile: Hostile) -> None:
        sctp = hostile.call.peer._sctp
        for number, packet in enumerate(sent(hostile)):
            if len(hostile.call.handler.heard) == 3:
                break
            await hostile.send(packet)
            if not number % 4:
                await asyncio.sleep(0.001)
        await ended(hostile)
        held = sum(len(stream.reassembly) for stream in sctp._inbound_streams.values())
        assert held < association.HELD_MAX + 100
        assert len(sctp._inbound_streams) < association.STREAMS_MAX + 300

    _, heard = beside(attack)
    assert len(heard) == 3
    assert heard[-1] == f"lost: {reason}"


def test_messages_without_octets_and_of_unknown_kinds() -> None:
    async def attack(hostile: Hostile) -> None:
        await hostile.send(hostile.data(b"\0", protocol=EMPTY_TEXT))
        await hostile.send(hostile.data(b"\0", protocol=EMPTY_BINARY))
        await hostile.send(hostile.data(b"what is this", protocol=4711))
        await hostile.send(hostile.data(b"nor this", stream=7))
        await hostile.send(hostile.data(b"\xff", protocol=BINARY))
        await survived(hostile)

    call, heard = beside(attack)
    assert heard == ["connected", "opened"]
    assert call.handler.messages == ["", b"", b"\xff", "still here"]


def test_events_come_by_the_first_channel_alone() -> None:
    async def attack(hostile: Hostile) -> None:
        await hostile.send(hostile.open(9, b"oai-events"))
        await hostile.send(hostile.data(b"by the second", stream=9))
        await survived(hostile)

    call, heard = beside(attack)
    assert heard == ["connected", "opened"]
    assert call.handler.messages == ["still here"]


def test_an_association_that_is_begun_again_goes_on() -> None:
    """A client whose INIT took long sends it twice; the second comes in the middle of things."""

    async def attack(hostile: Hostile) -> None:
        sctp = hostile.sctp
        again = struct.pack(
            ">LLHHL", sctp._local_verification_tag, 100_000, 100, 100, hostile.tsn - 100
        )
        await survived(hostile)
        hostile.call.handler.messages.clear()
        for _ in range(3):
            await hostile.send(chunk(1, again), tag=0)
            other = struct.pack(">L", 4711) + again[4:]
            await hostile.send(chunk(1, other), tag=0)
        await survived(hostile)
        hostile.call.peer.send_message("and back")
        await shim.until(lambda: "and back" in hostile.call.client.messages)

    _, heard = beside(attack)
    assert heard == ["connected", "opened"]


def test_a_flood_of_small_requests_waits_and_the_others_do_not() -> None:
    async def attack(hostile: Hostile) -> None:
        packet = [chunk(4, parameter(1, 8, b"beat"))] * association.CHUNKS_MAX
        spent = time.thread_time()
        for _ in range(400):
            await hostile.send(*packet)
            if not _ % 8:
                await asyncio.sleep(0.001)
        print(f"{time.thread_time() - spent:.2f} s of CPU")

    _, heard = beside(attack)
    assert heard == ["connected", "opened"]


def test_a_session_has_a_share_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its packets cost: here each of them is made to cost 5 ms."""
    burned: list[float] = []
    sound = association.sound

    def dear(packet: bytes) -> bool:
        start = time.thread_time()
        while time.thread_time() - start < 0.005:
            pass
        burned.append(time.thread_time() - start)
        return sound(packet)

    async def attack(hostile: Hostile) -> None:
        monkeypatch.setattr(association, "sound", dear)
        start = time.monotonic()
        for _ in range(200):
            await hostile.send(chunk(4, parameter(1, 8, b"beat")))
            await asyncio.sleep(0.002)
        passed_s = time.monotonic() - start
        monkeypatch.undo()
        assert sum(burned) > peer.DATA_CPU_BURST_S / 2
        allowed_s = peer.DATA_CPU_BURST_S + peer.DATA_CPU_SHARE * passed_s
        assert sum(burned) < allowed_s + 0.1, f"{len(burned)} packets in {passed_s:.2f} s"

    _, heard = beside(attack)
    assert heard == ["connected", "opened"]
