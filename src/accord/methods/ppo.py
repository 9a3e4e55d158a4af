"""Proximal policy optimisation with human feedback.

    reward[t]  = -kl_coef * (log policy - log reference)[t] + (score - penalties) * [t is the last token]
    advantages = GAE(reward, values), whitened over the rollout
    loss       = clipped policy loss - entropy_coef * entropy
                 [+ kl_coef * KL, if not in the reward] [+ ptx_coef * SFT loss]
    value loss = clipped squared error, with an optimiser of its own; or, on the policy's trunk, added to the policy's

Source: Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325; Schulman et al. 2017,
arXiv:1707.06347. Departures: by default the value model has a trunk and an optimiser of its own, so there is no value
coefficient; the score stands at the last token (see `token_rewards`); a completion cut by length is scored as it is,
less a penalty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from accord.config import PPOConfig
from accord.losses.advantages import Advantages, gae
from accord.losses.kl import adaptive_kl_coef, kl_k1
from accord.losses.masked import masked_mean, whiten
from accord.methods.online import (
    Choice,
    add_sums,
    final_rewards,
    kl_ending,
    learned,
    learned_tokens,
    minibatches,
    parts,
    prompt_indices,
    rollout_metrics,
    sampler_correction,
    step_outcome,
)
from accord.methods.ppo_update import OneTrunk, Pupils, Signal, TwoModels
from accord.methods.ptx import Imitation
from accord.methods.rollouts import Prompt, Rollout, RolloutModels, collect
from accord.models.memory import MicroBatches, one_pass
from accord.phases import phase
from accord.training.loop import Captured, StepOutcome

__all__ = ["PPOTrainer"]


class PPOTrainer:
    """Collect a rollout, learn from it, forget it; see `accord.training.loop.Trainer`.

    `value` is the value model; with `value_trunk` = policy, the head on the policy's trunk.
    """

    stage = "ppo"

    def __init__(
        self,
        models: RolloutModels,
        value: Any,
        prompts: Sequence[Prompt],
        section: PPOConfig,
        seed: int,
        imitation: Imitation | None = None,
    ) -> None:
        self.checkpoint_every, self.keep_checkpoints = section.checkpoint_every, section.keep_checkpoints
        self.episodes_per_step = section.prompts_per_step * section.samples_per_prompt
        self.total_steps = -(-section.episodes // self.episodes_per_step)
        self.drift: float = 0.0  # the largest |ratio - 1| seen before any update of a rollout
        self._models, self._prompts, self._section, self._seed = models, prompts, section, seed
        kind = OneTrunk if section.value_trunk == "policy" else TwoModels
        self._pupils: Pupils = kind(models.policy, value, section, self.total_steps)
        self._imitation, self._kl_coef = imitation, section.kl_coef
        self._micro_batches = MicroBatches(section.micro_batch_tokens)

    def step(self, step: int) -> StepOutcome:
        """Generate, score, compute advantages, then update over several shuffled passes."""
        section = self._section
        prompts = [self._prompts[i] for i in prompt_indices(step, section, len(self._prompts), self._seed, "ppo")]
        rollout = collect(self._models, prompts, section, ("ppo", self._seed, step), self._micro_batches)
        kl = kl_k1(rollout.old_logprobs, rollout.ref_logprobs)
        price = self._kl_coef if section.kl_in == "reward" else 0.0
        rewards = final_rewards(rollout, price * kl)
        with phase("logging"):
            metrics = rollout_metrics(rollout, kl, rewards.sum(1)) | {"train/kl_coef": self._kl_coef}
        ending = kl_ending(metrics, section)
        score_seconds, update_seconds = rollout.score_seconds, 0.0
        if ending is None:
            scored = time.monotonic()
            values = self._pupils.values(rollout, self._models, self._micro_batches)
            started = time.monotonic()
            score_seconds += started - scored
            mask = learned_tokens(rollout)
            result = gae(rewards, values, mask, gamma=section.gamma, gae_lambda=section.gae_lambda)
            metrics |= _signal_metrics(mask, values, result)
            advantages = whiten(result.advantages, mask) if section.whiten_advantages else result.advantages
            weights, logged = sampler_correction(rollout, section)
            signal = Signal(values, advantages, result.returns, weights, self._kl_coef)
            metrics |= logged | self._update(step, rollout, signal)
            update_seconds = time.monotonic() - started
            self._steer_kl(step, metrics["rollout/kl_per_sequence_nats"])
        return step_outcome(
            step, self.total_steps, rollout, section, metrics,
            score_seconds=score_seconds, update_seconds=update_seconds, ending=ending,
            notes=self._micro_batches.notes(),
        )  # fmt: skip

    def capture(self) -> Captured:
        pupils = self._pupils.capture()
        own = {
            "kl_coef": self._kl_coef,
            "drift": self.drift,
            "rewards": self._models.rewards.capture(),
            "micro_batch_tokens": self._micro_batches.tokens,
        }
        return Captured(pupils.tensors, pupils.values | own)

    def restore(self, captured: Captured) -> None:
        self._pupils.restore(captured)
        self._kl_coef, self.drift = captured.values["kl_coef"], captured.values["drift"]
        self._models.rewards.restore(captured.values["rewards"])
        self._micro_batches.restore(captured.values)

    def _steer_kl(self, step: int, observed: float) -> None:
        """The next step's kl_coef. While the policy stands still there is nothing to steer."""
        section = self._section
        if section.kl_controller == "adaptive" and section.target_kl is not None and step > section.value_warmup:
            self._kl_coef = adaptive_kl_coef(
                self._kl_coef, observed,
                target_kl=section.target_kl, horizon=section.kl_horizon, num_samples=self.episodes_per_step,
            )  # fmt: skip

    def _update(self, step: int, rollout: Rollout, signal: Signal) -> dict[str, float]:
        """Learn from the rollout, minibatch by minibatch. In the value model's warm-up the policy takes no part."""
        section, choice = self._section, learned(rollout)
        teaches_policy = step > section.value_warmup
        totals = {"minibatches": 0.0, "updates": 0.0, "grad_norm": 0.0, "value_grad_norm": 0.0}
        deviations: list[float] = []
        first = (step - 1) * section.update_epochs * section.minibatches + 1
        for number, groups in enumerate(minibatches(step, section, len(choice.groups), self._seed, "ppo"), first):
            sums, deviation = self._micro_batches.attempt(
                partial(self._accumulate, rollout, choice, groups, signal, number, teaches_policy),
                self._pupils.discard,
            )
            add_sums(totals, {**sums, "minibatches": 1})
            deviations.append(deviation)
            if _too_far(sums, section):
                self._pupils.discard()
                break
            add_sums(totals, self._pupils.update(step, teaches_policy=teaches_policy))
            totals["updates"] += 1
        metrics = {"train/updates": totals["updates"], "train/skipped_updates": float(self._pupils.skipped)}
        if not choice.groups:  # every completion was cut by length, and those are left out
            return metrics
        metrics |= self._pupils.metrics(totals, step, teaches_policy=teaches_policy)
        if totals.get("ptx_tokens"):
            metrics["train/ptx_loss"] = totals["ptx_nll"] / totals["ptx_tokens"]
        if teaches_policy:
            self.drift = max(self.drift, deviations[0])
            metrics["train/ratio_max_deviation"] = deviations[0]
        return metrics

    def _accumulate(
        self,
        rollout: Rollout,
        choice: Choice,
        groups: list[int],
        signal: Signal,
        number: int,
        teaches_policy: bool,
        budget: int,
    ) -> tuple[dict[str, float], float]:
        """Gradients of the minibatch `number`, in passes of at most `budget` tokens, imitation's too unless the policy
        has moved too far; sums over its tokens, and how far the ratio of a token was from 1."""
        count = int(sum(rollout.mask[list(choice.rows[g])].sum() for g in groups))
        sums: dict[str, float] = {}
        deviation = 0.0
        for part in parts(rollout, choice, groups, self._models, budget):
            with one_pass(part.groups):
                part_sums, part_deviation = self._pupils.accumulate(part, signal, count, teaches_policy=teaches_policy)
            add_sums(sums, part_sums)
            deviation = max(deviation, part_deviation)
        if teaches_policy and self._imitation is not None and not _too_far(sums, self._section):
            add_sums(sums, self._imitation.accumulate(self._models.policy, number, budget, self._pupils.backward))
        return sums, deviation


def _too_far(sums: dict[str, float], section: PPOConfig) -> bool:
    """Whether a minibatch shows that the updates before it moved the policy too far from the one that sampled."""
    limit = section.update_kl_stop
    return limit is not None and "approx_kl" in sums and sums["approx_kl"] > limit * sums["tokens"]


def _signal_metrics(mask: Tensor, values: Tensor, signal: Advantages) -> dict[str, float]:
    """How strong the learning signal is, and how much of it the value model explains. Before whitening."""
    advantages, returns = signal.advantages, signal.returns
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
