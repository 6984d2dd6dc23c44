"""The same server as a transceiver, written as aiortc's documentation shows it: a yardstick.

One RTCPeerConnection a call, its track resampled to the model's rate, the built-in parrot behind it
and a track that plays what the parrot says, events on the data channel. No relay: it answers with
addresses of its own, on loopback.

usage: stock.py PORT     then POST /v1/sessions {"offer", "session"} as at a transceiver
"""

import asyncio
import contextlib
import fractions
import secrets
import sys
import time
from typing import Any

import aioice.ice
import orjson
from aiohttp import web
from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCSessionDescription,
)
from av import AudioFrame
from av.audio.resampler import AudioResampler

import parrot

TICK_S = 0.05


class Reply(MediaStreamTrack):
    """What the parrot says, 20 ms at a time, silence in between."""

    kind = "audio"

    def __init__(self, rate_hz: int) -> None:
        super().__init__()
        self.pcm = bytearray()
        self._rate_hz, self._sent, self._start = rate_hz, 0, 0.0

    async def recv(self) -> AudioFrame:
        """The next frame, paced on the clock."""
        now = time.monotonic()
        self._start = self._start or now
        await asyncio.sleep(max(0.0, self._start + self._sent / self._rate_hz - now))
        samples = self._rate_hz // 50
        piece = bytes(self.pcm[: 2 * samples]).ljust(2 * samples, b"\0")
        del self.pcm[: 2 * samples]
        frame = AudioFrame(format="s16", layout="mono", samples=samples)
        frame.planes[0].update(piece)
        frame.sample_rate, frame.pts = self._rate_hz, self._sent
        frame.time_base = fractions.Fraction(1, self._rate_hz)
        self._sent += samples
        return frame


class Call:
    """One call."""

    def __init__(self, session: dict[str, Any] | None) -> None:
        self.mind = parrot.Parrot(secrets.token_hex(6), session)
        self.reply = Reply(self.mind.rate_hz)
        self.channel: RTCDataChannel | None = None
        self.early: list[dict[str, Any]] = []
        configuration = RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        self.peer = RTCPeerConnection(configuration)
        self.peer.on("track", lambda track: asyncio.ensure_future(self.listen(track)))
        self.peer.on("datachannel", self.opened)
        self.pass_on(self.mind.start())

    def opened(self, channel: RTCDataChannel) -> None:
        """The caller's channel."""
        self.channel = channel
        self.pass_on(self.early)

    async def listen(self, track: MediaStreamTrack) -> None:
        """What the caller says, to the parrot."""
        resampler = AudioResampler(format="s16", layout="mono", rate=self.mind.rate_hz)
        with contextlib.suppress(Exception):  # aiortc ends a track by raising from recv
            while True:
                heard = await track.recv()
                assert isinstance(heard, AudioFrame)
                for piece in resampler.resample(heard):
                    pcm = bytes(piece.planes[0])[: 2 * piece.samples]
                    self.pass_on(self.mind.receive_audio(pcm, time.monotonic()))

    def pass_on(self, events: list[dict[str, Any]]) -> None:
        """Audio to the track, the rest to the channel."""
        for event in events:
            if event["type"] == "response.output_audio.delta":
                self.reply.pcm += event["delta"]
            elif self.channel is None:
                self.early.append(event)  # session.created is among them
            elif self.channel.readyState == "open":
                self.channel.send(orjson.dumps(event).decode())


async def main(port: int) -> None:
    """Serve until killed."""
    # Loopback alone: aioice would leave it out.
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
    calls: list[Call] = []

    async def create(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        call = Call(body.get("session"))
        calls.append(call)
        await call.peer.setRemoteDescription(RTCSessionDescription(body["offer"], "offer"))
        call.peer.addTrack(call.reply)
        await call.peer.setLocalDescription(await call.peer.createAnswer())
        answer = {"call_id": str(len(calls)), "answer": call.peer.localDescription.sdp}
        return web.Response(body=orjson.dumps(answer), status=201)

    application = web.Application()
    application.router.add_post("/v1/sessions", create)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("stock ready", flush=True)
    while True:
        await asyncio.sleep(TICK_S)
        now = time.monotonic()
        for call in calls:
            call.pass_on(call.mind.tick(now))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
