"""What one call heard: every packet of audio that came, and what that says of silence and loss.

What it owns: `Heard`, a record of arrivals in arrays (26 octets a packet, so an hour of a call is
5 MB), and the judgement of when something should have been heard and was not.

Rules that stay true:
- A packet sounds for 20 ms. What passes from then until the next one is silence, less the pause
  that RTP timestamps explain: they follow the sender's clock, sequence numbers count its packets.
- A packet that comes late, after one with a higher sequence number, ends no silence.
- A silence that has not ended counts, too. Whether the other side was about to pause cannot be seen
  then: `sounding`, what its events said last, decides whether a usual pause is taken off.
- Between two connections of one call there are no common timestamps: all of it is silence, up to
  the packet with which the new one opens.
- A packet that never came is lost in the time in which it was due, so that it counts once. Where
  nothing has come since, the silence says how many those are.

Sans-IO; times are nanoseconds of one clock. RFC 3550 section 5.1.
"""

import bisect
import math
from array import array

import numpy as np
import numpy.typing as npt

FRAME_MS = 20.0
_CLOCK_MS = 48
"""Of Opus' RTP clock, units a millisecond."""

SILENT_OCTETS_MAX = 3
"""Payload of a packet of digital silence: what a server sends to open a line, or when it is cut
off. Speech has twenty times as much."""

OPENING_MS = 4_000.0
"""From the packet that opens a line to the first reply, at most: who calls speaks first, and says a
turn of three seconds."""

PAUSE_MS_MAX = 1_000.0
"""A longer pause between replies is no usual one: nobody spoke, say."""

MARGIN = 1_000
"""Packets before and after a time that are looked at, too, for what came late and what is usual."""

GONE_MS = 500.0
"""A silence that has lasted for so long, and goes on, is no stall: nothing comes any more."""

AFTER = 10
"""Packets after a time that are looked at: one of them is in order."""

_CONNECTION = 40  # bits below the number of a connection
_REPORT = 4  # numbers a report: when, connection, cumulative loss, highest sequence number
Milliseconds = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_NONE: Milliseconds = np.zeros(0)
_NOTHING: Integers = np.zeros(0, np.int64)


class Heard:
    """The arrivals of one call, over all its connections."""

    def __init__(self) -> None:
        self.at_ns = array("q")
        self.sequence = array("q")
        """Extended over wraps, with the number of the connection above its 40 bits."""
        self.timestamp = array("q")
        """Extended over wraps."""
        self.octets = array("h")
        """Of payload."""
        self.audible_ns: int | None = None
        """When the first packet came that was more than silence."""
        self._opening = True  # nothing audible has come on this connection yet
        self.reports = array("q")
        """Four numbers each: when, which connection, cumulative loss, highest sequence number."""
        self.connections = 0
        self.sounding = False
        """A reply is being heard, as far as events say."""
        self.flowing = True
        """The other side speaks nearly all the time: if not, what has not come yet is no silence
        unless a reply is `sounding`."""

    def connected(self) -> None:
        """Another connection begins, with its own sequence numbers and timestamps."""
        self.connections += 1
        self.sounding, self._opening = False, True

    def packet(self, at_ns: int, sequence: int, timestamp: int, octets: int) -> None:
        """A packet has come: 16 bits of sequence number, 32 of timestamp, octets of payload."""
        base = self.connections << _CONNECTION
        if self.sequence and self.sequence[-1] >= base:
            last = self.sequence[-1]
            sequence = last + ((sequence - last + 0x8000) & 0xFFFF) - 0x8000
            last = self.timestamp[-1]
            timestamp = last + ((timestamp - last + (1 << 31)) & 0xFFFF_FFFF) - (1 << 31)
        else:
            sequence += base + 0x1_0000  # room for one that comes late
        self.at_ns.append(at_ns)
        self.sequence.append(sequence)
        self.timestamp.append(timestamp)
        self.octets.append(octets)
        if octets > SILENT_OCTETS_MAX:
            self._opening = False
            if self.audible_ns is None:
                self.audible_ns = at_ns

    def report(self, at_ns: int, lost: int, highest: int) -> None:
        """A receiver report on what we sent: cumulative loss, extended highest sequence number."""
        self.reports.extend((at_ns, self.connections, lost, highest))

    # --- questions ------------------------------------------------------------------------------

    def received(self, since_ns: int, until_ns: int) -> int:
        """Packets that came in that time."""
        return max(0, self._index(until_ns) - self._index(since_ns))

    def silences_ms(self, since_ns: int, until_ns: int) -> Milliseconds:
        """Each silence in that time, as far as it lies in it: one for every packet that came, and
        one for what had not come by then. If it has come since, its timestamp explains that one."""
        at, sequence, timestamp = self._in_order(since_ns, until_ns)
        if self.audible_ns is None or not len(at) or self.audible_ns >= until_ns:
            return _NONE  # nothing was to be heard yet
        pauses = _pauses_ms(sequence, timestamp)
        if at[-1] < until_ns:
            at, pauses = np.append(at, until_ns), np.append(pauses, self._expected_ms(pauses))
        silent = np.diff(at) / 1e6 - FRAME_MS - pauses
        inside = (np.minimum(at[1:], until_ns) - np.maximum(at[:-1], since_ns)) / 1e6
        found: Milliseconds = np.clip(np.minimum(silent, inside), 0.0, None)[inside > 0]
        return found

    def silence_ms(self, since_ns: int, until_ns: int) -> float:
        """The longest of them; 0 where nothing was to be heard yet."""
        found = self.silences_ms(since_ns, until_ns)
        return float(found.max()) if len(found) else 0.0

    def silent_ms(self, since_ns: int, at_ns: int) -> float:
        """For how much of that time there had been silence at its end, `at_ns`, without a break."""
        found = self.silences_ms(since_ns, at_ns)
        return float(found[-1]) if len(found) else 0.0

    def lost(self, since_ns: int, until_ns: int) -> int:
        """Packets that should have come in that time and never did, by sequence numbers.

        One that is missing was due 20 ms before the next, so that each belongs to one time only.
        Behind the last packet there are no numbers: what has not come until `until_ns`, and not
        since, is as many packets as the silence has room for.
        """
        if not self.at_ns or until_ns <= since_ns:
            return 0
        begin, end = self._index(since_ns), self._index(until_ns)
        part = slice(max(0, begin - MARGIN), end + MARGIN)
        # What fills a hole only afterwards is late, and not lost.
        sequence, first = np.unique(np.frombuffer(self.sequence, np.int64)[part], return_index=True)
        at = np.frombuffer(self.at_ns, np.int64)[part][first]
        same = (sequence[1:] >> _CONNECTION) == (sequence[:-1] >> _CONNECTION)
        holes = np.where(same, np.diff(sequence) - 1, 0)
        which = np.repeat(np.arange(len(holes)), holes)
        # The last of a hole's packets is one before the packet behind it.
        before = np.cumsum(holes)[which] - np.arange(len(which))
        due = np.maximum(at[1:][which] - before * round(FRAME_MS * 1e6), at[:-1][which])
        missing = int(((due >= since_ns) & (due < until_ns)).sum())
        return missing + self._not_come(since_ns, until_ns)

    def lost_up(self, since_ns: int, until_ns: int) -> int | None:
        """Packets of ours that the other side lacks, by its reports: of the last one before
        `since_ns` and the first one after `until_ns`, or what there is. None without two reports of
        one connection."""
        if len(self.reports) < 2 * _REPORT:
            return None
        rows = np.frombuffer(self.reports, np.int64).reshape(-1, _REPORT).copy()
        begin = max(0, int(np.searchsorted(rows[:, 0], since_ns)) - 1)
        end = int(np.searchsorted(rows[:, 0], until_ns))
        rows = rows[begin : end + 1]
        total: int | None = None
        for connection in np.unique(rows[:, 1]):
            own = rows[rows[:, 1] == connection]
            if len(own) > 1:
                total = (total or 0) + int(own[-1, 2] - own[0, 2])
        return total

    def last_audible(self, since_ns: int, until_ns: int) -> int | None:
        """When the last packet came in that time that was more than silence."""
        for index in reversed(range(self._index(since_ns), self._index(until_ns))):
            if self.octets[index] > SILENT_OCTETS_MAX:
                return self.at_ns[index]
        return None

    def _not_come(self, since_ns: int, until_ns: int) -> int:
        """Packets that a silence has room for which has not ended since."""
        last_ns = self.at_ns[-1]
        if last_ns >= until_ns or self.audible_ns is None:
            return 0
        _, sequence, timestamp = self._in_order(since_ns, until_ns)
        expected_ms = self._expected_ms(_pauses_ms(sequence, timestamp))
        silent_ms = (until_ns - last_ns) / 1e6 - FRAME_MS - expected_ms
        return int(max(0.0, min(silent_ms, (until_ns - since_ns) / 1e6)) / FRAME_MS)

    def _expected_ms(self, pauses: Milliseconds) -> float:
        """The pause that may be going on, if nothing comes now."""
        if self.sounding or self.sequence[-1] >> _CONNECTION < self.connections:
            return 0.0
        if self._opening:
            return OPENING_MS
        if not self.flowing:
            return math.inf
        usual = pauses[(pauses > 0) & (pauses < PAUSE_MS_MAX)]
        return float(usual.max()) if len(usual) else 0.0

    def _index(self, since_ns: int) -> int:
        """Of the first packet at or after that moment: they are in order, but for a few that the
        kernel had in another queue."""
        return bisect.bisect_left(self.at_ns, since_ns)

    def _in_order(self, since_ns: int, until_ns: int) -> tuple[Integers, Integers, Integers]:
        """When, sequence number and timestamp of packets in that time, some before and a few after;
        without those that came late."""
        end = self._index(until_ns) + AFTER
        part = slice(max(0, self._index(since_ns) - MARGIN), end)
        at, sequence, timestamp = (
            np.frombuffer(each, np.int64)[part].copy() if each else _NOTHING
            for each in (self.at_ns, self.sequence, self.timestamp)
        )
        highest = np.maximum.accumulate(sequence)
        on = np.append(True, highest[1:] > highest[:-1])[: len(sequence)]
        return at[on], sequence[on], timestamp[on]


def _pauses_ms(sequence: Integers, timestamp: Integers) -> Milliseconds:
    """The pause before each packet but the first, as timestamps explain it; 0 where a connection
    begins."""
    same = (sequence[1:] >> _CONNECTION) == (sequence[:-1] >> _CONNECTION)
    moved = np.diff(timestamp) / _CLOCK_MS
    found: Milliseconds = np.where(same, np.maximum(0.0, moved - FRAME_MS * np.diff(sequence)), 0.0)
    return found
