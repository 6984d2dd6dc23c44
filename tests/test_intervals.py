"""Statistics of load tests: distributions that merge, and intervals that hold what they promise."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SEED = 20_240_611


@pytest.fixture(scope="module")
def intervals():
    spec = importlib.util.spec_from_file_location("intervals", SCRIPTS / "intervals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def chance():
    return np.random.default_rng(SEED)


# --- Student's t: published tables ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 10, 2.2281),
        (0.995, 10, 3.1693),
        (0.9995, 30, 3.6460),
        (0.95, 120, 1.6577),
        (0.975, 1e6, 1.9600),
        (0.5, 7, 0.0),
    ],
)
def test_students_t(intervals, probability, freedom, expected):
    assert intervals.student(probability, freedom) == pytest.approx(expected, abs=5e-5)


# --- histograms -----------------------------------------------------------------------------------


def test_a_percentile_is_that_of_the_values(intervals, chance):
    values = chance.lognormal(5, 1, 50_000)
    found = intervals.counts(values)
    assert found.sum() == len(values)
    for percent in (0.1, 1, 50, 90, 99, 99.9, 100):
        exact = np.sort(values)[math.ceil(len(values) * percent / 100 - 1e-9) - 1]
        assert intervals.percentile(found, percent) == pytest.approx(exact, rel=0.0014)


def test_parts_add_up_to_the_whole(intervals, chance):
    values = chance.exponential(300, 10_000)
    parts = [intervals.counts(each) for each in np.array_split(values, 7)]
    assert (sum(parts) == intervals.counts(values)).all()


def test_nothing_and_the_extremes(intervals):
    nothing = intervals.counts(np.array([]))
    assert math.isnan(intervals.percentile(nothing, 50)) and intervals.sample(nothing, 10) == []
    found = intervals.counts(np.array([0.0, -3.0, 1e12]))
    assert found.sum() == 3
    assert intervals.percentile(found, 50) == pytest.approx(0.001, rel=0.003)


def test_a_sample_is_spread_as_the_values_are(intervals, chance):
    values = chance.lognormal(5, 1, 100_000)
    drawn = intervals.sample(intervals.counts(values), 10_000)
    assert 9_000 <= len(drawn) <= 10_000 and drawn == sorted(drawn)
    for percent in (1, 50, 99):
        assert np.percentile(drawn, percent) == pytest.approx(
            np.percentile(values, percent), rel=0.02
        )
    few = intervals.sample(intervals.counts(np.array([1.0, 2.0, 3.0])), 10_000)
    assert few == pytest.approx([1, 2, 3], rel=0.0014)


# --- intervals ------------------------------------------------------------------------------------


def autoregressive(chance, likeness, size):
    """Rounds of which each is that much like the one before it."""
    found = np.zeros(size + 100)
    steps = chance.standard_normal(size + 100)
    for i in range(1, len(found)):
        found[i] = likeness * found[i - 1] + steps[i]
    return found[100:]


@pytest.mark.parametrize("likeness", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rounds", [8, 20])
def test_two_runs_differ_by_less(intervals, chance, likeness, rounds):
    """On data of which the truth is known, as many pairs as are promised; the seed is SEED."""
    pairs, held = 400, 0
    for _ in range(pairs):
        first, second = (
            intervals.estimate(float(run.mean()), run)
            for run in (autoregressive(chance, likeness, rounds) for _ in range(2))
        )
        held += first.agrees(second)
    print(f"seed {SEED}: {held} of {pairs} pairs, {rounds} rounds, likeness {likeness}")
    # Of 400 pairs 380 are promised; by chance alone 13 fewer come once in a thousand times.
    assert held >= pairs * intervals.CONFIDENCE - 13


PERCENTS = 50, 90, 99, 99.9


def a_run(intervals, chance, stalls, depth, shape, rounds=20):
    """Histograms of rounds of 10,000 round trips whose level drifts, and in which something stands
    still now and then: so many `stalls` a round, each at least `depth` microseconds long, and some
    far longer (Pareto). A datagram is due every 20 us, and all of a stall wait for its end."""
    found = []
    for level in np.exp(autoregressive(chance, 0.5, rounds) * 0.05):
        trips = chance.lognormal(5, 0.3, 10_000) * level
        for _ in range(chance.poisson(stalls)):
            waits = np.arange(0, min(depth * (1 + chance.pareto(shape)), 60_000), 20)
            trips[: len(waits)] += waits[::-1]
        found.append(intervals.counts(trips))
    return found


@pytest.mark.parametrize(
    ("stalls", "depth", "shape", "rounds"),
    [(0, 0, 1, 20), (8, 500, 3, 20), (2, 1_000, 3, 20), (0.5, 2_000, 3, 80)],
    ids=["none", "many short ones", "some", "few long ones, which take longer"],
)
def test_all_percentiles_of_two_runs_at_once(intervals, chance, stalls, depth, shape, rounds):
    """As many pairs as are promised, also where stalls are the tail that most rounds do not have.
    Of a tail that ten of them make in a run it is nine pairs of ten; a longer run knows more."""
    pairs, held, worst = 100, 0, [0] * len(PERCENTS)

    def figures():
        run = a_run(intervals, chance, stalls, depth, shape, rounds)
        return [intervals.quantile(run, percent, len(PERCENTS)) for percent in PERCENTS]

    for _ in range(pairs):
        agree = [one.agrees(other) for one, other in zip(figures(), figures(), strict=True)]
        held += all(agree)
        worst = [n + (not each) for n, each in zip(worst, agree, strict=True)]
    print(f"seed {SEED}: {held} of {pairs} pairs agree in all of {PERCENTS}, failed: {worst}")
    # By chance alone 7 fewer than promised come once in a thousand times.
    assert held >= pairs * intervals.CONFIDENCE - 7


def test_a_tail_of_stalls_is_known_less_well_than_one_of_all(intervals, chance):
    """The same p99.9, once of what all rounds have, once of a few stalls."""
    rounds = [intervals.counts(chance.lognormal(5, 0.3, 10_000)) for _ in range(20)]
    plain = intervals.quantile(rounds, 99.9)
    stalled = a_run(intervals, chance, 0.3, 2_000, 3)
    lumpy = intervals.quantile(stalled, 99.9)
    assert plain.above < 0.15 * plain.value and plain.below < 0.15 * plain.value
    assert lumpy.above > 3 * plain.above
    assert intervals.quantile(stalled, 50).above < 0.2 * intervals.quantile(stalled, 50).value


def test_a_percentile_has_the_value_of_all_rounds_and_another_system_another(intervals, chance):
    rounds = [intervals.counts(chance.lognormal(5, 0.3, 10_000)) for _ in range(20)]
    slower = [intervals.counts(chance.lognormal(5.2, 0.3, 10_000)) for _ in range(20)]
    for percent in PERCENTS:
        found = intervals.quantile(rounds, percent, 10, intervals.BETWEEN)
        assert found.value == intervals.percentile(sum(rounds), percent)
        least = 4 * intervals.BETWEEN * found.value  # what rounds do not show comes on top
        assert min(found.below, found.above) > least
        assert not found.agrees(intervals.quantile(slower, percent, 10, intervals.BETWEEN))


def test_sides_that_face_each_other_decide(intervals):
    low = intervals.Estimate(100.0, 1.0, 30.0)
    high = intervals.Estimate(120.0, 10.0, 1.0)
    assert low.agrees(high) and high.agrees(low)  # 20 apart; sqrt((900 + 100) / 2) are allowed
    shy = intervals.Estimate(120.0, 10.0, 500.0)
    far = intervals.Estimate(100.0, 500.0, 10.0)
    assert not shy.agrees(far) and not far.agrees(shy)


def test_an_interval_is_no_wider_than_it_has_to_be(intervals, chance):
    """Of independent rounds it is some 1.2 times what would do if all were known: it says
    something. A system that is a fifth slower does not agree."""
    rounds = 100 + chance.standard_normal((2, 20)) * 3
    first, second = (intervals.estimate(float(run.mean()), run) for run in rounds)
    ideal = 1.96 * 3 * math.sqrt(2 / 20)
    assert ideal * 0.6 < first.apart < ideal * 2.5
    slower = intervals.estimate(second.value * 1.2, rounds[1] * 1.2)
    assert first.agrees(second) and not first.agrees(slower)


def test_what_is_alike_is_worth_less(intervals):
    trend = [100.0 + i for i in range(20)]
    mixed = [100.0 + i for i in np.random.default_rng(SEED).permutation(20)]
    drifting = intervals.estimate(float(np.mean(trend)), trend)
    shuffled = intervals.estimate(float(np.mean(mixed)), mixed)
    assert drifting.apart > 1.5 * shuffled.apart


def test_more_figures_at_once_need_wider_intervals(intervals, chance):
    run = chance.standard_normal(20)
    one, ten = (intervals.estimate(0.0, run, figures) for figures in (1, 10))
    assert ten.apart > one.apart


def test_no_loss_is_not_no_loss_for_ever(intervals):
    floor = intervals.counted(0, 100_000)
    none = intervals.estimate(0.0, [0.0] * 20, floor=floor)
    assert 0 < none.apart < 1e-4
    assert none.agrees(intervals.estimate(1e-5, [0.0] * 19 + [2e-4], floor=floor))
    assert not none.agrees(intervals.estimate(1e-3, [1e-3] * 20, floor=floor))


def test_too_few_rounds_say_nothing(intervals):
    found = intervals.estimate(5.0, [5.0] * 5)
    assert found.value == 5.0 and math.isnan(found.apart)
    lost = intervals.estimate(5.0, [math.nan] * 10 + [5.0] * 5)
    assert math.isnan(lost.apart) and not found.agrees(found)
    five = intervals.quantile([intervals.counts(np.array([7.0]))] * 5, 50)
    assert five.value == pytest.approx(7, rel=0.0014) and math.isnan(five.above)
    empty = intervals.quantile([np.zeros(intervals.BINS, int)] * 20, 50)
    assert math.isnan(empty.value) and math.isnan(empty.below)
