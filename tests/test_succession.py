"""One relay takes over from another that runs: real processes, real signals, media all the while.

Whatever goes wrong in between, one of the two has workers, and no datagram is lost.
"""

import contextlib
import json
import os
import signal
import socket
from types import SimpleNamespace

import pytest

import handover
import succession
import supervisor

from . import node


@pytest.fixture
def site(tmp_path):
    with contextlib.ExitStack() as stack:
        yield node.Site(tmp_path, stack)


@pytest.fixture
def first(site):
    """A relay that runs."""
    first = site.start()
    first.wait("ready")
    return first


@pytest.fixture
def media(site, first):
    """Its clients, whose flows are there."""
    media = node.Media(site)
    media.run()
    return media


def account(site, media, flows):
    """Media goes on, nothing was lost, and the flows are what they were."""
    media.run()
    assert media.lost() == 0
    assert site.flows() == flows


def test_relays_take_over_in_turns(site, first, media):
    flows, running = site.flows(), first
    for _ in range(3):
        heir = site.start("handover")
        media.run(lambda heir=heir, before=running: heir.said("ready") and before.ended())
        assert running.code() == supervisor.Exit.STOPPED
        running = heir
    account(site, media, flows)
    running.send(signal.SIGINT)
    assert running.code() == 0
    assert not list((site.folder / "state").iterdir())


def test_the_one_that_ends_takes_nothing_from_its_successor(tmp_path):
    """Whenever the successor comes to listen while the other one ends, there is somebody for the
    next one. (A look at whose socket it is, and then an unlink, took the successor's away.)"""
    path = tmp_path / "relay.sock"

    def testator():
        loop = SimpleNamespace(watch=lambda *_: None, unwatch=lambda *_: None)
        return succession.Testator(path, SimpleNamespace(loop=loop), list)

    old, new = testator(), testator()
    old.listen()
    old.succeeded = True
    old.close()
    assert path.is_socket()  # for the successor to replace
    with pytest.raises(succession.SuccessionError, match="no relay of this configuration"):
        succession.Successor(path)
    new.listen()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as asks:
        asks.connect(str(path))
    new.close()
    assert not path.exists()  # nobody has succeeded it


def test_there_is_no_relay(site):
    heir = site.start("handover")
    assert heir.code() == supervisor.Exit.SUCCESSION
    assert heir.said("no relay of this configuration is running")


@pytest.mark.parametrize(
    ("fault", "stopped"), [("prepared", False), ("done", True), ("worker", True), ("serving", True)]
)
def test_a_successor_that_dies_changes_nothing(site, first, media, fault, stopped):
    flows, workers = site.flows(), first.children()
    heir = site.start("handover", FAULT=fault)
    media.run(lambda: heir.ended() and first.said("does not take over"))
    assert heir.code() == (supervisor.Exit.WORKER if fault == "worker" else -signal.SIGKILL)
    media.run(lambda: len(first.children()) == 2)
    assert (first.children() != workers) == stopped
    account(site, media, flows)
    # And the next one can take over.
    heir = site.start("handover")
    media.run(lambda: heir.said("ready") and first.ended())
    account(site, media, flows)


def test_a_silent_successor_is_killed(site, tmp_path):
    first = site.start(SERVE_S_MAX="0.5")
    first.wait("ready")
    media = node.Media(site)
    flows = site.flows()
    heir = site.start("handover", FAULT="silent at done")
    media.run(lambda: first.said("does not take over: it is silent"))
    assert heir.code() == -signal.SIGKILL
    account(site, media, flows)


def test_a_silent_successor_before_it_matters_is_left_alone(site):
    first = site.start(ANSWER_S_MAX="0.2")
    first.wait("ready")
    with peer(site):
        first.wait("does not take over: it is silent")
    assert len(first.children()) == 2


@pytest.mark.parametrize("moment", ["prepared", "done"])
def test_a_relay_that_dies_leaves_all_to_its_successor(site, first, media, moment):
    flows = site.flows()
    heir = site.start("handover")
    media.run(lambda: heir.said(f"at {moment}"))
    first.send(signal.SIGKILL)
    media.run(lambda: heir.said("ready"))
    account(site, media, flows)
    assert len(heir.children()) == 2


def test_a_relay_that_is_told_to_stop_in_the_middle(site, first, media):
    """SIGINT is for the one that got it: its successor goes on."""
    flows = site.flows()
    heir = site.start("handover")
    media.run(lambda: heir.said("at done"))
    first.send(signal.SIGINT)
    media.run(lambda: heir.said("ready") and first.ended())
    account(site, media, flows)


@contextlib.contextmanager
def peer(site):
    """Whoever else speaks to the relay's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(node.PATIENCE_S)
        with succession._short(site.control) as name:
            sock.connect(name)
        yield sock


def say(sock, **said):
    sock.send(json.dumps(said).encode())


def hear(sock):
    data, fds, _, _ = socket.recv_fds(sock, 65536, 253)
    for fd in fds:
        os.close(fd)
    return json.loads(data) if data else None


@pytest.mark.parametrize(
    "words",
    [
        [b"x"],
        [b"[]"],
        [b"{}"],
        [b"\xff" * 1000],
        [b'{"say": "go"}'],
        [b'{"say": "serving"}'],
        [b'{"say": "hand over"}'],
        [b'{"say": "hand over", "version": 1}', b"x"],
        [b'{"say": "hand over", "version": 1}', b'{"say": "serving"}'],
        [b'{"say": "hand over", "version": 1}', b'{"say": "go"}', b'{"say": "go"}'],
        [b'{"say": "hand over", "version": 1}', b'{"say": "go"}', b"x"],
    ],
)
def test_nonsense_ends_nothing(site, first, media, words):
    flows, pid = site.flows(), first.pid
    # A process of its own: one that breaks the rules after "go" is killed.
    child = os.fork()
    if not child:
        with peer(site) as sock:
            for word in words:
                sock.send(word)
                hear(sock)
            while hear(sock):
                pass
        os._exit(0)
    media.run(lambda: first.said("does not take over"))
    os.waitpid(child, 0)
    media.run(lambda: len(first.children()) == 2)
    assert first.pid == pid
    account(site, media, flows)


def test_who_may_take_over(site, first, media):
    assert site.control.stat().st_mode & 0o777 == 0o600
    with peer(site) as sock:
        say(sock, say="hand over", version=1)
        assert hear(sock)["say"] == "descriptors"
        with peer(site) as second:
            assert hear(second) == {"say": "refused", "why": "another one is taking over"}
    first.wait("does not take over: it is gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as somebody else")
def test_somebody_else_may_not(site, first):
    site.control.chmod(0o666)
    for folder in site.control.parents:
        if not folder.stat().st_mode & 0o001:  # the test's own, however deep
            folder.chmod(folder.stat().st_mode | 0o011)
    said, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            with peer(site) as sock:
                os.write(say, json.dumps(hear(sock)).encode())
        finally:
            os._exit(0)
    os.close(say)
    os.waitpid(child, 0)
    assert b"only root and the user of this relay" in os.read(said, 1000)
    os.close(said)


def test_a_relay_that_drains_hands_nothing_over(site, tmp_path):
    first = site.start(DRAIN=str(tmp_path / "drained"))
    first.wait("ready")
    first.send(signal.SIGTERM)
    first.wait("draining on SIGTERM")
    heir = site.start("handover")
    assert heir.code() == supervisor.Exit.SUCCESSION
    assert heir.said("this relay is draining")
    (tmp_path / "drained").touch()
    first.wait("ended")


def test_a_managed_relay_is_restarted_by_its_manager(site, tmp_path):
    manager = node.Manager(tmp_path, site.stack)
    first = site.start(manager=manager)
    first.wait("ready")
    heir = site.start("handover")
    assert heir.code() == supervisor.Exit.SUCCESSION
    assert heir.said("a service manager runs this relay")


def test_many_descriptors_take_several_messages(tmp_path, monkeypatch):
    """768 of them, as 256 workers have; the other side gets all of them with their names."""
    monkeypatch.setattr(succession, "DESCRIPTORS_MAX", 100)
    named = [(f"memory-{n}", os.memfd_create(f"test-{n}")) for n in range(250)]
    runs = supervisor.Supervisor([], lambda *_: 0, succession._log)
    runs._announced = True
    testator = succession.Testator(tmp_path / "relay.sock", runs, lambda: named)
    testator.listen()
    child = os.fork()
    if not child:
        heir = succession.Successor(tmp_path / "relay.sock")
        left = heir.estate._left
        names = {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in left}
        right = all(f"memfd:test-{name.partition('-')[2]} " in names[name] for name, _ in named)
        os._exit(0 if len(left) == 250 and right else 1)
    runs.loop.turn()  # it comes
    runs.loop.turn()  # it asks
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    testator.close()
    for _, fd in named:
        os.close(fd)


def test_the_socket_may_lie_deep(tmp_path):
    """struct sockaddr_un holds 108 octets, a state folder may be longer."""
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    runs = supervisor.Supervisor([], lambda *_: 0, succession._log)
    testator = succession.Testator(folder / "relay.sock", runs, list)
    testator.listen()
    assert (folder / "relay.sock").is_socket()
    testator.close()
    assert not list(folder.iterdir())


def test_handing_over_has_a_layout():
    assert handover.LAYOUT in node.handover.legacy.READERS
