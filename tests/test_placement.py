"""Who is asked first: properties of the order. What happens then is in test_signaling.py."""

import random

from hypothesis import given
from hypothesis import strategies as st

import endpoints
from placement import Peer, order_of

AT = endpoints.Endpoint("127.0.0.1:9000")
PEERS = st.lists(
    st.builds(Peer, st.just(AT), st.booleans(), st.integers(0, 12), st.just(10), st.floats(0, 1.2)),
    min_size=1,
    max_size=8,
)


def takes(peer: Peer) -> bool:
    return peer.serving and peer.sessions < peer.sessions_max and peer.load < 1


@given(PEERS, st.integers(0, 1 << 32))
def test_everyone_is_asked_once_and_the_full_last(peers: list[Peer], seed: int) -> None:
    asked = order_of(peers, random.Random(seed))
    assert sorted(map(id, asked)) == sorted(map(id, peers))
    assert sorted(asked, key=takes, reverse=True) == asked


def test_two_random_choices_keep_the_load_even() -> None:
    seed = 7
    rng = random.Random(seed)
    peers = [Peer(AT, sessions_max=1000) for _ in range(10)]
    for _ in range(1000):
        order_of(peers, rng)[0].sessions += 1
    # One random choice leaves a spread of 50 or so here; two leave a handful.
    loads = [peer.sessions for peer in peers]
    assert max(loads) - min(loads) <= 10, f"seed {seed}: {loads}"


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_health_in_any_other_form_is_not_serving(health: object) -> None:
    peer = Peer(AT)
    peer.heard(health)
    assert not peer.serving


def test_health_is_taken_over() -> None:
    peer = Peer(AT, serving=False)
    peer.heard({"state": "serving", "sessions": 3, "sessions_max": 100, "more": True})
    assert (peer.serving, peer.sessions, peer.sessions_max) == (True, 3, 100)
    peer.heard({"state": "draining", "sessions": 3, "sessions_max": 100})
    assert not peer.serving


def test_the_loaded_are_asked_after_the_idle() -> None:
    """Two processes with the same number of calls, and one of them has none of its CPU left."""
    busy, idle = Peer(AT), Peer(AT)
    busy.heard({"state": "serving", "sessions": 3, "sessions_max": 100, "load": 0.8})
    idle.heard({"state": "serving", "sessions": 9, "sessions_max": 100, "load": 0.2})
    assert all(order_of([busy, idle], random.Random(seed))[0] is idle for seed in range(20))
    busy.heard({"state": "serving", "sessions": 3, "sessions_max": 100, "load": "much"})
    assert busy.load == 0
