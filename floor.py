"""The floor: whose turn it is to speak, where a client's settings ask for more than backends know.

Two fields of `turn_detection` are Earshot's own, for `server_vad` and `semantic_vad` alike
(`realtime.Patience`); 0, the default, leaves everything to the backend:

    min_interruption_duration_ms    a "hm" does not cut the bot off, so much speech does
    response_delay_ms               a pause beyond the end of the turn, in which to go on thinking

What it owns: `Terms`, turn detection as the client set it and as the backend has it meanwhile; and
`Floor`, which judges speech and answers by them.

Rules that stay true:
- No backend sees the two fields, so any that speaks the Realtime API will do. While they are in
  force it is told not to interrupt and not to answer by itself (interrupt_response, create_response
  false), and that is done here: `cancels` and `answers` say so, by what the backend itself reports.
- The client sees its own values, never those. One that names neither field sees none, and every
  event of it passes unchanged.
- An update is in force when the backend confirms it, as a whole; one that it refuses changes
  nothing. As in the API, another type of detection starts from its defaults, and null has none.
- When speech starts and stops is for the backend to say; how long it was, for the ear here, from
  the same audio and without a round trip. So a backend that hears late delays no interruption.
- A turn that was too short to interrupt and ends while the reply goes on is not answered. It stays
  in the conversation, for a "hm" means something. If the reply has ended by then, it is answered: a
  "yes" to a question may begin on its last word.

Sans-IO: `now` is monotonic seconds. What follows from its judgement is for `conversation.py`.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import realtime
from realtime import Event, Patience, Refused, ServerVad
from turns import Gauge

PENDING_MAX = 32
"""Updates that a backend has not answered. Of more the oldest is taken for confirmed: there are
servers that confirm none."""

WORD_CHARACTERS_MAX = 64
"""Of a field's value that is kept here; the longest of the API has 12."""

_PATH = "session.audio.input.turn_detection"
_OWN = frozenset(Patience.__struct_fields__)
_KEPT = _OWN | {"type", "create_response", "interrupt_response", "threshold"}


@dataclass(frozen=True, slots=True)
class _Wish:
    """Turn detection as the client has it, as far as it is of interest here."""

    kind: object = "server_vad"
    """None is push-to-talk."""
    create: bool = True
    interrupt: bool = True
    threshold: float = ServerVad().threshold
    patience: Patience = field(default_factory=Patience)

    @property
    def takes_over(self) -> bool:
        """Whether it can only be had by the backend doing less."""
        return self.patience != Patience()

    def updated(self, detection: Event | None) -> "_Wish":
        """The wish after an update. Raises Refused with the path of what is wrong."""
        if detection is None:
            return _Wish(kind=None)
        kind = detection.get("type", self.kind)
        same = self if kind == self.kind else _Wish(kind)
        named = {name: detection[name] for name in _OWN & detection.keys()}
        before = {name: getattr(same.patience, name) for name in _OWN}
        patience = realtime.checked(before | named, Patience, _PATH)
        return replace(same, patience=patience).told(detection)

    def told(self, detection: Event) -> "_Wish":
        """The wish with the fields of the API that somebody states; what is no value is none."""
        create, interrupt = detection.get("create_response"), detection.get("interrupt_response")
        level = detection.get("threshold")
        threshold = level if isinstance(level, int | float) and 0 <= level <= 1 else self.threshold
        return replace(
            self,
            kind=detection.get("type", self.kind),
            create=create if isinstance(create, bool) else self.create,
            interrupt=interrupt if isinstance(interrupt, bool) else self.interrupt,
            threshold=threshold,
        )


@dataclass(frozen=True, slots=True)
class _Update:
    """One that the backend has not answered yet."""

    event_id: str | None
    """None: it came with the offer."""
    silent: bool
    """It says nothing of turn detection."""
    detection: Event | None
    given: Event
    """What the backend was told in place of the client's word."""

    def of(self, wish: _Wish) -> _Wish:
        return wish if self.silent else wish.updated(self.detection)


class Terms:
    """Turn detection as the client has it, and as the backend has to have it for that."""

    def __init__(self, session: Event | None) -> None:
        """`session` is what came with the offer, if anything; it is not changed."""
        self.offered = session
        """That session as the backend may see it."""
        self.refused: Refused | None = None
        """Why it may not, if so: to be told after session.created."""
        self._wish = _Wish()
        self._named = False  # the client has named one of the two fields
        self._pending: deque[_Update] = deque()
        self._given: Event = {}  # what of the backend's turn detection is not by the client's word
        self._creates = self._interrupts = True  # the backend, by itself
        if session is None:
            return
        try:
            self.offered = self.asked(session, None)
        except Refused as refused:
            # As a whole or not at all; but who is to answer is no matter of turns.
            self.refused = refused
            self.offered = {"model": session["model"]} if "model" in session else None
        if not any(update.given for update in self._pending):
            self._pending.clear()  # as session.created shows it, so it is

    @property
    def patience(self) -> Patience:
        """What is in force."""
        return self._wish.patience

    @property
    def threshold(self) -> float:
        """How loud speech must be, as `server_vad` has it."""
        return self._wish.threshold

    @property
    def interrupts(self) -> bool:
        """Whether speech is to interrupt."""
        return self._wish.interrupt

    @property
    def cancels(self) -> bool:
        """Whether a response that is interrupted has to be cancelled from here."""
        return self._wish.interrupt and not self._interrupts

    @property
    def answers(self) -> bool:
        """Whether the response to a turn has to be created from here."""
        return self._wish.create and not self._creates

    def asked(self, session: Event, event_id: str | None) -> Event:
        """A client's update as the backend may see it; raises Refused, and nothing has happened.

        With an `event_id` an error of the backend's can be told to be about it.
        """
        known, detection = _detection_of(session)
        if not known or not (detection is None or isinstance(detection, dict)):
            self._await(_Update(event_id, True, None, {}))
            return session
        before = self._wish
        for update in self._pending:
            before = update.of(before)
        kept = None if detection is None else _kept(detection)
        after = before.updated(kept)
        given: Event = {}
        if detection is not None and (before.takes_over or after.takes_over):
            given["create_response"] = after.create and not after.takes_over
            at_once = not after.patience.min_interruption_duration_ms
            given["interrupt_response"] = after.interrupt and at_once
            # What is no value is for the backend to refuse.
            given = {k: v for k, v in given.items() if isinstance(detection.get(k, v), bool)}
        self._await(_Update(event_id, False, kept, given))
        if detection is None or not (given or _OWN & detection.keys()):
            return session
        self._named = True
        plain = {name: value for name, value in detection.items() if name not in _OWN}
        if before.kind is not None:
            plain.setdefault(
                "type", before.kind
            )  # it is not said twice, but servers may ask for it
        return _with_detection(session, plain | given)

    def turned_down(self, event_id: object, param: object) -> None:
        """The backend has sent an error about the client event `event_id` and a field of it."""
        if event_id is None and not (isinstance(param, str) and param.startswith("session")):
            return
        self._pending = deque(p for p in self._pending if p.event_id != event_id)

    def shown(self, session: Event, *, created: bool) -> Event:
        """The backend's session as the client sees it; with that, what was asked for is in force.

        `created` for session.created: a backend that is told of the offer's session only then
        does not show it yet.
        """
        known, detection = _detection_of(session)
        stated = detection if isinstance(detection, dict) else {}
        if not created or (stated and self._pending and _agrees(stated, self._pending[0].given)):
            self._settle(stated)
        if not known:
            return session
        if detection is None:
            self._wish, self._given = _Wish(kind=None), {}
            self._creates = self._interrupts = True
        if not stated:
            return session
        self._creates = stated.get("create_response") is not False
        self._interrupts = stated.get("interrupt_response") is not False
        self._wish = self._wish.told(
            {name: value for name, value in _kept(stated).items() if name not in self._given}
        )
        if not self._named:
            return session
        own = {name: getattr(self._wish.patience, name) for name in Patience.__struct_fields__}
        words = {"create_response": self._wish.create, "interrupt_response": self._wish.interrupt}
        mine = {name: words[name] for name in self._given}
        return _with_detection(session, stated | mine | own)

    def _await(self, update: _Update) -> None:
        self._pending.append(update)
        if len(self._pending) > PENDING_MAX:
            self._apply(self._pending.popleft())

    def _settle(self, stated: Event) -> None:
        """The oldest update is in force. One that is contradicted was not: the next one, then."""
        while self._pending:
            update = self._pending.popleft()
            if not self._pending or _agrees(stated, update.given):
                self._apply(update)
                return

    def _apply(self, update: _Update) -> None:
        self._wish = update.of(self._wish)
        if not update.silent:
            self._given = update.given
            self._creates = update.given.get("create_response", self._creates)
            self._interrupts = update.given.get("interrupt_response", self._interrupts)


class Floor:
    """Whether speech interrupts, and when a turn is answered. `now` is monotonic seconds."""

    def __init__(self, terms: Terms, rate_hz: int) -> None:
        """`rate_hz` is that of the PCM it may hear."""
        self.terms = terms
        self._rate_hz = rate_hz
        self._gauge: Gauge | None = None
        self._speaking = False  # by the backend's word
        self._counts = False  # the speech of this turn is long enough to interrupt
        self._stopped = False  # a turn has ended and has not been committed
        self._due: float | None = None

    @property
    def listens(self) -> bool:
        """Whether it wants to hear the caller. It costs 4 us a frame, 29 at 24 kHz."""
        return self.terms.patience.min_interruption_duration_ms > 0

    def hear(self, pcm: bytes) -> bool:
        """What the caller says, PCM16LE mono. True if it interrupts the reply from now on."""
        gauge = self._gauge
        if gauge is None:
            gauge = self._gauge = Gauge(self._rate_hz)
        gauge.hear(pcm, self.terms.threshold)
        return self._speaking and not self._counts and self._judge()

    def started(self) -> bool:
        """The backend hears speech. True if it interrupts the reply from now on."""
        self._due = None  # the thought goes on
        self._speaking, self._counts, self._stopped = True, False, False
        return self._judge()

    def stopped(self) -> None:
        """The backend hears the end of it; `committed` follows."""
        self._speaking, self._stopped = False, True

    def committed(self, now: float, *, busy: bool) -> None:
        """A turn is part of the conversation; `busy` if a reply is being made or still heard."""
        ended, self._speaking, self._stopped = self._stopped, False, False
        short = self.listens and not self._counts
        # What a client commits by itself is for it to have answered.
        if ended and self.terms.answers and not (busy and short):
            self._due = now + self.terms.patience.response_delay_ms / 1000

    def abandoned(self) -> None:
        """What was heard of a turn has been dropped, and nothing follows."""
        self._speaking = self._stopped = False

    def answered(self) -> None:
        """A response to the last turn is no longer due: there is one, or the client wants none."""
        self._due = None

    def is_due(self, now: float) -> bool:
        """Whether a response has to be created now; it is said until it is `answered`."""
        if self._due is None or now < self._due:
            return False
        if not self.terms.answers:  # the settings have changed meanwhile
            self._due = None
        return self._due is not None

    def _judge(self) -> bool:
        enough_ms = self.terms.patience.min_interruption_duration_ms
        spoken_ms = 0 if self._gauge is None else self._gauge.speech_ms
        self._counts = spoken_ms >= enough_ms
        return self._counts and self.terms.interrupts


def _detection_of(session: Event) -> tuple[bool, Any]:
    """Whether a session says anything about turn detection, and what."""
    found: Any = session
    for name in ("audio", "input", "turn_detection"):
        if not isinstance(found, dict) or name not in found:
            return False, None
        found = found[name]
    return True, found


def _with_detection(session: Event, detection: Event) -> Event:
    """A copy of a session that has turn detection, with another one."""
    heard = session["audio"]["input"] | {"turn_detection": detection}
    return session | {"audio": session["audio"] | {"input": heard}}


def _kept(detection: Event) -> Event:
    """The fields that are of interest here, if they are as short as they should be."""
    return {
        name: value
        for name, value in detection.items()
        if name in _OWN  # which are judged before they are kept
        or (name in _KEPT and isinstance(value, bool | int | float))
        or (name in _KEPT and isinstance(value, str) and len(value) <= WORD_CHARACTERS_MAX)
    }


def _agrees(stated: Event, given: Event) -> bool:
    """Whether what a backend states is what it was given, as far as it states it."""
    return all(stated.get(name, value) == value for name, value in given.items())
