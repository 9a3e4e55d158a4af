"""The three PPO terms against values and derivatives worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from accord.losses import entropy_loss, ppo_policy_loss, ppo_value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def double(*rows: float) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 0.5, -0.5, -0.5, 0),
        (1.0, 1.0, -1.0, -1.0, 0),
        (1.0, 1.2 - 1e-9, -1.2, -1.2, 0),
        (1.0, 1.5, -1.2, 0.0, 1),
        (-1.0, 0.5, 0.8, 0.0, 1),
        (-1.0, 0.8 + 1e-9, 0.8, 0.8, 0),
        (-1.0, 1.0, 1.0, 1.0, 0),
        (-1.0, 1.5, 1.5, 1.5, 0),
        (2.0, 1.5, -2.4, 0.0, 1),
    ],
)
def test_policy_loss_of_one_token(advantage: float, ratio: float, loss: float, gradient: float, clipped: int) -> None:
    """max(-A r, -A clip(r, .8, 1.2)). Unclipped, d(-A r)/d log pi = -A r; where the clipped term is larger, 0. Clipping
    only ever takes away the gain: r = .5 with A = 1 and r = 1.5 with A = -1 keep their full gradient."""
    old = double(-1.3)
    new = (old + math.log(ratio)).requires_grad_()
    result = ppo_policy_loss(new, old, double(advantage), ONE, clip_range=0.2)
    result.loss.backward()
    assert new.grad is not None
    assert result.loss.item() == pytest.approx(loss, abs=1e-8)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-8)
    assert result.clipped_count.item() == clipped


def test_policy_metrics_are_sums_over_counted_tokens() -> None:
    """Ratios .5, 1, 3 (and one masked): they sum to 4.5. k3 of KL(old || new) at ratio r is r - 1 - ln r: .193147, 0
    and .901388, sum 1.094535. Half squared log-ratios: .5 (.480453 + 1.206949) = .843701."""
    new = double(math.log(0.5), 0.0, math.log(3), 5.0)
    mask = torch.tensor([[True, True, True, False]])
    result = ppo_policy_loss(new, torch.zeros_like(new), torch.ones_like(new), mask, clip_range=0.2)
    assert result.ratio_sum.item() == pytest.approx(4.5)
    assert result.approx_kl_sum.item() == pytest.approx(1.094535, abs=1e-6)
    assert result.approx_kl_k2_sum.item() == pytest.approx(0.843701, abs=1e-6)
    assert result.clipped_count.item() == 1
    assert result.token_count.item() == 3


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 0.9, 0.02, 0.0, 1),
        (1.0, 2.0, 0.845, 0.0, 1),
        (0.6, 0.9, 0.045, -0.3, 0),
        (0.0, -1.0, 0.845, 0.0, 1),
        (0.0, 0.9, 0.405, -0.9, 0),
    ],
)
def test_value_loss_of_one_token(value: float, target: float, loss: float, gradient: float, clipped: int) -> None:
    """Old value .5, range .2, so v = 1 is clipped to .7 and v = 0 to .3. Half the larger square: (1, .9): (.7 - .9)^2
    / 2 = .02 beats .1^2 / 2; (0, .9): .9^2 / 2 = .405 beats .6^2 / 2 and keeps its derivative v - R = -.9."""
    v = double(value).requires_grad_()
    result = ppo_value_loss(v, double(0.5), double(target), ONE, value_clip_range=0.2)
    result.loss.backward()
    assert v.grad is not None
    assert result.loss.item() == pytest.approx(loss, abs=1e-9)
    assert v.grad.item() == pytest.approx(gradient, abs=1e-9)
    assert result.clipped_count.item() == clipped
    assert result.squared_error_sum.item() == pytest.approx((value - target) ** 2)


def test_an_infinite_value_clip_range_is_half_the_squared_error() -> None:
    """Two tokens with errors 3 and -1: (9 + 1) / 2 / 2 = 2.5, derivatives 3 / 2 and -1 / 2."""
    v = double(4.0, 0.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = ppo_value_loss(v, double(0.0, 0.0), double(1.0, 1.0), mask, value_clip_range=math.inf)
    result.loss.backward()
    assert v.grad is not None
    assert result.loss.item() == pytest.approx(2.5)
    assert v.grad[0].tolist() == pytest.approx([1.5, -0.5])
    assert result.clipped_count.item() == 0


def test_entropy_loss_is_minus_the_mean_over_counted_tokens() -> None:
    """Entropies 1 and 3 count, 100 does not: loss -2, derivative -1/2 each; sum 4."""
    entropies = double(1.0, 100.0, 3.0).requires_grad_()
    result = entropy_loss(entropies, torch.tensor([[True, False, True]]))
    result.loss.backward()
    assert entropies.grad is not None
    assert result.loss.item() == -2.0
    assert entropies.grad[0].tolist() == [-0.5, 0.0, -0.5]
    assert result.entropy_sum.item() == 4.0
    assert result.token_count.item() == 2
