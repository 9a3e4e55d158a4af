"""What must hold for any samples, scores and policies when some are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.measures.selection import best_of_n_kl_bound, best_of_n_values, best_of_n_win_ceiling, select_best
from accord.randomness import permutation

quick = settings(max_examples=50, derandomize=True, deadline=None)
rows = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12)
quantiles = st.floats(0, 1)
policies = st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 3)), min_size=1, max_size=6)


def passed(scores: list[float], quantile: float) -> list[bool]:
    return select_best([scores], [range(len(scores))], quantile).passed[0].tolist()


@quick
@given(rows, quantiles)
def test_the_best_is_kept_and_the_worst_is_not_unless_all_tie(scores: list[float], quantile: float) -> None:
    chosen = passed(scores, quantile)
    for score, taken in zip(scores, chosen, strict=True):
        if score == min(scores):
            assert not taken
        elif score == max(scores):
            assert taken


@quick
@given(rows, quantiles, quantiles)
def test_a_stricter_quantile_keeps_a_subset(scores: list[float], a: float, b: float) -> None:
    lax, strict = passed(scores, min(a, b)), passed(scores, max(a, b))
    assert all(before or not after for before, after in zip(lax, strict, strict=True))


@quick
@given(rows, quantiles, st.floats(0.1, 10), st.integers(-5, 5))
def test_only_the_order_of_the_scores_matters(scores: list[float], quantile: float, scale: float, shift: int) -> None:
    assert passed([scale * math.exp(score) + shift for score in scores], quantile) == passed(scores, quantile)


@quick
@given(rows, quantiles, st.integers(0, 99))
def test_the_order_of_the_samples_does_not_matter(scores: list[float], quantile: float, key: int) -> None:
    order = permutation(len(scores), "selection", key)
    chosen = passed(scores, quantile)
    assert passed([scores[i] for i in order], quantile) == [chosen[i] for i in order]


@quick
@given(st.permutations(range(1, 21)), quantiles)
def test_without_ties_as_much_is_kept_as_lies_above_the_quantile(scores: list[int], quantile: float) -> None:
    """Of N different scores, floor((1 - q)(N - 1)) + 1 lie at or above the quantile; the worst is never among them."""
    expected = min(math.floor((1 - quantile) * 19 + 1e-9) + 1, 19)
    assert sum(passed([float(s) for s in scores], quantile)) == expected


@quick
@given(rows, quantiles, st.integers(1, 4))
def test_of_equal_outputs_one_is_kept(scores: list[float], quantile: float, kinds: int) -> None:
    outputs = [i % kinds for i in range(len(scores))]
    found = select_best([scores], [outputs], quantile)
    of_passed, of_kept = (
        [o for o, taken in zip(outputs, m[0], strict=True) if taken] for m in (found.passed, found.kept)
    )
    assert sorted(of_kept) == sorted(set(of_passed))


@quick
@given(rows)
def test_the_expected_best_score_rises_with_n_from_the_mean_to_the_maximum(scores: list[float]) -> None:
    curve = best_of_n_values([scores], [scores])[0]
    assert (np.diff(curve) >= -1e-12).all()
    assert (curve[0], curve[-1]) == (pytest.approx(np.mean(scores), abs=1e-12), max(scores))


@quick
@given(rows, st.integers(0, 99))
def test_the_curve_does_not_depend_on_the_order_of_the_samples(scores: list[float], key: int) -> None:
    values = [math.sin(17 * i) for i in range(len(scores))]
    order = permutation(len(scores), "curve", key)
    shuffled = best_of_n_values([[scores[i] for i in order]], [[values[i] for i in order]])
    assert shuffled == pytest.approx(best_of_n_values([scores], [values]), abs=1e-12)


@quick
@given(rows)
def test_values_that_are_all_equal_stay_so(scores: list[float]) -> None:
    assert best_of_n_values([scores], [[7.0] * len(scores)]) == pytest.approx(np.full((1, len(scores)), 7.0))


def best_of(policy: list[tuple[float, int]], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of each answer under the policy and under its best of n, by the definition: P(best's score is s) =
    P(all <= s) - P(all < s), shared among the answers of that score as the policy shares it."""
    p = np.array([weight for weight, _ in policy]) / sum(weight for weight, _ in policy)
    scores = np.array([score for _, score in policy])
    upto = np.array([p[scores <= s].sum() for s in scores])
    below = np.array([p[scores < s].sum() for s in scores])
    level = np.array([p[scores == s].sum() for s in scores])
    return p, p / level * (upto**n - below**n), scores


@quick
@given(policies, st.integers(1, 40))
def test_no_policy_has_a_best_of_n_further_away_than_the_bound(policy: list[tuple[float, int]], n: int) -> None:
    p, best, _ = best_of(policy, n)
    assert best.sum() == pytest.approx(1)
    some = best > 0
    assert (best[some] * np.log(best[some] / p[some])).sum() <= best_of_n_kl_bound(n) + 1e-9


@quick
@given(policies, st.integers(1, 40))
def test_no_policy_has_a_best_of_n_that_wins_more_often_than_the_ceiling(
    policy: list[tuple[float, int]], n: int
) -> None:
    p, best, scores = best_of(policy, n)
    wins = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    assert 0.5 - 1e-9 <= best @ wins @ p <= best_of_n_win_ceiling(n) + 1e-9


@pytest.mark.parametrize("n", [2, 5, 17])
def test_many_unlikely_answers_come_near_both_limits(n: int) -> None:
    """1,000 equally likely answers, no two of one score: the bound and the ceiling are tight."""
    p, best, scores = best_of([(1.0, i) for i in range(1000)], n)
    kl = (best[best > 0] * np.log(best[best > 0] / p[best > 0])).sum()
    assert kl == pytest.approx(best_of_n_kl_bound(n), rel=0.02)
    wins = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    assert best @ wins @ p == pytest.approx(best_of_n_win_ceiling(n), rel=0.01)
