"""Processes that make load together, a Load each on a CPU of its own, and one account of all.

What it owns: `Crew`, which forks them, gives each the same order at the same moment and adds up
what they report. A Load is one thread, and one core is what it can fill.

                    Order: rate, seconds, when to begin
    Crew  ------------------------------------------------>  process 0: clients 0, P, 2P, ...
      |   <------------------------------------------------  its Load, its two sockets
      |             Part: histograms and counts              process 1: ...
      +-- adds Parts: every number is a sum or a maximum, so nothing is lost by adding

Each process has addresses, ports and hints of its own, its transceiver's among them (port, port
+ 1, ...), so that it sees every datagram that it sent, on the way in and on the way back.

Rules that stay true:
- Datagrams of all processes leave in turns: process i is i/P of an interval behind the first.
- A process ends with its parent, whatever happens to that, and on an end of its pipe.
- An error of a process is raised in the parent, as it was.
"""

import contextlib
import ctypes
import errno
import gc
import multiprocessing.connection
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any

import instrument
import intervals
import numpy as np
import rig
from load import BATCH, LATE_MS, LOOPBACK, Account, Array, Figures, Load

import host

TOGETHER_S = 0.05
"""From an order to the moment at which all begin: they have read it by then."""

POLL_S = 0.25
"""How often the parent looks at the relay and moves its bar meanwhile. It costs the load's CPU
under a millisecond each."""

_PR_SET_PDEATHSIG = 1

ANSWER_S = 60.0
"""A process that has not reported so long after its order's end has failed."""


@dataclass(frozen=True)
class Plan:
    """Who sends where."""

    clients: int
    relay: tuple[str, int]
    transceiver: tuple[str, int]
    """Of the first process; each further one has the port after it."""
    sources: int
    """The first client's address, as a number."""
    mint: Callable[[int], bytes]
    """The first check of a new client of the transceiver at a port."""
    cpus: Sequence[int]
    """One for each process."""
    spin: bool = True
    echoes: bool = True
    """False: the transceiver is an echo elsewhere (one port for all)."""
    patience_s: float = 5.0
    """How long clients may wait for their first answer."""
    frames_from: str = LOOPBACK
    """The prefix of addresses that the relay's frames come from."""

    def share(self, number: int) -> int:
        """How many of the clients are a process's."""
        processes = len(self.cpus)
        return self.clients // processes + (number < self.clients % processes)


@dataclass(frozen=True)
class Order:
    """What all processes together are to send."""

    rate: float
    """Datagrams a second, of all."""
    seconds: float
    last: float | None = None
    """The rate at the end, if it changes evenly."""
    slices: int = 1
    """Pieces of equal length that are told apart."""
    queue_s: float = 0.0
    """Stop once more is on its way than is sent in so long; 0: never."""
    started: int = 0


@dataclass
class Part:
    """What became of an order's datagrams, of one process or of several."""

    sent: Array
    """A number a slice, by when each datagram was due, like the next three."""
    lost: Array
    late: Array
    """Came back later than LATE_MS after they were due."""
    trips: Array
    """Round trips from when each was due: a histogram (intervals.py) a slice."""
    trips_sent: Array
    """The same from when each left."""
    crossed: int
    duplicated: int
    duplicated_inbound: int
    foreign: int
    reordered: int
    unsent: int
    """Due, and never sent, because the tool was too slow or had stopped."""
    stopped: int
    """Processes that stopped since a queue grew."""
    lag_ms: float
    """How far the slowest process was behind the clock at worst."""
    ran_s: float
    """How long the longest process sent: less than was ordered, if all stopped."""
    own_drops: int = 0
    """Datagrams that the tool's own sockets had no room for, by the kernel's count."""
    strangers: int = 0
    """Datagrams at the transceiver that were not the relay's."""

    def __add__(self, other: "Part") -> "Part":
        """Both together."""
        mine, theirs = vars(self), vars(other)
        both = {each.name: mine[each.name] + theirs[each.name] for each in fields(self)}
        highest = {name: max(mine[name], theirs[name]) for name in ("lag_ms", "ran_s")}
        return Part(**both | highest)

    def loss(self) -> float:
        """The share that was lost or late."""
        return float((self.lost + self.late).sum()) / max(int(self.sent.sum()), 1)


class _Ready(Load):
    """A Load that sleeps until something is due or has come, for CPUs that others need, too."""

    def _sleep(self, until: int) -> None:
        if (left := until - time.monotonic_ns()) > 0:
            select.select(self._fds, (), (), left * 1e-9)


class Crew:
    """The processes. Use as a context: it leaves none of them behind."""

    def __init__(self, plan: Plan) -> None:
        """Fork them. To be done before this process has any thread."""
        self.plan = plan
        self._pids: list[int] = []
        self._pipes: list[Connection] = []
        for number, cpu in enumerate(plan.cpus):
            ours, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if not pid:
                _child(plan, number, cpu, theirs, [*self._pipes, ours])
            theirs.close()
            self._pids.append(pid)
            self._pipes.append(ours)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # they hold nothing that wants to be put in order
            os.waitpid(pid, 0)

    def cpu_s(self) -> float:
        """CPU time of all of them and of this process."""
        return sum(map(rig.cpu_s, [os.getpid(), *self._pids]))

    def alone(self, rate: float, seconds: float) -> Figures:
        """What one process costs itself, at its share of a rate for so long, and how exact its
        clock is."""
        self._tell(self._pipes[:1], "alone", (rate / len(self._pids), seconds))
        return dict(self._answers(self._pipes[:1], ANSWER_S)[0])

    def open(self) -> int:
        """New clients from new ports, every one with a flow that is assured. Returns the octets of
        the smallest receive buffer that the kernel granted a socket. Raises TimeoutError
        if some are not answered, and OSError for an address that cannot be taken."""
        self._tell(self._pipes, "open", None)
        granted: list[int] = self._answers(self._pipes, self.plan.patience_s + ANSWER_S)
        return min(granted)

    def round(self, order: Order, look: Callable[[float], None] | None = None) -> Part:
        """Carry out an order. `look` is called now and then with the seconds since it began."""
        started = time.monotonic_ns() + int(TOGETHER_S * 1e9)
        self._tell(self._pipes, "round", Order(**vars(order) | {"started": started}))
        parts = self._answers(self._pipes, order.seconds + ANSWER_S, look, started)
        whole: Part = sum(parts[1:], parts[0])
        return whole

    @staticmethod
    def _tell(pipes: Sequence[Connection], what: str, words: Any) -> None:
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):  # it has ended: so says its answer
                pipe.send((what, words))

    def _answers(
        self,
        pipes: Sequence[Connection],
        patience_s: float,
        look: Callable[[float], None] | None = None,
        started: int = 0,
    ) -> list[Any]:
        """What each says. Raises what one of them raised, and ConnectionError if one has ended."""
        found: dict[Connection, Any] = {}
        deadline = time.monotonic() + patience_s
        while len(found) < len(pipes):
            missing = [pipe for pipe in pipes if pipe not in found]
            for pipe in multiprocessing.connection.wait(missing, POLL_S):
                assert isinstance(pipe, Connection)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError) as error:
                    raise ConnectionError("a process that makes load has ended") from error
                if isinstance(answer, BaseException):
                    raise answer
                found[pipe] = answer
            if look:
                look(max(0.0, (time.monotonic_ns() - started) * 1e-9))
            if time.monotonic() > deadline:
                raise TimeoutError(f"no report from a process that makes load in {patience_s} s")
        return [found[pipe] for pipe in pipes]


# --- in a process ---------------------------------------------------------------------------------


def _child(plan: Plan, number: int, cpu: int, pipe: Connection, others: list[Connection]) -> None:
    """The life of a process; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ctypes.PyDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # prctl(2)
        for other in others:
            other.close()
        host.pin(cpu)
        gc.disable()  # its pauses would be in the figures; accounts hold no cycles
        _Loader(plan, number).serve(pipe)
        status = 0
    finally:
        os._exit(status)


class _Loader:
    """One process's clients."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan, self._number = plan, number
        self._load: Load | None = None
        self._own_drops = self._strangers = 0

    def serve(self, pipe: Connection) -> None:
        """Do what is asked, until nobody asks any more."""
        does: dict[str, Callable[[Any], Any]] = {
            "alone": self._alone,
            "open": self._open,
            "round": self._round,
        }
        while True:
            try:
                what, words = pipe.recv()
            except EOFError:
                return
            try:
                answer = does[what](words)
            except Exception as error:  # told to the parent, which raises it
                answer = error
            pipe.send(answer)

    def _alone(self, words: tuple[float, float]) -> Figures:
        found = instrument.alone(*words, self._plan.spin)
        return {"alone": found, "clock": instrument.clock()}

    def _open(self, _: None) -> int:
        plan, number = self._plan, self._number
        if self._load:
            self._load.__exit__()
        mine = plan.share(number)
        before = sum(map(plan.share, range(number)))
        at, port = plan.transceiver
        if plan.echoes:
            port += number
        kind = Load if plan.spin else _Ready
        try:
            self._load = load = kind(
                mine, port, plan.spin, at, plan.sources + before, plan.echoes, plan.frames_from
            )
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {error}"
            raise OSError(f"the transceiver's address {at}:{port} {why}") from error
        load.towards(*plan.relay)
        load.open([plan.mint(port) for _ in range(mine)], plan.patience_s)
        self._own_drops, self._strangers = rig.kernel_drops(load.ports), load.strangers
        return load.buffer_octets()

    def _round(self, order: Order) -> Part:
        load, plan = self._load, self._plan
        assert load is not None  # the parent opens before it orders
        share = plan.share(self._number) / plan.clients
        rate, last = order.rate * share, order.last and order.last * share
        # The parent's moment, and this process's place in the turns.
        started = order.started + int(self._number / order.rate * 1e9)
        load.begin(rate, order.seconds, last, started)
        end = started + int(order.seconds * 1e9)
        queue = rate * order.queue_s + BATCH if order.queue_s else float("inf")
        stopped = load.run((end - time.monotonic_ns()) * 1e-9, lambda: load.outstanding > queue)
        ran_s = min((time.monotonic_ns() - started) * 1e-9, order.seconds)
        total, patience = load.scheduled, end + int(LATE_MS * 1e6)
        while not stopped and load.count < total and time.monotonic_ns() < patience:
            load.burst(min(BATCH, total - load.count))  # came due while the tool was late
        unsent = max(0, total - load.count)
        done = part(load.settle(), order.seconds, order.slices, started, unsent, stopped)
        drops, strangers = rig.kernel_drops(load.ports), load.strangers
        done.own_drops, done.strangers = drops - self._own_drops, strangers - self._strangers
        self._own_drops, self._strangers = drops, strangers
        done.ran_s = ran_s
        return done


def part(
    account: Account, seconds: float, slices: int, started: int, unsent: int, stopped: bool
) -> Part:
    """An account as it is added to others."""
    at = ((account.intended_at - started) * (slices / seconds * 1e-9)).astype(np.int64)
    at = at.clip(0, slices - 1)
    back = account.back_at > 0
    trips, trips_sent = account.trips_us(), account.trips_us(account.sent_at)
    late = trips > LATE_MS * 1000
    here = at[back]

    def histograms(values: Array) -> Array:
        rows = [intervals.counts(values[here == each]) for each in range(slices)]
        return np.array(rows, np.int32)

    return Part(
        sent=np.bincount(at, minlength=slices),
        lost=np.bincount(at[~back], minlength=slices),
        late=np.bincount(here[late], minlength=slices),
        trips=histograms(trips),
        trips_sent=histograms(trips_sent),
        crossed=account.crossed,
        duplicated=account.duplicated,
        duplicated_inbound=account.duplicated_inbound,
        foreign=account.foreign,
        reordered=account.reordered,
        unsent=unsent,
        stopped=int(stopped),
        lag_ms=account.lag_ms,
        ran_s=seconds,
    )
