"""Several completions of each prompt and what was said of them: what rejection sampling and best-of-n choose from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accord.data.templates import Template
from accord.methods.rollouts import Prompt
from accord.records import SampledCompletion, ScoreRequest
from accord.rewards.scorers import Scorer, values_of
from accord.rollout.native import PromptTokens, Sampler
from accord.rollout.sampling import Sampling

__all__ = ["Candidates", "Drawing", "draw", "penalised"]

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
    finished           (P, n) bool, ended by a stop token
    """

    sampled: tuple[tuple[SampledCompletion, ...], ...]
    requests: tuple[tuple[ScoreRequest, ...], ...]
    scores: Floats
    gold: Floats | None
    finished: NDArray[np.bool_]
    generate_seconds: float
    score_seconds: float


def draw(
    drawing: Drawing, prompts: Sequence[Prompt], n: int, sampling: Sampling, key: tuple[int | str, ...]
) -> Candidates:
    """Sample `n` completions for each prompt and have them judged. A function of the policy's weights and the key."""
    started = time.monotonic()
    wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts]
    sampled = tuple(drawing.sampler.generate(wanted, n, sampling, key))
    generated = time.monotonic()
    requests = tuple(
        tuple(
            ScoreRequest(group.prompt, drawing.template.decode(s.ids), s.finish_reason == "stop", tokens.prompt_id)
            for s in samples
        )
        for (group, tokens), samples in zip(prompts, sampled, strict=True)
    )
    flat = [request for row in requests for request in row]
    shape = (len(prompts), n)
    return Candidates(
        sampled,
        requests,
        np.array(values_of(drawing.scorer, flat)).reshape(shape),
        None if drawing.gold is None else np.array(values_of(drawing.gold, flat)).reshape(shape),
        np.array([request.finished for request in flat]).reshape(shape),
        generate_seconds=generated - started,
        score_seconds=time.monotonic() - generated,
    )


def penalised(scores: Floats, finished: NDArray[np.bool_], missing_eos_penalty: float) -> Floats:
    """What completions are chosen by: their scores, less the penalty for those cut by length. All shapes alike."""
    return scores - missing_eos_penalty * ~finished
