"""Which data channel carries the events."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson

import calls
import carrier

from . import shim
from .test_whip import Site, at_site


class Fake:
    """A data channel."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.readyState = "open"
        self.bufferedAmount = 7
        self.sent: list[str] = []
        self.heard = True

    def send(self, message: str) -> None:
        if len(message) > 100:
            raise ValueError("too large")
        self.sent.append(message)

    def remove_all_listeners(self) -> None:
        self.heard = False


def test_a_known_label_carries_at_once() -> None:
    found, events = carrier.Carrier(), Fake("oai-events")
    assert (found.label, found.backlog_octets) == ("", 0)
    found.send("into the void")
    assert found.opened(events)
    assert (found.label, found.backlog_octets) == ("oai-events", 7)
    found.send("hello")
    assert events.sent == ["hello"]


def test_a_strange_label_waits_for_a_known_one() -> None:
    found, files, events = carrier.Carrier(), Fake("files"), Fake("oai-events")
    assert not found.opened(files)
    found.send("nobody hears it")
    assert found.opened(events)
    found.send("hello")
    assert (files.sent, events.sent) == ([], ["hello"])
    assert not found.spoken(files)
    assert not found.carries(files)
    assert not found.waited()


def test_a_strange_label_carries_if_no_better_one_comes() -> None:
    found, mine = carrier.Carrier(), Fake("mine")
    assert not found.opened(mine)
    assert found.waited()
    assert found.label == "mine"
    assert not found.waited()


def test_a_strange_label_carries_if_the_client_speaks_on_it() -> None:
    found, first, second = carrier.Carrier(), Fake("first"), Fake("second")
    found.opened(first)
    found.opened(second)
    assert found.spoken(second)
    assert found.carries(second)
    assert not found.spoken(first)


def test_a_known_label_takes_over_and_keeps() -> None:
    found, mine, events, again = (
        carrier.Carrier(),
        *map(Fake, ("mine", "oai-events", "oai-events")),
    )
    found.opened(mine)
    found.waited()
    assert found.opened(events)
    assert not found.opened(again), "a second one of the same name does not"
    assert found.carries(events)


def test_after_a_closed_one_the_next_carries() -> None:
    found, events, later = carrier.Carrier(), Fake("oai-events"), Fake("anything")
    found.opened(events)
    events.readyState = "closed"
    found.send("too late")
    assert events.sent == []
    assert found.opened(later)


def test_the_labels_are_the_dialects() -> None:
    found = carrier.Carrier()
    found.labels = frozenset(("chat",))
    assert not found.opened(Fake("oai-events"))
    assert found.opened(Fake("chat"))


def test_nothing_is_kept_in_the_end(caplog: Any) -> None:
    found, events = carrier.Carrier(), Fake("oai-events")
    found.opened(events)
    with caplog.at_level("INFO"):
        found.send("x" * 101)
    assert "too large" in caplog.text
    found.clear()
    assert (len(found), found.label, events.heard) == (0, "", False)


# --- with a real client ---------------------------------------------------------------------------


class Talker(shim.Client):
    """A client with several data channels; the first one is the one of its constructor."""

    def open(self, label: str) -> Any:
        channel = self.pc.createDataChannel(label)
        channel.heard = []
        channel.on("message", lambda message: channel.heard.append(orjson.loads(message)["type"]))
        return channel

    async def call(self, site: Site) -> None:
        offer, headers = await self.offer(), {"Content-Type": "application/sdp"}
        async with site.http.post(calls.PATH, data=offer, headers=headers) as response:
            assert response.status == 201
            await self.accept(await response.text())


def talk(folder: Path, label: str, scenario: Callable[[Talker, Site], Awaitable[None]]) -> None:
    async def run(site: Site) -> None:
        client = Talker(label=label)
        try:
            await scenario(client, site)
        finally:
            await client.close()

    at_site(folder, run)


def test_the_events_are_on_the_second_channel(tmp_path: Path) -> None:
    async def scenario(client: Talker, site: Site) -> None:
        events = client.open("oai-events")
        await client.call(site)
        await shim.until(lambda: events.heard[:1] == ["session.created"])
        client.channel.send("what is this?")
        events.send('{"type": "session.update", "session": {"type": "realtime"}}')
        await shim.until(lambda: "session.updated" in events.heard)
        assert client.messages == []
        assert "error" not in events.heard

    talk(tmp_path, "files", scenario)


def test_the_events_are_on_a_channel_of_any_name(tmp_path: Path) -> None:
    async def scenario(client: Talker, site: Site) -> None:
        await client.call(site)
        await shim.until(lambda: client.messages)
        assert orjson.loads(client.messages[0])["type"] == "session.created"
        told = len(client.messages)
        events = client.open("oai-events")
        await shim.until(lambda: events.heard == ["session.created"])
        events.send('{"type": "response.create"}')
        await shim.until(lambda: "response.done" in events.heard)
        assert len(client.messages) == told

    talk(tmp_path, "mine", scenario)
