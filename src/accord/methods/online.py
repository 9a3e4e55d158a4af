"""What all online methods share: which prompts a step takes, how a score becomes a reward, what is logged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accord.config import RolloutFields
from accord.data.order import batch_indices
from accord.losses.masked import masked_mean
from accord.measures.text import distinct_n, repetition
from accord.methods.rollouts import Rollout

__all__ = ["RATIO_TOLERANCE", "prompt_indices", "rollout_metrics", "samples_of", "shaped_scores"]

RATIO_TOLERANCE = 1e-5
SAMPLES_KEPT = 4


def prompt_indices(step: int, section: RolloutFields, count: int, seed: int, stage: str) -> list[int]:
    """The step's prompts: whole passes through a shuffled list, continuing into the next pass where one ends."""
    size = section.prompts_per_step
    return [batch_indices(p + 1, count, 1, seed, stage)[0] for p in range((step - 1) * size, step * size)]


def shaped_scores(rollout: Rollout, section: RolloutFields) -> Tensor:
    """(C,) scores as the reward takes them: clipped, then less the penalty for not ending."""
    scores = (
        rollout.scores if section.score_clip is None else rollout.scores.clamp(-section.score_clip, section.score_clip)
    )
    return scores - section.missing_eos_penalty * (~rollout.finished)


def rollout_metrics(rollout: Rollout, kl: Tensor, rewards: Tensor) -> dict[str, float]:
    """`kl` (C, T) is log(policy / reference) of each token; `rewards` (C,) what the method optimises."""
    mask, texts = rollout.mask, [r.completion for r in rollout.requests]
    lengths = mask.sum(1).float()
    metrics = {
        "rollout/score/mean": float(rollout.scores.mean()),
        "rollout/score/std": float(rollout.scores.std(unbiased=False)),
        "rollout/reward/mean": float(rewards.mean()),
        "rollout/kl_per_sequence_nats": float((kl * mask).sum(1).mean()),
        "rollout/kl_per_token_nats": float(masked_mean(kl, mask)),
        "rollout/sampler_deviation": rollout.sampler_deviation,
        "rollout/entropy_nats": -float(masked_mean(rollout.old_logprobs, mask)),
        "rollout/completion_tokens/mean": float(lengths.mean()),
        "rollout/finished_fraction": float(rollout.finished.float().mean()),
        "rollout/truncated_fraction": float((~rollout.finished).float().mean()),
        "rollout/repetition": sum(repetition(text) for text in texts) / len(texts),
        "rollout/distinct_2": distinct_n(texts, 2),
    }
    if rollout.gold is not None:
        metrics["rollout/gold_utility/mean"] = float(rollout.gold.mean())
        metrics["rollout/gold_utility/std"] = float(rollout.gold.std(unbiased=False))
    return metrics


def samples_of(rollout: Rollout) -> tuple[dict[str, Any], ...]:
    n = len(rollout.requests) // len(rollout.groups)
    rows = range(0, len(rollout.requests), n)[:SAMPLES_KEPT]
    return tuple(
        {
            "prompt": "\n".join(m.content for m in rollout.requests[i].prompt),
            "completion": rollout.requests[i].completion,
            "score": float(rollout.scores[i]),
            "finished": bool(rollout.finished[i]),
            **({} if rollout.gold is None else {"gold": float(rollout.gold[i])}),
        }
        for i in rows
    )
