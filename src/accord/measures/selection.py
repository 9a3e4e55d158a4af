"""Choosing among samples of one policy by their score: what rejection sampling keeps, and what the best of n is worth.

Pure numpy. Legend: P prompts, N samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Selection",
    "best_of_n_kl_bound",
    "best_of_n_values",
    "best_of_n_win_ceiling",
    "improvement_quantile",
    "select_best",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen of P x N samples. (P, N) bool each; `kept` is `passed` without repeats of an output."""

    passed: Bools
    kept: Bools

    @property
    def num_dropped(self) -> int:
        """Prompts of which nothing is kept: all their scores are equal, so there is nothing to choose."""
        return int((~self.passed.any(axis=1)).sum())


def improvement_quantile(step: int, steps: int, start: float, end: float) -> float:
    """The quantile of improvement step `step` in 1..steps: evenly from `start` to `end`, both reached.

        start + (end - start) (step - 1) / (steps - 1);   a single step uses `start`

    Source: Gulcehre et al. 2023, arXiv:2308.08998 (rising thresholds). Tested by: tests/golden/test_golden_selection.py
    """
    return start if steps == 1 else start + (end - start) * (step - 1) / (steps - 1)


def select_best(scores: ArrayLike, outputs: Sequence[Sequence[Hashable]], quantile: float) -> Selection:
    """Keep of each prompt's samples those that score at least the quantile, and more than the prompt's worst.

        s_(1) <= ... <= s_(N) the prompt's scores;   threshold = s_(1 + ceil(quantile (N - 1)))
        passed = score >= threshold and score > s_(1);   kept = passed, and the first with its output

    The threshold is one of the scores. It lets pass exactly what an interpolated quantile would, without its rounding.
    Where all scores of a prompt are equal nothing passes; otherwise the best always does.

    Shapes: scores (P, N); outputs P rows of N, equal when they are the same answer to the prompt.
    Args:
        quantile: in [0, 1], of each prompt's own scores.
    Raises: ValueError for scores that are no matrix or not finite, outputs of another shape, a quantile outside [0, 1].
    Source: Gulcehre et al. 2023, arXiv:2308.08998, with a threshold for each prompt instead of one for all.
    Tested by: tests/golden/test_golden_selection.py, tests/property/test_selection_properties.py
    """
    matrix = _matrix(scores)
    if not 0 <= quantile <= 1:
        raise ValueError(f"the quantile is {quantile}; expected a number in [0, 1]")
    if [len(row) for row in outputs] != [matrix.shape[1]] * len(matrix):
        raise ValueError(f"expected {matrix.shape[1]} outputs for each of {len(matrix)} prompts")
    ordered = np.sort(matrix, axis=1)
    # 0.55 * 100 is 55.00000000000001: without the margin its ceiling would be one too many.
    place = math.ceil(quantile * (matrix.shape[1] - 1) - 1e-9)
    passed = (matrix >= ordered[:, place, None]) & (matrix > ordered[:, :1])
    kept = passed.copy()
    for row, texts in zip(kept, outputs, strict=True):
        seen: set[Hashable] = set()
        for index in np.flatnonzero(row).tolist():
            row[index] = texts[index] not in seen
            seen.add(texts[index])
    return Selection(passed, kept)


def best_of_n_values(scores: ArrayLike, values: ArrayLike) -> Floats:
    """The expected value of the best-scoring of n samples, for every n from 1 to N, without bias.

        E_n = sum_i C(i - 1, n - 1) / C(N, n) v_(i),   v_(i) the value of the sample with the i-th lowest score

    That is the mean over all subsets of n of the N samples. Among samples that share the best score each is taken
    equally often. `values` are the scores themselves, or what another judge thinks of the same samples: where that
    one falls as n grows, choosing by the score goes too far.

    Shapes: scores, values (P, N); returns (P, N), column n - 1 for the best of n.
    Raises: ValueError for arrays that are no matrices of one shape, or not finite.
    Source: Nakano et al. 2021, arXiv:2112.09332. Departures: ties.
    Tested by: tests/golden/test_golden_selection.py, tests/property/test_selection_properties.py
    """
    by, of = _matrix(scores), _matrix(values)
    if by.shape != of.shape:
        raise ValueError(f"expected one value per score, found shapes {by.shape} and {of.shape}")
    total = by.shape[1]
    drawn, below = np.arange(total)[:, None], np.arange(total + 1)[None, :]
    # (N, N + 1): the probability that the best of n is among the lowest i, the product of (i - k) / (N - k) over k < n.
    reached = np.cumprod(np.maximum(below - drawn, 0) / (total - drawn), axis=0)
    result = np.empty(by.shape)
    for row, (score, value) in enumerate(zip(by, of, strict=True)):
        _, level, counts = np.unique(score, return_inverse=True, return_counts=True)
        means = np.bincount(level, weights=value) / counts
        ends = np.concatenate([[0], np.cumsum(counts)])
        result[row] = np.diff(reached[:, ends], axis=1) @ means
    return result


def best_of_n_kl_bound(n: int) -> float:
    """An upper bound on KL(best-of-n || the policy sampled from), in nats per answer.

        ln n - (n - 1) / n

    Exact when no two answers score the same (and no answer has a probability to speak of); with ties less is chosen,
    and the true KL is lower. A fair coin of two answers, n = 4: .459 nats against a bound of .636; no n brings it above
    ln 2.

    Raises: ValueError for n < 1.
    Source: Stiennon et al. 2020, arXiv:2009.01325; that it is a bound: Beirami et al. 2024,
        arXiv:2401.01879. Tested by: tests/golden/test_golden_selection.py, tests/property/test_selection_properties.py
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_win_ceiling(n: int) -> float:
    """The highest win rate of best-of-n over one sample of its own policy, by the score it chooses with: n / (n + 1).

    Reached when no two answers score the same: of n + 1 samples the highest is the lone one once in n + 1 times. Ties
    count half and bring it towards 1/2.

    Raises: ValueError for n < 1.
    Source: Beirami et al. 2024, arXiv:2401.01879. Tested by: as `best_of_n_kl_bound`
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    return n / (n + 1)


def _matrix(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"expected a row for each prompt, found an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite values, found {array[~np.isfinite(array)][0]}")
    return array
