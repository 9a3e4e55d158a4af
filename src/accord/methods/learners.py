"""The online methods without a value model, as learners: how each judges a completion, and with which loss it learns.

rloo        A = r - mean of the prompt's other samples; the completion is one action
reinforce   A = r - mean of the rollout's other samples; the completion is one action
grpo        A = (r - mean of the prompt's samples) [/ their std]; every token is an action, KL in loss or reward
online_dpo  the best and the worst sample of a prompt are a pair

r = shaped score (see accord.rewards.shaping) [- kl_coef * sum over tokens of log(policy / reference)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from accord.config import DPOConfig, GRPOConfig, OnlineDPOConfig, PolicyGradientFields, REINFORCEConfig, RLOOConfig
from accord.losses.group import (
    batch_advantages,
    completion_mean_weights,
    completion_policy_loss,
    constant_length_weights,
    group_advantages,
    rloo_advantages,
    scaled_batch_advantages,
    scaled_group_advantages,
    token_mean_weights,
)
from accord.losses.kl import kl_k1
from accord.losses.masked import sequence_logprobs
from accord.losses.ppo import PolicyLoss, entropy_loss, ppo_policy_loss
from accord.methods.online import Choice, Part, kl_loss, learned, sampler_correction
from accord.methods.online_trainer import Learner, Lesson, Size, Sums
from accord.methods.preference import Pair, PairObjective, RankedAnswers, StepCounts, dpo_objective
from accord.methods.rollouts import Rollout
from accord.models.token_scores import TokenScores
from accord.records import TokenGroup

__all__ = ["grpo", "online_dpo", "reinforce", "rloo"]

Advantages = Callable[[Tensor, Tensor], Tensor]
ActionLoss = Callable[[TokenScores, Part, Tensor, Tensor, Size], tuple[Tensor, Sums]]
"""Of a forward pass's scores, its part of the rollout, advantages (C,), weights of its actions, and the size."""


def rloo(section: RLOOConfig) -> Learner:
    """REINFORCE with a leave-one-out baseline. Source: Ahmadian et al. 2024, arXiv:2402.14740."""
    return _PolicyGradient(section, _priced_rewards, rloo_advantages, _completion_actions(section))


def reinforce(section: REINFORCEConfig) -> Learner:
    """REINFORCE with the rollout's mean as baseline. Source: Williams 1992."""
    of_batch = scaled_batch_advantages if section.advantage_scale == "std" else batch_advantages
    return _PolicyGradient(
        section, _priced_rewards, lambda rewards, group_index: of_batch(rewards), _completion_actions(section)
    )


def grpo(section: GRPOConfig) -> Learner:
    """Group-relative policy optimisation. Source: Shao et al. 2024, arXiv:2402.03300."""
    rewards = _priced_rewards if section.kl_in == "reward" else _rewards
    advantages = scaled_group_advantages if section.advantage_scale == "std" else group_advantages
    return _PolicyGradient(section, rewards, advantages, _token_actions(section), whole_completions=False)


def online_dpo(section: OnlineDPOConfig) -> Learner:
    """DPO on the policy's own answers. Source: Guo et al. 2024, arXiv:2402.04792."""
    options = {"loss": section.loss, "beta": section.beta, "logprobs": "sum"}
    return _BestAgainstWorst(section, dpo_objective(DPOConfig.model_validate(options)))


@dataclass(frozen=True, slots=True)
class _PolicyGradient:
    """Rewards, the advantages they give, and the loss of an action. See `accord.methods.online_trainer.Learner`."""

    section: PolicyGradientFields
    rewards: Callable[[Rollout, PolicyGradientFields], Tensor]
    advantages: Advantages
    action_loss: ActionLoss
    whole_completions: bool = True  # an action is a completion, not a token

    def lesson(self, rollout: Rollout) -> Lesson:
        rewards = self.rewards(rollout, self.section)
        advantages = self.advantages(rewards, rollout.group_index)
        weights, logged = sampler_correction(rollout, self.section, whole_completions=self.whole_completions)
        metrics = {
            **logged,
            "train/advantage_mean": float(advantages.mean()),
            "train/advantage_std": float(advantages.std(unbiased=False)),
            "train/kl_coef": self.section.kl_coef,
            **_ties(rollout),
        }
        return Lesson(learned(rollout), rewards, metrics, advantages, weights)

    def loss(self, scores: TokenScores, part: Part, lesson: Lesson, size: Size) -> tuple[Tensor, Sums]:
        assert lesson.advantages is not None and lesson.weights is not None and scores.entropies is not None
        weights = part.of(lesson.weights)
        loss, sums = self.action_loss(scores, part, part.of(lesson.advantages), weights, size)
        entropy = entropy_loss(scores.entropies, part.mask, num_tokens=size.tokens)
        return loss + self.section.entropy_coef * entropy.loss, sums

    def metrics(self, sums: dict[str, float], updates: int) -> dict[str, float]:
        kl = {"train/kl_loss": sums["kl_loss"] / updates} if "kl_loss" in sums else {}
        return {
            "train/policy_loss": sums["policy_loss"] / updates,
            "train/clip_fraction": sums["clipped"] / sums["actions"],
            **kl,
        }


@dataclass(frozen=True, slots=True)
class _BestAgainstWorst:
    """Of each prompt's samples the best and the worst are a pair. See `accord.methods.online_trainer.Learner`."""

    section: OnlineDPOConfig
    objective: PairObjective

    def lesson(self, rollout: Rollout) -> Lesson:
        rewards, choice = rollout.shaped.rewards, learned(rollout)
        groups: list[TokenGroup] = []
        pairs: list[tuple[int, ...]] = []
        for group, rows in zip(choice.groups, choice.rows, strict=True):
            best, worst = max(rows, key=lambda row: rewards[row]), min(rows, key=lambda row: rewards[row])
            if rewards[best] > rewards[worst]:
                pair = tuple(group.completions[rows.index(row)] for row in (best, worst))
                groups.append(TokenGroup(group.prompt_ids, pair, group.prompt_id, group.origin))
                pairs.append((best, worst))
        return Lesson(Choice(tuple(groups), tuple(pairs)), rewards, _ties(rollout))

    def loss(self, scores: TokenScores, part: Part, lesson: Lesson, size: Size) -> tuple[Tensor, Sums]:
        reference = sequence_logprobs(part.ref_logprobs, part.mask).tolist()
        pairs = [
            RankedAnswers(group, (Pair(chosen=0, rejected=1),), tuple(reference[2 * k : 2 * k + 2]))
            for k, group in enumerate(part.groups)
        ]
        count = StepCounts(pairs=size.completions // 2, best_tokens=0)
        return self.objective.loss_of(pairs, sequence_logprobs(scores.logprobs, part.mask), count)

    def metrics(self, sums: dict[str, float], updates: int) -> dict[str, float]:
        return self.objective.metrics(sums)


def _ties(rollout: Rollout) -> dict[str, float]:
    """The share of prompts whose samples, if more than one, all earn the same: comparing them teaches nothing."""
    rewards = rollout.shaped.rewards
    compared = [rewards[list(rows)] for rows in learned(rollout).rows if len(rows) > 1]
    tied = sum(bool((group == group[0]).all()) for group in compared)
    return {"rollout/tied_fraction": tied / len(compared)} if compared else {}


def _rewards(rollout: Rollout, section: PolicyGradientFields) -> Tensor:
    """(C,) shaped scores."""
    return rollout.shaped.rewards


def _priced_rewards(rollout: Rollout, section: PolicyGradientFields) -> Tensor:
    """(C,) shaped scores less kl_coef times log(policy / reference) of the whole completion."""
    distance = sequence_logprobs(kl_k1(rollout.old_logprobs, rollout.ref_logprobs), rollout.mask)
    return rollout.shaped.rewards - section.kl_coef * distance


def _completion_actions(section: PolicyGradientFields) -> ActionLoss:
    def loss(scores: TokenScores, part: Part, advantages: Tensor, weights: Tensor, size: Size) -> tuple[Tensor, Sums]:
        policy = completion_policy_loss(
            scores.logprobs, part.old_logprobs, advantages * weights[:, 0], part.mask,
            clip_range=section.clip_range, num_completions=size.completions,
        )  # fmt: skip
        return policy.loss, _policy_sums(policy)

    return loss


def _token_actions(section: GRPOConfig) -> ActionLoss:
    def loss(scores: TokenScores, part: Part, advantages: Tensor, weights: Tensor, size: Size) -> tuple[Tensor, Sums]:
        weights = weights * _token_weights(section, part, size)
        # The clipped loss is proportional to the advantages, so they can carry the weights.
        policy = ppo_policy_loss(
            scores.logprobs, part.old_logprobs, advantages[:, None] * weights, part.mask,
            clip_range=section.clip_range, num_tokens=1,
        )  # fmt: skip
        sums = _policy_sums(policy)
        kl = kl_loss(section, scores.logprobs, part, weights)
        if kl is None:
            return policy.loss, sums
        return policy.loss + section.kl_coef * kl, {**sums, "kl_loss": kl.detach()}

    return loss


def _token_weights(section: GRPOConfig, part: Part, size: Size) -> Tensor:
    """(C, T) what each token of the pass weighs in the loss of the whole update."""
    lengths = part.mask.sum(1)
    if section.averaging == "completion":
        weights = completion_mean_weights(lengths, num_completions=size.completions)
    elif section.averaging == "token":
        weights = token_mean_weights(lengths, num_tokens=size.tokens)
    else:
        weights = constant_length_weights(lengths, num_completions=size.completions, max_tokens=section.max_own_tokens)
    return weights[:, None].expand(part.mask.shape)


def _policy_sums(policy: PolicyLoss) -> Sums:
    return {"policy_loss": policy.loss.detach(), "clipped": policy.clipped_count, "actions": policy.token_count}
