"""Where the commands print, and the bar they show while a file is read."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from accord.data.read import Scan
from accord.records import Group

__all__ = ["screen", "watched"]

FILE_WIDTH = 140
PATIENCE_SECONDS = 1.0  # a file that is read faster gets no bar
LOOK_SECONDS = 0.2
GROUPS_BETWEEN_LOOKS = 512


def screen(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; into a file or pipe, wide enough for the tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=FILE_WIDTH)


def watched(scanned: Scan) -> Iterator[Group]:
    """The groups of a scan, with a bar of the bytes read where standard error is a terminal; it goes when all is
    read."""
    console = screen(stderr=True)
    if not console.is_terminal:
        yield from scanned
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    next_look = time.monotonic() + PATIENCE_SECONDS
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(f"reading {scanned.path.name}", total=scanned.bytes_total, visible=False)
        for number, group in enumerate(scanned):
            if number % GROUPS_BETWEEN_LOOKS == 0 and time.monotonic() > next_look:
                next_look = time.monotonic() + LOOK_SECONDS
                # Parquet is read by column, a few bytes of it twice.
                bar.update(task, completed=min(scanned.bytes_read, scanned.bytes_total), visible=True)
                bar.refresh()
            yield group
