"""Chromium with two ways in, of which the one that it speaks by is lost when the call is no longer
young: it goes on by the other, by itself.

libwebrtc destroys a pair that it does not use once nothing has come by it for 30 s: that is why
this takes 40 s. (aiortc is in test_paths.py and test_lab.py: it has no second pair by its nature.)
"""

import time
from pathlib import Path
from typing import Any

import paths
from metrics import Transceiver as Count

from . import shim
from .test_encoders import address, session_of, speech
from .test_whip import Site, at_site
from .test_whip_page import page_of

__all__ = ["speech"]  # a fixture

DEAD_S = 30.0
"""libwebrtc's DEAD_CONNECTION_RECEIVE_TIMEOUT, by which a pair that is not used has ended."""

SECOND = """(way) => {
  const taken = RTCPeerConnection.prototype.setRemoteDescription;
  RTCPeerConnection.prototype.setRemoteDescription = function ({ type, sdp }) {
    const row = `a=candidate:2 1 udp 1 127.0.0.1 ${way} typ host`;
    return taken.call(this, { type, sdp: sdp.replace(/(a=candidate:.*)/, `$1\\r\\n${row}`) });
  };
}"""


def pairs(found: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{each['state']}: {each['requestsSent']} checks sent, {each['requestsReceived']} received"
        for each in found
    )


def test_a_page_goes_on_by_its_second_way_when_the_call_is_no_longer_young(
    tmp_path: Path, speech: Path
) -> None:
    async def scenario(site: Site) -> None:
        first, second = site.shim, shim.Shim(site.shim.transceiver)
        came: set[shim.Shim] = set()

        def gates(way: shim.Shim) -> None:
            def up(datagram: bytes) -> bytes:
                came.add(way)
                return datagram

            # The first to answer is all that is checked: neither does before both were asked.
            way.up, way.down = up, lambda datagram: datagram if len(came) == 2 else None

        async with page_of(tmp_path / "page", speech) as page:
            try:
                gates(first)
                gates(second)
                await page.evaluate(SECOND, second.address[1])
                await page.evaluate("(url) => void (window.whip = new Whip(url))", address(site))
                await page.evaluate("whip.start('sendonly', 'opus')")
                session = await session_of(site)
                await shim.until(lambda: session._receiver.decoded > 20, "sound")
                by, counters = session._peer.agent, site.transceiver.counters
                assert by.active.relay == first.back.getsockname(), "by priority"
                await page.wait_for_timeout((DEAD_S + paths.PERIOD_S) * 1000)
                assert by.active.relay == first.back.getsockname(), "and nothing has moved it"
                print(
                    "Chromium's pairs:", pairs(await page.evaluate("whip.stats('candidate-pair')"))
                )
                assert counters[Count.CHECKS_REFUSED] == 0
                assert counters[Count.CHECKS_ANSWERED] >= 2 * DEAD_S / (paths.PERIOD_S + 2)

                first.up = first.down = lambda datagram: None
                lost_at, heard = time.monotonic(), session._receiver.decoded
                await shim.until(lambda: by.active.relay == second.back.getsockname(), "a move")
                await shim.until(lambda: session._receiver.decoded > heard + 50, "sound again")
                print(
                    f"heard again for a second, {time.monotonic() - lost_at:.1f} s after the loss"
                )
                assert await page.evaluate("whip.pc.connectionState") == "connected"
                await page.evaluate("whip.stop()")
            finally:
                second.close()

    at_site(tmp_path, scenario)
