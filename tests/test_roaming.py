"""Whose media it is: what a datagram says, which flow is meant, and who may follow how many."""

import itertools
import random

import hypothesis
import pytest
from hypothesis import strategies as some

import frame
import roaming

K = roaming.Kind


def rtp(ssrc, first=0x80, second=0x6F):
    return bytes([first, second, 0, 1, 0, 0, 0, 2]) + ssrc.to_bytes(4, "big")


def rtcp(ssrc, second=0xC8):
    return bytes([0x80, second, 0, 6]) + ssrc.to_bytes(4, "big")


DATAGRAMS = {
    "RTP": (rtp(0x01020304) + b"payload", (K.MEDIA, 0x01020304)),
    "RTP and nothing else": (rtp(0xFFFFFFFF), (K.MEDIA, 0xFFFFFFFF)),
    "RTP with a marker": (rtp(7, second=0xEF), (K.MEDIA, 7)),
    "the last first octet": (rtp(7, first=0xBF), (K.MEDIA, 7)),
    "beyond it": (rtp(7, first=0xC0), (K.ADDRESS, 0)),
    "RTP cut off": (rtp(7)[:-1], (K.ADDRESS, 0)),
    "RTP of nobody": (rtp(0), (K.ADDRESS, 0)),
    "a sender report": (rtcp(9), (K.CONTROL, 9)),
    "a receiver report": (rtcp(9, 0xC9), (K.CONTROL, 9)),
    "RTCP cut off": (rtcp(9)[:-1], (K.ADDRESS, 0)),
    "a report of nobody": (rtcp(0), (K.ADDRESS, 0)),
    "DTLS": (b"\x16\xfe\xfd" + bytes(20), (K.ADDRESS, 0)),
    "STUN": (b"\x00\x01" + bytes(18), (K.ADDRESS, 0)),
    "nothing": (b"", (K.ADDRESS, 0)),
}


@pytest.mark.parametrize("name", DATAGRAMS)
def test_what_a_datagram_says(name):
    datagram, expected = DATAGRAMS[name]
    assert roaming.read(datagram) == roaming.read(memoryview(datagram)) == expected


@hypothesis.given(some.binary(max_size=40))
def test_any_octets_are_read(datagram):
    kind, ssrc = roaming.read(datagram)
    assert (kind is K.ADDRESS) == (ssrc == 0) and 0 <= ssrc < 2**32


# --- who is listened to ---------------------------------------------------------------------------


def test_a_client_is_listened_to_until_its_media_comes():
    one = roaming.Listening()
    one.add(b"a")
    assert not one.hear(b"a", 0) and b"a" in one
    assert one.hear(b"a", 7) and b"a" not in one
    assert not one.hear(b"a", 7)  # another datagram of the same batch


def test_a_client_without_media_is_listened_to_for_a_while():
    one = roaming.Listening()
    one.add(b"a")
    for _ in range(roaming.LISTEN_DATAGRAMS):
        assert b"a" in one
        assert not one.hear(b"a", 0)
    assert not one


def test_so_many_are_listened_to_and_the_oldest_makes_room():
    one = roaming.Listening()
    for number in range(roaming.LISTENING_MAX + 10):
        one.add(number)
    assert len(one) == roaming.LISTENING_MAX
    assert 9 not in one and 10 in one and roaming.LISTENING_MAX + 9 in one


# --- followers ------------------------------------------------------------------------------------


def test_the_oldest_follower_of_the_same_session_makes_room():
    one = roaming.Followers()
    for number in range(roaming.FOLLOWERS_MAX):
        assert one.leaves(b"u", False, 99) is None
        one.add(b"u", b"%d" % number, False)
    assert one.leaves(b"v", False, 99) is None
    assert one.leaves(b"u", False, 99) == one.leaves(b"u", True, 99) == b"0"
    one.remove(b"u", b"0")
    one.add(b"u", b"9", False)
    assert one.leaves(b"u", False, 99) == b"1" and len(one) == roaming.FOLLOWERS_MAX


def test_who_is_near_is_pushed_out_by_nobody_who_is_not():
    one = roaming.Followers()
    one.add(b"u", b"near", True)
    for number in range(1, roaming.FOLLOWERS_MAX):
        one.add(b"u", b"%d" % number, False)
    for number in range(1, 20):  # as many strangers as like
        gone = one.leaves(b"u", False, 99)
        assert gone == b"%d" % number
        one.remove(b"u", gone)
        one.add(b"u", b"%d" % (number + roaming.FOLLOWERS_MAX - 1), False)
    for number in range(1, roaming.FOLLOWERS_MAX):
        gone = one.leaves(b"u", True, 99)
        assert gone != b"near"  # strangers go first
        one.remove(b"u", gone)
        one.add(b"u", b"near%d" % number, True)
    assert one.leaves(b"u", False, 99) == b""
    assert one.leaves(b"u", True, 99) == b"near"
    for header in (b"near", *(b"near%d" % number for number in range(1, 4))):
        one.remove(b"u", header)
    assert len(one) == 0 and not one._of


def test_where_there_are_too_many_the_oldest_stranger_makes_room():
    one = roaming.Followers()
    for number, near in enumerate((True, False, True, False)):
        assert one.leaves(b"new", near, 4) is None
        one.add(b"u%d" % number, b"%d" % number, near)
    for near in (True, False):
        assert one.leaves(b"new", near, 4) == b"1"
        assert one.leaves(b"u2", near, 4) == b"1"
        assert one.leaves(b"new", near, 5) is None
    one.remove(b"u1", b"1")
    assert one.leaves(b"new", False, 4) is None and one.leaves(b"new", False, 3) == b"3"
    one.remove(b"u3", b"3")
    assert one.leaves(b"new", True, 2) == b"", "who is near is pushed out by nobody"


# --- the index and the choice ---------------------------------------------------------------------


def test_the_index_agrees_with_a_plain_dictionary():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    one, told = roaming.Index(), {}
    for _ in range(5000):
        number, ssrc = rng.randrange(60), rng.choice([0, 0, 1, 2, 3, *range(100, 130)])
        one.note(number, ssrc)
        told[number] = ssrc
        asked = rng.choice([1, 2, 3, 100, 110, 999])
        expected = {n for n, of in told.items() if of == asked}
        found = one.find(asked)
        assert set(found) == (expected if len(expected) <= roaming.SAME_SSRC_MAX else set()), seed
        assert len(found) == len(set(found))
    for number in range(60):
        one.note(number, 0)
    assert len(one) == 0 and not one._by_ssrc


def test_more_flows_with_one_ssrc_than_a_session_has_are_nobodys():
    one = roaming.Index()
    for number in range(roaming.SAME_SSRC_MAX + 1):
        one.note(number, 7)
    assert one.find(7) == ()
    one.note(3, 8)
    assert len(one.find(7)) == roaming.SAME_SSRC_MAX and one.find(8) == (3,)


HERE = frame.header("192.0.2.1", 5000)
SAME = frame.header("192.0.2.1", 6000)
OTHER = frame.header("192.0.2.2", 5000)
THIRD = frame.header("2001:db8::1", 5000)
A, B, C = b"A" * 23, b"B" * 23, b"C" * 23


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], None),
        ([(SAME, A)], (A, True)),
        ([(OTHER, A)], (A, False)),
        ([(THIRD, A)], (A, False)),
        ([(OTHER, A), (THIRD, A)], (A, False)),  # two addresses of one session
        ([(OTHER, A), (THIRD, B)], None),
        ([(SAME, A), (OTHER, B), (THIRD, C)], (A, True)),
        ([(SAME, A), (SAME, A), (OTHER, A)], (A, True)),
        ([(SAME, A), (SAME, B)], None),
        ([(SAME, A), (SAME, B), (OTHER, C)], None),
    ],
)
def test_whose_it_is(found, expected):
    for order in itertools.permutations(found):
        assert roaming.choose(HERE, order) == expected
