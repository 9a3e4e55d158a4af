"""When the updates of a TRL trainer begin and end."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback

__all__ = ["Clock"]


class Clock(TrainerCallback):
    """When the first update began, and when each one ended; `after_step` is called then, and what it finds is kept."""

    def __init__(self) -> None:
        self._marks: list[float] = []
        self.found: list[float] = []
        self.after_step: Callable[[], float] | None = None

    @property
    def first(self) -> float:
        return self._marks[0]

    @property
    def seconds(self) -> list[float]:
        """Of every update."""
        return [after - before for before, after in pairwise(self._marks)]

    def begin(self) -> None:
        """The first update begins now: for trainers that do not say so themselves."""
        self._marks.append(time.perf_counter())

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self._marks:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._marks.append(time.perf_counter())
        if self.after_step is not None:
            self.found.append(self.after_step())
