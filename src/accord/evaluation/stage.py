"""The evaluation stage: which models, which prompts, which judges, and the table at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from accord.config import EvaluateConfig, run_identity
from accord.errors import ConfigError
from accord.evaluation.compare import (
    Answers,
    BestOf,
    Comparison,
    Contestant,
    answers_of,
    compare,
    describe,
    kl_to,
    reference_perplexity,
)
from accord.evaluation.references import HUMAN, human_answers, overlap_account
from accord.measures.overlap import ROUGE_METRICS
from accord.measures.selection import best_of_n_kl_bound
from accord.measures.statistics import cluster_interval
from accord.methods.catalogue import BEST_OF_N, POLICY_STAGES
from accord.methods.context import (
    Context,
    LoadedPolicy,
    base_folder,
    headline,
    run_stage,
    stage_model,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import Part, split_holdout
from accord.methods.judges import Judges, function_scorer, judges_of, model_scorer
from accord.methods.named import check_compared, check_evaluated
from accord.methods.plan import with_references
from accord.methods.roles import starting_model
from accord.models.ilql import ShapedPolicy, has_heads, load_heads
from accord.models.load import load_reward_model
from accord.records import Group, Interval, TokenGroup
from accord.rewards.scorers import Scorer
from accord.rollout.sampling import Sampling
from accord.training.progress import StageProgress
from accord.training.runfolder import RunFolder

__all__ = ["run_evaluate"]

SIDE_BY_SIDE = 12


def run_evaluate(context: Context) -> dict[str, Any]:
    """Evaluate (or find finished) the models of this run; returns the summary."""
    section = context.recipe.evaluate
    assert section is not None
    models = _models(context, section)
    pairs = _pairs(section, tuple(models))
    best_of_n = context.recipe.bestofn if BEST_OF_N in models else None
    chooser = None if best_of_n is None else judges_of(context, BEST_OF_N, best_of_n)
    gold = function_scorer(context, "evaluate.gold_function", section.gold_function)
    reward_folder = section.reward_model or stage_model(context, "reward")
    if gold is None and reward_folder is None:
        raise ConfigError(
            "evaluation needs a judge: a `reward` stage in this recipe, `evaluate.reward_model` (a folder) or "
            "`evaluate.gold_function` (module:function)"
        )
    part = context.corpus.evaluation_prompts()
    groups = part.groups if part else split_holdout(context.corpus.all_prompts().groups, context.recipe.data.holdout)[1]
    part = part or context.corpus.all_prompts()
    if section.against_references:
        answered = with_references(groups)
        if len(answered) < len(groups):
            context.say(f"{len(groups) - len(answered)} of {len(groups)} prompts have no reference answer: left out")
        groups = answered
    if len(groups) < 2:
        raise ConfigError(
            f"{len(groups)} held-out prompts are too few to evaluate on: raise `data.holdout`, or set `data.evaluation`"
        )

    def body(run: RunFolder) -> dict[str, Any]:
        judges: dict[str, Scorer] = {}
        if gold is not None:
            judges["gold"] = gold
        if reward_folder is not None:
            model, tokenizer = load_reward_model(reward_folder, device=context.device)
            judges["reward model"] = model_scorer(context, model, tokenizer, section.micro_batch_tokens, reward_folder)
        contestants = {
            name: _contestant(context, name, folder, chooser if name == BEST_OF_N else None, run.path)
            for name, folder in models.items()
        }
        return _evaluate(context, section, run, list(groups)[: section.prompts], contestants, pairs, judges)

    sources = part.sources | context.corpus.sft.sources | context.corpus.preferences.sources
    if gold is not None:
        sources |= {"gold function": gold.fingerprint}
    for name, folder in (models | ({"reward model": reward_folder} if reward_folder else {})).items():
        sources[f"weights of {name}"] = "".join(weights_hash(folder).values())
    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"evaluate": section.model_dump(mode="json"), "data": data}
    if chooser is not None and best_of_n is not None:
        sources |= {f"{what} of {BEST_OF_N}": content for what, content in chooser.sources.items()}
        settings[BEST_OF_N] = run_identity(best_of_n)
    return run_stage(context, "evaluate", settings=settings, sources=sources, body=body)


def _models(context: Context, section: EvaluateConfig) -> dict[str, Path | str]:
    """Name -> folder of every model to evaluate, in order."""
    if not section.models:
        found: dict[str, Path | str | None] = {"base": base_folder(context)}
        found |= {stage: stage_model(context, stage) for stage in POLICY_STAGES}
        if context.recipe.bestofn is not None:
            found[BEST_OF_N] = starting_model(context, context.recipe.bestofn.init)
        return {name: folder for name, folder in found.items() if folder is not None}
    check_evaluated(context.recipe, section)
    models: dict[str, Path | str] = {}
    for name in section.models:
        if name == "base":
            models[name] = base_folder(context)
        elif name == BEST_OF_N and context.recipe.bestofn is not None:
            models[name] = starting_model(context, context.recipe.bestofn.init)
        elif name in POLICY_STAGES:
            folder = stage_model(context, name)
            if folder is None:
                raise ConfigError(f"`evaluate.models` names {name!r}, which is no stage of this recipe")
            models[name] = folder
        else:
            models[name] = name
    return models


def _pairs(section: EvaluateConfig, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    check_compared(section, names)
    if len(names) < 2 and not section.against_references:
        raise ConfigError(f"there is only one model to evaluate ({', '.join(names)}): a comparison needs two")
    if section.against is not None:
        return tuple((name, section.against) for name in names if name != section.against)
    return tuple((names[i], names[i - 1]) for i in range(1, len(names)))


def _contestant(
    context: Context, name: str, folder: Path | str, chooser: Judges | None, stage_folder: Path
) -> Contestant:
    """A model that has Q heads answers as they shape it; one with a chooser, with the best of several answers."""
    policy = LoadedPolicy.of(context, folder)
    model = ShapedPolicy(*load_heads(policy.model, folder)) if has_heads(folder) else policy.model
    section = context.recipe.bestofn
    if chooser is None or section is None:
        return Contestant(name, model, policy.template)
    scorer, _ = chooser.scorer(context, section.micro_batch_tokens, policy, stage_folder)
    best_of = BestOf(scorer, section)
    return Contestant(name, model, policy.template, best_of)


def _evaluate(
    context: Context,
    section: EvaluateConfig,
    run: RunFolder,
    groups: list[Group],
    contestants: dict[str, Contestant],
    pairs: tuple[tuple[str, str], ...],
    judges: dict[str, Scorer],
) -> dict[str, Any]:
    prompts = _common_prompts(context, section, groups, contestants)
    answers: dict[str, Answers] = {}
    with StageProgress(context.console, "evaluate", len(contestants)) as progress:
        for name, contestant in contestants.items():
            sampling = Sampling(
                section.max_new_tokens,
                section.temperature,
                section.top_k,
                section.top_p,
                stop_ids=contestant.template.stop_ids,
            )
            answers[name] = answers_of(contestant, prompts[name], sampling, judges, ("evaluate", context.seed))
            progress.advance(name)
    asked = [group for group, _ in next(iter(prompts.values()))]
    references = [group.reference for group in asked]
    facts = {name: describe(answer, references) for name, answer in answers.items()}
    _add_distances(section, contestants, answers, pairs, facts)
    _add_perplexity(context, section, contestants, groups, facts)
    overlaps = overlap_account(answers, references, pairs)
    if section.against_references:
        pairs += tuple((name, HUMAN) for name in answers)
        answers[HUMAN], facts[HUMAN] = human_answers(asked, judges)
    run.truncate_after(0)
    run.append_samples(1, (row for answer in answers.values() for row in _rows(answer)))
    comparisons = [
        compare(answers[name], answers[base], judge, section.tie_margin) for name, base in pairs for judge in judges
    ]
    _print(context, comparisons, answers, facts, judges)
    summary = _summary(comparisons, answers, facts, judges, len(asked))
    return summary | {"account": summary["account"] + overlaps}


def _common_prompts(
    context: Context, section: EvaluateConfig, groups: list[Group], contestants: dict[str, Contestant]
) -> dict[str, list[tuple[Group, TokenGroup]]]:
    """The prompts every contestant can be asked, as each one's tokens: a prompt too long for one is asked of none."""
    room = context.recipe.data.max_tokens - section.max_new_tokens
    limit = min(room, context.recipe.data.max_prompt_tokens or room)
    tokens = {
        name: tokenised(context, groups, c.template, "evaluation prompts", max_tokens=room, max_prompt_tokens=limit)
        for name, c in contestants.items()
    }
    common = set.intersection(*({group.prompt_id for group, _ in rows} for rows in tokens.values()))
    return {name: [row for row in rows if row[0].prompt_id in common] for name, rows in tokens.items()}


def _add_distances(
    section: EvaluateConfig,
    contestants: dict[str, Contestant],
    answers: dict[str, Answers],
    pairs: tuple[tuple[str, str], ...],
    facts: dict[str, dict[str, Interval | float]],
) -> None:
    """KL of each model to the reference, where both write the same vocabulary. Greedy answers have no k1 estimate.

    Best-of-n has no log-probabilities: it has a bound, to the policy it samples from, and as a reference that policy
    stands for it.
    """
    for name, contestant in contestants.items():
        if contestant.best_of is not None:
            facts[name]["eval/kl_bound_nats"] = best_of_n_kl_bound(contestant.best_of.section.n)
    if section.temperature == 0:
        return
    for name, base in pairs:
        reference = contestants[section.reference or base]
        model = contestants[name]
        same = model.best_of is not None or reference.name == name
        if not same and reference.template.tokenizer.get_vocab() == model.template.tokenizer.get_vocab():
            facts[name]["eval/kl_per_sequence_nats"] = kl_to(
                reference, model, answers[name], temperature=section.temperature, budget=section.micro_batch_tokens
            )


def _add_perplexity(
    context: Context,
    section: EvaluateConfig,
    contestants: dict[str, Contestant],
    groups: Sequence[Group],
    facts: dict[str, dict[str, Interval | float]],
) -> None:
    """Perplexity of each model on held-out demonstrations, or on the prompts' reference answers."""
    corpus = context.corpus
    source = corpus.demonstrations() if corpus.sft.groups or corpus.preferences.groups else Part()
    held_out = split_holdout(source.groups, context.recipe.data.holdout)[1]
    texts = [g for g in held_out if g.kind == "sft"][: section.prompts]
    if not texts:
        return
    for name, contestant in contestants.items():
        if contestant.best_of is not None:
            continue  # the perplexity would be its policy's
        tokens = [t for _, t in tokenised(context, texts, contestant.template, "held-out texts")]
        nll, count = reference_perplexity(contestant, tokens, section.micro_batch_tokens)
        facts[name]["eval/perplexity"] = math.exp(min(700.0, nll / max(1.0, count)))


def _print(
    context: Context,
    comparisons: list[Comparison],
    answers: dict[str, Answers],
    facts: dict[str, dict[str, Interval | float]],
    judges: dict[str, Scorer],
) -> None:
    table = Table("comparison", "judge", "win rate, 95% interval", "wins", "ties", "score difference", "p", "prompts")
    for c in comparisons:
        w, d = c.win_rate, c.difference
        table.add_row(
            f"{c.name} over {c.base}", c.judge, f"{w.value:.1%}  [{w.low:.1%}, {w.high:.1%}]", f"{c.wins:.1%}",
            f"{c.ties:.1%}", f"{d.value:+.3f}  [{d.low:+.3f}, {d.high:+.3f}]", f"{c.p_value:.2g}", str(w.n),
        )  # fmt: skip
    context.console.print(table)
    overlap = (
        {"eval/rouge_1": "ROUGE-1", "eval/rouge_l": "ROUGE-L"}
        if any(set(ROUGE_METRICS) & set(f) for f in facts.values())
        else {}
    )
    table = Table(
        "model", *(f"mean {judge}" for judge in judges), "KL (k1) to its base", "tokens", "finished", *overlap.values()
    )
    for name, answer in answers.items():
        table.add_row(
            name,
            *(f"{sum(answer.scores[j]) / len(answer.scores[j]):+.3f}" for j in judges),
            _distance(facts[name]),
            *(
                _value(facts[name].get(key))
                for key in ("eval/completion_tokens/mean", "eval/finished_fraction", *overlap)
            ),
        )
    context.console.print(table)


def _distance(facts: dict[str, Interval | float]) -> str:
    if "eval/kl_bound_nats" in facts:
        return f"at most {_value(facts['eval/kl_bound_nats'])}, to its own policy"
    kl = facts.get("eval/kl_per_sequence_nats")
    return f"{kl.value:.2f}" if isinstance(kl, Interval) else ""


def _value(fact: Interval | float | None) -> str:
    if fact is None:
        return ""
    return f"{fact.value if isinstance(fact, Interval) else fact:.3g}"


def _summary(
    comparisons: list[Comparison],
    answers: dict[str, Answers],
    facts: dict[str, dict[str, Interval | float]],
    judges: dict[str, Scorer],
    count: int,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, answer in answers.items():
        prompts = [r.prompt_id for r in answer.requests]
        for judge in judges:
            metric = "eval/gold_utility/mean" if judge == "gold" else "eval/score/mean"
            rows.append(headline(metric, cluster_interval(answer.scores[judge], prompts)) | {"model": name})
        rows += [headline(metric, value) | {"model": name} for metric, value in facts[name].items()]
    main = next(iter(judges))
    account = []
    for c in (c for c in comparisons if c.judge == main):
        verdict = (
            "better" if c.win_rate.low > 0.5 else "worse" if c.win_rate.high < 0.5 else "not distinguishably different"
        )
        account.append(
            f"Judged by {_judge_name(c.judge)} on {count} held-out prompts, {c.name} is {verdict} than {c.base}: it "
            f"wins "
            f"{c.wins:.1%}, ties {c.ties:.1%}; win rate {c.win_rate.value:.1%} (95% interval {c.win_rate.low:.1%} to "
            f"{c.win_rate.high:.1%}, clustered by prompt)."
        )
    warnings = []
    if "gold" not in judges:
        warnings.append(
            "The judge is a reward model. If a model was trained against it, or chooses its answers by it, its win "
            "rate shows what was optimised, not that people would agree: have people, or a model trained on other "
            "comparisons, judge as well."
        )
    return {
        "headline": rows,
        "account": account,
        "warnings": warnings,
        "comparisons": [
            {
                "name": f"{c.name} over {c.base}",
                "judge": c.judge,
                **c.win_rate.as_dict(),
                "wins": c.wins,
                "ties": c.ties,
                "difference": c.difference.as_dict(),
                "p_value": c.p_value,
            }
            for c in comparisons
        ],
        "side_by_side": [_exchange(list(answers.values()), i) for i in range(min(count, SIDE_BY_SIDE))],
    }


def _rows(answers: Answers) -> list[dict[str, Any]]:
    """Every answer with what every judge said of it, for samples.jsonl: the evaluation can be checked from them."""
    return [
        {
            "model": answers.name,
            "prompt": "\n".join(m.content for m in request.prompt),
            "prompt_id": request.prompt_id,
            "completion": request.completion,
            "finished": request.finished,
            "score": answers.scores["reward model"][index] if "reward model" in answers.scores else None,
            **({"gold": answers.scores["gold"][index]} if "gold" in answers.scores else {}),
        }
        for index, request in enumerate(answers.requests)
    ]


def _exchange(answers: list[Answers], index: int) -> dict[str, Any]:
    """One prompt with what every model answered and what every judge said of it."""
    row: dict[str, Any] = {
        "prompt": "\n".join(m.content for m in answers[0].requests[index].prompt),
        "answers": {a.name: a.requests[index].completion for a in answers},
    }
    for key, judge in (("scores", "reward model"), ("gold", "gold")):
        if judge in answers[0].scores:
            row[key] = {a.name: a.scores[judge][index] for a in answers}
    return row


def _judge_name(judge: str) -> str:
    return "the true utility" if judge == "gold" else f"the {judge}"
