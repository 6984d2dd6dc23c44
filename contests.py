"""Contests: an address that has an assured flow, and a check that would lead it elsewhere.

What it owns: how long the flow's own transceiver has to say something before it has lost its
client. A client that reuses a port is served in seconds, a replayed check moves no live call.

Sans-IO: `now` is an argument, in seconds.
"""

FLOW_HELD_S = 3.0
"""How long an assured flow's transceiver may be silent before a check for another one takes the
client's address over. A live session sends reports every second at least; three of them lost is
unlikely. Shorter would let a replay move a call that has hiccups, longer delays the next call of a
client that reuses its port (its ICE agent repeats checks for far longer)."""

CONTESTED_MAX = 1024
"""Assured flows that may be contested at one time, beyond which a check counts as held. Each costs
100 octets and some microseconds; honest clients contest a handful an hour."""

CONTEST_S_MAX = 60.0
"""How long a contest is remembered: longer than any ICE agent goes on checking."""


class Contests(dict[bytes, float]):
    """The contested clients (headers) of one table, and since when."""

    def held(self, header: bytes, now: float) -> bool:
        """True while the flow's own transceiver may still be there. The first call contests it."""
        since = self.get(header)
        if since is not None:
            return now - since < FLOW_HELD_S
        if len(self) < CONTESTED_MAX:
            self[header] = now
        return True

    def forgotten(self, now: float) -> list[bytes]:
        """Those that no owner answered and nobody came back for: they end here."""
        gone = []
        for header, since in self.items():  # the oldest first
            if now - since <= CONTEST_S_MAX:
                break
            gone.append(header)
        for header in gone:
            del self[header]
        return gone
