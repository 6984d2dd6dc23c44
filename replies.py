"""Replies: what of the backend's responses is on its way to the client's ear.

    response.created, audio, response.done ──▶ Replies ──▶ play-out
                started, stopped, cut off ◀──         ◀── sent, drained, flushed

What it owns: which response's audio lies in the play-out, which may still come, and how much of an
item was heard. A backend makes audio faster than real time, so "made", "sounding" and "over" are
three different moments of a response.

Rules that stay true:
- A response that has started is over exactly once: it has stopped (made, and the last millisecond
  sent) or it was cut off. So does one that is forgotten because there are too many.
- Once it is cut off or over, no sample of a response goes to the play-out, whatever the backend
  still sends: under the same item, another item, or after its own end.
- A response that was asked for before an interruption, and comes into being after it, is cut off
  before its first sample.
- A response that its client asked for beside the conversation ("none") is no turn of the bot's: it
  is neither cancelled nor waited for. Where it sounds it is cut off like any other.
- Items are told apart by response and id together, so a backend that uses an id twice confuses
  nobody. Ids are of ID_CHARACTERS_MAX at most; audio under a longer one is dropped.

It speaks to no client and no backend: `conversation.py` does. Sans-IO.
"""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import audio

T = TypeVar("T")

ID_CHARACTERS_MAX = 512
"""Of the ids of responses and items; the API's own have about 30."""

REPLIES_MAX = 32
"""Responses that are being made or heard; there is one, rarely two."""

OVER_MAX = 256
"""Ended responses whose late audio is known for what it is. Late means seconds."""

HEARD_MAX = 256
"""Items whose milliseconds are remembered for truncations: as many as there are items."""

CUT_ITEMS_MAX = 16
"""Items of a response that was cut off which the backend is told about; there is one or two."""

ASKED_MAX = 32
ASKED_S_MAX = 5.0
"""Responses that were asked for and have not come into being. Of a backend that answers neither
with a response nor with an error nothing can be said after this long: what it creates then is
not taken for the answer."""


class Taken(enum.Enum):
    """What became of a piece of audio."""

    FIRST = enum.auto()
    """Taken, and nothing else is waiting: the first packet of its response leaves now."""
    MORE = enum.auto()
    DROPPED = enum.auto()
    """Its response has been cut off or is over."""
    UNHEARD = enum.auto()
    """The same, for the first piece of an item: the backend should know that none was heard."""
    FULL = enum.auto()
    """Too much of it: what fits is played, and the response ends there. Told once."""


class Cut(NamedTuple):
    """An item that was cut off."""

    item_id: str
    ms: int
    """So much of it was sent."""


@dataclass(slots=True)
class _Reply:
    pieces: set[str] = field(default_factory=set)
    """Names of its items in the play-out."""
    started: bool = False
    """A packet of it has been sent."""
    full: bool = False
    """More came than fits; the rest is dropped."""
    cut: bool = False
    """Interrupted: whatever comes now is dropped, and it does not stop any more."""
    aside: bool = False
    """It does not belong to the conversation."""
    items: dict[str, None] = field(default_factory=dict)
    """Of what was cut off: the items whose truncation has been told."""


@dataclass(slots=True)
class _Ask:
    event_id: str
    until: float
    aside: bool
    wanted: bool = True


class Replies:
    """The responses of one session. `now` is monotonic seconds."""

    def __init__(self, playout: audio.Playout) -> None:
        self._playout = playout
        self._replies: dict[str, _Reply] = {}  # from their creation to their end in both senses
        self._made: set[str] = set()  # of these, the ones to which nothing is added any more
        self._over: dict[str, None] = {}
        self._pieces: dict[str, tuple[str, str]] = {}  # play-out's name: response, item
        self._heard: dict[str, int] = {}
        self._asked: list[_Ask] = []
        self._names = 0
        self._news: list[tuple[str, str]] = []
        self.last: str | None = None
        """The response that started last."""

    # --- what there is -----------------------------------------------------------------------

    @property
    def making(self) -> list[str]:
        """The conversation's responses that are being made and were not cut off."""
        replies = self._replies.items()
        return [n for n, r in replies if not (r.cut or r.aside) and n not in self._made]

    @property
    def busy(self) -> bool:
        """Whether the bot has the floor: something is being made, or is still to be heard."""
        return bool(self._pieces or self.making)

    def is_aside(self, response_id: str) -> bool:
        """Whether a response was asked for beside the conversation."""
        reply = self._replies.get(response_id)
        return reply is not None and reply.aside

    def heard_ms(self, item_id: str) -> int | None:
        """How much of an item has been sent; None if it never came, or is forgotten."""
        for piece, (_, item) in self._pieces.items():
            if item == item_id:
                return self._playout.played_ms(piece)
        return self._heard.get(item_id)

    def shares(self) -> dict[str, float]:
        """Items that have not been heard out, and how much of what there is of each has, 0 to 1."""
        return {item: self._playout.share(piece) for piece, (_, item) in self._pieces.items()}

    # --- from the backend, and towards it ----------------------------------------------------

    def ask(self, event_id: str, now: float, *, aside: bool = False) -> None:
        """A response.create with that id is on its way to the backend."""
        self._asked = [ask for ask in self._asked if now < ask.until][-ASKED_MAX + 1 :]
        self._asked.append(_Ask(event_id, now + ASKED_S_MAX, aside))

    def refused(self, event_id: str) -> None:
        """The backend refuses that one."""
        self._asked = [ask for ask in self._asked if ask.event_id != event_id]

    def created(self, response_id: str, now: float) -> bool:
        """A response comes into being. False if it is to be cancelled: it comes too late."""
        reply = self._reply(response_id, now)
        return reply is None or not reply.cut

    def sound(self, response_id: str, item_id: str, pcm: bytes, now: float) -> Taken:
        """Audio of a response: to the play-out, unless the response is cut off or over."""
        reply = self._reply(response_id, now) if len(item_id) <= ID_CHARACTERS_MAX else None
        if reply is None or response_id in self._made or reply.full or not pcm:
            return Taken.DROPPED
        if reply.cut:
            if item_id in reply.items or len(reply.items) >= CUT_ITEMS_MAX:
                return Taken.DROPPED
            reply.items[item_id] = None
            return Taken.UNHEARD
        first = not self._pieces
        piece = self._piece(response_id, item_id)
        if piece is None:
            self._names += 1
            piece = str(self._names)
            self._pieces[piece] = response_id, item_id
            reply.pieces.add(piece)
        if self._playout.write(piece, pcm, now):
            return Taken.FIRST if first and not reply.started else Taken.MORE
        reply.full = True
        return Taken.FULL

    def item_done(self, response_id: object, item_id: object, now: float) -> None:
        """No more audio comes for an item. Some backends do not say of which response."""
        for piece, (response, item) in self._pieces.items():
            if item == item_id and response_id in (response, None):
                self._playout.finish(piece, now)

    def done(self, response_id: str, now: float) -> None:
        """The backend has made all of a response, or gives it up."""
        reply = self._replies.get(response_id)
        if reply is None:
            self._end(response_id)
            return
        self._made.add(response_id)
        for piece in reply.pieces:  # a response that failed may lack the items' own ends
            self._playout.finish(piece, now)
        self._stop_if_over(response_id, reply)

    # --- from the play-out -------------------------------------------------------------------

    def news(self) -> list[tuple[str, str]]:
        """("started" or "stopped", response), in order, since the last call."""
        self._listen()
        news, self._news = self._news, []
        return news

    def _listen(self) -> None:
        for what in self._playout.events():
            found = self._pieces.get(what.item)
            if found is None:
                continue
            response_id, _ = found
            reply = self._replies[response_id]
            if isinstance(what, audio.Started):
                if not reply.started:
                    reply.started = True
                    self.last = response_id
                    self._news.append(("started", response_id))
            else:
                self._forget(what.item, what.ms)
                self._stop_if_over(response_id, reply)

    def cut(self, now: float) -> tuple[list[str], list[Cut]]:
        """Silence at once: the responses that had started, and the items that did not end.

        Ask for `news` before: what has been sent until now has been heard. What is being made is
        cut off as well, and so is what was asked for and has not come into being.
        """
        self._listen()
        for ask in self._asked:
            ask.wanted = ask.aside
        cut = []
        for piece, ms in self._playout.flush(now):
            response_id, item_id = self._pieces[piece]
            self._forget(piece, ms)
            self._replies[response_id].items[item_id] = None
            cut.append(Cut(item_id, ms))
        silenced = []
        for response_id, reply in list(self._replies.items()):
            if reply.aside and not reply.started and not reply.items:
                continue
            if reply.started and not reply.cut:
                silenced.append(response_id)
            reply.cut = True
            if response_id in self._made:
                self._end(response_id)
        return silenced, cut

    # --- inside ------------------------------------------------------------------------------

    def _reply(self, response_id: str, now: float) -> _Reply | None:
        """The account of a response, a new one if need be; None if there must be none.

        A new one is taken for the answer to what was asked for first, also where a backend sends
        audio without a response.created.
        """
        reply = self._replies.get(response_id)
        if reply is None:
            if response_id in self._over or len(response_id) > ID_CHARACTERS_MAX:
                return None
            if len(self._replies) >= REPLIES_MAX and not self._make_room():
                self._end(response_id)
                return None
            asked = [ask for ask in self._asked if now < ask.until]
            self._asked = asked[1:]
            reply = self._replies[response_id] = _Reply()
            if asked:
                reply.cut, reply.aside = not asked[0].wanted, asked[0].aside
        return reply

    def _make_room(self) -> bool:
        """Forget the oldest response of which nothing lies in the play-out, if there is one."""
        oldest = next((name for name, r in self._replies.items() if not r.pieces), None)
        if oldest is None:
            return False
        self._made.add(oldest)
        self._stop_if_over(oldest, self._replies[oldest])
        return True

    def _stop_if_over(self, response_id: str, reply: _Reply) -> None:
        if response_id in self._made and not reply.pieces:
            self._end(response_id)
            if reply.started and not reply.cut:
                self._news.append(("stopped", response_id))

    def _end(self, response_id: str) -> None:
        self._replies.pop(response_id, None)
        self._made.discard(response_id)
        if len(response_id) <= ID_CHARACTERS_MAX:
            _remember(self._over, response_id, None, OVER_MAX)

    def _piece(self, response_id: str, item_id: str) -> str | None:
        return next((p for p, who in self._pieces.items() if who == (response_id, item_id)), None)

    def _forget(self, piece: str, ms: int) -> None:
        response_id, item_id = self._pieces.pop(piece)
        self._replies[response_id].pieces.discard(piece)
        _remember(self._heard, item_id, ms, HEARD_MAX)


def _remember(memory: dict[str, T], key: str, value: T, most: int) -> None:
    """Put it in as the newest; forget the oldest of too many."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]
