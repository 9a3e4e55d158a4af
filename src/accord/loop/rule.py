"""When the loop stops, and which policy is its result: a function of the win rates alone. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accord.records import Interval

__all__ = ["Standing", "improved", "standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """After some policies were judged: the best, how many since then were not better, and whether to stop."""

    best: int
    misses: int
    stop: bool


def improved(rate: Interval) -> bool:
    """Better by more than chance explains: the whole interval of the win rate lies above one half."""
    return rate.low > 0.5


def standing(rates: Sequence[Interval], patience: int) -> Standing:
    """`rates[k - 1]` is policy k's win rate over the best policy before it; policy 0 is where the loop starts.

    A policy that is not shown to be better never becomes the best, so the later ones are held against one that was.
    """
    best = misses = 0
    for number, rate in enumerate(rates, start=1):
        best, misses = (number, 0) if improved(rate) else (best, misses + 1)
    return Standing(best, misses, misses >= patience)
