"""RTP packets and RTCP reports, read and written in place of a library's objects.

Owns the octets of RTP (RFC 3550 section 5, https://www.rfc-editor.org/rfc/rfc3550#section-5) and of
the three RTCP packets an audio session needs: sender report, receiver report, and the source
description that must go with them. Owns the reception statistics of one source too (RFC 3550
appendix A).

Rules:
- Reading is total: whatever octets arrive, the answer is a value or "not one"; no exception, no
  work beyond the datagram's own length.
- Sans-IO: arrival times are arguments. `now` is monotonic seconds, `unix_s` is the wall clock that
  NTP timestamps need.
- Sequence numbers (16 bits) and timestamps (32 bits) wrap; only their differences mean anything.

It does not decrypt (the reader gets what SRTP has authenticated), does not tell RTP from RTCP
(stun.is_rtcp does), and leaves header extensions and contributing sources unread: nothing here
wants them, their octets are only stepped over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

CLOCK_HZ = 48_000
"""The RTP clock of Opus whatever its sampling rate is (RFC 7587 section 4.1)."""

SEQUENCE_DROPOUT_MAX = 3_000
"""A sequence number this far ahead is a loss, further is a restart: RFC 3550 appendix A.1, one
minute of 20 ms packets."""

SEQUENCE_MISORDER_MAX = 100
"""A sequence number this far behind is a late packet, further is a restart: RFC 3550 appendix A.1,
two seconds."""

REPORT_BLOCKS_MAX = 31
"""Blocks one report can carry: its count has five bits (RFC 3550 section 6.4.1)."""

_JITTER_JUMP_S_MAX = 5
"""Longer transit changes are a restarted clock or a stalled network, not jitter. libwebrtc leaves
out about the same; without it one jump of a timestamp would sit in the estimate for a hundred
packets."""

_NTP_EPOCH_S = 2_208_988_800  # from 1900 to 1970, RFC 868

_SR, _RR, _SDES = 200, 201, 202
_CNAME = 1

_HEADER = struct.Struct(">BBHII")
_U16 = struct.Struct(">H")
_RTCP = struct.Struct(">BBH")
_SENDER = struct.Struct(">IQIII")  # SSRC, then the 20 octets of sender information
_BLOCK = struct.Struct(">IIIIII")


class Packet(NamedTuple):
    """One RTP packet. The payload is a copy: it outlives the datagram it came in."""

    marker: bool
    payload_type: int
    sequence: int
    timestamp: int
    ssrc: int
    payload: bytes


def read(datagram: bytes) -> Packet | None:
    """Read an RTP packet; None for octets that are not one.

    RFC 3550 section 5.1: https://www.rfc-editor.org/rfc/rfc3550#section-5.1
    """
    if len(datagram) < 12:
        return None
    first, second, sequence, timestamp, ssrc = _HEADER.unpack_from(datagram)
    if first == 0x80:  # nearly every packet, as no header extension is negotiated
        payload = datagram[12:]
    else:
        found = _payload(datagram, first)
        if found is None:
            return None
        payload = found
    # What Packet() does, less the call of its own __new__: 90 ns of 400.
    return tuple.__new__(Packet, (second > 0x7F, second & 0x7F, sequence, timestamp, ssrc, payload))


def _payload(datagram: bytes, first: int) -> bytes | None:
    """What is left without contributing sources, extension and padding; None if that does not add
    up."""
    if first >> 6 != 2:
        return None
    begin = 12 + 4 * (first & 0x0F)
    end = len(datagram)
    if first & 0x10:
        if begin + 4 > end:
            return None
        begin += 4 + 4 * int(_U16.unpack_from(datagram, begin + 2)[0])
    if first & 0x20:
        end -= datagram[-1] or len(datagram)  # a count of zero would not even cover itself
    return datagram[begin:end] if begin <= end else None


def write(
    payload_type: int,
    sequence: int,
    timestamp: int,
    ssrc: int,
    payload: bytes,
    *,
    marker: bool = False,
) -> bytes:
    """An RTP packet without extension, ready for SRTP. The numbers must be within their fields'
    ranges."""
    second = payload_type | 0x80 if marker else payload_type
    return _HEADER.pack(0x80, second, sequence, timestamp, ssrc) + payload


# ---- reports -----------------------------------------------------------------------------------


class Block(NamedTuple):
    """One report block: how a receiver fares with one source.

    RFC 3550 section 6.4.1: https://www.rfc-editor.org/rfc/rfc3550#section-6.4.1
    """

    ssrc: int
    fraction_lost: int
    """Of the packets since the last report, in 256ths."""
    lost: int
    """Since the beginning; negative where duplicates outnumber losses."""
    highest_sequence: int
    """Extended: wraps of the sequence number in the upper 16 bits."""
    jitter: int
    """In units of the RTP clock."""
    last_sr: int
    """The middle 32 bits of the last sender report's NTP timestamp, 0 if there was none."""
    delay_since_last_sr: int
    """In 65536ths of a second."""


class Sender(NamedTuple):
    """The sender's part of a sender report."""

    ssrc: int
    ntp: int
    """64 bits: seconds since 1900 and their 2^32nds."""
    timestamp: int
    packets: int
    octets: int


def ntp(unix_s: float) -> int:
    """The 64-bit NTP timestamp of a wall-clock time (it wraps in 2036, as NTP's eras do)."""
    return int((unix_s + _NTP_EPOCH_S) * 4_294_967_296) & 0xFFFF_FFFF_FFFF_FFFF


def sender_report(sender: Sender, blocks: Sequence[Block], cname: str) -> bytes:
    """A compound packet: sender report with up to REPORT_BLOCKS_MAX blocks, and the CNAME."""
    body = _SENDER.pack(
        sender.ssrc,
        sender.ntp,
        sender.timestamp,
        sender.packets & 0xFFFF_FFFF,
        sender.octets & 0xFFFF_FFFF,
    )
    return _report(_SR, body, blocks) + _description(sender.ssrc, cname)


def receiver_report(ssrc: int, blocks: Sequence[Block], cname: str) -> bytes:
    """The same of one who has sent nothing lately; `ssrc` is the reporter's own."""
    return _report(_RR, ssrc.to_bytes(4, "big"), blocks) + _description(ssrc, cname)


def _report(kind: int, body: bytes, blocks: Sequence[Block]) -> bytes:
    parts = [body]
    for block in blocks[:REPORT_BLOCKS_MAX]:
        loss = block.fraction_lost << 24 | block.lost & 0xFF_FFFF
        parts.append(_BLOCK.pack(block.ssrc, loss, *block[3:]))
    return _rtcp(kind, len(parts) - 1, b"".join(parts))


def _description(ssrc: int, cname: str) -> bytes:
    """RFC 3550 section 6.5: one chunk whose items end with at least one zero octet, to 32 bits."""
    name = cname.encode()[:255]
    chunk = ssrc.to_bytes(4, "big") + bytes((_CNAME, len(name))) + name
    return _rtcp(_SDES, 1, chunk + bytes(4 - len(chunk) % 4))


def _rtcp(kind: int, count: int, body: bytes) -> bytes:
    return _RTCP.pack(0x80 | count, kind, len(body) // 4) + body


def read_reports(datagram: bytes) -> list[Block]:
    """All report blocks of a compound packet, in order, up to the first malformed part."""
    blocks = []
    for kind, count, begin, end in _parts(datagram):
        at = begin + (_SENDER.size if kind == _SR else 4)
        if kind in (_SR, _RR) and at + count * _BLOCK.size <= end:
            for offset in range(at, at + count * _BLOCK.size, _BLOCK.size):
                ssrc, loss, *rest = _BLOCK.unpack_from(datagram, offset)
                lost = (loss & 0xFF_FFFF ^ 0x80_0000) - 0x80_0000  # 24 bits with a sign
                blocks.append(Block(ssrc, loss >> 24, lost, *rest))
    return blocks


def read_senders(datagram: bytes) -> list[Sender]:
    """The senders' parts of a compound packet, in order: what Reception.sender_report() wants."""
    return [
        Sender(*_SENDER.unpack_from(datagram, begin))
        for kind, _, begin, end in _parts(datagram)
        if kind == _SR and begin + _SENDER.size <= end
    ]


def _parts(datagram: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Walk a compound packet: kind, count, begin and end of the body; up to the first oddity."""
    begin, end = 0, len(datagram)
    while begin + 4 <= end:
        first, kind, words = _RTCP.unpack_from(datagram, begin)
        following = begin + 4 + 4 * words
        if first >> 6 != 2 or following > end:
            return
        yield kind, first & 0x1F, begin + 4, following
        begin = following


def round_trip_s(block: Block, unix_s: float) -> float | None:
    """The round trip that a report on our packets shows; None if it answers no sender report.

    RFC 3550 section 6.4.1, figure 2. Not under 0, whatever the peer claims.
    """
    if not block.last_sr:
        return None
    units = (_middle(ntp(unix_s)) - block.last_sr - block.delay_since_last_sr) & 0xFFFF_FFFF
    return units / 65_536 if units < 0x8000_0000 else 0.0


def _middle(ntp_timestamp: int) -> int:
    return ntp_timestamp >> 16 & 0xFFFF_FFFF


# ---- reception statistics ----------------------------------------------------------------------


class Reception:
    """What became of the packets of one source: RFC 3550 appendices A.1, A.3 and A.8.

    https://www.rfc-editor.org/rfc/rfc3550#appendix-A.1. A handful of integers, however long the
    session and whatever is sent. The one difference from the RFC: a source is believed from its
    first packet, since SRTP has authenticated it.
    """

    def __init__(self, ssrc: int, *, clock_hz: int = CLOCK_HZ) -> None:
        self.ssrc = ssrc
        self.packets = 0
        """Received since the beginning (or since the source restarted), duplicates included."""
        self.jitter = 0.0
        """Interarrival jitter in units of the clock."""
        self._clock_hz = clock_hz
        self._jump_max = _JITTER_JUMP_S_MAX * clock_hz
        self._base = self._highest = -1  # extended sequence numbers; -1: nothing has come yet
        self._restart = -1  # the sequence number that would confirm a restart
        self._transit = 0
        self._expected_before = self._packets_before = 0
        self._sr_middle = 0
        self._sr_at = 0.0

    def received(self, sequence: int, timestamp: int, now: float) -> None:
        """Count one packet."""
        transit = int(now * self._clock_hz) - timestamp
        ahead = (sequence - self._highest) & 0xFFFF
        if self._highest < 0:
            self._begin(sequence)
        elif ahead < SEQUENCE_DROPOUT_MAX:
            self._highest += ahead  # 0 is a duplicate of the highest
        elif ahead <= 0x1_0000 - SEQUENCE_MISORDER_MAX:
            if sequence != self._restart:  # two in a row are a restart, a single one is a stray
                self._restart = (sequence + 1) & 0xFFFF
                return
            self._begin(sequence)
        self.packets += 1
        if self.packets > 1:
            moved = (transit - self._transit) & 0xFFFF_FFFF
            if moved > 0x7FFF_FFFF:  # backwards; min() of the two takes 100 ns of 370
                moved = 0x1_0000_0000 - moved
            if moved < self._jump_max:
                self.jitter += (moved - self.jitter) / 16
        self._transit = transit

    def _begin(self, sequence: int) -> None:
        self._base = self._highest = sequence
        self._restart = -1
        self.packets = self._expected_before = self._packets_before = 0

    @property
    def expected(self) -> int:
        """Packets that the sequence numbers say were sent."""
        return self._highest - self._base + 1 if self._highest >= 0 else 0

    @property
    def lost(self) -> int:
        """Packets missing since the beginning; negative where duplicates outnumber losses."""
        return self.expected - self.packets

    def sender_report(self, sender: Sender, now: float) -> None:
        """Remember a sender report of this source: the other side wants it for the round trip."""
        self._sr_middle = _middle(sender.ntp)
        self._sr_at = now

    def report(self, now: float) -> Block:
        """The block for the next report; what it calls "since the last report" starts anew."""
        expected = self.expected - self._expected_before
        lost = expected - (self.packets - self._packets_before)
        self._expected_before, self._packets_before = self.expected, self.packets
        delay = int((now - self._sr_at) * 65_536) if self._sr_middle else 0
        return Block(
            ssrc=self.ssrc,
            fraction_lost=min(255, (lost << 8) // expected) if expected > 0 and lost > 0 else 0,
            lost=max(-0x80_0000, min(0x7F_FFFF, self.lost)),
            highest_sequence=max(self._highest, 0) & 0xFFFF_FFFF,
            jitter=int(self.jitter) & 0xFFFF_FFFF,
            last_sr=self._sr_middle,
            delay_since_last_sr=max(0, min(0xFFFF_FFFF, delay)),
        )
