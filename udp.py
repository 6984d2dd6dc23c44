"""UDP: batches of datagrams that the kernel fills and empties with one call each.

What it owns: `Batch`, room for n datagrams laid out once in (shared) memory, with everything that
recvmmsg(2) and sendmmsg(2) need to know about it. No other module of the relay uses ctypes.

A batch is made of frames (frame.py). Which way it goes decides what the kernel puts where:

               32 octets of header        datagram
             +------+-----------------+---------------------------+
    frame    | MAGIC| sockaddr_in6    | payload                   |     one every `stride` octets
             +------+-----------------+---------------------------+
    INBOUND           ^ source name     ^ received here                 sent: the whole frame
    OUTBOUND ^ received here
                      ^ destination     ^ sent from here
    TRANSIT  ^ received here, and sent from here as it is

So the header is written by the kernel, as the name of the source, and read by it, as the name of
the destination: it is never built, and no payload is ever copied. The other end's names (the
transceivers') lie one behind the other in an array of their own; in transit there are two, of where
frames came from and of where they go.

Rules that stay true:
- Nothing here loops over the datagrams of a batch in Python but the portable twin and the skipping
  of datagrams that the kernel refused.
- The tables of pointers are written once. What changes a batch are the lengths, by strided
  assignment, and the next hops, as one piece.
- What the methods return are copies, but for `payload`.
- **A batch outlives the process that holds it.** Before a receive all lengths read as nothing; the
  kernel writes `msg_len` itself, of each datagram as it is received and as it is sent. So whoever
  finds the memory knows what was taken from the socket and what has gone on: a process can be
  killed between any two instructions. Numbers tell one batch from the next.

`PortableBatch` does the same with recvfrom_into and sendto where there is no recvmmsg. It knows
nothing of flows, STUN or counters.

`pointer`, `receive_many` and `send_many` are the two calls alone, for tools that lay out tables of
their own.

recvmmsg(2), sendmmsg(2), ip(7), ipv6(7), socket(7) https://man7.org/linux/man-pages/
"""

import ctypes
import enum
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import frame
import sockets

SEND_WAIT_MS = 5
"""How long a full send buffer may hold up a batch. Buffers drain in microseconds; a device that
stands still for longer must not stop the other way, whose datagrams wait meanwhile."""

CACHE_LINE_OCTETS = 64

_MSGHDR = struct.Struct("@PI4xPNPNi4x")  # struct msghdr on 64-bit Linux
_MMSGHDR_OCTETS = _MSGHDR.size + 8  # and msg_len with its padding
_IOVEC = struct.Struct("@PN")
_WORD_OCTETS = 4  # lengths are read and written as 32-bit words: half of what size_t would be
_LENGTH_WORD = _MSGHDR.size // _WORD_OCTETS  # of msg_len in struct mmsghdr
_MMSGHDR_WORDS = _MMSGHDR_OCTETS // _WORD_OCTETS
_IOVEC_WORDS = _IOVEC.size // _WORD_OCTETS

_NAME_AT = len(frame.MAGIC)
_SCOPE_WORD = frame.HEADER_OCTETS // _WORD_OCTETS - 1
_NOTHING = 0xFFFF_FFFF  # a length that no datagram has


class Way(enum.Enum):
    """Which way a batch goes: see the figure above."""

    INBOUND = "clients to transceivers"
    OUTBOUND = "transceivers to clients"
    TRANSIT = "frames of other relays' clients, either way"


class _View(NamedTuple):
    """What a batch of n datagrams needs, made once for each n: slicing costs more than using it."""

    headers: Callable[[memoryview], tuple[bytes, ...]]
    kinds: memoryview
    received: memoryview
    to_send: memoryview
    hops: memoryview
    scopes: memoryview
    sources: Callable[[memoryview], tuple[bytes, ...]]
    shift: int
    to_receive_table: memoryview
    to_send_table: memoryview
    received_nothing: memoryview
    sent_nothing: memoryview


class Batch:
    """Room for a batch of datagrams on their way from one socket to another."""

    def __init__(
        self,
        memory: memoryview,
        way: Way,
        size: int,
        octets_max: int,
        source: socket.socket,
        target: socket.socket,
    ) -> None:
        """Lay a batch of up to `size` datagrams out in `memory`, of `octets(...)` octets.

        `octets_max` is the largest payload. The memory must stay where it is.
        """
        self.size, self.octets_max = size, octets_max
        self.source, self.target = source, target
        self._source_fd, self._target_fd = source.fileno(), target.fileno()
        self._memory, self._way = memory, way
        inbound = way is Way.INBOUND
        self._family = (target if inbound else source).family
        self._stride = _stride(octets_max)
        self._name = frame.name_octets(self._family)
        self._names_at = size * self._stride
        hops_at = self._hops_at = self._names_at + (way is Way.TRANSIT) * size * self._name
        self._tables_at = _aligned(hops_at + size * self._name)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._receive_table = ctypes.c_void_p(self._base + self._tables_at)
        self._send_table = ctypes.c_void_p(self._send_entry(0))
        header = frame.HEADER_OCTETS
        self._receive_at, self._send_at, self._shift = {
            Way.INBOUND: (header, 0, header),
            Way.OUTBOUND: (0, header, -header),
            Way.TRANSIT: (0, 0, 0),
        }[way]
        if inbound:
            for at in range(0, self._names_at, self._stride):
                memory[at : at + _NAME_AT] = frame.MAGIC
        self._write_tables()
        end = octets(size, octets_max, self._family, way)
        self._number = memory[end - CACHE_LINE_OCTETS : end].cast("Q")
        tables = memory[self._tables_at : end].cast("I")
        self._frames = memory[: self._names_at]
        self._names = memory[self._names_at : self._names_at + size * self._name]
        self._hops = memory[hops_at : hops_at + size * self._name]
        self._scopes = self._frames.cast("I")[_SCOPE_WORD :: self._stride // _WORD_OCTETS]
        self._lengths = tables[_LENGTH_WORD : size * _MMSGHDR_WORDS : _MMSGHDR_WORDS]
        sent = tables[size * _MMSGHDR_WORDS :]
        self._sent = sent[_LENGTH_WORD : size * _MMSGHDR_WORDS : _MMSGHDR_WORDS]
        iovecs = tables[2 * size * _MMSGHDR_WORDS + size * _IOVEC_WORDS :]
        self._to_send = iovecs[2 : size * _IOVEC_WORDS : _IOVEC_WORDS]
        table = size * _MMSGHDR_OCTETS
        self._receive_octets = memory[self._tables_at : self._tables_at + table]
        self._send_octets = memory[self._tables_at + table : self._tables_at + 2 * table]
        self._receive_blank = _with_lengths(self._receive_octets, _NOTHING)
        self._send_blank = _with_lengths(self._send_octets, _NOTHING)
        self._views = [self._view(n) for n in range(size + 1)]
        sockets.forbid_fragments(target)  # a process may have died while it allowed them
        self._taken = size
        self.number = self._number[0]

    def _send_entry(self, i: int) -> int:
        """Address of datagram i's struct mmsghdr in the table to send."""
        return self._base + self._tables_at + (self.size + i) * _MMSGHDR_OCTETS

    def _write_tables(self) -> None:
        """Two arrays of struct mmsghdr (to receive, to send), then two of struct iovec."""
        memory, size, room = self._memory, self.size, self.octets_max + frame.HEADER_OCTETS
        way = self._way
        for i in range(size):
            at = self._base + i * self._stride
            client = at + _NAME_AT, frame.HEADER_OCTETS - _NAME_AT
            other = self._base + self._names_at + i * self._name, self._name
            hop = self._base + self._hops_at + i * self._name, self._name
            receive = client if way is Way.INBOUND else other
            send = client if way is Way.OUTBOUND else hop
            for array, peer, start, length in (
                (0, receive, self._receive_at, room - self._receive_at),
                (1, send, self._send_at, 0),
            ):
                header_at = self._tables_at + (array * size + i) * _MMSGHDR_OCTETS
                iovec_at = (
                    self._tables_at + 2 * size * _MMSGHDR_OCTETS + (array * size + i) * _IOVEC.size
                )
                _IOVEC.pack_into(memory, iovec_at, at + start, length)
                _MSGHDR.pack_into(memory, header_at, *peer, self._base + iovec_at, 1, 0, 0, 0)

    def _view(self, n: int) -> _View:
        rest = self._stride - frame.HEADER_OCTETS
        whole = f"{frame.HEADER_OCTETS}s"
        return _View(
            headers=struct.Struct(f"{whole}{rest}x" * n).unpack_from,
            kinds=self._frames[frame.HEADER_OCTETS : n * self._stride : self._stride],
            received=self._lengths[:n],
            to_send=self._to_send[:n],
            hops=self._hops[: n * self._name],
            scopes=self._scopes[:n],
            sources=struct.Struct(f"{self._name}s" * n).unpack_from,
            shift=int.from_bytes(abs(self._shift).to_bytes(_WORD_OCTETS, "little") * n, "little"),
            to_receive_table=self._receive_octets[: n * _MMSGHDR_OCTETS],
            to_send_table=self._send_octets[: n * _MMSGHDR_OCTETS],
            received_nothing=self._receive_blank[: n * _MMSGHDR_OCTETS],
            sent_nothing=self._send_blank[: n * _MMSGHDR_OCTETS],
        )

    def receive(self) -> int:
        """Take what waits, up to `size` datagrams; 0 if there is none. Never blocks.

        An error that the kernel kept for the socket reads as none waiting. The batch before is
        forgotten: whoever counts batches has counted it by its `number`.
        """
        self._begin()
        # MSG_TRUNC makes a length that of the datagram even where its end did not fit.
        n: int = _recvmmsg(self._source_fd, self._receive_table, self.size, _FLAGS, None)
        self._taken = n = n if n > 0 else 0
        return n

    def _begin(self) -> None:
        view = self._views[self._taken]
        # Whole tables, though only lengths have changed: one copy of memory in one piece.
        view.to_receive_table[:] = view.received_nothing
        view.to_send_table[:] = view.sent_nothing
        self._number[0] = self.number = self.number + 1

    def in_hand(self, counted: int) -> int:
        """How many datagrams a process that died had received, and not yet counted.

        `counted` is the number of the last batch it counted. Read them like any batch.
        """
        if counted == self.number:
            return 0
        received = self._lengths.tolist()
        self._taken = received.index(_NOTHING) if _NOTHING in received else self.size
        return self._taken

    def sent(self, n: int) -> list[int]:
        """Those of the first n datagrams that the kernel has sent: it writes that down itself."""
        return [i for i, octets in enumerate(self._sent[:n].tolist()) if octets != _NOTHING]

    def read(self, n: int) -> tuple[tuple[bytes, ...], list[int], bytes]:
        """Headers, lengths and first octets of the first n datagrams.

        The headers say who the clients are. Lengths are as received: on the way out they include
        the header. The first octet of an empty payload is whatever lay there before.
        """
        headers, kinds, received, *_ = self._views[n]
        return headers(self._frames), received.tolist(), kinds.tobytes()

    def sources(self, n: int) -> tuple[bytes, ...]:
        """OUTBOUND, TRANSIT: the socket address that each frame came from."""
        return self._views[n].sources(self._names)

    def stamp(self, n: int, tags: Iterable[bytes]) -> None:
        """The last four octets of n headers (backbone.py). Zeros take them out again."""
        self._views[n].scopes[:] = memoryview(b"".join(tags)).cast("I")

    def payload(self, i: int, length: int) -> memoryview:
        """A view of datagram i, without header, valid until the next receive."""
        at = i * self._stride + frame.HEADER_OCTETS
        return self._frames[at : at + length]

    def direct(self, n: int, hops: Iterable[bytes]) -> None:
        """INBOUND, TRANSIT: where each of n datagrams goes, n socket addresses."""
        self._views[n].hops[:] = b"".join(hops)

    def send(self, n: int, holes: Sequence[int]) -> list[int]:
        """Send n datagrams but for the `holes` (ascending); returns those the kernel refused.

        What is received with a header leaves without, and the other way round: all lengths change
        by 32 in one addition of big integers. No carry can happen, and no borrow, since every
        length on the way out is at least 32, or its datagram is a hole and counts as so long here.
        """
        view = self._views[n]
        octets = view.received.tobytes()
        if holes:
            octets = _with_holes(octets, holes)
        lengths, shift = int.from_bytes(octets, "little"), view.shift
        shifted = lengths + shift if self._shift >= 0 else lengths - shift
        view.to_send[:] = memoryview(shifted.to_bytes(n * _WORD_OCTETS, "little")).cast("I")
        if not holes:
            sent: int = self._send_first(n)
            return [] if sent == n else self._send_run(max(sent, 0), n)
        refused, start = [], 0
        for end in (*holes, n):
            refused += self._send_run(start, end)
            start = end + 1
        return refused

    def _send_first(self, n: int) -> int:
        """One call for all of them, the common case; returns how many went, or less than 0."""
        sent: int = _sendmmsg(self._target_fd, self._send_table, n, _DONT_WAIT)
        return sent

    def _send_run(self, start: int, end: int) -> list[int]:
        """Send datagrams `start` to `end` (exclusive), skipping and returning what is refused."""
        refused: list[int] = []
        waited = False
        while start < end:
            # sendmmsg(2): returns how many went out before one failed; an error is the first's.
            table = ctypes.c_void_p(self._send_entry(start))
            sent = _sendmmsg(self._target_fd, table, end - start, _DONT_WAIT)
            if sent > 0:
                start += sent
                waited = False
            elif not waited and ctypes.get_errno() in (errno.EAGAIN, errno.ENOBUFS):
                waited = True
                _wait_until_writable(self.target)
            else:
                if ctypes.get_errno() != errno.EMSGSIZE or not self._send_in_fragments(start):
                    refused.append(start)
                start += 1
                waited = False
        return refused

    def _send_in_fragments(self, i: int) -> bool:
        """What fitted the client's path may be 32 octets too long for that to its transceiver: a
        flight of DTLS with a large certificate, once a call. True if it has been sent."""
        if self._way is Way.OUTBOUND:
            return False
        sockets.forbid_fragments(self.target, False)
        try:
            return self._send_alone(i)
        finally:
            sockets.forbid_fragments(self.target)

    def _send_alone(self, i: int) -> bool:
        entry = ctypes.c_void_p(self._send_entry(i))
        return bool(_sendmmsg(self._target_fd, entry, 1, _DONT_WAIT) == 1)


class PortableBatch(Batch):
    """The same, a call a datagram, for systems without recvmmsg."""

    def receive(self) -> int:
        """As `Batch.receive`."""
        family = socket.AF_INET6 if self._way is Way.INBOUND else self._family
        self._begin()
        self._taken = 0
        for i in range(self.size):
            at = i * self._stride
            # One octet more than fits: a datagram that fills it was too large.
            room = self._frames[
                at + self._receive_at : at + self.octets_max + frame.HEADER_OCTETS + 1
            ]
            try:
                length, address = self.source.recvfrom_into(room)
            except OSError:
                return i
            peer = frame.name(address[0].partition("%")[0], address[1], family, *address[3:])
            if self._way is Way.INBOUND:
                self._frames[at + _NAME_AT : at + frame.HEADER_OCTETS] = peer
            else:
                self._names[i * self._name : (i + 1) * self._name] = peer
            self._lengths[i] = length
            self._taken += 1
        return self.size

    def _send_first(self, n: int) -> int:
        return 0

    def _send_run(self, start: int, end: int) -> list[int]:
        return [i for i in range(start, end) if not self._send_one(i)]

    def _send_one(self, i: int, in_fragments: bool = False) -> bool:
        at = i * self._stride
        if self._way is Way.OUTBOUND:
            peer = bytes(self._frames[at + _NAME_AT : at + frame.HEADER_OCTETS])
        else:
            peer = bytes(self._hops[i * self._name : (i + 1) * self._name])
        host, port = frame.endpoint(peer)
        if self.target.family == socket.AF_INET6 and ":" not in host:
            host = f"::ffff:{host}"
        start = at + self._send_at
        for _ in range(2):
            try:
                frame_ = self._frames[start : start + self._to_send[i]]
                self._sent[i] = self.target.sendto(frame_, (host, port))
            except BlockingIOError:
                _wait_until_writable(self.target)
            except OSError as error:
                too_long = error.errno == errno.EMSGSIZE and not in_fragments
                return too_long and self._send_in_fragments(i)
            else:
                return True
        return False

    def _send_alone(self, i: int) -> bool:
        return self._send_one(i, True)


def _with_lengths(table: memoryview, length: int) -> memoryview:
    """A copy of an array of struct mmsghdr in which every `msg_len` is `length`."""
    copy = memoryview(bytearray(table))
    for at in range(_MSGHDR.size, len(copy), _MMSGHDR_OCTETS):
        copy[at : at + _WORD_OCTETS] = length.to_bytes(_WORD_OCTETS, "little")
    return copy.toreadonly()


def _with_holes(octets: bytes, holes: Iterable[int]) -> bytes:
    lengths = memoryview(bytearray(octets)).cast("I")
    for hole in holes:
        lengths[hole] = frame.HEADER_OCTETS
    return lengths.tobytes()


def octets(size: int, octets_max: int, family: int, way: Way) -> int:
    """Memory that a batch takes: frames, names, tables, and its number in a line of its own."""
    names = 2 if way is Way.TRANSIT else 1
    names_end = _aligned(size * (_stride(octets_max) + names * frame.name_octets(family)))
    tables_end = _aligned(names_end + 2 * size * (_MMSGHDR_OCTETS + _IOVEC.size))
    return tables_end + CACHE_LINE_OCTETS


def _stride(octets_max: int) -> int:
    """From frame to frame: an odd number of cache lines, so that the first lines of all frames,
    which every step reads, do not compete for the same few sets of the first-level cache."""
    lines = _aligned(frame.HEADER_OCTETS + octets_max + 1) // CACHE_LINE_OCTETS
    return (lines | 1) * CACHE_LINE_OCTETS


def _aligned(length: int) -> int:
    return -(-length // CACHE_LINE_OCTETS) * CACHE_LINE_OCTETS


def _wait_until_writable(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    poll.poll(SEND_WAIT_MS)


def best() -> type[Batch]:
    """`Batch` where the system has recvmmsg and its structures are as above, else its twin."""
    return Batch if _HAS_MMSG else PortableBatch


def pointer(address: int) -> ctypes.c_void_p:
    """An address of memory as the two calls below take it: of an array of struct mmsghdr. Whoever
    made the memory keeps it."""
    return ctypes.c_void_p(address)


def receive_many(fd: int, table: ctypes.c_void_p, n: int) -> int:
    """Take what waits, up to n datagrams, into that many struct mmsghdr; 0 if there is none.

    Never blocks. Raises OSError where the system has no recvmmsg(2).
    """
    if not _HAS_MMSG:
        raise OSError(errno.ENOSYS, "this system has no recvmmsg")
    taken: int = _recvmmsg(fd, table, n, _DONT_WAIT, None)
    return max(taken, 0)


def send_many(fd: int, table: ctypes.c_void_p, n: int) -> int:
    """Send up to n datagrams, at least one, and wait while the buffer is full; returns how many.

    Raises OSError for the first one if the kernel refuses it, or without sendmmsg(2).
    """
    if not _HAS_MMSG:
        raise OSError(errno.ENOSYS, "this system has no sendmmsg")
    sent: int = _sendmmsg(fd, table, n, 0)
    if sent < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sent


_DONT_WAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
_FLAGS = _DONT_WAIT | int(getattr(socket, "MSG_TRUNC", 0))
# PyDLL keeps the interpreter lock: there is no thread to give it to, and handing it over and back
# costs as much as the call.
_libc = ctypes.PyDLL(None, use_errno=True)
_HAS_MMSG = hasattr(_libc, "recvmmsg") and struct.calcsize("P") == 8
if _HAS_MMSG:
    # Without argtypes, and with pointers that are c_void_p already: converting the arguments
    # would cost 0.3 us a call, which is felt where batches are short.
    _recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg
