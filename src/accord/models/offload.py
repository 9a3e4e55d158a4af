"""Frozen roles that wait in the machine's memory and are on the GPU only while they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["in_use"]


@contextmanager
def in_use(model: Any, device: torch.device | None) -> Iterator[None]:
    """Inside the block, `model` is on `device`; after it, on the CPU. None = it stays where it is.

    It must share no weights with a model that stays: those would go with it.
    """
    if device is None:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
