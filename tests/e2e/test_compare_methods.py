"""`accord compare-methods` with a few steps a stage: what it leaves, and that it repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from accord.demos.compare_methods import run_comparison
from accord.errors import ConfigError

FEW_STEPS = [
    "sft.max_steps=40", "dpo.max_steps=2", "orpo.max_steps=2", "evaluate.prompts=20", "evaluate.max_new_tokens=16",
]  # fmt: skip
METHODS = ("dpo", "orpo")
COMPARED = 300


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    run_comparison(folder, seed=0, console=Console(quiet=True), methods=METHODS, compared=COMPARED, overrides=FEW_STEPS)
    return folder


def test_every_method_has_its_evidence_and_its_price(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    sft, *methods = summary["methods"]
    assert [row["method"] for row in (sft, *methods)] == ["sft", *METHODS]
    assert sft["win_rate"] is None
    for row in methods:
        assert 0 <= row["win_rate"]["low"] <= row["win_rate"]["high"] <= 1 and row["win_rate"]["n"] == 20
    assert all(row["seconds"] > 0 and row["peak_memory_mb"] > 100 and row["gold"]["n"] == 20 for row in (sft, *methods))
    assert sorted(text.split()[0] for text in summary["account"]) == ["dpo", "orpo"]
    assert "What each method made of its distance" in (finished / "report.html").read_text(encoding="utf-8")


def test_as_many_answers_are_compared_as_asked_for(finished: Path) -> None:
    assert f"compared {COMPARED} pairs" in " ".join(
        json.loads((finished / "annotate/summary.json").read_text())["account"]
    )


def test_orpo_says_that_it_took_majorities(finished: Path) -> None:
    """It has no place for soft labels, and the annotators of half of the comparisons do not agree."""
    account = " ".join(json.loads((finished / "orpo" / "summary.json").read_text())["account"])
    assert "the majority of each comparison's annotators is taken as certain" in account


def test_running_it_again_repeats_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}
    costs = json.loads((finished / "summary.json").read_text())["methods"]
    run_comparison(
        finished, seed=0, console=Console(quiet=True), methods=METHODS, compared=COMPARED, overrides=FEW_STEPS
    )
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}
    assert json.loads((finished / "summary.json").read_text())["methods"] == costs


def test_a_method_it_does_not_know_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dop' cannot be compared; expected some of dpo, orpo, kto, ppo, bestofn"):
        run_comparison(tmp_path / "run", seed=0, console=Console(quiet=True), methods=("dop",))
    assert not (tmp_path / "run").exists()
