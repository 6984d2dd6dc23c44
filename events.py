"""A loop of sockets and timers for a process that must not end: what fails in it is logged.

What it owns: one poll(2), the callbacks of the sockets in it, and calls at a later time. It is what
the supervisor waits with; asyncio would bring a selector, a thread pool and a few hundred
allocations to a process that is forked again and again, for a dozen descriptors.

Rules that stay true:
- A callback must not block. What it raises is logged and goes no further; a socket whose callback
  raised is watched no longer, since it would be ready again at once.
- Callbacks may watch, forget and arrange anything, themselves included.

poll(2)
"""

import functools
import logging
import select
import socket
import time
from collections.abc import Callable


def nothing(*_: object) -> None:
    """The callback of a caller that has none."""


class Loop:
    """Sockets to watch and calls to make."""

    def __init__(self, log: logging.Logger) -> None:
        """`log` gets what callbacks raise."""
        self._log = log
        self._poll = select.poll()
        self._watched: dict[int, tuple[socket.socket, Callable[[], None]]] = {}
        self._calls: dict[str, tuple[float, Callable[[], None]]] = {}

    @property
    def sockets(self) -> list[socket.socket]:
        """All that are watched: a forked child closes its copies, or their peers see no end."""
        return [sock for sock, _ in self._watched.values()]

    def watch(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back whenever a socket is readable or broken, until `unwatch`."""
        self._watched[sock.fileno()] = sock, callback
        self._poll.register(sock, select.POLLIN)

    def unwatch(self, sock: socket.socket) -> None:
        """To be called before it is closed; nothing happens if it was not watched."""
        if self._watched.pop(sock.fileno(), None):
            self._poll.unregister(sock)

    def call_at(self, name: str, at: float, callback: Callable[[], None]) -> None:
        """Call back once at `at` of the monotonic clock, instead of any other call of that name."""
        self._calls[name] = at, callback

    def cancel(self, name: str) -> None:
        """Forget a call; nothing happens if there is none of that name."""
        self._calls.pop(name, None)

    def turn(self) -> None:
        """Wait for the next event and make its calls."""
        due = [at for at, _ in self._calls.values()]
        patience_ms = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
        for fd, _ in self._poll.poll(patience_ms):
            if fd in self._watched:  # not forgotten by a callback of the same round
                sock, callback = self._watched[fd]
                self.guarded(callback, functools.partial(self.unwatch, sock))
        now = time.monotonic()
        for name in [name for name, (at, _) in self._calls.items() if at <= now]:
            if name in self._calls:
                self.guarded(self._calls.pop(name)[1])

    def guarded(
        self, callback: Callable[[], object], otherwise: Callable[[], object] = nothing
    ) -> object:
        """What a callback returns; if it raises, that is logged, and what `otherwise` returns."""
        try:
            return callback()
        except Exception:
            self._log.exception("a callback failed")
            return otherwise()
