"""Losses of preference pairs, trained without a reward model: DPO and its kin, one function for each published loss.

Symbols and shapes, the same in every function. G pairs; every tensor is (G,).

    chosen_logprobs, rejected_logprobs          float, nats   log policy(y) of each completion y, requires grad
    ref_chosen_logprobs, ref_rejected_logprobs  float, nats   log reference(y); no gradient passes
    w, l = log-ratio policy / reference of the chosen and of the rejected completion;   D = w - l
    beta  > 0: strength of the pull towards the reference; beta w and beta l are the implicit rewards

The caller reduces tokens to one log-probability a completion, with `sequence_logprobs` (sum) or `mean_logprobs` (per
token); each function says which of the two its paper means. Options that most functions share:

    soft_labels  (G,) float in [0, 1]   p = P(chosen is preferred), None = 1. The loss is the expected one,
                                        p L(chosen, rejected) + (1 - p) L(rejected, chosen)
    margins      (G,) float             m = how much better the chosen one is, in implicit reward, None = 0: m is taken
                                        off beta D. It belongs to the pair, so L(rejected, chosen) sees -m
    num_pairs    pairs in the whole optimizer step, None = those in this call

All raise ValueError on shapes that differ. Left out: terms that need tokens. A supervised term (CPO, RPO) is `sft_loss`
of the chosen completions, added by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from accord.losses.masked import Count, full_precision, masked_mean, require_same_shape

__all__ = [
    "PreferenceLoss",
    "apo_down_loss",
    "apo_zero_loss",
    "conservative_dpo_loss",
    "cpo_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "rdpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
]


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """loss () to differentiate, and of this call, detached:

    loss_sum             sum over pairs of what `loss` averages, soft labels and margins included; / pair_count
    correct_sum          pairs whose chosen completion has the larger implicit reward, equal counting half; / pair_count
    margin_sum           sum of chosen - rejected implicit reward; / pair_count
    chosen_reward_sum    sum of implicit rewards of the chosen ones: beta times log-ratio, or beta times log-probability
                         where there is no reference; / pair_count. Both may fall while the margin grows: watch both
    rejected_reward_sum  likewise of the rejected ones
    """

    loss: Tensor
    loss_sum: Tensor
    correct_sum: Tensor
    margin_sum: Tensor
    chosen_reward_sum: Tensor
    rejected_reward_sum: Tensor
    pair_count: Tensor


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation: Bradley-Terry over implicit rewards.

        loss = sum(-log sigmoid(beta D - m)) / num_pairs

    At policy = reference it is ln 2, with gradient -beta / 2 and +beta / 2. With a margin it is ln 2 at beta D = m.
    A soft label p has its minimum at beta D - m = log(p / (1 - p)).

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; margin: Amini et al. 2024, arXiv:2402.10571.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    losses = _expected_loss(_log_loss, chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def conservative_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """DPO that never trusts a label fully: it assumes that a share eps of the labels is wrong.

        d = beta D - m
        loss = sum(-((1 - eps) log sigmoid(d) + eps log sigmoid(-d))) / num_pairs

    The minimum of a certain label lies at d = log((1 - eps) / eps): unlike DPO it does not drive the pair apart
    for ever.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Args:
        label_smoothing: eps, in [0, 0.5); 0 is DPO.
    Source: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """

    def smoothed(d: Tensor) -> Tensor:
        return (1 - label_smoothing) * _log_loss(d) + label_smoothing * _log_loss(-d)

    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    losses = _expected_loss(smoothed, chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def robust_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """DPO with the bias of flipped labels taken out: in expectation over flips it is the loss of clean labels.

        d = beta D - m
        loss = sum(-((1 - eps) log sigmoid(d) - eps log sigmoid(-d)) / (1 - 2 eps)) / num_pairs

    A single pair's loss may be negative and is not bounded below.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Args:
        label_smoothing: eps, the share of labels that are flipped, in [0, 0.5); 0 is DPO.
    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """

    def unbiased(d: Tensor) -> Tensor:
        return ((1 - label_smoothing) * _log_loss(d) - label_smoothing * _log_loss(-d)) / (1 - 2 * label_smoothing)

    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    losses = _expected_loss(unbiased, chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    tau: float,
    soft_labels: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Identity preference optimisation: regression of the log-ratio difference to a finite target.

        loss = sum((D - 1 / (2 tau))^2) / num_pairs

    At policy = reference it is 1 / (4 tau^2). A soft label p has its minimum at D = (2 p - 1) / (2 tau). The implicit
    rewards reported are tau w and tau l.

    Shapes and options: head of this file. The paper's equation is about the probability of the whole completion, so
    log-probabilities are sums over the tokens. TRL and HALOs pass log-probabilities per token instead, after asking the
    authors, so that the target does not depend on length. The target 1 / (2 tau) is not comparable between the two: a
    tau that suits sums asks of means a change larger by the number of tokens.
    Args:
        tau: > 0; the larger, the nearer the policy stays to the reference.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    losses = _expected_loss(lambda d: (d - 1 / (2 * tau)).square(), chosen - rejected, soft_labels, None)
    return _record(losses, tau * chosen, tau * rejected, num_pairs)


def hinge_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Hinge over implicit rewards: a pair that is apart far enough teaches nothing more.

        loss = sum(max(0, 1 + m - beta D)) / num_pairs

    At policy = reference and m = 0 it is 1. From beta D = 1 + m on, loss and gradient are 0.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Source: Liu et al. 2023, arXiv:2309.06657; the hinge is that of SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, which
        has no reference.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    losses = _expected_loss(lambda d: torch.relu(1 - d), chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def rdpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    length_coef: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """DPO regularised in length: the part of a preference that length explains is not learned.

        loss = sum(-log sigmoid(beta D + alpha (chosen_length - rejected_length) - m)) / num_pairs

    It follows from the reward r(y) - alpha length(y), where DPO has r(y). The sign is the trap: a LONGER chosen
    completion makes the loss smaller and the gradient weaker. The implicit rewards reported are without the lengths.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
        chosen_lengths, rejected_lengths  (G,) int or float   tokens
    Args:
        length_coef: alpha, >= 0, implicit reward per token; 0 is DPO.
    Source: Park et al. 2024, arXiv:2403.19159.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    require_same_shape(pairs=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    longer = (chosen_lengths - rejected_lengths).to(chosen.dtype)
    losses = _expected_loss(_log_loss, chosen - rejected + length_coef * longer, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def simpo_loss(
    chosen_mean_logprobs: Tensor,
    rejected_mean_logprobs: Tensor,
    *,
    beta: float,
    gamma: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Simple preference optimisation: log-probabilities per token as rewards, no reference, a target margin.

        d = beta (chosen_mean_logprobs - rejected_mean_logprobs) - m
        loss = sum(-log sigmoid(d - gamma)) / num_pairs

    At equal log-probabilities it is ln(1 + e^gamma). gamma belongs to the loss, not to the pair: whichever completion
    is preferred has to win by gamma, so L(rejected, chosen) = -log sigmoid(-d - gamma).

    Shapes and options: head of this file. Log-probabilities are MEANS over the tokens (`mean_logprobs`).
    Args:
        beta: the paper uses 2 to 10, much more than DPO, because the log-probabilities are per token.
        gamma: >= 0; the authors' code takes gamma / beta instead, .1 to .8.
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    require_same_shape(chosen_mean_logprobs=chosen_mean_logprobs, rejected_mean_logprobs=rejected_mean_logprobs)
    chosen, rejected = beta * full_precision(chosen_mean_logprobs), beta * full_precision(rejected_mean_logprobs)
    losses = _expected_loss(lambda d: _log_loss(d - gamma), chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def cpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    beta: float,
    soft_labels: Tensor | None = None,
    margins: Tensor | None = None,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Contrastive preference optimisation, the preference term: DPO against a uniform reference.

        loss = sum(-log sigmoid(beta (chosen_logprobs - rejected_logprobs) - m)) / num_pairs

    Nothing holds the policy but the second term of the paper, the negative log-likelihood of the chosen completions:
    add `sft_loss`, whose mean is over tokens.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Source: Xu et al. 2024, arXiv:2401.08417. Departures: its second term is the caller's.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    require_same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    chosen, rejected = beta * full_precision(chosen_logprobs), beta * full_precision(rejected_logprobs)
    losses = _expected_loss(_log_loss, chosen - rejected, soft_labels, margins)
    return _record(losses, chosen, rejected, num_pairs)


def apo_zero_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Anchored preference optimisation, zero: the chosen completion goes up and the rejected one down, each by itself.

        loss = sum(1 - sigmoid(beta w) + sigmoid(beta l)) / num_pairs

    At policy = reference it is 1. For chosen completions that are better than what the policy writes.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266. Departures: 1 is added, so that the loss is positive.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    return _record(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected, num_pairs)


def apo_down_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    num_pairs: Count | None = None,
) -> PreferenceLoss:
    """Anchored preference optimisation, down: both completions go down, the rejected one further.

        loss = sum(sigmoid(beta w) + 1 - sigmoid(beta D)) / num_pairs

    At policy = reference it is 1. For chosen completions that are worse than what the policy writes.

    Shapes and options: head of this file. Log-probabilities are sums over the tokens.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266. Departures: 1 is added, so that the loss is positive.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    ratios = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = (beta * ratio for ratio in ratios)
    return _record(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected, num_pairs)


def _log_ratios(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """w and l, (G,) each: log policy / reference of the chosen and of the rejected completions."""
    require_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    return (
        full_precision(chosen_logprobs) - full_precision(ref_chosen_logprobs.detach()),
        full_precision(rejected_logprobs) - full_precision(ref_rejected_logprobs.detach()),
    )


def _log_loss(d: Tensor) -> Tensor:
    return -logsigmoid(d)


def _expected_loss(
    loss_of: Callable[[Tensor], Tensor], difference: Tensor, soft_labels: Tensor | None, margins: Tensor | None
) -> Tensor:
    """(G,) p loss_of(d) + (1 - p) loss_of(-d) with d = difference - margins: -d is d with the completions swapped."""
    zeros = torch.zeros_like(difference)
    margins = zeros if margins is None else full_precision(margins)
    soft_labels = zeros + 1 if soft_labels is None else full_precision(soft_labels)
    require_same_shape(pairs=difference, margins=margins, soft_labels=soft_labels)
    d = difference - margins
    return soft_labels * loss_of(d) + (1 - soft_labels) * loss_of(-d)


def _record(losses: Tensor, chosen: Tensor, rejected: Tensor, num_pairs: Count | None) -> PreferenceLoss:
    """The record of pairs with these losses (G,) and implicit rewards (G,)."""
    chosen, rejected = chosen.detach(), rejected.detach()
    everything = torch.ones_like(losses, dtype=torch.bool)
    return PreferenceLoss(
        loss=masked_mean(losses, everything, num_pairs),
        loss_sum=losses.detach().sum(),
        correct_sum=(chosen > rejected).sum() + 0.5 * (chosen == rejected).sum(),
        margin_sum=(chosen - rejected).sum(),
        chosen_reward_sum=chosen.sum(),
        rejected_reward_sum=rejected.sum(),
        pair_count=everything.sum(),
    )
