"""The methods that share a loop with others, killed at any moment: each carries something of its own across a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import Zygote, outcome, survives_kills, write_recipe

OFFLINE: dict[str, Any] = {
    "batch_size": 4, "epochs": 2, "max_steps": 12, "checkpoint_every": 2, "eval_every": 3, "learning_rate": 3e-3,
}  # fmt: skip
ONLINE: dict[str, Any] = {
    "prompts_per_step": 4, "samples_per_prompt": 3, "episodes": 72, "max_new_tokens": 8, "checkpoint_every": 2,
    "samples_every": 2, "learning_rate": 3e-3,
}  # fmt: skip
# Reference log-probabilities of the first start; BCO's mean reward of the last step; lagged targets; a group's samples.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", OFFLINE),
    "orpo": ("orpo", OFFLINE),
    "kto": ("kto", OFFLINE),
    "bco": ("kto", OFFLINE | {"loss": "bco"}),
    "ilql": ("ilql", OFFLINE | {"sync_every": 3, "target_rate": 0.5}),
    "grpo": ("grpo", ONLINE | {"kl_estimator": "k3", "update_epochs": 2, "minibatches": 2}),
    "reinforce": ("reinforce", ONLINE),
    "online_dpo": ("online_dpo", ONLINE | {"samples_per_prompt": 2}),
    "conversations": ("grpo", ONLINE | {"environment": "support:Asking", "max_turns": 3, "max_new_tokens": 12}),
}
KILLS = 6


@dataclass(frozen=True)
class Start:
    """A run folder in which SFT and the reward model are finished, and the recipe it belongs to."""

    zygote: Zygote
    recipe: Path
    root: Path
    rated: Path

    def copy(self, root: Path) -> Path:
        for stage in ("base", "sft", "reward"):
            shutil.copytree(self.root / stage, root / stage)
        return root

    def run(self, stage: str, root: Path, section: dict[str, Any], **kill: Any) -> tuple[int, str, float]:
        settings = {"out": root} | {f"{stage}.{key}": value for key, value in section.items()}
        if stage == "ilql":
            settings["data.preferences"] = self.rated
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return self.zygote.run(stage.replace("_", "-"), str(self.recipe), *words, **kill)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    folder = tmp_path_factory.mktemp("start")
    rated = folder / "rated.jsonl"
    rows = [{"prompt": f"ask {i}", "completion": f"{('no', 'yes')[i % 2]} {i % 7}", "score": i % 2} for i in range(40)]
    rated.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Zygote() as zygote:
        found = Start(zygote, write_recipe(folder), folder / "run", rated)
        for stage in ("sft", "reward"):
            code, output, _ = found.run(stage, found.root, {"max_steps": 4})
            assert code == 0, output
        yield found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_killed_at_any_moment_continues_to_the_same_bits(method: str, start: Start, tmp_path: Path) -> None:
    stage, section = METHODS[method]
    whole = start.copy(tmp_path / "whole")
    code, output, seconds = start.run(stage, whole, section)
    assert code == 0, output
    expected = outcome(whole / stage)
    # Equality of runs says nothing about runs that do nothing.
    assert len(expected["metrics"]) >= 6 and all(row["train/grad_norm"] > 0 for row in expected["metrics"])
    assert any(row.get("rollout/turns/mean", 2) > 1 for row in expected["metrics"])
    assert expected["weights"] != outcome(start.root / "sft")["weights"]
    shifts = {row["train/bco_reward_shift"] for row in expected["metrics"]} if method == "bco" else {0, 1}
    assert len(shifts) > 1
    survives_kills(
        method,
        KILLS,
        seconds=seconds,
        start=lambda folder: start.copy(tmp_path / f"run{folder}"),
        run=lambda root, moment: start.run(stage, root, section, after=moment),
        left=lambda root: outcome(root / stage),
        expected=expected,
    )
