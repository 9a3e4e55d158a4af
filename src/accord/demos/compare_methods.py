"""Which method should I choose? All of them on the quickstart's task, from the same model and the same preferences.

Every method starts from one SFT model and learns from the same comparisons, directly (DPO, ORPO, KTO) or through the
reward model trained on them (PPO, best-of-n). Each is trained in a process of its own, so that its peak memory is its
own, and all answer the same held-out prompts, judged by the true utility that no stage trains on.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from accord.config import Recipe, recipe_from
from accord.config.load import merged, overrides_tree
from accord.demos.quickstart import MAX_NEW_TOKENS, NUM_COMPARED, run_annotators, task_corpus, with_comparisons
from accord.demos.quickstart import SETTINGS as QUICKSTART
from accord.errors import AccordError, ConfigError
from accord.methods.context import Context
from accord.methods.corpus import Part
from accord.pipeline import STAGES, write_overview
from accord.training.runfolder import read_summary

__all__ = ["METHODS", "SETTINGS", "run_comparison"]

METHODS = ("dpo", "orpo", "kto", "ppo", "bestofn")
GOLD = "accord.demos.quickstart:gold_utility"
# What a method needs besides SFT and the comparisons.
NEEDS_REWARD_MODEL = ("ppo", "bestofn")

_PAIRS: dict[str, Any] = {"epochs": 2, "batch_size": 64, "eval_every": 25, "checkpoint_every": 25}
SETTINGS: dict[str, Any] = merged(
    QUICKSTART,
    {
        "name": "compare-methods",
        "dpo": {**_PAIRS, "learning_rate": 2e-4, "beta": 0.1},
        "orpo": {**_PAIRS, "learning_rate": 1e-3, "odds_ratio_coef": 0.5},
        "kto": {**_PAIRS, "learning_rate": 1e-4, "beta": 0.1},
        "ppo": {"gold_function": GOLD},
        "bestofn": {"n": 8, "prompts": 500, "max_new_tokens": MAX_NEW_TOKENS, "gold_function": GOLD},
        "evaluate": {"against": "sft", "gold_function": GOLD},
    },
)


def run_comparison(
    out: Path,
    *,
    seed: int,
    console: Console,
    methods: Sequence[str] = METHODS,
    compared: int = NUM_COMPARED,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train (or continue, or find finished) all `methods` in `out` on the comparisons of answers to `compared` prompts;
    returns the content of `out/summary.json`.

    Raises: ConfigError for a method that is not among METHODS; whatever a stage raises.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        wrong = f"{', '.join(map(repr, unknown))} cannot be compared; " if unknown else ""
        raise ConfigError(f"--methods: {wrong}expected some of {', '.join(METHODS)} (all are compared with sft)")
    recipe = _recipe(out, seed, methods, overrides)
    reward = ("reward",) if set(methods) & set(NEEDS_REWARD_MODEL) else ()
    console.print(
        f"[bold]Accord compare-methods[/] in {out}\n"
        f"{', '.join(methods)}: from one SFT model and the same comparisons, each in a process of its own.\n"
        "Stop it whenever you like; the same command continues where it was.",
        highlight=False,
    )
    for stage in ("sft", "annotate", *reward, *methods):
        _in_own_process(recipe, stage, compared)
    context = _context(recipe, console)
    evaluation = STAGES["evaluate"](context)
    rows = _rows(context.root, methods, evaluation)
    write_overview(context, {"account": _account(rows), "methods": rows, "curves": [_figure(rows)], "seed": seed})
    console.print(_table(rows))
    return json.loads((context.root / "summary.json").read_bytes())


def _recipe(out: Path, seed: int, methods: Sequence[str], overrides: Sequence[str]) -> Recipe:
    tree = merged(SETTINGS, overrides_tree(overrides))
    for method in METHODS:
        if method not in methods:
            tree.pop(method)
    if not set(methods) & set(NEEDS_REWARD_MODEL):
        tree.pop("reward")
    tree["evaluate"] = {"models": ["base", "sft", *methods], **tree["evaluate"]}
    return recipe_from({**tree, "seed": seed, "out": str(out)}, source="compare-methods")


def _context(recipe: Recipe, console: Console) -> Context:
    context = Context(recipe, task_corpus(recipe.seed), console)
    return with_comparisons(context) if (context.root / "annotate" / "summary.json").exists() else context


def _with_majorities(context: Context) -> Context:
    """The context whose comparisons say what most annotators said: ORPO has no place for how many it were."""
    part = context.corpus.preferences
    note = "the majority of each comparison's annotators is taken as certain"
    certain = Part(tuple(replace(group, soft_label=None) for group in part.groups), part.sources, (note,))
    return replace(context, corpus=replace(context.corpus, preferences=certain))


def _in_own_process(recipe: Recipe, stage: str, compared: int) -> None:
    """Run one stage in a fresh process, whose peak memory is then the stage's own; raises what it raised."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    # A daemon gets SIGTERM when this process ends, and then saves as it would have alone.
    process = spawn.Process(
        target=_run_one, args=(recipe.model_dump(mode="json"), stage, compared, sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        error = None
    process.join()
    if isinstance(error, AccordError):
        raise error
    if process.exitcode != 0:
        sys.exit(process.exitcode if process.exitcode is not None and process.exitcode > 0 else 1)


def _run_one(tree: dict[str, Any], stage: str, compared: int, sender: Any) -> None:
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()
    context = _context(recipe_from(tree, source="compare-methods"), Console())
    if stage == "orpo":
        context = _with_majorities(context)
    try:
        run_annotators(context, compared) if stage == "annotate" else STAGES[stage](context)
    except AccordError as error:
        sender.send(error)


def _rows(root: Path, methods: Sequence[str], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record a model: gold win rate over SFT, mean gold utility, KL, training time and peak memory."""
    wins = {row["name"].partition(" over ")[0]: row for row in evaluation["comparisons"] if row["judge"] == "gold"}
    facts: dict[str, dict[str, Any]] = {}
    for row in evaluation["headline"]:
        facts.setdefault(row.get("model", ""), {})[row["name"]] = row
    rows = []
    for method in ("sft", *methods):
        stages = [method] if method not in NEEDS_REWARD_MODEL else ["reward", method]
        costs = [summary for stage in stages if (summary := read_summary(root / stage)) is not None]
        win = wins.get(method)
        own = facts[method]
        rows.append(
            {
                "method": method,
                "win_rate": {key: win[key] for key in ("value", "low", "high", "n")} if win else None,
                "gold": _numbers(own["eval/gold_utility/mean"]),
                "kl": _numbers(own["eval/kl_per_sequence_nats"]) if "eval/kl_per_sequence_nats" in own else None,
                "kl_bound": own["eval/kl_bound_nats"]["value"] if "eval/kl_bound_nats" in own else None,
                "seconds": sum(cost["seconds"] for cost in costs),
                "peak_memory_mb": max(cost["peak_memory_mb"] for cost in costs),
            }
        )
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("value", "low", "high", "n") if key in row}


def _account(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table in words, the best first: what the report begins with."""
    compared = [(row["win_rate"], row) for row in rows if row["win_rate"]]
    return [
        f"{row['method']} wins {win['value']:.1%} against sft (95% interval {win['low']:.1%} to {win['high']:.1%}, "
        f"judged by the true utility), at a distance of {_distance(row)} nats; {row['seconds']:.0f} seconds, "
        f"{row['peak_memory_mb']:,.0f} MB."
        for win, row in sorted(compared, key=lambda pair: -pair[0]["value"])
    ]


def _distance(row: Mapping[str, Any]) -> str:
    if row["kl"]:
        return f"{row['kl']['value']:.2f}"
    return f"at most {row['kl_bound']:.2f}" if row["kl_bound"] is not None else "-"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("method", "gold win rate over SFT, 95%", "gold utility", "KL, nats", "seconds", "peak MB")
    for row in rows:
        win = row["win_rate"]
        table.add_row(
            row["method"],
            f"{win['value']:.1%}  [{win['low']:.1%}, {win['high']:.1%}]" if win else "-",
            f"{row['gold']['value']:+.3f}  [{row['gold']['low']:+.3f}, {row['gold']['high']:+.3f}]",
            _distance(row),
            f"{row['seconds']:.0f}",
            f"{row['peak_memory_mb']:.0f}",
        )
    table.caption = "seconds and memory of ppo and bestofn include the reward model's training"
    return table


def _figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gold utility against the square root of KL: what each method made of the distance it went."""
    points = [(row, row["kl"]["value"] if row["kl"] else row["kl_bound"] or 0.0) for row in rows]
    return {
        "title": "What each method made of its distance",
        "x_label": "\u221aKL to the SFT model (\u221anats per answer)",
        "y_label": "gold utility",
        "note": "Each point is a method; bars are 95% intervals over held-out prompts. Higher is better; further right "
        "is further from the model it started from. For best-of-n the KL is an upper bound.",
        "series": [
            {
                "label": "methods",
                "x": [math.sqrt(max(0.0, kl)) for _, kl in points],
                "y": [row["gold"]["value"] for row, _ in points],
                "low": [row["gold"]["low"] for row, _ in points],
                "high": [row["gold"]["high"] for row, _ in points],
                "labels": [row["method"] for row, _ in points],
                "draw": "labelled",
            }
        ],
    }
