"""The short decoding step through `torch.compile`: one function for all blocks, which writes into the cache's buffers.

On a CPU rows and lengths are symbols: code is compiled for one sequence and for several, whatever the shapes, and
nothing is padded. On a GPU every shape is a constant, so that a CUDA graph can be replayed: rows are filled up to a
power of two and places to a multiple of 128 (*buckets*), and the buffers stay where they are from batch to batch. Rows
that fill up repeat the first one and are not read; places beyond the newest token are masked.

Weights are read anew at every call, as in the plain step, so nothing is compiled again after an update of them. Results
differ from the plain step's by rounding.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import DynamicCache

from accord.rollout.llama_step import LlamaStep

__all__ = ["CompiledStep", "compiled_step"]

_PLACES = 128  # a bucket's length is a multiple of it
_LIMIT = 64  # shapes compiled for one model, minutes of it; what is met beyond them runs plain


class CompiledStep:
    """Called as the plain step is, with a cache all of whose layers are reserved.

    Args:
        step: the plain step.
        buckets: constant shapes, for a GPU; symbols otherwise.
        backend: of `torch.compile`.
    """

    def __init__(self, step: LlamaStep, *, buckets: bool, backend: Any = "inductor") -> None:
        def one_token(tokens: Tensor, mask: Tensor, positions: Tensor, place: Tensor, buffers: Any) -> Tensor:
            return step.logits(tokens, mask, positions, _Written(buffers, place, mask.shape[1]))

        # Without graphs, calling the kernels from C++ is the shorter way.
        options = ({"triton.cudagraphs": True} if buckets else {"cpp_wrapper": True}) if backend == "inductor" else None
        self._compiled = torch.compile(  # pyright: ignore[reportCallIssue]  (the overloads lack two arguments)
            one_token, fullgraph=True, dynamic=False, backend=backend, options=options,
            recompile_limit=_LIMIT, isolate_recompiles=True,
        )  # fmt: skip
        self._plain = step
        self._full = False
        self._buckets = buckets
        self._held: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) after `tokens`, which join the cache; shapes as the plain step's."""
        if self._full:
            return self._plain(tokens, mask, positions, cache)
        self._plain.tell(tokens, mask)
        rows, length = mask.shape
        layers: list[Any] = cache.layers
        place = torch.arange(length - 1, length, device=mask.device)
        if self._buckets:
            self._settle(layers, rows)
            torch.compiler.cudagraph_mark_step_begin()
            tokens, mask, positions = _filled_up(tokens, mask, positions, layers[0].buffers[0])
        buffers = [layer.buffers for layer in layers]
        if not self._buckets:
            _mark(rows, (tokens, positions), mask, [buffer for pair in buffers for buffer in pair])
        try:
            logits = self._compiled(tokens, mask, positions, place, buffers)
        except FailOnRecompileLimitHit:
            return self._without(tokens[:rows], mask[:rows, :length], positions[:rows], cache)
        for layer in layers:
            layer.show(length)
        return logits[:rows]

    def _without(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """From here on the plain step, for nothing was run of this one."""
        warnings.warn(
            f"sampling met more than {_LIMIT} shapes, as many as are compiled: from here on the decoding step is not "
            "compiled; prompts of more similar length, or a lower `max_new_tokens`, make fewer",
            stacklevel=3,
        )
        self._full = True
        return self._plain.logits(tokens, mask, positions, cache)

    def release(self) -> None:
        """Let the buffers go that wait for the next batch."""
        self._held.clear()

    def _settle(self, layers: list[Any], rows: int) -> None:
        """Have the cache in the buffers of its bucket, which hold zeros where nothing was ever written."""
        keys = layers[0].buffers[0]
        bucket = 1 << (rows - 1).bit_length(), -(-keys.shape[2] // _PLACES) * _PLACES
        if bucket not in self._held:
            self._held[bucket] = [
                (_static(layer.buffers[0], bucket), _static(layer.buffers[1], bucket)) for layer in layers
            ]
        for layer, held in zip(layers, self._held[bucket], strict=True):
            if layer.buffers[0] is held[0]:
                continue
            for states, buffer in zip((layer.keys, layer.values), held, strict=True):
                buffer[:rows, :, : states.shape[2]] = states
            layer.hold(*held, rows=rows, length=layer.get_seq_length())


def compiled_step(model: Any, step: LlamaStep | None) -> CompiledStep | None:
    """The short step of this model, compiled for where the model is; a model without one is sampled from as it is, and
    that is said."""
    if step is None:
        warnings.warn(
            f"`model.compile_sampling` compiles the short decoding step of plain Llama, Qwen2 and Mistral models, and "
            f"this {type(model).__name__} has none: its own step is used, not compiled",
            stacklevel=3,
        )
        return None
    return CompiledStep(step, buckets=model.device.type == "cuda")


class _Written:
    """What the step asks of a cache: new keys and values are written at one place of the buffers, and read with what
    stands there up to `width`."""

    def __init__(self, buffers: Any, place: Tensor, width: int) -> None:
        self._buffers, self._place, self._width = buffers, place, width

    def update(self, keys: Tensor, values: Tensor, layer: int) -> list[Tensor]:
        shown = []
        for buffer, states in zip(self._buffers[layer], (keys, values), strict=True):
            buffer.index_copy_(2, self._place, states.to(buffer.dtype))
            shown.append(buffer[:, :, : self._width])
        return shown


def _static(like: Tensor, bucket: tuple[int, int]) -> Tensor:
    """A buffer (rows, heads, places, width) of this bucket, that graphs may take for staying where it is."""
    buffer = like.new_zeros(bucket[0], like.shape[1], bucket[1], like.shape[3])
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _filled_up(tokens: Tensor, mask: Tensor, positions: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step's arguments for all rows and places of a bucket: further rows are the first one again."""
    repeated = torch.arange(buffer.shape[0], device=mask.device)
    repeated = repeated.where(repeated < len(mask), 0)
    whole = torch.nn.functional.pad(mask, (0, buffer.shape[2] - mask.shape[1]))
    return tokens[repeated], whole[repeated], positions[repeated]


def _mark(rows: int, by_row: tuple[Tensor, ...], mask: Tensor, buffers: list[Tensor]) -> None:
    """Say which sizes are symbols: lengths, and rows where there are several. Code for one row is code of its own."""
    for tensor, places in [*((x, None) for x in by_row), (mask, 1), *((x, 2) for x in buffers)]:
        if rows > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
        if places is not None:
            torch._dynamo.mark_dynamic(tensor, places)
