"""What the relay loses when something of it dies, restarts or changes under load: nothing.

For bench.py. Each part runs media both ways, does its worst to the relay while it runs, goes on for
`Setting.after_s`, and holds the account of every datagram against the relay's own counters.
"""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from load import PATIENCE_S, Account, Figures, Load
from rig import Relay, Setting, kernel_drops

# --- media, before, during and after --------------------------------------------------------------


@dataclass
class Scene:
    """Media that runs through a relay, and what happened meanwhile."""

    load: Load
    figures: Figures
    moments: list[int] = field(default_factory=list)
    """When something was done, in nanoseconds of CLOCK_MONOTONIC."""
    account: Account | None = None
    """There once the scene is over."""

    def happens(self) -> None:
        """Now."""
        self.moments.append(time.monotonic_ns())

    def held_ms(self) -> list[float]:
        """For each of the moments: how long the datagram that waited longest was held up."""
        assert self.account is not None  # the scene is over
        starts = [at - 20_000_000 for at in self.moments]  # also what was on its way then
        ends = [*starts[1:], 1 << 62]
        return [
            round(self.account.held_ms(start, end), 1)
            for start, end in zip(starts, ends, strict=True)
        ]


@contextlib.contextmanager
def media(setting: Setting, relay: Relay, seconds: float) -> Iterator[Scene]:
    """Media both ways; the block has `seconds` at the most to disturb it. When the block has been
    left, that of `after_s` follows, the scene has its account, and all that must hold is judged."""
    figures: Figures = {"rate_per_s": setting.rate, "clients": setting.clients}
    with Load(setting.clients) as load:
        load.towards(relay.address, relay.public)
        load.open(setting.firsts(setting.clients, load.port))
        before = relay.flows()
        load.begin(setting.rate, seconds + setting.after_s + PATIENCE_S)
        load.run(0.5)
        scene = Scene(load, figures)
        yield scene
        load.run(setting.after_s)
        scene.account = account = load.settle()
        after, law = relay.flows(), relay.law()
        figures |= account.figures()
        figures["kernel_drops"] = relay.kernel_drops() + kernel_drops(load.ports)
        figures |= {"flows_before": len(before), "flows_after": len(after)}
        figures["law"] = law | {"sent_by_clients": load.datagrams}
    judge(setting, figures)
    setting.must(after == before, "the flows are not what they were")


def judge(setting: Setting, figures: Figures) -> None:
    """What must hold of any figures of media."""
    for name in ("lost", "duplicated", "foreign"):
        count, sent = figures[name], figures["sent"]
        setting.must(not count, f"{count} of {sent} datagrams are {name}")
    law = figures["law"]
    setting.must(not law["missing"], f"{law['missing']} datagrams are in no counter of the relay")
    received, sent = law["received"], law["sent_by_clients"]
    setting.must(received == sent, f"the relay counts {received} received, {sent} were sent")


# --- kill -----------------------------------------------------------------------------------------

KILLS, KILLS_IN_A_ROW = 6, 4
"""Of each worker; then of the first one, so that the delay of restarts is felt."""

YOUNG_S = 5.2
"""A worker that lives for so long is replaced without a delay (supervisor.py)."""

_SERVES_AGAIN = re.compile(r"worker (\d+) serves again after (\d+(?:\.\d+)?) ms")
_FINISHED = re.compile(r"worker \d+ finished (\d+) datagrams that its predecessor held")


def kill(setting: Setting) -> Figures:
    """kill -9 of each worker, several times, at moments that the seed chose."""
    return {f"workers_{n}": _kill(setting, n) for n in ((1,) if setting.quick else (1, 2))}


def _kill(setting: Setting, workers: int) -> Figures:
    chance = random.Random(setting.seed)
    kills, pause_s = (1, 0.1) if setting.quick else (KILLS, YOUNG_S / workers)
    order = list(range(workers)) * kills
    rapid = 2 if setting.quick else KILLS_IN_A_ROW
    with Relay(setting, workers) as relay:
        seconds = (len(order) + rapid) * (1.5 * pause_s + 1)
        with media(setting, relay, seconds) as scene:
            for turn, number in enumerate([*order, *[0] * rapid]):
                scene.load.run(chance.uniform(1, 1.3) * pause_s if turn < len(order) else 0.1)
                pid = relay.worker_pids()[number]
                if turn % 4:  # three of four in the middle of its work
                    _amid_work(scene.load, chance)
                os.kill(pid, signal.SIGKILL)
                scene.happens()
                replaced = len(scene.moments)
                scene.load.run(PATIENCE_S, lambda n=replaced: len(_served(relay)) >= n)  # type: ignore[misc]
        served = _served(relay)
        finished = list(map(int, _FINISHED.findall(relay.log())))
    kills = len(scene.moments)
    setting.must(len(served) == kills, f"the log has {len(served)} take-overs, not {kills}")
    scene.figures["finished_for_the_dead"] = sum(finished)
    scene.figures["kills"] = [
        {"worker": int(number), "taken_over_ms_log": float(ms), "held_ms": held}
        for (number, ms), held in zip(served, scene.held_ms(), strict=False)
    ]
    lost, times = scene.figures["lost"], f"{kills} kills, {len(finished)} with a batch in hand"
    setting.say(f"{workers} worker(s), {times}: {lost} lost of {scene.figures['sent']}")
    return scene.figures


def _amid_work(load: Load, chance: random.Random) -> None:
    """Give the relay some batches at once, and come back at a moment in which it is at them."""
    for _ in range(chance.randint(1, 4)):
        load.burst()
    until = time.monotonic_ns() + chance.randint(0, 150_000)
    while time.monotonic_ns() < until:  # sleeping would take longer than all of its work
        pass


def _served(relay: Relay) -> list[tuple[str, str]]:
    return _SERVES_AGAIN.findall(relay.log())


PARTS: dict[str, Callable[[Setting], Figures]] = {"kill": kill}
"""By the name that the command line knows them by."""
