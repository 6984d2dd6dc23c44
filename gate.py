"""The gate: judges one by one the datagrams that the hit path cannot pass by their address alone.

What it owns: the decision where a datagram of an unknown client goes, or a known client's STUN, and
whether a transceiver's frame may go to the client that it names. What may be passed has an address
to go to, what may not has the counter that says why.

Rules that stay true:
- Nothing opens a flow but a Binding Request whose ufrag names a transceiver of a configured cluster
  under one of the keys and whose MESSAGE-INTEGRITY shows that its sender was given that ufrag's
  password; or a ufrag under the keys that Redis has for the client, or another relay that leads it
  here, or that a flow has whose SSRC the client's media carries.
- A known client's STUN with its flow's own ufrag passes unchecked: the transceiver checks it. But
  for a flow that only follows another one (flows.py): a genuine check makes it the client's own.
- The dear steps are last, and the dearest, the integrity check, has a budget.
- No exception, whatever a peer sends.

Where a flow leads is its transceiver, or a relay of the transceiver's cluster where that one is
reached by a backbone (backbone.py): then any of that cluster's relays may answer.

Sans-IO: `now` is an argument, in seconds. RFC 7983 (the first octet), RFC 8489 (STUN), RFC 8445
"""

import ipaddress
from collections.abc import Container, Iterable, Mapping, Sequence

import backbone
import flows
import frame
import metrics
import parley
import stun
import ufrag

_MALFORMED = dict.fromkeys(stun.Malformed, metrics.Inbound.DROPPED_STUN_MALFORMED) | {
    stun.Malformed.TRUNCATED: metrics.Inbound.DROPPED_STUN_TRUNCATED,
    stun.Malformed.NOT_REQUEST: metrics.Inbound.DROPPED_STUN_NOT_REQUEST,
}
_REJECTED = {why: metrics.Inbound[f"DROPPED_UFRAG_{why.name}"] for why in ufrag.Reject}
_FOLLOWING = (parley.Standing.FAR, parley.Standing.NEAR)
_LIMITS = (metrics.Inbound.DROPPED_INTEGRITY_LIMIT, metrics.Inbound.DROPPED_ADDRESSES_LIMIT)
_REFUSED = {why: metrics.Inbound[f"DROPPED_{why.name}"] for why in flows.Refusal}


class Gate:
    """The judgement of one worker."""

    draining: bool
    """True while no flow of a new session is to be opened. The worker sets it."""
    reopened: list[bytes]
    """Clients whose flow leads by a way to another session since: that relay is to know. The worker
    takes them out."""

    def __init__(
        self,
        keyring: ufrag.Keyring,
        clusters: Mapping[int, ufrag.Cluster],
        table: flows.Table,
        family: int,
        octets_max: int,
        checks_per_s: int,
        now: float,
        ways: backbone.Backbone | None = None,
    ) -> None:
        """Judge by `table` and open its flows; hops are socket addresses of `family`."""
        self._ways = ways or backbone.Backbone({}, 1.0, now)
        self._keyring, self._clusters, self._flows = keyring, clusters, table
        self._family, self._octets_max = family, octets_max
        self._checks_per_s = self._checks_left = checks_per_s
        self._checks_renewed_at = now
        self.draining = False
        self.reopened: list[bytes] = []

    def inbound(
        self, header: bytes, payload: memoryview, length: int, now: float
    ) -> bytes | metrics.Inbound | None:
        """Where a client's datagram goes, or why it goes nowhere.

        None is media of a client without a flow: another relay may have known it.
        """
        if length > self._octets_max:
            return metrics.Inbound.DROPPED_OVERSIZED
        hop = self._flows.hops.get(header)
        if not length or stun.kind(payload[0]) is not stun.Kind.STUN:
            return hop
        request = stun.read_request(payload)
        if isinstance(request, stun.Malformed):
            # A known client may send indications and answers; what is broken ends here.
            if hop is not None and request is stun.Malformed.NOT_REQUEST:
                return hop
            return _MALFORMED[request]
        if hop is not None and self._flows.checks(header, request.ufrag, now):
            return hop  # the transceiver checks its integrity
        verdict = self._admit(header, payload, request, now)
        if verdict in _LIMITS and hop is not None and self._flows.ufrag(header) == request.ufrag:
            return hop  # a follower's: it goes on as what it is
        return verdict

    def _admit(
        self, header: bytes, payload: memoryview, request: stun.Request, now: float
    ) -> bytes | metrics.Inbound:
        """A check for a ufrag that this address has no flow for: open one if it is genuine."""
        hint = ufrag.parse(self._keyring, self._clusters, request.ufrag)
        if isinstance(hint, ufrag.Reject):
            return _REJECTED[hint]
        if now - self._checks_renewed_at >= 1.0:
            self._checks_renewed_at, self._checks_left = now, self._checks_per_s
        if not self._checks_left:
            return metrics.Inbound.DROPPED_INTEGRITY_LIMIT
        self._checks_left -= 1
        password = ufrag.password(self._keyring, request.ufrag)
        if password is None or not stun.check_integrity(payload, request, password):
            return metrics.Inbound.DROPPED_BAD_INTEGRITY
        if self.draining and header not in self._flows.hops:
            return metrics.Inbound.DROPPED_DRAINING
        return self._open(header, hint, request.ufrag, now)

    def recovered(
        self, header: bytes, text: bytes, now: float, follows: tuple[int, bool] | None = None
    ) -> bytes | metrics.Inbound:
        """The client at `header` was given this ufrag: where its datagrams go.

        Redis says so, or another worker's table; or the SSRC of its media, and whether its session
        is near (`follows`). It is believed no further than the keys allow: the ufrag names a
        transceiver of ours, which knows its clients. A flow that the client has by now stays as it
        is.
        """
        hop = self._flows.hops.get(header)
        if hop is not None:
            return hop
        hop = self.lead(text)
        if hop is None:
            return metrics.Inbound.DROPPED_RECOVERED_INVALID
        if follows is None:
            refusal = self._flows.open(header, hop, text, now)
        else:
            refusal = self._flows.follow(header, hop, text, *follows, now)
        return hop if refusal is None else metrics.Inbound.DROPPED_RECOVERED_INVALID

    def introduced(
        self, header: bytes, text: bytes, standing: parley.Standing, now: float
    ) -> bytes | metrics.Inbound:
        """Another relay has this client's flow, and leads it here. It has judged whose it is: what
        the client had here does not count. Where only an SSRC had opened the flow there, it is no
        more than that here."""
        before = self._flows.hops.get(header)
        if before is not None and self._flows.ufrag(header) == text:
            return before
        if standing in _FOLLOWING:
            return self.recovered(header, text, now, (0, standing is parley.Standing.NEAR))
        hop, assured = self.lead(text), standing is parley.Standing.ASSURED
        if hop is None:
            return metrics.Inbound.DROPPED_RECOVERED_INVALID
        state = flows.State.ASSURED if assured else flows.State.TENTATIVE
        flow = flows.Flow(state, header, hop, text, now, now if assured else 0.0)
        refusal = self._flows.install(flow)
        return hop if refusal is None else _REFUSED[refusal]

    def lead(self, text: bytes) -> bytes | None:
        """Where the flow of a session goes now; None if its ufrag is none of ours."""
        hint = ufrag.parse(self._keyring, self._clusters, text)
        return None if isinstance(hint, ufrag.Reject) else self._hop(hint, text)

    def _hop(self, hint: ufrag.Hint, text: bytes) -> bytes:
        if hint.cluster in self._ways:
            return self._ways.choose(hint.cluster, text)
        return frame.name(hint.address, hint.port, self._family)

    def _open(
        self, header: bytes, hint: ufrag.Hint, text: bytes, now: float
    ) -> bytes | metrics.Inbound:
        hop, other = self._hop(hint, text), False
        before = self._flows.hops.get(header)
        if before is not None and self._ways.same(before, hop):
            # Behind one way there are many transceivers, and a session stays on the way it goes.
            old = self._flows.ufrag(header) or b""
            named = ufrag.parse(self._keyring, self._clusters, old)
            other = not (
                isinstance(named, ufrag.Hint) and _transceiver(named) == _transceiver(hint)
            )
            hop = hop if other else before
        refusal = self._flows.open(header, hop, text, now, other)
        if refusal is not None:
            return _REFUSED[refusal]
        if before is not None and hop in self._ways.ways:
            self.reopened.append(header)
        return hop

    def outbound(self, header: bytes, length: int, source: bytes) -> metrics.Outbound | None:
        """Why a frame must not be sent to the client that it names; None if it may."""
        if length > self._octets_max + frame.HEADER_OCTETS:
            return metrics.Outbound.DROPPED_OVERSIZED
        owner = self._flows.hops.get(header)
        if length >= frame.HEADER_OCTETS and (owner == source or self._ways.same(owner, source)):
            return None
        if source not in self._ways.ways and not self._names(self._clusters.values(), source):
            return metrics.Outbound.DROPPED_NOT_TRANSCEIVER
        if length < frame.HEADER_OCTETS or not frame.is_frame(header):
            return metrics.Outbound.DROPPED_BAD_FRAME
        return (
            metrics.Outbound.DROPPED_UNKNOWN_CLIENT
            if owner is None
            else metrics.Outbound.DROPPED_WRONG_OWNER
        )

    def is_direct(self, hop: bytes) -> bool:
        """Whether a transceiver may have this socket address that is reached without another
        relay."""
        direct = (each for each in self._clusters.values() if each.id not in self._ways)
        return self._names(direct, hop)

    @staticmethod
    def _names(clusters: Iterable[ufrag.Cluster], hop: bytes) -> bool:
        """Whether a transceiver of any of these clusters may have this socket address."""
        address, port = frame.endpoint(hop)
        at = ipaddress.ip_address(address)
        return any(cluster.contains(at, port) for cluster in clusters)


def spoken(
    watched: Container[bytes],
    headers: Sequence[bytes],
    lengths: Sequence[int],
    kinds: bytes,
    holes: Container[int],
) -> list[bytes]:
    """Those of the `watched` clients to whom a batch of frames brings something other than STUN:
    their transceiver has finished ICE with them. `holes` go nowhere."""
    return [
        header
        for i, header in enumerate(headers)
        if header in watched
        and lengths[i] > frame.HEADER_OCTETS
        and not stun.STUN_TABLE[kinds[i]]
        and i not in holes
    ]


def _transceiver(hint: ufrag.Hint) -> tuple[int, object, int]:
    return hint.cluster, hint.address, hint.port
