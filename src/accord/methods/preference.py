"""Learning from pairs without a reward model: what makes a step of DPO and its kin, and of ORPO.

    loss = sum over the step's pairs of the pair's loss / number of pairs
         [+ sft_coef * sum over the best answers of -log policy(answer) / number of their tokens]

A prompt with K ranked answers is one item: its answers are run once, and every pair of different rank is a pair of
indices into them. Each pair weighs the same. Everything here needs one number a completion, the sum of its tokens'
log-probabilities, so training and held-out measurement share the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, TypedDict

import torch
from torch import Tensor

from accord.config import DPOConfig, ORPOConfig
from accord.data.convert import pair_margin
from accord.losses.masked import Count
from accord.losses.orpo import OddsRatioLoss, orpo_loss
from accord.losses.preference import (
    PreferenceLoss,
    apo_down_loss,
    apo_zero_loss,
    conservative_dpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    rdpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from accord.losses.sft import sft_loss
from accord.methods.offline import PolicyLogprobs, Sums
from accord.models.layout import CompletionBatch
from accord.models.token_scores import score_tokens
from accord.records import Group, TokenGroup

__all__ = [
    "REFERENCE_FREE",
    "Pair",
    "PairInputs",
    "PairObjective",
    "RankedAnswers",
    "StepCounts",
    "dpo_objective",
    "orpo_objective",
    "pair_indices",
    "ranked_answers",
]

# Those without a place for margins or soft labels: `accord.config.offline`.
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt by their index, with the margin (in implicit reward) and P(chosen is preferred)."""

    chosen: int
    rejected: int
    margin: float = 0.0
    soft_label: float = 1.0


@dataclass(frozen=True, slots=True)
class RankedAnswers:
    """Answers to one prompt, as tokens, and its pairs. `ref_logprobs`: the reference's log-probability of each answer,
    nats, summed over its tokens; empty where there is no reference."""

    tokens: TokenGroup
    pairs: tuple[Pair, ...]
    ref_logprobs: tuple[float, ...] = ()

    @property
    def best(self) -> tuple[int, ...]:
        """The answers that no other one beats."""
        return tuple(sorted({pair.chosen for pair in self.pairs} - {pair.rejected for pair in self.pairs}))

    @property
    def lengths(self) -> list[int]:
        """Counted tokens of each answer."""
        return [sum(completion.mask) for completion in self.tokens.completions]


def ranked_answers(group: Group, tokens: TokenGroup, *, use_margins: bool) -> RankedAnswers:
    """The item of a ranked group. Equal ranks and equal tokens make no pair, so there may be none."""
    pairs: list[Pair] = []
    for i, j in combinations(range(len(group.completions)), 2):
        first, second = group.completions[i], group.completions[j]
        if first.rank == second.rank or tokens.completions[i] == tokens.completions[j]:
            continue
        chosen, rejected = (i, j) if (first.rank or 0) < (second.rank or 0) else (j, i)
        margin = pair_margin(group, group.completions[chosen], group.completions[rejected]) if use_margins else None
        pairs.append(Pair(chosen, rejected, margin or 0.0, 1.0 if group.soft_label is None else group.soft_label))
    return RankedAnswers(tokens, tuple(pairs))


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What a loss of G pairs may read, (G,) each. Log-probabilities are sums over an answer's tokens or means, as the
    objective decides; the reference's are 0 where there is none. Lengths are counted tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    margins: Tensor
    soft_labels: Tensor

    def row(self, index: int) -> PairInputs:
        """One pair alone."""
        return PairInputs(*(getattr(self, field.name)[index : index + 1] for field in fields(self)))


LossOfPairs = Callable[[PairInputs, Count | None], PreferenceLoss | OddsRatioLoss]


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a whole step's terms are divided by: its pairs, and the tokens of its best answers."""

    pairs: int
    best_tokens: int

    @classmethod
    def of(cls, items: Sequence[RankedAnswers]) -> StepCounts:
        tokens = sum(item.lengths[index] for item in items for index in item.best)
        return cls(sum(len(item.pairs) for item in items), tokens)


class PairObjective:
    """A loss of pairs, with the SFT loss of the best answers beside it if `sft_coef` is not 0.

    average: answers' log-probabilities per token instead of their sums, the reference's too.
    """

    def __init__(self, loss_of_pairs: LossOfPairs, *, average: bool, sft_coef: float) -> None:
        self._loss_of_pairs, self._average, self._sft_coef = loss_of_pairs, average, sft_coef

    def tokens(self, item: RankedAnswers) -> TokenGroup:
        return item.tokens

    def begin(self, items: Sequence[RankedAnswers], logprobs: PolicyLogprobs) -> StepCounts:
        return StepCounts.of(items)

    def loss(
        self, model: Any, items: Sequence[RankedAnswers], batch: CompletionBatch, step: StepCounts
    ) -> tuple[Tensor, Sums]:
        return self.loss_of(items, score_tokens(model, batch, mask="loss").logprobs.sum(1), step)

    def loss_of(self, items: Sequence[RankedAnswers], logprobs: Tensor, step: StepCounts) -> tuple[Tensor, Sums]:
        """The loss of these items, given the policy's log-probability of each of their completions, (C,), summed."""
        chosen, rejected = pair_indices(items, logprobs.device)
        result = self._loss_of_pairs(self.inputs(items, logprobs), step.pairs)
        loss, detached = result.loss, logprobs.detach()
        sums = {
            "loss": float(result.loss_sum),
            "correct": float(result.correct_sum),
            "margin": float(result.margin_sum),
            "chosen_reward": float(result.chosen_reward_sum),
            "rejected_reward": float(result.rejected_reward_sum),
            "chosen_logprob": float(detached[chosen].sum()),
            "rejected_logprob": float(detached[rejected].sum()),
            "pairs": float(result.pair_count),
        }
        if isinstance(result, OddsRatioLoss):
            sums |= {"nll": float(result.nll_sum), "odds_ratio_loss": float(result.odds_ratio_loss_sum)}
        if self._sft_coef:
            best = logprobs[_best_indices(items, logprobs.device)][:, None]
            # One entry an answer, the sum over its tokens; what it is divided by is the number of tokens.
            imitation = sft_loss(best, torch.ones_like(best, dtype=torch.bool), num_tokens=step.best_tokens)
            loss = loss + self._sft_coef * imitation.loss
            tokens = sum(item.lengths[index] for item in items for index in item.best)
            sums |= {"best_nll": float(imitation.nll_sum), "best_tokens": float(tokens)}
        return loss, sums

    def inputs(self, items: Sequence[RankedAnswers], logprobs: Tensor) -> PairInputs:
        """What the pairs' loss reads, in the items' order."""
        device = logprobs.device
        chosen, rejected = pair_indices(items, device)
        pairs = [pair for item in items for pair in item.pairs]
        lengths = torch.tensor([length for item in items for length in item.lengths], device=device)
        known = [value for item in items for value in item.ref_logprobs]
        reference = logprobs.new_tensor(known) if known else torch.zeros_like(logprobs)
        scale = lengths.clamp_min(1) if self._average else 1
        policy, reference = logprobs / scale, reference / scale
        return PairInputs(
            policy[chosen], policy[rejected], reference[chosen], reference[rejected],
            lengths[chosen], lengths[rejected],
            torch.tensor([pair.margin for pair in pairs], device=device),
            torch.tensor([pair.soft_label for pair in pairs], device=device),
        )  # fmt: skip

    def margins(self, items: Sequence[RankedAnswers], logprobs: Tensor) -> list[float]:
        """Chosen less rejected implicit reward of every pair, in the items' order: the loss's own account of each."""
        inputs = self.inputs(items, logprobs)
        return [float(self._loss_of_pairs(inputs.row(i), None).margin_sum) for i in range(len(inputs.chosen))]

    def metrics(self, sums: Sums) -> dict[str, float]:
        pairs = max(1.0, sums["pairs"])
        values = {
            "train/loss": sums["loss"] / pairs,
            "train/accuracy": sums["correct"] / pairs,
            "train/margin/mean": sums["margin"] / pairs,
            "train/chosen_reward/mean": sums["chosen_reward"] / pairs,
            "train/rejected_reward/mean": sums["rejected_reward"] / pairs,
            "train/chosen_logprob/mean": sums["chosen_logprob"] / pairs,
            "train/rejected_logprob/mean": sums["rejected_logprob"] / pairs,
        }
        if "nll" in sums:
            values["train/imitation_loss"] = sums["nll"] / pairs
            values["train/odds_ratio_loss"] = sums["odds_ratio_loss"] / pairs
        if "best_nll" in sums:
            values["train/imitation_loss"] = sums["best_nll"] / max(1.0, sums["best_tokens"])
            values["train/loss"] += self._sft_coef * values["train/imitation_loss"]
        return values


def dpo_objective(section: DPOConfig) -> PairObjective:
    """The objective that a `dpo` section describes."""
    average = section.logprobs == "average" or (section.logprobs == "auto" and section.loss == "simpo")
    coef = section.sft_coef if section.sft_coef is not None else float(section.loss == "cpo")
    return PairObjective(lambda x, num_pairs: _dpo_loss(section, x, num_pairs), average=average, sft_coef=coef)


def orpo_objective(section: ORPOConfig) -> PairObjective:
    """The objective that an `orpo` section describes; its loss has the imitation of the chosen answers inside."""

    def loss_of_pairs(x: PairInputs, num_pairs: Count | None) -> OddsRatioLoss:
        return orpo_loss(x.chosen, x.rejected, odds_ratio_coef=section.odds_ratio_coef, num_pairs=num_pairs)

    return PairObjective(loss_of_pairs, average=True, sft_coef=0.0)


class _Options(TypedDict):
    soft_labels: Tensor
    margins: Tensor
    num_pairs: Count | None


def _dpo_loss(section: DPOConfig, x: PairInputs, num_pairs: Count | None) -> PreferenceLoss:
    """The published loss of that name, with what it reads."""
    policy = x.chosen, x.rejected
    both = *policy, x.ref_chosen, x.ref_rejected
    beta, smoothing = section.beta, section.label_smoothing
    options: _Options = {"soft_labels": x.soft_labels, "margins": x.margins, "num_pairs": num_pairs}
    match section.loss:
        case "dpo":
            return dpo_loss(*both, beta=beta, **options)
        case "conservative":
            return conservative_dpo_loss(*both, beta=beta, label_smoothing=smoothing, **options)
        case "robust":
            return robust_dpo_loss(*both, beta=beta, label_smoothing=smoothing, **options)
        case "ipo":
            return ipo_loss(*both, tau=beta, soft_labels=x.soft_labels, num_pairs=num_pairs)
        case "hinge":
            return hinge_loss(*both, beta=beta, **options)
        case "rdpo":
            lengths = x.chosen_lengths, x.rejected_lengths
            return rdpo_loss(
                *both, beta=beta, length_coef=section.length_coef,
                chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options,
            )  # fmt: skip
        case "simpo":
            return simpo_loss(*policy, beta=beta, gamma=section.target_margin, **options)
        case "cpo":
            return cpo_loss(*policy, beta=beta, **options)
        case "apo_zero":
            return apo_zero_loss(*both, beta=beta, num_pairs=num_pairs)
        case "apo_down":
            return apo_down_loss(*both, beta=beta, num_pairs=num_pairs)


def _offsets(items: Sequence[RankedAnswers]) -> list[int]:
    """Where each item's completions begin among all."""
    offsets = [0]
    for item in items:
        offsets.append(offsets[-1] + len(item.tokens.completions))
    return offsets[:-1]


def pair_indices(items: Sequence[RankedAnswers], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """(G,) int64 each: the completion of every pair's chosen and rejected answer."""
    places = [(start, pair) for start, item in zip(_offsets(items), items, strict=True) for pair in item.pairs]
    chosen = torch.tensor([start + pair.chosen for start, pair in places], device=device)
    return chosen, torch.tensor([start + pair.rejected for start, pair in places], device=device)


def _best_indices(items: Sequence[RankedAnswers], device: torch.device) -> Tensor:
    places = [start + i for start, item in zip(_offsets(items), items, strict=True) for i in item.best]
    return torch.tensor(places, device=device)
