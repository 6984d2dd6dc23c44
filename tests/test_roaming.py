"""Clients that move, and those who would like to be taken for one: another network, another port,
new ICE credentials; copied, replayed, forged and made-up packets.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aioice.ice
import pytest

from metrics import Transceiver as Count

from . import shim, test_transceiver
from .test_transceiver import House

PAIR = {"ufrag": "abcd", "pwd": "p" * 22}


def restarted(client: shim.Client, ufrag: str, password: str) -> None:
    """Have a stock client check with new credentials: what applying an answer would do, which
    aiortc does not do after the first."""
    ice = client.pc.sctp.transport.transport.iceGatherer._connection
    ice.remote_username, ice.remote_password = ufrag, password


def test_an_ice_restart_keeps_dtls_srtp_and_the_data_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)

    async def scenario(on: House) -> None:
        client, call_id = await on.call()
        (session,) = test_transceiver.sessions(on)
        counters, old = on.transceiver.counters, session._peer.agent.ufrags
        for _ in range(2):
            status, pair, _ = await on.ask("POST", f"/v1/sessions/{call_id}/ice", PAIR)
            assert status == 200
            restarted(client, pair["ufrag"], pair["pwd"])
            await shim.until(lambda pair=pair: session._peer.agent.ufrags[-1] in checked(on))
        assert pair["ufrag"] not in old
        assert old[0] not in session._peer.agent.ufrags, "two pairs are answered, not all of them"
        assert counters[Count.ICE_RESTARTS] == 2

        heard = session._receiver.received
        count = len(client.messages)
        client.channel.send('{"type": "input_audio_buffer.clear"}')
        await shim.until(lambda: len(client.messages) > count)
        await shim.until(lambda: session._receiver.received > heard + 5)
        assert client.pc.connectionState == "connected"
        assert session.call_id == call_id
        assert (await on.ask("DELETE", f"/v1/sessions/{call_id}"))[0] == 200

    def checked(on: House) -> set[bytes]:
        return {request.ufrag for request in seen}

    seen: list[Any] = []
    check = test_transceiver.transceiver.Mux._check

    def watched(self: Any, payload: bytes, *rest: Any) -> Count:
        outcome = check(self, payload, *rest)
        if outcome is Count.FORWARDED:
            seen.append(test_transceiver.stun.read_request(payload))
        return outcome

    monkeypatch.setattr(test_transceiver.transceiver.Mux, "_check", watched)
    test_transceiver.house(tmp_path, scenario)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, "ufrag"),
        ([], "ufrag"),
        ({"ufrag": "abcd"}, "ufrag"),
        (PAIR | {"ufrag": "abc"}, "ufrag"),
        (PAIR | {"ufrag": "a b c"}, "ufrag"),
        (PAIR | {"pwd": "short"}, "pwd"),
        (PAIR | {"pwd": 7}, "pwd"),
    ],
)
def test_an_ice_restart_that_is_wrong_is_refused(tmp_path: Path, body: Any, param: str) -> None:
    async def scenario(on: House) -> None:
        _, answer, _ = await on.offer(await shim.Client().offer())
        path = f"/v1/sessions/{answer['call_id']}/ice"
        status, refusal, _ = await on.ask("POST", path, body)
        assert status == 400
        assert refusal["error"]["param"] == param
        assert on.transceiver.counters[Count.ICE_RESTARTS] == 0
        status, refusal, _ = await on.ask("POST", "/v1/sessions/rtc_x/ice", PAIR)
        assert (status, refusal["error"]["code"]) == (404, "call_id_not_found")

    test_transceiver.house(tmp_path, scenario)
