"""What happens when memory runs out: the forward passes get smaller, and the optimiser step is done again.

Losses are divided by counts of the whole step, and everything random follows from keys. So a step that is redone in
smaller passes from cleared gradients has the gradient that it would have had (up to the order of a sum).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from accord.errors import TrainingError
from accord.records import TokenGroup

__all__ = ["MicroBatches", "OutOfMemory", "asked_for", "free_memory", "one_pass"]

T = TypeVar("T")

# What torch's CPU allocator says, which raises a plain RuntimeError.
_CPU_SAYS = ("DefaultCPUAllocator", "not enough memory")
# The part of what any of torch's allocators says that helps.
_ASKED = re.compile(r"tried to allocate ([\d.,]+ \w+)", re.IGNORECASE)


def asked_for(error: RuntimeError) -> str | None:
    """What was asked for where memory ran out ("tried to allocate 2.00 GiB"); None for an error of another kind."""
    text = " ".join(str(error).split())
    if not isinstance(error, torch.OutOfMemoryError) and not any(said in text for said in _CPU_SAYS):
        return None
    found = _ASKED.search(text)
    return f"tried to allocate {found[1]}" if found else text.partition(". ")[0]


def free_memory() -> None:
    """After a failure, once its frames are gone: what they held can be had by any tensor."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class OutOfMemory(TrainingError):
    """A forward or backward pass found no memory. `groups` are those of the pass, `doing` is what it was for."""

    def __init__(self, groups: Sequence[TokenGroup], reason: str, doing: str = "") -> None:
        self.groups, self.reason = groups, reason
        longest = max((group.num_tokens for group in groups), default=0)
        where = f"while {doing}, in" if doing else "in"
        super().__init__(
            f"out of memory {where} a forward pass of {len(groups)} prompts, the longest of which has {longest} tokens "
            f"with its completions: {self.reason}. Lower `micro_batch_tokens`, or `data.max_tokens` where one prompt "
            "is too much; `model.activation_checkpointing`, `model.adapter` and `model.precision` save memory as well"
        )


@contextmanager
def one_pass(groups: Sequence[TokenGroup], doing: str = "") -> Iterator[None]:
    """Around a forward pass and its backward pass: that memory ran out becomes `OutOfMemory`."""
    reason = None
    try:
        yield
    except RuntimeError as error:
        reason = asked_for(error)
        if reason is None:
            raise
    if reason is not None:  # out here, where the frames of the pass and their tensors are gone
        raise OutOfMemory(groups, reason, doing)


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
            free_memory()

    def restore(self, values: Mapping[str, Any]) -> None:
        """Put back `tokens` from a checkpoint's values; one of an older version has none."""
        self.tokens = values.get("micro_batch_tokens", self.tokens)

    def notes(self) -> tuple[str, ...]:
        """What there is to tell since it was last asked."""
        told, self._notes = tuple(self._notes), []
        return told
