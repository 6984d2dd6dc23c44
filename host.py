"""What this machine offers: CPUs to pin to, memory to share, and virtual addresses.

What it owns: the questions to the operating system that are about the host and not about a socket.
Each has an answer, a poorer one, on systems that are not Linux. It decides nothing.

sched_setaffinity(2), memfd_create(2) https://man7.org/linux/man-pages/
"""

import contextlib
import errno
import fcntl
import ipaddress
import json
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil


def cpus() -> list[int]:
    """The CPUs this process may use, ascending; never empty."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return sorted(process.cpu_affinity() or [0])
    return list(range(psutil.cpu_count() or 1))


def pin(cpu: int) -> bool:
    """Keep this process on one CPU; False where the system cannot or does not allow it."""
    try:
        # Not psutil's way, which reads half a dozen files of /proc first: a worker that takes over
        # is waited for.
        os.sched_setaffinity(0, [cpu])
    except (AttributeError, OSError, ValueError):
        return False
    return True


class Memory:
    """A block of memory with named sections, each on pages of its own."""

    __slots__ = ("_whole", "layout", "parameters", "sections")

    sections: dict[str, tuple[int, int]]
    """Offset and octets by name."""
    layout: int
    """Version of what stands in the sections; its owner says what it means."""
    parameters: dict[str, int]
    """What its owner made it for: another reason than the layout why it may not fit."""

    def __init__(
        self,
        whole: memoryview,
        sections: Mapping[str, Sequence[int]],
        layout: int = 0,
        parameters: Mapping[str, int] | None = None,
    ) -> None:
        """`sections` are offset and octets by name. Raises ValueError if they lie outside."""
        self._whole, self.layout, self.parameters = whole, layout, dict(parameters or {})
        self.sections = {name: (at, octets) for name, (at, octets) in sections.items()}
        if not all(0 <= at <= at + octets <= len(whole) for at, octets in self.sections.values()):
            raise ValueError("its sections lie outside of it")

    @classmethod
    def over(cls, fd: int, sections: Mapping[str, Sequence[int]], layout: int) -> "Memory":
        """All that is behind a descriptor, to read. Raises ValueError with the reason."""
        try:
            whole = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"it cannot be mapped: {error}") from error
        return Memory(memoryview(whole), sections, layout)

    def section(self, name: str) -> memoryview:
        """A view of one section; KeyError if there is none of that name."""
        at, octets = self.sections[name]
        return self._whole[at : at + octets]


class SharedMemory(Memory):
    """Memory that processes share by fork or by its descriptor, and that describes itself.

    It lives as long as a descriptor or a mapping of it does. Processes forked after it was made
    have it at the same address, so pointers into it hold for all of them. Its first page says what
    the rest is, so that a descriptor is all that another process needs:

        MEMORY_MAGIC | octets of text, 32 bits | JSON: layout, sections, parameters
    """

    __slots__ = ("fd",)

    fd: int
    """Its descriptor, not inherited by exec."""

    def __init__(
        self,
        name: str,
        sizes: Mapping[str, int],
        layout: int = 0,
        parameters: Mapping[str, int] | None = None,
    ) -> None:
        """Zeroed memory. `name` shows in /proc; `sizes` are octets a section. Raises OSError if
        none is left."""
        sections, end = {}, mmap.PAGESIZE
        for section, octets in sizes.items():
            sections[section] = end, octets
            end += -(-octets // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create(name)
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, end)
        super().__init__(memoryview(mmap.mmap(self.fd, end)), sections, layout, parameters)
        described = {"layout": layout, "sections": sections, "parameters": self.parameters}
        text = json.dumps(described).encode()
        _MEMORY_HEADER.pack_into(self._whole, 0, MEMORY_MAGIC, len(text))
        self._whole[_MEMORY_HEADER.size : _MEMORY_HEADER.size + len(text)] = text

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """The memory behind a descriptor, which is its own from now on, with all that is in it.

        Raises ValueError with the reason if it is none; the descriptor stays the caller's then.
        """
        found = cls.__new__(cls)
        found.fd = fd
        try:
            whole = memoryview(mmap.mmap(fd, 0))
        except (OSError, ValueError) as error:
            raise ValueError(f"it cannot be mapped: {error}") from error
        Memory.__init__(found, whole, *described(whole))
        return found

    def claim(self) -> None:
        """Wait until no other process claims this memory, and claim it until the end of this one.

        A process that works in a memory has to be the only one, also where those who start such
        processes know nothing of one another. The system gives it back, whatever kills its owner:
        flock(2), on a file description of this process's own.
        """
        if os.path.exists(f"/proc/self/fd/{self.fd}"):
            fcntl.flock(os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR), fcntl.LOCK_EX)


MEMORY_MAGIC = b"earshot\n"
_MEMORY_HEADER = struct.Struct("=8sI")


def described(whole: memoryview) -> tuple[dict[str, tuple[int, int]], int, dict[str, int]]:
    """Sections, layout and parameters, as the first page of a `SharedMemory` has them.

    Raises ValueError with the reason if it is none.
    """
    if len(whole) < mmap.PAGESIZE or bytes(whole[: len(MEMORY_MAGIC)]) != MEMORY_MAGIC:
        raise ValueError("it does not describe itself")
    _, octets = _MEMORY_HEADER.unpack_from(whole)
    end = min(_MEMORY_HEADER.size + octets, mmap.PAGESIZE)
    try:
        record = json.loads(bytes(whole[_MEMORY_HEADER.size : end]))
        sections = {name: (int(at), int(size)) for name, (at, size) in record["sections"].items()}
        parameters = {name: int(value) for name, value in record["parameters"].items()}
        return sections, int(record["layout"]), parameters
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its description is broken: {error}") from error


def publish(path: Path, layout: int, memories: Sequence[SharedMemory]) -> None:
    """Write down how `attach` finds this process's memories. Raises OSError."""
    record = {
        "layout": layout,
        "pid": os.getpid(),
        "memories": [[memory.fd, memory.sections] for memory in memories],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record))
    fresh.replace(path)  # whoever reads it reads all of it


def unpublish(path: Path) -> None:
    """Take back what this process published, but not what its successor has put there since."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(path.read_text())["pid"] == os.getpid():
            path.unlink()


def attach(path: Path, layout: int, name: str) -> list[Memory]:
    """The memories, called `name`, that a running process published at `path`, read-only.

    Raises OSError if it is not running, or is another user's; ValueError if its layout is another.
    """
    record = json.loads(path.read_text())
    if record["layout"] != layout:
        raise ValueError(f"its memory has layout {record['layout']}, not {layout}")
    found = []
    for fd, sections in record["memories"]:
        opened = os.open(f"/proc/{record['pid']}/fd/{fd}", os.O_RDONLY)
        try:
            # The number of a process that has gone may be another's by now.
            if f"memfd:{name} " not in os.readlink(f"/proc/self/fd/{opened}") + " ":
                raise FileNotFoundError(f"process {record['pid']} is another program")
            found.append(Memory.over(opened, sections, layout))
        finally:
            os.close(opened)
    return found


def cpu_seconds(pid: int) -> float | None:
    """The processor time that a process has used, user and system; None if there is none."""
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(used.user + used.system)


# --- virtual addresses ---------------------------------------------------------------------------
#
# An address that this host has only while it can serve it: a routing daemon beside it announces
# what it finds on an interface. Two things are set for each:
#
#     the address on the interface    comes and goes: what the network hears of
#     a local route for it            comes first and stays when the address goes: datagrams still
#                                     on their way here are delivered, and answered from it
#
# Measured (Linux 6.18): without address and route a bound socket receives nothing more; with the
# route alone it receives and sends as before, IPv4 and IPv6.

ADDRESS_MARK = 234
"""The protocol number that address and route carry (rt_protos: free): what has another one is
somebody else's, and stays. The kernel keeps it, so it outlives every process here."""

_LOOPBACK_INDEX, _TABLE_LOCAL = 1, 255  # the same in every network namespace; rtnetlink(7)
_SCOPE_UNIVERSE, _SCOPE_HOST = 0, 254
_IFA_F_NODAD = 2

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


async def announce_addresses(addresses: Iterable[IPAddress], interface: str) -> list[IPAddress]:
    """Let this host have `addresses` on `interface`; returns those it did not have before.

    One that is there already stays as it is, and whose it is. Raises OSError, also on kernels that
    do not mark addresses (before Linux 5.18): nobody could tell afterwards whose it is.
    """
    async with _routes() as routes:
        index, there = await _interface(routes, interface)
        missing = [address for address in addresses if address not in there]
        for address in missing:
            await _agreed(routes.route("add", **_local_route(address)), errno.EEXIST)
            await routes.addr(
                "add",
                index=index,
                address=str(address),
                prefixlen=address.max_prefixlen,
                proto=ADDRESS_MARK,
                # Deprecated from the start (RFC 4862 section 5.5.4): it receives and answers, and
                # is not chosen as the source of this host's own connections. IPv4 does not choose.
                **({} if address.version == 4 else {"flags": _IFA_F_NODAD, "preferred_lft": 0}),
            )
        _, there = await _interface(routes, interface)
        unmarked = [address for address in missing if there.get(address) != ADDRESS_MARK]
        for address in unmarked:
            await _remove(routes, index, address)
        if unmarked:
            raise OSError(errno.EOPNOTSUPP, "this kernel does not mark addresses (Linux 5.18 does)")
    return missing


async def withdraw_addresses(addresses: Iterable[IPAddress], interface: str) -> list[IPAddress]:
    """Take those of `addresses` that `announce_addresses` added from `interface`; returns them.

    Their local routes stay: sockets go on serving what still arrives. Raises OSError.
    """
    async with _routes() as routes:
        index, there = await _interface(routes, interface)
        ours = [address for address in addresses if there.get(address) == ADDRESS_MARK]
        for address in ours:
            await _remove(routes, index, address)
    return ours


async def release_addresses(addresses: Iterable[IPAddress], interface: str) -> None:
    """As `withdraw_addresses`, and their local routes go too: nobody serves them here any more."""
    await withdraw_addresses(addresses, interface)
    async with _routes() as routes:
        for address in addresses:
            await _agreed(routes.route("del", **_local_route(address)), errno.ESRCH)


@contextlib.asynccontextmanager
async def _routes() -> AsyncIterator[Any]:
    """A conversation with the kernel about addresses and routes; its refusals are OSErrors."""
    # Here, since it takes 15 MiB and a tenth of a second that only one process of a relay with
    # virtual addresses has a use for.
    import pyroute2  # noqa: PLC0415

    try:
        async with pyroute2.AsyncIPRoute() as routes:
            yield routes
    except pyroute2.NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


async def _interface(routes: Any, name: str) -> tuple[int, dict[IPAddress, int]]:
    """Index of an interface, and its addresses with the protocol number of each."""
    found = await routes.link_lookup(ifname=name)
    if not found:
        raise OSError(errno.ENODEV, f"there is no interface {name}")
    there = {}
    async for entry in await routes.addr("dump", index=found[0]):
        there[ipaddress.ip_address(entry.get("local") or entry.get("address"))] = (
            entry.get("proto") or 0
        )
    return found[0], there


async def _remove(routes: Any, index: int, address: IPAddress) -> None:
    going = routes.addr("del", index=index, address=str(address), prefixlen=address.max_prefixlen)
    await _agreed(going, errno.EADDRNOTAVAIL)


def _local_route(address: IPAddress) -> dict[str, Any]:
    four = address.version == 4
    return {
        "dst": f"{address}/{address.max_prefixlen}",
        "family": socket.AF_INET if four else socket.AF_INET6,
        "oif": _LOOPBACK_INDEX,
        "table": _TABLE_LOCAL,
        "type": "local",
        "proto": ADDRESS_MARK,
        "scope": _SCOPE_HOST if four else _SCOPE_UNIVERSE,
    }


async def _agreed(request: Awaitable[object], already: int) -> None:
    """Make a request; that what it asks for is so `already` is no error."""
    import pyroute2  # noqa: PLC0415

    try:
        await request
    except pyroute2.NetlinkError as error:
        if error.code != already:
            raise
