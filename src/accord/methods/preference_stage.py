"""The dpo and orpo stages: pairs of answers, trained without a reward model, and measured on held-out pairs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.config import MARGIN_FREE, DPOConfig, ORPOConfig
from accord.data.convert import pair_margin
from accord.data.shelf import joined, kept, mapped, numbered
from accord.errors import DataError
from accord.measures.statistics import cluster_interval, win_rate
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
from accord.methods.corpus import Part, split_holdout
from accord.methods.likelihood import LikelihoodChange, policy_logprobs, start_logprobs
from accord.methods.offline import OfflineTrainer
from accord.methods.plan import check_labels
from accord.methods.preference import (
    REFERENCE_FREE,
    PairObjective,
    RankedAnswers,
    StepCounts,
    dpo_objective,
    orpo_objective,
    pair_indices,
    ranked_answers,
)
from accord.methods.roles import starting_model
from accord.records import Group, TokenGroup
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["run_dpo", "run_orpo"]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What tells the two stages apart. `loss` is the name the sets of losses in `preference` know it by."""

    stage: str
    loss: str
    section: DPOConfig | ORPOConfig
    objective: PairObjective
    use_margins: bool


def run_dpo(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the DPO stage of this run; returns its summary."""
    section = context.recipe.dpo
    assert section is not None
    return _run(context, _Plan("dpo", section.loss, section, dpo_objective(section), section.use_margins))


def run_orpo(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the ORPO stage of this run; returns its summary."""
    section = context.recipe.orpo
    assert section is not None
    return _run(context, _Plan("orpo", "orpo", section, orpo_objective(section), use_margins=False))


def _run(context: Context, plan: _Plan) -> dict[str, Any]:
    stage, section = plan.stage, plan.section
    start = starting_model(context, section.init)
    part = context.corpus.comparisons()
    notes = _agreed(plan, part)
    weights = weights_hash(start)
    sources = part.sources | weights

    def body(run: RunFolder) -> dict[str, Any]:
        for note in (*part.notes, *notes):
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, stage)
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        items = _items(context, train, policy, plan.use_margins, "comparisons")
        tests = _items(context, held_out, policy, plan.use_margins, "held-out comparisons")
        if not items:
            raise DataError(f"the {stage} stage has no pair to learn from: the answers compared are all alike")
        layout = choose_layout(context, policy.model, mapped(items, _tokens_of), policy.pad_id)
        budget = section.micro_batch_tokens
        logprobs = policy_logprobs(policy, layout, budget)
        test_tokens = mapped(tests, _tokens_of)
        if plan.loss in REFERENCE_FREE:
            before = logprobs(test_tokens)
        else:
            both = joined(items, tests)
            tokens = mapped(both, _tokens_of)
            known = start_logprobs(context, run, policy, weights, tokens, layout=layout, budget=budget)
            both = _with_reference(both, known)
            items, tests = both[: len(items)], both[len(items) :]
            before = torch.tensor([value for item in tests for value in item.ref_logprobs])

        def measure() -> dict[str, float]:
            return _measured(plan.objective, tests, logprobs(test_tokens)) if tests else {}

        trainer = OfflineTrainer(
            stage, policy.model, items, section, section, plan.objective,
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=measure,
        )  # fmt: skip
        context.say(
            f"{len(items)} comparisons with {_num_pairs(items)} pairs, {len(tests)} held out, "
            f"{trainer.total_steps} steps of {section.batch_size}"
        )
        run_training(trainer, run, context.console, context.recipe.guards)
        summary = _summary(plan, items, trainer.total_steps, tests, before, logprobs(test_tokens))
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, stage, start, sources, summary))
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {stage: section.model_dump(mode="json"), "data": data}
    return run_stage(context, stage, settings=settings, sources=sources, body=body)


def _agreed(plan: _Plan, part: Part) -> list[str]:
    """What of the data the loss does not read, and what the loss would read and the data has not, said.
    Raises ConfigError where leaving it out would be wrong."""
    check_labels(part.groups, plan.loss)
    notes = _contradictions(part.groups)
    margins = sum(
        pair_margin(group, first, second) is not None
        for group in part.groups
        for first, second in combinations(group.completions, 2)
    )
    if plan.use_margins and not margins:
        notes.append("no pair has a margin or scores: `dpo.use_margins` has nothing to use")
    if margins and not plan.use_margins:
        can = plan.stage == "dpo" and plan.loss not in MARGIN_FREE
        why = "`dpo.use_margins` is off" if can else f"the {plan.loss} loss has no place for them"
        notes.append(f"the margins of {margins:,} pairs are not used: {why}")
    return notes


def _contradictions(groups: Sequence[Group]) -> list[str]:
    """A note on pairs that the data has in both orders, from annotators who disagreed."""
    ordered, turned = array("q"), array("q")  # hashes, not texts: the data may be larger than memory
    for group in groups:
        if group.kind == "pairs" and group.completions[0].rank != group.completions[1].rank:
            chosen, rejected = sorted(group.completions, key=lambda answer: answer.rank or 0)
            ordered.append(hash((group.prompt_id, chosen.messages, rejected.messages)))
            turned.append(hash((group.prompt_id, rejected.messages, chosen.messages)))
    both = len(np.intersect1d(np.array(ordered), np.array(turned))) // 2
    return [f"{both:,} pairs are there in both orders: each teaches against the other"] if both else []


def _items(
    context: Context, groups: Sequence[Group], policy: LoadedPolicy, use_margins: bool, what: str
) -> Sequence[RankedAnswers]:
    pairs = tokenised(context, groups, policy.template, what)
    found = mapped(pairs, lambda pair: ranked_answers(*pair, use_margins=use_margins))
    items = kept(found, lambda item: bool(item.pairs))
    if len(items) < len(found):
        context.say(f"{len(found) - len(items)} of {len(found)} {what} compare equal answers: left out")
    return items


def _tokens_of(item: RankedAnswers) -> TokenGroup:
    return item.tokens


def _with_reference(items: Sequence[RankedAnswers], logprobs: Tensor) -> Sequence[RankedAnswers]:
    counts = np.fromiter((len(item.tokens.completions) for item in items), dtype=np.int64, count=len(items))
    parts = logprobs.split(counts.tolist())
    return numbered(items, lambda i, item: replace(item, ref_logprobs=tuple(parts[i].tolist())))


def _num_pairs(items: Sequence[RankedAnswers]) -> int:
    return sum(len(item.pairs) for item in items)


def _measured(objective: PairObjective, tests: Sequence[RankedAnswers], logprobs: Tensor) -> dict[str, float]:
    """The step's metrics, of held-out comparisons."""
    _, sums = objective.loss_of(tests, logprobs, StepCounts.of(tests))
    return {name.replace("train/", "eval/", 1): value for name, value in objective.metrics(sums).items()}


# --- the account -----------------------------------------------------------------------------------------------------


def _summary(
    plan: _Plan, items: Sequence[RankedAnswers], steps: int, tests: Sequence[RankedAnswers], before: Tensor,
    after: Tensor,
) -> dict[str, Any]:  # fmt: skip
    reference = "without a reference" if plan.loss in REFERENCE_FREE else "with the model it started from as reference"
    account = [
        f"The policy learned from {_num_pairs(items):,} pairs of {len(items):,} comparisons in {steps:,} optimiser "
        f"steps, {reference} (loss: {plan.loss})."
    ]
    if not tests:
        warning = "Nothing was held out, so it is not known what this policy learned: set `data.holdout`."
        return {"headline": [], "account": account, "warnings": [warning]}
    prompts = [item.tokens.prompt_id for item in tests for _ in item.pairs]
    margins = plan.objective.margins(tests, after)
    accuracy = win_rate([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in margins], prompts)
    account.append(
        f"On {len(margins):,} held-out pairs its implicit reward agrees with the annotators {accuracy.value:.1%} of "
        f"the time (95% interval {accuracy.low:.1%} to {accuracy.high:.1%}). Whether it also writes better answers, "
        "`accord evaluate` measures."
    )
    lengths = torch.tensor([length for item in tests for length in item.lengths])
    chosen, rejected = (
        LikelihoodChange.of(name, (after - before)[index].tolist(), prompts, int(lengths[index].sum()))
        for name, index in zip(("chosen", "rejected"), pair_indices(tests), strict=True)
    )
    account += [chosen.account(), rejected.account()]
    warnings = []
    if accuracy.low <= 0.5:
        warnings.append("This policy does not tell chosen from rejected answers better than guessing.")
    if chosen.fell_far:
        warnings.append(chosen.warning(_remedy(plan)))
    rows = [headline("eval/accuracy", accuracy), headline("eval/margin/mean", cluster_interval(margins, prompts))]
    return {"headline": [*rows, chosen.row(), rejected.row()], "account": account, "warnings": warnings}


def _remedy(plan: _Plan) -> str:
    """After a colon: what to do against probability that went to answers that nobody compared."""
    if plan.stage == "orpo":
        return "lower `orpo.odds_ratio_coef` or `orpo.learning_rate`"
    return "raise `dpo.sft_coef` or `dpo.beta`, lower `dpo.learning_rate`, or use `dpo.loss` = apo_zero"
