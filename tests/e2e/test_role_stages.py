"""Whole runs whose roles share weights: what is trained, what is said, and a kill at any moment."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from support import RECIPE, Zygote, outcome, survives_kills, write_pairs, write_recipe

from accord.config import recipe_from
from accord.methods.catalogue import STAGES
from accord.methods.corpus import read_corpus
from accord.models.load import load_policy
from accord.pipeline import STAGES as RUN
from accord.pipeline import run_stages

TRAINED = [stage for stage in RUN if STAGES[stage].trained]
KILLS = 1
FEW = {"max_steps": 2, "batch_size": 4, "learning_rate": 3e-3}
FEW_SAMPLES = {"episodes": 16, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8, "minibatches": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    **{stage: FEW for stage in ("sft", "reward", "dpo", "orpo", "kto", "ilql")},
    **{s: FEW_SAMPLES | {"learning_rate": 3e-3} for s in ("ppo", "rloo", "grpo", "reinforce", "online_dpo")},
    "rft": {"prompts_per_cycle": 8, "cycles": 1, "improve_steps": 1, "max_new_tokens": 8, "learning_rate": 3e-3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run of every stage that trains, its top block alone, and what it printed."""
    folder = tmp_path_factory.mktemp("blocks")
    tree = RECIPE | {
        "model": RECIPE["model"] | {"trainable_blocks": 1},
        "data": RECIPE["data"] | {"preferences": str(write_pairs(folder / "pairs.jsonl"))},
        "out": str(folder / "run"),
    }
    recipe = recipe_from(tree | SECTIONS)
    screen, before = io.StringIO(), torch.get_num_threads()
    run_stages(recipe, read_corpus(recipe.data), TRAINED, Console(file=screen, width=200), {})
    torch.set_num_threads(before)
    yield folder / "run", screen.getvalue()


@pytest.mark.parametrize("stage", TRAINED)
def test_the_top_block_is_trained_and_kept_and_everything_below_is_as_it_was(
    stage: str, finished: tuple[Path, str]
) -> None:
    root, _ = finished
    start = "base" if stage == "sft" else "sft"
    before, after = (load_file(root / s / "model" / "model.safetensors") for s in (start, stage))
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    top = {name for name in before if name.startswith("model.layers.1.") or name == "model.norm.weight"}
    assert changed == top | ({"score.weight"} if stage == "reward" else set())
    newest = sorted((root / stage / "checkpoints").iterdir())[-1]
    with safe_open(next(newest.glob("*optimiser*.safetensors")), "pt") as tensors:
        trained = {name.partition(":")[2] for name in tensors.keys()}
    assert {name.removeprefix("policy.") for name in trained if "layers" in name or "norm" in name} == top
    assert not [name for name in trained if "embed" in name or "lm_head" in name]


def test_reward_models_of_the_run_share_the_frozen_part_and_it_is_said(finished: tuple[Path, str]) -> None:
    assert finished[1].count("of its weights with the policy") == 6  # online, and RFT


def test_the_saved_policy_is_a_plain_model(finished: tuple[Path, str]) -> None:
    model, _ = load_policy(finished[0] / "ppo" / "model")
    assert all(p.requires_grad for p in model.parameters())
    assert not (finished[0] / "ppo" / "adapter").exists()


LAYOUTS = {
    "hydra": ({"model.trainable_blocks": 1}, "of its weights with the policy"),
    "lora": ({"model.adapter.rank": 4}, "one trunk for all roles"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ppo_with_shared_roles_survives_kills(layout: str, tmp_path: Path) -> None:
    settings, said = LAYOUTS[layout]
    recipe = write_recipe(tmp_path)
    first = tmp_path / "first"

    def run(stage: str, root: Path, after: float | None = None, **section: Any) -> tuple[int, str, float]:
        every = {"out": root, **settings, **{f"{stage}.{key}": value for key, value in section.items()}}
        words = [word for key, value in every.items() for word in ("--set", f"{key}={value}")]
        return zygote.run(stage, str(recipe), *words, after=after)

    def ppo(root: Path, after: float | None) -> tuple[int, str, float]:
        return run("ppo", root, after, episodes=32)

    def start(folder: int | str) -> Path:
        return shutil.copytree(first, tmp_path / f"run{folder}")

    with Zygote() as zygote:
        for stage in ("sft", "reward"):
            code, output, _ = run(stage, first, max_steps=4)
            assert code == 0, output
        whole = start("whole")
        code, output, seconds = ppo(whole, None)
        assert code == 0 and said in output, output
        expected = outcome(whole / "ppo")
        kls = [row["rollout/kl_per_token_nats"] for row in expected["metrics"]]
        assert kls[0] == 0.0 != kls[-1]
        survives_kills(
            layout, KILLS, seconds=seconds, start=start, run=ppo,
            left=lambda root: outcome(root / "ppo"), expected=expected,
        )  # fmt: skip
