import math

import pytest

import countries

NEIGHBOURS = {
    # Great circles between the middles of the peoples of two countries, from a map, in km.
    ("FR", "DE"): 670,
    ("JP", "KR"): 910,
    ("US", "CA"): 1220,
    ("GB", "IE"): 370,
    ("BR", "AR"): 2230,
    ("NG", "GH"): 940,
    ("AU", "NZ"): 2500,
    ("EG", "SA"): 1390,
}


def km(one: tuple[float, float], other: tuple[float, float]) -> float:
    """By the haversine formula, which the product does not use."""
    (a, b), (c, d) = (tuple(map(math.radians, each)) for each in (one, other))
    half = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * 6371 * math.asin(math.sqrt(half))


def test_every_entry_is_a_country_on_earth() -> None:
    assert len(countries.CENTRES) >= 249
    for code, (latitude, longitude) in countries.CENTRES.items():
        assert len(code) == 2 and code.isascii() and code.isupper()
        assert -90 <= latitude <= 90 and -180 <= longitude <= 180
    # No two are the same point, as of a line that was copied and not changed.
    assert len(set(countries.CENTRES.values())) >= len(countries.CENTRES) - 3


@pytest.mark.parametrize(("pair", "about"), NEIGHBOURS.items())
def test_neighbours_are_as_far_apart_as_on_a_map(pair: tuple[str, str], about: float) -> None:
    one, other = (countries.CENTRES[code] for code in pair)
    assert km(one, other) == pytest.approx(about, rel=0.25)


def test_a_country_is_where_its_people_are() -> None:
    """Not where its area is: Canadians live in the south, Russians in Europe."""
    assert countries.CENTRES["CA"][0] < 50
    assert countries.CENTRES["RU"][1] < 60
    assert countries.CENTRES["AU"][1] > 140
