"""Randomwalks by every method but PPO and ILQL, graded exactly; rewards and labels that mean nothing teach nothing.

A small model (2 blocks of width 64) takes some seconds a method; `accord benchmark randomwalks` trains the benchmark's
own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from accord.demos import randomwalks
from accord.evaluation.exact_walks import WalksEvaluation
from accord.measures.selection import best_of_n_kl_bound
from accord.models.load import ModelShape
from accord.records import content_id
from accord.tasks.randomwalks import RandomWalks

SMALL = ModelShape(hidden_size=64, layers=2, heads=4, max_positions=64, kind="gpt2")
ONLINE = ("rloo", "grpo", "reinforce", "online_dpo")
# The settings of the benchmark, and what a loss needs beside them; two thirds of the episodes, a third or a sixth of
# the epochs.
DPO, ORPO, KTO = (("dpo", "dpo.epochs=1"), ("orpo", "orpo.epochs=2"), ("kto", "kto.epochs=1"))
PAIRED: dict[str, tuple[str, ...]] = {
    **{name: (*DPO, f"dpo.loss={name}") for name in ("conservative", "robust", "hinge", "rdpo", "simpo", "apo_zero")},
    "ipo": (*DPO, "dpo.loss=ipo", "dpo.beta=0.1"),
    # Without a reference the optimum is exp(optimality / beta) alone, and there are many bad walks.
    "cpo": ("dpo", "dpo.epochs=2", "dpo.loss=cpo", "dpo.beta=0.1"),
    # It lowers the better walks too, only less: without imitation the policy would forget how to walk.
    "apo_down": (*DPO, "dpo.loss=apo_down", "dpo.beta=1", "dpo.learning_rate=1e-4", "dpo.sft_coef=1"),
    "orpo": ORPO,
    "kto": KTO,
    "bco": (*KTO, "kto.loss=bco"),
}


def run(folder: Path, method: str, *overrides: str) -> WalksEvaluation:
    """Trained anew in `folder`, from the behaviour clone and the pairs that are there."""
    shutil.rmtree(folder / method, ignore_errors=True)
    if method in ONLINE:
        overrides = (f"{method}.episodes=12800", *overrides)
    result = randomwalks.run_randomwalks(
        method, seed=0, overrides=["sft.learning_rate=2e-3", *overrides], console=Console(quiet=True), out=folder
    )
    assert result.evaluation.reference_optimality == pytest.approx(0.35, abs=0.03)
    return result.evaluation


def left_the_clone_behind(evaluation: WalksEvaluation) -> bool:
    return evaluation.optimality > evaluation.reference_optimality + 0.1


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomwalks, "SHAPE", SMALL)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walks")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise")


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk's reward, and the label of two walks, follow from a number that means nothing, always the same one."""
    monkeypatch.setattr(RandomWalks, "optimality", lambda _, walk: content_id(walk) % 1000 / 999)


@pytest.mark.parametrize("method", ONLINE)
def test_online_methods_reach_the_shortest_paths(method: str, folder: Path) -> None:
    """Random walks have .35. After all of the benchmark's episodes each is above .95."""
    assert 0.9 <= run(folder, method).optimality <= 1


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_with_a_price_on_kl_they_come_near_the_exact_optimum(method: str, folder: Path) -> None:
    evaluation = run(folder, method, f"{method}.kl_coef=0.1")
    assert 0.95 * evaluation.optimum <= evaluation.objective <= evaluation.optimum


def test_dpo_comes_near_the_exact_optimum(folder: Path) -> None:
    """At beta .3 on Bradley-Terry labels its optimum is PPO's at `kl_coef` .3."""
    evaluation = run(folder, "dpo", "dpo.epochs=2")
    assert 0.9 * evaluation.optimum <= evaluation.objective <= evaluation.optimum


@pytest.mark.parametrize("name", PAIRED)
def test_every_other_loss_of_pairs_and_marks_leaves_the_clone_behind(name: str, folder: Path) -> None:
    assert left_the_clone_behind(run(folder, *PAIRED[name]))


def test_rft_comes_near_the_shortest_paths(folder: Path) -> None:
    assert 0.95 <= run(folder, "rft").optimality <= 1


def test_what_rft_first_keeps_is_as_good_as_the_random_walks_best_tenth(folder: Path) -> None:
    """At quantile .9 infinitely many pure random walks have .9791; the clone is near them, and 100 walks a letter give
    a standard error below .01."""
    run(folder, "rft", "rft.cycles=1")
    first = json.loads((folder / "rft" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rollout/kept_score/mean"] == pytest.approx(0.9791, abs=0.03)
    assert first["rollout/dropped_prompts"] == 0


def test_best_of_16_is_where_enumeration_puts_it_and_its_samples_agree(folder: Path) -> None:
    """The pure random walk has .9671; the clone is near it. KL is exact, and below its bound."""
    evaluation = run(folder, "bestofn")
    assert evaluation.optimality == pytest.approx(0.9671, abs=0.02)
    assert 0 < evaluation.kl < best_of_n_kl_bound(16)
    rows = {row["name"]: row for row in json.loads((folder / "bestofn" / "summary.json").read_text())["headline"]}
    for name, exact in (
        ("score of one answer", evaluation.reference_optimality),
        ("score of the best of 16", evaluation.optimality),
    ):
        assert rows[name]["low"] < exact < rows[name]["high"]


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("method", [*ONLINE, "rft"])
def test_rewards_of_noise_lead_nowhere_near_the_shortest_paths(method: str, control: Path) -> None:
    """What each start ends with is one walk or another: the mean over 20 starts stays near that of random walks."""
    assert run(control, method).optimality < 0.6


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("method", [DPO, ORPO, KTO], ids=lambda method: method[0])
def test_labels_of_noise_do_not_leave_the_clone_behind(method: tuple[str, ...], control: Path) -> None:
    assert not left_the_clone_behind(run(control, *method))
