"""Outliers of a cloud of points: distances against chi-square, and a covariance that stands few points."""

from __future__ import annotations

import numpy as np
import pytest

from accord.measures.outliers import Cloud, chi_square_quantile, ledoit_wolf, outlier_fraction

DRAW = np.random.default_rng(5)


def test_the_quantile_is_the_textbook_one() -> None:
    """Chi-square at 0.99 from published tables: 9.210 (2), 23.209 (10), 50.892 (30), 93.217 (64)."""
    for degrees, value in {2: 9.210, 10: 23.209, 30: 50.892, 64: 93.217}.items():
        assert chi_square_quantile(degrees) == pytest.approx(value, rel=0.01)


def test_ledoit_wolf_by_hand() -> None:
    """x in (2, 0), (-2, 0), (0, 1), (0, -1): S = diag(2, 1/2), m = 5/4, |S - m I|^2 = 2 (3/4)^2 = 9/8.
    |x x' - S|^2: (4 - 2)^2 + 1/4 = 17/4 twice, 4 + (1 - 1/2)^2 = 17/4 twice; their sum 17 over 4^2 is 17/16.
    a = (17/16) / (9/8) = 17/18, so S* = diag(2/18 + 17/18 5/4, 1/36 + 17/18 5/4)."""
    found = ledoit_wolf(np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]]))
    shared = 17 / 18 * 5 / 4
    np.testing.assert_allclose(found, np.diag([2 / 18 + shared, 0.5 / 18 + shared]), rtol=1e-12)


def test_with_many_points_the_covariance_is_hardly_shrunk() -> None:
    scale = np.array([3.0, 1.0, 0.3])
    found = ledoit_wolf(DRAW.normal(size=(20_000, 3)) * scale)
    np.testing.assert_allclose(np.diag(found), scale**2, rtol=0.05)


@pytest.mark.parametrize("width", (4, 100))
def test_about_one_in_a_hundred_points_of_the_same_kind_is_outside(width: int) -> None:
    mix = DRAW.normal(size=(width, width)) / np.sqrt(width)
    cloud = Cloud.of(DRAW.normal(size=(2000, width)) @ mix + 5)
    assert cloud is not None
    assert 0.004 < outlier_fraction(cloud, DRAW.normal(size=(5000, width)) @ mix + 5) < 0.02


def test_points_of_another_kind_are_outside() -> None:
    cloud = Cloud.of(DRAW.normal(size=(256, 32)))
    assert cloud is not None
    assert outlier_fraction(cloud, DRAW.normal(size=(500, 32)) + 3) > 0.95


def test_few_points_are_described_by_few_directions_and_the_same_point_by_none() -> None:
    few = Cloud.of(DRAW.normal(size=(40, 100)))
    assert few is not None and few.directions.shape == (100, 5)
    assert Cloud.of(DRAW.normal(size=(7, 100))) is None
    assert Cloud.of(np.ones((50, 3))) is None
    flat = Cloud.of(np.outer(DRAW.normal(size=64), np.ones(6)))
    assert flat is not None and flat.directions.shape == (6, 1)
