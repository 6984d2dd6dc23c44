"""Advice: what `signaling steer` prints, and what it says to questions that make no sense."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import advice
import settings
import signaling
from steering import State

from . import maps
from .test_sites import Relay, configured

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "config" / "global" / "signaling.toml"
CONFIG = settings.load(EXAMPLE, settings.Signaling)


def steer(*options: str, config: Path = EXAMPLE) -> Result:
    return CliRunner().invoke(signaling.cli, ["steer", "--config", str(config), *options])


def said(**question: Any) -> str:
    return advice.explained(advice.answer(CONFIG, advice.Question(**question)))


def test_the_plain_answer_is_an_address_a_line() -> None:
    done = steer("--country", "jp")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "tokyo [2001:db8:3::5]:3478",
        "tokyo 192.0.2.5:3478",
        "virginia [2001:db8:2::5]:3478",
        "virginia 198.51.100.5:3478",
        "cluster 2 1",
    ]


def test_explained_it_is_sentences_and_then_the_answer() -> None:
    done = steer("--lat", "48.9", "--lon", "2.4", "--load", "frankfurt=1.5", "--explain")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:9] == [
        "The client is at 48.90, 2.40.",
        "Round trips are estimated by distance: 0.022 ms a km to a site, 0.017 from there to a"
        " cluster; * is configured, or follows from it.",
        "Clusters, by the least way over a site: cluster 1 (10 + 0* ms by frankfurt), cluster 2"
        " (10 + 248* ms by frankfurt).",
        "Nothing is known of their health: all are taken to be healthy.",
        "Sites, by the least way to cluster 1: frankfurt (10 + 0* ms), virginia (136 + 97* ms),"
        " tokyo (310* + 248* ms).",
        "frankfurt has a load of 1.50 and gives 100% of its clients away, this one too.",
        "It enters at virginia.",
        "Should that be lost, its ICE goes on by itself at tokyo.",
        "Clusters, by the least way from virginia: cluster 1 (97* ms), cluster 2 (165* ms).",
    ]
    assert done.stdout.endswith("\ncluster 1 2\n")


def test_as_json_it_has_the_candidates_of_an_answer() -> None:
    done = steer("--country", "US", "--site-down", "virginia", "--json")
    found = json.loads(done.stdout)
    assert found["clusters"] == [1, 2]
    assert [each["site"] for each in found["relays"]] == [
        "frankfurt",
        "frankfurt",
        "tokyo",
        "tokyo",
    ]
    priorities = [int(each["candidate"].split()[3]) for each in found["relays"]]
    assert priorities == sorted(set(priorities), reverse=True)
    assert found["relays"][1]["candidate"].endswith(" 203.0.113.5 3478 typ host")
    assert "virginia is not healthy." in found["why"]


def test_what_is_not_supposed_is_as_it_is_for_signaling() -> None:
    assert said(country="JP").count("Nothing is known of their health") == 2
    found = said(country="JP", sites_down=["virginia"], cluster_loads=["2=1.0"])
    assert "Nothing is known of their health" not in found
    assert "It enters at tokyo." in found and "goes on by itself at frankfurt." in found
    assert "cluster 2 has a load of 1.00 and gives 100% of its clients away, this one too." in found
    found = said(country="JP", site_loads=["virginia=0.5"], clusters_down=[2])
    assert "cluster 2 is not healthy." in found and "It enters at tokyo." in found
    found = said(country="JP", site_loads=["tokyo=0.5"], sites_down=["tokyo"])
    assert "tokyo is not healthy." in found
    heard = {"tokyo": State(False), "frankfurt": State(True, 0.1)}
    found = advice.explained(advice.answer(CONFIG, advice.Question(country="JP"), heard))
    assert "tokyo is not healthy." in found and "It enters at virginia." in found
    assert "Nothing says where the client is" in said()


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ({"latitude": 3.0}, "--lat and --lon go together"),
        ({"latitude": 91.0, "longitude": 0.0}, "--lat is from -90 to 90 and --lon from -180 to"),
        ({"latitude": float("nan"), "longitude": 0.0}, "--lat is from -90 to 90"),
        ({"country": "Japan"}, "--country Japan: no country has this code"),
        ({"address": "home"}, "--address home: no IPv4 or IPv6 address"),
        ({"address": "192.0.2.1"}, "--address: nothing says where it is: steering.database is n"),
        ({"sites_down": ["paris"]}, "--site-down paris: there is no such site; there is frankfurt"),
        ({"site_loads": ["paris=1"]}, "--load paris: there is no such site"),
        ({"site_loads": ["tokyo"]}, "--load tokyo: expected NAME=LOAD"),
        ({"site_loads": ["tokyo=nan"]}, "--load tokyo=nan: expected NAME=LOAD"),
        ({"site_loads": ["tokyo=-1"]}, "--load tokyo=-1: expected NAME=LOAD"),
        ({"clusters_down": [7]}, "--cluster-down 7: there is no such cluster; there is 1, 2"),
        ({"cluster_loads": ["7=1"]}, "--cluster-load 7: there is no such cluster"),
    ],
)
def test_a_question_that_makes_no_sense_is_answered_so(
    question: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(advice.Wrong, match=re.escape(sentence)):
        said(**question)


def test_mistakes_end_the_program_with_a_sentence(tmp_path: Path) -> None:
    done = steer("--country", "Japan")
    assert (done.exit_code, done.stdout) == (64, "")
    assert done.stderr.startswith("signaling: --country Japan: no country has this code")
    assert steer(config=tmp_path / "none").exit_code == 78
    path = tmp_path / "signaling.toml"
    text = EXAMPLE.read_text().partition("# Three sites")[0]
    text = text.replace(
        'listen = "127.0.0.1:8080"', 'listen = "127.0.0.1:1"\nrelays = ["192.0.2.5:1"]'
    )
    path.write_text(re.sub("^(latitude|longitude).*$", "", text, flags=re.MULTILINE))
    done = steer("--country", "JP", config=path)
    assert done.exit_code == 64 and "there is nothing to choose from" in done.stderr


def test_an_address_is_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "signaling.toml"
    text = EXAMPLE.read_text()
    path.write_text(text.replace("[steering]\n", '[steering]\ndatabase = "places.mmdb"\n'))
    done = steer("--address", "203.0.113.77", config=path)
    assert done.exit_code == 78 and "places.mmdb: No such file" in done.stderr
    maps.write(tmp_path / "places.mmdb")
    found = steer("--address", "203.0.113.77", config=path).stdout
    assert found.startswith("tokyo 192.0.2.5:3478\ntokyo [2001:db8:3::5]:3478\n")
    assert steer("--address", "2001:db8:2::1", config=path).stdout.startswith("frankfurt ")
    found = steer("--address", "192.0.2.9", "--explain", config=path).stdout
    assert found.startswith("Nothing says where the client is")


def test_live_asks_the_relays(tmp_path: Path) -> None:
    async def story() -> str:
        async with Relay().serving() as one, Relay().serving() as two:
            one.status, two.flows = 503, 85
            configured(tmp_path, one.url)  # its folder
            text = EXAMPLE.read_text()
            gone = "http://127.0.0.1:9"
            for number, url in enumerate((gone, gone, gone, gone, one.url)):
                at = ("1.5", "1.6", "2.5", "2.6", "3.5")[number]
                text = text.replace(f"http://10.9.{at}:9464", f"{url}")
            text = re.sub(rf'"{gone}", "{gone}"', f'"{two.url}"', text, count=1)
            text = re.sub(rf'"{gone}", "{gone}"', f'"{gone}"', text, count=1)
            path = tmp_path / "signaling.toml"
            path.write_text(text.replace("capacity = 60000", "capacity = 100", 1))
            options = ("--country", "JP", "--live", "--explain")
            done = await asyncio.to_thread(steer, *options, config=path)
            assert done.exit_code == 0, done.stderr
            return done.stdout

    found = asyncio.run(asyncio.wait_for(story(), 60))
    assert "tokyo is not healthy." in found
    assert "frankfurt has a load of 0.85 and gives 25% of its clients away" in found
    # Without a key, this client is among the ones that stay.
    assert "It enters at frankfurt." in found or "virginia is not healthy." in found
