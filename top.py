"""The live view: what a running relay does, a worker a line, in a terminal.

What it owns: `relay top`. It reads the shared memory that the relay has published, and nobody
notices: it writes nothing there and asks the relay's processes nothing, but for the kernel's drops,
which only the keeper can see, at /metrics, if it can be reached from here.

    memory  -- sample -->  Sample  -- two of them: rates -->  View  -- table -->  terminal, or JSON

Rules that stay true:
- What is shown was counted between two samples; a relay that was replaced in between begins anew.
- `sample`, `rates` and `table` are Sans-IO; the loop below them is thin.
- What cannot be found out (no right to look, nobody there) is left out, not guessed.

https://rich.readthedocs.io/en/stable/live.html
"""

import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import census
import handover
import host
import ledger
import metrics
import settings

PERIOD_S = 1.0
"""Between two samples. Shorter shows noise, longer is no live view."""

HTTP_S_MAX = 0.3
"""How long /metrics may take: it is on this host, or it is not reachable from here."""

METRICS_OCTETS_MAX = 4 << 20
"""More of /metrics is not read."""

PLAIN_COLUMNS = 160
"""Width where there is no terminal."""

_KERNEL_DROPS = re.compile(
    r'^earshot_relay_socket_dropped_total\{socket="\w+",worker="(\d+)"\} (\S+)$', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """What a worker had counted at one time."""

    ways: tuple[ledger.Counters, ledger.Counters]
    """Inbound and outbound."""
    tentative: int
    assured: int
    beat_s: float
    """When it last woke up, on the clock of the sample; 0 if it never did."""
    cpu_s: float | None
    kernel_drops: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """What a relay had counted at one time."""

    at: float
    """Seconds of the monotonic clock."""
    workers: list[WorkerSample]
    supervisor: ledger.Counters
    keeper: ledger.Counters


@dataclass(frozen=True, slots=True)
class Way:
    """One direction, a second."""

    datagrams: float
    octets: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What a worker does, a second where nothing else is said."""

    inbound: Way
    """Received from clients; octets are those that went on."""
    outbound: Way
    """Received from transceivers."""
    assured: int
    """Flows."""
    tentative: int
    """Flows."""
    drops: dict[str, float]
    """By reason, the most frequent first; "outbound_" stands before the reasons of the way back."""
    recovered: float
    waiting: int
    """Datagrams that wait for Redis now."""
    kernel_drops: float | None
    """None where /metrics cannot be reached."""
    cpu_percent: float | None
    """Of one CPU; None where the process cannot be seen."""
    heard_ago_s: float | None
    """Since it last woke up; None if it never did."""


@dataclass(frozen=True, slots=True)
class View:
    """What a relay does."""

    workers: list[WorkerView]
    uptime_s: float | None
    drain_s: float | None
    """How much longer it drains at the most; None while it serves."""
    flows_left: int
    redis_up: bool | None
    """None without Redis."""
    vip_announced: bool | None
    """None without virtual addresses."""
    workers_died: int
    """Since the relay was started: so often a successor took over."""


def sample(
    memories: Sequence[host.Memory],
    now: float,
    cpu_s: Callable[[int], float | None] = lambda _: None,
    kernel_drops: Mapping[int, int] | None = None,
) -> Sample:
    """What stands in a relay's memories now: its workers' and, last, its own.

    `cpu_s` says what a process has used, by its number; `kernel_drops` are those of each worker.
    """
    *workers, own = memories
    rows = []
    for number, memory in enumerate(workers):
        control = memory.section("control").cast("Q")
        ways = handover.counters_in(memory)
        rows.append(
            WorkerSample(
                (ledger.total(ways[:1]), ledger.total(ways[1:])),
                *census.count(census.states(memory.section("flows")).tobytes()),
                beat_s=control[handover.Control.BEAT] * 1e-9,
                cpu_s=cpu_s(control[handover.Control.PID]),
                kernel_drops=(kernel_drops or {}).get(number),
            )
        )
    supervisor = ledger.Counters(metrics.Supervisor, own.section("supervisor"))
    keeper = ledger.Counters(metrics.Keeper, own.section("keeper"))
    return Sample(now, rows, ledger.total([supervisor]), ledger.total([keeper]))


def rates(
    before: Sample, after: Sample, found: settings.Relay, uptime_s: float | None = None
) -> View:
    """What happened between two samples of a relay with these settings."""
    seconds = max(after.at - before.at, 1e-9)
    earlier = before.workers if len(before.workers) == len(after.workers) else after.workers
    until_s = after.supervisor[metrics.Supervisor.DRAINING_UNTIL] / 1000
    keeper = after.keeper
    return View(
        workers=[
            _worker(old, new, seconds, after.at)
            for old, new in zip(earlier, after.workers, strict=True)
        ],
        uptime_s=uptime_s,
        drain_s=max(0.0, until_s - after.at) if until_s else None,
        flows_left=keeper[metrics.Keeper.FLOWS_LEFT],
        redis_up=bool(keeper[metrics.Keeper.REDIS_UP]) if found.redis else None,
        vip_announced=bool(keeper[metrics.Keeper.VIP_ANNOUNCED]) if found.vip else None,
        workers_died=after.supervisor[metrics.Supervisor.WORKERS_DIED],
    )


def _worker(old: WorkerSample, new: WorkerSample, seconds: float, now: float) -> WorkerView:
    def rate(way: int, name: str) -> float:
        kind = new.ways[way].kinds[name]
        # Less than before: another relay's memory, whose counters began at zero meanwhile.
        return max(0, new.ways[way][kind] - old.ways[way][kind]) / seconds

    inbound, outbound = (
        Way(rate(way, "RECEIVED"), rate(way, "OCTETS")) for way in range(len(new.ways))
    )
    drops = {
        ("outbound_" if way else "") + name: rate(way, f"DROPPED_{name.upper()}")
        for way, counters in enumerate(new.ways)
        for name in counters.drops()
    }
    drops = dict(sorted(drops.items(), key=lambda item: -item[1]))
    return WorkerView(
        inbound=inbound,
        outbound=outbound,
        assured=new.assured,
        tentative=new.tentative,
        drops={name: each for name, each in drops.items() if each},
        recovered=rate(0, "RECOVERED"),
        waiting=new.ways[0][metrics.Inbound.WAITING],
        kernel_drops=_since(old.kernel_drops, new.kernel_drops, seconds),
        cpu_percent=_since(old.cpu_s, new.cpu_s, seconds / 100),
        heard_ago_s=max(0.0, now - new.beat_s) if new.beat_s else None,
    )


def _since(old: float | None, new: float | None, seconds: float) -> float | None:
    return None if old is None or new is None else max(0.0, new - old) / seconds


def table(view: View) -> Group:
    """The view, to be printed."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    rows.add_column("worker")
    for name in ("in/s", "octets/s", "out/s", "octets/s", "assured", "tentative"):
        rows.add_column(name, justify="right")
    rows.add_column("drops/s", justify="right")
    rows.add_column("most of them")
    for name in ("waiting", "recovered/s", "kernel drops/s", "CPU %", "heard of"):
        rows.add_column(name, justify="right")
    for number, each in enumerate(view.workers):
        most = next(iter(each.drops), "")
        rows.add_row(
            str(number),
            *(_short(figure) for way in (each.inbound, each.outbound) for figure in _pair(way)),
            *(f"{figure:,}" for figure in (each.assured, each.tentative)),
            _short(sum(each.drops.values())),
            most,
            f"{each.waiting:,}",
            _short(each.recovered),
            "-" if each.kernel_drops is None else _short(each.kernel_drops),
            "-" if each.cpu_percent is None else f"{each.cpu_percent:.0f}",
            "never" if each.heard_ago_s is None else f"{each.heard_ago_s:.1f} s ago",
        )
    return Group(Text(", ".join(_headline(view))), rows)


def _pair(way: Way) -> tuple[float, float]:
    return way.datagrams, way.octets


def _headline(view: View) -> Iterable[str]:
    yield "relay" if view.uptime_s is None else f"relay, up {_duration(view.uptime_s)}"
    if view.drain_s is None:
        yield "serving"
    else:
        yield f"draining: {view.flows_left:,} flows left, {_duration(view.drain_s)} at the most"
    if view.redis_up is not None:
        yield "Redis answers" if view.redis_up else "Redis does not answer"
    if view.vip_announced is not None:
        yield f"addresses {'announced' if view.vip_announced else 'withdrawn'}"
    yield f"{view.workers_died} taken over from workers that died"


def _short(figure: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if figure >= limit:
            return f"{figure / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{figure:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)[:20] or "0 s"


# --- the loop -------------------------------------------------------------------------------------


def run(found: settings.Relay, *, once: bool = False, as_json: bool = False) -> None:
    """Show the running relay of this configuration until interrupted.

    With `once` one view as plain text, with `as_json` one as JSON, on standard output; so, too,
    where that is no terminal. Raises OSError and ValueError as `host.attach` does.
    """
    before = _sample(found)
    console = Console()
    if as_json or once or not console.is_terminal:
        time.sleep(PERIOD_S)
        view = rates(before, _sample(found), found, _uptime_s(found))
        if as_json:
            sys.stdout.write(orjson.dumps(view, option=orjson.OPT_INDENT_2).decode() + "\n")
        else:
            Console(width=None if console.is_terminal else PLAIN_COLUMNS).print(table(view))
        return
    try:
        with Live(Text("a moment"), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(PERIOD_S)
                after = _sample(found)
                live.update(table(rates(before, after, found, _uptime_s(found))), refresh=True)
                before = after
    except KeyboardInterrupt:
        pass


def _sample(found: settings.Relay) -> Sample:
    # Attached anew each time: the relay may have been replaced.
    running = handover.Running.of(found.relay)
    return sample(
        [*running.workers, running.own],
        time.monotonic(),
        host.cpu_seconds,
        _kernel_drops(found.relay),
    )


def _uptime_s(found: settings.Relay) -> float | None:
    try:
        return max(0.0, time.time() - handover.state_file(found.relay).stat().st_mtime)
    except OSError:
        return None


def _kernel_drops(table: settings.RelayTable) -> dict[int, int]:
    """What the kernel has dropped from each worker's sockets, as far as the keeper says it."""
    if not table.metrics.port:
        return {}
    # It is on this host: no proxy of the environment has anything to do with it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{table.metrics}/metrics", timeout=HTTP_S_MAX) as response:
            text = response.read(METRICS_OCTETS_MAX).decode(errors="replace")
    except (OSError, ValueError):
        return {}
    return read_kernel_drops(text)


def read_kernel_drops(text: str) -> dict[int, int]:
    """The same out of Prometheus' text."""
    drops: dict[int, int] = {}
    for number, count in _KERNEL_DROPS.findall(text):
        drops[int(number)] = drops.get(int(number), 0) + int(float(count))
    return drops
