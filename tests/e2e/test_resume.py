"""Nothing is lost: a stage killed at any moment and started again ends bit-identical to one that was never killed."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Zygote, outcome, survives_kills, write_recipe

STAGES = ("sft", "reward", "ppo", "rloo")
KILLS = 8


@dataclass(frozen=True)
class Reference:
    """The run that nothing interrupted: its folder, and of each stage what it left and how long a repetition took."""

    zygote: Zygote
    recipe: Path
    root: Path
    outcomes: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def before(self, stage: str, root: Path) -> Path:
        """A new run folder in which the stages before `stage` are finished."""
        for earlier in ("base", *STAGES)[: STAGES.index(stage) + 1] if stage != "sft" else ():
            shutil.copytree(self.root / earlier, root / earlier)
        return root

    def run(self, stage: str, root: Path, *more: str, **kill: Any) -> tuple[int, str, float]:
        return self.zygote.run(stage, str(self.recipe), "--set", f"out={root}", *more, **kill)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp("reference")
    with Zygote() as zygote:
        found = Reference(zygote, write_recipe(folder), folder / "run", {}, {})
        for stage in STAGES:
            code, output, _ = found.run(stage, found.root)
            assert code == 0, output
            found.outcomes[stage] = outcome(found.root / stage)
            # The first time, files and libraries come from the disk: only now is the time typical.
            again = found.before(stage, folder / f"again-{stage}")
            code, output, found.seconds[stage] = found.run(stage, again)
            assert code == 0, output
            assert outcome(again / stage) == found.outcomes[stage]
        yield found


def test_the_stages_of_the_reference_run_trained_something(reference: Reference) -> None:
    """Equality of runs says nothing about runs that do nothing."""
    assert len({reference.outcomes[stage]["weights"] for stage in STAGES}) == len(STAGES)
    for stage, steps in (("sft", 12), ("reward", 12), ("ppo", 9), ("rloo", 9)):
        rows = reference.outcomes[stage]["metrics"]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(row["train/grad_norm"] > 0 and row["train/learning_rate"] > 0 for row in rows)
    assert len({row["train/kl_coef"] for row in reference.outcomes["ppo"]["metrics"]}) > 1
    assert reference.outcomes["ppo"]["samples"].count("\n") >= 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_any_moment_continues_to_the_same_bits(
    stage: str, reference: Reference, tmp_path: Path
) -> None:
    survives_kills(
        stage,
        KILLS,
        seconds=reference.seconds[stage],
        start=lambda folder: reference.before(stage, tmp_path / f"run{folder}"),
        run=lambda root, moment: reference.run(stage, root, after=moment),
        left=lambda root: outcome(root / stage),
        expected=reference.outcomes[stage],
    )


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_stage_with_adapters_continues_to_the_same_bits(stage: str, reference: Reference, tmp_path: Path) -> None:
    """Checkpoints hold the adapters alone; what they stand beside is read from the starting model again."""
    adapter = ("--set", "model.adapter.rank=4")
    whole = reference.before(stage, tmp_path / "whole")
    code, output, seconds = reference.run(stage, whole, *adapter)
    assert code == 0, output
    assert outcome(whole / stage)["weights"] != reference.outcomes[stage]["weights"]

    def left(root: Path) -> tuple[dict[str, Any], bytes]:
        return outcome(root / stage), (root / stage / "adapter" / "adapter_model.safetensors").read_bytes()

    survives_kills(
        f"{stage} with adapters",
        3,
        seconds=seconds,
        start=lambda folder: reference.before(stage, tmp_path / f"run{folder}"),
        run=lambda root, moment: reference.run(stage, root, *adapter, after=moment),
        left=left,
        expected=left(whole),
    )


EVERYTHING_ON = [
    f"ppo.{setting}"
    for setting in (
        "ptx_coef=0.5", "ptx_batch_size=3", "value_warmup=1", "update_kl_stop=0.01", "kl_estimator=k2", "kl_in=loss",
        "sampler_correction=truncated", "target_kl=0.4", "kl_budget=0.45",
    )
]  # fmt: skip


def test_ppo_with_all_that_keeps_what_the_model_knew_continues_to_the_same_bits_and_ends_early(
    reference: Reference, tmp_path: Path
) -> None:
    """Demonstrations are mixed in, updates stop early, and at last the budget of KL ends the stage."""
    options = [word for setting in EVERYTHING_ON for word in ("--set", setting)]
    whole = reference.before("ppo", tmp_path / "whole")
    code, output, seconds = reference.run("ppo", whole, *options)
    assert code == 0, output
    expected = outcome(whole / "ppo")
    rows, total = expected["metrics"], 9
    said = " ".join(output.split())
    assert f"Training stopped at step {len(rows)} of {total}: KL" in said
    assert 3 < len(rows) < total and "train/updates" not in rows[-1]
    assert "train/ptx_loss" not in rows[0] and all(row["train/ptx_loss"] > 0 for row in rows[1:-1])
    assert any(row["train/updates"] < 4 for row in rows[1:-1])
    survives_kills(
        "ppo with everything on",
        3,
        seconds=seconds,
        start=lambda folder: reference.before("ppo", tmp_path / f"run{folder}"),
        run=lambda root, moment: reference.run("ppo", root, *options, after=moment),
        left=lambda root: outcome(root / "ppo"),
        expected=expected,
    )
    code, output, _ = reference.run("ppo", whole, *options)
    assert code == 0 and "already finished" in output
    assert outcome(whole / "ppo") == expected


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_exits_143_and_the_run_continues_from_there(
    stage: str, reference: Reference, tmp_path: Path
) -> None:
    """No checkpoint is due in these runs, so what they continue from is what the signal saved."""
    draw = random.Random(f"terms of {stage}")
    seldom = ("--set", f"{stage}.checkpoint_every=1000")
    seconds = reference.seconds[stage]
    for attempt in range(20):
        root = reference.before(stage, tmp_path / f"run{attempt}")
        moment = seconds * (0.2 + 0.7 * draw.random())
        code, output, _ = reference.run(stage, root, *seldom, after=moment, number=signal.SIGTERM)
        # A signal that comes before the command has looked at its arguments ends the process as it ends any other.
        assert code in (0, 143, -signal.SIGTERM), output
        stopped = re.search(rf"at {stage} step (\d+) of (\d+)", output)
        if code == 143 and stopped and stopped[1] != stopped[2]:
            break
        # Other work on the machine makes runs faster or slower than the measured one.
        seconds *= 0.7 if code == 0 or stopped else 1.4
    else:
        pytest.fail("no signal arrived in the middle of the training")
    assert "the state is saved: run the same command again" in output
    code, output, _ = reference.run(stage, root, *seldom)
    assert code == 0, output
    assert f"continuing {stage} after step {stopped[1]} of" in output
    assert outcome(root / stage) == reference.outcomes[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_result_is_the_same(
    stage: str, reference: Reference, tmp_path: Path
) -> None:
    root = reference.before(stage, tmp_path / "run")
    checkpoints = root / stage / "checkpoints"
    shutil.copytree(reference.root / stage, root / stage)
    for left in ("summary.json", "report.html"):
        (root / stage / left).unlink()
    shutil.rmtree(root / stage / "model")
    newest = sorted(checkpoints.iterdir())[-1]
    largest = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    code, output, _ = reference.run(stage, root)
    assert code == 0, output
    assert f"{newest.name} is damaged" in " ".join(output.split())
    assert f"continuing {stage} after step" in output
    assert outcome(root / stage) == reference.outcomes[stage]


def test_a_finished_run_is_not_repeated(reference: Reference) -> None:
    before = {path: path.read_bytes() for path in reference.root.rglob("*.safetensors")}
    code, output, _ = reference.zygote.run("run", str(reference.recipe), "--set", f"out={reference.root}")
    assert code == 0, output
    assert output.count("already finished") >= len(STAGES)
    assert {path: path.read_bytes() for path in reference.root.rglob("*.safetensors")} == before
