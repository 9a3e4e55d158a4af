"""Sampling and selection on random walks, against exact values of the pure random-walk policy."""

from __future__ import annotations

import numpy as np
import pytest

from accord.measures.selection import best_of_n_values, select_best
from accord.randomness import generator
from accord.tasks.randomwalks import RandomWalks


@pytest.fixture(scope="module")
def walked() -> tuple[np.ndarray, list[list[str]]]:
    """2,000 walks of the pure random-walk policy from each of the 20 prompts: their optimality, and the walks."""
    walks, draw = RandomWalks(1000), generator("selection of walks")
    steps = {letter: walks.next_letters(letter) for letter in "abcdefghijklmnopqrstu"}
    texts: list[list[str]] = []
    for prompt in walks.prompts:
        rows = []
        for uniforms in draw.random((2000, 9)):
            walk = prompt
            for u in uniforms:
                walk += steps[walk[-1]][int(u * len(steps[walk[-1]]))]
            rows.append(walk)
        texts.append(rows)
    return np.array([[walks.optimality(walk) for walk in rows] for rows in texts]), texts


@pytest.mark.parametrize(("quantile", "expected"), [(0.7, 0.8263), (0.9, 0.9791), (0.95, 0.9856)])
def test_what_is_kept_of_random_walks_is_as_good_as_the_enumerated_policy_says(
    walked: tuple[np.ndarray, list[list[str]]], quantile: float, expected: float
) -> None:
    """Mean over prompts of the mean optimality of what passes, against its limit for infinitely many walks.

    The spread among what passes is at most .3 within a prompt and at least 100 walks pass, so the standard error over
    20 prompts is below .3 / sqrt(20 * 100) = .007. All walks together score .3462.
    """
    scores, texts = walked
    passed = select_best(scores, texts, quantile).passed
    means = [row[chosen].mean() for row, chosen in zip(scores, passed, strict=True)]
    assert np.mean(means) == pytest.approx(expected, abs=0.015)
    assert scores.mean() == pytest.approx(0.3462, abs=0.015)


@pytest.mark.parametrize(("n", "expected"), [(4, 0.7527), (16, 0.9671), (32, 0.9904), (64, 0.9974)])
def test_the_best_of_n_random_walks_is_as_good_as_the_enumerated_policy_says(
    walked: tuple[np.ndarray, list[list[str]]], n: int, expected: float
) -> None:
    """From 2,000 samples a prompt. The standard error for n = 4 is about .35 sqrt(4 / 40,000) = .0035; it falls with
    n, as nearly all of the best are shortest paths."""
    scores, _ = walked
    assert best_of_n_values(scores, scores)[:, n - 1].mean() == pytest.approx(expected, abs=0.012)
