"""The kto stage: answers marked good or bad one by one (KTO, BCO), trained and measured on held-out answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accord.config import KTOConfig
from accord.errors import ConfigError
from accord.losses.kto import class_weights as balanced_weights
from accord.measures.statistics import win_rate
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
from accord.methods.kto import (
    JudgedAnswer,
    JudgedObjective,
    RewardShift,
    bco_objective,
    derangement,
    kto_objective,
    with_mismatched,
    with_reference,
)
from accord.methods.likelihood import LikelihoodChange, policy_logprobs, start_logprobs
from accord.methods.offline import OfflineTrainer, PolicyLogprobs
from accord.methods.roles import starting_model
from accord.records import Group, TokenCompletion
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["run_kto"]


def run_kto(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the KTO stage of this run; returns its summary."""
    section = context.recipe.kto
    assert section is not None
    start = starting_model(context, section.init)
    part = context.corpus.labelled()
    weights = weights_hash(start)
    sources = part.sources | weights

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, "kto")
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        items = _items(context, train, policy, "answers")
        tests = _items(context, held_out, policy, "held-out answers")
        _require_both_kinds(section, items)
        layout = choose_layout(context, policy.model, [item.tokens for item in items], policy.pad_id)
        budget = section.micro_batch_tokens
        memory = RewardShift() if section.loss == "bco" else None
        if memory is None:
            class_weights = _class_weights(section, items)
            context.say(f"weights: desirable answers {class_weights[0]:.3g}, undesirable {class_weights[1]:.3g}")
            items, tests = _mismatched(context, items, tests)
            objective = kto_objective(section, class_weights)
        else:
            objective = bco_objective(section, memory)
        groups = [group for item in (*items, *tests) for group in item.groups]
        known = start_logprobs(context, run, policy, weights, groups, layout=layout, budget=budget)
        both = with_reference([*items, *tests], known.tolist())
        items, tests = both[: len(items)], both[len(items) :]
        logprobs = policy_logprobs(policy, layout, budget)

        def measure() -> dict[str, float]:
            if not tests:
                return {}
            step = objective.held_out(tests, logprobs)
            _, sums = objective.loss_of(tests, logprobs([item.tokens for item in tests]), step)
            return {name.replace("train/", "eval/", 1): value for name, value in objective.metrics(sums).items()}

        trainer = OfflineTrainer(
            "kto", policy.model, items, section, section, objective,
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=measure, memory=memory,
        )  # fmt: skip
        context.say(f"{len(items)} answers, {len(tests)} held out, {trainer.total_steps} steps of {section.batch_size}")
        run_training(trainer, run, context.console, context.recipe.guards)
        summary = _summary(section, items, trainer.total_steps, tests, objective, logprobs)
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, "kto", start, sources, summary))
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"kto": section.model_dump(mode="json"), "data": data}
    return run_stage(context, "kto", settings=settings, sources=sources, body=body)


def _items(context: Context, groups: Sequence[Group], policy: LoadedPolicy, what: str) -> list[JudgedAnswer]:
    found = tokenised(context, groups, policy.template, what)
    return [JudgedAnswer(tokens, bool(group.completions[0].label)) for group, tokens in found]


def _counts(items: Sequence[JudgedAnswer]) -> tuple[int, int]:
    """(desirable, undesirable)"""
    desirable = sum(item.desirable for item in items)
    return desirable, len(items) - desirable


def _require_both_kinds(section: KTOConfig, items: Sequence[JudgedAnswer]) -> None:
    """Raises ConfigError when a kind is missing, unless both weights were chosen by hand."""
    counts = _counts(items)
    if 0 not in counts or None not in (section.desirable_weight, section.undesirable_weight):
        return
    missing = "desirable" if counts[0] == 0 else "undesirable"
    raise ConfigError(
        f"none of the {len(items):,} answers to learn from is {missing}, so there is nothing to tell apart: add some, "
        "use `accord sft` for good answers alone, or set `kto.desirable_weight` and `kto.undesirable_weight` (with "
        "`kto.loss` = kto) to train all the same"
    )


def _class_weights(section: KTOConfig, items: Sequence[JudgedAnswer]) -> tuple[float, float]:
    """Those of the section, else what makes up for unequal numbers of the two kinds."""
    counts, given = _counts(items), (section.desirable_weight, section.undesirable_weight)
    balanced = (1.0, 1.0) if 0 in counts else balanced_weights(*counts)
    return balanced[0] if given[0] is None else given[0], balanced[1] if given[1] is None else given[1]


def _mismatched(
    context: Context, items: Sequence[JudgedAnswer], tests: Sequence[JudgedAnswer]
) -> tuple[list[JudgedAnswer], list[JudgedAnswer]]:
    """Every prompt with the answer to another one: among those trained on, and of those for the held-out prompts."""
    others = derangement([item.tokens.prompt_id for item in items], context.seed)
    completions = [items[other].tokens.completions[0] for other in others]
    made, cut = with_mismatched(items, completions, context.recipe.data.max_tokens)
    # No held-out prompt is trained on, so any answer of the training part belongs to another prompt.
    borrowed: list[TokenCompletion] = [completions[i % len(completions)] for i in range(len(tests))]
    made_tests, cut_tests = with_mismatched(tests, borrowed, context.recipe.data.max_tokens)
    if cut + cut_tests:
        context.say(f"{cut + cut_tests} answers are cut to `data.max_tokens` behind another prompt (reference point)")
    return made, made_tests


# --- the account -----------------------------------------------------------------------------------------------------


def _summary(
    section: KTOConfig,
    items: Sequence[JudgedAnswer],
    steps: int,
    tests: Sequence[JudgedAnswer],
    objective: JudgedObjective,
    logprobs: PolicyLogprobs,
) -> dict[str, Any]:
    counts = _counts(items)
    account = [
        f"The policy learned from {counts[0]:,} desirable and {counts[1]:,} undesirable answers in {steps:,} optimiser "
        f"steps, with the model it started from as reference (loss: {section.loss})."
    ]
    if not tests:
        warning = "Nothing was held out, so it is not known what this policy learned: set `data.holdout`."
        return {"headline": [], "account": account, "warnings": [warning]}
    after = logprobs([item.tokens for item in tests])
    right = objective.correct(tests, after, objective.held_out(tests, logprobs))
    accuracy = win_rate(right, [item.tokens.prompt_id for item in tests])
    commoner = max(_counts(tests)) / len(tests)
    account.append(
        f"Of {len(tests):,} held-out answers its implicit reward puts {accuracy.value:.1%} on the right side (95% "
        f"interval {accuracy.low:.1%} to {accuracy.high:.1%}; always saying the commoner mark: {commoner:.1%}). "
        "Whether it also writes better answers, `accord evaluate` measures."
    )
    rows = [headline("eval/accuracy", accuracy)]
    warnings = []
    if accuracy.low <= commoner:
        warnings.append("This policy tells good from bad answers no better than always saying the commoner mark would.")
    for desirable, name in ((True, "desirable"), (False, "undesirable")):
        inside = [i for i, item in enumerate(tests) if item.desirable == desirable]
        if not inside:
            continue
        change = LikelihoodChange.of(
            name,
            [float(after[i]) - tests[i].ref_logprob for i in inside],
            [tests[i].tokens.prompt_id for i in inside],
            sum(sum(tests[i].tokens.completions[0].mask) for i in inside),
        )
        rows.append(change.row())
        account.append(change.account())
        if desirable and change.fell_far:
            warnings.append(change.warning("raise `kto.desirable_weight` or `kto.beta`, or lower `kto.learning_rate`"))
    return {"headline": rows, "account": account, "warnings": warnings}
