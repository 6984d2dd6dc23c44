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
TAGS = parley.Tags(KEYRING, demanded=True)
HERE = frame.packed_address(frame.name("10.9.0.1", 3500, 2))
HEADER = frame.header("192.0.2.7", 40_000)
UFRAG = b"A" * 23


@pytest.mark.parametrize("demanded", [False, True])
def test_messages_come_back_as_they_were_said(demanded):
    tags = parley.Tags(KEYRING, demanded)

    def read(octets):
        header, rest = octets[:32], memoryview(octets)[32:]
        assert parley.is_message(header) and not frame.is_frame(header)
        said = tags.read(header, rest)
        assert said is not None and said.key == 0
        return said

    probe = read(tags.probe(b"12345678", 0))
    assert (probe.kind, probe.body) == (parley.Kind.PROBE, b"12345678")
    answer = read(tags.answer(probe, True))
    assert (answer.kind, answer.body) == (parley.Kind.ANSWER, b"12345678\1")
    stamped = HEADER[:28] + tags.stamp(HEADER, HERE, 0)
    question = read(tags.question(stamped, HERE))
    assert (question.kind, question.header) == (parley.Kind.QUESTION, stamped)
    for standing in parley.Standing:
        told = read(tags.introduction(stamped, UFRAG, standing, 0))
        assert (told.kind, told.header) == (parley.Kind.INTRODUCTION, stamped)
        assert parley.introduced(told.body) == (UFRAG, standing)
    assert parley.introduced(b"\x63" + UFRAG) == (UFRAG, parley.Standing.FAR)  # the least


def test_where_tags_are_not_demanded_others_are_heard_too():
    tags, others = (
        parley.Tags(KEYRING, False),
        parley.Tags(ufrag.Keyring.parse("0 " + "44" * 32), True),
    )
    octets = others.probe(b"12345678", 0)
    said = tags.read(octets[:32], octets[32:])
    assert said is not None and said.key is None
    answer = tags.answer(said, False)
    assert len(answer) == 32 + 4 + 9
    assert tags.stamped(HEADER, HERE)


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
    stamped = HEADER[:28] + TAGS.stamp(HEADER, HERE, 0)
    assert frame.is_frame(stamped) and frame.client(stamped) == ("192.0.2.7", 40_000)
    assert frame.key(stamped) == frame.key(HEADER)
    assert TAGS.stamped(stamped, HERE) and not TAGS.stamped(HEADER, HERE)
    other = frame.header("192.0.2.8", 40_000)
    assert not TAGS.stamped(other[:28] + stamped[28:], HERE)
    assert not any(TAGS.stamped(HEADER[:28] + os.urandom(4), HERE) for _ in range(2000))
    assert TAGS.twins(stamped, HERE) == []


def test_each_entrance_has_a_header_of_its_own_for_a_client():
    there = frame.packed_address(frame.name("fd00:9::1", 3500, 10))
    assert len(HERE) == len(there) == 16 and HERE[:12] == bytes(10) + b"\xff\xff"
    here, elsewhere = (HEADER[:28] + TAGS.stamp(HEADER, each, 0) for each in (HERE, there))
    assert here != elsewhere and frame.key(here) == frame.key(elsewhere)
    assert TAGS.stamped(here, HERE) and not TAGS.stamped(here, there)


def test_a_frame_is_known_by_each_of_the_keys():
    both = parley.Tags(TWO, True)
    older, newer = (HEADER[:28] + both.stamp(HEADER, HERE, key) for key in (0, 1))
    assert both.stamped(older, HERE) and both.stamped(newer, HERE)
    assert TAGS.stamped(older, HERE) and not TAGS.stamped(newer, HERE)
    assert both.twins(newer, HERE) == [older] and both.twins(older, HERE) == [newer]
    asked = both.question(newer, HERE)  # under the key that its frame came with
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


def test_the_vector_of_the_tag():
    """The octets that an implementation in another language has to make: ARCHITECTURE.md."""
    master = bytes(range(32))
    keyring = ufrag.Keyring.parse(f"0 {master.hex()}")
    assert keyring.keys[0].transit.hex() == VECTOR_KEY
    assert parley.Tags(keyring, True).stamp(HEADER, HERE, 0).hex() == VECTOR_TAG


VECTOR_KEY = "d614db3a0cd3f3f52933183a44780fc80f302177e95db1d9486923f29afb35fc"
VECTOR_TAG = "8d47ea54"
