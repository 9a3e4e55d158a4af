"""Numbers with their uncertainty: every interval covers 95% and counts prompts, not samples.

Several values of one prompt (samples, both orders shown to a judge, all pairs of a ranking) are not independent, so the
prompt is the unit: `clusters` names the prompt each value belongs to. Pure numpy.
Left out: any correction for looking at many metrics at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.errors import DataError
from accord.randomness import generator
from accord.records import Interval

__all__ = [
    "CalibrationBin",
    "accuracy_interval",
    "calibration_bins",
    "calibration_error",
    "cluster_interval",
    "paired_difference",
    "pearson",
    "sign_flip_p_value",
    "win_rate",
]

Floats = NDArray[np.float64]
Z95 = NormalDist().inv_cdf(0.975)


def cluster_interval(values: ArrayLike, clusters: Sequence[int]) -> Interval:
    """The mean of all values, with a cluster-robust t interval.

        m = sum(values) / N,   e_g = sum over cluster g of (value - m)
        m +- t(0.975; G - 1) * sqrt(G / (G - 1) * sum_g e_g^2) / N

    values, clusters: (N,) each; G = number of different clusters, the interval's n. Each value weighs the same.
    One cluster says nothing about the spread between prompts: the interval is (-inf, inf). Values that are all equal
    give one of width 0, which for a share would be wrong: see `win_rate`.
    Raises: DataError without values; ValueError on lengths that differ or values that are not finite.
    Source: Liang and Zeger 1986, Biometrika 73(1), for a mean; the factor G / (G - 1) and t quantiles for few clusters.
    Tested by: tests/property/test_statistics.py (coverage by simulation)
    """
    sums, sizes = _cluster_sums(values, clusters)
    return _ratio_interval(sums, sizes)


def win_rate(wins: ArrayLike, clusters: Sequence[int]) -> Interval:
    """Mean of wins (1), ties (0.5) and losses (0), with a cluster-robust interval that stays inside [0, 1].

    The interval is that of `cluster_interval` after adding one prompt of average size that was won and one that was
    lost, then cut to [0, 1]; `value` is the plain mean. The two make it honest near the ends: 300 wins of 300 give a
    lower end of 0.990 and not 1, and 300 ties still leave room for a rare win. They need no knowledge of the share of
    ties or of the correlation within a prompt, and one prompt alone has an interval: everything. For independent wins
    the exact coverage is at least 93% at every true share, above 95% on average, and highest for few prompts.

    wins, clusters: (N,) each, as for `cluster_interval`. Any share of [0, 1] may stand for a value.
    Raises: DataError without values; ValueError on lengths that differ or values outside [0, 1].
    Source: the idea of Agresti and Coull 1998, The American Statistician 52(2), to add successes and failures.
        Departures: prompts instead of trials are added, one of each; t instead of normal quantiles.
    Tested by: tests/property/test_statistics.py (coverage by simulation)
    """
    sums, sizes = _cluster_sums(wins, clusters)
    if np.min(wins) < 0 or np.max(wins) > 1:
        raise ValueError(f"wins must lie in [0, 1], found {np.min(wins)} to {np.max(wins)}")
    size = sizes.mean()
    adjusted = _ratio_interval(np.append(sums, [size, 0.0]), np.append(sizes, [size, size]))
    return Interval(float(sums.sum() / sizes.sum()), max(adjusted.low, 0.0), min(adjusted.high, 1.0), len(sums))


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[int]) -> Interval:
    """Mean of a - b over paired values (two models on the same prompts), with the interval of `cluster_interval`.

    a, b, clusters: (N,) each. Pairing removes what makes a prompt easy or hard for both. Raises as `cluster_interval`.
    """
    left, right = _paired(a, b)
    return cluster_interval(left - right, clusters)


def accuracy_interval(num_correct: float, num_total: int) -> Interval:
    """Share of independent trials that succeeded, with the Wilson score interval.

        (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = num_correct / n,  z = 1.96

    `num_correct` may count ties as a half. Never of width 0, never outside [0, 1]. With several trials per prompt use
    `win_rate`.
    Raises: DataError for no trials; ValueError when num_correct is not in [0, num_total].
    Source: Wilson 1927, JASA 22(158). Tested by: tests/property/test_statistics.py
    """
    if num_total < 1:
        raise DataError("an accuracy needs at least one trial, found none: check that the evaluation data is not empty")
    if not 0 <= num_correct <= num_total:
        raise ValueError(f"num_correct must lie in [0, {num_total}], found {num_correct}")
    w = Z95**2 / num_total

    def lower(p: float) -> float:
        return (p + w / 2 - math.sqrt(p * (1 - p) * w + w * w / 4)) / (1 + w)

    # The upper end by symmetry: it is then exactly 1 when all succeed, as the lower is exactly 0 when none do.
    p = num_correct / num_total
    return Interval(p, lower(p), 1 - lower(1 - p), num_total)


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Pairs of similar confidence: their mean confidence, the share ordered correctly (ties half), how many."""

    confidence: float
    accuracy: float
    count: int


def calibration_bins(differences: ArrayLike, *, num_bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Reliability of Bradley-Terry probabilities, in bins of about equal counts and rising confidence.

    differences: (N,) score(chosen) - score(rejected). Every pair also stands for itself with its sides swapped: the
    outcome would otherwise always be "chosen", and boundless confidence in it would look calibrated. Both readings say
    the same, so each pair enters once, as the confidence sigmoid(|d|) in [0.5, 1] that the higher score is the chosen
    one; at d = 0 it is half right. Equal confidences share a bin, so many of them make fewer bins than asked for.
    Raises: DataError without pairs; ValueError on values that are not finite.
    """
    d = _finite(differences)
    confidence = 0.5 * (1.0 + np.tanh(0.5 * np.abs(d)))
    correct = np.where(d == 0, 0.5, d > 0)
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], method="inverted_cdf"))
    bin_index = np.searchsorted(edges, confidence, side="left")
    return tuple(
        CalibrationBin(float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum()))
        for inside in (bin_index == k for k in np.unique(bin_index))
    )


def calibration_error(differences: ArrayLike, *, num_bins: int = 10) -> float:
    """Expected calibration error of Bradley-Terry probabilities, in [0, 1]; 0 is perfect.

        sum over bins of count / N * |accuracy - confidence|

    Bins, arguments and errors as in `calibration_bins`. Biased upwards: with n pairs in each bin even a perfect model
    shows about 0.8 * sqrt(p (1 - p) / n).
    Source: Naeini et al. 2015, AAAI, with bins of equal mass. Tested by: tests/property/test_statistics.py
    """
    bins = calibration_bins(differences, num_bins=num_bins)
    total = sum(b.count for b in bins)
    return sum(b.count / total * abs(b.accuracy - b.confidence) for b in bins)


def pearson(x: ArrayLike, y: ArrayLike) -> Interval:
    """Linear correlation with Fisher's interval: tanh(atanh(r) +- 1.96 / sqrt(n - 3)).

    x, y: (N,) each, one value per prompt. Fewer than four points, or a constant side, tell nothing: 0 in [-1, 1].
    Raises: DataError without values; ValueError on lengths that differ or values that are not finite.
    Source: Fisher 1915, Biometrika 10(4). Tested by: tests/property/test_statistics.py
    """
    return _correlation(*_paired(x, y), variance_factor=1.0)


def sign_flip_p_value(differences: ArrayLike, clusters: Sequence[int], *, seed: int, num_draws: int = 10_000) -> float:
    """Two-sided p value of "the paired differences are symmetric around 0", by flipping the signs of whole prompts.

        (1 + number of draws with |sum of flipped cluster sums| >= |observed sum|) / (1 + num_draws)

    differences, clusters: (N,) each. Valid for any number of prompts, and never below 1 / (1 + num_draws). All zero
    gives 1. Raises as `cluster_interval`.
    Source: Fisher 1935, The Design of Experiments; the 1 + : Phipson and Smyth 2010, arXiv:1603.05766.
    Tested by: tests/property/test_statistics.py
    """
    sums, _ = _cluster_sums(differences, clusters)
    random = generator("sign-flip", seed)
    # Equal sums may differ in their last bits after another order of additions; they must count as equal.
    threshold = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    exceeded, block = 0, 500
    for start in range(0, num_draws, block):
        signs = random.integers(0, 2, size=(min(block, num_draws - start), len(sums)), dtype=np.int8) * 2.0 - 1.0
        exceeded += int((np.abs(signs @ sums) >= threshold).sum())
    return (1 + exceeded) / (1 + num_draws)


def _finite(values: ArrayLike) -> Floats:
    """(N,) float64, at least one, all finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected one value per row, found an array of shape {array.shape}")
    if not len(array):
        raise DataError("an estimate needs at least one value, found none: check that the evaluation data is not empty")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite values, found {array[~np.isfinite(array)][0]}")
    return array


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Both sides of a pairing, of equal length."""
    left, right = _finite(x), _finite(y)
    if len(left) != len(right):
        raise ValueError(f"expected pairs, found {len(left)} and {len(right)} values")
    return left, right


def _cluster_sums(values: ArrayLike, clusters: Sequence[int]) -> tuple[Floats, Floats]:
    """(G,) sums and (G,) sizes of the values of each cluster."""
    array = _finite(values)
    if len(array) != len(clusters):
        raise ValueError(f"expected one cluster per value, found {len(clusters)} clusters for {len(array)} values")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, weights=array).astype(np.float64), np.bincount(index).astype(np.float64)


def _ratio_interval(sums: Floats, sizes: Floats) -> Interval:
    """sum(sums) / sum(sizes) with its cluster-robust t interval."""
    n, total = len(sums), sizes.sum()
    mean = float(sums.sum() / total)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    residuals = sums - mean * sizes
    half = _t_quantile(n - 1) * float(np.sqrt(n / (n - 1) * (residuals @ residuals)) / total)
    return Interval(mean, mean - half, mean + half, n)


def _t_quantile(df: int) -> float:
    """The 0.975 quantile of Student's t: exact for 1 and 2 degrees of freedom, within 0.2% from 3 on.

    Source: the expansion around the normal quantile, Abramowitz and Stegun 26.7.5.
    """
    if df == 1:
        return math.tan(math.pi * 0.475)
    if df == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (k + 1) for k, term in enumerate(terms))


def _correlation(x: Floats, y: Floats, *, variance_factor: float) -> Interval:
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    if n < 4 or scale == 0:
        return Interval(0.0, -1.0, 1.0, n)
    r = min(max(float(x @ y) / scale, -1.0), 1.0)
    # atanh(1) is infinite; a correlation of 1 up to rounding gives an interval that ends at 1 up to rounding.
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    half = Z95 * math.sqrt(variance_factor / (n - 3))
    return Interval(r, min(math.tanh(z - half), r), max(math.tanh(z + half), r), n)
