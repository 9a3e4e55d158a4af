"""One more token of every sequence through a Llama-like model, in as few calls as its arithmetic takes.

A decoding step of a small model is mostly overhead: modules, mask building, repeated keys, roots written out in five
operations. This is the same function of the same weights without it:

    x = embedding[token]
    x = x + o(attention(rope(q(n x)), cache + rope(k(n x)), cache + v(n x)))      n: root-mean-square norm
    x = x + down(silu(gate(n x)) * up(n x))                                        for each block
    logits = head(n x)

Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023, arXiv:2305.13245. Departures: the
queries that share a key are the rows of one attention problem, so keys are not repeated.
Legend: B sequences, S cached tokens with the new one, H hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from accord.phases import passing

__all__ = ["LlamaStep", "llama_step"]

# Models whose blocks are these equations and nothing else; a subclass may be something else.
_KINDS = (LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM)


class LlamaStep:
    """Reads a model's modules anew at every call, so it follows every update of the weights."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits (B, V) after `tokens`, which join the cache.

        Args:
            tokens: (B,) int64, the newest token of every sequence.
            mask: (B, S) bool, True = a token that is attended to.
            positions: (B, 1) int64 of the new tokens.
            cache: transformers' cache, whose layers hold S - 1 tokens.
        """
        self.tell(tokens, mask)
        return self.logits(tokens, mask, positions, cache)

    def tell(self, tokens: Tensor, mask: Tensor) -> None:
        """Say that these tokens are about to run."""
        passing(self._model, tokens[:, None], mask, cached=mask.shape[1] - 1, logits=True)

    def logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The arithmetic alone, for a compiler; of the cache it takes `update` and nothing else."""
        trunk = self._model.base_model
        x = trunk.embed_tokens(tokens)
        cos, sin = trunk.rotary_emb(x[:, None], position_ids=positions)  # (B, 1, D)
        half = sin.shape[-1] // 2
        # rope(x) = x cos + (-x2, x1) sin = x cos + (x2, x1) (-sin, sin): the sign is put into the sine once.
        rope = cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1), half
        seen = mask[:, None, None, :]
        for layer, block in enumerate(trunk.layers):
            x = x + self._attention(block.self_attn, _normed(x, block.input_layernorm), rope, seen, cache, layer)
            y, mlp = _normed(x, block.post_attention_layernorm), block.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)).mul_(mlp.up_proj(y)))
        return self._model.get_output_embeddings()(_normed(x, trunk.norm))

    @staticmethod
    def _attention(
        block: Any, x: Tensor, rope: tuple[Tensor, Tensor, int], seen: Tensor, cache: Any, layer: int
    ) -> Tensor:
        batch, size = x.shape[0], block.head_dim
        cos, sin, half = rope
        queries = block.q_proj(x).view(batch, -1, size)
        rotated = torch.cat((queries, block.k_proj(x).view(batch, -1, size)), dim=1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(half, dims=-1), sin)
        heads = queries.shape[1]
        values = block.v_proj(x).view(batch, -1, 1, size)
        keys, values = cache.update(rotated[:, heads:, None], values, layer)
        # Queries of one key are consecutive: (B, key heads, queries a key, D).
        grouped = rotated[:, :heads].reshape(batch, keys.shape[1], -1, size)
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=block.scaling)
        return block.o_proj(attended.reshape(batch, -1))


def llama_step(model: Any) -> LlamaStep | None:
    """The step for this model; None for one that is not made of these equations, or whose layers were exchanged."""
    if type(model) not in _KINDS or model.config.hidden_act != "silu":
        return None
    kinds = getattr(model.config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds) or getattr(model.config, "sliding_window", None) is not None:
        return None
    projections = [
        getattr(part, f"{name}_proj")
        for block in model.base_model.layers
        for part, names in ((block.self_attn, "qkvo"), (block.mlp, ("gate", "up", "down")))
        for name in names
    ]
    # An adapter or a quantised layer is another class; calling it is right, but was not compared.
    return LlamaStep(model) if all(type(projection) is nn.Linear for projection in projections) else None


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
