"""Placement: which transceiver takes a call, and which one has it.

What it owns: the client of the transceivers' control API, and the asking after those whom neither
Redis nor anybody else vouches for. Who is there by Redis is directory.py's; what is known of each,
and who is asked first, is roster.py's.

Rules that stay true:
- A call id leads to its owner from any instance, also to one that no list has, since an instance
  that has just started without Redis has none. It is safe because nobody can choose where it leads:
  a call id is authenticated by the key (ufrag.py; a guess passes once in 2^32, to a random
  address), and its address and port must lie in a configured cluster, where nothing but
  transceivers lives. What is sent there is one of this module's requests, about a call that
  a transceiver has or has not; no redirect is followed and no more than a bounded answer is read.
- The transceiver itself says yes or no. What is known here of its load is a moment old and only
  decides who is asked first: that opinion never turns a caller away. One that drains is not asked.
- Every attempt, and all of them together, have a deadline.
- Without Redis calls are placed by the last that was known, and nothing waits for it.

It keeps nothing about a call, reads no SDP and knows nothing of the clients' HTTP (signaling.py).
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import orjson

import attendance
import directory
import endpoints
import ledger
import metrics
import observer
import presence
import roster
import settings
import ufrag
from attendants import Crowded

log = logging.getLogger("placement")

CALL_DEADLINE_S = 8.0
"""All attempts to place a call. Clients give up after about ten seconds: better a 503 they see."""

RESUME_S = 0.75
"""What the transceiver of a call that is to be gone on with may take of it. If its host is dead,
nothing answers at all: its client has waited for a second and more by then, in mid-sentence."""

SLOW_S = 0.5
"""A transceiver that takes so long to say nothing is out of reach, and others of its cluster may
be: another cluster is asked first then. One whose process is gone says so at once."""

KEY_HEADER = "X-Earshot-Key"
"""Names the key of whoever asks something of a call, to the transceiver that has it."""

HEALTH_PERIOD_S = 1.0
"""How often those transceivers are asked for their load that Redis does not list. It orders the
attempts, nothing depends on it: shorter only costs requests, longer makes bursts lean on who was
idle."""

ANSWER_OCTETS_MAX = 1 << 20
"""Of a transceiver: a session description has some thousands. An address in a cluster is no proof
that a transceiver is there."""

CONNECTIONS_MAX = 1024
"""To all transceivers at once. Offers wait for one beyond that: it takes a thousand that hang."""


class BadOffer(Exception):
    """The transceiver cannot use the offer; the message is its sentence for the client."""

    def __init__(self, message: str, code: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class Unavailable(Exception):
    """No transceiver took the call, or the one that has it does not answer; the message says it."""


class UnknownCall(Exception):
    """The call id is none of ours, or the call has ended."""


class EndedCall(UnknownCall):
    """The call id is one of ours, and its owner has no such call any more."""


@dataclass(frozen=True, slots=True)
class Order:
    """A call that somebody wants placed."""

    offer: str
    """The client's session description, unread."""
    session: dict[str, Any] | None = None
    """The `session` object that came with it, or with the key."""
    model: str | None = None
    """The model asked for in the query; what the session itself says is nearer."""
    key: str = ""
    """Name of the key that opens it: only the same key may do anything to the call later."""
    dialect: str = "realtime"
    """What the client speaks on its data channel: `realtime` or `rtvi`."""
    resume: str | None = None
    """Id of the call whose conversation goes on in this one."""
    candidates: tuple[tuple[str, int], ...] = ()
    """Public addresses of relays for the client, in order of preference."""
    site: str = ""
    """Where these let it enter, for the log of the call."""
    request_id: str = ""
    """What the logs of all programs know the request by."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A call that a transceiver has taken."""

    call_id: str
    answer: str
    """Its session description."""
    etag: str = ""
    """A name of its ICE session: another one after each ICE restart."""
    request_id: str = ""
    """What the transceiver and the relay know it by."""
    cluster: int | None = None
    """Of the transceiver that has it."""


class Placement:
    """Places calls on transceivers, and finds the transceiver of a call."""

    def __init__(
        self, config: settings.Signaling, counters: ledger.Counters, rng: random.Random
    ) -> None:
        """Opens nothing: `connected` does.

        Raises SettingsError if the key file cannot be read, and for a transceiver outside the
        clusters.
        """
        table = config.signaling
        self.roster = roster.Roster(table.transceivers)
        self._table = table
        self._keyring = config.keys.load()
        self._clusters = settings.clusters(config.cluster)
        self._counters = counters
        self._rng = rng
        self._directory = directory.Directory(config, self.roster, counters)
        self._known: dict[endpoints.Endpoint, roster.Health] = {}  # what the log has said
        self._checks: dict[roster.Peer, asyncio.Task[None]] = {}
        self._parting: set[asyncio.Task[None]] = set()
        for at in table.transceivers:
            if not any(home.contains(at.address, at.port) for home in self._clusters.values()):
                raise settings.SettingsError(
                    f"signaling.transceivers: {at} is in no cluster: its calls could not be hung up"
                )

    @property
    def peers(self) -> list[roster.Peer]:
        """The transceivers that are known now."""
        return self.roster.peers

    @property
    def keyring(self) -> ufrag.Keyring:
        """The secrets as they are now: a reload brings others."""
        return self._keyring

    def reload(self, config: settings.Signaling) -> None:
        """Read the key file again. Raises SettingsError, and then nothing has changed."""
        self._keyring = config.keys.load()

    def calls_of(self, key: str) -> int:
        """How many calls a key has: as transceivers report, placed since, and being placed."""
        return self.roster.calls_of(key)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """While it lasts, calls can be placed and the transceivers' load is followed."""
        session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._table.transceiver_timeout_s),
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # what is bounded is what comes
            trace_configs=[observer.tracing()],
        )
        # Sidebands last as long as calls. They have no part in the bounded pool of connections that
        # requests share: so many of them would leave none to place a call by.
        lasting = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._table.transceiver_timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[observer.tracing(), _staying()],
        )
        async with session as self._http, lasting as self._lasting:
            async with self._directory.followed(self._check, self._tell):
                asking = asyncio.create_task(self._ask_for_health())
                try:
                    yield
                finally:
                    asking.cancel()
                    await asyncio.wait([asking])
            tasks = [*self._checks.values(), *self._parting]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def place(self, order: Order, clusters: Sequence[int] = ()) -> Placed:
        """The answer of the first transceiver that takes the call; those of `clusters` are asked in
        the order of these, if any are named.

        Raises BadOffer for an offer that it cannot use, Unavailable if none takes it. One that
        times out may still have made a session: it ends by its own deadline, since no client will
        ever connect to it.
        """
        request = orjson.dumps(asdict(order))
        peers = self._in_order(order.resume, clusters)
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                while peers:
                    peer, most_s = peers.pop(0)
                    found, begun = None, time.monotonic()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(most_s):
                            found = await self._try(peer, order.key, request)
                    if found is not None:
                        if order.resume is not None and not self._has(peer, order.resume):
                            self._part(order.resume, order.key)
                        return found
                    if clusters and time.monotonic() - begun >= SLOW_S:
                        # Silence may be the whole cluster's: not all the time there is for that.
                        silent = roster.home(peer, self._clusters)
                        peers.sort(key=lambda each: roster.home(each[0], self._clusters) == silent)
        except TimeoutError:
            pass
        raise Unavailable("No transceiver can take this call now.")

    def _in_order(
        self, resume: str | None, clusters: Sequence[int]
    ) -> list[tuple[roster.Peer, float | None]]:
        """Whom to ask, and how long each may take if less than the settings say: first of all who
        has the conversation, if the call is to go on with one."""
        peers = self.roster.order(self._rng.shuffle, clusters, self._clusters)
        first = [p for p in self.peers if resume and p.serving and self._has(p, resume)]
        rest = [peer for peer in peers if peer not in first]
        return [(peer, RESUME_S) for peer in first] + [(peer, None) for peer in rest]

    def _has(self, peer: roster.Peer, call_id: str) -> bool:
        at, found = peer.endpoint, self._hint(call_id)
        return found is not None and (found.address, found.port) == (at.address, at.port)

    def _part(self, call_id: str, key: str) -> None:
        """End a call whose conversation goes on elsewhere. If it cannot be told, it ends when its
        client has been silent for long enough."""

        async def part() -> None:
            with suppress(UnknownCall, Unavailable):
                await self.ask(call_id, "DELETE", "?resumed", key=key)

        task = asyncio.create_task(part())
        self._parting.add(task)
        task.add_done_callback(self._parting.discard)

    def _hint(self, call_id: str) -> ufrag.Hint | None:
        hint = ufrag.from_call_id(call_id)
        found = hint and ufrag.parse(self._keyring, self._clusters, hint.encode())
        return found if isinstance(found, ufrag.Hint) else None

    def knows(self, call_id: str) -> bool:
        """True if the id was made by us, whatever has become of its call."""
        return self._hint(call_id) is not None

    def owner(self, call_id: str) -> str:
        """The control API of the transceiver that has a call. Raises UnknownCall."""
        found = self._hint(call_id)
        if found is None:
            raise UnknownCall(call_id)
        at = f"[{found.address}]" if found.address.version == 6 else found.address
        return f"http://{at}:{found.port}/v1"

    async def ask(
        self, call_id: str, method: str, path: str = "", body: Any = None, key: str = ""
    ) -> tuple[int, Any]:
        """Ask the owner of a call: the status below 500, and the JSON body, of its answer.

        `path` follows `/v1/sessions/{call_id}`; `key` is the name of the asker's. Raises
        UnknownCall, and Unavailable if the owner is out of reach or met a fault.
        """
        url = f"{self.owner(call_id)}/sessions/{call_id}{path}"
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json", KEY_HEADER: key}
        try:
            async with self._http.request(
                method, url, data=data, headers=headers, allow_redirects=False
            ) as response:
                if response.status == 404:
                    raise EndedCall(call_id)
                if response.status < 300 or 400 <= response.status < 500:
                    return response.status, await _json_of(response)
                log.warning("%s %s: %d", method, _masked(url, call_id), response.status)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                # Nobody is there: whatever calls the process had, they ended with it.
                raise EndedCall(call_id) from error
            log.warning("%s %s: out of reach: %r", method, _masked(url, call_id), error)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s %s: out of reach: %r", method, _masked(url, call_id), error)
        raise Unavailable("The transceiver of this call does not answer.")

    async def attend(self, call_id: str, key: str) -> aiohttp.ClientWebSocketResponse:
        """The events of a call, from its owner. Raises like `ask`, and Crowded."""
        url = f"{self.owner(call_id)}/sessions/{call_id}/events"
        try:
            return await self._lasting.ws_connect(
                url,
                headers={KEY_HEADER: key},
                heartbeat=attendance.HEARTBEAT_S,
                timeout=aiohttp.ClientWSTimeout(ws_close=attendance.CLOSE_S),
                max_msg_size=attendance.MESSAGE_OCTETS_MAX,
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 404:
                raise EndedCall(call_id) from error
            if error.status == 429:
                raise Crowded("So many sidebands as it may have attend this call.") from error
            log.warning("%s: %d", _masked(url, call_id), error.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s: out of reach: %r", _masked(url, call_id), error)
        raise Unavailable("The transceiver of this call does not answer.")

    async def _try(self, peer: roster.Peer, key: str, request: bytes) -> Placed | None:
        """One attempt; None if another transceiver should be asked. It counts from now on."""
        attempt, placed = peer.attempt(key), None
        try:
            placed = await self._show(peer, attempt, request)
        finally:
            if placed is None:
                peer.refused(attempt)
        return placed

    async def _show(
        self, peer: roster.Peer, attempt: roster.Attempt, request: bytes
    ) -> Placed | None:
        try:
            async with self._http.post(
                f"{peer.url}/sessions",
                data=request,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                body = await _json_of(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            peer.failed()
            self._counters.values[metrics.Signaling.TRANSCEIVER_FAILED] += 1
            log.warning("transceiver %s is out of reach: %r", peer.endpoint, error)
            return None
        match response.status, body:
            case 201, {"call_id": str(call_id), "answer": str(answer)}:
                opened = body.get("opened")
                peer.took(attempt, opened if isinstance(opened, int) else 0)
                etag, request_id = (str(body.get(key) or "") for key in ("etag", "request_id"))
                return Placed(call_id, answer, etag, request_id, roster.home(peer, self._clusters))
            case 400, {"error": {"message": str(message), **rest}}:
                # The other transceivers read offers just as this one does.
                raise BadOffer(
                    message,
                    str(rest.get("code") or "invalid_offer"),
                    str(rest.get("param") or "sdp"),
                )
            case 503, _:
                peer.full = True  # until its next report
                self._counters.values[metrics.Signaling.TRANSCEIVER_REFUSED] += 1
            case status, _:
                self._counters.values[metrics.Signaling.TRANSCEIVER_FAILED] += 1
                log.error("transceiver %s answered %d to an offer", peer.endpoint, status)
        return None

    async def _ask_for_health(self) -> None:
        """Ask those transceivers for their load that nobody lists, for ever."""
        while True:
            for peer in self.roster.to_ask():
                self._check(peer)
            await asyncio.sleep(HEALTH_PERIOD_S)

    def _check(self, peer: roster.Peer) -> None:
        """Ask one for its load. One that hangs delays none of the rest."""
        if peer not in self._checks:
            task = self._checks[peer] = asyncio.create_task(self._check_now(peer))
            task.add_done_callback(lambda _: self._checks.pop(peer))

    async def _check_now(self, peer: roster.Peer) -> None:
        try:
            async with self._http.get(f"{peer.url}/health", allow_redirects=False) as response:
                peer.heard(presence.read(await _json_of(response)), time.monotonic())
        except (aiohttp.ClientError, TimeoutError):
            peer.failed()
        self._tell()

    def _tell(self) -> None:
        """Count the transceivers, and say in the log what has changed about which."""
        peers = {peer.endpoint: peer for peer in self.roster.peers}
        for endpoint, peer in peers.items():
            if peer.health is not self._known.get(endpoint, roster.Health.UNKNOWN):
                log.info("transceiver %s %s", endpoint, peer.health.value)
        for endpoint in self._known.keys() - peers.keys():
            log.info("transceiver %s is forgotten", endpoint)
        self._known = {endpoint: peer.health for endpoint, peer in peers.items()}
        values = self._counters.values
        values[metrics.Signaling.TRANSCEIVERS] = len(peers)
        values[metrics.Signaling.TRANSCEIVERS_SERVING] = sum(
            not peer.last and peer.serving for peer in peers.values()
        )


def _staying() -> aiohttp.TraceConfig:
    """Makes an error of a redirect: aiohttp's `ws_connect` would follow it wherever it leads."""

    async def refuse(
        _: aiohttp.ClientSession, __: object, about: aiohttp.TraceRequestRedirectParams
    ) -> None:
        about.response.close()
        raise aiohttp.ClientError(f"redirected with {about.response.status}")

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(refuse)
    return config


def _masked(url: str, call_id: str) -> str:
    """An address of the control API as a log may have it: nobody can do anything to the call."""
    return url.replace(call_id, f"…{call_id[-observer.TAG_CHARACTERS :]}")


async def _json_of(response: aiohttp.ClientResponse) -> Any:
    """A transceiver's body; None if it is not JSON, or longer than anything of a transceiver's.

    Raises aiohttp.ClientError, and TimeoutError.
    """
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_OCTETS_MAX:
            return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
