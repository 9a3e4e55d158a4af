"""What happens when memory runs out: the forward passes get smaller, and the optimiser step is done again.

Losses are divided by counts of the whole step, and everything random follows from keys. So a step that is redone in
smaller passes from cleared gradients has the gradient that it would have had (up to the order of a sum).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from accord.errors import TrainingError
from accord.records import TokenGroup

__all__ = ["MicroBatches", "OutOfMemory", "one_pass"]

T = TypeVar("T")

# What torch's CPU allocator says, which raises a plain RuntimeError.
_CPU_SAYS = ("DefaultCPUAllocator", "not enough memory")


class OutOfMemory(TrainingError):
    """A forward or backward pass found no memory. `groups` are those of the pass."""

    def __init__(self, groups: Sequence[TokenGroup], reason: str) -> None:
        self.groups = groups
        self.reason = " ".join(reason.split()).partition(". ")[0]
        longest = max((group.num_tokens for group in groups), default=0)
        super().__init__(
            f"out of memory in a forward pass of {len(groups)} prompts, the longest of which has {longest} tokens with "
            f"its completions: {self.reason}. Lower `micro_batch_tokens`, or `data.max_tokens` where one prompt is too "
            "much; `model.activation_checkpointing`, `model.adapter` and `model.precision` save memory as well"
        )


@contextmanager
def one_pass(groups: Sequence[TokenGroup]) -> Iterator[None]:
    """Around a forward pass and its backward pass: that memory ran out becomes `OutOfMemory`."""
    reason = None
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _CPU_SAYS):
            raise
        reason = str(error)
    if reason is not None:  # out here, where the frames of the pass and their tensors are gone
        raise OutOfMemory(groups, reason)


class MicroBatches:
    """How many tokens a forward pass may have: what the recipe says, halved whenever memory ran out, for the rest of
    the run. `tokens` belongs into the checkpoint: sums are rounded by how they are cut."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._notes: list[str] = []

    def attempt(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """`work(tokens)`; where it runs out of memory, what it did is undone, and it is done again with half of it.

        Raises: OutOfMemory when a single prompt with its completions does not fit.
        """
        while True:
            try:
                return work(self.tokens)
            except OutOfMemory as error:
                groups, reason = error.groups, error.reason
                undo()
                if len(groups) < 2 or self.tokens < 2:
                    raise
            self.tokens //= 2
            self._notes.append(
                f"out of memory ({reason}): forward passes have at most {self.tokens} tokens from here on "
                "(`micro_batch_tokens`), and what was begun is done again; gradients stay the same"
            )
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def restore(self, values: Mapping[str, Any]) -> None:
        """Put back `tokens` from a checkpoint's values; one of an older version has none."""
        self.tokens = values.get("micro_batch_tokens", self.tokens)

    def notes(self) -> tuple[str, ...]:
        """What there is to tell since it was last asked."""
        told, self._notes = tuple(self._notes), []
        return told
