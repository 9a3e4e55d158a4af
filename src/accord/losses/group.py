"""Advantages of whole completions from the rewards of their group, and what a completion's tokens weigh in a loss.

The policy gradient of a completion is its reward times the gradient of its log-probability. Rewards that are compared
with those of other completions make it less noisy; a baseline that does not see the completion leaves it unbiased.

    advantage            baseline                        expected gradient, n completions in the group
    rloo, batch          mean of the OTHER completions   the policy gradient
    group                mean, itself included           (n - 1) / n of it: the same direction
    scaled_...           the same, over the spread       another: groups that hardly differ are amplified

Legend: C completions, T tokens, G groups. No gradient passes through rewards and advantages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accord.losses.masked import Count, full_precision, require_same_shape, sequence_logprobs
from accord.losses.ppo import PolicyLoss, ppo_policy_loss

__all__ = [
    "batch_advantages",
    "completion_mean_weights",
    "completion_policy_loss",
    "constant_length_weights",
    "group_advantages",
    "rloo_advantages",
    "scaled_batch_advantages",
    "scaled_group_advantages",
    "token_mean_weights",
]

_EPSILON = 1e-4
"""Added to standard deviations, in reward units: what differs by much less than this counts as equal."""


@torch.no_grad()
def rloo_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """Leave-one-out: each completion's reward less the mean reward of the group's other completions.

        A[i] = r[i] - mean(r[j], j in the group of i, j != i)

    The baseline does not depend on completion i, so E[A grad log p] is exactly the policy gradient.

    Shapes: rewards (C,) float; group_index (C,) int64, from 0 -> (C,) float, detached. Equal rewards give exactly 0.
    Raises: ValueError on shapes that differ, or a group of one completion, which has no others.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
        arXiv:2402.14740, section 3. Departures: none.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    centred, sizes = _centred(rewards, group_index)
    if (sizes < 2).any():
        raise ValueError("a group of one completion has no others to be compared with: sample at least 2 for a prompt")
    return centred * sizes / (sizes - 1)


@torch.no_grad()
def group_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """Each completion's reward less the mean of its group, itself included: (n - 1) / n of `rloo_advantages`.

        A[i] = r[i] - mean(r[j], j in the group of i)

    Shapes: rewards (C,) float; group_index (C,) int64, from 0 -> (C,) float, detached. Equal rewards give exactly 0,
        and so does a group of one.
    Raises: ValueError on shapes that differ.
    Source: Liu et al. 2025, arXiv:2503.20783 ("Dr. GRPO"), which leaves out the division of Shao et al. 2024.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    return _centred(rewards, group_index)[0]


@torch.no_grad()
def scaled_group_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """`group_advantages` over the standard deviation of the group's rewards, as GRPO was published.

        A[i] = (r[i] - mean) / (std + 1e-4),   std unbiased: its square divides by n - 1

    The size of rewards no longer matters, and a group whose rewards differ by .01 moves the policy as far as one whose
    rewards differ by 10: in expectation this is no gradient of the mean reward.

    Shapes: rewards (C,) float; group_index (C,) int64, from 0 -> (C,) float, detached. Equal rewards give exactly 0,
        and so does a group of one.
    Raises: ValueError on shapes that differ.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2, which names neither kind of deviation nor an epsilon.
        Departures: unbiased, with 1e-4 added, as in TRL, so that the numbers compare.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    centred, sizes = _centred(rewards, group_index)
    variances = _group_sums(centred.square(), group_index)[group_index] / (sizes - 1).clamp_min(1)
    return centred / (variances.sqrt() + _EPSILON)


def batch_advantages(rewards: Tensor) -> Tensor:
    """`rloo_advantages` with the whole batch as the group: the others' mean is the baseline, whatever their prompts.

        A[i] = r[i] - mean(r[j], j != i) = C / (C - 1) (r[i] - mean(r))

    Leave-one-out because it costs nothing and is unbiased for any C; with the plain mean the expected gradient is
    (C - 1) / C of the policy gradient.

    Shapes: rewards (C,) float -> (C,) float, detached. Equal rewards give exactly 0.
    Raises: ValueError for a single completion.
    Source: Williams 1992, "Simple statistical gradient-following algorithms", with a reinforcement baseline.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    return rloo_advantages(rewards, torch.zeros_like(rewards, dtype=torch.long))


def scaled_batch_advantages(rewards: Tensor) -> Tensor:
    """`batch_advantages` over their own standard deviation: (A / (std(A) + 1e-4)), std unbiased.

    One factor for all prompts, so the direction is that of the policy gradient, at a size that does not follow the
    rewards'. Shapes, errors and tests as `batch_advantages`.
    """
    advantages = batch_advantages(rewards)
    return advantages / (advantages.std() + _EPSILON)


def completion_mean_weights(lengths: Tensor, *, num_completions: Count) -> Tensor:
    """Weights of a mean over each completion's tokens, then over completions: 1 / (num_completions * length).

    A completion counts as one whatever its length, so a token of a long one counts less: long bad completions are
    punished less for each of their tokens, long good ones encouraged less.

    Shapes: lengths (C,) int, counted tokens of each completion -> (C,) float, the weight of each token of a completion.
        A completion without tokens has none to weigh.
    Args:
        num_completions: completions in the whole optimizer step.
    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3.
    Tested by: tests/golden/test_golden_group.py
    """
    return 1 / (lengths.clamp_min(1) * num_completions)


def token_mean_weights(lengths: Tensor, *, num_tokens: Count) -> Tensor:
    """Weights of a mean over all tokens: 1 / num_tokens, those of the whole optimizer step, for every token.

    Shapes and tests as `completion_mean_weights`. Source: Yu et al. 2025, arXiv:2503.14476 ("DAPO"), eq. 8.
    """
    return torch.ones_like(lengths, dtype=torch.float32) / num_tokens


def constant_length_weights(lengths: Tensor, *, num_completions: Count, max_tokens: int) -> Tensor:
    """Weights of a sum over tokens divided by a constant: 1 / (num_completions * max_tokens), for every token.

    The only one of the three whose expectation is proportional to the policy gradient of whole completions: nothing
    divides it that depends on the lengths the samples happened to have.

    Shapes and tests as `completion_mean_weights`. Source: Liu et al. 2025, arXiv:2503.20783, section 3.
    """
    return torch.ones_like(lengths, dtype=torch.float32) / (num_completions * max_tokens)


def completion_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_range: float,
    num_completions: Count | None = None,
) -> PolicyLoss:
    """`ppo_policy_loss` with a whole completion as the action: one ratio, one advantage, one clip for each.

        R = exp(sum over tokens of policy_logprobs - old_logprobs)
        loss = sum(max(-A R, -A clip(R, 1 - eps, 1 + eps))) / num_completions

    At R = 1 the gradient is -mean(A grad log p(completion)): REINFORCE. Clipping binds sooner the longer completions
    are, since R is a product over tokens.

    Shapes: policy_logprobs, old_logprobs (C, T) float, nats; advantages (C,) float; loss_mask (C, T) bool.
    Args:
        clip_range: eps, in (0, 1).
        num_completions: completions in the whole optimizer step. None = those in this call.
    Returns: a PolicyLoss whose counts and sums are over completions instead of tokens.
    Raises: ValueError on shapes that differ.
    Source: Ahmadian et al. 2024, arXiv:2402.14740. Departures: none from TRL's code; the paper makes one update, where
        nothing is clipped.
    Tested by: tests/golden/test_golden_group.py, tests/property/test_losses_group.py
    """
    return ppo_policy_loss(
        sequence_logprobs(policy_logprobs, loss_mask)[:, None],
        sequence_logprobs(old_logprobs, loss_mask)[:, None],
        advantages[:, None],
        torch.ones_like(loss_mask[:, :1]),
        clip_range=clip_range,
        num_tokens=num_completions,
    )


def _centred(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) rewards less their group's mean, and (C,) how many completions the group of each has.

    Rewards are first taken relative to the group's smallest: equal ones are then exactly 0, where a mean of equal
    floats may be off by rounding, which a division by the spread would turn into a signal.
    """
    require_same_shape(rewards=rewards, group_index=group_index)
    rewards = full_precision(rewards)
    sizes = _group_sums(torch.ones_like(rewards), group_index)
    smallest = torch.full_like(sizes, torch.inf).scatter_reduce(0, group_index, rewards, "amin")
    above = rewards - smallest[group_index]
    means = _group_sums(above, group_index) / sizes
    return above - means[group_index], sizes[group_index]


def _group_sums(values: Tensor, group_index: Tensor) -> Tensor:
    """(G,) sum of a (C,) tensor over each group."""
    groups = int(group_index.max()) + 1 if len(group_index) else 0
    return values.new_zeros(groups).index_add(0, group_index, values)
