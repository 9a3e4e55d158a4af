"""Randomwalks from nothing, graded exactly: the proof that PPO optimises what it says it does.

A third of the benchmark's default episodes, so that the test takes a minute or two; the objective's share of the
optimum was .985 there.
"""

from __future__ import annotations

import pytest
from rich.console import Console

from accord.demos.randomwalks import WalksResult, run_randomwalks


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> WalksResult:
    return run_randomwalks(
        "ppo",
        seed=0,
        overrides=["ppo.kl_coef=0.1", "ppo.episodes=6400"],
        console=Console(quiet=True),
        out=tmp_path_factory.mktemp("walks"),
    )


def test_sft_clones_the_behaviour(result: WalksResult) -> None:
    """The data's mean optimality is .3515 and the exact random walk's .3462; the band is .35 +- .03."""
    assert result.evaluation.reference_optimality == pytest.approx(0.35, abs=0.03)


def test_ppo_reaches_the_exact_optimum_and_never_exceeds_it(result: WalksResult) -> None:
    evaluation = result.evaluation
    assert 0.95 * evaluation.optimum <= evaluation.objective <= evaluation.optimum
    assert evaluation.reference_optimality < 0.5 < evaluation.optimality


def test_doing_nothing_is_far_from_the_optimum(result: WalksResult) -> None:
    """The negative control: the reference itself has no KL and its own optimality as objective."""
    assert result.evaluation.reference_optimality < 0.5 * result.evaluation.optimum
