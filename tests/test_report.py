"""A page of a finding asks nobody for anything, runs nothing, and shows what was measured.

Its plots are read back from their SVG: a thinned line keeps its peaks, a gap is a gap. What a
browser makes of the page is asked of Chromium, once, with text that would do harm if it could.
"""

import html.parser
import importlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PHONE, DESKTOP = 360, 1280

HOSTILE = (
    "</title></style></script><script>document.documentElement.id='ran'</script>"
    "<img src=//192.0.2.1/x onerror=\"document.documentElement.id='ran'\">'\"&amp;<!-- ]]>"
)
VOID = {"meta", "link", "br", "wbr", "img"}
ABOUT = {"date": "2026-01-02T03:04:05+0000", "machine": {"cpu": "A CPU", "cpus": 2}, "seed": 7}


def _scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("axes", "charts", "findings", "report")
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))


axes, charts, findings, report = (
    getattr(_scripts(), name) for name in ("axes", "charts", "findings", "report")
)
Finding, Marker, Series, Spread = (
    getattr(findings, name) for name in ("Finding", "Marker", "Series", "Spread")
)


class Read(html.parser.HTMLParser):
    """What a browser would find: elements with their attributes, and text; all are closed."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, kind=""):
        return [
            each for name, each in self.elements if name == tag and kind in each.get("class", "")
        ]

    def text(self, *tags):
        return " ".join(text for tag, text in self.texts if not tags or tag in tags)


def points(path):
    """All points of a path, in order."""
    found, x, y = [], 0, 0
    for letter, words in re.findall(r"([MLHVh])([^MLHVh]*)", path):
        numbers = [int(each) for each in words.split()]
        if letter == "H":
            x = numbers[0]
        elif letter == "V":
            y = numbers[0]
        elif letter in "ML":
            for x, y in zip(numbers[::2], numbers[1::2], strict=True):
                found.append((x, y))
            continue
        found.append((x, y))
    return found


def drawn(figure):
    """The lines of a figure; that of its table's swatches are not among them."""
    return [each["d"] for each in Read(figure).all("path", "line") if each["d"] != "M1 7H29"]


def over_time(*lines, markers=(), title="Round trip"):
    series = [Series(title, f"line {n}", "ms", *each) for n, each in enumerate(lines)]
    return charts.over_time(title, series, list(markers), charts.span(series, markers))


def sample(text=lambda name: name):
    """A finding as large and as odd as they get; `text` makes its names."""
    moments = [each / 50 for each in range(6_000)]
    trips = [0.3 + 0.1 * math.sin(each) + 90 * (each % 977 == 0) for each in range(6_000)]
    seconds = list(range(121))
    found = Finding(text("Chaos: calls while parts are killed"))
    for name in ("p50", "p90", "p99"):
        found.series.append(Series(text("Round trip"), text(name), text("ms"), moments, trips))
    odd = [None if each == 50 else math.inf if each == 60 else each % 3 for each in seconds]
    found.series.append(Series(text("Loss"), text("to the server"), text("%"), seconds, odd))
    for number in range(15):
        name = text(f"a process with a long name, number {number}")
        load = [number * 5 + each % 3 for each in seconds]
        found.series.append(Series(text("CPU"), name, text("% of a core"), seconds, load))
    found.series.append(Series(text("Empty"), text("nothing"), text("ms"), [], []))
    found.series.append(Series(text("Uneven"), text("too few"), text("ms"), [1, 2, 3], [4.0]))
    sizes = [1, 7, 10_000, 0]
    for size in sizes:
        values = [1.5 + each**2 / 1e4 for each in range(size)]
        found.spreads.append(Spread(text("Round trip"), text(f"{size} values"), text("ms"), values))
    happened = "a transceiver with 14 calls was killed and nobody had expected that to happen"
    found.markers = [
        Marker(each, text(f"{happened} {each}")) for each in (5, 5.5, *range(9, 99, 9))
    ]
    found.markers.append(Marker(math.nan, text("nobody knows when")))
    found.figures = {
        text("calls"): 40,
        text("datagrams_in_all"): 12_034_112,
        text("nothing"): None,
        text("loss"): {"percent": 0.0342, "of": {"sent": 5, "received": math.nan}},
        text("events"): [
            {
                "event": text("worker killed"),
                "silence_ms": {"p50": None, "most": 81.25},
                "ok": True,
            },
            {"event": text("restart"), "silence_ms": {"p50": 1, "most": 2}, "ok": False},
        ],
        "ways": [
            {"way": text(f"way {n}"), **{f"figure_{m}": n * m for m in range(9)}} for n in (1, 2)
        ],
        "workers": {text(f"worker {n}"): {"clients": n, "cpu_percent": 1.5} for n in range(3)},
        "promises": [
            {
                "at_s": at,
                "promise": text("nothing is lost, and no call ends by it"),
                "took_ms": took,
            }
            for at, took in ((0.5, ""), (7, 1.5))
        ],
        "list": list(range(100)),
        "mixed": [1, {"a": 2}, [3]],
        "empty": {},
        "numpy": charts.np.arange(3, 5),
    }
    found.notes = [text("The load tool ran on the same CPUs.")]
    found.must(True, "")
    found.must(False, text("A call was silent for more than a second."))
    return found


def forbidden(page):
    """What would ask somebody for something, or run."""
    read = Read(page)
    for tag, attributes in read.elements:
        assert tag not in {"script", "iframe", "img", "image", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                assert (tag, name, value) == ("link", "href", "data:,")
            assert "url(" not in (value or "")
    assert not re.search(r"url\(|@import|expression\(|</", read.text("style"))
    return read


def test_the_page_asks_for_nothing_and_runs_nothing():
    page = report.page(sample(), ABOUT)
    read = forbidden(page)
    policy = next(each for each in read.all("meta") if "http-equiv" in each)
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    )
    # Without an icon of its own a browser would ask a server for one.
    assert read.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert page.index("Content-Security-Policy") < page.index("<style")
    assert not re.search(r"https?:|[\"'(=]//", page.replace(read.text("pre"), ""))
    assert read.text("h1") == "Chaos: calls while parts are killed"


def test_hostile_text_is_text():
    read = forbidden(report.page(sample(lambda name: f"{name} {HOSTILE}"), ABOUT | {"x": HOSTILE}))
    for tag in ("h1", "title", "h3", "li", "p", "text", "td", "desc"):
        if tag != "text":  # those are numbers
            assert HOSTILE in read.text(tag), tag
    names = " ".join(each.get("aria-label", "") for _, each in read.elements)
    assert f"Round trip {HOSTILE} over time" in names
    # Names of figures may be broken at their underscores and dots, so their text comes in pieces.
    assert HOSTILE.replace(".", "") in "".join(text for _, text in read.texts).replace(".", "")
    assert "\x00" not in report.page(Finding("a\x00b\x1b[31m\ud800"), ABOUT)


def test_the_page_is_written_whatever_characters_it_has(tmp_path):
    report.write(tmp_path / "page.html", Finding("é\udcff\ud800 ﷽"), ABOUT | {"command": "\udcff"})
    assert "﷽" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_headings_plots_and_tables_can_be_heard():
    page = report.page(sample(), ABOUT)
    read = Read(page)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(each.get("scope") in {"row", "col"} for each in read.all("th"))
    plots = read.all("svg", "plot")
    assert len(plots) == 5 and all(each["role"] == "img" and each["aria-label"] for each in plots)
    assert page.count("<desc>") == len(plots)
    assert "p50 from 0.20 to 90.3 ms" in read.text("desc")
    assert "7 values: values 7, p50 1.50, most 1.50" in read.text("desc")
    scrolled = [each for _, each in read.elements if "scroll" in each.get("class", "")]
    assert scrolled and all(each["tabindex"] == "0" and each["aria-label"] for each in scrolled)


def test_what_did_not_hold_stands_first():
    read = Read(report.page(sample(), ABOUT))
    (verdict,) = read.all("div", "verdict")
    assert (verdict["class"], verdict["role"]) == ("verdict failed", "alert")
    text = read.text()
    assert "1 of 2 things that must hold did not" in text
    assert text.index("A call was silent") < text.index("Round trip")
    held = Finding("Held")
    assert "nothing was promised" in report.page(held, ABOUT)
    held.must(True, "")
    assert "What must hold did." in report.page(held, ABOUT)
    held.must(True, "")
    assert "All 2 things that must hold did." in report.page(held, ABOUT)
    held.failures.append("Said without asking.")
    held.failures.append("Twice.")
    held.failures.append("Thrice.")
    assert "3 things that must hold did not" in report.page(held, ABOUT)


def test_the_json_is_that_of_the_command_line():
    found = sample()
    read = Read(report.page(found, ABOUT))
    printed = findings.text(findings.whole(found, ABOUT), as_json=True)
    assert read.text("pre") == printed
    assert json.loads(printed)["loss"] == {"percent": 0.0342, "of": {"sent": 5, "received": None}}


def table(page, heading):
    """The cells under a heading, by rows; None where there is no table."""
    block = page[page.index(f">{heading}</h3>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", block[: block.index("</table>")])
    plain = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in plain]


def test_figures_are_tables_with_the_numbers_of_the_json():
    page = report.page(sample(), ABOUT)
    assert table(page, "events") == [
        ["event", "silence_ms.p50", "silence_ms.most", "ok"],
        ["worker killed", "–", "81.25", "yes"],
        ["restart", "1", "2", "no"],
    ]
    assert table(page, "workers") == [
        ["", "clients", "cpu_percent"],
        *([f"worker {n}", str(n), "1.5"] for n in range(3)),
    ]
    promised = page[page.index(">promises</h3>") :]
    assert '<td class="text long" data-name="promise">nothing is lost' in promised
    assert '<td data-name="took_ms">1.5</td>' in promised  # a number, though another is not known
    # More columns than rows, and many: turned, so that a phone shows it.
    turned = table(page, "ways")
    assert turned[0] == ["way", "way 1", "way 2"]
    assert turned[3] == ["figure_2", "2", "4"]
    assert table(page, "loss") == [["percent", "0.0342"]]
    text = re.sub("<[^>]*>", " ", page.replace("<wbr>", ""))
    assert "12 034 112" in " ".join(text.split())  # in spans of their own: a copy has no gaps
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … 88 more" in text
    assert "numpy 3, 4" in " ".join(text.split())
    assert "1, {&quot;a&quot;: 2}, 3" in text


def test_a_thinned_line_keeps_its_peaks_and_says_so():
    many = 200_000
    values = [10.0 + each % 5 for each in range(many)]
    values[77_777], values[150_123] = 19.9, 0.0
    figure = over_time(([each / 1000 for each in range(many)], values))
    (path,) = drawn(figure)
    found = points(path)
    assert len(found) <= 2 * charts.COLUMNS + 2
    assert len(path) < 12_000
    assert min(found, key=lambda each: each[1]) == (round(77.777 / 199.999 * 2000), 5)
    assert max(found, key=lambda each: each[1]) == (round(150.123 / 199.999 * 2000), 1000)
    assert [each[0] for each in found] == sorted(each[0] for each in found)
    assert (found[0][0], found[-1][0]) == (0, 2000)
    assert "of up to 200,000 points the least and the most of each 500th" in figure
    assert "points" not in over_time(([0, 1, 2], [1, 2, 3]))


def test_what_is_no_number_leaves_a_gap():
    values = [1, 2, None, 2, math.nan, math.inf, 1, -math.inf, 3, 4]
    figure = over_time((list(range(10)), values))
    (path,) = drawn(figure)
    assert path.count("M") == 4
    assert len(points(path)) == 6
    assert "line 0: left out, no number: 4 of 10 values." in figure
    thinned = [1.0] * 100_000
    thinned[30_000:40_000] = [math.nan] * 10_000
    (path,) = drawn(over_time((list(range(100_000)), thinned)))
    assert path.count("M") == 2
    assert all(not 605 < x < 795 for x, _ in points(path))


def test_what_has_no_values_is_named_and_not_drawn():
    figure = over_time(([], []), ([1, 2], [None, math.nan]))
    assert "Nothing to draw" in figure and "line 1" in figure and drawn(figure) == []
    figure = over_time(([], []), ([1], [5]))
    assert len(drawn(figure)) == 1
    assert Read(figure).all("path", "dots")  # a point alone is seen
    figure = charts.spread("Set-up", [Spread("Set-up", "none", "ms", [])])
    assert "Nothing to draw" in figure
    assert report.page(Finding("Nothing"), {}).endswith("</html>\n")


def test_lines_that_are_too_many_are_named_in_the_table():
    figure = over_time(*(([0, 1], [n, n]) for n in range(40)))
    assert len(drawn(figure)) == charts.LINES_MAX
    assert "Drawn are the 12 of 40 lines that reach highest." in figure
    assert "line 3" in figure and "line 39" in figure
    assert {y for path in drawn(figure) for _, y in points(path)} == {
        round((1 - n / 40) * 1000) for n in range(28, 40)
    }


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["1", "1"]),
        (10, ["10", "5", "9", "10"]),
        (100, ["100", "50", "90", "99", "100"]),
        (1000, ["1,000", "500", "900", "990", "999", "1,000"]),
        (10_000, ["10,000", "5,000", "9,000", "9,900", "9,990", "9,999", "10,000"]),
    ],
)
def test_percentiles_are_values_that_were_measured(count, expected):
    """And none is told that no value lies above: it would be the highest by another name."""
    values = [float(each) for each in range(count, 0, -1)]
    figure = charts.spread("Set-up", [Spread("Set-up", "relay", "ms", values)])
    assert re.findall("<td>(.*?)</td>", figure) == expected
    (path,) = drawn(figure)
    found = points(path)
    assert (found[0][0], found[-1][0]) == (0, 2000)
    dots = [each["d"] for each in Read(figure).all("path", "dots")]
    assert sum(each.count("M") for each in dots) == max(0, len(expected) - 2)
    if count == 1000:
        assert "left out" not in figure
        odd = charts.spread("x", [Spread("x", "relay", "ms", [*values, math.nan, None])])
        assert "relay: left out, no number: 2 of 1,002 values." in odd


def test_the_step_at_a_percentile_is_its_value():
    values = [1.0] * 90 + [50.0] * 9 + [100.0]
    (path,) = drawn(charts.spread("x", [Spread("x", "y", "ms", values)]))
    heights = {}
    for x, y in points(path):
        heights.setdefault(y, []).append(x)
    # Two decades from 0 to 99 %: 90 % is in the middle. An axis from 1 to 100 is logarithmic.
    assert {y: (min(xs), max(xs)) for y, xs in heights.items()} == {
        1000: (0, 1000),
        151: (1000, 2000),
        0: (2000, 2000),
    }


def test_markers_stand_at_the_same_place_in_each_plot_and_share_numbers():
    found = Finding("Markers")
    found.markers = [Marker(30, "later"), Marker(10, "first"), Marker(10.01, "with it")]
    for plot in ("One", "Two"):
        found.series.append(Series(plot, "x", "ms", [0, 40], [1, 2]))
    found.series.append(Series("Three", "x", "ms", [0, 1], [1, 2]))
    found.series.append(Series("Three", "of another unit", "%", [0, 1], [1, 2]))
    page = report.page(found, ABOUT)
    places = re.findall(r'<line class="mark" x1="([\d.]+)%"', page)
    assert places == ["25.00", "25.02", "75.00"] * 4
    assert re.findall(r'<text class="badge"[^>]*>([^<]*)<', page) == ["1", "2", "3"] * 4
    first = page[page.index("<ol>") : page.index("</ol>")]
    assert first.index("first") < first.index("with it") < first.index("later")
    found.markers = [Marker(each / 10, f"event {each}") for each in range(390)]
    page = report.page(found, ABOUT)
    badges = re.findall(r'<text class="badge"[^>]*>([^<]*)<', page)
    numbers = [int(each) for badge in badges for each in badge.split("–")]
    assert len(badges) < 4 * 20 and max(numbers) == charts.MARKERS_MAX
    assert "The first 200 of 390." in page and "The first 40 of 390." in page


def test_axes_fit_what_is_on_them():
    assert [each.label for each in axes.of_time(0, 60).ticks if each.always] == [
        "0",
        "20",
        "40",
        "60",
    ]
    assert axes.of_time(0, 3600).ticks[1].label == "10:00"
    for length in (1, 7.3, 59, 300, 301, 3599, 86_400, 1e7):
        ticks = axes.of_time(0, length).ticks
        assert 3 <= len(ticks) <= axes.LABELS_MAX + 1
        assert 2 <= sum(each.always for each in ticks) <= axes.LABELS_MAX_PHONE
    array = charts.np.array
    assert axes.of_values(array([1.0, 1.0, 30.0]), "ms").log
    assert not axes.of_values(array([0.0, 1.0, 30.0]), "ms").log
    flat = axes.of_values(array([0.0, 0.0]), "%")
    assert flat.low == 0 < flat.high
    assert axes.of_values(array([-3.0, 5.0]), "ms").low < -2.9
    values = (0, 0.30123, 1.5, 12.34, 123.4, 234567.8, 1234567, 0.00042)
    assert [axes.number(each) for each in values] == [
        "0", "0.30", "1.50", "12.3", "123", "234,568", "1.235M", "0.00042",
    ]  # fmt: skip
    assert [axes.minutes(each) for each in (0, 65, 3725, -61)] == [
        "0:00",
        "1:05",
        "1:02:05",
        "-1:01",
    ]


number = st.none() | st.floats() | st.integers(-10, 10_000)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(number, number), max_size=30),
    st.lists(st.floats(allow_nan=True), max_size=3),
)
def test_nothing_measured_makes_drawing_fail(measured, happened):
    found = Finding("Anything")
    moments, values = [at for at, _ in measured], [value for _, value in measured]
    found.series.append(Series("x", "y", "ms", moments, values))
    found.spreads.append(Spread("x", "y", "ms", values))
    found.markers = [Marker(each, "z") for each in happened]
    page = report.page(found, {})
    for path in drawn(page):
        assert all(0 <= x <= 2000 and 0 <= y <= 1000 for x, y in points(path)), path


def test_the_page_stays_small():
    found = sample()
    assert len(report.page(found, ABOUT)) < 200_000
    found.figures["table"] = [{"number": each, "text": "x" * 50} for each in range(5_000)]
    found.figures["list"] = list(range(200_000))
    found.figures["dict"] = {str(each): each for each in range(10_000)}
    found.notes = ["A note. " * 1_000] * 1_000
    found.markers = [Marker(each / 100, "x" * 10_000) for each in range(10_000)]
    for number_of in range(100):
        found.series.append(Series(f"Plot {number_of}", "x", "ms", [1], [2]))
    page = report.page(found, ABOUT)
    assert len(page) < 3_000_000
    for sentence in (
        "The first 300 of 5,000.",
        "The first 300 of 10,000.",
        "… and 800 more, in the JSON below.",
        "The first 40 of 106 plots.",
        "too many for a page: --json prints it.",
    ):
        assert sentence in page, sentence


def colours(css):
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    return {"light": found, "dark": found | dict(re.findall(r"--([\w-]+): (#\w{6});", dark))}


def contrast(one, other):
    """WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_stands_out_in_both_themes(theme):
    of = colours(report.CSS.read_text())[theme]
    text = [("ink", "paper"), ("ink", "card"), ("muted", "paper"), ("muted", "card")]
    text += [("ink", "bad-well"), ("bad", "bad-well"), ("good", "good-well"), ("on-mark", "mark")]
    lines = [(f"s{number}", "card") for number in range(6)] + [("mark", "card")]
    for one, other in text + lines:
        assert contrast(of[one], of[other]) >= 4.5, (one, other)


def test_lines_differ_by_more_than_colour():
    css = report.CSS.read_text()
    styles = []
    for number in range(charts.LINES_MAX):
        colour = re.search(rf"\.s{number}\b[^{{]*\{{ stroke: var\((.*?)\)", css)
        dashes = re.search(rf"\.line\.s{number}\b[^{{]*\{{ stroke-dasharray: (.*?);", css)
        styles.append((colour[1], dashes[1] if dashes else "solid"))
    assert len(set(styles)) == charts.LINES_MAX
    assert len({dashes for _, dashes in styles[:6]}) == 6


# Where something sticks out, and numbers of events or labels of an axis that overlap.
LAYOUT = """() => {
  const overlapping = (found) => {
    const boxes = [...found].map((each) => each.getBoundingClientRect()).filter((b) => b.width);
    return boxes.flatMap((one, at) => boxes.slice(at + 1).filter((other) =>
      one.left < other.right && other.left < one.right &&
      one.top < other.bottom && other.top < one.bottom)).length;
  };
  const plots = [...document.querySelectorAll("svg.plot")];
  const sum = (query) => plots.reduce((n, p) => n + overlapping(p.querySelectorAll(query)), 0);
  return {
    wide: document.documentElement.scrollWidth,
    badges: sum("rect.badge"),
    labels: sum("text.across"),
    heights: sum("text.up"),
    lines: document.querySelectorAll("svg.plot path.line").length,
    ran: document.documentElement.id,
  };
}"""


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        why = "no Chromium on this machine: install Debian's package chromium"
        if os.environ.get("CI"):
            pytest.fail(why)
        print(f"skipped: {why}")
        pytest.skip(why)
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.mark.parametrize("text", ["plain", "hostile"])
def test_a_phone_shows_it_and_asks_for_nothing(chromium, tmp_path, text):
    found = sample(str if text == "plain" else lambda name: f"{name} {HOSTILE}")
    path = tmp_path / "report.html"
    report.write(path, found, ABOUT | {"command": f"flood.py {HOSTILE}"})
    for width, scheme in ((PHONE, "light"), (DESKTOP, "dark")):
        view = {"width": width, "height": 800}
        context = chromium.new_context(viewport=view, color_scheme=scheme)
        page, asked, said = context.new_page(), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda line, said=said: said.append(line.text))
        page.goto(path.as_uri())
        for each in page.locator("summary").all():
            if not each.evaluate("each => each.parentElement.open"):
                each.click()
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        print(f"screenshot: {tmp_path}/{width}-{scheme}.png")
        shown = page.evaluate(LAYOUT)
        context.close()
        assert (asked, said) == ([path.as_uri()], [])
        assert shown == {
            "wide": width, "badges": 0, "labels": 0, "heights": 0, "lines": 20, "ran": "",
        }  # fmt: skip
