"""What a worker leaves to its successor, and a relay to the next one."""

import dataclasses

import handover
import settings


def test_limits_are_shared_out() -> None:
    """No worker has less than its part, and all of them together no less than was configured."""
    table = settings.RelayTable(
        public=settings.Endpoint("127.0.0.1:3478"),
        internal=settings.Endpoint("127.0.0.1:3500"),
        workers=3,
        flows_max=10,
        flows_tentative_max=4,
    )
    limits = handover.limits(table)
    assert (limits.flows, limits.tentative) == (4, 2)
    assert dataclasses.asdict(limits)["addresses"] == table.addresses_per_ufrag_max
