"""Advice: `signaling steer`, which says where a client would be sent, and why.

    signaling steer --config FILE --lat 35.7 --lon 139.7 --explain
    signaling steer --config FILE --country JP --site-down tokyo --load singapore=0.9 --json

What it owns: the questions that may be asked, what is wrong with those that may not, and the forms
of the answer. What decides is the same steering.py, made of the same settings, as in signaling.

Rules that stay true:
- It asks nobody anything unless `--live` is given: then the relays, at `status`, as signaling
  does. What is not known is taken as signaling takes it, and the answer says so.
- It needs neither the keys nor the right to listen anywhere.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

import countries
import geography
import guide
import sdp
import settings
from mileage import position
from steering import Decision, Request, State


class Wrong(ValueError):
    """A question that cannot be answered; the message names the option."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked."""

    latitude: float | None = None
    longitude: float | None = None
    country: str | None = None
    address: str | None = None
    """Looked up in the database, if nothing else says where it is; and it draws the lot."""
    sites_down: Sequence[str] = ()
    site_loads: Sequence[str] = ()
    """`NAME=0.9`."""
    clusters_down: Sequence[int] = ()
    cluster_loads: Sequence[str] = ()
    """`ID=0.9`."""


def answer(
    config: settings.Signaling, question: Question, heard: Mapping[str, State] | None = None
) -> Decision:
    """Where that client goes; `heard` is how sites are, if they were asked.

    Raises Wrong, and SettingsError for a database that cannot be used.
    """
    if not guide.has_choice(config):
        raise Wrong(
            "there is nothing to choose from: the file has neither [[site]] nor clusters with"
            " latitude and longitude"
        )
    sites = {site.name: State() for site in config.site}
    clusters = {cluster.id: State() for cluster in config.cluster}
    supposed = _supposed("site", sites, question.sites_down, question.site_loads)
    ids = {str(id): state for id, state in clusters.items()}
    downs = list(map(str, question.clusters_down))
    supposed_ids = _supposed("cluster", ids, downs, question.cluster_loads)
    # Once anything is supposed of one, the others are well: nobody asks for more at a time.
    known = (sites if supposed else {}) | dict(heard or {}) | supposed
    known_ids = clusters if supposed_ids else {}
    known_ids |= {int(id): state for id, state in supposed_ids.items()}
    return guide.steering_of(config).decide(_request(config, question), known, known_ids)


def _request(config: settings.Signaling, question: Question) -> Request:
    latitude, longitude, key = question.latitude, question.longitude, b""
    if (latitude is None) != (longitude is None):
        raise Wrong("--lat and --lon go together")
    if latitude is not None and position(latitude, longitude) is None:
        raise Wrong("--lat is from -90 to 90 and --lon from -180 to 180 degrees")
    country = None if question.country is None else question.country.upper()
    if country is not None and country not in countries.CENTRES:
        raise Wrong(f"--country {question.country}: no country has this code (ISO 3166-1 alpha-2)")
    family = None
    if question.address is not None:
        try:
            family = ipaddress.ip_address(question.address).version
        except ValueError:
            raise Wrong(f"--address {question.address}: no IPv4 or IPv6 address") from None
        key = guide.lot_of(question.address) or question.address.encode()
        if latitude is None and country is None:
            if config.steering is None or config.steering.database is None:
                raise Wrong(
                    "--address: nothing says where it is: steering.database is not set in the file"
                )
            return geography.Geography(config).of(question.address, key)
    return Request(latitude, longitude, country, key, family)


def _supposed(
    what: str, all_well: Mapping[str, State], downs: Sequence[str], loads: Sequence[str]
) -> dict[str, State]:
    """What is to be supposed of some of them."""
    found = {}
    option = "--load" if what == "site" else "--cluster-load"
    for text in loads:
        name, _, load = text.rpartition("=")
        try:
            number = float(load)
        except ValueError:
            number = -1.0
        if not (name and 0 <= number < 1000):
            raise Wrong(f"{option} {text}: expected NAME=LOAD, such as 0.9 of what it takes")
        found[_one_of(what, option, name, all_well)] = State(True, number)
    for name in downs:
        option = f"--{what}-down"
        before = found.get(_one_of(what, option, name, all_well), State())
        found[name] = before._replace(healthy=False)
    return found


def _one_of(what: str, option: str, name: str, known: Mapping[str, State]) -> str:
    if name not in known:
        raise Wrong(
            f"{option} {name}: there is no such {what}; there is {', '.join(known) or 'none'}"
        )
    return name


def plain(found: Decision) -> str:
    """The answer, a line an address, for people and for `cut`."""
    lines = [f"{site.name} {at}" for site, at in found.relays]
    return "\n".join([*lines, f"cluster {' '.join(map(str, found.clusters))}"])


def explained(found: Decision) -> str:
    """The reasons, then the answer."""
    return "\n".join([*found.why, "", plain(found)])


def as_json(found: Decision) -> str:
    """All of it, for programs; candidates as they stand in an answer to an offer."""
    hosts = [(at.host, at.port) for _, at in found.relays]
    lines = sdp.candidate_lines(hosts)[: len(hosts)]
    return orjson.dumps(
        {
            "clusters": found.clusters,
            "relays": [
                {"site": site.name, "address": at.host, "port": at.port, "candidate": line[2:]}
                for (site, at), line in zip(found.relays, lines, strict=True)
            ],
            "why": found.why,
        }
    ).decode()
