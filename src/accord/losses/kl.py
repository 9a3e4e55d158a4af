"""KL(policy || reference): exact, and estimated from the policy's own samples; and the controller of its coefficient.

All estimators take x = policy_logprobs - ref_logprobs at tokens the POLICY sampled. Where each may be used matters more
than its variance:

    estimator             value      in the reward (no gradient)     as a loss (differentiated)
    k1 = x                unbiased   the gradient of the KL          0 in expectation
    k2 = x^2 / 2          biased     wrong                           the gradient of the KL
    k3 = exp(-x) - 1 + x  unbiased   wrong                           the gradient of KL(reference || policy)

So rewards are penalised with k1, losses with k2, and k3 (small variance, never negative) is for showing; as a loss it
is here because GRPO was published with it.
Left out: per-token clamping of k1 at 0, which biases it upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accord.losses.masked import counted, full_precision, require_same_shape

__all__ = ["KLLoss", "adaptive_kl_coef", "categorical_kl", "kl_k1", "kl_k2", "kl_k2_loss", "kl_k3", "kl_k3_loss"]


@dataclass(frozen=True, slots=True)
class KLLoss:
    """loss () to differentiate; estimate_sum () nats, unweighted, and token_count () of this call, detached."""

    loss: Tensor
    estimate_sum: Tensor
    token_count: Tensor


def kl_k1(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = x per token, nats, in the inputs' shape. Summed over a sequence it is exactly log policy(y)/reference(y).

    Unbiased for KL(policy || reference), may be negative. Raises ValueError on shapes that differ.
    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    require_same_shape(policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs)
    return full_precision(policy_logprobs) - full_precision(ref_logprobs)


def kl_k2(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = x^2 / 2 per token, read as nats: biased, but its gradient as a loss is the KL's. Source as `kl_k1`."""
    return 0.5 * kl_k1(policy_logprobs, ref_logprobs).square()


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(-x) - 1 + x per token, nats: unbiased and not negative. Source as `kl_k1`.

    The sign is the trap: exp(x) - 1 - x on policy samples estimates another quantity (chi-square minus KL).
    """
    x = kl_k1(policy_logprobs, ref_logprobs)
    return torch.expm1(-x) + x


def kl_k2_loss(policy_logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, loss_mask: Tensor) -> KLLoss:
    """k2 as a loss: each token is pulled towards the reference along the gradient of KL(policy || reference).

        loss = sum(mask * weights * x^2 / 2),   gradient = sum(mask * weights * x * grad policy_logprobs)

    That is the gradient of the KL of each token's distribution, given the tokens before it. What an early token does to
    the KL of later ones has no gradient here, but has one with k1 in the reward: only that one is the gradient of the
    KL of whole completions. Both hold for tokens the current policy wrote; after further updates on the same tokens
    they are approximations.

    Shapes: C completions, T tokens; weights are those of the policy loss, so that a token's KL counts as its advantage
        does.
        policy_logprobs  (C, T) float, nats   requires grad
        ref_logprobs     (C, T) float, nats   no gradient passes
        weights          (C, T) float         what each token weighs, normalised over the optimizer step
        loss_mask        (C, T) bool          True = counts
    Raises: ValueError on shapes that differ.
    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html; Tang and Munos 2025, arXiv:2506.09477.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    return _kl_loss(kl_k2, policy_logprobs, ref_logprobs, weights, loss_mask)


def kl_k3_loss(policy_logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, loss_mask: Tensor) -> KLLoss:
    """k3 as a loss, as GRPO was published: its value is the KL's, its gradient that of KL(reference || policy).

        loss = sum(mask * weights * (exp(-x) - 1 + x)),   gradient = sum(mask * weights * (1 - exp(-x)) grad logprobs)

    The pull of a token that the policy has made ever likelier stays below its weight, where k2's grows with x; that of
    one it has made unlikely grows exponentially. Near the reference, x small, the two agree.

    Shapes, errors and tests as `kl_k2_loss`. Source: Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    return _kl_loss(kl_k3, policy_logprobs, ref_logprobs, weights, loss_mask)


def _kl_loss(
    estimator: Callable[[Tensor, Tensor], Tensor],
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    weights: Tensor,
    loss_mask: Tensor,
) -> KLLoss:
    estimate = estimator(counted(policy_logprobs, loss_mask), counted(ref_logprobs.detach(), loss_mask))
    return KLLoss(
        loss=(counted(weights, loss_mask) * estimate).sum(),
        estimate_sum=estimate.detach().sum(),
        token_count=loss_mask.sum(),
    )


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of two categorical distributions, exact, over the last dimension, nats.

        sum_v p_v (log p_v - log q_v),   p = softmax(logits_p), q = softmax(logits_q)

    Shapes: both (..., V) -> (...). Outcomes with p = 0 (logit -inf) add 0; q = 0 where p > 0 gives inf.
    Raises: ValueError on shapes that differ.
    """
    require_same_shape(logits_p=logits_p, logits_q=logits_q)
    log_p = torch.log_softmax(full_precision(logits_p), dim=-1)
    log_q = torch.log_softmax(full_precision(logits_q), dim=-1)
    difference = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float, *, target_kl: float, horizon: float, num_samples: int
) -> float:
    """The next `kl_coef` so that the KL per sequence drifts towards its target; call once per rollout.

        error = clip(observed_kl / target_kl - 1, -0.2, 0.2)
        kl_coef * (1 + error * num_samples / horizon)

    Args:
        observed_kl: mean over sequences of summed k1, nats per sequence, of this rollout.
        target_kl: nats per sequence, > 0.
        horizon: sequences over which an error of 1 would double the coefficient.
        num_samples: sequences in this rollout.
    A fixed coefficient is one that is never updated.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2. Departures: the gain is num_samples / horizon, as in the
        authors' code, so that the drift does not depend on how many rollouts the samples are collected in.
    Tested by: tests/golden/test_golden_kl.py
    """
    error = min(max(observed_kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
