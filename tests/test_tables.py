"""Tables: files with secrets are read if they are their owner's alone, and are in no message."""

from pathlib import Path

import pytest

import keys
import tables
import ufrag

RING = ufrag.Keyring.parse("0 " + "11" * 32)
LINE = keys.make("shop", bytes(32))[1]


def test_what_its_owner_alone_may_read_is_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for mode in (0o600, 0o400):
        path.write_text(LINE)
        path.chmod(mode)
        assert tables.read_private(path) == LINE
        assert len(tables.load_api_keys(path, RING)) == 1
        path.chmod(0o600)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_what_others_may_touch_is_not(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_text(LINE)
    path.chmod(mode)
    with pytest.raises(tables.SettingsError, match=f"secret: mode {mode:04o} lets others"):
        tables.read_private(path)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(tables.SettingsError, match="none: No such file"):
        tables.read_private(tmp_path / "none")
    path = tmp_path / "binary"
    path.touch(mode=0o600)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(tables.SettingsError, match="binary: 'utf-8' codec"):
        tables.load_api_keys(path, RING)
