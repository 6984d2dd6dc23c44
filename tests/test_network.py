"""Several hosts: a relay is lost, a client moves, the network chooses another way, and what fits.

The hosts are network namespaces (nets.py), the relays and Redis are the programs, and where not
said otherwise the clients and their transceiver are sockets of this process.
"""

import contextlib

import pytest

pytest.importorskip("pyroute2", reason="needs pyroute2")

import metrics

from . import nets, redises

IN, OUT, KEEPER = metrics.Inbound, metrics.Outbound, metrics.Keeper

CALLS = 20

pytestmark = [
    pytest.mark.skipif(bool(nets.REASON), reason=nets.REASON),
    pytest.mark.skipif(redises.binary() is None, reason="no redis-server"),
]


def known(redis, fabric, callers):
    """Redis has all of these."""

    def there():
        with fabric.hosts["redis"].inside():
            return redis.exists(*(caller.key for caller in callers)) == len(callers)

    return there


@pytest.mark.parametrize(("public", "internal"), [(4, 4), (6, 6)])
def test_a_relay_is_lost(tmp_path, public, internal):
    def work(fabric):
        redis = fabric.redis(internal)
        a, b = fabric.relays(public=public, internal=internal)
        crowd = nets.Crowd(fabric, CALLS, public, internal).begin()
        crowd.go_on(known(redis, fabric, crowd.callers), seconds=0.5)
        print(a.counters())
        a.stop()
        b.stop()

    nets.inside(tmp_path, work)
