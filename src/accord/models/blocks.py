"""Training the top of a model alone: its last transformer blocks and what runs after them in the trunk, the final norm.

    embeddings -> block 1 ... block n-k -> block n-k+1 ... block n -> final norm -> output embedding
    |------------ frozen ------------|     |------------ trained ------------|      |-- frozen --|

Embeddings and the output embedding are frozen, tied or not: a reference that shares the lower part would drift with a
tied embedding, and an untied one is treated alike, so that the same setting trains the same on both (adapters leave it
alone too). A scalar head, if there is one, is trained.

Source: the "hydra" models of trlX (Havrilla et al. 2023, EMNLP). Departures: the reference is a whole model that shares
the frozen parameters (`sharing_copy`), not a branch that reads hidden states of another's forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accord.errors import ConfigError
from accord.models.heads import score_head

__all__ = ["train_top_blocks"]


def train_top_blocks(model: Any, count: int) -> None:
    """Freezes `model` but for its last `count` blocks, the final norm, and a scalar head if there is one.

    Raises: ConfigError for a count outside 1 ... number of blocks, or a model whose blocks cannot be told.
    """
    blocks = _blocks(model)
    if not 1 <= count <= len(blocks):
        raise ConfigError(
            f"`model.trainable_blocks` = {count}: {type(model).__name__} has {len(blocks)} blocks; choose 1 to "
            f"{len(blocks)}, or leave it unset to train all weights"
        )
    trained = [*blocks[-count:], *_run_after(model.base_model, blocks)]
    if model.get_output_embeddings() is None:
        trained.append(score_head(model))
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def _blocks(model: Any) -> nn.ModuleList:
    """The one list in the trunk that is as long as the configuration's number of layers."""
    trunk, count = model.base_model, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1 or trunk is model:
        raise ConfigError(
            f"`model.trainable_blocks`: {type(model).__name__} has {len(found)} lists of {count} blocks in its trunk, "
            "expected one; unset it to train all weights, or use `model.adapter`"
        )
    return found[0]


def _run_after(trunk: Any, blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules with weights of their own that run after the last block: seen by running one token."""
    inside = {id(module) for module in blocks.modules()}
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    reached: list[bool] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, _: (after if reached else before).append(m))
        for module in trunk.modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda *_: reached.append(True)))
    try:
        with torch.no_grad():
            trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=trunk.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [module for module in after if not any(module is earlier for earlier in before)]
