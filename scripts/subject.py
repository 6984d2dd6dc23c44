"""The system that chaos.py disturbs: dev.py's, with what an operator and systemd do to its parts.

What it owns: programs that can be killed, started again, restarted through a descriptor store,
handed over; and what can be seen of them from outside: logs, the relay's memory, leases in Redis,
signaling's health. It waits in an event loop, since calls go on there meanwhile.

Rules that stay true:
- Every program ends with this one, however this one ends (prctl(2) in rig.spawn), and is ended by
  its process id.
- A program that is started again is the same command with the same file and log.
- Every wait has an end: `PATIENCE_S`, then LateError, which names what did not come.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import dev
import rig

import host
import presence
import settings
import ufrag

PATIENCE_S = 15.0
"""How long anything may take. A program starts in one second, on a busy machine in three."""

POLL_S = 0.005
"""Between two looks: figures of time are that coarse."""

ANSWER_S_MAX = 2.0
"""For one answer of a part that may just have died."""


class LateError(Exception):
    """Something did not come in time; the message says what."""


class Subject(dev.System):
    """Its programs."""

    def __init__(self, folder: Path, managed: bool = True) -> None:
        super().__init__(folder)
        self.managed = managed
        """Whether a relay that is started from now on has a service manager."""
        self.store = rig.Store(folder)
        """What systemd would keep for the relay."""
        self.commands: dict[str, Any] = {}
        """How each was started, to start it again."""

    def meanwhile(self) -> None:
        """As systemd, take what the relay stores."""
        self.store.take()

    def launch(self, name: str, argv: Any) -> "subprocess.Popen[bytes]":
        """Start a program; the relay with what the store has."""
        store = self.store if name == "relay" else None
        log = self.state_dir / f"{name}.log"
        process = rig.spawn(list(argv), set(host.cpus()), log, store, self.managed)
        if store and not self.managed:
            store.forget()  # nobody keeps anything for it from now on
        self.commands.setdefault(name, argv)
        self.running[name] = process
        return process

    def log(self, name: str, since: int = 0) -> str:
        """What a program has said, from an octet on."""
        octets = (self.state_dir / f"{name}.log").read_bytes()
        return octets[since:].decode(errors="replace")

    def said(self, name: str) -> int:
        """How many octets its log has: where what it says next will begin."""
        return (self.state_dir / f"{name}.log").stat().st_size

    def last_line(self, name: str) -> str:
        """The last one of its log."""
        return self.log(name).strip().rpartition("\n")[2]

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a program a signal; after SIGKILL it is reaped, too."""
        process = self.running[name]
        process.send_signal(how)
        if how is signal.SIGKILL:
            process.wait()

    async def until(
        self, holds: Callable[[], object], what: str, most_s: float = PATIENCE_S
    ) -> None:
        """Wait until something is so, as systemd meanwhile. Raises LateError naming `what`."""
        deadline = time.monotonic() + most_s
        while not holds():
            self.store.take()
            if time.monotonic() > deadline:
                raise LateError(f"{what}: not within {most_s:g} s")
            await asyncio.sleep(POLL_S)
        self.store.take()

    async def says(
        self, name: str, pattern: str, since: int, most_s: float = PATIENCE_S
    ) -> "re.Match[str]":
        """Wait for a line, a regular expression. Raises LateError with the log's end."""
        try:
            await self.until(
                lambda: re.search(pattern, self.log(name, since)),
                f"{name} says {pattern!r}",
                most_s,
            )
        except LateError as error:
            raise LateError(f"{error}; {self.log_tail(name)}") from None
        found = re.search(pattern, self.log(name, since))
        assert found is not None  # as just seen, and logs only grow
        return found

    async def again(self, name: str, ready: str = r"\bready\b") -> None:
        """Start a program that has ended once more, and wait until it is ready."""
        since = self.said(name)
        self.launch(name, self.commands[name])
        await self.says(name, ready, since)

    def stop(self) -> None:
        """End all."""
        super().stop()
        self.store.close()


class World:
    """A running system as a tester sees it."""

    def __init__(self, subject: Subject, about: dev.About, http: aiohttp.ClientSession) -> None:
        """`about` is dev.py's; the session asks signaling."""
        self.subject, self.about, self.http = subject, about, http
        self.page = about["page"].rstrip("/")
        self.transceivers = about["transceivers"]
        config = subject.state_dir / "relay.toml"
        found = settings.load(config, settings.Relay)
        self.keyring, self._clusters = found.keys.load(), settings.clusters(found.cluster)
        self.relay = rig.Seen(
            config,
            subject.state_dir / "relay.log",
            found.relay.workers,
            found.relay.public.port,
            found.relay.internal.port,
        )
        self.adopt()

    def adopt(self) -> None:
        """Look at the relay's process and memory that are there now."""
        self.relay.process = self.subject.running["relay"]
        self.relay.attach()

    def home(self, call_id: str | None) -> str | None:
        """The transceiver that has a call, `address:port`, as the id itself says it."""
        name = ufrag.from_call_id(call_id or "")
        hint = ufrag.parse(self.keyring, self._clusters, name.encode()) if name else None
        return f"{hint.address}:{hint.port}" if isinstance(hint, ufrag.Hint) else None

    def leased(self, transceiver: str) -> bool:
        """Whether a transceiver stands in Redis. False without a Redis that answers."""
        if self.about["redis"] is None:
            return False
        address, _, port = self.about["redis"].rpartition(":")
        key = presence.PREFIX + transceiver.encode()
        try:
            with socket.create_connection((address, int(port)), ANSWER_S_MAX) as link:
                link.sendall(b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%s\r\n" % (len(key), key))
                return link.recv(64) == b":1\r\n"
        except OSError:
            return False

    async def serving(self) -> int:
        """How many transceivers take calls, as signaling knows; -1 if it does not answer."""
        limit = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        try:
            async with self.http.get(f"{self.page}/health", timeout=limit) as response:
                found: Mapping[str, Any] = await response.json()
                return int(found["transceivers_serving"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
            return -1

    async def hang_up(self, call_id: str) -> int:
        """End a call as its client would; the status of the answer, 0 if there is none."""
        limit = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        path = f"{self.page}/v1/realtime/calls/{call_id}/hangup"
        try:
            async with self.http.post(path, timeout=limit) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0

    async def until_serving(self, count: int, most_s: float = PATIENCE_S) -> float:
        """Wait until signaling knows of so many that take calls; returns how long it took, in
        seconds. Raises LateError."""
        began = time.monotonic()
        while await self.serving() != count:
            self.subject.store.take()
            if time.monotonic() - began > most_s:
                raise LateError(f"signaling does not know of {count} transceivers in {most_s:g} s")
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began

    async def succeed(self) -> None:
        """`relay handover`: another process takes over. Raises LateError; the one from before goes
        on then, if it still can."""
        subject, before, since = self.subject, self.relay.process, self.subject.said("relay")
        subject.running["relay before"] = before  # ended with the rest, however this goes
        argv = [dev.BIN / "relay", "handover", "--config", self.relay.config]
        process = subject.launch("relay", argv)

        def over() -> bool:
            ready = rig.READY_LINE in subject.log("relay", since)
            return process.poll() is not None or (ready and before.poll() is not None)

        try:
            await subject.until(over, "the successor serves and the relay from before ends")
        finally:
            if before.poll() is None:
                rig.end(process)
                subject.running["relay"] = before
            del subject.running["relay before"]
        if process.poll() is not None:
            raise LateError(f"the successor ended: {subject.last_line('relay')}")
        self.adopt()

    def wake(self) -> None:
        """Send the relay SIGHUP."""
        os.kill(self.relay.process.pid, signal.SIGHUP)
