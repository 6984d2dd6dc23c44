"""OpenAI's Agents SDK in a browser, unmodified from npm, on a page of another origin."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keys

from . import guests, test_browser
from .test_browser import LEAD_S, SENTENCE, TAIL_S, in_order, read, silence, written

system = test_browser.system
launch = test_browser.launch

Page = Any

CALLS = "v1/realtime/calls"
SECRETS = "v1/realtime/client_secrets"

KEY, LINE = keys.make("shop", bytes(32))


@pytest.fixture(scope="module")
def keyed(system: dict[str, Any]) -> Iterator[str]:
    """URL of a second signaling before the same transceivers, one that asks for keys."""
    folder = Path(system["state_dir"])
    path = folder / "api-keys"
    path.touch(mode=0o600)
    path.write_text(LINE)
    text = (folder / "signaling.toml").read_text()
    listen = f'listen = "{urllib.parse.urlsplit(system["page"]).netloc}"'
    assert listen in text
    path = folder / "signaling-keyed.toml"
    path.write_text(text.replace(listen, 'listen = "127.0.0.1:0"\nkeys_file = "api-keys"'))
    argv = [Path(sys.executable).with_name("signaling"), "run", "--config", path]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            said = ""
            while "is ready" not in (line := running.stderr.readline()):
                said += line
                assert line, said
            yield next(word for word in line.split() if word.startswith("http://"))
        finally:
            running.terminate()


def ask(method: str, url: str, key: str | None = KEY, body: Any = None) -> tuple[int, Any]:
    """A request of an application's server: status and JSON."""
    request = urllib.request.Request(url, method=method)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def secret(base: str, key: str | None, session: dict[str, Any] | None = None) -> str:
    """An ephemeral key for the page."""
    status, found = ask("POST", base + SECRETS, key, {"session": session} if session else {})
    assert status == 200, found
    return str(found["value"])


def until_gone(system: dict[str, Any]) -> None:
    """The call is over at its transceiver: by the browser's goodbye, not by a deadline."""
    deadline = time.monotonic() + 10
    while sessions(system):
        assert time.monotonic() < deadline, "the call has not ended"
        time.sleep(0.05)


def sessions(system: dict[str, Any]) -> int:
    """Calls at the transceivers."""
    healths = (ask("GET", f"http://{at}/v1/health", None)[1] for at in system["transceivers"])
    return sum(health["sessions"] for health in healths)


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
def page(browser: Any, stranger: str, system: dict[str, Any]) -> Iterator[Page]:
    """A page that has not called yet; it must have had nothing to complain about in the end, and
    its call must be over at the transceiver."""
    context = browser.new_context()
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda line: complaints.append(line.text) if line.type == "error" else None
    )
    opened.goto(stranger)
    yield opened
    opened.evaluate("guest.session?.close()")
    until_gone(system)
    context.close()
    # Browsers report every answer that is no success: those are asked for here.
    assert [line for line in complaints if "Failed to load resource" not in line] == []


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
    "conversation.item.added",
    "conversation.item.input_audio_transcription.completed",
    "response.created",
    "output_audio_buffer.started",
    "response.output_audio_transcript.delta",
    "response.done",
    "output_audio_buffer.stopped",
)


PRESS = {"input": {"turnDetection": None}}
"""Push-to-talk: what the microphone hears is nobody's turn."""


def connect(page: Page, base: str, key: str, **options: Any) -> str:
    """A call by the SDK; its id."""
    return str(
        page.evaluate(
            "(how) => guest.connect(how)", {"url": base + CALLS, "apiKey": key, **options}
        )
    )


def test_a_spoken_turn(page: Page, system: dict[str, Any]) -> None:
    """With its own defaults: semantic turn detection, a transcription, an audio format."""
    call_id = connect(page, system["page"], secret(system["page"], None), tools=True)
    assert call_id.startswith("rtc_")
    until(page, "guest.last('session.updated')?.session.instructions === 'Repeat what you hear.'")
    updated = page.evaluate("guest.last('session.updated').session")
    assert [tool["name"] for tool in updated["tools"]] == ["weather"]
    assert updated["audio"]["input"]["turn_detection"]["type"] == "semantic_vad"
    assert ask("GET", f"{system['page']}{CALLS}/{call_id}", None) == (
        200,
        {"id": call_id, "status": "live"},
    )
    until(page, "guest.loudness() > 0.02")
    until(page, "guest.types().includes('output_audio_buffer.stopped')")
    heard = page.evaluate("guest.heard()")
    assert heard["packets"] > 50
    assert heard["energy"] > 0
    types = page.evaluate("guest.types()")
    assert in_order(TURN, types), types
    assert "conversation.item.retrieved" in types  # which the SDK asks for by itself
    user, assistant = page.evaluate("guest.history")
    assert (user["role"], user["status"]) == ("user", "completed")
    assert "speech" in user["content"][0]["transcript"]
    assert (assistant["role"], assistant["status"]) == ("assistant", "completed")
    assert assistant["content"][0]["transcript"]
    assert page.evaluate("guest.errors") == []


def test_an_interruption_and_the_end_of_a_call(
    page: Page, system: dict[str, Any], keyed: str
) -> None:
    """By an ephemeral key of an API key, with a session in it that the page does not name."""
    key = secret(keyed, KEY, {"type": "realtime", "max_output_tokens": 777})
    call_id = connect(page, keyed, key)
    assert page.evaluate("guest.last('session.created').session.max_output_tokens") == 777
    assert sessions(system) == 1
    until(page, "guest.loudness() > 0.02")
    page.evaluate("guest.session.interrupt()")
    until(page, "guest.types().includes('output_audio_buffer.cleared')")
    until(page, "guest.last('response.done')?.response.status === 'cancelled'")
    until(page, "guest.loudness() < 0.001")
    truncated = page.evaluate("guest.last('conversation.item.truncated')")
    assert 0 < truncated["audio_end_ms"] < 3_000
    assert "output_audio_buffer.stopped" not in page.evaluate("guest.types()")
    page.evaluate("guest.session.close()")
    assert page.evaluate("guest.changes") == ["connecting", "connected", "disconnected"]
    until_gone(system)
    status, body = ask("GET", f"{keyed}{CALLS}/{call_id}")
    assert (status, body["error"]["code"]) == (404, "call_id_not_found")
    assert page.evaluate("guest.errors") == []


def test_a_text_message_is_answered_in_words_and_sound(page: Page, system: dict[str, Any]) -> None:
    connect(page, system["page"], "no key at all", insecure=True, config={"audio": PRESS})
    page.evaluate("guest.session.sendMessage('Good morning.')")
    until(page, "guest.types().includes('response.done')")
    assert page.evaluate("guest.last('response.done').response.status") == "completed"
    user, assistant = page.evaluate("guest.history")
    assert user["content"][0] == {"type": "input_text", "text": "Good morning."}
    assert assistant["content"]
    assert page.evaluate("guest.errors") == []


def test_the_sideband_of_the_sdk_with_the_pages_own_key(
    page: Page, system: dict[str, Any], keyed: str
) -> None:
    key = secret(keyed, KEY)
    call_id = connect(page, keyed, key, config={"audio": PRESS})
    url = keyed.replace("http", "ws") + f"v1/realtime?call_id={call_id}"
    page.evaluate("(how) => guest.attend(how)", {"url": url, "apiKey": key})
    until(page, "guest.sideband.at(0)?.type === 'session.created'")
    until(page, "guest.last('session.updated').session.instructions === 'Sing.'")
    status, _ = ask("POST", f"{keyed}{CALLS}/{call_id}/hangup")
    assert status == 200
    until(page, "guest.attending.status === 'disconnected'")
    until(page, "guest.transport.status === 'disconnected'")


def test_a_refusal_reaches_the_program_in_words(page: Page, keyed: str) -> None:
    """With the preflight and the error both readable from another origin."""
    why = page.evaluate(
        "(how) => guest.connect(how).catch((error) => error.message)",
        {"url": keyed + CALLS, "apiKey": "ek_made_up"},
    )
    assert "failed with status 401" in why
    assert "ephemeral key" in why
