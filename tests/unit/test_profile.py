"""`accord profile` on a tiny recipe, and how what was seen becomes a table and a reading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from accord.cli.main import main
from accord.config import RLOOConfig, SFTConfig
from accord.profiling import machine
from accord.profiling.account import Measured, StageProfile, per_iteration, reading, rows_of
from accord.profiling.observer import Work
from accord.profiling.run import rare_phases, tell_idle_tokens

RECIPE = """\
model: {scratch: {hidden_size: 16, layers: 1, heads: 2, vocab_size: 300}}
data: {preferences: pairs.jsonl, holdout: 0.2, max_tokens: 64}
threads: 1
out: runs/tiny
sft: {batch_size: 4, eval_every: 10, checkpoint_every: 20}
dpo: {batch_size: 4}
ppo:
  {reward_function: "test_profile:length", value_init: policy, max_new_tokens: 6, prompts_per_step: 2, minibatches: 2,
   samples_per_prompt: 2}
"""


def length(prompt: str, completion: str) -> float:
    return float(len(completion))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"ask {i}", "chosen": "yes " * (1 + i % 5), "rejected": "no"} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    for name, value in {"SQUARES": (64,), "SECONDS": 0.01, "MEMORY_BYTES": 1 << 16}.items():
        monkeypatch.setattr(machine, name, value)
    return tmp_path


def profiled(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["profile", "recipe.yaml", "--steps", "2", "--warmup", "1", *arguments]) == 0
    written = json.loads((folder / "runs/tiny-profile/profile.json").read_text())
    return {stage["stage"]: stage for stage in written["stages"]}


def row(stage: dict[str, Any], phase: str) -> dict[str, Any]:
    return next(row for row in stage["rows"] if row["phase"] == phase)


def test_every_training_stage_is_measured_and_the_runs_own_folder_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = profiled(folder)
    assert list(stages) == ["sft", "dpo", "ppo"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny-profile"]
    assert [path.name for path in (folder / "runs/tiny-profile").iterdir()] == ["profile.json"]
    assert not (folder / "cache").exists()
    for stage in stages.values():
        assert stage["iterations"] == 2
        assert sum(row["seconds"] for row in stage["rows"]) == pytest.approx(stage["seconds"], rel=1e-9)
        assert sum(row["share"] for row in stage["rows"]) == pytest.approx(1)
        assert row(stage, "backward")["useful"] > row(stage, "forward")["useful"] > 0
        assert row(stage, "optimiser")["bound"] > 0 and row(stage, "data")["seconds"] > 0
    assert stages["sft"]["once"]["data"] > 0 and stages["dpo"]["once"]["reference"] > 0
    names = {row["phase"] for row in stages["ppo"]["rows"]}
    assert {"sampling", "scoring", "reference", "logging", "checkpoint"} <= names and "evaluation" not in names
    # Two models learn from every rollout four times over; the reference reads it once. Sampling reads all of it but the
    # last tokens of its four answers.
    sampled, learned = row(stages["ppo"], "sampling")["tokens"], row(stages["ppo"], "forward")["tokens"]
    reference = row(stages["ppo"], "reference")["tokens"]
    assert learned == pytest.approx(8 * reference) and sampled == pytest.approx(reference - 4)
    said = capsys.readouterr().out
    assert "dpo: an iteration takes" in said and "where" not in said.lower().split("dpo")[0]
    assert "a sample of the data was used" in said and "Updates reach" in said


def test_a_stage_starts_from_the_finished_ones_of_the_run_which_are_only_read(folder: Path) -> None:
    assert main(["sft", "recipe.yaml", "--set", "sft.max_steps=2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/tiny").rglob("*") if path.is_file()}
    stages = profiled(folder, "--stage", "dpo", "--set", "sft.max_steps=2")
    assert list(stages) == ["dpo"] and not any("not finished" in note for note in stages["dpo"]["notes"])
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs/tiny").rglob("*") if path.is_file()} == before
    alone = profiled(folder, "--stage", "dpo", "--set", "out=runs/elsewhere", "--out", "runs/tiny-profile")
    assert any(
        "sft is not finished in the run's folder and was run for one step" in note for note in alone["dpo"]["notes"]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stage", "evaluate"], "--stage evaluate is no stage that trains; expected one of sft,"),
        (["--stage", "ppo", "--set", "ppo=null"], "`ppo` is null in the recipe"),
        (["--set", "sft=null", "--set", "dpo=null", "--set", "ppo=null"], "the recipe trains nothing"),
        (["--out", "runs/tiny/profile"], "lies in the run's own"),
        (
            ["--out", "recipe.yaml"],
            "cannot use recipe.yaml as the profile's folder: File exists. Name another one with --out",
        ),
        (["--out", "/proc/x"], "cannot use /proc/x as the profile's folder: "),
    ],
)
def test_what_cannot_be_profiled_is_said(
    folder: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "recipe.yaml", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_rows_stand_beside_the_machine() -> None:
    """At a peak of 100 operations and 10 bytes a second: forward does 40 operations in 1 s, 40% of the peak, at best in
    0.4 s; the optimiser's 5 bytes take half a second at best."""
    measured = {
        "optimiser": Measured(seconds=1.0, bytes=5),
        "forward": Measured(seconds=1.0, tokens=7, padding=1, useful=40, overhead=10),
        "data": Measured(seconds=0.5),
        "sampling": Measured(seconds=2.5, tokens=3, useful=50),
    }
    rows, update, total = rows_of(measured, peak=100, moved=10)
    assert [row.phase for row in rows] == ["sampling", "forward", "optimiser", "data"]
    assert [row.share for row in rows] == [0.5, 0.2, 0.2, 0.1]
    forward = rows[1]
    assert (forward.rate, forward.of_peak, forward.bound) == (40, pytest.approx(0.4), pytest.approx(0.4))
    assert rows[2].bound == 0.5 and rows[3].bound == 0 and rows[3].rate == 0
    assert (update.seconds, update.tokens, update.overhead) == (2, 7, 10)
    assert update.of_peak == pytest.approx(0.2) and update.bound == pytest.approx(0.9)
    assert (total.seconds, total.useful, total.bound) == (5, 90, pytest.approx(1.4))


def test_the_reading_accounts_for_every_second() -> None:
    measured = {
        "forward": Measured(seconds=6.0, useful=300, overhead=50),
        "data": Measured(seconds=3.5),
        "logging": Measured(seconds=0.5),
    }
    rows, update, total = rows_of(measured, peak=100, moved=10)
    text = reading(StageProfile("sft", 1, 10, 10, 10, rows, update, total, {}, 1, 1, ()), peak=100)
    assert "3 s of the 10 s at this machine's peak: 30.0%" in text
    assert "Of the iteration, 25.0% is arithmetic" in text and "5.0% is what the peak would take for padding" in text
    assert "40.0% is no model arithmetic (data 35.0%, logging 5.0%)" in text
    assert "Updates reach 50% of the peak" in text and text.endswith("no model arithmetic: data.")
    assert sum(map(float, re.findall(r"(?:: |iteration, |; )(\d+\.\d)%", text))) == 100


def test_means_leave_out_what_warms_up_and_spread_what_is_rare() -> None:
    """A checkpoint that took 8 and 4 seconds, one in 3 iterations: 6 / 3 each. A phase that is missing took 0."""
    iterations = [
        {"forward": Measured(100, 100), "checkpoint": Measured(8.0)},
        {"forward": Measured(1, 2, 3, 4, 5, 6), "data": Measured(1.0)},
        {"forward": Measured(3, 4, 5, 6, 7, 8), "checkpoint": Measured(4.0)},
    ]
    assert per_iteration(iterations, 1, {"checkpoint": 1 / 3, "evaluation": 1.0}) == {
        "forward": Measured(2, 3, 4, 5, 6, 7),
        "data": Measured(0.5),
        "checkpoint": Measured(2.0),
    }


def test_what_is_rare_counts_by_how_often_the_recipe_has_it_and_an_evaluation_by_the_whole_of_the_data() -> None:
    sft = SFTConfig.model_validate({"checkpoint_every": 20, "eval_every": 10})
    assert rare_phases(sft, scale=3.0) == {"checkpoint": 1 / 20, "evaluation": 3 / 10}
    assert rare_phases(RLOOConfig.model_validate({"checkpoint_every": 4}), scale=3.0) == {"checkpoint": 1 / 4}


def test_tokens_that_nobody_wanted_are_padding() -> None:
    """Second step: 4 of 8 samples so far, of 3 tokens on average: 4 * (3 - 1) passes were wanted of the 10 that were
    run, so a fifth of their 100 operations was for nothing."""
    works = [{}, {"sampling": Work(tokens=30, decoded=10, padding=1, useful=400, decoded_flops=100)}]
    logged = [
        {"rollout/samples": 4, "rollout/completion_tokens/mean": 5},
        {"rollout/samples": 8, "rollout/completion_tokens/mean": 3},
    ]
    tell_idle_tokens(works, logged)
    sampling = works[1]["sampling"]
    assert (sampling.tokens, sampling.padding) == (28, 3)
    assert (sampling.useful, sampling.overhead) == (380, 20)
