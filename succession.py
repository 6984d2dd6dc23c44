"""The succession: one relay takes over from another that runs, where no service manager does it.

    successor                                   the relay that runs
    ---------------------------------------------------------------
    "hand over"             ->
                            <-  "descriptors", by SCM_RIGHTS, in as many messages as it takes
    prepares all it can
    "go"                    ->  its workers finish their batches and stop: datagrams wait in the
                            <-  "done"                                    sockets from here on
    starts its workers
    "serving"               ->  ends

What it owns: this conversation, over a socket of the relay's state folder: AF_UNIX, SOCK_SEQPACKET,
a JSON object a message, `{"say": ..., ...}`.

Rules that stay true:
- A successor that dies, is silent for too long, or says what it must not say, changes nothing: the
  relay that runs starts its workers again and says "resumed", whereupon a successor ends. One that
  has been silent too long is killed, since it may have workers that it does not speak of.
- A relay that dies in the middle leaves the whole to its successor.
- No two workers ever work in one memory, whatever goes wrong here: they claim it (host.py).
- Nobody but root and the relay's own user is heard (SO_PEERCRED, unix(7)).
- In the relay that runs nothing here blocks. The successor waits, with deadlines.

unix(7), cmsg(3)
"""

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import events
import legacy
import supervisor

DESCRIPTORS_MAX = 253
"""Descriptors in one message: SCM_MAX_FD of Linux."""

ANSWER_S_MAX = 5.0
"""How long either side waits for an answer that takes no work."""

PREPARE_S_MAX = 60.0
"""How long a successor may prepare. Nobody waits for it."""

SERVE_S_MAX = 15.0
"""How long a successor may take from "done" to "serving", while datagrams wait in the sockets. It
takes 50 ms, or some seconds where millions of flows are brought over into another layout."""

_VERSION = 1
_MESSAGE_OCTETS_MAX = 65_536
_CREDENTIALS = struct.Struct("=iII")

_log = logging.getLogger("handover")


class SuccessionError(Exception):
    """There is nothing to succeed to, or it has failed: the message says why."""


# --- the relay that runs --------------------------------------------------------------------------


class Testator:
    """The part of the relay that runs."""

    succeeded: bool
    """A successor serves."""

    def __init__(
        self,
        path: Path,
        runs: supervisor.Supervisor,
        descriptors: Callable[[], Sequence[tuple[str, int]]],
        on_resume: Callable[[], None] = events.nothing,
    ) -> None:
        """What is offered are `descriptors`. `on_resume` is called when a succession has failed
        after the workers had stopped: a successor may have published itself meanwhile."""
        self._path, self._supervisor, self._descriptors = path, runs, descriptors
        self._on_resume, self._loop = on_resume, runs.loop
        self._listener: socket.socket | None = None
        self._inode = 0
        self._peer: socket.socket | None = None
        self._pid = 0
        self._expected, self.succeeded = "", False

    def listen(self) -> None:
        """Be there for a successor from now on, in the place of any relay before. Raises OSError.

        To be called when this relay serves.
        """
        self.close()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with _short(fresh) as name:
            before = os.umask(0o177)  # nobody else's, from the start
            try:
                self._listener.bind(name)
            finally:
                os.umask(before)
        self._listener.listen(1)
        self._inode = fresh.stat().st_ino
        fresh.replace(self._path)
        self._loop.watch(self._listener, self._accept)

    def close(self) -> None:
        """Be there no more; what a successor has put in our place stays, or will: one that serves
        does so at any moment, also between a look at whose it is and taking it away."""
        if self._listener is not None:
            self._loop.unwatch(self._listener)
            self._listener.close()
            self._listener = None
            if self.succeeded:
                return
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        peer.setblocking(False)
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        refusal = ""
        if uid not in (0, os.geteuid()):
            refusal = "only root and the user of this relay may take over"
        elif self._peer is not None:
            refusal = "another one is taking over"
        elif os.environ.get("NOTIFY_SOCKET"):
            refusal = "a service manager runs this relay: restart it there"
        elif self._supervisor.busy:
            refusal = f"this relay is {self._supervisor.busy}"
        if refusal:
            _log.warning("process %d does not take over: %s", pid, refusal)
            self._refuse(peer, refusal)
            return
        self._peer, self._pid = peer, pid
        self._loop.watch(peer, self._hear)
        self._expect("hand over", ANSWER_S_MAX)

    def _refuse(self, peer: socket.socket, refusal: str) -> None:
        """Closed only when its request was read: else the kernel would take our answer back."""
        name = f"refused {peer.fileno()}"

        def close() -> None:
            self._loop.cancel(name)
            self._loop.unwatch(peer)
            with contextlib.suppress(OSError):
                peer.recv(_MESSAGE_OCTETS_MAX)
            peer.close()

        with contextlib.suppress(OSError):
            _say(peer, "refused", why=refusal)
        self._loop.watch(peer, close)
        self._loop.call_at(name, time.monotonic() + ANSWER_S_MAX, close)

    def _expect(self, word: str, patience_s: float) -> None:
        self._expected = word
        late = time.monotonic() + patience_s
        self._loop.call_at("succession", late, lambda: self._give_up("is silent", kill=True))

    def _hear(self) -> None:
        assert self._peer is not None
        try:
            said = _parse(self._peer.recv(_MESSAGE_OCTETS_MAX))
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._give_up(str(error))
            return
        word = said.get("say")
        if word != self._expected:
            self._give_up(f"says {word!r}, not {self._expected!r}", kill=True)
        elif word == "hand over":
            self._offer(said)
        elif word == "go":
            self._loop.cancel("succession")
            _log.info("process %d takes over: the workers stop", self._pid)
            self._expected = "serving"
            self._supervisor.suspend(self._done)
        else:
            self._loop.cancel("succession")
            self._loop.unwatch(self._peer)  # kept open: it sees when we have ended
            _log.info("process %d serves: this one ends", self._pid)
            self.succeeded = True
            self._supervisor.stop()

    def _offer(self, said: dict[str, Any]) -> None:
        if said.get("version") != _VERSION:
            self._give_up(f"speaks version {said.get('version')} of this")
            return
        assert self._peer is not None
        named = list(self._descriptors())
        parts = [named[i : i + DESCRIPTORS_MAX] for i in range(0, len(named), DESCRIPTORS_MAX)]
        try:
            for left, part in reversed(list(enumerate(reversed(parts)))):
                names, fds = [name for name, _ in part], [fd for _, fd in part]
                _say(self._peer, "descriptors", fds, names=names, left=left)
        except OSError as error:
            self._give_up(f"cannot be given descriptors: {error.strerror}")
            return
        _log.info("process %d prepares to take over", self._pid)
        self._expect("go", PREPARE_S_MAX)

    def _done(self) -> None:
        if self._peer is None:
            return
        try:
            _say(self._peer, "done")
        except OSError as error:
            self._give_up(error.strerror or "is gone")
            return
        self._expect("serving", SERVE_S_MAX)

    def _give_up(self, reason: str, kill: bool = False) -> None:
        """Go on as if nobody had come."""
        _log.error("process %d does not take over: it %s", self._pid, reason)
        self._loop.cancel("succession")
        if self._peer is not None:
            with contextlib.suppress(OSError):
                _say(self._peer, "resumed")
            self._loop.unwatch(self._peer)
            self._peer.close()
            self._peer = None
        stopped, self._expected = self._expected == "serving", ""
        if stopped:
            if kill and self._pid > 0:  # 0: of another process namespace
                with contextlib.suppress(OSError):
                    os.kill(self._pid, signal.SIGKILL)
            self._supervisor.resume()
            try:
                self.listen()
            except OSError as error:
                _log.warning("nobody can take over any more: %s", error)
            self._loop.guarded(self._on_resume)


# --- the one that takes over ----------------------------------------------------------------------


class Successor:
    """The part of the relay that takes over."""

    estate: legacy.Estate
    """What the other one has. Its workers are still at work there."""

    def __init__(self, path: Path) -> None:
        """Ask the relay at `path` for all it has. Raises SuccessionError."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(ANSWER_S_MAX)
        try:
            with _short(path) as name:
                self._sock.connect(name)
            _say(self._sock, "hand over", version=_VERSION)
        except OSError as error:
            self._sock.close()
            what = "no relay of this configuration is running"
            raise SuccessionError(f"{what}: {path}: {error.strerror}") from error
        named: list[tuple[str, int]] = []
        try:
            while self._take(named):
                pass
        except (OSError, TypeError, ValueError) as error:
            for _, fd in named:
                os.close(fd)
            self._sock.close()
            raise SuccessionError(f"the relay that runs hands nothing over: {error}") from error
        self.estate = legacy.Estate(named, live=True)

    def _take(self, named: list[tuple[str, int]]) -> int:
        """One message of descriptors; returns how many are to follow."""
        data, fds, flags, _ = socket.recv_fds(
            self._sock, _MESSAGE_OCTETS_MAX, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
        )
        with contextlib.ExitStack() as failed:
            for fd in fds:
                failed.callback(os.close, fd)
            said = _parse(data)
            names, left = list(map(str, said.get("names", ()))), int(said.get("left", 0))
            if said.get("say") != "descriptors":
                raise ValueError(said.get("why") or f"it says {said.get('say')!r}")
            if flags & socket.MSG_CTRUNC or len(names) != len(fds):
                raise ValueError("there is no room for its descriptors: raise LimitNOFILE")
            failed.pop_all()
        named.extend(zip(names, fds, strict=True))
        return left

    def go(self) -> None:
        """Have the other one stop its workers; returns when they have. Raises SuccessionError.

        If it dies meanwhile, all is ours.
        """
        self._sock.settimeout(ANSWER_S_MAX + supervisor.STOP_S)
        try:
            _say(self._sock, "go")
            data = self._sock.recv(_MESSAGE_OCTETS_MAX)
            word = _parse(data).get("say") if data else "done"
        except TimeoutError as error:
            raise SuccessionError("the relay that runs does not stop its workers") from error
        except (ConnectionError, ValueError):
            word = "done"
        if word != "done":
            raise SuccessionError(f"the relay that runs says {word!r}")
        self._sock.setblocking(False)

    def follow(self, heir: supervisor.Supervisor) -> None:
        """Stop `heir`, which is about to run, if the other one starts its workers again."""

        def hear() -> None:
            with contextlib.suppress(OSError, ValueError):
                if _parse(self._sock.recv(_MESSAGE_OCTETS_MAX)).get("say") == "resumed":
                    _log.error("the relay before has gone on: this one ends")
                    heir.stop(supervisor.Exit.SUCCESSION)
            heir.loop.unwatch(self._sock)
            self._sock.close()

        heir.loop.watch(self._sock, hear)

    def serving(self) -> None:
        """Let the other one end."""
        with contextlib.suppress(OSError):  # it has died: there is nobody to tell
            _say(self._sock, "serving")


def _say(sock: socket.socket, word: str, fds: Sequence[int] = (), **more: object) -> None:
    socket.send_fds(sock, [json.dumps({"say": word, **more}).encode()], fds)


def _parse(data: bytes) -> dict[str, Any]:
    """A message. Raises ValueError."""
    if not data:
        raise ValueError("is gone")
    try:
        said = json.loads(data)
    except ValueError as error:
        raise ValueError("says what is not JSON") from error
    if not isinstance(said, dict):
        raise ValueError("says what is not a message")  # noqa: TRY004
    return said


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of a socket's path that fits into struct sockaddr_un, whatever its folder's length."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
