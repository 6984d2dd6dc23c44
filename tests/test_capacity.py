"""Callers that measure a media server count rightly. No figure of time is judged."""

import importlib.util
import json
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 180


@pytest.fixture(scope="module")
def callers():
    sys.path.insert(0, str(SCRIPTS))
    try:
        where = importlib.util.spec_from_file_location("callers", SCRIPTS / "callers.py")
        module = importlib.util.module_from_spec(where)
        where.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


def bench(*words):
    return subprocess.run(
        [sys.executable, SCRIPTS / "bench.py", "transceiver", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def arrivals(*pairs):
    return array("q", [number for pair in pairs for number in pair])


def test_how_late_packets_are(callers):
    ms = 1_000_000
    begun = 1_700_000_000_000 * ms
    grid = [(begun + k * 20 * ms, k * 960) for k in range(5)]
    grid[2] = (grid[2][0] + 7 * ms, grid[2][1])
    late = callers.lateness_ms(arrivals(*grid), begun)
    assert np.allclose(late, [0, 0, 7, 0, 0])


def test_a_pause_begins_another_grid(callers):
    ms = 1_000_000
    first = [(k * 20 * ms, k * 960) for k in range(3)]
    then = [(1_003 * ms + k * 20 * ms, 48_000 + k * 960) for k in range(3)]
    late = callers.lateness_ms(arrivals(*first, *then), 0)
    assert np.allclose(late, 0)


def test_timestamps_wrap(callers):
    ms = 1_000_000
    pairs = [(k * 20 * ms, (0xFFFFFFFF - 1_000 + k * 960) & 0xFFFFFFFF) for k in range(5)]
    assert np.allclose(callers.lateness_ms(arrivals(*pairs), 0), 0)


def test_what_came_before_does_not_count(callers):
    pairs = [(0, 0), (90_000_000, 960), (110_000_000, 1_920)]
    assert len(callers.lateness_ms(arrivals(*pairs), 90_000_000)) == 2


def test_a_turn_is_speech_and_then_silence(callers):
    payloads = callers.speech(16_000)
    assert len(payloads) == callers.TURN_PACKETS + callers.PAUSE_PACKETS
    loudest_pause = max(map(len, payloads[callers.TURN_PACKETS + 4 :]))
    assert min(map(len, payloads[: callers.TURN_PACKETS])) > loudest_pause


def test_a_transceiver_and_stock_aiortc_serve_the_same_callers():
    ran = bench("--quick", "--only", "capacity", "--json")
    found = json.loads(ran.stdout)
    rows = found["parts"]["capacity"]["alike"]
    assert [row["server"] for row in rows] == ["earshot", "stock aiortc"]
    for row in rows:
        # As many packets as there are to be; on a loaded machine a reply may begin late.
        assert row["up_per_s"] > 40, (row, ran.stderr)
        assert row["down_per_s"] > 20, (row, ran.stderr)
        assert row["lost"] == 0
        assert row["cpu_ms_a_session_second"] > 0
    assert ran.returncode == bool(found["failures"])


def test_a_part_that_does_not_exist():
    ran = bench("--only", "nothing")
    assert ran.returncode == 2
    assert "no part nothing" in ran.stderr.replace("\n", " ")
