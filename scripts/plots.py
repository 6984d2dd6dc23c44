"""Plots of a simulation: how soon callers are reached, what events cost, where load is, machines.

For simulate.py. What is drawn stands in its figures, but for the distributions of latency and the
callers on the map, which it leaves in the plan.
"""

from pathlib import Path
from typing import Any

import globe
import matplotlib as mpl
import numpy as np
from planning import Plan

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt  # after the choice of what it draws with

Figures = dict[str, Any]

SIZE, DPI = (10, 5.6), 120
DOTS = 20_000
"""Callers on the map: more of them would be one blot."""


def draw(figures: Figures, on: Plan, folder: Path) -> list[Path]:
    """Write all plots as PNG; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, paint in (
        ("latency", _latency),
        ("losses", _losses),
        ("world", _world),
        ("steering", _steering),
        ("machines", _machines),
    ):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        paint(axes, figures, on)
        figure.suptitle(
            f"Simulated: {figures['sessions']:,} sessions, seed {figures['seed']}", fontsize=9
        )
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=DPI)
        plt.close(figure)
    return written


def _latency(axes: Any, figures: Figures, on: Plan) -> None:
    """The share of callers that are reached within so much."""
    for (name, trips), colour in zip(on.trips.items(), ("C2", "C0", "C3"), strict=True):
        shown = np.sort(trips)[:: max(1, len(trips) // 5_000)]
        share = np.linspace(0, 100, len(shown))
        p50, p99 = np.percentile(trips, [50, 99])
        label = f"{name}: p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        axes.plot(shown, share, color=colour, label=label, linewidth=2)
    axes.set_title("First hop: round trip from the caller to where its packets enter")
    axes.set_xlabel("round trip, ms (modelled: see `assumed` in the figures)")
    axes.set_ylabel("callers reached within it, %")
    axes.set_xlim(0, 450)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _losses(axes: Any, figures: Figures, on: Plan) -> None:
    """Datagrams lost after each event, a session that it met."""
    events = {
        f"{name} ({each['sessions']:,} sessions)": each
        for name, each in figures["routes"]["events"].items()
        if "retired" not in name
    }
    lost, transit = figures["site_lost"], figures["transit"]["lost"]
    events[f"a whole site lost: {lost['site']} ({lost['sessions']:,} sessions)"] = lost
    events[f"a cluster's relay host lost ({transit['sessions']:,} sessions)"] = transit
    for number, (name, each) in enumerate(events.items()):
        series = each["series"]
        rate = np.array([*series["lost"], 0]) / max(1, each["sessions"]) / series["bin_s"]
        at = np.arange(len(rate)) * series["bin_s"]
        p50, p99 = (each["lost_up"][q] for q in ("p50", "p99"))
        style = "-" if number < 5 else "--"
        axes.step(at, rate, style, where="post", label=f"{name}: p50 {p50:.0f}, p99 {p99:.0f} lost")
    axes.set_title("Media lost after an event (a caller sends 50 datagrams a second)")
    axes.set_xlabel("seconds after the event")
    axes.set_ylabel("datagrams lost a second and session met")
    axes.set_xlim(0, 4)
    axes.set_ylim(0, 55)
    axes.grid(alpha=0.3)
    axes.figure.legend(fontsize=7, loc="outside lower center", ncols=2)


def _world(axes: Any, figures: Figures, on: Plan) -> None:
    """Callers, sites and their load, clusters."""
    step = max(1, len(on.callers) // DOTS)
    axes.scatter(
        on.callers.longitude[::step], on.callers.latitude[::step], s=0.4, color="0.7", zorder=1
    )
    rows = figures["balance"]["sites"]
    places = np.array([globe.SITES[name] for name in rows])
    sizes = np.array([each["sessions"] for each in rows.values()])
    loads = [each["load"] for each in rows.values()]
    dots = axes.scatter(
        places[:, 1],
        places[:, 0],
        s=20 + 900 * sizes / sizes.max(),
        c=loads,
        cmap="viridis_r",
        vmin=0,
        vmax=1,
        alpha=0.85,
        edgecolors="black",
        linewidths=0.6,
        zorder=2,
        label="site (area: sessions)",
    )
    clusters = np.array([where for _, where in globe.CLUSTERS.values()])
    axes.scatter(
        clusters[:, 1], clusters[:, 0], marker="x", s=60, color="red", zorder=3, label="cluster"
    )
    for name, (latitude, longitude) in globe.SITES.items():
        axes.annotate(
            f"{name} {rows[name]['sessions']:,}",
            (longitude, latitude),
            fontsize=6,
            xytext=(5, 4),
            textcoords="offset points",
            zorder=4,
        )
    axes.figure.colorbar(dots, ax=axes, label="load: sessions over what the site is planned for")
    axes.set_title("Sessions by site; callers in grey, where internet users are")
    axes.set_xlabel("longitude, degrees")
    axes.set_ylabel("latitude, degrees")
    axes.set_xlim(-130, 170)
    axes.set_ylim(-45, 68)
    axes.legend(loc="lower left", fontsize=8)


def _steering(axes: Any, figures: Figures, on: Plan) -> None:
    """Load of the sites beside one that fails and comes back."""
    found = figures["steering"]
    for name, loads in found["load_over_time"].items():
        axes.plot(np.arange(len(loads)) * found["wave_s"], loads, label=name, linewidth=1.6)
    end = (len(loads) - 1) * found["wave_s"]
    axes.axvline(end / 2, color="0.5", linestyle=":", label="it is healthy again")
    axes.axhline(0.8, color="0.5", linestyle="--", label="steering's BUSY")
    axes.set_title(
        f"{figures['site_lost']['site']} fails at 0 s: load of those that take its calls"
    )
    axes.set_xlabel(f"seconds; every {found['wave_s']:.0f} s a share of all calls ends and begins")
    axes.set_ylabel("load: sessions over what the site is planned for")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _machines(axes: Any, figures: Figures, on: Plan) -> None:
    """Hosts of each kind."""
    found = figures["machines"]
    rows = {
        "transceivers": "transceiver_hosts",
        "cluster relays, one spare a cluster": "cluster_relay_hosts_one_spare_a_cluster",
        "entrances, for the largest site lost": "entrance_hosts_largest_site_lost",
        "entrances, one spare a site": "entrance_hosts_one_spare_a_site",
        "entrances, nothing spare": "entrance_hosts",
        "Redis processes (rate assumed)": "redis_processes",
    }
    values = [found[name] for name in rows.values()]
    bars = axes.barh(list(rows), values, color=["C1", "C0", "C2", "C2", "C2", "C3"])
    axes.bar_label(bars, labels=[f"{value:,}" for value in values], padding=4)
    axes.invert_yaxis()
    by = found["by"]
    axes.set_title(
        f"Machines: relays of {by['relay_cpus_a_host']} CPUs, transceivers of"
        f" {by['transceiver_cpus_a_host']}"
    )
    axes.set_xlabel(
        f"hosts; {by['relay_us_a_datagram']} us a datagram at a relay, {by['sessions_a_core']}"
        " sessions a core at a transceiver, as measured"
    )
    axes.set_xlim(0, max(values) * 1.12)
    axes.grid(alpha=0.3, axis="x")
