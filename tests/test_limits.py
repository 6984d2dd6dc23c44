"""Limits: buckets in made-up time, and whose address it is that stands in a header."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import limits
from endpoints import Prefix


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    buckets = limits.Buckets()
    assert [buckets.take("a", 2.0, 3, 10.0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", 2.0, 3, 10.0) == pytest.approx(0.5)
    assert buckets.take("a", 2.0, 3, 10.4) == pytest.approx(0.1), "who waits has taken nothing"
    assert buckets.take("a", 2.0, 3, 10.5) == 0
    assert buckets.take("a", 2.0, 3, 10.5) == pytest.approx(0.5)
    assert buckets.take("b", 2.0, 3, 10.5) == 0, "another one's bucket is another one"
    assert [buckets.take("a", 2.0, 3, 99.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]


def test_a_rate_is_kept_over_a_long_time() -> None:
    buckets = limits.Buckets()
    granted = sum(buckets.take("a", 5.0, 1, tick / 100) == 0 for tick in range(1_000))
    assert 49 <= granted <= 51


def test_slow_rates_and_small_bursts() -> None:
    buckets = limits.Buckets()
    assert buckets.take("a", 0.01, 0.5, 0.0) == 0, "a burst below one is one"
    assert buckets.take("a", 0.01, 0.5, 0.0) == pytest.approx(100)


def test_to_look_takes_nothing() -> None:
    buckets = limits.Buckets()
    assert buckets.peek("a", 1.0, 1, 0.0) == 0 and len(buckets) == 0
    buckets.take("a", 1.0, 1, 0.0)
    assert buckets.peek("a", 1.0, 1, 0.0) == buckets.peek("a", 1.0, 1, 0.0) == 1.0


def test_the_table_is_bounded_and_forgets_who_is_quits() -> None:
    buckets = limits.Buckets(100)
    for number in range(1_000):
        assert buckets.take(str(number), 1.0, 1, 0.0) == 0
    assert len(buckets) == 100
    assert buckets.take("999", 1.0, 1, 0.0) > 0 and buckets.take("0", 1.0, 1, 0.0) == 0
    for number in range(200):
        buckets.take("one", 1.0, 1, 10.0 + number)
    assert len(buckets) == 1


TRUSTED = (Prefix("10.0.0.0/8"), Prefix("fd00::/8"))


@pytest.mark.parametrize(
    ("remote", "forwarded", "client"),
    [
        ("198.51.100.7", [], "198.51.100.7"),
        ("198.51.100.7", ["203.0.113.1"], "198.51.100.7"),  # a client that says who it is
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1"], "203.0.113.1"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.1"], "203.0.113.1"),  # what the client wrote stays left
        ("10.0.0.1", ["6.6.6.6", "203.0.113.1"], "203.0.113.1"),
        ("10.0.0.1", ["6.6.6.6,203.0.113.1 , 10.9.9.9"], "203.0.113.1"),
        ("10.0.0.1", ["10.9.9.9, 10.8.8.8"], "10.9.9.9"),  # proxies all the way
        ("10.0.0.1", ["203.0.113.1:4711"], "203.0.113.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["2001:DB8::1"], "2001:db8::1"),
        ("fd00::1", ["::ffff:203.0.113.1"], "203.0.113.1"),
        ("::ffff:10.0.0.1", ["203.0.113.1"], "203.0.113.1"),
        ("10.0.0.1", ["6.6.6.6, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, "], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, '; drop", "10.2.2.2"], "10.2.2.2"),
        ("10.0.0.1", ["203.0.113.1" + ",10.1.1.1" * 10_000], "10.1.1.1"),
        (None, ["203.0.113.1"], ""),
    ],
)
def test_whose_address_it_is(remote: str | None, forwarded: list[str], client: str) -> None:
    assert limits.client_of(remote, forwarded, TRUSTED) == client


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("nonsense", ""),
    ],
)
def test_what_an_address_counts_as(host: str, counted: str) -> None:
    assert limits.counted_as(host) == counted


@given(st.lists(st.text(max_size=40)), st.sampled_from(["10.0.0.1", "fd00::1", "192.0.2.1", ""]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_whatever_stands_in_a_header_ends_in_an_address(lines: list[str], remote: str) -> None:
    found = limits.client_of(remote, lines, TRUSTED)
    assert found == remote or ipaddress.ip_address(found)
    limits.counted_as(found)


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from("ab")), max_size=60))
@hypothesis_settings(max_examples=200, deadline=None)
def test_nobody_gets_more_than_burst_and_rate(steps: list[tuple[float, str]]) -> None:
    """And who is told to wait gets one after that."""
    buckets, now, taken = limits.Buckets(), 100.0, {"a": 0, "b": 0}
    for step, name in steps:
        now += step
        wait = buckets.take(name, 2.0, 3, now)
        taken[name] += not wait
        assert taken[name] <= 3 + 2.0 * (now - 100.0) + 1e-6
        assert 0 <= wait <= 0.5 + 1e-9
        if wait:
            assert buckets.peek(name, 2.0, 3, now + wait + 1e-9) == 0
