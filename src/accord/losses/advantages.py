"""From scores to advantages: rewards per token, then generalised advantage estimation. No gradient passes here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.losses.masked import counted, require_same_shape

__all__ = ["Advantages", "gae", "token_rewards"]


@dataclass(frozen=True, slots=True)
class Advantages:
    """advantages and returns (= advantages + values), each (C, T) float, detached, 0 where the mask is False.
    Neither is whitened: whitening the advantages is the caller's visible step, and the returns must never see it."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def token_rewards(scores: Tensor, kl_penalty: Tensor, mask: Tensor) -> Tensor:
    """Rewards per token: the KL penalty everywhere, the score of the whole completion at its last counted token.

        reward[t] = -kl_penalty[t] + score * [t is the last counted token]

    Shapes: C completions, T tokens.
        scores      (C,) float     one per completion
        kl_penalty  (C, T) float   kl_coef * k1, nats times the coefficient
        mask        (C, T) bool    True = counts; elsewhere the reward is 0
    A completion without counted tokens gets no reward at all.
    Returns: (C, T) float, detached.
    Raises: ValueError on shapes that do not fit.
    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2. Departures: some implementations add the score one position
        after the end-of-sequence token, where the critic has read that token; here it lies on the end-of-sequence token
        itself, whose value is predicted before it. The objective is the same, the critic bootstraps one step less.
    Tested by: tests/golden/test_golden_advantages.py, tests/property/test_losses.py
    """
    penalty = counted(kl_penalty, mask)
    require_same_shape(scores=scores, completions=mask[:, 0])
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # counted tokens from here on: 1 at the last one
    return counted(scores[:, None].expand_as(penalty), mask & (tokens_left == 1)) - penalty


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> Advantages:
    """Generalised advantage estimation over the counted tokens, bootstrapping 0 after the last.

        delta[t] = reward[t] + gamma * value[t+1] - value[t]
        A[t] = delta[t] + gamma * gae_lambda * A[t+1]
        returns = A + value

    gae_lambda = 1 gives returns-to-go minus value, gae_lambda = 0 the one-step errors delta.
    "t+1" is the next COUNTED token: whatever stands at other tokens (padding, turns that somebody else wrote) is
    neither bootstrapped from nor a step of discount.

    Shapes: C completions, T tokens.
        rewards  (C, T) float
        values   (C, T) float   V of the state BEFORE token t
        mask     (C, T) bool    True = counts
    Args:
        gamma: discount per token, in [0, 1]. gae_lambda: in [0, 1].
    Raises: ValueError on shapes that differ.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16. Departures: none.
    Tested by: tests/golden/test_golden_advantages.py, tests/property/test_losses.py
    """
    rewards, values = counted(rewards, mask), counted(values, mask)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = counted(advantages, mask)
    return Advantages(advantages=advantages, returns=advantages + values)
