"""Intervals cover what they say, degenerate samples have a defined answer, and the closed forms hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import DataError
from accord.measures.statistics import (
    accuracy_interval,
    calibration_bins,
    calibration_error,
    cluster_interval,
    paired_difference,
    pearson,
    sign_flip_p_value,
    win_rate,
)
from accord.randomness import generator
from accord.records import Interval

quick = settings(max_examples=50, derandomize=True, deadline=None)
numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


def inside(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


# ---- means of clustered values ------------------------------------------------------------------------------------


def coverage(
    estimate: Callable[[np.ndarray, np.ndarray], Interval],
    draw: Callable[[np.random.Generator, np.ndarray, int], np.ndarray],
    truth: float,
    num_prompts: int,
) -> float:
    """Share of 1,500 simulated studies whose interval contains the truth; a prompt has one to six values."""
    random = generator("coverage", num_prompts)
    hits = 0
    for _ in range(1500):
        prompts = np.repeat(np.arange(num_prompts), random.integers(1, 7, size=num_prompts))
        hits += inside(estimate(draw(random, prompts, num_prompts), prompts), truth)
    return hits / 1500


def clustered_values(random: np.random.Generator, prompts: np.ndarray, num_prompts: int) -> np.ndarray:
    """Values around 3 of which half the variance is the prompt's."""
    return 3.0 + random.normal(size=num_prompts)[prompts] + random.normal(size=len(prompts))


def clustered_wins(share: float) -> Callable[[np.random.Generator, np.ndarray, int], np.ndarray]:
    """Wins (1), ties (.5), losses (0): a fifth are ties, each prompt has its own win probability, the mean is
    `share`."""

    def draw(random: np.random.Generator, prompts: np.ndarray, num_prompts: int) -> np.ndarray:
        decided = (share - 0.1) / 0.8  # .2 * .5 + .8 * decided = share
        probability = random.beta(4 * decided, 4 * (1 - decided), size=num_prompts)[prompts]
        wins = (random.random(len(prompts)) < probability).astype(float)
        return np.where(random.random(len(prompts)) < 0.2, 0.5, wins)

    return draw


@pytest.mark.parametrize("num_prompts", [5, 40, 200])
def test_mean_intervals_of_clustered_values_cover_95_percent(num_prompts: int) -> None:
    assert 0.92 <= coverage(cluster_interval, clustered_values, 3.0, num_prompts) <= 0.97


@pytest.mark.parametrize(("share", "num_prompts"), [(0.5, 300), (0.7, 100), (0.85, 300)])
def test_win_rate_intervals_of_clustered_comparisons_cover_95_percent(share: float, num_prompts: int) -> None:
    assert 0.92 <= coverage(win_rate, clustered_wins(share), share, num_prompts) <= 0.97


@pytest.mark.parametrize("share", [0.3, 0.5, 0.85])
def test_win_rate_intervals_of_few_prompts_are_not_too_narrow(share: float) -> None:
    assert coverage(win_rate, clustered_wins(share), share, 20) >= 0.94


@pytest.mark.parametrize("n", [10, 50])
def test_win_rate_intervals_of_independent_wins_cover_at_every_share(n: int) -> None:
    """Exact: the binomial probability of all counts of wins whose interval contains the share."""
    intervals = [win_rate([1.0] * k + [0.0] * (n - k), range(n)) for k in range(n + 1)]
    covered = []
    for share in np.linspace(0.01, 0.99, 99):
        chance = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        covered.append(sum(p for p, interval in zip(chance, intervals, strict=True) if inside(interval, share)))
    assert min(covered) > 0.93
    assert 0.95 < np.mean(covered) < 0.985


def test_intervals_that_ignore_the_prompts_cover_too_little() -> None:
    """The negative control of the simulation: every value its own cluster."""
    naive = coverage(lambda values, _: cluster_interval(values, range(len(values))), clustered_values, 3.0, 40)
    assert naive < 0.88


def test_mean_interval_of_four_values_in_three_prompts() -> None:
    """Values 1 2 | 6 | 3: mean 3; the prompts' residual sums are -3, 3, 0; standard error sqrt(3 / 2 * 18) / 4 =
    1.299038; the 0.975 quantile of t with 2 degrees of freedom is 4.302653; half width 5.589310."""
    interval = cluster_interval([1.0, 2.0, 6.0, 3.0], [7, 7, 1, 4])
    assert (interval.value, interval.n) == (3.0, 3)
    assert interval.high - 3.0 == pytest.approx(5.589310, rel=1e-6)
    assert 3.0 - interval.low == pytest.approx(5.589310, rel=1e-6)


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (30, 2.04227), (100, 1.98397)],
)
def test_few_prompts_widen_the_interval_by_students_t(df: int, quantile: float) -> None:
    """df + 1 prompts, half at -1 and half at 1 (one at 0 when odd): the standard error is sqrt(sum x^2 / (df (df +
    1)))."""
    half = (df + 1) // 2
    values = [-1.0] * half + [1.0] * half + [0.0] * ((df + 1) % 2)
    interval = cluster_interval(values, range(df + 1))
    assert interval.high / math.sqrt(2 * half / (df * (df + 1))) == pytest.approx(quantile, rel=2e-3)


@quick
@given(values=numbers, data=st.data())
def test_order_and_names_of_prompts_do_not_matter(values: list[float], data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(range(len(values))))
    plain = cluster_interval(values, prompts)
    renamed = cluster_interval([values[i] for i in order], [2**62 - prompts[i] for i in order])
    assert renamed.as_dict() == pytest.approx(plain.as_dict(), rel=1e-9, abs=1e-9)
    assert inside(plain, plain.value)


@quick
@given(values=numbers, copies=st.integers(2, 4))
def test_repeating_every_prompts_values_adds_no_information(values: list[float], copies: int) -> None:
    once = cluster_interval(values, range(len(values)))
    repeated = cluster_interval(values * copies, list(range(len(values))) * copies)
    assert repeated.as_dict() == pytest.approx(once.as_dict(), rel=1e-9, abs=1e-9)


@quick
@given(values=numbers, shift=st.floats(-5, 5))
def test_a_constant_paired_difference_is_certain(values: list[float], shift: float) -> None:
    interval = paired_difference([v + shift for v in values], values, range(len(values)))
    assert [interval.value, interval.low, interval.high] == pytest.approx([shift] * 3, abs=1e-9)


def test_one_prompt_says_nothing_about_the_mean_of_others() -> None:
    assert cluster_interval([1.0, 2.0], [5, 5]) == Interval(1.5, -math.inf, math.inf, 1)


# ---- shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 300])
@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_a_unanimous_sample_is_not_certain(outcome: float, n: int) -> None:
    interval = win_rate([outcome] * n, range(n))
    assert interval.value == outcome
    assert 0.0 <= interval.low <= outcome <= interval.high <= 1.0
    assert interval.high - interval.low > 1 / (n + 2)


def test_300_wins_of_300_leave_room_for_a_hundredth() -> None:
    """With one won and one lost prompt added: mean 301 / 302, residuals 301 (1/302)^2 + (301/302)^2 = .996689, standard
    error sqrt(302 / 301 * .996689) / 302 = .003311, t(301) = 1.967877: .996689 - .006516 = .990173."""
    interval = win_rate([1.0] * 300, range(300))
    assert interval.low == pytest.approx(0.990173, abs=1e-5)
    assert interval.high == 1.0


@quick
@given(wins=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40), data=st.data())
def test_swapping_the_two_sides_mirrors_the_win_rate(wins: list[float], data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(0, 9), min_size=len(wins), max_size=len(wins)))
    ours, theirs = win_rate(wins, prompts), win_rate([1 - w for w in wins], prompts)
    mirrored = [1 - theirs.value, 1 - theirs.high, 1 - theirs.low]
    assert [ours.value, ours.low, ours.high] == pytest.approx(mirrored, abs=1e-12)
    assert 0.0 <= ours.low <= ours.value <= ours.high <= 1.0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"), [(158, 256, 0.556, 0.675), (146, 256, 0.509, 0.629), (0, 10, 0.0, 0.27753)]
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    """158 / 256 = .617188, z^2 / n = .015006: centre (.617188 + .007503) / 1.015006 = .615455, half width
    sqrt(.236267 * .015006 + .000056) / 1.015006 = .059126. None of 10: z^2 / (10 + z^2) = 3.841459 / 13.841459 =
    .27753."""
    interval = accuracy_interval(correct, total)
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=5e-4)
    assert interval.value == correct / total


@quick
@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_interval_contains_the_share_and_stays_inside_0_and_1(total: int, share: float) -> None:
    interval = accuracy_interval(share * total, total)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.high - interval.low > 1e-4


def test_wilson_interval_of_all_or_none_contains_its_own_estimate_despite_rounding() -> None:
    for total in range(1, 400):
        for interval in (accuracy_interval(0, total), accuracy_interval(total, total)):
            assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0


# ---- calibration --------------------------------------------------------------------------------------------------


def test_probabilities_that_come_true_have_a_small_calibration_error() -> None:
    """Differences with Bradley-Terry outcomes: with 2,000 pairs in each bin an error of about .8 * .4 / sqrt(2000) =
    .007 is noise; twice the differences claim too much, half of them too little."""
    random = generator("calibration", 0)
    gap = np.abs(random.normal(scale=2.0, size=20_000))
    right = random.random(20_000) < 1 / (1 + np.exp(-gap))
    differences = np.where(right, gap, -gap)
    assert calibration_error(differences) < 0.015
    assert calibration_error(2 * differences) > 0.06
    assert calibration_error(0.5 * differences) > 0.06
    assert [b.count for b in calibration_bins(differences)] == pytest.approx([2000] * 10, abs=1)


def test_bins_hold_equal_counts_and_equal_confidences_stay_together() -> None:
    assert [b.count for b in calibration_bins([0.5, -4.0, 3.0, 1.0], num_bins=2)] == [2, 2]
    assert [b.count for b in calibration_bins([1.0, -1.0, 1.0, 1.0, 2.0, 3.0], num_bins=3)] == [4, 2]


def test_confidence_that_is_always_right_is_still_short_of_certainty() -> None:
    """All pairs ordered correctly at d = 1: confidence .731059, accuracy 1, error .268941. Half of them wrong:
    .231059."""
    assert calibration_error([1.0] * 8) == pytest.approx(0.268941, abs=1e-6)
    assert calibration_error([1.0, -1.0] * 8) == pytest.approx(0.231059, abs=1e-6)


def test_a_model_that_cannot_tell_is_calibrated() -> None:
    assert calibration_error([0.0] * 5) == 0.0


@quick
@given(differences=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=60), data=st.data())
def test_calibration_is_that_of_both_readings_of_each_pair_in_any_order(
    differences: list[float], data: st.DataObject
) -> None:
    """The oracle bins nothing: it groups by equal confidence, which 300 bins do as well with so few distinct values."""
    error = calibration_error(data.draw(st.permutations(differences)), num_bins=300)
    readings = [(d, 1.0) for d in differences] + [(-d, 0.0) for d in differences]
    total = 0.0
    for d in {d for d, _ in readings}:
        outcomes = [outcome for other, outcome in readings if other == d]
        total += len(outcomes) / len(readings) * abs(np.mean(outcomes) - 1 / (1 + math.exp(-d)))
    assert error == pytest.approx(total, abs=1e-12)
    assert sum(b.count for b in calibration_bins(differences)) == len(differences)


# ---- correlations -------------------------------------------------------------------------------------------------


def test_pearson_with_fishers_interval() -> None:
    """x = 1..5, y = 1 3 2 5 4: covariance sum 8, variance sums 10 and 10, r = .8; atanh .8 = 1.098612 +- 1.959964 /
    sqrt 2 gives tanh(-.287292) = -.279644 and tanh(2.484516) = .986195."""
    interval = pearson([1, 2, 3, 4, 5], [1, 3, 2, 5, 4])
    assert [interval.value, interval.low, interval.high] == pytest.approx([0.8, -0.279644, 0.986195], abs=1e-5)


@quick
@given(points=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=20))
def test_correlations_stay_between_minus_1_and_1(points: list[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    interval, mirrored = pearson(x, y), pearson(x, [-v for v in y])
    assert -1.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.value == pytest.approx(-mirrored.value, abs=1e-9)


def test_correlations_that_cannot_be_known_are_zero_with_the_widest_interval() -> None:
    assert pearson([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]) == Interval(0.0, -1.0, 1.0, 5)
    assert pearson([1, 2, 3], [1, 2, 3]) == Interval(0.0, -1.0, 1.0, 3)


# ---- the paired test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differences", [[1.0, 2.0, -0.5, 3.0, 1.5, 0.1], [1.0] * 6, [0.3, -0.3, 0.1, -0.1, 0.2, -0.2]])
def test_sign_flips_agree_with_the_enumeration_of_all_signs(differences: list[float]) -> None:
    """Six prompts have 64 equally likely sign patterns. With 20,000 draws the standard error is at most .0036."""
    observed = abs(math.fsum(differences))
    sums = [np.dot(signs, differences) for signs in itertools.product([-1, 1], repeat=6)]
    exact = np.mean(np.abs(sums) >= observed - 1e-9)
    p = sign_flip_p_value(differences, range(6), seed=1, num_draws=20_000)
    assert p == pytest.approx(exact, abs=0.015)


def test_sign_flips_move_whole_prompts() -> None:
    """Twenty equal differences of one prompt are one observation: either sign gives the same size, p = 1."""
    assert sign_flip_p_value([1.0] * 20, [3] * 20, seed=0) == 1.0
    assert sign_flip_p_value([1.0] * 20, range(20), seed=0) < 0.001


def test_sign_flips_reject_a_true_null_as_often_as_they_say() -> None:
    random = generator("null", 0)
    p_values = [sign_flip_p_value(random.normal(size=30), range(30), seed=i, num_draws=400) for i in range(600)]
    assert 0.03 <= np.mean(np.array(p_values) <= 0.05) <= 0.07


def test_sign_flips_are_reproducible_and_never_zero() -> None:
    values = [1.0, -2.0, 4.0]
    assert sign_flip_p_value(values, range(3), seed=4) == sign_flip_p_value(values, range(3), seed=4)
    assert sign_flip_p_value([5.0] * 60, range(60), seed=4, num_draws=999) == 1 / 1000
    assert sign_flip_p_value([0.0, 0.0], range(2), seed=4) == 1.0


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: cluster_interval([], []),
        lambda: win_rate([], []),
        lambda: accuracy_interval(0, 0),
        lambda: calibration_error([]),
        lambda: pearson([], []),
        lambda: sign_flip_p_value([], [], seed=0),
    ],
)
def test_no_data_is_an_error_that_says_so(call: Callable[[], object]) -> None:
    with pytest.raises(DataError, match="found none"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: cluster_interval([1.0, 2.0], [1]),
        lambda: cluster_interval([1.0, math.nan], [1, 2]),
        lambda: cluster_interval([[1.0]], [1]),
        lambda: win_rate([1.5], [1]),
        lambda: accuracy_interval(3, 2),
        lambda: paired_difference([1.0, 2.0], [1.0], [1, 2]),
        lambda: pearson([1.0, 2.0], [1.0]),
    ],
)
def test_values_that_do_not_fit_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"expected|must lie"):
        call()
