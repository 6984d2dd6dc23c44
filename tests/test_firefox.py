"""Firefox, unmodified: its own ICE, DTLS and codecs, by the page's WHIP client and by a call.

It gathers no candidate on loopback, whatever it is told: so all of it runs in a network namespace,
in a process of its own, with an address on an interface that leads nowhere.
"""

import asyncio
from pathlib import Path
from typing import Any

import pyroute2
import pytest

import metrics
import sdp

from . import alone, firefox, guests, shim
from .test_encoders import address, session_of
from .test_whip import Site, at_site
from .test_whip_page import CLIENT, PAGE

# A call as the Realtime API has it, but through the same signaling: microphone and data channel.
CALL = """
const pc = new RTCPeerConnection();
const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
pc.addTrack(stream.getTracks()[0], stream);
window.heard = [];
const channel = pc.createDataChannel("oai-events");
channel.onmessage = ({ data }) => heard.push(JSON.parse(data).type);
pc.ontrack = ({ streams }) => (document.querySelector("#speaker").srcObject = streams[0]);
await pc.setLocalDescription();
const response = await fetch(given[0], {
  method: "POST",
  headers: { "Content-Type": "application/sdp" },
  body: pc.localDescription.sdp,
});
await pc.setRemoteDescription({ type: "answer", sdp: await response.text() });
window.pc = pc;
return response.headers.get("Location");
"""


HOME = "10.99.0.1"

pytestmark = pytest.mark.skipif(bool(alone.REASON), reason=alone.REASON)


def settle() -> None:
    """Into a namespace with one address."""
    alone.unshare()
    with pyroute2.IPRoute() as routes:
        (loopback,) = routes.link_lookup(ifname="lo")
        routes.link("set", index=loopback, state="up")
        routes.link("add", ifname="home", kind="veth", peer="nowhere")
        for name in ("nowhere", "home"):
            (index,) = routes.link_lookup(ifname=name)
            routes.link("set", index=index, state="up")
        routes.addr("add", index=index, address=HOME, prefixlen=24)
        routes.route("add", dst="default", gateway="10.99.0.2")  # to know one's own address by


class Outside(shim.Shim):
    """The relay in miniature at that address."""

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.front)
        self.front.close()
        self.front = shim.udp_socket(HOME)
        loop.add_reader(self.front, self._upward)


def in_firefox(folder: Path, scenario: Any) -> None:
    """The scenario with a site and a page with the client, in a Firefox of its own."""
    firefox.found()  # skips here, and not where nobody hears of it
    served = folder / "page"
    served.mkdir()
    (served / "index.html").write_text(PAGE.replace("{client}", CLIENT))

    async def run(site: Site) -> None:
        with guests.site(served) as url:
            async with firefox.opened(folder / "profile") as page:
                await page.go(url)
                await scenario(site, page)

    def apart() -> None:
        settle()
        shim.Shim = Outside  # type: ignore[misc]
        at_site(folder, run)

    alone.joined(*alone.child(apart))


@pytest.mark.parametrize("codec", ["opus", "PCMU"])
def test_firefox_comes_in_by_whip(tmp_path: Path, codec: str) -> None:
    async def scenario(site: Site, page: firefox.Page) -> None:
        await page.run("window.whip = new Whip(given[0])", address(site))
        await page.run("await whip.start('sendrecv', given[0])", codec)
        session = await session_of(site)
        assert (session.offer.codec is sdp.Codec.OPUS) == (codec == "opus")
        await shim.until(lambda: session._receiver.decoded > 20, "sound")
        await page.run("await whip.restart()")
        assert site.transceiver.counters[metrics.Transceiver.ICE_RESTARTS] == 1
        decoded = session._receiver.decoded
        await shim.until(lambda: session._receiver.decoded > decoded + 20, "sound after it")
        names = session._peer.agent
        assert names._used == names.ufrags[-1]  # it checks with our new pair
        assert await page.run("return whip.pc.connectionState") == "connected"
        await page.run("await whip.stop()")
        assert not site.transceiver.sessions
        said = await page.run("return whip.statuses")
        assert said == ["POST 201", "PATCH 204", "PATCH 200", "DELETE 200"]

    in_firefox(tmp_path, scenario)


def test_firefox_calls_and_has_its_events(tmp_path: Path) -> None:
    async def scenario(site: Site, page: firefox.Page) -> None:
        calls = address(site).replace("/whip", "/v1/realtime/calls")
        where = await page.run(CALL, calls)
        session = await session_of(site)
        assert where.endswith(session.call_id)
        await shim.until(lambda: session._receiver.decoded > 20, "sound")
        heard: list[str] = []
        while "session.created" not in heard:
            heard = await page.run("await new Promise((go) => setTimeout(go, 50)); return heard")
        kinds = "return [...(await pc.getStats()).values()].filter(({type}) => type === given[0])"
        (received,) = await page.run(kinds, "inbound-rtp")
        assert received["packetsReceived"] >= 1  # the one that opens the line
        assert received["packetsLost"] == 0
        await page.run("pc.close()")
        await shim.until(lambda: not site.transceiver.sessions, "the end of the call")

    in_firefox(tmp_path, scenario)
