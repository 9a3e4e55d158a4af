"""Keeping a reward model's score apart from the length of the answer: two heads, of which one is thrown away.

The heads share a trunk and learn the comparisons by their sum. The terms here push what length explains of the score
into the length head and out of the quality heads. After training the length head is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.losses.masked import full_precision, require_same_shape

__all__ = ["LengthPenalty", "alignment_penalty", "correlation", "length_penalty"]


@dataclass(frozen=True, slots=True)
class LengthPenalty:
    """loss () to differentiate; detached, Pearson's r with length of each quality head's scores (K,) and of the length
    head's ()."""

    loss: Tensor
    quality: Tensor
    length_head: Tensor


def length_penalty(quality_scores: Tensor, length_scores: Tensor, lengths: Tensor) -> LengthPenalty:
    """Correlations with length: none for the quality heads, all of it for the length head.

        loss = mean over the K quality heads of |r(quality, length)| - r(length head, length)

    r is Pearson's over the completions given, which shall be those of the whole optimizer step: it is no mean over
    completions, so r of the parts does not give r of the whole. Whoever cuts a step into micro-batches computes this
    once for the whole step, from scores without a graph, and gives each micro-batch the derivative by its own scores:
    by the chain rule their gradients add up to the undivided step's.

    Shapes: C completions: quality_scores (C, K) float, length_scores (C,) float, lengths (C,) in tokens.
    Raises: ValueError on shapes that do not fit.
    Source: Chen et al. 2024, arXiv:2402.07319, the length loss. Departures: several quality heads; where a side is
        constant, r is undefined and is 0, without gradient.
    Tested by: tests/golden/test_golden_length.py, tests/property/test_losses_reward.py
    """
    require_same_shape(quality=quality_scores[:, 0], length_scores=length_scores, lengths=lengths)
    quality = correlation(quality_scores, lengths)
    length_head = correlation(length_scores[:, None], lengths)[0]
    return LengthPenalty(quality.abs().mean() - length_head, quality.detach(), length_head.detach())


def alignment_penalty(quality_weights: Tensor, length_weight: Tensor) -> Tensor:
    """Pulls the length head to stand at a right angle to the quality heads, so that they read different features.

        mean over the K quality heads of |w_q . w_l| / (|w_q| |w_l|)

    Shapes: quality_weights (K, H), length_weight (H,) -> (). A head of zeros is at a right angle to everything.
    Source: Chen et al. 2024, arXiv:2402.07319, the orthogonality loss |W_q W_l'|. Departures: divided by the norms, so
        that small weights do not pass for right angles; several quality heads.
    Tested by: tests/golden/test_golden_length.py
    """
    quality, length = full_precision(quality_weights), full_precision(length_weight)
    squares = quality.square().sum(1) * length.square().sum()
    return _over_root(quality @ length, squares, squares > 0).abs().mean()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """(K,) Pearson's r of each column of x (C, K) with y (C,), differentiable; 0 where a side is constant."""
    x, y = x.double(), y.double()[:, None]
    # Asked of the values themselves: the variance of equal numbers can miss 0 by a rounding.
    varies = (x.amax(0) > x.amin(0)) & (y.amax(0) > y.amin(0))
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    x_spread, y_spread = x_centred.square().sum(0), y_centred.square().sum(0)
    return _over_root((x_centred * y_centred).sum(0), x_spread * y_spread, varies)


def _over_root(numerator: Tensor, square: Tensor, defined: Tensor) -> Tensor:
    """numerator / sqrt(square) where defined, else 0 without gradient."""
    root = torch.where(defined, square, 1.0).sqrt()
    return torch.where(defined, numerator, 0.0) / root
