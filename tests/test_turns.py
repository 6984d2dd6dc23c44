"""Turns: speech is noticed, clicks are not, and a turn ends when it should, by either clock."""

import math
import random
import struct

import numpy as np
import pytest

from realtime import SemanticVad, ServerVad
from turns import FRAME_MS, FRAME_OCTETS, MS_OCTETS, RATE_HZ, TURN_MS_MAX, Ear, Mark, by_sound

from .line import SPEECH


def silence(ms: int) -> bytes:
    return bytes(ms * MS_OCTETS)


def noise(ms: int, dbfs: float, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    sigma = 32_768 * 10 ** (dbfs / 20)
    samples = [int(chance.gauss(0, sigma)) for _ in range(ms * RATE_HZ // 1000)]
    return struct.pack(f"<{len(samples)}h", *(max(-32_768, min(32_767, s)) for s in samples))


def heard(ear: Ear, pcm: bytes, rule: ServerVad | None, piece: int = FRAME_OCTETS) -> list[tuple]:
    """Marks with the audio time at which they came, and the turn taken at each stop."""
    found = []
    for at in range(0, len(pcm), piece):
        for mark in ear.hear(pcm[at : at + piece], (ear.clock_ms + FRAME_MS) / 1000, rule):
            turn = ear.take() if mark is Mark.STOPPED else None
            found.append((mark, ear.clock_ms, turn))
    return found


@pytest.mark.parametrize("silence_ms", [200, 500, 1000])
def test_a_turn_ends_that_much_silence_after_the_last_speech(silence_ms: int) -> None:
    speech = SPEECH
    rule = ServerVad(silence_duration_ms=silence_ms)
    before = silence(1000)
    marks = heard(Ear(), before + speech + silence(2000), rule)
    # The sentence has a pause of its own, longer than the shortest silence.
    (started, started_ms, _), (stopped, stopped_ms, turn) = marks[0], marks[-1]
    assert (started, stopped) == (Mark.STARTED, Mark.STOPPED)
    assert len(marks) == 2 or silence_ms == 200
    assert started_ms <= 1000 + 120
    speech_end_ms = 1000 + len(speech) // MS_OCTETS
    assert abs(stopped_ms - silence_ms - speech_end_ms) <= 40
    assert turn.end_ms <= speech_end_ms + 100


def test_a_turn_is_what_was_said_with_its_padding_and_without_the_silence_behind() -> None:
    speech = SPEECH
    marks = heard(Ear(), silence(1000) + speech + silence(900), ServerVad(prefix_padding_ms=200))
    turn = marks[-1][2]
    assert speech[: len(speech) - 40 * MS_OCTETS] in turn.pcm
    at_ms = turn.pcm.index(speech[:FRAME_OCTETS]) // MS_OCTETS
    assert 180 <= at_ms <= 260
    assert abs(turn.lead_ms - at_ms) <= 40, "the padding is told from the speech"
    assert len(turn.pcm) // MS_OCTETS <= at_ms + len(speech) // MS_OCTETS + 100
    assert abs(turn.heard_ms - len(speech) // MS_OCTETS) <= 60
    rms = math.sqrt(np.mean(np.frombuffer(speech, "<i2").astype(float) ** 2)) / 32_768
    assert abs(turn.level_dbfs - 20 * math.log10(rms)) < 2


def test_any_cut_into_pieces_hears_the_same() -> None:
    pcm = silence(400) + SPEECH + silence(700)
    whole = heard(Ear(), pcm, ServerVad())
    for piece in (1, 639, 641, 3_200):
        pieces = heard(Ear(), pcm, ServerVad(), piece)
        assert [turn.pcm for *_, turn in pieces if turn] == [t.pcm for *_, t in whole if t]


@pytest.mark.parametrize(
    "sound",
    [
        pytest.param(silence(3000), id="silence"),
        pytest.param(noise(3000, -52), id="a quiet room"),
        pytest.param((noise(15, -6) + silence(485)) * 6, id="clicks"),
    ],
)
def test_what_is_no_speech_starts_no_turn(sound: bytes) -> None:
    assert heard(Ear(), sound, ServerVad()) == []


def test_threshold_is_a_level() -> None:
    quiet = (np.frombuffer(SPEECH, "<i2") // 16).astype("<i2").tobytes()  # 24 dB less
    assert heard(Ear(), quiet + silence(800), ServerVad(threshold=0.0)) != []
    assert heard(Ear(), quiet + silence(800), ServerVad(threshold=0.7)) == []


def test_clicks_do_not_prolong_a_turn() -> None:
    speech = SPEECH
    clicks = (silence(180) + noise(15, -6) + silence(5)) * 5
    stopped_ms = heard(Ear(), speech + clicks, ServerVad())[-1][1]
    assert stopped_ms <= len(speech) // MS_OCTETS + 540


def test_the_clock_ends_a_turn_when_no_more_packets_come() -> None:
    ear, rule = Ear(), ServerVad(silence_duration_ms=300)
    speech = SPEECH
    assert [mark for mark, *_ in heard(ear, speech, rule)] == [Mark.STARTED]
    last = len(speech) // MS_OCTETS / 1000
    assert not ear.has_fallen_silent(last + 0.3, rule)
    assert ear.has_fallen_silent(last + 0.5, rule)
    assert speech[: len(speech) // 2] in ear.take().pcm
    assert not ear.has_fallen_silent(last + 0.5, rule)


def test_silence_behind_a_turn_pads_the_next_one() -> None:
    ear = Ear()
    first, second = heard(ear, (SPEECH + silence(600)) * 2, ServerVad())[1::2]
    lead_ms = second[2].end_ms - len(second[2].pcm) // MS_OCTETS - first[2].end_ms
    assert lead_ms >= 0  # nothing is in two turns
    assert second[2].heard_ms == pytest.approx(first[2].heard_ms, abs=60)


def test_memory_is_bounded_however_long_somebody_talks() -> None:
    ear, rule = Ear(), ServerVad(silence_duration_ms=3000)
    speech = SPEECH
    for _ in range(40_000 * MS_OCTETS // len(speech)):
        assert not [mark for mark, *_ in heard(ear, speech, rule) if mark is Mark.STOPPED]
    assert ear.buffered_ms <= TURN_MS_MAX
    turn = ear.take()
    assert len(turn.pcm) <= TURN_MS_MAX * MS_OCTETS
    assert turn.heard_ms > TURN_MS_MAX
    idle = Ear()
    heard(idle, silence(5000), rule)
    assert idle.buffered_ms <= rule.prefix_padding_ms + 100


def test_push_to_talk_keeps_everything_and_notices_nothing() -> None:
    ear = Ear()
    pcm = silence(300) + SPEECH + silence(800)
    assert heard(ear, pcm, None) == []
    turn = ear.take()
    assert turn.pcm == pcm[: len(turn.pcm)]
    assert len(pcm) - len(turn.pcm) < FRAME_OCTETS
    assert ear.buffered_ms == 0
    heard(ear, silence(40_000), None)
    assert ear.buffered_ms == TURN_MS_MAX
    assert ear.take().level_dbfs == -math.inf


def test_a_parrot_that_understands_nothing_waits_by_eagerness() -> None:
    waits = [
        by_sound(SemanticVad(eagerness=eagerness, create_response=False))
        for eagerness in ("high", "auto", "low")
    ]
    assert [rule.silence_duration_ms for rule in waits] == [400, 800, 1500]
    assert not any(rule.create_response for rule in waits)
    assert by_sound(None) is None
    assert by_sound(ServerVad(threshold=0.1)) == ServerVad(threshold=0.1)
