"""The number format in which models are read: float32, or 16 bits where that is safe.

Weights, gradients and the optimiser's state stay float32, whatever the format. Within `precision`, matrix products of
the trunk and the vocabulary projection run in 16 bits (torch's autocast decides operation by operation); scalar heads,
log-softmax and every sum of a loss are float32. The format belongs to a stage, not to a model: all its models are read
alike, so that policy and reference differ by training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["lowered", "precision", "reading", "reading_dtype"]

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_lower: ContextVar[torch.dtype | None] = ContextVar("lower", default=None)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside the block, models are read in this format: `float32`, `bfloat16` or `float16`."""
    token = _lower.set(_DTYPES[name])
    try:
        yield
    finally:
        _lower.reset(token)


def reading_dtype() -> torch.dtype | None:
    """The 16-bit format models are read in; None = the format of their weights."""
    return _lower.get()


def reading(device: torch.device) -> AbstractContextManager[object]:
    """For a forward pass of a trunk or a whole model on `device`. The backward pass follows by itself."""
    dtype = _lower.get()
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Float32 tensors in the format models are read in, for a product outside of `reading`; gradients flow back."""
    dtype = _lower.get()
    return tensors if dtype is None else tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)
