"""`accord benchmark`: problems whose right answer is known."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accord.methods.catalogue import POLICY_STAGES

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command and its benchmarks."""
    parser = commands.add_parser(
        "benchmark", help="problems whose right answer is known", description="Problems whose right answer is known."
    )
    kinds = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    walks = kinds.add_parser(
        "randomwalks",
        help="shortest paths on a random graph, graded against the exact optimum",
        description="Trains a small GPT-2 from nothing on random walks (SFT), then towards short ones, and computes "
        "score, KL and the best possible objective exactly, by enumerating all legal walks.",
        epilog="examples:\n  accord benchmark randomwalks --method sft\n"
        "  accord benchmark randomwalks --method ppo --set ppo.kl_coef=0.1 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    walks.add_argument(
        "--method",
        choices=(*POLICY_STAGES, "bestofn"),
        default="ppo",
        help="what to do after sft: train by a method, or choose the best of n walks (default: ppo)",
    )
    walks.add_argument(
        "--seed", type=int, default=0, help="seed of the training; the graph stays the same (default: 0)"
    )
    walks.add_argument("--graph-seed", type=int, default=1000, help="seed of the graph and the walks (default: 1000)")
    walks.add_argument(
        "--out", type=Path, default=None, help="folder for the run (default: one a setting, under runs/)"
    )
    walks.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one setting"
    )
    walks.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    walks.set_defaults(run=_randomwalks)


def _randomwalks(args: argparse.Namespace) -> int:
    from accord.training.allocator import keep_freed_memory

    keep_freed_memory()
    from accord.cli.screen import screen
    from accord.demos.randomwalks import run_randomwalks

    result = run_randomwalks(
        args.method,
        seed=args.seed,
        overrides=args.overrides,
        console=screen(stderr=True),
        out=args.out,
        graph_seed=args.graph_seed,
    )
    e = result.evaluation
    if args.json:
        facts = {key: value for key, value in asdict(e).items() if key != "prompts"}
        facts |= {"by_beta": result.by_beta} if result.by_beta else {}
        print(json.dumps({"method": result.method, "kl_coef": result.kl_coef, **facts, "seconds": result.seconds}))
        return 0
    console = screen()
    console.print(
        f"optimality {e.optimality:.4f}  (reference {e.reference_optimality:.4f}, a shortest path has 1)\n"
        f"KL to the reference {e.kl:.4f} nats per walk  ({e.off_path_mass:.2%} of the walks leave the graph)\n"
        f"objective {e.objective:.4f} of at most {e.optimum:.4f}  ({e.objective / e.optimum:.1%})\n"
        f"{result.seconds:.0f} seconds of training; {result.folder}",
        highlight=False,
    )
    for beta, optimality, ideal in result.by_beta:
        console.print(f"beta {beta:g}: optimality {optimality:.4f}  (exact ILQL {ideal:.4f})", highlight=False)
    return 0
