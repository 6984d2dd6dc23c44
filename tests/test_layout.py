"""The rules of the tree, as a test: who imports what, how long things get, what is documented."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
PROGRAMS = {"relay", "transceiver", "signaling", "parrot_server"}
SANS_IO = {
    "attendants",
    "dialect",
    "adapters",
    "rtvi",
    "reports",
    "sentences",
    "opening",
    "sealing",
    "keys",
    "limits",
    "memory",
    "records",
    "outbox",
    "remote",
    "resample",
    "admission",
    "meter",
    "mileage",
    "endpoints",
    "backbone",
    "parley",
    "contests",
    "frame",
    "ufrag",
    "stun",
    "expiry",
    "flows",
    "gate",
    "recovery",
    "roaming",
    "roster",
    "ice",
    "ledger",
    "sdp",
    "sdpfrag",
    "rtp",
    "audio",
    "g711",
    "receiver",
    "fec",
    "parrot",
    "hold",
    "paths",
    "realtime",
    "turns",
    "floor",
    "replies",
    "channel",
    "conversation",
    "countries",
    "standing",
    "steering",
}

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 500

# Each outside dependency has the importers named here and no other.
# fmt: off
IMPORTERS = {
    "aiohttp": {
        "attendance",
        "sideband",
        "control",
        "guide",
        "sites",
        "uplink",
        "parrot_server",
        "transceiver",
        "signaling",
        "calls",
        "whip",
        "pipecat",
        "door",
        "reception",
        "listener",
        "intake",
        "placement",
        "monitor",
        "observer",
    },
    "aioice": set(),
    "aiortc": {"association", "dtls", "peer"},
    "asyncio": {
        "control",
        "attendance",
        "listener",
        "directory",
        "sideband",
        "sites",
        "door",
        "mux",
        "pacer",
        "peer",
        "transceiver",
        "signaling",
        "intake",
        "placement",
        "parrot_server",
        "uplink",
        "inquiries",
        "keeper",
        "monitor",
        "archive",
        "redisclient",
        "presence",
        "registry",
    },
    "av": {"opus", "telephone"},
    "concurrent": set(),
    "cryptography": {"ufrag", "sealing"},
    "ctypes": {"udp", "opus"},
    "maxminddb": {"geography"},
    "msgspec": {"guide", "settings", "tables", "front", "realtime", "relay"},
    "OpenSSL": {"dtls"},
    "orjson": {
        "pipecat",
        "rtvi",
        "outbox",
        "presence",
        "remote",
        "channel",
        "advice",
        "journal",
        "monitor",
        "realtime",
        "keys",
        "listener",
        "opening",
        "control",
        "records",
        "intake",
        "signaling",
        "placement",
        "parrot_server",
        "top",
    },
    "prometheus_client": {"metrics"},
    "psutil": {"host"},
    "pylibsrtp": {"peer"},
    "pyroute2": {"host"},
    "redis": {"redisclient"},
    "threading": set(),  # nowhere: processes for the relay, one event loop for the rest
    "webrtcvad": {"turns"},
    "typer": {"ufrag", *PROGRAMS},
}
# fmt: on

# What a sans-IO core never sees: sockets, clocks, chance, loggers, event loops, files.
OUTSIDE_WORLD = {
    "asyncio", "logging", "os", "pathlib", "random", "secrets", "select", "signal", "socket",
    "subprocess", "threading", "time", "mmap", "tempfile",
}  # fmt: skip
# ufrag's command line, at the bottom of the file, draws a nonce and a key.
OUTSIDE_ALLOWED = {("ufrag", "secrets")}


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """Top-level names that a module imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_every_module_is_listed_and_has_a_test() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == MODULES
    missing = [name for name in MODULES if not (ROOT / "tests" / f"test_{name}.py").exists()]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_their_owners(module: str) -> None:
    found = imports(module)
    for dependency, owners in IMPORTERS.items():
        assert dependency not in found or module in owners, f"{module} imports {dependency}"
    others = PROGRAMS - {module}
    assert not found & others, f"{module} imports a program: {found & others}"
    if module in SANS_IO:
        outside = {name for name in found & OUTSIDE_WORLD if (module, name) not in OUTSIDE_ALLOWED}
        assert not outside, f"{module} is sans-IO and imports {outside}"


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module: str) -> None:
    text = (ROOT / f"{module}.py").read_text()
    assert len(text.splitlines()) <= MODULE_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= FUNCTION_LINES_MAX, f"{module}.{node.name} has {size} lines"


def undocumented(body: list[ast.stmt], owner: str) -> list[str]:
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            name = f"{owner}.{node.name}"
            # An overload, a property's setter or a protocol's override says nothing new.
            if not ast.get_docstring(node):
                found.append(name)
            if isinstance(node, ast.ClassDef):
                found += undocumented(node.body, name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_headers_and_docstrings(module: str) -> None:
    header = ast.get_docstring(tree(module)) or ""
    assert len(header.splitlines()) >= 6, f"{module} opens without its theory of operation"
    assert undocumented(tree(module).body, module) == []


def test_no_name_is_taken() -> None:
    """A flat module must shadow neither the standard library nor an installed package."""
    taken = set(sys.stdlib_module_names)
    for name, distributions in importlib.metadata.packages_distributions().items():
        if set(distributions) != {"earshot"}:
            taken.add(name)
    assert not taken & set(MODULES)


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_config_and_tests_hold_no_packages() -> None:
    assert not list((ROOT / "config").rglob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_nothing_is_left_undone_and_no_machine_shows() -> None:
    undone = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    machine = re.compile(r"(?<![\w.])/(work|root|farm)/|\.\./shared|bash_jobs")
    for path in tracked("*.py", "*.sh", "*.js", "*.md", "*.toml", "*.html", "*.css", ".ci/run"):
        if path.name == "test_layout.py":  # it names what it looks for
            continue
        text = path.read_text()
        assert not undone.search(text), path
        assert not machine.search(text), path


def test_the_page_loads_nothing_from_elsewhere() -> None:
    loads = re.compile(r"""(src|href|import|from|url\(|fetch\()\s*[=(]?\s*["'(]?\s*(https?:)?//""")
    for path in tracked("web/*"):
        if path.suffix in {".html", ".js", ".css"}:
            assert not loads.search(path.read_text()), path
