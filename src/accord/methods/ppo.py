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

import torch
from torch import Tensor

from accord.config import PPOConfig
from accord.losses.advantages import gae, token_rewards
from accord.losses.kl import adaptive_kl_coef, kl_k1
from accord.losses.masked import masked_mean, whiten
from accord.losses.ppo import entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.methods.offline import group_passes
from accord.methods.online import prompt_indices, rollout_metrics, samples_of, shaped_scores
from accord.methods.rollouts import Prompt, Rollout, RolloutModels, collect, per_token
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.layout import collate
from accord.models.token_scores import score_tokens, score_values
from accord.randomness import permutation
from accord.training.environment import peak_memory_mb
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
        tokens = float(rollout.mask.sum())
        metrics = {
            **rollout_metrics(rollout, kl, rewards.sum(1)),
            **_signal_metrics(rollout.mask, values, result.advantages, result.returns),
            **update,
            "train/kl_coef": self._kl_coef,
            "rollout/prompts": step * section.prompts_per_step,
            "rollout/samples": step * self.episodes_per_step,
            "time/generate_seconds": rollout.generate_seconds,
            "time/score_seconds": score_seconds,
            "time/update_seconds": seconds,
            "system/tokens_per_second": tokens / (rollout.generate_seconds + score_seconds + seconds),
            "system/peak_memory_mb": peak_memory_mb(),
        }
        if section.kl_controller == "adaptive" and section.target_kl is not None:
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef,
                metrics["rollout/kl_per_sequence_nats"],
                target_kl=section.target_kl,
                horizon=section.kl_horizon,
                num_samples=self.episodes_per_step,
            )
        status = f"score {metrics['rollout/score/mean']:+.2f}  KL {metrics['rollout/kl_per_sequence_nats']:.2f}"
        due = step == 1 or step % section.samples_every == 0 or step == self.total_steps
        return StepOutcome(metrics, status, samples_of(rollout) if due else ())

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
        for epoch in range(section.update_epochs):
            order = permutation(len(rollout.groups), "ppo-update", self._seed, step, epoch)
            for part in range(section.minibatches):
                groups = order[part :: section.minibatches]
                sums = self._accumulate(rollout, groups, values, advantages, returns)
                deviation = sums.pop("ratio_deviation")
                if epoch == 0 and part == 0:
                    self.drift = max(self.drift, deviation)
                    totals["start_deviation"] = deviation
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value
                norms.append(
                    (
                        self._policy_optimiser.update(rates[0]).grad_norm,
                        self._value_optimiser.update(rates[1]).grad_norm,
                    )
                )
        tokens = max(1.0, totals["tokens"])
        return {
            "train/policy_loss": totals["policy_loss"] / len(norms),
            "train/value_loss": totals["value_loss"] / len(norms),
            "train/entropy_nats": totals["entropy"] / tokens,
            "train/clip_fraction": totals["clipped"] / tokens,
            "train/value_clip_fraction": totals["value_clipped"] / tokens,
            "train/approx_kl": totals["approx_kl"] / tokens,
            "train/ratio_mean": totals["ratio"] / tokens,
            "train/ratio_max_deviation": totals["start_deviation"],
            "train/grad_norm": sum(n[0] for n in norms) / len(norms),
            "train/value_grad_norm": sum(n[1] for n in norms) / len(norms),
            "train/learning_rate": rates[0],
            "train/value_learning_rate": rates[1],
            "train/skipped_updates": self._policy_optimiser.skipped + self._value_optimiser.skipped,
        }

    def _accumulate(
        self, rollout: Rollout, groups: list[int], values: Tensor, advantages: Tensor, returns: Tensor
    ) -> dict[str, float]:
        """Gradients of one minibatch, whatever number of passes it takes; sums over its tokens."""
        section, models = self._section, self._models
        n = section.samples_per_prompt
        count = int(sum(rollout.mask[g * n : (g + 1) * n].sum() for g in groups))
        sums: dict[str, float] = {}
        for indices in group_passes(groups, lambda g: rollout.groups[g], models.layout, section.micro_batch_tokens):
            batch = collate([rollout.groups[g] for g in indices], layout=models.layout, pad_id=models.template.pad_id)
            rows = torch.tensor([g * n + k for g in indices for k in range(n)])
            width = batch.valid_mask.shape[1]
            mask, old = batch.valid_mask, rollout.old_logprobs[rows, :width]
            scores = score_tokens(models.policy, batch, temperature=section.temperature, with_entropy=True)
            policy = ppo_policy_loss(
                scores.logprobs, old, advantages[rows, :width], mask, clip_range=section.clip_range, num_tokens=count
            )
            assert scores.entropies is not None
            entropy = entropy_loss(scores.entropies, mask, num_tokens=count)
            (policy.loss + section.entropy_coef * entropy.loss).backward()
            value = ppo_value_loss(
                score_values(self._value, batch), values[rows, :width], returns[rows, :width], mask,
                value_clip_range=section.value_clip_range, num_tokens=count,
            )  # fmt: skip
            value.loss.backward()
            deviation = float(((scores.logprobs.detach() - old).exp() - 1)[mask].abs().max())
            part = {
                "policy_loss": policy.loss.detach(), "value_loss": value.loss.detach(), "entropy": entropy.entropy_sum,
                "clipped": policy.clipped_count, "value_clipped": value.clipped_count,
                "approx_kl": policy.approx_kl_sum, "ratio": policy.ratio_sum, "tokens": policy.token_count,
            }  # fmt: skip
            for name, number in part.items():
                sums[name] = sums.get(name, 0.0) + float(number.detach())
            sums["ratio_deviation"] = max(sums.get("ratio_deviation", 0.0), deviation)
        return sums


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
