"""What PPO updates: the policy and the value model, each with its loss, its optimiser and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from accord.config import PPOConfig
from accord.losses.ppo import entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.methods.online import Part, add_sums, kl_loss, ratio_deviation
from accord.methods.rollouts import Rollout, RolloutModels, per_token
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.token_scores import score_tokens, score_values
from accord.phases import phase
from accord.training.loop import Captured
from accord.training.optim import Optimiser, learning_rate_at

__all__ = ["Actor", "Critic", "Signal"]

Totals = Mapping[str, float]
"""Sums over the minibatches of a step. `minibatches` counts those looked at, `updates` those learned from."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What one rollout teaches, each (C, T) in the rollout's order.

    values      the value model's V before each token
    advantages  as the policy takes them: whitened, where that is asked for
    returns     what the value model is to predict
    weights     what a token weighs in the policy's loss and its KL: not 1 where another distribution was sampled from
    kl_coef     price of a nat of KL, wherever it is paid
    """

    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    kl_coef: float


class _Learning:
    """A model with its optimiser: gradients are accumulated, then applied or thrown away."""

    name: str
    norm: str  # under which the gradient norms of a step's updates are added up

    def __init__(self, model: Any, section: PPOConfig, peak: float, total_steps: int) -> None:
        self.model, self.section = model, section
        self._optimiser, self._peak, self._total_steps = Optimiser(model, section), peak, total_steps

    @property
    def skipped(self) -> int:
        return self._optimiser.skipped

    def rate(self, step: int) -> float:
        return learning_rate_at(step, self._total_steps, self._peak, self.section)

    def update(self, step: int) -> dict[str, float]:
        """Apply the accumulated gradients; returns their norm, to be added to the totals."""
        return {self.norm: self._optimiser.update(self.rate(step)).grad_norm}

    def discard(self) -> None:
        self._optimiser.discard()

    def capture(self) -> Captured:
        return Captured(
            {self.name: trainable_state(self.model), f"{self.name}_optimiser": self._optimiser.tensors()},
            {f"{self.name}_optimiser": self._optimiser.counters()},
        )

    def restore(self, captured: Captured) -> None:
        load_trainable_state(self.model, captured.tensors[self.name])
        key = f"{self.name}_optimiser"
        self._optimiser.restore(captured.tensors[key], captured.values[key])


class Actor(_Learning):
    """The policy."""

    name, norm = "policy", "grad_norm"

    def __init__(self, model: Any, section: PPOConfig, total_steps: int) -> None:
        super().__init__(model, section, section.learning_rate, total_steps)

    @phase("forward")
    def accumulate(self, part: Part, signal: Signal, count: int) -> tuple[dict[str, float], float]:
        """Gradient of one forward pass's share of a minibatch of `count` tokens; sums over its tokens, and how far the
        ratio of one was from 1."""
        section, mask, weights = self.section, part.mask, part.of(signal.weights)
        scores = score_tokens(self.model, part.batch, temperature=section.temperature, with_entropy=True, mask="loss")
        policy = ppo_policy_loss(
            scores.logprobs, part.old_logprobs, weights * part.of(signal.advantages), mask,
            clip_range=section.clip_range, num_tokens=count,
        )  # fmt: skip
        assert scores.entropies is not None
        entropy = entropy_loss(scores.entropies, mask, num_tokens=count)
        loss = policy.loss + section.entropy_coef * entropy.loss
        kl = kl_loss(section, scores.logprobs, part, weights / count)
        sums: dict[str, float] = {}
        if kl is not None:
            loss = loss + signal.kl_coef * kl
            add_sums(sums, {"kl_loss": kl.detach()})
        with phase("backward"):
            loss.backward()
        add_sums(sums, {
            "policy_loss": policy.loss.detach(), "entropy": entropy.entropy_sum, "clipped": policy.clipped_count,
            "approx_kl": policy.approx_kl_sum, "ratio": policy.ratio_sum, "tokens": policy.token_count,
        })  # fmt: skip
        return sums, ratio_deviation(scores.logprobs, part.old_logprobs, mask)

    def metrics(self, totals: Totals, step: int) -> dict[str, float]:
        tokens = max(1.0, totals["tokens"])
        kl = {"train/kl_loss": totals["kl_loss"] / totals["minibatches"]} if "kl_loss" in totals else {}
        return kl | {
            "train/policy_loss": totals["policy_loss"] / totals["minibatches"],
            "train/entropy_nats": totals["entropy"] / tokens,
            "train/clip_fraction": totals["clipped"] / tokens,
            "train/approx_kl": totals["approx_kl"] / tokens,
            "train/ratio_mean": totals["ratio"] / tokens,
            "train/grad_norm": totals["grad_norm"] / max(1.0, totals["updates"]),
            "train/learning_rate": self.rate(step),
        }


class Critic(_Learning):
    """The value model."""

    name, norm = "value", "value_grad_norm"

    def __init__(self, model: Any, section: PPOConfig, total_steps: int) -> None:
        peak = section.learning_rate if section.value_learning_rate is None else section.value_learning_rate
        super().__init__(model, section, peak, total_steps)

    @phase("scoring")
    def values(self, rollout: Rollout, models: RolloutModels) -> Tensor:
        """(C, T) V before each token, without gradient."""
        return per_token(
            rollout.groups, models, self.section.micro_batch_tokens, rollout.mask.shape[1],
            lambda batch: score_values(self.model, batch),
        )  # fmt: skip

    @phase("forward")
    def accumulate(self, part: Part, signal: Signal, count: int) -> dict[str, float]:
        """Gradient of one forward pass's share of a minibatch of `count` tokens; sums over its tokens."""
        clip = self.section.value_clip_range
        value = ppo_value_loss(
            score_values(self.model, part.batch), part.of(signal.values), part.of(signal.returns), part.mask,
            value_clip_range=inf if clip is None else clip, num_tokens=count,
        )  # fmt: skip
        with phase("backward"):
            value.loss.backward()
        sums: dict[str, float] = {}
        add_sums(sums, {
            "value_loss": value.loss.detach(), "value_clipped": value.clipped_count, "value_tokens": value.token_count,
        })  # fmt: skip
        return sums

    def metrics(self, totals: Totals, step: int) -> dict[str, float]:
        return {
            "train/value_loss": totals["value_loss"] / totals["minibatches"],
            "train/value_clip_fraction": totals["value_clipped"] / max(1.0, totals["value_tokens"]),
            "train/value_grad_norm": totals["value_grad_norm"] / max(1.0, totals["updates"]),
            "train/value_learning_rate": self.rate(step),
        }
