"""Whole stages with adapters: they learn, and leave a plain model and an adapter that peft reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from support import RECIPE, write_pairs
from transformers import AutoModelForSequenceClassification

from accord.config import OfflineFields, Recipe, recipe_from
from accord.errors import CheckpointError
from accord.methods.catalogue import STAGES
from accord.methods.corpus import read_corpus
from accord.models.load import load_policy
from accord.pipeline import STAGES as RUN
from accord.pipeline import run_stages

RANK = 4
TRAINED = [stage for stage in RUN if STAGES[stage].trained]


@dataclass(frozen=True)
class Run:
    root: Path

    def weights(self, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / stage / "model" / "model.safetensors")


def section_of(stage: str) -> dict[str, Any]:
    """The recipe's own section, or one like SFT's or PPO's, of a few steps."""
    kind = get_args(Recipe.model_fields[stage].annotation)[0]
    if issubclass(kind, OfflineFields):
        return RECIPE.get(stage) or RECIPE["sft"] | {"max_steps": 4}
    if stage in RECIPE:
        return RECIPE[stage]
    few = RECIPE["ppo"] | {"episodes": 16, "prompts_per_cycle": 8, "cycles": 1, "improve_steps": 1}
    return {name: value for name, value in few.items() if name in kind.model_fields}


def run(folder: Path, stages: list[str], adapter: dict[str, Any] | None, **model: Any) -> str:
    """What was printed. The run is in `folder`/run, its data beside it."""
    settings = {
        "model": RECIPE["model"] | {"adapter": adapter} | model,
        "data": RECIPE["data"] | {"preferences": str(folder / "pairs.jsonl")},
        "out": str(folder / "run"),
        "evaluate": {"models": ["base", "sft"], "prompts": 4, "max_new_tokens": 8},
    }
    recipe = recipe_from(RECIPE | settings | {stage: section_of(stage) for stage in TRAINED})
    screen = io.StringIO()
    run_stages(recipe, read_corpus(recipe.data), stages, Console(file=screen, width=200), {})
    return screen.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("adapters")
    write_pairs(folder / "pairs.jsonl")
    before = torch.get_num_threads()
    run(folder, TRAINED, {"rank": RANK, "alpha": 2 * RANK})
    torch.set_num_threads(before)
    yield Run(folder / "run")


def start_of(stage: str) -> str:
    return "base" if stage == "sft" else "sft"


@pytest.mark.parametrize("stage", TRAINED)
def test_what_was_trained_is_of_low_rank_and_everything_else_is_as_it_was(stage: str, finished: Run) -> None:
    before, after = finished.weights(start_of(stage)), finished.weights(stage)
    assert after.keys() - before.keys() == ({"score.weight"} if stage == "reward" else set())
    matrices = [name for name, weight in before.items() if weight.ndim == 2 and name in after]
    changes = {name: (after[name] - before[name]).double() for name in matrices}
    ranks = {name: int(torch.linalg.matrix_rank(change, atol=1e-5)) for name, change in changes.items()}
    assert {rank for name, rank in ranks.items() if "proj" in name} == {RANK}
    assert all(torch.equal(after[name], old) for name, old in before.items() if "proj" not in name and name in after)


@pytest.mark.parametrize("stage", TRAINED)
def test_checkpoints_hold_the_adapters_and_the_heads(stage: str, finished: Run) -> None:
    newest = sorted((finished.root / stage / "checkpoints").iterdir())[-1]
    names: dict[str, set[str]] = {}
    for file in newest.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names[file.stem] = set(tensors.keys())
    found = {name for part, tensors in names.items() if "optimiser" not in part for name in tensors}
    assert any(".lora_" in name for name in found)
    assert not [name for name in found for part in ("base_layer", "embed", "norm", "lm_head") if part in name]
    assert ("score.weight" in found) == (stage in ("reward", "ppo"))


@pytest.mark.parametrize("stage", [stage for stage in TRAINED if STAGES[stage].leaves == "policy"])
def test_peft_on_top_of_the_starting_model_is_the_saved_model(stage: str, finished: Run) -> None:
    folder = finished.root / stage
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert Path(adapted.peft_config["default"].base_model_name_or_path) == finished.root / start_of(stage) / "model"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (adapted, load_policy(folder / "model")[0])]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_peft_loads_the_reward_models_adapter_with_its_head(finished: Run) -> None:
    """Its two heads were moved after training, so that scores are 0 on average, and the length head was dropped: in the
    adapter as in the model."""
    base, folder = finished.root / "sft" / "model", finished.root / "reward"
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        scores = [m(input_ids=ids).logits for m in (peft.PeftModel.from_pretrained(plain, folder / "adapter"), saved)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_the_stages_learn(finished: Run) -> None:
    rows = {
        stage: [json.loads(line) for line in (finished.root / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in ("sft", "reward", "ppo")
    }
    assert rows["sft"][-1]["eval/loss"] < rows["sft"][2]["eval/loss"]
    assert rows["reward"][-1]["eval/accuracy"] > 0.9
    assert rows["ppo"][0]["rollout/kl_per_token_nats"] == 0.0 != rows["ppo"][1]["rollout/kl_per_token_nats"]
    assert rows["ppo"][-1]["rollout/score/mean"] > rows["ppo"][0]["rollout/score/mean"]


def test_what_trains_nothing_does_not_depend_on_the_adapter_and_what_trains_does(finished: Run) -> None:
    folder = finished.root.parent
    assert run(folder, ["evaluate"], None).count("already finished") == 1, "the base model"
    assert run(folder, ["evaluate"], {"rank": 5}).count("already finished") == 2
    with pytest.raises(CheckpointError, match=r"model\.adapter"):
        run(folder, ["sft"], {"rank": 5})


def test_the_card_says_that_an_adapter_was_trained(finished: Run) -> None:
    card = (finished.root / "ppo" / "model" / "README.md").read_text()
    assert "a low-rank adapter of all linear layers (rank 4, alpha 8)" in card


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_stages_on_a_trunk_in_4_bits_share_it_and_leave_plain_models(tmp_path: Path) -> None:
    """DoRA, a reward model that is an adapter on the policy's weights, and DPO beside it."""
    write_pairs(tmp_path / "pairs.jsonl")
    adapter = {"kind": "dora", "rank": RANK, "ranks": {"down_proj": 2}}
    printed = run(tmp_path, ["sft", "reward", "dpo", "ppo"], adapter, quantise="nf4")
    assert printed.count("one trunk for all roles") == 1
    for stage in ("sft", "dpo", "ppo"):
        model, _ = load_policy(tmp_path / "run" / stage / "model")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    rows = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rollout/kl_per_token_nats"] == 0.0 != rows[1]["rollout/kl_per_token_nats"]
    assert "in 4 bits (nf4)" in (tmp_path / "run" / "dpo" / "model" / "README.md").read_text()
    again = run(tmp_path, ["sft"], adapter, quantise="nf4")
    assert "already finished" in again
    with pytest.raises(CheckpointError, match=r"model\.quantise"):
        run(tmp_path, ["sft"], adapter)
