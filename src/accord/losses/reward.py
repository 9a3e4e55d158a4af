"""Reward-model losses: Bradley-Terry over the pairs of each prompt, for two completions or K.

One implementation serves all: `ranked_loss` finds the pairs of each group, `pairwise_loss` is given them, and
`divergence_span_loss` compares the scores of every token of a pair from where its answers part. Every prompt weighs the
same, however many pairs it has. Metrics are sums and counts of this call: add them over micro-batches, then divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from accord.losses.masked import Count, counted, full_precision, masked_mean, require_same_shape

__all__ = ["RewardLoss", "SpanLoss", "centring_penalty", "divergence_span_loss", "pairwise_loss", "ranked_loss"]


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
    weights: Tensor | None = None,
    num_groups: Count | None = None,
) -> RewardLoss:
    """Bradley-Terry loss over all pairs of differing rank within each prompt's completions.

        loss = sum over groups of weight * (mean over the group's pairs of the loss in `pairwise_loss`) / num_groups

    Equal ranks are ties and teach nothing; a group of ties only counts as no group. For K = 2 this is `pairwise_loss`.

    Shapes: C completions, G groups.
        scores       (C,) float   one group's completions need not be neighbours
        ranks        (C,) int     0 = best
        group_index  (C,) int     0..G-1
        margins, soft_labels  (G,) float   apply to every pair of their group; None = 0 and 1
        weights      (G,) float   how often a group counts in the loss (a bootstrap's draws); None = once. Metrics are
                                  of the data as it is
    Args:
        num_groups: groups with a pair in the whole optimizer step, each counted once. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Departures: ties; K may differ between prompts.
    Tested by: tests/golden/test_golden_reward.py, tests/property/test_losses.py
    """
    require_same_shape(scores=scores, ranks=ranks, group_index=group_index)
    better, worse = _pairs(ranks, group_index)
    return _bradley_terry(
        scores[better],
        scores[worse],
        group_index[better],
        _num_groups(group_index),
        margins=margins,
        soft_labels=soft_labels,
        weights=weights,
        num_groups=num_groups,
    )


@dataclass(frozen=True, slots=True)
class SpanLoss:
    """loss () to differentiate, and of this call, detached:

    span_loss_sum    sum over groups of the mean over their pairs of the loss, margins left out; / group_count
    pair_count, group_count   pairs whose answers differ, and groups that have at least one
    identical_count  pairs of differing rank whose answers are the same tokens: they teach nothing and are left out
    """

    loss: Tensor
    span_loss_sum: Tensor
    pair_count: Tensor
    group_count: Tensor
    identical_count: Tensor


def divergence_span_loss(
    token_scores: Tensor,
    ids: Tensor,
    mask: Tensor,
    ranks: Tensor,
    group_index: Tensor,
    *,
    margins: Tensor | None = None,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    num_groups: Count | None = None,
) -> SpanLoss:
    """Bradley-Terry at every token of a pair, from the first in which its answers differ to the end of the longer one.

        first = the first t at which the tokens differ, or at which one answer has ended;  end = the longer one's length
        d[t]  = c[t] - r[t] - margin,  c[t], r[t] = the answer's score at token t, past its end that at its last token
        pair  = mean over first <= t < end of -(p log sigmoid(d[t]) + (1 - p) log sigmoid(-d[t]))
        loss  = sum over groups of weight * (mean over the group's pairs) / num_groups

    Tokens before `first` are the same on both sides and have the same scores: they could teach nothing. So a pair
    teaches at many places instead of one. The score that is used afterwards is the one at the last token, which is
    only one of the places trained; it is comparable with that of `ranked_loss`, the size of this loss is not.

    Shapes: C completions, T tokens, G groups.
        token_scores  (C, T) float  the head on the hidden state of token t itself
        ids           (C, T) int    tokens; mask (C, T) bool, True = the token exists, none before it missing
        ranks, group_index, margins, soft_labels, weights   as in `ranked_loss`
    Args:
        num_groups: groups with a pair that differs in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit, or for a completion without tokens.
    Source: the reward model of trlX's example on TL;DR summaries. Departures: an answer that has ended keeps its last
        score, where the example reads scores at padding; identical pairs are counted and left out, where the example
        lets one turn the whole batch's loss off; log sigmoid as one function, where the logarithm of an underflown
        sigmoid is infinite; rankings, margins, soft labels and an explicit normaliser.
    Tested by: tests/golden/test_golden_reward.py, tests/property/test_losses_reward.py
    """
    require_same_shape(token_scores=token_scores, ids=ids, mask=mask)
    require_same_shape(scores=token_scores[:, 0], ranks=ranks, group_index=group_index)
    if not mask[:, 0].all():
        raise ValueError("a completion without tokens has no score to compare")
    better, worse = _pairs(ranks, group_index)
    scores = full_precision(token_scores).gather(1, _carried_places(mask))
    differs = (mask[better] != mask[worse]) | (ids[better] != ids[worse])
    span = (differs.cumsum(1) > 0) & (mask[better] | mask[worse])
    differing = span.any(1)
    better, worse, span = better[differing], worse[differing], span[differing]
    gap, pair_group = scores[better] - scores[worse], group_index[better]
    zeros = gap.new_zeros(_num_groups(group_index))
    margins, soft_labels, weights = _of_groups(zeros, margins, soft_labels, weights)
    num_pairs = zeros.index_add(0, pair_group, torch.ones_like(gap[:, 0]))
    has_pairs = num_pairs > 0

    def per_group(logits: Tensor) -> Tensor:
        """(size,) mean over each group's pairs of the mean over their span."""
        losses = counted(_cross_entropy(logits, soft_labels[pair_group][:, None]), span).sum(1) / span.sum(1)
        return zeros.index_add(0, pair_group, losses) / num_pairs.clamp_min(1)

    return SpanLoss(
        loss=masked_mean(weights * per_group(gap - margins[pair_group][:, None]), has_pairs, num_groups),
        span_loss_sum=per_group(gap.detach()).sum(),
        pair_count=num_pairs.sum(),
        group_count=has_pairs.sum(),
        identical_count=(~differing).sum(),
    )


def _carried_places(mask: Tensor) -> Tensor:
    """(C, T) place of the token whose score stands at t: t itself, or the last one there is before it."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.minimum(places, mask.sum(1, keepdim=True) - 1)


def _pairs(ranks: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) indices of the better and of the worse completion of every pair of differing rank within a group."""
    same_group = group_index[:, None] == group_index[None, :]
    better, worse = torch.nonzero(same_group & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    return better, worse


def _num_groups(group_index: Tensor) -> int:
    return int(group_index.max()) + 1 if len(group_index) else 0


def _of_groups(
    zeros: Tensor, margins: Tensor | None, soft_labels: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is given of each group, or 0, 1 and 1; all as `zeros` (G,). Raises ValueError on other shapes."""
    margins = zeros if margins is None else full_precision(margins)
    soft_labels = zeros + 1 if soft_labels is None else full_precision(soft_labels)
    weights = zeros + 1 if weights is None else full_precision(weights)
    require_same_shape(groups=zeros, margins=margins, soft_labels=soft_labels, weights=weights)
    return margins, soft_labels, weights


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Of sigmoid(logits) against P(the first is better), nats."""
    return -(label * logsigmoid(logits) + (1 - label) * logsigmoid(-logits))


def _bradley_terry(
    better: Tensor,
    worse: Tensor,
    pair_group: Tensor,
    size: int,
    *,
    margins: Tensor | None,
    soft_labels: Tensor | None,
    weights: Tensor | None = None,
    num_groups: Count | None,
) -> RewardLoss:
    """The loss of P pairs: better, worse (P,) scores and pair_group (P,) in 0..size-1; the rest (size,)."""
    difference = full_precision(better) - full_precision(worse)
    zeros = difference.new_zeros(size)
    margins, soft_labels, weights = _of_groups(zeros, margins, soft_labels, weights)
    num_pairs = zeros.index_add(0, pair_group, torch.ones_like(difference))
    has_pairs = num_pairs > 0

    def per_group(logits: Tensor) -> Tensor:
        """(size,) mean over each group's pairs of the cross-entropy."""
        losses = _cross_entropy(logits, soft_labels[pair_group])
        return zeros.index_add(0, pair_group, losses) / num_pairs.clamp_min(1)

    gap = difference.detach()
    return RewardLoss(
        loss=masked_mean(weights * per_group(difference - margins[pair_group]), has_pairs, num_groups),
        log_loss_sum=per_group(gap).sum(),
        correct_sum=(gap > 0).sum() + 0.5 * (gap == 0).sum(),
        score_margin_sum=gap.sum(),
        pair_count=num_pairs.sum(),
        group_count=has_pairs.sum(),
    )


def centring_penalty(
    scores: Tensor, group_index: Tensor, *, weights: Tensor | None = None, num_groups: Count | None = None
) -> Tensor:
    """Pulls the mean score of each prompt's completions to 0, which Bradley-Terry alone leaves free.

        sum over groups of weight * (2 * mean of the group's scores)^2 / num_groups

    For a pair this is (chosen + rejected)^2. For K it stays a function of the group's mean alone, so that spreading
    scores apart around 0 costs nothing; summing (r_i + r_j)^2 over pairs would not have that.

    Shapes: C completions, G groups: scores (C,) float, group_index (C,) int in 0..G-1; weights (G,) float, None = 1
        -> ().
    Args:
        num_groups: groups in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: Eisenstein et al. 2023, arXiv:2312.09244. Departures: K completions.
    Tested by: tests/golden/test_golden_reward.py
    """
    require_same_shape(scores=scores, group_index=group_index)
    scores = full_precision(scores)
    zeros = scores.new_zeros(_num_groups(group_index))
    _, _, weights = _of_groups(zeros, None, None, weights)
    sizes = zeros.index_add(0, group_index, torch.ones_like(scores))
    means = zeros.index_add(0, group_index, scores) / sizes.clamp_min(1)
    return masked_mean(weights * (2 * means).square(), sizes > 0, num_groups)
