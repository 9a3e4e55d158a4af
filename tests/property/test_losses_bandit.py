"""The pieces together: policy gradient on a bandit whose optimum is known in closed form.

Maximising E[score] - beta KL(policy || reference) over all policies gives policy(a) = reference(a) exp(score(a) /
beta) / Z. With reference (.4, .4, .2), scores (1, .5, 0) and beta = .5: reference * (e^2, e^1, 1) = (2.955622,
1.087313, .2), sum 4.242935, so (.696599, .256264, .047137)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accord.losses import gae, kl_k1, kl_k3, ppo_policy_loss, token_rewards

REFERENCE = torch.tensor([0.4, 0.4, 0.2]).log()
SCORES = torch.tensor([1.0, 0.5, 0.0])
OPTIMUM = [0.696599, 0.256264, 0.047137]


def train(estimator: Callable[[Tensor, Tensor], Tensor], beta: float) -> list[float]:
    """PPO on one-token completions with the KL in the reward; returns the policy's probabilities.

    Actions are drawn by inverse CDF at evenly spaced points, so a rollout holds each in proportion to its probability
    (within one of 1,000) and the result is the method's, not the noise's."""
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)
    points = (torch.arange(1000) + 0.5) / 1000
    mask = torch.ones(1000, 1, dtype=torch.bool)
    for _ in range(150):
        with torch.no_grad():
            old = torch.log_softmax(logits, 0)
            actions = torch.searchsorted(old.exp().cumsum(0), points).clamp_max(2)
            old_logprobs = old[actions][:, None]
            penalty = beta * estimator(old_logprobs, REFERENCE[actions][:, None])
            rewards = token_rewards(SCORES[actions], penalty, mask)
            baseline = rewards.mean().expand_as(rewards)
            advantages = gae(rewards, baseline, mask, gamma=1.0, gae_lambda=0.95).advantages
        for _ in range(2):
            policy_logprobs = torch.log_softmax(logits, 0)[actions][:, None]
            optimizer.zero_grad()
            ppo_policy_loss(policy_logprobs, old_logprobs, advantages, mask, clip_range=0.2).loss.backward()
            optimizer.step()
    return torch.softmax(logits.detach(), 0).tolist()


def test_ppo_with_k1_in_the_reward_reaches_the_exact_optimum() -> None:
    assert train(kl_k1, beta=0.5) == pytest.approx(OPTIMUM, abs=0.01)


def test_ppo_with_k3_in_the_reward_ends_elsewhere() -> None:
    """The negative control: k3 has the KL's value but, in the reward, not its gradient."""
    assert train(kl_k3, beta=0.5) != pytest.approx(OPTIMUM, abs=0.05)


def test_ppo_without_penalty_goes_for_the_best_action() -> None:
    assert train(kl_k1, beta=0.0)[0] > 0.95
