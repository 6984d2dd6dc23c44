"""The books that the door keeps of offers: each ends in exactly one counter."""

import contextlib

import pytest

import door
import ledger
import metrics
from intake import Refusal

Count = metrics.Signaling


@pytest.mark.parametrize(
    ("raised", "ended"),
    [
        (None, Count.ANSWERED),
        (Refusal(400, "Broken.", code="x"), Count.REFUSED_OFFER),
        (Refusal(503, "Full.", code="x"), Count.REFUSED_FULL),
        (ConnectionResetError(), Count.REFUSED_OFFER),
    ],
)
def test_an_offer_ends_in_one_counter(raised: Exception | None, ended: Count) -> None:
    counters = ledger.Counters(Count)
    with contextlib.suppress(Refusal, ConnectionResetError), door.Offered(counters):
        if raised is not None:
            raise raised
    assert {kind for kind in Count if counters[kind]} == {Count.OFFERS, ended}
    assert counters[ended] == counters[Count.OFFERS] == 1
