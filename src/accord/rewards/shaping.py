"""From scores to rewards. The order is fixed, and every term is the change that its step makes:

    reference    compare with the scores of the prompt's reference answers       shaping.reference
    running      divide by the spread of all scores so far                       shaping.running
    clip         to +- score_clip
    length       less the price of tokens beyond a free length                   shaping.length_penalty
    overlong     less the price of coming near max_new_tokens                    shaping.overlong_buffer
    repetition   less the share of repeated n-grams                              shaping.repetition_penalty
    diversity    plus the share of n-grams the prompt's other samples lack       shaping.diversity_bonus
    truncation   what it costs to be cut by length                               shaping.truncation
    environment  plus what the environment of a conversation gave                environment

so score + sum of terms = reward. What a method subtracts for leaving the reference model comes after.

Legend: C completions, in the order of their prompts. Scores and rewards are in units of the scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.config import SamplingFields
from accord.measures.text import novelty, repetition

__all__ = [
    "Moments",
    "Samples",
    "Shaped",
    "compared",
    "length_penalty",
    "overlong_penalty",
    "par",
    "reference_difference",
    "running_normalised",
    "shape",
]

_SMALLEST_SPREAD = 1e-4
"""Scores that differ by less count as equal, and are not divided by their spread."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What shaping looks at besides the scores, C completions.

    texts       what the policy wrote; groups  the places of each prompt's completions
    lengths     (C,) tokens, end token included; finished (C,) bool, False = cut by length
    references  the scores of each completion's reference answers, all empty where shaping asks for none
    earned      (C,) what an environment gave; None without one
    """

    texts: Sequence[str]
    groups: Sequence[Sequence[int]]
    lengths: Tensor
    finished: Tensor
    references: Sequence[tuple[float, ...]] = ()
    earned: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shaped:
    """rewards (C,); terms (C,) each, those that are switched on; learned (C,) bool, False = left out of the loss."""

    rewards: Tensor
    terms: dict[str, Tensor]
    learned: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all scores seen."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values: Tensor) -> Moments:
        """With more values: exactly (but for rounding) the moments of all values at once.

            n = n_a + n_b;  delta = mean_b - mean_a;  mean = mean_a + delta n_b / n
            squares = squares_a + squares_b + delta^2 n_a n_b / n

        Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance". In float64.
        Tested by: tests/golden/test_golden_shaping.py, tests/property/test_shaping_properties.py
        """
        new = values.double()
        if not new.numel():
            return self
        mean, count = float(new.mean()), self.count + new.numel()
        delta = mean - self.mean
        squares = float((new - mean).square().sum())
        return Moments(
            count,
            self.mean + delta * new.numel() / count,
            self.squares + squares + delta**2 * self.count * new.numel() / count,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first value."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


def reference_difference(scores: Tensor, references: Sequence[tuple[float, ...]]) -> Tensor:
    """Score less the mean score of the prompt's M reference answers: s - sum_m r_m / M.

    Shapes: scores (C,) -> (C,). Raises: ValueError where a completion has no reference.
    Source: Stiennon et al. 2020, arXiv:2009.01325 (rewards centred at the reference summaries). Departures:
        the prompt's own references instead of their mean over the data.
    Tested by: tests/golden/test_golden_shaping.py
    """
    return scores - _references(scores, references, lambda row, score: row.mean())


def par(scores: Tensor, references: Sequence[tuple[float, ...]]) -> Tensor:
    """Preference as reward: mean_m sigmoid(s - r_m), in [0, 1]; 1/2 = as good as the reference answers.

    Bounded, and steepest where score and reference are alike: a score that climbs far beyond earns no more.
    Shapes: scores (C,) -> (C,). Raises: ValueError where a completion has no reference.
    Source: Fu et al. 2025, arXiv:2502.18770. Departures: none; M is however many references a prompt has.
    Tested by: tests/golden/test_golden_shaping.py, tests/property/test_shaping_properties.py
    """
    return _references(scores, references, lambda row, score: torch.sigmoid(score - row).mean())


def running_normalised(scores: Tensor, moments: Moments, *, centre: bool) -> Tensor:
    """s / std, or (s - mean) / std with `centre`; a std below 1e-4 divides nothing.

    Shapes: scores (C,) -> (C,).
    Source: Engstrom et al. 2020, arXiv:2005.12729 (reward scaling). Departures: of scores, not of discounted returns.
    Tested by: tests/golden/test_golden_shaping.py
    """
    spread = moments.std if moments.std > _SMALLEST_SPREAD else 1.0
    return (scores - moments.mean if centre else scores) / spread


def length_penalty(lengths: Tensor, *, coef: float, free: int) -> Tensor:
    """-coef * max(0, tokens - free).

    Shapes: lengths (C,) int -> (C,) float. Units: `coef` is in score per token.
    Source: Singhal et al. 2023, arXiv:2310.03716 (a penalty on length). Departures: linear beyond `free`.
    Tested by: tests/golden/test_golden_shaping.py
    """
    return -coef * (lengths - free).clamp_min(0).to(torch.get_default_dtype())


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int, penalty: float) -> Tensor:
    """-penalty * clip((tokens - (longest - buffer)) / buffer, 0, 1): 0 up to the buffer, all of it at `longest`.

    Shapes: lengths (C,) int -> (C,) float. Raises: ValueError for an empty buffer.
    Source: Yu et al. 2025, arXiv:2503.14476 (DAPO), soft overlong punishment. Departures: `penalty` scales it.
    Tested by: tests/golden/test_golden_shaping.py
    """
    if buffer < 1:
        raise ValueError(f"the buffer must have at least one token, found {buffer}")
    return -penalty * ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def shape(scores: Tensor, samples: Samples, section: SamplingFields, moments: Moments) -> Shaped:
    """Scores (C,) as rewards, by the order at the top of this file. `moments` already hold what `running` divides by:
    those of the scores after `reference`, see `compared`."""
    shaping, rewards = section.shaping, scores
    terms: dict[str, Tensor] = {}

    def becomes(name: str, changed: Tensor) -> None:
        nonlocal rewards
        terms[name], rewards = changed - rewards, changed

    if shaping.reference != "none":
        becomes("reference", compared(scores, samples, section))
    if shaping.running != "none":
        becomes("running", running_normalised(rewards, moments, centre=shaping.running == "standardise"))
    clip = getattr(section, "score_clip", None)  # of methods that learn from a rollout
    if clip is not None:
        becomes("clip", rewards.clamp(-clip, clip))
    for name, term in _prices(samples, section).items():
        becomes(name, rewards + term.to(rewards.dtype))
    cut, penalty = ~samples.finished, section.missing_eos_penalty
    if shaping.truncation == "replace":
        becomes("truncation", torch.where(cut, torch.full_like(rewards, -penalty), rewards))
    elif shaping.truncation == "penalise" and penalty > 0:
        becomes("truncation", rewards - penalty * cut)
    if samples.earned is not None:
        becomes("environment", rewards + samples.earned)
    learned = samples.finished if shaping.truncation == "leave_out" else torch.ones_like(samples.finished)
    return Shaped(rewards, terms, learned)


def compared(scores: Tensor, samples: Samples, section: SamplingFields) -> Tensor:
    """(C,) scores after `shaping.reference`."""
    if section.shaping.reference == "none":
        return scores
    function = par if section.shaping.reference == "par" else reference_difference
    return function(scores, samples.references)


def _prices(samples: Samples, section: SamplingFields) -> dict[str, Tensor]:
    """(C,) what text and length cost or earn, by term."""
    shaping = section.shaping
    terms: dict[str, Tensor] = {}
    if shaping.length_penalty > 0:
        terms["length"] = length_penalty(samples.lengths, coef=shaping.length_penalty, free=shaping.length_free)
    if shaping.overlong_buffer > 0:
        terms["overlong"] = overlong_penalty(
            samples.lengths,
            longest=section.max_own_tokens,
            buffer=shaping.overlong_buffer,
            penalty=shaping.overlong_penalty,
        )
    if shaping.repetition_penalty > 0:
        terms["repetition"] = -shaping.repetition_penalty * torch.tensor([repetition(text) for text in samples.texts])
    if shaping.diversity_bonus > 0:
        terms["diversity"] = shaping.diversity_bonus * _novelty(samples)
    return terms


def _novelty(samples: Samples) -> Tensor:
    """(C,) the share of each completion's n-grams that the prompt's other samples lack."""
    shares = torch.zeros(len(samples.texts))
    for group in samples.groups:
        for place, row in enumerate(group):
            others = [samples.texts[other] for other in (*group[:place], *group[place + 1 :])]
            shares[row] = novelty(samples.texts[row], others)
    return shares


def _references(scores: Tensor, references: Sequence[tuple[float, ...]], function: Any) -> Tensor:
    """(C,) `function` of each completion's reference scores and its own score."""
    if len(references) != len(scores) or not all(references):
        raise ValueError("every completion needs the score of a reference answer")
    rows = [torch.tensor(row, dtype=scores.dtype) for row in references]
    return torch.stack([function(row, score) for row, score in zip(rows, scores, strict=True)])
