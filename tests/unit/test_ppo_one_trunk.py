"""PPO with the value head on the policy's trunk: one forward pass, one optimiser, both losses."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ppo_step import Cast, Oracle, section
from torch import nn

from accord.errors import ConfigError
from accord.methods.ppo import PPOTrainer
from accord.models.load import value_head
from models_support import tiny_model
from online_support import equal, measured, prompts, rollout_cast, weights


def one_trunk(**changes: Any) -> Any:
    return section(value_trunk="policy", value_coef=0.4, **changes)


@dataclass
class Made:
    """A trainer whose policy carries a value head that is not zero, so that both losses move the trunk."""

    config: Any
    layout: str = "shared"

    def __post_init__(self) -> None:
        self.cast = rollout_cast(layout=self.layout)
        self.head = value_head(self.cast.policy)
        nn.init.normal_(self.head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
        self.trainer = PPOTrainer(self.cast, self.head, prompts(), self.config, 0)

    def steps(self, *numbers: int) -> list[dict[str, float]]:
        return measured(self.trainer, numbers)

    def oracle(self) -> Oracle:
        value = SimpleNamespace(base_model=self.cast.policy.base_model, score=self.head)
        fields = {name: getattr(self.cast, name) for name in self.cast.__dataclass_fields__}
        return Oracle(copy.deepcopy(Cast(**fields, value=value)), self.config)


def test_one_step_assembles_both_losses_on_one_trunk() -> None:
    """One update on the whole rollout, where the ratio is 1 and nothing is clipped, in float64 from one unpadded row at
    a time: -mean(white A r) - c mean(H) + value_coef mean(0.5 (V - R)^2), differentiated together."""
    config = one_trunk(
        minibatches=1, update_epochs=1, gamma=0.95, gae_lambda=0.8, temperature=1.5, entropy_coef=0.3, max_grad_norm=1e9
    )
    made = Made(config)
    oracle = made.oracle()
    [row] = made.steps(1)

    flat = [a for advantages in oracle.advantages() for a in advantages]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    white = torch.tensor([(a - mean) / std for a in flat], dtype=torch.float64)
    values, new = torch.cat(oracle.values), torch.cat(oracle.logprobs)
    returns = torch.tensor(flat, dtype=torch.float64) + values.detach()
    policy_loss = -(white * (new - new.detach()).exp()).mean()
    value_loss = (0.5 * (values - returns) ** 2).mean()
    (policy_loss - 0.3 * torch.cat(oracle.entropies).mean() + 0.4 * value_loss).backward()
    trained = [*oracle.made.policy.parameters(), oracle.made.value.score.weight]
    assert row["train/value_loss"] == pytest.approx(float(value_loss.detach()), rel=1e-6)
    assert row["train/policy_loss"] == pytest.approx(float(policy_loss.detach()), abs=1e-6)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
    assert row["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert "train/value_learning_rate" not in row


def test_the_value_loss_reaches_the_trunk_by_its_weight() -> None:
    """With value_coef tiny the policy moves as with a value model that leaves it alone; with 0.4 it does not."""
    moved = [Made(section(value_trunk="policy", value_coef=coef)) for coef in (1e-12, 2e-12, 0.4)]
    for made in moved:
        made.steps(1)
    tiny, twice, real = (weights(made.cast.policy) for made in moved)
    for name in tiny:
        torch.testing.assert_close(tiny[name], twice[name], rtol=0, atol=1e-7)
    assert any((tiny[name] - real[name]).abs().max() > 1e-3 for name in tiny)


def test_neither_micro_batches_nor_layout_change_a_step() -> None:
    runs = []
    for layout, budget in (("plain", 10_000), ("plain", 16), ("shared", 64)):
        made = Made(one_trunk(micro_batch_tokens=budget), layout=layout)
        rows = made.steps(1, 2)
        runs.append((weights(made.cast.policy) | {"head": made.head.weight.detach().clone()}, rows))
    for after, rows in runs[1:]:
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, runs[0][0][name], rtol=0, atol=1e-7)
        for row, other in zip(rows, runs[0][1], strict=True):
            assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_in_the_warm_up_the_head_alone_learns() -> None:
    made = Made(one_trunk(value_warmup=1))
    before, head = weights(made.cast.policy), made.head.weight.detach().clone()
    [row] = made.steps(1)
    assert equal(before, weights(made.cast.policy)) and not torch.equal(head, made.head.weight)
    assert row["train/value_grad_norm"] > 0 and "train/policy_loss" not in row
    [row] = made.steps(2)
    assert row["train/grad_norm"] > 0 and not equal(before, weights(made.cast.policy))


def test_a_restored_trainer_goes_on_to_the_same_bits() -> None:
    whole, first, second = (Made(one_trunk()) for _ in range(3))
    rows = whole.steps(1, 2, 3)
    first.steps(1, 2)
    second.trainer.restore(first.trainer.capture())
    assert second.steps(3) == rows[2:]
    assert equal(weights(whole.cast.policy), weights(second.cast.policy))
    assert torch.equal(whole.head.weight, second.head.weight)


def test_a_fresh_head_says_0_everywhere() -> None:
    policy = tiny_model("llama", dtype=torch.float64)
    head = value_head(policy)
    assert head.weight.dtype == torch.float64 and not head.weight.any() and head.bias is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value_trunk": "own", "value_coef": 0.5}, "`ppo.value_coef` is read only by `ppo.value_trunk` = policy"),
        ({"value_learning_rate": 1e-3}, "`ppo.value_learning_rate` has no place"),
        ({"value_init": "some/folder"}, "`ppo.value_init` = some/folder"),
    ],
)
def test_what_a_head_cannot_have_is_refused(changes: dict[str, Any], said: str, tmp_path: Any) -> None:
    from accord.config import load_recipe

    path = tmp_path / "recipe.yaml"
    fields = {"value_trunk": "policy", "reward_function": "m:f"} | changes
    path.write_text("ppo: {" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert said in str(error.value)
