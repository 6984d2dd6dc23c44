"""The legacy: descriptors that a relay before this one left, taken where they fit.

What it owns: judging what came from outside (systemd's store, a socket unit, another relay that
hands over), and reading the flows out of memories that this version does not work in.

    name            what it is
    public-N        worker N's socket towards clients
    internal-N      worker N's socket towards transceivers
    memory-N        worker N's memory, which describes itself (host.py)
    transit-N, inner-N, face-N      the same three of worker N's transit face
    relay           the memory of supervisor and keeper
    anything else   a socket of a socket unit: what it is bound to says what it is for

Rules that stay true:
- What does not fit is closed, and taken out of the manager's store, with the reason in the log:
  its owner opens a new one. Nothing that is found here can keep a relay from starting.
- A memory fits if it has the very layout, sections and parameters that a new one would have. Of
  another one with a known layout the flows are read (`READERS`), and of an unknown one nothing: its
  clients are found again by their next STUN, or in Redis.
- `READERS` knows every layout that a relay in service may have, each by octets of its own: a
  change of flows.py must not change how the past is read.
"""

import contextlib
import ipaddress
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

import flows
import host
import manager

_log = logging.getLogger("legacy")

_LAYOUT_UNDESCRIBED = 1

_OURS = re.compile(r"(public|internal|memory|transit|inner|face)-\d+|relay")
_MEMORY_NUMBER = re.compile(r"memory-(\d+)")


class Estate:
    """What was left, by name, until somebody takes it."""

    def __init__(
        self,
        named: Iterable[tuple[str, int]] = (),
        stored: bool = False,
        live: bool = False,
        sections: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Own descriptors with their names. `stored`: a manager has them too, until it is told.

        `live`: whoever left them is still at work.
        `sections`: those of memories of layout 1, which do not describe themselves.
        """
        self.live = live
        self._left = list(named)
        self._stored, self._sections = stored, sections
        self._taken = set[tuple[int, int]]()
        self._memories: dict[str, host.Memory] = {}

    @classmethod
    def of_manager(cls) -> "Estate":
        """What the service manager has handed to this process; nothing if there is none."""
        return cls(manager.handed(), stored=True)

    def take_socket(self, name: str, family: int, at: str, port: int) -> socket.socket | None:
        """The UDP socket of that name, or one of a socket unit, bound to that address.

        `at` is an IPv4 or IPv6 literal, v4-mapped where the family asks for it; port 0 is any. None
        if there is none that fits: the log says why.
        """
        for i, (named, fd) in enumerate(self._left):
            if named != name and _OURS.fullmatch(named):
                continue
            if _identity(fd) in self._taken:
                continue
            objection = _objection(fd, family, at, port)
            if objection is None:
                del self._left[i]
                self._taken.add(_identity(fd))
                return socket.socket(fileno=fd)
            if named == name:
                self._refuse(i, objection)
                return self.take_socket(name, family, at, port)
        return None

    def take_memory(
        self, name: str, layout: int, sizes: Mapping[str, int], parameters: Mapping[str, int]
    ) -> host.SharedMemory | None:
        """The memory of that name if it is as a new one would be; else None: see
        `read_flows`."""
        found = self._find_memory(name)
        if not isinstance(found, host.SharedMemory):
            return None
        wanted = {section: octets for section, (_, octets) in found.sections.items()}
        if found.layout != layout or wanted != sizes or found.parameters != parameters:
            what = "layout" if found.layout != layout else "size or parameters"
            _log.info("%s is of another %s: this one begins with a new one", name, what)
            return None
        del self._memories[name]
        self._left = [(named, fd) for named, fd in self._left if named != name]
        return found

    def _find_memory(self, name: str) -> host.Memory | None:
        if name in self._memories:
            return self._memories[name]
        for i, (named, fd) in enumerate(self._left):
            if named == name:
                try:
                    self._memories[name] = self._open_memory(fd)
                except ValueError as error:
                    self._refuse(i, str(error))
                    return None
                return self._memories[name]
        return None

    def _open_memory(self, fd: int) -> host.Memory:
        try:
            return host.SharedMemory.adopt(fd)
        except ValueError:
            if self._sections is None:
                raise
            return host.Memory.over(fd, self._sections, _LAYOUT_UNDESCRIBED)

    @property
    def memories(self) -> list[int]:
        """Numbers of the workers that left a memory, taken ones not included."""
        names = (_MEMORY_NUMBER.fullmatch(name) for name, _ in self._left)
        return sorted(int(found[1]) for found in names if found)

    def read_flows(self, name: str) -> Iterator[flows.Flow]:
        """Copies of the flows in a memory; none, with a log line, if it cannot be read."""
        found = self._find_memory(name)
        if found is None:
            return
        read = READERS.get(found.layout)
        if read is None:
            _log.warning(
                "%s has layout %d, which this version cannot read: its flows are recovered"
                " as their clients are heard of",
                name,
                found.layout,
            )
            return
        try:
            yield from read(found)
        except (KeyError, ValueError, struct.error) as error:
            _log.warning("%s cannot be read to its end: %s", name, error)

    def _refuse(self, i: int, reason: str) -> None:
        name, fd = self._left.pop(i)
        _log.warning("%s is not taken over: %s", name, reason)
        os.close(fd)
        if self._stored:
            manager.drop(name)

    def close(self) -> None:
        """Let go of all that nobody took."""
        for name, fd in self._left:
            if _identity(fd) not in self._taken and name not in self._memories:
                _log.warning("%s is left over: closed, with what waits in it", name)
            os.close(fd)
            if self._stored and _OURS.fullmatch(name):
                manager.drop(name)
        self._left.clear()
        self._memories.clear()


def _identity(fd: int) -> tuple[int, int]:
    """A socket that came twice, from the store and from its socket unit, is one."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _objection(fd: int, family: int, at: str, port: int) -> str | None:
    """Why a descriptor is not the UDP socket that is wanted; None if it is."""
    with contextlib.ExitStack() as stack:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            return f"it is no socket ({error.strerror})"
        stack.callback(sock.detach)
        if sock.family != family:
            return f"it is {_family(sock.family)}, not {_family(family)}"
        if sock.type != socket.SOCK_DGRAM:
            return "it is no UDP socket"
        if family == socket.AF_INET6 and ipaddress.IPv6Address(at).ipv4_mapped:
            only = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            if only:
                return "it takes IPv6 only (BindIPv6Only=both)"
        bound_at, bound_to = sock.getsockname()[:2]
        if ipaddress.ip_address(bound_at.partition("%")[0]) != ipaddress.ip_address(at):
            return f"it is bound to {bound_at}, not to {at}"
        if port and bound_to != port:
            return f"it is bound to port {bound_to}, not to {port}"
    return None


def _family(number: int) -> str:
    return {int(socket.AF_INET): "IPv4", int(socket.AF_INET6): "IPv6"}.get(number, "of no IP")


# --- memories of the past -------------------------------------------------------------------------

_FIRST_SLOT = struct.Struct("<BB6x32s32s24sdd")
_FIRST_SLOT_OCTETS = 128


def _read_first(memory: host.Memory) -> Iterator[flows.Flow]:
    """Layout 1: slots of 128 octets; state, octets of the hop, header, hop, ufrag, two times."""
    slots = memory.section("flows")
    for at in range(0, len(slots) - _FIRST_SLOT_OCTETS + 1, _FIRST_SLOT_OCTETS):
        if slots[at]:
            state, octets, header, hop, ufrag, opened_at, assured_at = _FIRST_SLOT.unpack_from(
                slots, at
            )
            text = ufrag.rstrip(b"\x00")
            yield flows.Flow(flows.State(state), header, hop[:octets], text, opened_at, assured_at)


_SECOND_SLOT = struct.Struct("<B7x32s32p24pdd")
_SECOND_SLOT_OCTETS = 128


def _read_second(memory: host.Memory) -> Iterator[flows.Flow]:
    """Layout 2: state, header, hop, ufrag, two times; no SSRC."""
    slots = memory.section("flows")
    for at in range(0, len(slots) - _SECOND_SLOT_OCTETS + 1, _SECOND_SLOT_OCTETS):
        if slots[at]:
            state, *fields = _SECOND_SLOT.unpack_from(slots, at)
            yield flows.Flow(flows.State(state), *fields)


_THIRD_SLOT = struct.Struct("<BBHI32s32p24pdd")
_THIRD_SLOT_OCTETS = 128


def _read_third(memory: host.Memory) -> Iterator[flows.Flow]:
    """Layout 3: state, origin, when the SSRC was noted, SSRC, header, hop, ufrag, two times."""
    slots = memory.section("flows")
    for at in range(0, len(slots) - _THIRD_SLOT_OCTETS + 1, _THIRD_SLOT_OCTETS):
        if slots[at]:
            state, origin, _, ssrc, *fields = _THIRD_SLOT.unpack_from(slots, at)
            flow = flows.Flow(flows.State(state), *fields)
            yield flow._replace(ssrc=ssrc, origin=flows.Origin(origin))


def _read_present(memory: host.Memory) -> Iterator[flows.Flow]:
    return flows.read_all(memory.section("flows"))


READERS: dict[int, Callable[[host.Memory], Iterator[flows.Flow]]] = {
    1: _read_first,
    2: _read_second,
    3: _read_third,
    4: _read_present,
}
"""How the flows of each layout are read. The last one is flows.py's, as it is now."""
