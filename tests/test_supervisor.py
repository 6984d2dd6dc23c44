"""The supervisor with real processes and real signals. Nothing here waits but for a line."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

import supervisor

from . import node

PATIENCE_S = 20
"""How long a line may take before the test has failed; it takes milliseconds."""

PROGRAM = """
import logging, os, select, sys, time
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
def keep(link):
    say(f"keeper {os.getpid()}")
    KEEPER
    link.send(supervisor.READY)
    select.select([link], [], [])
    say("stop keeper")
    return 0

more = dict(MORE)
runs = supervisor.Supervisor(CPUS, work, log, lambda: say("ready"), **more)
BEFORE
code = runs.run()
say(f"end {code}")
raise SystemExit(code)
"""


class Program:
    """A supervised program, and the lines it prints."""

    def __init__(
        self, body="pass", cpus="[None, None]", more="", before="", keeper="pass", **environment
    ):
        text = textwrap.dedent(PROGRAM)
        parts = {"BEFORE": before, "MORE": more, "BODY": body, "CPUS": cpus, "KEEPER": keeper}
        for part, its in parts.items():
            text = text.replace(part, its)
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

    def seen(self, start):
        """The first line that began with `start`, a past or a coming one."""
        past = [line for line in self.lines if line.startswith(start)]
        return past[0] if past else self.line(start)

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
    program = programs("link.send(supervisor.READY); time.sleep(3600)", "[None]")
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


# --- others beside the workers --------------------------------------------------------------------

KEEPER = "others=[supervisor.Role('keeper', keep)]"


def test_a_keeper_is_replaced_for_ever_and_ends_nothing(programs):
    """Nor is it waited for: what it does not do costs no datagram."""
    program = programs("pass", "[None]", KEEPER, keeper="raise SystemError('broken')")
    program.line("ready")
    for _ in range(supervisor.START_FAILURES_MAX + 2):
        program.line("keeper")
    program.kill(signal.SIGTERM)
    assert program.line("end") == "end 0"
    assert program.end() == 0


def test_a_keeper_stops_with_the_workers(programs):
    program = programs("pass", "[None]", KEEPER)
    pid = int(program.line("keeper").split()[1])
    program.seen("ready")
    os.kill(pid, signal.SIGKILL)
    program.line(f"log keeper (pid {pid}) died")
    program.line("log keeper serves again after")
    program.kill(signal.SIGINT)
    program.line("end 0")
    assert "stop 0" in program.lines and "stop keeper" in program.lines


def test_deaths_are_told(programs):
    more = KEEPER + ", on_death=lambda role: say(f'dead {role.name} {role.vital}')"
    program = programs("pass", "[None]", more)
    worker = int(program.line("work 0").split()[2])
    keeper = int(program.seen("keeper").split()[1])
    program.seen("ready")
    os.kill(worker, signal.SIGKILL)
    assert program.line("dead") == "dead worker 0 True"
    os.kill(keeper, signal.SIGKILL)
    assert program.line("dead") == "dead keeper False"
    program.kill(signal.SIGTERM)
    program.line("end 0")
    assert sum(line.startswith("dead") for line in program.lines) == 2


# --- life -----------------------------------------------------------------------------------------


# Times that a test can wait for are set where they are what it is about: anywhere else a machine
# that is slow would be taken for a worker that is not well.
def test_a_worker_that_stands_still_is_killed(programs):
    """One beats, the other stops to: the heartbeat is what counts, not the process."""
    program = programs(
        more="beat=lambda number: 0 if number else time.monotonic_ns()",
        before="supervisor.BEAT_S_MAX, supervisor.BEAT_CHECK_S = 0.3, 0.05",
    )
    program.line("ready")
    for _ in range(2):
        program.line("log worker 1 has stood still for 0 s: killed")
        program.line("log worker 1 serves again")
    program.kill(signal.SIGTERM)
    program.line("end 0")
    assert not any("worker 0" in line for line in program.lines)


SUPERVISOR = (
    "__import__('time') and supervisor.Supervisor(CPUS, work, log, lambda: say('ready'), {})"
)


def test_a_worker_that_does_not_become_ready_has_failed(programs):
    program = programs("time.sleep(3600)", "[None]", before="supervisor.START_S_MAX = 0.5")
    for _ in range(3):
        program.line("log worker 0 does not start: killed")
    assert program.line("end") == f"end {int(supervisor.Exit.WORKER)}"


def test_a_stopped_supervisor_kills_nobody_when_it_goes_on(programs):
    """What stood still was the machine, or it: all get another chance first."""
    program = programs(
        "pass",
        "[None]",
        before="import mmap, struct\n"
        "supervisor.BEAT_S_MAX = 3.0\n"
        "page = mmap.mmap(-1, 8)\n"
        "def busy(number, link):\n"
        "    say(f'work {number} {os.getpid()}')\n"
        "    link.send(supervisor.READY)\n"
        "    while not select.select([link], [], [], 0.02)[0]:\n"
        "        struct.pack_into('Q', page, 0, time.monotonic_ns())\n"
        "    return 0\n"
        "runs = supervisor.Supervisor(CPUS, busy, log, lambda: say('ready'),\n"
        "    beat=lambda number: struct.unpack_from('Q', page)[0])",
    )
    pid = int(program.line("work 0").split()[2])
    program.line("ready")
    for each in (program.process.pid, pid):
        os.kill(each, signal.SIGSTOP)
    time.sleep(4.5)  # longer than a heartbeat may be old, and than the next look may be late
    for each in (program.process.pid, pid):
        os.kill(each, signal.SIGCONT)
    program.kill(signal.SIGTERM)
    program.line("end 0")
    assert not any("stood still" in line for line in program.lines)


def test_the_watchdog_is_kept_quiet(programs, tmp_path):
    with manager_at(tmp_path) as told:
        program = programs(NOTIFY_SOCKET=f"{tmp_path}/notify", WATCHDOG_USEC="100000")
        while told().count("WATCHDOG=1") < 3:
            pass
        program.kill(signal.SIGTERM)
        program.line("end 0")


@contextlib.contextmanager
def manager_at(folder):
    """A function that waits for what a manager is told next, and returns all of it so far."""
    heard = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{folder}/notify")
        sock.settimeout(PATIENCE_S)

        def told():
            heard.extend(sock.recv(4096).decode().splitlines())
            return heard

        yield told


# --- draining and reloading -----------------------------------------------------------------------


def test_sigterm_drains_until_it_is_drained(programs, tmp_path):
    drained = tmp_path / "drained"
    more = f"on_drain=lambda: say('drain'), drained=lambda: os.path.exists({str(drained)!r})"
    with manager_at(tmp_path) as told:
        program = programs(more=more, NOTIFY_SOCKET=f"{tmp_path}/notify")
        program.line("ready")
        program.kill(signal.SIGTERM)
        program.line("drain")
        while not any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in told()):
            pass
        assert not any(line.startswith("stop") for line in program.lines)
        drained.touch()
        program.line("log drained")
        assert program.line("end") == "end 0"
        lines = told()
        assert [line for line in lines if line.startswith(("READY", "STOPPING", "STATUS"))] == [
            "READY=1",
            "STATUS=serving",
            "STOPPING=1",
            "STATUS=draining",
            "STOPPING=1",
            "STATUS=stopping",
        ]


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_sigint_and_a_second_sigterm_stop_at_once(programs, first, second):
    program = programs(more="on_drain=lambda: say('drain'), drained=lambda: False")
    program.line("ready")
    if first:
        program.kill(first)
        program.line("drain")
    program.kill(second)
    program.line("log stopping on")
    assert program.line("end") == "end 0"
    assert {line for line in program.lines if line.startswith("stop")} == {"stop 0", "stop 1"}


@pytest.mark.parametrize(
    "defect", ["on_drain=lambda: 1 / 0", "on_drain=len, drained=lambda: 1 / 0"]
)
def test_a_defect_in_a_callback_is_logged_and_ends_nothing_but_the_drain(programs, defect):
    program = programs(more=defect)
    program.line("ready")
    program.kill(signal.SIGTERM)
    program.line("log a callback failed")
    assert program.line("end") == "end 0"


def test_a_worker_that_dies_while_it_drains_is_replaced(programs):
    program = programs("pass", "[None]", "on_drain=lambda: say('drain'), drained=lambda: False")
    pid = int(program.line("work 0").split()[2])
    program.line("ready")
    program.kill(signal.SIGTERM)
    program.line("drain")
    os.kill(pid, signal.SIGKILL)
    program.line("log worker 0 serves again")
    program.kill(signal.SIGTERM)
    program.line("end 0")


RELOAD = "on_reload=lambda: say('reload') or True, " + KEEPER


def test_sighup_replaces_one_after_the_other(programs, tmp_path):
    with manager_at(tmp_path) as told:
        program = programs(more=RELOAD, NOTIFY_SOCKET=f"{tmp_path}/notify")
        program.line("ready")
        for _ in range(2):
            start = len(program.lines)
            program.kill(signal.SIGHUP)
            program.line("log reloaded")
            lines = [" ".join(line.split()[:2]) for line in program.lines[start:]]
            lines = [
                line for line in lines if not line.startswith(("log", "keeper", "stop keeper"))
            ]
            # The second one stops only when the first one's successor serves.
            assert lines == ["reload", "stop 0", "work 0", "stop 1", "work 1"]
        while told().count("READY=1") < 3:
            pass
        words = [line for line in told_now(told) if not line.startswith(("MONOTONIC", "STATUS"))]
        assert words == ["READY=1", "RELOADING=1", "READY=1", "RELOADING=1", "READY=1"]
        program.kill(signal.SIGTERM)
        program.line("end 0")
        assert "stop keeper" in program.lines


def told_now(told):
    """What was heard so far, without waiting."""
    return told.__closure__[0].cell_contents


def test_a_reload_without_news_replaces_nobody(programs):
    program = programs(more="on_reload=lambda: say('reload')")
    program.line("ready")
    program.kill(signal.SIGHUP)
    program.line("log nothing was reloaded")
    program.kill(signal.SIGTERM)
    program.line("end 0")
    assert sum(line.startswith("work") for line in program.lines) == 2


def test_a_worker_that_dies_in_the_middle_of_a_reload(programs):
    """Killed as soon as it is there, while the reload waits for it: the next one will do."""
    program = programs(
        "if os.path.exists(flag): os.unlink(flag); os.kill(os.getpid(), 9)",
        more="on_reload=lambda: open(flag, 'w').close() or True",
        before=f"flag = '/dev/shm/earshot-test-{os.getpid()}'",
    )
    program.line("ready")
    program.kill(signal.SIGHUP)
    program.line("log worker 0 (pid")
    program.line("log reloaded")
    assert sum(line.startswith("work 1") for line in program.lines) == 2
    program.kill(signal.SIGTERM)
    program.line("end 0")


def test_signals_in_the_middle_of_a_reload(programs):
    """SIGHUP after SIGHUP, and then the end: nothing is left over."""
    program = programs(more=RELOAD)
    program.line("ready")
    for _ in range(5):
        program.kill(signal.SIGHUP)
        program.line("reload")
    program.line("log reloaded")
    program.kill(signal.SIGHUP)
    program.kill(signal.SIGTERM)
    assert program.line("end") == "end 0"
    assert not any("died" in line or "does not" in line for line in program.lines)


# --- handing over ---------------------------------------------------------------------------------


def test_all_stop_and_start_again(programs):
    """`suspend` and `resume`, by what a watched socket says; its peer sees no copy in a child."""
    program = programs(
        more=KEEPER,
        before="import socket\n"
        "ours, theirs = socket.socketpair()\n"
        "def hear():\n"
        "    word = ours.recv(100)\n"
        "    if word == b'suspend': runs.suspend(lambda: say(f'none {runs.busy}'))\n"
        "    if word == b'resume': runs.resume()\n"
        "    if word == b'fail': 1 / 0\n"
        "runs.loop.watch(ours, hear)\n"
        "def tell():\n"
        "    theirs.send(words.pop(0))\n"
        "    if words: runs.loop.call_at('tell', time.monotonic() + 0.3, tell)\n"
        "words = [b'suspend', b'resume', b'resume', b'suspend', b'resume', b'fail', b'suspend']\n"
        "runs.loop.call_at('tell', time.monotonic() + 0.3, tell)\n",
    )
    program.line("ready")
    for _ in range(2):
        program.line("none handing over")
        program.line("work")
        program.line("work")
    program.line("log a callback failed")
    program.kill(signal.SIGTERM)
    program.line("end 0")
    assert sum(line.startswith("stop ") for line in program.lines) == 9
    assert not any("died" in line for line in program.lines)


# --- with real workers ----------------------------------------------------------------------------


def test_no_datagram_is_lost_over_reloads(tmp_path):
    with contextlib.ExitStack() as stack:
        site = node.Site(tmp_path, stack)
        running = site.start()
        running.wait("ready")
        media = node.Media(site)
        flows = site.flows()
        for turn in range(1, 4):
            workers = running.children()
            running.send(signal.SIGHUP)
            media.run(lambda turn=turn: running.said("reloaded", turn))
            assert not set(workers) & set(running.children())
        media.run()
        assert media.lost() == 0
        assert site.flows() == flows
        running.send(signal.SIGTERM)
        assert running.code() == 0
