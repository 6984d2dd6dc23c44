"""Phases: what live calls felt while the relay was attacked, against the quiet before and after.

For flood.py attack. A run is quiet, attack, quiet, attack, …, quiet, all of the same length, so
that each attack has a quiet phase on either side. Between two phases lies `SETTLE_S`, which belongs
to neither: what was on its way arrives, and the transceivers' reports of what they lack (RTCP, one
a second) cover one phase alone.

The rule by which a loss is judged: live flows come first (ARCHITECTURE.md "Rules of the relay"), so
while a relay has CPU left an attack costs calls nothing. Calls may lose as much as in the worse of
the two quiet phases, and `LOSS_MAX` of their packets more. What the kernel dropped stands beside
it: where the relay's sockets overflow, there was no CPU left.
A call to which nothing comes any more at the end of a phase is a failure whatever was lost; a new
call that does not connect, in whatever phase, is one, too.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onlooker
from findings import Figures, Finding
from heard import GONE_MS
from ring import Call

SETTLE_S = 1.3
"""Between two phases: a report a second, and some more for it to come."""

LOSS_MAX = 0.001
"""Of packets: what the relay's own tests allow in a flood, on a machine that does other things."""

SILENCE_MORE_MS = 100.0
"""Beyond that a longer silence than in the quiet is worth a note; no failure, since the calls share
their CPUs with the attackers here."""

ARRIVED_MIN = 0.5
"""Of what is sent: a network may lose some, and a relay that is another one gets nothing."""

PACKETS_PER_S = 50
"""Of a call, each way."""

CPUS = os.cpu_count() or 1

EVERY = -1.0
"""`Call.gaps_ms` over this: all of them, those of no length, too."""


@dataclass
class Felt:
    """What the live calls felt in a phase."""

    received: int
    """Packets that came down."""
    lost_down: int
    lost_up: int | None
    """None without reports from the other side."""
    silence_ms: float
    """The longest, of all calls."""
    gap_p99_ms: float
    """Of all calls' gaps: how much later than due a packet came."""
    silent: list[str]
    """Calls to which nothing came any more when it ended."""
    ended: list[str]
    """Calls that ended in it or right behind it, and why: none was told to."""

    @property
    def lost(self) -> int:
        """Either way."""
        return self.lost_down + (self.lost_up or 0)


def felt(calls: Sequence[Call], since_ns: int, until_ns: int) -> Felt:
    """What these calls felt between two moments of time.monotonic_ns()."""
    up = [call.lost_up(since_ns, until_ns) for call in calls]
    known = [each for each in up if each is not None]
    gaps = [gap for call in calls for gap in call.gaps_ms(since_ns, until_ns, over_ms=EVERY)]
    ended = [
        f"call {call.number}, {call.failure or call.state}{f': {call.why}' if call.why else ''}"
        for call in calls
        if call.ended_ns is not None and since_ns <= call.ended_ns < until_ns + SETTLE_S * 1e9
    ]
    silent_ms = {call.number: call.silent_ms(since_ns, until_ns) for call in calls}
    return Felt(
        received=sum(call.received(since_ns, until_ns) for call in calls),
        lost_down=sum(call.lost_down(since_ns, until_ns) for call in calls),
        lost_up=sum(known) if known else None,
        silence_ms=max((call.silence_ms(since_ns, until_ns) for call in calls), default=0.0),
        gap_p99_ms=float(np.percentile(gaps, 99)) if gaps else 0.0,
        silent=[
            f"call {number}, for {ms:.0f} ms" for number, ms in silent_ms.items() if ms > GONE_MS
        ],
        ended=ended,
    )


@dataclass
class Phase:
    """A stretch of the run: quiet, or an attack."""

    name: str
    """Of the attack; `quiet` without one."""
    since_ns: int = 0
    until_ns: int = 0
    sent: Figures = field(default_factory=dict)
    """The attackers' account (attackers.Band.run)."""
    back: Figures = field(default_factory=dict)
    """What came for these attackers until the end of the run (attackers.Squad.account)."""
    before: onlooker.Counted = field(default_factory=onlooker.Counted)
    after: onlooker.Counted = field(default_factory=onlooker.Counted)
    off: int = 0
    """Datagrams in no counter at the end."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    octets: int = 0
    """Memory of the relay at the end."""
    idle_s: float = 0.0
    """Processor time that nobody on this machine used."""
    late_ms: Sequence[float] = ()
    """How late the live calls' own packets left: this tool's part."""
    newcomer_ms: float | None = None
    """How long a new call took from its offer until it was connected; None if it did not."""
    newcomer_why: str = ""
    felt: Felt | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.until_ns - self.since_ns) / 1e9

    def begin(self) -> None:
        """Now."""
        self.since_ns = time.monotonic_ns()

    def end(self) -> None:
        """Now."""
        self.until_ns = time.monotonic_ns()

    def counted(self, name: str) -> int:
        """By how much a counter of the relay grew."""
        return self.after[name] - self.before[name]

    def row(self) -> Figures:
        """What the live calls felt in it."""
        felt = self.felt
        assert felt is not None  # the run is over
        return {
            "phase": self.name,
            "received": felt.received,
            "lost_down": felt.lost_down,
            "lost_up": felt.lost_up,
            "silence_ms_max": round(felt.silence_ms, 1),
            "gap_ms_p99": round(felt.gap_p99_ms, 1),
            "silent_at_its_end": len(felt.silent),
            "ended": len(felt.ended),
            "new_call_ms": self.newcomer_ms and round(self.newcomer_ms),
            "own_late_ms_p99": round(float(np.percentile(self.late_ms, 99)), 1)
            if len(self.late_ms)
            else None,
            "machine_idle_percent": round(100 * self.idle_s / self.seconds / CPUS),
        }

    def cpu_percent(self, name: str) -> float | None:
        """CPU of a program, of one core; None where it is not known."""
        if name not in self.cpu_s:
            return None
        return round(100 * self.cpu_s[name] / self.seconds, 1)


@dataclass
class Round:
    """An attack between two quiet phases."""

    attack: Phase
    quiet: tuple[Phase, Phase]
    answers: frozenset[str]
    """Kinds of datagrams that attackers may be sent."""
    why: str = ""
    """Why they may."""

    @property
    def forged(self) -> bool:
        """It was sent in the name of live calls, who get what comes back: what that was is not
        known."""
        return bool(self.attack.sent.get("forged"))

    def sent(self) -> Figures:
        """Row: what the attackers sent, and what they got, None where that is not known."""
        sent, back = self.attack.sent, self.attack.back
        share = round(back["octets"] / max(1, sent["octets"]), 6)
        return {
            "attack": self.attack.name,
            "sent": sent["sent"],
            "per_s": round(sent["sent"] / sent["seconds"]),
            "octets": sent["octets"],
            "left_out": sent["skipped"] + sent["refused"],
            "back": None if self.forged else back["datagrams"],
            "back_octets": None if self.forged else back["octets"],
            "amplification": None if self.forged else share,
            "attackers_cpu_percent": round(100 * sent["cpu_s"] / sent["seconds"], 1),
        }

    def relay(self, programs: Sequence[str]) -> Figures:
        """Row: what the relay counted, and what it cost, beside the costs of the quiet before."""
        phase, quiet = self.attack, self.quiet[0]
        row: Figures = {"attack": phase.name}
        if phase.after:
            row |= {
                "received": phase.counted("inbound_received"),
                "forwarded": phase.counted("inbound_forwarded"),
                "recovered": phase.counted("inbound_recovered"),
                "dropped": sum(self.drops().values()),
                "in_no_counter": phase.off,
                "kernel_dropped": phase.counted("socket_public_dropped"),
                "flows_tentative": phase.after["worker_flows_tentative"],
                "looked_up": phase.counted("keeper_lookups"),
            }
        for name in programs:
            row[f"{name}_cpu_percent"] = phase.cpu_percent(name)
            row[f"{name}_cpu_percent_quiet"] = quiet.cpu_percent(name)
        if phase.octets:
            row |= {"mib": round(phase.octets / 2**20, 1), "mib_quiet": _mib(quiet.octets)}
        return row

    def drops(self) -> dict[str, int]:
        """What the relay dropped in the attack, by reason."""
        return onlooker.drops(self.attack.before, self.attack.after)

    def judge(self, finding: Finding, calls: int) -> None:
        """Note what had to hold and did not."""
        self._judge_calls(finding, calls)
        self._judge_newcomers(finding)
        self._judge_answers(finding)
        name, sent = self.attack.name, self.attack.sent
        arrived = self.attack.counted("inbound_received") + self.attack.counted(
            "socket_public_dropped"
        )
        finding.must(
            not self.attack.after or arrived >= sent["sent"] * ARRIVED_MIN,
            f"{name}: of {sent['sent']} datagrams {arrived} arrived at the relay whose metrics are"
            " read: is it the one that is attacked?",
        )
        finding.must(
            not self.attack.off,
            f"{name}: the law does not hold: {self.attack.off} datagrams are in no counter",
        )

    def _judge_answers(self, finding: Finding) -> None:
        name, back, sent = self.attack.name, self.attack.back, self.attack.sent
        if self.forged:
            finding.notes.append(
                f"{name}: what was answered went to the live calls, in whose name it was sent: how"
                " much that was is not known, and not judged."
            )
            return
        more = {kind: n for kind, n in back["kinds"].items() if kind not in self.answers}
        finding.must(not more, f"{name}: the attackers were sent {more}")
        if back["datagrams"] and not more:
            finding.notes.append(f"{name}: attackers were answered, as {self.why}.")
        finding.must(
            back["octets"] <= sent["octets"],
            f"{name}: {back['octets']} octets went back for {sent['octets']} that were sent",
        )

    def _judge_newcomers(self, finding: Finding) -> None:
        name, (before, behind) = self.attack.name, self.quiet
        for phase, when in ((self.attack, "during the attack"), (behind, "in the quiet behind it")):
            finding.must(
                phase.newcomer_ms is not None,
                f"{name}: a new call did not connect {when}: {phase.newcomer_why}"
                + ("; nor did one in the quiet before it" if before.newcomer_ms is None else ""),
            )

    def _judge_calls(self, finding: Finding, calls: int) -> None:
        name, felt = self.attack.name, self.attack.felt
        quiet = [phase.felt.lost for phase in self.quiet if phase.felt is not None]
        assert felt is not None  # the run is over
        for phase in (self.attack, self.quiet[1]):
            for each in phase.felt.ended if phase.felt else ():
                when = "" if phase is self.attack else " in the quiet behind it"
                finding.must(False, f"{name}: a live call ended{when}: {each}")
            for each in phase.felt.silent if phase.felt else ():
                when = "it" if phase is self.attack else "the quiet behind it"
                finding.must(False, f"{name}: a live call was silent as {when} ended: {each}")
        packets = 2 * calls * PACKETS_PER_S * self.attack.seconds
        allowed = max(quiet, default=0) + LOSS_MAX * packets
        dropped = self.attack.counted("socket_public_dropped")
        finding.must(
            felt.lost <= allowed,
            f"{name}: live calls lost {felt.lost} packets, and {quiet} in the quiet phases beside"
            f" it; the kernel dropped {dropped} datagrams for which the relay had no time",
        )
        silence = max((phase.felt.silence_ms for phase in self.quiet if phase.felt), default=0.0)
        if felt.silence_ms > silence + SILENCE_MORE_MS:
            finding.notes.append(
                f"{name}: the longest silence was {felt.silence_ms:.0f} ms, and {silence:.0f} ms in"
                " the quiet beside it. `own_late_ms_p99` and `machine_idle_percent` say whether"
                " this machine had the CPU for its calls."
            )


def _mib(octets: int) -> Any:
    return round(octets / 2**20, 1)
