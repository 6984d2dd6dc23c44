"""Placement: which transceiver takes a call, and which one has it.

What it owns: the static list of transceivers with what is known of their load, the order in which
they are asked, and the client of their control API.

Rules that stay true:
- A call id leads only to a transceiver in the settings: it is authenticated by the key (ufrag.py)
  and its address must stand in the static list. Nobody can make this a way into the network.
- The transceiver itself says yes or no. What is known here of its load is a second old and only
  decides who is asked first: that opinion never turns a caller away.
- Every attempt, and all of them together, have a deadline.

It keeps nothing about a call, reads no SDP and knows nothing of the clients' HTTP (signaling.py).
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import orjson

import attendance
import endpoints
import ledger
import metrics
import observer
import settings
import ufrag
from attendants import Crowded

log = logging.getLogger("placement")

CALL_DEADLINE_S = 8.0
"""All attempts to place a call. Clients give up after about ten seconds: better a 503 they see."""

KEY_HEADER = "X-Earshot-Key"
"""Names the key of whoever asks something of a call, to the transceiver that has it."""

HEALTH_PERIOD_S = 1.0
"""How often transceivers are asked for their load. It orders the attempts, nothing depends on it:
shorter only costs requests, longer makes bursts lean on who was idle."""


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


@dataclass(slots=True)
class Peer:
    """A transceiver, as far as signaling knows it."""

    endpoint: endpoints.Endpoint
    serving: bool = True
    """False while it drains or cannot be reached. Such a one is asked last, but it is asked: a
    second-old opinion must not turn a caller away."""
    sessions: int = 0
    """Sessions at the last health check, and those placed there since."""
    sessions_max: int = 1
    """Sessions it takes at most."""
    load: float = 0.0
    """How near it was to refusing calls at the last health check, by what it measures: 1 is there.
    0 for one that does not say."""

    @property
    def fullness(self) -> float:
        """How near it is to refusing calls for either reason."""
        return max(self.load, self.sessions / self.sessions_max)

    @property
    def url(self) -> str:
        """Where its control API is."""
        return f"http://{self.endpoint}/v1"

    def heard(self, health: Any) -> None:
        """Take over what its health endpoint said; anything unexpected counts as not serving."""
        match health:
            case {"state": "serving", "sessions": int(now), "sessions_max": int(most)} if most > 0:
                self.serving, self.sessions, self.sessions_max = True, now, most
                load = health.get("load")
                self.load = float(load) if isinstance(load, float | int) else 0.0
            case _:
                self.serving = False


def order_of(peers: list[Peer], rng: random.Random) -> list[Peer]:
    """In which order to ask: the better of two at random, then the rest at random, the full last.

    Two random choices keep the fullest close to the average (Mitzenmacher 2001) without the herd
    that runs to the single least loaded one when several instances see the same old figures.
    """
    shuffled = rng.sample(peers, len(peers))
    shuffled[:2] = sorted(shuffled[:2], key=lambda peer: peer.fullness)
    return sorted(shuffled, key=lambda peer: not peer.serving or peer.fullness >= 1)


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
        self.peers = [Peer(endpoint) for endpoint in table.transceivers]
        self._table = table
        self._candidates = [[at.host, at.port] for at in table.relays]
        self._keyring = config.keys.load()
        self._clusters = settings.clusters(config.cluster)
        self._owners = {
            (peer.endpoint.address, peer.endpoint.port): peer.url for peer in self.peers
        }
        self._counters = counters
        self._rng = rng
        for peer in self.peers:
            at = peer.endpoint
            if not any(home.contains(at.address, at.port) for home in self._clusters.values()):
                raise settings.SettingsError(
                    f"signaling.transceivers: {at} is in no cluster: its calls could not be hung up"
                )

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """While it lasts, calls can be placed and the transceivers' load is followed."""
        timeout = aiohttp.ClientTimeout(total=self._table.transceiver_timeout_s)
        traced = [observer.tracing()]
        # Sidebands last as long as calls. They have no part in the bounded pool of connections that
        # requests share: a hundred of them would leave no connection to place a call by.
        lasting = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, trace_configs=traced
        )
        async with (
            aiohttp.ClientSession(timeout=timeout, trace_configs=traced) as self._http,
            lasting as self._lasting,
        ):
            watch = asyncio.create_task(self._watch())
            try:
                yield
            finally:
                watch.cancel()

    async def place(self, order: Order) -> Placed:
        """The answer of the first transceiver that takes the call.

        Raises BadOffer for an offer that it cannot use, Unavailable if none takes it. One that
        times out may still have made a session: it ends by its own deadline, since no client will
        ever connect to it.
        """
        request = orjson.dumps({**asdict(order), "candidates": self._candidates})
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                for peer in order_of(self.peers, self._rng):
                    found = await self._try(peer, request)
                    if found is not None:
                        peer.sessions += 1
                        return found
        except TimeoutError:
            pass
        raise Unavailable("No transceiver can take this call now.")

    def owner(self, call_id: str) -> str:
        """The control API of the transceiver that has a call. Raises UnknownCall."""
        hint = ufrag.from_call_id(call_id)
        found = hint and ufrag.parse(self._keyring, self._clusters, hint.encode())
        if not isinstance(found, ufrag.Hint):
            raise UnknownCall(call_id)
        url = self._owners.get((found.address, found.port))
        if url is None:
            raise UnknownCall(call_id)
        return url

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
            async with self._http.request(method, url, data=data, headers=headers) as response:
                if response.status == 404:
                    raise EndedCall(call_id)
                if response.status < 500:
                    return response.status, await _json_of(response)
                log.warning("%s %s: %d", method, url, response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s %s: out of reach: %r", method, url, error)
        raise Unavailable("The transceiver of this call does not answer.")

    async def attend(self, call_id: str, key: str) -> aiohttp.ClientWebSocketResponse:
        """The events of a call, from its owner. Raises like `ask`, and Crowded."""
        url = f"{self.owner(call_id)}/sessions/{call_id}/events"
        try:
            return await self._lasting.ws_connect(
                url, headers={KEY_HEADER: key}, heartbeat=attendance.HEARTBEAT_S, max_msg_size=0
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 404:
                raise EndedCall(call_id) from error
            if error.status == 429:
                raise Crowded("So many sidebands as it may have attend this call.") from error
            log.warning("%s: %d", url, error.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s: out of reach: %r", url, error)
        raise Unavailable("The transceiver of this call does not answer.")

    async def _try(self, peer: Peer, request: bytes) -> Placed | None:
        """One attempt; None if another transceiver should be asked."""
        try:
            async with self._http.post(
                f"{peer.url}/sessions", data=request, headers={"Content-Type": "application/json"}
            ) as response:
                body = await _json_of(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            peer.serving = False
            self._counters.values[metrics.Signaling.TRANSCEIVER_FAILED] += 1
            log.warning("transceiver %s is out of reach: %r", peer.endpoint, error)
            return None
        match response.status, body:
            case 201, {"call_id": str(call_id), "answer": str(answer)}:
                etag, request_id = (str(body.get(key) or "") for key in ("etag", "request_id"))
                return Placed(call_id, answer, etag, request_id)
            case 400, {"error": {"message": str(message), **rest}}:
                # The other transceivers read offers just as this one does.
                raise BadOffer(
                    message,
                    str(rest.get("code") or "invalid_offer"),
                    str(rest.get("param") or "sdp"),
                )
            case 503, _:
                peer.sessions = max(peer.sessions, peer.sessions_max)  # until its next health
            case status, _:
                self._counters.values[metrics.Signaling.TRANSCEIVER_FAILED] += 1
                log.error("transceiver %s answered %d to an offer", peer.endpoint, status)
        return None

    async def _watch(self) -> None:
        """Ask every transceiver for its load, for ever. One that hangs delays none of the rest."""
        while True:
            await asyncio.gather(*(self._check(peer) for peer in self.peers))
            await asyncio.sleep(HEALTH_PERIOD_S)

    async def _check(self, peer: Peer) -> None:
        before = peer.serving
        try:
            async with self._http.get(f"{peer.url}/health") as response:
                peer.heard(await _json_of(response))
        except (aiohttp.ClientError, TimeoutError):
            peer.serving = False
        if peer.serving != before:
            log.info("transceiver %s %s", peer.endpoint, "serves" if peer.serving else "is away")


async def _json_of(response: aiohttp.ClientResponse) -> Any:
    """A transceiver's body; None if it is not JSON."""
    try:
        return orjson.loads(await response.read())
    except orjson.JSONDecodeError:
        return None
