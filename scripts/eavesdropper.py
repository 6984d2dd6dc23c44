"""The eavesdropper: what somebody on the way sees of calls, for attacks that need it.

For flood.py attack. A raw socket has a copy of every UDP datagram that arrives on this machine,
with its IP header, so where the relay is on this machine, too, everything that clients send to it
can be recorded to the octet: checks, whose ufrags are in the clear; SSRCs, which SRTP does not
hide; addresses. Only sessions that were named are recorded: those of the tool's own calls.

raw(7) https://man7.org/linux/man-pages/man7/raw.7.html
"""

import ipaddress
import select
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import stun

Address = tuple[str, int]

_PORTS = struct.Struct(">HH")
_UDP_OCTETS, _RTP_OCTETS = 8, 12


@dataclass
class Overheard:
    """What is known of calls, by their addresses."""

    checks: dict[Address, bytes] = field(default_factory=dict)
    """The last check of each."""
    ssrcs: dict[Address, int] = field(default_factory=dict)

    def take(self, source: Address, datagram: bytes, hints: Collection[str]) -> None:
        """A client's datagram. Of whom no check has shown one of `hints`, nothing is kept."""
        request = stun.read_request(datagram)
        if isinstance(request, stun.Request):
            if request.ufrag.decode("ascii", "replace") in hints:
                self.checks[source] = datagram
            return
        is_rtp = len(datagram) > _RTP_OCTETS and stun.kind(datagram[0]) is stun.Kind.RTP
        if is_rtp and not stun.is_rtcp(datagram) and source in self.checks:
            self.ssrcs[source] = int.from_bytes(datagram[8:12], "big")


def overhear(host: str, port: int, hints: Collection[str], seconds: float) -> Overheard:
    """What clients on this machine send to a relay at an IPv4 address of it, for so long, or until
    each session of `hints` has shown a check and media. Raises PermissionError without
    CAP_NET_RAW."""
    found, here = Overheard(), ipaddress.IPv4Address(host).packed
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and len(found.ssrcs) < len(hints):
            if not select.select([ear], [], [], left)[0]:
                break
            octets = ear.recv(2048)
            at = (octets[0] & 0x0F) * 4  # the length of the IP header, in words
            if len(octets) < at + _UDP_OCTETS:
                continue  # a raw socket hears what is no whole header, too
            source_port, target_port = _PORTS.unpack_from(octets, at)
            if target_port == port and octets[16:20] == here:
                source = socket.inet_ntoa(octets[12:16]), source_port
                found.take(source, octets[at + _UDP_OCTETS :], hints)
    return found
