"""The whole loop on an embedded tiny model: demonstrations, SFT, annotators, reward model, PPO, evidence.

The people are simulated, so what they truly value is known and can be measured; no stage trains on it. Everything else
is what a real project runs, with the same stages and the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from accord.config import Recipe, recipe_from
from accord.config.load import merged, overrides_tree
from accord.data.convert import writing
from accord.data.read import read_groups
from accord.methods.context import Context, LoadedPolicy, headline, run_stage, stage_model, weights_hash
from accord.methods.corpus import Corpus, Part
from accord.pipeline import STAGES, write_overview
from accord.records import Group
from accord.rewards.scorers import RewardFunction
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.tasks.assistant import (
    TIE_MARGIN,
    Comparison,
    agreement,
    annotate,
    comparisons_to_groups,
    demonstrations,
    prompts,
    utility,
)
from accord.training.runfolder import RunFolder

__all__ = [
    "NUM_COMPARED",
    "SETTINGS",
    "gold_utility",
    "run_annotators",
    "run_quickstart",
    "task_corpus",
    "with_comparisons",
]

NUM_DEMONSTRATIONS, NUM_COMPARED, NUM_PROMPTS, NUM_HELD_OUT = 5000, 4000, 4000, 500
MAX_NEW_TOKENS = 48

SETTINGS: dict[str, Any] = {
    "name": "quickstart",
    # A second thread makes an idle machine 1.5 times as fast and a busy one 1.8 times slower: two wait for each other.
    "threads": 1,
    "model": {"path": "quickstart"},
    "data": {"holdout": 0.05, "max_tokens": 128},
    "sft": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-3, "eval_every": 25, "checkpoint_every": 25},
    "reward": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-3, "eval_every": 25, "checkpoint_every": 25},
    "ppo": {
        "episodes": 4096,
        "prompts_per_step": 64,
        "samples_per_prompt": 2,
        "max_new_tokens": MAX_NEW_TOKENS,
        "learning_rate": 2e-4,
        "kl_coef": 0.1,
        "update_epochs": 2,
        "minibatches": 2,
        "missing_eos_penalty": 1.0,
        "checkpoint_every": 5,
    },
    "evaluate": {"prompts": NUM_HELD_OUT, "max_new_tokens": MAX_NEW_TOKENS, "tie_margin": TIE_MARGIN},
}


def gold_utility(prompt: str, completion: str, finished: bool) -> float:
    """What the simulated annotators truly value; see `accord.tasks.assistant`."""
    return utility(prompt, completion, finished=finished).total


def run_quickstart(
    out: Path,
    *,
    seed: int,
    console: Console,
    overrides: Sequence[str] = (),
    reward_function: RewardFunction | None = None,
) -> dict[str, Any]:
    """Run (or continue, or find finished) all stages in `out`; returns the content of `out/summary.json`.

    `reward_function` replaces the reward model in PPO: with one that tells nothing, PPO must not win.
    """
    recipe = _recipe(out, seed, overrides, reward_function)
    functions: dict[str, RewardFunction] = {"ppo.gold_function": gold_utility, "evaluate.gold_function": gold_utility}
    if reward_function is not None:
        functions["ppo.reward_function"] = reward_function
    context = Context(recipe, task_corpus(seed), console, functions)
    _say_what_happens(console, out)
    STAGES["sft"](context)
    if recipe.reward is not None:
        run_annotators(context)
        context = with_comparisons(context)
        STAGES["reward"](context)
    STAGES["ppo"](context)
    evaluation = STAGES["evaluate"](context)
    win_rates = {
        row["name"].replace(" ", "_"): {key: row[key] for key in ("value", "low", "high", "n")}
        for row in evaluation["comparisons"]
        if row["judge"] == "gold"
    }
    write_overview(context, {"win_rates": win_rates, "seed": seed})
    return _closing(context, win_rates)


def task_corpus(seed: int) -> Corpus:
    """What the task gives before anybody has compared anything: demonstrations, prompts, prompts held out."""
    return Corpus(
        sft=Part.of(demonstrations(NUM_DEMONSTRATIONS, seed), "demonstrations"),
        prompts=Part.of([p.group for p in prompts(NUM_PROMPTS, seed + 1, "train")], "prompts"),
        evaluation=Part.of([p.group for p in prompts(NUM_HELD_OUT, seed, "heldout")], "held-out prompts"),
    )


def with_comparisons(context: Context) -> Context:
    """The context with the comparisons that its annotators wrote."""
    comparisons = read_groups(context.root / "annotate" / "comparisons.jsonl")
    part = Part(comparisons.groups, {"comparisons": comparisons.fingerprint})
    return replace(context, corpus=replace(context.corpus, preferences=part))


def _recipe(out: Path, seed: int, overrides: Sequence[str], reward_function: RewardFunction | None) -> Recipe:
    tree = merged(SETTINGS, overrides_tree(overrides))
    if reward_function is not None:
        tree = merged(tree, {"ppo": {"value_init": "policy"}})
        del tree["reward"]
    return recipe_from({**tree, "seed": seed, "out": str(out)}, source="quickstart")


def _say_what_happens(console: Console, out: Path) -> None:
    console.print(
        f"[bold]Accord quickstart[/] in {out}\n"
        "A tiny language model (under a million parameters) becomes an assistant.\n"
        "People are simulated: they write demonstrations, compare answers, and disagree\n"
        "now and then. What they truly value is hidden from training and only measured\n"
        "with. Stop it whenever you like; the same command continues where it was.",
        highlight=False,
    )


def run_annotators(context: Context, compared: int = NUM_COMPARED) -> dict[str, Any]:
    """Two answers of the SFT model to each of `compared` prompts, compared by the simulated annotators: the reward
    model's data."""
    folder = stage_model(context, "sft")
    assert folder is not None

    def body(run: RunFolder) -> dict[str, Any]:
        policy = LoadedPolicy.of(context, folder)
        asked = prompts(compared, context.seed + 2, "train")
        sampling = Sampling(MAX_NEW_TOKENS, stop_ids=policy.template.stop_ids)
        wanted = [PromptTokens(policy.template.prompt_ids(p.group.prompt), p.group.prompt_id) for p in asked]
        sampled = NativeSampler(policy.model, pad_id=policy.pad_id).generate(
            wanted, 2, sampling, ("annotate", context.seed)
        )
        comparisons = [
            annotate(
                p.text,
                policy.template.decode(a.ids),
                policy.template.decode(b.ids),
                pair_key=f"{context.seed}:{p.group.prompt_id}",
                finished=(a.finish_reason == "stop", b.finish_reason == "stop"),
            )
            for p, (a, b) in zip(asked, sampled, strict=True)
        ]
        groups = comparisons_to_groups(comparisons)
        _write(run.path / "comparisons.jsonl", groups)
        return _annotation_summary(comparisons, groups)

    return run_stage(context, "annotate", settings={"num_prompts": compared}, sources=weights_hash(folder), body=body)


def _write(path: Path, groups: Sequence[Group]) -> None:
    with writing(path) as write:
        for group in groups:
            write(group)


def _annotation_summary(comparisons: Sequence[Comparison], groups: Sequence[Group]) -> dict[str, Any]:
    facts = agreement(comparisons)
    equal = sum(c.answers[0] == c.answers[1] for c in comparisons)
    empty = len(comparisons) - len(groups) - equal
    account = (
        f"Simulated annotators compared {len(comparisons):,} pairs of answers, three votes a pair. Two of them agree "
        f"on "
        f"{facts.annotators:.1%} of the pairs; one vote picks the truly better answer {facts.accuracy:.1%} of the "
        f"time, "
        f"the majority {facts.majority:.1%}. {equal:,} pairs were two equal answers and are left out"
        + (f", and {empty:,} with an empty answer." if empty else ".")
    )
    return {
        "headline": [
            headline("two annotators agree", facts.annotators, unit="fraction"),
            headline(
                "majority is right", facts.majority, unit="fraction", meaning="Measured on the hidden true utility."
            ),
        ],
        "account": [account],
    }


def _closing(context: Context, win_rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:

    table = Table("measured by the true utility, hidden from training", "win rate", "95% interval", "held-out prompts")
    for name, row in win_rates.items():
        table.add_row(
            name.replace("_", " "), f"{row['value']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}", str(row["n"])
        )
    context.console.print(table)
    summary = json.loads((context.root / "summary.json").read_bytes())
    context.console.print(f"{summary['seconds']:.0f} seconds in all", highlight=False)
    return summary
