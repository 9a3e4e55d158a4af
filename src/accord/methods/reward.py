"""The reward model's step: a scalar for an answer, from comparisons of answers to the same prompt.

    pair   = -log sigmoid(score(better) - score(worse) - margin)
    prompt = mean of its pairs + centring_coef * (2 * mean score of its answers)^2
    loss   = mean over heads of the mean over prompts of weight * prompt

The heads read the hidden state of the answer's last token, or with the span loss of every token from where the answers
part. With several heads each prompt counts in each head as often as a bootstrap draws it; with one, once. Length
decorrelation adds a head and three terms, see `LengthDecorrelation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from accord.losses.length import alignment_penalty, length_penalty
from accord.losses.masked import Count
from accord.losses.reward import RewardLoss, centring_penalty, divergence_span_loss, ranked_loss
from accord.methods.offline import PolicyLogprobs, Sums, group_passes
from accord.models.heads import score_head
from accord.models.layout import CompletionBatch, Layout, collate
from accord.models.memory import one_pass
from accord.models.token_scores import head_scores, token_head_scores
from accord.randomness import generator
from accord.records import TokenGroup

__all__ = [
    "Comparison",
    "LengthDecorrelation",
    "RewardObjective",
    "RewardStep",
    "bootstrap_weight",
    "compared",
    "read_scores",
]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to one prompt, as tokens, with their ranks (0 = best, equal = tie)."""

    tokens: TokenGroup
    ranks: tuple[int, ...]
    margin: float = 0.0
    soft_label: float = 1.0

    @property
    def is_tie(self) -> bool:
        """All answers have the same rank."""
        return len(set(self.ranks)) == 1

    @property
    def has_pairs(self) -> bool:
        """Two answers differ in rank and in tokens: of equal tokens, no score can put one above the other."""
        answers = zip(self.ranks, (completion.ids for completion in self.tokens.completions), strict=True)
        return any(a[0] != b[0] and a[1] != b[1] for a, b in combinations(answers, 2))


def bootstrap_weight(seed: int, head: int, prompt_id: int) -> int:
    """How often a head's bootstrap sample has a prompt: Poisson(1), what drawing n times out of n prompts comes to for
    large n. A function of its arguments alone; all comparisons of a prompt are drawn together.

    Source: Efron 1979, Annals of Statistics 7(1); Poisson draws: Oza & Russell 2001, AISTATS.
    """
    return int(generator("reward-bootstrap", seed, head, prompt_id).poisson(1.0))


def compared(
    items: Sequence[Comparison], scores: Tensor, *, weights: Tensor | None = None, num_groups: Count | None = None
) -> RewardLoss:
    """`ranked_loss` of the items' completions, whose scores (C,) stand in the items' order."""
    labels, options = _labels(items, scores.device), _options(items, scores.device)
    return ranked_loss(scores, *labels, weights=weights, num_groups=num_groups, **options)


def _labels(items: Sequence[Comparison], device: torch.device) -> tuple[Tensor, Tensor]:
    """(C,) ranks and group index."""
    ranks = torch.tensor([rank for item in items for rank in item.ranks], device=device)
    return ranks, torch.tensor([index for index, item in enumerate(items) for _ in item.ranks], device=device)


def _options(items: Sequence[Comparison], device: torch.device) -> dict[str, Tensor]:
    return {
        "margins": torch.tensor([item.margin for item in items], device=device),
        "soft_labels": torch.tensor([item.soft_label for item in items], device=device),
    }


def read_scores(model: Any, items: Sequence[Comparison], *, layout: Layout, pad_id: int, budget: int) -> list[Tensor]:
    """(n, K) scores of each item's n completions by every head of the model, in the items' order; without gradient, on
    the CPU."""
    result = [torch.empty(0)] * len(items)
    for indices in group_passes(range(len(items)), lambda i: items[i].tokens, layout, budget):
        batch = collate([items[i].tokens for i in indices], layout=layout, pad_id=pad_id, device=model.device)
        with torch.no_grad(), one_pass([items[i].tokens for i in indices], "scoring comparisons"):
            scores = head_scores(model, batch).cpu()
        parts = scores.split([len(items[i].ranks) for i in indices])
        for index, part in zip(indices, parts, strict=True):
            result[index] = part
    return result


@dataclass(frozen=True, slots=True)
class LengthSlopes:
    """What the length terms of a step come to: the derivative of the penalty by each score of an item, (n, K + 1), by
    the item's identity; and the correlations with length, of the quality (mean over heads) and of the length head."""

    of_item: dict[int, Tensor]
    quality: float
    length_head: float


class LengthDecorrelation:
    """Length decorrelation: K quality heads and, last, a length head that is thrown away after training.

        weight * (mean over quality heads of |r(quality, length)| - r(length head, length)
                  + mean over quality heads of |cos(their weights, the length head's)|)

    while the comparisons are learned by the sum of quality and length head. r is Pearson's over all answers of the
    optimiser step. It needs all of their scores before the first gradient, so they are read once more, without
    gradient; what micro-batches add up to is then exact (see `length_penalty`).
    Source: Chen et al. 2024, arXiv:2402.07319. Departures: one weight for all terms (the paper has 1 and 1), and those
        of the terms, see `losses/length.py`.

    read: scores (n, K + 1) of each item, as `read_scores` gives.
    """

    def __init__(self, weight: float, read: Callable[[Sequence[Comparison]], list[Tensor]]) -> None:
        self._weight, self._read = weight, read

    def begin(self, items: Sequence[Comparison]) -> LengthSlopes:
        parts = self._read(items)
        scores = torch.cat(parts).requires_grad_()
        lengths = torch.tensor([len(c.ids) for item in items for c in item.tokens.completions])
        penalty = length_penalty(scores[:, :-1], scores[:, -1], lengths)
        (slopes,) = torch.autograd.grad(penalty.loss, scores, allow_unused=True)
        slopes = torch.zeros_like(scores) if slopes is None else slopes
        by_item = slopes.split([len(part) for part in parts])
        return LengthSlopes(
            {id(item): slope for item, slope in zip(items, by_item, strict=True)},
            float(penalty.quality.mean()),
            float(penalty.length_head),
        )

    def term(
        self, model: Any, items: Sequence[Comparison], scores: Tensor, slopes: LengthSlopes, share: float
    ) -> Tensor:
        """What a micro-batch, `share` of the step's items, adds to the loss: the gradient is its part of the step's,
        the value means nothing."""
        weights = score_head(model).weight
        moved = (scores * torch.cat([slopes.of_item[id(item)] for item in items]).to(scores.device)).sum()
        return self._weight * (moved + share * alignment_penalty(weights[:-1], weights[-1]))


@dataclass(frozen=True, slots=True)
class RewardStep:
    """What a step's micro-batches need to know: its number of comparisons, and the length terms."""

    count: int
    slopes: LengthSlopes | None


class RewardObjective:
    """Bradley-Terry over the pairs of each prompt, every prompt weighing the same, plus the centring penalty.

    heads: quality heads, the model's first ones. seed: of their bootstrap. loss: of the scores of whole answers, or of
    every token from where they part. length: the model has a length head besides.
    """

    def __init__(
        self,
        centring_coef: float,
        *,
        heads: int = 1,
        seed: int = 0,
        loss: Literal["pairs", "divergence_span"] = "pairs",
        length: LengthDecorrelation | None = None,
    ) -> None:
        self._centring_coef, self._heads, self._seed, self._loss, self._length = (
            centring_coef,
            heads,
            seed,
            loss,
            length,
        )

    def tokens(self, item: Comparison) -> TokenGroup:
        return item.tokens

    def begin(self, items: Sequence[Comparison], logprobs: PolicyLogprobs) -> RewardStep:
        return RewardStep(len(items), None if self._length is None else self._length.begin(items))

    def loss(
        self, model: Any, items: Sequence[Comparison], batch: CompletionBatch, step: RewardStep
    ) -> tuple[Tensor, Sums]:
        by_token = token_head_scores(model, batch) if self._loss == "divergence_span" else None
        scores = head_scores(model, batch) if by_token is None else _at_last_token(by_token, batch)
        quality = scores[:, : self._heads]
        terms, sums = [], self._sums(items, quality.detach().mean(1))
        for head in range(self._heads):
            weights, own = self._weights(items, head, scores.device), quality[:, head]
            if by_token is None:
                judged = own if self._length is None else own + scores[:, self._heads]
                term = compared(items, judged, weights=weights, num_groups=step.count).loss
            else:
                span = divergence_span_loss(
                    by_token[:, :, head], batch.completion_ids, batch.valid_mask, *_labels(items, own.device),
                    weights=weights, num_groups=step.count, **_options(items, own.device),
                )  # fmt: skip
                term = span.loss
                sums["span_loss"] = sums.get("span_loss", 0.0) + float(span.span_loss_sum) / self._heads
            if self._centring_coef:
                penalty = centring_penalty(own, batch.group_index, weights=weights, num_groups=step.count)
                term = term + self._centring_coef * penalty
            terms.append(term)
        loss = torch.stack(terms).mean()
        if self._length is not None and step.slopes is not None:
            share = len(items) / step.count
            loss = loss + self._length.term(model, items, scores, step.slopes, share)
            sums |= {"length": share * step.slopes.quality, "length_head": share * step.slopes.length_head}
        return loss, sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        metrics = {
            "train/loss": sums["log_loss"] / max(1.0, sums["groups"]),
            "train/accuracy": sums["correct"] / max(1.0, sums["pairs"]),
            "train/margin/mean": sums["margin"] / max(1.0, sums["pairs"]),
            "train/score/mean": sums["score"] / max(1.0, sums["completions"]),
        }
        if "span_loss" in sums:
            metrics["train/span_loss"] = sums["span_loss"] / max(1.0, sums["groups"])
        if "length" in sums:
            metrics |= {
                "train/length_correlation": sums["length"],
                "train/length_head_correlation": sums["length_head"],
            }
        return metrics

    def _weights(self, items: Sequence[Comparison], head: int, device: torch.device) -> Tensor | None:
        """(G,) how often each item counts for this head; None for a single head, which sees the data as it is."""
        if self._heads == 1:
            return None
        drawn = [float(bootstrap_weight(self._seed, head, item.tokens.prompt_id)) for item in items]
        return torch.tensor(drawn, device=device)

    def _sums(self, items: Sequence[Comparison], scores: Tensor) -> Sums:
        """What the metrics are made of: the score that is used afterwards, on the data as it is."""
        result = compared(items, scores)
        return {
            "log_loss": float(result.log_loss_sum),
            "groups": float(result.group_count),
            "correct": float(result.correct_sum),
            "margin": float(result.score_margin_sum),
            "pairs": float(result.pair_count),
            "score": float(scores.sum()),
            "completions": float(len(scores)),
        }


def _at_last_token(scores: Tensor, batch: CompletionBatch) -> Tensor:
    """(C, K) of (C, T, K): each completion's score at its last token."""
    last = batch.valid_mask.sum(1) - 1
    return scores[torch.arange(len(scores), device=scores.device), last]
