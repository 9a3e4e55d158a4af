"""The reward model: a scalar for an answer, from comparisons of answers to the same prompt.

    loss = mean over prompts of the mean over its pairs of -log sigmoid(score(better) - score(worse) - margin)

The head reads the hidden state of the answer's last token. After training, the scores are shifted so that reference
answers score 0 on average, inside the head's weights, so every reader of the saved model sees the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accord.config import RewardConfig
from accord.losses.reward import centring_penalty, ranked_loss
from accord.measures.statistics import calibration_bins, calibration_error, pearson, win_rate
from accord.methods.card import model_card
from accord.methods.context import (
    Context,
    LoadedPolicy,
    adapt,
    base_folder,
    choose_layout,
    data_note,
    headline,
    run_stage,
    save_trained,
    stage_model,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import split_holdout
from accord.methods.offline import OfflineTrainer, PolicyLogprobs, Sums, group_passes
from accord.models.heads import shift_scores
from accord.models.layout import CompletionBatch, Layout, collate
from accord.models.load import reward_model_from
from accord.models.token_scores import last_hidden_states, score_completions
from accord.randomness import torch_seed
from accord.records import Group, Interval, TokenGroup
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["Comparison", "RewardObjective", "run_reward"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to one prompt, as tokens, with their ranks (0 = best, equal = tie)."""

    tokens: TokenGroup
    ranks: tuple[int, ...]
    margin: float = 0.0
    soft_label: float = 1.0

    @property
    def has_pairs(self) -> bool:
        return len(set(self.ranks)) > 1


class RewardObjective:
    """Bradley-Terry over the pairs of each prompt, every prompt weighing the same, plus the centring penalty."""

    def __init__(self, centring_coef: float) -> None:
        self._centring_coef = centring_coef

    def tokens(self, item: Comparison) -> TokenGroup:
        return item.tokens

    def begin(self, items: Sequence[Comparison], logprobs: PolicyLogprobs) -> float:
        return len(items)

    def loss(self, model: Any, items: Sequence[Comparison], batch: CompletionBatch, step: float) -> tuple[Tensor, Sums]:
        scores = score_completions(model, batch)
        result = ranked_loss(
            scores,
            torch.tensor([rank for item in items for rank in item.ranks]),
            batch.group_index,
            margins=torch.tensor([item.margin for item in items]),
            soft_labels=torch.tensor([item.soft_label for item in items]),
            num_groups=step,
        )
        loss = result.loss
        if self._centring_coef:
            loss = loss + self._centring_coef * centring_penalty(scores, batch.group_index, num_groups=step)
        sums = {
            "log_loss": float(result.log_loss_sum),
            "groups": float(result.group_count),
            "correct": float(result.correct_sum),
            "margin": float(result.score_margin_sum),
            "pairs": float(result.pair_count),
            "score": float(scores.detach().sum()),
            "completions": float(len(scores)),
        }
        return loss, sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {
            "train/loss": sums["log_loss"] / max(1.0, sums["groups"]),
            "train/accuracy": sums["correct"] / max(1.0, sums["pairs"]),
            "train/margin/mean": sums["margin"] / max(1.0, sums["pairs"]),
            "train/score/mean": sums["score"] / max(1.0, sums["completions"]),
        }


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Scores of held-out comparisons: one entry a pair (score(better) - score(worse), prompt), one a completion."""

    differences: tuple[float, ...]
    pair_prompts: tuple[int, ...]
    log_loss: float
    scores: tuple[float, ...]
    lengths: tuple[int, ...]

    def accuracy(self) -> Interval:
        """Share of pairs in the annotators' order, ties half, with a prompt-clustered interval."""
        return win_rate([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in self.differences], self.pair_prompts)


def _score_held_out(model: Any, items: Sequence[Comparison], layout: Layout, pad_id: int, budget: int) -> HeldOut:
    differences: list[float] = []
    prompts: list[int] = []
    scores_of: list[float] = []
    lengths: list[int] = []
    objective, sums = RewardObjective(0.0), {"log_loss": 0.0, "groups": 0.0}
    for items_of_pass in group_passes(items, objective.tokens, layout, budget):
        batch = collate([item.tokens for item in items_of_pass], layout=layout, pad_id=pad_id)
        with torch.no_grad():
            _, part = objective.loss(model, items_of_pass, batch, len(items))
            scores = score_completions(model, batch).tolist()
        for name in sums:
            sums[name] += part[name]
        scores_of += scores
        lengths += batch.valid_mask.sum(1).tolist()
        for index, item in enumerate(items_of_pass):
            own = [s for s, g in zip(scores, batch.group_index.tolist(), strict=True) if g == index]
            for i, rank in enumerate(item.ranks):
                for j, other in enumerate(item.ranks):
                    if rank < other:
                        differences.append(own[i] - own[j])
                        prompts.append(item.tokens.prompt_id)
    return HeldOut(
        tuple(differences),
        tuple(prompts),
        sums["log_loss"] / max(1.0, sums["groups"]),
        tuple(scores_of),
        tuple(lengths),
    )


def run_reward(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the reward model of this run; returns its summary."""
    section = context.recipe.reward
    assert section is not None
    start: Path | str = section.init or stage_model(context, "sft") or base_folder(context)
    part = context.corpus.comparisons()
    references = _reference_groups(context, section)
    sources = part.sources | _reference_sources(context, section) | weights_hash(start)

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.from_folder(start, context.recipe.model.template)
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        items = _comparisons(context, train, policy, section, "comparisons")
        tests = _comparisons(context, held_out, policy, section, "held-out comparisons")
        layout = choose_layout(context, policy.model, [c.tokens for c in items], policy.pad_id)
        model = reward_model_from(policy.model, torch_seed(context.seed, "reward-head"))
        adapt(context, model, "reward")

        def measure() -> dict[str, float]:
            if not tests:
                return {}
            scored = _score_held_out(model, tests, layout, policy.pad_id, section.micro_batch_tokens)
            margin = sum(scored.differences) / max(1, len(scored.differences))
            accuracy = scored.accuracy().value if scored.differences else 0.5
            return {"eval/loss": scored.log_loss, "eval/accuracy": accuracy, "eval/margin/mean": margin}

        trainer = OfflineTrainer(
            "reward", model, items, section, section, RewardObjective(section.centring_coef),
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=measure,
        )  # fmt: skip
        context.say(
            f"{len(items)} comparisons, {len(tests)} held out, {trainer.total_steps} steps of {section.batch_size}"
        )
        run_training(trainer, run, context.console)
        shift = _normalise(context, model, policy, references, items, section.micro_batch_tokens)
        scored = _score_held_out(model, tests, layout, policy.pad_id, section.micro_batch_tokens) if tests else None
        summary = _summary(len(items), trainer.total_steps, scored, shift)
        summary["account"] += data_note(part)
        card = model_card(context.recipe, "reward", start, sources, summary)
        save_trained(model, policy.template.tokenizer, run.path / "model", start=start, card=card)
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"reward": section.model_dump(mode="json"), "data": data}
    return run_stage(context, "reward", settings=settings, sources=sources, body=body)


def _comparisons(
    context: Context, groups: list[Group], policy: LoadedPolicy, section: RewardConfig, what: str
) -> list[Comparison]:
    pairs = tokenised(context, groups, policy.template, what)
    items = [
        Comparison(
            tokens,
            tuple(c.rank or 0 for c in group.completions),
            (group.margin or 0.0) if section.use_margins else 0.0,
            1.0 if group.soft_label is None else group.soft_label,
        )
        for group, tokens in pairs
    ]
    usable = [item for item in items if item.has_pairs]
    if len(usable) < len(items):
        context.say(f"{len(items) - len(usable)} of {len(items)} {what} are ties and teach nothing: left out")
    return usable


def _uses_demonstrations(context: Context, section: RewardConfig) -> bool:
    if section.normalise_on == "auto":
        return bool(context.corpus.sft.groups)
    return section.normalise_on == "demonstrations"


def _reference_groups(context: Context, section: RewardConfig) -> tuple[Group, ...]:
    """The answers that shall score 0 on average; none when the config says so."""
    if section.normalise_on == "none":
        return ()
    part = context.corpus.demonstrations() if _uses_demonstrations(context, section) else context.corpus.comparisons()
    if part.groups and part.groups[0].kind != "sft":
        best = [(g, min(g.completions, key=lambda c: c.rank or 0)) for g in part.groups]
        groups: tuple[Group, ...] = tuple(Group(g.prompt, (c,), origin=g.origin) for g, c in best)
    else:
        groups = part.groups
    return tuple(split_holdout(groups, context.recipe.data.holdout)[0])[:REFERENCES_USED]


REFERENCES_USED = 2000  # the mean score of more answers changes nothing that could be seen


def _reference_sources(context: Context, section: RewardConfig) -> dict[str, str]:
    uses = section.normalise_on != "none" and _uses_demonstrations(context, section)
    return context.corpus.demonstrations().sources if uses else {}


def _normalise(
    context: Context,
    model: Any,
    policy: LoadedPolicy,
    references: tuple[Group, ...],
    items: Sequence[Comparison],
    budget: int,
) -> str:
    """Shift the head so that the reference answers score 0 on average; says how well that went."""
    if not references:
        return "Scores are not normalised: their level means nothing."
    groups = [t for _, t in tokenised(context, list(references), policy.template, "reference answers")]
    compared = [item.tokens for item in items[:REFERENCES_USED]]
    states = [_last_states(model, policy, part, budget) for part in (groups, compared)]
    residual = shift_scores(model, *states)
    uneven = f"; single scores moved unevenly by {residual:.2g}" if residual else ""
    return f"Scores are shifted so that {len(groups):,} reference answers score 0 on average{uneven}."


def _last_states(model: Any, policy: LoadedPolicy, groups: Sequence[TokenGroup], budget: int) -> Tensor:
    """(C, H) hidden state of every completion's last token."""
    states = []
    for groups_of_pass in group_passes(groups, lambda g: g, "plain", budget):
        batch = collate(groups_of_pass, layout="plain", pad_id=policy.pad_id)
        with torch.no_grad():
            states.append(last_hidden_states(model, batch))
    return torch.cat(states)


def _summary(count: int, steps: int, scored: HeldOut | None, shift: str) -> dict[str, Any]:
    account = [f"A reward model learned from {count:,} comparisons in {steps:,} optimiser steps.", shift]
    if scored is None or not scored.differences:
        warning = "Nothing was held out, so it is not known how well this reward model judges: set `data.holdout`."
        return {"headline": [], "account": account, "warnings": [warning]}
    accuracy, error = scored.accuracy(), calibration_error(scored.differences)
    length = pearson(scored.lengths, scored.scores)
    account.append(
        f"On {len(scored.differences):,} held-out pairs it agrees with the annotators {accuracy.value:.1%} of the time "
        f"(95% interval {accuracy.low:.1%} to {accuracy.high:.1%}). Annotators disagree with each other, so 100% is "
        f"not "
        f"attainable. Its confidence is off by {error:.1%} on average. The correlation of score and length is "
        f"{length.value:+.2f}."
    )
    warnings = []
    if accuracy.low <= 0.5:
        warnings.append("This reward model is not distinguishable from guessing: do not optimise against it.")
    if abs(length.value) > 0.5:
        warnings.append(f"Scores follow length (correlation {length.value:+.2f}): expect PPO to exploit that.")
    return {
        "headline": [
            headline("eval/accuracy", accuracy),
            headline("eval/calibration_error", error),
            headline("eval/length_correlation", length),
            headline("eval/loss", scored.log_loss),
        ],
        "account": account,
        "warnings": warnings,
        "calibration": [
            {"predicted": b.confidence, "observed": b.accuracy, "n": b.count}
            for b in calibration_bins(scored.differences)
        ],
    }
