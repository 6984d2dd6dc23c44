"""Some hundred short calls against a transceiver in a process of its own leave nothing there.

The same with ten thousand is `scripts/churn.py`, which takes some minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CALLS = 240


def test_short_calls_leave_nothing() -> None:
    """Half of them vanish. Memory gets room here that ten thousand calls do not get: with so few a
    single arena of the allocator counts. No machine stands still for so long that those who say
    goodbye have vanished before."""
    options = ["--calls", str(CALLS), "--looks", "4", "--growth", "1.2", "--silence", "5"]
    ended = subprocess.run(
        [sys.executable, SCRIPTS / "churn.py", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout)
    assert found["failures"] == []
    first, *_, last = found["looks"]
    assert last["calls"] == last["connected"] == CALLS
    assert last["vanished"] == CALLS // 2
    for name in ("tasks", "descriptors", "threads"):
        assert last[name] <= first[name], name
    print(f"memory: {found['memory_factor']} of what it was; {found['calls_per_s']} calls a second")
