"""Attendants of a call: told what the data channel is told, and answered apart from it."""

from typing import Any

import orjson
import pytest

import attendants
from attendants import Attendant, Attendants, Crowded
from conversation import Conversation

from .line import COMMITTED, SPEECH, Line, ParrotLine, kinds, refusal
from .test_conversation import silent


class Server:
    """An application's server at a line."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.attendant = Attendant(lambda: None)
        line.conversation.attend(self.attendant)

    def take(self) -> list[dict[str, Any]]:
        """What it has been told since the last time."""
        return [orjson.loads(message) for message in self.attendant.take()]

    def asks(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        message = orjson.dumps({"type": kind, **fields})
        self.line.conversation.client_message(message, self.line.now, self.attendant)
        self.line.flow()
        return self.take()


def test_it_is_told_all_that_the_data_channel_is() -> None:
    line = ParrotLine()
    (created,) = line.take()
    server = Server(line)
    (seen,) = server.take()
    assert seen["session"] == created["session"]
    line.client("session.update", session={"instructions": "Sing."})
    late = Server(line)
    (seen,) = late.take()
    assert seen["type"] == "session.created"
    assert seen["session"]["instructions"] == "Sing."
    server.take()
    client = line.say(SPEECH + bytes(16_640)) + line.wait(4)
    assert kinds(client)[-1] == "output_audio_buffer.stopped"
    assert server.take() == client
    assert late.take() == client


def test_one_that_comes_before_the_session_is_told_of_it_first() -> None:
    line = Line(opened=False)
    server = Server(line)
    line.backend("rate_limits.updated")
    assert server.take() == []
    line.backend("session.created", session={"model": "m"})
    line.backend("rate_limits.updated")
    assert kinds(server.take()) == ["session.created", "rate_limits.updated"]
    assert line.take() == []  # there is no data channel, and perhaps never will be


def test_without_a_data_channel_it_has_the_call_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "opened", lambda self, now: None)
    line = ParrotLine()
    server = Server(line)
    updated = server.asks("session.update", session={"audio": {"input": {"turn_detection": None}}})
    assert kinds(updated) == ["session.created", "session.updated"]
    line.say(SPEECH)
    assert kinds(server.asks("input_audio_buffer.commit")) == COMMITTED
    seen = server.asks("response.create")
    line.wait(0.3)
    sent = len(line.packets)
    assert "output_audio_buffer.started" in kinds(seen + server.take())
    assert kinds(server.asks("output_audio_buffer.clear"))[0] == "output_audio_buffer.cleared"
    line.wait(0.3)
    assert silent(line.packets[sent:])


def test_what_is_wrong_with_its_event_is_told_to_it_alone() -> None:
    line = ParrotLine()
    line.take()
    server, other = Server(line), Server(line)
    server.take()
    other.take()
    wrong = {"session": {"audio": {"input": {"turn_detection": {"threshold": 3}}}}}
    # Once by the backend, and once before it: an id in use at the data channel is no matter.
    line.client("session.update", event_id="e1", session={})
    server.take()
    for kind, fields in (("session.update", wrong), ("conversation.item.retrieve", {})):
        assert refusal(server.asks(kind, event_id="e1", **fields))["event_id"] == "e1"
        assert refusal(server.asks(kind, **fields))["event_id"] is None
    assert refusal(server.asks("no such thing", event_id="e2"))["event_id"] == "e2"
    assert line.take() == []
    assert kinds(other.take()) == ["session.updated"]
    # And the other way round it is told what is wrong with the client's.
    error = refusal(line.client("session.update", event_id="e1", **wrong))
    assert error["event_id"] == "e1"
    assert [event["error"] for event in server.take()] == [error]


def test_a_backend_sees_ids_of_ours_which_are_bounded() -> None:
    line = Line()
    servers = [Server(line), Server(line)]
    for server in servers:
        server.take()
        server.asks("session.update", event_id="same", session={})
    mine, yours = (event["event_id"] for event in line.asked)
    assert mine != yours
    line.backend("error", error={"message": "No.", "event_id": yours})
    assert [len(server.take()) for server in servers] == [0, 1]
    for _ in range(attendants.ASKED_MAX):
        servers[1].asks("session.update", session={})
    assert len(line.conversation.attendants._asked) == attendants.ASKED_MAX
    # Whose it was is forgotten: then it is for everybody, without an id that nobody knows.
    line.backend("error", error={"message": "No.", "event_id": mine})
    assert [refusal(server.take())["event_id"] for server in servers] == [None, None]
    assert refusal(line.take())["event_id"] is None


def test_a_client_that_opens_another_channel_is_greeted_alone() -> None:
    line = ParrotLine()
    line.take()
    server = Server(line)
    server.take()
    line.conversation.opened(line.now)
    line.flow()
    assert kinds(line.take()) == ["session.created"]
    assert server.take() == []


def test_one_that_leaves_is_forgotten() -> None:
    line = Line()
    server = Server(line)
    server.asks("session.update", session={})
    line.conversation.attendants.leave(server.attendant)
    line.conversation.attendants.leave(server.attendant)
    server.take()
    line.backend("rate_limits.updated")
    assert server.take() == []
    assert line.conversation.attendants._asked == {}


def test_there_is_room_for_a_few() -> None:
    line = Line(opened=False)
    for _ in range(attendants.ATTENDANTS_MAX):
        Server(line)
    with pytest.raises(Crowded, match="at most 4"):
        Server(line)


def test_one_that_takes_nothing_is_dropped_and_no_other() -> None:
    told: list[int] = []
    slow, quick = Attendant(lambda: told.append(1)), Attendant(lambda: None)
    here = Attendants("tag")
    for attendant in (slow, quick):
        here.join(attendant)
    here.greet("created")
    for _ in range(1 + attendants.WAITING_OCTETS_MAX // 1000):
        here.tell("x" * 1000)
        assert quick.take()
    assert slow.take() == []
    assert slow.over == (attendants.TOO_SLOW, "This sideband reads too slowly.")
    assert quick.over is None
    calls = len(told)
    here.tell("more")
    assert (slow.take(), len(told)) == ([], calls)
    here.end("over")
    assert quick.over == (attendants.ENDED, "over")
    assert slow.over == (attendants.TOO_SLOW, "This sideband reads too slowly.")
    assert len(here) == 0
