"""The keeper: what a relay does beside its datagrams, in one process with an event loop.

What it owns: Redis for the whole relay, the HTTP that monitoring reads, the virtual addresses, and
the view of all workers' flows that these need.

    flow tables         -- looked at -->  census  -- assured flows -->  Redis
    clients without a flow, asked about by workers  -->  inquiries, with census and Redis
    counters, sockets   -->  /metrics  /healthz  /readyz
    heartbeats, drain   -->  virtual addresses; how many flows are left

Rules that stay true:
- No worker waits for it. It reads their memory and answers what they asked; what has no room is
  dropped and counted. Without it media goes on.
- It has no keys and judges no ufrag: what Redis says is checked by the worker, like any other hint.
- All that it holds is bounded by the slots of the flow tables or by a constant here, and a Redis
  that hangs holds up nothing but the tasks that talk to it.
- It ends as a whole: a mistake in one of its tasks is the supervisor's to answer, with a new one.

It forwards nothing, starts nothing and kills nobody.

Prometheus' text, SO_MEMINFO (socket(7), linux/sock_diag.h)
"""

import asyncio
import contextlib
import logging
import select
import socket
import struct
import time
from collections.abc import Iterator

import census
import entrance
import handover
import host
import inquiries
import ledger
import metrics
import monitor
import registry
import settings
import supervisor

LOOK_S = 0.5
"""Between two looks at the flow tables. A flow reaches Redis so long after it was assured, in the
mean half of it; a look at 100,000 slots costs a millisecond."""

SLOTS_AT_ONCE, SLOTS_PAUSE_S = 4096, 0.002
"""Of them, looked at in one go, 50 us, and the pause after that. A worker on the same CPU waits for
its end, whatever the scheduler is told: with 65,536 at once the 99th percentile of round trips at
20,000 a second was 0.4 to 0.7 ms, and is about 0.2."""

LOOK_AGAIN_S = 0.1
"""The same while a worker asks about an SSRC that no table had at the last look: the call is young,
or it is garbage. Any more than ten of that a second cost 6 % of a CPU with 100,000 slots, 1 % where
nobody asks; twice as many looks would cost half as much again."""

LOOK_IDLE_S = 5.0
"""The same while no worker receives anything: then flows can only expire."""

REFRESHES = 3
"""How often a flow is written again in its time to live: two of them may be lost."""

STORE_MAX = 1024
"""Flows written at once: some 20 ms of work. More would make look-ups wait behind them."""

STORE_RETRY_S = 1.0
"""After a batch that Redis did not take."""

HEARD_S_MAX = 3.0
"""A worker that was heard of within it serves: it wakes up every second, a successor in 50 ms."""

VIP_STEADY_S = 5.0
"""How long all workers must have served again before virtual addresses that were withdrawn are
announced again: routing daemons elsewhere punish a route that flaps."""

VIP_CHECK_S = 10.0
"""How often virtual addresses are compared with what the interface has: others change it too."""

RETRY_S = 1.0
"""After an address was refused."""

STOP_S = 0.5
"""How long the last flows may take to Redis when the relay stops."""

_SO_MEMINFO, _MEMINFO = 55, struct.Struct("=9I")  # linux/sock_diag.h: SK_MEMINFO_*
_RMEM_ALLOC, _RCVBUF, _DROPS = 0, 1, 8


class Keeper:
    """One relay's keeper."""

    def __init__(
        self,
        shared: handover.Shared,
        found: settings.Relay,
        log: logging.Logger,
        redis: registry.Registry | None,
    ) -> None:
        """Over what the workers share; begins with `serve`."""
        self._shared, self._found, self._log, self._redis = shared, found, log, redis
        self.index = census.Index([memory.section("flows") for memory in shared.memories])
        self.counters = ledger.Counters(metrics.Keeper, shared.relay.section("keeper"))
        self._supervisor = ledger.Counters(metrics.Supervisor, shared.relay.section("supervisor"))
        self._controls = [memory.section("control").cast("Q") for memory in shared.memories]
        self._ways = [handover.counters_in(memory) for memory in shared.memories]
        faces = [face.memory for face in shared.faces if face]
        self._face_ways = [handover.counters_in(memory) for memory in faces]
        self._face_tables = [memory.section("flows") for memory in faces]
        self._addresses = entrance.addresses_of(found)
        self._rows = [
            entrance.rows_in(memory.section("ways"), len(self._addresses))
            for memory in shared.memories
        ]
        ends = [ours for _, ours in shared.asks]
        self._inquiries = inquiries.Inquiries(ends, self.index, self.counters, redis)
        self._clusters = entrance.clusters_of(found)
        self._ways_down = set[str]()
        self._due = asyncio.Event()
        self._received, self._refused, self._losses = -1, False, 0
        self._looked_at = self._refreshed_at = time.monotonic()
        self.ailments, self._serves = list[str](), False

    async def serve(self, link: socket.socket) -> None:
        """Keep until `link` becomes readable."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            loop.remove_reader(link)
            stop.set()

        loop.add_reader(link, end)
        self._look(time.monotonic())
        self._inquiries.listen()
        link.send(supervisor.READY)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._keep_looking()), group.create_task(self._serve_http())]
            if self._found.vip:
                tasks.append(group.create_task(self._keep_addresses(self._found.vip)))
            if self._redis:
                tasks.append(group.create_task(self._redis.watch()))
                tasks.append(group.create_task(self._write(self._redis)))
                tasks += [
                    group.create_task(self._inquiries.look_up(self._redis))
                    for _ in range(inquiries.LOOKUPS_AT_ONCE)
                ]
            await stop.wait()
            for task in tasks:
                task.cancel()
        if self._found.vip and _hung_up(link):
            # Nobody is left who would do it, and the workers stop as well.
            await self._change_addresses(self._found.vip, False)
        if self._redis:
            await self._write_the_last(self._redis)

    # --- looking ----------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._inquiries.wanted.wait()
                await asyncio.sleep(self._looked_at + LOOK_AGAIN_S - time.monotonic())
            now, late = time.monotonic(), self._inquiries.take_late()
            received = sum(
                way.values[0] for ways in (*self._ways, *self._face_ways) for way in ways
            )
            idle = received == self._received and not self._is_draining()
            # What has received nothing has assured nothing, and an idle relay costs nothing.
            if late or not idle or now - self._looked_at >= LOOK_IDLE_S:
                for _ in self.index.looks(SLOTS_AT_ONCE):
                    await asyncio.sleep(SLOTS_PAUSE_S)
                self._received, self._looked_at = received, now
            self._note(time.monotonic())
            self._inquiries.settle(late)

    def _look(self, now: float) -> None:
        """One look at all of it, at once: somebody asks."""
        self.index.look()
        self._note(now)

    def _is_draining(self) -> bool:
        return self._supervisor[metrics.Supervisor.DRAINING_UNTIL] > 0

    def _note(self, now: float) -> None:
        """What follows from a look for others to read."""
        draining = self._is_draining()
        values, counts = self.counters.values, self.index.count()
        if self._redis and self._found.redis:
            period = self._found.redis.ttl_s / REFRESHES
            self.index.refresh((now - self._refreshed_at) / period)
            self._refreshed_at = now
            if self._redis.losses != self._losses:
                self._losses = self._redis.losses
                self.index.refresh(1.0)
            if self.index.due:
                self._due.set()
            values[metrics.Keeper.REDIS_UP] = self._redis.up
            values[metrics.Keeper.STORE_DUE] = len(self.index.due)
        if draining:
            counts += [census.count(census.states(each).tobytes()) for each in self._face_tables]
        values[metrics.Keeper.FLOWS_LEFT] = sum(map(sum, counts))
        values[metrics.Keeper.DRAINED] = draining and not any(assured for _, assured in counts)
        self._note_health(now, draining)
        values[metrics.Keeper.BEAT] = int(now * 1e9)

    def _note_health(self, now: float, draining: bool) -> None:
        ailments = ["it drains"] if draining else []
        for number, control in enumerate(self._controls):
            beat = control[handover.Control.BEAT]
            if not beat:
                ailments.append(f"worker {number} has not served yet")
            elif now - beat * 1e-9 > HEARD_S_MAX:
                ailments.append(f"worker {number} was not heard of for {HEARD_S_MAX:.0f} s")
        ailments += self._note_ways()
        if self.ailments and not ailments:
            self._log.info("in service: all workers serve")
            self._serves = True
        elif ailments != self.ailments and (self._serves or draining):  # not at every start
            self._log.info("out of service: %s", ", ".join(ailments))
        self.ailments = ailments

    def _note_ways(self) -> list[str]:
        """Say which transit addresses have stopped answering, and which answer again. An ailment
        is what no other way is left for: no cluster can be reached."""
        kinds, number_of = metrics.Way, {at: i for i, at in enumerate(self._addresses)}
        down = {
            at
            for at, i in number_of.items()
            if any(rows[i][kinds.LOST] for rows in self._rows)
            and not any(rows[i][kinds.UP] for rows in self._rows)
        }
        for at in sorted(down - self._ways_down):
            self._log.warning(
                "transit address %s does not answer: no relay there, or its relay_prefixes lack %s"
                " or it has other keys",
                at,
                self._found.relay.internal.host,
            )
        for at in sorted(self._ways_down - down):
            self._log.info("transit address %s answers again", at)
        self._ways_down = down
        lost = [cluster for cluster, ways in self._clusters.items() if down.issuperset(ways)]
        if len(lost) < len(self._found.cluster):
            return []
        return [f"no way to cluster {cluster}" for cluster in lost]

    # --- Redis ------------------------------------------------------------------------------------

    async def _write(self, redis: registry.Registry) -> None:
        """Write what is due, for ever."""
        while True:
            await self._due.wait()
            if not await self._write_some(redis):
                await asyncio.sleep(STORE_RETRY_S)
            if not self.index.due:
                self._due.clear()

    async def _write_some(self, redis: registry.Registry) -> bool:
        values = self.counters.values
        numbers, entries = self.index.take(STORE_MAX)
        try:
            refused = await redis.store(entries)
        except registry.Unavailable:
            refused = list(range(len(numbers)))
        self.index.put_back(numbers[at] for at in refused)
        values[metrics.Keeper.STORED] += len(numbers) - len(refused)
        values[metrics.Keeper.STORE_FAILED] += bool(refused)
        return not refused

    async def _write_the_last(self, redis: registry.Registry) -> None:
        """What was assured since the last look: another relay may get these clients in a moment."""
        self.index.look()
        try:
            async with asyncio.timeout(STOP_S):
                while self.index.due and await self._write_some(redis):
                    pass
        except TimeoutError:
            pass
        await redis.close()

    # --- virtual addresses ------------------------------------------------------------------------

    async def _keep_addresses(self, vip: settings.Vip) -> None:
        """Announce them while all workers serve, withdraw them while not, for ever."""
        announced: bool | None = None
        withdrawn_once = False
        steady_at = check_at = 0.0
        # What a relay before left announced stays so while our workers start.
        patient_until = time.monotonic() + HEARD_S_MAX
        while True:
            now = time.monotonic()
            if self.ailments and announced is None and now < patient_until:
                await asyncio.sleep(0.05)
                continue
            if self.ailments and (announced or withdrawn_once):
                withdrawn_once, steady_at = True, now + VIP_STEADY_S
            wanted = not self.ailments and now >= steady_at
            if wanted != announced or now >= check_at:
                done = await self._change_addresses(vip, wanted)
                announced = wanted if done else None
                check_at = now + VIP_CHECK_S
            await asyncio.sleep(LOOK_S if announced is not None else RETRY_S)

    async def _change_addresses(self, vip: settings.Vip, wanted: bool) -> bool:
        """Announce or withdraw; False if the kernel does not let us."""
        change = host.announce_addresses if wanted else host.withdraw_addresses
        try:
            changed = await change([each.address for each in vip.addresses], vip.interface)
        except OSError as error:
            if not self._refused:
                self._log.error("virtual addresses on %s: %s", vip.interface, error.strerror)
            self._refused = True
            return False
        self._refused = False
        self.counters.values[metrics.Keeper.VIP_ANNOUNCED] = wanted
        if changed:
            what, listed = "announced" if wanted else "withdrawn", ", ".join(map(str, changed))
            why = f": {', '.join(self.ailments)}" if self.ailments else ""
            self._log.info("%s on %s: %s%s", what, vip.interface, listed, why)
        return True

    # --- HTTP -------------------------------------------------------------------------------------

    async def _serve_http(self) -> None:
        """Serve monitoring, for ever; a port that is taken is tried again."""

        def ailments() -> list[str]:
            self._look(time.monotonic())
            return self.ailments

        application = monitor.application(self.exposition, ailments)
        await monitor.serve(application, self._found.relay.metrics, self._log)

    def exposition(self) -> bytes:
        """All that the relay counts, as Prometheus reads it."""
        self._look(time.monotonic())
        labels = [{"worker": str(number)} for number in range(len(self._ways))]
        inbound, outbound = zip(*self._ways, strict=True)
        into, out = zip(*self._face_ways, strict=True) if self._face_ways else ((), ())
        return b"".join(
            metrics.exposition(f"earshot_relay_{name}", rows)
            for name, rows in (
                ("inbound", list(zip(labels, inbound, strict=True))),
                ("outbound", list(zip(labels, outbound, strict=True))),
                ("transit_inbound", list(zip(labels, into, strict=bool(into)))),
                ("transit_outbound", list(zip(labels, out, strict=bool(out)))),
                ("way", list(self._way_rows())),
                ("worker", list(zip(labels, self._workers(), strict=True))),
                ("socket", list(self._sockets())),
                ("supervisor", [({}, self._supervisor)]),
                ("keeper", [({}, self.counters)]),
            )
        )

    def _way_rows(self) -> Iterator[tuple[dict[str, str], ledger.Counters]]:
        for number, rows in enumerate(self._rows):
            for address, row in zip(self._addresses, rows, strict=True):
                yield {"worker": str(number), "address": address}, row

    def _workers(self) -> Iterator[ledger.Counters]:
        kinds, now_ns = metrics.Worker, time.monotonic_ns()
        for control, (tentative, assured) in zip(self._controls, self.index.count(), strict=True):
            row = ledger.Counters(kinds)
            row.values[kinds.FLOWS_TENTATIVE] = tentative
            row.values[kinds.FLOWS_ASSURED] = assured
            row.values[kinds.HEARD_AGO] = max(0, now_ns - control[handover.Control.BEAT]) // 10**6
            used_s = host.cpu_seconds(control[handover.Control.PID])
            row.values[kinds.CPU] = int((used_s or 0) * 1000)
            yield row

    def _sockets(self) -> Iterator[tuple[dict[str, str], ledger.Counters]]:
        faces = [face for face in self._shared.faces if face]
        sides = (
            ("public", self._shared.public),
            ("internal", self._shared.internal),
            ("transit", [face.transit for face in faces]),
            ("transit_internal", [face.inner for face in faces]),
        )
        for side, socks in sides:
            for number, sock in enumerate(socks):
                row = of_socket(sock)
                if row is not None:
                    yield {"worker": str(number), "socket": side}, row


def of_socket(sock: socket.socket) -> ledger.Counters | None:
    """What the kernel has for a socket, and has dropped; None where it does not say."""
    try:
        words = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    except (OSError, struct.error):
        return None
    row, kinds = ledger.Counters(metrics.Socket), metrics.Socket
    row.values[kinds.DROPPED] = words[_DROPS]
    row.values[kinds.BUFFER_USED], row.values[kinds.BUFFER] = words[_RMEM_ALLOC], words[_RCVBUF]
    return row


def run(
    link: socket.socket, shared: handover.Shared, found: settings.Relay, log: logging.Logger
) -> int:
    """Be the keeper until `link` becomes readable or breaks; returns the exit code."""

    async def keep() -> None:
        redis = registry.Registry(found.redis, log) if found.redis else None
        await Keeper(shared, found, log, redis).serve(link)

    asyncio.run(keep())
    return supervisor.Exit.STOPPED


def retire(vip: settings.Vip | None, log: logging.Logger) -> None:
    """The relay ends and nobody takes over: virtual addresses and their local routes go.

    For whoever outlives the keeper; does nothing without virtual addresses.
    """
    if vip is None:
        return
    try:
        asyncio.run(host.release_addresses([each.address for each in vip.addresses], vip.interface))
    except OSError as error:
        log.warning("virtual addresses on %s stay: %s", vip.interface, error.strerror)


def _hung_up(link: socket.socket) -> bool:
    """True if nobody holds the link's other end any more, rather than having asked us to stop."""
    poll = select.poll()
    poll.register(link, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))
