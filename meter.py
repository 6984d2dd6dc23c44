"""A session's meter: what one call adds to the process's counters and histograms.

What it owns: the moments between which something is timed, and what was counted so far, so that the
process's figures are sums over calls that may still be going on.

Rules that stay true:
- Per packet it costs nothing: packets are counted where they are handled, and brought here once a
  second and at the end of the call.
- It looks on and changes nothing.
- What it tells of the call at its end is of bounded size, however long that was.

Sans-IO.

RFC 3550 section 6.4 https://www.rfc-editor.org/rfc/rfc3550#section-6.4 (jitter, loss, round trip).
"""

from typing import Any

import ledger
import metrics
import rtp

Count = metrics.Transceiver
Timing = metrics.Timing

JITTER_S_MAX = 10.0
"""More is no jitter but a client that makes it up, and would spoil the sum of all."""

_FRAMES = (
    ("decoded", Count.FRAMES_DECODED),
    ("concealed", Count.FRAMES_CONCEALED),
    ("recovered", Count.FRAMES_RECOVERED),
    ("late", Count.FRAMES_LATE),
    ("duplicate", Count.FRAMES_DUPLICATE),
    ("stray", Count.FRAMES_STRAY),
    ("malformed", Count.FRAMES_MALFORMED),
    ("surplus", Count.FRAMES_SURPLUS),
)
"""What the receiver of a client's audio counts, and where it ends up."""

_STEPS = {
    Timing.SETUP_CHECK: "check_ms",
    Timing.SETUP_CONNECTED: "connected_ms",
    Timing.SETUP_AUDIO: "audio_ms",
    Timing.SETUP_CHANNEL: "channel_ms",
}
"""What the steps of the set-up are called in a call's story."""

_ERROR = '{"type":"error"'
_CLEARED = '{"type":"output_audio_buffer.cleared"'
_OURS = '"type":"server_error"'


class Meter:
    """What is timed and counted of one call."""

    def __init__(
        self,
        counters: ledger.Counters,
        timings: ledger.Histograms,
        opened_at: float,
        clock_hz: int = rtp.CLOCK_HZ,
    ) -> None:
        """Begin at the offer, `opened_at` by the clock of all `now`; jitter counts in `clock_hz`.

        That is the codec's.
        """
        self._values, self._observe = counters.values, timings.observe
        self._opened_at = opened_at
        self._clock_hz = clock_hz
        self._turn_ended_at: float | None = None
        self._frames = [0] * len(_FRAMES)
        self._packets = 0
        self._set_up: dict[str, float] = {}
        self._turns = self._replies = 0
        self._replies_s = self._reply_s_max = 0.0
        self._interruptions, self._interruption_s_max = 0, 0.0
        self._errors = {"client": 0, "server": 0}
        self._network: dict[str, float] = {}

    def set_up(self, step: Timing, at: float) -> None:
        """A step of the set-up has been reached."""
        self._observe(step, at - self._opened_at)
        self._set_up[_STEPS[step]] = _ms(at - self._opened_at)

    def turn(self, kind: object, playing: bool, now: float) -> None:
        """An event of the backend: a turn of the client begins or ends.

        What ends while a reply is `playing` is not timed: the next packet is none of its answer.
        """
        self._turns += kind == "input_audio_buffer.committed"
        if kind == "session.created":  # the first, if its server is lost and another one begins
            self._set_up.setdefault("backend_ms", _ms(now - self._opened_at))
        elif kind == "input_audio_buffer.speech_stopped" and not playing:
            self._turn_ended_at = now
        elif kind == "input_audio_buffer.speech_started":
            self._turn_ended_at = None

    def sounded(self, now: float) -> None:
        """A packet of a reply leaves."""
        if self._turn_ended_at is not None:
            late_s = now - self._turn_ended_at
            self._observe(Timing.REPLY, late_s)
            self._turn_ended_at = None
            self._replies += 1
            self._replies_s += late_s
            self._reply_s_max = max(self._reply_s_max, late_s)

    def told(self, message: str, late_s: float) -> None:
        """An event to the client, so many seconds after what has caused it."""
        if message.startswith(_ERROR):
            ours = _OURS in message
            self._values[Count.ERRORS_SERVER if ours else Count.ERRORS_CLIENT] += 1
            self._errors["server" if ours else "client"] += 1
        elif message.startswith(_CLEARED):
            self._observe(Timing.INTERRUPTION, late_s)
            self._interruptions += 1
            self._interruption_s_max = max(self._interruption_s_max, late_s)

    def frames(self, receiver: object) -> None:
        """Count what has become of the client's audio since this was last called."""
        for number, (name, kind) in enumerate(_FRAMES):
            counted = getattr(receiver, name)
            self._values[kind] += counted - self._frames[number]
            self._frames[number] = counted

    def reported(self, block: rtp.Block, packets: int) -> None:
        """How we receive the client, of whom `packets` have come in all."""
        if packets != self._packets:  # in silence with DTX there is nothing to say
            self._packets = packets
            self._observe(Timing.JITTER_IN, min(JITTER_S_MAX, block.jitter / self._clock_hz))
            self._observe(Timing.LOSS_IN, block.fraction_lost / 256)
            self._network["packets_in"] = packets
            self._network["lost_in"] = max(0, block.lost)
            self._network["jitter_in_ms"] = _ms(min(JITTER_S_MAX, block.jitter / self._clock_hz))

    def received(self, block: rtp.Block, round_trip_s: float | None) -> None:
        """How the client receives us, by its report."""
        self._observe(Timing.JITTER_OUT, min(JITTER_S_MAX, block.jitter / self._clock_hz))
        self._observe(Timing.LOSS_OUT, block.fraction_lost / 256)
        self._network["lost_out"] = max(0, block.lost)
        self._network["jitter_out_ms"] = _ms(min(JITTER_S_MAX, block.jitter / self._clock_hz))
        if round_trip_s is not None:
            self._observe(Timing.ROUND_TRIP, round_trip_s)
            self._network["round_trip_ms"] = _ms(round_trip_s)

    def story(self) -> dict[str, Any]:
        """What the call was like, for its line in the journal: counts, and milliseconds.

        Loss counts from the beginning, jitter and round trip are the last that were heard of. What
        never came is not in it.
        """
        told: dict[str, Any] = {"set_up": self._set_up} if self._set_up else {}
        told["frames"] = {
            name: count for (name, _), count in zip(_FRAMES, self._frames, strict=True) if count
        }
        told |= self._network
        told |= {"turns": self._turns, "replies": self._replies}
        told["interruptions"] = self._interruptions
        if self._replies:
            told["reply_ms_mean"] = _ms(self._replies_s / self._replies)
            told["reply_ms_max"] = _ms(self._reply_s_max)
        if self._interruptions:
            told["interruption_ms_max"] = _ms(self._interruption_s_max)
        told["errors"] = dict(self._errors)
        return told


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
