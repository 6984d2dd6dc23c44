"""The attackers: a process that sends what attacks.py has made, and hears what comes back.

For flood.py attack. They have a process of their own, so that they disturb nobody but the relay,
and send in batches (load.Datagrams). On loopback each datagram comes from the next of many
addresses of 127.0.0.0/8 by IP_PKTINFO, or, in the name of somebody else, with an IP header of its
own out of a raw socket (raw(7), CAP_NET_RAW). Towards another host they have one address, and the
ports of their sockets tell them apart: no source is forged on a network.

Their schedule is the clock's. What was due while they had no CPU is sent late up to `BEHIND_S`, and
beyond that never, so that a stall does not end in a burst that nobody asked for.

The program reads orders, a line of JSON each, and answers with lines of JSON. It ends when its
orders do, also while it sends: it never outlives whoever started it. `Attackers` is the other end.

IPv4 only.

ip(7), raw(7), sendmmsg(2) https://man7.org/linux/man-pages/
"""

import asyncio
import contextlib
import ipaddress
import json
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import load
import numpy as np

import stun

Figures = dict[str, Any]

FIRST = int(ipaddress.IPv4Address("127.32.0.1"))
"""The first attacker's address on loopback, far from those of calls and of load.py's clients."""

SOURCES = 100_000
"""Addresses on loopback, with so many ports each: each datagram of 20 s at 20,000 a second comes
from somebody new."""

PORTS, PORTS_AWAY = 4, 32
"""Sockets of an attack, on loopback and towards another host, where nothing else tells attackers
apart. select(2) has room for a thousand of all attacks."""

TICK_S = 0.001
BEHIND_S = 0.1
"""What is later is not sent any more."""

TELL_S = 0.1
"""Between two lines on how much was sent."""

HEARD_MAX = 4_096
"""Attackers that are told apart by what they were sent: far more than a relay may answer."""

ANSWER_S = 10.0
"""How long the process may take for an order, beyond the time that it is to send."""

_OCTETS = 9_216
_IPV4 = struct.Struct(">BBHHHBBHII")
_UDP = struct.Struct(">HHHH")
_HEADERS = _IPV4.size + _UDP.size
_UDP_PROTOCOL, _TTL = 17, 64


class Band:
    """The attackers of one target."""

    def __init__(self, host: str, port: int) -> None:
        """Nobody attacks yet."""
        self._at = host, port
        self.local = ipaddress.ip_address(host).is_loopback
        self._squads: dict[str, Squad] = {}
        self._socks: list[socket.socket] = []
        self._raw: socket.socket | None = None
        self._octets = np.zeros((0, 0), np.uint8)
        self._lengths = np.zeros(0, np.uint64)
        self._names: Sequence[tuple[str, int]] = ()
        self._due = self._refused = 0
        self._by_sock: list[int] = []

    def load(
        self, name: str, datagrams: Sequence[bytes], live: Sequence[tuple[str, int]] = ()
    ) -> None:
        """Begin an attack with sockets of its own, which are heard until the end. What is sent, in
        turn; in the name of `live` if there are any, in turn, too.

        Raises PermissionError for those without CAP_NET_RAW.
        """
        squad = self._squads.setdefault(name, Squad(self.local))
        self._socks = squad.socks
        if live and self._raw is None:
            self._raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._names = live
        if live:
            # As many as both are, so that every datagram comes from everybody.
            count = max(len(live), len(datagrams) // len(live) * len(live))
            datagrams = [
                _headers(live[i % len(live)], self._at, each) + each
                for i, each in enumerate(datagrams[i % len(datagrams)] for i in range(count))
            ]
        width = max(map(len, datagrams)) or 1
        assert width <= _OCTETS  # attacks.LENGTH_MAX
        self._octets = np.zeros((len(datagrams), width), np.uint8)
        for row, each in zip(self._octets, datagrams, strict=True):
            row[: len(each)] = np.frombuffer(each, np.uint8)
        self._lengths = np.array([len(each) for each in datagrams], np.uint64)
        self._out = np.zeros((load.BATCH, width), np.uint8)
        self._batch, self._from = _batch(self._out, self._at, self.local and not live)
        self._due = 0

    def run(self, rate: float, seconds: float) -> Iterator[Figures]:
        """Send so many a second; yields how much was sent, and at last the whole account."""
        began, used = time.monotonic(), time.process_time()
        end, tell_at, skipped, octets = began + seconds, began + TELL_S, 0, 0
        self._due = self._refused = 0
        self._by_sock = [0] * len(self._socks)
        while (now := time.monotonic()) < end:
            due = int((now - began) * rate) - self._due - skipped
            if due > rate * BEHIND_S + load.BATCH:
                skipped += due - int(rate * BEHIND_S)
                due = int(rate * BEHIND_S)
            while due > 0:
                n = min(due, load.BATCH)
                octets += self._send(n)
                due -= n
            self.listen()
            if now >= tell_at:
                tell_at += TELL_S
                yield {"sent": self._sent}
            time.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        yield {
            "sent": self._sent,
            "octets": octets - (_HEADERS * self._sent if self._names else 0),
            "forged": bool(self._names),
            "octets_of_one": self._octets_of_one(),
            "skipped": skipped,
            "refused": self._refused,
            "seconds": round(time.monotonic() - began, 3),
            "cpu_s": round(time.process_time() - used, 3),
            "done": True,
        }

    @property
    def _sent(self) -> int:
        """What has left of what was due."""
        return self._due - self._refused

    def _send(self, n: int) -> int:
        """Send the next n; the octets that have left, all their headers that are made here, too."""
        numbers = self._due + np.arange(n)
        rows = numbers % len(self._lengths)
        self._out[:n] = self._octets[rows]
        self._batch.to_send[:n] = self._lengths[rows]
        if self._from is not None:
            self._from[:n] = FIRST + numbers % SOURCES
        which = self._due // load.BATCH % len(self._socks)
        sock = self._raw if self._names else self._socks[which]
        assert sock is not None  # load() has opened it
        total = int(self._lengths[rows].sum())
        self._due += n
        try:
            self._batch.send(sock.fileno(), n)
        except OSError:
            # A firewall of this host, or no route. All of the batch counts as refused, though the
            # first of it may have left: no more is said to have been sent than was.
            self._refused += n
            return 0
        self._by_sock[which] += total
        return total

    def _octets_of_one(self) -> int:
        """What the busiest attacker has sent, at the most."""
        if self.local:
            return int(self._lengths.max()) * -(-self._due // SOURCES)
        return max(self._by_sock)

    def listen(self) -> None:
        """Take what has come for attackers."""
        for squad in self._squads.values():
            squad.listen()

    def account(self) -> dict[str, Figures]:
        """What has come for the attackers of each attack so far."""
        self.listen()
        return {name: squad.account() for name, squad in self._squads.items()}

    @property
    def descriptors(self) -> list[int]:
        """Where attackers are answered."""
        return [sock.fileno() for squad in self._squads.values() for sock in squad.socks]

    def close(self) -> None:
        """Give the sockets back."""
        for squad in self._squads.values():
            for sock in squad.socks:
                sock.close()
        if self._raw is not None:
            self._raw.close()


class Squad:
    """The attackers of one attack: their sockets, and what they heard."""

    def __init__(self, local: bool) -> None:
        self.socks = [_socket(local) for _ in range(PORTS if local else PORTS_AWAY)]
        self._octets: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._by_attacker: dict[tuple[str, int], tuple[int, int]] = {}

    def listen(self) -> None:
        """Take what has come."""
        for sock in select.select(self.socks, [], [], 0)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    octets, ancillary, _, _ = sock.recvmsg(2048, 64, socket.MSG_DONTWAIT)
                    # struct in_pktinfo ends with the address that it was sent to.
                    at = ancillary[0][2][8:12] if ancillary else bytes(4)
                    self._count(octets, (socket.inet_ntoa(at), sock.getsockname()[1]))

    def _count(self, octets: bytes, attacker: tuple[str, int]) -> None:
        kind = _kind(octets)
        self._kinds[kind] += 1
        self._octets[kind] += len(octets)
        if attacker in self._by_attacker or len(self._by_attacker) < HEARD_MAX:
            datagrams, total = self._by_attacker.get(attacker, (0, 0))
            self._by_attacker[attacker] = datagrams + 1, total + len(octets)

    def account(self) -> Figures:
        """What it was, and what the one had who got most."""
        most = max(self._by_attacker.values(), default=(0, 0), key=lambda each: each[1])
        return {
            "datagrams": self._kinds.total(),
            "octets": self._octets.total(),
            "kinds": dict(self._kinds),
            "attackers": len(self._by_attacker),
            "to_one": most[0],
            "octets_to_one": most[1],
        }


def _socket(local: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    if local:
        sock.setsockopt(socket.IPPROTO_IP, load._IP_PKTINFO, 1)
    sock.bind(("0.0.0.0", 0))
    return sock


def _batch(
    out: load.Array, at: tuple[str, int], many: bool
) -> tuple[load.Datagrams, load.Array | None]:
    """Room for a batch towards `at`, and the column of its sources if it has `many`."""
    names = np.zeros(load.BATCH, load._NAME)
    names["family"], names["port"] = socket.AF_INET, at[1]
    names["address"] = int(ipaddress.IPv4Address(at[0]))
    if not many:
        return load.Datagrams(out, names), None
    control = np.zeros(load.BATCH, load._PKTINFO)
    control["length"], control["type"] = load._PKTINFO_OCTETS, load._IP_PKTINFO
    return load.Datagrams(out, names, control), control["source"]


def _headers(source: tuple[str, int], target: tuple[str, int], payload: bytes) -> bytes:
    """IP and UDP. The kernel fills in the rest of the first; a checksum of UDP may be left out
    with IPv4 (RFC 768)."""
    length = _UDP.size + len(payload)
    addresses = (int(ipaddress.IPv4Address(each[0])) for each in (source, target))
    ip = _IPV4.pack(0x45, 0, _IPV4.size + length, 0, 0, _TTL, _UDP_PROTOCOL, 0, *addresses)
    return ip + _UDP.pack(source[1], target[1], length, 0)


def _kind(octets: bytes) -> str:
    """What an attacker was sent."""
    if not octets:
        return "empty"
    first = stun.kind(octets[0])
    if first is not stun.Kind.STUN:
        return first.name.lower()
    kinds = {b"\x00\x01": "stun request", b"\x01\x01": "stun success", b"\x01\x11": "stun error"}
    return kinds.get(octets[:2], "stun")


# --- the two ends of the pipe ---------------------------------------------------------------------


def _read(path: Path) -> list[bytes]:
    """Datagrams of a file: a big-endian 16-bit length and so many octets each (firsts.record)."""
    octets, at, found = path.read_bytes(), 0, []
    while at < len(octets):
        length = int.from_bytes(octets[at : at + 2], "big")
        found.append(octets[at + 2 : at + 2 + length])
        at += 2 + length
    return found


def _tell(what: Figures) -> None:
    print(json.dumps(what), flush=True)


def serve(host: str, port: int) -> None:
    """Take orders from standard input until it ends."""
    band = Band(host, port)
    orders = sys.stdin.fileno()
    # Without a buffer, of which select() would know nothing.
    pipe = open(orders, "rb", buffering=0, closefd=False)  # noqa: SIM115  # until the end
    while True:
        if orders not in select.select([orders, *band.descriptors], [], [])[0]:
            band.listen()
            continue
        line = pipe.readline()
        if not line:
            break
        order = json.loads(line)
        if "load" in order:
            live = [(str(name), int(number)) for name, number in order["live"]]
            try:
                band.load(Path(order["load"]).name, _read(Path(order["load"])), live)
            except PermissionError as error:
                _tell({"error": str(error)})
            else:
                _tell({"loaded": len(band._lengths)})
        elif "rate" in order:
            for found in band.run(order["rate"], order["seconds"]):
                if select.select([orders], [], [], 0)[0]:  # nothing is ordered meanwhile: its end
                    return
                _tell(found)
        else:
            _tell(band.account())
    band.close()


class Attackers:
    """The process, held by whoever gives the orders."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.sent = 0
        """Datagrams of the attack that is under way."""

    async def load(
        self, path: Path, datagrams: Sequence[bytes], live: Sequence[tuple[str, int]] = ()
    ) -> None:
        """Begin an attack; `path` is a file for what is sent, its name is the attack's. Raises
        PermissionError."""
        records = (len(each).to_bytes(2, "big") + each for each in datagrams)
        path.write_bytes(b"".join(records))
        told = await self._ask({"load": str(path), "live": list(live)})
        if "error" in told:
            raise PermissionError(told["error"])

    async def run(self, rate: float, seconds: float) -> Figures:
        """Send so many a second, for so long; the account."""
        self.sent = 0
        told = await self._ask({"rate": rate, "seconds": seconds})
        while "done" not in told:
            self.sent = told["sent"]
            told = await self._hear()
        self.sent = told["sent"]
        return {name: value for name, value in told.items() if name != "done"}

    async def account(self) -> dict[str, Figures]:
        """What has come for the attackers of each attack so far."""
        return await self._ask({})

    async def _ask(self, order: Figures) -> Figures:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._hear()

    async def _hear(self) -> Figures:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_S)
        if not line:
            raise OSError("the attackers' process has ended")
        found: Figures = json.loads(line)
        return found


@contextlib.asynccontextmanager
async def attackers(host: str, port: int) -> AsyncIterator[Attackers]:
    """The process, and its end when the block is left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        host,
        str(port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches whoever gives the orders
    )
    try:
        yield Attackers(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), ANSWER_S)
        except TimeoutError:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
