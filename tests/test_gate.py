"""The gate, without a socket: what it lets through, and the counter for everything else."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flows
import frame
import gate
import metrics
import stun
import ufrag

KEYRING = ufrag.Keyring.parse("0 " + "42" * 32 + "\n")
OTHERS = ufrag.Keyring.parse("0 " + "43" * 32 + "\n")
HOME = ufrag.Cluster(1, ipaddress.ip_network("10.4.0.0/16"), 9000, 9099)
HOST = ipaddress.ip_address("10.4.0.7")
HOP = frame.name("10.4.0.7", 9000, 2)
CLIENT, STRANGER = frame.header("192.0.2.1", 5000), frame.header("192.0.2.2", 5000)
IN, OUT = metrics.Inbound, metrics.Outbound


def hint(nonce=1, keyring=KEYRING, port=9000):
    return ufrag.mint(keyring, HOME, HOST, port, nonce)


def check(text, password=None, keyring=KEYRING):
    return stun.request(b"t" * 12, f"{text}:x", password or ufrag.password(keyring, text))


@pytest.fixture
def judge():
    limits = flows.Limits(flows=4, tentative=4, addresses=2, idle_s=60, tentative_idle_s=15)
    table = flows.Table(memoryview(bytearray(flows.octets(4))), limits, 0.0)
    judged = gate.Gate(KEYRING, {1: HOME}, table, 2, 1500, 3, 0.0)
    judged.table = table
    return judged


def inbound(judge, header, datagram, now=0.0):
    return judge.inbound(header, memoryview(datagram), len(datagram), now)


def test_a_genuine_check_opens_a_flow_and_media_follows(judge):
    assert inbound(judge, CLIENT, b"\x80 early") is None
    assert inbound(judge, CLIENT, check(hint())) == HOP
    assert inbound(judge, CLIENT, b"\x80 media") == HOP
    assert inbound(judge, CLIENT, b"") == HOP
    assert inbound(judge, STRANGER, b"\x80 media") is None


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"x" * 1501, IN.DROPPED_OVERSIZED),
        (b"\x00\x01", IN.DROPPED_STUN_TRUNCATED),
        (check("A" * 23, b"x" * 24), IN.DROPPED_UFRAG_FORGED),
        (check("nonsense", b"x" * 24), IN.DROPPED_UFRAG_MALFORMED),
        (check(hint(), b"x" * 24), IN.DROPPED_BAD_INTEGRITY),
        (check(hint(keyring=OTHERS), keyring=OTHERS), IN.DROPPED_UFRAG_FORGED),
    ],
)
def test_what_goes_nowhere_says_why(judge, datagram, reason):
    assert inbound(judge, CLIENT, datagram) is reason
    assert len(judge.table) == 0


def test_the_budget_of_integrity_checks_is_renewed_each_second(judge):
    forged = check(hint(), b"x" * 24)
    reasons = [inbound(judge, CLIENT, forged, 0.5) for _ in range(4)]
    assert reasons == [IN.DROPPED_BAD_INTEGRITY] * 3 + [IN.DROPPED_INTEGRITY_LIMIT]
    assert inbound(judge, CLIENT, check(hint()), 0.9) is IN.DROPPED_INTEGRITY_LIMIT
    assert inbound(judge, CLIENT, check(hint()), 1.1) == HOP


def test_draining_refuses_new_sessions_alone(judge):
    inbound(judge, CLIENT, check(hint()))
    judge.draining = True
    assert inbound(judge, STRANGER, check(hint(2))) is IN.DROPPED_DRAINING
    assert inbound(judge, CLIENT, check(hint(2))) == HOP  # an ICE restart of one that is here
    assert inbound(judge, CLIENT, b"\x80 media") == HOP
    assert judge.recovered(STRANGER, hint(3).encode(), 0.0) == HOP  # a call that moved here


def test_what_redis_says_is_believed_no_further_than_the_keys(judge):
    assert judge.recovered(CLIENT, b"garbage", 0.0) is IN.DROPPED_RECOVERED_INVALID
    foreign = hint(keyring=OTHERS).encode()
    assert judge.recovered(CLIENT, foreign, 0.0) is IN.DROPPED_RECOVERED_INVALID
    assert len(judge.table) == 0
    assert judge.recovered(CLIENT, hint().encode(), 0.0) == HOP
    # A flow that the client opened meanwhile stays as it is.
    assert judge.recovered(CLIENT, hint(port=9001).encode(), 0.0) == HOP
    for number in range(5):
        last = judge.recovered(frame.header("192.0.2.9", number), hint().encode(), 0.0)
    assert last is IN.DROPPED_RECOVERED_INVALID  # the table's limits hold here too


SSRC = 0xDECAFBAD
NEAR, FAR = (SSRC, True), (SSRC, False)


@pytest.mark.parametrize("follows", [NEAR, FAR])
def test_what_an_ssrc_opens_is_judged_like_any_other_ufrag(judge, follows):
    for wrong in (b"garbage", hint(keyring=OTHERS).encode(), b""):
        assert judge.recovered(CLIENT, wrong, 0.0, follows) is IN.DROPPED_RECOVERED_INVALID
    assert len(judge.table) == 0
    assert judge.recovered(CLIENT, hint().encode(), 0.0, follows) == HOP
    assert inbound(judge, CLIENT, b"\x80 media") == HOP
    # A flow that is there stays as it is.
    assert judge.recovered(CLIENT, hint(2).encode(), 0.0, follows) == HOP
    assert judge.table.ufrag(CLIENT) == hint().encode()
    assert judge.outbound(CLIENT, 100, HOP) is None


def follower(judge):
    assert judge.recovered(CLIENT, hint().encode(), 0.0, FAR) == HOP
    return lambda: judge.table._flow(judge.table._slots[CLIENT]).origin


def test_a_followers_check_is_checked_and_makes_the_flow_its_own(judge):
    origin = follower(judge)
    assert inbound(judge, CLIENT, check(hint(), b"x" * 24)) is IN.DROPPED_BAD_INTEGRITY
    assert origin() is flows.Origin.FAR
    assert inbound(judge, CLIENT, check(hint())) == HOP
    assert origin() is flows.Origin.CHECKED
    assert inbound(judge, CLIENT, check(hint(), b"x" * 24)) == HOP  # now the transceiver's to judge


def test_a_followers_check_passes_where_a_limit_is_reached(judge):
    origin = follower(judge)
    for _ in range(3):
        inbound(judge, STRANGER, check(hint(), b"x" * 24))
    assert inbound(judge, STRANGER, check(hint())) is IN.DROPPED_INTEGRITY_LIMIT
    assert inbound(judge, CLIENT, check(hint())) == HOP
    assert origin() is flows.Origin.FAR
    for port in (1, 2):
        assert inbound(judge, frame.header("192.0.2.9", port), check(hint()), 2.0) == HOP
    assert inbound(judge, STRANGER, check(hint()), 4.0) is IN.DROPPED_ADDRESSES_LIMIT
    assert inbound(judge, CLIENT, check(hint()), 4.0) == HOP
    assert origin() is flows.Origin.FAR
    judge.draining = True
    assert inbound(judge, CLIENT, check(hint()), 6.0) == HOP


def test_a_check_for_another_session_moves_a_follower(judge):
    """Whose media it was thought to be is no reason to keep a client from its own session."""
    origin = follower(judge)
    other = frame.name("10.4.0.7", 9001, 2)
    assert inbound(judge, CLIENT, check(hint(2, port=9001))) == other
    assert inbound(judge, CLIENT, b"\x80 media") == other and origin() is flows.Origin.CHECKED


def test_frames_go_to_the_clients_of_their_sender(judge):
    inbound(judge, CLIENT, check(hint()))
    other = frame.name("10.4.0.8", 9000, 2)
    outside = frame.name("10.5.0.8", 9000, 2)
    assert judge.outbound(CLIENT, 40, HOP) is None
    assert judge.outbound(CLIENT, 1533, HOP) is OUT.DROPPED_OVERSIZED
    assert judge.outbound(CLIENT, 31, HOP) is OUT.DROPPED_BAD_FRAME
    assert judge.outbound(b"x" * 32, 40, HOP) is OUT.DROPPED_BAD_FRAME
    assert judge.outbound(CLIENT, 40, other) is OUT.DROPPED_WRONG_OWNER
    assert judge.outbound(STRANGER, 40, HOP) is OUT.DROPPED_UNKNOWN_CLIENT
    assert judge.outbound(CLIENT, 40, outside) is OUT.DROPPED_NOT_TRANSCEIVER


@given(st.binary(max_size=200), st.binary(min_size=32, max_size=32))
def test_no_octets_raise_or_open_anything(datagram, header):
    limits = flows.Limits(flows=4, tentative=4, addresses=2, idle_s=60, tentative_idle_s=15)
    table = flows.Table(memoryview(bytearray(flows.octets(4))), limits, 0.0)
    judged = gate.Gate(KEYRING, {1: HOME}, table, 2, 1500, 3, 0.0)
    verdict = inbound(judged, header, datagram)
    assert verdict is None or verdict.name.startswith("DROPPED_")
    assert judged.recovered(header, datagram, 0.0) is IN.DROPPED_RECOVERED_INVALID
    assert judged.outbound(header, len(datagram), HOP) is not None
    assert len(table) == 0
