"""Many short calls, one after another: what a transceiver keeps of them, which should be nothing.

For bench.py, and by itself:

    churn.py --calls 10000          one line a thousand calls; the exit status is 1 if it grew

Each call connects, talks for 200 ms, and ends; every other one vanishes without a goodbye, so that
only the sweep finds out. The callers (callers.py) are in this process, the transceiver
is one of its own, started as an operator would. Memory is looked at when it has no call, and the
first part of the calls does not count: imports that come late, caches, and the allocator's arenas.
"""

import asyncio
import functools
import gc
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import capacity
import dev
import firsts
import typer
from callers import Caller, Line
from load import PATIENCE_S, Figures
from rig import Setting, private_octets

import host
import settings

CALLS, CALLS_QUICK = 10_000, 200
AT_ONCE = 12
"""Calls at a time: enough to keep a CPU busy while others wait for their round trips."""

LOOKS = 10
"""How often it is looked at; until the second one it warms up."""

TALK_S = 0.2
SILENCE_S = 1.0
"""How soon the transceiver takes a silent client for gone here: operators wait 30 s. On a machine
that stands still for so long, those that say goodbye are gone before they do."""

GROWTH_MAX = 1.05
"""Of memory, from the second look to the last."""


class Passer(Caller):
    """A caller that leaves."""

    def __init__(self, line: Line, number: int) -> None:
        super().__init__(line, number)
        self._others, self._gone = line.callers, False

    async def leave(self, politely: bool) -> None:
        """End the call, with a goodbye or without."""
        self._gone = not politely
        if self._sctp is not None:
            await self._sctp.stop()
        await self._dtls.stop()
        self.end()
        self._others.remove(self)

    async def _send(self, datagram: bytes) -> None:
        if not self._gone:
            await super()._send(datagram)


class Watched:
    """What is looked at of a process."""

    def __init__(self, pid: int, url: str, http: aiohttp.ClientSession) -> None:
        self.pid, self._url, self._http = pid, url, http

    async def metrics(self) -> dict[str, float]:
        """Its figures without labels, by name without the program's."""
        async with self._http.get(f"{self._url}/metrics") as response:
            text = await response.text()
        found = {}
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if not line.startswith("#"):
                found[name.removeprefix("earshot_transceiver_")] = float(value)
        return found

    async def look(self, calls: int, begun: float, tasks: int | None) -> Figures:
        """How it is, once it has no call and no more than so many `tasks` left.

        Raises TimeoutError for calls; goodbyes to model servers may also take a moment.
        """
        deadline = time.monotonic() + PATIENCE_S
        while (seen := await self.metrics())["sessions"] or seen["tasks"] > (
            tasks or seen["tasks"]
        ):
            if time.monotonic() > deadline:
                if seen["sessions"]:
                    raise TimeoutError(f"{seen['sessions']:g} calls have not ended")
                break
            await asyncio.sleep(0.1)
        pauses = {
            name.split('"')[1]: count
            for name, count in seen.items()
            if name.startswith("collection_seconds_bucket")
        }
        return {
            "calls": calls,
            "seconds": round(time.monotonic() - begun, 1),
            "octets": private_octets(self.pid),
            "tasks": int(seen["tasks"]),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
            "connected": int(seen["sessions_connected_total"]),
            "vanished": int(seen["ended_vanished_total"]),
            "faults": int(seen["ended_fault_total"] + seen["dropped_fault_total"]),
            "collections": int(seen["collection_seconds_count"]),
            "collections_over_5_ms": int(pauses["+Inf"] - pauses["0.005"]),
            "late_packets": int(seen["paced_late_total"]),
        }


async def _call(line: Line, post: Callable[[dict[str, Any]], Any], politely: bool) -> None:
    caller = Passer(line, next(line._numbers) & 0xFFFF)
    line.callers.append(caller)
    try:
        await caller.call(post)
        caller.start()
        for _ in range(round(TALK_S * 50)):
            caller.send()
            await asyncio.sleep(0.02)
    finally:
        await caller.leave(politely)


async def _run(
    pid: int, port: int, calls: int, looks_in_all: int, say: Callable[[str], None]
) -> list[Figures]:
    url = f"http://127.0.0.1:{port}"
    looks: list[Figures] = []
    line = Line(framed=True)
    line.towards(("127.0.0.1", port))
    begun = time.monotonic()
    async with aiohttp.ClientSession() as http:
        watched = Watched(pid, url, http)

        async def post(request: dict[str, Any]) -> str:
            async with http.post(f"{url}/v1/sessions", json=request) as response:
                if response.status != 201:
                    raise ConnectionError(f"{response.status}: {await response.text()}")
                return str((await response.json())["answer"])

        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                await _call(line, post, politely=bool(number % 2))

        part = calls // looks_in_all
        for number in range(looks_in_all):
            await asyncio.gather(*(one(each) for each in range(part)))
            gc.collect()  # of this process's own callers, which would fill its memory
            before = looks[0]["tasks"] if looks else None
            looks.append(await watched.look((number + 1) * part, begun, before))
            say(" ".join(f"{name}={value}" for name, value in looks[-1].items()))
    line.close()
    return looks


def _judge(setting: Setting, looks: list[Figures], growth: float) -> Figures:
    warm, last = looks[1], looks[-1]
    grown = last["octets"] / warm["octets"]
    setting.must(grown <= growth, f"memory grew by the factor {grown:.3f}")
    for name in ("tasks", "descriptors", "threads"):
        setting.must(last[name] <= warm[name], f"{name}: {warm[name]} and then {last[name]}")
    setting.must(last["connected"] == last["calls"], "not all calls connected")
    setting.must(not last["faults"], f"{last['faults']} faults")
    half = last["calls"] // 2
    setting.must(last["vanished"] >= half, f"{last['vanished']} of {half} were found to be gone")
    rate = last["calls"] / last["seconds"]
    return {"looks": looks, "memory_factor": round(grown, 3), "calls_per_s": round(rate, 1)}


def _impatient(silence_s: float, setting: Setting, folder: Path, port: int) -> list[str | Path]:
    path = folder / "transceiver.toml"
    more = f"silence_deadline_s = {silence_s}"
    text = capacity.TRANSCEIVER.format(port=port, keys=setting.folder / "keys", more=more)
    path.write_text(text)
    return [dev.BIN / "transceiver", "run", "--config", path]


def churn(
    setting: Setting,
    calls: int | None = None,
    looks: int = LOOKS,
    growth: float = GROWTH_MAX,
    silence_s: float = SILENCE_S,
) -> Figures:
    """Short calls one after another, half of which vanish: memory, tasks, descriptors, threads."""
    argv = functools.partial(_impatient, silence_s)
    server = capacity.Server(setting, capacity.Kind("earshot", True, argv, few=1, step=1))
    try:
        calls = calls or (CALLS_QUICK if setting.quick else CALLS)
        pid = server.process.pid
        seen = asyncio.run(_run(pid, server.port, calls, looks, setting.say))
        return _judge(setting, seen, growth)
    finally:
        server.close()


PARTS: dict[str, Callable[[Setting], Figures]] = {"churn": churn}


def main(
    calls: Annotated[int, typer.Option(help="How many calls.")] = CALLS,
    looks: Annotated[int, typer.Option(help="How often it is looked at.", min=3)] = LOOKS,
    growth: Annotated[float, typer.Option(help="Of memory, at the most.")] = GROWTH_MAX,
    silence: Annotated[float, typer.Option(help="Seconds until the silent are gone.")] = SILENCE_S,
) -> None:
    """Run the calls, and print what was seen as JSON."""
    cpus = host.cpus()
    with tempfile.TemporaryDirectory(prefix="earshot-churn-") as folder:
        firsts.make_keys(Path(folder) / "keys")
        setting = Setting(
            folder=Path(folder),
            keyring=settings.load_keys(Path(folder) / "keys"),
            quick=False,
            seed=secrets.randbits(32),
            beside={},
            relay_cpus=set(cpus[:-1] or cpus),
            load_cpu=cpus[-1],
            part="churn",
        )
        found = churn(setting, calls, looks, growth, silence)
    typer.echo(json.dumps(found | {"failures": setting.failures}, indent=2))
    sys.exit(1 if setting.failures else 0)


if __name__ == "__main__":
    typer.run(main)
