"""The three PPO terms against values and derivatives worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from accord.losses import entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.losses.ppo import sampler_weights

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


@pytest.mark.parametrize("value_clip_range", [1.2, math.inf])
def test_values_within_the_clip_range_are_not_counted_for_their_rounding(value_clip_range: float) -> None:
    """In float32 old + (v - old) is not always v, and so the clipped square may be the larger one; none of these values
    is further than 1.1 from the old one."""
    old = torch.linspace(-1, 1, 1000, dtype=torch.float32)[None]
    values, returns = 0.1 * old.flip(1), torch.zeros_like(old)
    mask = torch.ones_like(old, dtype=torch.bool)
    assert ((old + (values - old)).square() > values.square()).any()
    result = ppo_value_loss(values, old, returns, mask, value_clip_range=value_clip_range)
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


# --- a bandit that something else than the policy plays --------------------------------------------------------------

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # the trainer's policy, before the update
Q = torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64)  # what was sampled from
ADVANTAGES = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)


def bandit_gradient(cap: float | None) -> list[float]:
    """Of the expected objective over the samples of Q, by the logits; None = as if the policy had played."""
    logits = P.log().requires_grad_()
    new, old, sampler = torch.log_softmax(logits, 0)[:, None], P.log()[:, None], Q.log()[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    weights = torch.ones(3, 1) if cap is None else sampler_weights(old, sampler, mask, cap=cap)
    advantages = Q[:, None] * weights * ADVANTAGES[:, None]  # each arm as often as it is played
    loss = ppo_policy_loss(new, old, advantages, mask, clip_range=0.2, num_tokens=1).loss
    return torch.autograd.grad(-loss, logits)[0].tolist()


def test_weights_of_what_a_sampler_drew() -> None:
    """p / q = 1.25, 1.5, .5; a cap of 1.4 cuts the second; what is masked weighs nothing."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    for cap, expected in ((2.0, [1.25, 1.5, 0.5]), (1.4, [1.25, 1.4, 0.5])):
        assert sampler_weights(P.log()[None], Q.log()[None], mask, cap=cap)[0].tolist() == pytest.approx(expected)
    masked = sampler_weights(P.log()[None], Q.log()[None], torch.tensor([[True, False, True]]), cap=2.0)
    assert masked[0].tolist() == pytest.approx([1.25, 0, 0.5])


def test_only_the_corrected_gradient_is_that_of_the_policys_own_score() -> None:
    """d/dlogits of sum_a p_a A_a is p (A - E_p[A]), E_p[A] = .5 + .9 - .4 = 1: (0, .6, -.6). Uncorrected it is
    q A - p sum(q A), with q A = (.4, .6, -.8) of sum .2: (.3, .54, -.84). A cap of 1.4 leaves .84 of the second arm's
    .9, sum .94: (.5 - .47, .84 - .282, -.4 - .188)."""
    assert bandit_gradient(2.0) == pytest.approx([0.0, 0.6, -0.6], abs=1e-9)
    assert bandit_gradient(None) == pytest.approx([0.3, 0.54, -0.84], abs=1e-9)
    assert bandit_gradient(1.4) == pytest.approx([0.03, 0.558, -0.588], abs=1e-9)


def test_the_weights_do_not_move_the_ratio_that_is_clipped() -> None:
    """A = 1, w = 2, clip range .2: the loss is -2 r up to r = 1.2 and stays -2.4 beyond."""
    old = double(-1.3)
    for ratio, loss, gradient in ((1.1, -2.2, -2.2), (1.5, -2.4, 0.0)):
        new = (old + math.log(ratio)).requires_grad_()
        weights = sampler_weights(old, old - 5.0, ONE, cap=2.0)
        result = ppo_policy_loss(new, old, weights * double(1.0), ONE, clip_range=0.2)
        assert result.loss.item() == pytest.approx(loss, abs=1e-9)
        assert torch.autograd.grad(result.loss, new)[0].item() == pytest.approx(gradient, abs=1e-9)
