"""The cache of a batch that is being sampled: room reserved for what is still to be written, and rows that leave it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["ReservedLayer", "first_row", "reserve", "take_rows"]


class ReservedLayer(DynamicLayer):
    """A cache layer that writes new tokens into room reserved for them.

    The library's own layer concatenates, which copies everything cached so far at every token: for small models that
    is most of the decoding time.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Start from what is cached already, (B, heads, tokens, width) each, and reserve `room` more tokens."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        buffers = []
        for states in (keys, values):
            batch, heads, length, width = states.shape
            buffer = states.new_empty(batch, heads, length + room, width)
            buffer[:, :, :length] = states
            buffers.append(buffer)
        self.hold(*buffers, rows=keys.shape[0], length=keys.shape[-2])

    def hold(self, keys: Tensor, values: Tensor, *, rows: int, length: int) -> None:
        """From here on the cache is what stands in the first `rows` of these buffers, `length` tokens of each."""
        self.buffers = keys, values
        self._rows = rows
        self.show(length)

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens, which are the cache from here on."""
        keys, values = (buffer[: self._rows, :, :length] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, start:end] = states
        return self.show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        keys, values = (buffer.index_select(0, beam_idx) for buffer in self.buffers)
        self.hold(keys, values, rows=len(beam_idx), length=self.get_seq_length())


def first_row(cache: DynamicCache) -> DynamicCache:
    """A cache of the first sequence alone, with room for one token, that leaves the given one as it is."""
    first: Any = copy.copy(cache)
    first.layers = [ReservedLayer(layer.keys[:1], layer.values[:1], 1) for layer in first.layers]
    return first


def reserve(cache: DynamicCache, room: int) -> None:
    """Reserve room in the layers that grow without bound; others (sliding windows, recurrent states) stay small."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = ReservedLayer(layer.keys, layer.values, room)


def take_rows(cache: DynamicCache, rows: Tensor) -> None:
    """The cache of these rows, in this order, repeated where a row is. Every kind of cache layer supports this call;
    selecting and repeating rows by their own methods does not exist for recurrent layers."""
    cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
