"""Attention in rows that share a prompt, or that stand one behind another, without most of the pairs that a mask over
all of them hides.

A row of the shared layout is `prompt + completion 1 + ... + completion n`. Under its mask a kernel computes all L x L
pairs of a row, though a completion sees the prompt and itself alone. Here the same attention is computed in two parts:

    prompts       P x P, causal, once a row
    completions   T x (P + T) each: queries of one completion, keys of its prompt and its own

so that cost grows with the number of completions, not with its square. Values are those of the masked kernel up to
rounding. The prompt's keys and values are copied for every completion, T + P places each.

Rows that are packed into one (`layout.packed`) attend by themselves, those of one length together.

Every model whose attention transformers looks up by the name "sdpa" takes part. Our function stands under that name and
is the library's own, but for masks that it was told of by `splitting`, those that stand for packed rows, and those in
blocks, which are `flex`'s.

Legend: R rows, L places of a row, C completions, T tokens of the longest, P tokens of the longest prompt, A heads, D
head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from accord.models.flex import BlockMask, flex
from accord.models.layout import CompletionBatch

__all__ = ["PackedRows", "SharedRows", "attend", "rows_of", "runs_of", "split", "splitting", "written_out"]


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Where rows of L places are cut; places are counted through all rows.

    prompt   int                 P
    queries  (C, T) int64        places of a completion's tokens; any where it has none
    keys     (C, P + T) int64    places of its prompt and of its tokens; any where there are none
    seen     (C, 1, T, P + T) bool   what each query sees of these keys
    source   (R, L) int64        the result of each place among those of R * P prompt places and C * T queries
    """

    prompt: int
    queries: Tensor
    keys: Tensor
    seen: Tensor
    source: Tensor

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed; kernels do not leave out half of a short prompt's."""
        return self.source.shape[0] * self.prompt**2 + self.seen.numel()


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of one length in a packed row, behind those of the run before: how many, how long, and their mask (rows, 1,
    length, length); None = causal."""

    rows: int
    length: int
    mask: Tensor | None


# Of the pairs under a mask, above which copies cost what the split saves.
_WORTH_IT = 0.5
# By mask, which every block hands on to its attention: a plan needs no way of its own through the model, and a block
# that runs again in the backward pass finds the same one.
_ROWS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_RUNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def splitting(batch: CompletionBatch) -> Tensor:
    """The batch's mask (R, 1, L, L), attention under which is split from here on where that pays; of packed rows, what
    stands for it."""
    mask = batch.attention_mask
    if isinstance(mask, tuple):
        return _packing(mask)
    if mask not in _ROWS:
        rows = _rows(batch) if batch.valid_mask.any() else None
        _ROWS[mask] = rows if rows is not None and rows.pairs <= _WORTH_IT * mask.numel() else None
    return mask


def written_out(batch: CompletionBatch) -> Tensor:
    """The batch's mask (R, 1, L, L); of packed rows too, where it has as many blocks as there are rows."""
    if isinstance(batch.attention_mask, Tensor):
        return batch.attention_mask
    blocks = []
    for run in batch.attention_mask:
        rows, length = run.input_ids.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=run.input_ids.device).tril()
        shared = _shared_mask(run)
        blocks += [causal] * rows if shared is None else [row[0] for row in shared]
    return torch.block_diag(*blocks)[None, None]


def split(batch: CompletionBatch) -> None:
    """Attention under the batch's mask is split from here on, whether that pays or not; some token must exist."""
    assert isinstance(batch.attention_mask, Tensor)
    _ROWS[batch.attention_mask] = _rows(batch)


def runs_of(mask: Any) -> tuple[PackedRows, ...] | None:
    """The runs of the packed row that this mask stands for; None = it is another's, or code that is being compiled."""
    return _plan(_RUNS, mask)


def rows_of(mask: Any) -> SharedRows | None:
    """How attention under this mask is split; None = it is not. Compiled code computes it whole."""
    return _plan(_ROWS, mask)


def _plan(plans: WeakTensorKeyDictionary, mask: Any) -> Any:
    if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
        return None
    return plans.get(mask)


def _rows(batch: CompletionBatch) -> SharedRows:
    (count, width), (rows, length) = batch.completion_ids.shape, batch.input_ids.shape
    device = batch.input_ids.device
    first = batch.row_index[:, None] * length
    # In front of its first token a completion has its prompt; an empty one ends in it.
    begun = torch.where(batch.valid_mask[:, :1], batch.predict_index[:, :1], batch.last_index[:, None])
    prompts = begun + 1
    prompt = int(prompts.max())
    steps = torch.arange(prompt, device=device)
    queries = first + batch.token_index
    seen = torch.cat(
        (
            (steps < prompts)[:, None].expand(-1, width, -1),
            torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(count, -1, -1),
        ),
        dim=2,
    )
    source = torch.zeros(rows, length, dtype=torch.int64, device=device)
    source[:, :prompt] = torch.arange(rows * prompt, device=device).view(rows, prompt)
    numbers = rows * prompt + torch.arange(count * width, device=device).view(count, width)
    source.view(-1)[queries[batch.valid_mask]] = numbers[batch.valid_mask]
    return SharedRows(
        prompt=prompt,
        queries=queries,
        keys=torch.cat((first + steps, queries), dim=1),
        seen=seen[:, None],
        source=source,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """(R, L, A, D) from queries (R, A, L, D), keys and values; what transformers calls for "sdpa"."""
    if isinstance(attention_mask, BlockMask):
        return flex(query, key, value, attention_mask, **settings), None
    runs = runs_of(attention_mask)
    if runs is not None:
        return _by_runs(module, query, key, value, runs, settings), None
    rows = rows_of(attention_mask)
    if rows is None or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    settings.pop("is_causal", None)
    begin = slice(rows.prompt)
    prompts, _ = sdpa_attention_forward(
        module, query[:, :, begin], key[:, :, begin], value[:, :, begin], None, is_causal=True, **settings
    )
    completions, _ = sdpa_attention_forward(
        module, _at(query, rows.queries), _at(key, rows.keys), _at(value, rows.keys), rows.seen, **settings
    )
    results = torch.cat((prompts.flatten(0, 1), completions.flatten(0, 1)))
    return results.index_select(0, rows.source.flatten()).unflatten(0, rows.source.shape), None


def _packing(runs: tuple[CompletionBatch, ...]) -> Tensor:
    """What stands for the mask of a packed row: whoever takes it for one sees nothing, and is found out."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=runs[0].input_ids.device)
    plans = []
    for run in runs:
        rows, length = run.input_ids.shape
        plans.append(PackedRows(rows, length, None if _shared_mask(run) is None else splitting(run)))
    _RUNS[mask] = tuple(plans)
    return mask


def _by_runs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, runs: tuple[PackedRows, ...], settings: dict[str, Any]
) -> Tensor:
    """(1, L, A, D) of a packed row, from queries (1, A, L, D), keys and values."""
    settings.pop("is_causal", None)
    sizes = [run.rows * run.length for run in runs]
    # Cut once: the backward pass of a slice fills as much as there is to slice from.
    cut = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    results = []
    for run, states in zip(runs, cut, strict=True):
        q, k, v = (x.unflatten(1, (run.rows, run.length)).transpose(0, 1) for x in states)
        causal = {"is_causal": True} if run.mask is None else {}
        result, _ = attend(module, q, k, v, run.mask, **causal, **settings)
        results.append(result.flatten(0, 1))
    return torch.cat(results)[None]


def _shared_mask(batch: CompletionBatch) -> Tensor | None:
    """The mask of unpacked rows where some have more than one completion; None = causal is all it is."""
    mask = batch.attention_mask
    return mask if isinstance(mask, Tensor) and mask.dim() == 4 else None


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(C, A, N, D) of (R, A, L, D) at places (C, N) counted through all rows."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
