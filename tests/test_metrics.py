"""The catalogue of counters, and their exposition."""

import itertools

import pytest

import ledger
import metrics

ALL = [metrics.Inbound, metrics.Outbound, metrics.Transceiver, metrics.Signaling]


@pytest.mark.parametrize("kinds", ALL)
def test_members_index_memory_without_gaps(kinds):
    assert [int(kind) for kind in kinds] == list(range(len(kinds)))


def test_both_ways_begin_alike():
    names = [[kind.name for kind in kinds][:3] for kinds in (metrics.Inbound, metrics.Outbound)]
    assert names == [["RECEIVED", "FORWARDED", "OCTETS"]] * 2  # the relay counts by position


@pytest.mark.parametrize("kind", list(itertools.chain(*ALL)), ids=lambda kind: f"{kind!r}")
def test_each_says_what_it_is(kind):
    assert kind.unit and kind.help.endswith(".")
    if kind.name.startswith("DROPPED_"):
        assert kind.meaning.endswith("."), "a drop says what it means to an operator"
        assert kind.unit == "datagrams"


def test_exposition_is_prometheus_text():
    first, second = ledger.Counters(metrics.Inbound), ledger.Counters(metrics.Inbound)
    first.values[metrics.Inbound.RECEIVED] = 5
    rows = [({"worker": "0"}, first), ({"worker": "1"}, second)]
    lines = metrics.exposition("earshot_relay_inbound", rows).decode().splitlines()
    assert 'earshot_relay_inbound_received_total{worker="0"} 5.0' in lines
    assert 'earshot_relay_inbound_received_total{worker="1"} 0.0' in lines
    assert "# TYPE earshot_relay_inbound_received_total counter" in lines


def test_a_gauge_is_a_gauge():
    text = metrics.exposition("earshot", [({}, ledger.Counters(metrics.Transceiver))])
    assert b"# TYPE earshot_sessions gauge" in text
    assert b"earshot_sessions 0.0" in text
