"""The two published laws of over-optimisation, fitted to measured points, with bootstrap intervals.

    d = sqrt(KL(policy || start)),   gain = gold score - gold score at d = 0
    best of n:               gain = d (alpha - beta d)
    reinforcement learning:  gain = d (alpha - beta ln d)

Source: Gao, Schulman and Hilton 2022, arXiv:2210.10760, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from accord.randomness import generator

__all__ = ["Fit", "Law", "fit", "gain_at", "resampled_fits"]

Floats = NDArray[np.float64]
Law = Literal["best of n", "reinforcement learning"]


@dataclass(frozen=True, slots=True)
class Fit:
    """alpha and beta with 95% intervals (None until resampled), and the share of the gain's variance they explain."""

    law: Law
    alpha: float
    beta: float
    r_squared: float
    alpha_interval: tuple[float, float] | None = None
    beta_interval: tuple[float, float] | None = None

    @property
    def peak(self) -> float | None:
        """The distance at which the gain is highest; None when it never falls (beta <= 0).

        best of n: alpha / 2 beta;   reinforcement learning: exp(alpha / beta - 1)
        """
        if self.beta <= 0:
            return None
        ratio = self.alpha / self.beta
        return ratio / 2 if self.law == "best of n" else float(np.exp(min(ratio - 1, 50.0)))


def fit(law: Law, distances: Floats, gains: Floats) -> Fit:
    """Least squares in alpha and beta, which the law is linear in. Points at distance 0 say nothing and are left out.

    distances, gains: (N,) each. Raises: ValueError with fewer than two different positive distances.
    Tested by: tests/unit/test_benchmark_scaling.py
    """
    used = distances > 0
    d, y = distances[used], gains[used]
    if len(np.unique(d)) < 2:
        raise ValueError("two different positive distances are needed to fit alpha and beta")
    columns = _columns(law, d)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = float(((y - columns @ np.array([alpha, beta])) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(law, float(alpha), float(beta), 1 - residual / total if total > 0 else 0.0)


def gain_at(fitted: Fit, distances: Floats) -> Floats:
    """The law's gain at the distances, 0 at 0."""
    safe = np.where(distances > 0, distances, 1.0)
    return np.where(distances > 0, _columns(fitted.law, safe) @ np.array([fitted.alpha, fitted.beta]), 0.0)


def resampled_fits(
    fitted: Fit, draw: Callable[[np.random.Generator], tuple[Floats, Floats]], *, seed: int, draws: int = 1000
) -> Fit:
    """`fitted` with percentile intervals from fits to `draw`'s resampled (distances, gains)."""
    random = generator("scaling", seed)
    found: Sequence[Fit] = [fit(fitted.law, *draw(random)) for _ in range(draws)]
    alphas, betas = np.array([f.alpha for f in found]), np.array([f.beta for f in found])
    return Fit(fitted.law, fitted.alpha, fitted.beta, fitted.r_squared, _middle(alphas), _middle(betas))


def _columns(law: Law, d: Floats) -> Floats:
    return np.stack([d, -d * d if law == "best of n" else -d * np.log(d)], axis=1)


def _middle(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
