"""`accord profile`: where the time of an iteration goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from accord.cli.screen import screen
from accord.config import load_recipe
from accord.errors import ConfigError
from accord.methods.catalogue import STAGES

__all__ = ["add_parser"]

DESCRIPTION = """\
Runs a few real iterations of every training stage of a recipe, in a folder of its own, and breaks an iteration down:
seconds, tokens and floating-point operations of each phase, the share of this machine's measured matrix-multiply
peak, and how long the counted work would take at best. The recipe's own run folder is only read: for the models of
stages that are finished there."""

TRAINING = tuple(name for name, stage in STAGES.items() if stage.trained)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "profile",
        help="where the time of an iteration goes, and what would be possible",
        description=DESCRIPTION,
        epilog="examples:\n  accord profile recipe.yaml\n  accord profile recipe.yaml --stage ppo --steps 3 --warmup 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file; see docs/configuration.md")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", dest="stages",
        help=f"this stage only; may be repeated (default: all that train; one of {', '.join(TRAINING)})",
    )  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=5, metavar="N", help="iterations measured (default: 5)")
    parser.add_argument(
        "--warmup", type=_positive, default=2, metavar="N", help="iterations before them, not measured (default: 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FOLDER",
        help="where profile.json is written (default: the run's folder with -profile added)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="change one setting; may be repeated",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    named = [name.replace("-", "_") for name in args.stages]
    for name in named:
        if name not in TRAINING:
            raise ConfigError(f"--stage {name} is no stage that trains; expected one of {', '.join(TRAINING)}")
    recipe = load_recipe(args.recipe, args.overrides, defaults={name: {} for name in named})
    stages = [name for name in TRAINING if (name in named if named else getattr(recipe, name) is not None)]
    for name in stages:
        if getattr(recipe, name) is None:
            raise ConfigError(f"`{name}` is null in the recipe, and --stage names it: leave null out")
    if not stages:
        raise ConfigError(f"the recipe trains nothing: add a section, or name one with --stage {', '.join(TRAINING)}")
    from accord.methods.corpus import read_corpus
    from accord.methods.plan import check_sizes

    console, corpus = screen(), read_corpus(recipe.data)
    check_sizes(recipe, corpus, stages)
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()  # before torch is imported, as a run has it
    from accord.profiling.run import profile_stages, show

    out = args.out or recipe.root.with_name(f"{recipe.root.name}-profile")
    profile = profile_stages(recipe, corpus, stages, console, out=out, steps=args.steps, warm_up=args.warmup)
    show(profile, console)
    console.print(f"\nnumbers: {out / 'profile.json'}", highlight=False)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
