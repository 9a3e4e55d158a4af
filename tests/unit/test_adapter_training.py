"""Training with adapters: the policy is its own reference, and a checkpoint that holds the adapters is enough."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from accord.config import PPOConfig, RewardConfig, SFTConfig
from accord.data.templates import Template
from accord.methods.offline import OfflineTrainer
from accord.methods.ppo import PPOTrainer
from accord.methods.reward import Comparison, RewardObjective
from accord.methods.rollouts import RolloutModels
from accord.methods.sft import SFTObjective
from accord.models.adapters import add_adapter
from accord.models.load import reward_model_from, value_model_from
from accord.records import Group, Message, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler
from accord.training.loop import Captured, Trainer
from models_support import PAD_ID, tiny_model, token_group, word_tokenizer

STEPS = 3
FAMILIES = ("llama", "gpt2")
TEXTS = [token_group(*texts) for texts in (("abc", "defg"), ("kl", "mn"), ("op", "qrs"), ("tu", "vw"))]


def adapted(model: Any) -> Any:
    add_adapter(model, rank=4, alpha=8, targets=(), seed=0)
    return model


def ppo(kind: str = "llama", *, own_reference: bool = False) -> tuple[PPOTrainer, Any, Any]:
    """A trainer, its policy and its value model. The reference is the policy, or else a model of its own."""
    fields: dict[str, Any] = {
        "prompts_per_step": 2, "samples_per_prompt": 3, "episodes": 6 * STEPS, "max_new_tokens": 6, "minibatches": 2,
        "update_epochs": 2, "learning_rate": 0.02, "value_learning_rate": 0.01, "kl_coef": 0.2, "schedule": "constant",
    }  # fmt: skip
    policy, reward_model = tiny_model(kind, seed=1), reward_model_from(tiny_model(kind, seed=3), 4)
    reference = copy.deepcopy(policy).requires_grad_(False) if own_reference else policy
    value = adapted(value_model_from(reward_model))
    models = RolloutModels(
        policy=adapted(policy),
        reference=reference,
        sampler=NativeSampler(policy, pad_id=PAD_ID),
        template=Template.of(word_tokenizer(), "auto"),
        scorer=FunctionScorer(lambda prompt, completion: float(len(completion) * 5 % 7) - 3, "the test's reward"),
        gold=None,
        layout="shared",
    )
    tokenizer = word_tokenizer()
    groups = [Group((Message("user", text),)) for text in ("w2 w3", "w4 w5 w6 w7", "w8")]
    prompts = [(g, TokenGroup(tuple(tokenizer.encode(g.prompt[0].content)), (), g.prompt_id)) for g in groups]
    return PPOTrainer(models, value, prompts, PPOConfig(**fields), seed=0), policy, value


def offline(stage: str, kind: str) -> tuple[OfflineTrainer[Any], Any]:
    fields: dict[str, Any] = {"learning_rate": 0.01, "batch_size": 2, "epochs": 2, "micro_batch_tokens": 16}
    options: dict[str, Any] = {"layout": "plain", "pad_id": PAD_ID, "seed": 0, "evaluate": dict}
    if stage == "sft":
        model, section = adapted(tiny_model(kind)), SFTConfig(**fields)
        return OfflineTrainer("sft", model, TEXTS, section, section, SFTObjective(), **options), model
    model, config = adapted(reward_model_from(tiny_model(kind), 0)), RewardConfig(**fields)
    items = [Comparison(token_group("ab", f"{a}", f"{b}"), (0, 1)) for a, b in ("cd", "ef", "gh", "ij")]
    return OfflineTrainer("reward", model, items, config, config, RewardObjective(0.1), **options), model


def rows(trainer: Trainer, first: int, last: int) -> list[dict[str, float]]:
    made = [trainer.step(step).metrics for step in range(first, last + 1)]
    return [{k: float(v) for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in made]


def weights(*models: Any) -> list[torch.Tensor]:
    return [tensor.clone() for model in models for tensor in model.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_policy_as_its_own_reference_trains_like_one_with_a_reference_beside_it(kind: str) -> None:
    ours, policy, value = ppo(kind)
    theirs, other_policy, other_value = ppo(kind, own_reference=True)
    start = weights(policy)
    found = rows(ours, 1, STEPS)
    assert found == rows(theirs, 1, STEPS)
    assert equal(weights(policy, value), weights(other_policy, other_value))
    assert not equal(weights(policy), start)
    assert found[0]["rollout/kl_per_token_nats"] == 0.0 != found[1]["rollout/kl_per_token_nats"]


def kept(captured: Captured) -> Captured:
    """As from a file: tensors of their own."""
    return Captured(
        {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in captured.tensors.items()},
        copy.deepcopy(captured.values),
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_ppo_goes_on_from_adapters_and_head_alone(kind: str) -> None:
    old, policy, value = ppo(kind)
    rows(old, 1, 1)
    captured = kept(old.capture())
    first = rows(old, 2, STEPS)
    new, new_policy, new_value = ppo(kind)
    new.restore(captured)
    assert rows(new, 2, STEPS) == first
    assert equal(weights(policy, value), weights(new_policy, new_value))
    assert all(".lora_" in name for name in captured.tensors["policy"])
    assert {name for name in captured.tensors["value"] if ".lora_" not in name} == {"score.weight"}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_training_on_files_goes_on_from_the_adapter_and_the_head_alone(stage: str, kind: str) -> None:
    old, model = offline(stage, kind)
    rows(old, 1, 1)
    captured = kept(old.capture())
    first = rows(old, 2, old.total_steps)
    new, new_model = offline(stage, kind)
    new.restore(captured)
    assert rows(new, 2, old.total_steps) == first
    assert equal(weights(model), weights(new_model))
    others = {name for name in captured.tensors["model"] if ".lora_" not in name}
    assert others == ({"score.weight"} if stage == "reward" else set())


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_moments_are_kept_of_what_trains_alone(stage: str) -> None:
    trainer = ppo()[0] if stage == "ppo" else offline(stage, "llama")[0]
    trainer.step(1)
    captured = trainer.capture()
    models = {"ppo": ("policy", "value")}.get(stage, ("model",))
    for model in models:
        optimiser = captured.tensors["optimiser" if model == "model" else f"{model}_optimiser"]
        assert {name.partition(":")[2] for name in optimiser} == captured.tensors[model].keys()
