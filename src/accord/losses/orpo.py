"""Odds-ratio preference optimisation: supervised learning and preference in one stage, without a reference model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from accord.losses.masked import Count, full_precision, masked_mean, require_same_shape

__all__ = ["OddsRatioLoss", "orpo_loss"]

_LARGEST_LOGPROB = -1e-7
"""float32 cannot tell a log-probability this close to 0 from 0, where the odds are infinite."""


@dataclass(frozen=True, slots=True)
class OddsRatioLoss:
    """loss () to differentiate, and of this call, detached, all / pair_count:

    loss_sum             sum over pairs of what `loss` averages
    nll_sum              sum of the negative mean log-probabilities of the chosen completions, nats per token
    odds_ratio_loss_sum  sum of -log sigmoid(log odds ratio), before the coefficient
    correct_sum          pairs whose chosen completion has the larger odds, equal counting half
    margin_sum           sum of the log odds ratios, = chosen_reward_sum - rejected_reward_sum
    chosen_reward_sum, rejected_reward_sum   sums of log odds, which take the place of implicit rewards
    """

    loss: Tensor
    loss_sum: Tensor
    nll_sum: Tensor
    odds_ratio_loss_sum: Tensor
    correct_sum: Tensor
    margin_sum: Tensor
    chosen_reward_sum: Tensor
    rejected_reward_sum: Tensor
    pair_count: Tensor


def orpo_loss(
    chosen_mean_logprobs: Tensor,
    rejected_mean_logprobs: Tensor,
    *,
    odds_ratio_coef: float,
    num_pairs: Count | None = None,
) -> OddsRatioLoss:
    """Negative log-likelihood of the chosen completion plus a penalty unless its odds are the larger.

        log_odds(a) = a - log(1 - exp(a))
        loss = sum(-chosen + odds_ratio_coef * -log sigmoid(log_odds(chosen) - log_odds(rejected))) / num_pairs

    At equal log-probabilities the penalty is ln 2.

    Shapes: G pairs; chosen_mean_logprobs, rejected_mean_logprobs (G,) float, nats, requires grad: MEANS over the tokens
        (`mean_logprobs`). Of sums the odds are those of an event of probability nearly 0, and the ratio is no
        different from that of the probabilities.
    Args:
        odds_ratio_coef: lambda, >= 0. The paper uses .1 to .25.
        num_pairs: pairs in the whole optimizer step. None = those in this call.
    Above -1e-7 nats per token a log-probability counts as -1e-7 in the odds, without gradient there: value and gradient
    are finite up to certainty. 1 - exp(a) goes through expm1, which keeps all digits there.
    Raises: ValueError on shapes that differ.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7. Departures: the first term is a mean of per-completion
        means, over the completion's tokens only (the authors' code includes the prompt by default; TRL averages over
        all tokens of the batch).
    Tested by: tests/golden/test_golden_orpo.py, tests/property/test_losses_preference.py
    """
    require_same_shape(chosen_mean_logprobs=chosen_mean_logprobs, rejected_mean_logprobs=rejected_mean_logprobs)
    nll = -full_precision(chosen_mean_logprobs)
    chosen, rejected = _log_odds(chosen_mean_logprobs), _log_odds(rejected_mean_logprobs)
    penalties = -logsigmoid(chosen - rejected)
    losses = nll + odds_ratio_coef * penalties
    chosen, rejected = chosen.detach(), rejected.detach()
    everything = torch.ones_like(losses, dtype=torch.bool)
    return OddsRatioLoss(
        loss=masked_mean(losses, everything, num_pairs),
        loss_sum=losses.detach().sum(),
        nll_sum=nll.detach().sum(),
        odds_ratio_loss_sum=penalties.detach().sum(),
        correct_sum=(chosen > rejected).sum() + 0.5 * (chosen == rejected).sum(),
        margin_sum=(chosen - rejected).sum(),
        chosen_reward_sum=chosen.sum(),
        rejected_reward_sum=rejected.sum(),
        pair_count=everything.sum(),
    )


def _log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, any shape."""
    logprobs = full_precision(logprobs).clamp_max(_LARGEST_LOGPROB)
    return logprobs - torch.log(-torch.expm1(logprobs))
