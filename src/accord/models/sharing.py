"""Models that share weights in memory. What a model does not train (`requires_grad` = False) never changes, so every
copy of it may be the same tensor: a role then costs what it trains, and the trunk is paid for once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["share_equal", "sharing_copy"]


def sharing_copy(model: Any) -> Any:
    """A copy that has the model's own frozen parameters and copies of all others.

    Of a model that trains its top blocks it is the reference: a second module object around the same lower blocks and
    embeddings, with the top blocks as they are now. Of one that trains everything it is a plain copy.
    """
    result = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    result.zero_grad(set_to_none=True)
    return result


def share_equal(model: nn.Module, other: Any) -> float:
    """Puts `other`'s frozen parameters into `model` wherever the two have the same name in the trunk and the same bits;
    returns the share of `model`'s weights that this saves, 0 to 1.

    The comparison is of the content: where a model was loaded from does not matter. The parameters that stay its own
    are copied out of the file that they may still be mapped from, so that the file leaves memory.
    """
    frozen = {name: p for name, p in other.base_model.named_parameters() if not p.requires_grad}
    trunk, shared = model.base_model, 0
    total = sum(p.numel() for p in model.parameters())
    assert isinstance(trunk, nn.Module)
    for name, own in list(trunk.named_parameters()):
        theirs = frozen.get(name)
        if theirs is not None and _same(own, theirs):
            module, _, leaf = name.rpartition(".")
            trunk.get_submodule(module).register_parameter(leaf, theirs)
            shared += own.numel()
        else:
            own.data = own.data.clone()
    return shared / total


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
