"""One command a stage (`accord sft`, `accord dpo`, ...), and `accord run` for all stages of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from accord.cli.screen import screen, watched
from accord.config import Recipe, load_recipe
from accord.errors import ConfigError
from accord.methods.catalogue import STAGES

__all__ = ["add_parsers", "add_recipe_parser"]


def add_parsers(commands: Any) -> None:
    """Add a command for each stage, and one for whole recipes."""
    for stage in STAGES.values():
        parser = add_recipe_parser(commands, stage.verb, stage.help, stage.example, _keys(stage.name))
        parser.set_defaults(run=_run_one, stage=stage.name)
    text = "run all stages of a recipe in order; finished ones are not repeated"
    parser = add_recipe_parser(commands, "run", text, "accord run recipe.yaml", "")
    parser.set_defaults(run=_run_all)


def add_recipe_parser(commands: Any, name: str, text: str, example: str, keys: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"{keys}example:\n  {example}\n\nRun the same command again to continue an interrupted "
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
    from accord.config.reference import key_lines

    return f"keys of the {stage} section (default):\n{key_lines(stage)}\n\n"


def _run_one(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides, defaults={args.stage: {}})
    if getattr(recipe, args.stage) is None:
        raise ConfigError(f"`{args.stage}` is null, and `accord {args.stage}` runs it: leave null out")
    return _run(recipe, [args.stage], args)


def _run_all(args: argparse.Namespace) -> int:
    from accord.methods.plan import stages_of

    recipe = load_recipe(args.recipe, args.overrides)
    return _run(recipe, stages_of(recipe), args)


def _run(recipe: Recipe, stages: list[str], args: argparse.Namespace) -> int:
    from accord.methods.corpus import read_corpus
    from accord.methods.named import check_earlier

    console = screen()
    if not args.dry_run:
        check_earlier(recipe, stages)
    corpus = read_corpus(recipe.data, watched)
    if args.dry_run:
        from accord.methods.named import check_names
        from accord.methods.plan import plan_table

        check_names(recipe, stages)
        resolved = recipe.model_dump(mode="json", exclude_none=True)
        console.print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), highlight=False, markup=False)
        console.print(plan_table(recipe, corpus, stages))
        return 0
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()  # before torch is imported
    from accord.methods.plan import check_sizes
    from accord.pipeline import run_stages

    check_sizes(recipe, corpus, stages)
    run_stages(recipe, corpus, stages, console)
    return 0
