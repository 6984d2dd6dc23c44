"""Mileage: how long the whole way takes, from a client over a site to a cluster.

    client ──public Internet──▶ site ──backbone──▶ cluster        a round trip, in milliseconds

What it owns: the estimates for both parts, what an operator says of the second (`backbone_ms`), and
the orders that follow from their sum.

Nearness alone misleads. From Singapore, Tokyo is nearer than Frankfurt, and on the way to a cluster
in Frankfurt it is a detour of 100 ms. From Tokyo, Frankfurt is nearer than Virginia on the sphere,
and 80 ms farther by the cables that there are. So it is the sum that counts.

Rules that stay true:
- What is configured counts before what is estimated. It also says how long cables are where the
  sphere does not: the public Internet is nowhere taken to be quicker than PUBLIC_MS_KM over
  BACKBONE_MS_KM times our backbone. Else a client beside a site whose backbone is long, and said
  to be, would be sent past it to the far end, over the same cables and those of others.
- A client beside a site enters there, whatever the cluster: nothing that leads elsewhere is shorter
  than its backbone.
- The orders depend on places and settings alone, not on how anybody is: steering.py goes on from
  there.

Half a chord of the sphere is the sine of half the angle. Orders are remembered for places that are
asked about again (a country's centre, a city).

Sans-IO.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import add
from typing import NamedTuple

EARTH_KM = 6371.0

BACKBONE_MS_KM = 0.017
"""Of a round trip, for a kilometre of great circle between a site and a cluster. 0.010 is light in
glass without a bend; one operator's published round trips between its regions (scripts/world.py has
them, with their source) are 0.0135 to 0.031, half of them above 0.0168."""

PUBLIC_MS_KM = 0.022
"""The same from a client to a site: 1.3 times as long, which is an assumption: operators of
backbones promise more. What counts is the ratio: the greater, the sooner do clients enter."""

PLACES_REMEMBERED = 1024
"""Places whose orders are remembered: all countries and some hundred cities; 10 KB each with 50
sites."""

LISTED = 4
"""Places whose milliseconds a text names."""

Position = tuple[float, float]
Order = Sequence[tuple[float, int]]
"""Sites or clusters, first the one with the least milliseconds, and its number. Equal ones stay in
the order in which they are configured; what is at no known place comes last, with math.inf."""

_Point = tuple[float, float, float]

_RADIUS = 0.5 * (1 - 1e-12)
"""So a distance between points is half a chord, and that of two antipodes has an arcsine, too."""


class Listed(NamedTuple):
    """The first few of an order, as text when somebody asks."""

    order: Order
    told: Callable[[int], str]

    def __str__(self) -> str:
        shown = [self.told(at) for _, at in self.order[:LISTED]]
        more = len(self.order) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


class Mileage:
    """The ways of a world."""

    def __init__(
        self,
        sites: Mapping[str, Position | None],
        clusters: Mapping[int, Position | None],
        configured: Mapping[str, Mapping[int, float]],
    ) -> None:
        """`configured` is what the backbone takes from a site to clusters, as far as that is said.
        A cluster that has no place needs to be said of every site, or else counts as unknown."""
        self._names, self._ids = list(sites), list(clusters)
        self._sites = [_point(each) for each in sites.values()]
        self._clusters = [_point(each) for each in clusters.values()]
        self._said = [configured.get(name, {}) for name in self._names]
        self._rows = [
            self._row(id, point) for id, point in zip(self._ids, self._clusters, strict=True)
        ]
        self._known = [(row, at) for at, row in enumerate(self._rows) if row is not None]
        self._nowhere = [(math.inf, at) for at, row in enumerate(self._rows) if row is None]
        self._anything_said = any(self._said)
        self._apart = lru_cache(None)(self._least_apart)
        self._public = lru_cache(PLACES_REMEMBERED)(self._to_sites)
        self.clusters = lru_cache(PLACES_REMEMBERED)(self._by_whole_way)
        self.sites = lru_cache(PLACES_REMEMBERED)(self._by_way_to)
        self.onward = lru_cache(None)(self._by_backbone)

    # --- orders ---------------------------------------------------------------------------------

    def _by_whole_way(self, where: Position) -> Order:
        """Clusters, by the shortest way to each over any site; without sites straight there."""
        if not self._sites:
            straight = _ms(where, self._clusters, PUBLIC_MS_KM)
            return sorted((ms, at) for at, ms in enumerate(straight))
        public = self._public(where)
        return sorted([(min(map(add, public, row)), at) for row, at in self._known]) + self._nowhere

    def _by_way_to(self, where: Position, cluster: int | None) -> Order:
        """Sites, by the way over each to a cluster; by the way to each if there is no telling."""
        ways, row = self._public(where), None if cluster is None else self._rows[cluster]
        if row is not None:
            ways = list(map(add, ways, row))
        return sorted(zip(ways, range(len(ways)), strict=True))

    def _by_backbone(self, site: int) -> Order:
        """Clusters, by the way to each from a site."""
        return sorted([(row[site], at) for row, at in self._known]) + self._nowhere

    # --- the two parts --------------------------------------------------------------------------

    def _row(self, id: int, point: _Point | None) -> list[float] | None:
        """What the backbone takes to a cluster from each site; None if nothing says it."""
        if point is None and not (self._said and all(id in said for said in self._said)):
            return None
        estimated = (
            [math.inf] * len(self._sites)
            if point is None
            else _from(point, self._sites, BACKBONE_MS_KM)
        )
        return [said.get(id, ms) for said, ms in zip(self._said, estimated, strict=True)]

    def _to_sites(self, where: Position) -> list[float]:
        """What the public Internet takes to each site."""
        estimated = _ms(where, self._sites, PUBLIC_MS_KM)
        if not self._anything_said:
            return estimated
        # To go to its nearest site and on by the public Internet is one way to any other: and that
        # is no quicker, for all that is said. With estimates alone this changes nothing, since on
        # a sphere, too, two sides of a triangle are together longer than the third.
        least = min(estimated)
        apart = self._apart(estimated.index(least))
        return [max(ms, far - least) for ms, far in zip(estimated, apart, strict=True)]

    def _least_apart(self, site: int) -> list[float]:
        """What the public Internet takes from a site to each at the least, as the backbones of both
        say: whose ways to the same cluster differ by so much are themselves so far apart."""
        found = [0.0] * len(self._sites)
        for row, _ in self._known:
            found = [max(far, row[site] - ms) for far, ms in zip(found, row, strict=True)]
        return [far * PUBLIC_MS_KM / BACKBONE_MS_KM for far in found]

    # --- in words -------------------------------------------------------------------------------

    @property
    def legend(self) -> str:
        """What the figures in the texts are."""
        if not self._sites:
            return f"Round trips are estimated by distance: {PUBLIC_MS_KM:g} ms a km."
        said = "; * is configured, or follows from it" if self._anything_said else ""
        return (
            f"Round trips are estimated by distance: {PUBLIC_MS_KM:g} ms a km to a site,"
            f" {BACKBONE_MS_KM:g} from there to a cluster{said}."
        )

    def told_site(self, where: Position, cluster: int | None, at: int) -> str:
        """A site, and the two parts of the way over it."""
        return f"{self._names[at]} ({self._parts(where, cluster, at)})"

    def told_cluster(self, where: Position, at: int) -> str:
        """A cluster, and by which way it is reached."""
        label = f"cluster {self._ids[at]}"
        if not self._sites:
            (ms,) = _ms(where, [self._clusters[at]], PUBLIC_MS_KM)
            return label if ms == math.inf else f"{label} ({ms:.0f} ms)"
        if self._rows[at] is None:
            return label
        site = self.sites(where, at)[0][1]
        return f"{label} ({self._parts(where, at, site)} by {self._names[site]})"

    def told_onward(self, site: int, at: int) -> str:
        """A cluster, and how long the backbone takes to it."""
        row = self._rows[at]
        label = f"cluster {self._ids[at]}"
        return label if row is None else f"{label} ({self._backbone(row, at, site)} ms)"

    def _parts(self, where: Position, cluster: int | None, site: int) -> str:
        public = self._public(where)[site]
        (estimated,) = _ms(where, [self._sites[site]], PUBLIC_MS_KM)
        text = f"{public:.0f}{'*' if public > estimated else ''}"
        row = None if cluster is None else self._rows[cluster]
        if cluster is not None and row is not None:
            text += f" + {self._backbone(row, cluster, site)}"
        return f"{text} ms"

    def _backbone(self, row: Sequence[float], cluster: int, site: int) -> str:
        return f"{row[site]:.0f}{'*' if self._ids[cluster] in self._said[site] else ''}"


def position(latitude: float | None, longitude: float | None) -> Position | None:
    """Coordinates that can be used: None for none, and for such as are not on Earth."""
    if latitude is None or longitude is None:
        return None
    if not (-90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 180.0):  # also not a number
        return None
    return latitude, longitude


def _point(where: Position | None) -> _Point | None:
    """A point on a sphere of _RADIUS."""
    if where is None:
        return None
    up, around = math.radians(where[0]), math.radians(where[1])
    flat = _RADIUS * math.cos(up)
    return flat * math.cos(around), flat * math.sin(around), _RADIUS * math.sin(up)


def _ms(where: Position, points: Sequence[_Point | None], ms_km: float) -> list[float]:
    here = _point(where)
    assert here is not None, "a place that is known"
    return _from(here, points, ms_km)


def _from(here: _Point, points: Sequence[_Point | None], ms_km: float) -> list[float]:
    """Milliseconds to each; math.inf to what is at no known place."""
    each_radian, arcsine, distance = 2 * EARTH_KM * ms_km, math.asin, math.dist
    return [
        math.inf if point is None else each_radian * arcsine(distance(here, point))
        for point in points
    ]
