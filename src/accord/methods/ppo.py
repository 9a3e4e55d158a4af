"""Proximal policy optimisation with human feedback.

    reward[t]  = -kl_coef * (log policy - log reference)[t] + (score - penalties) * [t is the last token]
    advantages = GAE(reward, values), whitened over the rollout
    loss       = clipped policy loss - entropy_coef * entropy;   value loss = clipped squared error, own optimiser

Source: Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325; Schulman et al. 2017,
arXiv:1707.06347. Departures: the value model has an optimiser of its own, so there is no value coefficient; the score
stands at the last token (see `token_rewards`); a completion cut by length is scored as it is, less a penalty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from accord.config import PPOConfig
from accord.losses.advantages import gae, token_rewards
from accord.losses.kl import adaptive_kl_coef, kl_k1
from accord.losses.masked import masked_mean, whiten
from accord.losses.ppo import entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.methods.online import (
    add_sums,
    minibatches,
    parts,
    prompt_indices,
    ratio_deviation,
    rollout_metrics,
    shaped_scores,
    step_outcome,
    whole,
)
from accord.methods.rollouts import Prompt, Rollout, RolloutModels, collect, per_token
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.token_scores import score_tokens, score_values
from accord.training.loop import Captured, StepOutcome
from accord.training.optim import Optimiser, learning_rate_at

__all__ = ["PPOTrainer"]


class PPOTrainer:
    """Collect a rollout, learn from it, forget it; see `accord.training.loop.Trainer`."""

    stage = "ppo"

    def __init__(
        self, models: RolloutModels, value: Any, prompts: Sequence[Prompt], section: PPOConfig, seed: int
    ) -> None:
        self.checkpoint_every, self.keep_checkpoints = section.checkpoint_every, section.keep_checkpoints
        self.episodes_per_step = section.prompts_per_step * section.samples_per_prompt
        self.total_steps = -(-section.episodes // self.episodes_per_step)
        self.drift: float = 0.0  # the largest |ratio - 1| seen before any update of a rollout
        self._models, self._value, self._prompts, self._section, self._seed = models, value, prompts, section, seed
        self._policy_optimiser = Optimiser(models.policy, section)
        self._value_optimiser = Optimiser(value, section)
        self._kl_coef = section.kl_coef

    def step(self, step: int) -> StepOutcome:
        """Generate, score, compute advantages, then update over several shuffled passes."""
        section = self._section
        prompts = [self._prompts[i] for i in prompt_indices(step, section, len(self._prompts), self._seed, "ppo")]
        rollout = collect(self._models, prompts, section, ("ppo", self._seed, step))
        scored = time.monotonic()
        values = self._values(rollout)
        score_seconds = rollout.score_seconds + time.monotonic() - scored
        kl = kl_k1(rollout.old_logprobs, rollout.ref_logprobs)
        rewards = token_rewards(shaped_scores(rollout, section), self._kl_coef * kl, rollout.mask)
        result = gae(rewards, values, rollout.mask, gamma=section.gamma, gae_lambda=section.gae_lambda)
        advantages = whiten(result.advantages, rollout.mask) if section.whiten_advantages else result.advantages
        started = time.monotonic()
        update = self._update(step, rollout, values, advantages, result.returns)
        seconds = time.monotonic() - started
        metrics = {
            **rollout_metrics(rollout, kl, rewards.sum(1)),
            **_signal_metrics(rollout.mask, values, result.advantages, result.returns),
            **update,
            "train/kl_coef": self._kl_coef,
        }
        if section.kl_controller == "adaptive" and section.target_kl is not None:
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef,
                metrics["rollout/kl_per_sequence_nats"],
                target_kl=section.target_kl,
                horizon=section.kl_horizon,
                num_samples=self.episodes_per_step,
            )
        return step_outcome(
            step, self.total_steps, rollout, section, metrics, score_seconds=score_seconds, update_seconds=seconds
        )

    def capture(self) -> Captured:
        return Captured(
            {
                "policy": trainable_state(self._models.policy),
                "value": trainable_state(self._value),
                "policy_optimiser": self._policy_optimiser.tensors(),
                "value_optimiser": self._value_optimiser.tensors(),
            },
            {
                "policy_optimiser": self._policy_optimiser.counters(),
                "value_optimiser": self._value_optimiser.counters(),
                "kl_coef": self._kl_coef,
                "drift": self.drift,
            },
        )

    def restore(self, captured: Captured) -> None:
        tensors, values = captured.tensors, captured.values
        load_trainable_state(self._models.policy, tensors["policy"])
        load_trainable_state(self._value, tensors["value"])
        self._policy_optimiser.restore(tensors["policy_optimiser"], values["policy_optimiser"])
        self._value_optimiser.restore(tensors["value_optimiser"], values["value_optimiser"])
        self._kl_coef, self.drift = values["kl_coef"], values["drift"]

    def _values(self, rollout: Rollout) -> Tensor:
        """(C, T) the value model's V before each token."""
        return per_token(
            rollout.groups, self._models, self._section.micro_batch_tokens, rollout.mask.shape[1],
            lambda batch: score_values(self._value, batch),
        )  # fmt: skip

    def _update(
        self, step: int, rollout: Rollout, values: Tensor, advantages: Tensor, returns: Tensor
    ) -> dict[str, float]:
        section = self._section
        peak_value = section.value_learning_rate if section.value_learning_rate is not None else section.learning_rate
        rates = [
            learning_rate_at(step, self.total_steps, peak, section) for peak in (section.learning_rate, peak_value)
        ]
        totals: dict[str, float] = {}
        norms: list[tuple[float, float]] = []
        deviations: list[float] = []
        for groups in minibatches(step, section, len(rollout.groups), self._seed, "ppo"):
            sums, deviation = self._accumulate(rollout, groups, values, advantages, returns)
            add_sums(totals, sums)
            deviations.append(deviation)
            updates = self._policy_optimiser.update(rates[0]), self._value_optimiser.update(rates[1])
            norms.append((updates[0].grad_norm, updates[1].grad_norm))
        self.drift = max(self.drift, deviations[0])
        tokens = max(1.0, totals["tokens"])
        return {
            "train/policy_loss": totals["policy_loss"] / len(norms),
            "train/value_loss": totals["value_loss"] / len(norms),
            "train/entropy_nats": totals["entropy"] / tokens,
            "train/clip_fraction": totals["clipped"] / tokens,
            "train/value_clip_fraction": totals["value_clipped"] / tokens,
            "train/approx_kl": totals["approx_kl"] / tokens,
            "train/ratio_mean": totals["ratio"] / tokens,
            "train/ratio_max_deviation": deviations[0],
            "train/grad_norm": sum(n[0] for n in norms) / len(norms),
            "train/value_grad_norm": sum(n[1] for n in norms) / len(norms),
            "train/learning_rate": rates[0],
            "train/value_learning_rate": rates[1],
            "train/skipped_updates": self._policy_optimiser.skipped + self._value_optimiser.skipped,
        }

    def _accumulate(
        self, rollout: Rollout, groups: list[int], values: Tensor, advantages: Tensor, returns: Tensor
    ) -> tuple[dict[str, float], float]:
        """Gradients of one minibatch, whatever number of passes it takes; sums over its tokens, and how far the ratio
        of a token was from 1."""
        section, everything = self._section, whole(rollout)
        count = int(sum(rollout.mask[list(everything.rows[g])].sum() for g in groups))
        sums: dict[str, float] = {}
        deviation = 0.0
        for part in parts(rollout, everything, groups, self._models, section):
            batch, rows, mask, width = part.batch, part.rows, part.mask, part.mask.shape[1]
            scores = score_tokens(
                self._models.policy, batch, temperature=section.temperature, with_entropy=True, mask="loss"
            )
            policy = ppo_policy_loss(
                scores.logprobs, part.old_logprobs, advantages[rows, :width], mask,
                clip_range=section.clip_range, num_tokens=count,
            )  # fmt: skip
            assert scores.entropies is not None
            entropy = entropy_loss(scores.entropies, mask, num_tokens=count)
            (policy.loss + section.entropy_coef * entropy.loss).backward()
            value = ppo_value_loss(
                score_values(self._value, batch), values[rows, :width], returns[rows, :width], mask,
                value_clip_range=section.value_clip_range, num_tokens=count,
            )  # fmt: skip
            value.loss.backward()
            deviation = max(deviation, ratio_deviation(scores.logprobs, part.old_logprobs, mask))
            loss_sums = {
                "policy_loss": policy.loss.detach(), "value_loss": value.loss.detach(), "entropy": entropy.entropy_sum,
                "clipped": policy.clipped_count, "value_clipped": value.clipped_count,
                "approx_kl": policy.approx_kl_sum, "ratio": policy.ratio_sum, "tokens": policy.token_count,
            }  # fmt: skip
            add_sums(sums, loss_sums)
        return sums, deviation


def _signal_metrics(mask: Tensor, values: Tensor, advantages: Tensor, returns: Tensor) -> dict[str, float]:
    """How strong the learning signal is, and how much of it the value model explains. Before whitening."""
    mean = float(masked_mean(advantages, mask))
    return_mean = masked_mean(returns, mask)
    variance = float(masked_mean((returns - return_mean).square(), mask))
    error = returns - values
    unexplained = float(masked_mean((error - masked_mean(error, mask)).square(), mask))
    return {
        "train/advantage_mean": mean,
        "train/advantage_std": float(masked_mean((advantages - mean).square(), mask)) ** 0.5,
        "train/return_mean": float(return_mean),
        "train/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }
