"""`accord import-value-head`: a TRL checkpoint with a value head becomes a policy and a value model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "import-value-head",
        help="take a TRL model with a value head apart: a policy and a value model for PPO",
        description="Reads a checkpoint of TRL's AutoModelForCausalLMWithValueHead (safetensors) and writes "
        "OUT/policy, a plain Hugging Face model, and OUT/value, which `ppo.value_init` takes.",
        epilog="example:\n  accord import-value-head trl-checkpoint --out imported\n"
        "  accord ppo recipe.yaml --set model.path=imported/policy --set ppo.value_init=imported/value",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write policy and value to; must be new")
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from accord.cli.screen import screen
    from accord.models.value_head import import_value_head

    found = import_value_head(args.folder, args.out)
    screen().print(
        f"policy       {found.policy}\nvalue model  {found.value}  (bias {found.bias:+.4g})\n"
        f"use them with --set model.path={found.policy} --set ppo.value_init={found.value}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
