"""Attendants: servers of an application's that follow a call's events and take part in them.

    data channel ◀── Channel ──▶ Attendants ──▶ attendant, attendant, ...
                                     ▲ events of theirs, under ids of ours

OpenAI's API calls such a connection the sideband. What the data channel is told, each of them is
told as well, and what it may ask, so may they; a call without a data channel has nobody else.

What it owns: who attends a call, what waits for each of them, and which error is whose.

Rules that stay true:
- The first event for each is `session.created`, with the session as it is when it comes.
- An error about an attendant's own event goes to that attendant alone, with its own event_id. That
  needs ids that no two of them choose alike, so a backend sees ids of ours.
- Nothing waits without a bound: who does not take its messages is dropped, and the call goes on.
- For a call without attendants it is an empty list to look at, an event.

It knows no connection (attendance.py) and does not know what events mean (conversation.py).
Sans-IO.
"""

from collections.abc import Callable

ATTENDANTS_MAX = 4
"""At a call: an application's server, one that records, one that is just taking over."""

WAITING_OCTETS_MAX = 1 << 20
"""What waits for one of them: a minute of a model that says much, or two of the largest events."""

ASKED_MAX = 128
"""Events of attendants whose errors can still be told apart. A backend answers within seconds; an
error about an older one has nobody to go to but all."""

ENDED, TOO_SLOW = 1000, 1008
"""Close codes of a WebSocket (RFC 6455 section 7.4.1): the call has ended; it read too slowly."""

TOO_SLOW_REASON = "This sideband reads too slowly."


class Crowded(Exception):
    """There is no room for another attendant."""


class Attendant:
    """One of them: what it is to be told waits here until its connection takes it."""

    def __init__(self, ready: Callable[[], None]) -> None:
        """`ready` is called when there is something to take, or an end."""
        self.over: tuple[int, str] | None = None
        """Why it is to be closed once nothing waits any more: a close code and a sentence."""
        self._ready = ready
        self._waiting: list[str] = []
        self._octets = 0

    def tell(self, message: str) -> None:
        """A message for it. One that has left too much lying about gets no more."""
        if self.over is not None:
            return
        self._octets += len(message)
        if self._octets > WAITING_OCTETS_MAX:
            self._waiting = []
            self.end(TOO_SLOW, TOO_SLOW_REASON)
            return
        self._waiting.append(message)
        self._ready()

    def end(self, code: int, reason: str) -> None:
        """Nothing more comes for it."""
        if self.over is None:
            self.over = code, reason
            self._ready()

    def take(self) -> list[str]:
        """What waits, in its order. Drains."""
        waiting, self._waiting = self._waiting, []
        self._octets = 0
        return waiting


class Attendants:
    """Those of one call."""

    def __init__(self, tag: str) -> None:
        """Ids are made of `tag`, which is this session's alone."""
        self._tag = tag
        self._new: list[Attendant] = []  # have not been told of the session
        self._here: list[Attendant] = []
        self._asked: dict[str, tuple[Attendant, str | None]] = {}
        self._events = 0

    def __len__(self) -> int:
        return len(self._new) + len(self._here)

    @property
    def waits(self) -> bool:
        """Whether somebody has not been told of the session."""
        return bool(self._new)

    def join(self, attendant: Attendant) -> None:
        """One more, to be greeted. Raises Crowded."""
        if len(self) >= ATTENDANTS_MAX:
            raise Crowded(f"A call has at most {ATTENDANTS_MAX} sidebands.")
        self._new.append(attendant)

    def leave(self, attendant: Attendant) -> None:
        """Its connection has ended; nothing happens if it is not here."""
        for listed in (self._new, self._here):
            if attendant in listed:
                listed.remove(attendant)
        self._asked = {name: by for name, by in self._asked.items() if by[0] is not attendant}

    def greet(self, created: str) -> None:
        """Tell the new ones of the session; from now on they are told everything."""
        new, self._new = self._new, []
        self._here += new
        for attendant in new:
            attendant.tell(created)

    def tell(self, message: str) -> None:
        """Tell all that have been greeted. Who is dropped with that leaves its place to others."""
        for attendant in tuple(self._here):
            attendant.tell(message)
            if attendant.over is not None:
                self.leave(attendant)

    def asks(self, attendant: Attendant, event_id: str | None) -> str:
        """An id of ours for an event of its, which may have one of its own."""
        self._events += 1
        ours = f"side_{self._tag}{self._events:04d}"
        self._asked[ours] = attendant, event_id
        if len(self._asked) > ASKED_MAX:
            del self._asked[next(iter(self._asked))]
        return ours

    def asked(self, event_id: object) -> tuple[Attendant, str | None] | None:
        """Whose event has that id of ours, and what its own is; None for others' events."""
        return self._asked.get(event_id) if isinstance(event_id, str) else None

    def is_ours(self, event_id: object) -> bool:
        """Whether an id has been made here, even if it has been forgotten whose it was."""
        return isinstance(event_id, str) and event_id.startswith(f"side_{self._tag}")

    def end(self, reason: str) -> None:
        """The call has ended."""
        for attendant in self._new + self._here:
            attendant.end(ENDED, reason)
        self._new, self._here, self._asked = [], [], {}
