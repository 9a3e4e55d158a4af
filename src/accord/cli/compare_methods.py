"""`accord compare-methods`: every way of learning from preferences, side by side on the embedded task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare-methods",
        help="DPO, ORPO, KTO, PPO and best-of-n side by side, in minutes",
        description="Trains SFT, DPO, ORPO, KTO, PPO and best-of-n from the same preferences on the quickstart's task, "
        "and compares them: gold win rate over SFT with its interval, KL, time and memory. Ends with a table and a "
        "report. Run it again to continue an interrupted run.",
        epilog="examples:\n  accord compare-methods\n  accord compare-methods --methods dpo,ppo --seed 1\n"
        "  accord compare-methods --methods dpo --set dpo.loss=ipo --out runs/ipo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default=None, metavar="A,B,...", help="some of dpo, orpo, kto, ppo, bestofn")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: runs/compare-methods-seed<N>)")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (default: 0)")
    parser.add_argument(
        "--comparisons",
        type=_count,
        default=None,
        metavar="N",
        help="prompts whose answers are compared (default: 4000)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one setting"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()
    from accord.cli.screen import screen
    from accord.demos.compare_methods import METHODS, run_comparison
    from accord.demos.quickstart import NUM_COMPARED

    out = args.out or Path(f"runs/compare-methods-seed{args.seed}")
    methods = METHODS if args.methods is None else tuple(name.strip() for name in args.methods.split(","))
    compared = args.comparisons or NUM_COMPARED
    run_comparison(out, seed=args.seed, console=screen(), methods=methods, compared=compared, overrides=args.overrides)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 100:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 100, found {text!r}")
    return int(text)
