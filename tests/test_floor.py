"""The floor: two settings that no backend knows, what each side sees of them, and what they do."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import floor
import realtime
from floor import Floor, Terms
from realtime import Patience, Refused
from turns import FRAME_OCTETS, MS_OCTETS, RATE_HZ

from .line import (
    AFTER_SOUND,
    BEFORE_SOUND,
    COMMITTED,
    SPEECH,
    Line,
    ParrotLine,
    kinds,
    refusal,
)

PATH = "session.audio.input.turn_detection"
HM = SPEECH[: 200 * MS_OCTETS]
LONG = SPEECH[: 600 * MS_OCTETS]


def detecting(**fields: Any) -> dict[str, Any]:
    return {"audio": {"input": {"turn_detection": fields or None}}}


def of(session: dict[str, Any] | None) -> Any:
    assert session is not None
    return session["audio"]["input"]["turn_detection"]


def backend_says(terms: Terms, **fields: Any) -> Any:
    """What the client sees when the backend confirms."""
    api = {"type": "server_vad", "create_response": True, "interrupt_response": True}
    return of(terms.shown(detecting(**{**api, **fields}), created=False))


def asked(terms: Terms, event_id: str = "e", **fields: Any) -> Any:
    """What the backend sees of a client's update."""
    return of(terms.asked(detecting(**fields), event_id))


# --- terms: what each side sees -------------------------------------------------------------------


def test_who_names_neither_field_gets_everything_unchanged() -> None:
    terms = Terms(session := detecting(type="semantic_vad", eagerness="low"))
    assert terms.offered is session
    update = detecting(silence_duration_ms=300, interrupt_response=False)
    assert terms.asked(update, "e") is update
    shown = detecting(type="server_vad", interrupt_response=False)
    assert terms.shown(shown, created=False) is shown
    assert (terms.interrupts, terms.cancels, terms.answers) == (False, False, False)
    assert terms.patience == Patience()


@pytest.mark.parametrize("kind", ["server_vad", "semantic_vad"])
def test_the_backend_does_less_and_the_client_sees_its_own_values(kind: str) -> None:
    terms = Terms(None)
    given_ = asked(terms, type=kind, min_interruption_duration_ms=400)
    assert given_ == {"type": kind, "create_response": False, "interrupt_response": False}
    assert terms.patience == Patience(), "in force when it is confirmed"
    assert backend_says(terms, **given_) == {
        "type": kind,
        "create_response": True,
        "interrupt_response": True,
        "min_interruption_duration_ms": 400,
        "response_delay_ms": 0,
    }
    assert terms.patience.min_interruption_duration_ms == 400
    assert (terms.cancels, terms.answers) == (True, True)


def test_a_delay_alone_leaves_interruption_to_the_backend() -> None:
    terms = Terms(None)
    given_ = asked(terms, response_delay_ms=900)
    assert given_ == {"type": "server_vad", "create_response": False, "interrupt_response": True}
    shown = backend_says(terms, **given_)
    assert (shown["create_response"], shown["response_delay_ms"]) == (True, 900)
    assert (terms.cancels, terms.answers) == (False, True)


def test_the_clients_own_false_stays_false() -> None:
    terms = Terms(None)
    wish = {"create_response": False, "interrupt_response": False}
    given_ = asked(terms, min_interruption_duration_ms=400, response_delay_ms=9, **wish)
    shown = backend_says(terms, **given_)
    assert {name: shown[name] for name in wish} == wish
    assert (terms.cancels, terms.answers) == (False, False)
    # Later updates name what they change, and nothing else.
    given_ = asked(terms, create_response=True)
    assert (given_["create_response"], given_["interrupt_response"]) == (False, False)
    backend_says(terms, **given_)
    assert (terms.cancels, terms.answers) == (False, True)


def test_switched_off_the_backend_has_the_clients_word_again() -> None:
    terms = Terms(None)
    backend_says(terms, **asked(terms, min_interruption_duration_ms=400, interrupt_response=False))
    given_ = asked(terms, min_interruption_duration_ms=0)
    assert given_ == {"type": "server_vad", "create_response": True, "interrupt_response": False}
    shown = backend_says(terms, **given_)
    assert (shown["min_interruption_duration_ms"], shown["interrupt_response"]) == (0, False)
    assert (terms.cancels, terms.answers) == (False, False)


def test_an_update_changes_what_it_names_and_another_type_starts_anew() -> None:
    terms = Terms(None)
    backend_says(terms, **asked(terms, min_interruption_duration_ms=400, response_delay_ms=100))
    shown = backend_says(terms, **asked(terms, silence_duration_ms=300, response_delay_ms=200))
    assert shown["min_interruption_duration_ms"] == 400
    assert shown["response_delay_ms"] == 200
    terms.shown(terms.asked({"instructions": "Sing."}, "e"), created=False)
    assert terms.patience == Patience(min_interruption_duration_ms=400, response_delay_ms=200)
    given_ = asked(terms, type="semantic_vad", response_delay_ms=300)
    assert given_ == {"type": "semantic_vad", "create_response": False, "interrupt_response": True}
    backend_says(terms, **given_)
    assert terms.patience == Patience(response_delay_ms=300)


def test_push_to_talk_has_neither() -> None:
    terms = Terms(None)
    backend_says(terms, **asked(terms, min_interruption_duration_ms=400))
    update = detecting()
    assert terms.asked(update, "e") is update
    assert terms.shown(update, created=False) is update
    assert terms.patience == Patience()
    assert (terms.answers, terms.cancels) == (False, False)
    shown = backend_says(terms, **asked(terms, type="server_vad"))
    assert shown["min_interruption_duration_ms"] == 0


def test_an_update_that_the_backend_refuses_changes_nothing() -> None:
    terms = Terms(None)
    asked(terms, "bad", min_interruption_duration_ms=400, threshold=7)
    given_ = asked(terms, "good", response_delay_ms=100)
    terms.turned_down("bad", f"{PATH}.threshold")
    shown = backend_says(terms, **given_)
    assert terms.patience == Patience(response_delay_ms=100)
    assert shown["interrupt_response"] is True, "the client has never said otherwise"
    assert terms.answers, "though the backend was told not to answer"
    assert terms.cancels, "nor to interrupt, for the one that it refused"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_interruption_duration_ms": -1}, "min_interruption_duration_ms"),
        ({"min_interruption_duration_ms": 5_001}, "min_interruption_duration_ms"),
        ({"min_interruption_duration_ms": "long"}, "min_interruption_duration_ms"),
        ({"min_interruption_duration_ms": True}, "min_interruption_duration_ms"),
        ({"min_interruption_duration_ms": None}, "min_interruption_duration_ms"),
        ({"min_interruption_duration_ms": [0]}, "min_interruption_duration_ms"),
        ({"response_delay_ms": 10_001}, "response_delay_ms"),
        ({"response_delay_ms": 0.5}, "response_delay_ms"),
        ({"response_delay_ms": 2**64 - 1}, "response_delay_ms"),
        ({"response_delay_ms": {"ms": 3}}, "response_delay_ms"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        Terms(None).asked(detecting(**fields), "e")
    assert refused.value.param == f"{PATH}.{param}"
    line = ParrotLine()
    line.take()
    error = refusal(line.client("session.update", event_id="e", session=detecting(**fields)))
    assert (error["param"], error["event_id"]) == (f"{PATH}.{param}", "e")
    offered = ParrotLine({"model": "m", "instructions": "x"} | detecting(**fields))
    created, *errors = offered.take()
    assert (created["type"], created["session"]["instructions"]) == ("session.created", "")
    assert refusal(errors)["param"] == f"{PATH}.{param}"


def test_what_else_is_wrong_is_for_the_backend_to_refuse() -> None:
    terms = Terms(None)
    given_ = asked(terms, min_interruption_duration_ms=400, create_response="often", type="x")
    assert given_ == {"type": "x", "create_response": "often", "interrupt_response": False}
    line = ParrotLine()
    line.take()
    wrong = detecting(min_interruption_duration_ms=400, threshold=2)
    error = refusal(line.client("session.update", event_id="e", session=wrong))
    assert (error["param"], error["event_id"]) == (f"{PATH}.threshold", "e")
    (updated,) = line.client("session.update", session={"instructions": "x"})
    assert of(updated["session"])["min_interruption_duration_ms"] == 0
    wrong_without_id = line.client("session.update", session=wrong)
    assert refusal(wrong_without_id)["event_id"] is None, "an id of ours is nobody's business"


def test_a_session_that_comes_with_the_offer() -> None:
    line = ParrotLine(detecting(min_interruption_duration_ms=400, silence_duration_ms=300))
    (created,) = line.take()
    shown = of(created["session"])
    assert (shown["min_interruption_duration_ms"], shown["silence_duration_ms"]) == (400, 300)
    assert (shown["create_response"], shown["interrupt_response"]) == (True, True)
    assert line.conversation.listens
    (refused, error) = ParrotLine(detecting(min_interruption_duration_ms=400, threshold=2)).take()
    assert of(refused["session"])["min_interruption_duration_ms"] == 0
    assert error["error"]["param"] == f"{PATH}.threshold"


def test_a_backend_that_is_told_of_the_offers_session_only_after_its_own() -> None:
    terms = Terms(detecting(min_interruption_duration_ms=400))
    theirs = {"type": "server_vad", "create_response": True, "interrupt_response": True}
    assert of(terms.shown(detecting(**theirs), created=True))["min_interruption_duration_ms"] == 0
    shown = of(terms.shown(terms.offered, created=False))
    assert (shown["min_interruption_duration_ms"], shown["create_response"]) == (400, True)
    terms = Terms(detecting(min_interruption_duration_ms=400))
    terms.shown(detecting(**theirs), created=True)
    terms.turned_down(None, PATH)
    assert backend_says(terms)["min_interruption_duration_ms"] == 0


def test_a_backend_that_shows_no_turn_detection_is_believed_to_obey() -> None:
    terms = Terms(None)
    asked(terms, min_interruption_duration_ms=400)
    terms.shown({"model": "small"}, created=False)
    assert (terms.cancels, terms.answers) == (True, True)
    assert terms.patience.min_interruption_duration_ms == 400


def test_a_backend_that_does_not_obey_answers_by_itself() -> None:
    terms = Terms(None)
    asked(terms, min_interruption_duration_ms=400)
    shown = backend_says(terms)
    assert shown["min_interruption_duration_ms"] == 400
    assert (terms.cancels, terms.answers) == (False, False)


def test_updates_that_nobody_confirms_are_bounded() -> None:
    terms = Terms(None)
    for number in range(10 * floor.PENDING_MAX):
        asked(terms, f"e{number}", response_delay_ms=number, type="server_vad" * 1000)
    assert len(terms._pending) <= floor.PENDING_MAX
    assert len(orjson.dumps([update.detection for update in terms._pending])) < 10_000
    assert terms.patience.response_delay_ms == 9 * floor.PENDING_MAX - 1


# --- the floor: what they do ----------------------------------------------------------------------


def replying(**detection: Any) -> ParrotLine:
    """The parrot repeats the sentence, with these settings in force."""
    line = ParrotLine()
    line.client("session.update", session=detecting(**detection))
    line.say(bytes(300 * MS_OCTETS) + SPEECH + bytes(520 * MS_OCTETS))
    line.wait(0.3 + detection.get("response_delay_ms", 0) / 1000)
    return line


def quiet(ms: int) -> bytes:
    return bytes(ms * MS_OCTETS)


def test_a_hm_neither_cuts_the_bot_off_nor_is_answered() -> None:
    line = replying(min_interruption_duration_ms=500)
    seen = line.say(HM + quiet(560))
    assert kinds(seen) == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        *COMMITTED,
    ]
    seen = line.wait(3)
    assert kinds(seen) == [*AFTER_SOUND, "output_audio_buffer.stopped"]
    assert SPEECH[: -40 * MS_OCTETS] in b"".join(line.packets)
    line.say(SPEECH + quiet(520))  # what comes next is answered
    assert "output_audio_buffer.stopped" in kinds(line.wait(4))


def test_speech_of_that_length_does() -> None:
    line = replying(min_interruption_duration_ms=500)
    spoken, seen = 0, []
    while "output_audio_buffer.cleared" not in kinds(seen):
        sent = len(line.packets)
        seen = line.say(SPEECH[spoken : spoken + FRAME_OCTETS])
        spoken += FRAME_OCTETS
    assert 500 <= spoken / MS_OCTETS <= 560, "pauses do not count"
    assert not any(map(any, line.packets[sent:])), "not one more of it"
    assert kinds(seen) == [
        "output_audio_buffer.cleared",
        *AFTER_SOUND,
        "conversation.item.truncated",
    ]
    assert seen[-2]["response"]["status"] == "cancelled"
    assert seen[-1]["audio_end_ms"] == 20 * sent
    seen = line.say(SPEECH[spoken:] + quiet(560)) + line.wait(4)
    assert kinds(seen)[-1] == "output_audio_buffer.stopped"
    assert kinds(seen).count("response.created") == 1


def test_two_short_ones_are_not_one_long_one() -> None:
    line = replying(min_interruption_duration_ms=300)
    seen = line.say((HM + quiet(300)) * 3 + quiet(300))
    assert "output_audio_buffer.cleared" not in kinds(seen)
    assert kinds(seen).count("input_audio_buffer.speech_stopped") == 1


def test_a_short_word_is_answered_if_the_reply_is_over_when_it_ends() -> None:
    line = replying(min_interruption_duration_ms=500)
    while line.conversation._replies.busy:
        line.wait(0.02, keep=True)
        if sum(map(len, line.packets)) > len(SPEECH) - 40 * MS_OCTETS:  # it is about to end
            break
    line.take()
    seen = line.say(HM + quiet(560)) + line.wait(2)
    assert kinds(seen)[0] == "input_audio_buffer.speech_started"
    assert "output_audio_buffer.stopped" in kinds(seen)
    assert kinds(seen).count("response.created") == 1
    assert "output_audio_buffer.cleared" not in kinds(seen)


def test_a_short_word_into_silence_is_answered_at_once() -> None:
    line = ParrotLine(detecting(min_interruption_duration_ms=500))
    line.say(quiet(300) + HM + quiet(440))
    while not line.packets:
        seen = line.say(quiet(20))
    assert "input_audio_buffer.speech_stopped" in kinds(seen)


def test_who_is_not_to_be_interrupted_is_not() -> None:
    line = replying(min_interruption_duration_ms=300, interrupt_response=False)
    seen = line.say(LONG + quiet(560))
    assert "output_audio_buffer.cleared" not in kinds(seen)
    seen += line.wait(4)
    # What was said at length is answered, after the reply that it did not interrupt.
    assert kinds(seen).count("response.created") == 1
    assert kinds(seen).count("output_audio_buffer.stopped") == 2
    assert "error" not in kinds(seen)


def test_the_answer_waits_that_much_longer() -> None:
    line = ParrotLine(detecting(response_delay_ms=700))
    seen = line.say(quiet(300) + SPEECH + quiet(500))
    while kinds(seen)[-1] != COMMITTED[-1]:
        seen += line.say(quiet(20))
    begun = line.now
    while not line.packets:
        seen += line.say(quiet(20))
    assert line.now - begun == pytest.approx(0.7, abs=0.021)
    assert kinds(seen)[-len(BEFORE_SOUND) :] == BEFORE_SOUND


def test_speech_in_the_delay_puts_the_answer_off() -> None:
    line = ParrotLine(detecting(response_delay_ms=700))
    line.say(quiet(300) + SPEECH + quiet(900))
    seen = line.say(LONG + quiet(1000))
    assert "response.created" not in kinds(seen)
    seen += line.say(quiet(400))
    assert kinds(seen).count("response.created") == 1


def test_push_to_talk_in_the_delay_leaves_the_answer_to_the_client() -> None:
    line = ParrotLine(detecting(response_delay_ms=700))
    line.say(quiet(300) + SPEECH + quiet(600))
    line.client("session.update", session=detecting())
    assert line.wait(1) == []
    line.client("session.update", session=detecting(type="server_vad", response_delay_ms=100))
    assert "response.created" not in kinds(line.wait(2))


@pytest.mark.parametrize("event", ["response.cancel", "output_audio_buffer.clear"])
def test_a_client_that_interrupts_in_the_delay_gets_no_answer(event: str) -> None:
    line = ParrotLine(detecting(response_delay_ms=700))
    line.say(quiet(300) + SPEECH + quiet(600))
    line.client(event)
    assert "response.created" not in kinds(line.wait(3))


def test_a_response_beside_the_conversation_is_no_answer() -> None:
    line = Line()
    line.client("session.update", session=detecting(response_delay_ms=200))
    line.backend("session.updated", session=line.asks()[0]["session"])
    for kind in ("speech_started", "speech_stopped", "committed"):
        line.backend(f"input_audio_buffer.{kind}", item_id="u")
    line.client("response.create", response={"conversation": "none"})
    line.backend("response.created", response={"id": "aside"})
    line.client("response.cancel", response_id="aside")
    line.asks()
    line.wait(0.22)
    assert kinds(line.asks()) == ["response.create"]


def test_what_is_dropped_of_a_turn_interrupts_nothing() -> None:
    line = replying(min_interruption_duration_ms=220)
    line.say(LONG[: 200 * MS_OCTETS])
    line.client("input_audio_buffer.clear")
    assert "output_audio_buffer.cleared" not in kinds(line.say(LONG[: 40 * MS_OCTETS]))


def test_a_client_that_asks_in_the_delay_gets_one_answer() -> None:
    line = ParrotLine(detecting(response_delay_ms=700))
    line.say(quiet(300) + SPEECH + quiet(600))
    seen = line.client("response.create") + line.wait(4)
    assert kinds(seen).count("response.created") == 1
    assert "error" not in kinds(seen)


def test_what_a_client_commits_is_its_own_to_have_answered() -> None:
    line = ParrotLine(detecting(response_delay_ms=100))
    line.say(quiet(300) + SPEECH)
    line.client("input_audio_buffer.commit")
    assert "response.created" not in kinds(line.wait(2))


def test_create_response_false_stays_so() -> None:
    line = ParrotLine(detecting(min_interruption_duration_ms=300, create_response=False))
    seen = line.say(quiet(300) + SPEECH + quiet(600)) + line.wait(1)
    assert "response.created" not in kinds(seen)
    assert "response.created" in kinds(line.client("response.create"))


def test_changed_in_mid_reply_and_in_mid_word() -> None:
    line = replying(min_interruption_duration_ms=5_000)
    assert "output_audio_buffer.cleared" not in kinds(line.say(LONG[: 400 * MS_OCTETS]))
    assert line.conversation.listens
    line.client("session.update", session=detecting(min_interruption_duration_ms=300))
    seen = line.say(LONG[400 * MS_OCTETS : 440 * MS_OCTETS])
    assert "output_audio_buffer.cleared" in kinds(seen)
    line.client("session.update", session=detecting(min_interruption_duration_ms=0))
    assert not line.conversation.listens
    seen = line.say(quiet(700)) + line.wait(3)
    assert kinds(seen).count("response.created") == 1
    line.client("session.update", session=detecting())
    assert line.say(SPEECH + quiet(700)) == []


def test_the_ear_is_asked_only_while_it_is_needed() -> None:
    line = ParrotLine(detecting(response_delay_ms=100))
    assert not line.conversation.listens
    ruled = Floor(Terms(None), RATE_HZ)
    assert not ruled.listens


def test_a_backend_that_hears_late_delays_nothing() -> None:
    """Speech is long enough in the moment in which a slow server says that it has begun."""
    line = Line()
    update = detecting(min_interruption_duration_ms=300)
    line.client("session.update", session=update)
    line.backend("session.updated", session=line.asks()[0]["session"])
    line.sounds(2000)
    line.wait(0.1)
    line.take()
    for at in range(0, 400 * MS_OCTETS, FRAME_OCTETS):
        line.conversation.hear(SPEECH[at : at + FRAME_OCTETS], line.now)
        line.wait(0.02, keep=True)
    assert line.take() == []
    line.backend("input_audio_buffer.speech_started", item_id="u")
    assert kinds(line.take()) == [
        "input_audio_buffer.speech_started",
        "output_audio_buffer.cleared",
    ]
    cancel, truncate = line.asks()
    assert (cancel["type"], cancel["response_id"]) == ("response.cancel", "r")
    assert truncate["type"] == "conversation.item.truncate"


def test_an_answer_that_crosses_with_speech_is_cancelled() -> None:
    line = Line()
    line.client("session.update", session=detecting(response_delay_ms=20))
    line.backend("session.updated", session=line.asks()[0]["session"])
    line.backend("input_audio_buffer.speech_started", item_id="u")
    line.backend("input_audio_buffer.speech_stopped", item_id="u")
    line.backend("input_audio_buffer.committed", item_id="u")
    line.wait(0.04)
    assert kinds(line.asks()) == ["response.create"]
    line.backend("input_audio_buffer.speech_started", item_id="v")  # on its way at that moment
    line.sounds(500)
    assert kinds(line.asks())[0] == "response.cancel"
    line.wait(0.3)
    assert line.packets == []


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below),
    max_leaves=4,
)
NAMES = st.sampled_from(
    [*Patience.__struct_fields__, "type", "create_response", "interrupt_response", "threshold", "x"]
)
LIKELY = st.booleans() | st.integers(0, 500) | st.sampled_from(["server_vad", "semantic_vad"])
DETECTION = st.none() | st.dictionaries(NAMES, LIKELY | ANY, max_size=4) | ANY
SESSION = st.builds(lambda d: {"audio": {"input": {"turn_detection": d}}}, DETECTION) | (
    st.dictionaries(st.sampled_from(["audio", "model"]), ANY)
)


@settings(max_examples=300, deadline=None)
@given(SESSION | st.none(), st.lists(st.tuples(st.integers(0, 4), SESSION), max_size=12))
def test_any_sessions_from_either_side(offered: Any, steps: list[tuple[int, Any]]) -> None:
    terms = Terms(offered)
    before = repr(offered)
    for number, (what, session) in enumerate(steps):
        if what == 0:
            terms.turned_down(f"e{number - 1}", None)
        elif what in (1, 2):
            assert isinstance(terms.shown(session, created=what == 1), dict)
        else:
            try:
                passed = terms.asked(session, f"e{number}")
            except Refused:
                continue
            found = passed.get("audio")
            found = found.get("input") if isinstance(found, dict) else None
            found = found.get("turn_detection") if isinstance(found, dict) else None
            assert not (isinstance(found, dict) and Patience.__struct_fields__ & found.keys())
        assert 0 <= terms.patience.response_delay_ms <= 10_000
    assert repr(offered) == before


def test_every_type_of_detection_takes_the_two_fields() -> None:
    """The vocabulary and the floor agree on what detections there are."""
    for name in ("server_vad", "semantic_vad"):
        line = ParrotLine(detecting(type=name, min_interruption_duration_ms=300))
        (created,) = line.take()
        assert of(created["session"])["min_interruption_duration_ms"] == 300
    assert set(Patience.__struct_fields__).isdisjoint(realtime.ServerVad.__struct_fields__)


class Server(Line):
    """A model server that obeys: it says what it hears, and does nothing by itself."""

    def __init__(self, wish: dict[str, Any]) -> None:
        super().__init__()
        self.client("session.update", session=detecting(**wish))
        self.backend("session.updated", session=self.asks()[0]["session"])
        self.made = 0
        self.creates = 0
        self.cancels = 0

    def serve(self) -> None:
        for ask in self.asks():
            if ask["type"] == "response.create":
                self.creates += 1
                self.made += 1
                self.sounds(400, f"r{self.made}", f"i{self.made}")
                self.done(f"r{self.made}", f"i{self.made}")
            elif ask["type"] == "response.cancel":
                self.cancels += 1

    def turn(self, speech_ms: int, *, replying: bool) -> None:
        """Speech of that length, in real time."""
        if replying:
            self.made += 1
            self.sounds(3_000, f"r{self.made}", f"i{self.made}")
        name = f"u{self.now}"
        for at in range(0, speech_ms * MS_OCTETS, FRAME_OCTETS):
            if self.conversation.listens:
                self.conversation.hear(SPEECH[at : at + FRAME_OCTETS], self.now)
            if at == 3 * FRAME_OCTETS:
                self.backend("input_audio_buffer.speech_started", item_id=name)
            self.wait(0.02, keep=True)
        for _ in range(25):
            if self.conversation.listens:
                self.conversation.hear(bytes(FRAME_OCTETS), self.now)
            self.wait(0.02, keep=True)
        self.backend("input_audio_buffer.speech_stopped", item_id=name)
        self.backend("input_audio_buffer.committed", item_id=name)
        self.serve()


WISHES = st.fixed_dictionaries(
    {
        "min_interruption_duration_ms": st.sampled_from([0, 100, 300]),
        "response_delay_ms": st.sampled_from([0, 100]),
        "create_response": st.booleans(),
        "interrupt_response": st.booleans(),
    }
).filter(lambda wish: wish["min_interruption_duration_ms"] or wish["response_delay_ms"])


@settings(max_examples=60, deadline=None)
@given(WISHES, st.sampled_from([120, 200, 400]), st.booleans())
def test_every_wish_is_granted(wish: dict[str, Any], speech_ms: int, replying: bool) -> None:
    server = Server(wish)
    server.turn(speech_ms, replying=replying)
    needed_ms = wish["min_interruption_duration_ms"]
    long = speech_ms >= needed_ms
    cleared = "output_audio_buffer.cleared" in kinds(server.take())
    assert cleared == (replying and long and wish["interrupt_response"])
    if not needed_ms:  # the backend interrupts by itself
        assert server.cancels == 0
    else:
        assert server.cancels == cleared
    assert server.creates == 0 or not wish["response_delay_ms"]
    if replying and not cleared:
        server.done(f"r{server.made}", f"i{server.made}")
    server.wait(0.2, keep=True)
    server.serve()
    answered = wish["create_response"] and (long or not replying)
    assert server.creates == answered
    server.wait(9, keep=True)
    server.serve()
    assert server.creates == answered, "and once"
