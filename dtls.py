"""What DTLS needs beside aiortc's transport: one certificate for all, and records one by one.

What it owns: the ciphers and the TLS context of the process, and the division of a datagram into
records.

Rules that stay true:
- All sessions of a process share a certificate and a context: a context costs 0.2 ms a session.
- aiortc is handed one record at a time, so that what it makes of one is not taken for another's.

It knows no session: `peer.py` runs the handshakes.

RFC 6347 https://www.rfc-editor.org/rfc/rfc6347 (DTLS 1.2), RFC 8827
https://www.rfc-editor.org/rfc/rfc8827 (WebRTC's use of it).
"""

from aiortc.rtcdtlstransport import RTCCertificate, SRTPProtectionProfile
from OpenSSL import SSL

_CIPHERS = b":".join(
    # aiortc's own, then the same for peers with an RSA certificate (GStreamer and other encoders).
    b"ECDHE-%s-%s" % (kind, suite)
    for kind in (b"ECDSA", b"RSA")
    for suite in (b"AES128-GCM-SHA256", b"CHACHA20-POLY1305", b"AES128-SHA", b"AES256-SHA")
)

_RECORD_OCTETS = 13  # a record's header, RFC 6347 section 4.1


class Certificate(RTCCertificate):
    """aiortc's certificate with one TLS context for all sessions: 0.2 ms less each."""

    _context: SSL.Context | None = None

    def _create_ssl_context(self, srtp_profiles: list[SRTPProtectionProfile]) -> SSL.Context:
        if self._context is None:
            self._context = super()._create_ssl_context(srtp_profiles)
            self._context.set_cipher_list(_CIPHERS)
            # A shared context would collect sessions to resume, which WebRTC never does.
            self._context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        return self._context

    @property
    def sha256(self) -> str:
        """The fingerprint that the answer names."""
        return next(f.value for f in self.getFingerprints() if f.algorithm == "sha-256")


def finishes(datagram: bytes) -> bool:
    """Whether a datagram that we send has our Finished in it: it stands behind ChangeCipherSpec."""
    return any(record[:1] == b"\x14" for record in records(datagram))


def records(datagram: bytes) -> list[bytes]:
    """The DTLS records of a datagram, one by one; what does not add up stays with the last.

    aiortc reads one record for each datagram, so a second one would wait for the next datagram, and
    be taken for a part of it: of where that came from, too.
    """
    found = []
    begin, end = 0, len(datagram)
    # Content types 20 to 26 have this header; DTLS 1.3 has a shorter one (RFC 9147 section 4).
    while begin + _RECORD_OCTETS <= end and 20 <= datagram[begin] <= 26:
        size = _RECORD_OCTETS + int.from_bytes(datagram[begin + 11 : begin + 13], "big")
        if begin + size >= end:
            break
        found.append(datagram[begin : begin + size])
        begin += size
    found.append(datagram[begin:])
    return found
