"""Records: what of a conversation outlives its call.

A transceiver can die, and a client can lose its way to it. The conversation then goes on in another
call, at the same transceiver or at another one: it begins with the record of this one.

    Chronicle, while the call lasts ──▶ Record ──▶ sealed octets ──▶ memory of others (archive.py)
                        the next call ◀── Record ◀──

What it owns: what is worth keeping (the items as words, and what the client has set of its
session), how a record is written, its bounds, and who may have it.

Rules that stay true:
- What the client hears of as kept is what the model is told: words. Sound is not kept. Of a reply
  that was not heard to its end, only about as much is kept as was heard, as `incomplete`.
- A record is sealed (sealing.py) for its call id: who has Redis alone reads nothing, changes
  nothing, and swaps nothing between calls. Putting an older record of the same call back is all
  that is left, and only for as long as that would be valid anyway (`written_at`).
- It stands under a hash of the call id, since the id itself lets its bearer resume the call.
- It is bounded in octets, the oldest items going first. It is not compressed: that would save Redis
  four fifths of some kilobytes, and take as long again as everything else, or twice that, for which
  the audio of all calls waits.
- Whatever octets are found end in a Record or in None.

Sans-IO: `unix` is seconds since 1970, and the salt is an argument.
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

import realtime
import sealing
import ufrag
from memory import Memory
from realtime import Event

VERSION = 1
"""Of what is inside. Another one is not understood: that conversation cannot be resumed."""

ITEMS_OCTETS_MAX = 65_536
"""Of a record's items as JSON: a quarter of an hour of talk. They are written anew with each turn,
to a Redis that others use as well; a model that has this much knows what is being talked of."""

OCTETS_MAX = ITEMS_OCTETS_MAX + realtime.SESSION_OCTETS_MAX + 4_096
"""Of a record as it is stored. What is longer was not written here."""

SKEW_S = 30.0
"""By how much the clocks of two machines may differ."""

PENDING_MAX = 32
"""Updates of a session that its backend has not answered: of more the oldest counts as accepted,
since some servers confirm none."""

_PREFIX = b"earshot:record:"


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation, as it can be gone on with."""

    session: Event
    """What the client has set, as a session.update would name it; its model included."""
    items: tuple[Event, ...]
    """Items to create, in their order. One with the `status` incomplete was not heard out."""
    key: str
    """Name of the key that opened the call: nobody else may go on with it."""
    dialect: str
    """What its client spoke."""


class Chronicle:
    """What is worth keeping of one conversation, followed as it goes on."""

    def __init__(self, session: Event | None = None, items: Sequence[Event] = ()) -> None:
        """`session` came with the offer; `items` are those that the conversation begins with."""
        self.memory = Memory(items)
        self._first = items
        self._updates = 0
        self._pending: deque[tuple[str, Event]] = deque()
        self.session = session or {}
        """What the client has set and nobody has refused."""

    @property
    def revision(self) -> int:
        """Another one after each change."""
        return self.memory.revision + self._updates

    def begins_with(self) -> list[Event]:
        """The items that the conversation begins with, as its client sees them. Said once."""
        first, self._first = self._first, ()
        return [{"object": "realtime.item", "status": "completed", **item} for item in first]

    def asked(self, event_id: str, update: Event) -> None:
        """The client asks for other settings, by an event of that id."""
        self._pending.append((event_id, update))
        if len(self._pending) > PENDING_MAX:
            self.confirmed()

    def confirmed(self) -> None:
        """The backend has accepted the oldest update there is."""
        if self._pending:
            merged = realtime.merged(self.session, self._pending.popleft()[1])
            if len(_json(merged)) <= realtime.SESSION_OCTETS_MAX:
                self.session = merged
                self._updates += 1

    def turned_down(self, event_id: object) -> None:
        """The backend has refused what that event asked for."""
        self._pending = deque(each for each in self._pending if each[0] != event_id)

    def record(self, shares: Mapping[str, float], key: str, dialect: str) -> Record:
        """The conversation as it could be gone on with if the call ended now.

        `shares` says how much of the items that are still to be heard has been, 0 to 1.
        """
        return Record(self.session, bounded(self.memory.kept(shares)), key, dialect)


def bounded(items: Sequence[Event]) -> tuple[Event, ...]:
    """The newest of the items that fit into ITEMS_OCTETS_MAX, in their order.

    A function's output whose call does not fit goes with it: servers refuse what answers nothing.
    """
    room, first = ITEMS_OCTETS_MAX, len(items)
    for item in reversed(items):
        room -= len(_json(item)) + 1
        if room < 0:
            break
        first -= 1
    calls, kept = set(), []
    for item in items[first:]:
        if item.get("type") == "function_call":
            calls.add(item.get("call_id"))
        if item.get("type") != "function_call_output" or item.get("call_id") in calls:
            kept.append(item)
    return tuple(kept)


def name_of(call_id: str) -> bytes:
    """The name in Redis of a call's record."""
    digest = hashlib.blake2b(call_id.encode(), digest_size=16, person=b"earshot record")
    return _PREFIX + digest.hexdigest().encode()


def sealer(keyring: ufrag.Keyring) -> sealing.Sealer:
    """What seals records, and nothing else."""
    return sealing.Sealer(keyring, b"record")


def written(
    record: Record, call_id: str, sealer: sealing.Sealer, salt: bytes, unix: float
) -> bytes:
    """A record as it is stored, at most OCTETS_MAX; empty if JSON cannot say it."""
    content = _json(
        {
            "version": VERSION,
            "written_at": unix,
            "session": record.session,
            "items": record.items,
            "key": record.key,
            "dialect": record.dialect,
        }
    )
    sealed = sealer.seal(content, salt, call_id.encode()) if content else b""
    return sealed if len(sealed) <= OCTETS_MAX else b""


def read(
    octets: bytes, call_id: str, sealer: sealing.Sealer, unix: float, valid_s: float
) -> Record | None:
    """The record of a call, if these octets are one and were written at most `valid_s` ago."""
    content = sealer.open(octets, call_id.encode())
    if content is None:
        return None
    found = orjson.loads(content)  # as we wrote it: nobody else could
    if found.get("version") != VERSION or unix - found["written_at"] > valid_s + SKEW_S:
        return None
    return Record(found["session"], tuple(found["items"]), found["key"], found["dialect"])


def _json(value: object) -> bytes:
    """Empty for what JSON cannot say."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b""
