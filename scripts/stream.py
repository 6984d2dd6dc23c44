"""A stream of datagrams beside calls: load.py in a process of its own, accounted for.

For flood.py. The calls' process is busy with their DTLS and SRTP and would be late with the stream,
so the stream has a process for itself. It is told three things: where the relay is, how many
datagrams a second, and that it is over. It plays its own transceiver, at a port of the cluster that
no transceiver has. What is lost on the way is lost by the relay, then, and known by its number.

Rules that stay true:
- The process is forked before anything else is opened: a descriptor that it inherits would outlive
  whoever was meant to own it (a second reader of a relay's socket, say).
- It ends with its parent, however that ends, and hears no Ctrl-C of its own.

prctl(2) https://man7.org/linux/man-pages/
"""

import ctypes
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import dev
import numpy as np
from load import PATIENCE_S, QUIET_S, Account, Load

PIECE_S = 0.5
"""How long the process sends before it looks up again; it hears of the end within a millisecond."""

SETTLE_S = 5 * QUIET_S
"""As QUIET_S: what is disturbed here may stand still, and has lost nothing by that."""

ANSWER_S_MAX = PATIENCE_S + 2 * SETTLE_S
"""How long any answer of the process may take: opening all flows is the longest."""

_PR_SET_PDEATHSIG = 1


class StreamError(dev.StartError):
    """The process could not do what it was told; the message says why."""


@dataclass(frozen=True)
class Told:
    """What the process has to say at the end."""

    account: Account
    datagrams: int
    """All that its clients ever sent, first checks included."""
    ports: frozenset[int]
    """Of its own sockets."""


class Stream:
    """The process, seen from the one that started it."""

    def __init__(self, clients: int) -> None:
        """Fork it. To be done before any descriptor is open that it must not hold."""
        context = multiprocessing.get_context("fork")
        self.clients = clients
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, self._pipe, clients), daemon=True
        )
        self._process.start()
        theirs.close()
        self.port: int = self._hear()
        """UDP port of its transceiver, at 127.0.0.1."""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def begin(
        self, relay: tuple[str, int], firsts: Sequence[bytes], rate: int, most_s: float
    ) -> None:
        """Open a flow for each client through a relay, then send `rate` datagrams a second until
        `end`, for `most_s` at the most. Returns once it sends. Raises StreamError."""
        self._pipe.send((relay, list(firsts), rate, most_s))
        self._hear()

    def end(self) -> Told:
        """Stop sending, wait for what is on the way, and account. Raises StreamError."""
        self._pipe.send(None)
        told = self._hear()
        assert isinstance(told, Told)  # what `_work` sends
        return told

    def _hear(self) -> Any:
        if not self._pipe.poll(ANSWER_S_MAX):
            raise StreamError("the stream's process does not answer")
        try:
            said = self._pipe.recv()
        except EOFError:
            raise StreamError("the stream's process has ended") from None
        if isinstance(said, str):
            raise StreamError(said)
        return said


def lost(account: Account, since_ns: int, until_ns: int) -> int:
    """Datagrams sent between two moments of CLOCK_MONOTONIC that never came back."""
    chosen = (account.sent_at >= since_ns) & (account.sent_at < until_ns)
    return int((chosen & (account.back_at == 0)).sum())


def silence_ms(account: Account, since_ns: int, until_ns: int) -> float:
    """The longest time between two moments in which nothing at all came back, in milliseconds."""
    back = account.back_at[(account.back_at >= since_ns) & (account.back_at <= until_ns)]
    steps = np.diff(np.concatenate(([since_ns], np.sort(back), [until_ns])))
    return float(steps.max()) / 1e6


def _work(pipe: Connection, parents: Connection, clients: int) -> None:
    parents.close()  # or the parent's end would not break with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.PyDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        with Load(clients) as load:
            load.quiet_s = SETTLE_S
            pipe.send(load.port)
            relay, firsts, rate, most_s = pipe.recv()
            load.towards(*relay)
            load.open(firsts)
            load.begin(rate, most_s)
            pipe.send(None)
            while not load.run(PIECE_S, pipe.poll):
                pass
            pipe.recv()
            pipe.send(Told(load.settle(), load.datagrams, frozenset(load.ports)))
            pipe.poll(ANSWER_S_MAX)  # the parent ends this process
    except EOFError:  # the parent has gone
        return
    except (OSError, RuntimeError, TimeoutError) as error:
        pipe.send(f"the stream beside the calls: {error}")
