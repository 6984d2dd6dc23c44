"""The service manager: what it is told, what it keeps for the next process, what it hands over.

What it owns: the words spoken with systemd, or with whoever speaks as it does: notifications, the
watchdog's period, descriptors that are put into its store, and those that come back from it or
from a socket unit. Without a manager all of it is nothing, and nothing happens.

Rules that stay true:
- Nobody waits for a manager for longer than `NOTIFY_S_MAX`.
- A descriptor is taken from the environment once; what is started next does not see it.

sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3), sd_watchdog_enabled(3)
"""

import os
import socket
from collections.abc import Sequence

NOTIFY_S_MAX = 1.0
"""How long a manager may keep us waiting. It reads at once; one that hangs must not hang us."""

LISTEN_FDS_START = 3
"""Descriptors that are passed on begin here. sd_listen_fds(3)"""


def notify(state: str, descriptors: Sequence[int] = ()) -> bool:
    """Tell the manager, and give it descriptors; False if there is none, or it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(NOTIFY_S_MAX)
        try:
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], descriptors)
        except OSError:
            return False
    return True


def watchdog_s() -> float | None:
    """The period in which the manager wants a sign of life; None if it wants none from us."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not (period_us.isdigit() and int(period_us) and meant == str(os.getpid())):
        return None
    return int(period_us) * 1e-6


def keep(name: str, descriptor: int) -> bool:
    """Put a descriptor into the manager's store, for the next start of this service.

    It is not dropped when the manager sees an event on it: a socket that nobody reads has many.
    One that is there already is not stored twice. `name` has no colon.
    """
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])


def drop(name: str) -> None:
    """Have all stored descriptors of that name closed."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def handed() -> list[tuple[str, int]]:
    """Names and descriptors that this process was started with, stored ones and socket units'.

    They are not inherited by what is started from here. A second call finds none.
    """
    meant, count, names = (
        os.environ.pop(f"LISTEN_{what}", "") for what in ("PID", "FDS", "FDNAMES")
    )
    if meant != str(os.getpid()) or not count.isdigit():
        return []
    numbers = range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))
    for number in numbers:
        os.set_inheritable(number, False)
    listed = names.split(":") if names else []
    listed += ["unknown"] * (len(numbers) - len(listed))  # as sd_listen_fds_with_names(3) says it
    return list(zip(listed, numbers, strict=False))
