"""Front: what two of signaling's settings cannot say together."""

import re
from pathlib import Path

import pytest

import settings

from . import test_signaling as stage_of


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("127.0.0.1:0", "[::]:80", r"signaling.keys_file: without API keys .* and \[::\]:80 is no"),
        ("127.0.0.1:0", "192.0.2.1:80", "signaling.keys_file: without API keys only this machine"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    path = stage_of.write_settings(tmp_path, [9000])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(settings.SettingsError, match=sentence):
        settings.load(path, settings.Signaling)


@pytest.mark.parametrize("listen", ["127.0.0.1:80", "127.1.2.3:80", "[::1]:80"])
def test_a_loopback_address_needs_no_keys(tmp_path: Path, listen: str) -> None:
    path = stage_of.write_settings(tmp_path, [9000])
    path.write_text(path.read_text().replace("127.0.0.1:0", listen, 1))
    assert settings.load(path, settings.Signaling).signaling.keys_file is None


# --- sites ----------------------------------------------------------------------------------------

WORLD = """[signaling]
listen = "127.0.0.1:0"
transceivers = ["127.0.0.1:9000"]
keys_file = "api-keys"
trusted_proxies = ["192.0.2.0/24"]

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [1, 9999]
latitude = 50.1
longitude = 8.7

[[cluster]]
id = 2
prefix = "10.5.0.0/16"
ports = [1, 9999]
latitude = 39.0
longitude = -77.5

[[site]]
name = "frankfurt"
latitude = 50.1
longitude = 8.7
relays = ["203.0.113.1:3478", "[2001:db8::1]:3478"]
capacity = 1000
status = ["http://10.9.0.1:9464"]

[[site]]
name = "virginia"
latitude = 39.0
longitude = -77.5
relays = ["203.0.113.2:3478"]
capacity = 1000
status = ["http://10.9.0.2:9464", "https://[fd00::2]:9464"]

[steering]
country_header = "CF-IPCountry"
"""
PLACED = "latitude = 50.1\nlongitude = 8.7\n"


def test_sites_and_steering_are_read(tmp_path: Path) -> None:
    path = tmp_path / "signaling.toml"
    path.write_text(WORLD + 'database = "places.mmdb"\n')
    found = settings.load(path, settings.Signaling)
    assert [site.name for site in found.site] == ["frankfurt", "virginia"]
    assert str(found.site[0].relays[1]) == "[2001:db8::1]:3478"
    assert (found.cluster[1].latitude, found.cluster[1].longitude) == (39.0, -77.5)
    assert found.steering and found.steering.database == tmp_path / "places.mmdb"
    assert (found.steering.busy, found.steering.full, found.steering.sites_named) == (0.8, 1.0, 2)
    assert settings.clusters(found.cluster).keys() == {1, 2}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("[keys]", 'relays = ["203.0.113.9:1"]\n[keys]',
         r"signaling.relays: \[\[site\]\] has the relays that clients are told"),
        ('name = "virginia"', 'name = "frankfurt"', "site: name frankfurt stands there twice"),
        ("203.0.113.2:3478", "203.0.113.1:3478", "site: relays 203.0.113.1:3478 stands there tw"),
        ("http://10.9.0.2:9464", "http://10.9.0.1:9464", "site: status http://10.9.0.1:9464 sta"),
        ("203.0.113.2:3478", "203.0.113.2:0", "site: relays 203.0.113.2:0: clients cannot send"),
        ("http://10.9.0.2:9464", "http://10.9.0.2:9464/metrics", r"site.1..status.*Expected `str`"),
        ('"virginia"', '"two words"', r"site\[1\].name: Expected `str` matching regex"),
        ("capacity = 1000", "capacity = 1\nbackbone_ms = {1 = 2, 3 = 9}",
         r"site\[0\].backbone_ms: there is no cluster 3; there is 1, 2"),
        ("capacity = 1000", "capacity = 1\nbackbone_ms = {frankfurt = 2}",
         r"site\[0\].backbone_ms: there is no cluster frankfurt; there is 1, 2"),
        ("capacity = 1000", "capacity = 1\nbackbone_ms = {01 = 2}",
         r"site\[0\].backbone_ms: there is no cluster 01; there is 1, 2"),
        ("capacity = 1000", "capacity = 1\nbackbone_ms = {1 = -1}",
         r"site.*backbone_ms.*: Expected `float` >= 0"),
        ("capacity = 1000", "capacity = 1\nbackbone_ms = {1 = nan}", r"site.*backbone_ms"),
        ("latitude = 39.0", "latitude = 93.0", r"cluster\[1\].latitude: Expected `float` <= 90"),
        ("capacity = 1000", "capacity = 0", r"site\[0\].capacity: Expected `int` >= 1"),
        (PLACED, "", r"cluster\[0\]: needs latitude and longitude: without them nobody knows"),
        (PLACED, "latitude = 50.1\n", r"cluster\[0\].latitude: goes together with longitude"),
        ('trusted_proxies = ["192.0.2.0/24"]', "", "steering: headers are believed of signaling.t"),
        ("[steering]", '[steering]\nlatitude_header = "X-Lat"', "steering.latitude_header: goes"),
        ("[steering]", '[steering]\nlatitude_header = "X-A"\nlongitude_header = "x-a"',
         "steering: header x-a cannot say two things"),
        ('"CF-IPCountry"', '"x-forwarded-for"', "steering: header x-forwarded-for cannot say two"),
        ("[steering]", "[steering]\nlatitude = 1.0", "steering.latitude: goes together with long"),
        ("[steering]", "[steering]\nbusy = 0.9\nfull = 0.9", "steering.busy: not below steering.f"),
        ("[steering]", "[steering]\nsites_named = 1", "steering.sites_named: Expected `int` >= 2"),
        ("[steering]", "[steering]\ncontinent_header = 1", "steering: Object contains unknown f"),
    ],
)  # fmt: skip
def test_what_sites_and_steering_cannot_be(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    assert old in WORLD
    path = tmp_path / "signaling.toml"
    path.write_text(WORLD.replace(old, new, 1))
    with pytest.raises(settings.SettingsError, match=sentence):
        settings.load(path, settings.Signaling)


def test_without_sites_there_are_relays_for_all_and_nothing_to_steer(tmp_path: Path) -> None:
    path = stage_of.write_settings(tmp_path, [9000])
    text = path.read_text()
    assert settings.load(path, settings.Signaling).site == ()
    path.write_text(re.sub(r"^ *relays = .*$", "", text, flags=re.MULTILINE))
    with pytest.raises(settings.SettingsError, match="name the relays, here or by"):
        settings.load(path, settings.Signaling)
    path.write_text(f"{text}\n[steering]\n")
    with pytest.raises(settings.SettingsError, match="steering: there is nothing to choose from"):
        settings.load(path, settings.Signaling)


def test_one_cluster_needs_no_place_and_clusters_alone_may_have_one(tmp_path: Path) -> None:
    path = tmp_path / "signaling.toml"
    first, second = WORLD.index("[[cluster]]"), WORLD.rindex("[[cluster]]")
    alone = WORLD[:second] + WORLD[WORLD.index("[[site]]") :]
    path.write_text(alone.replace(PLACED, "", 1))
    assert settings.load(path, settings.Signaling).cluster[0].latitude is None
    said = alone.replace("capacity = 1000", "capacity = 1\nbackbone_ms = {1 = 2.5}")
    path.write_text(said)
    assert settings.load(path, settings.Signaling).site[1].backbone_ms == {"1": 2.5}
    path.write_text(said.replace("backbone_ms = {1 = 2.5}\n", "", 1).replace(PLACED, "", 1))
    with pytest.raises(
        settings.SettingsError, match=r"site\[0\].backbone_ms: lacks cluster 1, whi"
    ):
        settings.load(path, settings.Signaling)
    clusters = WORLD[:first].replace("[keys]", 'relays = ["203.0.113.9:1"]\n[keys]')
    clusters += WORLD[first : WORLD.index("[[site]]")] + WORLD[WORLD.index("[steering]") :]
    path.write_text(clusters)
    assert settings.load(path, settings.Signaling).cluster[1].longitude == -77.5


def test_only_signaling_s_clusters_have_a_place(tmp_path: Path) -> None:
    """A key that means nothing to a program is refused by it, like any other."""
    path = tmp_path / "relay.toml"
    text = '[relay]\npublic = "127.0.0.1:3478"\ninternal = "127.0.0.1:3500"\n[keys]\nfile = "k"\n'
    cluster = '[[cluster]]\nid = 1\nprefix = "127.0.0.0/8"\nports = [1, 2]\n'
    path.write_text(text + cluster)
    settings.load(path, settings.Relay)
    path.write_text(text + cluster + PLACED)
    with pytest.raises(settings.SettingsError, match="unknown field `latitude`"):
        settings.load(path, settings.Relay)


def test_the_example_of_several_sites_is_good() -> None:
    path = Path(__file__).resolve().parent.parent / "config" / "global" / "signaling.toml"
    found = settings.load(path, settings.Signaling)
    assert [site.name for site in found.site] == ["frankfurt", "virginia", "tokyo"]
    assert found.steering and found.steering.country_header
