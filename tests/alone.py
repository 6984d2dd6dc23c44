"""A child process of a test, in a network namespace of its own where it may make one."""

import ctypes
import os
import sys
import traceback

CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000


def unshare():
    """Into a network namespace of this process's own; OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Who has no right to it has one in a user namespace of its own, and there may go on.
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWNET | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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


def may_unshare():
    if sys.platform != "linux":
        return "needs Linux"
    try:
        joined(*child(unshare))
    except AssertionError as error:
        return f"may not make a network namespace: {str(error).splitlines()[-2:]}"
    return ""


REASON = may_unshare()
"""Why there can be none; empty where it can."""
