"""Which attention models are loaded with and read by: a choice of a stage, like its number format.

    auto    what transformers takes by itself: `sdpa`, and `eager` for architectures that have nothing else
    sdpa    torch's scaled-dot-product attention, which picks a kernel by device and mask
    eager   written out, every score in memory: slow, and plain to see
    flex    `sdpa`; but masks of ours are cut into blocks, and FlexAttention computes those that are seen (`flex`)
    flash   the kernels of the package flash-attn, which take no mask of ours

On every device `auto` is the same. Torch's `sdpa` has its own flash kernel on a GPU for rows without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from accord.errors import ConfigError
from accord.models.extras import require_flash_attention

__all__ = ["attending", "blockwise", "check_attention", "chosen_attention", "set_attention"]

_IMPLEMENTATIONS = {"auto": None, "sdpa": "sdpa", "eager": "eager", "flex": "sdpa", "flash": "flash_attention_2"}
_choice: ContextVar[str] = ContextVar("attention", default="auto")


@contextmanager
def attending(choice: str) -> Iterator[None]:
    """Inside the block, models are loaded with this attention, and read by it."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def chosen_attention() -> str:
    """The attention of the block this is called in."""
    return _choice.get()


def blockwise() -> bool:
    """Whether attention under a mask of ours is computed block by block."""
    return chosen_attention() == "flex"


def check_attention(choice: str, device: torch.device) -> None:
    """Raises ConfigError for an attention that this device, or this installation, does not have."""
    if choice in {"flex", "flash"} and device.type != "cuda":
        why = "has no gradient" if choice == "flex" else "has no kernels"
        raise ConfigError(
            f"`model.attention` = {choice} runs on a GPU alone, and models are on the {device.type} here, where it "
            f"{why}: set `model.attention` to auto, or `model.device` to a GPU"
        )
    if choice == "flash":
        require_flash_attention("model.attention")


def set_attention(model: Any) -> None:
    """Gives a model that was loaded the attention of the block this is called in.

    Raises: ConfigError for an architecture that transformers cannot run this way.
    """
    choice = chosen_attention()
    wanted = _IMPLEMENTATIONS[choice]
    if wanted is None:
        return
    why = "it has no such attention"
    if model.config._attn_implementation != wanted:
        try:
            model.set_attn_implementation(wanted)
        except (ImportError, ValueError) as error:
            why = str(error).split(". ")[0]
    if model.config._attn_implementation != wanted or (blockwise() and not model._supports_flex_attn):
        raise ConfigError(
            f"`model.attention` = {choice} does not fit {type(model).__name__}, which transformers does not run that "
            f"way ({why}); set it to auto"
        )
