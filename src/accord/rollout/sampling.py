"""How the next token is chosen from logits: temperature, top-k, top-p, and one uniform number per token.

Pure functions on tensors; no model and no random generator lives here.
Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "adjusted_logits", "choose"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    max_new_tokens  most tokens written after the prompt, the stop token included
    temperature     logits are divided by it; 0 = greedy
    top_k           only the k likeliest tokens; 0 = all
    top_p           only the smallest set of likeliest tokens whose mass reaches it; 1 = all
    min_new_tokens  stop tokens have probability 0 before this many tokens are written
    stop_ids        tokens that end a completion; they belong to it
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 = greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number in (0, 1] (1 = all tokens)")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; expected 0 to max_new_tokens = {self.max_new_tokens}"
            )
        if any(token < 0 for token in self.stop_ids):
            raise ValueError(f"stop_ids is {self.stop_ids}; expected token ids >= 0")


def adjusted_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """The unnormalised log-probabilities tokens are drawn from: scaled by temperature, then top-k, then top-p.

        z = (logits - max(logits)) / temperature
        top-k: keep z >= the k-th largest z            (tokens tied with the k-th stay, whatever their order)
        top-p: of what is left, in decreasing order, keep a token while the mass before it is < top_p

    Removed tokens are -inf; the likeliest token is 0 and always stays. Needs temperature > 0.

    Shapes: logits (B, V) any float; returns (B, V) float32.
    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, arXiv:1904.09751, eq. 2 (top-p).
    """
    scaled = logits.float()
    # Shifting before dividing keeps a tiny temperature finite: the maximum stays 0, the rest fall towards -inf.
    scaled = (scaled - scaled.max(dim=-1, keepdim=True).values) / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        threshold = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -math.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().softmax(dim=-1)
        removed = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        scaled = scaled.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -math.inf)
    return scaled


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the cumulative distribution, in vocabulary order.

        w = exp(adjusted_logits);  F_i = w_0 + ... + w_i  (float64)
        id = the first i with F_i > u F_{V-1};  logprob = log(w_id / F_{V-1})

    A token of probability 0 adds nothing to F, so it is never the first to exceed: this holds for every u in [0, 1).
    One uniform per token is far cheaper than V exponentials. Temperature 0 takes the likeliest token, with logprob 0:
    the distribution is a point mass.

    Shapes: logits (B, V) float; uniforms (B,) float64 in [0, 1); returns ids (B,) int64, logprobs (B,) float32, nats.
    Rows whose logits are not finite get some valid id and a logprob that is not finite: the caller must check.
    """
    if sampling.temperature == 0:
        best = logits.max(dim=-1)
        return best.indices, (best.values - best.values).float()
    scaled = adjusted_logits(logits, sampling)
    cumulative = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    ids = ids.clamp_(max=logits.shape[-1] - 1)  # NaN sorts past the end
    return ids[:, 0], (scaled.gather(1, ids) - total.log())[:, 0].float()
