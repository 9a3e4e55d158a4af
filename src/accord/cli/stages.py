"""`accord sft|reward|ppo|evaluate` (one stage) and `accord run` (all stages of a recipe)."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from accord.cli.screen import screen
from accord.config import Recipe, load_recipe

__all__ = ["add_parsers"]

HELP = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "train a reward model on comparisons",
    "ppo": "optimise the policy against the reward model",
    "evaluate": "compare models on held-out prompts",
}
EXAMPLES = {
    "sft": "accord sft --set model.path=my-model --set data.sft=demos.jsonl --set sft.epochs=2 --set out=runs/a",
    "reward": "accord reward recipe.yaml --set reward.learning_rate=1e-5",
    "ppo": "accord ppo recipe.yaml --set ppo.kl_coef=0.1 --dry-run",
    "evaluate": "accord evaluate recipe.yaml --set evaluate.prompts=1000",
    "run": "accord run recipe.yaml",
}


def add_parsers(commands: Any) -> None:
    """Add the five commands."""
    for stage, text in HELP.items():
        parser = _add(commands, stage, text)
        parser.set_defaults(run=_run_one, stage=stage)
    parser = _add(commands, "run", "run all stages of a recipe in order; finished ones are not repeated")
    parser.set_defaults(run=_run_all)


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"{_keys(name)}example:\n  {EXAMPLES[name]}\n\nRun the same command again to continue an interrupted "
        f"run. "
        "All keys: docs/configuration.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?" if name != "run" else None, help="YAML file; see docs/configuration.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change one setting; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan and sizes, do nothing")
    return parser


def _keys(stage: str) -> str:
    if stage not in HELP:
        return ""
    from accord.config.reference import key_lines

    return f"keys of the {stage} section (default):\n{key_lines(stage)}\n\n"


def _run_one(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides, defaults={args.stage: {}})
    return _run(recipe, [args.stage], args)


def _run_all(args: argparse.Namespace) -> int:
    from accord.methods.plan import stages_of

    recipe = load_recipe(args.recipe, args.overrides)
    return _run(recipe, stages_of(recipe), args)


def _run(recipe: Recipe, stages: list[str], args: argparse.Namespace) -> int:
    from accord.methods.corpus import read_corpus

    console = screen()
    corpus = read_corpus(recipe.data)
    if args.dry_run:
        from accord.methods.plan import plan_table

        resolved = recipe.model_dump(mode="json", exclude_none=True)
        console.print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), highlight=False, markup=False)
        console.print(plan_table(recipe, corpus, stages))
        return 0
    from accord.methods.plan import check_sizes
    from accord.pipeline import run_stages

    check_sizes(recipe, corpus, stages)
    run_stages(recipe, corpus, stages, console)
    return 0
