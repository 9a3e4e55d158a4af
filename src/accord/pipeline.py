"""A recipe from start to end: which stages, in which order, and what is left in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from accord.atomic import write_json
from accord.config import Recipe
from accord.evaluation.stage import run_evaluate
from accord.methods import catalogue
from accord.methods.bestofn import run_bestofn
from accord.methods.context import Context
from accord.methods.corpus import Corpus
from accord.methods.ilql_stage import run_ilql
from accord.methods.kto_stage import run_kto
from accord.methods.named import check_names
from accord.methods.online_stage import LEARNERS, run_online
from accord.methods.ppo_stage import run_ppo
from accord.methods.preference_stage import run_dpo, run_orpo
from accord.methods.reward_stage import run_reward
from accord.methods.rft_stage import run_rft
from accord.methods.sft import run_sft
from accord.report.overview import overview_report
from accord.rewards.scorers import RewardFunction
from accord.training.allocator import allocator_note
from accord.training.runfolder import read_summary

__all__ = ["STAGES", "run_stages", "write_overview"]

STAGES: Mapping[str, Callable[[Context], dict[str, Any]]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "orpo": run_orpo,
    "kto": run_kto,
    "ilql": run_ilql,
    "ppo": run_ppo,
    **{stage: partial(run_online, stage=stage) for stage in LEARNERS},
    "rft": run_rft,
    "bestofn": run_bestofn,
    "evaluate": run_evaluate,
}

# The order in which stages appear in the overview; `annotate` is the quickstart's simulated people.
SHOWN = ("base", "sft", "annotate", *(stage for stage in catalogue.STAGES if stage != "sft"))


def run_stages(
    recipe: Recipe,
    corpus: Corpus,
    stages: Sequence[str],
    console: Console,
    functions: Mapping[str, RewardFunction] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run `stages` in order; finished ones are not repeated. Returns stage -> summary and writes the overview."""
    context = Context(recipe, corpus, console, functions or {})
    check_names(recipe, list(stages), context.functions)
    context.say(_machine(context))
    if recipe.model.precision != "float32" and context.device.type == "cpu":
        context.say(
            f"`model.precision` = {recipe.model.precision} on a CPU is for trying it out: float32 is faster there"
        )
    if recipe.model.offload and context.offload is None:
        context.say("`model.offload` has nothing to do: there is no GPU, and all models are on the CPU")
    summaries = {stage: STAGES[stage](context) for stage in stages}
    write_overview(context)
    return summaries


def _machine(context: Context) -> str:
    """What the stages run on, and how."""
    device, threads = context.device, context.recipe.threads or torch.get_num_threads()
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    model = context.recipe.model
    attention = "" if model.attention == "auto" else f"attention by {model.attention}, "
    return f"device: {name}, {threads} CPU threads, {model.precision}, {attention}{allocator_note()}"


def write_overview(context: Context, more: Mapping[str, Any] | None = None) -> None:
    """The root's summary.json and report.html over all finished stages there."""
    found = {stage: read_summary(context.root / stage) for stage in SHOWN}
    summaries = {stage: summary for stage, summary in found.items() if summary is not None}
    done = list(summaries)
    evaluation = summaries.get("evaluate", {})
    summary = {
        "name": context.recipe.name,
        "seconds": sum(s["seconds"] for s in summaries.values()),
        "stages": done,
        "account": [text for stage in done for text in _account(summaries[stage])],
        "comparisons": evaluation.get("comparisons", []),
        "side_by_side": evaluation.get("side_by_side", []),
        **(more or {}),
    }
    write_json(context.root / "summary.json", summary)
    page = overview_report(context.root, done)
    context.console.print(f"\nreport: {page}", highlight=False)


def _account(summary: Mapping[str, Any]) -> list[str]:
    """What the overview says of a stage: all but where its data came from, which its own report tells."""
    return [text for text in summary.get("account", ()) if not text.startswith("Data: ")]
