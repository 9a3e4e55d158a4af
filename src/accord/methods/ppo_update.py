"""What PPO updates: a policy and a value model, each with its optimiser; or one trunk with a head for each, and one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accord.config import PPOConfig
from accord.losses.ppo import entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.methods.online import Part, add_sums, kl_loss, ratio_deviation
from accord.methods.rollouts import Rollout, RolloutModels, per_token
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.layout import CompletionBatch
from accord.models.memory import MicroBatches
from accord.models.token_scores import (
    TokenScores,
    predicting_hidden_states,
    score_tokens,
    score_values,
    tokens_of,
    values_of,
)
from accord.phases import phase
from accord.training.loop import Captured
from accord.training.optim import Optimiser, learning_rate_at

__all__ = ["OneTrunk", "Pupils", "Signal", "TwoModels"]

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


class Pupils(Protocol):
    """Policy and value model as a PPO step sees them. `teaches_policy` False: the policy stands still."""

    @property
    def skipped(self) -> int:
        """Updates left out because a gradient was not finite."""
        ...

    def values(self, rollout: Rollout, models: RolloutModels, micro_batches: MicroBatches) -> Tensor:
        """(C, T) V before each token, without gradient."""
        ...

    def accumulate(
        self, part: Part, signal: Signal, count: int, *, teaches_policy: bool
    ) -> tuple[dict[str, float], float]:
        """Gradient of one forward pass's share of a minibatch of `count` tokens; sums over its tokens, and how far the
        ratio of one was from 1 (0 for a policy that stands still)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of another loss of the policy's."""
        ...

    def update(self, step: int, *, teaches_policy: bool) -> dict[str, float]:
        """Apply the accumulated gradients; returns their norms, to be added to the totals."""
        ...

    def discard(self) -> None:
        """Throw the accumulated gradients away."""
        ...

    def metrics(self, totals: Totals, step: int, *, teaches_policy: bool) -> dict[str, float]: ...

    def capture(self) -> Captured: ...

    def restore(self, captured: Captured) -> None: ...


class TwoModels:
    """A policy and a value model of its own, each with an optimiser."""

    def __init__(self, policy: Any, value_model: Any, section: PPOConfig, total_steps: int) -> None:
        self._section, self._total_steps = section, total_steps
        self._policy, self._value_model = policy, value_model
        self._policy_optimiser, self._value_optimiser = Optimiser(policy, section), Optimiser(value_model, section)

    @property
    def skipped(self) -> int:
        return self._policy_optimiser.skipped + self._value_optimiser.skipped

    @phase("scoring")
    def values(self, rollout: Rollout, models: RolloutModels, micro_batches: MicroBatches) -> Tensor:
        return _values(rollout, models, micro_batches, lambda batch: score_values(self._value_model, batch))

    @phase("forward")
    def accumulate(
        self, part: Part, signal: Signal, count: int, *, teaches_policy: bool
    ) -> tuple[dict[str, float], float]:
        sums: dict[str, float] = {}
        deviation = 0.0
        if teaches_policy:
            scores = score_tokens(
                self._policy, part.batch, temperature=self._section.temperature, with_entropy=True, mask="loss"
            )
            loss = _policy_loss(self._section, scores, part, signal, count, sums)
            self._policy_optimiser.backward(loss)
            deviation = ratio_deviation(scores.logprobs, part.old_logprobs, part.mask)
        loss = _value_loss(self._section, score_values(self._value_model, part.batch), part, signal, count, sums)
        self._value_optimiser.backward(loss)
        return sums, deviation

    def backward(self, loss: Tensor) -> None:
        self._policy_optimiser.backward(loss)

    def update(self, step: int, *, teaches_policy: bool) -> dict[str, float]:
        norms: dict[str, float] = {}
        if teaches_policy:
            norms["grad_norm"] = self._policy_optimiser.update(self._rate(step)).grad_norm
        norms["value_grad_norm"] = self._value_optimiser.update(self._value_rate(step)).grad_norm
        return norms

    def discard(self) -> None:
        self._policy_optimiser.discard()
        self._value_optimiser.discard()

    def metrics(self, totals: Totals, step: int, *, teaches_policy: bool) -> dict[str, float]:
        policy = _policy_metrics(totals) | {"train/learning_rate": self._rate(step)} if teaches_policy else {}
        return policy | _value_metrics(totals) | {
            "train/value_grad_norm": totals["value_grad_norm"] / max(1.0, totals["updates"]),
            "train/value_learning_rate": self._value_rate(step),
        }  # fmt: skip

    def capture(self) -> Captured:
        return Captured(
            {
                "policy": trainable_state(self._policy),
                "policy_optimiser": self._policy_optimiser.tensors(),
                "value": trainable_state(self._value_model),
                "value_optimiser": self._value_optimiser.tensors(),
            },
            {
                "policy_optimiser": self._policy_optimiser.counters(),
                "value_optimiser": self._value_optimiser.counters(),
            },
        )

    def restore(self, captured: Captured) -> None:
        tensors, values = captured.tensors, captured.values
        load_trainable_state(self._policy, tensors["policy"])
        self._policy_optimiser.restore(tensors["policy_optimiser"], values["policy_optimiser"])
        load_trainable_state(self._value_model, tensors["value"])
        self._value_optimiser.restore(tensors["value_optimiser"], values["value_optimiser"])

    def _rate(self, step: int) -> float:
        return learning_rate_at(step, self._total_steps, self._section.learning_rate, self._section)

    def _value_rate(self, step: int) -> float:
        peak = self._section.value_learning_rate
        peak = self._section.learning_rate if peak is None else peak
        return learning_rate_at(step, self._total_steps, peak, self._section)


class OneTrunk:
    """A policy whose trunk also carries the value head: one forward and one backward pass teach both.

        loss = policy loss + value_coef * value loss

    While the policy stands still, the head alone learns. Source: Ziegler et al. 2019, arXiv:1909.08593, whose policy
    and value function share parameters.
    """

    def __init__(self, policy: Any, head: nn.Linear, section: PPOConfig, total_steps: int) -> None:
        self._section, self._total_steps = section, total_steps
        self._policy, self._head = policy, head
        self._optimiser = Optimiser(nn.ModuleDict({"policy": policy, "head": head}), section)

    @property
    def skipped(self) -> int:
        return self._optimiser.skipped

    @phase("scoring")
    def values(self, rollout: Rollout, models: RolloutModels, micro_batches: MicroBatches) -> Tensor:
        return _values(
            rollout, models, micro_batches,
            lambda batch: values_of(self._head, predicting_hidden_states(self._policy, batch), batch),
        )  # fmt: skip

    @phase("forward")
    def accumulate(
        self, part: Part, signal: Signal, count: int, *, teaches_policy: bool
    ) -> tuple[dict[str, float], float]:
        sums: dict[str, float] = {}
        with torch.set_grad_enabled(teaches_policy):
            hidden = predicting_hidden_states(self._policy, part.batch)
        values = values_of(self._head, hidden, part.batch)
        loss = self._section.value_coef * _value_loss(self._section, values, part, signal, count, sums)
        deviation = 0.0
        if teaches_policy:
            scores = tokens_of(
                self._policy, hidden, part.batch,
                temperature=self._section.temperature, with_entropy=True, mask="loss",
            )  # fmt: skip
            loss = loss + _policy_loss(self._section, scores, part, signal, count, sums)
            deviation = ratio_deviation(scores.logprobs, part.old_logprobs, part.mask)
        self._optimiser.backward(loss)
        return sums, deviation

    def backward(self, loss: Tensor) -> None:
        self._optimiser.backward(loss)

    def update(self, step: int, *, teaches_policy: bool) -> dict[str, float]:
        norm = self._optimiser.update(self._rate(step)).grad_norm
        return {"grad_norm" if teaches_policy else "value_grad_norm": norm}

    def discard(self) -> None:
        self._optimiser.discard()

    def metrics(self, totals: Totals, step: int, *, teaches_policy: bool) -> dict[str, float]:
        rate = self._rate(step)
        if teaches_policy:
            return _policy_metrics(totals) | _value_metrics(totals) | {"train/learning_rate": rate}
        return _value_metrics(totals) | {
            "train/value_grad_norm": totals["value_grad_norm"] / max(1.0, totals["updates"]),
            "train/value_learning_rate": rate,
        }

    def capture(self) -> Captured:
        return Captured(
            {
                "policy": trainable_state(self._policy),
                "value": trainable_state(self._head),
                "optimiser": self._optimiser.tensors(),
            },
            {"optimiser": self._optimiser.counters()},
        )

    def restore(self, captured: Captured) -> None:
        load_trainable_state(self._policy, captured.tensors["policy"])
        load_trainable_state(self._head, captured.tensors["value"])
        self._optimiser.restore(captured.tensors["optimiser"], captured.values["optimiser"])

    def _rate(self, step: int) -> float:
        return learning_rate_at(step, self._total_steps, self._section.learning_rate, self._section)


def _values(
    rollout: Rollout, models: RolloutModels, micro_batches: MicroBatches, read: Callable[[CompletionBatch], Tensor]
) -> Tensor:
    return per_token(rollout.groups, models, micro_batches, rollout.mask.shape[1], read)


def _policy_loss(
    section: PPOConfig, scores: TokenScores, part: Part, signal: Signal, count: int, sums: dict[str, float]
) -> Tensor:
    """The policy's loss over a pass; adds to `sums` what it says of the pass's tokens."""
    mask, weights = part.mask, part.of(signal.weights)
    policy = ppo_policy_loss(
        scores.logprobs, part.old_logprobs, weights * part.of(signal.advantages), mask,
        clip_range=section.clip_range, num_tokens=count,
    )  # fmt: skip
    assert scores.entropies is not None
    entropy = entropy_loss(scores.entropies, mask, num_tokens=count)
    loss = policy.loss + section.entropy_coef * entropy.loss
    kl = kl_loss(section, scores.logprobs, part, weights / count)
    if kl is not None:
        loss = loss + signal.kl_coef * kl
        add_sums(sums, {"kl_loss": kl.detach()})
    add_sums(sums, {
        "policy_loss": policy.loss.detach(), "entropy": entropy.entropy_sum, "clipped": policy.clipped_count,
        "approx_kl": policy.approx_kl_sum, "ratio": policy.ratio_sum, "tokens": policy.token_count,
    })  # fmt: skip
    return loss


def _value_loss(
    section: PPOConfig, values: Tensor, part: Part, signal: Signal, count: int, sums: dict[str, float]
) -> Tensor:
    """The value model's loss over a pass; adds to `sums` what it says of the pass's tokens."""
    clip = section.value_clip_range
    value = ppo_value_loss(
        values, part.of(signal.values), part.of(signal.returns), part.mask,
        value_clip_range=inf if clip is None else clip, num_tokens=count,
    )  # fmt: skip
    add_sums(sums, {
        "value_loss": value.loss.detach(), "value_clipped": value.clipped_count, "value_tokens": value.token_count,
    })  # fmt: skip
    return value.loss


def _policy_metrics(totals: Totals) -> dict[str, float]:
    tokens = max(1.0, totals["tokens"])
    kl = {"train/kl_loss": totals["kl_loss"] / totals["minibatches"]} if "kl_loss" in totals else {}
    return kl | {
        "train/policy_loss": totals["policy_loss"] / totals["minibatches"],
        "train/entropy_nats": totals["entropy"] / tokens,
        "train/clip_fraction": totals["clipped"] / tokens,
        "train/approx_kl": totals["approx_kl"] / tokens,
        "train/ratio_mean": totals["ratio"] / tokens,
        "train/grad_norm": totals["grad_norm"] / max(1.0, totals["updates"]),
    }


def _value_metrics(totals: Totals) -> dict[str, float]:
    return {
        "train/value_loss": totals["value_loss"] / totals["minibatches"],
        "train/value_clip_fraction": totals["value_clipped"] / max(1.0, totals["value_tokens"]),
    }
