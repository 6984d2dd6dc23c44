"""One complete WebRTC call of a load test: it connects, talks, listens, ends, or comes back.

The protocol is callers.Caller's, over a socket of this call's own. A call is a conversation: when
its path is dead, and it was told to come back, it goes on over another connection (`?resume=`), and
its record goes on with it. The record stays when the call has ended.
"""

from dataclasses import dataclass, field
from typing import Any

FAILURES = (
    "refused", "unauthorized", "too many", "unavailable", "unreachable", "no answer", "bad answer",
    "forbidden candidate", "no ICE", "no DTLS", "no channel", "no session", "no audio",
    "wrong audio", "lost", "ended by the server",
)  # fmt: skip


@dataclass
class Return:
    """How a call came back; nanoseconds of time.monotonic_ns(), None for what has not happened."""

    heard_ns: int
    """The last packet of audio before."""
    noticed_ns: int
    """When it was known that the call has gone."""
    offered_ns: int | None = None
    connected_ns: int | None = None
    """The new connection can be spoken through."""
    resumed: bool | None = None
    """Whether the conversation was carried over; None until that is known."""
    spoken_ns: int | None = None
    """The last packet of the first turn that was said after it."""
    reply_ns: int | None = None
    """The first audible packet of a reply."""


@dataclass
class Call:
    """One call and what is remembered of it."""

    number: int
    state: str = "offering"
    """`offering`, `connecting`, `talking`, `returning`, `ended`, `failed`."""
    failure: str | None = None
    """One of FAILURES."""
    why: str = ""
    """The sentence behind `failure`: what the server said, for example."""
    call_id: str | None = None
    offered_ns: int = 0
    ended_ns: int | None = None
    moments: dict[str, float] = field(default_factory=dict)
    """Milliseconds since the first offer: `answered`, `checked`, `connected`, `opened`,
    `session.created`, `first_audio`, `first_reply`."""
    events: list[tuple[int, str]] = field(default_factory=list)
    """When each event of the data channel came, and its type (with the code, for errors)."""
    returns: list[Return] = field(default_factory=list)

    def silence_ms(self, since_ns: int, until_ns: int) -> float:
        """The longest time in which something should have been heard and was not.

        Pauses that timestamps explain do not count. A silence that has not ended by `until_ns`
        does; the one between two connections of a call that came back, too.
        """
        raise NotImplementedError

    def gaps_ms(self, since_ns: int, until_ns: int, over_ms: float = 40.0) -> list[float]:
        """All such silences of more than `over_ms`."""
        raise NotImplementedError

    def lost_down(self, since_ns: int, until_ns: int) -> int:
        """Packets missing by their sequence numbers among those that came in that time."""
        raise NotImplementedError

    def received(self, since_ns: int, until_ns: int) -> int:
        """Packets of RTP that came in that time."""
        raise NotImplementedError

    def lost_up(self, since_ns: int, until_ns: int) -> int | None:
        """Packets of ours that the transceiver lacks, by its reports (one a second): of the last
        one before `since_ns` and of the first one after `until_ns`, or the last there is. None
        without two reports of one connection."""
        raise NotImplementedError

    def move(self, *, check: bool = False) -> None:
        """From now on the call sends from another port, on loopback from another address, too.

        As behind a NAT that lost its table, where nothing but media and consent shows it; or, with
        `check`, as a client that changes its network and checks the new path at once.
        """
        raise NotImplementedError

    def end(self, *, politely: bool = True) -> Any:
        """Hang up (an awaitable), or vanish."""
        raise NotImplementedError
