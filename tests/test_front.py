"""Front: what two of signaling's settings cannot say together."""

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
