"""Several completions of each prompt and what was said of them: what rejection sampling and best-of-n choose from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from accord.config import SamplingFields
from accord.data.templates import Template
from accord.methods.judging import judge, score_metrics
from accord.methods.rollouts import Prompt
from accord.phases import phase
from accord.records import Group, SampledCompletion, ScoreRequest, TokenGroup
from accord.rewards.scorers import Scorer, values_of
from accord.rewards.shaping import Moments, Samples, shape
from accord.rollout.native import PromptTokens, Sampler
from accord.rollout.sampling import Sampling

__all__ = ["Candidates", "Drawing", "best_of", "draw"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Who writes candidates and who judges them; `gold` is the hidden truth, None without one."""

    sampler: Sampler
    template: Template
    scorer: Scorer
    gold: Scorer | None


@dataclass(frozen=True, slots=True)
class Candidates:
    """P prompts with n completions each, in the prompts' order.

    sampled, requests  P rows of n: the completions as tokens, and as text
    scores             (P, n) what the scorer said; gold (P, n) what the hidden truth says, None without one
    rewards            (P, n) what they are chosen by: the scores, shaped
    usable             (P, n) bool, may be chosen: scored, and not left out for being cut. The others have the score and
                       the reward of their prompt's worst
    finished           (P, n) bool, ended by a stop token
    metrics            how scoring went: failures, each judge's mean, each term of the rewards
    """

    sampled: tuple[tuple[SampledCompletion, ...], ...]
    requests: tuple[tuple[ScoreRequest, ...], ...]
    scores: Floats
    rewards: Floats
    usable: NDArray[np.bool_]
    gold: Floats | None
    finished: NDArray[np.bool_]
    metrics: dict[str, float]
    generate_seconds: float
    score_seconds: float


def draw(
    drawing: Drawing,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    section: SamplingFields,
    key: tuple[int | str, ...],
) -> Candidates:
    """Sample `n` completions for each prompt and have them judged. A function of the policy's weights and the key."""
    started = time.monotonic()
    wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts]
    with phase("sampling"):
        sampled = tuple(drawing.sampler.generate(wanted, n, sampling, key))
    generated = time.monotonic()
    requests = tuple(
        tuple(_request(drawing, group, tokens, s) for s in samples)
        for (group, tokens), samples in zip(prompts, sampled, strict=True)
    )
    flat = [request for row in requests for request in row]
    shape_of = (len(prompts), n)
    with phase("scoring"):
        verdicts = judge(drawing.scorer, requests, [()] * len(flat), section.max_failed_fraction)
    scored = np.array([score.value is not None for score in verdicts.scores]).reshape(shape_of)
    said = np.array([score.value or 0.0 for score in verdicts.scores]).reshape(shape_of)
    scores = _worst_elsewhere(said, scored)
    samples = Samples(
        [request.completion for request in flat],
        [range(p * n, (p + 1) * n) for p in range(len(prompts))],
        torch.tensor([len(s.ids) for row in sampled for s in row]),
        torch.tensor([request.finished for request in flat]),
    )
    shaped = shape(torch.from_numpy(scores.reshape(-1)), samples, section, Moments())
    usable = scored & shaped.learned.numpy().reshape(shape_of)
    return Candidates(
        sampled,
        requests,
        scores,
        _worst_elsewhere(shaped.rewards.numpy().reshape(shape_of), usable),
        usable,
        None if drawing.gold is None else np.array(values_of(drawing.gold, flat)).reshape(shape_of),
        np.array([request.finished for request in flat]).reshape(shape_of),
        {
            "rollout/score/mean": float(said[scored].mean()),
            "rollout/score/std": float(said[scored].std()),
            "rollout/failed_scores": float((~scored).sum()),
            **{f"rollout/{name}_term/mean": float(term.mean()) for name, term in shaped.terms.items()},
            **score_metrics(score for score in verdicts.scores if score.value is not None),
        },
        generate_seconds=generated - started,
        score_seconds=time.monotonic() - generated,
    )


def best_of(rewards: Floats, usable: NDArray[np.bool_]) -> list[int]:
    """For each prompt, which of its completions is best among those that may be chosen; (P, n) both. The first where
    none may be."""
    return np.where(usable, rewards, -np.inf).argmax(axis=1).tolist()


def _request(drawing: Drawing, group: Group, tokens: TokenGroup, sample: SampledCompletion) -> ScoreRequest:
    template = drawing.template
    return ScoreRequest(
        group.prompt,
        template.decode(sample.ids),
        sample.finish_reason == "stop",
        tokens.prompt_id,
        template.token_texts(sample.ids) if drawing.scorer.wants_tokens else (),
    )


def _worst_elsewhere(values: Floats, usable: NDArray[np.bool_]) -> Floats:
    """(P, n) the values, and where they are not usable the lowest that is in their row; 0 in rows without any."""
    worst = np.where(usable, values, np.inf).min(axis=1, keepdims=True)
    return np.where(usable, values, np.where(np.isfinite(worst), worst, 0.0))
