"""Plots as SVG inside HTML: lines over time with what happened, and distributions by percentile.

For report.py. A plot is a <figure>: its title, an SVG, and a table of what each line is, which says
the same in numbers to whoever cannot see it, or wants to know exactly.

Rules that stay true:
- Nothing here has a fixed width. Lines are drawn in an inner SVG that is stretched to whatever the
  page gives it, with strokes that are not stretched; labels stand at percentages of the width, in
  letters of one size. So a plot is as legible on a phone as on a wall.
- Colours, dashes and letters are those of report.css, by class: there they follow the theme.
- A line of more points than can be seen is thinned to the least and the most value of each of some
  hundred moments, and the plot says so: no peak is lost, and the file stays small.
- All plots over time have the same axis of time, so that an event stands at the same place in each.
- What is not a finite number is not drawn, and leaves a gap. Nothing measured makes drawing fail.
- Every text is escaped.

Distributions are drawn as the value at each percentile, with the last percents magnified: the axis
is logarithmic in the share of values above. A tail that a histogram hides is half of such a plot.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import axes
import numpy as np
from axes import Floats
from findings import Marker, Series, Spread

COLUMNS = 500
"""Moments that a thinned line has: more than a phone has pixels, about as many as half a desktop. A
line is then at most some 9 kB."""

THINNED_MIN = 2 * COLUMNS
"""Points up to which a line is drawn as it is."""

LINES_MAX = 12
"""Lines in one plot: colours and dashes differ so often. The others stand in its table alone."""

ROWS_MAX = 100
"""Rows of a plot's table."""

MARKERS_MAX = 200
"""Markers in a plot, and in the list of all."""

LISTED_MAX = 40
"""Markers that are named again under each plot."""

TEXT_MAX = 400
"""Characters of one label."""

HEIGHT_PX = 200
"""Of the plot's area."""

WIDTH, HEIGHT = 2000, 1000
"""What the inner SVG is divided into: coordinates are whole numbers."""

PHONE_PX = 270
"""Width of a plot's area on a phone: where numbers of markers would overlap there, in both of their
rows, they share one, `10-12`."""

DOTS_MAX = 60
"""Points up to which each is drawn as a dot, too."""

REMARKS_MAX = 20
"""Sentences under one plot about what is not as it seems."""

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
"""Marked in each distribution that has a value above them, and told in its table."""

BEYOND = 1e18
"""No value that is measured is so great, or so small (and not 0)."""

_TOP_PX, _TOP_PX_MARKED = 10, 44
"""Above a plot's area: with markers there stand their numbers."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def over_time(
    title: str, lines: list[Series], markers: list[Marker], span: tuple[float, float]
) -> str:
    """The figure of lines of one unit. Markers are in their order; `span` is from when to when the
    axis goes, in seconds."""
    unit = lines[0].unit
    found = [_points(each) for each in lines]
    drawn = _loudest([values for _, values in found])
    everything = _finite(np.concatenate([values for _, values in found]))
    rows = [
        (each.name, at in drawn, _extremes(_finite(values)))
        for at, (each, (_, values)) in enumerate(zip(lines, found, strict=True))
    ]
    below = _table(rows, ("least", "median", "most"), unit) + _said(_remarks(lines, found, drawn))
    if not len(everything):
        return _figure(title, "", "<p>Nothing to draw: there is no value.</p>", below)
    across, up = axes.of_time(*span), axes.of_values(everything, unit)
    paths = []
    for style, at in enumerate(drawn):
        moments, values = found[at]
        dots = np.isfinite(values).sum() <= DOTS_MAX
        dense = len(values) > THINNED_MIN
        moments, values = _thin(moments, values, across) if dense else (moments, values)
        kind = f"s{style}{' dense' if dense else ''}"
        paths.append(_line(kind, across.place(moments), up.place(values), bool(dots)))
    words = "; ".join(
        f"{name} from {cells[0]} to {cells[2]} {unit}" for name, _, cells in rows if cells[0]
    )
    shown = markers[:MARKERS_MAX]
    picture = _svg(f"{title} over time", words, across, up, paths, _badges(shown, across))
    scales = f"{unit}{', logarithmic' if up.log else ''}, over {across.unit}"
    listed = _listed(markers, LISTED_MAX)
    return _figure(title, scales, picture, below + listed)


def spread(title: str, spreads: list[Spread]) -> str:
    """The figure of distributions of one unit."""
    unit = spreads[0].unit
    found = [np.sort(_finite(_floats(each.values))) for each in spreads]
    drawn = _loudest(found)
    rows = [
        (each.name, at in drawn, _percentiles(values))
        for at, (each, values) in enumerate(zip(spreads, found, strict=True))
    ]
    heads = ("values", *(f"p{each:g}" for each in PERCENTILES), "most")
    remarks = [
        f"{each.name}: left out, no number: {lost:,} of {len(each.values):,} values."
        for each, values in zip(spreads, found, strict=True)
        if (lost := len(each.values) - len(values))
    ]
    below = _table(rows, heads, unit) + _said(remarks + _undrawn(found, drawn))
    name = f"{title}: distribution"
    if not any(map(len, found)):
        return _figure(name, "", "<p>Nothing to draw: there is no value.</p>", below)
    across = axes.of_percentiles(max(map(len, found)))
    up = axes.of_values(np.concatenate(found), unit)
    paths = [_steps(style, found[at], across, up) for style, at in enumerate(drawn)]
    words = "; ".join(
        f"{each}: " + ", ".join(f"{h} {cell}" for h, cell in zip(heads, cells, strict=True) if cell)
        for each, _, cells in rows
        if cells[-1]
    )
    picture = _svg(name, words, across, up, paths)
    scales = f"{unit}{', logarithmic' if up.log else ''}, at each percentile"
    return _figure(name, scales, picture, below)


def events(markers: list[Marker]) -> str:
    """The list of markers, which are in their order; their numbers stand in each plot over time."""
    shown = _listed(markers, MARKERS_MAX)
    return shown.replace("<details", "<details open", 1)


def span(series: Iterable[Series], markers: Iterable[Marker]) -> tuple[float, float]:
    """From when to when there is anything, in seconds; at least a second, and from 0."""
    moments = [_floats([each.at_s for each in markers])]
    moments += [_floats(each.at_s) for each in series]
    found = _finite(np.concatenate(moments))
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    return min(low, 0.0), max(high, 1.0)


def ordered(markers: Iterable[Marker]) -> list[Marker]:
    """By time; those whose time is no number come last, and are in no plot."""
    known = [Marker(float(_floats([each.at_s])[0]), each.text) for each in markers]
    return sorted(known, key=lambda each: (math.isnan(each.at_s), each.at_s))


def escaped(text: object, most: int | None = TEXT_MAX) -> str:
    """As HTML, also in attributes; of what has more than `most` characters, the beginning. Control
    characters, which no page may have, are shown as such."""
    shown = str(text)
    if most is not None and len(shown) > most:
        shown = f"{shown[:most]}…"
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", shown))


# Lines.


def _floats(values: Sequence[Any]) -> Floats:
    """What is beyond all measure, and no axis could carry, is NaN or 0."""
    found = np.array([math.nan if each is None else each for each in values], np.float64)
    sizes = np.abs(found)
    found = np.where(sizes > BEYOND, math.nan, found)
    return np.where(sizes < 1 / BEYOND, 0.0, found)


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _points(line: Series) -> tuple[Floats, Floats]:
    """Moments in order and what was measured then, NaN where that is no finite number."""
    length = min(len(line.at_s), len(line.values))
    moments, values = _floats(line.at_s[:length]), _floats(line.values[:length])
    moments, values = moments[np.isfinite(moments)], values[np.isfinite(moments)]
    order = np.argsort(moments, kind="stable")
    values = np.where(np.isfinite(values), values, math.nan)
    return moments[order], values[order]


def _loudest(lines: list[Floats]) -> list[int]:
    """Which lines are drawn, in their order: all, or those that reach highest."""
    tops = [float(found.max()) if len(found := _finite(each)) else -math.inf for each in lines]
    best = sorted(range(len(lines)), key=lambda at: -tops[at])[:LINES_MAX]
    return sorted(at for at in best if tops[at] > -math.inf)


def _thin(moments: Floats, values: Floats, across: axes.Axis) -> tuple[Floats, Floats]:
    """The least and the most of each column, in their order, and both ends of the line; NaN for
    columns that have no other."""
    columns = np.minimum((across.place(moments) * COLUMNS).astype(np.int64), COLUMNS - 1)
    kept: list[int] = []
    for part in np.split(np.arange(len(values)), np.flatnonzero(np.diff(columns)) + 1):
        known = part[np.isfinite(values[part])]
        if len(known):
            ends = {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            kept += sorted(ends)
        else:
            kept.append(int(part[0]))
    known = np.flatnonzero(np.isfinite(values))
    chosen = np.unique([*kept, known[0], known[-1]])
    return moments[chosen], values[chosen]


def _line(kind: str, across: Floats, up: Floats, dots: bool) -> str:
    """A path through the points, broken where there is none; a lonely point is a dot."""
    xs = [str(round(each * WIDTH)) for each in across]
    ys = ["" if math.isnan(each) else str(round((1 - each) * HEIGHT)) for each in up]
    pen, parts, points = "M", [], []
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not y:
            pen = "M"
            continue
        parts.append(f"{pen}{x} {y}")
        lonely = pen == "M" and (at + 1 == len(ys) or not ys[at + 1])
        if dots or lonely:
            points.append(f"M{x} {y}h0")
        pen = "L" if pen == "M" else " "
    found = f'<path class="line {kind}" d="{"".join(parts)}"/>'
    return found + (f'<path class="dots {kind}" d="{"".join(points)}"/>' if points else "")


def _steps(style: int, values: Floats, across: axes.Axis, up: axes.Axis) -> str:
    """The value at each percentile, by steps: each is a value that was measured."""
    count = len(values)
    begins = -np.log10(1 - np.arange(count) / count)
    chosen = np.unique(np.searchsorted(begins, np.linspace(0, begins[-1], 2 * COLUMNS)))
    xs = np.round(np.minimum(across.place(begins[chosen]), 1) * WIDTH).astype(int)
    ys = np.round((1 - up.place(values[chosen])) * HEIGHT).astype(int)
    parts = [f"M0 {ys[0]}", *(f"H{x}V{y}" for x, y in zip(xs[1:], ys[1:], strict=True))]
    end = min(across.at(max(1.0, math.log10(count))), 1.0)  # the highest of few has no width else
    parts.append(f"H{round(end * WIDTH)}")
    marked = [
        f"M{round(across.at(axes.decades(each)) * WIDTH)}"
        f" {round((1 - up.at(float(values[_rank(each, count)]))) * HEIGHT)}h0"
        for each in PERCENTILES
        if _supported(each, count)
    ]
    found = f'<path class="line s{style}" d="{"".join(parts)}"/>'
    return found + (f'<path class="dots s{style}" d="{"".join(marked)}"/>' if marked else "")


# What stands around the lines.


def _svg(
    title: str, words: str, across: axes.Axis, up: axes.Axis, paths: list[str], badges: str = ""
) -> str:
    top = _TOP_PX_MARKED if badges else _TOP_PX
    bottom = top + HEIGHT_PX
    parts = [
        f'<svg class="plot" role="img" height="{bottom + 26}" aria-label="{escaped(title)}">',
        f"<title>{escaped(title)}</title><desc>{escaped(words)}</desc>",
    ]
    for tick in up.ticks:
        y = round(bottom - up.at(tick.value) * HEIGHT_PX, 1)
        parts.append(f'<line class="grid" x2="100%" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text class="up" x="-7" y="{y + 4:g}">{escaped(tick.label)}</text>')
    for tick in across.ticks:
        x = f"{across.at(tick.value) * 100:.2f}%"
        wide = "" if tick.always else " wide"
        parts.append(
            f'<line class="grid{wide}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom + 5}"/>'
            f'<text class="across{wide}" x="{x}" y="{bottom + 20}">{escaped(tick.label)}</text>'
        )
    parts.append(
        f'{badges}<svg y="{top}" width="100%" height="{HEIGHT_PX}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' preserveAspectRatio="none">{"".join(paths)}</svg></svg>'
    )
    return "".join(parts)


def _badges(markers: list[Marker], across: axes.Axis) -> str:
    """A line for each marker, and its number; those too close for that share one, `3-5`."""
    placed: list[tuple[float, int, int, int]] = []  # where, in which row, from which to which
    ends = [-math.inf, -math.inf]
    parts = []
    for at, each in enumerate(markers, 1):
        x = across.at(each.at_s) * 100
        if not math.isfinite(x):
            continue
        half = (_badge_px(str(at)) + 2) / PHONE_PX * 50
        row = next((row for row in (0, 1) if x - half >= ends[row]), None)
        if row is None:
            where, row, low, _ = placed.pop()
            placed.append((where, row, low, at))
            half = (_badge_px(f"{low}–{at}") + 2) / PHONE_PX * 50
            ends[row] = max(ends[row], where + half)
        else:
            placed.append((x, row, at, at))
            ends[row] = x + half
        parts.append(_upright(x, 20 * row + 17, _TOP_PX_MARKED + HEIGHT_PX))
    for x, row, low, high in placed:
        label = str(low) if low == high else f"{low}–{high}"
        width, y = _badge_px(label), 20 * row
        parts.append(
            f'<rect class="badge" x="{x:.2f}%" y="{y}" width="{width}" height="17" rx="5"'
            f' transform="translate({-width / 2:g})"/>'
            f'<text class="badge" x="{x:.2f}%" y="{y + 12.5:g}">{label}</text>'
        )
    return "".join(parts)


def _badge_px(label: str) -> int:
    return 8 + 7 * len(label)  # letters of 11 pixels, and what is around them


def _upright(x: float, top: float, bottom: float) -> str:
    return f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{bottom}"/>'


def _listed(markers: list[Marker], most: int) -> str:
    """The list of markers, closed."""
    if not markers:
        return ""
    rows = "".join(
        f"<li><time>{escaped(axes.moment(each.at_s))}</time> {escaped(each.text)}</li>"
        for each in markers[:most]
    )
    more = f"<p>The first {most} of {len(markers):,}.</p>" if most < len(markers) else ""
    many = "1 event" if len(markers) == 1 else f"{len(markers):,} events"
    head = f"<summary>{many}, numbered</summary>"
    return f'<details class="events">{head}<ol>{rows}</ol>{more}</details>'


def _table(rows: list[tuple[str, bool, list[str]]], heads: tuple[str, ...], unit: str) -> str:
    """What each line is: how it is drawn, its name, and its figures."""
    used = [
        at for at in range(len(heads)) if any(len(cells) > at and cells[at] for *_, cells in rows)
    ]
    style, parts, gap = 0, [], '<span class="swatch"></span>'
    for name, drawn, cells in rows[:ROWS_MAX]:
        path = f'<path class="line s{style}" d="M1 7H29"/>'
        swatch = f'<svg class="swatch" aria-hidden="true">{path}</svg>'
        style += drawn
        figures = "".join(f"<td>{escaped(cells[at] or '–')}</td>" for at in used)
        parts.append(
            f'<tr><th scope="row">{swatch if drawn else gap}{escaped(name)}</th>{figures}</tr>'
        )
    head = "".join(f'<th scope="col">{escaped(heads[at])}</th>' for at in used)
    more = f"<p>The first {ROWS_MAX} of {len(rows)} lines.</p>" if len(rows) > ROWS_MAX else ""
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="What each line is">'
        f'<table class="lines{" tails" if len(used) > 3 else ""}">'
        f'<thead><tr><th scope="col">{escaped(unit)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(parts)}</tbody></table></div>{more}"
    )


def _figure(title: str, scales: str, picture: str, below: str) -> str:
    return (
        f"<figure><figcaption><h3>{escaped(title)}</h3><p>{escaped(scales)}</p></figcaption>"
        f"{picture}{below}</figure>"
    )


def _said(remarks: list[str]) -> str:
    return "".join(f"<p>{escaped(each)}</p>" for each in remarks[:REMARKS_MAX])


def _extremes(values: Floats) -> list[str]:
    if not len(values):
        return ["", "", ""]
    return [axes.number(float(each)) for each in (values.min(), np.median(values), values.max())]


def _percentiles(values: Floats) -> list[str]:
    """How many, the value at each percentile that so many have, and the highest."""
    count = len(values)
    ranks = [_rank(each, count) if _supported(each, count) else -1 for each in PERCENTILES]
    found = ["" if rank < 0 else _narrow(float(values[rank])) for rank in ranks]
    return [axes.number(count), *found, _narrow(float(values[-1])) if count else ""]


def _narrow(value: float) -> str:
    """A table of percentiles has seven columns, on a phone, too."""
    return axes.short(value) if abs(value) >= 1e5 else axes.number(value)


def _supported(percentile: float, count: int) -> bool:
    """Whether any of so many values lies above it: else it would be the highest by another name."""
    return count * (100 - percentile) / 100 > 0.999


def _rank(percentile: float, count: int) -> int:
    return min(max(math.ceil(round(percentile / 100 * count, 6)) - 1, 0), count - 1)


def _remarks(
    lines: list[Series], found: list[tuple[Floats, Floats]], drawn: list[int]
) -> list[str]:
    """What is not drawn as it was measured."""
    said = []
    dense = [lines[at].name for at in drawn if len(found[at][1]) > THINNED_MIN]
    if dense:
        most = max(len(values) for _, values in found)
        said.append(
            f"{', '.join(dense)}: of up to {most:,} points the least and the most of each"
            f" {COLUMNS}th of the time are drawn."
        )
    for line, (_, values) in zip(lines, found, strict=True):
        gaps = int(np.isnan(values).sum())
        if gaps:
            said.append(f"{line.name}: left out, no number: {gaps:,} of {len(values):,} values.")
        if len(line.at_s) != len(line.values):
            said.append(f"{line.name}: {len(line.at_s):,} moments, {len(line.values):,} values.")
    return said + _undrawn([values for _, values in found], drawn)


def _undrawn(lines: list[Floats], drawn: list[int]) -> list[str]:
    known = sum(bool(len(_finite(each))) for each in lines)
    if len(drawn) == known:
        return []
    return [f"Drawn are the {len(drawn)} of {known} lines that reach highest."]
