"""What the service manager is told and what it hands over; the real one is in test_systemd."""

import os
import socket
import subprocess
import sys

import pytest

import manager


@pytest.fixture
def heard(tmp_path, monkeypatch):
    """What a manager hears: a function that returns the next message and its descriptors."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield lambda: socket.recv_fds(sock, 4096, 16)[:2]


def test_without_a_manager_nothing_happens(monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert not manager.notify("READY=1")
    assert not manager.keep("relay", 0)
    manager.drop("relay")
    assert manager.watchdog_s() is None
    assert manager.handed() == []


def test_a_notify_socket_that_is_gone_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    assert not manager.notify("READY=1")


def test_a_message_arrives_as_it_is(heard):
    assert manager.notify("READY=1\nSTATUS=serving")
    assert heard() == (b"READY=1\nSTATUS=serving", [])


def test_a_socket_without_a_path(monkeypatch):
    name = f"earshot-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert manager.notify("WATCHDOG=1")
        assert sock.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_does_not_read_is_not_waited_for(heard, monkeypatch):
    """Its queue is full at some time: net.unix.max_dgram_qlen, unix(7)."""
    monkeypatch.setattr(manager, "NOTIFY_S_MAX", 0.05)
    told = 0
    while manager.notify("WATCHDOG=1"):
        told += 1
        assert told < 100_000
    assert told and heard() == (b"WATCHDOG=1", [])
    assert manager.notify("WATCHDOG=1"), "there is room again"


def test_what_is_kept_comes_with_its_name(heard):
    reader, writer = os.pipe()
    assert manager.keep("memory-0", writer)
    message, (fd,) = heard()
    # Without FDPOLL=0 systemd would drop a socket that has an error to report.
    assert message.splitlines() == [b"FDSTORE=1", b"FDNAME=memory-0", b"FDPOLL=0"]
    os.write(fd, b"the same")
    assert os.read(reader, 100) == b"the same"
    manager.drop("memory-0")
    assert heard() == (b"FDSTOREREMOVE=1\nFDNAME=memory-0", [])
    for each in (reader, writer, fd):
        os.close(each)


@pytest.mark.parametrize(
    ("usec", "pid", "period_s"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("soon", None, None),
        ("-5", None, None),
    ],
)
def test_the_watchdog_may_be_another_process_s(monkeypatch, usec, pid, period_s):
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert manager.watchdog_s() == period_s


HANDED = """
import os, subprocess, sys
import manager
if sys.argv[1] == "ours":
    os.environ["LISTEN_PID"] = str(os.getpid())
print(manager.handed(), manager.handed(), [key for key in os.environ if key.startswith("LISTEN")])
print([os.get_inheritable(number) for number in (3, 4)])
"""


@pytest.mark.parametrize(
    ("pid", "names", "found"),
    [
        ("ours", "public-0:relay", [("public-0", 3), ("relay", 4)]),
        ("ours", "public-0", [("public-0", 3), ("unknown", 4)]),
        ("ours", "", [("unknown", 3), ("unknown", 4)]),
        ("ours", "a:b:c", [("a", 3), ("b", 4)]),
        ("1", "public-0:relay", []),
        ("nobody's", "public-0:relay", []),
    ],
)
def test_descriptors_are_taken_once_and_not_inherited(pid, names, found):
    """In a process of its own, since they have fixed numbers."""
    done = subprocess.run(
        # The shell puts something where they are looked for.
        ["sh", "-c", 'exec "$@" 3<&0 4<&0', "sh", sys.executable, "-c", HANDED, pid],
        env=os.environ | {"LISTEN_PID": pid, "LISTEN_FDS": "2", "LISTEN_FDNAMES": names},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    taken, inherited = done.stdout.splitlines() or [done.stderr, ""]
    assert taken == f"{found} [] []"
    assert inherited == str([not found] * 2)
