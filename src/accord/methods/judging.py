"""From sampled texts to rewards: what the scorer says, which failures are borne, reference answers, running moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from accord.config import SamplingFields
from accord.records import LARGEST_SCORE, Message, Score, ScoreRequest
from accord.rewards.scorers import Scorer, failures_of
from accord.rewards.shaping import Moments, Samples, Shaped, compared, shape

__all__ = ["Failure", "ReferenceScores", "RewardState", "Verdicts", "judge", "score_metrics", "token_rewards_of"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A completion that could not be scored, and why."""

    request: ScoreRequest
    error: str


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What was said of completions, prompt after prompt; `value` of a failed one is None.

    references  the scores of each completion's reference answers, empty where shaping asks for none
    """

    scores: tuple[Score, ...]
    references: tuple[tuple[float, ...], ...]
    failures: tuple[Failure, ...]


class ReferenceScores:
    """The scores of each prompt's reference answers, asked for when the prompt first comes up.

    Every prompt is scored by itself, so its scores do not depend on which others come up beside it, and a continued run
    finds the same bits.
    """

    def __init__(self, scorer: Scorer, answers: Mapping[int, tuple[str, ...]]) -> None:
        self._scorer, self._answers = scorer, answers
        self._known: dict[int, tuple[float, ...]] = {}

    def of(self, prompt: tuple[Message, ...], prompt_id: int) -> tuple[float, ...] | str:
        """The scores, or why there are none."""
        if prompt_id not in self._known:
            requests = [ScoreRequest(prompt, text, prompt_id=prompt_id) for text in self._answers[prompt_id]]
            scores = self._scorer.score(requests)
            values = tuple(score.value for score in scores if score.value is not None)
            if len(values) < len(scores):
                return f"its reference answer: {next(score.error for score in scores if score.value is None)}"
            self._known[prompt_id] = values
        return self._known[prompt_id]


@dataclass(slots=True)
class RewardState:
    """What rewards depend on besides the completions: the moments of all scores so far, which survive a restart, and
    the reference scores, which are found again."""

    moments: Moments = field(default_factory=Moments)
    references: ReferenceScores | None = None

    def shape(self, scores: Tensor, samples: Samples, section: SamplingFields) -> Shaped:
        """Scores as rewards, after taking them into the moments."""
        if section.shaping.running != "none":
            self.moments = self.moments.merged(compared(scores, samples, section))
        return shape(scores, samples, section, self.moments)

    def reference_scores(self, prompts: Sequence[Sequence[ScoreRequest]]) -> list[tuple[float, ...] | str]:
        """For each completion the scores of its prompt's reference answers, or why there are none; empty where shaping
        asks for none."""
        if self.references is None:
            return [() for row in prompts for _ in row]
        return [self.references.of(row[0].prompt, row[0].prompt_id) for row in prompts for _ in row]

    def capture(self) -> dict[str, Any]:
        return {"count": self.moments.count, "mean": self.moments.mean, "squares": self.moments.squares}

    def restore(self, values: Mapping[str, Any]) -> None:
        self.moments = Moments(**values)


def judge(
    scorer: Scorer,
    prompts: Sequence[Sequence[ScoreRequest]],
    references: Sequence[tuple[float, ...] | str],
    max_failed_fraction: float,
    errors: Sequence[str | None] = (),
) -> Verdicts:
    """Score the completions of every prompt; `references` as `RewardState.reference_scores` gives them. Where reference
    answers failed, the completions that would be compared with them have. `errors` are what
    completions failed with already, None where they did not.

    Raises: RewardError naming the first failure when more than `max_failed_fraction` of the completions failed.
    """
    requests = [request for row in prompts for request in row]
    scores = [
        Score(None, reference) if isinstance(reference, str) and score.value is not None else score
        for reference, score in zip(references, scorer.score(requests), strict=True)
    ]
    scores = [_bounded(score) for score in scores]
    if errors:
        scores = [Score(None, error) if error else score for error, score in zip(errors, scores, strict=True)]
    failed = failures_of(scorer, requests, scores, max_fraction=max_failed_fraction)
    failures = tuple(Failure(requests[index], scores[index].error or "no reason given") for index in failed)
    compared = tuple(() if isinstance(reference, str) else reference for reference in references)
    return Verdicts(tuple(scores), compared, failures)


def _bounded(score: Score) -> Score:
    """A score that training cannot compute with is a failure: its square is not finite in float32."""
    if score.value is None or abs(score.value) <= LARGEST_SCORE:
        return score
    return Score(None, f"the score {score.value:.3g} is beyond +-{LARGEST_SCORE:g}, which float32 cannot square")


def score_metrics(scores: Iterable[Score]) -> dict[str, float]:
    """Of completions that were scored: the mean of each judge of several, and how far an ensemble disagrees."""
    parts: dict[str, list[float]] = {}
    spreads: list[float] = []
    for score in scores:
        for name, value in score.parts:
            parts.setdefault(name, []).append(value)
        if score.members:
            spreads.append(pstdev(score.members))
    metrics = {f"rollout/scorer/{name}/mean": fmean(values) for name, values in parts.items()}
    return metrics | ({"rollout/ensemble_std": fmean(spreads)} if spreads else {})


def token_rewards_of(scores: Sequence[Score], mask: Tensor) -> Tensor | None:
    """(C, T) what each token that the policy wrote earned; None where completions are judged whole."""
    if not any(score.tokens for score in scores):
        return None
    earned = torch.zeros(mask.shape)
    earned[mask] = torch.tensor([reward for score in scores for reward in score.tokens])
    return earned
