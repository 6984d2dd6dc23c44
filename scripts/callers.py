"""Many callers at once, lean enough that one process speaks for more than a server can carry.

For scripts that measure a media server. A caller does what a browser does on the wire: it offers,
checks with ICE, handshakes with DTLS, opens a data channel, and then sends a packet of speech every
20 ms and takes what comes back. Its packets are recorded once and encrypted anew each time; of what
it receives it reads the RTP header only, with the kernel's time of arrival.

All callers share one socket of one event loop. Towards a transceiver it plays their relay (each
datagram in a frame, every caller an address of its own); towards any other server it is their
host, whose callers are told apart by the server's ports.

RFC 8445 (ICE), RFC 5764 (DTLS-SRTP), RFC 3550 (RTP), socket(7) for SO_TIMESTAMPNS.
"""

import asyncio
import itertools
import json
import secrets
import socket
import struct
import time
import wave
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcdtlstransport import (
    RTCCertificate,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
)
from aiortc.rtcsctptransport import RTCSctpCapabilities, RTCSctpTransport

import frame
import opus
import rtp
import stun

SENTENCE = Path(__file__).resolve().parent.parent / "tests" / "data" / "sentence.wav"
FRAME_MS = 20
TURN_PACKETS, PAUSE_PACKETS = 230, 20
"""Speech and silence of a turn: 5 s in all. With an end of turn after 200 ms of silence the reply,
as long as the speech, is nearly over when the next one begins: packets flow both ways nearly all of
the time."""

SESSION = {
    "type": "realtime",
    "audio": {
        "input": {
            "turn_detection": {
                "type": "server_vad",
                "silence_duration_ms": 200,
                "interrupt_response": False,
            }
        }
    },
}
"""Of a caller: it goes on talking while it is answered."""

LOUD = 300
"""Root mean square of a frame with speech in it: -41 dBFS."""

CHECK_S = 0.05
CONSENT_S = 2.5
REPORT_S = 5.0
"""As browsers do: until connected, then once connected, and RTCP."""

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")
_RTP = struct.Struct(">BBHII")
_OFFER = """v=0
o=- {number} 2 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0 1
a=msid-semantic: WMS *
m=audio 9 UDP/TLS/RTP/SAVPF 111
c=IN IP4 0.0.0.0
a=rtcp:9 IN IP4 0.0.0.0
a=ice-ufrag:{ufrag}
a=ice-pwd:{password}
a=fingerprint:sha-256 {fingerprint}
a=setup:actpass
a=mid:0
a=sendrecv
a=msid:- microphone
a=rtcp-mux
a=rtcp-rsize
a=rtpmap:111 opus/48000/2
a=fmtp:111 minptime=10;useinbandfec=1
a=ssrc:{ssrc} cname:caller
{candidate}m=application 9 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 0.0.0.0
a=ice-ufrag:{ufrag}
a=ice-pwd:{password}
a=fingerprint:sha-256 {fingerprint}
a=setup:actpass
a=mid:1
a=sctp-port:5000
a=max-message-size:262144
"""
_CANDIDATE = "a=candidate:1 1 udp 2130706431 {host} {port} typ host\na=end-of-candidates\n"
STEP_S_MAX = 20.0
"""Of ICE, of DTLS, of the channel: then it does not happen."""


def speech(rate_hz: int) -> list[bytes]:
    """The Opus payloads of a turn, as a browser encodes a voice of that bandwidth."""
    with wave.open(str(SENTENCE)) as file:
        recorded = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        samples = recorded[:: file.getframerate() // rate_hz]
    size = rate_hz // 50
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    # Without the breaks between words, which would be ends of turns.
    spoken = frames[np.sqrt(np.mean(frames.astype(float) ** 2, axis=1)) > LOUD]
    said = np.resize(spoken, (TURN_PACKETS, size))
    turn = np.concatenate((said, np.zeros((PAUSE_PACKETS, size), np.int16)))
    encoder = opus.Encoder(
        rate_hz, bitrate=32_000, application=opus.Application.VOIP, loss_percent=1, complexity=9
    )
    return [encoder.encode(piece.tobytes()) for piece in turn]


class Wire(Protocol):
    """What a caller needs of whatever carries its datagrams: a `Line`, or a socket of its own."""

    loop: asyncio.AbstractEventLoop
    errors: list[str]
    address: tuple[str, int]

    @property
    def certificate(self) -> RTCCertificate:
        """Of the DTLS."""

    def payloads(self, rate_hz: int) -> list[bytes]:
        """What is said to a server that wants that rate."""

    def register(self, caller: "Caller", candidates: list[tuple[str, int]]) -> Any:
        """The key by which to send to that caller's server."""

    def forget(self, caller: "Caller") -> None:
        """No more of this caller."""

    def send(self, key: Any, payload: bytes) -> None:
        """One datagram of a caller."""


class Caller:
    """One caller. Towards aiortc's DTLS it plays the ICE transport, as peer.Peer does."""

    role = "controlling"

    def __init__(self, line: "Wire", number: int) -> None:
        self._line, self.number = line, number
        self.ufrag, self.password = secrets.token_hex(4), secrets.token_hex(12)
        self.ssrc = secrets.randbits(32)
        self.key: Any = None
        """What `Line` finds it by."""
        self.connected_s = 0.0
        self.events = 0
        self.arrivals = array("q")
        """When an RTP packet came, in nanoseconds of the wall clock; its timestamp; and so on."""
        self.lost = 0
        self._last_sequence = -1
        self._phase = secrets.randbelow(TURN_PACKETS + PAUSE_PACKETS)
        self._sequence, self._timestamp = secrets.randbits(15), secrets.randbits(32)
        self._sent = self._octets = 0
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._connected = asyncio.Event()
        self._remote: tuple[str, bytes] = ("", b"")
        self._timers: list[asyncio.TimerHandle] = []
        self._dtls = RTCDtlsTransport(self, [line.certificate])  # type: ignore[arg-type]
        self._sctp: RTCSctpTransport | None = None
        self.channel: RTCDataChannel | None = None
        self._protect: Callable[[bytes], bytes] | None = None
        self._payloads: list[bytes] = []

    async def call(self, post: Callable[[dict[str, Any]], Awaitable[str]]) -> None:
        """Offer, connect, open the channel; returns with both done. Raises as `connect`."""
        host, port = self._line.address
        offer = self.offer(_CANDIDATE.format(host=host, port=port))
        request = {"offer": offer, "session": SESSION, "candidates": [[host, port]]}
        await self.connect(await post(request))

    def offer(self, candidate: str = "") -> str:
        """The offer, with the lines of a candidate or without any."""
        certificate = self._line.certificate
        fingerprint = next(
            f.value for f in certificate.getFingerprints() if f.algorithm == "sha-256"
        )
        return _OFFER.format(
            number=secrets.randbits(60),
            ufrag=self.ufrag,
            password=self.password,
            fingerprint=fingerprint,
            ssrc=self.ssrc,
            candidate=candidate,
        ).replace("\n", "\r\n")

    async def connect(self, answer: str) -> None:
        """ICE, DTLS, the data channel, as the answer says. Raises TimeoutError with what it was
        that did not happen, ConnectionError if DTLS failed, KeyError or ValueError for an answer
        that is none."""
        line = self._line
        begun = time.monotonic()
        found = attributes(answer)
        self._remote = found["ice-ufrag"], found["ice-pwd"].encode()
        self._payloads = line.payloads(_rate_hz(found))
        self.key = line.register(self, candidates(answer))
        self._check(CHECK_S)
        await _within(self._connected.wait(), "no ICE")
        algorithm, value = found["fingerprint"].split()
        self._dtls._set_role("server" if found["setup"] == "active" else "client")
        fingerprints = [RTCDtlsFingerprint(algorithm, value)]
        await _within(self._dtls.start(RTCDtlsParameters(fingerprints)), "no DTLS")
        if self._dtls.state != "connected":
            raise ConnectionError("the DTLS handshake failed")
        self.connected_s = time.monotonic() - begun
        self.secured()
        sctp = self._sctp = RTCSctpTransport(self._dtls, 5000)
        await sctp.start(RTCSctpCapabilities(maxMessageSize=262_144), 5000)
        channel = self.channel = RTCDataChannel(sctp, RTCDataChannelParameters(label="oai-events"))
        opened = asyncio.Event()
        channel.on("open", opened.set)
        channel.on("message", self._event)
        await _within(opened.wait(), "no channel")

    def secured(self) -> None:
        """There are keys: for those who begin to speak before there is a channel."""

    def start(self) -> None:
        """Begin to send what `Line` asks for."""
        self._protect = self._dtls._tx_srtp.protect
        self._report()

    def send(self) -> None:
        """The next packet of speech."""
        payload = self._payloads[self._phase]
        self._phase = (self._phase + 1) % len(self._payloads)
        self._sequence = self._sequence + 1 & 0xFFFF
        self._timestamp = self._timestamp + 960 & 0xFFFFFFFF
        self._sent += 1
        self._octets += len(payload)
        if self._protect is not None:
            packet = rtp.write(111, self._sequence, self._timestamp, self.ssrc, payload)
            self._line.send(self.key, self._protect(packet))

    def received(self, payload: bytes, at_ns: int) -> None:
        """A datagram of the server's."""
        first = payload[0]
        if first >= 0x80:
            if 192 <= payload[1] <= 223:  # RTCP
                return
            _, _, sequence, timestamp, _ = _RTP.unpack_from(payload)
            if self._last_sequence >= 0:
                ahead = sequence - self._last_sequence & 0xFFFF
                if ahead >= 0x8000:  # overtaken, or a copy
                    ahead, sequence = 1, self._last_sequence
                self.lost += max(0, ahead - 1)
            self._last_sequence = sequence
            self.arrivals.extend((at_ns, timestamp))
        elif first >= 20:
            self._inbox.put_nowait(payload)
        elif payload[1] == 1 and payload[0] == 1:  # a Binding success
            self._connected.set()
        elif payload[:2] == b"\x00\x01":  # a full agent checks us, too
            host, port = self._line.address
            answer = stun.success(payload[8:20], host, port, self.password.encode())
            self._line.send(self.key, answer)

    def end(self) -> None:
        """Fall silent; the server finds out by itself."""
        for timer in self._timers:
            timer.cancel()
        self._line.forget(self)

    def _event(self, message: str | bytes) -> None:
        self.events += 1
        event = json.loads(message)
        if event.get("type") == "error":
            self._line.errors.append(str(event["error"].get("code")))

    def _check(self, again_s: float) -> None:
        ufrag, password = self._remote
        name = f"{ufrag}:{self.ufrag}"
        self._line.send(self.key, stun.request(secrets.token_bytes(12), name, password))
        wait_s = CONSENT_S if self._connected.is_set() else again_s
        self._later("check", wait_s, lambda: self._check(again_s))

    def _report(self) -> None:
        sender = rtp.Sender(
            self.ssrc, rtp.ntp(time.time()), self._timestamp, self._sent, self._octets
        )
        packet = rtp.sender_report(sender, [], "caller")
        self._line.send(self.key, self._dtls._tx_srtp.protect_rtcp(packet))
        self._later("report", REPORT_S, self._report)

    def _later(self, _: str, delay_s: float, what: Callable[[], None]) -> None:
        self._timers = [timer for timer in self._timers if timer.when() > self._line.loop.time()]
        self._timers.append(self._line.loop.call_later(delay_s, what))

    async def _recv(self) -> bytes:
        return await self._inbox.get()

    async def _send(self, datagram: bytes) -> None:
        self._line.send(self.key, datagram)


class Line:
    """The socket of many callers."""

    def __init__(self, framed: bool) -> None:
        """`framed`: towards a transceiver, each datagram in a relay's frame."""
        self.loop = asyncio.get_running_loop()
        self.certificate = RTCCertificate.generateCertificate()
        self.callers: list[Caller] = []
        self.errors: list[str] = []
        """The codes of error events that came."""
        self.sent = 0
        self._framed = framed
        self._server: tuple[str, int] | None = None
        self._by_key: dict[Any, Caller] = {}
        self._cache: dict[int, list[bytes]] = {}
        self._numbers = itertools.count()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self.loop.add_reader(self._socket, self._readable)

    def towards(self, server: tuple[str, int]) -> None:
        """Where a transceiver is: its answers name a relay."""
        self._server = server

    def payloads(self, rate_hz: int) -> list[bytes]:
        """What callers say who were asked for that rate."""
        if rate_hz not in self._cache:
            self._cache[rate_hz] = speech(rate_hz)
        return self._cache[rate_hz]

    def caller(self) -> Caller:
        """One more caller."""
        found = Caller(self, next(self._numbers))
        self.callers.append(found)
        return found

    def register(self, caller: Caller, candidates: list[tuple[str, int]]) -> Any:
        """The key of a caller whose answer names these candidates."""
        key: Any = candidates[0]
        if self._framed:
            number = caller.number
            key = frame.header(f"198.18.{number >> 8 & 255}.{number & 255}", 40_000)
        self._by_key[key] = caller
        return key

    def forget(self, caller: Caller) -> None:
        """No more of this one."""
        self._by_key.pop(caller.key, None)

    def send(self, key: Any, payload: bytes) -> None:
        """One datagram of a caller."""
        self.sent += 1
        try:
            if self._framed:
                self._socket.sendto(key + payload, self._server or ("", 0))
            else:
                self._socket.sendto(payload, key)
        except OSError:  # the server has gone, or a buffer is full: it will be missed
            pass

    def close(self) -> None:
        """End all callers."""
        for caller in self.callers:
            caller.end()
        self.loop.remove_reader(self._socket)
        self._socket.close()

    async def talk(self, seconds: float) -> int:
        """All callers speak, evenly spread over the 20 ms; returns the packets sent."""
        step_s, sent = FRAME_MS / 1000 / len(self.callers), 0
        begun = self.loop.time()
        while (now := self.loop.time()) - begun < seconds:
            due = int((now - begun) / step_s)
            while sent < due:
                self.callers[sent % len(self.callers)].send()
                sent += 1
            await asyncio.sleep(0.001)
        return sent

    def _readable(self) -> None:
        receive, framed, by_key = self._socket.recvmsg, self._framed, self._by_key
        for _ in range(256):
            try:
                datagram, ancillary, _, source = receive(2048, 64)
            except OSError:
                return
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            key = datagram[: frame.HEADER_OCTETS] if framed else source
            caller = by_key.get(key)
            if caller is not None:
                payload = datagram[frame.HEADER_OCTETS :] if framed else datagram
                caller.received(payload, seconds * 1_000_000_000 + nanoseconds)


def lateness_ms(arrivals: "array[int]", since_ns: int) -> npt.NDArray[np.float64]:
    """How late each packet came, against the quickest one of its utterance.

    A pause begins another utterance: where timestamps go on by more than a frame, the grid starts
    anew with the packet behind it.
    """
    pairs = np.array(arrivals, np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] >= since_ns]
    if len(pairs) < 2:
        return np.zeros(0)
    steps = np.diff(pairs[:, 1]) & 0xFFFFFFFF
    found = []
    for part in np.split(pairs, np.flatnonzero(steps != 960) + 1):
        since_first = (part[:, 1] - part[0, 1]) & 0xFFFFFFFF
        late = (part[:, 0] - part[0, 0]) / 1e6 - since_first / 48.0
        found.append(late - late.min())
    return np.concatenate(found)


def candidates(answer: str) -> list[tuple[str, int]]:
    """Where an answer can be reached over UDP, as it names them. Raises ValueError if nowhere."""
    found = [
        (words[4], int(words[5]))
        for words in map(str.split, answer.splitlines())
        if words and words[0].startswith("a=candidate:") and words[2].lower() == "udp"
    ]
    if not found:
        raise ValueError("the answer names no candidate")
    return list(dict.fromkeys(found))


def attributes(answer: str) -> dict[str, str]:
    """The first value of each attribute of an answer."""
    found: dict[str, str] = {}
    for text in answer.splitlines():
        name, _, value = text.removeprefix("a=").partition(":")
        if text.startswith("a="):
            found.setdefault(name, value)
    return found


async def _within(what: Awaitable[Any], name: str) -> None:
    """Wait for one step. Raises TimeoutError, which has its name."""
    try:
        await asyncio.wait_for(what, STEP_S_MAX)
    except TimeoutError as error:
        raise TimeoutError(name) from error


def _rate_hz(found: dict[str, str]) -> int:
    """What the answer wants its audio encoded for."""
    for part in found.get("fmtp", "").partition(" ")[2].split(";"):
        name, _, value = part.strip().partition("=")
        if name == "maxplaybackrate" and int(value) in opus.RATES_HZ:
            return int(value)
    return 48_000
