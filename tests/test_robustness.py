"""Nonsense from every side, with a healthy call beside it: the process serves on, bounded.

The parts have tests of their own for what they take and refuse. Here all of it is together, over
real sockets: whatever one client, its model server or a caller of the control API sends, the other
call is answered, nothing counts as a fault of ours, and what waits somewhere has an end.
"""

import asyncio
import contextlib
import json
import random
import struct
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from OpenSSL import SSL

import rtp
from metrics import Transceiver as Count

from . import shim
from .test_transceiver import House, house, sessions, types

SEED = random.SystemRandom().getrandbits(32)
LIMITS = "sessions_max = 2000\nconnecting_max = 2000\nload_max = 100\nlag_s_max = 100"


@pytest.fixture
def rng() -> random.Random:
    """Chance; a test that fails shows the seed."""
    print(f"seed {SEED}")
    return random.Random(SEED)


async def answers(client: shim.Client) -> None:
    """See that a call still works."""
    known = len(client.messages)
    client.channel.send('{"type": "input_audio_buffer.clear"}')
    await shim.until(lambda: "input_audio_buffer.cleared" in types(client)[known:])


def beside(
    folder: Path, what: Callable[[House, shim.Client, str], Coroutine[Any, Any, None]]
) -> None:
    """Do something to one call, and see that another one does not notice."""

    async def scenario(on: House) -> None:
        healthy, kept = await on.call()
        ill, id_ = await on.call()
        await what(on, ill, id_)
        await answers(healthy)
        assert kept in on.transceiver.sessions
        assert on.transceiver.counters[Count.ENDED_FAULT] == 0

    house(folder, scenario, limits=LIMITS)


# --- a client ------------------------------------------------------------------------------------

KINDS = (
    "session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "output_audio_buffer.clear",
    "conversation.item.create",
    "conversation.item.retrieve",
    "conversation.item.truncate",
    "conversation.item.delete",
    "response.create",
    "response.cancel",
    "no.such.event",
)
FIELDS = (
    "session", "audio", "item", "item_id", "response", "content_index", "audio_end_ms", "event_id",
    "previous_item_id", "turn_detection", "input", "content", "type", "response_id",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say."""
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, -1, 2**63, -(2**70), 1e308, 0.1]),
        lambda: rng.choice(["", "\0", "\ud83d\ude00", "A" * rng.choice([1, 600, 70_000]), "AAAA"]),
        lambda: rng.choice(KINDS),
    ]
    if depth < 4:
        choices += [
            lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(5))},
        ]
    return rng.choice(choices)()


def message(rng: random.Random) -> str | bytes:
    """What a client of bad manners sends on its data channel."""
    event = {rng.choice(FIELDS): value(rng) for _ in range(rng.randrange(5))}
    text = json.dumps(event | {"type": rng.choice(KINDS)})[:200_000]
    octets = bytearray(text.encode())
    match rng.randrange(5):
        case 0 if octets:
            octets[rng.randrange(len(octets))] = rng.randrange(256)
            return bytes(octets)
        case 1:
            return bytes(octets[: rng.randrange(len(octets) + 1)])
        case 2:
            depth = rng.choice([10, 300, 100_000])
            return '{"type": "session.update", "session": ' + "[" * depth
        case 3:
            return '{"a":' * 2_000 + "1" + "}" * 2_000
    return text


def test_whatever_a_client_says(tmp_path: Path, rng: random.Random) -> None:
    async def what(on: House, ill: shim.Client, id_: str) -> None:
        for _ in range(300):
            if ill.channel.readyState == "open":
                ill.channel.send(message(rng))
            await asyncio.sleep(0)
        if id_ in on.transceiver.sessions:
            await answers(ill)
        assert "error" in types(ill)

    beside(tmp_path, what)


def test_whatever_is_in_an_authentic_packet(tmp_path: Path, rng: random.Random) -> None:
    """A client that has the keys and encrypts nonsense."""

    async def what(on: House, ill: shim.Client, id_: str) -> None:
        session = on.transceiver.sessions[id_]
        block = rtp.Block(session.ssrc, 1, 2, 3, 4, 5, 6)
        good = [
            rtp.write(111, 7, 960, 5, bytes(40)),
            rtp.receiver_report(5, [block, block], "c"),
            rtp.sender_report(rtp.Sender(5, 1 << 60, 2, 3, 4), [block], "c"),
        ]
        for number in range(3_000):
            octets = bytearray(rng.choice(good))
            for _ in range(rng.randrange(6)):
                octets[rng.randrange(len(octets))] = rng.randrange(256)
            packet = bytes(octets[: rng.choice([len(octets), rng.randrange(len(octets))])])
            session.rtp(packet, time.monotonic())
            session.rtcp(packet, time.monotonic())
            if number % 100 == 0:
                await asyncio.sleep(0)
        await answers(ill)

    beside(tmp_path, what)


def chunk(rng: random.Random) -> bytes:
    """A chunk of SCTP of any kind, mostly as long as it says."""
    body = rng.randbytes(rng.choice([0, 4, 12, 16, 40, 200]))
    length = rng.choice([4 + len(body)] * 4 + [0, 3, 4, 65_535, rng.randrange(300)])
    kind = rng.choice([*range(16), 64, 130, 132, 192, 193, 255])
    return struct.pack(">BBH", kind, rng.randrange(8), length) + body


def test_whatever_is_inside_of_dtls(tmp_path: Path, rng: random.Random) -> None:
    """SCTP from a client that has the keys: its session ends or goes on."""

    async def what(on: House, ill: shim.Client, id_: str) -> None:
        sctp = ill.pc.sctp
        for _ in range(400):
            body = b"".join(chunk(rng) for _ in range(rng.randrange(4)))
            tag = rng.choice([sctp._remote_verification_tag] * 4 + [rng.getrandbits(32)])
            packet = struct.pack("!HHL", 5000, 5000, tag) + bytes(4) + body
            checksum = struct.pack("<L", google_crc32c.value(packet))
            packet = packet[:8] + checksum + packet[12:]
            if rng.random() < 0.1:
                packet = packet[: rng.randrange(len(packet))]
            with contextlib.suppress(ConnectionError, SSL.Error):  # it has been hung up on
                await sctp.transport._send_data(packet)
            await asyncio.sleep(0)
        if id_ in on.transceiver.sessions:
            await on.ask("DELETE", f"/v1/sessions/{id_}")

    beside(tmp_path, what)


def test_whatever_comes_through_a_relay(tmp_path: Path, rng: random.Random) -> None:
    """From the address of a client, without any keys: nothing of it counts, the call goes on."""

    async def what(on: House, ill: shim.Client, id_: str) -> None:
        first = [0, 1, *range(20, 64), 128, 200, 255]
        for _ in range(2_000):
            datagram = bytes([rng.choice(first)]) + rng.randbytes(rng.randrange(1_600))
            on.shim.inject([datagram], next(reversed(on.shim.clients)))
            await asyncio.sleep(0)
        await answers(ill)

    beside(tmp_path, what)


def test_a_client_that_takes_nothing_is_let_go(tmp_path: Path) -> None:
    """Its messages wait for it, up to a limit."""

    async def what(on: House, ill: shim.Client, id_: str) -> None:
        session = on.transceiver.sessions[id_]
        last = next(reversed(on.shim.clients))
        on.shim.front = Deaf(on.shim.front, last)
        while id_ in on.transceiver.sessions:
            session._emitted({"type": "response.output_text.delta", "delta": "x" * 200_000})
            await asyncio.sleep(0.01)
        assert session._peer.backlog_octets < 64 << 20

    beside(tmp_path, what)


class Deaf:
    """A socket that sends nothing to one client."""

    def __init__(self, sock: Any, client: tuple[str, int]) -> None:
        self._socket, self._client = sock, client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def sendto(self, datagram: bytes, client: tuple[str, int]) -> None:
        """Send it to all others."""
        if client != self._client:
            self._socket.sendto(datagram, client)


# --- a model server -------------------------------------------------------------------------------

ABOUT = {"response_id": "r", "item_id": "i", "output_index": 0, "content_index": 0}
DELTA = {"type": "response.output_audio.delta", **ABOUT}
NONSENSE: dict[str, list[dict[str, Any]]] = {
    "no type": [{}, {"type": None}, {"type": 7}, {"type": ["a"]}],
    "other shapes": [
        {"type": kind, **{field: other for field in FIELDS if field != "type"}}
        for kind in (
            "session.created",
            "session.updated",
            "error",
            "conversation.item.added",
            "conversation.item.done",
            "conversation.item.deleted",
            "conversation.item.truncated",
            "conversation.item.input_audio_transcription.completed",
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "response.created",
            "response.output_audio.delta",
            "response.output_audio.done",
            "response.output_item.done",
            "response.done",
        )
        for other in (None, 1, "text", [], {}, [{}], {"id": 5}, b"octets", 2**70, float("nan"))
    ],
    "what is no JSON": [
        {"type": "response.done", "response": object()},
        {"type": "x", "y": {1: 2}},
    ],
    "ten minutes in one delta": [{**DELTA, "delta": bytes(600 * 2 * 24_000)}],
    "odd and empty deltas": [{**DELTA, "delta": bytes(size)} for size in (1, 3, 0, 641, 1)],
    "audio without end": [{**DELTA, "delta": bytes(48_000 * 10)}] * 200,
    "items without end": [
        {"type": "conversation.item.added", "item": {"id": f"i{n}", "content": ["x" * 1000]}}
        for n in range(3_000)
    ],
    "responses without end": [
        {"type": "response.created", "response": {"id": f"r{n}"}} for n in range(3_000)
    ],
    "an enormous transcript": [{"type": "response.output_text.done", "text": "x" * (10 << 20)}],
    "its own play-out": [{"type": "output_audio_buffer.stopped", "response_id": "r"}] * 3,
}


@pytest.mark.parametrize("what", NONSENSE)
def test_whatever_a_model_server_says(tmp_path: Path, what: str) -> None:
    async def doing(on: House, ill: shim.Client, id_: str) -> None:
        session = on.transceiver.sessions[id_]
        for event in NONSENSE[what]:
            session._emitted(dict(event))
            await asyncio.sleep(0)
        assert session._playout._octets <= session._playout._octets_max
        assert session._peer.backlog_octets < 16 << 20
        await answers(ill)

    beside(tmp_path, doing)


def test_a_model_server_that_says_nothing(tmp_path: Path) -> None:
    """Not even session.created: the channel is open, and the call can be ended as any other."""

    async def scenario(on: House) -> None:
        client, id_ = await on.call()
        session = on.transceiver.sessions[id_]
        session._backend._mind = None
        for _ in range(100):
            client.channel.send('{"type": "response.create"}')
        await asyncio.sleep(0.1)
        assert sessions(on) == [session]
        assert (await on.ask("DELETE", f"/v1/sessions/{id_}"))[0] == 200

    house(tmp_path, scenario, limits=LIMITS)


# --- the control API ------------------------------------------------------------------------------


def test_whatever_is_asked_of_the_control_api(tmp_path: Path, rng: random.Random) -> None:
    async def scenario(on: House) -> None:
        client = shim.Client()
        on.clients.append(client)
        text = await client.offer()
        lines = text.split("\r\n")
        seen = set()
        for _ in range(300):
            offer: Any = text
            if rng.random() < 0.7:
                broken = [line for line in lines if rng.random() < 0.97]
                at = rng.randrange(len(broken))
                broken[at] = broken[at][: rng.randrange(len(broken[at]) + 1)] + rng.choice(
                    ["", "0", "\0", " ", "99999999999999999999", "\u20ac"]
                )
                offer = "\r\n".join(broken)
            body = {
                "offer": rng.choice([offer, offer, offer, value(rng)]),
                "session": rng.choice([None, {}, value(rng), {"audio": value(rng)}]),
                "model": rng.choice([None, "m", value(rng)]),
                "candidates": rng.choice([[list(on.shim.address)]] * 4 + [value(rng)]),
            }
            status, answer, _ = await on.ask("POST", "/v1/sessions", body)
            seen.add(status)
            assert status in (201, 400), (status, answer, body)
            if status == 201:
                await on.ask("DELETE", f"/v1/sessions/{answer['call_id']}")
            else:
                assert answer["error"]["message"]
        assert seen == {201, 400}
        for method, path in (("PUT", "/v1/sessions"), ("GET", "/v1/sessions/x"), ("POST", "/")):
            status, answer, _ = await on.ask(method, path, {})
            assert status in (404, 405) and answer["error"]["message"]
        async with on.http.post(on.url + "/v1/sessions", data=b"x" * (2 << 20)) as response:
            assert response.status == 413
        assert not on.transceiver.sessions

    house(tmp_path, scenario, limits=LIMITS)
