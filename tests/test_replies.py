"""Replies: a response is over once, and silent afterwards, whatever a backend goes on to send."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
import replies
from replies import Cut, Replies, Taken
from turns import MS_OCTETS

from .line import Plain


class Room:
    """Replies with the real play-out, in a time that the test owns."""

    def __init__(self) -> None:
        self.now = 10.0
        self.playout = audio.Playout(Plain(), ssrc=1, payload_type=111, sequence=0, timestamp=0)
        self.replies = Replies(self.playout)
        self.news: list[tuple[str, str]] = []
        self.sent: list[bytes] = []

    def sound(self, response: str, item: str, ms: int, value: bytes = b"\1\0") -> Taken:
        return self.replies.sound(response, item, value * (ms * MS_OCTETS // 2), self.now)

    def wait(self, seconds: float = 0.0) -> list[tuple[str, str]]:
        """What is told meanwhile."""
        for _ in range(round(seconds / 0.02) + 1):
            self.sent += [packet[12:] for packet in self.playout.send(self.now)]
            self.news += self.replies.news()
            self.now += 0.02
        self.now -= 0.02
        news, self.news = self.news, []
        return news

    def cut(self) -> tuple[list[str], list[Cut]]:
        self.news += self.replies.news()
        return self.replies.cut(self.now)

    @property
    def loud(self) -> int:
        """Packets with anything in them."""
        return sum(any(packet) for packet in self.sent)


def test_made_sounding_and_over_are_three_moments() -> None:
    room = Room()
    assert room.replies.created("r", room.now)
    assert (room.replies.making, room.replies.busy) == (["r"], True)
    assert room.sound("r", "i", 100) is Taken.FIRST
    assert room.sound("r", "i", 100) is Taken.MORE
    assert room.wait() == [("started", "r")]
    room.replies.done("r", room.now)
    assert (room.replies.making, room.replies.busy) == ([], True)
    assert room.wait(0.2) == [("stopped", "r")]
    assert (room.replies.busy, room.replies.heard_ms("i")) == (False, 200)


def test_after_its_end_a_response_has_no_further_items() -> None:
    room = Room()
    room.sound("r", "i", 100)
    room.replies.done("r", room.now)
    assert room.sound("r", "j", 100) is Taken.DROPPED  # also while it is still heard
    assert room.wait(0.3) == [("started", "r"), ("stopped", "r")]
    assert room.loud == 5


def test_cut_off_it_is_silent_under_whatever_name() -> None:
    room = Room()
    room.replies.created("r", room.now)
    room.sound("r", "i", 500)
    room.wait(0.1)
    assert room.cut() == (["r"], [Cut("i", 120)])
    assert room.replies.making == []
    assert room.sound("r", "i", 500) is Taken.DROPPED
    assert room.sound("r", "j", 500) is Taken.UNHEARD  # the model should know
    assert room.sound("r", "j", 500) is Taken.DROPPED
    room.replies.done("r", room.now)
    assert room.sound("r", "k", 500) is Taken.DROPPED
    assert room.cut() == ([], [])
    assert room.wait(1) == []
    assert room.loud == 6
    assert not room.replies.busy


def test_all_that_is_being_made_is_cut_off() -> None:
    room = Room()
    for name in ("silent", "sounding", "queued"):
        room.replies.created(name, room.now)
    room.sound("sounding", "s", 500)
    room.wait()
    room.sound("queued", "q", 500)
    room.sound("unannounced", "u", 500)  # without a response.created
    assert room.cut() == (["sounding"], [Cut("s", 20), Cut("q", 0), Cut("u", 0)])
    for name in ("silent", "sounding", "queued", "unannounced"):
        assert room.sound(name, "more", 500) in (Taken.UNHEARD, Taken.DROPPED)
    room.replies.created("next", room.now)
    assert room.sound("next", "n", 100) is Taken.FIRST
    room.replies.done("next", room.now)
    assert room.wait(0.4) == [("started", "next"), ("stopped", "next")]
    assert room.loud == 1 + 5


def test_what_was_asked_for_before_is_cut_off_when_it_comes() -> None:
    room = Room()
    room.replies.ask("e1", room.now)
    room.cut()
    room.replies.ask("e2", room.now)
    assert not room.replies.created("old", room.now)
    assert room.sound("old", "i", 100) is Taken.UNHEARD
    assert room.replies.created("new", room.now)
    assert room.sound("new", "j", 100) is Taken.FIRST


def test_what_is_asked_for_beside_the_conversation_is_left_alone() -> None:
    room = Room()
    room.replies.ask("e1", room.now, aside=True)
    room.replies.ask("e2", room.now)
    assert room.replies.created("aside", room.now)
    assert room.replies.is_aside("aside")
    assert not room.replies.busy
    room.cut()
    assert room.sound("aside", "i", 100) is Taken.FIRST  # in a voice of its own
    assert not room.replies.created("reply", room.now), "asked for before the cut"
    room.wait()
    assert room.cut() == (["aside"], [Cut("i", 20)])
    assert room.sound("aside", "i", 100) is Taken.DROPPED


def test_an_error_or_time_ends_the_waiting_for_a_response() -> None:
    room = Room()
    room.replies.ask("e1", room.now)
    room.cut()
    room.replies.refused("e1")
    assert room.replies.created("by itself", room.now)
    room.replies.ask("e2", room.now)
    room.cut()
    assert room.replies.created("much later", room.now + replies.ASKED_S_MAX)


def test_an_id_used_twice_confuses_nobody() -> None:
    room = Room()
    room.sound("r1", "i", 40)
    room.sound("r2", "i", 60)
    for name in ("r1", "r2"):
        room.replies.item_done(name, "i", room.now)
        room.replies.done(name, room.now)
    news = room.wait(0.4)
    assert news == [("started", "r1"), ("stopped", "r1"), ("started", "r2"), ("stopped", "r2")]
    assert room.loud == 5


def test_an_item_that_makes_no_sound_holds_nothing_up() -> None:
    room = Room()
    assert room.replies.sound("r", "i", b"x", room.now) is Taken.FIRST
    room.replies.done("r", room.now)
    assert room.wait(0.1) == []
    assert not room.replies.busy


def test_too_much_audio_is_told_once_and_stops_where_it_ends() -> None:
    room = Room()
    found = [room.sound("r", "i", 60_000) for _ in range(8)]
    assert found.count(Taken.FULL) == 1
    assert found[-1] is Taken.DROPPED
    room.replies.done("r", room.now)
    news = room.wait(audio.QUEUE_S_MAX + 1)
    assert news == [("started", "r"), ("stopped", "r")]


@pytest.mark.parametrize("done", [False, True])
def test_too_many_responses_are_forgotten_without_being_heard_again(done: bool) -> None:
    room = Room()
    room.sound("first", "i", 40)
    room.replies.item_done(None, "i", room.now)
    room.wait(0.1)
    for number in range(3 * replies.REPLIES_MAX):
        room.replies.created(f"r{number}", room.now)
        if done:
            room.cut()
    assert room.wait() == ([] if done else [("stopped", "first")])
    assert room.sound("first", "j", 40) is Taken.DROPPED
    assert len(room.replies._replies) <= replies.REPLIES_MAX


def test_a_crowd_of_responses_that_all_sound_is_bounded() -> None:
    room = Room()
    found = [room.sound(f"r{number}", "i", 20) for number in range(200)]
    assert Taken.DROPPED in found
    assert found.index(Taken.DROPPED) <= replies.REPLIES_MAX
    room.cut()
    assert room.loud == 0


def test_ids_without_measure_are_no_ids() -> None:
    room = Room()
    long = "x" * (replies.ID_CHARACTERS_MAX + 1)
    assert room.sound(long, "i", 20) is Taken.DROPPED
    assert room.sound("r", long, 20) is Taken.DROPPED
    room.replies.done(long, room.now)
    assert long not in room.replies._over


NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.tuples(st.just("created"), NAMES)
    | st.tuples(st.just("done"), NAMES)
    | st.tuples(st.just("sound"), NAMES, NAMES, st.integers(0, 200))
    | st.tuples(st.just("item_done"), NAMES, NAMES)
    | st.tuples(st.just("ask"), NAMES)
    | st.tuples(st.just("refused"), NAMES)
    | st.tuples(st.just("wait"), st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    | st.tuples(st.just("cut")),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_started_then_over_once_and_silent_after_a_cut(steps: list[Any]) -> None:
    room = Room()
    told: list[tuple[str, str]] = []
    cut_off: set[str] = set()
    for name, *given_ in steps:
        if name == "cut":
            silenced, _ = room.cut()
            told += room.wait() if room.news else []
            told += [("cleared", response) for response in silenced]
            assert room.playout.flush(room.now) == []
            cut_off |= {"a", "b", "c"} & set(room.replies._replies)
        elif name == "wait":
            told += room.wait(*given_)
        elif name == "sound":
            taken = room.sound(*given_)
            assert given_[0] not in cut_off or taken in (Taken.DROPPED, Taken.UNHEARD)
        elif name in ("ask", "created", "done", "item_done"):
            getattr(room.replies, name)(*given_, room.now)
        else:
            getattr(room.replies, name)(*given_)
    for response in "abc":
        room.replies.done(response, room.now)
    told += room.wait(10)
    for response in "abc":
        words = [what for what, who in told if who == response]
        assert words in ([], ["started", "stopped"], ["started", "cleared"])
    assert not room.replies.busy
