"""`accord loop`: rounds of labels, reward model and policy."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from accord.cli.screen import screen, watched
from accord.cli.stages import add_recipe_parser
from accord.config import load_recipe

__all__ = ["add_parser"]

DESCRIPTION = """\
Rounds of: the newest policy answers prompts twice (sample), somebody says which answer is better (label), the reward
model is fitted again to all labels so far (reward), and a policy is trained against it (ppo, or another method that
samples). Each new policy is compared with the best before it on held-out prompts; the loop stops when that no longer
shows an improvement, and its result is the best. It needs the sections `reward` and one such as `ppo`; `sft` comes
first where there is one.

With `loop.labeller` = human the command writes the pairs into a file and ends with exit code 4. Write a, b or tie into
`choice` of each row, then run the same command again."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    from accord.config.reference import key_lines

    parser = add_recipe_parser(
        commands,
        "loop",
        "rounds of labels, reward model and policy, until the policy stops improving",
        "accord loop recipe.yaml --dry-run\n  accord loop recipe.yaml --set loop.rounds=5 --set loop.labeller=human",
        f"keys of the loop section (default):\n{key_lines('loop')}\n\n",
    )
    parser.description = DESCRIPTION
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from accord.loop.plan import check_loop, left_out, loop_table, online_stage
    from accord.methods.corpus import read_corpus
    from accord.methods.plan import plan_table

    recipe = load_recipe(args.recipe, args.overrides, defaults={"loop": {}})
    console, corpus = screen(), read_corpus(recipe.data, watched)
    check_loop(recipe, corpus)
    if args.dry_run:
        resolved = recipe.model_dump(mode="json", exclude_none=True)
        console.print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), highlight=False, markup=False)
        first = ["sft"] if recipe.sft is not None else []
        console.print(plan_table(recipe, corpus, [*first, online_stage(recipe)]))
        console.print(loop_table(recipe, corpus))
        for name in left_out(recipe):
            console.print(f"the {name} stage is no part of the loop and is left out", highlight=False)
        return 0
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()  # before torch is imported
    from accord.loop.run import run_loop

    run_loop(recipe, corpus, console)
    return 0
