"""How soon an offer is answered: signaling before two transceivers, from POST to 201.

For bench.py. Signaling, relay address and transceivers are as an operator would start them; offers
are Chromium's own with other credentials each, and come at random moments (Poisson), so many a
second, each with an API key over a connection of its own, as from so many people's pages. Every
call is hung up a second later, so that signaling handles twice as many requests as there are
offers.

All figures are milliseconds:

    post_to_201            from the moment the client begins to connect to the last octet
    own                    signaling's part of it, as its journal says: without the transceivers'
                           time and the time that the body took
    transceiver            the transceivers' part, as signaling sees it
    besides_transceiver    post_to_201 without that: own, TCP, the kernel, and the client itself

usage: bench.py signaling [--json]
"""

import asyncio
import contextlib
import json
import random
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dev
from load import PATIENCE_S, Figures
from rig import Setting, end, spawn

import keys

OFFERS_PER_S = 30
"""What the promise is about: 100,000 calls an hour."""

HANG_UP_S = 1.0
"""After the answer. Offers that nobody connects to would fill the transceivers."""

P50_MS, P99_MS, OWN_MS = 10.0, 50.0, 3.0
"""The promise, for OFFERS_PER_S: of post_to_201, and of signaling's own part at the median."""

OFFER = dev.ROOT / "tests" / "data" / "chromium-156-offer.sdp"

TRANSCEIVER = """[transceiver]
listen = "127.0.0.1:{port}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
"""
SIGNALING = """[signaling]
listen = "127.0.0.1:{port}"
relays = ["127.0.0.1:3478"]
transceivers = [{transceivers}]
metrics = "127.0.0.1:0"
keys_file = "api-keys"

[limits]
# All of it comes from one address and under one key.
address_per_s = 1e6
key_per_s = 1e6
"""


@dataclass(slots=True)
class Answer:
    """What became of an offer."""

    status: int
    took_ms: float
    request_id: str


@dataclass(frozen=True, slots=True)
class Front:
    """Signaling, as a client knows it."""

    port: int
    key: str

    def request(self, start: str, *headers: str, body: bytes = b"") -> bytes:
        """A request for a connection of its own."""
        head = (
            f"{start} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Authorization: Bearer {self.key}",
            "Connection: close",
            *headers,
        )
        return "\r\n".join((*head, "", "")).encode() + body


@contextlib.contextmanager
def _system(setting: Setting) -> Iterator[tuple[Front, Path]]:
    """Two transceivers and signaling, up; and its journal."""
    folder = setting.subfolder()
    (folder / "keys").write_bytes((setting.folder / "keys").read_bytes())
    (folder / "keys").chmod(0o600)
    key, line = keys.make("bench", secrets.token_bytes(keys.KEY_OCTETS))
    (folder / "api-keys").touch(mode=0o600)
    (folder / "api-keys").write_text(line + "\n")
    *ports, port = dev.free_ports(3, socket.SOCK_STREAM)
    named = ", ".join(f'"127.0.0.1:{each}"' for each in ports)
    programs = [("transceiver", TRANSCEIVER.format(port=each)) for each in ports]
    programs.append(("signaling", SIGNALING.format(port=port, transceivers=named)))
    everywhere = setting.relay_cpus | {setting.load_cpu}
    started: list[subprocess.Popen[bytes]] = []
    log = folder / "log"
    try:
        for number, (program, text) in enumerate(programs):
            path, log = folder / f"{number}.toml", folder / f"{number}.log"
            path.write_text(text + dev.CLUSTER)
            argv: list[str | Path] = [
                dev.BIN / program,
                "run",
                "--config",
                path,
                "--log-format",
                "json",
            ]
            started.append(spawn(argv, everywhere, log))
            deadline = time.monotonic() + PATIENCE_S
            while " ready" not in log.read_text():
                if started[-1].poll() is not None or time.monotonic() > deadline:
                    raise dev.StartError(f"{program}: {log.read_text()[-2000:]}")
                time.sleep(0.02)
        yield Front(port, key), log
    finally:
        for process in reversed(started):
            end(process, signal.SIGINT)


async def _ask(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer to one request, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return head, await reader.readexactly(int(length[1]) if length else 0)
    finally:
        writer.close()


async def _call(front: Front, body: bytes) -> Answer:
    """Offer, and hang up a while later."""
    described = "Content-Type: application/sdp", f"Content-Length: {len(body)}"
    request = front.request("POST /v1/realtime/calls", *described, body=body)
    began = time.perf_counter()
    found, _ = await _ask(front.port, request)
    took_ms = 1e3 * (time.perf_counter() - began)
    fields = dict(re.findall(r"(?m)^([\w-]+): *([^\r\n]*)", found.decode().lower()))
    if where := re.search(r"(?im)^location: *([^\r\n]*)", found.decode()):
        await asyncio.sleep(HANG_UP_S)
        await _ask(front.port, front.request(f"DELETE {where[1]}"))
    return Answer(int(found.split()[1]), took_ms, fields.get("x-request-id", ""))


def _offer(rng: random.Random) -> bytes:
    """Chromium's, as somebody else's browser would make it."""
    text = OFFER.read_text().replace("\r\n", "\n").replace("\n", "\r\n")
    name, password = (f"{rng.getrandbits(bits):0{bits // 4}x}" for bits in (32, 96))
    text = re.sub(r"(?m)^a=ice-ufrag:[^\r]*", f"a=ice-ufrag:{name}", text)
    return re.sub(r"(?m)^a=ice-pwd:[^\r]*", f"a=ice-pwd:{password}", text).encode()


async def _offers(front: Front, seconds: float, rng: random.Random) -> list[Answer]:
    """Offers at random moments; the first second warms up and is not in the figures."""
    tasks: list[asyncio.Task[Answer]] = []
    due = began = time.monotonic()
    warm = 0
    while due < began + 1 + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(_call(front, _offer(rng))))
        warm += due < began + 1
        due += rng.expovariate(OFFERS_PER_S)
    return (await asyncio.gather(*tasks))[warm:]


def _quantiles(values: list[float]) -> Figures:
    ordered = sorted(values)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)
        for name, q in at.items()
    }


def measure(setting: Setting) -> Figures:
    """Post to 201 at OFFERS_PER_S. Raises dev.StartError."""
    rng = random.Random(setting.seed)
    seconds = 2.0 if setting.quick else 20.0
    with _system(setting) as (front, journal):
        answers = asyncio.run(_offers(front, seconds, rng))
        written = [json.loads(line) for line in journal.read_text().splitlines()]
    lines = {line.get("request_id"): line for line in written if "request_id" in line}
    found = [(each, lines[each.request_id]) for each in answers if each.status == 201]
    refused = [each.status for each in answers if each.status != 201]
    setting.must(not refused, f"offers were refused: {refused[:10]}")
    setting.must(len(lines) >= 2 * len(answers), "a request has no line of its own")
    figures: Figures = {"offers": len(answers), "offers_per_s": OFFERS_PER_S}
    milliseconds: Figures = {
        "post_to_201": _quantiles([each.took_ms for each, _ in found]),
        "own": _quantiles([line["own_ms"] for _, line in found]),
        "transceiver": _quantiles([line["transceiver_ms"] for _, line in found]),
        "besides_transceiver": _quantiles(
            [each.took_ms - line["transceiver_ms"] for each, line in found]
        ),
    }
    promised = {
        f"p50 under {P50_MS:g} ms": milliseconds["post_to_201"]["p50"] < P50_MS,
        f"p99 under {P99_MS:g} ms": milliseconds["post_to_201"]["p99"] < P99_MS,
        f"own part under {OWN_MS:g} ms": milliseconds["own"]["p50"] < OWN_MS,
    }
    return {**figures, "milliseconds": milliseconds, "kept": promised}


PARTS = {"offers": measure}
