"""Rejection sampling and best-of-n killed at any moment end with the same bits, also in the middle of a cycle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Zygote, survives_kills, write_recipe

KILLS = 4
SETTINGS = {
    "rft": {
        "cycles": 2, "improve_steps": 3, "samples_per_prompt": 6, "max_new_tokens": 8, "start_quantile": 0.4,
        "batch_size": 16, "learning_rate": 3e-3, "keep_checkpoints": 9,
    },
    "bestofn": {"n": 64, "max_new_tokens": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run that nothing interrupted: its folder, and of each stage what it left and how long a repetition took."""

    zygote: Zygote
    recipe: Path
    root: Path
    outcomes: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def run(self, stage: str, root: Path, **kill: Any) -> tuple[int, str, float]:
        settings = [f"{stage}.{key}={value}" for key, value in SETTINGS.get(stage, {}).items()]
        pairs = [f"out={root}", "sft.max_steps=4", "reward.max_steps=4", *settings]
        return self.zygote.run(stage, str(self.recipe), *(p for pair in pairs for p in ("--set", pair)), **kill)

    def before(self, root: Path) -> Path:
        """A new run folder in which what the stages need is finished."""
        for earlier in ("base", "sft", "reward"):
            shutil.copytree(self.root / earlier, root / earlier)
        return root


def left(stage: Path) -> dict[str, Any]:
    """All that a finished stage leaves and that must not depend on interruptions: clock times and memory do."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    files = [*stage.glob("model/model.safetensors"), *stage.glob("*.jsonl"), *stage.glob("chunks/*.json")]
    summary = json.loads((stage / "summary.json").read_text())
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows],
        "summary": {k: summary.get(k) for k in ("headline", "warnings", "curves", "side_by_side")},
        **{
            str(file.relative_to(stage)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.name != "metrics.jsonl"
        },
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("finished")
    with Zygote() as zygote:
        found = Finished(zygote, write_recipe(folder), folder / "run", {}, {})
        for stage in ("sft", "reward"):
            code, output, _ = found.run(stage, found.root)
            assert code == 0, output
        for stage in SETTINGS:
            code, output, _ = found.run(stage, found.root)
            assert code == 0, output
            found.outcomes[stage] = left(found.root / stage)
            # The first time, files and libraries come from the disk: only now is the time typical.
            again = found.before(folder / f"again-{stage}")
            code, output, found.seconds[stage] = found.run(stage, again)
            assert code == 0, output
            assert left(again / stage) == found.outcomes[stage]
        yield found


def test_the_uninterrupted_run_did_something(finished: Finished) -> None:
    """Equality of runs says nothing about runs that do nothing."""
    rows = finished.outcomes["rft"]["metrics"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert ["rollout/score/mean" in row for row in rows] == [True, False, False] * 2
    assert len(finished.outcomes["bestofn"]["metrics"]) > 2
    assert {"best.jsonl", "ranked.jsonl", "chunks/000001.json"} <= finished.outcomes["bestofn"].keys()


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_stage_killed_at_any_moment_continues_to_the_same_bits(
    stage: str, finished: Finished, tmp_path: Path
) -> None:
    survives_kills(
        stage,
        KILLS,
        seconds=finished.seconds[stage],
        start=lambda folder: finished.before(tmp_path / f"run{folder}"),
        run=lambda root, moment: finished.run(stage, root, after=moment),
        left=lambda root: left(root / stage),
        expected=finished.outcomes[stage],
    )


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_rejection_sampling_continues_from_every_step_of_a_cycle(stop: int, finished: Finished, tmp_path: Path) -> None:
    """As a kill right after each checkpoint leaves it: steps 1, 2, 4 and 5 lie in the middle of a cycle."""
    root = finished.before(tmp_path / "run")
    stage = root / "rft"
    shutil.copytree(finished.root / "rft", stage)
    for path in sorted((stage / "checkpoints").iterdir())[stop:]:
        shutil.rmtree(path)
    for name in ("summary.json", "report.html"):
        (stage / name).unlink()
    shutil.rmtree(stage / "model")
    code, output, _ = finished.run("rft", root)
    assert code == 0, output
    assert f"continuing rft after step {stop} of 6" in output
    assert left(stage) == finished.outcomes["rft"]
