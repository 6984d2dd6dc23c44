"""What the README promises of each event, as data; what was felt of one; and whether it was kept.

What it owns: `Record`, all that was measured around one event, and `PROMISES`: the README's words,
the bound that follows from them, and a function of a record that says whether they were kept. The
words are the README's, letter by letter (tests/test_flood_chaos.py looks them up), so that neither
can change without the other.

Rules that stay true:
- Where the README says that calls lose nothing, one datagram of the stream beside them or one
  packet of one call is a broken promise. Time judges nothing there.
- Where it gives a time, that is the bound. Where it says "some packets" or nothing of time, the
  bound is one that is said here, with its reason.
- A bound of time is not judged where the machine stood still for a good part of it: that would be a
  figure of the machine. A loss is judged always.

Sans-IO.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, Any]

MOVED_MS_MAX = 200.0
"""Silence of a call that moves. "Some packets" are ten here: more is a word that is missing."""

LEASE_S_MAX = 2.0
"""The README's."""

ANNOUNCED_S_MAX = 1.0
"""The README's, from the moment at which a transceiver says that it is ready."""

PLACED_S_MAX = 5.0
"""A new call, from its offer to being connected, with all refusals that were to be repeated. The
README gives no time for it; a caller who hears nothing for so long hangs up."""

STOOD_STILL_SHARE = 0.25
"""Of a bound of time. What two processes of this tool stood still for, the parts may have, too."""


@dataclass
class Record:
    """One event and what was felt of it. Times are milliseconds unless they say otherwise."""

    event: str
    at_s: float = 0.0
    """Since the measurement began."""
    hit: str = ""
    """Which part, which call."""
    took_ms: float | None = None
    """Until what was done was done: the successor serves, say."""
    failed: str = ""
    """Why it could not be done, or what did not come of it."""
    stood_still_ms: float = 0.0
    """Longest time in which this tool itself did not run."""
    sent: int = 0
    """Datagrams of the stream in that time."""
    lost: int = 0
    """Of those."""
    held_ms: float = 0.0
    """The longest round trip of one that came back."""
    stream_silence_ms: float = 0.0
    """The longest time in which none came back."""
    calls: int = 0
    """Calls that talked and were not the event's own."""
    lost_up: int = 0
    lost_down: int = 0
    """Packets of those calls, by the transceiver's reports and by sequence numbers."""
    unknown: int = 0
    """Those of whom no transceiver reported what it lacks."""
    silence_up_ms: float = 0.0
    """Of the call that lost most: a packet lost is 20 ms."""
    silence_ms: float = 0.0
    """Of the call that heard nothing for longest."""
    ended: list[str] = field(default_factory=list)
    """Those of them that ended, failed, had to come back or fell silent, and why."""
    own: int = 0
    """Calls that the event was about: the one that moved, those of a killed transceiver."""
    own_lost_up: int = 0
    own_lost_down: int = 0
    own_silence_ms: float = 0.0
    own_ended: list[str] = field(default_factory=list)
    """Those that ended for good, or have not come back."""
    came_back: int = 0
    """Of them, with another connection, wanted or not."""
    back_ms: list[float] = field(default_factory=list)
    """From the last packet before to being connected again, each."""
    new_call_ms: float | None = None
    """From the first offer to connected, of a call that was made meanwhile; None: never."""
    new_call: str = ""
    """Why not, or how often it was refused before."""
    facts: Figures = field(default_factory=dict)
    """What else there is to say of this kind of event."""

    def row(self) -> Figures:
        """A line of the table of events: what was done, and what the stream felt."""
        return {
            "at_s": round(self.at_s, 1),
            "event": self.event,
            "hit": self.hit,
            "took_ms": _whole(self.took_ms),
            "stream_sent": self.sent,
            "stream_lost": self.lost,
            "held_ms": _whole(self.held_ms),
            "stood_still_ms": _whole(self.stood_still_ms),
            "new_call_ms": _whole(self.new_call_ms),
            "refused": self.new_call,
        }

    def row_of_others(self) -> Figures:
        """A line of the table of calls that the event was not about."""
        return {
            "at_s": round(self.at_s, 1),
            "event": self.event,
            "calls": self.calls,
            "lost_up": self.lost_up,
            "up_not_known": self.unknown,
            "lost_down": self.lost_down,
            "silent_up_ms": _whole(self.silence_up_ms),
            "silent_down_ms": _whole(self.silence_ms),
            "ended": len(self.ended),
        }

    def row_of_own(self) -> Figures:
        """A line of the table of calls that it was about."""
        return {
            "at_s": round(self.at_s, 1),
            "event": self.event,
            "calls": self.own,
            "lost_up": self.own_lost_up,
            "lost_down": self.own_lost_down,
            "silent_down_ms": _whole(self.own_silence_ms),
            "came_back": self.came_back,
            "back_ms": " ".join(str(_whole(each)) for each in self.back_ms),
            "ended": len(self.own_ended),
        }


@dataclass(frozen=True)
class Verdict:
    """Whether a promise was kept: None where it could not be judged. With the evidence."""

    kept: bool | None
    evidence: str


@dataclass(frozen=True)
class Promise:
    """A sentence of the README, or a row of one of its tables."""

    event: str
    says: str
    """Its words; the cells of a row are parted by " | "."""
    bound: str
    """What that comes to, in figures."""
    judge: Callable[[Record], Verdict]


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


# --- judging --------------------------------------------------------------------------------------


def _nothing(record: Record) -> Verdict:
    """No datagram and no packet is lost, and no call ends."""
    kept: bool | None = not (record.lost or record.lost_up or record.lost_down or record.ended)
    unknown = [f"up not known of {record.unknown}"] if record.unknown else []
    if kept and (unknown or not record.sent):
        kept = None
    evidence = (
        f"stream {record.lost} of {record.sent}; {record.calls} calls: up {record.lost_up}, "
        f"down {record.lost_down}, ended {len(record.ended)}"
    )
    return Verdict(kept, "; ".join([evidence, *unknown, *record.ended]))


def _within(record: Record, what: str, value_ms: float | None, most_ms: float) -> Verdict:
    """A time, against its bound, where the machine lets it be judged."""
    if value_ms is None:
        return Verdict(False, f"{what}: never; {record.failed}".rstrip("; "))
    evidence = f"{what} {value_ms:.0f} ms"
    if value_ms <= most_ms:
        return Verdict(True, evidence)
    if record.stood_still_ms > STOOD_STILL_SHARE * most_ms:
        return Verdict(None, f"{evidence}, but the machine stood still {record.stood_still_ms:.0f}")
    return Verdict(False, evidence)


def _both(*found: Verdict) -> Verdict:
    """All of them: broken if one is, else not judged if one is not."""
    words = "; ".join(each.evidence for each in found)
    if any(each.kept is False for each in found):
        return Verdict(False, words)
    return Verdict(None if any(each.kept is None for each in found) else True, words)


def _placed(record: Record) -> Verdict:
    if record.new_call_ms is None:
        return Verdict(False, f"no new call: {record.new_call or 'none was made'}")
    return _within(record, "a new call after", record.new_call_ms, PLACED_S_MAX * 1000)


def _moved(record: Record) -> Verdict:
    """The call that moved goes on by itself, and nobody else notices."""
    if not record.own:
        return Verdict(None, record.failed or "no call was there to move")
    went_on = not record.own_ended and not record.came_back
    evidence = (
        f"up {record.own_lost_up}, down {record.own_lost_down}"
        + ("" if went_on else "; it did not go on by itself")
        + "".join(f"; {each}" for each in record.own_ended)
    )
    silence = _within(record, "silence", record.own_silence_ms, MOVED_MS_MAX)
    return _both(Verdict(went_on, evidence), silence, _nothing(record))


def _fact(record: Record, name: str, wanted: object, words: str) -> Verdict:
    if name not in record.facts:
        return Verdict(False, record.failed or f"{words}: not seen")
    found = record.facts[name]
    return Verdict(found == wanted, f"{words}: {found}")


def _lease(record: Record) -> Verdict:
    value = record.facts.get("lease_ms")
    return _within(record, "the lease ended after", value, LEASE_S_MAX * 1000)


def _resumed(record: Record) -> Verdict:
    """Every call of the transceiver that died goes on elsewhere, with what was said."""
    if not record.own:
        return Verdict(None, "it had no call")
    facts = record.facts
    whole = record.own == record.came_back == facts.get("resumed") == facts.get("elsewhere")
    kept = facts.get("items_kept", [])
    evidence = (
        f"{record.came_back} of {record.own} came back, {facts.get('resumed', 0)} with their "
        f"conversation, {facts.get('elsewhere', 0)} elsewhere; items kept: "
        f"{' '.join(map(str, kept)) or 'none'}"
    )
    words = "; ".join([evidence, *record.own_ended])
    return Verdict(whole and all(kept) and not record.own_ended, words)


def _announced(record: Record) -> Verdict:
    facts, most_ms = record.facts, ANNOUNCED_S_MAX * 1000
    return _both(
        _within(record, "known to signaling after", facts.get("announced_ms"), most_ms),
        _within(record, "got a call after", facts.get("got_a_call_ms"), most_ms),
    )


def _lost_redis(record: Record) -> Verdict:
    back = _fact(record, "known_again", True, "relay and transceivers found it again")
    return _both(_nothing(record), back)


PROMISES = (
    Promise(
        "worker",
        "kill a worker, or it dies | the next one takes over its sockets, its flows and the very "
        "batch it had in hand | nothing",
        "nothing is lost, no call ends",
        _nothing,
    ),
    Promise(
        "restart",
        "also to another version | sockets and flows wait in systemd's descriptor store | nothing",
        "nothing is lost, no call ends",
        _nothing,
    ),
    Promise(
        "crash",
        "sockets and flows wait in systemd's descriptor store | nothing",
        "the control, in which there is no such store: this is to be broken",
        _nothing,
    ),
    Promise(
        "handover",
        "where there is no systemd | a new process takes both from the one that runs, which ends "
        "| nothing",
        "nothing is lost, no call ends",
        _nothing,
    ),
    Promise(
        "reload",
        "keys and settings anew | workers are replaced one after the other; what needs a restart "
        "is named in the log | nothing",
        "nothing is lost, no call ends; the setting is named",
        lambda record: _both(
            _nothing(record), _fact(record, "named", True, "what needs a restart is named")
        ),
    ),
    Promise(
        "port",
        "let a client's NAT give it another port | its media finds its flow by its SSRC, without "
        "the client's doing | some packets",
        f"goes on, silent for {MOVED_MS_MAX:g} ms at most; others lose nothing",
        _moved,
    ),
    Promise(
        "address",
        "a relay that holds no state that a call would miss",
        f"goes on after one check, silent for {MOVED_MS_MAX:g} ms at most; others lose nothing",
        _moved,
    ),
    Promise(
        "redis",
        "lose Redis | media goes on; relays that get each other's clients wait for the next STUN "
        "until it is back | nothing",
        "nothing is lost, no call ends; all find it again",
        _lost_redis,
    ),
    Promise(
        "redis",
        "lose Redis | calls go on and are placed by what was known last",
        f"a new call is connected within {PLACED_S_MAX:g} s while it is away",
        _placed,
    ),
    Promise(
        "transceiver",
        "kill a transceiver, or lose it | its lease in Redis ends within 2 s",
        f"the lease ends within {LEASE_S_MAX:g} s",
        _lease,
    ),
    Promise(
        "transceiver",
        "clients that post again with `resume=` (the demo page does so by itself) go on elsewhere "
        "with the conversation so far",
        "all of its calls, elsewhere, with items of theirs",
        _resumed,
    ),
    Promise(
        "transceiver",
        "kill a transceiver, or lose it",
        "its own calls notice, others lose nothing; a new call is connected meanwhile",
        lambda record: _both(_nothing(record), _placed(record)),
    ),
    Promise(
        "transceiver",
        "start another transceiver | it announces itself and gets calls within a second",
        f"it gets a call within {ANNOUNCED_S_MAX:g} s of being ready",
        _announced,
    ),
    Promise(
        "signaling",
        "kill signaling, restart it, add an instance | calls do not notice",
        "nothing is lost, no call ends; a new call is connected by the next one",
        lambda record: _both(_nothing(record), _placed(record)),
    ),
    Promise(
        "signaling",
        "a call's id leads any instance to its transceiver",
        "a call from before is hung up through it",
        lambda record: _fact(record, "hung_up", True, "hung up"),
    ),
    Promise(
        "settings",
        "keys, limits and certificate anew; a file that is broken changes nothing and is named in "
        "the log",
        "named; nothing is lost; a new call is connected meanwhile",
        lambda record: _both(
            _fact(record, "named", True, "named"), _nothing(record), _placed(record)
        ),
    ),
)
"""In the order of the README's tables."""

LAW = "Received = forwarded + recovered + waiting + dropped by reason: nothing disappears"
"""The README's, of the whole run."""


def judged(records: list[Record]) -> list[Figures]:
    """A row for each event and each promise about it."""
    rows = []
    for record in records:
        for promise in PROMISES:
            if record.event == promise.event:
                verdict = promise.judge(record)
                if record.failed and verdict.kept:
                    verdict = Verdict(False, f"{verdict.evidence}; {record.failed}")
                rows.append(row(record.event, record.at_s, promise.bound, promise.says, verdict))
    return rows


KEPT, BROKEN, NOT_JUDGED = "kept", "BROKEN", "not judged"


def row(event: str, at_s: float | None, bound: str, says: str, verdict: Verdict) -> Figures:
    """A line of the table of promises."""
    words = {True: KEPT, False: BROKEN, None: NOT_JUDGED}
    return {
        "at_s": "all" if at_s is None else round(at_s, 1),
        "event": event,
        "verdict": words[verdict.kept],
        "promise": bound,
        "evidence": verdict.evidence,
        "readme": says,
    }
