"""What this machine offers: CPUs to pin to, and memory to share.

What it owns: the questions to the operating system that are about the host and not about a socket.
Each has an answer, a poorer one, on systems that are not Linux. It decides nothing.

sched_setaffinity(2), memfd_create(2) https://man7.org/linux/man-pages/
"""

import json
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def cpus() -> list[int]:
    """The CPUs this process may use, ascending; never empty."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return sorted(process.cpu_affinity() or [0])
    return list(range(psutil.cpu_count() or 1))


def pin(cpu: int) -> bool:
    """Keep this process on one CPU; False where the system cannot or does not allow it."""
    process = psutil.Process()
    try:
        process.cpu_affinity([cpu])
    except (AttributeError, OSError, ValueError):
        return False
    return True


class Memory:
    """A block of memory with named sections, each on pages of its own."""

    __slots__ = ("_sections", "_whole")

    def __init__(self, whole: memoryview, sections: Mapping[str, tuple[int, int]]) -> None:
        """`sections` are offset and octets by name."""
        self._whole, self._sections = whole, dict(sections)

    def section(self, name: str) -> memoryview:
        """A view of one section; KeyError if there is none of that name."""
        at, octets = self._sections[name]
        return self._whole[at : at + octets]


class SharedMemory(Memory):
    """Zeroed memory that forked processes share, and that others may read through its descriptor.

    It lives as long as a descriptor or a mapping of it does. Processes forked after it was made
    have it at the same address, so pointers into it hold for all of them.
    """

    __slots__ = ("fd", "sections")

    fd: int
    """Its descriptor, not inherited by exec."""
    sections: dict[str, tuple[int, int]]
    """Offset and octets by name."""

    def __init__(self, name: str, sizes: Mapping[str, int]) -> None:
        """`name` shows in /proc; `sizes` are octets a section. Raises OSError if none is left."""
        self.sections, end = {}, 0
        for section, octets in sizes.items():
            self.sections[section] = end, octets
            end += -(-octets // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create(name)
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, end)
        super().__init__(memoryview(mmap.mmap(self.fd, end)), self.sections)


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
            whole = memoryview(mmap.mmap(opened, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(opened)
        found.append(Memory(whole, sections))
    return found
