"""Progress for people: a live bar on a terminal, a line every tenth of the way elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["StageProgress"]


class StageProgress:
    """A bar for `total` steps of one activity; `advance` moves it and shows a short status."""

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        self._console, self._label, self._total, self._done = console, label, total, done
        self._bar: Progress | None = None
        self._started, self._first = time.monotonic(), done

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, status="")
        return self

    @property
    def done(self) -> int:
        """Steps done so far."""
        return self._done

    def advance(self, status: str = "") -> None:
        """One step is done."""
        before = self._done * 10 // max(1, self._total)
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, status=status)
        elif self._done * 10 // max(1, self._total) > before:
            seconds = time.monotonic() - self._started
            left = seconds / (self._done - self._first) * (self._total - self._done)
            self._console.print(
                f"  {self._label} {self._done}/{self._total}, {seconds:.0f} s, about {left:.0f} s left  {status}",
                highlight=False,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
