"""Loss between a real Chromium and the relay: each side's reports make the other send FEC, and what
is lost then is restored, in the browser and in the transceiver.

    Chromium ── a path that loses a tenth of all audio (scripts/lane.py) ── the whole system
"""

import asyncio
import importlib
import json
import random
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import test_browser

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATIENCE_S = 90.0
"""Chromium reports every 2.5 to 7.5 s, the parrot speaks half of the time: 15 to 25 s in all."""
LOSS = 0.10
SEED = 20

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# The page keeps its connection to itself; and it is to go where the path begins.
DETOUR = """
  const Peer = window.RTCPeerConnection;
  window.RTCPeerConnection = class extends Peer {
    constructor(...options) {
      super(...options);
      window.peer = this;
    }
    setRemoteDescription({ type, sdp }) {
      return super.setRemoteDescription({ type, sdp: sdp.replaceAll(" %d typ", " %d typ") });
    }
  };
"""

RECEIVED = """async () => {
  const all = [...(await peer.getStats()).values()];
  const { packetsReceived, packetsLost, fecPacketsReceived, fecPacketsDiscarded,
          concealmentEvents } = all.find(({ type }) => type === "inbound-rtp") || {};
  return { packetsReceived, packetsLost, fecPacketsReceived, fecPacketsDiscarded,
           concealmentEvents };
}"""

system, launch = test_browser.system, test_browser.launch


@pytest.fixture
def port(system: dict[str, Any]) -> Iterator[int]:
    """Of a path to the relay that loses audio and nothing else."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        lane = importlib.import_module("lane")
    finally:
        sys.path.remove(str(SCRIPTS))
    host, _, public = system["relay"].rpartition(":")
    chance = random.Random(SEED)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def survives(datagram: bytes) -> bool:
        is_audio = 128 <= datagram[0] < 192 and not 192 <= datagram[1] < 224  # RFC 5761 section 4
        return not is_audio or chance.random() >= LOSS

    async def opened() -> Any:
        path = lane.Lane((host, int(public)))
        path.up = path.down = survives
        return path

    path = asyncio.run_coroutine_threadsafe(opened(), loop).result(PATIENCE_S)
    yield path.address[1]
    loop.call_soon_threadsafe(path.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE_S)
    loop.close()


@pytest.fixture
def page(
    launch: Callable[[Path], Any], system: dict[str, Any], port: int, tmp_path: Path
) -> Iterator[Any]:
    """Somebody who says two sentences, and then listens as long; over and over."""
    sentence = test_browser.read(test_browser.SENTENCE)
    turn = np.concatenate([sentence, sentence, test_browser.silence(7.0)])
    said = np.tile(turn, int(PATIENCE_S * test_browser.RATE_HZ / len(turn)) + 1)
    browser = launch(test_browser.written(said, tmp_path / "said.wav"))
    page = browser.new_context().new_page()
    page.add_init_script(DETOUR % (int(system["relay"].rpartition(":")[2]), port))
    page.goto(system["page"])
    yield page
    browser.close()


def counted(system: dict[str, Any], name: str) -> int:
    """The sum of a counter over the transceivers."""
    total = 0.0
    for address in system["transceivers"]:
        with _OPENER.open(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^\w*_{name}_total(?:{{.*}})? (\S+)$", text, re.M)
        assert found, f"no counter {name}"
        total += sum(map(float, found))
    return int(total)


def test_what_a_browser_and_we_lose_is_restored(system: dict[str, Any], page: Any) -> None:
    page.get_by_role("button", name="Start").click()
    begun = time.monotonic()
    down, up = 0, 0
    while not (down >= 3 and up >= 3):
        page.wait_for_timeout(250)
        seen = page.evaluate(RECEIVED)
        down = (seen.get("fecPacketsReceived") or 0) - (seen.get("fecPacketsDiscarded") or 0)
        up = counted(system, "frames_recovered")
        passed_s = time.monotonic() - begun
        assert passed_s < PATIENCE_S, f"no redundancy in use: {json.dumps(seen)}, up {up}"
    concealed = counted(system, "frames_concealed")
    print(f"after {passed_s:.0f} s: the browser {json.dumps(seen)}")
    print(f"the transceiver restored {up} frames and concealed {concealed}")
    assert seen["packetsLost"] >= down
