"""A child process of a test, in a network namespace of its own where it may make one."""

import ctypes
import os
import sys
import traceback
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000


def unshare():
    """Into a network namespace of this process's own; OSError where that is not allowed."""
    if not _called("unshare", CLONE_NEWNET):
        return
    # Who has no right to it has one in a user namespace of its own, and there may go on. As its
    # root, since only that keeps its rights in the programs that it starts: user_namespaces(7).
    uid, gid = os.getuid(), os.getgid()
    if refused := _called("unshare", CLONE_NEWNET | CLONE_NEWUSER):
        raise OSError(refused, os.strerror(refused))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter(namespace):
    """Into the network namespace behind a descriptor. Raises OSError."""
    if refused := _called("setns", namespace, CLONE_NEWNET):
        raise OSError(refused, os.strerror(refused))


def _called(name, *words):
    """Make a system call of the C library; returns 0, or the number of its error."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if getattr(libc, name)(*words) else 0


def child(work):
    """Fork a process that does `work` and writes what went wrong; returns its pid and that pipe."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reader)
            work()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def joined(pid, reader):
    with open(reader) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said


def may(work):
    """Why a child cannot do this, in its own words; empty if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    try:
        joined(*child(work))
    except AssertionError as error:
        return f"may not make a network namespace: {str(error).splitlines()[-1]}"
    return ""


REASON = may(unshare)
"""Why there can be none; empty where it can."""
