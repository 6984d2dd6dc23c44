"""A finding as one HTML file that needs nothing else: verdict, notes, plots, tables, the JSON.

    write(path, found, about)      the page of a finding; `about` is findings.about's and more

What it owns: the page around the plots (charts.py draws them), and tables of any figures.

Rules that stay true:
- The page makes no request and runs no script. Its Content-Security-Policy forbids both, so that a
  page of somebody else's figures can be opened without a thought. Fonts are the system's.
- Every text is escaped: titles, names, figures and notes may come from servers and command lines.
- Numbers in tables are as `--json` prints them, and that stands at the end, whole.
- It is read on a phone: nothing but wide tables scrolls sideways, and those by themselves.
- What can grow is bounded, and the page says where something was left out.

`page` is the same as a text, for tests.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import charts
import findings
from charts import escaped
from findings import Figures, Finding

CSS = Path(__file__).resolve().parent / "report.css"

ROWS_MAX = 300
"""Rows of one table, and names in one dict: more would be scrolled over. The JSON has them all."""

SENTENCES_MAX = 200
"""Failures, and notes."""

CELLS_MAX = 12
"""Elements of a list that are shown in a cell."""

PLOTS_MAX = 40

JSON_CHARACTERS_MAX = 1_000_000
"""Of the JSON at the end: a browser on a phone shows that much in a second or so."""

DEPTH_MAX = 8
"""Levels of figures in figures that are shown as tables."""

TRANSPOSED_COLUMNS_MIN, TRANSPOSED_ROWS_MAX = 6, 5
"""A table with more columns than that, and so few rows, is turned, for a phone."""

WIDE_COLUMNS_MIN = 7
"""A table of more columns than that has all of a desktop's width."""

SHORT_TEXT = 28
"""Characters of a text that is never broken in a table."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
    " form-action 'none'"
)
"""Images may be data, for the icon is: without one, a browser asks the server for /favicon.ico."""


def write(path: Path, found: Finding, about: Figures) -> None:
    """Write the page of a finding to `path`. Raises OSError."""
    path.write_text(page(found, about), encoding="utf-8", errors="replace")


def page(found: Finding, about: Figures) -> str:
    """The whole of it."""
    raw = findings.text(findings.whole(found, about), as_json=True)
    if len(raw) > JSON_CHARACTERS_MAX:
        raw = f"It has {len(raw):,} characters, too many for a page: --json prints it."
    title = escaped(found.title)
    body = "".join(
        (
            f"<header><h1>{title}</h1>{_verdict(found)}{_about(about)}</header><main>",
            _notes(found.notes),
            _section("Plots", "".join(_plots(found)), "plots"),
            _section("Figures", "".join(_figures(findings.plain(found.figures))), "cards"),
            _section("The run", _card(_pairs(_flat(findings.plain(about))))),
            "<section><h2>JSON</h2><details><summary>All of it, as --json prints it</summary>",
            f"<pre>{escaped(raw, None)}</pre></details></section>",
            "</main>",
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{title}</title><link rel="icon" href="data:,">'
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style></head>\n<body>{body}</body></html>\n"
    )


def _verdict(found: Finding) -> str:
    """What did not hold, or that nothing failed."""
    many = len(found.failures)
    if not many:
        held = (
            f"All {found.checks} things that must hold did."
            if found.checks > 1
            else "What must hold did."
            if found.checks
            else "Nothing failed; nothing was promised, either."
        )
        return f'<div class="verdict held" role="status"><b>✓</b> {held}</div>'
    of = f" of {found.checks}" if found.checks > many else ""
    things = "thing" if found.checks <= 1 and many == 1 else "things"
    words = f"{many}{of} {things} that must hold did not"
    return (
        f'<div class="verdict failed" role="alert"><b>✗</b> {words}:'
        f"<ul>{_sentences(found.failures)}</ul></div>"
    )


def _sentences(sentences: list[str]) -> str:
    shown = "".join(f"<li>{escaped(each, 2_000)}</li>" for each in sentences[:SENTENCES_MAX])
    left = len(sentences) - SENTENCES_MAX
    return shown + (f"<li>… and {left} more, in the JSON below.</li>" if left > 0 else "")


def _notes(notes: list[str]) -> str:
    return _section("Notes", f'<ul class="notes">{_sentences(notes)}</ul>') if notes else ""


def _about(about: Figures) -> str:
    """The line under the title: what was run, when and where, of which commit."""
    machine = about.get("machine")
    cpu = f"{machine.get('cpus')} × {machine.get('cpu')}" if isinstance(machine, dict) else machine
    commit = about.get("commit")
    changed = " with changes" if about.get("dirty") else ""
    parts = (about.get("date"), cpu, f"commit {commit}{changed}" if commit else None)
    line = " · ".join(escaped(each) for each in parts if each)
    command = about.get("command")
    code = f"<code>{escaped(command, 2_000)}</code>" if command else ""
    return f'<p class="about">{code}{"<br>" if code and line else ""}{line}</p>'


def _section(title: str, inner: str, kind: str = "") -> str:
    inner = f'<div class="{kind}">{inner}</div>' if kind and inner else inner
    return f"<section><h2>{escaped(title)}</h2>{inner}</section>" if inner else ""


def _card(inner: str) -> str:
    return f'<div class="card">{inner}</div>'


def _plots(found: Finding) -> Iterator[str]:
    """The list of events, and a figure for each plot and unit: distributions follow the lines of
    the same name."""
    span = charts.span(found.series, found.markers)
    markers = charts.ordered(found.markers)
    names = dict.fromkeys(
        [each.plot for each in found.series] + [each.plot for each in found.spreads]
    )
    if markers:
        yield _card(charts.events(markers))
    drawn = 0
    for name in names:
        lines = [each for each in found.series if each.plot == name]
        for unit in dict.fromkeys(each.unit for each in lines):
            same = [each for each in lines if each.unit == unit]
            drawn += 1
            if drawn <= PLOTS_MAX:
                yield charts.over_time(name, same, markers, span)
        spreads = [each for each in found.spreads if each.plot == name]
        for unit in dict.fromkeys(each.unit for each in spreads):
            drawn += 1
            if drawn <= PLOTS_MAX:
                yield charts.spread(name, [each for each in spreads if each.unit == unit])
    if drawn > PLOTS_MAX:
        yield f"<p>The first {PLOTS_MAX} of {drawn} plots.</p>"


# Tables of any figures: they are plain (findings.plain) already.

_WIDE = "scroll widely"
_NUMBER = re.compile(r"(-?)(\d*)(.*)")
_THOUSAND = '<span class="thousand">{}</span>'


def _figures(figures: Figures) -> Iterator[str]:
    """A card for what stands alone, and one for each dict and table."""
    single = {name: value for name, value in figures.items() if not _is_large(value)}
    if single:
        yield _in_columns(_pairs(single))
    for name, value in list(figures.items())[:ROWS_MAX]:
        if _is_large(value):
            inner = "".join(_block(name, value, 3))
            yield _in_columns(inner, " wide" if _WIDE in inner else "")


def _in_columns(inner: str, wide: str = "") -> str:
    return f'<div class="cell{wide}">{_card(inner)}</div>'  # whose padding columns do not cut off


def _block(name: str, value: Any, level: int) -> Iterator[str]:
    """A heading and what is under it."""
    heading = f"h{min(level, 6)}"
    yield f"<{heading}>{_name(name)}</{heading}>"
    if level > 3 + DEPTH_MAX:
        yield f"<p>{escaped(json.dumps(value))}</p>"
    elif isinstance(value, list):
        yield _rows([_flat(each) for each in value])
    elif _is_alike(value):
        yield _rows([{"": key} | _flat(each) for key, each in value.items()])
    else:
        single = {key: each for key, each in value.items() if not _is_large(each)}
        if single:
            yield _pairs(single)
        for key, each in list(value.items())[:ROWS_MAX]:
            if _is_large(each):
                yield from _block(key, each, level + 1)


def _is_large(value: Any) -> bool:
    """Whether it gets a heading of its own: a dict, or a list of dicts."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, dict) for each in value)
    return isinstance(value, dict) and bool(value)


def _is_alike(value: Figures) -> bool:
    """Whether a dict is a table: dicts of the same names, most of them, without tables in them."""
    rows = list(value.values())
    if len(rows) < 2 or not all(isinstance(each, dict) and each for each in rows):
        return False
    flat = [_flat(each) for each in rows]
    names = {key for row in flat for key in row}
    nested = any(_is_large(cell) for row in flat for cell in row.values())
    return not nested and sum(map(len, flat)) >= 0.6 * len(names) * len(flat)


def _flat(row: Figures, before: str = "") -> Figures:
    """Dicts within a row become columns with a dot in their names, as jq has it."""
    found: Figures = {}
    for key, value in row.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _pairs(figures: Figures) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_name(name)}</th><td>{_cell(value)}</td></tr>'
        for name, value in list(figures.items())[:ROWS_MAX]
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>{_left(len(figures))}'


def _rows(rows: list[Figures]) -> str:
    """A table. What its first column says names the row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))[:ROWS_MAX]
    shown = rows[:ROWS_MAX]
    if len(columns) > TRANSPOSED_COLUMNS_MIN and len(shown) <= TRANSPOSED_ROWS_MAX:
        heads = [columns[0], *(row.get(columns[0]) for row in shown)]
        lines = [[key, *(row.get(key) for row in shown)] for key in columns[1:]]
    else:
        heads, lines = list(columns), [[row.get(key) for key in columns] for row in shown]
    kinds = [_kind(cells) for cells in zip(*lines, strict=True)]
    prose = "text long" in kinds  # on a phone its rows are paragraphs, and each cell names itself
    body = "".join(
        "<tr>"
        + "".join(
            _element("td" if at else "th", kind, cell, head if prose else None)
            for at, (cell, head, kind) in enumerate(zip(line, heads, kinds, strict=True))
        )
        + "</tr>"
        for line in lines
    )
    head = "".join(
        f'<th scope="col" class="{kind}">{_name(each)}</th>'
        for each, kind in zip(heads, kinds, strict=True)
    )
    return (
        f'<div class="{_WIDE if prose or len(heads) > WIDE_COLUMNS_MIN else "scroll"}"'
        ' tabindex="0" role="group" aria-label="Table">'
        f'<table class="grid-table{" prose" if prose else ""}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_left(len(rows))}"
    )


def _kind(cells: Iterable[Any]) -> str:
    """The class of a column: how its cells are aligned, and whether they are broken."""
    texts = [len(each) for each in cells if isinstance(each, str) and each]
    return "" if not texts else "text long" if max(texts) > SHORT_TEXT else "text"


def _element(tag: str, kind: str, cell: Any, head: Any) -> str:
    scope = ' scope="row"' if tag == "th" else ""
    of = f' class="{kind}"' if kind else ""
    named = "" if head is None else f' data-name="{escaped(head)}"'
    return f"<{tag}{scope}{of}{named}>{_name(cell) if tag == 'th' else _cell(cell)}</{tag}>"


def _left(many: int) -> str:
    return f"<p>The first {ROWS_MAX} of {many:,}.</p>" if many > ROWS_MAX else ""


def _cell(value: Any) -> str:
    """A number as JSON has it, a text as it is, a list by its first elements."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        shown = ", ".join(_cell(each) for each in value[:CELLS_MAX])
        left = len(value) - CELLS_MAX
        return (shown or "none") + (f", … {left:,} more" if left > 0 else "")
    if isinstance(value, dict):
        return escaped(json.dumps(value)) if value else "none"
    return escaped(value) if isinstance(value, str) else _number(json.dumps(value))


def _number(text: str) -> str:
    """Five digits and more by their thousands, with gaps that are not there when it is copied."""
    sign, whole, rest = _NUMBER.findall(text)[0]
    if len(whole) < 5:
        return text
    first = len(whole) % 3 or 3
    groups = (whole[at : at + 3] for at in range(first, len(whole), 3))
    return f"{sign}{whole[:first]}{''.join(map(_THOUSAND.format, groups))}{rest}"


def _name(name: Any) -> str:
    """The name of a figure, which may be broken at its underscores and dots."""
    shown = _cell(name) if not isinstance(name, str) else escaped(name)
    return shown.replace("_", "_<wbr>").replace(".", ".<wbr>") if isinstance(name, str) else shown
