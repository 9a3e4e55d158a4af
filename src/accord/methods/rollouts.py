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
from accord.models.memory import MicroBatches, one_pass
from accord.models.offload import in_use
from accord.models.token_scores import score_tokens
from accord.phases import phase
from accord.records import Group, Score, ScoreRequest, TokenGroup
from accord.rewards.scorers import Scorer, values_of
from accord.rewards.shaping import Samples, Shaped
from accord.rollout.conversations import Conversation, Opening, Partner, converse
from accord.rollout.native import Sampler
from accord.rollout.sampling import Sampling

__all__ = ["Prompt", "Rollout", "RolloutModels", "collect", "first_answers", "padded", "per_token"]

Prompt = tuple[Group, TokenGroup]


@dataclass(frozen=True, slots=True)
class Rollout:
    """All completions of one step. C completions in group order, T tokens of the longest. Its tensors are on the CPU,
    wherever the models are: they are small, and what is made of them for a whole step is too.

    groups        token groups, each prompt with its sampled completions
    conversations the same as messages, in the same order; without an environment each has one answer
    requests      the last answers as text, each behind all that came before it
    verdicts      what the scorer said of each; failures are those of prompts that were left out because of them
    shaped        the rewards made of the scores, by term, and which completions are learned from
    turn_rewards  (C, T) what the environment gave for each answer, at the answer's last token; None without one
    gold          (C,) what the hidden truth says, None without one
    mask          (C, T) bool, True = a token the policy wrote; what others wrote in between is False
    old_logprobs, ref_logprobs  (C, T) nats, 0 where the mask is False
    sampler_logprobs  (C, T) nats, of the distribution that was sampled from, as the sampler gives them
    watched       metrics of what the answers are beside those before training; see `accord.methods.watch`
    """

    groups: tuple[TokenGroup, ...]
    conversations: tuple[Conversation, ...]
    requests: tuple[ScoreRequest, ...]
    verdicts: tuple[Score, ...]
    failures: tuple[Failure, ...]
    shaped: Shaped
    turn_rewards: Tensor | None
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
    def earned(self) -> Tensor:
        """(C,) the scores with what the environment gave."""
        return self.scores if self.turn_rewards is None else self.scores + self.turn_rewards.sum(1)

    @property
    def finished(self) -> Tensor:
        """(C,) bool, the last answer ended with a stop token."""
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
    without it. `partner` is the environment of conversations, None for one answer a prompt; `rewards` is what remains
    of earlier rollouts' scores. With `offload` the reference is on that device only while it is asked."""

    policy: Any
    reference: Any
    sampler: Sampler
    template: Template
    scorer: Scorer
    gold: Scorer | None
    layout: Layout
    partner: Partner | None = field(default=None, kw_only=True)
    rewards: RewardState = field(default_factory=RewardState, kw_only=True)
    watch: Watch | None = field(default=None, kw_only=True)
    offload: torch.device | None = field(default=None, kw_only=True)


def collect(
    models: RolloutModels,
    prompts: Sequence[Prompt],
    section: RolloutFields,
    key: tuple[int | str, ...],
    micro_batches: MicroBatches | None = None,
) -> Rollout:
    """Sample, score, and run the reference once over everything that was scored, in passes as `micro_batches` allows
    (the section, if None)."""
    passes = micro_batches or MicroBatches(section.micro_batch_tokens)
    started = time.monotonic()
    with phase("sampling"):
        sampled = _sampled(models, prompts, section, section.samples_per_prompt, key)
    generated = time.monotonic()
    asked = [tuple(_request(models, conversation) for conversation in samples) for samples in sampled]
    errors = [conversation.error for samples in sampled for conversation in samples]
    compared = models.rewards.reference_scores(asked)  # before listening, which is to the samples alone
    with phase("scoring"), heard(None if models.watch is None else models.watch.head) as states:
        verdicts = judge(models.scorer, asked, compared, section.max_failed_fraction, errors)
    kept, rows = _kept(asked, verdicts)
    groups = tuple(_group(prompts[p][1], sampled[p]) for p in kept)
    conversations = tuple(conversation for p in kept for conversation in sampled[p])
    requests = tuple(request for p in kept for request in asked[p])
    mask = padded([list(c.completion.mask) for c in conversations], False)
    sampled_logprobs = padded([list(c.logprobs) for c in conversations], 0.0)
    turn_rewards = None if models.partner is None else padded([list(c.rewards) for c in conversations], 0.0)

    def logprobs(model: Any) -> Tensor:
        return per_token(
            groups, models, passes, mask.shape[1],
            lambda batch: score_tokens(model, batch, temperature=section.temperature, mask="loss").logprobs,
        )  # fmt: skip

    with phase("scoring"):
        old = logprobs(models.policy) if section.old_logprobs == "recompute" else sampled_logprobs
        gold = None if models.gold is None else torch.tensor(values_of(models.gold, requests))
        watched = {} if models.watch is None else models.watch.metrics(requests, states)
    with phase("reference"), adapters_off(models.reference), in_use(models.reference, models.offload):
        ref_logprobs = logprobs(models.reference)
    return Rollout(
        groups=groups,
        conversations=conversations,
        requests=requests,
        verdicts=tuple(verdicts.scores[row] for row in rows),
        failures=verdicts.failures,
        shaped=_shaped(models.rewards, verdicts, rows, groups, conversations, turn_rewards, section),
        turn_rewards=turn_rewards,
        gold=gold,
        mask=mask,
        old_logprobs=old,
        sampler_logprobs=sampled_logprobs,
        ref_logprobs=ref_logprobs,
        generate_seconds=generated - started,
        watched=watched,
        score_seconds=time.monotonic() - generated,
    )


def _request(models: RolloutModels, conversation: Conversation) -> ScoreRequest:
    """The last answer behind all that came before it, with the tokens of every answer."""
    return ScoreRequest(
        conversation.prompt,
        conversation.answers[-1],
        conversation.end != "length",
        conversation.opening.prompt_id,
        models.template.token_texts(conversation.own_ids) if models.scorer.wants_tokens else (),
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
    conversations: Sequence[Conversation],
    turn_rewards: Tensor | None,
    section: RolloutFields,
) -> Shaped:
    """The rewards of the completions at `rows`, which are those of `groups`."""
    ends = accumulate((len(group.completions) for group in groups), initial=0)
    samples = Samples(
        [conversation.text for conversation in conversations],
        [range(*pair) for pair in pairwise(ends)],
        torch.tensor([sum(c.mask) for group in groups for c in group.completions]),
        torch.tensor([conversation.end != "length" for conversation in conversations]),
        [verdicts.references[row] for row in rows],
        None if turn_rewards is None else turn_rewards.sum(1),
    )
    return state.shape(torch.tensor([verdicts.scores[row].value for row in rows]), samples, section)


def first_answers(
    models: RolloutModels, prompts: Sequence[Prompt], section: RolloutFields, key: tuple[int | str, ...]
) -> tuple[ScoreRequest, ...]:
    """One answer of the policy as it is to each prompt, for a watch."""
    sampled = _sampled(models, prompts, section, 1, key)
    return tuple(_request(models, conversation) for (conversation,) in sampled)


def _sampled(
    models: RolloutModels, prompts: Sequence[Prompt], section: RolloutFields, n: int, key: tuple[int | str, ...]
) -> list[tuple[Conversation, ...]]:
    sampling = Sampling(section.max_new_tokens, section.temperature, stop_ids=models.template.stop_ids)
    openings = [Opening(group.prompt, tokens.prompt_ids, tokens.prompt_id) for group, tokens in prompts]
    return converse(models.sampler, models.template, openings, n, sampling, key, models.partner)


def per_token(
    groups: Sequence[TokenGroup],
    models: RolloutModels,
    micro_batches: MicroBatches,
    width: int,
    function: Callable[[CompletionBatch], Tensor],
) -> Tensor:
    """(C, width) of a (C, T) function of batches, run without gradient."""
    return micro_batches.attempt(lambda budget: _per_token(groups, models, budget, width, function))


def _per_token(
    groups: Sequence[TokenGroup],
    models: RolloutModels,
    budget: int,
    width: int,
    function: Callable[[CompletionBatch], Tensor],
) -> Tensor:
    """As `per_token`, in passes of at most `budget` tokens."""
    first = [0]
    for group in groups:
        first.append(first[-1] + len(group.completions))
    result = torch.zeros(first[-1], width)
    for indices in group_passes(range(len(groups)), lambda i: groups[i], models.layout, budget):
        with phase("data"):
            batch = collate(
                [groups[i] for i in indices],
                layout=models.layout, pad_id=models.template.pad_id, device=models.policy.device,
            )  # fmt: skip
        with torch.no_grad(), one_pass([groups[i] for i in indices]):
            values = function(batch)
        rows = [row for i in indices for row in range(first[i], first[i + 1])]
        result[rows, : values.shape[1]] = values.to(result)
    return result


def padded(rows: list[list[Any]], fill: Any) -> Tensor:
    """Lists of different lengths as one (C, T) tensor, filled on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _group(tokens: TokenGroup, samples: Sequence[Conversation]) -> TokenGroup:
    """The samples of a prompt, behind what their conversations began with."""
    return TokenGroup(samples[0].opening.ids, tuple(c.completion for c in samples), tokens.prompt_id, tokens.origin)
