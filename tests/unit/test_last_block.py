"""The last block run where it is read alone, against the block itself run whole, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.models import last_block
from accord.models.adapters import add_adapter
from accord.models.last_block import most_read, only_at
from accord.models.layout import collate
from accord.models.load import reward_model_from
from accord.models.recompute import recompute_activations
from accord.models.token_scores import score_completions, score_tokens, score_values
from models_support import PAD_ID, groups_of, tiny_model, uneven_model

FITTING = ("llama", "qwen2", "mistral")
# What the library's norms, which compute in float32 whatever the model does, differ by between two shapes.
ROUNDING = 2e-6


GROUPS = groups_of((12, (2, 3, 0)), (7, (1,)), (9, (4, 2)))


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_block, "_WORTH_IT", -1.0)


def narrowed(model: Any) -> list[tuple[int, ...]]:
    """Shapes (R, Q) of what the last block's MLP reads in the passes to come."""
    seen: list[tuple[int, ...]] = []
    model.base_model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    return seen


def compared(model: Any, twin: Any, loss: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Values and gradients of `loss(model)` with a narrow last block, and of its twin with a whole one, must agree."""
    seen, seen_whole = narrowed(model), narrowed(twin)
    ours = loss(model)
    (ours * torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)).sum().backward()
    with monkeypatch.context() as patch:
        whole(patch)
        theirs = loss(twin)
    (theirs * torch.linspace(-1, 2, theirs.numel(), dtype=theirs.dtype).view_as(theirs)).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=10 * ROUNDING, msg=name)
    assert seen != seen_whole, "the block ran whole both times"
    return seen


@pytest.mark.parametrize("kind", FITTING)
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_token_scores_and_gradients_are_those_of_the_whole_block(
    kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shared layout a prompt's last token is read once for all its completions; an empty one reads nothing."""
    made, batch = uneven_model(kind), collate(GROUPS, layout=layout, pad_id=PAD_ID)
    seen = compared(made, copy.deepcopy(made), lambda m: score_tokens(m, batch).logprobs, monkeypatch)
    assert seen == [(3, 5) if layout == "shared" else (6, 4)]


def test_values_and_scores_are_those_of_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = (
        reward_model_from(uneven_model("llama"), seed=0).double(),
        collate(GROUPS, layout="shared", pad_id=PAD_ID),
    )
    assert compared(copy.deepcopy(made), copy.deepcopy(made), lambda m: score_values(m, batch), monkeypatch) == [(3, 5)]
    # The last tokens alone: of the empty completion that of its prompt.
    assert compared(made, copy.deepcopy(made), lambda m: score_completions(m, batch), monkeypatch) == [(3, 3)]


def test_a_sliding_window_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens, of rows of up to 16: the library's mask has it, and its lines at the read places are used."""
    made = uneven_model("mistral", sliding_window=5)
    batch = collate(groups_of((12, (4,)), (9, (2,))), layout="plain", pad_id=PAD_ID)
    said = compared(made, copy.deepcopy(made), lambda m: score_tokens(m, batch).logprobs, monkeypatch)
    assert said == [(2, 4)]
    with torch.no_grad():
        other = uneven_model("mistral", sliding_window=None)
        assert not torch.allclose(score_tokens(made, batch).logprobs, score_tokens(other, batch).logprobs)


def test_adapters_in_the_last_block_are_run_and_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    made = uneven_model("llama")
    add_adapter(made, rank=2, alpha=4.0, targets=("q_proj", "k_proj", "o_proj", "down_proj"), seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    batch = collate(GROUPS, layout="shared", pad_id=PAD_ID)
    compared(made, copy.deepcopy(made), lambda m: score_tokens(m, batch).logprobs, monkeypatch)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(4, 14), st.lists(st.integers(0, 3), min_size=1, max_size=3)), min_size=1, max_size=3
    ),
    st.sampled_from(["shared", "plain"]),
)
@torch.no_grad()
def test_any_rows_score_as_under_the_whole_block(lengths: list[tuple[int, list[int]]], layout: Any) -> None:
    made = uneven_model("llama")
    batch = collate(groups_of(*((p, tuple(n)) for p, n in lengths)), layout=layout, pad_id=PAD_ID)
    ours = score_tokens(made, batch).logprobs
    with pytest.MonkeyPatch.context() as patch:
        whole(patch)
        theirs = score_tokens(made, batch).logprobs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_other_places_are_zero_without_gradient_and_the_block_is_left_as_it_was() -> None:
    made = uneven_model("llama")
    read = torch.zeros(1, 6, dtype=torch.bool)
    read[0, [1, 4]] = True
    states: list[Tensor] = []
    made.base_model.norm.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with only_at(made.base_model, most_read(made.base_model, read)):
        made.base_model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]), use_cache=False)
    assert states[0].shape[:2] == (1, 6) and not states[0][~read].any() and states[0][read].all()
    assert "forward" not in vars(made.base_model.layers[-1])


def test_a_block_runs_whole_where_narrowing_does_not_fit() -> None:
    """Other equations, attention written out, a forward of somebody else's, hardly less to do."""
    read = torch.zeros(2, 8, dtype=torch.bool)
    read[:, -2:] = True
    fitting = tiny_model("llama").base_model
    assert most_read(fitting, read) is not None
    assert most_read(fitting, torch.ones_like(read)) is None
    for kind in ("gpt2", "qwen3", "gemma2", "olmo2"):
        assert most_read(tiny_model(kind).base_model, read) is None
    written_out = tiny_model("llama").base_model
    written_out.config._attn_implementation = "eager"
    assert most_read(written_out, read) is None
    patched = tiny_model("llama").base_model
    patched.layers[-1].forward = lambda *_, **__: None
    assert most_read(patched, read) is None


def test_recomputed_activations_are_those_of_the_narrow_block() -> None:
    """The second run, in the backward pass, comes when the block is itself again."""
    made, batch = uneven_model("llama"), collate(GROUPS, layout="shared", pad_id=PAD_ID)
    twin = copy.deepcopy(made)
    recompute_activations(twin)
    seen = narrowed(twin)
    for each in (made, twin):
        score_tokens(each, batch).logprobs.sum().backward()
    assert seen == [(3, 5)] * 2
    for p, q in zip(made.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
