"""One complete WebRTC call of a load test: its connection, what it says, what it keeps.

What it owns: `Call`, a conversation and its record, which stays when the call has ended. Its
connection is connection.py's. When the path is dead, and the call was told to come back, it goes on
in another connection (`?resume=`), as the demo page does, and so does the record.

Rules that stay true:
- A call ends once: as it was told to, or with a `failure`. Nothing is raised to whoever runs it.
- What it receives is authenticated (SRTP) before it counts as heard.
- A call looks after its path by what comes, and asks signaling only when less comes than should.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import callers
import connection
import speaking
import target
from connection import Client, Wire
from heard import SILENT_OCTETS_MAX, Heard
from saying import Said, Talk

import rtp

FAILURES = (
    "refused", "unauthorized", "too many", "unavailable", "unreachable", "no answer", "bad answer",
    "forbidden candidate", "no ICE", "no DTLS", "no channel", "no session", "no audio",
    "wrong audio", "lost", "ended by the server",
)  # fmt: skip
"""Why calls fail. `refused`: a status that is none of 401, 403, 429, 503; `no audio`: it talked
long enough, and no reply was heard; `lost`: nothing came any more."""

ANSWER_S_MAX = 10.0
"""For the answer to an offer, as pages have it: the server gives up after eight."""

SESSION_S_MAX = 10.0
LOST_S = 15.0
"""Without anything at all: lost, for a call that does not come back."""

SUSPICIOUS_S, SUSPICIOUS_SOUNDING_S = 1.3, 0.4
"""Silence of the line after which a call that comes back asks whether its server is there, and
while a reply sounds: as web/lifeline.js has them."""

PATH_S, ASK_S, ASK_S_MAX = 5.0, 1.0, 3.5
"""Silence after which a path is given up though the call is there; between two questions; and what
one may take."""

WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Between attempts to come back, as web/call.js has them; then it is lost."""


class Failed(Exception):
    """The call has failed: one of FAILURES, and the sentence behind it."""

    def __init__(self, failure: str, why: str = "") -> None:
        super().__init__(failure, why)
        self.failure, self.why = failure, why


class _Abandoned(Exception):
    """Nobody wants the call any more."""


class Exchange(connection.Exchange, Protocol):
    """What a call needs of the engine (ringing.Ringing)."""

    http: aiohttp.ClientSession
    base: str
    key: str | None
    comes_back: bool
    voice: speaking.Voice


@dataclass
class Return:
    """How a call came back; nanoseconds of time.monotonic_ns(), None for what has not happened."""

    heard_ns: int
    """The last packet of audio before."""
    noticed_ns: int
    """When it was known that the call has gone."""
    offered_ns: int | None = None
    connected_ns: int | None = None
    """The new connection can be spoken through."""
    resumed: bool | None = None
    """Whether the conversation was carried over; None until that is known."""
    spoken_ns: int | None = None
    """The last packet of speech of the first turn after it."""
    reply_ns: int | None = None
    """The first packet of the reply to that."""


@dataclass
class Call:
    """One call and what is remembered of it. `Ringing` makes them."""

    exchange: Exchange
    number: int
    session: dict[str, Any]
    interrupts: bool = False
    checked: bool = False
    """Its first whole reply is kept, to be compared."""
    state: str = "offering"
    """`offering`, `connecting`, `talking`, `returning`, `ended`, `failed`."""
    failure: str | None = None
    """One of FAILURES."""
    why: str = ""
    """The sentence behind `failure`: what the server said, for example."""
    call_id: str | None = None
    offered_ns: int = 0
    ended_ns: int | None = None
    moments: dict[str, float] = field(default_factory=dict)
    """Milliseconds since the first offer: `answered`, `checked` (ICE), `connected` (DTLS), `opened`
    (the channel), `session.created`, `first_audio` (any packet), `first_reply` (sound)."""
    events: list[tuple[int, str]] = field(default_factory=list)
    """When each event of the data channel came, and its type; `error CODE` for errors."""
    returns: list[Return] = field(default_factory=list)
    heard: Heard = field(default_factory=Heard)
    sent: int = 0
    """Packets of speech."""
    bad: int = 0
    """Packets that did not authenticate."""

    def __post_init__(self) -> None:
        self.client: Client | None = None
        self.lost = asyncio.Event()
        """Something ended the connection: `_gone` says what."""
        self._gone: Failed | None = None
        self._resumable: str | None = None
        self._alive_ns = 0
        self._ask_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._stopping = self._abandoned = False
        self.talk = Talk(
            self.exchange.voice, self.number, interrupts=self.interrupts, checked=self.checked
        )
        self.heard.flowing = not self.interrupts

    @property
    def turns(self) -> list[Said]:
        """What it has said."""
        return self.talk.turns

    @property
    def echo(self) -> speaking.Echo | None:
        """The reply that was kept, to be compared."""
        return self.talk.echo

    # --- questions ------------------------------------------------------------------------------

    def silence_ms(self, since_ns: int, until_ns: int) -> float:
        """The longest time in which something should have been heard and was not.

        Pauses that timestamps explain do not count. A silence that has not ended by `until_ns`
        does; the one between two connections of a call that came back, too.
        """
        return self.heard.silence_ms(since_ns, until_ns)

    def silent_ms(self, since_ns: int, at_ns: int) -> float:
        """How much of that time had been silence at its end, without a break: 0 if it was heard
        then, or has ended before."""
        if self.ended_ns is not None and self.ended_ns < at_ns:
            return 0.0
        return self.heard.silent_ms(since_ns, at_ns)

    def gaps_ms(self, since_ns: int, until_ns: int, over_ms: float = 40.0) -> list[float]:
        """All such silences of more than `over_ms`."""
        found = self.heard.silences_ms(since_ns, until_ns)
        return [float(each) for each in found[found > over_ms]]

    def lost_down(self, since_ns: int, until_ns: int) -> int:
        """Packets that should have come in that time, up to the end of the call, and never did."""
        return self.heard.lost(since_ns, min(until_ns, self.ended_ns or until_ns))

    def received(self, since_ns: int, until_ns: int) -> int:
        """Packets of RTP that came in that time."""
        return self.heard.received(since_ns, until_ns)

    def lost_up(self, since_ns: int, until_ns: int) -> int | None:
        """Packets of ours that the transceiver lacks, by its reports (one a second): of the last
        one before `since_ns` and of the first one after `until_ns`, or the last there is. None
        without two reports of one connection."""
        return self.heard.lost_up(since_ns, until_ns)

    # --- what may be done to it ------------------------------------------------------------------

    def move(self, *, check: bool = False, near: bool = False) -> None:
        """From now on the call sends from another port, on loopback from another address, too,
        unless that is `near`.

        As behind a NAT that lost its table, where nothing but media and consent shows it; or, with
        `check`, as a client that changes its network and checks the new path at once.
        """
        if self.client is not None:
            self.client.wire.move(near)
            if check:
                self.client.check()

    async def end(self, *, politely: bool = True) -> None:
        """Hang up, or vanish. Harmless for a call that has ended."""
        if self.state in ("ended", "failed"):
            return
        self._finish("ended")
        await self._leave(politely)

    def abandon(self) -> None:
        """End as soon as the offer is answered: before that there is nothing to hang up."""
        self._abandoned = True

    def fail(self, failure: str, why: str = "") -> None:
        """The call has failed."""
        if self.failure is None:
            self.failure, self.why = failure, why
        self._finish("failed")

    # --- its life --------------------------------------------------------------------------------

    async def live(self, talk_s: float | None, *, politely: bool = True) -> None:
        """Connect, talk for so long or until `end`, and end. Raises nothing."""
        loop = asyncio.get_running_loop()
        try:
            await self._connect()
            until = None if talk_s is None else loop.time() + talk_s
            while not await self._over(until):
                await self._come_back()
            unanswered = self.talk.unanswered(time.monotonic_ns())
            if self.state == "talking" and unanswered and "first_reply" not in self.moments:
                self.fail("no audio", "no reply was heard")
                await self._leave(politely)
        except Failed as failed:
            self.fail(failed.failure, failed.why)
            await self._leave(politely=True)
        except _Abandoned:
            pass  # it is hung up below
        finally:
            if self._asking is not None:
                self._asking.cancel()
            await self.end(politely=politely)

    def tick(self) -> None:
        """20 ms have passed: say the next packet."""
        if self.state == "talking" and self.client is not None:
            payload = self.talk.next()
            if payload is not None:
                self.client.say(payload)
                self.sent += 1

    def look(self, now: float) -> None:
        """Some time has passed: is the line alive? `now` is of the loop's clock."""
        if self.state != "talking" or self.lost.is_set():
            return
        now_ns = time.monotonic_ns()
        opened_ms = self.moments.get("opened")
        if opened_ms is not None and "session.created" not in self.moments:
            waited_s = (now_ns - self.offered_ns) / 1e9 - opened_ms / 1e3
            if waited_s > SESSION_S_MAX:
                self._lose(Failed("no session", f"no session.created for {SESSION_S_MAX:g} s"))
        silent_s = (now_ns - self._alive_ns) / 1e9
        if not self.exchange.comes_back:
            if silent_s > LOST_S:
                self._lose(Failed("lost", f"nothing came for {LOST_S:g} s"))
            return
        most = SUSPICIOUS_SOUNDING_S if self.heard.sounding else SUSPICIOUS_S
        idle = self._asking is None or self._asking.done()
        if silent_s > most and now > self._ask_at and idle:
            self._asking = asyncio.get_running_loop().create_task(self._inquire())

    # --- from its client -------------------------------------------------------------------------

    def alive(self, at_ns: int) -> None:
        """Something authentic has come, or an answer to a check."""
        self._alive_ns = at_ns

    def reached(self, moment: str, at_ns: int | None = None) -> None:
        """A moment of the call, the first time."""
        at_ns = time.monotonic_ns() if at_ns is None else at_ns
        self.moments.setdefault(moment, (at_ns - self.offered_ns) / 1e6)

    def secured(self, rate_hz: int) -> None:
        """Speech may begin."""
        self.reached("connected")
        self.heard.connected()
        self.alive(time.monotonic_ns())
        self._resumable = self.call_id
        self.talk.begin(rate_hz)
        self.state = "talking"
        if self.returns and self.returns[-1].connected_ns is None:
            self.returns[-1].connected_ns = time.monotonic_ns()

    def packet(self, packet: rtp.Packet, at_ns: int) -> None:
        """A packet of audio."""
        octets = len(packet.payload)
        self.heard.packet(at_ns, packet.sequence, packet.timestamp, octets)
        self.reached("first_audio", at_ns)
        if octets <= SILENT_OCTETS_MAX:
            return
        self.reached("first_reply", at_ns)
        number = self.heard.sequence[-1]
        said = self.talk.heard(at_ns, number, packet.payload, packet.marker)
        if said is not None and self.returns and self.returns[-1].reply_ns is None:
            self.returns[-1].spoken_ns, self.returns[-1].reply_ns = said.ended_ns, at_ns

    def reported(self, block: rtp.Block, at_ns: int) -> None:
        """The transceiver says what came of ours."""
        self.heard.report(at_ns, block.lost, block.highest_sequence)

    def event(self, event: dict[str, Any]) -> None:
        """An event of the data channel."""
        kind = str(event.get("type"))
        code = str((event.get("error") or {}).get("code")) if kind == "error" else ""
        self.events.append((time.monotonic_ns(), f"{kind} {code}".strip()))
        if kind == "session.created":
            self.reached(kind)
        elif kind == "output_audio_buffer.started":
            self.heard.sounding = True
            self.talk.started(self.events[-1][0])
        elif kind in ("output_audio_buffer.stopped", "output_audio_buffer.cleared"):
            self.heard.sounding = False
        elif code == "server_shutting_down":
            self._stopping = True
        elif code == "resume_unavailable" and self.returns:
            self.returns[-1].resumed = False
        elif (
            kind == "conversation.item.added" and self.returns and self.returns[-1].resumed is None
        ):
            self.returns[-1].resumed = True  # what was kept is told before anything else

    def closed(self) -> None:
        """The server has closed the connection."""
        if self.state == "talking":
            stops = "; it stops" if self._stopping else ""
            self._lose(Failed("ended by the server", f"it closed the connection{stops}"))

    # --- inside ----------------------------------------------------------------------------------

    async def _connect(self, resume: str | None = None) -> None:
        """One connection, up to the channel. Raises Failed."""
        self.client = client = Client(self, Wire(self.exchange))
        if not self.offered_ns:
            self.offered_ns = time.monotonic_ns()
        answer = await self._offer(client.offer(), resume)
        if self._abandoned:
            raise _Abandoned
        self.reached("answered")
        if self.state == "offering":
            self.state = "connecting"
        try:
            await client.connect(answer)
            self.reached("opened")
        except target.TargetError as error:
            raise Failed("forbidden candidate", str(error)) from error
        except (KeyError, ValueError, IndexError) as error:
            raise Failed("bad answer", f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise Failed(str(error), f"not within {callers.STEP_S_MAX:g} s") from error
        except ConnectionError as error:
            raise Failed("no DTLS", str(error)) from error
        except OSError as error:  # of the socket: there is no way to such an address
            raise Failed("no ICE", str(error)) from error

    async def _offer(self, offer: str, resume: str | None) -> str:
        """The answer. Raises Failed."""
        form = aiohttp.FormData()
        form.add_field("sdp", offer, content_type="application/sdp")
        form.add_field("session", json.dumps(self.session), content_type="application/json")
        try:
            status, text, location = await self._ask(
                "POST", f"?resume={resume}" if resume else "", form
            )
        except TimeoutError as error:
            raise Failed("no answer", f"not within {ANSWER_S_MAX:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("unreachable", f"{type(error).__name__}: {error}") from error
        if status != 201:
            names = {401: "unauthorized", 403: "unauthorized", 429: "too many", 503: "unavailable"}
            raise Failed(names.get(status, "refused"), f"{status}: {text[:300]}")
        self.call_id = location.rstrip("/").rpartition("/")[2]
        if not self.call_id:
            raise Failed("bad answer", "201 without a Location")
        return text

    async def _ask(
        self, method: str, path: str, data: Any = None, seconds: float | None = None
    ) -> tuple[int, str, str]:
        key = self.exchange.key
        async with self.exchange.http.request(
            method,
            f"{self.exchange.base}/v1/realtime/calls{path}",
            data=data,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=seconds or ANSWER_S_MAX),
            allow_redirects=False,
        ) as response:
            text = await response.text(errors="replace")
            return response.status, text, response.headers.get("Location", "")

    async def _over(self, until: float | None) -> bool:
        """Wait until it is time, True, or until the line is lost. Raises Failed if that is the
        end."""
        left = None if until is None else until - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self.lost.wait(), left)
        except TimeoutError:
            return True
        if self.state in ("ended", "failed"):
            return True
        gone = self._gone or Failed("lost")
        going_on = self._stopping or gone.failure == "lost"
        if not (self.exchange.comes_back and going_on):
            raise gone
        return until is not None and asyncio.get_running_loop().time() >= until

    async def _inquire(self) -> None:
        """Ask whether the call is there, and give the line up if not, or if it is dead for long."""
        alive_ns, there, gone = self._alive_ns, False, False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            status, _, __ = await self._ask("GET", f"/{self.call_id}", None, ASK_S_MAX)
            there, gone = status == 200, status != 200
        self._ask_at = asyncio.get_running_loop().time() + ASK_S
        if self._alive_ns != alive_ns or self.state != "talking":
            return
        silent_s = (time.monotonic_ns() - self._alive_ns) / 1e9
        if gone or (there and silent_s > PATH_S):
            self._lose(Failed("lost", "its server has gone" if gone else "its path is dead"))

    def _lose(self, why: Failed) -> None:
        if not self.lost.is_set():
            self._gone = why
            self.lost.set()

    async def _come_back(self) -> None:
        """Go on in another connection. Raises Failed."""
        last_ns = self.heard.at_ns[-1] if self.heard.at_ns else self.offered_ns
        found = Return(last_ns, time.monotonic_ns())
        self.returns.append(found)
        self.state, self._stopping = "returning", False
        await self._drop(politely=False)
        for wait_s in (*WAITS_S, None):
            self.lost.clear()
            found.offered_ns = time.monotonic_ns()
            try:
                await self._connect(self._resumable)
            except Failed:
                await self._drop(politely=False)
                self.state = "returning"
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
            else:
                return

    async def _leave(self, politely: bool) -> None:
        """Hang up if that is polite, and part with the connection."""
        if politely and self.call_id is not None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                await self._ask("POST", f"/{self.call_id}/hangup")
        await self._drop(politely)

    async def _drop(self, politely: bool) -> None:
        """Part with the connection."""
        client, self.client = self.client, None
        if client is not None:
            self.bad += client.bad
            await client.leave(politely)

    def _finish(self, state: str) -> None:
        if self.state not in ("ended", "failed"):
            self.state, self.ended_ns = state, time.monotonic_ns()
            self.lost.set()
