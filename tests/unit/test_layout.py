"""Rows, places and masks of both layouts, against rows written out by hand."""

from __future__ import annotations

import pytest
import torch

from accord.models.layout import collate, layout_cost
from accord.records import Origin, TokenCompletion, TokenGroup
from models_support import token_group

PAD = 99
A, B, C, D, E, F, G, X, Y = 2, 3, 4, 5, 6, 7, 8, 25, 26  # the tokens of these letters


def test_a_shared_row_holds_the_prompt_once_and_every_completion() -> None:
    batch = collate([token_group("ab", "cde", "fg"), token_group("x", "y")], layout="shared", pad_id=PAD)
    assert batch.input_ids.tolist() == [[A, B, C, D, E, F, G], [X, Y, PAD, PAD, PAD, PAD, PAD]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.row_index.tolist() == [0, 0, 1]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert batch.token_index.tolist() == [[2, 3, 4], [5, 6, 0], [1, 0, 0]]
    assert batch.predict_index.tolist() == [[1, 2, 3], [1, 5, 0], [0, 0, 0]]
    assert batch.last_index.tolist() == [4, 6, 1]
    assert batch.longest == 5


def test_a_shared_row_may_be_longer_than_the_model_has_positions() -> None:
    """Padding takes no position that no completion has: models that learn their positions have no others."""
    batch = collate([token_group("ab", "cde", "fg"), token_group("x", "y")], layout="shared", pad_id=PAD)
    assert batch.input_ids.shape[1] == 7
    assert batch.position_ids.max() == batch.longest - 1 == 4


def test_a_plain_row_holds_the_prompt_and_one_completion() -> None:
    batch = collate([token_group("ab", "cde", "fg"), token_group("x", "y")], layout="plain", pad_id=PAD)
    assert batch.input_ids.tolist() == [[A, B, C, D, E], [A, B, F, G, PAD], [X, Y, PAD, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 2 + [False] * 3]
    assert batch.row_index.tolist() == [0, 1, 2]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert batch.token_index.tolist() == [[2, 3, 4], [2, 3, 0], [1, 0, 0]]
    assert batch.predict_index.tolist() == [[1, 2, 3], [1, 2, 0], [0, 0, 0]]
    assert batch.last_index.tolist() == [4, 3, 1]
    assert batch.longest == 5


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_completion_tensors_do_not_depend_on_the_layout(layout: str) -> None:
    batch = collate([token_group("ab", "cDe", "f"), token_group("x", "y")], layout=layout, pad_id=PAD)
    assert batch.completion_ids.tolist() == [[C, D, E], [F, PAD, PAD], [Y, PAD, PAD]]
    assert batch.completion_mask.tolist() == [[True, False, True], [True, False, False], [True, False, False]]
    assert batch.valid_mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    there = batch.input_ids[batch.row_index[:, None], batch.token_index]
    assert torch.equal(there[batch.valid_mask], batch.completion_ids[batch.valid_mask])


def test_a_completion_sees_its_prompt_and_itself_only() -> None:
    batch = collate([token_group("ab", "cd", "ef", "g"), token_group("x", "y")], layout="shared", pad_id=PAD)
    owners = "ppcceeg"  # p: the prompt; c, e, g: the completions
    for query, asks in enumerate(owners):
        for key, holds in enumerate(owners):
            expected = key <= query and (holds == "p" or holds == asks)
            assert batch.attention_mask[0, 0, query, key].item() is expected, (query, key)
    assert batch.attention_mask.shape == (2, 1, 7, 7)
    assert not batch.attention_mask[1, 0, :2, 2:].any(), "a real token sees padding"
    assert batch.attention_mask.any(dim=-1).all(), "a query that sees nothing gives NaN"


def test_groups_of_one_completion_have_the_plain_layout_and_its_mask() -> None:
    groups = [token_group("ab", "cde"), token_group("x", "y")]
    shared, plain = (collate(groups, layout=layout, pad_id=PAD) for layout in ("shared", "plain"))
    for name in plain.__slots__:
        ours, theirs = getattr(shared, name), getattr(plain, name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name


def test_an_empty_completion_ends_at_its_prompt() -> None:
    batch = collate([token_group("ab", "cd", "")], layout="shared", pad_id=PAD)
    assert batch.last_index.tolist() == [3, 1]
    assert batch.valid_mask.tolist() == [[True, True], [False, False]]


def test_the_cost_counts_what_the_layout_repeats() -> None:
    group = token_group("abcd", "efg", "h")
    assert layout_cost(group, "shared") == 4 + 3 + 1
    assert layout_cost(group, "plain") == 4 + 3 + 4 + 1
    for layout in ("shared", "plain"):
        batch = collate([group], layout=layout, pad_id=PAD)
        assert (batch.input_ids != PAD).sum() == layout_cost(group, layout)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([], "no groups"),
        ([token_group("a", "b"), token_group("", "b")], "group 1 has an empty prompt"),
        ([token_group("a")], "group 0 has no completions"),
        ([TokenGroup((1,), (), origin=Origin("pairs.jsonl", 7))], "pairs.jsonl:7"),
        ([TokenGroup((1,), (TokenCompletion((1, 2), (True,)),))], "completion 0: 2 tokens but 1 mask entries"),
    ],
)
def test_groups_that_cannot_be_collated_are_named(groups: list[TokenGroup], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        collate(groups, layout="plain", pad_id=PAD)
