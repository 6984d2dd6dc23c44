"""A caller in some part of the world: stock aiortc, told what to do line by line.

For the laboratory (lab.py), which starts one in each caller's namespace. It reads an order a line,
JSON, from standard input and answers each with one line; nothing in it knows of Earshot but the
path that an offer is posted to and the names of events.

    {"do": "echo", "to": ADDRESS}       how long ICMP echoes take: the host, no program of ours
    {"do": "call", "url", "key", "headers", "talk_s", "pause_s", "resume"}
                                        offer, connect; moments on time.monotonic
    {"do": "checks", "count"}           how long STUN checks take, to the call's transceiver
    {"do": "until", "event", "count"}   wait for an event to have come so often
    {"do": "state"}                     what the call has come to
    {"do": "hangup"}                    close it and say so to signaling

A caller speaks for `talk_s` and pauses for `pause_s`, and so on, whatever it hears.
"""

import asyncio
import fractions
import json
import os
import secrets
import socket
import struct
import sys
import time
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCPeerConnection,
    RTCSessionDescription,
)
from av import AudioFrame

SENTENCE = Path(__file__).resolve().parent.parent / "tests" / "data" / "sentence.wav"
RATE_HZ = 48_000
FRAME_SAMPLES = 960
LOUD = 300
"""Root mean square of a frame with speech in it: -41 dBFS."""

PATIENCE_S = 20.0
ECHO_S = 2.0
CALLS = "/v1/realtime/calls"

DETECTION = {"type": "server_vad", "silence_duration_ms": 200, "interrupt_response": False}
"""It goes on talking while it is answered."""

_ICMP_ECHO, _ICMP_REPLY = 8, 0


def speech() -> npt.NDArray[np.int16]:
    """The recorded sentence, frame by frame, without the breaks in it: those would end turns."""
    with wave.open(str(SENTENCE)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    frames = samples[: len(samples) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    loud: npt.NDArray[np.bool_] = np.sqrt(np.mean(frames.astype(float) ** 2, axis=1)) > LOUD
    return np.asarray(frames[loud], np.int16)


class Talker(MediaStreamTrack):
    """A microphone: speech and pauses in turn, 20 ms at a time."""

    kind = "audio"

    def __init__(self, talk_s: float, pause_s: float) -> None:
        super().__init__()
        self._said = speech()
        self._talk, self._turn = int(talk_s * 50), int((talk_s + pause_s) * 50)
        self._sent, self._start = 0, 0.0

    async def recv(self) -> AudioFrame:
        """The next frame, paced on the clock."""
        now = time.monotonic()
        self._start = self._start or now
        await asyncio.sleep(max(0.0, self._start + self._sent / 50 - now))
        piece = np.zeros(FRAME_SAMPLES, np.int16)
        if self._turn and self._sent % self._turn < self._talk:
            piece = self._said[self._sent % len(self._said)]
        frame = AudioFrame.from_ndarray(piece.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE_HZ, self._sent * FRAME_SAMPLES
        frame.time_base = fractions.Fraction(1, RATE_HZ)
        self._sent += 1
        return frame


class Visitor:
    """One caller, with at most one call."""

    def __init__(self) -> None:
        self._pc: RTCPeerConnection | None = None
        self._events: Counter[str] = Counter()
        self._states: list[tuple[float, str]] = []
        self._hang_up = ("", {})  # type: tuple[str, dict[str, str]]
        self._sinks: set[asyncio.Task[None]] = set()

    async def do(self, order: dict[str, Any]) -> Any:
        """Do what one line says."""
        verb = order.pop("do")
        return await getattr(self, f"_{verb}")(**order)

    async def _echo(self, to: str, count: int = 5) -> list[float]:
        """Round trips of ICMP echoes in milliseconds, those that came back."""
        loop, found = asyncio.get_running_loop(), []
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.setblocking(False)
            for number in range(count):
                mark = secrets.token_bytes(8)
                begun = time.monotonic()
                await loop.sock_sendto(sock, _echo_request(number, mark), (to, 0))
                try:
                    async with asyncio.timeout(ECHO_S):
                        while True:
                            answer = await loop.sock_recv(sock, 2048)
                            body = answer[(answer[0] & 15) * 4 :]
                            if body[0] == _ICMP_REPLY and body[8:] == mark:
                                found.append((time.monotonic() - begun) * 1e3)
                                break
                except TimeoutError:
                    pass
        return found

    async def _call(
        self,
        url: str,
        key: str,
        headers: dict[str, str] | None = None,
        talk_s: float = 0.0,
        pause_s: float = 0.4,
        resume: bool = False,
    ) -> dict[str, Any]:
        """The moments of a call's set-up, and the relays that its answer names, best first. With
        `resume` it goes on with the call before."""
        query = f"?resume={self._hang_up[0].split('/')[-2]}" if resume else ""
        self._events.clear()
        self._states.clear()
        pc = self._pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        connected = asyncio.Event()

        def changed() -> None:
            self._states.append((time.monotonic(), pc.connectionState))
            if pc.connectionState == "connected":
                connected.set()

        pc.on("connectionstatechange", changed)
        channel = pc.createDataChannel("oai-events")

        def opened() -> None:
            session = {"type": "realtime", "audio": {"input": {"turn_detection": DETECTION}}}
            channel.send(json.dumps({"type": "session.update", "session": session}))

        channel.on("open", opened)
        channel.on("message", self._heard)
        pc.on("track", self._listen)
        pc.addTrack(Talker(talk_s, pause_s))
        await pc.setLocalDescription(await pc.createOffer())
        words = {"Authorization": f"Bearer {key}", **(headers or {})}
        posted = time.monotonic()
        async with (
            aiohttp.ClientSession() as http,  # a fresh connection, as a page's first request has
            http.post(
                url + CALLS + query,
                data=pc.localDescription.sdp,
                headers={**words, "Content-Type": "application/sdp"},
            ) as response,
        ):
            answer = await response.text()
            if response.status != 201:
                raise RuntimeError(f"signaling answered {response.status}: {answer}")
            self._hang_up = f"{url}{response.headers['Location']}/hangup", words
        answered = time.monotonic()
        await pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        await asyncio.wait_for(connected.wait(), PATIENCE_S)
        return {
            "posted": posted,
            "answered": answered,
            "connected": self._states[-1][0],
            "relays": relays(answer),
            "by": self._pair()[0],
        }

    async def _checks(self, count: int = 5) -> list[float]:
        """Round trips of STUN checks in milliseconds, on the pair that carries the call."""
        _, pair, connection = self._pair()
        found = []
        for _ in range(count):
            request = connection.build_request(pair, nominate=False)
            begun = time.monotonic()
            await pair.protocol.request(
                request,
                pair.remote_addr,
                integrity_key=connection.remote_password.encode(),
                retransmissions=0,
            )
            found.append((time.monotonic() - begun) * 1e3)
        return found

    async def _until(self, event: str, count: int = 1, most_s: float = 60.0) -> float:
        """When it was seen that an event has come so often (time.monotonic)."""
        async with asyncio.timeout(most_s):
            while self._events[event] < count:
                await asyncio.sleep(0.005)
        return time.monotonic()

    async def _state(self) -> dict[str, Any]:
        """What the call has come to."""
        assert self._pc is not None
        by = self._pair()[0] if self._pc.connectionState == "connected" else ""
        return {
            "state": self._pc.connectionState,
            "states": self._states,
            "events": dict(self._events),
            "by": by,
        }

    async def _hangup(self) -> str:
        if self._pc is None:
            return "there is none"
        url, headers = self._hang_up
        said = ""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http,
                http.post(url, headers=headers) as response,
            ):
                said = str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            said = repr(error)
        await self._pc.close()
        self._pc = None
        return said

    def _pair(self) -> tuple[str, Any, Any]:
        """The address that the call goes to, the pair, and aioice's connection."""
        assert self._pc is not None
        transport = self._pc.getTransceivers()[0].receiver.transport.transport
        connection = transport._connection
        pair = connection._nominated.get(1)
        return (pair.remote_addr[0] if pair else ""), pair, connection

    def _heard(self, message: str | bytes) -> None:
        event = json.loads(message)
        self._events[str(event.get("type"))] += 1

    def _listen(self, track: MediaStreamTrack) -> None:
        async def listen() -> None:
            try:
                while True:
                    await track.recv()
            except Exception:  # aiortc ends a track by raising from recv
                return

        task = asyncio.ensure_future(listen())
        self._sinks.add(task)
        task.add_done_callback(self._sinks.discard)


def relays(answer: str) -> list[str]:
    """The addresses of an answer's candidates, by their priority."""
    rows = [row.split() for row in answer.splitlines() if row.startswith("a=candidate:")]
    ordered = sorted(rows, key=lambda row: -int(row[3]))
    return list(dict.fromkeys(row[4] for row in ordered))


def _echo_request(number: int, mark: bytes) -> bytes:
    """RFC 792."""
    head = struct.pack("!BBHHH", _ICMP_ECHO, 0, 0, os.getpid() & 0xFFFF, number)
    total = sum(struct.unpack(f"!{len(head + mark) // 2}H", head + mark))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:] + mark


async def main() -> None:
    """Do as told until standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    visitor = Visitor()
    print(json.dumps({"ready": True}), flush=True)
    while line := await reader.readline():
        try:
            answer = {"is": await visitor.do(json.loads(line))}
        except Exception as error:  # whatever went wrong is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
