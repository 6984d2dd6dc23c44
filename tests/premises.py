"""Signaling and a transceiver as programs, for tests of what strangers do to them.

Both are started as an operator would start them, with JSON logs; `Premises` has their addresses,
what they count, what they write and how much memory they have.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .test_transceiver import free_port

BIN = Path(sys.executable).parent
PATIENCE_S = 20
OFFER = (Path(__file__).parent / "data" / "chromium-156-offer.sdp").read_text()
CLUSTER = """
[keys]
file = "keys"
[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1, 65535]
"""
TRANSCEIVER = """[transceiver]
listen = "127.0.0.1:{port}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
# Sessions that a test opens and nobody connects to stay, and must not fill it.
connect_deadline_s = 600.0
sessions_max = 5000
connecting_max = 5000
lag_s_max = 100.0
load_max = 100.0
"""
SIGNALING = """[signaling]
listen = "127.0.0.1:0"
relays = ["127.0.0.1:3478"]
transceivers = ["127.0.0.1:{port}"]
metrics = "127.0.0.1:0"
{more}
"""


class Program:
    """A program of ours that runs."""

    def __init__(self, name: str, config: Path) -> None:
        self.name, self.log = name, config.with_suffix(".log")
        argv = [BIN / name, "run", "--config", config, "--log-format", "json"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, stdout=log)

    def said(self, part: str) -> str:
        """Wait for a message with `part` in it, and return that."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [line["message"] for line in self.lines() if part in line["message"]]
            if found:
                return str(found[0])
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def lines(self) -> list[dict[str, Any]]:
        """All that it has written, as far as the lines are whole."""
        whole = self.log.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def faults(self) -> list[dict[str, Any]]:
        """The lines that tell of mistakes of ours."""
        return [line for line in self.lines() if line["level"] in ("error", "critical")]

    def resident_octets(self) -> int:
        """Of memory, now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
        assert found is not None
        return int(found[1]) << 10

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Premises:
    """Signaling before a transceiver."""

    def __init__(self, folder: Path, more: str, api_keys: str) -> None:
        master = "0 " + bytes(range(32)).hex()
        for name, secrets in (("keys", master), ("api-keys", api_keys)):
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(secrets + "\n")
        self.port = free_port()
        self.control = f"http://127.0.0.1:{self.port}"
        paths = {name: folder / f"{name}.toml" for name in ("transceiver", "signaling")}
        paths["transceiver"].write_text(
            TRANSCEIVER.format(port=self.port) + "drain_s = 0.0\n" + CLUSTER
        )
        paths["signaling"].write_text(SIGNALING.format(port=self.port, more=more) + CLUSTER)
        self.transceiver = Program("transceiver", paths["transceiver"])
        self.transceiver.said(" ready")
        self.signaling = Program("signaling", paths["signaling"])
        said = self.signaling.said(" is ready")
        self.url = said.split()[0].rstrip("/")
        found = re.search(r":(\d+)$", self.url)
        assert found is not None
        self.at = "127.0.0.1", int(found[1])
        metrics = self.signaling.said("metrics at http").split()[-1]
        self._monitor = metrics

    def counted(self) -> dict[str, float]:
        """What the transceiver has counted, by name."""
        return _read(f"{self.control}/metrics")

    def counted_by_signaling(self) -> dict[str, float]:
        """The same of signaling."""
        return _read(self._monitor)

    def stop(self) -> None:
        self.signaling.stop()
        self.transceiver.stop()


def _read(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        text = response.read().decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def open_for_business(folder: Path, more: str = "", api_keys: str = "") -> Iterator[Premises]:
    """Signaling and a transceiver, until the block is left.

    `more` is of signaling's table; it may name the file `api-keys`, which has the lines `api_keys`.
    """
    found = Premises(folder, more, api_keys)
    try:
        yield found
    finally:
        found.stop()
