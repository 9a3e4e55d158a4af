"""How groups are ordered, batched, laid out and chunked changes no log-probability and no gradient.

GPT-2 in float64, whose layers compute in float64 throughout, so that what differs can only be rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from accord.models.layout import Layout, collate
from accord.models.token_scores import score_tokens
from accord.records import TokenCompletion, TokenGroup
from models_support import PAD_ID, VOCABULARY, tiny_model

EXACT = 1e-11

tokens = st.integers(min_value=1, max_value=VOCABULARY - 1)
completions = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=6).map(
    lambda pairs: TokenCompletion(tuple(token for token, _ in pairs), tuple(counts for _, counts in pairs))
)
token_groups = st.builds(
    TokenGroup,
    prompt_ids=st.lists(tokens, min_size=1, max_size=7).map(tuple),
    completions=st.lists(completions, min_size=1, max_size=3).map(tuple),
)
batches = st.lists(token_groups, min_size=1, max_size=4)
layouts: st.SearchStrategy[Layout] = st.sampled_from(["shared", "plain"])
quickly = settings(max_examples=50, derandomize=True, deadline=None)


@functools.cache
def model() -> Any:
    return tiny_model("gpt2", dtype=torch.float64)


def scores_and_gradient(
    groups: list[TokenGroup], layout: Layout, *, chunk_rows: int | None = None
) -> tuple[list[list[float]], Tensor]:
    """Every completion's log-probabilities, and the gradient of a sum over the tokens in the loss, in which every token
    has another weight, so that mixed-up tokens change it."""
    batch = collate(groups, layout=layout, pad_id=PAD_ID)
    scores = score_tokens(model(), batch, with_entropy=True, mask="loss", chunk_rows=chunk_rows)
    model().zero_grad()
    assert scores.entropies is not None
    weights = 1 + batch.completion_ids / 10
    (weights * (scores.logprobs + 0.3 * scores.entropies)).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model().parameters()])
    rows = [row[there].tolist() for row, there in zip(scores.logprobs.detach(), batch.valid_mask, strict=True)]
    return rows, gradient


def assert_same(ours: tuple[list[list[float]], Tensor], theirs: tuple[list[list[float]], Tensor]) -> None:
    for row, other in zip(ours[0], theirs[0], strict=True):
        assert row == pytest.approx(other, rel=EXACT, abs=EXACT)
    torch.testing.assert_close(ours[1], theirs[1], rtol=EXACT, atol=EXACT * 100)


@given(groups=batches)
@quickly
def test_both_layouts_agree(groups: list[TokenGroup]) -> None:
    assert_same(scores_and_gradient(groups, "shared"), scores_and_gradient(groups, "plain"))


@given(groups=batches, layout=layouts, chunk_rows=st.integers(min_value=1, max_value=9))
@quickly
def test_the_chunk_size_changes_nothing(groups: list[TokenGroup], layout: Layout, chunk_rows: int) -> None:
    assert_same(scores_and_gradient(groups, layout, chunk_rows=chunk_rows), scores_and_gradient(groups, layout))


@given(groups=batches, layout=layouts, randomness=st.randoms(use_true_random=False))
@quickly
def test_the_order_of_groups_changes_nothing(groups: list[TokenGroup], layout: Layout, randomness: Any) -> None:
    order = list(range(len(groups)))
    randomness.shuffle(order)
    rows, gradient = scores_and_gradient([groups[i] for i in order], layout)
    starts = {g: sum(len(groups[i].completions) for i in order[: order.index(g)]) for g in order}
    back = [rows[starts[g] + k] for g in range(len(groups)) for k in range(len(groups[g].completions))]
    assert_same((back, gradient), scores_and_gradient(groups, layout))


@given(groups=batches, layout=layouts)
@quickly
def test_batching_groups_together_pads_them_and_changes_nothing(groups: list[TokenGroup], layout: Layout) -> None:
    alone = [scores_and_gradient([group], layout) for group in groups]
    apart = [row for rows, _ in alone for row in rows], torch.stack([gradient for _, gradient in alone]).sum(dim=0)
    assert_same(scores_and_gradient(groups, layout), apart)


@given(groups=batches, layout=layouts, others=st.lists(tokens, min_size=60, max_size=60))
@quickly
def test_tokens_after_the_last_one_in_the_loss_could_be_any_others(
    groups: list[TokenGroup], layout: Layout, others: list[int]
) -> None:
    replaced = [_with_other_tails(group, others) for group in groups]
    assert_same(scores_and_gradient(replaced, layout), scores_and_gradient(groups, layout))


def _with_other_tails(group: TokenGroup, others: list[int]) -> TokenGroup:
    changed = []
    for completion in group.completions:
        last = max((t for t, counts in enumerate(completion.mask) if counts), default=-1)
        tail = others[last + 1 : len(completion.ids)]
        changed.append(TokenCompletion(completion.ids[: last + 1] + tuple(tail), completion.mask))
    return TokenGroup(group.prompt_ids, tuple(changed))
