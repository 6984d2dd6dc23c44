"""Steering: where a client enters, and which cluster takes its call.

    Steering(sites, places).decide(Request(35.7, 139.7, key=b"…"), {"tokyo": State()}, {1: State()})
        -> Decision(clusters=(2, 1), relays=((tokyo, [2001:db8::5]:3478), …), why=("…",))

What it owns: who gives clients away and to whom, and the order of relay addresses, in which a
client's ICE falls over from one site to the next by itself. How long ways are says mileage.py.

What counts is the whole way in milliseconds, from the client by the public Internet to a site and
from there by the backbone to the cluster: the nearest site may be a detour. So first the cluster
is chosen, by the least that it takes over any site; then the sites are gone through in the order
of the way over each to that cluster. Who ends up at another site than the first, since that is
full or lost, gets the cluster that is nearest from there. Of whom nothing is known, the site is
drawn, and the cluster is the nearest one to it.

A decision is a walk, among clusters and then among sites. Each one that the walk comes to
- keeps the client, or gives it away: above the load `busy` it gives away a share that grows in
  proportion and is everything at `full`. A number drawn from the client's key says who is among
  them, so that it is the same clients each time, and more of them as load grows, never others;
- if it is not healthy passes on those whom it would have kept, and each of the next takes as many
  of them as it has room for: else all who were at a site that fails would fall upon its neighbour.
  They may use half of what is between `busy` and `full`: that is what it is kept for, and better
  than to be sent around the world past a neighbour that has room.

Rules that stay true:
- The same arguments give the same decision. There is neither a clock nor chance in it.
- What happens to a site moves nobody who was not there, neither from a site nor from a cluster: the
  orders depend on places and settings alone.
- Load moves little by little, never all at once: what is known of it is a second old, and whoever
  sends everybody to the emptiest fills that, and then the next one.
- An opinion turns nobody away. Where nothing is known of a site's health it is taken to be healthy,
  and where none is healthy all are: to be sent to a site that is thought dead is better than
  nowhere.
- At least two sites are named where there are two, each by both families if it has them, and in
  each family two where there are two that have it.

With 50 sites and 10 clusters a decision takes 20 us for places that are asked about again, and 80
us else.

The order becomes one of candidates (sdp.py): https://www.rfc-editor.org/rfc/rfc8445#section-5.1.2;
two families: https://www.rfc-editor.org/rfc/rfc8421#section-4.

Sans-IO.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import countries
from endpoints import Endpoint
from mileage import Listed, Mileage, Order, Position, position

BUSY = 0.8
"""Load from which on a site or a cluster gives clients away. Lower wastes what there is nearby;
higher leaves less room for what comes before the next report does."""

FULL = 1.0
"""Load at which it gives away all. Nearer to BUSY, and the answer to a report that is a second old
would be the stronger: load would go to and fro between neighbours."""

SITES_NAMED = 2
"""Sites in an answer, of each family. More cost every client checks on paths that it does not need;
a third helps only who loses two at once."""

SPARE = 0.5
"""Share of what is between BUSY and FULL that those may use who move since a site or a cluster has
failed. All of it would leave nothing for what comes before the next report does, and would make the
next one give away all that comes to it by itself; nothing, and they go far while neighbours have
room."""

_Notes = list[tuple[str, tuple[Any, ...]]]

_MASK = (1 << 64) - 1
_FACTOR = 0xBF58476D1CE4E5B9
"""Of the finalizer of SplitMix64."""
_MOVED, _RELAY = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Tell further draws at the same place from the first."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place where clients enter."""

    name: str
    latitude: float
    longitude: float
    relays: tuple[Endpoint, ...]
    """Public addresses of its relays, of one family or both."""
    capacity: int
    """Flows that it takes."""
    backbone_ms: Mapping[int, float] = field(default_factory=dict, hash=False)
    """What a round trip to clusters takes, by their ids, where that is known better than by their
    distance."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster is."""

    id: int
    latitude: float | None = None
    longitude: float | None = None
    """None if nobody said: then it comes after those of whom somebody did."""
    capacity: int = 0
    """Sessions that it takes; 0 if that is not known."""


class State(NamedTuple):
    """A site or a cluster, as last heard."""

    healthy: bool = True
    load: float = 0.0
    """0 to 1 of its capacity; more if it has more than it should."""
    capacity: int | None = None
    """What it takes now; None: what was configured."""


UNKNOWN = State()
"""Of whom nothing was heard."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of a client."""

    latitude: float | None = None
    longitude: float | None = None
    country: str | None = None
    """ISO 3166-1 alpha-2. Counts where there are no coordinates."""
    key: bytes = b""
    """What spreads clients: its address, or anything else that stays the same with it."""
    family: int | None = None
    """4 or 6: by which it came here, if that is known. Its relays' addresses of this one go first:
    it works, and some encoders try no more than the first candidate. Else it is IPv6."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a client goes."""

    clusters: tuple[int, ...]
    """Of all clusters, in the order in which to ask them."""
    relays: tuple[tuple[Site, Endpoint], ...]
    """Addresses in order of preference."""
    notes: tuple[tuple[str, tuple[Any, ...]], ...]
    """What `why` is written from, when somebody asks."""

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons, a sentence each."""
        return tuple(text.format(*values) for text, values in self.notes)

    @property
    def site(self) -> str:
        """Name of the first site; empty without sites."""
        return self.relays[0][0].name if self.relays else ""


class Steering:
    """Decides for clients, one at a time."""

    def __init__(
        self,
        sites: Sequence[Site],
        places: Sequence[Place],
        *,
        named: int = SITES_NAMED,
        busy: float = BUSY,
        full: float = FULL,
        home: Position | None = None,
    ) -> None:
        """`named` is how many sites an answer names. `home` is where those clients are taken to be
        of whom nothing is known; without it they are spread over all sites."""
        self.sites, self.places = tuple(sites), tuple(places)
        self._named, self._home = named, home
        self._mileage = Mileage(
            {site.name: position(site.latitude, site.longitude) for site in sites},
            {place.id: position(place.latitude, place.longitude) for place in places},
            {site.name: site.backbone_ms for site in sites},
        )
        self._entrances = _Field({at.name: (at.name, at.capacity) for at in sites}, busy, full)
        self._clusters = _Field(
            {at.id: (f"cluster {at.id}", at.capacity) for at in places}, busy, full
        )
        self._families = [
            [[at for at in site.relays if at.address.version == version] for version in (6, 4)]
            for site in sites
        ]
        self._having = [sum(bool(each[way]) for each in self._families) for way in (0, 1)]

    def decide(
        self, request: Request, sites: Mapping[str, State], clusters: Mapping[int, State]
    ) -> Decision:
        """Where the client goes; any values of a request are survived."""
        notes: _Notes = []
        digest = int.from_bytes(hashlib.blake2b(request.key, digest_size=8).digest(), "big")
        where = self._where(request, notes)
        chosen: list[int] = []
        if self.places and (where is not None or not self.sites):
            chosen = self._owners(where, digest, clusters, notes)
        relays: list[tuple[Site, Endpoint]] = []
        if self.sites:
            order = self._entrance_order(where, digest, chosen, notes)
            first, rest = self._entrances.ranked(order, digest, sites, notes)
            relays = self._relays(first, rest, digest, request.family)
            entrance = self.sites[first].name
            notes.append(("It enters at {}.", (entrance,)))
            others = list(dict.fromkeys(at.name for at, _ in relays if at.name != entrance))
            if others:
                text = "Should that be lost, its ICE goes on by itself at {}."
                notes.append((text, (" and then at ".join(others),)))
            else:
                notes.append(("There is no other site where it could go on.", ()))
            if self.places and (where is None or first != order[0][1]):
                chosen = self._onward(first, digest, clusters, notes)
        ids = tuple([self.places[at].id for at in chosen])
        if ids:
            notes.append(("Its call goes to cluster {}.", (ids[0],)))
        return Decision(ids, tuple(relays), tuple(notes))

    def _owners(
        self,
        where: Position | None,
        digest: int,
        clusters: Mapping[int, State],
        notes: _Notes,
    ) -> list[int]:
        """Clusters in the order in which to ask them, by the least way over any site."""
        if where is None:
            order = self._clusters.drawn(digest)
            listed = Listed(order, self._clusters.labels.__getitem__)
            notes.append(("Clusters, as its lot has them: {}.", (listed,)))
        else:
            order = self._mileage.clusters(where)
            notes.append(("{}", (_Legend(self._mileage),)))
            told = partial(self._mileage.told_cluster, where)
            text = "Clusters, by the least way{}: {}."
            over = " over a site" if self.sites else ""
            notes.append((text, (over, Listed(order, told))))
        first, rest = self._clusters.ranked(order, digest, clusters, notes)
        return [first, *rest]

    def _entrance_order(
        self, where: Position | None, digest: int, chosen: Sequence[int], notes: _Notes
    ) -> Order:
        """Sites in the order in which the client comes to them."""
        if where is None:
            order = self._entrances.drawn(digest)
            listed = Listed(order, self._entrances.labels.__getitem__)
            notes.append(("Sites, as its lot has them: {}.", (listed,)))
            return order
        cluster = chosen[0] if chosen else None
        order = self._mileage.sites(where, cluster)
        to = "" if cluster is None else f" to {self._clusters.labels[cluster]}"
        told = partial(self._mileage.told_site, where, cluster)
        notes.append(("Sites, by the least way{}: {}.", (to, Listed(order, told))))
        return order

    def _onward(
        self, entrance: int, digest: int, clusters: Mapping[int, State], notes: _Notes
    ) -> list[int]:
        """Clusters in the order in which to ask them, by the way from a site."""
        order = self._mileage.onward(entrance)
        told = partial(self._mileage.told_onward, entrance)
        text = "Clusters, by the least way from {}: {}."
        notes.append((text, (self.sites[entrance].name, Listed(order, told))))
        again: _Notes = []
        first, rest = self._clusters.ranked(order, digest, clusters, again)
        notes.extend(note for note in again if note not in notes)
        return [first, *rest]

    def _where(self, request: Request, notes: _Notes) -> Position | None:
        """Where the client is taken to be; None if nothing says it."""
        found = position(request.latitude, request.longitude)
        if found is not None:
            notes.append(("The client is at {:.2f}, {:.2f}.", found))
            return found
        country = request.country
        found = countries.CENTRES.get(country.upper()) if country is not None else None
        if found is not None:
            text = "The client is somewhere in {}: taken to be at {:.1f}, {:.1f}."
            notes.append((text, (country, *found)))
            return found
        if self._home is not None:
            text = "Nothing says where the client is: taken to be at {:.2f}, {:.2f}, as configured."
            notes.append((text, self._home))
            return self._home
        notes.append(("Nothing says where the client is: it is given any, by their capacity.", ()))
        return None

    def _relays(
        self, first: int, rest: Iterator[int], digest: int, family: int | None
    ) -> list[tuple[Site, Endpoint]]:
        """Addresses of the first site, then of the others, as many sites as are to be named.

        One family after the other within a site: so they alternate, and a client with one that is
        broken loses a check by it and not the site (RFC 8421 section 4).
        """
        ways = (1, 0) if family == 4 else (0, 1)
        # Without a second site, a second relay of the only one.
        most = self._named if len(self.sites) == 1 else 1
        left = [min(self._named, having) for having in self._having]
        found, at = list[tuple[Site, Endpoint]](), first
        while True:
            site, draw = self.sites[at], _draw(digest, self._entrances.salts[at] ^ _RELAY)
            for number in range(most):
                for way in ways:
                    relays = self._families[at][way]
                    if left[way] and number < len(relays):
                        begin = int(draw * len(relays))
                        found.append((site, relays[(begin + number) % len(relays)]))
            for way, relays in enumerate(self._families[at]):
                left[way] -= bool(left[way] and relays)
            if left == [0, 0]:
                return found
            at = next(rest)


class _Field:
    """Sites, or clusters: in which order a client comes to them, and which one keeps it."""

    def __init__(
        self,
        known: Mapping[Any, tuple[str, int]],
        busy: float,
        full: float,
    ) -> None:
        """`known` has name and capacity of each, by its key in the states."""
        self._busy, self._full = busy, full
        self._spare = busy + SPARE * (full - busy)
        self._keys = list(known)
        self.labels = [label for label, _ in known.values()]
        self._capacities = [capacity for _, capacity in known.values()]
        self.salts = [
            int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big")
            for label in self.labels
        ]
        self._shares = [
            (salt, -1.0 / (capacity or 1), at)
            for at, (salt, capacity) in enumerate(zip(self.salts, self._capacities, strict=True))
        ]

    def ranked(
        self, order: Order, digest: int, states: Mapping[Any, State], notes: _Notes
    ) -> tuple[int, Iterator[int]]:
        """Which one has the client, and all others in the order in which it would go on."""
        if not states:
            notes.append(("Nothing is known of their health: all are taken to be healthy.", ()))
        first = self._keeper(order, digest, states, notes)
        if first is None:
            notes.append(("None of them is known to be healthy: all are taken to be.", ()))
            states = {key: state._replace(healthy=True) for key, state in states.items()}
            first = self._keeper(order, digest, states, notes)
        assert first is not None, "somebody is healthy now"
        return first, self._others(first, order, digest, states)

    def drawn(self, digest: int) -> Order:
        """In an order drawn for the client, each as often first as its capacity says. Without one
        of them, nobody moves who was not there (weighted rendezvous hashing)."""
        log, unit = math.log, 2.0**-64
        # Fifty draws in a decision: without the second step of `_draw`, at half its cost.
        return sorted(
            [
                (log((((digest ^ salt) * _FACTOR & _MASK) + 1) * unit) * per_flow, at)
                for salt, per_flow, at in self._shares
            ]
        )

    def _keeper(
        self,
        order: Order,
        digest: int,
        states: Mapping[Any, State],
        notes: _Notes | None,
        lost: int = -1,
    ) -> int | None:
        """The first that keeps this client; None if none is healthy. `lost` counts as unhealthy."""
        moving = 0.0  # how many go on from here as this client does, since somebody is unhealthy
        for _, at in order:
            healthy, load, capacity = states.get(self._keys[at], UNKNOWN)
            if load > self._busy:
                given = min(1.0, (load - self._busy) / (self._full - self._busy))
                among = _draw(digest, self.salts[at]) < given
                if notes is not None:
                    text = "{} has a load of {:.2f} and gives {:.0%} of its clients away, {}."
                    told = "this one too" if among else "not this one"
                    notes.append((text, (self.labels[at], load, given, told)))
                if among:
                    continue
            if capacity is None:
                capacity = self._capacities[at]
            had = load * capacity
            if moving > 0.0:
                room = max(0.0, self._spare - load) * capacity
                if _draw(digest, self.salts[at] ^ _MOVED) * moving >= room:
                    moving -= room
                    if notes is not None:
                        text = "{} has no room for all who come from there: not for this one."
                        notes.append((text, (self.labels[at],)))
                    continue
                had += min(room, moving)
            if not healthy or at == lost:
                # It would have kept this client, too: who moves on is who was or would be here.
                moving = had
                if notes is not None:
                    notes.append(("{} is not healthy.", (self.labels[at],)))
                continue
            return at
        return self._any(order, digest, states, notes, lost)

    def _any(
        self,
        order: Order,
        digest: int,
        states: Mapping[Any, State],
        notes: _Notes | None,
        lost: int,
    ) -> int | None:
        """When none keeps the client: one of the healthy ones, in proportion to the room that each
        has left; without any room, the foremost."""
        best, least, foremost = None, math.inf, None
        for _, at in order:
            healthy, load, capacity = states.get(self._keys[at], UNKNOWN)
            if not healthy or at == lost:
                continue
            foremost = at if foremost is None else foremost
            room = (self._full - load) * (
                (self._capacities[at] if capacity is None else capacity) or 1
            )
            if room > 0:
                score = -math.log(_draw(digest, self.salts[at] ^ _MOVED)) / room
                if score < least:
                    best, least = at, score
        if best is None:
            if notes is not None and foremost is not None:
                notes.append(("All are full: it stays with the first of them.", ()))
            return foremost
        if notes is not None:
            text = "None has room enough: they share such clients by what each has left."
            notes.append((text, ()))
        return best

    def _others(
        self, first: int, order: Order, digest: int, states: Mapping[Any, State]
    ) -> Iterator[int]:
        """Where the client would go if the first were lost; then the rest: those with room, those
        without, those that are not healthy, each in their order."""
        second = self._keeper(order, digest, states, None, first) if len(order) > 1 else None
        if second is not None:
            yield second
        full, ailing = list[int](), list[int]()
        for _, at in order:
            if at in (first, second):
                continue
            healthy, load, _ = states.get(self._keys[at], UNKNOWN)
            if healthy and load < self._full:
                yield at
            elif healthy:
                full.append(at)
            else:
                ailing.append(at)
        yield from full
        yield from ailing


class _Legend(NamedTuple):
    """What the figures are, as text when somebody asks."""

    mileage: Mileage

    def __str__(self) -> str:
        return self.mileage.legend


def _draw(digest: int, salt: int) -> float:
    """A number above 0 and below 1 that belongs to a client and a place: the same each time, and
    independent of any other place's (the finalizer of SplitMix64)."""
    mixed = digest ^ salt
    mixed = (mixed ^ mixed >> 30) * _FACTOR & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return ((mixed ^ mixed >> 31) + 1) / (_MASK + 3)
