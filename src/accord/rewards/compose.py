"""One score from several: the members of an ensemble, and judges of different kinds with weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Literal

from accord.records import Score, ScoreRequest
from accord.rewards.scorers import Scorer

__all__ = ["Combination", "ComposedScorer", "EnsembleScorer", "Weighted", "combined"]

Combination = Literal["mean", "worst", "uncertainty"]


def combined(members: Sequence[float], how: Combination, uncertainty_coef: float) -> float:
    """What an ensemble says, from what its K members say.

        mean         sum_k m_k / K
        worst        min_k m_k                                                   (worst-case optimisation)
        uncertainty  mean - uncertainty_coef * sum_k (m_k - mean)^2 / K          (uncertainty-weighted optimisation)

    Units: scores; `uncertainty_coef` is in 1 / score, so members must be on one scale.
    Source: Coste et al. 2023, arXiv:2310.02743. Departures: none.
    Tested by: tests/golden/test_golden_shaping.py, tests/property/test_shaping_properties.py
    """
    if how == "worst":
        return min(members)
    mean = fmean(members)
    return mean if how == "mean" else mean - uncertainty_coef * pvariance(members, mean)


class EnsembleScorer:
    """Several scorers of one kind, or one with several heads, as one. Where a member fails the ensemble does."""

    def __init__(self, scorers: Sequence[Scorer], how: Combination, uncertainty_coef: float) -> None:
        self.name = " and ".join(scorer.name for scorer in scorers)
        self.wants_tokens = any(scorer.wants_tokens for scorer in scorers)
        self._scorers, self._coef = scorers, uncertainty_coef
        self._how: Combination = how

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(scores) for scores in zip(*(s.score(requests) for s in self._scorers), strict=True)]

    def _one(self, scores: Sequence[Score]) -> Score:
        members: list[float] = []
        for scorer, score in zip(self._scorers, scores, strict=True):
            if score.value is None:
                return Score(None, f"{scorer.name}: {score.error}" if len(scores) > 1 else score.error)
            members += score.members or (score.value,)
        value = combined(members, self._how, self._coef)
        return Score(value, members=tuple(members) if len(members) > 1 else ())


@dataclass(frozen=True, slots=True)
class Weighted:
    """A judge in a composition: the name the recipe gives it, and its weight."""

    name: str
    scorer: Scorer
    weight: float


class ComposedScorer:
    """Judges whose weighted scores add up. Where one fails the sum does, with its name; each score stays in `parts`.

    `members` is what the sum would be with each member of an ensemble in the ensemble's place.
    """

    def __init__(self, judges: Sequence[Weighted]) -> None:
        self.name = " + ".join(f"{judge.weight:g} x {judge.name}" for judge in judges)
        self.wants_tokens = any(judge.scorer.wants_tokens for judge in judges)
        self._judges = judges

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(scores) for scores in zip(*(j.scorer.score(requests) for j in self._judges), strict=True)]

    def _one(self, scores: Sequence[Score]) -> Score:
        total, parts, failed = 0.0, [], None
        for judge, score in zip(self._judges, scores, strict=True):
            if score.value is None:
                failed = failed or f"{judge.name}: {score.error}"
            else:
                total += judge.weight * score.value
                parts.append((judge.name, score.value))
        if failed:
            return Score(None, failed, parts=tuple(parts))
        judged = list(zip((judge.weight for judge in self._judges), scores, strict=True))
        members = [total + w * (m - s.value) for w, s in judged if s.value is not None for m in s.members]
        tokens = [[w * reward for reward in s.tokens] for w, s in judged if s.tokens]
        return Score(total, None, tuple(members), tuple(map(sum, zip(*tokens, strict=True))), tuple(parts))
