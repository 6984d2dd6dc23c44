"""Audio out: the PCM of replies to paced RTP packets, which can be taken back at any moment.

Owns what a voice conversation feels first when a bot speaks. The `Playout` makes paced packets of a
reply that a model server sends faster than real time; it can be emptied between two packets, and
knows to the millisecond what was sent. The way in is receiver.py's.

Rules that stay true:
- The first frame of an utterance leaves at once and its grid of 20 ms starts there; only if another
  frame left less than 20 ms ago it waits for that one's end. The RTP timestamp follows the clock
  over pauses, and the first packet after a pause carries the marker (RFC 3551 section 4.1,
  https://www.rfc-editor.org/rfc/rfc3551#section-4.1).
- Frames are encoded when they are sent: dropping a minute of speech costs nothing, and no packet of
  it leaves afterwards. What was cut off in mid-word is followed by silence, or clients would guess.
- Items play one after another, in the order of their first write. An item that was finished or
  flushed takes no more audio: the rest of an answer still under way is ignored.

It owns no codec, socket or clock: the encoder is an argument (opus.py has it), `now` is monotonic
seconds, packets are returned. It knows nothing of conversations or RTCP.
RTP for Opus: RFC 7587, https://www.rfc-editor.org/rfc/rfc7587; for G.711: RFC 3551, whose clock is
the codec's 8 kHz.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import rtp

FRAME_MS = 20
"""Length of what is sent in one packet."""

QUEUE_S_MAX = 300.0
"""Audio waiting to be sent, in seconds of play-out. The longest reply of the Realtime models is
4,096 tokens of 50 ms, 205 s; this much at 24 kHz is 14 MB, which only a backend can make us hold.
"""

ITEMS_MAX = 64
"""Items waiting to be sent: a bound for a backend that makes a new one for every sample. One reply
has one or two."""

ITEMS_REMEMBERED_MAX = 64
"""Ended items whose milliseconds are kept for truncations, and whose late audio is ignored."""

HUSH_PACKETS = 3
"""Silence behind a reply that is cut off. A stream that just stops looks like loss to a client: its
concealment draws the last sound out for some 200 ms. One packet may be lost; more than three are no
use, for by then the client's buffer has run empty in silence."""

LATE_S_MAX = 0.06
"""A timer this late is caught up with, in a burst of up to four packets; a later one has been a
pause: the client has played silence by then, and a burst would only become delay in its buffer."""

_FRAME_S = FRAME_MS / 1_000

assert LATE_S_MAX >= _FRAME_S


class SpeechEncoder(Protocol):
    """What Playout needs of a codec: opus.Encoder has it."""

    rate_hz: int

    def encode(self, pcm: bytes) -> bytes:
        """One frame of FRAME_MS of PCM16LE mono to one payload."""

    def silence(self) -> bytes:
        """A frame that is silent at once, whatever was encoded before it."""


class Played(NamedTuple):
    """An item, and how many milliseconds of it were sent."""

    item: str
    ms: int


class Started(NamedTuple):
    """The first packet of an item has been sent."""

    item: str


class Drained(NamedTuple):
    """Nothing more of an item will be sent: `ms` is the length of what was taken of it."""

    item: str
    ms: int


class _Item:
    """One item's audio that waits, and the account of what was sent."""

    __slots__ = ("finished", "name", "packets", "pcm", "written")

    def __init__(self, name: str) -> None:
        self.name = name
        self.pcm = bytearray()  # deleting at its front moves a pointer, not the rest
        self.written = 0
        self.packets = 0
        self.finished = False


class Playout:
    """A reply's PCM (PCM16LE mono at the encoder's rate) to RTP packets in real time.

    After write() and finish() look at `wakes_at` and call send() then; calling it more often is
    harmless, calling it late is caught up with.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        *,
        ssrc: int,
        payload_type: int,
        sequence: int,
        timestamp: int,
        clock_hz: int = rtp.CLOCK_HZ,
    ) -> None:
        """`sequence` and `timestamp` are those of the first packet; RFC 3550 wants them random.

        `clock_hz` is what the codec's packets are stamped in.
        """
        self.ssrc = ssrc
        self.wakes_at: float | None = None
        """When send() will have something to send; in the past means now. None: write first."""
        self.packets_sent = 0
        self.octets_sent = 0
        """Of payload, as sender reports count."""
        self.last_timestamp = timestamp
        """RTP timestamp of the last packet sent (of the first one, until that is sent)."""
        self._encoder = encoder
        self._payload_type = payload_type
        self._sequence = sequence
        self._clock_hz = clock_hz
        self._frame_clock = clock_hz * FRAME_MS // 1_000
        self._frame = 2 * encoder.rate_hz * FRAME_MS // 1_000
        self._octets_max = int(QUEUE_S_MAX * 2 * encoder.rate_hz)
        self._octets = 0
        self._queue: deque[_Item] = deque()
        self._open: dict[str, _Item] = {}  # the same items by name
        self._ended: dict[str, int] = {}  # milliseconds sent, the oldest first
        self._events: list[Started | Drained] = []
        self._grid_at = float("-inf")  # when the last packet's 20 ms are over
        self._hush = 0  # packets of silence that a flush still owes

    def write(self, item: str, pcm: bytes, now: float) -> bool:
        """Append audio of any length to an item, after all that was written before.

        The first write of another item finishes the one before. True if it was taken, or ignored
        because the item has been finished or flushed. False, once, if the queue was full: what
        fits has been taken and the item ends there, so that what is heard has no hole.
        """
        entry = self._open.get(item)
        if entry is None:
            if item in self._ended or not pcm:
                return True
            if len(self._queue) >= ITEMS_MAX or self._octets >= self._octets_max:
                self._remember(item, 0)
                self._events.append(Drained(item, 0))
                return False
            if self._queue:
                self._finish(self._queue[-1])
            if self._hush:
                self._hush, self.wakes_at = 0, None
            entry = self._open[item] = _Item(item)
            self._queue.append(entry)
        elif entry.finished:
            return True
        room = self._octets_max - self._octets
        fits = len(pcm) <= room
        taken = pcm if fits else pcm[:room]
        entry.pcm += taken
        entry.written += len(taken)
        self._octets += len(taken)
        if not fits:
            self._finish(entry)
        self._schedule(now)
        return fits

    def silence(self, now: float) -> bytes:
        """A packet of silence that belongs to no item, to be sent before the first item plays.

        It shows the client that the line is open: its track unmutes, its decoder is set up, and
        reports begin, before there is anything to say.
        """
        return self._seal(self._encoder.silence(), now, self.timestamp_at(now), marker=True)

    def finish(self, item: str, now: float) -> None:
        """Say that no more audio comes for this item: a last partial frame is sent with silence.

        Does nothing for an item that is unknown or has ended.
        """
        entry = self._open.get(item)
        if entry is not None:
            self._finish(entry)
            self._schedule(now)

    def send(self, now: float) -> list[bytes]:
        """Return the RTP packets that are due: mostly none or one, up to four if called late."""
        wakes_at = self.wakes_at
        if wakes_at is None or now < wakes_at:
            return []
        if wakes_at == self._grid_at and now - wakes_at <= LATE_S_MAX:
            following = self.last_timestamp + self._frame_clock
            packets = [self._packet(wakes_at, following, marker=False)]
        else:
            packets = [self._packet(now, self.timestamp_at(now), marker=True)]
        while self._is_ready() and self._grid_at <= now:
            timestamp = self.last_timestamp + self._frame_clock
            packets.append(self._packet(self._grid_at, timestamp, marker=False))
        self.wakes_at = self._grid_at if self._is_ready() else None
        return packets

    def flush(self, now: float) -> list[Played]:
        """Drop all that is not sent, at once; say for each item that waited what of it was sent.

        If that cuts an item off, HUSH_PACKETS of silence follow on its grid.

        The encoder keeps the last 2.5 ms of what was sent, and they sound, faded out, at the start
        of the next utterance: that is its overlap, not a rest of the queue. Nothing depends on
        `now` here; it is asked for as everywhere, so that something may.
        """
        played = [Played(entry.name, self._ms(entry)) for entry in self._queue]
        if self._queue and self._queue[0].packets:
            self._hush = HUSH_PACKETS
        self._queue.clear()
        self._open.clear()
        self._octets = 0
        self.wakes_at = self._grid_at if self._hush else None
        for name, ms in played:
            self._remember(name, ms)
        return played

    def events(self) -> list[Started | Drained]:
        """Return what happened since the last call, in order. Flushed items are not Drained."""
        events, self._events = self._events, []
        return events

    def played_ms(self, item: str) -> int:
        """Milliseconds of the item sent so far, without padding; 0 if unknown or forgotten."""
        entry = self._open.get(item)
        return self._ended.get(item, 0) if entry is None else self._ms(entry)

    def share(self, item: str) -> float:
        """How much of what was written of an item has been sent, 0 to 1; 1 if nothing waits."""
        entry = self._open.get(item)
        return 1.0 if entry is None else 1.0 - len(entry.pcm) / max(1, entry.written)

    def timestamp_at(self, now: float) -> int:
        """The RTP timestamp of this moment: for sender reports, and for what is sent next."""
        if not self.packets_sent:
            return self.last_timestamp
        since_s = now - (self._grid_at - _FRAME_S)
        return self.last_timestamp + round(since_s * self._clock_hz) & 0xFFFF_FFFF

    def _packet(self, at: float, timestamp: int, *, marker: bool) -> bytes:
        """Take one frame off the queue and make the packet whose place on the grid is `at`."""
        if self._hush:
            self._hush -= 1
            return self._seal(self._encoder.silence(), at, timestamp, marker=marker)
        entry = self._queue[0]
        pcm = bytes(entry.pcm[: self._frame])
        del entry.pcm[: self._frame]
        self._octets -= len(pcm)
        if len(pcm) < self._frame:
            pcm = pcm[: len(pcm) & ~1].ljust(self._frame, b"\0")
        if not entry.packets:
            self._events.append(Started(entry.name))
        entry.packets += 1
        packet = self._seal(self._encoder.encode(pcm), at, timestamp, marker=marker)
        self._drain()
        return packet

    def _seal(self, payload: bytes, at: float, timestamp: int, *, marker: bool) -> bytes:
        """One payload as the packet whose place on the grid is `at`."""
        self.last_timestamp = timestamp & 0xFFFF_FFFF
        packet = rtp.write(
            self._payload_type,
            self._sequence,
            self.last_timestamp,
            self.ssrc,
            payload,
            marker=marker,
        )
        self._sequence = self._sequence + 1 & 0xFFFF
        self._grid_at = at + _FRAME_S
        self.packets_sent += 1
        self.octets_sent += len(payload)
        return packet

    def _is_ready(self) -> bool:
        """Whether a frame can be taken: a whole one, or the last one of an item, or silence."""
        if not self._queue:
            return self._hush > 0
        entry = self._queue[0]
        return entry.finished or len(entry.pcm) >= self._frame

    def _schedule(self, at: float) -> None:
        if self.wakes_at is None and self._is_ready():
            self.wakes_at = max(at, self._grid_at)

    def _finish(self, entry: _Item) -> None:
        entry.finished = True
        self._drain()

    def _drain(self) -> None:
        """Take leave of items at the front that are finished and sent. Half a sample is dropped."""
        while self._queue and self._queue[0].finished and len(self._queue[0].pcm) < 2:
            entry = self._queue.popleft()
            del self._open[entry.name]
            self._octets -= len(entry.pcm)
            self._remember(entry.name, self._ms(entry))
            self._events.append(Drained(entry.name, self._ms(entry)))

    def _ms(self, entry: _Item) -> int:
        """A model server refuses to truncate an item behind its end: padding does not count."""
        written_ms = entry.written * 500 // self._encoder.rate_hz
        return min(entry.packets * FRAME_MS, written_ms)

    def _remember(self, name: str, ms: int) -> None:
        self._ended[name] = ms
        if len(self._ended) > ITEMS_REMEMBERED_MAX:
            del self._ended[next(iter(self._ended))]
