"""How long a call takes to be set up over a path with delay: this transceiver and stock aiortc.

The client is aiortc's RTCPeerConnection as it comes, the same for both; between it and the server
lies a delay in user space (lane.py). This transceiver is reached through the real relay; the other
server (stock.py) is an RTCPeerConnection that answers, reached directly. They are called in turns.

All figures are milliseconds from the answer in the client's hand:

    connected         ICE and DTLS are up, as the client sees it
    first_audio       the first packet of audio from the server has reached the client
    heard             the client's first packet has authenticated at the server
    channel_open      the data channel is open at the client
    session_created   the first event has reached the client

Two round trips are the least that ICE and DTLS 1.2 need; the client's first packet needs half a one
more to be heard, and its channel two (SCTP), and half a one (the open message).

usage: setup_times.py [DELAY_MS] [CALLS]          one line of JSON
"""

import asyncio
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import dev
import lane
import stock
from aiortc import (
    RTCConfiguration,
    RTCPeerConnection,
    RTCSessionDescription,
    rtcdtlstransport,
)
from aiortc.mediastreams import AudioStreamTrack

import session
import settings
import stun
import transceiver

FIGURES = ("connected", "first_audio", "heard", "channel_open", "session_created")
PATIENCE_S = 20.0
TRANSCEIVER = """[transceiver]
listen = "{listen}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
"""


# --- the servers, each in a process of its own, with a stopwatch ----------------------------------


def _serve(kind: str, argument: str) -> None:
    """Be a server, and say when the first RTP of each call has authenticated."""

    def say() -> None:
        print(f"heard {time.monotonic()}", flush=True)

    if kind == "earshot":
        received = session.Session.rtp

        def rtp(self: Any, packet: bytes, now: float) -> None:
            if self not in heard:
                heard.add(self)
                say()
            received(self, packet, now)

        heard: set[Any] = set()
        session.Session.rtp = rtp  # type: ignore[method-assign]  # a stopwatch
        asyncio.run(transceiver.serve(settings.load(Path(argument), settings.Transceiver)))
        return
    handle = rtcdtlstransport.RTCDtlsTransport._handle_rtp_data

    async def handled(self: Any, data: bytes, arrival_time_ms: int) -> None:
        if not getattr(self, "heard", False):
            self.heard = True
            say()
        await handle(self, data, arrival_time_ms)

    rtcdtlstransport.RTCDtlsTransport._handle_rtp_data = handled  # type: ignore[method-assign]
    asyncio.run(stock.main(int(argument)))


class Server:
    """One that is called: its control API, where its media goes, and what its stopwatch says."""

    def __init__(self, control: str, media: lane.Address | None, said: Path) -> None:
        self.control, self.media = control, media
        self._said = said

    def heard(self) -> list[float]:
        """When the first packet of each call was heard, in the order of calls."""
        lines = self._said.read_text(errors="replace").splitlines()
        return [float(line.split()[1]) for line in lines if line.startswith("heard ")]


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Both, up; and down again."""
    system = dev.System(folder)
    (public,) = dev.free_ports(1, socket.SOCK_DGRAM)
    internal = dev.free_ports(2, socket.SOCK_DGRAM)[0]
    ours, stock, metrics = dev.free_ports(3, socket.SOCK_STREAM)
    (folder / "keys").write_text("0 " + "42" * 32)
    (folder / "keys").chmod(0o600)
    text = dev.RELAY.format(
        relay=f"127.0.0.1:{public}", internal=internal, metrics=f"127.0.0.1:{metrics}"
    )
    (folder / "relay.toml").write_text(text + dev.CLUSTER)
    text = TRANSCEIVER.format(listen=f"127.0.0.1:{ours}")
    (folder / "transceiver.toml").write_text(text + dev.CLUSTER)
    me = (sys.executable, str(Path(__file__)), "serve")
    try:
        system.start("relay", dev.BIN / "relay", "run", "--config", folder / "relay.toml")
        # Nothing logs there, so that readiness is a connection, below.
        system.start("earshot", *me, "earshot", folder / "transceiver.toml", ready=None)
        system.start("stock", *me, "stock", str(stock))
        _until_listening(ours)
        yield {
            "earshot": Server(
                f"http://127.0.0.1:{ours}", ("127.0.0.1", public), folder / "earshot.log"
            ),
            "stock aiortc": Server(f"http://127.0.0.1:{stock}", None, folder / "stock.log"),
        }
    finally:
        system.stop()


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise dev.StartError("the transceiver did not start") from None
            time.sleep(0.02)
        else:
            return


# --- the client ----------------------------------------------------------------------------------


async def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen")
        await asyncio.sleep(0.002)


def _redirected(answer: str, to: lane.Address) -> tuple[str, lane.Address]:
    """An answer whose one candidate is `to`, and the address that it named."""
    rows, named = [], None
    for row in answer.split("\r\n"):
        if row.startswith("a=candidate:"):
            words = row.split()
            if named is None:
                named = words[4], int(words[5])
                words[4:6] = to[0], str(to[1])
                rows.append(" ".join(words))
        else:
            rows.append(row)
    if named is None:
        raise ValueError("the answer names no address")
    return "\r\n".join(rows), named


async def _call(http: aiohttp.ClientSession, server: Server, delay_s: float) -> dict[str, float]:
    """One call from offer to the first event; its figures in milliseconds."""
    path = lane.Lane(server.media or ("127.0.0.1", 9), delay_s=delay_s)
    before, at = len(server.heard()), dict[str, float]()

    def arrived(datagram: bytes, now: float) -> None:
        if stun.kind(datagram[0]) is stun.Kind.RTP and not stun.is_rtcp(datagram):
            at.setdefault("first_audio", now)

    path.arrived = arrived
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    channel = pc.createDataChannel("oai-events")
    channel.on("open", lambda: at.setdefault("channel_open", time.monotonic()))
    channel.on("message", lambda _: at.setdefault("session_created", time.monotonic()))

    def changed() -> None:
        if pc.connectionState == "connected":
            at.setdefault("connected", time.monotonic())

    pc.on("connectionstatechange", changed)
    try:
        pc.addTrack(AudioStreamTrack())
        await pc.setLocalDescription(await pc.createOffer())
        # Neither server shall find a shorter way than the one under test.
        offer = "\r\n".join(
            row
            for row in pc.localDescription.sdp.split("\r\n")
            if not row.startswith(("a=candidate:", "a=end-of-candidates"))
        )
        request = {"offer": offer, "candidates": [list(path.address)]}
        async with http.post(f"{server.control}/v1/sessions", json=request) as response:
            answer = (await response.json(content_type=None))["answer"]
        if server.media is None:
            answer, path.to = _redirected(answer, path.address)
        start = time.monotonic()
        await pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        await _until(lambda: len(at) == len(FIGURES) - 1, f"something else than {sorted(at)}")
        await _until(lambda: len(server.heard()) > before, "a packet heard")
        at["heard"] = server.heard()[before]
    finally:
        await pc.close()
        path.close()
    return {name: (at[name] - start) * 1000 for name in FIGURES}


async def _measure(servers: dict[str, Server], delay_s: float, calls: int) -> dict[str, Any]:
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    async with aiohttp.ClientSession(trust_env=False) as http:
        for _ in range(calls + 1):
            for name, server in servers.items():
                figures[name].append(await _call(http, server, delay_s))
    return {
        name: {
            kind: round(statistics.median(call[kind] for call in found[1:]), 1) for kind in FIGURES
        }
        for name, found in figures.items()
    }


def measure(delay_ms: float = 50.0, calls: int = 5) -> dict[str, Any]:
    """Medians of so many calls to each server, after one that warms it up. Raises StartError,
    TimeoutError.
    """
    with (
        tempfile.TemporaryDirectory(prefix="earshot-setup-") as folder,
        _servers(Path(folder)) as servers,
    ):
        found = asyncio.run(_measure(servers, delay_ms / 1000, calls))
    return {"round_trip_ms": 2 * delay_ms, "calls": calls, "milliseconds": found}


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(sys.argv[2], sys.argv[3])
    else:
        delay_ms, calls = (*sys.argv[1:], "50", "5")[:2] if len(sys.argv) != 2 else (sys.argv[1], 5)
        print(json.dumps(measure(float(delay_ms), int(calls))))
