"""The heads of reward and value models: finding them, filling them, and moving the scores' mean to zero.

A value model has one output. A reward model has K: one, or an ensemble of K heads on one trunk, whose score is the mean
of theirs. In both the head is one linear layer, (K, H), and the model a plain transformers sequence classifier.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from accord.errors import ConfigError

__all__ = ["average_heads", "fill_head", "keep_heads", "scalar_head", "score_head", "shift_scores"]

# Added to the second moment, as a share of its mean, so that directions in which these answers happen not to vary do
# not look free of cost.
_RIDGE = 1e-3


def scalar_head(model: nn.Module) -> nn.Linear:
    """The (1, H) linear layer that turns a hidden state into a value: `score` in every causal classification model."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ConfigError(
            f"{type(model).__name__} has no scalar head: found {head!r} under `score`, expected a linear layer "
            "with one output; use a causal model of transformers' sequence-classification kind with num_labels = 1"
        )
    return head


def score_head(model: Any) -> nn.Linear:
    """The (K, H) linear layer of a reward model with K heads.

    A classifier of K > 1 classes has such a layer too, and its logits are no scores of one thing: an ensemble is known
    by `problem_type` = regression in its configuration, which is what reward models are saved with.
    """
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and model.config.problem_type == "regression":
        return head
    return scalar_head(model)


def average_heads(model: Any) -> None:
    """Puts one head in the place of K: their mean, so that its output is the mean of theirs."""
    head = score_head(model)
    if head.out_features > 1:
        bias = None if head.bias is None else head.bias.mean(0, keepdim=True)
        _put_head(model, head.weight.mean(0, keepdim=True), bias)


def keep_heads(model: Any, count: int) -> None:
    """Leaves the model its first `count` heads and drops the others."""
    head = score_head(model)
    if head.out_features > count:
        _put_head(model, head.weight[:count], None if head.bias is None else head.bias[:count])


def _put_head(model: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Puts a linear layer of these weights (K, H) and bias (K,) in the place of the model's head."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    model.score = head
    model.config.num_labels = model.num_labels = len(weight)


def fill_head(model: nn.Module, seed: int) -> None:
    """Fills each head with N(0, 1/(H + 1)) numbers that depend on `seed` alone, and its bias, if any, with zeros.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix B.1 (reward head with standard deviation 1/sqrt(H + 1)).
    """
    head = score_head(model)
    numbers = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(numbers / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            head.bias.zero_()


def shift_scores(reward_model: nn.Module, references: Tensor, answers: Tensor) -> float:
    """Changes each head so that the mean score of the references is 0 and all scores move alike; returns the residual.

    With a bias:     b' = b - mu                                     every score moves by -mu
    Without a bias:  w' = w - mu d,   d = S^-1 m / (m' S^-1 m)       the score of h moves by -mu d'h

    mu is the head's mean score and m the mean hidden state of the references; S = mean of (h - m)(h - m)' over
    references and answers, with a small ridge. Of all directions d that move the references' mean by -mu (d'm = 1),
    this one moves single scores the least unevenly: d'Sd is the mean square of d'h - 1. So the heads alone carry the
    normalisation, and any reader of the saved model sees normalised scores.

    S must include answers of all kinds. Over the references alone, the direction that tells good answers from bad ones
    hardly varies, would look free, and the shift would squash the very differences the model learned.

    Shapes: references (M, H), answers (N, H): hidden states of answers' last tokens (`last_hidden_states`).
    Returns: the root mean square, in score units, of how far single moves of single heads are from -mu; 0 with a bias.
    Raises: ValueError for no references, or for states that are all zero (no direction can move their mean).
    """
    head = score_head(reward_model)
    if references.dim() != 2 or not len(references):
        raise ValueError(f"references have shape {tuple(references.shape)}; expected (M, H) with M of at least 1")
    with torch.no_grad():
        mean = references.detach().double().mean(dim=0)
        weights = head.weight.double()
        levels = torch.stack([mean @ weight for weight in weights])  # (K,)
        if head.bias is not None:
            head.bias.copy_(-levels)
            return 0.0
        spread = torch.cat([references, answers]).detach().double() - mean
        moment = spread.t() @ spread / len(spread)
        ridge = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).eps * mean.square().mean()
        if not ridge > 0:
            raise ValueError("the reference answers' hidden states are all zero: no head can move their mean score")
        moment.diagonal().add_(ridge)
        solved = torch.linalg.solve(moment, mean)
        moves = (levels / (mean @ solved))[:, None] * solved
        head.weight.copy_(weights - moves)
        return float((spread @ moves.t()).square().mean().sqrt())
