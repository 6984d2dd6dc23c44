"""How long audio takes through a transceiver: packet in to PCM at the backend, PCM to packet out.

    passage.py                      20 s on paths of several losses, as tables
    passage.py --json --seconds 5

A real transceiver with its real socket, SRTP, codec and sessions, in this process, and one caller
(callers.py) for each path, whose packets are sent late, twice or not at all as impair.py says. The
backend is a stopwatch. Callers and transceiver share one event loop, one CPU and one clock: what
the kernel and the loop add is in the figures.

What is exact is asserted: no PCM is missing, and each reply is one packet.
"""

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path as File
from typing import Annotated, Any

import callers
import dev
import quality
import typer
from impair import Arrival, Path, travel

import opening
import rtp
import settings
import transceiver

Figures = dict[str, Any]

RATE_HZ = 16_000
FRAME_S = 0.02
FRAME_OCTETS = round(2 * RATE_HZ * FRAME_S)
REPLY_EVERY_S = 0.25
"""Longer than a reply of one frame: the Playout is idle before each."""
TAIL_PACKETS = 3
"""Sent on every path at the end, so that no hole is left open."""

PATHS = (
    Path("no loss", delay_s=0),
    Path("loss 2 %", loss=0.02, delay_s=0),
    Path("loss 10 %", loss=0.10, delay_s=0),
    Path("jitter 30 ms", jitter_s=0.03, delay_s=0),
)

TRANSCEIVER = """[transceiver]
listen = "127.0.0.1:{port}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
{cluster}"""


class StoodStill(Exception):
    """The machine did nothing for so long that a caller was taken to pause: measure again."""


class Stopwatch:
    """A backend that notes when how much PCM has come, and speaks when asked to."""

    rate_hz = RATE_HZ

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self.came: list[tuple[float, int]] = []
        """When, and how many octets in all by then."""
        self.octets = 0
        self.spoke_ns: list[int] = []
        """When each reply was handed over, by the wall clock."""
        self._emit = emit
        emit({"type": "session.created", "event_id": "event_1", "session": {"type": "realtime"}})

    def append(self, pcm: bytes, now: float) -> None:
        """The caller's PCM."""
        self.octets += len(pcm)
        self.came.append((time.monotonic(), self.octets))

    def speak(self) -> None:
        """A reply of one frame."""
        name = len(self.spoke_ns)
        about = {"response_id": f"r{name}", "item_id": f"i{name}"}
        about |= {"output_index": 0, "content_index": 0}  # type: ignore[dict-item]
        self._emit({"type": "response.created", "response": {"id": about["response_id"]}})
        pcm = bytes(range(256)) * 2 + bytes(FRAME_OCTETS - 512)
        self.spoke_ns.append(time.time_ns())
        self._emit({"type": "response.output_audio.delta", "delta": pcm, **about})
        self._emit({"type": "response.output_audio.done", **about})
        done = {"id": about["response_id"], "status": "completed"}
        self._emit({"type": "response.done", "response": done})

    def send(self, event: dict[str, Any], now: float) -> None:
        """Client events: none matter here."""

    def tick(self, now: float) -> None:
        """Time passes by itself."""

    def close(self) -> None:
        """Nothing is held."""


class Stopwatches:
    """In the place of backend.Backends."""

    def __init__(self) -> None:
        self.made: list[Stopwatch] = []

    def connect(self, _: Any, emit: Callable[[dict[str, Any]], None], *__: Any) -> Stopwatch:
        """One more."""
        self.made.append(Stopwatch(emit))
        return self.made[-1]

    async def close(self) -> None:
        """Nothing is shared."""


class Talker:
    """A caller whose packets go down a path, and the stopwatch at the other end."""

    def __init__(self, caller: callers.Caller, stopwatch: Stopwatch, path: Path) -> None:
        self.caller, self.stopwatch, self.path = caller, stopwatch, path
        self.sent_at: dict[int, float] = {}
        self.first = 0
        self.came: list[tuple[float, int]] = []

    async def talk(self, payloads: list[bytes], count: int, seed: int) -> None:
        """Send so many packets as the path lets them through, in real time."""
        loop, caller = asyncio.get_running_loop(), self.caller
        arrivals = travel(self.path, [n * FRAME_S for n in range(count)], seed)
        arrivals += [Arrival((count + n) * FRAME_S, count + n) for n in range(TAIL_PACKETS)]
        protect = caller._dtls._tx_srtp.protect
        begun = loop.time()
        self.first = arrivals[0][1]
        for at, number in arrivals:
            await asyncio.sleep(begun + at - loop.time())
            payload = payloads[number % len(payloads)]
            packet = rtp.write(111, 1_000 + number, number * 960, caller.ssrc, payload)
            datagram = protect(packet)
            self.sent_at.setdefault(number, time.monotonic())
            caller._line.send(caller.key, datagram)
        await asyncio.sleep(0.1)  # less than it takes to be taken for a pause
        self.came = list(self.stopwatch.came)

    async def listen(self, seconds: float) -> None:
        """Have the backend say a frame, again and again."""
        for _ in range(int(seconds / REPLY_EVERY_S)):
            await asyncio.sleep(REPLY_EVERY_S)
            self.stopwatch.speak()

    def inbound(self) -> Figures:
        """From each packet sent to its PCM at the backend, and from each hole shown to its end."""
        came = iter([*self.came, (float("inf"), 1 << 62)])
        at, octets = next(came)
        last = max(self.sent_at)
        waits, holes = [], []
        for number in range(self.first, last + 1):
            end = (number - self.first + 1) * FRAME_OCTETS
            while octets < end:
                at, octets = next(came)
            if number in self.sent_at:
                waits.append(at - self.sent_at[number])
            else:
                holes.append(at - min(t for n, t in self.sent_at.items() if n > number))
        if at == float("inf"):
            raise AssertionError(f"{self.path.name}: PCM is missing")
        if self.came[-1][1] != (last - self.first + 1) * FRAME_OCTETS:
            raise StoodStill(f"{self.path.name}: silence was made where there was no pause")
        return {
            "path": self.path.name,
            "packets": len(waits),
            "lost": len(holes),
            "packet_to_pcm_ms_p50": quantile_ms(waits, 0.5),
            "p99": quantile_ms(waits, 0.99),
            "max": quantile_ms(waits, 1.0),
            "within_2_ms": f"{sum(wait < 0.002 for wait in waits) / len(waits):.1%}",
            "hole_to_pcm_ms_p50": quantile_ms(holes, 0.5),
            "hole_p99": quantile_ms(holes, 0.99),
        }

    def outbound(self) -> list[float]:
        """From each reply handed over to the kernel's time of its packet at the caller."""
        came, spoke = self.caller.arrivals[::2], self.stopwatch.spoke_ns
        if len(came) != len(spoke):
            raise AssertionError(f"{len(spoke)} replies of a frame became {len(came)} packets")
        return [(at - said) / 1e9 for at, said in zip(came, spoke, strict=True)]


def quantile_ms(values: list[float], share: float) -> float | str:
    """That quantile in milliseconds."""
    return round(1_000 * quality.per_cent(values, share), 2) if values else ""


async def passage(folder: File, seconds: float, seed: int) -> Figures:
    """All paths at once."""
    (folder / "keys").write_text("0 " + "42" * 32)
    (folder / "keys").chmod(0o600)
    (port,) = dev.free_ports(1, socket.SOCK_DGRAM)
    text = TRANSCEIVER.format(port=port, cluster=dev.CLUSTER)
    (folder / "transceiver.toml").write_text(text)
    served = transceiver.Transceiver(
        settings.load(folder / "transceiver.toml", settings.Transceiver)
    )
    watches = Stopwatches()
    served._backends = watches  # type: ignore[assignment]  # it does what is asked of the other
    await served.start()
    line = callers.Line(framed=True)
    line.towards(("127.0.0.1", port))

    async def post(request: dict[str, Any]) -> str:
        candidates = tuple((host, port) for host, port in request["candidates"])
        return served.open(opening.Opening(request["offer"], None, candidates))[1]

    try:
        talkers = []
        for path in PATHS:
            caller = line.caller()
            await caller.call(post)
            caller._report()
            talkers.append(Talker(caller, watches.made[-1], path))
        payloads = quality.browser(quality.speech(seconds, RATE_HZ), 0.05, RATE_HZ)
        count = round(seconds / FRAME_S)
        await asyncio.sleep(0.3)  # what opened the line is over
        for talker in talkers:
            talker.caller.arrivals = type(talker.caller.arrivals)("q")
        await asyncio.gather(
            *(each.talk(payloads, count, seed) for each in talkers),
            *(each.listen(seconds) for each in talkers),
        )
    finally:
        line.close()
        await served.stop()
    outs = [out for talker in talkers for out in talker.outbound()]
    return {
        "inbound": [talker.inbound() for talker in talkers],
        "outbound_idle": {
            "replies": len(outs),
            "pcm_to_packet_ms_p50": quantile_ms(outs, 0.5),
            "p99": quantile_ms(outs, 0.99),
            "max": quantile_ms(outs, 1.0),
        },
    }


def measure(seconds: float, seed: int) -> Figures:
    """All figures, for bench.py."""
    with tempfile.TemporaryDirectory(prefix="earshot-passage-") as folder:
        return asyncio.run(passage(File(folder), seconds, seed))


def main(
    seconds: Annotated[float, typer.Option(help="Of speech over each path.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the network's accidents.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
) -> None:
    """How long audio takes through a transceiver."""
    found = measure(seconds, seed)
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        return
    quality.table(found["inbound"], typer.echo)
    quality.table([found["outbound_idle"]], typer.echo)


if __name__ == "__main__":
    typer.run(main)
