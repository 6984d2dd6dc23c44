"""Loss, reordering, doubles and jitter: delays exactly, speech against what it would be without.

Virtual time and seeds: the delays are the same in every run, and may be asserted.
"""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SECONDS = 15.0
SEED = 7
EXACT_S = 1e-6


@pytest.fixture(scope="module")
def quality():
    """The script as a module; it finds its own helper beside itself."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import quality  # noqa: PLC0415 - not importable without the line above

        yield quality
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("quality", "impair"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def frames(quality):
    return quality.speech(SECONDS)


@pytest.fixture(scope="module")
def streams(quality, frames):
    """By percentage of loss that the browser hears of: payloads, and what arrives undisturbed."""
    made = {}

    def stream(percent):
        if percent not in made:
            payloads = quality.browser(frames, percent / 100)
            made[percent] = payloads, run(quality, payloads, quality.Path("whole"))
        return made[percent]

    return stream


def run(quality, payloads, path, **without):
    return quality.run(payloads, path, SEED, quality.Watched(quality.BACKEND_HZ, **without))


def paths(quality):
    return {path.name: path for path in quality.PATHS}


def test_the_model_does_what_it_says(quality):
    import impair  # noqa: PLC0415 - beside the script

    sent_at = [n * 0.02 for n in range(50_000)]
    assert impair.travel(quality.PATHS[-1], sent_at, 3) == impair.travel(
        quality.PATHS[-1], sent_at, 3
    )
    for path in quality.PATHS:
        arrivals = impair.travel(path, sent_at, 3)
        assert arrivals == sorted(arrivals)
        came = {each.number for each in arrivals}
        assert 1 - len(came) / len(sent_at) == pytest.approx(path.loss, abs=0.006)
        doubled = len(arrivals) - len(came)
        assert doubled / len(came) == pytest.approx(path.doubled, abs=0.005)
        longest = path.jitter_s + impair.SWAP_S * (path.swapped > 0) + path.delay_s
        late = [each.at - sent_at[each.number] for each in arrivals]
        assert min(late) >= path.delay_s - EXACT_S
        assert max(late) <= longest + impair.DOUBLE_S * (path.doubled > 0) + EXACT_S
        if path.queued:
            assert [each.number for each in arrivals] == sorted(came)
        missing = sorted(set(range(len(sent_at))) - came)
        if missing:
            bursts = sum(n - 1 not in set(missing[:2_000]) for n in missing[:2_000])
            assert min(2_000, len(missing)) / bursts == pytest.approx(
                max(path.burst, 1 / (1 - path.loss)), rel=0.15
            )


@pytest.mark.parametrize("name", ["no loss", "doubled 5 %", "queue 30 ms"])
def test_without_loss_nothing_waits(quality, streams, name):
    payloads, whole = streams(0)
    done = run(quality, payloads, paths(quality)[name])
    assert max(done.waits) == 0.0
    assert (done.receiver.recovered, done.receiver.concealed, done.held_max) == (0, 0, 0)
    assert done.pcm == whole.pcm, "not every sample is the same"


@pytest.mark.parametrize("name", ["swapped 5 %", "jitter 30 ms"])
def test_reordering_within_two_packets_changes_nothing(quality, streams, name):
    payloads, whole = streams(0)
    done = run(quality, payloads, paths(quality)[name])
    assert 0 < max(done.waits) <= 0.03 + EXACT_S
    assert done.pcm == whole.pcm


@pytest.mark.parametrize("percent", [2, 5, 10])
def test_a_hole_costs_two_packets_and_then_nothing(quality, streams, percent):
    payloads, whole = streams(percent)
    done = run(quality, payloads, paths(quality)[f"loss {percent} %"])
    # The second packet behind a hole is 20 ms later than the first; unless that is lost, too
    gap_s = quality.FRAME_S
    waits = sorted(done.waits)
    assert waits[int(0.99 * len(waits))] < 0.045
    assert max(done.waits) <= receiver_bound(quality) + EXACT_S
    assert max(done.holes) <= receiver_bound(quality) + EXACT_S
    at_once = sum(wait == 0 for wait in done.waits) / len(waits)
    assert at_once > 1 - 3 * percent / 100, "the delay does not return to zero"
    assert sorted(done.holes)[len(done.holes) // 2] == pytest.approx(gap_s)
    assert done.held_max == 1
    assert done.receiver.recovered + done.receiver.concealed == done.lost
    assert abs(len(done.pcm) - len(whole.pcm)) <= 2 * 0.02 * quality.BACKEND_HZ


def receiver_bound(quality):
    """The longest that anything waits: HOLE_S from the last packet on, and for the next tick."""
    return quality.receiver.HOLE_S + quality.TICK_S


def test_every_path_keeps_the_account_and_the_time(quality, streams):
    for path in quality.PATHS:
        payloads, whole = streams(round(100 * path.loss))
        done = run(quality, payloads, path)
        of = done.receiver
        assert of.received == quality.accounted(of), path.name
        assert of.received == len(done.works)
        assert of.malformed == of.stray == of.surplus == 0
        assert of.decoded + of.late == len(payloads) - done.lost, path.name
        assert done.held_max <= 1
        # To the sample, but for what was lost at the very end
        assert len(whole.pcm) - len(done.pcm) in range(0, 2 * quality.BACKEND_HZ // 5, 960), path


def test_speech_stays_understandable_and_fec_and_concealment_each_help(quality, streams):
    """A floor under which it falls when either is switched off."""
    plain, plain_whole = streams(0)
    best = 1.0
    for percent, floor in ((2, 0.985), (5, 0.97), (10, 0.945)):
        path = paths(quality)[f"loss {percent} %"]
        payloads, whole = streams(percent)
        figures = {
            "both": quality.likeness(whole.samples, run(quality, payloads, path).samples),
            "no FEC": quality.likeness(plain_whole.samples, run(quality, plain, path).samples),
            "FEC unused": quality.likeness(
                whole.samples, run(quality, payloads, path, fec=False).samples
            ),
            "silence": quality.likeness(
                plain_whole.samples, run(quality, plain, path, concealment=False).samples
            ),
        }
        print(percent, {name: round(value, 3) for name, value in figures.items()})
        assert floor < figures["both"] <= best
        best = figures["both"]
        assert max(figures["no FEC"], figures["FEC unused"]) < floor
        assert figures["silence"] < figures["no FEC"] - 0.004


def test_the_first_frame_of_a_reply_leaves_in_the_call_that_brings_it(quality):
    for row in quality.outbound(20):  # asserts it for each
        print(row)
        assert row["max"] > 0


def test_protection_and_asking_again_are_measured(quality):
    """The figures behind two decisions: FEC from some loss on (fec.py), no NACK (receiver.py)."""
    rows = quality.outgoing(SECONDS, SEED)
    by_loss = {row["loss"]: row for row in rows}
    for row in rows:
        print(row)
    assert by_loss["10 %"]["silk_estoi"] > by_loss["10 %"]["celt_estoi"] + 0.01
    assert by_loss["0 %"]["celt_estoi"] > 0.98
    rows = quality.nack(SECONDS, SEED)
    for row in rows:
        print(row)
        shares = [int(row[f"rtt_{trip}_ms"][:-1]) for trip in (5, 10, 20, 30, 50, 100)]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0
