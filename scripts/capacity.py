"""What a transceiver carries: CPU a session, how many sessions a core, memory a session.

For bench.py. The callers (callers.py) are in this process, on a CPU of their own; the server has
one CPU. A transceiver is started as an operator would; beside it, in the same run and in turns, a
server that does the same work with aiortc as it comes (stock.py). What a packet's lateness is, the
callers say, by the kernel's time of arrival against the utterance's own grid.

A number of sessions is carried if nothing is lost, every caller hears all that there is to hear,
and 99 of 100 packets are less than LATE_MS late.
"""

import asyncio
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import dev
import numpy as np
from callers import Line, lateness_ms
from load import PATIENCE_S, Figures
from rig import Setting, cpu_s, end, private_octets, spawn

LATE_MS = 5.0
"""A client's buffer begins at 20 to 40 ms: this much of it may be the server's."""

AT_ONCE = 8
"""Calls being set up at a time."""

SETTLE_S = 10.5
"""Until every caller has said a whole turn and is being answered: they begin anywhere in one."""

STOCK = Path(__file__).with_name("stock.py")
FLOWING = 0.9
"""Of 50 packets a second: what a caller hears of its parrot, the pauses between replies taken
off."""

TRANSCEIVER = """[transceiver]
listen = "127.0.0.1:{port}"
relay_prefixes = ["127.0.0.0/8"]
control_prefixes = ["127.0.0.0/8"]
sessions_max = 1000
# It is loaded on purpose.
connecting_max = 1000
load_max = 100.0
lag_s_max = 100.0
{more}
[keys]
file = "{keys}"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1, 65535]
"""


@dataclass(frozen=True)
class Kind:
    """A server to be measured."""

    name: str
    framed: bool
    argv: Callable[[Setting, Path, int], list[str | Path]]
    few: int
    """Sessions to compare at, about half of what a core can carry, and to begin the search with."""
    step: int
    """The search ends within so many."""


def _transceiver(setting: Setting, folder: Path, port: int) -> list[str | Path]:
    path = folder / "transceiver.toml"
    path.write_text(TRANSCEIVER.format(port=port, keys=setting.folder / "keys", more=""))
    return [dev.BIN / "transceiver", "run", "--config", path]


def _stock(_: Setting, __: Path, port: int) -> list[str | Path]:
    return [sys.executable, STOCK, str(port)]


OURS = Kind("earshot", framed=True, argv=_transceiver, few=100, step=10)
THEIRS = Kind("stock aiortc", framed=False, argv=_stock, few=16, step=2)


class Server:
    """A server under test, from its start to its end."""

    def __init__(self, setting: Setting, kind: Kind) -> None:
        folder = setting.subfolder()
        self.log, self._kind = folder / "log", kind
        (self.port,) = dev.free_ports(1, socket.SOCK_STREAM)
        argv = kind.argv(setting, folder, self.port)
        cpu = {min(setting.relay_cpus)}
        self.process: subprocess.Popen[bytes] = spawn(argv, cpu, self.log)
        deadline = time.monotonic() + PATIENCE_S
        while " ready" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end(self.process, signal.SIGKILL)
                raise dev.StartError(f"{kind.name}: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def close(self) -> None:
        """End it."""
        end(self.process, signal.SIGKILL if not self._kind.framed else signal.SIGINT)


async def _connect(line: Line, port: int, sessions: int) -> None:
    """Add callers until there are that many. Raises TimeoutError, ConnectionError."""
    room = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession() as http:

        async def post(request: dict[str, Any]) -> str:
            url = f"http://127.0.0.1:{port}/v1/sessions"
            async with http.post(url, json=request) as response:
                if response.status != 201:
                    raise ConnectionError(f"{response.status}: {await response.text()}")
                return str((await response.json(content_type=None))["answer"])

        async def one() -> None:
            async with room:
                await line.caller().call(post)

        await asyncio.gather(*(one() for _ in range(sessions - len(line.callers))))


async def _step(setting: Setting, server: Server, kind: Kind, sessions: int) -> Figures:
    """So many sessions at a server that has none: what they cost and how late they are served."""
    seconds = 5.0 if setting.quick else 15.0
    line = Line(kind.framed)
    line.towards(("127.0.0.1", server.port))
    idle_octets = private_octets(server.process.pid)
    try:
        await _connect(line, server.port, sessions)
        for caller in line.callers:
            caller.start()
        await line.talk(SETTLE_S)
        lost = sum(caller.lost for caller in line.callers)
        since_ns, begun, before = time.time_ns(), time.monotonic(), cpu_s(server.process.pid)
        sent = await line.talk(seconds)
        used, took = cpu_s(server.process.pid) - before, time.monotonic() - begun
        late = [lateness_ms(caller.arrivals, since_ns) for caller in line.callers]
        every = np.concatenate(late)
        heard = [len(each) / took for each in late]
        return {
            "sessions": sessions,
            "cpu_percent": round(100 * used / took, 1),
            "cpu_ms_a_session_second": round(1000 * used / took / sessions, 2),
            "late_p50_ms": round(float(np.percentile(every, 50)), 2) if len(every) else None,
            "late_p99_ms": round(float(np.percentile(every, 99)), 2) if len(every) else None,
            "late_p99.9_ms": round(float(np.percentile(every, 99.9)), 2) if len(every) else None,
            "up_per_s": round(sent / took / sessions, 1),
            "down_per_s": round(statistics.mean(heard), 1),
            "down_per_s_least": round(min(heard), 1),
            "lost": sum(caller.lost for caller in line.callers) - lost,
            "connected_p50_ms": round(
                1000 * statistics.median(caller.connected_s for caller in line.callers), 1
            ),
            "octets_a_session": (private_octets(server.process.pid) - idle_octets) // sessions,
            "errors": dict(Counter(line.errors).most_common(3)),
        }
    except (TimeoutError, ConnectionError, OSError) as error:
        return {"sessions": sessions, "failed": f"{type(error).__name__}: {error}"[:200]}
    finally:
        line.close()


def _measured(setting: Setting, kind: Kind, sessions: int) -> Figures:
    """One step at a server of its own."""
    server = Server(setting, kind)
    try:
        row = asyncio.run(_step(setting, server, kind, sessions))
        if server.process.poll() is not None:
            row["failed"] = f"the server died: {server.log.read_text()[-500:]}"
        elif "failed" not in row and row["down_per_s"] < 50 * FLOWING:
            row["failed"] = "callers were not answered as they should have been"
    finally:
        server.close()
    row = {"server": kind.name} | row
    setting.say(" ".join(f"{name}={value}" for name, value in row.items()))
    return row


def _carried(row: Figures) -> bool:
    return (
        "failed" not in row
        and row["late_p99_ms"] is not None
        and row["late_p99_ms"] < LATE_MS
        and not row["lost"]
        and row["down_per_s_least"] >= 50 * FLOWING
    )


def _search(setting: Setting, kind: Kind, rows: list[Figures]) -> int:
    """The most sessions that are carried, to within `kind.step`; 0 if not even `kind.few` are."""
    good, bad, sessions = 0, 0, kind.few
    while not bad or bad - good > kind.step:
        rows.append(_measured(setting, kind, sessions))
        if _carried(rows[-1]):
            good = sessions
        else:
            bad = sessions
        if not bad:
            sessions = good + (good // 2 // kind.step or 1) * kind.step
        else:
            sessions = (good + bad) // 2 // kind.step * kind.step or 1
            if sessions <= good:
                break
    return good


def capacity(setting: Setting) -> Figures:
    """CPU a session at a moderate load, in turns; then the most that is carried of each."""
    found: Figures = {"alike": []}
    for _ in range(1 if setting.quick else 3):
        for kind in (OURS, THEIRS):
            sessions = max(1, kind.few // 10) if setting.quick else kind.few
            found["alike"].append(_measured(setting, kind, sessions))
    spent = {
        kind.name: [
            row["cpu_ms_a_session_second"]
            for row in found["alike"]
            if row["server"] == kind.name and "failed" not in row
        ]
        for kind in (OURS, THEIRS)
    }
    for name, costs in spent.items():
        setting.must(bool(costs), f"{name}: no round in which all callers were answered")
    if setting.failures:
        return found
    median = {name: statistics.median(costs) for name, costs in spent.items()}
    found["cpu_ms_a_session_second"] = median
    found["times_cpu_of_stock"] = round(median[THEIRS.name] / median[OURS.name], 2)
    if setting.quick:
        return found
    found["search"] = []
    most = {kind.name: _search(setting, kind, found["search"]) for kind in (OURS, THEIRS)}
    found["sessions_a_core"] = most
    found["times_sessions_of_stock"] = round(most[OURS.name] / (most[THEIRS.name] or 1), 2)
    return found


PARTS: dict[str, Callable[[Setting], Figures]] = {"capacity": capacity}
