"""16-bit reading, loss scaling and recomputed activations: close to float32, or exactly it, with less memory."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.config import RLOOConfig, SFTConfig
from accord.errors import ConfigError, TrainingError
from accord.methods.learners import rloo
from accord.methods.offline import OfflineTrainer
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.sft import SFTObjective
from accord.models import token_scores
from accord.models.layout import collate
from accord.models.load import reward_model_from
from accord.models.precision import precision
from accord.models.recompute import recompute_activations
from accord.models.self_check import check_layouts
from accord.models.sharing import sharing_copy
from accord.models.token_scores import head_scores, score_tokens, score_values
from accord.records import TokenCompletion, TokenGroup
from accord.training.loss_scale import GROW_AFTER, LossScale
from accord.training.optim import Optimiser
from models_support import PAD_ID, tiny_model
from online_support import equal, prompts, rollout_cast, weights

GROUPS = [
    TokenGroup((5 + i, 6, 9), tuple(TokenCompletion(tuple(range(7, 7 + n)), (True,) * n) for n in (3, 6)), i)
    for i in range(4)
]


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def policy_loss(model: Any) -> Tensor:
    scores = score_tokens(model, collate(GROUPS, layout="shared", pad_id=PAD_ID), with_entropy=True)
    assert scores.logprobs.dtype == torch.float32
    assert scores.entropies is not None and scores.entropies.dtype == torch.float32
    return -(scores.logprobs + 0.1 * scores.entropies).sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_in_bfloat16_are_close_and_all_is_kept_in_float32(kind: str) -> None:
    model = tiny_model(kind)
    exact = gradients(model, policy_loss(model))
    with precision("bfloat16"):
        close = gradients(model, policy_loss(model))
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    error = float((close - exact).norm() / exact.norm())
    # bfloat16 rounds a product by up to 2^-9. An error of 0 would mean that it was not used.
    assert 1e-4 < error < 0.05
    assert torch.equal(gradients(model, policy_loss(model)), exact)


def test_the_vocabulary_is_projected_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection is written out, so autocast does not see its backward pass."""
    seen: list[torch.dtype] = []
    inner = token_scores.token_logprobs

    def noted(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        seen.extend((hidden.dtype, weight.dtype))
        return inner(hidden, weight, *rest, **options)

    monkeypatch.setattr(token_scores, "token_logprobs", noted)
    with precision("bfloat16"):
        policy_loss(tiny_model("llama"))
    assert seen == [torch.bfloat16] * 2


def test_scalar_heads_read_in_float32_what_a_16_bit_trunk_says() -> None:
    model = reward_model_from(tiny_model("gpt2"), 1)
    batch = collate(GROUPS, layout="plain", pad_id=PAD_ID)
    for read in (score_values, head_scores):
        exact = read(model, batch)
        with precision("bfloat16"):
            close = read(model, batch)
        assert close.dtype == torch.float32
        assert 0 < float((close - exact).detach().abs().max()) < 0.05 * float(exact.detach().abs().max())


def test_the_start_up_check_knows_how_far_16_bits_round() -> None:
    with precision("bfloat16"):
        assert check_layouts(tiny_model("llama"), GROUPS, PAD_ID).layout == "shared"


def section(**changes: Any) -> SFTConfig:
    return SFTConfig(batch_size=4, learning_rate=0.01, epochs=9, **changes)


def sft(model: Any) -> OfflineTrainer[TokenGroup]:
    return OfflineTrainer(
        "sft", model, GROUPS, section(), section(), SFTObjective(),
        layout="plain", pad_id=PAD_ID, seed=0, evaluate=dict,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_training_in_16_bits_learns_and_continues_to_the_bit(name: str) -> None:
    with precision(name):
        model = tiny_model("llama")
        trainer = sft(model)
        losses = [trainer.step(step).metrics["train/loss"] for step in range(1, 7)]
        assert losses[-1] < losses[0] - 0.5
        first, resumed = tiny_model("llama"), tiny_model("llama")
        before = sft(first)
        for step in (1, 2, 3):
            before.step(step)
        captured = before.capture()
        json.dumps(captured.values)
        after = sft(resumed)
        after.restore(captured)
        for step in (4, 5, 6):
            after.step(step)
        assert equal(weights(resumed), weights(model))


def test_a_rollout_in_16_bits_is_sampled_and_learned_from_alike() -> None:
    config = RLOOConfig(prompts_per_step=3, samples_per_prompt=4, episodes=24, max_new_tokens=6)
    with precision("bfloat16"):
        trainer = OnlineTrainer("rloo", rollout_cast(dtype=torch.float32), prompts(), config, rloo(config), 0)
        metrics = trainer.step(1).metrics
    assert 0 < metrics["rollout/sampler_deviation"] < 0.05
    assert metrics["train/ratio_max_deviation"] < 0.05


# --- loss scaling ----------------------------------------------------------------------------------------------------


class Weight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))


def scaled() -> tuple[Optimiser, Weight]:
    model = Weight()
    with precision("float16"):
        return Optimiser(model, section(max_grad_norm=1e9)), model


def test_the_gradient_that_is_applied_is_the_unscaled_one() -> None:
    optimiser, model = scaled()
    optimiser.backward((model.weight * torch.tensor([[3.0, 4.0]])).sum())
    assert model.weight.grad.tolist() == [[3.0 * 2**16, 4.0 * 2**16]]
    assert optimiser.update(0.1).grad_norm == 5.0


def test_an_overflow_halves_the_scale_and_is_no_sign_of_divergence() -> None:
    optimiser, model = scaled()
    before = model.weight.detach().clone()
    for _ in range(16):
        optimiser.backward((model.weight * 1e38).sum())
        assert not optimiser.update(0.1).applied
    assert torch.equal(model.weight, before)
    assert optimiser.counters()["loss_scale"] == 1
    assert optimiser.skipped == 16
    with pytest.raises(TrainingError, match="not finite"):
        for _ in range(5):
            optimiser.backward((model.weight * torch.inf).sum())
            optimiser.update(0.1)


def test_after_many_good_updates_the_scale_doubles() -> None:
    scale = LossScale()
    assert not any(scale.seen(finite=True) for _ in range(GROW_AFTER - 1))
    assert (scale.scale, scale.good) == (2**16, GROW_AFTER - 1)
    scale.seen(finite=True)
    assert (scale.scale, scale.good) == (2**17, 0)
    assert scale.seen(finite=False)
    assert (scale.scale, scale.good) == (2**16, 0)


# --- activation checkpointing ----------------------------------------------------------------------------------------


def saved_bytes(model: Any) -> tuple[int, Tensor]:
    """What the forward pass keeps for the backward pass, but for the weights, and the gradient."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = score_tokens(model, collate(GROUPS, layout="shared", pad_id=PAD_ID)).logprobs.sum()
    return sum(kept.values()), gradients(model, loss)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "opt"])
def test_recomputed_activations_give_the_same_bits_from_less_memory(kind: str) -> None:
    model = tiny_model(kind)
    whole, expected = saved_bytes(model)
    recompute_activations(model)
    reference = sharing_copy(model)
    less, found = saved_bytes(model)
    assert torch.equal(found, expected)
    assert less < 0.5 * whole
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(
            score_tokens(reference, collate(GROUPS, layout="shared", pad_id=PAD_ID)).logprobs,
            score_tokens(model, collate(GROUPS, layout="shared", pad_id=PAD_ID)).logprobs,
        )


def test_recomputing_is_asked_for_in_the_way_transformers_wants() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_activations(tiny_model("llama"))


def test_a_model_whose_blocks_cannot_be_run_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        recompute_activations(torch.nn.Linear(2, 2))
