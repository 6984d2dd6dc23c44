"""The claims of a public table of ways in, each answered by the figures of one run.

OpenAI's description of its voice service ("How OpenAI delivers low-latency voice AI at scale", May
2026, https://openai.com/index/delivering-low-latency-voice-ai-at-scale) compares four ways of
getting media to the process that owns a session: a unique IP:port per session, a unique IP:port per
server, TURN relays, and stateless forwarders before stateful terminators. For each it has pros and
cons. Those that a figure can answer are here, in short words; those that none can (a poor fit for
Kubernetes, policy in one place) are not.

Whether a claim holds is computed, and the sentence beside it is made of the same figures. Without
the figures, since a way was not measured, it says so.
"""

from collections.abc import Callable
from typing import Any

from doors import NAMES, Way
from turning import CHANNEL_OCTETS

import frame

Figures = dict[str, Any]
Verdict = tuple[bool | None, str]
"""Whether a claim holds, None if the figures do not say; and the sentence."""

WORDS = {True: "holds", False: "does not hold", None: "not to be told from noise"}

HALF = 0.5
"""Round trips: less is the machine's time, not the network's."""


class _Missing(Exception):
    """A way that the claim is about was not measured."""


class _Rows:
    """The tables of a run, by way."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def __call__(self, table: str, way: Way, what: str = "") -> Figures:
        """The row of a table for a way. Raises _Missing."""
        for row in self._figures.get(table, []):
            if row["way"] == NAMES[way] and row.get("killed", "") in ("", what):
                found: Figures = row
                return found
        raise _Missing


def _adds(rows: _Rows, way: Way) -> tuple[bool | None, Figures]:
    """Whether a way takes longer than the straight one, and its row. Raises _Missing."""
    rows("delay", Way.SESSION)  # what is added is added to this one's
    row = rows("delay", way)
    apart = row.get("added_p50_us_apart")
    clear = apart is None or abs(row["added_p50_us"]) > apart
    return (row["added_p50_us"] > 0 if clear else None), row


def _direct(rows: _Rows) -> Verdict:
    longer, relay = _adds(rows, Way.RELAY)
    straight = rows("delay", Way.SESSION)
    return longer, (
        f"nothing is in front of it; a check comes back after {straight['trip_p50_us']} us, through"
        f" the relay after {relay['trip_p50_us']} us"
    )


def _a_port_each(rows: _Rows) -> Verdict:
    row = rows("ports", Way.SESSION)
    return row["sent_to"] >= row["calls"], (
        f"{row['calls']} calls went to {row['sent_to']} public ports; 100,000 would take"
        f" {row['ports_at_100000']:,} on {row['addresses_at_100000']} address(es)"
    )


def _fewer_ports(rows: _Rows) -> Verdict:
    row = rows("ports", Way.SERVER)
    return row["sent_to"] < row["calls"] or row["calls"] == 1, (
        f"{row['calls']} calls went to {row['sent_to']} public port; 100,000 would take a public"
        f" address and port for each of {row['ports_at_100000']:,} server processes"
    )


def _wrong_instance(rows: _Rows) -> Verdict:
    bare = rows("two_servers_behind_one_address", Way.SERVER)
    sentence = (
        f"of {bare['calls']} calls to two servers behind one address {bare['connected']} connected"
    )
    try:
        relay = rows("two_servers_behind_one_address", Way.RELAY)
        sentence += f"; through the relay {relay['connected']} of {relay['calls']}"
    except _Missing:
        pass
    return bare["connected"] < bare["calls"], sentence


def _one_address(rows: _Rows) -> Verdict:
    row = rows("ports", Way.TURN)
    return row["sent_to"] == 1, (
        f"{row['calls']} calls went to {row['sent_to']} port; {row['open']} UDP ports were open"
        " at the TURN server, one for each call towards the servers"
    )


def _allocations(rows: _Rows) -> Verdict:
    turn, straight = rows("set_up", Way.TURN), rows("set_up", Way.SERVER)
    more = turn["round_trips"] - straight["round_trips"]
    return more >= HALF, (
        f"from the first packet to connected {turn['round_trips']} round trips instead of"
        f" {straight['round_trips']}: {more:+.1f}, of which {turn['before_ms']} ms are spent before"
        " there is an offer"
    )


def _hard_to_recover(rows: _Rows) -> Verdict:
    row = rows("killed", Way.TURN, "turnserver")
    back = row["again_ms"]
    return row["survived"] < row["calls"], (
        f"of {row['calls']} calls {row['survived']} went on by themselves when the TURN server was"
        f" killed and started again, in {row['watched_s']} s"
        + (f"; with a new allocation a check is answered in {back} ms" if back is not None else "")
    )


def _small(rows: _Rows) -> Verdict:
    row = rows("ports", Way.RELAY)
    return row["sent_to"] == 1, (
        f"{row['calls']} calls went to {row['sent_to']} public port, as 100,000 would"
    )


def _owned(rows: _Rows) -> Verdict:
    relay, bare = rows("set_up", Way.RELAY), rows("set_up", Way.SERVER)
    more = relay["round_trips"] - bare["round_trips"]
    killed = rows("killed", Way.RELAY, "the whole relay")
    worker = rows("killed", Way.RELAY, "a worker")
    silence = killed["silence_p50_ms"]
    return more < HALF and killed["survived"] == killed["calls"], (
        f"a call takes {relay['round_trips']} round trips, without a relay {bare['round_trips']};"
        f" {killed['survived']} of {killed['calls']} calls outlived the whole relay (down for"
        f" {killed['down_ms']} ms, silent for {silence} ms); with a worker killed"
        f" {worker['survived']} of {worker['calls']} went on, {worker['lost']} packets lost"
    )


def _another_hop(rows: _Rows) -> Verdict:
    longer, added = _adds(rows, Way.RELAY)
    spent, turn = rows("traffic", Way.RELAY)["front_cpu_ms"], ""
    try:
        row, cpu = rows("delay", Way.TURN), rows("traffic", Way.TURN)["front_cpu_ms"]
        turn = f"; TURN adds {row['added_p50_us']} us and {cpu} ms"
    except _Missing:
        pass
    return longer, (
        f"it adds {added['added_p50_us']} us there and back (p50), {added['added_p99_us']} us"
        f" (p99), and {spent} ms of CPU a call and second{turn}"
    )


def _coordination(rows: _Rows) -> Verdict:
    table = "two_servers_behind_one_address"
    bare, relay = rows(table, Way.SERVER), rows(table, Way.RELAY)
    more = rows("set_up", Way.RELAY)["round_trips"] - rows("set_up", Way.SERVER)["round_trips"]
    return relay["connected"] / relay["calls"] > bare["connected"] / bare["calls"], (
        f"without it {bare['connected']} of {bare['calls']} calls find their server, with it"
        f" {relay['connected']} of {relay['calls']}; it is a hint in the ufrag ({more:+.1f} round"
        f" trips) and {frame.HEADER_OCTETS} octets a datagram inside (TURN: {CHANNEL_OCTETS} on the"
        " client's side)"
    )


_ANSWERS: list[tuple[Way, str, str, Callable[[_Rows], Verdict]]] = [
    (Way.SESSION, "pro", "a direct path, no forwarding layer in it", _direct),
    (Way.SESSION, "con", "one public UDP port for each session", _a_port_each),
    (Way.SERVER, "pro", "a much smaller public UDP footprint", _fewer_ports),
    (Way.SERVER, "con", "the first packet can land on the wrong instance", _wrong_instance),
    (Way.TURN, "pro", "clients need to reach one address and port", _one_address),
    (Way.TURN, "con", "allocations add round trips to the set-up", _allocations),
    (Way.TURN, "con", "allocations are difficult to recover", _hard_to_recover),
    (Way.RELAY, "pro", "a small public UDP footprint", _small),
    (Way.RELAY, "pro", "the transceiver still owns the whole session", _owned),
    (Way.RELAY, "con", "one forwarding hop more", _another_hop),
    (Way.RELAY, "con", "coordination between relay and transceiver", _coordination),
]


def answers(figures: Figures) -> dict[str, dict[str, str]]:
    """By way and claim: whether it holds here, and by which figures."""
    rows, found = _Rows(figures), dict[str, dict[str, str]]()
    for way, side, claim, judge in _ANSWERS:
        try:
            holds, sentence = judge(rows)
            answer = f"{WORDS[holds]}: {sentence}"
        except _Missing:
            answer = "not measured"
        found.setdefault(NAMES[way], {})[f"{side}, {claim}"] = answer
    return found
