"""The ilql stage: answers with returns, training of policy and heads together, and what Q knows of held-out answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accord.config import ILQLConfig
from accord.data.shelf import kept, mapped
from accord.measures.statistics import pearson
from accord.methods.card import model_card
from accord.methods.context import (
    Context,
    LoadedPolicy,
    choose_layout,
    data_note,
    headline,
    run_stage,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import split_holdout
from accord.methods.ilql import ILQLObjective, RatedAnswers, ReturnScale, TargetSync, rated_answers
from accord.methods.offline import OfflineTrainer, Sums, group_passes
from accord.methods.roles import starting_model
from accord.models.ilql import ILQLModel, save_heads
from accord.models.layout import Layout, collate
from accord.models.memory import one_pass
from accord.randomness import torch_seed
from accord.records import Group, Interval
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["HeldOut", "measured", "run_ilql"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out answers: the step's metrics of them, and, one an answer, Q of the last token beside the return."""

    metrics: dict[str, float]
    last_q: tuple[float, ...]
    returns: tuple[float, ...]

    @property
    def correlation(self) -> Interval:
        return pearson(self.last_q, self.returns)


def measured(
    model: ILQLModel, items: Sequence[RatedAnswers], objective: ILQLObjective, layout: Layout, pad_id: int, budget: int
) -> HeldOut:
    """What the model says of answers it does not learn from."""
    sums: Sums = {}
    last_q: list[float] = []
    returns: list[float] = []
    for items_of_pass in group_passes(items, objective.tokens, layout, budget):
        batch = collate([item.tokens for item in items_of_pass], layout=layout, pad_id=pad_id, device=model.device)
        with torch.no_grad(), one_pass([item.tokens for item in items_of_pass], "evaluating on held-out data"):
            scores = model(batch)
            _, part = objective.loss_of(scores, items_of_pass, batch, 1.0)
        sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        columns = torch.arange(batch.completion_mask.shape[1], device=model.device)
        last = columns.where(batch.completion_mask, -1).amax(dim=1)
        last_q += scores.target_q.amin(dim=0).gather(1, last[:, None])[:, 0].tolist()
        returns += [value for item in items_of_pass for value in item.returns]
    found = {name.replace("train/", "eval/"): value for name, value in objective.metrics(sums).items()}
    return HeldOut({name: value for name, value in found.items() if "loss" in name}, tuple(last_q), tuple(returns))


def run_ilql(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the ILQL stage of this run; returns its summary."""
    section = context.recipe.ilql
    assert section is not None
    start = starting_model(context, section.init)
    part = context.corpus.ratings()
    sources = part.sources | weights_hash(start)

    def body(run: RunFolder) -> dict[str, Any]:
        for note in (*part.notes, *_marks(part.groups)):
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, "ilql")
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        raw = _items(context, train, policy, "rated answers")
        scale = ReturnScale.of([value for item in raw for value in item.returns])
        applied = scale if section.standardise else ReturnScale()
        items = mapped(raw, applied.apply)
        tests = mapped(_items(context, held_out, policy, "held-out rated answers"), applied.apply)
        layout = choose_layout(context, policy.model, mapped(items, lambda item: item.tokens), policy.pad_id)
        model = ILQLModel(policy.model, seed=torch_seed(context.seed, "ilql-heads"))
        objective = ILQLObjective(section)

        def held_out_now() -> HeldOut:
            return measured(model, tests, objective, layout, policy.pad_id, section.micro_batch_tokens)

        def measure() -> dict[str, float]:
            if not tests:
                return {}
            found = held_out_now()
            return {**found.metrics, "eval/return_correlation": found.correlation.value}

        trainer = OfflineTrainer(
            "ilql", model, items, section, section, objective,
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=measure,
            memory=TargetSync(model, rate=section.target_rate, every=section.sync_every),
        )  # fmt: skip
        context.say(
            f"{_num_answers(items)} answers to {len(items)} prompts, {_num_answers(tests)} held out, "
            f"{trainer.total_steps} steps of {section.batch_size}"
        )
        run_training(trainer, run, context.console, context.recipe.guards)
        summary = _summary(section, items, scale, trainer.total_steps, held_out_now() if tests else None)
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, "ilql", start, sources, summary))
        save_heads(model, run.path / "model", beta=section.beta)
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"ilql": section.model_dump(mode="json"), "data": data}
    return run_stage(context, "ilql", settings=settings, sources=sources, body=body)


def _marks(groups: Sequence[Group]) -> list[str]:
    """Says what a mark counts, where answers have marks and no scores."""
    marked = sum(c.score is None and c.label is not None for group in groups for c in group.completions)
    if not marked:
        return []
    return [f"{marked} answers marked good or bad count +1 and -1 (of a pair, the chosen and the rejected one)"]


def _items(context: Context, groups: Sequence[Group], policy: LoadedPolicy, what: str) -> Sequence[RatedAnswers]:
    found = mapped(tokenised(context, groups, policy.template, what), lambda pair: rated_answers(*pair))
    items: Sequence[Any] = kept(found, lambda item: item is not None)
    missing = sum(len(group.completions) for group in groups) - _num_answers(items)
    if missing:
        context.say(f"{missing} of the {what} have no score and no mark, or do not fit: left out")
    return items


def _num_answers(items: Sequence[RatedAnswers]) -> int:
    return sum(len(item.rewards) for item in items)


def _summary(
    section: ILQLConfig, items: Sequence[RatedAnswers], scale: ReturnScale, steps: int, held_out: HeldOut | None
) -> dict[str, Any]:
    scaled = ", scaled to mean 0 and variance 1" if section.standardise else ""
    account = [
        f"The policy imitated {_num_answers(items):,} answers, and its Q heads learned what to expect after each "
        f"token, in {steps:,} optimiser steps. Returns had mean {scale.mean:.3g} and standard deviation "
        f"{scale.std:.3g}{scaled}.",
        f"Accord samples from log-probability + beta * advantage with beta = {section.beta:g}; the heads are in "
        "`ilql_heads.safetensors`. Plain transformers reads the policy alone, which is beta = 0: imitation.",
    ]
    if held_out is None:
        warning = "Nothing was held out, so it is not known whether Q tells good answers from bad: set `data.holdout`."
        return {"headline": [], "account": account, "warnings": [warning]}
    correlation = held_out.correlation
    account.append(
        f"Q of the last token of {len(held_out.returns):,} held-out answers correlates {correlation.value:+.2f} with "
        f"their return (95% interval {correlation.low:+.2f} to {correlation.high:+.2f})."
    )
    warnings = []
    if correlation.low <= 0:
        warnings.append(
            "On held-out answers Q is not distinguishable from guessing: a larger beta would steer by noise."
        )
    rows = [headline("eval/return_correlation", correlation)]
    rows += [headline(name, held_out.metrics[name]) for name in ("eval/q_loss", "eval/awac_loss")]
    return {"headline": rows, "account": account, "warnings": warnings}
