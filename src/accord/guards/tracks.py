"""What a guard remembers of a metric: how it began, how it is now, its best, and how much it jumps about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Track", "View"]


@dataclass(slots=True)
class Track:
    """One metric over the evaluations at which it was logged.

    first    its first values, at most as many as the baseline has
    recent   its latest values, at most as many as the window has
    count    values seen
    jumps    sum of squared differences between neighbouring values
    high, low  extremes of the mean over a full window
    high_at    the step at which the highest mean was reached
    first_at   the step of its first value
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    count: int = 0
    jumps: float = 0.0
    high: float | None = None
    low: float | None = None
    high_at: int | None = None
    first_at: int | None = None

    def add(self, step: int, value: float, *, baseline: int, window: int) -> None:
        if self.recent:
            self.jumps += (value - self.recent[-1]) ** 2
        self.count += 1
        if self.first_at is None:
            self.first_at = step
        if len(self.first) < baseline:
            self.first.append(value)
        self.recent = [*self.recent, value][-window:]
        if len(self.recent) == window:
            if self.high is None or self.now > self.high:
                self.high, self.high_at = self.now, step
            self.low = min(self.now, self.low) if self.low is not None else self.now

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return sum(self.first) / len(self.first)

    @property
    def now(self) -> float:
        """Mean of the latest values."""
        return sum(self.recent) / len(self.recent)

    @property
    def standard_error(self) -> float:
        """Of `now`, in [0, inf): from neighbouring differences, so that a trend does not pass for noise.

        sigma^2 = sum (x_t - x_(t-1))^2 / (2 (n - 1)). Source: von Neumann 1941, "Distribution of the ratio of the mean
        square successive difference to the variance".
        """
        if self.count < 2:
            return 0.0
        return math.sqrt(self.jumps / (2 * (self.count - 1)) / len(self.recent))

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class View:
    """The tracks a detector may look at. A metric is there once its baseline and its window are full."""

    tracks: Mapping[str, Track]

    def of(self, *names: str) -> Track | None:
        """The first of these metrics that is there."""
        return next((self.tracks[name] for name in names if name in self.tracks), None)
