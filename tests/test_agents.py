"""OpenAI's Agents SDK in a browser, unmodified from npm, on a page of another origin."""

import asyncio
import contextlib
import functools
import json
import queue
import re
import subprocess
import sys
import threading
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

from . import guests, servers, test_browser
from .test_browser import LEAD_S, SENTENCE, TAIL_S, in_order, read, silence, written
from .test_transceiver import free_port

system = test_browser.system
launch = test_browser.launch

Page = Any

CALLS = "v1/realtime/calls"
SECRETS = "v1/realtime/client_secrets"

KEY, LINE = keys.make("shop", bytes(32))
START_S_MAX = 20.0


@contextlib.contextmanager
def started(folder: Path, program: str, name: str, text: str) -> Iterator[Path]:
    """One more program of the system, by a file of its own; its log, in which it is ready."""
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    config.write_text(text)
    argv = [Path(sys.executable).with_name(program), "run", "--config", config]
    with log.open("w") as said, subprocess.Popen(argv, stderr=said) as running:
        try:
            deadline = time.monotonic() + START_S_MAX
            while " ready" not in log.read_text():
                assert running.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield log
        finally:
            running.terminate()


def url_of(log: Path) -> str:
    """Where a signaling says that it is."""
    return next(word for word in log.read_text().split() if word.startswith("http://"))


@pytest.fixture(scope="module")
def keyed_log(system: dict[str, Any]) -> Iterator[Path]:
    """The log of a second signaling before the same transceivers, one that asks for keys."""
    folder = Path(system["state_dir"])
    path = folder / "api-keys"
    path.touch(mode=0o600)
    path.write_text(LINE)
    text = (folder / "signaling.toml").read_text()
    listen = f'listen = "{urllib.parse.urlsplit(system["page"]).netloc}"'
    assert listen in text
    text = text.replace(listen, 'listen = "127.0.0.1:0"\nkeys_file = "api-keys"')
    with started(folder, "signaling", "signaling-keyed", text) as log:
        yield log


@pytest.fixture(scope="module")
def keyed(keyed_log: Path) -> str:
    """Its URL."""
    return url_of(keyed_log)


@pytest.fixture(scope="module")
def modelled(system: dict[str, Any]) -> Iterator[str]:
    """URL of a third signaling, before a transceiver whose model server asks for a tool."""
    folder, listen = Path(system["state_dir"]), f"127.0.0.1:{free_port()}"
    urls: queue.Queue[str] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def model() -> None:
        async with servers.scripted(asks_for_a_tool) as server:
            urls.put(server.url)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(model(),), name="model")
    thread.start()
    try:
        backend = f'kind = "realtime"\nurl = "{urls.get(timeout=START_S_MAX)}"'
        text = (folder / "transceiver-1.toml").read_text()
        text = text.replace(system["transceivers"][0], listen)
        text = text.replace('kind = "parrot"', backend)
        # Or the first signaling would find it, too, and place other tests' calls there.
        text = re.sub(r"\[redis\]\n.*\n", "", text)
        assert backend in text and "redis" not in text
        before = (folder / "signaling.toml").read_text()
        before = before.replace(urllib.parse.urlsplit(system["page"]).netloc, "127.0.0.1:0")
        before = re.sub("transceivers = .*", f'transceivers = ["{listen}"]', before)
        before = re.sub(r"\[redis\]\n.*\n", "", before)  # or it would know the others, too
        with (
            started(folder, "transceiver", "transceiver-modelled", text),
            started(folder, "signaling", "signaling-modelled", before) as log,
        ):
            yield url_of(log)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def asks_for_a_tool(line: servers.Line) -> None:
    """A model server that wants to know the weather before it says anything."""
    await line.greet()
    call = {
        "id": "item_call",
        "type": "function_call",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city": "Bergen"}',
        "status": "completed",
    }
    about = {"response_id": "resp_1", "output_index": 0, "item_id": call["id"]}
    while True:
        event = json.loads(await line.socket.receive_str())
        line.heard.append(event)
        if event["type"] == "session.update":
            await line.say({"type": "session.updated", "session": event["session"]})
        if event["type"] != "response.create":
            continue
        outputs = [
            event["item"]["output"]
            for event in line.heard
            if event.get("item", {}).get("type") == "function_call_output"
        ]
        if outputs:
            break
        response = {"id": "resp_1", "object": "realtime.response", "output": []}
        await line.say(
            {"type": "response.created", "response": response | {"status": "in_progress"}},
            {
                "type": "response.output_item.added",
                **about,
                "item": call | {"status": "in_progress"},
            },
            {"type": "response.function_call_arguments.delta", **about, "delta": call["arguments"]},
            {
                "type": "response.function_call_arguments.done",
                **about,
                "name": "weather",
                "call_id": "call_1",
                "arguments": call["arguments"],
            },
            {"type": "response.output_item.done", **about, "item": call},
            {
                "type": "response.done",
                "response": response | {"status": "completed", "output": [call]},
            },
        )
    content = [{"type": "output_text", "text": outputs[0]}]
    item = {"id": "item_told", "type": "message", "role": "assistant", "content": content}
    response = {"id": "resp_2", "object": "realtime.response", "output": []}
    await line.say(
        {"type": "response.created", "response": response | {"status": "in_progress"}},
        {"type": "conversation.item.added", "item": item | {"status": "in_progress"}},
        {"type": "conversation.item.done", "item": item | {"status": "completed"}},
        {"type": "response.done", "response": response | {"status": "completed"}},
    )
    await line.listen()


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


until = functools.partial(
    test_browser.until, known="[guest.changes, guest.errors, guest.history, guest.events]"
)


UNHURRIED = {
    "type": "session.update",
    "session": {
        "type": "realtime",
        "audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "low"}}},
    },
}
DETECTION = "guest.last('session.updated').session.audio.input.turn_detection"

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
    # From here on a machine that stands still in mid-sentence does not end the turn there.
    page.evaluate("(session) => guest.transport.sendEvent(session)", UNHURRIED)
    until(page, f"{DETECTION}.eagerness === 'low'")
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


def test_a_tool_of_the_pages_is_asked_and_answers(page: Page, modelled: str) -> None:
    connect(page, modelled, secret(modelled, None), tools=True)
    page.evaluate("guest.session.sendMessage('What is the weather in Bergen?')")
    until(page, "guest.history.some((item) => item.itemId === 'item_told')")
    assert page.evaluate("guest.asked") == ["Bergen"]
    call, told = page.evaluate("guest.history")
    assert (call["type"], call["output"]) == ("function_call", "Sunny in Bergen.")
    assert told["content"][0]["text"] == "Sunny in Bergen."
    assert page.evaluate("guest.errors") == []


def test_only_the_first_call_costs_a_preflight(page: Page, keyed: str, keyed_log: Path) -> None:
    """Later ones are a round trip shorter, as long as the browser remembers it."""
    said = len(keyed_log.read_text())
    for _ in range(2):
        call_id = connect(page, keyed, secret(keyed, KEY), config={"audio": PRESS})
        page.evaluate("guest.session.close()")
    # What is written of a call comes after what was written of its preflight.
    assert ask("GET", f"{keyed}{CALLS}/{call_id}")[0] in {200, 404}
    lines = keyed_log.read_text()[said:].splitlines()
    asked = [line for line in lines if f"OPTIONS /{CALLS} 204" in line]
    placed = [line for line in lines if f"POST /{CALLS} 201" in line]
    assert (len(asked), len(placed)) == (1, 2), lines


def test_a_refusal_reaches_the_program_in_words(page: Page, keyed: str) -> None:
    """With the preflight and the error both readable from another origin."""
    why = page.evaluate(
        "(how) => guest.connect(how).catch((error) => error.message)",
        {"url": keyed + CALLS, "apiKey": "ek_made_up"},
    )
    assert "failed with status 401" in why
    assert "ephemeral key" in why


def test_the_demo_page_asks_for_a_key_and_calls_with_it(
    browser: Any, keyed: str, system: dict[str, Any]
) -> None:
    """Without one it says so and shows the field; with one it calls, and hangs up."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(keyed)
    field = page.get_by_label("API key")
    assert not field.is_visible()
    page.get_by_role("button", name="Start").click()
    page.get_by_text("This server asks for a key").wait_for()
    field.fill(secret(keyed, KEY))
    page.get_by_role("button", name="Start").click()
    page.locator("#status[data-state=live]").wait_for(timeout=20_000)
    page.reload()  # the key is still there, and a page that is left hangs up
    until_gone(system)
    assert field.is_visible()
    assert field.input_value().startswith("ek_")
    context.close()
