"""`accord methods`: what there is, what it needs, what it costs, and when to choose it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from accord.cli.screen import screen
from accord.methods.catalogue import STAGES, Stage

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "what the methods need, what they cost, and when to choose which"
    parser = commands.add_parser(
        "methods",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="example:\n  accord methods\n  accord methods --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array on standard output, nothing else")
    parser.set_defaults(run=_methods)


def _methods(args: argparse.Namespace) -> int:
    methods = [stage for stage in STAGES.values() if stage.needs]
    if args.json:
        print(json.dumps([_record(stage) for stage in methods], ensure_ascii=False, indent=2))
        return 0
    console = screen()
    table = Table("method", "needs", "costs", "choose it", show_lines=True)
    table.columns[0].no_wrap = True
    for stage in methods:
        table.add_row(stage.verb, stage.needs, stage.costs, stage.choose)
    console.print(table)
    console.print(
        "Costs beside SFT's: models are counted in memory at once, each of the policy's size. `accord METHOD --help` "
        "shows a method's keys; docs/methods has the equations.",
        highlight=False,
    )
    return 0


def _record(stage: Stage) -> dict[str, Any]:
    return {
        "method": stage.verb,
        "section": stage.name,
        "what": stage.help,
        "needs": stage.needs,
        "costs": stage.costs,
        "choose": stage.choose,
        "models_trained": stage.trained,
        "models_frozen": stage.frozen,
        "example": stage.example,
    }
