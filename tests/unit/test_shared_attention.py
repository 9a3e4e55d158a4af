"""Attention split by completions, against attention under the whole mask and against the model's own rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.models import shared_attention
from accord.models.layout import collate
from accord.models.recompute import recompute_activations
from accord.models.self_check import check_layouts
from accord.models.shared_attention import rows_of, splitting
from accord.models.token_scores import score_tokens
from accord.records import TokenGroup
from models_support import ARCHITECTURES, PAD_ID, first_counts, groups_of, reached_tokens, tiny_model

# gemma2 caps its attention scores, gptj writes its attention out: neither runs through "sdpa".
SPLIT = sorted(set(ARCHITECTURES) - {"gemma2", "gptj"})


GROUPS = groups_of((3, (4, 2, 5, 0, 3)), (1, (1, 6)), (5, (2,)))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_attention, "_WORTH_IT", 100.0)


def own_logprobs(model: Any, groups: list[TokenGroup]) -> Tensor:
    """(C, T) from the model's full logits, one unpadded row at a time."""
    rows = [(group.prompt_ids, completion.ids) for group in groups for completion in group.completions]
    said = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        said.append(torch.nn.functional.pad(chosen, (0, max(len(c) for _, c in rows) - len(completion))))
    return torch.stack(said)


def gradients(model: Any, said: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (said * torch.linspace(-1, 2, said.numel(), dtype=said.dtype).view_as(said)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.usefixtures("always")
def test_values_and_gradients_are_those_of_the_models_own_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; norms and rotations of some architectures compute in float32 all the same."""
    model, batch = tiny_model(kind, dtype=torch.float64), collate(GROUPS, layout="shared", pad_id=PAD_ID)
    calls: list[int] = []
    kernel = shared_attention._at
    monkeypatch.setattr(shared_attention, "_at", lambda x, places: calls.append(1) or kernel(x, places))
    ours = score_tokens(model, batch).logprobs
    assert calls, "attention was not split"
    theirs = own_logprobs(model, GROUPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    found, expected = gradients(model, ours), gradients(model, theirs)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=5e-5, msg=name)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=4)), min_size=1, max_size=3),
)
def test_any_rows_are_those_of_the_masked_kernel(lengths: list[tuple[int, list[int]]]) -> None:
    """Of gpt2, whose norms are float64 here, so that what is left is the order of sums."""
    model, groups = tiny_model("gpt2", dtype=torch.float64), groups_of(*((p, tuple(n)) for p, n in lengths))
    results = []
    for worth_it in (100.0, -1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_attention, "_WORTH_IT", worth_it)
            batch = collate(groups, layout="shared", pad_id=PAD_ID)
            said = score_tokens(model, batch).logprobs
            if batch.attention_mask.dim() == 4 and batch.valid_mask.any():
                assert (rows_of(batch.attention_mask) is None) == (worth_it < 0)
            results.append((said, gradients(model, said)))
    (ours, found), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.usefixtures("always")
def test_no_gradient_comes_from_another_completion_or_padding() -> None:
    """Only the first completion of the first group counts: tokens of the others get exactly none."""
    only, used = first_counts(GROUPS[0])
    model = tiny_model("gpt2", tie_word_embeddings=False)
    batch = collate([only, *GROUPS[1:]], layout="shared", pad_id=PAD_ID)
    score_tokens(model, batch).logprobs[0].sum().backward()
    assert reached_tokens(model) == used


@pytest.mark.usefixtures("always")
def test_blocks_that_run_again_split_again() -> None:
    model, batch = tiny_model("gpt2"), collate(GROUPS, layout="shared", pad_id=PAD_ID)
    twin = copy.deepcopy(model)
    recompute_activations(twin)
    kept, again = (gradients(m, score_tokens(m, batch).logprobs) for m in (model, twin))
    assert rows_of(batch.attention_mask) is not None
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


def test_it_splits_where_few_of_the_pairs_are_seen() -> None:
    """Eight completions of 6 after a prompt of 4 are rows of 52: 52^2 pairs against 4^2 + 8 * 6 * 10. Two of 2 after
    one of 20 are 24^2 against 20^2 + 2 * 2 * 22: too little to gain."""
    many = collate(groups_of((4, (6,) * 8)), layout="shared", pad_id=PAD_ID)
    rows = rows_of(splitting(many))
    assert rows is not None and rows.pairs == 4**2 + 8 * 6 * 10 <= 52**2 / 2
    few = collate(groups_of((20, (2, 2))), layout="shared", pad_id=PAD_ID)
    assert rows_of(splitting(few)) is None


def test_masks_of_others_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def library(*arguments: Any, **settings: Any) -> Any:
        seen.append((arguments, settings))
        return "result", None

    monkeypatch.setattr(shared_attention, "sdpa_attention_forward", library)
    module, states, mask = torch.nn.Identity(), torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    attention = shared_attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for given_mask in (None, mask):
        assert attention(module, states, states, states, given_mask, scaling=0.5, is_causal=False) == ("result", None)
        arguments, settings = seen.pop()
        assert arguments[0] is module and arguments[4] is given_mask and not seen
        assert settings == {"scaling": 0.5, "is_causal": False}


def test_a_model_whose_attention_is_not_split_rightly_is_given_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert check_layouts(model, GROUPS, PAD_ID).layout == "shared"
    kernel = shared_attention._at
    monkeypatch.setattr(shared_attention, "_at", lambda x, places: kernel(x, places).flip(2))
    check = check_layouts(model, GROUPS, PAD_ID)
    assert check.layout == "plain" and "the shared layout changes log-probabilities" in check.reason
