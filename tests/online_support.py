"""Tiny models, prompts and scores for one online step, and its quantities from one unpadded row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from accord.config import RolloutFields
from accord.data.templates import Template
from accord.methods.online import prompt_indices
from accord.methods.rollouts import RolloutModels, collect
from accord.records import Group, Message, SampledCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.loop import StepOutcome
from models_support import EOS_ID, PAD_ID, tiny_model, word_tokenizer

PROMPTS = ("w2 w3", "w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13 w14 w15 w16")


class Steps(Protocol):
    def step(self, step: int) -> StepOutcome: ...


def uneven(prompt: str, completion: str) -> float:
    """Scores in -3 ... 3 that follow nothing."""
    return float(len(completion) * 5 % 7) - 3


def prompts() -> list[tuple[Group, TokenGroup]]:
    tokenizer = word_tokenizer()
    groups = [Group((Message("user", text),)) for text in PROMPTS]
    return [(g, TokenGroup(tuple(tokenizer.encode(t)), (), g.prompt_id)) for g, t in zip(groups, PROMPTS, strict=True)]


def rollout_cast(
    kind: str = "gpt2",
    dtype: torch.dtype = torch.float64,
    *,
    layout: Any = "shared",
    function: Callable[..., float] = uneven,
    gold: Callable[..., float] | None = None,
) -> RolloutModels:
    """A policy, and a reference that is another model."""
    policy = tiny_model(kind, dtype=dtype, seed=1)
    return RolloutModels(
        policy=policy,
        reference=tiny_model(kind, dtype=dtype, seed=2).requires_grad_(False),
        sampler=NativeSampler(policy, pad_id=PAD_ID),
        template=Template.of(word_tokenizer(), "auto"),
        scorer=FunctionScorer(function, "the test's reward"),
        gold=None if gold is None else FunctionScorer(gold, "the truth"),
        layout=layout,
    )


def measured(trainer: Steps, numbers: Sequence[int]) -> list[dict[str, float]]:
    """The metrics of these steps, but for clocks and memory."""
    rows = [trainer.step(number).metrics for number in numbers]
    return [{k: float(v) for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def gradient_norm(model: Any) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


class OffsetSampler:
    """A sampler whose log-probabilities are not the trainer's."""

    def __init__(self, inner: Any, offset: float) -> None:
        self._inner, self._offset = inner, offset

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        return [
            tuple(replace(s, logprobs=tuple(p - self._offset for p in s.logprobs)) for s in samples)
            for samples in self._inner.generate(prompts, n, sampling, key)
        ]


class FirstRollout:
    """What the first step of `stage` has to do with, in float64 from one unpadded row at a time.

    rows       (prompt ids, completion ids) of each completion, in groups of samples_per_prompt
    logprobs, entropies   of each completion's tokens under the policy, with gradient
    ref        the same log-probabilities under the reference
    scores, finished      of each completion
    """

    def __init__(self, made: RolloutModels, config: RolloutFields, stage: str, seed: int = 0) -> None:
        chosen = [prompts()[i] for i in prompt_indices(1, config, len(PROMPTS), seed, stage)]
        rollout = collect(made, chosen, config, (stage, seed, 1))
        self._config = config
        self.rows = [(g.prompt_ids, c.ids) for g in rollout.groups for c in g.completions]
        self.finished = [ids[-1] == EOS_ID for _, ids in self.rows]
        self.scores = [uneven("", request.completion) for request in rollout.requests]
        self.logprobs, self.entropies = zip(*(self._language(made.policy, *row) for row in self.rows), strict=True)
        self.ref = [self._language(made.reference, *row)[0].detach() for row in self.rows]

    def _language(self, model: Any, prompt: tuple[int, ...], ids: tuple[int, ...]) -> tuple[Any, Any]:
        logits = model(**unpadded(prompt + ids)).logits[0, len(prompt) - 1 : -1]
        logs = (logits / self._config.temperature).log_softmax(-1)
        return logs[range(len(ids)), ids], -(logs.exp() * logs).sum(-1)

    def shaped(self) -> list[float]:
        """Scores, clipped, less the penalty for not ending."""
        clip, penalty = self._config.score_clip or math.inf, self._config.missing_eos_penalty
        return [max(-clip, min(clip, s)) - penalty * (not f) for s, f in zip(self.scores, self.finished, strict=True)]

    def kl(self) -> list[float]:
        """log policy / reference of each completion."""
        return [float((p - r).detach().sum()) for p, r in zip(self.logprobs, self.ref, strict=True)]


def unpadded(ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
