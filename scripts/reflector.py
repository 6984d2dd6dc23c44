"""`flood.py echo`: a transceiver that sends every frame back, for a relay on another machine.

`flood.py packets` is its own transceiver where it can be. Where frames cannot get back to it (the
relay's transceivers live in a network of their own), this runs there, and the load is told
`--remote-echo`. It is one process, which one core can fill; several, at a port each, need several
loads.

Rules that stay true: only frames of the relay that was named are answered, and only to where they
came from, so that this is nobody's reflector; it stops by itself. What it got from others, and what
was no frame, is counted and not answered.
"""

import select
import time
from typing import Annotated

import load
import numpy as np
import options
import progress
import target
import typer
from findings import Finding

import frame

SECONDS_MAX = 86_400
POLL_S = 0.25

_MAGIC = np.frombuffer(frame.MAGIC, np.uint8)


class Reflector:
    """The socket, and what came."""

    def __init__(self, at: tuple[str, int], relay: str) -> None:
        """Listens at an address. Raises OSError."""
        self._sock = load._udp(*at)
        self._fd = self._sock.fileno()
        self._octets = np.zeros((load.BATCH, load.OCTETS + frame.HEADER_OCTETS + 1400), np.uint8)
        self._names = np.zeros(load.BATCH, load._NAME)
        self._in = load.Datagrams(self._octets, self._names)
        self._out = load.Datagrams(self._octets, self._names)
        self._relay = int.from_bytes(bytes(map(int, relay.split("."))), "big")
        self.echoed = self.refused = 0

    def __enter__(self) -> "Reflector":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def serve(self, seconds: float) -> None:
        """Answer what comes for at most so long."""
        end = time.monotonic() + seconds
        ready, _, _ = select.select([self._fd], (), (), seconds)
        while ready and (n := self._in.receive(self._fd)):
            self._answer(n)
            if time.monotonic() > end:  # more comes all the time
                return

    def _answer(self, n: int) -> None:
        self._out.to_send[:n] = self._in.received[:n]
        good = (self._octets[:n, : len(_MAGIC)] == _MAGIC).all(1)
        good &= self._in.received[:n] >= frame.HEADER_OCTETS
        good &= self._names["address"][:n] == self._relay
        count = int(good.sum())
        if count < n:  # rare, and so put together anew: the good ones come first
            chosen = np.flatnonzero(good)
            self._octets[:count] = self._octets[chosen]
            self._names[:count] = self._names[chosen]
            self._out.to_send[:count] = self._in.received[chosen]
        self.echoed, self.refused = self.echoed + count, self.refused + n - count
        self._out.send(self._fd, count)


def echo(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="The transceiver's address.")],
    relay: Annotated[str, typer.Option(metavar="HOST", help="Where frames may come from.")],
    seconds: Annotated[
        float, typer.Option(min=0.1, max=SECONDS_MAX, help="It stops after so long.")
    ] = 3600.0,
    as_json: options.AsJson = False,
    owned: options.Owned = False,
) -> None:
    """Be the transceiver of a load elsewhere: send every frame of a relay back to it."""

    def measure() -> Finding:
        host, port = target.endpoint(listen, owned)
        answered = target.guard(relay, owned)
        if ":" in host + answered:
            raise ValueError("this load is IPv4, and so is its echo")
        finding = Finding(f"An echo at {host}:{port} for the relay at {answered}")
        with Reflector((host, port), answered) as reflector:
            end = time.monotonic() + seconds
            with progress.bar(f"echo at {host}:{port}", seconds) as told:
                while (left := end - time.monotonic()) > 0:
                    reflector.serve(min(left, POLL_S))
                    told(seconds - left, f"{reflector.echoed} echoed")
            finding.figures = {"echoed": reflector.echoed, "not_answered": reflector.refused}
        return finding

    options.deliver(measure, as_json, None)
