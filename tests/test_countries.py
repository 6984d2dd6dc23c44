import csv
import math
from pathlib import Path

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


def test_it_agrees_with_the_cities_of_the_simulation() -> None:
    """The middle of a country's cities by their people, from other sources, is nowhere further off
    than 750 km: a site more or less, not a continent."""
    cities = (Path(__file__).resolve().parent.parent / "scripts" / "globe.csv").read_text()
    sums: dict[str, list[float]] = {}
    for row in csv.reader(line for line in cities.splitlines() if not line.startswith("#")):
        code, _, *numbers = row
        try:
            latitude, longitude, people = map(float, numbers[:3])
        except ValueError:
            continue
        up, around = math.radians(latitude), math.radians(longitude)
        parts = math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up)
        total = sums.setdefault(code, [0.0, 0.0, 0.0])
        for at, part in enumerate(parts):
            total[at] += people * part
    assert len(sums) > 150
    for code, (x, y, z) in sums.items():
        middle = math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))
        assert km(middle, countries.CENTRES[code]) < 750, code
