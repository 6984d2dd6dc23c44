"""Relays that hand over, for the tests: real workers, supervisor, sockets and memory, in processes.

As a program (`node.py run CONFIG`, `node.py handover CONFIG`) it does what relay.py does with all
of them, and lets a test break it at a named point. As a module it has what stands around: `Node`
starts such a program, `Manager` is a stand-in for systemd's descriptor store, and `Media` are
clients and a transceiver that echoes, with an account of every datagram.
"""

import contextlib
import fcntl
import gc
import ipaddress
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flows
import frame
import handover
import host
import settings
import stun
import succession
import supervisor
import ufrag
import worker

PATIENCE_S = 20
"""How long anything may take before the test has failed; all of it takes milliseconds."""


# --- the program ----------------------------------------------------------------------------------


def main(word, path):
    """Serve until told to stop; returns the exit code."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(process)d %(name)s %(message)s"
    )
    log = logging.getLogger("node")
    fault, layout = os.environ.get("FAULT", ""), os.environ.get("LAYOUT")
    handover.LAYOUT = int(layout or handover.LAYOUT)
    succession.SERVE_S_MAX = float(os.environ.get("SERVE_S_MAX", succession.SERVE_S_MAX))
    succession.ANSWER_S_MAX = float(os.environ.get("ANSWER_S_MAX", succession.ANSWER_S_MAX))
    supervisor.BEAT_S_MAX = float(os.environ.get("BEAT_S_MAX", supervisor.BEAT_S_MAX))
    found = settings.load(path, settings.Relay)
    keyring, table = found.keys.load(), found.relay
    state = handover.state_file(table)
    successor = None
    if word == "handover":
        try:
            successor = succession.Successor(state.with_suffix(".sock"))
        except succession.SuccessionError as error:
            log.warning("%s", error)
            return supervisor.Exit.SUCCESSION

    def point(name):
        log.info("at %s", name)
        if fault == name:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == f"silent at {name}":
            signal.pause()

    point("prepared")
    shared = handover.Shared(found, successor.estate if successor else None)

    def publish():
        shared.publish(state)

    def work(number, link):
        if fault == "worker":
            raise SystemError("it cannot start")
        shared.memories[number].claim()
        if face := shared.faces[number]:
            face.memory.claim()
        works = worker.Worker(shared, number, found, keyring, time.monotonic())
        works.take_over()
        gc.freeze()
        link.send(supervisor.READY)
        works.serve(link)
        return 0

    def ready():
        if fault == "serving":
            point("serving")
        shared.store()
        if successor:
            successor.serving()
        testator.listen()
        log.info("ready")

    def drain():
        log.info("drains")

    pins = [None] * handover.workers(table)
    runs = supervisor.Supervisor(
        pins,
        work,
        log,
        ready,
        on_reload=lambda: True,
        on_drain=drain if "DRAIN" in os.environ else None,
        drained=lambda: Path(os.environ["DRAIN"]).exists(),
    )
    testator = succession.Testator(state.with_suffix(".sock"), runs, shared.descriptors, publish)
    publish()
    try:
        if successor:
            successor.go()
            point("done")
            shared.settle()
            successor.follow(runs)
        return runs.run()
    except succession.SuccessionError as error:
        log.warning("%s", error)
        return supervisor.Exit.SUCCESSION
    finally:
        testator.close()
        host.unpublish(state)
        log.info("ended")


# --- around it ------------------------------------------------------------------------------------

SO_RCVBUFFORCE = 33
"""Linux's name, which Python's socket module does not have."""

BUFFER_OCTETS = 4 << 20
"""Of each of a test's sockets. The kernel's default holds half a second of the fullest test: more
would be lost here, in this process, which says nothing of the relay."""

DATAGRAM_OCTETS = 2048
"""What a small datagram takes of a socket's buffer at most, by the kernel's own account."""

CONFIG = """
[relay]
public = "{host}:{public}"
internal = "{host}:{internal}"
workers = {workers}
state_dir = "state"
{more}

[keys]
file = "keys"

[[cluster]]
id = 1
prefix = "127.0.0.0/8"
ports = [{transceiver}, {transceiver}]
"""


def bound(at="127.0.0.1", port=0):
    """A UDP socket of the test's own."""
    sock = socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((at, port))
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_OCTETS)
    except OSError:  # only CAP_NET_ADMIN may go beyond net.core.rmem_max
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_OCTETS)
    return sock


def free_ports(count):
    """The first of so many ports in a row."""
    from . import ports  # noqa: PLC0415  # as a program this has no package

    return ports.free(count)[0]


class Site:
    """A configuration, and all processes that were started with it."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.transceiver = stack.enter_context(bound())
        self.public, self.internal = free_ports(1), free_ports(4)
        (folder / "keys").write_text("1 " + "11" * 32 + "\n")
        (folder / "keys").chmod(0o600)
        self.config = folder / "relay.toml"
        self.keyring = settings.load_keys(folder / "keys")
        self.configure()

    def configure(self, workers=2, more="", public=None, at="127.0.0.1"):
        """Write the file."""
        self.config.write_text(
            CONFIG.format(
                host=at,
                public=public or self.public,
                internal=self.internal,
                workers=workers,
                transceiver=self.transceiver.getsockname()[1],
                more=more,
            )
        )
        self.table = settings.load(self.config, settings.Relay).relay
        self.control = handover.state_file(self.table).with_suffix(".sock")

    def start(self, word="run", manager=None, handed=(), **environment):
        """Start a relay; it is killed at the end of the test if it still runs."""
        node = Node(self, word, manager, handed, environment)
        self.stack.callback(node.kill)
        return node

    def said(self):
        """What all relays have said, for whoever wonders why something has not come true."""
        logs = sorted(self.folder.glob("log-*"))
        return "\n".join([f"{log.name}:\n{log.read_text()}" for log in logs])

    def flows(self):
        """All flows of the running relay."""
        workers = handover.Running.of(self.table).workers
        return {flow for each in workers for flow in flows.read_all(each.section("flows"))}


class Node:
    """A relay in a process of its own."""

    def __init__(self, site, word, manager, handed, environment):
        self.log = site.folder / f"log-{len(list(site.folder.glob('log-*')))}"
        argv = [sys.executable, "-P", __file__, word, str(site.config)]
        names, fds = [name for name, _ in handed], [fd for _, fd in handed]

        def settle_in():
            # Above all that the child has, then down to where they are looked for.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in fds]
            for number, fd in enumerate(high, 3):
                os.dup2(fd, number)
            if fds:
                os.environ["LISTEN_PID"] = str(os.getpid())
                os.environ["LISTEN_FDS"] = str(len(fds))
                os.environ["LISTEN_FDNAMES"] = ":".join(names)
            if manager:
                os.environ["NOTIFY_SOCKET"] = str(manager.path)
            os.environ.update(environment)
            os.closerange(3 + len(fds), 300)
            os.execv(argv[0], argv)

        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stderr=file,
                stdout=file,
                start_new_session=True,
                close_fds=not fds,
                preexec_fn=settle_in,  # noqa: PLW1509  # one thread: nothing to deadlock
            )
        self.pid = self.process.pid

    def said(self, part, times=1):
        """True once its log has `part` that often."""
        return self.log.read_text().count(part) >= times

    def ended(self):
        """True once it is no more."""
        return self.process.poll() is not None

    def wait(self, part, times=1):
        """Wait for a line; no media goes on meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.said(part, times):
            assert time.monotonic() < deadline and not self.ended(), self.log.read_text()
            time.sleep(0.002)

    def code(self):
        """Its exit code."""
        return self.process.wait(PATIENCE_S)

    def send(self, number):
        """Send a signal to the supervisor."""
        os.kill(self.pid, number)

    def children(self):
        """Process ids of its workers."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]

    def kill(self):
        """The end, whatever it was at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


class Manager:
    """What systemd does with descriptors: keeps them under a name, and gives them to the next."""

    def __init__(self, folder, stack):
        self.path, self.told, self.held = folder / "notify", [], []
        self._sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._sock.bind(str(self.path))
        self._sock.setblocking(False)
        stack.callback(lambda: [os.close(fd) for _, fd in self.held])

    def names(self):
        """What is kept."""
        self.hear()
        return sorted(name for name, _ in self.held)

    def hear(self):
        """Take what was said since the last time; always False."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, 65536, 253)
            except BlockingIOError:
                return False
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            self.told.append(said)
            if said.get("FDSTORE") == "1":
                assert said["FDPOLL"] == "0"
                known = {(name, os.fstat(fd).st_ino) for name, fd in self.held}
                for fd in fds:
                    if (said["FDNAME"], os.fstat(fd).st_ino) in known:
                        os.close(fd)
                    else:
                        self.held.append((said["FDNAME"], fd))
            elif said.get("FDSTOREREMOVE") == "1":
                for name, fd in [pair for pair in self.held if pair[0] == said["FDNAME"]]:
                    self.held.remove((name, fd))
                    os.close(fd)

    def said(self, key, value=None):
        """True once it was told this."""
        self.hear()
        return any(key in said and value in (None, said[key]) for said in self.told)


class Media:
    """Clients with flows, a transceiver that echoes, and an account of every datagram."""

    CLIENTS = 12

    def __init__(self, site):
        self.site, self.sent, self.back = site, 0, {}
        self.given_up = 0
        """So many of those sent are lost, and nobody waits for them."""
        self.clients = [site.stack.enter_context(bound()) for _ in range(self.CLIENTS)]
        home = ufrag.Cluster(1, ipaddress.ip_network("127.0.0.0/8"), 1, 65535)
        here = ipaddress.ip_address("127.0.0.1"), site.transceiver.getsockname()[1]
        self.headers = {frame.header(*sock.getsockname()) for sock in self.clients}
        # Without the last four octets, where relays may have put a tag.
        waiting = {header[:-4] for header in self.headers}
        for nonce, client in enumerate(self.clients):
            client.connect(("127.0.0.1", site.public))
            hint = ufrag.mint(site.keyring, home, *here, nonce)
            password = ufrag.password(site.keyring, hint)
            client.send(stun.request(os.urandom(12), f"{hint}:x", password))
        deadline = time.monotonic() + PATIENCE_S
        while waiting:
            assert time.monotonic() < deadline, "checks did not arrive"
            select.select([site.transceiver], [], [], 1)
            with contextlib.suppress(BlockingIOError):
                framed, back = site.transceiver.recvfrom(4096)
                waiting.discard(framed[: frame.HEADER_OCTETS - 4])
                site.transceiver.sendto(framed[: frame.HEADER_OCTETS] + b"\x80 hello", back)
        for client in self.clients:
            assert select.select([client], [], [], PATIENCE_S)[0]
            assert client.recv(100) == b"\x80 hello"  # assured
        self.socks = [*self.clients, site.transceiver]
        # What waited for a relay comes at once when it serves again, and more than fits here would
        # be lost in this process, which says nothing of the relay.
        granted = site.transceiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.on_the_way_max = granted // DATAGRAM_OCTETS

    def run(self, until=lambda: True, at_least=40, seconds=PATIENCE_S):
        """Send and echo until something is so; at least so many rounds."""
        deadline = time.monotonic() + seconds
        while at_least > 0 or not until():
            assert time.monotonic() < deadline, self.site.said()
            at_least -= 1
            for client in self.clients:
                if self.sent - len(self.back) - self.given_up >= self.on_the_way_max:
                    break
                with contextlib.suppress(ConnectionRefusedError):
                    client.send(b"\x80 %d" % self.sent)
                    self.sent += 1
            self._pump(0.001)

    def _pump(self, seconds):
        for sock in select.select(self.socks, [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                while True:
                    data, source = sock.recvfrom(4096)
                    if sock is self.site.transceiver:
                        sock.sendto(data, source)
                    else:
                        number = int(data[2:])
                        self.back[number] = self.back.get(number, 0) + 1

    def lost(self, patience_s=PATIENCE_S, count=None):
        """Wait for what is on its way, or until so many are back; returns how many of all that were
        sent did not come back exactly once."""
        deadline, count = time.monotonic() + patience_s, self.sent if count is None else count
        while len(self.back) < count and time.monotonic() < deadline:
            self._pump(0.01)
        return self.sent - len(self.back) + sum(times - 1 for times in self.back.values())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
