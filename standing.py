"""Standing: how sites and clusters are, from what was last heard of their parts.

What it owns: what becomes of a relay that does not answer, how the figures of several relays make
one of their site, those of several transceivers one of their cluster, and how those clients count
that no report has yet.

Rules that stay true:
- Of what nothing was heard nothing is said: steering takes it to be healthy.
- One silence is none: a relay is lost after MISSES of them. One that says itself that it takes no
  clients is believed at once.
- A site that has lost some of its relays has the room of the others.
- Clients that were sent to a site count there until a report must have them, rather a little too
  long: a burst is over before the next report is there.
- What a site or a cluster had when it was lost is on its way to others, and forgotten after FADE_S:
  by then they are where they are, and count there.

Sans-IO: `now` is an argument.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ufrag
from roster import Peer, home
from steering import State

MISSES = 3
"""Silences in a row after which a relay is lost. Fewer, and a busy second loses a site; more, and
new clients wait for longer. Those that are told of it meanwhile go on at their second site."""

FADE_S = 60.0
"""Until then clients of a site that was lost turn up elsewhere: ICE takes seconds, calls that begin
again some more."""


@dataclass(slots=True)
class _Relay:
    ready: bool | None = None
    """What it said last; None before it has said anything."""
    flows: int = 0
    misses: int = 0

    @property
    def lost(self) -> bool:
        return self.misses >= MISSES

    @property
    def serves(self) -> bool:
        return not self.lost and self.ready is not False


class Standing:
    """One site's."""

    def __init__(self, capacity: int, relays: Iterable[str]) -> None:
        """`relays` are names of them, such as where each is asked."""
        self._capacity = capacity
        self._relays = {name: _Relay() for name in relays}
        self._new = self._settling = 0
        self._had, self._ailing_since = 0.0, None  # type: float, float | None

    def heard(self, relay: str, ready: bool, flows: int | None, now: float) -> None:
        """It answered; `flows` is None if it did not say how many it has."""
        found = self._relays[relay]
        found.ready, found.misses = ready, 0
        found.flows = found.flows if flows is None else flows
        self._judge(now)

    def failed(self, relay: str, now: float) -> None:
        """It did not answer."""
        self._relays[relay].misses += 1
        self._judge(now)

    def sent(self) -> None:
        """A client was sent here."""
        self._new += 1

    def turn(self) -> None:
        """All relays were asked. Those clients have arrived, if they ever will, that were sent
        before the time before."""
        self._settling, self._new = self._new, 0

    def state(self, now: float) -> State | None:
        """How it is; None if nothing is known."""
        known = [each for each in self._relays.values() if each.ready is not None or each.lost]
        if not known:
            return None
        serving = [each for each in self._relays.values() if each.serves]
        if not serving:
            since = now if self._ailing_since is None else self._ailing_since
            return State(False, self._had * max(0.0, 1 - (now - since) / FADE_S))
        capacity = max(1, self._capacity * len(serving) // len(self._relays))
        return State(True, self._flows(serving) / capacity, capacity)

    def ailments(self) -> list[str]:
        """What is wrong with which relay, for the log."""
        return [
            f"{name} {'does not answer' if each.lost else 'takes no clients'}"
            for name, each in self._relays.items()
            if not each.serves
        ]

    def silent(self) -> bool:
        """True while a relay does not answer, and is not yet lost for it."""
        return any(0 < each.misses < MISSES for each in self._relays.values())

    def _flows(self, relays: Iterable[_Relay]) -> int:
        return sum(each.flows for each in relays) + self._new + self._settling

    def _judge(self, now: float) -> None:
        if any(each.serves for each in self._relays.values()):
            self._had = self._flows(self._relays.values()) / self._capacity
            self._ailing_since = None
        elif self._ailing_since is None:
            self._ailing_since = now


class Clusters:
    """All clusters, and what those had that were lost a moment ago."""

    def __init__(self, homes: Mapping[int, ufrag.Cluster]) -> None:
        self._homes = homes
        self._had: dict[int, tuple[State, float]] = {}

    def states(self, peers: Iterable[Peer], now: float) -> dict[int, State]:
        """How they are, by these transceivers."""
        found = of_clusters(peers, self._homes)
        for id, state in found.items():
            if state.healthy:
                self._had[id] = state, now
            elif id in self._had:
                (_, load, capacity), at = self._had[id]
                found[id] = State(False, load * max(0.0, 1 - (now - at) / FADE_S), capacity)
        return found


def of_clusters(peers: Iterable[Peer], homes: Mapping[int, ufrag.Cluster]) -> dict[int, State]:
    """How each cluster is, by its transceivers.

    A cluster is healthy while somebody in it would take a call, or might. A transceiver that has
    refused one since its last report counts as full. Of a cluster in which nobody is known, nobody
    can take a call.
    """
    weights, loads = dict.fromkeys(homes, 0), dict.fromkeys(homes, 0.0)
    for peer in peers:
        id = home(peer, homes)
        if id is not None and peer.serving:
            most = peer.report.sessions_max
            weights[id] += most
            loads[id] += most * (max(1.0, peer.fullness) if peer.full else peer.fullness)
    return {
        id: State(True, loads[id] / weight, weight) if weight else State(False)
        for id, weight in weights.items()
    }
