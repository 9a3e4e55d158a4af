"""What a program is doing at the moment: phases that code names, and a clock that adds up the seconds of each.

    with phase("sampling"):
        ...

Without a clock a phase costs a function call. Phases nest, and a second counts once, for the innermost of them. One
thread alone may enter phases. See `accord.profiling` for what reads the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any, Protocol

__all__ = ["EVALUATION", "ITERATION", "OTHER", "Clock", "PhaseSeconds", "Watcher", "passing", "phase", "projecting"]

EVALUATION = "evaluation"  # of the model on held-out data: all of it, whatever phases are within
ITERATION = "iteration"  # the phase that is one step of training and all that belongs to it
OTHER = "other"  # what no phase claims

PhaseSeconds = dict[str, float]


class Watcher(Protocol):
    """What `projecting` and `passing` say is passed on to it."""

    def projecting(self, states: Any, embedding: Any, again: int) -> None: ...

    def passing(self, model: Any, ids: Any, mask: Any, cached: int, logits: bool, read: Any) -> None: ...


class Clock:
    """Seconds of each phase: within every iteration, before the first one and after the last.

    iterations     of each iteration, in order; they add up to its wall-clock time
    outside        of what is no part of an iteration: one entry before the first, one behind each

    Args:
        settle: called wherever a phase begins or ends, so that work that was only queued is finished (a GPU's).
        watcher: told of passes and projections.
    """

    def __init__(
        self,
        *,
        settle: Callable[[], None] | None = None,
        watcher: Watcher | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.iterations: list[PhaseSeconds] = []
        self.outside: list[PhaseSeconds] = [{}]
        self.watcher = watcher
        self._settle, self._now = settle, now
        self._names: list[str] = []
        self._current = self.outside[0]
        self._last = self._time()

    @property
    def iteration(self) -> int | None:
        """Index of the iteration that is running, None outside of all."""
        return len(self.iterations) - 1 if ITERATION in self._names else None

    @property
    def name(self) -> str:
        """The innermost phase."""
        if EVALUATION in self._names:
            return EVALUATION
        return self._names[-1] if self._names and self._names[-1] != ITERATION else OTHER

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """Inside the block, this is the clock that phases are told to."""
        global _clock
        if _clock is not None:
            raise RuntimeError("another clock is running")
        self._last = self._time()
        _clock = self
        try:
            yield self
        finally:
            _clock = None
            self._charge()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Seconds inside the block count nowhere."""
        self._charge()
        try:
            yield
        finally:
            self._last = self._time()

    def enter(self, name: str) -> None:
        self._charge()
        self._names.append(name)
        if name == ITERATION:
            self._current = {}
            self.iterations.append(self._current)

    def leave(self) -> None:
        self._charge()
        if self._names.pop() == ITERATION:
            self._current = {}
            self.outside.append(self._current)

    def _charge(self) -> None:
        """The seconds since the last change go to the phase they were spent in."""
        now = self._time()
        self._current[self.name] = self._current.get(self.name, 0.0) + now - self._last
        self._last = now

    def _time(self) -> float:
        if self._settle is not None:
            self._settle()
        return self._now()


_clock: Clock | None = None


class phase(ContextDecorator):
    """What happens inside the block, or the function decorated, belongs to the phase `name`."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _clock is not None:
            _clock.enter(self._name)

    def __exit__(self, *_: object) -> None:
        if _clock is not None:
            _clock.leave()


def projecting(states: Any, embedding: Any, again: int) -> None:
    """Say that hidden states (N, H) are about to be projected onto the rows of an output embedding (V, H); a backward
    pass, if there is one, does it `again` for so many of them."""
    if _clock is not None and _clock.watcher is not None:
        _clock.watcher.projecting(states, embedding, again)


def passing(model: Any, ids: Any, mask: Any, *, cached: int = 0, logits: bool = False, read: Any = None) -> None:
    """Say that a model's trunk is about to run tokens (R, L) behind `cached` others of each row, under a mask as
    transformers takes it; with `logits`, that the output embedding reads the last token of each row; with
    `read` (R, L), that the last block makes nothing but keys and values at places that are False in it."""
    if _clock is not None and _clock.watcher is not None:
        _clock.watcher.passing(model, ids, mask, cached, logits, read)
