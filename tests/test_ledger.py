"""Counters in memory, and a ledger whose writer may be killed at any instruction."""

import ledger
import metrics


def test_counting_is_one_increment():
    counters = ledger.Counters(metrics.Inbound)
    counters.values[metrics.Inbound.RECEIVED] += 3
    counters.values[metrics.Inbound.FORWARDED] += 1
    counters.values[metrics.Inbound.DROPPED_OVERSIZED] += 1
    assert counters[metrics.Inbound.RECEIVED] == 3
    assert counters.drops() == {"oversized": 1}
    assert counters.missing() == 1


def test_shared_memory_goes_on_from_what_stands_there():
    memory = memoryview(bytearray(ledger.octets(metrics.Outbound) + 100))
    ledger.Counters(metrics.Outbound, memory).values[metrics.Outbound.RECEIVED] = 7
    assert ledger.Counters(metrics.Outbound, memory)[metrics.Outbound.RECEIVED] == 7


def test_total_sums_rows():
    rows = [ledger.Counters(metrics.Outbound) for _ in range(3)]
    for number, row in enumerate(rows):
        row.values[metrics.Outbound.FORWARDED] = number
    assert ledger.total(rows)[metrics.Outbound.FORWARDED] == 3


def test_counters_print_what_is_not_zero():
    counters = ledger.Counters(metrics.Outbound)
    assert str(counters) == "outbound: nothing"
    counters.values[metrics.Outbound.RECEIVED] = 2
    assert str(counters) == "outbound: received 2"


def test_no_rows_is_no_text():
    assert metrics.exposition("earshot", []) == b""


def book():
    return ledger.Ledger(
        metrics.Inbound, memoryview(bytearray(ledger.ledger_octets(metrics.Inbound)))
    )


def test_a_ledger_books_a_batch_at_once():
    books = book()
    books.book(1, 3, 2, 100, [metrics.Inbound.DROPPED_OVERSIZED])
    books.book(2, 1, 0, 0, [metrics.Inbound.WAITING])
    assert books[metrics.Inbound.RECEIVED] == 4
    assert books.mark == 2
    assert books.missing() == 0
    assert books.drops() == {"oversized": 1}
    books.change({metrics.Inbound.WAITING: -1, metrics.Inbound.RECOVERED: 1})
    assert (books[metrics.Inbound.WAITING], books[metrics.Inbound.RECOVERED]) == (0, 1)
    assert books.missing() == 0
    assert books.mark == 2


def test_a_successor_goes_on_with_the_valid_copy():
    memory = memoryview(bytearray(ledger.ledger_octets(metrics.Inbound)))
    first = ledger.Ledger(metrics.Inbound, memory)
    first.book(7, 5, 5, 50)
    # A writer that died while it booked: the other copy is half written, the switch not thrown.
    first._halves[1 - first._valid][0] = 999
    second = ledger.Ledger(metrics.Inbound, memory)
    assert (second[metrics.Inbound.RECEIVED], second.mark) == (5, 7)
    second.book(8, 1, 1, 10)
    assert ledger.Ledger(metrics.Inbound, memory)[metrics.Inbound.RECEIVED] == 6


def test_histograms_count_what_they_observe():
    found = ledger.Histograms(metrics.Timing)
    kind = metrics.Timing.PACER
    assert (found.count(kind), found.quantile(kind, 0.99)) == (0, 0.0)
    for value in (*[0.0001] * 98, 0.003, 7.0):
        found.observe(kind, value)
    assert found.count(kind) == 100
    assert found.cumulative(kind)[0] == (0.0001, 98)
    assert found.cumulative(kind)[-1] == (float("inf"), 100)
    assert found.quantile(kind, 0.5) == 0.0001
    assert found.quantile(kind, 0.99) == 0.005
    assert found.quantile(kind, 1.0) == float("inf")
    assert found.count(metrics.Timing.LOOP_LAG) == 0
