"""Rounds of a load, which were carried out one after the other: added up, and judged together.

What it owns: `Round`, what one order to the processes that make load came to (course.py gives
them), and what is said of several: figures with intervals, the spread over workers, lines over
time.

Loss is lost or late: back later than `load.LATE_MS` after the moment a datagram was due. Round
trips are of what came back; those from when it was due are what a caller feels, and hide nothing of
a tool or a relay that stood still ("coordinated omission"); those from when it left stand beside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import intervals
import numpy as np
from findings import Series
from intervals import Estimate
from load import BUFFER_OCTETS, LATE_MS, Array, Figures
from loaders import Order, Part
from observed import Observed, Snapshot

PERCENTS = 50.0, 90.0, 99.0, 99.9
COMPARED = 2 * len(PERCENTS) + 2
"""Figures that have an interval: round trips from two moments, loss, CPU time a datagram."""

BUSY_PERCENT = 90.0
"""A worker that uses so much of a CPU has reached it: the rest goes to interrupts and the clock."""

DISTURBED, TAKEN_S = {"others_percent": 5.0, "stolen_percent": 1.7}, 0.025
"""A round is disturbed if other programs, or a hypervisor, had more than that of one of the CPUs
that are used, and more than that many seconds: the kernel counts in hundredths. What a hypervisor
takes counts for more, since everything waits meanwhile. Rounds of 1.5 s on a quiet virtual machine
have none to two hundredths of it, or ten at once (a tail of 100 ms), and nothing in between."""

LOSS_MAX = 0.001
"""Lost or late, of all: a rate with less is held."""

Busy = tuple[float, dict[int, float]]
"""Seconds since the measurement began, and each process's per cent of a CPU until then."""


@dataclass
class Round:
    """What one order came to."""

    at_s: float
    """When it began, in seconds since the measurement did."""
    order: Order
    part: Part
    before: Snapshot
    after: Snapshot
    machine: Figures = field(default_factory=dict)
    """What others had of the CPUs meanwhile: instrument.Others."""
    took_s: float = 0.0

    def disturbed(self) -> bool:
        """Whether this machine did something else meanwhile."""
        return any(
            percent > DISTURBED[name] and percent / 100 * self.took_s > TAKEN_S
            for name, percent in self.machine.items()
        )

    def cpu_s(self) -> float:
        """CPU time of the relay's processes for it."""
        return sum(self.after.cpu_since(self.before).values())

    def datagrams(self) -> int:
        """Both ways, at the clients."""
        return int(self.part.sent.sum() * 2 - self.part.lost.sum())

    def busy(self) -> dict[int, float]:
        """Per cent of a CPU that each process of the relay used while the tool sent, also where it
        stopped early. What it did after the last datagram had left, since a queue was there, counts
        too, up to all of a CPU."""
        spent = self.after.cpu_since(self.before)
        ran_s = self.part.ran_s or self.order.seconds
        return {pid: min(used / ran_s * 100, 100.0) for pid, used in spent.items()}

    def trips(self) -> Array:
        """Histogram of round trips from when datagrams were due."""
        whole: Array = self.part.trips.sum(0, dtype=np.int64)
        return whole

    def trips_sent(self) -> Array:
        """The same from when they left."""
        whole: Array = self.part.trips_sent.sum(0, dtype=np.int64)
        return whole


# --- what is said of rounds -----------------------------------------------------------------------


def together(rounds: Sequence[Round]) -> Part:
    """All rounds as one part, with a slice for each."""
    flat = [
        replace(
            each.part,
            sent=each.part.sent.sum(keepdims=True),
            lost=each.part.lost.sum(keepdims=True),
            late=each.part.late.sum(keepdims=True),
            trips=each.trips()[None],
            trips_sent=each.trips_sent()[None],
        )
        for each in rounds
    ]
    whole = flat[0]
    for each in flat[1:]:
        whole = whole + each
    return whole


def estimates(rounds: Sequence[Round]) -> dict[str, Estimate]:
    """Each figure that two runs may be compared by."""
    whole = together(rounds)
    found: dict[str, Estimate] = {}
    for name, of in (("due", Round.trips), ("left", Round.trips_sent)):
        for percent in PERCENTS:
            between = intervals.BETWEEN_TAIL if percent > 50 else intervals.BETWEEN
            found[f"{name}_p{percent:g}"] = intervals.quantile(
                [of(each) for each in rounds], percent, COMPARED, between
            )
    events = int((whole.lost + whole.late).sum())
    found["loss"] = intervals.estimate(
        whole.loss(),
        [each.part.loss() for each in rounds],
        COMPARED,
        intervals.counted(events, int(whole.sent.sum())),
    )
    if any(each.after.cpu_s for each in rounds):
        found["cpu_us"] = intervals.estimate(
            sum(each.cpu_s() for each in rounds) * 1e6 / sum(each.datagrams() for each in rounds),
            [each.cpu_s() * 1e6 / max(each.datagrams(), 1) for each in rounds],
            COMPARED,
            between=intervals.BETWEEN_CPU,
        )
    return found


def told(value: float, digits: int = 1) -> float | None:
    """A figure as JSON can have it: rounded, and None for what is not known."""
    return None if math.isnan(value) else round(value, digits)


def pair(found: Estimate, times: float = 1.0, digits: int = 1) -> Figures:
    """A figure with its interval."""
    return {
        "value": told(found.value * times, digits),
        "plus_minus": told(found.apart * times, digits),
    }


def trips_table(found: dict[str, Estimate], own: Figures) -> list[Figures]:
    """A row a percentile."""
    rows = []
    for percent in PERCENTS:
        name = f"p{percent:g}"
        due, left = found[f"due_{name}"], found[f"left_{name}"]
        rows.append(
            {
                "percentile": name,
                "from_due": told(due.value),
                "minus": told(due.below),
                "plus": told(due.above),
                "from_leaving": told(left.value),
                "minus_leaving": told(left.below),
                "plus_leaving": told(left.above),
                "tool_alone": own[name],
            }
        )
    return rows


def datagrams(rounds: Sequence[Round], echoes: bool) -> Figures:
    """What became of them, in numbers."""
    whole = together(rounds)
    sent, lost = int(whole.sent.sum()), int(whole.lost.sum())
    found: Figures = {"sent": sent, "lost": lost}
    if echoes:
        found |= {"lost_inbound": sent - whole.crossed}
        found |= {"lost_outbound": lost - (sent - whole.crossed)}
    return found | {
        "late": int(whole.late.sum()),
        "duplicated": whole.duplicated,
        "duplicated_inbound": whole.duplicated_inbound,
        "reordered": whole.reordered,
        "foreign": whole.foreign,
        "unsent": whole.unsent,
        "dropped_at_the_tools_sockets": whole.own_drops,
        "not_answered": whole.strangers,
        "tool_behind_ms_max": round(whole.lag_ms, 2),
    }


def own_faults(whole: Part, buffer_octets: int) -> list[str]:
    """What the tool itself did to the figures, in sentences. `buffer_octets` is what the kernel
    granted each of its sockets at the least."""
    told = []
    if buffer_octets < BUFFER_OCTETS:
        told.append(
            f"the kernel granted the tool's sockets {buffer_octets} octets, not {BUFFER_OCTETS} "
            "(net.core.rmem_max, CAP_NET_ADMIN): what they have no room for is not lost at the "
            "relay (dropped_at_the_tools_sockets)"
        )
    if whole.own_drops:
        told.append(
            f"{whole.own_drops} datagrams are lost since the tool's own sockets were full, by the "
            "kernel's count"
        )
    if whole.unsent:
        told.append(
            f"{whole.unsent} datagrams were due and never left: the tool was too slow for this"
        )
    return told


def workers_table(rounds: Sequence[Round], seen: Observed) -> list[Figures]:
    """The spread over workers: a row each."""
    seconds = sum(each.order.seconds for each in rounds)
    received = [each.after.received_since(each.before) for each in rounds]
    counts = [sum(column) for column in zip(*received, strict=False)]
    spent: dict[int, float] = {}
    for each in rounds:
        for pid, used in each.after.cpu_since(each.before).items():
            spent[pid] = spent.get(pid, 0.0) + used
    pids = seen.workers() or [0] * len(counts)
    rows = []
    for number, pid in enumerate(pids):
        row: Figures = {"worker" if seen.tells_workers_apart() else "process": number}
        if pid:
            percent = min(spent.get(pid, 0.0) / seconds * 100, 100.0)  # as in Round.busy
            row |= {"pid": pid, "cpu_percent": round(percent, 1)}
        if number < len(counts) and (seen.tells_workers_apart() or not seen.here):
            count = counts[number]
            row["datagrams"] = count
            row["share_percent"] = round(count / max(sum(counts), 1) * 100, 1)
            if pid and count:
                row["cpu_us_a_datagram"] = round(spent.get(pid, 0.0) * 1e6 / count, 3)
        rows.append(row)
    return rows


def dropped(rounds: Sequence[Round]) -> Figures:
    """What the relay, and the kernel at its sockets, dropped meanwhile, by reason."""
    first, last = rounds[0].before, rounds[-1].after
    reasons = {name: n - first.drops[name] for name, n in last.drops.items()}
    found = {name: n for name, n in reasons.items() if n}
    if kernel := last.kernel_drops - first.kernel_drops:
        found["kernel, a socket's buffer was full"] = kernel
    return found


def ramp_table(one: Round) -> tuple[list[Figures], int | None]:
    """A row a slice of a ramp, and the rate from which more than LOSS_MAX is lost, if any."""
    length = one.order.seconds / one.order.slices
    rows: list[Figures] = []
    over = None
    for number, sent in enumerate(one.part.sent.tolist()):
        loss = float(one.part.lost[number] + one.part.late[number]) / max(sent, 1)
        row: Figures = {"rate_per_s": round(sent / length), "loss_percent": round(loss * 100, 4)}
        for percent in PERCENTS:
            row[f"p{percent:g}_us"] = told(intervals.percentile(one.part.trips[number], percent))
        rows.append(row)
        if over is None and loss >= LOSS_MAX:
            over = row["rate_per_s"]
    return rows, over


def limit(
    one: Round,
    alone: Figures,
    processes: int,
    echoes: bool,
    busy: dict[int, float] | None = None,
) -> str:
    """What kept a rate from being held, as far as it shows from here. Ways are told apart if the
    tool `echoes`. `busy` is what each process of the relay used of a CPU at the worst moment, if
    that is not the whole round."""
    part, order = one.part, one.order
    most = alone["datagrams_per_s_max"] * processes
    if part.lag_ms >= LATE_MS or (part.unsent and not part.stopped) or order.rate > most:
        return (
            f"the tool itself: it fell {part.lag_ms:.0f} ms behind its schedule (alone it makes "
            f"{alone['datagrams_per_s_max']} a second a process); give it more --processes"
        )
    if part.own_drops * 2 > int(part.lost.sum()):
        return (
            f"the tool itself: its own sockets had no room for {part.own_drops} datagrams; give it "
            "more --processes, or more of net.core.rmem_max"
        )
    used_by = busy or one.busy()
    if full := {pid: used for pid, used in used_by.items() if used >= BUSY_PERCENT}:
        each = ", ".join(f"process {pid} {used:.0f} %" for pid, used in full.items())
        return f"the relay's workers: of a CPU each they used {each}"
    if drops := dropped([one]):
        return f"the relay dropped {', '.join(f'{n} ({why})' for why, n in drops.items())}"
    lost, late = int(part.lost.sum()), int(part.late.sum())
    lost_in = int(part.sent.sum()) - part.crossed
    ways = f"{lost_in} lost on the way in, {lost - lost_in} on the way back"
    where = f"{ways if echoes else f'{lost} lost'}, {late} late"
    queue = "; a queue grew all the time" if part.stopped else ""
    return f"nothing that shows from here: {where}{queue}"


# --- over time ------------------------------------------------------------------------------------


def series(rounds: Sequence[Round], busy: Sequence[Busy], names: dict[int, str]) -> list[Series]:
    """Rate, loss and round trips, a point a slice, and the CPU of the relay's processes."""
    at, rates, losses = list[float](), list[float](), list[float]()
    trips: dict[float, list[float]] = {percent: [] for percent in PERCENTS}
    for each in rounds:
        length = each.order.seconds / each.order.slices
        for number in range(each.order.slices):
            sent = int(each.part.sent[number])
            if not sent:
                continue
            at.append(round(each.at_s + (number + 0.5) * length, 3))
            rates.append(sent / length)
            losses.append(float(each.part.lost[number] + each.part.late[number]) / sent * 100)
            for percent, values in trips.items():
                values.append(intervals.percentile(each.part.trips[number], percent))
    lines = [
        Series("Rate", "sent", "1/s", at, rates),
        Series("Loss, late included", "loss", "%", at, losses),
    ]
    for percent, values in trips.items():
        lines.append(Series("Round trip", f"p{percent:g}", "us", at, values))
    for pid, name in names.items():
        seen = [(when, percents[pid]) for when, percents in busy if pid in percents]
        if seen:
            lines.append(
                Series("CPU of the relay", name, "%", [a for a, _ in seen], [b for _, b in seen])
            )
    return lines
