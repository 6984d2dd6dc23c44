"""A call's meter: what is timed between which moments, and sums that follow a call."""

import types

import pytest

import ledger
import meter
import rtp
from metrics import Timing
from metrics import Transceiver as Count


class Metered:
    def __init__(self) -> None:
        self.counters, self.timings = ledger.Counters(Count), ledger.Histograms(Timing)
        self.meter = meter.Meter(self.counters, self.timings, 100.0)

    def only(self, kind: Timing) -> float:
        """The one value that was observed of a kind."""
        assert self.timings.count(kind) == 1
        return self.timings.total(kind)


@pytest.fixture
def on() -> Metered:
    return Metered()


def test_set_up_counts_from_the_offer(on: Metered) -> None:
    on.meter.set_up(Timing.SETUP_CHANNEL, 100.25)
    assert on.only(Timing.SETUP_CHANNEL) == 0.25


def test_a_reply_is_timed_once_from_the_end_of_the_turn(on: Metered) -> None:
    on.meter.sounded(100.0)  # a greeting
    on.meter.turn("input_audio_buffer.speech_started", False, 101.0)
    on.meter.turn("input_audio_buffer.speech_stopped", False, 103.0)
    on.meter.turn("response.created", False, 103.0)
    on.meter.sounded(103.5)
    on.meter.sounded(103.52)
    assert on.only(Timing.REPLY) == 0.5


def test_what_is_no_reply_is_not_timed(on: Metered) -> None:
    on.meter.turn("input_audio_buffer.speech_stopped", True, 101.0)  # one is playing already
    on.meter.sounded(101.02)
    on.meter.turn("input_audio_buffer.speech_stopped", False, 102.0)
    on.meter.turn("input_audio_buffer.speech_started", False, 102.1)  # it was only a pause
    on.meter.sounded(102.2)
    assert on.timings.count(Timing.REPLY) == 0


def test_errors_and_interruptions_by_what_the_client_is_told(on: Metered) -> None:
    on.meter.told('{"type":"error","error":{"type":"invalid_request_error"}}', 0)
    on.meter.told('{"type":"error","error":{"type":"server_error","code":"x"}}', 0)
    on.meter.told('{"type":"error","error":{"type":"server_error","code":"y"}}', 0)
    on.meter.told('{"type":"output_audio_buffer.cleared","response_id":"r"}', 0.001)
    on.meter.told('{"type":"response.done","text":"{\\"type\\":\\"error\\""}', 0)
    assert on.counters[Count.ERRORS_CLIENT] == 1
    assert on.counters[Count.ERRORS_SERVER] == 2
    assert on.only(Timing.INTERRUPTION) == 0.001


def test_frames_are_sums_over_calls(on: Metered) -> None:
    names = tuple(name for name, _ in meter._FRAMES)
    first = types.SimpleNamespace(**dict.fromkeys(names, 2))
    second = types.SimpleNamespace(**dict.fromkeys(names, 10))
    on.meter.frames(first)
    first.late = 5
    on.meter.frames(first)
    meter.Meter(on.counters, on.timings, 100.0).frames(second)
    counted = {name: on.counters[Count[f"FRAMES_{name.upper()}"]] for name in names}
    assert counted == {**dict.fromkeys(names, 12), "late": 15}


def test_the_network_both_ways(on: Metered) -> None:
    block = rtp.Block(5, 64, 3, 100, 480, 0, 0)
    on.meter.reported(block, 10)
    on.meter.reported(block, 10)  # nothing has come since
    assert on.only(Timing.LOSS_IN) == 0.25
    assert on.only(Timing.JITTER_IN) == 0.01
    on.meter.received(block._replace(jitter=2**32 - 1), 0.05)
    assert on.only(Timing.ROUND_TRIP) == 0.05
    assert on.only(Timing.LOSS_OUT) == 0.25
    assert on.only(Timing.JITTER_OUT) == meter.JITTER_S_MAX  # whatever a client makes up
    on.meter.received(block, None)
    assert on.timings.count(Timing.ROUND_TRIP) == 1


def test_a_story_has_what_has_happened_and_nothing_else(on: Metered) -> None:
    told = on.meter.story()
    assert told == {"frames": {}, "turns": 0, "replies": 0, "interruptions": 0,
                    "errors": {"client": 0, "server": 0}}  # fmt: skip
    on.meter.turn("session.created", False, 100.01)
    on.meter.set_up(Timing.SETUP_CHECK, 100.02)
    on.meter.set_up(Timing.SETUP_CONNECTED, 100.05)
    for at in (101.0, 102.0):
        on.meter.turn("input_audio_buffer.speech_stopped", False, at)
        on.meter.turn("input_audio_buffer.committed", False, at)
        on.meter.sounded(at + (at - 100) / 10)
    on.meter.turn("session.created", False, 103.0)  # another connection of the same call
    on.meter.told('{"type":"output_audio_buffer.cleared"}', 0.002)
    on.meter.told('{"type":"error","error":{"type":"invalid_request_error"}}', 0)
    block = rtp.Block(1, 64, 7, 0, 480, 0, 0)
    on.meter.reported(block, 50)
    on.meter.received(block, 0.25)
    told = on.meter.story()
    assert told["set_up"] == {"backend_ms": 10.0, "check_ms": 20.0, "connected_ms": 50.0}
    assert (told["turns"], told["replies"], told["interruptions"]) == (2, 2, 1)
    assert (told["reply_ms_mean"], told["reply_ms_max"]) == (150.0, 200.0)
    assert told["interruption_ms_max"] == 2.0 and told["errors"] == {"client": 1, "server": 0}
    assert (told["packets_in"], told["lost_in"], told["lost_out"]) == (50, 7, 7)
    assert (told["jitter_in_ms"], told["round_trip_ms"]) == (10.0, 250.0)
