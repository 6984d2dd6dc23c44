"""The transit face: frames of other relays' clients, both ways, and what is let in there."""

import contextlib

import pytest

from . import crossing
from .crossing import counted


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("tag", [False, True], ids=["plain", "tagged"])
def test_a_call_goes_through_two_relays_and_back(tmp_path, stack, tag):
    town = crossing.Crossing(tmp_path, stack, tag=tag)
    for nonce in range(12):
        sock, header, _ = town.call(nonce)
        for _ in range(3):
            town.passes(sock, header)
    assert town.quiet()
    used = [face for face in town.faces if counted(face.worker._face.inbound_ledger)]
    assert len(used) == 2  # both are ways of some of them
    inbound = [counted(face.worker._face.inbound_ledger) for face in used]
    assert sum(each["FORWARDED"] for each in inbound) == 12 * 4
    assert all(set(each) == {"RECEIVED", "FORWARDED", "OCTETS"} for each in inbound)
    assert all(not any(counted(each) for each in node.ledgers()[:2]) for node in town.faces)


def test_frames_pass_unchanged(tmp_path, stack):
    town = crossing.Crossing(tmp_path, stack, faces=1)
    sock, header, _ = town.call(1)
    for payload in (b"\x80", b"\x80" * 172, b"\x16" * 1500):
        sock.send(payload)
        town.settle()
        framed, back = town.transceiver.recvfrom(2048)
        assert framed == header + payload
        town.transceiver.sendto(framed, back)
        town.settle()
        assert sock.recv(2048) == payload
