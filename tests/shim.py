"""Helpers of the tests that speak WebRTC: a relay in miniature and a client as users have it.

The relay is one socket towards clients and one towards the transceiver in the test's own event
loop, putting the header in front and taking it off; it keeps no flows and checks nothing. Its taps
see, change and drop datagrams. The client is aiortc's RTCPeerConnection, unmodified.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from aiortc import RTCCertificate, RTCConfiguration, RTCPeerConnection, RTCSessionDescription

import frame

WAIT_S = 20.0
"""How long a test waits for something that must happen before it counts as failed."""


def udp_socket(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound, non-blocking UDP socket."""
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.setblocking(False)
    found.bind((host, port))
    return found


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Let the event loop turn until `condition` holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


class Shim:
    """The relay in miniature."""

    def __init__(self, transceiver: tuple[str, int], host: str = "127.0.0.1") -> None:
        self.transceiver = transceiver
        self.front = udp_socket()
        self.back = udp_socket(host)
        self.up: Callable[[bytes], bytes | None] = lambda datagram: datagram
        """Tap on what clients send; None drops it."""
        self.down: Callable[[bytes], bytes | None] = lambda datagram: datagram
        """Tap on what the transceiver sends, without the header."""
        self.seen_as: Callable[[tuple[str, int]], tuple[str, int]] = lambda client: client
        """The address that a client appears under: another one is another network."""
        self.sent_to: Callable[[tuple[str, int]], Any] = lambda client: None
        """Hears the address, as the transceiver knows it, of whatever goes to a client."""
        self.clients: dict[tuple[str, int], tuple[str, int]] = {}
        """Real addresses of clients by the one they appear under."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.front, self._upward)
        loop.add_reader(self.back, self._downward)

    @property
    def address(self) -> tuple[str, int]:
        """Where clients send."""
        return self.front.getsockname()

    def _upward(self) -> None:
        datagram, client = self.front.recvfrom(2048)
        passed = self.up(datagram)
        if passed is not None:
            seen = self.seen_as(client)
            self.clients[seen] = client
            self.back.sendto(frame.header(*seen) + passed, self.transceiver)

    def inject(self, datagrams: list[bytes], seen: tuple[str, int] | None = None) -> None:
        """Send datagrams upward as if a client had (the only one, unless `seen` says which)."""
        header = frame.header(*(seen or next(iter(self.clients))))
        for datagram in datagrams:
            self.back.sendto(header + datagram, self.transceiver)

    def _downward(self) -> None:
        datagram = self.back.recv(2048)
        passed = self.down(datagram[frame.HEADER_OCTETS :])
        seen = frame.client(datagram)
        self.sent_to(seen)
        client = self.clients.get(seen)
        if passed is not None and client is not None:
            self.front.sendto(passed, client)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in (self.front, self.back):
            loop.remove_reader(sock)
            sock.close()


class Client:
    """A WebRTC client as users have it."""

    def __init__(
        self, certificate: RTCCertificate | None = None, label: str = "oai-events"
    ) -> None:
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        if certificate is not None:
            self.pc._RTCPeerConnection__certificates = [certificate]
        self.channel = self.pc.createDataChannel(label)
        self.messages: list[str] = []
        self.track: Any = None
        self.channel.on("message", self.messages.append)
        self.pc.on("track", self._track)

    def _track(self, track: Any) -> None:
        self.track = track

    async def offer(self, sends: Any = None) -> str:
        """The offer, with the track `sends` or else with audio that is only received."""
        if sends is None:
            self.pc.addTransceiver("audio", direction="recvonly")
        else:
            self.pc.addTrack(sends)
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def accept(self, answer: str) -> None:
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def close(self) -> None:
        await self.pc.close()
