"""The world as the simulation has it: who calls from where, and how long light takes to a site.

What it owns: the places that callers live at (globe.csv, with its sources), the sites and clusters
of a made-up operator, drawing callers, and the model of the first hop. No rule of the product is
here.

**Latency**, for a round trip in milliseconds:

    great circle / (2/3 c) * stretch * 2  +  access

- 2/3 c is the speed of light in glass: 200 km a millisecond.
- `stretch`: how much longer than the great circle the way is. On the backbone BACKBONE_STRETCH: the
  median of the published round trips between one operator's regions that world.py has (with their
  source), over their great circles. The public Internet takes world.PUBLIC_FACTOR times as long,
  which is an assumption (there), and varies from caller to caller (lognormal), another one.
- `access`: the caller's own line, radio and home network included, drawn once a caller as a mixture
  of fixed and mobile lines. Assumed, not measured here.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import world

Floats = npt.NDArray[np.float64]

PLACES = Path(__file__).with_name("globe.csv")

EARTH_KM = 6371.0
GLASS_KM_MS = 299.792458 * 2 / 3

BACKBONE_STRETCH = 1.68
"""Of the operator's own network between its sites: see above; test_simulate.py holds it to that."""
PUBLIC_STRETCH, PUBLIC_SPREAD = BACKBONE_STRETCH * world.PUBLIC_FACTOR, 0.25
"""Median and sigma of the logarithm. Less than 1.1 is cut off: no cable is a great circle."""
FIXED_MS, MOBILE_MS, ACCESS_SPREAD = 9.0, 32.0, 0.5
"""Median round trips of a fixed and of a mobile caller's own line, and the sigma of both."""
MOBILE_SHARE = 0.55
SCATTER_KM = 60.0
"""Callers live around the city that the table has, within a normal distribution of this sigma."""

ASSUMED = {
    "latency": (
        f"great circle at 2/3 c times {BACKBONE_STRETCH} on the backbone, {PUBLIC_STRETCH:.2f} in"
        f" the median on the public Internet (log sigma {PUBLIC_SPREAD}), and an access line of"
        f" {FIXED_MS:.0f} ms (fixed) or {MOBILE_MS:.0f} ms (mobile, {MOBILE_SHARE:.0%} of"
        f" callers) in the median, sigma {ACCESS_SPREAD}"
    ),
    "callers": "internet users by place (globe.csv), without hours of the day",
}

SITES = {
    "Ashburn": (39.0, -77.5),
    "Chicago": (41.9, -87.6),
    "Dallas": (32.8, -96.8),
    "Los Angeles": (34.1, -118.2),
    "Seattle": (47.6, -122.3),
    "Mexico City": (19.4, -99.1),
    "Bogota": (4.6, -74.1),
    "Sao Paulo": (-23.5, -46.6),
    "Santiago": (-33.5, -70.7),
    "London": (51.5, -0.1),
    "Frankfurt": (50.1, 8.7),
    "Madrid": (40.4, -3.7),
    "Stockholm": (59.3, 18.1),
    "Istanbul": (41.0, 28.9),
    "Dubai": (25.2, 55.3),
    "Cairo": (30.0, 31.2),
    "Lagos": (6.5, 3.4),
    "Nairobi": (-1.3, 36.8),
    "Johannesburg": (-26.2, 28.0),
    "Mumbai": (19.1, 72.9),
    "Delhi": (28.7, 77.2),
    "Chennai": (13.1, 80.3),
    "Singapore": (1.3, 103.8),
    "Jakarta": (-6.2, 106.8),
    "Manila": (14.6, 121.0),
    "Hong Kong": (22.3, 114.2),
    "Shanghai": (31.2, 121.5),
    "Beijing": (39.9, 116.4),
    "Seoul": (37.6, 127.0),
    "Tokyo": (35.7, 139.7),
    "Sydney": (-33.9, 151.2),
}
"""Ways in. Where people are, not where any provider has rooms."""

CLUSTERS = {
    1: ("Ashburn", SITES["Ashburn"]),
    2: ("Los Angeles", SITES["Los Angeles"]),
    3: ("Sao Paulo", SITES["Sao Paulo"]),
    4: ("Frankfurt", SITES["Frankfurt"]),
    5: ("Mumbai", SITES["Mumbai"]),
    6: ("Singapore", SITES["Singapore"]),
    7: ("Tokyo", SITES["Tokyo"]),
}
"""Where the transceivers and model servers are, by the cluster's id."""

SINGLE = "Ashburn"
"""The one site that all of it is compared with."""


@dataclass(frozen=True)
class Callers:
    """So many callers, a column each."""

    country: npt.NDArray[np.str_]
    latitude: Floats
    longitude: Floats
    stretch: Floats
    access_ms: Floats
    headers: list[bytes]
    """frame.py's 32 octets of each: no two are alike."""
    ssrc: npt.NDArray[np.uint32]
    phase: Floats
    """Where in its own 20 ms, and in its own interval of checks, a caller is: 0 to 1."""

    def __len__(self) -> int:
        return len(self.headers)


def places(path: Path = PLACES) -> tuple[list[str], Floats]:
    """The table: countries, and a row of latitude, longitude and thousands of users for each."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    return [row[0] for row in rows], np.array([[float(x) for x in row[2:]] for row in rows])


def draw(sessions: int, chance: np.random.Generator) -> Callers:
    """Callers as the users of the Internet are spread over the world."""
    countries, table = places()
    lived = chance.choice(len(table), sessions, p=table[:, 2] / table[:, 2].sum())
    degrees = SCATTER_KM / 111.2
    latitude = np.clip(table[lived, 0] + chance.normal(0, degrees, sessions), -85, 85)
    across = np.cos(np.radians(latitude))
    longitude = table[lived, 1] + chance.normal(0, degrees, sessions) / across
    longitude = (longitude + 180) % 360 - 180
    stretch = PUBLIC_STRETCH * np.exp(chance.normal(0, PUBLIC_SPREAD, sessions))
    line = np.where(chance.random(sessions) < MOBILE_SHARE, MOBILE_MS, FIXED_MS)
    return Callers(
        np.array(countries)[lived],
        latitude,
        longitude,
        np.maximum(1.1, stretch),
        line * np.exp(chance.normal(0, ACCESS_SPREAD, sessions)),
        headers(sessions, chance),
        chance.integers(1, 1 << 32, sessions, dtype=np.uint32),
        chance.random(sessions),
    )


def headers(count: int, chance: np.random.Generator) -> list[bytes]:
    """Headers of so many clients at IPv4 addresses, as frame.header makes them one by one."""
    rows = np.zeros((count, 32), dtype=np.uint8)
    rows[:, :6] = (0xC5, 1, 0, 0, 10, 0)
    ports = chance.integers(1024, 65_536, count).astype(">u2")
    rows[:, 6:8] = ports.view(np.uint8).reshape(count, 2)
    rows[:, 22:24] = 0xFF
    # An odd multiplier permutes the 32 bits: scattered, and no address comes twice.
    start = int(chance.integers(1 << 32))
    numbers = (np.arange(start, start + count, dtype=np.uint64) * 2_654_435_761) & 0xFFFFFFFF
    rows[:, 24:28] = numbers.astype(">u4").view(np.uint8).reshape(count, 4)
    octets = rows.tobytes()
    return [octets[at : at + 32] for at in range(0, 32 * count, 32)]


def kilometres(latitude: Floats, longitude: Floats, there: tuple[float, float]) -> Floats:
    """Great circle from each place to one (haversine)."""
    here_phi, there_phi = np.radians(latitude), np.radians(there[0])
    half = np.sin((here_phi - there_phi) / 2) ** 2
    turned = np.sin(np.radians(longitude - there[1]) / 2) ** 2
    half = half + np.cos(here_phi) * np.cos(there_phi) * turned
    found: Floats = 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))
    return found


def vectors(latitude: Floats, longitude: Floats) -> Floats:
    """Unit vectors: the nearer two places, the larger the scalar product of theirs."""
    up, around = np.radians(latitude), np.radians(longitude)
    flat = np.cos(up)
    return np.stack([flat * np.cos(around), flat * np.sin(around), np.sin(up)], axis=1)


def glass_ms(distance_km: Floats | float, stretch: Floats | float) -> Floats:
    """Round trip in the network alone."""
    return np.asarray(2 * np.asarray(distance_km) * stretch / GLASS_KM_MS)


def trips_ms(
    callers: Callers, there: tuple[float, float], who: npt.NDArray[np.int64] | slice = slice(None)
) -> Floats:
    """Round trip of each caller (or of these) to a place, over the public Internet, its own line
    included."""
    distance = kilometres(callers.latitude[who], callers.longitude[who], there)
    return glass_ms(distance, callers.stretch[who]) + callers.access_ms[who]


def between_ms(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Round trip between two of the operator's places, over its backbone."""
    distance = kilometres(np.array([one[0]]), np.array([one[1]]), other)
    return float(glass_ms(distance, BACKBONE_STRETCH)[0])
