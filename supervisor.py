"""The supervisor: forks processes, pins them, watches them, replaces them, and tells systemd.

What it owns: processes, signals, and one socket pair (a *link*) to each child. It knows nothing
of what they do. Whatever its caller opened before `run` (sockets, shared memory) is inherited by
every child, the first and its successors, and stays open in between: the kernel goes on queueing
for a worker that has just died.

    child:       set up, `link.send(READY)`, work until the link is readable, return an exit code
    supervisor:  closes its end to stop a child, so that children stop as well when it dies

Children are **workers**, without which there is nothing to serve, and **others** (a keeper of
books), without which everything goes on.

Rules that stay true:
- Signal handlers only queue: the interpreter writes the signal's number into a pipe, and one loop
  reads pipe and links. Nothing in that loop blocks; what a callback raises is logged, not fatal.
- Children ignore SIGTERM, SIGINT and SIGHUP, which a terminal or a process group sends to all at
  once: what happens to them is decided here.
- A child that dies after it was ready is replaced at once; the next time with a delay that doubles
  while it keeps dying young. A worker that dies before it is ready has failed to start, and
  `START_FAILURES_MAX` of those in a row end everything, with an exit code of its own: a loop of
  failing starts would hide the reason and look alive. One of the others is tried for ever.
- A worker that stands still (its heartbeat is old) is killed: its successor takes over.
- SIGTERM drains where the caller knows how, a second one and SIGINT stop. SIGHUP loads anew and
  replaces the children one after the other. The exit code says who has to act: see `Exit`.

After gunicorn's arbiter. fork(2), signal(7), sd_notify(3), systemd.exec(5)
"""

import contextlib
import enum
import functools
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import events
import host
import manager

READY = b"+"
"""What a child sends on its link when it serves."""

START_FAILURES_MAX = 3
"""Starts in a row that may fail: one could be bad luck, three are a reason to look at."""

START_S_MAX = 30.0
"""How long a child may take to become ready. It takes milliseconds; a machine that swaps, seconds.
What takes longer hangs, and counts as a failed start."""

RESTART_DELAY_S_MIN = 0.05
RESTART_DELAY_S_MAX = 5.0
"""Between restarts of a child that dies young. The first restart has no delay at all: datagrams
are waiting in its sockets. Longer delays would lose what a receive buffer cannot hold."""

YOUNG_S = 5.0
"""A child that dies within this time of its start is dying young."""

STOP_S = 5.0
"""How long children may take to stop before they are killed. They need a millisecond."""

BEAT_S_MAX = 10.0
"""Age of a heartbeat at which a worker counts as hung. Workers beat every second, and a batch takes
a millisecond; shorter would kill workers on a machine that stands still for seconds (snapshots,
swapping), longer leaves clients in silence."""

BEAT_CHECK_S = 1.0
"""Between two looks at the heartbeats."""

DRAIN_CHECK_S = 0.2
"""Between two questions whether what is drained has run dry."""

STOP_EXTENSION_S = 30.0
"""How much more time for stopping is asked of systemd at a time: a drain may outlast any
TimeoutStopSec, and it is renewed while this loop turns."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Exit(enum.IntEnum):
    """Exit codes of a supervised program, those of sysexits.h where it has one."""

    STOPPED = 0
    """It was asked to stop, and did."""
    ADDRESS = 69
    """A socket could not be opened: the address is not this host's, or taken (EX_UNAVAILABLE)."""
    WORKER = 70
    """A worker could not start `START_FAILURES_MAX` times in a row (EX_SOFTWARE)."""
    SUCCESSION = 75
    """It could not take over from the relay that runs, which goes on (EX_TEMPFAIL)."""
    CONFIGURATION = 78
    """The configuration or the key file is wrong (EX_CONFIG)."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a child is for."""

    name: str
    """As the log calls it; no two have the same."""
    work: Callable[[socket.socket], int]
    """Runs in the child with its link; returns the exit code."""
    cpu: int | None = None
    """Where it is pinned; None where it runs free."""
    vital: bool = False
    """True for a worker: it must be ready before anything is announced, and must be able to start.
    False for others: media goes on without them."""
    beat: Callable[[], int] | None = None
    """Reads its heartbeat, CLOCK_MONOTONIC in nanoseconds; None where it has none."""


@dataclass(slots=True)
class _Child:
    """What the supervisor knows of one child."""

    role: Role
    pid: int = 0
    """0 while there is no process."""
    link: socket.socket | None = None
    """Our end."""
    ready: bool = False
    asked: bool = False
    """It was asked to stop."""
    killed: bool = False
    started_at: float = 0.0
    ready_at: float = 0.0
    ended_at: float | None = None
    """When its predecessor ended, until it is ready."""
    delay_s: float = 0.0
    failures: int = 0
    """Failed starts in a row."""


class Supervisor:
    """Runs functions in processes until it is told to stop."""

    loop: events.Loop
    """What it waits with: watch further sockets there, arrange calls."""

    def __init__(
        self,
        cpus: Sequence[int | None],
        work: Callable[[int, socket.socket], int],
        log: logging.Logger,
        on_ready: Callable[[], None] = events.nothing,
        *,
        others: Sequence[Role] = (),
        beat: Callable[[int], int] | None = None,
        on_death: Callable[[Role], None] = events.nothing,
        on_reload: Callable[[], bool] | None = None,
        on_drain: Callable[[], None] | None = None,
        drained: Callable[[], bool] = lambda: True,
    ) -> None:
        """One worker for each of `cpus` (None: not pinned), and the `others`.

        `work(number, link)` runs in a worker; what it returns is the worker's exit code.
        `beat(number)` reads a worker's heartbeat, see `Role`.

        Called here, in the supervisor: `on_ready` once, when all workers serve for the first time;
        `on_death` for each child that ended unasked; `on_reload` at SIGHUP, True if there is
        something new for the children (it logs its own errors); `on_drain` at the first SIGTERM,
        after which `drained` is asked until it says True (it knows the deadline). Without
        `on_drain` SIGTERM stops. None of them may block.
        """
        workers = [
            Role(
                f"worker {number}",
                functools.partial(work, number),
                cpu,
                vital=True,
                beat=functools.partial(beat, number) if beat else None,
            )
            for number, cpu in enumerate(cpus)
        ]
        self._children = [_Child(role) for role in (*workers, *others)]
        self.loop = events.Loop(log)
        self._log, self._on_ready, self._on_death = log, on_ready, on_death
        self._on_reload, self._on_drain, self._drained = on_reload, on_drain, drained
        self._announced = self._draining = self._ending = self._reloading = self._news = False
        self._suspended: Callable[[], None] | None = None
        self._to_replace: list[_Child] = []
        self._turn: _Child | None = None
        self._code = Exit.STOPPED
        self._wake_reader, self._wake_writer = socket.socketpair()

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Start all children and stay until the end; returns the exit code."""
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        before = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        handlers = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        self.loop.watch(self._wake_reader, self._take_signals)
        gc.collect()
        gc.freeze()  # shared with the children from now on: a collection would copy its pages
        try:
            self._start_all()
            self._look_at_beats(time.monotonic() + BEAT_CHECK_S)
            self._keep_watchdog_quiet()
            while not (self._ending and not any(child.pid for child in self._children)):
                self.loop.turn()
        finally:
            self._kill_all()
            signal.set_wakeup_fd(before)
            for number, handler in zip(_SIGNALS, handlers, strict=True):
                signal.signal(number, handler)
        return self._code

    @property
    def busy(self) -> str:
        """What it is at, in a word; empty while all of it serves and nothing else goes on."""
        words = {
            "ending": self._ending,
            "handing over": self._suspended is not None,
            "draining": self._draining,
            "reloading": self._reloading,
            "starting": not self._announced,
        }
        return next((word for word, holds in words.items() if holds), "")

    def _take_signals(self) -> None:
        act: dict[int, Callable[[], object]] = {
            signal.SIGTERM: functools.partial(self._be_told_to_stop, signal.SIGTERM),
            signal.SIGINT: functools.partial(self._be_told_to_stop, signal.SIGINT),
            signal.SIGHUP: self._reload,
            signal.SIGCHLD: events.nothing,
        }
        for number in self._wake_reader.recv(4096):
            self.loop.guarded(act[number])
        # One signal may stand for several children, and another's is not ours to reap.
        for child in self._children:
            self.loop.guarded(functools.partial(self._reap, child))

    def _reap(self, child: _Child) -> None:
        if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
            self._bury(child)

    # --- children ---------------------------------------------------------------------------------

    def _start_all(self) -> None:
        for child in self._children:
            if not child.pid:
                self._start(child)

    def _start(self, child: _Child) -> None:
        name, now = child.role.name, time.monotonic()
        child.started_at, child.ready, child.asked, child.killed = now, False, False, False
        try:
            ours, theirs = socket.socketpair()
            with contextlib.ExitStack() as failed:
                failed.callback(ours.close)
                failed.callback(theirs.close)
                pid = os.fork()
                failed.pop_all()
        except OSError as error:  # no process or descriptor is left: that may pass
            self._log.error("%s cannot be forked: %s", name, error.strerror)
            later = now + RESTART_DELAY_S_MAX
            self.loop.call_at(f"restart {name}", later, lambda: self._start(child))
            return
        if not pid:
            self._become(child, theirs, ours)
        theirs.close()
        child.pid, child.link = pid, ours
        self.loop.watch(ours, lambda: self._hear(child))
        late = now + START_S_MAX
        self.loop.call_at(f"start {name}", late, lambda: self._kill(child, "does not start"))

    def _become(self, child: _Child, theirs: socket.socket, ours: socket.socket) -> None:
        """In the child: drop what is the supervisor's, then work. Never returns."""
        code, role = 1, child.role
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # An inherited end of another link would keep it open after the supervisor's death.
            for sock in (*self.loop.sockets, ours, self._wake_writer):
                sock.close()
            if role.cpu is not None and not host.pin(role.cpu):
                self._log.warning("%s cannot be pinned to a CPU", role.name)
            code = role.work(theirs)
        except BaseException:
            self._log.exception("%s failed", role.name)
        finally:
            logging.shutdown()
            os._exit(code)

    def _hear(self, child: _Child) -> None:
        """A child said that it is ready, or its link broke (its death is another signal)."""
        assert child.link is not None
        try:
            said = child.link.recv(64)
        except OSError:
            said = b""
        if not said:
            self.loop.unwatch(child.link)
            return
        name, now = child.role.name, time.monotonic()
        self.loop.cancel(f"start {name}")
        child.ready, child.ready_at, child.failures = True, now, 0
        if child.ended_at is not None:
            took_ms = (now - child.ended_at) * 1000
            self._log.info("%s serves again after %.1f ms", name, took_ms)
            child.ended_at = None
        if not self._announced and all(each.ready for each in self._children if each.role.vital):
            self._announced = True
            self.loop.guarded(self._on_ready)
            manager.notify("READY=1\nSTATUS=serving")
        if child is self._turn and not child.asked:
            self._replace_next()

    def _bury(self, child: _Child) -> None:
        now, name = time.monotonic(), child.role.name
        pid, child.pid = child.pid, 0
        self.loop.cancel(f"start {name}")
        self.loop.cancel(f"stop {name}")
        assert child.link is not None
        self.loop.unwatch(child.link)
        child.link.close()
        child.link = None
        if self._ending:
            return
        if self._suspended is not None:
            self._tell_suspended()
            return
        child.ended_at = now
        if child.asked:
            self._start(child)
            return
        self._log.error("%s (pid %d) died: its successor takes over", name, pid)
        self.loop.guarded(lambda: self._on_death(child.role))
        child.failures += not child.ready
        if child.role.vital and child.failures >= START_FAILURES_MAX:
            self._log.error("%s could not start %d times: giving up", name, child.failures)
            self.stop(Exit.WORKER)
            return
        young, delay_s = now - child.started_at < YOUNG_S, child.delay_s
        longer_s = min(RESTART_DELAY_S_MAX, max(RESTART_DELAY_S_MIN, 2 * delay_s))
        child.delay_s = longer_s if young else 0.0
        if delay_s:
            self.loop.call_at(f"restart {name}", now + delay_s, lambda: self._start(child))
        else:
            self._start(child)

    def _ask(self, child: _Child) -> None:
        """Ask a child to stop; it is killed if it does not."""
        if child.link is None or child.asked:
            return
        child.asked = True
        with contextlib.suppress(OSError):  # it has just died: its burial comes
            child.link.shutdown(socket.SHUT_WR)
        at = time.monotonic() + STOP_S
        self.loop.call_at(f"stop {child.role.name}", at, lambda: self._kill(child, "does not stop"))

    def _kill(self, child: _Child, reason: str) -> None:
        """Its burial comes with SIGCHLD."""
        if child.pid and not child.killed:
            child.killed = True
            self._log.error("%s %s: killed", child.role.name, reason)
            os.kill(child.pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        """The end of patience."""
        self._ending = True
        for child in [child for child in self._children if child.pid]:
            self._kill(child, "does not stop")
            os.waitpid(child.pid, 0)
            self._bury(child)

    # --- life -------------------------------------------------------------------------------------

    def _look_at_beats(self, due: float) -> None:
        """Kill the workers that stand still."""
        now = time.monotonic()
        # Where this process did not run either, all of them had no chance to: they have one now.
        late, again = now - due > BEAT_CHECK_S, now + BEAT_CHECK_S
        self.loop.call_at("beats", again, lambda: self._look_at_beats(again))
        for child in self._children:
            if not late and self._is_still(child, now):
                self._kill(child, f"has stood still for {BEAT_S_MAX:.0f} s")

    def _is_still(self, child: _Child, now: float) -> bool:
        if not (child.pid and child.ready and child.role.beat):
            return False
        return now - max(child.ready_at, child.role.beat() * 1e-9) > BEAT_S_MAX

    def _keep_watchdog_quiet(self) -> None:
        """sd_watchdog_enabled(3): say twice in each period that we live, if the workers do too.

        A hung worker is killed long before; one that even SIGKILL does not end is a reason for
        systemd to act.
        """
        period_s, now = manager.watchdog_s(), time.monotonic()
        if period_s is None:
            return
        self.loop.call_at("watchdog", now + period_s / 2, self._keep_watchdog_quiet)
        if not any(self._is_still(child, now) for child in self._children):
            manager.notify("WATCHDOG=1")

    # --- loading anew -----------------------------------------------------------------------------

    def _reload(self) -> None:
        """SIGHUP."""
        if self._ending or self._suspended is not None or self._on_reload is None:
            self._log.info("SIGHUP: nothing here can be reloaded")
            return
        manager.notify(
            f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading"
        )
        if self.loop.guarded(self._on_reload, lambda: False):
            # The others last, and those that are replaced already once more: it is newer news.
            self._to_replace, self._news = list(self._children), True
        self._reloading = True
        if self._turn is None:
            self._replace_next()

    def _replace_next(self) -> None:
        """One at a time, so that the others' sockets are served meanwhile."""
        self._turn = None
        while self._to_replace:
            child = self._to_replace.pop(0)
            if child.pid:  # one that waits for its restart gets what is new with it
                self._ask(child)
                if child.role.vital:
                    self._turn = child
                    return
        if self._reloading:
            self._log.info("reloaded" if self._news else "nothing was reloaded")
            self._reloading = self._news = False
            manager.notify(f"READY=1\nSTATUS={'draining' if self._draining else 'serving'}")

    # --- the end, and what comes before it --------------------------------------------------------

    def _be_told_to_stop(self, number: signal.Signals) -> None:
        if self._ending:
            self._kill_all()
        elif (
            number == signal.SIGTERM and self._on_drain and not (self._draining or self._suspended)
        ):
            self._log.info("draining on %s", number.name)
            self._draining = True
            manager.notify("STOPPING=1\nSTATUS=draining")
            self._ask_for_time()
            self.loop.guarded(self._on_drain)
            self._look_whether_drained()
        else:
            self._log.info("stopping on %s", number.name)
            self.stop()

    def _ask_for_time(self) -> None:
        self.loop.call_at("time", time.monotonic() + STOP_EXTENSION_S / 3, self._ask_for_time)
        manager.notify(f"EXTEND_TIMEOUT_USEC={STOP_EXTENSION_S * 1e6:.0f}")

    def _look_whether_drained(self) -> None:
        if self._ending:
            return
        if self.loop.guarded(self._drained, lambda: True):  # who cannot tell must not wait for ever
            self._log.info("drained")
            self.stop()
        else:
            at = time.monotonic() + DRAIN_CHECK_S
            self.loop.call_at("drain", at, self._look_whether_drained)

    def stop(self, code: Exit = Exit.STOPPED) -> None:
        """Stop all children, then `run` returns `code`."""
        manager.notify("STOPPING=1\nSTATUS=stopping")
        self._ending, self._code = True, code
        for child in self._children:
            self.loop.cancel(f"restart {child.role.name}")
            self._ask(child)

    def suspend(self, then: Callable[[], None]) -> None:
        """Stop all children and start none until `resume`; `then` is called when no worker is left.

        For handing over: what they worked with stays as it is.
        """
        self._suspended, self._to_replace, self._turn = then, [], None
        self._reloading = self._news = False
        for child in self._children:
            self.loop.cancel(f"restart {child.role.name}")
            self._ask(child)
        self._tell_suspended()

    def _tell_suspended(self) -> None:
        then = self._suspended
        if then and not any(child.pid for child in self._children if child.role.vital):
            self._suspended = events.nothing
            self.loop.guarded(then)

    def resume(self) -> None:
        """Start all children again after `suspend`; nothing happens if they run, or at the end."""
        if self._suspended is not None and not self._ending:
            self._suspended = None
            self._start_all()
