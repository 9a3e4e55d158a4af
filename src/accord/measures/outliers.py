"""Points unlike those known before: Mahalanobis distance in the directions in which the known ones vary most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cloud", "chi_square_quantile", "ledoit_wolf", "outlier_fraction"]

Floats = NDArray[np.float64]

MAX_DIMENSIONS = 64
POINTS_PER_DIMENSION = 8  # with fewer the covariance is mostly noise, and ordinary points look far
SHARE_INSIDE = 0.99
_Z_INSIDE = 2.3263478740408408  # the normal quantile of SHARE_INSIDE


@dataclass(frozen=True, slots=True)
class Cloud:
    """Known points, N of H numbers, summarised by their mean and their K most varied directions.

    mean       (H,)
    directions (H, K) whitened: the squared length of (x - mean) @ directions is the squared Mahalanobis distance
    radius     squared distance within which SHARE_INSIDE of a normal cloud lies
    """

    mean: Floats
    directions: Floats
    radius: float

    @classmethod
    def of(cls, points: Floats) -> Cloud | None:
        """None for fewer points than one direction needs, or points that are all the same."""
        count, width = points.shape
        size = min(MAX_DIMENSIONS, width, count // POINTS_PER_DIMENSION)
        if size < 1:
            return None
        mean = points.mean(axis=0)
        _, scales, axes = np.linalg.svd(points - mean, full_matrices=False)
        size = min(size, int((scales > scales[0] * 1e-6).sum())) if scales[0] > 0 else 0
        if size < 1:
            return None
        axes = axes[:size].T
        values, vectors = np.linalg.eigh(ledoit_wolf((points - mean) @ axes))
        return cls(mean, axes @ (vectors / np.sqrt(values)), chi_square_quantile(size))


def outlier_fraction(cloud: Cloud, points: Floats) -> float:
    """Share of `points` (N, H) outside the cloud's radius: about 0.01 for points like those it was made of.

        D^2 = (x - mean)' S^-1 (x - mean) > chi-square quantile of K degrees of freedom at 0.99

    Source: the share of outlying samples as a sign of reward hacking is of Miao et al. 2025, arXiv:2510.13694.
    Departures: the reward model's own last hidden state, not that of an information bottleneck.
    Tested by: tests/unit/test_outliers.py
    """
    distances = np.square((points - cloud.mean) @ cloud.directions).sum(axis=1)
    return float((distances > cloud.radius).mean())


def ledoit_wolf(points: Floats) -> Floats:
    """(K, K) covariance of centred points (N, K), shrunk towards a sphere of the same mean variance.

        S* = (1 - a) S + a m I,   m = tr(S) / K,   a = min(1, b / d),
        d = |S - m I|^2,   b = sum_i |x_i x_i' - S|^2 / N^2        (squared Frobenius norms)

    Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.
    Tested by: tests/unit/test_outliers.py
    """
    count, size = points.shape
    sample = points.T @ points / count
    mean = float(np.trace(sample)) / size
    spread = float(np.square(sample - mean * np.eye(size)).sum())
    # |x x' - S|^2 = |x|^4 - 2 x'Sx + |S|^2
    lengths = np.square(points).sum(axis=1)
    errors = np.square(lengths) - 2 * np.einsum("ij,jk,ik->i", points, sample, points) + np.square(sample).sum()
    share = min(1.0, float(errors.sum()) / count**2 / spread) if spread > 0 else 1.0
    return (1 - share) * sample + share * mean * np.eye(size)


def chi_square_quantile(degrees: int) -> float:
    """The chi-square quantile at SHARE_INSIDE, within 1% of the exact one from two degrees of freedom on.

    Source: Wilson and Hilferty 1931, "The distribution of chi-square". Tested by: tests/unit/test_outliers.py
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + _Z_INSIDE * math.sqrt(spread)) ** 3
