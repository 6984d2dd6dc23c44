"""Adapters: what clients speak on their data channel, beside one another over one session.

    client ◀──▶ data channel ◀──▶ Adapter ◀──▶ Conversation

A conversation speaks the events of the Realtime API, whoever listens. An adapter stands in front of
it like one more client of that API, and speaks to the real one in its own words: it turns what that
says into client events, and server events into what that understands. The Realtime API's own
adapter changes nothing.

What it owns: what an adapter is, and the table of those there are. A new dialect is a module with
an adapter, and an entry in DIALECTS.

Rules that stay true:
- An adapter sees exactly what a client of the Realtime API would see on its channel, in that order,
  and can do no more to the conversation than such a client.
- Any message from a client ends in events, in an answer, or in nothing, never in an exception.
- The door that a call came by decides, unless its channel says `oai-events`: then its client speaks
  Realtime.

(The names that older model servers use for the same events are dialect.py's concern.) Sans-IO.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import realtime
import rtvi
from realtime import Event


class Adapter(Protocol):
    """One client's dialect. Methods that need the time take monotonic seconds as `now`.

    After each call the owner takes `to_client` and then `asked`.
    """

    leaves: bool
    """The client has asked to end the call, which no event of the Realtime API does."""

    def from_client(self, message: str | bytes, now: float) -> Sequence[str | bytes]:
        """What a message of the client says as client events, JSON."""

    def to_client(self, events: list[str], now: float) -> list[str]:
        """Messages for the client: server events, JSON, in its dialect, and what it has to say
        itself. To be called without events too."""

    def asked(self) -> Sequence[str]:
        """Client events that follow from what the server has said. Drains."""

    def farewell(self) -> Sequence[str]:
        """What the client is told last when its call is ended by request."""


class Realtime:
    """The Realtime API itself: everything passes as it is."""

    leaves = False

    def __init__(self, unix_offset_s: float, resumed: bool) -> None:
        """It has nothing to remember."""

    def from_client(self, message: str | bytes, now: float) -> Sequence[str | bytes]:
        """The message: it is an event already, or the conversation says what is wrong with it."""
        return (message,)

    def to_client(self, events: list[str], now: float) -> list[str]:
        """The events."""
        return events

    def asked(self) -> Sequence[str]:
        """Nothing, ever."""
        return ()

    def farewell(self) -> Sequence[str]:
        """Nothing: that API has no word for it, and its clients see the connection close."""
        return ()


@dataclass(frozen=True, slots=True)
class Dialect:
    """What clients may speak."""

    adapter: Callable[[float, bool], Adapter]
    """Makes one of what has to be added to `now` for seconds since 1970, and whether the
    conversation began in another call."""
    labels: frozenset[str]
    """Of the data channels that its clients open for it."""
    repeats: bool = False
    """Its clients send their first settings with every offer, also when they come back: what has
    been set in the conversation since is newer."""


DIALECTS = {
    "realtime": Dialect(Realtime, frozenset(("oai-events",))),
    "rtvi": Dialect(rtvi.Rtvi, frozenset(("chat", "rtvi-ai", "oai-events")), repeats=True),
}
"""By the name under which signaling opens a call. Another name is `realtime`."""


def known(dialect: str) -> Dialect:
    """What a call was opened for."""
    return DIALECTS.get(dialect, DIALECTS["realtime"])


def settings(dialect: str, before: Event, offered: Event) -> Event:
    """What a conversation goes on with: what was set `before`, and what comes with the offer."""
    if known(dialect).repeats:
        before, offered = offered, before
    return realtime.merged(before, offered)


def of(dialect: str, label: str, unix_offset_s: float, *, resumed: bool) -> Adapter:
    """An adapter for the client of a call that was opened for a dialect, on a channel so named."""
    if label in DIALECTS["realtime"].labels:
        dialect = "realtime"
    return known(dialect).adapter(unix_offset_s, resumed)
