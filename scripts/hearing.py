"""What was heard of a call while something happened: silence and loss each way, from packets seen.

For the laboratory (lab.py). Sans-IO: the router's record (delays.Passed) goes in. Each 20 ms packet
of a call is counted by its sequence number at both ends of each way:

    up      `sent` by the caller's host, `heard` by the transceiver's
    down    `answered` by the transceiver's host, `received` by the caller's

so that delay, loss and silence are the network's and the relays', not those of an audio device.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from delays import Passed

NORMAL_MS = 40.0
"""Between two packets, with some lateness of whoever sends them: not silence yet."""

BEFORE_S = 0.2
"""A silence may begin so long before the event: what was on its way is lost with the path."""

LATE_S = 0.7
"""What was sent in the last moments of a record may still be on its way: it is not lost."""


@dataclass
class Heard:
    """One way of a call, around a moment."""

    silence_ms: float | None
    """The longest pause from that moment on; None if nothing was heard any more."""
    lost: int
    """Packets that were sent and never came."""
    twice: int
    by: list[str] = field(default_factory=list)
    """Which relays brought the packets, in the order in which they began to."""
    source_ms: float = 0.0
    """The longest pause of whoever sent them: a long one explains silence."""

    def figures(self) -> dict[str, Any]:
        """As a row of a report."""
        silence: Any = "for good" if self.silence_ms is None else round(self.silence_ms)
        return {"silence_ms": silence, "lost": self.lost, "twice": self.twice, "by": self.by}


def _stream(seen: Iterable[Passed], point: str, host: str | None, ssrc: int) -> list[Passed]:
    return [
        each
        for each in seen
        if each.point == point and each.ssrc == ssrc and host in (None, each.host)
    ]


def _source(seen: Iterable[Passed], point: str, host: str) -> int:
    found = Counter(each.ssrc for each in seen if each.point == point and each.host == host)
    return found.most_common(1)[0][0] if found else -1


def way(sent: Sequence[Passed], came: Sequence[Passed], at: float, until: float) -> Heard:
    """One way, of one source."""
    times = [each.at for each in came if each.at <= until]
    pauses = [(b - a) * 1e3 for a, b in pairwise(times) if b >= at and a >= at - BEFORE_S]
    after = [moment for moment in times if moment >= at]
    silence = max(pauses, default=0.0) if after else None
    if after and until - after[-1] > 1.0 and any(each.at > after[-1] + 0.5 for each in sent):
        silence = None  # some that were on their way, and then no more
    counts = Counter(each.sequence for each in came)
    expected = [each for each in sent if at - BEFORE_S <= each.at <= until - LATE_S]
    lost = sum(each.sequence not in counts for each in expected)
    twice = sum(counts[each.sequence] > 1 for each in expected)
    left = [each.at for each in sent if at - BEFORE_S <= each.at <= until]
    source = max(((b - a) * 1e3 for a, b in pairwise(left)), default=0.0)
    by = list(dict.fromkeys(each.by for each in came if each.at >= at - BEFORE_S))
    return Heard(silence, lost, twice, by, source)


def around(seen: Sequence[Passed], caller: str, at: float, until: float) -> dict[str, Heard]:
    """Both ways of the call of one caller's host, from a moment until another."""
    up, down = _source(seen, "sent", caller), _source(seen, "received", caller)
    return {
        "up": way(_stream(seen, "sent", caller, up), _stream(seen, "heard", None, up), at, until),
        "down": way(
            _stream(seen, "answered", None, down),
            _stream(seen, "received", caller, down),
            at,
            until,
        ),
    }


def carrier(seen: Sequence[Passed], caller: str) -> tuple[str, str, str]:
    """Of a call's latest packets: the address that its caller sends to, that which its transceiver
    hears from, and the transceiver's host; empty if there were none."""
    up = _source(seen, "sent", caller)
    sent = _stream(seen, "sent", caller, up)
    heard = _stream(seen, "heard", None, up)
    if not sent or not heard:
        return "", "", ""
    return sent[-1].by, heard[-1].by, heard[-1].host


def first_after(seen: Iterable[Passed], point: str, host: str, at: float) -> float | None:
    """When a host's first packet passed a point after a moment."""
    return next((x.at for x in seen if x.point == point and x.host == host and x.at >= at), None)
