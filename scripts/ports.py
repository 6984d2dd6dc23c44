"""Ports for what is started on this machine a moment later, by somebody who needs to be told.

A port that is free now can be taken until it is needed, above all by the kernel, which gives ports
out of a range of its own to each socket that asks for none. So these lie below that range, at
random, where nobody meets them but who chooses the same: another tool of this kind, seldom.

ip(7): ip_local_port_range
"""

import contextlib
import random
import socket
from pathlib import Path

LOW = 10_000
"""Below that are services that people know by their port."""

TRIES = 200

_chance = random.SystemRandom()  # tools that run side by side draw differently


def free(count: int, *kinds: socket.SocketKind, host: str = "127.0.0.1") -> list[int]:
    """So many ports in a row that nobody holds right now at `host`; of those kinds of socket, by
    default of UDP and TCP both. Raises OSError if there are none."""
    for _ in range(TRIES):
        first = _chance.randrange(LOW, _high() - count)
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    for kind in kinds or (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                        held.enter_context(socket.socket(type=kind)).bind((host, port))
            except OSError:
                continue
            return [*range(first, first + count)]
    raise OSError("no free ports")


def _high() -> int:
    """Where the kernel's own range begins, if that leaves room."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    except OSError:
        return 32_768
    low = int(text.split()[0])
    return low if low > LOW + 5_000 else 65_536
