"""The `accord` command: parse, call the public functions, print; errors in one sentence with their exit code."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from accord import __version__
from accord.cli import (
    benchmark,
    compare_methods,
    data,
    import_value_head,
    loop,
    methods,
    profile,
    quickstart,
    stages,
)
from accord.errors import AccordError

__all__ = ["main"]

EPILOG = """\
first steps:
  accord quickstart                          the whole loop on a tiny model, in minutes
  accord data check feedback.jsonl           is my file usable, and as what?
  accord methods                             which method needs, costs and suits what?
  accord run recipe.yaml --dry-run           what would happen, without doing it
  accord run recipe.yaml                     SFT, reward model, PPO, evaluation; run again to continue
  accord ppo recipe.yaml --set ppo.kl_coef=0.1
  accord loop recipe.yaml                    label, refit, PPO, again, until it stops improving
  accord profile recipe.yaml                 where the time of an iteration goes

exit codes: 0 done; 1 the program failed; 2 the input is wrong (the message says what to mend); 3 a guard paused the
run after saving; 4 people have to label first; 143 stopped after saving
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose error names the nearest choice."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1) if found else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="accord",
        description="Align language models with human feedback, end to end, and show that they got better.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accord {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    quickstart.add_parser(commands)
    data.add_parser(commands)
    methods.add_parser(commands)
    stages.add_parsers(commands)
    loop.add_parser(commands)
    profile.add_parser(commands)
    compare_methods.add_parser(commands)
    benchmark.add_parser(commands)
    import_value_head.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return args.run(args)
    except AccordError as error:
        print(f"accord: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("accord: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (such as `head`) has gone; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _terminate(number: int, _frame: FrameType | None) -> None:
    """SIGTERM outside a training loop: nothing to save, since every file is written whole or not at all."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
