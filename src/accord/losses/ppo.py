"""The three terms of proximal policy optimisation: clipped policy loss, clipped value loss, entropy.

The whole loss is policy.loss + value_coef * value.loss + entropy_coef * entropy.loss; the caller adds it up. Each
record carries sums and counts of this call, detached: add them over micro-batches, then divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.losses.kl import kl_k2, kl_k3
from accord.losses.masked import Count, counted, masked_mean, masked_sum

__all__ = [
    "EntropyLoss",
    "PolicyLoss",
    "ValueLoss",
    "entropy_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sampler_weights",
]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss () to differentiate, and over the counted tokens of this call, detached:

    clipped_count     tokens where clipping changed the loss; / token_count = clip fraction
    ratio_sum         sum of policy/old probability ratios; the mean is 1 as long as nothing moved
    approx_kl_sum     sum of k3 for KL(old || policy), nats
    approx_kl_k2_sum  sum of half squared log-ratios, nats: exactly 0 only if no log-probability moved at all
    """

    loss: Tensor
    clipped_count: Tensor
    ratio_sum: Tensor
    approx_kl_sum: Tensor
    approx_kl_k2_sum: Tensor
    token_count: Tensor


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """loss () to differentiate, and over the counted tokens of this call, detached: clipped_count (tokens where
    clipping changed the loss), squared_error_sum of (values - returns)^2, token_count."""

    loss: Tensor
    clipped_count: Tensor
    squared_error_sum: Tensor
    token_count: Tensor


@dataclass(frozen=True, slots=True)
class EntropyLoss:
    """loss () = minus the mean entropy, to differentiate; entropy_sum nats and token_count of this call, detached."""

    loss: Tensor
    entropy_sum: Tensor
    token_count: Tensor


def ppo_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_range: float,
    num_tokens: Count | None = None,
) -> PolicyLoss:
    """Clipped-surrogate policy loss, averaged over the tokens that count.

        r = exp(policy_logprobs - old_logprobs)
        loss = sum(mask * max(-A r, -A clip(r, 1 - eps, 1 + eps))) / num_tokens

    Lower is better. At r = 1 the value is -mean(A). Gradient flows through `policy_logprobs` only, and not at all where
    the clipped term is the larger.

    Shapes: C completions, T tokens.
        policy_logprobs  (C, T) float, nats   current policy, requires grad
        old_logprobs     (C, T) float, nats   the policy that wrote the tokens
        advantages       (C, T) float         whitened or not: the caller's choice
        loss_mask        (C, T) bool          True = counts
    Args:
        clip_range: eps, in (0, 1). The paper uses 0.2.
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7. Departures: a masked mean over tokens.
    Tested by: tests/golden/test_golden_ppo.py, tests/property/test_losses.py
    """
    new, old = counted(policy_logprobs, loss_mask), counted(old_logprobs.detach(), loss_mask)
    advantages = counted(advantages.detach(), loss_mask)
    ratio = (new - old).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    new = new.detach()
    return PolicyLoss(
        loss=masked_mean(torch.maximum(unclipped, clipped), loss_mask, num_tokens),
        clipped_count=(loss_mask & (clipped > unclipped)).sum(),
        ratio_sum=masked_sum(ratio.detach(), loss_mask),
        approx_kl_sum=masked_sum(kl_k3(old, new), loss_mask),
        approx_kl_k2_sum=masked_sum(kl_k2(old, new), loss_mask),
        token_count=loss_mask.sum(),
    )


@torch.no_grad()
def sampler_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, loss_mask: Tensor, *, cap: float) -> Tensor:
    """What an action weighs in the policy loss when something else than the trainer's policy drew it.

        w = min(exp(old_logprobs - sampler_logprobs), cap)

    The sampler draws from q, the trainer's policy before its update is p: E_q[p/q f] = E_p[f], so a loss times p/q has
    the gradient it would have on samples of p. The cap bounds the variance; an action it binds on counts too little.
    For tokens it corrects which token is drawn, not how often the tokens before it are: exact for one token, and for
    whole completions if their log-probabilities are given, as one action each.

    The clipped policy loss is proportional to the advantages as long as the factor is not negative, so the advantages
    can carry the weights; they do not move the ratio that is clipped.

    Shapes: C completions, T actions.
        old_logprobs      (C, T) float, nats   of the trainer's policy before the update
        sampler_logprobs  (C, T) float, nats   of the distribution that was sampled from
        loss_mask         (C, T) bool          True = counts; elsewhere the weight is 0
    Args:
        cap: at least 1; infinity means plain importance weights.
    Returns: (C, T) float, detached, in [0, cap].
    Raises: ValueError on shapes that differ.
    Source: Ionides 2008, "Truncated importance sampling", doi:10.1198/106186008X320456; Yao et al. 2025, "Your
        efficient RL framework secretly brings you off-policy RL training", https://fengyao.notion.site/off-policy-rl.
    Tested by: tests/golden/test_golden_ppo.py
    """
    old, sampler = counted(old_logprobs, loss_mask), counted(sampler_logprobs, loss_mask)
    return counted((old - sampler).exp().clamp_max(cap), loss_mask)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    value_clip_range: float,
    num_tokens: Count | None = None,
) -> ValueLoss:
    """Half squared error of the values, pessimistic where they moved more than the clip range.

        v_clip = clip(values, old_values - range, old_values + range)
        loss = sum(mask * 0.5 * max((values - returns)^2, (v_clip - returns)^2)) / num_tokens

    Shapes: C completions, T tokens.
        values      (C, T) float   requires grad
        old_values  (C, T) float   when the tokens were written
        returns     (C, T) float   from `gae`, not whitened
        loss_mask   (C, T) bool    True = counts
    Args:
        value_clip_range: in value units, > 0; infinity means plain half squared error.
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: the PPO code of Ziegler et al. 2019, arXiv:1909.08593. Departures: a masked mean over tokens.
    Tested by: tests/golden/test_golden_ppo.py, tests/property/test_losses.py
    """
    values = counted(values, loss_mask)
    old_values, returns = counted(old_values.detach(), loss_mask), counted(returns.detach(), loss_mask)
    difference = values - old_values
    moved = difference.clamp(-value_clip_range, value_clip_range)
    unclipped = (values - returns).square()
    clipped = (old_values + moved - returns).square()
    # Within the range `clipped` and `unclipped` differ by rounding alone.
    beyond = difference.abs() > value_clip_range
    return ValueLoss(
        loss=masked_mean(0.5 * torch.maximum(unclipped, clipped), loss_mask, num_tokens),
        clipped_count=(loss_mask & beyond & (clipped > unclipped)).sum(),
        squared_error_sum=masked_sum(unclipped.detach(), loss_mask),
        token_count=loss_mask.sum(),
    )


def entropy_loss(entropies: Tensor, loss_mask: Tensor, *, num_tokens: Count | None = None) -> EntropyLoss:
    """Minus the mean entropy of the policy's next-token distributions, in nats: adding it rewards exploration.

        loss = -sum(mask * entropies) / num_tokens

    Shapes: entropies (C, T) float, nats, requires grad; loss_mask (C, T) bool, True = counts.
    Args:
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9, third term.
    Tested by: tests/golden/test_golden_ppo.py, tests/property/test_losses.py
    """
    return EntropyLoss(
        loss=-masked_mean(entropies, loss_mask, num_tokens),
        entropy_sum=masked_sum(entropies.detach(), loss_mask),
        token_count=loss_mask.sum(),
    )
