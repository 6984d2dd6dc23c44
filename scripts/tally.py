"""What many calls were like: figures, distributions and lines of flood.py calls.

What it owns: the definitions of what is printed, each in one place.

    answer              offer posted to answer in hand
    ice, connected      to the first check answered; to DTLS done, so that both can speak
    first audio         to the first packet of audio, which may be silence that opens the line
    channel, session    to the data channel; to session.created on it
    reply               last packet of speech sent to first packet of the reply, less the silence
                        that ends a turn
    interruption        first packet of speech sent into a reply to its last packet with sound
    gap                 more than 40 ms in which something should have been heard and was not

All set-up times are since the offer was posted. How far two runs may lie apart is intervals.py's,
with the calls dealt out to up to ROUNDS_MAX groups.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import intervals
import numpy as np
import speaking
from check import CORRELATION_MIN
from findings import Figures, Finding, Marker, Series, Spread
from ring import Call
from ringing import Ringing
from saying import Said

if TYPE_CHECKING:
    from dialling import Beside, Plan

SET_UP = {
    "answer": "answered",
    "ice": "checked",
    "connected": "connected",
    "first audio": "first_audio",
    "channel": "opened",
    "session": "session.created",
}
"""What is printed, and the moment of a call that it is."""

ROUNDS_MAX, ROUND_MIN = 30, 5
"""Groups of calls, and calls in a group: fewer have no median worth the name."""

Measure = Callable[[Call], list[float]]

GAP_MS = 40.0
ONSET_MS = 40
"""From the first to the last of the packets that the parrot's detector needs."""

LATE_MS = 5.0
"""Of this tool's own packets: a quarter of what is between two."""

MARKERS_MAX = 40

WHOLE_S = 7.0
"""A call that talks for so long and interrupts nobody has heard a whole reply: 3.2 s until that
begins, 3 s of it, and some more for a machine that is busy."""


def finding(plan: "Plan", ringing: Ringing, beside: "Beside") -> Finding:
    """All there is to say."""
    found = Finding(f"Complete calls, {plan.rate:g} a second for {plan.seconds:g} s")
    made = ringing.calls
    figures = found.figures
    figures["target"] = plan.page
    figures["calls"] = _counts(made, ringing)
    figures["set_up_ms"] = [_row(name, made, of, len(SET_UP)) for name, of in _set_up()]
    figures["conversation_ms"] = [_row(name, made, of, len(TALKING)) for name, of in TALKING]
    gaps = [gap for call in made for gap in _gaps(call)]
    figures["turns"] = _turns(made, beside.ended_ns)
    figures["errors"] = _errors(made)
    figures["audio"] = _audio(made, gaps)
    if plan.compare:
        figures["replies_compared"] = _compared(made)
    figures["tool"] = _tool(ringing, beside)
    if beside.server_cpu:
        figures["server_cpu_percent"] = {
            name: round(float(np.mean(values)), 1) for name, values in beside.server_cpu.items()
        }
    for plot, measures in (("Set-up", _set_up()), ("Conversation", TALKING)):
        for name, of in measures:
            values = [value for call in made for value in of(call)]
            found.spreads.append(Spread(plot, name, "ms", values))
    found.series += _lines(made, beside)
    found.markers += _markers(made, beside)
    _judge(found, plan, made)
    _explain(found, plan, ringing)
    return found


# --- figures --------------------------------------------------------------------------------------


def _counts(made: Sequence[Call], ringing: Ringing) -> Figures:
    failed = Counter(call.failure for call in made if call.failure)
    return {
        "offered": len(made),
        "answered": sum("answered" in call.moments for call in made),
        "connected": sum("connected" in call.moments for call in made),
        "answered_by_speech": sum("first_reply" in call.moments for call in made),
        "failed": sum(failed.values()),
        "failed_by_reason": dict(failed.most_common()),
        "not_made": ringing.refused,
        "most_at_once": _most_at_once(made),
    }


def _row(name: str, made: Sequence[Call], of: Measure, figures: int) -> Figures:
    """A distribution as a row of a table."""
    each = [found for call in made if (found := of(call))]
    if not each:
        return {"what": name, "count": 0}
    values = [value for found in each for value in found]
    p50, p90, p99, most = (float(at) for at in np.percentile(values, (50, 90, 99, 100)))
    # Whole calls are dealt out, like cards: replies to one call are alike, and how many calls there
    # are at once changes over a run, in the next one as well.
    rounds = min(ROUNDS_MAX, len(each) // ROUND_MIN)
    medians = [float(np.median(np.concatenate(each[at::rounds]))) for at in range(rounds)]
    apart = intervals.estimate(p50, medians, figures).apart
    return {
        "what": name,
        "count": len(values),
        "p50": round(p50, 1),
        "p90": round(p90, 1),
        "p99": round(p99, 1),
        "max": round(most, 1),
        "p50_plus_minus": None if math.isnan(apart) else round(apart, 1),
    }


def _set_up() -> Iterator[tuple[str, Measure]]:
    """What is printed of the set-up, and how it is taken from a call."""
    for name, moment in SET_UP.items():

        def of(call: Call, moment: str = moment) -> list[float]:
            return [call.moments[moment]] if moment in call.moments else []

        yield name, of


def _said(made: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
    for call in made:
        for said in call.turns:
            yield call, said


def _replies(call: Call) -> list[float]:
    return [said.reply_ms for said in call.turns if said.reply_ms is not None]


def _interruptions(call: Call) -> list[float]:
    """From the first packet sent into a reply to the last one heard of it."""
    found = []
    for said in call.turns:
        until_ns = said.reply_ns or said.ended_ns
        if said.interrupts and until_ns is not None:
            last_ns = call.heard.last_audible(said.begun_ns, until_ns)
            if last_ns is not None:
                found.append((last_ns - said.begun_ns) / 1e6)
    return found


TALKING: tuple[tuple[str, Measure], ...] = (("reply", _replies), ("interruption", _interruptions))


def _gaps(call: Call) -> list[float]:
    if not call.heard.at_ns:
        return []
    # What had not come when the call ended was not missed any more.
    return call.gaps_ms(call.offered_ns, call.heard.at_ns[-1] + 1, over_ms=GAP_MS)


def _turns(made: Sequence[Call], ended_ns: int) -> Figures:
    ended = [(call, said) for call, said in _said(made) if said.ended_ns is not None]
    answered = sum(said.reply_ns is not None for _, said in ended)
    late = sum(call.talk.unanswered(call.ended_ns or ended_ns) for call in made)
    return {
        "said": len(ended),
        "answered": answered,
        "unanswered": late,
        "call_ended_first": len(ended) - answered - late,
    }


def _errors(made: Sequence[Call]) -> Figures:
    """Error events that came, by their codes."""
    found = Counter(
        kind.removeprefix("error ")
        for call in made
        for _, kind in call.events
        if kind.startswith("error")
    )
    return dict(found.most_common(10))


def _audio(made: Sequence[Call], gaps: list[float]) -> Figures:
    connected = [call for call in made if "connected" in call.moments]
    came = sum(len(call.heard.at_ns) for call in connected)
    # What had not come when the call ended was not missed any more.
    heard = [call for call in connected if call.heard.at_ns]
    lost = sum(call.lost_down(0, call.heard.at_ns[-1] + 1) for call in heard)
    ups = [call.lost_up(0, 1 << 62) for call in connected]
    return {
        "packets_sent": sum(call.sent for call in connected),
        "lost_up": sum(up for up in ups if up is not None),
        "packets_received": came,
        "lost_down": lost,
        "not_authentic": sum(call.bad for call in connected),
        "gaps_over_40_ms": len(gaps),
        "gap_p99_ms": round(float(np.percentile(gaps, 99)), 1) if gaps else None,
        "gap_longest_ms": round(max(gaps), 1) if gaps else None,
    }


def _compared(made: Sequence[Call]) -> Figures:
    found = [
        call.echo.correlation
        for call in made
        if call.echo is not None and call.echo.correlation is not None
    ]
    right = sum(value > CORRELATION_MIN for value in found)
    return {
        "compared": len(found),
        "not_whole": sum(_missed_a_whole_one(call) for call in made),
        "right_percent": round(100 * right / len(found), 1) if found else None,
        "correlation_p50": round(float(np.median(found)), 3) if found else None,
        "correlation_least": round(min(found), 3) if found else None,
    }


def _missed_a_whole_one(call: Call) -> bool:
    """Whether it talked long enough for a whole reply, was to keep one, and has none."""
    if not call.checked or call.interrupts or call.failure or "connected" not in call.moments:
        return False
    began_ns = call.offered_ns + call.moments["connected"] * 1e6
    long_enough = ((call.ended_ns or 0) - began_ns) / 1e9 >= WHOLE_S
    return long_enough and (call.echo is None or not call.echo.whole)


def _tool(ringing: Ringing, beside: "Beside") -> Figures:
    """What this tool costs itself, and how late its own packets left."""
    late = np.frombuffer(ringing.late_ms, np.float32).astype(float)
    busy = [
        (cpu, calls) for cpu, calls in zip(beside.own_cpu, beside.under_way, strict=True) if calls
    ]
    cpu = sum(cpu for cpu, _ in busy)
    calls = sum(calls for _, calls in busy)
    p50, p99, most = np.percentile(late, (50, 99, 100)) if len(late) else (0.0, 0.0, 0.0)
    return {
        "cpu_percent": round(cpu / len(busy), 1) if busy else None,
        "cpu_percent_most": round(max(beside.own_cpu), 1) if beside.own_cpu else None,
        "cpu_ms_a_call_second": round(10 * cpu / calls, 2) if calls else None,
        "late_p50_ms": round(float(p50), 2),
        "late_p99_ms": round(float(p99), 2),
        "late_max_ms": round(float(most), 1),
        "skipped": ringing.skipped,
    }


# --- over time ------------------------------------------------------------------------------------


def _lines(made: Sequence[Call], beside: "Beside") -> Iterator[Series]:
    yield Series("Calls at once", "calls", "calls", beside.at_s, beside.under_way)
    for name in ("answer", "connected", "session"):
        points = [
            ((call.offered_ns - beside.begun_ns) / 1e9, call.moments[SET_UP[name]])
            for call in made
            if SET_UP[name] in call.moments
        ]
        at, values = [at for at, _ in points], [value for _, value in points]
        yield Series("Set-up over time", name, "ms", at, values)
    replies = sorted(
        ((said.reply_ns - beside.begun_ns) / 1e9, said.reply_ms)
        for _, said in _said(made)
        if said.reply_ns is not None and said.reply_ms is not None
    )
    at, values = [at for at, _ in replies], [value for _, value in replies]
    yield Series("End of speech to reply", "reply", "ms", at, values)
    seconds = range(int((beside.ended_ns - beside.begun_ns) / 1e9))
    longest = []
    for second in seconds:
        since = beside.begun_ns + second * 10**9
        found = [
            call.silence_ms(since, min(since + 10**9, call.heard.at_ns[-1] + 1))
            for call in made
            if call.heard.at_ns and call.offered_ns < since + 10**9 and since < call.heard.at_ns[-1]
        ]
        longest.append(max(found, default=0.0))
    yield Series(
        "Longest silence", "of all calls", "ms", [float(each) for each in seconds], longest
    )
    for name, values in {"this tool": beside.own_cpu, **beside.server_cpu}.items():
        yield Series("CPU", name, "% of a core", beside.at_s, values)


def _markers(made: Sequence[Call], beside: "Beside") -> Iterator[Marker]:
    """Failures, those of the same second and reason as one."""
    found = Counter(
        (int((call.ended_ns - beside.begun_ns) / 1e9), call.failure)
        for call in made
        if call.failure and call.ended_ns
    )
    for (second, failure), count in sorted(found.items())[:MARKERS_MAX]:
        yield Marker(float(second), f"{failure}" + (f" × {count}" if count > 1 else ""))


# --- what must hold, and what must be known -------------------------------------------------------


def _judge(found: Finding, plan: "Plan", made: Sequence[Call]) -> None:
    failed = [call for call in made if call.failure]
    found.must(bool(made), "no call was made: none was due in that time")
    for failure, count in Counter(call.failure for call in failed).most_common():
        why = next(call.why for call in failed if call.failure == failure)
        sentence = f"{count} of {len(made)} calls failed: {failure}"
        found.must(False, f"{sentence} ({why})" if why else sentence)
    unanswered = found.figures["turns"]["unanswered"]
    found.must(not unanswered, f"{unanswered} turns were not answered")
    if plan.compare:
        compared = found.figures["replies_compared"]
        found.must(
            compared["compared"] > 0 or not compared["not_whole"],
            f"no reply was whole, though {compared['not_whole']} calls talked long enough for one",
        )


def _explain(found: Finding, plan: "Plan", ringing: Ringing) -> None:
    """What a reader needs beside the figures."""
    say = found.notes.append
    say(
        f"p50_plus_minus: with {intervals.CONFIDENCE:.0%} confidence the medians of two runs like "
        "this one differ by less, all of a table; to say so takes "
        f"{ROUND_MIN * intervals.ROUNDS_MIN} calls."
    )
    say(
        "reply: counted from the packet with the last of the speech, less the "
        f"{speaking.SILENCE_MS} ms of silence that end a turn; a turn ends with a packet, so up to "
        "20 ms of it are the packets'."
    )
    if plan.interrupting:
        say(
            "interruption: the detector wants three packets with a voice in them, of which the "
            f"third leaves {ONSET_MS} ms after the first; the last packet of the reply came up to "
            "20 ms before the next one would have."
        )
    if plan.compare and not found.figures["replies_compared"]["compared"]:
        say(f"No reply was compared: calls of less than {WHOLE_S:g} s hear no whole one.")
    if ringing.refused:
        say(f"{ringing.refused} calls were due while {plan.at_once} were under way: not made.")
    if found.figures["tool"]["late_p99_ms"] > LATE_MS:
        say(
            f"1 % of this tool's own packets left more than {LATE_MS:g} ms late: figures of "
            "milliseconds are partly its own. Give it a CPU, or fewer calls."
        )


def _most_at_once(made: Sequence[Call]) -> int:
    """The most that were under way at a moment."""
    changes = [(call.offered_ns, 1) for call in made]
    changes += [(call.ended_ns, -1) for call in made if call.ended_ns is not None]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
