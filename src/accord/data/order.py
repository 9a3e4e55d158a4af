"""Which groups make which step, and how a step is cut into forward passes.

The order is a function of (seed, stage, epoch) alone, so the position in the data is the step number and nothing else
has to be remembered. Cutting a step into micro-batches by tokens changes speed and memory, never the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accord.randomness import permutation

__all__ = ["batch_indices", "epochs_done", "micro_batches", "num_steps"]

T = TypeVar("T")


def num_steps(num_items: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimiser steps in `epochs` passes; the last batch of an epoch may be smaller, so that every item is seen."""
    steps = -(-num_items // batch_size) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def batch_indices(step: int, num_items: int, batch_size: int, *key: int | str) -> list[int]:
    """The items of optimiser step `step` (from 1), in a fresh order every epoch, determined by `key`."""
    per_epoch = -(-num_items // batch_size)
    epoch, batch = divmod(step - 1, per_epoch)
    order = permutation(num_items, "order", *key, epoch)
    return order[batch * batch_size : (batch + 1) * batch_size]


def epochs_done(step: int, num_items: int, batch_size: int) -> float:
    """Passes over the data after optimiser step `step` (from 1): the smaller last batch ends a pass exactly."""
    passes, batches = divmod(step, -(-num_items // batch_size))
    return passes + batches * batch_size / num_items


def micro_batches(
    items: Sequence[T], length: Callable[[T], int], rows: Callable[[T], int], budget: int
) -> list[list[T]]:
    """Cut one step's items into forward passes of at most `budget` tokens, padding included.

    length  longest row an item makes; rows  how many rows it makes. Items are sorted by length, so rows of a pass are
    of similar length and little is padded. An item larger than the budget makes a pass of its own.
    """
    ordered = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    passes: list[list[T]] = []
    width = used_rows = 0
    for index in ordered:
        item = items[index]
        if passes and (used_rows + rows(item)) * width <= budget:
            passes[-1].append(item)
            used_rows += rows(item)
        else:
            passes.append([item])
            width, used_rows = length(item), rows(item)
    return passes
