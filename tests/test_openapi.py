"""The OpenAPI document: it names what is served, and the programs keep to it."""

import json
import re
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import keys
import observer
import openapi
import sdp
import settings
import signaling

from .premises import Premises, open_for_business

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
LIMIT_S = 240
"""For a machine that does much else; it takes a quarter of a minute."""

KEY, KEY_LINE = keys.make("alice", bytes(range(32)))
MORE = """keys_file = "api-keys"
[limits]
address_per_s = 1e5
failures_per_s = 1e5
key_per_s = 1e5
"""

CONFIG = """
hooks = "hooks.py"
[[operations]]
include-path-regex = "{verb}$"
# 501 is what it has to say.
[operations.checks.not_a_server_error]
enabled = false
"""

HOOKS = """
import schemathesis

@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def as_text(ctx, value):
    return value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
"""


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Premises]:
    with open_for_business(tmp_path_factory.mktemp("premises"), MORE, KEY_LINE) as found:
        yield found


def test_it_describes_every_path_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "keys").touch(mode=0o600)
    (tmp_path / "keys").write_text("0 " + bytes(range(32)).hex())
    (tmp_path / "signaling.toml").write_text(
        """
        [signaling]
        listen = "127.0.0.1:0"
        relays = ["127.0.0.1:3478"]
        transceivers = ["127.0.0.1:9000"]
        [keys]
        file = "keys"
        [[cluster]]
        id = 1
        prefix = "127.0.0.0/8"
        ports = [1, 65535]
        """
    )
    config = settings.load(tmp_path / "signaling.toml", settings.Signaling)
    served = set()
    for route in signaling.Entrance(config).application().router.routes():
        assert route.resource is not None
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.resource.canonical)
        if route.method != "HEAD":
            served.add((path, route.method.lower()))
    described = {
        (path, method)
        for path, item in openapi.document()["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == served


def test_its_example_is_an_offer_that_can_be_answered() -> None:
    assert sdp.read_offer(openapi.EXAMPLE_OFFER).setup == "actpass"


def test_every_operation_has_a_name_of_its_own_and_every_reference_leads_somewhere() -> None:
    document = openapi.document()
    names = re.findall(r'"operationId": "(\w+)"', json.dumps(document))
    assert len(names) == len(set(names))
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        found: Any = document
        for part in reference.split("/"):
            found = found[part]


def test_it_is_served(premises: Premises) -> None:
    with urllib.request.urlopen(f"{premises.url}/openapi.json", timeout=20) as response:
        assert response.headers.get_content_type() == "application/json"
        assert response.headers[observer.HEADER]
        assert json.load(response) == json.loads(json.dumps(openapi.document()))


def test_the_programs_keep_to_it(premises: Premises, tmp_path: Path) -> None:
    """Everything that the document allows and much that it does not, by schemathesis."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "hooks.py").write_text(HOOKS)
    ran = subprocess.run(
        [
            *(SCHEMATHESIS, "--config-file", tmp_path / "schemathesis.toml", "run"),
            *(f"{premises.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
            *("--seed", str(seed), "--max-examples", "12", "--continue-on-failure"),
            *("--generation-database", "none", "--no-color", "--request-timeout", "20"),
            # That an offer is well-formed is more than a schema can say; and that a call is gone
            # after a POST to its hangup is more than it can guess.
            *("--exclude-checks", "positive_data_acceptance,ensure_resource_availability"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=LIMIT_S,
        check=False,
    )
    print(ran.stdout[-20_000:])
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    assert not premises.signaling.faults()
    assert not premises.transceiver.faults()
