"""ILQL on randomwalks from random weights, graded against the exact solution; shuffled returns teach it nothing.

A small model (2 blocks of width 64) takes some seconds of one core; `accord benchmark randomwalks --method ilql` trains
the benchmark's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from accord.config import recipe_from
from accord.demos.randomwalks import walks_tokenizer
from accord.demos.walk_ratings import BETAS, ILQL_SETTINGS, shaped_evaluation
from accord.methods.corpus import Corpus, Part
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.pipeline import run_stages
from accord.randomness import permutation
from accord.records import Completion, Group
from accord.tasks.randomwalks import RandomWalks

WALKS = RandomWalks(1000)


def shuffled(groups: tuple[Group, ...]) -> list[Group]:
    """Every walk with the return of another one."""
    scores = [g.completions[0].score for g in groups]
    order = permutation(len(groups), "shuffled returns")
    return [
        Group(g.prompt, (Completion(g.completions[0].messages, score=scores[i]),))
        for g, i in zip(groups, order, strict=True)
    ]


@dataclass(frozen=True)
class Trained:
    """A finished ilql stage's model folder."""

    folder: Path

    def optimality(self, beta: float) -> float:
        reference, _ = load_policy(self.folder)
        found = shaped_evaluation(self.folder, reference, WALKS, beta=beta, num_samples=2, key=("test", 0))
        return found.optimality


def train(out: Path, groups: list[Group] | tuple[Group, ...]) -> Trained:
    tokenizer = walks_tokenizer()
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    shape = ModelShape(hidden_size=64, layers=2, heads=4, max_positions=64, kind="gpt2")
    start = save_model(build_model(shape, vocab_size=len(tokenizer), seed=0, **ids), tokenizer, out / "start")
    section = ILQL_SETTINGS | {"learning_rate": 2e-3, "checkpoint_every": 1000}
    model, data = {"path": str(start), "template": "raw"}, {"holdout": 0.0, "max_tokens": 16}
    recipe = recipe_from({"model": model, "data": data, "threads": 1, "out": str(out), "ilql": section})
    run_stages(recipe, Corpus(preferences=Part.of(groups, "walks")), ["ilql"], Console(quiet=True))
    return Trained(out / "ilql" / "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("ilql"), WALKS.rated_groups())


@pytest.mark.parametrize("beta", BETAS)
def test_each_beta_reaches_what_exact_ilql_reaches(beta: float, trained: Trained) -> None:
    """.346, .676, .966 and 1: from the behaviour's clone to the shortest paths."""
    exact = WALKS.shaped_optimality(tau=0.8, gamma=0.99, beta=beta)
    found = trained.optimality(beta)
    assert found == pytest.approx(exact, abs=0.06)
    if beta == 0:
        assert found == pytest.approx(0.355, abs=0.05)  # the maximum-likelihood clone of the walks
    if beta >= 4:
        assert found >= 0.9


def test_shuffled_returns_lead_nowhere(tmp_path: Path) -> None:
    """The policy still imitates; following Q makes it no better, and in the end worse."""
    control = train(tmp_path, shuffled(WALKS.rated_groups()))
    assert control.optimality(0.0) == pytest.approx(0.355, abs=0.05)
    assert control.optimality(4.0) < 0.5
