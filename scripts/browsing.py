"""A caller in some part of the world who uses Chromium, told what to do line by line.

For the laboratory (lab.py), which starts one in a caller's namespace: the browser is its child, so
that its packets take that way, and is driven over a pipe. Orders and answers are those of
visitor.py. The page is empty; its microphone is the recorded sentence, over and over, as a Web
Audio source, since a page without https is given no real one. Nothing of ICE is set or helped.
"""

import base64
import io
import json
import shutil
import sys
import time
import urllib.error
import urllib.request
import wave
from typing import Any

import numpy as np
import visitor
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    # A page without a microphone gets no host candidates of its own but obfuscated ones; which the
    # server does not read either way.
    "--disable-features=WebRtcHideLocalIpsWithMdns",
)

OFFER = """async ({ said, detection, talk, pause }) => {
  const octets = Uint8Array.from(atob(said), (each) => each.charCodeAt(0));
  const context = new AudioContext({ sampleRate: 48000 });
  const sentence = await context.decodeAudioData(octets.buffer);
  const turn = context.createBuffer(1, Math.round(48000 * (talk + pause)), 48000);
  const from = sentence.getChannelData(0);
  const to = turn.getChannelData(0);
  for (let at = 0; at < Math.round(48000 * talk); at += 1) to[at] = from[at % from.length];
  const source = context.createBufferSource();
  source.buffer = turn;
  source.loop = true;
  const microphone = context.createMediaStreamDestination();
  source.connect(microphone);
  const peer = new RTCPeerConnection();
  const seen = { events: {}, states: [], context };
  window.peer = peer;
  window.seen = seen;
  const state = () => seen.states.push([performance.timeOrigin + performance.now(),
    `${peer.iceConnectionState}/${peer.connectionState}`]);
  peer.oniceconnectionstatechange = state;
  peer.onconnectionstatechange = state;
  const channel = peer.createDataChannel("oai-events");
  channel.onmessage = ({ data }) => {
    const { type } = JSON.parse(data);
    seen.events[type] = (seen.events[type] ?? 0) + 1;
  };
  channel.onopen = () => {
    channel.send(JSON.stringify({ type: "session.update", session: {
      type: "realtime", audio: { input: { turn_detection: detection } } } }));
    source.start();
  };
  peer.ontrack = ({ streams }) => {
    const speaker = new Audio();
    speaker.srcObject = streams[0];
    speaker.play();
    window.speaker = speaker;
  };
  peer.addTrack(microphone.stream.getTracks()[0], microphone.stream);
  await peer.setLocalDescription(await peer.createOffer());
  return peer.localDescription.sdp;
}"""

PAIRS = """async () => {
  const stats = [...(await peer.getStats()).values()];
  const by = new Map(stats.map((each) => [each.id, each]));
  const chosen = stats.find((each) => each.type === "transport")?.selectedCandidatePairId;
  return stats.filter((each) => each.type === "candidate-pair").map((each) => ({
    to: by.get(each.remoteCandidateId)?.address, state: each.state, chosen: each.id === chosen,
    rtt: each.currentRoundTripTime, sent: each.requestsSent, answered: each.responsesReceived,
  }));
}"""


def _sentence() -> str:
    """What is said, as a file for `decodeAudioData`."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(visitor.RATE_HZ)
        file.writeframes(np.ascontiguousarray(visitor.speech()).tobytes())
    return base64.b64encode(made.getvalue()).decode()


class Surfer:
    """One caller with a browser, with at most one call."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._page: Any = None
        self._hang_up = ("", {})  # type: tuple[str, dict[str, str]]
        self._said = _sentence()

    def do(self, order: dict[str, Any]) -> Any:
        """Do what one line says."""
        verb = order.pop("do")
        return getattr(self, f"_{verb}")(**order)

    def _call(
        self,
        url: str,
        key: str,
        headers: dict[str, str] | None = None,
        talk_s: float = 0.0,
        pause_s: float = 0.4,
    ) -> dict[str, Any]:
        self._page = self._browser.new_page()
        about = {"said": self._said, "detection": visitor.DETECTION}
        offer = self._page.evaluate(OFFER, {**about, "talk": talk_s, "pause": pause_s})
        words = {"Authorization": f"Bearer {key}", **(headers or {})}
        posted = time.monotonic()
        request = urllib.request.Request(
            url + visitor.CALLS,
            data=offer.encode(),
            headers={**words, "Content-Type": "application/sdp"},
        )
        with urllib.request.urlopen(request, timeout=visitor.PATIENCE_S) as response:
            answer = response.read().decode()
            self._hang_up = f"{url}{response.headers['Location']}/hangup", words
        answered = time.monotonic()
        self._page.evaluate("sdp => peer.setRemoteDescription({ type: 'answer', sdp })", answer)
        self._page.wait_for_function(
            "peer.connectionState === 'connected'", timeout=visitor.PATIENCE_S * 1e3
        )
        return {
            "posted": posted,
            "answered": answered,
            "connected": self._states()[-1][0],
            "relays": visitor.relays(answer),
            "by": self._by(),
        }

    def _checks(self, count: int = 5) -> list[float]:
        """Round trips of the browser's own checks in milliseconds, on the pair that carries the
        call: the latest ones, a look a second."""
        found = []
        for _ in range(count):
            self._page.wait_for_timeout(1_000)
            pairs = self._page.evaluate(PAIRS)
            found += [each["rtt"] * 1e3 for each in pairs if each["chosen"] and each["rtt"]]
        return found

    def _until(self, event: str, count: int = 1, most_s: float = 60.0) -> float:
        self._page.wait_for_function(
            "([event, count]) => (seen.events[event] ?? 0) >= count",
            arg=[event, count],
            timeout=most_s * 1e3,
        )
        return time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "state": self._page.evaluate("peer.connectionState"),
            "states": self._states(),
            "events": self._page.evaluate("seen.events"),
            "by": self._by(),
            "pairs": self._page.evaluate(PAIRS),
        }

    def _hangup(self) -> str:
        url, headers = self._hang_up
        request = urllib.request.Request(url, data=b"", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                said = str(response.status)
        except (urllib.error.URLError, OSError) as error:
            said = repr(error)
        self._page.close()
        return said

    def _states(self) -> list[tuple[float, str]]:
        """States of ICE and of the connection, on time.monotonic."""
        offset = time.time() - time.monotonic()
        return [(at / 1e3 - offset, what) for at, what in self._page.evaluate("seen.states")]

    def _by(self) -> str:
        chosen = [each["to"] for each in self._page.evaluate(PAIRS) if each["chosen"]]
        return chosen[0] if chosen else ""


def main() -> None:
    """Do as told until standard input ends."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        print(json.dumps({"error": "there is no Chromium on this machine"}), flush=True)
        return
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=[*FLAGS])
        surfer = Surfer(browser)
        print(json.dumps({"is": {"version": browser.version}}), flush=True)
        for line in sys.stdin:
            try:
                answer = {"is": surfer.do(json.loads(line))}
            except Exception as error:  # whatever went wrong is the answer
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
