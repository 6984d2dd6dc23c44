"""Which data channel carries the events."""

from typing import Any

import carrier


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
