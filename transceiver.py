"""The transceiver: where calls end and conversations begin.

    relay ──UDP──▶ mux ──▶ peer ──▶ session ──▶ backend
    signaling ──TCP──▶ control API, on the same address and port

What it owns: the process. One UDP socket, one HTTP server for signaling, every session by its call
id, one pacer and one clockwork for all of them, and the way it starts and ends.

Rules that stay true:
- Everything runs in one thread's event loop; nothing of a call blocks, waits or has a task of its
  own but its DTLS and its connection to a model server.
- A call is refused honestly: 503 when the process is full, loaded or draining (admission.py), 400
  with the reason when the offer cannot be used. What is accepted has a deadline for each state of
  its life.
- A drain takes no new calls, tells the clients of those there are when it ends, and ends with the
  last of them, at the latest by its deadline.
- What goes wrong inside one session ends that session, is logged, and nothing else.
- Only `control_prefixes` may use the control API (control.py); only `relay_prefixes` send media.

It does not know of relays' flows, of ufrags beyond minting its own, or of what is said in a call.
"""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web

import adapters
import admission
import archive
import backend
import control
import endpoints
import journal
import ledger
import metrics
import opening
import presence
import redisclient
import sdp
import settings
import ufrag
from attendants import Attendant
from mux import Mux, media_socket
from pacer import Pacer
from session import ENDINGS, FAULT, LEFT, Session, State

STEP_S = 0.01
"""The clockwork's step. A fifth of the sessions has its turn in each, since a hundred at once are a
millisecond and more in which no packet leaves."""

TICK_STEPS = 5
"""How often a session hears that time passes: every 50 ms. A turn's end can be this much late where
no packets come; 100 sessions cost 2,000 short calls a second."""

SWEEP_STEPS = 100
"""Each session is swept once a second, one or two at a time. A multiple of TICK_STEPS."""

STOP_S = 5.0
"""How long goodbyes may take at the end: milliseconds, unless one hangs, which must not keep the
successor of this process waiting."""

OFFER_FRESH_S = 2.0
"""How long the client of an offer counts as being on its way. One that comes at all sends its first
check within a round trip of the answer."""

HUNG_UP = "hung up by request"
RESUMED = "its conversation goes on in another call"
MOVED = "its conversation goes on at another transceiver"
"""Reasons why calls end here."""

Count = metrics.Transceiver
Timing = metrics.Timing
log = logging.getLogger("transceiver")


class Transceiver:
    """The process's story: start, take calls, end them, stop."""

    def __init__(
        self,
        config: settings.Transceiver,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        """Raises SettingsError if the keys or the backend cannot be used; binds nothing yet."""
        self.clock, self.unix = clock, unix
        self.counters = ledger.Counters(metrics.Transceiver)
        self.timings = ledger.Histograms(metrics.Timing)
        self.sessions: dict[str, Session] = {}
        self.draining = False
        self.drained = asyncio.Event()
        """Set once a drain is over: the last call has ended, or its deadline has come."""
        self.limits = config.transceiver
        self._keyring = config.keys.load()
        self._cluster = config.cluster[0].hints()
        self._slots: dict[Session, int] = {}  # the step of a second in which each is swept
        self._wheel: list[dict[Session, None]] = [{} for _ in range(TICK_STEPS)]
        self._next_slot = itertools.cycle(range(SWEEP_STEPS))
        self._cpu = cpu
        self._load = admission.Load(self.limits)
        self._drains_until = float("inf")
        self._steps = 0
        self._tick_due = 0.0
        self._collecting_since = 0.0
        self._ticking: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._redis = redisclient.configured(config.redis, log)
        self._announcer = presence.Announcer(self._redis, self.limits.listen, self.health, unix)
        self._started, self._beats = unix(), itertools.count(1)
        self._archive = archive.Archive(
            self._keyring, self.limits.resume_s, unix, self._redis, self.counters
        )
        self._backends = backend.Backends(
            config.backend, config.model, self.counters, clock, self.timings
        )

    async def start(self) -> None:
        """Serve from the running loop. Raises OSError if the address is not to be had."""
        loop = asyncio.get_running_loop()
        at = self.limits.listen
        sock = media_socket(at, self.limits.receive_buffer_octets)
        self._mux = Mux(
            sock, endpoints.inside(self.limits.relay_prefixes), self.counters, self.clock
        )
        self._pacer = Pacer(loop, self.clock, self._play, self.counters, self.timings)
        api = control.application(self)
        self._http = web.AppRunner(api, access_log=None, shutdown_timeout=STOP_S)
        try:
            await self._http.setup()
            await web.TCPSite(self._http, at.host, at.port).start()
        except BaseException:
            self._mux.close()
            await self._http.cleanup()
            raise
        self._announcer.start()
        self._archive.start()
        gc.callbacks.append(self._collected)
        self._load.sample(self.clock(), self._cpu(), self._calls())
        self._tick_due = loop.time() + STEP_S
        self._ticking = loop.call_at(self._tick_due, self._tick)

    def drain(self) -> None:
        """Take no new calls, and tell the clients of those there are until when they are served."""
        if self.draining:
            return
        now = self.clock()
        self.draining = True
        self._drains_until = now + self.limits.drain_s
        log.info("draining %d sessions for %g s", len(self.sessions), self.limits.drain_s)
        self._announcer.changed()
        for session in list(self.sessions.values()):
            self._guarded(session, session.notice, self._drains_until)
        self._look_whether_drained(now)

    async def stop(self) -> None:
        """Say goodbye to every client and free everything. Stopping twice is harmless."""
        if self._ticking is None:
            return
        self._ticking.cancel()
        self._ticking = None
        self.draining = True
        self._later(self._announcer.stop())
        gc.callbacks.remove(self._collected)
        for session in list(self.sessions.values()):
            self._guarded(session, session.goodbye, self.clock())
            self.ended(session, "the transceiver is shutting down")
        if self._closing:
            await asyncio.wait(self._closing, timeout=STOP_S)
        await self._backends.close()
        await self._archive.stop()
        await redisclient.closed(self._redis)
        self._pacer.stop()
        await self._http.cleanup()
        self._mux.close()

    async def recalled(self, wanted: opening.Opening) -> opening.Opening:
        """The same, with what there is of the conversation that it goes on with.

        That is what the session before has, if it is here, else its record.
        """
        if wanted.resume is None:
            return wanted
        here = self.find(wanted.resume)
        record = await self._archive.find(wanted.resume) if here is None else here.record()
        if record is None or record.key != wanted.key:
            return wanted
        session = adapters.settings(wanted.dialect, record.session, wanted.session or {})
        return dataclasses.replace(wanted, session=session or None, past=record.items)

    def open(self, wanted: opening.Opening) -> tuple[Session, str]:
        """Take a call: itself and the answer. Raises control.Full, and sdp.OfferError."""
        refused = self._load.refusal(self._calls(), self.draining)
        if refused is not None:
            self.counters.values[refused.count] += 1
            raise control.Full(refused.message)
        offer = sdp.read_offer(wanted.offer)
        hint, password, nonce = self._mint(wanted.nonce)
        if nonce != wanted.nonce:  # the request has no such id, or another call has it
            wanted = dataclasses.replace(wanted, request_id=f"{nonce:08x}")
        session = Session(self, self._mux, offer, (hint, password), self._backends, wanted)
        self.sessions[session.call_id] = session
        slot = self._slots[session] = next(self._next_slot)
        self._wheel[slot % TICK_STEPS][session] = None
        self.counters.values[Count.SESSIONS_OPENED] += 1
        if wanted.resume is not None:
            self._resumed(session, wanted)
        return session, self._answer(session, wanted)

    def again(self, call: Session, wanted: opening.Opening) -> str:
        """The answer to another offer on the connection of a call. Raises sdp.OfferError."""
        call.offer = sdp.again(call.offer, sdp.read_offer(wanted.offer))
        pair = call.offer.ufrag, call.offer.password
        if pair != call.client_ice:
            call.client_ice, call.restarted_as = pair, None
            self.restart(call)
        return self._answer(call, wanted)

    def _answer(self, call: Session, wanted: opening.Opening) -> str:
        hint, password = call.ice
        return sdp.answer(
            call.offer,
            hint,
            password.decode(),
            fingerprint=call.fingerprint,
            candidates=wanted.candidates,
            ssrc=call.ssrc,
            session_id=call.number,
            rate_hz=call.rate_hz,
        )

    def _resumed(self, session: Session, wanted: opening.Opening) -> None:
        """Say what has become of it; the conversation is nobody else's any more."""
        if wanted.past is None:
            self.counters.values[Count.RESUME_UNAVAILABLE] += 1
            log.info("%s begins anew: there is nothing to resume", session)
            return
        self.counters.values[Count.RESUMED] += 1
        log.info("%s resumed with %d items", session, len(wanted.past))
        before = self.find(wanted.resume or "")
        if before is not None:
            self.ended(before, RESUMED)

    def find(self, call_id: str) -> Session | None:
        """A call, if it is here."""
        return self.sessions.get(call_id)

    def _mint(self, nonce: int | None = None) -> tuple[str, bytes, int]:
        """A ufrag that leads relays here, its password, and its nonce.

        That is the one asked for, if no session here has it: so the relay, which reads hints, knows
        a call by its request's id. Signaling has drawn it as this would: at random, in secret.
        """
        at = self.limits.listen
        while True:
            drawn = secrets.randbits(32) if nonce is None else nonce
            hint = ufrag.mint(self._keyring, self._cluster, at.address, at.port, drawn)
            if not self._mux.knows(hint):  # never empty, below: its key has just minted
                return hint, ufrag.password(self._keyring, hint) or b"", drawn
            nonce = None

    def restart(self, call: Session) -> tuple[str, str]:
        """New ICE credentials of a call, ufrag and password, beside the ones before.

        The call keeps its id, and DTLS, SRTP and the data channel do not notice (RFC 8445 section
        9).
        """
        hint, password, nonce = self._mint()
        call.restart(hint, password)
        self.counters.values[Count.ICE_RESTARTS] += 1
        told = journal.fields(request_id=call.opening.request_id, restarted_as=f"{nonce:08x}")
        log.info("%s restarts ICE", call, extra=told)
        return hint, password.decode()

    def hang_up(self, call: Session, *, resumed: bool = False) -> None:
        """End a call by request; or because its conversation goes on at another transceiver."""
        if not resumed:  # else its client is there, too
            call.farewell()
        self.ended(call, MOVED if resumed else HUNG_UP)

    def attended(self, call: Session, message: str | bytes, attendant: Attendant) -> None:
        """An event of a call's attendant."""
        self._guarded(call, functools.partial(call.attended, message, attendant), self.clock())

    def health(self) -> dict[str, Any]:
        """A report for whoever places calls (presence.Report), and of what the load is made."""
        keys = (session.opening.key for session in self.sessions.values())
        return {
            "state": "draining" if self.draining else "serving",
            "cluster": self._cluster.id,
            "sessions": len(self.sessions),
            "sessions_max": self.limits.sessions_max,
            "connecting": self._calls().connecting,
            "connecting_max": self.limits.connecting_max,
            **self._load.told(),
            "opened": self.counters[Count.SESSIONS_OPENED],
            "started": self._started,
            "beat": next(self._beats),
            "calls_by_key": presence.counted(keys),
        }

    def ailments(self) -> list[str]:
        """Why no call would be taken now: for whoever watches over the process."""
        refused = self._load.refusal(self._calls(), self.draining)
        return [] if refused is None else [refused.message]

    def book(self) -> None:
        """Bring those counters up to date that say what is now: before they are read."""
        states = [session.state for session in self.sessions.values()]
        values = self.counters.values
        values[Count.SESSIONS] = len(states)
        for state in (State.OFFERED, State.CONNECTING, State.LIVE):
            values[Count.__members__[f"SESSIONS_{state.name}"]] = states.count(state)
        values[Count.LOAD] = round(1000 * self._load.figure)
        values[Count.TASKS] = len(asyncio.all_tasks())
        values[Count.REDIS_UP] = self._redis is not None and self._redis.up

    def paced(self, session: Session) -> None:
        """See session.Owner."""
        self._pacer.schedule(session)

    def ended(self, session: Session, reason: str) -> None:
        """End a session: it is out of the books at once, and closed as soon as the loop turns."""
        if self.sessions.pop(session.call_id, None) is None:
            return
        del self._wheel[self._slots.pop(session) % TICK_STEPS][session]
        self._archive.ended(session, over=reason in (HUNG_UP, LEFT), moved=reason == MOVED)
        self.counters.values[Count.SESSIONS_CLOSED] += 1
        if (counted := ENDINGS.get(reason)) is not None:
            self.counters.values[counted] += 1
        self._later(self._close(session, reason))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, session: Session, reason: str) -> None:
        if reason == FAULT:
            with contextlib.suppress(Exception):  # as far as the fault lets it
                session.fault("internal_error", "The server met a fault: this call ends.")
        try:
            await session.close(reason)
        except Exception:
            log.exception("%s did not close cleanly", session)
        self._pacer.schedule(session)

    def _play(self, session: Session, now: float) -> None:
        self._guarded(session, session.flow, now)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        lag_s = loop.time() - self._tick_due
        try:
            self._load.lag(lag_s)
            self.timings.observe(Timing.LOOP_LAG, lag_s)
            self.tick(self.clock())
        finally:  # a mistake of ours must not stop the clock of all
            done = loop.time()
            self.timings.observe(Timing.TICK, done - self._tick_due - lag_s)
            # What was missed is not made up for.
            self._tick_due = max(self._tick_due + STEP_S, done)
            self._ticking = loop.call_at(self._tick_due, self._tick)

    def tick(self, now: float) -> None:
        """Let time pass in the sessions whose turn it is, and sweep some of those."""
        self._steps += 1
        slot = self._steps % SWEEP_STEPS
        for session in list(self._wheel[slot % TICK_STEPS]):
            self._guarded(session, session.tick, now)
            self._archive.look(session, now)
            if self._slots.get(session) == slot:
                self._guarded(session, session.sweep, now)
        if slot == 0:
            self._load.sample(now, self._cpu(), self._calls())
        self._look_whether_drained(now)

    def _calls(self) -> admission.Calls:
        """What there is now, as admission counts it."""
        now = self.clock()
        live = connecting = young = 0
        for session in self.sessions.values():
            if session.live_at is not None:
                live += 1
                young += now - session.live_at < admission.YOUNG_S
            elif session.state is State.CONNECTING or now - session.opened_at < OFFER_FRESH_S:
                connecting += 1
        return admission.Calls(len(self.sessions), live, connecting, connecting + young)

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        """The collector begins, or has finished: everybody's audio waits in between."""
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            pause_s = time.perf_counter() - self._collecting_since
            self.timings.observe(Timing.COLLECTION, pause_s)

    def _look_whether_drained(self, now: float) -> None:
        if self.draining and (not self.sessions or now >= self._drains_until):
            self.drained.set()

    def _guarded(self, session: Session, step: Callable[[float], str | None], at: float) -> None:
        """Do one session's work; end it if that says why, or meets a mistake of ours."""
        try:
            reason = step(at)
            if reason is not None:
                self.ended(session, reason)
        except Exception:
            log.exception("%s met a fault", session)
            self.ended(session, FAULT)


# --- the command line -------------------------------------------------------------------------


async def serve(config: settings.Transceiver) -> None:
    """Serve until SIGINT, or SIGTERM and the end of the drain; then end every call politely.

    Raises OSError if the address is not to be had.
    """
    loop = asyncio.get_running_loop()
    transceiver = Transceiver(config)

    def told_to_stop() -> None:
        if transceiver.draining:
            transceiver.drained.set()
        transceiver.drain()

    loop.add_signal_handler(signal.SIGTERM, told_to_stop)
    loop.add_signal_handler(signal.SIGINT, transceiver.drained.set)
    loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP: settings change by a restart")
    # What exists now lives as long as the process: keep the collector from walking it, since a
    # full pass over the imported libraries is a pause of 30 ms in everybody's audio.
    gc.collect()
    gc.freeze()
    await transceiver.start()
    log.info("transceiver ready on %s", config.transceiver.listen)
    await transceiver.drained.wait()
    log.info("stopping with %d sessions", len(transceiver.sessions))
    await transceiver.stop()


cli = typer.Typer(
    help="Where calls end and conversations begin.", no_args_is_help=True, add_completion=False
)
_Config = Annotated[Path, typer.Option("--config", help="The settings file.", metavar="FILE")]
_LogFormat = Annotated[
    journal.Form, typer.Option("--log-format", envvar=journal.VARIABLE, help=journal.HELP)
]


def _load(path: Path) -> settings.Transceiver:
    """The settings, checked as far as possible without serving; ends the program if they fail."""
    try:
        config = settings.load(path, settings.Transceiver)
        Transceiver(config)
    except settings.SettingsError as error:
        # What is wrong with a file that this one names comes without the name of this one.
        where = "" if str(error).startswith(f"{path}: ") else f"{path}: "
        typer.echo(f"transceiver: {where}{error}", err=True)
        raise typer.Exit(os.EX_CONFIG) from error
    return config


@cli.command()
def check(config: _Config) -> None:
    """Read the settings and the keys, ready the backends, and say what is wrong, if anything."""
    _load(config)
    typer.echo(f"{config}: good")


@cli.command()
def run(config: _Config, log_format: _LogFormat = "text") -> None:
    """Serve until SIGTERM, and then until its calls have ended (drain_s); SIGINT ends at once."""
    journal.configure(log_format)
    found = _load(config)
    try:
        asyncio.run(serve(found))
    except OSError as error:
        typer.echo(f"transceiver: cannot serve at {found.transceiver.listen}: {error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from error


if __name__ == "__main__":
    cli()
