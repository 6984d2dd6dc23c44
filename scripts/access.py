"""A caller on one of the four ways in (doors.py): its socket, what it does first, and how it talks.

Every caller has a socket of its own, as real clients have: the ways differ in what it sends to, and
in what it has to ask for before it may. A TURN client's datagrams go into the TURN server's and
come out of them (turning.py). For set-up over a distance each caller has a lane with delay of its
own (lane.py) between itself and what faces the public.

Times of arrival are the kernel's, so that a round trip does not contain what this process does
meanwhile: from before a check is sent until its answer is there.

RFC 8445 (ICE), socket(7) for SO_TIMESTAMPNS.
"""

import asyncio
import contextlib
import enum
import itertools
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, ClassVar

import aiohttp
import callers
import lane
import turning
from aiortc.rtcdtlstransport import RTCCertificate
from doors import NAMES, Address, Estate, Way

import stun

Condition = Callable[[], bool]

NOWHERE = "127.0.0.1", 9
"""Where a lane leads before it is known where to: the discard port."""

READ_MAX = 256
"""Datagrams read in one turn of the event loop."""

GOODBYE_S = 1.0
"""For an end that the other side hears of; it may be gone."""

SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")  # socket(7), of the kernel's time of arrival


_END = callers.TURN_PACKETS + callers.PAUSE_PACKETS


class Turns(enum.Enum):
    """How callers talk; the value is where in a turn they begin (None: anywhere from there on), and
    where they go on after its end."""

    BRISK = None, _END - 100
    """The last two seconds of a turn, with its pause, again and again, everyone at another place:
    packets flow both ways most of the time, and all are answered soon."""
    SHORT = _END - 50, _END - 50
    """The same with one second."""
    ONE = 0, callers.TURN_PACKETS
    """One whole turn, all at once, and then nothing but silence: the replies last as long, without
    a gap."""


class Caller(callers.Caller):
    """A caller that also times checks of its own: from before one is sent until the kernel has its
    answer."""

    def __init__(self, line: "Access", number: int) -> None:
        super().__init__(line, number)
        self.trips_ns: list[int] = []
        self._answered_ns = 0
        self._pending: dict[bytes, int] = {}
        self._again = 0

    def probe(self) -> None:
        """Send a check whose answer is timed."""
        transaction = os.urandom(12)
        ufrag, password = self._remote
        check = stun.request(transaction, f"{ufrag}:{self.ufrag}", password)
        self._pending[transaction] = time.time_ns()
        self._line.send(self.key, check)

    def talks(self, turns: Turns) -> None:
        """Talk like that from now on."""
        begin, self._again = turns.value
        if begin is None:
            begin = self._again + secrets.randbelow(_END - self._again)
        self._phase = begin

    def send(self) -> None:
        """See callers.Caller."""
        super().send()
        if not self._phase:  # the turn has ended
            self._phase = self._again

    async def hang_up(self) -> None:
        """End DTLS, with its task."""
        if self._sctp is not None:
            await self._sctp.stop()
        await self._dtls.stop()

    def heard_since(self, at_ns: int) -> bool:
        """Whether audio has come since then (nanoseconds of the wall clock)."""
        return len(self.arrivals) > 0 and self.arrivals[-2] > at_ns

    def answered_since(self, at_ns: int) -> bool:
        """Whether a check was answered since then."""
        return self._answered_ns > at_ns

    def silence_ms(self, at_ns: int) -> float:
        """From the last packet of audio before a moment to the first one after it; 0 without."""
        times = self.arrivals[::2]
        after = next((index for index, each in enumerate(times) if each > at_ns), 0)
        return (times[after] - times[after - 1]) / 1e6 if after else 0.0

    def received(self, payload: bytes, at_ns: int) -> None:
        """See callers.Caller."""
        if payload[:2] == b"\x01\x01":
            self._answered_ns = at_ns
            begun = self._pending.pop(payload[8:20], None)
            if begun is not None:
                self.trips_ns.append(at_ns - begun)
        super().received(payload, at_ns)


class Access:
    """The socket of one caller, and the way that it goes: its callers.Wire."""

    _spoken: ClassVar[dict[int, list[bytes]]] = {}
    """What all of them say, encoded once for each rate."""

    def __init__(self, estate: Estate, way: Way, delay_s: float | None = None) -> None:
        """With a delay it goes through a lane of its own."""
        self.loop = asyncio.get_running_loop()
        self.certificate = RTCCertificate.generateCertificate()
        self.errors: list[str] = []
        self.sent_to: set[Address] = set()
        """The public addresses that the client has sent to."""
        self.answer_ns = 0
        """When the answer was there, nanoseconds of the wall clock."""
        self.allocated_s = 0.0
        """How long a TURN server's allocation took."""
        self.way, self._estate, self._call = way, estate, ""
        self.turn = turning.Client(self._out) if way is Way.TURN else None
        self._peer: Address | None = None
        self._public = NOWHERE if estate.coturn is None else estate.coturn.address
        self._lane = None if delay_s is None else lane.Lane(self._public, delay_s=delay_s)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.address: Address = self._socket.getsockname()
        self.loop.add_reader(self._socket, self._readable)
        self.who = Caller(self, 0)

    async def connect(
        self, http: aiohttp.ClientSession, url: str | None = None, public: Address | None = None
    ) -> None:
        """Allocate, where that is due, offer, connect, open the channel. Raises TimeoutError and
        ConnectionError, each with the way and what did not happen."""
        try:
            await self._connect(http, url, public)
        except TimeoutError as error:
            raise TimeoutError(f"{NAMES[self.way]}: {error or 'a call did not connect'}") from error
        except (aiohttp.ClientError, OSError, KeyError, ValueError) as error:
            raise ConnectionError(f"{NAMES[self.way]}: {error!r}") from error

    async def _connect(
        self, http: aiohttp.ClientSession, url: str | None, public: Address | None
    ) -> None:
        if self.turn is not None:
            begun = time.monotonic()
            await self.turn.allocate()
            self.allocated_s = time.monotonic() - begun
        named = public or self._estate.public(self.way)
        target = url or self._estate.control(self.way)

        async def post(request: dict[str, Any]) -> str:
            request["candidates"] = [list(named)]
            async with http.post(target, json=request) as response:
                if response.status != 201:
                    raise ConnectionError(f"{response.status}: {await response.text()}")
                opened = await response.json(content_type=None)
            self.answer_ns = time.time_ns()
            self._call = f"{target}/{opened['call_id']}"
            return str(opened["answer"])

        await self.who.call(post)

    async def hang_up(self, http: aiohttp.ClientSession) -> None:
        """End the call, also at the servers if they are there and have it."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self.who.hang_up(), GOODBYE_S)
        if self.turn is not None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(self.turn.release(), GOODBYE_S)
        if self._call:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.delete(self._call):
                    self._call = ""

    async def allocate_anew(self) -> None:
        """Become a TURN client again whose server has forgotten it. Raises turning.TurnError."""
        assert self.turn is not None and self._peer is not None  # it was one, and connected
        self.turn.forget()
        await self.turn.allocate()
        self.turn.turn_to(self._peer)

    def payloads(self, rate_hz: int) -> list[bytes]:
        """See callers.Wire."""
        if rate_hz not in self._spoken:
            self._spoken[rate_hz] = callers.speech(rate_hz)
        return self._spoken[rate_hz]

    def register(self, _: callers.Caller, candidates: list[Address]) -> None:
        """See callers.Wire: the answer's candidate is gone to in this way."""
        if self.turn is not None:
            self._peer = candidates[0]
            self.turn.turn_to(candidates[0])
            return
        self._public = candidates[0]
        if self._lane is not None:
            self._lane.to = candidates[0]

    def forget(self, _: callers.Caller) -> None:
        """See callers.Wire: this socket has no other caller."""

    def send(self, _: Any, payload: bytes) -> None:
        """See callers.Wire."""
        if self.turn is None:
            self._out(payload)
        else:
            self.turn.send(payload)

    def close(self) -> None:
        """End the caller and all that is its."""
        self.who.end()
        self.loop.remove_reader(self._socket)
        self._socket.close()
        if self.turn is not None:
            self.turn.close()
        if self._lane is not None:
            self._lane.close()

    def _out(self, datagram: bytes) -> None:
        """Send to what faces the public, through the lane if there is one."""
        self.sent_to.add(self._public)
        with contextlib.suppress(OSError):  # it has gone, or a buffer is full: it will be missed
            self._socket.sendto(datagram, self._lane.address if self._lane else self._public)

    def _readable(self) -> None:
        for _ in range(READ_MAX):
            try:
                datagram, ancillary, _, _ = self._socket.recvmsg(2048, 64)
            except OSError:  # nothing more, or an ICMP error of something sent: recv(2)
                return
            payload = datagram if self.turn is None else self.turn.received(datagram)
            if payload:
                seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
                self.who.received(payload, seconds * 1_000_000_000 + nanoseconds)


AT_ONCE = 4
"""Calls being set up at a time."""


@contextlib.asynccontextmanager
async def calls(
    estate: Estate, way: Way, number: int, http: aiohttp.ClientSession, turns: Turns
) -> AsyncIterator[list[Access]]:
    """So many calls that are connected, and may talk. Raises what Access.connect raises."""
    room = asyncio.Semaphore(AT_ONCE)
    found = [Access(estate, way) for _ in range(number)]

    async def one(access: Access) -> None:
        async with room:
            await access.connect(http)

    try:
        await gathered(map(one, found))
        for access in found:
            access.who.start()
            access.who.talks(turns)
        yield found
    finally:
        try:
            await gathered(access.hang_up(http) for access in found)
        finally:
            for access in found:
                access.close()


async def gathered(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them; the first that fails ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def talk(accesses: list[Access], seconds: float) -> int:
    """All callers speak, evenly spread over the 20 ms; returns the packets sent."""
    loop, count = asyncio.get_running_loop(), len(accesses)
    step_s, sent = callers.FRAME_MS / 1000 / count, 0
    begun = loop.time()
    while (now := loop.time()) - begun < seconds:
        due = int((now - begun) / step_s)
        while sent < due:
            accesses[sent % count].who.send()
            sent += 1
        await asyncio.sleep(0.001)
    return sent


async def probe(accesses: list[Access], every_s: float) -> None:
    """Send timed checks, one caller after the other, until it is cancelled."""
    for access in itertools.cycle(accesses):
        access.who.probe()
        await asyncio.sleep(every_s)
