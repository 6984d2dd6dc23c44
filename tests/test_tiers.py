"""Two tiers as processes: a worker, a relay or a way is lost under media, and nothing is missing.

An entrance and two relays of a cluster, started as the product starts them but for the keeper.
What only processes show: the kernel's queues, real signals, the clock.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import entrance
import handover
import metrics
import parley
import settings

from . import node, ports

FACE = """
[transit]
listen = "127.0.0.1:{listen}"
internal = "127.0.0.1:{inner}"
relay_prefixes = ["127.0.0.0/8"]
tag = {tag}
"""

LONG_S = 10.0
"""A way that nothing is heard of for so long is lost: no machine is as slow as that, and so what
still counts as lost was lost."""


class Town:
    """An entrance, and the relays behind it; media goes through both tiers."""

    def __init__(self, folder, stack, tag, relays=2, timeout_s=0.5):
        flag = str(tag).lower()
        self.entrance = self._site(folder / "entrance", stack)
        self.relays, ways = [], []
        for number in range(relays):
            site = self._site(folder / f"relay-{number}", stack)
            site.transceiver = self.entrance.transceiver
            site.configure()
            listen, inner = node.free_ports(2), node.free_ports(2)
            add(site, FACE.format(listen=listen, inner=inner, tag=flag))
            ways.append(f"127.0.0.1:{listen}-{listen + 1}")
            self.relays.append(site)
        add(
            self.entrance,
            f"transit = {ways}\n[transit]\ntag = {flag}\ntimeout_s = {timeout_s}\n",
        )
        self.running = [site.start() for site in self.relays]
        self.first = self.entrance.start()
        for each in (*self.running, self.first):
            each.wait("ready")
        self.media = node.Media(self.entrance)

    def _site(self, folder, stack):
        folder.mkdir()
        return node.Site(folder, stack)

    def faces(self, number):
        """The counters, both ways, of a relay's transit faces."""
        found = handover.Running.of(self.relays[number].table).faces
        return [ledger for face in found for ledger in handover.counters_in(face)]

    def forwarded(self, number):
        """Datagrams that went through a relay's transit faces."""
        return sum(each[each.kinds["FORWARDED"]] for each in self.faces(number))

    def ways(self, kind, relay=None):
        """What the entrance's workers have counted of their ways, in all or to one of the relays,
        of which each has two."""
        workers = handover.Running.of(self.entrance.table).workers
        which = slice(None) if relay is None else slice(2 * relay, 2 * relay + 2)
        rows = (entrance.rows_in(each.section("ways"), 4)[which] for each in workers)
        return sum(row[kind] for of_worker in rows for row in of_worker)

    def law(self):
        """Each datagram is in one counter, at all that run."""
        for number, relay in enumerate(self.running):
            if not relay.ended():
                assert all(each.missing() == 0 for each in self.faces(number))


def add(site, text):
    site.config.write_text(site.config.read_text() + text)
    site.table = settings.load(site.config, settings.Relay).relay


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("tag", [False, True], ids=["plain", "tagged"])
def test_workers_of_both_tiers_are_killed_and_nothing_is_lost(tmp_path, stack, tag):
    town = Town(tmp_path, stack, tag, timeout_s=LONG_S)
    media = town.media
    assert all(town.forwarded(number) for number in (0, 1))
    for relay in (*town.running, town.first):
        for pid in relay.children():
            media.run(at_least=20)
            os.kill(pid, signal.SIGKILL)
            media.run(lambda pid=pid, relay=relay: len(set(relay.children()) - {pid}) == 2)
    media.run(at_least=50)
    assert media.lost() == 0
    assert town.ways(metrics.Way.LOST) == 0
    town.law()


def test_a_cluster_relay_is_handed_over_and_nothing_is_lost(tmp_path, stack):
    town = Town(tmp_path, stack, tag=False, timeout_s=LONG_S)
    media, site = town.media, town.relays[0]
    before = town.forwarded(0)
    after = site.start("handover")
    media.run(lambda: after.said("ready") and town.running[0].ended())
    town.running[0] = after
    media.run(at_least=100)
    assert media.lost() == 0
    assert town.forwarded(0) > before  # the same memory, and the same clients
    assert town.ways(metrics.Way.LOST) == 0
    town.law()


def test_a_cluster_relay_is_lost_and_its_clients_go_by_the_other(tmp_path, stack):
    town = Town(tmp_path, stack, tag=True, timeout_s=2.0)
    media = town.media
    town.running[0].kill()
    # Two ways, as two workers find them.
    media.run(lambda: town.ways(metrics.Way.LOST, relay=0) == 4)
    sent, back = media.sent, len(media.back)
    media.given_up = sent - back
    media.run(at_least=200)
    media.lost(count=back + media.sent - sent)
    # What was on its way into the lost one is gone, and nothing that was sent after it was left.
    assert len(media.back) - back >= media.sent - sent > 0
    assert town.ways(metrics.Way.INTRODUCED) > 0
    town.law()
    found = [each.drops() for each in town.faces(1)]
    assert not any(found), found


def test_a_face_whose_memory_does_not_fit_brings_its_flows_over(tmp_path, stack):
    """Another number of flows: nothing that waited in its sockets meanwhile is lost."""
    town = Town(tmp_path, stack, tag=True, timeout_s=LONG_S)
    media, site = town.media, town.relays[0]
    text = site.config.read_text()
    site.config.write_text(text.replace("workers = 2", "workers = 2\nflows_max = 9000"))
    site.table = settings.load(site.config, settings.Relay).relay
    after = site.start("handover")
    media.run(lambda: after.said("ready") and town.running[0].ended())
    town.running[0] = after
    media.run(at_least=100)
    assert media.lost() == 0
    assert after.said("flows brought over")
    town.law()


def test_an_operator_is_told_of_ways_and_a_site_without_any_is_not_ready(tmp_path, stack):
    """The real program, with its keeper: its log, and /readyz."""
    keyfile = tmp_path / "keys"
    keyfile.write_text("1 " + "11" * 32 + "\n")
    keyfile.chmod(0o600)
    listen, public, internal = (node.free_ports(1) for _ in range(3))
    (metrics_port,) = ports.free(1)
    config = tmp_path / "relay.toml"
    config.write_text(
        node.CONFIG.format(
            host="127.0.0.1",
            public=public,
            internal=internal,
            workers=1,
            transceiver=9,
            more=f'metrics = "127.0.0.1:{metrics_port}"',
        )
        + f"transit = ['127.0.0.1:{listen}']\n"
    )
    found = settings.load(config, settings.Relay)
    tags = parley.Tags(found.keys.load(), False)
    answering = stack.enter_context(node.bound("127.0.0.1", listen))
    with (tmp_path / "log").open("wb") as log:
        relay = subprocess.Popen(
            [sys.executable, "-P", "-m", "relay", "run", "--config", str(config)],
            stdout=log,
            stderr=log,
        )
    stack.callback(relay.wait)
    stack.callback(relay.kill)

    def ready():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/readyz") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return None

    def until(what, answers=True):
        deadline = time.monotonic() + node.PATIENCE_S
        while not what():
            assert time.monotonic() < deadline and relay.poll() is None, (
                tmp_path / "log"
            ).read_text()
            if select.select([answering], [], [], 0.05)[0]:
                probe, source = answering.recvfrom(2048)
                said = tags.read(probe[:32], probe[32:])
                if answers and said:
                    answering.sendto(tags.answer(said, False), source)

    said = (tmp_path / "log").read_text
    until(lambda: ready() == 200)
    until(lambda: "does not answer" in said(), answers=False)
    until(lambda: "no way to cluster 1" in str(ready()), answers=False)
    until(lambda: "answers again" in said())
    until(lambda: ready() == 200)
    relay.send_signal(signal.SIGINT)
