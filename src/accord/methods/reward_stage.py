"""The reward stage: a scalar for an answer, from comparisons of answers to the same prompt.

After training, the scores of every head are shifted so that reference answers score 0 on average, inside the head's
weights, so every reader of the saved model sees the same scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accord.config import RewardConfig
from accord.data.shelf import kept, mapped, shelved
from accord.errors import DataError
from accord.measures.statistics import calibration_bins, calibration_error, pearson, win_rate
from accord.measures.text import num_words
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
from accord.methods.corpus import Part, split_holdout
from accord.methods.offline import OfflineTrainer, group_passes
from accord.methods.reward import Comparison, LengthDecorrelation, RewardObjective, compared, read_scores
from accord.models.heads import keep_heads, shift_scores
from accord.models.layout import Layout, collate
from accord.models.load import reward_model_from
from accord.models.memory import one_pass
from accord.models.token_scores import last_hidden_states
from accord.randomness import torch_seed
from accord.records import Group, Interval, TokenGroup
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["run_reward"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Scores of held-out comparisons: one entry a pair (score(better) - score(worse), prompt), one a completion.

    head_accuracies  of each head of an ensemble by itself; empty for a single head
    disagreement     mean over completions of the standard deviation of the heads' scores; 0 for a single head
    """

    differences: tuple[float, ...]
    pair_prompts: tuple[int, ...]
    log_loss: float
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    head_accuracies: tuple[float, ...]
    disagreement: float

    def accuracy(self) -> Interval:
        """Share of pairs in the annotators' order, ties half, with a prompt-clustered interval."""
        return win_rate(_wins(self.differences), self.pair_prompts)

    def metrics(self) -> dict[str, float]:
        """What is logged while the model trains."""
        rows = {
            "eval/loss": self.log_loss,
            "eval/accuracy": self.accuracy().value,
            "eval/margin/mean": sum(self.differences) / len(self.differences),
            "eval/length_correlation": pearson(self.lengths, self.scores).value,
        }
        return rows | self.of_heads()

    def of_heads(self) -> dict[str, float]:
        """What only an ensemble has."""
        if not self.head_accuracies:
            return {}
        return {
            "eval/head_accuracy/min": min(self.head_accuracies),
            "eval/head_accuracy/max": max(self.head_accuracies),
            "eval/head_disagreement/mean": self.disagreement,
        }


def _wins(differences: Sequence[float]) -> list[float]:
    return [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences]


ITEMS_AT_ONCE = 64  # whose pairs are found together: a square of that many comparisons' completions


def _score_held_out(
    model: Any, items: Sequence[Comparison], heads: int, layout: Layout, pad_id: int, budget: int
) -> HeldOut:
    """What the first `heads` heads of the model make of comparisons; there is at least one."""
    by_item = [scores[:, :heads] for scores in read_scores(model, items, layout=layout, pad_id=pad_id, budget=budget)]
    log_loss = groups = 0.0
    for first in range(0, len(items), ITEMS_AT_ONCE):
        some = slice(first, first + ITEMS_AT_ONCE)
        result = compared(items[some], torch.cat(by_item[some]).mean(1))
        log_loss, groups = log_loss + float(result.log_loss_sum), groups + float(result.group_count)
    pairs: list[Tensor] = []
    prompts: list[int] = []
    for item, scores in zip(items, by_item, strict=True):
        for i, rank in enumerate(item.ranks):
            for j, other in enumerate(item.ranks):
                if rank < other:
                    pairs.append(scores[i] - scores[j])
                    prompts.append(item.tokens.prompt_id)
    differences, scores = torch.stack(pairs), torch.cat(by_item)
    accuracies = [sum(_wins(of_head)) / len(prompts) for of_head in differences.t().tolist()]
    return HeldOut(
        differences=tuple(differences.mean(1).tolist()),
        pair_prompts=tuple(prompts),
        log_loss=log_loss / max(1.0, groups),
        scores=tuple(scores.mean(1).tolist()),
        lengths=tuple(len(c.ids) for item in items for c in item.tokens.completions),
        head_accuracies=tuple(accuracies) if heads > 1 else (),
        disagreement=float(scores.std(1, correction=0).mean()),
    )


def run_reward(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the reward model of this run; returns its summary."""
    section = context.recipe.reward
    assert section is not None
    start: Path | str = section.init or stage_model(context, "sft") or base_folder(context)
    part = _long_enough(context.corpus.comparisons(), section.min_words)
    references = _reference_groups(context, section, part)
    sources = part.sources | _reference_sources(context, section) | weights_hash(start)

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.base(context, start)
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        items = _comparisons(context, train, policy, section, "comparisons")
        tests = _comparisons(context, held_out, policy, section, "held-out comparisons")
        if not items:
            raise DataError("the reward stage has no comparison to learn from: the answers compared are all alike")
        layout = choose_layout(context, policy.model, mapped(items, lambda item: item.tokens), policy.pad_id)
        # Length decorrelation takes a head more, the last one, for as long as the model trains.
        heads = section.heads + (1 if section.length_decorrelation else 0)
        # Nobody needs the policy any more: frozen, it gives its trunk to the reward model instead of a copy.
        policy.model.requires_grad_(False)
        model = reward_model_from(policy.model, torch_seed(context.seed, "reward-head"), heads=heads)
        if context.recipe.model.adapter is None:
            model.requires_grad_(True)
        adapt(context, model, "reward")
        reading: dict[str, Any] = {"layout": layout, "pad_id": policy.pad_id, "budget": section.micro_batch_tokens}

        def measure() -> HeldOut | None:
            return _score_held_out(model, tests, section.heads, **reading) if tests else None

        def evaluate() -> dict[str, float]:
            scored = measure()
            return {} if scored is None else scored.metrics()

        trainer = OfflineTrainer(
            "reward", model, items, section, section, _objective(section, context.seed, model, reading),
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=evaluate,
        )  # fmt: skip
        context.say(
            f"{len(items)} comparisons, {len(tests)} held out, {trainer.total_steps} steps of {section.batch_size}"
        )
        run_training(trainer, run, context.console, context.recipe.guards)
        keep_heads(model, section.heads)
        shift = _normalise(context, model, policy, references, items, section.micro_batch_tokens)
        summary = _summary(len(items), trainer.total_steps, measure(), shift, section)
        summary["account"] += data_note(part)
        card = model_card(context.recipe, "reward", start, sources, summary)
        save_trained(model, policy.template.tokenizer, run.path / "model", start=start, card=card)
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"reward": section.model_dump(mode="json"), "data": data}
    return run_stage(context, "reward", settings=settings, sources=sources, body=body)


def _objective(section: RewardConfig, seed: int, model: Any, reading: Mapping[str, Any]) -> RewardObjective:
    """What the section asks for; `reading` is how `read_scores` reads the model."""
    length = None
    if section.length_decorrelation:
        length = LengthDecorrelation(section.length_decorrelation, lambda items: read_scores(model, items, **reading))
    return RewardObjective(section.centring_coef, heads=section.heads, seed=seed, loss=section.loss, length=length)


def _long_enough(part: Part, minimum: int) -> Part:
    """The comparisons without answers of fewer than `minimum` words, and without those that leaves no two ranks of."""
    if not minimum:
        return part
    short = 0

    def without_short() -> Iterator[Group]:
        nonlocal short
        for group in part.groups:
            answers = tuple(answer for answer in group.completions if num_words(answer.text) >= minimum)
            short += len(group.completions) - len(answers)
            if len({answer.rank for answer in answers}) > 1:
                yield replace(group, completions=answers)

    groups = shelved(without_short())
    if not groups:
        raise DataError(
            f"`reward.min_words` = {minimum} leaves none of {len(part.groups):,} comparisons two answers to compare: "
            "lower it"
        )
    lost = len(part.groups) - len(groups)
    note = f"{short:,} answers of fewer than {minimum} words left out, and with them {lost:,} comparisons"
    return Part(groups, part.sources, (*part.notes, *((note,) if short else ())))


def _comparisons(
    context: Context, groups: Sequence[Group], policy: LoadedPolicy, section: RewardConfig, what: str
) -> Sequence[Comparison]:
    def comparison(pair: tuple[Group, TokenGroup]) -> Comparison:
        group, tokens = pair
        return Comparison(
            tokens,
            tuple(c.rank or 0 for c in group.completions),
            (group.margin or 0.0) if section.use_margins else 0.0,
            1.0 if group.soft_label is None else group.soft_label,
        )

    items = mapped(tokenised(context, groups, policy.template, what), comparison)
    usable = kept(items, lambda item: item.has_pairs)
    ties = sum(item.is_tie for item in items)
    if ties:
        context.say(f"{ties} of {len(items)} {what} are ties and teach nothing: left out")
    if len(usable) + ties < len(items):
        identical = len(items) - len(usable) - ties
        context.say(f"{identical} of {len(items)} {what} are between identical answers and teach nothing: left out")
    return usable


def _uses_demonstrations(context: Context, section: RewardConfig) -> bool:
    if section.normalise_on == "auto":
        return bool(context.corpus.sft.groups)
    return section.normalise_on == "demonstrations"


def _reference_groups(context: Context, section: RewardConfig, comparisons: Part) -> Sequence[Group]:
    """The answers that shall score 0 on average; none when the config says so."""
    if section.normalise_on == "none":
        return ()
    part = context.corpus.demonstrations() if _uses_demonstrations(context, section) else comparisons
    groups = tuple(split_holdout(part.groups, context.recipe.data.holdout)[0][:REFERENCES_USED])
    if part.groups and part.groups[0].kind != "sft":
        best = [(g, min(g.completions, key=lambda c: c.rank or 0)) for g in groups]
        return tuple(Group(g.prompt, (c,), origin=g.origin) for g, c in best)
    return groups


REFERENCES_USED = 2000  # the mean score of more answers changes nothing that could be seen


def _reference_sources(context: Context, section: RewardConfig) -> dict[str, str]:
    uses = section.normalise_on != "none" and _uses_demonstrations(context, section)
    return context.corpus.demonstrations().sources if uses else {}


def _normalise(
    context: Context,
    model: Any,
    policy: LoadedPolicy,
    references: Sequence[Group],
    items: Sequence[Comparison],
    budget: int,
) -> str:
    """Shift the head so that the reference answers score 0 on average; says how well that went."""
    if not references:
        return "Scores are not normalised: their level means nothing."
    groups = [t for _, t in tokenised(context, references, policy.template, "reference answers")]
    compared = [item.tokens for item in items[:REFERENCES_USED]]
    states = [_last_states(model, policy, part, budget) for part in (groups, compared)]
    residual = shift_scores(model, *states)
    uneven = f"; single scores moved unevenly by {residual:.2g}" if residual else ""
    return f"Scores are shifted so that {len(groups):,} reference answers score 0 on average{uneven}."


def _last_states(model: Any, policy: LoadedPolicy, groups: Sequence[TokenGroup], budget: int) -> Tensor:
    """(C, H) hidden state of every completion's last token."""
    states = []
    for groups_of_pass in group_passes(groups, lambda g: g, "plain", budget):
        batch = collate(groups_of_pass, layout="plain", pad_id=policy.pad_id, device=model.device)
        with torch.no_grad(), one_pass(groups_of_pass, "scoring reference answers"):
            states.append(last_hidden_states(model, batch))
    return torch.cat(states)


def _summary(count: int, steps: int, scored: HeldOut | None, shift: str, section: RewardConfig) -> dict[str, Any]:
    account = [f"A reward model learned from {count:,} comparisons in {steps:,} optimiser steps.", shift]
    if section.heads > 1:
        account.append(
            f"It has {section.heads} heads, each with a bootstrap of the comparisons; its score is their mean."
        )
    if section.length_decorrelation:
        account.append("What follows length was learned by a head of its own, which is left out of the saved model.")
    if scored is None:
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
    if scored.head_accuracies:
        account.append(
            f"By themselves the heads agree with the annotators {min(scored.head_accuracies):.1%} to "
            f"{max(scored.head_accuracies):.1%} of the time; their scores of an answer have a standard "
            f"deviation of {scored.disagreement:.3f} on average."
        )
    warnings = []
    if accuracy.low <= 0.5:
        warnings.append("This reward model is not distinguishable from guessing: do not optimise against it.")
    if abs(length.value) > 0.5:
        advice = "" if section.length_decorrelation else "; `reward.length_decorrelation` = 1 works against it"
        warnings.append(f"Scores follow length (correlation {length.value:+.2f}): expect PPO to exploit that{advice}.")
    return {
        "headline": [
            headline("eval/accuracy", accuracy),
            headline("eval/calibration_error", error),
            headline("eval/length_correlation", length),
            headline("eval/loss", scored.log_loss),
            *(headline(name, value) for name, value in scored.of_heads().items()),
        ],
        "account": account,
        "warnings": warnings,
        "calibration": [
            {"predicted": b.confidence, "observed": b.accuracy, "n": b.count}
            for b in calibration_bins(scored.differences)
        ],
    }
