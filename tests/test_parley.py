"""Parley: what relays say to one another, and the tag by which they know each other's frames."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frame
import parley
import ufrag

KEYRING = ufrag.Keyring.parse("0 " + "42" * 32)
TWO = ufrag.Keyring.parse("0 " + "42" * 32 + "\n1 " + "43" * 32)
TAGS = parley.Tags(KEYRING, used=True)
HEADER = frame.header("192.0.2.7", 40_000)
UFRAG = b"A" * 23


@pytest.mark.parametrize("used", [False, True])
def test_messages_come_back_as_they_were_said(used):
    tags = parley.Tags(KEYRING, used)
    key = 0 if used else None

    def read(octets):
        header, rest = octets[:32], memoryview(octets)[32:]
        assert parley.is_message(header) and not frame.is_frame(header)
        said = tags.read(header, rest)
        assert said is not None and said.key == key
        return said

    probe = read(tags.probe(b"12345678", key))
    assert (probe.kind, probe.body) == (parley.Kind.PROBE, b"12345678")
    answer = read(tags.answer(probe, True))
    assert (answer.kind, answer.body) == (parley.Kind.ANSWER, b"12345678\1")
    stamped = HEADER[:28] + tags.stamp(HEADER, key)
    question = read(tags.question(stamped))
    assert (question.kind, question.header) == (parley.Kind.QUESTION, stamped)
    for standing in parley.Standing:
        told = read(tags.introduction(HEADER, UFRAG, standing, key))
        assert (told.kind, told.header) == (parley.Kind.INTRODUCTION, stamped)
        assert parley.introduced(told.body) == (UFRAG, standing)
    assert parley.introduced(b"\x63" + UFRAG) == (UFRAG, parley.Standing.FAR)  # the least


def test_every_changed_bit_of_a_tagged_message_shows():
    octets = TAGS.introduction(HEADER, UFRAG, parley.Standing.ASSURED, 0)
    for at in range(len(octets)):
        if frame.HEADER_OCTETS - 4 <= at < frame.HEADER_OCTETS:
            continue  # the client's own tag: it is looked at on its own
        for bit in range(8):
            broken = bytearray(octets)
            broken[at] ^= 1 << bit
            assert TAGS.read(bytes(broken[:32]), memoryview(broken)[32:]) is None
    others = parley.Tags(ufrag.Keyring.parse("0 " + "44" * 32), True)
    assert others.read(octets[:32], memoryview(octets)[32:]) is None


@given(st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(octets):
    header, rest = octets[:32].ljust(32, b"\0"), octets[32:]
    parley.is_message(header)
    assert TAGS.read(header, rest) is None
    plain = parley.Tags(KEYRING, False).read(header, rest)
    assert plain is None or parley.is_message(header)


def test_a_tag_on_a_frame_leaves_its_client_as_it_is():
    stamped = HEADER[:28] + TAGS.stamp(HEADER, 0)
    assert frame.is_frame(stamped) and frame.client(stamped) == ("192.0.2.7", 40_000)
    assert frame.key(stamped) == frame.key(HEADER)
    assert TAGS.stamped(stamped) == (True, 0) and TAGS.stamped(HEADER) == (False, None)
    assert not TAGS.stamped(frame.header("192.0.2.8", 40_000)[:28] + stamped[28:])[0]
    assert not any(TAGS.stamped(HEADER[:28] + os.urandom(4))[0] for _ in range(2000))
    assert TAGS.twins(stamped) == [] == parley.Tags(TWO, False).twins(HEADER)


def test_a_frame_is_known_by_each_of_the_keys():
    both = parley.Tags(TWO, True)
    older, newer = (HEADER[:28] + both.stamp(HEADER, key) for key in (0, 1))
    assert both.stamped(older) == (True, 0) and both.stamped(newer) == (True, 1)
    assert TAGS.stamped(older) == (True, 0) and TAGS.stamped(newer) == (False, None)
    assert both.twins(newer) == [older] and both.twins(older) == [newer]
    asked = both.question(newer)  # under the key that its frame came with
    assert both.read(asked[:32], asked[32:]).key == 1


def test_the_newest_key_that_the_other_side_has():
    keys = parley.Keys([0, 1, 2])
    assert keys.best == 0  # what everybody has had for longest
    assert keys.answered(1, 10.0) and keys.best == 1
    assert not keys.answered(0, 10.1) and keys.best == 1
    assert keys.answered(2, 10.2) and keys.best == 2
    # It has lost the newest, and says so by silence.
    late = 10.2 + parley.KNOWN_S + 0.1
    assert keys.answered(0, late) and keys.best == 0
    assert parley.Keys([None]).answered(None, 1.0) is False


def test_the_vector_of_the_tag():
    """The octets that an implementation in another language has to make: ARCHITECTURE.md."""
    master = bytes(range(32))
    keyring = ufrag.Keyring.parse(f"0 {master.hex()}")
    assert keyring.keys[0].transit.hex() == VECTOR_KEY
    assert parley.Tags(keyring, True).stamp(HEADER, 0).hex() == VECTOR_TAG


VECTOR_KEY = "d614db3a0cd3f3f52933183a44780fc80f302177e95db1d9486923f29afb35fc"
VECTOR_TAG = "4bff0eb8"
