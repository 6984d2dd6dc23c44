"""How punctual the laboratory's world is, and what the Global Relay changes in it.

For lab.py. `path` sends probes through the world without any program of ours; `ways` makes calls
from each region by the nearest site and the backbone, and beside each of them calls straight to a
relay of the owning cluster over the public internet.
"""

import socket
import statistics
import struct
import time
from typing import Any

import delays
import hearing
from estate import Estate, Lab

Figures = dict[str, Any]

PROBE_DELAY_S = 0.05
PROBES = 160
"""Octets of a probe: a packet of audio."""

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")


def path(lab: Lab) -> Figures:
    """How much later than it should a packet comes, by the kernel's time of arrival."""
    rows = []
    for rate in (500,) if lab.quick else (500, 2_000, 5_000):
        with delays.Fabric(lambda *_: lambda _: PROBE_DELAY_S, lab.cpus[-1], lab.seed) as fabric:
            here, there = fabric.host("here", "198.51.100.1"), fabric.host("there", "203.0.113.1")
            fabric.start()
            found = _probe(here, there, rate, 0.5 if lab.quick else 3.0)
            report = fabric.report()
        lab.must(len(found[1]) == found[0], f"of {found[0]} packets {len(found[1])} came")
        late = sorted(found[1])
        rows.append(
            {
                "packets_per_s": rate,
                "late_p50_ms": round(late[len(late) // 2], 3),
                "late_p99_ms": round(late[len(late) * 99 // 100], 3),
                "latest_ms": round(late[-1], 3),
                "router_late_p99_ms": report.late_ms["p99"],
                "router_cpu": report.cpu_share,
            }
        )
        lab.say(f"{rate} packets a second: p99 {rows[-1]['late_p99_ms']} ms late")
    return {"rates": rows}


def _probe(
    here: delays.Host, there: delays.Host, rate: int, seconds: float
) -> tuple[int, list[float]]:
    """How many were sent, and how late in milliseconds those were that came."""
    with here.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with there.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((there.addresses[0], 9))
    late: list[float] = []

    def drain() -> None:
        while True:
            try:
                datagram, ancillary, _, _ = receiver.recvmsg(2048, 64)
            except BlockingIOError:
                return
            at_s, at_ns = _TIMESPEC.unpack(ancillary[0][2])
            (left,) = struct.unpack_from("d", datagram)
            late.append((at_s + at_ns * 1e-9 - left - PROBE_DELAY_S) * 1e3)

    with sender, receiver:
        receiver.setblocking(False)
        receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        begun, sent = time.monotonic(), 0
        while (now := time.monotonic() - begun) < seconds:
            while sent < now * rate:
                sender.sendto(struct.pack("d", time.time()).ljust(PROBES), (there.addresses[0], 9))
                sent += 1
            drain()
            time.sleep(0.0005)
        time.sleep(PROBE_DELAY_S * 3)
        drain()
    return sent, late


# --- with and without -----------------------------------------------------------------------------


def ways(lab: Lab) -> Figures:
    """Each region, by its nearest site and straight to the cluster; medians of some calls."""
    rows, estate = [], lab.estate()
    estate.fabric.report()
    browsers = [] if lab.quick else [f"{region}/chromium" for region in lab.plan.browsers]
    for name in (*lab.plan.callers, *browsers):
        by_site = _way(lab, estate, name, None)
        plainly = _way(lab, estate, name, by_site["cluster"])
        near = estate.nearest(name.partition("/")[0]).id
        rows += [by_site | {"cluster_nearest_by_time": near}, plainly]
        lab.say(f"{name}: {by_site['end_to_end_ms']} ms, {plainly['end_to_end_ms']} without")
    return {
        "rows": rows,
        "gain": _gain(rows),
        "router": vars(estate.fabric.report()),
        "words": WORDS,
    }


def _way(lab: Lab, estate: Estate, name: str, straight_to: int | None) -> Figures:
    """The medians of some calls."""
    calls = [_set_up(estate, name, straight_to) for _ in range(1 if lab.quick else 3)]
    row: Figures = {"caller": name, "way": "global" if straight_to is None else "public"}
    for figure, first in calls[0].items():
        values = [call[figure] for call in calls if call[figure] is not None]
        timed = figure.endswith("_ms") and values
        row[figure] = round(statistics.median(values), 1) if timed else first
    return row


WORDS = {
    "first_hop_ms": "ICMP echo to where the call enters: its host, none of its programs",
    "end_to_end_ms": "STUN check on the call's own path, answered by the transceiver; of Chromium"
    " the one that it has made last",
    "answered_ms": "POST to answer in hand, a fresh TCP connection included, without TLS, over the"
    " public internet: `global` asks the signaling of the cluster nearest by time, `public` that of"
    " the owning cluster",
    "connected_ms": "answer in hand to ICE and DTLS connected, as the client sees it",
    "first_audio_ms": "POST to the server's first RTP on the caller's link",
}


def _set_up(estate: Estate, name: str, straight_to: int | None) -> Figures:
    """One call and its figures."""
    voice, fabric, region = estate.voices[name], estate.fabric, name.partition("/")[0]
    url = estate.door(estate.nearest(region))
    if straight_to is not None:
        url = estate.door(estate.clusters[straight_to], plain=True)
    fabric.watch()
    call = voice.ask("call", url=url, key=estate.key, headers=estate.headers(region))
    checks = voice.ask("checks", count=5)
    call["by"] = voice.ask("state")["by"]  # a browser may have chosen another one since
    echoes = estate.voices[region].ask("echo", to=call["by"], count=5)
    seen = fabric.seen()
    first = hearing.first_after(seen, "received", name, call["posted"])
    heard = [each.host for each in seen if each.point == "heard" and each.at >= call["answered"]]
    voice.ask("hangup")
    owner = int(heard[-1].rpartition("-")[2]) if heard else None
    return {
        "cluster": owner,
        "told": [estate.host_of(each) for each in call["relays"]],
        "enters_at": estate.host_of(call["by"]),
        "first_hop_ms": statistics.median(echoes) if echoes else None,
        "end_to_end_ms": statistics.median(checks),
        "answered_ms": (call["answered"] - call["posted"]) * 1e3,
        "connected_ms": (call["connected"] - call["answered"]) * 1e3,
        "first_audio_ms": None if first is None else (first - call["posted"]) * 1e3,
    }


def _gain(rows: list[Figures]) -> list[Figures]:
    """What the Global Relay changes for each region."""
    found = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        found.append(
            {
                "caller": one["caller"],
                **{
                    f"{name}_less": round(other[name] - one[name], 1)
                    for name in ("first_hop_ms", "end_to_end_ms", "connected_ms", "first_audio_ms")
                    if None not in (one[name], other[name])
                },
            }
        )
    return found


PARTS = {"path": path, "ways": ways}
