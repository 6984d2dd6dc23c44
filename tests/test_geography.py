"""Geography: which headers are believed, what a database says, and files that are none."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import geography
import settings
from steering import Request

from . import maps
from .test_front import WORLD

PROXY, CLIENT = "192.0.2.7", "203.0.113.77"
HEADERS = 'latitude_header = "X-Lat"\nlongitude_header = "X-Lon"\n'


def configured(folder: Path, more: str = HEADERS) -> settings.Signaling:
    path = folder / "signaling.toml"
    path.write_text(WORLD + more)
    return settings.load(path, settings.Signaling)


def headers(**found: str | Sequence[str]) -> geography.Values:
    """`cf_ipcountry="JP"` is CF-IPCountry, without regard to case, as aiohttp has it."""
    listed = {name: [value] if isinstance(value, str) else value for name, value in found.items()}
    return lambda name: list(listed.get(name.lower().replace("-", "_"), ()))


NONE = headers()


def bare(found: Request) -> Request:
    """Without the family, which the client's address says, wherever it is."""
    return replace(found, family=None)


def test_a_trusted_proxy_s_headers_say_where_a_client_is(tmp_path: Path) -> None:
    found = geography.Geography(configured(tmp_path))
    both = headers(x_lat="35.7", x_lon="139.7", cf_ipcountry="BR")
    assert bare(found.request(PROXY, both, CLIENT, b"k")) == Request(35.7, 139.7, key=b"k")
    only = headers(cf_ipcountry=" jp ")
    assert bare(found.request(PROXY, only, CLIENT, b"k")) == Request(country="JP", key=b"k")
    assert bare(found.request(PROXY, NONE, CLIENT, b"k")) == Request(key=b"k")


@pytest.mark.parametrize("remote", ["192.0.3.1", "127.0.0.1", "", None, "::ffff:192.0.3.1", "x"])
def test_from_anybody_else_they_are_not_read(tmp_path: Path, remote: str | None) -> None:
    found = geography.Geography(configured(tmp_path))
    lies = headers(x_lat="35.7", x_lon="139.7", cf_ipcountry="BR")
    assert bare(found.request(remote, lies, CLIENT, b"")) == Request()


@pytest.mark.parametrize(
    "odd",
    [
        headers(cf_ipcountry=["JP", "BR"]),
        headers(cf_ipcountry="Japan"),
        headers(cf_ipcountry=""),
        headers(cf_ipcountry="XX"),
        headers(cf_ipcountry="T1"),
        headers(x_lat="nan", x_lon="1"),
        headers(x_lat="91", x_lon="1"),
        headers(cf_ipcountry="日本"),
        headers(x_lat="35.7"),
        headers(x_lat="35.7", x_lon=["1", "2"]),
        headers(x_lat="35.7", x_lon="east"),
        headers(x_lat="35.7", x_lon="1" * 40),
        headers(x_lat="35.7", x_lon="١"),
    ],
)
def test_what_cannot_be_used_is_as_good_as_nothing(tmp_path: Path, odd: geography.Values) -> None:
    found = geography.Geography(configured(tmp_path))
    assert bare(found.request(PROXY, odd, CLIENT, b"")) == Request()


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_header_is_survived(one: str, other: str, third: str) -> None:
    listed = {"X-Lat": [one], "X-Lon": [other], "CF-IPCountry": [third]}
    found = ANY.request(PROXY, lambda name: listed.get(name, []), third, b"")
    assert found.country is None or len(found.country) == 2


def world_of(folder: Path) -> geography.Geography:
    maps.write(folder / "places.mmdb")
    return geography.Geography(configured(folder, HEADERS + 'database = "places.mmdb"\n'))


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("203.0.113.77", Request(35.69, 139.69, "JP")),
        ("::ffff:203.0.113.77", Request(35.69, 139.69, "JP")),
        ("2001:db8:1::5", Request(35.69, 139.69, "JP")),
        ("2001:db8:2::5%eth0", Request(51.51, -0.13, "GB")),
        ("198.51.100.255", Request(51.51, -0.13, "GB")),
        ("203.0.113.130", Request(country="BR")),
        ("198.19.1.1", Request(country="US")),
        ("203.0.113.200", Request()),  # its entry says nothing of use
        ("192.0.2.1", Request()),
        ("2001:db8:3::1", Request()),
        ("localhost", Request()),
        ("", Request()),
    ],
)
def test_the_database_says_where_an_address_is(
    tmp_path: Path, address: str, place: Request
) -> None:
    assert bare(world_of(tmp_path).of(address, b"")) == place


@pytest.mark.parametrize(
    ("client", "family"),
    [
        ("203.0.113.77", 4), ("::ffff:203.0.113.77", 4), ("192.0.2.1", 4), ("10.0.0.1", 4),
        ("2001:db8:1::5", 6), ("2001:db8:9::5", 6), ("127.0.0.1", None), ("::1", None), ("x", None),
    ],
)  # fmt: skip
def test_the_family_is_the_one_by_which_it_came(
    tmp_path: Path, client: str, family: int | None
) -> None:
    found = world_of(tmp_path)
    assert found.of(client, b"").family == family
    both = headers(x_lat="35.7", x_lon="139.7")
    for said in (both, headers(cf_ipcountry="BR"), NONE):
        assert found.request(PROXY, said, client, b"").family == family


def test_headers_go_before_the_database(tmp_path: Path) -> None:
    found = world_of(tmp_path)
    said = found.request(PROXY, headers(cf_ipcountry="BR"), CLIENT, b"")
    assert bare(said) == Request(country="BR")
    assert found.request(PROXY, headers(cf_ipcountry="?"), CLIENT, b"").country == "JP"
    assert found.request("198.18.0.1", headers(cf_ipcountry="BR"), CLIENT, b"").country == "JP"


def test_a_database_of_ipv4_alone_knows_no_ipv6(tmp_path: Path) -> None:
    networks = {"203.0.113.0/24": maps.TOKYO}
    (tmp_path / "places.mmdb").write_bytes(maps.database(networks, version=4))
    found = geography.Geography(configured(tmp_path, 'database = "places.mmdb"\n'))
    assert found.of("203.0.113.1", b"").country == "JP"
    assert bare(found.of("2001:db8:1::5", b"")) == Request()


WHOLE = maps.database(maps.NETWORKS)
BROKEN = {
    "empty": b"",
    "text": b"not a database\n" * 99,
    "cut off": WHOLE[: len(WHOLE) // 2],
    "without its description": WHOLE[: WHOLE.rindex(maps.MARKER) + len(maps.MARKER)],
    "of another version": WHOLE.replace(b"record_size\x01\x02\x1c", b"record_size\x01\x02\x1d"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_none_is_an_error_at_the_start(tmp_path: Path, what: str) -> None:
    assert BROKEN[what] != WHOLE
    (tmp_path / "places.mmdb").write_bytes(BROKEN[what])
    config = configured(tmp_path, 'database = "places.mmdb"\n')
    with pytest.raises(settings.SettingsError) as caught:
        geography.Geography(config)
    assert str(caught.value).startswith(
        f"steering.database: {tmp_path}/places.mmdb: no database in MaxMind's format"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = configured(tmp_path, 'database = "places.mmdb"\n')
    with pytest.raises(settings.SettingsError, match=r"places\.mmdb: No such file or directory$"):
        geography.Geography(config)


def test_it_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    found = world_of(tmp_path)
    config = configured(tmp_path, 'database = "places.mmdb"\n')
    assert found.of(CLIENT, b"").country == "JP"
    # Written over in place, as no tool should: what was read stays.
    (tmp_path / "places.mmdb").write_bytes(b"")
    assert found.of(CLIENT, b"").country == "JP"
    with pytest.raises(settings.SettingsError):
        found.reload(config)
    assert found.of(CLIENT, b"").country == "JP"
    maps.write(tmp_path / "places.mmdb", {"203.0.113.0/24": maps.BRAZIL})
    found.reload(config)
    assert found.of(CLIENT, b"").country == "BR"
    found.reload(configured(tmp_path))
    assert bare(found.of(CLIENT, b"")) == Request()


def test_an_entry_that_is_broken_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = maps.database({"203.0.113.0/24": maps.TOKYO})
    broken = whole.replace(maps.encoded(maps.TOKYO), b"\xff" * len(maps.encoded(maps.TOKYO)))
    assert broken != whole
    (tmp_path / "places.mmdb").write_bytes(broken)
    found = geography.Geography(configured(tmp_path, 'database = "places.mmdb"\n'))
    with caplog.at_level(logging.WARNING, "geography"):
        assert bare(found.of(CLIENT, b"")) == bare(found.of(CLIENT, b"")) == Request()
    assert [line for line in caplog.messages if "cannot be read" in line] == caplog.messages
    assert len(caplog.messages) == 1


def _any() -> geography.Geography:
    """One without files, for what hypothesis thinks of."""
    with tempfile.TemporaryDirectory() as folder:
        return geography.Geography(configured(Path(folder)))


ANY = _any()
