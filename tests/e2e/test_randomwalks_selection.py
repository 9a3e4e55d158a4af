"""Randomwalks from nothing by choosing among samples: RFT near the optimum, best-of-n where enumeration puts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from accord.demos.randomwalks import WalksResult, run_randomwalks
from accord.measures.selection import best_of_n_kl_bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walks")


def result(method: str, folder: Path) -> WalksResult:
    """Both methods start from one behaviour clone, which the first to run trains."""
    return run_randomwalks(method, seed=0, overrides=[], console=Console(quiet=True), out=folder)


def test_rft_comes_near_the_shortest_paths(folder: Path) -> None:
    evaluation = result("rft", folder).evaluation
    assert evaluation.reference_optimality == pytest.approx(0.35, abs=0.03)
    assert 0.95 <= evaluation.optimality <= 1


def test_what_rft_first_keeps_is_as_good_as_the_random_walks_best_tenth(folder: Path) -> None:
    """At quantile .9 infinitely many pure random walks have .9791; the clone is near them, and 100 walks a letter give
    a standard error below .01."""
    result("rft", folder)
    first = json.loads((folder / "rft" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rollout/kept_score/mean"] == pytest.approx(0.9791, abs=0.03)
    assert first["rollout/dropped_prompts"] == 0


def test_best_of_16_is_where_enumeration_puts_it_and_its_samples_agree(folder: Path) -> None:
    """The pure random walk has .9671; the clone is near it. KL is exact, and below its bound."""
    found = result("bestofn", folder)
    evaluation = found.evaluation
    assert evaluation.optimality == pytest.approx(0.9671, abs=0.02)
    assert 0 < evaluation.kl < best_of_n_kl_bound(16)
    rows = {row["name"]: row for row in json.loads((folder / "bestofn" / "summary.json").read_text())["headline"]}
    for name, exact in (
        ("score of one answer", evaluation.reference_optimality),
        ("score of the best of 16", evaluation.optimality),
    ):
        assert rows[name]["low"] < exact < rows[name]["high"]
