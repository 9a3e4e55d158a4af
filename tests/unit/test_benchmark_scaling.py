"""The laws of over-optimisation: known constants are found again, the peak is where the gain is highest, and intervals
cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from accord.randomness import generator
from benchmarks.scaling import Fit, fit, gain_at, resampled_fits

DISTANCES = np.array([0.0, 0.5, 1.0, 2.0, 4.0])


def test_best_of_n_golden() -> None:
    """alpha 2, beta .25: d (2 - .25 d) = 0, .9375, 1.75, 3, 4; the derivative 2 - .5 d is 0 at d = 4."""
    found = fit("best of n", DISTANCES, np.array([9.9, 0.9375, 1.75, 3.0, 4.0]))
    assert (found.alpha, found.beta) == pytest.approx((2.0, 0.25))
    assert found.r_squared == pytest.approx(1.0)
    assert found.peak == pytest.approx(4.0)


def test_reinforcement_learning_golden() -> None:
    """alpha 1, beta .5: d (1 - .5 ln d); at d = 1 the gain is alpha, at d = e^2 it is 0, the peak is at e^(2 - 1)."""
    d = np.array([1.0, math.e, math.e**2])
    found = fit("reinforcement learning", d, np.array([1.0, 0.5 * math.e, 0.0]))
    assert (found.alpha, found.beta) == pytest.approx((1.0, 0.5))
    assert found.peak == pytest.approx(math.e)
    assert gain_at(found, np.array([0.0, 1.0])) == pytest.approx([0.0, 1.0])


def test_a_gain_that_only_rises_has_no_peak() -> None:
    assert fit("best of n", DISTANCES, 2 * DISTANCES + DISTANCES**2).peak is None


def test_one_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="two different"):
        fit("best of n", np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.1]))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """40 noisy data sets of a known law, resampled by points: 95% intervals miss alpha at most 7 times (p < .01 if they
    cover 93%), and at intervals of no width they would always miss."""
    missed = 0
    for seed in range(40):
        noise = generator("scaling-test", seed)
        d = np.linspace(0.2, 3, 60)
        y = gain_at(Fit("best of n", 2.0, 0.4, 1.0), d) + noise.normal(0, 0.3, 60)

        def draw(random: np.random.Generator, d: np.ndarray = d, y: np.ndarray = y) -> tuple[np.ndarray, np.ndarray]:
            rows = random.integers(0, len(d), len(d))
            return d[rows], y[rows]

        low, high = resampled_fits(fit("best of n", d, y), draw, seed=seed, draws=200).alpha_interval or (0.0, 0.0)
        missed += not low <= 2.0 <= high
    assert missed <= 7
