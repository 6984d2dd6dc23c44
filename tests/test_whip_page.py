"""A page in Chromium as a WHIP client: forty lines of its own, of another origin than signaling.

All of WHIP with a real ICE agent: trickled candidates, a restart in the middle of a sentence, the
end; telephone codecs both ways; certificates of every kind.
"""

import base64
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metrics
import sdp

from . import guests, shim
from .test_browser import BROWSERS, FLAGS, RECORD, absent, likeness
from .test_browser import speech as without_silence
from .test_encoders import Heard, address, session_of, speech
from .test_kinds import check
from .test_whip import Site, at_site

__all__ = ["speech"]  # a fixture

PAGE = """<!doctype html><meta charset="utf-8"><title>An encoder</title>
<link rel="icon" href="data:,"><audio id="speaker" autoplay></audio>
<script>{client}</script>
"""

# The client: what a page needs to speak by WHIP and no more.
CLIENT = """
window.Whip = class {
  constructor(url, certificates = []) {
    this.url = url;
    this.statuses = [];
    this.pc = new RTCPeerConnection({ certificates });
    this.pc.ontrack = ({ streams }) => (document.querySelector("#speaker").srcObject = streams[0]);
  }
  async ask(method, url, headers = {}, body) {
    const response = await fetch(url, { method, headers, body });
    this.statuses.push(`${method} ${response.status}`);
    this.etag = response.headers.get("ETag") ?? this.etag;
    return response;
  }
  async start(direction, codec) {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio });
    const line = this.pc.addTransceiver(stream.getTracks()[0], { direction, streams: [stream] });
    const { codecs } = RTCRtpSender.getCapabilities("audio");
    line.setCodecPreferences(codecs.filter(({ mimeType }) => mimeType === `audio/${codec}`));
    this.candidates = [];
    const gathered = new Promise((done) => {
      this.pc.onicecandidate = ({ candidate }) =>
        candidate ? this.candidates.push(candidate.candidate) : done();
    });
    await this.pc.setLocalDescription();
    const type = { "Content-Type": "application/sdp" };
    const response = await this.ask("POST", this.url, type, this.pc.localDescription.sdp);
    this.answer = await response.text();
    if (!response.ok) throw new Error(this.answer);
    this.session = new URL(response.headers.get("Location"), this.url).href;
    await this.pc.setRemoteDescription({ type: "answer", sdp: this.answer });
    await gathered;
    await this.patch(this.etag);
  }
  patch(etag) {
    const take = (name) => this.pc.localDescription.sdp.match(`a=${name}:.*`)[0];
    const lines = ["a=group:BUNDLE 0", "m=audio 9 UDP/TLS/RTP/SAVPF 0", "a=mid:0"];
    lines.push(take("ice-ufrag"), take("ice-pwd"));
    lines.push(...this.candidates.map((each) => `a=${each}`), "a=end-of-candidates", "");
    const type = "application/trickle-ice-sdpfrag";
    const headers = { "Content-Type": type, "If-Match": etag };
    return this.ask("PATCH", this.session, headers, lines.join("\\r\\n"));
  }
  async restart() {
    this.candidates = [];
    await this.pc.setLocalDescription(await this.pc.createOffer({ iceRestart: true }));
    const fragment = await (await this.patch("*")).text();
    for (const name of ["ice-ufrag", "ice-pwd"]) {
      const [line] = fragment.match(`a=${name}:[^\\r]*`);
      this.answer = this.answer.replaceAll(new RegExp(`a=${name}:[^\\r]*`, "g"), line);
    }
    await this.pc.setRemoteDescription({ type: "answer", sdp: this.answer });
  }
  async stats(type) {
    return [...(await this.pc.getStats()).values()].filter((found) => found.type === type);
  }
  async stop() {
    await this.ask("DELETE", this.session);
  }
};
"""


@asynccontextmanager
async def page_of(folder: Path, microphone: Path) -> AsyncIterator[Any]:
    """A page with the client in the system's Chromium, whose microphone is a file."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        absent("no Chromium on this machine: install Debian's package chromium")
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    folder.mkdir()
    (folder / "index.html").write_text(PAGE.replace("{client}", CLIENT))
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}%noloop"]
    with guests.site(folder) as url:
        async with playwright.async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=found, args=flags)
            try:
                page = await browser.new_page()
                await page.goto(url)
                yield page
            finally:
                await browser.close()


def test_a_page_speaks_trickles_restarts_and_leaves(tmp_path: Path, speech: Path) -> None:
    async def scenario(site: Site) -> None:
        async with page_of(tmp_path / "page", speech) as page:
            await page.evaluate("(url) => void (window.whip = new Whip(url))", address(site))
            await page.evaluate("whip.start('sendonly', 'opus')")
            session = await session_of(site)
            heard = Heard(session)
            await heard.begun()
            first = await page.evaluate("whip.etag")
            await page.evaluate("whip.restart()")
            assert await page.evaluate("whip.etag") == f'"{session.etag}"' != first
            assert site.transceiver.counters[metrics.Transceiver.ICE_RESTARTS] == 1
            # The browser has left its old pair of credentials: what is heard came with the new one.
            (transport,) = await page.evaluate("whip.stats('transport')")
            assert transport["iceLocalUsernameFragment"] == session.client_ice[0]
            alike = await heard.sentence()
            print(f"Chromium, Opus, with a restart: what was heard of the sentence: {alike:.2f}")
            assert alike > 0.6
            assert await page.evaluate("whip.pc.connectionState") == "connected"
            await page.evaluate("whip.stop()")
            assert not site.transceiver.sessions
            await page.evaluate("whip.stop()")
            said = await page.evaluate("whip.statuses")
            assert said == ["POST 201", "PATCH 204", "PATCH 200", "DELETE 200", "DELETE 200"]

    at_site(tmp_path, scenario)


@pytest.mark.parametrize("codec", ["PCMU", "PCMA"])
def test_a_page_converses_by_telephone_codec(tmp_path: Path, speech: Path, codec: str) -> None:
    """The parrot's reply, as it came out of the loudspeaker, is what was said."""

    async def scenario(site: Site) -> None:
        async with page_of(tmp_path / "page", speech) as page:
            await page.evaluate("(url) => void (window.whip = new Whip(url))", address(site))
            await page.evaluate("([codec]) => whip.start('sendrecv', codec)", [codec])
            session = await session_of(site)
            heard = Heard(session)
            assert session.offer.codec is sdp.Codec(f"{codec}/8000")
            await page.evaluate(RECORD)
            alike = await heard.sentence()
            await shim.until(lambda: session._playout.packets_sent > 20, "a reply")
            await shim.until(lambda: session._playout.wakes_at is None, "its end")
            await page.wait_for_timeout(500)  # of the browser's jitter buffer
            octets = base64.b64decode(await page.evaluate("recorded()"))
            said = without_silence(check.sentence() / 32768)
            echo = likeness(said, np.frombuffer(octets, "<i2") / 32768)
            print(f"Chromium, {codec}: heard {alike:.2f}, and the reply {echo:.2f}")
            assert alike > 0.6
            assert echo > 0.6
            (inbound,) = await page.evaluate("whip.stats('inbound-rtp')")
            assert inbound["packetsReceived"] > 20
            assert inbound.get("packetsDiscarded", 0) < 20
            await page.evaluate("whip.stop()")

    at_site(tmp_path, scenario)


@pytest.mark.parametrize("bits", [2048, 4096])
def test_a_page_with_an_rsa_certificate_connects(tmp_path: Path, speech: Path, bits: int) -> None:
    made = """([url, bits]) => RTCPeerConnection.generateCertificate({
      name: "RSASSA-PKCS1-v1_5", hash: "SHA-256", modulusLength: bits,
      publicExponent: new Uint8Array([1, 0, 1]),
    }).then((certificate) => { window.whip = new Whip(url, [certificate]); })"""

    async def scenario(site: Site) -> None:
        async with page_of(tmp_path / "page", speech) as page:
            await page.evaluate(made, [address(site), bits])
            await page.evaluate("whip.start('sendonly', 'opus')")
            session = await session_of(site)
            await shim.until(lambda: session._receiver.decoded > 20, "sound")
            await page.evaluate("whip.stop()")

    at_site(tmp_path, scenario)
