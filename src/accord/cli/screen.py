"""Where the commands print."""

from __future__ import annotations

from rich.console import Console

__all__ = ["screen"]

FILE_WIDTH = 140


def screen(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; into a file or pipe, wide enough for the tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=FILE_WIDTH)
