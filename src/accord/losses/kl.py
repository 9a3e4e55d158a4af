"""KL(policy || reference): exact, and estimated from the policy's own samples; and the controller of its coefficient.

All estimators take x = policy_logprobs - ref_logprobs at tokens the POLICY sampled. Where each may be used matters more
than its variance:

    estimator             value      in the reward (no gradient)     as a loss (differentiated)
    k1 = x                unbiased   the gradient of the KL          0 in expectation
    k2 = x^2 / 2          biased     wrong                           the gradient of the KL
    k3 = exp(-x) - 1 + x  unbiased   wrong                           the gradient of KL(reference || policy)

So rewards are penalised with k1, and k3 (small variance, never negative) is for showing.
Left out: per-token clamping of k1 at 0, which biases it upwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accord.losses.masked import full_precision, require_same_shape

__all__ = ["adaptive_kl_coef", "categorical_kl", "kl_k1", "kl_k2", "kl_k3"]


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
