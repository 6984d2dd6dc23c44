"""What the relay loses when something of it dies, restarts or changes under load: nothing.

For bench.py. Each part runs media both ways, does its worst to the relay while it runs, goes on for
`Setting.after_s`, and holds the account of every datagram against the relay's own counters.
"""

import contextlib
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import dev
import numpy as np
import numpy.typing as npt
from load import PATIENCE_S, Account, Figures, Load
from rig import READY_LINE, Relay, Setting, Skip, children, end, kernel_drops, spawn

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
        load.run(0.5, relay.service)
        scene = Scene(load, figures)
        yield scene
        load.run(setting.after_s, relay.service)
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


# --- reload, handover, restart --------------------------------------------------------------------

TIMES, PAUSE_S = 5, 2.0
"""How often each of them is done, and the media in between."""


def reload(setting: Setting) -> Figures:
    """SIGHUP: keys and settings are read anew, the workers replaced one after the other."""
    with Relay(setting, workers=2) as relay:

        def once(scene: Scene) -> bool:
            before = set(relay.worker_pids())
            scene.happens()
            relay.process.send_signal(signal.SIGHUP)
            return scene.load.run(PATIENCE_S, lambda: _replaced(relay, before))

        return _several(setting, relay, once)


def _replaced(relay: Relay, before: set[int]) -> bool:
    """True when other processes do the work of those before."""
    if before & set(children(relay.process.pid)):  # asked every millisecond: the cheap one first
        return False
    return len(relay.workers_now()) == relay.workers


def handover(setting: Setting) -> Figures:
    """`relay handover`: another process takes sockets and memory from the one that runs."""
    with Relay(setting, workers=2) as relay:
        return _several(setting, relay, lambda scene: _succeeded(relay, scene, "handover"))


def restart(setting: Setting) -> Figures:
    """What `systemctl restart` does, with a stand-in that keeps descriptors as systemd does."""
    with Relay(setting, workers=2, with_store=True) as relay:
        relay.service()
        assert relay.store is not None
        setting.must(bool(relay.store.held), "this relay stores no descriptors")

        def once(scene: Scene) -> bool:
            scene.happens()
            relay.process.send_signal(RESTART_SIGNAL)
            over = scene.load.run(PATIENCE_S, lambda: relay.service() or relay.ended())
            return over and _succeeded(relay, scene, "run")

        figures = _several(setting, relay, once)
        figures["descriptors_stored"] = len(relay.store.held)
        return figures


RESTART_SIGNAL = signal.SIGTERM
"""What systemd sends. The relay measured here has drain_s = 0: it stops, it does not drain."""


def _succeeded(relay: Relay, scene: Scene, command: str) -> bool:
    """Start a successor; True once it is ready and its predecessor has ended."""
    if command == "handover":
        scene.happens()
    times, before = relay.log().count(READY_LINE), relay.process
    relay.process = relay.start(command)
    ready = scene.load.run(
        PATIENCE_S,
        lambda: (
            relay.service() or (relay.log().count(READY_LINE) > times and before.poll() is not None)
        ),
    )
    end(before)
    if ready:
        relay.attach()
    return ready


def _several(setting: Setting, relay: Relay, once: Callable[[Scene], bool]) -> Figures:
    """Do something several times under load; `once` says whether it has been done."""
    times, pause_s = (1, 0.3) if setting.quick else (TIMES, PAUSE_S)
    with media(setting, relay, times * (pause_s + PATIENCE_S)) as scene:
        for _ in range(times):
            if not once(scene):
                raise dev.StartError(f"it was not done in time: {relay.log()[-2000:]}")
            scene.load.run(pause_s, relay.service)
    figures, held = scene.figures, scene.held_ms()
    figures["gaps_ms"] = held
    setting.say(f"{times} times: {figures['lost']} lost of {figures['sent']}, gaps {held} ms")
    return figures


# --- recovery -------------------------------------------------------------------------------------

RECOVERY_CLIENTS, RECOVERY_ROUNDS = 200, 5
PER_S = 50
"""Datagrams of a live flow in a second."""


def recovery(setting: Setting) -> Figures:
    """All clients of one relay arrive at another one, which has never heard of them, at a random
    moment, and send no STUN: time from a client's first datagram to the first that comes back."""
    binary = dev.redis_binary()
    if binary is None:
        raise Skip("there is no redis-server")
    clients, rounds = (20, 1) if setting.quick else (RECOVERY_CLIENTS, RECOVERY_ROUNDS)
    chance, waits, total = random.Random(setting.seed), [], Counter[str]()
    with redis(setting, binary) as (url, flows_written):
        for turn in range(1, rounds + 1):
            after_s = setting.after_s if turn == rounds else 2.0
            with two_relays(setting, url) as (first, second), Load(clients) as load:
                load.towards(first.address, first.public)
                load.open(setting.firsts(clients, load.port))
                load.begin(clients * PER_S, after_s + PATIENCE_S)
                wanted = clients * turn
                load.run(PATIENCE_S / 2, lambda n=wanted: flows_written() >= n)  # type: ignore[misc]
                found = flows_written()
                setting.must(found >= wanted, f"{found} flows are in Redis, not {wanted}")
                load.run(chance.uniform(0.1, 0.5))
                switched = load.count
                load.towards(second.address, second.public)
                load.run(after_s)
                account = load.settle()
                waits.append(_waits_ms(account, switched, clients))
                total.update(_recovered(setting, load, account, first, second))
    ms = np.concatenate(waits)
    figures: Figures = {"clients": clients, "rounds": rounds, "rate_a_client_per_s": PER_S}
    p50, p99, most = (round(float(np.percentile(ms, each)), 1) for each in (50, 99, 100))
    figures["first_back_ms"] = {"p50": p50, "p99": p99, "max": most, "of": len(ms)}
    setting.must(bool(np.isfinite(ms).all()), "clients got nothing back from the second relay")
    setting.say(f"first back after p50 {p50}, p99 {p99}, at most {most} ms; lost {total['lost']}")
    return figures | dict(total)


@contextlib.contextmanager
def two_relays(setting: Setting, url: str) -> Iterator[tuple[Relay, Relay]]:
    """On two addresses of one port: to a client that changes from one to the other it is as if the
    network had chosen another way."""
    tables = f'[redis]\nurl = "{url}"\n'
    if setting.quick:  # whether it works is asked then, on a machine that may be slow
        tables += "timeout_s = 2.0\n[recovery]\nwait_s = 5.0\n"
    with Relay(setting, tables=tables) as first:
        ports = first.public, first.internal
        with Relay(setting, tables=tables, address="127.0.0.2", ports=ports) as second:
            yield first, second


def _waits_ms(account: Account, switched: int, clients: int) -> npt.NDArray[np.float64]:
    """A client each: from its first datagram with a number from `switched` on, to the first of
    those that came back, or infinity."""
    rows = (account.sent - switched) // clients
    shape, chosen = (rows, clients), slice(switched, switched + rows * clients)
    back = account.back_at[chosen].reshape(shape).astype(np.float64)
    back[back == 0] = np.inf
    waits: npt.NDArray[np.float64] = (back.min(axis=0) - account.sent_at[chosen][:clients]) / 1e6
    return waits


def _recovered(
    setting: Setting, load: Load, account: Account, first: Relay, second: Relay
) -> dict[str, int]:
    """Judge one round; returns counts that add up over rounds."""
    laws = first.law(), second.law()
    received = sum(law["received"] for law in laws)
    setting.must(received == load.datagrams, f"{received} of {load.datagrams} sent are received")
    setting.must(not any(law["missing"] for law in laws), "datagrams are in no counter")
    setting.must(not account.duplicated, f"{account.duplicated} datagrams came twice")
    setting.must(not account.foreign, f"{account.foreign} datagrams are not as they were sent")
    flows = len(second.flows())
    setting.must(flows == load.clients, f"{flows} of {load.clients} flows at the second relay")
    counts = {"sent": account.sent, "lost": account.lost, "late": account.late}
    counts["kernel_drops"] = first.kernel_drops() + second.kernel_drops()
    return counts | {f"second_dropped_{name}": n for name, n in laws[1]["drops"].items()}


@contextlib.contextmanager
def redis(setting: Setting, binary: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """A server of its own: its URL, and what tells how many keys it has."""
    (port,) = dev.free_ports(1, socket.SOCK_STREAM)
    folder = setting.subfolder()
    argv = [binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    argv += ["--dir", str(folder), "--daemonize", "no"]
    process = spawn(argv, {setting.load_cpu}, folder / "log")
    with contextlib.ExitStack() as stack:
        stack.callback(end, process, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while b"eady to accept connections" not in (folder / "log").read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise dev.StartError((folder / "log").read_text()[-2000:])
            time.sleep(0.01)
        link = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))

        def keys() -> int:
            link.sendall(b"DBSIZE\r\n")
            return int(link.recv(64).strip(b":\r\n"))

        yield f"redis://127.0.0.1:{port}/0", keys


PARTS: dict[str, Callable[[Setting], Figures]] = {
    "kill": kill,
    "reload": reload,
    "handover": handover,
    "restart": restart,
    "recovery": recovery,
}
"""By the name that the command line knows them by."""
