"""Admission: a fake load, second by second, and whether a call is taken."""

import pytest

import admission
import endpoints
import settings
from admission import Calls, Refused

ANYWHERE = (endpoints.Prefix("127.0.0.0/8"),)
NOBODY = Calls(total=0, live=0, connecting=0, young=0)


class Process:
    """A process whose load is made up."""

    def __init__(self, **limits: float) -> None:
        table = settings.TransceiverTable(
            listen=endpoints.Endpoint("127.0.0.1:9000"),
            relay_prefixes=ANYWHERE,
            control_prefixes=ANYWHERE,
            **limits,  # type: ignore[arg-type]
        )
        self.load = admission.Load(table)
        self.now = self.cpu_s = 100.0
        self.load.sample(self.now, self.cpu_s, NOBODY)

    def run(
        self, seconds: int, share: float, lag_s: float = 0.0, live: int = 0, young: int = 0
    ) -> None:
        for _ in range(seconds):
            self.now += 1
            self.cpu_s += share
            for _ in range(20):
                self.load.lag(lag_s)
            self.load.sample(self.now, self.cpu_s, Calls(live, live, 0, young))

    def takes(self, calls: Calls = NOBODY) -> bool:
        return self.load.refusal(calls, draining=False) is None


def test_an_idle_process_takes_calls() -> None:
    process = Process()
    assert process.takes()
    assert process.load.figure == 0


def test_a_process_that_works_takes_calls_until_its_limit() -> None:
    process = Process(load_max=0.9)
    process.run(60, 0.7, live=80)
    assert process.takes(Calls(80, 80, 0, 0))
    assert process.load.figure == pytest.approx(0.7 / 0.9, rel=0.01)
    process.run(60, 0.95, live=110)
    refused = process.load.refusal(Calls(90, 90, 0, 0), draining=False)
    assert refused is Refused.LOAD
    assert refused.message.endswith(".")


def test_a_busy_second_turns_nobody_away() -> None:
    process = Process()
    process.run(60, 0.3)
    process.run(1, 1.0, lag_s=0.04)
    assert process.takes()


def test_a_late_event_loop_is_load_too() -> None:
    """Another process has the CPU: our own share says nothing."""
    process = Process()
    process.run(60, 0.2, lag_s=0.05)
    assert not process.takes()
    process.run(60, 0.2, lag_s=0.001)
    assert process.takes()


def test_refusing_and_accepting_do_not_alternate() -> None:
    process = Process(load_max=0.8)
    process.run(60, 0.85)
    assert not process.takes()
    process.run(60, 0.75)  # under the limit, but not by a tenth of it
    assert not process.takes()
    process.run(60, 0.70)
    assert process.takes()
    process.run(60, 0.75)
    assert process.takes()


def test_a_burst_is_not_over_assigned() -> None:
    """Two hundred offers at once find an idle process; none of them costs anything yet."""
    process = Process(sessions_max=1000, connecting_max=1000)
    taken = 0
    while taken < 200 and process.takes(Calls(taken, 0, taken, taken)):
        taken += 1
    assert 60 <= taken < 200  # what CALL_SHARE and load_max leave, and not all of them
    few = Process(sessions_max=1000, connecting_max=8)
    assert few.takes(Calls(7, 0, 7, 7))
    assert few.load.refusal(Calls(8, 0, 8, 8), draining=False) is Refused.CONNECTING


def test_what_a_call_costs_is_measured() -> None:
    limits = {"sessions_max": 1000, "connecting_max": 1000}
    cheap, dear = Process(**limits), Process(**limits)
    cheap.run(60, 0.4, live=100)
    dear.run(60, 0.4, live=35)
    burst = Calls(total=150, live=100, connecting=50, young=50)
    assert cheap.takes(burst)
    assert not dear.takes(burst)


def test_a_burst_that_lasts_seconds_is_not_over_assigned() -> None:
    """Thirty calls a second that take 0.8 % each, which the process's share shows seconds later."""
    process = Process(sessions_max=1000, connecting_max=1000)
    live: list[float] = []
    for _ in range(20):
        for _ in range(30):
            young = sum(process.now - at < admission.YOUNG_S for at in live)
            if process.takes(Calls(len(live), len(live), 0, young)):
                live.append(process.now)
        young = sum(process.now + 1 - at < admission.YOUNG_S for at in live)
        process.run(1, min(1.0, 0.008 * len(live)), live=len(live), young=young)
    assert 90 <= len(live) <= 125  # 112 take the CPU that there is


def test_limits_and_draining_come_first() -> None:
    process = Process(sessions_max=3)
    full = Calls(total=3, live=3, connecting=0, young=0)
    assert process.load.refusal(full, draining=False) is Refused.SESSIONS
    assert process.load.refusal(full, draining=True) is Refused.DRAINING


def test_time_that_stands_still_changes_nothing() -> None:
    process = Process()
    process.load.sample(process.now, process.cpu_s + 5, NOBODY)
    assert process.load.share == 0


def test_each_reason_has_its_counter() -> None:
    assert len({reason.count for reason in Refused}) == len(Refused)
    assert all(reason.count.name == f"REFUSED_{reason.name}" for reason in Refused)
