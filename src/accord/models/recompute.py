"""Activation checkpointing: a block's activations are dropped after the forward pass and computed again when the
backward pass needs them. It costs a second forward pass of the trunk; gradients are the same, to the bit on a CPU.

Transformers' blocks can do this, but only in training mode, and our models are in evaluation mode for good. So the
blocks themselves are put into training mode while a gradient is wanted; what is in them stays as it is, and what a
block would drop out by itself in that mode is set to none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from accord.errors import ConfigError

__all__ = ["recompute_activations", "recomputing"]


def recompute_activations(model: Any) -> None:
    """From here on, passes of `model` with gradient keep what enters each block and nothing else.

    Raises: ConfigError for a model whose blocks cannot do that.
    """
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise ConfigError(
            f"`model.activation_checkpointing`: {type(model).__name__} has no blocks that transformers can run again; "
            "leave it off, or lower `micro_batch_tokens` instead"
        )
    # The name that newer versions of transformers want, where there is one; the older warns in them.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            vars(block).update({name: 0.0 for name, x in vars(block).items() if "dropout" in name and type(x) is float})


@contextmanager
def recomputing(trunk: nn.Module) -> Iterator[None]:
    """For a forward pass of the trunk: its blocks drop their activations, if they were asked to and a gradient is
    wanted."""
    blocks = [
        module
        for module in trunk.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [block.training for block in blocks]
    for block in blocks:
        block.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training = training
