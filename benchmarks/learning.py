"""Speed of learning: gold utility against episodes and against CPU seconds, for PPO, RLOO and GRPO.

Two tasks whose truth is known: the quickstart's (the reward is a reward model's score, the truth is the simulated
people's utility, which no stage trains on) and randomwalks (reward and truth are the walk's optimality). For each seed
all variants start from one SFT model and one reward model, with the same price on KL and the same episodes. Every run
has a process of its own with one thread. Seconds are CPU seconds of that process, so that a busy machine does not
count; they include sampling, scoring, reference and updates, and leave out loading and saving.

A point of a curve is the mean over three rollouts. Over the seeds: the median, and from the lowest to the highest,
which is a 93.8% interval for the median of five (1 - 2 / 2^5).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from accord.atomic import write_json
from accord.report.svg import Series
from benchmarks.figure import Panel, write_figure
from benchmarks.jobs import run_jobs

# The quickstart's: the best of three, or as good, for every variant, on a seed of its own. Randomwalks: its demo's.
RATES = {"quickstart": 2e-4, "randomwalks": 3e-4}
KL_COEF = {"quickstart": 0.1, "randomwalks": 0.1}
EPISODES = {"quickstart": 2560, "randomwalks": 6400}
ROLLOUT = {"quickstart": 128, "randomwalks": 320}
PROMPTS = 20  # letters of randomwalks: a rollout holds all of them
WINDOW = 3
GOLD = "accord.demos.quickstart:gold_utility"


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with the settings that differ from its defaults."""

    method: str
    samples_per_prompt: int
    settings: Mapping[str, Any]


STD_FREE = {"advantage_scale": "none", "averaging": "constant", "kl_estimator": "k1", "kl_in": "reward"}
VARIANTS: dict[str, Variant] = {
    "ppo 4x4": Variant("ppo", 2, {"update_epochs": 4, "minibatches": 4}),
    "ppo 2x2": Variant("ppo", 2, {"update_epochs": 2, "minibatches": 2}),
    "rloo": Variant("rloo", 4, {}),
    "rloo 1x4": Variant("rloo", 4, {"minibatches": 4}),
    "grpo": Variant("grpo", 8, {}),
    "grpo std-free": Variant("grpo", 8, STD_FREE),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: episodes, CPU seconds and gold utility after each rollout, all of one length."""

    episodes: tuple[int, ...]
    seconds: tuple[float, ...]
    gold: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="training seeds")
    parser.add_argument("--tasks", nargs="*", default=list(EPISODES), choices=list(EPISODES), help="which tasks")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="which variants")
    parser.add_argument("--rate", type=float, help="learning rate instead of the task's own, to choose one with")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed and an eighth of the episodes: minutes")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines instead of the table")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "VARIANT", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, metavar=("TASK", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        _prepare(args.out, args.prepare[0], int(args.prepare[1]))
    elif args.one:
        _train(args.out, args.one[0], args.one[1], int(args.one[2]), args.rate, args.quick)
    else:
        _all(args)


def _all(args: argparse.Namespace) -> None:
    seeds = args.seeds[:1] if args.quick else args.seeds
    jobs = [(task, variant, seed) for seed in seeds for task in args.tasks for variant in args.variants]
    shared = ["--out", str(args.out), *(["--quick"] if args.quick else [])]
    shared += ["--rate", str(args.rate)] if args.rate else []
    prepared = [[*shared, "--prepare", task, str(seed)] for seed in seeds for task in args.tasks]
    run_jobs("benchmarks.learning", prepared, args.processes)
    run_jobs("benchmarks.learning", [[*shared, "--one", *map(str, job)] for job in jobs], args.processes)
    curves = {job: _curve(_folder(args.out, *job, args.rate) / VARIANTS[job[1]].method, job[0]) for job in jobs}
    rows = [_row(task, variant, [curves[task, variant, seed] for seed in seeds], _target(curves, task))
            for task in args.tasks for variant in args.variants]  # fmt: skip
    machine = f"{platform.processor() or platform.machine()}, one thread a run"
    write_json(args.out / "learning.json", {"machine": machine, "seeds": seeds, "rows": rows})
    write_figure(args.out / "learning.svg", [panel for task in args.tasks for panel in _panels(task, rows)])
    print("\n".join(map(json.dumps, rows)) if args.json else _table(rows))


# --- one run ---------------------------------------------------------------------------------------------------------


def _common(out: Path, task: str, seed: int) -> Path:
    return (out / f"{task}-{seed}" / "common").absolute()


def _folder(out: Path, task: str, variant: str, seed: int, rate: float | None) -> Path:
    return (out / f"{task}-{seed}" / f"{variant.replace(' ', '-')}{'' if rate is None else f'-{rate:g}'}").absolute()


def _prepare(out: Path, task: str, seed: int) -> None:
    """The SFT model (and, for the quickstart, the reward model) that all variants of a seed start from."""
    from rich.console import Console

    from accord.demos import quickstart, randomwalks

    folder = _common(out, task, seed)
    if task == "randomwalks":
        randomwalks.run_randomwalks("sft", seed=seed, overrides=(), console=Console(), out=folder)
        return
    from accord.config import recipe_from
    from accord.methods.context import Context
    from accord.pipeline import STAGES

    tree = {key: quickstart.SETTINGS[key] for key in ("threads", "model", "data", "sft", "reward")}
    recipe = recipe_from({**tree, "seed": seed, "out": str(folder)}, source="benchmarks.learning")
    context = Context(recipe, quickstart.task_corpus(seed), Console())
    STAGES["sft"](context)
    quickstart.run_annotators(context)
    STAGES["reward"](quickstart.with_comparisons(context))


def _train(out: Path, task: str, name: str, seed: int, rate: float | None, quick: bool) -> None:
    from rich.console import Console

    from accord.config import recipe_from
    from accord.demos import quickstart, randomwalks
    from accord.methods.context import Context
    from accord.methods.corpus import Corpus, Part
    from accord.pipeline import STAGES
    from accord.records import Group, Message
    from accord.tasks.randomwalks import RandomWalks

    variant, common = VARIANTS[name], _common(out, task, seed)
    walks = RandomWalks(1000)
    demo = quickstart.SETTINGS if task == "quickstart" else randomwalks.SETTINGS
    ours: dict[str, Any] = {
        "init": str(common / "sft" / "model"),
        "episodes": EPISODES[task] // (8 if quick else 1),
        "prompts_per_step": ROLLOUT[task] // variant.samples_per_prompt if task == "quickstart" else PROMPTS,
        "samples_per_prompt": variant.samples_per_prompt if task == "quickstart" else ROLLOUT[task] // PROMPTS,
        "kl_coef": KL_COEF[task],
        "learning_rate": rate or RATES[task],
        "checkpoint_every": 1000,
        **variant.settings,
    }
    functions: dict[str, Any] = {}
    if task == "quickstart":
        ours |= {"max_new_tokens": quickstart.MAX_NEW_TOKENS, "reward_model": str(common / "reward" / "model"),
                 "gold_function": GOLD}  # fmt: skip
        corpus = quickstart.task_corpus(seed)
    else:
        ours |= {"max_new_tokens": 9, "missing_eos_penalty": 0.0}
        ours |= {"value_init": "policy"} if variant.method == "ppo" else {}
        letters = [Group((Message("user", letter),)) for letter in walks.prompts]
        corpus = Corpus(sft=Part.of(walks.sft_groups(), "walks"), prompts=Part.of(letters, "letters"))
        functions = {f"{variant.method}.reward_function": lambda prompt, answer: walks.optimality(prompt + answer)}
    model = {**demo["model"], "path": "quickstart" if task == "quickstart" else str(common / "base" / "model")}
    tree = {"threads": 1, "model": model, "data": demo["data"], variant.method: ours}
    folder = _folder(out, task, name, seed, rate)
    recipe = recipe_from({**tree, "seed": seed, "out": str(folder)}, source="benchmarks.learning")
    STAGES[variant.method](Context(recipe, corpus, Console(), functions))


# --- what came of it -------------------------------------------------------------------------------------------------


def _curve(stage: Path, task: str) -> Curve:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    name = "rollout/gold_utility/mean" if task == "quickstart" else "rollout/score/mean"
    gold = [row[name] for row in rows]
    seconds, total = [], 0.0
    for row in rows:
        total += row["time/step_cpu_seconds"]
        seconds.append(total)
    smooth = [sum(gold[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(gold))]
    return Curve(tuple(int(row["rollout/samples"]) for row in rows), tuple(seconds), tuple(smooth))


def _target(curves: Mapping[tuple[str, str, int], Curve], task: str) -> float:
    """Nine tenths of the way from where the runs start to where the best variant's median ends."""
    of_task = {key: curve for key, curve in curves.items() if key[0] == task}
    start = median(curve.gold[0] for curve in of_task.values())
    ends = [
        median(c.gold[-1] for (_, v, _), c in of_task.items() if v == variant) for variant in {k[1] for k in of_task}
    ]
    return start + 0.9 * (max(ends) - start)


def _row(task: str, variant: str, curves: Sequence[Curve], target: float) -> dict[str, Any]:
    first = curves[0]
    reached = [next((i for i, gold in enumerate(c.gold) if gold >= target), None) for c in curves]

    def at_target(of: Callable[[Curve], Sequence[float]]) -> dict[str, float | None]:
        return _spread([inf if i is None else of(c)[i] for c, i in zip(curves, reached, strict=True)])

    return {
        "task": task,
        "variant": variant,
        "seeds": len(curves),
        "final": _spread([c.gold[-1] for c in curves]),
        "seconds": _spread([c.seconds[-1] for c in curves]),
        "target": target,
        "reached": sum(i is not None for i in reached),
        "episodes_to_target": at_target(lambda c: c.episodes),
        "seconds_to_target": at_target(lambda c: c.seconds),
        "curve": {
            "episodes": first.episodes,
            "seconds": [median(c.seconds[i] for c in curves) for i in range(len(first.gold))],
            "gold": [_spread([c.gold[i] for c in curves]) for i in range(len(first.gold))],
        },
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, lowest and highest; None where a run never got there."""
    found = {"median": median(values), "low": min(values), "high": max(values)}
    return {key: value if value < inf else None for key, value in found.items()}


def _panels(task: str, rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    panels = []
    for x, label in (("episodes", "episodes"), ("seconds", "CPU seconds")):
        series = [
            Series(
                row["variant"],
                tuple(row["curve"][x]),
                tuple(point["median"] for point in row["curve"]["gold"]),
                colour=list(VARIANTS).index(row["variant"]),
                lows=tuple(point["low"] for point in row["curve"]["gold"]),
                highs=tuple(point["high"] for point in row["curve"]["gold"]),
            )
            for row in rows
            if row["task"] == task
        ]
        gold = "gold utility" if task == "quickstart" else "optimality"
        panels.append(Panel(f"{task}: {gold} against {label}", tuple(series), label, gold))
    return panels


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| task | variant | gold at the end | CPU s | episodes to target | CPU s to target | reached |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        cells = [_cell(row["final"], 3), _cell(row["seconds"], 0), _cell(row["episodes_to_target"], 0),
                 _cell(row["seconds_to_target"], 0)]  # fmt: skip
        lines.append(f"| {row['task']} (target {row['target']:.3f}) | {row['variant']} | {' | '.join(cells)} "
                     f"| {row['reached']} of {row['seeds']} |")  # fmt: skip
    return "\n".join(lines)


def _cell(spread: Mapping[str, float | None], digits: int) -> str:
    median_, low, high = (
        "never" if spread[key] is None else f"{spread[key]:,.{digits}f}" for key in ("median", "low", "high")
    )
    return f"{median_} ({low} to {high})"


if __name__ == "__main__":
    main()
