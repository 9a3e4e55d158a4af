"""The supervised loss: negative log-likelihood of the tokens the model should have written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from accord.losses.masked import Count, masked_mean, masked_sum

__all__ = ["SFTLoss", "sft_loss"]


@dataclass(frozen=True, slots=True)
class SFTLoss:
    """loss () to differentiate; nll_sum () nats and token_count () of this call, detached: add them up over
    micro-batches, then divide. Perplexity is exp(nll_sum / token_count)."""

    loss: Tensor
    nll_sum: Tensor
    token_count: Tensor


def sft_loss(logprobs: Tensor, loss_mask: Tensor, *, num_tokens: Count | None = None) -> SFTLoss:
    """Mean negative log-likelihood per counted token.

        loss = -sum(mask * logprobs) / num_tokens

    Lower is better; uniform guessing over V tokens costs ln V.

    Shapes: C completions, T tokens.
        logprobs   (C, T) float, nats   of the demonstrated tokens, requires grad
        loss_mask  (C, T) bool          True = counts
    Args:
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that differ.
    Source: maximum likelihood. Departures: a mean over tokens, so that a long answer weighs more than a short one (a
        mean of sequence means would weigh each answer the same).
    Tested by: tests/golden/test_golden_sft.py, tests/property/test_losses.py
    """
    return SFTLoss(
        loss=masked_mean(-logprobs, loss_mask, num_tokens),
        nll_sum=masked_sum(-logprobs.detach(), loss_mask),
        token_count=loss_mask.sum(),
    )
