"""What an earlier relay left: taken where it fits, refused with a reason where it does not."""

import legacy


def test_nothing_was_left():
    estate = legacy.Estate()
    assert estate.memories == []
    assert estate.take_socket("public-0", 10, "::1", 0) is None
    assert list(estate.read_flows("memory-0")) == []
    estate.close()
