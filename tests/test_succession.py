"""One relay takes over from another that runs."""

import pytest

import succession


def test_there_is_no_relay(tmp_path):
    with pytest.raises(succession.SuccessionError, match="no relay of this configuration"):
        succession.Successor(tmp_path / "relay.sock")
