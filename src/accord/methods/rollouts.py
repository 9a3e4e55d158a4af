"""One rollout: completions of a step's prompts, their scores, and the log-probabilities every online method needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from accord.config import RolloutFields
from accord.data.templates import Template
from accord.errors import RewardError
from accord.methods.judging import Failure, RewardState, Verdicts, judge
from accord.methods.offline import group_passes
from accord.methods.watch import Watch, heard
from accord.models.adapters import adapters_off
from accord.models.layout import CompletionBatch, Layout, collate
from accord.models.token_scores import score_tokens
from accord.records import Group, SampledCompletion, Score, ScoreRequest, TokenCompletion, TokenGroup
from accord.rewards.scorers import Scorer, values_of
from accord.rewards.shaping import Samples, Shaped
from accord.rollout.native import PromptTokens, Sampler
from accord.rollout.sampling import Sampling

__all__ = ["Prompt", "Rollout", "RolloutModels", "collect", "first_answers", "padded", "per_token"]

Prompt = tuple[Group, TokenGroup]


@dataclass(frozen=True, slots=True)
class Rollout:
    """All completions of one step. C completions in group order, T tokens of the longest.

    groups        token groups, each prompt with its sampled completions
    requests      the same completions as text, in the same order
    verdicts      what the scorer said of each; failures are those of prompts that were left out because of them
    shaped        the rewards made of the scores, by term, and which completions are learned from
    gold          (C,) what the hidden truth says, None without one
    mask          (C, T) bool, True = a token the policy wrote; what others wrote in between is False
    old_logprobs, ref_logprobs  (C, T) nats, 0 where the mask is False
    sampler_logprobs  (C, T) nats, of the distribution that was sampled from, as the sampler gives them
    watched       metrics of what the answers are beside those before training; see `accord.methods.watch`
    """

    groups: tuple[TokenGroup, ...]
    requests: tuple[ScoreRequest, ...]
    verdicts: tuple[Score, ...]
    failures: tuple[Failure, ...]
    shaped: Shaped
    gold: Tensor | None
    mask: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor
    ref_logprobs: Tensor
    generate_seconds: float
    score_seconds: float
    watched: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> Tensor:
        """(C,) what the scorer said."""
        return torch.tensor([score.value for score in self.verdicts])

    @property
    def finished(self) -> Tensor:
        """(C,) bool, ended by a stop token."""
        return torch.tensor([request.finished for request in self.requests])

    @property
    def sampler_deviation(self) -> float:
        """Largest |p_sampler / p_old - 1| of a token: 0 when the old ones are the sampler's."""
        return float(((self.sampler_logprobs - self.old_logprobs).exp() - 1)[self.mask].abs().max())

    @property
    def group_index(self) -> Tensor:
        """(C,) int64, the group of each completion."""
        return torch.tensor([g for g, group in enumerate(self.groups) for _ in group.completions])


@dataclass(frozen=True, slots=True)
class RolloutModels:
    """Who takes part in a rollout. The reference may be the policy itself, if it has an adapter: then it is asked
    without it. `rewards` is what remains of earlier rollouts' scores."""

    policy: Any
    reference: Any
    sampler: Sampler
    template: Template
    scorer: Scorer
    gold: Scorer | None
    layout: Layout
    rewards: RewardState = field(default_factory=RewardState, kw_only=True)
    watch: Watch | None = field(default=None, kw_only=True)


def collect(
    models: RolloutModels, prompts: Sequence[Prompt], section: RolloutFields, key: tuple[int | str, ...]
) -> Rollout:
    """Sample, score, and run the reference once over everything that was scored."""
    started = time.monotonic()
    sampled = _sampled(models, prompts, section, section.samples_per_prompt, key)
    generated = time.monotonic()
    asked = [
        tuple(_request(models, group, tokens, sample) for sample in samples)
        for (group, tokens), samples in zip(prompts, sampled, strict=True)
    ]
    with heard(None if models.watch is None else models.watch.head) as states:
        verdicts = judge(models.scorer, asked, models.rewards.references, section.max_failed_fraction)
    kept, rows = _kept(asked, verdicts)
    groups = tuple(_with_samples(prompts[p][1], sampled[p]) for p in kept)
    requests = tuple(request for p in kept for request in asked[p])
    mask = padded([list(c.mask) for group in groups for c in group.completions], False)
    sampled_logprobs = padded([list(s.logprobs) for p in kept for s in sampled[p]], 0.0)

    def logprobs(model: Any) -> Tensor:
        return per_token(
            groups, models, section.micro_batch_tokens, mask.shape[1],
            lambda batch: score_tokens(model, batch, temperature=section.temperature, mask="loss").logprobs,
        )  # fmt: skip

    old = logprobs(models.policy) if section.old_logprobs == "recompute" else sampled_logprobs
    with adapters_off(models.reference):
        ref_logprobs = logprobs(models.reference)
    return Rollout(
        groups=groups,
        requests=requests,
        verdicts=tuple(verdicts.scores[row] for row in rows),
        failures=verdicts.failures,
        shaped=_shaped(models.rewards, verdicts, rows, groups, requests, section),
        gold=None if models.gold is None else torch.tensor(values_of(models.gold, requests)),
        mask=mask,
        old_logprobs=old,
        sampler_logprobs=sampled_logprobs,
        ref_logprobs=ref_logprobs,
        generate_seconds=generated - started,
        watched={} if models.watch is None else models.watch.metrics(requests, states),
        score_seconds=time.monotonic() - generated,
    )


def _request(models: RolloutModels, group: Group, tokens: TokenGroup, sample: SampledCompletion) -> ScoreRequest:
    template = models.template
    return ScoreRequest(
        group.prompt,
        template.decode(sample.ids),
        sample.finish_reason == "stop",
        tokens.prompt_id,
        template.token_texts(sample.ids) if models.scorer.wants_tokens else (),
    )


def _kept(asked: Sequence[Sequence[ScoreRequest]], verdicts: Verdicts) -> tuple[list[int], list[int]]:
    """The prompts whose every completion was scored, and where these completions stand among all.

    Raises: RewardError when too few are left to learn from.
    """
    ends = list(accumulate((len(row) for row in asked), initial=0))
    spans = [range(*pair) for pair in pairwise(ends)]
    kept = [p for p, span in enumerate(spans) if all(verdicts.scores[row].value is not None for row in span)]
    rows = [row for p in kept for row in spans[p]]
    if verdicts.failures and len(rows) < 2:
        first = verdicts.failures[0]
        raise RewardError(
            f"scoring failed for {len(verdicts.failures)} of {ends[-1]} completions, and no prompt is left to learn "
            f"from in this step; the first: {first.error}\n  completion: {first.request.completion!r}"
        )
    return kept, rows


def _shaped(
    state: RewardState,
    verdicts: Verdicts,
    rows: Sequence[int],
    groups: Sequence[TokenGroup],
    requests: Sequence[ScoreRequest],
    section: RolloutFields,
) -> Shaped:
    """The rewards of the completions at `rows`, which are those of `groups`."""
    ends = accumulate((len(group.completions) for group in groups), initial=0)
    samples = Samples(
        [request.completion for request in requests],
        [range(*pair) for pair in pairwise(ends)],
        torch.tensor([sum(c.mask) for group in groups for c in group.completions]),
        torch.tensor([request.finished for request in requests]),
        [verdicts.references[row] for row in rows],
    )
    return state.shape(torch.tensor([verdicts.scores[row].value for row in rows]), samples, section)


def first_answers(
    models: RolloutModels, prompts: Sequence[Prompt], section: RolloutFields, key: tuple[int | str, ...]
) -> tuple[ScoreRequest, ...]:
    """One answer of the policy as it is to each prompt, for a watch."""
    sampled = _sampled(models, prompts, section, 1, key)
    return tuple(_request(models, *prompt, sample) for prompt, (sample,) in zip(prompts, sampled, strict=True))


def _sampled(
    models: RolloutModels, prompts: Sequence[Prompt], section: RolloutFields, n: int, key: tuple[int | str, ...]
) -> list[tuple[SampledCompletion, ...]]:
    sampling = Sampling(section.max_new_tokens, section.temperature, stop_ids=models.template.stop_ids)
    asked = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts]
    return models.sampler.generate(asked, n, sampling, key)


def per_token(
    groups: Sequence[TokenGroup],
    models: RolloutModels,
    budget: int,
    width: int,
    function: Callable[[CompletionBatch], Tensor],
) -> Tensor:
    """(C, width) of a (C, T) function of batches, run without gradient in passes of at most `budget` tokens."""
    first = [0]
    for group in groups:
        first.append(first[-1] + len(group.completions))
    result = torch.zeros(first[-1], width)
    for indices in group_passes(range(len(groups)), lambda i: groups[i], models.layout, budget):
        batch = collate([groups[i] for i in indices], layout=models.layout, pad_id=models.template.pad_id)
        with torch.no_grad():
            values = function(batch)
        rows = [row for i in indices for row in range(first[i], first[i + 1])]
        result[rows, : values.shape[1]] = values.to(result.dtype)
    return result


def padded(rows: list[list[Any]], fill: Any) -> Tensor:
    """Lists of different lengths as one (C, T) tensor, filled on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _with_samples(tokens: TokenGroup, samples: Sequence[SampledCompletion]) -> TokenGroup:
    completions = tuple(TokenCompletion(s.ids, (True,) * len(s.ids)) for s in samples)
    return TokenGroup(tokens.prompt_ids, completions, tokens.prompt_id, tokens.origin)
