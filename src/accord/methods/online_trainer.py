"""The trainer of every online method without a value model: a rollout, several updates on it, and it is forgotten.

What distinguishes the methods is a `Learner`: which of the rollout's completions it learns from, and with which loss.
The learners are in `methods/learners.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from accord.config import RolloutFields
from accord.losses.kl import kl_k1, kl_k3
from accord.losses.masked import masked_sum
from accord.methods.online import (
    Choice,
    Part,
    add_sums,
    kl_ending,
    minibatches,
    parts,
    prompt_indices,
    ratio_deviation,
    rollout_metrics,
    step_outcome,
)
from accord.methods.rollouts import Prompt, Rollout, RolloutModels, collect
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.memory import MicroBatches, one_pass
from accord.models.token_scores import TokenScores, score_tokens
from accord.phases import phase
from accord.training.loop import Captured, StepOutcome
from accord.training.optim import Optimiser, learning_rate_at

__all__ = ["Learner", "Lesson", "OnlineTrainer", "Size"]

Sums = Mapping[str, float | Tensor]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one rollout teaches. C completions of the rollout.

    choice      the completions that are learned from
    rewards     (C,) what the method maximises
    metrics     of the signal, before any update
    advantages  (C,) how much better than expected; None for a method that has none
    weights     (C, T) what a token weighs in its loss, or (C, 1) a completion; None for a method that has none
    """

    choice: Choice
    rewards: Tensor
    metrics: dict[str, float]
    advantages: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """How much the WHOLE update learns from: what its losses are divided by, however it is cut into passes."""

    completions: int
    tokens: int


class Learner(Protocol):
    """What makes a method."""

    def lesson(self, rollout: Rollout) -> Lesson: ...

    def loss(self, scores: TokenScores, part: Part, lesson: Lesson, size: Size) -> tuple[Tensor, Sums]:
        """The loss of one forward pass, to differentiate, and sums that add up over passes and updates."""
        ...

    def metrics(self, sums: dict[str, float], updates: int) -> dict[str, float]:
        """The step's metrics from the added-up sums."""
        ...


class OnlineTrainer:
    """Collect a rollout, learn from it, forget it; see `accord.training.loop.Trainer`."""

    def __init__(
        self,
        stage: str,
        models: RolloutModels,
        prompts: Sequence[Prompt],
        section: RolloutFields,
        learner: Learner,
        seed: int,
    ) -> None:
        self.stage = stage
        self.checkpoint_every, self.keep_checkpoints = section.checkpoint_every, section.keep_checkpoints
        self.episodes_per_step = section.prompts_per_step * section.samples_per_prompt
        self.total_steps = -(-section.episodes // self.episodes_per_step)
        self.drift: float = 0.0  # the largest |ratio - 1| seen before any update of a rollout
        self._models, self._prompts, self._section, self._seed = models, prompts, section, seed
        self._learner = learner
        self._optimiser = Optimiser(models.policy, section)
        self._micro_batches = MicroBatches(section.micro_batch_tokens)

    def step(self, step: int) -> StepOutcome:
        """Sample, score, work out what that teaches, then update over shuffled passes."""
        section = self._section
        chosen = prompt_indices(step, section, len(self._prompts), self._seed, self.stage)
        rollout = collect(
            self._models, [self._prompts[i] for i in chosen], section, (self.stage, self._seed, step),
            self._micro_batches,
        )  # fmt: skip
        lesson = self._learner.lesson(rollout)
        kl = kl_k1(rollout.old_logprobs, rollout.ref_logprobs)
        with phase("logging"):
            metrics = rollout_metrics(rollout, kl, lesson.rewards) | lesson.metrics
        ending = kl_ending(metrics, section)
        started = time.monotonic()
        if ending is None:
            metrics |= self._update(step, rollout, lesson)
        return step_outcome(
            step, self.total_steps, rollout, section, metrics,
            score_seconds=rollout.score_seconds, update_seconds=time.monotonic() - started, ending=ending,
            notes=self._micro_batches.notes(),
        )  # fmt: skip

    def capture(self) -> Captured:
        return Captured(
            {"policy": trainable_state(self._models.policy), "policy_optimiser": self._optimiser.tensors()},
            {
                "policy_optimiser": self._optimiser.counters(),
                "micro_batch_tokens": self._micro_batches.tokens,
                "drift": self.drift,
                "rewards": self._models.rewards.capture(),
            },
        )

    def restore(self, captured: Captured) -> None:
        load_trainable_state(self._models.policy, captured.tensors["policy"])
        self._optimiser.restore(captured.tensors["policy_optimiser"], captured.values["policy_optimiser"])
        self._micro_batches.restore(captured.values)
        self.drift = captured.values["drift"]
        self._models.rewards.restore(captured.values["rewards"])

    def _update(self, step: int, rollout: Rollout, lesson: Lesson) -> dict[str, float]:
        rate = learning_rate_at(step, self.total_steps, self._section.learning_rate, self._section)
        totals: dict[str, float] = {}
        norms: list[float] = []
        deviations: list[float] = []
        for groups in minibatches(step, self._section, len(lesson.choice.groups), self._seed, self.stage):
            sums, deviation = self._micro_batches.attempt(
                partial(self._accumulate, rollout, lesson, groups), self._optimiser.discard
            )
            add_sums(totals, sums)
            deviations.append(deviation)
            norms.append(self._optimiser.update(rate).grad_norm)
        metrics = {"train/learning_rate": rate, "train/skipped_updates": float(self._optimiser.skipped)}
        if not norms:  # nothing to learn from
            return metrics
        self.drift = max(self.drift, deviations[0])
        return {
            **metrics,
            **self._learner.metrics(totals, len(norms)),
            "train/entropy_nats": totals["entropy"] / totals["tokens"],
            "train/approx_kl": totals["approx_kl"] / totals["tokens"],
            "train/ratio_mean": totals["ratio"] / totals["tokens"],
            "train/ratio_max_deviation": deviations[0],
            "train/grad_norm": sum(norms) / len(norms),
        }

    def _accumulate(
        self, rollout: Rollout, lesson: Lesson, groups: list[int], budget: int
    ) -> tuple[dict[str, float], float]:
        """Gradients of one update, in passes of at most `budget` tokens; sums over its tokens and completions, and how
        far the ratio of a token was from 1."""
        rows = [row for group in groups for row in lesson.choice.rows[group]]
        size = Size(completions=len(rows), tokens=int(rollout.mask[rows].sum()))
        sums: dict[str, float] = {}
        deviation = 0.0
        for part in parts(rollout, lesson.choice, groups, self._models, budget):
            with one_pass(part.groups):
                with phase("forward"):
                    scores = score_tokens(
                        self._models.policy, part.batch,
                        temperature=self._section.temperature, with_entropy=True, mask="loss",
                    )  # fmt: skip
                    loss, loss_sums = self._learner.loss(scores, part, lesson, size)
                self._optimiser.backward(loss)
            deviation = max(deviation, ratio_deviation(scores.logprobs, part.old_logprobs, part.mask))
            add_sums(sums, loss_sums)
            add_sums(sums, _movement(scores, part))
        return sums, deviation


def _movement(scores: TokenScores, part: Part) -> Sums:
    """Over the tokens of a pass: how far the updates moved the policy from the one that sampled, and its entropy."""
    assert scores.entropies is not None
    new, old, mask = scores.logprobs.detach(), part.old_logprobs, part.mask
    return {
        "entropy": masked_sum(scores.entropies.detach(), mask),
        "approx_kl": masked_sum(kl_k3(old, new), mask),
        "ratio": masked_sum((new - old).exp(), mask),
        "tokens": mask.sum(),
    }
