"""Pipecat's client and its small WebRTC transport in a browser, unmodified from npm, on a page of
another origin."""

import functools
import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import redis

import pipecat
import records
import rtvi
import settings

from . import guests, test_agents, test_browser
from .test_browser import LEAD_S, SENTENCE, TAIL_S, in_order, read, silence, written

system = test_browser.system
launch = test_browser.launch
keyed_log, keyed = test_agents.keyed_log, test_agents.keyed
modelled = test_agents.modelled

Page = Any

PAUSE_S = 1.2
"""Between two sentences: the first one's turn ends, and its reply is being spoken."""

TURN = (
    "onConnected",
    "onBotConnected",
    "onBotReady",
    "onUserStartedSpeaking",
    "onUserStoppedSpeaking",
    "onUserTranscript",
    "onBotLlmStarted",
    "onBotStartedSpeaking",
    "onBotTtsText",
    "onBotOutput",
    "onBotStoppedSpeaking",
)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the page."""
    with guests.site(guests.bundled("pipecat.js", tmp_path_factory.mktemp("pipecat"))) as url:
        yield url


@pytest.fixture(scope="module")
def said_once(launch: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A browser whose microphone hears silence, the sentence, silence."""
    said = np.concatenate([silence(LEAD_S), read(SENTENCE), silence(TAIL_S)])
    return launch(written(said, tmp_path_factory.mktemp("microphone") / "once.wav"))


@pytest.fixture(scope="module")
def said_often(launch: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A browser whose microphone hears the sentence again and again: a slow machine may miss the
    first ones."""
    said = [silence(LEAD_S), *[read(SENTENCE), silence(PAUSE_S)] * 5]
    return launch(written(np.concatenate(said), tmp_path_factory.mktemp("microphone") / "5.wav"))


def opened(browser: Any, url: str) -> Iterator[Page]:
    """A page that has not called yet; it must have had nothing to complain about in the end."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(url)
    yield page
    page.evaluate("guest.client?.disconnect()")
    context.close()
    # Of a wrong key the browser and the client complain, as they should.
    assert [line for line in complaints if "401" not in line] == []


@pytest.fixture
def page(said_once: Any, stranger: str) -> Iterator[Page]:
    yield from opened(said_once, stranger)


@pytest.fixture
def interrupter(said_often: Any, stranger: str) -> Iterator[Page]:
    yield from opened(said_often, stranger)


def connect(page: Page, system: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What `connect()` resolves with: the data of bot-ready."""
    options = {"url": system["page"].rstrip("/") + pipecat.OFFER, **options}
    ready: dict[str, Any] = page.evaluate("(options) => guest.connect(options)", options)
    return ready


until = functools.partial(test_browser.until, known="[guest.states, guest.errors, guest.heard]")


def sessions(system: dict[str, Any]) -> list[int]:
    """Calls at each transceiver."""
    found = []
    for at in system["transceivers"]:
        with urllib.request.urlopen(f"http://{at}/v1/health", timeout=20) as response:
            found.append(json.load(response)["sessions"])
    return found


def owner(system: dict[str, Any]) -> psutil.Process:
    """The transceiver that has the only call."""
    number = 1 + sessions(system).index(1)
    config = str(Path(system["state_dir"]) / f"transceiver-{number}.toml")
    running = psutil.process_iter(["cmdline"])
    return next(each for each in running if config in (each.info["cmdline"] or ()))


def until_gone(system: dict[str, Any]) -> None:
    """The call is over at its transceiver: by the browser's goodbye, not by a deadline."""
    deadline = time.monotonic() + 10
    while any(sessions(system)):
        assert time.monotonic() < deadline, "the call has not ended"
        time.sleep(0.05)


def until_recorded(
    page: Page, system: dict[str, Any], holds: Callable[[records.Record], bool]
) -> None:
    """Redis has so much of the call: any transceiver could go on with it."""
    call_id = page.evaluate("guest.client.transport.pc_id")
    sealer = records.sealer(settings.load_keys(Path(system["state_dir"]) / "keys"))
    deadline = time.monotonic() + 20
    with redis.Redis.from_url(f"redis://{system['redis']}/0") as found:
        while True:
            octets = found.get(records.name_of(call_id))
            record = octets and records.read(octets, call_id, sealer, time.time(), 300.0)
            if record and holds(record):
                return
            assert time.monotonic() < deadline, f"not recorded yet: {record}"
            time.sleep(0.05)


def test_a_spoken_turn(page: Page, system: dict[str, Any]) -> None:
    ready = connect(page, system)
    assert ready["version"] == rtvi.VERSION
    assert page.evaluate("guest.client.state") == "ready"
    answered = page.evaluate("guest.peers[0].getTransceivers().map((t) => t.currentDirection)")
    assert answered == ["sendrecv", "inactive", "inactive"]
    until(page, "guest.loudness() > 0.02")
    until(page, "guest.names().includes('onBotStoppedSpeaking')")
    names = page.evaluate("guest.names()")
    assert in_order(TURN, names), names
    (transcript,) = page.evaluate("guest.all('onUserTranscript')")
    assert transcript["final"]
    assert transcript["text"]
    said = page.evaluate("guest.all('onBotOutput')")
    assert [each["spoken_status"] for each in said if each["segment_id"] == 1] == [
        "new",
        "completed",
    ]
    assert sum(sessions(system)) == 1
    page.evaluate("guest.client.disconnect()")
    until(page, "guest.client.state === 'disconnected'")
    until_gone(system)
    assert page.evaluate("guest.errors") == []


def test_an_interruption(interrupter: Page, system: dict[str, Any]) -> None:
    connect(interrupter, system)
    until(interrupter, "guest.loudness() > 0.02")
    until(interrupter, "guest.names().includes('onBotStoppedSpeaking')")
    until(interrupter, "guest.loudness() < 0.002", 20)
    assert not interrupter.evaluate(
        "guest.all('onBotOutput').some((said) => said.spoken_status === 'completed')"
    )
    names = [
        name
        for name in interrupter.evaluate("guest.names()")
        if name in ("onUserStartedSpeaking", "onBotStartedSpeaking", "onBotStoppedSpeaking")
    ]
    # The bot is silent because the user speaks, while he does.
    first = names.index("onBotStartedSpeaking")
    assert names[first : first + 3] == [
        "onBotStartedSpeaking",
        "onUserStartedSpeaking",
        "onBotStoppedSpeaking",
    ]
    assert interrupter.evaluate("guest.errors") == []


def test_text_and_what_the_other_api_has(page: Page, system: dict[str, Any]) -> None:
    """Text, settings in the request's data, a request, one that is refused, the bot's farewell."""
    connect(page, system, data={"session": {"instructions": "Be brief."}})
    page.evaluate("guest.client.sendText('How are you?')")
    until(page, "guest.names().includes('onBotLlmStopped')")
    assert page.evaluate("guest.all('onUserLlmText')") == [{"text": "How are you?"}]
    assert "12 characters" in page.evaluate("guest.all('onBotOutput')[0].text")
    asked = "guest.client.sendClientRequest('session.update', { session: { type: 'realtime' } })"
    answer = page.evaluate(asked)
    assert answer["session"]["instructions"] == "Be brief."
    refused = page.evaluate(
        "guest.client.sendClientRequest('favourite-colour', {}).catch((error) => error)"
    )
    assert "favourite-colour" in refused["data"]["error"]
    page.evaluate("guest.client.disconnectBot()")
    until(page, "guest.names().includes('onBotDisconnected')")
    until(page, "guest.client.state === 'disconnected'")
    until_gone(system)
    assert len(page.evaluate("guest.errors")) == 1, "the refusal alone"


def test_a_client_that_asks_first_where_to_offer(page: Page, system: dict[str, Any]) -> None:
    start = system["page"].rstrip("/") + pipecat.START
    connect(page, system, start=start, data={"session": {"instructions": "Be brief."}})
    answer = page.evaluate("guest.client.sendClientRequest('session.update', { session: {} })")
    assert answer["session"]["instructions"] == "Be brief."
    page.evaluate("guest.client.disconnect()")
    until_gone(system)


def test_a_function_of_the_pages_is_called_and_answers(page: Page, modelled: str) -> None:
    connect(page, {"page": modelled})
    page.evaluate("guest.client.sendText('What is the weather in Bergen?')")
    until(page, "guest.all('onBotLlmStopped').length === 2")
    assert page.evaluate("guest.asked") == ["Bergen"]
    assert in_order(
        (
            "onBotLlmStarted",
            "onLLMFunctionCallStarted",
            "onLLMFunctionCallInProgress",
            "onBotLlmStopped",
            "onLLMFunctionCallStopped",
            "onBotLlmStarted",
        ),
        page.evaluate("guest.names()"),
    )
    (stopped,) = page.evaluate("guest.all('onLLMFunctionCallStopped')")
    assert (stopped["result"], stopped["cancelled"]) == ("Sunny in Bergen.", False)
    assert page.evaluate("guest.errors") == []


def test_with_an_ephemeral_key(page: Page, system: dict[str, Any], keyed: str) -> None:
    """Whose settings count, since the page brings none; a wrong one is refused for good."""
    url = keyed.rstrip("/") + pipecat.OFFER
    wrong = page.evaluate(
        "(options) => guest.connect(options).then(String, String)",
        {"url": url, "headers": {"Authorization": "Bearer ek_wrong"}},
    )
    assert "401" in wrong
    session = {"type": "realtime", "instructions": "Be brief."}
    bearer = f"Bearer {test_agents.secret(keyed, test_agents.KEY, session)}"
    connect(page, system, url=url, headers={"Authorization": bearer})
    answer = page.evaluate("guest.client.sendClientRequest('session.update', { session: {} })")
    assert answer["session"]["instructions"] == "Be brief."
    page.evaluate("guest.client.disconnect()")
    until_gone(system)


def test_another_offer_on_the_same_connection(page: Page, system: dict[str, Any]) -> None:
    """As the transport sends it when it has waited for candidates; and one that restarts ICE."""
    connect(page, system, transport={"waitForICEGathering": True})
    pair = "guest.peers[0].remoteDescription.sdp.match(/a=ice-ufrag:(.*)/)[1]"
    first = page.evaluate(pair)
    page.evaluate("guest.client.transport.negotiate()")
    assert page.evaluate(pair) == first
    page.evaluate("guest.peers[0].restartIce()")
    page.evaluate("guest.client.transport.negotiate()")
    assert page.evaluate(pair) != first
    page.evaluate("guest.client.sendText('Are you still there?')")
    until(page, "guest.names().includes('onBotLlmStopped')")
    until(page, "guest.peers[0].iceConnectionState === 'connected'")
    assert page.evaluate("guest.peers.length") == 1
    assert sum(sessions(system)) == 1
    page.evaluate("guest.client.disconnect()")
    until_gone(system)


def test_its_transceiver_dies_and_it_comes_back_by_itself(
    page: Page, system: dict[str, Any]
) -> None:
    """The client notices after some ten seconds: `restart_pc`, with the id of the dead call.

    (With its old connection it then stops the microphone that the new one sends: a page has to hand
    the transport another track.)
    """
    connect(page, system)
    item = {"id": "item_ada", "type": "message", "role": "user"}
    item |= {"content": [{"type": "input_text", "text": "My name is Ada."}]}
    ask = "([kind, data]) => guest.client.sendClientRequest(kind, data)"
    page.evaluate(ask, ["conversation.item.create", {"item": item}])
    page.evaluate(ask, ["session.update", {"session": {"instructions": "Be brief."}}])
    until_recorded(
        page,
        system,
        lambda record: (
            "item_ada" in [item["id"] for item in record.items]
            and record.session.get("instructions") == "Be brief."
        ),
    )
    victim = owner(system)
    killed = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    until(page, "guest.peers.length === 2", 40)
    asked_s = time.monotonic() - killed
    until(page, "guest.peers[1].connectionState === 'connected'")
    until(page, "guest.peers[0].connectionState === 'closed'")
    back_s = time.monotonic() - killed
    print(f"a new offer after {asked_s:.1f} s, connected after {back_s:.1f} s")
    until(page, "guest.client.transport.dc.readyState === 'open'")
    found = page.evaluate(ask, ["conversation.item.retrieve", {"item_id": "item_ada"}])
    assert found["item"]["content"][0]["text"] == "My name is Ada."
    found = page.evaluate(ask, ["session.update", {"session": {}}])
    assert found["session"]["instructions"] == "Be brief."
    assert page.evaluate("guest.client.state") == "ready"
    assert not page.evaluate("guest.names().includes('onDisconnected')")
    page.evaluate("guest.client.sendText('And now?')")
    until(page, "guest.names().includes('onBotLlmStopped')")
    page.evaluate("guest.client.disconnect()")
    until_gone(system)
    assert page.evaluate("guest.errors") == []
