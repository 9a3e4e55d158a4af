"""Rejection sampling and best-of-n against numbers worked out by hand, by enumeration, or in closed form."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from accord.measures.selection import (
    best_of_n_kl_bound,
    best_of_n_values,
    best_of_n_win_ceiling,
    improvement_quantile,
    select_best,
)
from accord.randomness import generator

# --- best of n -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, 0.0), (2, 0.1931), (4, 0.6363), (8, 1.2044), (16, 1.8351), (32, 2.4970), (64, 3.1745), (128, 3.8598),
        (256, 4.5491), (1024, 5.9324), (60000, 10.0021),
    ],
)  # fmt: skip
def test_the_kl_bound_is_log_n_less_n_minus_one_over_n(n: int, expected: float) -> None:
    assert round(best_of_n_kl_bound(n), 4) == expected


def test_with_two_answers_the_true_kl_is_below_the_bound() -> None:
    """A fair coin, heads scores higher, best of 4: tails only if all four are, so (15/16, 1/16) against (1/2, 1/2):
    15/16 ln(15/8) + 1/16 ln(1/8) = .459356, and the bound is ln 4 - 3/4 = .636294."""
    true = 15 / 16 * math.log(15 / 8) + 1 / 16 * math.log(1 / 8)
    assert true == pytest.approx(0.459356, abs=1e-6)
    assert best_of_n_kl_bound(4) == pytest.approx(0.636294, abs=1e-6)
    assert true < best_of_n_kl_bound(4) < math.log(2)


@pytest.mark.parametrize(("n", "ceiling"), [(1, 1 / 2), (4, 4 / 5), (16, 16 / 17), (1024, 1024 / 1025)])
def test_the_win_rate_ceiling_is_n_in_n_plus_one(n: int, ceiling: float) -> None:
    assert best_of_n_win_ceiling(n) == pytest.approx(ceiling, abs=1e-12)


@pytest.mark.parametrize("function", [best_of_n_kl_bound, best_of_n_win_ceiling])
def test_the_best_of_none_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        function(0)


def test_the_expected_gold_of_the_proxys_best_of_n() -> None:
    """Five samples, proxy [.1, .4, .35, .8, .9], gold [1, 2, 3, 4, 0]; in the proxy's order gold is 1, 3, 2, 4, 0.

    n = 1: the mean, 10/5. n = 2: weights C(i-1, 1)/10 = 0, .1, .2, .3, .4: .3 + .4 + 1.2 = 1.9.
    n = 3: C(i-1, 2)/10 = 0, 0, .1, .3, .6: .2 + 1.2 = 1.4. n = 4: C(i-1, 3)/5 = .2 and .8 on the last two: .8.
    n = 5: the proxy's best, 0.
    """
    found = best_of_n_values([[0.1, 0.4, 0.35, 0.8, 0.9]], [[1, 2, 3, 4, 0]])
    assert found == pytest.approx(np.array([[2.0, 1.9, 1.4, 0.8, 0.0]]), abs=1e-12)


def test_tied_samples_are_taken_equally_often() -> None:
    """Scores [1, 2, 2], values [0, 6, 12]. n = 2: the subset {2, 3} ties, 9 on average; {1, 2} gives 6, {1, 3} 12: 9.
    n = 3: the two tie, 9. By position alone the last would always win: 10 and 12."""
    assert best_of_n_values([[1, 2, 2]], [[0, 6, 12]]) == pytest.approx(np.array([[6.0, 9.0, 9.0]]), abs=1e-12)


def test_the_estimate_is_the_mean_over_all_subsets() -> None:
    """By enumeration, with ties broken by the mean over the tied; several prompts at once."""
    draw = generator("subsets")
    scores, values = draw.integers(0, 4, size=(3, 7)).astype(float), draw.normal(size=(3, 7))
    found = best_of_n_values(scores, values)
    for score, value, row in zip(scores, values, found, strict=True):
        for n in range(1, 8):
            means = []
            for chosen in map(list, combinations(range(7), n)):
                best = score[chosen].max()
                means.append(value[chosen][score[chosen] == best].mean())
            assert row[n - 1] == pytest.approx(np.mean(means), abs=1e-12)


def test_the_estimate_stays_finite_and_exact_for_many_samples() -> None:
    """Scores 1..N: the expected maximum of n of them is n (N + 1) / (n + 1)."""
    total = 2000
    scores = np.arange(1, total + 1, dtype=float)[None, :]
    ns = np.arange(1, total + 1)
    assert best_of_n_values(scores, scores)[0] == pytest.approx(ns * (total + 1) / (ns + 1), rel=1e-9)


# --- rejection sampling ----------------------------------------------------------------------------------------------


def test_the_quantile_rises_evenly_and_reaches_both_ends() -> None:
    found = [improvement_quantile(step, 4, 0.7, 0.95) for step in range(1, 5)]
    assert found == pytest.approx([0.7, 0.7 + 0.25 / 3, 0.7 + 0.5 / 3, 0.95], abs=1e-12)
    assert improvement_quantile(1, 1, 0.9, 0.95) == 0.9


def kept(scores: list[float], quantile: float, outputs: str = "") -> list[int]:
    """Indices kept of one prompt; outputs are single letters, all different by default."""
    texts = outputs or "abcdefghijklmnop"[: len(scores)]
    return np.flatnonzero(select_best([scores], [texts], quantile).kept[0]).tolist()


def test_what_reaches_the_prompts_own_quantile_is_kept() -> None:
    """Five scores: positions 0, .25, .5, .75, 1. At .7 the threshold is the fourth lowest, at .75 too, at .76 the
    highest. Each prompt has its own threshold."""
    scores = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [kept(scores, q) for q in (0.0, 0.5, 0.7, 0.75, 0.76, 1.0)] == [
        [0, 2, 3, 4], [0, 2, 4], [0, 4], [0, 4], [0], [0],
    ]  # fmt: skip
    both = select_best([scores, [s - 100 for s in reversed(scores)]], ["abcde", "abcde"], 0.7)
    assert both.kept.tolist() == [[True, False, False, False, True], [True, False, False, False, True]]


def test_the_prompts_worst_score_is_never_kept_even_when_it_reaches_the_quantile() -> None:
    """Four of five tie at the bottom: the quantile .5 is the bottom itself, and only what is above it is kept."""
    assert kept([0, 0, 1, 0, 0], 0.5) == [2]


def test_a_prompt_whose_scores_all_tie_is_dropped_and_counted() -> None:
    found = select_best([[2, 2, 2], [1, 2, 3], [0, 0, 0]], ["abc"] * 3, 0.0)
    assert found.kept.tolist() == [[False] * 3, [False, True, True], [False] * 3]
    assert found.num_dropped == 2


def test_repeated_outputs_of_a_prompt_are_kept_once_and_equal_ones_of_two_prompts_twice() -> None:
    found = select_best([[1, 3, 3, 3, 2], [1, 3, 3, 3, 2]], ["axyxz", "xxxxx"], 0.5)
    assert found.passed.tolist() == [[False, True, True, True, False]] * 2
    assert found.kept.tolist() == [[False, True, True, False, False], [False, True, False, False, False]]
    assert found.num_dropped == 0


def test_a_position_that_rounding_pushes_past_a_whole_number_is_that_number() -> None:
    """.55 * 100 is 55.00000000000001 in floating point; of 0..100 the quantile .55 is 55."""
    found = select_best([list(range(101))], [list(range(101))], 0.55)
    assert np.flatnonzero(found.kept[0]).tolist() == list(range(55, 101))


@pytest.mark.parametrize(
    ("scores", "outputs", "quantile", "message"),
    [
        ([[1, 2]], ["ab"], 1.1, "the quantile is 1.1"),
        ([[1, 2]], ["a"], 0.5, "expected 2 outputs for each of 1 prompts"),
        ([[1, math.nan]], ["ab"], 0.5, "expected finite values, found nan"),
        ([1, 2], ["ab"], 0.5, r"found an array of shape \(2,\)"),
        ([], [], 0.5, "expected a row for each prompt"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(scores, outputs, quantile, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        select_best(scores, outputs, quantile)
