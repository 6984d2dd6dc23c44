"""Virtual addresses, in network namespaces that the tests make for themselves."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import host

from . import node
from .alone import REASON, child, joined, unshare

pyroute2 = pytest.importorskip("pyroute2", reason="needs pyroute2")

PATIENCE_S = 20
FOUR, SIX = ipaddress.ip_address("203.0.113.5"), ipaddress.ip_address("2001:db8::5")
BOTH = [FOUR, SIX]
PORT = 3478

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


def inside(work):
    """Run the coroutine function `work` where there is nothing but a loopback interface."""

    def alone():
        unshare()
        asyncio.run(prepared(work))

    joined(*child(alone))


async def prepared(work):
    async with pyroute2.AsyncIPRoute() as routes:
        await routes.link("set", index=1, state="up")
        await work(routes)


async def addresses(routes):
    return {entry.get("address") async for entry in await routes.addr("dump", index=1)}


async def marked_routes(routes):
    return {
        entry.get("dst")
        async for entry in await routes.route("dump", table=255)
        if entry.get("proto") == host.ADDRESS_MARK
    }


def test_it_comes_and_goes():
    async def work(routes):
        before = await addresses(routes)
        assert await host.announce_addresses(BOTH, "lo") == BOTH
        assert await addresses(routes) == before | set(map(str, BOTH))
        assert await marked_routes(routes) == set(map(str, BOTH))
        assert await host.announce_addresses(BOTH, "lo") == []
        assert await host.withdraw_addresses(BOTH, "lo") == BOTH
        assert await host.withdraw_addresses(BOTH, "lo") == []
        assert await addresses(routes) == before
        assert await marked_routes(routes) == set(map(str, BOTH)), "what arrives is still served"
        assert await host.announce_addresses([FOUR], "lo") == [FOUR]
        await host.release_addresses(BOTH, "lo")
        await host.release_addresses(BOTH, "lo")
        assert await addresses(routes) == before
        assert await marked_routes(routes) == set()

    inside(work)


def test_what_somebody_else_added_stays():
    async def work(routes):
        await routes.addr("add", index=1, address=str(FOUR), prefixlen=32)
        assert await host.announce_addresses(BOTH, "lo") == [SIX]
        assert await host.withdraw_addresses(BOTH, "lo") == [SIX]
        await host.release_addresses(BOTH, "lo")
        assert str(FOUR) in await addresses(routes)

    inside(work)


def test_the_next_process_knows_whose_it_is():
    async def work(routes):
        joined(*child(lambda: asyncio.run(host.announce_addresses(BOTH, "lo"))))
        assert await host.withdraw_addresses(BOTH, "lo") == BOTH

    inside(work)


def test_an_ipv6_address_is_no_source_of_other_connections():
    async def work(routes):
        await host.announce_addresses(BOTH, "lo")
        (entry,) = [
            each
            async for each in await routes.addr("dump", index=1)
            if each.get("address") == str(SIX)
        ]
        assert entry.get("cacheinfo")["ifa_preferred"] == 0

    inside(work)


def test_an_interface_that_is_not_there():
    async def work(routes):
        with pytest.raises(OSError, match="there is no interface dummy7"):
            await host.announce_addresses(BOTH, "dummy7")

    inside(work)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give its rights up")
def test_without_the_right_to_it():
    async def work(routes):
        os.setuid(65534)
        with pytest.raises(PermissionError):
            await host.announce_addresses(BOTH, "lo")

    inside(work)


def bound(address):
    """A relay's public socket, bound before its address is there."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
    sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
    sock.bind((str(address) if address.version == 6 else f"::ffff:{address}", PORT))
    sock.settimeout(PATIENCE_S)
    return sock


def client_of(commands, answers):
    """Another host: for each address on `commands`, one datagram there, and who answered."""
    unshare()
    os.write(answers, b"+")
    os.read(commands, 1)  # the link is here
    with pyroute2.IPRoute() as routes:
        (index,) = routes.link_lookup(ifname="client")
        routes.addr("add", index=index, address="10.9.0.1", prefixlen=24)
        routes.addr("add", index=index, address="fd09::1", prefixlen=64, flags=2)
        routes.link("set", index=index, state="up")
        routes.route("add", dst=f"{FOUR}/32", gateway="10.9.0.2")
        routes.route("add", dst=f"{SIX}/128", gateway="fd09::2", family=socket.AF_INET6)
    os.write(answers, b"+")
    socks = {
        b"4": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        b"6": socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
    }
    while (wanted := os.read(commands, 1)) in socks:
        sock, to = socks[wanted], str(FOUR if wanted == b"4" else SIX)
        sock.settimeout(0.2)
        heard = None
        for _ in range(100):  # a new link drops what comes before it has found its neighbour
            sock.sendto(b"hello", (to, PORT))
            with contextlib.suppress(TimeoutError):
                heard = sock.recvfrom(64)
                break
        assert heard is not None, f"{to} does not answer"
        assert heard[0] == b"HELLO" and heard[1][:2] == (to, PORT)
        with contextlib.suppress(BlockingIOError):  # answers to repetitions
            sock.setblocking(False)
            while sock.recv(64):
                pass
        os.write(answers, b"+")


def test_flows_are_served_after_the_address_has_gone():
    async def work(routes):
        commands, command = os.pipe()
        answer, answers = os.pipe()

        def other_host():
            os.close(command)  # so that it ends with this process, whatever happens
            client_of(commands, answers)

        pid, said = child(other_host)
        os.close(commands)
        os.close(answers)

        async def heard():
            loop = asyncio.get_running_loop()
            ready = loop.create_future()
            loop.add_reader(answer, lambda: ready.done() or ready.set_result(os.read(answer, 1)))
            async with asyncio.timeout(PATIENCE_S):
                octet = await ready
            loop.remove_reader(answer)
            if not octet:
                joined(pid, said)
            assert octet == b"+"

        await heard()
        await routes.link(
            "add",
            ifname="relay",
            kind="veth",
            peer={"ifname": "client", "net_ns_pid": pid},
        )
        (index,) = await routes.link_lookup(ifname="relay")
        await routes.addr("add", index=index, address="10.9.0.2", prefixlen=24)
        await routes.addr("add", index=index, address="fd09::2", prefixlen=64, flags=2)
        await routes.link("set", index=index, state="up")
        os.write(command, b"+")
        await heard()
        socks = {b"4": bound(FOUR), b"6": bound(SIX)}
        loop = asyncio.get_running_loop()
        for sock in socks.values():
            loop.add_reader(sock, lambda sock=sock: echo(sock))

        async def answered():
            for family in socks:
                os.write(command, family)
                await heard()

        await host.announce_addresses(BOTH, "lo")
        await answered()
        assert await host.withdraw_addresses(BOTH, "lo") == BOTH
        await answered()
        await host.announce_addresses(BOTH, "lo")
        await answered()
        os.close(command)
        joined(pid, said)

    def echo(sock):
        datagram, client = sock.recvfrom(64)
        sock.sendto(datagram.upper(), client)

    inside(work)


class Program:
    """The relay at a virtual address, as a program in a namespace that has nothing else."""

    def __init__(self, site, *words, manager=None):
        self.log = site.folder / "log"
        environment = {**os.environ, "NOTIFY_SOCKET": str(manager.path)} if manager else None
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "relay", *words, "--config", site.config],
                stderr=log,
                env=environment,
            )
        site.stack.callback(self.process.kill)
        self.manager = manager

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            if self.manager:
                self.manager.hear()
            time.sleep(0.01)

    def ends(self, number=signal.SIGINT):
        self.process.send_signal(number)
        self.until(lambda: self.process.poll() is not None)
        assert self.process.returncode == 0


def test_it_stays_where_another_relay_takes_over(tmp_path):
    """A restart through a descriptor store, and a handover: what is sent to it is not refused."""

    def story():
        unshare()
        with contextlib.ExitStack() as stack, pyroute2.IPRoute() as routes:
            routes.link("set", index=1, state="up")
            site, manager = node.Site(tmp_path, stack), node.Manager(tmp_path, stack)
            site.configure(more=f'metrics = "127.0.0.1:0"\n[vip]\naddresses = ["{FOUR}"]')
            text = site.config.read_text()
            site.config.write_text(text.replace('public = "127.0.0.1:', f'public = "{FOUR}:'))

            def here():
                dump = routes.addr("dump", index=1)
                return str(FOUR) in {entry.get("address") for entry in dump}

            first = Program(site, "run", manager=manager)
            first.until(here)
            first.until(lambda: b"ready:" in first.log.read_bytes())
            first.ends()
            assert here(), "systemd restarts it"
            while manager.held:
                os.close(manager.held.pop()[1])
            second = Program(site, "run")
            second.until(lambda: b"ready:" in second.log.read_bytes())
            third = Program(site, "handover")
            gone = []
            third.until(lambda: gone.append(not here()) or second.process.poll() is not None)
            assert not any(gone) and here() and second.process.returncode == 0
            third.ends()
            assert not here(), "nobody is left"
            last = Program(site, "run", manager=manager)
            last.until(here)
            last.ends(signal.SIGTERM)
            assert not here(), "it was drained"

    joined(*child(story))
