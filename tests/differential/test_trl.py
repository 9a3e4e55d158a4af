"""The losses against TRL's, where TRL has the same one. Runs only where `trl` is installed; read against trl 1.16.

TRL computes its losses inside trainer methods, so the methods are called with a stand-in for the trainer that holds
only what the computation reads. PPO itself is gone from TRL; its GRPO loss of type "bnpo" is the same clipped
surrogate with a token mean, plus k3 as a loss and the entropy bonus."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import centring_penalty, entropy_loss, kl_k3, masked_mean, pairwise_loss, ppo_policy_loss

pytest.importorskip("trl")

ACCELERATOR = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)


def metrics() -> dict[str, defaultdict[str, list[float]]]:
    return {"eval": defaultdict(list)}


def same_gradient(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(theirs, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centring_coef", [None, 0.01])
def test_reward_loss(with_margin: bool, centring_coef: float | None) -> None:
    from trl import RewardTrainer

    random = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(16, generator=random)).requires_grad_()
    margins = torch.rand(8, generator=random)
    inputs: dict[str, Any] = {"attention_mask": torch.ones(16, 3)} | ({"margin": margins} if with_margin else {})
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring_coef),
        accelerator=ACCELERATOR,
        _metrics=metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)

    chosen, rejected = scores.chunk(2)
    result = pairwise_loss(chosen, rejected, margins=margins if with_margin else None)
    penalty = centring_penalty(scores, torch.arange(8).repeat(2))
    same_gradient(result.loss + (centring_coef or 0.0) * penalty, theirs, [scores])
    logged = trainer._metrics["eval"]
    assert logged["accuracy"] == [pytest.approx((result.correct_sum / result.pair_count).item())]
    assert logged["margin"] == [pytest.approx((result.score_margin_sum / result.pair_count).item(), rel=1e-5)]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_clipped_policy_loss_with_k3_and_entropy(beta: float, entropy_coef: float) -> None:
    from trl import GRPOTrainer

    random = torch.Generator().manual_seed(1)
    old, change, reference, advantages = torch.randn(4, 6, 9, generator=random)
    new = (old + 0.3 * change).requires_grad_()
    entropies = torch.rand(6, 9, generator=random).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 7, 5, 3, 2, 1])[:, None]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropies, None),
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        accelerator=ACCELERATOR,
        _metrics=metrics(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 1, dtype=torch.long),
        "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)

    policy = ppo_policy_loss(new, old, advantages, mask, clip_range=0.2)
    kl = masked_mean(kl_k3(new, reference), mask)
    ours = policy.loss + beta * kl + entropy_coef * entropy_loss(entropies, mask).loss
    same_gradient(ours, theirs, [new, entropies] if entropy_coef else [new])
    logged = trainer._metrics["eval"]
    assert logged["clip_ratio/region_mean"] == [pytest.approx((policy.clipped_count / policy.token_count).item())]
    assert policy.clipped_count > 0
    assert logged["kl"] == ([pytest.approx(kl.item(), rel=1e-5)] if beta else [])
