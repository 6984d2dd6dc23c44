"""Mileage: the whole way from a client over a site to a cluster, in milliseconds."""

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mileage
from endpoints import Endpoint
from mileage import Mileage, Position
from steering import Place, Request, Site, State, Steering


def scripted(name: str) -> Any:
    """A module of scripts/, which are not on the path."""
    path = Path(__file__).resolve().parent.parent / "scripts" / f"{name}.py"
    where = importlib.util.spec_from_file_location(name, path)
    assert where is not None and where.loader is not None
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


world = scripted("world")
AT: dict[str, Position] = world.COORDINATES
SITES = ("tokyo", "frankfurt", "virginia")
CLUSTERS = {1: "frankfurt", 2: "virginia"}
REAL = {
    site: {
        id: world.ROUND_TRIP_MS.get(frozenset((site, where)), 2 * world.SAME_CITY_MS)
        for id, where in CLUSTERS.items()
    }
    for site in SITES
}
"""What the operator's backbone really takes."""


def steer(said: dict[str, dict[int, float]], clusters: dict[int, str] = CLUSTERS) -> Steering:
    sites = [
        Site(name, *AT[name], (Endpoint(f"192.0.2.{at}:1"),), 1000, said.get(name, {}))
        for at, name in enumerate(SITES, 1)
    ]
    return Steering(sites, [Place(id, *AT[where]) for id, where in clusters.items()])


def way(found: Steering, caller: str) -> tuple[str, str, int]:
    """First site, second site, cluster."""
    decision = found.decide(Request(*AT[caller]), {}, {})
    first, second = dict.fromkeys(site.name for site, _ in decision.relays)
    return first, second, decision.clusters[0]


def really_ms(caller: str, site: str, cluster: str) -> float:
    """A round trip as the laboratory has it: the public Internet, then the backbone."""
    model = world.Model()
    public = world.way(model, world.Spot(caller, caller=True), world.Spot(site))
    backbone = world.way(model, world.Spot(site), world.Spot(cluster))
    return float(2e3 * (public.delay_s + backbone.delay_s))


# --- the figures ----------------------------------------------------------------------------------


def test_the_estimates_are_those_of_real_round_trips() -> None:
    ratios = []
    for pair, ms in world.ROUND_TRIP_MS.items():
        one, other = (AT[each] for each in pair)
        ratios.append(ms / kilometres(one, other))
    assert statistics.median(ratios) == pytest.approx(mileage.BACKBONE_MS_KM, rel=0.03)
    assert (min(ratios), max(ratios)) == pytest.approx((0.0135, 0.031), rel=0.02)
    ratio = mileage.PUBLIC_MS_KM / mileage.BACKBONE_MS_KM
    assert ratio == pytest.approx(world.PUBLIC_FACTOR, rel=0.01)


def kilometres(one: Position, other: Position) -> float:
    """Great circle (haversine)."""
    (a, b), (c, d) = (map(math.radians, each) for each in (one, other))
    half = math.sin((a - c) / 2) ** 2
    half += math.cos(a) * math.cos(c) * math.sin((b - d) / 2) ** 2
    return 2 * mileage.EARTH_KM * math.asin(math.sqrt(half))


places = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@given(places, places)
def test_milliseconds_are_those_of_the_great_circle(one: Position, other: Position) -> None:
    found = Mileage({"there": other}, {}, {})
    ((ms, at),) = found.sites(one, None)
    assert at == 0
    assert ms == pytest.approx(kilometres(one, other) * mileage.PUBLIC_MS_KM, abs=0.01)
    opposite = -one[0], one[1] - math.copysign(180, one[1])
    ((ms, _),) = Mileage({"antipode": opposite}, {}, {}).sites(one, None)
    assert ms == pytest.approx(math.pi * mileage.EARTH_KM * mileage.PUBLIC_MS_KM, abs=0.01)


# --- the ways of the laboratory -------------------------------------------------------------------


def test_singapore_is_not_sent_by_tokyo_to_frankfurt() -> None:
    """Tokyo is the nearest site, and a detour of 100 ms."""
    for said in ({}, REAL):
        first, second, cluster = way(steer(said), "singapore")
        assert (first, second, cluster) == ("frankfurt", "tokyo", 1)
    by_tokyo = really_ms("singapore", "tokyo", "frankfurt")
    assert by_tokyo - really_ms("singapore", "frankfurt", "frankfurt") > 90


def test_tokyo_s_calls_go_where_the_backbone_is_short_if_that_is_said() -> None:
    assert way(steer({}), "tokyo") == ("tokyo", "frankfurt", 1)  # on the sphere it is nearer
    assert way(steer(REAL), "tokyo") == ("tokyo", "virginia", 2)
    assert way(steer({"tokyo": REAL["tokyo"]}), "tokyo") == ("tokyo", "virginia", 2)
    slower = really_ms("tokyo", "tokyo", "frankfurt")
    assert slower - really_ms("tokyo", "tokyo", "virginia") > 80


@pytest.mark.parametrize("caller", AT)
def test_with_real_figures_everybody_has_the_best_way_there_is(caller: str) -> None:
    """By the laboratory's figures for the public Internet, too, which steering has not."""
    possible = {}
    for site in SITES:
        for id, cluster in CLUSTERS.items():
            try:
                possible[site, id] = really_ms(caller, site, cluster)
            except KeyError:  # the table lacks the pair
                continue
    site, _, cluster = way(steer(REAL), caller)
    assert possible[site, cluster] <= min(possible.values()) + 1e-9


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("slow", [1.0, 2.0, 5.0])
def test_a_client_beside_a_site_enters_there(site: str, cluster: int, slow: float) -> None:
    """However slow its backbone is said to be: the public Internet has no other cables."""
    said = {name: {id: ms * slow for id, ms in each.items()} for name, each in REAL.items()}
    found = steer(said, {cluster: CLUSTERS[cluster]})
    latitude, longitude = AT[site]
    for north, east in ((0, 0), (1.5, -1.0), (-1.0, 2.0)):
        request = Request(latitude + north, longitude + east)
        assert found.decide(request, {}, {}).site == site


@given(st.lists(places, min_size=1, max_size=6), st.lists(places, min_size=1, max_size=4), places)
@settings(deadline=None)
def test_to_say_what_is_estimated_changes_nothing(
    sites: list[Position], clusters: list[Position], where: Position
) -> None:
    said = {
        str(at): {
            id: kilometres(site, cluster) * mileage.BACKBONE_MS_KM
            for id, cluster in enumerate(clusters)
        }
        for at, site in enumerate(sites)
    }
    found = [
        Mileage(
            {str(at): site for at, site in enumerate(sites)}, dict(enumerate(clusters)), configured
        )
        for configured in ({}, said)
    ]
    estimated, told = ([ms for ms, _ in each.clusters(where)] for each in found)
    assert told == pytest.approx(estimated, abs=0.05)
    for cluster in range(len(clusters)):
        estimated, told = ([ms for ms, _ in each.sites(where, cluster)] for each in found)
        assert told == pytest.approx(estimated, abs=0.05)


# --- what is not known ----------------------------------------------------------------------------


def test_a_cluster_at_no_known_place_comes_last_and_changes_no_order() -> None:
    sites = {name: AT[name] for name in SITES}
    found = Mileage(sites, {7: None, 1: AT["frankfurt"], 8: None}, {})
    order = found.clusters(AT["tokyo"])
    assert [at for _, at in order] == [1, 0, 2] and order[-1][0] == math.inf
    assert [at for _, at in found.onward(2)] == [1, 0, 2]
    nearest = [at for _, at in found.sites(AT["tokyo"], None)]
    assert [at for _, at in found.sites(AT["tokyo"], 0)] == nearest == [0, 1, 2]
    # One that some sites say something of, and others do not, is no better known.
    found = Mileage(sites, {7: None}, {"tokyo": {7: 900.0}})
    assert [at for _, at in found.sites(AT["tokyo"], 0)] == nearest
    assert found.clusters(AT["tokyo"]) == [(math.inf, 0)]


def test_a_cluster_of_which_all_sites_say_something_needs_no_place() -> None:
    said = {name: {7: each[2]} for name, each in REAL.items()}
    found = Mileage({name: AT[name] for name in SITES}, {7: None}, said)
    ((ms, _),) = found.clusters(AT["tokyo"])
    assert ms == pytest.approx(165)
    assert found.sites(AT["singapore"], 0)[0][1] == 0


# --- in words -------------------------------------------------------------------------------------


def test_the_reasons_say_what_was_estimated_and_what_was_configured() -> None:
    why = "\n".join(steer({"tokyo": REAL["tokyo"]}).decide(Request(*AT["tokyo"]), {}, {}).why)
    for part in (
        "Round trips are estimated by distance: 0.022 ms a km to a site, 0.017 from there to a"
        " cluster; * is configured, or follows from it.",
        "Clusters, by the least way over a site: cluster 2 (0 + 165* ms by tokyo), cluster 1"
        " (0 + 248* ms by tokyo).",
        "Sites, by the least way to cluster 2: tokyo (0 + 165* ms), virginia (239 + 0 ms),"
        " frankfurt (321* + 111 ms).",
        "Its call goes to cluster 2.",
    ):
        assert part in why, why
    why = "\n".join(steer({}).decide(Request(*AT["tokyo"]), {"tokyo": State(False)}, {}).why)
    assert "*" not in why and "configured" not in why
    assert "Clusters, by the least way from frankfurt: cluster 1 (0 ms), cluster 2 (111 ms)." in why


def test_without_sites_clusters_go_by_the_way_straight_there() -> None:
    found = Steering([], [Place(1, *AT["frankfurt"]), Place(2, *AT["virginia"]), Place(3)])
    decision = found.decide(Request(*AT["singapore"]), {}, {})
    assert decision.clusters == (1, 2, 3)
    why = "\n".join(decision.why)
    assert "estimated by distance: 0.022 ms a km.\n" in why
    assert "least way: cluster 1 (226 ms), cluster 2 (341 ms), cluster 3." in why
