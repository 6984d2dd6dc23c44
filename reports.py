"""Reports: what one call's RTCP says, both ways.

What it owns: the statistics of the client's stream, the reports that we send of it and of our own,
and what the client's reports say of ours.

Rules that stay true:
- A report is about one stream of the client's: the one that was heard last.
- What a client says of others than our stream is ignored.

Sans-IO. RFC 3550 section 6 https://www.rfc-editor.org/rfc/rfc3550#section-6
"""

import audio
import meter
import rtp

CNAME = "earshot"
"""In RTCP and in the answer. The same for all calls: it ties streams of one call together, and
there is one (RFC 7022 asks that it tells nothing about the host)."""


class Reports:
    """One call's. Methods take monotonic seconds as `now` and seconds since 1970 as `unix`."""

    def __init__(self, playout: audio.Playout, clock_hz: int, measured: meter.Meter) -> None:
        """Of what `playout` sends and of what the client sends, whose clock has `clock_hz`."""
        self.round_trip_s: float | None = None
        """By the client's last report; None until it has sent one."""
        self.fraction_lost = 0.0
        """Of what we sent, by the client's last report."""
        self._playout, self._clock_hz, self._meter = playout, clock_hz, measured
        self._reception: rtp.Reception | None = None

    def received(self, packet: rtp.Packet, now: float) -> bool:
        """A packet of the client's. True for the first of all."""
        reception = before = self._reception
        if reception is None or reception.ssrc != packet.ssrc:
            reception = self._reception = rtp.Reception(packet.ssrc, clock_hz=self._clock_hz)
        reception.received(packet.sequence, packet.timestamp, now)
        return before is None

    def read(self, packet: bytes, now: float, unix: float) -> list[rtp.Block]:
        """A compound packet of the client's; what it says of our stream."""
        if self._reception is not None:
            for sender in rtp.read_senders(packet):
                if sender.ssrc == self._reception.ssrc:
                    self._reception.sender_report(sender, now)
        ours = [block for block in rtp.read_reports(packet) if block.ssrc == self._playout.ssrc]
        for block in ours:
            self.round_trip_s = rtp.round_trip_s(block, unix)
            self.fraction_lost = block.fraction_lost / 256
            self._meter.received(block, self.round_trip_s)
        return ours

    def write(self, now: float, unix: float) -> bytes | None:
        """A sender report once something was sent, else a receiver report if anything came (RFC
        3550 section 6.4)."""
        playout, reception, blocks = self._playout, self._reception, []
        if reception is not None:
            blocks.append(reception.report(now))
            self._meter.reported(blocks[0], reception.packets)
        if playout.packets_sent:
            sender = rtp.Sender(
                ssrc=playout.ssrc,
                ntp=rtp.ntp(unix),
                timestamp=playout.timestamp_at(now),
                packets=playout.packets_sent,
                octets=playout.octets_sent,
            )
            return rtp.sender_report(sender, blocks, CNAME)
        return rtp.receiver_report(playout.ssrc, blocks, CNAME) if blocks else None
