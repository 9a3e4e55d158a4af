"""Which groups make which step, and how a step is cut into forward passes.

The order is a function of (seed, stage, epoch) alone, so the position in the data is the step number and nothing else
has to be remembered. Cutting a step into micro-batches by tokens changes speed and memory, never the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from accord.randomness import generator

__all__ = ["batch_indices", "epochs_done", "micro_batches", "num_steps"]

T = TypeVar("T")

PASS_TOKENS = 128  # what a forward pass costs besides its tokens, in tokens


def num_steps(num_items: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimiser steps in `epochs` passes; the last batch of an epoch may be smaller, so that every item is seen."""
    steps = -(-num_items // batch_size) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def batch_indices(step: int, num_items: int, batch_size: int, *key: int | str) -> list[int]:
    """The items of optimiser step `step` (from 1), in a fresh order every epoch, determined by `key`."""
    per_epoch = -(-num_items // batch_size)
    epoch, batch = divmod(step - 1, per_epoch)
    order = _order(num_items, "order", *key, epoch)
    return order[batch * batch_size : (batch + 1) * batch_size].tolist()


@lru_cache(maxsize=2)  # PPO mixes another stage's order into its own
def _order(num_items: int, *key: int | str) -> NDArray[np.int64]:
    """`randomness.permutation`, eight bytes an item."""
    return generator(*key).permutation(num_items)


def epochs_done(step: int, num_items: int, batch_size: int) -> float:
    """Passes over the data after optimiser step `step` (from 1): the smaller last batch ends a pass exactly."""
    passes, batches = divmod(step, -(-num_items // batch_size))
    return passes + batches * batch_size / num_items


def micro_batches(
    items: Sequence[T],
    length: Callable[[T], int],
    rows: Callable[[T], int],
    budget: int,
    packed: Callable[[T], int] | None = None,
) -> list[list[T]]:
    """Cut one step's items into forward passes of at most `budget` tokens, padding included.

    length  longest row an item makes; rows  how many rows it makes; packed  what it takes of a row that it shares with
    others, None = rows are padded. Items are sorted from long to short, and cut where

        sum over passes of (size + PASS_TOKENS),    size = rows * longest row, or the sum of `packed` if that is less

    is least: where lengths differ much, more padded passes run fewer tokens. An item larger than the budget makes a
    pass of its own.
    """
    ordered = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    lengths, counts = [length(items[i]) for i in ordered], [rows(items[i]) for i in ordered]
    unpadded = None if packed is None else [packed(items[i]) for i in ordered]
    least, last_cut = [0], [0]  # of the first k items: their cost, and where their last pass begins
    for end in range(1, len(ordered) + 1):
        best, cut, used, together = 0, end, 0, 0
        for start in range(end - 1, -1, -1):
            used += counts[start]
            tokens = used * lengths[start]
            if unpadded is not None:
                together += unpadded[start]
                tokens = min(tokens, together)
            if tokens > budget and start < end - 1:
                break
            cost = least[start] + tokens + PASS_TOKENS
            if cut == end or cost < best:
                best, cut = cost, start
        least.append(best)
        last_cut.append(cut)
    passes: list[list[T]] = []
    end = len(ordered)
    while end:
        passes.append([items[i] for i in ordered[last_cut[end] : end]])
        end = last_cut[end]
    return passes[::-1]
