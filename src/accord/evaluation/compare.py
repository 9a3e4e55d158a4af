"""Models against each other on the same prompts: completions once, judged pairwise, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from accord.config import BestOfNConfig
from accord.data.order import micro_batches
from accord.data.templates import Template
from accord.losses.kl import kl_k1
from accord.measures.overlap import rouge_intervals
from accord.measures.statistics import cluster_interval, paired_difference, sign_flip_p_value, win_rate
from accord.measures.text import distinct_n, num_words, repetition
from accord.methods.candidates import Drawing, best_of, draw
from accord.models.ilql import ShapedPolicy
from accord.models.layout import CompletionBatch, collate
from accord.models.memory import one_pass
from accord.models.token_scores import score_tokens
from accord.records import Group, Interval, SampledCompletion, ScoreRequest, TokenCompletion, TokenGroup
from accord.rewards.scorers import Scorer, values_of
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling

__all__ = [
    "Answers",
    "BestOf",
    "Comparison",
    "Contestant",
    "answers_of",
    "compare",
    "describe",
    "kl_to",
    "reference_perplexity",
]


@dataclass(frozen=True, slots=True)
class BestOf:
    """How one of several answers is chosen: as many are sampled as `section` says, and the one that `scorer` puts
    highest, shaped as it says, is given."""

    scorer: Scorer
    section: BestOfNConfig


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model under evaluation, by the name it is shown with. With `best_of` it answers with the best of n samples:
    then it has no log-probabilities of its own, and `model` is the policy it samples from."""

    name: str
    model: Any
    template: Template
    best_of: BestOf | None = None

    @property
    def pad_id(self) -> int:
        return self.template.pad_id

    @torch.no_grad()
    def logprobs(
        self, batch: CompletionBatch, *, mask: Literal["loss", "valid"] = "valid", temperature: float = 1.0
    ) -> Tensor:
        """(C, T) log-probabilities of the completion tokens, nats, as the model samples them; `mask` as in
        `score_tokens`."""
        if isinstance(self.model, ShapedPolicy):
            scored = batch.valid_mask if mask == "valid" else batch.completion_mask
            return self.model.logprobs(batch, scored, temperature=temperature)
        return score_tokens(self.model, batch, mask=mask, temperature=temperature).logprobs


@dataclass(frozen=True, slots=True)
class Answers:
    """One completion for each prompt, with what every judge said of it. All tuples are in the prompts' order."""

    name: str
    tokens: tuple[TokenGroup, ...]
    sampled: tuple[SampledCompletion, ...]
    requests: tuple[ScoreRequest, ...]
    scores: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`name` over `base` by one judge: shares of wins and ties, win rate (ties a half), mean score difference, and the
    two-sided p value of "neither is better" (prompts' signs flipped at random)."""

    name: str
    base: str
    judge: str
    wins: float
    ties: float
    win_rate: Interval
    difference: Interval
    p_value: float


def answers_of(
    contestant: Contestant,
    prompts: Sequence[tuple[Group, TokenGroup]],
    sampling: Sampling,
    judges: dict[str, Scorer],
    key: tuple[int | str, ...],
) -> Answers:
    """Sample one completion for each prompt, or choose it, and have every judge score it, without knowing who wrote it.

    The key does not hold the contestant's name: equal models give equal answers, and the first that best-of-n chooses
    from is its policy's own.
    """
    sampled = _sampled(contestant, prompts, sampling, key)
    requests = tuple(
        ScoreRequest(group.prompt, contestant.template.decode(s.ids), s.finish_reason == "stop", tokens.prompt_id)
        for (group, tokens), s in zip(prompts, sampled, strict=True)
    )
    tokens = tuple(
        TokenGroup(t.prompt_ids, (TokenCompletion(s.ids, (True,) * len(s.ids)),), t.prompt_id)
        for (_, t), s in zip(prompts, sampled, strict=True)
    )
    scores = {name: tuple(values_of(judge, requests)) for name, judge in judges.items()}
    return Answers(contestant.name, tokens, sampled, requests, scores)


def _sampled(
    contestant: Contestant,
    prompts: Sequence[tuple[Group, TokenGroup]],
    sampling: Sampling,
    key: tuple[int | str, ...],
) -> tuple[SampledCompletion, ...]:
    """The answer to each prompt."""
    sampler, chooser = NativeSampler(contestant.model, pad_id=contestant.pad_id), contestant.best_of
    if chooser is None:
        wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts]
        return tuple(samples[0] for samples in sampler.generate(wanted, 1, sampling, key))
    drawing = Drawing(sampler, contestant.template, chooser.scorer, None)
    section = chooser.section
    drawn = draw(drawing, prompts, section.n, replace(sampling, temperature=section.temperature), section, key)
    return tuple(row[k] for row, k in zip(drawn.sampled, best_of(drawn.rewards, drawn.usable), strict=True))


def compare(answers: Answers, base: Answers, judge: str, tie_margin: float) -> Comparison:
    """Prompt by prompt: who scores higher; differences up to `tie_margin` are ties.

    A judge that scores answers one at a time has no order to be biased by, so one look at each pair is both.
    """
    ours, theirs = answers.scores[judge], base.scores[judge]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    outcomes = [0.5 if abs(gap) <= tie_margin else float(gap > 0) for gap in gaps]
    prompts = [request.prompt_id for request in answers.requests]
    return Comparison(
        answers.name,
        base.name,
        judge,
        wins=outcomes.count(1.0) / len(outcomes),
        ties=outcomes.count(0.5) / len(outcomes),
        win_rate=win_rate(outcomes, prompts),
        difference=paired_difference(ours, theirs, prompts),
        p_value=sign_flip_p_value([outcome - 0.5 for outcome in outcomes], prompts, seed=0),
    )


def describe(answers: Answers, references: Sequence[str | None]) -> dict[str, Interval | float]:
    """What can be said of one model's answers alone, by metric name."""
    prompts = [request.prompt_id for request in answers.requests]
    texts = [request.completion for request in answers.requests]
    facts: dict[str, Interval | float] = {
        "eval/completion_tokens/mean": cluster_interval([len(s.ids) for s in answers.sampled], prompts),
        "eval/completion_words/mean": cluster_interval([num_words(text) for text in texts], prompts),
        "eval/finished_fraction": win_rate([float(request.finished) for request in answers.requests], prompts),
        "eval/distinct_2": distinct_n(texts, 2),
        "eval/repetition": cluster_interval([repetition(text) for text in texts], prompts),
    }
    return facts | rouge_intervals(texts, references, prompts)


def kl_to(reference: Contestant, model: Contestant, answers: Answers, *, temperature: float, budget: int) -> Interval:
    """KL(model || reference) in nats per answer: the k1 estimator, sum over tokens of log(model / reference), averaged
    over the model's own samples. Unbiased; single samples may be negative."""
    totals: dict[int, float] = {}
    places = list(enumerate(answers.tokens))
    for rows in micro_batches(places, lambda row: row[1].num_tokens, lambda _: 1, budget):
        batch = collate([group for _, group in rows], layout="plain", pad_id=model.pad_id, device=model.model.device)
        with one_pass([group for _, group in rows], f"evaluating {model.name}"):
            ours, theirs = (contestant.logprobs(batch, temperature=temperature) for contestant in (model, reference))
        for (index, _), value in zip(rows, kl_k1(ours, theirs).sum(1).tolist(), strict=True):
            totals[index] = value
    prompts = [request.prompt_id for request in answers.requests]
    return cluster_interval([totals[index] for index in range(len(prompts))], prompts)


def reference_perplexity(contestant: Contestant, groups: Sequence[TokenGroup], budget: int) -> tuple[float, float]:
    """(summed negative log-likelihood in nats, counted tokens) of reference answers under the model."""
    nll = tokens = 0.0
    for rows in micro_batches(groups, lambda g: g.num_tokens, lambda _: 1, budget):
        batch = collate(rows, layout="plain", pad_id=contestant.pad_id, device=contestant.model.device)
        with one_pass(rows, f"evaluating {contestant.name}"):
            nll -= float(contestant.logprobs(batch, mask="loss").sum())
        tokens += float(batch.completion_mask.sum())
    return nll, tokens
