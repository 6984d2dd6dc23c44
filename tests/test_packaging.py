"""What pip installs is what the checkout holds: the checkout itself hides every mistake here."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git tracks: `build/` of the checkout plays no part."""
    source = tmp_path_factory.mktemp("source")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        (source / path.name).write_bytes(path.read_bytes())
    (
        source / "config"
    ).mkdir()  # the folder that would win over the modules if they were not listed
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name for name in names if ".dist-info/" not in name}
    assert top == {path.name for path in ROOT.glob("*.py")}


def test_the_programs_start_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment, from `/`, with only the dependencies of this one in sight."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "lib" / version / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    # A path in a .pth file is searched, its own .pth files are not run: the editable install of
    # the checkout stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for program, target in PROJECT["project"]["scripts"].items():
        module = target.partition(":")[0]
        ran = subprocess.run(
            [tmp_path / "bin" / "python", "-P", "-m", module, "--help"],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert "Usage" in ran.stdout, program


def test_every_dependency_is_used() -> None:
    """What nobody imports nobody should install."""
    imported = "\n".join(path.read_text() for path in ROOT.glob("*.py"))
    names = {"webrtcvad-wheels": "webrtcvad", "prometheus-client": "prometheus_client",
             "pyopenssl": "OpenSSL"}  # fmt: skip
    # aioice comes with aiortc: named to bound its version.
    bounded = {"aioice"}
    for requirement in PROJECT["project"]["dependencies"]:
        name = requirement.partition(">")[0].partition("=")[0].partition("<")[0].strip()
        module = names.get(name, name)
        assert name in bounded or f"import {module}" in imported or f"from {module}" in imported
