"""Rows of tokens for the trunk, made from groups: one row per group (shared) or one row per completion (plain).

Rows of different lengths are padded, or, in the packed layouts, stand one behind another in a single row.

Shape letters: C completions (in group order), T tokens of the longest completion, R rows, L tokens of the longest row.
What a loss sees is always (C, T), whatever the layout; `row_index`, `predict_index` and `token_index` say where in the
rows a completion's tokens stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from accord.records import TokenCompletion, TokenGroup

__all__ = ["CompletionBatch", "Layout", "collate", "layout_cost", "packed", "packed_size", "packs", "shares"]

Layout = Literal["shared", "plain", "shared_packed", "plain_packed"]

ROW_TOKENS = 10  # what a row of a packed row costs besides its tokens, in tokens: attention runs for it alone
_PADDING = -1
_PROMPT = 0


@dataclass(frozen=True, slots=True)
class CompletionBatch:
    """Padded tokens of several groups, and where each completion stands in them. Masks: True = counts.

    input_ids        (R, L) int64   right-padded rows
    position_ids     (R, L) int64   every completion continues at its prompt's length, wherever it stands in the row
    attention_mask   (R, 1, L, L) bool [query, key] where prompts are shared: a completion sees its prompt and itself
                     only; (R, L) bool, True = a real token, where every row has one completion; where rows are packed,
                     the batches, each of rows of one length, whose rows stand one behind another in the only row
    row_index        (C,)   int64   the completion's row
    predict_index    (C, T) int64   place in the row whose hidden state predicts token t (for t = 0 the prompt's last);
                                    0 where there is no token t
    token_index      (C, T) int64   place in the row of token t itself; 0 where there is none
    last_index       (C,)   int64   place in the row of the completion's last token (the prompt's last if it is empty)
    completion_ids   (C, T) int64   the tokens; the padding id where there is none
    completion_mask  (C, T) bool    tokens that count in a loss
    valid_mask       (C, T) bool    tokens that exist
    group_index      (C,)   int64   the completion's group, counted from 0 in the order given
    longest          int            tokens of the longest prompt + completion: what an attention window must span
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | tuple[CompletionBatch, ...]
    row_index: Tensor
    predict_index: Tensor
    token_index: Tensor
    last_index: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    valid_mask: Tensor
    group_index: Tensor
    longest: int


def shares(layout: Layout) -> bool:
    """Whether a prompt runs once for all its completions."""
    return layout in {"shared", "shared_packed"}


def packs(layout: Layout) -> bool:
    """Whether rows may stand one behind another."""
    return layout in {"shared_packed", "plain_packed"}


def layout_cost(group: TokenGroup, layout: Layout) -> int:
    """Tokens the trunk runs for `group`, what the layout repeats included; padding depends on the batch and is not."""
    if shares(layout):
        return group.num_tokens
    return sum(len(group.prompt_ids) + len(c.ids) for c in group.completions)


def packed_size(group: TokenGroup, layout: Layout) -> int:
    """What `group` costs in a packed row, in tokens."""
    return layout_cost(group, layout) + ROW_TOKENS * (1 if shares(layout) else len(group.completions))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one completion goes: tokens `start` onward of row `row`, as that row's `order`-th completion from 1."""

    row: int
    order: int
    start: int
    group: int
    prompt_ids: tuple[int, ...]
    completion: TokenCompletion

    @property
    def end(self) -> int:
        return self.start + len(self.completion.ids)


def collate(
    groups: Sequence[TokenGroup], *, layout: Layout, pad_id: int, device: torch.device | str | None = None
) -> CompletionBatch:
    """One batch holding every completion of `groups`, in order.

    shared  a row is `prompt + completion 1 + ... + completion n`: the prompt runs once. When no group has more than
            one completion the rows, and then the mask, are those of the plain layout, which attention runs fastest.
    plain   a row is `prompt + completion`: the prompt runs n times, under the ordinary causal mask.
    shared_packed, plain_packed   the same rows, one behind another in one where that costs less than their padding.

    Raises ValueError for no groups, a group without completions, an empty prompt (nothing predicts the first token),
    or a completion whose mask and tokens differ in number.
    """
    _check(groups)
    if packs(layout) and sum(packed_size(group, layout) for group in groups) < _padded_size(groups, layout):
        return packed(groups, layout=layout, pad_id=pad_id, device=device)
    places = _places(groups, layout)
    rows, completions = _row_arrays(places, pad_id), _completion_arrays(places, pad_id)
    segment = torch.from_numpy(rows.pop("segment")).to(device)
    one_each = all(place.order == 1 for place in places)
    return CompletionBatch(
        **{name: torch.from_numpy(array).to(device) for name, array in (rows | completions).items()},
        attention_mask=segment != _PADDING if one_each else _shared_mask(segment),
        longest=max(len(place.prompt_ids) + len(place.completion.ids) for place in places),
    )


def packed(
    groups: Sequence[TokenGroup], *, layout: Layout, pad_id: int, device: torch.device | str | None = None
) -> CompletionBatch:
    """`collate` with all rows one behind another in one, whatever that costs; raises what that raises."""
    _check(groups)
    rows = groups if shares(layout) else [replace(g, completions=(c,)) for g in groups for c in g.completions]
    runs = tuple(
        collate(tuple(run), layout="shared", pad_id=pad_id, device=device)
        for _, run in groupby(rows, key=lambda group: group.num_tokens)
    )
    width = max(run.completion_ids.shape[1] for run in runs)
    begins = _begins(runs)

    def joined(name: str, fill: int = 0) -> Tensor:
        parts = [getattr(run, name) for run in runs]
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    valid, counts = joined("valid_mask"), torch.tensor([len(group.completions) for group in groups])
    return CompletionBatch(
        input_ids=torch.cat([run.input_ids.flatten() for run in runs])[None],
        position_ids=torch.cat([run.position_ids.flatten() for run in runs])[None],
        attention_mask=runs,
        row_index=torch.zeros_like(begins),
        predict_index=(joined("predict_index") + begins[:, None]).where(valid, 0),
        token_index=(joined("token_index") + begins[:, None]).where(valid, 0),
        last_index=torch.cat([run.last_index for run in runs]) + begins,
        completion_ids=joined("completion_ids", pad_id),
        completion_mask=joined("completion_mask"),
        valid_mask=valid,
        group_index=torch.arange(len(groups)).repeat_interleave(counts).to(begins.device),
        longest=max(run.longest for run in runs),
    )


def _begins(runs: Sequence[CompletionBatch]) -> Tensor:
    """(C,) place in the packed row where the row of each completion begins."""
    begins, first = [], 0
    for run in runs:
        begins.append(first + run.row_index * run.input_ids.shape[1])
        first += run.input_ids.numel()
    return torch.cat(begins)


def _padded_size(groups: Sequence[TokenGroup], layout: Layout) -> int:
    if shares(layout):
        return len(groups) * max(group.num_tokens for group in groups)
    longest = max(len(group.prompt_ids) + len(c.ids) for group in groups for c in group.completions)
    return longest * sum(len(group.completions) for group in groups)


def _places(groups: Sequence[TokenGroup], layout: Layout) -> list[_Place]:
    places: list[_Place] = []
    row = -1
    for g, group in enumerate(groups):
        for k, completion in enumerate(group.completions):
            if k == 0 or not shares(layout):
                row += 1
                order, start = 1, len(group.prompt_ids)
            else:
                order, start = k + 1, places[-1].end
            places.append(_Place(row, order, start, g, group.prompt_ids, completion))
    return places


def _row_arrays(places: list[_Place], pad_id: int) -> dict[str, np.ndarray]:
    shape = places[-1].row + 1, max(place.end for place in places)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    # Padding counts on, for a position that restarts would look like the start of a packed sequence, but no further
    # than any completion goes: a shared row may be longer than the model has positions.
    last = max(len(place.prompt_ids) + len(place.completion.ids) for place in places) - 1
    position_ids = np.tile(np.minimum(np.arange(shape[1]), last), (shape[0], 1))
    segment = np.full(shape, _PADDING, dtype=np.int64)
    for place in places:
        prompt = len(place.prompt_ids)
        row, tokens = place.row, slice(place.start, place.end)
        input_ids[row, :prompt], segment[row, :prompt] = place.prompt_ids, _PROMPT
        input_ids[row, tokens], segment[row, tokens] = place.completion.ids, place.order
        position_ids[row, tokens] = np.arange(prompt, prompt + place.end - place.start)
    return {"input_ids": input_ids, "position_ids": position_ids, "segment": segment}


def _completion_arrays(places: list[_Place], pad_id: int) -> dict[str, np.ndarray]:
    shape = len(places), max(len(place.completion.ids) for place in places)
    predict_index, token_index = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    completion_ids = np.full(shape, pad_id, dtype=np.int64)
    completion_mask, valid_mask = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    last_index = np.zeros(len(places), dtype=np.int64)
    for c, place in enumerate(places):
        tokens = slice(0, len(place.completion.ids))
        token_index[c, tokens] = np.arange(place.start, place.end)
        predict_index[c, tokens] = np.arange(place.start - 1, place.end - 1)
        # The first token follows the prompt, not the completion before it in the row.
        predict_index[c, tokens][:1] = len(place.prompt_ids) - 1
        last_index[c] = place.end - 1 if place.completion.ids else len(place.prompt_ids) - 1
        completion_ids[c, tokens] = place.completion.ids
        completion_mask[c, tokens] = place.completion.mask
        valid_mask[c, tokens] = True
    return {
        "row_index": np.array([place.row for place in places]),
        "predict_index": predict_index,
        "token_index": token_index,
        "last_index": last_index,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "valid_mask": valid_mask,
        "group_index": np.array([place.group for place in places]),
    }


def _shared_mask(segment: Tensor) -> Tensor:
    """(R, 1, L, L) bool [query, key]: a query sees earlier keys of the prompt and of its own segment.

    Padding sees itself too: a query that sees nothing would make softmax return NaN.
    """
    places = torch.arange(segment.shape[1], device=segment.device)
    earlier = places[:, None] >= places[None, :]
    same = segment[:, :, None] == segment[:, None, :]
    prompt = segment[:, None, :] == _PROMPT
    return ((same | prompt) & earlier)[:, None]


def _check(groups: Sequence[TokenGroup]) -> None:
    if not groups:
        raise ValueError("no groups to collate: a batch needs at least one group")
    for index, group in enumerate(groups):
        where = f"group {index}" + (f" ({group.origin})" if group.origin else "")
        if not group.prompt_ids:
            raise ValueError(
                f"{where} has an empty prompt: nothing predicts the completion's first token; "
                "give the prompt one token (the beginning-of-text token, or the first token of the text)"
            )
        if not group.completions:
            raise ValueError(f"{where} has no completions: leave groups without completions out of training batches")
        for k, completion in enumerate(group.completions):
            if len(completion.ids) != len(completion.mask):
                raise ValueError(
                    f"{where}, completion {k}: {len(completion.ids)} tokens but {len(completion.mask)} mask entries; "
                    "expected one mask entry per token"
                )
