"""Standing: what becomes of a site whose relays do not answer, and of a cluster by its peers."""

import ipaddress
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ufrag
from endpoints import Endpoint
from presence import Report
from roster import Health, Peer, home
from standing import FADE_S, MISSES, Clusters, Standing, of_clusters
from steering import Request, Site, State, Steering

ONE, TWO = "http://10.9.0.1:9464", "http://10.9.0.2:9464"


def test_of_what_nothing_was_heard_nothing_is_said() -> None:
    found = Standing(1000, [ONE, TWO])
    assert found.state(0.0) is None
    for _ in range(MISSES - 1):
        found.failed(ONE, 0.0)
    assert found.state(0.0) is None and Standing(1000, []).state(0.0) is None


def test_load_is_all_flows_of_all_relays() -> None:
    found = Standing(1000, [ONE, TWO])
    found.heard(ONE, True, 300, 0.0)
    assert found.state(0.0) == State(True, 0.3, 1000)  # the other one may be well
    found.heard(TWO, True, 100, 0.0)
    assert found.state(0.0) == State(True, 0.4, 1000)
    found.heard(TWO, True, None, 1.0)  # it does not say how many: as many as before
    assert found.state(1.0) == State(True, 0.4, 1000)
    assert found.ailments() == []


def test_a_relay_is_lost_after_three_silences_and_its_room_with_it() -> None:
    found = Standing(1000, [ONE, TWO])
    found.heard(ONE, True, 300, 0.0)
    found.heard(TWO, True, 100, 0.0)
    for number in range(MISSES):
        assert found.state(float(number)) == State(True, 0.4, 1000)
        found.failed(TWO, float(number))
    assert found.state(3.0) == State(True, 0.6, 500)
    assert found.ailments() == [f"{TWO} does not answer"]
    found.heard(TWO, True, 0, 4.0)
    assert found.state(4.0) == State(True, 0.3, 1000)


def test_a_site_that_is_lost_is_so_until_one_answers() -> None:
    found = Standing(1000, [ONE, TWO])
    found.heard(ONE, True, 300, 0.0)
    found.heard(TWO, True, 100, 0.0)
    for each in (ONE, TWO) * MISSES:
        found.failed(each, 1.0)
    assert found.state(1.0) == State(False, 0.4)  # what it had is on its way
    assert found.state(1.0 + FADE_S / 2) == State(False, pytest.approx(0.2))
    assert found.state(1.0 + 2 * FADE_S) == State(False, 0.0)
    found.heard(TWO, True, 5, 99.0)
    assert found.state(99.0) == State(True, 0.01, 500)


def test_one_that_drains_is_believed_at_once() -> None:
    found = Standing(1000, [ONE])
    found.heard(ONE, True, 300, 0.0)
    found.heard(ONE, False, 300, 1.0)
    state = found.state(1.0)
    assert state is not None and not state.healthy
    assert found.ailments() == [f"{ONE} takes no clients"]
    # One that was never heard to serve is believed as well.
    fresh = Standing(1000, [ONE])
    fresh.heard(ONE, False, 0, 0.0)
    assert fresh.state(0.0) == State(False, 0.0)


def test_clients_that_were_sent_count_until_a_report_must_have_them() -> None:
    found = Standing(1000, [ONE])
    found.heard(ONE, True, 100, 0.0)
    for _ in range(50):
        found.sent()
    assert found.state(0.5) == State(True, 0.15, 1000)
    found.heard(ONE, True, 110, 1.0)  # ten of them have come
    found.turn()
    assert found.state(1.0) == State(True, 0.16, 1000)
    found.heard(ONE, True, 150, 2.0)
    found.turn()
    assert found.state(2.0) == State(True, 0.15, 1000)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([ONE, TWO]), st.sampled_from(["ready", "drains", "", "sent", "turn"])
        )
    )
)
def test_any_story_ends_in_a_state_that_can_be_used(story: Iterable[tuple[str, str]]) -> None:
    found, now = Standing(10, [ONE, TWO]), 0.0
    for relay, what in story:
        now += 0.7
        if what == "sent":
            found.sent()
        elif what == "turn":
            found.turn()
        elif what:
            found.heard(relay, what == "ready", 7, now)
        else:
            found.failed(relay, now)
        state = found.state(now)
        assert state is None or state.load >= 0
        assert state is None or state.healthy == (len(found.ailments()) < 2)


# --- bursts, and reports that are a second old ----------------------------------------------------

NAMES = {"tokyo": (35.7, 139.7), "osaka": (34.7, 135.5), "seoul": (37.6, 127.0)}


def burst(instances: int, arrivals: list[int]) -> dict[str, list[float]]:
    """Load of each site, step for step of 50 ms, of clients who all are in Tokyo. Each instance of
    signaling polls once a second, at another moment; a client's flow is there after 300 ms, and
    lasts."""
    sites = [Site(name, *at, (Endpoint("192.0.2.1:1"),), 1000) for name, at in NAMES.items()]
    steer, rng = Steering(sites, []), random.Random(3)
    seen = [{name: Standing(1000, [name]) for name in NAMES} for _ in range(instances)]
    flows, coming = dict.fromkeys(NAMES, 0), list[tuple[int, str]]()
    history: dict[str, list[float]] = {name: [] for name in NAMES}
    for step, count in enumerate(arrivals):
        while coming and coming[0][0] <= step:
            flows[coming.pop(0)[1]] += 1
        for number, standings in enumerate(seen):
            if (step + 7 * number) % 20 == 0:
                for name, each in standings.items():
                    each.heard(name, True, flows[name], step / 20)
                    each.turn()
        for _ in range(count):
            standings = seen[rng.randrange(instances)]
            states = {name: each.state(step / 20) or State() for name, each in standings.items()}
            request = Request(*NAMES["tokyo"], key=rng.randbytes(6))
            found = steer.decide(request, states, {}).site
            standings[found].sent()
            coming.append((step + 6, found))
        for name in NAMES:
            history[name].append(flows[name] / 1000)
    return history


@pytest.mark.parametrize(
    ("instances", "a_step", "seconds", "most"),
    [(1, 100, 1, 1.05), (3, 10, 10, 1.1)],
    ids=["one", "three"],
)
def test_a_burst_spills_over_and_floods_nobody(
    instances: int, a_step: int, seconds: int, most: float
) -> None:
    """Twice as many as Tokyo takes. What an instance sent since the report counts, and so even the
    second half of a second's burst goes on to the next ones; of what others sent it knows when the
    relays do, and so three need the burst to last for longer than a second."""
    history = burst(instances, [0] * 20 + [a_step] * 20 * seconds + [0] * 60)
    assert 0.75 < history["tokyo"][-1] < most
    assert history["osaka"][-1] < most
    assert sum(history[name][-1] for name in NAMES) == pytest.approx(2.0)


def test_a_slow_flood_fills_one_after_the_other_and_never_turns_back() -> None:
    """More than all of them like: each takes its share on the way, and none of them sees its load
    fall and rise again, since whom it gave away it has given away."""
    history = burst(2, [3] * 900)
    for name in NAMES:
        assert max(history[name]) < 1.02
    tokyo = history["tokyo"]
    taken = [tokyo[at + 20] - tokyo[at] for at in range(0, 860, 20)]
    # What it takes in a second falls, from all that comes to little, and does not swing.
    assert taken[1] == pytest.approx(0.06, abs=0.01)
    after = taken[taken.index(min(taken)) :]
    assert max(after) - min(after) < 0.02


# --- clusters -------------------------------------------------------------------------------------

HOMES = {
    1: ufrag.Cluster(1, ipaddress.ip_network("10.4.0.0/16"), 9000, 9099),
    2: ufrag.Cluster(2, ipaddress.ip_network("10.5.0.0/16"), 9000, 9099),
}


def peer(at: str, sessions: int, most: int = 100, cluster: int | None = None) -> Peer:
    found = Peer(Endpoint(at))
    found.heard(Report(sessions=sessions, sessions_max=most, cluster=cluster), 0.0)
    return found


def test_a_cluster_is_what_its_transceivers_are_together() -> None:
    peers = [peer("10.4.0.1:9000", 50), peer("10.4.0.1:9001", 10, 300), peer("10.5.0.1:9000", 90)]
    found = of_clusters(peers, HOMES)
    assert found == {1: State(True, pytest.approx(0.15), 400), 2: State(True, 0.9, 100)}


def test_those_that_take_nothing_have_no_room() -> None:
    gone, drains = peer("10.4.0.1:9000", 50), peer("10.4.0.1:9001", 10)
    gone.failed()
    drains.heard(Report(sessions=10, sessions_max=100, draining=True), 1.0)
    refused = peer("10.5.0.1:9000", 20)
    refused.full = True
    found = of_clusters([gone, drains, refused], HOMES)
    assert found == {1: State(False), 2: State(True, 1.0, 100)}
    assert of_clusters([], HOMES) == {1: State(False), 2: State(False)}


def test_a_cluster_that_was_lost_has_had_calls_that_go_elsewhere_now() -> None:
    found, one = Clusters(HOMES), peer("10.4.0.1:9000", 80)
    other = peer("10.5.0.1:9000", 10)
    assert found.states([one, other], 0.0)[1] == State(True, 0.8, 100)
    one.failed()
    assert found.states([one, other], 0.0)[1] == State(False, 0.8, 100)
    assert found.states([other], FADE_S / 2)[1] == State(False, pytest.approx(0.4), 100)
    assert found.states([other], 2 * FADE_S)[1] == State(False, 0.0, 100)
    assert found.states([other], 2 * FADE_S)[2] == State(True, 0.1, 100)
    one.heard(Report(sessions=5, sessions_max=100), 200.0)
    assert found.states([one, other], 200.0)[1] == State(True, 0.05, 100)


def test_one_that_was_not_heard_of_yet_may_take_calls() -> None:
    assert of_clusters([Peer(Endpoint("10.4.0.1:9000"))], HOMES)[1].healthy


def test_a_cluster_is_where_a_transceiver_says_if_that_can_be() -> None:
    within = HOMES | {3: ufrag.Cluster(3, ipaddress.ip_network("10.4.7.0/24"), 9000, 9099)}
    assert home(peer("10.4.7.1:9000", 0, cluster=3), within) == 3
    assert home(peer("10.4.7.1:9000", 0, cluster=2), within) == 1
    assert home(peer("10.4.7.1:9000", 0, cluster=77), within) == 1
    assert home(peer("10.6.0.1:9000", 0), within) is None
    assert home(peer("10.4.0.1:80", 0), within) is None
    assert Peer(Endpoint("10.4.0.1:9000")).health is Health.UNKNOWN
