"""The two commands of the README as their users run them, and the check's own judgement."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
DEV = [sys.executable, str(ROOT / "scripts" / "dev.py")]

_spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check.py")
check = importlib.util.module_from_spec(_spec)
sys.modules["check"] = check  # dataclasses look their module up
_spec.loader.exec_module(check)


@pytest.mark.parametrize("options", [[], ["--websocket"]], ids=["in process", "over WebSocket"])
def test_one_call_through_everything(options: list[str]) -> None:
    """`dev.sh --check`, less the virtual environment: relay, transceivers, signaling, parrot."""
    ran = subprocess.run(
        [*DEV, "--patient", "--check", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(ran.stdout)
    line = json.loads(ran.stdout)
    assert line["ok"], line
    assert ran.returncode == 0
    assert line["events_in_order"]
    assert set(line) >= {
        "answer_ms",
        "connected_ms",
        "first_audio_ms",
        "reply_after_silence_ms",
        "echo_correlation",
    }


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as told:
        return str(told.read().decode())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupting_ends_everything_that_was_started(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEV, "--patient", "--free-ports", "--json", "--state-dir", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    about = json.loads(process.stdout.readline())
    children = psutil.Process(process.pid).children(recursive=True)
    # Redis or not: relay with two workers and a keeper, two transceivers, signaling.
    assert len(children) >= 7
    wanted = (
        'earshot_relay_inbound_received_total{worker="1"} 0.0',
        f"earshot_relay_keeper_redis_up {float(bool(about['redis']))}",
    )
    # A keeper may lose its Redis for a moment on a machine that stands still.
    until(lambda: all(line in fetched(about["metrics"]) for line in wanted))
    assert (tmp_path / "state" / "keys").stat().st_mode & 0o077 == 0
    # Signaling knows both transceivers, and needs no list where there is a Redis.
    health = about["page"] + "health"
    until(lambda: json.loads(fetched(health))["transceivers_serving"] == 2)
    listed = "transceivers = []" in (tmp_path / "state" / "signaling.toml").read_text()
    assert listed == (about["found_by"] == "Redis") == bool(about["redis"])
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not psutil.wait_procs(children, timeout=10)[1]
    host, _, port = about["relay"].partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind((host, int(port)))


def test_a_transceiver_that_dies_is_started_again(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEV, "--patient", "--free-ports", "--json", "--state-dir", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    about = json.loads(process.stdout.readline())
    children = psutil.Process(process.pid).children(recursive=True)
    victim = next(c for c in children if "transceiver-1.toml" in " ".join(c.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    line = process.stderr.readline()
    assert line == "transceiver-1 was killed by signal 9: it is started again\n"
    health = f"http://{about['transceivers'][0]}/v1/health"
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(health) as told:
                assert json.loads(told.read())["state"] == "serving"
            break
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_program_that_dies_is_named_and_ends_the_rest(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEV, "--patient", "--free-ports", "--json", "--state-dir", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    victim = next(c for c in children if "signaling" in " ".join(c.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "signaling ended by itself" in told
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.fixture(scope="module")
def said() -> np.ndarray:
    """The sentence at 16 kHz."""
    return check.sentence()[::3].astype(float)


def test_the_correlation_knows_the_sentence(said: np.ndarray) -> None:
    quiet_and_late = np.concatenate([np.zeros(5_000), 0.1 * said, np.zeros(500)])
    assert check.correlation(said, quiet_and_late) == pytest.approx(1, abs=0.01)
    assert check.correlation(said, said[800:-1600]) > 0.9  # a little lost at both ends


def test_the_correlation_is_not_fooled(said: np.ndarray) -> None:
    """Controls: the same voice backwards, its halves exchanged, noise as loud as it, silence."""
    seed = 20261120
    noise = np.random.default_rng(seed).normal(0, said.std(), len(said) + 16_000)
    half = len(said) // 2
    exchanged = np.concatenate([said[half:], said[:half]])
    figures = {
        "backwards": check.correlation(said, said[::-1]),
        "exchanged": check.correlation(said, exchanged),
        "noise": check.correlation(said, noise),
        "silence": check.correlation(said, np.zeros(48_000)),
    }
    print({name: round(figure, 3) for name, figure in figures.items()}, f"seed {seed}")
    assert max(figures.values()) < 0.3
