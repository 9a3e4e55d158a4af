"""`accord quickstart`: the whole loop on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "quickstart",
        help="the whole loop on an embedded tiny model, in minutes",
        description="SFT, annotators, reward model, PPO and evaluation on an embedded tiny model and a simulated task. "
        "Ends with win rates and a report. Run it again to continue an interrupted run.",
        epilog="examples:\n  accord quickstart\n  accord quickstart --out runs/try --seed 1\n"
        "  accord quickstart --out runs/hack --set ppo.kl_coef=0     (watch the reward model being exploited)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the run (default: runs/quickstart-seed<N>)")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one setting"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()
    from accord.cli.screen import screen
    from accord.demos.quickstart import run_quickstart

    out = args.out or Path(f"runs/quickstart-seed{args.seed}")
    run_quickstart(out, seed=args.seed, console=screen(), overrides=args.overrides)
    return 0
