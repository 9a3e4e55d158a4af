"""Reward-model losses: Bradley-Terry over the pairs of each prompt, for two completions or K.

One implementation serves both: `ranked_loss` finds the pairs of each group, `pairwise_loss` is given them. Every prompt
weighs the same, however many pairs it has. Metrics are sums and counts of this call: add them over micro-batches, then
divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from accord.losses.masked import Count, full_precision, masked_mean, require_same_shape

__all__ = ["RewardLoss", "centring_penalty", "pairwise_loss", "ranked_loss"]


@dataclass(frozen=True, slots=True)
class RewardLoss:
    """loss () to differentiate, and of this call, detached:

    log_loss_sum      sum over groups of the mean log-loss of their pairs, nats, margins left out; / group_count
    correct_sum       pairs scored in the right order, equal scores counting half; / pair_count = accuracy
    score_margin_sum  sum over pairs of score(better) - score(worse); / pair_count
    pair_count, group_count   pairs, and groups that have at least one
    """

    loss: Tensor
    log_loss_sum: Tensor
    correct_sum: Tensor
    score_margin_sum: Tensor
    pair_count: Tensor
    group_count: Tensor


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margins: Tensor | None = None,
    soft_labels: Tensor | None = None,
    num_groups: Count | None = None,
) -> RewardLoss:
    """Bradley-Terry loss of one pair per prompt.

        d = chosen_scores - rejected_scores - margins
        loss = sum(-(p log sigmoid(d) + (1 - p) log sigmoid(-d))) / num_groups

    At d = 0 the loss is ln 2. A margin m > 0 asks for more than winning: the loss is ln 2 only at a difference of m.
    The minimum for a soft label p lies at d = log(p / (1 - p)). Adding a constant to all scores changes nothing.

    Shapes: G pairs; all (G,) float.
        margins      how much better the chosen one is, score units. None = 0
        soft_labels  p = P(chosen is preferred), in [0, 1]. None = 1
    Args:
        num_groups: pairs in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    Tested by: tests/golden/test_golden_reward.py, tests/property/test_losses.py
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    groups = torch.arange(chosen_scores.shape[0], device=chosen_scores.device)
    return _bradley_terry(
        chosen_scores,
        rejected_scores,
        groups,
        len(groups),
        margins=margins,
        soft_labels=soft_labels,
        num_groups=num_groups,
    )


def ranked_loss(
    scores: Tensor,
    ranks: Tensor,
    group_index: Tensor,
    *,
    margins: Tensor | None = None,
    soft_labels: Tensor | None = None,
    num_groups: Count | None = None,
) -> RewardLoss:
    """Bradley-Terry loss over all pairs of differing rank within each prompt's completions.

        loss = sum over groups of (mean over the group's pairs of the loss in `pairwise_loss`) / num_groups

    Equal ranks are ties and teach nothing; a group of ties only counts as no group. For K = 2 this is `pairwise_loss`.

    Shapes: C completions, G groups.
        scores       (C,) float   one group's completions need not be neighbours
        ranks        (C,) int     0 = best
        group_index  (C,) int     0..G-1
        margins, soft_labels  (G,) float   apply to every pair of their group; None = 0 and 1
    Args:
        num_groups: groups with a pair in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Departures: ties; K may differ between prompts.
    Tested by: tests/golden/test_golden_reward.py, tests/property/test_losses.py
    """
    require_same_shape(scores=scores, ranks=ranks, group_index=group_index)
    same_group = group_index[:, None] == group_index[None, :]
    better, worse = torch.nonzero(same_group & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    size = int(group_index.max()) + 1 if len(group_index) else 0
    return _bradley_terry(
        scores[better],
        scores[worse],
        group_index[better],
        size,
        margins=margins,
        soft_labels=soft_labels,
        num_groups=num_groups,
    )


def _bradley_terry(
    better: Tensor,
    worse: Tensor,
    pair_group: Tensor,
    size: int,
    *,
    margins: Tensor | None,
    soft_labels: Tensor | None,
    num_groups: Count | None,
) -> RewardLoss:
    """The loss of P pairs: better, worse (P,) scores and pair_group (P,) in 0..size-1; margins, soft_labels (size,)."""
    difference = full_precision(better) - full_precision(worse)
    zeros = difference.new_zeros(size)
    margins = zeros if margins is None else full_precision(margins)
    soft_labels = zeros + 1 if soft_labels is None else full_precision(soft_labels)
    require_same_shape(groups=zeros, margins=margins, soft_labels=soft_labels)
    num_pairs = zeros.index_add(0, pair_group, torch.ones_like(difference))
    has_pairs = num_pairs > 0

    def per_group(logits: Tensor) -> Tensor:
        """(size,) mean over each group's pairs of the cross-entropy of sigmoid(logits) against the soft label."""
        label = soft_labels[pair_group]
        pair_losses = -(label * logsigmoid(logits) + (1 - label) * logsigmoid(-logits))
        return zeros.index_add(0, pair_group, pair_losses) / num_pairs.clamp_min(1)

    gap = difference.detach()
    return RewardLoss(
        loss=masked_mean(per_group(difference - margins[pair_group]), has_pairs, num_groups),
        log_loss_sum=per_group(gap).sum(),
        correct_sum=(gap > 0).sum() + 0.5 * (gap == 0).sum(),
        score_margin_sum=gap.sum(),
        pair_count=num_pairs.sum(),
        group_count=has_pairs.sum(),
    )


def centring_penalty(scores: Tensor, group_index: Tensor, *, num_groups: Count | None = None) -> Tensor:
    """Pulls the mean score of each prompt's completions to 0, which Bradley-Terry alone leaves free.

        sum over groups of (2 * mean of the group's scores)^2 / num_groups

    For a pair this is (chosen + rejected)^2. For K it stays a function of the group's mean alone, so that spreading
    scores apart around 0 costs nothing; summing (r_i + r_j)^2 over pairs would not have that.

    Shapes: C completions, G groups: scores (C,) float, group_index (C,) int in 0..G-1 -> ().
    Args:
        num_groups: groups in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: Eisenstein et al. 2023, arXiv:2312.09244. Departures: K completions.
    Tested by: tests/golden/test_golden_reward.py
    """
    require_same_shape(scores=scores, group_index=group_index)
    scores = full_precision(scores)
    zeros = scores.new_zeros(int(group_index.max()) + 1 if len(group_index) else 0)
    sizes = zeros.index_add(0, group_index, torch.ones_like(scores))
    means = zeros.index_add(0, group_index, scores) / sizes.clamp_min(1)
    return masked_mean((2 * means).square(), sizes > 0, num_groups)
