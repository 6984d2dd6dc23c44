"""The roster: which transceivers there are, what is known of each, and who is asked first.

What it owns: the transceivers by address, whether from the settings, announced in Redis
(presence.py) or known by their health alone; how full each is; how many calls a key has.

Rules that stay true:
- What is known here is a second old and only orders the attempts: that opinion never turns a caller
  away. One exception: a transceiver that drains has said no to everything, and is not asked.
- A report and the placements since it are never counted twice, nor not at all: a report says how
  many calls its process had opened by then (`opened`), and each placement which of them it was.
- What was seen is nearer than what is announced: a transceiver that did not answer an offer is
  asked last until it answers something, or another process has its place.
- A lease that ends is no proof that a transceiver is gone: Redis may have been emptied. It is asked
  last from then on, and about its health directly (`to_ask`); without an answer it is forgotten.
- It is bounded: `presence.TRANSCEIVERS_MAX` beside those in the settings.

Sans-IO: `now` is an argument, chance is the caller's.
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import endpoints
import ufrag
from presence import TRANSCEIVERS_MAX, Report

FORGET_S = 10.0
"""How long a transceiver that is neither announced nor in the settings and does not answer is kept:
the restart of a process, or a Redis that lists it again."""

NONE: Mapping[int, ufrag.Cluster] = {}

ATTEMPTS_MAX = 16
"""How many transceivers one offer is shown to. With hundreds that are all full, a burst would
otherwise be multiplied by their number; 16 times no by chance is an honest no."""


class Health(enum.Enum):
    """What is known of a transceiver: one that has not been heard of is asked like one that serves.
    AWAY is one that did not answer, or whose lease has ended."""

    UNKNOWN = "has not been heard of"
    SERVING = "serves"
    DRAINING = "drains"
    AWAY = "is away"


@dataclass(slots=True, eq=False)
class Attempt:
    """An offer that is being shown to a transceiver, or that it has taken since its last report."""

    key: str
    placed: bool = False
    """True once the transceiver has taken it."""
    number: int = 0
    """Which of the calls that the process has opened it is then; 0 if it did not say."""

    def reported(self, report: Report) -> bool:
        """True if this report has it. One that does not say how many calls there were has all."""
        return self.placed and (report.opened is None or self.number <= report.opened)


@dataclass(slots=True, eq=False)
class Peer:
    """A transceiver, as far as signaling knows it."""

    endpoint: endpoints.Endpoint
    fixed: bool = True
    """True if it stands in the settings: then it is never forgotten."""
    health: Health = Health.UNKNOWN
    report: Report = field(default_factory=Report)
    """The last it said."""
    listed: bool = False
    """True while Redis lists it: then there is no need to ask it about its health."""
    full: bool = False
    """It has refused a call since its last report."""
    heard_at: float = 0.0
    """When it was last heard of."""
    since: list[Attempt] = field(default_factory=list)
    """Offers that its last report does not have yet."""
    doubted: bool = False
    """It did not answer us, whatever it may announce: it is asked about its health directly."""

    @property
    def url(self) -> str:
        """Where its control API is."""
        return f"http://{self.endpoint}/v1"

    @property
    def serving(self) -> bool:
        """True if it is expected to take calls."""
        return self.health in (Health.SERVING, Health.UNKNOWN)

    @property
    def fullness(self) -> float:
        """How near it is to refusing calls, for whichever reason: 1 is there."""
        report, since = self.report, len(self.since)
        connecting = (report.connecting + since) / report.connecting_max
        return max(report.load, (report.sessions + since) / report.sessions_max, connecting)

    @property
    def last(self) -> bool:
        """True if it is asked after those that are expected to say yes."""
        return not self.serving or self.full or self.fullness >= 1

    def heard(self, report: Report | None, now: float, listed: bool = False) -> None:
        """Take over what it says of itself, in Redis if `listed`, else to us; None is nothing that
        can be understood."""
        self.listed |= listed
        if report is None:
            self.failed()
            return
        known = self.report
        if report.started != known.started:
            self.since = [each for each in self.since if not each.placed]
        elif listed and (self.doubted or 0 < report.beat <= known.beat):
            return
        self.since = [each for each in self.since if not each.reported(report)]
        self.report, self.full, self.doubted = report, False, False
        self.health = Health.DRAINING if report.draining else Health.SERVING
        self.heard_at = now

    def failed(self) -> None:
        """It did not answer."""
        self.health, self.doubted = Health.AWAY, True

    def attempt(self, key: str) -> Attempt:
        """An offer is about to be shown to it: until `refused` or `took`, it counts."""
        made = Attempt(key)
        self.since.append(made)
        return made

    def took(self, attempt: Attempt, number: int) -> None:
        """It said yes; `number` is which of its calls this is, 0 if it did not say."""
        attempt.placed, attempt.number = True, number
        if 0 < number <= (self.report.opened or 0):  # the report overtook the answer
            self.refused(attempt)

    def refused(self, attempt: Attempt) -> None:
        """It did not take this one."""
        if attempt in self.since:
            self.since.remove(attempt)


Shuffle = Callable[[list[Peer]], None]
"""Puts them into a random order: random.Random.shuffle."""


def everybody(_: Peer) -> bool:
    """True of any transceiver: there is one Redis, or none."""
    return True


class Roster:
    """All transceivers."""

    def __init__(self, fixed: Iterable[endpoints.Endpoint]) -> None:
        """`fixed` are those in the settings."""
        self._peers = {endpoint: Peer(endpoint) for endpoint in fixed}
        self._most = len(self._peers) + TRANSCEIVERS_MAX

    @property
    def peers(self) -> list[Peer]:
        """All that are known now."""
        return list(self._peers.values())

    def listed(
        self,
        reports: dict[endpoints.Endpoint, Report],
        now: float,
        ours: Callable[[Peer], bool] = everybody,
    ) -> list[Peer]:
        """Redis lists these, and no others of those that are its own; returns those whose lease has
        just ended."""
        lapsed = []
        for endpoint, report in reports.items():
            peer = self._peers.get(endpoint)
            if peer is None:
                if len(self._peers) >= self._most:
                    continue
                peer = self._peers[endpoint] = Peer(endpoint, fixed=False)
            peer.heard(report, now, listed=True)
        for peer in self.peers:
            if peer.endpoint in reports or not ours(peer):
                continue
            if peer.listed:
                peer.listed = False
                lapsed.append(peer)
                peer.health = Health.AWAY
            elif not peer.fixed and not peer.serving and now - peer.heard_at > FORGET_S:
                del self._peers[peer.endpoint]
        return lapsed

    def unlisted(self, ours: Callable[[Peer], bool] = everybody) -> None:
        """Redis says nothing of its own: what is known stands, and each is asked for itself."""
        for peer in self._peers.values():
            peer.listed &= not ours(peer)

    def to_ask(self) -> list[Peer]:
        """Those whose health nobody else reports, or not credibly."""
        return [peer for peer in self._peers.values() if peer.doubted or not peer.listed]

    def calls_of(self, key: str) -> int:
        """How many calls a key has: as reported, placed since, and being placed. Those of a
        transceiver that is away have ended, as far as anybody knows."""
        return sum(
            peer.report.calls_by_key.get(key, 0) + sum(each.key == key for each in peer.since)
            for peer in self._peers.values()
            if peer.health is not Health.AWAY
        )

    def order(
        self, shuffle: Shuffle, near: Sequence[int] = (), homes: Mapping[int, ufrag.Cluster] = NONE
    ) -> list[Peer]:
        """Whom to show an offer, one after the other; those of the clusters in `near` in the order
        of these, if any are named."""
        if not near:
            return order_of(self.peers, shuffle)[:ATTEMPTS_MAX]
        groups: dict[int | None, list[Peer]] = {id: [] for id in (*near, None)}
        for peer in self.peers:
            at = home(peer, homes)
            groups[at if at in groups else None].append(peer)
        return nearest_first([group for group in groups.values() if group], shuffle)


def home(peer: Peer, homes: Mapping[int, ufrag.Cluster]) -> int | None:
    """The cluster that a transceiver belongs to: as it says itself, if it can be true, else the
    first in which its address lies; None for none."""
    at = peer.endpoint
    said = homes.get(peer.report.cluster) if peer.report.cluster is not None else None
    if said is not None and said.contains(at.address, at.port):
        return said.id
    for each in homes.values():
        if each.contains(at.address, at.port):
            return each.id
    return None


def nearest_first(groups: list[list[Peer]], shuffle: Shuffle) -> list[Peer]:
    """In which order to ask those of several clusters, the nearest of these first.

    No cluster but the last has more than half of the attempts that are left: hundreds that have
    filled up within the age of their reports would else have them all, and nobody would hear of the
    call in the next cluster, which has room.
    """
    able, later, last = list[Peer](), list[Peer](), list[Peer]()
    for number, group in enumerate(groups, 1):
        asked = order_of(group, shuffle)
        most = max(1, (ATTEMPTS_MAX - len(able)) // (1 if number == len(groups) else 2))
        willing = [peer for peer in asked if not peer.last]
        able += willing[:most]
        later += willing[most:]
        last += [peer for peer in asked if peer.last]
    return (able + later + last)[:ATTEMPTS_MAX]


def order_of(peers: list[Peer], shuffle: Shuffle) -> list[Peer]:
    """In which order to ask: the better of two at random, then the rest at random, then those that
    are full or have not answered. Those that drain are not asked.

    Two random choices keep the fullest close to the average (Mitzenmacher 2001) without the herd
    that runs to the single least loaded one when several instances see the same old figures.
    """
    asked = [peer for peer in peers if peer.health is not Health.DRAINING]
    shuffle(asked)
    asked.sort(key=lambda peer: peer.last)
    able = sum(not peer.last for peer in asked)
    if able >= 2:
        asked[:2] = sorted(asked[:2], key=lambda peer: peer.fullness)
    return asked
