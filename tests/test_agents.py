"""OpenAI's Agents SDK in a browser, unmodified from npm, on a page of another origin."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import guests, test_browser
from .test_browser import LEAD_S, SENTENCE, TAIL_S, in_order, read, silence, written

system = test_browser.system
launch = test_browser.launch

Page = Any

CALLS = "v1/realtime/calls"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the page."""
    with guests.site(guests.bundled("agents.js", tmp_path_factory.mktemp("agents"))) as url:
        yield url


@pytest.fixture(scope="module")
def browser(
    launch: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Its microphone hears silence, the sentence, silence."""
    said = np.concatenate([silence(LEAD_S), read(SENTENCE), silence(TAIL_S)])
    running = launch(written(said, tmp_path_factory.mktemp("microphone") / "said.wav"))
    yield running
    running.close()


@pytest.fixture
def page(browser: Any, stranger: str) -> Iterator[Page]:
    """A page that has not called yet; it must have had nothing to complain about in the end."""
    context = browser.new_context()
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda line: complaints.append(line.text) if line.type == "error" else None
    )
    opened.goto(stranger)
    yield opened
    context.close()
    assert complaints == []


def until(page: Page, condition: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression holds; fails with what the page knows if it does not."""
    held = page.evaluate(
        f"""async (seconds) => {{
          const deadline = performance.now() + seconds * 1000;
          while (!({condition}) && performance.now() < deadline) {{
            await new Promise((resolve) => setTimeout(resolve, 10));
          }}
          return Boolean({condition});
        }}""",
        seconds,
    )
    if not held:
        known = page.evaluate("[guest.changes, guest.errors, guest.history, guest.events]")
        pytest.fail(f"not within {seconds} s: {condition}; the page knows {json.dumps(known)}")


TURN = (
    "session.created",
    "session.updated",
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "response.created",
    "output_audio_buffer.started",
    "response.output_audio_transcript.delta",
    "response.done",
    "output_audio_buffer.stopped",
)


def test_a_spoken_turn(page: Page, system: dict[str, Any]) -> None:
    """With its own defaults: semantic turn detection, a transcription, an audio format."""
    url = system["page"] + CALLS
    call_id = page.evaluate("(url) => guest.connect({ url, apiKey: 'none', insecure: true })", url)
    assert call_id.startswith("rtc_")
    until(page, "guest.types().includes('session.updated')")
    until(page, "guest.loudness() > 0.02")
    until(page, "guest.types().includes('output_audio_buffer.stopped')")
    types = page.evaluate("guest.types()")
    assert in_order(TURN, types), types
    roles = [(item["role"], item["status"]) for item in page.evaluate("guest.history")]
    assert ("assistant", "completed") in roles
    assert page.evaluate("guest.errors") == []
