"""The scalar head of reward and value models: finding it, filling it, and moving the scores' mean to zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from accord.errors import ConfigError

__all__ = ["fill_head", "scalar_head", "shift_scores"]

# Added to the hidden states' covariance, as a share of its mean variance, so that directions in which the reference
# answers happen not to vary do not look free of cost.
_RIDGE = 1e-2


def scalar_head(model: nn.Module) -> nn.Linear:
    """The (1, H) linear layer that turns a hidden state into a score: `score` in every causal classification model."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ConfigError(
            f"{type(model).__name__} has no scalar head: found {head!r} under `score`, expected a linear layer "
            "with one output; use a causal model of transformers' sequence-classification kind with num_labels = 1"
        )
    return head


def fill_head(model: nn.Module, seed: int) -> None:
    """Fills the head with N(0, 1/(H + 1)) numbers that depend on `seed` alone, and its bias, if any, with zeros.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix B.1 (reward head with standard deviation 1/sqrt(H + 1)).
    """
    head = scalar_head(model)
    numbers = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(numbers / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            head.bias.zero_()


def shift_scores(reward_model: nn.Module, last_hidden: Tensor) -> float:
    """Changes the head so that the mean score over the given hidden states is 0; returns the residual.

    With a bias:     b' = b - mu                                     every score moves by -mu
    Without a bias:  w' = w - mu d,   d = S^-1 m / (m' S^-1 m)       the score of h moves by -mu d'h

    mu is the mean score, m the mean and S the covariance of the hidden states (with a small ridge). Of all directions d
    that move the mean by -mu (d'm = 1), this one moves single scores the least unevenly (least d'Sd). So the head alone
    carries the normalisation, and any reader of the saved model sees normalised scores.

    Shapes: last_hidden (M, H), the hidden states of M reference answers' last tokens (`last_hidden_states`).
    Returns: the standard deviation, in score units, of the moves around their mean; 0 with a bias.
    Raises: ValueError for no states, or for states whose mean is zero (no direction can move the mean).
    """
    head = scalar_head(reward_model)
    if last_hidden.dim() != 2 or not len(last_hidden):
        raise ValueError(f"last_hidden has shape {tuple(last_hidden.shape)}; expected (M, H) with M of at least 1")
    with torch.no_grad():
        states = last_hidden.detach().double()
        mean = states.mean(dim=0)
        weight = head.weight[0].double()
        if head.bias is not None:
            head.bias.copy_(-(mean @ weight))
            return 0.0
        spread = states - mean
        covariance = spread.t() @ spread / len(states)
        ridge = _RIDGE * covariance.diagonal().mean() + torch.finfo(torch.float32).eps * mean.square().mean()
        if not ridge > 0:
            raise ValueError("the reference answers' hidden states are all zero: no head can move their mean score")
        covariance.diagonal().add_(ridge)
        solved = torch.linalg.solve(covariance, mean)
        moves = solved * ((mean @ weight) / (mean @ solved))
        head.weight.copy_((weight - moves)[None])
        return float((spread @ moves).square().mean().sqrt())
