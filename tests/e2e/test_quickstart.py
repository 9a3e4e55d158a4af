"""The quickstart as people run it, and the same run with a reward that says nothing, which must not win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from accord.demos.quickstart import run_quickstart
from accord.methods.context import weights_hash
from accord.tasks.assistant import prompts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    run_quickstart(folder, seed=0, console=Console(quiet=True))
    return folder


def test_each_stage_is_better_than_the_one_before_by_the_hidden_utility(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["win_rates"]) == {"sft_over_base", "ppo_over_sft"}
    for row in summary["win_rates"].values():
        assert row["n"] >= 300
        assert 0.5 < row["low"] < row["value"] < row["high"] <= 1
    assert summary["seconds"] > 0
    for stage in ("sft", "reward", "ppo"):
        assert (finished / stage / "model" / "model.safetensors").is_file()
        assert (finished / stage / "report.html").is_file()
    assert "√KL" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_ratio_is_one_before_the_first_update(finished: Path) -> None:
    first = json.loads((finished / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/ratio_max_deviation"] <= 1e-5


def test_a_constant_reward_does_not_win(finished: Path, tmp_path: Path) -> None:
    """The same SFT model and prompts, a quarter of the steps. All of the reward is constant, the penalty for answers
    without an end too, for that is a reward as well. The value model starts at 0, which is what a reward of 0 is worth,
    so no advantage ever differs from 0: whatever moved the policy would be a signal that leaked in."""
    folder = tmp_path / "constant"
    shutil.copytree(finished / "sft", folder / "sft")
    summary = run_quickstart(
        folder, seed=0, console=Console(quiet=True),
        overrides=["ppo.missing_eos_penalty=0", "ppo.episodes=1024", "evaluate.prompts=100"],
        reward_function=lambda prompt, completion: 0.0,
    )  # fmt: skip
    row = summary["win_rates"]["ppo_over_sft"]
    assert row["low"] <= 0.5 <= row["high"]
    sft, ppo = (weights_hash(folder / stage / "model") for stage in ("sft", "ppo"))
    assert sft == ppo


def test_held_out_prompts_are_asked_nowhere_in_training(finished: Path) -> None:
    asked = (finished / "annotate" / "comparisons.jsonl").read_text(encoding="utf-8")
    assert not any(json.dumps(p.text) in asked for p in prompts(500, 0, "heldout"))
