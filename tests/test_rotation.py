"""A key's life under load, from the relay's first sight of it to its retirement; broken reloads.

The relay is the program; calls go on all the while, each of their datagrams has a number, and none
may be missing at the end.
"""

import contextlib
import os
import signal

import pytest

import metrics
import ufrag

from . import siege

IN = metrics.Inbound
CALLS, RATE, ROOM_S = 20, 1_000, 90.0
KEYS = {number: f"{number} " + f"{number}{number}" * 32 + "\n" for number in (1, 2)}
READ_AGAIN, REFUSED = (
    "configuration read again: keys",
    "going on with the configuration from before",
)


class Scene:
    """A relay that knows one key, and calls that are under way."""

    def __init__(self, folder, stack):
        self.stack, self.keys = stack, folder / "keys"
        self.relay = siege.Relay(folder, stack)
        self.rings = {number: ufrag.Keyring.parse(text) for number, text in KEYS.items()}
        self.calls = []
        self.write(KEYS[1])
        self.reload()

    def write(self, text, mode=0o600):
        """As an operator should: whoever reads the file finds all of it."""
        fresh = self.keys.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(mode)
        fresh.replace(self.keys)

    def reload(self, answer=READ_AGAIN):
        """SIGHUP, and media until it has been answered."""
        before = self.relay.said(answer), self.relay.said(" reloaded")
        os.kill(self.relay.process.pid, signal.SIGHUP)

        def done():
            now = self.relay.said(answer), self.relay.said(" reloaded")
            return all(after > earlier for after, earlier in zip(now, before, strict=True))

        assert siege.together(self.calls, siege.PATIENCE_S, done), self.relay.log
        siege.together(self.calls, 0.2)

    def call(self, key, at):
        """Open calls under a key, at a transceiver of their own; their media begins."""
        live = self.stack.enter_context(siege.Live(self.relay, CALLS, at, tuple(self.calls)))
        hints = live.hints(self.rings[key])
        # With the password that the key gives, whatever keys the relay has.
        live.checks = [
            self.relay.check(hint, ufrag.password(self.rings[key], hint)) for hint in hints
        ]
        live.open(live.checks)
        live.begin(RATE, ROOM_S)
        self.calls.append(live)
        siege.together(self.calls, 0.2)
        return live

    def refused(self, key, count=10):
        """First checks of clients that the relay does not know, none of which goes through."""
        inbound, _ = self.relay.counters()
        before, strange = inbound.drops().get("ufrag_unknown_key", 0), self.strange()
        home, here = self.relay.home, self.relay.home.address(0x7F000001)
        for nonce in range(count):
            hint = ufrag.mint(self.rings[key], home, here, self.relay.port, 9_000 + nonce)
            password = ufrag.password(self.rings[key], hint)
            self.relay.client().send(self.relay.check(hint, password))

        def counted():
            inbound, _ = self.relay.counters()
            return inbound.drops().get("ufrag_unknown_key", 0) == before + count

        assert siege.together(self.calls, siege.PATIENCE_S, counted)
        assert self.strange() == strange
        return count

    def strange(self):
        return sum(each.strange for each in self.calls)

    def end(self, **drops):
        """No datagram of any call is missing, and nothing was dropped but these."""
        enough = 0.5 * RATE
        siege.together(
            self.calls, siege.PATIENCE_S, lambda: all(each.count > enough for each in self.calls)
        )
        for each in self.calls:
            account = each.settle()
            assert account.lost == account.duplicated == account.foreign == 0, account.figures()
            assert account.sent > enough
        inbound, outbound = self.relay.stop()
        assert (inbound.drops(), outbound.drops()) == (drops, {})
        log = "\n".join(self.relay.log)
        assert "11" * 32 not in log and "22" * 32 not in log


@pytest.fixture
def scene(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Scene(tmp_path, stack)


def test_a_key_from_mint_to_retirement(scene):
    old = scene.call(1, "127.0.0.1")
    early = scene.refused(2)  # minted before the relays had it
    scene.write(KEYS[1] + KEYS[2])
    scene.reload()
    scene.call(1, "127.0.0.2")
    scene.call(2, "127.0.0.3")
    scene.write(KEYS[2])
    scene.reload()
    late = scene.refused(1)
    scene.call(2, "127.0.0.4")
    # Who is here goes on: media, and the checks with which a client shows that it still listens.
    checked = old.checked
    for client in range(CALLS):
        old.first(client, old.checks[client])
    siege.together(scene.calls, siege.PATIENCE_S, lambda: old.checked >= checked + CALLS)
    assert old.checked == checked + CALLS
    assert len(scene.relay.flows()) == len(scene.calls) * CALLS
    scene.end(ufrag_unknown_key=early + late)


BROKEN = {
    "others may read the keys": lambda scene: scene.write(KEYS[2], 0o644),
    "a key that is none": lambda scene: scene.write(KEYS[1] + "2 not a key\n"),
    "no key at all": lambda scene: scene.write("# later\n"),
    "no key file": lambda scene: scene.keys.unlink(),
    "a configuration that is none": lambda scene: scene.relay.config.write_text("nonsense"),
    "a key that is unknown": lambda scene: scene.relay.config.write_text(
        scene.relay.config.read_text().replace("[keys]", "[keys]\ncolour = 7")
    ),
}


def test_what_cannot_be_read_changes_nothing(scene):
    scene.call(1, "127.0.0.1")
    configuration, pid, drops = scene.relay.config.read_text(), scene.relay.worker(), 0
    for number, (what, breaks) in enumerate(BROKEN.items(), 1):
        breaks(scene)
        scene.reload(REFUSED)
        errors = [line for line in scene.relay.log if " ERROR " in line]
        assert len(errors) == number and REFUSED in errors[-1], what
        assert scene.relay.worker() == pid, what  # nobody was replaced
        drops += scene.refused(2, 2)
        scene.write(KEYS[1])
        scene.relay.config.write_text(configuration)
    scene.call(1, "127.0.0.2")
    # And what can be read is read.
    scene.write(KEYS[1] + KEYS[2])
    scene.reload()
    assert scene.relay.worker() != pid
    scene.call(2, "127.0.0.3")
    scene.end(ufrag_unknown_key=drops)
