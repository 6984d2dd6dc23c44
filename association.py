"""The SCTP association under the data channel: aiortc's, with limits, and in a hurry.

What it owns: what a client's packet may contain before aiortc reads it (`sound`), how much of what
the client sends is held, and how soon something lost is sent again.

Rules that stay true:
- The client is authenticated by DTLS and trusted no further: whatever its packets hold, they cost
  a bounded time and memory, and at the worst they end its own session.
- No packet makes aiortc loop: a parameter that is four octets shorter than its own header, or an
  acknowledgement of what was never sent, would hold up every session of the process.
- Something lost is sent again after a round trip and a quarter of a second, where aiortc waits for
  a second, and for three before it knows the round trip.

It does not know what messages mean or where packets go; `peer.py` does.

RFC 9260 https://www.rfc-editor.org/rfc/rfc9260 (SCTP), RFC 6525 (resetting streams), RFC 3758
(giving up messages).
"""

import contextlib
import logging
import struct
from collections.abc import Callable

from aiortc.rtcdatachannel import RTCDataChannel
from aiortc.rtcdtlstransport import RTCDtlsTransport
from aiortc.rtcsctptransport import (
    Chunk,
    InitChunk,
    RTCSctpCapabilities,
    RTCSctpTransport,
    SackChunk,
)

import sdp

WINDOW_OCTETS = 2 * sdp.MESSAGE_OCTETS_MAX
"""What a client may send before it is delivered: its largest message and as much again behind it.
Less would stall that message, more is memory for whoever never finishes one."""

WINDOW_SLACK_OCTETS = 64 * 1024
"""How far a client may exceed the window, which aiortc does not enforce, before it counts as one
that ignores it: room for what was under way when the window shrank."""

HELD_MAX = 1024
"""Chunks that wait for others, of all streams: the window in full chunks is 440, a burst of small
events behind a lost one a few hundred. Each costs half a kilobyte however little it carries, and
every further chunk costs a look at those before it."""

STREAMS_MAX = 16
"""Streams that a client may send on. Channels are fewer; aiortc keeps each stream until it is
reset, and RFC 8831 allows 65,535."""

CHUNKS_MAX = 8
"""Chunks of a packet that carry no data. An answer goes out for nearly each of them, and real ones
bundle two or three."""

RTO_INITIAL_S = 0.5
"""Where the handshake has not shown the round trip. Browsers (dcsctp) wait as long."""

ACK_DELAY_S = 0.22
"""What is waited beyond a round trip. Receivers may hold back an acknowledgement for 200 ms (RFC
9260 section 6.2), and less would send again what has arrived. Browsers wait as long."""

RTO_BACKED_OFF_S_MAX = 2.0
"""The wait doubles while nothing is acknowledged, up to this: a client that was away for ten
seconds has what was said meanwhile within two of its return."""

_CHUNK = struct.Struct(">BBH")
_U16 = struct.Struct(">H")
_HEADER_OCTETS = 12

_DATA, _INIT, _INIT_ACK, _SACK = 0, 1, 2, 3
_PARAMETERS_AT = {_INIT: 20, _INIT_ACK: 20, 4: 4, 5: 4, 6: 4, 9: 4, 130: 4}
"""Where parameters begin in the chunks that have any: also HEARTBEAT and its answer, ABORT, ERROR,
RE-CONFIG."""
_LENGTH_MIN = {_DATA: 17, _INIT: 20, _INIT_ACK: 20, _SACK: 16, 7: 8, 192: 8}

BROKEN = "the client's SCTP is broken"
EXCEEDED = "the client ignores the limits of its data channel"
"""Reasons for which a session ends here."""

log = logging.getLogger("association")


def sound(packet: bytes) -> bool:
    """True if aiortc may read this packet. Total over any octets, linear in their number.

    A packet that is not sound is dropped, as one with a wrong checksum is.
    """
    at, end, others, first = _HEADER_OCTETS, len(packet), 0, -1
    while at + 4 <= end:
        kind, _, length = _CHUNK.unpack_from(packet, at)
        if length < _LENGTH_MIN.get(kind, 4) or at + length > end:
            return False
        if kind != _DATA:
            others += 1
            if not _adds_up(packet, at, kind, length):
                return False
        first = kind if first < 0 else first
        at += length + -length % 4
        if first == _INIT and at < end:  # RFC 9260 section 6.10: nothing is bundled with it
            return False
    return first >= 0 and others <= CHUNKS_MAX


def _adds_up(packet: bytes, at: int, kind: int, length: int) -> bool:
    """True if what a chunk counts or nests fits into it."""
    if kind == _SACK:
        gaps, duplicates = struct.unpack_from(">HH", packet, at + 12)
        return bool(16 + 4 * (gaps + duplicates) <= length)
    begin = _PARAMETERS_AT.get(kind)
    if begin is None:
        return True
    begin, end = at + begin, at + length
    while begin + 4 <= end:
        size = _U16.unpack_from(packet, begin + 2)[0]
        if size < 4:  # aiortc would read it again and again
            return False
        begin += size + -size % 4
    return True


class Association(RTCSctpTransport):
    """aiortc's association with the limits above.

    Private names that it leans on, pinned by the version: the methods overridden here;
    `_advertised_rwnd`, `_sack_misordered`, `_inbound_streams` (what is held), `_sent_queue`,
    `_rto`, `_srtt`, `_rttvar`, `_data_channel_queue`, and what a repeated INIT must leave alone.
    """

    def __init__(
        self,
        transport: RTCDtlsTransport,
        opened: Callable[[RTCDataChannel], None],
        heard: Callable[[], None],
        round_trip_s: float | None,
    ) -> None:
        """`opened` is told of every channel that the client opens, `heard` of every packet.

        `round_trip_s` is what the handshake took, if that is known.
        """
        super().__init__(transport, sdp.SCTP_PORT)
        self.failure: str | None = None
        """Why the session ends, if it does so by what the client sent here."""
        self._advertised_rwnd = WINDOW_OCTETS
        first_s = RTO_INITIAL_S if round_trip_s is None else 2 * round_trip_s + ACK_DELAY_S
        self._first_s = self._rto = min(first_s, RTO_BACKED_OFF_S_MAX)
        self._heard = heard
        self.on("datachannel", opened)

    async def begin(self, offer: sdp.Offer) -> None:
        """Send our INIT: both sides do (RFC 8841 section 9.3), and either one is enough."""
        capabilities = RTCSctpCapabilities(maxMessageSize=offer.message_octets_max)
        await self.start(capabilities, offer.sctp_port)

    def hurry(self) -> None:
        """Send again now what waits for an acknowledgement: the client can be reached again."""
        self._rto = self._first_s
        if self._t3_handle is not None:
            self._t3_handle.cancel()
            super()._t3_expired()

    # --- from aiortc ----------------------------------------------------------------------------

    async def stop(self) -> None:
        """End it. What waits to be sent knows its channel, and that this: it is freed here."""
        await super().stop()
        self._data_channel_queue.clear()

    async def _handle_data(self, data: bytes) -> None:
        """A decrypted packet. Raises ConnectionError to end the session."""
        self._heard()
        if not sound(data):
            log.debug("a packet of %d octets is dropped", len(data))
            return
        try:
            await super()._handle_data(data)
        except ConnectionError:
            raise
        except Exception as error:  # aiortc asserts, decodes and unpacks what the client chose
            log.info("SCTP that aiortc cannot take: %r", error)
            self.failure = BROKEN
            raise ConnectionError(BROKEN) from error
        if (
            self._advertised_rwnd < -WINDOW_SLACK_OCTETS
            or len(self._sack_misordered) > HELD_MAX
            or len(self._inbound_streams) > STREAMS_MAX
            or sum(len(stream.reassembly) for stream in self._inbound_streams.values()) > HELD_MAX
        ):
            self.failure = EXCEEDED
            raise ConnectionError(EXCEEDED)

    async def _send_chunk(self, chunk: Chunk) -> None:
        # aiortc sends from tasks that nobody waits for: they would log at length that DTLS has
        # ended, which the session knows.
        with contextlib.suppress(ConnectionError):
            await super()._send_chunk(chunk)

    async def _receive_chunk(self, chunk: Chunk) -> None:
        if not isinstance(chunk, InitChunk) or self._last_received_tsn is None:
            await super()._receive_chunk(chunk)
        elif chunk.initiate_tag == self._remote_verification_tag:
            # The client has sent its INIT twice: it is answered again and changes nothing (RFC
            # 9260 section 5.2.2). aiortc would begin to count from it and lose what follows.
            kept = self._last_received_tsn, self._reconfig_response_seq
            await super()._receive_chunk(chunk)
            self._last_received_tsn, self._reconfig_response_seq = kept

    async def _receive_sack_chunk(self, chunk: SackChunk) -> None:
        # aiortc walks every number in every gap, up to 65,535 each: what was never sent cannot have
        # arrived, before or after a gap.
        sent = (self._local_tsn - 1 - chunk.cumulative_tsn) & 0xFFFF_FFFF
        if sent >= 1 << 31:
            return
        above = 0
        for begin, end in chunk.gaps:
            if not above < begin <= end <= sent:
                return
            above = end
        await super()._receive_sack_chunk(chunk)

    def _update_rto(self, R: float) -> None:
        super()._update_rto(R)
        if self._srtt is not None and self._rttvar is not None:
            self._rto = self._srtt + max(4 * self._rttvar, ACK_DELAY_S)

    def _t1_expired(self) -> None:
        self._back_off()
        super()._t1_expired()

    def _t3_expired(self) -> None:
        # RFC 9260 section 6.3.3: without it a round trip longer than the wait is never measured,
        # since everything is sent twice.
        self._back_off()
        super()._t3_expired()

    def _back_off(self) -> None:
        self._rto = max(self._rto, min(2 * self._rto, RTO_BACKED_OFF_S_MAX))
