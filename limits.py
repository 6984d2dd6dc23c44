"""Limits: how much of this one key, or one address, may have.

What it owns: buckets that refill with time, for as many as come; which address a request really
comes from; what an address counts as.

Rules that stay true:
- Every table is bounded. When one is full the least recently seen is forgotten, which gives it a
  full bucket back: an attacker with more addresses than the table has lines is bounded by
  connections and by keys.
- An address is believed to be a client's only if a trusted proxy says so, and of what stands in its
  header only the part that trusted proxies wrote.
- A /64 of IPv6 counts as one address: that is the least that one customer has (RFC 6177).

The buckets are leaky ones in the form of the generic cell rate algorithm: one number each, the time
at which it will be full again (ITU-T I.371).

Sans-IO: time is an argument.
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Iterable

from endpoints import Prefix

ADDRESSES_MAX = 65_536
"""Addresses that are remembered: some 15 MB when all of them came within seconds."""

FORWARDED_MAX = 32
"""Entries of a proxy's header that are looked at, from its end: more proxies are in no row."""


class Buckets:
    """A bucket each for whoever comes."""

    def __init__(self, entries_max: int = ADDRESSES_MAX) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, name: str, per_s: float, burst: float, now: float) -> float:
        """Take one from a bucket of `burst` that gains `per_s` a second: 0, or how long to wait.

        Who has to wait has taken nothing.
        """
        wait = self.peek(name, per_s, burst, now)
        if wait > 0:
            return wait
        self._full_at[name] = max(self._full_at.get(name, now), now) + 1 / per_s
        self._full_at.move_to_end(name)
        self._forget(now)
        return 0.0

    def peek(self, name: str, per_s: float, burst: float, now: float) -> float:
        """What `take` would answer, without taking."""
        full_at = max(self._full_at.get(name, now), now)
        return max(full_at - now - (max(burst, 1) - 1) / per_s, 0.0)

    def _forget(self, now: float) -> None:
        """Two at most, the oldest: whoever has a full bucket again need not be known."""
        for _ in range(2):
            name, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._entries_max:
                return
            del self._full_at[name]
            if not self._full_at:
                return


def client_of(remote: str | None, forwarded: Iterable[str], trusted: tuple[Prefix, ...]) -> str:
    """The address that a request comes from, as text that `counted_as` reads.

    `remote` is the other end of the connection, `forwarded` the values of the header that trusted
    proxies add to, in order: addresses with or without a port, between commas. The right-most entry
    that is no trusted proxy's is the client, since whoever stands left of it could have written it.
    What cannot be read ends the search: the last proxy before it counts.
    """
    found = remote or ""
    entries = [entry for line in forwarded for entry in line.split(",")]
    for entry in entries[: -FORWARDED_MAX - 1 : -1]:
        if not any(found in prefix for prefix in trusted):
            break
        host = _host(entry)
        if host is None:
            break
        found = host
    return found


def counted_as(host: str) -> str:
    """What an address is counted as: itself, or its /64. Anything else is one and the same."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


def _host(entry: str) -> str | None:
    """The address of an entry such as `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1` or `[…]:80`."""
    text = entry.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)
