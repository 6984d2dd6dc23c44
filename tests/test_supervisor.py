"""The supervisor with real processes and real signals. Nothing here waits but for a line."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

import supervisor

PATIENCE_S = 20
"""How long a line may take before the test has failed; it takes milliseconds."""

PROGRAM = """
import logging, os, select, sys
import supervisor

def say(line):
    os.write(1, f"{line}\\n".encode())  # in one piece, beside the other processes' lines

def work(number, link):
    say(f"work {number} {os.getpid()}")
    BODY
    link.send(supervisor.READY)
    select.select([link], [], [])
    say(f"stop {number}")
    return 0

logging.basicConfig(stream=sys.stdout, format="log %(message)s", level=logging.INFO)
log = logging.getLogger("test")
code = supervisor.Supervisor(CPUS, work, log, lambda: say("ready")).run()
say(f"end {code}")
raise SystemExit(code)
"""


class Program:
    """A supervised program, and the lines it prints."""

    def __init__(self, body="pass", cpus="[None, None]", **environment):
        text = textwrap.dedent(PROGRAM).replace("BODY", body).replace("CPUS", cpus)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,
        )
        self._buffer = b""
        self.lines = []

    def line(self, start):
        """The next line that begins with `start`."""
        while True:
            head, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                self.lines.append(head.decode())
                if self.lines[-1].startswith(start):
                    return self.lines[-1]
                continue
            readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
            more = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            assert more, f"no line {start!r} after {self.lines}"
            self._buffer += more

    def kill(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        code = self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        return code


@pytest.fixture
def programs():
    with contextlib.ExitStack() as stack:

        def start(*args, **kwargs):
            program = Program(*args, **kwargs)

            def stop():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.process.pid, signal.SIGKILL)
                program.process.wait()
                program.process.stdout.close()

            stack.callback(stop)
            return program

        yield start


def test_all_are_ready_then_all_stop(programs):
    program = programs()
    program.line("ready")
    program.kill(signal.SIGTERM)
    program.line("log stopping on SIGTERM")
    assert program.line("end") == "end 0"
    assert program.end() == supervisor.Exit.STOPPED
    assert {line for line in program.lines if line.startswith("stop")} == {"stop 0", "stop 1"}


def test_a_signal_to_the_group_stops_in_order(programs):
    program = programs()
    program.line("ready")
    os.killpg(program.process.pid, signal.SIGINT)
    program.line("end")
    assert program.end() == 0
    assert sum(line.startswith("stop") for line in program.lines) == 2
    assert not any("died" in line for line in program.lines)


def test_a_killed_worker_is_replaced(programs):
    program = programs(cpus="[None]")
    for turn in range(3):
        pid = int(program.line("work 0").split()[2])
        program.line("ready" if turn == 0 else "log worker 0 serves again after")
        os.kill(pid, signal.SIGKILL)
        program.line(f"log worker 0 (pid {pid}) died")
    program.line("log worker 0 serves again after")
    program.kill(signal.SIGTERM)
    program.line("end 0")


def test_others_go_on_while_one_is_replaced(programs):
    program = programs()
    pids = dict(program.line("work").split()[1:] for _ in range(2))
    program.line("ready")
    os.kill(int(pids["1"]), signal.SIGKILL)
    program.line("log worker 1 serves again")
    os.kill(int(pids["0"]), 0)  # still the same process
    program.kill(signal.SIGTERM)
    program.line("end 0")


def test_a_worker_that_cannot_start_ends_it(programs):
    program = programs("raise SystemError('broken')", "[None]")
    assert "could not start 3 times" in program.line("log worker 0 could not")
    assert program.line("end") == f"end {int(supervisor.Exit.WORKER)}"
    assert program.end() == supervisor.Exit.WORKER
    assert sum(line.startswith("work 0") for line in program.lines) == 3


def test_a_second_sigterm_kills_what_hangs(programs):
    program = programs("link.send(supervisor.READY); import time; time.sleep(3600)", "[None]")
    program.line("ready")
    program.kill(signal.SIGTERM)
    program.line("log stopping")
    program.kill(signal.SIGTERM)
    program.line("log worker 0 does not stop")
    assert program.line("end") == "end 0"


def test_workers_stop_when_the_supervisor_dies(programs):
    program = programs()
    program.line("ready")
    program.kill(signal.SIGKILL)
    assert {program.line("stop") for _ in range(2)} == {"stop 0", "stop 1"}


def test_workers_are_pinned(programs):
    program = programs("say(f'cpus {os.sched_getaffinity(0)}')", f"[{min_cpu()}]")
    assert program.line("cpus") == f"cpus {{{min_cpu()}}}"
    program.kill(signal.SIGTERM)
    program.line("end 0")


def min_cpu():
    return min(os.sched_getaffinity(0))


def test_no_descriptor_is_lost_over_restarts(programs):
    program = programs(cpus="[None]")
    counts = []
    for _ in range(4):
        pid = int(program.line("work 0").split()[2])
        program.line("ready" if not counts else "log worker 0 serves")
        counts.append(len(os.listdir(f"/proc/{program.process.pid}/fd")))
        os.kill(pid, signal.SIGKILL)
    assert len(set(counts)) == 1
    program.kill(signal.SIGTERM)
    program.line("end 0")


@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_is_announced(programs, tmp_path, abstract):
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name if abstract else name)
        sock.settimeout(PATIENCE_S)
        program = programs(NOTIFY_SOCKET="@" + name if abstract else name)
        assert sock.recv(100).startswith(b"READY=1\n")
        program.kill(signal.SIGTERM)
        assert sock.recv(100).startswith(b"STOPPING=1\n")
        program.line("end 0")
