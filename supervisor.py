"""The supervisor: forks workers, pins them, watches them, replaces them, and tells systemd.

What it owns: processes, signals, and one socket pair (a *link*) to each worker. It knows nothing
of what they do. Whatever its caller opened before `run` (sockets, shared memory) is inherited by
every worker, the first and its successors, and stays open in between: the kernel goes on queueing
for a worker that has just died.

    worker:      set up, `link.send(READY)`, work until the link is readable, return an exit code
    supervisor:  closes its end to stop a worker, so that workers stop as well when it dies

Rules that stay true:
- Signal handlers only queue: the interpreter writes the signal's number into a pipe, and one loop
  reads pipe and links.
- Workers ignore SIGTERM, SIGINT and SIGHUP, which a terminal or a process group sends to all at
  once: what happens to them is decided here.
- A worker that dies after it was ready is replaced at once; the next time with a delay that
  doubles while they keep dying young. A worker that dies before it is ready has failed to start,
  and `START_FAILURES_MAX` of those in a row end everything, with an exit code of its own: a loop
  of failing starts would hide the reason and look alive.
- The exit code says who has to act: see `Exit`.

After gunicorn's arbiter. fork(2), signal(7), sd_notify(3), systemd.exec(5)
"""

import enum
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import host

READY = b"+"
"""What a worker sends on its link when it serves."""

START_FAILURES_MAX = 3
"""Starts in a row that may fail: one could be bad luck, three are a reason to look at."""

RESTART_DELAY_S_MIN = 0.05
RESTART_DELAY_S_MAX = 5.0
"""Between restarts of a worker that dies young. The first restart has no delay at all: datagrams
are waiting in its sockets. Longer delays would lose what a receive buffer cannot hold."""

YOUNG_S = 5.0
"""A worker that dies within this time of its start is dying young."""

STOP_S = 5.0
"""How long workers may take to stop before they are killed. They need a millisecond."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Exit(enum.IntEnum):
    """Exit codes of a supervised program, those of sysexits.h where it has one."""

    STOPPED = 0
    """It was asked to stop, and did."""
    ADDRESS = 69
    """A socket could not be opened: the address is not this host's, or taken (EX_UNAVAILABLE)."""
    WORKER = 70
    """A worker could not start `START_FAILURES_MAX` times in a row (EX_SOFTWARE)."""
    CONFIGURATION = 78
    """The configuration or the key file is wrong (EX_CONFIG)."""


@dataclass(slots=True)
class _Worker:
    """What the supervisor knows of one worker."""

    number: int
    """0 to count - 1."""
    cpu: int | None
    """Where it is pinned; None where it runs free."""
    pid: int = 0
    """0 while there is no process."""
    link: socket.socket | None = None
    """Our end."""
    ready: bool = False
    started_at: float = 0.0
    died_at: float | None = None
    """When its predecessor died, until it is ready."""
    restart_at: float = 0.0
    delay_s: float = 0.0
    failures: int = 0
    """Failed starts in a row."""


class Supervisor:
    """Runs one function in several processes until it is told to stop."""

    def __init__(
        self,
        cpus: Sequence[int | None],
        work: Callable[[int, socket.socket], int],
        log: logging.Logger,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """One worker for each of `cpus` (None: not pinned).

        `work(number, link)` runs in the worker; what it returns is the worker's exit code.
        `on_ready` is called here once, when all of them serve for the first time.
        """
        self._workers = [_Worker(number, cpu) for number, cpu in enumerate(cpus)]
        self._work, self._log, self._on_ready = work, log, on_ready
        self._announced = False
        self._stopping = False
        self._kill_at = float("inf")
        self._code = Exit.STOPPED
        self._poll = select.poll()
        self._wake_reader, self._wake_writer = os.pipe()

    def run(self) -> int:
        """Start all workers and stay until the end; returns the exit code."""
        for end in (self._wake_reader, self._wake_writer):
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        handlers = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        self._poll.register(self._wake_reader, select.POLLIN)
        gc.collect()
        gc.freeze()  # what exists now is shared with the workers: a collection would copy its pages
        try:
            while not self._over():
                self._restart()
                for fd, _ in self._poll.poll(self._patience_ms()):
                    if fd == self._wake_reader:
                        self._take_signals()
                    else:
                        self._hear(fd)
                if time.monotonic() >= self._kill_at:
                    self._kill()
        finally:
            self._kill()
            signal.set_wakeup_fd(before)
            for number, handler in zip(_SIGNALS, handlers, strict=True):
                signal.signal(number, handler)
        return self._code

    def _over(self) -> bool:
        return self._stopping and not any(worker.pid for worker in self._workers)

    def _restart(self) -> None:
        """Start every worker that is due."""
        now = time.monotonic()
        for worker in self._workers:
            if not (worker.pid or self._stopping) and worker.restart_at <= now:
                self._fork(worker)

    def _patience_ms(self) -> float | None:
        """How long to wait for a signal or a worker; None: as long as it takes."""
        due = [worker.restart_at for worker in self._workers if not worker.pid]
        due = [] if self._stopping else due
        if self._stopping:
            due.append(self._kill_at)
        return max(0.0, min(due) - time.monotonic()) * 1000 if due else None

    def _fork(self, worker: _Worker) -> None:
        ours, theirs = socket.socketpair()
        worker.started_at, worker.ready = time.monotonic(), False
        pid = os.fork()
        if not pid:
            self._become(worker, theirs, ours)
        theirs.close()
        worker.pid, worker.link = pid, ours
        self._poll.register(ours, select.POLLIN)

    def _become(self, worker: _Worker, theirs: socket.socket, ours: socket.socket) -> None:
        """In the child: drop what is the supervisor's, then work. Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # An inherited end of another link would keep it open after the supervisor's death.
            for other in self._workers:
                if other.link is not None:
                    other.link.close()
            ours.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            if worker.cpu is not None and not host.pin(worker.cpu):
                self._log.warning("worker %d cannot be pinned to a CPU", worker.number)
            code = self._work(worker.number, theirs)
        except BaseException:
            self._log.exception("worker %d failed", worker.number)
        finally:
            logging.shutdown()
            os._exit(code)

    def _take_signals(self) -> None:
        for number in os.read(self._wake_reader, 4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                if self._stopping:
                    self._kill()
                else:
                    self._log.info("stopping on %s", signal.Signals(number).name)
                    self._stop(Exit.STOPPED)
            elif number == signal.SIGHUP:
                self._log.info("SIGHUP: nothing here can be reloaded")
        # SIGCHLD: one signal may stand for several children, and another's is not ours to reap.
        for worker in self._workers:
            if worker.pid and os.waitpid(worker.pid, os.WNOHANG)[0]:
                self._bury(worker)

    def _hear(self, fd: int) -> None:
        """A worker said that it is ready, or its link broke (its death is another signal)."""
        links = [worker for worker in self._workers if worker.link and worker.link.fileno() == fd]
        if not links:  # buried a moment ago, by a signal of the same round
            return
        (worker,) = links
        assert worker.link is not None
        try:
            said = worker.link.recv(64)
        except OSError:
            said = b""
        if not said:
            self._poll.unregister(fd)
            return
        worker.ready, worker.failures = True, 0
        if worker.died_at is not None:
            took_ms = (time.monotonic() - worker.died_at) * 1000
            self._log.info("worker %d serves again after %.0f ms", worker.number, took_ms)
            worker.died_at = None
        if not self._announced and all(each.ready for each in self._workers):
            self._announced = True
            self._on_ready()
            notify("READY=1\nSTATUS=serving")

    def _bury(self, worker: _Worker) -> None:
        now = time.monotonic()
        pid, worker.pid = worker.pid, 0
        if worker.link is not None:
            try:
                self._poll.unregister(worker.link)
            except KeyError:  # `_hear` saw the link break first
                pass
            worker.link.close()
            worker.link = None
        if self._stopping:
            return
        worker.died_at = now
        worker.failures += not worker.ready
        if worker.failures >= START_FAILURES_MAX:
            self._log.error(
                "worker %d could not start %d times: giving up", worker.number, worker.failures
            )
            self._stop(Exit.WORKER)
            return
        young = now - worker.started_at < YOUNG_S
        worker.restart_at = now + worker.delay_s
        worker.delay_s = (
            min(RESTART_DELAY_S_MAX, max(RESTART_DELAY_S_MIN, 2 * worker.delay_s)) if young else 0.0
        )
        self._log.error("worker %d (pid %d) died: its successor takes over", worker.number, pid)

    def _stop(self, code: Exit) -> None:
        notify("STOPPING=1")
        self._stopping, self._code = True, code
        self._kill_at = time.monotonic() + STOP_S
        for worker in self._workers:
            if worker.link is not None:
                worker.link.shutdown(socket.SHUT_WR)

    def _kill(self) -> None:
        """The end of patience."""
        self._kill_at = float("inf")
        for worker in self._workers:
            if worker.pid:
                self._log.error("worker %d does not stop: killed", worker.number)
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
                self._stopping = True
                self._bury(worker)


def notify(state: str) -> None:
    """Tell systemd, or whoever named a NOTIFY_SOCKET; nothing happens without one. sd_notify(3)"""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:  # nobody there: no reason to stop serving
            pass
