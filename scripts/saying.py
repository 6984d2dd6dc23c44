"""What one call of a load test says, packet by packet, and which reply belongs to what.

What it owns: `Talk`, the course of a conversation. There are two: turn after turn, each said while
the one before is answered; or turns that listen, and interrupt.

Rules that stay true:
- There is something to send every 20 ms, as from a browser: pauses are encoded silence.
- A reply begins with a packet that has the marker (the first one after a pause) and sound in it. It
  answers the last turn that has ended; a turn that has ended meanwhile takes that place.
- A reply that follows upon another one without a pause has no marker: it begins when its event says
  so, which may come a little later than its sound.
- Moments are when `next` was asked for a packet, which leaves right then.

Sans-IO; times are of time.monotonic_ns().
"""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import speaking

REPLY_S_MAX = 3.0
"""A reply that has not begun by then is none."""

_SOONEST_NS = (speaking.SILENCE_MS - 60) * 1_000_000
"""A reply that begins sooner is of the turn before. The detector may miss the last packets of a
turn, which are soft, and hear its end that much earlier."""

PACKETS_PER_S = 50

INTERRUPT_AFTER = (30, 80)
"""Packets of a reply that are heard before it is interrupted, drawn anew each time."""


@dataclass
class Said:
    """A turn that was said, and the reply to it."""

    turn: speaking.Turn
    begun_ns: int
    """When its first packet left."""
    ended_ns: int | None = None
    """When its last packet of speech left."""
    reply_ns: int | None = None
    """When the first packet of the reply came."""
    interrupts: bool = False
    """It was said into a reply."""

    @property
    def reply_ms(self) -> float | None:
        """From the end of speech to the reply, less the silence that ends a turn."""
        if self.ended_ns is None or self.reply_ns is None:
            return None
        return (self.reply_ns - self.ended_ns) / 1e6 - speaking.SILENCE_MS


class Talk:
    """The course of one call."""

    def __init__(
        self, voice: speaking.Voice, number: int, *, interrupts: bool, checked: bool
    ) -> None:
        """`number` decides which turns are said; `checked`: one whole reply is kept."""
        self.turns: list[Said] = []
        self.echo: speaking.Echo | None = None
        """The reply that was kept."""
        self._voice, self._number = voice, number
        self._interrupts, self._checked = interrupts, checked
        self._chance = random.Random(number)
        self._script: Iterator[bytes] = iter(())
        self._waiting: Said | None = None
        self._started_ns = 0
        self._keeping = False

    def begin(self, rate_hz: int) -> None:
        """Speak from now on, to a server that wants that rate; from the beginning of a turn."""
        self._waiting, self._keeping = None, False
        self._script = self._interrupting(rate_hz) if self._interrupts else self._flowing(rate_hz)

    def next(self) -> bytes | None:
        """The packet that is due; None before `begin`."""
        return next(self._script, None)

    def heard(self, at_ns: int, sequence: int, payload: bytes, marker: bool) -> Said | None:
        """A packet with sound in it has come: the turn, if it is the first of the reply to one."""
        said = None
        if marker:
            self._keeping = False
            said = self._waiting
        if said is not None and said.ended_ns is not None and at_ns - said.ended_ns < _SOONEST_NS:
            said = None  # the one before goes on, after a pause that it should not have had
        if said is not None:
            self._waiting = None
            said.reply_ns = at_ns
            whole = said.interrupts or not self._interrupts  # the others are cut off
            if self._checked and self.echo is None and whole:
                self.echo, self._keeping = speaking.Echo(said.turn), True
        if self._keeping and self.echo is not None:
            self.echo.packets.append((sequence, payload))
        return said

    def started(self, at_ns: int) -> None:
        """An event says that a reply is being played."""
        self._started_ns = at_ns

    def unanswered(self, now_ns: int) -> int:
        """Turns whose reply should have begun and has not."""
        self._settle()
        late = [
            said
            for said in self.turns
            if said.reply_ns is None
            and said.ended_ns is not None
            and now_ns - said.ended_ns > REPLY_S_MAX * 1e9
        ]
        return len(late)

    def _turn(self, rate_hz: int, *, short: bool = False) -> Iterator[bytes]:
        """Say the next turn, and the silence behind it that belongs to it."""
        # Neighbours say other turns than this call, now and in the next few.
        number = 5 * self._number + len(self.turns)
        turn = self._voice.turn(number, rate_hz, short=short)
        said = Said(turn, time.monotonic_ns(), interrupts=short)
        self.turns.append(said)
        for at, payload in enumerate(turn.payloads):
            if at == turn.spoken - 1:
                self._settle()
                said.ended_ns = time.monotonic_ns()
                self._waiting = said
            yield payload

    def _settle(self) -> None:
        """A turn that still waits for its reply, which has begun by its event: it has got it."""
        said = self._waiting
        if said is not None and said.ended_ns is not None and said.ended_ns < self._started_ns:
            said.reply_ns, self._waiting = self._started_ns, None

    def _flowing(self, rate_hz: int) -> Iterator[bytes]:
        """Turn after turn, each said while the one before is answered."""
        while True:
            yield from self._turn(rate_hz)

    def _interrupting(self, rate_hz: int) -> Iterator[bytes]:
        """A turn, some of its reply, a short turn into that, all of its reply; and again."""
        while True:
            yield from self._turn(rate_hz)
            quiet = self.turns[-1].turn.payloads[-1]
            yield from self._until_reply(quiet)
            if self._waiting is not None:  # there is nothing to interrupt
                continue
            yield from itertools.repeat(quiet, self._chance.randrange(*INTERRUPT_AFTER))
            yield from self._turn(rate_hz, short=True)
            yield from self._until_reply(quiet)
            yield from itertools.repeat(quiet, speaking.SHORT_PACKETS + 20)

    def _until_reply(self, quiet: bytes) -> Iterator[bytes]:
        for _ in range(round(REPLY_S_MAX * PACKETS_PER_S)):
            if self._waiting is None:
                return
            yield quiet
