"""One call to a running system, made as users make it, and one line of JSON about it.

The client is aiortc's RTCPeerConnection as it comes from the package index: nothing in it knows of
Earshot. It posts an offer, speaks a recorded sentence, listens to what comes back, hangs up.

    answer_ms               offer posted to answer in hand
    connected_ms            offer posted to ICE and DTLS connected, as the client sees it
    first_audio_ms          offer posted to the first packet of audio from the other side
    reply_after_silence_ms  last sample of speech sent to first packet of the reply received, less
                            the configured silence_duration_ms
    echo_correlation        peak of the normalised cross-correlation of what was said and what came
                            back, 0 to 1: speech that is not the same stays under 0.3
    ok                      all of it happened, in the right order, and the correlation is over 0.6

usage: check.py PAGE_URL [SILENCE_DURATION_MS]
"""

import asyncio
import contextlib
import fractions
import json
import sys
import time
import wave
from dataclasses import dataclass, field
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
SILENCE_DURATION_MS = 500
"""What the session is told to wait for, unless the command line says another pause; the default of
the protocol, said out loud."""
CORRELATION_MIN = 0.6
CALL_SECONDS_MAX = 30.0

# The order in which a turn's events must come (others may stand between them).
TURN = (
    "session.created",
    "session.updated",
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "response.created",
    "output_audio_buffer.started",
    "response.done",
    "output_audio_buffer.stopped",
)

Samples = npt.NDArray[np.float64]


class Speaker(MediaStreamTrack):
    """A microphone: silence until `speak`, then the sentence once, then silence."""

    kind = "audio"

    def __init__(self, sentence: npt.NDArray[np.int16]) -> None:
        super().__init__()
        self.sentence = sentence
        self.spoken_at: float | None = None
        """When the frame with the last sample of speech was handed to the encoder."""
        self._position: int | None = None
        self._sent = 0
        self._start = 0.0

    def speak(self) -> None:
        """Begin the sentence with the next frame."""
        self._position = 0

    async def recv(self) -> AudioFrame:
        """The next 20 ms, paced on the wall clock."""
        now = time.monotonic()
        self._start = self._start or now
        await asyncio.sleep(max(0.0, self._start + self._sent / RATE_HZ - now))
        piece = np.zeros(FRAME_SAMPLES, np.int16)
        if self._position is not None:
            part = self.sentence[self._position : self._position + FRAME_SAMPLES]
            piece[: len(part)] = part
            self._position += FRAME_SAMPLES
            if self._position >= len(self.sentence) and self.spoken_at is None:
                self.spoken_at = time.monotonic()
        frame = AudioFrame.from_ndarray(piece.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE_HZ, self._sent
        frame.time_base = fractions.Fraction(1, RATE_HZ)
        self._sent += FRAME_SAMPLES
        return frame


@dataclass
class Call:
    """What was seen of the call so far."""

    events: list[dict[str, Any]] = field(default_factory=list)
    heard: list[Samples] = field(default_factory=list)
    packets: list[float] = field(default_factory=list)
    """When the count of received packets was first seen to have grown, and by how many."""
    figures: dict[str, Any] = field(default_factory=dict)

    def seen(self, kind: str) -> bool:
        """True once an event of this type has come."""
        return any(event.get("type") == kind for event in self.events)


def sentence() -> npt.NDArray[np.int16]:
    """The recorded sentence, 48 kHz mono, without the silence around it."""
    with wave.open(str(SENTENCE)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    loud = np.flatnonzero(np.abs(samples.astype(int)) > 300)
    return samples[loud[0] : loud[-1] + 1]


def correlation(said: Samples, heard: Samples) -> float:
    """Peak over all shifts of the normalised cross-correlation, 0 to 1; 0 if there is too little.

    Each shift is normalised by the energy of that stretch of `heard`, so that level plays no part.
    """
    if not np.any(heard):
        return 0.0
    # The reply may lack a little at either end: the client's jitter buffer keeps the last of it.
    heard = np.pad(heard, len(said) // 4)
    if len(heard) < len(said):
        return 0.0
    size = 1 << (len(said) + len(heard)).bit_length()
    product = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(said, size)), size)
    shifts = len(heard) - len(said) + 1
    total = np.concatenate(([0.0], np.cumsum(heard**2)))
    energy = total[len(said) :][:shifts] - total[:shifts]
    # Stretches with next to no energy would divide by nothing: they are no match.
    floor = 1e-4 * float(energy.max())
    norm = np.sqrt(np.maximum(energy, floor) * float(np.sum(said**2)))
    return float(np.max(np.abs(product[:shifts]) / norm))


async def until(condition: Any, seconds: float, what: str) -> None:
    """Wait for `condition()`; raises TimeoutError saying what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        await asyncio.sleep(0.002)


async def listen(track: MediaStreamTrack, call: Call) -> None:
    """Collect what the caller hears, as mono samples at 48 kHz."""
    with contextlib.suppress(Exception):  # aiortc ends a track by raising from recv
        while True:
            frame = await track.recv()
            if not isinstance(frame, AudioFrame):
                continue
            samples = frame.to_ndarray().reshape(-1, len(frame.layout.channels))
            call.heard.append(samples.mean(axis=1))


async def count_packets(peer: RTCPeerConnection, call: Call) -> None:
    """Note when packets of audio arrive: the client's own statistics, read every 2 ms."""
    receiver = peer.getTransceivers()[0].receiver
    while True:
        for stats in (await receiver.getStats()).values():
            if stats.type == "inbound-rtp":
                new = stats.packetsReceived - len(call.packets)
                call.packets += [time.monotonic()] * new
        await asyncio.sleep(0.002)


async def connect(
    peer: RTCPeerConnection, http: aiohttp.ClientSession, url: str, call: Call
) -> tuple[str, float]:
    """Post the offer, take the answer, wait until connected. Returns Location and the start."""
    await peer.setLocalDescription(await peer.createOffer())
    start = time.monotonic()
    async with http.post(
        url, data=peer.localDescription.sdp, headers={"Content-Type": "application/sdp"}
    ) as response:
        answer = await response.text()
        if response.status != 201:
            raise RuntimeError(f"signaling answered {response.status}: {answer}")
        location = response.headers["Location"]
    call.figures["answer_ms"] = round((time.monotonic() - start) * 1000, 1)
    await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await until(lambda: peer.connectionState == "connected", 10, "the connection")
    call.figures["connected_ms"] = round((time.monotonic() - start) * 1000, 1)
    return location, start


async def converse(
    peer: RTCPeerConnection, http: aiohttp.ClientSession, page: str, silence_ms: int
) -> Call:
    """The whole call. Raises on whatever goes wrong; the figures so far are in the Call."""
    call = Call()
    speech = sentence()
    speaker = Speaker(speech)
    peer.addTrack(speaker)
    channel = peer.createDataChannel("oai-events")
    channel.on("message", lambda text: call.events.append(json.loads(text)))
    tasks = []
    peer.on("track", lambda track: tasks.append(asyncio.ensure_future(listen(track, call))))
    try:
        base = page.rstrip("/")
        location, start = await connect(peer, http, f"{base}/v1/realtime/calls", call)
        tasks.append(asyncio.ensure_future(count_packets(peer, call)))
        await until(lambda: call.seen("session.created"), 5, "session.created")
        detection = {"type": "server_vad", "silence_duration_ms": silence_ms}
        audio = {"input": {"turn_detection": detection}}
        update = {"type": "session.update", "session": {"type": "realtime", "audio": audio}}
        channel.send(json.dumps(update))
        await until(lambda: call.seen("session.updated"), 5, "session.updated")
        speaker.speak()
        await until(lambda: call.seen("output_audio_buffer.stopped"), 20, "the whole reply")
        await asyncio.sleep(0.4)  # the client's own jitter buffer holds the end of it
        call.figures["first_audio_ms"] = round((call.packets[0] - start) * 1000, 1)
        spoken = speaker.spoken_at or 0.0
        reply = next(at for at in call.packets if at > spoken)
        call.figures["reply_after_silence_ms"] = round((reply - spoken) * 1000 - silence_ms, 1)
        heard = np.concatenate(call.heard) if call.heard else np.zeros(1)
        # A third of the rate holds all of speech and a third of the work.
        call.figures["echo_correlation"] = round(
            correlation(speech[::3].astype(float), heard[::3].astype(float)), 3
        )
        async with http.post(f"{base}{location}/hangup") as response:
            if response.status != 200:
                raise RuntimeError(f"hang-up answered {response.status}")
    finally:
        for task in tasks:
            task.cancel()
    return call


async def main(page: str, silence_ms: int = SILENCE_DURATION_MS) -> dict[str, Any]:
    """The line to print."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        async with aiohttp.ClientSession() as http:
            call = await asyncio.wait_for(converse(peer, http, page, silence_ms), CALL_SECONDS_MAX)
    except Exception as error:  # whatever went wrong is the result
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    finally:
        await peer.close()
    kinds = iter([event.get("type") for event in call.events])
    in_order = all(kind in kinds for kind in TURN)
    well = in_order and call.figures["echo_correlation"] > CORRELATION_MIN
    return {**call.figures, "events_in_order": in_order, "ok": well}


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(f"usage: {sys.argv[0]} PAGE_URL [SILENCE_DURATION_MS]")
    line = asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
    print(json.dumps(line))
    sys.exit(0 if line["ok"] else 1)
