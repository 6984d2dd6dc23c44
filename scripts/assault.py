"""flood.py attack: the attacks of the relay's threat model beside live calls, and what those felt.

Complete calls (ringing.py) talk through the relay for as long as it takes. Beside them each attack
(attacks.py) is sent by a process of its own (attackers.py), between two quiet phases of the same
length (phases.py has the rules by which it is judged). What the relay counted and cost stands
beside it (onlooker.py). In every phase somebody new calls, too.

What an attack needs to know is what its attacker would know: a stranger calls himself and so has a
hint and a password; an eavesdropper records the tool's own live calls, where they are on this
machine (eavesdropper.py); a thief has the relay's keys (`--config`). What cannot be made here is
left out, and a note says why.

Rules that stay true:
- Nothing is sent but to the page, relay and metrics that were named, and a public one needs its
  owner's word: redirects are not followed, and of a Location nothing but the id is taken.
- Addresses are forged on this machine alone, and never on a network.
- Rates, times and calls are bounded; the attackers end with this program, however that ends.

ARCHITECTURE.md "Rules of the relay", "Roaming", "Limits"
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import random
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aftermath
import aiohttp
import attackers
import attacks
import dev
import eavesdropper
import observed
import onlooker
import options
import phases
import progress
import target
import typer
from findings import Finding
from ring import Call
from ringing import Ringing

import settings
import ufrag

OFFER = dev.ROOT / "tests" / "data" / "chromium-156-offer.sdp"

CALLS_MAX = 100
"""With their DTLS and SRTP they fill a core of this machine, and the figures would be its own."""

RATE_MAX = 100_000
"""Datagrams a second of the attackers, who have one process."""

SECONDS_MIN, SECONDS_MAX = 1.0, 120.0
"""Of a phase: a new call needs a moment to connect, and a run has dozens of phases."""

LISTEN_S = 6.0
"""How long an eavesdropper waits for a check of each call: they come every 2.5 s."""

NEWCOMER_AT = 0.2
"""When somebody new calls, as a part of the phase."""

ANSWER_S_MAX = 10.0
"""For any answer of signaling's."""

SAMPLE_S = 0.5


@dataclass
class Plan:
    """What is attacked, how, and what is known of it."""

    page: str
    relay: tuple[str, int]
    attacks: Sequence[attacks.Attack]
    calls: int
    rate: float
    seconds: float
    seed: int
    key: str | None = None
    """Of signaling's API."""
    owned: bool = False
    metrics: str | None = None
    """The relay's page; None if it is not known."""
    relay_keys: tuple[ufrag.Keyring, dict[int, ufrag.Cluster]] | None = None
    """What a thief has."""
    programs: dict[str, list[int]] = field(default_factory=dict)
    """Processes on this machine, by what they are."""


class Assault:
    """One run: live calls, attacks one after another, and the quiet around them."""

    def __init__(
        self, plan: Plan, ringing: Ringing, band: attackers.Attackers, http: aiohttp.ClientSession
    ) -> None:
        self.plan, self._ringing, self._band, self._http = plan, ringing, band, http
        self.finding = Finding(f"Attacks on {plan.relay[0]}:{plan.relay[1]} beside live calls")
        self.chance = random.Random(plan.seed)
        self.material = attacks.Material()
        self.live: list[Call] = []
        self.rounds: list[phases.Round] = []
        self._page = onlooker.Page(http, plan.metrics) if plan.metrics else None
        self._processes = onlooker.Processes(plan.programs)
        self._began_ns, self._now = 0, ""
        self._samples: list[aftermath.Sample] = []

    async def run(self, folder: Path) -> Finding:
        """All of it; `folder` is for what is sent. Raises OSError for calls that do not come up."""
        self.live = await self._ringing.hold(self.plan.calls)
        down = [call for call in self.live if call.failure or call.state != "talking"]
        if down or len(self.live) < self.plan.calls:
            why = down[0].why or down[0].failure or down[0].state if down else "they took too long"
            missing = self.plan.calls - len(self.live) + len(down)
            raise OSError(f"{missing} of {self.plan.calls} live calls did not come up: {why}")
        await self._get_to_know()
        chosen = self._possible()
        self._began_ns = time.monotonic_ns()
        step_s = self.plan.seconds + phases.SETTLE_S
        with progress.bar("attacks", (2 * len(chosen) + 1) * step_s) as told:
            watch = asyncio.create_task(self._sample(told))
            try:
                await self._phases(chosen, folder)
            finally:
                watch.cancel()
        account = aftermath.Account(
            self.finding, self.live, self.rounds, self._samples, self._began_ns
        )
        self.finding.figures = {
            "relay": f"{self.plan.relay[0]}:{self.plan.relay[1]}",
            "page": self.plan.page,
            "calls": self.plan.calls,
            "rate_per_s": self.plan.rate,
            "seconds_each": self.plan.seconds,
            "attacks": {each.name: each.what for each in chosen},
            **account.figures(list(self.plan.programs)),
        }
        account.draw(list(self.plan.programs), self.chance)
        self._explain()
        return self.finding

    def _explain(self) -> None:
        notes = self.finding.notes
        if not self._page:
            notes.append("What the relay counted is not known: --metrics names its page.")
        if "relay" not in self._processes:
            notes.append("The relay's CPU and memory are not known: its process is not seen here.")
        notes.append(
            f"Calls may lose as much as in the worse quiet phase beside an attack and"
            f" {100 * phases.LOSS_MAX:g} % of their packets more. What the kernel dropped came"
            " while the relay had no CPU left."
        )

    # --- what attackers know ----------------------------------------------------------------------

    async def _get_to_know(self) -> None:
        plan, material = self.plan, self.material
        calls = (ufrag.from_call_id(call.call_id or "") for call in self.live)
        material.hints = [hint for hint in calls if hint]
        if plan.relay_keys:
            material.keyring, material.clusters = plan.relay_keys
        if not ipaddress.ip_address(plan.relay[0]).is_loopback:
            self.finding.notes.append(
                "The relay is not on loopback: the attackers have one address with"
                f" {attackers.PORTS_AWAY} ports, and no other address is forged on a network."
            )
        overheard = {attacks.Needs.CHECKS, attacks.Needs.SSRCS, attacks.Needs.LIVE}
        wanted = any(overheard & set(each.needs) for each in plan.attacks)
        if wanted and observed.is_here(plan.relay[0]):
            try:
                heard = await asyncio.to_thread(
                    eavesdropper.overhear, *plan.relay, set(material.hints), LISTEN_S
                )
            except PermissionError:
                self.finding.notes.append(
                    "Without CAP_NET_RAW nobody can listen to the live calls or speak in their"
                    " name."
                )
            else:
                material.checks = list(heard.checks.values())
                material.ssrcs = list(heard.ssrcs.values())
                material.live = list(heard.ssrcs)
                if not material.checks:
                    raise OSError(
                        f"no check of a live call has come to {plan.relay[0]}:{plan.relay[1]}"
                        f" within {LISTEN_S:g} s: is it the relay that signaling names?"
                    )
        if not material.checks and material.keyring is not None:
            material.checks, material.recorded = list(attacks.checks(material, self.chance)), False
            self.finding.notes.append(
                "Recorded checks are made with the relay's keys: signed as the live calls sign"
                " theirs, with transaction ids that are new to the transceiver."
            )

    def _possible(self) -> list[attacks.Attack]:
        found = []
        for attack in self.plan.attacks:
            # A session of one's own is placed when it is needed.
            known = dataclasses.replace(self.material, own=[attacks.Own("", b"")])
            if why := attack.missing(known):
                self.finding.notes.append(f"{attack.name} is left out: {why}.")
            else:
                found.append(attack)
        if not found:
            raise OSError("no attack can be made: " + " ".join(self.finding.notes))
        return found

    @contextlib.asynccontextmanager
    async def _placed(self, attack: attacks.Attack) -> AsyncIterator[None]:
        """A session of the attackers' own, for an attack that needs one."""
        if attacks.Needs.OWN not in attack.needs:
            yield
            return
        where, own = await place(self._http, self.plan, self.chance)
        self.material.own = [own]
        try:
            yield
        finally:
            self.material.own = []
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._http.delete(where, **_asking(self.plan)):
                    pass

    # --- phases -----------------------------------------------------------------------------------

    async def _phases(self, chosen: Sequence[attacks.Attack], folder: Path) -> None:
        before = await self._phase(phases.Phase("quiet"), None)
        for attack in chosen:
            async with self._placed(attack):
                live = self.material.live if attacks.Needs.LIVE in attack.needs else ()
                # Signing a thousand checks would hold up the live calls.
                made = await asyncio.to_thread(attack.datagrams, self.material, self.chance)
                await self._band.load(folder / attack.name, made, live)
                during = await self._phase(phases.Phase(attack.name), attack)
                after = await self._phase(phases.Phase("quiet"), None)
            answers, why = attack.may_hear(self.material)
            self.rounds.append(phases.Round(during, (before, after), answers, why))
            before = after
        back = await self._band.account()
        for each in self.rounds:
            each.attack.back = back[each.attack.name]

    async def _phase(self, phase: phases.Phase, attack: attacks.Attack | None) -> phases.Phase:
        self._now = phase.name
        if self._page:
            phase.before = await self._page.read()
        cpu, idle, late = self._processes.cpu_s(), onlooker.idle_s(), len(self._ringing.late_ms)
        phase.begin()
        new = asyncio.create_task(self._newcomer(phase))
        try:
            if attack is None:
                await asyncio.sleep(self.plan.seconds)
            else:
                phase.sent = await self._band.run(self.plan.rate, self.plan.seconds)
            phase.end()
            used = self._processes.cpu_s()
            phase.cpu_s = {name: used[name] - cpu[name] for name in used}
            phase.idle_s, phase.late_ms = onlooker.idle_s() - idle, self._ringing.late_ms[late:]
            if "relay" in self._processes:
                phase.octets = self._processes.octets("relay")
            await asyncio.sleep(phases.SETTLE_S)
        finally:
            new.cancel()
            await asyncio.gather(new, return_exceptions=True)
        if self._page:
            phase.after, phase.off = await self._page.law()
        return phase

    async def _newcomer(self, phase: phases.Phase) -> None:
        """Somebody new calls, and hangs up when the phase ends."""
        await asyncio.sleep(NEWCOMER_AT * self.plan.seconds)
        number = len(self._ringing.calls)
        holding = asyncio.create_task(self._ringing.hold(1))
        try:
            while not phase.until_ns and phase.newcomer_ms is None and not phase.newcomer_why:
                await asyncio.sleep(0.01)
                if len(self._ringing.calls) > number:
                    call = self._ringing.calls[number]
                    phase.newcomer_ms = call.moments.get("connected")
                    phase.newcomer_why = call.failure or ""
            phase.newcomer_why = phase.newcomer_why or "it was still connecting"
            while not phase.until_ns:
                await asyncio.sleep(0.01)
        finally:
            holding.cancel()
            for call in self._ringing.calls[number:]:
                if call.state not in ("ended", "failed"):
                    await call.end()

    async def _sample(self, told: Callable[[float, str], None]) -> None:
        """What is drawn over time, and how far it is; for ever."""
        sent, cpu, at = 0, self._processes.cpu_s(), time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            now, used, by_now = time.monotonic(), self._processes.cpu_s(), self._band.sent
            took = now - at
            share = {name: 100 * (used[name] - cpu[name]) / took for name in used}
            rate = max(0, by_now - sent) / took
            self._samples.append(aftermath.Sample(now - self._began_ns / 1e9, rate, share))
            told(now - self._began_ns / 1e9, self._now)
            sent, cpu, at = by_now, used, now


# --- a session of the attackers' own --------------------------------------------------------------


_SDP = "application/sdp"


def _asking(plan: Plan, **more: str) -> dict[str, Any]:
    """How signaling is asked: with its key, for so long, and never whom it redirects to."""
    key = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
    limit = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
    return {"headers": key | more, "timeout": limit, "allow_redirects": False}


async def place(
    http: aiohttp.ClientSession, plan: Plan, chance: random.Random
) -> tuple[str, attacks.Own]:
    """Offer a call and never connect it: where it is hung up, and its credentials. Raises
    OSError."""
    text = OFFER.read_text().replace("\r\n", "\n").replace("\n", "\r\n")
    for name, bits in (("ufrag", 32), ("pwd", 96)):
        made = f"{chance.getrandbits(bits):0{bits // 4}x}"
        text = re.sub(rf"(?m)^a=ice-{name}:[^\r]*", f"a=ice-{name}:{made}", text)
    url, asking = f"{plan.page}/v1/realtime/calls", _asking(plan, **{"Content-Type": _SDP})
    try:
        async with http.post(url, data=text.encode(), **asking) as response:
            answer, where = await response.text(), response.headers.get("Location", "")
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OSError(f"signaling does not answer: {error or type(error).__name__}") from error
    found = {name: re.search(rf"(?m)^a=ice-{name}:(\S+)", answer) for name in ("ufrag", "pwd")}
    hint, password = found["ufrag"], found["pwd"]
    if status != 201 or hint is None or password is None:
        raise OSError(f"signaling refuses a call of the attackers' own: {status} {answer[:200]}")
    # Of a Location nothing but the call's id: whatever host it names, the page is what was named.
    call_id = where.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"[\w~-][\w.~-]*", call_id, re.ASCII):
        raise OSError(f"signaling names no call of the attackers' own: {where[:200]!r}")
    return f"{url}/{call_id}", attacks.Own(hint[1], password[1].encode())


# --- the command ----------------------------------------------------------------------------------


async def _run(plan: Plan) -> Finding:
    with tempfile.TemporaryDirectory(prefix="flood-") as folder:
        async with (
            attackers.attackers(*plan.relay) as band,
            aiohttp.ClientSession() as http,
            Ringing(plan.page, key=plan.key, seed=plan.seed, owned=plan.owned) as ringing,
        ):
            return await Assault(plan, ringing, band, http).run(Path(folder))


def _keys(
    config: Path | None, keys: Path | None
) -> tuple[settings.Relay, ufrag.Keyring] | tuple[None, None]:
    """The relay's configuration and its keys. Raises ValueError."""
    if config is None:
        return None, None
    found = settings.load(config, settings.Relay)
    return found, settings.load_keys(keys or found.keys.file, found.keys.mint_id)


def _metrics(named: str | None, found: settings.Relay | None, owned: bool) -> str | None:
    """The relay's page, as it was named or is configured. Raises target.TargetError."""
    if named is None and found is not None:
        at = found.relay.metrics
        # Where it is served at all addresses of this machine, loopback is one.
        host = "127.0.0.1" if at.address.is_unspecified else str(at).rpartition(":")[0]
        named = f"http://{host}:{at.port}/metrics"
    try:
        return None if named is None else target.page(named, owned)
    except target.TargetError as error:
        raise target.TargetError(f"--metrics: {error}") from error


def _own_system(plan: Plan) -> Finding:
    """A system of its own, up for as long as it takes."""
    with dev.running(None, True, "127.0.0.1", False) as (system, about):
        found, keyring = _keys(Path(about["state_dir"]) / "relay.toml", None)
        assert found is not None and keyring is not None  # there is a file
        host, _, port = about["relay"].rpartition(":")
        plan.page, plan.relay = about["page"].rstrip("/"), (host, int(port))
        plan.metrics = about["metrics"]
        plan.relay_keys = keyring, settings.clusters(found.cluster)
        plan.programs = {"relay": [system.running["relay"].pid]}
        plan.programs["transceivers"] = [
            process.pid for name, process in system.running.items() if "transceiver" in name
        ]
        return options.interruptible(_run(plan))


def attack(
    page: Annotated[
        str | None, typer.Option(metavar="URL", help="Signaling, through which live calls come.")
    ] = None,
    relay: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The relay that is attacked (IPv4).")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="Attack a system that is started for it, on loopback.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="The relay's configuration: attackers have its keys.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="The key file (default: the configuration's).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="URL", help="The relay's page (default: as configured).")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with an API key of signaling.")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, max=CALLS_MAX, help="Live calls.")] = 10,
    rate: Annotated[
        float, typer.Option(min=1, max=RATE_MAX, help="Datagrams a second of the attackers.")
    ] = 5_000,
    seconds_each: Annotated[
        float, typer.Option(min=SECONDS_MIN, max=SECONDS_MAX, help="Of a phase.")
    ] = 5.0,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"These alone: {', '.join(attacks.NAMES)}."),
    ] = None,
    seed: options.Seed = None,
    owned: options.Owned = False,
    as_json: options.AsJson = False,
    report: options.Report = None,
) -> None:
    """The attacks of the relay's threat model beside live calls, and what the calls felt."""
    if start == (page is not None or relay is not None) or (not start and not (page and relay)):
        raise typer.BadParameter("say --page and --relay, or --start")
    if start and (config or keys or metrics or key_file):
        raise typer.BadParameter("--start has a configuration, keys and metrics of its own")
    if keys and not config:
        raise typer.BadParameter("--keys needs --config: it says what hints may name")
    unknown = set(only or ()) - set(attacks.NAMES)
    if unknown:
        raise typer.BadParameter(f"no attack is called {', '.join(sorted(unknown))}")
    drawn = secrets.randbits(32) if seed is None else seed
    plan = Plan(
        page="",
        relay=("127.0.0.1", 0),
        attacks=[each for each in attacks.ATTACKS if not only or each.name in only],
        calls=calls,
        rate=rate,
        seconds=seconds_each,
        seed=drawn,
        owned=owned,
    )

    def measure() -> Finding:
        if start:
            return _own_system(plan)
        plan.page = target.page(page or "", owned)
        plan.relay = target.endpoint(relay or "", owned)
        if ":" in plan.relay[0]:
            raise target.TargetError("the attackers speak IPv4 only")
        plan.key = key_file.read_text().strip() if key_file else None
        found, keyring = _keys(config, keys)
        if found is not None and keyring is not None:
            plan.relay_keys = keyring, settings.clusters(found.cluster)
        plan.metrics = _metrics(metrics, found, owned)
        pid = onlooker.holder(plan.relay[1]) if observed.is_here(plan.relay[0]) else None
        plan.programs = {} if pid is None else {"relay": [pid]}
        return options.interruptible(_run(plan))

    options.deliver(measure, as_json, report, seed=drawn)
