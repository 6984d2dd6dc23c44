"""`flood.py compare`: runs of `flood.py packets` beside one another: do they differ, and where?

What it owns: the reading of two or more files that `packets --json` printed, and a table with a row
a figure: its values, how far the two furthest runs are apart, how far two runs of one system may
be, and in how many pairs of runs that was kept.

Two uses. Of one system: 95 of 100 pairs of runs keep to the intervals in all figures at once
(intervals.py says why); fewer mean that something changed between runs, and the machine is the
first to ask. Of two versions: a figure that differs by more than it may is a difference.

Rules that stay true: runs are compared only if they were the same load (rate, clients, rounds);
nothing is judged, so the exit status says only whether the files could be read.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import options
import typer
from findings import Figures, Finding
from instrument import OTHERS_PERCENT
from intervals import ROUNDS_MIN, Estimate

SAME = "rate_per_s", "clients", "rounds", "round_s"
"""What makes runs the same load."""


def estimates(found: Figures) -> dict[str, Estimate]:
    """The figures of a run that have an interval. Raises KeyError, TypeError for another file."""
    rows: dict[str, tuple[Any, Any, Any]] = {}
    for row in found["round_trip_us"]:
        name = row["percentile"]
        rows[f"{name} from_due us"] = row["from_due"], row["minus"], row["plus"]
        rows[f"{name} from_leaving us"] = (
            row["from_leaving"],
            row["minus_leaving"],
            row["plus_leaving"],
        )
    for name in ("loss_percent", "relay_cpu_us_a_datagram"):
        if pair := found.get(name):
            rows[name] = pair["value"], pair["plus_minus"], pair["plus_minus"]
    return {name: Estimate(*map(float, row)) for name, row in rows.items() if None not in row}


def common(runs: list[dict[str, Estimate]]) -> list[str]:
    """Figures that have an interval in all runs."""
    return [name for name in runs[0] if all(name in run for run in runs)]


def table(runs: list[dict[str, Estimate]]) -> tuple[list[Figures], Figures]:
    """A row a figure that all runs have, and how many pairs kept to their intervals."""
    names = common(runs)
    pairs = list(itertools.combinations(runs, 2))
    rows: list[Figures] = []
    for name in names:
        values = [run[name].value for run in runs]
        sides = [side for run in runs for side in (run[name].below, run[name].above)]
        allowed = math.sqrt(sum(side**2 for side in sides) / len(sides))
        kept = sum(one[name].agrees(other[name]) for one, other in pairs)
        rows.append(
            {
                "figure": name,
                "values": " ".join(f"{value:g}" for value in values),
                "furthest_apart": round(max(values) - min(values), 6),
                "may_be_apart": round(allowed, 6),
                "pairs_that_agree": f"{kept} of {len(pairs)}",
            }
        )
    wholly = sum(all(one[name].agrees(other[name]) for name in names) for one, other in pairs)
    return rows, {
        "pairs": len(pairs),
        "agree_in_all_figures": wholly,
        "single_figures": len(pairs) * len(names),
        "agree": sum(int(row["pairs_that_agree"].split()[0]) for row in rows),
    }


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="What `packets --json` printed, two or more.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Compare runs of `packets`: which figures differ by more than two runs of one system may."""
    if len(files) < 2:
        raise typer.BadParameter("one run alone has nothing to be compared with")
    found: list[Figures] = []
    for path in files:
        try:
            found.append(json.loads(path.read_text()))
            comparable = estimates(found[-1])
            found[-1]["tool"]["machine"].values()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{path} is no run of `packets --json`: {error}") from error
        if not comparable:
            raise typer.BadParameter(
                f"{path} has no interval of any figure, so that nothing can be compared: more "
                f"--rounds give one ({ROUNDS_MIN} at the least)"
            )
    for name in SAME:
        if len(kinds := {each[name] for each in found}) > 1:
            raise typer.BadParameter(f"these are different loads: {name} is {sorted(kinds)}")
    if not common([estimates(each) for each in found]):
        raise typer.BadParameter("no figure has an interval in all of these runs")

    def measure() -> Finding:
        runs = [estimates(each) for each in found]
        rows, counts = table(runs)
        others = [sum(each["tool"]["machine"].values()) for each in found]
        finding = Finding(f"{len(found)} runs compared", counts | {"figures": rows})
        finding.figures["others_percent_of_a_cpu"] = [round(each, 1) for each in others]
        quiet = [one for one, busy in zip(found, others, strict=True) if busy <= OTHERS_PERCENT]
        if len(quiet) < len(found):
            finding.notes.append(
                f"in {len(found) - len(quiet)} of the runs other programs had more than "
                f"{OTHERS_PERCENT:g} % of a CPU: that is another system than a quiet machine"
            )
            if len(quiet) > 1:
                _, finding.figures["of_quiet_runs"] = table([estimates(each) for each in quiet])
        if left := sorted(set(itertools.chain(*runs)) - set(common(runs))):
            finding.notes.append(f"not compared, since not all runs have them: {', '.join(left)}")
        finding.notes.append(
            "two figures agree if they differ by less than their intervals allow (the lower one's "
            "plus and the higher one's minus, of these the root mean square)"
        )
        return finding

    options.deliver(measure, as_json, None)
