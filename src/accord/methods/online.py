"""What all online methods share: which prompts a step takes, how a score becomes a reward, how a rollout is cut into
updates and forward passes, what is logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.config import PolicyGradientFields, RolloutFields, TokenKLFields
from accord.data.order import batch_indices
from accord.losses.advantages import token_rewards
from accord.losses.kl import kl_k2_loss, kl_k3_loss
from accord.losses.masked import masked_mean, sequence_logprobs
from accord.losses.ppo import sampler_weights
from accord.measures.text import distinct_n, duplicate_fraction, repetition, self_similarity
from accord.methods.judging import Failure, score_metrics, token_rewards_of
from accord.methods.offline import group_passes
from accord.methods.rollouts import Rollout, RolloutModels
from accord.models.layout import CompletionBatch, collate
from accord.phases import phase
from accord.randomness import permutation
from accord.records import TokenGroup
from accord.rollout.conversations import Conversation
from accord.training.environment import peak_memory_mb
from accord.training.loop import StepOutcome

__all__ = [
    "RATIO_TOLERANCE",
    "Choice",
    "Part",
    "add_sums",
    "failures_as_samples",
    "final_rewards",
    "kl_ending",
    "kl_loss",
    "learned",
    "learned_tokens",
    "minibatches",
    "parts",
    "prompt_indices",
    "ratio_deviation",
    "rollout_metrics",
    "sampler_correction",
    "samples_of",
    "step_outcome",
]

RATIO_TOLERANCE = 1e-5  # of float32
SAMPLES_KEPT = 4


def prompt_indices(step: int, section: RolloutFields, count: int, seed: int, stage: str) -> list[int]:
    """The step's prompts: whole passes through a shuffled list, continuing into the next pass where one ends."""
    size = section.prompts_per_step
    return [batch_indices(p + 1, count, 1, seed, stage)[0] for p in range((step - 1) * size, step * size)]


def final_rewards(rollout: Rollout, kl_penalty: Tensor) -> Tensor:
    """(C, T) the reward of each token for methods that credit single tokens: the KL penalty everywhere, what a function
    of tokens pays where it pays it, what an environment gives at the answer it is for, and the rest of the completion's
    reward at its last token, so that a completion's tokens add up to its reward less its penalties."""
    paid = rollout.turn_rewards
    of_tokens = token_rewards_of(rollout.verdicts, rollout.mask)
    if of_tokens is not None:
        paid = of_tokens if paid is None else of_tokens + paid
    if paid is None:
        return token_rewards(rollout.shaped.rewards, kl_penalty, rollout.mask)
    return token_rewards(rollout.shaped.rewards - paid.sum(1), kl_penalty - paid, rollout.mask)


def kl_ending(metrics: Mapping[str, float], section: RolloutFields) -> str | None:
    """Why a rollout with these metrics is not learned from and ends the training; None if its KL is within budget."""
    kl = metrics["rollout/kl_per_sequence_nats"]
    if section.kl_budget is None or kl <= section.kl_budget:
        return None
    return f"KL {kl:.4g} nats per answer exceeded the budget of {section.kl_budget:g}"


# --- terms that several losses share ---------------------------------------------------------------------------------


def kl_loss(section: TokenKLFields, logprobs: Tensor, part: Part, weights: Tensor) -> Tensor | None:
    """() the KL of a forward pass's tokens, each with its weight (C, T), to differentiate and not yet times kl_coef;
    None where it is paid in the reward."""
    if section.kl_in == "reward":
        return None
    loss = kl_k2_loss if section.kl_estimator == "k2" else kl_k3_loss
    return loss(logprobs, part.ref_logprobs, weights, part.mask).loss


def sampler_correction(
    rollout: Rollout, section: PolicyGradientFields, *, whole_completions: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """(C, T) what each token weighs, or (C, 1) each completion as one action, because the sampler drew it and not the
    trainer's policy; and what is logged of it. All 1 without the correction."""
    old, sampler, mask = rollout.old_logprobs, rollout.sampler_logprobs, rollout.mask
    if whole_completions:
        old, sampler = sequence_logprobs(old, mask)[:, None], sequence_logprobs(sampler, mask)[:, None]
        mask = torch.ones_like(mask[:, :1])
    if section.sampler_correction == "none":
        return torch.ones_like(old), {}
    cap = section.sampler_correction_cap
    weights = sampler_weights(old, sampler, mask, cap=cap)
    return weights, {
        "rollout/sampler_weight/mean": float(masked_mean(weights, mask)),
        "rollout/sampler_weight_capped_fraction": float(masked_mean((weights >= cap).float(), mask)),
    }


# --- from a rollout to forward passes --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """The completions of a rollout that are learned from: groups, and where each one's completions stand in it."""

    groups: tuple[TokenGroup, ...]
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One forward pass's share of an update: its batch, and what the rollout knows of the same completions.

    groups        whose completions are in the batch, in its order
    rows          (C,) int64   where the completions stand in the rollout; on the CPU, as the rollout
    mask          (C, T) bool  True = a token the policy wrote: these alone count in a loss
    old_logprobs, ref_logprobs  (C, T) nats
    """

    batch: CompletionBatch
    groups: tuple[TokenGroup, ...]
    rows: Tensor
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    def of(self, values: Tensor) -> Tensor:
        """This pass's part of what is known of the rollout, (C, T) or (C,), where its batch is."""
        return _of_pass(values, self.rows, self.batch)


def learned(rollout: Rollout) -> Choice:
    """The completions that are learned from, in the rollout's order: all, unless truncated ones are left out."""
    counts = rollout.shaped.learned.tolist()
    groups: list[TokenGroup] = []
    rows: list[tuple[int, ...]] = []
    end = 0
    for group in rollout.groups:
        first, end = end, end + len(group.completions)
        chosen = tuple(row for row in range(first, end) if counts[row])
        if chosen:
            completions = tuple(group.completions[row - first] for row in chosen)
            groups.append(TokenGroup(group.prompt_ids, completions, group.prompt_id, group.origin))
            rows.append(chosen)
    return Choice(tuple(groups), tuple(rows))


def learned_tokens(rollout: Rollout) -> Tensor:
    """(C, T) bool, the tokens that are learned from; all the policy wrote where that would be none, to be measured."""
    mask = rollout.mask & rollout.shaped.learned[:, None]
    return mask if mask.any() else rollout.mask


def minibatches(step: int, section: RolloutFields, count: int, seed: int, stage: str) -> Iterator[list[int]]:
    """Which of `count` groups make each update of a rollout: `update_epochs` passes, each shuffled afresh and cut into
    `minibatches` parts. A part without groups, when there are fewer, is left out."""
    for epoch in range(section.update_epochs):
        order = permutation(count, f"{stage}-update", seed, step, epoch)
        yield from filter(None, (order[part :: section.minibatches] for part in range(section.minibatches)))


def parts(
    rollout: Rollout, choice: Choice, groups: Sequence[int], models: RolloutModels, budget: int
) -> Iterator[Part]:
    """The chosen groups of one update, in forward passes of at most `budget` tokens."""
    pad_id = models.template.pad_id
    for indices in group_passes(groups, lambda g: choice.groups[g], models.layout, budget):
        with phase("data"):
            chosen = tuple(choice.groups[g] for g in indices)
            batch = collate(chosen, layout=models.layout, pad_id=pad_id, device=models.policy.device)
            rows = torch.tensor([row for g in indices for row in choice.rows[g]])
            old, ref = (_of_pass(x, rows, batch) for x in (rollout.old_logprobs, rollout.ref_logprobs))
            part = Part(batch, chosen, rows, batch.completion_mask, old, ref)
        yield part


def _of_pass(values: Tensor, rows: Tensor, batch: CompletionBatch) -> Tensor:
    """The rows of a rollout's (C, T) or (C,) values that a pass is about, as wide as its batch, where its batch is."""
    chosen = values[rows] if values.dim() == 1 else values[rows, : batch.completion_mask.shape[1]]
    return chosen.to(batch.completion_mask.device)


def ratio_deviation(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> float:
    """Largest |p / p_old - 1| of a token: rounding, as long as nothing has been updated."""
    return float(((logprobs.detach() - old_logprobs).exp() - 1)[mask].abs().max())


def add_sums(totals: dict[str, float], part: Mapping[str, float | Tensor]) -> None:
    """Add the numbers of `part` to those of the same name in `totals`, which is changed."""
    for name, number in part.items():
        totals[name] = totals.get(name, 0.0) + float(number)


# --- what is logged --------------------------------------------------------------------------------------------------


def rollout_metrics(rollout: Rollout, kl: Tensor, rewards: Tensor) -> dict[str, float]:
    """`kl` (C, T) is log(policy / reference) of each token; `rewards` (C,) what the method optimises."""
    mask, texts = rollout.mask, [c.text for c in rollout.conversations]
    lengths, scores = mask.sum(1).float(), rollout.earned
    metrics = {
        "rollout/score/mean": float(scores.mean()),
        "rollout/score/std": float(scores.std(unbiased=False)),
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
        **_gaming_metrics(rollout, lengths),
    }
    metrics |= {f"rollout/{name}_term/mean": float(term.mean()) for name, term in rollout.shaped.terms.items()}
    metrics |= score_metrics(rollout.verdicts)
    if rollout.turn_rewards is not None:
        metrics |= _conversation_metrics(rollout)
    if rollout.gold is not None:
        metrics["rollout/gold_utility/mean"] = float(rollout.gold.mean())
        metrics["rollout/gold_utility/std"] = float(rollout.gold.std(unbiased=False))
    return metrics


def _gaming_metrics(rollout: Rollout, lengths: Tensor) -> dict[str, float]:
    """What the guards watch besides: stock answers, a reward that pays for length, scores at their ceiling."""
    texts, scores = iter(conversation.text for conversation in rollout.conversations), rollout.earned
    answers = [[next(texts) for _ in group.completions] for group in rollout.groups]
    top = scores == scores.max()
    metrics = {
        "rollout/duplicate_fraction": duplicate_fraction(answers),
        "rollout/ceiling_fraction": float(top.float().mean()),
    }
    likeness = self_similarity(answers)
    if likeness is not None:
        metrics["rollout/self_similarity"] = likeness
    if len(lengths) > 1 and float(lengths.std()) > 0 and float(scores.std()) > 0:
        metrics["rollout/length_correlation"] = float(torch.corrcoef(torch.stack([lengths, scores]))[0, 1])
    return {**metrics, **rollout.watched}


def _conversation_metrics(rollout: Rollout) -> dict[str, float]:
    conversations = rollout.conversations
    return {
        "rollout/turns/mean": sum(len(c.answers) for c in conversations) / len(conversations),
        "rollout/out_of_room_fraction": sum(c.end == "room" for c in conversations) / len(conversations),
        "rollout/out_of_turns_fraction": sum(c.end == "turns" for c in conversations) / len(conversations),
    }


def step_outcome(
    step: int,
    total_steps: int,
    rollout: Rollout,
    section: RolloutFields,
    metrics: Mapping[str, float],
    *,
    score_seconds: float,
    update_seconds: float,
    ending: str | None = None,
    notes: tuple[str, ...] = (),
) -> StepOutcome:
    """A step's report: `metrics` with progress and clocks, the status line, and samples when they are due; `ending` if
    training ends here, without having learned from this rollout."""
    seconds = rollout.generate_seconds + score_seconds + update_seconds
    progress = {
        "rollout/failed_scores": len(rollout.failures),
        "rollout/left_out_prompts": section.prompts_per_step - len(rollout.groups),
        "rollout/prompts": step * section.prompts_per_step,
        "rollout/samples": step * section.prompts_per_step * section.samples_per_prompt,
        "time/generate_seconds": rollout.generate_seconds,
        "time/score_seconds": score_seconds,
        "time/update_seconds": update_seconds,
        "system/tokens_per_second": float(rollout.mask.sum()) / seconds,
        "system/peak_memory_mb": peak_memory_mb(),
    }
    status = f"score {metrics['rollout/score/mean']:+.2f}  KL {metrics['rollout/kl_per_sequence_nats']:.2f}"
    due = step == 1 or step % section.samples_every == 0 or step == total_steps or ending is not None
    samples = (*(samples_of(rollout) if due else ()), *failures_as_samples(rollout.failures))
    return StepOutcome({**metrics, **progress}, status, samples, ending, notes)


def samples_of(rollout: Rollout) -> tuple[dict[str, Any], ...]:
    n = len(rollout.requests) // len(rollout.groups)
    rows = range(0, len(rollout.requests), n)[:SAMPLES_KEPT]
    return tuple(
        {
            "prompt": "\n".join(m.content for m in rollout.conversations[i].opening.messages),
            "completion": rollout.requests[i].completion,
            **({} if rollout.turn_rewards is None else {"messages": _plain(rollout.conversations[i])}),
            "score": float(rollout.earned[i]),
            **_reward_note(rollout, i),
            "finished": bool(rollout.finished[i]),
            **({} if rollout.gold is None else {"gold": float(rollout.gold[i])}),
        }
        for i in rows
    )


def _reward_note(rollout: Rollout, row: int) -> dict[str, float]:
    """The reward, where shaping made another number of the score."""
    score, reward = float(rollout.earned[row]), float(rollout.shaped.rewards[row])
    return {} if reward == score else {"reward": reward}


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    """What was said after the prompt."""
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def failures_as_samples(failures: Sequence[Failure]) -> tuple[dict[str, Any], ...]:
    """The first failures of a step, for samples.jsonl: completions without a score, and why."""
    return tuple(
        {
            "prompt": "\n".join(m.content for m in failure.request.prompt),
            "completion": failure.request.completion,
            "error": failure.error,
        }
        for failure in failures[:SAMPLES_KEPT]
    )
