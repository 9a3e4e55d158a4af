"""The last block of a Llama-like trunk, run only where its result is read.

Nothing looks at the last block's result but a head, and a head reads completions: the prompt's places are there for
the keys and values that earlier blocks and this one make of them. So of the last block

    k, v = k(n x), v(n x)                       at all L places of a row
    x = x + o(attention(q(n x), k, v))          at the Q places that are read      n: root-mean-square norm
    x = x + down(silu(gate(n x)) * up(n x))     at these as well

In a packed row, whose rows attend by themselves, attention itself runs at all places, with queries of 0 where none is
read; what comes before and after it at the read ones.

The values are those of the block itself up to rounding. Legend: R rows, L places, Q read places of the row that has
most, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel, MistralModel, Qwen2Model
from transformers.models.llama.modeling_llama import rotate_half

from accord.models.flex import BlockMask
from accord.models.shared_attention import attend, rows_of, runs_of

__all__ = ["most_read", "only_at"]

# Trunks whose blocks are these equations and nothing else; a subclass may be something else.
_KINDS = (LlamaModel, Qwen2Model, MistralModel)
# Above this share of a row's places, gathering costs what it saves.
_WORTH_IT = 0.75


def most_read(trunk: Any, read: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor | None:
    """(R, Q) places of each row to run the last block at, the read ones first, from `read` (R, L) bool; None where the
    block runs whole: another architecture, attention written out or in blocks, or hardly less to do, also because
    attention under this mask is split and computes fewer pairs than L for each read place."""
    if type(trunk) not in _KINDS or trunk.config._attn_implementation != "sdpa" or isinstance(mask, BlockMask):
        return None
    block = trunk.layers[-1]
    if "forward" in vars(block):
        return None
    count = max(1, int(read.sum(1).max()))  # products of nothing have no shape
    split = rows_of(mask)
    if count > _WORTH_IT * read.shape[1] or (split is not None and count * read.numel() > split.pairs):
        return None
    return read.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


@contextmanager
def only_at(trunk: Any, places: Tensor | None) -> Iterator[None]:
    """For a forward pass of the trunk: its last block runs at `places` (R, Q) of each row, and its result is 0, without
    gradient, at all others. None = it runs whole."""
    if places is None:
        yield
        return
    block = trunk.layers[-1]
    block.forward = partial(_run, block, places)
    try:
        yield
    finally:
        del block.forward


def _run(block: Any, places: Tensor, hidden: Tensor, **inputs: Any) -> Tensor:
    narrow = partial(_block_at, block, places, **inputs)
    if block.training and block.gradient_checkpointing:  # what transformers wraps around a block's own forward
        return block._gradient_checkpointing_func(narrow, hidden)
    return narrow(hidden)


def _block_at(
    block: Any,
    places: Tensor,
    hidden: Tensor,
    *,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    """The block's result (R, L, H) from what enters it, `hidden` (R, L, H), at `places` (R, Q)."""
    index = places[:, :, None].expand(-1, -1, hidden.shape[2])
    x = hidden.gather(1, index)
    x = x + _attention_at(block.self_attn, block.input_layernorm(hidden), places, attention_mask, position_embeddings)
    x = x + block.mlp(block.post_attention_layernorm(x))
    return torch.zeros_like(hidden, dtype=x.dtype).scatter(1, index, x)


def _attention_at(
    attention: Any, hidden: Tensor, places: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """(R, Q, H) the attention's result, from its normed input (R, L, H)."""
    rows, length, width = hidden.shape
    cos, sin = (numbers.expand(rows, -1, -1)[:, None] for numbers in rope)  # (R, 1, L, D)

    def heads(projected: Tensor) -> Tensor:
        return projected.view(rows, projected.shape[1], -1, attention.head_dim).transpose(1, 2)

    def at(numbers: Tensor) -> Tensor:
        return numbers.gather(2, places[:, None, :, None].expand(-1, 1, -1, numbers.shape[3]))

    keys, values = heads(attention.k_proj(hidden)), heads(attention.v_proj(hidden))
    keys = keys * cos + rotate_half(keys) * sin
    queries = heads(attention.q_proj(hidden.gather(1, places[:, :, None].expand(-1, -1, width))))
    queries = queries * at(cos) + rotate_half(queries) * at(sin)
    if runs_of(mask) is not None:
        index = places[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        everywhere = queries.new_zeros(rows, queries.shape[1], length, queries.shape[3]).scatter(2, index, queries)
        attended, _ = attend(attention, everywhere, keys, values, mask, scaling=attention.scaling)
        return attention.o_proj(
            attended.flatten(2).gather(1, places[:, :, None].expand(-1, -1, attended[0, 0].numel()))
        )
    if mask is None:
        mask = torch.arange(length, device=places.device) <= places[:, None, :, None]
    else:
        mask = at(mask.expand(rows, -1, -1, -1))
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=attention.scaling, enable_gqa=queries.shape[1] != keys.shape[1]
    )
    return attention.o_proj(attended.transpose(1, 2).reshape(rows, places.shape[1], -1))
