"""First datagrams for load tools."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

import settings
import stun
import ufrag

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "flood.py"
CONFIG = """
[relay]
public = "127.0.0.1:3478"
internal = "127.0.0.1:3500"
[keys]
file = "deep/keys"
[[cluster]]
id = 7
prefix = "127.0.0.0/8"
ports = [9000, 9001]
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG)
    return path


def flood(*words):
    return subprocess.run(
        [sys.executable, SCRIPT, "first", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def records(path):
    octets, found = path.read_bytes(), []
    while octets:
        length = int.from_bytes(octets[:2], "big")
        found.append(octets[2 : 2 + length])
        octets = octets[2 + length :]
    return found


def test_every_record_opens_a_flow(config, tmp_path):
    out = tmp_path / "first.bin"
    done = flood("--clients", 20, "--port", 9001, "--config", config, "--out", out)
    assert done.returncode == 0, done.stderr
    found = settings.load(config, settings.Relay)
    keyring = found.keys.load()
    assert stat.S_IMODE(found.keys.file.stat().st_mode) == 0o600
    requests = [(each, stun.read_request(each)) for each in records(out)]
    assert len({request.ufrag for _, request in requests}) == 20
    for datagram, request in requests:
        hint = ufrag.parse(keyring, settings.clusters(found.cluster), request.ufrag)
        assert (hint.cluster, str(hint.address), hint.port) == (7, "127.0.0.1", 9001)
        password = ufrag.password(keyring, request.ufrag)
        assert stun.check_integrity(datagram, request, password)


def test_a_key_that_is_there_is_kept(config, tmp_path):
    keys = tmp_path / "keys"
    for _ in range(2):
        words = "--clients", 1, "--config", config, "--keys", keys, "--out", tmp_path / "first.bin"
        assert flood(*words).returncode == 0
        text = keys.read_text()
        assert keys.read_text() == text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--port", 8999), "outside cluster 7"),
        (("--host", "example"), "is not ADDRESS:PORT"),
        (("--cluster", 8), "has no cluster 8"),
    ],
)
def test_what_no_relay_would_follow_is_refused(config, tmp_path, words, reason):
    out = tmp_path / "first.bin"
    done = flood("--clients", 1, "--config", config, "--out", out, *words)
    assert done.returncode == 2 and not out.exists()
    assert reason in " ".join(done.stderr.replace("│", " ").split())
