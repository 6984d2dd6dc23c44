"""What loss, reordering, doubles and jitter cost a caller's speech: delay, frames, quality.

    quality.py                      a minute of speech over each path, as tables
    quality.py --json --seconds 20

Real speech goes through an encoder set as a browser's is, the model of a network (impair.py), and
the real Receiver with the real codec, all in virtual time: the figures of delay are exact, and the
same for the same seed. Only what a call costs is measured by the clock.

Quality is ESTOI (Jensen and Taal 2016, by pystoi): how much of the speech can be understood, from 0
to 1, against the same packets without loss. It asks what a model server asks; a figure of how
pleasant it sounds (PESQ) would need a compiler to install.
"""

import json
import statistics
import sys
import time
import warnings
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pystoi
import typer
from impair import Path, travel

import audio
import opus
import receiver
import rtp
import sdp

Figures = dict[str, Any]
Speech = npt.NDArray[np.int16]

SPEECH = File(__file__).resolve().parent.parent / "tests/data/sentence.wav"
BACKEND_HZ = 24_000
"""Also what the browser is told to be heard at (maxplaybackrate), so that it encodes no more."""
BROWSER_COMPLEXITY = 9
"""libwebrtc's on a desktop computer; on telephones it is 5."""
FRAME_S = 0.02
TICK_S = 0.05
"""As transceiver.TICK_S."""

PATHS = (
    Path("no loss"),
    Path("loss 2 %", loss=0.02),
    Path("loss 5 %", loss=0.05),
    Path("loss 10 %", loss=0.10),
    Path("bursts 5 %", loss=0.05, burst=3.0),
    Path("swapped 5 %", swapped=0.05),
    Path("doubled 5 %", doubled=0.05),
    Path("jitter 30 ms", jitter_s=0.03),
    Path("queue 30 ms", jitter_s=0.03, queued=True),
    Path("2 % and jitter", loss=0.02, jitter_s=0.03, queued=True),
    Path("all of it", loss=0.05, burst=2.0, jitter_s=0.03, swapped=0.02, doubled=0.02),
)


def speech(seconds: float, rate_hz: int = BACKEND_HZ) -> list[bytes]:
    """Frames of real speech, over and over."""
    with wave.open(str(SPEECH)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 48_000)
        sentence = file.readframes(file.getnframes())
    size = int(rate_hz * FRAME_S) * 2 * (48_000 // rate_hz)
    count = round(seconds / FRAME_S)
    whole = (sentence * (count * size // len(sentence) + 1))[: count * size]
    if rate_hz != 48_000:
        return [
            _thinned(whole[n : n + size], 48_000 // rate_hz) for n in range(0, len(whole), size)
        ]
    return [whole[n : n + size] for n in range(0, len(whole), size)]


def _thinned(pcm: bytes, factor: int) -> bytes:
    """To a lower rate by means: there is hardly anything above 8 kHz in the sentence to fold."""
    samples = np.frombuffer(pcm, "<i2").reshape(-1, factor)
    return bytes(samples.mean(axis=1).astype("<i2").tobytes())


def browser(frames: Sequence[bytes], loss: float, rate_hz: int = BACKEND_HZ) -> list[bytes]:
    """Payloads as a browser makes them that hears of so much loss; without any it adds no FEC."""
    encoder = opus.Encoder(
        rate_hz,
        bitrate=sdp.BITRATE_WIDE if rate_hz <= 16_000 else sdp.BITRATE,
        complexity=BROWSER_COMPLEXITY,
        application=opus.Application.VOIP,
        loss_percent=round(100 * loss),
    )
    return [encoder.encode(frame) for frame in frames]


class Watched(opus.Decoder):
    """The decoder, and in which order it decoded what; also one that does without."""

    def __init__(self, rate_hz: int, *, fec: bool = True, concealment: bool = True) -> None:
        super().__init__(rate_hz)
        self.played: list[bytes] = []
        self._fec, self._concealment = fec, concealment

    def decode(self, payload: bytes) -> bytes | None:
        """As always, and noted."""
        self.played.append(payload)
        return super().decode(payload)

    def recover(self, payload: bytes, samples: int) -> bytes | None:
        """As always, or never."""
        return super().recover(payload, samples) if self._fec else None

    def conceal(self, samples: int) -> bytes:
        """As always, or silence."""
        return super().conceal(samples) if self._concealment else bytes(2 * samples)


@dataclass
class Run:
    """What came of one stream over one path."""

    receiver: receiver.Receiver
    lost: int
    pcm: bytearray = field(default_factory=bytearray)
    waits: list[float] = field(default_factory=list)
    """From the arrival of each packet to its PCM."""
    holes: list[float] = field(default_factory=list)
    """From when a hole showed, which is the arrival of the first packet behind it, to its end."""
    ages: list[float] = field(default_factory=list)
    """From when each frame was sent to the PCM that stands for it, lost or not."""
    works: list[float] = field(default_factory=list)
    """What each call took, by the clock."""
    held_max: int = 0

    @property
    def samples(self) -> Speech:
        """What the backend hears."""
        return np.frombuffer(self.pcm, "<i2")


def run(payloads: Sequence[bytes], path: Path, seed: int, decoder: Watched) -> Run:
    """Send the packets down the path and receive what comes, with a tick every TICK_S."""
    sent_at = [n * FRAME_S for n in range(len(payloads))]
    arrivals = travel(path, sent_at, seed)
    index_of = {id(payload): n for n, payload in enumerate(payloads)}
    first = arrivals[0].number  # what is lost before it, nobody can know of
    done = Run(receiver.Receiver(decoder), len(payloads) - len({each.number for each in arrivals}))
    came: dict[int, float] = {}
    behind = [float("inf")] * len(payloads)  # when the first packet behind each had come
    played = first - 1

    def take(pieces: list[bytes], now: float) -> None:
        nonlocal played
        for piece in pieces:
            done.pcm += piece
        for payload in decoder.played:
            index = index_of[id(payload)]
            for missing in range(played + 1, index):
                done.holes.append(now - behind[missing])
                done.ages.append(now - sent_at[missing])
            done.waits.append(now - came[index])
            done.ages.append(now - sent_at[index])
            played = index
        decoder.played.clear()

    tick_at = sent_at[first] + path.delay_s
    for at, index in arrivals:
        while tick_at < at:
            take(done.receiver.tick(tick_at), tick_at)
            tick_at += TICK_S
        came.setdefault(index, at)
        for before in range(index - 1, max(first, index - 50), -1):
            if before in came:
                break
            behind[before] = min(behind[before], at)
        stamp = stamp_of(index)
        packet = rtp.Packet(False, 111, index & 0xFFFF, stamp, 1, payloads[index])
        began = time.perf_counter()
        pieces = done.receiver.receive(packet, at)
        done.works.append(time.perf_counter() - began)
        take(pieces, at)
        waiting = done.receiver.received - accounted(done.receiver)
        done.held_max = max(done.held_max, waiting)
    take(done.receiver.tick(arrivals[-1].at + 2 * TICK_S), arrivals[-1].at + 2 * TICK_S)
    return done


def stamp_of(index: int) -> int:
    """The timestamp of a frame."""
    return index * round(FRAME_S * rtp.CLOCK_HZ) & 0xFFFF_FFFF


def accounted(of: receiver.Receiver) -> int:
    """Packets that a counter says the end of."""
    return of.decoded + of.malformed + of.late + of.duplicate + of.stray + of.surplus


def likeness(reference: Speech, heard: Speech) -> float:
    """ESTOI of what was heard against what would have been heard without loss."""
    length = min(len(reference), len(heard))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it has too little to judge
        found = pystoi.stoi(
            reference[:length].astype(float),
            heard[:length].astype(float),
            BACKEND_HZ,
            extended=True,
        )
    return float(found)


def nack(seconds: float, seed: int) -> list[Figures]:
    """How many lost packets asking for them again would bring back before their hole is filled.

    The question leaves with the packet that shows the hole, the answer can be lost as well. FEC is
    what the next packet's copy brings in that time anyway, without asking.
    """
    rows = []
    sent_at = [n * FRAME_S for n in range(round(seconds / FRAME_S))]
    for name in ("loss 2 %", "bursts 5 %", "2 % and jitter"):
        path = next(path for path in PATHS if path.name == name)
        arrivals = travel(path, sent_at, seed)
        came = {each.number: each.at for each in reversed(arrivals)}
        times = sorted(came.items(), key=lambda item: item[1])
        holes = []  # how long from when each shows until it is filled, and whether FEC has it
        for number in range(min(came), max(came)):
            if number not in came:
                behind = [at for other, at in times if number < other < number + 50][:2]
                if len(behind) == 2:
                    wait_s = min(behind[1] - behind[0], receiver.HOLE_S)
                    holes.append((wait_s, number + 1 in came))
        row: Figures = {"path": name, "lost": len(holes)}
        row["by_fec"] = f"{sum(copied for _, copied in holes) / len(holes):.0%}"
        for trip_ms in (5, 10, 20, 30, 50, 100):
            saved = sum(wait_s >= trip_ms / 1_000 for wait_s, _ in holes) * (1 - path.loss)
            row[f"rtt_{trip_ms}_ms"] = f"{saved / len(holes):.0%}"
        rows.append(row)
    return rows


def per_cent(values: Sequence[float], share: float) -> float:
    """That quantile, as it occurred."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ms(values: Sequence[float]) -> str:
    """p50/p99/max in milliseconds."""
    if not values:
        return "-"
    return "/".join(f"{1_000 * per_cent(values, share):.0f}" for share in (0.5, 0.99, 1.0))


def inbound(seconds: float, seed: int) -> list[Figures]:
    """A caller's speech over each path, and what loss does without FEC or concealment."""
    frames = speech(seconds)
    rows = []
    streams: dict[int, tuple[list[bytes], Speech]] = {}

    def stream(loss: float) -> tuple[list[bytes], Speech]:
        percent = round(100 * loss)
        if percent not in streams:
            payloads = browser(frames, loss)
            whole = run(payloads, Path("whole"), seed, Watched(BACKEND_HZ))
            streams[percent] = payloads, whole.samples
        return streams[percent]

    for path in PATHS:
        payloads, whole = stream(path.loss)
        done = run(payloads, path, seed, Watched(BACKEND_HZ))
        row = describe(path.name, done, whole)
        if path.loss:
            plain, unharmed = stream(0.0)
            no_fec = run(plain, path, seed, Watched(BACKEND_HZ))
            bare = run(plain, path, seed, Watched(BACKEND_HZ, concealment=False))
            row["estoi_no_fec"] = round(likeness(unharmed, no_fec.samples), 3)
            row["estoi_silence"] = round(likeness(unharmed, bare.samples), 3)
        rows.append(row)
    return rows


def describe(name: str, done: Run, whole: Speech) -> Figures:
    """One row: delays in ms of virtual time as p50/p99/max."""
    return {
        "path": name,
        "packets": done.receiver.received,
        "lost": done.lost,
        "recovered": done.receiver.recovered,
        "concealed": done.receiver.concealed,
        "late": done.receiver.late,
        "twice": done.receiver.duplicate,
        "arrival_to_pcm_ms": ms(done.waits),
        "hole_to_pcm_ms": ms(done.holes),
        "sent_to_pcm_ms": ms(done.ages),
        "call_us_p99": round(1e6 * per_cent(done.works, 0.99)),
        "estoi": round(likeness(whole, done.samples), 3),
    }


def outgoing(seconds: float, seed: int) -> list[Figures]:
    """A reply over paths that lose, by the encoder without FEC and by the one with (fec.py).

    The client is one that waits for one packet more than it plays and conceals as libopus does.
    """
    frames = speech(seconds)
    rows = []
    for percent in (0, 1, 2, 3, 5, 10):
        row: Figures = {"loss": f"{percent} %"}
        for name, expected in (("celt", 0), ("silk", max(1, percent))):
            encoder = opus.encoder_for(BACKEND_HZ, expected)
            began = time.process_time()
            payloads = [encoder.encode(frame) for frame in frames]
            took = (time.process_time() - began) / len(frames)
            path = Path("down", loss=percent / 100)
            done = run(payloads, path, seed, Watched(BACKEND_HZ))
            said = np.frombuffer(b"".join(frames), "<i2")
            ahead = 60 if name == "celt" else 156  # samples: 2.5 and 6.5 ms
            row |= {
                f"{name}_us": round(1e6 * took),
                f"{name}_kbps": round(sum(map(len, payloads)) * 8 / seconds / 1_000),
                f"{name}_estoi": round(likeness(said, done.samples[ahead:]), 3),
            }
        rows.append(row)
    return rows


def outbound(rounds: int) -> list[Figures]:
    """From PCM written to an idle Playout to its first packet, by the clock."""
    rows = []
    for application in opus.Application:
        encoder = opus.Encoder(BACKEND_HZ, application=application)
        out = audio.Playout(encoder, ssrc=1, payload_type=111, sequence=0, timestamp=0)
        frames = speech(2.0)
        took = []
        for n in range(rounds):
            frame, now = frames[n % len(frames)], float(n)
            began = time.perf_counter()
            out.write(str(n), frame, now)
            packets = out.send(now) if out.wakes_at is not None and out.wakes_at <= now else []
            took.append(time.perf_counter() - began)
            assert len(packets) == 1, "the first frame did not leave at once"
            out.finish(str(n), now)
        rows.append(
            {
                "encoder": application.name,
                "pcm_to_packet_us_p50": round(1e6 * statistics.median(took)),
                "p99": round(1e6 * per_cent(took, 0.99)),
                "max": round(1e6 * max(took)),
            }
        )
    return rows


def measure(seconds: float, seed: int) -> Figures:
    """All figures, for bench.py."""
    return {
        "libopus": opus.version(),
        "seconds": seconds,
        "seed": seed,
        "inbound": inbound(seconds, seed),
        "outgoing": outgoing(seconds, seed),
        "nack": nack(seconds, seed),
        "outbound_idle": outbound(200 if seconds < 20 else 1_000),
    }


def table(rows: list[Figures], say: Callable[[str], None]) -> None:
    """Rows under their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(
    seconds: Annotated[float, typer.Option(help="Of speech over each path.", min=3)] = 60,
    seed: Annotated[int, typer.Option(help="Of the network's accidents.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
) -> None:
    """What loss, reordering, doubles and jitter cost a caller's speech."""
    found = measure(seconds, seed)
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        return
    typer.echo(f"{found['libopus']}, {seconds:g} s, seed {seed}; delays in ms, p50/p99/max")
    for part in ("inbound", "outgoing", "nack", "outbound_idle"):
        typer.echo(f"\n{part}")
        table(found[part], typer.echo)


if __name__ == "__main__":
    typer.run(main)
