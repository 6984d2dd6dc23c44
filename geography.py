"""Geography: where a client is, as a trusted proxy says it or a database has it.

    request ──▶ headers of a trusted proxy ──▶ the client's address in the database ──▶ nothing

What it owns: the headers in which proxies say where a client is, the file in MaxMind's format that
says where addresses are, and what of either is believed.

Rules that stay true:
- A header counts if the connection it came by is a trusted proxy's, and if it stands there once:
  of two that contradict each other one is the client's own.
- A header that says nothing that can be used is as good as none, such as the country `XX`.
- The file is read whole. One that is written over in place would end a process that had mapped it
  into its memory; so it goes on with what it has read. That takes as much memory as the file, and
  50 us a look-up.
- A file that cannot be used is an error when the program starts; when it is read again, the one
  from before stays. What is broken inside costs the look-ups that come upon it, and nothing else.

Nothing here is kept about a client.

https://maxmind.github.io/MaxMind-DB/ (the format),
https://dev.maxmind.com/geoip/docs/databases/city-and-country (the fields).
"""

import ipaddress
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import maxminddb

import countries
import mileage
import settings
import steering
from endpoints import Prefix

HEADER_CHARACTERS_MAX = 32
"""Of a value: `-179.123456` has eleven."""

PROBES = ("1.1.1.1", "2606:4700:4700::1111")
"""Looked up when a file is opened: one whose tree is broken at its root is found out then."""

log = logging.getLogger("geography")

Values = Callable[[str], Sequence[str]]
"""All values of a header, by its name."""


class Geography:
    """Says where clients are, as far as anything does."""

    def __init__(self, config: settings.Signaling) -> None:
        """Raises SettingsError for a database that cannot be used."""
        self._told = False
        self.reload(config)

    def reload(self, config: settings.Signaling) -> None:
        """From now on by these settings, the database read again. Raises SettingsError, and then
        nothing has changed."""
        table = config.steering or settings.Steering()
        database = None if table.database is None else _opened(table.database)
        self._table, self._database, self._told = table, database, False
        self._trusted: tuple[Prefix, ...] = config.signaling.trusted_proxies

    def request(
        self, remote: str | None, headers: Values, client: str, key: bytes
    ) -> steering.Request:
        """What is known of a client: `remote` is the other end of its connection, `client` the
        address that is taken for its own, `key` what spreads clients."""
        if any((remote or "") in prefix for prefix in self._trusted):
            latitude = _number(_one(headers, self._table.latitude_header))
            longitude = _number(_one(headers, self._table.longitude_header))
            if mileage.position(latitude, longitude) is not None:
                return steering.Request(latitude, longitude, None, key, _family(client))
            country = _country(_one(headers, self._table.country_header))
            if country in countries.CENTRES:
                return steering.Request(None, None, country, key, _family(client))
        return self.of(client, key)

    def of(self, address: str, key: bytes) -> steering.Request:
        """What the database knows of an address; nothing without one."""
        found, family = self._found(address), _family(address)
        if not isinstance(found, dict):
            return steering.Request(key=key, family=family)
        location = found.get("location")
        at = location if isinstance(location, dict) else {}
        latitude, longitude = at.get("latitude"), at.get("longitude")
        country = None
        for name in ("country", "registered_country"):
            entry = found.get(name)
            if country is None and isinstance(entry, dict):
                country = _country(entry.get("iso_code"))
        if isinstance(latitude, float | int) and isinstance(longitude, float | int):
            return steering.Request(float(latitude), float(longitude), country, key, family)
        return steering.Request(None, None, country, key, family)

    def _found(self, address: str) -> Any:
        """The entry of an address; None without one, and for what is nobody's on the internet."""
        if self._database is None:
            return None
        wanted = _address(address)
        if wanted is None:
            return None
        if wanted.version == 6 and self._database.metadata().ip_version == 4:
            return None
        try:
            return self._database.get(wanted)
        except Exception as error:  # the file is what somebody gave us
            if not self._told:
                self._told = True
                log.warning("steering.database: an entry cannot be read: %r", error)
            return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address; None for what is none. A v4-mapped one is the IPv4 that it stands for."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _family(text: str) -> int | None:
    found = _address(text)
    return None if found is None or found.is_loopback else found.version


def _opened(path: Path) -> maxminddb.Reader:
    """The database. Raises SettingsError."""
    try:
        found = maxminddb.open_database(path, maxminddb.MODE_MEMORY)
        for probe in PROBES:
            if ":" not in probe or found.metadata().ip_version == 6:
                found.get(probe)
    except OSError as error:
        raise settings.SettingsError(f"steering.database: {path}: {error.strerror}") from error
    except Exception as error:
        raise settings.SettingsError(
            f"steering.database: {path}: no database in MaxMind's format: {error}"
        ) from error
    return found


def _one(headers: Values, name: str | None) -> str | None:
    """A header's value if it stands there once."""
    found = headers(name) if name is not None else ()
    return found[0].strip() if len(found) == 1 else None


def _number(text: str | None) -> float | None:
    if text is None or len(text) > HEADER_CHARACTERS_MAX or not text.isascii():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _country(code: Any) -> str | None:
    """What can be a country's code."""
    found = isinstance(code, str) and len(code) == 2 and code.isascii() and code.isalpha()
    return code.upper() if found else None
