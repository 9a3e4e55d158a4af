"""Rows of different lengths one behind another, against rows written out by hand and the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared_attention import SPLIT, gradients, own_logprobs

from accord.methods.offline import group_passes
from accord.methods.ppo_stage import _readable_by
from accord.methods.rollouts import RolloutModels
from accord.models import last_block, shared_attention
from accord.models.compiled import compile_trunk
from accord.models.layout import CompletionBatch, collate, layout_cost, packed, packed_size
from accord.models.load import reward_model_from
from accord.models.recompute import recompute_activations
from accord.models.self_check import check_layouts, reads_alike
from accord.models.shared_attention import runs_of, splitting, written_out
from accord.models.token_scores import score_completions, score_tokens, score_values
from models_support import PAD_ID, first_counts, groups_of, reached_tokens, tiny_model, token_group

PAD = 99
A, B, C, D, E, F, G, X, Y = 2, 3, 4, 5, 6, 7, 8, 25, 26  # the tokens of these letters
# Rows of 19, 8, 7, 7 and 4 tokens where prompts are shared; two of a length follow one another.
GROUPS = groups_of((3, (4, 2, 5, 0, 5)), (1, (1, 6)), (5, (2,)), (4, (3,)), (4, (0,)))


def runs(batch: CompletionBatch) -> list[tuple[int, ...]]:
    assert isinstance(batch.attention_mask, tuple)
    return [tuple(run.input_ids.shape) for run in batch.attention_mask]


def test_shared_rows_stand_one_behind_another() -> None:
    groups = [token_group("ab", "cde", "fg"), token_group("x", "y"), token_group("a", "")]
    batch = packed(groups, layout="shared_packed", pad_id=PAD)
    assert batch.input_ids.tolist() == [[A, B, C, D, E, F, G, X, Y, A]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0]]
    assert batch.row_index.tolist() == [0, 0, 0, 0]
    assert batch.group_index.tolist() == [0, 0, 1, 2]
    assert batch.token_index.tolist() == [[2, 3, 4], [5, 6, 0], [8, 0, 0], [0, 0, 0]]
    assert batch.predict_index.tolist() == [[1, 2, 3], [1, 5, 0], [7, 0, 0], [0, 0, 0]]
    assert batch.last_index.tolist() == [4, 6, 8, 9]
    assert batch.completion_ids.tolist() == [[C, D, E], [F, G, PAD], [Y, PAD, PAD], [PAD, PAD, PAD]]
    assert batch.valid_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]
    assert batch.longest == 5
    assert runs(batch) == [(1, 7), (1, 2), (1, 1)]


def test_plain_rows_of_one_length_are_one_run() -> None:
    groups = [token_group("ab", "cDe", "fgx"), token_group("x", "y")]
    batch = packed(groups, layout="plain_packed", pad_id=PAD)
    assert batch.input_ids.tolist() == [[A, B, C, D, E, A, B, F, G, X, X, Y]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert batch.completion_mask.tolist() == [[True, False, True], [True] * 3, [True, False, False]]
    assert batch.predict_index.tolist() == [[1, 2, 3], [6, 7, 8], [10, 0, 0]]
    assert runs(batch) == [(2, 5), (1, 2)]


def test_a_token_sees_its_own_row_as_it_would_alone() -> None:
    """p, q: prompts; c, d, e: their completions. The mask written out, of which each run holds its own part."""
    batch = packed([token_group("ab", "cd", "e"), token_group("x", "y")], layout="shared_packed", pad_id=PAD)
    owners, sees = "ppccdqe", {"p": "p", "c": "pc", "d": "pd", "q": "q", "e": "qe"}
    mask = written_out(batch)
    assert mask.shape == (1, 1, 7, 7)
    for query, asks in enumerate(owners):
        for key, holds in enumerate(owners):
            assert mask[0, 0, query, key].item() is (key <= query and holds in sees[asks]), (query, key)
    stands_for = splitting(batch)
    assert not stands_for.any(), "whoever takes it for a mask must not get anything right"
    found = runs_of(stands_for)
    assert found is not None and [(run.rows, run.length, run.mask is None) for run in found] == [
        (1, 5, False), (1, 2, True),
    ]  # fmt: skip


@pytest.mark.parametrize("sort", ["shared", "plain"])
def test_rows_are_packed_where_that_costs_less_than_padding(sort: Any) -> None:
    """A row costs ten tokens besides its own: rows of 20 and 30 tokens are 70 packed and 60 padded, of 20 and 60 they
    are 100 and 120. Rows of one length are never packed."""
    for lengths, packs in (((20, 30), False), ((20, 60), True), ((40, 40), False)):
        groups = groups_of(*((length - 5, (5,)) for length in lengths))
        batch = collate(groups, layout=f"{sort}_packed", pad_id=PAD_ID)
        assert isinstance(batch.attention_mask, tuple) is packs, lengths
        assert isinstance(collate(groups, layout=sort, pad_id=PAD_ID).attention_mask, torch.Tensor)
    pair = groups_of((20, (5, 7)))[0]
    assert packed_size(pair, "shared_packed") == layout_cost(pair, "shared") + 10 == 42
    assert packed_size(pair, "plain_packed") == layout_cost(pair, "plain") + 20 == 72


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 30), min_size=1, max_size=3)), min_size=1),
    st.sampled_from(["shared", "plain"]),
    st.integers(64, 400),
)
def test_no_pass_exceeds_its_budget_and_none_costs_more_than_padded(
    lengths: list[tuple[int, list[int]]], sort: Any, budget: int
) -> None:
    groups = groups_of(*((prompt, tuple(answers)) for prompt, answers in lengths))
    cost = {}
    for kind in (sort, f"{sort}_packed"):
        passes = list(group_passes(groups, lambda group: group, kind, budget))
        assert sorted(id(group) for part in passes for group in part) == sorted(map(id, groups))
        sizes = [collate(part, layout=kind, pad_id=PAD_ID).input_ids.numel() for part in passes]
        assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, passes, strict=True))
        cost[kind] = sum(sizes) + 128 * len(passes)
    assert cost[f"{sort}_packed"] <= cost[sort]


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.parametrize("sort", ["shared_packed", "plain_packed"])
def test_values_and_gradients_are_those_of_the_models_own_rows(kind: str, sort: Any) -> None:
    """In float64; norms and rotations of some architectures compute in float32 all the same."""
    model, batch = tiny_model(kind, dtype=torch.float64), packed(GROUPS, layout=sort, pad_id=PAD_ID)
    ours, theirs = score_tokens(model, batch).logprobs, own_logprobs(model, GROUPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    found, expected = gradients(model, ours), gradients(model, theirs)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=5e-5, msg=name)


def compiled(model: Any) -> Any:
    compile_trunk(model, backend="eager")
    return model


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("change", [compiled, eager])
def test_who_takes_no_plan_of_ours_takes_the_mask_written_out(change: Callable[[Any], Any]) -> None:
    plain = tiny_model("gpt2", dtype=torch.float64, num_hidden_layers=1)
    model = change(copy.deepcopy(plain))
    batch = packed(GROUPS, layout="shared_packed", pad_id=PAD_ID)
    ours, theirs = score_tokens(model, batch).logprobs, score_tokens(plain, batch).logprobs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from(["shared", "plain"]),
    st.booleans(),
)
def test_any_rows_are_those_of_padded_ones(lengths: list[tuple[int, list[int]]], sort: Any, split: bool) -> None:
    """Of gpt2, whose norms are float64 here, so that what is left is the order of sums."""
    model, groups = tiny_model("gpt2", dtype=torch.float64), groups_of(*((p, tuple(n)) for p, n in lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_attention, "_WORTH_IT", 100.0 if split else -1.0)
        said = [
            score_tokens(model, batch).logprobs
            for batch in (
                packed(groups, layout=f"{sort}_packed", pad_id=PAD_ID), collate(groups, layout=sort, pad_id=PAD_ID)
            )
        ]  # fmt: skip
        found, expected = (gradients(model, values) for values in said)
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11, msg=name)


def test_no_gradient_comes_from_another_row_or_completion() -> None:
    """Only the first completion of the first group counts: tokens of all others get exactly none."""
    only, used = first_counts(GROUPS[0])
    model = tiny_model("gpt2", tie_word_embeddings=False)
    batch = packed([*GROUPS[1:], only], layout="shared_packed", pad_id=PAD_ID)
    score_tokens(model, batch).logprobs[-len(only.completions)].sum().backward()
    assert reached_tokens(model) == used


def test_blocks_that_run_again_attend_by_rows_again() -> None:
    model, batch = tiny_model("llama"), packed(GROUPS, layout="shared_packed", pad_id=PAD_ID)
    twin = copy.deepcopy(model)
    recompute_activations(twin)
    kept, again = (gradients(m, score_tokens(m, batch).logprobs) for m in (model, twin))
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("read", [score_tokens, score_values, score_completions])
def test_the_last_block_runs_where_it_is_read(kind: str, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow and whole, in float64; the library's norms compute in float32 whatever the model does."""
    model = tiny_model(kind, dtype=torch.float64)
    if read is not score_tokens:
        model = reward_model_from(model, seed=0)
    batch = packed(groups_of((12, (2, 3, 0)), (7, (1,)), (9, (4, 2))), layout="shared_packed", pad_id=PAD_ID)
    seen: list[int] = []
    model.base_model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    results = []
    for worth_it in (last_block._WORTH_IT, -1.0):
        monkeypatch.setattr(last_block, "_WORTH_IT", worth_it)
        said = read(model, batch)
        said = said.logprobs if read is score_tokens else said
        results.append((said, gradients(model, said)))
    (ours, found), (theirs, expected) = results
    assert seen[0] < seen[1] == batch.input_ids.numel()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5, msg=name)


def test_a_model_that_packs_wrongly_is_given_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert check_layouts(model, GROUPS, PAD_ID).packs
    by_runs = shared_attention._by_runs
    monkeypatch.setattr(shared_attention, "_by_runs", lambda *given: by_runs(*given).flip(1))
    check = check_layouts(model, GROUPS, PAD_ID)
    assert not check.packs and check.layout == "shared"

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(shared_attention, "_by_runs", fails)
    assert not check_layouts(model, GROUPS, PAD_ID).packs


def test_a_value_model_that_reads_otherwise_than_the_policy_is_given_plain_rows() -> None:
    said: list[str] = []
    context: Any = SimpleNamespace(say=said.append)
    policy = tiny_model("mistral", sliding_window=None)
    cast: Any = SimpleNamespace(
        policy=SimpleNamespace(model=policy), models=RolloutModels(policy, policy, *(None,) * 4, "plain_packed")
    )
    alike = reward_model_from(policy, seed=0)
    assert _readable_by(context, alike, cast) is cast.models and not said
    for kind, changes in (("mistral", {"sliding_window": 8}), ("llama", {})):
        other = reward_model_from(tiny_model(kind, **changes), seed=0)
        assert _readable_by(context, other, cast) == replace(cast.models, layout="plain")
        assert f"the value model, a {type(other).__name__}, reads them otherwise" in said.pop()
    assert not reads_alike(policy, eager(copy.deepcopy(alike)))
    cast.models = replace(cast.models, layout="plain")
    assert _readable_by(context, other, cast) is cast.models and not said
