"""What the relay costs: the delay that it adds, CPU while nothing happens, memory of many flows.

For bench.py. What is compared is measured in turns, in one run.
"""

import contextlib
import os
import secrets
import shlex
import signal
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import dev
import firsts
import numpy as np
from load import BATCH, LATE_MS, PATIENCE_S, Figures, Load
from rig import (
    Relay,
    Setting,
    cpu_s,
    end,
    listens,
    memfds,
    private_octets,
    spawn,
    tree,
)

import flows
import frame
import host
import settings

# --- the delay ------------------------------------------------------------------------

PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
LOSS_MAX = 0.001
"""Lost or late: a rate with less is sustained."""
QUEUE_S = 0.05
"""What may be on its way at one time, in seconds of the schedule: beyond it a queue is growing that
buffers hide from the loss for a while."""
BESIDE_PORTS = 3478, 9000
"""Where a relay that is named on the command line listens, and where it forwards to."""


@dataclass(frozen=True)
class Subject:
    """One of those that are measured in turns."""

    name: str
    command: str = ""
    """Empty: this tree's relay, or nothing at all for `direct`."""


@contextlib.contextmanager
def serving(setting: Setting, subject: Subject) -> Iterator[tuple[Load, int | None]]:
    """A spinning load with open flows through the subject, and the subject's process."""
    with contextlib.ExitStack() as stack:
        keyring, pid, at = setting.keyring, None, ("127.0.0.1", BESIDE_PORTS[0])
        if subject.command:
            pid = _started(setting, subject, stack)
            keyring = settings.load(firsts.CONFIG, settings.Relay).keys.load()
        elif subject.name != "direct":
            relay = stack.enter_context(Relay(setting))
            pid, at = relay.process.pid, (relay.address, relay.public)
        load = stack.enter_context(
            Load(setting.clients, BESIDE_PORTS[1] if subject.command else 0, spin=True)
        )
        load.towards(*at) if pid else load.towards("127.0.0.1", load.port)
        load.open(setting.firsts(setting.clients, load.port, keyring))
        yield load, pid


def _started(setting: Setting, subject: Subject, stack: contextlib.ExitStack) -> int:
    """The process of a relay that is another's, once it listens. Raises dev.StartError."""
    if listens(BESIDE_PORTS[0]):
        raise dev.StartError(f"{subject.name}: port {BESIDE_PORTS[0]} is taken")
    log = setting.subfolder() / "log"
    process = spawn(shlex.split(subject.command), setting.relay_cpus, log)
    stack.callback(end, process, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_S
    while not listens(BESIDE_PORTS[0]):
        if process.poll() is not None or time.monotonic() > deadline:
            raise dev.StartError(f"{subject.name}: {log.read_text()[-2000:]}")
        time.sleep(0.01)
    return process.pid


def latency(setting: Setting) -> Figures:
    """Round trips at fixed rates and at the highest, for each subject in turns."""
    direct, *others = [Subject("direct"), Subject("earshot")] + [
        Subject(name, command) for name, command in setting.beside.items()
    ]
    if setting.beside:
        firsts.make_keys(settings.load(firsts.CONFIG, settings.Relay).keys.file)
    rates = [500.0, 1_000.0] if setting.quick else [5_000.0, 20_000.0]
    found: Figures = {}
    for rate in rates:
        found[f"at_{rate:.0f}_per_s"] = _in_turns(setting, rate, [direct, *others])
    found["at_the_highest"] = []
    for subject in others:
        rate = _highest(setting, subject)
        for _ in range(SHORT_OF_MAX):
            rows = _in_turns(setting, rate, [direct, subject])
            if rows[1]["loss"] < LOSS_MAX:
                break
            rate *= 0.97  # sustained once, and not for so long
        found["at_the_highest"] += rows
    return found


SHORT_OF_MAX = 5
"""How often a highest rate is lowered that did not last."""


def _in_turns(setting: Setting, rate: float, subjects: Sequence[Subject]) -> list[Figures]:
    """A row a subject: medians over rounds, and what it adds to the first, which is `direct`."""
    rounds, seconds = (1, 0.2) if setting.quick else (3, 3.0)
    runs: dict[Subject, list[Figures]] = {subject: [] for subject in subjects}
    for _ in range(rounds):
        for subject, found in runs.items():
            found.append(_run(setting, subject, rate, seconds))
    table: list[Figures] = []
    for subject, found in runs.items():
        row = {key: statistics.median(run[key] for run in found) for key in found[0]}
        if table:
            for name in PERCENTILES:
                row[f"{name}_added_us"] = row[f"{name}_us"] - table[0][f"{name}_us"]
        rounded = {key: round(value, 6 if key == "loss" else 1) for key, value in row.items()}
        table.append({"subject": subject.name, "rate_per_s": round(rate)} | rounded)
        p50, p99 = rounded["p50_us"], rounded["p99_us"]
        setting.say(f"{rate:.0f} a second, {subject.name}: p50 {p50} us, p99 {p99} us")
    return table


def _run(setting: Setting, subject: Subject, rate: float, seconds: float) -> Figures:
    """One subject at one rate: round trips from when a datagram was meant to leave, and (sent)
    from when it left; CPU time of the subject's processes."""
    with serving(setting, subject) as (load, pid):
        pids = tree(pid) if pid else []
        before = sum(map(cpu_s, pids))
        load.begin(rate, seconds + 1)
        load.run(seconds)
        used = sum(map(cpu_s, pids)) - before
        account = load.settle()
    row: Figures = {"loss": (account.lost + account.late) / account.sent}
    for suffix, since in (("us", None), ("sent_us", account.sent_at)):
        values = np.percentile(account.trips_us(since), list(PERCENTILES.values()))
        row |= {f"{name}_{suffix}": float(us) for name, us in zip(PERCENTILES, values, strict=True)}
    row["cpu_percent"] = used / seconds * 100
    row["cpu_us_a_datagram"] = used * 1e6 / (account.sent + account.returned)
    return row


def _highest(setting: Setting, subject: Subject) -> float:
    """The highest rate that a subject sustains: faster by half until it does not, then halving."""
    seconds, precision = (0.2, 1.5) if setting.quick else (2.0, 1.05)
    good, bad, rate = 0.0, float("inf"), 1_000.0 if setting.quick else 30_000.0
    with serving(setting, subject) as (load, _):
        while bad > max(good, 1_000.0) * precision:
            # Twice, since a machine that stands still for a moment looks like a limit.
            held = _sustained(load, rate, seconds) or _sustained(load, rate, seconds)
            good, bad = (rate, bad) if held else (good, rate)
            rate = good * 1.5 if bad == float("inf") else (good + bad) / 2
    setting.say(f"highest, {subject.name}: {good:.0f} a second")
    return good or bad


def _sustained(load: Load, rate: float, seconds: float) -> bool:
    """Nothing to speak of is lost or late, no queue grows, and Load itself keeps its schedule."""
    load.begin(rate, seconds + 1)
    behind = load.run(seconds, lambda: load.outstanding > rate * QUEUE_S + BATCH)
    account = load.settle()
    kept = not behind and account.lag_ms < LATE_MS
    return kept and account.lost + account.late < LOSS_MAX * account.sent


# --- CPU and memory -------------------------------------------------------------------------------


def idle(setting: Setting) -> Figures:
    """CPU of each process while a thousand flows say nothing."""
    seconds = 0.5 if setting.quick else 10.0
    with Relay(setting, workers=2) as relay, Load(setting.clients) as load:
        load.towards(relay.address, relay.public)
        load.open(setting.firsts(setting.clients, load.port))
        time.sleep(1.0)  # what opening left to do is not idling
        workers = relay.worker_pids()
        pids = tree(relay.process.pid)
        before = {pid: cpu_s(pid) for pid in pids}
        time.sleep(seconds)
        percent = {pid: round((cpu_s(pid) - before[pid]) / seconds * 100, 3) for pid in pids}
    others = [percent[pid] for pid in pids if pid not in (relay.process.pid, *workers)]
    return {
        "seconds": seconds,
        "flows": setting.clients,
        "worker_percent": [percent[pid] for pid in workers],
        "supervisor_percent": percent[relay.process.pid],
        "keeper_percent": others[0] if others else None,
    }


def memory(setting: Setting) -> Figures:
    """What many flows take, in shared memory and in the worker, and what a datagram costs then."""
    few, many = (100, 1_000) if setting.quick else (1_000, 100_000)
    found: Figures = {"flows": many}
    with (
        Relay(setting, flows_max=few, more=PERIODS) as small,
        Relay(setting, flows_max=many, more=PERIODS) as large,
        Load(few) as light,
        Load(many) as heavy,
    ):
        for relay, load in ((small, light), (large, heavy)):
            load.towards(relay.address, relay.public)
        light.open(setting.firsts(few, light.port))
        found |= _memory_in_use(setting, large, heavy, many)
        found["process"] = _cpu_in_turns(setting, {few: (small, light), many: (large, heavy)})
    found["table"] = _table_costs(few, many, 10 if setting.quick else 200)
    return found


PERIODS = "flow_idle_s = 12.0\ntentative_idle_s = 12.0\n"
"""So that `IN_USE_S` has two whole sweeps in it, and a client's next datagram comes in time at
20,000 a second over 100,000 clients."""
IN_USE_S = 26.0


def _memory_in_use(setting: Setting, relay: Relay, load: Load, many: int) -> Figures:
    """Fill a relay with flows, use all of them for a while, and look at its worker's memory."""
    (worker,) = relay.worker_pids()
    empty = private_octets(worker)
    load.open(setting.firsts(many, load.port))
    opened, peak = private_octets(worker), 0
    pieces = 1 if setting.quick else int(IN_USE_S)
    load.begin(setting.rate, pieces + PATIENCE_S)
    for _ in range(pieces):
        load.run(1.0)
        peak = max(peak, private_octets(worker))
    account, live = load.settle(), len(relay.flows())
    setting.must(live == many, f"{live} flows are left of {many} that are used")
    setting.must(not account.lost, f"{account.lost} of {account.sent} datagrams are lost")
    of_worker = {"empty": empty, "opened": opened, "in_use_max": peak, "grown": peak - empty}
    setting.say(f"{many} flows: {peak - empty} octets of the worker's own")
    return {
        "shared_octets_flows": sum(len(each.section("flows")) for each in relay.memories),
        "shared_octets_all": sum(os.stat(path).st_size for path in memfds(relay.process.pid)),
        "worker_private_octets": of_worker,
        "in_use": account.figures(),
    }


def _cpu_in_turns(setting: Setting, relays: dict[int, tuple[Relay, Load]]) -> Figures:
    """CPU time of a worker a datagram, by its number of flows, all of them in use."""
    rate, rounds, seconds = (2_000, 1, 0.2) if setting.quick else (100_000, 5, 1.0)
    spent: dict[int, list[float]] = {size: [] for size in relays}
    for _ in range(rounds):
        for size, (relay, load) in relays.items():
            (worker,) = relay.worker_pids()
            before = cpu_s(worker)
            load.begin(rate, seconds + 1)
            load.run(seconds)
            account = load.settle()
            used = cpu_s(worker) - before
            spent[size].append(used * 1e6 / (account.sent + account.returned))
    return {"rate_per_s": rate} | _compared("cpu_us_a_datagram", spent)


def _compared(name: str, values: dict[int, list[float]]) -> Figures:
    """Medians at two sizes, and how many times the first the second is."""
    first, second = (statistics.median(found) for found in values.values())
    sizes = zip(values, (first, second), strict=True)
    return {
        name: {f"{size}_flows": round(value, 3) for size, value in sizes},
        "ratio": round(second / first, 3),
    }


def _table_costs(few: int, many: int, rounds: int) -> Figures:
    """Looking up as the worker does it, and sweeping, in this process, at two sizes in turns."""
    tables = {size: _Table(size) for size in (few, many)}
    found: Figures = {}
    for order in ("at_random", "in_order"):
        spent: dict[int, list[float]] = {size: [] for size in tables}
        for _ in range(rounds):
            for size, table in tables.items():
                spent[size].append(table.look_up_ns(order == "in_order"))
        found[f"look_up_{order}"] = _compared("ns_a_datagram", spent)
    found["sweep_ms_max"] = {f"{size}_flows": table.sweep_ms() for size, table in tables.items()}
    return found


class _Table:
    """A flow table in use, without sockets."""

    BATCHES = 100
    """Looked up in a turn."""

    def __init__(self, size: int) -> None:
        memory = host.SharedMemory("bench", {"flows": flows.octets(size)})
        limits = flows.Limits(size, size, 16, idle_s=60.0, tentative_idle_s=15.0)
        self._table = flows.Table(memory.section("flows"), limits, 0.0)
        hop = frame.name("127.0.0.1", 9000, socket.AF_INET)
        self._headers = [
            frame.header(f"127.{1 + (i >> 16)}.{i >> 8 & 255}.{i & 255}", 5000) for i in range(size)
        ]
        for header in self._headers:
            self._table.open(header, hop, secrets.token_hex(11).encode() + b"=", 0.0)
        self._table.answered(self._headers, 0.0)
        self._chance, self._next = np.random.default_rng(size), 0
        self._frames = bytearray(BATCH * frame.HEADER_OCTETS)
        self._read = struct.Struct(f"{frame.HEADER_OCTETS}s" * BATCH).unpack_from
        whole = np.frombuffer(b"".join(self._headers), np.uint8)
        self._octets = whole.reshape(-1, frame.HEADER_OCTETS)

    def look_up_ns(self, in_order: bool) -> float:
        """One datagram's share of reading headers, finding hops and noting who was heard of."""
        table, frames, size, spent = self._table, self._frames, len(self._headers), 0
        shape = self.BATCHES, BATCH
        if in_order:
            count = self.BATCHES * BATCH
            chosen = ((self._next + np.arange(count)) % size).reshape(shape)
            self._next += count
        else:
            chosen = self._chance.integers(size, size=shape)
        for batch in chosen:
            frames[:] = self._octets[batch].tobytes()  # as the kernel does, and not our cost
            start = time.perf_counter_ns()
            headers = self._read(frames)
            hops = list(map(table.hops.get, headers))
            if all(hops):
                table.active.update(headers)
            b"".join(hops)  # type: ignore[arg-type]  # all are there
            spent += time.perf_counter_ns() - start
        return spent / (self.BATCHES * BATCH)

    def sweep_ms(self) -> Figures:
        """The longest sweep while all flows are in use, and while all of them end."""
        longest: Figures = {}
        now, step, size = 0.0, 0.02, len(self._headers)
        for state, until in (("in_use", 150.0), ("ending", 300.0)):
            worst = 0
            while now < until:
                now += step
                if state == "in_use":  # everybody is heard of once in ten seconds
                    k = int(now / step) % 500
                    self._table.active.update(
                        self._headers[k * size // 500 : (k + 1) * size // 500]
                    )
                start = time.perf_counter_ns()
                self._table.sweep(now)
                worst = max(worst, time.perf_counter_ns() - start)
            longest[state] = round(worst / 1e6, 3)
            longest[f"flows_after_{state}"] = len(self._table)
        return longest


PARTS: dict[str, Callable[[Setting], Figures]] = {
    "latency": latency,
    "idle": idle,
    "memory": memory,
}
"""By the name that the command line knows them by."""
