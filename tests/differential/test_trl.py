"""The losses against TRL's, where TRL has the same one. Runs only where `trl` is installed; read against trl 1.16.

TRL computes its losses inside trainer methods, so the methods are called with a stand-in for the trainer that holds
only what the computation reads. PPO itself is gone from TRL; what is left of it there is compared in
test_trl_online.py."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import centring_penalty, pairwise_loss

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
