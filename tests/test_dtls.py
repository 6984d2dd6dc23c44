"""What DTLS needs beside aiortc: the shared context, and records one by one."""

import pytest
from aiortc.rtcdtlstransport import SRTP_PROFILES
from hypothesis import given
from hypothesis import strategies as st

import dtls


def record(kind: int, octets: int) -> bytes:
    return bytes([kind, 0xFE, 0xFD]) + bytes(8) + octets.to_bytes(2, "big") + bytes(octets)


ALERT, DATA, HELLO = record(21, 2), record(23, 40), record(22, 100)


@pytest.mark.parametrize(
    ("datagram", "found"),
    [
        (DATA, [DATA]),
        (HELLO + DATA, [HELLO, DATA]),
        (HELLO + ALERT + DATA, [HELLO, ALERT, DATA]),
        (DATA[:-1], [DATA[:-1]]),
        (DATA + ALERT[:5], [DATA, ALERT[:5]]),
        (DATA + b"\x00\x01", [DATA, b"\x00\x01"]),
        (b"\x2f" + bytes(40), [b"\x2f" + bytes(40)]),  # DTLS 1.3: another header
        (b"\x16", [b"\x16"]),
    ],
)
def test_records_of_a_datagram(datagram: bytes, found: list[bytes]) -> None:
    assert dtls.records(datagram) == found


@pytest.mark.parametrize(
    ("datagram", "finishes"),
    [
        (HELLO + record(20, 1) + record(22, 48), True),  # key exchange, change, Finished
        (record(20, 1), True),
        (HELLO, False),
        (ALERT, False),  # refused with the client's certificate at hand: there are no keys
        (b"", False),
    ],
)
def test_an_alert_is_no_finished(datagram: bytes, finishes: bool) -> None:
    assert dtls.finishes(datagram) is finishes


@given(st.binary(min_size=1, max_size=200))
def test_nothing_of_a_datagram_is_lost(datagram: bytes) -> None:
    found = dtls.records(datagram)
    assert b"".join(found) == datagram
    assert all(found)


def test_all_sessions_share_a_context() -> None:
    certificate = dtls.Certificate.generateCertificate()
    context = certificate._create_ssl_context(SRTP_PROFILES)
    assert certificate._create_ssl_context(SRTP_PROFILES) is context
    assert len(certificate.sha256.split(":")) == 32
