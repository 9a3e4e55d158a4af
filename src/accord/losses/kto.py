"""Losses of completions that were judged one by one, desirable or not: KTO and BCO.

Both compare the implicit reward beta log(policy / reference) with a point that the caller carries: KTO with an estimate
of the KL, BCO with a running mean of rewards. Log-probabilities are sums over a completion's tokens
(`sequence_logprobs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from accord.losses.masked import Count, full_precision, masked_mean, masked_sum, require_same_shape

__all__ = ["UnpairedLoss", "bco_loss", "class_weights", "kto_loss", "kto_reference_point"]


@dataclass(frozen=True, slots=True)
class UnpairedLoss:
    """loss () to differentiate, and of this call, detached:

    loss_sum               sum over completions of what `loss` averages; / (desirable_count + undesirable_count)
    correct_sum            desirable completions whose reward lies above the point it is compared with, and undesirable
                           ones below, equal counting half; / (desirable_count + undesirable_count)
    desirable_reward_sum   sum of the implicit rewards of the desirable completions; / desirable_count
    undesirable_reward_sum  likewise; / undesirable_count
    desirable_count, undesirable_count   completions of each kind
    """

    loss: Tensor
    loss_sum: Tensor
    correct_sum: Tensor
    desirable_reward_sum: Tensor
    undesirable_reward_sum: Tensor
    desirable_count: Tensor
    undesirable_count: Tensor


@torch.no_grad()
def kto_reference_point(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference): the mean log-ratio of mismatched pairs, not below 0.

        z0 = max(0, mean(policy_logprobs - ref_logprobs))

    A mismatched pair is a prompt with the completion of ANOTHER prompt. Two traps: of matched pairs the mean is not an
    estimate of anything; and clamping is not linear, so all pairs of the optimizer step belong in one call (gathered
    over micro-batches and ranks), not the mean of several calls.

    Shapes: policy_logprobs, ref_logprobs (N,) float, nats, one a mismatched pair -> (), detached. None at all give 0.
    Raises: ValueError on shapes that differ.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    Tested by: tests/golden/test_golden_kto.py, tests/property/test_losses_preference.py
    """
    log_ratios = _log_ratios(policy_logprobs, ref_logprobs)
    return masked_mean(log_ratios, torch.ones_like(log_ratios, dtype=torch.bool)).clamp_min(0)


def kto_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_completions: Count | None = None,
) -> UnpairedLoss:
    """Kahneman-Tversky optimisation: gains and losses against a reference point, both of them saturating.

        d = beta (log(policy / reference) - reference_point)
        loss = sum(desirable_weight sigmoid(-d) or undesirable_weight sigmoid(d)) / num_completions

    At d = 0 a completion costs half its weight, with gradient -beta / 4 or +beta / 4 times the weight. Far from 0 the
    gradient vanishes on both sides: hopeless examples are ignored.

    Shapes: C completions.
        policy_logprobs  (C,) float, nats   sums over the tokens, requires grad
        ref_logprobs     (C,) float, nats   of the same completions; no gradient passes
        desirable        (C,) bool          True = desirable
        reference_point  () float, nats     `kto_reference_point` of the whole step; no gradient passes
    Args:
        beta: > 0; the paper uses .1.
        desirable_weight, undesirable_weight: `class_weights` balances the two kinds.
        num_completions: completions in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306. Departures: the constant weight of each kind minus its
        value, so that 0 is the best there is.
    Tested by: tests/golden/test_golden_kto.py, tests/property/test_losses_preference.py
    """
    rewards = beta * _log_ratios(policy_logprobs, ref_logprobs)
    distance = _distance(rewards, desirable, beta * reference_point)
    losses = torch.sigmoid(-distance)
    losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    return _record(losses, rewards, distance, desirable, num_completions)


def bco_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    reward_shift: Tensor,
    *,
    beta: float,
    num_completions: Count | None = None,
) -> UnpairedLoss:
    """Binary classifier optimisation: logistic regression of the label on the implicit reward.

        d = beta log(policy / reference) - reward_shift
        loss = sum(-log sigmoid(d) or -log sigmoid(-d)) / num_completions

    for desirable and undesirable completions. At d = 0 it is ln 2, with gradient -beta / 2 or +beta / 2.

    Shapes: C completions.
        policy_logprobs  (C,) float, nats   sums over the tokens, requires grad
        ref_logprobs     (C,) float, nats   of the same completions; no gradient passes
        desirable        (C,) bool          True = desirable
        reward_shift     () float           delta, in units of rewards: a running mean of the implicit rewards of both
                                            kinds, this step's included; no gradient passes
    Args:
        beta: > 0.
        num_completions: completions in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Jung et al. 2024, arXiv:2404.04656. Departures: no weights from a classifier of prompts.
    Tested by: tests/golden/test_golden_kto.py, tests/property/test_losses_preference.py
    """
    rewards = beta * _log_ratios(policy_logprobs, ref_logprobs)
    distance = _distance(rewards, desirable, reward_shift)
    return _record(-logsigmoid(distance), rewards, distance, desirable, num_completions)


def class_weights(num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """(desirable_weight, undesirable_weight) for `kto_loss` that make up for unequal numbers of the two kinds.

        1 <= desirable_weight num_desirable / (undesirable_weight num_undesirable) <= 4/3

    Weights are 1 where that holds already. Otherwise the kind that is short of it is raised, just as far as the nearer
    end of the interval, and the other stays 1.

    Raises: ValueError unless both numbers are positive: no weight makes up for a kind that is missing.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306. Departures: the upper end is also given as 3/2; 4/3
        lies inside both.
    Tested by: tests/golden/test_golden_kto.py
    """
    if num_desirable < 1 or num_undesirable < 1:
        raise ValueError(f"expected desirable and undesirable completions, found {num_desirable} and {num_undesirable}")
    ratio = num_desirable / num_undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio * 3 / 4)


def _log_ratios(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log policy / reference, in the inputs' shape."""
    require_same_shape(policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs)
    return full_precision(policy_logprobs) - full_precision(ref_logprobs.detach())


def _distance(rewards: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
    """(C,) how far each reward (C,) lies on its label's side of the point (): above it where desirable, else below."""
    require_same_shape(completions=rewards, desirable=desirable)
    require_same_shape(point=point, scalar=rewards.new_zeros(()))
    above = rewards - point.detach()
    return torch.where(desirable, above, -above)


def _record(
    losses: Tensor, rewards: Tensor, distance: Tensor, desirable: Tensor, num_completions: Count | None
) -> UnpairedLoss:
    """The record of completions with these losses, implicit rewards and distances, (C,) each."""
    rewards = rewards.detach()
    return UnpairedLoss(
        loss=masked_mean(losses, torch.ones_like(desirable), num_completions),
        loss_sum=losses.detach().sum(),
        correct_sum=(distance > 0).sum() + 0.5 * (distance == 0).sum(),
        desirable_reward_sum=masked_sum(rewards, desirable),
        undesirable_reward_sum=masked_sum(rewards, ~desirable),
        desirable_count=desirable.sum(),
        undesirable_count=(~desirable).sum(),
    )
