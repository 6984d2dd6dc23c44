"""The relay under a service manager: what they say to each other, the units, and a real systemd.

First the program with a stand-in that keeps descriptors as systemd does, and media all the while.
Then the unit files, as text. At last both under a systemd that is process 1 of namespaces of its
own, where the test may make some: it sees nothing of the machine's own units, cgroups and mounts.
"""

import contextlib
import ipaddress
import itertools
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import typing
from pathlib import Path

import msgspec
import pytest

import flows
import frame
import handover
import host
import journal
import ledger
import legacy
import settings
import stun
import supervisor
import ufrag

from . import alone, node

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "config" / "systemd"
RELAY = Path(sys.executable).with_name("relay")
PATIENCE_S = node.PATIENCE_S
OURS = ["internal-0", "internal-1", "memory-0", "memory-1", "public-0", "public-1", "relay"]


# --- the program and a stand-in -------------------------------------------------------------------

EXEC = """
import fcntl, os, sys
names, numbers, *argv = sys.argv[1:]
# Above all that is open, then down to where they are looked for.
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 200) for number in numbers.split()]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.closerange(3 + len(high), 400)
told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": names}
os.execve(argv[0], argv, os.environ | told)
"""
"""What systemd does between fork and exec: sd_listen_fds(3)."""


class Program(node.Node):
    """`relay run`, started by a manager."""

    def __init__(self, site, manager, handed, environment):
        self.log = site.folder / f"log-{len(list(site.folder.glob('log-*')))}"
        names, fds = ":".join(name for name, _ in handed), [fd for _, fd in handed]
        relay = [sys.executable, "-P", "-m", "relay", "run", "--config", str(site.config)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", EXEC, names, " ".join(map(str, fds)), *relay],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                pass_fds=fds,
                env=os.environ | {"NOTIFY_SOCKET": str(manager.path)} | environment,
            )
        self.pid = self.process.pid


class Place(node.Site):
    """A site whose manager starts the real program."""

    def __init__(self, folder, stack, more=""):
        super().__init__(folder, stack)
        self.configure(more=f'metrics = "127.0.0.1:0"\n{more}')
        self.manager = node.Manager(folder, stack)

    def start(self, *units, **environment):
        """The next one, with what socket units have and with all that was kept."""
        self.manager.hear()
        running = Program(self, self.manager, [*units, *self.manager.held], environment)
        self.stack.callback(running.kill)
        return running

    def ready(self, *units, **environment):
        """The same, and it serves."""
        self.manager.hear()
        before = len(self.manager.told)
        running = self.start(*units, **environment)
        wait(lambda: self.told(before, "READY") or running.ended(), running)
        assert not running.ended(), running.log.read_text()
        return running

    def memories(self):
        """What the workers of the running relay work in; the last memory is the relay's own."""
        state = handover.state_file(self.table)
        return host.attach(state, handover.LAYOUT, handover.MEMORY)[:-1]

    def flows(self):
        """All flows of the running relay."""
        found = (flows.read_all(memory.section("flows")) for memory in self.memories())
        return set(itertools.chain.from_iterable(found))

    def told(self, since, *keys):
        """What was said since then with one of these keys in it."""
        self.manager.hear()
        return [said for said in self.manager.told[since:] if set(keys) & set(said)]

    def hint(self, nonce):
        """A ufrag that names the transceiver, and its password."""
        home = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1, 65535)
        here = ipaddress.ip_address("127.0.0.1"), self.transceiver.getsockname()[1]
        hint = ufrag.mint(self.keyring, home, *here, nonce)
        return hint, ufrag.password(self.keyring, hint)


def wait(condition, said=""):
    """Until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        text = said.log.read_text() if isinstance(said, node.Node) else said
        assert time.monotonic() < deadline, f"it has not come true in time\n{text}"
        time.sleep(0.005)


def heard(sock):
    """The next datagram, and where it is from."""
    assert select.select([sock], [], [], PATIENCE_S)[0], "nothing is heard"
    return sock.recvfrom(4096)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def place(tmp_path, stack):
    return Place(tmp_path, stack)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_restart_through_the_store_loses_nothing(place, number):
    running = place.ready()
    media = node.Media(place)
    media.run()
    flows_before = place.flows()
    assert len(flows_before) == media.CLIENTS
    for _ in range(2):
        running.send(number)
        media.run(running.ended)
        running, sent = place.start(), media.sent
        media.run(lambda: place.manager.hear() or running.said(" ready: "))  # noqa: B023
        assert media.sent > sent
        media.run(at_least=100)
        assert running.said("2 of 2 workers' memories are taken over as they are")
        assert place.manager.names() == OURS
    assert media.lost() == 0
    assert place.flows() == flows_before
    memories = place.memories()
    running.send(signal.SIGINT)
    assert running.code() == supervisor.Exit.STOPPED
    ways = zip(*map(handover.counters_in, memories), strict=True)
    assert [ledger.total(way).missing() for way in ways] == [0, 0]


def test_what_is_sent_while_there_is_no_relay_arrives(place):
    running = place.ready()
    media, back = node.Media(place), {}
    for client in media.clients:
        client.send(b"\x80 before")
        framed, source = heard(place.transceiver)
        back[framed[: frame.HEADER_OCTETS]] = source
    assert set(back) == media.headers
    running.send(signal.SIGINT)
    assert running.code() == supervisor.Exit.STOPPED
    for number in range(50):
        for client in media.clients:
            client.send(b"\x80 in %d" % number)
        for header, relay in back.items():
            place.transceiver.sendto(header + b"\x80 out %d" % number, relay)
    place.ready()
    came = {header: [] for header in back}
    for _ in range(50 * len(back)):
        framed, source = heard(place.transceiver)
        header = framed[: frame.HEADER_OCTETS]
        assert source == back[header]
        came[header].append(framed[frame.HEADER_OCTETS :])
    assert all(each == [b"\x80 in %d" % number for number in range(50)] for each in came.values())
    for client in media.clients:
        answers = [heard(client)[0] for _ in range(50)]
        assert answers == [b"\x80 out %d" % number for number in range(50)]


def test_sockets_of_the_socket_unit(place):
    """What was sent before the first start is served; later they come beside what was stored."""
    units = []
    for _ in range(2):
        public = place.stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        public.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        public.bind(("::ffff:127.0.0.1", place.public))
        units.append(("earshot-relay", public.fileno()))
    early = place.stack.enter_context(node.bound())
    early.connect(("127.0.0.1", place.public))
    hint, password = place.hint(99)
    check = stun.request(os.urandom(12), f"{hint}:x", password)
    early.send(check)
    running = place.ready(*units)
    assert heard(place.transceiver)[0] == frame.header(*early.getsockname()) + check
    media = node.Media(place)
    for _ in range(2):
        kept = {os.fstat(fd).st_ino for name, fd in place.manager.held if "public" in name}
        assert kept == {os.fstat(fd).st_ino for _, fd in units}
        assert not running.said("left over") and not running.said("not taken over")
        running.send(signal.SIGINT)
        media.run(running.ended)
        running = place.start(*units)
        media.run(lambda: place.manager.hear() or running.said(" ready: "))  # noqa: B023
        assert place.manager.names() == OURS
    assert media.lost() == 0


def relabel(fd):
    """The memory's first page says a layout that there is not yet."""
    page = os.pread(fd, 4096, 0)
    there = b'"layout": %d' % handover.LAYOUT
    assert there in page
    os.pwrite(fd, page.replace(there, b'"layout": 9'), 0)


def blank(fd):
    """There is nothing in the first page that could be read."""
    os.pwrite(fd, bytes(4096), 0)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (relabel, "memory-{} has layout 9, which this version cannot read"),
        (blank, "memory-{} is not taken over: "),
    ],
)
def test_a_memory_that_is_not_understood_is_refused(place, spoil, line):
    running = place.ready()
    node.Media(place)
    assert len(place.flows()) == node.Media.CLIENTS
    running.send(signal.SIGINT)
    assert running.code() == supervisor.Exit.STOPPED
    assert place.manager.names() == OURS
    for name, fd in place.manager.held:
        if name.startswith("memory-"):
            spoil(fd)
    refused = {os.fstat(fd).st_ino for name, fd in place.manager.held if "memory" in name}
    sockets = {os.fstat(fd).st_ino for name, fd in place.manager.held if "-" in name} - refused
    running = place.ready()
    for number in range(2):
        assert running.said(line.format(number)), running.log.read_text()
    assert place.flows() == set()
    # The sockets are the same, the memories are not, and the store has nothing twice.
    assert place.manager.names() == OURS
    held = {os.fstat(fd).st_ino for _, fd in place.manager.held}
    assert sockets <= held and not refused & held
    media = node.Media(place)
    media.run()
    assert media.lost() == 0


def test_everything_is_stored_before_it_is_ready(place):
    place.ready()
    said = place.told(0, "FDSTORE", "READY")
    assert [each.get("FDNAME", "READY") for each in said][-1] == "READY"
    assert sorted(each["FDNAME"] for each in said[:-1]) == OURS
    assert said[-1] == {"READY": "1", "STATUS": "serving"}


def test_the_watchdog_hears_of_it_as_long_as_it_lives(place):
    running = place.ready(WATCHDOG_USEC="200000")
    wait(lambda: len(place.told(0, "WATCHDOG")) >= 4, running)
    assert {said["WATCHDOG"] for said in place.told(0, "WATCHDOG")} == {"1"}
    running.send(signal.SIGSTOP)
    stopped = f"/proc/{running.pid}/stat"
    wait(lambda: Path(stopped).read_text().rpartition(")")[2].split()[0] == "T")
    so_far = len(place.told(0, "WATCHDOG"))
    time.sleep(0.5)
    assert len(place.told(0, "WATCHDOG")) == so_far
    running.send(signal.SIGCONT)
    wait(lambda: len(place.told(0, "WATCHDOG")) > so_far, running)


def test_a_reload_is_announced_and_loses_nothing(place):
    running = place.ready()
    media = node.Media(place)
    since, before_us = len(place.manager.told), time.monotonic_ns() // 1000
    running.send(signal.SIGHUP)
    media.run(lambda: place.told(since, "READY"))
    reloading, ready = place.told(since, "RELOADING", "READY")
    assert reloading["RELOADING"] == "1" and reloading["STATUS"] == "reloading"
    assert before_us <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert ready == {"READY": "1", "STATUS": "serving"}
    media.run()
    assert media.lost() == 0


def test_a_drain_is_announced_and_asks_for_time(place):
    running = place.ready()
    media = node.Media(place)
    since = len(place.manager.told)
    running.send(signal.SIGTERM)
    media.run(lambda: place.told(since, "EXTEND_TIMEOUT_USEC"))
    (stopping,) = place.told(since, "STOPPING")
    assert stopping == {"STOPPING": "1", "STATUS": "draining"}
    (more,) = place.told(since, "EXTEND_TIMEOUT_USEC")
    assert int(more["EXTEND_TIMEOUT_USEC"]) == supervisor.STOP_EXTENSION_S * 1e6
    media.run()
    assert media.lost() == 0 and not running.ended()
    running.send(signal.SIGTERM)
    assert running.code() == supervisor.Exit.STOPPED
    assert place.told(since, "STOPPING")[-1]["STATUS"] == "stopping"


# --- the units ------------------------------------------------------------------------------------

NAMES = [
    "earshot-relay.service",
    "earshot-relay.socket",
    "earshot-signaling.service",
    "earshot-transceiver@.service",
]
SERVICES = [name for name in NAMES if name.endswith(".service")]


def parsed(name):
    """Sections of a unit file, with a list of values for each key: systemd.syntax(7)."""
    found = {}
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals and key.isalnum() and not value.endswith("\\"), line
            section.setdefault(key, []).append(value)
    return found


def one(name, section, key):
    """The value of a key that stands there once."""
    (value,) = parsed(name)[section][key]
    return value


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s)", text).groups()
    return int(number) / (1000 if unit == "ms" else 1)


def test_these_are_all_units():
    assert sorted(path.name for path in UNITS.iterdir()) == NAMES


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_starts_what_is_there(name):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    unit = parsed(name)["Service"]
    command = shlex.split(*unit["ExecStart"])
    program = Path(command[0])
    assert str(program.parent) == "/opt/earshot/current/venv/bin" and program.name in scripts
    assert program.name in name
    assert command[1:3] == ["run", "--config"]
    # One that starts beforehand would be time in which nobody reads the sockets, and its status
    # 78 no reason to end.
    assert "ExecStartPre" not in unit
    assert unit["RestartPreventExitStatus"] == [str(int(supervisor.Exit.CONFIGURATION))]
    assert unit["Restart"] == ["on-failure"] and seconds(*unit["RestartSec"]) <= 1
    # Asserts are checks: no PYTHONOPTIMIZE.
    assert unit["Environment"] == ["PYTHONSAFEPATH=1", f"{journal.VARIABLE}=json"]
    assert unit["User"] == ["earshot"] and unit["NoNewPrivileges"] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"] and unit["UMask"] == ["0077"]
    assert "AF_UNIX" in unit["RestrictAddressFamilies"][0]


def test_the_relay_stops_in_two_ways():
    """What supervisor.py does with these signals: one drains, the other does not."""
    unit = parsed("earshot-relay.service")["Service"]
    assert (unit["KillSignal"], unit["RestartKillSignal"]) == (["SIGTERM"], ["SIGINT"])
    assert unit["KillMode"] == ["mixed"] and "ExecStop" not in unit
    # The first request for more time comes at once, and what is asked for is renewed thrice.
    stop_s = seconds(*unit["TimeoutStopSec"])
    assert supervisor.STOP_S < stop_s < supervisor.STOP_EXTENSION_S
    assert unit["ExecReload"][-1] == "kill -HUP $MAINPID"
    assert shlex.split(unit["ExecReload"][0])[1] == "check"


def test_signaling_is_told_to_read_again_what_has_been_checked():
    unit = parsed("earshot-signaling.service")["Service"]
    checked, told = unit["ExecReload"]
    assert told == "kill -HUP $MAINPID"
    assert shlex.split(checked) == [
        "check" if word == "run" else word for word in shlex.split(*unit["ExecStart"])
    ]


def test_the_relay_notifies_and_is_given_time():
    unit = parsed("earshot-relay.service")["Service"]
    assert unit["Type"] == ["notify"] and unit["NotifyAccess"] == ["main"]
    assert seconds(*unit["WatchdogSec"]) > 2 * supervisor.BEAT_S_MAX
    starts_s = supervisor.START_FAILURES_MAX * supervisor.START_S_MAX
    assert seconds(*unit["TimeoutStartSec"]) > starts_s
    # No number of failures may lose what is in the store.
    assert parsed("earshot-relay.service")["Unit"]["StartLimitIntervalSec"] == ["0"]
    for other in ("earshot-signaling.service", "earshot-transceiver@.service"):
        assert one(other, "Service", "Type") == "exec"


def test_the_store_has_room_for_all_workers_that_can_be_configured():
    table = typing.get_type_hints(settings.RelayTable, include_extras=True)
    (meta,) = table["workers"].__metadata__
    room = int(one("earshot-relay.service", "Service", "FileDescriptorStoreMax"))
    assert room > 3 * meta.le
    assert int(one("earshot-relay.service", "Service", "LimitNOFILE")) > 10 * room
    assert "FileDescriptorStorePreserve" not in parsed("earshot-relay.service")["Service"]


def test_the_units_and_the_settings_agree():
    defaults = {each.name: each.default for each in msgspec.structs.fields(settings.RelayTable)}
    found = tomllib.loads((ROOT / "config" / "relay.toml").read_text())["relay"]
    assert one("earshot-relay.service", "Service", "RuntimeDirectory") == defaults["state_dir"].name
    address, _, port = found["public"].rpartition(":")
    listens = parsed("earshot-relay.socket")["Socket"]["ListenDatagram"]
    assert set(listens) == {f"[::ffff:{address}]:{port}"}
    unit = parsed("earshot-relay.socket")["Socket"]
    assert unit["ReusePort"] == ["yes"] and unit["BindIPv6Only"] == ["both"]
    assert not legacy._OURS.fullmatch(*unit["FileDescriptorName"])
    assert ":" not in unit["FileDescriptorName"][0]


def test_a_transceiver_is_given_the_time_to_drain():
    defaults = {
        each.name: each.default for each in msgspec.structs.fields(settings.TransceiverTable)
    }
    stop_s = seconds(one("earshot-transceiver@.service", "Service", "TimeoutStopSec"))
    assert stop_s > defaults["drain_s"] + 10


def test_only_the_relay_has_a_capability():
    unit = parsed("earshot-relay.service")["Service"]
    assert unit["AmbientCapabilities"] == unit["CapabilityBoundingSet"] == ["CAP_NET_ADMIN"]
    for other in ("earshot-signaling.service", "earshot-transceiver@.service"):
        assert one(other, "Service", "CapabilityBoundingSet") == ""
        assert "AmbientCapabilities" not in parsed(other)["Service"]


def test_systemd_finds_no_fault_in_them(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    for name in NAMES:
        text = (UNITS / name).read_text()
        # What it cannot find on this host is not the matter here.
        text = text.replace("/opt/earshot/current/venv/bin/", f"{RELAY.parent}/")
        text = re.sub("(?m)^(User|Group)=.*$", r"\1=root", text)
        (tmp_path / name.replace("@.", "@0.")).write_text(text)
    done = subprocess.run(
        [analyze, "verify", *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    about_these = [line for line in done.stderr.splitlines() if "earshot" in line]
    assert done.returncode == 0 and not about_these, done.stderr


# --- a real systemd -------------------------------------------------------------------------------

SYSTEMD = Path("/lib/systemd/systemd")
TOOLS = ("mount", "nsenter", "setpriv", "sh", "systemctl", "unshare")

INSIDE = """
set -eu
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/log-of-test /run/site /run/units /run/dev /run/dev/shm /run/dev/pts
mount --bind "$1" /run/log-of-test
cp -r "$1"/units/. /run/units
. "$1"/way
for name in null zero full random urandom tty; do
    touch /run/dev/$name
    mount --bind /dev/$name /run/dev/$name
done
ln -s pts/ptmx /run/dev/ptmx
mount --rbind /run/dev /dev
for name in passwd group; do
    cp /etc/$name /run/$name
    mount --bind /run/$name /etc/$name
done
echo "earshot:x:64999:64999::/:/usr/sbin/nologin" >> /run/passwd
echo "earshot:x:64999:" >> /run/group
exec env -i container=earshot-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH=/run/units /lib/systemd/systemd --system --unit=basic.target \
    --log-target=null --show-status=no
"""
"""In new namespaces: nothing that is written from here on is the machine's, and what the kernel
has only once (/proc/sys) cannot be written."""

STILL = """
[Service]
StandardOutput=append:/run/log-of-test/out
StandardError=append:/run/log-of-test/out
# The tree under test may be in somebody's home, or in a folder for what is temporary.
ProtectHome=no
PrivateTmp=no
# Shorter than the drain of the test: what goes on longer was asked for.
TimeoutStopSec=2s
"""
"""The drop-in: all that is different from the unit as it is shipped, beside paths."""


class Machine:
    """A systemd that is process 1 of namespaces of its own, in this process's network namespace."""

    def __init__(self, folder, stack):
        self.folder, self.stack, self.out = folder, stack, folder / "out"
        self.out.touch()
        self.cgroup = cgroups() / f"earshot-test-{os.getpid()}"
        self.cgroup.mkdir()
        stack.callback(self._remove_cgroup)
        (folder / "inside").write_text(INSIDE)
        (folder / "way").write_text(way_in())
        self._write_units(folder / "units")
        # It must not outlive us, whatever ends us; and process 1 takes the rest with it.
        joins = "sh", "-ec", 'echo $$ > "$0"/cgroup.procs; exec "$@"'
        words = "setpriv --pdeathsig KILL unshare --fork --kill-child=KILL"
        words += " --pid --mount --uts --ipc --cgroup sh"
        self.process = subprocess.Popen(
            [*joins, self.cgroup, *words.split(), folder / "inside", folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "errors").open("wb"),
        )
        stack.callback(self._stop)
        self.pid = 0
        wait(self._is_up)

    def _write_units(self, folder):
        (folder / "earshot-relay.service.d").mkdir(parents=True)
        (folder / "earshot-relay.service.d" / "test.conf").write_text(STILL)
        for name in ("sysinit", "basic", "shutdown", "sockets", "network-online"):
            text = "[Unit]\nDescription=Nothing\nDefaultDependencies=no\n"
            (folder / f"{name}.target").write_text(text)
        text = (UNITS / "earshot-relay.service").read_text()
        for before, after in (
            ("/opt/earshot/current/venv/bin", str(RELAY.parent)),
            ("/etc/earshot", "/run/site"),
        ):
            assert before in text
            text = text.replace(before, after)
        (folder / "earshot-relay.service").write_text(text)

    def _is_up(self):
        """systemctl is heard, whatever it says of the state."""
        if self.process.poll() is not None:
            raise AssertionError((self.folder / "errors").read_text())
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.pid = int((tasks.read_text().split() or [0])[0])
        return self.pid and self.run("systemctl", "show", "-p", "Version").returncode == 0

    def _stop(self):
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait(PATIENCE_S)

    def _remove_cgroup(self):
        wait(lambda: not any(path.read_text() for path in self.cgroup.rglob("cgroup.procs")))
        for folder, _, _ in os.walk(self.cgroup, topdown=False):
            os.rmdir(folder)

    def popen(self, *words):
        """A command inside."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words):
        """The same, to its end."""
        process = self.popen(*words)
        said, _ = process.communicate(timeout=2 * PATIENCE_S)
        return subprocess.CompletedProcess(words, process.returncode, said)

    def do(self, verb, *words):
        """`systemctl` with the relay's unit, which must succeed."""
        done = self.run("systemctl", verb, *(words or ["earshot-relay.service"]))
        if done.returncode:
            status = self.run("systemctl", "status", "--no-pager", "earshot-relay.service").stdout
            raise AssertionError("\n".join((done.stdout, status, self.out.read_text())))

    def show(self, key):
        """A property of the relay's unit."""
        words = ("show", "--value", "-p", key, "earshot-relay.service")
        return self.run("systemctl", *words).stdout.strip()

    def path(self, name):
        """A file of the relay's configuration, from here."""
        return Path("/proc", str(self.pid), "root", "run", "site", name)

    def said(self, part, times=1):
        """True once the relay's log has it that often."""
        return self.out.read_text().count(part) >= times

    def flows(self):
        """The relay's flows, as it prints them, without their age."""
        done = self.run(str(RELAY), "flows", "--config", "/run/site/relay.toml")
        assert done.returncode == 0, done.stdout
        return {tuple(line.split()[2:5]) for line in done.stdout.splitlines()}


class Served(node.Site):
    """A site whose relay a real systemd runs."""

    def __init__(self, folder, stack):
        super().__init__(folder, stack)
        self.machine = Machine(folder, stack)
        self.install()

    def install(self, more=""):
        """Write configuration and keys where the unit looks for them, as its user's."""
        self.configure(more=f'metrics = "127.0.0.1:0"\n{more}')
        text = self.config.read_text().replace('state_dir = "state"\n', "")  # as the unit has it
        assert "state_dir" not in text
        for name, content in (("relay.toml", text), ("keys", (self.folder / "keys").read_text())):
            path = self.machine.path(name)
            path.write_text(content)
            path.chmod(0o600)
            os.chown(path, 64999, 64999)


TEMPORARY = Path("/tmp"), Path("/var/tmp")
"""Empty at the start of a system."""


def way_in():
    """Commands, for namespaces alone, that let any user reach the program that is under test, and
    that leave nothing else in the folders for what is temporary."""
    needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    barred = {}
    for path in sorted(needed):
        closed = [
            each for each in path.parents if each in TEMPORARY or not each.stat().st_mode & 0o001
        ]
        if closed:
            barred[path] = closed[-1]
    lines = []
    for number, path in enumerate(barred):
        held = f"/run/held-{number}"
        lines += [f"mkdir {held}", f"mount --rbind {shlex.quote(str(path))} {held}"]
    for top in sorted({*barred.values(), *TEMPORARY}):
        mode = "1777" if top in TEMPORARY else "755"
        lines.append(f"mount -t tmpfs -o mode={mode} tmpfs {shlex.quote(str(top))}")
    for number, path in enumerate(barred):
        name = shlex.quote(str(path))
        lines += [f"mkdir -p {name}", f"mount --rbind /run/held-{number} {name}"]
    return "\n".join(lines)


def cgroups():
    """The folder of this process's cgroup of version 2. Raises OSError and ValueError."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    (at, *_) = [Path(words[1]) for words in mounts if words[2] == "cgroup2"] or [None]
    (ours, *_) = re.findall(r"(?m)^0::/(.*)$", Path("/proc/self/cgroup").read_text()) or [None]
    if at is None or ours is None:
        raise ValueError("there is no cgroup2")
    return at / ours


def obstacle():
    """Why there can be no systemd for a test; empty where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not SYSTEMD.exists() or missing:
        return f"needs {SYSTEMD}, {', '.join(TOOLS)}"
    if os.geteuid():
        return "needs root"
    if alone.REASON:
        return alone.REASON
    try:
        if not os.access(cgroups(), os.W_OK):
            return f"may not write to {cgroups()}"
    except (OSError, ValueError) as error:
        return str(error)
    words = "unshare --fork --pid --mount --uts --ipc --cgroup mount -t cgroup2 none /sys/fs/cgroup"
    done = subprocess.run(words.split(), capture_output=True, text=True, check=False)
    return f"may not make namespaces: {done.stderr.strip()}" if done.returncode else ""


def under_systemd(folder, work):
    """Run `work` with a site that a systemd serves, and nothing but loopback around it."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)

    pyroute2 = pytest.importorskip("pyroute2")

    def inside():
        alone.unshare()
        with pyroute2.IPRoute() as routes:
            routes.link("set", index=1, state="up")
        with contextlib.ExitStack() as stack:
            work(Served(folder, stack))

    alone.joined(*alone.child(inside))


def test_systemd_restarts_it_without_loss(tmp_path):
    """Asked to, three ways, and unasked; what is sent meanwhile arrives, once."""

    def work(site):
        machine = site.machine
        machine.do("start")
        assert machine.show("StatusText") == "serving"
        assert machine.show("NFileDescriptorStore") == str(len(OURS))
        media = node.Media(site)
        media.run()
        before = machine.flows()
        assert len(before) == media.CLIENTS
        for turn, verb in enumerate(("restart", "try-restart", "reload-or-restart", "crash"), 1):
            pid, sent = machine.show("MainPID"), media.sent
            if verb == "crash":
                machine.do("kill", "-s", "KILL", "--kill-whom=main", "earshot-relay.service")
            elif verb == "reload-or-restart":  # it can be reloaded, and is
                machine.do(verb)
                media.run(lambda: machine.said('"message":"reloaded'))
                assert machine.show("MainPID") == pid
                continue
            else:
                asked = machine.popen("systemctl", verb, "earshot-relay.service")
                media.run(lambda: asked.poll() is not None)  # noqa: B023
                assert asked.wait() == 0, asked.stdout.read()
            count = turn if turn < 3 else 3
            media.run(lambda: machine.said("taken over as they are", count))  # noqa: B023
            media.run(lambda: machine.show("ActiveState") == "active", at_least=100)
            assert machine.show("MainPID") != pid and media.sent > sent
            assert machine.show("NFileDescriptorStore") == str(len(OURS))
        assert media.lost() == 0
        assert machine.flows() == before
        assert machine.show("NRestarts") == "1"
        assert machine.said("stopping on SIGINT", 2) and not machine.said("draining")
        # As CAP_NET_ADMIN lets it have what is configured.
        assert not machine.said("the kernel grants buffers of")

    under_systemd(tmp_path, work)


def test_systemd_stops_it_when_it_has_drained(tmp_path):
    """Also when that takes longer than TimeoutStopSec: it asks for time."""

    def work(site):
        machine = site.machine
        site.install("flow_idle_s = 1.0\ntentative_idle_s = 1.0")
        machine.do("start")
        media = node.Media(site)
        stopping = machine.popen("systemctl", "stop", "earshot-relay.service")
        media.run(lambda: machine.said("draining on SIGTERM"))
        beyond = time.monotonic() + 3
        while time.monotonic() < beyond:
            media.run(at_least=1)
            time.sleep(0.05)
        assert machine.show("SubState") == "stop-sigterm"
        assert machine.show("StatusText") == "draining"
        assert media.lost() == 0
        assert stopping.wait(PATIENCE_S) == 0  # the clients are silent now
        assert machine.said('"logger":"relay"') and machine.said('"message":"drained')
        assert machine.show("ActiveState") == "inactive" and machine.show("Result") == "success"
        assert machine.show("NFileDescriptorStore") == "0"

    under_systemd(tmp_path, work)


def test_a_stop_can_be_taken_back(tmp_path):
    """While it drains: as the unit's comment has it."""

    def work(site):
        machine = site.machine
        machine.do("start")
        media = node.Media(site)
        before = machine.flows()
        stop = machine.popen("systemctl", "stop", "earshot-relay.service")
        media.run(lambda: machine.said("draining on SIGTERM"))
        start = machine.popen("systemctl", "start", "earshot-relay.service")
        media.run(lambda: stop.poll() is not None)  # its job is no more
        assert machine.show("SubState") == "stop-sigterm" and start.poll() is None
        machine.do("kill", "-s", "SIGINT", "--kill-whom=main", "earshot-relay.service")
        media.run(lambda: start.poll() is not None)
        assert start.wait() == 0, start.stdout.read()
        assert machine.said("2 of 2 workers' memories are taken over as they are")
        assert media.lost() == 0
        assert machine.flows() == before

    under_systemd(tmp_path, work)


def test_systemd_tells_who_is_at_fault_when_the_configuration_is_wrong(tmp_path):
    """A reload of it fails and changes nothing; a start of it is not tried again."""

    def work(site):
        machine = site.machine
        machine.do("start")
        media = node.Media(site)
        machine.path("relay.toml").write_text("nonsense")
        reload = machine.run("systemctl", "reload", "earshot-relay.service")
        assert reload.returncode != 0
        assert machine.said("/run/site/relay.toml: ") and not machine.said("reading")
        media.run()
        assert media.lost() == 0
        restart = machine.run("systemctl", "restart", "earshot-relay.service")
        assert restart.returncode != 0
        assert machine.show("ActiveState") == "failed" and machine.show("NRestarts") == "0"
        assert machine.show("ExecMainStatus") == str(int(supervisor.Exit.CONFIGURATION))
        site.install()
        machine.do("start")
        assert node.Media(site).lost() == 0

    under_systemd(tmp_path, work)


def test_systemd_starts_it_when_a_datagram_comes(tmp_path):
    """The socket unit, with a line for each worker; a restart has its sockets twice."""

    def work(site):
        machine = site.machine
        text = (UNITS / "earshot-relay.socket").read_text()
        line = re.search("(?m)^ListenDatagram=.*\n", text)[0]
        here = f"ListenDatagram=[::ffff:127.0.0.1]:{site.public}\n"
        unit = machine.path("../units/earshot-relay.socket")
        unit.write_text(text.replace(line, 2 * here))
        machine.do("daemon-reload", "--quiet")
        machine.do("start", "earshot-relay.socket")
        assert machine.show("ActiveState") == "inactive"
        media = node.Media(site)  # its first check starts the relay
        assert machine.show("ActiveState") == "active"
        for turn in range(2):
            asked = machine.popen("systemctl", "restart", "earshot-relay.service")
            media.run(lambda: asked.poll() is not None, at_least=100)  # noqa: B023
            assert asked.wait() == 0, asked.stdout.read()
            media.run(lambda: machine.said("taken over as they are", turn + 1))  # noqa: B023
        assert media.lost() == 0
        assert not machine.said("left over") and not machine.said("not taken over")
        assert machine.show("NFileDescriptorStore") == str(len(OURS))

    under_systemd(tmp_path, work)
