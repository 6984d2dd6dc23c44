"""The data channel's association: what aiortc may read, what is held, how soon is sent again."""

import asyncio
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiortc import rtcsctptransport
from aiortc.rtcsctptransport import DataChunk, ForwardTsnChunk, HeartbeatChunk, SackChunk
from google_crc32c import value as crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st

import association
from ledger import Counters
from metrics import Transceiver as Count

from . import shim, test_peer


def chunk(kind: int, body: bytes = b"", flags: int = 0, length: int | None = None) -> bytes:
    size = 4 + len(body) if length is None else length
    return struct.pack(">BBH", kind, flags, size) + body + bytes(-len(body) % 4)


def data(octets: int = 1, flags: int = 3) -> bytes:
    return chunk(0, bytes(12 + octets), flags)


def parameter(kind: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, length) + body


HEADER = bytes(12)
INIT = struct.pack(">LLHHL", 1, 100_000, 10, 10, 1)


@pytest.mark.parametrize(
    "chunks",
    [
        data(),
        data(1200) + data(3),
        chunk(1, INIT),
        chunk(1, INIT + parameter(0x8008, 6, b"\xc0\x82\0\0") + parameter(0xC000, 4)),
        chunk(2, INIT + parameter(7, 28, bytes(24))),
        chunk(3, bytes(12)),
        chunk(3, bytes(8) + b"\0\1\0\1" + bytes(8)) + data(),
        chunk(10, bytes(24)) + data(100),
        chunk(11),
        chunk(4, parameter(1, 12, bytes(8))),
        chunk(130, parameter(13, 18, bytes(16))),
        chunk(192, bytes(8)),
        chunk(0xC1, b"unknown: aiortc steps over it"),
        chunk(11) * association.CHUNKS_MAX,
    ],
)
def test_what_clients_send_is_sound(chunks: bytes) -> None:
    assert association.sound(HEADER + chunks)


@pytest.mark.parametrize(
    "chunks",
    [
        b"",
        b"\0\3\0",
        chunk(0, b"", length=3),
        chunk(0, bytes(12)),  # DATA without any
        chunk(0, bytes(40), length=45),
        chunk(1, INIT[:-1]),
        chunk(1, INIT) + data(),
        chunk(1, INIT + parameter(7, 0)),
        chunk(2, INIT + parameter(7, 3)),
        chunk(3, bytes(11)),
        chunk(3, bytes(8) + b"\xff\xff\0\0"),
        chunk(3, bytes(10) + b"\0\1"),
        chunk(4, parameter(1, 0)),
        chunk(5, parameter(1, 8, bytes(4)) + parameter(1, 0)),
        chunk(6, parameter(1, 0)),
        chunk(9, parameter(1, 2)),
        chunk(130, parameter(13, 0)),
        chunk(7, b"\0"),
        chunk(192),
        chunk(11) * (association.CHUNKS_MAX + 1),
    ],
)
def test_what_would_trip_or_stall_aiortc_is_not(chunks: bytes) -> None:
    assert not association.sound(HEADER + chunks)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 130, 192, 77]),
            st.integers(0, 255),
            st.one_of(st.none(), st.integers(0, 60)),
            st.binary(max_size=60),
        ),
        max_size=6,
    )
)
@example([(4, 0, None, bytes(4))])
def test_aiortc_reads_whatever_is_sound_and_comes_to_an_end(
    chunks: list[tuple[int, int, int | None, bytes]],
) -> None:
    """The parser raises at the worst; a loop without an end would show as a test that hangs."""
    packet = bytearray(
        HEADER + b"".join(chunk(kind, body, flags, n) for kind, flags, n, body in chunks)
    )
    struct.pack_into("<L", packet, 8, crc32c(bytes(packet)))
    if association.sound(bytes(packet)):
        try:
            rtcsctptransport.parse_packet(bytes(packet))
        except (ValueError, struct.error):
            return
