"""Encoders that people have, as they are, by WHIP: FFmpeg, GStreamer, a page in Chromium.

Each speaks the recorded sentence through the real signaling and a real transceiver, and what the
backend hears of it is compared with what was said.
"""

import asyncio
import json
import os
import subprocess
import sys
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from session import State

from . import shim
from .test_kinds import certificate, check
from .test_whip import Site, at_site

HERE = Path(__file__).parent
SYSTEM_PYTHON = "/usr/bin/python3"
LEAD_S, TAIL_S = 3.0, 40.0
"""Silence before the sentence, for the set-up, and after it."""

CORRELATION_MIN = 0.6
"""As check.py has it: what is not the same stays under 0.3."""


def absent(what: str) -> None:
    print(f"skipped: {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for an encoder: silence, the sentence, silence."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    silence = (np.zeros(int(48_000 * seconds), np.int16) for seconds in (LEAD_S, TAIL_S))
    before, after = silence
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(np.concatenate([before, check.sentence(), after]).tobytes())
    return path


class Heard:
    """What the backend of a call hears."""

    def __init__(self, session: Any) -> None:
        self.pcm = bytearray()
        self.session = session
        passed_on = session._backend.append

        def append(pcm: bytes, now: float) -> None:
            self.pcm += pcm
            passed_on(pcm, now)

        session._backend.append = append

    @property
    def likeness(self) -> float:
        """With the sentence, so far."""
        every = 48_000 // self.session.rate_hz
        said = check.sentence()
        said = said[: len(said) // every * every].reshape(-1, every).mean(axis=1)
        return float(check.correlation(said, np.frombuffer(self.pcm, "<i2").astype(float)))

    async def begun(self) -> None:
        """Wait until somebody speaks."""
        loud = 1_000
        while not any(abs(sample) > loud for sample in memoryview(bytes(self.pcm)).cast("h")[::8]):
            self.pcm.clear()
            await asyncio.sleep(0.1)
            await shim.until(lambda: self.pcm, "sound")

    async def sentence(self) -> float:
        """Wait until all of it can have come; how alike it is."""
        await self.begun()
        await asyncio.sleep(len(check.sentence()) / 48_000 + 0.5)
        return self.likeness


@asynccontextmanager
async def encoder(*argv: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that lasts until its standard input ends."""
    pipe = asyncio.subprocess.PIPE
    running = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def step(running: asyncio.subprocess.Process, key: str, value: Any) -> None:
    """Wait until the program has said this."""
    assert running.stdout is not None
    async with asyncio.timeout(shim.WAIT_S):
        async for line in running.stdout:
            if json.loads(line).get(key) == value:
                return
    raise AssertionError(f"the encoder ended before {key} was {value}")


async def ends(running: asyncio.subprocess.Process) -> None:
    """Tell the program to hang up, and let it end."""
    assert running.stdin is not None
    running.stdin.close()
    async with asyncio.timeout(shim.WAIT_S):
        assert await running.wait() == 0


def address(site: Site) -> str:
    return str(site.http._base_url).rstrip("/") + "/whip"


async def session_of(site: Site) -> Any:
    await shim.until(lambda: site.transceiver.sessions, "the offer")
    (session,) = site.transceiver.sessions.values()
    return session


def written(folder: Path, kind: str) -> tuple[Path, Path]:
    """Files with a certificate and its key."""
    made = certificate(kind)
    pem, nothing = serialization.Encoding.PEM, serialization.NoEncryption()
    shown, kept = folder / "certificate.pem", folder / "key.pem"
    shown.write_bytes(made._cert.public_bytes(pem))
    private = serialization.PrivateFormat.PKCS8
    kept.write_bytes(made._key.private_bytes(pem, private, nothing))
    return shown, kept


@pytest.mark.skipif("whip" not in av.formats_available, reason="PyAV's FFmpeg has no WHIP muxer")
@pytest.mark.parametrize("kind", ["ecdsa", "rsa-2048"])
def test_ffmpeg_comes_in(tmp_path: Path, speech: Path, kind: str) -> None:
    """It offers setup:passive and no candidates: it is the DTLS server, we its client."""
    shown, key = written(tmp_path, kind)

    async def scenario(site: Site) -> None:
        program = HERE / "encoder_ffmpeg.py"
        argv = (sys.executable, program, address(site), "", speech, shown, key)
        async with encoder(*argv) as running:
            session = await session_of(site)
            heard = Heard(session)
            assert (session.offer.setup, session.offer.takes_audio) == ("passive", False)
            await step(running, "state", "connected")
            await shim.until(lambda: session.state is State.LIVE, "live")
            alike = await heard.sentence()
            print(f"FFmpeg, {kind}: what was heard of the sentence: {alike:.2f}")
            assert alike > CORRELATION_MIN
            await ends(running)
            await shim.until(lambda: not site.transceiver.sessions, "the end of the call")

    at_site(tmp_path, scenario)


@pytest.fixture(scope="module")
def gstreamer() -> None:
    """Skips where there is no GStreamer with webrtcbin and its bindings."""
    argv = [SYSTEM_PYTHON, HERE / "encoder_gstreamer.py", "check"]
    if not os.access(SYSTEM_PYTHON, os.X_OK):
        absent(f"there is no {SYSTEM_PYTHON} here")
    checked = subprocess.run(argv, capture_output=True, text=True, check=False)
    if checked.returncode:
        absent(f"{checked.stderr.strip().splitlines()[-1]}: scripts/test.sh has the packages")


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize(
    ("codec", "setup"), [("opus", "actpass"), ("opus", "passive"), ("pcmu", "active")]
)
def test_gstreamer_comes_in(tmp_path: Path, speech: Path, codec: str, setup: str) -> None:
    """Its certificates are RSA; with `passive` it is the DTLS server, with `active` we are."""

    async def scenario(site: Site) -> None:
        program = HERE / "encoder_gstreamer.py"
        argv = (SYSTEM_PYTHON, program, address(site), "none", codec, setup, speech)
        async with encoder(*argv) as running:
            session = await session_of(site)
            heard = Heard(session)
            assert session.offer.setup == setup
            await step(running, "state", "connected")
            alike = await heard.sentence()
            print(f"GStreamer, {codec}, {setup}: what was heard of the sentence: {alike:.2f}")
            assert alike > CORRELATION_MIN
            await ends(running)
            assert not site.transceiver.sessions

    at_site(tmp_path, scenario)
