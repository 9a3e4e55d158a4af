"""Attention under a mask by FlexAttention: a mask is cut into blocks, and those that it hides whole are not computed.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i sees

A block is seen whole, in part, or not at all; inside a block that is seen in part each pair is looked up in the mask.
Any boolean mask will do, and nothing is known of what it stands for. The kernel is made by `torch.compile`, once for
each kind of pass: of one row or several, within one block or longer, with gradient or without.

Source: Dong et al. 2024, arXiv:2412.05496. Departures: none; it is torch's own.
Legend: R rows, A heads, Q queries, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

__all__ = ["BlockMask", "as_blocks", "computed_pairs", "flex", "seen_pairs"]

# Of them there are nine or so for each shape of heads; torch's own limit is eight, above which it would give up.
_KINDS_OF_PASSES = 128
# What some architectures hand to their attention beside queries, keys and values, and this does not know.
_UNKNOWN = ("position_bias", "s_aux", "softcap")


def as_blocks(mask: Tensor) -> BlockMask:
    """The blocks of a boolean mask (R, 1, Q, K), True = seen."""
    rows, _, queries, keys = mask.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row, 0, query, key]

    return create_block_mask(sees, rows, None, queries, keys, device=mask.device)


def seen_pairs(blocks: BlockMask) -> Tensor:
    """(R, 1, Q, K) bool, the mask that blocks were made of."""
    rows, heads, queries, keys = blocks.shape
    return create_mask(blocks.mask_mod, rows, heads, queries, keys, device=blocks.kv_indices.device)


def computed_pairs(blocks: BlockMask) -> int:
    """Pairs of a query and a key in the blocks that are computed, places beyond the mask's edge included."""
    count = int(blocks.kv_num_blocks.sum())
    if blocks.full_kv_num_blocks is not None:
        count += int(blocks.full_kv_num_blocks.sum())
    return count * blocks.BLOCK_SIZE[0] * blocks.BLOCK_SIZE[1]


def flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, *, scaling: float | None = None, **settings: Any
) -> Tensor:
    """(R, Q, A, D) from queries (R, A, Q, D), keys and values of as many heads or of fewer, each for several queries.

    Raises: ValueError for what an architecture adds to attention and this does not compute.
    """
    added = [name for name in _UNKNOWN if settings.get(name) is not None]
    if added or settings.get("dropout"):
        raise ValueError(f"FlexAttention under this mask knows no {', '.join(added) or 'dropout'}")
    kind = query.device.type
    # Rotated queries and keys leave autocast in float32, values do not.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    return _kernel()(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped).transpose(1, 2)


def _kernel() -> Callable[..., Any]:
    """What computes it: the compiled kernel; within a compiled trunk that trunk's compiler sees to it."""
    return flex_attention if torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    # The whole graph or an error: without its kernel all pairs would be computed and kept, and nobody told.
    kernel: Callable[..., Any] = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    def attend(*tensors: Tensor, **settings: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_KINDS_OF_PASSES):
            return kernel(*tensors, **settings)

    return attend
